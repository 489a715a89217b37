"""What the files beside the package promise."""

import json
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml

from opticam import METHODS
from opticam.jobs.runner import list_notebooks
from opticam.lab.files import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_environment_agrees_with_pyproject():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in packages
    (install,) = (entry for entry in pip if entry.startswith("-e "))
    extras = re.fullmatch(r"-e \.\[(.+)\]", install).group(1).split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])
    assert f"'.[{','.join(extras)}]'" in (REPOSITORY / "Makefile").read_text()
    versions = [entry for entry in [*packages, *pip] if re.search(r"\d", entry) and not entry.startswith("python>=")]
    assert not versions, "versions live in pyproject.toml"


def test_constraints_pin_every_dependency_by_name_and_version_only():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    named = [
        *PROJECT["dependencies"],
        *(entry for extra in PROJECT["optional-dependencies"].values() for entry in extra),
    ]
    normal = {name.lower().replace("_", "-") for name in pins}
    assert {re.split(r"[><=\[]", entry)[0] for entry in named} - {PROJECT["name"]} <= normal


def test_the_tables_of_the_readme_are_the_output_of_notebook_03():
    readme = (REPOSITORY / "README.md").read_text()
    tables = re.findall(r"<!-- printed by notebooks/03_faithfulness -->\n(.+?)\n\n", readme, re.S)
    notebook = nbformat.read(REPOSITORY / "notebooks" / "03_faithfulness.ipynb", as_version=4)
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "\n".join(data.get("text/markdown", "") for data in outputs)
    assert len(tables) == 2
    for table in tables:
        assert table.count("\n") >= 4
        assert table in printed


def test_the_page_of_methods_names_each_of_them_once():
    page = (REPOSITORY / "opticam" / "methods" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.M)) == sorted(METHODS)


def test_the_schedules_of_the_readme_are_the_measured_ones():
    readme = (REPOSITORY / "README.md").read_text()
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "schedules.json").read_text())["rows"]
    table = re.search(r"<!-- benchmarks/results/schedules.json -->\n(.+?)\n\n", readme, re.S).group(1)
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert told == [
        [row["schedule"], str(row["passes"]), f"{row['masked logit']:.2f}"]
        + [f"{row[column]:.{digits}f}" for column, digits in (("AG %", 1), ("AI %", 1), ("AD %", 2))]
        for row in measured
    ]


def test_links_in_markdown_resolve():
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for page in (REPOSITORY / name for name in tracked.stdout.split()):
        for target in re.findall(r"(?:\]\(|src=\")([^)#\"]+)[)\"]", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_gallery_of_notebooks_repeats_their_answers():
    page = (REPOSITORY / "notebooks" / "README.md").read_text()
    for path in list_notebooks():
        (row,) = re.findall(rf"^\| \[{path.stem[:2]}\]\({re.escape(path.name)}\) \|.+", page, re.M)
        question, answer = re.search(r"\*\*(.+?)\*\*(.+?)\|", row).groups()
        first = nbformat.read(path, as_version=4).cells[0].source
        assert first.startswith(f"# {question}\n")
        assert set(re.findall(r"\d+\.\d+", answer)) <= set(re.findall(r"\d+\.\d+", first))


@pytest.mark.slow
def test_import_needs_no_network_and_leaves_random_state_alone():
    program = (
        "import socket, random, torch\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "before = torch.get_rng_state(), random.getstate()\n"
        "import opticam, opticam.cli, opticam.lab.plotting, opticam.lab.results\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY / "tests")


def test_references_share_no_code_with_the_package():
    assert "import opticam" not in (REPOSITORY / "tests" / "references.py").read_text().split('"""', 2)[2]
