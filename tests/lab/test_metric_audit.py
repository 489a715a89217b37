from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import references
import torch

from opticam import METHODS, wrap
from opticam.lab import metric_audit
from opticam.lab.known_evidence import (
    Mosaics,
    Pastes,
    cell_boxes,
    cell_drops,
    evidence_scores,
    pixel_auroc,
    to_mosaics,
)
from opticam.lab.metric_audit import (
    CHANGES,
    CONTROLS,
    GROUPS,
    agreement,
    audit,
    audit_rows,
    audited_maps,
    audited_metrics,
    blurrier,
    collect_evidence,
    judge,
    truth_of,
)
from opticam.metrics import COLUMNS
from opticam.saliency import blur, min_max, upsample


def test_agreement_in_three_ways_equals_the_ranks_counted():
    rng = np.random.default_rng(0)
    truth = rng.random((9, 5))
    scores = truth + 0.5 * rng.random((9, 5))
    scores[0] = (4 * scores[0]).round()  # ties
    found, p = agreement(scores, truth)
    by_image = [references.rank_correlation(a, b) for a, b in zip(scores, truth, strict=True)]
    by_kind = [references.rank_correlation(a, b) for a, b in zip(scores.T, truth.T, strict=True)]
    assert found["maps"].value == pytest.approx(np.mean(by_image))
    assert found["images"].value == pytest.approx(np.mean(by_kind))
    assert found["methods"].value == pytest.approx(references.rank_correlation(scores.mean(0), truth.mean(0)))
    assert p < 0.05
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found.values())
    skewed = np.array([[0.0, 1], [0, 1], [9, 1]])  # means 3 and 1: the first is better
    assert agreement(skewed, np.array([[1.0, 0]] * 3))[0]["methods"].value == 1
    with pytest.raises(ValueError, match="scores: wanted"):
        agreement(scores[:, :1], truth[:, :1])


METHODS_OF_ROWS = ["a", "b", "c", "grad_cam", "d"]


def planted(targets=40):
    """Maps that show a square the better the later they come, and metrics of them that are good or worthless."""
    rng = np.random.default_rng(1)
    region, box = torch.zeros(1, 1, 28, 28).double(), [torch.tensor([[4.0, 4, 16, 16]])]
    region[..., 4:16, 4:16] = 1
    rows = []
    for target in range(targets):
        for k, method in enumerate([*METHODS_OF_ROWS, *CHANGES, "uniform"]):
            noise = upsample(torch.from_numpy(rng.random((1, 1, 7, 7))), (28, 28))
            S = (noise + region * min(k, 3) / 4) / 2
            if method in CHANGES:
                S = CHANGES[method](S)
            elif method == "uniform":
                S = torch.full_like(S, 0.5)
            truth = evidence_scores(S, box, (7, 7)).auroc[0]
            steps = (S.diff(dim=3).abs().sum() / max(S.amax() - S.amin(), 1e-9)).item()
            rows.append((target, method, truth, rng.random(), steps, (S * region).sum().item() / S.sum().item()))
    return pd.DataFrame(rows, columns=["target", "method", "truth", "random", "steepness", "oracle"])


@pytest.mark.slow
def test_the_audit_finds_a_metric_of_random_numbers_useless_and_the_truth_perfect():
    rows = planted().assign(truth_itself=lambda rows: rows.truth)
    metrics = {"random": True, "steepness": False, "oracle": True, "truth_itself": True}
    found = audit(rows, metrics, METHODS_OF_ROWS)
    perfect, useless, blur = (found.loc[name] for name in ("truth_itself", "random", "steepness"))
    assert perfect[["maps", "images", "methods"]].tolist() == pytest.approx([1, 1, 1])
    assert perfect["uninformative"] == 0
    assert useless.maps_low < 0 < useless.maps_high
    assert useless.images_low < 0 < useless.images_high
    assert useless.uninformative_low < 0.5 < useless.uninformative_high
    assert found.loc["oracle"].maps > 0.9
    assert blur.blurrier_low > 0  # it rewards blur,
    assert blur.uninformative == 1  # and nothing is as smooth as a uniform map
    assert perfect.blurrier_high < blur.blurrier_low
    assert (found.n == 40).all()


