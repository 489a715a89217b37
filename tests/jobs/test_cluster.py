"""Batches with real processes: workers and drivers that are killed, a scheduler started by hand, a full disk."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from distributed import Client
from nbformat.v4 import new_code_cell, new_notebook

from opticam import cli
from opticam.jobs import cluster
from opticam.jobs.batch import read_batches, read_record

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
PARAMETERS = """
number: int = 0  # which
seconds: float = 0.0  # it takes
size: int = 0  # bytes it prints
results: str = ""  # for the table
""".strip()
BODY = """
import os, time
from pathlib import Path
from types import SimpleNamespace
with open("log", "a") as log:
    print("start", number, os.getpid(), os.getppid(), time.time(), file=log)
time.sleep(seconds)
print("x" * size, os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
assert number < 100, "too large"
import pyarrow as pa, pyarrow.parquet as pq
Path(results).mkdir(parents=True, exist_ok=True)
pq.write_table(pa.table({"square": [number**2]}), f"{results}/10_tiny.parquet")
with open("log", "a") as log:
    print("end", number, os.getpid(), os.getppid(), time.time(), file=log)
"""


@pytest.fixture
def folder(tmp_path):
    """A notebook; afterwards no process of the test may be left."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY.strip())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "10_tiny.ipynb")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield tmp_path
    deadline = time.monotonic() + 60
    while (left := _left(tmp_path, before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left, f"left running: {[process.info['cmdline'] for process in left]}"


def _left(folder, before):
    """Processes of the test: children, and what has this folder as its own or is a kernel of its log."""
    kernels = {int(line[2]) for line in log_of(folder)}
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = str(folder) in " ".join(words) or (process.info["pid"] in kernels and "ipykernel" in " ".join(words))
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE and process.info["pid"] not in before:
            found.append(process)
    return found


def write(folder, numbers, seconds=0.0, more=""):
    path = folder / "some.yaml"
    path.write_text(
        f"notebook: 10_tiny.ipynb\nparameters: {{seconds: {seconds}}}\n"
        f"grid: {{number: {list(numbers)}}}\noutput: out\n{more}"
    )
    return path


def start(path, *words, **options):
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, str(BIN / "opticam"), "batch", str(path), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(path, capfd, *words):
    """The command in this process, which has imported everything: exit code and what was printed."""
    capfd.readouterr()
    return cli.main(["batch", str(path), *words]), *capfd.readouterr()


def log_of(folder):
    log = folder / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def check_never_twice_at_once(folder):
    """No run began while another of the same number was at work; a killed one worked until its killer struck."""
    open_runs: dict[str, int] = {}
    for event, number, pid, *_ in log_of(folder):
        if event == "start":
            other = open_runs.get(number)
            assert other is None or not psutil.pid_exists(other), f"number {number} ran twice at the same time"
            open_runs[number] = int(pid)
        else:
            del open_runs[number]


def test_killed_workers_and_drivers_lose_nothing_and_repeat_nothing(folder, capfd):
    numbers = [*range(7), 100, 101]  # the last two fail
    path = write(folder, numbers, 0.5)
    driver = start(path, "--jobs", "2")
    wait_for(lambda: sum(line[0] == "end" for line in log_of(folder)) >= 2)
    _, _, kernel, worker, _ = wait_for(lambda: log_of(folder)[-1] if log_of(folder)[-1][0] == "start" else None)
    os.kill(int(worker), signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(int(kernel)), 60)
    wait_for(lambda: sum(line[0] == "end" for line in log_of(folder)) >= 4)
    driver.kill()
    driver.wait()
    driver.communicate()
    done = {run.name for run in read_batches(path)[0].runs if read_record(run)["status"] == "done"}
    assert 2 <= len(done) < 7
    times = {name: (folder / "out" / f"{name}.ipynb").stat().st_mtime_ns for name in done}
    wait_for(lambda: not [line for line in log_of(folder) if psutil.pid_exists(int(line[2]))], 60)

    code, printed, errors = finish(path, capfd, "--jobs", "2")
    assert code == 1
    assert "7 done, 2 failed" in printed
    assert f"9 runs, {len(done)} done before" in errors
    assert errors.count("AssertionError: too large; what ran is in ") == 2
    states = Counter(read_record(run)["status"] for run in read_batches(path)[0].runs)
    assert states == {"done": 7, "failed": 2}
    for name, before in times.items():
        assert (folder / "out" / f"{name}.ipynb").stat().st_mtime_ns == before, "what was done is not touched"
    ends = Counter(line[1] for line in log_of(folder) if line[0] == "end")
    assert set(ends) == set(map(str, range(7)))
    names = {item.name for item in (folder / "out").iterdir()}
    assert not [name for name in names if name.startswith(".") and not name.endswith(".lock")], names
    assert {f"number={n}.failed.ipynb" for n in (100, 101)} | {f"number={n}.ipynb" for n in range(7)} == {
        name for name in names if name.endswith(".ipynb")
    }
    check_never_twice_at_once(folder)
    rows = (folder / "out" / "summary.csv").read_text().split()
    assert rows == ['"number","square"', *(f"{n},{n * n}" for n in range(7))]

    started = len(log_of(folder))
    code, _, errors = finish(path, capfd)
    assert code == 1
    assert errors.count("AssertionError: too large") == 2, "failures are reported again"
    assert len(log_of(folder)) == started, "but nothing is started again"


@contextmanager
def dask_cluster(folder, workers=2):
    """A scheduler and workers in processes of their own, as `srun dask worker` would start them."""
    file = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    common = ["--scheduler-file", str(file)]
    dashboard = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    processes = [subprocess.Popen([str(BIN / "dask"), "scheduler", *common, *dashboard], **quiet)]
    try:
        wait_for(file.exists)
        command = [str(BIN / "dask"), "worker", *common, "--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
        for _ in range(workers):
            processes.append(subprocess.Popen([*command, "--resources", "GPU=1"], **quiet))
        yield file
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_a_scheduler_and_workers_started_by_hand(folder, capfd, monkeypatch):
    path = write(folder, range(4), 1.0, "resources: {GPU: 1}")
    with dask_cluster(folder) as file:
        driver = start(path, "--scheduler", str(file))
        _, _, kernel, *_ = wait_for(lambda: log_of(folder) and log_of(folder)[-1])
        driver.kill()
        driver.communicate()
        wait_for(lambda: not psutil.pid_exists(int(kernel)), 60)  # nobody wants its result any more
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", json.loads(file.read_text())["address"])
        code, printed, _ = finish(path, capfd)
    assert code == 0
    assert "4 done, 0 failed" in printed
    assert len({line[3] for line in log_of(folder)[-8:]}) == 2, "both workers worked"
    check_never_twice_at_once(folder)


def test_workers_of_this_machine_listen_to_it_alone(folder):
    """They run whatever they are sent."""
    (made,) = read_batches(write(folder, [0]))
    with cluster._local_cluster(made.runs, 1) as own, Client(own) as client:
        client.wait_for_workers(1, timeout=60)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {at.laddr.ip for process in processes for at in process.net_connections() if at.status == "LISTEN"}
    assert listening
    assert listening <= {"127.0.0.1", "::1"}


def test_a_killed_run_leaves_no_record_or_rows_of_an_older_one(folder, monkeypatch):
    (made,) = read_batches(write(folder, [0]))
    (run,) = made.runs
    run.table.parent.mkdir(parents=True)
    old = run.table, run.table.with_name("10_other.parquet"), folder / "out" / f"{run.name}.json"
    for path in old:
        path.write_text("{}")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "run_notebook", killed)
    with pytest.raises(KeyboardInterrupt):
        cluster._execute(run, folder / "progress", threading.Event())
    assert not any(path.exists() for path in old)


def test_a_notebook_that_changes_while_its_batch_runs_is_not_run(folder):
    (made,) = read_batches(write(folder, [0]))
    (run,) = made.runs
    page = folder / "10_tiny.ipynb"
    page.write_text(page.read_text().replace("too large", "much too large"))
    record = cluster._execute(run, folder / "progress", threading.Event())
    assert record["status"] == "failed"
    assert "10_tiny.ipynb has changed since the batch began" in record["error"]


def test_nobody_answers(folder, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "_PATIENCE", 1.0)
    path = write(folder, [1])
    assert cli.main(["batch", str(path), "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "scheduler: wanted the address or file of a Dask scheduler; none at 'tcp://127.0.0.1:9'" in (
        capsys.readouterr().err
    )


def test_each_run_has_its_own_gpu_and_its_share_of_the_cores_and_waits_for_its_lock(folder, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,8")
    path = write(folder, range(3), 1.0, "resources: {GPU: 1}")
    (folder / "out").mkdir()
    early = []

    def release():
        wait_for(lambda: sum(line[0] == "end" for line in log_of(folder)) == 2)
        early.extend(line for line in log_of(folder) if line[1] == "0")
        lock.close()

    with (folder / "out" / ".number=0.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as if it were at work elsewhere
        thread = threading.Thread(target=release)
        thread.start()
        _, printed, _ = finish(path, capfd, "--jobs", "2")
        thread.join()
    assert not early, "a run that is at work elsewhere was started"
    assert "3 done, 0 failed" in printed
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    texts = [json.dumps(nbformat.read(run.output, as_version=4)) for run in read_batches(path)[0].runs]
    devices = [re.search(rf" {cores} (\d)\\n", text).group(1) for text in texts]
    assert set(devices) == {"5", "7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    path = write(folder, [9], 0, "resources: {GPU: 2}")
    code, _, errors = finish(path, capfd)
    assert code == 2
    assert "resources: wanted 2 GPU for each run, this machine has 1" in errors


def test_the_documents_of_a_file_are_run_one_after_another_and_a_failure_is_told(folder, capfd):
    first = "notebook: 10_tiny.ipynb\ngrid: {number: [2, 100]}\noutput: a\n"
    (folder / "some.yaml").write_text(f"{first}---\nnotebook: 10_tiny.ipynb\nparameters: {{number: 3}}\noutput: b\n")
    code, printed, errors = finish(folder / "some.yaml", capfd, "--jobs", "2")
    assert (code, "failed: number=100: " in errors) == (1, True)
    assert [line for line in printed.splitlines() if "failed" in line] == ["1 done, 1 failed", "1 done, 0 failed"]
    assert [line[1] for line in log_of(folder)][-2:] == ["3", "3"]
    assert all((folder / part / "summary.parquet").is_file() for part in "ab")
    code, printed, _ = finish(folder / "some.yaml", capfd, "--filter", "number=3")
    assert (code, printed.count("done")) == (0, 1)


def test_an_output_that_cannot_be_written_is_one_sentence(folder, capsys):
    (folder / "out").write_text("a file")
    assert cli.main(["batch", str(write(folder, [1]))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opticam: output: cannot write in ")
    assert error.count("\n") == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_counts(folder, capfd):
    path = write(folder, [1, 2])
    path.write_text(path.read_text().replace("{seconds: 0.0}", "{seconds: 0.0, size: 300000}"))
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))}
    driver = start(path, "--jobs", "1", **limit)
    _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 2
    assert f"opticam: output: cannot write in {str(folder / 'out')!r} (File too large)" in errors
    assert "Traceback" not in errors
    assert {read_record(run)["status"] for run in read_batches(path)[0].runs} == {"new"}
    assert not list((folder / "out").glob("number=1*.ipynb"))
    _, printed, _ = finish(path, capfd, "--jobs", "1")
    assert "2 done, 0 failed" in printed


def test_ctrl_c_ends_everything(folder):
    path = write(folder, range(2), 300.0)
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # what runs in the background may not
    driver = start(path, "--jobs", "2", start_new_session=True, **heard)
    wait_for(lambda: len(log_of(folder)) == 2)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert errors.endswith("opticam: interrupted\n")
    assert {read_record(run)["status"] for run in read_batches(path)[0].runs} == {"new"}


def test_a_terminated_driver_leaves_nothing_half_done(folder):
    path = write(folder, range(2), 300.0)
    driver = start(path, "--jobs", "2")
    wait_for(lambda: len(log_of(folder)) == 2)
    driver.terminate()
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert errors.endswith("opticam: interrupted\n")
    assert not [*(folder / "out").glob("*.ipynb"), *(folder / "out").glob(".*.ipynb")]


def test_the_time_left_falls_while_nothing_ends(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now.time))
    board = cluster._Board(4, [])
    assert board._left() == "0:00:00 passed"
    now.time = 100.0
    board.end(SimpleNamespace(name="first"), {"status": "done"})
    assert board._left() == "about 0:05:00 left"  # three more of 100 seconds
    now.time = 130.0
    assert board._left() == "about 0:04:30 left"
    now.time = 500.0
    assert board._left() == "about 0:00:00 left"
