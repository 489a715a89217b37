import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from opticam.jobs import runner
from opticam.jobs.runner import (
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
    assert [path.stem[:2] for path in paths] == [f"{number:02d}" for number in range(len(paths))]
    for path in paths:
        assert (
            find_notebook(path.stem[:2])
            == find_notebook(str(int(path.stem[:2])))
            == find_notebook(path.stem)
            == find_notebook(path)
            == path
        )
    with pytest.raises(ValueError, match=r"notebook: wanted one of 00_explorer, 01_opti_cam_step_by_step, .* got '99'"):
        find_notebook("99")


def test_parameters_are_read_with_type_default_and_help(notebook):
    assert notebook_parameters(notebook())["names"] == {"type": "list[str]", "default": ["a", "b"], "help": "several"}
    assert notebook_parameters(notebook())["rate"] == {"type": "float", "default": 0.5, "help": "how fast"}


def by_hand(path, source, **metadata):
    cells = [{"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}, "outputs": []}]
    content = {"nbformat": 4, "nbformat_minor": 5, "cells": cells, "metadata": metadata}
    path.write_text(json.dumps(content))
    return path


def test_defaults_with_signs_of_python_inside_are_read(tmp_path):
    source = [
        "import os\n",
        "\n",
        "# of the first\n",
        "name: str = 'a=b # c'  # d = '#'\n",
        'quoted: "list[str]" = [\n',
        "    'x, y',  # first\n",
        "    '=',\n",
        "]  # both\n",
        "bare:int=-1; other: float = 1e-3",
    ]
    assert notebook_parameters(by_hand(tmp_path / "n.ipynb", source, language_info={"name": "python"})) == {
        "name": {"type": "str", "default": "a=b # c", "help": "d = '#'"},
        "quoted": {"type": "list[str]", "default": ["x, y", "="], "help": "both"},
        "bare": {"type": "int", "default": -1, "help": ""},
        "other": {"type": "float", "default": 0.001, "help": ""},
    }


def test_a_choice_among_literals(tmp_path):
    source = [
        "from typing import Literal\n",
        "\n",
        "schedule: Literal['fast # 18', 'paper=100', \"it's\"] = 'paper=100'  # which = '#'\n",
        "quoted: \"Literal['a', 'Literal']\" = 'Literal'\n",
        "number: typing.Literal[1, 2, True] = 2",
    ]
    path = by_hand(tmp_path / "n.ipynb", source, language_info={"name": "python"})
    read = notebook_parameters(path)
    assert {name: entry["default"] for name, entry in read.items()} == {
        "schedule": "paper=100",
        "quoted": "Literal",
        "number": 2,
    }
    assert read["schedule"]["help"] == "which = '#'"
    given = {"schedule": "fast # 18", "quoted": "a", "number": "1"}
    assert check_parameters(path, given) == {"schedule": "fast # 18", "quoted": "a", "number": 1}
    assert check_parameters(path, {"schedule": "it's", "number": True})["number"] is True
    with pytest.raises(ValueError, match=r"parameter schedule: wanted one of fast # 18, paper=100, it's, got 'slow'"):
        check_parameters(path, {"schedule": "slow"})
    for number in (3, 1.0, False, "3", None):
        with pytest.raises(ValueError, match="parameter number: wanted one of 1, 2, True, got"):
            check_parameters(path, {"number": number})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a = 1", "the parameters of n.ipynb: wanted `name: type = literal`, got `a = 1`"),
        ("a: int", "wanted `name: type = literal`, got `a: int`"),
        ("a: int = 1\na += 1", "wanted `name: type = literal`, got `a += 1`"),
        ("a.b: int = 1", "wanted `name: type = literal`, got `a.b: int = 1`"),
        ("a: int = 1.5", "parameter a of n.ipynb: the default is not a literal of type int"),
        ("a: str = f()", "parameter a of n.ipynb: the default is not a literal of type str"),
        ("a: int | None = None", "parameter a of n.ipynb: the type int | None is not known; wanted int, float"),
        ("a: int = ", "the parameters of n.ipynb are not Python"),
        ("a: Literal['x', 'y'] = 'z'", "the default is not a literal of type Literal['x', 'y']"),
        ("a: Literal['x', 'y'] = 1", "the default is not a literal of type Literal['x', 'y']"),
        ("a: Literal[x] = 'x'", "the default is not a literal of type Literal[x]"),
        ("a: 'Literal[)(]' = 'x'", "the default is not a literal of type Literal[)("),
        ("a: Literal = 'x'", "the type Literal is not known"),
        ("%matplotlib inline", "the parameters of n.ipynb are not Python"),
    ],
)
def test_parameters_of_another_form_are_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        notebook_parameters(by_hand(tmp_path / "n.ipynb", source, language_info={"name": "python"}))


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
        ({"names": '[x, "y, z"]'}, ["x", "y, z"]),
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
        ({"names": "[x"}, "parameter names: wanted words"),
        ({"count": "x", "cuont": 1}, "parameter count: .*\nparameter cuont: "),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(notebook, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_notebook(notebook(), tmp_path / "out" / "o.ipynb", given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_uses_its_parameters_and_the_notebooks_folder(notebook, tmp_path):
    path = notebook("import os\nprint(count * 2, names, os.getcwd())")
    output = run_notebook(path, tmp_path / "out" / "o.ipynb", {"count": "21", "names": "p,q"})
    assert outputs(output) == f"42 ['p', 'q'] {tmp_path}\n"
    assert [file.name for file in output.parent.iterdir()] == ["o.ipynb"]


@pytest.mark.slow
def test_a_failing_cell_leaves_a_failed_notebook_and_the_old_result(notebook, tmp_path):
    output = run_notebook(notebook("print('old')"), tmp_path / "o.ipynb")
    with pytest.raises(
        NotebookError, match=r"07_tiny: cell \d+ failed with ZeroDivisionError: division by zero; .*o\.failed\.ipynb"
    ):
        run_notebook(notebook("print('before')", "1 / 0", "print('after')"), output)
    assert outputs(output) == "old\n"
    assert "before" in outputs(tmp_path / "o.failed.ipynb")
    assert "after" not in outputs(tmp_path / "o.failed.ipynb")
    run_notebook(notebook("print('new')"), output)
    assert outputs(output) == "new\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["07_tiny.ipynb", "o.ipynb"]


@pytest.mark.slow
def test_a_killed_kernel_is_a_failure(notebook, tmp_path):
    path = notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "print('after')")
    with pytest.raises(NotebookError, match="the kernel died"):
        run_notebook(path, tmp_path / "o.ipynb")
    assert not (tmp_path / "o.ipynb").exists()
    assert (tmp_path / "o.failed.ipynb").exists()


def test_a_notebook_is_not_its_own_output(notebook):
    path = notebook("1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"output: .*07_tiny\.ipynb is the notebook itself"):
        run_notebook(path, path.parent / "." / path.name)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "Expecting value: line 1"),
        ("[]", "wanted nbformat 4"),
        ('{"nbformat": 3, "worksheets": []}', "wanted nbformat 4"),
        ('{"nbformat": 4, "metadata": {}}', "without 'cells'"),
        ('{"nbformat": 4, "metadata": {}, "cells": [1]}', ""),
        ('{"nbformat": 4, "metadata": [], "cells": []}', ""),
        ('{"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code", "source": [1], "metadata": {}}]}', ""),
        ('{"nbformat": 4, "metadata": {"kernelspec": {"language": "R"}}, "cells": []}', "its language is R"),
        ("[" * 10**5, ""),
        ("\xff", "codec can't decode"),
    ],
)
def test_what_is_no_notebook_is_refused(tmp_path, text, reason):
    (tmp_path / "text.ipynb").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=rf"notebook: text\.ipynb is not a Python notebook \(.*{reason}") as told:
        run_notebook(tmp_path / "text.ipynb", tmp_path / "o.ipynb")
    assert "\n" not in str(told.value)


