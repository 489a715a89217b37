"""Strict papermill: run a numbered notebook with checked parameters, or render it in place.

papermill only warns about an unknown parameter, checks no type, and leaves a half-executed file under the final name.
Here parameters are checked before anything starts, and a notebook gets its own name only if every cell ran.

papermill, nbclient and nbformat are imported only where a notebook is executed, so this module loads at once.
"""

import ast
import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm  # here: it reads the environment once, before `run_notebook` changes that for kernels

from opticam.lab.files import RENDERING, REPOSITORY, replacing

if TYPE_CHECKING:
    import nbformat

NOTEBOOKS = REPOSITORY / "notebooks"
RENDERED_FIGURES = "../figures/rendered"  # as notebooks see it
# parameters that name places; notebooks run in a folder of their own
PATHS = ("root", "checkpoint", "figures", "results")
# for a process that computes on a CPU: else glibc gives every large tensor back to the system, and fetches zeroed
# pages for the next
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
# for a process with several threads: by default those of libgomp, torch's OpenMP, wait for each other at full speed
# for milliseconds, even on a core that another process wants
SHORT_SPIN = {"GOMP_SPINCOUNT": "5000"}
_KERNEL = ["--IPKernelApp.log_level=50"]  # else the interrupt that ends an idle kernel is reported as an error
if sys.platform == "linux":
    # a kernel whose starter is killed would keep computing beside the run that replaces it; Linux can end it at once
    _KERNEL.append("--IPKernelApp.exec_lines=__import__('ctypes').CDLL(None).prctl(1, 9);")


class NotebookError(RuntimeError):
    """A notebook was started and did not finish."""


def list_notebooks() -> list[Path]:
    """The numbered notebooks, in reading order.

    Raises:
        ValueError: there are none, because the package was installed without its repository.
    """
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(f"notebooks: none in {NOTEBOOKS}; wanted a clone of the repository, set up with make")
    return found


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
    names = ", ".join(known.stem for known in list_notebooks())
    raise ValueError(f"notebook: wanted one of {names}, or a path, got {str(name)!r}")


class Cell(NamedTuple):
    """The parts of a cell that its result depends on."""

    kind: str  # "code", "markdown" or "raw"
    source: str
    tags: list[str]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a Python notebook.

    Raises:
        ValueError: the file is not a Python notebook.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("nbformat") != 4:
            raise ValueError("wanted nbformat 4")
        cells = [
            Cell(cell["cell_type"], "".join(cell["source"]), list(cell["metadata"].get("tags", [])))
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

    They are the annotated assignments of the first cell tagged `parameters`: `name: type = literal  # help`. The
    notebook is what `find_notebook` takes, here and below.

    Raises:
        ValueError: unknown or unreadable notebook, or an assignment of another form.
    """
    path = find_notebook(notebook)
    source = next((cell.source for cell in read_cells(path) if "parameters" in cell.tags), "")
    try:
        return _read_parameters(path, source)
    except (MemoryError, RecursionError) as error:  # of Python's parser
        raise ValueError(f"notebook: the parameters of {path.name} are nested too deeply to be read") from error


def _read_parameters(path: Path, source: str) -> dict[str, dict[str, Any]]:
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"notebook: the parameters of {path.name} are not Python ({error})") from error
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    helps = {token.end[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    parameters = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            got = ast.unparse(statement)
            raise ValueError(f"notebook: the parameters of {path.name}: wanted `name: type = literal`, got `{got}`")
        name, kind = statement.target.id, ast.unparse(statement.annotation)
        if isinstance(statement.annotation, ast.Constant):  # the same in quotes
            kind = str(statement.annotation.value)
        try:
            default = cast(name, ast.literal_eval(statement.value), kind)
        except (ValueError, TypeError, SyntaxError) as error:
            told = f"the default is not a literal of type {kind}"
            if kind not in _TYPES and "Literal[" not in kind:
                told = f"the type {kind} is not known; wanted {', '.join(_TYPES)} or Literal[...]"
            raise ValueError(f"parameter {name} of {path.name}: {told}") from error
        parameters[name] = {"type": kind, "default": default, "help": helps.get(statement.end_lineno or 0, "")}
    return parameters


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, cast to the types the notebook annotates.

    Args:
        notebook: whose parameters they are.
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
    """The parameters `figures` and `results`, if known, for a folder beside the executed notebook `output`."""
    folder = output.with_suffix("").absolute()
    own = {"figures": folder / "figures", "results": folder}
    return {name: str(place) for name, place in own.items() if name in known}


def check_writable(folder: Path) -> None:
    """Make a folder. OSError: it cannot be made, or files cannot be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise OSError(f"output: cannot write in {str(folder)!r} ({error})") from error


def check_jobs(jobs: int | None) -> None:
    """Refuse, by a ValueError, a number of jobs that is not positive and whole; None passes."""
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"jobs: wanted a whole number of at least 1, got {jobs!r}")


