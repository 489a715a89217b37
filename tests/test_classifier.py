"""What networks return, and what is read from it."""

import copy
import math
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import state
from torch import nn

from opticam import METHODS, wrap
from opticam.classifier import (
    as_classifier,
    as_output,
    as_softmax,
    bare,
    class_logit,
    logits_of_sigmoid,
    logits_of_softmax,
    probabilities,
    read,
)
from opticam.features import count_passes, feature_maps
from opticam.metrics import class_probability, log_odds_change

Y = torch.tensor([[1.5, -2.0, 0.25], [-30.0, 4.0, 40.0]], dtype=torch.float64)
Named = namedtuple("Named", ["logits", "aux_logits"])


class Returns(nn.Module):
    """The logits of a network in a form of somebody's own."""

    def __init__(self, network, form):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, images):
        return self.form(self.network(images))


FORMS = {
    "record": lambda y: SimpleNamespace(logits=y, hidden=[y, y]),
    "dict": lambda y: OrderedDict(loss=None, logits=y, embedding=y + 1),
    "dict with features": lambda y: {"pooler_output": y + 1, "out": y, "Features": y - 1},
    "record of images and texts": lambda y: SimpleNamespace(logits_per_image=y, logits_per_text=y.mT),
    "dict of images and as many texts": lambda y: {"logits_per_text": y.mT[: len(y)], "logits_per_image": y},
    "dict of another name": lambda y: {"scores": y, "loss": y.sum()},
    "named tuple": lambda y: Named(y, y + 1),
    "tuple": lambda y: (y.sum(), y),
    "list": lambda y: [y, y.argmax(1), (y.sum(), y[..., None])],
    "inner tuple": lambda y: {"out": (y.sum(), [y]), "latent": y},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_what_the_network_returns(tiny, images, form):
    model = Returns(tiny, FORMS[form])
    assert torch.equal(read(model, images).logits, tiny(images))
    assert torch.equal(read(model, images[:1]).logits, tiny(images[:1]))
    with count_passes(model) as passes:
        read(model, images.requires_grad_()).logits.sum().backward()
    assert passes == [5, 5]


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapped_network_returns_these_logits(tiny, images, class_idx, form):
    recorded, plain = wrap(Returns(tiny, FORMS[form]), "network.features"), wrap(tiny, "features")
    assert torch.equal(recorded(images), tiny(images))
    found, expected = (METHODS["opti_cam"](model, images, class_idx, num_steps=2) for model in (recorded, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda y: (y + 1, y), "tuple with 2 tensors"),
        (lambda y: {"a": y, "b": y + 1}, "dict with 2 tensors"),
        (lambda y: (y, y[:, 0]), "tuple with 2 tensors"),
        (lambda y: y.tolist(), "list with 0 tensors"),
        (lambda y: None, "NoneType with 0 tensors"),
        (lambda y: SimpleNamespace(logits=None), "SimpleNamespace with 0 tensors"),
        (lambda y: {"scores": y.argmax(1)}, "dict with 0 tensors"),
        (lambda y: {"last_hidden_state": y[..., None], "pooler_output": y}, "dict with 0 tensors"),
        (lambda y: {"image_embeds": y}, "dict with 0 tensors"),
        (lambda y: {"representation": y, "loss": y.sum()}, "dict with 0 tensors"),
        (lambda y: (y, (y, y)), "tuple with 3 tensors"),
        (lambda y: (y + 1, {"out": y}), "tuple with 2 tensors"),
        (lambda y: {"code": y + 1, "heads": {"a": y, "b": [y]}}, "dict with 3 tensors"),
    ],
)
def test_what_may_be_several_things_is_refused_until_it_is_said(tiny, images, form, found):
    model = Returns(tiny, form)
    with pytest.raises(TypeError, match=rf"model: wanted .* logits, got a {found} .*to_logits=") as refusal:
        read(model, images)
    assert "\n" not in str(refusal.value)
    said = wrap(model, "network.features", to_logits=lambda returned: tiny(images))
    assert torch.equal(read(said, images).logits, tiny(images))


