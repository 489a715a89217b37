import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import references
import torch
from scipy import stats

from opticam.lab.summary import (
    box_accuracies,
    clear_after_holm,
    difference,
    difference_over_groups,
    estimate,
    estimate_and_p,
    estimate_of,
    holm,
    interval,
    paired,
    paper_tables,
    print_differences,
    proportion_interval,
    ratio_of_means,
    spearman,
    summarize,
    summarize_differences,
    summarize_groups,
)
from opticam.metrics import max_box_accuracy


@pytest.mark.slow
def test_interval_of_many_images_is_bca():
    values = np.random.default_rng(1).exponential(3, 400)
    low, high = interval(values)
    expected = stats.bootstrap((values,), np.mean, n_resamples=99_999, rng=np.random.default_rng(7)).confidence_interval
    error = values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * error)
    assert high - values.mean() > 1.03 * (values.mean() - low)  # skewed, as the values are; percentile: 1.01
    assert (low, high) == interval(values)  # seeded


def test_no_p_value_is_above_1():
    assert estimate_and_p(np.ones(3), num_resamples=1)[1] == 1


def test_interval_of_few_images_is_t():
    """1, 2, 6: mean 3, standard deviation sqrt(7), error sqrt(7/3); t with 2 degrees of freedom is 4.303 at 97.5 %."""
    half = 4.302653 * math.sqrt(7 / 3)
    assert interval(np.array([1.0, 2, 6])) == pytest.approx((3 - half, 3 + half))
    ratio = interval(np.array([1.0, 2, 6]), np.ones(3), statistic=ratio_of_means)
    assert ratio == pytest.approx((3 - half, 3 + half))  # the jackknife's error of a mean is the usual one
    assert all(map(math.isnan, interval(np.array([2.0]))))
    assert interval(np.zeros(9)) == interval(np.zeros(90)) == (0, 0)
    assert interval(np.full(90, 1 / 3)) == pytest.approx((1 / 3, 1 / 3))  # BCa is undefined
    with pytest.raises(ValueError, match="wanted at least one image"):
        interval(np.array([]))


def test_interval_of_very_many_images_is_t_without_resampling(monkeypatch):
    values = np.random.default_rng(1).normal(3, 2, 3000)
    monkeypatch.setattr(stats, "bootstrap", None)
    half = stats.t.ppf(0.975, 2999) * values.std(ddof=1) / math.sqrt(3000)
    assert interval(values) == pytest.approx((values.mean() - half, values.mean() + half))


def test_interval_of_images_and_repeats():
    """Rows are images: 0 and 4 by the mean, variance 8, 8/2 = 4; repeats: 1 and 3, variance 2, 2/2 = 1. Error sqrt 5.

    Degrees of freedom 5^2 / (4^2 / 1 + 1^2 / 1) = 25/17.
    """
    values = np.array([[-1.0, 1], [3, 5]])
    half = math.sqrt(5) * stats.t.ppf(0.975, 25 / 17)
    assert interval(values) == pytest.approx((2 - half, 2 + half))
    column = np.array([[1.0], [2], [6]])
    assert interval(column) == pytest.approx(interval(column[:, 0]))
    with pytest.raises(ValueError, match="statistic: wanted the mean"):
        interval(values, statistic=np.median)


def test_repeats_widen_the_interval_by_what_they_share():
    rng = np.random.default_rng(3)
    images = rng.normal(0, 0.1, (50, 1)) + rng.normal(0, 0.01, (50, 5))
    shared = images + np.array([-1.0, 0.5, 0, 1, -0.5])  # of a seed, for all images
    low, high = interval(shared)
    assert high - low > 10 * np.subtract(*interval(images)[::-1])


@pytest.mark.slow
def test_interval_of_many_images_takes_them_in_parts():
    shapes = []

    def mean(values, axis):
        shapes.append(np.shape(values))
        return np.mean(values, axis)

    interval(np.random.default_rng(1).normal(0, 1, 5000), statistic=mean, num_resamples=1000)
    assert max(map(math.prod, shapes)) <= 2_000_000


def test_interval_of_several_arrays_keeps_them_paired():
    a = np.random.default_rng(1).normal(0, 100, 50)
    low, high = interval(a, a - 1, statistic=lambda x, y, axis: x.mean(axis) - y.mean(axis))
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def p_value(*values, **options):
    return estimate_and_p(*values, **options)[1]


def test_what_is_tested_is_the_estimate():
    a, b = np.random.default_rng(4).normal(1, 1, (2, 30))
    assert estimate_and_p(a)[0] == estimate(a)
    assert estimate_and_p(a, b, statistic=spearman)[0] == estimate(a, b, statistic=spearman)
    repeats = np.stack([a, b], 1)
    assert estimate_and_p(repeats)[0] == estimate(repeats)


def test_p_of_few_images_is_that_of_t():
    values = np.random.default_rng(4).normal(1, 1, 12)
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.01)
    repeats = values[:, None] + np.array([0.5, -0.5, 0, 0.1])
    assert p_value(repeats) < 0.05 < p_value(repeats - repeats.mean() + 0.01)
    assert p_value(values - values.mean()) == pytest.approx(1, rel=0.01)
    assert p_value(np.zeros(9)) == 1
    assert p_value(np.arange(100) + 1e3) == pytest.approx(2e-4, rel=0.02)
    assert math.isnan(p_value(np.array([2.0])))


