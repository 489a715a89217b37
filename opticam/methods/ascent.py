"""How the weights of the feature maps are found: in which space, by which optimiser, and when an image stops."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from opticam.saliency import combine

Maps = Sequence[Tensor]
Point = tuple[Tensor, ...]
Optimizer = Callable[[Tensor, float, int], tuple[torch.optim.Optimizer, LRScheduler | None]]

PROJECTION_STEPS = 20


class Space(NamedTuple):
    """Where the objective is climbed.

    A point is a tuple of tensors (B, ...), a row per image. The optimiser moves the first; the others go with it. All
    four are functions of a point (`start`: of u, (B,K)) and of the non-negative features (B,K,h,w) of each layer.

    Attributes:
        start: the point whose weights are softmax(u).
        sums: `sum_k w_k A_k`, (B,1,h,w) per layer, differentiable.
        settle: brings the point, after a step and in place, back to where weights exist for it.
        weights: (B,K), layer after layer, non-negative, sum 1 over each layer.
    """

    start: Callable[[Tensor, Maps], Point]
    sums: Callable[[Point, Maps], list[Tensor]]
    settle: Callable[[Point, Maps], None]
    weights: Callable[[Point, Maps], Tensor]


def _by_layer(weights: Tensor, features: Maps) -> Sequence[Tensor]:
    return weights.split([maps.shape[1] for maps in features], 1)


def _softmax(u: Tensor, features: Maps) -> Tensor:
    return torch.cat([of_layer.softmax(1) for of_layer in _by_layer(u, features)], 1)


def _sums(weights: Tensor, features: Maps) -> list[Tensor]:
    return [combine(maps, w) for maps, w in zip(features, _by_layer(weights, features), strict=True)]


weight_space = Space(
    start=lambda u, features: (u,),
    sums=lambda point, features: _sums(_softmax(point[0], features), features),
    settle=lambda point, features: None,
    weights=lambda point, features: _softmax(point[0], features),
)
"""The paper's: free variables u, their softmax the weights."""


def _scaled(weights: Tensor, features: Maps) -> Point:
    """A point of map space: the cells of the maps and the weights that make them, the largest cell of a layer 1."""
    sums = _sums(weights, features)
    highs = [torch.where(high > 0, high, 1) for high in (maps.amax((2, 3)) for maps in sums)]
    scaled = [w / high for w, high in zip(_by_layer(weights, features), highs, strict=True)]
    cells = [maps.flatten(1) / high for maps, high in zip(sums, highs, strict=True)]
    return torch.cat(cells, 1), torch.cat(scaled, 1)


def _maps(point: Point, features: Maps) -> list[Tensor]:
    """The cells as a map (B,h,w) per layer."""
    cells = point[0].split([maps[0, 0].numel() for maps in features], 1)
    return [z.unflatten(1, maps.shape[2:]) for z, maps in zip(cells, features, strict=True)]


def _as_shares(point: Point, features: Maps) -> list[Tensor]:
    parts = zip(_maps(point, features), _by_layer(point[1], features), strict=True)
    return [z[:, None] / w.sum(1)[:, None, None, None] for z, w in parts]


@torch.no_grad()
def _project(point: Point, features: Maps) -> None:
    """Weights `w >= 0` whose map is near the one stepped to, `min_w |sum_k w_k A_k - z|^2`, by multiplicative updates.

    Reference:
        Lee, Seung, Algorithms for non-negative matrix factorization, NIPS 2000, eq. 4 with the factor A held.
    """
    found = []
    for maps, z, w in zip(features, _maps(point, features), _by_layer(point[1], features), strict=True):
        z = z.relu()
        wanted = _products(maps, z)
        for _ in range(PROJECTION_STEPS):
            made = _products(maps, combine(maps, w)[:, 0])
            w = torch.where((made > 0) & (z.amax((1, 2)) > 0)[:, None], w * wanted / made, w)
        found.append(w)
    for old, new in zip(point, _scaled(torch.cat(found, 1), features), strict=True):
        old.copy_(new)


def _products(maps: Tensor, z: Tensor) -> Tensor:
    """Of each map (B,K,h,w) with z (B,h,w), (B,K)."""
    with torch.autocast(maps.device.type, enabled=False):  # the caller's would make the sum coarse
        return torch.einsum("bkhw,bhw->bk", maps, z)


map_space = Space(
    start=lambda u, features: _scaled(_softmax(u, features), features),
    sums=_as_shares,
    settle=_project,
    weights=lambda point, features: torch.cat([w / w.sum(1, keepdim=True) for w in _by_layer(point[1], features)], 1),
)
"""The cells of the map themselves, projected after every step onto what non-negative weights can make.

The same maps as in `weight_space`, by far fewer steps: each moves a cell by what helps it, while there hundreds of
feature maps have to agree first. Learning rates are shares of the largest cell. Made for one layer and a normalisation
that ignores the scale; else it holds, but a step may not reach as far.
"""


def adam(point: Tensor, lr: float, num_steps: int) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """The paper's optimiser: Adam, betas (0.9, 0.999), eps 1e-8, constant learning rate."""
    return torch.optim.Adam([point], lr=lr, betas=(0.9, 0.999), eps=1e-8, maximize=True), None


def adam_cosine(
    point: Tensor, lr: float, num_steps: int, betas: tuple[float, float] = (0.5, 0.7)
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Adam, by default with short memory, its learning rate falling to 0 by half a cosine over the steps."""
    optimizer = torch.optim.Adam([point], lr=lr, betas=betas, eps=1e-8, maximize=True)
    return optimizer, CosineAnnealingLR(optimizer, max(num_steps, 1))


class Progress:
    """What images have seen on their way up, row by row, and which of them still work.

    Attributes:
        rows: the images at work, as an index; views, not copies, until one stops.
        history: (B,T+1), the objective at every step; NaN once an image has stopped.
        best: the point with the largest objective so far.
    """

    def __init__(self, point: Point, num_steps: int, tol: float, patience: int) -> None:
        first = point[0].detach()
        self.tol, self.patience = tol, patience
        self.rows: Tensor | slice = slice(None)
        self.history = first.new_full((len(first), num_steps + 1), torch.nan)
        self.best: Point = tuple(part.detach().clone() for part in point)
        self.highest = first.new_full((len(first),), -torch.inf)
        self.goal, self.stale = self.highest.clone(), torch.zeros_like(self.highest, dtype=torch.int64)

    def add(self, step: int, value: Tensor, point: Point) -> bool:
        """Record the objective (n,) of the rows at work, and their point; returns whether any of them goes on."""
        rows = self.rows
        self.history[rows, step] = value
        better = value > self.highest[rows]
        self.highest[rows] = torch.where(better, value, self.highest[rows])
        for best, part in zip(self.best, point, strict=True):
            best[rows] = torch.where(better[:, None], part.detach()[rows], best[rows])
        if self.tol == 0:
            return True
        goal = self.goal[rows]
        gained = ~(value <= goal + self.tol * goal.abs())  # true at first, where the goal is -inf
        self.goal[rows] = torch.where(gained, value, goal)
        self.stale[rows] = torch.where(gained, 0, self.stale[rows] + 1)
        working = self.stale[rows] < self.patience
        if not working.all():  # the one synchronisation, and only where a tolerance was asked for
            self.rows = torch.arange(len(self.stale), device=value.device)[rows][working]
        return bool(working.any())
