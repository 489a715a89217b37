"""Score saliency maps: batches x methods x metrics -> one row per image and method, in memory or streamed to disk."""

import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm import tqdm

from opticam import metrics
from opticam.checks import as_names, check_class_range, check_inputs, check_network, check_tensors, check_whole, examine
from opticam.classifier import Output, as_classifier, as_output, class_logit, probs_of_class, read, weights_of
from opticam.features import Layer, count_passes, layer_name, prepared
from opticam.lab.datasets import Photos, Sample, Skipped, letters, stack
from opticam.lab.files import library_versions
from opticam.lab.identity import digest_of, key_of
from opticam.lab.results import is_done, write_rows
from opticam.methods import method_label
from opticam.metrics import COLUMNS, probability_metrics
from opticam.saliency import apply_mask, baseline_of, check_saliency
from opticam.state import frozen, in_a_line

Method = Callable[..., Tensor]
Samples = Photos | Sequence[Sample | Skipped]


class BatchWithMaps(NamedTuple):
    """A batch and its maps: what the metrics beyond masking are computed from.

    Attributes:
        model: the classifier.
        images: (B,3,H,W).
        class_idx: (B,) int64.
        output: logits (B,C) of the images, and the head.
        boxes: (n,4) of each image.
        saliency: (B,1,H,W).
        method: that made the maps.
        scores: from `score`, one row per image.
    """

    model: nn.Module
    images: Tensor
    class_idx: Tensor
    output: Output
    boxes: Sequence[Tensor]
    saliency: Tensor
    method: Method
    scores: pd.DataFrame


def score(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    logits: Output | Tensor | None = None,
    *,
    baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
) -> pd.DataFrame:
    """What masking by given maps does to the class: one row per image.

    Args:
        model: takes `images`, see `classifier.read`. Left as found.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64.
        saliency: (B,1,H,W) in [0,1], from anywhere.
        logits: of the images, where they are known: what `model` returned or `classifier.read` gave. They are taken at
            your word, but for those that a network in training mode returned: these are computed again in eval mode.
        baseline: what shows where the map is 0: a tensor that broadcasts to the images, or a function of the images, as
            in `BASELINES`; None for black, as published.

    Returns:
        Columns `logit`, `masked_logit`, `prob` (p), `masked_prob` (o); `average_drop`, `average_gain`,
        `average_increase` and `gain_minus_drop` as fractions; and `log_odds`, see `metrics.log_odds_change`.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape, device or range.
    """
    check_inputs(model, images, class_idx)
    check_saliency(images, saliency)
    if any(module.training for module in model.modules()) and not isinstance(logits, Output):
        logits = None
    with frozen(model), torch.no_grad():
        x = prepared(model, images)
        if logits is None:
            y, head = examine(model, x)
        else:
            y, head = logits if isinstance(logits, Output) else as_output(model, logits, len(images))
        check_class_range(class_idx, y.shape[1])
        masked_y = read(model, apply_mask(x, saliency, baseline_of(x, baseline))).logits
    p, o = probs_of_class(y, class_idx, head), probs_of_class(masked_y, class_idx, head)
    columns = {
        "logit": class_logit(y, class_idx),
        "masked_logit": class_logit(masked_y, class_idx),
        "prob": p,
        "masked_prob": o,
        **{name: metric(p, o) for name, metric in probability_metrics().items()},
        "log_odds": metrics.log_odds_change(y, masked_y, class_idx, head),
    }
    return pd.DataFrame({name: values.detach().double().cpu().numpy() for name, values in columns.items()})


