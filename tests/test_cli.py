import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from opticam import METHODS, SCHEDULES, cli, networks, wrap
from opticam.lab import findings
from opticam.lab.datasets import demo
from opticam.lab.findings import finding, report
from opticam.lab.summary import Estimate

PHOTO = str(demo().paths[17])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Opti-CAM with two steps."""
    whole = METHODS["opti_cam"]
    short = replace(whole, function=lambda *args, **options: whole(*args, **options | {"num_steps": 2}))
    monkeypatch.setitem(METHODS, "opti_cam", short)


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert re.fullmatch(r"opticam \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.slow
def test_explain_prints_the_classes_and_writes_a_picture(quick, capsys, folder):
    assert cli.main(["explain", PHOTO]) == 0
    printed = capsys.readouterr().out
    assert "50.8 %  bald eagle  (22)" in printed
    assert "Opti-CAM for bald eagle (22, the predicted class)" in printed
    assert "probability 50.8 % -> " in printed
    assert len([line for line in printed.splitlines() if line.startswith("  ") and line.endswith(")")]) == 5
    picture = Image.open(folder / "imagenet_17_22.opti_cam.png")
    assert picture.width > 2 * picture.height


@pytest.mark.slow
def test_explain_another_class_by_name_with_another_method(capsys, folder):
    assert cli.main(["explain", PHOTO, "--class", "Kite", "--method", "grad_cam", "--output", "deep/out.pdf"]) == 0
    assert "Grad-CAM for kite (21)" in capsys.readouterr().out
    assert (folder / "deep" / "out.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "head"), [(14, "sigmoid"), (1, "softmax")])
def test_explain_a_network_of_another_head(capsys, monkeypatch, outputs, head):
    body = [torch.nn.Conv2d(3, 4, 9, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    fc = torch.nn.Linear(4, outputs)
    torch.nn.init.zeros_(fc.weight)
    fc.bias.data = torch.arange(float(outputs)) + 1
    names = [f"finding {index}" for index in range(outputs)]
    model = wrap(torch.nn.Sequential(*body, fc), "1", head=head, class_names=names)
    monkeypatch.setattr(networks, "load_model", lambda *_, **__: model)
    assert cli.main(["explain", PHOTO, "--method", "fake_cam", "--class", "0"]) == 0
    printed = capsys.readouterr().out  # 1/(1 + exp(-1)) = 73.1 %
    assert " 73.1 %  finding 0  (0)" in printed or outputs > 5
    assert (" 26.9 %  not finding 0  (1)" in printed) == (outputs == 1)
    assert "Fake-CAM for finding 0 (0)\n  probability 73.1 % -> 73.1 % when masked, logit 1.00 -> 1.00" in printed
    monkeypatch.setattr(model, "to_logits", lambda y: [y.tolist()])
    assert cli.main(["explain", PHOTO, "--method", "fake_cam"]) == 2
    assert "opticam: model: wanted a network that returns logits, got a list" in capsys.readouterr().err


@pytest.mark.slow
def test_explain_by_a_schedule(monkeypatch, folder, capsys):
    given = []
    quick = METHODS["equal_weights"]
    spy = replace(quick, function=lambda *args, **options: given.append(options) or quick(*args))
    monkeypatch.setitem(METHODS, "opti_cam", spy)
    assert cli.main(["explain", PHOTO]) == 0
    assert cli.main(["explain", PHOTO, "--schedule", "fast"]) == 0
    assert cli.main(["explain", PHOTO, "--schedule", "robust", "--class", "bald eagle"]) == 0
    assert given == [{"layer": None}, *({"layer": None, **SCHEDULES[name]} for name in ("fast", "robust"))]
    written = {path.name.removeprefix("imagenet_17_22.") for path in folder.glob("*.png")}
    assert written == {"opti_cam.png", "opti_cam-fast.png", "opti_cam-robust-bald-eagle.png"}
    labels = re.findall(r"^(Equal weights.*) for ", capsys.readouterr().out, re.M)
    assert labels == ["Equal weights", "Equal weights, fast", "Equal weights, robust"]


@pytest.mark.slow
def test_explain_shows_in_a_terminal_that_it_works(quick, capsys, monkeypatch):
    assert cli.main(["explain", PHOTO]) == 0
    assert capsys.readouterr().err == ""
    shown = []
    monkeypatch.setattr(cli, "_SECONDS", 0.01)
    monkeypatch.setattr(cli.Screen, "show", lambda screen, lines: shown.append(lines))
    assert cli.main(["explain", PHOTO, "--schedule", "fast"]) == 0
    assert shown[-1] == [], "nothing stays"
    lines = [line for lines in shown for line in lines]
    assert lines[0].startswith("loading, ")
    assert len({line for line in lines if re.fullmatch(r"Opti-CAM, fast, \d+ of 20 passes, \d+ s", line)}) > 1
    assert lines[-1].startswith("drawing, ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_memory_is_kept_by_a_process_of_the_command_line(folder):
    program = """
