"""Opti-CAM: the weights of the feature maps optimised for one image, so that the masked image has the largest logit.

Zhang, Torres, Sicre, Avrithis, Ayache, "Opti-CAM: Optimizing saliency maps for interpretability", CVIU 2024,
arXiv 2301.07002.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opticam.checks import check_class_range, check_inputs
from opticam.classifier import as_softmax, read, usable
from opticam.features import Layer, feature_maps, prepared
from opticam.folding import folded
from opticam.methods.ascent import Optimizer, Rows, Space, adam, maximise, weight_space
from opticam.saliency import apply_mask, baseline_of, min_max, upsample
from opticam.state import frozen

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


class OptiCAMResult(NamedTuple):
    """What `opti_cam` returns.

    Attributes:
        saliency: (B,1,H,W) in [0,1], the best map seen.
        weights: (B,K), of that map, softmax(u), non-negative, sum 1; of several layers one after the other, each sum 1.
        objective: (B,T+1), the objective before the first step and after each of the T; NaN once an image has stopped.
        num_steps: (B,) int64, the steps after which the kept map was reached: the position of the maximum.
    """

    saliency: Tensor
    weights: Tensor
    objective: Tensor
    num_steps: Tensor


def class_logit(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """The class logit of the masked image, `f(x * S)_c`: the objective of the paper, to be maximised.

    Args:
        masked_logits: (B,C), of the masked image.
        logits: (B,C), of the image; not used.
        class_idx: (B,) int64.

    Returns:
        (B,), unbounded; higher is better.
    """
    return masked_logits.gather(1, class_idx[:, None])[:, 0]


def logit_difference(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """Keep the logit: `-|f(x)_c - f(x * S)_c|`, an option of the ablation. Arguments as `class_logit`.

    Returns:
        (B,), at most 0; higher is better.
    """
    return -(class_logit(logits, logits, class_idx) - class_logit(masked_logits, logits, class_idx)).abs()


def logit_margin(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """Lead over the strongest other class, `f(x * S)_c - max_{j != c} f(x * S)_j`. Arguments as `class_logit`.

    Returns:
        (B,), positive where c wins; higher is better.
    """
    others = masked_logits.scatter(1, class_idx[:, None], -torch.inf).amax(1)
    return class_logit(masked_logits, logits, class_idx) - others


def probability(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`softmax(f(x * S))_c`: saturates near 1, its gradient vanishes; not the paper's. Arguments as `class_logit`.

    Returns:
        (B,), in [0,1]; higher is better.
    """
    return class_logit(masked_logits.softmax(1), logits, class_idx)


