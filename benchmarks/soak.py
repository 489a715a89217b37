"""Many images through `evaluate.stream`: memory and open files stay, and a run killed again and again loses no row.

One process streams all images undisturbed and notes its resident set and its open files on the way. Another run of the
same is killed (SIGKILL) at arbitrary moments and started again each time; its rows are compared with the undisturbed
ones, bit by bit. Network and photos are tiny, since what is looked at is what surrounds them.
"""

import argparse
import json
import math
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from common import report
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from opticam import METHODS
from opticam.lab.datasets import Photo, Photos, Sample
from opticam.lab.evaluation import stream
from opticam.lab.results import read_shards

SIDE, CLASSES = 32, 5
SHARD = 40
GROWTH = 50  # MiB


class Tiny(nn.Module):
    """Two convolutions, global average pooling, one linear layer."""

    layer = "features"

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


@dataclass(frozen=True)
class Watched(Photos):
    """Photos that note the process's memory and open files whenever another tenth of them has been asked for."""

    readings: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, index: int) -> Sample:
        if 10 * (index + 1) % len(self) == 0:
            process = psutil.Process()
            mib = process.memory_info().rss / 2**20
            self.readings.append({"images": index + 1, "MiB": mib, "open files": process.num_fds()})
        return super().__getitem__(index)


def make_photos(folder: Path, number: int) -> list[Photo]:
    """Small photos of noise, each made from its index; every hundredth is torn."""
    photos = []
    for index in range(number):
        path = folder / f"{index:05d}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE + index % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if index % 100 == 50:
            path.write_bytes(path.read_bytes()[:100])
        photos.append(Photo(path, path.name, index % CLASSES))
    return photos


def run(photos: list[Photo], folder: Path) -> None:
    """Stream the photos into the folder; at the end, leave the readings beside the rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = Watched(photos, [str(label) for label in range(CLASSES)], SIDE, SIDE)
    methods = {"grad_cam": METHODS["grad_cam"], "opti_cam": partial(METHODS["opti_cam"], num_steps=3)}
    tqdm.set_lock(threading.RLock())  # the usual one would be told as leaked by processes that are killed
    options = {"keys": {"model": "soak"}, "scores": ["saliency"], "batch_size": 20, "shard_size": SHARD}
    stream(folder, Tiny(), dataset, methods, parameters={}, **options)
    (folder / "readings.json").write_text(json.dumps(dataset.readings))


def kill_again_and_again(start: Callable[[], Any], folder: Path, shards: int, kills: int, pause: float) -> int:
    """Start what writes shards, kill it up to `pause` seconds after some more of them; how many starts died of it."""
    moments = random.Random(0)  # noqa: S311  (no secret)
    died = 0
    for life in range(kills):
        goal = shards * (life + moments.uniform(0.3, 1)) / (kills + 1)
        process = start()
        while process.is_alive() and len(list(folder.glob("*/*.parquet"))) < goal:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, pause))
        process.kill()
        process.join()
        died += process.exitcode == -signal.SIGKILL
    return died


def faults(readings: list[dict[str, float]], identical: bool, missed: int) -> list[str]:
    """What does not hold, one sentence each."""
    first, last = readings[0], readings[-1]
    found = []
    if abs(last["MiB"] - first["MiB"]) > GROWTH:
        found.append(f"memory went from {first['MiB']:.0f} to {last['MiB']:.0f} MiB; wanted within {GROWTH} MiB")
    if last["open files"] != first["open files"]:
        found.append(f"open files went from {first['open files']} to {last['open files']}; wanted as many")
    if not identical:
        found.append("the rows of the killed run are not those of the undisturbed one")
    if missed:
        found.append(f"{missed} starts ended before they were killed; wanted none, so give more --images")
    return found


def main() -> None:
    """Both runs, one after the other, and what they show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="a multiple of ten")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--output", type=Path, help="the JSON; default: results/soak.json")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        places = {kind: Path(name) / kind for kind in ("photos", "undisturbed", "killed")}
        for place in places.values():
            place.mkdir()
        photos = make_photos(places["photos"], options.images)
        shards, since = math.ceil(options.images / SHARD), time.monotonic()
        _end(_start(photos, places["undisturbed"]))
        pause = 2 * (time.monotonic() - since) / shards
        start = partial(_start, photos, places["killed"])
        died = kill_again_and_again(start, places["killed"], shards, options.kills, pause)
        _end(start())
        readings = json.loads((places["undisturbed"] / "readings.json").read_text())
        undisturbed, killed = (_rows(places[kind]) for kind in ("undisturbed", "killed"))
    identical = killed.equals(undisturbed)
    facts = {"images": options.images, "kills": died, "rows streamed": len(undisturbed), "rows identical": identical}
    report("soak", readings, path=options.output, **facts, seconds=time.monotonic() - begun)
    found = faults(readings, identical, options.kills - died)
    if found:
        sys.exit("soak: " + "; ".join(found))


def _start(photos: list[Photo], folder: Path) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=run, args=(photos, folder))
    process.start()
    return process


def _end(process: Any) -> None:
    process.join()
    if process.exitcode:
        sys.exit("soak: a run that was not killed failed; see above")


def _rows(place: Path) -> pd.DataFrame:
    (folder,) = place.glob("*/")  # a run that goes on knows its own folder
    try:
        return read_shards(folder)[0].drop(columns="seconds")
    except (OSError, ValueError) as error:
        sys.exit(f"soak: {error}")


if __name__ == "__main__":
    main()
