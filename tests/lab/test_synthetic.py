import numpy as np
import pytest
import torch

from opticam.lab.synthetic import PATTERNS, draw_scenes


def square(scenes, i, k):
    """The pixels of square k as 0/1, and its two colours, darker first."""
    x0, y0, x1, y1 = scenes.boxes[i, k].int().tolist()
    pixels = scenes.images[i, :, y0:y1, x0:x1].permute(1, 2, 0).numpy()
    colors, which = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    order = colors.sum(1).argsort()
    return (which.reshape(pixels.shape[:2]) == order[-1]).astype(int), colors[order]


def shows(bits, pattern):
    """The property of the pattern, pixel by pixel."""
    n = len(bits)
    rows, columns = [all(row) for row in bits], [all(column) for column in bits.T]
    pairs = [(i, j) for i in range(n - 1) for j in range(n - 1)]
    return {
        "horizontal": all(bits[i, j] == bits[i, 0] for i in range(n) for j in range(n)),
        "vertical": all(bits[i, j] == bits[0, j] for i in range(n) for j in range(n)),
        "rising": all(bits[i + 1, j] == bits[i, j + 1] for i, j in pairs),  # rows count downwards
        "falling": all(bits[i, j] == bits[i + 1, j + 1] for i, j in pairs),
        "checks": all((bits[i] == bits[0]).all() or (bits[i] == 1 - bits[0]).all() for i in range(n)),
        "grid": all(bits[i, j] == (rows[i] or columns[j]) for i in range(n) for j in range(n)),
    }[pattern]


def test_every_square_shows_its_pattern_in_two_colours_up_to_its_box():
    scenes = draw_scenes(40, seed=1)
    strict = ["rising", "falling", "checks", "grid"]  # stripes are checks, and a grid, of one direction
    for i in range(40):
        for k in range(2):
            bits, colors = square(scenes, i, k)
            pattern = PATTERNS[scenes.classes[i, k]]
            assert len(colors) == 2
            assert shows(bits, pattern)
            assert not any(shows(bits, other) for other in strict if other != pattern and pattern in strict)
            x0, y0, x1, y1 = scenes.boxes[i, k].int().tolist()
            around = scenes.images[i].permute(1, 2, 0).numpy()[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
            inside = sum((around == color).all(2).sum() for color in colors)
            assert inside == (y1 - y0) * (x1 - x0)


def test_two_squares_of_different_classes_apart_and_inside():
    scenes = draw_scenes(300, size=32, seed=2)
    assert scenes.images.shape == (300, 3, 32, 32)
    assert 0 <= scenes.images.min() < scenes.images.max() <= 1
    assert (scenes.classes[:, 0] != scenes.classes[:, 1]).all()
    assert set(scenes.classes.flatten().tolist()) == set(range(len(PATTERNS)))
    low, high = scenes.boxes[..., :2], scenes.boxes[..., 2:]
    assert low.min() == 0
    assert high.max() == 32
    sides = high - low
    assert (sides[..., 0] == sides[..., 1]).all()
    assert set(sides.flatten().tolist()) == {9, 10, 11, 12}  # 0.28 * 32 = 8.96 to 0.38 * 32 = 12.16, rounded
    overlap = torch.minimum(high[:, 0], high[:, 1]) - torch.maximum(low[:, 0], low[:, 1])
    assert (overlap.amin(1) <= 0).all()
    assert 100 < (overlap[:, 0] <= 0).sum() < 250  # side by side or above each other, by the toss of a coin


def test_a_seed_says_all_and_touches_no_other_randomness():
    before = torch.get_rng_state()
    a, b, c = (draw_scenes(3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a.images, c.images)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="count: wanted at least 1 picture, got 0"):
        draw_scenes(0)
    with pytest.raises(ValueError, match="size: wanted a multiple of 8 pixels, got 60"):
        draw_scenes(1, size=60)
