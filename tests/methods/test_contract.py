"""What holds for every method in METHODS."""

from functools import partial

import pytest
import torch
from conftest import TinyCNN, TinyViT, state

from opticam import METHODS
from opticam.methods import perturbation

SHORT = {
    "opti_cam": {"num_steps": 6},
    "rise": {"num_masks": 12, "batch_size": 7},
    "extremal_perturbation": {"num_steps": 4},
    "ablation_cam": {"batch_size": 4},
    "score_cam": {"batch_size": 4},
}
ATTENTION = {"raw_attention", "attention_rollout", "gradient_rollout", "legrad"}
pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def method(name, monkeypatch):
    monkeypatch.setattr(perturbation, "SIGMA", 2.0)  # a blur of 20 pixels is slow, and nothing here depends on it
    return partial(METHODS[name], **SHORT.get(name, {}))


@pytest.fixture
def tiny(name):
    torch.manual_seed(0)
    return (TinyViT() if name in ATTENTION else TinyCNN()).double()


def test_shape_range_dtype_and_no_gradient(method, tiny, images, class_idx):
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        saliency = method(tiny.to(dtype), images.to(dtype), class_idx, layer="features")
        assert saliency.shape == (5, 1, 24, 32)
        assert saliency.dtype == wanted
        assert saliency.device == images.device
        assert not saliency.requires_grad
        assert saliency.isfinite().all()
        assert saliency.amin() >= 0
        assert saliency.amax() <= 1


def test_batch_equals_singles(method, tiny, images, class_idx):
    batch = method(tiny, images, class_idx, layer="features")
    singles = [method(tiny, images[b : b + 1], class_idx[b : b + 1], layer="features") for b in range(5)]
    torch.testing.assert_close(batch, torch.cat(singles), rtol=0, atol=1e-10)


def test_everything_is_as_before(method, tiny, images, class_idx):
    tiny.train()
    tiny.features[0].eval()
    tiny.features[0].requires_grad_(False)
    tiny(images).sum().backward()
    before, pixels = state(tiny), images.clone()
    method(tiny, images, class_idx, layer="features")
    assert state(tiny) == before
    assert torch.equal(images, pixels)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_everything_is_as_before_when_forward_raises(method, tiny, images, class_idx, call):
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == call:
            raise ZeroDivisionError

    tiny.train()
    tiny.fc.register_forward_hook(fail)
    before = state(tiny)
    try:
        method(tiny, images, class_idx, layer="features")
    except ZeroDivisionError:
        assert calls == call
    else:
        assert calls < call  # a method of fewer passes
    assert state(tiny) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(method, tiny, images, class_idx, mode):
    expected = method(tiny, images, class_idx, layer="features")
    with mode():
        made_inside = images.clone(), class_idx.clone()
        torch.testing.assert_close(method(tiny, *made_inside, layer="features"), expected)
    torch.testing.assert_close(method(tiny, *made_inside, layer="features"), expected)


def test_frozen_network(method, tiny, images, class_idx):
    expected = method(tiny, images, class_idx, layer="features")
    assert torch.equal(method(tiny.requires_grad_(False), images, class_idx, layer="features"), expected)
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_one_channel(name, method, images, class_idx):
    torch.manual_seed(0)
    network = TinyViT(embed_dim=1, num_heads=1) if name in ATTENTION else TinyCNN(channels=1)
    saliency = method(network.double(), images, class_idx, layer="features")
    assert saliency.shape == (5, 1, 24, 32)
    assert saliency.isfinite().all()


def test_images_that_require_grad_are_left_alone(method, tiny, images, class_idx):
    watched = images.clone().requires_grad_()
    torch.testing.assert_close(
        method(tiny, watched, class_idx, layer="features"), method(tiny, images, class_idx, layer="features")
    )
    assert watched.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(name, method, tiny, images, class_idx):
    expected = method(tiny, images, class_idx, layer="features")
    saliency = method(tiny.cuda(), images.cuda(), class_idx.cuda(), layer="features")
    assert saliency.is_cuda
    atol = 0.02 if name == "extremal_perturbation" else 1e-8  # rounding orders the equal pixels of its first mask
    torch.testing.assert_close(saliency.cpu(), expected, rtol=0, atol=atol)
