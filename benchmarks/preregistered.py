"""The test of `docs/preregistration.md`: its 1000 images, what is expected of them, and which endpoints are met.

`python benchmarks/preregistered.py choose ROOT FOLDER` copies the 1000 images, with their boxes, out of ImageNet in
ROOT to a new FOLDER. `opticam batch preregistered` runs notebook 10 on them. `python benchmarks/preregistered.py judge
ROWS` says what came of it, where ROWS is the `summary.parquet` of that batch. `python benchmarks/preregistered.py
expect` prints the page's table.
"""

import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from common import RESULTS
from PIL import Image

from opticam.lab import Estimate, estimate_and_p, holm, imagenet, paired, read_evidence, read_rows

NUMBER = 1000
OWN, JUDGE = "efficientnet_lite0", "efficientnet_lite2"
ROBUST = "opti_cam:robust"


class Endpoint(NamedTuple):
    """What is expected of the mean of one column of notebook 10.

    Attributes:
        column: whose values are taken.
        wanted: "above 0", "behind", "not behind", or "" where only the mean decides.
        least: the smallest mean that is expected, after the factor.
        factor: of the values; negative where lower is better, so that above 0 is always better.
        reference: method to subtract; "" for the value itself.
    """

    column: str
    wanted: str
    least: float = -np.inf
    factor: float = 1
    reference: str = "grad_cam"


ENDPOINTS = {  # the first is the primary one
    "log-odds by Lite2, over black": Endpoint(f"log_odds: {JUDGE}, black", "above 0"),
    "log-odds by Lite2, over gray": Endpoint(f"log_odds: {JUDGE}, gray", "above 0"),
    "insertion, points": Endpoint("insertion", "above 0", factor=100),
    "ROAD, points": Endpoint("road", "not behind", -2, 100),
    "deletion turned round, points": Endpoint("deletion", "not behind", -2, -100),
    "EP, points": Endpoint("energy_pointing_game", "behind", -4, 100),
    "rank correlation under noise": Endpoint("rank_correlation", "", -0.1),
    "log-odds by Lite0, over the wide blur": Endpoint(f"log_odds: {OWN}, wide blur", "above 0"),
    "log-odds by Lite0, over another photo": Endpoint(f"log_odds: {OWN}, other photo", "behind"),
    "AG by Lite0, over gray, minus that of `fast`, points": Endpoint(
        f"average_gain: {OWN}, gray", "above 0", factor=100, reference="opti_cam:fast"
    ),
    "AG by Lite0, over gray, %, the value itself": Endpoint(f"average_gain: {OWN}, gray", "", 30, 100, ""),
    "AG by Lite0, over black, %, the value itself": Endpoint(f"average_gain: {OWN}, black", "", 45, 100, ""),
}


def image_names(number: int = NUMBER) -> list[str]:
    """The images of the test, without ending, by name: those whose names have the smallest SHA-256.

    The 300 of `data/evidence` are left out.
    """
    looked_at = {Path(name).stem for name in read_evidence("imagenet_val_300")[0].image}
    names = {f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001)} - looked_at
    return sorted(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:number])


def choose(root: Path, folder: Path, number: int = NUMBER) -> None:
    """Copy the images and write their boxes as a table, in the layout of Kaggle.

    Raises:
        ValueError: FOLDER is not new; one of the images is missing in ROOT, or there twice, or has no class or boxes;
            or all are of one size, so that they are not the original files.
    """
    from timm.data import ImageNetInfo  # after opticam, which makes torchvision ready

    if folder.exists():
        raise ValueError(f"FOLDER: wanted a new one, got {folder}")
    photos = imagenet(root).records
    found = {photo.path.stem: photo for photo in photos}
    names = image_names(number)
    if lacking := [name for name in names if name not in found or found[name].fault or not found[name].boxes]:
        raise ValueError(f"ROOT: wanted {number} images with boxes, lacks {len(lacking)} of them, such as {lacking[0]}")
    times = Counter(photo.path.stem for photo in photos)
    if twice := [name for name in names if times[name] > 1]:
        raise ValueError(f"ROOT: wanted each image once, got {twice[0]} in several folders")
    if len(sizes := {_size(found[name].path) for name in names}) == 1:
        raise ValueError(f"ROOT: wanted the original files, got images that all have {sizes.pop()} pixels")
    images = folder / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    images.mkdir(parents=True)
    wnids, lines = ImageNetInfo().label_names(), ["ImageId,PredictionString"]
    for name in names:
        photo = found[name]
        shutil.copyfile(photo.path, images / f"{name}.JPEG")
        boxes = (" ".join([wnids[photo.label], *(f"{side:g}" for side in box)]) for box in photo.boxes)
        lines.append(f"{name},{' '.join(boxes)}")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def values_of(rows: pd.DataFrame, endpoint: Endpoint) -> np.ndarray:
    """One value per image, above 0 where `robust` is better, (n,)."""
    if endpoint.reference:
        return endpoint.factor * paired(rows, endpoint.column, ROBUST, endpoint.reference)
    return endpoint.factor * rows[rows.method == ROBUST][endpoint.column].dropna().to_numpy()


