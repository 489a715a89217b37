"""What is read from a network: the feature maps of a layer and their gradients.

Whatever happens inside, the network is left as it was found: no hook, no changed flag, no gradient.
"""

import difflib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from opticam.checks import check_inputs, check_network, examine, silent_twin
from opticam.classifier import (
    as_classifier,
    as_output,
    as_softmax,
    bare,
    class_logit,
    differentiate,
    find_logits,
    for_autograd,
    read,
    unwrapped,
    weights_of,
)
from opticam.layouts import (
    Tokens,
    channels_first,
    channels_last,
    check_cells,
    check_patches,
    class_token_grid,
    find_layout,
    parts_of_transformer,
    path_to,
    plain_transformer,
    token_grid,
    told_layout,
)
from opticam.state import all_modules, buffers_of, changed, frozen, hooked, in_a_line, parameters_of

Layer = nn.Module | str | None


def prepared(model: nn.Module, images: Tensor) -> Tensor:
    """The images as the network takes them: the same values, out of any graph.

    In the memory format channels_last for a `Classifier` with such weights, as `load_model` makes them. Else
    contiguous, since a foreign network may rely on that.
    """
    last, classifier = torch.channels_last, as_classifier(model)
    kernels = [] if classifier is None else [p for p in parameters_of(all_modules(classifier)) if p.ndim == 4]
    is_last = any(p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in kernels)
    return for_autograd(images).detach().contiguous(memory_format=last if is_last else torch.contiguous_format)


def resolve_layer(model: nn.Module, layer: Layer = None) -> nn.Module:
    """The module that `layer` means in `model`.

    Args:
        model: any network; a `Classifier` names its target layer in `model.layer`.
        layer: a module of the model, its dotted name (for a `Classifier`: as the wrapped network names it), or None
            for the model's own target layer.

    Raises:
        ValueError: the model has no such layer, or none was named and the model has no target layer of its own.
    """
    classifier, network = as_classifier(model), bare(model)
    kind = type(network).__name__
    if layer is None:
        if classifier is None:
            raise ValueError(f"layer: wanted a module or a dotted name; {kind} has no target layer of its own")
        layer = classifier.layer
    if isinstance(layer, nn.Module):
        if not any(module is layer for module in all_modules(model)):
            raise ValueError(f"layer: {type(layer).__name__} is not a module of the given model")
        return layer
    if not isinstance(layer, str):
        raise ValueError(f"layer: wanted a module or a dotted name, got {in_a_line(layer)}")
    with suppress(AttributeError, RuntimeError):  # the latter of TorchScript
        if layer:
            return network.get_submodule(layer)
    names = dict(network.named_modules(remove_duplicate=False))
    if layer and layer in names:
        return names[layer]
    target = [] if classifier is None or classifier.layer == layer else [classifier.layer]
    close = difflib.get_close_matches(layer, filter(None, names), n=3) or target or list(names)[-3:]
    raise ValueError(f"layer: no {layer!r} in {kind}; wanted a dotted name such as {', '.join(close)}")


def as_layers(layer: Layer | Sequence[Layer]) -> Sequence[Layer]:
    """One layer or several as a sequence. ValueError: an empty one."""
    layers = layer if isinstance(layer, Sequence) and not isinstance(layer, str | nn.Module) else [layer]
    if not layers:
        raise ValueError("layer: wanted at least one")
    return layers


def layer_name(model: nn.Module, layer: nn.Module) -> str | None:
    """The dotted name by which `resolve_layer` finds a module of the model; None for a module of another."""
    return next((name for name, module in bare(model).named_modules() if module is layer), None)


