"""Metrics judged by evidence that is known: does a better score mean a map that is nearer the truth?

Many maps of one image, good and bad ones, are scored by every metric, and by how they agree with where the evidence is.
A metric that can be believed puts the maps in the order of the truth, is not won by maps that know nothing of the
image, and does not change when a map is only made sharper, blurrier or brighter.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from opticam.checks import check_at_least, check_inputs
from opticam.lab.evaluation import Method, in_order, saliency_maps, score
from opticam.lab.known_evidence import (
    FILLS,
    SIDE,
    all_probabilities,
    boxes_in_order,
    cell_boxes,
    cell_drops,
    cell_means,
    centred,
    check_side,
    find_mosaics,
    find_pastes,
    pixel_auroc,
    uniform,
)
from opticam.lab.summary import (
    Estimate,
    check_numeric,
    check_table,
    clipped,
    entries,
    estimate,
    estimate_and_p,
    ratio_of_means,
    spearman,
)
from opticam.methods import fake_cam
from opticam.metrics import COLUMNS, adcc, arcc, coherency, complexity, insertion_deletion, road
from opticam.saliency import BASELINES, apply_mask, min_max
from opticam.state import in_a_line

STEPS, FRACTIONS = 7, (0.2, 0.4)  # of the curves and of ROAD; else 28 and four: many maps are scored here
BASE = "grad_cam"  # whose maps are changed, and which uninformative maps are compared with


def sharper(saliency: Tensor) -> Tensor:
    """The map squared: the order of the pixels stays, the map covers less."""
    return saliency**2


def brighter(saliency: Tensor) -> Tensor:
    """The square root of the map: the order of the pixels stays, the map covers more."""
    return saliency.sqrt()


def lifted(saliency: Tensor) -> Tensor:
    """`(1 + S)/2`: the order of the pixels stays, and nothing is darker than one half."""
    return (1 + saliency) / 2


def blurrier(saliency: Tensor) -> Tensor:
    """The map after a Gaussian of a sixteenth of its side as sigma, again in [0,1]: detail is lost."""
    sigma = min(saliency.shape[2:]) / 16
    width = 2 * round(2 * sigma) + 1
    return min_max(TF.gaussian_blur(saliency, [width, width], [sigma, sigma]))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (sharper, blurrier, brighter, lifted)}
"""Changes of a map that add no information."""

CONTROLS: dict[str, Method] = {"fake_cam": fake_cam, "uniform": uniform, "centred": centred}
"""Maps that know nothing of the image; beside them `other`, the base method's map of another image."""

GROUPS = {
    "masking": ("average_drop", "average_gain", "average_increase", "gain_minus_drop", "log_odds"),
    "order of pixels": ("insertion", "deletion", "road"),
    "composed": ("adcc", "arcc"),
    "boxes": ("energy_pointing_game", "soft_f1", "pointing_game", "localization_error"),
}
"""The metrics that are audited, all of them columns of `judge`."""


class Evidence(NamedTuple):
    """Images of one kind whose evidence is known.

    Attributes:
        kind: "mosaic", "paste" or "deletion".
        names: of the B images; the photos in them are in no other image of the kind.
        images: (B,3,H,W) in [0,1].
        class_idx: (B,) int64.
        objects: B tensors (n,4), what a person would call the object; without rows for pastes, where it would be the
            truth itself.
        regions: B tensors (1,4), where the evidence is; empty for the kind "deletion".
        drops: (F,B,side*side) what the class logit loses with each cell, by F fills; empty for the other kinds.
    """

    kind: str
    names: list[str]
    images: Tensor
    class_idx: Tensor
    objects: list[Tensor]
    regions: list[Tensor]
    drops: Tensor


class Audited(NamedTuple):
    """Maps to be judged.

    Attributes:
        saliency: name -> (B,1,H,W) in [0,1].
        again: name -> the map that the same method makes of the image masked by the first.
    """

    saliency: dict[str, Tensor]
    again: dict[str, Tensor]