@pytest.mark.slow
def test_p_of_many_images_is_efrons_formula_solved_for_it():
    """The interval ends at 0 where (z0 + z) / (1 - a (z0 + z)) = w - z0, w being that of the resamples below 0."""
    values = np.random.default_rng(5).exponential(3, 60) - 2.0
    mean, normal = values.mean(), NormalDist()
    means = np.random.default_rng(8).choice(values, (200_000, 60)).mean(1)
    z0, w = (normal.inv_cdf(share) for share in ((means < mean).mean(), (means < 0).mean()))
    a = ((values - mean) ** 3).sum() / (6 * ((values - mean) ** 2).sum() ** 1.5)
    z = (w - z0) / (1 + a * (w - z0)) - z0
    expected = 2 * min(normal.cdf(z), normal.cdf(-z))
    assert 0.01 < expected < 0.2
    assert p_value(values) == pytest.approx(expected, rel=0.1)
    assert p_value(values) != pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.2)


@pytest.mark.parametrize("statistic", [np.mean, spearman])
def test_the_interval_of_confidence_1_minus_p_ends_at_0(statistic):
    rng = np.random.default_rng(6)
    a = rng.exponential(3, 40)
    values = (a - 2,) if statistic is np.mean else (a, a + rng.normal(0, 20, 40))
    p = p_value(*values, statistic=statistic)
    assert 0.01 < p < 0.5
    settings = {"n_resamples": 10_000, "paired": True, "vectorized": True, "rng": np.random.default_rng(0)}
    ends = stats.bootstrap(values, statistic, confidence_level=1 - p, **settings).confidence_interval
    assert min(map(abs, ends)) < 1e-6


def test_values_that_are_all_the_same_have_no_spread_by_rounding():
    same = np.full(30, 100 * 0.037)
    found, p = estimate_and_p(same)
    assert found.low == found.value == found.high
    assert p == 2 / 10_000
    assert interval(np.full((30, 3), 0.1))[0] == pytest.approx(0.1)


def test_p_is_at_most_1_and_of_t_may_be_small():
    values = np.random.default_rng(4).normal(0, 1, 30)
    assert 0 <= p_value(values, num_resamples=1) <= 1
    assert p_value(np.arange(10) + 100.0) == pytest.approx(stats.ttest_1samp(np.arange(10) + 100.0, 0).pvalue)


def test_the_order_of_the_rows_does_not_matter():
    hits = np.random.default_rng(3).random((40, 4, 6)) < 0.6
    rows = box_rows(hits).assign(image=[f"{number:02}" for number in range(40)])
    rows["value"] = np.random.default_rng(5).exponential(3, 40)
    mixed = rows.sample(frac=1, random_state=0)
    assert summarize(mixed, {"value": 1}).equals(summarize(rows, {"value": 1}))
    assert box_accuracies(mixed).equals(box_accuracies(rows))


def test_p_where_resamples_are_exactly_0():
    """If one of 50 images differs, more than a third of the resamples are 0: the 95 % interval ends there."""
    few = np.zeros(50)
    few[3] = -1
    assert interval(few)[1] == 0
    assert p_value(few) == pytest.approx(p_value(-few))
    assert 0.3 < p_value(few) < 1
    most = np.where(np.arange(50) < 12, 1.0, 0.0)
    assert p_value(most) == pytest.approx(2e-4)
    mixed = np.repeat([1.0, 0.0, -1.0], [9, 38, 3])
    assert interval(mixed)[0] <= 0
    assert 0.05 < p_value(mixed) < 0.2


@pytest.mark.slow
def test_the_interval_excludes_0_where_p_is_small():
    noise = np.random.default_rng(6).normal(0, 1, (40, 25))
    for values in noise + 0.4:
        low, high = interval(values, num_resamples=999)
        p = p_value(values, num_resamples=999)
        assert (low > 0 or high < 0) == (p < 0.05) or p == pytest.approx(0.05, rel=0.02)


def test_holm_is_the_procedure_step_by_step():
    rng = np.random.default_rng(0)
    for _ in range(50):
        given = (rng.random(rng.integers(1, 12)) ** 3).round(2).tolist()  # with ties
        for level in (0.01, 0.05, 0.3):
            assert (holm(given) <= level + 1e-12).tolist() == references.holm(given, level + 1e-12)
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    np.testing.assert_array_equal(holm([np.nan, 0.6, 0.7]), [np.nan, 1, 1])
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match=r"p_values: wanted numbers in \[0,1\], got \[2.0\]"):
        holm([2])


def test_proportion_interval_is_that_of_clopper_and_pearson():
    """20 of 20: the lower end p has p^20 = 0.025; 0 of 20: the mirror image."""
    low, high = proportion_interval(np.ones(20))
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1)
    assert proportion_interval(np.zeros(20)) == (0, pytest.approx(1 - low))
    low, _ = proportion_interval(np.arange(10) < 4)
    assert stats.binom.sf(3, 10, low) == pytest.approx(0.025)  # of 4 hits or more
    for wrong in ([], [0.5], [1, 2]):
        with pytest.raises(ValueError, match="hits: wanted zeros and ones"):
            proportion_interval(np.array(wrong))


