"""Pictures: overlays, grids of images, bars with intervals; one style for all figures; save_figure."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]

_COLORS = sns.color_palette("colorblind")
_PALE = sns.color_palette("pastel")
METHOD_LABELS = {
    "fake_cam": "Fake-CAM",
    "equal_weights": "Equal weights",  # Opti-CAM before its first step
    "grad_cam": "Grad-CAM",
    "grad_cam_plus_plus": "Grad-CAM++",
    "x_grad_cam": "XGrad-CAM",
    "hires_cam": "HiRes-CAM",
    "layer_cam": "Layer-CAM",
    "ablation_cam": "Ablation-CAM",
    "score_cam": "Score-CAM",
    "rise": "RISE",
    "extremal_perturbation": "Extremal perturbation",
    "raw_attention": "Raw attention",
    "attention_rollout": "Attention rollout",
    "gradient_rollout": "Gradient rollout",
    "opti_cam": "Opti-CAM",
}
METHOD_COLORS = {
    "fake_cam": _COLORS[2],
    "equal_weights": _COLORS[8],
    "grad_cam": _COLORS[0],
    "grad_cam_plus_plus": _COLORS[9],
    "x_grad_cam": _PALE[0],
    "hires_cam": _PALE[9],
    "layer_cam": _COLORS[4],
    "ablation_cam": _COLORS[1],
    "score_cam": _COLORS[5],
    "rise": _COLORS[6],
    "extremal_perturbation": _PALE[4],
    "raw_attention": _PALE[2],
    "attention_rollout": _PALE[1],
    "gradient_rollout": _PALE[6],
    "opti_cam": _COLORS[3],
}
METRIC_LABELS = {"average_drop": "AD ↓", "average_gain": "AG ↑", "average_increase": "AI ↑"}
# the pale end is cut off: over a gray photo it would look weaker than what surrounds it
SALIENCY_CMAP = mpl.colors.ListedColormap(mpl.colormaps["inferno"](np.linspace(0, 0.85, 256)), "saliency")


def use_style() -> None:
    """The one style of all figures: colour-blind safe, readable at half width, deterministic files."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    mpl.rcParams |= {
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "opticam",
    }


def to_picture(image: Tensor) -> np.ndarray:
    """An image (3,H,W) or map (1,H,W) in [0,1] as matplotlib wants it: (H,W,3) or (H,W), float."""
    array = image.detach().cpu().float().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array.clip(0, 1)


def overlay(image: Tensor, saliency: Tensor, alpha: float = 0.55) -> np.ndarray:
    """The map in colour over the image in gray.

    Args:
        image: (3,H,W) in [0,1].
        saliency: (1,H,W) in [0,1].
        alpha: weight of the map.

    Returns:
        (H,W,3) float in [0,1].
    """
    colored = SALIENCY_CMAP(to_picture(saliency))[..., :3]
    gray = to_picture(image) @ np.array([0.299, 0.587, 0.114])
    return alpha * colored + (1 - alpha) * gray[..., None]


def image_grid(
    rows: Sequence[Sequence[np.ndarray | Tensor]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    size: float = 2.0,
) -> Figure:
    """Images in rows and columns.

    Args:
        rows: pictures (H,W,3) or (H,W), or tensors (3,H,W) or (1,H,W), in [0,1]; maps are shown in colour.
        column_titles: above the first row.
        row_titles: left of each row.
        captions: below each picture.
        size: width and height of one picture in inches.

    Returns:
        The figure, not shown.
    """
    columns = max(len(row) for row in rows)
    extra = 0.25 if captions else 0.0
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns, (size + extra) * len(rows)), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            ax = axes[i, j]
            array = to_picture(picture) if isinstance(picture, Tensor) else picture
            ax.imshow(array, cmap=SALIENCY_CMAP, vmin=0, vmax=1)
            if captions:
                ax.text(0.5, -0.04, captions[i][j], transform=ax.transAxes, ha="center", va="top", fontsize=9)
            if i == 0 and j < len(column_titles):
                ax.set_title(column_titles[j], fontsize=11)
            if j == 0 and i < len(row_titles):
                ax.text(
                    -0.06, 0.5, row_titles[i], transform=ax.transAxes, ha="right", va="center", rotation=90, fontsize=10
                )
    return figure


