import os
import re
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import references
import torch
from conftest import TinyCNN
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm import tqdm

from opticam import METHODS, METRICS, evaluate, lab, load_model, metrics, opti_cam, score, wrap
from opticam.lab import results
from opticam.lab.datasets import Photo, Sample, Skipped, demo
from opticam.lab.evaluation import COLUMN_GROUPS, saliency_maps, score_maps, stored_saliency, stream
from opticam.lab.results import read_shards
from opticam.lab.summary import summarize
from opticam.saliency import BASELINES


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
        expected = [y[c], z[c], p, o, *(getattr(references, name)(p, o) for name in table.columns[4:-1])]
        expected.append(references.log_odds_change(y.tolist(), z.tolist(), c, "softmax"))
        np.testing.assert_allclose(table.loc[b], expected, atol=1e-12)
    assert list(table.columns[4:]) == [*METRICS, "gain_minus_drop", "log_odds"]


def test_names_of_maps_go_by_their_place(tiny, images, class_idx):
    maps = {"a": torch.rand(5, 1, 24, 32, dtype=torch.float64)}
    names = pd.Series(list("vwxyz"), index=[4, 3, 2, 1, 0])
    assert score_maps(tiny, images, class_idx, maps, names).image.tolist() == list("vwxyz")
    with pytest.raises(TypeError, match=r"^names: wanted a list of 5, got 'vwxyz'$"):
        score_maps(tiny, images, class_idx, maps, "vwxyz")
    with pytest.raises(ValueError, match=r"^names: wanted 5, got 2$"):
        score_maps(tiny, images, class_idx, maps, ["v", "w"])


def test_score_over_a_baseline(tiny, images, class_idx):
    saliency = torch.rand(5, 1, 24, 32, dtype=torch.float64)
    color = images.mean((2, 3), keepdim=True)
    expected = score(tiny, images * saliency + color * (1 - saliency), class_idx, torch.ones_like(saliency))
    for baseline in (color, BASELINES["mean"]):
        table = score(tiny, images, class_idx, saliency, baseline=baseline)
        np.testing.assert_allclose(table[["masked_logit", "masked_prob"]], expected[["logit", "prob"]], atol=1e-12)
        assert table.logit.equals(score(tiny, images, class_idx, saliency).logit)


def test_logits_of_a_network_in_training_mode_are_computed_again(tiny, images, class_idx):
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), tiny).train()
    S = torch.rand(5, 1, 24, 32, dtype=torch.float64)
    assert score(network, images, class_idx, S, network(images)).equals(score(tiny, images, class_idx, S))
    assert network.training
    given = score(network.eval(), images, class_idx, S, 0 * tiny(images))
    assert (given.logit == 0).all()


def test_a_network_without_parameters(samples):
    network = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    few = [sample._replace(label=0) for sample in samples[:2]]
    assert (evaluate(network, few, {"gray": partial(METHODS["grad_cam"], layer="0")}).status == "ok").all()


def test_maps_of_several_methods_are_made_in_batches_and_scored_one_by_one(tiny, images, class_idx):
    methods = {name: partial(METHODS[name], layer="features") for name in ("fake_cam", "grad_cam")}
    maps = saliency_maps(tiny, images, class_idx, methods, batch_size=2)
    for name, S in maps.items():
        torch.testing.assert_close(S, methods[name](tiny, images, class_idx))
    rows = score_maps(tiny, images, class_idx, maps, ["a", "b", "c", "d", "e"])
    assert list(rows.method) == ["fake_cam"] * 5 + ["grad_cam"] * 5
    assert list(rows.image) == [*"abcde"] * 2
    alone = score(tiny, images, class_idx, maps["grad_cam"])
    assert rows[5:].reset_index(drop=True)[alone.columns].equals(alone)
    assert list(score_maps(tiny, images, class_idx, maps).image) == [*range(5)] * 2


def test_floors_know_nothing_of_the_photo():
    maps = {"grad_cam": torch.rand(3, 1, 4, 6), "mine": torch.rand(3, 1, 4, 6)}
    found = lab.floors(maps)
    assert list(found) == ["one half everywhere", "Grad-CAM of another photo", "mine of another photo"]
    assert (found["one half everywhere"] == 0.5).all()
    assert found["one half everywhere"].shape == (3, 1, 4, 6)
    for i, j in enumerate((2, 0, 1)):  # the first photo gets the last one's map
        assert torch.equal(found["Grad-CAM of another photo"][i], maps["grad_cam"][j])
    for none in ({}, {"grad_cam": maps["grad_cam"][:1]}):
        with pytest.raises(ValueError, match="saliency: wanted the maps of at least one method, of at least two"):
            lab.floors(none)