def test_summarize():
    rows = pd.DataFrame({"method": ["b", "b", "a", "a"], "masked_logit": [0.1, 0.3, 1.0, 1.0]})
    summary = summarize(rows, {"masked_logit": 100})
    assert list(summary.index) == ["b", "a"]
    half = 12.706205 * 10  # t with one degree of freedom, standard error 0.1
    assert summary.loc["b"].tolist() == pytest.approx([20, 20 - half, 20 + half])
    assert summary.loc["a"].tolist() == [100, 100, 100]


def test_summarize_gives_proportions_their_own_interval():
    rows = pd.DataFrame({"method": "a", "image": range(20), "average_increase": 1.0, "average_gain": 1.0})
    summary = summarize(rows, {"average_increase": 100, "average_gain": 100}).loc["a"]
    assert summary.tolist() == pytest.approx([100, 100 * 0.025 ** (1 / 20), 100, 100, 100, 100])
    other = rows.assign(method="b", average_increase=0.0)
    differences = summarize_differences(pd.concat([rows, other]), {"average_increase": 100}, "b")
    assert differences.loc["a"].tolist()[:3] == [100, 100, 100]  # of which no proportion is asked


def test_intervals_end_where_the_values_of_the_metric_end(capsys):
    values = {
        "average_gain": [0.9, 1.0, 1.0, 0.2],
        "gain_minus_drop": [-1.0, -0.9, -1.0, 0.5],
        "log_odds": [9, 1, 9, 9],
    }
    parts = [pd.DataFrame(values).assign(method="a"), pd.DataFrame(dict.fromkeys(values, [0.0] * 4)).assign(method="b")]
    rows = pd.concat([part.assign(image=list("wxyz")) for part in parts])
    by_t = {name: interval(np.array(column, float)) for name, column in values.items()}
    assert by_t["average_gain"][1] > 1
    assert by_t["gain_minus_drop"][0] < -1
    summary, apart = summarize(rows, list(values)).loc["a"], summarize_differences(rows, list(values), "b").loc["a"]
    assert summary["average_gain_high"] == 100
    assert summary["average_gain_low"] == pytest.approx(100 * by_t["average_gain"][0])
    assert summary["gain_minus_drop_low"] == -100
    assert summary[["log_odds_low", "log_odds_high"]].tolist() == pytest.approx(list(by_t["log_odds"]))
    assert apart["average_gain_high"] == difference(rows, "average_gain", "a", "b").high == 100
    assert apart["gain_minus_drop_low"] == pytest.approx(100 * by_t["gain_minus_drop"][0])  # these may be -200
    print_differences(rows, ["average_gain"], "a", "b")
    assert ", 100.0]; higher on 4 of 4" in capsys.readouterr().out


def test_summarize_takes_repeats():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [(i, seed, m, rng.normal()) for i in range(6) for seed in range(3) for m in "ab"],
        columns=["image", "seed", "method", "value"],
    )
    wide = {m: g.pivot(index="image", columns="seed", values="value").to_numpy() for m, g in rows.groupby("method")}
    shuffled = rows.sample(frac=1, random_state=1)
    summary = summarize(shuffled, {"value": 10}, repeats="seed")
    assert summary.loc["b"].tolist() == pytest.approx([10 * x for x in (wide["b"].mean(), *interval(wide["b"]))])
    found = summarize_differences(shuffled, {"value": 1}, "a", repeats="seed")
    expected = wide["b"] - wide["a"]
    assert found.loc["b"].tolist() == pytest.approx([expected.mean(), *interval(expected), p_value(expected)])


def test_summarize_counts_only_what_is_defined():
    rows = pd.DataFrame(
        {
            "method": ["a"] * 4 + ["b"],
            "status": ["ok", "degenerate", "ok", "skipped", "ok"],
            "saliency_metric": [0.2, 0.4, np.nan, 0.9, np.nan],
        }
    )
    summary = summarize(rows, {"saliency_metric": 10})
    assert summary.loc["a"].tolist() == pytest.approx([3, 3 - 12.706205, 3 + 12.706205])  # of 2 and 4
    assert summary.loc["b"].isna().all()


def test_summarize_differences_pairs_by_image():
    """b - a by hand: i 0.3 - 0.1, ii 0.5 - 0.4; iii has no b. c has one value, so no interval."""
    rows = pd.DataFrame(
        [("i", "a", 0.1), ("ii", "a", 0.4), ("iii", "a", 9.0), ("ii", "b", 0.5), ("i", "b", 0.3), ("i", "c", 0.1)],
        columns=["image", "method", "average_gain"],
    )
    found = summarize_differences(rows, {"average_gain": 100}, "a")
    assert list(found.index) == ["b", "c"]
    half = 12.706205 * 5
    p = stats.ttest_1samp([0.2, 0.1], 0).pvalue
    assert found.loc["b"].tolist() == pytest.approx([15, 15 - half, 15 + half, p], rel=0.01)
    assert found.loc["c"].tolist() == pytest.approx([0, np.nan, np.nan, np.nan], nan_ok=True)
    assert summarize_differences(rows, {"average_gain": 100}, "b").loc["a"].tolist() == pytest.approx(
        [-15, -15 - half, -15 + half, p], rel=0.01
    )
    with pytest.raises(ValueError, match="reference: wanted one of a, b, c, got 'd'"):
        summarize_differences(rows, {"average_gain": 100}, "d")
    with pytest.raises(ValueError, match="rows: wanted one row per image and method, got more of i, a"):
        summarize_differences(pd.concat([rows, rows]), {"average_gain": 100}, "a")


