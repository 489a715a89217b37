"""A page to explore one decision in a notebook: photo, network, method and class chosen by hand.

`explanation_of` computes, and needs no page. `Explorer` is the page: its work runs in a thread, so that the kernel
answers, and ends between two modules of the network when someone presses Stop.
"""

import html
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from opticam.checks import as_names, check_at_least, check_network, check_whole, examine
from opticam.classifier import Head, probabilities, probs_of_class, read
from opticam.features import count_passes, prepared, watched
from opticam.lab.datasets import demo, read_image, to_input
from opticam.lab.plotting import objective_curve, overlay, probability_bars, to_picture
from opticam.methods import METHODS, class_logit, find_method, method_label
from opticam.methods.opti_cam import Step
from opticam.metrics import METRICS
from opticam.networks import MODELS, Classifier, class_index, load_model
from opticam.saliency import apply_mask
from opticam.state import frozen

KEPT = 50  # maps on the way of Opti-CAM, at most, besides the first and the best
MOST_STEPS = 1000
UPLOAD = "upload"  # stands for a path among the photos
REFUSALS = (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError)  # what bad input ends in


class Stopped(Exception):  # noqa: N818  (somebody's wish, no error)
    """The work was stopped on demand."""


class Explanation(NamedTuple):
    """One decision explained. T is 0 for all methods but `opti_cam`.

    Attributes:
        method: name in `METHODS`.
        class_idx: the class explained.
        image: (3,H,W) in [0,1].
        logits: (C,), of the image.
        masked_logits: (C,), of the image masked by the map.
        head: how probabilities follow from them.
        saliency: (1,H,W) in [0,1], the map.
        step: after how many steps it was reached.
        maps: step -> (1,H,W) in [0,1], some on the way and the map itself.
        objective: (T+1,), the class logit of the masked image before the first step and after each.
        masked_prob: (T+1,), the probability of the class, likewise.
    """

    method: str
    class_idx: int
    image: Tensor
    logits: Tensor
    masked_logits: Tensor
    head: Head
    saliency: Tensor
    step: int
    maps: dict[int, Tensor]
    objective: Tensor
    masked_prob: Tensor

    @property
    def probs(self) -> Tensor:
        """(C,) float64 in [0,1], of the image."""
        return probabilities(self.logits[None].double(), self.head)[0]

    @property
    def masked_probs(self) -> Tensor:
        """(C,) float64 in [0,1], of the masked image."""
        return probabilities(self.masked_logits[None].double(), self.head)[0]


