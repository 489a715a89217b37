"""Seconds an image and peak memory of `opti_cam`, against batch, steps, image size and the number of images streamed.

Every row is a process of its own, so that no peak hides another. Memory is what was added to the loaded network: of the
process on a CPU (resident set), of the allocator on a GPU.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from common import report

from opticam import METHODS, evaluate, load_model, opti_cam
from opticam.lab.datasets import demo

USUAL = {"batch": 4, "steps": 10, "size": 224, "images": 4}
VARIED = {"batch": (1, 4, 16), "steps": (5, 10, 40), "size": (160, 224, 320), "images": (4, 20, 100)}


def measure(name: str, batch: int, steps: int, size: int, images: int) -> dict[str, Any]:
    """One row: `images` photos of the demo, again and again, by way of `evaluate` if there are more than a batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = load_model(name, pretrained=False, device=device)  # random weights cost the same
    photos = demo(size, size)
    if images > batch:
        repeated = torch.utils.data.Subset(photos, [i % len(photos) for i in range(images)])
        run = partial(evaluate, model, repeated, {"": partial(METHODS["opti_cam"], num_steps=steps)}, batch_size=batch)
    else:
        x = torch.stack([photos[i % len(photos)].image for i in range(batch)]).to(device)
        run = partial(opti_cam, model, x, torch.zeros(batch, dtype=torch.int64, device=device), num_steps=steps)
    with torch.no_grad():
        model(photos[0].image[None].to(device))
    before = _peak(device)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {
        "model": name,
        "batch": batch,
        "steps": steps,
        "size": size,
        "images": images,
        "seconds per image and step": seconds / max(batch, images) / steps,
        "peak MiB": (_peak(device) - before) / 2**20,
    }


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Vary one thing at a time around the usual."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0"])
    options = parser.parse_args()
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for name in options.models:
            for varied, values in VARIED.items():
                for value in values:
                    setting = USUAL | {varied: value}
                    if varied == "batch":
                        setting["images"] = value
                    rows.append({"varied": varied} | processes.submit(measure, name, **setting).result())
                    print(rows[-1], flush=True)
    report("scale", rows)


if __name__ == "__main__":
    main()
