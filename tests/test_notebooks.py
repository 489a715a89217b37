"""The notebooks: the form that CONTRIBUTING.md describes, honest numbers, and every one runs at tiny parameters."""

import ast
import json
import os
import re
import subprocess
import sys
from math import inf
from statistics import median

import nbformat
import papermill
import pytest
from filelock import FileLock

from opticam.jobs.runner import evidence_part, list_notebooks, notebook_parameters, run_notebook
from opticam.jobs.side_by_side import notebook_inputs
from opticam.lab.files import REPOSITORY
from opticam.lab.findings import COMMITTED, Finding
from opticam.lab.summary import Estimate

TINY = {
    "00": {"num_steps": 2},
    "01": {"num_steps": 2},
    "02": {"num_steps": 2, "limit": 2},
    "03": {"num_steps": 2, "limit": 2, "methods": ["fake_cam", "equal_weights", "grad_cam", "opti_cam"]},
    "04": {},
    "05": {"limit": 1, "layers": ["blocks.2", "blocks.4+bn2"]},
    "06": {"train_steps": 10, "num_steps": 2, "limit": 3},
    "07": {"num_steps": 1, "limit": 2, "explained": ["classifier", "conv_stem"]},
    "08": {"limit": 2, "judges": ["efficientnet_lite1"], "methods": ["grad_cam"]},
    "09": {},
    "10": {"limit": 2, "judges": ["efficientnet_lite1"], "methods": ["grad_cam", "opti_cam:fast"]},
    "11": {"methods": ["equal_weights", "grad_cam"], "shard": "1/3"},
    "12": {"methods": ["equal_weights", "grad_cam"], "shard": "0/4"},
}
pytestmark = pytest.mark.parametrize("path", list_notebooks(), ids=lambda path: path.stem)


def text_of(cell):
    """Source of the outputs that a person reads as text."""
    outputs = cell.get("outputs", [])
    data = [output.get("data", {}) for output in outputs]
    return "\n".join(
        [output.get("text", "") for output in outputs]
        + [shown.get("text/markdown", shown.get("text/plain", "")) for shown in data]
    )


def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, second = notebook.cells[:2]
    assert re.match(r"# .+\?\n\n\*\*.+\*\*\n\n.+\n\nReads .+ Writes .+ Time: ", first.source), (
        "question, answer, reads, writes, time"
    )
    assert second.metadata.get("tags") == ["parameters"]
    names = [line.split(":")[0] for line in second.source.splitlines()]
    assert len(names) <= 10
    read = notebook_parameters(path)
    assert list(read) == names
    assert ("model" in read) == ("checkpoint" in read)
    assert all(entry["help"] for entry in read.values())
    for name, seen in papermill.inspect_notebook(path).items():
        default = ast.literal_eval(seen["default"])
        assert read.pop(name) == {"type": seen["inferred_type_name"], "default": default, "help": seen["help"]}
    assert not read, "papermill must see every parameter"
    assert notebook.cells[-1].source.startswith("## What we learned")
    assert any(f'report("{path.stem}", findings' in cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_the_committed_findings_hold_and_are_on_the_page(path):
    """A finding that holds nowhere else than on the page would be worth nothing; see benchmarks/portability.py."""
    committed = json.loads((COMMITTED / f"{path.stem}.json").read_text())
    defaults = {name: entry["default"] for name, entry in notebook_parameters(path).items()}
    asked = {name: value for name, value in committed["parameters"].items() if name in defaults}
    assert asked == {name: defaults[name] for name in asked}, "committed by another run than a render"
    printed = "\n".join(text_of(cell) for cell in nbformat.read(path, as_version=4).cells)
    assert committed["findings"]
    for entry in committed["findings"]:
        estimate = Estimate(*(entry[name] for name in Estimate._fields))
        assert Finding(entry["finding"], estimate, entry.get("above", -inf), entry.get("below", inf)).holds
        row = re.search(rf"^\| {re.escape(entry['finding'])} +\|([^|]+)\|([^|]+)\| yes +\|$", printed, re.M)
        for shown in row.groups():
            values = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", shown)]
            expected = [estimate.value] if len(set(estimate)) == 1 else list(estimate)
            assert values == pytest.approx(expected, abs=0.0051)


def test_says_what_it_reads(path):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert notebook_inputs(path) == set(re.findall(r"read_\w+\(f\"\{results\}/(\d\d)_", code))


def test_no_def_url_path_or_silenced_warning(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        assert not any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) for node in ast.walk(tree)
        )
        assert not re.search(r"https?://|filterwarnings|sys\.path|[\"'](/|~|[A-Z]:\\)", cell.source)
        statements = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert sum(node.end_lineno - node.lineno + 1 for node in statements) <= 16


