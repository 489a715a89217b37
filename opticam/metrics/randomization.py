"""Sanity checks: does a saliency map change when the network's weights are randomised?

Take image and class as they are, explain them on each network of `cascading` or `independent`, and compare with the map
of the trained network by `rank_correlation` and `structural_similarity`. A map that does not change explains nothing.

Reference:
    Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018, arXiv 1810.03292.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opticam.checks import as_seed, check_alike, check_module, check_tensors
from opticam.classifier import bare
from opticam.features import resolve_layer
from opticam.saliency import check_saliency
from opticam.state import in_a_line


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the network with all weights re-initialised.

    Kernels and matrices are drawn from He's normal distribution, variance 2/fan_in, biases from N(0, 0.02^2). Modules
    with nothing but vectors go back to their own start by `reset_parameters` if they have it, else they are drawn like
    biases; for batch norm this means scale 1, shift 0, running mean 0 and variance 1. All of this is **ours**, for one
    reason: the features of a randomised network should neither vanish nor forget the image. On EfficientNet-Lite0,
    wholly randomised, the last feature maps of four photos differ by a standard deviation of 0.8 from photo to photo
    (trained: 0.4). With `reset_parameters` throughout it is 2e-9, since torch's uniform draw loses a factor at every
    layer; with the running statistics of training kept it is 0.02, since these do not fit random weights.

    Args:
        model: any network. Not touched; nor is the global random state.
        seed: of the random weights; the same on every device.

    Returns:
        A network of the same class, flags, device and dtype.

    Raises:
        TypeError: not a module.
        ValueError: a function or hook in it keeps a module or its weights, which a copy would share; a spectral norm.

    Reference:
        He et al., Delving deep into rectifiers, ICCV 2015, arXiv 1502.01852 (the distribution).
    """
    check_module(model)
    seed = as_seed(seed)
    network = _copied(model)
    random = deepcopy(network).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
        for module in random.modules():
            _reinitialize(module)
    for source, target in zip(random.modules(), network.modules(), strict=True):
        _copy_own(source, target)
    return network