def test_maps_of_another_kind(tiny, images, class_idx):
    for call in (lambda: lab.floors([1]), lambda: score_maps(tiny, images, class_idx, images[:, :1])):
        with pytest.raises(TypeError, match=r"^saliency: wanted a dict of maps by the names of methods, got "):
            call()
    with pytest.raises(TypeError, match=r"^saliency: wanted a tensor"):
        lab.floors({"grad_cam": 5})
    with pytest.raises(ValueError, match=r"^saliency: wanted the maps of at least one method$"):
        score_maps(tiny, images, class_idx, {})
    with pytest.raises(TypeError, match=r"^methods: wanted a dict"):
        saliency_maps(tiny, images, class_idx, ["grad_cam"])
    with pytest.raises(TypeError, match=r"^images: wanted a tensor"):
        saliency_maps(tiny, None, class_idx, METHODS)
    for rows in (None, pd.DataFrame({"image": ["a.png"]})):
        with pytest.raises(ValueError, match=r"^rows: wanted a table with the columns image and saliency"):
            stored_saliency(rows, (24, 32))


def test_a_map_of_ones_changes_nothing(tiny, images, class_idx):
    table = score(tiny, images, class_idx, torch.ones(5, 1, 24, 32))
    assert (table[[*METRICS, "gain_minus_drop", "log_odds"]] == 0).all(axis=None)


def test_score_refuses_wrong_maps_and_classes(tiny, images, class_idx):
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(5, 1, 24, 32\), got \(5, 24, 32\)"):
        score(tiny, images, class_idx, torch.ones(5, 24, 32))
    with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\], got \[0, 255\]"):
        score(tiny, images, class_idx, torch.arange(5 * 768).remainder(256).reshape(5, 1, 24, 32))
    with pytest.raises(TypeError, match="saliency: wanted a tensor"):
        score(tiny, images, class_idx, np.ones((5, 1, 24, 32)))
    with pytest.raises(ValueError, match="batch_size: wanted at least 1"):
        evaluate(tiny, [Skipped("a.png", 0, "torn")], {"fake_cam": METHODS["fake_cam"]}, batch_size=0)
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0\.\.4, got 7"):
        score(tiny, images, class_idx + 3, torch.ones(5, 1, 24, 32))


def test_evaluate_does_not_depend_on_the_batch(tiny, samples):
    tiny = wrap(tiny, "features")
    methods = {name: METHODS[name] for name in ("fake_cam", "grad_cam")}
    tables = [evaluate(tiny, samples, methods, batch_size=size) for size in (1, 2, 5)]
    for table in tables:
        assert len(table) == 10
        assert not table.duplicated(["image", "method"]).any()
        pd.testing.assert_frame_equal(table.drop(columns="seconds"), tables[0].drop(columns="seconds"))


def test_constant_maps_are_counted_as_degenerate(tiny, samples):
    rows = evaluate(tiny, samples, {"ones": lambda model, images, class_idx: torch.ones(len(images), 1, 24, 32)})
    assert (rows["status"] == "degenerate").all()


def test_maps_are_kept_where_asked_for(tiny, samples):
    tiny = wrap(tiny, "features")
    method = METHODS["grad_cam"]
    torn = Skipped("torn.png", 2, "torn")
    rows = evaluate(tiny, [*samples, torn], {"grad_cam": method}, scores=["saliency"], batch_size=2)
    wanted = torch.cat([method(tiny, s.image[None], torch.tensor([s.label])) for s in samples])
    assert (stored_saliency(rows[:5], (24, 32)) - wanted).abs().max() <= 1 / 510 + 1e-6
    assert "saliency" not in evaluate(tiny, samples, {"grad_cam": method})
    with pytest.raises(ValueError, match=r"wanted a map of 24x32 for every image; torn\.png has none"):
        stored_saliency(rows, (24, 32))
    with pytest.raises(ValueError, match="wanted a map of 12x12"):
        stored_saliency(rows[:5], (12, 12))


