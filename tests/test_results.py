import pandas as pd
import pytest

from opticam import results


def test_rows_come_back_with_their_provenance(tmp_path):
    rows = pd.DataFrame({"image": ["a", "b"], "prob": [0.25, 1.0]})
    path = results.write_rows(rows, tmp_path / "deep" / "rows.parquet", {"model": "m", "num_steps": 3})
    read, provenance = results.read_rows(path)
    pd.testing.assert_frame_equal(read, rows)
    assert provenance["parameters"] == {"model": "m", "num_steps": 3}
    assert set(provenance) == {"parameters", "package", "code", "commit", "device", "torch"}
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    rows = pd.DataFrame({"image": ["a"]})
    path = results.write_rows(rows, tmp_path / "rows.parquet", {})
    before = path.read_bytes()

    def full(table, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(results.pq, "write_table", full)
    with pytest.raises(OSError, match="disk full"):
        results.write_rows(rows, path, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="results: no file at"):
        results.read_rows(tmp_path / "rows.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        results.read_rows(tmp_path / "text.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no provenance"):
        results.read_rows(tmp_path / "other.parquet")
