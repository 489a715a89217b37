"""Methods of other libraries by name: what they give, how far from ours, and that the network is left as found."""

import re
import sys
import textwrap
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import TinyCNN, TinyViT, state
from torch import nn
from torchvision.models import VisionTransformer

import opticam
from opticam import METHODS, find_method
from opticam.features import count_passes
from opticam.lab.files import REPOSITORY
from opticam.saliency import saliency_map

peer = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is an extra")

SAME = {  # library -> ours, how far apart the maps are, and why
    "GradCAM": ("grad_cam", 1e-12),
    "HiResCAM": ("hires_cam", 1e-12),
    "LayerCAM": ("layer_cam", 1e-12),
    "XGradCAM": ("x_grad_cam", 1e-5),  # 1e-7 is added to the sum of the features
    "AblationCAM": ("ablation_cam", 1e-4),  # scores pass through float32
    "EigenCAM": ("eigen_cam", 1e-6),  # float32; where the signs agree
    "FinerCAM": ("finer_cam", 1e-8),  # 1e-9 is added to the sum of the weights
}


@pytest.fixture
def network():
    """Features that are no product of a pooled gradient, so that the methods differ."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5)).double()


@pytest.mark.parametrize("name", SAME)
def test_grad_cam_s_methods_agree_with_ours(network, images, class_idx, name):
    ours, apart = SAME[name]
    found = find_method(f"grad-cam:{name}")(network, images, class_idx, layer="1")
    expected = METHODS[ours](network, images, class_idx, layer="1")
    if name == "EigenCAM":
        negative = METHODS[ours](network, images, class_idx, layer="1")
        turned = (found - expected).abs().amax((1, 2, 3)) > apart  # ours turns these round, the library does not
        assert not turned.all()
        found, expected = found[~turned], negative[~turned]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=apart)


def test_grad_cam_plus_plus_of_the_library_is_ours_where_gradients_are_large(network, images, class_idx):
    """It adds 1e-6 to a denominator of 2 g^2: of gradients of 1e-3 this is a half."""
    run = find_method("grad-cam:GradCAMPlusPlus")
    ours = METHODS["grad_cam_plus_plus"](network, images, class_idx, layer="1")
    far = (run(network, images, class_idx, layer="1") - ours).abs().max()
    with torch.no_grad():
        network[-1].weight.mul_(1e5)
    ours = METHODS["grad_cam_plus_plus"](network, images, class_idx, layer="1")
    near = (run(network, images, class_idx, layer="1") - ours).abs().max()
    assert near < 1e-6 < far


def test_score_cam_of_the_library_upsamples_with_its_corners_aligned(network, images, class_idx):
    apart = find_method("grad-cam:ScoreCAM")(network, images, class_idx, layer="1")
    ours = METHODS["score_cam"](network, images, class_idx, layer="1")
    assert 1e-6 < (apart - ours).abs().max() < 0.1


def test_refine_cam_of_the_library_is_ours_where_nothing_is_upsampled(class_idx):
    """It stretches each map to [0,1] before it upsamples, ours afterwards; its Grad-CAM++ needs large gradients."""
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).double()
    with torch.no_grad():
        network[-1].weight.mul_(1e5)
    images = torch.rand(5, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    target = peer.utils.model_targets.ClassifierOutputTarget
    maps = peer.RefineCAM(network, [network[1], network[3]])(images.clone(), [target(int(c)) for c in class_idx])
    ours = METHODS["refine_cam"](network, images, class_idx, layer=["1", "3"])
    torch.testing.assert_close(saliency_map(torch.from_numpy(maps)[:, None], (12, 12)), ours.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["GradCAM", "RefineCAM", "FinerCAM"])
def test_several_layers_are_the_library_s_own_business(network, images, class_idx, name):
    target = peer.utils.model_targets.ClassifierOutputTarget
    method = getattr(peer, name)(network, [network[1], network[3]])
    if name == "FinerCAM":
        maps = np.concatenate([method(images[[i]], target_idx=int(c)) for i, c in enumerate(class_idx)])
    else:
        maps = method(images.clone(), [target(int(c)) for c in class_idx])
    found = find_method(f"grad-cam:{name}")(network, images, class_idx, layer=["1", "3"])
    expected = saliency_map(torch.from_numpy(maps)[:, None], images.shape[-2:])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


CLASSES = ["GradCAM", "GradCAMElementWise", "EigenGradCAM", "ShapleyCAM", "FullGrad", "RefineCAM", "FEM", "AblationCAM"]


@pytest.mark.parametrize("name", CLASSES)
def test_the_network_is_left_as_found(tiny, images, class_idx, name):
    tiny.train()
    tiny.features[0].eval()
    tiny(images).sum().backward()
    before, modules = state(tiny), list(tiny.modules())
    attributes = [set(vars(module)) for module in modules]
    saliency = find_method(f"grad-cam:{name}")(tiny, images, class_idx, layer="features")
    assert saliency.shape == (5, 1, 24, 32)
    assert saliency.amin() == 0
    assert saliency.amax() == 1
    assert not saliency.requires_grad
    assert state(tiny) == before
    assert [module is other for module, other in zip(modules, tiny.modules(), strict=True)].count(False) == 0
    assert [set(vars(module)) for module in modules] == attributes


def test_the_network_is_left_as_found_when_forward_raises(tiny, images, class_idx):
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 4:
            raise ZeroDivisionError

    tiny.train()
    tiny.fc.register_forward_hook(fail)
    before, modules = state(tiny), list(tiny.modules())
    with pytest.raises(ZeroDivisionError):
        find_method("grad-cam:AblationCAM")(tiny, images, class_idx, layer="features")
    assert state(tiny) == before
    assert [module is other for module, other in zip(modules, tiny.modules(), strict=True)].count(False) == 0


def test_passes_of_a_library_are_counted(tiny, images, class_idx):
    with count_passes(tiny) as passes:
        find_method("grad-cam:GradCAM")(tiny, images, class_idx, layer="features")
    assert passes == [1 + 5, 5]  # one image to see what the layer gives


def test_what_a_library_draws_is_seeded(tiny, images, class_idx):
    run = find_method("grad-cam:RandomCAM")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = run(tiny, images, class_idx, layer="features")
    assert torch.equal(run(tiny, images, class_idx, layer="features"), first)
    assert not torch.equal(run(tiny, images, class_idx, layer="features", seed=1), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_tokens_become_maps_for_a_library_too(images, class_idx):
    torch.manual_seed(0)
    vit = TinyViT().double()
    layer = vit.network.blocks[1].norm1
    found = find_method("grad-cam:GradCAM")(vit, images, class_idx, layer=layer)
    expected = METHODS["grad_cam"](vit, images, class_idx, layer=layer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Record(nn.Module):
    """A network with one logit, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = TinyCNN(num_classes=1).double()

    def forward(self, images):
        return {"logits": self.inner(images)}


