"""Notebooks side by side: tiny ones, which leave their traces in a file."""

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from opticam import cli
from opticam.jobs import side_by_side
from opticam.jobs.side_by_side import Screen, notebook_inputs, run_notebooks

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
TRACE = "import os\nwith open('trace', 'a') as trace:\n    print({!r}, os.environ['OMP_NUM_THREADS'], file=trace)"
MEET = """
import pathlib, time
pathlib.Path(f"here{number}").touch()
deadline = time.monotonic() + 60
while not pathlib.Path(f"here{1 - number}").exists():
    assert time.monotonic() < deadline, "nobody came"
    time.sleep(0.05)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a notebook that leaves its name in `trace`; returns its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(name, *sources, says="Reads nothing."):
        cells = [new_markdown_cell(f"# What?\n\n{says}"), new_code_cell(TRACE.format(name))]
        cells += [new_code_cell(source.strip()) for source in sources]
        nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return write


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "out")
    return tmp_path / "out"


def cores(monkeypatch, number):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))


def trace():
    return Path("trace").read_text().split()


@pytest.mark.parametrize(
    ("says", "numbers"),
    [
        (
            "Reads `data/results/03_rows.parquet`, `data/results/03_maps.npz` and `data/results/11_x/`. Writes x.",
            "03 11",
        ),
        ("Numbers.\n\nReads `data/some_03_rows.parquet`. Writes `data/results/12_rows.parquet`. Time: about a day", ""),
        ("Nothing is said.", ""),
    ],
)
def test_what_a_notebook_reads_is_what_it_says(write, says, numbers):
    assert notebook_inputs(write("12_some", says=says)) == set(numbers.split())


@pytest.mark.slow
def test_a_notebook_runs_after_those_it_reads_and_the_longest_first(write, out, capfd):
    reading = write("10_reading", says="Reads `data/results/12_rows.parquet`. Writes x. Time: about 9 minutes.")
    short = write("11_short", says="Reads nothing. Writes x. Time: about 10 seconds on two cores.")
    long = write("12_long", says="Reads nothing. Writes x. Time: about 0.5 minutes.")
    assert cli.main(["run", str(reading), str(short), str(long), "--jobs", "1"]) == 0
    order = ["12_long", "10_reading", "11_short"]
    assert trace()[::2] == order
    assert capfd.readouterr().out == "".join(f"wrote {out / name}.ipynb\n" for name in order)
    assert {path.name for path in out.iterdir()} == {f"{name}.ipynb" for name in order}


@pytest.mark.slow
def test_side_by_side_they_share_out_the_cores(write, out, monkeypatch):
    cores(monkeypatch, 7)
    before = dict(os.environ)
    paths = [write(f"1{number}_meeting", f"number = {number}", MEET) for number in range(2)]
    run_notebooks({path: out / path.name for path in paths})
    assert sorted(trace()) == ["10_meeting", "11_meeting", "3", "3"]
    assert dict(os.environ) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    Path("trace").unlink()
    run_notebooks({paths[0]: out / paths[0].name})
    assert trace() == ["10_meeting", "2"], "who runs it wants no more"


@pytest.mark.slow
def test_to_render_each_has_one_thread(write, monkeypatch, capfd):
    cores(monkeypatch, 8)
    path = write("10_some")
    assert cli.main(["render", str(path)]) == 0
    assert trace() == ["10_some", "1"]
    assert capfd.readouterr().out == f"rendered {path}\n"
    assert nbformat.read(path, as_version=4).cells[1].execution_count == 1


@pytest.mark.slow
def test_what_does_not_read_a_failed_one_runs(write, out, capfd):
    paths = [
        write("10_failing", "1 / 0"),
        write("11_reading", says="Reads `data/results/10_rows.parquet`."),
        write("12_reading", says="Reads `data/results/11_rows.parquet`."),
        write(
            "13_killed",
            "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(0.5)\nopen('survived', 'w')",
        ),
        write("14_other"),
    ]
    assert cli.main(["run", *map(str, paths)]) == 1
    printed, errors = capfd.readouterr()
    assert printed == f"wrote {out / '14_other.ipynb'}\n"
    told = [line for line in errors.splitlines() if line.startswith("opticam: ")]
    assert told == [
        f"opticam: 10_failing: cell 2 failed with ZeroDivisionError: division by zero; "
        f"what ran is in {out / '10_failing.failed.ipynb'}",
        "opticam: 11_reading: not started, because it reads what 10_failing should have written",
        "opticam: 12_reading: not started, because it reads what 11_reading should have written",
        "opticam: 13_killed: its process ended with -9; it said nothing",
    ]
    assert {path.name for path in out.iterdir()} == {"10_failing.failed.ipynb", "14_other.ipynb"}
    assert not Path("survived").exists()


@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_with_two(write, out, capfd):
    (out / "10_some.ipynb").mkdir(parents=True)
    assert cli.main(["run", str(write("10_some"))]) == 2
    assert re.search(r"^opticam: 10_some: .*Is a directory", capfd.readouterr().err, re.M)
    assert [path.name for path in out.iterdir()] == ["10_some.ipynb"]
    Path("trace").unlink()
    Path("file").touch()
    with pytest.raises(OSError, match=r"output: cannot write in '.*file'"):
        run_notebooks({write("10_some"): Path("file", "o.ipynb").absolute()})
    assert not Path("trace").exists()


def test_errors_are_reported_before_anything_starts(write, out):
    first = write("10_first", says="Reads `data/results/10_rows.parquet` and `data/results/11_rows.parquet`.")
    second = write("11_second", says="Reads `data/results/10_rows.parquet`.")
    with pytest.raises(ValueError, match="10_first and 11_second read each other's results"):
        run_notebooks({first: out / "1.ipynb", second: out / "2.ipynb"})
    for jobs in (0, 1.5, "2", True):
        with pytest.raises(ValueError, match=f"jobs: wanted a whole number of at least 1, got {jobs!r}"):
            run_notebooks({first: out / "1.ipynb"}, jobs=jobs)
    with pytest.raises(ValueError, match="parameter limit: unknown to this notebook"):
        run_notebooks({first: out / "1.ipynb"}, {"limit": 1})
    with pytest.raises(ValueError, match="is the notebook itself"):
        run_notebooks({first: first})
    assert not Path("trace").exists()


BAR = """
import time
from opticam.lab.evaluation import _bar
with _bar(4, True) as bar:
    bar.update(3)
    bar.refresh()
    time.sleep(1)
