"""What is refused at the door, in one sentence, and what must not be."""

import random
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opticam import METHODS, check_layout, default_layer, evaluate, grad_cam, load_model, opti_cam, score, wrap
from opticam.checks import as_seed, check_at_least, check_inputs, check_network, check_whole, examine
from opticam.classifier import logits_of_sigmoid, logits_of_softmax
from opticam.features import count_passes, feature_maps
from opticam.lab.datasets import Sample
from opticam.lab.explorer import explanation_of
from opticam.state import frozen

from torchvision import transforms  # isort: skip  (after opticam)
from torchvision.ops import Permute  # isort: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": "photo.jpg"}, TypeError, "images: wanted a tensor"),
        ({"images": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)}, TypeError, "images: wanted a floating-point dtype"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.float64)}, ValueError, "images: wanted shape"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.float64)}, ValueError, "images: wanted shape"),
        (
            {"images": torch.zeros(5, 8, 9, 3).double()},
            ValueError,
            r"images: wanted shape \(B,C,H,W\), channels before",
        ),
        ({"images": torch.zeros(5, 3, 8, 8)}, TypeError, "images: wanted the dtype of the model, torch.float64"),
        ({"images": torch.zeros(5, 3, 8, 8, device="meta")}, ValueError, "wanted on the device"),
        (
            {"images": torch.rand(5, 3, 8, 8).double().to_sparse()},
            TypeError,
            "images: wanted a strided tensor, got torch",
        ),
        (
            {"images": torch.nested.nested_tensor([torch.rand(3, 8, 8), torch.rand(3, 9, 8)]).double()},
            TypeError,
            "images: wanted a strided tensor, got a nested one",
        ),
        ({"class_idx": 3}, TypeError, "class_idx: wanted an int64 tensor"),
        ({"class_idx": torch.zeros(5)}, TypeError, "class_idx: wanted dtype torch.int64"),
        ({"class_idx": torch.zeros(4, dtype=torch.int64)}, ValueError, r"class_idx: wanted shape \(5,\)"),
    ],
)
def test_bad_input_in_one_sentence(tiny, images, class_idx, change, error, message):
    given = {"model": tiny, "images": images, "class_idx": class_idx, **change}
    with pytest.raises(error, match=message) as raised:
        check_inputs(**given)
    assert "\n" not in str(raised.value)


class Own(nn.Module):
    """A network around another, with a forward of somebody's own."""

    def __init__(self, network, forward):
        super().__init__()
        self.inner, self.own = network, forward

    def forward(self, images):
        return self.own(self.inner, images)


def first_pass(model, images):
    with frozen(model), torch.no_grad():
        return examine(model, images)


def refused(error, message, call):
    with pytest.raises(error, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def quantised(tiny):
    return torch.ao.quantization.quantize_dynamic(tiny.float(), {nn.Linear}, dtype=torch.qint8)


def stored_as_int8(tiny):
    tiny.fc.weight = nn.Parameter(tiny.fc.weight.mul(100).to(torch.int8), requires_grad=False)
    return tiny


def exported(tiny):
    return torch.export.export(tiny, (torch.rand(5, 3, 24, 32).double(),)).module()


def half_on_meta(tiny):
    tiny.fc = tiny.fc.to("meta")
    return tiny


def batch_statistics(tiny):
    tiny.features.append(nn.BatchNorm2d(6, track_running_stats=False))
    return tiny


FOREIGN = {
    "scripted": (torch.jit.script, TypeError, "model: TorchScript"),
    "traced": (lambda tiny: torch.jit.trace(tiny, torch.rand(1, 3, 24, 32).double()), TypeError, "model: TorchScript"),
    "scripted inside": (lambda tiny: nn.Sequential(torch.jit.script(tiny)), TypeError, "model: TorchScript"),
    "exported": (exported, TypeError, "model: torch.export hides its layers"),
    "quantised": (quantised, TypeError, "model: Linear is quantised"),
    "int8 weights": (stored_as_int8, TypeError, "model: Linear is quantised"),
    "meta": (lambda tiny: tiny.to("meta"), ValueError, "model: weights on the meta device"),
    "meta in part": (half_on_meta, ValueError, "model: weights on the meta device"),
    "batch norm of the batch": (batch_statistics, ValueError, "model: BatchNorm2d without running statistics"),
    "a crop inside": (
        lambda tiny: nn.Sequential(OrderedDict(crop=transforms.CenterCrop(16), features=tiny)),
        ValueError,
        "model: CenterCrop inside moves the pixels",
    ),
    "a function": (
        lambda tiny: lambda images: tiny(images),
        TypeError,
        r"model: wanted a torch\.nn\.Module, got function",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "exported")) for kind in FOREIGN]
)
def test_foreign_networks_in_one_sentence(tiny, images, class_idx, kind):
    change, error, message = FOREIGN[kind]
    model = change(tiny)
    for call in (
        lambda: grad_cam(model, images, class_idx, layer="features"),
        lambda: opti_cam(model, images, class_idx, layer="features", num_steps=1),
        lambda: METHODS["fake_cam"](model, images, class_idx),
        lambda: METHODS["rise"](model, images, class_idx, num_masks=2),
        lambda: score(model, images, class_idx, images[:, :1]),
    ):
        refused(error, message, call)
    if isinstance(model, nn.Module):
        layer = "0.features" if kind == "scripted inside" else "features"
        refused(error, message, lambda: check_network(wrap(model, layer)))


