"""Photos put together so that it is known, for a real network, where the evidence for a class lies.

Three constructions. *Mosaics* of four photos of different classes: the evidence for a class lies in its own cell, which
is verified by replacing cells. The same mosaics before a network whose head sees *one cell* only: there it is exact.
*Pastes*: an object put into a photo of another class, kept where what it shows changes the network's mind, not
what it covers. And on any photo the *cell drops*: what the logit loses when a cell is replaced.

Scores say how much of a map lies on the evidence. Each photo is in one construction of a kind at most, so that
constructions are independent samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opticam.checks import check_images, check_inputs, check_whole, examine
from opticam.classifier import Classifier, as_classifier, class_logit, for_autograd, probabilities, read
from opticam.features import prepared
from opticam.folding import folded
from opticam.lab.evaluation import in_order
from opticam.metrics import box_mask, energy_pointing_game
from opticam.networks import wrap
from opticam.saliency import BASELINES, apply_mask, baseline_of, check_saliency, upsample
from opticam.state import frozen

SIDE = 2  # cells of a mosaic across and down, so that it has four
FILLS = ("mean", "blur")  # of BASELINES: what a verified cell is replaced by
_SMALLEST = 32  # pixels: an object that shows less is not pasted


class Mosaics(NamedTuple):
    """M mosaics of four photos each, of N photos given; no photo is in two of them.

    Attributes:
        images: (M,3,2H,2W) in [0,1].
        class_idx: (M,4) int64, the class of each cell, row by row.
        photos: (M,4) int64, which of the given photos each cell is.
        verified: (M,4) bool: replacing the cell lowers the logit of its class by more than replacing any other cell
            does, by the mean colour and by blur.
    """

    images: Tensor
    class_idx: Tensor
    photos: Tensor
    verified: Tensor


class Pastes(NamedTuple):
    """n photos with an object of another class in them, for which the network decides.

    Attributes:
        images: (n,3,H,W) in [0,1].
        class_idx: (n,) int64, the class of the object.
        host_class: (n,) int64, the class of the photo.
        boxes: n tensors (1,4), where the object is.
        photos: (n,2) int64, which of the given photos are host and source.
        pairs: (n,) int64, the number of the pair of photos; each photo is in one pair.
        tried: how many pastes were made to keep these.
    """

    images: Tensor
    class_idx: Tensor
    host_class: Tensor
    boxes: list[Tensor]
    photos: Tensor
    pairs: Tensor
    tried: int


def to_mosaics(cells: Tensor) -> Tensor:
    """Stitch tensors, row by row: (4M,C,h,w) to (M,C,2h,2w)."""
    return cells.unflatten(0, (-1, SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def to_cells(mosaics: Tensor) -> Tensor:
    """Cut mosaics into cells, row by row: (M,C,2h,2w) to (4M,C,h,w); undoes `to_mosaics`."""
    return mosaics.unflatten(3, (SIDE, -1)).unflatten(2, (SIDE, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def cell_boxes(size: tuple[int, int] | torch.Size) -> Tensor:
    """(4,4): the boxes of the cells of a mosaic of H x W pixels, row by row, as metrics take them."""
    height, width = (length / SIDE for length in size)
    corners = [(column * width, row * height) for row in range(SIDE) for column in range(SIDE)]
    return torch.tensor([[x, y, x + width, y + height] for x, y in corners])


def choose_mosaics(probs: Tensor, class_idx: Tensor, *, none: float = 1e-3, seed: int = 0) -> Tensor:
    """Fours of photos of different classes, each certain of its own class and of none of the others'.

    Photos come in a random order. Each goes to the first unfinished mosaic whose photos it agrees with, or begins a new
    one. What stays unfinished is left out.

    Args:
        probs: (N,C) of every class for each photo.
        class_idx: (N,) int64, the class of each; its probability must be the largest and more than 0.9.
        none: a photo must have less than this for the class of every other photo of its mosaic, and they for its.
        seed: of the order.

    Returns:
        (M,4) int64, places in 0..N-1; none occurs twice.

    Raises:
        ValueError: wrong shapes.
    """
    if probs.ndim != 2 or class_idx.shape != probs.shape[:1]:
        raise ValueError(f"probs: wanted (N,C) and class_idx (N,), got {tuple(probs.shape)}, {tuple(class_idx.shape)}")
    probs, class_idx = probs.cpu(), class_idx.cpu()
    certain = (class_logit(probs, class_idx) > 0.9) & (probs.argmax(1) == class_idx)
    crossed = probs[:, class_idx]  # [i, j]: what photo i has of the class of photo j
    apart = (torch.maximum(crossed, crossed.T) < none) & (class_idx[:, None] != class_idx)
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    fours: list[list[int]] = []
    for photo in order[certain[order]].tolist():
        open_ones = (four for four in fours if len(four) < SIDE**2 and bool(apart[photo, four].all()))
        if (four := next(open_ones, None)) is None:
            fours.append(four := [])
        four.append(photo)
    return torch.tensor([four for four in fours if len(four) == SIDE**2], dtype=torch.int64).reshape(-1, SIDE**2)


def find_mosaics(model: nn.Module, images: Tensor, class_idx: Tensor) -> Mosaics:
    """Mosaics at twice the size of the photos, with what the network's logits say of each cell; see `choose_mosaics`.

    Args:
        model: takes photos and mosaics, as networks do that pool their last maps. Left as found.
        images: (N,3,H,W) in [0,1]; errors as `checks.check_inputs`.
        class_idx: (N,) int64.
    """
    check_inputs(model, images, class_idx)
    photos = choose_mosaics(all_probabilities(model, images), class_idx).to(class_idx.device)
    mosaics = to_mosaics(images[photos.flatten()])
    if len(photos) == 0:
        return Mosaics(mosaics, photos, photos, photos.bool())
    many, classes = mosaics.repeat_interleave(SIDE**2, 0), class_idx[photos].flatten()
    cell = torch.arange(SIDE**2, device=photos.device).repeat(len(photos))
    verified = torch.ones_like(cell, dtype=torch.bool)
    for fill in FILLS:
        drops = cell_drops(model, many, classes, SIDE, BASELINES[fill], batch_size=4)
        others = drops.scatter(1, cell[:, None], -torch.inf).amax(1)
        verified &= class_logit(drops, cell) > others
    return Mosaics(mosaics, class_idx[photos], photos, verified.view(photos.shape))


def cell_drops(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    side: int,
    baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 64,
) -> Tensor:
    """How much the class logit falls when one cell of the image is replaced, `f(x)_c - f(x_without_cell)_c`.

    Model, images, class_idx and baseline, which is what the cell shows instead, as `evaluation.score` takes them.

    Args:
        side: cells across and down, a divisor of H and W, else ValueError; `side**2` passes an image.
        batch_size: images in flight; the result does not depend on it.

    Returns:
        (B,side*side) float64, cells row by row; higher: the network needs the cell more; negative where it disturbs.
    """
    check_inputs(model, images, class_idx)
    check_side(side, images.shape[2:])
    check_whole(1, batch_size=batch_size)
    cells = torch.eye(side**2, dtype=images.dtype, device=images.device).view(-1, 1, side, side)
    kept = 1 - F.interpolate(cells, size=images.shape[2:], mode="nearest")
    with frozen(model), torch.no_grad():
        x, c = prepared(model, images), for_autograd(class_idx)
        logits = examine(model, x, c).logits
        shown = baseline_of(x, baseline)
        network, y = folded(model, x, logits), class_logit(logits.double(), c)
        drops = []
        for flat in torch.arange(len(x) * side**2, device=x.device).split(int(batch_size)):
            rows, cell = flat // side**2, flat % side**2
            without = apply_mask(x[rows], kept[cell], None if shown is None else shown[rows])
            drops.append(y[rows] - class_logit(read(network, prepared(model, without)).logits.double(), c[rows]))
    return torch.cat(drops).view(len(images), -1)


def check_side(side: int, size: torch.Size) -> None:
    """Refuse, by a ValueError, a number of cells across and down that does not divide the size (H,W)."""
    check_whole(1, side=side)
    if any(length % side for length in size):
        raise ValueError(f"side: wanted a divisor of {tuple(size)}, got {side}")


class OneCell(nn.Module):
    """A network whose head sees one cell of a 2x2 mosaic only: its logits are those of the photo in that cell.

    `maps`, an identity that is called on the maps of the whole mosaic, is the layer to explain.

    DiFull: the features of the cells are computed apart and stitched, so that nothing outside the cell changes the
    logits.

    Args:
        network: with the methods `forward_features`, to maps (B,K,h,w), and `forward_head`, from them to logits, as the
            networks of timm have them.
        cell: 0 to 3, row by row.

    Raises:
        ValueError: a network without these methods, or no such cell; when called, features that are no maps.

    Reference:
        Rao, Boehle, Schiele, Towards better understanding attribution methods, CVPR 2022, arXiv 2205.10435.
    """

    def __init__(self, network: nn.Module, cell: int) -> None:
        super().__init__()
        if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
            name = type(network).__name__
            raise ValueError(f"network: wanted one with forward_features and forward_head, as timm's; got {name}")
        check_whole(0, cell=cell)
        if cell >= SIDE**2:
            raise ValueError(f"cell: wanted one of 0..{SIDE**2 - 1}, got {cell!r}")
        self.network, self.cell = network, cell
        self.maps = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,C) of mosaics (B,3,2H,2W)."""
        network: Any = self.network
        cells = network.forward_features(to_cells(images))
        if cells.ndim != 4:
            told = f"maps (B,K,h,w) from its forward_features, got shape {tuple(cells.shape)}"
            raise ValueError(f"network: wanted one with {told}")
        seen = to_cells(self.maps(to_mosaics(cells))).unflatten(0, (-1, SIDE**2))
        return network.forward_head(seen[:, self.cell])


