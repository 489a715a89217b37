import errno
import os
import re
import struct
import unicodedata
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import references
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF
from torchvision.tv_tensors import BoundingBoxes

from opticam import METHODS, evaluate, load_model
from opticam.lab import datasets
from opticam.lab.datasets import (
    DATASETS,
    Photos,
    Sample,
    Skipped,
    boxes_to_input,
    demo,
    imagefolder,
    imagenet,
    imagenette,
    load_dataset,
    maps_to_input,
    read_image,
    select,
    stack,
    to_input,
)
from opticam.lab.files import PACKAGE, REPOSITORY
from opticam.networks import imagenet_classes

MAPS = torch.rand(1, 1, 8, 8)
TENCH, GOLDFISH, EAGLE = "n01440764", "n01443537", "n01614925"  # labels 0, 1, 22
RAMP = np.linspace(0, 255, 32 * 24).reshape(24, 32)


def saved(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path)).astype(float)


def test_plain_photo(tmp_path):
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1).round().astype(np.uint8)
    assert np.array_equal(saved(tmp_path / "rgb.png", Image.fromarray(rgb)), rgb)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    values = (RAMP * 257).round().astype(np.uint16)
    read = saved(tmp_path / f"gray.{suffix}", Image.fromarray(values))
    assert read.shape == (24, 32, 3)
    np.testing.assert_allclose(read[..., 0], RAMP, atol=1)
    np.testing.assert_allclose(read[..., 0], read[..., 2])


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_fewer_bits_in_sixteen_are_scaled_with_a_warning_or_by_what_is_said(tmp_path, bits, suffix):
    top = 2**bits - 1
    values = (RAMP / 255 * top).round().astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"scan.{suffix}")
    said = np.asarray(read_image(tmp_path / f"scan.{suffix}", window=(0, top)))[..., 1]
    np.testing.assert_array_equal(said, (values.astype(float) * 255 / top).round())
    with pytest.warns(
        UserWarning, match=rf"pixels of 16 bits that are all below {top + 1} are read as {bits} bits; win"
    ):
        guessed = saved(tmp_path / f"scan.{suffix}", Image.fromarray(values))
    np.testing.assert_array_equal(guessed[..., 2], said)
    kept = np.asarray(read_image(tmp_path / f"scan.{suffix}", window=(0, 65535)))[..., 0]
    np.testing.assert_array_equal(kept, (values / 257).round())


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("bits", "warned"), [(12, True), (16, False)])
def test_colours_of_sixteen_bits_keep_their_lower_bits(tmp_path, channels, suffix, bits, warned, recwarn):
    top = 2**bits - 1
    rgb = (np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1) / 255 * top).round().astype(np.uint16)
    stored = np.concatenate([rgb[..., ::-1], np.full((24, 32, channels - 3), 65535, np.uint16)], 2)
    assert cv2.imwrite(str(tmp_path / f"deep.{suffix}"), stored)
    read = np.asarray(read_image(tmp_path / f"deep.{suffix}")).astype(float)
    np.testing.assert_allclose(read, rgb / top * 255, atol=0.51)
    assert any("are read as 12 bits" in str(warning.message) for warning in recwarn) == warned


def test_gray_with_alpha_of_sixteen_bits_is_not_shown_black(tmp_path):
    values = (RAMP / 255 * 4095).round().astype(np.uint16)
    raw = np.stack([values, np.full_like(values, 65535)], -1).astype(">u2").tobytes()
    lines = b"".join(b"\0" + raw[i : i + 128] for i in range(0, len(raw), 128))  # each with no filter
    header = struct.pack(">IIBBBBB", 32, 24, 16, 4, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    (tmp_path / "la.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    with pytest.warns(UserWarning, match="are read as 12 bits"):
        read = np.asarray(read_image(tmp_path / "la.png")).astype(float)
    np.testing.assert_allclose(read[..., 0], values / 4095 * 255, atol=0.51)


@pytest.mark.parametrize("white", [255, 65535])
@pytest.mark.parametrize(
    ("told", "stored", "wanted"),
    [
        ("unspecified", [30000, 20000, 10000, 5000], [117, 78, 39]),
        ("assocalpha", [16384, 8192, 0, 32768], [191, 159, 128]),
        ("unassalpha", [32768, 16384, 0, 32768], [191, 159, 128]),
        ("assocalpha", [65535, 257, 0, 65535], [255, 1, 0]),
        ("assocalpha", [0, 0, 0, 0], [255, 255, 255]),
    ],
)
def test_a_fourth_channel_of_a_tiff_is_what_the_file_says(tmp_path, white, told, stored, wanted):
    pixels = np.tile(np.array(stored) * white // 65535, (4, 5, 1)).astype(np.uint8 if white == 255 else np.uint16)
    pixels[0, 0, :3] = pixels[0, 0, 3] = white  # so that all bits are seen to be used
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[told])
    read = np.asarray(read_image(tmp_path / "a.tif")).astype(int)
    assert read[0, 0].tolist() == [255, 255, 255]
    assert abs(read[2, 2] - wanted).max() <= 1
    if told != "unassalpha" and white == 65535:
        assert read[2, 2].tolist() == wanted


def test_transparent_gray_of_sixteen_bits_is_laid_on_white(tmp_path):
    values = np.array([[65535, 100], [30000, 100]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=100)
    assert np.asarray(read_image(tmp_path / "a.png"))[..., 0].tolist() == [[255, 255], [117, 255]]
    assert np.asarray(read_image(tmp_path / "a.png", window=(0, 30000)))[..., 0].tolist() == [[255, 255], [255, 255]]


def test_deep_colours_follow_their_orientation(tmp_path):
    deep = np.zeros((24, 32, 3), np.uint16)
    deep[:8, :8] = 65535
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    plain = Image.open(tmp_path / "deep.png")
    exif = plain.getexif()
    exif[0x0112] = 6
    content = (tmp_path / "deep.png").read_bytes()
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "turned.png").write_bytes(content[:33] + chunk + content[33:])  # after the header
    turned = np.asarray(read_image(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned, np.rot90(deep // 257, -1))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png", upright=False)), deep // 257)


def deep_jpeg2000(path, values, bits, sign=0):
    """As OpenCV writes it in 16 bits, with the header and the middle of the range changed to fewer bits."""
    moved = (values + 2**15 - 2 ** (bits - 1)).astype(np.uint16)
    assert cv2.imwrite(str(path), moved, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    content = bytearray(path.read_bytes())
    size = content.find(b"\xff\x4f\xff\x51") + 4
    content[content.find(b"ihdr") + 14] = bits - 1
    for channel in range(1 if values.ndim == 2 else values.shape[2]):
        content[size + 38 + 3 * channel] = bits - 1 + sign
    path.write_bytes(content)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("said", "held"), [(16, 16), (16, 12), (15, 15), (12, 12), (12, 9)])
def test_deep_jpeg2000_by_the_bits_that_it_says(tmp_path, channels, said, held, recwarn):
    gray = np.linspace(0, 2**held - 1, 64 * 48).reshape(64, 48).round().astype(np.int64)
    values = gray if channels == 1 else np.dstack([gray[::-1], gray.T.reshape(64, 48), gray])
    deep_jpeg2000(tmp_path / "a.jp2", values, said)
    shown = np.dstack([values] * 3) if channels == 1 else values[..., ::-1]
    found = np.asarray(read_image(tmp_path / "a.jp2"))
    np.testing.assert_array_equal(found, (shown * 255 / (2 ** (12 if held == 12 else said) - 1)).round())
    assert any("are read as 12 bits" in str(warning.message) for warning in recwarn) == (said > held == 12)
    found = np.asarray(read_image(tmp_path / "a.jp2", window=(0, 400)))
    np.testing.assert_array_equal(found, (shown * 255 / 400).round().clip(0, 255))


@pytest.mark.parametrize(("channels", "sign"), [(1, 128), (4, 0)])
def test_deep_jpeg2000_whose_zero_is_not_clear_are_refused(tmp_path, channels, sign):
    values = np.linspace(0, 4095, 64 * 48 * channels).reshape(64, 48, channels).round().astype(np.int64)
    deep_jpeg2000(tmp_path / "a.jp2", values.squeeze(), 12, sign)
    with pytest.raises(ValueError, match=r"a\.jp2 is a JPEG 2000 with signed pixels or deep transparency; wanted uns"):
        read_image(tmp_path / "a.jp2")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_hounsfield_units_want_a_window(tmp_path, dtype):
    values = np.linspace(-1000, 3000, 32 * 24).reshape(24, 32).astype(dtype)
    assert cv2.imwrite(str(tmp_path / "ct.tif"), values)
    with pytest.raises(ValueError, match=r"image: .*ct\.tif has .*; wanted window=\(low, high\) to say"):
        read_image(tmp_path / "ct.tif")
    read = np.asarray(read_image(tmp_path / "ct.tif", window=(-160, 240)))
    expected = np.clip((values.astype(float) + 160) / 400, 0, 1) * 255
    np.testing.assert_allclose(read[..., 0], expected, atol=0.51)
    write(tmp_path / "set" / "ill" / "a.txt", "")
    (tmp_path / "ct.tif").rename(tmp_path / "set" / "ill" / "ct.tif")
    assert "wanted window=(low, high)" in imagefolder(tmp_path / "set", 16, 16).get(0).reason
    shown = load_dataset("imagefolder", tmp_path / "set", 24, 24, window=(-160, 240))[0].image
    assert (shown.min(), shown.max()) == (0, 1)


@pytest.mark.parametrize(
    ("values", "window"), [((0, 1), (0, 4095)), ((100, 3000), (70000, 80000)), ((100, 3000), (-50, 0))]
)
def test_a_window_that_shows_nothing_is_refused(tmp_path, values, window):
    assert cv2.imwrite(str(tmp_path / "a.tif"), np.linspace(*values, 16 * 16).reshape(16, 16).astype(np.float32))
    sentence = rf"window: \({window[0]}, {window[1]}\) shows nothing of .*a\.tif, with pixels from {values[0]} to "
    with pytest.raises(ValueError, match=sentence):
        read_image(tmp_path / "a.tif", window=window)
    assert cv2.imwrite(str(tmp_path / "blank.tif"), np.full((16, 16), 7.0, np.float32))
    assert read_image(tmp_path / "blank.tif", window=window).getextrema()[0] in ((0, 0), (255, 255))


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "RGBA", "CMYK"])
def test_a_window_on_8_bits_is_refused(tmp_path, mode):
    write(tmp_path / "set" / "ill" / "a.tif", Image.fromarray(RAMP.astype(np.uint8)).convert(mode))
    sentence = r"window: .*a\.tif has pixels of 8 bits; wanted more bits, or no window"
    with pytest.raises(ValueError, match=sentence):
        read_image(tmp_path / "set" / "ill" / "a.tif", window=(0, 4095))
    assert imagefolder(tmp_path / "set", 16, 16, window=(0, 255)).get(0).reason.startswith("window: ill/a.tif has")
    with pytest.raises(ValueError, match="window: the photos of demo have 8 bits; wanted none"):
        load_dataset("demo", window=(0, 255))


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (
            ["class_2", "class_10"],
            "whether class folder class_10 comes before class_2 is not clear; wanted class_names",
        ),
        (["a2b", "a10b", "b"], "whether class folder a10b comes before a2b is not clear"),
        (["train", "val"], "its folders are train, val; wanted one of them"),
        (["Test"], "its folders are Test; wanted one of them"),
    ],
)
def test_class_folders_in_an_order_that_is_not_clear(tmp_path, folders, sentence):
    for folder in folders:
        write(tmp_path / folder / "a.png", Image.new("RGB", (8, 8)))
    for names in (None, [f"name {index}" for index in range(len(folders))]):
        with pytest.raises(ValueError, match=f"root: {sentence}"):
            imagefolder(tmp_path, class_names=names)
    said = imagefolder(tmp_path, class_names=folders)
    assert {photo.name.split("/")[0]: photo.label for photo in said.records} == {f: i for i, f in enumerate(folders)}


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ("train/cat train/dog val/cat val/dog unlabeled/cat", "train holds no photos itself but folders .* as cat; w"),
        ("seg_train/seg_train/cat seg_test/seg_test/cat", "seg_test holds"),
        ("Train/cat Train/dog Test_set/eel", "Test_set holds"),
        ("fold1/cat fold1/dog fold2/cat fold2/dog", "fold1 holds"),
        ("1/cat 1/dog 2/cat 2/dog", "1 holds"),
        ("images/cat images/dog/deep", "images holds"),
        ("cat/images dog/images", ""),
        ("cat/2020 cat/2021 dog/2021 dog/2022", ""),
        ("cat/2020 cat/2021 cat dog/2020 dog/2021", ""),
        ("scans/ward", ""),
        ("test train_a", ""),
    ],
)
def test_folders_above_class_folders_are_not_classes(tmp_path, places, told):
    for place in places.split():
        write(tmp_path / place / "a.png", Image.new("RGB", (8, 8)))
    folders = sorted({place.split("/")[0] for place in places.split()})
    if not told:
        assert imagefolder(tmp_path).class_names == folders
    else:
        for names in (None, [f"name {index}" for index in range(len(folders))]):
            with pytest.raises(ValueError, match=f"^root: its folder {told}"):
                imagefolder(tmp_path, class_names=names)
    assert imagefolder(tmp_path, class_names=folders).class_names == folders


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["dogs", "cats", "owls"], "'cats' has place 1, but the class folder 'cat' by its name label 0; wanted"),
        (["barn OWL", "dogs", "cats"], "'cats' has place 2, but the class folder 'cat'"),
        (["cats", "dogs", "owls"], ""),
        (["bobcat", "dogs", "owls"], ""),
        (["cats", "owlet", "doe"], ""),  # one alone may be by chance
        (["hepcat", "wildcat", "owls"], ""),
    ],
)
def test_class_names_that_belong_to_other_folders(tmp_path, names, told):
    for folder in ("cat", "dog", "owl"):
        write(tmp_path / folder / "a.png", Image.new("RGB", (8, 8)))
    if told:
        with pytest.raises(ValueError, match=f"^class_names: {told}"):
            imagefolder(tmp_path, class_names=names)
    else:
        assert imagefolder(tmp_path, class_names=names).labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["0", "1"], ["class 1", "class 0"]),
        ([TENCH, EAGLE], [f"no {EAGLE}", f"no {TENCH}"]),
        (["a", "b"], ["be", "ac"]),
    ],
)
def test_numbers_and_letters_in_class_names_say_no_folder(tmp_path, folders, names):
    for folder in folders:
        write(tmp_path / folder / "a.png", Image.new("RGB", (8, 8)))
    assert imagefolder(tmp_path, class_names=names).labels == [0, 1]