def test_a_norm_of_each_image_alone_passes(tiny):
    check_network(nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3)))


@pytest.mark.parametrize("name", ["grad_cam", "opti_cam", "rise", "score_cam"])
def test_a_network_of_two_inputs(tiny, images, class_idx, name):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def forward(self, images, age, *, sex):
            return self.inner(images) + age + sex

    for model in (Two(), wrap(Two(), "inner.features")):
        call = lambda model=model: METHODS[name](model, images, class_idx, layer="inner.features")  # noqa: E731
        refused(TypeError, "model: Two wants age, sex beside the images; wanted a module that takes", call)


def test_a_type_error_of_the_networks_own_is_not_hidden(tiny, images, class_idx):
    model = Own(tiny, lambda inner, images: inner(images) + "a")
    with pytest.raises(TypeError, match="unsupported operand"):
        grad_cam(model, images, class_idx, layer="inner.features")


def test_a_scalar_of_another_dtype_does_not_say_what_images_are_to_be(tiny, images, class_idx):
    model = Own(tiny, lambda inner, images: inner(images) * model.scale)
    model._parameters = {"scale": nn.Parameter(torch.tensor(1.0)), **model._parameters}
    expected = grad_cam(tiny, images, class_idx, layer="features")
    assert torch.equal(grad_cam(model, images, class_idx, layer="inner.features"), expected)
    assert wrap(model, "inner.features", mean=0.5, std=0.5).mean.dtype == images.dtype
    assert default_layer(model, 24) == f"inner.{default_layer(tiny, 24)}"
    evaluate(
        model, [Sample("a", images[0].float(), 0, torch.zeros(0, 4))], {"a": partial(grad_cam, layer="inner.features")}
    )


