"""Small networks whose every number can be checked by hand or by a loop."""

import os

import pytest
import torch
from torch import Tensor, nn

import opticam  # noqa: F401  (so that test modules may import torchvision and what needs it)

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of notebooks that run side by side would wait for each other


class TinyCNN(nn.Module):
    """Two convolutions, global average pooling, one linear layer; takes images of any size."""

    def __init__(self, channels: int = 6, num_classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


class TinyViT(nn.Module):
    """timm's vision transformer with two blocks and two heads, 8x8 patches of images of 24x32."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        from timm.models import VisionTransformer

        settings = {
            "img_size": (24, 32),
            "patch_size": 8,
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 5,
        }
        self.network = VisionTransformer(**settings | options)
        self.features = self.network.blocks  # the names that TinyCNN has
        self.fc = self.network.head

    def forward(self, images: Tensor) -> Tensor:
        return self.network(4 * images)


def state(model: nn.Module) -> tuple:
    """Everything a method might leave changed, comparable with ==."""
    modules = list(model.modules())
    return (
        [module.training for module in modules],
        [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in modules
        ],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
        [value.tolist() for value in model.state_dict().values()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.fixture
def tiny() -> TinyCNN:
    torch.manual_seed(0)
    return TinyCNN().double()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def class_idx() -> Tensor:
    return torch.tensor([0, 3, 4, 1, 3])
