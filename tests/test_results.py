import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from opticam import METHODS, SCHEDULES, results
from opticam.results import describe


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


def scaled(factor):
    return lambda model, images, class_idx: torch.full_like(images[:, :1], factor)


def in_a_set(model, images, class_idx, kind="a"):
    return images if kind in {"a", "b", "c", "d"} else None


def test_methods_that_differ_are_described_differently(tiny):
    grid = torch.zeros(1000)
    options = [
        {},
        SCHEDULES["fast"],
        {"layer": tiny.features[0]},
        {"layer": tiny.features[2]},
        {"u": grid},
        {"u": grid.double()},
        {"u": grid.index_fill(0, torch.tensor([500]), 1)},
        {"normalize": torch.sigmoid},
        {"normalize": F.relu},
    ]
    methods = [partial(METHODS["opti_cam"], **some) for some in options]
    methods += [
        METHODS["grad_cam"],
        scaled(0.5),
        scaled(0.25),
        in_a_set,
        partial(in_a_set, 1),
        lambda *_: 1,
        lambda *_: 2,
    ]
    described = [repr(describe(method, tiny)) for method in methods]
    assert len(set(described)) == len(methods)
    assert described == [repr(describe(method, tiny)) for method in methods]
    assert describe(partial(METHODS["grad_cam"], layer=tiny.features[0]), tiny)[-1] == {"layer": "features.0"}


def test_another_process_describes_alike():
    # of its own module and of a script, with what the function reads around it
    program = """
from functools import partial
from torch import nn
from opticam import METHODS, SCHEDULES
from opticam.results import describe
from test_results import in_a_set
SIZE = {}
def own(model, images, class_idx):
    return SIZE
methods = [partial(METHODS["opti_cam"], **SCHEDULES["fast"]), in_a_set, own]
print([describe(method, nn.Identity()) for method in methods])
"""
    told = []
    for seed, size in ("1", 3), ("2", 3), ("3", 4):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", program.format(size)]
        told.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert told[0] == told[1]
    assert told[0] != told[2]


def test_what_no_other_process_would_recognise_is_refused(tiny):
    with pytest.raises(ValueError, match=r"methods: wanted functions whose options are numbers.* of object"):
        describe(partial(METHODS["grad_cam"], layer=object()), tiny)
