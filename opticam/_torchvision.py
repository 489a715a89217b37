"""Make torchvision importable beside a CPU build of torch.

The package index's Linux wheels of torchvision are built against CUDA. Beside a CPU build of torch their compiled
operators do not load, and torchvision's import then fails while it describes two of them (nms and its quantised twin),
which no classifier uses. Declaring the two lets the import go on; calling them fails as it should.

They are declared when an import of torchvision, whoever asks for it, comes to that point. The package sets this up
before any of its modules runs, and needs no torch for it.
"""

import sys


class _Declaring:
    """Asked where a module is found, leaves the answer to others, but not without declaring the operators in time."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision._meta_registrations":  # runs next, after the attempt to load the compiled operators
            import torch

            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", signature)


sys.meta_path.insert(0, _Declaring)
