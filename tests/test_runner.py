import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from opticam import runner
from opticam.runner import (
    NotebookError,
    check_parameters,
    find_notebook,
    list_notebooks,
    notebook_parameters,
    render_notebook,
    run_notebook,
)

PARAMETERS = """
count: int = 2  # how many
rate: float = 0.5  # how fast
name: str = "a"  # which
loud: bool = False  # or not
names: list[str] = ["a", "b"]  # several
"""


@pytest.fixture
def notebook(tmp_path):
    def write(*sources, name="07_tiny"):
        cells = [new_markdown_cell("# What?"), new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]})]
        path = tmp_path / f"{name}.ipynb"
        cells += [new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_the_numbered_notebooks_are_found_by_number_name_and_path():
    paths = list_notebooks()
    assert [path.stem[:2] for path in paths] == [f"{number:02d}" for number in range(10)]
    for path in paths:
        assert (
            find_notebook(path.stem[:2])
            == find_notebook(path.stem[1])
            == find_notebook(path.stem)
            == find_notebook(path)
            == path
        )
    with pytest.raises(ValueError, match=r"notebook: wanted one of 00_explorer, 01_opti_cam_step_by_step, .* got '99'"):
        find_notebook("99")


def test_parameters_are_read_with_type_default_and_help(notebook):
    assert notebook_parameters(notebook())["names"] == {"type": "list[str]", "default": ["a", "b"], "help": "several"}
    assert notebook_parameters(notebook())["rate"] == {"type": "float", "default": 0.5, "help": "how fast"}


@pytest.mark.parametrize(
    ("given", "cast"),
    [
        ({"count": "7"}, 7),
        ({"count": 7}, 7),
        ({"rate": "1"}, 1.0),
        ({"rate": ".5"}, 0.5),
        ({"rate": 1e-3}, 0.001),
        ({"name": "7"}, "7"),
        ({"loud": "true"}, True),
        ({"loud": "False"}, False),
        ({"names": "x, y"}, ["x", "y"]),
        ({"names": ("x",)}, ["x"]),
        ({"names": ""}, []),
    ],
)
def test_values_are_cast_to_the_annotated_type(notebook, given, cast):
    ((name, value),) = check_parameters(notebook(), given).items()
    assert name in given
    assert (type(value), value) == (type(cast), cast)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuont": 3}, "parameter cuont: unknown to this notebook; wanted one of count, rate, name, loud, names"),
        ({"count": "many"}, "parameter count: wanted a whole number, got 'many'"),
        ({"count": 2.0}, "parameter count: wanted a whole number, got 2.0"),
        ({"count": "2.5"}, "parameter count: wanted a whole number, got"),
        ({"count": True}, "parameter count: wanted a whole number, got True"),
        ({"rate": "nan"}, "parameter rate: wanted a number"),
        ({"rate": "NaN"}, "parameter rate: wanted a number"),
        ({"rate": float("inf")}, "parameter rate: wanted a number"),
        ({"name": 3}, "parameter name: wanted text, got 3"),
        ({"loud": "1"}, "parameter loud: wanted true or false"),
        ({"loud": 1}, "parameter loud: wanted true or false"),
        ({"names": [1]}, "parameter names: wanted words"),
        ({"count": "x", "cuont": 1}, "parameter count: .*\nparameter cuont: "),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(notebook, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_notebook(notebook(), tmp_path / "out" / "o.ipynb", given)
    assert not (tmp_path / "out").exists()


def test_a_run_uses_its_parameters_and_the_notebooks_folder(notebook, tmp_path):
    path = notebook("import os\nprint(count * 2, names, os.getcwd())")
    output = run_notebook(path, tmp_path / "out" / "o.ipynb", {"count": "21", "names": "p,q"}, progress=False)
    assert outputs(output) == f"42 ['p', 'q'] {tmp_path}\n"
    assert [file.name for file in output.parent.iterdir()] == ["o.ipynb"]


def test_a_failing_cell_leaves_a_failed_notebook_and_the_old_result(notebook, tmp_path):
    output = run_notebook(notebook("print('old')"), tmp_path / "o.ipynb", progress=False)
    with pytest.raises(
        NotebookError, match=r"07_tiny: cell \d+ failed with ZeroDivisionError: division by zero; .*o\.failed\.ipynb"
    ):
        run_notebook(notebook("print('before')", "1 / 0", "print('after')"), output, progress=False)
    assert outputs(output) == "old\n"
    assert "before" in outputs(tmp_path / "o.failed.ipynb")
    assert "after" not in outputs(tmp_path / "o.failed.ipynb")
    run_notebook(notebook("print('new')"), output, progress=False)
    assert outputs(output) == "new\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["07_tiny.ipynb", "o.ipynb"]


def test_a_killed_kernel_is_a_failure(notebook, tmp_path):
    path = notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "print('after')")
    with pytest.raises(NotebookError, match="the kernel died"):
        run_notebook(path, tmp_path / "o.ipynb", progress=False)
    assert not (tmp_path / "o.ipynb").exists()
    assert (tmp_path / "o.failed.ipynb").exists()


def test_a_notebook_is_not_its_own_output(notebook):
    path = notebook("1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"output: .*07_tiny\.ipynb is the notebook itself"):
        run_notebook(path, path.parent / "." / path.name)
    assert path.read_bytes() == before


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "text.ipynb").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ipynb is not a Python notebook"):
        run_notebook(tmp_path / "text.ipynb", tmp_path / "o.ipynb")


DRAWING = """
import sys
import matplotlib.pyplot as plt
print("one"); sys.stdout.flush(); print("two")
plt.plot([1, 2, 4]);
"""


def test_two_renders_are_byte_identical(notebook, tmp_path):
    path = notebook(DRAWING, "{'a': count}")
    first = render_notebook(path, progress=False).read_bytes()
    assert render_notebook(path, progress=False).read_bytes() == first
    rendered = json.loads(first)
    assert [cell["id"] for cell in rendered["cells"]] == ["cell-00", "cell-01", "cell-02", "cell-03"]
    assert [cell["metadata"] for cell in rendered["cells"]] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert rendered["cells"][2]["outputs"][0]["text"] == ["one\n", "two\n"]
    assert "image/png" in rendered["cells"][2]["outputs"][1]["data"]
    assert b"papermill" not in first
    assert b"iopub" not in first
    nbformat.validate(nbformat.reads(first.decode(), as_version=4))


PAGE = """
import ipywidgets
from IPython.display import display
box = ipywidgets.VBox([ipywidgets.IntSlider(value=count)])
display({"text/plain": "a page", **{k: v for k, v in box._repr_mimebundle_().items() if k != "text/plain"}}, raw=True)
"""


def test_of_widgets_only_the_text_is_rendered(notebook):
    path = notebook(PAGE)
    first = render_notebook(path, progress=False).read_bytes()
    assert render_notebook(path, progress=False).read_bytes() == first
    (output,) = json.loads(first)["cells"][2]["outputs"]
    assert output["data"] == {"text/plain": ["a page"]}
    assert b"widget-view" not in first


def test_a_failing_render_leaves_the_notebook_as_it_was(notebook, monkeypatch):
    path = notebook("1 / 0")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        render_notebook(path, progress=False)
    assert path.read_bytes() == before
    path = notebook("print('in', '/some/where')")
    before = path.read_bytes()
    monkeypatch.setattr(runner, "REPOSITORY", "/some/where")
    with pytest.raises(NotebookError, match="an output shows /some/where, a path of this machine"):
        render_notebook(path, progress=False)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_progress_inside_a_cell_reaches_the_log_and_not_the_notebook(notebook, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(runner, "_SECONDS", {True: 0.1, False: 0.1})
    source = """
import time
from opticam.evaluate import _bar
with _bar(4, True) as bar:
    bar.update(3)
    bar.refresh()
    time.sleep(0.5)
"""
    output = run_notebook(notebook(source), tmp_path / "o.ipynb")
    assert re.search(r"75%.* 3/4 .*map/s\]", capfd.readouterr().err)
    assert outputs(output) == ""
