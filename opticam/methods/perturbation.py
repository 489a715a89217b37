"""Masking methods: what the class score does when parts of the image are hidden."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from opticam.checks import as_seed, check_at_least, check_inputs, check_numbers, check_whole, examine
from opticam.classifier import class_logit, differentiate, for_autograd, probabilities, read
from opticam.features import Layer, prepared
from opticam.folding import folded
from opticam.methods.record import Method
from opticam.saliency import apply_mask, saliency_map
from opticam.state import frozen


def rise(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer = None,
    num_masks: int = 6000,
    cells: int = 8,
    p: float = 0.1,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """RISE maps: `S = sum_i p_c(x * M_i) M_i / (N p)` over N random masks, then `min_max`, p_c by the head.

    Each mask is a grid of `cells` x `cells` zeros and ones (1 with probability `p`), made bilinearly a cell larger than
    the image and cut out at a random place. The same masks serve all images, which show black where a mask is 0.
    Deviation from the authors' code: beyond the centres of the outer cells a mask is constant, there reflected.
    N passes. Arguments, result and errors as `grad_cam`; `layer` is not used.

    Args:
        num_masks: N; 6000 is the paper's for ResNet50.
        cells: cells along each side.
        p: probability that a cell shows the image; 0.1 in the authors' code for ImageNet.
        seed: of the masks, the same on every device.
        batch_size: masked images in flight.

    Reference:
        Petsiuk, Das, Saenko, RISE: Randomized input sampling for explanation of black-box models, BMVC 2018,
        arXiv 1806.07421, eq. 6.
    """
    check_inputs(model, images, class_idx)
    check_whole(1, num_masks=num_masks, cells=cells, batch_size=batch_size)
    check_numbers(p=p, seed=seed)
    seed = as_seed(seed)
    if not 0 < p <= 1:
        raise ValueError(f"p: wanted a probability above 0, got {p}")
    size, dtype = images.shape[-2:], torch.promote_types(images.dtype, torch.float32)
    per_image = max(1, batch_size // len(images))
    with frozen(model), torch.no_grad():
        x, c = prepared(model, images), for_autograd(class_idx)
        total = torch.zeros_like(x[:, :1], dtype=dtype)
        logits = examine(model, x[:1], c).logits
        network = folded(model, x, logits)
        for masks in _rise_masks(num_masks, cells, p, size, seed, per_image):
            masks = masks.to(x.device, dtype)
            for some, c_some, total_some in zip(*(t.split(int(batch_size)) for t in (x, c, total)), strict=True):
                masked = apply_mask(some.repeat_interleave(len(masks), 0), masks.repeat(len(some), 1, 1, 1))
                logits, head = read(network, masked)
                probs = class_logit(probabilities(logits.to(dtype), head), c_some.repeat_interleave(len(masks)))
                scores = probs.view(len(some), len(masks))
                with torch.autocast(x.device.type, enabled=False):  # the caller's would make the sum coarse
                    total_some[:, 0] += torch.einsum("bm,mhw->bhw", scores, masks[:, 0])  # a view of the total
    return saliency_map(total / (num_masks * p), size)


def _rise_masks(num_masks: int, cells: int, p: float, size: torch.Size, seed: int, at_once: int) -> Iterator[Tensor]:
    """Masks (n,1,H,W), `at_once` at a time, float64 on the CPU; the same for every `at_once`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    height, width = size
    steps = math.ceil(height / cells), math.ceil(width / cells)
    masks = []
    for i in range(num_masks):
        grid = (torch.rand(1, 1, cells, cells, generator=generator, dtype=torch.float64, device="cpu") < p).double()
        top, left = (int(torch.randint(step, (), generator=generator, device="cpu")) for step in steps)
        large = [(cells + 1) * step for step in steps]
        whole = F.interpolate(grid, large, mode="bilinear", align_corners=False)
        masks.append(whole[..., top : top + height, left : left + width])
        if len(masks) == at_once or i == num_masks - 1:
            yield torch.cat(masks)
            masks = []