def test_names_of_files_that_are_not_utf8(tmp_path):
    """As in archives from Windows. A table could not hold them as Python writes them."""
    write(tmp_path / "cat" / os.fsdecode(b"caf\xe9.png"))
    photos = imagefolder(tmp_path)
    assert photos.names == [photos[0].name] == ["cat/caf\\xe9.png"]


@pytest.mark.parametrize("options", [{"draw": 2}, {}])
@pytest.mark.parametrize("seed", ["x", 1.5, None, 2**70, -(2**63) - 1])
def test_a_seed_that_is_none(tmp_path, options, seed):
    for name in "ab":
        write(tmp_path / "c" / f"{name}.png")
    with pytest.raises(ValueError, match=r"^seed: wanted (a|at least) "):
        load_dataset("imagefolder", tmp_path, seed=seed, **options)


@pytest.mark.parametrize(
    ("folders", "names", "told"),
    [
        (["cat", "dog"], ["Dog", "Cat"], "'Cat' has place 1, but the class folder 'cat' by its name label 0"),
        (["cat", "dog"], ["dog", "cow"], "'dog' has place 0, but the class folder 'dog' by its name label 1"),
        (["no finding", "x"], ["x", "No_Finding"], "'No_Finding' has place 1, but the class folder 'no finding' by"),
        (["NORMAL", "ill"], ["normal", "Ill"], ""),
        (["cat", "dog"], ["Hund", "Katze"], ""),
    ],
)
def test_class_names_that_are_spelled_otherwise_are_not_put_on_other_folders(tmp_path, folders, names, told):
    for folder in folders:
        write(tmp_path / folder / "a.png", Image.new("RGB", (8, 8)))
    if told:
        with pytest.raises(ValueError, match=f"^class_names: {told}.*; wanted the names of the folders as they are w"):
            imagefolder(tmp_path, 8, 8, class_names=names)
    else:
        assert [photo.label for photo in imagefolder(tmp_path, 8, 8, class_names=names).records] == [0, 1]


def test_boxes_outside_of_their_photo_are_refused(tmp_path):
    for name in "abcdefg":
        write(tmp_path / "c" / f"{name}.png", Image.new("RGB", (40, 20)))
    rows = "a.png,0,0,40,20\nb.png,0,0,20,40\nc.png,1,1,41,21\n"  # b has x and y exchanged, c counts from 1
    rows += "d.png,-500,-500,-30,-40\ne.png,-4,0,9,9\nf.png,0,-3,9,9\ng.png,-3,-2,9,9\n"
    (tmp_path / "boxes.csv").write_text(f"image,xmin,ymin,xmax,ymax\n{rows}")
    photos = imagefolder(tmp_path, 8, 8, boxes_csv=tmp_path / "boxes.csv")
    assert [photos.get(index)[0] for index in (0, 2)] == ["c/a.png", "c/c.png"]
    assert photos.get(1).reason == ("annotation: box (0.0, 0.0, 20.0, 40.0) lies outside of the photo of 40x20 pixels")
    outside = [isinstance(photos.get(index), Skipped) for index in range(7)]
    assert outside == [False, True, False, True, True, True, False]
    assert len(photos.readable()) == 3


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_tables_with_other_marks_than_commas_are_refused(tmp_path, mark):
    write(tmp_path / "c" / "a.png", Image.new("RGB", (8, 8)))
    (tmp_path / "b.csv").write_text("image, xmin, ymin, xmax, ymax\r\na.png, 1, 2, 3, 4\r\n", encoding="utf-8-sig")
    assert imagefolder(tmp_path, 8, 8, boxes_csv=tmp_path / "b.csv").records[0].boxes == ((1, 2, 3, 4),)
    (tmp_path / "b.csv").write_text(mark.join(["image", "xmin", "ymin", "xmax", "ymax"]) + "\n")
    with pytest.raises(
        ValueError, match=r"^b\.csv: wanted a table with .* \(no image among image.xmin.ymin.xmax.ymax\)$"
    ):
        imagefolder(tmp_path, 8, 8, boxes_csv=tmp_path / "b.csv")


