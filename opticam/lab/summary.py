"""From rows to numbers: means, correlations and accuracies over images, with 95 % intervals."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import special, stats

from opticam.checks import check_numbers, check_whole
from opticam.methods import method_label
from opticam.metrics import COLUMNS, factors, headings, max_box_accuracy
from opticam.state import in_a_line


class Estimate(NamedTuple):
    """A number and its 95 % interval; all three the same where there is none. `f"{estimate:.1f}"`: 1.2 [0.8, 1.7]."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        shown = [format(number, spec) for number in self]
        return shown[0] if self.low == self.value == self.high else f"{shown[0]} [{shown[1]}, {shown[2]}]"


NOTHING = Estimate(np.nan, np.nan, np.nan)  # of no values
FEW, MANY = 20, 2000  # images: below, resampling covers less than it says; above, it adds nothing to a mean
DRAWN = 2_000_000  # resampled values in memory, whatever the number of images


def interval(
    *values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean, num_resamples: int = 10_000
) -> tuple[float, float]:
    """95 % interval of a statistic over images: BCa bootstrap, seeded; Student's t for fewer than 20 images.

    **Ours**: t, with the jackknife's standard error, also where BCa is undefined, and for the mean of more than 2000
    images, where both agree. `benchmarks/results/coverage.json` has what each covers: of 6 or 8 normal values, 95 %
    intervals by BCa contain the mean in 86 and 90 % of cases, by t in 95 %.

    Where a result differs from run to run, give the mean of several repeats as (n,R): then both the images and the
    repeats are samples, with variance `var(means of images)/n + var(means of repeats)/R`, which is conservative, and t
    has the degrees of freedom of Satterthwaite.

    Args:
        values: one or more arrays (n,), resampled together, so that values of one image stay paired; or one (n,R), of
            n images in R repeats that all images share, such as seeds of random weights. Lists are taken too. All are
            turned into float64, with NaN where an array is masked.
        statistic: from as many arrays as given, along their last axis, to numbers; for (n,R) only the mean.
        num_resamples: bootstrap samples, at least 1.

    Returns:
        (low, high); NaN for a single image, which has no interval.

    Raises:
        TypeError: a statistic that is not a function.
        ValueError: no values, no numbers or of different lengths; a statistic other than the mean for repeats, or the
            mean for several arrays; fewer than one sample.

    Reference:
        Efron, Better bootstrap confidence intervals, JASA 1987.
    """
    return _inferred(_as_arrays(values), statistic, num_resamples)[0][1:]


def _as_array(name: str, given: Any) -> np.ndarray:
    """Numbers as float64, also of a list or a column of a table, NaN where masked. ValueError: anything else."""
    try:
        array = np.asarray(given)
        array = array.astype(float) if array.dtype == object else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: wanted an array of numbers, got {in_a_line(given)}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: wanted an array of numbers, got {in_a_line(given)}")
    array = array.astype(float)  # sums of half precision overflow, differences of small integers wrap around
    array[np.ma.getmask(given)] = np.nan
    return array


def _as_arrays(values: Sequence[Any]) -> tuple[np.ndarray, ...]:
    arrays = tuple(_as_array("values", given) for given in values)
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or any(len(shape) != 1 for shape in shapes[1:]):
        raise ValueError(f"values: wanted arrays (n,) of one length, got shapes {', '.join(map(str, shapes))}")
    if shapes and (len(shapes[0]) not in (1, 2) or shapes[0][1:] == (0,)):
        raise ValueError(f"values: wanted (n,), or (n,R) of repeats, got shape {shapes[0]}")
    return arrays


