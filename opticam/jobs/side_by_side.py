"""Notebooks side by side, each in its own process, after those whose results it reads; progress meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from opticam.jobs.runner import (
    NotebookError,
    check_jobs,
    check_run,
    check_writable,
    find_notebook,
    latest,
    read_cells,
    render_notebook,
    run_notebook,
    temporary_name,
)

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SECONDS = 0.2  # between two looks at the notebooks that run
_QUIET = 5.0  # seconds between two lines of a log
_PATIENCE = 20.0  # seconds for a notebook to end once told
_UNWRITABLE = 2  # exit code of a notebook's process that could not write
_PROGRAM = "import sys; from opticam.jobs.side_by_side import _main; sys.exit(_main())"  # of that process
if sys.platform == "linux":
    # it ends and clears up when its starter dies; a starter that died before would not be noticed
    _DIES = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.getppid() == int(sys.argv[1]) or sys.exit(1)"
    _PROGRAM = f"{_DIES}; {_PROGRAM}"


def notebook_inputs(notebook: str | Path) -> set[str]:
    """Numbers of the notebooks whose results one reads: NN of `data/results/NN_...` after "Reads" in its first cell.

    Args:
        notebook: as `find_notebook`.
    """
    said = re.search(r"^Reads (.+?)(Writes|Time:|\Z)", _first_text(find_notebook(notebook)), re.M | re.S)
    return set(re.findall(r"data/results/(\d\d)_", said[1])) if said else set()


def _first_text(notebook: Path) -> str:
    return "".join(cell.source for cell in read_cells(notebook)[:1])


def run_notebooks(
    outputs: Mapping[Path, Path | None], parameters: Mapping[str, Any] | None = None, *, jobs: int | None = None
) -> None:
    """Execute notebooks side by side, each after those whose results it reads, and show progress.

    Where one fails, those that do not read its results still run. The kernels share the cores. In a render each has
    one thread, so no digit depends on what runs beside it.

    Args:
        outputs: notebook -> where the executed one goes, see `run_notebook`, or None to render it.
        parameters: of each of them; see `check_parameters`.
        jobs: notebooks at the same time; by default as many as there are cores.

    Raises:
        ValueError: see `run_notebook`; or notebooks read each other's results, or `jobs` is not a positive whole
            number. Nothing was started.
        NotebookError: one line for each notebook that failed, and for each that was not started because of it.
        OSError: the same, where an output could not be written.
    """
    check_jobs(jobs)
    checked = {path: check_run(path, output, parameters) for path, output in outputs.items()}
    for place in {output.parent for output in outputs.values() if output}:
        check_writable(place)
    inputs = {path: notebook_inputs(path) - {path.stem[:2]} for path in outputs}
    reads = {path: [other for other in outputs if other.stem[:2] in inputs[path]] for path in outputs}
    order = TopologicalSorter(reads)
    try:
        order.prepare()
    except CycleError as error:
        names = " and ".join(sorted({path.stem for path in error.args[1]}))
        raise ValueError(f"notebooks: {names} read each other's results; wanted one that reads no other's") from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or cores, len(outputs))
    ranks, ready = _longest_first(reads), list(order.get_ready())
    left, screen = set(outputs), Screen(_QUIET)
    running: dict[Path, _Run] = {}
    errors: dict[Path, str] = {}
    kind: type[Exception] = NotebookError
    with tempfile.TemporaryDirectory(prefix="opticam-", ignore_cleanup_errors=True) as folder:
        try:
            while ready or running:
                for path in sorted(ready, key=ranks.index)[: jobs - len(running)]:
                    threads = max(1, cores // jobs) if outputs[path] else 1
                    running[path] = _start(path, outputs[path], checked[path], threads, Path(folder) / str(len(left)))
                    ready.remove(path)
                    left.remove(path)
                time.sleep(_SECONDS)
                for path in [path for path, run in running.items() if run.process.poll() is not None]:
                    run = running.pop(path)
                    if run.process.returncode == 0:
                        order.done(path)
                        ready += order.get_ready()
                        screen.say(f"wrote {outputs[path]}" if outputs[path] else f"rendered {path}", sys.stdout)
                    else:
                        errors[path] = _error(run)
                        kind = OSError if run.process.returncode == _UNWRITABLE else kind
                        screen.say(f"failed {path.stem}", sys.stderr)
                screen.show([_line(run) for run in running.values()])
        finally:
            screen.show([])
            _end(list(running.values()))
    for path in left:
        names = ", ".join(other.stem for other in reads[path] if other in {*errors, *left})
        errors[path] = f"{path.stem}: not started, because it reads what {names} should have written"
    if errors:
        raise kind("\n".join(errors[path] for path in outputs if path in errors))


def _longest_first(reads: Mapping[Path, Sequence[Path]]) -> list[Path]:
    """The order to start in: by a notebook's time and that of what waits for it, so no core idles at the end."""
    seconds = dict.fromkeys(reads, 0.0)
    for path in reads:
        if said := re.search(r"Time: about ([\d.]+) (second|minute|hour)", _first_text(path)):
            seconds[path] = float(said[1]) * {"second": 1, "minute": 60, "hour": 3600}[said[2]]
    after = {path: max((seconds[other] for other in reads if path in reads[other]), default=0.0) for path in reads}
    return sorted(reads, key=lambda path: seconds[path] + after[path], reverse=True)