def explanation_figure(image: Tensor, saliency: Tensor, masked: Tensor, titles: Sequence[str]) -> Figure:
    """One decision explained: image, overlay and masked image side by side.

    Args:
        image: (3,H,W) in [0,1].
        saliency: (1,H,W) in [0,1].
        masked: (3,H,W) in [0,1].
        titles: three.

    Returns:
        The figure, not shown.
    """
    return image_grid([[image, overlay(image, saliency), masked]], column_titles=titles, size=3.2)


def metric_bars(summary: pd.DataFrame, columns: Mapping[str, str], num_images: int) -> Figure:
    """Bars of means with their intervals, one panel a metric, one bar a method.

    Args:
        summary: from `summary.summarize`, in percent.
        columns: column -> title of its panel.
        num_images: over how many images, for the note below.

    Returns:
        The figure, not shown.
    """
    size = (3.2 * len(columns) + 1, 0.36 * len(summary) + 1.2)
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharex=True, sharey=True)
    names = [METHOD_LABELS.get(method, method) for method in summary.index]
    colors = [METHOD_COLORS.get(method, _COLORS[7]) for method in summary.index]
    for ax, (column, title) in zip(axes[0], columns.items(), strict=True):
        mean = summary[column].to_numpy()
        error = np.stack([mean - summary[f"{column}_low"], summary[f"{column}_high"] - mean]).clip(min=0)
        ax.barh(names, mean, xerr=error, color=colors, capsize=3, error_kw={"lw": 1.2})
        for position, (value, high) in enumerate(zip(mean, error[1], strict=True)):
            ax.annotate(f"{value:.1f}", (value + high + 3, position), va="center", fontsize=9)
        ax.set_title(title)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlim=(0, 122), xticks=range(0, 101, 25))
    figure.supxlabel(f"%, mean and 95 % bootstrap interval over {num_images} images", fontsize=10)
    return figure


def metric_scatter(summary: pd.DataFrame, x: str, y: str, labels: Mapping[str, str]) -> Figure:
    """One metric against another, one point a method, with the intervals of both.

    Args:
        summary: from `summary.summarize`, with both columns.
        x: column across.
        y: column up.
        labels: column -> label of its axis.

    Returns:
        The figure, not shown.
    """
    figure, ax = plt.subplots(figsize=(6.4, 4.6))
    for name, row in summary.iterrows():
        method = str(name)
        errors = [[[row[c] - row[f"{c}_low"]], [row[f"{c}_high"] - row[c]]] for c in (x, y)]
        style = {"color": METHOD_COLORS.get(method, _COLORS[7]), "label": METHOD_LABELS.get(method, method)}
        ax.errorbar(row[x], row[y], xerr=errors[0], yerr=errors[1], fmt="o", ms=8, capsize=3, lw=1.2, **style)
    ax.set(xlabel=labels[x], ylabel=labels[y])
    figure.legend(loc="outside right center", frameon=False)
    return figure