import resource, sys
from opticam import cli
if sys.argv[1:]:
    cli._keep_memory()
before = [bytearray(2**27) and resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(3)]
print(before[2] - before[1])
"""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    fetched = [
        int(subprocess.run([sys.executable, "-c", program, *word], env=bare, capture_output=True, check=True).stdout)
        for word in ([], ["keep"])
    ]
    assert 10 * fetched[1] < fetched[0], "pages fetched again from the system"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png")]
)
def test_explain_any_kind_of_photo(mode, suffix, capsys, folder):
    photo = Image.open(PHOTO)
    gray = np.asarray(photo.convert("L"))
    photo = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else photo.convert(mode)
    photo.save(f"photo.{suffix}")
    assert cli.main(["explain", f"photo.{suffix}", "--method", "grad_cam"]) == 0
    if mode != "1":
        assert "bald eagle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.jpg"], "image: no file at nothing.jpg"),
        (["text.jpg"], "text.jpg is not an image that can be read"),
        ([PHOTO, "--class", "1000"], "class: wanted an index in 0..999, got 1000"),
        ([PHOTO, "--class", "-1"], "class: wanted an index in 0..999, got -1"),
        ([PHOTO, "--class", "eagel"], "class: wanted an index in 0..999 or a class name, got 'eagel'"),
        ([PHOTO, "--model", "resnet51"], "model: wanted one of efficientnet_lite0"),
        (
            [PHOTO, "--method", "gradcam"],
            "opti_cam, opti_cam:NAME, captum:NAME, grad-cam:NAME, torchcam:NAME, got 'gradcam'",
        ),
        ([PHOTO, "--method", "grad_cam", "--layer", "layer4"], "layer: no 'layer4' in EfficientNet"),
        ([PHOTO, "--method", "grad_cam", "--layer", "classifier"], "layer: wanted feature maps (B,K,h,w)"),
        ([PHOTO, "--device", "gpu"], "device: wanted one that works here"),
        ([PHOTO, "--output", "out.txt"], "output: wanted a name ending in .png or .pdf or .svg, got 'out.txt'"),
        ([PHOTO, "--output", "text.jpg/out.png"], "output: cannot write in 'text.jpg'"),
        ([PHOTO, "--output", "folder.png"], "output: 'folder.png' is a folder"),
        ([PHOTO, "--output", ""], "output: wanted a name ending in"),
        ([PHOTO, "--output", 252 * "x" + ".png"], "output: wanted a shorter name for the file, of at most 230 bytes"),
        ([PHOTO, "--schedule", "slow"], "schedule: wanted one of paper, fast, robust, got 'slow'"),
        ([PHOTO, "--schedule", "fast", "--method", "rise"], "schedule: only the method opti_cam has one, got rise"),
        (["photo.png", "--output", "photo.png"], "output: photo.png is the photo itself"),
        ([PHOTO, "--method", "grad_cam", "--layer", ""], "layer: no '' in EfficientNet; wanted a dotted name such as"),
    ],
)
def test_bad_input_ends_in_one_sentence(words, sentence, capsys, folder):
    (folder / "text.jpg").write_text("hello")
    (folder / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save("photo.png")
    assert cli.main(["explain", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("opticam: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "99"], "notebook: wanted one of"),
        (["run", "03", "-p", "limt=3"], "parameter limt: unknown to this notebook; wanted one of model"),
        (["run", "03", "-p", "limit=three"], "parameter limit: wanted a whole number, got 'three'"),
        (["run", "03", "-p", "limit"], "parameter: wanted name=value, got 'limit'"),
        (["run", "-p", "limit=3"], "parameter: wanted exactly one notebook"),
        (["run", "01", "02", "-o", "x.ipynb"], "output: wanted exactly one notebook"),
        (["render", "nothing.ipynb"], "notebook: wanted one of"),
    ],
)
def test_bad_runs_end_in_one_sentence(words, sentence, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_an_interrupt_is_one_sentence(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "find_notebook", interrupt)
    assert cli.main(["run", "03"]) == 130
    assert capsys.readouterr().err == "opticam: interrupted\n"


def test_a_notebook_that_is_named_twice_runs_once_and_two_of_one_name_are_refused(monkeypatch, folder, capsys):
    runs = []
    monkeypatch.setattr(cli, "run_notebooks", lambda outputs, given, jobs: runs.append(list(outputs)))
    page = cli.find_notebook("03")
    assert cli.main(["run", "03", str(page)]) == 0
    assert runs == [[page]]
    (folder / page.name).write_text(page.read_text())
    assert cli.main(["run", "03", str(folder / page.name)]) == 2
    assert "notebooks: two of one name would write one file" in capsys.readouterr().err


def test_a_run_with_parameters_keeps_its_figures_and_tables_beside_it(monkeypatch, folder):
    runs = []
    monkeypatch.setattr(cli, "run_notebooks", lambda outputs, given, jobs: runs.append((*outputs.values(), given)))
    cli.main(["run", "03"])
    monkeypatch.setenv("OPTICAM_IMAGENET", "images")
    cli.main(["run", "03", "-p", "limit=2", "-p", "results=elsewhere", "-p", "root=~/photos", "-o", "deep/o.ipynb"])
    assert runs[0] == (cli.RESULTS / "03_faithfulness.ipynb", {})
    assert runs[1][1] == {
        "figures": str(folder / "deep" / "o" / "figures"),
        "results": str(folder / "elsewhere"),
        "root": str(Path.home() / "photos"),
        "limit": "2",
    }
    assert os.environ["OPTICAM_IMAGENET"] == str(folder / "images")


@pytest.mark.slow
def test_a_failing_notebook_ends_with_one(capsys, folder):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    broken = new_notebook(cells=[new_code_cell("1 / 0")], metadata={"kernelspec": kernel})
    nbformat.write(broken, folder / "broken.ipynb")
    assert cli.main(["run", "broken.ipynb", "-o", "o.ipynb"]) == 1
    assert "opticam: broken: cell 0 failed with ZeroDivisionError" in capsys.readouterr().err
    assert (folder / "o.failed.ipynb").exists()


def test_list(capsys):
    assert cli.main(["run", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "03_faithfulness" in printed
    assert "limit: int = 6" in printed


def test_help_of_a_notebook_shows_its_parameters(capsys):
    assert cli.main(["run", "03", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("03_faithfulness\n")
    assert "num_steps: int = 100  optimisation steps of Opti-CAM" in printed
    assert "01_opti_cam" not in printed
    assert cli.main(["run", "--help"]) == 0
    assert "usage: opticam run" in capsys.readouterr().out


def test_no_words_and_unknown_words_end_with_two(capsys):
    for words in ([], ["explian"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 2


def test_without_an_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert cli.main(["explain", PHOTO, "--method", "captum:Saliency"]) == 2
    assert (
        capsys.readouterr().err
        == "opticam: method: captum is not installed: pip install '.[captum]' in a clone of opticam\n"
    )


@pytest.mark.slow
def test_verify_computes_what_pages_conclude_from_evidence_again(folder, monkeypatch, capsys):
    """Of the page, the cell that would fail is not run."""
    cells = [
        new_code_cell('figures: str = ""\nresults: str = ""', metadata={"tags": ["parameters"]}),
        new_code_cell("raise ValueError('needs a network')"),
        new_code_cell(
            "from opticam import lab\n"
            "lab.report('02_page', [lab.finding('gains', lab.Estimate(1, 0.5, 2), above=0)], {}, results)",
            metadata={"tags": ["evidence"]},
        ),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, some in (("02_page", cells), ("03_other", cells[:2])):
        nbformat.write(new_notebook(cells=some, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")
    monkeypatch.setattr(cli, "list_notebooks", lambda: sorted(folder.glob("*.ipynb")))
    assert cli.main(["verify", "--evidence"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"02_page +\| gains +\| - +\| 1.00 \[0.50, 2.00\] +\| yes", printed)
    assert printed.endswith("1 findings: 1 hold here, 0 do not\n")


def test_verify_shows_findings_and_runs_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESULTS", folder / "results" / "notebooks")
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == "opticam: results: no run has left findings here; first: opticam run\n"
    monkeypatch.setattr(findings, "COMMITTED", folder / "committed")
    for holds, name in ((True, "02_metric_flaw"), (False, "03_faithfulness"), (False, "99_elsewhere")):
        claim = finding("gains", Estimate(1, 0.5, 2) if holds else Estimate(1, -0.5, 2), above=0)
        report(name, [claim], {}, folder / "results")
    assert cli.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("2 findings: 1 hold here, 1 do not\n")
    assert "99_elsewhere" not in printed
    assert re.search(r"03_faithfulness +\| gains +\| - +\| 1.00 \[-0.50, 2.00\] +\| no", printed)
