"""Make torchvision importable beside a CPU build of torch.

The package index's Linux wheels of torchvision are built against CUDA. Beside a CPU build of torch their compiled
operators do not load, and torchvision's import then fails while it describes two of them (nms and its quantised twin),
which no classifier uses. Declaring the two lets the import go on; calling them fails as it should.
"""

import torch

_MISSING_OPERATORS = ("torchvision::nms", "torchvision::qnms")

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in _MISSING_OPERATORS:
        torch.library.define(_name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
