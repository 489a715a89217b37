"""Findings: what a page claims about its numbers, in words, beside what another machine finds.

Exact facts are asserts. A finding is an estimate that lies, with its interval, on one side of a bound. Where one does
not hold, the page says so and continues. Only a render, which commits the page, stops there.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from opticam.lab.files import RENDERING, REPOSITORY, replacing
from opticam.lab.summary import Estimate

COMMITTED = REPOSITORY / "data" / "findings"


class Finding(NamedTuple):
    """A claim and the estimate it rests on.

    Attributes:
        statement: what is claimed, in words, with the unit.
        estimate: value, low, high; all three the same where there is no interval.
        above: what the interval lies above, -inf where nothing is claimed.
        below: what it lies below, inf where nothing is claimed.
    """

    statement: str
    estimate: Estimate
    above: float
    below: float

    @property
    def holds(self) -> bool:
        """Whether the whole interval lies between the bounds; no where a number is missing."""
        return bool(self.above < self.estimate.low and self.estimate.high < self.below)


def finding(
    statement: str, estimate: Estimate | float, *, above: float = -math.inf, below: float = math.inf
) -> Finding:
    """A `Finding` of an estimate, from `summary.estimate`, or of a number, which needs no interval.

    Raises:
        ValueError: no bound is given; every estimate would meet the claim.
    """
    if above == -math.inf and below == math.inf:
        raise ValueError("above, below: wanted at least one bound")
    value = Estimate(*map(float, estimate if isinstance(estimate, Estimate) else [estimate] * 3))
    return Finding(statement, value, above, below)


def report(page: str, findings: Sequence[Finding], parameters: Mapping[str, Any], results: str | Path) -> pd.DataFrame:
    """Write the findings of a page for `compare`, and show them beside the committed ones.

    Args:
        page: name of the notebook.
        findings: what it claims.
        parameters: all parameters that they depend on; committed values for other parameters are not shown.
        results: folder of the run's tables; the file is `findings/PAGE.json` inside.

    Returns:
        One row per finding: the statement, its committed value, the value here, and whether it holds here.

    Raises:
        AssertionError: a finding does not hold in a render, whose values are committed.
    """
    entries = [
        {
            "finding": f.statement,
            **{name: number if math.isfinite(number) else None for name, number in f.estimate._asdict().items()},
            **{name: bound for name, bound in (("above", f.above), ("below", f.below)) if math.isfinite(bound)},
            "holds": f.holds,
        }
        for f in findings
    ]
    text = json.dumps({"parameters": dict(parameters), "findings": entries}, indent=1) + "\n"
    failed = [f.statement for f in findings if not f.holds]
    places = [Path(results) / "findings"]
    if os.environ.get(RENDERING):
        if failed:
            raise AssertionError(f"does not hold: {'; '.join(failed)}")
        places.append(COMMITTED)
    for folder in places:
        with replacing(folder / f"{page}.json") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return _compared(COMMITTED / f"{page}.json", places[0] / f"{page}.json")


def compare(results: str | Path, since: float = 0.0) -> pd.DataFrame:
    """The findings of a run beside the committed ones; nothing is computed again.

    Args:
        results: folder of the run's tables.
        since: findings written before this time are left out; in seconds, as from `time.time`.

    Returns:
        As `report`, with the page before each row; pages that the run did not reach are left out.
    """
    pages = sorted(page for page in (Path(results) / "findings").glob("*.json") if page.stat().st_mtime >= since)
    tables = [_compared(COMMITTED / page.name, page).assign(page=page.stem) for page in pages]
    columns = ["page", "finding", "committed", "here", "agrees"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _compared(committed: Path, here: Path) -> pd.DataFrame:
    own = json.loads(here.read_text(encoding="utf-8"))
    known = json.loads(committed.read_text(encoding="utf-8")) if committed.is_file() else {}
    same = known.get("parameters") == own["parameters"]
    told = {entry["finding"]: _shown(entry) for entry in known["findings"]} if same else {}
    found = [entry["finding"] for entry in own["findings"]]
    columns = {
        "finding": found,
        "committed": [told.get(statement, "-") for statement in found],
        "here": [_shown(entry) for entry in own["findings"]],
        "agrees": ["yes" if entry["holds"] else "no" for entry in own["findings"]],
    }
    return pd.DataFrame(columns)


def _shown(entry: Mapping[str, float | None]) -> str:
    numbers = (entry[name] for name in Estimate._fields)
    return f"{Estimate(*(math.nan if number is None else number for number in numbers)):.2f}"