def test_a_library_gets_logits_whatever_the_network_returns(images):
    """One logit y stands for two classes, y and -y."""
    one = Record()
    _, twice = one.inner.fc, nn.Linear(6, 2).double()
    with torch.no_grad():
        twice.weight.copy_(torch.cat([one.inner.fc.weight, -one.inner.fc.weight]))
        twice.bias.copy_(torch.cat([one.inner.fc.bias, -one.inner.fc.bias]))
    two = nn.Sequential(one.inner.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), twice)
    c = torch.tensor([0, 1, 0, 1, 1])
    found = find_method("grad-cam:GradCAM")(one, images, c, layer="inner.features")
    expected = METHODS["grad_cam"](two, images, c, layer="0")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of half-made objects of the library
def test_bad_names_and_what_a_library_refuses(tiny, images, class_idx, monkeypatch):
    with pytest.raises(ValueError, match=r"no 'GuidedBackpropReLUModel' in grad-cam; wanted one of AblationCAM, "):
        find_method("grad-cam:GuidedBackpropReLUModel")
    with pytest.raises(ValueError, match=r"method: grad-cam cannot compute GradCAM here \(.*unexpected keyword"):
        find_method("grad-cam:GradCAM")(tiny, images, class_idx, layer="features", magic=1)
    with pytest.raises(
        ValueError, match=r"method: wanted one of .*captum:NAME, grad-cam:NAME, torchcam:NAME, got 'x:Y'"
    ):
        find_method("x:Y")
    with pytest.raises(ValueError, match=r"^seed: wanted a whole number, got 1\.5$"):
        find_method("grad-cam:GradCAM")(tiny, images, class_idx, layer="features", seed=1.5)
    with pytest.raises(ValueError, match=r"^method: wanted one of .*, got None$"):
        find_method(None)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match="method: grad-cam is not installed: pip install"):
        find_method("grad-cam:GradCAM")
    monkeypatch.setitem(sys.modules, "torchcam.methods", None)
    with pytest.raises(ImportError, match="method: torchcam is not installed: pip install"):
        find_method("torchcam:GradCAM")