def test_names_alone_take_the_factors_of_their_records():
    rows = pd.DataFrame({"image": [0, 1] * 2, "method": ["a", "a", "b", "b"], "average_gain": [0.1, 0.3, 0.2, 0.6]})
    rows["masked_logit"] = rows["own"] = 10 * rows.average_gain
    summary = summarize(rows, ["average_gain", "masked_logit", "own"])
    assert summary.loc["a", ["average_gain", "masked_logit", "own"]].tolist() == pytest.approx([20, 2, 2])
    found = summarize_differences(rows, ["average_gain", "own"], "a")
    assert found.loc["b", ["average_gain", "own"]].tolist() == pytest.approx([20, 2])


def test_differences_by_hand(capsys):
    """b - a of the fractions: i 0.3 - 0.1, ii 0.5 - 0.4, so 20 and 10 points; iii has no b. Of the logits -2 and 1."""
    rows = pd.DataFrame(
        [("i", "a", 0.1, 5), ("ii", "a", 0.4, 1), ("iii", "a", 0.9, 0), ("ii", "b", 0.5, 2), ("i", "b", 0.3, 3)],
        columns=["image", "method", "average_gain", "masked_logit"],
    )
    half = 12.706205 * 5  # t with one degree of freedom
    assert list(difference(rows, "average_gain", "b", "a")) == pytest.approx([15, 15 - half, 15 + half])
    assert list(difference(rows, "masked_logit", "b", "a")) == pytest.approx(
        [-0.5, -0.5 - 0.3 * half, -0.5 + 0.3 * half]
    )
    more = pd.concat([rows.replace({"method": {"a": "grad_cam", "b": "opti_cam"}}), rows[rows.method == "a"]])
    assert print_differences(more, ["average_gain", "masked_logit"], "opti_cam", "grad_cam", "a") is None
    assert capsys.readouterr().out.splitlines() == [
        *(f"AG % ↑: Opti-CAM minus {name} 15.0 [-48.5, 78.5]; higher on 2 of 2; p 0.82" for name in ("Grad-CAM", "a")),
        *(
            f"masked logit ↑: Opti-CAM minus {name} -0.5 [-19.6, 18.6]; higher on 1 of 2; p 1"
            for name in ("Grad-CAM", "a")
        ),
    ]  # by t 0.205 and 0.795; of four, the smallest times four


def test_summarize_differences_is_the_bootstrap_of_the_differences():
    a, b = np.random.default_rng(2).normal(0, 5, (2, 30))
    rows = pd.DataFrame({"image": [*range(30)] * 2, "method": ["a"] * 30 + ["b"] * 30, "value": [*a, *b]})
    shuffled = rows.iloc[np.r_[0, np.random.default_rng(3).permutation(np.arange(1, 60))]]
    expected = [(b - a).mean(), *interval(b - a), p_value(b - a)]
    assert summarize_differences(shuffled, {"value": 1}, "a").loc["b"].tolist() == pytest.approx(expected)


def test_ratio_of_means_by_hand():
    a, b = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[4.0, 2.0], [0.0, 0.0]])
    assert ratio_of_means(a, b).tolist() == [0.5, 0.0]  # 1.5/3; nothing to keep
    assert ratio_of_means(a, b, axis=0).tolist() == [1.0, 1.5]  # 2/2, 1.5/1
    assert interval(a[0], 2 * a[0], statistic=ratio_of_means) == (0.5, 0.5)


def test_spearman_is_scipys_for_every_row():
    a, b = np.random.default_rng(0).integers(0, 9, (2, 4, 30)).astype(float)  # with ties
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-14)
    assert spearman(np.zeros(5), np.arange(5)) == 0
    low, high = interval(a[0], a[0] ** 3, statistic=spearman)
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
    found = box_accuracies(rows).loc["m"]
    assert found[["max_box_acc", "max_box_acc_v2"]].tolist() == pytest.approx([50, 100 * (1 + 1 + 1 / 2) / 3])
    with pytest.raises(ValueError, match="wanted at least one image with a box"):
        box_accuracies(rows[2:])


def box_rows(hits):
    return pd.DataFrame({"method": "m", "pointing_game": 1.0, "box_hits": [np.packbits(hit).tobytes() for hit in hits]})


def test_each_resample_of_box_accuracies_chooses_its_own_threshold():
    hits = np.random.default_rng(3).random((40, 4, 6)) < 0.6
    found = box_accuracies(box_rows(hits)).loc["m"]
    value, v2 = max_box_accuracy(torch.from_numpy(hits.sum(0)), 40)

    def best(images, axis):  # of lists of images, one by one
        lists = images.reshape(-1, images.shape[-1])
        return np.array([hits[some.astype(int), 0].mean(0).max() for some in lists]).reshape(images.shape[:-1])

    expected = interval(np.arange(40), statistic=best)
    assert found[["max_box_acc", "max_box_acc_low", "max_box_acc_high"]].tolist() == pytest.approx(
        [100 * number for number in (value, *expected)]
    )
    assert found.max_box_acc_v2 == pytest.approx(100 * v2)
    assert found.max_box_acc_v2_low < found.max_box_acc_v2 < found.max_box_acc_v2_high
    fixed = interval(hits[:, 0, hits[:, 0].sum(0).argmax()].astype(float))
    assert expected != pytest.approx(fixed)


