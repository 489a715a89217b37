import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

from opticam import grad_cam
from opticam.methods import find_method
from opticam.saliency import min_max, saliency_map

pytest.importorskip("captum", reason="captum is an extra")


@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "IntegratedGradients", "Occlusion", "DeepLift"])
def test_attributions_become_maps(tiny, images, class_idx, name):
    options = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4)} if name == "Occlusion" else {}
    saliency = find_method(f"captum:{name}")(tiny, images, class_idx, **options)
    assert saliency.shape == (5, 1, 24, 32)
    assert saliency.amin() == 0
    assert saliency.amax() == 1
    assert not saliency.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.parameters())


def test_the_rule_is_the_positive_part_of_the_sum_over_channels(tiny, images, class_idx):
    saliency = find_method("captum:InputXGradient")(tiny, images, class_idx)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tiny(x).gather(1, class_idx[:, None]).sum(), x)
    expected = min_max((images * gradient).sum(1, keepdim=True).relu())
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-12)


def test_attributions_of_a_layer(tiny, images, class_idx):
    saliency = find_method("captum:LayerGradCam")(tiny, images, class_idx, layer="features")
    torch.testing.assert_close(saliency, grad_cam(tiny, images, class_idx, layer="features"), rtol=0, atol=1e-12)
    assert saliency_map(torch.ones(1, 1, 2, 2), (4, 4)).sum() == 0


@pytest.mark.parametrize("shape", [(1, 24, 32), (3, 10, 12), (3, 20, 5)])
def test_the_window_of_occlusion_is_clipped_to_the_image(shape):
    images = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    network(images)
    assert find_method("captum:Occlusion")(network.eval(), images, torch.tensor([0])).shape == (1, 1, *shape[1:])


@pytest.mark.parametrize(
    ("name", "message"),
    [("Nothing", "no 'Nothing' in captum; wanted one of"), ("GradientShap", "captum cannot compute GradientShap")],
)
def test_bad_names_and_what_captum_refuses(tiny, images, class_idx, name, message):
    with pytest.raises(ValueError, match=message):
        find_method(f"captum:{name}")(tiny, images, class_idx)


@pytest.mark.parametrize("name", ["DeepLift", "LayerDeepLift", "LRP"])
def test_captum_leaves_nothing_in_the_network(images, class_idx, name):
    relu = nn.ReLU()
    twice = [relu, nn.Conv2d(4, 4, 3), relu] if name == "DeepLift" else [relu]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *twice, nn.Flatten(), nn.LazyLinear(5)).double()
    network(images)
    before = [set(vars(module)) for module in network.modules()]
    with suppress(ValueError):  # DeepLift refuses a ReLU called twice, after it has kept activations in it
        find_method(f"captum:{name}")(network, images, class_idx, layer="0")
    assert [set(vars(module)) for module in network.modules()] == before
    if name == "DeepLift":
        with pytest.raises(ValueError, match="captum cannot compute DeepLift here"):
            find_method("captum:DeepLift")(network, images, class_idx)


def test_without_captum(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match="captum is not installed"):
        find_method("captum:Saliency")
