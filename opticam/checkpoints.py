"""Weights out of a file, as trainers write it: found by the names that the network has, never by running code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WANTED = "wanted a state dict, as torch.save(network.state_dict(), path) writes it"


class _Aside:
    """Stands for an object beside the weights: nothing of what it was is made or kept."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# what trainers keep beside weights, old and new; of the two that hold tables or lists, a plain one is made
_HARMLESS: list[Any] = [
    *((_Aside, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((_Aside, f"numpy.{home}.multiarray.{name}") for home in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((_Aside, f"datetime.{name}") for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *((_Aside, f"{home}.{kind}Path") for home in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    *((_Aside, f"builtins.{name}") for name in ("int", "float", "str", "list", "dict", "range", "slice")),
    *((_Aside, name) for name in ("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion")),
    (lambda *args: {}, "collections.defaultdict"),
    (lambda *args: [], "collections.deque"),
]
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its weights
_DEPTH = 4  # of tables within tables


class _Found(NamedTuple):
    place: str
    weights: dict[str, Tensor]
    faults: list[str]


def read_checkpoint(path: str | Path) -> Mapping[Any, Any]:
    """What a file of `torch.save` or of safetensors holds. Only tensors, numbers, text and tables of them are read.

    Of what else trainers keep, such as arrays of numpy, dates and paths, nothing is made.

    Raises:
        OSError: no such file.
        ImportError: a file of safetensors, without that package.
        ValueError: the file is damaged, would run code, or holds no tensor.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"checkpoint: wanted the path of a file, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}; {WANTED}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"checkpoint: {path} needs the package safetensors: pip install safetensors") from error
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever it stumbles over
        raise ValueError(
            f"checkpoint: {path} is damaged or holds more than tensors, which might run code and was not read; {WANTED}"
        ) from error
    if not any(True for _ in _tables(content)):
        raise ValueError(f"checkpoint: {path} holds no state dict; {WANTED}")
    return content


def find_weights(
    content: Mapping[Any, Any],
    network: nn.Module,
    refusal: str,
    key: str = "",
    constants: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Tensor]:
    """The weights of a network among what a checkpoint holds.

    They may lie in a table of any name, such as "state_dict", "model" or "ema". One prefix may stand before all names,
    such as "model.", "module." or "ema.", and names may hold what data-parallel, sharded and compiled training adds.
    This is accepted only where the result has exactly the names and shapes of the network.

    Args:
        content: from `read_checkpoint`.
        network: that the weights are for.
        refusal: begins the message where they do not fit.
        key: table and prefix of the weights, such as "state_dict_ema" or "state_dict.model". Wanted where different
            weights fit, or where other tensors lie beside them.
        constants: mean and std, which lie beside the weights of a `Classifier`, and have to agree with those there.

    Raises:
        ValueError: no weights fit, or different ones do.
    """
    found = _found(content, network, key, constants or {})
    fitting = [one for one in found if not one.faults]
    if not fitting:
        faults = found[0].faults if found else [f"no weights under {key!r}"]
        raise ValueError(f"{refusal}: {faults[0]}{f', and {len(faults) - 1} more' if len(faults) > 1 else ''}")
    first, *others = fitting
    names = [name for name in network.state_dict() if name in first.weights]
    different = [one.place for one in others if not all(_same(first.weights[k], one.weights[k]) for k in names)]
    if different:
        places = ", ".join(map(repr, dict.fromkeys([first.place, *different])))
        raise ValueError(f"checkpoint: different weights fit, under {places}; wanted checkpoint_key to name one")
    return {name: first.weights[name] for name in names}


def count_classes(content: Mapping[Any, Any], network: nn.Module, num_classes: int, key: str = "") -> int:
    """The number of classes with which the weights of a checkpoint would fit, if nothing else keeps them from it.

    Args:
        content: from `read_checkpoint`.
        network: of `num_classes` classes.
        num_classes: the answer where no other number would do.
        key: see `find_weights`.
    """
    own = network.state_dict()
    for _, weights, faults in _found(content, network, key):
        if not faults:
            break
        pairs = [(tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights]
        changed = [(got, wanted) for got, wanted in pairs if got != wanted]
        numbers = {got[0] if got and (num_classes, *got[1:]) == wanted else 0 for got, wanted in changed}
        if len(numbers) == 1 and min(numbers) > 0:
            return numbers.pop()
    return num_classes


def _tables(content: object, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if isinstance(content, Mapping) and depth:
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if nested := [name for name, value in tensors.items() if value.is_nested]:
            raise ValueError(f"checkpoint: {place}{nested[0]} is a nested tensor; {WANTED}")
        if tensors:
            yield place, tensors
        for name, value in content.items():
            yield from _tables(value, f"{place}{name}.", depth - 1)


def _found(
    content: object, network: nn.Module, key: str, constants: Mapping[str, Sequence[float]] | None = None
) -> list[_Found]:
    """Every reading of the content as weights of the network, the best first."""
    own = network.state_dict()
    first = next(iter(own), "")
    found = []
    for place, tensors in _tables(content):
        for rename in (lambda name: name, lambda name: _WRAPPERS.sub("", name)):
            named = {rename(name): value for name, value in tensors.items()}
            prefixes = {name.removesuffix(first) for name in named if name.endswith(first)}
            for prefix in sorted({"", *(prefix for prefix in prefixes if prefix.endswith("."))}):
                where = f"{place}{prefix}"
                if not where.startswith(f"{key}." if key else ""):
                    continue
                weights = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
                faults = _faults(weights, own)
                if where.rstrip(".") != key:  # else the person has said which
                    told = f"lies beside those under {where.rstrip('.')!r}; wanted checkpoint_key to say which"
                    said = (constants or {}) if prefix == "network." else {}
                    beside = [name for name in named if not name.startswith(prefix) and name != _COUNTER]
                    faults += [f"{name} {told}" for name in beside if name not in said]
                    faults += [
                        f"{name} is {named[name].flatten().tolist()}, wanted {list(said[name])}"
                        for name in beside
                        if name in said and not _agree(named[name], said[name])
                    ]
                if len(named) == len(tensors):  # no two became one
                    found.append(_Found(where.rstrip("."), weights, faults))
    return sorted(found, key=lambda one: len(one.faults))


def _faults(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # old checkpoints are without
    faults = [f"{name} is missing" for name in needed if name not in weights]
    faults += [f"{name} is unknown" for name in weights if name not in own and name != _COUNTER]
    for name, wanted in own.items():
        if name not in weights:
            continue
        value = weights[name]
        plain = value.layout == torch.strided and not value.is_meta
        if value.shape != wanted.shape:
            faults.append(f"{name} has shape {tuple(value.shape)}, wanted {tuple(wanted.shape)}")
        if not plain or (wanted.is_floating_point() and not value.is_floating_point()):
            faults.append(f"{name} is {value.dtype}, {value.layout}, on {value.device}; wanted plain {wanted.dtype}")
        elif value.isnan().any():
            faults.append(f"{name} holds NaN")
        elif value.to(wanted.dtype).isinf().any() and not wanted.isinf().any():  # as a mask of attention may
            faults.append(f"{name} holds inf")
    return faults


def _agree(found: Tensor, values: Sequence[float]) -> bool:
    wanted = torch.tensor(values, dtype=torch.float64, device="cpu")
    if found.numel() not in (1, len(wanted)):
        return False
    return bool((found.flatten().double().cpu() - wanted).abs().max() < 5e-3)  # half precision rounds


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
