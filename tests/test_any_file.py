"""Whatever is in a file, it is read right or refused in one sentence that begins with what it is about."""

import io
import json
import re
from copy import deepcopy

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from torch import nn

from opticam.jobs.batch import read_batches
from opticam.jobs.runner import notebook_parameters
from opticam.lab.datasets import imagefolder, imagenet, read_image
from opticam.networks import MODELS, ModelSpec, load_model

RAMP = np.add.outer(np.arange(11), 7 * np.arange(13))
COLORS = np.stack([RAMP, 2 * RAMP, 255 - RAMP], 2).astype(np.uint8)


def drawn(number):
    """So many examples, the same in every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@st.composite
def damage(draw):
    """What changes some bytes: flips bits, cuts, inserts or moves."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "flip", "cut", "end", "insert", "move"]),
                st.floats(0, 1),
                st.binary(min_size=1, max_size=3),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def change(whole):
        for kind, where, new in edits:
            place = int(where * (len(whole) - 1)) if whole else 0
            left, rest = whole[:place], whole[place:]
            whole = {
                "flip": left + bytes(a ^ b for a, b in zip(rest, new, strict=False)) + rest[len(new) :],
                "cut": left + rest[len(new) :],
                "end": left,
                "insert": left + new + rest,
                "move": rest[: len(new)] + left + rest[len(new) :],
            }[kind]
        return whole

    return change


def outcome(begins, call, *args, errors=ValueError, **options):
    """What a call returns; or None where it raises one of the errors, in a sentence that says what it is about."""
    try:
        return call(*args, **options)
    except errors as error:
        assert re.match(begins, str(error)), f"{type(error).__name__}: {error}"  # noqa: PT017
        return None


