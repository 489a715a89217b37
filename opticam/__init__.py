"""Opti-CAM: saliency maps optimised for interpretability, other saliency methods, and metrics of both.

Nothing is imported before its name is asked for, so that the command line starts at once.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opticam import _torchvision  # noqa: F401  (has to be there before torchvision is)

_NAMES = {  # module -> the public names that are found here
    "classifier": "Classifier",
    "lab.evaluation": "evaluate score",
    "layouts": "Tokens channels_first channels_last",
    "methods": "METHODS SCHEDULES OptiCAMResult class_logit fake_cam find_method grad_cam opti_cam",
    "metrics": "METRICS average_drop average_gain average_increase class_probability",
    "networks": "MODELS load_model wrap",
    "probe": "check_layout default_layer",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # who checks types reads no tables
    from opticam.classifier import Classifier as Classifier
    from opticam.lab.evaluation import evaluate as evaluate
    from opticam.lab.evaluation import score as score
    from opticam.layouts import Tokens as Tokens
    from opticam.layouts import channels_first as channels_first
    from opticam.layouts import channels_last as channels_last
    from opticam.methods import METHODS as METHODS
    from opticam.methods import SCHEDULES as SCHEDULES
    from opticam.methods import OptiCAMResult as OptiCAMResult
    from opticam.methods import class_logit as class_logit
    from opticam.methods import fake_cam as fake_cam
    from opticam.methods import find_method as find_method
    from opticam.methods import grad_cam as grad_cam
    from opticam.methods import opti_cam as opti_cam
    from opticam.metrics import METRICS as METRICS
    from opticam.metrics import average_drop as average_drop
    from opticam.metrics import average_gain as average_gain
    from opticam.metrics import average_increase as average_increase
    from opticam.metrics import class_probability as class_probability
    from opticam.networks import MODELS as MODELS
    from opticam.networks import load_model as load_model
    from opticam.networks import wrap as wrap
    from opticam.probe import check_layout as check_layout
    from opticam.probe import default_layer as default_layer
else:

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package."""
        if name in _HOMES:
            return getattr(import_module(f"opticam.{_HOMES[name]}"), name)
        if not name.startswith("_") and find_spec(f"opticam.{name}"):
            return import_module(f"opticam.{name}")
        raise AttributeError(f"module 'opticam' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
