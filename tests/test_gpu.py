"""What only a CUDA device can show: the numbers of the CPU, no waiting in loops, its memory and its random numbers."""

import re
import warnings
from functools import partial

import pytest
import torch
from conftest import TinyCNN, state
from torch import nn

from opticam import METHODS, SCHEDULES, evaluate, find_method, metrics, opti_cam, wrap
from opticam.lab.datasets import Sample
from opticam.methods import OBJECTIVES, map_space
from opticam.saliency import BASELINES, NORMALIZATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
BOXES = [torch.tensor([[2.0, 3.0, 20.0, 17.0]])] * 4 + [torch.zeros(0, 4)]
OPTIONS = {
    **{f"schedule {name}": options for name, options in SCHEDULES.items()},
    **{f"objective {name}": {"objective": function} for name, function in OBJECTIVES.items()},
    **{f"normalize {name}": {"normalize": function} for name, function in NORMALIZATIONS.items()},
    **{f"baseline {name}": {"baseline": function} for name, function in BASELINES.items()},
    "map space": {"space": map_space},
    "two layers": {"layer": ["features.0", "features"]},
    "complement": {"complement": 0.5},
    "tol": {"tol": 0.01, "patience": 2},
    "batch_size": {"batch_size": 2},
}


def on_device(*values):
    return [value.to(DEVICE) for value in values]


def close(found, expected, atol=1e-8):
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=atol, equal_nan=True)


@pytest.fixture
def maps():
    return torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_opti_cam(tiny, images, class_idx, name):
    options = {"layer": "features", **OPTIONS[name], "num_steps": 8}
    expected = opti_cam(tiny, images, class_idx, **options)
    found = opti_cam(tiny.to(DEVICE), *on_device(images, class_idx), **options)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.device.type == DEVICE
            close(ours, theirs)


@pytest.mark.parametrize("name", metrics.COLUMNS)
def test_metrics(tiny, images, class_idx, maps, name):
    with torch.no_grad():
        logits, masked_logits = tiny(images), tiny(images * maps)
    prob, masked_prob = logits.softmax(1)[:, 0], masked_logits.softmax(1)[:, 0]
    values = {
        "model": tiny,
        "images": images,
        "class_idx": class_idx,
        "saliency": maps,
        "other": maps.roll(1, 0),
        "boxes": BOXES,
        "probs": prob,
        "masked_probs": masked_prob,
        "logits": logits,
        "masked_logits": masked_logits,
        "drop": metrics.average_drop(prob, masked_prob),
        "road": prob - 0.5,
        "correct": class_idx > 0,
        "head": "softmax",
        "mean": torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64),
    }
    metric = metrics.COLUMNS[name]
    extra = {"mean": values["mean"]} if name in ("insertion", "deletion") else {}
    expected = metric(*(values[need] for need in metric.needs), **extra)
    there = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor | nn.Module) else value for key, value in values.items()
    }
    found = metric(*(there[need] for need in metric.needs), **({"mean": there["mean"]} if extra else {}))
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for ours, theirs in pairs:
        assert ours.device.type == DEVICE
        close(ours, theirs)


def test_box_hits_and_the_masks_of_the_box_experiment(maps):
    assert torch.equal(metrics.box_hits(maps.to(DEVICE), BOXES).cpu(), metrics.box_hits(maps, BOXES))
    expected = metrics.box_experiment_masks(maps, BOXES)
    for name, mask in metrics.box_experiment_masks(maps.to(DEVICE), BOXES).items():
        close(mask, expected[name])


