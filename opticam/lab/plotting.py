"""Pictures: overlays, grids of images, bars with intervals, tables; one style for all figures; save_figure.

What returns a figure does not show it. Photos (3,H,W), maps (1,H,W) and probabilities are in [0,1], boxes in pixels.
"""

import io
import itertools
import math
import re
import textwrap
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opticam.checks import as_names
from opticam.lab.files import replacing
from opticam.methods import method_color, method_label
from opticam.metrics import headings

if TYPE_CHECKING:
    import pandas as pd

Metric = Callable[[Tensor, Tensor], Tensor]

_BLUE, _RED = "#0173b2", "#d55e00"  # of seaborn's palette "colorblind"
_MARKERS = "osD^vPX<>*"
_WIDTH = 85 / 25.4  # inches of a journal's column: charts are drawn at the size they are printed
_DPI = 200  # of what is printed
# the pale end is cut off: over a gray photo it would look weaker than what surrounds it
SALIENCY_CMAP = mpl.colors.ListedColormap(mpl.colormaps["inferno"](np.linspace(0, 0.85, 256)), "saliency")


def use_style() -> None:
    """The one style of all figures: colour-blind safe, 7 to 8 points in a column of 85 mm, deterministic files."""
    import seaborn as sns
    from IPython.core.getipython import get_ipython

    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    use_plain_style()
    if (shell := get_ipython()) and (formatter := shell.display_formatter):
        plt.switch_backend(mpl.get_backend())  # loaded later, it would set formatters of its own
        for kind in ("png", "jpeg"):
            formatter.formatters[f"image/{kind}"].for_type(Figure, partial(_printed, kind=kind))


def _printed(figure: Figure, kind: str) -> str | None:
    """What a notebook keeps of a figure: photos as JPEG, a quarter of their weight as PNG, and charts as PNG."""
    from IPython.core.pylabtools import print_figure

    if kind != ("jpeg" if _has_pictures(figure) else "png"):
        return None
    if kind == "jpeg":
        return print_figure(figure, fmt=kind, base64=True, pil_kwargs={"quality": 80})
    drawn = print_figure(figure, fmt=kind)
    return drawn and b64encode(_with_palette(drawn)).decode()


def _has_pictures(figure: Figure) -> bool:
    return any(ax.images for ax in figure.axes)


def _with_palette(chart: bytes) -> bytes:
    """A PNG with 256 colours, a third as heavy, which eyes cannot tell from all colours; photos would show bands."""
    lighter = io.BytesIO()
    with Image.open(io.BytesIO(chart)) as image:
        palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        palette.save(lighter, format="png", dpi=image.info["dpi"], optimize=True)
    return lighter.getvalue()


def use_plain_style() -> None:
    """The part of `use_style` that matters to pictures without axes, without the time that seaborn's import takes."""
    mpl.rcParams |= {
        "figure.dpi": _DPI,
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.handlelength": 1.4,
        "legend.handletextpad": 0.5,
        "legend.columnspacing": 1.2,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "opticam",
        "pdf.fonttype": 42,  # TrueType, which journals ask for
    }


def to_picture(image: Tensor) -> np.ndarray:
    """An image (3,H,W) or map (1,H,W) in [0,1] in matplotlib's layout: (H,W,3) or (H,W), float."""
    array = image.detach().cpu().float().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array.clip(0, 1)


def overlay(image: Tensor, saliency: Tensor) -> np.ndarray:
    """The map in colour over the image in gray, with a white line around what the map calls salient.

    The line runs inside of all that is at least 0.5. It shows the map where the image is dark too.

    Args:
        image: (3,H,W) in [0,1], or (1,H,W) in gray.
        saliency: (1,H,W) in [0,1].

    Returns:
        (H,W,3) float in [0,1].
    """
    colored = SALIENCY_CMAP(to_picture(saliency))[..., :3]
    gray = to_picture(image.expand(3, -1, -1)) @ np.array([0.299, 0.587, 0.114])
    picture = 0.55 * colored + (1 - 0.55) * gray[..., None]
    thick = math.ceil(saliency.shape[-1] / 150)
    inside = (saliency.detach().cpu()[None] >= 0.5).float()
    core = -F.max_pool2d(-inside, 2 * thick + 1, 1, thick)  # what is thick pixels or more away from the outside
    picture[(inside > core)[0, 0].numpy()] = 1
    return picture


