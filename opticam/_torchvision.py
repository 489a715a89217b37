"""Lets torchvision be imported beside a torch of another build, and says how to install the two properly.

The package index's Linux wheels of torchvision are built for one version of CUDA. Beside a torch for the CPU, or for
another CUDA, their compiled operators do not load, and torchvision's import fails while it describes two of them (nms
and its quantised twin), which no classifier uses. Declaring the two lets the import go on; calling them fails as it
should. Where the builds belong together nothing is done. The file can go once no such pair can be installed.
"""

import os
import sys
import warnings

_WARNING = (
    "torchvision's compiled operators, which no classifier needs, do not load beside this torch: the two are of "
    "different builds. A pair that belongs together comes from one source, both for the CPU or both for one version of "
    "CUDA; this message then goes."
)


class _Declaring:
    """Asked where a module is found, leaves the answer to others, but not without declaring the operators in time."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision._meta_registrations":  # runs next, after the attempt to load the compiled operators
            import torch

            missing = [operator for operator in ("nms", "qnms") if not hasattr(torch.ops.torchvision, operator)]
            for operator in missing:
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", signature)
            if missing and "OPTICAM_PROGRESS" not in os.environ:  # a notebook that is run by command has no reader yet
                warnings.warn_explicit(_WARNING, UserWarning, "torchvision", 1)


sys.meta_path.insert(0, _Declaring)
