"""State belongs to the call: threads do not meet, and networks are left as they were."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyViT
from torch import nn

from opticam import METHODS, find_method, score, wrap
from opticam.features import count_passes, feature_maps, watched
from opticam.folding import _pairs, folded
from opticam.methods import perturbation
from opticam.metrics import insertion_deletion
from opticam.state import frozen, hooked


class Normed(nn.Module):
    """Convolutions and batch norms, which are traced and folded, and a head of its own, which is split off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        first = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(True)
        self.features = nn.Sequential(*first, nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, images):
        return self.fc(self.drop(self.features(images).mean((2, 3))))


CALLS = {
    **{name: {} for name in ("grad_cam", "layer_cam", "ablation_cam", "score_cam")},
    "opti_cam": {"num_steps": 4},
    "rise": {"num_masks": 20},
}
ATTENTION = ("raw_attention", "attention_rollout", "gradient_rollout")


@pytest.fixture
def eager():
    """Threads that change places fifty times as often as usual; more, and they do nothing else."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def narrow_blur(monkeypatch):
    monkeypatch.setattr(perturbation, "SIGMA", 2.0)  # one of 20 pixels is slow, and nothing here depends on it


def flags(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        [getattr(module, "fused_attn", None) for module in model.modules()],
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [CALLS, ATTENTION], ids=["cam", "attention"])
def test_methods_of_many_threads_on_one_network(names, images, class_idx, eager):
    """In training mode, which each call has to leave for its own time and no other."""
    network = (TinyViT if names is ATTENTION else Normed)().double().train()
    model, before = wrap(network, "features"), flags(network)
    work = [(name, i) for name in names for i in range(3)]

    def explain(job):
        name, i = job
        with count_passes(model) as passes:
            S = METHODS[name](model, images[i : i + 1], class_idx[i : i + 1], **CALLS.get(name, {}))
        return S, list(passes)

    alone = [explain(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(explain, work * 2))
    for (S, passes), (S_alone, passes_alone) in zip(together, alone * 2, strict=True):
        torch.testing.assert_close(S, S_alone, rtol=0, atol=1e-10)
        assert passes == passes_alone
    assert flags(network) == before


class Skipping(nn.Module):
    """Keeps what a later layer reads in an attribute, or in a table or list there, as many hand-written networks do."""

    def __init__(self, place):
        super().__init__()
        self.first, self.place = Normed(), place
        self.kept = {"table": {}, "list": [None], "nested": [{}], "object": SimpleNamespace()}.get(place)
        self.last = nn.Conv2d(12, 5, 1)

    def encode(self, images):
        maps = self.first.features(images)
        if self.place == "attribute":
            self.kept = maps
        elif self.place == "object":
            self.kept.maps = maps
        else:
            (self.kept[0] if self.place == "nested" else self.kept)[0] = maps
        return self.first.features[3:](self.first.features[:3](images.flip(2)))

    def forward(self, images):
        maps = self.encode(images)
        return self.last(torch.cat([maps, self.found()], 1)).mean((2, 3))

    def found(self):
        if self.place == "attribute":
            return self.kept
        return self.kept.maps if self.place == "object" else (self.kept[0] if self.place == "nested" else self.kept)[0]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["attribute", "table", "list", "nested", "object"])
def test_networks_that_keep_something_during_a_pass(place, images, class_idx, eager):
    network = Skipping(place).double().eval()
    work = [(name, i) for name in CALLS for i in range(3)]

    def explain(job):
        name, i = job
        options = CALLS[name] if name == "rise" else {"layer": "last", **CALLS[name]}
        return METHODS[name](network, images[i : i + 1], class_idx[i : i + 1], **options)

    alone = [explain(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        for job, S in enumerate(pool.map(explain, work * 3)):
            torch.testing.assert_close(S, alone[job % len(work)], rtol=0, atol=1e-10)
    assert isinstance(network.found(), torch.Tensor)  # not what a tracer puts through a network


class Writes(nn.Module):
    """Hands its maps on through a table that another part reads."""

    def __init__(self, body, table):
        super().__init__()
        self.body, self.table = body, table

    def forward(self, x):
        self.table["maps"] = self.body(x)
        return self.table["maps"]


class Talks(nn.Module):
    """Two parts that talk through a table: nothing of that is in the graph of modules."""

    def __init__(self, by):
        super().__init__()
        body, self.last, self.by, self.table = Normed().features, nn.Conv2d(12, 5, 1), by, {}
        for norm in (body[1], body[4]):
            norm.running_var.fill_(0.25)
        self.body = Writes(body, self.table) if by == "a table" else body
        if by == "a method as hook":
            self.body.register_forward_hook(self.keep)
        elif by == "a function as hook":
            self.body.register_forward_hook(lambda module, args, output: self.table.update(maps=output))
        elif by == "a hook that keeps the table":
            table = self.table
            self.body.register_forward_hook(lambda module, args, output: table.update(maps=output))
        elif by == "a list of modules":
            self.hidden, self.body = [body.double().eval()], nn.Identity()

    def keep(self, module, args, output):
        self.table["maps"] = output

    def forward(self, x):
        maps = self.hidden[0](x) if self.by == "a list of modules" else self.body(x)
        other = self.table["maps"] if "hook" in self.by or self.by == "a table" else maps
        return self.last(torch.cat([maps.flip(2), other], 1)).relu().mean((2, 3))


WAYS = ["a table", "a method as hook", "a function as hook", "a hook that keeps the table", "a list of modules"]


@pytest.mark.slow
@pytest.mark.parametrize("seen", [False, True], ids=["new", "seen"])
@pytest.mark.parametrize("by", WAYS)
def test_networks_whose_parts_talk(images, class_idx, by, seen):
    expected, network = (Talks(way).double().eval() for way in ("", by))
    layers = {"layer": "last"}
    for number in (1, 3):
        x, c = images[:number], class_idx[:number]
        if seen:  # then it still holds what it kept of this very image
            network(x)
        for name, options in CALLS.items():
            options = options if name == "rise" else options | layers
            found, right = (METHODS[name](model, x, c, **options) for model in (network, expected))
            torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
        found, right = (score(model, x, c, images[:number, :1]) for model in (network, expected))
        np.testing.assert_allclose(found, right, rtol=1e-9)


@pytest.mark.parametrize("by", WAYS)
def test_a_library_is_right_of_networks_whose_parts_talk_or_refuses_them(images, class_idx, by):
    pytest.importorskip("captum", reason="captum is an extra")
    expected, network = (Talks(way).double().eval() for way in ("", by))
    network(images[:1])
    explain = lambda model: find_method("captum:Saliency")(model, images[:1], class_idx[:1])  # noqa: E731
    if by == "a hook that keeps the table":
        with pytest.raises(ValueError, match="model: hooks in Talks keep what a later part of the pass reads"):
            explain(network)
    else:
        torch.testing.assert_close(explain(network), explain(expected), rtol=0, atol=1e-9)


def test_captum_beside_other_methods(images, class_idx, eager):
    """Its hooks change what ReLUs give backwards, for whoever uses the network at the same time."""
    pytest.importorskip("captum", reason="captum is an extra")
    model = wrap(Normed().double().eval(), "features.4")
    names = ["grad_cam", "captum:GuidedBackprop", "layer_cam", "captum:LayerGradCam"]
    explain = lambda name: find_method(name)(model, images, class_idx)  # noqa: E731
    alone = [explain(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        for i, S in enumerate(pool.map(explain, names * 4)):
            torch.testing.assert_close(S, alone[i % 4])


def test_metrics_of_many_threads_on_one_network(images, class_idx, eager):
    model = wrap(Normed().double().train(), "features")

    def judge(i):
        part, c, S = images[i : i + 1], class_idx[i : i + 1], images[i : i + 1, :1]
        (area, _), (other, _) = insertion_deletion(model, part, c, S)
        return [*score(model, part, c, S).iloc[0], area.item(), other.item()]

    alone = [judge(i) for i in range(5)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(judge, [*range(5)] * 4))
    for row, values in enumerate(together):
        assert values == pytest.approx(alone[row % 5], rel=1e-10)


@pytest.mark.slow
def test_tracing_in_one_thread_does_not_reach_another(images, eager):
    """While torch.fx traces, every call of every module in the process goes through its tracer."""
    network = Normed().double().eval()
    over, faults = threading.Event(), []
    with torch.no_grad():
        expected = network(images)

    def run():
        while not over.is_set():
            try:
                with torch.no_grad():
                    assert torch.equal(network(images), expected)
            except Exception as fault:  # whatever a tracer makes of it
                faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with frozen(network), torch.no_grad():
            for _ in range(40):
                _pairs.clear()  # so that it is traced anew
                assert folded(network, images, expected) is not network
    finally:
        over.set()
        thread.join()
    assert not faults
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"


def test_the_last_call_that_froze_a_network_restores_it():
    network = Normed().train()
    network.fc.weight.requires_grad_(False)
    before = flags(network)
    inner, outer = frozen(network.features), frozen(network)  # one of the part, one of the whole
    for first, second in ((inner, outer), (frozen(network), frozen(network.features))):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not network.features[1].training
        assert not network.features[0].weight.requires_grad
        second.__exit__(None, None, None)
        assert flags(network) == before


class OwnMode(nn.Module):
    """Does more than set flags when its mode changes."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = Normed(), 1.0

    def train(self, mode=True):
        self.scale = 1.0 if mode else 4.0
        return super().train(mode)

    def forward(self, images):
        return self.inner(self.scale * images)