def image_grid(
    rows: Sequence[Sequence[np.ndarray | Tensor]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    boxes: Sequence[Tensor] = (),
    size: float = 2.0,
    printed: bool = False,
    parse_math: bool = True,
) -> Figure:
    """Images in rows and columns.

    Args:
        rows: pictures (H,W,3) or (H,W), or tensors (3,H,W) or (1,H,W), in [0,1]; maps are shown in colour.
        column_titles: above the first row.
        row_titles: left of each row.
        captions: below each picture; an empty row for none.
        boxes: (n,4) of each picture, row by row, drawn over it.
        size: width and height of one picture in inches.
        printed: text of 7 points, for a page of a journal; else of 10, for a screen.
        parse_math: set what stands between dollars in the titles above as mathematics; False for names of classes.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("rows: wanted at least one picture")
    dpi, font = (_DPI, 7) if printed else (100, 10)
    extra = 0.025 * font if captions else 0.0
    figsize = (size * columns, (size + extra) * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=figsize, dpi=dpi, squeeze=False)
    if printed:
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set_anchor("N" if printed else "C")
    for line, row in zip(axes, rows, strict=True):
        for ax, picture in zip(line, row, strict=False):
            array = to_picture(picture) if isinstance(picture, Tensor) else picture
            ax.imshow(array, cmap=SALIENCY_CMAP, vmin=0, vmax=1)
    for ax, title in zip(axes[0], column_titles, strict=False):
        ax.set_title(title, fontsize=font, parse_math=parse_math)
    for i, (line, texts) in enumerate(zip(axes, captions, strict=False)):
        below = {"ha": "center", "va": "top", "fontsize": font, "in_layout": not printed or i == len(rows) - 1}
        for ax, text in zip(line, texts, strict=False):
            ax.text(0.5, -0.04, text, transform=ax.transAxes, **below)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.text(-0.06, 0.5, title, transform=ax.transAxes, ha="right", va="center", rotation=90, fontsize=font)
    filled = (ax for line, row in zip(axes, rows, strict=True) for ax in line[: len(row)])
    for some, ax in zip(boxes, filled, strict=False):
        show_boxes(ax, some, lw=0.8 if printed else 1.5)
    return figure


def explanation_figure(image: Tensor, saliency: Tensor, masked: Tensor, titles: Sequence[str]) -> Figure:
    """One decision explained: image, overlay of the map and masked image side by side; three titles."""
    return image_grid([[image, overlay(image, saliency), masked]], column_titles=titles, size=3.2, parse_math=False)


def probability_bars(probs: Tensor, masked_probs: Tensor, class_names: Sequence[str], class_idx: int) -> Figure:
    """Probabilities for the photo and for the masked photo: the class explained, then those that matter most in either.

    Five classes at most. The figure is unknown to pyplot, so that a thread may draw it.

    Args:
        probs: (C,) in [0,1], of the photo.
        masked_probs: (C,) in [0,1], of the masked photo.
        class_names: C names.
        class_idx: the class explained.
    """
    class_names = as_names(class_names)  # a column of a table would be read by its index
    largest = torch.maximum(probs, masked_probs).topk(min(5, len(probs))).indices.tolist()
    shown = [class_idx, *(index for index in largest if index != class_idx)][: len(largest)]
    figure = Figure(figsize=(_WIDTH, 0.3 * len(shown) + 0.6))
    ax = figure.subplots()
    for shift, color, label, values in ((-0.2, "0.65", "photo", probs), (0.2, _BLUE, "masked photo", masked_probs)):
        percent = [100 * values[index].item() for index in shown]
        places = [place + shift for place in range(len(shown))]
        ax.barh(places, percent, height=0.38, color=color, label=label)
        for value, place in zip(percent, places, strict=True):
            ax.annotate(f"{value:.1f}", (value + 1.5, place), va="center")
    names = [textwrap.shorten(class_names[index], 24, placeholder=" …") for index in shown]
    ax.set_yticks(range(len(shown)), names, parse_math=False)
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.invert_yaxis()
    ax.set(xlim=(0, 115), xticks=range(0, 101, 25), xlabel="probability, %")
    _legend(figure, 2)
    return figure


def objective_curve(objective: Tensor, reference: float, step: int) -> Figure:
    """How the logit of the masked photo rose over the steps, beside that of the photo itself.

    The figure is unknown to pyplot, so that a thread may draw it.

    Args:
        objective: (T+1,), before the first step and after each.
        reference: the logit of the photo.
        step: the one to mark, in 0..T.
    """
    figure = Figure(figsize=(_WIDTH, 2.2))
    ax = figure.subplots()
    ax.plot(objective.tolist(), color=_BLUE, label="masked photo")
    ax.axhline(reference, color="0.4", ls="--", label="photo")
    ax.plot(step, objective[step].item(), "o", color=_RED, ms=5, label=f"step {step}")
    ax.set(xlabel="step", ylabel="logit of the class")
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    _legend(figure, 3)
    return figure


def gallery(
    photos: Tensor,
    names: Sequence[str],
    probs: Sequence[float],
    saliency: Mapping[str, Tensor],
    masked_probs: Mapping[str, Sequence[float]],
    boxes: Sequence[Tensor] = (),
    *,
    size: float | None = None,
) -> Figure:
    """Photos and, one row per method, their maps, with the probability of the class before (p) and after masking (o).

    Args:
        photos: (n,3,H,W) in [0,1].
        names: of the class of each photo.
        probs: p of each photo.
        saliency: method -> (n,1,H,W) in [0,1].
        masked_probs: method -> o of each photo.
        boxes: (k,4) of each photo, drawn over it.
        size: width and height of one picture in inches; None to print all of them in a column of 85 mm.

    Raises:
        ValueError: a method has not one map per photo.
    """
    for method, maps in saliency.items():
        if len(maps) != len(photos):
            raise ValueError(f"saliency: wanted {len(photos)} maps by {method}, got {len(maps)}")
    rows = [[overlay(x, S) for x, S in zip(photos, maps, strict=True)] for maps in saliency.values()]
    after = [[f"o = {o:.3f}" for o in masked_probs[method]] for method in saliency]
    return image_grid(
        [list(photos), *rows],
        column_titles=[textwrap.fill(name, 10) for name in names],
        row_titles=["photo", *(method_label(method).replace(" ", "\n") for method in saliency)],
        captions=[[f"p = {p:.3f}" for p in probs], *after],
        boxes=boxes,
        size=size or _WIDTH / len(photos),
        printed=size is None,
        parse_math=False,
    )


def overview(
    photo: Tensor,
    features: Tensor,
    weights: Tensor,
    saliency: Tensor,
    logits: Sequence[float],
    references: Mapping[str, float],
    name: str,
    start: float,
) -> Figure:
    """Opti-CAM in one picture: photo, feature maps, their weights, map, masked photo; the logit while they move.

    Args:
        photo: (3,H,W), with the map `saliency` (1,H,W).
        features: (n,h,w) non-negative, some of the feature maps, with their weights (n,) after the optimisation.
        logits: (T+1,) of the masked photo.
        references: label -> another logit of the class, drawn as a level line.
        name: of the class.
        start: what all weights were before the first step.
    """
    figure = plt.figure(figsize=(_WIDTH, 2.4))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.5)).flat
    axes, curve = above.subplots(1, 5), below.subplots()
    axes[0].imshow(to_picture(photo))
    axes[1].imshow(_tiles(features))
    axes[2].bar(range(len(weights)), 100 * weights.numpy(), color=method_color("opti_cam"))
    axes[2].axhline(100 * start, color="0.3", ls="--", lw=0.7)
    axes[3].imshow(overlay(photo, saliency))
    axes[4].imshow(to_picture(photo * saliency))
    symbols = "$x$", "$A_k$", "$w_k$, %", "$S$", "$x \\odot S$"
    kinds = "photo", "feature maps", "weights", "map", "masked photo"
    for ax, symbol, kind in zip(axes, symbols, kinds, strict=True):
        ax.set_title(symbol)
        ax.set_xlabel(kind, fontsize=7)
        ax.set(xticks=[], box_aspect=1)
        if ax is not axes[2]:
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
    last = len(logits) - 1
    curve.plot(range(len(logits)), logits, lw=1.6, color=method_color("opti_cam"))
    levels = sorted((level, label) for label, level in {**references, "Opti-CAM": max(logits)}.items())
    gap, place = (max(levels)[0] - min(levels)[0]) / 8, -math.inf
    for level, label in levels:
        if label in references:
            curve.plot([0, last], [level, level], color="0.4", lw=0.7, ls="--")
        place = max(level, place + gap)  # labels keep their distance
        curve.text(1.02 * last, place, f"{label}: {level:.2f}", va="center")
    curve.set_xlabel("step of Adam", x=0.5 / 1.45)
    curve.set_ylabel(f"logit of\n{name}", parse_math=False)
    curve.set(xlim=(0, 1.45 * last), xticks=[0, last // 2, last])
    curve.spines["bottom"].set_bounds(0, last)
    return figure


def _tiles(maps: Tensor) -> np.ndarray:
    """Maps (n,h,w) side by side in a square, each on a scale from 0 to its maximum, as a picture."""
    side = math.isqrt(len(maps) - 1) + 1
    height, width = (length + 1 for length in maps.shape[1:])
    picture = np.ones((side * height - 1, side * width - 1, 3))
    for k, values in enumerate(maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-9)):
        row, column = k // side * height, k % side * width
        picture[row : row + height - 1, column : column + width - 1] = SALIENCY_CMAP(values.numpy())[..., :3]
    return picture


def _named(method: Any) -> dict[str, Any]:
    return {"color": method_color(str(method)), "label": method_label(str(method))}


def _mean_and_error(summary: "pd.DataFrame", column: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (2,n): the means, and how far the ends of their intervals lie below and above."""
    mean = summary[column].to_numpy()
    return mean, np.stack([mean - summary[f"{column}_low"], summary[f"{column}_high"] - mean]).clip(min=0)


def _legend(figure: Figure, columns: int) -> None:
    """What the panels show, in words, each once."""
    shown = dict(pair[::-1] for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns, frameon=False)


def metric_bars(summary: "pd.DataFrame", columns: Mapping[str, str], num_images: int) -> Figure:
    """Bars of means with their intervals, one panel per metric, one bar per method.

    Args:
        summary: from `summary.summarize`, in percent; ValueError where a mean is below 0 or above 100, or two methods
            have one label.
        columns: column -> title of its panel.
        num_images: over how many images, for the note below.
    """
    means = summary[[*columns]].to_numpy()
    if (means < 0).any() or (means > 100.001).any():
        raise ValueError("summary: wanted percentages from 0 to 100; for others see `metric_scatter`")
    names = [method_label(method) for method in summary.index]
    if len({*names}) < len(names):
        raise ValueError(f"summary: wanted methods of different labels, got {', '.join(names)}")
    size = (_WIDTH, 0.16 * len(summary) + 0.7)
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharex=True, sharey=True)
    colors = [method_color(method) for method in summary.index]
    for ax, (column, title) in zip(axes[0], columns.items(), strict=True):
        mean, error = _mean_and_error(summary, column)
        ax.barh(names, mean, xerr=error, color=colors, capsize=1.2, error_kw={"lw": 0.7})
        for position, (value, high) in enumerate(zip(mean, error[1], strict=True)):
            ax.annotate(f"{value:.1f}", (value + high + 5, position), va="center", fontsize=7)
        ax.set_title(title)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlim=(0, 160), xticks=(0, 100))
    figure.supxlabel(f"%, mean over {num_images} images, 95 % interval", fontsize=7.5)
    return figure