def test_a_target_without_the_metric_does_not_count():
    rows = planted(5)
    rows.loc[(rows.target == 2) & (rows.method == "b"), "random"] = np.nan
    found = audit(rows, {"random": True, "oracle": True}, METHODS_OF_ROWS)
    assert found.n.tolist() == [4, 5]
    assert "other" not in set(found)
    nothing = audit(rows.assign(random=np.nan), {"random": True, "oracle": True}, METHODS_OF_ROWS)
    assert nothing.n.tolist() == [0, 5]
    assert nothing.loc["random"].drop("n").isna().all()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"metrics": ["m"]}, "TypeError: metrics: wanted a dict from column to whether higher is better, got ['m']"),
        ({"methods": "grad_cam"}, "TypeError: methods: wanted a list of names, got 'grad_cam'"),
        ({"methods": ["grad_cam"]}, "ValueError: methods: wanted two or more, each once, got grad_cam"),
        ({"methods": ["grad_cam", "a", "a"]}, "ValueError: methods: wanted two or more, each once, got grad_cam, a, a"),
        ({"methods": ["grad_cam", "b"]}, "ValueError: methods: wanted some of grad_cam, a, got b"),
        ({"rows": 0}, "ValueError: rows: wanted at least one, got none"),
        ({"m": "good"}, "ValueError: column m: wanted an array of numbers, got "),
        ({"truth": "near"}, "ValueError: column truth: wanted an array of numbers, got "),
    ],
)
def test_what_cannot_be_audited_is_refused(changed, told):
    given = {"metrics": {"m": True}, "methods": ["grad_cam", "a"]}
    rows = pd.DataFrame({"target": [0, 0], "method": ["grad_cam", "a"], "truth": [0.0, 1.0], "m": [0.0, 1.0]})
    columns = {name: value for name, value in changed.items() if name in rows}
    given |= {name: value for name, value in changed.items() if name in given}
    with pytest.raises((TypeError, ValueError)) as caught:
        audit(rows.assign(**columns)[: changed.get("rows")], **given)
    assert f"{caught.type.__name__}: {caught.value}".startswith(told)


def test_no_evidence_has_no_rows(classifier):
    with pytest.raises(ValueError, match="evidence: wanted at least one kind, got none"):
        audit_rows(classifier, [], {})


def test_a_target_without_a_changed_map_does_not_count_for_the_change():
    values = np.random.default_rng(0).random((25, 3))
    rows = pd.DataFrame(
        [
            (i, method, value, value)
            for i, line in enumerate(values)
            for method, value in zip(("grad_cam", "b", "sharper"), line, strict=True)
        ]
    ).set_axis(["target", "method", "truth", "q"], axis=1)
    without = rows.assign(q=rows.q.where((rows.target != 3) | (rows.method != "sharper")))
    found = audit(without, {"q": True}, ["grad_cam", "b"]).loc["q"]
    spread = values[:, :2].std(1, ddof=1)
    kept = np.arange(25) != 3
    assert found.sharper == pytest.approx((values[:, 2] - values[:, 0])[kept].mean() / spread[kept].mean())
    with pytest.raises(ValueError, match="methods: wanted grad_cam among them"):
        audit(rows, {"q": True}, ["b", "sharper"])
    with pytest.raises(ValueError, match="zz"):
        audit(rows, {"zz": True}, ["grad_cam", "b"])
    with pytest.raises(ValueError, match=r"^methods: wanted some of grad_cam, b, sharper, got zz$"):
        audit(rows, {"q": True}, ["grad_cam", "zz"])
    with pytest.raises(ValueError, match=r"^rows: wanted one row per target and method, got more of 0, grad_cam$"):
        audit(pd.concat([rows, rows]), {"q": True}, ["grad_cam", "b"])


def test_the_audit_counts_wins_of_uninformative_maps_and_spreads_by_hand():
    """Two targets. Base 1 and 3, control 2 and 3: wins 1 and 1/2. Methods (1, 3) and (3, 3): spread sqrt 2 and 0.

    Squared maps have 2 and 4: one more each, (1 + 1) / (sqrt 2 + 0).
    """
    values = {"grad_cam": (1, 3), "a": (3, 3), "uniform": (2, 3), "sharper": (2, 4)}
    rows = pd.DataFrame(
        [(target, name, value[target], value[target]) for name, value in values.items() for target in range(2)],
        columns=["target", "method", "truth", "m"],
    )
    found = audit(rows, {"m": True}, ["grad_cam", "a"]).loc["m"]
    assert found["uninformative"] == 0.75
    assert (found["uninformative_low"], found["uninformative_high"]) == (0, 1)  # by t it would go beyond
    assert found["sharper"] == pytest.approx(2 / 2**0.5)
    without = rows[(rows.method != "uniform") | (rows.target == 0)]
    assert (
        audit(without, {"m": True}, ["grad_cam", "a"]).loc["m", "uninformative"] == 1
    )  # of the one that has a control
    lower = audit(rows, {"m": False}, ["grad_cam", "a"]).loc["m"]
    assert lower["uninformative"] == 0.25
    assert lower["sharper"] == pytest.approx(-(2 / 2**0.5))


