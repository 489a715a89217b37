"""Images in [0,1] with name, label and boxes: reading any photo, the network's input frame, the embedded demo."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

REPOSITORY = Path(__file__).resolve().parents[1]
BOX_COLUMNS = ["xmin", "ymin", "xmax", "ymax"]


class Sample(NamedTuple):
    """One image as the network sees it.

    Attributes:
        name: of the image file.
        image: (3,S,S) float32 in [0,1].
        label: class index, torchvision's for ImageNet.
        boxes: (n,4) float32, (xmin, ymin, xmax, ymax) of the label's objects in pixels of `image`; not clipped, so
            parts may lie outside.
    """

    name: str
    image: Tensor
    label: int
    boxes: Tensor


@dataclass(frozen=True)
class Photos(Dataset):
    """Photos on disk, decoded when asked for.

    Attributes:
        paths: image files.
        labels: class index of each.
        boxes: of each, (n,4) in pixels of the original photo.
        input_size: side of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    boxes: Sequence[Tensor]
    input_size: int = 224
    resize: int = 256

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"photo: wanted a number in 0..{len(self) - 1}, got {index}")
        photo = read_image(self.paths[index])
        image = to_input(photo, self.input_size, self.resize)
        boxes = boxes_to_input(self.boxes[index], photo.size, self.input_size, self.resize)
        return Sample(self.paths[index].name, image, self.labels[index], boxes)


def read_image(path: str | Path) -> Image.Image:
    """An image file as a person sees it: upright, 8-bit RGB.

    Grayscale, palette, CMYK and 16-bit images are converted; transparency is laid on white; the EXIF orientation is
    applied.

    Args:
        path: any format that Pillow reads.

    Raises:
        OSError: the file is missing, no image, or damaged.
        ValueError: the pixels are floating-point numbers, which have no agreed range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image: no file at {path}")
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise OSError(f"image: {path} is not an image that can be read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"image: {path} is damaged or cannot be decoded ({error})") from error
    if image.mode == "F":
        raise ValueError(f"image: {path} has floating-point pixels; wanted integers of 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255
        values = np.asarray(image, dtype=np.int64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_input(photo: Image.Image, input_size: int = 224, resize: int = 256) -> Tensor:
    """The photo as a network's input: shorter side to `resize` (bilinear, antialiased), then the centre crop.

    Args:
        photo: RGB.
        input_size: side of the crop, in pixels.
        resize: shorter side before the crop, in pixels.

    Returns:
        (3,input_size,input_size) float32 in [0,1].

    Raises:
        ValueError: `resize` is smaller than `input_size`.
    """
    _check_frame(input_size, resize)
    return TF.to_tensor(TF.center_crop(TF.resize(photo, [resize]), [input_size]))


def boxes_to_input(boxes: Tensor, photo_size: tuple[int, int], input_size: int = 224, resize: int = 256) -> Tensor:
    """Boxes of the photo in the pixels of the network's input, by exactly the resize and crop of `to_input`.

    Args:
        boxes: (n,4) (xmin, ymin, xmax, ymax) in pixels of the photo.
        photo_size: (width, height) of the photo.
        input_size: side of the crop, in pixels.
        resize: shorter side before the crop, in pixels.

    Returns:
        (n,4) float32; not clipped, so what was cropped away still counts.

    Raises:
        ValueError: `resize` is smaller than `input_size`.
    """
    _check_frame(input_size, resize)
    width, height = photo_size
    short = min(width, height)
    resized = torch.tensor([int(resize * width / short), int(resize * height / short)])  # torchvision truncates
    corner = torch.tensor([round((side - input_size) / 2) for side in resized.tolist()])  # and rounds
    scale = resized / torch.tensor([width, height])
    return boxes.float().reshape(-1, 4) * scale.repeat(2) - corner.repeat(2)


def demo(input_size: int = 224, resize: int = 256, limit: int | None = None) -> Photos:
    """The embedded demo: 20 ImageNet photos out of the installed package foolbox, with this repository's boxes.

    Args:
        input_size: side of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
        limit: only the first so many photos; None for all.

    Raises:
        FileNotFoundError: the photos or their boxes are not there.
        ValueError: `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: wanted at least 1 photo, got {limit}")
    annotations = REPOSITORY / "data" / "demo" / "boxes.csv"
    if not annotations.is_file():
        raise FileNotFoundError(f"demo: no boxes at {annotations}; wanted an editable install of the repository")
    try:
        folder = Path(str(distribution("foolbox").locate_file("foolbox/data")))
    except PackageNotFoundError as error:
        raise FileNotFoundError("demo: the package foolbox, which carries the photos, is not installed") from error
    paths = sorted(folder.glob("imagenet_*_*.jpg"))[:limit]
    if not paths:
        raise FileNotFoundError(f"demo: no photos named imagenet_NN_CLASS.jpg in {folder}")
    table = pd.read_csv(annotations)
    labels = [int(re.findall(r"\d+", path.stem)[-1]) for path in paths]
    boxes = [torch.tensor(table.loc[table["image"] == path.name, BOX_COLUMNS].to_numpy("float32")) for path in paths]
    return Photos(paths, labels, boxes, input_size, resize)


def imagenet(
    root: str | Path | None = None, input_size: int = 224, resize: int = 256, limit: int | None = None
) -> Photos:
    """Validation images of ILSVRC-2012 in the Kaggle layout, in the order of `LOC_val_solution.csv`.

    Args:
        root: folder with `LOC_val_solution.csv`, `LOC_synset_mapping.txt` and `ILSVRC/Data/CLS-LOC/val/`; by default
            the environment variable OPTICAM_IMAGENET.
        input_size: side of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
        limit: only the first so many images; None for all.

    Raises:
        FileNotFoundError: no root is given, or the tables are not there.
        ValueError: `limit` is not positive, or a table is malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: wanted at least 1 image, got {limit}")
    root = root or os.environ.get("OPTICAM_IMAGENET")
    if not root:
        raise FileNotFoundError("root: wanted the folder of ImageNet, as argument or in OPTICAM_IMAGENET")
    root = Path(root)
    synsets, solution = root / "LOC_synset_mapping.txt", root / "LOC_val_solution.csv"
    for table in (synsets, solution):
        if not table.is_file():
            raise FileNotFoundError(f"root: no {table.name} in {root}; wanted the Kaggle layout of ILSVRC-2012")
    wnids = sorted(line.split()[0] for line in synsets.read_text().splitlines() if line.strip())
    index = {wnid: label for label, wnid in enumerate(wnids)}  # torchvision numbers classes by their sorted wnids
    paths, labels, boxes = [], [], []
    for name, prediction in pd.read_csv(solution, nrows=limit).itertuples(index=False):
        fields = prediction.split()
        try:
            labels.append(index[fields[0]])
            found = [[float(value) for value in fields[i + 1 : i + 5]] for i in range(0, len(fields), 5)]
            boxes.append(torch.tensor(found).reshape(-1, 4))
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{solution.name}: cannot read the row of {name} ({error})") from error
        paths.append(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG")
    return Photos(paths, labels, boxes, input_size, resize)


def _check_frame(input_size: int, resize: int) -> None:
    if not 0 < input_size <= resize:
        raise ValueError(f"resize: wanted at least input_size ({input_size}) and positive, got {resize}")
