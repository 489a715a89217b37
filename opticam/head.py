"""The part of a network after a layer: all that has to run again when only that layer's output changes."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from opticam.classifier import as_output, turn
from opticam.features import Layer, count_calls, layer_outputs, logits_with, prepared, resolve_layer
from opticam.folding import twin_of
from opticam.state import frozen
from opticam.tracing import Tracer

Head = Callable[[Tensor, Tensor], Tensor]


def split_head(model: nn.Module, images: Tensor, layer: Layer = None) -> tuple[Head, Tensor, Tensor]:
    """The function from the output of a layer to the logits, that output, and the logits.

    The network is traced by torch.fx and cut after the layer; what else its second part needs of the first, such as the
    stream that a residual block adds to, is computed once. Where tracing fails, or the cut network's logits are not
    those of the network, for its own output and for a changed one, the whole network is run with the output replaced;
    of a layer that it calls several times, the last output.

    Args:
        model: takes `images`, see `classifier.read`. Left as found.
        images: (B,3,H,W).
        layer: see `resolve_layer`.

    Returns:
        (head, output, logits): the function from outputs (n, ...) in the layer's own layout, and the rows (n,) int64 of
        the images that they stand for, to logits (n,C), without gradients; the layer's output (B, ...); logits (B,C).

    Raises:
        ValueError: see `resolve_layer`; a layer whose output the network keeps in an attribute and reads later.
    """
    module = resolve_layer(model, layer)
    (output,), logits = layer_outputs(model, images, [module])
    calls = 1

    def whole(changed: Tensor, rows: Tensor) -> Tensor:
        return logits_with(model, images[rows], module, changed, calls)

    rows, tolerance = torch.arange(len(images), device=images.device), 100 * torch.finfo(logits.dtype).eps
    try:
        cut = _cut(model, images, module)
        twice = torch.cat([rows, rows.flip(0)])
        own, changed = cut(output[twice], twice), cut(output / 2, rows)
        exact = (own, logits[twice]), (changed, whole(output / 2, rows))
        if all((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1) for a, b in exact):
            return cut, output, logits
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, NameError):
        pass  # whatever a tracer may choke on: the whole network is always right
    calls = count_calls(model, images[:1], module)  # the output is that of the last
    half = output / 2
    with_kept = logits_with(model, images, module, half, calls, kept=True)
    if (with_kept - whole(half, rows)).abs().max() > tolerance * with_kept.abs().max().clamp(min=1):
        raise ValueError(
            f"layer: {type(module).__name__} keeps its output aside for a later part of the network, where nothing can "
            "take its place; wanted another layer, or a method by gradients"
        )
    return whole, output, logits


def _downstream(graph: fx.Graph, nodes: list[fx.Node]) -> set[fx.Node]:
    """These nodes and all that is computed from them."""
    found = set(nodes)
    for node in graph.nodes:  # each after those that it is computed from
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _cut(model: nn.Module, images: Tensor, layer: nn.Module) -> Head:
    with frozen(model), torch.no_grad(), turn(model):
        twins: dict[nn.Module, nn.Module] = {}
        twin = twin_of(model, twins)  # or a network that keeps things in attributes would keep proxies
        holders = {twins[m] for m in twins if m is not layer and any(inner is layer for inner in m.modules())}
        graph = Tracer(holders.__contains__).trace(twin)  # only the modules that contain the layer are cut
        modules = dict(model.named_modules(remove_duplicate=False))
        (place,) = [node for node in graph.nodes if node.op == "call_module" and modules[node.target] is layer]
        after = _downstream(graph, [place]) - {place}
        of_images = _downstream(graph, [node for node in graph.nodes if node.op == "placeholder"])
        needed = [*{node for later in after for node in later.all_input_nodes} - after - {place}]
        first, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        first.graph_copy(graph, copies)
        first.output(tuple(copies[node] for node in needed))
        x = prepared(model, images).clone()  # the network may work in place
        values = dict(zip(needed, fx.Interpreter(model, graph=first).run(x), strict=True))

    def head(changed: Tensor, rows: Tensor) -> Tensor:
        known: dict[fx.Node, object] = dict.fromkeys(node for node in graph.nodes if node not in after)
        for node, value in values.items():
            per_image = isinstance(value, Tensor) and node in of_images
            known[node] = value[rows] if per_image else value
        known[place] = changed.clone()
        with frozen(model), torch.no_grad(), turn(model):
            return as_output(model, fx.Interpreter(model, graph=graph).run(initial_env=known), len(rows)).logits

    return head