def test_boxes_in_fractions_of_the_photo_are_refused(tmp_path):
    for name in "abc":
        write(tmp_path / "c" / f"{name}.png", Image.new("RGB", (8, 8)))
    (tmp_path / "boxes.csv").write_text(
        "image,xmin,ymin,xmax,ymax\na.png,0.1,0.2,0.9,1\nb.png,0,0,1,1\nc.png,1,2,3,4\n"
    )
    first, second, third = imagefolder(tmp_path, 8, 8, boxes_csv=tmp_path / "boxes.csv").records
    assert first.fault == "annotation: cannot read that of a.png (wanted pixels, got fractions 0.1 0.2 0.9 1)"
    assert second.fault == "annotation: cannot read that of b.png (wanted pixels, got fractions 0 0 1 1)"
    assert third.boxes == ((1, 2, 3, 4),)
    (tmp_path / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax\na.png,x,0,1,1\nb.png,0,0,1,1\n")
    assert imagefolder(tmp_path, 8, 8, boxes_csv=tmp_path / "boxes.csv").records[1].boxes == ((0, 0, 1, 1),)


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"has pixels from 70000 to 70000, .*; wanted window"):
        read_image(tmp_path / "wide.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="pixels that are not finite"):
        read_image(tmp_path / "nan.tif", window=(0, 1))
    for window in ((1, 0), (1, 1), (0, np.inf), (np.nan, 1), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"window: wanted two numbers \(low, high\) with low < high, got"):
            read_image(tmp_path / "wide.tif", window=window)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_of_several_pages_or_frames_none_is_chosen(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 6), color) for color in ("red", "blue"))
    first.save(tmp_path / f"one.{suffix}")
    assert read_image(tmp_path / f"one.{suffix}").getpixel((0, 0))[2] < 3
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second, first])
    with pytest.raises(ValueError, match=rf"^image: .*a.{suffix} holds 3 pages or frames; wanted a file of one$"):
        read_image(tmp_path / f"a.{suffix}")


def test_a_photo_of_a_phone_with_a_preview_of_its_own(tmp_path):
    Image.new("RGB", (8, 6), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("L", (4, 3))]
    )
    with Image.open(tmp_path / "a.jpg") as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    assert read_image(tmp_path / "a.jpg").getpixel((0, 0))[0] > 250


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize(("dtype", "kind"), [("u1", 1), ("u2", 1), ("f4", 3), ("u4", 1), ("i4", 2)])
def test_deep_tiffs_by_their_own_words(tmp_path, white, dtype, kind):
    """Their PhotometricInterpretation says which end is white, their SampleFormat whether there is a sign."""
    shown = np.array([[0, 51, 255]], dtype=np.uint8)
    most = {"u1": 255, "u2": 65535, "f4": 1, "u4": 2**32 - 1, "i4": 4080}[dtype]
    pixels = (shown / 255 * most).astype(f"<{dtype}").tobytes()
    names = (256, 257, 258, 259, 262, 273, 277, 278, 279, 339)
    tags = dict(zip(names, (3, 1, 8 * int(dtype[1]), 1, white, 8, 1, 1, len(pixels), kind), strict=True))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<4sI", b"II*\0", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags))
    (tmp_path / "a.tif").write_bytes(header + entries + bytes(4))
    window = {"f4": (0, 1), "u4": (0, most), "i4": (0, most)}.get(dtype)
    if not white and dtype in ("u4", "i4"):  # Pillow reads no such file
        with pytest.raises(OSError, match=r"^image: .*a\.tif is not an image that can be read$"):
            read_image(tmp_path / "a.tif", window=window)
        return
    found = np.asarray(read_image(tmp_path / "a.tif", window=window))
    assert found.tolist() == np.stack([shown if white else 255 - shown] * 3, 2).tolist()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {258: 16, 277: 3, 284: 2},
            "stores colours of more than 8 bits in planes; wanted the channels of a pixel side",
        ),
        ({258: 16, 277: 3, 284: 1}, ""),
        ({258: 8, 277: 3, 284: 2}, ""),
        ({258: 8, 277: 1, 339: 2, 262: 1}, "has signed pixels of 8 bits; wanted unsigned ones, or more bits"),
    ],
)
def test_tiffs_that_pillow_reads_wrongly_are_refused(tmp_path, changed, told):
    bits, channels = changed[258], changed[277]
    ramp = np.linspace(0, 2**bits - 1, 12).reshape(3, 4)
    colors = np.stack([ramp / (channel + 1) for channel in range(channels)]).round().astype(f"<u{bits // 8}")
    pixels = (colors if changed.get(284) == 2 else np.moveaxis(colors, 0, 2)).tobytes()
    parts = channels if changed.get(284) == 2 else 1
    tags = {256: [4], 257: [3], 258: [bits] * channels, 259: [1], 262: [2], 273: [], 277: [1], 278: [3], 279: []}
    tags |= {tag: [value] for tag, value in changed.items() if tag != 258}
    tags[273] = [8 + part * len(pixels) // parts for part in range(parts)]
    tags[279] = [len(pixels) // parts] * parts
    entries, after = b"", b""
    end = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        place = packed if len(values) == 1 else struct.pack("<I", end + len(after))
        after += b"" if len(values) == 1 else packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + place
    header = struct.pack("<4sI", b"II*\0", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags))
    (tmp_path / "a.tif").write_bytes(header + entries + bytes(4) + after)
    if told:
        with pytest.raises(ValueError, match=rf"^image: .*a\.tif {told}"):
            read_image(tmp_path / "a.tif")
        return
    shown = np.moveaxis(colors, 0, 2) / (2**bits - 1) * 255
    assert np.abs(np.asarray(read_image(tmp_path / "a.tif")) - shown).max() <= 1


def test_a_range_that_the_file_says_itself(tmp_path, recwarn):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 819, 1023], dtype=">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 51, 64]
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"^window: .* says the range of its pixels itself; wanted no window$"):
        read_image(tmp_path / "a.pgm", window=(0, 1023))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("most", [100, 2000])  # Pillow refuses twice as many pixels, and warns before
