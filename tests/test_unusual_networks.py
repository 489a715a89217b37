"""Networks that keep, share, wrap or subclass things: right, or refused in one sentence, and left as they were."""

import linecache
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyCNN, TinyViT
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from opticam import METHODS, Tokens, check_layout, default_layer, find_method, grad_cam, metrics, wrap
from opticam import state as held
from opticam.checks import examine
from opticam.classifier import differentiate, turn
from opticam.features import attention_maps, feature_maps, features_and_gradients
from opticam.folding import folded
from opticam.saliency import combine, saliency_map
from opticam.state import frozen, hooked

from torchvision.models import squeezenet1_1  # isort: skip  (after opticam)


class Keeping(nn.Sequential):
    def forward(self, images):
        self.out = super().forward(images)
        return self.out


class Collecting(nn.Module):
    """Pools what hooks of its own, or an attribute of a part, have kept of two layers."""

    def __init__(self, by):
        super().__init__()
        self.first = Keeping(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU())
        self.second = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.GELU())
        self.fc, self.by, self.kept = nn.Linear(14, 5), by, {}
        for name in ("first", "second") if by.startswith("hook") else ():
            getattr(self, name).register_forward_hook(lambda part, given, output, name=name: self.keep(name, output))

    def keep(self, name, output):
        self.kept[name] = output.mean((2, 3)) if self.by == "hooks that pool" else output

    def forward(self, images):
        y = self.second(self.first(images))
        kept = [self.first.out, y] if self.by == "attribute" else [self.kept[name] for name in ("first", "second")]
        return self.fc(torch.cat([part.mean((2, 3)) if part.ndim == 4 else part for part in kept], 1))

    def by_hand(self, images, without=None):
        z = self.first[1](self.first[0](images)).detach()
        z[:, [] if without is None else [without]] = 0
        z.requires_grad_()
        y = self.second[1](self.second[0](z))
        return self.fc(torch.cat([z.mean((2, 3)), y.mean((2, 3))], 1)), {"first": z, "second": y}


@pytest.mark.parametrize("layer", ["first", "second"])
@pytest.mark.parametrize("by", ["hooks", "hooks that pool", "attribute"])
def test_gradients_of_what_a_network_keeps_aside(images, class_idx, by, layer):
    torch.manual_seed(0)
    network = Collecting(by).double().eval()
    model = wrap(network, layer, layout=lambda maps: maps)
    features, gradients, logits = features_and_gradients(model, images, class_idx)
    expected, maps = network.by_hand(images)
    (slope,) = torch.autograd.grad(expected.gather(1, class_idx[:, None]).sum(), maps[layer])
    torch.testing.assert_close(logits, expected.detach())
    torch.testing.assert_close(features, maps[layer].detach())
    torch.testing.assert_close(gradients, slope, rtol=0, atol=1e-15)


def test_ablation_of_what_a_network_keeps_aside(images, class_idx):
    torch.manual_seed(0)
    network = Collecting("hooks").double().eval()
    model = wrap(network, "first", layout=lambda maps: maps)
    weights = []
    for channel in range(8):
        logits, _ = network.by_hand(images, without=channel)
        whole, _ = network.by_hand(images)
        y, y_k = (some.gather(1, class_idx[:, None])[:, 0] for some in (whole, logits))
        weights.append((y - y_k) / y)
    expected = saliency_map(combine(network.by_hand(images)[1]["first"], torch.stack(weights, 1)), images.shape[2:])
    torch.testing.assert_close(METHODS["ablation_cam"](model, images, class_idx), expected.detach())
    model = wrap(Collecting("attribute").double().eval(), "first", layout=lambda maps: maps)
    with pytest.raises(ValueError, match=r"^layer: Keeping keeps its output aside"):
        METHODS["ablation_cam"](model, images, class_idx)


class Handing(nn.Module):
    """Hands on what it is given."""

    def forward(self, images):
        return images[0] if isinstance(images, list) else images


