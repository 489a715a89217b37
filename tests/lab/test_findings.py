import json

import numpy as np
import pytest

from opticam.lab import findings
from opticam.lab.findings import compare, finding, report
from opticam.lab.summary import Estimate, estimate


@pytest.fixture
def committed(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "COMMITTED", tmp_path / "committed")
    monkeypatch.delenv(findings.RENDERING, raising=False)
    return tmp_path / "committed"


def test_a_finding_holds_where_its_whole_interval_does():
    gain = Estimate(5.0, 1.0, 9.0)
    assert finding("gains", gain, above=0).holds
    assert not finding("gains much", gain, above=2).holds
    assert finding("gains little", gain, below=10).holds
    assert not finding("gains less", gain, below=8).holds
    assert not finding("touches", gain, above=1).holds
    assert not finding("unknown", Estimate(5.0, np.nan, np.nan), above=0).holds
    assert finding("a number", 3, above=2, below=4).holds
    assert not finding("a number", 3, above=3).holds
    with pytest.raises(ValueError, match="wanted at least one bound"):
        finding("whatever", 3)


def test_estimates_read_as_people_write_them():
    assert f"{Estimate(1.25, -0.5, 2.75):.1f}" == "1.2 [-0.5, 2.8]"
    assert f"{Estimate(7, 7, 7):.2f}" == "7.00"
    values = np.array([1.0, 2, 6])
    assert estimate(values).value == 3
    assert estimate(np.stack([values, values + 1], 1)).value == 3.5


def test_a_run_reports_what_does_not_hold_and_continues(tmp_path, committed, monkeypatch):
    monkeypatch.setenv(findings.RENDERING, "1")
    report("07_checks", [finding("falls", Estimate(-2, -3, -1), below=0)], {"limit": 6}, tmp_path / "rendered")
    monkeypatch.delenv(findings.RENDERING)
    kept = (committed / "07_checks.json").read_text()
    table = report("07_checks", [finding("falls", Estimate(-1, -3, 1), below=0)], {"limit": 6}, tmp_path)
    (row,) = table.to_dict("records")
    assert row == {
        "finding": "falls",
        "committed": "-2.00 [-3.00, -1.00]",
        "here": "-1.00 [-3.00, 1.00]",
        "agrees": "no",
    }
    assert (committed / "07_checks.json").read_text() == kept
    (row,) = compare(tmp_path).to_dict("records")
    assert (row["page"], row["committed"], row["agrees"]) == ("07_checks", "-2.00 [-3.00, -1.00]", "no")


def test_values_of_other_parameters_are_not_compared(tmp_path, committed, monkeypatch):
    monkeypatch.setenv(findings.RENDERING, "1")
    report("page", [finding("falls", -2, below=0)], {"limit": 6}, tmp_path / "rendered")
    monkeypatch.delenv(findings.RENDERING)
    table = report("page", [finding("falls", -1, below=0)], {"limit": 7}, tmp_path)
    assert table.loc[0].tolist() == ["falls", "-", "-1.00", "yes"]


def test_a_render_is_strict(tmp_path, committed, monkeypatch):
    monkeypatch.setenv(findings.RENDERING, "1")
    with pytest.raises(AssertionError, match=r"does not hold: rises, too$"):
        report("page", [finding("falls", -2, below=0), finding("rises, too", -2, above=0)], {}, tmp_path)
    assert not committed.exists()
    report("page", [finding("falls", -2, below=0)], {}, tmp_path)
    assert [entry["holds"] for entry in json.loads((committed / "page.json").read_text())["findings"]] == [True]


def test_what_is_not_known_does_not_hold(tmp_path, committed):
    unknown = Estimate(np.float64(-2), np.nan, np.nan)
    table = report("page", [finding("falls", unknown, below=0)], {}, tmp_path)
    assert table.loc[0].tolist() == ["falls", "-", "-2.00 [nan, nan]", "no"]
    assert "NaN" not in (tmp_path / "findings" / "page.json").read_text()  # which JSON does not have


def test_nothing_to_compare(tmp_path, committed):
    assert compare(tmp_path).empty