class _Run(NamedTuple):
    notebook: Path
    output: Path | None
    folder: Path  # where its process reports progress
    start: float
    process: subprocess.Popen[bytes]


def _start(notebook: Path, output: Path | None, parameters: Mapping[str, Any], threads: int, folder: Path) -> _Run:
    wanted = os.environ.get(THREADS[0], "")
    threads = max(1, min(threads, int(wanted))) if wanted.isdigit() else threads
    folder.mkdir()
    job = json.dumps([str(notebook), str(output) if output else None, parameters, str(folder)])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603  (words of our own)
            [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid()), job],
            env=os.environ | dict.fromkeys(THREADS, str(threads)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
        )
    return _Run(notebook, output, folder, time.monotonic(), process)


def _main() -> int:
    """In the process of one notebook: execute it, and write what went wrong to a file."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    notebook, output, parameters, folder = json.loads(sys.argv[2])
    try:
        if output:
            run_notebook(notebook, output, parameters, progress=Path(folder, "progress"))
        else:
            render_notebook(notebook, progress=Path(folder, "progress"))
    except (NotebookError, ValueError, OSError, MemoryError, ImportError) as error:
        name = "" if isinstance(error, NotebookError) else f"{Path(notebook).stem}: "
        Path(folder, "error").write_text(name + (str(error) or "not enough memory"))
        return _UNWRITABLE if isinstance(error, OSError) else 1
    return 0


def _error(run: _Run) -> str:
    if run.output:  # where its process was killed
        temporary_name(run.output, run.process.pid).unlink(missing_ok=True)
    if (run.folder / "error").exists():
        return (run.folder / "error").read_text()
    last = (run.folder / "log").read_text(errors="replace").strip().rpartition("\n")[2]
    return f"{run.notebook.stem}: its process ended with {run.process.returncode}; {last or 'it said nothing'}"


def _end(runs: Sequence[_Run]) -> None:
    """End them, and wait until they have cleared up."""
    for run in runs:
        run.process.terminate()
    for run in runs:
        try:
            run.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
            _error(run)


def _line(run: _Run) -> str:
    passed = tqdm.format_interval(time.monotonic() - run.start)
    return f"{run.notebook.stem} {passed}  {latest(run.folder / 'progress') or 'starts'}"


class Screen:
    """Progress on the standard error: one line per run in a terminal, in a log all of them every `quiet` seconds."""

    def __init__(self, quiet: float) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr is not None and sys.stderr.isatty()  # a service may have closed it
        self.told = time.monotonic()

    def say(self, text: str, file: TextIO) -> None:
        """A line that stays."""
        self.show([])
        print(text, file=file, flush=True)

    def show(self, lines: Sequence[str]) -> None:
        """Lines that replace those shown before."""
        if self.terminal:
            size = os.get_terminal_size(sys.stderr.fileno())
            shown = [line[: (size.columns or 80) - 1] for line in lines][: (size.lines or 24) - 1]
            up = f"\x1b[{len(shown)}A" if shown else ""
            print("\r\x1b[J" + "".join(line + "\n" for line in shown) + up, end="", file=sys.stderr, flush=True)
        elif lines and sys.stderr is not None and time.monotonic() - self.told >= self.quiet:
            self.told = time.monotonic()
            print("; ".join(lines), file=sys.stderr, flush=True)