class Numbered(torch.utils.data.Dataset):
    """Samples that know their names, labels and frame, as `Photos` does."""

    input_size, resize, upright, window = 24, 32, True, None

    def __init__(self, samples, paths=None):
        self.samples = samples
        self.names, self.labels = [s.name for s in samples], [s.label for s in samples]
        self.records = [
            Photo(path, s.name, s.label)
            for s, path in zip(samples, paths or [Path(n) for n in self.names], strict=True)
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_a_map_that_is_not_finite_is_a_skipped_row(tiny, samples):
    def half(model, images, class_idx):
        return torch.where(torch.arange(len(images))[:, None, None, None] > 0, images[:, :1], torch.nan)

    rows = evaluate(tiny, samples[:2], {"mine": half})
    assert rows.status.tolist() == ["skipped", "ok"]
    assert rows.reason.tolist() == ["the network's logits or the map are not finite", ""]
    assert rows.layer.tolist() == ["", ""], "a function of one's own does not tell"


def test_a_subset_of_photos_is_photos(tmp_path):
    """Torch's Subset knows neither the classes nor how to skip a photo that cannot be read."""
    photos = demo(64, 64)
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(photos.paths[3].read_bytes()[:999])
    records = [*photos.records[:3], photos.records[3]._replace(path=torn), *photos.records[4:]]
    photos = replace(photos, records=records)
    model, few = wrap(TinyCNN(num_classes=1000), "features"), [3, 5]
    methods = {"fake_cam": METHODS["fake_cam"]}
    rows = evaluate(model, Subset(Subset(photos, range(2, 8)), [1, 3]), methods)
    expected = evaluate(model, replace(photos, records=[records[i] for i in few]), methods)
    assert rows.status.tolist() == ["skipped", "ok"]
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), expected.drop(columns="seconds"))
    other = wrap(TinyCNN(num_classes=1000), "features", class_names=photos.class_names[::-1])
    for work in (evaluate, partial(stream, tmp_path / "rows", parameters={})):
        with pytest.raises(ValueError, match="its classes are in another order"):
            work(model=other, dataset=Subset(photos, few), methods=methods)
        with pytest.raises(TypeError, match="dataset: wanted one data set at a time"):
            work(model=model, dataset=ConcatDataset([photos, photos]), methods=methods)


def test_other_parts_and_sums_of_data_sets_are_read_batch_by_batch(tiny, samples):
    read, explained = [], []

    class Counted(Numbered):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def fake(model, images, class_idx):
        explained.append(1)
        assert len(read) == len(explained)
        return METHODS["fake_cam"](model, images, class_idx)

    for part in (Subset(Counted(samples), [3, 1]), ConcatDataset([Counted(samples)])):
        assert len(evaluate(tiny, part, {"fake": fake}, batch_size=1)) == len(part)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": {"complexity"}}, r"scores: wanted a list of names, got \{'complexity'\}"),
        ({"scores": (name for name in ["complexity"])}, "scores: wanted a list of names, got <generator"),
        ({"methods": {1: METHODS["fake_cam"]}}, "methods: wanted texts as names, got 1"),
    ],
)
def test_what_is_asked_for_has_an_order_and_names(tiny, samples, change, told):
    with pytest.raises(TypeError, match=told):
        evaluate(**{"model": tiny, "dataset": samples, "methods": {"fake": METHODS["fake_cam"]}} | change)


def test_maps_of_ones_own_may_have_a_gradient(tiny, samples):
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    rows = evaluate(tiny, samples, {"mine": lambda model, x, c: scale * x[:, :1]}, scores=["complexity", "adcc"])
    assert (rows.status == "ok").all()
    assert rows.adcc.notna().all()


def test_a_method_that_returns_no_maps_is_named(tiny, images, class_idx):
    wrong = {"mine": partial(opti_cam, layer="features", num_steps=1)}
    with pytest.raises(ValueError, match=r"methods: mine returned OptiCAMResult; wanted a tensor \(5, 1, 24, 32\)"):
        saliency_maps(tiny, images, class_idx, wrong)
    with pytest.raises(TypeError, match=r"^class_idx: wanted"):
        score_maps(tiny, images, 3, {"mine": images[:, :1]})