def feature_maps(
    model: nn.Module, images: Tensor, layer: Layer | Sequence[Layer] = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Feature maps A_k of one layer or several, and the logits, from one forward pass without gradients.

    Args:
        model: any network that takes `images`.
        images: (B,C,H,W) float.
        layer: see `resolve_layer`; or several. Of a module called several times in one pass, the last output counts.

    Returns:
        Features (B,K,h,w) of each layer, copies that in-place operations after the layer do not reach; and logits
        (B,C). Tokens come as a grid, without class and register tokens, and channels-last maps as (B,K,h,w). Where a
        hook of the network changes the output of the layer, they are what it was before.

    Raises:
        TypeError: a network of a wrong kind.
        ValueError: unknown layer, a layer the pass never reaches, or an output that is not a grid of feature maps.
    """
    check_network(model)
    layers = as_layers(layer)
    outputs, logits = layer_outputs(model, images, layers)
    grids = (_grids([output], model, images, name, len(images)) for output, name in zip(outputs, layers, strict=True))
    return tuple(grid for (grid,) in grids), logits


def layer_outputs(model: nn.Module, images: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """Outputs of layers in the layout of the network, copies, and the logits. Otherwise as `feature_maps`.

    Where hooks are needed, here and below, a compiled network runs as it was written: else it would not call them.
    """
    captured: list[list[Tensor]] = [[] for _ in layers]

    def keep(place: list[Tensor], views: list[None], module: nn.Module, args: tuple, output: Tensor) -> None:
        place[:] = [_last(place, views, module, output).detach().clone()]

    with frozen(model, compiled=False), torch.no_grad(), ExitStack() as hooks:
        for name, place in zip(layers, captured, strict=True):
            module = resolve_layer(model, name)
            views = hooks.enter_context(_views(model, module))
            hooks.enter_context(hooked(module, partial(keep, place, views), first=True))
        logits = examine(unwrapped(model), prepared(model, images)).logits
    outputs = [for_autograd(_reached(place, model, images)) for place in captured]
    for name, output in zip(layers, outputs, strict=True):
        _check_first_axis(model, images, name, output)
    return outputs, logits


def logits_with(
    model: nn.Module, images: Tensor, layer: nn.Module, output: Tensor, call: int = 1, kept: bool = False
) -> Tensor:
    """Logits (B,C) where `output` takes the place of the layer's at its `call`-th call of the pass. No gradients.

    With `kept` it is written into the layer's own output, which the network may keep aside, if that is nobody else's.
    """
    calls = itertools.count(1)

    def is_shared(own: Tensor, args: tuple) -> bool:
        given, modules = (tensor for tensor in _given(args) if isinstance(tensor, Tensor)), all_modules(model)
        others = (*given, *parameters_of(modules), *buffers_of(modules))
        return own.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}

    def replace(module: nn.Module, args: tuple, own: Tensor) -> Tensor:
        if next(calls) != call:
            return own
        spread = own.shape != output.shape or 0 in own.stride()  # which nothing can be written into
        return output.clone() if not kept or spread or own.is_inference() or is_shared(own, args) else own.copy_(output)

    with frozen(model, compiled=False), torch.no_grad(), hooked(layer, replace, first=True):
        return read(unwrapped(model), prepared(model, images)).logits


def count_calls(model: nn.Module, images: Tensor, layer: nn.Module) -> int:
    """How often one pass of the network calls the layer."""
    calls: list[None] = []
    with frozen(model, compiled=False), torch.no_grad(), hooked(layer, lambda module, args, output: calls.append(None)):
        read(unwrapped(model), prepared(model, images))
    return len(calls)


def features_and_gradients(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    layer: Layer = None,
    score: Callable[[Tensor, Tensor], Tensor] = class_logit,
) -> tuple[Tensor, Tensor, Tensor]:
    """Feature maps A, gradients g = d y_c / d A and logits, by one forward pass and one backward down to the layer.

    Arguments as `feature_maps`, but of one layer, and:

    Args:
        class_idx: (B,) int64, the class c of each image.
        score: what to differentiate, from logits (B,C) and class_idx to (B,), both as `as_softmax` gives them; by
            default y_c.

    Returns:
        features (B,K,h,w), gradients (B,K,h,w), both at least float32, as sums of half-precision maps overflow; logits
        (B,C).

    Raises:
        ValueError: as `feature_maps`; a class index out of range; logits that do not depend on the layer.
    """
    check_inputs(model, images, class_idx)
    captured: list[Tensor] = []
    place = resolve_layer(model, layer)

    def restart_graph(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = for_autograd(_last(captured, views, module, output))
        if output.is_leaf and (isinstance(output, nn.Parameter) or any(output is given for given in _given(args))):
            output = output.detach()  # not the layer's own
        if not output.requires_grad:
            undo.enter_context(changed([(output, "requires_grad", True)]))  # a layer may keep it for its next call
        captured[:] = [output]  # itself: others may keep it
        with torch.enable_grad():  # the layer may be the last of what runs under no_grad
            return captured[0].clone()  # in-place operations that follow may not touch a leaf

    with ExitStack() as undo, frozen(model, compiled=False), _views(model, place) as views:
        undo.enter_context(hooked(place, restart_graph, first=True))
        logits, head = examine(unwrapped(model), prepared(model, images), class_idx)
        features = _reached(captured, model, images)
        scores = score(*as_softmax(logits, for_autograd(class_idx), head))
        gradients = None
        if scores.requires_grad:
            captured.clear()  # a network that runs again in the backward pass, to save memory, does not run it twice
            (gradients,) = differentiate(model, scores.sum(), features, allow_unused=True)
    if gradients is None:
        raise ValueError(
            "layer: the logits do not depend on its output, or the network hides how (no_grad, inference_mode or "
            "detach in its forward); wanted another layer, or a method without gradients"
        )
    _check_first_axis(model, images, layer, features)
    dtype = torch.promote_types(features.dtype, torch.float32)
    parts = [part.detach().to(dtype) for part in (features, gradients)]
    maps, slopes = _grids(parts, model, images, layer, len(images))
    if slopes.numel() < gradients.numel() and gradients.any() and not slopes.any():
        raise ValueError(
            "layer: the logits depend on the class token alone after it; wanted one before the last attention"
        )
    return maps, slopes, logits.detach()


def attention_maps(
    model: nn.Module, images: Tensor, class_idx: Tensor, with_gradients: bool = True
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Attention of every block of a transformer, its gradients, and the logits.

    Known are `nn.MultiheadAttention` over one batch-first sequence, as in torchvision's ViT, and timm's attention. They
    compute it step by step while this runs, since fused kernels do not show it.

    Args:
        model: one plain sequence headed by a class token; see `opticam.layouts.class_token_grid`.
        images: (B,C,H,W) float.
        class_idx: (B,) int64.
        with_gradients: else the second list is empty and nothing goes backward.

    Returns:
        A, (B,heads,N,N) a block, rows sum to 1; d y_c / d A, likewise; logits (B,C).

    Raises:
        ValueError: no such attention in the model; a class index out of range.
    """
    check_inputs(model, images, class_idx)
    grid = class_token_grid(model, images.shape[-2:])
    captured: list[Tensor] = []
    with frozen(model, compiled=False), _attention_shown(model, captured.append) as shown:
        x = prepared(model, images).requires_grad_(with_gradients)
        with torch.set_grad_enabled(with_gradients):
            logits = examine(unwrapped(model), x, class_idx).logits
        attention, names = list(captured), list(shown)  # to which whatever runs again later would add
        _check_attention(model, attention, names, grid, len(images))
        _check_reader(model, images[:1], cast(Tokens, grid))
        _check_reading_order(model, images)
        gradients: Sequence[Tensor] = ()
        if with_gradients:
            class_logits = class_logit(logits, for_autograd(class_idx))
            options = {"allow_unused": True, "materialize_grads": True}
            gradients = differentiate(model, class_logits.sum(), attention, **options)
    return [maps.detach() for maps in attention], list(gradients), logits.detach()


def block_attention_gradients(model: nn.Module, images: Tensor, class_idx: Tensor) -> tuple[list[Tensor], Tokens]:
    """Gradients of the class score of each block with respect to the attention of the same block.

    The class score of a block is what the final norm and the head of the network make of its output. Every block
    starts a graph of its own at its attention, so that the backward pass stays within the blocks.

    Args:
        model: a ViT of timm or torchvision, or a network that contains one whose head gives its logits.
        images: (B,C,H,W) float.
        class_idx: (B,) int64, the class c of each image.

    Returns:
        d s_c / d A, (B,heads,N,N) a block; and the layout of the N tokens.

    Raises:
        ValueError: no such transformer, or logits that are not those of its own head; a class index out of range.
    """
    check_inputs(model, images, class_idx)
    transformer = plain_transformer(model, pooled=True)
    if transformer is None:
        raise ValueError(_no_attention(model))
    grid = token_grid(transformer, images.shape[-2:])
    blocks, head = parts_of_transformer(transformer)
    captured: list[Tensor] = []
    outputs: list[Tensor] = []

    def restart_at_attention(maps: Tensor) -> Tensor:
        captured.append(maps.detach().requires_grad_())
        return captured[-1]

    def keep_graph(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.detach()

    with frozen(model, compiled=False), _attention_shown(model, restart_at_attention) as shown, ExitStack() as hooks:
        for block in blocks.children():
            hooks.enter_context(hooked(block, keep_graph))
        logits = examine(unwrapped(model), prepared(model, images), class_idx).logits
        attention, names, ends = list(captured), list(shown), list(outputs)
        _check_attention(model, attention, names, grid, len(images))
        _check_reading_order(model, images)
        weights = weights_of(model)  # in whose dtype the head is called, though the network may cast by itself
        half = torch.finfo(attention[0].dtype).bits < 32 or torch.finfo(logits.dtype).bits < 32
        ends = [end if weights is None else end.to(weights.dtype) for end in ends]
        scores = [as_output(model, head(end), len(images)).logits for end in ends]
        last, tolerance = scores[-1].detach().to(logits.dtype), 5e-2 if half else 1e-3
        if last.shape != logits.shape or not torch.allclose(last, logits, rtol=tolerance, atol=tolerance):
            raise ValueError(f"model: wanted logits that are those of the head of its {type(transformer).__name__}")
        total = sum(class_logit(score, for_autograd(class_idx)).sum() for score in scores)
        gradients = differentiate(model, total, attention)  # type: ignore[arg-type]
    return list(gradients), grid


@contextmanager
def _attention_shown(model: nn.Module, show: Callable[[Tensor], Tensor | None]) -> Iterator[list[str]]:
    """Hands every attention map to `show` while it is open; what that returns takes the map's place.

    Yields the names of the modules, one for each map.
    """
    names: list[str] = []

    def named(name: str, maps: Tensor) -> Tensor | None:
        names.append(name)
        return show(maps)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                undo.enter_context(hooked(module, partial(_attend, partial(named, name))))
            elif (dropout := module._modules.get("attn_drop")) is not None and "fused_attn" in vars(module):
                undo.enter_context(changed([(module, "fused_attn", False)]))
                undo.enter_context(hooked(dropout, lambda dropout, args, output, name=name: named(name, output)))
        yield names


def _attend(
    show: Callable[[Tensor], Tensor | None], module: nn.MultiheadAttention, args: tuple, output: tuple
) -> tuple[Tensor, Tensor | None]:
    own = len(args) > 2 and args[0] is args[1] is args[2]
    if not (module.batch_first and own and module.in_proj_weight is not None):
        raise ValueError("model: wanted self-attention over one batch-first sequence")
    query = args[0]
    projected = nn.functional.linear(query, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    shown = show(maps)
    maps = maps if shown is None else shown
    mine = module.out_proj((maps @ v).transpose(1, 2).flatten(2))
    if (mine - output[0]).abs().max() > 1e-2 * output[0].abs().max():
        raise ValueError("model: wanted self-attention without masks or further keys")
    weights = output[1]
    return mine, weights if weights is None else maps.mean(1) if weights.ndim == 3 else maps


def _check_attention(
    model: nn.Module, captured: Sequence[Tensor], names: Sequence[str], grid: Tokens | None, num_images: int
) -> None:
    """Refuse what is not one row of blocks, each of which has run once."""
    transformer = plain_transformer(model, pooled=True)
    blocks = getattr(transformer, "blocks", None)
    tokens = 0 if grid is None else grid.prefix + grid.rows * grid.columns
    plain = all(maps.ndim == 4 and len(maps) == num_images and maps.shape[2:] == (tokens, tokens) for maps in captured)
    one_row = len(set(names)) == len(names) and len({re.sub(r"\d+", "", name) for name in names}) == 1
    if not (captured and plain and one_row and (blocks is None or len(blocks) == len(captured))):
        raise ValueError(_no_attention(model))


def _check_reader(model: nn.Module, image: Tensor, grid: Tokens) -> None:
    """Refuse a head that reads more of the last block than the class token, which is taken for the first."""
    if model in _readers:
        return
    twin, _ = silent_twin(unwrapped(model))
    attention: list[Tensor] = []
    slope = torch.zeros(1, 1, 1, 1)
    with suppress(ValueError, RuntimeError), frozen(twin, compiled=False), _attention_shown(twin, attention.append):
        total = read(twin, prepared(model, image).requires_grad_()).logits.sum()  # refused where it hides gradients
        if attention:  # a copy does not reach what it calls by another way than its own parts
            (slope,) = torch.autograd.grad(total, attention[-1], allow_unused=True, materialize_grads=True)
    read_rows = (slope != 0).any(3).any(1).any(0)  # the tokens whose attention in the last block reaches a logit
    if not read_rows.any():  # such as before training, where heads may be zero
        return
    if read_rows[grid.prefix :].any() or not read_rows[0]:
        raise ValueError(
            f"model: the head of {type(bare(model)).__name__} does not read the first token alone; wanted one that "
            "reads the class token, which comes first, or a method that does not ask the class token"
        )
    _readers.add(model)


def _check_reading_order(model: nn.Module, images: Tensor) -> None:
    """Refuse a known transformer, if the user has told no layout, where somebody has put patches into another order.

    Two places of an image are changed; the tokens that enter the first block have to change there most.
    """
    transformer = plain_transformer(model, pooled=True)
    size = images.shape[2:]
    if transformer is None or told_layout(model) is not None or size in _in_order.setdefault(transformer, set()):
        return
    patches = next((module for module in transformer.modules() if isinstance(module, nn.Conv2d)), None)
    if patches is None or patches.kernel_size != patches.stride:
        return  # they may overlap, so that a neighbour may change most
    name = type(transformer).__name__
    told = "wanted opticam.wrap(network, layer, layout=...) with a function to (B,K,h,w)"
    blocks = list(parts_of_transformer(transformer)[0].children())
    for block in blocks:
        if not type(unwrapped(block)).__module__.startswith(("timm.", "torchvision.")):
            raise ValueError(f"layer: what {type(block).__name__} in {name} does with tokens is not known; {told}")
    rows, columns, _ = token_grid(transformer, size)
    places = (0, columns - 1), (rows - 1, 0)
    x = prepared(model, images[:1]).repeat(3, 1, 1, 1)
    cells = zip(size, (rows, columns), patches.stride, strict=True)  # of what is padded the last reaches beyond it
    high, wide = (step if math.ceil(side / step) == number else side / number for side, number, step in cells)
    for picture, (row, column) in zip(x[1:], places, strict=True):
        down, across = (round(place * side) for place, side in ((row, high), (column, wide)))
        picture[:, down : round(down + high), across : round(across + wide)] += 1
    twin, copies = silent_twin(unwrapped(model))
    entered: list[Tensor] = []
    first = hooked(copies[blocks[0]], lambda module, args, output: entered.append(args[0]))
    with suppress(Exception), frozen(twin, compiled=False), torch.no_grad(), first:  # it may take no three images
        read(twin, x)
    if entered and entered[0].ndim == 3 and len(entered[0]) == 3:
        prefix = entered[0].shape[1] - rows * columns
        moved, where = (entered[0][1:] - entered[0][:1]).double().square().sum(2).max(1)
        wanted = [prefix + row * columns + column for row, column in places]
        if (moved > 0).all() and where.tolist() != wanted:
            raise ValueError(f"layer: the tokens of {name} are not in the order of the patches of the images; {told}")
    _in_order[transformer].add(size)


_readers: WeakSet[nn.Module] = WeakSet()  # seen to read the class token alone
_in_order: WeakKeyDictionary[nn.Module, set[torch.Size]] = WeakKeyDictionary()  # for these sizes of images


def _no_attention(model: nn.Module) -> str:
    return (
        f"model: {type(bare(model)).__name__} has no attention over one plain sequence with a class token; wanted a "
        "ViT or DeiT of timm or torchvision, or opticam.wrap(network, layer, layout=Tokens(rows, columns, prefix)) for "
        "one like them, but not for legrad"
    )


def all_outputs(model: nn.Module, images: Tensor) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """What every module of the network gives in one pass, in the order in which they end.

    Args:
        model: any network.
        images: (B,C,H,W) float.

    Returns:
        Name, as `resolve_layer` takes it; the last output, None where that is not a tensor; the gradient of the sum of
        logits with respect to it, None where they do not depend on it. Some heads have zero weights before training:
        there the gradient is that of a sum of the head's input.
    """
    outputs: dict[str, Tensor | None] = {}
    given: list[Tensor] = []

    def keep(name: str, module: nn.Module, args: tuple, output: object) -> None:
        outputs.pop(name, None)
        outputs[name] = output if isinstance(output, Tensor) else None
        if isinstance(module, nn.Linear):
            given[:] = args

    with frozen(model, compiled=False), ExitStack() as hooks:
        for name, module in bare(model).named_modules():
            if name:
                hooks.enter_context(hooked(module, partial(keep, name)))
        logits = read(unwrapped(model), prepared(model, images).clone().requires_grad_()).logits
        target = logits.sum()
        if given and given[0].requires_grad:
            (slope,) = differentiate(model, target, given[0], retain_graph=True, allow_unused=True)
            if slope is not None and not slope.any():
                target = (given[0] * torch.linspace(1, 2, given[0].shape[-1]).to(given[0])).sum()
        inside = {name: output for name, output in outputs.items() if output is not None and output.requires_grad}
        gradients = differentiate(model, target, list(inside.values()), allow_unused=True)
    slopes = dict(zip(inside, gradients, strict=True))
    return [(name, None if output is None else output.detach(), slopes.get(name)) for name, output in outputs.items()]


@contextmanager
def count_passes(model: nn.Module) -> Iterator[list[int]]:
    """Counts, while it is open, the images that go through the whole network: [forward, backward].

    Passes of other threads are not counted, nor those by which `examine` looks closer, nor a split-off head's.
    """
    passes = [0, 0]

    def forward(module: nn.Module, args: tuple, output: Any) -> None:
        num_images = len(args[0])

        def backward(gradient: Tensor) -> None:
            passes[1] += num_images

        passes[0] += num_images
        logits = find_logits(output, num_images)
        if logits.requires_grad:
            logits.register_hook(backward)

    with hooked(model, forward):
        yield passes


@contextmanager
def watched(model: nn.Module, call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls `call(module)`, while it is open, whenever a module of the network has run; what it raises ends the pass.

    Convolutions and batch norms are left out, since hooks on them would keep them from being folded.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm):
                hooks.enter_context(hooked(module, lambda *_, module=module: call(module)))
        yield


@contextmanager
def _views(model: nn.Module, layer: nn.Module) -> Iterator[list[None]]:
    """Has an entry for each time that a layer's part of the network, the smallest with parameters, has run."""
    path = path_to(bare(model), layer)
    part = next((module for _, module in reversed(path) if next(module.parameters(), None) is not None), layer)
    views: list[None] = []
    with hooked(part, lambda module, args, output: views.append(None)):
        yield views


def _last(place: list[Tensor], views: list[None], module: nn.Module, output: Tensor) -> Tensor:
    """The output, which takes the place of an earlier one; said where that may be one of another view."""
    if place and views:
        text = f"layer: {type(module).__name__} runs several times in a pass, as on several views of an image"
        warnings.warn(f"{text}; its maps are those of the last time", stacklevel=2)
    return _tensor(output)


def _given(args: Iterable[object]) -> Iterator[object]:
    """What a layer was given, also in lists and tables."""
    for one in args:
        if isinstance(one, tuple | list | dict):
            yield from _given(one.values() if isinstance(one, dict) else one)
        else:
            yield one


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"layer: wanted one whose output is a tensor, got a {type(output).__name__}")
    if not output.is_floating_point():
        raise ValueError(f"layer: wanted one whose output is floating-point, got {output.dtype}")
    return output


def _reached(captured: list[Tensor], model: nn.Module, images: Tensor) -> Tensor:
    if not captured:
        raise ValueError("layer: the forward pass never reaches it")
    if captured[0].ndim == 0 or (len(captured[0]) != len(images) and not _has_own_layout(model)):
        raise ValueError(
            f"layer: its output {tuple(captured[0].shape)} does not begin with the {len(images)} images, but with "
            "windows, frames or tokens; wanted another layer, or opticam.wrap(network, layer, layout=...) with a "
            "function to (B,K,h,w)"
        )
    return captured[0]


def _check_first_axis(model: nn.Module, images: Tensor, layer: Layer, output: Tensor) -> None:
    """Of as many images as tokens, one alone tells which axis is whose."""
    if output.ndim == 3 and 1 < len(images) == output.shape[1] and not _has_own_layout(model):
        layer_outputs(model, images[:1], [layer])


def _has_own_layout(model: nn.Module) -> bool:
    layout = told_layout(model)
    return not (layout in (None, channels_first, channels_last) or isinstance(layout, Tokens))


def as_grid(output: Tensor, model: nn.Module, images: Tensor, layer: Layer = None) -> Tensor:
    """A layer's output as feature maps (B,K,h,w).

    Args:
        output: of the layer, for any number of images.
        model: any network.
        images: any tensor with H and W of the images as its last sides.
        layer: see `resolve_layer`. ValueError: the layout of its output is not known; see `opticam.layouts`.
    """
    return _grids([output], model, images, layer, len(output))[0]


def _grids(outputs: Sequence[Tensor], model: nn.Module, images: Tensor, layer: Layer, number: int) -> list[Tensor]:
    to_maps = find_layout(model, resolve_layer(model, layer), outputs[0], images.shape[-2:])
    try:
        grids = [to_maps(output) for output in outputs]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"layout: it fails for an output {tuple(outputs[0].shape)} of the layer ({reason})") from error
    for grid, output in zip(grids, outputs, strict=True):
        if not isinstance(grid, Tensor) or grid.ndim != 4 or len(grid) != number:
            got = str(tuple(grid.shape)) if isinstance(grid, Tensor) else type(grid).__name__
            raise ValueError(f"layout: wanted a function to (B,K,h,w), got {got} of {tuple(output.shape)}")
        check_patches(model, images.shape[2:], grid.shape[2:])
        if isinstance(to_maps, Tokens):
            _check_reading_order(model, images)
        if told_layout(model) is None:
            check_cells(images.shape[2:], grid.shape[2:])
        high, wide = (side / cells for side, cells in zip(images.shape[2:], grid.shape[2:], strict=True))
        if isinstance(to_maps, Tokens) and max(high, wide) > 2 * min(high, wide):
            told = f"cells of {high:.0f} x {wide:.0f} pixels by {to_maps}"
            warnings.warn(f"layout: {told}; check_layout tells whether that is right", stacklevel=4)
        if grid.shape[2:] == (1, 1):
            warnings.warn("layer: its maps have one cell, so saliency is 0; take one before pooling", stacklevel=4)
    return grids
