"""Strict papermill: run a numbered notebook with checked parameters, or render it in place.

papermill only warns of an unknown parameter, checks no type, and leaves a half-executed file under the final name. Here
parameters are checked before anything starts, and a notebook is under its own name only if every cell ran.

To be imported at once, papermill, nbclient and nbformat are so only where a notebook is executed.
"""

import ast
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm  # here: it reads the environment once, before `run_notebook` changes that for kernels

from opticam.files import REPOSITORY

if TYPE_CHECKING:
    import nbformat

NOTEBOOKS = REPOSITORY / "notebooks"
PATHS = ("root", "figures", "results")  # parameters that name places; notebooks run in a folder of their own
# of a process that computes on a CPU: else glibc hands every large tensor back to the system, and fetches zeroed pages
# for the next
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
_SECONDS = {True: 1.0, False: 60.0}  # between two looks at a kernel's progress, in a terminal and in a log
_KERNEL = ["--IPKernelApp.log_level=50"]  # else the interrupt that ends an idle kernel is told as an error
if sys.platform == "linux":
    # a kernel whose starter is killed would compute on, beside the run that takes its place; Linux can end it at once
    _KERNEL.append("--IPKernelApp.exec_lines=__import__('ctypes').CDLL(None).prctl(1, 9);")


class NotebookError(RuntimeError):
    """A notebook was started and did not come to its end."""


def list_notebooks() -> list[Path]:
    """The numbered notebooks, in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find_notebook(name: str | Path) -> Path:
    """The notebook that a person's word means.

    Args:
        name: its number ("03"), its name ("03_faithfulness"), or a path to any notebook.

    Raises:
        ValueError: no such notebook.
    """
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    for known in list_notebooks():
        if str(name) in (known.name, known.stem, known.stem[:2], known.stem[:2].removeprefix("0")):
            return known
    raise ValueError(
        f"notebook: wanted one of {', '.join(path.stem for path in list_notebooks())}, or a path, got {str(name)!r}"
    )


class Cell(NamedTuple):
    """What the result of a cell depends on.

    Attributes:
        kind: "code", "markdown" or "raw".
        source: text.
        tags: "parameters" marks the first cell, which papermill's values come after.
    """

    kind: str
    source: str
    tags: list[str]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a Python notebook.

    Raises:
        ValueError: the file is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("nbformat") != 4:
            raise ValueError("wanted nbformat 4")
        cells = [
            Cell(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
            for cell in content["cells"]
        ]
        known = content["metadata"]
        language = known.get("language_info", {}).get("name") or known.get("kernelspec", {}).get("language")
        if language != "python" and (language or any("parameters" in cell.tags for cell in cells)):
            raise ValueError(f"its language is {language or 'not named'}")
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"notebook: {path.name} is not a Python notebook ({reason})") from error
    return cells


def notebook_parameters(notebook: str | Path) -> dict[str, dict[str, Any]]:
    """What may be set in a notebook: name -> `type` (the annotation), `default` (a Python value) and `help`.

    They are the annotated assignments of the first cell tagged `parameters`: `name: type = literal  # help`.

    Args:
        notebook: as `find_notebook`.

    Raises:
        ValueError: unknown or unreadable notebook, or an assignment of another form.
    """
    path = find_notebook(notebook)
    source = next((cell.source for cell in read_cells(path) if "parameters" in cell.tags), "")
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"notebook: the parameters of {path.name} are no Python ({error})") from error
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    helps = {token.end[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    parameters = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            got = ast.unparse(statement)
            raise ValueError(f"notebook: the parameters of {path.name}: wanted `name: type = literal`, got `{got}`")
        name, kind = statement.target.id, ast.unparse(statement.annotation).strip("'")
        try:
            default = cast(name, ast.literal_eval(statement.value), kind)
        except (ValueError, TypeError) as error:
            raise ValueError(f"parameter {name} of {path.name}: the default is no {kind} literal") from error
        parameters[name] = {"type": kind, "default": default, "help": helps.get(statement.end_lineno or 0, "")}
    return parameters


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, cast to the types the notebook annotates.

    Args:
        notebook: as `find_notebook`.
        given: name -> value; text, as from a command line, is read as the annotated type.

    Raises:
        ValueError: one sentence per fault: an unknown name, or a value that is not of the type.
    """
    known = notebook_parameters(notebook)
    checked, faults = {}, []
    for name, value in given.items():
        if name not in known:
            faults.append(f"parameter {name}: unknown to this notebook; wanted one of {', '.join(known)}")
            continue
        try:
            checked[name] = cast(name, value, known[name]["type"])
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return checked


