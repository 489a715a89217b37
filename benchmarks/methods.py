"""What every method costs: passes and seconds an image, and the CAM family beside the library grad-cam in the same run.

A pass is one image through the first or the last layer; methods that split off the head of the network make many more
passes of the last layer than of the first. Peak memory is that of the process (of the allocator on a GPU) beyond the
loaded network, each in a process of its own.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from common import interleaved, median_ratio, report
from torch import nn

from opticam import METHODS, load_model
from opticam.features import resolve_layer
from opticam.lab.datasets import demo

PEERS = {
    "grad_cam": "GradCAM",
    "grad_cam_plus_plus": "GradCAMPlusPlus",
    "x_grad_cam": "XGradCAM",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "ablation_cam": "AblationCAM",
    "score_cam": "ScoreCAM",
}
OTHERS = {
    "fake_cam": {},
    "equal_weights": {},
    "opti_cam": {},
    "rise": {"num_masks": 600},
    "extremal_perturbation": {"num_steps": 80},
}
ATTENTION = ("raw_attention", "attention_rollout", "gradient_rollout")


def prepare(name: str, batch: int):
    """Network, photos of the demo and their labels; random weights cost the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = load_model(name, pretrained=name.startswith("efficientnet_lite"), device=device)
    samples = [sample for _, sample in zip(range(batch), demo(model.input_size, model.resize), strict=False)]
    images = torch.stack([sample.image for sample in samples]).to(device)
    return model, images, torch.tensor([sample.label for sample in samples], device=device)


def peer(name, model, images, class_idx):
    """The same method of grad-cam."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(int(c)) for c in class_idx]
    with getattr(pytorch_grad_cam, PEERS[name])(model, [resolve_layer(model)]) as method:
        method(images.clone(), targets)


def passes(model, call) -> tuple[int, int]:
    """Images through the first convolution and through the last layer during a call."""
    modules = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    counts = [0, 0]

    def count(place, module, args, output):
        counts[place] += len(output)

    handles = [modules[i].register_forward_hook(partial(count, place)) for place, i in enumerate((0, -1))]
    call()
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


def peak(name: str, model_name: str, whose: str) -> float:
    """MiB that one call adds to the loaded network."""
    import pytorch_grad_cam  # noqa: F401  (now, or it would count as the call's)

    model, images, class_idx = prepare(model_name, 1)
    with torch.no_grad():
        model(images)
    call = partial(METHODS[name] if whose == "ours" else partial(peer, name), model, images, class_idx)
    before = _peak()
    call()
    return (_peak() - before) / 2**20


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Time every method, those of grad-cam in turn with the library's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--transformer", default="deit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        memory = {
            (name, whose): processes.submit(peak, name, options.model, whose).result()
            for name in ("ablation_cam", "score_cam")
            for whose in ("ours", "grad-cam")
        }
    model, images, class_idx = prepare(options.model, options.batch)
    for name in PEERS:
        ours = partial(METHODS[name], model, images, class_idx)
        seconds = interleaved(
            {"ours": ours, "grad-cam": partial(peer, name, model, images, class_idx)}, options.repeats
        )
        rows.append(_row(options.model, name, "", model, ours, seconds["ours"], options.batch))
        rows[-1]["grad-cam / ours"] = median_ratio(seconds, "grad-cam", "ours")
        if (name, "ours") in memory:
            rows[-1]["peak MiB, ours"] = memory[name, "ours"]
            rows[-1]["peak MiB, grad-cam"] = memory[name, "grad-cam"]
        print(rows[-1], flush=True)
    for name, settings in OTHERS.items():
        call = partial(METHODS[name], model, images, class_idx, **settings)
        seconds = interleaved({"ours": call}, 1)
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append(_row(options.model, name, told, model, call, seconds["ours"], options.batch))
        print(rows[-1], flush=True)
    model, images, class_idx = prepare(options.transformer, options.batch)
    for name in ATTENTION:
        call = partial(METHODS[name], model, images, class_idx)
        seconds = interleaved({"ours": call}, options.repeats)
        rows.append(_row(options.transformer, name, "", model, call, seconds["ours"], options.batch))
    report("methods", rows, batch=options.batch)


def _row(model_name, name, settings, model, call, seconds, batch):
    start = time.perf_counter()
    first, last = passes(model, call)
    seconds = [*seconds, time.perf_counter() - start]
    return {
        "model": model_name,
        "method": name,
        "settings": settings,
        "seconds per image": statistics.median(seconds) / batch,
        "passes of the first layer": first / batch,
        "passes of the last layer": last / batch,
    }


if __name__ == "__main__":
    main()
