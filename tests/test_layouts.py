import re

import pytest
import timm
import torch
from conftest import TinyViT
from torch import nn

from opticam import METHODS, grad_cam, wrap
from opticam.features import feature_maps, features_and_gradients
from opticam.layouts import Tokens, channels_first, channels_last
from opticam.probe import check_layout, default_layer

from torchvision import models  # isort: skip  (after opticam)


class Patches(nn.Module):
    """Looks like a transformer: tokens of 8x8 patches between class tokens, in an order of its own."""

    def __init__(self, before: int = 0, after: int = 0) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.embed = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        extra = [torch.full((len(tokens), number, 4), 9.0, dtype=tokens.dtype) for number in (self.before, self.after)]
        return self.fc(self.norm(torch.cat([extra[0], tokens, extra[1]], 1)).mean(1))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, maps):
        return maps.permute(*self.order)


class LastBlock(nn.Module):
    """A convolution that gives its maps channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, 8)

    def forward(self, images):
        return self.conv(images).permute(0, 2, 3, 1)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_told_tokens_become_a_grid_in_reading_order(prefix):
    torch.manual_seed(0)
    network = Patches(prefix).eval()
    images = torch.rand(2, 3, 64, 128)
    model = wrap(network, "norm", layout=Tokens(8, 16, prefix))
    (features,), _ = feature_maps(model, images)
    assert features.shape == (2, 4, 8, 16)
    torch.testing.assert_close(features, network.norm(network.embed(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert check_layout(model, images).all()


@pytest.mark.parametrize("method", ["grad_cam", "equal_weights", "ablation_cam", "score_cam"])
@pytest.mark.parametrize("network", [Patches(), Patches(1), Patches(0, 1)], ids=["none", "first", "last"])
def test_tokens_of_an_unknown_network_are_refused_however_many_there_are(network, method):
    """16 tokens of 24x40 pixels would be a square grid of 4x4 with the class token in it: 3x5 and one more."""
    with pytest.raises(ValueError, match=r"layer: where the cells of LayerNorm's output .* layout=") as raised:
        METHODS[method](network.eval(), torch.rand(2, 3, 24, 40), torch.tensor([0, 1]), layer="norm")
    assert "\n" not in str(raised.value)


def test_a_function_says_where_class_tokens_lie_last():
    torch.manual_seed(0)
    network = Patches(0, 1).eval()
    images, class_idx = torch.rand(2, 3, 24, 40), torch.tensor([0, 1])
    last = wrap(network, "norm", layout=lambda tokens: tokens[:, :-1].transpose(1, 2).unflatten(2, (3, 5)))
    first = wrap(Patches(1).eval(), "norm", layout=Tokens(3, 5, 1))
    first.network.load_state_dict(network.state_dict())
    for name in ("grad_cam", "layer_cam", "ablation_cam", "equal_weights"):
        torch.testing.assert_close(METHODS[name](last, images, class_idx), METHODS[name](first, images, class_idx))
    with pytest.raises(ValueError, match=r"wanted tokens \(B,1\+4\*4,K\), got shape \(2, 16, 4\)"):
        grad_cam(wrap(network, "norm", layout=Tokens(4, 4, 1)), images, class_idx)
    with pytest.raises(ValueError, match=r"layout: wanted a function to \(B,K,h,w\), got \(2, 15, 4\)"):
        grad_cam(wrap(network, "norm", layout=lambda tokens: tokens[:, :-1]), images, class_idx)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 128), (64, 64)])
@pytest.mark.parametrize("channels", [3, 8, 32])
def test_maps_that_a_module_of_ones_own_gives_channels_last_are_refused_or_told(channels, size):
    """At 64x64 with 8 channels a block's maps are 8x8x8, which nothing but an experiment can tell."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, *size)
    block = LastBlock(channels)
    for first, layer in (([block], "0"), ([block.conv, Permute(0, 2, 3, 1)], "1")):
        network = nn.Sequential(
            *first, Permute(0, 3, 1, 2), nn.Flatten(), nn.Linear(channels * size[0] * size[1] // 64, 2)
        )
        network.eval()
        told = wrap(network, layer, layout=channels_last)
        torch.testing.assert_close(feature_maps(told, images)[0][0], block.conv(images).detach())
        assert check_layout(told, images).all()
        wrong = wrap(network, layer, layout=channels_first)
        if (channels, size) == (8, (64, 128)):  # 16x8 cells for 8x16 patches
            with pytest.raises(
                ValueError, match="layout: wanted 8x16, the patches that Sequential cuts, got 16x8 cells"
            ):
                check_layout(wrong, images)
        else:
            assert not check_layout(wrong, images).all() or channels < 3
        if (channels, size, layer) != (8, (64, 64), "0"):
            with pytest.raises(ValueError, match=r"layer: where the cells .* channels_last"):
                feature_maps(network, images, layer)


@pytest.mark.parametrize("layer", ["0", "1"])
def test_maps_channels_last_of_a_block_that_cuts_the_border_are_refused_or_told(layer):
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 11, 4)

        def forward(self, images):
            return self.conv(images).permute(0, 2, 3, 1)

    network = nn.Sequential(Stem(), nn.ReLU(), Permute(0, 3, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(2, 3, 64, 128)
    with pytest.raises(ValueError, match=r"^layer: where the cells of \w+'s output .* is not known"):
        feature_maps(network, images, layer)
    assert feature_maps(wrap(network, layer, layout=channels_last), images)[0][0].shape == (2, 16, 14, 30)


SWAPPED = {
    "rows and columns": ((64, 128), nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Permute(0, 1, 3, 2), nn.Conv2d(4, 4, 1))),
    "tokens as a column": ((64, 64), nn.Sequential(nn.Conv2d(3, 4, 5, 4, 2), nn.Flatten(2), nn.Unflatten(2, (256, 1)))),
    "tokens as a row": ((64, 64), nn.Sequential(nn.Conv2d(3, 4, 5, 4, 2), nn.Flatten(2), nn.Unflatten(2, (1, 256)))),
    "patches as a column": ((64, 64), nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Unflatten(2, (64, 1)))),
}


