"""What float32 and bfloat16 autocast do to the maps and scores of Opti-CAM on the demo, against float64."""

import argparse

import torch
from common import report

from opticam import load_model, opti_cam, score
from opticam.lab.datasets import demo
from opticam.methods import SCHEDULES
from opticam.metrics.randomization import rank_correlation


def main() -> None:
    """Explain the same photos in each precision; scores are taken in float64 for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="photos; float64 is slow on a CPU")
    parser.add_argument("--batch-size", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = load_model("efficientnet_lite0", device=device).double()
    model = load_model("efficientnet_lite0", device=device)
    samples = list(demo(limit=options.limit))
    images = torch.stack([sample.image for sample in samples]).to(device)
    class_idx = torch.tensor([sample.label for sample in samples], device=device)
    rows = []
    for schedule, settings in SCHEDULES.items():
        exact = None
        for precision, network, x, autocast, in_flight in (
            ("float64", judge, images.double(), None, options.batch_size),
            ("float32", model, images, None, options.batch_size),
            ("float32, one by one", model, images, None, 1),
            ("bfloat16 autocast", model, images, torch.bfloat16, options.batch_size),
        ):
            result = opti_cam(network, x, class_idx, autocast=autocast, batch_size=in_flight, **settings)
            saliency = result.saliency.double()
            exact = saliency if exact is None else exact
            difference = (saliency - exact).abs()
            table = score(judge, images.double(), class_idx, saliency)
            rows.append(
                {
                    "schedule": schedule,
                    "precision": precision,
                    "mean |map - float64|": difference.mean().item(),
                    "largest of an image, mean": difference.amax((1, 2, 3)).mean().item(),
                    "rank correlation": rank_correlation(saliency, exact).mean().item(),
                    "masked logit": float(table["masked_logit"].mean()),
                    "AG %": 100 * float(table["average_gain"].mean()),
                    "AI %": 100 * float(table["average_increase"].mean()),
                }
            )
            print(rows[-1], flush=True)
    report("precision", rows, images=len(samples), dataset="demo", device=device)


if __name__ == "__main__":
    main()