def test_the_interval_of_a_few_box_accuracies_ends_at_100():
    hits = np.ones((4, 4, 2), bool)
    hits[0] = False
    found = box_accuracies(box_rows(hits)).loc["m"]
    assert found.max_box_acc == 75
    assert found.max_box_acc_low < 40
    assert found.max_box_acc_high == found.max_box_acc_v2_high == 100


def test_box_accuracies_of_very_many_images_take_the_best_threshold_of_all():
    hits = np.random.default_rng(3).random((2500, 4, 2)) < [0.4, 0.7]
    found = box_accuracies(box_rows(hits)).loc["m"]
    low, high = interval(hits[:, 0, 1].astype(float))
    assert (found.max_box_acc_low, found.max_box_acc_high) == pytest.approx((100 * low, 100 * high))
    assert found.max_box_acc == pytest.approx(100 * hits[:, 0, 1].mean())


def test_differences_of_box_accuracies_are_of_the_same_images():
    """Where one method is right wherever the other is, and on others too, the difference is clear."""
    hits = np.random.default_rng(3).random((40, 4, 6)) < 0.6
    more = hits | (np.arange(40)[:, None, None] % 3 == 0)
    rows = pd.concat([box_rows(some).assign(method=name) for name, some in zip("ab", (hits, more), strict=True)])
    rows["image"] = [f"{number:02}" for number in range(40)] * 2
    apart, alone = box_accuracies(rows[::-1], "a").loc["b"], box_accuracies(rows)

    def best(images, axis):
        lists = images.reshape(-1, images.shape[-1])
        gained = [more[some, 0].sum(0).max() - hits[some, 0].sum(0).max() for some in lists.astype(int)]
        return np.array(gained).reshape(images.shape[:-1]) / images.shape[-1]

    assert apart.max_box_acc == pytest.approx(alone.max_box_acc["b"] - alone.max_box_acc["a"])
    expected = interval(np.arange(40), statistic=best)
    assert (apart.max_box_acc_low, apart.max_box_acc_high) == pytest.approx([100 * end for end in expected])
    assert apart.max_box_acc_high - apart.max_box_acc_low < alone.max_box_acc_high["b"] - alone.max_box_acc_low["a"]
    assert apart.max_box_acc_p < 0.05
    many = pd.concat([rows.assign(image=rows.image + str(copy)) for copy in range(51)])
    assert box_accuracies(many, "a").loc["b"].max_box_acc == pytest.approx(apart.max_box_acc)
    with pytest.raises(ValueError, match="rows: b has boxes for other images than a"):
        box_accuracies(rows[:-1], "a")
    with pytest.raises(ValueError, match="reference: "):
        box_accuracies(rows, "c")


def test_paper_tables_have_the_papers_order_and_leave_out_what_is_not_there():
    hits = np.zeros((2, 4, 8), bool)
    hits[0, :, 3] = True
    rows = box_rows(hits).assign(method="opti_cam", saliency_metric=[0.5, 1.5], official_metric=[0.0, 1.0])
    rows = rows.assign(localization_error=1.0, soft_f1=0.5, energy_pointing_game=[0.2, 0.4])
    rows = rows.assign(average_increase=1.0, average_gain=[0.5, 0.7], average_drop=0.0, seconds=[2, 4])
    tables = paper_tables(rows)
    assert {title: [*table] for title, table in tables.items()} == {
        "Classification": ["AD % ↓", "AG % ↑", "AI % ↑", "seconds ↓"],
        "Localization": ["OM % ↓", "LE % ↓", "F1 % ↑", "BA % ↑", "SP % ↑", "EP % ↑", "SM ↓"],
    }
    assert tables["Classification"].loc["Opti-CAM"].tolist() == pytest.approx([0, 60, 100, 3])
    assert tables["Localization"].loc["Opti-CAM"].tolist() == pytest.approx([50, 100, 50, 50, 100, 30, 1])
    without = rows.assign(pointing_game=np.nan)[["method", "average_gain", "pointing_game", "box_hits"]]
    assert {title: [*table] for title, table in paper_tables(without).items()} == {"Classification": ["AG % ↑"]}


def test_seconds_of_what_was_skipped_do_not_count_in_the_papers_tables():
    rows = pd.DataFrame({"image": [0, 1], "method": "m", "seconds": [1.0, 9], "status": ["ok", "skipped"]})
    assert paper_tables(rows)["Classification"].loc["m"].tolist() == [1] == [summarize(rows, ["seconds"]).seconds["m"]]


def test_values_that_are_all_the_same_are_tested_by_their_sign():
    assert p_value(np.array([0.76, 0.76])) == 0.5
    assert p_value(np.full(8, -0.5)) == stats.binomtest(8, 8).pvalue
    assert p_value(np.full(30, 0.5)) == 2 / 10_000
    assert np.isnan(estimate_and_p(np.full(30, 0.5), np.full(30, 1.0), statistic=ratio_of_means)[1])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64", "bool", "object"])
