"""Opti-CAM: the weights of the feature maps optimised for one image, so that the masked image has the largest logit.

Zhang, Torres, Sicre, Avrithis, Ayache, "Opti-CAM: Optimizing saliency maps for interpretability", CVIU 2024,
arXiv 2301.07002.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from opticam.checks import check_at_least, check_class_range, check_inputs, check_numbers, check_tensors, check_whole
from opticam.classifier import as_softmax, differentiate, for_autograd, log_odds, read
from opticam.features import Layer, as_layers, feature_maps, prepared
from opticam.folding import folded
from opticam.methods.ascent import Maps, Optimizer, Point, Progress, Space, adam, weight_space
from opticam.methods.record import Method
from opticam.saliency import apply_mask, baseline_of, check_saliency, min_max, upsample
from opticam.state import frozen, in_a_line

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
Baseline = Tensor | Callable[[Tensor], Tensor] | None


class OptiCAMResult(NamedTuple):
    """What `opti_cam` returns.

    Attributes:
        saliency: (B,1,H,W) in [0,1], the best map seen; NaN where the objective always was.
        weights: (B,K), of that map, softmax(u), non-negative, sum 1; of several layers one after the other, each sum 1.
        objective: (B,T+1), the objective before the first step and after each of the T; NaN once an image has stopped.
        num_steps: (B,) int64, the steps after which the kept map was reached: the position of the maximum.
    """

    saliency: Tensor
    weights: Tensor
    objective: Tensor
    num_steps: Tensor


class Step(NamedTuple):
    """What `on_step` is called with: the tensors of the loop, detached, of the n images still at work.

    Attributes:
        number: steps taken, 0 to T.
        rows: (n,) int64, which of the images these are.
        saliency: (n,1,H,W) in [0,1].
        objective: (n,), what is maximised.
        masked_logits: (n,C), over the first baseline, as the objective got them: see `classifier.as_softmax`.
        class_idx: (n,) int64, likewise.
    """

    number: int
    rows: Tensor
    saliency: Tensor
    objective: Tensor
    masked_logits: Tensor
    class_idx: Tensor


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
    """Keep the logit: `-|f(x)_c - f(x * S)_c|`, at most 0; an option of the ablation. All else as `class_logit`."""
    return -(class_logit(logits, logits, class_idx) - class_logit(masked_logits, logits, class_idx)).abs()


def logit_margin(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """Lead over the strongest other class, `f(x * S)_c - max_{j != c} f(x * S)_j`. All else as `class_logit`."""
    others = masked_logits.scatter(1, class_idx[:, None], -torch.inf).amax(1)
    return class_logit(masked_logits, logits, class_idx) - others


def probability(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`softmax(f(x * S))_c`: saturates near 1, where its gradient vanishes. Not the paper's. Else as `class_logit`."""
    return class_logit(masked_logits.softmax(1), logits, class_idx)


