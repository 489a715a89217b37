"""What the runner saves on a CPU by telling glibc to keep freed memory: Opti-CAM in processes with and without."""

import argparse
import json
import os
import subprocess
import sys

from common import interleaved, median_ratio, report

from opticam.jobs.runner import KEEP_MEMORY


def child(model: str, batch: int, steps: int) -> None:
    """Print the seconds of the second of two calls."""
    import torch

    from opticam import load_model, opti_cam
    from opticam.lab.datasets import demo

    network = load_model(model, pretrained=model.startswith("efficientnet_lite"))
    samples = list(demo(network.input_size, network.resize, limit=batch))
    images = torch.stack([sample.image for sample in samples])
    class_idx = torch.tensor([sample.label for sample in samples])
    runs = {"ours": lambda: opti_cam(network, images, class_idx, num_steps=steps)}
    print(json.dumps(interleaved(runs, 1)["ours"][0]))


def main() -> None:
    """Time processes of both kinds in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.batch, options.steps)
        return
    bare = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    rows = []
    for model in options.models:
        command = [sys.executable, __file__, "--child", model, "--batch", str(options.batch)]
        command += ["--steps", str(options.steps)]
        seconds: dict[str, list[float]] = {"default": [], "kept": []}
        for _ in range(options.repeats):
            for name, env in (("default", bare), ("kept", bare | KEEP_MEMORY)):
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                seconds[name].append(json.loads(done.stdout))
        rows.append(
            {"model": model, "batch": options.batch, "default / memory kept": median_ratio(seconds, "default", "kept")}
        )
        print(rows[-1], flush=True)
    report("allocator", rows, steps=options.steps, settings=KEEP_MEMORY)


if __name__ == "__main__":
    main()
