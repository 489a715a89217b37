"""A sigmoid is a softmax over the class and its absence: methods and metrics of one must be those of the other."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import TinyCNN, TinyViT
from torch import nn

from opticam import METHODS, evaluate, find_method, metrics, opti_cam, score, wrap
from opticam.lab.datasets import Sample
from opticam.lab.evaluation import COLUMN_GROUPS
from opticam.methods import OBJECTIVES, perturbation

C = 3  # the class explained
SHORT = {"opti_cam": {"num_steps": 4}, "rise": {"num_masks": 12}, "extremal_perturbation": {"num_steps": 3}}
ATTENTION = {"raw_attention", "attention_rollout", "gradient_rollout", "legrad"}


def with_outputs(network, rows):
    """A copy whose logits are these rows, from weights (K,) and a bias each, of the network's last layer."""
    changed = copy.deepcopy(network)
    weight, bias = (torch.stack([row[part] for row in rows]) for part in (0, 1))
    fc = nn.Linear(weight.shape[1], len(rows)).double()
    fc.weight.data, fc.bias.data = weight.clone(), bias.clone()
    changed.fc = fc
    if isinstance(changed, TinyViT):
        changed.network.head = fc
    return changed


@pytest.fixture
def network(request, images):
    """Class C is found in some of the images, and is the most probable one in none."""
    torch.manual_seed(0)
    case = getattr(request.node, "callspec", None)
    built = TinyViT() if case and case.params.get("name") in ATTENTION else TinyCNN()
    built = built.double()
    with torch.no_grad():
        built.fc.weight.mul_(4)
        y = built(images)
        built.fc.bias[C] -= y[:, C].median() - 1e-3
        built.fc.bias[0] += 9
    return built


@pytest.fixture
def pair(network):
    """Logits (y_c, 0) under a softmax: the class and its absence."""
    w, b = network.fc.weight.detach(), network.fc.bias.detach()
    return wrap(with_outputs(network, [(w[C], b[C]), (0 * w[C], 0 * b[C])]), "features.0")


@pytest.fixture
def one(network):
    """The one logit y_c, as (B,)."""

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            w, b = network.fc.weight.detach(), network.fc.bias.detach()
            self.inner = with_outputs(network, [(w[C], b[C])])

        def forward(self, images):
            return self.inner(images).squeeze()

    return Squeezed()


def same(values, expected, atol=1e-10):
    torch.testing.assert_close(values, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, network, pair, one, images, monkeypatch):
    monkeypatch.setattr(perturbation, "SIGMA", 2.0)
    options, first = SHORT.get(name, {}), torch.zeros(5, dtype=torch.int64)
    expected = METHODS[name](pair, images, first, **options)
    assert expected.amax() > 0.99
    several = wrap(network, "features.0", head="sigmoid")
    same(METHODS[name](several, images, first + C, **options), expected)
    if name not in ATTENTION:
        same(METHODS[name](one, images, first, layer="inner.features.0", **options), expected)
        absent = METHODS[name](wrap(one, "inner.features.0"), images, first + 1, **options)
        w, b = -network.fc.weight.detach(), -network.fc.bias.detach()
        negative = wrap(with_outputs(network, [(w[C], b[C]), (0 * w[C], 0 * b[C])]), "features.0")
        same(absent, METHODS[name](negative, images, first, **options))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["InputXGradient", "LayerGradCam", "FeatureAblation", "DeepLift"])
