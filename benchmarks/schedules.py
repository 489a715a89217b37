"""Fewer passes for the same quality: schedules of Opti-CAM against the paper's 100 steps of Adam at 0.1.

A pass is one forward of the network: T steps take T+2, one of them for the feature maps.
`python benchmarks/schedules.py ROOT [--limit N] [--only NAME ...]` with ROOT an ImageNet folder in the Kaggle layout.
"""

import argparse
import time
from functools import partial

import pandas as pd
import torch
from common import report
from torch.optim.lr_scheduler import CosineAnnealingLR

from opticam import METHODS, SCHEDULES, evaluate, load_model
from opticam.lab.datasets import demo, imagenet
from opticam.lab.summary import interval
from opticam.methods.ascent import adam, adam_cosine, map_space, weight_space


def nadam_cosine(point, lr, num_steps):
    """Adam with Nesterov momentum, its learning rate falling by half a cosine."""
    optimizer = torch.optim.NAdam([point], lr=lr, betas=(0.8, 0.999), maximize=True)
    return optimizer, CosineAnnealingLR(optimizer, max(num_steps, 1))


def cosine(*betas):
    """`adam_cosine` with these betas."""
    return partial(adam_cosine, betas=betas)


CANDIDATES = {**SCHEDULES}
for _steps in (50, 28, 18):
    CANDIDATES[f"weights, Adam 0.1, {_steps} steps"] = {"optimizer": adam, "num_steps": _steps, "lr": 0.1}
for _steps in (28, 18):
    for _space, _lrs, _optimizers in (
        (
            weight_space,
            (0.7, 1.0, 2.0),
            {"NAdam": nadam_cosine, "Adam (0.9, 0.999)": cosine(0.9, 0.999), "Adam (0.6, 0.9)": cosine(0.6, 0.9)},
        ),
        (
            map_space,
            (0.1, 0.2, 0.3),
            {
                "Adam (0.9, 0.999)": cosine(0.9, 0.999),
                "Adam (0.5, 0.7)": cosine(0.5, 0.7),
                "Adam (0, 0.5)": cosine(0.0, 0.5),
            },
        ),
    ):
        for _lr in _lrs:
            for _kind, _optimizer in _optimizers.items():
                _name = f"{'weights' if _space is weight_space else 'map'}, {_kind} cosine {_lr}, {_steps} steps"
                CANDIDATES[_name] = {"space": _space, "optimizer": _optimizer, "num_steps": _steps, "lr": _lr}


def main() -> None:
    """Score every candidate on the same images, and compare with the paper's image by image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", help="ImageNet folder in the Kaggle layout; default: the demo")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=["paper", "fast"], help="names of schedules, or 'all'")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model("efficientnet_lite0", device=device)
    photos = imagenet(options.root, limit=options.limit) if options.root else demo(limit=options.limit)
    names = list(CANDIDATES) if options.only == ["all"] else options.only
    tables, rows = {}, []
    for name in names:
        start = time.perf_counter()
        method = partial(METHODS["opti_cam"], **CANDIDATES[name])
        table = evaluate(model, photos, {name: method}, batch_size=options.batch_size)
        tables[name] = table
        rows.append(
            {
                "schedule": name,
                "passes": CANDIDATES[name]["num_steps"] + 2,
                "masked logit": table["masked_logit"].mean(),
                "AG %": 100 * table["average_gain"].mean(),
                "AI %": 100 * table["average_increase"].mean(),
                "AD %": 100 * table["average_drop"].mean(),
                "seconds": time.perf_counter() - start,
            }
        )
        if "paper" in tables:
            for column, factor, key in (("masked_logit", 1, "logit"), ("average_gain", 100, "AG")):
                difference = factor * (table[column] - tables["paper"][column]).to_numpy()
                low, high = interval(difference)
                rows[-1][f"{key} - paper"] = difference.mean()
                rows[-1][f"{key} - paper, 95 %"] = f"[{low:.2f}, {high:.2f}]"
        print(pd.Series(rows[-1]).to_frame().T.to_string(index=False), flush=True)
    report(
        "schedules" if options.root else "schedules_demo",
        rows,
        images=len(photos),
        dataset="ILSVRC-2012 val" if options.root else "demo",
        device=device,
    )


if __name__ == "__main__":
    main()
