import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import resnet18

from opticam import METHODS, SCHEDULES, find_method, wrap
from opticam.lab.identity import key_of
from opticam.methods import OBJECTIVES
from opticam.methods.ascent import map_space, weight_space
from opticam.methods.opti_cam import squared_distance
from opticam.saliency import BASELINES, NORMALIZATIONS, mean_color

OPTI_CAM = METHODS["opti_cam"]
FAST, ROBUST = partial(OPTI_CAM, **SCHEDULES["fast"]), SCHEDULES["robust"]


def plain(seed=0, **changed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, **changed), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


class Own(nn.Module):
    """A network whose forward may change without being seen."""

    def __init__(self, strength=1):
        super().__init__()
        self.body, self.strength = plain(), strength

    def forward(self, x):
        return self.strength * self.body(x)


class Number(int):
    """Of one's own: what it does in a comparison, say, is not its value."""


DIFFERENT = {
    "method": [
        METHODS[name] for name in ("opti_cam", "equal_weights", "grad_cam", "layer_cam", "rise", "raw_attention")
    ],
    "options": [
        OPTI_CAM,
        FAST,
        partial(FAST, num_steps=17),
        partial(OPTI_CAM, num_steps=18),
        partial(OPTI_CAM, lr=0.3),
    ],
    "objective": [partial(OPTI_CAM, objective=function) for function in OBJECTIVES.values()],
    "normalisation": [partial(OPTI_CAM, normalize=function) for function in NORMALIZATIONS.values()],
    "baseline": [
        *(
            partial(OPTI_CAM, baseline=baseline)
            for baseline in (*BASELINES.values(), (None, mean_color), (mean_color,))
        ),
        *(
            partial(OPTI_CAM, **ROBUST | change)
            for change in ({}, {"anchor": METHODS["layer_cam"]}, {"complement": 1.0})
        ),
        partial(OPTI_CAM, **ROBUST | {"penalty": partial(squared_distance, beta=3)}),
    ],
    "space": [partial(OPTI_CAM, space=space) for space in (weight_space, map_space)],
    "positional": [partial(METHODS["rise"], 1), partial(METHODS["rise"], 2)],
    "kind of number": [partial(OPTI_CAM, lr=lr) for lr in (1, 1.0, True, "1", None, np.float32(0.1), 0.1)],
    "container": [partial(OPTI_CAM, layer=layer) for layer in (["1"], "1", {"1": 0}, {1: 0}, {"1"}, [["1"]])],
    "tensor": [torch.zeros(2000), torch.zeros(2000).double(), torch.zeros(2000).index_fill(0, torch.tensor([999]), 1)],
    "array": [np.zeros(2000), np.zeros(2000, np.float32), np.eye(1, 2000, 999)[0]],
    "dtype": [torch.float16, torch.bfloat16, "torch.float16", torch.device("cpu"), "cpu"],
    "text that looks like a name": [
        "opticam.methods.cam.grad_cam",
        METHODS["grad_cam"],
        {"name": "opticam.methods.cam"},
    ],
    "function of a library": [F.relu, F.gelu],
    "weights": [plain(0), plain(1)],
    "a setting": [plain(stride=1), plain(stride=2), plain(padding=1), plain(padding_mode="reflect")],
}


def key(value, **keys):
    return json.dumps(key_of(value, nn.Identity(), **keys))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_has_another_key_and_what_is_equal_the_same(kind):
    keys = [key(value) for value in DIFFERENT[kind]]
    assert len(set(keys)) == len(keys)
    assert keys == [key(value) for value in DIFFERENT[kind]]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.fc.bias.data.add_(1),
        lambda net: net.layer1[0].bn1.running_mean.add_(1),
        lambda net: net.register_buffer("hidden", torch.ones(1), persistent=False),
        lambda net: setattr(net.layer1[0], "relu", nn.GELU()),
        pytest.param(lambda net: setattr(net.layer1[0], "relu", nn.Identity()), marks=pytest.mark.slow),
        pytest.param(lambda net: setattr(net.layer1[0].relu, "inplace", False), marks=pytest.mark.slow),
        pytest.param(lambda net: setattr(net, "scale", 2.0), marks=pytest.mark.slow),
        pytest.param(lambda net: setattr(net, "_norm_layer", nn.GroupNorm), marks=pytest.mark.slow),
        pytest.param(lambda net: setattr(net, "table", torch.ones(1)), marks=pytest.mark.slow),
        pytest.param(lambda net: setattr(net.layer1[0].bn1, "eps", 1e-3), marks=pytest.mark.slow),
        pytest.param(lambda net: net.double(), marks=pytest.mark.slow),
    ],
)
def test_a_network_that_was_changed_has_another_key(change):
    network = resnet18(num_classes=2)
    before = key(network)
    assert key(network.eval()) == before, "every method sets that itself"
    change(network)
    assert key(network) != before


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda net, monkeypatch: net.register_forward_hook(lambda module, x, y: 2 * y),
        lambda net, monkeypatch: net.layer1.register_full_backward_hook(lambda *_: None),
        lambda net, monkeypatch: net.layer1.register_full_backward_pre_hook(lambda *_: None),
        lambda net, monkeypatch: net.fc.register_forward_pre_hook(lambda module, x: x),
        lambda net, monkeypatch: setattr(net.fc, "forward", lambda x: x),
        lambda net, monkeypatch: setattr(net, "layer4", Own()),
        lambda net, monkeypatch: setattr(net, "steps", [Number(3)]),
        lambda net, monkeypatch: monkeypatch.setattr(type(net), "forward", lambda self, x: x),
    ],
)
def test_a_network_with_code_of_ones_own_is_refused_without_a_key(change, monkeypatch):
    network = resnet18(num_classes=2)
    change(network, monkeypatch)
    with pytest.raises(
        ValueError, match=r"keys: .* of model cannot be recognised .*; wanted keys=\{'model': ...\}, a word"
    ):
        key(network)
    assert key(network, key="v1") == key(network, key="v1") != key(network, key="v2")