def log_probability(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`log softmax(f(x * S))_c`. Arguments as `class_logit`.

    Returns:
        (B,), at most 0; higher is better.
    """
    return class_logit(masked_logits.log_softmax(1), logits, class_idx)


OBJECTIVES: dict[str, Objective] = {
    "class_logit": class_logit,
    "logit_difference": logit_difference,
    "logit_margin": logit_margin,
    "probability": probability,
    "log_probability": log_probability,
}


def opti_cam(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer | Sequence[Layer] = None,
    objective: Objective = class_logit,
    normalize: Callable[[Tensor], Tensor] = min_max,
    baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
    space: Space = weight_space,
    optimizer: Optimizer = adam,
    num_steps: int = 100,
    lr: float = 0.1,
    u: Tensor | None = None,
    tol: float = 0.0,
    patience: int = 10,
    autocast: torch.dtype | None = None,
    batch_size: int | None = None,
) -> OptiCAMResult:
    """Saliency maps `S(u*)` whose masked image has the largest class logit.

    `S(u) = n(up(sum_k softmax(u)_k relu(A_k)))` and `u* = argmax_u f(x * S(u))_c`, by Adam from constant `u`. Several
    layers have a softmax each, and their upsampled sums are added before `n`.

    Two deviations from the published code: the objective is summed over the batch and not averaged, so an image's map
    does not depend on its neighbours; and the best map seen is kept, which for a rising objective is the last one. T
    steps take T+1 forward and T backward passes, and one more forward for the features.

    Args:
        model: takes `images` and returns logits (B,C). Left as found: mode, flags, gradients, hooks.
        images: (B,3,H,W) float in [0,1]; mean/std are the model's own business.
        class_idx: (B,) int64, the class to explain.
        layer: a module or its dotted name, or several; by default the model's own target layer.
        objective: from (masked_logits, logits, class_idx) to (B,), maximised image by image; see `OBJECTIVES`. Of a
            network with a sigmoid it gets what `classifier.as_softmax` makes of them.
        normalize: from upsampled maps (B,1,H,W) to saliency in [0,1]; see `NORMALIZATIONS`.
        baseline: what shows where the map is 0: a tensor that broadcasts to the images, or a function of the images, as
            in `BASELINES`; None for black, as published.
        space: where to climb, `weight_space` (the paper's u) or `map_space` (fewer steps). `**SCHEDULES["fast"]` sets
            this, `optimizer`, `num_steps` and `lr`.
        optimizer: from (point, lr, num_steps) to a torch optimiser that maximises and a scheduler of its learning rate
            or None; elementwise, or images would depend on each other.
        num_steps: T. The paper's experiments are reproduced with 100; the published demo runs 50.
        lr: learning rate.
        u: (B,K) start of the free variables; None for a constant, which means equal weights.
        tol: an image stops when its best objective grew by less than this share of its size in `patience` steps, and
            leaves the batch. 0 never stops, and needs no synchronisation with the device.
        patience: steps, see `tol`.
        autocast: reduced precision of the masked image's passes, such as `torch.bfloat16`; feature maps, weights and
            map stay float32.
        batch_size: images in flight; None for all at once. Where a device runs out of memory, the images in flight are
            halved until they fit, with one warning in the end.

    Returns:
        An `OptiCAMResult`; on the device of the images, without gradients; float32, or float64 for float64 images.

    Raises:
        TypeError: an argument is no tensor, of the wrong dtype, or no function where one is wanted.
        ValueError: wrong shape, device or range, unknown layer, negative `num_steps`, `lr` not above 0.
    """
    check_inputs(model, images, class_idx)
    for name, number, least in (("num_steps", num_steps, 0), ("patience", patience, 1), ("batch_size", batch_size, 1)):
        if number is not None and not (isinstance(number, int) and number >= least):
            raise ValueError(f"{name}: wanted a whole number of at least {least}, got {number!r}")
    functions = {"objective": objective, "normalize": normalize, "optimizer": optimizer}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name}: wanted a function, such as OBJECTIVES['class_logit'], got {function!r}")
    shown = None if callable(baseline) else baseline_of(images, baseline)
    if not 0 < lr < torch.inf:
        raise ValueError(f"lr: wanted a positive number, got {lr}")
    if not tol >= 0:
        raise ValueError(f"tol: wanted at least 0, got {tol}")

    def explain(part: slice) -> OptiCAMResult:
        x = prepared(model, images[part])
        c = usable(class_idx[part])
        dtype = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse for the weights
        reduced = partial(torch.autocast, x.device.type, autocast, enabled=autocast is not None)
        features, y = feature_maps(model, x, layer)
        check_class_range(c, y.shape[1])
        network = folded(model, x, y)
        features = tuple(maps.to(dtype).relu() for maps in features)
        width = sum(maps.shape[1] for maps in features)
        b = baseline_of(x, baseline) if callable(baseline) else None if shown is None else shown[part]

        def saliency(point: Tensor, features: Sequence[Tensor]) -> Tensor:
            sums = [upsample(maps, x.shape[-2:]) for maps in space.sums(point, features)]
            return normalize(sum(sums[1:], sums[0]))

        def problem(rows: Rows) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
            x_r, y_r, c_r, b_r = x[rows], y[rows].to(dtype), c[rows], None if b is None else b[rows]
            x_r = prepared(model, x_r)
            features_r = [maps[rows] for maps in features]

            def value(point: Tensor) -> Tensor:
                masked = apply_mask(x_r, saliency(point, features_r), b_r)
                with reduced():
                    masked_logits, head = read(network, masked)
                return objective(as_softmax(masked_logits.to(dtype), c_r, head)[0], *as_softmax(y_r, c_r, head))

            return value, lambda point: space.settle(point, features_r)

        start = torch.zeros(len(x), width) if u is None else usable(u[part]).detach()
        if start.shape != (len(x), width):
            raise ValueError(f"u: wanted shape ({len(images)},{width}), got {tuple(start.shape)} for {len(x)} images")
        start = space.start(start.to(x.device, dtype), features)
        best, history = maximise(
            problem, start, lambda point: optimizer(point, lr, num_steps), num_steps, tol, patience
        )
        with torch.no_grad():
            steps = history.nan_to_num(-torch.inf).argmax(1)
            return OptiCAMResult(saliency(best, features), space.weights(best, features), history, steps)

    with frozen(model):
        asked = in_flight = min(batch_size or len(images), len(images))
        parts, first = [], 0
        while first < len(images):
            try:
                parts.append(explain(slice(first, first + in_flight)))
                first += in_flight
            except torch.OutOfMemoryError:
                if in_flight == 1:
                    raise
                in_flight = (min(in_flight, len(images) - first) + 1) // 2
    if in_flight < asked:
        warnings.warn(f"out of memory with {asked} images in flight: went on with {in_flight}", stacklevel=2)
    return OptiCAMResult(*map(torch.cat, zip(*parts, strict=True)))
