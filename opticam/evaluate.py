"""Score saliency maps: batches x methods -> one row per image and method, and means with bootstrap intervals."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from opticam.datasets import Sample
from opticam.features import check_class_range, check_inputs, frozen
from opticam.metrics import METRICS, class_probability
from opticam.saliency import apply_mask, check_saliency

Method = Callable[..., Tensor]


def score(model: nn.Module, images: Tensor, class_idx: Tensor, saliency: Tensor) -> pd.DataFrame:
    """What masking by given maps does to the class: one row per image.

    Args:
        model: takes `images` and returns logits (B,C). Left as found.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64.
        saliency: (B,1,H,W) in [0,1], from anywhere.

    Returns:
        Columns `logit`, `masked_logit`, `prob` (p), `masked_prob` (o), and `average_drop`, `average_gain`,
        `average_increase` as fractions.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: wrong shape, device or range.
    """
    check_inputs(model, images, class_idx)
    check_saliency(images, saliency)
    with frozen(model), torch.no_grad():
        logits = model(images)
        check_class_range(class_idx, logits.shape[1])
        masked_logits = model(apply_mask(images, saliency))
    p, o = class_probability(logits, class_idx), class_probability(masked_logits, class_idx)
    columns = {
        "logit": logits.gather(1, class_idx[:, None])[:, 0],
        "masked_logit": masked_logits.gather(1, class_idx[:, None])[:, 0],
        "prob": p,
        "masked_prob": o,
        **{name: metric(p, o) for name, metric in METRICS.items()},
    }
    return pd.DataFrame({name: values.double().cpu().numpy() for name, values in columns.items()})


def evaluate(
    model: nn.Module,
    dataset: Dataset[Sample],
    methods: Mapping[str, Method],
    *,
    batch_size: int = 10,
    progress: bool = False,
) -> pd.DataFrame:
    """Explain the label of every image by every method, and score the maps.

    Args:
        model: takes images (B,3,H,W) in [0,1] and returns logits (B,C). Left as found.
        dataset: of `Sample`.
        methods: name -> `method(model, images, class_idx) -> saliency`.
        batch_size: images in flight; the result does not depend on it.
        progress: show a bar; the environment variable TQDM_DISABLE=1, which the runner sets, keeps it out of files.

    Returns:
        One row per image and method: `image`, `label`, `class_idx`, `method`, the columns of `score`, and `status`:
        "ok", or "degenerate" where the map is constant.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1 image, got {batch_size}")
    device = next(model.parameters()).device
    batches: Iterable = DataLoader(dataset, batch_size=batch_size, collate_fn=list)
    tables = []
    quiet = {} if progress else {"disable": True}
    with tqdm(total=len(dataset) * len(methods), unit="map", **quiet) as bar:  # type: ignore[arg-type]
        for samples in batches:
            images = torch.stack([sample.image for sample in samples]).to(device)
            class_idx = torch.tensor([sample.label for sample in samples], device=device)
            for name, method in methods.items():
                saliency = method(model, images, class_idx)
                table = score(model, images, class_idx, saliency)
                constant = (saliency.amax((1, 2, 3)) == saliency.amin((1, 2, 3))).cpu().numpy()
                table.insert(0, "image", [sample.name for sample in samples])
                table.insert(1, "label", class_idx.cpu().numpy())
                table.insert(2, "class_idx", class_idx.cpu().numpy())
                table.insert(3, "method", name)
                table["status"] = np.where(constant, "degenerate", "ok")
                tables.append(table)
                bar.update(len(samples))
    return pd.concat(tables, ignore_index=True)


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
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def summarize(rows: pd.DataFrame, columns: Mapping[str, float]) -> pd.DataFrame:
    """Means over images with 95 % bootstrap intervals, per method.

    Args:
        rows: from `evaluate`.
        columns: column -> factor to multiply with, 100 for a percentage.

    Returns:
        Index `method` in order of appearance; per column `column`, `column_low`, `column_high`.
    """
    summary = {}
    for method, group in rows.groupby("method", sort=False):
        cells: dict[str, float] = {}
        for column, factor in columns.items():
            values = group[column].to_numpy() * factor
            low, high = bootstrap_interval(values)
            cells |= {column: values.mean(), f"{column}_low": low, f"{column}_high": high}
        summary[method] = cells
    return pd.DataFrame.from_dict(summary, orient="index").rename_axis("method")