def test_a_key_stands_for_code_alone():
    assert key(plain(), key="v1") != key(plain(), key="v2") != key(plain())
    keys = [key(network, key="v1") for network in (Own(), Own(2), wrap(Own(), "body"), wrap(Own(), "body.0"))]
    assert len(set(keys)) == 4
    methods = [partial(lambda *_: 0, strength=strength) for strength in (1, 2)]
    assert len({key(method, key=word) for method in methods for word in ("v1", "v2")}) == 4


class Caller:
    def run(self, model, images, class_idx):
        return images

    def __call__(self, model, images, class_idx):
        return images


def by_itself(model, images, class_idx):
    return images


def renamed(model, images, class_idx):
    return images


renamed.__module__, renamed.__qualname__ = "opticam.methods.cam", "grad_cam"


@pytest.mark.parametrize(
    "value",
    [
        by_itself,
        renamed,
        lambda *_: 0,
        Caller(),
        Caller().run,
        Caller,
        partial(by_itself, 1),
        partial(OPTI_CAM, objective=by_itself),
        partial(OPTI_CAM, objective=[lambda *_: 0]),
        partial(OPTI_CAM, space=weight_space._replace(sums=map_space.sums)),
        partial(OPTI_CAM, lr=Number(1)),
        np.array([None]),
        object(),
        iter([1]),
    ],
)
def test_what_has_no_name_is_refused_without_a_key(value):
    with pytest.raises(ValueError, match=r"keys: .* of mine cannot be recognised .*; wanted keys=\{'mine': ...\}"):
        key(value, name="mine")
    assert key(value, key="v1") == key(value, key="v1") != key(value, key="v2")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 3).forward,
        lambda: partial(nn.Linear(3, 3).forward),
        lambda: torch.distributions.Normal(torch.rand(2), torch.ones(2)),
    ],
    ids=["a method of a network", "a part of it", "a distribution"],
)
def test_what_its_text_does_not_show_counts(make, tiny):
    assert key_of(make(), model=tiny, name="it") != key_of(make(), model=tiny, name="it")


def test_a_function_inside_an_object_is_refused_without_a_key(tiny):
    with pytest.raises(ValueError, match="lambda> of it cannot be recognised"):
        key_of(transforms.Lambda(lambda image: image), model=tiny, name="it")


def test_layers_are_known_by_the_name_that_finds_them(tiny):
    for model in (tiny, wrap(tiny, "features")):
        layers = [partial(METHODS["grad_cam"], layer=layer) for layer in (tiny.features[0], tiny.features[2])]
        found = [key_of(method, model)["partial"][2]["table"] for method in layers]
        assert found == [[["layer", {"layer": "features.0"}]], [["layer", {"layer": "features.2"}]]]


def test_of_a_record_only_its_function_counts():
    record = METHODS["grad_cam"]
    recolored = replace(record, color="#123456", label="another")
    assert key(record) == key(recolored) == key(record.function)
    with pytest.raises(ValueError, match="keys: by_itself of mine cannot be recognised"):
        key(replace(record, function=by_itself), name="mine")


def test_methods_of_captum_have_the_name_of_their_attribution():
    pytest.importorskip("captum")
    assert key(find_method("captum:Saliency")) != key(find_method("captum:Occlusion"))


PROGRAM = """
import sys
from functools import partial
from opticam import METHODS, SCHEDULES, wrap
from opticam.lab.identity import key_of
import torch
from torch import nn
from torchvision.models import resnet18
torch.manual_seed(0)
net = wrap(resnet18(), "layer4")
net.network.both = {"a", "b", "c", "d"}
for value in net, partial(METHODS["opti_cam"], **SCHEDULES["fast"], layer={"a", "b", "c", "d"}):
    print(key_of(value, nn.Identity()))
"""


@pytest.mark.slow
def test_another_process_finds_the_same_keys():
    told = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
        told.append(done.stdout)
    assert told[0] == told[1] != ""
