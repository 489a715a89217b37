"""What is added from outside, by one record, is seen in every table, figure and choice."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from opticam import METHODS, METRICS, SCHEDULES, Classifier, evaluate, find_method, opti_cam
from opticam.lab.datasets import DATASETS, demo, load_dataset
from opticam.lab.plotting import condition_panels, interval_table, metric_bars, metric_scatter, metric_values
from opticam.lab.results import read_evidence
from opticam.lab.summary import summarize
from opticam.methods import GRAD_CAMS, Method, light_methods, method_label
from opticam.metrics import COLUMNS, Metric, factors, headings, insertion
from opticam.saliency import BASELINES, apply_mask

mpl.use("agg")


@pytest.fixture
def half(monkeypatch):
    """A method that says one half everywhere."""

    def function(model, images, class_idx, *, layer=None):
        return torch.full_like(images[:, :1], 0.5)

    monkeypatch.setitem(METHODS, "half", Method(function, "One half", "#123456"))


@pytest.fixture
def samples():
    return [demo(48, 48)[i]._replace(label=i) for i in range(3)]


def test_a_method(half, tiny, samples):
    assert light_methods()[-1] == "half"
    rows = evaluate(tiny.float(), samples, {name: find_method(name) for name in ("fake_cam", "half")})
    summary = summarize(rows, factors(METRICS))
    assert list(interval_table(summary, headings(METRICS)).index) == ["Fake-CAM", "One half"]
    bars = metric_bars(summary, headings(METRICS, unit=False), 3).axes[0].patches
    assert mpl.colors.to_hex(bars[1].get_facecolor()) == "#123456"
    lines = metric_scatter(summary, "average_drop", "average_gain", headings(METRICS)).axes[0].lines
    assert "One half" in [line.get_label() for line in lines]
    assert method_label("half") == "One half"


@pytest.mark.slow
def test_a_method_is_a_choice_of_the_explorer(half):
    pytest.importorskip("ipywidgets", reason="no ipywidgets; they come with the extra 'lab'")
    from opticam.lab.explorer import Explorer

    page = Explorer(photo=17, num_steps=2, compared=["half"])
    assert ("One half", "half") in page.method_choice.options
    page.compare()
    assert page.grid.children[0].children[0].value.startswith("One half: ")


def test_a_method_by_its_schedule(monkeypatch, tiny, images, class_idx):
    monkeypatch.setitem(SCHEDULES, "short", SCHEDULES["fast"] | {"num_steps": 2})
    found = find_method("opti_cam:short")(tiny, images, class_idx, layer="features")
    assert torch.equal(found, opti_cam(tiny, images, class_idx, layer="features", **SCHEDULES["short"]).saliency)
    assert method_label("opti_cam:short") == "Opti-CAM, short"
    for name in ("opti_cam:slow", "grad_cam:short"):
        assert method_label(name) == name
        with pytest.raises(ValueError, match=f"method: wanted one of .*opti_cam:NAME.*, got '{name}'"):
            find_method(name)
    assert method_label(("group", "variant")) == ("group", "variant")  # of an index of pairs


def test_a_metric_of_probabilities(monkeypatch, half, tiny, samples):
    monkeypatch.setitem(METRICS, "kept", Metric(lambda p, o: (o / p).clamp(max=1), "kept", higher=True))
    rows = evaluate(tiny.float(), samples, {"half": find_method("half")})
    assert rows["kept"].tolist() == pytest.approx((rows["masked_prob"] / rows["prob"]).clip(upper=1).tolist())
    assert headings(METRICS)["kept"] == "kept % ↑"
    table = interval_table(summarize(rows, factors(METRICS)), headings(METRICS))
    assert table["kept % ↑"].iloc[0].startswith(f"{100 * rows['kept'].mean():.1f} [")
    titles = [ax.get_title() for ax in metric_values(rows, METRICS).axes]
    assert titles == [*headings(METRICS, unit=False).values()]
    assert titles[-1] == "kept ↑"
    many, _ = read_evidence("imagenet_val_300")  # older than the metrics
    assert set(many["method"]).isdisjoint(GRAD_CAMS)  # one map on that network
    odds = many[["prob", "masked_prob"]] / (1 - many[["prob", "masked_prob"]])
    assert many["log_odds"].to_numpy() == pytest.approx(np.log(odds["masked_prob"] / odds["prob"]).to_numpy())
    assert many["gain_minus_drop"].to_numpy() == pytest.approx(many["average_gain"] - many["average_drop"])
    assert many["kept"].tolist() == pytest.approx((many["masked_prob"] / many["prob"]).clip(upper=1).tolist())


def test_a_metric_of_the_map_and_a_proportion(monkeypatch, half, tiny, samples):
    record = Metric(lambda saliency: (saliency > 0.4).double().mean((1, 2, 3)), "large", False, 1, True, ("saliency",))
    monkeypatch.setitem(COLUMNS, "large", record)
    network = Classifier(tiny.float(), "tiny", "features", class_names=list("abcde"))
    scores = ["large", "complexity", "insertion"]
    rows = evaluate(network, samples, {"half": find_method("half")}, scores=scores)
    images, saliency = torch.stack([sample.image for sample in samples]), torch.full((3, 1, 48, 48), 0.5)
    assert rows["insertion"].tolist() == pytest.approx(
        insertion(network, images, torch.arange(3), saliency)[0].tolist()
    )
    assert rows["large"].tolist() == [1, 1, 1]
    assert rows["complexity"].tolist() == [0.5, 0.5, 0.5]
    summary = summarize(rows, factors(["large"]))
    assert summary.loc["half", "large_low"] == pytest.approx(0.025 ** (1 / 3))  # Clopper-Pearson of 3 in 3
    assert list(interval_table(summary, headings(["large"])).columns) == ["large ↓"]
    with pytest.raises(ValueError, match=r"scores: wanted some of curves, .*large.*, got 'official_metric'"):
        evaluate(tiny, samples, {"half": find_method("half")}, scores=["official_metric"])


def test_a_baseline(monkeypatch, images):
    monkeypatch.setitem(BASELINES, "white", torch.ones_like)
    masked = {
        name: apply_mask(images, torch.zeros(5, 1, 24, 32), color and color(images))
        for name, color in BASELINES.items()
    }
    assert (masked["white"] == 1).all()
    summary = pd.DataFrame({"ag": [1.0], "ag_low": [0.0], "ag_high": [2.0]}, index=pd.Index(["half"], name="method"))
    panels = {name: {"one": summary} for name in BASELINES}
    assert [ax.get_title() for ax in condition_panels(panels, "ag", "AG %").axes] == [*BASELINES]


def test_a_data_set(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda root, **options: demo(**options))
    assert len(load_dataset("mine", limit=4)) == 4
    with pytest.raises(ValueError, match=r"dataset: wanted one of .*mine, got 'yours'"):
        load_dataset("yours")