def in_order(name: str, values: Iterable[Any], number: int) -> list[Any]:
    """Values by their place, as a list: pandas would put those of a column where its index says.

    Raises:
        TypeError, ValueError: a text, or another number than wanted.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: wanted a list of {number}, got {in_a_line(values)}")
    values = list(values)
    if len(values) != number:
        raise ValueError(f"{name}: wanted {number}, got {len(values)}")
    return values


def score_maps(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Mapping[str, Tensor],
    names: Sequence[Any] | None = None,
) -> pd.DataFrame:
    """`score` of the maps of several methods: one row per method and image, with the columns `image` and `method`.

    Arguments and errors as `score`, but:

    Args:
        saliency: method -> (B,1,H,W) in [0,1].
        names: B of them, for the column `image`; None for 0 to B-1.
    """
    _check_maps(saliency)
    if not saliency:
        raise ValueError("saliency: wanted the maps of at least one method")
    check_inputs(model, images, class_idx)
    image = [*range(len(class_idx))] if names is None else in_order("names", names, len(class_idx))
    tables = []
    for method, S in saliency.items():
        tables.append(score(model, images, class_idx, S).assign(image=image, method=method))
    return pd.concat(tables, ignore_index=True)


def saliency_maps(
    model: nn.Module, images: Tensor, class_idx: Tensor, methods: Mapping[str, Method], batch_size: int = 20
) -> dict[str, Tensor]:
    """Maps (B,1,H,W) by each method, made of `batch_size` images at a time."""
    check_inputs(model, images, class_idx)
    _check_methods(methods)
    check_whole(1, batch_size=batch_size)
    batches = list(zip(images.split(int(batch_size)), class_idx.split(int(batch_size)), strict=True))
    return {
        name: torch.cat([_maps_of(name, method, model, x, c) for x, c in batches]) for name, method in methods.items()
    }


def _maps_of(name: str, method: Method, model: nn.Module, images: Tensor, class_idx: Tensor) -> Tensor:
    saliency = method(model, images, class_idx)
    wanted = (len(images), 1, *images.shape[-2:])
    if not isinstance(saliency, Tensor) or saliency.shape != wanted:
        got = tuple(saliency.shape) if isinstance(saliency, Tensor) else type(saliency).__name__
        raise ValueError(f"methods: {name} returned {got}; wanted a tensor {wanted}, as the functions in METHODS do")
    check_tensors(methods=saliency)
    return saliency.detach()


def floors(saliency: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps that know nothing of the photo that they mask: a score tells something where it is better than theirs.

    Args:
        saliency: method -> maps (B,1,H,W) of B photos, at least two.

    Returns:
        "one half everywhere" -> maps of 0.5; and for each method "METHOD of another photo" -> its maps moved on by one
        photo, whose values are as many and as large as those of the maps themselves.

    Raises:
        ValueError: no maps, or of a single photo.
    """
    _check_maps(saliency)
    for S in saliency.values():
        check_saliency(None, S)
    if not saliency or min(map(len, saliency.values())) < 2:
        raise ValueError("saliency: wanted the maps of at least one method, of at least two photos")
    moved = {f"{method_label(method)} of another photo": S.roll(1, 0) for method, S in saliency.items()}
    return {"one half everywhere": torch.full_like(next(iter(saliency.values())), 0.5), **moved}


def _curves(batch: BatchWithMaps) -> dict[str, Any]:
    in_flight = 8 if batch.images.device.type == "cpu" else 64  # what caches hold
    arguments = batch.model, batch.images, batch.class_idx, batch.saliency
    insertion, deletion = metrics.insertion_deletion(*arguments, batch_size=in_flight)
    return {"insertion": insertion[0], "deletion": deletion[0]}


def _adcc(batch: BatchWithMaps) -> dict[str, Any]:
    again = batch.method(batch.model, apply_mask(batch.images, batch.saliency), batch.class_idx).detach()
    drop = torch.tensor(batch.scores["average_drop"], device=again.device)
    return {
        "coherency": metrics.coherency(batch.saliency, again),
        "complexity": metrics.complexity(batch.saliency),
        "adcc": metrics.adcc(batch.saliency, again, drop),
    }


def _localization(batch: BatchWithMaps) -> dict[str, Any]:
    logits, head = batch.output
    right = logits.argmax(1) == batch.class_idx if head == "softmax" else class_logit(logits, batch.class_idx) > 0
    correct = right.cpu()
    saliency, boxes = batch.saliency.cpu(), batch.boxes
    hits = metrics.box_hits(saliency, boxes)
    return {
        "localization_error": metrics.localization_error(saliency, boxes),
        "official_metric": metrics.official_metric(saliency, boxes, correct),
        "soft_f1": metrics.soft_f1(saliency, boxes),
        "saliency_metric": metrics.saliency_metric(batch.model, batch.images, batch.class_idx, batch.saliency),
        "pointing_game": metrics.pointing_game(saliency, boxes),
        "energy_pointing_game": metrics.energy_pointing_game(saliency, boxes),
        "box_hits": [np.packbits(hit.numpy()).tobytes() for hit in hits],
    }