def audited_maps(model: nn.Module, images: Tensor, class_idx: Tensor, methods: Mapping[str, Method]) -> Audited:
    """The maps of methods, of `CHANGES` of the base method's map, and of the controls.

    Arguments as `evaluation.saliency_maps`. ValueError: the base method, `grad_cam`, is not among the methods.
    """
    if BASE not in methods:
        raise ValueError(f"methods: wanted {BASE} among them, got {', '.join(methods)}")
    made = {name: method for name, method in methods.items() if name not in CONTROLS}
    saliency = saliency_maps(model, images, class_idx, made, batch_size=4)
    saliency |= {name: change(saliency[BASE]) for name, change in CHANGES.items()}
    again = {}
    for name, S in saliency.items():
        method = {name: methods[BASE if name in CHANGES else name]}
        of_masked = saliency_maps(model, apply_mask(images, S), class_idx, method, batch_size=4)[name]
        again[name] = CHANGES[name](of_masked) if name in CHANGES else of_masked
    fixed = {name: control(model, images, class_idx) for name, control in CONTROLS.items()}
    if len(images) > 1:
        fixed["other"] = saliency[BASE].roll(1, 0)
    return Audited(saliency | fixed, again | fixed)


def collect_evidence(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    boxes: Sequence[Tensor],
    names: Sequence[str],
    *,
    limit: int | None = None,
    side: int = 7,
) -> list[Evidence]:
    """Mosaics, pastes and photos whose evidence is known; see `lab.known_evidence`.

    Of each mosaic one verified cell is explained, so that images are independent. Which one is drawn by the name of its
    first photo. Of the photos those count that the network gets right.

    Args:
        model: that decides, and that is explained.
        images: (N,3,H,W) in [0,1].
        class_idx: (N,) int64.
        boxes: N tensors (n,4); errors as `known_evidence.find_pastes`.
        names: N of them, by their place; ValueError for another number.
        limit: at most so many of each kind, at least 1; None for all.
        side: cells across and down whose deletion is tried, a divisor of H and W.

    Returns:
        One entry for each kind that has images.
    """
    check_inputs(model, images, class_idx)
    check_at_least(1, limit=limit)
    check_side(side, images.shape[2:])
    names = [str(name) for name in in_order("names", names, len(images))]
    boxes = boxes_in_order(boxes, len(images))
    height, width = images.shape[2:]
    frame, none = torch.tensor([width, height] * 2), torch.zeros(0)
    found = []
    mosaics = find_mosaics(model, images, class_idx)
    which = mosaics.verified.any(1).nonzero()[:, 0].tolist()[:limit]
    if which:
        drawn = [crc32(names[i].encode()) for i in mosaics.photos[which, 0].tolist()]
        turns = [[(start + k) % SIDE**2 for k in range(SIDE**2)] for start in drawn]
        cell = [next(k for k in turn if mosaics.verified[m, k]) for m, turn in zip(which, turns, strict=True)]
        corners = cell_boxes((SIDE * height, SIDE * width))[cell]
        shown = mosaics.photos[which, cell].tolist()
        inside = [torch.minimum(boxes[i].clamp(min=0), frame) for i in shown]
        objects = [some + corner[:2].repeat(2) for some, corner in zip(inside, corners, strict=True)]
        called = [f"{names[i]}, cell {k}" for i, k in zip(shown, cell, strict=True)]
        pictures = mosaics.images[which], mosaics.class_idx[which, cell]
        found.append(Evidence("mosaic", called, *pictures, objects, list(corners[:, None]), none))
    pastes = find_pastes(model, images, class_idx, boxes)
    first = [k for k, pair in enumerate(pastes.pairs.tolist()) if pair not in pastes.pairs[:k].tolist()][:limit]
    if first:
        called = [f"{names[j]} in {names[i]}" for i, j in pastes.photos[first].tolist()]
        objects, regions = [torch.zeros(0, 4)] * len(first), [pastes.boxes[k] for k in first]
        found.append(Evidence("paste", called, pastes.images[first], pastes.class_idx[first], objects, regions, none))
    right = (all_probabilities(model, images).argmax(1) == class_idx).nonzero()[:, 0].tolist()[:limit]
    if right:
        x, c = images[right], class_idx[right]
        drops = torch.stack([cell_drops(model, x, c, side, BASELINES[fill], batch_size=16) for fill in FILLS])
        found.append(Evidence("deletion", [names[i] for i in right], x, c, [boxes[i] for i in right], [], drops))
    return found