def check_run(source: Path, output: Path | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """As `check_parameters`, for a run into `output`; that must not be the notebook itself."""
    checked = check_parameters(source, parameters or {})
    if output and output.resolve() == source.resolve():
        raise ValueError(f"output: {output} is the notebook itself; wanted another name, or opticam render")
    return checked


def temporary_name(output: Path, process: int) -> Path:
    """Where this process writes a notebook before it gets its own name."""
    return output.with_name(f".{output.stem}.{process}.ipynb")


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    progress: Path | None = None,
) -> Path:
    """Execute a notebook from top to bottom in a kernel of its own, in the notebooks' folder.

    Args:
        notebook: its number, name or path.
        output: where the executed notebook goes, and what is returned; folders are made.
        parameters: see `check_parameters`.
        progress: a file for its progress, see `latest`.

    Raises:
        ValueError: unknown notebook or parameter, a value of the wrong type, or an output that is the notebook itself;
            nothing was started.
        OSError: the output cannot be written.
        NotebookError: a cell failed or the kernel died; what ran is in `NAME.failed.ipynb` beside `output`, and an
            older `output` is left as it was.
    """
    import papermill
    from jupyter_core.utils import ensure_event_loop
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    source, output = find_notebook(notebook), Path(output).absolute()
    checked = check_run(source, output, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(output, os.getpid())
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    number_of_cells = len(read_cells(source)) + bool(checked)  # papermill adds one
    sockets = Path(tempfile.mkdtemp(prefix="opticam-"))
    # Unix sockets: no port to race for; absolute, because relative ones hang when notebooks run side by side
    transport = {} if sys.platform == "win32" else {"transport": "ipc", "ip": str(sockets / "k")}
    kernel = transport | {"connection_file": str(sockets / "connection.json")}  # which Jupyter, interrupted, may leave
    told = progress or sockets / "progress"

    def tell(cell: "nbformat.NotebookNode", cell_index: int) -> None:
        told.write_text(f"cell {cell_index + 1}/{number_of_cells}")

    client = {"extra_arguments": _KERNEL, "on_cell_start": tell}
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, not one of the user's
    os.environ["TQDM_DISABLE"] = "1"  # for the kernel: a saved bar stays where it stood
    os.environ["OPTICAM_PROGRESS"] = str(told.with_suffix(".bar"))
    for name, value in (KEEP_MEMORY | SHORT_SPIN).items():
        os.environ.setdefault(name, value)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        executed = papermill.execute_notebook(
            source,
            temporary,
            parameters=checked,
            kernel_name="python3",
            start_timeout=300,  # on a busy machine many start at once
            cwd=source.parent,
            progress_bar=False,
            config=Config({"KernelManager": kernel, "NotebookClient": client}),
        )
        for number, cell in enumerate(executed.cells):
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
                raise DeadKernelError(f"cell {number} did not run")
        temporary.replace(output)
        failed.unlink(missing_ok=True)
    except (PapermillExecutionError, DeadKernelError) as error:
        temporary.replace(failed)
        reason = f"the kernel died ({error})"
        if isinstance(error, PapermillExecutionError):
            reason = f"cell {error.cell_index} failed with {error.ename}: {' '.join(str(error.evalue).split())}"
        raise NotebookError(f"{source.stem}: {reason}; what ran is in {failed}") from error
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(sockets, ignore_errors=True)
        del os.environ["OPTICAM_PROGRESS"]
        if not (loop := ensure_event_loop()).is_running():
            loop.close()  # Jupyter leaves it open; collected at exit, it may print a traceback
    return output


def evidence_part(notebook: str | Path, folder: Path) -> Path | None:
    """Write the part of a page that concludes from the shipped rows alone: parameters and the cells tagged `evidence`.

    It needs no network and no photo, so it is run in seconds, as a notebook of its own.

    Returns:
        The path written, in the folder under the page's name; None where the page has no such cell.
    """
    path = find_notebook(notebook)
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if {"evidence", "parameters"} & {*cell["metadata"].get("tags", [])}]
    if not any("evidence" in cell["metadata"]["tags"] for cell in cells):
        return None
    part = folder / path.name
    part.write_text(json.dumps({**content, "cells": cells}), encoding="utf-8")
    return part


