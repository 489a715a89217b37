"""That the benchmarks run, and say what they have found; their numbers are for `benchmarks/results`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TinyViT

from opticam import opti_cam, wrap
from opticam.lab.files import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
GPU = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny"]


def run(command, **variables):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    done = run([sys.executable, "-c", f"import {', '.join(names)}"], PYTHONPATH=f"{BENCHMARKS}{os.pathsep}{REPOSITORY}")
    assert done.returncode == 0, done.stderr


def test_the_published_way_has_the_maps_of_opti_cam(monkeypatch, images, class_idx):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from published import published_loop

    torch.manual_seed(0)
    model = wrap(TinyViT().double().eval(), "features")  # tokens; of maps, published.py checks it before it times
    torch.set_default_dtype(torch.float64)
    try:
        theirs = published_loop(model, images, class_idx, 2)  # still rising: the last map is the best
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(theirs, opti_cam(model, images, class_idx, num_steps=2).saliency)


@pytest.mark.slow
def test_the_gpu_benchmark_goes_all_its_way_on_a_cpu(tmp_path):
    done = run([*GPU, "--output", str(tmp_path / "gpu.json")])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "cpu"
    assert 0 < found["seconds"] < found["budget"] == 480
    assert "off in all others" in found["TF32"]
    assert found["tests"]["outcome"].split()[1].rstrip(",") in ("skipped", "passed")
    assert found["tests"] | {"outcome": ""} == {
        "command": "pytest -m gpu",
        "exit status": 0,
        "outcome": "",
        "failed": [],
    }
    rows = found["rows"]
    assert [row for row in rows if "not measured" in row] == []
    keys = [(row["model"], row["way"], row["precision"], row["batch"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for model in ("resnet50", "vit_b_16"):
        for precision in ("float32", "float32, TF32", "bfloat16"):
            assert {(model, way, precision, 2) for way in ("ours", "published", "floor")} <= set(keys)
        for precision in ("float32", "bfloat16"):
            assert {(model, "ours", precision, batch) for batch in (1, 3)} <= set(keys)
        assert (model, "ours, compiled", "bfloat16", 2) in keys
    for row in rows:
        assert row["hours for 50,000 images"] == pytest.approx(50_000 / row["images per second"] / 3600)
        assert row["peak MiB"] is None  # of a GPU only
        assert row["turns"] == 1
        assert ("seconds / ours" in row) == (row["way"] != "ours, compiled")
        if row["way"] == "ours, compiled":
            assert row["mean |map - uncompiled|"] < 0.05


@pytest.mark.slow
def test_the_gpu_benchmark_says_what_it_had_no_time_for(tmp_path):
    done = run([*GPU, "--budget", "1", "--output", str(tmp_path / "gpu.json")])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row.get("not measured") for row in found["rows"]} == {"no time was left"}
    assert found["tests"]["outcome"] == "no time was left"


@pytest.mark.slow
def test_the_gpu_benchmark_names_what_is_missing(tmp_path):
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')")
    done = run(GPU, PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu: ")  # torchvision may have warned before
    assert "cannot import timm; wanted" in done.stderr


def test_the_soak_is_not_passed_by_a_leak(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from soak import faults

    before = {"images": 1000, "MiB": 500.0, "open files": 9}
    assert faults([before, before | {"MiB": 549.0}], True, 0) == []
    assert faults([before, before | {"MiB": 551.0}], True, 0) == [
        "memory went from 500 to 551 MiB; wanted within 50 MiB"
    ]
    assert faults([before, before | {"open files": 10}], True, 0) == ["open files went from 9 to 10; wanted as many"]
    assert len(faults([before, before], False, 1)) == 2


def test_the_soak_was_passed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from soak import faults

    found = json.loads((BENCHMARKS / "results" / "soak.json").read_text())
    assert (found["images"], found["kills"], found["rows streamed"]) == (10_000, 10, 20_000)
    assert [found["rows"][0]["images"], found["rows"][-1]["images"]] == [1000, 10_000]
    assert faults(found["rows"], found["rows identical"], 10 - found["kills"]) == []
