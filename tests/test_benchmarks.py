"""That the benchmarks run, and say what they have found; their numbers are for `benchmarks/results`."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyViT
from PIL import Image

from opticam import opti_cam, wrap
from opticam.lab.datasets import imagenet
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


@pytest.fixture
def preregistered(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import preregistered

    return preregistered


def test_the_page_expects_what_its_program_prints(preregistered):
    page = (REPOSITORY / "docs" / "preregistration.md").read_text()
    assert preregistered.expect().to_markdown(index=False, disable_numparse=True) in page


def test_the_images_of_the_test_are_others_and_always_the_same(preregistered):
    names = preregistered.image_names()
    assert (len(names), names[0]) == (1000, "ILSVRC2012_val_00000072")
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "7081344531b98b96"
    shipped, _ = preregistered.read_evidence("10_robust_opti_cam")
    assert not {*names} & {name.removesuffix(".JPEG") for name in shipped.image}


def test_the_images_of_the_test_are_copied_with_their_boxes(preregistered, tmp_path):
    few = preregistered.image_names(3)
    root = tmp_path / "all"
    places = {name: root / "val" / "n01440764" / f"{name}.JPEG" for name in [*few, "ILSVRC2012_val_00000001"]}
    places[few[0]].parent.mkdir(parents=True)
    for i, path in enumerate(places.values()):
        Image.new("RGB", (60, 40 + i)).save(path)
        sides = "".join(f"<{side}>{i + 1}</{side}>" for i, side in enumerate(("xmin", "ymin", "xmax", "ymax")))
        box = f"<object><name>n01440764</name><bndbox>{sides}</bndbox></object>"
        path.with_suffix(".xml").write_text(f"<annotation>{box * 2}</annotation>")
    preregistered.choose(root, tmp_path / "few", 3)
    copied = imagenet(tmp_path / "few")
    assert [photo.path.stem for photo in copied.records] == few
    assert {(photo.label, photo.boxes, photo.fault) for photo in copied.records} == {(0, ((1, 2, 3, 4),) * 2, "")}
    assert copied.records[0].path.read_bytes() == places[few[0]].read_bytes()
    with pytest.raises(ValueError, match=r"FOLDER: wanted a new one, got .*few"):
        preregistered.choose(root, tmp_path / "few", 3)
    with pytest.raises(ValueError, match=r"ROOT: wanted the original files, got images that all have \(60, \d+\)"):
        preregistered.choose(root, tmp_path / "fewer", 1)
    again = root / "val" / "n01443537" / places[few[2]].name
    again.parent.mkdir()
    again.with_suffix(".xml").write_text(places[few[2]].with_suffix(".xml").read_text().replace("01440764", "01443537"))
    again.write_bytes(places[few[2]].read_bytes())
    with pytest.raises(ValueError, match=f"ROOT: wanted each image once, got {few[2]} in several folders"):
        preregistered.choose(root, tmp_path / "fewer", 3)
    places[few[1]].with_suffix(".xml").write_text("damaged")
    with pytest.raises(ValueError, match=f"ROOT: wanted 3 images with boxes, lacks 1 of them, such as {few[1]}"):
        preregistered.choose(root, tmp_path / "fewer", 3)
    assert not (tmp_path / "fewer").exists()


LITE2_BLACK, LITE2_GRAY = (f"log_odds: efficientnet_lite2, {fill}" for fill in ("black", "gray"))
WIDE, OTHER = (f"log_odds: efficientnet_lite0, {fill}" for fill in ("wide blur", "other photo"))
GRAY, BLACK = (f"average_gain: efficientnet_lite0, {fill}" for fill in ("gray", "black"))
AS_EXPECTED = {LITE2_BLACK: 1, LITE2_GRAY: 1, "insertion": 0.04, "road": 0.01, "deletion": -0.01}
AS_EXPECTED |= {"energy_pointing_game": -0.03, "rank_correlation": -0.09, WIDE: 1, OTHER: -1, GRAY: 0.4, BLACK: 0.5}
ALMOST = 2.05 / 200**0.5  # of a standard deviation: p is 0.04


@pytest.mark.parametrize(
    ("gains", "spread", "fast", "missed"),
    [
        ({}, 0.001, 0.2, []),
        ({LITE2_BLACK: 0}, 0.001, 0.2, ["log-odds by Lite2, over black"]),
        ({"insertion": -0.04}, 0.001, 0.2, ["insertion, points"]),
        ({"road": -0.01}, 0.001, 0.2, ["ROAD, points"]),  # clearly behind
        ({"road": -0.01, "deletion": 0.01}, 0.1, 0.2, []),  # perhaps not behind
        ({"road": -0.021}, 0.2, 0.2, ["ROAD, points"]),  # the mean is too far
        ({"deletion": 0.01}, 0.001, 0.2, ["deletion turned round, points"]),
        ({"energy_pointing_game": -0.05}, 0.001, 0.2, ["EP, points"]),
        ({"energy_pointing_game": 0.03}, 0.001, 0.2, ["EP, points"]),  # ahead was not expected
        ({"rank_correlation": -0.11}, 0.001, 0.2, ["rank correlation under noise"]),
        ({OTHER: 1}, 0.001, 0.2, ["log-odds by Lite0, over another photo"]),
        ({GRAY: 0.29}, 0.001, 0.2, ["AG by Lite0, over gray, %, the value itself"]),
        ({}, 0.001, 0.4, ["AG by Lite0, over gray, minus that of `fast`, points"]),
        ({BLACK: 0.44}, 0.001, 0.2, ["AG by Lite0, over black, %, the value itself"]),
        ({LITE2_BLACK: ALMOST, LITE2_GRAY: ALMOST}, 1, 0.2, []),
        (
            dict.fromkeys((LITE2_BLACK, LITE2_GRAY, WIDE), ALMOST),  # the first stands alone, Holm's takes the others
            1,
            0.2,
            ["log-odds by Lite2, over gray", "log-odds by Lite0, over the wide blur"],
        ),
    ],
)
def test_an_endpoint_is_met_by_what_the_page_says(preregistered, gains, spread, fast, missed):
    found = preregistered.judge(rows_of([f"{i:03d}" for i in range(200)], gains, spread, fast))
    assert found[~found.met].endpoint.tolist() == missed
    assert (found.n == 200).all()


def rows_of(images, gains=(), spread=0.001, fast=0.2):
    """Of notebook 10: Grad-CAM has 0 everywhere, robust what is given, else what is expected."""
    around = np.linspace(-1, 1, len(images)) * 3**0.5  # mean 0, standard deviation 1
    robust = {name: AS_EXPECTED[name] + 0.001 * around for name in AS_EXPECTED}
    robust |= {name: gain + spread * around for name, gain in dict(gains).items()}
    of = {"grad_cam": dict.fromkeys(AS_EXPECTED, 0.0), "opti_cam:robust": robust}
    of |= {"opti_cam:fast": dict.fromkeys(AS_EXPECTED, fast)}
    return pd.concat(pd.DataFrame({"image": images, "method": name, **columns}) for name, columns in of.items())


def test_without_boxes_all_but_their_endpoint_are_judged(preregistered):
    found = preregistered.judge(rows_of([f"{i:03d}" for i in range(40)]).assign(energy_pointing_game=np.nan))
    assert found[~found.met].endpoint.tolist() == ["EP, points"]
    assert found[found.n == 0].endpoint.tolist() == ["EP, points"]


def test_only_whole_rows_of_the_test_are_judged(preregistered):
    names = [f"{name}.JPEG" for name in preregistered.image_names()]
    rows = rows_of(names).reset_index(drop=True)
    assert preregistered.check_rows(rows) == []
    assert preregistered.check_rows(rows[rows.image != names[3]]) == [names[3].removesuffix(".JPEG")]
    robust = rows.method == "opti_cam:robust"
    wrong = {
        "lacks the column average_gain: efficientnet_lite0, black": rows.drop(columns=BLACK),
        "lacks the column image": rows.drop(columns="image"),
        "got 1 others, such as a": pd.concat([rows, rows[:1].assign(image="a.JPEG")]),
        "got 0 of ILSVRC2012_val_00000072": rows[~robust | (rows.image != names[0])],
        "got 2 of ILSVRC2012_val_00000072": pd.concat([rows, rows[robust][:1].assign(image=f"folder/{names[0]}")]),
        "by opti_cam:fast, got 0": rows[rows.method != "opti_cam:fast"],
        "wanted numbers in road, got nan": rows.assign(road=rows.road.where(robust)),
        "wanted numbers in energy_pointing_game, got inf": rows.assign(energy_pointing_game=np.inf),
    }
    for told, changed in wrong.items():
        with pytest.raises(ValueError, match=f"ROWS: .*{told}"):
            preregistered.check_rows(changed)