def test_cells_are_short(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lengths = [len(cell.source.splitlines()) for cell in code]
    assert median(lengths) <= 6
    assert max(lengths) <= 20


def test_committed_as_rendered(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(len(notebook.cells))]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in code:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
    kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert kinds & {"image/jpeg", "image/png"}


def test_numbers_of_the_answer_are_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    answer = re.search(r"\*\*(.+)\*\*", notebook.cells[0].source).group(1)
    numbers = re.findall(r"\d+\.\d+", answer)
    printed = "\n".join(text_of(cell) for cell in notebook.cells)
    assert numbers
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", printed), f"{number} is printed nowhere"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Runs a notebook at tiny parameters after those whose results it reads, each once; the folder of all of them."""
    folder = tmp_path_factory.getbasetemp() / "notebooks"
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parents[1] / "notebooks"  # one for all workers
    folder.mkdir(exist_ok=True)

    def run(number):
        for other in sorted(notebook_inputs(number)):
            run(other)
        output = folder / f"{number}.ipynb"
        with FileLock(folder / f"{number}.lock"):
            if not output.exists():
                places = {"figures": folder / number, "results": folder / "results"}
                given = {name: str(place) for name, place in places.items() if name in notebook_parameters(number)}
                run_notebook(number, output, {**TINY.get(number, {}), **given})
        return folder

    return run


@pytest.mark.slow
def test_runs_at_tiny_parameters_and_concludes_the_same(path, tiny_run):
    """What rests on the photos differs; what rests on `data/evidence` is computed again: answer, README, findings."""
    number = path.stem[:2]
    absent = {number, *notebook_inputs(path)} - {known.stem[:2] for known in list_notebooks()}
    if absent:
        pytest.skip(f"reads the results of notebook {', '.join(sorted(absent))}, which is not here")
    folder = tiny_run(number)
    assert {figure.suffix for figure in (folder / number).iterdir()} & {".jpg", ".png"}
    cells = nbformat.read(folder / f"{number}.ipynb", as_version=4).cells
    concluding = [cell for cell in cells if "evidence" in cell.metadata.get("tags", [])]
    if not concluding:
        return
    printed = "\n".join(text_of(cell) for cell in concluding)
    answer = re.search(r"\*\*(.+)\*\*", cells[0].source).group(1)
    for value in re.findall(r"\d+\.\d+", answer):
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", printed), value
    readme = (REPOSITORY / "README.md").read_text()
    for table in re.findall(rf"<!-- rows printed by notebooks/{path.stem} -->\n(.+?)\n\n", readme, re.S):
        assert any(set(table.splitlines()) <= set(shown.splitlines()) for shown in printed.split("\n\n"))
    known = json.loads((COMMITTED / f"{path.stem}.json").read_text())["findings"]
    here = json.loads((folder / "results" / "findings" / f"{path.stem}.json").read_text())["findings"]
    assert [entry["finding"] for entry in here] == [entry["finding"] for entry in known]
    pairs = [pair for pair in zip(here, known, strict=True) if not pair[0]["finding"].startswith("these photos: ")]
    assert pairs
    for entry, expected in pairs:
        assert entry["holds"]
        assert entry == expected | {name: pytest.approx(expected[name], rel=1e-6) for name in Estimate._fields}


def test_what_is_concluded_from_evidence_needs_no_other_cell(path, tmp_path):
    part = evidence_part(path, tmp_path)
    if part is None:
        pytest.skip("concludes from its own run")
    code = "\n".join(cell.source for cell in nbformat.read(part, as_version=4).cells if cell.cell_type == "code")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--stdin-filename", "part.py"]
    done = subprocess.run([*command, "-"], input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