def _box_experiment(batch: BatchWithMaps) -> dict[str, Any]:
    masks = metrics.box_experiment_masks(batch.saliency, batch.boxes)
    with_box = np.array([len(boxes) > 0 for boxes in batch.boxes])
    columns = {}
    for name, mask in masks.items():
        if name != "S":
            table = score(batch.model, batch.images, batch.class_idx, mask, batch.output)
            columns[f"masked_prob[{name}]"] = table["masked_prob"].where(with_box)
    return columns


def _saliency(batch: BatchWithMaps) -> dict[str, Any]:
    return {"saliency": [maps.mul(255).round().byte().cpu().numpy().tobytes() for maps in batch.saliency]}


def stored_saliency(rows: pd.DataFrame, size: tuple[int, int]) -> Tensor:
    """The maps that the score "saliency" put into the rows, with 8 bits a pixel: rounded by at most 1/510.

    Args:
        rows: n of them, from `evaluate` or `results.read_shards`.
        size: (H,W) of the images.

    Returns:
        (n,1,H,W) float32 in [0,1].

    Raises:
        ValueError: a row without a map, or of another size.
    """
    if not isinstance(rows, pd.DataFrame) or not {"image", "saliency"} <= set(rows.columns):
        raise ValueError("rows: wanted a table with the columns image and saliency, as the score 'saliency' makes it")
    if not len(rows):
        raise ValueError("rows: wanted at least one map")
    for name, data in zip(rows["image"], rows["saliency"], strict=True):
        if not isinstance(data, bytes) or len(data) != math.prod(size):
            raise ValueError(f"rows: wanted a map of {size[0]}x{size[1]} for every image; {name} has none")
    stacked = np.stack([np.frombuffer(data, np.uint8).reshape(1, *size) for data in rows["saliency"]])
    return torch.from_numpy(stacked).float() / 255


COLUMN_GROUPS: dict[str, Callable[[BatchWithMaps], dict[str, Any]]] = {
    "curves": _curves,
    "adcc": _adcc,
    "localization": _localization,
    "box_experiment": _box_experiment,
    "saliency": _saliency,
}


def _score_columns(kind: str, batch: BatchWithMaps) -> dict[str, Any]:
    if kind in COLUMN_GROUPS:
        return COLUMN_GROUPS[kind](batch)
    metric = COLUMNS[kind]
    values = metric(*(getattr(batch, need) for need in metric.needs))
    return {kind: values[0] if isinstance(values, tuple) else values}  # of a curve, its area