def test_differences_of_any_numbers_are_differences(dtype):
    values = [0, 1] if dtype == "bool" else [100, 28]
    rows = pd.DataFrame([(f"i{i}", m, v) for i in range(4) for m, v in zip("ab", values, strict=True)])
    rows = rows.set_axis(["image", "method", "n"], axis=1).astype({"n": dtype})
    assert paired(rows, "n", "b", "a").tolist() == [float(values[1]) - values[0]] * 4
    assert summarize_differences(rows, {"n": 1}, "a").loc["b", "n"] == float(values[1]) - values[0]


def test_box_accuracies_of_images_that_are_all_alike_are_proportions():
    for right, expected in ((1, (100, 100 * 0.025 ** (1 / 4), 100)), (0, (0, 0, 60.24))):
        found = box_accuracies(box_rows(np.full((4, 4, 2), bool(right)))).loc["m"]
        for kind in ("max_box_acc", "max_box_acc_v2"):
            assert tuple(found[[kind, f"{kind}_low", f"{kind}_high"]]) == pytest.approx(expected, abs=0.01)


def test_only_what_has_an_interval_beside_it_has_p_values():
    rows = pd.DataFrame({"image": [0, 1, 2] * 2, "method": ["a"] * 3 + ["b"] * 3, "top_p": [1.0, 2, 3, 7, 8, 9.5]})
    found = summarize_differences(rows, {"top_p": 1}, "a")
    assert clear_after_holm(found).columns.tolist() == ["top_p"]
    assert clear_after_holm(summarize(rows, {"top_p": 1})).columns.tolist() == []