@pytest.mark.parametrize("kind", SWAPPED)
def test_maps_whose_cells_lie_in_another_order_by_their_shape_are_refused(kind):
    size, body = SWAPPED[kind]
    network = nn.Sequential(*body, nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layer, images = str(len(body)), torch.rand(2, 3, *size)
    with pytest.raises(ValueError, match=r"^layout: "):
        feature_maps(network, images, layer)
    if "patches" not in kind:  # whoever says that they are right is believed
        assert len(feature_maps(wrap(network, layer, layout=channels_first), images)[0][0]) == 2


@pytest.mark.parametrize("size", [(1, 64), (32, 96), (96, 32)])
def test_long_images_have_long_maps(size):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert feature_maps(network, torch.rand(1, 3, *size), "1")[0][0].shape[2:] == tuple(-(-side // 2) for side in size)


class Windows(nn.Module):
    """Takes every quarter of the image for an image of its own, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        parts = torch.cat([half for side in images.chunk(2, 2) for half in side.chunk(2, 3)])
        return self.fc(self.conv(parts).mean((2, 3)).unflatten(0, (4, -1)).mean(0))


def test_windows_in_the_batch_axis_are_refused():
    images, class_idx = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    for name in ("grad_cam", "equal_weights", "ablation_cam"):
        with pytest.raises(ValueError, match=r"layer: its output \(8, 4, 4, 4\) does not begin with the 2 images"):
            METHODS[name](Windows().eval(), images, class_idx, layer="conv")


def test_sequence_first_tokens_are_refused():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), Permute(2, 0, 1), nn.TransformerEncoderLayer(8, 2, 16), Permute(1, 2, 0)
    )
    model = nn.Sequential(network, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    for number in (2, 16):  # 16 images of 16 tokens: the axes have the same length
        with pytest.raises(ValueError, match=r"^layer: .*wanted another layer"):
            feature_maps(model, torch.rand(number, 3, 32, 32), "0.3")


@pytest.mark.parametrize("layer", ["blocks.1.attn.q_norm", "blocks.1.attn.attn_drop", "blocks.1.attn.k_norm"])
def test_heads_are_not_channels(layer):
    options = {"img_size": 64, "depth": 2, "qk_norm": True, "num_classes": 3}
    network = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for block in network.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ValueError, match="layer: where the cells of"):
        feature_maps(network, torch.rand(1, 3, 64, 64), layer)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("swin_tiny_patch4_window7_224", "layers.1.blocks.0.attn"),
        ("swinv2_tiny_window8_256", "layers.1.blocks.0.attn.cpb_mlp"),
        ("swinv2_tiny_window8_256", "layers.1.blocks.0.mlp"),
    ],
)
def test_the_inside_of_window_attention_is_refused(name, layer):
    options = {"img_size": 64, "window_size": 4, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}
    network = timm.create_model(name, num_classes=3, **options).eval()
    with pytest.raises(ValueError, match=r"^layer: "):
        feature_maps(network, torch.rand(1, 3, 64, 64), layer)


@pytest.mark.slow
def test_channels_last_layers_of_torchvisions_swin():
    network = models.swin_t(num_classes=3).eval()
    images = torch.rand(1, 3, 96, 72)
    names = ["features.0.0", "features.0", "features.7.1", "features.7.1.norm2", "norm", "permute"]
    with torch.no_grad():
        maps = feature_maps(network, images, names)[0]
        assert [tuple(map_.shape[1:]) for map_ in maps] == [(96, 24, 18)] * 2 + [(768, 3, 3)] * 4
        torch.testing.assert_close(maps[1], network.features[0](images).permute(0, 3, 1, 2))
        torch.testing.assert_close(maps[5], maps[4])


@pytest.mark.slow
def test_the_tokens_of_hiera_are_put_in_place():
    torch.manual_seed(0)
    network = timm.create_model("hiera_tiny_224", img_size=128, num_classes=3).eval()
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        own = network.forward_intermediates(images, intermediates_only=True, norm=False)
    for end, maps in zip(network.stage_ends, own, strict=True):
        torch.testing.assert_close(feature_maps(network, images, f"blocks.{end}")[0][0], maps, rtol=0, atol=1e-4)
    for layer in ("blocks.1", "blocks.9.norm1"):
        with pytest.raises(ValueError, match=r"^layer: "):
            feature_maps(network, images, layer)


def test_an_embedding_of_ones_own_in_a_known_transformer_is_refused():
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3).eval()
    network.patch_embed = nn.Sequential(nn.Conv2d(3, 192, 16, 16), nn.Flatten(2), Permute(0, 2, 1))
    images, class_idx = torch.rand(1, 3, 64, 64), torch.tensor([1])
    for call in (
        lambda: feature_maps(network, images, "blocks.0.norm1"),
        lambda: METHODS["raw_attention"](network, images, class_idx),
    ):
        with pytest.raises(ValueError, match="layer: the order of the patches of Sequential is not known"):
            call()


class Wrapped(nn.Module):
    """A small ViT that is not given the image as it is, or whose tokens are moved on the way."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        options = {"class_token": False, "global_pool": "avg", "dynamic_img_size": True} if kind == "resized" else {}
        self.vit = TinyViT(**options).double().eval().network
        self.kind = kind
        if kind == "turned in the norm":
            self.vit.norm_pre = Turned()
        if kind == "turned between blocks":
            self.vit.blocks.insert(1, Turned())

    def forward(self, x):
        vit = self.vit
        if self.kind == "class token last":
            tokens = vit._pos_embed(vit.patch_embed(x)).roll(-1, 1)
            return vit.head(vit.norm(vit.blocks(tokens))[:, -1])
        if self.kind == "turned image":
            x = x.flip(3)
        return vit(nn.functional.interpolate(x, (32, 48)) if self.kind == "resized" else x)


class Turned(nn.Module):
    def forward(self, tokens):
        return tokens.flip(1)


@pytest.mark.parametrize(
    "kind", ["class token last", "turned in the norm", "turned between blocks", "turned image", "resized"]
)
def test_tokens_of_a_known_transformer_in_another_order_are_refused(kind):
    model = Wrapped(kind)
    images = torch.rand(2, 3, *((48, 32) if kind == "resized" else (24, 32)), dtype=torch.float64)
    for name in ("grad_cam", "raw_attention", "legrad"):
        if kind != "resized" or name == "grad_cam":
            with pytest.raises(
                ValueError, match=r"(order of the patches|what Turned in|does not read the first|one plain sequence)"
            ):
                METHODS[name](model, images, torch.zeros(2, dtype=torch.int64), layer="vit.blocks.0.norm1")


def test_a_known_transformer_that_is_called_part_by_part():
    vit = TinyViT().double().eval().network
    images, class_idx = torch.rand(2, 3, 24, 32, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit

        def forward(self, x):
            tokens = self.vit._pos_embed(self.vit.patch_embed(x))
            return self.vit.head(self.vit.norm(self.vit.blocks(tokens))[:, 0])

    for name in ("grad_cam", "raw_attention", "legrad"):
        ours = METHODS[name](Parts(), images, class_idx, layer="vit.blocks.0.norm1")
        torch.testing.assert_close(ours, METHODS[name](vit, images, class_idx, layer="blocks.0.norm1"))


@pytest.mark.parametrize("value", [5, "NHWC", ["a"], {"module": "a"}, [{"module": "features", "num_chs": 6}]])
def test_records_of_a_network_that_is_not_timms_mean_nothing(tiny, images, class_idx, value):
    expected = grad_cam(tiny, images, class_idx, layer="features")
    tiny.feature_info, tiny.output_fmt = value, "NHWC"
    assert torch.equal(grad_cam(tiny, images, class_idx, layer="features"), expected)


def test_patches_beyond_the_image_are_counted():
    options = {"img_size": 64, "depth": 1, "dynamic_img_size": True, "dynamic_img_pad": True, "num_classes": 3}
    network = timm.create_model("vit_tiny_patch16_224", **options).eval()
    assert feature_maps(network, torch.rand(1, 3, 50, 70), "blocks.0.norm1")[0][0].shape == (1, 192, 4, 5)


def test_a_last_norm_that_only_the_class_token_leaves_is_refused():
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    images, class_idx = torch.rand(1, 3, 64, 64), torch.tensor([1])
    for layer in ("norm", "blocks.1", "blocks.1.norm2"):
        with pytest.raises(ValueError, match="layer: the logits depend on the class token alone"):
            grad_cam(network, images, class_idx, layer=layer)
    assert grad_cam(network, images, class_idx, layer="blocks.1.norm1").any()


@pytest.mark.slow
def test_ablation_refuses_maps_that_are_a_copy():
    network = timm.create_model("hiera_tiny_224", img_size=128, num_classes=3).eval()
    with pytest.raises(ValueError, match="layer: ablation_cam wants one whose maps are a view"):
        METHODS["ablation_cam"](network, torch.rand(1, 3, 128, 128), torch.tensor([1]), layer="blocks.9")


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda tokens: Tokens(4, 4, 1)(tokens).mT, "transposed"),
        (lambda tokens: Tokens(4, 4, 1)(tokens).flip(3), "flipped"),
        (lambda tokens: Tokens(4, 4, 1)(tokens).roll((2, 2), (2, 3)), "rolled"),
        (lambda tokens: Tokens(4, 4)(tokens[:, :-1]), "class token taken for a patch"),
        (lambda tokens: Tokens(4, 4)(tokens[:, 1:].roll(-1, 1)), "one token too many dropped"),
        (lambda tokens: tokens[:, 1:].unflatten(2, (12, 4, 4)).mean(1), "channels taken for places"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_experiment_finds_wrong_layouts(wrong, name):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    images = torch.rand(1, 3, 64, 64)
    assert check_layout(network, images, layer="blocks.1.norm1").all()
    assert not check_layout(wrap(network, "blocks.1.norm1", layout=wrong), images).all()


class Ordered(nn.Module):
    """Patches in some order of axes at `place`, then the mean of all and one linear layer."""

    def __init__(self, before, after):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place, self.fc = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(8, 3)
        self.before, self.after = before, after

    def forward(self, x):
        return self.fc(self.after(self.place(self.before(self.embed(x))), len(x)).flatten(2).mean(2))


def to_windows(maps):  # (B,8,6,8) as (4B,8,3,4)
    return maps.unflatten(3, (2, 4)).unflatten(2, (2, 3)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def from_windows(windows):
    return windows.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def from_sequence(tokens):
    return tokens.permute(1, 2, 0).unflatten(2, (6, 8))


ORDERS = {
    "windows": (to_windows, lambda y, number: from_windows(y), from_windows),
    "tokens first": (lambda y: y.flatten(2).permute(2, 0, 1), lambda y, number: from_sequence(y), from_sequence),
    "frames": (lambda y: y.repeat(2, 1, 1, 1), lambda y, number: y[:number], lambda y: y.chunk(2)[0]),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("number", [1, 2, 48])
def test_other_first_axes_than_images_are_refused_until_a_function_says_how(kind, number):
    before, after, told = ORDERS[kind]
    network = Ordered(before, after).double().eval()
    plain = wrap(Ordered(lambda y: y, lambda y, number: y).double().eval(), "place", layout=channels_first)
    images = torch.rand(number, 3, 24, 32, generator=torch.Generator().manual_seed(2)).double()
    c = torch.arange(number) % 3
    for layout in (None, channels_first, Tokens(6, 8)):
        with pytest.raises(ValueError, match=r"layer: its output .* does not begin with the \d+ images"):
            METHODS["grad_cam"](wrap(network, "place", layout=layout), images, c)
    model = wrap(network, "place", layout=told)
    for name in ("grad_cam", "equal_weights", "score_cam") if number < 48 else ("grad_cam",):
        torch.testing.assert_close(METHODS[name](model, images, c), METHODS[name](plain, images, c), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"^(layer: ablation_cam wants|layout: it fails)"):
        METHODS["ablation_cam"](model, images, c)
    assert check_layout(model, images[:1]).all()


def test_maps_of_as_many_channels_as_rows_may_be_in_either_order():
    network = Ordered(lambda y: y.permute(0, 2, 3, 1), lambda y, number: y.permute(0, 3, 1, 2)).eval()
    x, c = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"layer: where the cells of ReLU's output \(2, 8, 8, 8\) lie"):
        METHODS["grad_cam"](network, x, c, layer="place")


@pytest.mark.parametrize("grid", [(8, 6), (12, 4), (1, 48)])
@pytest.mark.parametrize(
    "told", [Tokens, lambda *grid: lambda tokens: Tokens(*grid)(tokens)], ids=["tokens", "function"]
)
def test_a_wrong_grid_of_as_many_patches_is_refused(grid, told):
    network = Ordered(lambda y: y.flatten(2).mT, lambda y, number: y.mT).eval()
    images, c = torch.rand(1, 3, 26, 35), torch.tensor([0])  # the last rows and columns of pixels are in no patch
    expected = METHODS["grad_cam"](wrap(Ordered(lambda y: y, lambda y, n: y).eval(), "place"), images, c)
    found = METHODS["grad_cam"](wrap(network, "place", layout=told(6, 8)), images, c)
    torch.testing.assert_close(found, expected)
    sentence = f"^layout: wanted 6x8, the patches that Ordered cuts, got {grid[0]}x{grid[1]} cells$"
    for name in ("grad_cam", "equal_weights"):
        with pytest.raises(ValueError, match=sentence):
            METHODS[name](wrap(network, "place", layout=told(*grid)), images, c)


def test_a_wrong_grid_is_refused_by_attention_methods_too():
    network = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2, num_classes=3).eval()
    model = wrap(network, "blocks.1.norm1", layout=Tokens(6, 4, 1))
    for name in ("raw_attention", "gradient_rollout"):
        with pytest.raises(
            ValueError, match=r"^layout: wanted 4x6, the patches that VisionTransformer cuts, got 6x4 c"
        ):
            METHODS[name](model, torch.rand(1, 3, 64, 96), torch.tensor([1]))


@pytest.mark.parametrize(("grid", "warned"), [((8, 6), False), ((2, 24), True), ((24, 2), True), ((6, 8), False)])
def test_long_cells_give_a_warning(grid, warned, recwarn):
    network = Ordered(lambda y: y.flatten(2).mT, lambda y, number: y.mT).eval()
    network.embed = nn.Conv2d(3, 8, 6, 4, 1)  # overlapping patches
    METHODS["grad_cam"](wrap(network, "place", layout=Tokens(*grid)), torch.rand(1, 3, 24, 32), torch.tensor([0]))
    told = [str(warning.message) for warning in recwarn if "check_layout tells" in str(warning.message)]
    assert bool(told) == warned
    assert not told or re.match(rf"layout: cells of {24 // grid[0]} x \d+ pixels by Tokens", told[0])


def test_the_experiment_points_at_the_cells_in_doubt(images):
    """A network that shows the image itself, but for two cells far apart that changed places."""

    def exchanged(maps):
        maps = maps.clone()
        maps[:, :, 0, 0], maps[:, :, 2, 3] = maps[:, :, 2, 3].clone(), maps[:, :, 0, 0].clone()
        return maps

    network = nn.Sequential(nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    answers = check_layout(wrap(network, "0", layout=exchanged), images[:2])
    assert answers.shape == (3, 4)
    assert (~answers).nonzero().tolist() == [[0, 0], [2, 3]]
    with pytest.raises(ValueError, match="images: wanted larger ones; maps of 2x4 cells"):
        check_layout(wrap(network, "0"), images[:, :, :16])


def test_a_change_within_rounding_is_no_answer(images):
    """A network that hardly sees the image: which cell changes most would differ from processor to processor."""
    norm, head = nn.BatchNorm2d(3), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    network = nn.Sequential(nn.AvgPool2d(8), norm, *head).eval()
    nn.init.constant_(norm.weight, 4e-7)
    nn.init.ones_(norm.bias)
    assert check_layout(wrap(network.double(), "1"), images[:2]).all()
    assert not check_layout(wrap(network.float(), "1"), images[:2].float()).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (lambda: models.resnet18(num_classes=3), "layer4"),
        (lambda: models.vgg11(num_classes=3), "features.19"),
        (lambda: models.mobilenet_v3_small(num_classes=3), "features"),
        (lambda: models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=3), "encoder.layers.encoder_layer_1.ln_1"),
        (lambda: timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=3), "blocks.1.norm1"),
        (lambda: timm.create_model("cait_xxs24_224", img_size=64, depth=2), "blocks_token_only.1.norm1"),
        (lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=1, num_classes=3), "norm"),
    ],
)
def test_the_default_layer_has_the_last_maps_with_more_than_one_cell(network, layer):
    torch.manual_seed(0)
    assert default_layer(network().eval(), 64) == layer


def test_the_default_layer_of_a_network_of_other_channels():
    network = nn.Sequential(nn.Conv2d(13, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert default_layer(network, 16) == "1"


def test_a_network_without_known_maps_has_no_default_layer():
    with pytest.raises(ValueError, match=r"layer: Sequential has no layer whose maps are known; see opticam\.wrap"):
        default_layer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), 8)


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
