"""What a network takes and gives: images in [0,1] or its own, and logits under a softmax or a sigmoid per class."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from opticam.state import in_a_line, turns

Head = Literal["softmax", "sigmoid"]


class Classifier(nn.Module):
    """A network that takes images in [0,1], with mean/std inside, and knows its layer, head, sizes and classes.

    Its attributes are what `networks.wrap` was given, by the same names. For one logit `class_names` name the class
    that it stands for and its absence.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        layer: str,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        head: Head | None = None,
        to_logits: Callable[[Any], Any] | None = None,
        input_size: int = 224,
        resize: int = 256,
        class_names: list[str],
        layout: Callable[[Tensor], Tensor] | None = None,
        window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        heads: list[tuple[Any, Head]] = [(logits_of_softmax, "softmax"), (logits_of_sigmoid, "sigmoid")]
        said = next((name for function, name in heads if function is to_logits), None)
        if head is not None:
            check_head(head)
        if said and head not in (None, said):
            raise ValueError(f"head: wanted {said!r}, that of to_logits=logits_of_{said}, got {in_a_line(head)}")
        head = head or said or "softmax"
        self.network = network
        self.name, self.layer, self.head, self.to_logits = name, layer, head, to_logits
        self.input_size, self.resize, self.class_names = input_size, resize, class_names
        self.layout, self.window = layout, window
        found = weights_of(network)
        weights = torch.empty(0) if found is None else found
        for key, values in (("mean", mean), ("std", std)):
            constant = torch.tensor(values, dtype=weights.dtype, device=weights.device)
            self.register_buffer(key, constant.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Any:
        """The logits of images (B,C,H,W) in [0,1], also of a network that returns them in a record; see `as_output`."""
        returned = self.network((images - self.mean) / self.std)
        returned = returned if self.to_logits is None else self._converted(returned)
        _check_distribution(returned, self.head)
        record = isinstance(returned, Mapping | tuple | list) or _named(returned) is not None
        return find_logits(returned, len(images)) if record else returned

    def _converted(self, returned: Any) -> Any:
        try:
            return self.to_logits(returned)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            raise
        except (LookupError, AttributeError, TypeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            wanted = f"wanted a function of the {type(returned).__name__} that the network returns"
            raise ValueError(f"to_logits: {wanted}, got {reason}") from error


class Output(NamedTuple):
    """What a network says of images.

    Attributes:
        logits: (B,C). Of a network with one logit y they are (B,2): y for the class that it stands for, -y for the
            absence of that class.
        head: how probabilities follow from them.
    """

    logits: Tensor
    head: Head


def as_classifier(model: nn.Module) -> Classifier | None:
    """The `Classifier` that the model is, compiled or data-parallel or not; None for any other network."""
    inner = model if isinstance(model, Classifier) else unwrapped(model)
    return inner if isinstance(inner, Classifier) else None


def weights_of(model: nn.Module) -> Tensor | None:
    """The weights whose dtype and device images are to have: no scalar, such as a temperature, if there are others."""
    first = None
    for weights in filter(Tensor.is_floating_point, model.parameters()):  # not all: this is asked in every call
        if weights.ndim > 1:
            return weights
        first = weights if first is None else first
    return first


def unwrapped(model: nn.Module) -> nn.Module:
    """What `torch.compile` or `DataParallel` stands around, also within a `Classifier`; any other network itself."""
    if isinstance(model, Classifier):
        network = unwrapped(model.network)
        if network is model.network:
            return model
        twin = copy.copy(model)  # with the same hooks
        twin._modules = {**model._modules, "network": network}
        return twin
    compiled = type(model).__name__ == "OptimizedModule"
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = model._modules.get("_orig_mod" if compiled else "module") if compiled or parallel else None
    return model if inner is None else unwrapped(inner)


def bare(model: nn.Module) -> nn.Module:
    """The network inside a `Classifier`; any other network itself, whatever its attributes are called, as written."""
    classifier = as_classifier(model)
    return unwrapped(model if classifier is None else classifier.network)


def read(model: nn.Module, images: Tensor) -> Output:
    """One pass of the network, and what it says.

    Args:
        model: any network. The head of a `Classifier` is the one it was given; of any other a softmax is taken, unless
            the network has one logit, which is a sigmoid.
        images: (B,C,H,W) float. A network that works in place works on a copy.

    Raises:
        TypeError: the network wants more than the images, or returns no floating-point logits.
        ValueError: the network cannot take images of that shape or dtype; the logits are not (B,C) of the images;
            images in a graph lead to logits outside of it.
    """
    if images.is_leaf and as_classifier(model) is None:  # mean/std of a classifier make a copy of their own
        images = images.clone()
    name = type(bare(model)).__name__
    try:
        with turn(model):
            returned = model(images)
    except TypeError as error:
        if wanted := _further_inputs(bare(model)):
            told = f"model: {name} wants {', '.join(wanted)} beside the images"
            raise TypeError(f"{told}; wanted a module that takes the images alone and gives it the rest") from error
        raise
    except (RuntimeError, IndexError, AttributeError, AssertionError, ValueError) as error:
        if _IN_PLACE.search(str(error)):
            raise _without_gradients(model, error) from error
        if _OF_OWN_HOOKS.search(str(error)):
            raise ValueError(
                f"model: {name} sets hooks on its tensors in forward, which a pass without gradients cannot have "
                f"({error}); wanted a forward without them"
            ) from error
        known = (_MISFIT if isinstance(error, ValueError) else _OF_TENSORS).search(str(error))
        if isinstance(error, torch.OutOfMemoryError) or not (known or isinstance(error, AssertionError)):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"images: {name} cannot take a tensor {tuple(images.shape)} of {images.dtype} ({reason}); "
            "wanted images as it takes them, or a module around it that makes them so"
        ) from error
    output = as_output(model, returned, len(images))
    if torch.is_grad_enabled() and images.requires_grad and not output.logits.requires_grad:
        raise ValueError(
            f"model: the logits of {name} carry no gradient (no_grad, inference_mode or detach "
            "in its forward); wanted a network that can be differentiated, or a method without gradients"
        )
    return output


def turn(model: nn.Module) -> AbstractContextManager[Any]:
    """While it is open no other thread is inside a pass of a network that may keep something during it."""
    return turns.get(bare(model), nullcontext())


def as_output(model: nn.Module, returned: Any, num_images: int) -> Output:
    """What the network says, from what it returned.

    Args:
        model: the network.
        returned: logits (B,C), or (B,1) or (B,) of one class; or a record, dict, tuple or list that holds them, under
            the name `logits` or `logits_per_image`, or as the only tensor, at any depth, with a number or a row per
            image that is not named as features, embeddings, hidden or pooled ones. Of a single image the batch
            dimension may be missing.
        num_images: B.

    Raises:
        TypeError: no such logits, or several tensors that might be.
        ValueError: the logits are not (B,C); a Bernoulli for each class, where the head is a softmax.
    """
    classifier = as_classifier(model)
    head: Head = "softmax" if classifier is None else classifier.head
    _check_distribution(returned, head)
    logits = for_autograd(find_logits(returned, num_images))
    if logits.ndim < 2 and (num_images == 1 or logits.shape == (num_images,)):
        logits = logits.reshape(num_images, -1)
    if logits.ndim != 2 or len(logits) != num_images or logits.shape[1] == 0:
        raise ValueError(f"model: wanted logits ({num_images},C), got shape {tuple(logits.shape)}; {_HINT}")
    if not logits.is_floating_point() or logits.layout != torch.strided:
        raise TypeError(f"model: wanted floating-point logits, got {logits.dtype}, {logits.layout}; {_HINT}")
    if logits.shape[1] == 1:
        return Output(with_absence(logits), "sigmoid")
    return Output(logits, head)


def _check_distribution(returned: Any, head: Head) -> None:
    several = isinstance(returned, torch.distributions.Bernoulli) and returned.logits.shape[-1] > 1
    if several and head != "sigmoid":
        raise ValueError('model: it returns a Bernoulli for each class; wanted opticam.wrap(..., head="sigmoid")')


def find_logits(returned: Any, num_images: int) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    named = _named(returned)
    if named is not None:
        return named
    parts = _tensors(returned)
    numbers = [part for part in parts if part.ndim in (1, 2) and part.is_floating_point()]
    # a single number beside, such as a temperature, would be in question for one image: so it is for all
    found = [part for part in numbers if len(part) == num_images or part.shape == (1,)]
    if len(found) != 1:
        raise TypeError(
            f"model: wanted a network that returns logits, got a {type(returned).__name__} with {len(found)} tensors "
            f"that may be; {_HINT}"
        )
    return found[0]


def _named(returned: Any) -> Tensor | None:
    for name in ("logits", "logits_per_image"):  # the second is CLIP's, which has logits_per_text too
        named = returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
        if isinstance(named, Tensor):
            return named
    return None


def _tensors(returned: Any) -> Iterator[Tensor]:
    if isinstance(returned, Mapping):
        returned = [part for name, part in returned.items() if not _OF_FEATURES.search(str(name))]
    if isinstance(returned, Tensor):
        yield returned
    elif isinstance(returned, tuple | list):
        for part in returned:
            yield from _tensors(part)


_HINT = "say which by opticam.wrap(..., to_logits=lambda output: ...)"
_OF_FEATURES = re.compile(r"feat|embed|hidden|pool|represent|latent", re.IGNORECASE)  # in names of what is no logits
_OF_TENSORS = re.compile(  # what torch says of a misfit
    r"\b([Tt]ensor|channels?|sizes?|shapes?|dtype|type|layout|height|width|elements|[Dd]imensions?|"
    r"missing the required|not implemented for)\b"
)
_MISFIT = re.compile(r"expected \d.* input|spatial dimensions")  # and where it checks that itself
_OF_OWN_HOOKS = re.compile("register a hook on a tensor|retain_grad")


def differentiate(model: nn.Module, total: Tensor, inputs: Tensor | Sequence[Tensor], **options: Any) -> Any:
    """As `torch.autograd.grad`, of what the network gave. ValueError: something in it cannot be differentiated."""
    try:
        # outside of the caller's autocast: operations go backward in the precision in which they went forward
        precision = torch.autocast(total.device.type, enabled=False)
        with precision, torch.autograd.set_multithreading_enabled(False):  # hooks hear this thread alone
            return torch.autograd.grad(total, inputs, **options)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _OF_GRADIENTS.search(str(error)):
            raise
        raise _without_gradients(model, error) from error


def _without_gradients(model: nn.Module, error: Exception) -> ValueError:
    reason = str(error).partition(". ")[0].partition("\n")[0]
    told = f"model: {type(bare(model)).__name__} cannot be differentiated ({reason})"
    return ValueError(f"{told}; wanted a network that can, or a method without gradients")


_IN_PLACE = re.compile("modified (by an )?inplace|used in an in-place")
_OF_GRADIENTS = re.compile("inplace|checkpoint|derivative|vjp|backward")  # what torch says of those it cannot make


def _further_inputs(network: nn.Module) -> list[str]:
    """Names of what `forward` needs beside its first argument, and those that it takes by name only."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for place, p in enumerate(needed) if place or p.kind is p.KEYWORD_ONLY]


def for_autograd(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if it was made under `inference_mode`, since such tensors cannot enter a graph."""
    return tensor.clone() if tensor.is_inference() else tensor


def with_absence(logits: Tensor) -> Tensor:
    """Of one logit y, as (B,1) or (B,), the logits (B,2) of the class that it stands for and of its absence, -y."""
    y = logits.reshape(-1, 1)
    return torch.cat([y, -y], 1)


def class_logit(logits: Tensor, class_idx: Tensor) -> Tensor:
    """The logit of each image's class, (B,), from logits (B,C) and classes (B,) int64."""
    return logits.gather(1, class_idx[:, None])[:, 0]


def log_odds(logits: Tensor, class_idx: Tensor) -> Tensor:
    """Log-odds of each image's class under a softmax, `y_c - log sum_{j != c} exp y_j`, (B,)."""
    return class_logit(logits, class_idx) - logits.scatter(1, class_idx[:, None], -torch.inf).logsumexp(1)


def probs_of_class(logits: Tensor, class_idx: Tensor, head: Head = "softmax") -> Tensor:
    """`metrics.class_probability` without its checks, which wait for the device: for loops."""
    return class_logit(probabilities(logits.double(), head), class_idx)


def check_head(head: str) -> None:
    """Refuse a head that is not known."""
    if not isinstance(head, str) or head not in get_args(Head):  # an array would be compared value by value
        raise ValueError(f"head: wanted one of {', '.join(get_args(Head))}, got {in_a_line(head)}")


def probabilities(logits: Tensor, head: Head = "softmax") -> Tensor:
    """The probability of every class.

    Args:
        logits: (B,C); or (B,1) or (B,) of one logit, which is a sigmoid whatever the head.
        head: "softmax" or "sigmoid".

    Returns:
        (B,C) in [0,1], of the dtype of the logits; of one logit (B,2), see `with_absence`.
    """
    check_head(head)
    if logits.ndim == 1 or logits.shape[1] == 1:
        return with_absence(logits).sigmoid()
    return logits.softmax(1) if head == "softmax" else logits.sigmoid()


def as_softmax(logits: Tensor, class_idx: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Logits and classes of which a softmax gives the head's own probabilities.

    Under a sigmoid the only rival of a class is its absence, whose logit is 0: `sigmoid(y) = softmax((y, 0))_0`. So
    whatever is written for a softmax is right for both.

    Returns:
        Logits (B,C) and class_idx (B,) as given, or, of a sigmoid, logits (B,2) and zeros.
    """
    check_head(head)
    if head == "softmax":
        return logits, class_idx
    y = class_logit(logits, class_idx)
    return torch.stack([y, torch.zeros_like(y)], 1), torch.zeros_like(class_idx)


def logits_of_softmax(probs: Tensor) -> Tensor:
    """Logits `log p` of a network that ends in a softmax, for `wrap(..., to_logits=logits_of_softmax)`.

    Args:
        probs: (B,C) in [0,1], rows of sum 1; zeros count as the smallest positive number, so that gradients are finite.

    Returns:
        (B,C), whose softmax is `probs`.

    Raises:
        ValueError: not such rows.
    """
    _check_probabilities(probs)
    if ((probs.sum(1) - 1).abs() > 1e-2).any():
        raise ValueError("to_logits: wanted probabilities with rows of sum 1 from the network")
    return _widened(probs).clamp(min=_least(probs)).log().to(probs.dtype)


def logits_of_sigmoid(probs: Tensor) -> Tensor:
    """Logits `log p/(1 - p)` of a network that ends in a sigmoid, for `wrap(..., to_logits=logits_of_sigmoid)`.

    Args:
        probs: (B,C), (B,1) or (B,) in [0,1]; 0 and 1 count as their nearest neighbours, so that gradients are finite.

    Returns:
        Of the shape of `probs`, which is its sigmoid.

    Raises:
        ValueError: values outside [0,1].
    """
    _check_probabilities(probs)
    p = _widened(probs).clamp(_least(probs), 1 - torch.finfo(probs.dtype).eps / 2)
    return (p.log() - (-p).log1p()).to(probs.dtype)


def _widened(probs: Tensor) -> Tensor:
    return probs.to(torch.promote_types(probs.dtype, torch.float32))


def _least(probs: Tensor) -> float:
    """What stands for 0. In half precision numbers below the normal ones are probabilities as others are."""
    number = torch.finfo(probs.dtype)
    return number.tiny * (number.eps if probs.dtype == torch.float16 else 1)


def _check_probabilities(probs: Tensor) -> None:
    if ((probs < 0) | (probs > 1)).any():
        raise ValueError("to_logits: wanted probabilities in [0,1] from the network")