def metric_scatter(summary: "pd.DataFrame", x: str, y: str, labels: Mapping[str, str]) -> Figure:
    """One metric against another, one point per method, with the intervals of both.

    Where three methods or more share a place, an inset shows it larger, without intervals.

    Args:
        summary: from `summary.summarize`, with both columns.
        x: column across.
        y: column up.
        labels: column -> label of its axis.
    """
    figure, ax = plt.subplots(figsize=(_WIDTH, 2.6))
    points = summary[[x, y]].to_numpy()
    reach = (points.max(0) - points.min(0)) / 8
    close = [np.abs(points - point) <= reach for point in points]
    crowd = max((near.all(1) for near in close), key=np.sum)  # the most that share a place
    panels = [ax]
    if 3 <= crowd.sum() < len(points):
        share = (points - points.min(0)) / (points.max(0) - points.min(0))
        corners = [(left, low) for low in (0.59, 0.12) for left in (0.1, 0.6)]
        free = min(corners, key=lambda corner: (np.abs(share - corner - 0.2) < 0.3).all(1).sum())
        panels.append(ax.inset_axes((*free, 0.37, 0.37)))
    (_, across), (_, up) = (_mean_and_error(summary, column) for column in (x, y))
    for i, (marker, (method, row)) in enumerate(zip(itertools.cycle(_MARKERS), summary.iterrows(), strict=False)):
        color = method_color(str(method))
        ax.errorbar(row[x], row[y], up[:, [i]], across[:, [i]], fmt="none", elinewidth=0.7, color=color)
        for panel in panels:  # hollow: methods may share a place
            panel.plot(row[x], row[y], marker, ms=5, mfc="none", mew=1.1, **_named(method))
    ax.set(xlabel=labels[x], ylabel=labels[y])
    for panel in panels[1:]:
        (left, low), (right, high) = (end(points[crowd], axis=0) for end in (np.min, np.max))
        aside, above = 0.35 * (right - left), 0.35 * (high - low)
        panel.set(xlim=(left - aside, right + aside), ylim=(low - above, high + above))
        panel.spines[:].set(visible=True, edgecolor="0.5")
        panel.locator_params(nbins=3)
        ax.indicate_inset_zoom(panel, edgecolor="0.5", lw=0.5)
    _legend(figure, 3)
    return figure


