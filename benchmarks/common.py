"""What all benchmarks share: the machine's facts, interleaved medians, a table on screen and JSON on disk."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, device and versions: what a ratio may depend on."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
    }


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn after one warm-up each: a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over the repeats of how many times longer `slow` took than `fast` in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def report(name: str, rows: list[dict[str, Any]], path: Path | None = None, **facts: Any) -> None:
    """Print the rows as a table and write them with the machine's facts to `path`, or `results/NAME[_gpu].json`."""
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))
    suffix = "_gpu" if torch.cuda.is_available() else ""
    save(path or RESULTS / f"{name}{suffix}.json", rows, **facts)


def save(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write rows with the machine's facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **facts, "rows": rows}, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