def places_beside(output: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """The parameters `figures` and `results`, if known, for a folder beside an executed notebook: committed ones stay.

    Args:
        output: the executed notebook.
        known: from `notebook_parameters`.
    """
    folder = output.with_suffix("").absolute()
    own = {"figures": folder / "figures", "results": folder}
    return {name: str(place) for name, place in own.items() if name in known}


def check_writable(folder: Path) -> None:
    """Make a folder and try to write in it.

    Raises:
        OSError: it cannot be made, or not be written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise OSError(f"output: cannot write in {str(folder)!r} ({error})") from error


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    progress: bool | Path = True,
) -> Path:
    """Execute a notebook from top to bottom in a kernel of its own, in the notebooks' folder.

    Args:
        notebook: as `find_notebook`.
        output: where the executed notebook goes; folders are made.
        parameters: see `check_parameters`.
        progress: show a bar over the cells, or write it to this file, for `latest`.

    Returns:
        The path of the executed notebook: `output`.

    Raises:
        ValueError: unknown notebook or parameter, a value of the wrong type, or an output that is the notebook itself;
            nothing was started.
        OSError: the output cannot be written.
        NotebookError: a cell failed or the kernel died; what ran is in `NAME.failed.ipynb` beside `output`, and an
            older `output` is left as it was.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    source, output = find_notebook(notebook), Path(output).absolute()
    checked = check_parameters(source, parameters or {})
    if output.resolve() == source.resolve():
        raise ValueError(f"output: {output} is the notebook itself; wanted another name, or opticam render")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    sockets = Path(tempfile.mkdtemp(prefix="opticam-"))
    # Unix sockets: no port to race for; absolute, because relative ones hang when notebooks run side by side
    transport = {} if sys.platform == "win32" else {"transport": "ipc", "ip": str(sockets / "k")}
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not one of the user's
    os.environ["TQDM_DISABLE"] = "1"  # for the kernel: a saved bar stays where it stood
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        with _bars(progress, sockets / "progress") as place:
            executed = papermill.execute_notebook(
                source,
                temporary,
                parameters=checked,
                kernel_name="python3",
                start_timeout=300,  # many start at once on a busy machine
                cwd=NOTEBOOKS if source.parent == NOTEBOOKS else source.parent,
                progress_bar={"desc": source.stem, "unit": "cell", "leave": True, **place} if progress else False,
                config=Config({"KernelManager": transport, "NotebookClient": {"extra_arguments": _KERNEL}}),
            )
        for number, cell in enumerate(executed.cells):
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
                raise DeadKernelError(f"cell {number} did not run")
        temporary.replace(output)
        failed.unlink(missing_ok=True)
    except (PapermillExecutionError, DeadKernelError) as error:
        temporary.replace(failed)
        raise NotebookError(f"{source.stem}: {_last_line(error)}; what ran is in {failed}") from error
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(sockets, ignore_errors=True)
    return output


def latest(bar: Path) -> str:
    """What a bar that is written to a file shows now: "" before it begins."""
    lines = bar.read_text().split("\n") if bar.exists() else []  # reading makes line ends of carriage returns
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _bars(progress: bool | Path, bar: Path) -> Iterator[dict[str, Any]]:
    """Where papermill's bar goes, as arguments of tqdm; the kernel's own bar goes there too, by way of a file."""
    os.environ["OPTICAM_PROGRESS"] = str(progress if isinstance(progress, Path) else bar)
    try:
        if isinstance(progress, Path):
            with progress.open("a") as file:
                yield {"file": file, "ascii": True}
        else:
            with _repeated_bar(bar, progress):
                yield {}
    finally:
        del os.environ["OPTICAM_PROGRESS"]


@contextmanager
def _repeated_bar(bar: Path, progress: bool) -> Iterator[None]:
    """Shows the kernel's bar: below papermill's in a terminal, else a line a minute."""
    terminal = sys.stderr.isatty()
    done = threading.Event()

    def repeat() -> None:
        with tqdm(bar_format="{desc}", position=1, leave=False, disable=not terminal) as line:
            while not done.wait(_SECONDS[terminal]):
                text = latest(bar)
                if terminal:
                    line.set_description_str(text)
                elif text:
                    print(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=repeat, daemon=True)
    if progress:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if progress:
            thread.join()


def render_notebook(notebook: str | Path, *, progress: bool = True) -> Path:
    """Execute a notebook at its own defaults and write it back canonically: two renders are byte-identical.

    Args:
        notebook: as `find_notebook`.
        progress: show a bar over the cells.

    Returns:
        The path of the notebook.

    Raises:
        NotebookError: it did not come to its end, or an output shows a path of this machine; it is left as it was.
        ValueError: unknown notebook.
    """
    import nbformat

    path = find_notebook(notebook)
    folder = Path(tempfile.mkdtemp(prefix="opticam-"))
    executed = run_notebook(path, folder / path.name, progress=progress)
    text = canonical(nbformat.read(executed, as_version=4))
    for place in (str(REPOSITORY), str(Path.home())):
        if place in text:
            raise NotebookError(
                f"{path.stem}: an output shows {place}, a path of this machine; the executed notebook is {executed}"
            )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    shutil.rmtree(folder)
    return path


def canonical(notebook: "nbformat.NotebookNode") -> str:
    """The notebook as text without anything that differs between two equal runs.

    Cells keep source, outputs and tags; ids count the cells; timestamps, papermill's metadata and injected parameters,
    the interpreter's version and references to widgets, which live only as long as their kernel, go.

    Args:
        notebook: executed.

    Returns:
        JSON, keys sorted, ending in a newline.
    """
    import nbformat

    kept = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for number, cell in enumerate(kept):
        cell["id"] = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell["outputs"] = _joined_streams(cell.outputs)
            for output in cell["outputs"]:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    content = {
        "cells": kept,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return nbformat.writes(nbformat.from_dict(content)) + "\n"


def _joined_streams(outputs: list) -> list:
    # how a kernel cuts its text into messages depends on timing
    joined: list = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list[str]": "words"}
_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
}


def cast(name: str, value: Any, kind: str) -> Any:
    """A value as the type that a notebook annotates.

    Args:
        name: of the parameter.
        value: of that type already, or text that can be read as it; a list also as words between commas.
        kind: int, float, bool, str or list[str].

    Raises:
        ValueError: it is not of the type; NaN and infinity are no numbers here.
    """
    wanted = ValueError(f"parameter {name}: wanted {_WORDS.get(kind, kind)}, got {value!r}")
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "list[str]":
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value.strip() else []
        if isinstance(value, (list, tuple)) and all(isinstance(part, str) and part for part in value):
            return list(value)
        raise wanted
    if isinstance(value, str) and kind in _READERS:
        try:
            value = _READERS[kind](value)
        except (ValueError, KeyError):
            raise wanted from None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise wanted


def _last_line(error: Exception) -> str:
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        value = re.sub(r"\s+", " ", str(error.evalue)).strip()
        return f"cell {error.cell_index} failed with {error.ename}: {value}"
    return f"the kernel died ({error})"
