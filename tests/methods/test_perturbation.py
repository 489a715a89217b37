import numpy as np
import pytest
import references
import torch
from torch import nn

from opticam.methods import perturbation
from opticam.methods.perturbation import _rise_masks, blur_pyramid, extremal_perturbation, rise
from opticam.saliency import min_max


def test_rise_agrees_with_the_loop_version(tiny, images, class_idx):
    saliency = rise(tiny, images, class_idx, num_masks=9, p=0.4, seed=3, batch_size=4)
    masks = torch.cat(list(_rise_masks(9, 8, 0.4, images.shape[-2:], 3, 9)))[:, 0].numpy()
    for b in range(5):
        total = references.rise(tiny, images[b].numpy(), int(class_idx[b]), list(masks), 0.4)
        np.testing.assert_allclose(saliency[b, 0], references.min_max(total), rtol=0, atol=1e-9)


def test_masks_of_rise_are_grids_a_cell_larger_cut_at_random():
    generator = torch.Generator().manual_seed(7)
    places = set()
    for mask in torch.cat(list(_rise_masks(40, 8, 0.3, torch.Size((24, 36)), 7, 1))):
        grid = (torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64) < 0.3).double()[0, 0].numpy()
        top, left = (int(torch.randint(step, (), generator=generator)) for step in (3, 5))
        places.add((top, left))
        np.testing.assert_allclose(mask[0], references.rise_mask(grid, top, left, 24, 36), rtol=0, atol=1e-12)
    assert len(places) > 10
    many = torch.cat(list(_rise_masks(2000, 8, 0.1, torch.Size((24, 24)), 0, 100)))
    assert many.mean() == pytest.approx(0.1, abs=0.005)


class Corner(nn.Module):
    """Class 1 where the top left quarter of the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, images):
        evidence = self.scale * images[:, :, :28, :28].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(evidence), evidence], 1)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (rise, {"num_masks": 400, "p": 0.3}),
        pytest.param(extremal_perturbation, {"area": 0.25}, marks=pytest.mark.slow),
    ],
)
def test_finds_the_quarter_that_counts(method, options):
    pattern = (torch.arange(56)[:, None] + torch.arange(56)) % 2  # a chequerboard, which blurring dims to grey
    images = pattern.float().expand(1, 3, 56, 56).clone()
    images[:, :, :28, :28] = images[:, :, :28, :28].pow(0.5)
    model = Corner() if method is rise else _Contrast()
    saliency = method(model, images, torch.tensor([1]), **options)[0, 0]
    inside, outside = saliency[4:24, 4:24].mean(), saliency[32:, 32:].mean()
    assert inside > outside + 0.25


class _Contrast(Corner):
    """Class 1 where the top left quarter is sharp."""

    def forward(self, images):
        corner = images[:, :, :28, :28]
        evidence = 60 * self.scale * (corner[..., 1:] - corner[..., :-1]).abs().mean((1, 2, 3))
        return torch.stack([torch.zeros_like(evidence), evidence], 1)


@pytest.mark.slow
def test_extremal_perturbation_agrees_with_the_loop_version(tiny):
    images = torch.rand(1, 3, 10, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    louder = nn.Sequential(tiny, _Times(50))
    # two steps, as the third makes the mask of so few cells zero
    saliency = extremal_perturbation(louder, images, torch.tensor([3]), num_steps=2, area=0.225)
    mask = references.extremal_perturbation(louder, images[0].numpy(), 3, 2, 0.225)
    assert np.ptp(mask) > 0.01
    np.testing.assert_allclose(saliency[0, 0], references.min_max(mask), rtol=0, atol=1e-6)


class _Times(nn.Module):
    def __init__(self, factor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def test_blur_pyramid_agrees_with_the_loop_version():
    images = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    pyramid = blur_pyramid(images)
    for level, sigma in ((0, 20), (3, 80 / 7), (6, 20 / 7)):
        blurred = references.gaussian(images[1].numpy(), sigma)
        np.testing.assert_allclose(pyramid[1, level], blurred, rtol=0, atol=1e-12)
    assert torch.equal(pyramid[:, 7], images)


@pytest.mark.slow
def test_the_area_asked_for_is_kept(tiny, images, class_idx):
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    for area in (0.2, 0.5):
        saliency = extremal_perturbation(tiny, large[:1], class_idx[:1], area=area, num_steps=200)
        assert min_max(saliency).gt(0.5).double().mean() == pytest.approx(area, abs=0.12)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (rise, {"p": 0.0}, "p: wanted a probability above 0, got 0.0"),
        (rise, {"p": "0.5"}, r"^p: wanted a number, got '0\.5'$"),
        (rise, {"seed": None}, "^seed: wanted a number, got None$"),
        (rise, {"seed": 1.5}, r"^seed: wanted a whole number, got 1\.5$"),
        (rise, {"seed": 10**30}, "^seed: wanted a number of at most 64 bits, got 10+$"),
        (rise, {"batch_size": None}, "^batch_size: wanted a whole number, got None$"),
        (rise, {"batch_size": True}, "^batch_size: wanted a whole number, got True$"),
        (extremal_perturbation, {"num_steps": None}, "^num_steps: wanted a number, got None$"),
        (extremal_perturbation, {"area": None}, "^area: wanted a number, got None$"),
        (rise, {"num_masks": 0}, "num_masks: wanted at least 1, got 0"),
        (extremal_perturbation, {"area": 1.0}, "area: wanted a share of the image between 0 and 1, got 1.0"),
        (extremal_perturbation, {"num_steps": 0}, "num_steps: wanted at least 1, got 0"),
        (extremal_perturbation, {"class_idx": torch.tensor([9] * 5)}, r"class_idx: wanted indices in 0\.\.4, got 9"),
        (rise, {"class_idx": torch.tensor([9] * 5)}, r"class_idx: wanted indices in 0\.\.4, got 9"),
    ],
)
def test_bad_input_in_one_sentence(tiny, images, class_idx, method, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        method(tiny, images, **{"class_idx": class_idx, **change})


def test_rounding_orders_the_equal_pixels_of_the_first_mask(tiny, images, class_idx, monkeypatch):
    """So maps of two devices agree to hundredths only (test_contract.py). Noise of the image has no such effect."""
    monkeypatch.setattr(perturbation, "SIGMA", 2.0)
    generator = torch.Generator().manual_seed(4)
    smooth, saliency = perturbation.smooth_mask, extremal_perturbation(tiny, images, class_idx, num_steps=4)

    def apart(images):
        return (extremal_perturbation(tiny, images, class_idx, num_steps=4) - saliency).abs().max()

    def rounded(*given):
        S = smooth(*given)
        return S + 1e-15 * torch.randn(S.shape, dtype=S.dtype, generator=generator)

    assert apart((images + 1e-12 * torch.rand(images.shape, generator=generator)).clamp(max=1)) < 1e-9
    monkeypatch.setattr(perturbation, "smooth_mask", rounded)
    assert 1e-4 < max(apart(images) for _ in range(4)) < 0.02