class StandIn:
    """As torchcam's classes are called: hooks at once, a list of class indices, raw maps on demand."""

    def __init__(self, model, target_layer=None, input_shape=(3, 224, 224)) -> None:
        self.model, self.maps = model, []
        assert input_shape == (3, 24, 32)
        target_layer.register_forward_hook(self.hook)
        model.forgotten = True

    def hook(self, module, args, output):
        self.maps = [output]

    def __call__(self, class_idx, scores=None, normalized=True):
        assert not normalized
        self.model.zero_grad()
        (g,) = torch.autograd.grad(scores.gather(1, torch.tensor(class_idx)[:, None]).sum(), self.maps)
        return [(g.mean((2, 3), keepdim=True) * self.maps[0].detach()).sum(1)]


def test_torchcam_s_way_of_being_called(tiny, images, class_idx, monkeypatch):
    module = ModuleType("torchcam.methods")
    module.GradCAM = StandIn
    monkeypatch.setitem(sys.modules, "torchcam.methods", module)
    tiny(images).sum().backward()
    before = state(tiny)
    found = find_method("torchcam:GradCAM")(tiny, images, class_idx, layer="features.0")
    expected = METHODS["grad_cam"](tiny, images, class_idx, layer="features.0")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert state(tiny) == before
    assert not hasattr(tiny, "forgotten")


def test_the_page_s_explain_func_of_quantus(network, images, class_idx):
    page = (REPOSITORY / "opticam" / "methods" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(  def explain_func.+?)```", page, re.S)
    names: dict = {"torch": torch, "opticam": opticam}
    exec(textwrap.dedent(program), names)  # noqa: S102
    network.float()
    inputs, targets = images.float().numpy(), class_idx.to(torch.int32).numpy()
    maps = names["explain_func"](network, inputs, targets, method="grad_cam", layer="1", device="cpu", softmax=False)
    expected = METHODS["grad_cam"](network, images.float(), class_idx, layer="1").numpy()
    assert isinstance(maps, np.ndarray)
    np.testing.assert_array_equal(maps, expected)


def test_torchcam_s_legrad_runs(images, class_idx):
    pytest.importorskip("torchcam.methods", reason="torchcam is an extra")
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(vit.heads[0].weight)
    run = partial(find_method("torchcam:LeGrad"), vit, torch.rand(5, 3, 32, 32), class_idx)
    found = run(layer="encoder.layers.encoder_layer_1")
    assert found.shape == (5, 1, 32, 32)
    assert (found.amax((1, 2, 3)) == 1).all()


def test_torchcam_takes_one_layer(network, images, class_idx):
    pytest.importorskip("torchcam.methods", reason="torchcam is an extra")
    with pytest.raises(ValueError, match="layer: wanted one, got 2"):
        find_method("torchcam:GradCAM")(network, images, class_idx, layer=["1", "3"])


TORCHCAM = {  # library -> ours, and how far apart
    "GradCAM": ("grad_cam", 1e-10),
    "XGradCAM": ("x_grad_cam", 1e-6),  # 1e-8 is added to the sum of the features
    "LayerCAM": ("layer_cam", 1e-10),
}


@pytest.mark.parametrize("name", TORCHCAM)
def test_torchcam_s_methods_agree_with_ours(network, images, class_idx, name):
    pytest.importorskip("torchcam.methods", reason="torchcam is an extra")
    ours, apart = TORCHCAM[name]
    found = find_method(f"torchcam:{name}")(network, images, class_idx, layer="1")
    torch.testing.assert_close(found, METHODS[ours](network, images, class_idx, layer="1"), rtol=0, atol=apart)


def test_torchcam_s_grad_cam_plus_plus_is_not_ours(network, images, class_idx):
    """Its division by the denominator is lost, since it is done on a copy."""
    pytest.importorskip("torchcam.methods", reason="torchcam is an extra")
    found = find_method("torchcam:GradCAMpp")(network, images, class_idx, layer="1")
    assert (found - METHODS["grad_cam_plus_plus"](network, images, class_idx, layer="1")).abs().max() > 0.01