def condition_panels(panels: Mapping[str, Mapping[str, "pd.DataFrame"]], column: str, label: str) -> Figure:
    """Means with their intervals: one panel per title, one above the other, in it a group of points per condition.

    Args:
        panels: title -> condition -> summary, from `summary.summarize`.
        column: of the summaries.
        label: of the axis up, which all panels share.
    """
    import pandas as pd

    size = (_WIDTH, 1.25 * len(panels) + 0.7)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharey=True)
    for ax, (title, conditions) in zip(axes[:, 0], panels.items(), strict=True):
        together = pd.concat(dict(conditions), names=["condition"])
        for i, (method, group) in enumerate(together.groupby("method", sort=False)):
            mean, error = _mean_and_error(group, column)
            count = together.index.get_level_values("method").nunique()
            order = [list(conditions).index(condition) for condition in group.index.get_level_values("condition")]
            places = np.array(order) + 0.6 * ((i + 0.5) / count - 0.5)
            ax.errorbar(places, mean, yerr=error, fmt="o", ms=3.5, capsize=1.5, lw=0.8, **_named(method))
        ax.set(title=title, xticks=range(len(conditions)), xlim=(-0.5, len(conditions) - 0.5), ylabel=label)
        ax.set_xticklabels(conditions)
    _legend(figure, 4)
    return figure