def test_what_cannot_be_explained_is_a_row_with_its_reason(tiny, samples):
    nan = samples[0]._replace(name="nan.png", image=torch.full_like(samples[0].image, torch.nan))
    strange = samples[1]._replace(name="strange.png", label=5)
    torn = Skipped("torn.png", 2, "image: torn.png is damaged")
    methods = {name: partial(METHODS[name], layer="features") for name in ("grad_cam", "equal_weights")}
    good = evaluate(tiny, samples, methods, batch_size=2)
    rows = evaluate(tiny, [torn, *samples[:2], strange, nan, *samples[2:]], methods, batch_size=8)
    reasons = rows[rows["status"] == "skipped"].groupby("image")["reason"].unique()
    assert reasons.map(list).to_dict() == {
        "torn.png": ["image: torn.png is damaged"],
        "strange.png": ["label: wanted a class in 0..4, got 5"],
        "nan.png": ["image: nan.png has values that are not finite"],
    }
    assert rows["image"].tolist()[:4] == ["torn.png"] * 2 + ["0.png"] * 2  # images in their order, of each all methods
    costs = ["seconds"]
    pd.testing.assert_frame_equal(
        rows[rows["status"] != "skipped"].drop(columns=costs).reset_index(drop=True), good.drop(columns=costs)
    )
    assert rows.loc[rows["status"] == "skipped", ["prob", "average_gain"]].isna().all(axis=None)
    assert rows.loc[rows["image"] == "nan.png", "masked_logit"].isna().all()
    summary = summarize(rows, {"average_gain": 1})
    assert summary.loc["grad_cam", "average_gain"] == pytest.approx(
        good[good["method"] == "grad_cam"]["average_gain"].mean()
    )


def test_only_unreadable_images(tiny):
    rows = evaluate(tiny, [Skipped("torn.png", 2, "torn")], {"a": METHODS["fake_cam"], "b": METHODS["fake_cam"]})
    assert rows[["image", "label", "method", "status", "reason"]].values.tolist() == [
        ["torn.png", 2, "a", "skipped", "torn"],
        ["torn.png", 2, "b", "skipped", "torn"],
    ]


def test_costs_are_counted(tiny, samples):
    tiny = wrap(tiny, "features")
    methods = {
        "grad_cam": METHODS["grad_cam"],
        "opti_cam": partial(METHODS["opti_cam"], num_steps=3, layer="features.2"),
        "fake_cam": METHODS["fake_cam"],
    }
    rows = evaluate(tiny, samples[:3], methods, batch_size=2).set_index("method")
    assert rows.loc["grad_cam", ["forward_passes", "backward_passes"]].to_numpy().tolist() == [[1, 1]] * 3
    assert rows.loc["opti_cam", ["forward_passes", "backward_passes"]].to_numpy().tolist() == [[5, 3]] * 3
    assert rows.loc["fake_cam", ["forward_passes", "backward_passes"]].to_numpy().tolist() == [[0, 0]] * 3
    assert set(rows.loc["opti_cam", "layer"]) == {"features.2"}
    assert set(rows.loc["grad_cam", "layer"]) == {"features"}
    assert (rows["seconds"] > 0).all()


def test_out_of_memory_halves_the_batch(tiny, samples):
    def greedy(model, images, class_idx):
        if len(images) > 1:
            raise torch.OutOfMemoryError("too much")
        return METHODS["grad_cam"](model, images, class_idx, layer="features")

    with pytest.warns(UserWarning, match="out of memory: going on with 3 images in flight"):
        rows = evaluate(tiny, samples, {"greedy": greedy})
    assert rows["image"].tolist() == [sample.name for sample in samples]

    def hopeless(model, images, class_idx):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        evaluate(tiny, samples, {"hopeless": hopeless})


def test_the_bar_moves_with_every_method_and_back_where_memory_ends(tiny, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTICAM_PROGRESS", str(tmp_path / "bar"))
    seen, most = [], 3

    def method(model, images, class_idx):
        shown = (tmp_path / "bar").read_bytes().decode().rpartition("\r")[2]
        seen.append(re.search(r" (\d+)/\d+ \[.*, (\w+)\] *$", shown).groups())
        if seen[-1][1] == "second" and len(images) > most:
            raise torch.OutOfMemoryError("too much")
        return METHODS["grad_cam"](model, images, class_idx, layer="features")

    methods = {"first": method, "second": method}
    evaluate(tiny, samples, methods, batch_size=3, progress=True)
    assert seen == [("0", "first"), ("3", "second"), ("6", "first"), ("8", "second")]
    seen, most = [], 1
    with pytest.warns(UserWarning, match="out of memory"):
        evaluate(tiny, samples[:2], methods, progress=True)
    assert [int(number) for number, _ in seen] == [0, 2, 0, 1, 2, 3]


@pytest.mark.slow
def test_processes_that_decode_change_nothing(tiny, samples):
    tiny = wrap(tiny, "features")
    tables = [evaluate(tiny, samples, {"grad_cam": METHODS["grad_cam"]}, batch_size=2, num_workers=n) for n in (0, 2)]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))


