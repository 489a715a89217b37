"""Why `robust` is behind Grad-CAM in the boxes and over another photo: can a sharper or a broader map mend both?

The maps of Grad-CAM and of `robust`, each to several powers, and two mixtures of them. A power keeps the order of the
pixels, so insertion, deletion, ROAD and rank correlations stay as they are; it makes a map sharper above 1, broader
below. Beside them what could be had if the place of the object were known: `robust` with a penalty on the share of the
map outside the true boxes, also to powers. Judged are AG over black and gray, the log-odds over another photo's pixels
and by EfficientNet-Lite1, and EP.

`python benchmarks/trade_offs.py ROOT`, ROOT an ImageNet folder in the Kaggle layout; the images that chose the schedule
are left out. Rows of finished images are kept in `results/trade_offs.parquet`: started again, it resumes.
"""

import argparse
import json

import pandas as pd
import torch
from common import RESULTS, report
from robust import Views, summary

from opticam import METHODS, SCHEDULES, score
from opticam.lab import maps_to_input
from opticam.lab.files import replacing
from opticam.metrics import box_mask, energy_pointing_game
from opticam.saliency import BASELINES, min_max

ROWS = RESULTS / "trade_offs.parquet"
EXPONENTS = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 2.0)
MIXTURES = ("the larger of both", "the product of both")
PRICE = 3.0  # of a map that lies wholly outside the boxes, in the unit of the objective of `robust`
BATCH = 5


def maps_of(views: Views, part: list[int], wanted: set[str]) -> dict[str, torch.Tensor]:
    """Maps (B,1,H,W) by name, without powers."""
    asked = views.model, views.images[part], views.class_idx[part]
    options = SCHEDULES["robust"]
    inside = box_mask([views.boxes[i] for i in part], views.images.shape[-2:])

    def penalty(saliency: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        share = (saliency * inside).sum((1, 2, 3)) / saliency.sum((1, 2, 3)).clamp(min=1e-9)
        return options["penalty"](saliency, anchor) + PRICE * (1 - share)

    maps = {}
    if wanted & {"Grad-CAM", *MIXTURES}:
        maps["Grad-CAM"] = METHODS["grad_cam"](*asked)
    if wanted & {"robust", *MIXTURES}:
        maps["robust"] = METHODS["opti_cam"](*asked, **options)
    if "robust, told the boxes" in wanted:
        maps["robust, told the boxes"] = METHODS["opti_cam"](*asked, **options | {"penalty": penalty})
    if wanted & {*MIXTURES}:
        both = maps["Grad-CAM"], maps["robust"]
        maps |= dict(zip(MIXTURES, (torch.maximum(*both), min_max(both[0] * both[1])), strict=True))
    return {name: maps[name] for name in wanted}


VARIANTS = {
    name: {f"{name}^{p:g}": p for p in EXPONENTS} for name in ("Grad-CAM", "robust", "robust, told the boxes")
} | {name: {name: 1.0} for name in MIXTURES}
"""Name of a map -> the names of its powers."""


def rows(views: Views, part: list[int], wanted: set[str]) -> pd.DataFrame:
    """One row per image and power of the maps wanted."""
    x, c = views.images[part], views.class_idx[part]
    fills = {"black": None, "gray": BASELINES["gray"](x), "photo": views.other_photo[part]}
    with torch.no_grad():
        logits, judged = views.model(x), views.judge(views.seen_by_judge[part])
    tables = []
    powers = {v: S**p for name, S in maps_of(views, part, wanted).items() for v, p in VARIANTS[name].items()}
    for name, S in powers.items():
        scored = {f"own {fill}": score(views.model, x, c, S, logits, baseline=b) for fill, b in fills.items()}
        moved = maps_to_input(S, [views.sizes[i] for i in part], *views.frames)
        scored["lite1 black"] = score(views.judge, views.seen_by_judge[part], c, moved, judged)
        columns = {f"AG {judge}": table.average_gain for judge, table in scored.items()}
        columns |= {f"log-odds {judge}": table.log_odds for judge, table in scored.items()}
        columns["energy_pointing_game"] = energy_pointing_game(S, [views.boxes[i] for i in part]).numpy()
        columns["area"] = S.mean((1, 2, 3)).numpy()
        tables.append(pd.DataFrame(columns).assign(variant=name, image=[views.names[i] for i in part]))
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Judge the images that are not done yet, then print and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="ImageNet folder in the Kaggle layout")
    options = parser.parse_args()
    views = Views("imagenet", options.root, None, None)
    chose = json.loads((RESULTS / "robust.json").read_text())["images"]
    table = pd.read_parquet(ROWS) if ROWS.exists() else pd.DataFrame({"variant": [], "image": []})
    judged = [i for i, name in enumerate(views.names) if name not in chose]
    for first in range(0, len(judged), BATCH):
        part = judged[first : first + BATCH]
        done = table[table.image.isin([views.names[i] for i in part])].variant.value_counts()
        wanted = {name for name, powers in VARIANTS.items() if any(done.get(v, 0) < len(part) for v in powers)}
        if not wanted:
            continue
        table = pd.concat([table, rows(views, part, wanted)], ignore_index=True)
        with replacing(ROWS) as temporary:
            table.to_parquet(temporary)
        print(f"{first + len(part)} of {len(judged)} images", flush=True)  # a sign of life
    table["variant"] = table.variant.replace("Grad-CAM^1", "Grad-CAM")  # what the others are compared with
    found = []
    for name in table.variant.unique():
        base, _, exponent = name.partition("^")
        found.append({"map": base, "exponent": float(exponent or 1), **summary(table, name)})
    report("trade_offs", found, images=table.image.nunique())


if __name__ == "__main__":
    main()
