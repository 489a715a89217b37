"""Against the published algorithm's costs, and against the same passes of the bare network, batch norms not folded.

`published_loop` does in every step what the published code does and need not: gradients into all parameters, the graph
of the unmasked forward kept and traversed again, a copy of the activations to the host by a hook that stays on. Its
numbers are those of `opti_cam`, which `main` checks before it times anything. All of its steps cost the same, so that
a hundred are taken for as many times what was timed.
"""

import argparse

import torch
from common import interleaved, median_ratio, report

from opticam import SCHEDULES, load_model, opti_cam
from opticam.features import as_grid, frozen, resolve_layer
from opticam.lab.datasets import demo
from opticam.saliency import combine, min_max, upsample


def published_loop(model, images, class_idx, num_steps, lr=0.1):
    """Saliency maps by the published loop's way of working; the model needs gradients of its parameters switched on."""
    activations = []

    def keep(module, args, output):
        activations.append(output.clone())
        output.detach().cpu()

    handle = resolve_layer(model).register_forward_hook(keep)
    logits = model(images)  # its graph is kept for all steps
    features = as_grid(activations[0], model, images).relu()  # tokens of a transformer too
    u = torch.full(features.shape[:2], 0.5, device=images.device, requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=lr)
    for _ in range(num_steps):
        saliency = min_max(upsample(combine(features, u.softmax(1)), images.shape[-2:]))
        loss = -model(images * saliency).gather(1, class_idx[:, None]).sum() + 0 * logits.sum()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        activations[1:] = []
    handle.remove()
    with torch.no_grad():
        return min_max(upsample(combine(features, u.softmax(1)), images.shape[-2:]))


def floor(model, images, class_idx, num_steps):
    """The passes that `opti_cam` makes, T+2 forward and T backward to the input, of the bare frozen network."""
    with frozen(model):
        pixels = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(num_steps):
            torch.autograd.grad(model(pixels).gather(1, class_idx[:, None]).sum(), pixels)
        with torch.no_grad():
            model(pixels)
        model(pixels)


def main() -> None:
    """Time ours, the published way and the floor in turn, for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        pretrained = name.startswith("efficientnet_lite")  # random weights cost the same
        model = load_model(name, pretrained=pretrained, device=device)
        plain = load_model(name, pretrained=pretrained, device=device).to(memory_format=torch.contiguous_format)
        plain.load_state_dict(model.state_dict())
        samples = list(demo(model.input_size, model.resize))
        for batch in options.batches:
            chosen = [samples[i % len(samples)] for i in range(batch)]
            images = torch.stack([sample.image for sample in chosen]).to(device)
            class_idx = torch.tensor([sample.label for sample in chosen], device=device)
            _check(name, images[:1], class_idx[:1], device, pretrained)
            seconds = interleaved(
                {
                    "ours": lambda m=model, x=images, c=class_idx: opti_cam(m, x, c, num_steps=options.steps),
                    "ours, bfloat16": lambda m=model, x=images, c=class_idx: opti_cam(
                        m, x, c, num_steps=options.steps, autocast=torch.bfloat16
                    ),
                    "published": lambda m=plain, x=images, c=class_idx: published_loop(m, x, c, options.steps),
                    "floor": lambda m=model, x=images, c=class_idx: floor(m, x, c, options.steps),
                    "fast": lambda m=model, x=images, c=class_idx: opti_cam(m, x, c, **SCHEDULES["fast"]),
                },
                options.repeats,
            )
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "steps": options.steps,
                    "published / ours": median_ratio(seconds, "published", "ours"),
                    "published / ours, bfloat16": median_ratio(seconds, "published", "ours, bfloat16"),
                    "ours / floor": median_ratio(seconds, "ours", "floor"),
                    "100 published steps / fast": 100 / options.steps * median_ratio(seconds, "published", "fast"),
                    "ms per image and step": 1e3
                    * sorted(seconds["ours"])[len(seconds["ours"]) // 2]
                    / batch
                    / options.steps,
                }
            )
            print(rows[-1], flush=True)
    report("published", rows)


def _check(name, images, class_idx, device, pretrained):
    model = load_model(name, pretrained=pretrained, device=device).double()
    ours = opti_cam(model, images.double(), class_idx, num_steps=2).saliency
    torch.set_default_dtype(torch.float64)
    theirs = published_loop(model, images.double(), class_idx, 2)
    torch.set_default_dtype(torch.float32)
    assert (ours - theirs).abs().max() < 1e-9, "the loop to compare with computes something else"


if __name__ == "__main__":
    main()
