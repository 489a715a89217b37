import numpy as np
import pytest
import references
import torch

from opticam.saliency import (
    apply_mask,
    baseline_of,
    blur,
    check_saliency,
    combine,
    gray,
    max_only,
    mean_color,
    min_max,
    saliency_map,
    sigmoid,
    upsample,
)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_combine_is_the_weighted_sum():
    features, weights = rand(2, 4, 3, 5), rand(2, 4)
    for b in range(2):
        expected = references.weighted_sum(features[b].numpy(), weights[b].numpy())
        np.testing.assert_allclose(combine(features, weights)[b, 0], expected, atol=1e-13)


def test_what_is_no_image_or_map_of_it_is_not_masked():
    with pytest.raises(TypeError, match=r"images: wanted a floating-point dtype, got torch\.uint8"):
        apply_mask(torch.ones(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 0.5))
    for shape in ((3, 2, 2), (1, 3, 2, 2)):
        with pytest.raises(ValueError, match="saliency: wanted one map per image"):
            apply_mask(torch.ones(3, 3, 2, 2), torch.ones(shape))


def test_the_callers_autocast_does_not_make_the_sum_coarse():
    features, weights = torch.rand(2, 4, 3, 5), torch.rand(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = combine(features, weights)
    assert torch.equal(found, combine(features, weights))
    assert torch.equal(combine(features.bfloat16(), weights), combine(features.bfloat16().float(), weights))


@pytest.mark.parametrize("size", [(9, 13), (24, 32), (3, 5), (2, 2)])
def test_upsample_is_bilinear_with_pixel_centres(size):
    maps = rand(2, 1, 3, 5)
    for b in range(2):
        np.testing.assert_allclose(
            upsample(maps, size)[b, 0], references.upsample(maps[b, 0].numpy(), *size), atol=1e-13
        )


def test_upsample_worked_example():
    # 2 -> 4 pixels: centres at -0.25 (repeats 0), 0.25, 0.75, 1.25 (repeats 1)
    assert upsample(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


def test_min_max_is_per_image_and_invariant_to_scale_and_offset():
    maps = rand(3, 1, 4, 6)
    for b in range(3):
        np.testing.assert_allclose(min_max(maps)[b, 0], references.min_max(maps[b, 0].numpy()), atol=1e-15)
    torch.testing.assert_close(min_max(7 * maps - 2), min_max(maps), rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e30, 1e-30])
def test_min_max_of_a_constant_is_zero(value):
    assert (min_max(torch.full((2, 1, 4, 4), value)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_an_interpolated_constant_is_not_stretched(dtype):
    constants = rand(64).to(dtype)
    maps = upsample(constants[:, None, None, None].expand(64, 1, 7, 7), (240, 240))
    assert (maps.amax((1, 2, 3)) > maps.amin((1, 2, 3))).any()  # else this test shows nothing
    assert (min_max(maps) == 0).all()


def test_small_but_real_differences_survive():
    maps = torch.full((1, 1, 2, 2), 1.0)
    maps[..., 0, 0] += 1e-5
    assert min_max(maps).flatten().tolist() == [1, 0, 0, 0]


def test_gradient_of_a_constant_map_is_finite():
    maps = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(min_max(maps).sum(), maps)
    assert gradient.isfinite().all()


def test_saliency_map_cuts_negative_values_before_it_interpolates():
    # relu first: [0, 0, 1] upsampled to 6; the other order would start above 0 later
    maps = torch.tensor([[[[-1.0, -1.0, 1.0]]]])
    expected = references.min_max(references.upsample(np.array([[0.0, 0.0, 1.0]]), 1, 6))
    np.testing.assert_allclose(saliency_map(maps, (1, 6))[0, 0], expected, atol=1e-7)


def test_apply_mask_keeps_dtype_and_multiplies_every_channel():
    image = rand(1, 3, 2, 2).half()
    masked = apply_mask(image, torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]]))
    assert masked.dtype == torch.float16
    assert (masked[0, :, 0, 0] == 0).all()
    assert torch.equal(masked[0, :, 0, 1], image[0, :, 0, 1])
    assert torch.equal(masked[0, :, 1, 0], image[0, :, 1, 0] * 0.5)


def test_other_normalisations():
    maps = rand(3, 1, 4, 6)
    for b in range(3):
        np.testing.assert_allclose(max_only(maps)[b, 0], references.by_max(maps[b, 0].numpy()), atol=1e-15)
        np.testing.assert_allclose(sigmoid(maps)[b, 0], references.sigmoid(maps[b, 0].numpy()), atol=1e-15)
    assert (max_only(torch.zeros(1, 1, 2, 2)) == 0).all()
    assert max_only(torch.tensor([[[[-1.0, 2.0]]]])).tolist() == [[[[0.0, 1.0]]]]


def test_apply_mask_with_a_baseline():
    image, baseline, saliency = rand(2, 3, 4, 4), rand(1, 3, 1, 1), rand(2, 1, 4, 4)
    expected = image * saliency + baseline * (1 - saliency)
    torch.testing.assert_close(apply_mask(image, saliency, baseline), expected, rtol=0, atol=1e-15)


def test_baselines():
    image = rand(2, 3, 12, 16)
    torch.testing.assert_close(mean_color(image)[1, 2, 0, 0], image[1, 2].mean())
    assert (gray(image).expand_as(image) == 0.5).all()
    flat = torch.full((1, 3, 12, 16), 0.25)
    torch.testing.assert_close(blur(flat), flat)
    blur(flat[..., :6, :6])
    with pytest.raises(ValueError, match=r"^baseline: blur wants sides of 6 pixels or more, got"):
        blur(flat[..., :5, :6])
    spot = torch.zeros(1, 1, 21, 21)
    spot[..., 10, 10] = 1
    weights = torch.exp(-(torch.arange(-5.0, 6) ** 2) / 50)
    weights = weights / weights.sum()
    torch.testing.assert_close(blur(spot)[0, 0, 5:16, 5:16], weights[:, None] * weights)


def test_maps_that_do_not_belong_to_the_images_are_refused():
    images, maps = rand(2, 3, 4, 6), rand(2, 1, 4, 6)
    maps[0, 0, 0, 0] = torch.nan  # passes: the result of such a map is NaN
    check_saliency(images, maps)
    for wrong in (maps[:, 0], maps[:1], maps.mT):
        with pytest.raises(ValueError, match=r"saliency: wanted shape \(2, 1, 4, 6\), got"):
            check_saliency(images, wrong)
    with pytest.raises(ValueError, match="saliency: wanted on the device of the images, cpu, got meta"):
        check_saliency(images, maps.to("meta"))
    for wrong in (2 * maps, -maps):
        with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\]"):
            check_saliency(images, wrong)
    with pytest.raises(TypeError, match="saliency: wanted a tensor"):
        check_saliency(images, maps.numpy())


def test_a_baseline_of_another_range_is_refused(images):
    for colour in (torch.tensor([123.7, 116.3, 103.5]).view(1, 3, 1, 1), lambda x: 255 * x):
        with pytest.raises(ValueError, match=r"^baseline: wanted values like those of the images, up to 1, got"):
            baseline_of(images, colour)
    noise = torch.randn(images.shape)
    assert torch.equal(baseline_of(images, noise), noise.double())
    assert torch.equal(baseline_of(images, noise > 0), (noise > 0).double())
    with pytest.raises(ValueError, match=r"^baseline: wanted a shape that broadcasts to"):
        baseline_of(images, torch.zeros(0))


def test_a_baseline_of_another_precision_gives_images_of_their_own():
    images, S = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    masked = apply_mask(images, S, torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(masked, images * S)