def test_a_layer_that_hands_on_the_images(images, class_idx):
    network = nn.Sequential(Handing(), nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    before = images.clone()
    _, gradients, _ = features_and_gradients(wrap(network, "0", layout=lambda maps: maps), images, class_idx)
    assert gradients.any()
    assert not images.requires_grad
    assert torch.equal(images, before)


class Fixed(nn.Module):
    """A layer that gives a buffer, whatever comes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.rand(5, 3, 8, 8))

    def forward(self, images):
        return self.grid


def test_what_a_layer_keeps_is_left_as_found(images, class_idx):
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.fixed, self.inner = Fixed(), TinyCNN()

        def forward(self, images):
            return self.inner(images + self.fixed(images).mean())

    network = Adding().double().eval()
    grad_cam(wrap(network, "fixed", layout=lambda maps: maps), images, class_idx)
    assert not network.fixed.grid.requires_grad


@pytest.mark.parametrize("call", [lambda keep, y: keep(images=y), lambda keep, y: keep([y])], ids=["by name", "a list"])
def test_a_layer_that_hands_on_what_it_was_given_otherwise(images, class_idx, call):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.keep, self.last = nn.Conv2d(3, 6, 3, 2), Handing(), nn.Conv2d(6, 6, 3, 1, 1)
            self.fc, self.call = nn.Linear(6, 5), lambda keep, y: keep(y)

        def forward(self, images):
            y = self.first(images)
            return self.fc((y + self.last(self.call(self.keep, y)).tanh()).mean((2, 3)))

    model = wrap(Residual().double().eval(), "keep", layout=lambda maps: maps)
    expected = features_and_gradients(model, images, class_idx)
    model.network.call = call
    for one, other in zip(features_and_gradients(model, images, class_idx), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["grad_cam", "opti_cam", "opti_cam:fast", "rise"])
def test_autocast_around_the_call_does_not_reach_sums_and_slopes(images, class_idx, name):
    """Of a network that computes in single precision whatever is said around it."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = TinyCNN()

        def forward(self, images):
            with torch.autocast("cpu", enabled=False):
                return self.inner(images)

    network, method = Single().eval(), find_method(name)
    options = {"num_masks": 8} if name == "rise" else {"layer": "inner.features"}
    options |= {"num_steps": 6} if name.startswith("opti_cam") else {}
    expected = method(network, images.float(), class_idx, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(network, images.float(), class_idx, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class LastConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LastStem(nn.Sequential):
    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = LastStem(nn.Conv2d(3, 12, 4, 4), nn.ReLU()), LastConv(12, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, images):
        return self.fc(F.relu(self.conv(self.stem(images))).mean((1, 2)))


def test_a_parametrized_subclass_is_not_taken_for_what_it_inherits():
    network = ChannelsLast().eval()
    weight_norm(network.conv)
    with pytest.raises(ValueError, match=r"^layer: "):
        feature_maps(network, torch.rand(2, 3, 32, 32), "conv")


@pytest.mark.parametrize("layer", ["stem", "conv"])
def test_subclasses_that_move_the_channels_are_not_taken_for_what_they_inherit(layer):
    network = ChannelsLast().eval()
    with pytest.raises(ValueError, match=r"^layer: "):
        feature_maps(network, torch.rand(2, 3, 32, 32), layer)


class ByFunction(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = TinyCNN(), change

    def forward(self, images):
        return self.inner(self.change(images))


def dropping():
    """A network that draws anew what it sees, by more than the rounding of half precision."""
    torch.manual_seed(0)
    network = ByFunction(lambda x: F.dropout(x, 0.9)).eval()
    network.inner.fc.bias.data.zero_()
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dropout_by_function_is_seen_in_every_precision(dtype):
    network, images = dropping().to(dtype), torch.rand(3, 3, 24, 32).to(dtype)
    with pytest.raises(ValueError, match="two passes of ByFunction over one image differ"):
        grad_cam(network, images, torch.tensor([0, 1, 2]), layer="inner.features")


def test_dropout_by_function_is_seen_under_autocast():
    network, images = dropping(), torch.rand(3, 3, 24, 32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="two passes of ByFunction"):
        grad_cam(network, images, torch.tensor([0, 1, 2]), layer="inner.features")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_takes_each_image_for_itself_passes_in_every_precision(dtype):
    torch.manual_seed(0)
    network, images = ByFunction(torch.sqrt).to(dtype).eval(), torch.rand(3, 3, 24, 32).to(dtype)
    grad_cam(network, images, torch.tensor([0, 1, 2]), layer="inner.features")


def test_a_black_image_does_not_clear_a_network():
    network, images = ByFunction(lambda x: x / x.amax().clamp(min=1e-6)).eval(), torch.rand(3, 3, 24, 32)
    class_idx = torch.tensor([0, 1, 2])
    grad_cam(network, torch.zeros_like(images), class_idx, layer="inner.features")
    with pytest.raises(ValueError, match="depend on the other images of its batch"):
        grad_cam(network, images, class_idx, layer="inner.features")


class InAnObject(nn.Module):
    """Keeps maps in an object, which a copy of the network shares."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.last, self.fc, self.kept = nn.Conv2d(8, 6, 3, 2, 1), nn.Linear(14, 5), SimpleNamespace()
        self.body[1].running_var.fill_(0.3)

    def forward(self, images):
        self.kept.z = self.body(images)
        y = self.last(self.kept.z).relu()
        return self.fc(torch.cat([y.mean((2, 3)), self.kept.z.mean((2, 3))], 1))


def test_a_folded_twin_takes_its_turn_where_the_network_does():
    network, images = InAnObject().eval(), torch.rand(2, 3, 24, 32)
    with frozen(network), torch.no_grad():
        logits = examine(network, images).logits
        twin = folded(network, images, logits)
        assert twin is not network
        with turn(network), ThreadPoolExecutor(1) as others:
            waiting = others.submit(lambda: turn(twin).acquire(timeout=0.05))
            assert not waiting.result()


class Clipped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


def test_a_convolution_that_does_more_is_not_folded():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    network = nn.Sequential(Clipped(3, 8, 3, 2, 1), nn.BatchNorm2d(8), *head).eval()
    network[1].running_mean.uniform_(-0.1, 0.1)
    images = torch.rand(2, 3, 16, 16) * torch.tensor([0.05, 3.0]).view(2, 1, 1, 1)  # the first is not clipped
    with frozen(network), torch.no_grad():
        assert folded(network, images, network(images)) is network


def test_weights_that_are_computed_are_refused_and_leave_nothing_behind(images, class_idx):
    network = TinyCNN().double().eval()
    for module in network.modules():
        for name, weights in module._parameters.items():
            module._parameters[name] = weights * 1.0
    with pytest.raises(ValueError, match=r"^model: weight of \w+ is computed from other tensors; wanted leaf"):
        grad_cam(network, images, class_idx, layer="features")
    assert not held._held


class SelfAttention(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)
        self.call = call

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)
        return self.fc((tokens + self.call(self.attention, tokens))[:, 0])


def weighted(attention, tokens):
    output, weights = attention(tokens, tokens, tokens)
    return output * (1 + weights[:, :1, :1])


def test_attention_whose_weights_the_network_uses(images, class_idx):
    """Its gradient counts both ways by which the attention reaches the logits."""
    torch.manual_seed(0)
    network = SelfAttention(weighted).double().eval()
    model = wrap(network, "patches", layout=Tokens(3, 4, 1))
    (maps,), (slopes,), logits = attention_maps(model, images, class_idx)
    torch.testing.assert_close(logits, network(images).detach())
    tokens = network.patches(images).flatten(2).mT
    tokens = torch.cat([network.first.expand(5, -1, -1), tokens], 1)
    attention = network.attention
    values = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)[..., 16:].unflatten(2, (2, 4))
    A = maps.clone().requires_grad_()
    output = attention.out_proj((A @ values.transpose(1, 2)).transpose(1, 2).flatten(2))
    output = output * (1 + A.mean(1)[:, :1, :1])
    expected = network.fc((tokens + output)[:, 0])
    torch.testing.assert_close(expected, logits)
    (slope,) = torch.autograd.grad(expected.gather(1, class_idx[:, None]).sum(), A)
    torch.testing.assert_close(slopes, slope)


def test_attention_given_by_name_is_that_given_by_place(images, class_idx):
    network = SelfAttention(lambda attention, t: attention(query=t, key=t, value=t)[0]).double().eval()
    model = wrap(network, "patches", layout=Tokens(3, 4, 1))
    found = attention_maps(model, images, class_idx)
    network.call = lambda attention, t: attention(t, t, t)[0]
    expected = attention_maps(model, images, class_idx)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


class Delegating(nn.Module):
    """An adapter around attention that answers for what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(12, 2), nn.Linear(2, 12)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, tokens, **options):
        return self.inner(tokens, **options) + self.up(self.down(tokens))


def test_an_adapter_that_answers_for_the_attention_it_wraps(images, class_idx):
    torch.manual_seed(0)
    vit = TinyViT().double().eval()
    for block in vit.network.blocks:
        block.attn = Delegating(block.attn).double()
    before = [set(vars(block.attn)) for block in vit.network.blocks]
    METHODS["raw_attention"](vit, images, class_idx)
    assert [set(vars(block.attn)) for block in vit.network.blocks] == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_that_ends_what_runs_without_gradients(images, class_idx, mode):
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TinyCNN().features

        def forward(self, images):
            with mode():
                return self.inner(images)

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.still = Still()
            self.head = nn.Sequential(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, images):
            maps = self.still(images)
            return self.head(maps.clone() if maps.is_inference() else maps)

    assert grad_cam(Probe().double().eval(), images, class_idx, layer="still").any()


def test_gradients_are_computed_in_the_thread_that_asks(tiny, images):
    x, seen = images.requires_grad_(), []
    logits = tiny(x)
    logits.register_hook(lambda gradient: seen.append(torch.autograd.is_multithreading_enabled()))
    differentiate(tiny, logits.sum(), x)
    assert seen == [False]


@pytest.mark.slow
def test_another_default_device_changes_nothing(images, class_idx):
    class Shifted(ByFunction):
        def __init__(self):
            super().__init__(torch.abs)
            self.register_buffer("shift", torch.zeros(3))

    network, x, S = Shifted().double().eval(), images[:2], torch.rand(2, 1, 24, 32)
    boxes = [torch.tensor([[2.0, 3, 20, 18]])] * 2

    def found():
        maps = METHODS["rise"](network, x, class_idx[:2], num_masks=4)
        places = [getattr(metrics, name)(S, boxes) for name in ("soft_f1", "pointing_game", "box_hits")]
        places += [metrics.localization_error(S, boxes), metrics.energy_pointing_game(S, boxes)]
        road = metrics.road(network, x, class_idx[:2], S.double())
        return maps, check_layout(network, x, layer="inner.features"), *places, road

    expected = found()
    torch.set_default_device("meta")
    try:
        wrap(network, "inner.features", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.2))
        assert default_layer(network, 32)
        other = found()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, other, expected))


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()


