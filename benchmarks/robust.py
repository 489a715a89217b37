"""The search for `SCHEDULES["robust"]`: views, complement, anchor and penalty of Opti-CAM, by judges of development.

EfficientNet-Lite0 is explained. Its own scores over black, which is optimised, stand beside those over fills that are
never optimised, gray and another photo's pixels; EfficientNet-Lite1 judges beside it. EfficientNet-Lite2 is kept for
the end (`docs/preregistration.md`) and not loaded here.

`python benchmarks/robust.py ROOT [--every 6] [--only NAME ...]`, ROOT an ImageNet folder in the Kaggle layout; without
one, the demo. Rows of finished variants and images are kept in `results/robust.parquet`: started again, it resumes.
"""

import argparse
from functools import partial

import numpy as np
import pandas as pd
import torch
from common import RESULTS, report
from torch import Tensor

from opticam import METHODS, SCHEDULES, load_model
from opticam.features import count_passes, features_and_gradients
from opticam.lab import Photos, interval, load_dataset, maps_to_input, read_image, score, stack
from opticam.lab.files import replacing
from opticam.lab.identity import digest_of, key_of
from opticam.methods.ascent import adam_cosine, map_space
from opticam.methods.cam import equal_weights, grad_cam
from opticam.methods.opti_cam import OBJECTIVES, squared_distance
from opticam.metrics import energy_pointing_game, insertion_deletion, rank_correlation, road
from opticam.saliency import blur, combine, mean_color, min_max, upsample

ROWS = RESULTS / "robust.parquet"
THREE = (None, mean_color, blur)
JUDGES = ("own black", "own gray", "own photo", "lite1 black")
SCORES = [f"{kind} {judge}" for judge in JUDGES for kind in ("AG", "log-odds")]
SCORES += ["insertion", "deletion", "road", "energy_pointing_game", "rank_correlation", "area"]
NOISE = 0.02  # of pixels in [0,1]; on one photo hardly seen


def power(model, images, class_idx, *, layer=None, base=grad_cam, exponent=2.0) -> Tensor:
    """The map of `base` to a power: the same order of the pixels, sharper above 1."""
    return base(model, images, class_idx, layer=layer) ** exponent


def product(model, images, class_idx, *, layer=None, base=grad_cam, other=equal_weights) -> Tensor:
    """The maps of two methods multiplied, normalised."""
    return min_max(base(model, images, class_idx, layer=layer) * other(model, images, class_idx, layer=layer))


def signed_cam(model, images, class_idx, *, layer=None) -> Tensor:
    """Grad-CAM's sum without its ReLU, normalised: also orders the places that speak against the class."""
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return min_max(upsample(combine(features, gradients.mean((2, 3))), images.shape[-2:]))


def log_odds(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """`log p/(1 - p)` of the masked image's class: an objective that does not saturate."""
    others = masked_logits.scatter(1, class_idx[:, None], -torch.inf).logsumexp(1)
    return masked_logits.gather(1, class_idx[:, None])[:, 0] - others


def variant(beta: float | None = 100.0, **changed):
    """Opti-CAM in map space over three baselines, anchored to Grad-CAM by beta, with changed options."""
    options = {"baseline": THREE, "space": map_space, "optimizer": adam_cosine, "num_steps": 18, "lr": 0.3}
    if beta is not None:
        options |= {"anchor": grad_cam, "penalty": partial(squared_distance, beta=beta)}
    return partial(METHODS["opti_cam"], **options | changed)


CONTROLS = {
    "Grad-CAM": METHODS["grad_cam"],
    "Grad-CAM squared": power,
    "Grad-CAM x equal weights": product,
    "equal weights": METHODS["equal_weights"],
    "signed CAM": signed_cam,
    "Opti-CAM, paper": partial(METHODS["opti_cam"], **SCHEDULES["paper"]),
    "Opti-CAM, fast": partial(METHODS["opti_cam"], **SCHEDULES["fast"]),
}
CHOSEN = "odds gain, beta 5, low x 10"
LOG_P, ODDS = OBJECTIVES["log_probability"], OBJECTIVES["odds_gain"]
short = partial(variant, objective=LOG_P, num_steps=9)
COARSE = {  # half of the steps, for a first look
    "beta 5": {"beta": 5.0},
    "beta 15": {"beta": 15.0},
    "class logit, beta 30": {"beta": 30.0, "objective": OBJECTIVES["class_logit"]},
    "beta 15, black and mean": {"beta": 15.0, "baseline": (None, mean_color)},
}
VARIANTS = {
    **CONTROLS,
    "log p, beta 15, signed CAM": variant(15.0, objective=LOG_P, anchor=signed_cam),
    **{f"log p, beta {beta}": variant(float(beta), objective=LOG_P) for beta in (15, 20, 30)},
    "log-odds, beta 30": variant(30.0, objective=log_odds),
    "class logit, beta 30": variant(30.0),
    **{f"odds gain, beta {beta}": variant(float(beta), objective=ODDS) for beta in (8, 15)},
    "odds gain, beta 15, Grad-CAM^1.5": variant(15.0, objective=ODDS, anchor=partial(power, exponent=1.5)),
    **{
        f"odds gain, beta {beta}, low x {low}": variant(
            objective=ODDS, penalty=partial(squared_distance, beta=float(beta), low=float(low))
        )
        for beta, low in ((15, 3), (8, 3), (8, 6))
    },
    CHOSEN: partial(METHODS["opti_cam"], **SCHEDULES["robust"]),
    **{f"9 steps, {name}": short(**changed) for name, changed in COARSE.items()},
}


class Views:
    """The photos as each network sees them, what it says of them, and how its maps are scored."""

    def __init__(self, dataset: str, root: str | None, shard: str | None, limit: int | None) -> None:
        self.model, self.judge = (load_model(f"efficientnet_lite{variant}") for variant in (0, 1))
        own, other = (
            load_dataset(dataset, root, net.input_size, net.resize, shard=shard, limit=limit)
            for net in (self.model, self.judge)
        )
        samples = own.readable()
        self.names = [sample.name for sample in samples]
        self.boxes = [sample.boxes for sample in samples]
        self.images, self.class_idx = stack(samples)
        self.seen_by_judge, _ = stack(_same(other, self.names))
        self.sizes = [read_image(own.paths[own.names.index(name)], upright=own.upright).size for name in self.names]
        self.other_photo = self.images.roll(1, 0)
        noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(0))
        self.touched = (self.images + NOISE * noise).clamp(0, 1)
        self.frames = [(net.input_size, net.resize) for net in (self.model, self.judge)]

    def rows(self, method, rows: list[int], with_noise: bool, with_road: bool) -> pd.DataFrame:
        """One row per image: all judges of the maps of a method."""
        x, c, model = self.images[rows], self.class_idx[rows], self.model
        with count_passes(model) as passes:
            S = method(model, x, c)
        fills = {"black": None, "gray": torch.full((3, 1, 1), 0.5), "photo": self.other_photo[rows]}
        columns = {"image": [self.names[i] for i in rows], "passes": passes[0] / len(rows)}
        for fill, b in fills.items():
            columns |= _gains(f"own {fill}", score(model, x, c, S, baseline=b))
        moved = maps_to_input(S, [self.sizes[i] for i in rows], *self.frames)
        columns |= _gains("lite1 black", score(self.judge, self.seen_by_judge[rows], c, moved))
        curves = insertion_deletion(model, x, c, S, batch_size=8)
        columns |= {name: curve[0].numpy() for name, curve in zip(("insertion", "deletion"), curves, strict=True)}
        if with_road:
            columns["road"] = road(model, x, c, S, fractions=(0.2, 0.4)).numpy()
        columns["energy_pointing_game"] = energy_pointing_game(S, [self.boxes[i] for i in rows]).numpy()
        columns["area"] = S.mean((1, 2, 3)).numpy()
        if with_noise:
            columns["rank_correlation"] = rank_correlation(S, method(model, self.touched[rows], c)).numpy()
        return pd.DataFrame(columns)