def condition_panels(panels: Mapping[str, Mapping[str, pd.DataFrame]], column: str, label: str) -> Figure:
    """Means with their intervals under several conditions: one panel a title, in it one group of points a condition.

    Args:
        panels: title -> condition -> summary, from `summary.summarize`, each with the same methods.
        column: of the summaries.
        label: of the axis up, which all panels share.

    Returns:
        The figure, not shown.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.6), squeeze=False, sharey=True)
    for ax, (title, conditions) in zip(axes[0], panels.items(), strict=True):
        together = pd.concat(dict(conditions), names=["condition"])
        for i, (method, group) in enumerate(together.groupby("method", sort=False)):
            name = str(method)
            mean = group[column].to_numpy()
            error = np.stack([mean - group[f"{column}_low"], group[f"{column}_high"] - mean]).clip(min=0)
            count = together.index.get_level_values("method").nunique()
            places = np.arange(len(mean)) + 0.6 * ((i + 0.5) / count - 0.5)
            style = {"color": METHOD_COLORS.get(name, _COLORS[7]), "label": METHOD_LABELS.get(name, name)}
            ax.errorbar(places, mean, yerr=error, fmt="o", ms=6, capsize=2.5, lw=1.2, **style)
        ax.set(title=title, xticks=range(len(conditions)), xlim=(-0.5, len(conditions) - 0.5))
        ax.set_xticklabels(conditions, fontsize=10)
    axes[0, 0].set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def metric_values(rows: pd.DataFrame, metrics: Mapping[str, Metric]) -> Figure:
    """What each metric gives for every pair of p and o, as shades of gray, and where the images lie, by method.

    Args:
        rows: with the columns `method`, `prob` (p) and `masked_prob` (o), from `evaluate`.
        metrics: name -> function of p and o, one panel each.

    Returns:
        The figure, not shown.
    """
    centres = (torch.arange(200).double() + 0.5) / 200
    p, o = torch.meshgrid(centres, centres, indexing="xy")
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.7 * len(metrics), 3.9), squeeze=False, sharey=True)
    for ax, (metric_name, metric) in zip(axes[0], metrics.items(), strict=True):
        # not to black: the points have to stay visible
        ax.imshow(metric(p, o).numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="Greys", vmin=0, vmax=1.6)
        for method, group in rows.groupby("method", sort=False):
            name = str(method)
            style = {"color": METHOD_COLORS.get(name, _COLORS[7]), "label": METHOD_LABELS.get(name, name)}
            ax.scatter(group["prob"], group["masked_prob"], s=32, lw=0.5, edgecolor="w", **style)
        ax.plot([0, 1], [0, 1], color="0.3", lw=0.8, ls="--")
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="$p$, probability for the image")
        ax.set_title(f"{METRIC_LABELS.get(metric_name, metric_name)} (white 0, dark 1)")
    axes[0, 0].set_ylabel("$o$, for the masked image")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def interval_table(summary: pd.DataFrame, columns: Mapping[str, str], digits: int = 1) -> pd.DataFrame:
    """The summary as people read it: "mean [low, high]", one row a method.

    Args:
        summary: from `summary.summarize`.
        columns: column -> heading.
        digits: after the point.

    Returns:
        Index `method` by label, one text column a heading.
    """
    cells = {
        heading: [
            f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for mean, low, high in summary[[column, f"{column}_low", f"{column}_high"]].itertuples(index=False)
        ]
        for column, heading in columns.items()
    }
    return pd.DataFrame(cells, index=summary.index.map(lambda name: METHOD_LABELS.get(name, name)))


def show_boxes(ax: Axes, boxes: Tensor, color: str = "#00d0ff") -> None:
    """Draw boxes (n,4), (xmin, ymin, xmax, ymax) in pixels, over the image on `ax`; what lies outside, at its edge."""
    height, width = ax.images[0].get_size()
    inside = torch.stack([boxes[:, 0::2].clamp(1, width - 2), boxes[:, 1::2].clamp(1, height - 2)], 2).flatten(1)
    for xmin, ymin, xmax, ymax in inside.tolist():
        ax.add_patch(mpl.patches.Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, edgecolor=color, lw=1.5))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, or as the suffix of `path` says, whole or not at all, without date or version inside.

    Args:
        figure: what to write.
        path: where; folders are made.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    kind = path.suffix.lstrip(".") or "png"
    stamps = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    try:
        figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=stamps.get(kind))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
