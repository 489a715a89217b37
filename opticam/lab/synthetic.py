"""Pictures whose evidence is known to the pixel: two patterned squares on a cloudy ground.

The pattern of a square is its class, and every pixel of the square shows it. So the box is the evidence, all of it and
nothing else. Each square speaks for one class, so a map must show which of the two it explains.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opticam.saliency import upsample

PATTERNS = ("horizontal", "vertical", "rising", "falling", "checks", "grid")


class Scenes(NamedTuple):
    """A batch of pictures and what is in them.

    Attributes:
        images: (B,3,S,S) float32 in [0,1].
        classes: (B,2) int64, the two patterns, different ones, as indices into `PATTERNS`.
        boxes: (B,2,4) float32, (xmin, ymin, xmax, ymax) of the two squares in whole pixels, end exclusive.
    """

    images: Tensor
    classes: Tensor
    boxes: Tensor


def draw_scenes(count: int, size: int = 64, seed: int = 0) -> Scenes:
    """Pictures of two squares side by side or one above the other, each with a pattern of its own.

    Where a wave of period S/8 is positive a square has its light colour, else its dark one: `sin v` (horizontal), `sin
    u` (vertical), `sin(u + v)` (rising), `sin(u - v)` (falling), `sin u sin v` (checks), `max(sin u, sin v) - 0.7`
    (grid), with random phases, colours, sides of 0.28 to 0.38 S and places. Colours say nothing about the class.

    Args:
        count: B.
        size: S, in pixels; a multiple of 8.
        seed: for everything that is random; a picture depends on the count too.

    Raises:
        ValueError: no picture, or a size that is not a multiple of 8.
    """
    if count < 1:
        raise ValueError(f"count: wanted at least 1 picture, got {count}")
    if size < 8 or size % 8:
        raise ValueError(f"size: wanted a multiple of 8 pixels, got {size}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    classes = uniform(len(PATTERNS)).argsort(1)[:, :2]
    boxes = _places(uniform(2, 3), uniform(1) < 0.5, size)
    centres = torch.arange(size) + 0.5
    x, y = centres, centres[:, None]
    across, down = (2 * math.pi * uniform(2, 2))[..., None, None].unbind(2)
    frequency = 16 * math.pi / size
    u, v = torch.broadcast_tensors(frequency * x + across, frequency * y + down)  # (B,2,S,S)
    a, b = u.sin(), v.sin()
    waves = torch.stack([b, a, (u + v).sin(), (u - v).sin(), a * b, torch.maximum(a, b) - 0.7], 2)
    light, dark = 0.6 + 0.4 * uniform(2, 3, 1, 1), 0.4 * uniform(2, 3, 1, 1)
    images = 0.2 + 0.4 * upsample(uniform(3, 8, 8), (size, size)) + 0.2 * uniform(3, size, size)
    for i in range(2):
        wave = waves[torch.arange(count), i, classes[:, i]][:, None]
        x0, y0, x1, y1 = boxes[:, i, :, None, None, None].unbind(1)
        inside = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
        images = torch.where(inside, torch.where(wave > 0, light[:, i], dark[:, i]), images)
    return Scenes(images, classes, boxes)


def _places(chance: Tensor, upright: Tensor, size: int) -> Tensor:
    """Boxes (B,2,4) in whole pixels, in a half of the picture each: left and right, or, upright, above and below."""
    side = (size * (0.28 + 0.1 * chance[..., 0])).round()
    along = (chance[..., 1] * (size // 2 - side + 1)).floor() + torch.tensor([0, size // 2])
    across = (chance[..., 2] * (size - side + 1)).floor()
    corners = torch.stack([torch.where(upright, across, along), torch.where(upright, along, across)], 2)
    return torch.cat([corners, corners + side[..., None]], 2)
