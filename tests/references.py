"""The formulas of the papers once more, loop by loop, in numpy and float64: slow, and without any import of opticam.

Networks are only called; gradients come from central differences, so that no line of autograd is shared either.
"""

import decimal
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray


def upsample(grid: Array, height: int, width: int) -> Array:
    """Bilinear, align_corners=False: pixel centres are at (i + 1/2) in both grids, the border is repeated."""
    rows, columns = grid.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = y - top, x - left
            out[i, j] = (1 - a) * ((1 - b) * grid[top, left] + b * grid[top, right]) + a * (
                (1 - b) * grid[bottom, left] + b * grid[bottom, right]
            )
    return out


def same_place(grid: Array, photo: tuple[int, int], made: tuple[int, int], wanted: tuple[int, int]) -> Array:
    """From pixel to photo to pixel: each centre of the wanted frame, undone crop and resize, and done again."""

    def at(line: Array, where: float) -> float:
        where = min(max(where - 0.5, 0), len(line) - 1)
        low = min(int(where), len(line) - 2)
        return line[low] + (where - low) * (line[low + 1] - line[low])

    places = []
    for side in photo:
        (size, shorter), (other_size, other_shorter) = made, wanted
        length, other_length = int(shorter * side / min(photo)), int(other_shorter * side / min(photo))
        crop, other_crop = round((length - size) / 2), round((other_length - other_size) / 2)
        on_photo = [(j + 0.5 + other_crop) * side / other_length for j in range(other_size)]
        places.append([place * length / side - crop for place in on_photo])
    return np.array([[at(np.array([at(row, x) for row in grid]), y) for x in places[0]] for y in places[1]])


def min_max(grid: Array) -> Array:
    low, high = min(grid.flat), max(grid.flat)
    if high == low:
        return np.zeros_like(grid)
    out = np.zeros_like(grid)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            out[i, j] = (grid[i, j] - low) / (high - low)
    return out


def softmax(values: Array) -> Array:
    exponentials = [math.exp(value - max(values)) for value in values]
    return np.array([value / sum(exponentials) for value in exponentials])


def weighted_sum(features: Array, weights: Array) -> Array:
    out = np.zeros(features.shape[1:])
    for k in range(len(weights)):
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] += weights[k] * features[k, i, j]
    return out


def class_logit(masked: Array, original: Array, c: int) -> float:
    return masked[c]


def logit_difference(masked: Array, original: Array, c: int) -> float:
    return -abs(original[c] - masked[c])


def logit_margin(masked: Array, original: Array, c: int) -> float:
    return masked[c] - max(value for j, value in enumerate(masked) if j != c)


def probability(masked: Array, original: Array, c: int) -> float:
    return softmax(masked)[c]


def log_probability(masked: Array, original: Array, c: int) -> float:
    return math.log(softmax(masked)[c])


def odds_gain(masked: Array, original: Array, c: int) -> float:
    odds = [p / (1 - p) for p in (softmax(masked)[c], softmax(original)[c])]
    ratio = odds[0] / odds[1] / math.e
    return math.log(ratio / (1 + ratio))


def by_max(grid: Array) -> Array:
    return grid / max(grid.flat) if max(grid.flat) > 0 else np.zeros_like(grid)


def sigmoid(grid: Array) -> Array:
    return 1 / (1 + np.exp(-grid))


def views(
    logits: Callable,
    image: Array,
    saliency: Array,
    original: Array,
    label: int,
    objective: Callable,
    baselines: tuple = (0.0,),
    complement: float = 0.0,
    anchor: Array | None = None,
    beta: float = 0.0,
    low: float = 1.0,
) -> float:
    """What Opti-CAM maximises of one mask seen over several baselines, less its complement and a pull to an anchor."""
    total = 0.0
    for b in baselines:
        kept, hidden = np.zeros_like(image), np.zeros_like(image)
        for channel, i, j in np.ndindex(image.shape):
            under = np.broadcast_to(b, image.shape)[channel, i, j]
            s = saliency[i, j]
            kept[channel, i, j] = s * image[channel, i, j] + (1 - s) * under
            hidden[channel, i, j] = (1 - s) * image[channel, i, j] + s * under
        total += objective(logits(kept), original, label) / len(baselines)
        if complement:
            total -= complement * objective(logits(hidden), original, label) / len(baselines)
    if anchor is not None:
        for place in np.ndindex(saliency.shape):
            price = anchor[place] + (1 - anchor[place]) * low
            total -= beta * price * (saliency[place] - anchor[place]) ** 2 / saliency.size
    return total


