"""Whatever the head, the layout, the dtype and the size: the map and the scores by the formula, or one sentence."""

import re
from typing import NamedTuple

import pytest
import torch
from conftest import TinyViT, state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from opticam import METHODS, opti_cam, score, wrap
from opticam.layouts import Tokens, channels_first, channels_last

HALVES = torch.float16, torch.bfloat16
PASSING = ["grad_cam", "grad_cam_plus_plus", "hires_cam", "layer_cam", "eigen_cam", "equal_weights"]
CHEAP = [*PASSING, "fake_cam"]
drawn = settings(max_examples=60, derandomize=True, deadline=None, database=None)


class Record(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class Output(nn.Module):
    """The last step of a network: how it hands over its logits (B,C)."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, y):
        other = y[None]
        return {
            "tensor": y,
            "numbers": y[:, 0],
            "squeezed": y.squeeze(),
            "tuple": (y, other),
            "list": [other, y],
            "dict": {"out": y, "aux": other},
            "record": Record(y, y + 1),
            "named": {"logits": y, "loss": y + 1},
        }[self.form]


class Net(nn.Module):
    """Patches, arranged in some layout at `place`, each through a ReLU; the mean of all, and one linear layer."""

    def __init__(self, layout, form, num_classes, patch):
        super().__init__()
        self.layout = layout
        self.embed = nn.Conv2d(3, 4, patch, patch)
        self.place = nn.ReLU()
        self.fc = nn.Linear(4, num_classes)
        self.output = Output(form)

    def forward(self, images):
        maps = self.embed(images)
        if self.layout == "last":
            return self.output(self.fc(self.place(maps.permute(0, 2, 3, 1)).mean((1, 2))))
        if isinstance(self.layout, int):  # that many tokens before the patches
            tokens = F.pad(maps.flatten(2).transpose(1, 2), (0, 0, self.layout, 0), value=9.0)
            return self.output(self.fc(self.place(tokens)[:, self.layout :].mean(1)))
        return self.output(self.fc(self.place(maps).mean((2, 3))))


class Case(NamedTuple):
    network: Net
    model: nn.Module
    head: str
    images: torch.Tensor
    class_idx: torch.Tensor


@st.composite
def cases(draw, dtype=torch.float64):
    torch.manual_seed(draw(st.integers(0, 99)))
    num_images, patch = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    height, width = (draw(st.integers(2 * patch, 6 * patch)) for _ in range(2))
    layout = draw(st.sampled_from(["first", "known", "last", 0, 1, 3]))
    form = draw(st.sampled_from(["tensor", "numbers", "squeezed", "tuple", "list", "dict", "record", "named"]))
    num_classes = 1 if form in ("numbers", "squeezed") else draw(st.integers(1, 4))
    head = draw(st.sampled_from(["softmax", "sigmoid"]))
    network = Net(layout, form, num_classes, patch).to(dtype)
    network.train(draw(st.booleans()))
    network.fc.requires_grad_(draw(st.booleans()))
    network.fc.weight.data *= 10 ** draw(st.integers(-1, 2))  # some are very sure of themselves
    told = {"last": channels_last, "first": channels_first, "known": None}
    grid = height // patch, width // patch
    model = wrap(
        network,
        "embed" if layout == "known" else "place",
        head=head,
        layout=told[layout] if layout in told else Tokens(*grid, layout),
    )
    images = torch.rand(num_images, 3, height, width, dtype=dtype)
    class_idx = torch.randint(max(2, num_classes), (num_images,))
    return Case(network, model, "sigmoid" if num_classes == 1 else head, images, class_idx)


def by_hand(case):
    """Feature maps, the weights of each image's class and its logits (B,C), by the network's own weights alone."""
    with torch.no_grad():
        maps = F.conv2d(case.images, case.network.embed.weight, case.network.embed.bias, case.network.embed.stride)
        weight, bias = case.network.fc.weight, case.network.fc.bias
        y = maps.relu().mean((2, 3)) @ weight.T + bias
        if len(weight) == 1:
            weight, y = torch.cat([weight, -weight]), torch.cat([y, -y], 1)
    return maps, weight[case.class_idx], y


def probability(y, class_idx, head):
    rows = zip(y.double().tolist(), class_idx.tolist(), strict=True)
    if head == "sigmoid":
        return torch.tensor([1 / (1 + torch.tensor(-row[c], dtype=torch.float64).exp()) for row, c in rows])
    return torch.stack([1 / (torch.tensor(row, dtype=torch.float64) - row[c]).exp().sum() for row, c in rows])


@pytest.mark.slow
@drawn
@given(case=cases())
def test_the_map_is_that_of_the_formula(case):
    before, pixels = state(case.model), case.images.clone()
    found = METHODS["grad_cam"](case.model, case.images, case.class_idx)
    assert state(case.model) == before
    assert torch.equal(case.images, pixels)
    maps, weights, _ = by_hand(case)
    if case.model.layer == "embed":  # before the ReLU, whose slope is the gradient's
        weights = weights * (maps > 0).double().mean((2, 3))
    else:
        maps = maps.relu()
    cam = (weights[:, :, None, None] * maps).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, case.images.shape[2:], mode="bilinear")
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    sure = (high - low > 1e-12)[:, 0, 0, 0]
    torch.testing.assert_close(found[sure], ((cam - low) / (high - low))[sure], rtol=0, atol=1e-7)
    assert not found[(high == 0)[:, 0, 0, 0]].any()


@pytest.mark.slow
@drawn
@given(case=cases(), name=st.sampled_from(CHEAP))
def test_maps_of_a_batch_are_the_maps_one_by_one(case, name):
    whole = METHODS[name](case.model, case.images, case.class_idx)
    assert whole.shape == (len(case.images), 1, *case.images.shape[2:])
    assert ((whole >= 0) & (whole <= 1)).all()
    for i in range(len(case.images)):
        one = METHODS[name](case.model, case.images[i : i + 1], case.class_idx[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one, rtol=0, atol=1e-9)


@pytest.mark.slow
@settings(drawn, max_examples=20)
@given(case=cases())
def test_opti_cam_of_a_batch_is_opti_cam_one_by_one(case):
    before = state(case.model)
    whole = opti_cam(case.model, case.images, case.class_idx, num_steps=4)
    assert state(case.model) == before
    assert ((whole.saliency >= 0) & (whole.saliency <= 1)).all()
    for i in range(len(case.images)):
        one = opti_cam(case.model, case.images[i : i + 1], case.class_idx[i : i + 1], num_steps=4)
        torch.testing.assert_close(whole.saliency[i : i + 1], one.saliency, rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.weights[i : i + 1], one.weights, rtol=0, atol=1e-9)


@pytest.mark.slow
@drawn
@given(case=cases(), seed=st.integers(0, 9), power=st.sampled_from([0, 0.1, 1, 9]))
def test_scores_are_those_of_the_head(case, seed, power):
    generator = torch.Generator().manual_seed(seed)
    S = torch.rand(len(case.images), 1, *case.images.shape[2:], dtype=torch.float64, generator=generator) ** power
    before = state(case.model)
    table = score(case.model, case.images, case.class_idx, S)
    assert state(case.model) == before
    columns = {name: torch.tensor(table[name].to_numpy()) for name in table}
    p, o = (
        probability(by_hand(case._replace(images=x))[2], case.class_idx, case.head)
        for x in (case.images, case.images * S)
    )
    torch.testing.assert_close(columns["prob"], p, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(columns["masked_prob"], o, rtol=1e-9, atol=1e-300)
    p, o = columns["prob"], columns["masked_prob"]
    drop, gain, increase = (columns[f"average_{name}"] for name in ("drop", "gain", "increase"))
    assert ((drop >= 0) & (drop <= 1) & (gain >= 0) & (gain <= 1)).all()
    assert not (drop * gain).any()
    assert torch.equal(increase, (o > p).double())
    assert torch.equal(drop > 0, o < p)
    assert torch.equal(gain > 0, o > p)


@pytest.mark.slow
@drawn
@given(data=st.data(), dtype=st.sampled_from([torch.float32, *HALVES]), name=st.sampled_from(CHEAP))
def test_other_dtypes(data, dtype, name):
    case = data.draw(cases(dtype))
    before = state(case.model)
    found = METHODS[name](case.model, case.images, case.class_idx)
    assert found.dtype == torch.float32
    assert found.shape == (len(case.images), 1, *case.images.shape[2:])
    assert ((found >= 0) & (found <= 1)).all()
    table = score(case.model, case.images, case.class_idx, found)
    assert state(case.model) == before
    with torch.no_grad():
        y = case.network.fc(case.network.place(case.network.embed(case.images)).mean((2, 3)))
    y = torch.cat([y, -y], 1) if y.shape[1] == 1 else y
    apart = 1e-4 if dtype == torch.float32 else 0.2  # of logits that are rounded in another order
    scale = float(y.abs().max().clamp(min=1))
    wanted = probability(y, case.class_idx, case.head)
    assert (torch.tensor(table["prob"].to_numpy()) - wanted).abs().max() <= apart * scale


@pytest.mark.slow
@settings(drawn, max_examples=25)
@given(
    size=st.tuples(*[st.integers(1, 4)] * 2),
    patch=st.integers(2, 4),
    options=st.sampled_from([{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]),
    num_images=st.integers(1, 3),
    layer=st.sampled_from(
        ["network.blocks", "network.blocks.1.norm1", "network.patch_embed", "network.norm", "network"]
    ),
    name=st.sampled_from(["grad_cam", "equal_weights", "raw_attention", "attention_rollout", "legrad"]),
)
def test_transformers_are_explained_or_refused(size, patch, options, num_images, layer, name):
    torch.manual_seed(0)
    height, width = (patch * side for side in size)
    network = TinyViT(img_size=(height, width), patch_size=patch, **options).double()
    images, class_idx = torch.rand(num_images, 3, height, width, dtype=torch.float64), torch.arange(num_images)
    before = state(network)
    try:
        found = METHODS[name](network, images, class_idx, layer=layer)
    except ValueError as error:
        assert re.match(r"(layer|model): [^\n]+$", str(error))  # noqa: PT017
    else:
        assert found.shape == (num_images, 1, height, width)
        assert ((found >= 0) & (found <= 1)).all()
        one = METHODS[name](network, images[-1:], class_idx[-1:], layer=layer)
        torch.testing.assert_close(found[-1:], one, rtol=0, atol=1e-9)
        if name in ("grad_cam", "equal_weights"):
            prefix = 0 if layer == "network.patch_embed" else network.network.num_prefix_tokens
            told = wrap(network, layer, layout=Tokens(*size, prefix))
            torch.testing.assert_close(found, METHODS[name](told, images, class_idx), rtol=0, atol=1e-9)
    assert state(network) == before


FAULTS = {
    "images": [
        lambda c: {"images": c.images.long()},
        lambda c: {"images": c.images[0]},
        lambda c: {"images": c.images[:0]},
        lambda c: {"images": c.images[..., :0]},
        lambda c: {"images": c.images.float()},
        lambda c: {"images": c.images + 1},
        lambda c: {"images": c.images * torch.nan},
        lambda c: {"images": c.images.to("meta"), "class_idx": c.class_idx.to("meta")},
        lambda c: {"images": c.images.numpy()},
        lambda c: {"images": None},
    ],
    "class_idx": [
        lambda c: {"class_idx": c.class_idx.int()},
        lambda c: {"class_idx": c.class_idx[0]},
        lambda c: {"class_idx": c.class_idx[:, None]},
        lambda c: {"class_idx": c.class_idx.repeat(2)},
        lambda c: {"class_idx": c.class_idx - 9},
        lambda c: {"class_idx": c.class_idx + 9},
        lambda c: {"class_idx": c.class_idx.to("meta")},
        lambda c: {"class_idx": c.class_idx.tolist()},
        lambda c: {"class_idx": 0},
    ],
    "layer": [
        lambda c: {"layer": "elsewhere"},
        lambda c: {"layer": ""},
        lambda c: {"layer": 3},
        lambda c: {"layer": nn.ReLU()},
        lambda c: {"layer": "output"},
        lambda c: {"layer": "fc"},
        lambda c: {"model": c.network, "layer": None},
        lambda c: {"model": wrap(c.network, "place", layout=Tokens(7, 1, 50))},
        lambda c: {"model": wrap(c.network, "place", layout=lambda output: output[0])},
        lambda c: {"model": wrap(c.network, "place", layout=lambda output: None)},
        lambda c: {"model": wrap(c.network, "place", layout=lambda output: output.reshape(7, 5, -1))},
    ],
    "model": [
        lambda c: {"model": lambda images: images},
        lambda c: {"model": None},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: "text")},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: torch.zeros(7, 2))},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: torch.zeros(len(c.images), 2).long())},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: torch.zeros(len(c.images), 2, 2))},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: torch.zeros(len(c.images), 0))},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: (output, output, 5))},
        lambda c: {"model": wrap(c.network, "place", to_logits=lambda output: None)},
    ],
}


@pytest.mark.slow
@settings(drawn, max_examples=100)
@given(case=cases(), argument=st.sampled_from(list(FAULTS)), number=st.integers(0, 10), name=st.sampled_from(PASSING))
def test_a_wrong_argument_is_named_in_one_sentence(case, argument, number, name):
    fault = FAULTS[argument][number % len(FAULTS[argument])](case)
    given = {"model": case.model, "images": case.images, "class_idx": case.class_idx, "layer": case.model.layer} | fault
    before = state(case.model)
    with pytest.raises((ValueError, TypeError), match=rf"^({argument}|layout): [^\n]+$"):
        METHODS[name](given.pop("model"), given.pop("images"), given.pop("class_idx"), **given)
    assert state(case.model) == before
