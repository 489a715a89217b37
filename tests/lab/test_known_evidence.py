import math

import numpy as np
import pandas as pd
import pytest
import references
import torch
from conftest import TinyCNN, state
from torch import nn

from opticam import METHODS, wrap
from opticam.features import features_and_gradients
from opticam.lab.known_evidence import (
    BASELINES,
    OneCell,
    best_map,
    cell_boxes,
    cell_drops,
    cell_means,
    centred,
    choose_mosaics,
    class_contrast,
    evidence_rows,
    evidence_scores,
    find_mosaics,
    find_pastes,
    maps_of_other_cells,
    maps_of_other_mosaics,
    paste_object,
    phase_scrambled,
    pixel_auroc,
    see_one_cell,
    to_cells,
    to_mosaics,
    uniform,
)
from opticam.lab.summary import difference_over_groups, interval


class Pooled(TinyCNN):
    """TinyCNN with the two methods that networks of timm have."""

    def forward_features(self, images):
        return self.features(images)

    def forward_head(self, maps):
        return self.fc(maps.mean((2, 3)))


class Colors(nn.Module):
    """Class 0, 1, 2 for red, green and blue: the logit is the brightest cell of 4x4 pixels of that colour."""

    def __init__(self, gain=20.0):
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images):
        own = 2 * images - images.sum(1, keepdim=True)
        return self.gain * self.weight * nn.functional.avg_pool2d(own, 4).amax((2, 3))


class Averages(Colors):
    """The mean colour decides, which scrambled phases keep."""

    def forward(self, images):
        return 1000 * self.weight * (2 * images - images.sum(1, keepdim=True)).mean((2, 3))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Pooled().double().eval()


@pytest.fixture
def classifier(network):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    return wrap(network, "features.3", mean=mean, std=std, input_size=16, class_names=list("abcde"))