def _inferred(
    values: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], num_resamples: int
) -> tuple[Estimate, Callable[[], float]]:
    """A statistic with its interval, see `interval`, and a function that returns its p value, see `estimate_and_p`."""
    if not values or len(values[0]) == 0:
        raise ValueError("values: wanted at least one image")
    check_whole(1, num_resamples=num_resamples)
    if not callable(statistic):
        raise TypeError(f"statistic: wanted a function of arrays, got {in_a_line(statistic)}")
    if statistic is np.mean and len(values) > 1:
        raise ValueError(f"statistic: wanted one of {len(values)} arrays, got the mean")
    number, repeated = len(values[0]), values[0].ndim == 2
    if repeated and statistic is not np.mean:
        raise ValueError("statistic: wanted the mean, of images and repeats")
    value = float(statistic(*values, axis=None if repeated else -1))
    least = min(1, 2 / num_resamples)
    if number == 1:
        return Estimate(value, np.nan, np.nan), lambda: np.nan
    if all((array == array.flat[0]).all() for array in values):  # rounding is no spread
        return Estimate(value, value, value), lambda: float(value == 0)
    if number >= FEW and not repeated and not (statistic is np.mean and number > MANY):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where BCa is undefined: then t
            drawn = stats.bootstrap(
                values,
                statistic,
                n_resamples=num_resamples,
                paired=True,
                vectorized=True,
                batch=max(1, DRAWN // number),
                method="BCa",
                rng=np.random.default_rng(0),
            )
        if np.isfinite(drawn.confidence_interval).all():
            found = Estimate(value, *_pair(drawn.confidence_interval))
            return found, lambda: max(_p_of_bca(values, statistic, value, drawn.bootstrap_distribution), least)
    if statistic is np.mean:
        error, freedom = _spread(values[0].reshape(number, -1))
    else:
        error, freedom = _left_out(values, statistic).std() * np.sqrt(number - 1), number - 1
    half = error * stats.t.ppf(0.975, freedom)
    found = Estimate(value, float(value - half), float(value + half))
    return found, lambda: float(2 * stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)


def _left_out(values: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> np.ndarray:
    """The statistic without one image after the other, with so many values in memory as `DRAWN` says."""
    number = len(values[0])
    places, found = np.arange(number - 1), []
    for left_out in np.array_split(np.arange(number)[:, None], 1 + number**2 // DRAWN):
        others = places + (places >= left_out)
        found.append(statistic(*(array[others] for array in values), axis=-1))
    return np.concatenate(found)


def _p_of_bca(
    values: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], value: float, drawn: np.ndarray
) -> float:
    """1 minus the confidence whose BCa interval ends at 0, by Efron's formula solved for it."""
    apart = _left_out(values, statistic)
    apart = apart.mean() - apart
    skew = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    drawn, number = np.sort(drawn), len(drawn)
    below, up_to = (np.searchsorted(drawn, 0, side) for side in ("left", "right"))
    if below == number or up_to == 0:
        return 0.0
    at_zero = [below, up_to - 1] if below < up_to else [np.interp(0, drawn, np.arange(number))]  # several may be 0
    bias = special.ndtri(((drawn < value).mean() + (drawn <= value).mean()) / 2)
    beyond = special.ndtri(np.clip(at_zero, 0.1, number - 1.1) / (number - 1)) - bias
    ends = beyond / (1 + skew * beyond) - bias
    return float(2 * special.ndtr(-abs(ends).min())) if ends[0] * ends[-1] > 0 else 1.0


def estimate_and_p(
    *values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean, num_resamples: int = 10_000
) -> tuple[Estimate, float]:
    """A statistic over images with its 95 % interval, and the two-sided p value of its being 0.

    p is 1 minus the confidence of the narrowest `interval` that contains 0. So it is below 0.05 where the 95 % interval
    excludes 0. Of many tests, correct it with `holm`. Arguments and errors as `interval`.

    Returns:
        The estimate; and p in [0,1], by resampling at least 2 / num_resamples, since so many samples cannot show a
        smaller one. Of means of values that are all the same but not 0 it is that of the sign test. NaN, which is not a
        test, for a single image, for another statistic of such values, and where one of them is NaN.
    """
    arrays = _as_arrays(values)
    found, p = _inferred(arrays, statistic, num_resamples)
    if np.isnan(found).any():
        return found, np.nan
    if found.low == found.high != 0:
        return found, max(2.0 ** (1 - len(arrays[0])), min(1, 2 / num_resamples)) if statistic is np.mean else np.nan
    return found, p()


def holm(p_values: Collection[float]) -> np.ndarray:
    """The p values of many tests, corrected for their number.

    If nothing is real, one of them falls below 0.05 in at most 5 % of such families. The smallest of m is multiplied by
    m, the next by m - 1, and so on; none may fall below one before it.

    Args:
        p_values: of all tests that are looked at together. NaN is not a test.

    Returns:
        In [0,1], in the order given; NaN where there was no test.

    Raises:
        ValueError: a value outside [0,1], or more than a row of them.

    Reference:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    row = [*p_values] if isinstance(p_values, Iterable) and not hasattr(p_values, "__array__") else p_values
    given = _as_array("p_values", row)
    if given.ndim != 1:
        raise ValueError(f"p_values: wanted a row of numbers, got shape {given.shape}")
    if (given < 0).any() or (given > 1).any():
        raise ValueError(f"p_values: wanted numbers in [0,1], got {given.tolist()}")
    order = given.argsort()  # NaN last
    number = int(np.isfinite(given).sum())
    corrected = np.full(len(given), np.nan)
    ranks = np.arange(number)
    corrected[order[:number]] = np.maximum.accumulate((number - ranks) * given[order[:number]]).clip(max=1)
    return corrected


def _pair(found: Any) -> tuple[float, float]:
    return float(found.low), float(found.high)


def estimate(
    *values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean, num_resamples: int = 10_000
) -> Estimate:
    """A statistic over images with its 95 % interval; arguments and errors as `interval`."""
    return _inferred(_as_arrays(values), statistic, num_resamples)[0]


def estimate_of(summary: pd.DataFrame, method: Any, column: str) -> Estimate:
    """The entry of a table from `summarize` or `summarize_differences`; a ValueError where there is none."""
    names = [column, f"{column}_low", f"{column}_high"]
    check_table("summary", summary, names)
    if [*summary.index].count(method) != 1:
        raise ValueError(f"method: wanted one of {', '.join(map(str, summary.index))}, got {in_a_line(method)}")
    return Estimate(*(float(summary.loc[method, name]) for name in names))


def entries(column: str, found: Iterable[float], factor: float = 1) -> dict[str, float]:
    """The estimate as it stands in such a table: `column`, `column_low` and `column_high`, times the factor."""
    names = column, f"{column}_low", f"{column}_high"
    return {name: factor * number for name, number in zip(names, found, strict=True)}


def paired(rows: pd.DataFrame, column: str, method: str, reference: str) -> np.ndarray:
    """How much more of a column one method has than the reference, (n,), image by image, for images that have both.

    Raises:
        TypeError: rows that are not a table.
        ValueError: no such column, no row of a method, or an image has two rows of the same method.
    """
    _check_rows(rows, [column], "image", "method")
    _check_method(rows, method=method, reference=reference)
    wide = by_method(rows, "image", column)
    return (wide[method] - wide[reference]).dropna().to_numpy()


def by_method(rows: pd.DataFrame, keys: str | list[str], column: str) -> pd.DataFrame:
    """A column with a method's values beside another's, as floats: differences of small integers would wrap around."""
    wide = rows.pivot(index=keys, columns="method", values=column)
    return wide.where(wide.notna()).astype(float)  # objects may be pd.NA, which is no float


def difference(rows: pd.DataFrame, column: str, method: str, reference: str) -> Estimate:
    """Mean of `paired` with its 95 % interval, times the column's factor: for a fraction, percentage points."""
    gained = _gained(rows, column, method, reference)
    factor = factors([column])[column]
    return within_span(estimate(factor * gained), column, factor, difference=True)


def _gained(rows: pd.DataFrame, column: str, method: str, reference: str) -> np.ndarray:
    gained = paired(rows, column, method, reference)
    if not len(gained):
        raise ValueError(f"rows: {method} and {reference} have no image in common with a value of {column}")
    return gained


def print_differences(rows: pd.DataFrame, columns: Collection[str], method: str, *references: str) -> None:
    """Print `difference` for each column and reference, on how many images the method has more, and p.

    All that is printed is one family of tests: p, of no difference, is corrected by `holm` for their number.
    """
    _check_rows(rows, columns, "image", "method")
    pairs = [(column, reference) for column in columns for reference in references]
    gains = [_gained(rows, column, method, reference) for column, reference in pairs]
    found = [estimate_and_p(factors([column])[column] * gain) for (column, _), gain in zip(pairs, gains, strict=True)]
    corrected = holm([p for _, p in found])
    for (column, reference), gained, (shown, _), p in zip(pairs, gains, found, corrected, strict=True):
        title = f"{headings([column])[column]}: {method_label(method)} minus {method_label(reference)}"
        shown = within_span(shown, column, factors([column])[column], difference=True)
        print(f"{title} {shown:.1f}; higher on {(gained > 0).sum()} of {len(gained)}; p {p:.2g}")


def within_span(found: Estimate, column: str, factor: float, difference: bool) -> Estimate:
    """The interval, which by t may go beyond, cut off where the values of the metric, or their differences, end."""
    least, most = COLUMNS[column].span if column in COLUMNS else (-np.inf, np.inf)
    if difference:
        least, most = least - most, most - least
    return clipped(found, factor * least, factor * most)


def clipped(found: Estimate, least: float, most: float) -> Estimate:
    """The estimate with an interval that ends where its values do."""
    return Estimate(found.value, *np.clip(found[1:], least, most).tolist())


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Standard error and degrees of freedom of the mean of (n,R), images and repeats both being samples."""
    n, repeats = values.shape
    if repeats == 1:
        return values.std(ddof=1) / np.sqrt(n), n - 1
    parts = np.array([values.mean(1).var(ddof=1) / n, values.mean(0).var(ddof=1) / repeats])
    freedom = parts.sum() ** 2 / (parts**2 / [n - 1, repeats - 1]).sum() if parts.any() else n - 1
    return np.sqrt(parts.sum()), freedom


def proportion_interval(hits: np.ndarray) -> tuple[float, float]:
    """Exact 95 % interval of a proportion, by Clopper and Pearson.

    Args:
        hits: (n,) of zeros and ones.

    Returns:
        (low, high) in [0,1]: of 20 hits in 20, (0.83, 1).

    Raises:
        ValueError: no values, or others than 0 and 1.

    Reference:
        Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial, 1934.
    """
    hits = _as_array("hits", hits)
    if hits.ndim != 1 or len(hits) == 0 or not np.isin(hits, (0, 1)).all():
        raise ValueError("hits: wanted zeros and ones, at least one, in a row")
    return _pair(stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="exact"))


def summarize(rows: pd.DataFrame, columns: Collection[str], repeats: str | None = None) -> pd.DataFrame:
    """Means over images with 95 % intervals, per method; see `interval`, for proportions `proportion_interval`.

    Intervals end where the values of a metric do, by the `span` of its record. Rows that were skipped do not count, nor
    values that are not defined, such as those that need a box.

    Args:
        rows: from `evaluate`, `results.read_shards` or `results.read_rows`.
        columns: names of columns, which are multiplied with the factor of their record, 100 for a percentage; or
            column -> factor.
        repeats: column that numbers the repeats of each image and method, all images having the same. An image whose
            value is not defined in some of them does not count, with a warning.

    Returns:
        Index `method` in order of appearance; per column `column`, `column_low`, `column_high`.

    Raises:
        TypeError: rows that are not a table, or columns that are not a list of names.
        ValueError: no such column, or one without numbers; an image has two rows of the same method and repeat, or
            lacks a repeat.
    """
    _check_rows(rows, columns, "method", repeats=repeats)

    def mean_of(group: pd.DataFrame, column: str) -> tuple[Estimate, None]:
        values = _values(group, column, repeats)
        if not len(values):
            return NOTHING, None
        proportion = column in COLUMNS and COLUMNS[column].proportion and repeats is None
        exact = proportion and np.isin(values, (0, 1)).all()
        found = Estimate(values.mean(), *(proportion_interval if exact else interval)(values))
        return within_span(found, column, 1, difference=False), None

    return tabulate(_counted(rows), columns, mean_of)


def _counted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that were not skipped."""
    return rows[rows["status"] != "skipped"] if "status" in rows else rows


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows by image, if they have one; objects by their text, since numbers and words have no order."""

    def comparable(images: pd.Series) -> pd.Series:
        return images.astype(str) if images.dtype == object else images

    return rows.sort_values("image", kind="stable", key=comparable) if "image" in rows else rows


def tabulate(
    rows: pd.DataFrame,
    columns: Collection[str],
    found_in: Callable[[pd.DataFrame, str], tuple[Estimate, float | None]],
) -> pd.DataFrame:
    """What is found in the rows of each method, for each column: a table like that of `summarize`.

    `column_p` is the p value, where there is one.
    """
    if not isinstance(columns, Mapping):
        columns = factors(columns)
    for factor in columns.values():
        check_numbers(columns=factor)
    table = {}
    for method, group in rows.groupby("method", sort=False):
        cells: dict[str, float] = {}
        for column, factor in columns.items():
            found, p = found_in(group, column)
            cells |= entries(column, found, factor) | ({} if p is None else {f"{column}_p": p})
        table[method] = cells
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("method")


def _values(group: pd.DataFrame, column: str, repeats: str | None) -> np.ndarray:
    """The column of one method as `interval` takes it: (n,), in the order of the images, or (n,R) of repeats."""
    if repeats is None:
        return _ordered(group)[column].dropna().to_numpy(float)
    wide = group.pivot(index="image", columns=repeats, values=column).dropna(how="all")
    values = wide.dropna()
    if len(values) < len(wide):
        lost = f"{len(wide) - len(values)} of {len(wide)} images lack {column} in a repeat and do not count"
        warnings.warn(f"repeats: {lost}", stacklevel=5)  # where the summary was asked for
    return values.to_numpy(float)


def check_table(name: str, table: pd.DataFrame, columns: Iterable[Any]) -> None:
    """Refuse what is not a table that has each of the columns once."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{name}: wanted a table of pandas, got {in_a_line(table)}")
    for column in columns:
        if [*table].count(column) != 1:
            raise ValueError(
                f"{name}: wanted one column {in_a_line(column)}, got {[*table].count(column)} of that name"
            )


def check_numeric(rows: pd.DataFrame, column: str) -> None:
    """Refuse, by a ValueError, a column with values that are not numbers."""
    if not pd.api.types.is_numeric_dtype(rows[column]):
        _as_array(f"column {column}", rows[column].dropna())


def _check_columns(rows: pd.DataFrame, columns: Collection[str], *needed: str) -> None:
    """Refuse rows without these columns, of which the first hold numbers, and those without a method or a group."""
    if isinstance(columns, str | bytes) or not isinstance(columns, Collection):
        raise TypeError(f"columns: wanted a list of names, got {in_a_line(columns)}")
    check_table("rows", rows, [*needed, *columns])
    for column in columns:
        check_numeric(rows, column)
    for name in {"method", "group"}.intersection(needed):
        if rows[name].isna().any():
            raise ValueError(f"rows: wanted a {name} for every row")


def _check_rows(rows: pd.DataFrame, columns: Collection[str], *needed: str, repeats: str | None = None) -> None:
    """Refuse rows without these columns or a method, two of an image and method, and repeats that lack one.

    Args:
        rows: what `summarize` takes.
        columns: of numbers.
        needed: others.
        repeats: as `summarize`.
    """
    if repeats in ("image", "method"):
        raise ValueError(f"repeats: wanted a column beside image and method, got {repeats!r}")
    _check_columns(rows, columns, *needed, *([] if repeats is None else ["image", repeats]))
    if "image" not in rows:
        return
    twice = rows[rows.duplicated(["image", "method"] + ([] if repeats is None else [repeats]))]
    if len(twice):
        image, method = twice[["image", "method"]].iloc[0]
        again = "" if repeats is None else f" and {repeats}"
        raise ValueError(f"rows: wanted one row per image and method{again}, got more of {image}, {method}")
    if repeats is not None:
        found = rows.groupby(["image", "method"], sort=False, observed=True).size()
        wanted = rows.groupby("method", sort=False, observed=True)[repeats].nunique(dropna=False)
        lacking = found[found.to_numpy() < wanted.loc[found.index.get_level_values("method")].to_numpy()]
        if len(lacking):
            image, method = lacking.index[0]
            told = f"{wanted[method]} rows of each image and method, one per {repeats}"
            raise ValueError(f"rows: wanted {told}, got {lacking.iloc[0]} of {image}, {method}")


def _check_method(rows: pd.DataFrame, **methods: str) -> None:
    known = [*rows["method"].unique()]
    for name, method in methods.items():
        if method not in known:
            raise ValueError(f"{name}: wanted one of {', '.join(map(str, known))}, got {in_a_line(method)}")


def summarize_differences(
    rows: pd.DataFrame, columns: Collection[str], reference: str, repeats: str | None = None
) -> pd.DataFrame:
    """Mean differences to one method, image by image, with 95 % intervals, per other method.

    All methods see the same images, so what an image adds to both sides falls out. Images that lack one of the two
    values do not count.

    Args:
        rows: as `summarize`, with the column `image`; one row per image and method.
        columns: as `summarize`.
        reference: the method to subtract.
        repeats: as `summarize`; differences are taken within a repeat.

    Returns:
        As `summarize`, without the reference: positive where the method has more of the column. Beside them
        `column_p`, the p value of no difference by `estimate_and_p`, not corrected for the number of tests.

    Raises:
        TypeError, ValueError: as `summarize`; no row of the reference.
    """
    _check_rows(rows, columns, "image", "method", repeats=repeats)
    _check_method(rows, reference=reference)
    order = [method for method in rows["method"].unique() if method != reference]
    keys = ["image"] if repeats is None else ["image", repeats]
    differences = {}
    for column in columns:
        wide = by_method(rows, keys, column)
        differences[column] = wide.sub(wide[reference], axis=0)[order].stack(future_stack=True)

    def mean_of(group: pd.DataFrame, column: str) -> tuple[Estimate, float]:
        values = _values(group, column, repeats)
        found, p = estimate_and_p(values) if len(values) else (NOTHING, np.nan)
        return within_span(found, column, 1, difference=True), p

    return tabulate(pd.DataFrame(differences).reset_index(), columns, mean_of)


def summarize_groups(rows: pd.DataFrame, columns: Collection[str]) -> pd.DataFrame:
    """Means per method with 95 % intervals, where rows of one group are not independent: groups are resampled.

    A mosaic's four values hang together, and no photo is in two mosaics. So to resample photos is to resample mosaics,
    with their four photos and all that is known of them; likewise pairs of photos.

    Args:
        rows: one row per method and whatever was explained, with the columns `method` and `group`.
        columns: names; multiplied with the factor of their record, if they have one.

    Returns:
        As `summarize_differences`, `column_p` being the p value of a mean of 0. NaN counts as no row.
    """
    _check_columns(rows, columns, "method", "group")

    def mean_of(group: pd.DataFrame, column: str) -> tuple[Estimate, float]:
        found, p = _over_groups(group[column], group["group"])
        return within_span(found, column, 1, difference=False), p

    return tabulate(rows, columns, mean_of)


def difference_over_groups(rows: pd.DataFrame, column: str, method: str, reference: str) -> Estimate:
    """Mean of what a method has more of a column than a reference, image by image, with its 95 % interval over groups.

    Rows and column as `summarize_groups` takes them; each image has one row of both methods; errors as `paired`.
    """
    _check_rows(rows, [column], "image", "method", "group")
    _check_method(rows, method=method, reference=reference)
    wide = by_method(rows, ["group", "image"], column).reset_index("group")
    factor = factors([column])[column]
    found, _ = _over_groups(factor * (wide[method] - wide[reference]), wide["group"])
    return within_span(found, column, factor, difference=True)


def _over_groups(values: pd.Series, groups: pd.Series) -> tuple[Estimate, float]:
    """The mean over all values, NaN left out, with its interval over groups, and its p value."""
    by_group = values.astype(float).reset_index(drop=True).groupby(groups.to_numpy())
    counts = by_group.count().to_numpy(float)  # without NaN
    if not counts.any():
        return NOTHING, np.nan
    sums, counts = by_group.sum().to_numpy()[counts > 0], counts[counts > 0]
    return estimate_and_p(sums, counts, statistic=ratio_of_means)


def clear_after_holm(differences: pd.DataFrame) -> pd.DataFrame:
    """Which differences of a table are not 0: those whose p value, corrected by `holm` for all entries, is below 0.05.

    Args:
        differences: from `summarize_differences`, with `column_p` for each column.

    Returns:
        Index as given; a column of booleans for each that has p values. False where there is no value.
    """
    check_table("differences", differences, [])
    columns = [column for column in map(str, differences) if {f"{column}_low", f"{column}_p"} <= {*differences}]
    p_values = differences[[f"{column}_p" for column in columns]].to_numpy(float)
    corrected = holm(p_values.ravel()).reshape(p_values.shape)
    return pd.DataFrame(corrected < 0.05, differences.index, columns)


def ratio_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """`mean(a) / mean(b)` along an axis, the share of b, not negative, that is left in a: a statistic for `interval`.

    Unbounded; 0 where the mean of b is 0 (**ours**: nothing to keep).
    """
    over, under = a.mean(axis), b.mean(axis)
    return over * (under > 0) / np.where(under > 0, under, 1)


def spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman rank correlation along an axis, ties sharing their mean rank: a statistic for `interval`.

    In [-1,1]; 0 where one side is constant (**ours**: no order, no agreement).
    """
    ranks = (stats.rankdata(values, axis=axis) for values in (a, b))
    x, y = (values - values.mean(axis, keepdims=True) for values in ranks)
    scale = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
    return (x * y).sum(axis) / np.where(scale > 0, scale, 1)


def box_accuracies(rows: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """MaxBoxAcc and MaxBoxAccV2 over all images with a box, per method, from the column `box_hits`.

    In the interval the best threshold is a part of the statistic: each resample of the images chooses its own. For more
    than 2000 images the threshold that is best for all of them is kept, since choosing adds next to nothing there.

    Args:
        rows: of `evaluate` with the score "localization"; of several shards, all of them.
        reference: the method to subtract, as in `summarize_differences`: of the same images, each method at its own
            best threshold. The rows then need the column `image`.

    Returns:
        Index `method` in order of appearance; columns `max_box_acc` and `max_box_acc_v2`, each with `_low` and `_high`,
        percentages, higher is better; see `opticam.metrics.max_box_accuracy`. With a reference, which is left out,
        differences in points, and `_p`.

    Raises:
        TypeError: rows that are not a table.
        ValueError: no image has a box; a column is missing, or `box_hits` damaged; an image has two rows of the same
            method; no row of the reference, or a method has boxes for other images than the reference.
    """
    needed = ["pointing_game", "box_hits"] if reference is None else ["pointing_game", "box_hits", "image"]
    _check_rows(rows, [], "method", *needed)
    with_box = _ordered(rows[rows["pointing_game"].notna()])
    if with_box.empty:
        raise ValueError("rows: wanted at least one image with a box")
    kinds = {"max_box_acc": slice(1), "max_box_acc_v2": slice(1, 4)}

    def accuracy(group: pd.DataFrame, column: str) -> tuple[Estimate, None]:
        values, statistic = _best_share(_hits(group)[:, kinds[column]])
        found = estimate(values, statistic=statistic)
        if found.value in (0, 1):  # all images alike: no resample differs, which says nothing of others
            return Estimate(found.value, *proportion_interval(np.full(len(group), found.value))), None
        return clipped(found, 0, 1), None

    if reference is None:
        return tabulate(with_box, dict.fromkeys(kinds, 100), accuracy)
    _check_method(with_box, reference=reference)
    base = with_box[with_box["method"] == reference]
    its_hits = _hits(base)

    def apart(group: pd.DataFrame, column: str) -> tuple[Estimate, float]:
        if group["image"].tolist() != base["image"].tolist():
            raise ValueError(f"rows: {group['method'].iloc[0]} has boxes for other images than {reference}")
        values, statistic = _best_share(*(hits[:, kinds[column]] for hits in (_hits(group), its_hits)))
        found, p = estimate_and_p(values, statistic=statistic)
        return clipped(found, -1, 1), p

    order = [method for method in rows["method"].unique() if method in set(with_box["method"]) - {reference}]
    return tabulate(with_box[with_box["method"] != reference], dict.fromkeys(kinds, 100), apart).loc[order]


PAPER = {
    "Classification": ["average_drop", "average_gain", "average_increase", "seconds"],
    "Insertion and deletion": ["insertion", "deletion"],
    "Localization": [
        *("official_metric", "localization_error", "soft_f1"),
        *("max_box_acc", "pointing_game", "energy_pointing_game", "saliency_metric"),
    ],
}
"""Title -> columns of the paper's tables, in its order."""


def paper_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables as the paper lays them out: methods down, metrics across; means over images, without intervals.

    Args:
        rows: of `evaluate` with the scores "curves" and "localization"; of several shards, all of them. Rows that were
            skipped do not count.

    Returns:
        Title -> table, index `method` by label, columns by heading with arrow; "seconds" are per image, on the device
        of the rows. A table without values is left out, as that of localization where no image has a box.

    Raises:
        TypeError, ValueError: as `summarize`.
    """
    _check_rows(rows, [], "method")
    rows = _counted(rows)
    known = {"max_box_acc": "BA % ↑", "seconds": "seconds ↓"}
    tables = {}
    for title, columns in PAPER.items():
        present = [name for name in columns if name in rows]
        means = rows.groupby("method", sort=False)[present].mean() * pd.Series(factors(present), dtype=float)
        if "max_box_acc" in columns and "box_hits" in rows and rows["pointing_game"].notna().any():
            with_box = rows[rows["pointing_game"].notna()].groupby("method", sort=False)
            means["max_box_acc"] = pd.Series({name: _max_box_acc(group) for name, group in with_box})
        shown = {name: known.get(name, heading) for name, heading in headings(columns).items()}
        table = means.reindex(columns=columns).rename(columns=shown, index=method_label).dropna(axis=1, how="all")
        if table.size:
            tables[title] = table
    return tables


def _max_box_acc(group: pd.DataFrame) -> float:
    return 100 * max_box_accuracy(torch.from_numpy(_hits(group).sum(0, dtype=int)), len(group))[0]


def _hits(group: pd.DataFrame) -> np.ndarray:
    """The column `box_hits`, (n,4,T)."""
    try:
        bits = np.stack([np.unpackbits(np.frombuffer(packed, np.uint8)) for packed in group["box_hits"]])
        return bits.reshape(len(group), 4, -1)
    except (TypeError, ValueError) as error:
        raise ValueError("rows: wanted box_hits as bytes, as many for each image, got others") from error


def _best_share(*hits: np.ndarray) -> tuple[np.ndarray, Callable[..., np.ndarray]]:
    """The share of hits (n,K,T) at the best of T thresholds, the mean of K shares, each with its own best.

    Of two methods the difference: that of the first minus that of the second. As values (n,) and their statistic, as
    `estimate` takes them.
    """
    number = len(hits[0])
    if number > MANY:
        best = [one.sum(0, dtype=int).argmax(-1)[None, :, None] for one in hits]
        values = [np.take_along_axis(*pair, 2).mean((1, 2)) for pair in zip(hits, best, strict=True)]
        return values[0] - values[1] if values[1:] else values[0], np.mean
    # most thresholds hit the same images: maps have 256 levels
    kept = [[np.unique(kind, axis=1).astype(np.float32) for kind in one.swapaxes(0, 1)] for one in hits]

    def share(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """Of images given by number, (...,m)."""
        flat = drawn.reshape(-1, drawn.shape[-1]).astype(int)
        places = flat + number * np.arange(len(flat))[:, None]
        counts = np.bincount(places.ravel(), minlength=number * len(flat)).reshape(-1, number).astype(np.float32)
        best = [np.mean([(counts @ some).max(1) for some in one], axis=0, dtype=float) for one in kept]
        return (best[0] - best[1] if best[1:] else best[0]).reshape(drawn.shape[:-1]) / drawn.shape[-1]

    return np.arange(number), share
