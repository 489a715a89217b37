"""The methods compared, by name: `METHODS[name](model, images, class_idx, *, layer=None) -> saliency (B,1,H,W)`."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from opticam.methods import attention, perturbation
from opticam.methods.ascent import adam, adam_cosine, map_space, weight_space
from opticam.methods.cam import RECORDS as _CAM
from opticam.methods.cam import fake_cam, grad_cam
from opticam.methods.libraries import LIBRARIES, class_of, library_map
from opticam.methods.opti_cam import OBJECTIVES, OptiCAMResult, class_logit, odds_gain, opti_cam, squared_distance
from opticam.methods.opti_cam import RECORDS as _OPTI_CAM
from opticam.methods.record import Method
from opticam.saliency import blur, mean_color
from opticam.state import in_a_line

METHODS: dict[str, Method] = {**_CAM, **perturbation.RECORDS, **attention.RECORDS, **_OPTI_CAM}
GRAD_CAMS = ("x_grad_cam", "hires_cam")  # Grad-CAM by algebra where pooling and one linear layer follow

_FAST: dict[str, Any] = {"space": map_space, "optimizer": adam_cosine, "num_steps": 18, "lr": 0.3}
SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"space": weight_space, "optimizer": adam, "num_steps": 100, "lr": 0.1},
    "fast": _FAST,
    "robust": {
        **_FAST,
        "objective": odds_gain,
        "baseline": (None, mean_color, blur),
        "anchor": grad_cam,
        "penalty": partial(squared_distance, beta=5.0, low=10.0),
    },
}
"""Options of `opti_cam` by name. "paper": as published. "fast": fewer steps. "robust": for other judges too (ours)."""


def light_methods() -> list[str]:
    """What a comparison over many images takes by default: methods that cost little and need nothing special."""
    return [name for name, method in METHODS.items() if method.cost == "light" and not method.needs]


def method_label(name: str) -> str:
    """A method's name as tables and figures show it; a name that `find_method` does not know, as it is."""
    method, _, schedule = str(name).partition(":")  # an index may have pairs of names
    if method == "opti_cam" and schedule in SCHEDULES:
        return f"{METHODS[method].label}, {schedule}"
    return getattr(METHODS.get(name), "label", name)


def method_color(name: str) -> str:
    """The colour of a method's bars and points, "#rrggbb"; gray for a name that `find_method` does not know."""
    of_schedule = {"opti_cam:fast": "#e69f00", "opti_cam:robust": "#7f2704"}
    return of_schedule.get(name, getattr(METHODS.get(name), "color", "#949494"))


def one_per_map(
    model: nn.Module, images: Tensor, class_idx: Tensor, methods: Mapping[str, Callable[..., Tensor]]
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """The methods without those that are Grad-CAM under another name on this network.

    Where global average pooling and one linear layer follow, XGrad-CAM and HiRes-CAM are Grad-CAM by algebra. Whether
    they are is seen from their maps; those of two or three images are enough.

    Returns:
        The methods to use; and name -> "grad_cam" for each that was left out.
    """
    asked = [name for name in ("grad_cam", *GRAD_CAMS) if name in methods]
    maps = {name: methods[name](model, images, class_idx) for name in asked if "grad_cam" in asked}
    same = {
        name: "grad_cam" for name, S in maps.items() if name != "grad_cam" and (S - maps["grad_cam"]).abs().max() < 1e-4
    }
    return {name: method for name, method in methods.items() if name not in same}, same


def find_method(name: str) -> Callable[..., Tensor]:
    """The method of that name in `METHODS`, or Opti-CAM by a schedule, or one of another library.

    Args:
        name: in `METHODS`; or `opti_cam:NAME` with a name in `SCHEDULES`, such as `opti_cam:fast`; or `captum:NAME`,
            `grad-cam:NAME`, `torchcam:NAME`.

    Raises:
        ValueError: no such method.
        ImportError: the library is not installed.
    """
    library, separator, inner = name.partition(":") if isinstance(name, str) else ("", "", "")
    if separator and library in LIBRARIES:
        class_of(library, inner)  # refused here where there is none
        return partial(library_map, library=library, name=inner)
    if library == "opti_cam" and inner in SCHEDULES:
        return partial(METHODS[library], **SCHEDULES[inner])
    if name not in METHODS:
        others = ", ".join(f"{library}:NAME" for library in ["opti_cam", *LIBRARIES])
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, {others}, got {name!r}")
    return METHODS[name]


def find_methods(names: Collection[str], **options: Mapping[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """Methods by name, each with its own options: `find_methods(["grad_cam", "rise"], rise={"num_masks": 500})`.

    Args:
        names: as `find_method` takes them.
        options: method -> its keyword arguments; those of a method that is not asked for change nothing.

    Raises:
        ValueError: no such method, among the names or among the options.
        ImportError: a library is not installed.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names: wanted a list of names of methods, got {in_a_line(names)}")
    for name in options:
        find_method(name)
    return {name: partial(find_method(name), **options.get(name, {})) for name in names}
