import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from opticam.summary import (
    bootstrap_interval,
    box_accuracies,
    ratio_of_means,
    spearman,
    summarize,
    summarize_differences,
)


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


def test_bootstrap_of_many_images_takes_them_in_parts():
    shapes = []

    def mean(values, axis):
        shapes.append(np.shape(values))
        return np.mean(values, axis)

    bootstrap_interval(np.random.default_rng(1).normal(0, 1, 5000), statistic=mean, num_resamples=1000)
    assert max(map(math.prod, shapes)) <= 2_000_000


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


def test_summarize_counts_only_what_is_defined():
    rows = pd.DataFrame(
        {
            "method": ["a"] * 4 + ["b"],
            "status": ["ok", "degenerate", "ok", "skipped", "ok"],
            "soft_f1": [0.2, 0.4, np.nan, 0.9, np.nan],
        }
    )
    summary = summarize(rows, {"soft_f1": 10})
    assert summary.loc["a"].tolist() == pytest.approx([3, 2, 4])  # of 2 and 4; the interval of two values is both
    assert summary.loc["b"].isna().all()


def test_summarize_differences_pairs_by_image():
    """b - a by hand: i 0.3 - 0.1, ii 0.5 - 0.4; iii has no b. The bootstrap of two values reaches both."""
    rows = pd.DataFrame(
        [("i", "a", 0.1), ("ii", "a", 0.4), ("iii", "a", 9.0), ("ii", "b", 0.5), ("i", "b", 0.3), ("i", "c", 0.1)],
        columns=["image", "method", "average_gain"],
    )
    found = summarize_differences(rows, {"average_gain": 100}, "a")
    assert list(found.index) == ["b", "c"]
    assert found.loc["b"].tolist() == pytest.approx([15, 10, 20])
    assert found.loc["c"].tolist() == pytest.approx([0, 0, 0])
    assert summarize_differences(rows, {"average_gain": 100}, "b").loc["a"].tolist() == pytest.approx([-15, -20, -10])
    with pytest.raises(ValueError, match="reference: wanted one of a, b, c, got 'd'"):
        summarize_differences(rows, {"average_gain": 100}, "d")
    with pytest.raises(ValueError, match="duplicate"):
        summarize_differences(pd.concat([rows, rows]), {"average_gain": 100}, "a")


def test_summarize_differences_is_the_bootstrap_of_the_differences():
    a, b = np.random.default_rng(2).normal(0, 5, (2, 30))
    rows = pd.DataFrame({"image": [*range(30)] * 2, "method": ["a"] * 30 + ["b"] * 30, "value": [*a, *b]})
    shuffled = rows.iloc[np.r_[0, np.random.default_rng(3).permutation(np.arange(1, 60))]]
    expected = [(b - a).mean(), *bootstrap_interval(b - a)]
    assert summarize_differences(shuffled, {"value": 1}, "a").loc["b"].tolist() == pytest.approx(expected)


def test_ratio_of_means_by_hand():
    a, b = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[4.0, 2.0], [0.0, 0.0]])
    assert ratio_of_means(a, b).tolist() == [0.5, 0.0]  # 1.5/3; nothing to keep
    assert ratio_of_means(a, b, axis=0).tolist() == [1.0, 1.5]  # 2/2, 1.5/1
    assert bootstrap_interval(a[0], 2 * a[0], statistic=ratio_of_means) == (0.5, 0.5)


def test_spearman_is_scipys_for_every_row():
    a, b = np.random.default_rng(0).integers(0, 9, (2, 4, 30)).astype(float)  # with ties
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-14)
    assert spearman(np.zeros(5), np.arange(5)) == 0
    low, high = bootstrap_interval(a[0], a[0] ** 3, statistic=spearman)
    assert (low, high) == pytest.approx((1, 1))


def test_box_accuracies_by_hand():
    """Of two images with a box, at the best threshold one is right by the largest contour; V2 takes its own best."""
    hits = np.zeros((3, 4, 1000), bool)
    hits[0, 0, :500] = hits[1, 0, 700:] = True  # never both at once: 1/2
    hits[:2, 1] = True  # IoU 0.3: both, 1
    hits[0, 2, 5] = hits[1, 2, 5] = True  # IoU 0.5: both at one threshold, 1
    hits[0, 3, 5] = True  # IoU 0.7: 1/2
    rows = pd.DataFrame(
        {
            "method": "m",
            "pointing_game": [1.0, 0.0, np.nan],  # the third has no box
            "box_hits": [np.packbits(hit).tobytes() for hit in hits],
        }
    )
    found = box_accuracies(rows)
    assert found.loc["m"].tolist() == pytest.approx([1 / 2, (1 + 1 + 1 / 2) / 3])
    with pytest.raises(ValueError, match="wanted at least one image with a box"):
        box_accuracies(rows[2:])