def evaluate(
    model: nn.Module,
    dataset: Samples,
    methods: Mapping[str, Method],
    *,
    scores: Sequence[str] = (),
    batch_size: int = 10,
    num_workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Explain the label of every image by every method, and score the maps.

    Args:
        model: takes images (B,3,H,W) in [0,1], see `classifier.read`. Left as found.
        dataset: of `Sample`.
        methods: name -> `method(model, images, class_idx) -> saliency`.
        scores: what to compute beside the columns of `score`: names in `COLUMN_GROUPS`, or of other metrics in
            `metrics.COLUMNS`.
        batch_size: images in flight, halved with a warning where a device runs out of memory; in exact arithmetic
            the result does not depend on it.
        num_workers: processes that decode images ahead; None for none on a CPU, which is busy, and 8 beside a GPU.
        progress: show a bar with rate and time left; in a notebook that the runner executes it goes to the terminal.

    Returns:
        One row per image and method. `image`; `label`; `class_idx` explained and `class_from`, here always "label";
        `predicted` class; `method`; `layer`; the columns of `score` and of `scores`; `seconds`, `forward_passes` and
        `backward_passes` of the whole network, per image; and `status`: "ok", "degenerate" where the map is constant,
        or "skipped" with a `reason`: an image that cannot be read, a label that the network does not have, logits or a
        map that are not finite.

    Raises:
        ValueError: nothing to do; a number that is not positive; unknown `scores`; a dataset whose labels are not the
            classes of the model in their order, or whose items are no `Sample`; a method that returns no such maps.
    """
    dataset = _of_subset(dataset)
    _check_work(model, dataset, methods, scores)
    batches = _batches(range(len(dataset)), batch_size)
    with _bar(len(dataset) * len(methods), progress) as bar:
        tables = list(
            _tables(_Work(model, methods, scores, bar, len(_classes_of(dataset))), dataset, batches, num_workers)
        )
    return pd.concat(tables, ignore_index=True)


def stream(
    folder: str | Path,
    model: nn.Module,
    dataset: Photos,
    methods: Mapping[str, Method],
    *,
    parameters: Mapping[str, Any],
    keys: Mapping[str, str] | None = None,
    scores: Sequence[str] = (),
    batch_size: int = 10,
    shard_size: int = 40,
    num_workers: int | None = None,
    progress: bool = False,
) -> Path:
    """As `evaluate`, but to Parquet files of some images each: memory does not grow, and nothing is lost.

    Interrupted in whatever way and started again, it resumes after the last whole file, and ends with the rows of an
    undisturbed run. Runs with other parameters, images, methods, layer, weights, device or versions of libraries have
    folders of their own inside `folder`; see `identity.key_of` for how methods and networks are recognised. A file
    counts as done if neither the code of this package nor an image of it nor its boxes have changed since.

        rows, provenance = results.read_shards(stream("rows", model, photos, METHODS, parameters={}))

    Arguments as `evaluate`, but:

    Args:
        folder: for a folder of this run, named by what it computes, with `00000.parquet`, `00001.parquet`, ...
        dataset: as `datasets.load_dataset` gives it.
        parameters: stored with the rows, under names that `stream` does not store itself; JSON.
        keys: for a method or metric of your own by its name, and for a network with code of your own by "model": a word
            that you change whenever that code changes.
        shard_size: images a file.

    Returns:
        The folder of this run, for `results.read_shards`.

    Raises:
        OSError: the folder cannot be written.
        ValueError: see `evaluate`; a method or network without a key that `identity.key_of` cannot recognise.
    """
    dataset = _of_subset(dataset)
    _check_work(model, dataset, methods, scores)
    if not hasattr(dataset, "records"):
        raise ValueError(f"dataset: wanted Photos, as load_dataset gives them, got {type(dataset).__name__}")
    check_whole(1, shard_size=shard_size, batch_size=batch_size)
    shard_size, batch_size = int(shard_size), int(batch_size)  # JSON holds no NumPy integers
    number, frame = math.ceil(len(dataset) / shard_size), (dataset.input_size, dataset.resize)
    keys = {} if keys is None else keys
    if not isinstance(keys, Mapping):
        raise TypeError(f"keys: wanted a dict of words by names, got {in_a_line(keys)}")
    for name, key in keys.items():
        if not (isinstance(key, str) and key and name in {"model", *methods, *probability_metrics(), *scores}):
            raise ValueError(
                f"keys: wanted a word for 'model' or for the name of a method or metric, got {name!r}: {key!r}"
            )

    def described(name: str, value: Any) -> Any:
        return key_of(value, model, name, keys.get(name, ""))

    computed = {
        "methods": {name: described(name, method) for name, method in methods.items()},
        "layer": _layer_name(model, None),
        "scores": [name if name in COLUMN_GROUPS else [name, described(name, COLUMNS[name])] for name in scores],
        "metrics": {name: described(name, metric) for name, metric in probability_metrics().items()},
        "batch_size": batch_size,
        "weights": described("model", model),
        "device": str(_device(model)),
        "libraries": library_versions(),
        "images": digest_of(frame, dataset.upright, dataset.window, *zip(dataset.names, dataset.labels, strict=True)),
        "shard_size": shard_size,
        "shards": number,
    }
    taken = [name for name in parameters if name in {*computed, "shard", "files"}]
    if taken:
        raise ValueError(f"parameters: {', '.join(taken)} are stored by stream itself; wanted other names")
    everything = {**parameters, **computed}
    try:
        key = json.dumps(everything, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"parameters: wanted what JSON can hold ({error})") from error
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder: cannot write in {str(folder.parent)!r} ({error})") from error
    ranges = [range(len(dataset))[k * shard_size : (k + 1) * shard_size] for k in range(number)]
    paths = [folder / f"{k:05d}.parquet" for k in range(number)]
    own = [{**everything, "shard": k, "files": _files(dataset, ranges[k])} for k in range(number)]
    missing = [k for k in range(number) if not is_done(paths[k], own[k])]
    batches = [_batches(ranges[k], batch_size) for k in missing]
    total, left = (sum(len(ranges[k]) for k in chosen) * len(methods) for chosen in (range(number), missing))
    with _bar(total, progress, total - left) as bar:
        work = _Work(model, methods, scores, bar, len(_classes_of(dataset)))
        tables = _tables(work, dataset, [*chain.from_iterable(batches)], num_workers)
        for k, some in zip(missing, batches, strict=True):
            rows = pd.concat([next(tables) for _ in some], ignore_index=True)
            write_rows(rows, paths[k], own[k], str(_device(model)))
    return folder


def _of_subset(dataset: Any) -> Any:
    """A part of `Photos` that torch made as `Photos`, which know their classes and skip what cannot be read."""
    if not isinstance(dataset, Subset):
        return dataset
    whole = _of_subset(dataset.dataset)
    if not isinstance(whole, Photos):
        return dataset
    return replace(whole, records=[whole.records[i] for i in dataset.indices])


def _check_work(model: nn.Module, dataset: Samples, methods: Mapping[str, Method], scores: Sequence[str]) -> None:
    check_network(model)
    if isinstance(dataset, ConcatDataset) and any(isinstance(part, Photos) for part in dataset.datasets):
        raise TypeError("dataset: wanted one data set at a time, as load_dataset gives it, got a ConcatDataset")
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        raise TypeError(f"dataset: wanted images, as load_dataset gives them, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError("dataset: wanted at least one image")
    _check_methods(methods)
    of_batch = set(BatchWithMaps._fields)  # a metric that needs more, such as a second map, is no score
    known = [*COLUMN_GROUPS, *(name for name, metric in COLUMNS.items() if set(metric.needs) <= of_batch)]
    if isinstance(scores, str) or not isinstance(scores, Sequence):  # a set has no order, a generator ends
        raise TypeError(f"scores: wanted a list of names, got {in_a_line(scores)}")
    for name in scores:
        if name not in known:
            raise ValueError(f"scores: wanted some of {', '.join(known)}, got {name!r}")
    classifier = as_classifier(model)
    names = [] if classifier is None else classifier.class_names
    others = _classes_of(dataset)
    if names and others and len(names) != len(others):
        raise ValueError(f"dataset: its labels are {len(others)} classes; wanted the {len(names)} of the model")
    mine, theirs = ([letters(name) for name in part] for part in (names, others))
    once = [name for name in theirs if mine.count(name) == theirs.count(name) == 1] if mine != theirs else []
    if any(mine.index(name) != theirs.index(name) for name in once):
        raise ValueError("dataset: its classes are in another order than the model's; wanted the same order")
    if len(others) == 2 and mine[:1] != theirs[:1] and _has_one_logit(model, dataset):
        raise ValueError(
            f"dataset: whether the network's one logit stands for {others[0]!r}, label 0, is not known; wanted "
            f"opticam.wrap(..., class_names={others}), and to_logits=torch.neg if it stands for {others[1]!r}"
        )


def _check_methods(methods: Mapping[str, Method]) -> None:
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods: wanted a dict of functions by their names, got {type(methods).__name__}")
    if not methods:
        raise ValueError("methods: wanted at least one")
    for name, method in methods.items():
        if not isinstance(name, str):
            raise TypeError(f"methods: wanted texts as names, got {in_a_line(name)}")
        if not callable(method):
            raise TypeError(
                f"methods: wanted functions, such as those in METHODS, got {in_a_line(method)} under {name!r}"
            )


def _check_maps(saliency: Mapping[str, Tensor]) -> None:
    if not isinstance(saliency, Mapping):
        raise TypeError(f"saliency: wanted a dict of maps by the names of methods, got {type(saliency).__name__}")


def _classes_of(dataset: Samples) -> list[str]:
    said = getattr(dataset, "class_names", None)
    return [] if said is None else as_names(said)


def _has_one_logit(model: nn.Module, dataset: Samples) -> bool:
    read_sample = getattr(dataset, "get", dataset.__getitem__)
    sample = next((one for one in map(read_sample, range(len(dataset))) if isinstance(one, Sample)), None)
    if sample is None:
        return False
    with frozen(model), torch.no_grad():
        logits, head = read(model, prepared(model, sample.image[None].to(_device(model), _dtype(model))))
    return head == "sigmoid" and torch.equal(logits[:, :1], -logits[:, 1:])


class _Work(NamedTuple):
    """What is done with every batch."""

    model: nn.Module
    methods: Mapping[str, Method]
    scores: Sequence[str]
    bar: tqdm
    num_named: int


def _tables(work: _Work, dataset: Samples, batches: list[list[int]], num_workers: int | None) -> Iterator[pd.DataFrame]:
    if num_workers is None:
        num_workers = 0 if _device(work.model).type == "cpu" else 8
    # a photo that cannot be read comes as `Skipped`, instead of ending the process that reads it
    read_all = partial(_read_all, getattr(dataset, "get", dataset.__getitem__))
    numbers: Any = range(len(dataset))
    for samples in DataLoader(numbers, batch_sampler=batches, collate_fn=read_all, num_workers=num_workers):
        for sample in samples:
            if not isinstance(sample, Sample | Skipped):
                raise ValueError(f"dataset: wanted items of type Sample, got {type(sample).__name__}")
            if isinstance(sample, Sample) and not isinstance(sample.image, Tensor):
                raise TypeError(f"dataset: wanted a tensor as image of a Sample, got {type(sample.image).__name__}")
        yield _rows(work, samples)


def _read_all(read_one: Callable[[int], Sample | Skipped], numbers: Sequence[int]) -> list[Sample | Skipped]:
    return [read_one(number) for number in numbers]


def _rows(work: _Work, samples: Sequence[Sample | Skipped]) -> pd.DataFrame:
    """The rows of a batch: images in their order, of each all methods."""
    before = work.bar.n
    try:
        return _rows_at_once(work, samples)
    except torch.OutOfMemoryError:
        if len(samples) == 1:
            raise
        work.bar.n = before
    half = (len(samples) + 1) // 2
    warnings.warn(f"out of memory: going on with {half} images in flight", stacklevel=2)
    return pd.concat([_rows(work, samples[:half]), _rows(work, samples[half:])], ignore_index=True)


def _rows_at_once(work: _Work, samples: Sequence[Sample | Skipped]) -> pd.DataFrame:
    model, device = work.model, _device(work.model)
    reasons = {i: sample.reason for i, sample in enumerate(samples) if isinstance(sample, Skipped)}
    batch = {i: sample for i, sample in enumerate(samples) if isinstance(sample, Sample)}
    for i in [i for i, sample in batch.items() if not sample.image.isfinite().all()]:
        reasons[i] = f"image: {batch.pop(i).name} has values that are not finite"
    if batch:
        images, class_idx = stack(list(batch.values()), device)
        images = images.to(_dtype(model))
        with frozen(model), torch.no_grad():
            logits, head = examine(model, prepared(model, images))
        if work.num_named not in (0, logits.shape[1]):
            told = f"dataset: its labels are {work.num_named} classes"
            raise ValueError(f"{told}; wanted the {logits.shape[1]} of the model")
        known = [0 <= sample.label < logits.shape[1] for sample in batch.values()]
        images, class_idx, output = images[known], class_idx[known], Output(logits[known], head)
        for i in [i for i, right in zip(batch, known, strict=True) if not right]:
            reasons[i] = f"label: wanted a class in 0..{logits.shape[1] - 1}, got {batch.pop(i).label}"
    tables = []
    for name in work.methods:
        work.bar.set_postfix_str(name)
        tables.append(pd.DataFrame({"reason": pd.Series(reasons, dtype=object)}).assign(status="skipped", method=name))
        if batch:
            boxes = [sample.boxes for sample in batch.values()]
            table = _scored(work, name, images, class_idx, boxes, output)
            tables.append(table.set_axis(list(batch)).assign(method=name))
        work.bar.update(len(samples))
    rows = pd.concat([table for table in tables if len(table)]).sort_index(kind="stable")
    rows["image"] = [samples[i].name for i in rows.index]
    rows["label"] = rows["class_idx"] = [samples[i].label for i in rows.index]
    rows["class_from"] = "label"
    columns = [*_FIRST, *(column for column in rows if column not in _FIRST + _LAST), *_LAST]
    return (
        rows.reindex(columns=columns)
        .reset_index(drop=True)
        .astype({"predicted": "Int64", "status": "str", "reason": "str"})
    )


_FIRST = ["image", "label", "class_idx", "class_from", "predicted", "method", "layer"]
_LAST = ["seconds", "forward_passes", "backward_passes", "status", "reason"]


def _scored(
    work: _Work, name: str, images: Tensor, class_idx: Tensor, boxes: Sequence[Tensor], output: Output
) -> pd.DataFrame:
    """One method on images that can be explained: scores, then what it cost and how it went."""
    model, method = work.model, work.methods[name]
    start = _now(images.device)
    with count_passes(model) as passes:
        saliency = _maps_of(name, method, model, images, class_idx)
    seconds = _now(images.device) - start
    finite = (saliency.isfinite().flatten(1).all(1) & output.logits.isfinite().all(1)).cpu().numpy()
    constant = (saliency.amax((1, 2, 3)) == saliency.amin((1, 2, 3))).cpu().numpy()
    saliency = saliency.nan_to_num(0, 0, 0)
    table = score(model, images, class_idx, saliency, output)
    table.insert(0, "predicted", output.logits.argmax(1).cpu().numpy())
    batch = BatchWithMaps(model, images, class_idx, output, boxes, saliency, method, table)
    for kind in work.scores:
        for column, values in _score_columns(kind, batch).items():
            table[column] = values.cpu().numpy() if isinstance(values, Tensor) else values
    table.loc[~finite, table.columns != "predicted"] = None
    return table.assign(
        layer=_layer_of(method, model),
        seconds=seconds / len(images),
        forward_passes=passes[0] / len(images),
        backward_passes=passes[1] / len(images),
        status=np.select([~finite, constant], ["skipped", "degenerate"], "ok"),
        reason=np.where(finite, "", "the network's logits or the map are not finite"),
    )


def _batches(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    check_whole(1, batch_size=batch_size)
    return [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]


@contextmanager
def _bar(total: int, progress: bool, initial: int = 0) -> Iterator[tqdm]:
    place = os.environ.get("OPTICAM_PROGRESS")  # of the runner: a bar in a saved notebook would stay where it stood
    where: dict[str, Any] = {} if progress else {"disable": True}
    with Path(place or os.devnull).open("w") as file:
        if progress and place:
            where = {"file": file, "disable": False, "leave": False}
        with tqdm(total=total, initial=initial, unit="map", **where) as bar:
            yield bar


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype | None:
    weights = weights_of(model)
    return None if weights is None else weights.dtype


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _layer_of(method: Method, model: nn.Module) -> str:
    """The layer that a method of this package takes; "" for a function of one's own, which does not tell."""
    options: dict[str, Any] = {}
    while isinstance(method, partial):
        options = method.keywords | options
        method = method.func
    ours = getattr(method, "__module__", "").partition(".")[0] == "opticam"
    return _layer_name(model, options.get("layer")) if ours else ""


def _layer_name(model: nn.Module, layer: Layer) -> str:
    classifier = as_classifier(model)
    layer = classifier.layer if layer is None and classifier is not None else layer
    return str((layer_name(model, layer) if isinstance(layer, nn.Module) else layer) or "")


def _files(dataset: Photos, indices: range) -> str:
    """Tells whether something behind the names of these photos has changed."""
    photos = [dataset.records[i] for i in indices]
    contents = []
    for photo in photos:
        try:
            with photo.path.open("rb") if photo.path.is_file() else io.BytesIO() as file:
                contents.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:  # a photo that cannot be read is skipped, and looked at again once it can be
            contents.append(f"errno {error.errno}")
    return digest_of(*contents, *(photo[1:] for photo in photos))
