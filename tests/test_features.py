import copy

import pytest
import torch
from torch import nn

from opticam import METHODS, wrap
from opticam.features import feature_maps, features_and_gradients, resolve_layer, watched
from opticam.state import frozen


def test_feature_maps_are_the_layers_output(tiny, images):
    (features,), logits = feature_maps(tiny, images, "features")
    torch.testing.assert_close(features, tiny.features(images), rtol=0, atol=1e-14)
    torch.testing.assert_close(logits, tiny(images), rtol=0, atol=1e-14)
    assert not features.requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_features_and_gradients(images, class_idx, inplace):
    torch.manual_seed(0)
    conv, relu, fc = nn.Conv2d(3, 6, 3).double(), nn.ReLU(inplace), nn.Linear(6, 5).double()
    model = nn.Sequential(conv, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    expected = conv(images).detach()
    features, gradients, logits = features_and_gradients(model, images, class_idx, "0")
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-14)  # also where the ReLU overwrites its input
    torch.testing.assert_close(feature_maps(model, images, "0")[0][0], expected, rtol=0, atol=1e-14)
    # y_c = sum_k W_ck mean_ij relu(A_kij) + b_c, so dy_c/dA_kij = W_ck 1[A_kij > 0] / (h w)
    area = expected.shape[2] * expected.shape[3]
    torch.testing.assert_close(
        gradients, fc.weight[class_idx][:, :, None, None] * (expected > 0) / area, rtol=0, atol=1e-15
    )
    torch.testing.assert_close(logits, model(images))


def test_several_layers_in_one_pass(tiny, images):
    passes = []
    feature_maps(tiny, images, "features")  # a network that is first seen is looked at closer
    tiny.register_forward_hook(lambda *_: passes.append(1))
    first, last = feature_maps(tiny, images, ["features.0", tiny.features])[0]
    torch.testing.assert_close(first, tiny.features[0](images).detach())
    torch.testing.assert_close(last, tiny.features(images).detach())
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["grad_cam", "equal_weights"])
def test_a_network_that_sees_several_views_of_an_image_is_warned_of(tiny, images, class_idx, name):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def forward(self, x):
            return (self.inner(x) + self.inner(x.flip(3))) / 2

    for layer in ("features", "features.3"):  # and a ReLU, which has no parameters of its own
        with pytest.warns(
            UserWarning, match=r"^layer: \w+ runs several times in a pass, as on several views of an image; "
        ):
            flipped = METHODS[name](Views(), images, class_idx, layer=f"inner.{layer}")
        torch.testing.assert_close(flipped, METHODS[name](tiny, images.flip(3), class_idx, layer=layer))


def test_a_relu_that_a_block_uses_several_times_gives_no_warning(images, class_idx, recwarn):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x))))

    network = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    METHODS["grad_cam"](network, images, class_idx, layer="0.relu")
    assert not recwarn


@pytest.mark.parametrize("dtype", [torch.complex128, torch.int64, torch.bool])
def test_layers_whose_outputs_are_no_real_numbers_are_refused(tiny, images, class_idx, dtype):
    class Cast(nn.Module):
        def forward(self, x):
            return x.to(dtype)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.cast = tiny, Cast()

        def forward(self, x):
            self.cast(x)
            return self.inner(x)

    for name in ("grad_cam", "eigen_cam", "score_cam", "opti_cam"):
        with pytest.raises(ValueError, match=r"^layer: wanted one whose output is floating-point, got"):
            METHODS[name](Own(), images, class_idx, layer="cast")


