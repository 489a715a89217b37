"""Insertion and deletion against bare forwards of as many images, and against a loop that works as the published one.

`published_loop` does what the authors' evaluation does: one image at a time through a batch of one, pixels ordered and
changed in numpy on the host, every score fetched as soon as it is there. Its numbers are those of `insertion_deletion`,
which `main` checks. ROAD's passes are few; beside them stand the seconds that its linear systems take.
"""

import argparse
import math
import statistics

import numpy as np
import torch
from common import interleaved, median_ratio, report

from opticam import grad_cam, load_model
from opticam.features import frozen
from opticam.lab.datasets import demo
from opticam.metrics import impute, insertion_deletion, road
from opticam.metrics.classification import _blurred


def floor(model, images, per_step, batch_size):
    """The passes of `insertion_deletion`, 2T+1 an image, of the bare network at the same batches."""
    *_, height, width = images.shape
    steps = math.ceil(height * width / per_step)
    with frozen(model), torch.no_grad():
        for passes in ((steps + 1) * len(images), steps * len(images)):
            for chunk in torch.arange(passes).split(batch_size):
                model(images[chunk % len(images)])


def published_loop(model, images, class_idx, saliency, per_step):
    """Both curves, (2,B,T+1)."""
    pixels = images[0, 0].numel()
    steps = math.ceil(pixels / per_step)
    curves = np.empty((2, len(images), steps + 1))
    blurred, gray = _blurred(images, model.mean), model.mean.expand_as(images)
    for metric, (starts, ends) in enumerate(((blurred, images), (images, gray))):
        for b in range(len(images)):
            order = np.argsort(-saliency[b].cpu().numpy().reshape(pixels), kind="stable")
            start, end = (x[b].cpu().numpy().reshape(1, 3, pixels) for x in (starts, ends))
            start = start.copy()
            for step in range(steps + 1):
                with torch.no_grad():
                    x = torch.from_numpy(start.copy()).view(1, *images.shape[1:]).to(images.device)
                    probs = model(x).double().softmax(1)
                curves[metric, b, step] = probs[0, class_idx[b]].item()
                places = order[per_step * step : per_step * (step + 1)]
                start[:, :, places] = end[:, :, places]
    return curves


def main() -> None:
    """Time ours, the bare forwards and the published way in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--photos", type=int, default=2)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, device=device)
    photos = demo(model.input_size, model.resize)
    samples = [photos[i % len(photos)] for i in range(options.photos)]
    images = torch.stack([sample.image for sample in samples]).to(device, memory_format=torch.channels_last)
    class_idx = torch.tensor([sample.label for sample in samples], device=device)
    saliency = grad_cam(model, images, class_idx)
    per_step = 8 * images.shape[-1]
    (_, inserted), (_, deleted) = insertion_deletion(model, images, class_idx, saliency)
    theirs = published_loop(model, images, class_idx, saliency, per_step)
    difference = np.abs(theirs - torch.stack([inserted, deleted]).cpu().numpy()).max()
    assert difference < 1e-3, f"the loop to compare with computes something else, by {difference}"
    rows = []
    for size in options.batch_size:
        seconds = interleaved(
            {
                "ours": lambda size=size: insertion_deletion(model, images, class_idx, saliency, batch_size=size),
                "floor": lambda size=size: floor(model, images, per_step, size),
                "published": lambda: published_loop(model, images, class_idx, saliency, per_step),
            },
            options.repeats,
        )
        rows.append(
            {
                "score": "insertion and deletion",
                "batch size": size,
                "passes per image": 2 * inserted.shape[1] - 1,
                "seconds per image": statistics.median(seconds["ours"]) / options.photos,
                "ours / bare forwards": median_ratio(seconds, "ours", "floor"),
                "published / ours": median_ratio(seconds, "published", "ours"),
            }
        )
        print(rows[-1], flush=True)
    removed = saliency >= saliency.flatten(1).quantile(0.2, 1).view(-1, 1, 1, 1)
    seconds = interleaved(
        {
            "road": lambda: road(model, images, class_idx, saliency),
            "impute": lambda: impute(images, removed),
        },
        options.repeats,
    )
    for name, passes in (("road", 8), ("impute 80 % of one image", 0)):
        rows.append(
            {
                "score": name,
                "passes per image": passes,
                "seconds per image": statistics.median(seconds[name.split()[0]]) / options.photos,
            }
        )
    report("curves", rows, model=options.model, photos=options.photos, largest_difference=float(difference))


if __name__ == "__main__":
    main()