def explanation_of(
    model: nn.Module,
    image: Tensor,
    class_idx: int,
    method: str = "opti_cam",
    *,
    num_steps: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda passes: None,
) -> Explanation:
    """One decision explained by one method, with the way there if it is Opti-CAM.

    Args:
        model: takes images (B,3,H,W), see `classifier.read`. Left as found, also when stopped.
        image: (3,H,W) float in [0,1].
        class_idx: the class to explain.
        method: a name that `find_method` takes.
        num_steps: of Opti-CAM, then T; None for 100, or what a schedule such as `opti_cam:fast` has.
        stopped: asked after every module of the network that has run; True ends the work.
        progress: told how many images have passed through the network, after every pass.

    Returns:
        An `Explanation`, on the device of the image.

    Raises:
        Stopped: `stopped` said so.
        ValueError: unknown method, one that does not apply to the model, or an argument out of range.
    """
    check_network(model)
    check_whole(0, class_idx=class_idx)
    check_at_least(0, num_steps=num_steps)
    images, target = image[None], torch.tensor([int(class_idx)], device=image.device)
    every = max(1, -(-(num_steps or 100) // KEPT))
    maps: dict[int, Tensor] = {}
    followed: list[tuple[Tensor, Tensor]] = []

    def follow(step: Step) -> None:
        if step.number % every == 0:
            maps[step.number] = step.saliency[0]
        followed.append((step.objective[0], probs_of_class(step.masked_logits, step.class_idx)[0]))

    def watch(module: nn.Module) -> None:
        if stopped():
            raise Stopped
        if module is model:
            progress(passes[0])

    with count_passes(model) as passes, watched(model, watch):
        options: dict[str, Any] = {"on_step": follow} if method == "opti_cam" else {}
        if num_steps is not None and str(method).partition(":")[0] == "opti_cam":
            options["num_steps"] = num_steps
        saliency = find_method(method)(model, images, target, **options)
        with frozen(model), torch.no_grad():
            x = prepared(model, images)
            logits, head = examine(model, x)
            masked_logits = read(model, apply_mask(x, saliency)).logits
    objective = class_logit(masked_logits, logits, target)
    masked_prob = probs_of_class(masked_logits, target, head)
    if followed:
        objective, masked_prob = map(torch.stack, zip(*followed, strict=True))
    step = int(objective.nan_to_num(-torch.inf).argmax())
    maps = dict(sorted({**maps, step: saliency[0]}.items()))
    return Explanation(
        method, class_idx, image, logits[0], masked_logits[0], head, saliency[0], step, maps, objective, masked_prob
    )


def describe(found: Explanation, class_names: Sequence[str]) -> str:
    """The outcome in one line: what masking does to the class, with Average Drop and Average Gain of this photo."""
    p, o = (probs[[found.class_idx]] for probs in (found.probs, found.masked_probs))
    name = as_names(class_names)[found.class_idx]
    drop, gain = (100 * METRICS[name](p, o).item() for name in ("average_drop", "average_gain"))
    line = f"{method_label(found.method)} for {name}: probability {100 * p.item():.1f} % -> "
    line += f"{100 * o.item():.1f} % when masked (drop {drop:.1f} %, gain {gain:.1f} % of what was possible)"
    return f"{line}. The map is constant: nothing is found." if found.saliency.amax() == found.saliency.amin() else line


def read_upload(name: str, content: bytes, window: tuple[float, float] | None = None) -> Image.Image:
    """A photo from the bytes of its file, as `read_image` reads it; errors as there, with the name of the file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        try:
            return read_image(path, window=window)
        except (OSError, ValueError) as error:
            raise type(error)(str(error).replace(str(path), name)) from error


def _png(picture: np.ndarray | Figure) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png")
    else:
        Image.fromarray((255 * picture).round().astype(np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def _picture(width: int) -> widgets.Image:
    return widgets.Image(format="png", layout={"width": f"{width}px", "height": "auto", "flex": "0 0 auto"})


def _titled(title: str, content: widgets.Widget) -> widgets.VBox:
    return widgets.VBox([widgets.HTML(html.escape(title)), content], layout={"margin": "0 12px 8px 0"})


class Explorer:
    """The page. Display it in a notebook; everything on it can also be set and called from code.

    Attributes:
        model: the network at work.
        image: (3,H,W), the photo as the network sees it.
        explanation: the latest of this photo, None before the first.
        comparison: method -> explanation, the latest of this photo; methods that were refused are left out.
    """

    def __init__(
        self,
        photo: int = 0,
        model: str = "efficientnet_lite0",
        method: str = "opti_cam",
        num_steps: int = 100,
        compared: Sequence[str] = ("equal_weights", "grad_cam", "layer_cam", "opti_cam"),
        device: str = "cpu",
        checkpoint: str = "",
    ) -> None:
        """Load the network and look at the photo.

        Args:
            photo: number of a demo photo.
            model: a name as in `load_model`; it is offered beside those in `MODELS`.
            method: a name in `METHODS`.
            num_steps: of Opti-CAM.
            compared: names in `METHODS`, for the button Compare.
            device: where to compute.
            checkpoint: file with own weights of `model`, or a .toml that says more; see `load_model`.

        Raises:
            ValueError: an unknown name or number.
        """
        photos = demo()
        if not 0 <= photo < len(photos):
            raise ValueError(f"photo: wanted a number in 0..{len(photos) - 1}, got {photo}")
        for name in (method, *compared):
            if name not in METHODS:
                raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {name!r}")
        if not 0 <= num_steps <= MOST_STEPS:
            raise ValueError(f"num_steps: wanted a number in 0..{MOST_STEPS}, got {num_steps}")
        self.device = device
        self._checkpoints = {model: checkpoint or None}
        self.model: Classifier = self._load(model)
        self.explanation: Explanation | None = None
        self.comparison: dict[str, Explanation] = {}
        self._uploaded: tuple[str, bytes] | None = None
        self._stop, self._thread = threading.Event(), threading.Thread()
        self._build([(f"{i}: {photos.class_names[p.label]}", p.path) for i, p in enumerate(photos.records)], model)
        self.photo_choice.index, self.method_choice.value = photo, method
        self.steps.value, self.compared.value = num_steps, tuple(compared)
        self._look()
        for choice in (self.photo_choice, self.model_choice):
            choice.observe(lambda change: self.start(self._look), "value")

    def _load(self, name: str) -> Classifier:
        return load_model(name, checkpoint=self._checkpoints.get(name), device=self.device)

    def _build(self, photos: list[tuple[str, Path]], model: str) -> None:
        labels = [(method_label(name), name) for name in METHODS]
        self.photo_choice = widgets.Dropdown(options=[*photos, ("your upload", UPLOAD)], description="photo")
        self.upload = widgets.FileUpload(accept="image/*", description="Upload", layout={"width": "148px"})
        self.model_choice = widgets.Dropdown(options=list({**MODELS, model: None}), value=model, description="network")
        self.method_choice = widgets.Dropdown(options=labels, description="method")
        self.steps = widgets.BoundedIntText(min=0, max=MOST_STEPS, description="steps", layout={"width": "180px"})
        self.class_choice = widgets.Dropdown(description="class")
        self.class_search = widgets.Combobox(placeholder="or any: name or number", continuous_update=False)
        self.compared = widgets.SelectMultiple(options=labels, rows=len(labels), layout={"width": "170px"})
        self.explain_button = widgets.Button(description="Explain", button_style="primary", icon="search")
        self.compare_button = widgets.Button(description="Compare", icon="th")
        self.stop_button = widgets.Button(description="Stop", button_style="danger", icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(max=1, layout={"width": "200px"})
        self.status = widgets.HTML()
        self.photo, self.map, self.masked = (_picture(256) for _ in range(3))
        self.step = widgets.SelectionSlider(options=[0], description="after step", layout={"width": "500px"})
        self.step_outcome = widgets.HTML()
        self.bars, self.curve = _picture(440), _picture(440)
        self.grid_title = widgets.HTML()
        self.grid = widgets.Box(layout={"flex_flow": "row wrap"})
        self.upload.observe(lambda change: self.start(self._take_upload), "value")
        self.step.observe(lambda change: self._show_step(), "value")
        self.explain_button.on_click(lambda button: self.start(self.explain))
        self.compare_button.on_click(lambda button: self.start(self.compare))
        self.stop_button.on_click(lambda button: self._stop.set())
        maps = [_titled("map over the photo", self.map), _titled("masked photo", self.masked)]
        below = [widgets.HBox([self.step, self.step_outcome]), widgets.HBox([self.bars, self.curve])]
        grid = widgets.VBox([self.grid_title, self.grid])
        self._results, self._compared = [*maps, *below], [grid]
        buttons = [self.explain_button, self.compare_button]
        choices = [self.photo_choice, self.upload, self.class_choice, self.class_search]
        choices += [self.model_choice, self.method_choice, self.steps]
        self._controls = [*choices, self.compared, *buttons]
        above = [choices[:2], choices[2:4], choices[4:], [*buttons, self.stop_button, self.progress]]
        photos_row = widgets.HBox([_titled("photo, as the network sees it", self.photo), *maps])
        comparison = widgets.HBox([_titled("to compare (several: Ctrl)", self.compared), grid])
        self.page = widgets.VBox([*map(widgets.HBox, above), self.status, photos_row, *below, comparison])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        page = self.page._repr_mimebundle_(**options)
        return {**page, "text/plain": "The page is alive only in a running notebook: Run, Run All Cells."}

    def start(self, work: Callable[[], None]) -> None:
        """Start work of this page in a thread, unless some is under way; the page shows how it ends."""
        if self._thread.is_alive():
            return
        self._stop.clear()
        self._lock(True)
        self._thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the work under way, if any, has ended."""
        if self._thread.is_alive():
            self._thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            self._say(f"Stopped after {self._reached}. The network is as it was; what was finished before is shown.")
        except REFUSALS as error:
            self._say(str(error) or "not enough memory", color="#b00020")
        finally:
            self._lock(False)

    def _lock(self, busy: bool) -> None:
        for control in self._controls:
            control.disabled = busy
        self.stop_button.disabled = not busy
        self.progress.value = 0

    def _say(self, text: str, color: str = "inherit") -> None:
        self.status.value = f'<span style="color:{color}">{html.escape(text)}</span>'

    def _take_upload(self) -> None:
        if self.upload.value:
            (file,) = self.upload.value
            uploaded = file["name"], bytes(file["content"])
            read_upload(*uploaded, self.model.window)
            self._uploaded = uploaded
            self.photo_choice.value = UPLOAD
            self._look()

    def _look(self) -> None:
        """Bring photo and network together: load both, show the photo and offer its five likeliest classes."""
        path, uploaded, name = wanted = self._wanted()
        if path == UPLOAD and not uploaded:
            raise ValueError("photo: nothing is uploaded yet")
        model = self.model
        if model.name != name:
            self._say(f"Loading {name} ...")
            model = self._load(name)
        photo = read_upload(uploaded[0], uploaded[1], model.window) if uploaded else read_image(path)
        self.model = model
        self.image = to_input(photo, model.input_size, model.resize).to(self.device)
        with torch.no_grad():
            top = probabilities(*read(model, self.image[None]))[0].double().topk(min(5, len(model.class_names)))
        likeliest = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        self.class_choice.options = [(f"{model.class_names[i]} ({100 * prob:.1f} %)", i) for prob, i in likeliest]
        self.class_choice.index = 0
        self._seen = wanted
        self.class_search.options = model.class_names
        self.photo.value = _png(to_picture(self.image))
        self.explanation, self.comparison = None, {}
        self._show([*self._results, *self._compared], False)
        self._say("Press Explain for a map by the chosen method, Compare for several.")

    def _wanted(self) -> tuple:
        path = self.photo_choice.value
        return path, self._uploaded if path == UPLOAD else None, self.model_choice.value

    def _chosen_class(self) -> int:
        """Load what was chosen, unless it is loaded; the class of the search field, or else of the list."""
        if self._seen != self._wanted():
            self._look()
        words = self.class_search.value.strip()
        return class_index(words, self.model.class_names) if words else self.class_choice.value

    def _explanation_of(self, method: str, class_idx: int) -> Explanation:
        num_steps, label = self.steps.value, method_label(method)

        def progress(passes: int) -> None:
            self._reached = f"{passes} passes of the network"
            if method == "opti_cam":  # one pass for the feature maps and two at the end are no steps
                step = min(max(passes - 2, 0), num_steps)
                self._reached, self.progress.value = f"{step} of {num_steps} steps", step / max(num_steps, 1)
            self._say(f"{label}: {self._reached}")

        self._reached, self.progress.value = "0 passes of the network", 0
        told = {"num_steps": num_steps, "stopped": self._stop.is_set, "progress": progress}
        return explanation_of(self.model, self.image, class_idx, method, **told)

    def explain(self) -> None:
        """Explain the chosen class by the chosen method and show it."""
        class_idx = self._chosen_class()
        self.explanation = found = self._explanation_of(self.method_choice.value, class_idx)
        bars = probability_bars(found.probs.cpu(), found.masked_probs.cpu(), self.model.class_names, class_idx)
        self.bars.value = _png(bars)
        self.step.disabled = len(found.maps) == 1
        self.step.options = [(str(step), step) for step in found.maps]
        self.step.value = found.step
        self._show_step()
        self._show(self._results, True)
        self._say(describe(found, self.model.class_names))

    def compare(self) -> None:
        """Explain the chosen class by each of the methods to compare, side by side."""
        class_idx = self._chosen_class()
        name = self.model.class_names[class_idx]
        self.comparison, tiles = {}, []
        self.grid_title.value = html.escape(f"Probability of {name} when masked by the map of each method:")
        self.grid.children = ()
        self._show(self._compared, True)
        for method in self.compared.value:
            label, picture = method_label(method), _picture(156)
            try:
                found = self.comparison[method] = self._explanation_of(method, class_idx)
                label = f"{label}: {100 * found.masked_prob[found.step]:.1f} %"
                picture.value = _png(overlay(found.image, found.saliency))
            except REFUSALS as error:  # the others may well apply
                picture = widgets.HTML(html.escape(str(error)), layout=widgets.Layout(width="156px"))
            tiles.append(_titled(label, picture))
            self.grid.children = tiles
        self._say(f"{len(self.comparison)} methods compared for {name}.")

    def _show(self, parts: Sequence[widgets.Widget], visible: bool) -> None:
        for part in parts:
            part.layout.display = None if visible else "none"

    def _show_step(self) -> None:
        found, step = self.explanation, self.step.value
        if found is None or step not in found.maps:  # between two explanations
            return
        saliency = found.maps[step]
        self.map.value = _png(overlay(found.image, saliency))
        self.masked.value = _png(to_picture(apply_mask(found.image[None], saliency[None])[0]))
        prob = 100 * found.masked_prob[step]
        self.step_outcome.value = f"logit {found.objective[step]:.2f}, probability {prob:.1f} %"
        self._show([self.curve], len(found.objective) > 1)
        if len(found.objective) > 1:
            self.curve.value = _png(objective_curve(found.objective, found.logits[found.class_idx].item(), step))
