import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from opticam import datasets
from opticam.datasets import boxes_to_input, demo, imagenet, read_image, to_input
from opticam.models import imagenet_classes

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


def test_missing_corrupt_and_truncated(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: no file at .*nothing\.jpg"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(FileNotFoundError, match="image: no file at"):
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
    table = pd.read_csv(datasets.REPOSITORY / "data" / "demo" / "boxes.csv")
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
    with pytest.raises(ValueError, match="limit: wanted at least 1 photo, got 0"):
        demo(limit=0)
    monkeypatch.setattr(datasets, "REPOSITORY", tmp_path)
    with pytest.raises(FileNotFoundError, match="wanted an editable install"):
        demo()


@pytest.fixture
def kaggle(tmp_path):
    """Two images of a made-up ImageNet with three classes, in the Kaggle layout."""
    (tmp_path / "LOC_synset_mapping.txt").write_text("n02 b\nn01 a, an a\nn03 c\n")
    rows = ["ImageId,PredictionString", "second,n03 10 20 30 60 n03 0 0 5 6 ", "first,n01 1 2 3 4"]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for name in ("first", "second"):
        Image.effect_noise((100, 80), 50).save(folder / f"{name}.JPEG")
    return tmp_path


def test_imagenet_in_the_kaggle_layout(kaggle, monkeypatch):
    photos = imagenet(kaggle, input_size=64, resize=80)
    assert [(sample.name, sample.label) for sample in photos] == [("second.JPEG", 2), ("first.JPEG", 0)]
    # no resize, crop 64 of 100x80: left 18, top 8
    assert photos[0].boxes.tolist() == [[-8, 12, 12, 52], [-18, -8, -13, -2]]
    assert len(imagenet(kaggle, limit=1)) == 1
    monkeypatch.setenv("OPTICAM_IMAGENET", str(kaggle))
    assert len(imagenet()) == 2


def test_imagenet_that_is_not_there_or_malformed(kaggle, monkeypatch):
    monkeypatch.delenv("OPTICAM_IMAGENET", raising=False)
    with pytest.raises(FileNotFoundError, match="root: wanted the folder of ImageNet"):
        imagenet()
    with pytest.raises(ValueError, match="limit: wanted at least 1 image"):
        imagenet(kaggle, limit=0)
    (kaggle / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nfirst,n99 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: cannot read the row of first"):
        imagenet(kaggle)
    (kaggle / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"root: no LOC_synset_mapping\.txt"):
        imagenet(kaggle)


MINI = datasets.REPOSITORY.parent / "shared" / "imagenet_val_mini"


@pytest.mark.skipif(not MINI.is_dir(), reason="no ImageNet images in ../shared/imagenet_val_mini")
def test_real_imagenet_images():
    photos = imagenet(MINI)
    assert len(photos) == 300
    sample = photos[0]
    assert (sample.name, imagenet_classes()[sample.label]) == ("ILSVRC2012_val_00000347.JPEG", "canoe")
    assert sample.boxes.shape == (8, 4)