@pytest.fixture
def classifier(tiny):
    return wrap(tiny, "features.3", mean=(0.5,), std=(0.25,), input_size=32, class_names=list("abcde"))


def square_images():
    return torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_every_metric_judges_every_map_and_order_is_not_changed_by_monotone_changes(classifier):
    images, class_idx = square_images(), torch.tensor([0, 3, 4])
    methods = {name: METHODS[name] for name in ("equal_weights", "grad_cam", "layer_cam")}
    maps = audited_maps(classifier, images, class_idx, methods)
    assert set(maps.saliency) == set(maps.again) == {*methods, *CHANGES, *CONTROLS, "other"}
    assert torch.equal(maps.saliency["other"][1], maps.saliency["grad_cam"][0])
    assert torch.equal(maps.saliency["sharper"], maps.saliency["grad_cam"] ** 2)
    masked = images * maps.saliency["layer_cam"]
    torch.testing.assert_close(maps.again["layer_cam"], methods["layer_cam"](classifier, masked, class_idx))
    boxes = [cell_boxes((32, 32))[[k]] for k in range(3)]
    rows = judge(classifier, images, class_idx, maps, boxes)
    assert set(audited_metrics()) == {name for names in GROUPS.values() for name in names} <= set(rows)
    assert len(rows) == 3 * len(maps.saliency)
    assert not rows[[*audited_metrics()]].isna().any().any()
    values = rows.pivot(index="target", columns="method")
    for column in ("insertion", "deletion", "road"):
        for change in ("sharper", "brighter", "lifted"):
            assert values[column][change].tolist() == pytest.approx(values[column]["grad_cam"].tolist(), abs=1e-9)
    assert (values["energy_pointing_game"]["sharper"] != values["energy_pointing_game"]["grad_cam"]).all()
    one = audited_maps(classifier, images[:1], class_idx[:1], methods)
    assert "other" not in one.saliency
    with pytest.raises(ValueError, match="wanted grad_cam among them"):
        audited_maps(classifier, images, class_idx, {"layer_cam": METHODS["layer_cam"]})


def test_what_is_audited_has_records():
    assert set(audited_metrics()) <= set(COLUMNS)


def test_blur_stays_in_range_and_loses_detail():
    S = min_max(upsample(torch.rand(2, 1, 7, 7, dtype=torch.float64), (32, 32)))
    blurred = blurrier(S)
    assert blurred.shape == S.shape
    assert blurred.amin() == 0
    assert blurred.amax() == 1
    assert blurred.diff(dim=3).abs().mean() < S.diff(dim=3).abs().mean()


