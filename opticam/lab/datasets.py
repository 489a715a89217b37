"""Images in [0,1] with name, label and boxes: reading any photo, the network's input frame, the datasets.

A dataset is a list of `Photo` records, made without opening an image: a photo is decoded when it is asked for, in
whatever process asks, and what is wrong with one photo stays with that photo (`Photos.get`).
"""

import errno
import itertools
import math
import operator
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from inspect import signature
from numbers import Integral
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import Imagenette
from torchvision.transforms import functional as TF

from opticam.checks import as_names, as_seed, check_at_least, check_corners, check_tensors, check_window
from opticam.lab.files import PACKAGE
from opticam.networks import check_device, imagenet_classes
from opticam.state import in_a_line

BOX_COLUMNS = ["xmin", "ymin", "xmax", "ymax"]
_ORIENTATION = 274  # the tag, of EXIF and of TIFF
_MOST_CLASSES = 100_000  # a folder of a larger number is named by a date or a patient
_OF_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@__thumb", "@tmp", "#recycle", "#snapshot"}
_OF_SYSTEMS |= {"$RECYCLE.BIN", "System Volume Information", "lost+found"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

Box = tuple[float, ...]
Item = TypeVar("Item")


class Photo(NamedTuple):
    """One listed photo, not yet opened.

    Attributes:
        path: of the image file.
        name: unique in its dataset: the path relative to the folder of the images.
        label: class index, torchvision's for ImageNet; -1 where it is not known, and `fault` says why.
        boxes: (xmin, ymin, xmax, ymax) of the label's objects in pixels of the photo.
        fault: one sentence on why this photo cannot be used; empty where nothing is known against it.
    """

    path: Path
    name: str
    label: int
    boxes: tuple[Box, ...] = ()
    fault: str = ""


class Sample(NamedTuple):
    """One image as the network sees it.

    Attributes:
        name: unique in its dataset.
        image: (3,S,S) float32 in [0,1].
        label: class index, torchvision's for ImageNet.
        boxes: (n,4) float32, (xmin, ymin, xmax, ymax) of the label's objects in pixels of `image`; not clipped, so
            parts may lie outside. Without rows where none are known.
    """

    name: str
    image: Tensor
    label: int
    boxes: Tensor


class Skipped(NamedTuple):
    """A photo that cannot be used.

    Attributes:
        name: unique in its dataset.
        label: class index; -1 where it is not known.
        reason: one sentence, the same on every machine.
    """

    name: str
    label: int
    reason: str


@dataclass(frozen=True)
class Photos(Dataset):
    """Photos on disk, decoded when asked for.

    Attributes:
        records: a `Photo` of each.
        class_names: one name per label.
        input_size: side of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
        upright: turn photos as their EXIF orientation says; see `read_image`.
        window: of pixels of more than 8 bits; see `read_image`.
    """

    records: Sequence[Photo]
    class_names: Sequence[str]
    input_size: int = 224
    resize: int = 256
    upright: bool = True
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_frame(self.input_size, self.resize)
        check_window(self.window)

    @property
    def photos(self) -> Sequence[Photo]:
        """The records, by the name that they had before 0.2."""
        return self.records

    @property
    def paths(self) -> list[Path]:
        return [photo.path for photo in self.records]

    @property
    def names(self) -> list[str]:
        return [photo.name for photo in self.records]

    @property
    def labels(self) -> list[int]:
        return [photo.label for photo in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The photo as the network sees it; errors as `read_image`.

        IndexError: no such photo. TypeError: not a whole number. ValueError: the record has a fault, or a box lies
        outside of the photo.
        """
        try:
            index = operator.index(index)
        except TypeError as error:
            raise TypeError(f"photo: wanted a whole number, got {in_a_line(index)}") from error
        if not 0 <= index < len(self):
            raise IndexError(f"photo: wanted a number in 0..{len(self) - 1}, got {index}")
        path, name, label, boxes, fault = self.records[index]
        if fault:
            raise ValueError(fault)
        image = read_image(path, upright=self.upright, window=self.window)
        width, height = image.size
        wide, high = 0.05 * width + 1, 0.05 * height + 1  # that a box may be off by
        spare = [min(b[0] + wide, b[1] + high, width + wide - b[2], height + high - b[3]) for b in boxes]
        if outside := [box for box, least in zip(boxes, spare, strict=True) if least < 0]:
            raise ValueError(f"annotation: box {outside[0]} lies outside of the photo of {width}x{height} pixels")
        moved = boxes_to_input(torch.tensor(boxes), image.size, self.input_size, self.resize)
        return Sample(name, to_input(image, self.input_size, self.resize), label, moved)

    def get(self, index: int) -> Sample | Skipped:
        """The photo as the network sees it, or why not: what `[index]` raises becomes a record.

        Raises:
            IndexError: no such photo.
            MemoryError, OSError: no memory or no open files are left, which says nothing of the photo.
            TypeError: not a whole number.
        """
        try:
            return self[index]
        except (OSError, ValueError) as error:
            if of_the_machine(error):
                raise
            path, name, label, *_ = self.records[index]
            return Skipped(name, label, str(error).replace(str(path), name))

    def readable(self, limit: int | None = None) -> list[Sample]:
        """Those of the first `limit` photos that can be used; None for all.

        Raises:
            ValueError: `limit` is negative, or not whole.
        """
        check_at_least(0, limit=limit)
        read = map(self.get, range(len(self))[:limit])
        return [photo for photo in read if isinstance(photo, Sample)]


def stack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Samples of one size as a batch: images (B,3,S,S) in [0,1] and class_idx (B,) int64, on the device.

    Raises:
        TypeError: not samples.
        ValueError: no sample; images of different sizes; a label that is not a whole number; an unknown device.
    """
    samples = list(samples)
    if not samples:
        raise ValueError("samples: wanted at least one")
    if other := [type(sample).__name__ for sample in samples if not isinstance(sample, Sample)]:
        raise TypeError(f"samples: wanted a list of Sample, got {other[0]}")
    check_device(device)
    first = tuple(samples[0].image.shape)
    for _, image, label, _ in samples:
        if image.shape != first:
            raise ValueError(f"samples: wanted images of one size, got {first} and {tuple(image.shape)}")
        if not isinstance(label, int | np.integer):
            raise ValueError(f"samples: wanted whole numbers as labels, got {in_a_line(label)}")
    images = torch.stack([sample.image for sample in samples]).to(device)
    return images, torch.tensor([int(sample.label) for sample in samples], device=device)


def select(
    items: Sequence[Item],
    *,
    limit: int | None = None,
    draw: int | None = None,
    shard: tuple[int, int] | str | None = None,
    seed: int = 0,
) -> list[Item]:
    """Some of the items, in their order: first `draw`, of that `limit`, of that `shard`.

    So `draw` and `limit` say what is worked on, and the n shards share it without overlap, whatever it is.

    Args:
        items: of any kind; only counted.
        limit: the first so many; None for all.
        draw: a random subset of so many, without replacement; a smaller one of the same seed lies within a larger.
        shard: (k, n) or "k/n" with k in 0..n-1: every n-th, from the k-th on, so that each shard sees all classes of a
            sorted list. A shard is empty where there are too few items.
        seed: of the draw.

    Raises:
        ValueError: a number out of range, or a shard of another form.
    """
    chosen = list(items)
    check_at_least(1, draw=draw, limit=limit)
    seed = as_seed(seed)
    if draw is not None:
        if draw > len(chosen):
            raise ValueError(f"draw: wanted at most the {len(chosen)} photos there are, got {draw}")
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[index] for index in sorted(order[:draw].tolist())]
    chosen = chosen[:limit]
    if shard is not None:
        words = "/".join(map(str, shard)) if isinstance(shard, tuple | list) else str(shard)
        parts = re.fullmatch(r"(\d+)/(\d+)", words)
        first, count = map(int, parts.groups()) if parts else (0, 0)
        if not first < count:
            raise ValueError(f"shard: wanted k/n with k in 0..n-1, got {shard!r}")
        chosen = chosen[first::count]
    return chosen


def of_the_machine(error: BaseException) -> bool:
    """Whether an error is no fault of the file that was to be read: too many files are open, or memory is short."""
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def read_image(path: str | Path, *, upright: bool = True, window: tuple[float, float] | None = None) -> Image.Image:
    """An image file as a person sees it: upright, 8-bit RGB.

    Grayscale, palette and CMYK images are converted; transparency is laid on white. Pixels of 16 bits often hold only
    10, 12 or 14 bits, and the file does not say so: without a window they are scaled by the fewest of 8, 10, 12, 14 or
    16 bits that hold the brightest pixel, with a warning if these are fewer than 16. Those of a
    JPEG 2000 are scaled by the bits that it says, where these are fewer than 16.

    Args:
        path: any format that Pillow reads.
        upright: apply the EXIF orientation; False leaves the pixels as they are stored.
        window: (low, high), the values shown black and white, of pixels of more than 8 bits: (0, 4095) for 12 bits,
            (-160, 240) for soft tissue in Hounsfield units. It must show something of the image. Pixels of 8 bits have
            none. Pixels that are negative or floating-point numbers need one.

    Raises:
        TypeError: `path` is not a path, or `upright` neither True nor False.
        OSError: the file is missing, no image, or damaged.
        ValueError: the wrong window, or none; more pixels than Pillow opens, or more than one page or frame.
    """
    path = _path("path", path)
    check_window(window)
    if not isinstance(upright, bool | np.bool_):
        raise TypeError(f"upright: wanted True or False, got {in_a_line(upright)}")
    if not path.is_file():
        raise FileNotFoundError(f"image: {f'{path} is a folder' if path.is_dir() else f'no file at {path}'}")
    refused = ""
    try:
        with path.open("rb") as file, Image.open(file) as opened:  # a path Pillow would map: scrambled if it is turned
            tags: Mapping[int, Any] = opened.tag_v2 if opened.format == "TIFF" else {}  # type: ignore[attr-defined]
            depths = _depths(path) if opened.format == "JPEG2000" else []
            deepest = max(depths, default=7)
            stored = str(opened.tile)  # before `load` takes it away: names the form of the pixels
            wide = max(tags.get(258, (8,))) > 8 or ";16" in stored or deepest > 7
            inverted = tags.get(262) == 0
            if wide and tags.get(284) == 2 and tags.get(277, 1) > 1:  # of which Pillow and OpenCV make noise
                refused = "stores colours of more than 8 bits in planes; wanted the channels of a pixel side by side"
            elif not wide and 2 in tags.get(339, ()):  # which Pillow reads without their sign
                refused = "has signed pixels of 8 bits; wanted unsigned ones, or more bits"
            elif deepest > 127 or (wide and len(depths) in (2, 4)):  # whose zero and transparency the readers shift
                refused = "is a JPEG 2000 with signed pixels or deep transparency; wanted unsigned gray or colours"
            # Pillow drops the lower bits of colours, and puts those of a gray JPEG 2000 at the upper end of 16
            deep = wide and not refused and (opened.mode in ("RGB", "RGBA") or opened.format == "JPEG2000")
            turned = opened.getexif().get(_ORIENTATION, 1) if tags else 1  # before `load` takes it away
            unsigned, ranged = "I;32N" in stored, opened.format == "PPM"  # whose range becomes 16 bits
            number = opened.n_frames if getattr(opened, "is_animated", False) else 1  # type: ignore[attr-defined]
            opened.load()
            said = (0.0, 2.0 ** (deepest + 1) - 1) if 7 < deepest < 15 else None  # by a JPEG 2000, of its range
            image = _deep_colors(path, opened, stored, window or said) if deep else opened
            if not upright and turned != 1:  # back, since Pillow and OpenCV turn a TIFF when they load it
                image.getexif()[_ORIENTATION] = {6: 8, 8: 6}.get(turned, turned)
            image = ImageOps.exif_transpose(image) if upright or turned != 1 else image.copy()
    except UnidentifiedImageError as error:
        raise OSError(f"image: {path} is not an image that can be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"{Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        raise ValueError(f"image: {path} is too large; wanted a smaller copy, or a higher limit than {most}") from error
    except Exception as error:  # decoders raise whatever they stumble over
        if of_the_machine(error):
            raise
        raise OSError(f"image: {path} is damaged or cannot be decoded ({error})") from error
    if refused:
        raise ValueError(f"image: {path} {refused}")
    if number > 1 and opened.format != "MPO":  # a phone's photo, with a preview of its own
        raise ValueError(f"image: {path} holds {number} pages or frames; wanted a file of one")
    if image.mode == "F" or (image.mode.startswith("I") and not ranged):
        values = np.asarray(image)
        shown = _shown(values.view(np.uint32) if unsigned else values, path, window)
        clear = image.info.get("transparency") if opened.format == "PNG" else None
        shown = 255 - shown if inverted else shown  # as Pillow does for 8 bits
        shown = shown if clear is None else np.where(values == clear, np.uint8(255), shown)
        return Image.fromarray(shown).convert("RGB")
    if window is not None and not deep:
        told = "says the range of its pixels itself; wanted" if ranged else "has pixels of 8 bits; wanted more bits, or"
        raise ValueError(f"window: {path} {told} no window")
    if ranged and image.mode == "I":
        return Image.fromarray(_shown(np.asarray(image), path, (0, 65535))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _depths(path: Path) -> list[int]:
    """Of each channel of a JPEG 2000 its bits less one, and 128 more where it has a sign."""
    size = path.read_bytes().partition(b"\xff\x4f\xff\x51")[2]  # the codestream begins with what it holds
    return list(size[38 : 38 + 3 * int.from_bytes(size[36:38], "big") : 3])


def _deep_colors(path: Path, opened: Image.Image, stored: str, window: tuple[float, float] | None) -> Image.Image:
    import cv2  # here, since few photos need it

    values = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is not None and values.ndim == 2 and not opened.mode.startswith("RGB"):
        values = np.stack([values] * 3, 2)
    if values is None or values.dtype != np.uint16 or values.shape[1::-1] != opened.size or values.ndim != 3:
        raise ValueError("pixels of more than 8 bits in an unknown form; wanted 8 bits per channel")
    colors, alpha = values[..., 2::-1], values[..., 3:]
    if "RGBX" in stored:  # a fourth channel of a TIFF that is not transparency
        alpha = alpha[..., :0]
    multiplied = "RGBa" in stored  # colours by their transparency
    if multiplied:
        colors = (colors * 65535.0 / alpha.clip(1)).round().clip(0, 65535).astype(np.uint16)
    shown, alpha = _shown(colors, path, window), alpha // 257
    if multiplied:  # laid on white here, rounded as Pillow rounds 8 bits
        shown, alpha = shown * alpha // 255 + 255 - alpha, alpha[..., :0]
    image = Image.fromarray(np.concatenate([shown, alpha], 2).astype(np.uint8))
    image.info["exif"] = opened.getexif().tobytes()
    return image


def _shown(values: np.ndarray, path: Path, window: tuple[float, float] | None) -> np.ndarray:
    """Pixels of more than 8 bits as 8 bits."""
    low, high = window or (0.0, 65535.0)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"image: {path} has pixels that are not finite")
    if window is None:
        if values.dtype.kind == "f":
            raise ValueError(f"image: {path} has floating-point pixels; wanted window=(low, high) to say their range")
        darkest, brightest = int(values.min()), int(values.max())
        if darkest < 0 or brightest > high:
            told = f"{darkest} to {brightest}, such as Hounsfield units"
            raise ValueError(f"image: {path} has pixels from {told}; wanted window=(low, high) to say what is shown")
        bits = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
        high = 2.0**bits - 1
        if bits < 16:
            told = f"pixels of 16 bits that are all below {2**bits} are read as {bits} bits"
            warnings.warn(f"image: {told}; window=(0, 65535) would keep 16", stacklevel=3)
    shown = ((values.astype(np.float64) - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
    if window is not None and shown.min() == shown.max() and (values != values.flat[0]).any():
        told = f"pixels from {values.min():g} to {values.max():g}"
        raise ValueError(f"window: ({low:g}, {high:g}) shows nothing of {path}, with {told}; wanted one that they fill")
    return shown


def to_input(photo: Image.Image, input_size: int = 224, resize: int = 256) -> Tensor:
    """The photo as a network's input: shorter side to `resize` (bilinear, antialiased), then the centre crop.

    Args:
        photo: RGB, or gray for a network of one channel.
        input_size: side of the crop, in pixels.
        resize: shorter side before the crop, in pixels; ValueError where it is smaller than `input_size`.

    Returns:
        (3,input_size,input_size) float32 in [0,1], of gray (1,input_size,input_size).
    """
    if not isinstance(photo, Image.Image):
        raise TypeError(f"photo: wanted an image of Pillow, as read_image gives it, got {type(photo).__name__}")
    if photo.mode not in ("RGB", "L"):  # others hold the numbers of a palette or of another space of colours
        raise ValueError(f"photo: wanted mode RGB, as read_image gives it, or L, got {photo.mode}")
    _check_frame(input_size, resize)
    # of a strip, what the crop cannot reach would take gigabytes once its shorter side is resized
    spare = [max(0, side - 100 * min(photo.size)) // 2 for side in photo.size]
    if any(spare):
        photo = photo.crop((spare[0], spare[1], photo.width - spare[0], photo.height - spare[1]))
    return TF.to_tensor(TF.center_crop(TF.resize(photo, [resize]), [input_size])).float()  # whatever torch's default


def boxes_to_input(boxes: Tensor, photo_size: tuple[int, int], input_size: int = 224, resize: int = 256) -> Tensor:
    """Boxes of the photo in the pixels of the network's input, by exactly the resize and crop of `to_input`.

    Args:
        boxes: (n,4) (xmin, ymin, xmax, ymax) in pixels of the photo.
        photo_size: (width, height) of the photo.
        input_size: as `to_input`, like `resize`.
        resize: likewise.

    Returns:
        (n,4) float32; not clipped, so what was cropped away still counts.
    """
    _check_frame(input_size, resize)
    check_tensors(boxes=boxes)
    check_corners(boxes)
    if boxes.numel() and boxes.shape[-1] != 4:
        raise ValueError(f"boxes: wanted shape (n,4), got {tuple(boxes.shape)}")
    width, height = _pair("photo_size", photo_size, "(width, height)")
    short = min(width, height)
    resized = torch.tensor([int(resize * width / short), int(resize * height / short)])  # torchvision truncates
    corner = torch.tensor([round((side - input_size) / 2) for side in resized.tolist()])  # and rounds
    scale = resized / torch.tensor([width, height])
    return boxes.float().reshape(-1, 4) * scale.repeat(2) - corner.repeat(2)


def maps_to_input(
    saliency: Tensor, photo_sizes: Sequence[tuple[int, int]], made: tuple[int, int], wanted: tuple[int, int]
) -> Tensor:
    """Maps made in one network's frame, on the same places of the photo in the frame of another.

    The photo joins the two: by the resize and crop of `to_input`, pixel x of the wanted frame shows the place of the
    photo that the frame of the maps shows at `left + (x - left') width / width'`, with `left` and `width` of the whole
    photo there. Bilinear between the centres of pixels; beyond the frame of the maps their border is repeated. The
    values are not normalised again.

    Args:
        saliency: (B,1,S,S), in the frame `made`.
        photo_sizes: (width, height) of each photo.
        made: (input_size, resize) that the maps were made with.
        wanted: (input_size, resize) of the other network.

    Returns:
        (B,1,S',S') of the dtype and device of the maps, within the range of each.

    Raises:
        TypeError: not a tensor of floating-point numbers; not pairs of whole numbers.
        ValueError: shapes or numbers do not agree; a `resize` smaller than its `input_size`.
    """
    check_tensors(saliency=saliency)
    if not saliency.is_floating_point():
        raise TypeError(f"saliency: wanted a floating-point dtype, got {saliency.dtype}")
    if not isinstance(photo_sizes, Iterable):
        raise TypeError(f"photo_sizes: wanted (width, height) of each photo, got {in_a_line(photo_sizes)}")
    photo_sizes = [_pair("photo_sizes", size, "(width, height) of each photo") for size in photo_sizes]
    made, wanted = (_pair(name, frame, "(input_size, resize)") for name, frame in (("made", made), ("wanted", wanted)))
    shape = len(photo_sizes), 1, made[0], made[0]
    if saliency.shape != shape:
        raise ValueError(f"saliency: wanted shape {shape}, got {tuple(saliency.shape)}")
    centres = (torch.arange(wanted[0], dtype=torch.float64) + 0.5)[:, None]
    grids = []
    for width, height in photo_sizes:
        photo = torch.tensor([[0, 0, width, height]])
        here, there = (boxes_to_input(photo, (width, height), *frame)[0].double() for frame in (made, wanted))
        places = here[:2] + (centres - there[:2]) * (here[2:] - here[:2]) / (there[2:] - there[:2])
        x, y = (2 * places / made[0] - 1).unbind(1)
        grids.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), 2))
    maps = saliency.to(torch.promote_types(saliency.dtype, torch.float32))  # in half precision torch reads other places
    moved = F.grid_sample(maps, torch.stack(grids).to(maps), padding_mode="border", align_corners=False)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return torch.clamp(moved, low, high).to(saliency.dtype)  # rounding would leave [0,1]


def load_dataset(
    name: str,
    root: str | Path | None = None,
    input_size: int = 224,
    resize: int = 256,
    limit: int | None = None,
    window: tuple[float, float] | None = None,
    **options: Any,
) -> Photos:
    """A dataset by name.

    Args:
        name: a key of `DATASETS`.
        root: folder of the dataset; the demo has none, and for ImageNet the environment may name it.
        input_size: side of the centre crop, in pixels.
        resize: shorter side before the crop, in pixels.
        limit: see `select`.
        window: see `imagefolder`; the photos of other datasets have 8 bits and no window.
        options: `draw`, `shard` and `seed` of `select`, and what else the function of that dataset takes.

    Raises:
        TypeError: an option that this dataset has not, or an argument of a wrong type.
        ValueError: an unknown name, a root for the demo, a window where there is none, or an argument out of range.
        FileNotFoundError: the dataset is not there.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"dataset: wanted one of {', '.join(DATASETS)}, got {name!r}")
    if root and name == "demo":
        raise ValueError(f"root: the demo comes with the packages and takes none, got {str(root)!r}")
    if window is not None and name != "imagefolder":
        raise ValueError(f"window: the photos of {name} have 8 bits; wanted none, got {window}")
    taken = signature(DATASETS[name]).parameters
    own = [option for option in taken if option not in signature(load_dataset).parameters]
    known = [*(option for option in own if option != "selection"), "draw", "shard", "seed"]
    unknown = [option for option in options if option not in known]
    if unknown and "selection" in taken:  # a function that somebody has added may take more
        raise TypeError(f"load_dataset: no option {unknown[0]!r}; wanted some of {', '.join(known)} for {name}")
    options |= {} if name == "demo" else {"root": root}
    options |= {"window": window} if name == "imagefolder" else {}
    return DATASETS[name](input_size=input_size, resize=resize, limit=limit, **options)


def demo(input_size: int = 224, resize: int = 256, limit: int | None = None, **selection: Any) -> Photos:
    """The embedded demo: 20 ImageNet photos out of the installed package foolbox, with boxes of our own.

    Arguments and errors as `load_dataset`.
    """
    annotations = PACKAGE / "lab" / "demo_boxes.csv"
    if not annotations.is_file():
        raise FileNotFoundError(f"demo: no boxes at {annotations}; the package is not installed whole")
    try:
        folder = Path(str(distribution("foolbox").locate_file("foolbox/data")))
    except PackageNotFoundError as error:
        raise FileNotFoundError("demo: the package foolbox, which carries the photos, is not installed") from error
    paths = sorted(folder.glob("imagenet_*_*.jpg"))
    if not paths:
        raise FileNotFoundError(f"demo: no photos named imagenet_NN_CLASS.jpg in {folder}")
    rows = defaultdict(list)
    for name, xmin, ymin, xmax, ymax in _table(annotations, ["image", *BOX_COLUMNS]):
        rows[name].append([xmin, ymin, float(xmax) + 1, float(ymax) + 1])  # the table names the last pixel inside
    photos = [
        Photo(path, path.name, int(re.findall(r"\d+", path.stem)[-1]), _boxes(rows[path.name]))
        for path in select(paths, limit=limit, **selection)
    ]
    return Photos(photos, imagenet_classes(), input_size, resize)


def imagenet(
    root: str | Path | None = None,
    input_size: int = 224,
    resize: int = 256,
    limit: int | None = None,
    *,
    annotations: str | Path | None = None,
    **selection: Any,
) -> Photos:
    """Validation images of ILSVRC-2012, in the layout of Kaggle or in class folders, whichever is found.

    Kaggle: `ILSVRC/Data/CLS-LOC/val/*.JPEG`, in the order of `LOC_val_solution.csv`; without that table, all of them by
    name. Class folders: `val/n01440764/*.JPEG`, or the root itself is the folder of class folders. Boxes, and in the
    layout of Kaggle classes, are those of the table, or else of the image's XML.

    Only objects of the image's class count: that of its folder, else of its first object. Labels are torchvision's,
    which numbers the 1000 classes by their sorted wnids, however few of them are there. Photos are read as they are
    stored, without their EXIF orientation, as torchvision reads them; boxes are taken to be in that frame.

    A photo whose class is unknown, or whose annotation is malformed, is listed with its fault. So is one without
    annotation where there is a folder of annotations; without such a folder it merely has no boxes. XML is read of
    selected images only.

    Arguments as `load_dataset`, and:

    Args:
        root: folder of ImageNet; by default the environment variable OPTICAM_IMAGENET.
        annotations: folder of the XML, flat or in class folders; by default `ILSVRC/Annotations/CLS-LOC/val` or
            `Annotations/CLS-LOC/val` in the root, or beside the image.

    Raises:
        FileNotFoundError: no root is given, it has no images, or the given annotations are not there.
        ValueError: an argument out of range, or a table that cannot be read.
    """
    root = _folder("root", root or os.environ.get("OPTICAM_IMAGENET"), "of ImageNet, here or in OPTICAM_IMAGENET")
    if annotations:
        places = [_folder("annotations", annotations, "of XML files")]
    else:
        kept = (root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val", root / "Annotations" / "CLS-LOC" / "val")
        places = [folder for folder in kept if folder.is_dir()]
    images = next(f for f in (root / "ILSVRC" / "Data" / "CLS-LOC" / "val", root / "val", root) if f.is_dir())
    solution = root / "LOC_val_solution.csv"
    predictions: dict[str, str] = {}
    if solution.is_file():
        table = _table(solution, ["ImageId", "PredictionString"])
        predictions = dict(table)
        if len(predictions) < len(table):
            (twice, _), *_ = Counter(name for name, _ in table).most_common(1)
            raise ValueError(f"{solution.name}: wanted each image once, got {twice} more than once")
        if outside := [name for name in predictions if Path(name).name != name]:
            raise ValueError(f"{solution.name}: wanted names of images without folders, got {outside[0]!r}")
    _, listed = _class_folders(images, r"n\d{8}")
    listed = listed or [(images / f"{name}.JPEG", "") for name in predictions]
    if not listed and (places or any(images.glob("*.xml"))):
        listed = [(path, "") for path in _images(images.iterdir())]
    if not listed:
        raise FileNotFoundError(
            f"root: no ImageNet in {root}; wanted ILSVRC/Data/CLS-LOC/val/*.JPEG with LOC_val_solution.csv or XML, or "
            "class folders such as val/n01440764"
        )
    index = {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}
    photos = []
    for path, wnid in select(listed, limit=limit, **selection):
        boxes: tuple[Box, ...] = ()
        fault = ""
        try:
            objects = _objects(path, wnid, predictions, places)
            wnid = wnid or next((name or "" for name, _ in objects), "")
            boxes = _boxes(box for name, box in objects if name == wnid or len(box) < 4)
            if wnid not in index:
                fault = f"label: wanted one of the 1000 classes of ImageNet, got {wnid!r}"
        except (OSError, SyntaxError, ValueError, TypeError, LookupError) as error:
            why = getattr(error, "strerror", None) or error  # without the path of this machine
            fault = f"annotation: cannot read that of {path.stem} ({why})"
        photos.append(Photo(path, _name(path, images), index.get(wnid, -1), boxes, fault))
    return Photos(photos, imagenet_classes(), input_size, resize, upright=False)


def imagefolder(
    root: str | Path | None,
    input_size: int = 224,
    resize: int = 256,
    limit: int | None = None,
    *,
    boxes_csv: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
    **selection: Any,
) -> Photos:
    """Any folder of class folders.

    The label of a photo comes from its class folder. If all class folders are among `class_names`, it is the folder's
    place there. Else, if their names are whole numbers, it is that number. Else it counts the sorted names, as
    torchvision's ImageFolder does, capital letters first. Names that are in another order by their numbers, such as
    class_10 and class_2, are refused, and so are folders that hold class folders, such as those of splits.

    Arguments as `load_dataset`, and:

    Args:
        root: the folder; images may lie deeper in their class folder, also behind links. At any depth, names that begin
            with a dot are passed over, and so are folders that systems make, such as __MACOSX and @eaDir.
        boxes_csv: table with columns image, xmin, ymin, xmax, ymax, one row per box, in pixels of the upright photo;
            `image` is a path relative to the root, or a file name that occurs once. Photos without a row have no boxes,
            nor have those whose row has four empty sides; a photo with a malformed row is listed with what is wrong. A
            photo with a box outside of it is skipped when it is read. Boxes in fractions of the photo are malformed,
            and so is 0, 0, 1, 1 in a table that has some. Rows that match no photo give a warning.
        class_names: one per label; by default the names of the folders.
        window: of pixels of more than 8 bits; see `read_image`.

    Raises:
        TypeError: `class_names` is not a list, or another argument of a wrong type.
        FileNotFoundError: no root, no images in it, or no table.
        ValueError: an argument out of range; class folders whose labels are not clear; a table that cannot be read or
            fits no image or several.
    """
    root = _folder("root", root, "of class folders")
    folders, listed = _class_folders(root)
    if not listed:
        raise FileNotFoundError(f"root: no images in class folders in {root}")
    inside: dict[str, set[str]] = {folder: set() for _, folder in listed}  # "" for photos directly in it
    for path, folder in listed:
        deeper, *_ = *path.relative_to(root / folder).parent.parts, ""
        inside[folder].add(deeper)
    labels, class_names = _labels(folders, inside, class_names)
    table = None if boxes_csv is None else _path("boxes_csv", boxes_csv)
    rows = _box_rows(table, root, [path for path, _ in listed]) if table and boxes_csv else {}
    fractions = any(map(_in_fractions, itertools.chain(*rows.values())))
    photos = []
    for path, folder in select(listed, limit=limit, **selection):
        boxes: tuple[Box, ...] = ()
        fault = ""
        try:
            boxes = _boxes(rows.get(path, []), fractions)
        except ValueError as error:
            fault = f"annotation: cannot read that of {path.name} ({error})"
        photos.append(Photo(path, _name(path, root), labels[folder], boxes, fault))
    return Photos(photos, class_names, input_size, resize, window=window)


def imagenette(
    root: str | Path | None,
    input_size: int = 224,
    resize: int = 256,
    limit: int | None = None,
    *,
    size: str = "320px",
    split: str = "val",
    download: bool = False,
    **selection: Any,
) -> Photos:
    """Ten easy classes of ImageNet, with ImageNet's labels and without boxes.

    Arguments as `load_dataset`, and:

    Args:
        root: folder that holds, or is to hold, `imagenette2-320` and the like.
        size: "full", "320px" or "160px", the shorter side of the photos.
        split: "val" or "train".
        download: fetch it by torchvision if it is not there.

    Raises:
        FileNotFoundError: it is not there and `download` is off.
        OSError: it cannot be downloaded.
        ValueError: an argument out of range.
    """
    sizes = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    if not isinstance(size, str) or size not in sizes or not isinstance(split, str) or split not in ("val", "train"):
        got = f"{in_a_line(size)}, {in_a_line(split)}"
        raise ValueError(f"imagenette: wanted size {', '.join(sizes)} and split val or train, got {got}")
    if not root:
        raise FileNotFoundError("root: wanted the folder of Imagenette, got none")
    folder = _path("root", root) / sizes[size] / split
    if download and not folder.is_dir():
        try:
            Imagenette(root, split, size, download=True)
        except (OSError, RuntimeError) as error:
            raise OSError(f"imagenette: cannot be downloaded to {root} ({error})") from error
    folder = _folder("root", folder, "of Imagenette; download=True fetches it")
    return imagenet(folder, input_size, resize, limit, **selection)


DATASETS: dict[str, Callable[..., Photos]] = {f.__name__: f for f in (demo, imagenet, imagefolder, imagenette)}


def _check_frame(input_size: int, resize: int) -> None:
    for name, side in (("input_size", input_size), ("resize", resize)):
        if not isinstance(side, Integral):
            raise TypeError(f"{name}: wanted a whole number, got {in_a_line(side)}")
    if not 0 < input_size <= resize:
        raise ValueError(f"resize: wanted at least input_size ({input_size}) and positive, got {resize}")


def _name(path: Path, root: Path) -> str:
    """The path in the folder as text that every table holds; bytes that are not UTF-8 are written as \\xe9."""
    return os.fsencode(path.relative_to(root).as_posix()).decode(errors="backslashreplace")


def _pair(argument: str, pair: Any, wanted: str) -> tuple[int, int]:
    try:
        first, second = map(operator.index, pair)
    except (TypeError, ValueError) as error:  # not numbers, not two
        raise type(error)(f"{argument}: wanted {wanted} in whole pixels, got {in_a_line(pair)}") from error
    if min(first, second) < 1:
        raise ValueError(f"{argument}: wanted {wanted} of at least 1 pixel, got {in_a_line(pair)}")
    return first, second


def _path(argument: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument}: wanted a path, got {type(path).__name__}")
    return Path(path)


def _folder(argument: str, path: str | Path | None, wanted: str) -> Path:
    folder = None if path is None else _path(argument, path)
    if not (path and folder and folder.is_dir()):
        raise FileNotFoundError(f"{argument}: wanted the folder {wanted}, got {str(path) if path else 'none'}")
    return folder


def _images(paths: Iterable[Path]) -> list[Path]:
    """Those with an ending of an image that Pillow opens, sorted."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted((p for p in paths if p.suffix.lower() in endings and not _passed_over(p.name)), key=Path.as_posix)


def _files(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """What lies in it at any depth, also behind links, but for links to folders above, which would go round."""
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not _passed_over(path.name) and (place := path.resolve()) not in above:
            yield from _files(path, above | {place})


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _class_folders(root: Path, pattern: str = r".*") -> tuple[list[str], list[tuple[Path, str]]]:
    names = sorted(folder.name for folder in root.iterdir() if re.fullmatch(pattern, folder.name) and folder.is_dir())
    names = [name for name in names if not _passed_over(name)]
    above = {name: (root / name).resolve() for name in names}
    return names, [
        (path, name)
        for name, place in above.items()
        for path in _images(_files(root / name, frozenset([place, *place.parents, root.resolve()])))
    ]


def _labels(
    folders: Sequence[str], inside: Mapping[str, set[str]], class_names: Sequence[str] | None
) -> tuple[dict[str, int], list[str]]:
    """The label of each class folder, and the names of the classes; see `imagefolder`.

    `inside` has, for each with images, the folders in it that hold them, "" for itself.
    """
    given = [] if class_names is None else list(map(_composed, as_names(class_names)))
    written = dict(zip(folders, map(_composed, folders), strict=True))
    if set(written.values()) <= set(given):
        if twice := [name for name in written.values() if given.count(name) > 1]:
            raise ValueError(f"class_names: wanted the class folder {twice[0]} among them once, got it more often")
        return {folder: given.index(name) for folder, name in written.items()}, given
    if {folder.lower() for folder in folders} <= _SPLITS:
        raise ValueError(f"root: its folders are {', '.join(folders)}; wanted one of them, with class folders")
    if split := _holds_classes(inside):
        told = f"its folder {split} holds no photos itself but folders of them, such as {min(inside[split])}"
        raise ValueError(
            f"root: {told}; wanted the folder of class folders, or class_names that hold its folders' names"
        )
    numbers = [int(folder) for folder in folders if folder.isascii() and folder.isdigit()]
    if len(numbers) == len(folders):
        if len(set(numbers)) < len(numbers) or max(numbers) >= _MOST_CLASSES:
            told = f"class folders are named by numbers, {folders[-1]} among them"
            raise ValueError(f"root: {told}; wanted class indices")
        names = given if class_names is not None else [str(number) for number in range(max(numbers) + 1)]
        if len(names) <= max(numbers):
            raise ValueError(f"class_names: wanted at least {max(numbers) + 1}, one per label, got {len(names)}")
        if class_names is None and sorted(folders) != sorted(folders, key=int):
            warnings.warn(
                "root: class folders named by numbers have these as labels; torchvision's ImageFolder puts 10 before "
                "2, so for a network trained with it give class_names in its order",
                stacklevel=3,
            )
        return dict(zip(folders, numbers, strict=True)), names
    empty = [folder for folder in folders if folder not in inside]
    if numbers or (empty and class_names is None):
        why = "only some are named by a number" if numbers else f"{empty[0]} has no images"
        raise ValueError(
            f"root: of the class folders {why}; wanted class_names that hold their names, to say the labels"
        )
    if class_names is not None and len(given) != len(folders):
        raise ValueError(f"class_names: wanted {len(folders)}, one per class folder, got {len(given)}")
    spelled = {letters(name): place for place, name in enumerate(given)}
    for label, folder in enumerate(folders if len(spelled) == len(given) else ()):
        if (place := spelled.get(letters(folder), label)) != label:
            told = f"{given[place]!r} has place {place}, but the class folder {folder!r} by its name label {label}"
            raise ValueError(f"class_names: {told}; wanted the names of the folders as they are written")
    if len(elsewhere := _elsewhere(folders, given)) > 1:
        (folder, place), *_ = elsewhere.items()
        told = f"{given[place]!r} has place {place}, but the class folder {folder!r} by its name label"
        raise ValueError(f"class_names: {told} {folders.index(folder)}; wanted the names of the folders in their order")
    by_number = sorted(folders, key=_natural)
    if unlike := [pair for pair in zip(folders, by_number, strict=True) if pair[0] != pair[1]]:
        raise ValueError(
            f"root: whether class folder {unlike[0][0]} comes before {unlike[0][1]} is not clear; wanted class_names "
            "that hold their names, in the order of the labels"
        )
    return {folder: label for label, folder in enumerate(folders)}, given or list(folders)


def _elsewhere(folders: Sequence[str], given: Sequence[str]) -> dict[str, int]:
    """Folders whose name is a part of one class name alone, which has another place; numbers and wnids do not count."""
    found = {}
    for label, folder in enumerate(folders):
        word = letters(folder)
        places = [place for place, name in enumerate(given) if word in letters(name)]
        if len(word) > 2 and word.isalpha() and len(places) == 1 and places != [label]:
            found[folder] = places[0]
    return found


def _holds_classes(inside: Mapping[str, set[str]]) -> str:
    """A folder that stands above class folders, as that of a split does; "" where none is seen to. See `_labels`."""
    above = {folder: deeper for folder, deeper in inside.items() if "" not in deeper}
    for folder, deeper in above.items():
        split = _SPLITS & set(re.split(r"[\W_]+", folder.lower()))
        alone = len(inside) == 1 and len(deeper) > 1
        # one folder alone may be "images" in each class
        if split or alone or any(len(deeper & others) > 1 for other, others in above.items() if other != folder):
            return folder
    return ""


def letters(name: str) -> str:
    """What remains of a class name by which two spellings of it agree."""
    return "".join(filter(str.isalnum, _composed(name).casefold()))


def _composed(name: str) -> str:
    """A name with each accent in its letter: file systems of macOS part them, who types a name does not."""
    return unicodedata.normalize("NFC", name)


def _written(path: str) -> str:
    """A relative path, however a person or a system writes it."""
    return PurePosixPath(_composed(path).replace("\\", "/")).as_posix()


def _natural(name: str) -> list[str | int]:
    """Text and numbers of a name in turn, so that 10 comes after 2."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _table(path: Path, columns: list[str]) -> list[Any]:
    import pandas as pd  # here, since most of this module is used without tables

    if not path.is_file():
        raise FileNotFoundError(f"table: no file at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skipinitialspace=True)
        if absent := [column for column in columns if column not in table]:
            raise ValueError(f"no {absent[0]} among {', '.join(map(str, table))}")
        if twice := [column for column in columns if f"{column}.1" in table]:  # as pandas calls the second
            raise ValueError(f"{twice[0]} more than once")
        return list(table[columns].itertuples(index=False, name=None))
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path.name}: wanted a table with the columns {', '.join(columns)} ({error})") from error


def _box_rows(table: Path, root: Path, paths: Sequence[Path]) -> dict[Path, list[Sequence[str]]]:
    known: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        known[_written(path.name)].append(path)
        known[_written(path.relative_to(root).as_posix())].append(path)
    rows: dict[Path, list[Sequence[str]]] = defaultdict(list)
    lost = []
    for name, *box in _table(table, ["image", *BOX_COLUMNS]):
        found = known.get(_written(name), [])
        lost += [] if found else [name]
        if len(found) > 1:
            raise ValueError(f"{table.name}: {name} names {len(found)} images; wanted its path relative to {root}")
        for path in found:
            rows[path] += [box] if any(box) else []
    if not rows:
        raise ValueError(f"{table.name}: wanted images of {root}, got none of them")
    if lost:
        text = f"{table.name}: {len(lost)} rows match no photo, such as that of {lost[0]}; their boxes are not used"
        warnings.warn(text, stacklevel=3)
    return rows


def _objects(
    path: Path, wnid: str, predictions: dict[str, str], places: list[Path]
) -> list[tuple[str | None, Sequence[str | None]]]:
    if path.stem in predictions:
        fields = predictions[path.stem].split()
        return [(fields[start], fields[start + 1 : start + 5]) for start in range(0, len(fields), 5)]
    files = [place / folder / f"{path.stem}.xml" for place in places for folder in (wnid, "")]
    xml = next((file for file in [*files, path.with_suffix(".xml")] if file.is_file()), None)
    if xml is None and (places or not wnid):
        raise FileNotFoundError("there is none")
    if xml is None:
        return []
    found = ElementTree.parse(xml).iter("object")  # noqa: S314  (expat itself refuses entities that explode)
    return [(entry.findtext("name"), [entry.findtext(f"bndbox/{side}") for side in BOX_COLUMNS]) for entry in found]


def _in_fractions(row: Sequence[str | None]) -> bool:
    """Whether the sides of a box are fractions of the photo's: none above 1, and not all whole."""
    try:
        box = [float(side or "nan") for side in row]
    except ValueError:
        return False
    return all(map(math.isfinite, box)) and max(box) <= 1 and not all(side.is_integer() for side in box)


def _boxes(rows: Iterable[Sequence[str | None]], fractions: bool = False) -> tuple[Box, ...]:
    """The boxes of one photo; `fractions` says that the table has boxes in fractions of the photo."""
    boxes = []
    for row in rows:
        box = tuple(float(side or "nan") for side in row)
        if not (len(box) == 4 and all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3]):
            raise ValueError(f"wanted xmin ymin xmax ymax, got {' '.join(map(str, row))}")
        if max(box) <= 1 and (fractions or _in_fractions(row)):
            raise ValueError(f"wanted pixels, got fractions {' '.join(map(str, row))}")
        boxes.append(box)
    return tuple(boxes)