def test_frozen_restores_every_flag_after_an_exception(tiny):
    tiny.train()
    tiny.features[1].eval()
    tiny.fc.weight.requires_grad_(False)
    training = [module.training for module in tiny.modules()]
    trainable = [parameter.requires_grad for parameter in tiny.parameters()]

    def broken():
        with frozen(tiny):
            assert not any(module.training for module in tiny.modules())
            assert not any(parameter.requires_grad for parameter in tiny.parameters())
            assert torch.is_grad_enabled()
            raise KeyError

    with torch.no_grad():
        with pytest.raises(KeyError):
            broken()
        assert not torch.is_grad_enabled()
    assert [module.training for module in tiny.modules()] == training
    assert [parameter.requires_grad for parameter in tiny.parameters()] == trainable


def test_no_hook_is_left_when_forward_raises(tiny, images, class_idx):
    tiny.fc.register_forward_hook(lambda *_: 1 / 0)
    hooks = [len(module._forward_hooks) for module in tiny.modules()]
    with pytest.raises(ZeroDivisionError):
        feature_maps(tiny, images, "features")
    with pytest.raises(ZeroDivisionError):
        features_and_gradients(tiny, images, class_idx, "features")
    assert [len(module._forward_hooks) for module in tiny.modules()] == hooks


def test_watched_reports_modules_in_order_and_leaves_no_hook(tiny, images):
    """All but convolutions and batch norms, on which a hook would be in the way of folding."""
    seen = []
    with watched(tiny, seen.append):
        tiny(images)
    _, first, _, second = tiny.features
    assert seen == [first, second, tiny.features, tiny.fc, tiny]
    with pytest.raises(KeyError), watched(tiny, {}.__getitem__):
        tiny(images)
    tiny(images)
    assert len(seen) == 5
    assert not any(module._forward_hooks for module in tiny.modules())


def test_resolve_layer(tiny):
    assert resolve_layer(tiny, "features.2") is tiny.features[2]
    assert resolve_layer(tiny, tiny.fc) is tiny.fc
    assert resolve_layer(wrap(tiny, "features")) is tiny.features
    tiny.alias = tiny.features  # a module of two names
    assert resolve_layer(tiny, "alias") is tiny.features
    with pytest.raises(ValueError, match=r"no 'feature\.2' in TinyCNN; wanted a dotted name such as features\.2"):
        resolve_layer(tiny, "feature.2")
    with pytest.raises(ValueError, match="not a module of the given model"):
        resolve_layer(tiny, copy.deepcopy(tiny.fc))
    with pytest.raises(ValueError, match="wanted a module or a dotted name, got 3"):
        resolve_layer(tiny, 3)
    tiny.layer = "features"  # an attribute of the network's own
    with pytest.raises(ValueError, match="TinyCNN has no target layer"):
        resolve_layer(tiny)


def test_layers_that_cannot_be_drawn(tiny, images, class_idx):
    with pytest.raises(ValueError, match=r"feature maps \(B,K,h,w\) or tokens \(B,N,K\), got shape \(5, 5\)"):
        feature_maps(tiny, images, "fc")
    tiny.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="never reaches it"):
        feature_maps(tiny, images, "unused")
    tiny.forward = lambda x: tiny.fc(tiny.features(x).mean((2, 3)).detach() * 0)
    with pytest.raises(ValueError, match="the logits do not depend on its output"):
        features_and_gradients(tiny, images, class_idx, "features")


@pytest.mark.slow
def test_a_network_that_was_compiled_before_is_read_as_it_was_written():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    images = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(network, backend="eager")
    compiled(images)
    (A,), logits = feature_maps(compiled, images, "1")
    (wanted,), same = feature_maps(network, images, "1")
    assert torch.equal(A, wanted)
    assert torch.equal(logits, same)


def test_a_layer_that_ends_what_runs_without_gradients(tiny, images, class_idx):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def forward(self, x):
            with torch.no_grad():
                maps = self.inner.features(x)
            return self.inner.fc(maps.mean((2, 3)))

    ours = METHODS["grad_cam"](Frozen(), images, class_idx, layer="inner.features")
    torch.testing.assert_close(ours, METHODS["grad_cam"](tiny, images, class_idx, layer="features"))