@pytest.mark.slow
def test_a_corrupt_photo_costs_its_rows_only(tmp_path):
    photos = demo(limit=3)
    torn = tmp_path / photos.paths[1].name
    torn.write_bytes(photos.paths[1].read_bytes()[:5000])
    photos = replace(photos, records=[photos.records[0], photos.records[1]._replace(path=torn), photos.records[2]])
    rows = evaluate(load_model("efficientnet_lite0"), photos, {"grad_cam": METHODS["grad_cam"]}, num_workers=1)
    assert rows["status"].tolist() == ["ok", "skipped", "ok"]
    assert "is damaged or cannot be decoded" in rows["reason"][1]
    assert str(tmp_path) not in rows["reason"][1]


def test_a_map_that_is_not_finite_has_no_scores(tiny, samples):
    def broken(model, images, class_idx):
        maps = METHODS["grad_cam"](model, images, class_idx, layer="features.0")
        maps[1, 0, 3, 3] = torch.nan
        maps[2] = torch.nan
        return maps

    rows = evaluate(tiny, samples, {"broken": broken}, scores=["localization"])
    assert rows["status"].tolist() == ["ok", "skipped", "skipped", "ok", "ok"]
    lost = rows[rows["status"] == "skipped"]
    assert lost.loc[:, "logit":"box_hits"].isna().all(axis=None)
    assert lost["predicted"].notna().all()


@pytest.mark.slow
def test_scores_are_those_of_the_metrics(tiny, samples, images, class_idx):
    tiny = wrap(tiny, "features", mean=[0.5], std=[1.0])
    method = partial(METHODS["opti_cam"], num_steps=2, layer="features.0")
    boxes = [torch.tensor([[b, 2.0, 20.0, 9.0 + b]]) for b in range(5)]
    samples = [sample._replace(boxes=box) for sample, box in zip(samples, boxes, strict=True)]
    rows = evaluate(tiny, samples, {"opti_cam": method}, scores=[*COLUMN_GROUPS, "road"], batch_size=5)
    saliency = method(tiny, images, class_idx)
    correct = tiny(images).argmax(1) == class_idx
    assert not correct.all()
    again = method(tiny, images * saliency, class_idx)
    expected = {
        "insertion": metrics.insertion(tiny, images, class_idx, saliency)[0],
        "deletion": metrics.deletion(tiny, images, class_idx, saliency)[0],
        "road": metrics.road(tiny, images, class_idx, saliency),
        "coherency": metrics.coherency(saliency, again),
        "complexity": saliency.mean((1, 2, 3)),
        "adcc": metrics.adcc(saliency, again, torch.tensor(rows["average_drop"])),
        "localization_error": metrics.localization_error(saliency, boxes),
        "official_metric": metrics.official_metric(saliency, boxes, correct),
        "soft_f1": metrics.soft_f1(saliency, boxes),
        "saliency_metric": metrics.saliency_metric(tiny, images, class_idx, saliency),
        "pointing_game": metrics.pointing_game(saliency, boxes),
        "energy_pointing_game": metrics.energy_pointing_game(saliency, boxes),
    }
    inside = metrics.box_mask(boxes, images.shape[-2:])
    for name, mask in {
        "B": inside,
        "1-B": 1 - inside,
        "S*B": saliency * inside,
        "S*(1-B)": saliency * (1 - inside),
    }.items():
        expected[f"masked_prob[{name}]"] = tiny(images * mask).softmax(1).gather(1, class_idx[:, None])[:, 0]
    for column, values in expected.items():
        np.testing.assert_allclose(rows[column], values.detach(), atol=1e-12, err_msg=column)
    bits = np.stack([np.unpackbits(np.frombuffer(packed, np.uint8)) for packed in rows["box_hits"]])
    np.testing.assert_array_equal(bits.reshape(5, 4, 1000), metrics.box_hits(saliency, boxes))
    assert bits.any()


