"""How the weights of the feature maps are found: in which space, by which optimiser, in how many steps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from opticam.saliency import combine

Maps = Sequence[Tensor]
Rows = Tensor | slice
Optimizer = Callable[[Tensor, float, int], tuple[torch.optim.Optimizer, LRScheduler | None]]

PROJECTION_STEPS = 20


class Space(NamedTuple):
    """Where the objective is climbed: what a point (B,P) there stands for.

    All four are functions of a point (`start`: of u, (B,K)) and of non-negative features (B,K,h,w) of each layer.

    Attributes:
        start: the point whose weights are softmax(u).
        sums: `sum_k w_k A_k`, (B,1,h,w) a layer, differentiable.
        settle: the point an optimiser has stepped to, brought back to where weights exist for it.
        weights: (B,K), layer after layer, non-negative, sum 1 over each layer.
    """

    start: Callable[[Tensor, Maps], Tensor]
    sums: Callable[[Tensor, Maps], list[Tensor]]
    settle: Callable[[Tensor, Maps], Tensor]
    weights: Callable[[Tensor, Maps], Tensor]


def _widths(features: Maps) -> list[int]:
    return [maps.shape[1] for maps in features]


def _softmax(u: Tensor, features: Maps) -> Tensor:
    return torch.cat([of_layer.softmax(1) for of_layer in u.split(_widths(features), 1)], 1)


def _sums(weights: Tensor, features: Maps) -> list[Tensor]:
    parts = weights.split(_widths(features), 1)
    return [combine(maps, w) for maps, w in zip(features, parts, strict=True)]


weight_space = Space(
    start=lambda u, features: u,
    sums=lambda u, features: _sums(_softmax(u, features), features),
    settle=lambda u, features: u,
    weights=_softmax,
)
"""The paper's: free variables u, their softmax the weights."""


def _pack(weights: Tensor, features: Maps) -> Tensor:
    """A point of map space: weights, and the maps they make, both scaled until the largest cell of a layer is 1."""
    sums = _sums(weights, features)
    highs = [torch.where(high > 0, high, 1) for high in (maps.amax((2, 3)) for maps in sums)]
    parts = weights.split(_widths(features), 1)
    scaled = [w / high for w, high in zip(parts, highs, strict=True)]
    return torch.cat([*scaled, *(maps.flatten(1) / high for maps, high in zip(sums, highs, strict=True))], 1)


def _unpack(point: Tensor, features: Maps) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features (B,K,h,w), weights (B,K) and map (B,h,w) of each layer."""
    parts = point.split([*_widths(features), *(maps[0, 0].numel() for maps in features)], 1)
    weights, cells = parts[: len(features)], parts[len(features) :]
    return [
        (maps, w.detach(), z.unflatten(1, maps.shape[2:])) for maps, w, z in zip(features, weights, cells, strict=True)
    ]


def _project(point: Tensor, features: Maps) -> Tensor:
    """Weights `w >= 0` whose map is near the one stepped to, `min_w |sum_k w_k A_k - z|^2`, by multiplicative updates.

    Reference:
        Lee, Seung, Algorithms for non-negative matrix factorization, NIPS 2000, eq. 4 with the factor A held.
    """
    found = []
    for maps, w, z in _unpack(point, features):
        z = z.relu()
        wanted = torch.einsum("bkhw,bhw->bk", maps, z)
        for _ in range(PROJECTION_STEPS):
            made = torch.einsum("bkhw,bhw->bk", maps, combine(maps, w)[:, 0])
            w = torch.where((made > 0) & (z.amax((1, 2)) > 0)[:, None], w * wanted / made, w)
        found.append(w)
    return _pack(torch.cat(found, 1), features)


map_space = Space(
    start=lambda u, features: _pack(_softmax(u, features), features),
    sums=lambda point, features: [z[:, None] / w.sum(1)[:, None, None, None] for _, w, z in _unpack(point, features)],
    settle=_project,
    weights=lambda point, features: torch.cat([w / w.sum(1, keepdim=True) for _, w, _ in _unpack(point, features)], 1),
)
"""The cells of the map themselves, projected after every step onto what non-negative weights can make.

The same maps as in `weight_space`, but a step moves each cell by what helps it, while there hundreds of feature maps
that lie across each other have to agree first; so far fewer steps are needed. Learning rates are shares of the largest
cell. Made for one layer and a normalisation that ignores the scale; else it holds, but a step may not reach as far.
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


SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"space": weight_space, "optimizer": adam, "num_steps": 100, "lr": 0.1},
    "fast": {"space": map_space, "optimizer": adam_cosine, "num_steps": 18, "lr": 0.3},
}


def maximise(
    problem: Callable[[Rows], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
    start: Tensor,
    optimizer: Callable[[Tensor], tuple[torch.optim.Optimizer, LRScheduler | None]],
    num_steps: int,
    tol: float,
    patience: int,
) -> tuple[Tensor, Tensor]:
    """Climb from `start`, row by row: the best points seen (B,P), and the objective at every step (B,T+1).

    `problem` gives, for the rows still at work, the function from their points to their objective, and `settle`.
    """
    rows: Rows = slice(None)  # views, not copies, until an image stops
    point = start.clone().requires_grad_()
    ascent, decay = optimizer(point)
    history = start.new_full((len(start), num_steps + 1), torch.nan)
    best, best_point = start.new_full((len(start),), -torch.inf), start.clone()
    goal, stale = best.clone(), torch.zeros_like(start[:, 0], dtype=torch.int64)
    objective, settle = problem(rows)
    for step in range(num_steps + 1):
        value = objective(point)
        now = value.detach()
        history[rows, step] = now
        better = now > best[rows]
        best[rows] = torch.where(better, now, best[rows])
        best_point[rows] = torch.where(better[:, None], point.detach(), best_point[rows])
        if step == num_steps:
            break
        (point.grad,) = torch.autograd.grad(value.sum(), point)
        ascent.step()
        with torch.no_grad():
            point.copy_(settle(point))
        if decay is not None:
            decay.step()
        if tol > 0:
            gained = ~(now <= goal[rows] + tol * goal[rows].abs())  # true at first, where the goal is -inf
            goal[rows] = torch.where(gained, now, goal[rows])
            stale[rows] = torch.where(gained, 0, stale[rows] + 1)
            working = stale[rows] < patience
            if not working.all():  # the one synchronisation, and only where a tolerance was asked for
                rows = torch.arange(len(start), device=start.device)[rows][working]
                if len(rows) == 0:
                    break
                point = _keep_rows(point, working, ascent)
                objective, settle = problem(rows)
    return best_point, history


def _keep_rows(point: Tensor, working: Tensor, ascent: torch.optim.Optimizer) -> Tensor:
    """The working rows of `point` as the optimiser's new parameter, its moments cut alike."""
    kept = point.detach()[working].requires_grad_()
    state = ascent.state.pop(point)
    ascent.state[kept] = {
        name: value[working] if isinstance(value, Tensor) and value.shape == point.shape else value
        for name, value in state.items()
    }
    ascent.param_groups[0]["params"] = [kept]
    return kept
