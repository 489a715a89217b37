"""Opti-CAM on one GPU, in one command of at most eight minutes: images per second, memory, and hours for 50,000 images.

In this order: `opti_cam`, the published way of working and the bare passes (see published.py) in turn; `opti_cam`
against the batch size; `opti_cam` of a network that `torch.compile` made into CUDA graphs; the tests that need a GPU.
What the time does not allow is left out, and the JSON says so. `--device cpu --tiny` goes the same way in seconds.

Networks have random weights, which cost the same. Memory is what a call adds to networks and images on the device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

START = time.monotonic()

try:
    import torch
    from common import RESULTS, report, save
    from published import floor, published_loop
    from torch import nn
    from torchvision.models import VisionTransformer

    from opticam import MODELS, Classifier, load_model, opti_cam, wrap
except ImportError as error:
    sys.exit(f"gpu: {sys.executable} cannot import {error.name}; wanted the dependencies in pyproject.toml ({error})")

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = "resnet50", "vit_b_16"
PRECISIONS = {"float32": (None, False), "float32, TF32": (None, True), "bfloat16": (torch.bfloat16, False)}
TF32 = "on, for convolutions and matrix products, in the rows 'float32, TF32'; off in all others"
RATE = "images of 100 steps in a second, in proportion to the steps that were timed"
FULL: dict[str, Any] = {
    "steps": 50,
    "turns": 3,
    "batch": 64,
    "batches": (1, 8, 32, 128, 256),
    "compiled": (("bfloat16", 64), ("bfloat16", 1), ("float32", 64)),
}
TINY: dict[str, Any] = {"steps": 2, "turns": 1, "batch": 2, "batches": (1, 3), "compiled": (("bfloat16", 2),)}
WARM = 2  # steps
NO_TIME = "no time was left"
COMPILED = "ours, compiled"
TESTS = 75  # seconds kept for the tests

Call = Callable[[int], Any]


def sizes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Batches, steps and turns."""
    return TINY if options.tiny else FULL


@cache
def network(name: str, device: str, tiny: bool) -> Classifier:
    """A classifier with random weights, none of them all zero, since products with zeros can be faster."""
    torch.manual_seed(0)
    if tiny:
        layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)
        bare = nn.Sequential(*layers) if name == "resnet50" else VisionTransformer(32, 8, 2, 2, 16, 32)
        layer = "1" if name == "resnet50" else "encoder.layers.encoder_layer_1.ln_1"
        mean, std = MODELS[name].mean, MODELS[name].std
        model = wrap(bare, layer, name=name, mean=mean, std=std, input_size=32, resize=32).eval().to(device)
    else:
        model = load_model(name, pretrained=False, device=device)
    for weights in model.parameters():
        if weights.ndim > 1 and not weights.any():
            nn.init.normal_(weights, std=0.02)
    return model


def bare_loop(loop: Callable[..., Any], model: nn.Module, images: Any, class_idx: Any, reduced: Any) -> Call:
    """A loop of published.py as a function of the steps, all of it in reduced precision if that is asked for."""

    def call(steps: int) -> None:
        with torch.autocast(images.device.type, reduced, enabled=reduced is not None):
            loop(model, images, class_idx, steps)
        model.zero_grad()  # what the published way leaves behind is memory of each call

    return call


def ours(model: nn.Module, images: Any, class_idx: Any, reduced: Any) -> Call:
    """`opti_cam` as a function of the steps."""
    return lambda steps: opti_cam(model, images, class_idx, num_steps=steps, autocast=reduced).saliency


def measure(call: Call, steps: int, device: str) -> tuple[float, float | None]:
    """Seconds and, on a GPU, MiB of a call."""
    if device == "cpu":
        start = time.perf_counter()
        call(steps)
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call(steps)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, (torch.cuda.max_memory_allocated() - before) / 2**20


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def rows_of(
    calls: Mapping[str, Call], setting: dict[str, Any], turns: int, options: argparse.Namespace, until: float
) -> list[dict[str, Any]]:
    """One row a call: timed in turn, so that a drifting device hits all alike, as often as fits until that moment."""
    steps = sizes_of(options)["steps"]
    rows = {way: {"way": way, **setting, "steps": steps} for way in calls}
    found: dict[str, list[tuple[float, float | None]]] = {way: [] for way in calls}
    need = 0.0
    for turn in range(-2, turns):  # the first loads kernels, the second tells how long the others will take
        if time.monotonic() + need > until:
            break
        for way, call in calls.items():
            if "not measured" in rows[way]:
                continue
            try:
                seconds, mib = measure(call, WARM if turn < 0 else steps, options.device)
            except Exception as error:  # whatever it is, the other rows are worth having
                rows[way]["not measured"] = told(error)
                continue
            if turn == -1:
                need += seconds * steps / WARM
            if turn >= 0:
                found[way].append((seconds, mib))
    for way, row in rows.items():
        if "not measured" in row or not found[way]:
            row.setdefault("not measured", NO_TIME)
            continue
        taken = [seconds for seconds, _ in found[way]]
        rate = row["batch"] / statistics.median(taken) * steps / 100
        row["turns"] = len(taken)
        row["images per second"] = rate
        row["hours for 50,000 images"] = 50_000 / rate / 3600
        row["peak MiB"] = found[way][-1][1]
        if found.get("ours"):
            row["seconds / ours"] = statistics.median(a / b[0] for a, b in zip(taken, found["ours"], strict=False))
    return list(rows.values())


