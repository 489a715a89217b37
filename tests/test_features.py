import copy

import pytest
import timm
import torch
from torch import nn

from opticam import wrap
from opticam.features import feature_maps, features_and_gradients, resolve_layer, watched
from opticam.state import frozen


class Tokens(nn.Module):
    """Looks like a transformer: (B, prefix + h*w, K) tokens of 8x8 patches."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.full((len(tokens), self.prefix, 4), 9.0, dtype=tokens.dtype), tokens], 1)
        return self.fc(self.norm(tokens).mean(1))


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


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_become_a_grid_in_reading_order(prefix):
    torch.manual_seed(0)
    model = Tokens(prefix)
    images = torch.rand(2, 3, 64, 128)
    (features,), _ = feature_maps(model, images, "norm")
    assert features.shape == (2, 4, 8, 16)
    torch.testing.assert_close(features, model.norm(model.embed(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("channels", [3, 8])
def test_channels_last_maps_are_told_by_the_shape_of_the_image(channels):
    conv = nn.Conv2d(3, channels, 8, 8)
    last = nn.Sequential(conv, _Permute(0, 2, 3, 1), _Permute(0, 3, 1, 2), nn.Flatten(), nn.LazyLinear(2))
    images = torch.rand(2, 3, 64, 128)
    last(images)
    for layer in ("0", "1"):
        ((features,), _) = feature_maps(last, images, layer)
        torch.testing.assert_close(features, conv(images).detach())


class _Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, images):
        return images.permute(*self.order)


def test_several_layers_in_one_pass(tiny, images):
    passes = []
    tiny.register_forward_hook(lambda *_: passes.append(1))
    first, last = feature_maps(tiny, images, ["features.0", tiny.features])[0]
    torch.testing.assert_close(first, tiny.features[0](images).detach())
    torch.testing.assert_close(last, tiny.features(images).detach())
    assert len(passes) == 1


def test_number_of_prefix_tokens_is_read_from_the_model():
    model = Tokens(1)
    model.num_prefix_tokens = 1
    assert feature_maps(model, torch.rand(1, 3, 24, 24), "norm")[0][0].shape == (1, 4, 3, 3)
    model.num_prefix_tokens = 2
    with pytest.raises(ValueError, match="10 tokens do not fill a grid"):
        feature_maps(model, torch.rand(1, 3, 24, 24), "norm")


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


TRANSFORMERS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": (64, 32), "depth": 2}, "blocks.1.norm1", 2),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 84), "depth": 2}, "blocks.1.norm1", 5),
    "no class token": (
        "vit_tiny_patch16_224",
        {"img_size": (64, 32), "depth": 2, "class_token": False, "global_pool": "avg"},
        "blocks.1.norm1",
        0,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": (64, 32), "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "window_size": 4},
        "norm",
        None,
    ),
}


@pytest.mark.parametrize(("name", "options", "layer", "prefix"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_the_grid_of_transformers_of_timm(name, options, layer, prefix):
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    height, width = options["img_size"]
    images = torch.rand(2, 3, height, width)
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    (features,), same_logits = feature_maps(model, images, layer)
    assert torch.equal(logits, same_logits)
    rows, columns = features.shape[2:]
    assert rows * width == columns * height
    for i, j in ((0, 0), (0, columns - 1), (rows - 1, 0), (1, 1)):
        token = outputs[0][:, i, j] if prefix is None else outputs[0][:, prefix + i * columns + j]
        assert torch.equal(features[:, :, i, j], token)
    _, gradients, _ = features_and_gradients(model, images, torch.tensor([1, 6]), layer)
    assert gradients.shape == features.shape
    assert gradients.abs().sum() > 0