# ----------------------------------------------------------------------------------------------------------- images


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RGB = Image.fromarray(COLORS)
IMAGES = {
    "jpeg": encoded(RGB, "JPEG", quality=95, exif=Image.Exif()),
    "jpeg, cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "png, palette": encoded(RGB.quantize(16), "PNG", transparency=3),
    "png, 16 bits": encoded(Image.fromarray((300 * RAMP).astype(np.uint16)), "PNG"),
    "png, alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff, lab": encoded(RGB.convert("YCbCr"), "TIFF"),
    "tiff, packed": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "tiff, float": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "tiff, 32 bits": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "gif": encoded(RGB, "GIF"),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "bmp": encoded(RGB, "BMP"),
    "ppm": encoded(RGB, "PPM"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
@pytest.mark.parametrize("kind", IMAGES)
@drawn(30)
@given(change=damage(), window=st.none() | st.just((0, 255)))
def test_bytes_of_images(kind, change, window, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    path = tmp_path / "a"
    path.write_bytes(change(IMAGES[kind]))
    image = outcome("(image|window): ", read_image, path, window=window, errors=(OSError, ValueError))
    if image is not None:
        assert image.mode == "RGB"
        if kind == "png":  # its bytes are checked by sums
            np.testing.assert_array_equal(image, COLORS)


# ----------------------------------------------------------------------------------------------------------- tables

HEADER = "image,xmin,ymin,xmax,ymax\n"
ROWS = [["c/a.png", "1", "2", "5", "7"], ["c/b.png", "0", "0", "3", "3"], ["a.png", "2.5", "2", "6", "8"]]
WORDS = st.sampled_from(["", "nan", "inf", "-1", "1e3", "1e999", "x", "a.png", "c/b.png", "4,5", "0x1", "9"])
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=',"'), max_size=4)


@pytest.fixture
def photos(tmp_path):
    for name in ("c/a.png", "c/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(IMAGES["png"])
    return tmp_path


def table(rows):
    return "".join(",".join(row) + "\n" for row in rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* match no photo")
@drawn(100)
@given(row=st.integers(0, 2), column=st.integers(0, 4), word=WORDS | TEXT)
@example(row=0, column=1, word="2,5")
def test_values_of_tables_of_boxes(photos, row, column, word):
    rows = deepcopy(ROWS)
    rows[row][column] = word
    (photos / "boxes.csv").write_text(HEADER + table(rows), encoding="utf-8")
    found = outcome("boxes.csv: ", imagefolder, photos, boxes_csv=photos / "boxes.csv")
    assert (found is None) == ("," in word), "a decimal comma is one field more"
    for photo in found.records if found else []:
        own = [row[1:] for row in rows if row[0] in (photo.name, photo.path.name)]
        try:
            boxes = [tuple(map(float, box)) for box in own]
            malformed = not all(-np.inf < a <= c < np.inf and -np.inf < b <= d < np.inf for a, b, c, d in boxes)
        except ValueError:
            malformed = True
        assert photo.boxes == (() if malformed else tuple(boxes))
        assert bool(photo.fault) == malformed
        assert not malformed or photo.fault.startswith(f"annotation: cannot read that of {photo.path.name} (")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* match no photo")
@drawn(60)
@given(change=damage())
def test_bytes_of_tables_of_boxes(photos, change):
    (photos / "boxes.csv").write_bytes(change((HEADER + table(ROWS)).encode()))
    found = outcome("boxes.csv: ", imagefolder, photos, boxes_csv=photos / "boxes.csv")
    assert found is None or [photo.name for photo in found.records] == ["c/a.png", "c/b.png"]


OBJECT = "<object><name>n01440764</name><bndbox>{}</bndbox></object>"
SIDES = "".join(f"<{side}>{n}</{side}>" for n, side in enumerate(("xmin", "ymin", "xmax", "ymax")))
ANNOTATIONS = {
    "i1.xml": f"<annotation>{OBJECT.format(SIDES) * 2}</annotation>",
    "LOC_val_solution.csv": "ImageId,PredictionString\ni1,n01440764 0 1 2 3 n01440764 0 1 2 3\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANNOTATIONS)
@drawn(60)
@given(change=damage())
@example(change=lambda whole: whole.replace(b"\ni1", b"\n/i1"))
@example(change=lambda whole: whole.replace(b"3\n", b"3 4\n"))
def test_bytes_of_annotations_of_imagenet(name, change, tmp_path):
    images = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    images.mkdir(parents=True, exist_ok=True)
    (images / "i1.JPEG").write_bytes(IMAGES["jpeg"])
    place = tmp_path if name.endswith("csv") else tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(changed := change(ANNOTATIONS[name].encode()))
    found = outcome(
        r"LOC_val_solution\.csv: |root: no ImageNet", imagenet, tmp_path, errors=(ValueError, FileNotFoundError)
    )
    for photo in found.records if found else []:
        assert re.match("annotation: |label: |$", photo.fault)
        assert photo.fault == "" or photo.boxes == () or photo.label == -1
        if name.endswith("csv") and not photo.fault:
            assert len(changed.decode().splitlines()[1].partition(",")[2].replace('"', "").split()) % 5 == 0


# ------------------------------------------------------------------------------------- notebooks and YAML of batches

PARAMETERS = """
from typing import Literal
count: int = 2  # how many
rate: float = 0.5  # how fast
names: list[str] = ["a"]  # several
kind: Literal["a", 1] = "a"  # which
root: str = ""  # where from
shard: str = ""  # k/n
results: str = "r"  # where to
"""
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
CELLS = [
    new_markdown_cell("# What?", id="a"),
    new_code_cell(PARAMETERS.strip(), id="b", metadata={"tags": ["parameters"]}),
]
NOTEBOOK = nbformat.writes(new_notebook(cells=CELLS, metadata={"kernelspec": KERNEL}))
NOTEBOOK_FAULT = r"(notebook: |the |parameter \w+ of |notebook: the parameters of )"
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just([])
    | st.just({})
    | st.just(10**400)
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def places(tree, place=()):
    """The place of everything inside a tree of dicts and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inner:
        yield (*place, name)
        yield from places(value, (*place, name))


@st.composite
def swapped(draw, tree, values=VALUES):
    """A tree with another value, or none, at one or two of its places."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        *inner, last = draw(st.sampled_from(list(places(tree)) or [("new",)]))
        node = tree
        for name in inner:
            node = node[name]
        if draw(st.booleans()) or last == "new":
            node[last] = draw(values)
        else:
            del node[last]
    return tree


def check_notebook(path):
    found = outcome(r"notebook: |parameter \w+ of ", notebook_parameters, path)
    for name, parameter in (found or {}).items():
        assert name.isidentifier()
        assert json.loads(json.dumps(parameter)) == parameter
    return found


@pytest.mark.slow
@drawn(100)
@given(tree=swapped(json.loads(NOTEBOOK)))
@example(tree={**json.loads(NOTEBOOK), "cells": [{"cell_type": "code", "source": "", "metadata": {"tags": None}}]})
def test_values_of_notebooks(tree, tmp_path):
    path = tmp_path / "10_tiny.ipynb"
    path.write_text(json.dumps(tree))
    check_notebook(path)


@pytest.mark.slow
@drawn(100)
@given(change=damage())
def test_bytes_of_notebooks(change, tmp_path):
    path = tmp_path / "10_tiny.ipynb"
    path.write_bytes(change(NOTEBOOK.encode()))
    check_notebook(path)


@pytest.mark.slow
@drawn(100)
@given(change=damage())
@example(change=lambda source: source.replace(b"0.5", b"1" + b"0" * 400))
@example(change=lambda source: source + b"\nx: int = " + b"-" * 100_000 + b"1")
@example(change=lambda source: source + b"\nx: int = " + b"-" * 2000 + b"1")
@example(change=lambda source: source + b"\nx: " + b"-" * 2000 + b"int = 1")
@example(change=lambda source: source.replace(b'Literal["a", 1]', b"Literal[print]"))
@example(change=lambda source: source.replace(b'Literal["a", 1]', b'"Literal[]]"'))
def test_bytes_of_the_parameters_of_notebooks(change, tmp_path):
    tree, path = json.loads(NOTEBOOK), tmp_path / "10_tiny.ipynb"
    tree["cells"][1]["source"] = change(PARAMETERS.strip().encode()).decode(errors="replace")
    path.write_text(json.dumps(tree))
    check_notebook(path)


BATCH = {
    "notebook": "10_tiny.ipynb",
    "parameters": {"count": 5, "root": "data"},
    "grid": {"names": [["x", "y"], []], "rate": [1, 0.5]},
    "shards": 2,
    "resources": {"GPU": 1},
    "output": "out",
    "evidence": {"10_tiny": "10_tiny"},
}


@pytest.fixture
def batches(tmp_path, monkeypatch):
    monkeypatch.delenv("OPTICAM_IMAGENET", raising=False)
    (tmp_path / "10_tiny.ipynb").write_text(NOTEBOOK)
    return tmp_path


def check_batch(folder):
    found = outcome(r"some\.yaml(, line \d+)?: ", read_batches, folder / "some.yaml")
    for folder, run in [(part.folder, run) for part in found or [] for run in part.runs]:
        assert run.output.parent == folder
        assert json.loads(json.dumps(run.parameters)) == run.parameters
        for name, value in run.parameters.items():
            assert type(value) in {"count": (int,), "rate": (float,), "names": (list,), "kind": (str, int)}.get(
                name, (str,)
            )
    return found


@pytest.mark.slow
@drawn(150)
@given(tree=swapped(BATCH, VALUES | st.sampled_from(["~nobody/x", "\0", "a" * 300, "\ud800", "/", "10"])))
@example(tree=BATCH | {"parameters": {"root": 5}})
@example(tree=BATCH | {"parameters": {"root": "~nobody/x"}})
@example(tree=BATCH | {"output": "~nobody/x"})
@example(tree=BATCH | {"output": "\0"})
@example(tree=BATCH | {"notebook": "a" * 300})
@example(tree=BATCH | {"parameters": {"rate": 10**400}})
def test_values_of_batches(tree, batches):
    (batches / "some.yaml").write_text(json.dumps(tree), encoding="utf-8")
    check_batch(batches)


@pytest.mark.slow
@drawn(150)
@given(change=damage())
@pytest.mark.parametrize("flow", [True, False])
@example(change=lambda text: text.replace(b"5", b"!!timestamp foo"))
@example(change=lambda text: text.replace(b"5", b"!!bool foo"))
@example(change=lambda text: text.replace(b"5", b"!!int foo"))
@example(change=lambda text: text.replace(b"5", b"2001-99-99"))
def test_bytes_of_batches(flow, change, batches):
    (batches / "some.yaml").write_bytes(change(yaml.safe_dump(BATCH, default_flow_style=flow).encode()))
    check_batch(batches)


# ------------------------------------------------------------------------------------------------------ checkpoints


def tiny(pretrained, num_classes=1000):
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, num_classes))


@pytest.fixture
def own(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "tiny", ModelSpec(tiny, "0", (0, 0, 0), (1, 1, 1), 2, 2, "here"))
    torch.manual_seed(0)
    return tiny(False, 3).state_dict(), tmp_path / "own.pt"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@drawn(60)
@given(change=damage())
def test_bytes_of_checkpoints(own, form, change):
    weights, path = own
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        content = {"state_dict": weights, "best": np.float64(1)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(change(path.read_bytes()))
    model = outcome("checkpoint: ", load_model, "tiny", checkpoint=path)
    if model is not None:
        assert all(value.shape == weights[name].shape for name, value in model.network.state_dict().items())


@pytest.mark.slow
@drawn(100)
@given(change=damage())
@example(change=lambda text: text.replace(b"3", b"[" * 5000))
@example(change=lambda text: text.replace(b"own.pt", b"."))
@example(change=lambda text: text.replace(b"own.pt", b"a\\u0000"))
def test_bytes_of_what_a_toml_says(own, change):
    weights, path = own
    torch.save(weights, path)
    told = path.with_suffix(".toml")
    text = (
        b'checkpoint = "own.pt"\nhead = "sigmoid"\nnum_classes = 3\nclass_names = ["a", "b", "c"]\nwindow = [0, 9.5]\n'
    )
    told.write_bytes(change(text))
    begins = "(checkpoint|head|num_classes|class_names|window): "
    outcome(begins, load_model, "tiny", checkpoint=told, pretrained=False, errors=(ValueError, FileNotFoundError))


TENSORS = {
    "another": lambda: torch.ones(3, 8),
    "more classes": lambda: torch.ones(4, 8),
    "half": lambda: torch.ones(3, 8).half(),
    "doubles": lambda: torch.ones(3, 8).double(),
    "integers": lambda: torch.ones(3, 8, dtype=torch.int8),
    "truth values": lambda: torch.ones(3, 8, dtype=torch.bool),
    "complex": lambda: torch.ones(3, 8, dtype=torch.complex64),
    "sparse": lambda: torch.ones(3, 8).to_sparse(),
    "meta": lambda: torch.ones(3, 8, device="meta"),
    "a view": lambda: torch.ones(1).expand(3, 8),
    "a number": lambda: torch.tensor(1.0),
    "empty": lambda: torch.ones(0),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(8)] * 3),
}


NAMES = st.sampled_from(["0.weight", "1.running_var", "1.num_batches_tracked", "3.weight", "3.bias", "new"])
TABLES = st.sampled_from(["", "state_dict", "model"])


def check_weights(own, name, value, table):
    weights, path = own
    swapped = {**weights, name: value}
    torch.save({table: swapped, "epoch": 3} if table else swapped, path)
    model = outcome("checkpoint: ", load_model, "tiny", checkpoint=path)
    if model is None:
        return
    loaded = model.network.state_dict()
    for key, wanted in swapped.items():
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(loaded[key], wanted.to(loaded[key].dtype)), key
            assert wanted.is_floating_point() or not loaded[key].is_floating_point(), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, of forms that are to go
@pytest.mark.parametrize("kind", TENSORS)
@drawn(5)
@given(name=NAMES, table=TABLES)
@example(name="3.weight", table="state_dict")
def test_tensors_of_checkpoints(own, kind, name, table):
    check_weights(own, name, TENSORS[kind](), table)


@pytest.mark.slow
@drawn(40)
@given(name=NAMES, value=VALUES, table=TABLES)
def test_values_of_checkpoints(own, name, value, table):
    check_weights(own, name, value, table)