def prepared(name: str, precision: str, batch: int, options: argparse.Namespace) -> tuple[Any, ...]:
    """TF32 as the precision says; then model, images, classes, reduced precision, and what the row is about."""
    reduced, tf32 = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    model = network(name, options.device, options.tiny)
    images = torch.rand(batch, 3, model.input_size, model.input_size, device=options.device)
    class_idx = torch.randint(1000, (batch,), device=options.device)
    return model, images, class_idx, reduced, {"model": name, "precision": precision, "batch": batch}


def compared(name: str, precision: str, batch: int, options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Ours, the published way and the floor."""
    model, x, c, reduced, setting = prepared(name, precision, batch, options)
    plain = deepcopy(model).to(memory_format=torch.contiguous_format)
    calls = {
        "ours": ours(model, x, c, reduced),
        "published": bare_loop(published_loop, plain, x, c, reduced),
        "floor": bare_loop(floor, model, x, c, reduced),
    }
    return rows_of(calls, setting, sizes_of(options)["turns"], options, until)


def scaled(name: str, precision: str, batch: int, options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Ours alone."""
    *arguments, setting = prepared(name, precision, batch, options)
    return rows_of({"ours": ours(*arguments)}, setting, 1, options, until)


def compiled(name: str, precision: str, batch: int, options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Ours with a compiled network, as a caller would compile it, and how far its maps are from the usual ones."""
    how = {"mode": "reduce-overhead"} if options.device == "cuda" else {"backend": "aot_eager"}
    torch.compiler.reset()  # else another batch would be compiled for batches of any size
    model, *arguments, setting = prepared(name, precision, batch, options)
    call = ours(torch.compile(model, **how), *arguments)
    try:
        first, _ = measure(call, WARM, options.device)
        difference = (call(WARM) - ours(model, *arguments)(WARM)).abs().mean().item()
    except Exception as error:  # of a compiler, anything
        return [{"way": COMPILED, **setting, "not measured": told(error)}]
    (row,) = rows_of({COMPILED: call}, setting, 1, options, until)
    more = {"seconds of the first call": first, "mean |map - uncompiled|": difference}
    return [row | more | {"peak MiB": None}]  # graphs keep memory of their own, which is not seen


def compiled_apart(settings: list[tuple[str, str, int]], options: argparse.Namespace, until: float) -> list[Any]:
    """The rows of `compiled`, from a process that can be ended when the time is up, or end itself."""
    seconds = until - time.monotonic()
    command = [sys.executable, __file__, "--compiled", "--device", options.device, "--budget", str(seconds)]
    printed, reason = b"", NO_TIME
    try:
        if seconds > 0:
            done = subprocess.run(command + ["--tiny"] * options.tiny, capture_output=True, timeout=seconds)
            printed, last = done.stdout, done.stderr.decode().strip().splitlines()[-1:]
            reason = f"the process ended with {done.returncode}: {' '.join(last)}"
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
    rows = [json.loads(line) for line in printed.decode().splitlines() if line.startswith("{") and line.endswith("}")]
    for name, precision, batch in settings[len(rows) :]:
        setting = {"model": name, "precision": precision, "batch": batch}
        rows.append({"way": COMPILED, **setting, "not measured": reason})
    return rows


def gpu_tests(until: float) -> dict[str, Any]:
    """What `pytest -m gpu` says, of the files that hold such tests: others may want packages that are not here."""
    files = [str(path) for path in sorted(REPOSITORY.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    try:
        seconds = max(0, until - time.monotonic())
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"command": "pytest -m gpu", "exit status": None, "outcome": NO_TIME, "failed": []}
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"command": "pytest -m gpu", "exit status": done.returncode, "outcome": lines[-1], "failed": failed}


def main() -> None:
    """All rows, then the tests; the JSON is written anew after each block of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, batches and steps")
    parser.add_argument("--budget", type=float, default=480, help="seconds, all in all")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"gpu: torch {torch.__version__} finds no CUDA device; --device cpu --tiny tries all of it without one"
        )
    warnings.filterwarnings("error", message="out of memory")  # else fewer images in flight than the row says
    sizes, end = sizes_of(options), START + options.budget
    to_compile = [(name, *chosen) for chosen in sizes["compiled"] for name in NAMES]
    if options.compiled:
        for setting in to_compile:
            for row in compiled(*setting, options, end):
                print(json.dumps(row), flush=True)
        return
    facts = {
        "device": options.device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "TF32": TF32,
        "images per second": RATE,
        "budget": options.budget,
    }
    rows: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more:
            print(row, flush=True)
        save(options.output, rows, **facts)

    for name in NAMES:
        for precision in PRECISIONS:
            keep(compared(name, precision, sizes["batch"], options, end - TESTS))
    for name in NAMES:
        for precision in ("float32", "bfloat16"):
            for batch in sizes["batches"]:
                keep(scaled(name, precision, batch, options, end - TESTS))
    torch.cuda.empty_cache()
    keep(compiled_apart(to_compile, options, end - TESTS))
    tests = gpu_tests(end)
    report("gpu", rows, path=options.output, **facts, seconds=time.monotonic() - START, tests=tests)
    print(f"{tests['command']}: {tests['outcome']}", *tests["failed"], sep="\n")
    if tests["exit status"] not in (0, None):
        sys.exit("gpu: pytest -m gpu did not pass; see above")


if __name__ == "__main__":
    main()