def opti_cam(
    model: nn.Module,
    features: list[Array],
    image: Array,
    label: int,
    num_steps: int,
    lr: float,
    objective: Callable = class_logit,
    normalize: Callable = min_max,
    **seen: Any,
) -> tuple[Array, Array]:
    """u after `num_steps` of Adam and its map; gradients by central differences. `features` of one layer or several."""
    height, width = image.shape[1:]
    bounds = np.cumsum([0, *(len(maps) for maps in features)])

    def saliency(u: Array) -> Array:
        total = np.zeros((height, width))
        for maps, first, last in zip(features, bounds, bounds[1:], strict=False):
            total += upsample(weighted_sum(np.maximum(maps, 0), softmax(u[first:last])), height, width)
        return normalize(total)

    def logits(image: Array) -> Array:
        with torch.no_grad():
            return model(torch.from_numpy(image)[None])[0].numpy()

    original = logits(image)

    def value(u: Array) -> float:
        return views(logits, image, saliency(u), original, label, objective, **seen)

    u = np.zeros(bounds[-1])
    first, second = np.zeros_like(u), np.zeros_like(u)
    for t in range(1, num_steps + 1):
        for k in range(len(u)):
            step = np.zeros_like(u)
            step[k] = 1e-5
            gradient = (value(u + step) - value(u - step)) / 2e-5
            gradient = gradient if abs(gradient) > 1e-9 else 0  # rounding, which Adam would make a step of
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
        for k in range(len(u)):
            corrected = first[k] / (1 - 0.9**t), second[k] / (1 - 0.999**t)
            u[k] += lr * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
    return u, saliency(u)


def project(features: Array, w: Array, wanted: Array, num_steps: int = 20) -> Array:
    """Multiplicative updates of Lee and Seung for min_w |sum_k w_k A_k - wanted|^2, w >= 0."""
    for _ in range(num_steps):
        made = weighted_sum(features, w)
        ratios = [np.sum(maps * wanted) / np.sum(maps * made) if np.sum(maps * made) > 0 else 1 for maps in features]
        w = w * np.array(ratios)
    return w


def opti_cam_in_map_space(
    model: nn.Module,
    features: list[Array],
    image: Array,
    label: int,
    num_steps: int,
    lr: float,
    normalize: Callable,
    objective: Callable = class_logit,
    **seen: Any,
) -> tuple[Array, Array]:
    """Weights and map after `num_steps` of Adam (0.5, 0.7) with a cosine; the variables are the cells of the maps."""
    height, width = image.shape[1:]
    features = [np.maximum(maps, 0) for maps in features]

    def logits(image: Array) -> Array:
        with torch.no_grad():
            return model(torch.from_numpy(image)[None])[0].numpy()

    original = logits(image)

    def value(maps: list[Array], weights: list[Array]) -> float:
        total = sum(upsample(z / w.sum(), height, width) for z, w in zip(maps, weights, strict=True))
        return views(logits, image, normalize(total), original, label, objective, **seen)

    def scaled(weights: list[Array]) -> tuple[list[Array], list[Array]]:
        maps = [weighted_sum(A, w) for A, w in zip(features, weights, strict=True)]
        return [z / z.max() for z in maps], [w / z.max() for w, z in zip(weights, maps, strict=True)]

    maps, weights = scaled([np.ones(len(A)) / len(A) for A in features])
    first, second = [np.zeros_like(z) for z in maps], [np.zeros_like(z) for z in maps]
    for t in range(1, num_steps + 1):
        rate = lr * (1 + math.cos(math.pi * (t - 1) / num_steps)) / 2
        moved = [z.copy() for z in maps]
        for layer, z in enumerate(maps):
            for cell in np.ndindex(z.shape):
                sides = []
                for step in (1e-6, -1e-6):
                    tried = [other.copy() for other in maps]
                    tried[layer][cell] += step
                    sides.append(value(tried, weights))
                gradient = (sides[0] - sides[1]) / 2e-6
                gradient = gradient if abs(gradient) > 1e-9 else 0  # rounding, which Adam would make a step of
                first[layer][cell] = 0.5 * first[layer][cell] + 0.5 * gradient
                second[layer][cell] = 0.7 * second[layer][cell] + 0.3 * gradient**2
                corrected = first[layer][cell] / (1 - 0.5**t), second[layer][cell] / (1 - 0.7**t)
                moved[layer][cell] += rate * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        moved = [np.maximum(z, 0) for z in moved]
        maps, weights = scaled([project(A, w, z) for A, w, z in zip(features, weights, moved, strict=True)])
    total = sum(upsample(z / w.sum(), height, width) for z, w in zip(maps, weights, strict=True))
    return np.concatenate([w / w.sum() for w in weights]), normalize(total)


