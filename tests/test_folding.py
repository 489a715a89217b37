"""Batch norms folded into convolutions: the same numbers by fewer operations, and the network as it was."""

import copy
import sys

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn
from torchvision import models as tv

from opticam import METHODS, load_model, opti_cam
from opticam.features import count_passes, frozen
from opticam.folding import _PaddedAlike, _pairs, folded
from opticam.metrics import insertion_deletion


def norms(network):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def shuffled(network):
    """Batch norms as after training: none is the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def twin_of(network, images):
    with frozen(network):
        with torch.no_grad():
            logits = network(images)
        return folded(network, images, logits)


class Blocks(nn.Module):
    """Pairs that may be folded (a, c) and others that may not."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)  # b is read twice
        self.c, self.norm_c = nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False)
        self.d, self.norm_d = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)  # d is called twice
        self.norm_e = nn.BatchNorm2d(4)  # after no convolution

    def forward(self, images):
        x = self.norm_a(self.a(images)).relu_()
        kept = self.b(x)
        x = self.norm_c(self.c((self.norm_b(kept) + kept).relu()))
        x = self.norm_e(self.d(self.norm_d(self.d(x))).relu())
        return x.mean((2, 3))


NETWORKS = {
    "EfficientNet-Lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=7), 0),
    "ResNet18": (lambda: tv.resnet18(num_classes=7), 0),
    "MobileNetV3": (lambda: tv.mobilenet_v3_small(num_classes=7), 0),
    "DenseNet121": (lambda: tv.densenet121(num_classes=7), 62),  # most of its batch norms come first
    "own": (Blocks, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits_and_gradients(name):
    torch.manual_seed(0)
    build, left = NETWORKS[name]
    network = shuffled(build()).double()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    twin = twin_of(network, images)
    assert twin is not network
    assert norms(twin) == left < norms(network)
    results = []
    for one in (network, twin):
        x = images.clone().requires_grad_()
        logits = one(x)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 9), (11, 7), (3, 10)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), ((2, 5), (2, 3)), (1, 2), (4, 1), (3, 4)])
def test_padding_of_both_sides_alike(size, kernel, stride):
    torch.manual_seed(0)
    convolution = Conv2dSame(4, 4, kernel, stride=stride, groups=4).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(_PaddedAlike(convolution)(x), convolution(x), rtol=1e-12, atol=1e-12)


def test_depthwise_convolutions_copy_nothing():
    network = shuffled(timm.create_model("tf_efficientnet_lite0", num_classes=7))
    twin = twin_of(network, torch.rand(1, 3, 64, 64))
    assert sum(isinstance(module, _PaddedAlike) for module in twin.modules()) == 4


def test_the_network_is_not_touched():
    network = shuffled(Blocks())
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    twin_of(network, torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert set(network.state_dict()) == set(before)
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_weights_that_change_later_are_seen():
    network, images = shuffled(Blocks()), torch.rand(2, 3, 16, 16)
    twin_of(network, images)
    network.a.weight.data.mul_(2)  # which leaves no trace in a version counter
    network.norm_c = nn.BatchNorm2d(4).eval()
    twin = twin_of(network, images)
    assert norms(twin) == 3
    torch.testing.assert_close(twin(images), network(images))


def test_where_hooks_sit_nothing_is_folded():
    network, images, seen = shuffled(Blocks()), torch.rand(2, 3, 16, 16), []
    network.norm_a.register_forward_hook(lambda module, args, output: seen.append(output))
    twin = twin_of(network, images)
    assert norms(twin) == 5  # a hook may keep what a later part reads
    seen.clear()
    torch.testing.assert_close(twin(images), network(images))
    torch.testing.assert_close(*seen)


class Standardized(nn.Conv2d):
    """Its forward does not use the weights as they are, so folding into them is wrong."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, images):
        x = self.body(images)
        return (x if x.mean() > 0 else -x).mean((2, 3))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        Branching(),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()),
        Blocks().bfloat16(),
    ],
    ids=["weights used otherwise", "cannot be traced", "no batch norm", "statistics of the batch", "bfloat16"],
)
def test_else_the_network_itself(network):
    shuffled(network)
    images = torch.rand(2, 3, 16, 16).to(next(network.parameters()).dtype)
    assert twin_of(network, images) is network


@pytest.mark.slow
def test_methods_and_metrics_give_the_numbers_of_the_network(monkeypatch):
    torch.manual_seed(0)
    network = shuffled(tv.resnet18(num_classes=7)).double()
    images, class_idx = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5])
    calls = {
        "opti_cam": lambda: opti_cam(network, images, class_idx, layer="layer3", num_steps=5).saliency,
        "score_cam": lambda: METHODS["score_cam"](network, images, class_idx, layer="layer1.1.bn2"),
        "rise": lambda: METHODS["rise"](network, images, class_idx, num_masks=9),
        "extremal": lambda: METHODS["extremal_perturbation"](network, images, class_idx, num_steps=4),
        "curves": lambda: torch.cat(
            [
                curve[1]
                for curve in insertion_deletion(
                    network, images, class_idx, images[:, :1], mean=torch.zeros(3), pixels_per_step=128
                )
            ]
        ),
    }
    ours = {name: call() for name, call in calls.items()}
    used = []
    modules = ("methods.opti_cam", "methods.cam", "methods.perturbation", "metrics.classification")
    for module in modules:
        place = sys.modules[f"opticam.{module}"]
        monkeypatch.setattr(place, "folded", lambda model, images, logits: used.append(1) or model)
    for name, call in calls.items():
        used.clear()
        torch.testing.assert_close(ours[name], call(), rtol=0, atol=1e-9, msg=name)
        assert used, f"{name} does not fold"


def test_passes_are_counted_as_before():
    model = load_model("efficientnet_lite0", pretrained=False)
    with count_passes(model) as passes:
        opti_cam(model, torch.rand(1, 3, 224, 224), torch.tensor([0]), num_steps=1)
    assert passes == [3, 1]


def test_functions_that_keep_modules_are_the_twin_s_own():
    network, seen = shuffled(Blocks()), []
    old = network.forward

    def again(images, times=2):
        return old(images) if times == 1 else again(images, times - 1)  # it keeps itself, too

    network.forward = lambda images, run=again, noted=seen: (noted.append(len(images)), run(images))[1]
    images = torch.rand(3, 3, 16, 16)
    twin = twin_of(network, images)
    expected = network(images)
    assert norms(twin) < norms(network)
    network.a.register_forward_hook(lambda *_: pytest.fail("the twin runs a module of the network"))
    seen.clear()
    torch.testing.assert_close(twin(images), expected)
    assert seen == [3]  # what a function writes down stays its owner's


def test_what_cannot_be_traced_is_tried_once():
    network, images = Branching().eval(), torch.rand(2, 3, 16, 16)
    assert twin_of(network, images) is network
    assert _pairs[network] == []