def metric_values(rows: "pd.DataFrame", metrics: Mapping[str, Metric]) -> Figure:
    """The value of each metric for every pair of p and o, as shades of gray, and where the images lie, by method.

    Args:
        rows: with the columns `method`, `prob` (p) and `masked_prob` (o), from `evaluate`.
        metrics: name -> function of p and o, one panel each.
    """
    centres = (torch.arange(200).double() + 0.5) / 200
    p, o = torch.meshgrid(centres, centres, indexing="xy")
    size = (_WIDTH, 3.4 / len(metrics) + 0.7)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, sharey=True)
    for ax, (metric_name, metric) in zip(axes[0], metrics.items(), strict=True):
        # not to black: the points have to stay visible
        ax.imshow(metric(p, o).numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="Greys", vmin=0, vmax=1.6)
        for marker, (method, group) in zip(itertools.cycle(_MARKERS), rows.groupby("method", sort=False), strict=False):
            points = {"s": 9, "lw": 0.3, "edgecolor": "w", "marker": marker}
            ax.scatter(group["prob"], group["masked_prob"], **points, **_named(method))
        ax.plot([0, 1], [0, 1], color="0.3", lw=0.6, ls="--")
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), xlabel="$p$, photo")
        ax.set_xticklabels(["0", "0.5", "1"])
        ax.set_title(headings([metric_name], unit=False)[metric_name])
    axes[0, 0].set_ylabel("$o$, masked photo")
    figure.supxlabel("shade: the value of the metric, from white for 0 to dark for 1", fontsize=7)
    _legend(figure, 4)
    return figure


