"""Opti-CAM: saliency maps optimised for interpretability, other saliency methods, and metrics of both.

Nothing is imported before its name is asked for, so that the command line starts at once.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opticam import _torchvision  # noqa: F401  (has to be there before torchvision is)

__all__ = [
    "METHODS",
    "METRICS",
    "MODELS",
    "SCHEDULES",
    "Classifier",
    "OptiCAMResult",
    "Tokens",
    "average_drop",
    "average_gain",
    "average_increase",
    "channels_first",
    "channels_last",
    "check_layout",
    "class_logit",
    "class_probability",
    "default_layer",
    "evaluate",
    "fake_cam",
    "find_method",
    "grad_cam",
    "load_model",
    "opti_cam",
    "score",
    "wrap",
]

if TYPE_CHECKING:
    from opticam.classifier import Classifier
    from opticam.lab.evaluation import evaluate, score
    from opticam.layouts import Tokens, channels_first, channels_last
    from opticam.methods import (
        METHODS,
        SCHEDULES,
        OptiCAMResult,
        class_logit,
        fake_cam,
        find_method,
        grad_cam,
        opti_cam,
    )
    from opticam.metrics import METRICS, average_drop, average_gain, average_increase, class_probability
    from opticam.networks import MODELS, load_model, wrap
    from opticam.probe import check_layout, default_layer
else:
    _HOMES = {
        "METHODS": "methods",
        "METRICS": "metrics",
        "MODELS": "networks",
        "SCHEDULES": "methods",
        "Classifier": "classifier",
        "OptiCAMResult": "methods",
        "Tokens": "layouts",
        "average_drop": "metrics",
        "average_gain": "metrics",
        "average_increase": "metrics",
        "channels_first": "layouts",
        "channels_last": "layouts",
        "check_layout": "probe",
        "class_logit": "methods",
        "class_probability": "metrics",
        "default_layer": "probe",
        "evaluate": "lab.evaluation",
        "fake_cam": "methods",
        "find_method": "methods",
        "grad_cam": "methods",
        "load_model": "networks",
        "opti_cam": "methods",
        "score": "lab.evaluation",
        "wrap": "networks",
    }

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package."""
        if name in _HOMES:
            return getattr(import_module(f"opticam.{_HOMES[name]}"), name)
        if not name.startswith("_") and find_spec(f"opticam.{name}"):
            return import_module(f"opticam.{name}")
        raise AttributeError(f"module 'opticam' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