def in_words(endpoint: Endpoint) -> str:
    """What is expected, as the page says it."""
    least = "" if np.isinf(endpoint.least) else f"mean at least {endpoint.least:g}"
    return ", ".join(part for part in (endpoint.wanted, least) if part)


def expect() -> pd.DataFrame:
    """The page's table: means of the images that chose nothing, and where the mean of 1000 others should lie.

    95 % intervals by the spread over these images, as if the others were stored in the same form.
    """
    rows, _ = read_evidence("10_robust_opti_cam")
    rows = rows[~rows.image.isin(json.loads((RESULTS / "robust.json").read_text())["images"])]
    table = []
    for title, endpoint in ENDPOINTS.items():
        values = values_of(rows, endpoint)
        half = 1.96 * values.std(ddof=1) * (1 / len(values) + 1 / NUMBER) ** 0.5
        lies = Estimate(values.mean(), values.mean() - half, values.mean() + half)
        table.append({"endpoint": title, "expected": in_words(endpoint), f"mean of {NUMBER}": f"{lies:.2f}"})
    return pd.DataFrame(table)


def judge(rows: pd.DataFrame) -> pd.DataFrame:
    """Which endpoints the rows meet; see "Endpoints" on the page.

    `n` images have a value. `p` is corrected by Holm for all that are differences but the first, which stands alone.
    """
    values = [values_of(rows, endpoint) for endpoint in ENDPOINTS.values()]
    nothing = Estimate(np.nan, np.nan, np.nan), np.nan
    found = [estimate_and_p(some) if len(some) else nothing for some in values]
    p_values = [p if endpoint.reference else np.nan for endpoint, (_, p) in zip(ENDPOINTS.values(), found, strict=True)]
    p_values[1:] = holm(p_values[1:])
    table = []
    for (title, endpoint), some, (mean, _), p in zip(ENDPOINTS.items(), values, found, p_values, strict=True):
        sides = {
            "above 0": mean.value > 0 and p < 0.05,
            "behind": mean.value < 0 and p < 0.05,
            "not behind": mean.high >= 0,
            "": True,
        }
        met = sides[endpoint.wanted] and mean.value >= endpoint.least
        found_here = {"found": f"{mean:.2f}", "n": len(some), "p": p, "met": met}
        table.append({"endpoint": title, "expected": in_words(endpoint), **found_here})
    return pd.DataFrame(table)


def check_rows(rows: pd.DataFrame) -> list[str]:
    """Refuse what the test cannot be judged by.

    Returns:
        Those of the 1000 images that have no rows.

    Raises:
        ValueError: a column or a method is missing; rows of another image, or two of an image and method; a method that
            lacks an image another has; a value that is not a number, but for EP, which needs a box.
    """
    rows = rows.reset_index(drop=True)
    columns = {endpoint.column for endpoint in ENDPOINTS.values()}
    if lacking := sorted({"image", "method", *columns} - {*rows}):
        raise ValueError(f"ROWS: wanted those of notebook 10, lacks the column {lacking[0]}")
    stems = rows.image.map(lambda name: Path(str(name)).stem)
    names = image_names()
    if others := {*stems} - {*names}:
        raise ValueError(f"ROWS: wanted rows of the 1000 images, got {len(others)} others, such as {min(others)}")
    methods = {ROBUST, *(endpoint.reference for endpoint in ENDPOINTS.values() if endpoint.reference)}
    for method in sorted(methods):
        times = Counter(stems[rows.method == method])
        if wrong := [name for name in sorted({*stems}) if times[name] != 1]:
            raise ValueError(f"ROWS: wanted one row of each image by {method}, got {times[wrong[0]]} of {wrong[0]}")
    for column in sorted(columns):
        values = rows[column][rows.method.isin(methods)].astype(float)
        values = values.dropna() if column == "energy_pointing_game" else values
        if len(bad := values[~np.isfinite(values)]):
            raise ValueError(f"ROWS: wanted numbers in {column}, got {bad.iloc[0]} of {stems[bad.index[0]]}")
    return [name for name in names if name not in {*stems}]


def main() -> None:
    """One of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("choose", help="copy the 1000 images")
    step.add_argument("root", type=Path, metavar="ROOT")
    step.add_argument("folder", type=Path, metavar="FOLDER")
    steps.add_parser("expect", help="print the table of endpoints")
    steps.add_parser("judge", help="say which endpoints are met").add_argument("rows", type=Path, metavar="ROWS")
    options = parser.parse_args()
    try:
        if options.step == "choose":
            choose(options.root, options.folder)
        elif options.step == "expect":
            print(expect().to_markdown(index=False, disable_numparse=True))
        else:
            rows, made = read_rows(options.rows)
            left_out = check_rows(rows)
            print(judge(rows).to_markdown(index=False, floatfmt=".2g"))
            print(f"{NUMBER - len(left_out)} of {NUMBER} images; without: {', '.join(left_out) or 'none'}")
            print(", ".join(f"{name} {made.get(name)}" for name in ("package", "commit", "device", "torch")))
    except (ValueError, OSError) as error:
        parser.exit(1, f"preregistered: {error}\n")


if __name__ == "__main__":
    main()