def test_a_function_without_backward_is_one_sentence():
    network = ByFunction(torch.abs).eval()
    network.inner.features[3].forward = OneWay.apply
    with pytest.raises(ValueError, match="cannot be differentiated"):
        default_layer(network, 32)


class Table(nn.Module):
    """Looks pixels up, so that brighter ones than it knows are none; its outputs lie in [0,1]."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(256, 4), nn.Conv2d(12, 5, 3)

    def forward(self, images):
        colours = self.table((images * 255).round().long())
        return self.last(colours.permute(0, 1, 4, 2, 3).flatten(1, 2)).relu().mean((2, 3)) * 0.01


def test_a_network_that_looks_pixels_up_is_asked_no_more_than_it_knows():
    METHODS["eigen_cam"](Table().eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), layer="last")


class MeanFree(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, features):
        return (features - features.mean(0)) @ self.weight.T


@pytest.mark.slow
def test_a_parametrized_part_of_ones_own_is_looked_at():
    network, head = squeezenet1_1(num_classes=6), MeanFree()
    weight_norm(head)
    network.classifier = nn.Sequential(nn.Conv2d(512, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    with pytest.raises(ValueError, match="depend on the other images of its batch"):
        grad_cam(network.eval(), torch.rand(2, 3, 64, 64), torch.tensor([0, 1]), layer="features")


def test_one_network_on_two_scales_is_warned_of(tiny, images):
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def forward(self, x):
            return self.inner(x) + self.inner(F.avg_pool2d(x, 2))

    with pytest.warns(UserWarning, match="runs several times in a pass"):
        feature_maps(Scales(), images, "inner.features")


def test_cutting_a_network_keeps_no_sources(tiny, images, class_idx):
    METHODS["ablation_cam"](tiny, images, class_idx, layer="features.1")
    before = len(linecache.cache)
    METHODS["ablation_cam"](tiny, images, class_idx, layer="features.1")
    assert len(linecache.cache) == before


def test_hooks_of_others_get_what_ours_hands_on(tiny, images):
    heard = []
    tiny.features.register_forward_hook(lambda module, given, output: heard.append(output))
    replaced = torch.zeros(5, 6, 6, 8, dtype=torch.float64)
    with hooked(tiny.features, lambda module, given, output: replaced, first=True):
        tiny(images)
    assert heard[0] is replaced
