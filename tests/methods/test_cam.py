from functools import partial

import numpy as np
import pytest
import references
import torch
from torch import nn

from opticam import METHODS, fake_cam, grad_cam, load_model, opti_cam, wrap
from opticam.features import feature_maps, resolve_layer
from opticam.lab.datasets import demo
from opticam.methods import find_methods, one_per_map
from opticam.methods.cam import ablation_cam, eigen_cam, finer_cam, refine_cam, score_cam
from opticam.saliency import combine, min_max, saliency_map

BY_GRADIENTS = ["grad_cam", "grad_cam_plus_plus", "x_grad_cam", "hires_cam", "layer_cam"]
DEPTHS = {"features.0": 1, "features": 4}  # after one convolution gradients differ from place to place; both signs


def head_of(tiny, depth):
    return lambda features: tiny.fc(tiny.features[depth:](features).mean((2, 3)))


@pytest.fixture(params=[pytest.param("features.0", marks=pytest.mark.slow), "features"])
def layer(request):
    return request.param


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_agrees_with_the_loop_version(tiny, images, class_idx, layer, name):
    saliency = METHODS[name](tiny, images, class_idx, layer=layer)
    for b in range(2):
        features = tiny.features[: DEPTHS[layer]](images[b : b + 1])[0].detach().numpy()
        g = references.slopes(features, head_of(tiny, DEPTHS[layer]), int(class_idx[b]))
        g[abs(g) < 1e-10] = 0  # rounding of the differences; Grad-CAM++ asks whether g is 0
        expected = references.finish(getattr(references, name)(features, g), 24, 32)
        np.testing.assert_allclose(saliency[b, 0], expected, rtol=0, atol=1e-6)


def test_ablation_cam_agrees_with_the_loop_version(tiny, images, class_idx, layer):
    saliency = ablation_cam(tiny, images, class_idx, layer=layer, batch_size=7)
    for b in range(5):
        features = tiny.features[: DEPTHS[layer]](images[b : b + 1])[0].detach().numpy()
        grid = references.ablation_cam(features, head_of(tiny, DEPTHS[layer]), int(class_idx[b]))
        np.testing.assert_allclose(saliency[b, 0], references.finish(grid, 24, 32), rtol=0, atol=1e-9)


def test_score_cam_agrees_with_the_loop_version(tiny, images, class_idx, layer):
    with torch.no_grad():
        tiny.features[2].weight[4] = 0  # a constant feature map
        tiny.features[0].weight[4] = 0  # a constant and negative one
        tiny.features[0].bias[4:6] = -1.5  # and one that is negative everywhere
    saliency = score_cam(tiny, images, class_idx, layer=layer, batch_size=7)
    for b in range(5):
        features = tiny.features[: DEPTHS[layer]](images[b : b + 1])[0].detach().numpy()
        grid = references.score_cam(features, tiny, images[b].numpy(), int(class_idx[b]))
        np.testing.assert_allclose(saliency[b, 0], references.finish(grid, 24, 32), rtol=0, atol=1e-9)


def test_eigen_cam_agrees_with_the_loop_version(tiny, images, class_idx, layer):
    saliency = eigen_cam(tiny, images, class_idx, layer=layer)
    for b in range(5):
        features = tiny.features[: DEPTHS[layer]](images[b : b + 1])[0].detach().numpy()
        expected = references.finish(references.eigen_cam(features), 24, 32)
        np.testing.assert_allclose(saliency[b, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.6, "num_classes": 2}, {"hold_weights": True}, {"num_classes": 9}])