def latest(progress: Path) -> str:
    """The progress that a run wrote: its cell, for how long, and the kernel's bar; "" before it begins."""
    bar, text = progress.with_suffix(".bar"), b""
    try:
        cell, seconds = progress.read_text(), max(0.0, time.time() - progress.stat().st_mtime)
        if bar.exists():
            with bar.open("rb") as file:
                file.seek(max(0, bar.stat().st_size - 1000))
                text = file.read()
    except OSError:
        return ""
    last = text.rpartition(b"\r")[2].decode(errors="ignore").strip()  # a bar that is over ends in an empty line
    return f"{cell} {tqdm.format_interval(seconds)}  {last}".rstrip()


def render_notebook(notebook: str | Path, *, progress: Path | None = None) -> Path:
    """Execute a notebook at its own defaults and write it back canonically: two renders are byte-identical.

    Its figures go to `figures/rendered`, its findings to `data/findings`. All findings must hold.

    Raises:
        NotebookError: it did not finish, a finding does not hold, or an output shows a path of this machine. The
            notebook is left as it was.
    """
    import nbformat

    path = find_notebook(notebook)
    folder = Path(tempfile.mkdtemp(prefix="opticam-"))
    os.environ[RENDERING] = "1"
    try:
        places = {"figures": RENDERED_FIGURES} if "figures" in notebook_parameters(path) else {}
        executed = run_notebook(path, folder / path.name, places, progress=progress)
        text = canonical(nbformat.read(executed, as_version=4))
        for place in (str(REPOSITORY), str(Path.home())):
            if place != "/" and place in text:
                told = f"an output shows {place}, a path of this machine; the executed notebook is {executed}"
                raise NotebookError(f"{path.stem}: {told}")
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except BaseException as error:
        if not isinstance(error, NotebookError):  # of that, what ran is kept
            shutil.rmtree(folder)
        raise
    finally:
        del os.environ[RENDERING]
    shutil.rmtree(folder)
    return path


def canonical(notebook: "nbformat.NotebookNode") -> str:
    """The notebook as text, without anything that differs between two equal runs.

    Cells keep source, outputs and tags; ids and execution counts number them. Removed are timestamps, papermill's
    metadata and injected parameters, the interpreter's version, and references to widgets, which end with the kernel.
    The text is JSON with sorted keys and ends in a newline.
    """
    import nbformat

    kept = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    executed = 0  # papermill's cell of parameters was counted too
    for number, cell in enumerate(kept):
        cell["id"] = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            executed += 1
            cell["execution_count"] = executed
            cell["outputs"] = _joined_streams(cell.outputs)
            for output in cell["outputs"]:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
                if "execution_count" in output:
                    output["execution_count"] = executed
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": kept, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
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


def _read_words(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    import yaml

    with contextlib.suppress(yaml.YAMLError, RecursionError):
        return yaml.safe_load(text)


_TYPES: dict[str, tuple[str, Any, Callable[[str], Any]]] = {  # in words, as values, from text
    "int": ("a whole number", (int,), int),
    "float": ("a number", (int, float), float),
    "bool": ("true or false", (bool,), lambda text: {"true": True, "false": False}.get(text.lower())),
    "str": ("text", (str,), str),
    "list[str]": ("words", (list, tuple), _read_words),
}


def cast(name: str, value: Any, kind: str) -> Any:
    """A value as the type that a notebook annotates.

    Args:
        name: of the parameter.
        value: of that type already, or text that can be read as it; a list also as words between commas, in brackets
            or not.
        kind: int, float, bool, str, list[str] or a Literal of text, numbers and truth values.

    Raises:
        ValueError: it is not of the type; NaN and infinity do not count as numbers.
    """
    if literal := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", kind, re.DOTALL):
        options = ast.literal_eval(f"({literal[1]},)")
        found = [option for option in options if type(option) is type(value) and option == value]
        found = found or [option for option in options if isinstance(value, str) and value == str(option)]
        if len(found) != 1:
            raise ValueError(f"parameter {name}: wanted one of {', '.join(map(str, options))}, got {value!r}")
        return found[0]
    words, types, reader = _TYPES.get(kind, (kind, (), str))
    read = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            read = reader(value)
    fits = isinstance(read, types) and isinstance(read, bool) == (kind == "bool")
    if fits and kind == "float":
        fits = abs(read) <= sys.float_info.max
    if fits and kind == "list[str]":
        fits = all(isinstance(part, str) and part for part in read)
    if not fits:
        raise ValueError(f"parameter {name}: wanted {words}, got {value!r}")
    return float(read) if kind == "float" else list(read) if kind == "list[str]" else read