def test_attributions_of_captum(name, network, pair, one, images):
    pytest.importorskip("captum", reason="captum is an extra")
    method, first = find_method(f"captum:{name}"), torch.zeros(2, dtype=torch.int64)
    options = {"feature_mask": torch.arange(768).view(1, 1, 24, 32) // 96} if name == "FeatureAblation" else {}
    expected = method(pair, images[:2], first, **options)
    assert expected.amax() > 0.99
    same(method(wrap(network, "features.0", head="sigmoid"), images[:2], first + C, **options), expected)
    same(method(one, images[:2], first, layer="inner.features.0", **options), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(network, pair, one, images, objective):
    first = torch.zeros(5, dtype=torch.int64)
    options = {"objective": OBJECTIVES[objective], "num_steps": 3}
    expected = opti_cam(pair, images, first, **options)
    for found in (
        opti_cam(wrap(network, "features.0", head="sigmoid"), images, first + C, **options),
        opti_cam(one, images, first, layer="inner.features.0", **options),
    ):
        same(found.saliency, expected.saliency)
        same(found.objective, expected.objective)
    y = network(images * expected.saliency)[:, C].detach()  # the best map
    p = 1 / (1 + (-y).exp())
    by_hand = {"class_logit": y, "logit_margin": y, "probability": p, "log_probability": p.log()}
    if objective in by_hand:
        same(expected.objective.amax(1), by_hand[objective])


def test_scores_by_hand(network, one, images):
    S = torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, masked = (network(x)[:, C].tolist() for x in (images, images * S))
    first = torch.zeros(5, dtype=torch.int64)
    several = wrap(network, "features.0", head="sigmoid")
    tables = {
        1: [score(several, images, first + C, S), score(one, images, first, S)],
        -1: [score(one, images, first + 1, S)],
    }
    gained = set()
    for sign, found in tables.items():
        for table in found:
            for i in range(5):
                p, o = (1 / (1 + math.exp(-sign * value)) for value in (y[i], masked[i]))
                row = table.iloc[i]
                gained.add(o > p)
                assert row.logit == pytest.approx(sign * y[i])
                assert row.masked_logit == pytest.approx(sign * masked[i])
                assert [row.prob, row.masked_prob] == pytest.approx([p, o], rel=1e-12)
                assert row.average_drop == pytest.approx(max(0, p - o) / p, rel=1e-9)
                assert row.average_gain == pytest.approx(max(0, o - p) / (1 - p), rel=1e-9)
                assert row.average_increase == (o > p)
    assert gained == {True, False}


@pytest.mark.parametrize("name", ["insertion", "deletion", "insertion_deletion", "road", "saliency_metric"])
def test_metrics_that_ask_the_network(name, network, pair, one, images):
    S = torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    S[:, :, 5:15, 5:20] += 1
    S, first = S / 2, torch.zeros(5, dtype=torch.int64)
    options = {} if name in ("road", "saliency_metric") else {"mean": torch.full((3,), 0.5)}
    metric = lambda model, c: getattr(metrics, name)(model, images, c, S, **options)  # noqa: E731
    expected = metric(pair, first)
    torch.testing.assert_close(metric(wrap(network, "features.0", head="sigmoid"), first + C), expected)
    torch.testing.assert_close(metric(one, first), expected)
    if name == "saliency_metric":  # what it adds to the area is -log p: the positive class and its absence sum to 1
        both = [metric(one, first + k) for k in (0, 1)]
        box = metrics.predicted_box(S)
        area = ((box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)).double() / (24 * 32)
        same(sum((area.clamp(min=0.05).log() - value).exp() for value in both), torch.ones(5).double())


@pytest.mark.slow
def test_tables(network, pair, one, images):
    maps = METHODS["equal_weights"](pair, images, torch.zeros(5, dtype=torch.int64))
    boxes = metrics.predicted_box(maps)[:, None] + torch.tensor([0, 0, 1, 1])
    samples = lambda c: [Sample(f"{i}.png", images[i], c, boxes[i].float()) for i in range(5)]  # noqa: E731
    methods = {"equal_weights": METHODS["equal_weights"]}
    several = wrap(network, "features.0", head="sigmoid")
    single = wrap(one, "inner.features.0", class_names=["ill"])
    tables = [
        evaluate(model, samples(c), methods, scores=[*COLUMN_GROUPS, "road"])
        for model, c in ((pair, 0), (several, C), (single, 0))
    ]
    numbers = [
        table.select_dtypes("number").drop(columns=["label", "class_idx", "predicted", "seconds"]) for table in tables
    ]
    for found in numbers[1:]:
        np.testing.assert_allclose(found, numbers[0], atol=1e-9)
    y = network(images)
    assert tables[1].predicted.tolist() == y.argmax(1).tolist()
    assert tables[2].predicted.tolist() == [0 if value > 0 else 1 for value in y[:, C].tolist()]
    # correct is what the network says of this class, whatever it says of others
    assert set((y[:, C] > 0).tolist()) == {True, False}
    assert (y.argmax(1) == C).tolist() != (y[:, C] > 0).tolist()
    for table in tables:
        assert table.localization_error.tolist() == [0] * 5
        assert table.official_metric.tolist() == [0 if value > 0 else 1 for value in y[:, C].tolist()]


def test_whether_one_logit_stands_for_the_first_or_the_second_class_is_asked(network, one, images):
    class Named(list):
        class_names = ("healthy", "ill")

    data = Named(Sample(f"{i}.png", image, 1, torch.zeros(0, 4)) for i, image in enumerate(images))
    fake = {"fake_cam": METHODS["fake_cam"]}
    for model in (one, wrap(one, "inner.features.0"), wrap(one, "inner.features.0", class_names=["sick"])):
        with pytest.raises(ValueError, match="dataset: whether the network's one logit stands for 'healthy', label 0"):
            evaluate(model, data, fake)
    y = network(images)[:, C].detach()
    for to_logits, sign in ((None, -1), (torch.neg, 1)):
        model = wrap(one, "inner.features.0", class_names=data.class_names, to_logits=to_logits)
        same(torch.tensor(evaluate(model, data, fake).prob), (sign * y).sigmoid())
    with pytest.raises(ValueError, match="dataset: its labels are 2 classes; wanted the 5 of the model"):
        evaluate(network, data, fake)
    data.class_names = list("abcde")
    assert len(evaluate(network, data, fake)) == 5  # of several logits the order is that of the labels


def test_the_probability_of_one_logit(one, images):
    y, c = one(images), torch.tensor([0, 1, 0, 1, 1])
    expected = torch.where(c == 0, y, -y).sigmoid()
    for logits in (y, y[:, None]):
        for head in ("softmax", "sigmoid"):
            same(metrics.class_probability(logits, c, head), expected)
    table = score(one, images, c, images[:, :1], y)  # logits in a graph, as a user has them
    same(torch.tensor(table.prob), expected.detach())


def test_a_dataset_whose_one_name_is_elsewhere_is_refused(one, images):
    class Named(list):
        class_names = ("healthy", "ill")

    data = Named(Sample(f"{i}.png", image, 1, torch.zeros(0, 4)) for i, image in enumerate(images))
    model = wrap(one, "inner.features.0", class_names=["Ill "])  # names that differ in spelling alone are the same
    with pytest.raises(ValueError, match="dataset: its classes are in another order than the model's"):
        evaluate(model, data, {"fake_cam": METHODS["fake_cam"]})


def test_a_bernoulli_for_each_class_is_said_to_be_sigmoids_or_refused(network, images):
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return torch.distributions.Bernoulli(logits=self.inner(x))

    class_idx = torch.full((5,), C)
    for model in (Drawn(), wrap(Drawn(), "inner.features")):
        with pytest.raises(ValueError, match=r"^model: it returns a Bernoulli for each class"):
            score(model, images, class_idx, images[:, :1])
    told, same = (
        wrap(model, layer, head="sigmoid") for model, layer in ((Drawn(), "inner.features"), (network, "features"))
    )
    assert score(told, images, class_idx, images[:, :1]).equals(score(same, images, class_idx, images[:, :1]))
