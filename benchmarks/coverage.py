"""How often a 95 % interval contains what it is for: percentile and BCa bootstrap, t, and ours, by simulation.

The populations are like what the notebooks average: normal differences; gains that are mostly large, as Opti-CAM's;
gains that are mostly 0, as Grad-CAM's; hits; and images times repeats that share a part of their error.
"""

import argparse
import warnings
from functools import partial

import numpy as np
from common import report
from scipy import stats

from opticam.lab.summary import interval, proportion_interval

TRUE_RATE = 0.9
POPULATIONS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "mostly large gains": lambda rng, shape: rng.beta(2.2, 0.7, shape),
    "mostly no gain": lambda rng, shape: np.where(rng.random(shape) < 0.75, 0, rng.beta(1, 1.5, shape)),
}


def bootstrap(values, method, rng):
    """An interval of the mean by scipy, or (nan, nan) where it is undefined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stats.bootstrap((values,), np.mean, n_resamples=2000, method=method, rng=rng).confidence_interval


def student(values):
    """The t interval of the mean."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def main() -> None:
    """Simulate, count, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for name, draw in POPULATIONS.items():
        truth = draw(rng, 4_000_000).mean()
        for n in (6, 8, 20, 50, 300):
            ways = {
                "percentile": partial(bootstrap, method="percentile", rng=rng),
                "BCa": partial(bootstrap, method="BCa", rng=rng),
                "t": student,
                "ours": partial(interval, num_resamples=2000),
            }
            hits = dict.fromkeys(ways, 0)
            for _ in range(options.trials):
                values = draw(rng, n)
                for way, make in ways.items():
                    low, high = make(values)
                    hits[way] += bool(low <= truth <= high)
            rows.append({"population": name, "n": n} | {way: count / options.trials for way, count in hits.items()})
            print(rows[-1], flush=True)
    for n in (20, 300):
        samples = (rng.random((options.trials, n)) < TRUE_RATE).astype(float)
        inside = [low <= TRUE_RATE <= high for low, high in map(proportion_interval, samples)]
        rows.append({"population": f"hits, {TRUE_RATE:.0%}", "n": n, "ours": np.mean(inside)})
    for repeats in (3, 5):
        inside = {"t": [], "ours": []}
        for _ in range(options.trials):
            values = rng.normal(size=(50, 1)) + 0.3 * rng.normal(size=(1, repeats)) + rng.normal(size=(50, repeats))
            for way, (low, high) in (("t", student(values.mean(1))), ("ours", interval(values))):
                inside[way].append(low <= 0 <= high)
        name = f"normal, {repeats} repeats that share 0.3"
        rows.append({"population": name, "n": 50} | {way: np.mean(found) for way, found in inside.items()})
    report("coverage", rows, trials=options.trials)


if __name__ == "__main__":
    main()