def test_parameters_need_a_notebook_that_names_its_language(tmp_path):
    with pytest.raises(ValueError, match=r"n\.ipynb is not a Python notebook \(its language is not named"):
        notebook_parameters(by_hand(tmp_path / "n.ipynb", "a: int = 1"))


DRAWING = """
import sys
import matplotlib.pyplot as plt
print("one"); sys.stdout.flush(); print("two")
plt.plot([1, 2, 4]);
"""


@pytest.mark.slow
def test_two_renders_are_byte_identical(notebook, tmp_path):
    path = notebook(DRAWING, "{'a': count}")
    first = render_notebook(path).read_bytes()
    assert render_notebook(path).read_bytes() == first
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


@pytest.mark.slow
def test_of_widgets_only_the_text_is_rendered(notebook):
    path = notebook(PAGE)
    first = render_notebook(path).read_bytes()
    assert render_notebook(path).read_bytes() == first
    (output,) = json.loads(first)["cells"][2]["outputs"]
    assert output["data"] == {"text/plain": ["a page"]}
    assert b"widget-view" not in first


@pytest.mark.slow
def test_a_failing_render_leaves_the_notebook_as_it_was(notebook, monkeypatch):
    path = notebook("1 / 0")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        render_notebook(path)
    assert path.read_bytes() == before
    path = notebook("print('in', '/some/where')")
    before = path.read_bytes()
    monkeypatch.setattr(runner, "REPOSITORY", "/some/where")
    with pytest.raises(NotebookError, match="an output shows /some/where, a path of this machine"):
        render_notebook(path)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_no_event_loop_stays_open(notebook, tmp_path, monkeypatch):
    loops, new = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(new()) or loops[-1])
    with ThreadPoolExecutor(1) as pool:  # a thread that has no loop yet
        pool.submit(run_notebook, notebook("1"), tmp_path / "out.ipynb").result()
    assert loops
    assert all(loop.is_closed() for loop in loops)