def cells(number=8, size=16):
    return torch.rand(number, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def boxes_of(cell, count=1, size=(32, 32)):
    return [cell_boxes(size)[[cell]]] * count


def test_mosaics_are_stitched_row_by_row_and_cut_again():
    four = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    assert to_mosaics(four)[0, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    x = cells()
    assert to_mosaics(x).shape == (2, 3, 32, 32)
    assert torch.equal(to_cells(to_mosaics(x)), x)
    for k, (x0, y0, x1, y1) in enumerate(cell_boxes((32, 32)).int().tolist()):
        assert torch.equal(to_mosaics(x)[1, :, y0:y1, x0:x1], x[4 + k])
    assert cell_boxes((4, 8)).tolist() == [[0, 0, 4, 2], [4, 0, 8, 2], [0, 2, 4, 4], [4, 2, 8, 4]]


def test_mosaics_hold_photos_that_are_sure_of_their_own_class_only():
    number, classes = 60, 12
    generator = torch.Generator().manual_seed(0)
    class_idx = torch.randint(0, classes, (number,), generator=generator)
    logits = torch.randn(number, classes, generator=generator)
    logits[torch.arange(number), class_idx] += 10
    logits[::7, 3] += 6  # a second guess
    logits[::5] *= 0.1  # unsure
    probs = logits.softmax(1)
    fours = choose_mosaics(probs, class_idx, none=2e-3)
    assert len(fours) >= 5
    assert len(set(fours.flatten().tolist())) == fours.numel()
    for four in fours.tolist():
        assert len({class_idx[i].item() for i in four}) == 4
        for i in four:
            assert probs[i, class_idx[i]] > 0.9
            assert all(probs[i, class_idx[j]] < 2e-3 for j in four if j != i)
    assert torch.equal(fours, choose_mosaics(probs, class_idx, none=2e-3))
    assert not torch.equal(fours, choose_mosaics(probs, class_idx, none=2e-3, seed=1))
    assert choose_mosaics(probs[:3], class_idx[:3]).shape == (0, 4)
    with pytest.raises(ValueError, match=r"probs: wanted \(N,C\)"):
        choose_mosaics(probs, class_idx[:3])


def test_a_photo_that_is_sure_of_another_class_is_in_no_mosaic():
    probs = torch.full((5, 5), 1e-5)
    probs[range(5), range(5)] = 0.99
    class_idx = torch.tensor([0, 1, 2, 3, 3])  # the last is certain of class 4, and labelled 3
    assert sorted(choose_mosaics(probs, class_idx)[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_cell_drops_equal_the_loop(network, baseline):
    images, class_idx = cells(3, 24), torch.tensor([0, 4, 2])
    before = state(network)
    drops = cell_drops(network, images, class_idx, 3, BASELINES[baseline], batch_size=5)
    assert state(network) == before
    for i in range(3):
        shown = BASELINES[baseline]
        fill = (torch.zeros_like(images) if shown is None else shown(images).expand_as(images))[i].numpy()
        expected = references.cell_drops(network, images[i].numpy(), class_idx[i].item(), 3, fill)
        assert drops[i].tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(cell_drops(network, images[[i]], class_idx[[i]], 3, shown)[0], drops[i], atol=1e-12)
    assert torch.equal(cell_drops(network, images, class_idx, 3, BASELINES[baseline], batch_size=np.int64(5)), drops)
    for call in (lambda: cell_drops(network, images, class_idx, 5), lambda: cell_means(images[:, :1], 5)):
        with pytest.raises(ValueError, match=r"side: wanted a divisor of \(24, 24\), got 5"):
            call()


def test_the_head_sees_one_cell_exactly(classifier):
    photos = cells()
    mosaics = to_mosaics(photos)
    for cell in range(4):
        alone = see_one_cell(classifier, cell)
        torch.testing.assert_close(alone(mosaics), classifier(photos[cell::4]), rtol=0, atol=1e-12)
        x = mosaics.clone().requires_grad_()
        (slope,) = torch.autograd.grad(alone(x)[:, 2].sum(), x)
        others = to_cells(slope).unflatten(0, (-1, 4)).abs().amax((0, 2, 3, 4)) > 0
        assert others.tolist() == [k == cell for k in range(4)]


def test_layer_cam_and_hires_cam_stay_in_the_one_cell_and_grad_cam_does_not(classifier):
    classifier.network.fc.weight.data.abs_()  # else a map may be negative everywhere
    mosaics, class_idx = to_mosaics(cells()), torch.tensor([1, 3])
    for cell in range(4):
        model = see_one_cell(classifier, cell)
        A, g, _ = features_and_gradients(model, mosaics, class_idx)
        assert A.shape[2:] == (8, 8)
        layer = (g.relu() * A).sum(1, keepdim=True)
        hires = (g * A).sum(1, keepdim=True)
        for maps in (layer, hires):
            shares = to_cells(maps).unflatten(0, (2, 4)).abs().sum((2, 3, 4))
            assert (shares[:, cell] > 0).all()
            assert (shares.sum(1) == shares[:, cell]).all()  # exactly: no rounding
        found = {}
        for name in ("layer_cam", "hires_cam", "grad_cam"):
            S = METHODS[name](model, mosaics, class_idx)
            found[name] = evidence_scores(S, boxes_of(cell, 2), (8, 8))
            inside = to_cells(S).unflatten(0, (2, 4)).amax((2, 3, 4)).argmax(1)
            assert (inside == cell).all() or name == "grad_cam"
        assert found["layer_cam"].scaled_energy.min() > 0.9
        assert found["layer_cam"].scaled_auroc.min() > 0.8
        assert found["grad_cam"].scaled_energy.mean() < found["layer_cam"].scaled_energy.mean()


def test_other_cells_cannot_change_the_logit_of_opti_cam(classifier):
    photos = cells()
    other = photos.clone()
    other[[1, 2, 3, 5, 6, 7]] = photos[[7, 6, 5, 3, 2, 1]]
    model = see_one_cell(classifier, 0)
    a, b = (model(to_mosaics(some)) for some in (photos, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_networks_that_cannot_be_split_are_refused(network):
    with pytest.raises(ValueError, match="forward_features and forward_head"):
        OneCell(TinyCNN(), 0)
    with pytest.raises(ValueError, match=r"cell: wanted one of 0..3, got 4"):
        OneCell(network, 4)
    for cell in (True, 1.0):
        with pytest.raises(ValueError, match=f"cell: wanted a whole number, got {cell}"):
            OneCell(network, cell)
    tokens = torch.nn.Module()
    tokens.forward_features = lambda x: x.flatten(2).mT
    tokens.forward_head = lambda x: x.mean(1)
    told = r"network: wanted one with maps \(B,K,h,w\) from its forward_features, got shape \(4, 64, 3\)"
    with pytest.raises(ValueError, match=told):
        OneCell(tokens, 0)(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="model: wanted a Classifier"):
        see_one_cell(network, 0)


def test_scrambled_phases_equal_the_transform_written_out():
    patch = cells(1, 16)[0, :, :5, :6]
    noise = torch.rand(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).numpy()
    found = phase_scrambled(patch, 7)
    for channel in range(3):
        expected = references.phase_scrambled(patch[channel].numpy(), noise)
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-12)
        amplitudes = [np.abs(references.spectrum(some[channel].numpy())) for some in (patch, found)]
        np.testing.assert_allclose(*amplitudes, atol=1e-12)
    torch.testing.assert_close(found.mean((1, 2)), patch.mean((1, 2)))
    assert (found - patch).abs().mean() > 0.1
    assert not torch.allclose(phase_scrambled(patch, 8), found)


def test_an_object_is_pasted_whole_and_nothing_else_changes():
    host, source = cells(2, 20)
    boxes = torch.tensor([[0.0, 0, 3, 3], [5, 4, 15, 12], [18, 18, 40, 40]])
    pasted, scrambled, box = paste_object(host, source, boxes, share=0.5, seed=3)  # 10 of 20 pixels: as it is
    x0, y0, x1, y1 = box[0].int().tolist()
    assert (x1 - x0, y1 - y0) == (10, 8)
    assert 0 <= x0 < x1 <= 20
    assert 0 <= y0 < y1 <= 20
    torch.testing.assert_close(pasted[:, y0:y1, x0:x1], source[:, 4:12, 5:15])
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[y0:y1, x0:x1] = False
    for changed in (pasted, scrambled):
        assert torch.equal(changed[:, outside], host[:, outside])
    torch.testing.assert_close(
        scrambled[:, y0:y1, x0:x1], phase_scrambled(source[:, 4:12, 5:15], 3).clamp(0, 1), rtol=0, atol=1e-12
    )
    assert paste_object(host, source, boxes, share=0.25)[2].diff().tolist() != box.diff().tolist()
    with pytest.raises(ValueError, match="boxes: wanted one that shows part"):
        paste_object(host, source, boxes[:0])
    with pytest.raises(ValueError, match="boxes: wanted one that shows part"):
        paste_object(host, source, torch.tensor([[30.0, 30, 40, 40]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patches_are_made_in_half_precision_as_in_single(dtype):
    host, source = cells(2, 20).to(dtype)
    boxes = torch.tensor([[5.0, 4, 15, 12]])
    *found, box = paste_object(host, source, boxes)
    *wanted, same = paste_object(host.float(), source.float(), boxes)
    assert torch.equal(box, same)
    for some, other in zip(found, wanted, strict=True):
        assert torch.equal(some, other.to(dtype))
    patch = source[:, :5, :6]
    assert torch.equal(phase_scrambled(patch), phase_scrambled(patch.float()).to(dtype))


def colored(color, size=64, brightness=0.4):
    """A dim photo with a spot of one colour, and a box around it."""
    image = torch.full((3, size, size), 0.3, dtype=torch.float64)
    image[color, 4:8, 4:8] += brightness
    return image, torch.tensor([[0.0, 0, 40, 40]])


def test_pastes_are_kept_where_the_network_decides_for_the_object_and_not_for_the_scrambled_patch():
    photos = [colored(color, brightness=0.3 + 0.05 * k) for k, color in enumerate([0, 1, 2, 0, 1, 2])]
    images, boxes = torch.stack([image for image, _ in photos]), [box for _, box in photos]
    class_idx = torch.tensor([0, 1, 2, 0, 1, 2])
    found = find_pastes(Colors(), images, class_idx, boxes)
    assert found.tried in (4, 6)  # of an order that ends with two photos of one class, they stay alone
    assert 0 < len(found.images) < found.tried
    model = Colors()
    assert torch.equal(model(found.images).argmax(1), found.class_idx)
    for k, (host, source) in enumerate(found.photos.tolist()):
        assert (found.host_class[k], found.class_idx[k]) == (class_idx[host], class_idx[source])
        x0, y0, x1, y1 = found.boxes[k][0].int().tolist()
        changed = (found.images[k] != images[host]).any(0)
        assert changed[y0:y1, x0:x1].any()
        changed[y0:y1, x0:x1] = False
        assert not changed.any()
    of_pair = pd.Series([set(pair) for pair in found.photos.tolist()]).groupby(found.pairs.numpy())
    assert all(len(set().union(*sets)) == 2 for _, sets in of_pair)
    assert len(find_pastes(Averages(), images, class_idx, boxes).images) == 0
    wrong = find_pastes(Colors(), images, (class_idx + 1) % 3, boxes)  # the network is right on none
    assert len(wrong.images) == wrong.tried == 0
    small = [torch.tensor([[0.0, 0, 40, 31]])] * 6
    assert find_pastes(Colors(), images, class_idx, small).tried == 0


def test_boxes_go_by_their_place_and_are_checked():
    images = torch.stack([colored(k % 3, brightness=0.3 + 0.05 * k)[0] for k in range(6)])
    class_idx, boxes = torch.arange(6) % 3, [torch.tensor([[0.0, 0, 40 + k, 40]]) for k in range(6)]
    found, of_column = (
        find_pastes(Colors(), images, class_idx, some) for some in (boxes, pd.Series(boxes, index=range(5, -1, -1)))
    )
    assert len(found.images) > 0
    assert torch.equal(found.images, of_column.images)
    for wrong, told in (
        (boxes[:2], "6, got 2"),
        (boxes * 2, "6, got 12"),
        ([[0, 0, 9, 9]] * 6, "a sequence of tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^boxes: wanted {told}"):
            find_pastes(Colors(), images, class_idx, wrong)


def test_a_mosaic_is_verified_by_replacing_its_cells():
    images = torch.stack([colored(color % 3)[0] for color in range(3)] + [torch.full((3, 64, 64), 0.3).double()])
    classes = torch.tensor([0, 1, 2, 0])

    class Four(Colors):
        """The fourth class speaks for photos without any colour: no cell of a mosaic supports it."""

        def forward(self, images):
            logits = super().forward(images)
            return torch.cat([logits, 30 - 1e3 * (logits.amax(1, True) > 1)], 1)

    classes[3] = 3
    found = find_mosaics(Four(40), images, classes)
    assert found.images.shape == (1, 3, 128, 128)
    assert sorted(found.photos[0].tolist()) == [0, 1, 2, 3]
    assert torch.equal(found.class_idx, classes[found.photos])
    assert torch.equal(to_cells(found.images), images[found.photos[0]])
    assert found.verified[0].tolist() == [photo != 3 for photo in found.photos[0].tolist()]
    none = find_mosaics(Four(40), images[:2], classes[:2])
    assert none.images.shape == (0, 3, 128, 128)
    assert none.verified.shape == (0, 4)


def random_maps(count=4, size=(12, 16), seed=0):
    return torch.rand(count, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REGIONS = [torch.tensor([[2.0, 1, 9, 7]]), torch.tensor([[0.0, 0, 4, 4], [3, 2, 16, 6]]), *boxes_of(3, 2, (12, 16))]


def test_auroc_equals_the_comparison_of_all_pixels():
    maps = random_maps()
    maps[1] = (4 * maps[1]).round() / 4  # ties
    found = pixel_auroc(maps, REGIONS)
    expected = [references.pixel_auroc(S[0].numpy(), b.numpy()) for S, b in zip(maps, REGIONS, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert pixel_auroc(torch.ones(4, 1, 12, 16), REGIONS).tolist() == [0.5] * 4
    torch.testing.assert_close(pixel_auroc(maps**2, REGIONS), found)  # of the order only
    frame = [torch.tensor([[0.0, 0, 16, 12]]), torch.zeros(0, 4)]
    assert pixel_auroc(maps[:2], frame).isnan().all()
    assert math.isnan(pixel_auroc(maps[:1] * torch.nan, REGIONS[:1]).item())
    for number in (1, 5):
        with pytest.raises(ValueError, match=rf"^boxes: wanted 4, got {number}$"):
            pixel_auroc(maps, boxes_of(0, number))


@pytest.mark.slow
def test_scores_equal_the_formulas_and_are_scaled_from_a_uniform_map_to_the_best():
    maps, rivals = random_maps(), [random_maps(seed=1), random_maps(seed=2)]
    found = evidence_scores(maps, REGIONS, (3, 4), rivals)
    for i, box in enumerate(REGIONS):
        grid, b = maps[i, 0].numpy(), box.numpy()
        torch.testing.assert_close(
            best_map([box], (12, 16), (3, 4))[0, 0].double(),
            torch.from_numpy(references.best_map(b, 12, 16, 3, 4)),
            rtol=0,
            atol=1e-6,
        )
        energy, auroc = references.energy_pointing_game, references.pixel_auroc
        contrast = references.class_contrast(grid, [other[i, 0].numpy() for other in rivals], b)
        row = found.iloc[i]
        assert row.energy == pytest.approx(energy(grid, b), abs=1e-12)
        assert row.auroc == pytest.approx(auroc(grid, b), abs=1e-12)
        assert row.scaled_energy == pytest.approx(references.scaled(energy, grid, b, 3, 4), abs=1e-6)
        assert row.scaled_auroc == pytest.approx(references.scaled(auroc, grid, b, 3, 4), abs=1e-6)
        assert row.contrast == pytest.approx(contrast, abs=1e-12)
        best = energy(references.best_map(b, 12, 16, 3, 4), b)
        assert row.scaled_contrast == pytest.approx(contrast / best, abs=1e-6)
    flat = evidence_scores(torch.ones(4, 1, 12, 16), REGIONS, (3, 4))
    assert flat[["scaled_energy", "scaled_auroc"]].abs().max().max() < 1e-9
    assert "contrast" not in flat
    ideal = evidence_scores(best_map(REGIONS, (12, 16), (3, 4)), REGIONS, (3, 4))
    assert (ideal[["scaled_energy", "scaled_auroc"]] - 1).abs().max().max() < 1e-9


def test_maps_with_a_gradient_have_the_same_scores():
    maps = random_maps()
    found, wanted = (evidence_scores(S, REGIONS, (3, 4), [S**2]) for S in (maps.clone().requires_grad_(), maps))
    pd.testing.assert_frame_equal(found, wanted)


def test_a_map_that_does_not_know_the_class_has_no_contrast():
    maps = random_maps()
    assert class_contrast(maps, [maps, maps], REGIONS).abs().max() == 0
    with pytest.raises(ValueError, match="rivals: wanted at least one"):
        class_contrast(maps, [], REGIONS)
    with pytest.raises(TypeError, match="rivals: wanted a list of maps"):
        class_contrast(maps, maps, REGIONS)
    with pytest.raises(TypeError, match="rivals: wanted a list of maps"):
        evidence_scores(maps, REGIONS, (3, 4), maps)


def test_one_cell_leaves_no_room_between_a_uniform_map_and_the_best():
    found = evidence_scores(random_maps(), REGIONS, (1, 1))
    assert found[["scaled_energy", "scaled_auroc"]].isna().all().all()
    assert found[["energy", "auroc"]].notna().all().all()


def test_rows_of_maps_that_are_not_there_and_names_that_are_taken_are_refused():
    maps = {"a": random_maps()}
    with pytest.raises(ValueError, match="rivals: wanted those of a, got b"):
        evidence_rows(maps, REGIONS, (3, 4), {"b": [random_maps()]})
    for name in ("method", "energy"):
        with pytest.raises(ValueError, match=f"columns: wanted other names than auroc, .*, got {name}"):
            evidence_rows(maps, REGIONS, (3, 4), columns={name: list("wxyz")})


def test_rivals_and_controls_of_mosaics():
    maps = torch.arange(12.0).view(12, 1, 1, 1)  # three mosaics
    rivals = maps_of_other_cells(maps)
    for t in range(12):
        others = {rival[t].item() for rival in rivals}
        assert others == {float(u) for u in range(t // 4 * 4, t // 4 * 4 + 4) if u != t}
    other = maps_of_other_mosaics(maps).flatten().tolist()
    for m in range(3):
        assert sorted(other[4 * m : 4 * m + 4]) == [4.0 * ((m + 1) % 3) + k for k in range(4)]
    assert other == maps_of_other_mosaics(maps).flatten().tolist()
    with pytest.raises(ValueError, match="at least two mosaics, got 1"):
        maps_of_other_mosaics(maps[:4])
    for lacking in (maps[:3], maps[:0], maps[0]):
        for of_others in (maps_of_other_cells, maps_of_other_mosaics):
            with pytest.raises(ValueError, match=r"saliency: wanted maps \(4M,1,H,W\), 4 of each mosaic, got shape"):
                of_others(lacking)


def test_rows_of_methods_with_further_columns():
    maps, rivals = {"a": random_maps(), "b": random_maps(seed=3)}, {"a": [random_maps(seed=5)]}
    rows = evidence_rows(maps, REGIONS, (3, 4), rivals, {"image": list("wxyz"), "group": [0, 0, 1, 1]})
    assert rows.method.tolist() == ["a"] * 4 + ["b"] * 4
    assert rows.image.tolist() == list("wxyz") * 2
    more = difference_over_groups(rows, "energy", "a", "b")
    gaps = rows.energy[:4].to_numpy() - rows.energy[4:].to_numpy()
    assert more == pytest.approx((gaps.mean(), *interval(gaps.reshape(2, 2).mean(1))))
    assert rows.contrast.isna().tolist() == [False] * 4 + [True] * 4


def test_names_go_by_their_place():
    names = pd.Series(list("abcdwxyz"))[4:]
    rows = evidence_rows({"a": random_maps()}, REGIONS, (3, 4), columns={"image": names})
    assert rows.image.tolist() == list("wxyz")
    with pytest.raises(ValueError, match=r"^image: wanted 4, got 5$"):
        evidence_rows({"a": random_maps()}, REGIONS, (3, 4), columns={"image": [*"abcde"]})


def test_the_object_that_is_pasted_is_the_one_that_is_large_enough():
    """A long thin one has the larger area."""
    boxes = [torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[0.0, 0, 33, 33], [5, 50, 195, 58]])]
    images = torch.stack([colored(color, 200)[0] for color in (0, 1)])
    assert find_pastes(Colors(), images, torch.tensor([0, 1]), boxes).tried == 0
    assert find_pastes(Colors(), images, torch.tensor([0, 1]), [boxes[0], boxes[1][:1]]).tried == 2
    for share in (0, 1.6):
        with pytest.raises(ValueError, match=r"^share: "):
            paste_object(*images, boxes[0], share=share)


def test_maps_of_controls_and_cells(network):
    images, class_idx = cells(2), torch.tensor([0, 1])
    assert (uniform(network, images, class_idx) == 0.5).all()
    S = centred(network, images, class_idx)
    assert S.shape == (2, 1, 16, 16)
    assert S[0, 0, 3, 5].item() == pytest.approx(math.exp(-((3.5 - 8) ** 2 + (5.5 - 8) ** 2) / (2 * 4**2)), abs=1e-6)
    assert cell_means(torch.arange(16.0).view(1, 1, 4, 4), 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