def cascading(model: nn.Module, seed: int = 0, stages: Sequence[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Networks randomised from the logits down: each by one stage more than the one before.

    The order is the reverse of `named_modules`, that is, of how the network was put together, which for all networks
    here is the reverse of the forward pass. The last network, if the stages cover all, is `randomized(model, seed)`.

    Args:
        model: any network. Not touched; nor is the global random state.
        seed: of the random weights; a stage gets the same ones in `cascading` and `independent`.
        stages: dotted names (for a `Classifier`: as the wrapped network names them), each a module that is randomised
            with all it contains, in any order; by default every module that has parameters or running statistics of its
            own.

    Returns:
        Iterator of the name of the stage last randomised and a network of its own, in the modes of the model. Own
        parameters of the whole network, such as position embeddings, go by the name of its class.

    Raises:
        ValueError: no such module, or one without parameters.
    """
    return _randomized_by_stage(model, seed, stages, cumulative=True)


def independent(
    model: nn.Module, seed: int = 0, stages: Sequence[str] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Networks of which one stage each is randomised and the others are as trained; all else as `cascading`."""
    return _randomized_by_stage(model, seed, stages, cumulative=False)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation over the pixels of each pair of maps; ties share their mean rank.

    Maps here are non-negative, so that the variant with absolute values is not needed.

    Args:
        a: (B,1,H,W).
        b: (B,1,H,W).

    Returns:
        (B,) float64 in [-1,1], 1 for maps of the same order: similar; 0 where a map is constant, to be counted, as such
        a map tells nothing; NaN where a map has a NaN. In a sanity check lower is better.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shape.
    """
    from scipy import stats

    _check_pair(a, b)
    return _per_pair(lambda x, y: stats.spearmanr(x.ravel(), y.ravel()).statistic, a, b)


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of each pair of maps, in two dimensions, range 1.

    Settings of the paper of SSIM: Gaussian window of sigma 1.5 (11x11), K1 = 0.01, K2 = 0.03, population covariances,
    mean over the windows that lie wholly inside.

    Result and errors as `rank_correlation`, but 1 is for equal maps.

    Args:
        a: (B,1,H,W) in [0,1], sides of 11 pixels or more.
        b: likewise.

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE TIP 2004.
    """
    from skimage.metrics import structural_similarity as ssim

    _check_pair(a, b)
    check_saliency(None, a, "a")
    check_saliency(None, b, "b")
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"a: wanted sides of at least 11 pixels, the window of SSIM, got {tuple(a.shape[-2:])}")
    settings = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return _per_pair(lambda x, y: ssim(x, y, **settings), a, b)


def _randomized_by_stage(
    model: nn.Module, seed: int, stages: Sequence[str] | None, *, cumulative: bool
) -> Iterator[tuple[str, nn.Module]]:
    check_module(model)
    groups = _groups(model, stages)
    trained, sources = _copied(model), list(randomized(model, seed).modules())

    def networks() -> Iterator[tuple[str, nn.Module]]:
        network = trained
        for stage, places in reversed(groups):
            network = deepcopy(network if cumulative else trained)
            targets = list(network.modules())
            for place in places:
                _copy_own(sources[place], targets[place])
            yield stage, deepcopy(network)  # what the caller does to it must not reach the next

    return networks()


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, also where the network keeps results of a pass, which `deepcopy` refuses."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    if any("SpectralNorm" in type(part).__name__ for part in [*model.modules(), *hooks]):
        raise ValueError(
            "model: has a spectral norm, whose vectors belong to the trained weights; wanted it removed by "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_spectral_norm"
        )
    held = [value for module in model.modules() for value in vars(module).values()]
    if any(map(_keeps_weights, held)):  # hooks among them
        raise ValueError(
            f"model: a function or hook in {type(bare(model)).__name__} keeps a module or its weights, which a copy "
            "would share; wanted a method of a module in its place"
        )
    for inside in [value for value in held if isinstance(value, dict | list)]:
        held += inside.values() if isinstance(inside, dict) else inside
    made = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return deepcopy(model, {id(value): value.detach().clone() for value in made})


def _keeps_weights(thing: Any) -> bool:
    """Whether a function that is not ours reaches a module or its weights by what `deepcopy` does not copy."""
    ahead, seen = [(thing, False)], set()
    while ahead:
        value, inside = ahead.pop()  # whether inside of a function
        if inside and isinstance(value, nn.Module | nn.Parameter):
            return True
        if id(value) in seen or hasattr(value, "ours"):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            kept = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            kept += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            named = (value.__globals__.get(name) for name in value.__code__.co_names)
            kept += [one for one in named if isinstance(one, nn.Module | MethodType | partial | FunctionType)]
            ahead += [(one, True) for one in kept]
        elif isinstance(value, MethodType):
            ahead += [(value.__func__, inside), (value.__self__, inside)]
        elif isinstance(value, partial):
            ahead += [(one, inside) for one in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, dict | list | tuple | set):
            ahead += [(one, inside) for one in (value.values() if isinstance(value, dict) else value)]
    return False


def _groups(model: nn.Module, stages: Sequence[str] | None) -> list[tuple[str, list[int]]]:
    """Stages in the order of `named_modules`, each with the places in `model.modules()` of the modules to randomise."""
    place = {id(module): i for i, module in enumerate(model.modules())}
    network = bare(model)
    if stages is None:
        return [
            (name or type(network).__name__, [place[id(module)]])
            for name, module in network.named_modules()
            if _keeps_statistics(module) or any(True for _ in module.parameters(recurse=False))
        ]
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise ValueError(f"stages: wanted a sequence of dotted names, got {in_a_line(stages)}")
    groups = []
    for name in stages:
        module = resolve_layer(model, name)
        if not any(True for _ in module.parameters()):
            raise ValueError(f"stages: wanted modules with parameters, {name!r} has none")
        groups.append((name, [place[id(part)] for part in module.modules()]))
    return sorted(groups, key=lambda group: group[1][0])


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm, also one without scale and shift."""
    return hasattr(module, "reset_running_stats") and getattr(module, "running_mean", None) is not None


def _reinitialize(module: nn.Module) -> None:
    own = list(module.parameters(recurse=False))
    if not own and _keeps_statistics(module):
        module.reset_running_stats()  # type: ignore[operator]
    if own and hasattr(module, "reset_parameters") and all(parameter.ndim < 2 for parameter in own):
        module.reset_parameters()  # type: ignore[operator]
        return
    for parameter in own:
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def _copy_own(source: nn.Module, target: nn.Module) -> None:
    for kind in (nn.Module.parameters, nn.Module.buffers):
        for values, place in zip(kind(source, recurse=False), kind(target, recurse=False), strict=True):
            place.copy_(values)


def _per_pair(similarity: Callable[[np.ndarray, np.ndarray], float], a: Tensor, b: Tensor) -> Tensor:
    values = torch.zeros(len(a), dtype=torch.float64, device="cpu")
    for i, pair in enumerate(zip(*(maps[:, 0].detach().double().cpu().numpy() for maps in (a, b)), strict=True)):
        if np.isnan(pair).any():
            values[i] = np.nan
        elif all(grid.min() != grid.max() for grid in pair):
            values[i] = float(similarity(*pair))
    return values.to(a.device)


def _check_pair(a: Tensor, b: Tensor) -> None:
    for name, maps in (("a", a), ("b", b)):
        if not isinstance(maps, Tensor):
            raise TypeError(f"{name}: wanted a tensor (B,1,H,W), got {type(maps).__name__}")
        check_tensors(**{name: maps})
    if a.ndim != 4 or a.shape[1] != 1 or 0 in a.shape:
        raise ValueError(f"a: wanted shape (B,1,H,W) without empty dimensions, got {tuple(a.shape)}")
    check_alike(a=a, b=b)