def slopes(features: Array, head: Callable, label: int) -> Array:
    """d y_c / d A by central differences; `head`: features (1,K,h,w) to logits."""
    result = np.zeros_like(features)
    for place in np.ndindex(features.shape):
        step = np.zeros_like(features)
        step[place] = 1e-5
        with torch.no_grad():
            up = head(torch.from_numpy(features + step)[None])[0, label].item()
            down = head(torch.from_numpy(features - step)[None])[0, label].item()
        result[place] = (up - down) / 2e-5
    return result


def finish(grid: Array, height: int, width: int) -> Array:
    """The one rule: ReLU, upsample, n."""
    return min_max(upsample(np.maximum(grid, 0), height, width))


def grad_cam(features: Array, g: Array) -> Array:
    """sum_k w_k A_k, w_k the mean of the gradient g."""
    return weighted_sum(features, [g[k].sum() / g[k].size for k in range(len(features))])


def grad_cam_plus_plus(features: Array, g: Array) -> Array:
    """Eq. 19 written out."""
    weights = np.zeros(len(features))
    for k, i, j in np.ndindex(features.shape):
        if g[k, i, j] != 0:
            a = g[k, i, j] ** 2 / (2 * g[k, i, j] ** 2 + features[k].sum() * g[k, i, j] ** 3)
            weights[k] += a * max(g[k, i, j], 0)
    return weighted_sum(features, weights)


def x_grad_cam(features: Array, g: Array) -> Array:
    weights = np.zeros(len(features))
    for k, i, j in np.ndindex(features.shape):
        weights[k] += g[k, i, j] * features[k, i, j] / features[k].sum() if features[k].any() else 0
    return weighted_sum(features, weights)


def hires_cam(features: Array, g: Array) -> Array:
    grid = np.zeros(features.shape[1:])
    for k, i, j in np.ndindex(features.shape):
        grid[i, j] += g[k, i, j] * features[k, i, j]
    return grid


def layer_cam(features: Array, g: Array) -> Array:
    grid = np.zeros(features.shape[1:])
    for k, i, j in np.ndindex(features.shape):
        grid[i, j] += max(g[k, i, j], 0) * features[k, i, j]
    return grid


def eigen_cam(features: Array) -> Array:
    """Projection on the first eigenvector, by power iteration; turned round where its minimum is the larger."""
    centred = np.array([maps - maps.sum() / maps.size for maps in features])
    covariance = np.array([[(a * b).sum() for b in centred] for a in centred])
    direction = np.arange(1.0, len(features) + 1)
    for _ in range(5000):
        moved = np.array([np.dot(row, direction) for row in covariance])
        direction = moved / math.sqrt((moved**2).sum())
    grid = weighted_sum(centred, direction)
    return -grid if abs(min(grid.flat)) > abs(max(grid.flat)) else grid


def finer_score(logits: Array, label: int, alpha: float, number: int, weights: dict | None = None) -> float:
    """sum_j w_j (y_c - alpha y_j) / sum_j w_j; `weights`, j -> w_j, if they are held."""
    if weights is None:
        weights = finer_weights(logits, label, number)
    total = sum(w * (logits[label] - alpha * logits[j]) for j, w in weights.items())
    return total / sum(weights.values())


def finer_weights(logits: Array, label: int, number: int) -> dict:
    rivals = [j for j in range(len(logits)) if j != label]
    rivals.sort(key=lambda j: abs(logits[j] - logits[label]))
    return {j: softmax(logits)[j] for j in rivals[:number]}


