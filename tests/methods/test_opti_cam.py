import weakref
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from conftest import TinyCNN
from torch import nn
from torch.nn import functional as F

from opticam import METHODS, SCHEDULES, Classifier, opti_cam
from opticam.features import count_passes, feature_maps
from opticam.methods.ascent import adam, map_space
from opticam.methods.cam import grad_cam
from opticam.methods.opti_cam import OBJECTIVES, class_logit, logit_difference, num_passes, squared_distance
from opticam.saliency import BASELINES, NORMALIZATIONS, apply_mask, combine, mean_color, min_max, upsample

GOLDEN = Path(__file__).parents[1] / "golden"


class Published(nn.Module):
    """The network of the golden file."""

    def __init__(self, golden) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(12, 5)
        self.double()
        weights = {name.removeprefix("weights/"): torch.from_numpy(golden[name]) for name in golden if "/" in name}
        self.load_state_dict(weights)
        self.register_buffer("shift", torch.from_numpy(golden["mean"])[:, None, None])
        self.register_buffer("scale", torch.from_numpy(golden["std"])[:, None, None])

    def forward(self, images):
        return self.fc(self.features((images - self.shift) / self.scale).mean((2, 3)))


@pytest.mark.parametrize(("name", "objective"), [("mask", class_logit), ("diff", logit_difference)])
def test_agrees_with_the_published_code(name, objective):
    golden = np.load(GOLDEN / f"opticam_minmax_{name}.npz")
    model = Published(golden)
    images, class_idx = torch.from_numpy(golden["images"]), torch.from_numpy(golden["class_idx"])
    num_steps, lr = int(golden["steps"]), float(golden["lr"])
    result = opti_cam(
        model, images, class_idx, layer="features", objective=_rising(objective), num_steps=num_steps, lr=lr
    )
    np.testing.assert_allclose(result.saliency, golden["saliency"], rtol=0, atol=1e-9)
    with torch.no_grad():
        masked_logits = model(images * result.saliency)
    np.testing.assert_allclose(masked_logits, golden["masked_logits"], rtol=0, atol=1e-9)


def cases(table, *fast):
    """Parameters of a test by name; all but these are slow."""
    return [
        pytest.param(value, id=name, marks=[] if name in fast else [pytest.mark.slow]) for name, value in table.items()
    ]


LAYERS = {
    "after ReLU": ["features"],
    "both signs": ["features.2"],
    "early": ["features.0"],
    "several": ["features.0", "features.3"],
}