def truth_of(evidence: Evidence, saliency: Tensor) -> np.ndarray:
    """How near each map is to the evidence, (B,); higher is better, and the order of the pixels alone matters.

    For mosaics and pastes `pixel_auroc` of the region; for deletion Spearman's rank correlation of the cells of the map
    with the drops, mean over the fills.
    """
    if evidence.regions:
        return pixel_auroc(saliency, evidence.regions).cpu().numpy()
    means = cell_means(saliency.detach().cpu(), math.isqrt(evidence.drops.shape[2])).numpy()
    return np.mean([spearman(means, drops, axis=1) for drops in evidence.drops.cpu().numpy()], 0)


def audit_rows(model: nn.Module, evidence: Sequence[Evidence], methods: Mapping[str, Method]) -> pd.DataFrame:
    """The rows of `judge` for `audited_maps` of all images, with the columns `kind`, `image`, `target` and `truth`.

    ValueError: no evidence, or as `audited_maps`.
    """
    if not evidence:
        raise ValueError("evidence: wanted at least one kind, got none")
    tables = []
    for one in evidence:
        maps = audited_maps(model, one.images, one.class_idx, methods)
        table = judge(model, one.images, one.class_idx, maps, one.objects)
        table["truth"] = np.concatenate([truth_of(one, S) for S in maps.saliency.values()])
        called = [one.names[i] for i in table["target"]]
        tables.append(table.assign(kind=one.kind, image=called, target=[f"{one.kind}: {name}" for name in called]))
    return pd.concat(tables, ignore_index=True)


def judge(model: nn.Module, images: Tensor, class_idx: Tensor, maps: Audited, boxes: Sequence[Tensor]) -> pd.DataFrame:
    """Every metric for every map: one row per image and map, with the columns `target` (0 to B-1) and `method`.

    Args:
        model: takes `images`. Left as found.
        images: (B,3,H,W) in [0,1].
        class_idx: (B,) int64.
        maps: from `audited_maps`.
        boxes: B tensors (n,4), what a person would call the object; without rows where none are known.

    Returns:
        The columns of `evaluation.score` and of `GROUPS`, and the terms `coherency` and `complexity`.
    """
    per_step = images[0, 0].numel() // STEPS
    tables = []
    for name, S in maps.saliency.items():
        table = score(model, images, class_idx, S)
        arguments = model, images, class_idx, S
        inserted, deleted = insertion_deletion(*arguments, pixels_per_step=per_step, batch_size=8)
        removed = road(*arguments, fractions=FRACTIONS, batch_size=8)
        drop = torch.tensor(table["average_drop"].to_numpy())
        columns = {
            "insertion": inserted[0],
            "deletion": deleted[0],
            "road": removed,
            "coherency": coherency(S, maps.again[name]),
            "complexity": complexity(S),
            "adcc": adcc(S, maps.again[name], drop.to(S.device)),
            "arcc": arcc(S, maps.again[name], removed),
            **{metric: COLUMNS[metric](S.cpu(), boxes) for metric in GROUPS["boxes"]},
        }
        table = table.assign(**{column: values.cpu().numpy() for column, values in columns.items()})
        tables.append(table.rename_axis("target").reset_index().assign(method=name))
    return pd.concat(tables, ignore_index=True)


def agreement(scores: np.ndarray, truth: np.ndarray) -> tuple[dict[str, Estimate], float]:
    """Spearman rank correlation of a metric with the truth, in three ways.

    Args:
        scores: (n,M) of n images and M maps of each, higher is better.
        truth: (n,M) likewise.

    Returns:
        `maps`: over the maps of one image, mean over the images: which of these maps is better? `images`: over the
        images for one kind of map, mean over the kinds: on which image is the method right? `methods`: over the kinds
        of maps, of means over the images: which method is better? Each in [-1,1] with its 95 % interval over the
        images; 0 where one side is constant.

    Raises:
        ValueError: shapes that differ, or fewer than two maps.
    """
    if scores.shape != truth.shape or scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: wanted (n,M) as truth, M of 2 or more, got {scores.shape} and {truth.shape}")
    columns = *scores.T, *truth.T
    maps, p = estimate_and_p(spearman(scores, truth, axis=1))
    images, methods = (
        estimate(*columns, statistic=statistic, num_resamples=2000) for statistic in (_over_images, _over_methods)
    )
    return {"maps": maps, "images": images, "methods": methods}, p