def ablation_cam(features: Array, head: Callable, label: int) -> Array:
    def logit(maps: Array) -> float:
        with torch.no_grad():
            return head(torch.from_numpy(maps)[None])[0, label].item()

    weights = []
    for k in range(len(features)):
        without = features.copy()
        without[k] = 0
        weights.append((logit(features) - logit(without)) / logit(features))
    return weighted_sum(features, weights)


def score_cam(features: Array, model: nn.Module, image: Array, label: int) -> Array:
    def logit(pixels: Array) -> float:
        with torch.no_grad():
            return model(torch.from_numpy(pixels)[None])[0, label].item()

    black = logit(np.zeros_like(image))
    scores = [logit(image * min_max(upsample(maps, *image.shape[1:]))[None]) - black for maps in features]
    return weighted_sum(features, softmax(np.array(scores)))


def rise(model: nn.Module, image: Array, label: int, masks: list[Array], p: float) -> Array:
    """Eq. 6 for given masks."""
    total = np.zeros(image.shape[1:])
    for mask in masks:
        with torch.no_grad():
            logits = model(torch.from_numpy(image * mask[None])[None])[0].numpy()
        total += softmax(logits)[label] * mask / (len(masks) * p)
    return total


def rise_mask(grid: Array, top: int, left: int, height: int, width: int) -> Array:
    """A grid of cells, one cell larger than the image, cut at (top, left)."""
    cells = len(grid)
    steps = math.ceil(height / cells), math.ceil(width / cells)
    large = upsample(grid, (cells + 1) * steps[0], (cells + 1) * steps[1])
    return large[top : top + height, left : left + width]


