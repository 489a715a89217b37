import math
from functools import partial

import numpy as np
import pytest
import references
import torch
from torch import nn

from opticam.classifier import Classifier
from opticam.metrics import (
    adcc,
    arcc,
    average_drop,
    average_gain,
    average_increase,
    class_probability,
    coherency,
    complexity,
    deletion,
    gain_minus_drop,
    impute,
    insertion,
    insertion_deletion,
    log_odds_change,
    probability_metrics,
    road,
)

OF_PROBABILITIES = probability_metrics()


def pairs():
    generator = torch.Generator().manual_seed(0)
    p, o = torch.rand(2, 200, dtype=torch.float64, generator=generator)
    o[:20] = p[:20]  # ties
    return p, o


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_equals_the_formula_written_out(name):
    p, o = pairs()
    expected = [getattr(references, name)(a, b) for a, b in zip(p.tolist(), o.tolist(), strict=True)]
    found = OF_PROBABILITIES[name](p, o)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_worked_example():
    p, o = torch.tensor([0.5, 0.8, 0.25]), torch.tensor([0.25, 0.9, 0.25])
    assert average_drop(p, o).tolist() == [0.5, 0.0, 0.0]  # (0.5 - 0.25)/0.5
    assert average_increase(p, o).tolist() == [0, 1, 0]  # strict: the third stays
    assert average_gain(p, o).tolist() == pytest.approx([0, 0.5, 0], abs=1e-6)  # (0.9 - 0.8)/(1 - 0.8)
    assert gain_minus_drop(p, o).tolist() == pytest.approx([-0.5, 0.5, 0], abs=1e-6)


def test_gain_is_the_mirror_image_of_drop():
    p, o = pairs()
    torch.testing.assert_close(average_gain(p, o), average_drop(1 - p, 1 - o), rtol=0, atol=1e-12)


def test_certain_network_has_nothing_to_gain_and_impossible_class_nothing_to_lose():
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    assert average_gain(one, one).tolist() == [0]
    assert average_drop(one, zero).tolist() == [1]
    assert average_drop(zero, one).tolist() == [0]
    assert average_gain(zero, one).tolist() == [1]


def test_probability_keeps_the_digits_of_one_minus_p():
    # two classes, logits 20 and 0: 1 - p = 1/(1 + e^20); in float32 p would be exactly 1
    logits = torch.tensor([[20.0, 0.0]])
    p = class_probability(logits, torch.tensor([0]))
    assert p.dtype == torch.float64
    assert (1 - p).item() == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)


HEADS = [("softmax", (5,)), ("sigmoid", (5,)), ("softmax", (1,)), ("sigmoid", ())]


@pytest.mark.parametrize(("head", "classes"), HEADS, ids=["softmax", "sigmoid", "one logit", "one logit, flat"])
@pytest.mark.parametrize("scale", [1, 30], ids=["moderate", "certain"])
def test_change_of_log_odds_equals_the_formula_in_many_digits(head, classes, scale):
    generator = torch.Generator().manual_seed(0)
    logits, masked = scale * torch.randn(2, 20, *classes, dtype=torch.float64, generator=generator)
    class_idx = torch.arange(20) % (5 if classes == (5,) else 2)
    rows = zip(logits.view(20, -1).tolist(), masked.view(20, -1).tolist(), class_idx.tolist(), strict=True)
    expected = torch.tensor([references.log_odds_change(*row, head) for row in rows], dtype=torch.float64)
    found = log_odds_change(logits, masked, class_idx, head)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