def test_a_network_with_a_mode_of_its_own_is_wanted_in_eval_mode(images, class_idx):
    network = OwnMode().double()
    expected = METHODS["grad_cam"](wrap(Normed().double(), "features"), images, class_idx)
    network.train()
    with pytest.raises(
        ValueError, match=r"model: OwnMode has a train\(\) or eval\(\) of its own and is in training mode; w"
    ):
        METHODS["grad_cam"](network, images, class_idx, layer="inner.features")
    assert all(module.training for module in network.modules())
    network.eval()
    found = METHODS["grad_cam"](network, images / 4, class_idx, layer="inner.features")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_hooks_do_not_hear_other_threads(images):
    network, heard = Normed().double(), []
    with hooked(network.fc, lambda module, args, output: heard.append(1)), ThreadPoolExecutor(1) as pool:
        pool.submit(network, images).result()
        assert heard == []
        network(images)
    assert heard == [1]
    with count_passes(network) as passes, watched(network, lambda module: 1 / 0), ThreadPoolExecutor(1) as pool:
        pool.submit(network, images).result()
    assert passes == [0, 0]


@pytest.mark.parametrize("name", [*CALLS, "extremal_perturbation", *ATTENTION])
def test_networks_made_under_inference_mode(name, images, class_idx):
    def build():
        torch.manual_seed(1)
        return (TinyViT if name in ATTENTION else Normed)().double().eval()

    with torch.inference_mode():
        made = build()
    options = {**CALLS, "extremal_perturbation": {"num_steps": 2}}.get(name, {})
    weights = [id(parameter) for parameter in made.parameters()]
    S = METHODS[name](made, images, class_idx, layer="features", **options)
    torch.testing.assert_close(S, METHODS[name](build(), images, class_idx, layer="features", **options))
    assert [id(parameter) for parameter in made.parameters()] == weights
    assert all(parameter.is_inference() for parameter in made.parameters())