def log_probability(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`log softmax(f(x * S))_c`, at most 0. All else as `class_logit`."""
    return class_logit(masked_logits.log_softmax(1), logits, class_idx)


def odds_gain(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`log sigmoid(l(x * S) - l(x) - 1)`, l the log-odds of the class. **Ours.** Arguments as `class_logit`.

    A unit counts fully far below the image's own log-odds, a half at one above them, and less and less beyond;
    there a penalty decides the map.

    Returns:
        (B,), below 0; higher is better.
    """
    gain = log_odds(masked_logits, class_idx) - log_odds(logits, class_idx)
    return torch.nn.functional.logsigmoid(gain - 1)


OBJECTIVES: dict[str, Objective] = {
    "class_logit": class_logit,
    "logit_difference": logit_difference,
    "logit_margin": logit_margin,
    "probability": probability,
    "log_probability": log_probability,
    "odds_gain": odds_gain,
}


def squared_distance(saliency: Tensor, anchor: Tensor, beta: float = 15.0, low: float = 1.0) -> Tensor:
    """The penalty `beta mean((low + (1 - low) S_0) (S - S_0)^2)` of a map that leaves its anchor.

    Args:
        saliency: (B,1,H,W) S in [0,1].
        anchor: (B,1,H,W) S_0 in [0,1].
        beta: how much it counts, in the unit of the objective.
        low: how much more a place counts where the anchor is 0 than where it is 1.

    Returns:
        (B,), at least 0.
    """
    price = low + (1 - low) * anchor
    return beta * (price * (saliency - anchor).square()).mean((1, 2, 3))


def opti_cam(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer | Sequence[Layer] = None,
    objective: Objective = class_logit,
    normalize: Callable[[Tensor], Tensor] = min_max,
    baseline: Baseline | Sequence[Baseline] = None,
    complement: float = 0.0,
    anchor: Tensor | Callable[..., Tensor] | None = None,
    penalty: Callable[[Tensor, Tensor], Tensor] = squared_distance,
    space: Space = weight_space,
    optimizer: Optimizer = adam,
    num_steps: int = 100,
    lr: float = 0.1,
    u: Tensor | None = None,
    tol: float = 0.0,
    patience: int = 10,
    autocast: torch.dtype | None = None,
    batch_size: int | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> OptiCAMResult:
    """Saliency maps `S(u*)` whose masked image has the largest class logit.

    `S(u) = n(up(sum_k softmax(u)_k relu(A_k)))` and `u* = argmax_u f(x * S(u))_c`, by Adam from constant `u`. Several
    layers have a softmax each, and their upsampled sums are added before `n`.

    **Ours**, off by default: several views of one mask. With V baselines b, a complement and an anchor S_0 the sum is
    `F(u) = mean_b g(f(x * S + b * (1 - S)))_c - complement mean_b g(f(x * (1 - S) + b * S))_c - penalty(S, S_0)`, g the
    objective.

    Two deviations from the published code: the objective is summed over the batch and not averaged, so an image's map
    does not depend on its neighbours; and the best map seen is kept, which for a rising objective is the last one. See
    `num_passes` for the cost.

    Args:
        model: takes `images` and returns logits (B,C). Left as found: mode, flags, gradients, hooks.
        images: (B,3,H,W) float in [0,1]; mean/std are the model's own business.
        class_idx: (B,) int64, the class to explain.
        layer: a module or its dotted name, or several; by default the model's own target layer.
        objective: from (masked_logits, logits, class_idx) to (B,), maximised image by image; see `OBJECTIVES`. Of a
            network with a sigmoid it gets what `classifier.as_softmax` makes of them.
        normalize: from upsampled maps (B,1,H,W) to saliency in [0,1]; see `NORMALIZATIONS`.
        baseline: what shows where the map is 0: a tensor that broadcasts to the images, or a function of the images, as
            in `BASELINES`; None for black, as published. A list or tuple of these for several views of one mask.
        complement: how much the objective of what the map hides counts against it; 0 does not look at it.
        anchor: a map to stay near, (B,1,H,W) in [0,1], or a method that makes it, such as `grad_cam`; that is called
            with `layer`, of several layers the last. None for none.
        penalty: from (S, S_0), each (B,1,H,W), to (B,), subtracted; only with an anchor.
        space: where to climb, `weight_space` (the paper's u) or `map_space` (fewer steps). `**SCHEDULES["fast"]` sets
            this, `optimizer`, `num_steps` and `lr`.
        optimizer: from (point, lr, num_steps) to a torch optimiser that maximises and a scheduler of its learning rate
            or None; elementwise, or images would depend on each other.
        num_steps: T. The paper's experiments take 100; the published demo takes 50.
        lr: learning rate.
        u: (B,K) start of the free variables; None for a constant, which means equal weights.
        tol: an image stops when its best objective grew by less than this share of its size in `patience` steps, and
            leaves the batch. 0 never stops, and needs no synchronisation with the device.
        patience: steps, see `tol`.
        autocast: reduced precision of the masked image's passes, such as `torch.bfloat16`; all else stays float32.
        batch_size: images in flight; None for all at once. Where a device runs out of memory, the images in flight are
            halved until they fit, with one warning in the end.
        on_step: called with a `Step` before the first step and after each, batch by batch. A batch that ran out of
            memory begins again at 0.

    Returns:
        An `OptiCAMResult`; on the device of the images, without gradients; float32, or float64 for float64 images.

    Raises:
        TypeError: an argument is not a tensor, has the wrong dtype, or is not a function where one is wanted.
        ValueError: wrong shape, device or range, also of what a function returns; unknown layer, negative `num_steps`,
            `lr` not above 0.
    """
    check_inputs(model, images, class_idx)
    check_numbers(num_steps=num_steps, patience=patience)
    check_whole(0, num_steps=num_steps)
    check_whole(1, patience=patience)
    check_at_least(1, batch_size=batch_size)
    _check_function("objective", objective, "masked_logits", "logits", "class_idx")
    _check_function("normalize", normalize, "maps")
    _check_function("penalty", penalty, "saliency", "anchor")
    _check_function("optimizer", optimizer, "point", "lr", "num_steps")
    if on_step is not None:
        _check_function("on_step", on_step, "step")
    if callable(anchor):
        _check_function("anchor", anchor, "model", "images", "class_idx", layer=None)
    if not isinstance(autocast, torch.dtype | None):
        raise TypeError(f"autocast: wanted a dtype, such as torch.bfloat16, got {in_a_line(autocast)}")
    if not isinstance(space, Space):
        raise TypeError(f"space: wanted a Space, such as weight_space, got {in_a_line(space)}")
    if isinstance(u, Tensor):
        check_tensors(u=u)
    if not (u is None or (isinstance(u, Tensor) and u.shape[:1] == images.shape[:1])):
        got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"u: wanted a tensor with a row for each of {len(images)} images, got {got}")
    several = cast(Sequence[Baseline], baseline if isinstance(baseline, list | tuple) else [baseline])
    if not several:
        raise ValueError("baseline: wanted at least one")
    shown = [b if callable(b) else baseline_of(images, b) for b in several]
    check_numbers(complement=complement, lr=lr, tol=tol)
    complement, lr, tol = float(complement), float(lr), float(tol)  # torch multiplies by no integer of many digits
    if not 0 <= complement < torch.inf:
        raise ValueError(f"complement: wanted a number of at least 0, got {complement}")
    if not (anchor is None or callable(anchor)):
        check_saliency(images, anchor, "anchor")
    if not 0 < lr < torch.inf:
        raise ValueError(f"lr: wanted a positive number, got {lr}")
    if not tol >= 0:
        raise ValueError(f"tol: wanted at least 0, got {tol}")

    def prepare(part: slice) -> tuple[nn.Module, tuple]:
        """The network that the loop asks; and images, classes, logits, baselines, anchor and feature maps by row."""
        x, c, S_0 = prepared(model, images[part]), for_autograd(class_idx[part]), _rows(anchor, part)
        features, y = feature_maps(model, x, layer)
        check_class_range(c, y.shape[1])
        dtype = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse for the weights
        A = tuple(maps.to(dtype).relu() for maps in features)
        if callable(S_0):
            S_0 = S_0(model, x, c, layer=as_layers(layer)[-1])
            check_saliency(x, S_0, "anchor")
        S_0 = None if S_0 is None else for_autograd(S_0).detach().to(A[0])
        B = tuple(baseline_of(x, _rows(b, part)) for b in shown)
        return folded(model, x, y), (x, c, y.to(dtype), B, S_0, A)

    def saliency(point: Point, features: Maps) -> Tensor:
        by_layer = (upsample(maps, images.shape[-2:]) for maps in space.sums(point, features))
        return normalize(reduce(torch.add, by_layer))

    def climb(part: slice) -> OptiCAMResult:
        network, batch = prepare(part)
        features = batch[-1]
        point = tuple(tensor.clone() for tensor in space.start(_start(_rows(u, part), features), features))
        ascent, decay = optimizer(point[0].requires_grad_(), lr, num_steps)
        with torch.no_grad():  # before the loop: to ask for a range is to wait for the device
            check_saliency(batch[0], saliency(point, features), "normalize")
        progress = Progress(point, num_steps, tol, patience)
        for step in range(num_steps + 1):
            x, c, y, B, S_0, A = _rows(batch, progress.rows)  # of the images that have not stopped
            S = saliency(_rows(point, progress.rows), A)  # S(u) = n(up(sum_k w_k A_k)), w = softmax(u)
            masks = (S, 1 - S) if complement else (S,)
            views = torch.cat([apply_mask(x, M, b) for M in masks for b in B])  # x * S(u), or x * M + b * (1 - M)
            masked_logits, logits, target = _ask(network, views, y, c, autocast)  # f(x * S(u))
            g = _checked("objective", objective(masked_logits, logits, target), len(views))  # f(x * S(u))_c
            kept, *hidden = g.unflatten(0, (len(masks), len(B), len(x))).mean(1)  # mean_b
            value = kept - complement * hidden[0] if hidden else kept  # F(u), to be maximised
            if S_0 is not None:
                value = value - _checked("penalty", penalty(S, S_0), len(x))
            if on_step is not None:
                rows = torch.arange(len(images), device=x.device)[part][progress.rows]
                seen = masked_logits[: len(x)].detach(), target[: len(x)]
                on_step(Step(step, rows, S.detach(), value.detach(), *seen))
            going_on = progress.add(step, value.detach(), point)  # the best so far is kept
            if step == num_steps or not going_on:
                break
            (point[0].grad,) = differentiate(model, value.sum(), point[0])  # dF / du
            ascent.step()  # u moves uphill
            space.settle(point, features)  # to where weights exist for it; in weight space everywhere
            if decay is not None:
                decay.step()
        with torch.no_grad():
            S = saliency(progress.best, features)
            check_saliency(batch[0], S, "normalize")
            S = S.masked_fill(progress.history.isnan().all(1)[:, None, None, None], torch.nan)  # no map was better
            steps = progress.history.nan_to_num(-torch.inf).argmax(1)
            return OptiCAMResult(S, space.weights(progress.best, features), progress.history, steps)

    with frozen(model):
        return OptiCAMResult(*map(torch.cat, zip(*_in_parts(climb, len(images), batch_size), strict=True)))


def _check_function(name: str, function: Any, *given: str, **by_name: None) -> None:
    """Refuse, by a TypeError, what cannot be called with these arguments."""
    if not callable(function):
        raise TypeError(f"{name}: wanted a function, such as its default, got {in_a_line(function)}")
    try:
        with suppress(ValueError):  # of a built-in function its arguments may be unknown
            inspect.signature(function).bind(*given, **by_name)
    except TypeError as error:
        wanted = ", ".join([*given, *(f"{key}=" for key in by_name)])
        raise TypeError(f"{name}: wanted a function of ({wanted}), got {in_a_line(function)} ({error})") from error


def _rows(given: Any, rows: slice | Tensor) -> Any:
    """These rows of a tensor, or of all tensors in a tuple; functions and None as they are."""
    if isinstance(given, tuple):
        return tuple(_rows(one, rows) for one in given)
    return given[rows] if isinstance(given, Tensor) else given


def _start(u: Tensor | None, features: Maps) -> Tensor:
    """The free variables (B,K) to begin with; zeros, which mean equal weights, for None."""
    wanted = len(features[0]), sum(maps.shape[1] for maps in features)
    if u is None:
        return features[0].new_zeros(wanted)
    if u.shape != wanted:
        raise ValueError(f"u: wanted shape ({wanted[0]},{wanted[1]}), got {tuple(u.shape)} for {wanted[0]} images")
    if not u.isfinite().all():
        raise ValueError("u: wanted finite numbers, got NaN or infinite ones")
    return for_autograd(u).detach().to(features[0])


def _ask(
    network: nn.Module, views: Tensor, logits: Tensor, class_idx: Tensor, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all views, of the image as often, and the class: what objectives are functions of."""
    with torch.autocast(views.device.type, autocast, enabled=autocast is not None):
        output = read(network, views)
    number = len(views) // len(logits)
    y, c = logits.repeat(number, 1), class_idx.repeat(number)
    masked_logits, _ = as_softmax(output.logits.to(y.dtype), c, output.head)
    return masked_logits, *as_softmax(y, c, output.head)


def _checked(name: str, values: Any, count: int) -> Tensor:
    """What a function of the caller's gives, if it is a number per row that can be differentiated."""
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: wanted a function to one number per image, shape ({count},), got {got}")
    if not values.requires_grad:
        raise ValueError(f"{name}: wanted a function that can be differentiated")
    return values


def _in_parts(climb: Callable[[slice], OptiCAMResult], number: int, batch_size: int | None) -> list[OptiCAMResult]:
    """`climb` of `batch_size` images at a time, or of as many as fit into the memory of the device."""
    asked = in_flight = min(batch_size or number, number)
    parts: list[OptiCAMResult] = []
    first = 0
    while first < number:
        try:
            parts.append(climb(slice(first, first + in_flight)))
            first += in_flight
        except torch.OutOfMemoryError:
            if in_flight == 1:
                raise
            in_flight = (min(in_flight, number - first) + 1) // 2
    if in_flight < asked:
        warnings.warn(f"out of memory with {asked} images in flight: went on with {in_flight}", stacklevel=3)
    return parts


def num_passes(
    *,
    num_steps: int = 100,
    baseline: Baseline | Sequence[Baseline] = None,
    complement: float = 0.0,
    anchor: Tensor | Callable[..., Tensor] | None = None,
    **others: Any,
) -> int:
    """Forward passes of the network that `opti_cam` takes for an image, with these of its options.

    V views take V (T+1), the features one, and Grad-CAM as the anchor one. There are V T backward passes.
    """
    views = (len(baseline) if isinstance(baseline, list | tuple) else 1) * (2 if complement else 1)
    return views * (num_steps + 1) + 1 + callable(anchor)


def opti_cam_map(model: nn.Module, images: Tensor, class_idx: Tensor, **options: Any) -> Tensor:
    """The map of `opti_cam`, (B,1,H,W) in [0,1]; arguments and errors as there."""
    return opti_cam(model, images, class_idx, **options).saliency


RECORDS = {"opti_cam": Method(opti_cam_map, "Opti-CAM", "#d55e00")}
