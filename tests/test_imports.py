"""What is imported when: nothing before it is asked for, and whatever is asked for first."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import opticam
from opticam.lab.datasets import demo

TABLES = {"pandas", "pyarrow", "scipy", "skimage", "cv2", "papermill", "nbformat", "jsonschema"}
HEAVY = TABLES | {"torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "distributed", "dask"}


def after(program, folder):
    """The packages that a program in a process of its own leaves imported."""
    program += "\nimport sys\nprint('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def command(*words):
    return f"from opticam.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize(
    "program",
    [
        "import opticam; dir(opticam)",
        command("--help"),
        command("run", "--help"),
        command("run", "--list"),
        command("run", "03", "--help"),
        command("batch", "demo", "--dry-run"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program, tmp_path):
    assert not after(program, tmp_path) & HEAVY


@pytest.mark.slow
def test_workers_and_explain_import_only_what_they_use(tmp_path):
    assert not after("import opticam.jobs.cluster", tmp_path) & {"torch", *TABLES}
    assert not after(command("explain", str(demo().paths[17]), "--method", "grad_cam"), tmp_path) & TABLES


def test_the_module_of_the_command_line_may_be_imported():
    assert importlib.import_module("opticam.__main__").main


def test_every_public_name_is_where_the_table_says_for_checkers_of_types_too():
    for name in opticam.__all__:
        assert getattr(opticam, name).__doc__
    tree = ast.parse(Path(opticam.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in checked.body for alias in node.names}
    assert told == {name: f"opticam.{home}" for name, home in opticam._HOMES.items()}
    assert sorted(told) == sorted(opticam.__all__)
    assert set(opticam.__all__) <= set(dir(opticam))
    with pytest.raises(AttributeError, match="module 'opticam' has no attribute 'nothing'"):
        _ = opticam.nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import opticam.saliency",
        "import opticam, timm\nassert opticam.saliency.BASELINES",
        "import opticam.lab.evaluation as one\nfrom opticam import evaluate\nassert one.evaluate is evaluate",
    ],
)
def test_imports_in_any_order(program, tmp_path):
    assert "torchvision" in after(program, tmp_path)


@pytest.mark.slow
def test_builds_that_do_not_belong_together_are_mended_once_with_a_warning(tmp_path):
    program = """
import os, warnings
import opticam, torch
(mend,) = [finder.find_spec for finder in sys.meta_path if getattr(finder, "__module__", "") == "opticam._torchvision"]
def mended(name):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert mend(name) is None  # others find the module
    return [str(warning.message) for warning in heard]
assert "torchvision" not in sys.modules
assert mended("torchvision") == []
assert not hasattr(torch.ops.torchvision, "nms")
(message,) = mended("torchvision._meta_registrations")
assert message.startswith("torchvision's compiled operators")
assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")
assert mended("torchvision._meta_registrations") == []  # as where the two belong together
"""
    env = {name: value for name, value in os.environ.items() if name != "OPTICAM_PROGRESS"}
    command = [sys.executable, "-c", "import sys\n" + program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