def test_methods_without_a_common_image_are_refused(capsys):
    rows = pd.DataFrame({"image": [0, 1], "method": ["a", "b"], "average_gain": [0.5, 0.25]})
    told = "^rows: a and b have no image in common with a value of average_gain$"
    for call in (
        lambda: difference(rows, "average_gain", "a", "b"),
        lambda: print_differences(rows, ["average_gain"], "a", "b"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_p_of_what_is_not_defined_is_no_test():
    for values in ([0.2, np.nan, 0.4], [*range(30), np.nan]):
        assert np.isnan(p_value(np.array(values)))
    assert np.isnan(p_value(np.array([[0.1, 0.2], [np.nan, 0.5]])))
    np.testing.assert_array_equal(holm([p_value(np.array([1.0, np.nan])), 0.04]), [np.nan, 0.04])


def test_lists_and_columns_of_a_table_are_arrays():
    values = [1.0, 2.0, 6.0]
    expected = interval(np.array(values))
    assert interval(values) == interval(pd.Series(values, index=[5, 6, 7])) == expected
    assert estimate(values) == estimate(np.array(values))
    assert proportion_interval([1, 0, 1]) == proportion_interval(np.array([1, 0, 1]))


def test_numbers_of_any_kind_are_computed_with_as_float64():
    half = np.linspace(60_000, 65_000, 10).astype(np.float16)  # whose sum it does not hold
    assert estimate(half) == estimate(half.astype(float))
    fewer, more = np.uint8([1, 2, 3]), np.uint8([2, 3, 5])
    assert estimate(fewer, more, statistic=lambda x, y, axis: (x - y).mean(axis)).value == pytest.approx(-4 / 3)


def test_what_is_masked_is_no_number():
    masked = np.ma.masked_array([0, 1, 1, 999], [False, False, False, True])
    assert np.isnan(estimate(masked)).all()
    np.testing.assert_array_equal(holm(masked / 25), [0, 0.08, 0.08, np.nan])
    with pytest.raises(ValueError, match=r"^hits: wanted zeros and ones"):
        proportion_interval(masked)


def test_what_is_no_sample_is_refused():
    few, many = np.arange(5.0), np.arange(30.0)
    for call in (interval, estimate, estimate_and_p):
        for values in ((few, few[:3]), (many, many[:20]), (few, np.ones((5, 2))), (few[0],), (np.ones((5, 0)),)):
            with pytest.raises(ValueError, match=r"^values: wanted .*, got shapes? "):
                call(*values, statistic=ratio_of_means)
        for wrong in (["a", "b"], [1, [2, 3]], [1j, 2], "text", None):
            with pytest.raises(ValueError, match=r"^values: wanted "):
                call(wrong)
        with pytest.raises(ValueError, match=r"^statistic: wanted one of 2 arrays, got the mean"):
            call(few, few)
        with pytest.raises(TypeError, match=r"^statistic: wanted a function of arrays, got 'mean'"):
            call(few, statistic="mean")
        for number in (0, -1, 2.5, None):
            with pytest.raises(ValueError, match=r"^num_resamples: wanted "):
                call(few, num_resamples=number)
    for wrong in (np.full((2, 2), 0.1), [[0.1], [0.2]], 0.5, ["a"]):
        with pytest.raises(ValueError, match=r"^p_values: wanted "):
            holm(wrong)
    for wrong in ([[1, 0]], ["1"], 1, None):
        with pytest.raises(ValueError, match=r"^hits: wanted "):
            proportion_interval(wrong)


def seeds_of(images):
    rows = [(image, seed, method, image + seed) for image in range(images) for seed in range(2) for method in "ab"]
    return pd.DataFrame(rows, columns=["image", "seed", "method", "value"])


def test_two_rows_of_one_image_are_refused():
    """Two rows of an image do not count as two images."""
    rows = seeds_of(4)
    calls = (
        lambda **options: summarize(rows, ["value"], **options),
        lambda **options: summarize_differences(rows, ["value"], "a", **options),
        lambda: paired(rows, "value", "a", "b"),
        lambda: difference(rows, "value", "a", "b"),
        lambda: print_differences(rows, ["value"], "a", "b"),
        lambda: paper_tables(rows),
        lambda: box_accuracies(rows.assign(pointing_game=1.0, box_hits=bytes(4))),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^rows: wanted one row per image and method, got more of 0, a$"):
            call()
    rows = pd.concat([rows, rows[-1:]])
    for call in calls[:2]:
        with pytest.raises(ValueError, match=r"^rows: wanted one row per image and method and seed, got more of 3, b$"):
            call(repeats="seed")


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_rows_without_a_method_are_refused(missing):
    rows = seeds_of(3)[lambda table: table.seed == 0].assign(method=["a", missing] * 3, pointing_game=1.0)
    for call in (
        lambda: summarize(rows, ["value"]),
        lambda: summarize_differences(rows, ["value"], "a"),
        lambda: paper_tables(rows),
        lambda: box_accuracies(rows.assign(box_hits=bytes(4))),
    ):
        with pytest.raises(ValueError, match=r"^rows: wanted a method for every row$"):
            call()


def test_images_of_numbers_and_text_are_ordered_by_their_text():
    rows = seeds_of(3)[lambda table: table.seed == 0].assign(pointing_game=1.0, box_hits=bytes(4))
    mixed = rows.assign(image=rows.image.astype(object).replace({1: "b", 2: "a"}))[::-1]
    for call in (
        lambda rows: summarize(rows, ["value"]),
        lambda rows: summarize_differences(rows, {"value": 1}, "a"),
        lambda rows: box_accuracies(rows, "a"),
    ):
        assert call(mixed).sort_index().equals(call(rows))


def test_what_is_missing_among_objects_does_not_count():
    rows = pd.DataFrame({"image": [0, 1, 2] * 2, "method": ["a"] * 3 + ["b"] * 3, "n": [1, pd.NA, 3, 4, 5, 8]})
    assert rows.n.dtype == object
    assert paired(rows, "n", "b", "a").tolist() == [3, 5]
    assert summarize_differences(rows, {"n": 1}, "a").loc["b", "n"] == 4
    assert summarize(rows, {"n": 1}).loc["a", "n"] == 2


def test_an_image_without_all_repeats_is_refused():
    rows = seeds_of(4)
    for call in (summarize, partial(summarize_differences, reference="a")):
        with pytest.raises(ValueError, match=r"^rows: wanted 2 rows of .* one per seed, got 1 of 3, b$"):
            call(rows[:-1], ["value"], repeats="seed")
        undefined = rows.assign(value=rows.value.where(rows.index != rows.index[-1]))
        with pytest.warns(UserWarning, match=r"^repeats: 1 of 4 images lack value in a repeat and do not count$"):
            found = call(undefined, ["value"], repeats="seed")
        assert found.loc["b", "value"] == call(rows[rows.image < 3], ["value"], repeats="seed").loc["b", "value"]
    nowhere = rows.assign(value=rows.value.where(rows.image < 3))
    assert summarize(nowhere, ["value"], repeats="seed").equals(summarize(rows[rows.image < 3], ["value"], "seed"))


def test_tables_without_what_is_asked_are_refused():
    rows = seeds_of(3)[lambda table: table.seed == 0].assign(text="a")
    several = (
        lambda rows, columns: summarize(rows, columns),
        lambda rows, columns: summarize_differences(rows, columns, "a"),
        lambda rows, columns: print_differences(rows, columns, "b", "a"),
    )
    for call in several:
        for columns in ("value", None, 3):
            with pytest.raises(TypeError, match=r"^columns: wanted a list of names, got "):
                call(rows, columns)
        with pytest.raises(ValueError, match=r"^column text: wanted an array of numbers"):
            call(rows, ["text"])
    single = [partial(lambda call, rows, column: call(rows, [column]), call) for call in several]
    single += [lambda rows, column, call=call: call(rows, column, "b", "a") for call in (paired, difference)]
    for call in single:
        for column in ("nix", ["nix"]):
            with pytest.raises(ValueError, match=r"^rows: wanted one column \[?'nix'\]?, got 0 of that name"):
                call(rows, column)
        with pytest.raises(ValueError, match=r"^rows: wanted one column 'method', got 0"):
            call(rows.drop(columns="method"), "value")
        for wrong in (None, [1], rows.to_dict()):
            with pytest.raises(TypeError, match=r"^rows: wanted a table of pandas, got "):
                call(wrong, "value")
    for call in (paired, difference, lambda rows, column, a, b: print_differences(rows, [column], a, b)):
        with pytest.raises(ValueError, match=r"^method: wanted one of a, b, got 'nix'$"):
            call(rows, "value", "nix", "a")
        with pytest.raises(ValueError, match=r"^reference: wanted one of a, b, got \['a'\]$"):
            call(rows, "value", "a", ["a"])
    for repeats, message in (("nix", "rows: wanted one column 'nix'"), ("image", "repeats: wanted a column beside")):
        with pytest.raises(ValueError, match=f"^{message}"):
            summarize(rows, ["value"], repeats=repeats)
        with pytest.raises(ValueError, match=f"^{message}"):
            summarize_differences(rows, ["value"], "a", repeats=repeats)
    with pytest.raises(TypeError, match=r"^columns: wanted a number, got None"):
        summarize(rows, {"value": None})
    with pytest.raises(ValueError, match=r"^reference: wanted one of 1, 2, got 3$"):
        summarize_differences(rows.replace({"method": {"a": 1, "b": 2}}), ["value"], 3)


def test_entries_that_a_table_lacks_are_refused():
    summary = summarize(seeds_of(3)[lambda table: table.seed == 0], ["value"])
    assert estimate_of(summary, "a", "value").value == 1
    with pytest.raises(ValueError, match=r"^method: wanted one of a, b, got 'nix'$"):
        estimate_of(summary, "nix", "value")
    with pytest.raises(ValueError, match=r"^summary: wanted one column 'nix', got 0 of that name$"):
        estimate_of(summary, "a", "nix")
    for call in (lambda table: estimate_of(table, "a", "value"), clear_after_holm):
        with pytest.raises(TypeError, match=r"^(summary|differences): wanted a table of pandas, got None$"):
            call(None)


def test_box_hits_that_are_none_are_refused():
    rows = box_rows(np.ones((2, 4, 8), bool))
    for wrong in ([None, None], [bytes(4), bytes(8)], ["text", "text"]):
        with pytest.raises(ValueError, match=r"^rows: wanted box_hits as bytes, as many for each image, got others$"):
            box_accuracies(rows.assign(box_hits=wrong))
    for column in rows:
        with pytest.raises(ValueError, match=f"^rows: wanted one column '{column}', got 0 of that name$"):
            box_accuracies(rows.drop(columns=column))
    with pytest.raises(TypeError, match=r"^rows: wanted a table of pandas, got None$"):
        box_accuracies(None)


def test_what_hangs_together_is_one_sample():
    rows = pd.DataFrame(
        {"method": "a", "group": np.repeat(range(30), 4), "energy": np.random.default_rng(0).random(120)}
    )
    summary = summarize_groups(rows, ["energy"]).loc["a"]
    means = rows.groupby("group").energy.mean().to_numpy()
    assert summary["energy"] == pytest.approx(means.mean())
    assert (summary["energy_low"], summary["energy_high"]) == pytest.approx(interval(means))
    alike = rows.assign(energy=rows.group % 2)  # within a group all the same: 30 independent values, not 120
    found = summarize_groups(alike, ["energy"]).loc["a"]
    assert found["energy_high"] - found["energy_low"] > 1.8 * np.diff(interval(alike.energy.to_numpy(float)))[0]
    unequal = summarize_groups(rows[1:].assign(method="b"), ["energy"]).loc["b"]
    assert unequal["energy"] == pytest.approx(rows.energy[1:].mean())
    assert summarize_groups(rows.assign(energy=np.nan), ["energy"]).isna().all().all()


def test_groups_of_any_table_are_summarized():
    values = [1, 1, 1, 1, 0.6]
    rows = pd.DataFrame({"method": "a", "group": range(5), "energy_pointing_game": values})
    found = summarize_groups(rows, ["energy_pointing_game"]).loc["a"]
    assert found.energy_pointing_game_high == 100
    again = pd.concat([rows[:3], rows[3:].reset_index(drop=True)])  # an index with the same numbers twice
    again.loc[[0], "energy_pointing_game"] = [np.nan, 1]
    assert summarize_groups(again, ["energy_pointing_game"]).loc["a"].energy_pointing_game == pytest.approx(90)
    whole = pd.concat([rows, rows.assign(method="b")]).assign(n=5, image=[*"vwxyz"] * 2).astype({"n": "uint8"})
    whole.loc[whole.method == "a", "n"] = 3
    assert difference_over_groups(whole, "n", "a", "b").value == -2
    for call, told in (
        (
            lambda: summarize_groups(rows.assign(group=[np.nan, 1, 2, 3, 4]), ["energy_pointing_game"]),
            "a group for every",
        ),
        (lambda: summarize_groups(rows.assign(method=["a", None, "a", "a", "a"], n=1), ["n"]), "a method for every"),
        (lambda: summarize_groups(rows, ["nope"]), "nope"),
        (lambda: summarize_groups(rows.assign(n="x"), ["n"]), "column n: wanted an array of numbers"),
        (lambda: difference_over_groups(whole, "n", "a", "c"), "reference: wanted one of a, b, got 'c'"),
        (lambda: difference_over_groups(whole.drop(columns="image"), "n", "a", "b"), "one column 'image', got 0"),
        (lambda: difference_over_groups(whole.assign(image="v"), "n", "a", "b"), "one row per image and method"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    for wrong in ("energy", None):
        with pytest.raises(TypeError, match="columns: wanted a list of names"):
            summarize_groups(rows, wrong)