@pytest.mark.slow
def test_evidence_is_collected_once_per_mosaic_and_pair(classifier, monkeypatch):
    photos = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    class_idx = classifier(photos).argmax(1)
    class_idx[5] = (class_idx[5] + 1) % 5  # the network is wrong there
    boxes = [torch.tensor([[2.0, 3, 40, 20]]) + i for i in range(8)]
    four = torch.arange(8).view(2, 4)
    verified = torch.tensor([[True] * 4, [True, False, True, False]])
    mosaics = Mosaics(to_mosaics(photos), class_idx[four], four, verified)
    pairs, hosts = torch.tensor([0, 0, 3]), torch.tensor([[6, 7], [7, 6], [1, 2]])
    regions = [torch.tensor([[1.0, 1, 9, 9]]) + k for k in range(3)]
    pastes = Pastes(photos[:3], class_idx[:3], class_idx[3:6], regions, hosts, pairs, 8)
    monkeypatch.setattr(metric_audit, "find_mosaics", lambda *arguments: mosaics)
    monkeypatch.setattr(metric_audit, "find_pastes", lambda *arguments: pastes)
    names = [f"photo {i}" for i in range(8)]
    columns = (pd.Series(some, index=range(7, -1, -1)) for some in (boxes, names))  # by their place all the same
    mosaic, paste, deletion = collect_evidence(classifier, photos, class_idx, *columns, side=4)
    assert [crc32(name) % 4 for name in (b"photo 0", b"photo 4")] == [2, 3]
    assert mosaic.names == ["photo 2, cell 2", "photo 4, cell 0"]  # cell 3 of the second is refused, so the next
    assert mosaic.regions[1].tolist() == [[0, 0, 32, 32]]
    assert mosaic.objects[0].tolist() == [[4, 37, 32, 54]]  # cut off at the border of its photo
    assert mosaic.objects[1].tolist() == [[6, 7, 32, 24]]
    assert torch.equal(mosaic.class_idx, class_idx[[2, 4]])
    assert paste.names == ["photo 7 in photo 6", "photo 2 in photo 1"]
    assert [some.tolist() for some in paste.regions] == [regions[0].tolist(), regions[2].tolist()]
    assert deletion.names == [name for name in names if name != "photo 5"]
    assert deletion.drops.shape == (2, 7, 16)
    assert torch.equal(deletion.drops[1], cell_drops(classifier, deletion.images, deletion.class_idx, 4, blur))
    S = torch.rand(7, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for i, value in enumerate(truth_of(deletion, S)):
        means = np.array([S[i, 0, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].mean() for r in range(4) for c in range(4)])
        expected = [references.rank_correlation(means, drops[i].numpy()) for drops in deletion.drops]
        assert value == pytest.approx(np.mean(expected))
    assert truth_of(deletion, S.clone().requires_grad_()).tolist() == truth_of(deletion, S).tolist()
    assert truth_of(paste, S[:2]).tolist() == pixel_auroc(S[:2], paste.regions).tolist()
    one = [part._replace(**{"names": part.names[:2]}) for part in (mosaic, paste)]
    rows = audit_rows(classifier, one, {"grad_cam": METHODS["grad_cam"]})
    assert set(rows.target) == {f"{part.kind}: {name}" for part in one for name in part.names}
    base = rows[(rows.kind == "mosaic") & (rows.method == "grad_cam")]
    S = METHODS["grad_cam"](classifier, mosaic.images, mosaic.class_idx)
    assert base.truth.tolist() == pytest.approx(pixel_auroc(S, mosaic.regions).tolist())
    assert rows[rows.kind == "paste"].energy_pointing_game.isna().all()
    assert rows[rows.kind == "mosaic"].energy_pointing_game.notna().all()
    assert [
        len(part.names) for part in collect_evidence(classifier, photos, class_idx, boxes, names, limit=1, side=4)
    ] == [1] * 3


BOX = torch.tensor([[2.0, 3, 40, 20]])


def test_names_and_boxes_of_photos_go_by_their_place(classifier):
    photos = square_images()
    columns = (pd.Series(some, index=[2, 1, 0]) for some in ([BOX, BOX + 1, BOX + 2], [7, 8, 9]))
    (deletion,) = collect_evidence(classifier, photos, classifier(photos).argmax(1), *columns, side=2)
    assert deletion.names == ["7", "8", "9"]
    assert [some[0, 0].item() for some in deletion.objects] == [2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"names": [*"ab"]}, "names: wanted 3, got 2"),
        ({"names": "abc"}, "names: wanted a list of 3, got 'abc'"),
        ({"boxes": [BOX] * 4}, "boxes: wanted 3, got 4"),
        ({"boxes": [[2, 3, 40, 20]] * 3}, "boxes: wanted a sequence of tensors"),
        ({"limit": -1}, "limit: wanted at least 1, got -1"),
        ({"limit": 0}, "limit: wanted at least 1, got 0"),
        ({"side": 5}, r"side: wanted a divisor of \(32, 32\), got 5"),
    ],
)
def test_what_is_no_evidence_is_refused_before_any_pass(classifier, monkeypatch, wrong, told):
    monkeypatch.setattr(metric_audit, "find_mosaics", lambda *arguments: pytest.fail("passes were made"))
    arguments = {"boxes": [BOX] * 3, "names": [*"abc"], "side": 4} | wrong
    with pytest.raises((TypeError, ValueError), match=f"^{told}"):
        collect_evidence(classifier, square_images(), torch.tensor([0, 3, 4]), **arguments)