def test_unknown_scores(tiny, samples):
    with pytest.raises(ValueError, match=r"scores: wanted some of curves, .* got 'area'"):
        evaluate(tiny, samples, {"fake_cam": METHODS["fake_cam"]}, scores=["area"])
    with pytest.raises(TypeError, match=r"^scores: wanted a list of names, got 'curves'$"):
        evaluate(tiny, samples, {"fake_cam": METHODS["fake_cam"]}, scores="curves")


def run_stream(folder, model, samples, **changed):
    settings = {"parameters": {"model": "tiny"}, "keys": {"model": "tiny"}, "batch_size": 2, "shard_size": 3}
    settings |= {"methods": {"grad_cam": METHODS["grad_cam"]}} | changed
    return stream(folder, model, Numbered(samples), **settings)


def test_a_stream_has_the_rows_of_evaluate_and_is_not_computed_twice(tiny, samples, tmp_path, monkeypatch):
    tiny = wrap(tiny, "features")
    folder = run_stream(tmp_path, tiny, samples)
    rows, provenance = read_shards(folder)
    direct = evaluate(tiny, samples, {"grad_cam": METHODS["grad_cam"]})
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), direct.drop(columns="seconds"))
    assert provenance["parameters"]["model"] == "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00001.parquet"]
    before = written(tmp_path)
    assert run_stream(tmp_path, tiny, samples) == folder
    assert written(tmp_path) == before


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "parameters",
        "weights",
        "network",
        "images",
        "labels",
        "frame",
        "upright",
        "window",
        "batch_size",
        "shard_size",
        "scores",
        "layer",
        "method",
        "keys",
        "libraries",
    ],
)
def test_another_run_has_a_folder_of_its_own(tiny, samples, tmp_path, monkeypatch, what):
    tiny = wrap(tiny, "features")
    run_stream(tmp_path, tiny, samples)
    before, changed = written(tmp_path), {}
    if what == "parameters":
        changed = {"parameters": {"model": "other"}}
    elif what == "weights":
        with torch.no_grad():
            tiny.network.fc.bias[0] += 1
    elif what == "images":
        samples[-1] = samples[-1]._replace(name="other.png")
    elif what == "labels":
        samples[0] = samples[0]._replace(label=1)
    elif what == "upright":
        monkeypatch.setattr(Numbered, "upright", False)
    elif what == "window":
        monkeypatch.setattr(Numbered, "window", (0, 4095))
    elif what == "network":
        tiny.network.features[1] = torch.nn.GELU()
    elif what == "method":
        changed = {"methods": {"grad_cam": partial(METHODS["grad_cam"], layer="features.0")}}
    elif what == "keys":
        changed = {"keys": {"model": "tiny, mended"}}
    elif what == "libraries":
        monkeypatch.setattr("opticam.lab.evaluation.library_versions", lambda: {"torch": "0.1"})
    elif what == "layer":
        tiny = wrap(tiny.network, "features.0")
    elif what == "frame":
        monkeypatch.setattr(Numbered, "input_size", 25)
    elif what == "scores":
        changed = {"scores": ["box_experiment"]}
    else:
        changed = {what: 4}
    rows, _ = read_shards(run_stream(tmp_path, tiny, samples, **changed))
    assert len(rows) == 5
    after = written(tmp_path)
    assert len(after) == 4
    assert before.items() < after.items()


@pytest.mark.parametrize("what", ["code", "torn file"])
def test_a_file_that_cannot_be_trusted_is_written_anew(tiny, samples, tmp_path, monkeypatch, what):
    tiny = wrap(tiny, "features")
    run_stream(tmp_path, tiny, samples)
    if what == "code":
        monkeypatch.setattr(results, "code_digest", lambda: "other")
    else:
        for path in written(tmp_path):
            path.write_bytes(path.read_bytes()[:-7])
    before = written(tmp_path)
    run_stream(tmp_path, tiny, samples)
    after = written(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[path] != before[path] for path in before)