def difference_dots(differences: "pd.DataFrame", columns: Mapping[str, str], *, linear: float | None = None) -> Figure:
    """Mean differences to a reference with their intervals, one panel per metric, one dot per variant, group by group.

    Filled where a difference is clear after Holm's correction for all of the table, see `summary.clear_after_holm`;
    hollow where it is not.

    Args:
        differences: index (group, variant); per column `column`, `column_low`, `column_high`, `column_p`, from
            `summary.summarize_differences`. NaN leaves the place empty.
        columns: column -> title of its panel.
        linear: for one axis of all panels, linear up to this value on both sides of 0 and logarithmic beyond; None for
            an axis of each.
    """
    from opticam.lab.summary import clear_after_holm  # here: SciPy's statistics take a second to load

    clear = clear_after_holm(differences)
    group_of, variants = (list(differences.index.get_level_values(level)) for level in (0, 1))
    groups = list(dict.fromkeys(group_of))
    if sorted(group_of, key=groups.index) != group_of:
        raise ValueError("differences: wanted the rows of a group together")
    places = [row + 1 + 1.3 * groups.index(group) for row, group in enumerate(group_of)]
    end = len(places) + 1.3 * len(groups)
    size = (_WIDTH, 0.14 * end + 0.7)
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharex=linear is not None, sharey=True)
    for ax, (column, title) in zip(axes[0], columns.items(), strict=True):
        ax.axvline(0, color="0.6", lw=0.7)
        if linear is None:
            ax.locator_params(axis="x", nbins=3 if len(columns) > 2 else 4)
        else:
            ax.margins(x=0.1)
            ax.set_xscale("symlog", linthresh=linear)
            ax.set_xticks(
                [-10 * linear, -linear, 0, linear], [f"\N{MINUS SIGN}{10 * linear:g}", "", "0", f"{linear:g}"]
            )
            ax.minorticks_off()
        values = differences[[column, f"{column}_low", f"{column}_high"]].to_numpy()
        for place, (mean, low, high), holds in zip(places, values, clear[column], strict=True):
            color = _BLUE if holds else "0.45"
            ax.plot([low, high], [place, place], color=color, lw=1)
            ax.plot(mean, place, "o", ms=3.5, color=color, mfc=color if holds else "w")
        ax.set_title(textwrap.fill(title, 12) if len(columns) > 2 else title)  # narrow panels
        ax.tick_params(axis="y", length=0)
        ax.patch.set_visible(False)  # the names of groups run on into it, and cover its line
    axes[0, 0].set_yticks(places, variants)
    axes[0, 0].set_zorder(1)
    for group in groups:
        place = places[group_of.index(group)] - 1
        over = {"transform": axes[0, 0].get_yaxis_transform(), "in_layout": False}
        over |= {"bbox": {"fc": "w", "ec": "none", "pad": 0.6}}
        axes[0, 0].text(0.02, place, group, **over, va="center", fontweight="bold", fontsize=7)
    axes[0, 0].set_ylim(end - 0.6, -0.8)
    key: dict[str, Any] = {"color": "w", "marker": "o", "ms": 4}
    filled = mpl.lines.Line2D([], [], **key, mfc=_BLUE, mec=_BLUE, label="clear after Holm's correction")
    hollow = mpl.lines.Line2D([], [], **key, mfc="w", mec="0.45", label="not clear")
    figure.legend(handles=[filled, hollow], loc="outside upper center", ncols=2, frameon=False)
    return figure


