from pathlib import Path

import numpy as np
import pytest
import references
import torch
from conftest import TinyCNN
from torch import nn

from opticam import METHODS, opti_cam
from opticam.saliency import apply_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "opticam_minmax_mask.npz"


class Published(nn.Module):
    """The network of the golden file."""

    def __init__(self, golden) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(12, 5)
        self.double()
        weights = {name.removeprefix("weights/"): torch.from_numpy(golden[name]) for name in golden if "/" in name}
        self.load_state_dict(weights)
        self.register_buffer("shift", torch.from_numpy(golden["mean"])[:, None, None])
        self.register_buffer("scale", torch.from_numpy(golden["std"])[:, None, None])

    def forward(self, images):
        return self.fc(self.features((images - self.shift) / self.scale).mean((2, 3)))


def test_agrees_with_the_published_code():
    golden = np.load(GOLDEN)
    model = Published(golden)
    images, class_idx = torch.from_numpy(golden["images"]), torch.from_numpy(golden["class_idx"])
    num_steps, lr = int(golden["steps"]), float(golden["lr"])
    result = opti_cam(model, images, class_idx, layer="features", num_steps=num_steps, lr=lr)
    np.testing.assert_allclose(result.saliency, golden["saliency"], rtol=0, atol=1e-9)
    with torch.no_grad():
        masked_logits = model(images * result.saliency)
    np.testing.assert_allclose(masked_logits, golden["masked_logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("depth", [3, 4])
def test_agrees_with_the_loop_version(tiny, images, class_idx, depth):
    # before the last ReLU the feature maps have both signs
    layer, tiny.head = ("features" if depth == 4 else "features.2"), tiny.features[:depth]
    result = opti_cam(tiny, images[:2], class_idx[:2], layer=layer, num_steps=4, lr=0.3)
    for b in range(2):
        image, label = images[b].numpy(), int(class_idx[b])
        u = references.opti_cam(tiny, tiny.head, image, label, num_steps=4, lr=0.3)
        features = tiny.head(images[b : b + 1])[0].detach().numpy()
        np.testing.assert_allclose(result.weights[b], references.softmax(u), rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            result.saliency[b, 0], references.opti_cam_map(features, u, 24, 32), rtol=0, atol=1e-5
        )


def test_objective_is_the_logit_of_the_masked_image(tiny, images, class_idx):
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=12)
    masked = tiny(apply_mask(images, result.saliency)).gather(1, class_idx[:, None])[:, 0]
    torch.testing.assert_close(result.objective.amax(1), masked, rtol=0, atol=1e-12)
    assert (result.objective.amax(1) > result.objective[:, 0]).all()


def test_a_batch_of_five_equals_five_batches_of_one(tiny, images, class_idx):
    batch = opti_cam(tiny, images, class_idx, layer="features", num_steps=30)
    for b in range(5):
        single = opti_cam(tiny, images[b : b + 1], class_idx[b : b + 1], layer="features", num_steps=30)
        for of_batch, alone in zip(batch, single, strict=True):
            torch.testing.assert_close(of_batch[b], alone[0], rtol=0, atol=1e-10)


def test_neighbours_do_not_matter_even_if_they_dwarf_the_image(tiny, images, class_idx):
    torch.manual_seed(2)
    loud = nn.Sequential(tiny.features, nn.Flatten(2), _Mean(), tiny.fc)
    batch = torch.cat([images[:1], 1e3 * images[1:]])
    together = opti_cam(loud, batch, class_idx, layer="0", num_steps=20).saliency[0]
    alone = opti_cam(loud, batch[:1], class_idx[:1], layer="0", num_steps=20).saliency[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


class _Mean(nn.Module):
    def forward(self, tokens):
        return tokens.mean(2)


class OneChannelMatters(nn.Module):
    """Feature map 0 covers the left half, 1 the right half, 2 the top; each class counts one side against the other."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = _Halves()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images):
        self.maps(images)
        left, right = images.chunk(2, dim=3)
        return self.scale * torch.stack([(left - right).mean((1, 2, 3)), (right - left).mean((1, 2, 3))], 1)


class _Halves(nn.Module):
    def forward(self, images):
        left = torch.zeros(len(images), 1, 4, 4, dtype=images.dtype)
        left[..., :2] = 1
        return torch.cat([left, 1 - left, left.mT], 1)


@pytest.mark.parametrize("label", [0, 1])
def test_the_one_feature_map_that_helps_gets_the_weight(label):
    images = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    result = opti_cam(OneChannelMatters(), images, torch.tensor([label]), layer="maps", num_steps=200)
    assert result.weights[0, label] > 0.97
    assert result.saliency[0, 0, :, :4].mean() == pytest.approx(1 - label, abs=0.01)
    assert result.saliency[0, 0, :, -4:].mean() == pytest.approx(label, abs=0.01)


def test_the_best_map_seen_is_kept(tiny, images, class_idx):
    wild = opti_cam(tiny, images, class_idx, layer="features", num_steps=15, lr=30.0)
    assert (wild.objective.argmax(1) == wild.num_steps).all()
    assert (wild.num_steps < 15).any()  # such a learning rate overshoots, else this test shows nothing
    for b in range(5):
        t = int(wild.num_steps[b])
        stopped = opti_cam(tiny, images[b : b + 1], class_idx[b : b + 1], layer="features", num_steps=t, lr=30.0)
        torch.testing.assert_close(wild.saliency[b], stopped.saliency[0], rtol=0, atol=1e-9)


def test_zero_steps_give_equal_weights(tiny, images, class_idx):
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=0)
    assert (result.weights == 1 / 6).all()
    assert result.objective.shape == (5, 1)


def test_constant_feature_maps_give_zeros(images, class_idx):
    model = TinyCNN().double()
    with torch.no_grad():
        model.features[2].weight.zero_()
        model.features[2].bias.fill_(0.3)
    result = opti_cam(model, images, class_idx, layer="features", num_steps=5)
    assert (result.saliency == 0).all()
    assert result.objective.isfinite().all()
    assert (result.weights == 1 / 6).all()


def test_a_network_that_returns_nan_gives_a_finite_map(tiny, images, class_idx):
    with torch.no_grad():
        tiny.fc.bias.fill_(torch.nan)
    result = opti_cam(tiny, images, class_idx, layer="features", num_steps=2)
    assert result.objective.isnan().all()
    assert result.saliency.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_networks(images, class_idx, dtype):
    torch.manual_seed(0)
    model = TinyCNN().to(dtype)
    result = opti_cam(model, images.to(dtype), class_idx, layer="features", num_steps=5)
    assert result.saliency.dtype == result.weights.dtype == torch.float32
    assert result.saliency.amin() == 0
    assert result.saliency.amax() == 1
    exact = opti_cam(model.double(), images, class_idx, layer="features", num_steps=5).objective
    torch.testing.assert_close(result.objective.double(), exact, rtol=0, atol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps: wanted at least 0, got -1"),
        ({"lr": 0.0}, "lr: wanted a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr: wanted a positive number"),
        ({"class_idx": torch.tensor([0, 1, 2, 3, 5])}, "class_idx: wanted indices in 0..4, got 5"),
        ({"class_idx": torch.tensor([0, 1, 2, 3, -1])}, "class_idx: wanted indices in 0..4, got -1"),
        ({"layer": "layer4"}, "layer: no 'layer4' in TinyCNN"),
    ],
)
def test_bad_input_in_one_sentence(tiny, images, class_idx, change, message):
    given = {"class_idx": class_idx, "layer": "features", **change}
    with pytest.raises(ValueError, match=message):
        opti_cam(tiny, images, **given)


def test_methods_entry_is_the_map_of_the_record(tiny, images, class_idx):
    saliency = METHODS["opti_cam"](tiny, images, class_idx, layer="features", num_steps=3)
    assert torch.equal(saliency, opti_cam(tiny, images, class_idx, layer="features", num_steps=3).saliency)
