import numpy as np
import pandas as pd
import pytest
import references
import torch

from opticam import METHODS, evaluate, score
from opticam.datasets import Sample
from opticam.evaluate import bootstrap_interval, summarize


@pytest.fixture
def samples(images, class_idx):
    return [
        Sample(f"{i}.png", image, int(label), torch.zeros(0, 4))
        for i, (image, label) in enumerate(zip(images, class_idx, strict=True))
    ]


def test_score_by_hand(tiny, images, class_idx):
    saliency = torch.rand(5, 1, 24, 32, dtype=torch.float64)
    table = score(tiny, images, class_idx, saliency)
    for b in range(5):
        c = int(class_idx[b])
        y, z = (tiny(x[b : b + 1])[0].detach().numpy() for x in (images, images * saliency))
        p, o = references.softmax(y)[c], references.softmax(z)[c]
        expected = [y[c], z[c], p, o, *(getattr(references, name)(p, o) for name in table.columns[4:])]
        np.testing.assert_allclose(table.loc[b], expected, atol=1e-12)
    assert list(table.columns[4:]) == ["average_drop", "average_gain", "average_increase"]


def test_a_map_of_ones_changes_nothing(tiny, images, class_idx):
    table = score(tiny, images, class_idx, torch.ones(5, 1, 24, 32))
    assert (table[["average_drop", "average_gain", "average_increase"]] == 0).all(axis=None)


def test_score_refuses_wrong_maps_and_classes(tiny, images, class_idx):
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(5, 1, 24, 32\), got \(5, 24, 32\)"):
        score(tiny, images, class_idx, torch.ones(5, 24, 32))
    with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\], got \[0, 255\]"):
        score(tiny, images, class_idx, torch.arange(5 * 768).remainder(256).reshape(5, 1, 24, 32))
    with pytest.raises(TypeError, match="saliency: wanted a tensor"):
        score(tiny, images, class_idx, np.ones((5, 1, 24, 32)))
    with pytest.raises(ValueError, match="batch_size: wanted at least 1"):
        evaluate(tiny, [], {}, batch_size=0)
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0\.\.4, got 7"):
        score(tiny, images, class_idx + 3, torch.ones(5, 1, 24, 32))


def test_evaluate_does_not_depend_on_the_batch(tiny, samples):
    tiny.layer = "features"
    methods = {name: METHODS[name] for name in ("fake_cam", "grad_cam")}
    tables = [evaluate(tiny, samples, methods, batch_size=size) for size in (1, 2, 5)]
    order = ["image", "method"]
    for table in tables:
        assert len(table) == 10
        assert not table.duplicated(order).any()
        pd.testing.assert_frame_equal(
            table.sort_values(order, ignore_index=True), tables[0].sort_values(order, ignore_index=True)
        )


def test_constant_maps_are_counted_as_degenerate(tiny, samples):
    rows = evaluate(tiny, samples, {"ones": lambda model, images, class_idx: torch.ones(len(images), 1, 24, 32)})
    assert (rows["status"] == "degenerate").all()


def test_bootstrap_interval_is_the_percentile_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert (low, high) == bootstrap_interval(values)  # seeded
    assert bootstrap_interval(np.array([2.0])) == (2, 2)
    assert bootstrap_interval(np.zeros(9)) == (0, 0)
    with pytest.raises(ValueError, match="wanted at least one image"):
        bootstrap_interval(np.array([]))


def test_bootstrap_of_several_arrays_keeps_them_paired():
    a = np.random.default_rng(1).normal(0, 100, 50)
    low, high = bootstrap_interval(a, a - 1, statistic=lambda x, y, axis: x.mean(axis) - y.mean(axis))
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_summarize():
    rows = pd.DataFrame({"method": ["b", "b", "a", "a"], "average_gain": [0.1, 0.3, 1.0, 1.0]})
    summary = summarize(rows, {"average_gain": 100})
    assert list(summary.index) == ["b", "a"]
    assert summary.loc["b"].tolist() == pytest.approx([20, 10, 30])
    assert summary.loc["a"].tolist() == [100, 100, 100]