def test_an_image_over_pillows_limit_is_told_so(tmp_path, monkeypatch, most):
    write(tmp_path / "set" / "slide" / "a.png", Image.new("RGB", (64, 48)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    sentence = rf"a\.png is too large; wanted a smaller copy, or a higher limit than {most} pixels \(PIL"
    with pytest.raises(ValueError, match=sentence):
        read_image(tmp_path / "set" / "slide" / "a.png")
    assert "is too large; wanted" in imagefolder(tmp_path / "set", 16, 16).get(0).reason


def test_gray_palette_and_one_bit(tmp_path):
    gray = Image.fromarray(RAMP.round().astype(np.uint8))
    np.testing.assert_allclose(saved(tmp_path / "l.png", gray)[..., 1], RAMP, atol=0.5)
    np.testing.assert_allclose(saved(tmp_path / "p.png", gray.convert("P"))[..., 1], RAMP, atol=1)
    assert set(np.unique(saved(tmp_path / "1.png", gray.convert("1")))) == {0, 255}


def test_cmyk(tmp_path):
    rgb = Image.new("RGB", (8, 8), (200, 40, 90))
    read = saved(tmp_path / "cmyk.jpg", rgb.convert("CMYK"), quality=100)
    np.testing.assert_allclose(read, np.broadcast_to((200, 40, 90), (8, 8, 3)), atol=4)


def test_transparency_is_laid_on_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    np.testing.assert_allclose(saved(tmp_path / "rgba.png", half), 127, atol=1)
    gone = Image.new("LA", (4, 4), (0, 0))
    assert (saved(tmp_path / "la.png", gone) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert (saved(tmp_path / "p.gif", palette, transparency=0) == 255).all()


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tmp_path, orientation, turn):
    upright = np.zeros((24, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner, top left
    stored = Image.fromarray(np.rot90(upright, -turn))
    exif = stored.getexif()
    exif[0x0112] = orientation
    read = saved(tmp_path / "turned.jpg", stored, exif=exif, quality=100)
    np.testing.assert_allclose(read, upright, atol=40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "P", "RGB", "lzw", "deep"])
def test_a_tiff_is_turned_once_or_not_at_all(tmp_path, kind, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    if kind not in ("RGB", "lzw", "deep"):
        stored[..., 1:] = stored[..., :1]
    gray, window = stored[..., 0], (0, 255) if kind == "f4" else None
    deep = {"u2": gray * np.uint16(257), "f4": gray.astype(np.float32), "u1": gray, "P": gray}.get(kind, stored)
    image = Image.fromarray(deep).convert("P") if kind == "P" else Image.fromarray(deep)
    image.save(tmp_path / "a.tif", tiffinfo={274: orientation}, compression="tiff_lzw" if kind == "lzw" else None)
    if kind == "deep":
        assert cv2.imwrite(str(tmp_path / "a.tif"), stored[..., ::-1] * np.uint16(257))
        content = (tmp_path / "a.tif").read_bytes()
        (start,) = struct.unpack("<I", content[4:8])
        (count,) = struct.unpack("<H", content[start : start + 2])
        entries = [content[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if entry[:2] != struct.pack("<H", 274)]
        kept = sorted(
            [*kept, struct.pack("<HHIHH", 274, 3, 1, orientation, 0)], key=lambda e: struct.unpack("<H", e[:2])
        )
        table = struct.pack("<H", len(kept)) + b"".join(kept) + bytes(4)
        content += bytes(len(content) % 2)
        (tmp_path / "a.tif").write_bytes(content[:4] + struct.pack("<I", len(content)) + content[8:] + table)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif", window=window)), upright)
    found = np.asarray(read_image(tmp_path / "a.tif", upright=False, window=window))
    np.testing.assert_array_equal(found, stored)


def test_missing_corrupt_and_truncated(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: no file at .*nothing\.jpg"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(FileNotFoundError, match=r"image: .* is a folder"):
        read_image(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(OSError, match=r"text\.jpg is not an image"):
        read_image(tmp_path / "text.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(OSError, match=r"empty\.png is not an image"):
        read_image(tmp_path / "empty.png")
    for suffix in ("jpg", "png"):
        whole = tmp_path / f"whole.{suffix}"
        Image.effect_noise((64, 64), 50).save(whole)
        part = tmp_path / f"part.{suffix}"
        part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(OSError, match=rf"part\.{suffix} is damaged"):
            read_image(part)
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point pixels"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("size", [(512, 512), (1024, 683), (300, 451), (100, 900), (224, 225)])
def test_boxes_go_where_the_pixels_go(size):
    width, height = size
    box = (width // 2 - 20, height // 2 - 8, width // 2 + 10, height // 2 + 30)  # not square, off centre
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    image = to_input(Image.fromarray(pixels), 96, 112)
    assert image.shape == (3, 96, 96)
    rows, columns = (torch.nonzero(image[0].amax(dim) > 0.5).flatten() for dim in (1, 0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    (moved,) = boxes_to_input(torch.tensor([box]), size, 96, 112)
    scale = 112 / min(size)
    np.testing.assert_allclose(moved, found, atol=0.5 + scale)


def test_boxes_worked_example():
    # 1024x683 -> 256 * 1024/683 = 383.8 -> 383 wide, 256 high; crop 224: left round(79.5) = 80, top 16
    moved = boxes_to_input(torch.tensor([[0, 0, 1024, 683], [512, 0, 600, 10]]), (1024, 683))
    expected = [[-80, -16, 383 - 80, 240], [512 * 383 / 1024 - 80, -16, 600 * 383 / 1024 - 80, 2560 / 683 - 16]]
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert boxes_to_input(torch.zeros(0, 4), (10, 20)).shape == (0, 4)


@pytest.mark.parametrize("size", [(101, 67), (60, 91), (40, 40)])
@pytest.mark.parametrize("wanted", [(26, 30), (20, 29)])
def test_maps_move_as_the_loop_says(size, wanted):
    made = (22, 25)
    saliency = torch.rand(2, 1, 22, 22, dtype=torch.float64)
    moved = maps_to_input(saliency, [size, size], made, wanted)
    for grid, found in zip(saliency, moved, strict=True):
        np.testing.assert_allclose(found[0], references.same_place(grid[0].numpy(), size, made, wanted), atol=1e-5)


@pytest.mark.parametrize("size", [(512, 384), (375, 500), (299, 301)])
def test_maps_move_as_the_photo_does(size):
    """A smooth photo as its own map: what one network sees, moved, is what the other sees; one pixel off is not."""
    x, y = (np.arange(side) / side for side in size)
    wave = 0.5 + 0.5 * np.sin(9 * x[None, :] + 3) * np.cos(7 * y[:, None])
    photo = Image.fromarray(np.repeat((255 * wave).astype(np.uint8)[..., None], 3, 2))
    made, wanted = (224, 256), (260, 297)
    before, expected = (to_input(photo, *frame)[None, :1] for frame in (made, wanted))
    moved = maps_to_input(before, [size], made, wanted)
    error = (moved - expected).abs().mean()
    assert error < 0.004  # 1/255: rounding to 8 bits
    assert (moved[..., 1:] - expected[..., :-1]).abs().mean() > 3 * error
    assert (moved[..., 1:, :] - expected[..., :-1, :]).abs().mean() > 3 * error
    torch.testing.assert_close(maps_to_input(before, [size], made, made), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_move_likewise(dtype):
    maps = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
    move = partial(maps_to_input, photo_sizes=[(375, 500), (500, 375)], made=(224, 256), wanted=(240, 274))
    assert torch.equal(move(maps), move(maps.float()).to(dtype))


def test_tensors_are_single_whatever_torchs_default(monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        assert to_input(Image.new("RGB", (8, 8)), 8, 8).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_maps_of_another_frame_are_refused():
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(1, 1, 224, 224\), got \(1, 1, 240, 240\)"):
        maps_to_input(torch.zeros(1, 1, 240, 240), [(300, 300)], (224, 256), (240, 274))


def test_to_input_is_the_usual_pipeline():
    photo = Image.effect_noise((301, 207), 80).convert("RGB")
    expected = TF.to_tensor(TF.center_crop(TF.resize(photo, [256]), [224]))
    assert torch.equal(to_input(photo), expected)
    with pytest.raises(ValueError, match="resize: wanted at least input_size"):
        to_input(photo, 224, 200)


def test_demo_loads_all_twenty():
    photos = demo()
    assert len(photos) == 20
    names = imagenet_classes()
    for sample in photos:
        assert sample.image.shape == (3, 224, 224)
        assert 0 <= sample.image.min() < sample.image.max() <= 1
        assert sample.name.endswith(f"_{sample.label}.jpg")
        assert sample.boxes.shape[1] == 4
        assert len(sample.boxes) >= 1
    labels = [names[label] for label in photos.labels]
    assert labels[17] == "bald eagle"
    assert labels[4] == "strawberry"


def test_demo_boxes_lie_inside_the_photos():
    table = pd.read_csv(PACKAGE / "lab" / "demo_boxes.csv")
    photos = demo()
    assert set(table["image"]) == {path.name for path in photos.paths}
    for path, label in zip(photos.paths, photos.labels, strict=True):
        width, height = Image.open(path).size
        rows = table[table["image"] == path.name]
        assert (rows["class_idx"] == label).all()
        assert ((rows["xmin"] >= 0) & (rows["xmin"] < rows["xmax"]) & (rows["xmax"] < width)).all()
        assert ((rows["ymin"] >= 0) & (rows["ymin"] < rows["ymax"]) & (rows["ymax"] < height)).all()


def test_demo_limit_and_missing_files(monkeypatch, tmp_path):
    assert [sample.name for sample in demo(limit=2)] == ["imagenet_00_243.jpg", "imagenet_01_559.jpg"]
    with pytest.raises(ValueError, match="limit: wanted at least 1, got 0"):
        demo(limit=0)
    monkeypatch.setattr(datasets, "PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match="not installed whole"):
        demo()


# ---------------------------------------------------------------------------------------------------- selection


def slow_select(items, limit, sample, shard, seed):
    if sample is not None:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = order[:sample]
        items = [items[i] for i in range(len(items)) if i in drawn]
    kept = []
    for position, item in enumerate(items):
        if limit is not None and position >= limit:
            break
        if shard is None or position % shard[1] == shard[0]:
            kept.append(item)
    return kept


@pytest.mark.parametrize("limit", [None, 1, 5, 99])
@pytest.mark.parametrize("sample", [None, 1, 7, 20])
@pytest.mark.parametrize("shard", [None, (0, 1), (1, 3), (2, 3), (8, 30)])
def test_select_is_sample_then_limit_then_shard(limit, sample, shard):
    items = list("abcdefghijklmnopqrst")
    chosen = select(items, limit=limit, draw=sample, shard=shard, seed=3)
    assert chosen == slow_select(items, limit, sample, shard, 3)
    if shard is not None:
        assert chosen == select(items, limit=limit, draw=sample, shard=f"{shard[0]}/{shard[1]}", seed=3)


def test_sample_is_seeded_stable_and_nested():
    items = list(range(1000))
    drawn = select(items, draw=50, seed=1)
    assert drawn == sorted(drawn) == select(items, draw=50, seed=1) != select(items, draw=50, seed=2)
    assert set(select(items, draw=10, seed=1)) < set(drawn)
    assert select(items, draw=3) == [37, 44, 675]  # a sample once reported stays the same
    before = torch.get_rng_state()
    select(items, draw=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_shards_are_disjoint_and_together_all(count):
    shards = [select(range(20), limit=17, shard=(k, count)) for k in range(count)]
    assert sorted(item for shard in shards for item in shard) == list(range(17))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", ["3", "3/3", "-1/2", "a/b", "0/0", (0,), (2, 2), (-1, 2), (0.5, 2), "1/2/3"])
def test_select_refuses_shards_that_are_none(shard):
    with pytest.raises(ValueError, match=r"shard: wanted k/n with k in 0\.\.n-1, got"):
        select(range(5), shard=shard)


def test_select_refuses_other_wrong_values():
    for limit in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match=r"limit: wanted (at least 1|a whole number), got"):
            select(range(5), limit=limit)
    with pytest.raises(ValueError, match="draw: wanted at least 1, got 0"):
        select(range(5), draw=0)
    with pytest.raises(ValueError, match="draw: wanted at most the 5 photos there are, got 6"):
        select(range(5), draw=6)
    assert select(range(5), limit=np.int64(3), draw=np.int32(5)) == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------- ImageNet

NOISE = Image.effect_noise((100, 80), 50)


def xml(*objects):
    boxes = (
        f"<object><name>{wnid}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for wnid, *box in objects
    )
    return f"<annotation><size><width>100</width></size>{''.join(boxes)}</annotation>"


def write(path, content=NOISE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    content.save(path, **options) if isinstance(content, Image.Image) else path.write_text(content)
    return path


def listed(photos):
    assert photos.photos is photos.records  # the name before 0.2
    return [(photo.name, photo.label, photo.boxes) for photo in photos.records]


@pytest.fixture(autouse=True)
def no_imagenet(monkeypatch):
    monkeypatch.delenv("OPTICAM_IMAGENET", raising=False)


@pytest.fixture
def kaggle(tmp_path):
    """Two images of ImageNet in the Kaggle layout; the second has objects of two classes."""
    rows = [f"second,{EAGLE} 10 20 30 60 {TENCH} 1 1 2 2 {EAGLE} 0 0 5 6 ", f"first,{TENCH} 1 2 3 4"]
    write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    for name in ("first", "second"):
        write(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG")
    annotations = tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    write(annotations / "first.xml", xml((TENCH, 1, 2, 3, 4)))
    write(annotations / "second.xml", xml((EAGLE, 10, 20, 30, 60), (TENCH, 1, 1, 2, 2), (EAGLE, 0, 0, 5, 6)))
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    """Three images of two classes of ImageNet in class folders, one file name twice."""
    for name in (f"{EAGLE}/b.JPEG", f"{EAGLE}/a.jpeg", f"{TENCH}/b.JPEG"):
        write(tmp_path / "val" / name)
    write(tmp_path / "val" / TENCH / "._b.JPEG", "what a Mac leaves behind")
    write(tmp_path / "val" / TENCH / "notes.txt", "hello")
    return tmp_path


def test_kaggle_layout(kaggle, monkeypatch):
    photos = imagenet(kaggle, input_size=64, resize=80)
    assert [(sample.name, sample.label) for sample in photos] == [("second.JPEG", 22), ("first.JPEG", 0)]
    # no resize, crop 64 of 100x80: left 18, top 8
    assert photos[0].boxes.tolist() == [[-8, 12, 12, 52], [-18, -8, -13, -2]]
    assert photos.class_names[22] == "bald eagle"
    assert len(imagenet(kaggle, limit=1)) == 1
    assert imagenet(kaggle, shard="1/2").labels == [0]
    monkeypatch.setenv("OPTICAM_IMAGENET", str(kaggle))
    assert len(imagenet()) == 2


def test_kaggle_layout_without_its_table_reads_the_xml(kaggle):
    with_table = listed(imagenet(kaggle))
    (kaggle / "LOC_val_solution.csv").unlink()
    assert listed(imagenet(kaggle)) == with_table[::-1]  # by name


def test_an_image_that_the_table_lacks_is_not_listed_but_one_that_the_folder_lacks_is_skipped(kaggle):
    folder = kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    (folder / "first.JPEG").rename(folder / "third.JPEG")
    photos = imagenet(kaggle)
    assert photos.get(0).name == "second.JPEG"
    assert photos.get(1) == Skipped("first.JPEG", 0, "image: no file at first.JPEG")


def test_a_flat_folder_with_xml_beside_the_images(kaggle):
    folder = kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    write(folder / "first.xml", xml((TENCH, 1, 2, 3, 4)))
    write(folder / "second.xml", xml((EAGLE, 5, 6, 7, 8)))
    expected = [("first.JPEG", 0, ((1, 2, 3, 4),)), ("second.JPEG", 22, ((5, 6, 7, 8),))]
    assert listed(imagenet(folder)) == expected


def test_class_folders(folders):
    nothing_boxed = [(f"{TENCH}/b.JPEG", 0, ()), (f"{EAGLE}/a.jpeg", 22, ()), (f"{EAGLE}/b.JPEG", 22, ())]
    assert listed(imagenet(folders)) == listed(imagenet(folders / "val")) == nothing_boxed
    assert [photos.boxes.shape for photos in imagenet(folders)] == [(0, 4)] * 3
    # the XML beside the image; only objects of its class
    write(folders / "val" / EAGLE / "b.xml", xml((TENCH, 0, 0, 9, 9), (EAGLE, 1, 2, 30, 40.5)))
    boxed = [*nothing_boxed[:2], (f"{EAGLE}/b.JPEG", 22, ((1, 2, 30, 40.5),))]
    assert listed(imagenet(folders)) == boxed
    # the XML elsewhere, in class folders or flat, goes first
    write(folders / "Annotations" / "CLS-LOC" / "val" / EAGLE / "b.xml", xml((EAGLE, 5, 6, 7, 8)))
    write(folders / "given" / "b.xml", xml((EAGLE, 3, 3, 4, 4)))
    assert imagenet(folders).records[2].boxes == ((5, 6, 7, 8),)
    assert imagenet(folders, annotations=folders / "given").records[2].boxes == ((3, 3, 4, 4),)
    assert imagenet(folders, annotations=folders / "given").records[0].boxes == ()  # of another class
    # and an image without XML, where others have theirs, is skipped
    photo = imagenet(folders, annotations=folders / "given").get(1)
    assert photo == Skipped(f"{EAGLE}/a.jpeg", 22, "annotation: cannot read that of a (there is none)")
    with pytest.raises(FileNotFoundError, match="annotations: wanted the folder of XML files, got"):
        imagenet(folders, annotations=folders / "elsewhere")


def test_the_kaggle_tree_with_its_images_moved_to_class_folders(kaggle):
    images = kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    expected = {(name, label, boxes) for name, label, boxes in listed(imagenet(kaggle))}
    for name, wnid in (("first", TENCH), ("second", EAGLE)):
        (images / wnid).mkdir()
        (images / f"{name}.JPEG").rename(images / wnid / f"{name}.JPEG")
    for _ in range(2):  # by the table, then by the XML
        moved = {(name.split("/")[1], label, boxes) for name, label, boxes in listed(imagenet(kaggle))}
        assert moved == expected
        (kaggle / "LOC_val_solution.csv").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("<annotation><object>", r"annotation: cannot read that of b \(no element found: line 1, column 20\)"),
        ("", r"annotation: cannot read that of b \(no element found: line 1, column 0\)"),
        (xml((EAGLE, 1, 2, 3, "x")), r"cannot read that of b \(could not convert string to float: 'x'\)"),
        (xml((EAGLE, 1, 2, 3, "")), r"\(wanted xmin ymin xmax ymax, got 1 2 3 \)"),
        (xml((EAGLE, 1, 2, 3, "inf")), r"\(wanted xmin ymin xmax ymax, got 1 2 3 inf\)"),
        (xml((EAGLE, 9, 2, 3, 4)), r"\(wanted xmin ymin xmax ymax, got 9 2 3 4\)"),
        (xml((EAGLE, 1, 9, 3, 4)), r"\(wanted xmin ymin xmax ymax, got 1 9 3 4\)"),
        (
            f"<a><object><name>{EAGLE}</name></object></a>",
            r"\(wanted xmin ymin xmax ymax, got None None None None\)",
        ),
    ],
)
def test_malformed_xml_skips_its_image_only(folders, annotation, reason):
    write(folders / "val" / EAGLE / "b.xml", annotation)
    photos = imagenet(folders)
    skipped = photos.get(2)
    assert skipped[:2] == (f"{EAGLE}/b.JPEG", 22)
    assert re.search(reason, skipped.reason)
    with pytest.raises(ValueError, match=reason):
        photos[2]
    assert isinstance(photos.get(0), Sample)


def test_xml_with_entities_that_explode_is_refused(folders):
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "{"x" * 100}">{entities}]><annotation>&e11;</annotation>'
    write(folders / "val" / EAGLE / "b.xml", bomb)
    assert "annotation: cannot read that of b (" in imagenet(folders).get(2).reason


def test_classes_that_are_none_of_imagenets(kaggle, tmp_path):
    rows = ["first,n99999999 1 2 3 4", f"second,{EAGLE} 1 2 3", "third,", f"fourth,{EAGLE} 1 2 3 4"]
    (kaggle / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    photos = imagenet(kaggle)
    reasons = [photo.fault for photo in photos.records]
    assert reasons == [
        "label: wanted one of the 1000 classes of ImageNet, got 'n99999999'",
        "annotation: cannot read that of second (wanted xmin ymin xmax ymax, got 1 2 3)",
        "label: wanted one of the 1000 classes of ImageNet, got ''",
        "",
    ]
    assert photos.labels == [-1, 22, -1, 22]
    write(tmp_path / "other" / "n99999999" / "a.JPEG")
    assert imagenet(tmp_path / "other").get(0).reason.endswith("got 'n99999999'")


def test_imagenet_that_is_not_there_or_whose_table_is_malformed(kaggle, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="root: wanted the folder of ImageNet, here or in OPTICAM_IMAGENET, got none"
    ):
        imagenet()
    with pytest.raises(FileNotFoundError, match=r"root: wanted the folder of ImageNet, .* got .*nowhere"):
        imagenet(tmp_path / "nowhere")
    write(tmp_path / "pictures" / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"root: no ImageNet in .*pictures; wanted ILSVRC/Data/CLS-LOC/val"):
        imagenet(tmp_path / "pictures")
    with pytest.raises(ValueError, match="limit: wanted at least 1, got 0"):
        imagenet(kaggle, limit=0)
    with pytest.raises(ValueError, match="resize: wanted at least input_size"):
        imagenet(kaggle, input_size=300)
    table = kaggle / "LOC_val_solution.csv"
    table.write_text(f"ImageId,PredictionString\nfirst,{TENCH} 1 2 3 4\nfirst,{EAGLE} 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: wanted each image once, got first more than once"):
        imagenet(kaggle)
    for content in ("", "a,b\n1,2\n", 'ImageId,PredictionString\n"first'):
        table.write_text(content)
        with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: wanted a table with the columns ImageId, Pred"):
            imagenet(kaggle)


def test_listing_opens_no_image_and_only_the_xml_of_selected_ones(kaggle, folders, monkeypatch):
    read = []
    parse = datasets.ElementTree.parse
    monkeypatch.setattr(datasets.ElementTree, "parse", lambda path: [read.append(path.stem), parse(path)][1])
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("opened"))
    (kaggle / "LOC_val_solution.csv").unlink()
    assert len(imagenet(kaggle, shard=(1, 2))) == 1
    assert read == ["second"]
    assert len(imagefolder(folders / "val")) == 3


# --------------------------------------------------------------------------------------- orientation and damage


@pytest.mark.parametrize("size", [(120, 80), (70, 110)])
def test_boxes_follow_the_pixels_whatever_the_exif_orientation(tmp_path, size):
    left, top, right, bottom = 30, 25, 45, 55
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    photo = Image.fromarray(pixels)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned clockwise: (x, y) -> (height - y, x)
    for wnid in (TENCH, EAGLE):
        write(tmp_path / wnid / "a.jpg", photo, exif=exif, quality=100)
        write(tmp_path / wnid / "a.xml", xml((wnid, left, top, right, bottom)))
    turned = (size[1] - bottom, left, size[1] - top, right)
    row = ",".join(map(str, turned))
    table = write(tmp_path / "boxes.csv", f"image,xmin,ymin,xmax,ymax\n{TENCH}/a.jpg,{row}\n")
    for photos, box in (
        (imagenet(tmp_path, 64, 64), (left, top, right, bottom)),
        (imagefolder(tmp_path, 64, 64, boxes_csv=table), turned),
    ):
        assert photos.records[0].boxes == (box,)
        _, image, _, boxes = photos[0]
        rows, columns = (torch.nonzero(image[0].amax(dim) > 0.5).flatten() for dim in (1, 0))
        bright = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(boxes[0], bright, atol=1)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many open files"), MemoryError("no room")])
def test_what_the_machine_lacks_is_no_fault_of_a_photo(folders, monkeypatch, error):
    def short(*_, **__):
        raise error

    photos = imagenet(folders, 64, 64)
    monkeypatch.setattr(Path, "open", short)
    with pytest.raises(type(error), match=str(error.args[-1])):
        photos.get(0)


def test_damaged_photos_are_skipped_and_the_rest_goes_on_in_worker_processes(folders):
    whole = folders / "val" / TENCH / "b.JPEG"
    write(folders / "val" / TENCH / "c.JPEG", "no image")
    (folders / "val" / TENCH / "d.JPEG").write_bytes(whole.read_bytes()[:2000])
    (folders / "val" / TENCH / "e.JPEG").touch()
    (folders / "val" / TENCH / "f.JPEG").mkdir()
    Image.fromarray(RAMP.astype(np.float32)).save(folders / "val" / TENCH / "g.JPEG", format="TIFF")
    photos = imagenet(folders, 64, 64)

    class Tolerant(torch.utils.data.Dataset):
        def __len__(self):
            return len(photos)

        def __getitem__(self, index):
            return photos.get(index)

    rows = [row for batch in DataLoader(Tolerant(), 3, num_workers=2, collate_fn=list) for row in batch]
    assert [row.name for row in rows] == [photo.name for photo in photos.records]
    assert [type(row) for row in rows] == [Sample] + 5 * [Skipped] + 2 * [Sample]
    reasons = ["not an image", "damaged", "not an image", "is a folder", "floating-point"]
    for row, reason in zip(rows[1:6], reasons, strict=True):
        assert reason in row.reason
        assert f"{TENCH}/" in row.reason
        assert str(folders) not in row.reason
        assert row.label == 0
    with pytest.raises(IndexError, match=r"photo: wanted a number in 0\.\.7, got 8"):
        photos.get(8)


def test_readable_photos_make_a_batch(folders):
    write(folders / "val" / TENCH / "c.JPEG", "no image")
    photos = imagenet(folders, 64, 64)
    names = [photo.name for photo in photos.records if not photo.name.endswith("c.JPEG")]
    assert [sample.name for sample in photos.readable()] == names
    assert [sample.name for sample in photos.readable(2)] == names[:1]  # the second photo of all is the damaged one
    samples = photos.readable()
    images, class_idx = stack(samples)
    assert images.shape == (len(names), 3, 64, 64)
    assert class_idx.dtype == torch.int64
    assert class_idx.tolist() == [sample.label for sample in samples]
    assert torch.equal(images[-1], samples[-1].image)
    assert stack([samples[0]._replace(label=np.int32(3))])[1].dtype == torch.int64
    with pytest.raises(ValueError, match="samples: wanted at least one"):
        stack([])


def test_pixels_and_boxes_of_another_kind():
    for photo, got in ((torch.rand(3, 8, 8), "Tensor"), (np.zeros((8, 8, 3), np.uint8), "ndarray")):
        with pytest.raises(TypeError, match=f"photo: wanted an image of Pillow, as read_image gives it, got {got}"):
            to_input(photo)
    for mode in ("P", "1", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "F"):
        with pytest.raises(ValueError, match=f"^photo: wanted mode RGB, as read_image gives it, or L, got {mode}$"):
            to_input(Image.new(mode, (8, 8)), 8, 8)
    assert to_input(Image.new("L", (8, 8)), 8, 8).shape == (1, 8, 8)
    with pytest.raises(TypeError, match="boxes: wanted a tensor, got list"):
        boxes_to_input([[1, 2, 3, 4]], (8, 8))
    with pytest.raises(ValueError, match=r"^boxes: wanted format XYXY, got XYWH$"):
        boxes_to_input(BoundingBoxes([[1, 2, 3, 4]], format="XYWH", canvas_size=(8, 8)), (8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda path: load_dataset("imagefolder", path.parents[1], drwa=2),
            "load_dataset: no option 'drwa'; wanted some of boxes_csv, class_names, draw, shard, seed for imagefolder$",
        ),
        (lambda path: load_dataset("demo", annotations="x"), "load_dataset: no option 'annotations'; .* for demo$"),
        (lambda path: imagefolder(path.parents[1])["a"], "photo: wanted a whole number, got 'a'"),
        (lambda path: imagefolder(path.parents[1])[0:2], r"photo: wanted a whole number, got slice\(0, 2, None\)"),
        (lambda path: imagefolder(path.parents[1]).get(None), "photo: wanted a whole number, got None"),
        (lambda path: read_image(None), "path: wanted a path, got NoneType"),
        (lambda path: read_image(np.zeros(3)), "path: wanted a path, got ndarray"),
        (lambda path: read_image(path, upright=np.zeros(2)), "upright: wanted True or False, got array"),
        (lambda path: imagefolder(5), "root: wanted a path, got int"),
        (lambda path: imagenet(5), "root: wanted a path, got int"),
        (lambda path: imagenette(5), "root: wanted a path, got int"),
        (lambda path: load_dataset("imagefolder", 5), "root: wanted a path, got int"),
        (lambda path: imagefolder(path.parents[1], boxes_csv=5), "boxes_csv: wanted a path, got int"),
        (lambda path: imagefolder(path.parents[1], boxes_csv=pd.DataFrame()), "boxes_csv: wanted a path, got DataF"),
        (lambda path: imagefolder(path.parents[1], None), "input_size: wanted a whole number, got None"),
        (lambda path: load_dataset("demo", None, 8, "a"), "resize: wanted a whole number, got 'a'"),
        (lambda path: to_input(NOISE, "a"), "input_size: wanted a whole number, got 'a'"),
        (lambda path: to_input(NOISE, 8, None), "resize: wanted a whole number, got None"),
        (lambda path: stack([Skipped("a", 0, "")]), "samples: wanted a list of Sample, got Skipped"),
        (lambda path: boxes_to_input(torch.zeros(1, 4), 5), "photo_size: wanted .* in whole pixels, got 5"),
        (lambda path: maps_to_input([1], [(8, 8)], (8, 8), (8, 8)), "saliency: wanted a tensor, got list"),
        (lambda path: maps_to_input(MAPS.long(), [(8, 8)], (8, 8), (8, 8)), "saliency: wanted a floating-point dtype"),
        (
            lambda path: maps_to_input(MAPS, 5, (8, 8), (8, 8)),
            r"photo_sizes: wanted \(width, height\) of each photo, got",
        ),
        (
            lambda path: maps_to_input(MAPS, [8], (8, 8), (8, 8)),
            r"photo_sizes: wanted \(width, height\) of each photo in",
        ),
        (lambda path: maps_to_input(MAPS, [(8, 8)], None, (8, 8)), r"made: wanted \(input_size, resize\) in whole"),
        (
            lambda path: maps_to_input(MAPS, [(8, 8)], (8, 8), ("a", 8)),
            r"wanted: wanted \(input_size, resize\) in whole",
        ),
    ],
)
def test_arguments_of_a_wrong_type(tmp_path, call, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        call(write(tmp_path / "ill" / "a.png"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stack([Sample("a", MAPS[0], 0, None)], "a"), "device: wanted one that works here, .* got 'a'"),
        (lambda: maps_to_input(MAPS, [(8, 8, 3)], (8, 8), (8, 8)), "photo_sizes: wanted .* in whole pixels, got"),
        (lambda: maps_to_input(MAPS, [(8, 0)], (8, 8), (8, 8)), "photo_sizes: wanted .* of at least 1 pixel, got"),
        (lambda: boxes_to_input(torch.zeros(2, 2), (8, 8)), r"boxes: wanted shape \(n,4\), got \(2, 2\)"),
        (lambda: Photos([], [], window="a"), "window: wanted two numbers"),
        (lambda: Photos([], [], window=(False, True)), "window: wanted two numbers"),
        (lambda: imagenette("x", size=[320]), r"imagenette: wanted size full, .*, got \[320\], 'val'"),
        (lambda: imagenette("x", split=["val"]), r"imagenette: wanted size full, .*, got '320px', \['val'\]"),
        (lambda: Photos([], []).readable(-1), "limit: wanted at least 0, got -1"),
        (lambda: load_dataset([]), r"dataset: wanted one of .*, got \[\]"),
    ],
)
def test_arguments_of_a_wrong_value(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_read_image_names_what_no_one_expects(tmp_path, monkeypatch):
    def stumble(photo):
        raise KeyError("tile")

    monkeypatch.setattr(datasets.ImageOps, "exif_transpose", stumble)
    with pytest.raises(OSError, match=r"a\.jpg is damaged or cannot be decoded \('tile'\)"):
        read_image(write(tmp_path / "a.jpg"))


# ---------------------------------------------------------------------------------------------------- any folder


@pytest.fixture
def lungs(tmp_path):
    """A made-up medical set: two classes, one of them with a folder inside."""
    for name in ("PNEUMONIA/one.jpeg", "NORMAL/one.jpeg", "NORMAL/ward/two.png", ".hidden/x.jpeg"):
        write(tmp_path / "test" / name)
    return tmp_path / "test"


def boxes_csv(folder, *rows, header="image,xmin,ymin,xmax,ymax"):
    return write(folder / "boxes.csv", "\n".join([header, *rows]) + "\n")


def test_every_ending_of_an_image_is_listed(tmp_path):
    for name in ("a.gif", "b.jfif", "c.JPG", "d.txt", "e.webp"):
        write(tmp_path / "ill" / name, "" if name == "d.txt" else Image.new("RGB", (20, 20)))
    photos = imagefolder(tmp_path, 16, 16)
    assert photos.names == ["ill/a.gif", "ill/b.jfif", "ill/c.JPG", "ill/e.webp"]
    assert len(photos.readable()) == 4


def test_imagefolder(lungs):
    photos = imagefolder(lungs)
    expected = [("NORMAL/one.jpeg", 0, ()), ("NORMAL/ward/two.png", 0, ()), ("PNEUMONIA/one.jpeg", 1, ())]
    assert listed(photos) == expected
    assert photos.class_names == ["NORMAL", "PNEUMONIA"]
    assert imagefolder(lungs, class_names=["healthy", "ill"]).class_names == ["healthy", "ill"]
    table = boxes_csv(lungs, "two.png,1,2,3,4", "PNEUMONIA/one.jpeg,5,6,7,8", "two.png,0,0,9,9.5", "absent.png,1,2,3,4")
    boxed = [
        expected[0],
        ("NORMAL/ward/two.png", 0, ((1, 2, 3, 4), (0, 0, 9, 9.5))),
        ("PNEUMONIA/one.jpeg", 1, ((5, 6, 7, 8),)),
    ]
    with pytest.warns(
        UserWarning, match=r"boxes\.csv: 1 rows match no photo, such as that of absent\.png; their boxes"
    ):
        assert listed(imagefolder(lungs, boxes_csv=table)) == boxed
    with pytest.warns(UserWarning, match="match no photo"):
        assert listed(imagefolder(lungs, boxes_csv=str(table), shard=(1, 2))) == boxed[1:2]
    for other in ([], ["PNEUMONIA/one.jpeg,5,6,7,8"]):  # a table of findings says so of photos without one
        photos = imagefolder(lungs, boxes_csv=boxes_csv(lungs, "two.png,,,,", *other))
        assert (photos.records[1].boxes, photos.records[1].fault) == ((), "")
        assert photos.records[2].boxes == (((5, 6, 7, 8),) if other else ())
    table = boxes_csv(lungs, "two.png,1,2,3,", "PNEUMONIA/one.jpeg,5,6,7,8")
    photos = imagefolder(lungs, boxes_csv=table)
    reason = "annotation: cannot read that of two.png (wanted xmin ymin xmax ymax, got 1 2 3 )"
    assert photos.get(1) == Skipped("NORMAL/ward/two.png", 0, reason)
    assert isinstance(photos.get(2), Sample)


def test_imagefolder_refuses_in_one_sentence(lungs, tmp_path):
    for root in (None, "", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="root: wanted the folder of class folders, got"):
            imagefolder(root)
    with pytest.raises(FileNotFoundError, match="root: no images in class folders in"):
        imagefolder(lungs / "NORMAL" / "ward")
    with pytest.raises(ValueError, match="class_names: wanted 2, one per class folder, got 3"):
        imagefolder(lungs, class_names=["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match="table: no file at"):
        imagefolder(lungs, boxes_csv=lungs / "nothing.csv")
    with pytest.raises(ValueError, match=r"boxes\.csv: one\.jpeg names 2 images; wanted its path relative to"):
        imagefolder(lungs, boxes_csv=boxes_csv(lungs, "one.jpeg,1,2,3,4"))
    with pytest.raises(ValueError, match=r"boxes\.csv: wanted images of .*, got none of them"):
        imagefolder(lungs, boxes_csv=boxes_csv(lungs, "three.png,1,2,3,4"))
    with pytest.raises(ValueError, match=r"boxes\.csv: wanted a table with the columns image, xmin, ymin, xmax, ymax"):
        imagefolder(lungs, boxes_csv=boxes_csv(lungs, "two.png,1,2", header="image,x,y"))
    twice = boxes_csv(lungs, "two.png,1,2,3,4,5", header="image,xmin,ymin,xmax,ymax,xmin")
    with pytest.raises(ValueError, match=r"boxes\.csv: wanted a table with .* \(xmin more than once\)$"):
        imagefolder(lungs, boxes_csv=twice)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("place", ["", "./été/", "été/", "été\\", ".\\été\\"])
def test_photos_are_found_by_their_path_however_it_is_written(tmp_path, on_disk, typed, place):
    write(tmp_path / unicodedata.normalize(on_disk, "été") / unicodedata.normalize(on_disk, "âne.png"))
    table = boxes_csv(tmp_path, unicodedata.normalize(typed, f"{place}âne.png,1,2,3,4"))
    assert imagefolder(tmp_path, boxes_csv=table).records[0].boxes == ((1, 2, 3, 4),)


def labels_of(root, *folders, **options):
    for folder in folders:
        write(root / folder / "a.png")
    photos = imagefolder(root, **options)
    return {photo.name.split("/")[0]: photo.label for photo in photos.records}, photos.class_names


def test_folders_named_by_whole_numbers_are_the_labels(tmp_path):
    with pytest.warns(UserWarning, match=r"root: class folders named by numbers have these as labels; torchvision"):
        found, names = labels_of(tmp_path / "all", *map(str, range(12)))
    assert found == {str(i): i for i in range(12)}
    assert names == [str(i) for i in range(12)]
    found, names = labels_of(tmp_path / "some", "007", "10", "3")
    assert found == {"3": 3, "007": 7, "10": 10}
    assert len(names) == 11
    assert imagefolder(tmp_path / "some", class_names=list("abcdefghijklm")).class_names[10] == "k"
    with pytest.raises(ValueError, match="class_names: wanted at least 11, one per label, got 3"):
        imagefolder(tmp_path / "some", class_names=["a", "b", "c"])
    for index, other in enumerate(("7", "20240131")):  # the same number twice; a date
        with pytest.raises(ValueError, match=r"root: class folders are named by numbers, .*; wanted class indices"):
            labels_of(tmp_path / f"odd{index}", "007", "1", other)


def test_class_names_that_hold_the_folders_say_the_labels(tmp_path):
    found, names = labels_of(tmp_path / "pets", "cat", "dog", class_names=["dog", "bird", "cat"])
    assert (found, names) == ({"cat": 2, "dog": 0}, ["dog", "bird", "cat"])
    assert labels_of(tmp_path / "turned", "0", "1", class_names=["1", "0"])[0] == {"0": 1, "1": 0}
    with pytest.raises(ValueError, match="class_names: wanted the class folder cat among them once"):
        imagefolder(tmp_path / "pets", class_names=["dog", "cat", "cat"])
    with pytest.raises(ValueError, match="class_names: wanted 2, one per class folder, got 0"):
        imagefolder(tmp_path / "pets", class_names=[])


@pytest.mark.parametrize(("on_disk", "typed"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_accents_are_part_of_their_letter_however_they_are_stored(tmp_path, on_disk, typed):
    folders, names = ([unicodedata.normalize(form, name) for name in ("été", "âne")] for form in (on_disk, typed))
    found, _ = labels_of(tmp_path, *folders, class_names=names)
    assert found == {folders[0]: 0, folders[1]: 1}
    with pytest.raises(ValueError, match="wanted the names of the folders as they are written"):
        imagefolder(tmp_path, class_names=["Été", "Âne"])


@pytest.mark.parametrize("make", [np.array, pd.Index, pd.Series])
def test_class_names_of_other_libraries(tmp_path, make):
    assert labels_of(tmp_path, "cat", "dog", class_names=make(["dog", "cat"])) == ({"cat": 1, "dog": 0}, ["dog", "cat"])


@pytest.mark.parametrize("names", [{"dog": 1, "cat": 0}, {0: "cat", 1: "dog"}, {"dog", "cat"}, "dc"])
def test_class_names_without_an_order_are_refused(tmp_path, names):
    with pytest.raises(TypeError, match="class_names: wanted a list with one name per class, got "):
        labels_of(tmp_path, "cat", "dog", class_names=names)


def test_folders_whose_labels_are_not_clear_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="root: of the class folders only some are named by a number; wanted class_names"
    ):
        labels_of(tmp_path / "mixed", "0", "1", "10", "2", "unknown")
    assert labels_of(tmp_path / "mixed", class_names=["0", "1", "2", "10", "unknown"])[0]["10"] == 3
    (tmp_path / "weights" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="root: of the class folders checkpoints has no images; wanted class_names"):
        labels_of(tmp_path / "weights", "cat", "dog")
    named = ["cat", "none", "dog"]
    assert labels_of(tmp_path / "weights", class_names=named)[0] == {"cat": 0, "dog": 2}


def test_what_systems_and_notebooks_leave_is_passed_over_at_any_depth(tmp_path):
    left = (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png", ".DS_Store/a.png", "$RECYCLE.BIN/a.png")
    for name in ("cat/a.png", "cat/deep/b.png", "dog/c.png", "dog/._c.png"):
        write(tmp_path / name, Image.new("RGB", (8, 8)))
    for name in left:
        for place in ("", "cat", "dog/deep"):
            write(tmp_path / place / name, Image.new("RGB", (8, 8)))
    expected = [("cat/a.png", 0, ()), ("cat/deep/b.png", 0, ()), ("dog/c.png", 1, ())]
    assert listed(imagefolder(tmp_path)) == expected
    assert imagefolder(tmp_path).class_names == ["cat", "dog"]
    (tmp_path / "cat").rename(tmp_path / TENCH)
    (tmp_path / "dog").rename(tmp_path / EAGLE)
    assert [photo.label for photo in imagenet(tmp_path).records] == [0, 0, 22]


def test_photos_behind_links_are_listed_and_links_that_go_round_are_not_followed(tmp_path):
    for name in ("set/cat/a.png", "set/dog/b.png", "patient/c.png", "patient/.hidden/d.png"):
        write(tmp_path / name, Image.new("RGB", (8, 8)))
    links = {"set/dog/more": "patient", "set/eel": "patient", "set/cat/self": "set/cat", "set/cat/all": "set"}
    for link, target in (links | {"patient/back": "set/dog", "patient/up": "."}).items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    names = imagefolder(tmp_path / "set").names
    assert {"cat/a.png", "dog/b.png", "dog/more/c.png", "eel/c.png"} <= set(names)
    assert not any(part in name for name in names for part in ("self", "all", ".hidden", "more/back"))


@pytest.mark.slow
def test_own_checkpoint_on_an_own_folder(lungs, tmp_path):
    torch.manual_seed(0)
    trained = load_model("efficientnet_lite0", pretrained=False, num_classes=2).network
    torch.save(trained.state_dict(), tmp_path / "lungs.pt")
    photos = imagefolder(lungs, 64, 64)
    model = load_model("efficientnet_lite0", checkpoint=tmp_path / "lungs.pt", class_names=photos.class_names)
    rows = evaluate(model, photos, {"grad_cam": METHODS["grad_cam"]})
    assert list(rows["label"]) == [0, 0, 1]
    with torch.no_grad():
        logits = trained.eval()((photos[2].image[None] - model.mean) / model.std)
    np.testing.assert_allclose(rows["logit"][2], logits[0, 1].item(), rtol=1e-4)


# ------------------------------------------------------------------------------------------- Imagenette, by name


def test_imagenette(tmp_path, monkeypatch):
    asked = []

    def fetch(root, split, size, download):
        asked.append((root, split, size, download))
        for wnid in (EAGLE, TENCH):
            write(root / "imagenette2-320" / split / wnid / "a.JPEG")

    monkeypatch.setattr(datasets, "Imagenette", fetch)
    with pytest.raises(FileNotFoundError, match="root: wanted the folder of Imagenette; download=True fetches it, got"):
        imagenette(tmp_path)
    assert asked == []
    for _ in range(2):  # what is there is not fetched again
        photos = imagenette(tmp_path, download=True)
        assert listed(photos) == [(f"{TENCH}/a.JPEG", 0, ()), (f"{EAGLE}/a.JPEG", 22, ())]
        assert asked == [(tmp_path, "val", "320px", True)]
    with pytest.raises(
        ValueError, match="imagenette: wanted size full, 320px, 160px and split val or train, got '64px'"
    ):
        imagenette(tmp_path, size="64px")
    with pytest.raises(FileNotFoundError, match="root: wanted the folder of Imagenette, got none"):
        imagenette(None)

    def refuse(*args, **options):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "Imagenette", refuse)
    with pytest.raises(OSError, match=r"imagenette: cannot be downloaded to .* \(File not found or corrupted\.\)"):
        imagenette(tmp_path, size="160px", download=True)


def test_load_dataset(kaggle, lungs):
    assert set(DATASETS) == {"demo", "imagenet", "imagefolder", "imagenette"}
    photos = load_dataset("demo", "", 96, 112, 8, draw=10, shard="1/2", seed=4)
    assert isinstance(photos, Photos)
    assert photos.records == demo(96, 112, 8, draw=10, shard=(1, 2), seed=4).records
    assert (len(photos), photos.input_size, photos.resize) == (4, 96, 112)
    assert load_dataset("imagenet", kaggle, limit=1).labels == [22]
    assert load_dataset("imagefolder", lungs, class_names=["a", "b"]).class_names == ["a", "b"]
    with pytest.raises(ValueError, match="dataset: wanted one of demo, imagenet, imagefolder, imagenette, got 'coco'"):
        load_dataset("coco")
    with pytest.raises(ValueError, match="root: the demo comes with the packages and takes none, got 'x'"):
        load_dataset("demo", "x")
    for name in ("imagenet", "imagefolder", "imagenette"):
        with pytest.raises(FileNotFoundError, match="root: wanted the folder"):
            load_dataset(name)


@pytest.mark.parametrize("make", [imagenet, imagefolder])
def test_names_are_unique_and_every_file_once(folders, make):
    names = [photo.name for photo in make(folders / "val").records]
    assert len(set(names)) == len(names) == 3


# --------------------------------------------------------------------------------------------------- real images

MINI = REPOSITORY.parent / "shared" / "imagenet_val_mini"
real = pytest.mark.skipif(not MINI.is_dir(), reason="no ImageNet images in ../shared/imagenet_val_mini")


@real
def test_real_imagenet_images():
    photos = imagenet(MINI)
    assert len(photos) == 300
    sample = photos[0]
    assert (sample.name, imagenet_classes()[sample.label]) == ("ILSVRC2012_val_00000347.JPEG", "canoe")
    assert sample.boxes.shape == (8, 4)
    assert not any(photo.fault for photo in photos.records)
    wnids = sorted(line.split()[0] for line in (MINI / "LOC_synset_mapping.txt").read_text().splitlines())
    assert wnids == datasets.ImageNetInfo().label_names()  # so the labels are torchvision's


@real
def test_real_tables_xml_and_class_folders_agree(tmp_path):
    by_table = imagenet(MINI).records
    flat, classes = tmp_path / "flat", tmp_path / "classes"
    flat.mkdir()
    (flat / "ILSVRC").symlink_to(MINI / "ILSVRC")  # without the table
    assert {photo[1:] for photo in imagenet(flat).records} == {photo[1:] for photo in by_table}
    wnids = datasets.ImageNetInfo().label_names()
    for photo in by_table:
        (classes / "val" / wnids[photo.label]).mkdir(parents=True, exist_ok=True)
        (classes / "val" / wnids[photo.label] / photo.name).symlink_to(photo.path)
    in_folders = imagenet(classes, annotations=MINI / "ILSVRC" / "Annotations" / "CLS-LOC" / "val").records
    expected = {(photo.name, photo.label, photo.boxes, "") for photo in by_table}
    assert {(photo.path.name, *photo[2:]) for photo in in_folders} == expected
    assert len(in_folders) == 300


@real
def test_real_shards_and_samples():
    everything = imagenet(MINI).records
    shards = [imagenet(MINI, shard=(k, 7)).records for k in range(7)]
    assert sorted(photo for shard in shards for photo in shard) == sorted(everything)
    drawn = imagenet(MINI, draw=20, seed=5).records
    assert drawn == imagenet(MINI, draw=20, seed=5).records == [photo for photo in everything if photo in drawn]


def test_a_box_of_the_demo_ends_behind_its_last_pixel():
    table = pd.read_csv(PACKAGE / "lab" / "demo_boxes.csv")
    first = demo(limit=1).records[0]
    (row,) = table[table["image"] == first.name][datasets.BOX_COLUMNS].to_numpy()
    assert first.boxes == ((row[0], row[1], row[2] + 1, row[3] + 1),)


@pytest.mark.parametrize("size", [(9001, 30), (30, 9001), (9000, 31)])
def test_of_a_strip_only_the_middle_is_resized(size, monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(values)
    resize = TF.resize
    whole = TF.to_tensor(TF.center_crop(resize(photo, [256]), [224]))
    seen = []
    monkeypatch.setattr(datasets.TF, "resize", lambda image, side: seen.append(image.size) or resize(image, side))
    assert (to_input(photo) - whole).abs().max() < 0.02
    assert max(seen[0]) <= 100 * min(seen[0]) + 1