def _same(photos: Photos, names: list[str]) -> list:
    return [photos[photos.names.index(name)] for name in names]


def _gains(judge: str, scored: pd.DataFrame) -> dict[str, np.ndarray]:
    """AG and the change of log-odds."""
    return {f"AG {judge}": scored.average_gain.to_numpy(), f"log-odds {judge}": scored.log_odds.to_numpy()}


def main() -> None:
    """Judge what is not done yet, then print and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", help="ImageNet folder in the Kaggle layout; default: the demo")
    parser.add_argument("--every", type=int, default=6, help="only every n-th image")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--noise", type=int, default=5, help="on how many images stability under noise is measured")
    parser.add_argument("--road", action="store_true", help="also ROAD, which takes half of the time of judging")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    options = parser.parse_args()
    shard = f"0/{options.every}" if options.root else None
    views = Views("imagenet" if options.root else "demo", options.root, shard, options.limit)
    table = pd.read_parquet(ROWS) if ROWS.exists() else pd.DataFrame({"variant": [], "image": [], "key": []})
    for name in options.only:
        key = digest_of(key_of(VARIANTS[name], views.model, name, "benchmarks/robust.py"))
        done = set(table[(table.variant == name) & (table.key == key)].image)
        missing = [i for i, image in enumerate(views.names) if image not in done]
        for first in range(0, len(missing), options.batch_size):
            part = missing[first : first + options.batch_size]
            rows = views.rows(VARIANTS[name], part, part[0] < options.noise, options.road)
            stale = (table.variant == name) & (table.key != key)
            table = pd.concat([table[~stale], rows.assign(variant=name, key=key)], ignore_index=True)
            with replacing(ROWS) as temporary:
                table.to_parquet(temporary)
        if missing:  # a sign of life
            print(name, table[table.variant == name].mean(numeric_only=True).round(3).to_dict(), flush=True)
    of_all = {
        "network": views.model.name,
        "judge": views.judge.name,
        "chosen": CHOSEN,
        "images": sorted(set(table.image)),
        "tried": len(set(table.variant) - {*CONTROLS}),
    }
    report("robust", [summary(table, name) for name in VARIANTS if name in set(table.variant)], **of_all)


def summary(table: pd.DataFrame, name: str) -> dict[str, object]:
    """Means of a variant, and its differences from Grad-CAM on the same images, [mean, low, high]."""
    own, reference = (table[table.variant == of].set_index("image") for of in (name, "Grad-CAM"))
    found: dict[str, object] = {"variant": name, "images": len(own)}
    if "passes" in own:
        found["passes"] = own.passes.mean()
    for column in [column for column in SCORES if column in own]:
        found[column] = float(own[column].mean())
        apart = (own[column] - reference[column]).dropna().to_numpy()
        if len(apart) > 1 and name != "Grad-CAM":
            found[f"{column} - Grad-CAM"] = [float(apart.mean()), *interval(apart)]
    return found


if __name__ == "__main__":
    main()