def _over_images(*columns: np.ndarray, axis: int) -> np.ndarray:
    scores, truth = columns[: len(columns) // 2], columns[len(columns) // 2 :]
    return np.mean([spearman(a, b, axis) for a, b in zip(scores, truth, strict=True)], 0)


def _over_methods(*columns: np.ndarray, axis: int) -> np.ndarray:
    means = np.stack([values.mean(axis) for values in columns], -1)
    return spearman(means[..., : len(columns) // 2], means[..., len(columns) // 2 :], axis=-1)


ENDS = dict.fromkeys(("maps", "images", "methods"), (-1, 1)) | {"uninformative": (0, 1)}  # of the values


def audit(rows: pd.DataFrame, metrics: Mapping[str, bool], methods: Collection[str]) -> pd.DataFrame:
    """What each metric is worth, by known evidence: one row per metric.

    Args:
        rows: one row per target and map, with the columns `target` (unique over all kinds of evidence), `method`, those
            of the metrics, and `truth`, higher is better. A target without the metric for one of its maps does not
            count for it.
        metrics: column -> whether higher is better.
        methods: the maps that the truth orders; the base method among them.

    Returns:
        Index `metric`; each with `_low` and `_high`: `maps`, `images`, `methods` of `agreement`; `uninformative`, how
        often a control of the target scores better than the base method's map, equals counting one half, best 0; and
        for each of `CHANGES` what it adds to the base method's score, in standard deviations over the methods, best 0,
        positive where the metric likes it. NaN where there is no such row. And `n`, the number of targets, 0 for a
        metric without values; `maps_p`, the p value of `maps` being 0.

    Raises:
        TypeError: rows that are not a table; metrics that do not say which direction is better; methods as one text.
        ValueError: a column is missing or holds no numbers; two rows of a target and method; fewer than two methods,
            one of them twice or unknown, or the base method not among them.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: wanted a dict from column to whether higher is better, got {in_a_line(metrics)}")
    if isinstance(methods, str) or not isinstance(methods, Collection):
        raise TypeError(f"methods: wanted a list of names, got {in_a_line(methods)}")
    check_table("rows", rows, ["target", "method", "truth", *metrics])
    if not len(rows):
        raise ValueError("rows: wanted at least one, got none")
    for column in ("truth", *metrics):
        check_numeric(rows, column)
    if BASE not in methods:
        raise ValueError(f"methods: wanted {BASE} among them, got {', '.join(map(str, methods))}")
    if len(methods) < 2 or len(set(methods)) < len(methods):
        raise ValueError(f"methods: wanted two or more, each once, got {', '.join(map(str, methods))}")
    known = [*rows["method"].unique()]
    if other := [name for name in methods if name not in known]:
        raise ValueError(f"methods: wanted some of {', '.join(map(str, known))}, got {other[0]}")
    if len(twice := rows[rows.duplicated(["target", "method"])]):
        target, method = twice[["target", "method"]].iloc[0]
        raise ValueError(f"rows: wanted one row per target and method, got more of {target}, {method}")
    found: dict[str, dict[str, float]] = {}
    wide = rows.pivot(index="target", columns="method")
    controls = [name for name in (*CONTROLS, "other") if name in wide["truth"]]
    for metric, higher in metrics.items():
        values = pd.DataFrame(wide[metric] if higher else -wide[metric]).dropna(subset=list(methods))
        found[metric] = {"n": len(values)}
        if not len(values):
            continue
        scores, right = (table.loc[values.index, list(methods)].to_numpy(float) for table in (values, wide["truth"]))
        cells, p = agreement(scores, right)
        base = values[BASE].to_numpy(float)
        wins = [((values[name] > base) + (values[name] == base) / 2).where(values[name].notna()) for name in controls]
        if wins:
            cells["uninformative"] = estimate(pd.concat(wins, axis=1).mean(axis=1).dropna().to_numpy())
        spread = scores.std(axis=1, ddof=1)
        for change in CHANGES:
            if change in values:
                gained = values[change].to_numpy(float) - base
                there = ~np.isnan(gained)
                cells[change] = estimate(gained[there], spread[there], statistic=ratio_of_means)
        found[metric]["maps_p"] = p
        for name, cell in cells.items():
            found[metric] |= entries(name, clipped(cell, *ENDS.get(name, (-np.inf, np.inf))))
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("metric")


def audited_metrics() -> dict[str, bool]:
    """The metrics of `GROUPS`, in their order, and whether higher is better."""
    return {name: COLUMNS[name].higher for names in GROUPS.values() for name in names}