def gaussian(image: Array, sigma: float) -> Array:
    """Blur pixel by pixel, kernel cut at 3 sigma, borders replicated."""
    _, height, width = image.shape
    radius = math.ceil(3 * sigma)
    around = np.arange(-radius, radius + 1)
    kernel = np.exp(-(around**2) / (2 * sigma**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    blurred = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            rows, columns = np.clip(y + around, 0, height - 1), np.clip(x + around, 0, width - 1)
            blurred[:, y, x] = (image[:, rows][:, :, columns] * kernel).sum((1, 2))
    return blurred


def extremal_perturbation(model: nn.Module, image: Array, label: int, num_steps: int, area: float) -> Array:
    """The smooth mask after SGD on its coarse cells, by central differences."""
    _, height, width = image.shape
    levels = [gaussian(image, 20 * (7 - level) / 7) if level < 7 else image for level in range(8)]

    def smooth(m: Array) -> Array:
        mask = np.zeros((height, width))
        for y in range(height):
            for x in range(width):
                values = []
                for i in range(y // 7 - 4, y // 7 + 5):
                    for j in range(x // 7 - 4, x // 7 + 5):
                        inside = 0 <= i < m.shape[0] and 0 <= j < m.shape[1]
                        distance = math.hypot(y - 7 * i - 3, x - 7 * j - 3) / 21
                        kernel = math.exp(-2 * max(0, distance - 0.5) ** 2)
                        values.append(kernel * m[i, j] if inside else 0.0)
                mask[y, x] = np.dot(values, softmax(20 * np.array(values)))
        return mask

    def value(m: Array, step: int) -> float:
        mask = smooth(m)
        seen = np.zeros_like(image)
        for y in range(height):
            for x in range(width):
                low = min(int(7 * mask[y, x]), 6)
                share = 7 * mask[y, x] - low
                seen[:, y, x] = (1 - share) * levels[low][:, y, x] + share * levels[low + 1][:, y, x]
        if step % 2:
            seen = seen[:, :, ::-1].copy()
        with torch.no_grad():
            reward = model(torch.from_numpy(seen)[None])[0, label].item()
        wanted = np.zeros(height * width)
        wanted[len(wanted) - round(area * len(wanted)) :] = 1
        return reward - 300 * 1.0035**step * np.mean((np.sort(mask.flat) - wanted) ** 2)

    m = np.ones((math.ceil(height / 7), math.ceil(width / 7)))
    momentum = None
    for step in range(num_steps):
        gradient = np.zeros_like(m)
        for cell in np.ndindex(m.shape):
            up, down = m.copy(), m.copy()
            up[cell] += 1e-6
            down[cell] -= 1e-6
            gradient[cell] = (value(up, step) - value(down, step)) / 2e-6
        momentum = gradient if momentum is None else 0.9 * momentum + 0.1 * gradient
        m = np.clip(m + 0.01 * momentum, 0, 1)
    return smooth(m)


def raw_attention(attention: list[Array]) -> Array:
    """Row of the class token; attention (heads,N,N) a block."""
    heads = attention[-1]
    return sum(head[0] for head in heads) / len(heads)


def attention_rollout(attention: list[Array]) -> Array:
    size = attention[0].shape[1]
    rollout = np.eye(size)
    for heads in attention:
        flow = sum(heads) / len(heads) + np.eye(size)
        for i in range(size):
            flow[i] /= flow[i].sum()
        rollout = np.array(
            [[sum(flow[i, n] * rollout[n, j] for n in range(size)) for j in range(size)] for i in range(size)]
        )
    return rollout[0]


def gradient_rollout(attention: list[Array], gradients: list[Array]) -> Array:
    relevance = np.eye(attention[0].shape[1])
    for heads, slope in zip(attention, gradients, strict=True):
        positive = sum(np.maximum(g * a, 0) for g, a in zip(slope, heads, strict=True)) / len(heads)
        relevance = relevance + np.dot(positive, relevance)
    return relevance[0]


def legrad(blocks: list[tuple[Callable, Array]], prefix: int) -> Array:
    """Of each block: its class score as a function of its attention, and that attention (heads,N,N)."""
    total = np.zeros(blocks[0][1].shape[-1] - prefix)
    for score, attention in blocks:
        for h, i, j in itertools.product(*map(range, attention.shape)):
            nudge = np.zeros_like(attention)
            nudge[h, i, j] = 1e-5
            slope = (score(attention + nudge) - score(attention - nudge)) / 2e-5
            if j >= prefix and slope > 0:
                total[j - prefix] += slope / (len(attention) * attention.shape[1] * len(blocks))
    return total


def average_drop(p: float, o: float) -> float:
    return max(0.0, p - o) / p


def average_increase(p: float, o: float) -> float:
    return 1.0 if o > p else 0.0


def average_gain(p: float, o: float) -> float:
    return 0.0 if p == 1 else max(0.0, o - p) / (1 - p)


def gain_minus_drop(p: float, o: float) -> float:
    return (o - p) / (1 - p) if o > p else (o - p) / p


def log_odds(logits: list[float], c: int, head: str) -> float:
    """With 200 digits, so that neither q nor 1 - q is ever rounded to 0 or 1."""
    with decimal.localcontext(prec=200):
        y = [decimal.Decimal(value) for value in logits]
        if len(y) == 1:
            y, head = [y[0], -y[0]], "sigmoid"
        total = sum(value.exp() for value in y) if head == "softmax" else y[c].exp() + 1
        q = y[c].exp() / total
        return float((q / (1 - q)).ln())


def log_odds_change(logits: list[float], masked_logits: list[float], c: int, head: str) -> float:
    return log_odds(masked_logits, c, head) - log_odds(logits, c, head)


# Localization and sanity checks: pixels are counted one by one, boxes are (xmin, ymin, xmax, ymax).


def in_box(box: Array, i: int, j: int) -> bool:
    """Whether the centre of the pixel in row i and column j lies in the box."""
    return box[0] <= j + 0.5 < box[2] and box[1] <= i + 0.5 < box[3]


def box_area(box: Array, margin: int = 60) -> int:
    """Pixels of a box, inside and outside the frame, as far as `margin` on all sides of the origin."""
    return sum(in_box(box, i, j) for i in range(-margin, margin) for j in range(-margin, margin))


def flood(mask: Array, start: tuple[int, int], steps: list[tuple[int, int]]) -> set[tuple[int, int]]:
    found, open_ = {start}, [start]
    while open_:
        i, j = open_.pop()
        for a, b in steps:
            place = (i + a, j + b)
            inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
            if inside and place not in found and mask[place]:
                found.add(place)
                open_.append(place)
    return found


def components(mask: Array, steps: list[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """Connected components, in reading order of their first pixels."""
    out: list[set[tuple[int, int]]] = []
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if mask[i, j] and not any((i, j) in component for component in out):
                out.append(flood(mask, (i, j), steps))
    return out


FOUR = [(-1, 0), (1, 0), (0, -1), (0, 1)]
EIGHT = [*FOUR, (-1, -1), (-1, 1), (1, -1), (1, 1)]


def span(pixels: set[tuple[int, int]]) -> tuple[int, int, int, int]:
    """Tight box, end inclusive."""
    rows, columns = [i for i, _ in pixels], [j for _, j in pixels]
    return min(columns), min(rows), max(columns), max(rows)


def predicted_box(grid: Array) -> tuple[int, int, int, int]:
    values = sorted(grid.flat)
    mean = sum(values) / len(values)
    threshold = values[int((len(values) - 1) * (1 - mean) + 0.5)]
    found = components(grid > min(threshold, 1 - 1e-6), FOUR)
    if not found:
        return 0, 0, -1, -1
    largest = found[0]
    for component in found:
        if len(component) > len(largest):
            largest = component
    return span(largest)


def localization_error(grid: Array, boxes: Array) -> float:
    xmin, ymin, xmax, ymax = predicted_box(grid)
    error = 1.0
    for box in boxes:
        predicted = overlap = 0
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                if xmin <= j <= xmax and ymin <= i <= ymax:
                    predicted += 1
                    overlap += in_box(box, i, j)
        union = predicted + box_area(box) - overlap
        if union and overlap / union > 0.5:
            error = 0.0
    return error


def soft_f1(grid: Array, boxes: Array) -> float:
    best = 0.0
    for box in boxes:
        inside = sum(grid[i, j] for i in range(grid.shape[0]) for j in range(grid.shape[1]) if in_box(box, i, j))
        if inside > 0:
            precision, recall = inside / sum(grid.flat), inside / box_area(box)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def energy_pointing_game(grid: Array, boxes: Array) -> float:
    inside = 0.0
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            if any(in_box(box, i, j) for box in boxes):
                inside += grid[i, j]
    return inside / sum(grid.flat)


def pointing_game(grid: Array, boxes: Array, tolerance: float) -> float:
    rows, columns = grid.shape
    hits = []
    for i in range(rows):
        for j in range(columns):
            if grid[i, j] == max(grid.flat):
                hits.append(
                    any(
                        math.hypot(a - i, b - j) <= tolerance and any(in_box(box, a, b) for box in boxes)
                        for a in range(rows)
                        for b in range(columns)
                    )
                )
    return sum(hits) / len(hits)


def saliency_metric(model: nn.Module, image: Array, c: int, grid: Array) -> float:
    height, width = grid.shape
    xmin, ymin, xmax, ymax = predicted_box(grid)
    if xmax < xmin:
        xmin, ymin, xmax, ymax = 0, 0, width - 1, height - 1
    crop = np.stack([upsample(channel[ymin : ymax + 1, xmin : xmax + 1], height, width) for channel in image])
    with torch.no_grad():
        probs = softmax(model(torch.from_numpy(crop)[None])[0].numpy())
    area = (xmax - xmin + 1) * (ymax - ymin + 1) / (width * height)
    return math.log(max(area, 0.05)) - math.log(probs[c])


def all_contour_hits(grid: Array, boxes: Array, num_thresholds: int) -> Array:
    """Rows 1 to 3 of the hits: contours are the borders of 8-connected components and of the holes in them."""
    height, width = grid.shape
    image = np.array([[int(255 * value) for value in row] for row in grid])
    hits = np.zeros((3, num_thresholds), dtype=bool)
    for t in range(num_thresholds):
        kept = image > int(t * (1 / num_thresholds) * max(image.flat))
        spans = [span(component) for component in components(kept, EIGHT)]
        for hole in components(~kept, FOUR):
            xmin, ymin, xmax, ymax = span(hole)
            if xmin > 0 and ymin > 0 and xmax < width - 1 and ymax < height - 1:
                spans.append((xmin - 1, ymin - 1, xmax + 1, ymax + 1))
        for xmin, ymin, xmax, ymax in spans:
            xmax, ymax = min(xmax + 1, width - 1), min(ymax + 1, height - 1)
            for box in boxes:
                wide = (box[0], box[1], box[2] + 1, box[3] + 1)
                overlap = sum(in_box(wide, i, j) for i in range(ymin, ymax + 1) for j in range(xmin, xmax + 1))
                iou = overlap / ((xmax - xmin + 1) * (ymax - ymin + 1) + box_area(wide) - overlap)
                for row, wanted in enumerate((0.3, 0.5, 0.7)):
                    hits[row, t] |= iou >= wanted
    return hits


def rank_correlation(a: Array, b: Array) -> float:
    def ranks(values: Array) -> list[float]:
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    x, y = ranks(a.ravel()), ranks(b.ravel())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))


def structural_similarity(a: Array, b: Array) -> float:
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-5, 6) for j in range(-5, 6)}
    total = sum(weights.values())
    values = []
    for y in range(5, a.shape[0] - 5):
        for x in range(5, a.shape[1] - 5):
            moments = np.zeros(5)
            for (i, j), weight in weights.items():
                p, q = a[y + i, x + j], b[y + i, x + j]
                moments += weight / total * np.array([p, q, p * p, q * q, p * q])
            mean_p, mean_q, pp, qq, pq = moments
            luminance = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
            structure = (2 * (pq - mean_p * mean_q) + 0.03**2) / (pp - mean_p**2 + qq - mean_q**2 + 0.03**2)
            values.append(luminance * structure)
    return sum(values) / len(values)


def class_probability(network: Callable, pixels: Array, label: int) -> float:
    with torch.no_grad():
        return softmax(network(torch.from_numpy(pixels)[None])[0].numpy())[label]


def by_saliency(saliency: Array) -> list[tuple[int, int]]:
    """Places, the most salient first; Python's sort is stable."""
    return sorted(np.ndindex(saliency.shape), key=lambda place: -saliency[place])


def blurred_11(image: Array) -> Array:
    """11x11 Gaussian of sigma 5, zeros beyond the border."""
    kernel = {(i, j): math.exp(-(i * i + j * j) / 50) for i in range(-5, 6) for j in range(-5, 6)}
    total = sum(kernel.values())
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        for (i, j), weight in kernel.items():
            if 0 <= y + i < image.shape[1] and 0 <= x + j < image.shape[2]:
                out[:, y, x] += weight / total * image[:, y + i, x + j]
    return out


def pixel_curve(
    network: Callable, start: Array, finish: Array, saliency: Array, label: int, per_step: int
) -> tuple[float, list[float]]:
    """Pixel after pixel from `start` to `finish`; the probability after every `per_step`, and the area under it."""
    pixels, order = start.copy(), by_saliency(saliency)
    curve = [class_probability(network, pixels, label)]
    while order:
        for y, x in order[:per_step]:
            pixels[:, y, x] = finish[:, y, x]
        order = order[per_step:]
        curve.append(class_probability(network, pixels, label))
    area = 0.0
    for left, right in itertools.pairwise(curve):
        area += (left + right) / 2 / (len(curve) - 1)
    return area, curve


def insertion(
    network: Callable, normalised: Array, saliency: Array, label: int, per_step: int
) -> tuple[float, list[float]]:
    """`network` and `normalised` after mean/std."""
    return pixel_curve(network, blurred_11(normalised), normalised, saliency, label, per_step)


def deletion(
    network: Callable, normalised: Array, saliency: Array, label: int, per_step: int
) -> tuple[float, list[float]]:
    """`network` and `normalised` after mean/std."""
    return pixel_curve(network, normalised, np.zeros_like(normalised), saliency, label, per_step)


def impute(image: Array, removed: list[tuple[int, int]]) -> Array:
    """A dense linear system: removed pixel = weighted mean of its neighbours inside the image."""
    number = {place: i for i, place in enumerate(removed)}
    system, right = np.zeros((len(removed), len(removed))), np.zeros((len(removed), len(image)))
    for (y, x), i in number.items():
        weights = {}
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy or dx) and 0 <= y + dy < image.shape[1] and 0 <= x + dx < image.shape[2]:
                    weights[y + dy, x + dx] = 1 / 12 if dy and dx else 1 / 6
        system[i, i] = 1
        for place, weight in weights.items():
            if place in number:
                system[i, number[place]] = -weight / sum(weights.values())
            else:
                right[i] += weight / sum(weights.values()) * image[(slice(None), *place)]
    solution, out = np.linalg.solve(system, right), image.copy()
    for place, i in number.items():
        out[(slice(None), *place)] = solution[i]
    return out


def road(
    model: Callable, image: Array, saliency: Array, label: int, fractions: tuple[float, ...], noise: Array
) -> float:
    scores = []
    for fraction in fractions:
        count = round(fraction * saliency.size)
        probs = []
        for order in (by_saliency(-saliency), by_saliency(saliency)):
            imputed = impute(image, order[:count])
            for place in order[:count]:
                imputed[(slice(None), *place)] += noise[(slice(None), *place)]
            probs.append(class_probability(model, imputed, label))
        scores.append((probs[0] - probs[1]) / 2)
    return sum(scores) / len(scores)


def coherency(a: Array, b: Array) -> float:
    mean_a, mean_b = sum(a.flat) / a.size, sum(b.flat) / b.size
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a.flat, b.flat, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a.flat)) * math.sqrt(sum((y - mean_b) ** 2 for y in b.flat))
    return (covariance / spread + 1) / 2


