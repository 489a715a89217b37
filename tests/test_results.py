import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opticam import METHODS, SCHEDULES, results
from opticam.methods.ascent import map_space, weight_space
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


class Own(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength


def dense(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


FAST = partial(METHODS["opti_cam"], **SCHEDULES["fast"])
DIFFERENT = {
    "options": [METHODS["opti_cam"], FAST, partial(FAST, num_steps=17)],
    "function": [METHODS["grad_cam"], METHODS["layer_cam"], lambda *_: 1, lambda *_: 2],
    "attribute": [lambda x: x.relu(), lambda x: x.abs()],
    "default": [lambda x, a=1: a, lambda x, a=2: a, lambda x, *, a=1: a, lambda x, *, a=2: a],
    "closure": [scaled(0.5), scaled(0.25)],
    "positional": [in_a_set, partial(in_a_set, 1), partial(in_a_set, 2)],
    "tensor": [torch.zeros(2000), torch.zeros(2000).double(), torch.zeros(2000).index_fill(0, torch.tensor([999]), 1)],
    "library": [torch.sigmoid, F.relu, torch.Tensor.sigmoid],
    "network": [dense(0), dense(1), Own(1), Own(2)],
    "package's lambda": [weight_space, weight_space._replace(sums=map_space.sums)],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_methods_that_differ_are_described_differently(tiny, kind):
    methods = [partial(METHODS["opti_cam"], some=method) for method in DIFFERENT[kind]]
    described = [json.dumps(describe(method, tiny)) for method in methods]
    assert len(set(described)) == len(methods)
    assert described == [json.dumps(describe(method, tiny)) for method in methods]


def test_layers_are_described_by_name(tiny):
    layers = [partial(METHODS["grad_cam"], layer=layer) for layer in (tiny.features[0], tiny.features[2])]
    assert [describe(method, tiny)[-1] for method in layers] == [{"layer": "features.0"}, {"layer": "features.2"}]


PROGRAM = """
from functools import cache, partial
import torch
from torch import nn
from opticam import METHODS, SCHEDULES
from opticam.results import describe
from test_results import in_a_set
SIZE = {size}
def direct(model, images, class_idx):
    return SIZE
def in_a_list(model, images, class_idx):
    return [image * SIZE for image in images]
@torch.no_grad()
def decorated(model, images, class_idx):
    return SIZE
class Kept:
    @staticmethod
    def one():
        return {size}
def of_a_class(model, images, class_idx):
    return Kept.one()
@cache
def cached(model, images, class_idx):
    return SIZE
def even(n):
    return n == 0 or odd(n - SIZE)
def odd(n):
    return n != 0 and even(n - 1)
def unrelated(model, images, class_idx):
    return images.SIZE
def of_a_table(model, images, class_idx):
    return methods["direct"](model, images, class_idx)
methods = {{f.__name__: f for f in (direct, in_a_list, decorated, of_a_class, cached, even, of_a_table)}}
same = {{"fast": partial(METHODS["opti_cam"], **SCHEDULES["fast"]), "in_a_set": in_a_set, "unrelated": unrelated}}
for name, method in {{**methods, **same}}.items():
    print(name, describe(method, nn.Identity()))
"""


def test_another_process_describes_alike_what_has_not_changed():
    told = []
    for seed, size in ("1", 3), ("2", 3), ("3", 4):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", PROGRAM.format(size=size)]
        told.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines())
    assert told[0] == told[1]
    changed = [line.split()[0] for line, other in zip(told[0], told[2], strict=True) if line != other]
    assert changed == ["direct", "in_a_list", "decorated", "of_a_class", "cached", "even", "of_a_table"]


def test_what_no_other_process_would_recognise_is_refused(tiny):
    with pytest.raises(ValueError, match=r"methods: wanted functions whose options are numbers.* of object"):
        describe(partial(METHODS["grad_cam"], layer=object()), tiny)


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
