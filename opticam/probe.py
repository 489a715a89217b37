"""What is found by running a network: its target layer, and whether the cells of its maps answer to their places."""

import torch
from torch import Tensor, nn

from opticam.checks import check_images, check_network, check_whole
from opticam.classifier import bare, weights_of
from opticam.features import Layer, all_outputs, feature_maps
from opticam.layouts import find_layout, is_attention
from opticam.state import hooked


def default_layer(network: nn.Module, input_size: int = 224) -> str:
    """The target layer by a rule: the last maps that have more than one cell and that the logits depend on.

    Pooled maps do not count, nor what happens inside attention or before the first. In a transformer whose head reads
    only the class token, the patches of the last block reach no logit: there the rule gives the norm before the last
    attention.

    Args:
        network: takes images (1,C,S,S), C being 3 or the channels of its first convolution.
        input_size: S.

    Returns:
        The dotted name; of modules with the same output, that of the outermost.

    Raises:
        TypeError: a network of a wrong kind.
        ValueError: no such layer.
    """
    check_network(network)
    try:
        outputs = _all_outputs(network, 3, input_size)
    except ValueError:
        first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.in_channels == 3:
            raise
        outputs = _all_outputs(network, first.in_channels, input_size)
    modules = dict(bare(network).named_modules())
    attention = {name for name, _, _ in outputs if is_attention(modules[name])}
    found = ""
    for name, output, gradient in reversed(outputs):
        if name in attention and found:
            return found
        inside = any(name.startswith(f"{other}.") for other in attention)
        if found or inside or output is None or gradient is None or len(output) != 1 or _is_pooling(modules[name]):
            continue
        try:
            to_maps = find_layout(network, modules[name], output, (input_size, input_size))
        except ValueError:
            continue
        if (to_maps(gradient) != 0).any(1).sum() > 1:
            found = name
            if not attention or "Norm" in type(modules[name]).__name__:
                return found
    raise ValueError(f"layer: {type(bare(network)).__name__} has no layer whose maps are known; see opticam.wrap")


def _all_outputs(network: nn.Module, channels: int, side: int) -> list[tuple[str, Tensor | None, Tensor | None]]:
    images = torch.rand(1, channels, side, side, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    weights = weights_of(network)
    with hooked(bare(network), _twice):
        return all_outputs(network, images if weights is None else images.to(weights.device, weights.dtype))


def _twice(module: nn.Module, args: tuple, output: object) -> object:
    """One logit twice: beside its opposite, as `read` would give it, the sum of both has no gradient."""
    if isinstance(output, Tensor) and output.shape in ((1,), (1, 1)):
        return output.reshape(1, 1).repeat(1, 2)
    return output


def _is_pooling(module: nn.Module) -> bool:
    while isinstance(module, nn.Sequential) and len(module):
        module = list(module.children())[-1]
    return "Pool" in type(module).__name__ or type(module).__name__ == "Permute"


def check_layout(
    model: nn.Module, images: Tensor, *, layer: Layer = None, num_changes: int = 2, batch_size: int = 32
) -> Tensor:
    """Which cells of a layer's maps answer to their own place in the image, by experiment.

    The image is divided as the maps are. One place p after another is painted in one colour, and the change of each
    cell q is measured, `D_pq = || A_q(x_p) - A_q(x) ||`, over channels, images and colours. A cell answers if a change
    at its place changes it, or one of its eight neighbours (windows of strided convolutions lie up to half a cell
    beside the places), more than all others, and by more than rounding.

    A layout that is transposed, flipped, rolled, in another order or that takes a class token for a patch leaves cells
    without an answer, so True everywhere confirms a layout, but for a shift of a single cell that does not run over
    into the next row. False somewhere is a doubt, not a proof of the opposite: in deep networks with random weights, or
    where all places are mixed, no place may stand out. More images or changes then help.

    Args:
        model: any network. Left as found.
        images: (B,3,H,W) float that the network takes, such as photos.
        layer: see `features.resolve_layer`.
        num_changes: how many colours each place is painted in, of the darkest and the brightest by channel, drawn by a
            fixed seed.
        batch_size: images in flight.

    Returns:
        (h,w) bool, True where the cell answers, by B hw forward passes per change, and one more for the maps.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype; a network of a wrong kind.
        ValueError: an unknown layer or layout; maps with under 3 rows or columns, which are too few to tell.
    """
    check_images(model, images)
    check_whole(1, num_changes=num_changes, batch_size=batch_size)
    (features,), _ = feature_maps(model, images, layer)
    (rows, columns), (height, width) = features.shape[2:], images.shape[2:]
    if min(rows, columns) < 3:
        raise ValueError(f"images: wanted larger ones; maps of {rows}x{columns} cells are too small to tell")
    cells = torch.arange(rows * columns, device="cpu")
    i, j = cells // columns, cells % columns
    at_row = torch.arange(height, device="cpu") * rows // height == i[:, None]
    at_column = torch.arange(width, device="cpu") * columns // width == j[:, None]
    places = (at_row[:, None, :, None] & at_column[:, None, None, :]).to(images.device)  # (hw,1,H,W)
    generator = torch.Generator("cpu").manual_seed(0)
    low, high = images.aminmax()
    changes = torch.zeros(len(cells), len(cells), dtype=torch.float64, device="cpu")
    rounding = num_changes * (4 * torch.finfo(features.dtype).eps * features.double().norm(dim=(0, 1))).square().cpu()
    for image, own in zip(images, features, strict=True):
        for _ in range(num_changes):
            bright = torch.rand(len(image), 1, 1, generator=generator, device="cpu").to(images.device) < 0.5
            colour = torch.where(bright, high, low).expand_as(image)
            for part in cells.split(int(batch_size)):
                (maps,), _ = feature_maps(model, torch.where(places[part], colour, image), layer)
                changes[part] += (maps.double() - own.double()).square().sum(1).flatten(1).cpu()
    strongest = changes.argmax(1)
    near = ((i[strongest] - i).abs() <= 1) & ((j[strongest] - j).abs() <= 1)
    return (near & (changes.amax(1) > rounding.flatten()[strongest])).view(rows, columns)
