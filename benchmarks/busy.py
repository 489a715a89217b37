"""What a process that keeps a core busy costs a kernel of two threads beside it, on two cores.

By default threads of OpenMP that wait for each other keep their core for milliseconds, those of the runner's kernels
for less, passive ones not at all. One thread is what the runner gives where it finds one core free.
"""

import argparse
import os
import signal
import subprocess
import sys
from functools import partial

from common import interleaved, median_ratio, report

from opticam.jobs.runner import KEEP_MEMORY, SHORT_SPIN

SETTINGS = {
    "default": {"OMP_NUM_THREADS": "2"},
    "runner": {"OMP_NUM_THREADS": "2", **SHORT_SPIN},
    "passive": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
PIECES = ["opti_cam, batch 10", "opti_cam, batch 1", "training a small ViT"]


def child(steps: int) -> None:
    """Work on a piece whenever its name comes in, and answer when it is done."""
    import torch
    from timm.models import VisionTransformer
    from torch.nn.functional import cross_entropy

    from opticam import load_model, opti_cam
    from opticam.lab.datasets import demo

    network = load_model("efficientnet_lite0")
    samples = list(demo(network.input_size, network.resize, limit=10))
    images = torch.stack([sample.image for sample in samples])
    class_idx = torch.tensor([sample.label for sample in samples])
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    small = VisionTransformer(**shape, num_classes=10)  # that of notebook 06
    optimizer = torch.optim.AdamW(small.parameters())
    pictures, labels = torch.rand(48, 3, 64, 64), torch.arange(48) % 10

    def train() -> None:
        for _ in range(2 * steps):
            optimizer.zero_grad()
            cross_entropy(small(pictures), labels).backward()
            optimizer.step()

    batches = [partial(opti_cam, network, images[:n], class_idx[:n], num_steps=steps) for n in (10, 1)]
    pieces = dict(zip(PIECES, [*batches, train], strict=True))
    for name in sys.stdin:
        pieces[name.strip()]()
        print(flush=True)


def main() -> None:
    """Let processes of all settings work in turn, alone and with the neighbour awake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.steps)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    command = [sys.executable, __file__, "--child", "--steps", str(options.steps)]
    processes, rows = [_start([sys.executable, "-c", "while True: pass"], {})], []
    neighbour = processes[0]
    neighbour.send_signal(signal.SIGSTOP)

    def work(process: subprocess.Popen[str], piece: str, beside: bool) -> None:
        if beside:
            neighbour.send_signal(signal.SIGCONT)
        print(piece, file=process.stdin, flush=True)
        process.stdout.readline()
        neighbour.send_signal(signal.SIGSTOP)

    try:
        workers = {name: _start(command, KEEP_MEMORY | setting) for name, setting in SETTINGS.items()}
        processes += workers.values()
        for piece in PIECES:
            runs = {
                f"{name}, {where}": partial(work, worker, piece, where == "busy")
                for name, worker in workers.items()
                for where in ("alone", "busy")
            }
            seconds = interleaved(runs, options.repeats)
            for name in SETTINGS:
                alone, busy = (f"{name}, {where}" for where in ("alone", "busy"))
                row = {"piece": piece, "kernel": name, "busy / alone": median_ratio(seconds, busy, alone)}
                row["alone / default alone"] = median_ratio(seconds, alone, "default, alone")
                row["busy / default alone"] = median_ratio(seconds, busy, "default, alone")
                rows.append(row)
                print(rows[-1], flush=True)
    finally:
        for process in processes:
            process.kill()
    report("busy", rows, steps=options.steps, settings=SETTINGS)


def _start(command: list[str], setting: dict[str, str]) -> subprocess.Popen[str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    # a session of its own, as a kernel has: Linux shares out the cores among sessions first
    return subprocess.Popen(
        command, env=bare | setting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


if __name__ == "__main__":
    main()