@pytest.mark.parametrize("layers", cases(LAYERS, "after ReLU", "both signs"))
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_agrees_with_the_loop_version(tiny, objective, normalize, layers):
    images = torch.rand(1, 3, 10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    result = opti_cam(
        tiny,
        images,
        torch.tensor([3]),
        layer=layers if len(layers) > 1 else layers[0],
        objective=_rising(OBJECTIVES[objective]),
        normalize=NORMALIZATIONS[normalize],
        num_steps=3,
        lr=0.3,
    )
    features = [maps[0].numpy() for maps in feature_maps(tiny, images, layers)[0]]
    slow = getattr(references, objective), getattr(references, {"max": "by_max"}.get(normalize, normalize))
    u, saliency = references.opti_cam(tiny, features, images[0].numpy(), 3, 3, 0.3, *slow)
    widths = np.cumsum([len(maps) for maps in features])[:-1]
    weights = np.concatenate([references.softmax(part) for part in np.split(u, widths)])
    np.testing.assert_allclose(result.weights[0], weights, rtol=0, atol=5e-6)  # its gradients are differences
    np.testing.assert_allclose(result.saliency[0, 0], saliency, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layers", cases(LAYERS, "after ReLU", "both signs"))
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_map_space_agrees_with_the_loop_version(tiny, normalize, layers):
    images = torch.rand(1, 3, 10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer = layers if len(layers) > 1 else layers[0]
    options = SCHEDULES["fast"] | {"num_steps": 3}
    rising = {"objective": _rising(class_logit), "normalize": NORMALIZATIONS[normalize]}
    result = opti_cam(tiny, images, torch.tensor([3]), layer=layer, **rising, **options)
    features = [maps[0].numpy() for maps in feature_maps(tiny, images, layers)[0]]
    slow = getattr(references, {"max": "by_max"}.get(normalize, normalize))
    weights, saliency = references.opti_cam_in_map_space(tiny, features, images[0].numpy(), 3, 3, 0.3, slow)
    np.testing.assert_allclose(result.weights[0], weights, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.saliency[0, 0], saliency, rtol=0, atol=1e-5)


VIEWS = {
    "two baselines": {"baselines": 2},
    "complement": {"baselines": 1, "complement": 0.7},
    "anchor": {"baselines": 1, "beta": 5.0},
    "all": {"baselines": 3, "complement": 0.3, "beta": 2.0, "low": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("seen", cases(VIEWS, "all"))
@pytest.mark.parametrize("objective", ["class_logit", "odds_gain"])
@pytest.mark.parametrize("space", ["weights", "map"])
def test_views_of_one_mask_agree_with_the_loop_version(tiny, space, objective, seen):
    """`mean_b g(f(x * S + b * (1 - S)))_c - lambda mean_b g(f(x * (1 - S) + b * S))_c - beta mean((S - S_0)^2)`."""
    generator = torch.Generator().manual_seed(5)
    images, S_0 = (torch.rand(1, n, 10, 14, dtype=torch.float64, generator=generator) for n in (3, 1))
    own = torch.rand(1, 3, 10, 14, dtype=torch.float64, generator=generator)
    shown = [None, mean_color, own][: seen["baselines"]]
    options = {"complement": seen.get("complement", 0.0), "num_steps": 3, "lr": 0.3}
    if beta := seen.get("beta", 0.0):
        options |= {"anchor": S_0, "penalty": partial(squared_distance, beta=beta, low=seen.get("low", 1.0))}
    if space == "map":
        options |= {name: SCHEDULES["fast"][name] for name in ("space", "optimizer")}
    rising = _rising(OBJECTIVES[objective])
    result = opti_cam(tiny, images, torch.tensor([3]), layer="features", objective=rising, baseline=shown, **options)
    features = [maps[0].numpy() for maps in feature_maps(tiny, images, "features")[0]]
    slow = {"objective": getattr(references, objective), "complement": options["complement"], "beta": beta}
    slow["low"] = seen.get("low", 1.0)
    slow["baselines"] = [0.0, images.mean((2, 3), keepdim=True)[0].numpy(), own[0].numpy()][: seen["baselines"]]
    slow["anchor"] = S_0[0, 0].numpy()
    given = tiny, features, images[0].numpy(), 3, 3, 0.3
    if space == "map":
        weights, saliency = references.opti_cam_in_map_space(*given, normalize=references.min_max, **slow)
    else:
        u, saliency = references.opti_cam(*given, **slow)
        weights = references.softmax(u)
    np.testing.assert_allclose(result.weights[0], weights, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.saliency[0, 0], saliency, rtol=0, atol=1e-5)


def test_views_by_hand(tiny, images, class_idx):
    """One step of none: the objective of equal weights, each of its terms from the network itself."""
    generator = torch.Generator().manual_seed(3)
    S_0, own = (torch.rand(5, n, 24, 32, dtype=torch.float64, generator=generator) for n in (1, 3))
    run = partial(opti_cam, tiny, images, class_idx, layer="features", num_steps=0)
    S = run().saliency

    def logit(mask, b):
        return tiny(images * mask + b * (1 - mask)).gather(1, class_idx[:, None])[:, 0]

    kept, hidden = ((logit(mask, 0) + logit(mask, own) + logit(mask, 0.25)) / 3 for mask in (S, 1 - S))
    far = ((S - S_0) ** 2).mean((1, 2, 3))
    found = run(
        baseline=[None, own, torch.full((1,), 0.25)],
        complement=0.4,
        anchor=S_0,
        penalty=partial(squared_distance, beta=7.0),
    )
    torch.testing.assert_close(found.objective[:, 0], kept - 0.4 * hidden - 7 * far, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"baseline": mean_color}, SCHEDULES["fast"] | {"tol": 1e-3, "patience": 2}])
def test_one_view_in_a_list_is_one_view(tiny, images, class_idx, options):
    one = opti_cam(tiny, images, class_idx, layer="features", **{"num_steps": 6} | options)
    options = options | {"baseline": [options.get("baseline")]}
    for a, b in zip(
        one, opti_cam(tiny, images, class_idx, layer="features", **{"num_steps": 6} | options), strict=True
    ):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.slow
def test_a_map_far_too_dear_to_leave_stays_at_its_anchor(tiny, images, class_idx):
    u = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    anchor = opti_cam(tiny, images, class_idx, layer="features", num_steps=0, u=u).saliency
    dear = partial(squared_distance, beta=1e6)
    options = {"layer": "features", "anchor": anchor, "penalty": dear, "num_steps": 400, "batch_size": 2}
    near = opti_cam(tiny, images, class_idx, **options).saliency
    assert (near - anchor).abs().max() < 0.02
    assert (opti_cam(tiny, images, class_idx, layer="features").saliency - anchor).abs().max() > 0.1


def test_a_method_as_anchor_is_its_map(tiny, images, class_idx):
    options = {"layer": "features", "num_steps": 4, "batch_size": 2}
    by_method = opti_cam(tiny, images, class_idx, anchor=grad_cam, **options)
    maps = grad_cam(tiny, images, class_idx, layer="features")
    assert torch.equal(by_method.saliency, opti_cam(tiny, images, class_idx, anchor=maps, **options).saliency)
    several = options | {"layer": ["features.0", "features"]}
    by_method = opti_cam(tiny, images, class_idx, anchor=grad_cam, **several)
    assert torch.equal(by_method.saliency, opti_cam(tiny, images, class_idx, anchor=maps, **several).saliency)


@pytest.mark.parametrize(
    "options",
    [*SCHEDULES.values(), {"baseline": [None, mean_color], "complement": 0.5, "num_steps": 3}],
    ids=[*SCHEDULES, "complement"],
)
def test_passes_are_what_is_said(tiny, images, class_idx, options):
    with count_passes(tiny) as passes:
        opti_cam(tiny, images, class_idx, layer="features", **options)
    assert passes[0] == 5 * num_passes(**options)
    assert num_passes(**SCHEDULES["robust"]) <= 60


@pytest.mark.parametrize("layers", [["features"], ["features.0", "features"]])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("normalize", cases(NORMALIZATIONS, "min_max"))
def test_the_map_is_that_of_the_weights(tiny, images, class_idx, normalize, schedule, layers):
    result = opti_cam(tiny, images, class_idx, layer=layers, normalize=normalize, **SCHEDULES[schedule])
    if len(layers) == 1 and normalize is not NORMALIZATIONS["sigmoid"]:  # what map space is made for
        assert (result.objective.amax(1) > result.objective[:, 0]).all()
    assert (result.weights >= 0).all()
    features = feature_maps(tiny, images, layers)[0]
    weights = result.weights.split([maps.shape[1] for maps in features], 1)
    total = 0
    for maps, w in zip(features, weights, strict=True):
        torch.testing.assert_close(w.sum(1), torch.ones(5, dtype=torch.float64))
        total = total + upsample(combine(maps.relu(), w), images.shape[-2:])
    torch.testing.assert_close(result.saliency, normalize(total), rtol=0, atol=1e-9)


def test_projection_by_hand():
    # one row of cells: A_0 = (2,0,0), A_1 = (0,1,0); wanted (1,-3,5): w_0 = 1/2, w_1 = 0, and nothing makes cell 2
    maps = torch.tensor([[[[2.0, 0, 0]], [[0, 1.0, 0]]]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, -3.0, 5.0]], dtype=torch.float64)
    start = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    point = wanted.clone(), start.clone()
    map_space.settle(point, [maps])
    torch.testing.assert_close(point[1], torch.tensor([[0.5, 0]], dtype=torch.float64))
    torch.testing.assert_close(point[0], torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
    hopeless = -wanted.abs(), start.clone()
    map_space.settle(hopeless, [maps])
    torch.testing.assert_close(map_space.weights(hopeless, [maps]), start)


def _rising(objective):
    """The objective plus 1000 a call: same gradients, and the last map is the best, as the published code keeps it."""
    calls = count()
    return lambda *arguments: objective(*arguments) + 1000 * next(calls)


def test_objective_is_the_logit_of_the_masked_image(tiny, images, class_idx):
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=12)
    masked = tiny(apply_mask(images, result.saliency)).gather(1, class_idx[:, None])[:, 0]
    torch.testing.assert_close(result.objective.amax(1), masked, rtol=0, atol=1e-12)
    assert (result.objective.amax(1) > result.objective[:, 0]).all()


def test_a_batch_of_five_equals_five_batches_of_one(tiny, images, class_idx):
    batch = opti_cam(tiny, images, class_idx, layer="features", num_steps=30)
    for b in range(5):
        single = opti_cam(tiny, images[b : b + 1], class_idx[b : b + 1], layer="features", num_steps=30)
        for of_batch, alone in zip(batch, single, strict=True):
            torch.testing.assert_close(of_batch[b], alone[0], rtol=0, atol=1e-10)


def test_neighbours_do_not_matter_even_if_they_dwarf_the_image(tiny, images, class_idx):
    torch.manual_seed(2)
    loud = nn.Sequential(tiny.features, nn.Flatten(2), _Mean(), tiny.fc)
    batch = torch.cat([images[:1], 1e3 * images[1:]])
    together = opti_cam(loud, batch, class_idx, layer="0", num_steps=20).saliency[0]
    alone = opti_cam(loud, batch[:1], class_idx[:1], layer="0", num_steps=20).saliency[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


class _Mean(nn.Module):
    def forward(self, tokens):
        return tokens.mean(2)


class OneChannelMatters(nn.Module):
    """Feature map 0 covers the left half, 1 the right half, 2 the top; each class counts one side against the other."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = _Halves()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images):
        self.maps(images)
        left, right = images.chunk(2, dim=3)
        return self.scale * torch.stack([(left - right).mean((1, 2, 3)), (right - left).mean((1, 2, 3))], 1)


class _Halves(nn.Module):
    def forward(self, images):
        left = torch.zeros(len(images), 1, 4, 4, dtype=images.dtype)
        left[..., :2] = 1
        return torch.cat([left, 1 - left, left.mT], 1)


@pytest.mark.parametrize("label", [0, 1])
def test_the_one_feature_map_that_helps_gets_the_weight(label):
    images = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    result = opti_cam(OneChannelMatters(), images, torch.tensor([label]), layer="maps", num_steps=200)
    assert result.weights[0, label] > 0.97
    assert result.saliency[0, 0, :, :4].mean() == pytest.approx(1 - label, abs=0.01)
    assert result.saliency[0, 0, :, -4:].mean() == pytest.approx(label, abs=0.01)


def test_the_best_map_seen_is_kept(tiny, images, class_idx):
    wild = opti_cam(tiny, images, class_idx, layer="features", num_steps=15, lr=30.0)
    assert (wild.objective.argmax(1) == wild.num_steps).all()
    assert (wild.num_steps < 15).any()  # such a learning rate overshoots, else this test shows nothing
    for b in range(5):
        t = int(wild.num_steps[b])
        stopped = opti_cam(tiny, images[b : b + 1], class_idx[b : b + 1], layer="features", num_steps=t, lr=30.0)
        torch.testing.assert_close(wild.saliency[b], stopped.saliency[0], rtol=0, atol=1e-9)


def test_zero_steps_give_equal_weights(tiny, images, class_idx):
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=0)
    assert (result.weights == 1 / 6).all()
    assert result.objective.shape == (5, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("constant", [0.3, 0.0])
def test_constant_feature_maps_give_zeros(images, class_idx, constant, schedule):
    model = TinyCNN().double()
    with torch.no_grad():
        model.features[2].weight.zero_()
        model.features[2].bias.fill_(constant)
    result = opti_cam(model, images, class_idx, layer="features", **SCHEDULES[schedule])
    assert (result.saliency == 0).all()
    assert result.objective.isfinite().all()
    torch.testing.assert_close(result.weights, torch.full_like(result.weights, 1 / 6))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_the_network_returns_nan_the_map_is_nan(tiny, images, class_idx, schedule):
    with torch.no_grad():
        tiny.fc.bias.fill_(torch.nan)
    result = opti_cam(tiny, images, class_idx, layer="features", **SCHEDULES[schedule])
    assert result.objective.isnan().all()
    assert result.saliency.isnan().all()


def test_nan_stays_with_its_image(tiny, images, class_idx):
    expected = opti_cam(tiny, images, class_idx, layer="features", num_steps=3).saliency
    images[1, 0, 3, 4] = torch.nan
    found = opti_cam(tiny, images, class_idx, layer="features", num_steps=3).saliency
    rest = torch.tensor([0, 2, 3, 4])
    assert found[1].isnan().all()
    torch.testing.assert_close(found[rest], expected[rest])


def steep():
    """A network whose logits have something to gain: 0.05 to 0.25 in 20 steps of learning rate 1."""
    torch.manual_seed(0)
    model = TinyCNN()
    with torch.no_grad():
        model.fc.weight.mul_(50)
    return model


def gained(result):
    return (result.objective - result.objective[:, :1]).double()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 5e-3)])
def test_lower_precision_networks(images, class_idx, dtype, atol):
    model, settings = steep().to(dtype), {"layer": "features", "num_steps": 20, "lr": 1.0}
    result = opti_cam(model, images.to(dtype), class_idx, **settings)
    assert result.saliency.dtype == result.weights.dtype == torch.float32
    assert result.saliency.amin() == 0
    assert result.saliency.amax() == 1
    exact = opti_cam(model.double(), images, class_idx, **settings)
    assert gained(exact).max() > 5 * atol
    torch.testing.assert_close(gained(result), gained(exact), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps: wanted at least 0, got -1"),
        ({"num_steps": 2.5}, r"num_steps: wanted a whole number, got 2\.5"),
        ({"lr": float("inf")}, "lr: wanted a positive number, got inf"),
        ({"lr": 0.0}, "lr: wanted a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr: wanted a positive number"),
        ({"class_idx": torch.tensor([0, 1, 2, 3, 5])}, "class_idx: wanted indices in 0..4, got 5"),
        ({"class_idx": torch.tensor([0, 1, 2, 3, -1])}, "class_idx: wanted indices in 0..4, got -1"),
        ({"layer": "layer4"}, "layer: no 'layer4' in TinyCNN"),
    ],
)
def test_bad_input_in_one_sentence(tiny, images, class_idx, change, message):
    given = {"class_idx": class_idx, "layer": "features", **change}
    with pytest.raises(ValueError, match=message):
        opti_cam(tiny, images, **given)


def test_methods_entry_is_the_map_of_the_record(tiny, images, class_idx):
    saliency = METHODS["opti_cam"](tiny, images, class_idx, layer="features", num_steps=3)
    assert torch.equal(saliency, opti_cam(tiny, images, class_idx, layer="features", num_steps=3).saliency)


OPTIONS = {
    "paper": {},
    "fast": SCHEDULES["fast"] | {"num_steps": 12},
    "fast, layers": SCHEDULES["fast"] | {"num_steps": 12, "layer": ["features.0", "features"]},
    "fast, tol": SCHEDULES["fast"] | {"tol": 1e-3, "patience": 2},
    "difference": {"objective": OBJECTIVES["logit_difference"]},
    "margin": {"objective": OBJECTIVES["logit_margin"]},
    "sigmoid": {"normalize": NORMALIZATIONS["sigmoid"]},
    "max": {"normalize": NORMALIZATIONS["max"]},
    "layers": {"layer": ["features.0", "features"]},
    "mean": {"baseline": BASELINES["mean"]},
    "blur": {"baseline": BASELINES["blur"]},
    "robust": SCHEDULES["robust"] | {"num_steps": 6},
    "robust, layers": SCHEDULES["robust"] | {"num_steps": 6, "layer": ["features.0", "features"]},
    "robust, tol": SCHEDULES["robust"] | {"tol": 1e-3, "patience": 2},
    "complement": {"baseline": [None, BASELINES["mean"]], "complement": 0.5, "tol": 1e-3, "patience": 2},
    "tol": {"tol": 1e-3, "patience": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", cases(OPTIONS, "paper", "fast, tol", "robust, layers", "complement"))
def test_batch_and_chunks_do_not_matter_for_any_option(tiny, images, class_idx, options):
    options = {"layer": "features", "num_steps": 12, **options}
    batch = opti_cam(tiny, images, class_idx, **options)
    for size in (1, 2):
        for whole, chunked in zip(batch, opti_cam(tiny, images, class_idx, batch_size=size, **options), strict=True):
            torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-9, equal_nan=True)


def test_baseline_shows_where_the_map_is_zero(tiny, images, class_idx):
    given = torch.rand(5, 3, 24, 32, dtype=torch.float64)
    for baseline, shown in ((mean_color, mean_color(images)), (given, given), (given[:1], given[:1]), (None, 0)):
        result = opti_cam(tiny, images, class_idx, layer="features", num_steps=3, baseline=baseline, batch_size=2)
        masked = images * result.saliency + shown * (1 - result.saliency)
        logits = tiny(masked).gather(1, class_idx[:, None])[:, 0]
        torch.testing.assert_close(result.objective.amax(1), logits, rtol=0, atol=1e-12)


def test_start(tiny, images, class_idx):
    u = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = u.clone()
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=0, u=u)
    torch.testing.assert_close(result.weights, u.softmax(1))
    opti_cam(tiny, images, class_idx, layer="features", num_steps=2, u=u, batch_size=2)
    assert torch.equal(u, kept)
    with pytest.raises(ValueError, match=r"u: wanted shape \(5,6\), got \(5, 7\)"):
        opti_cam(tiny, images, class_idx, layer="features", u=torch.zeros(5, 7))
    for wrong, got in ((torch.zeros(6, 6), r"\(6, 6\)"), (torch.zeros(1, 6), r"\(1, 6\)"), ([0.0], "list")):
        with pytest.raises(ValueError, match=f"u: wanted a tensor with a row for each of 5 images, got {got}"):
            opti_cam(tiny, images, class_idx, layer="features", u=wrong)
    with pytest.raises(ValueError, match="u: wanted finite numbers"):
        opti_cam(tiny, images, class_idx, layer="features", u=u.log())


TOL = 0.003


def test_an_image_stops_by_itself_and_costs_nothing_from_then_on(tiny, images, class_idx):
    sizes = []
    tiny.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    options = {"layer": "features", "num_steps": 60, "lr": 0.3}
    full = opti_cam(tiny, images, class_idx, **options)
    sizes.clear()
    stopped = opti_cam(tiny, images, class_idx, tol=TOL, patience=3, **options)
    taken = (~stopped.objective.isnan()).sum(1)
    assert taken.unique().numel() > 1  # not all at once, else this test shows little
    assert sum(sizes) == len(images) + taken.sum()
    for b, count_b in enumerate(taken.tolist()):
        torch.testing.assert_close(stopped.objective[b, :count_b], full.objective[b, :count_b], rtol=0, atol=1e-9)
        values, goal, stale = full.objective[b].tolist(), -float("inf"), 0
        for t, value in enumerate(values):  # the rule once more, by hand
            if t == 0 or value > goal + TOL * abs(goal):
                goal, stale = value, 0
            else:
                stale += 1
            if stale == 3:
                break
        assert count_b == t + 1


def test_out_of_memory_halves_what_is_in_flight_and_says_so_once(tiny, images, class_idx):
    def limited(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("no room")

    expected = opti_cam(tiny, images, class_idx, layer="features", num_steps=3)
    tiny.register_forward_pre_hook(limited)
    with pytest.warns(UserWarning, match="out of memory") as said:
        result = opti_cam(tiny, images, class_idx, layer="features", num_steps=3)
    assert [str(warning.message) for warning in said] == ["out of memory with 5 images in flight: went on with 2"]
    torch.testing.assert_close(result.saliency, expected.saliency, rtol=0, atol=1e-10)


def test_out_of_memory_for_a_single_image_is_the_callers(tiny, images, class_idx):
    def none_left(module, args):
        raise torch.OutOfMemoryError("no room")

    tiny.register_forward_pre_hook(none_left)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        opti_cam(tiny, images[:1], class_idx[:1], layer="features", num_steps=3)


def test_autocast_reduces_the_passes_of_the_masked_image_only(images, class_idx):
    model, settings = steep(), {"layer": "features", "num_steps": 20, "lr": 1.0}
    seen = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    result = opti_cam(model, images.float(), class_idx, autocast=torch.bfloat16, **settings)
    exact = opti_cam(model, images.float(), class_idx, **settings)
    assert seen == [torch.float32] + 21 * [torch.bfloat16] + 22 * [torch.float32]
    assert result.saliency.dtype == result.objective.dtype == torch.float32
    # on the way, an image may be a step behind
    torch.testing.assert_close(gained(result)[:, -1], gained(exact)[:, -1], rtol=0, atol=0.03)


def test_memory_does_not_grow_with_the_steps(tiny, images, class_idx):
    graphs, alive = [], []

    def spy(masked_logits, logits, class_idx):
        alive.append(sum(reference() is not None for reference in graphs))
        graphs.append(weakref.ref(masked_logits))
        return class_logit(masked_logits, logits, class_idx)

    opti_cam(tiny, images, class_idx, layer="features", num_steps=8, objective=spy)
    assert max(alive) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_viewer_is_told_every_step_and_changes_nothing(tiny, images, class_idx, schedule):
    steps = []
    options = {"layer": "features", **SCHEDULES[schedule], "num_steps": 25, "lr": 0.3, "tol": TOL, "patience": 3}
    seen = opti_cam(tiny, images, class_idx, batch_size=3, on_step=steps.append, **options)
    for one, other in zip(seen, opti_cam(tiny, images, class_idx, batch_size=3, **options), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    told = torch.full_like(seen.objective, torch.nan)
    for step in steps:
        told[step.rows, step.number] = step.objective
        with torch.no_grad():
            masked_logits = tiny(images[step.rows] * step.saliency)
        torch.testing.assert_close(step.masked_logits, masked_logits)
        assert torch.equal(step.class_idx, class_idx[step.rows])
        assert not any(part.requires_grad for part in step[1:])
    assert torch.equal(told.nan_to_num(-1), seen.objective.nan_to_num(-1))
    assert sorted({len(step.rows) for step in steps}) == [1, 2, 3]  # some stop before others
    best = {(int(row), step.number): S for step in steps for row, S in zip(step.rows, step.saliency, strict=True)}
    for b, number in enumerate(seen.num_steps.tolist()):
        torch.testing.assert_close(best[b, number], seen.saliency[b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_a_sigmoid_are_those_of_a_class_against_its_absence(tiny, images, class_idx, name):
    """sigmoid(y) = softmax((y, 0))_0, by hand from the logit of the class alone."""
    model = Classifier(tiny, "several labels", "features", head="sigmoid", class_names=list("abcde")).double().eval()
    with torch.no_grad():
        tiny.fc.weight.mul_(30)
        y = model(images).gather(1, class_idx[:, None])[:, 0]
    result = opti_cam(model, images, class_idx, objective=OBJECTIVES[name], num_steps=8)
    with torch.no_grad():
        o = model(images * result.saliency).gather(1, class_idx[:, None])[:, 0]
    expected = {
        "class_logit": o,
        "logit_difference": -(y - o).abs(),
        "logit_margin": o,
        "probability": 1 / (1 + (-o).exp()),
        "log_probability": -(1 + (-o).exp()).log(),
        "odds_gain": -(1 + (y - o + 1).exp()).log(),
    }
    torch.testing.assert_close(result.objective.amax(1), expected[name], rtol=0, atol=1e-12)


def test_own_optimizer(tiny, images, class_idx):
    def sgd(u, lr, num_steps):
        return torch.optim.SGD([u], lr=lr, maximize=True), None

    rising = opti_cam(tiny, images, class_idx, layer="features", optimizer=sgd, lr=5.0, num_steps=5).objective
    assert (rising.diff() > 0).all()
    assert not torch.equal(rising, opti_cam(tiny, images, class_idx, layer="features", optimizer=adam, num_steps=5)[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": -1.0}, "tol: wanted at least 0"),
        ({"num_steps": None}, "^num_steps: wanted a number, got None$"),
        ({"tol": "0"}, "^tol: wanted a number, got '0'$"),
        ({"lr": "0.1"}, r"^lr: wanted a number, got '0\.1'$"),
        ({"complement": None}, "^complement: wanted a number, got None$"),
        ({"autocast": "bf16"}, r"^autocast: wanted a dtype, such as torch\.bfloat16, got 'bf16'$"),
        ({"patience": 0}, "patience: wanted at least 1"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"layer": []}, "layer: wanted at least one"),
        ({"baseline": []}, "baseline: wanted at least one"),
        ({"complement": -0.5}, r"complement: wanted a number of at least 0, got -0\.5"),
        ({"complement": float("nan")}, "complement: wanted a number of at least 0, got nan"),
        ({"anchor": torch.rand(5, 1, 7, 7)}, r"anchor: wanted shape \(5, 1, 24, 32\), got \(5, 1, 7, 7\)"),
        ({"anchor": lambda *_, **__: torch.rand(5, 24, 32)}, r"anchor: wanted shape .*, got \(5, 24, 32\)"),
        ({"anchor": torch.full((5, 1, 24, 32), 2.0)}, r"anchor: wanted values in \[0,1\], got \[2, 2\]"),
        *(
            (
                {"objective": function},
                rf"^objective: wanted a function to one number per image, shape \(5,\), got {got}$",
            )
            for function, got in (
                (lambda masked, *_: masked.sum(), r"\(\)"),
                (lambda masked, *_: masked[:, :1], r"\(5, 1\)"),
                (lambda masked, *_: masked, r"\(5, 5\)"),
                (lambda *_: None, "NoneType"),
            )
        ),
        (
            {"objective": lambda masked: masked},
            r"^objective: wanted a function of \(masked_logits, logits, class_idx\)",
        ),
        ({"penalty": lambda maps: maps.sum()}, r"^penalty: wanted a function of \(saliency, anchor\), got "),
        ({"anchor": lambda *_: None}, r"^anchor: wanted a function of \(model, images, class_idx, layer=\), got "),
        ({"on_step": torch.ones(2)}, "^on_step: wanted a function, such as its default, got tensor"),
        ({"anchor": torch.rand(5, 1, 24, 32).to_sparse()}, r"^anchor: wanted a strided tensor, got torch\.sparse_coo$"),
        ({"u": torch.nested.nested_tensor([torch.rand(6)] * 5)}, "^u: wanted a strided tensor, got a nested one$"),
        ({"u": torch.rand(5, 6).to_sparse()}, r"^u: wanted a strided tensor, got torch\.sparse_coo$"),
        ({"objective": lambda masked, *_: torch.zeros(len(masked))}, "^objective: wanted a function that can be diff"),
        (
            {"anchor": torch.rand(5, 1, 24, 32), "penalty": lambda *_: torch.zeros(5)},
            "^penalty: wanted a function that can be diff",
        ),
        (
            {"objective": lambda masked, *_: masked.amax(), "complement": 1.0},
            r"^objective: wanted .*, shape \(10,\), got \(\)$",
        ),
        (
            {"anchor": torch.rand(5, 1, 24, 32), "penalty": lambda *maps: F.mse_loss(*maps)},
            r"^penalty: wanted a function to one number per image, shape \(5,\), got \(\)$",
        ),
        ({"normalize": lambda maps: min_max(maps) + 1}, r"^normalize: wanted values in \[0,1\], got \[1, 2\]$"),
        ({"complement": 10**400}, "^complement: wanted a number that a float holds, got an integer of 1329 bits$"),
        ({"normalize": lambda maps: maps[:, 0]}, r"^normalize: wanted shape \(5, 1, 24, 32\), got \(5, 24, 32\)$"),
    ],
)
def test_bad_options_in_one_sentence(tiny, images, class_idx, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        opti_cam(tiny, images, class_idx, **{"layer": "features", **change})


def test_a_normalisation_that_leaves_its_range_after_the_first_step(tiny, images, class_idx):
    calls = count()
    with pytest.raises(ValueError, match=r"^normalize: wanted values in \[0,1\], got \[1, 2\]$"):
        opti_cam(tiny, images, class_idx, layer="features", normalize=lambda maps: min_max(maps) + (next(calls) > 0))


def test_integers_of_many_digits(tiny, images, class_idx):
    many, few = (
        opti_cam(tiny, images, class_idx, layer="features", num_steps=2, complement=c, tol=c).saliency
        for c in (10**30, 1e30)
    )
    assert torch.equal(many, few)


def test_baselines_that_do_not_fit(tiny, images, class_idx):
    run = partial(opti_cam, tiny, images, class_idx, layer="features", num_steps=2)
    for wrong in (torch.rand(3), lambda x: torch.rand(3)):
        with pytest.raises(
            ValueError, match=r"baseline: wanted a shape that broadcasts to \(5, 3, 24, 32\), got \(3,\)"
        ):
            run(baseline=wrong)
    with pytest.raises(TypeError, match=r"baseline: wanted a tensor or a function, .* got None"):
        run(baseline=lambda x: None)
    gray = torch.full((3, 1, 1), 0.5)
    with torch.inference_mode():
        inside = gray.double()
    expected = run(baseline=gray.double()).saliency
    for other in (gray, inside, lambda x: gray):
        assert torch.equal(run(baseline=other).saliency, expected)


@pytest.mark.parametrize("name", ["objective", "normalize", "penalty", "optimizer", "baseline", "on_step"])
def test_a_name_in_the_place_of_a_function(tiny, images, class_idx, name):
    with pytest.raises(TypeError, match=f"{name}: wanted a .*function, such as .*, got 'blur'"):
        opti_cam(tiny, images, class_idx, layer="features", **{name: "blur"})
