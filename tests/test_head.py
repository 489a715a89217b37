import pytest
import torch
from conftest import TinyViT
from torch import nn

from opticam import load_model
from opticam.head import split_head


def passes_before(module, call):
    """How often a module runs during a call."""
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    call()
    handle.remove()
    return len(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "efficientnet_lite0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_b_16", "deit_base_patch16_224")),
    ],
)
def test_only_what_follows_runs_again(name):
    torch.manual_seed(0)
    model = load_model(name, pretrained=False)
    size = 224 if "it_" in name else 64
    images = torch.rand(2, 3, size, size)
    head, output, logits = split_head(model, images)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    rows = torch.tensor([1, 0, 1])
    assert passes_before(first, lambda: head(output[rows], rows)) == 0
    torch.testing.assert_close(head(output[rows], rows), logits[rows], rtol=0, atol=1e-4)


def test_a_changed_output_gives_what_the_whole_network_gives():
    torch.manual_seed(0)
    model = TinyViT().double()
    images = torch.rand(2, 3, 24, 32, dtype=torch.float64)
    layer = model.network.blocks[0].norm2  # the residual stream passes it by
    head, output, _ = split_head(model, images, layer)
    changed = torch.randn_like(output)
    handle = layer.register_forward_hook(lambda *_: changed)
    expected = model.eval()(images)
    handle.remove()
    torch.testing.assert_close(head(changed, torch.arange(2)), expected.detach(), rtol=0, atol=1e-12)


class Untraceable(nn.Module):
    """Looks at its values, which a tracer cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        pooled = self.conv(images).mean((2, 3))
        return self.fc(pooled if pooled.isfinite().all() else pooled.nan_to_num())


class Remembers(Untraceable):
    """Can be traced, but its logits depend on more than its graph shows: the number of images at tracing."""

    def forward(self, images):
        self.seen = images
        pooled = self.conv(images).mean((2, 3))
        return self.fc(pooled) * (1 if isinstance(self.seen, torch.Tensor) else 2)


class Twice(Untraceable):
    """Calls the layer twice."""

    def forward(self, images):
        return self.fc((self.conv(images) + self.conv(images.flip(3))).mean((2, 3)))


@pytest.mark.parametrize("kind", [Untraceable, Remembers, Twice])
def test_where_the_split_would_be_wrong_the_whole_network_runs(kind):
    torch.manual_seed(0)
    model = kind()
    images = torch.rand(2, 3, 8, 8)
    head, output, logits = split_head(model, images, "conv")
    rows = torch.tensor([1, 1, 0])
    assert passes_before(model.conv, lambda: head(output[rows], rows)) > 0
    if kind is not Twice:  # there both calls' outputs are replaced by the second's
        torch.testing.assert_close(head(output[rows], rows), logits[rows])


def test_an_error_of_the_network_is_not_hidden():
    model = Untraceable()
    model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split_head(model, torch.rand(1, 3, 8, 8), "conv")


@pytest.mark.parametrize("form", [lambda y: y[:, 0], lambda y: {"logits": y}], ids=["one logit", "dict"])
def test_other_outputs_are_cut_too(tiny, images, form):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def forward(self, x):
            return form(self.inner(x))

    head, output, logits = split_head(Own(), images, tiny.features)
    rows = torch.tensor([1, 0, 4])
    assert passes_before(tiny.features[0], lambda: head(output[rows], rows)) == 0
    torch.testing.assert_close(head(output[rows], rows), logits[rows])
