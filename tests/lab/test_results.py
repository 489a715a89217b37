import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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


def test_an_index_with_a_name_is_a_column_and_parameters_are_json(tmp_path):
    summary = pd.DataFrame({"v": [1.0, 2.0]}, pd.Index(["a", "b"], name="method"))
    rows, _ = results.read_rows(results.write_rows(summary, tmp_path / "rows.parquet", {}))
    assert rows.to_dict("list") == {"method": ["a", "b"], "v": [1.0, 2.0]}
    with pytest.raises(TypeError, match="parameters: wanted what JSON can hold"):
        results.write_rows(summary, tmp_path / "rows.parquet", {"root": tmp_path})
    with pytest.raises(ValueError, match=r"at its end, got x\.npy"):
        results.write_arrays({"x.npy": np.zeros(2)}, tmp_path / "a.npz", {})


ONE = pd.DataFrame({"image": ["a", "b"], "v": [1.0, 2.0]})
UNTOLD = {
    "index": (ONE.set_axis(["x", "y"]), "rows: wanted a name for the index, which becomes a column, got none"),
    "levels": (ONE.set_axis(pd.MultiIndex.from_tuples([(0, 1), (0, 2)])), "rows: wanted a name for the index, "),
    "both": (ONE.set_index("image", drop=False), "rows: wanted columns of different names, .* insert image, already"),
    "twice": (ONE.set_axis(["v", "v"], axis=1), r"rows: wanted columns of different names, .*\['v', 'v'\]"),
    "mixed": (ONE.assign(image=["a", 1]), r"rows: wanted .* values of one kind \(Conversion failed for column image "),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_a_table_on_disk_would_lose_is_refused(tmp_path, case):
    rows, message = UNTOLD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        results.write_rows(rows, tmp_path / "rows.parquet", {})
    assert not [*tmp_path.iterdir()]
    kept = results.write_rows(ONE[::-1], tmp_path / "rows.parquet", {})  # where integers are left out
    assert results.read_rows(kept)[0].to_dict("list") == {"image": ["b", "a"], "v": [2, 1]}


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


def test_grad_cam_under_another_name_is_read_once_also_where_an_image_was_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "EVIDENCE", tmp_path)
    names = [name for name in ("grad_cam", "hires_cam") for _ in range(2)]
    rows = pd.DataFrame({"method": names, "prob": [0.5, np.nan] * 2, "masked_prob": [0.25, np.nan] * 2})
    results.write_rows(rows, tmp_path / "tiny.parquet", {})
    assert set(results.read_evidence("tiny")[0].method) == {"grad_cam"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    rows = pd.DataFrame({"image": ["a"]})
    path = results.write_rows(rows, tmp_path / "rows.parquet", {})
    before = path.read_bytes()

    def full(table, where, **options):
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


def test_shards_of_more_digits_come_after_those_of_fewer(tmp_path):
    for shard, name in enumerate(["99999", "100000"]):
        rows = pd.DataFrame({"image": [name], "method": "m"})
        results.write_rows(rows, tmp_path / f"{name}.parquet", {"shards": 2, "shard": shard})
    assert results.read_shards(tmp_path)[0]["image"].tolist() == ["99999", "100000"]


def test_shards_beside_hidden_files_or_without_their_columns(tmp_path):
    rows = pd.DataFrame({"image": ["0"], "method": ["m"]})
    path = results.write_rows(rows, tmp_path / "00000.parquet", {"shards": 1, "shard": 0})
    (tmp_path / "._00000.parquet").write_bytes(b"Mac OS X")
    assert len(results.read_shards(tmp_path)[0]) == 1
    results.write_rows(rows[["image"]], path, {"shards": 1, "shard": 0})
    with pytest.raises(ValueError, match=r"^results: .* holds rows without image or method; wanted"):
        results.read_shards(tmp_path)
    results.write_rows(rows, path, {"shards": "1", "shard": 0})
    with pytest.raises(ValueError, match=r"^results: .* holds the shards \[0\]; wanted all of"):
        results.read_shards(tmp_path)


@pytest.mark.parametrize("text", ["no JSON", "[1]", "{}", '{"parameters": 3}', "\udc80"])
def test_damaged_provenance_is_refused(tmp_path, text):
    path = tmp_path / "00000.parquet"
    table = pa.table({"image": ["0"], "method": ["m"]})
    pq.write_table(table.replace_schema_metadata({b"opticam": text.encode(errors="surrogateescape")}), path)
    for read, given in ((results.read_rows, path), (results.read_shards, tmp_path)):
        with pytest.raises(ValueError, match=r"00000.parquet has a damaged provenance; wanted JSON with parameters$"):
            read(given)
    assert not results.is_done(path, {})
    np.savez(tmp_path / "maps.npz", opticam=np.array(text))
    with pytest.raises(ValueError, match=r"maps.npz has a damaged provenance; wanted JSON with parameters$"):
        results.read_arrays(tmp_path / "maps.npz")


@pytest.mark.slow
def test_damaged_bytes_are_refused(tmp_path):
    """Many bytes, in turn; where the file is read all the same, the numbers are as they were."""
    rows = pd.DataFrame({"image": ["a", "b"], "prob": [0.25, 1.0]})
    table = results.write_rows(rows, tmp_path / "rows.parquet", {})
    archive = results.write_arrays({"maps": np.arange(6.0)}, tmp_path / "maps.npz", {})
    files = (table, results.read_rows, "prob", [0.25, 1]), (archive, results.read_arrays, "maps", [*range(6)])
    for path, read, name, numbers in files:
        whole, refused = path.read_bytes(), 0
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            try:
                kept = read(path)[0]
                assert name not in kept or kept[name].tolist() == numbers  # the name may be damaged
            except ValueError as error:
                assert str(error).startswith(f"results: {path} ")  # noqa: PT017
                refused += 1
        assert refused > 20
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"is not an? .*, or damaged$"):
                read(path)
        path.write_bytes(whole)
    place = table.read_bytes().index(np.float64(0.25).tobytes())
    damaged = bytearray(table.read_bytes())
    damaged[place] ^= 1
    table.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rows.parquet is not a Parquet file, or damaged$"):
        results.read_rows(table)