def similarity_curves(curves: "pd.DataFrame", columns: Mapping[str, str], orders: Mapping[str, str]) -> Figure:
    """How similar the maps of trained and randomised networks are, stage by stage, one curve per method.

    Bands: 95 % intervals, where `curves` has them. Each method has a marker too, so that curves differ by more than
    their colour.

    Args:
        curves: index (order, position, stage, method), means of each similarity, as from `summary.summarize`.
        columns: similarity -> label of its axis, one row of panels each.
        orders: order -> title, one column of panels each.
    """
    size = (_WIDTH, 1.6 * len(columns) + 0.8)
    figure, axes = plt.subplots(len(columns), len(orders), figsize=size, squeeze=False, sharex="col", sharey="row")
    methods = list(dict.fromkeys(curves.index.get_level_values("method")))
    for (i, column), (j, order) in itertools.product(enumerate(columns), enumerate(orders)):
        ax, panel = axes[i, j], curves.loc[order]
        ax.axhline(0, color="0.6", lw=0.7)
        stages = list(dict.fromkeys(panel.index.get_level_values("stage")))
        for marker, method in zip(itertools.cycle(_MARKERS), methods, strict=False):
            if method not in panel.index.get_level_values("method"):
                continue
            curve = panel.xs(method, level="method")
            places = np.array([stages.index(stage) for stage in curve.index.get_level_values("stage")])
            ax.plot(places, curve[column].to_numpy(), f"{marker}-", ms=3, lw=0.9, **_named(method))
            if f"{column}_low" in curve:
                low, high = curve[[f"{column}_low", f"{column}_high"]].to_numpy().T
                ax.fill_between(places, low, high, color=method_color(method), alpha=0.1, lw=0)
        tilt = {"rotation": 30, "ha": "right"} if len(stages) <= 4 else {"rotation": 90, "ha": "center"}
        ax.set_xticks(range(len(stages)), stages, **tilt)
        if i == 0:
            ax.set_title(orders[order], fontsize=7.5)
        if j == 0:
            ax.set_ylabel(columns[column])
    _legend(figure, 3)
    return figure