time.sleep(1)
"""


@pytest.mark.slow
def test_a_log_reports_progress_now_and_then(write, out, capfd, monkeypatch):
    monkeypatch.setattr(side_by_side, "_QUIET", 0.1)
    path = write("10_some", BAR)
    run_notebooks({path: out / path.name})
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"10_some 00:0\d  starts", lines[0])
    assert any(re.fullmatch(r"10_some 0\d:\d\d  cell 3/3 00:\d\d  75%.* 3/4 \[.*map/s\]", line) for line in lines)
    assert re.fullmatch(r"10_some 0\d:\d\d  cell 3/3 00:\d\d", lines[-1]), "a bar that is over is not shown"
    monkeypatch.setattr(side_by_side, "_QUIET", 1000)
    run_notebooks({path: out / path.name})
    assert capfd.readouterr().err == ""


def test_in_a_terminal_each_run_has_a_line_in_place(monkeypatch):
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal, os.fdopen(reader, "rb", 0) as seen:
        monkeypatch.setattr(sys, "stderr", terminal)

        def shown(wanted: str) -> bool:  # a terminal hands on its text in pieces of any size
            text = b""
            while len(text) < len(wanted) and wanted.encode().startswith(text):
                text += seen.read(len(wanted) - len(text))
            return text == wanted.encode()

        screen = side_by_side.Screen(1)
        screen.show(["one", "two " + 100 * "x"])
        assert shown(f"\r\x1b[Jone\r\ntwo {75 * 'x'}\r\n\x1b[2A")
        screen.say("wrote it", terminal)
        assert shown("\r\x1b[Jwrote it\r\n")
        screen.show(["two"])
        assert shown("\r\x1b[Jtwo\r\n\x1b[1A")


@pytest.fixture
def temporary():
    with tempfile.TemporaryDirectory() as folder:  # the paths of sockets in it are short
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(write, out, temporary, ending):
    """Told to end it says so; when it is killed, what it started ends all the same."""
    pids = "import os\nopen(f'pids{number}', 'w').write(f'{os.getpid()} {os.getppid()}')"
    paths = [write(f"1{number}_long", f"number = {number}", pids, "import time\ntime.sleep(60)") for number in range(2)]
    program = (
        f"import os, pathlib, signal, sys; from opticam import cli; cli.RESULTS = pathlib.Path({str(out)!r}); "
        "os.sched_getaffinity = lambda _: {0, 1}; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # which may be ignored where the tests run
        "sys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", *map(str, paths)],
        env=os.environ | {"TMPDIR": temporary, "TORCHINDUCTOR_CACHE_DIR": str(out.parent)},  # torch keeps its own
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not all(Path(f"pids{number}").exists() and Path(f"pids{number}").read_text() for number in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    if ending != signal.SIGKILL:
        assert process.returncode == 130
        assert errors.endswith("opticam: interrupted\n")
        assert not list(Path(temporary).iterdir())
    started = [int(pid) for number in range(2) for pid in Path(f"pids{number}").read_text().split()]
    deadline = time.monotonic() + 30
    while left := [pid for pid in started if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.05)
    assert not list(out.iterdir())


def test_a_closed_standard_error_is_passed_over(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    screen = Screen(quiet=0)
    screen.show(["at work"])
    screen.say("done", io.StringIO())