def test_change_of_log_odds_by_hand():
    # p = 1/2 -> o = 3/4: odds 1 -> 3; back again: the same with the other sign; two classes, then one logit of them
    logits, masked = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    first, second = torch.tensor([0]), torch.tensor([1])
    assert log_odds_change(logits, masked, first).item() == pytest.approx(math.log(3))
    assert log_odds_change(masked, logits, first).item() == pytest.approx(-math.log(3))
    assert log_odds_change(logits, masked, second).item() == pytest.approx(-math.log(3))
    assert log_odds_change(logits[:, :1], masked[:, :1], second).item() == pytest.approx(-math.log(3))
    # p rounds to 1 in float64, and the change is still there: logits 60 -> 50 against 0
    certain, less = torch.tensor([[60.0, 0.0]]), torch.tensor([[50.0, 0.0]])
    assert class_probability(certain, first).item() == class_probability(less, first).item() == 1
    assert log_odds_change(certain, less, first).item() == -10
    assert log_odds_change(certain, torch.tensor([[math.nan, 0.0]]), first).isnan()


def test_change_of_log_odds_refuses():
    logits, class_idx = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"masked_logits: wanted the shape of logits, \(2, 3\), got \(2, 4\)"):
        log_odds_change(logits, torch.zeros(2, 4), class_idx)
    with pytest.raises(TypeError, match="masked_logits: wanted a tensor, got ndarray"):
        log_odds_change(logits, np.zeros((2, 3)), class_idx)
    with pytest.raises(ValueError, match="head: wanted one of softmax, sigmoid, got 'tanh'"):
        log_odds_change(logits, logits, class_idx, "tanh")


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_nan_stays_nan(name):
    p, o = torch.tensor([math.nan, 0.5, math.nan]), torch.tensor([0.5, math.nan, math.nan])
    assert OF_PROBABILITIES[name](p, o).isnan().all()


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_bad_input(name):
    with pytest.raises(ValueError, match=r"masked_probs: wanted the shape of probs, \(2,\), got \(3,\)"):
        OF_PROBABILITIES[name](torch.rand(2), torch.rand(3))
    with pytest.raises(TypeError, match="masked_probs: wanted a tensor, got float"):
        OF_PROBABILITIES[name](torch.rand(2), 0.5)
    with pytest.raises(ValueError, match=r"^masked_probs: tensors on the meta device have no values"):
        OF_PROBABILITIES[name](torch.rand(2), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="probs: wanted probabilities"):
        OF_PROBABILITIES[name](torch.tensor([50.0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="masked_probs: wanted probabilities"):
        OF_PROBABILITIES[name](torch.tensor([0.5]), torch.tensor([-0.5]))


CURVES = {"insertion": insertion, "deletion": deletion}
SCORES = {**CURVES, "insertion_deletion": insertion_deletion, "road": road}


class Normalized(Classifier):
    """Counts the images of each pass; drops logits in training."""

    def __init__(self, network: nn.Module) -> None:
        mean, std = (0.5, 0.25, 0.375), (0.25, 0.5, 0.125)
        super().__init__(network, "normalized", "features", mean=mean, std=std, class_names=[])
        self.dropout = nn.Dropout(0.5)
        self.passes: list[int] = []
        self.extremes: list[float] = []

    def forward(self, images):
        self.passes.append(len(images))
        self.extremes += [images.min().item(), images.max().item()]
        return self.dropout(4 * self.network((images - self.mean) / self.std))


class OnePixel(nn.Module):
    """Two classes; class 0 has probability 3/4 where the first pixel is bright, else 1/2."""

    def forward(self, images):
        bright = images[:, 0, 0, 0] > 0.9
        return torch.stack([bright * math.log(3), 0 * bright], 1)


@pytest.fixture
def model(tiny):
    return Normalized(tiny).double().eval()


@pytest.fixture
def saliency():
    maps = torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    maps[1] = (8 * maps[1]).floor() / 8  # ties
    maps[2] = 0.5  # nothing but ties
    return maps


def everything(name, *args, **options):
    """All tensors that a score returns, in a row."""
    result = SCORES[name](*args, **options)
    if name == "insertion_deletion":
        return [*result[0], *result[1]]
    return list(result) if name in CURVES else [result]


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [None, 100, 767, 1000])  # 3 even steps; 8, the last of 68; the last of 1; 1
@pytest.mark.parametrize("name", CURVES)
def test_curve_equals_the_loop_after_mean_and_std(model, images, class_idx, saliency, name, per_step):
    areas, curves = CURVES[name](model, images, class_idx, saliency, pixels_per_step=per_step)
    normalised = ((images - model.mean) / model.std).numpy()
    for b in range(0 if per_step == 100 else 3, 5):
        area, curve = getattr(references, name)(
            lambda x: 4 * model.network(x), normalised[b], saliency[b, 0].numpy(), int(class_idx[b]), per_step or 8 * 32
        )
        close(curves[b], torch.tensor(curve, dtype=torch.float64))
        close(areas[b], torch.tensor(area, dtype=torch.float64))


def test_curves_of_a_network_that_reads_one_pixel():
    image = torch.tensor([1.0, 0, 0, 0]).expand(1, 3, 1, 4)
    best, worst = torch.tensor([1.0, 0.5, 0.3, 0]).view(1, 1, 1, 4), torch.tensor([0.1, 1, 0.5, 0.3]).view(1, 1, 1, 4)
    c = torch.tensor([0])

    def run(metric, saliency):
        area, curve = metric(OnePixel(), image, c, saliency, pixels_per_step=1, mean=torch.zeros(3))
        return [area.item(), *curve[0].tolist()]

    early, late = (0.25 + 3 * 0.75 + 0.375) / 4, (0.25 + 3 * 0.5 + 0.375) / 4  # trapezoids: half the first and last
    assert run(insertion, best) == pytest.approx([early, 0.5, 0.75, 0.75, 0.75, 0.75])
    assert run(insertion, worst) == pytest.approx([late, 0.5, 0.5, 0.5, 0.5, 0.75])
    assert run(deletion, best) == pytest.approx([late, 0.75, 0.5, 0.5, 0.5, 0.5])
    assert run(deletion, worst) == pytest.approx([early, 0.75, 0.75, 0.75, 0.75, 0.5])


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_pixels_of_a_constant_map_go_row_by_row(model, images, class_idx, value):
    rows = torch.linspace(1, 0, 768, dtype=torch.float64).view(1, 1, 24, 32).expand(5, 1, 24, 32)
    for name in CURVES:
        constant = everything(name, model, images, class_idx, torch.full_like(rows, value), pixels_per_step=50)
        close(constant, everything(name, model, images, class_idx, rows, pixels_per_step=50), atol=0)


def test_insertion_and_deletion_share_the_pass_of_the_unmasked_image(model, images, class_idx, saliency):
    options = {"pixels_per_step": 100, "batch_size": 7}
    everything("insertion_deletion", model, images, class_idx, saliency, **options)
    model.passes.clear()  # a network that is first seen is looked at closer
    together = everything("insertion_deletion", model, images, class_idx, saliency, **options)
    assert sum(model.passes) == 5 * (9 + 8)
    assert max(model.passes) == 7
    apart = [tensor for name in CURVES for tensor in CURVES[name](model, images, class_idx, saliency, **options)]
    close(together, apart)
    p = class_probability(model(images), class_idx).detach()
    close(together[1][:, -1], p)
    assert torch.equal(together[3][:, 0], together[1][:, -1])


def test_what_the_network_sees_stays_between_image_and_mean(model, images, class_idx, saliency):
    insertion_deletion(model, images, class_idx, saliency)
    assert min(model.extremes) >= min(images.min(), model.mean.min()).item() - 1e-12
    assert max(model.extremes) <= max(images.max(), model.mean.max()).item() + 1e-12


@pytest.mark.parametrize("name", SCORES)
def test_neither_neighbours_nor_chunks_matter(model, images, class_idx, saliency, name):
    run = partial(everything, name, model)
    whole = run(images, class_idx, saliency)
    for size in (1, 3, 5):
        model.passes.clear()
        close(run(images, class_idx, saliency, batch_size=size), whole)
        assert max(model.passes) == size
    for b in (0, 2, 4):
        close(run(images[b : b + 1], class_idx[b : b + 1], saliency[b : b + 1]), [t[b : b + 1] for t in whole])
    assert all(tensor.dtype == torch.float64 for tensor in whole)


@pytest.mark.parametrize("name", SCORES)
def test_nan_stays_with_its_image(model, images, class_idx, saliency, name):
    whole = everything(name, model, images, class_idx, saliency)
    saliency[1, 0, 3, 4] = torch.nan
    others = [0, 2, 3, 4]
    for before, after in zip(whole, everything(name, model, images, class_idx, saliency), strict=True):
        assert after[1].isnan().all()
        close(after[others], before[others])
    with torch.no_grad():
        model.network.fc.bias[0] = torch.nan
    assert all(tensor.isnan().all() for tensor in everything(name, model, images, class_idx, saliency))


def test_certain_network(model, images, class_idx, saliency):
    with torch.no_grad():
        model.network.fc.bias[3] = 1e4
    c = torch.full_like(class_idx, 3)
    for metric in CURVES.values():
        area, curve = metric(model, images, c, saliency)
        assert (curve == 1).all()
        close(area, torch.ones(5).double(), atol=1e-15)
    assert (road(model, images, c, saliency) == 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_scores_leave_everything_as_it_was(model, images, class_idx, saliency, name):
    expected = everything(name, model, images, class_idx, saliency)
    model.train()
    model.network.features.eval()
    model.network.fc.weight.requires_grad_(False)
    state = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    before, random_state = [t.clone() for t in (images, class_idx, saliency)], torch.get_rng_state()

    def fail(module, args, output):
        raise RuntimeError(f"inside forward, gradients {torch.is_grad_enabled()}")

    with torch.inference_mode():
        inside = everything(name, model, *(t.clone() for t in before))
    close(inside, expected)
    close(everything(name, model, images.requires_grad_(), class_idx, saliency), expected)
    handle = model.network.fc.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside forward, gradients False"):
        SCORES[name](model, images, class_idx, saliency)
    handle.remove()
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == state
    assert all(p.grad is None for p in [*model.parameters(), images])
    assert all(map(torch.equal, (images, class_idx, saliency), before))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(tensor.requires_grad for tensor in inside)


@pytest.mark.parametrize("name", SCORES)
def test_half_precision_network(model, images, class_idx, saliency, name):
    with torch.no_grad():
        model.network.fc.weight.mul_(30)  # or all probabilities are much the same
    exact = everything(name, model, images, class_idx, saliency)
    half = everything(name, model.bfloat16(), images.bfloat16(), class_idx, saliency.float())
    assert all(tensor.dtype == torch.float64 for tensor in half)
    assert all(tensor.abs().max() > 0.06 for tensor in exact)
    close(half, exact, atol=0.03)


@pytest.mark.parametrize("name", SCORES)
def test_scores_refuse(model, images, class_idx, saliency, name):
    run = partial(SCORES[name], model, images)
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(5, 1, 24, 32\), got \(5, 24, 32\)"):
        run(class_idx, saliency[:, 0])
    with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\], got"):
        run(class_idx, saliency - 0.5)
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0\.\.4, got 7"):
        run(class_idx + 3, saliency)
    with pytest.raises(ValueError, match=r"images: wanted values in \[0,1\]"):
        SCORES[name](model, 255 * images, class_idx, saliency)
    for wrong in (None, True):
        with pytest.raises(ValueError, match=f"^batch_size: wanted a whole number, got {wrong}$"):
            run(class_idx, saliency, batch_size=wrong)
    with pytest.raises(ValueError, match="batch_size: wanted at least 1, got 0"):
        run(class_idx, saliency, batch_size=0)
    if name == "road":
        for seed in (None, 1.5):
            with pytest.raises(ValueError, match=f"^seed: wanted a whole number, got {seed}$"):
                run(class_idx, saliency, seed=seed)
        several = (run(class_idx, saliency, fractions=given) for given in ([0.5, 0.25], torch.tensor([0.5, 0.25])))
        assert torch.equal(*several)
        with pytest.raises(TypeError, match=r"^fractions: wanted several numbers"):
            run(class_idx, saliency, fractions=torch.tensor(0.5))
        for fractions, message in ((0.5, "several numbers between 0 and 1, got 0"), (("0.5",), "a number, got '0")):
            with pytest.raises(TypeError, match=f"fractions: wanted {message}"):
                run(class_idx, saliency, fractions=fractions)
        for fractions in ((), (0.0, 0.5), (0.5, 1.0), (0.9999,), (0.0001,), np.array([])):
            with pytest.raises(ValueError, match="fractions: wanted at least one, each between 0 and 1"):
                run(class_idx, saliency, fractions=fractions)
        assert torch.equal(
            run(class_idx, saliency, fractions=np.array([0.2])), run(class_idx, saliency, fractions=[0.2])
        )
    else:
        with pytest.raises(ValueError, match="pixels_per_step: wanted at least 1, got 0"):
            run(class_idx, saliency, pixels_per_step=0)
        with pytest.raises(ValueError, match=r"mean: wanted a tensor of 3 values, .* got shape \(2,\)"):
            run(class_idx, saliency, mean=torch.zeros(2))
        for colour in ([123.7, 116.3, 103.5], [torch.nan, 0, 0]):  # the first of another range than the images
            with pytest.raises(ValueError, match=r"^mean: wanted a colour of the images, which are in \[0,1\], got \["):
                run(class_idx, saliency, mean=torch.tensor(colour))
        with pytest.raises(ValueError, match=r"mean: wanted a tensor of 3 values, .* the model has none of its own"):
            SCORES[name](model.network, images, class_idx, saliency)


@pytest.mark.parametrize("name", CURVES)
def test_mean_may_be_given(model, images, class_idx, saliency, name):
    class Anonymous(nn.Module):
        def forward(self, images):
            return model(images)

    expected = CURVES[name](model, images, class_idx, saliency)
    close(CURVES[name](Anonymous(), images, class_idx, saliency, mean=model.mean.flatten()), expected, atol=0)
    assert not torch.allclose(
        CURVES[name](model, images, class_idx, saliency, mean=torch.zeros(3))[0], expected[0], atol=1e-4
    )


@pytest.mark.slow
def test_road_equals_the_loop(model, images, class_idx, saliency):
    fractions = (0.1, 0.35, 0.9)
    scores = road(model, images, class_idx, saliency, fractions=fractions, seed=3)
    noise = 0.01 * torch.randn(3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).numpy()
    for b in (0, 1, 4):
        expected = references.road(
            model, images[b].numpy(), saliency[b, 0].numpy(), int(class_idx[b]), fractions, noise
        )
        assert scores[b].item() == pytest.approx(expected, rel=0, abs=1e-12)
    assert scores[2] == 0  # constant: both orders remove the same pixels
    default = road(model, images, class_idx, saliency)
    close(default, road(model, images, class_idx, saliency, fractions=[0.2, 0.4, 0.6, 0.8], seed=0), atol=0)
    assert (default != road(model, images, class_idx, saliency, seed=1))[[0, 1, 3, 4]].all()


def test_road_of_a_network_that_reads_one_pixel():
    image = torch.zeros(1, 3, 5, 7)
    image[..., 0, 0] = 1
    best = torch.linspace(1, 0, 35).view(1, 1, 5, 7)
    c = torch.tensor([0])
    # LeRF keeps the pixel, 3/4; MoRF replaces it by its dark neighbours, 1/2; (3/4 - 1/2)/2
    assert road(OnePixel(), image, c, best).item() == pytest.approx(0.125)
    assert road(OnePixel(), image, c, 1 - best).item() == pytest.approx(-0.125)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_impute_equals_the_dense_system(images, share):
    removed = torch.rand(5, 1, 24, 32, generator=torch.Generator().manual_seed(4)) < share
    removed[1] = False
    removed[2, :, :, :20] = True  # a large hole at three borders
    before = images.clone()
    imputed = impute(images, removed)
    assert torch.equal(images, before)
    for b in range(5):
        expected = references.impute(images[b].numpy(), list(zip(*np.nonzero(removed[b, 0].numpy()), strict=True)))
        close(imputed[b], torch.from_numpy(expected))
    assert torch.equal(imputed[1], images[1])
    assert torch.equal(impute(torch.where(removed, torch.nan, images), removed), imputed)


def test_impute_equals_the_library_grad_cam(images):
    road_of_grad_cam = pytest.importorskip("pytorch_grad_cam.metrics.road")
    removed = torch.rand(5, 1, 24, 32, generator=torch.Generator().manual_seed(5)) < 0.6
    peer = road_of_grad_cam.NoisyLinearImputer(noise=0)
    for b in range(2):
        close(impute(images, removed)[b].float(), peer(images[b].float(), (~removed[b, 0]).float()), atol=1e-6)


def test_imputed_by_hand():
    # one hole: direct neighbours 1, diagonal 0: (4 * 1/6)/(4/6 + 4/12) = 2/3
    cross = torch.tensor([[0.0, 1, 0], [1, 9, 1], [0, 1, 0]]).expand(1, 1, 3, 3)
    hole = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    hole[..., 1, 1] = True
    assert impute(cross, hole)[0, 0, 1, 1].item() == pytest.approx(2 / 3)
    # a corner: neighbours 1, 1 direct and 9 diagonal: (2/6 + 9/12)/(2/6 + 1/12) = 13/5
    corner = torch.zeros_like(hole)
    corner[..., 0, 0] = True
    assert impute(cross, corner)[0, 0, 0, 0].item() == pytest.approx(2.6)


def test_impute_restores_what_is_linear_and_what_is_constant():
    y, x = torch.meshgrid(torch.arange(20.0).double(), torch.arange(30.0).double(), indexing="ij")
    slope = (0.02 * y - 0.03 * x + 1).expand(1, 3, 20, 30)
    hole = torch.zeros(1, 1, 20, 30, dtype=torch.bool)
    hole[..., 4:15, 7:29] = True
    close(impute(slope, hole), slope)
    all_but_one = torch.ones_like(hole)
    all_but_one[..., 6, 0] = False
    close(impute(slope, all_but_one), slope[..., 6:7, 0:1].expand_as(slope), atol=1e-10)
    noise = torch.randn(3, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    close(impute(slope, hole, noise), torch.where(hole, slope + noise, slope))


def test_impute_refuses(images):
    removed = torch.zeros(5, 1, 24, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="removed: wanted at least one pixel kept of every image"):
        impute(images, torch.ones(5, 1, 24, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"removed: wanted shape \(5, 1, 24, 32\), got \(5, 24, 32\)"):
        impute(images, torch.zeros(5, 24, 32, dtype=torch.bool))
    for given, message in (
        ((None, removed), "images: wanted a tensor, got NoneType"),
        ((images[0], removed), r"images: wanted floating-point \(B,C,H,W\), got torch\.float64 \(3, 24, 32\)"),
        ((images, None), "removed: wanted a tensor, got NoneType"),
        ((images, removed, "0"), "noise: wanted a number, got '0'"),
        ((images, removed, torch.zeros(7)), r"noise: wanted a shape that broadcasts to .*, got \(7,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
            impute(*given)
    with pytest.raises(TypeError, match=r"removed: wanted dtype torch\.bool, got torch\.float32"):
        impute(images, torch.zeros(5, 1, 24, 32))


def test_adcc_and_its_terms_equal_the_formulas(saliency):
    a, b = saliency[[0, 1, 3, 4]], saliency[[1, 3, 4, 0]].sqrt()
    drops = torch.tensor([0.1, 0.0, 0.75, 0.999]).double()
    for i in range(4):
        x, y = a[i, 0].numpy(), b[i, 0].numpy()
        assert coherency(a, b)[i].item() == pytest.approx(references.coherency(x, y), abs=1e-12)
        assert complexity(a)[i].item() == pytest.approx(references.complexity(x), abs=1e-12)
        assert adcc(a, b, drops)[i].item() == pytest.approx(references.adcc(x, y, drops[i].item()), abs=1e-12)
    assert coherency(a.float(), b.float()).dtype == complexity(a.float()).dtype == torch.float64


def test_adcc_by_hand():
    s = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    # deviations (-1,-1,-1,3)/4 and (-1,1,-1,1)/2: products sum to 1/2, norms sqrt(12)/4 and 1: r = 1/sqrt(3)
    coherent = (1 / math.sqrt(3) + 1) / 2
    assert coherency(s, other).item() == pytest.approx(coherent)
    assert complexity(s).item() == 0.25
    assert adcc(s, other, torch.tensor([0.5])).item() == pytest.approx(3 / (1 / coherent + 4 / 3 + 2))
    maps = torch.rand(200, 1, 5, 7, generator=torch.Generator().manual_seed(7))
    assert coherency(maps, maps).max() == 1  # not above, by rounding
    assert coherency(s, s).item() == pytest.approx(1)
    assert coherency(s, 1 - s).item() == pytest.approx(0, abs=1e-15)
    assert adcc(s, s, torch.tensor([0.0])).item() == pytest.approx(3 / (1 + 4 / 3 + 1))


def test_adcc_is_zero_where_a_term_is_zero_or_undefined(saliency):
    good, nothing, everything = saliency[:1], torch.zeros(1, 1, 24, 32), torch.ones(1, 1, 24, 32)
    none, all_lost = torch.tensor([0.0]), torch.tensor([1.0])
    opposite = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    for terms in (
        (nothing, good, none),
        (good, torch.full_like(nothing, 0.1), none),
        (everything, everything, none),
        (good, good, all_lost),
        (opposite, 1 - opposite, none),  # r = -1
    ):
        assert adcc(*terms).item() == pytest.approx(0, abs=1e-15)
    constants = torch.linspace(0, 1, 50, dtype=torch.float64).view(50, 1, 1, 1).expand(50, 1, 5, 7)
    assert (constants.flatten(1).mean(1) != constants[:, 0, 0, 0]).any()  # some means are off by rounding
    small = good[..., :5, :7].expand_as(constants)
    assert coherency(constants, small).isnan().all()
    assert coherency(small, constants).isnan().all()
    assert (adcc(constants, small, torch.zeros(50)) == 0).all()
    assert adcc(good, good, torch.tensor([math.nan])).isnan().all()
    broken = good.clone()
    broken[..., 0, 0] = math.nan
    assert complexity(broken).isnan().all()
    for maps in ((broken, good), (good, broken), (broken, nothing), (everything, broken)):
        assert coherency(*maps).isnan().all()
        assert adcc(*maps, none).isnan().all()


def test_maps_that_do_not_fit_are_refused(saliency):
    with pytest.raises(ValueError, match=r"saliency_of_masked: wanted the shape of saliency, \(5, 1, 24, 32\), got"):
        coherency(saliency, saliency[:4])
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(B,1,H,W\) .*, got \(5, 24, 32\)"):
        complexity(saliency[:, 0])
    with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\]"):
        complexity(255 * saliency)
    with pytest.raises(ValueError, match=r"saliency_of_masked: wanted values in \[0,1\]"):
        coherency(saliency, saliency - 1)
    for score, values in ((adcc, torch.zeros(())), (arcc, torch.zeros(()))):
        with pytest.raises(ValueError, match=r"^saliency: wanted shape \(B,1,H,W\) .*, got \(\)"):
            score(torch.tensor(0.5), torch.tensor(0.5), values)
    with pytest.raises(TypeError, match="drop: wanted a tensor, got float"):
        adcc(saliency, saliency, 0.5)
    with pytest.raises(TypeError, match="road_combined: wanted a tensor, got ndarray"):
        arcc(saliency, saliency, np.zeros(5))
    with pytest.raises(ValueError, match=r"drop: wanted shape \(5,\), got \(1,\)"):
        adcc(saliency, saliency, torch.zeros(1))
    with pytest.raises(ValueError, match=r"drop: wanted fractions in \[0,1\], not percent"):
        adcc(saliency, saliency, torch.full((5,), 12.0))


def test_arcc_equals_the_formula(saliency):
    a, b = saliency.rot90(2, (2, 3)), saliency.roll(1, 3) + 0.1 * saliency
    a[2], b[2] = a[0], b[1]
    combined = torch.tensor([0.05, 0.4, 0.5, 0.123, 0.3], dtype=torch.float64)
    found = arcc(a, b / b.amax(), combined)
    for i in range(5):
        expected = references.arcc(a[i, 0].numpy(), (b / b.amax())[i, 0].numpy(), combined[i].item())
        assert found[i].item() == pytest.approx(expected, abs=1e-12)
    assert (
        arcc(a, b / b.amax(), torch.tensor([0.0, -0.2, -0.5, 0, 0])) == 0
    ).all()  # no worse than the other way round
    constant = torch.full_like(a, 0.25)
    assert (arcc(constant, a, combined) == 0).all()
    assert arcc(a, a, torch.full((5,), math.nan)).isnan().all()
    with pytest.raises(ValueError, match=r"road_combined: wanted shape \(5,\), got \(1,\)"):
        arcc(a, a, torch.zeros(1))
    with pytest.raises(ValueError, match=r"road_combined: wanted values in \[-1/2, 1/2\]"):
        arcc(a, a, torch.full((5,), 0.9))


def test_arcc_equals_the_library_grad_cam(saliency):
    """The library adds 1e-8 to every denominator. Its own ROAD and its own second map are replaced by given ones."""
    peer = pytest.importorskip("pytorch_grad_cam.metrics.arcc")
    combined = torch.tensor([-0.1, 0.4, 0.5, 0.123, 0.3], dtype=torch.float64)
    saliency = torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    again = saliency.flip(3)
    theirs = object.__new__(peer.ARCC)
    theirs.complexity, theirs.coherency = peer.Complexity(), peer.Coherency()
    theirs.road = lambda *arguments: combined.numpy()
    theirs.base_method = lambda **arguments: again[:, 0].numpy()
    found = theirs(torch.rand(5, 3, *saliency.shape[2:]), saliency[:, 0].numpy(), [], None)
    np.testing.assert_allclose(arcc(saliency, again, combined).numpy(), found, atol=1e-6)


def test_the_smallest_probabilities_drop_by_all_of_them():
    p = torch.tensor([1e-310, 5e-324, 0.0], dtype=torch.float64)
    assert average_drop(p, torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 0]


def test_numbers_of_numpy_are_numbers(tiny, images, class_idx):
    S, one = torch.rand(5, 1, 24, 32, dtype=torch.float64), np.int64(3)
    mean = torch.full((3,), 0.5)
    expected = insertion(tiny, images, class_idx, S, mean=mean, pixels_per_step=100)[0]
    found = insertion(tiny, images, class_idx, S, mean=mean, pixels_per_step=np.int64(100), batch_size=one)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(road(tiny, images, class_idx, S, batch_size=one), road(tiny, images, class_idx, S))
    with pytest.raises(TypeError, match="fractions: wanted several"):
        road(tiny, images, class_idx, S, fractions=np.array(0.2))
    one_step = insertion(tiny, images, class_idx, S, mean=mean, pixels_per_step=24 * 32)[0]
    assert torch.equal(insertion(tiny, images, class_idx, S, mean=mean, pixels_per_step=10**20)[0], one_step)


def test_imputed_images_keep_their_dtype(images):
    removed = torch.rand(5, 1, 24, 32) < 0.3
    for dtype in (torch.float16, torch.float32):
        assert impute(images.to(dtype), removed, torch.zeros(1, dtype=torch.float64)).dtype == dtype