def interval_table(
    summary: "pd.DataFrame", columns: Mapping[str, str] | None = None, digits: int = 1
) -> "pd.DataFrame":
    """The summary as people read it: "mean [low, high]", one row per method; empty where there is no value.

    Of differences, a star marks those that are clear after Holm's correction for all of the summary, see
    `summary.clear_after_holm`.

    Args:
        summary: from `summary.summarize` or `summary.summarize_differences`.
        columns: column -> heading; None for all, with the headings of their records.
        digits: after the point.

    Returns:
        Index `method` by label, "group: variant" where there are two; one text column per heading.
    """
    import pandas as pd

    from opticam.lab.summary import clear_after_holm

    if columns is None:
        columns = headings([str(column) for column in summary if f"{column}_low" in summary])
    clear = clear_after_holm(summary)
    cells = {}
    for column, heading in columns.items():
        stars = ["*" if holds else "" for holds in clear.get(column, [False] * len(summary))]
        values = summary[[column, f"{column}_low", f"{column}_high"]].to_numpy()
        cells[heading] = [
            "" if np.isnan(mean) else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{star}"
            for (mean, low, high), star in zip(values, stars, strict=True)
        ]
    names = [": ".join(map(method_label, key if isinstance(key, tuple) else [key])) for key in summary.index]
    return pd.DataFrame(cells, index=pd.Index(names, name=summary.index.name))


def show_table(table: "pd.DataFrame", title: str = "", **options: Any) -> None:
    """Show a table in a notebook, below a title in Markdown. Rows that are only numbered are shown without numbers.

    The title is one paragraph, or empty for none. Options are those of `DataFrame.to_markdown`.
    """
    import pandas as pd
    from IPython.display import Markdown, display

    text = table.to_markdown(index=not isinstance(table.index, pd.RangeIndex), **options)
    display(Markdown(f"{title}\n\n{text}".strip()))


def latex_table(table: "pd.DataFrame") -> str:
    r"""The table of `interval_table` as a `tabular` for LaTeX with booktabs; intervals smaller than means."""
    text = str(table.to_markdown(tablefmt="latex_booktabs", disable_numparse=True))
    text = re.sub(r" (\[[^][]+, [^][]+\])", r" {\\scriptsize \1}", text)
    return text.replace("↓", r"$\downarrow$").replace("↑", r"$\uparrow$") + "\n"


def show_boxes(ax: Axes, boxes: Tensor, lw: float = 1.5) -> None:
    """Draw boxes (n,4), (xmin, ymin, xmax, ymax) in pixels, over the image on `ax`; what lies outside, at its edge."""
    height, width = ax.images[0].get_size()
    inside = torch.stack([boxes[:, 0::2].clamp(1, width - 2), boxes[:, 1::2].clamp(1, height - 2)], 2).flatten(1)
    for xmin, ymin, xmax, ymax in inside.tolist():
        place = (xmin, ymin), xmax - xmin, ymax - ymin
        ax.add_patch(mpl.patches.Rectangle(*place, fill=False, edgecolor="#00d0ff", lw=lw))


def save_figure(figure: Figure, path: str | Path, note: str = "") -> Path:
    """Write a figure as PNG, or as the suffix of `path` says, whole or not at all, without date or version inside.

    It has the size in inches that it was made with, and twice the dots of a notebook's. A PNG without pictures in it
    has a palette of 256 colours. Photos are a quarter as heavy with the suffix `.jpg`.

    Args:
        figure: what to write.
        path: where, and what is returned; folders are made.
        note: a line below the figure, such as what its bars are and over how many images.
    """
    if note:
        figure.supxlabel(note, fontsize=7.5)
    path = Path(path)
    kind = path.suffix.lstrip(".").lower() or "png"
    stamps = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "svg": {"Date": None, "Creator": None},
    }
    with replacing(path) as temporary:
        options: dict[str, Any] = {"metadata": stamps[kind]} if kind in stamps else {}
        if kind in ("jpg", "jpeg", "webp"):
            options["pil_kwargs"] = {"quality": 85}
        figure.savefig(temporary, format=kind, dpi=2 * figure.dpi, bbox_inches="tight", pad_inches=0.02, **options)
        if kind == "png" and not _has_pictures(figure):
            temporary.write_bytes(_with_palette(temporary.read_bytes()))
    return path