def test_finer_cam_agrees_with_the_loop_version(tiny, images, class_idx, layer, options):
    with torch.no_grad():
        tiny.fc.weight.mul_(30)  # else the logits are alike, and so are the weights
    saliency = finer_cam(tiny, images, class_idx, layer=layer, **options)
    head = head_of(tiny, DEPTHS[layer])
    for b in range(1):
        label, number, alpha = int(class_idx[b]), options.get("num_classes", 3), options.get("alpha", 1)
        features = tiny.features[: DEPTHS[layer]](images[b : b + 1])[0].detach().numpy()
        logits = tiny(images[b : b + 1])[0].detach().numpy()
        held = references.finer_weights(logits, label, number) if "hold_weights" in options else None

        def score(maps, label=label, alpha=alpha, number=number, held=held):
            value = references.finer_score(head(maps)[0].numpy(), label, alpha, number, held)
            return torch.tensor([[value]])

        expected = references.grad_cam(features, references.slopes(features, score, 0))
        np.testing.assert_allclose(saliency[b, 0], references.finish(expected, 24, 32), rtol=0, atol=1e-6)


def test_finer_cam_without_rivals_is_grad_cam(tiny, images, class_idx):
    run = partial(finer_cam, tiny, images, class_idx, layer="features.0")
    expected = grad_cam(tiny, images, class_idx, layer="features.0")
    torch.testing.assert_close(run(alpha=0, hold_weights=True), expected, rtol=0, atol=1e-12)
    assert (run() - expected).abs().max() > 0.1
    for wrong, message in (
        ({"num_classes": 0}, "num_classes: wanted at least 1, got 0"),
        ({"num_classes": None}, "^num_classes: wanted a whole number, got None$"),
        ({"hold_weights": torch.ones(2)}, "^hold_weights: wanted True or False, got Tensor$"),
        ({"alpha": torch.nan}, "alpha: wanted a"),
        ({"alpha": None}, "^alpha: wanted a number, got None$"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run(**wrong)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("options", [{}, {"hold_weights": True}])
def test_finer_cam_has_no_rival_among_classes_left_out(tiny, images, place, options):
    """Their logit is -inf."""
    with torch.no_grad():
        tiny.fc.weight.mul_(30)  # else the weights of rivals hardly matter

    class Own(nn.Module):
        def __init__(self, dropped):
            super().__init__()
            self.inner, self.dropped = tiny, dropped

        def forward(self, x):
            y, kept = self.inner(x)[:, :4], torch.arange(4) != place
            return y[:, kept] if self.dropped else y.masked_fill(~kept, -torch.inf)

    among_three = torch.tensor([0, 1, 2, 0, 1])
    found = finer_cam(Own(False), images, among_three + (place == 0), layer="inner.features", **options)
    expected = finer_cam(Own(True), images, among_three, layer="inner.features", **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_finer_cam_of_a_sigmoid_is_grad_cam(tiny, images, class_idx):
    """The only rival of a class is its absence, whose logit is 0."""
    network = wrap(tiny, layer="features.0", head="sigmoid")
    expected = grad_cam(network, images, class_idx)
    torch.testing.assert_close(finer_cam(network, images, class_idx), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_refine_cam_is_the_product_of_the_maps(tiny, images, class_idx):
    saliency = refine_cam(tiny, images, class_idx, layer=["features.0", "features"])
    for b in range(1):
        product = np.ones((24, 32))
        for depth in DEPTHS.values():
            features = tiny.features[:depth](images[b : b + 1])[0].detach().numpy()
            g = references.slopes(features, head_of(tiny, depth), int(class_idx[b]))
            g[abs(g) < 1e-10] = 0
            product *= references.finish(references.grad_cam_plus_plus(features, g), 24, 32)
        np.testing.assert_allclose(saliency[b, 0], references.min_max(product), rtol=0, atol=1e-6)
    one = refine_cam(tiny, images, class_idx, layer="features", base=grad_cam)
    torch.testing.assert_close(one, grad_cam(tiny, images, class_idx, layer="features"))
    with pytest.raises(ValueError, match="layer: wanted at least one"):
        refine_cam(tiny, images, class_idx, layer=[])
    with pytest.raises(TypeError, match="base: wanted a function, such as grad_cam, got 'grad_cam'"):
        refine_cam(tiny, images, class_idx, layer="features", base="grad_cam")


@pytest.mark.slow
def test_nan_stays_with_its_image(tiny, images, class_idx):
    broken = images.clone()
    broken[1, 0, 3, 4] = torch.nan
    for name, options in (("eigen_cam", {}), ("grad_cam", {}), ("extremal_perturbation", {"num_steps": 2})):
        found, expected = (METHODS[name](tiny, x, class_idx, layer="features", **options) for x in (broken, images))
        assert found[1].isnan().all()
        rest = torch.tensor([0, 2, 3, 4])
        torch.testing.assert_close(found[rest], expected[rest])


def test_eigen_cam_of_constant_features_is_zero(tiny, images, class_idx):
    for value in (0.3, -7.1, 0.0):
        with torch.no_grad():
            tiny.features[2].weight.zero_()
            tiny.features[2].bias.fill_(value)
        assert (eigen_cam(tiny, images, class_idx, layer="features.2") == 0).all()
    half = eigen_cam(tiny.half(), images.half(), class_idx, layer="features.0")
    assert half.amax() == 1


def test_one_pass_a_feature_map_that_varies(tiny, images, class_idx):
    with torch.no_grad():
        tiny.features[2].weight[4] = 0
    features = feature_maps(tiny, images, "features")[0][0]
    varying = int((features.amax((2, 3)) > features.amin((2, 3))).sum())
    assert varying <= 5 * 5
    passed = []
    tiny.fc.register_forward_hook(lambda module, args, output: passed.append(len(output)))
    score_cam(tiny, images, class_idx, layer="features", batch_size=4)
    assert sum(passed) == 5 + 1 + varying  # once for the features, one black image
    assert max(passed) <= 5


@pytest.mark.parametrize("method", [partial(ablation_cam), partial(score_cam)], ids=["ablation_cam", "score_cam"])
def test_the_size_of_chunks_does_not_matter(tiny, images, class_idx, method):
    expected = method(tiny, images, class_idx, layer="features")
    for batch_size in (1, 7):
        chunked = method(tiny, images, class_idx, layer="features", batch_size=batch_size)
        torch.testing.assert_close(chunked, expected, rtol=0, atol=1e-12)
    for wrong in (None, True):
        with pytest.raises(ValueError, match=f"^batch_size: wanted a whole number, got {wrong}$"):
            method(tiny, images, class_idx, layer="features", batch_size=wrong)
    with pytest.raises(ValueError, match="batch_size: wanted at least 1, got 0"):
        method(tiny, images, class_idx, layer="features", batch_size=0)


def test_pooling_and_a_linear_layer_make_three_methods_one(tiny, images, class_idx):
    # y_c = sum_k W_ck mean A_k + b_c: g_k = W_ck/(h w) everywhere, the class activation maps of Zhou et al. 2016
    features = tiny.features(images)
    expected = saliency_map(combine(features, tiny.fc.weight[class_idx]), images.shape[-2:])
    for name in ("grad_cam", "x_grad_cam", "hires_cam"):
        saliency = METHODS[name](tiny, images, class_idx, layer="features")
        torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-12)
    # and y_c - y_c[A_k = 0] = W_ck mean A_k
    expected = combine(features, tiny.fc.weight[class_idx] * features.mean((2, 3)))
    logits = tiny(images).gather(1, class_idx[:, None])[:, :, None, None]
    saliency = ablation_cam(tiny, images, class_idx, layer="features")
    torch.testing.assert_close(saliency, saliency_map(expected / logits, (24, 32)), rtol=0, atol=1e-12)


def test_grad_cam_without_positive_evidence_is_zero(tiny, images, class_idx):
    with torch.no_grad():
        tiny.fc.weight.copy_(-tiny.fc.weight.abs())
    assert (grad_cam(tiny, images, class_idx, layer="features") == 0).all()


@pytest.mark.parametrize("name", [*BY_GRADIENTS, "ablation_cam", "score_cam", "eigen_cam", "finer_cam", "refine_cam"])
def test_feature_maps_of_zeros_give_zeros(tiny, images, class_idx, name):
    with torch.no_grad():
        tiny.features[2].weight.zero_()
        tiny.features[2].bias.zero_()
    assert (METHODS[name](tiny, images, class_idx, layer="features") == 0).all()


def test_fake_cam_hides_one_pixel(tiny, images, class_idx):
    saliency = fake_cam(tiny, images, class_idx)
    assert saliency.shape == (5, 1, 24, 32)
    assert (saliency[:, 0, 0, 0] == 0).all()
    assert saliency.sum() == 5 * (24 * 32 - 1)


PEERS = {
    "grad_cam": "GradCAM",
    "grad_cam_plus_plus": "GradCAMPlusPlus",
    "x_grad_cam": "XGradCAM",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
}


@pytest.fixture(scope="module")
def photos():
    model = load_model("efficientnet_lite0")
    samples = [sample for _, sample in zip(range(2), demo(128, 146), strict=False)]
    return model, torch.stack([sample.image for sample in samples]), torch.tensor([sample.label for sample in samples])


def by_grad_cam(kind, model, layer, images, class_idx):
    """A map of the library grad-cam, which stretches to [0,1] before it upsamples, brought to ours."""
    peer = pytest.importorskip("pytorch_grad_cam")
    target = peer.utils.model_targets.ClassifierOutputTarget
    with getattr(peer, kind)(model, [layer]) as method:
        maps = method(images.clone(), [target(int(c)) for c in class_idx])
    return min_max(torch.from_numpy(maps)[:, None])


class Loud(torch.nn.Module):
    """The library adds 1e-6 to denominators such as 2 g^2; large logits make that small beside them."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return 1e5 * self.model(images)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("layer", [None, "blocks.4"])
def test_agrees_with_grad_cam_on_a_real_network(photos, name, layer):
    model, images, class_idx = photos
    place, loud = resolve_layer(model, layer), Loud(model).double()
    expected = by_grad_cam(PEERS[name], loud, place, images.double(), class_idx)
    saliency = METHODS[name](loud, images.double(), class_idx, layer=place)
    model.float()
    torch.testing.assert_close(saliency, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ablation_cam_agrees_with_grad_cam_on_a_real_network(photos):
    model, images, class_idx = photos
    layer = model.network.get_submodule("blocks.2.0.bn1.act")  # 144 feature maps, none negative
    expected = by_grad_cam("AblationCAM", model, layer, images, class_idx)
    torch.testing.assert_close(ablation_cam(model, images, class_idx, layer=layer), expected, rtol=0, atol=1e-4)


def test_score_cam_agrees_with_grad_cam_where_nothing_is_upsampled(class_idx):
    # the library upsamples with align_corners=True; feature maps as large as the image leave only the rule itself
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    )
    images = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    expected = by_grad_cam("ScoreCAM", network, network[1], images, class_idx)
    saliency = score_cam(network, images, class_idx, layer="1")
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-5)


def test_agrees_with_captum(photos):
    attribution = pytest.importorskip("captum.attr")
    model, images, class_idx = photos
    raw = attribution.LayerGradCam(model, resolve_layer(model)).attribute(images, target=class_idx)
    torch.testing.assert_close(grad_cam(model, images, class_idx), saliency_map(raw, images.shape[-2:]))
    assert feature_maps(model, images)[0][0].shape[-2:] == raw.shape[-2:]


@pytest.mark.parametrize("name", ["grad_cam", "grad_cam_plus_plus", "x_grad_cam", "hires_cam", "layer_cam"])
def test_sums_beyond_the_range_of_half_precision(name):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5))
    with torch.no_grad():
        network[0].weight.mul_(20)
    x, c = torch.rand(1, 3, 224, 224), torch.tensor([1])
    assert network[:2](x).sum((2, 3)).max() > torch.finfo(torch.float16).max
    expected = METHODS[name](network, x, c, layer="1")
    found = METHODS[name](network.half(), x.half(), c, layer="1")
    assert (found - expected).abs().mean() < 1e-3


def test_ablation_of_a_layer_called_twice_is_that_of_its_last_output(images, class_idx):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 6, 3, 4), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)
            self.relu = nn.ReLU()

        def forward(self, x):
            early = self.relu(self.first(x))
            return self.rest(early, self.relu(self.second(early)))

        def rest(self, early, late):
            return self.fc((early + late).mean((2, 3)))

    torch.manual_seed(0)
    network = Shared().double()
    saliency = ablation_cam(network, images, class_idx, layer="relu")
    early = network.first(images).relu()
    late = network.second(early).relu()
    for b in range(5):
        head = partial(lambda b, features: network.rest(early[b : b + 1], features), b)
        grid = references.ablation_cam(late[b].detach().numpy(), head, int(class_idx[b]))
        np.testing.assert_allclose(saliency[b, 0], references.finish(grid, 24, 32), rtol=0, atol=1e-9)


def test_methods_that_are_grad_cam_under_another_name_are_left_out(tiny, images, class_idx):
    """After pooling and one linear layer three methods are one; after a second nonlinear layer they are not."""
    methods = {name: partial(METHODS[name], layer="features") for name in ("x_grad_cam", "layer_cam", "grad_cam")}
    kept, same = one_per_map(tiny, images, class_idx, methods)
    assert list(kept) == ["layer_cam", "grad_cam"]
    assert same == {"x_grad_cam": "grad_cam"}
    earlier = {name: partial(METHODS[name], layer="features.0") for name in methods}
    assert one_per_map(tiny, images, class_idx, earlier) == (earlier, {})
    alone = {"x_grad_cam": methods["x_grad_cam"]}
    assert one_per_map(tiny, images, class_idx, alone) == (alone, {})


def test_methods_by_name_take_their_own_options(tiny, images, class_idx):
    found = find_methods(["grad_cam", "opti_cam"], opti_cam={"num_steps": 1}, rise={"num_masks": 2})
    assert list(found) == ["grad_cam", "opti_cam"]
    for name, options in (("grad_cam", {}), ("opti_cam", {"num_steps": 1})):
        expected = METHODS[name](tiny, images, class_idx, layer="features", **options)
        assert torch.equal(found[name](tiny, images, class_idx, layer="features"), expected)
    for names, options in ((["gradcam"], {}), (["grad_cam"], {"opticam": {"num_steps": 1}})):
        with pytest.raises(ValueError, match="method: wanted one of"):
            find_methods(names, **options)
    for names in ("grad_cam", None):
        with pytest.raises(TypeError, match="names: wanted a list of names of methods"):
            find_methods(names)


@pytest.mark.parametrize("name", ["score_cam", "eigen_cam", "grad_cam"])
def test_several_layers_are_refused_where_one_is_wanted(tiny, images, class_idx, name):
    with pytest.raises(ValueError, match=r"layer: wanted a module or a dotted name, got \["):
        METHODS[name](tiny, images, class_idx, layer=["features.0", "features"])


def test_the_base_of_refine_cam_returns_maps(tiny, images, class_idx):
    with pytest.raises(TypeError, match="base: "):
        refine_cam(tiny, images, class_idx, layer=["features"], base=opti_cam)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score_cam", "ablation_cam", "rise", "extremal_perturbation"])
def test_batches_may_be_counted_by_numpy(tiny, images, class_idx, name):
    few = {"rise": {"num_masks": 8}, "extremal_perturbation": {"num_steps": 1, "area": torch.tensor(0.5)}}.get(name, {})
    found = METHODS[name](tiny, images, class_idx, layer="features", batch_size=np.int64(2), **few)
    torch.testing.assert_close(found, METHODS[name](tiny, images, class_idx, layer="features", batch_size=2, **few))
