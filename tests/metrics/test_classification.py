import math

import pytest
import references
import torch

from opticam.metrics import METRICS, average_drop, average_gain, average_increase, class_probability


def pairs():
    generator = torch.Generator().manual_seed(0)
    p, o = torch.rand(2, 200, dtype=torch.float64, generator=generator)
    o[:20] = p[:20]  # ties
    return p, o


@pytest.mark.parametrize("name", METRICS)
def test_equals_the_formula_written_out(name):
    p, o = pairs()
    expected = [getattr(references, name)(a, b) for a, b in zip(p.tolist(), o.tolist(), strict=True)]
    torch.testing.assert_close(METRICS[name](p, o), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_worked_example():
    p, o = torch.tensor([0.5, 0.8, 0.25]), torch.tensor([0.25, 0.9, 0.25])
    assert average_drop(p, o).tolist() == [0.5, 0.0, 0.0]  # (0.5 - 0.25)/0.5
    assert average_increase(p, o).tolist() == [0, 1, 0]  # strict: the third stays
    assert average_gain(p, o).tolist() == pytest.approx([0, 0.5, 0], abs=1e-6)  # (0.9 - 0.8)/(1 - 0.8)


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
    # two classes, logits 40 and 0: 1 - p = 1/(1 + e^40); in float32 p would be exactly 1
    logits = torch.tensor([[20.0, 0.0]])
    p = class_probability(logits, torch.tensor([0]))
    assert p.dtype == torch.float64
    assert (1 - p).item() == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_nan_stays_nan(name):
    p, o = torch.tensor([math.nan, 0.5, math.nan]), torch.tensor([0.5, math.nan, math.nan])
    assert METRICS[name](p, o).isnan().all()


@pytest.mark.parametrize("name", METRICS)
def test_bad_input(name):
    with pytest.raises(ValueError, match=r"masked_probs: wanted the shape of probs, \(2,\), got \(3,\)"):
        METRICS[name](torch.rand(2), torch.rand(3))
    with pytest.raises(ValueError, match="probs: wanted probabilities"):
        METRICS[name](torch.tensor([50.0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="masked_probs: wanted probabilities"):
        METRICS[name](torch.tensor([0.5]), torch.tensor([-0.5]))