def test_complex_images_and_other_numbers_of_channels(tiny, images, class_idx):
    refused(
        TypeError,
        "images: wanted a floating-point dtype, got torch.complex128",
        lambda: grad_cam(tiny, images.to(torch.complex128), class_idx, layer="features"),
    )
    model = wrap(tiny, "features", mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    refused(ValueError, "images: wanted 3 channels, got 1", lambda: grad_cam(model, images[:, :1], class_idx))


ENDINGS = {
    "softmax": lambda y: y.softmax(1),
    "softmax of a record": lambda y: {"logits": y.softmax(-1)},
    "softmax in percent": lambda y: 100 * y.softmax(1),
    "exponential of log-softmax": lambda y: F.log_softmax(y, 1).exp(),
    "sigmoid": lambda y: y.sigmoid(),
    "sigmoid by hand": lambda y: 1 / (1 + torch.exp(-20 * y)),
    "flat sigmoid by hand": lambda y: 1 / (1 + torch.exp(-y[:, :1] / 9)),
    "hyperbolic tangent": lambda y: (1 + (y[:, :1] / 9).tanh()) / 2,
    "arc tangent": lambda y: 0.5 + (y / 9).atan() / torch.pi,
    "clamp": lambda y: (0.5 + y[:, :1] / 99).clamp(0, 1),
    "hard tangent": lambda y: F.hardtanh(0.5 + y / 99, 0, 1),
    "one sigmoid": lambda y: y[:, :1].sigmoid(),
    "one sigmoid without dimension": lambda y: y[:, 0].sigmoid().squeeze(),
    "one of two by softmax": lambda y: y[:, :2].softmax(1)[:, 1],
    "sigmoids of two parts": lambda y: torch.cat([(y[:, :2] / 9).sigmoid(), (y[:, 2:] / 9).sigmoid()], 1),
    "mean of sigmoids": lambda y: torch.stack([(y / 9).sigmoid(), (y / 8).sigmoid()]).mean(0),
    "mean of two sigmoids": lambda y: ((y / 9).sigmoid() + (y / 8).sigmoid()) / 2,
    "one minus a sigmoid": lambda y: 1 - (y[:, :1] / 9).sigmoid(),
    "root of a sigmoid": lambda y: (y / 9).sigmoid() ** 0.5,
    "sigmoid kept from 0 and 1": lambda y: (y / 9).sigmoid().clamp(1e-6, 1 - 1e-6),
    "sigmoid in percent": lambda y: 100 * y.sigmoid(),
    "sigmoid from -1 to 1": lambda y: y.sigmoid() * torch.tensor([2.0, 2, 2, 2, 2]) - 1,
    "softmax with a temperature of its own": lambda y: 10 * y.softmax(1) - 5,
    "softmax of two added": lambda y: sum(one.softmax(1) for one in (y / 9, y.flip(1) / 8)),
    "softmax of three, summed": lambda y: torch.stack([y, y / 2, y / 3]).softmax(2).sum(0),
    "sigmoids of three added": lambda y: y.sigmoid() + (y / 2).sigmoid() + (y / 3).sigmoid(),
    "softmax merged by a matrix": lambda y: y.softmax(1) @ torch.eye(2).repeat(3, 1)[1:].to(y),
    "some of a softmax by a matrix": lambda y: (y / 9).softmax(1) @ torch.eye(5)[:, :3].to(y),
    "probabilities cut from the graph": lambda y: y.detach().softmax(1),
}


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("kind", ENDINGS)
def test_networks_that_return_probabilities_are_recognised(tiny, images, class_idx, kind, number):
    model = Own(tiny, lambda inner, x: ENDINGS[kind](inner(x)))
    x, c = images[:number], torch.zeros(number, dtype=torch.int64)
    name = "softmax" if kind.startswith(("softmax", "exp", "prob")) else "sigmoid"
    message = rf"model: Own ends in a {name}, so its outputs are probabilities; wanted logits.*logits_of_{name}"
    refused(ValueError, message, lambda: score(model, x, c, x[:, :1]))
    refused(ValueError, message, lambda: METHODS["rise"](model, x, c, num_masks=2))
    for head in ("softmax", "sigmoid"):
        refused(ValueError, message, lambda head=head: first_pass(wrap(model, "inner.features", head=head), x))


@pytest.mark.parametrize("ending", [lambda y: y.sigmoid(), lambda y: y.softmax(1), lambda y: 1 - (-y).sigmoid()])
def test_odds_are_no_logits(tiny, images, class_idx, ending):
    model = Own(tiny, lambda inner, x: ending(inner(x)) / (1 - ending(inner(x))))
    message = r"^model: Own ends in odds p/\(1 - p\); wanted logits: leave the last layer out$"
    refused(ValueError, message, lambda: score(model, images, class_idx, images[:, :1]))


def test_what_only_looks_like_probabilities_can_be_said_to_be_none(tiny, images, class_idx):
    class Similar(nn.Module):  # to prototypes, all features and prototypes being positive
        def __init__(self):
            super().__init__()
            self.inner, self.prototypes = tiny, nn.Parameter(torch.eye(5).double())

        def forward(self, x):
            y = self.inner(x)
            return F.normalize((y - y.mean(1, keepdim=True)).relu() ** 4 + 1e-9) @ self.prototypes.T

    message = r"model: Similar gives nothing outside of \[0,1\], as probabilities; wanted logits.*lambda y: 10 \* y, "
    refused(ValueError, message, lambda: score(Similar(), images, class_idx, images[:, :1]))
    scaled = wrap(Similar(), "inner.features", to_logits=lambda y: 10 * y)
    assert score(scaled, images, class_idx, images[:, :1]).prob.between(0, 1).all()


def test_probabilities_as_the_caller_says(tiny, images, class_idx):
    S = images[:, :1]
    for ending, function, head in (
        (lambda y: y.softmax(1), logits_of_softmax, "softmax"),
        (lambda y: y.sigmoid(), logits_of_sigmoid, "sigmoid"),
    ):
        ends = Own(tiny, lambda inner, x, ending=ending: ending(inner(x)))
        model = wrap(ends, "inner.features", head=head, to_logits=function)
        plain = wrap(tiny, "features", head=head)
        for ours, wanted in zip(
            score(model, images, class_idx, S)[["prob", "masked_prob"]].to_numpy().T,
            score(plain, images, class_idx, S)[["prob", "masked_prob"]].to_numpy().T,
            strict=True,
        ):
            assert ours == pytest.approx(wanted, rel=1e-10)
    torch.testing.assert_close(grad_cam(model, images, class_idx), grad_cam(plain, images, class_idx))  # of the sigmoid


REAL = {
    "small logits": lambda y: y.abs() / 10,
    "one small logit": lambda y: 0.4 + y[:, 0] / 100,
    "negative": lambda y: -y.abs(),
    "rectified": lambda y: y.relu(),
    "all the same": lambda y: 0 * y,
    "gated": lambda y: y * y.sigmoid(),
    "gated by others": lambda y: y.sigmoid() * (y.flip(1) - 5),
    "scaled": lambda y: 3 * y.tanh() - 1,
    "capped": lambda y: 30 * (y / 30).tanh(),
    "expanded": lambda y: (y[:, :1].abs() / 10).expand(-1, 5),
    "clamped by a tensor": lambda y: torch.clamp(y.abs() / 10, max=torch.arange(1.0, 6.0).to(y)),
    "clamped": lambda y: y.clamp(-50, 50),
    "with a scale that is learnt": lambda y: y * nn.Parameter(torch.tensor(0.1)).exp().detach(),
    "sum of sigmoids": lambda y: y.sigmoid() + 2 * y.flip(1).sigmoid(),
    "sum of sigmoid and logits": lambda y: y.sigmoid() + y,
    "difference of sigmoids": lambda y: y.sigmoid() - y.flip(1).sigmoid(),
    "weighed by a softmax": lambda y: (y[:, :, None].softmax(1) * y[:, None]).sum(1),
    "evidence": lambda y: F.softplus(y),
    "ratio of sigmoids": lambda y: (y / 9).sigmoid() / (0.1 + y.flip(1).sigmoid()),
    "logarithm of odds": lambda y: (y.sigmoid() / (1 - y.sigmoid())).log(),
    "log-odds of probabilities": lambda y: y.sigmoid().logit(),
    "two of sum 1": lambda y: torch.stack([0.5 + y[:, 0] / 50, 0.4 - y[:, 1] / 50], 1),
}


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_real_logits_are_never_refused(tiny, images, kind, head):
    model = wrap(Own(tiny, lambda inner, x: REAL[kind](inner(x))), "inner.features", head=head)
    for number in (1, 5):
        with count_passes(model) as passes:
            first_pass(model, images[:number])
        assert passes[0] == number  # a closer look is not a pass of the method


@pytest.mark.parametrize("kind", ["one image at a time", "only images in [0,1]"])
def test_probabilities_of_networks_that_do_not_take_everything(tiny, images, kind):
    def forward(inner, x):
        if x.amax() > 1 or x.amin() < 0:
            raise ValueError("wanted images in [0,1]")
        return inner(x).view(1 if kind == "one image at a time" else -1, 5).div(9).sigmoid()

    x, c = images[:1], torch.tensor([2])
    refused(ValueError, "model: Own ends in a sigmoid", lambda: score(Own(tiny, forward), x, c, x[:, :1]))


def test_logarithms_of_probabilities_are_logits_of_a_softmax_alone(tiny, images, class_idx):
    S = images[:, :1]
    soft = Own(tiny, lambda inner, x: inner(x).log_softmax(1))
    torch.testing.assert_close(
        torch.tensor(score(soft, images, class_idx, S).prob), torch.tensor(score(tiny, images, class_idx, S).prob)
    )
    single = Own(tiny, lambda inner, x: inner(x).log_softmax(1)[:, 2])
    each = Own(tiny, lambda inner, x: F.logsigmoid(inner(x)))
    by_hand = Own(tiny, lambda inner, x: (inner(x).sigmoid() + 1e-7).log())
    softplus = Own(tiny, lambda inner, x: -F.softplus(-inner(x)))
    several = Own(tiny, lambda inner, x: F.logsigmoid(inner(x)) + F.logsigmoid(inner(x) / 2))
    binary = Own(tiny, lambda inner, x: inner(x).softmax(1).log2())
    decimal = Own(tiny, lambda inner, x: inner(x).softmax(1).log10())
    for model, name in (
        (wrap(soft, "inner.features", head="sigmoid"), "logsoftmax"),
        (wrap(softplus, "inner.features", head="sigmoid"), "logsigmoid"),
        (wrap(several, "inner.features", head="sigmoid"), "logsigmoid"),
        (binary, "log2softmax"),
        (decimal, "log10softmax"),
        (single, "logsoftmax"),
        (each, "logsigmoid"),
        (by_hand, "logsigmoid"),
        (wrap(each, "inner.features", head="sigmoid"), "logsigmoid"),
    ):
        message = rf"model: Own ends in a {name}, so its outputs are logarithms of probabilities; wanted logits"
        refused(ValueError, message, lambda model=model: score(model, images, 0 * class_idx, S))


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("name", ["grad_cam", "score_cam", "opti_cam"])
def test_a_number_beside_the_logits_is_in_question_for_any_number_of_images(tiny, images, class_idx, name, number):
    model = Own(tiny, lambda inner, x: (inner(x), inner.fc.bias[:1]))
    message = r"^model: wanted a network that returns logits, got a tuple with 2 tensors that may be; say which by"
    run = METHODS[name]
    refused(TypeError, message, lambda: run(model, images[:number], class_idx[:number], layer="inner.features"))
    said = wrap(model, "inner.features", to_logits=lambda output: output[0])
    assert run(said, images[:number], class_idx[:number]).shape == (number, 1, 24, 32)


@pytest.mark.parametrize("width", [1, 4])
def test_narrow_images_of_many_channels(class_idx, width):
    network = nn.Sequential(nn.Conv2d(11, 6, (3, 1)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    assert grad_cam(network, torch.rand(5, 11, 60, width), class_idx, layer="1").shape == (5, 1, 60, width)
    refused(
        ValueError,
        r"images: wanted shape \(B,C,H,W\), channels before rows, got \(5, 24, 32, 3\)",
        lambda: grad_cam(network, torch.rand(5, 24, 32, 3), class_idx, layer="1"),
    )


def test_what_takes_more_than_a_line_is_shown_by_its_kind(tiny, images, class_idx):
    run = partial(opti_cam, tiny, images, class_idx, layer="features")
    refused(TypeError, "^baseline: wanted a tensor or a function, .*, got ndarray$", lambda: run(baseline=np.eye(30)))
    refused(TypeError, "^lr: wanted a number, got Tensor$", lambda: run(lr=torch.rand(30, 30)))
    layers = [[tiny, tiny.features]]
    refused(ValueError, "^layer: wanted a module or a dotted name, got list$", lambda: run(layer=layers))


class BatchOfItsOwn(nn.Module):
    """Whose batch norm is in training mode whatever anyone says."""

    def __init__(self, network):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(3).double(), network

    def forward(self, images):
        return self.inner(self.norm.train()(images))


MIXING = {
    "batch norm by function": lambda tiny: Own(
        tiny, lambda inner, x: inner(F.batch_norm(x, None, None, training=True))
    ),
    "batch norm in training mode": BatchOfItsOwn,
    "centred over the batch": lambda tiny: Own(tiny, lambda inner, x: inner(x - x.mean(0))),
    "centred logits": lambda tiny: Own(tiny, lambda inner, x: (y := inner(x)) - 0.9 * y.mean(0)),
    "scaled by a number": lambda tiny: Own(tiny, lambda inner, x: inner(x / x.abs().max().item())),
    "centred out of the graph": lambda tiny: Own(
        tiny, lambda inner, x: inner(x - x.detach().mean((0, 2, 3))[:, None, None])
    ),
    "scaled by NumPy": lambda tiny: Own(tiny, lambda inner, x: inner(x / float(np.percentile(x.detach().numpy(), 99)))),
}


@pytest.mark.parametrize("name", ["grad_cam", "score_cam", "rise", "opti_cam", "eigen_cam"])
@pytest.mark.parametrize("kind", MIXING)
def test_networks_that_mix_the_images_of_a_batch_are_refused(tiny, images, class_idx, kind, name):
    model = MIXING[kind](tiny)
    message = f"model: in {type(model).__name__} the logits of an image depend on the other images of its batch"
    for number in (5, 1):  # of one image too: masked ones come in batches
        call = lambda n=number: METHODS[name](model, images[:n], class_idx[:n], layer=tiny.features)  # noqa: E731
        refused(ValueError, message, call)
        refused(ValueError, message, lambda: score(wrap(model, "inner"), images, class_idx, images[:, :1]))


PARTS = {
    "a sequence over the batch": lambda: nn.TransformerEncoderLayer(8, 2, 16).double(),
    "a softmax over the batch": lambda: nn.Softmax(dim=0),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_torch_alone_may_mix_too(images, class_idx, kind):
    torch.manual_seed(0)
    maps = nn.Conv2d(3, 8, 8, 8).double(), nn.Flatten(2), Permute([0, 2, 1]), PARTS[kind](), Permute([0, 2, 1])
    model = nn.Sequential(*maps, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5).double()).eval()
    message = "model: in Sequential the logits of an image depend on the other images of its batch"
    refused(ValueError, message, lambda: grad_cam(model, images, class_idx, layer="0"))


def test_a_library_s_network_whose_forward_was_replaced_may_mix_too(class_idx):
    model = load_model("timm/test_resnet.r160_in1k", pretrained=False).network.eval()
    old = model.forward
    model.forward = lambda x: old(x - x.mean(0))
    message = "model: in ResNet the logits of an image depend on the other images of its batch"
    refused(ValueError, message, lambda: grad_cam(model, torch.rand(2, 3, 64, 64), class_idx[:2], layer="layer4"))


def test_a_network_that_takes_one_image_at_a_time(tiny, images, class_idx):
    single = Own(tiny, lambda inner, x: inner(x.reshape(1, 3, 24, 32)))
    found = [grad_cam(single, images[i : i + 1], class_idx[i : i + 1], layer="inner.features") for i in range(5)]
    torch.testing.assert_close(torch.cat(found), grad_cam(tiny, images, class_idx, layer="features"))


def test_a_classifier_inside_another_network_keeps_its_head_or_is_refused(tiny, images, class_idx):
    model, S = wrap(tiny, "features", head="sigmoid"), images[:, :1]
    expected = score(model, images, class_idx, S)
    assert score(nn.DataParallel(model), images, class_idx, S).equals(expected)
    assert score(wrap(model, "network.features", head="sigmoid"), images, class_idx, S).equals(expected)
    for outer in (nn.Sequential(model), wrap(model, "network.features")):
        message = rf"model: {type(outer).__name__} holds a Classifier with head='sigmoid' and does not hand that on"
        refused(ValueError, message, lambda outer=outer: score(outer, images, class_idx, S))
        refused(ValueError, message, lambda outer=outer: grad_cam(outer, images, class_idx, layer=tiny.features))


def fail(reason):
    raise AssertionError(reason)


MISFITS = {
    "channels": (lambda inner, x: inner(x[:, :1]), r"expected input.*1 channels"),
    "size": (lambda inner, x: inner.fc(x[:, 0].flatten(1)), "shapes cannot be multiplied"),
    "dtype": (lambda inner, x: inner(x.float()), "type"),
    "a dict": (lambda inner, x: inner(x["pixel_values"]), "too many indices for tensor"),
    "a record": (lambda inner, x: inner(x.pixel_values), "'Tensor' object has no attribute 'pixel_values'"),
    "an assertion": (lambda inner, x: inner(x) if x.shape[2] == 64 else fail("Input height (24)"), "Input height"),
    "an assertion without words": (lambda inner, x: inner(x) if x.shape[2] == 64 else fail(""), "AssertionError"),
    "statistics": (lambda inner, x: inner(F.batch_norm(x, torch.zeros(1), torch.ones(1))), "should contain 3 elements"),
    "rank": (lambda inner, x: inner(nn.BatchNorm1d(3).eval()(x)), "expected 2D or 3D input"),
    "no forward": (lambda inner, x: nn.ModuleList([inner])(x), 'missing the required "forward" function'),
}


def test_a_network_with_hooks_on_its_tensors(tiny, images, class_idx):
    def forward(inner, x):
        maps = inner.features(x)
        maps.register_hook(lambda slope: None)
        return inner.fc(maps.mean((2, 3)))

    for name in ("score_cam", "rise"):
        message = "model: Own sets hooks on its tensors in forward, which a pass without gradients cannot have"
        call = lambda name=name: METHODS[name](Own(tiny, forward), images, class_idx, layer="inner.features")  # noqa: E731
        refused(ValueError, message, call)


@pytest.mark.parametrize("kind", MISFITS)
def test_images_that_a_network_cannot_take(tiny, images, class_idx, kind):
    forward, reason = MISFITS[kind]
    model = Own(tiny, forward)
    message = rf"images: Own cannot take a tensor \(\d+, 3, 24, 32\) of torch.float64 \(.*{reason}"
    for name in ("grad_cam", "rise", "opti_cam"):
        call = lambda name=name: METHODS[name](model, images, class_idx, layer="inner.features")  # noqa: E731
        refused(ValueError, message, call)
    refused(ValueError, message, lambda: score(model, images, class_idx, images[:, :1]))


def test_what_else_a_network_raises_is_not_hidden(tiny, images, class_idx):
    for error in (RuntimeError("boom"), KeyError("age"), torch.OutOfMemoryError("no memory for a tensor")):

        def forward(inner, x, error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            score(Own(tiny, forward), images, class_idx, images[:, :1])
        assert raised.value is error


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["scripted", "quantised"])
def test_every_door_refuses_foreign_networks(tiny, images, kind):
    change, error, message = FOREIGN[kind]
    model, data = change(tiny), [Sample("a", images[0], 0, torch.zeros(0, 4))]
    refused(error, message, lambda: feature_maps(model, images, "features"))
    refused(error, message, lambda: check_layout(model, images, layer="features"))
    refused(error, message, lambda: default_layer(model, 32))
    refused(error, message, lambda: evaluate(model, data, {"fake_cam": METHODS["fake_cam"]}))
    refused(error, message, lambda: explanation_of(model, images[0], 0, "rise"))


class Counting(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return images + self.share * self.calls


class Remembering(nn.Module):
    """Keeps something in a plain attribute, of which torch knows nothing."""

    def __init__(self, network, what):
        super().__init__()
        self.inner, self.what, self.kept = network, what, {}

    def forward(self, images):
        if self.what == "calls":
            self.kept = self.kept or 0
            self.kept += 1
            return self.inner(images) * self.kept
        maps = self.kept.setdefault(tuple(images.shape), self.inner.features(images))
        return self.inner.fc(maps.mean((2, 3)))


RANDOM = {
    "a counter": lambda tiny: Remembering(tiny, "calls"),
    "the maps of the first images": lambda tiny: Remembering(tiny, "maps"),
    "dropout by function": lambda tiny: Own(tiny, lambda inner, x: inner(F.dropout(x, 0.5))),
    "noise": lambda tiny: Own(tiny, lambda inner, x: inner(x + 0.1 * torch.randn_like(x))),
    "state": lambda tiny: nn.Sequential(Counting(0.1), tiny),
    "python's random": lambda tiny: Own(tiny, lambda inner, x: inner(x * random.random())),  # noqa: S311
    "numpy's random": lambda tiny: Own(tiny, lambda inner, x: inner(x * np.random.rand())),  # noqa: NPY002
    "images left out": lambda tiny: Own(tiny, lambda inner, x: inner(x * (torch.rand(len(x), 1, 1, 1) < 0.5))),
}


@pytest.mark.parametrize("name", ["grad_cam", "score_cam", "rise", "opti_cam", "ablation_cam"])
@pytest.mark.parametrize("kind", RANDOM)
def test_networks_that_differ_from_pass_to_pass_are_refused(tiny, images, class_idx, kind, name):
    model = RANDOM[kind](tiny)
    message = f"model: two passes of {type(model).__name__} over one image differ in eval mode"
    refused(ValueError, message, lambda: METHODS[name](model, images, class_idx, layer=tiny.features))


def test_dropout_as_a_module_and_harmless_state_pass(tiny, images, class_idx):
    expected = grad_cam(tiny, images, class_idx, layer="features")
    drops = Own(tiny, lambda inner, x: inner(F.dropout(x, 0.5, training=inner.training))).train()
    torch.testing.assert_close(grad_cam(drops, images, class_idx, layer="inner.features"), expected)
    counts = nn.Sequential(Counting(0.0), tiny)
    torch.testing.assert_close(grad_cam(counts, images, class_idx, layer=tiny.features), expected)
    draws = Own(tiny, lambda inner, x: (torch.rand(1), inner(x))[1])  # and throws it away
    torch.testing.assert_close(grad_cam(draws, images, class_idx, layer="inner.features"), expected)


NO_GRADIENT = {
    "no_grad": torch.no_grad()(lambda inner, x: inner(x)),
    "inference_mode": torch.inference_mode()(lambda inner, x: inner(x)),
    "detach": lambda inner, x: inner.fc(inner.features(x).mean((2, 3)).detach()),
    "through numpy": lambda inner, x: inner.fc(torch.from_numpy(inner.features(x).mean((2, 3)).detach().numpy())),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_GRADIENT)
def test_networks_without_gradients(tiny, images, class_idx, kind):
    model = Own(tiny, NO_GRADIENT[kind])
    call = lambda name, **options: METHODS[name](model, images, class_idx, **options)  # noqa: E731
    reason = "no_grad, inference_mode or detach"
    refused(ValueError, f"layer: .*{reason}", lambda: call("grad_cam", layer="inner.features"))
    refused(ValueError, f"model: .*{reason}", lambda: call("opti_cam", layer="inner.features", num_steps=1))
    refused(ValueError, f"model: .*{reason}", lambda: call("extremal_perturbation", num_steps=1))
    for name, options in {"score_cam": {"layer": "features"}, "rise": {"num_masks": 5}}.items():
        expected = METHODS[name](tiny, images, class_idx, **options)
        named = {key: f"inner.{value}" if key == "layer" else value for key, value in options.items()}
        torch.testing.assert_close(call(name, **named), expected)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()


def again(use_reentrant, inner, x):
    return inner.fc(checkpoint(inner.features, x, use_reentrant=use_reentrant).mean((2, 3)))


NOT_DIFFERENTIABLE = {
    "checkpointing of the old kind": (lambda inner, x: again(True, inner, x), "checkpoint is incompatible with"),
    "in place": (lambda inner, x: inner.fc((maps := inner.features(x).sigmoid()).mul_(maps).mean((2, 3))), "inplace"),
    "a function of one's own": (lambda inner, x: inner(NoBackward.apply(x)), "must implement either the backward"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", NOT_DIFFERENTIABLE)
def test_networks_that_cannot_be_differentiated(tiny, images, class_idx, kind):
    forward, reason = NOT_DIFFERENTIABLE[kind]
    model = Own(tiny, forward)
    message = rf"model: Own cannot be differentiated \(.*{reason}.*\); wanted a network that can"
    for name in ("opti_cam", "extremal_perturbation"):
        options = {"layer": "inner.features"} if name == "opti_cam" else {}
        call = lambda n=name, o=options: METHODS[n](model, images, class_idx, num_steps=1, **o)  # noqa: E731
        refused(ValueError, message, call)


def test_a_backward_hook_before_what_works_in_place(tiny, images, class_idx):
    tiny.features[3] = nn.ReLU(inplace=True)
    tiny.features[2].register_full_backward_hook(lambda *_: None)
    message = r"model: TinyCNN cannot be differentiated \(.*is being modified inplace"
    refused(ValueError, message, lambda: opti_cam(tiny, images, class_idx, layer="features", num_steps=1))


def test_checkpointing_saves_memory_and_changes_nothing(tiny, images, class_idx, recwarn):
    model = Own(tiny, lambda inner, x: again(False, inner, x))
    for name, options in {"grad_cam": {}, "opti_cam": {"num_steps": 2}}.items():
        found, expected = (
            METHODS[name](network, images, class_idx, layer=tiny.features[2], **options) for network in (model, tiny)
        )
        torch.testing.assert_close(found, expected)
    assert not recwarn.list  # of a layer that runs twice


def test_class_names_that_are_not_one_per_class(tiny, images, class_idx):
    model = wrap(tiny, "features", class_names=["a", "b", "c"])
    refused(
        ValueError,
        "class_names: wanted 5, one per class of the network, got 3",
        lambda: grad_cam(model, images, class_idx),
    )


def test_numbers():
    check_at_least(1, batch_size=None, cells=1, steps=np.int64(3))
    refused(ValueError, "cells: wanted at least 1, got 0", lambda: check_at_least(1, cells=np.int32(0)))
    for other in (np.float32(2), np.array([1, 2]), torch.ones(2, dtype=torch.int64), "2"):
        with pytest.raises(ValueError, match=r"^cells: wanted a whole number, got "):
            check_at_least(1, cells=other)
    refused(ValueError, "cells: wanted at least 1, got 0", lambda: check_at_least(1, batch_size=3, cells=0))
    for other in (None, True, 2.5):
        refused(ValueError, "^cells: wanted a whole number, got ", lambda other=other: check_whole(1, cells=other))
    assert as_seed(np.int64(-3)) == -3
    refused(ValueError, "cells: wanted a whole number, got 2.5", lambda: check_at_least(1, cells=2.5))
