"""What a network takes and gives: images in [0,1] or its own, and logits under a softmax or a sigmoid per class."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Head = Literal["softmax", "sigmoid"]


class Classifier(nn.Module):
    """A network that takes images in [0,1], with mean/std inside, and knows its layer, head, sizes and classes.

    Attributes:
        network: the bare network.
        name: what it is called; a key of `MODELS` for those.
        layer: dotted name of its target layer, as `network` names it.
        head: "softmax", one class per image, or "sigmoid", each class for itself.
        input_size: side of the square input, in pixels.
        resize: shorter side before the centre crop, in pixels.
        class_names: one name per class, in the order of the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        layer: str,
        *,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        head: Head = "softmax",
        input_size: int = 224,
        resize: int = 256,
        class_names: list[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.layer = layer
        self.head = head
        self.input_size = input_size
        self.resize = resize
        self.class_names = class_names
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Output of the network for images (B,3,H,W) in [0,1]."""
        return self.network((images - self.mean) / self.std)


class Output(NamedTuple):
    """What a network says of images.

    Attributes:
        logits: (B,C); of a network with one logit y, (B,2): y and -y, of the class it stands for and of its absence.
        head: how probabilities follow from them.
    """

    logits: Tensor
    head: Head


def bare(model: nn.Module) -> nn.Module:
    """The network inside a `Classifier`; any other network itself, whatever its attributes are called."""
    return model.network if isinstance(model, Classifier) else model


def read(model: nn.Module, images: Tensor) -> Output:
    """One pass of the network, and what it says.

    Args:
        model: any network; of a `Classifier`, its own `head` counts, of any other a softmax is taken, unless it has one
            logit.
        images: (B,C,H,W) float; a network that works in place works on a copy.

    Raises:
        TypeError: the output holds no tensor of logits.
        ValueError: the logits are not (B,C) of the images.
    """
    logits = _logits(model(images.clone() if images.is_leaf else images))
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"model: wanted logits ({len(images)},C), got shape {tuple(logits.shape)}; see opticam.wrap")
    if logits.shape[1] == 1:
        return Output(torch.cat([logits, -logits], 1), "sigmoid")
    return Output(logits, model.head if isinstance(model, Classifier) else "softmax")


def _logits(output: object) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"model: wanted a network that returns logits, got {type(output).__name__}; see opticam.wrap")
    return output


def class_logit(logits: Tensor, class_idx: Tensor) -> Tensor:
    """The logit of each image's class, (B,), from logits (B,C) and classes (B,) int64."""
    return logits.gather(1, class_idx[:, None])[:, 0]


def as_softmax(logits: Tensor, class_idx: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Logits and classes of which a softmax gives the head's own probabilities.

    Under a sigmoid the only rival of a class is its absence, whose logit is 0: `sigmoid(y) = softmax((y, 0))_0`. So
    whatever is written for a softmax is right for both.

    Args:
        logits: (B,C).
        class_idx: (B,) int64.
        head: of the network.

    Returns:
        Logits (B,C) and class_idx as given, or, of a sigmoid, logits (B,2) and zeros.
    """
    if head == "softmax":
        return logits, class_idx
    y = class_logit(logits, class_idx)
    return torch.stack([y, torch.zeros_like(y)], 1), torch.zeros_like(class_idx)
