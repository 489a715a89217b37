"""What the files beside the package promise."""

import html
import json
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache, partial
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import densenet121, resnet18

import opticam
from opticam import METHODS, METRICS
from opticam.jobs.batch import read_batches
from opticam.jobs.runner import list_notebooks
from opticam.lab.files import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LIBRARIES = {"grad-cam", "torchcam", "hf"}  # extras for those who have them anyway, at any version
README = (REPOSITORY / "README.md").read_text()


def tracked(pattern):
    found = subprocess.run(["git", "ls-files", pattern], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [REPOSITORY / name for name in found.stdout.splitlines() if (REPOSITORY / name).exists()]


@cache
def printed(notebook):
    """What a committed notebook shows as text."""
    cells = nbformat.read(REPOSITORY / "notebooks" / notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def test_environment_agrees_with_pyproject():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in packages
    (install,) = (entry for entry in pip if entry.startswith("-e "))
    extras = re.fullmatch(r"-e \.\[(.+)\]", install).group(1).split(",")
    others = set(PROJECT["optional-dependencies"]) - set(extras)
    assert set(extras) < set(PROJECT["optional-dependencies"])
    assert others <= {"docs", *LIBRARIES}, "make docs installs its own"
    assert f"'.[{','.join(extras)}]'" in (REPOSITORY / "Makefile").read_text()
    versions = [entry for entry in [*packages, *pip] if re.search(r"\d", entry) and not entry.startswith("python>=")]
    assert not versions, "versions live in pyproject.toml"


def test_constraints_pin_every_dependency_by_name_and_version_only():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    named = [
        *PROJECT["dependencies"],
        *(
            entry
            for name, extra in PROJECT["optional-dependencies"].items()
            if name not in LIBRARIES
            for entry in extra
        ),
    ]
    normal = {name.lower().replace("_", "-") for name in pins}
    assert {re.split(r"[><=\[]", entry)[0] for entry in named} - {PROJECT["name"]} <= normal


def test_one_version():
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    newest = re.search(r"^## ([\d.]+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M).group(1)
    assert newest == PROJECT["version"]


def test_the_readme_is_short():
    assert len(README.split()) <= 900


@pytest.mark.slow
def test_the_code_of_the_readme_explains_a_network(capsys):
    (code,) = re.findall(r"```python\n(.+?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    torch.manual_seed(0)
    names = {"network": resnet18().eval(), "images": torch.rand(2, 3, 64, 64)}
    exec(code, names)  # noqa: S102  (our own page)
    model, images, class_idx, saliency = (names[word] for word in ("model", "images", "class_idx", "saliency"))
    start = METHODS["equal_weights"](model, images, class_idx)
    logits = [model(images * S).gather(1, class_idx[:, None]) for S in (saliency, start)]
    assert (logits[0] > logits[1]).all(), "better than before the first step"
    assert json.loads(capsys.readouterr().out) == opticam.average_gain(names["p"], names["o"]).tolist()


def test_the_table_of_the_readme_is_from_notebook_03():
    (table,) = re.findall(r"<!-- rows printed by notebooks/03_faithfulness -->\n(.+?)\n\n", README, re.S)
    rows = table.splitlines()
    assert 4 <= len(rows) <= 6, "two to four rows"
    tables = printed("03_faithfulness.ipynb").split("\n\n")
    assert any(set(rows) <= set(whole.splitlines()) for whole in tables)


def test_the_numbers_of_the_findings_are_on_the_pages_they_link_to():
    section = README.partition("\n## Three findings")[2].partition("\n## ")[0]
    findings = re.findall(r"^\d\. .+?(?=^\S|^$)", section, re.M | re.S)
    assert len(findings) == 3
    for finding in findings:
        pages = "".join(printed(name) for name in re.findall(r"\(notebooks/(.+?\.ipynb)\)", finding))
        for number in re.findall(r"\d+\.\d+", finding):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", pages), number


def test_commands_of_the_pages_are_targets_of_make():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    pages = "".join(page.read_text() for page in tracked("*.md"))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, re.M)) <= targets


def test_the_page_of_methods_names_each_of_them_once():
    page = (REPOSITORY / "opticam" / "methods" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.M)) == sorted(METHODS)


def test_the_page_of_metrics_names_them():
    page = (REPOSITORY / "opticam" / "metrics" / "README.md").read_text()
    rows = " ".join(re.findall(r"^\| (`.+?) \|", page, re.M))
    assert set(METRICS) <= set(re.findall(r"`(\w+)`", rows)) <= set(dir(opticam.metrics))


def test_the_page_of_batches_names_each_of_them():
    page = (REPOSITORY / "notebooks" / "batches" / "README.md").read_text()
    batches = {path.stem for path in tracked("notebooks/batches/*.yaml")}
    assert set(re.findall(r"^\| \[`(\w+)`\]", page, re.M)) == batches
    assert all(part.runs for name in batches for part in read_batches(name))


def test_the_schedules_of_the_benchmarks_page_are_the_measured_ones():
    page = (REPOSITORY / "benchmarks" / "README.md").read_text()
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "schedules.json").read_text())["rows"]
    table = re.search(r"<!-- benchmarks/results/schedules.json -->\n(.+?)\n\n", page, re.S).group(1)
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert shown == [
        [row["schedule"], str(row["passes"]), f"{row['masked logit']:.2f}"]
        + [f"{row[column]:.{digits}f}" for column, digits in (("AG %", 1), ("AI %", 1), ("AD %", 2))]
        for row in measured
    ]