def complexity(a: Array) -> float:
    return sum(a.flat) / a.size


def adcc(a: Array, b: Array, drop: float) -> float:
    return 3 / (1 / coherency(a, b) + 1 / (1 - complexity(a)) + 1 / (1 - drop))


def holm(p_values: list[float], level: float) -> list[bool]:
    """Which tests pass at a level: the smallest p against level/m, the next against level/(m-1), until one fails."""
    passed = [False] * len(p_values)
    left = sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] <= level / len(left):
        passed[left.pop(0)] = True
    return passed


def arcc(a: Array, b: Array, road_combined: float) -> float:
    return 3 / (1 / coherency(a, b) + 1 / (1 - complexity(a)) + 1 / min(max(2 * road_combined, 0), 1))


def pixel_auroc(grid: Array, boxes: Array) -> float:
    """Every pixel of the boxes against every other pixel."""
    inside = [grid[place] for place in np.ndindex(grid.shape) if any(in_box(box, *place) for box in boxes)]
    outside = [grid[place] for place in np.ndindex(grid.shape) if not any(in_box(box, *place) for box in boxes)]
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def best_map(boxes: Array, height: int, width: int, rows: int, columns: int) -> Array:
    cells = np.zeros((rows, columns))
    for i, j in np.ndindex(height, width):
        if any(in_box(box, i, j) for box in boxes):
            cells[i * rows // height, j * columns // width] += rows * columns / (height * width)
    return upsample(cells, height, width)


def scaled(metric: Callable, grid: Array, boxes: Array, rows: int, columns: int) -> float:
    low = metric(np.ones_like(grid), boxes)
    return (metric(grid, boxes) - low) / (metric(best_map(boxes, *grid.shape, rows, columns), boxes) - low)


def class_contrast(own: Array, others: list[Array], boxes: Array) -> float:
    return energy_pointing_game(own, boxes) - sum(energy_pointing_game(a, boxes) for a in others) / len(others)


def cell_drops(network: Callable, image: Array, label: int, side: int, fill: Array) -> list[float]:
    def logit(pixels: Array) -> float:
        with torch.no_grad():
            return network(torch.from_numpy(pixels)[None])[0, label].item()

    drops = []
    for cell in range(side**2):
        without = image.copy()
        for i, j in np.ndindex(image.shape[1:]):
            if (i * side // image.shape[1]) * side + j * side // image.shape[2] == cell:
                without[:, i, j] = fill[:, i, j]
        drops.append(logit(image) - logit(without))
    return drops


def spectrum(channel: Array) -> Array:
    """The discrete Fourier transform, term by term."""
    height, width = channel.shape
    out = np.zeros((height, width), dtype=complex)
    for u, v in np.ndindex(height, width):
        for i, j in np.ndindex(height, width):
            out[u, v] += channel[i, j] * np.exp(-2j * math.pi * (u * i / height + v * j / width))
    return out


def phase_scrambled(channel: Array, noise: Array) -> Array:
    frequencies, other = spectrum(channel), spectrum(noise)
    height, width = channel.shape
    out = np.zeros((height, width), dtype=complex)
    for i, j in np.ndindex(height, width):
        for u, v in np.ndindex(height, width):
            turned = frequencies[u, v] * other[u, v] / abs(other[u, v])
            out[i, j] += turned * np.exp(2j * math.pi * (u * i / height + v * j / width)) / (height * width)
    assert abs(out.imag).max() < 1e-9
    return out.real