def test_files_without_checksums_stay_readable(tmp_path):
    table = pa.table({"image": ["0"]}).replace_schema_metadata({b"opticam": b'{"parameters": {}}'})
    pq.write_table(table, tmp_path / "old.parquet")
    assert results.read_rows(tmp_path / "old.parquet")[0]["image"].tolist() == ["0"]


def test_what_cannot_be_written_is_refused(tmp_path):
    path, array = tmp_path / "maps.npz", np.zeros(2)
    for name in ("opticam", "file", "allow_pickle"):
        with pytest.raises(ValueError, match=f"^arrays: wanted another name than .*, got {name}$"):
            results.write_arrays({name: array}, path, {})
    for wrong in (array, None, {1: array}, {"a": [1, 2]}, {"a": None}):
        with pytest.raises(TypeError, match=r"^arrays: wanted "):
            results.write_arrays(wrong, path, {})
    with pytest.raises(TypeError, match=r"^rows: wanted a table of pandas, got "):
        results.write_rows({"a": [1]}, tmp_path / "rows.parquet", {})
    for wrong in (5, [1], None):
        with pytest.raises(TypeError, match=r"^parameters: wanted a dict, got "):
            results.write_rows(ONE, tmp_path / "rows.parquet", wrong)
    np.save(tmp_path / "one.npy", array)
    with pytest.raises(ValueError, match=r"one.npy is not an archive of plain arrays, or damaged$"):
        results.read_arrays(tmp_path / "one.npy")
    assert [file.name for file in tmp_path.iterdir()] == ["one.npy"]
