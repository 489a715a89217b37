import numpy as np
import pandas as pd
import pytest

from opticam.lab import results


def test_rows_come_back_with_their_provenance(tmp_path):
    rows = pd.DataFrame({"image": ["a", "b"], "prob": [0.25, 1.0]})
    path = results.write_rows(rows, tmp_path / "deep" / "rows.parquet", {"model": "m", "num_steps": 3})
    read, provenance = results.read_rows(path)
    pd.testing.assert_frame_equal(read, rows)
    assert provenance["parameters"] == {"model": "m", "num_steps": 3}
    assert set(provenance) == {"parameters", "package", "code", "commit", "device", "torch"}
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_evidence_in_single_precision_comes_in_double(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "EVIDENCE", tmp_path)
    columns = {"method": "rise", "prob": [0.25, 1.0], "masked_prob": [0.5, 0.5]}
    rows = pd.DataFrame({**columns, "road": np.array([0.1, 0.2], np.float32)})
    results.write_rows(rows, tmp_path / "tiny.parquet", {})
    read, _ = results.read_evidence("tiny")
    assert str(read["road"].dtype) == "float64"
    assert read["average_gain"].tolist() == [1 / 3, 0]
    assert read["gain_minus_drop"].tolist() == [1 / 3, -0.5]
    assert read["log_odds"][0] == pytest.approx(np.log(3))
    assert np.isnan(read["log_odds"][1])  # p is 1


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


def test_arrays_come_back_with_their_provenance(tmp_path):
    arrays = {"maps": np.arange(6, dtype=np.uint8).reshape(2, 3), "names": np.array(["a", "bc"])}
    path = results.write_arrays(arrays, tmp_path / "deep" / "maps.npz", {"model": "m"}, "cuda")
    read, provenance = results.read_arrays(path)
    assert sorted(read) == ["maps", "names"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    assert (provenance["parameters"], provenance["device"]) == ({"model": "m"}, "cuda")
    assert [file.name for file in path.parent.iterdir()] == ["maps.npz"]
    with pytest.raises(ValueError, match="arrays: wanted numbers or text, objects holds objects"):
        results.write_arrays({"objects": np.array([{}])}, path, {})
    assert sorted(results.read_arrays(path)[0]) == ["maps", "names"]
    assert [file.name for file in path.parent.iterdir()] == ["maps.npz"]


def test_arrays_of_others_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for name in ("text", "objects"):
        with pytest.raises(ValueError, match="is not an archive of plain arrays"):
            results.read_arrays(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="has no provenance"):
        results.read_arrays(tmp_path / "other.npz")


def test_a_missing_result_names_the_notebook_that_writes_it(tmp_path):
    for read in (results.read_rows, results.read_arrays):
        with pytest.raises(FileNotFoundError, match=r"no file at .*; notebook 05 writes it: opticam run 05$"):
            read(tmp_path / "05_ablations.parquet")


@pytest.mark.parametrize("what", ["missing", "parameters", "version", "twice"])
def test_shards_that_do_not_belong_together(tmp_path, monkeypatch, what):
    for k in range(2):
        parameters = {"shards": 2, "shard": k, "files": str(k), "model": "a"}
        if k == 1 and what == "parameters":
            parameters["model"] = "b"
        if k == 1 and what == "version":
            monkeypatch.setattr(results, "code_digest", lambda: "other")
        image = "0" if what == "twice" else str(k)
        if (k, what) != (1, "missing"):
            rows = pd.DataFrame({"image": [image], "method": ["m"]})
            results.write_rows(rows, tmp_path / f"{k:05d}.parquet", parameters)
    message = {"missing": "wanted all of 0..1", "parameters": "different parameters", "version": "different versions"}
    with pytest.raises(ValueError, match=message.get(what, "holds 0 twice")):
        results.read_shards(tmp_path)