def see_one_cell(model: Classifier, cell: int) -> Classifier:
    """The classifier of a `OneCell` that shares the weights of the model; ValueError if that gives no logits."""
    classifier = as_classifier(model)
    if classifier is None or classifier.to_logits is not None:
        raise ValueError("model: wanted a Classifier whose network returns logits, as load_model gives it")
    return wrap(
        OneCell(classifier.network, cell),
        "maps",
        head=classifier.head,
        mean=classifier.mean.flatten().tolist(),
        std=classifier.std.flatten().tolist(),
        input_size=SIDE * classifier.input_size,
        class_names=classifier.class_names,
        name=f"{classifier.name}, cell {cell}",
    ).eval()


def phase_scrambled(patch: Tensor, seed: int = 0) -> Tensor:
    """The patch with random phases: the same frequencies and colours in each channel, and no object.

    To every phase of the patch (3,h,w) that of a picture of noise is added, the same in all channels, so that colours
    that belong together stay together. The amplitude of every frequency stays, and so does the mean. Values may leave
    the range of the patch.
    """
    wide = patch.to(torch.promote_types(patch.dtype, torch.float32))  # CPUs transform nothing of half precision
    noise = torch.rand(patch.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=wide.dtype).to(wide)
    turned = torch.polar(torch.ones_like(noise[:, : noise.shape[1] // 2 + 1]), torch.fft.rfft2(noise).angle())
    return torch.fft.irfft2(torch.fft.rfft2(wide) * turned, s=patch.shape[1:]).to(patch)


def paste_object(
    host: Tensor, source: Tensor, boxes: Tensor, *, share: float = 0.65, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """An object of one photo in another, at a random place, and the same patch scrambled.

    Args:
        host: (3,H,W) in [0,1].
        source: (3,H,W) in [0,1].
        boxes: (n,4) of the objects of the source; the one that shows most inside the frame is taken.
        share: the longer side of the patch, as a share of the shorter side of the host.
        seed: of the place and of the scrambled phases.

    Returns:
        The photo with the object; with the patch scrambled by `phase_scrambled`; the box (1,4) of both in whole pixels.

    Raises:
        ValueError: no box shows a pixel inside the frame.
    """
    height, width = host.shape[1:]
    if not 0 < share <= 1:
        raise ValueError(f"share: wanted a number above 0, of at most 1, got {share}")
    x0, y0, x1, y1 = _largest_inside(boxes, source.shape[1:])
    if x1 == x0:
        raise ValueError("boxes: wanted one that shows part of the source")
    scale = share * min(height, width) / max(y1 - y0, x1 - x0)
    h, w = (max(1, round(scale * length)) for length in (y1 - y0, x1 - x0))
    part = source[None, :, y0:y1, x0:x1].to(torch.promote_types(source.dtype, torch.float32))  # as `phase_scrambled`
    patch = F.interpolate(part, (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
    chance = torch.rand(2, generator=torch.Generator().manual_seed(seed))
    top, left = int(chance[0] * (height - h + 1)), int(chance[1] * (width - w + 1))
    pasted, scrambled = host.clone(), host.clone()
    pasted[:, top : top + h, left : left + w] = patch
    scrambled[:, top : top + h, left : left + w] = phase_scrambled(patch, seed).clamp(0, 1)
    return pasted, scrambled, torch.tensor([[left, top, left + w, top + h]], dtype=torch.float32)


def _largest_inside(boxes: Tensor, size: torch.Size) -> list[int]:
    """Of boxes (n,4) the one that shows most inside of a frame (H,W), in whole pixels; zeros where none does."""
    inside = torch.minimum(boxes.cpu().round().clamp(min=0), torch.tensor([size[1], size[0]] * 2)).long()
    areas = (inside[:, 2:] - inside[:, :2]).clamp(min=0).prod(1)
    return inside[areas.argmax()].tolist() if areas.any() else [0, 0, 0, 0]


def find_pastes(model: nn.Module, images: Tensor, class_idx: Tensor, boxes: Sequence[Tensor]) -> Pastes:
    """Pastes for whose object the network decides, and that it does not mistake for the object when scrambled.

    Photos that the network gets right and whose object shows at least 32 pixels each way are put in pairs of different
    classes, in a random order. In each pair each photo is once the host. Kept is a paste if the network's first choice
    is the class of the object, and that of the host with the patch scrambled.

    Args:
        model: takes `images`. Left as found.
        images: (N,3,H,W) in [0,1]; errors as `checks.check_inputs`.
        class_idx: (N,) int64.
        boxes: N tensors (n,4), of the objects of the class; errors as `metrics.box_mask`, and for another number.
    """
    check_inputs(model, images, class_idx)
    boxes = boxes_in_order(boxes, len(images))
    right = (all_probabilities(model, images).argmax(1) == class_idx).cpu()
    for i, some in enumerate(boxes):
        x0, y0, x1, y1 = _largest_inside(some, images.shape[2:])
        right[i] &= min(x1 - x0, y1 - y0) >= _SMALLEST
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    waiting: list[int] = []
    pairs: list[tuple[int, int]] = []
    for photo in order[right[order]].tolist():
        partner = next((other for other in waiting if class_idx[other] != class_idx[photo]), None)
        if partner is None:
            waiting.append(photo)
        else:
            waiting.remove(partner)
            pairs += [(partner, photo), (photo, partner)]
    if not pairs:
        none = torch.zeros(0, dtype=torch.int64)
        return Pastes(images[:0], class_idx[:0], class_idx[:0], [], none.view(0, 2), none, 0)
    made = [paste_object(images[i], images[j], boxes[j], seed=k) for k, (i, j) in enumerate(pairs)]
    pasted, scrambled = (torch.stack(part) for part in list(zip(*made, strict=True))[:2])
    hosts, sources = (class_idx[list(photos)] for photos in zip(*pairs, strict=True))
    seen, covered = (all_probabilities(model, some).argmax(1) for some in (pasted, scrambled))
    kept = ((seen == sources) & (covered == hosts)).nonzero()[:, 0]
    return Pastes(
        pasted[kept],
        sources[kept],
        hosts[kept],
        [made[k][2] for k in kept.tolist()],
        torch.tensor(pairs)[kept.cpu()],
        kept.cpu() // 2,
        len(pairs),
    )


def boxes_in_order(boxes: Sequence[Tensor], number: int) -> list[Tensor]:
    """So many tensors (n,4) by their place, see `evaluation.in_order`; errors also as `metrics.box_mask`."""
    boxes = in_order("boxes", boxes, number)
    box_mask(boxes, (1, 1))  # for its checks
    return boxes


def pixel_auroc(saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """AUROC of pixels: how likely a pixel of the boxes has a higher value than one outside, equals counting one half.

    Args:
        saliency: (B,1,H,W) in [0,1].
        boxes: B tensors (n,4), as in `metrics.localization`.

    Returns:
        (B,) float64 in [0,1], higher is better, 1/2 for a constant map; depends on the order of the pixels only. NaN
        for a map with a NaN, and where no pixel or every pixel lies in a box. Errors as `energy_pointing_game`.
    """
    check_saliency(None, saliency)
    boxes = in_order("boxes", boxes, len(saliency))
    truth = box_mask(boxes, saliency.shape[-2:]).to(saliency.device).flatten(1).double()
    flat = saliency.detach().double().flatten(1).contiguous()
    ordered = flat.sort(1).values
    ranks = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1) / 2
    inside, outside = truth.sum(1), (1 - truth).sum(1)
    wins = (ranks * truth).sum(1) - inside * (inside + 1) / 2  # Mann and Whitney's U
    return (wins / (inside * outside)).masked_fill(flat.isnan().any(1), torch.nan)


def class_contrast(saliency: Tensor, rivals: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
    """How much more of the map of the class lies on its evidence than of the maps of other classes for the same image.

    `EP(S_c) - mean_j EP(S_j)`, EP being the share of a map inside the boxes. A map that does not depend on the class
    has 0.

    Args:
        saliency: (B,1,H,W) in [0,1], of the class whose evidence the boxes hold.
        rivals: maps (B,1,H,W) of the same images for other classes, by the same method; ValueError where there is none,
            TypeError for one tensor instead of a list.
        boxes: B tensors (n,4).

    Returns:
        (B,) float64 in [-1,1]; higher is better.
    """
    if isinstance(rivals, Tensor):
        raise TypeError(f"rivals: wanted a list of maps (B,1,H,W), got a tensor of shape {tuple(rivals.shape)}")
    if not rivals:
        raise ValueError("rivals: wanted at least one map of another class")
    others = torch.stack([energy_pointing_game(maps, boxes) for maps in rivals])
    return energy_pointing_game(saliency, boxes) - others.mean(0)


def best_map(boxes: Sequence[Tensor], size: tuple[int, int] | torch.Size, grid: tuple[int, int] | torch.Size) -> Tensor:
    """What a method that is always right can show: the true region averaged to the cells of the layer, upsampled again.

    (B,1,H,W) in [0,1], of B tensors of boxes (n,4), the size (H,W) of the images and the grid (h,w) of the maps.
    """
    return upsample(F.adaptive_avg_pool2d(box_mask(boxes, size), (grid[0], grid[1])), size)


def evidence_scores(
    saliency: Tensor, boxes: Sequence[Tensor], grid: tuple[int, int] | torch.Size, rivals: Sequence[Tensor] = ()
) -> pd.DataFrame:
    """How much of each map lies on the evidence, as it is and between a uniform map (0) and the best possible (1).

    Scaled is `(s - s_uniform)/(s_best - s_uniform)`, s_best being the score of `best_map`. The best map touches the
    border of the region, so a map that stays away from it can have a little more than 1. Of `class_contrast` the best
    is that of the best map beside rivals that have nothing in the region.

    Args:
        saliency: (B,1,H,W) in [0,1].
        boxes: B tensors (n,4), where the evidence is.
        grid: (h,w) of the feature maps.
        rivals: see `class_contrast`; without any there is no contrast.

    Returns:
        One row per map; columns `energy` (EP), `auroc` and `contrast`, and the scaled `scaled_energy`, `scaled_auroc`
        and `scaled_contrast`. Higher is better. NaN where the best map is uniform, as that of a single cell.
    """
    uniform, best = torch.ones_like(saliency), best_map(boxes, saliency.shape[-2:], grid).to(saliency)
    flat = best.amax((1, 2, 3)) - best.amin((1, 2, 3)) < 1e-6  # upsampling rounds
    columns: dict[str, Tensor] = {}
    for name, metric in (("energy", energy_pointing_game), ("auroc", pixel_auroc)):
        value, low, high = (metric(maps, boxes) for maps in (saliency, uniform, best))
        columns |= {name: value, f"scaled_{name}": ((value - low) / (high - low)).masked_fill(flat, torch.nan)}
    if len(rivals):
        contrast = class_contrast(saliency, rivals, boxes)
        columns |= {"contrast": contrast, "scaled_contrast": contrast / energy_pointing_game(best, boxes)}
    return pd.DataFrame({name: values.detach().cpu().numpy() for name, values in columns.items()})


def maps_of_other_cells(saliency: Tensor) -> list[Tensor]:
    """Of the maps of all cells of mosaics, (4M,1,H,W), the rivals of each: the maps of the other cells' classes.

    ValueError: a mosaic that lacks one.
    """
    by_mosaic = _by_mosaic(saliency)
    return [by_mosaic.roll(shift, 1).flatten(0, 1) for shift in range(1, SIDE**2)]


def maps_of_other_mosaics(saliency: Tensor) -> Tensor:
    """For each of the maps of all cells, (4M,1,H,W), a map of the next mosaic, its cells in a random order.

    So a map of this list has the histogram and the smoothness of a real one, and a mosaic's four show all cells alike.
    ValueError: fewer than two mosaics, or one that lacks a map.
    """
    by_mosaic = _by_mosaic(saliency)
    if len(by_mosaic) < 2:
        raise ValueError(f"saliency: wanted maps of at least two mosaics, got {len(by_mosaic)}")
    draw = torch.rand(len(by_mosaic), SIDE**2, generator=torch.Generator().manual_seed(0))
    mosaics = torch.arange(len(by_mosaic))[:, None]
    return by_mosaic.roll(-1, 0)[mosaics, draw.argsort(1)].flatten(0, 1)


def _by_mosaic(saliency: Tensor) -> Tensor:
    """Maps (4M,1,H,W) of all cells as (M,4,1,H,W)."""
    if saliency.ndim != 4 or len(saliency) % SIDE**2 or not len(saliency):
        told = f"maps (4M,1,H,W), {SIDE**2} of each mosaic, got shape {tuple(saliency.shape)}"
        raise ValueError(f"saliency: wanted {told}")
    return saliency.unflatten(0, (-1, SIDE**2))


def cell_means(saliency: Tensor, side: int) -> Tensor:
    """The mean of the map in each cell, (B,side*side), cells row by row and errors as in `cell_drops`."""
    check_side(side, saliency.shape[2:])
    return F.adaptive_avg_pool2d(saliency, side).flatten(1)


def uniform(model: nn.Module, images: Tensor, class_idx: Tensor) -> Tensor:
    """A control, called like a method: one half everywhere, (B,1,H,W)."""
    check_inputs(model, images, class_idx)
    return torch.full_like(images[:, :1], 0.5).detach()


def centred(model: nn.Module, images: Tensor, class_idx: Tensor) -> Tensor:
    """A control, called like a method: a Gaussian in the middle, 1 there, with a quarter of the side as sigma."""
    check_inputs(model, images, class_idx)
    down, across = (
        torch.exp(-8 * ((torch.arange(n, device=images.device) + 0.5) / n - 0.5) ** 2) for n in images.shape[2:]
    )
    return (down[:, None] * across).to(images).expand(len(images), 1, -1, -1).contiguous()


def evidence_rows(
    saliency: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    grid: tuple[int, int] | torch.Size,
    rivals: Mapping[str, Sequence[Tensor]] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """`evidence_scores` of the maps of several methods: one row per method and map, with the column `method`.

    Arguments as there, but maps and rivals by method. `columns` are further ones of B values each, such as names.
    ValueError: rivals of a method that has no maps, or a further column named as one of the scores or `method`.
    """
    if unknown := [name for name in rivals or {} if name not in saliency]:
        raise ValueError(f"rivals: wanted those of {', '.join(saliency)}, got {unknown[0]}")
    of_method = {name: evidence_scores(S, boxes, grid, (rivals or {}).get(name, ())) for name, S in saliency.items()}
    more = {name: in_order(name, values, len(boxes)) for name, values in (columns or {}).items()}
    taken = {"method"}.union(*(map(str, table) for table in of_method.values()))
    if twice := [name for name in more if name in taken]:
        raise ValueError(f"columns: wanted other names than {', '.join(sorted(taken))}, got {twice[0]}")
    tables = [table.assign(method=name, **more) for name, table in of_method.items()]
    return pd.concat(tables, ignore_index=True)


def all_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """What the network gives each class, (B,C) float64 in [0,1]; errors as `checks.check_images`."""
    check_images(model, images)
    found: list[Tensor] = []
    with frozen(model), torch.no_grad():
        for part in images.split(16):
            logits, head = read(model, prepared(model, part)) if found else examine(model, prepared(model, part))
            found.append(probabilities(logits.double(), head))
    return torch.cat(found)