def test_of_a_photo_that_was_mended_the_rows_are_written_anew(tiny, samples, tmp_path):
    paths = [tmp_path / sample.name for sample in samples]
    for path in paths:
        path.write_text("photo")
    start = partial(stream, tmp_path, tiny, parameters={}, keys={"model": "tiny"}, batch_size=2, shard_size=3)
    ones = {"ones": METHODS["fake_cam"]}
    folder = start(dataset=Numbered(samples, paths), methods=ones)
    before = written(tmp_path)
    paths[4].write_text("PHOTO")
    assert start(dataset=Numbered(samples, paths), methods=ones) == folder
    after = written(tmp_path)
    assert [after[path] == before[path] for path in sorted(before)] == [True, False]
    assert len(read_shards(folder)[0]) == 5
    with_boxes = Numbered(samples, paths)
    with_boxes.records[0] = with_boxes.records[0]._replace(boxes=((1.0, 1.0, 4.0, 4.0),))
    assert start(dataset=with_boxes, methods=ones) == folder
    assert [written(tmp_path)[path] == after[path] for path in sorted(before)] == [False, True]


def test_keys_of_another_kind(tmp_path, tiny, samples):
    for changed, message in (
        ({"keys": 5}, "keys: wanted a dict"),
        ({"batch_size": None}, "batch_size: wanted a whole"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            run_stream(tmp_path, tiny, samples, **changed)
    assert not list(tmp_path.iterdir())


def test_methods_and_datasets_of_another_kind(tiny, samples):
    tiny = wrap(tiny, "features")
    for method, got in (
        (opti_cam, "OptiCAMResult"),
        (lambda *_: np.ones((5, 1, 24, 32)), "ndarray"),
        (lambda model, images, class_idx: images[:, 0], r"\(5, 24, 32\)"),
    ):
        with pytest.raises(ValueError, match=rf"methods: own returned {got}; wanted a tensor \(5, 1, 24, 32\)"):
            evaluate(tiny, samples, {"own": method})
    with pytest.raises(TypeError, match="methods: wanted a dict of functions by their names, got list"):
        evaluate(tiny, samples, ["grad_cam"])
    with pytest.raises(
        TypeError, match="methods: wanted functions, such as those in METHODS, got 'grad_cam' under 'g'"
    ):
        evaluate(tiny, samples, {"g": "grad_cam"})
    for changed, message in (
        ({"dataset": None}, "dataset: wanted images, as load_dataset gives them, got NoneType"),
        ({"dataset": DataLoader(samples)}, "dataset: wanted images, as load_dataset gives them, got DataLoader"),
        ({"scores": None}, "scores: wanted a list of names, got None"),
        ({"batch_size": None}, "batch_size: wanted a whole number, got None"),
        ({"dataset": [samples[0]._replace(image=None)]}, "dataset: wanted a tensor as image of a Sample, got NoneType"),
        ({"methods": {"own": lambda model, x, c: x[:, :1] + 0j}}, r"methods: wanted real numbers, got torch\.complex"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            evaluate(tiny, **{"dataset": samples, "methods": {"fake_cam": METHODS["fake_cam"]}, **changed})
    with pytest.raises(ValueError, match="dataset: wanted items of type Sample, got tuple"):
        evaluate(tiny, [(samples[0].image, 0)], {"fake_cam": METHODS["fake_cam"]})
    one = samples[0]
    for other, message in (
        (one._replace(image=one.image[:, :-1]), r"images of one size, got \(3, 24, 32\) and \(3, 23, 32\)"),
        (one._replace(label=torch.tensor(1)), r"whole numbers as labels, got tensor\(1\)"),
        (one._replace(label="cat"), "whole numbers as labels, got 'cat'"),
    ):
        with pytest.raises(ValueError, match=f"samples: wanted {message}"):
            evaluate(tiny, [one, other], {"fake_cam": METHODS["fake_cam"]})


@pytest.mark.slow
def test_layers_are_recorded_by_the_name_that_finds_them(samples):
    model = load_model("efficientnet_lite0").double()
    given = "bn2", model.network.bn2
    images = [samples[0]._replace(image=torch.rand(3, 64, 64, dtype=torch.float64))]
    methods = {str(k): partial(METHODS["equal_weights"], layer=layer) for k, layer in enumerate(given)}
    assert evaluate(model, images, methods).layer.tolist() == ["bn2", "bn2"]


def test_a_half_precision_network(tiny, samples):
    tiny = wrap(tiny, "features")
    exact = evaluate(tiny, samples, {"grad_cam": METHODS["grad_cam"]})
    half = evaluate(tiny.bfloat16(), samples, {"grad_cam": METHODS["grad_cam"]})
    assert half.status.equals(exact.status)
    np.testing.assert_allclose(half[["prob", "masked_prob"]], exact[["prob", "masked_prob"]], rtol=0.01)


def test_without_a_box_there_is_no_box_experiment(tiny, samples):
    samples[2] = samples[2]._replace(boxes=torch.tensor([[2.0, 2.0, 9.0, 9.0]]))
    rows = evaluate(tiny, samples, {"fake_cam": METHODS["fake_cam"]}, scores=["box_experiment"])
    columns = [f"masked_prob[{name}]" for name in ("B", "1-B", "S*B", "S*(1-B)")]
    assert rows[columns].notna().all(axis=1).tolist() == [False, False, True, False, False]
    assert rows[columns].isna().all(axis=1).tolist() == [True, True, False, True, True]


@pytest.mark.slow
def test_what_cannot_be_streamed_is_said_before_anything_is_computed(tiny, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"folder: cannot write in .*file"):
        run_stream(tmp_path / "file", tiny, samples)
    with pytest.raises(ValueError, match="dataset: wanted at least one image"):
        run_stream(tmp_path, tiny, [])
    with pytest.raises(ValueError, match="methods: wanted at least one"):
        evaluate(tiny, samples, {})
    for parameters, message in (
        ({"shard": "1/4", "weights": "V2"}, "parameters: shard, weights are stored by stream itself"),
        ({"root": tmp_path}, "parameters: wanted what JSON can hold"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stream(tmp_path, tiny, samples, parameters=parameters)
    for keys in ({"gradcam": "v1"}, {"model": ""}, {"model": 1}):
        with pytest.raises(
            ValueError, match="keys: wanted a word for 'model' or for the name of a method or metric, got"
        ):
            run_stream(tmp_path, tiny, samples, keys=keys)
    with pytest.raises(
        ValueError, match="keys: TinyCNN of model cannot be recognised when the run resumes; wanted keys"
    ):
        run_stream(tmp_path, tiny, samples, keys={})
    with pytest.raises(ValueError, match=r"keys: .*<lambda> of ones cannot be recognised when the run resumes"):
        run_stream(tmp_path, tiny, samples, methods={"ones": lambda model, images, class_idx: images[:, :1] * 0 + 1})
    with pytest.raises(ValueError, match="dataset: wanted Photos, as load_dataset gives them, got list"):
        stream(tmp_path, tiny, samples, METHODS, parameters={})
    own = load_model("efficientnet_lite0")
    turned = replace(demo(limit=1), class_names=own.class_names[::-1])
    with pytest.raises(ValueError, match="dataset: its classes are in another order than the model's"):
        evaluate(own, turned, {"fake_cam": METHODS["fake_cam"]})
    two = replace(demo(limit=1), class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="dataset: its labels are 2 classes; wanted the 1000 of the model"):
        evaluate(load_model("efficientnet_lite0"), two, {"fake_cam": METHODS["fake_cam"]})
    with pytest.raises(ValueError, match="dataset: its labels are 1000 classes; wanted the 5 of the model"):
        evaluate(wrap(tiny, "features"), demo(limit=1), {"fake_cam": METHODS["fake_cam"]})
    with pytest.raises(ValueError, match="dataset: its labels are 2 classes; wanted the 5 of the model"):
        evaluate(wrap(tiny, "features"), two, {"fake_cam": METHODS["fake_cam"]})


@pytest.mark.slow
def test_killed_at_twenty_moments_no_row_is_lost_or_double(tiny, samples, tmp_path):
    """SIGKILL at random moments of a run of some 0.2 s, then one start more: the rows of an undisturbed run."""
    tiny = wrap(tiny, "features")
    many = [samples[i % 5]._replace(name=f"{i}.png") for i in range(24)]
    undisturbed, _ = read_shards(run_stream(tmp_path / "undisturbed", tiny, many))
    random = np.random.default_rng(0)
    killed = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())  # the usual one is shared: it would die locked
            run_stream(tmp_path / "killed", tiny, many)
            os._exit(0)
        time.sleep(random.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed >= 5
    whole = written(tmp_path / "killed")
    rows, _ = read_shards(run_stream(tmp_path / "killed", tiny, many))
    assert whole.items() <= written(tmp_path / "killed").items()
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), undisturbed.drop(columns="seconds"))


def test_no_name_of_the_laboratory_is_that_of_a_module():
    modules = {path.stem for path in Path(lab.__file__).parent.glob("*.py")}
    assert not set(lab.__all__) & modules  # once imported, the module would stand in for the function