def extremal_perturbation(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer = None,
    area: float = 0.1,
    num_steps: int = 800,
    batch_size: int | None = None,
) -> Tensor:
    """Extremal perturbation: the smooth mask of a given area whose image, blurred elsewhere, has the largest logit.

    A coarse mask m, a value for every 7 pixels, is made smooth by a soft maximum over its neighbours' kernels of width
    21 (temperature 1/20), and chooses for every pixel a level of a blur pyramid (sigma 20 where it is 0). Maximised is
    `f(x blurred by m)_c - w |sort(m) - r|^2`, r the sorted mask of wanted area, by SGD at 0.01 with momentum 0.9 and
    dampening 0.9; w starts at 300 and grows by 1.0035 a step; every second step sees the image mirrored.

    Deviations from the authors' code: borders of the pyramid are replicated; the mean over pixels in the area term and
    the sum over the batch make an image's mask independent of its neighbours.

    All pixels of the first mask are equal, so rounding orders them: other devices and processors find somewhat other
    masks, also in double precision.

    Arguments and errors as `grad_cam`; `layer` is not used.

    Args:
        area: share of the image that the mask shows, in (0,1).
        num_steps: forward and backward passes, at least 1.
        batch_size: images in flight; None for all.

    Returns:
        (B,1,H,W) in [0,1], the final mask after `min_max`.

    Reference:
        Fong, Patrick, Vedaldi, Understanding deep networks via extremal perturbations and smooth masks, ICCV 2019,
        arXiv 1910.08485, eq. 3, 4 and 7 to 9; constants of the authors' code.
    """
    check_inputs(model, images, class_idx)
    check_numbers(area=area, num_steps=num_steps)
    if not 0 < area < 1:
        raise ValueError(f"area: wanted a share of the image between 0 and 1, got {area}")
    check_whole(1, num_steps=num_steps)  # the mask of none knows neither the class nor the network
    check_at_least(1, batch_size=batch_size)
    size, dtype = images.shape[-2:], torch.promote_types(images.dtype, torch.float32)
    masks = []
    with frozen(model):
        given = for_autograd(images).detach().contiguous(), for_autograd(class_idx)
        for x, c in zip(*(tensor.split(int(batch_size or len(images))) for tensor in given), strict=True):
            pyramid = blur_pyramid(x.to(dtype))  # half precision convolves at a crawl on some processors
            coarse = torch.ones(len(x), 1, *(math.ceil(side / STEP) for side in size), device=x.device, dtype=dtype)
            coarse.requires_grad_()
            kernel = smooth_kernel(coarse)
            wanted = torch.zeros(size.numel(), device=x.device, dtype=dtype)
            wanted[wanted.numel() - round(float(area) * wanted.numel()) :] = 1
            ascent = torch.optim.SGD([coarse], lr=0.01, momentum=0.9, dampening=0.9, maximize=True)
            network = model
            for step in range(num_steps):
                mask = smooth_mask(coarse, kernel, size)
                seen = from_pyramid(pyramid, mask).to(x.dtype)
                if step == 0:
                    logits = examine(model, seen, c).logits
                    network = folded(model, seen.detach(), logits.detach())
                else:
                    logits = read(network, seen.flip(3) if step % 2 else seen).logits
                reward = class_logit(logits, c).to(dtype)
                penalty = (mask.flatten(1).sort(dim=1, stable=True).values - wanted).square().mean(1)
                (coarse.grad,) = differentiate(model, (reward - 300 * 1.0035**step * penalty).sum(), coarse)
                ascent.step()
                with torch.no_grad():
                    coarse.clamp_(0, 1)
            with torch.no_grad():
                masks.append(smooth_mask(coarse, kernel, size))
    return saliency_map(torch.cat(masks), size)


STEP, WIDTH, COLDNESS = 7, 21, 20.0
SIGMA, LEVELS = 20.0, 8


def smooth_kernel(like: Tensor) -> Tensor:
    """(STEP,STEP,n,n): for a pixel at each place within a coarse cell, the kernel over the n x n cells around it.

    `k(d) = exp(-2 max(0, d/WIDTH - 1/2)^2)` at distance d in pixels from a cell's centre.
    """
    radius = 1 + math.ceil(WIDTH / STEP)
    place = torch.arange(STEP, device=like.device, dtype=like.dtype)
    cell = STEP * torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype) + (STEP - 1) / 2
    offsets = (place[:, None] - cell).square()
    distance = (offsets[:, None, :, None] + offsets[None, :, None, :]).sqrt()
    return (-2 * (distance / WIDTH - 0.5).clamp(min=0).square()).exp()


def smooth_mask(coarse: Tensor, kernel: Tensor, size: torch.Size) -> Tensor:
    """The smooth maximum `sum_v t_v exp(20 t_v) / sum_v exp(20 t_v)`, `t_v = k(u - v) m(v)`, at every pixel u.

    Args:
        coarse: (B,1,h,w) in [0,1]; beyond its border the mask is 0.
        kernel: of `smooth_kernel`.
        size: (H,W), at most STEP times (h,w).

    Returns:
        (B,1,H,W) in [0,1].
    """
    batch, _, rows, columns = coarse.shape
    n = kernel.shape[-1]
    around = F.unfold(coarse, n, padding=n // 2).view(batch, 1, n * n, rows * columns)
    values = around * kernel.view(STEP * STEP, n * n, 1)
    smooth = (values * (COLDNESS * values).softmax(2)).sum(2)
    return F.fold(smooth, (STEP * rows, STEP * columns), STEP, stride=STEP)[..., : size[0], : size[1]]


def blur_pyramid(images: Tensor) -> Tensor:
    """(B,8,3,H,W): the images blurred by Gaussians of sigma 20, ..., 0 in equal steps, borders replicated."""
    levels = []
    for level in range(LEVELS - 1):
        sigma = SIGMA * (LEVELS - 1 - level) / (LEVELS - 1)
        radius = math.ceil(3 * sigma)
        padded = F.pad(images, [radius] * 4, mode="replicate")
        blurred = TF.gaussian_blur(padded, [2 * radius + 1, 1], [sigma, sigma])  # rows, then columns: far faster
        blurred = TF.gaussian_blur(blurred, [1, 2 * radius + 1], [sigma, sigma])
        levels.append(blurred[..., radius:-radius, radius:-radius])
    return torch.stack([*levels, images], 1)


def from_pyramid(pyramid: Tensor, mask: Tensor) -> Tensor:
    """Images (B,3,H,W) interpolated between the two levels next to `7 m` at every pixel."""
    position = (mask * (LEVELS - 1)).unsqueeze(1)
    low = position.detach().nan_to_num().floor().clamp(0, LEVELS - 2)
    share = position - low
    index = low.long().expand(-1, 1, pyramid.shape[2], -1, -1)
    below, above = pyramid.gather(1, index), pyramid.gather(1, index + 1)
    return ((1 - share) * below + share * above)[:, 0]


RECORDS = {
    "rise": Method(rise, "RISE", "#661100", cost="heavy"),
    "extremal_perturbation": Method(extremal_perturbation, "Extremal perturbation", "#7a5fd0", cost="heavy"),
}
