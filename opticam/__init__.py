"""Opti-CAM: saliency maps optimised for interpretability, the methods it is compared with, and their metrics."""

from opticam import _torchvision  # noqa: F401  (before anything else imports torchvision)
from opticam.evaluate import evaluate, score
from opticam.methods import METHODS, SCHEDULES, OptiCAMResult, class_logit, fake_cam, find_method, grad_cam, opti_cam
from opticam.metrics import METRICS, average_drop, average_gain, average_increase, class_probability
from opticam.models import MODELS, Classifier, load_model

__all__ = [
    "METHODS",
    "METRICS",
    "MODELS",
    "SCHEDULES",
    "Classifier",
    "OptiCAMResult",
    "average_drop",
    "average_gain",
    "average_increase",
    "class_logit",
    "class_probability",
    "evaluate",
    "fake_cam",
    "find_method",
    "grad_cam",
    "load_model",
    "opti_cam",
    "score",
]
