import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opticam import grad_cam
from opticam.methods import find_method
from opticam.saliency import min_max, saliency_map

attr = pytest.importorskip("captum.attr", reason="captum is an extra")


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


class Parts(nn.Module):
    """Runs parts that it keeps in its own way."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Linear(6, 5)
        parts = (self.conv1, self.relu1), (self.conv2, self.relu2)
        if way == "tuple":
            self.parts = parts
        elif way == "object":
            self.kept = SimpleNamespace(parts=parts)
        self.run = None if way != "closure" else lambda x: self._run(parts, x)

    @staticmethod
    def _run(parts, x):
        for conv, relu in parts:
            x = relu(conv(x))
        return x

    def forward(self, x):
        if self.run:
            return self.fc(self.run(x).mean((2, 3)))
        parts = self.kept.parts if hasattr(self, "kept") else self.parts
        return self.fc(self._run(parts, x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["GuidedBackprop", "DeepLift"])
@pytest.mark.parametrize("way", ["tuple", "closure", "object"])
def test_parts_that_are_kept_in_another_way(images, class_idx, way, name):
    network = Parts(way).double()
    run = partial(find_method(f"captum:{name}"), network, images, class_idx)
    if way == "object":
        with pytest.raises(
            ValueError, match=r"^model: Parts reaches Conv2d by a way that the copy, .* does not follow"
        ):
            run()
    else:
        values = getattr(attr, name)(network).attribute(images.clone().requires_grad_(), target=class_idx)
        torch.testing.assert_close(run(), saliency_map(values.sum(1, keepdim=True), (24, 32)), rtol=0, atol=1e-12)


def test_a_method_that_reads_a_layer_and_attributes_the_image(tiny, images, class_idx):
    values = attr.GuidedGradCam(tiny, tiny.features).attribute(images.clone().requires_grad_(), target=class_idx)
    found = find_method("captum:GuidedGradCam")(tiny, images, class_idx, layer="features")
    torch.testing.assert_close(found, saliency_map(values.sum(1, keepdim=True), (24, 32)), rtol=0, atol=1e-12)


def test_without_captum(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match="captum is not installed"):
        find_method("captum:Saliency")