def test_the_speeds_of_the_benchmarks_page_are_the_measured_ones():
    page = (REPOSITORY / "benchmarks" / "README.md").read_text()
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "published.json").read_text())["rows"]
    table = re.search(r"<!-- benchmarks/results/published.json -->\n(.+?)\n\n", page, re.S).group(1)
    shown = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    digits = {
        "published / ours": 1,
        "published / ours, bfloat16": 1,
        "ours / floor": 2,
        "100 published steps / fast": 1,
    }
    assert shown == [[f"{row[column]:.{number}f}" for column, number in digits.items()] for row in measured]


@pytest.mark.parametrize("path", tracked("notebooks/batches/*.yaml"), ids=lambda path: path.stem)
def test_a_batch_says_how_many_images(path):
    """Without `limit` a page takes the few photos that it teaches on."""
    for part in yaml.safe_load_all(path.read_text()):
        assert "limit" in {**part.get("parameters", {}), **part.get("grid", {})}


def markdown(page):
    if page.suffix == ".md":
        return page.read_text()
    cells = nbformat.read(page, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(page):
    """The anchors of the headings of a page, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.+?^```", "", markdown(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*tracked("*.md"), *tracked("*.ipynb")], ids=lambda page: page.name)
def test_links_resolve(page):
    text = re.sub(r"`[^`\n]+`", "", re.sub(r"^```.+?^```", "", markdown(page), flags=re.M | re.S))
    for link in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)[)\"]", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.is_file(), f"{page.name} links to {link}; the site has no folders"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {link}"


def test_links_of_the_site_resolve():
    pages = {page: page.read_text() for page in (REPOSITORY / "docs" / "_build" / "html").rglob("*.html")}
    if not pages:
        pytest.skip("no site here; make docs builds it")
    places = {page: {*re.findall(r'\b(?:id|name)="([^"]+)"', text)} for page, text in pages.items()}
    for page, text in pages.items():
        for link in {*re.findall(r'(?:href|src)="([^"]+)"', text)}:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            place = (page.parent / target.partition("?")[0]).resolve() if target else page
            assert place.is_file(), f"{page.name} links to {link}"
            assert not anchor or place.suffix != ".html" or anchor in places[place], f"{page.name} links to {link}"


def test_the_site_has_every_page():
    pages = runpy.run_path(str(REPOSITORY / "docs" / "conf.py"))["PAGES"]
    on_site = {f"{name}.md" for names in pages.values() for name in names} | {"README.md"}
    assert on_site == {page.relative_to(REPOSITORY).as_posix() for page in tracked("*.md") if page.name != "table.md"}


def test_the_map_of_modules_names_each_of_them():
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    modules = [path.name for path in tracked("opticam/*.py") if not path.name.startswith("_")]
    assert [name for name in modules if not re.search(rf"[/`]{name}`", page)] == []


def test_the_gallery_of_notebooks_repeats_their_answers():
    page = (REPOSITORY / "notebooks" / "README.md").read_text()
    for path in list_notebooks():
        (row,) = re.findall(rf"^\| \[{path.stem[:2]}\]\({re.escape(path.name)}\) \|.+", page, re.M)
        question, answer = re.search(r"\*\*(.+?)\*\*(.+?)\|", row).groups()
        first = nbformat.read(path, as_version=4).cells[0].source
        assert first.startswith(f"# {question}\n")
        assert set(re.findall(r"\d+\.\d+", answer)) <= set(re.findall(r"\d+\.\d+", first))


@pytest.mark.slow
def test_every_notebook_and_batch_of_the_map_of_the_paper_exists():
    page = (REPOSITORY / "notebooks" / "README.md").read_text()
    rows = re.findall(r"^\|.+\|$", page.partition("## The map of the paper")[2], re.M)[2:]
    states = [row.split("|")[4].strip() for row in rows]
    assert {state.split(",")[0] for state in states} == {"done", "small n", "not run here"}
    for number in re.findall(r"opticam run (\d\d)", "".join(rows)):
        assert any(path.name.startswith(number) for path in list_notebooks())
    for name in re.findall(r"opticam batch (\w+)", "".join(rows)):
        assert read_batches(name)[0].runs


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


@pytest.mark.slow
@pytest.mark.parametrize("title", ["A network with one logit", "A network with fourteen labels"])
def test_the_medical_code_of_the_data_page_runs_on_files_of_that_form(title, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name in ("PNEUMONIA/1.png", "NORMAL/1.png"):
        path = tmp_path / "data" / "xray" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(noise.integers(0, 4096, (240, 230)).astype(np.uint16)).save(path)
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=1).state_dict(), "data/xray.pt")
    present = torch.full((14,), -9.0).index_fill(0, torch.tensor([3, 8]), 9.0)
    torch.save(densenet121(num_classes=14).state_dict() | {"classifier.bias": present}, "data/chest14.pt")
    monkeypatch.setitem(METHODS, "opti_cam", partial(METHODS["opti_cam"], num_steps=2))
    section = (REPOSITORY / "data" / "README.md").read_text().split(f"### {title}")[1]
    exec(re.search(r"```python\n(.+?)```", section, re.S)[1], {})  # noqa: S102
    assert "masked_prob" in capsys.readouterr().out