@pytest.mark.parametrize(
    "form", [lambda y: y[:, :1], lambda y: y[:, 0], lambda y: y[:, 0].squeeze(), lambda y: (y[:, 0],)]
)
@pytest.mark.parametrize("number", [1, 5])
def test_one_logit_is_a_class_and_its_absence(tiny, images, form, number):
    logits, head = read(Returns(tiny, form), images[:number])
    y = tiny(images[:number])[:, 0]
    assert head == "sigmoid"
    assert torch.equal(logits, torch.stack([y, -y], 1))
    p = class_probability(logits, torch.ones(number, dtype=torch.int64), head)
    for probability, value in zip(p.tolist(), y.tolist(), strict=True):
        assert probability == pytest.approx(1 / (1 + math.exp(value)), rel=1e-12)


def test_a_single_image_without_batch_dimension(tiny, images):
    assert torch.equal(read(Returns(tiny, torch.squeeze), images[:1]).logits, tiny(images[:1]))


@pytest.mark.parametrize("form", [lambda y: y[:3], lambda y: y[..., None], lambda y: y.sum(), lambda y: y[:, :0]])
def test_other_shapes_are_refused(tiny, images, form):
    with pytest.raises(ValueError, match=r"model: wanted logits \(5,C\), got shape"):
        read(Returns(tiny, form), images)


@pytest.mark.parametrize("form", [lambda y: y.long(), lambda y: y.to(torch.complex64), lambda y: y.to_sparse()])
def test_logits_of_other_kinds_are_refused(tiny, images, form):
    with pytest.raises(TypeError, match="model: wanted floating-point logits, got torch"):
        read(Returns(tiny, form), images)


def test_probabilities_by_hand():
    for row, y in enumerate(Y.tolist()):
        exponentials = [math.exp(value - max(y)) for value in y]
        for c, value in enumerate(y):
            one, many = (class_probability(Y, torch.full((2,), c), head)[row].item() for head in ("sigmoid", "softmax"))
            assert one == pytest.approx(1 / (1 + math.exp(-value)), rel=1e-14)
            assert many == pytest.approx(exponentials[c] / sum(exponentials), rel=1e-14)
    assert torch.equal(class_probability(Y.float(), torch.tensor([0, 2])), class_probability(Y, torch.tensor([0, 2])))


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_as_softmax_keeps_the_probabilities(head):
    for c in (torch.tensor([0, 2]), torch.tensor([1, 1])):
        logits, target = as_softmax(Y, c, head)
        p = class_logit(probabilities(Y, head), c)
        torch.testing.assert_close(class_logit(logits.softmax(1), target), p, rtol=1e-14, atol=0)
        # log p/(1 - p) is the lead over all rivals together
        rivals = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
        if head == "sigmoid":
            torch.testing.assert_close(class_logit(logits, target) - rivals, class_logit(Y, c))


@pytest.mark.parametrize(
    "call", [lambda: probabilities(Y, "tanh"), lambda: as_softmax(Y, torch.tensor([0, 0]), "none")]
)
def test_an_unknown_head_is_refused(call, tiny):
    with pytest.raises(ValueError, match="head: wanted one of softmax, sigmoid, got"):
        call()
    with pytest.raises(ValueError, match="head: wanted one of softmax, sigmoid, got 'Sigmoid'"):
        wrap(tiny, "features", head="Sigmoid")


@pytest.mark.parametrize("head", [np.array(["softmax", "sigmoid"]), torch.ones(2), 5, ""])
def test_heads_that_are_no_word(tiny, head):
    for to_logits in (None, logits_of_softmax):
        with pytest.raises(ValueError, match=r"^head: wanted one of softmax, sigmoid, got "):
            wrap(tiny, "features", head=head, to_logits=to_logits)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda output: {"scores": output}["logits"], "KeyError: 'logits'"),
        (lambda output: (output,)[1], "IndexError: tuple index"),
        (lambda output: output.logits, "AttributeError: "),
        (lambda output, more: output, "TypeError: "),
        (lambda output: output.view(7), "RuntimeError: shape"),
    ],
)
def test_to_logits_that_fails(tiny, images, class_idx, function, reason):
    model = wrap(tiny, "features", to_logits=function)
    for method in ("grad_cam", "rise", "ablation_cam"):
        message = f"^to_logits: wanted a function of the Tensor that the network returns, got {reason}"
        with pytest.raises(ValueError, match=message):
            METHODS[method](model, images, class_idx)