def test_random_weights(tiny):
    stages = ["fc", "features.2"]
    for order in (metrics.cascading, metrics.independent):
        expected = [(name, network.state_dict()) for name, network in order(tiny, 0, stages)]
        there = TinyCNN().double().to(DEVICE)
        there.load_state_dict(tiny.state_dict())
        for (name, weights), (stage, network) in zip(expected, order(there, 0, stages), strict=True):
            assert name == stage
            for key, value in network.state_dict().items():
                close(value, weights[key], atol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tables(tiny, images, class_idx, num_workers):
    samples = [Sample(str(i), x, int(c), BOXES[i]) for i, (x, c) in enumerate(zip(images, class_idx, strict=True))]
    methods = {
        "opti_cam": partial(METHODS["opti_cam"], layer="features", num_steps=6),
        "grad_cam": partial(METHODS["grad_cam"], layer="features"),
    }
    scores = ["curves", "road", "adcc", "localization", "box_experiment", "saliency"]
    model = wrap(tiny, "features", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), input_size=24, resize=24).double()
    expected = evaluate(model, samples, methods, scores=scores, batch_size=3)
    found = evaluate(model.to(DEVICE), samples, methods, scores=scores, batch_size=3, num_workers=num_workers)
    assert list(found) == list(expected)
    for column in expected.columns.drop("seconds"):
        pair = found[column], expected[column]
        if pair[0].dtype.kind == "f":  # pixels as salient as others but for rounding may change places
            atol = 1e-3 if column in ("insertion", "deletion", "road") else 1e-8
            close(*(torch.tensor(values.to_numpy()) for values in pair), atol=atol)
        else:
            assert pair[0].tolist() == pair[1].tolist(), column


def waits(call):
    """How often a call waits for the device."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("a synchronizing CUDA operation" in str(warning.message) for warning in said)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loop_does_not_wait_for_the_device(tiny, images, class_idx, schedule):
    model, *inputs = on_device(tiny, images, class_idx)
    one, few, many = (
        partial(opti_cam, model, *inputs, layer="features", **SCHEDULES[schedule] | {"num_steps": num_steps})
        for num_steps in (1, 3, 13)
    )
    one()  # loads kernels
    assert waits(inputs[0].sum().item) > 0
    assert waits(many) == waits(few)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tiny, images, class_idx, dtype):
    model, *inputs = on_device(tiny.float(), images.float(), class_idx)
    exact, coarse = (
        opti_cam(model, *inputs, layer="features", num_steps=6, autocast=how).saliency for how in (None, dtype)
    )
    assert coarse.dtype == torch.float32
    assert (coarse - exact).abs().mean() < 0.1
    assert not torch.equal(coarse, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["opti_cam", "grad_cam", "score_cam", "ablation_cam", "rise"])
def test_weights_of_half_precision(tiny, images, class_idx, name, dtype):
    options = {"opti_cam": {"num_steps": 6}, "rise": {"num_masks": 12}}.get(name, {})
    model, *inputs = on_device(tiny.to(dtype), images.to(dtype), class_idx)
    saliency = METHODS[name](model, *inputs, layer="features", **options)
    assert saliency.dtype == torch.float32
    assert saliency.isfinite().all()
    assert saliency.amin() >= 0
    assert saliency.amax() <= 1


@pytest.mark.parametrize("name", ["opti_cam", "rise", "extremal_perturbation", "captum:GradientShap"])
def test_random_numbers_of_the_device_are_left_alone(tiny, images, class_idx, name):
    if name.startswith("captum"):
        pytest.importorskip("captum")
    options = {"rise": {"num_masks": 12}, "captum:GradientShap": {}}.get(name, {"num_steps": 4})
    method = partial(find_method(name), layer="features", **options)
    model, *inputs = on_device(tiny, images, class_idx)
    before = state(model), torch.cuda.get_rng_state().tolist()
    first = method(model, *inputs)
    assert (state(model), torch.cuda.get_rng_state().tolist()) == before
    torch.rand(3, device=DEVICE)
    close(method(model, *inputs), first.cpu())


def test_images_in_flight_are_halved_where_memory_ends(class_idx):
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    )
    model, x, c = on_device(network, torch.rand(32, 3, 224, 224), class_idx.repeat(7)[:32])
    whole = opti_cam(model, x[:2], c[:2], layer="1", num_steps=2).saliency
    torch.cuda.empty_cache()
    free = 1 << 30
    share = (torch.cuda.memory_allocated() + free) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with pytest.warns(UserWarning, match="out of memory with 32 images in flight: went on with"):
            result = opti_cam(model, x, c, layer="1", num_steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(result.saliency[:2], whole, rtol=0, atol=1e-3)


def test_another_device_is_refused(tiny, images, class_idx):
    for model, x, c, wanted in (
        (tiny.to(DEVICE), images, class_idx, "images: wanted on the device of the model, cuda:0, got cpu"),
        (
            tiny.to(DEVICE),
            images.to(DEVICE),
            class_idx,
            "class_idx: wanted on the device of the images, cuda:0, got cpu",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            opti_cam(model, x, c, layer="features")
