import copy
import math
from functools import partial

import numpy as np
import pytest
import references
import torch
from torch.nn import functional as F
from torchvision.tv_tensors import BoundingBoxes

from opticam import metrics
from opticam.lab.evaluation import score
from opticam.lab.files import REPOSITORY
from opticam.metrics import (
    box_experiment_masks,
    box_hits,
    box_mask,
    energy_pointing_game,
    localization_error,
    max_box_accuracy,
    official_metric,
    pointing_game,
    predicted_box,
    saliency_metric,
    soft_f1,
)

PER_IMAGE = ["localization_error", "soft_f1", "energy_pointing_game", "pointing_game"]
H, W = 18, 26  # not square, and smaller than twice the tolerance


def random_maps(n, seed=0):
    """Smooth maps over [0,1], and boxes: fractional, overlapping, partly and wholly outside."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 4, 6, dtype=torch.float64, generator=generator)
    maps = F.interpolate(coarse, size=(H, W), mode="bicubic").clamp(0, 1)
    corners = torch.rand(n, 3, 2, 2, dtype=torch.float64, generator=generator).sort(2).values
    frame = torch.tensor([W, H])
    boxes = (corners * 1.5 - 0.25).mul(frame).flatten(2)
    boxes[:, 0] = boxes[:, 0].round()
    boxes[1, 2] = torch.tensor([-20.0, 2, -3.2, 12])
    return maps, [box[: 1 + i % 3] for i, box in enumerate(boxes)]


def blank(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 1, H, W).clone()


def box(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def golden():
    data = np.load(REPOSITORY / "tests" / "golden" / "localization.npz")
    maps = torch.from_numpy(data["saliency"].astype("float32"))[:, None]
    return data, maps, [torch.from_numpy(boxes[boxes[:, 0] >= 0]) for boxes in data["boxes"]]


def test_equals_published_predicted_box():
    data, maps, _ = golden()
    ends = predicted_box(maps) + torch.tensor([0, 0, 1, 1])
    drawn = box_mask(ends[:, None].double(), maps.shape[-2:])
    assert np.array_equal(drawn[:, 0].numpy(), data["casme_rectangle"])


def test_equals_published_localization_error_official_metric_and_f1():
    data, maps, boxes = golden()
    assert localization_error(maps, boxes).tolist() == data["LE"].tolist()
    correct = torch.from_numpy(data["classified_correctly"])
    assert official_metric(maps, boxes, correct).tolist() == data["OM"].tolist()
    # 1e-6 in both denominators of the published code: at most 2pr/(p + r)^2 * 1e-6 <= 5e-7, and 1e-6/sum S more
    assert np.abs(soft_f1(maps, boxes).numpy() - data["F1"]).max() < 6e-7


@pytest.mark.slow
def test_equals_published_max_box_accuracy():
    data, maps, boxes = golden()
    total = box_hits(maps, boxes).sum(0)
    assert (total.amax(1) * 100 / len(maps)).tolist() == [data["max_box_acc"], *data["max_box_acc_v2"]]
    assert max_box_accuracy(total, len(maps)) == pytest.approx((0.6, (0.7 + 0.6 + 0.5) / 3), abs=1e-15)


def test_predicted_box_equals_reference():
    maps, _ = random_maps(30)
    maps[20:] = (maps[20:] * 4).round() / 4  # with ties
    expected = [references.predicted_box(grid) for grid in maps[:, 0].numpy()]
    assert [tuple(found) for found in predicted_box(maps).tolist()] == expected
    assert len(set(expected)) > 20


@pytest.mark.parametrize("name", PER_IMAGE)
def test_equals_reference(name):
    maps, boxes = random_maps(12)
    reference = getattr(references, name)
    if name == "pointing_game":
        maps = (maps * 4).round() / 4  # with ties
        reference = partial(reference, tolerance=4.5)
        found = pointing_game(maps, boxes, 4.5)
    else:
        found = getattr(metrics, name)(maps, boxes)
    numbers = [truth.numpy() for truth in boxes]
    expected = [reference(grid, truth) for grid, truth in zip(maps[:, 0].numpy(), numbers, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)
    assert len(set(expected)) > (1 if name == "localization_error" else 6)


@pytest.mark.slow
def test_hits_of_all_contours_equal_reference():
    maps, boxes = random_maps(4)
    maps[0, :, 3:14, 3:20] = 0.8
    maps[0, :, 5:12, 6:15] = 0.1  # a hole, whose inner border is a contour too
    boxes[0] = box(5, 4, 15, 12)
    found = box_hits(maps, boxes, 20)[:, 1:].numpy()
    for hits, grid, truth in zip(found, maps[:, 0].numpy(), boxes, strict=True):
        assert np.array_equal(hits, references.all_contour_hits(grid, truth.numpy(), 20))
    assert 0 < found[0].sum() < found[0].size


def test_every_threshold_is_as_if_computed_alone():
    # most of 1000 thresholds share a level: threshold t of T is threshold 0 of a map that is cut at that level
    maps, boxes = random_maps(2, seed=3)
    hits = box_hits(maps, boxes)
    for i in range(2):
        gray = (maps[i : i + 1] * 255).floor()
        for t in range(0, 1000, 37):
            cut = (gray > math.floor(t * 0.001 * gray.max().item())).double()
            assert torch.equal(box_hits(cut, boxes[i : i + 1], 1)[0, :, 0], hits[i, :, t])


def test_saliency_metric_equals_reference(tiny, images, class_idx):
    maps, _ = random_maps(5)
    maps = F.interpolate(maps, size=(24, 32), mode="nearest")
    maps[3] = 0
    maps[4] = 0
    maps[4, :, 2:5, 7:9] = 1
    expected = [
        references.saliency_metric(tiny, image, c, grid)
        for image, c, grid in zip(images.numpy(), class_idx.tolist(), maps[:, 0].numpy(), strict=True)
    ]
    found = saliency_metric(tiny, images, class_idx, maps)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_worked_example_of_the_predicted_box():
    # 12 pixels, mean 4.5/12 = 0.375: rank 1 + int(11 * 0.625 + 0.5) = 8 from below is 0.2; above it are four pixels
    # in two components, of three and of one, which touch at a corner only; rank 7 would keep the 0.2, which joins them
    grid = torch.tensor([[0.1, 0.9, 0.9, 0.1], [0.2, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert grid.sum() == pytest.approx(4.5)
    assert predicted_box(grid[None, None]).tolist() == [[1, 0, 2, 1]]


def test_worked_example_of_scores():
    # S = 1/2 on 4x2 pixels, columns 2..5 and rows 1..2, and 1 in the pixel (column 9, row 9); box: columns 2..5, row 2
    # and row 3. sum S = 5, sum S*B = 4/2 = 2, |B| = 8: F1 = 2*2/(5 + 8), EP = 2/5
    saliency = blank(0)
    saliency[0, 0, 1:3, 2:6] = 0.5
    saliency[0, 0, 9, 9] = 1
    truth = [box(2, 2, 6, 4)]
    assert soft_f1(saliency, truth).item() == pytest.approx(4 / 13, abs=1e-15)
    assert energy_pointing_game(saliency, truth).item() == pytest.approx(0.4, abs=1e-15)
    # the maximum is 9 - 5 = 4 columns and 9 - 3 = 6 rows from the box: sqrt(16 + 36) = 7.21...
    assert pointing_game(saliency, truth, math.sqrt(52)).item() == 1
    assert pointing_game(saliency, truth, 7.2).item() == 0


def test_half_is_not_enough_for_localization_error_but_for_max_box_accuracy():
    # LE: 4x4 predicted, 4x8 box around it: IoU exactly 1/2
    saliency = blank(0)
    saliency[0, 0, 4:8, 4:8] = 1
    assert localization_error(saliency, [box(4, 4, 12, 8)]).item() == 1
    assert localization_error(saliency, [box(4, 4, 11, 8)]).item() == 0
    # BA: the predicted box ends at 8, 5x5 pixels counting both ends; a box to (13, 8) has 10x5
    hits = box_hits(saliency, [box(4, 4, 13, 8)], 10)
    assert hits.all(2).tolist() == [[True, True, True, False]]
    assert not box_hits(saliency, [box(4, 4, 14, 8)], 10)[0, [0, 2]].any()  # 25/55


def test_first_row_takes_the_contour_of_largest_area_and_the_others_the_best():
    saliency = blank(0)
    saliency[0, 0, 2:5, 2:5] = 1
    saliency[0, 0, 8:15, 8:20] = 1
    small = box_hits(saliency, [box(2, 2, 5, 5)], 10)[0]  # of the small one exactly, as its end moves on by one
    assert small.any(1).tolist() == [False, True, True, True]
    assert small.all(1).tolist() == [False, True, True, True]
    assert box_hits(saliency, [box(8, 8, 20, 15)], 10).all()


def test_thresholds_are_strict_and_relative_to_the_maximum():
    # 8-bit values 100 and 50, T = 4: levels 0, 25, 50, 75; the 50 are kept only at the first two
    saliency = blank(0)
    saliency[0, 0, 2:16, 2:24] = 50.5 / 255
    saliency[0, 0, 5:8, 5:8] = 100.5 / 255
    assert box_hits(saliency, [box(2, 2, 24, 16)], 4)[0, 3].tolist() == [True, True, False, False]
    assert box_hits(saliency, [box(5, 5, 8, 8)], 4)[0, 3].tolist() == [False, False, True, True]


def test_accuracy_takes_the_best_threshold_of_each_row():
    # 4 images: row 0 best 3/4; V2 (4/4 + 2/4 + 1/4)/3 = 7/12, each at another threshold
    hits_sum = torch.tensor([[1, 3, 0], [4, 0, 0], [0, 2, 1], [0, 0, 1]])
    assert max_box_accuracy(hits_sum, 4) == pytest.approx((0.75, 7 / 12), abs=1e-15)


def test_shards_add_up():
    maps, boxes = random_maps(6)
    whole = box_hits(maps, boxes, 50)
    parts = [box_hits(maps[i : i + 2], boxes[i : i + 2], 50).sum(0) for i in (4, 0, 2)]
    assert torch.equal(whole.sum(0), sum(parts))
    assert whole.any()


def test_perfect_map():
    truth = [box(3, 5, 15, 9)]  # 12 wide, 4 high: rows and columns swapped, it would miss
    saliency = box_mask(truth, (H, W)).double()
    assert predicted_box(saliency).tolist() == [[3, 5, 14, 8]]
    assert localization_error(saliency, truth).item() == 0
    assert official_metric(saliency, truth, torch.tensor([True])).item() == 0
    assert soft_f1(saliency, truth).item() == 1
    assert energy_pointing_game(saliency, truth).item() == 1
    assert pointing_game(saliency, truth, 0).item() == 1
    # with the end moved on: 12x4 pixels and 13x5 counting both ends on both sides
    assert box_hits(saliency, truth, 10).all()


def test_worst_map():
    truth = [box(3, 2, 8, 5)]
    saliency = blank(0)
    saliency[0, 0, 14:, 22:] = 1
    assert localization_error(saliency, truth).item() == 1
    assert official_metric(saliency, truth, torch.tensor([True])).item() == 1
    assert soft_f1(saliency, truth).item() == 0
    assert energy_pointing_game(saliency, truth).item() == 0
    assert pointing_game(saliency, truth).item() == 0  # 22 - 7 = 15 columns, 14 - 4 = 10 rows
    assert not box_hits(saliency, truth, 10).any()


def test_official_metric_needs_the_class():
    truth = [box(3, 5, 15, 9), box(3, 5, 15, 9), box(15, 9, 20, 12), torch.zeros(0, 4)]
    saliency = box_mask([truth[0]] * 4, (H, W)).double()
    found = official_metric(saliency, truth, torch.tensor([True, False, True, False]))
    assert found[:3].tolist() == [0, 1, 1]
    assert found[3].isnan()


def test_what_was_cropped_away_counts():
    # 8x6 pixels, columns -4..3: half of them outside, and the map fills the inner half
    truth = [box(-4, 2, 4, 8)]
    saliency = blank(0)
    saliency[0, 0, 2:8, :4] = 1
    assert localization_error(saliency, truth).item() == 1  # IoU 24/48
    assert soft_f1(saliency, truth).item() == pytest.approx(2 * 24 / (24 + 48), abs=1e-15)
    assert energy_pointing_game(saliency, truth).item() == 1
    assert box_mask(truth, (H, W)).sum() == 24


def test_box_wholly_outside():
    for outside in (box(-9, 2, -1, 8), box(W, 2, W + 5, 8), box(3, -9, 8, 0), box(3, H, 8, H + 4)):
        ones = blank(1)
        assert localization_error(ones, [outside]).item() == 1
        assert soft_f1(ones, [outside]).item() == 0
        assert energy_pointing_game(ones, [outside]).item() == 0
        assert pointing_game(ones, [outside]).item() == 0
        assert box_mask([outside], (H, W)).sum() == 0


@pytest.mark.parametrize("far", [2.0**32, 1e30, 3e38])
def test_boxes_that_reach_very_far(far):
    """A box all around the image holds it all, and next to nothing of the box is in the image."""
    maps, boxes = torch.ones(1, 1, 8, 10), [box(-far, -far, far, far)]
    assert energy_pointing_game(maps, boxes).item() == pointing_game(maps, boxes).item() == 1
    assert box_mask(boxes, (8, 10)).all()
    assert 0 < soft_f1(maps, boxes).item() < 1e-9
    assert 0 < soft_f1(maps, [torch.tensor([[0, 0, 2**32, 2**32]])]).item() < 1e-9
    assert localization_error(maps, boxes).item() == 1
    assert not box_hits(maps, boxes, 5).any()


def test_share_of_tied_maxima():
    saliency = blank(0.2)
    saliency[0, 0, 1, [1, 2, 20, 24]] = 0.7
    assert pointing_game(saliency, [box(0, 0, 2, 2)], 0).item() == 0.25
    assert pointing_game(saliency, [box(0, 0, 2, 2)], 1).item() == 0.5
    assert pointing_game(saliency, [torch.cat([box(0, 0, 2, 2), box(20, 0, 21, 2)])], 1).item() == 0.75


def test_constant_map_wins_no_more_than_its_share():
    # box of 5x3, tolerance 1: 5*3 + 2*5 + 2*3 = 31 pixels of 18*26
    for value in (0, 0.5, 1):
        assert pointing_game(blank(value), [box(10, 8, 15, 11)], 1).item() == pytest.approx(31 / (H * W), abs=1e-15)


def test_constant_map_predicts_nothing_but_ones_the_frame():
    assert predicted_box(blank(0, 0.5, 1)).tolist() == [[0, 0, -1, -1]] * 2 + [[0, 0, W - 1, H - 1]]
    frame = [box(0, 0, W, H)] * 3
    assert localization_error(blank(0, 0.5, 1), frame).tolist() == [1, 1, 0]
    assert soft_f1(blank(0, 0.5, 1), frame).tolist() == pytest.approx([0, 2 / 3, 1], abs=1e-15)
    assert energy_pointing_game(blank(0, 0.5, 1), frame).tolist() == [0, 1, 1]
    assert box_hits(blank(0, 0.5, 1), frame, 5).all(2).all(1).tolist() == [False, True, True]


def test_component_of_equal_size_is_the_first_in_reading_order():
    saliency = blank(0)
    saliency[0, 0, 9:12, 1:3] = 1
    saliency[0, 0, 4:6, 20:23] = 1
    assert predicted_box(saliency).tolist() == [[20, 4, 22, 5]]


def test_saliency_metric_by_hand(class_idx):
    class Bright(torch.nn.Module):
        """Two classes; the probability of class 1 is the brightness of the image."""

        def forward(self, images):
            p = images.mean((1, 2, 3))
            return torch.stack([1 - p, p], 1).log()

    images = torch.full((3, 3, H, W), 0.25, dtype=torch.float64)
    images[:, :, 2:11, 0:13] = 0.5
    saliency = blank(0, 0, 0)
    saliency[0, 0, 2:11, 0:13] = 1  # a quarter of the frame, 9*13 of 18*26, of brightness 1/2
    saliency[1, 0, 4, 5] = 1  # one pixel, which counts as a twentieth
    # third: nothing predicted, the whole image: a quarter at 1/2, the rest at 1/4
    found = saliency_metric(Bright(), images, torch.tensor([1, 1, 1]), saliency)
    expected = [math.log(0.25) - math.log(0.5), math.log(0.05) - math.log(0.5), -math.log(0.3125)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_saliency_metric_is_of_the_network_in_eval_mode(tiny, images, class_idx):
    saliency = torch.ones(5, 1, 24, 32, dtype=torch.float64)
    network = torch.nn.Sequential(tiny, torch.nn.Dropout(0.9)).train()
    expected = saliency_metric(tiny, images, class_idx, saliency)
    assert torch.equal(saliency_metric(network, images, class_idx, saliency), expected)


def test_saliency_metric_leaves_the_model_as_it_was(tiny, images, class_idx):
    saliency = torch.rand(5, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tiny.train()
    tiny.fc.eval()
    tiny.fc.bias.requires_grad_(False)
    before = copy.deepcopy(tiny.state_dict())

    def flags():
        return [m.training for m in tiny.modules()], [p.requires_grad for p in tiny.parameters()]

    wanted = flags()
    assert not saliency_metric(tiny, images, class_idx, saliency).requires_grad
    with pytest.raises(ValueError, match=r"class_idx: wanted indices in 0..4, got 9"):
        saliency_metric(tiny, images, class_idx + 5, saliency)
    handle = tiny.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saliency_metric(tiny, images, class_idx, saliency)
    handle.remove()
    assert flags() == wanted
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_image_without_box_or_with_nan_is_nan():
    maps, boxes = random_maps(4)
    boxes[1] = torch.zeros(0, 4)
    maps[2, 0, 3, 3] = math.nan
    for name in PER_IMAGE:
        assert getattr(metrics, name)(maps, boxes).isnan().tolist() == [False, True, True, False]
    correct = torch.tensor([False, False, False, True])
    assert official_metric(maps, boxes, correct).isnan().tolist() == [False, True, True, False]
    assert not box_hits(maps, boxes, 5)[[1, 2]].any()
    assert predicted_box(maps)[2].tolist() == [0, 0, -1, -1]


def test_nan_in_the_map_is_nan_in_the_saliency_metric(tiny, images, class_idx):
    saliency = torch.ones(5, 1, 24, 32, dtype=torch.float64)
    saliency[3, 0, 0, 0] = math.nan
    assert saliency_metric(tiny, images, class_idx, saliency).isnan().tolist() == [False, False, False, True, False]


def test_batch_equals_singles(tiny, images, class_idx):
    maps, boxes = random_maps(5)
    for metric in (
        localization_error,
        soft_f1,
        energy_pointing_game,
        pointing_game,
        partial(box_hits, num_thresholds=20),
        lambda saliency, _: predicted_box(saliency),
    ):
        singles = [metric(maps[i : i + 1], boxes[i : i + 1]) for i in range(5)]
        assert torch.equal(metric(maps, boxes), torch.cat(singles))
    maps = F.interpolate(maps, size=(24, 32))
    singles = [saliency_metric(tiny, images[i][None], class_idx[i][None], maps[i][None]) for i in range(5)]
    torch.testing.assert_close(saliency_metric(tiny, images, class_idx, maps), torch.cat(singles), rtol=0, atol=1e-13)


def test_box_mask_holds_the_pixels_whose_centres_it_holds():
    boxes = [box(1.5, 0.4, 3.5, 2.6), torch.cat([box(0, 0, 1, 1), box(0, 0, 2, 1), box(3, 2, 9, 9)]), torch.zeros(0, 4)]
    # columns 1 and 2 (centres 1.5, in, to 3.5, out), rows 0 to 2 (centre 2.5 is in)
    assert box_mask(boxes, (3, 5))[:, 0].tolist() == [
        [[0, 1, 1, 0, 0]] * 3,
        [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
        [[0, 0, 0, 0, 0]] * 3,
    ]


def test_masks_of_the_box_experiment(tiny, images, class_idx):
    maps, boxes = random_maps(5)
    saliency = F.interpolate(maps, size=(24, 32))
    masks = box_experiment_masks(saliency, boxes)
    inside = box_mask(boxes, (24, 32)).double()
    assert list(masks) == ["B", "1-B", "S", "S*(1-B)", "S*B"]
    assert torch.equal(masks["B"], inside)
    assert torch.equal(masks["1-B"] + masks["B"], torch.ones_like(saliency))
    assert torch.equal(masks["S*B"], saliency.where(inside == 1, 0))
    assert torch.equal(masks["S*(1-B)"] + masks["S*B"], saliency)
    assert torch.equal(masks["S"], saliency)
    for mask in masks.values():
        assert mask.dtype == saliency.dtype
        assert len(score(tiny, images, class_idx, mask)) == 5


def test_arguments_are_left_alone():
    maps, boxes = random_maps(4)
    before = maps.clone(), [truth.clone() for truth in boxes]
    for name in PER_IMAGE:
        getattr(metrics, name)(maps, boxes)
    box_hits(maps, boxes, 5)
    box_experiment_masks(maps, boxes)
    assert torch.equal(maps, before[0])
    assert all(torch.equal(a, b) for a, b in zip(boxes, before[1], strict=True))


@pytest.mark.parametrize("name", [*PER_IMAGE, "box_hits", "box_experiment_masks"])
def test_bad_input(name):
    metric, maps, boxes = getattr(metrics, name), blank(0.5, 1), [box(1, 1, 4, 4)] * 2
    with pytest.raises(TypeError, match=r"saliency: wanted a tensor \(B,1,H,W\), got ndarray"):
        metric(maps.numpy(), boxes)
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(B,1,H,W\)"):
        metric(maps[:, 0], boxes)
    with pytest.raises(ValueError, match=r"saliency: wanted values in \[0,1\], got \[0.5, 2\]"):
        metric(torch.cat([maps[:1], 2 * maps[1:]]), boxes)
    with pytest.raises(TypeError, match=r"saliency: wanted a floating-point dtype, got torch.bool"):
        metric(maps > 0.2, boxes)
    with pytest.raises(ValueError, match=r"boxes: wanted one tensor \(n,4\) an image, 2, got 1"):
        metric(maps, boxes[:1])
    with pytest.raises(ValueError, match=r"boxes: wanted one tensor \(n,4\) an image, got one tensor"):
        metric(maps, torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"^boxes: wanted a sequence of tensors \(n,4\), got a NoneType$"):
        metric(maps, None)
    with pytest.raises(TypeError, match=r"boxes: wanted a sequence of tensors \(n,4\), got a list in it"):
        metric(maps, [[1, 1, 4, 4]] * 2)
    with pytest.raises(ValueError, match=r"boxes: wanted tensors \(n,4\), one an image, got shape \(4,\)"):
        metric(maps, [boxes[0][0]] * 2)
    with pytest.raises(ValueError, match="boxes: wanted finite xmin <= xmax and ymin <= ymax"):
        metric(maps, [boxes[0], box(1, 4, 4, 1)])
    with pytest.raises(ValueError, match="boxes: wanted finite"):
        metric(maps, [boxes[0], box(1, 1, math.inf, 4)])
    with pytest.raises(ValueError, match="boxes: wanted pixels, got fractions"):
        metric(maps, [boxes[0], box(0.25, 0, 1, 0.5)])
    with pytest.raises(ValueError, match=r"^saliency: tensors on the meta device have no values"):
        metric(maps.to("meta"), boxes)
    with pytest.raises(TypeError, match=r"^saliency: wanted a strided tensor, got torch\.sparse_coo$"):
        metric(maps.to_sparse(), boxes)
    with pytest.raises(ValueError, match=r"^boxes: tensors on the meta device have no values"):
        metric(maps, [boxes[0], boxes[1].to("meta")])
    with pytest.raises(TypeError, match=r"^boxes: wanted real numbers, got torch\.complex128$"):
        metric(maps, [boxes[0], boxes[1] + 0j])
    for form in ("XYWH", "CXCYWH"):
        with pytest.raises(ValueError, match=rf"^boxes: wanted format XYXY, got {form}$"):
            metric(maps, [boxes[0], BoundingBoxes(box(1, 1, 4, 4), format=form, canvas_size=(H, W))])
    metric(maps, [boxes[0], BoundingBoxes(box(1, 1, 4, 4), format="XYXY", canvas_size=(H, W))])
    metric(maps, [box(0, 0, 1, 1), box(-9.5, -9.5, 0.5, 0.5)])  # one pixel, and what was cropped away


def test_bad_input_of_single_metrics(tiny, images, class_idx):
    maps, boxes = blank(0.5, 1), [box(1, 1, 4, 4)] * 2
    with pytest.raises(TypeError, match=r"correct: wanted a bool tensor, got torch.int64"):
        official_metric(maps, boxes, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"correct: wanted shape \(2,\), got \(3,\)"):
        official_metric(maps, boxes, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^saliency: wanted a tensor"):
        official_metric(None, boxes, torch.ones(2, dtype=torch.bool))
    for arguments, name in (((None, 1), "hits_sum"), ((torch.zeros(4, 7), None), "num_images")):
        with pytest.raises(TypeError, match=f"^{name}: wanted a "):
            max_box_accuracy(*arguments)
    for size in (None, 8, (8, 8, 8), (8.5, 8), (0, 8)):
        with pytest.raises(ValueError, match=r"^size: wanted "):
            metrics.box_mask(boxes, size)
    with pytest.raises(ValueError, match="tolerance: wanted a distance in pixels from 0 on, got -1"):
        pointing_game(maps, boxes, -1)
    with pytest.raises(TypeError, match="tolerance: wanted a number, got '15'"):
        pointing_game(maps, boxes, "15")
    with pytest.raises(ValueError, match="num_thresholds: wanted at least 1, got 0"):
        box_hits(maps, boxes, 0)
    with pytest.raises(ValueError, match=r"saliency: wanted shape \(5, 1, 24, 32\), got \(2, 1, 18, 26\)"):
        saliency_metric(tiny, images, class_idx, maps)
    with pytest.raises(ValueError, match=r"hits_sum: wanted shape \(4,T\), got \(3, 7\)"):
        max_box_accuracy(torch.zeros(3, 7), 1)
    with pytest.raises(ValueError, match=r"num_images: wanted at least 1 and no fewer than hits \(2\), got 1"):
        max_box_accuracy(torch.full((4, 7), 2), 1)
    with pytest.raises(ValueError, match="num_images: wanted at least 1"):
        max_box_accuracy(torch.zeros(4, 7), 0)
    for number in (2.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"num_images: wanted a whole number, got {number}"):
            max_box_accuracy(torch.ones(4, 7), number)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="hits_sum: wanted finite numbers from 0 on, got "):
            max_box_accuracy(torch.full((4, 7), value), 2)


@pytest.mark.slow
def test_half_precision_maps_are_truncated_as_they_are():
    maps = torch.rand(4, 1, 24, 32, generator=torch.Generator().manual_seed(3)).half()
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 16.0]])] * 4
    assert ((maps * 255).byte() != (maps.double() * 255).byte()).float().mean() > 0.01  # or nothing is tested
    assert torch.equal(box_hits(maps, boxes), box_hits(maps.double(), boxes))


def test_any_tolerance_is_a_distance():
    S, boxes = torch.rand(1, 1, 8, 8), [torch.tensor([[2.0, 2, 3, 3]])]
    assert pointing_game(S, boxes, tolerance=10**10).tolist() == [1]