def test_probabilities_turn_back_into_logits():
    torch.testing.assert_close(logits_of_softmax(Y.softmax(1)).softmax(1), Y.softmax(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(logits_of_sigmoid(Y.sigmoid())[0], Y[0], rtol=1e-12, atol=0)
    for function, certain in ((logits_of_softmax, [[0.0, 1.0]]), (logits_of_sigmoid, [[0.0, 1.0]])):
        p = torch.tensor(certain, requires_grad=True)
        logits = function(p)
        logits.sum().backward()
        assert logits.isfinite().all()
        assert p.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"to_logits: wanted probabilities in \[0,1\]"):
        logits_of_sigmoid(Y)
    with pytest.raises(ValueError, match="to_logits: wanted probabilities with rows of sum 1"):
        logits_of_softmax(Y.sigmoid())


def test_small_probabilities_of_half_precision_stay_what_they_are():
    """Below 6.1e-5 they are not normal numbers; a softmax of many classes is full of them."""
    probs = torch.tensor([[0.9999, 3e-5, 1e-5, 0]]).half().requires_grad_()
    for logits, back in (
        (logits_of_softmax(probs), torch.softmax),
        (logits_of_sigmoid(probs), lambda y, _: y.sigmoid()),
    ):
        assert logits.dtype == torch.float16
        assert logits.isfinite().all()
        torch.testing.assert_close(back(logits.float(), 1)[0, 1:3], probs[0, 1:3].float(), rtol=0.02, atol=0)
        (slopes,) = torch.autograd.grad(logits[0, 1], probs)
        assert slopes[0, 1] > 1e4


def test_images_are_not_changed_by_a_network_in_place(tiny, images):
    class InPlace(nn.Module):
        def forward(self, x):
            return tiny(x.mul_(2).sub_(1))

    before = images.clone()
    torch.testing.assert_close(read(InPlace(), images).logits, tiny(2 * images - 1))
    assert torch.equal(images, before)


def test_only_a_classifier_is_read_as_ours(tiny, images):
    tiny.network, tiny.layer, tiny.mean, tiny.std, tiny.head = tiny.features, "fc", "a", None, "sigmoid"
    assert as_classifier(tiny) is None
    assert bare(tiny) is tiny
    assert read(tiny, images).head == "softmax"
    model = wrap(tiny, "features", head="sigmoid")
    assert bare(model) is tiny
    assert read(model, images).head == "sigmoid"


def test_the_head_follows_from_to_logits(tiny):
    for function, head, other in ((logits_of_softmax, "softmax", "sigmoid"), (logits_of_sigmoid, "sigmoid", "softmax")):
        assert wrap(tiny, "features", to_logits=function).head == head
        assert wrap(tiny, "features", to_logits=function, head=head).head == head
        with pytest.raises(ValueError, match=f"head: wanted '{head}', that of to_logits={function.__name__}, got"):
            wrap(tiny, "features", to_logits=function, head=other)
    assert wrap(tiny, "features", to_logits=torch.neg).head == "softmax"


@pytest.mark.slow
def test_a_compiled_classifier_is_ours(tiny, images):
    model = wrap(tiny, "features", head="sigmoid")
    compiled = torch.compile(model, backend="eager")
    assert as_classifier(compiled) is model
    (features,), logits = feature_maps(compiled, images)
    torch.testing.assert_close(features, tiny.features(images).detach())
    torch.testing.assert_close(logits, tiny(images).detach())


@pytest.mark.slow
def test_opti_cam_asks_a_compiled_network_compiled(tiny, images, class_idx):
    runs = []

    def backend(graph, _):
        return lambda *inputs: runs.append(None) or graph(*inputs)

    compiled = torch.compile(tiny, backend=backend)
    ours = METHODS["opti_cam"](compiled, images, class_idx, layer="features", num_steps=3)
    assert len(runs) >= 4  # at every step, and where the last map is scored
    wanted = METHODS["opti_cam"](tiny, images, class_idx, layer="features", num_steps=3)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad_cam", "eigen_cam", "score_cam", "opti_cam"])
def test_a_compiled_part_that_has_run_before_is_heard(tiny, images, class_idx, name):
    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(tiny, backend="eager")

        def forward(self, x):
            return self.model(x)

    model, layer = Lightning().eval(), "model._orig_mod.features"
    with torch.no_grad():
        model(images)
    compiled = model.model.forward
    for _ in range(2):
        ours = METHODS[name](model, images, class_idx, layer=layer)
        torch.testing.assert_close(ours, METHODS[name](tiny, images, class_idx, layer="features"))
    assert model.model.forward is compiled
    inner = copy.deepcopy(tiny)
    inner.compile(backend="eager")
    with torch.no_grad():
        inner(images)
    torch.testing.assert_close(METHODS[name](inner, images, class_idx, layer="features"), ours)
    assert inner._compiled_call_impl is not None


def test_a_compiled_network_inside_a_classifier(tiny, images, class_idx):
    plain = wrap(tiny, "features", head="sigmoid")
    for around in (torch.compile(tiny, backend="eager"), nn.DataParallel(tiny)):
        model = wrap(around, "features", head="sigmoid")
        assert as_classifier(model) is model
        with count_passes(model) as passes:
            found = METHODS["grad_cam"](model, images, class_idx)
        assert passes == [5, 5]
        torch.testing.assert_close(found, METHODS["grad_cam"](plain, images, class_idx))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad_cam", "opti_cam", "ablation_cam", "score_cam"])
def test_a_network_compiled_in_part_stays_as_it_was(tiny, images, class_idx, name):
    options = {"num_steps": 2} if name == "opti_cam" else {}
    expected = METHODS[name](copy.deepcopy(tiny), images, class_idx, layer="features", **options)
    tiny.features = torch.compile(tiny.features.append(nn.Dropout()), backend="eager")
    modules, before = list(tiny.modules()), state(tiny)
    found = METHODS[name](tiny, images, class_idx, layer="features", **options)
    torch.testing.assert_close(found, expected)
    assert list(tiny.modules()) == modules
    assert state(tiny) == before


@pytest.mark.parametrize(
    ("logits", "class_idx", "message"),
    [
        (Y, [0, 3], r"class_idx: wanted indices in 0\.\.2, got 3"),
        (Y, [-1, 0], r"class_idx: wanted indices in 0\.\.2, got -1"),
        (Y[:, :1], [0, 2], r"class_idx: wanted indices in 0\.\.1, got 2"),
        (Y[:, 0], [2, 1], r"class_idx: wanted indices in 0\.\.1, got 2"),
        (Y, [0], r"class_idx: wanted shape \(2,\), one class per image, got \(1,\)"),
        (Y, [0.0, 1.0], "class_idx: wanted dtype torch.int64"),
        (Y[None], [0], r"logits: wanted shape \(B,C\), got \(1, 2, 3\)"),
        (Y.long(), [0, 1], "logits: wanted a floating-point tensor, got torch.int64"),
    ],
)
def test_probabilities_of_classes_that_are_not_there(logits, class_idx, message):
    for function in (class_probability, lambda y, c: log_odds_change(y, y, c)):
        with pytest.raises((ValueError, TypeError), match=message):
            function(logits, torch.tensor(class_idx))


def test_mean_and_std_are_where_the_weights_are(tiny, images):
    model = wrap(tiny.double(), "features", mean=(0.5, 0.25, 0.1), std=(0.5, 1.0, 2.0))
    assert model.mean.dtype == torch.float64
    x = torch.stack([(images[:, k] - m) / s for k, (m, s) in enumerate(((0.5, 0.5), (0.25, 1.0), (0.1, 2.0)))], 1)
    torch.testing.assert_close(model(images), tiny(x), rtol=0, atol=1e-14)
    gray = wrap(nn.Sequential(nn.Conv2d(1, 2, 3)), "0", mean=(0.5,), std=(0.25,))
    assert gray(torch.rand(1, 1, 4, 4)).shape == (1, 2, 2, 2)  # one mean for all channels
    for mean, std in (((0.5, 0.5), (1.0, 1.0, 1.0)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))):
        with pytest.raises(ValueError, match="std: wanted positive numbers, as many as mean"):
            wrap(tiny, "features", mean=mean, std=std)
    with pytest.raises(ValueError, match="layer: no 'feature' in TinyCNN; wanted a dotted name such as features"):
        wrap(tiny, "feature")
    with pytest.raises(TypeError, match=r"network: wanted a torch\.nn\.Module, got function"):
        wrap(lambda x: x, "features")


def test_the_name_of_one_logit_stands_for_its_absence_too(tiny):
    assert wrap(tiny, "features", class_names=["pneumonia"]).class_names == ["pneumonia", "not pneumonia"]
    assert wrap(tiny, "features", class_names=["ill", "healthy"]).class_names == ["ill", "healthy"]


def test_one_class_of_many_is_as_output_reads_it():
    assert as_output(nn.Identity(), Y, 2).head == "softmax"
    logits, head = as_output(nn.Identity(), Y[:, 0], 2)
    assert (head, logits.tolist()) == ("sigmoid", [[1.5, -1.5], [-30.0, 30.0]])
