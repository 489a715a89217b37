"""From rows to numbers: means, correlations and accuracies over images, with bootstrap intervals."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from scipy import stats

from opticam.metrics import max_box_accuracy


def bootstrap_interval(
    *values: np.ndarray,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over images, seeded.

    Args:
        values: one or more arrays (n,), resampled together, so that values of one image stay paired.
        statistic: from as many arrays as given, resampled along their last axis, to numbers.
        confidence: share of the interval.
        num_resamples: bootstrap samples.

    Returns:
        (low, high); for a single image both are the value itself.

    Raises:
        ValueError: no values.
    """
    if not values or len(values[0]) == 0:
        raise ValueError("values: wanted at least one image")
    if len(values[0]) == 1:
        only = float(statistic(*values, axis=-1))
        return only, only
    interval = stats.bootstrap(
        values,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=max(1, 2_000_000 // len(values[0])),  # resampled values in memory, whatever the number of images
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def summarize(rows: pd.DataFrame, columns: Mapping[str, float]) -> pd.DataFrame:
    """Means over images with 95 % bootstrap intervals, per method.

    Rows that were skipped do not count, nor values that are not defined, such as those that need a box.

    Args:
        rows: from `evaluate`, `results.read_shards` or `results.read_rows`.
        columns: column -> factor to multiply with, 100 for a percentage.

    Returns:
        Index `method` in order of appearance; per column `column`, `column_low`, `column_high`.
    """
    summary = {}
    if "status" in rows:
        rows = rows[rows["status"] != "skipped"]
    for method, group in rows.groupby("method", sort=False):
        cells: dict[str, float] = {}
        for column, factor in columns.items():
            values = group[column].dropna().to_numpy(float) * factor
            low, high = bootstrap_interval(values) if len(values) else (np.nan, np.nan)
            mean = values.mean() if len(values) else np.nan
            cells |= {column: mean, f"{column}_low": low, f"{column}_high": high}
        summary[method] = cells
    return pd.DataFrame.from_dict(summary, orient="index").rename_axis("method")


def summarize_differences(rows: pd.DataFrame, columns: Mapping[str, float], reference: str) -> pd.DataFrame:
    """Mean differences to one method, image by image, with 95 % bootstrap intervals, per other method.

    All methods see the same images, so what an image adds to both sides falls out. Images that lack one of the two
    values do not count.

    Args:
        rows: as `summarize`, with the column `image`; one row per image and method.
        columns: column -> factor to multiply with, 100 for a percentage.
        reference: the method to subtract.

    Returns:
        As `summarize`, without the reference: positive where the method has more of the column.

    Raises:
        ValueError: no row of the reference, or an image has two rows of the same method.
    """
    if reference not in set(rows["method"]):
        raise ValueError(f"reference: wanted one of {', '.join(rows['method'].unique())}, got {reference!r}")
    order = [method for method in rows["method"].unique() if method != reference]
    differences = {}
    for column in columns:
        wide = rows.pivot(index="image", columns="method", values=column)
        differences[column] = wide.sub(wide[reference], axis=0)[order].unstack()
    return summarize(pd.DataFrame(differences).reset_index(), columns)


def ratio_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """`mean(a) / mean(b)` along an axis, the share of b that is left in a: a statistic for `bootstrap_interval`.

    Args:
        a: (..., n).
        b: (..., n), of the same images, non-negative.
        axis: of the n values.

    Returns:
        (...), unbounded; 0 where the mean of b is 0 (**ours**: nothing to keep).
    """
    over, under = a.mean(axis), b.mean(axis)
    return over * (under > 0) / np.where(under > 0, under, 1)


def spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman rank correlation along an axis, ties sharing their mean rank: a statistic for `bootstrap_interval`.

    Args:
        a: (..., n).
        b: (..., n).
        axis: of the n values.

    Returns:
        (...) in [-1,1]; 0 where one side is constant (**ours**: no order, no agreement).
    """
    ranks = (stats.rankdata(values, axis=axis) for values in (a, b))
    x, y = (values - values.mean(axis, keepdims=True) for values in ranks)
    scale = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
    return (x * y).sum(axis) / np.where(scale > 0, scale, 1)


def box_accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """MaxBoxAcc and MaxBoxAccV2 over all images with a box, per method, from the column `box_hits`.

    Args:
        rows: of `evaluate` with the score "localization"; of several shards, all of them.

    Returns:
        Index `method` in order of appearance; columns `max_box_acc` and `max_box_acc_v2`, fractions, higher is better.

    Raises:
        ValueError: no image has a box.
    """
    with_box = rows[rows["pointing_game"].notna()]
    accuracies = {}
    for method, group in with_box.groupby("method", sort=False):
        hits = np.stack([np.unpackbits(np.frombuffer(bits, np.uint8)) for bits in group["box_hits"]])
        accuracies[method] = max_box_accuracy(torch.from_numpy(hits.sum(0).reshape(4, -1)), len(group))
    if not accuracies:
        raise ValueError("rows: wanted at least one image with a box")
    columns = ["max_box_acc", "max_box_acc_v2"]
    return pd.DataFrame.from_dict(accuracies, orient="index", columns=columns).rename_axis("method")