def test_threads_on_a_network_made_under_inference_mode(images, class_idx, eager):
    with torch.inference_mode():
        made = Normed().double().eval()
    explain = lambda i: METHODS["grad_cam"](made, images[i : i + 1], class_idx[i : i + 1], layer="features")  # noqa: E731
    alone = [explain(i) for i in range(5)]
    with ThreadPoolExecutor(4) as pool:
        for i, S in enumerate(pool.map(explain, [*range(5)] * 4)):
            torch.testing.assert_close(S, alone[i % 5])
    assert all(parameter.is_inference() for parameter in made.parameters())


class InPlace(nn.Module):
    """Normalises by hand, in place."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, images):
        images -= 0.5
        images *= 4
        return self.inner(images)


class Flattening(nn.Module):
    """Reads feature maps by view, which wants them contiguous."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.fc = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU()), nn.Linear(4 * 12, 5)

    def forward(self, images):
        return self.fc(self.features(images).view(len(images), -1))


ALL = {**CALLS, "extremal_perturbation": {"num_steps": 2}, "fake_cam": {}, "equal_weights": {}, "hires_cam": {}}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_networks_that_work_in_place(name, wrapped, images, class_idx):
    inner = Normed().double()
    given, pixels = images.clone(), images.clone()
    model = wrap(InPlace(inner), "inner.features") if wrapped else InPlace(inner)
    S = METHODS[name](model, given, class_idx, layer="inner.features", **ALL[name])
    assert torch.equal(given, pixels)
    plain = wrap(inner, "features", mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(S, METHODS[name](plain, images, class_idx, **ALL[name]), rtol=0, atol=1e-9)
    found, wanted = (score(network, given, class_idx, S) for network in (model, plain))
    assert found.to_numpy() == pytest.approx(wanted.to_numpy())
    curves = [insertion_deletion(network, given, class_idx, S, mean=torch.zeros(3)) for network in (model, plain)]
    torch.testing.assert_close(*curves, rtol=0, atol=1e-9)
    assert torch.equal(given, pixels)


@pytest.mark.parametrize("name", ALL)
def test_networks_that_use_view(name, images, class_idx):
    model = Flattening().double()
    expected = METHODS[name](model, images, class_idx, layer="features", **ALL[name])
    last = images.contiguous(memory_format=torch.channels_last)  # as from a picture of rows, columns and colours
    for x in (last, images.flip(0).flip(0), images.expand(5, 3, 24, 32)):
        torch.testing.assert_close(METHODS[name](model, x, class_idx, layer="features", **ALL[name]), expected)
    S = expected.clamp(0, 1)
    torch.testing.assert_close(
        insertion_deletion(model, last, class_idx, S, mean=torch.zeros(3)),
        insertion_deletion(model, images, class_idx, S, mean=torch.zeros(3)),
    )
    assert score(model, last, class_idx, S).equals(score(model, images, class_idx, S))


def test_a_classifier_keeps_the_memory_format_of_its_weights(images):
    seen = []
    network = Normed().double()
    network.features[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model = wrap(network, "features")
    feature_maps(model, images)  # a network that is first seen is looked at closer
    seen.clear()
    feature_maps(model, images)
    feature_maps(model.to(memory_format=torch.channels_last), images)
    assert [x.is_contiguous() for x in seen] == [True, False]
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
