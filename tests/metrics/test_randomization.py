import copy
import itertools
import math
import warnings
from functools import partial
from types import MethodType

import pytest
import references
import torch
from conftest import TinyCNN, TinyViT
from torch import nn

import opticam
from opticam.lab.datasets import demo
from opticam.metrics import cascading, independent, randomized, rank_correlation, structural_similarity

NAMES = ["features.0", "features.2", "fc"]


class Normalized(nn.Module):
    """Two convolutions with batch norm, whose statistics are those of trained networks, and a shared layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(1))
        for norm in (self.bn1, self.bn2):
            norm.running_mean += 3
            norm.running_var *= 7
            norm.weight.data *= 2
        self.eval()

    def forward(self, images):
        x = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu()
        return self.scale * self.fc(x.mean((2, 3)))


def changed(model, network):
    """Names of the tensors of the state that differ."""
    state = model.state_dict()
    return {name for name, value in network.state_dict().items() if not torch.equal(value, state[name])}


def parts(*layers):
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_cascade_goes_from_the_logits_down(tiny):
    found = list(cascading(tiny))
    assert [name for name, _ in found] == NAMES[::-1]
    for i, (_, network) in enumerate(found):
        assert changed(tiny, network) == parts(*NAMES[::-1][: i + 1])
    for (_, before), (name, after) in itertools.pairwise(found):
        assert changed(before, after) == parts(name)  # the stages above keep the weights they got
    assert not changed(found[-1][1], randomized(tiny))


def test_independent_randomises_one_stage_at_a_time(tiny):
    found = list(independent(tiny))
    assert [name for name, _ in found] == NAMES[::-1]
    for name, network in found:
        assert changed(tiny, network) == parts(name)
        for part in parts(name):
            assert torch.equal(network.state_dict()[part], randomized(tiny).state_dict()[part])


def test_stages_are_groups_in_the_order_of_the_network(tiny):
    for order in (["features", "fc"], ["fc", "features"]):
        found = list(cascading(tiny, stages=order))
        assert [name for name, _ in found] == ["fc", "features"]
        assert changed(tiny, found[0][1]) == parts("fc")
        assert changed(tiny, found[1][1]) == parts(*NAMES)
    ((_, network),) = cascading(tiny, stages=["features.2"])
    assert changed(tiny, network) == parts("features.2")


@pytest.mark.slow
def test_stages_of_a_classifier_are_named_as_its_network_names_them():
    model = opticam.load_model("efficientnet_lite0", pretrained=False)
    stages = ["conv_stem", *(f"blocks.{i}" for i in range(7)), "classifier"]
    names = [name for name, network in cascading(model, stages=stages) if isinstance(network, type(model))]
    assert names == ["classifier", *(f"blocks.{i}" for i in range(6, -1, -1)), "conv_stem"]


@pytest.mark.slow
def test_what_belongs_to_no_layer_goes_by_the_name_of_the_class():
    model = TinyViT()
    names = [name for name, _ in cascading(model)]
    assert names[0] == "network.head"
    assert names[-1] == "network"
    last = list(independent(model))[-1][1]
    assert list(cascading(model.network))[-1][0] == "VisionTransformer"
    assert changed(model, last) == {"network.cls_token", "network.pos_embed"}


def test_weights_have_the_variance_of_he():
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(300, 200))
    network = randomized(model)
    # variance 2/fan_in: 2/(32*9) of 18432 draws, 2/300 of 60000; the standard error of a variance is sqrt(2/n) of it
    assert network[0].weight.var().item() == pytest.approx(2 / 288, rel=4 * math.sqrt(2 / 18432))
    assert network[1].weight.var().item() == pytest.approx(2 / 300, rel=4 * math.sqrt(2 / 60000))
    assert network[1].weight.abs().max() > 3.5 * network[1].weight.std()  # a uniform draw ends at 1.73
    assert network[1].bias.std().item() == pytest.approx(0.02, rel=4 * math.sqrt(0.5 / 200))
    assert network[0].weight.mean().item() == pytest.approx(0, abs=4 * math.sqrt(2 / 288 / 18432))


def test_batch_norm_goes_back_to_its_start():
    network = randomized(Normalized())
    for norm in (network.bn1, network.bn2):
        assert norm.weight.tolist() == [1] * 4
        assert norm.bias.tolist() == [0] * 4
        assert norm.running_mean.tolist() == [0] * 4
        assert norm.running_var.tolist() == [1] * 4
    assert network.scale.item() != 1
    top = next(net for name, net in cascading(Normalized()) if name == "bn2")
    assert top.bn1.running_mean.tolist() == [3] * 4  # below, all is as trained
    assert top.bn2.running_mean.tolist() == [0] * 4


def test_batch_norm_without_scale_and_shift_forgets_its_statistics_too():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.LazyLinear(4)).eval()
    network(torch.rand(1, 3, 8, 8))
    network[1].running_mean.fill_(100.0)
    network[1].running_var.fill_(1e4)
    random = randomized(network)[1]
    assert (random.running_mean.unique().item(), random.running_var.unique().item()) == (0, 1)
    stages = dict(cascading(network))
    assert list(stages) == ["3", "1", "0"]
    assert stages["3"][1].running_var.unique().item() == 1e4


@pytest.mark.parametrize("of", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_spectral_norm_is_refused(of):
    network = nn.Sequential(of(nn.Conv2d(3, 8, 3)), nn.ReLU())
    for call in (randomized, cascading, independent):
        with pytest.raises(ValueError, match="model: has a spectral norm"):
            call(network)


@pytest.mark.slow
def test_randomised_network_still_sees_the_image():
    # wholly randomised, its last features neither vanish nor are the same for every image, as with other rules
    model = opticam.load_model("efficientnet_lite0")
    network = randomized(model)
    images = torch.stack([sample.image for sample in map(demo(limit=3).__getitem__, range(3))])
    kept = []
    network.network.bn2.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        logits = network(images)
    assert logits.isfinite().all()
    assert 0.1 < kept[0].std(0).mean() < 10


def test_nothing_of_the_model_or_the_random_state_is_touched(tiny):
    tiny.train()
    tiny.features.eval()
    tiny.fc.weight.requires_grad_(False)
    before, random_state = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()

    def flags(network):
        return [p.requires_grad for p in network.parameters()], [m.training for m in network.modules()]

    for _, network in itertools.chain(cascading(tiny), independent(tiny)):
        assert torch.equal(torch.get_rng_state(), random_state)
        assert flags(network) == flags(tiny)
    assert flags(tiny)[0].count(False) == 1
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("networks", [cascading, independent])
def test_what_is_done_to_one_network_does_not_reach_the_next(tiny, networks):
    expected = [copy.deepcopy(network.state_dict()) for _, network in networks(tiny)]
    before = copy.deepcopy(tiny.state_dict())
    for wanted, (_, network) in zip(expected, networks(tiny), strict=True):
        assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_random_state_is_left_alone_after_an_exception(tiny):
    tiny.fc.index = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
    random_state = torch.get_rng_state()
    with pytest.raises(NotImplementedError):
        randomized(tiny)  # there is no normal distribution of integers, which shows after the other layers are drawn
    assert torch.equal(torch.get_rng_state(), random_state)


def test_seed_decides(tiny):
    torch.manual_seed(1)
    first = randomized(tiny, seed=5)
    torch.manual_seed(2)
    assert not changed(first, randomized(tiny, seed=5))
    assert changed(first, randomized(tiny, seed=6)) == parts(*NAMES)


def test_bad_stages(tiny):
    with pytest.raises(ValueError, match="layer: no 'head' in TinyCNN"):
        cascading(tiny, stages=["head"])  # at once, not at the first network
    with pytest.raises(ValueError, match=r"stages: wanted modules with parameters, 'features.1' has none"):
        independent(tiny, stages=["features.1"])
    with pytest.raises(ValueError, match="stages: wanted a sequence of dotted names, got 'fc'"):
        cascading(tiny, stages="fc")
    with pytest.raises(ValueError, match="stages: wanted a sequence of dotted names, got 5"):
        independent(tiny, stages=5)


@pytest.mark.parametrize("function", [randomized, cascading, independent])
def test_models_and_seeds_of_another_kind(tiny, function):
    with pytest.raises(TypeError, match=r"^model: wanted a torch\.nn\.Module, got function$"):
        function(lambda x: x)
    for seed in (1.5, None):
        with pytest.raises(ValueError, match=f"^seed: wanted a whole number, got {seed}$"):
            function(tiny, seed=seed)


def random_pairs(n=6, seed=0):
    a, b = torch.rand(2, n, 1, 14, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    b = torch.lerp(a, b, torch.linspace(0.05, 1, n, dtype=torch.float64)[:, None, None, None])
    a[1::2] = (a[1::2] * 5).round() / 5  # with ties
    return a, b


@pytest.mark.slow
@pytest.mark.parametrize("similarity", [rank_correlation, structural_similarity])
def test_similarity_equals_reference(similarity):
    a, b = random_pairs()
    reference = getattr(references, similarity.__name__)
    expected = [reference(x, y) for x, y in zip(a[:, 0].numpy(), b[:, 0].numpy(), strict=True)]
    torch.testing.assert_close(similarity(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert max(expected) - min(expected) > 0.5


def test_worked_example_of_rank_correlation():
    # ranks 1 2 3 4 and 2 1 3 4: 1 - 6*(1 + 1)/(4*15) = 0.8
    a = torch.tensor([0.1, 0.2, 0.5, 0.9])[None, None, None]
    b = torch.tensor([0.2, 0.1, 0.3, 1.0])[None, None, None]
    assert rank_correlation(a, b).item() == pytest.approx(0.8, abs=1e-15)
    # with the tie the ranks are 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5, 4.5/sqrt(22.5)
    b = torch.tensor([0.1, 0.1, 0.3, 1.0])[None, None, None]
    assert rank_correlation(a, b).item() == pytest.approx(4.5 / math.sqrt(22.5), abs=1e-15)


@pytest.mark.parametrize("similarity", [rank_correlation, structural_similarity])
def test_equal_maps_are_similar_and_opposite_ones_are_not(similarity):
    a, _ = random_pairs()
    assert similarity(a, a).tolist() == pytest.approx([1] * 6, abs=1e-12)
    assert (similarity(a, 1 - a) < -0.5).all()


def test_rank_correlation_sees_the_order_only():
    a, b = random_pairs()
    torch.testing.assert_close(rank_correlation(a, b**3), rank_correlation(a, b), rtol=0, atol=1e-12)
    assert rank_correlation(a, 1 - a).tolist() == pytest.approx([-1] * 6, abs=1e-12)


@pytest.mark.parametrize("similarity", [rank_correlation, structural_similarity])
def test_constant_map_has_similarity_0(similarity):
    a, b = random_pairs(4)
    a[1], b[2], a[3], b[3] = 0, 0.5, 1, 1  # two equal constants too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = similarity(a, b)
    assert found.dtype == torch.float64
    assert found[0] > 0.5
    assert found[1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("similarity", [rank_correlation, structural_similarity])
def test_similarity_of_float32_nan_and_batches(similarity):
    a, b = (maps.float() for maps in random_pairs())
    a[4, 0, 7, 7] = math.nan
    b[4] = 1  # constant, but a NaN is none of its values
    found = similarity(a, b)
    assert found.dtype == torch.float64
    assert found.isnan().tolist() == [False, False, False, False, True, False]
    singles = torch.cat([similarity(a[i : i + 1], b[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(found, singles, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("similarity", [rank_correlation, structural_similarity])
def test_bad_maps(similarity):
    a, b = random_pairs()
    with pytest.raises(TypeError, match=r"b: wanted a tensor \(B,1,H,W\), got ndarray"):
        similarity(a, b.numpy())
    with pytest.raises(TypeError, match=r"^a: wanted a strided tensor, got torch\.sparse_coo$"):
        similarity(a.to_sparse(), b)
    with pytest.raises(ValueError, match=r"a: wanted shape \(B,1,H,W\) without empty dimensions, got \(6, 14, 19\)"):
        similarity(a[:, 0], b[:, 0])
    with pytest.raises(ValueError, match=r"b: wanted the shape of a, \(6, 1, 14, 19\), got \(5, 1, 14, 19\)"):
        similarity(a, b[1:])


class Keeps(nn.Module):
    """Keeps its maps, alone and in a list, as a network does that draws them later."""

    def __init__(self, network):
        super().__init__()
        self.inner, self.last, self.all = network, None, []

    def forward(self, images):
        self.last = self.inner.features(images)
        self.all.append(self.last)
        return self.inner.fc(self.last.mean((2, 3)))


def test_a_network_that_keeps_results_of_a_pass(tiny, images):
    model = Keeps(tiny)
    model(images)
    kept, weights = model.last, randomized(tiny).state_dict()
    for network in (randomized(model), list(cascading(model))[-1][1]):
        assert all(torch.equal(value, weights[name]) for name, value in network.inner.state_dict().items())
        assert torch.equal(network.last, kept)
        assert not network.last.requires_grad
    assert model.last is kept


def test_maps_that_require_gradients_are_compared():
    a, b = torch.rand(2, 2, 1, 16, 16)
    for similarity in (rank_correlation, structural_similarity):
        torch.testing.assert_close(similarity(a.clone().requires_grad_(), b), similarity(a, b))


def test_similarity_of_maps_in_another_range_is_refused():
    maps = torch.rand(2, 1, 12, 12)
    for pair, name in (((255 * maps, maps), "a"), ((maps, maps - 1), "b")):
        with pytest.raises(ValueError, match=rf"{name}: wanted values in \[0,1\]"):
            structural_similarity(*pair)


def test_map_smaller_than_the_window_of_ssim():
    with pytest.raises(ValueError, match=r"a: wanted sides of at least 11 pixels, the window of SSIM, got \(10, 19\)"):
        structural_similarity(torch.rand(1, 1, 10, 19), torch.rand(1, 1, 10, 19))


def test_networks_of_other_precision_keep_it():
    assert next(randomized(TinyCNN().bfloat16()).parameters()).dtype == torch.bfloat16


def hooked(tiny):
    tiny.features.register_forward_hook(lambda module, args, output: output * tiny.fc.weight.mean())


def hooked_by_default(tiny):
    tiny.features.register_forward_hook(lambda module, args, output, fc=tiny.fc: output * fc.weight.mean())


def wrapped(tiny):
    old = tiny.forward
    tiny.forward = lambda x: old(x)


def wrapped_by_name(tiny):
    old = tiny.features.forward

    def forward(x, *, run=old):
        return run(x)

    tiny.features.forward = forward


def wrapped_in_part(tiny):
    old = tiny.fc.forward
    tiny.fc.forward = partial(lambda x: old(x))


def bound_again(tiny):
    old = tiny.forward
    tiny.forward = MethodType(lambda self, x: old(x), tiny)


def kept_in_a_list(tiny):
    parts = [tiny.features, {"fc": tiny.fc}]
    tiny.run = lambda x: parts[1]["fc"](parts[0](x).mean((2, 3)))


def kept_as_a_global(tiny):
    tiny.forward = eval("lambda x: old(x)", {"old": tiny.forward})  # noqa: S307


KEEPING = [
    hooked,
    hooked_by_default,
    wrapped,
    wrapped_by_name,
    wrapped_in_part,
    bound_again,
    kept_in_a_list,
    kept_as_a_global,
]


@pytest.mark.parametrize("change", KEEPING, ids=lambda change: change.__name__)
def test_what_a_copy_would_share_is_refused(tiny, change):
    change(tiny)
    with pytest.raises(ValueError, match=r"^model: a function or hook in TinyCNN keeps a module or its weights"):
        randomized(tiny)
    with pytest.raises(ValueError, match=r"^model: a function or hook in TinyCNN keeps a module or its weights"):
        next(cascading(tiny))


def test_functions_that_keep_no_weights_are_copied(tiny):
    factor = torch.tensor(2.0)
    tiny.features.register_forward_hook(lambda module, args, output: output * factor)
    tiny.scale = lambda x: x * factor
    assert randomized(tiny) is not tiny
