"""Runs of a batch on Dask: on workers that somebody started, or on a local cluster of its own; one notebook per worker.

A worker takes one run at a time and holds a lock on it. So no notebook is executed twice at the same time, even if
somebody else started the same batch. A worker that is killed takes its kernel with it, and another worker starts the
run again.
"""

import fcntl
import glob
import hashlib
import logging
import os
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import dask
import psutil
from distributed import Client, Future, Nanny, Scheduler, SpecCluster, Worker, get_worker
from tqdm import tqdm

from opticam.jobs.batch import Run, read_record, run_key, write_record
from opticam.jobs.runner import (
    NotebookError,
    check_jobs,
    check_writable,
    latest,
    notebook_parameters,
    places_beside,
    read_cells,
    run_notebook,
)
from opticam.jobs.side_by_side import THREADS, Screen
from opticam.lab.files import code_digest

_PATIENCE = 10.0  # seconds for a scheduler to answer
_SECONDS = 0.5  # between two looks at a run
_LINES = 60.0  # seconds between two lines about all runs where nobody watches
_ONE_AT_A_TIME = threading.Lock()  # kernels inherit the environment, and that belongs to the process


def run_batch(
    runs: Sequence[Run], *, scheduler: str | None = None, jobs: int | None = None, retry_failed: bool = False
) -> list[dict[str, Any]]:
    """Execute the runs that are not done, and show progress.

    Args:
        runs: of a batch.
        scheduler: address of a Dask scheduler, or the file that it wrote; None for a cluster on this machine.
        jobs: runs at the same time on this machine; by default one for each set of GPUs that a run wants, else one for
            every four cores but at least two. The cores are shared out among them.
        retry_failed: also start runs that failed before with the same notebook, package and parameters.

    Returns:
        The record of each run, in their order; `status` is "done" or "failed".

    Raises:
        OSError: the output cannot be written, or the scheduler cannot be reached or was lost.
        ValueError: this machine lacks the GPUs that a run wants, or `jobs` is not a positive whole number.
    """
    check_jobs(jobs)
    if not runs:
        return []
    folder = runs[0].folder
    check_writable(folder)
    records = {run.name: read_record(run) for run in runs}
    settled = {"done"} if retry_failed else {"done", "failed"}
    waiting = [run for run in runs if records[run.name]["status"] not in settled]
    if waiting:
        board = _Board(len(runs), [record["status"] for record in records.values() if record["status"] in settled])
        topic = f"opticam-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
        with _connected(scheduler, waiting, jobs) as client, board.shown(client, topic):
            for run, record in _execute_all(client, waiting, topic, board.watch):
                if record["status"] == "unwritable":
                    raise OSError(f"output: cannot write in {str(folder)!r} ({record['error']})")
                records[run.name] = record
                board.end(run, record)
    return [records[run.name] for run in runs]


def execute(run: Run, topic: str) -> dict[str, Any]:
    """On a worker: execute a run that is not done, and return its record.

    Waits while the same run is at work elsewhere. Returns the status "unwritable" if its files cannot be written, and
    "cancelled" if nobody wants it any more.
    """
    worker = get_worker()
    with tempfile.TemporaryDirectory(prefix="opticam-") as folder, _ONE_AT_A_TIME:
        progress = Path(folder) / "progress"
        with _watched(worker, lambda: worker.log_event(topic, {"name": run.name, "bar": latest(progress)})) as gone:
            try:
                with (run.folder / f".{run.name}.lock").open("a") as lock:
                    while not _taken(lock):
                        if gone.wait(_SECONDS):
                            return {"status": "cancelled"}
                    record = read_record(run)
                    return record if record["status"] == "done" else _execute(run, progress, gone)
            except OSError as error:
                return {"status": "unwritable", "error": error.strerror or str(error)}


def _taken(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it with the process, however that ends
    except BlockingIOError:
        return False
    return True


def _execute(run: Run, progress: Path, gone: threading.Event) -> dict[str, Any]:
    for left in run.folder.glob(f".{glob.escape(run.name)}.*.ipynb"):  # by a worker that was killed
        left.unlink(missing_ok=True)
    # or the rows of an older run might pass for those of this one, or the other way round
    for left in (run.folder / f"{run.name}.json", *run.table.parent.glob("*.parquet")):
        left.unlink(missing_ok=True)
    if code_digest() != run.code:
        return write_record(run, "failed", 0, "the worker runs another version of the package than the batch wants")
    if run_key(read_cells(run.notebook), run.code, run.parameters) != run.key:
        return write_record(run, "failed", 0, f"{run.notebook.name} has changed since the batch began; start it again")
    threads = os.environ.get("OPTICAM_THREADS") or str(len(os.sched_getaffinity(0)))
    os.environ |= dict.fromkeys(THREADS, threads)  # Dask's workers set 1
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)  # Dask's is for workers that hold data, and slows the kernel down
    parameters = {**places_beside(run.output, notebook_parameters(run.notebook)), **run.parameters}
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and stays behind where one is killed
    start, error = time.perf_counter(), None
    try:
        run_notebook(run.notebook, run.output, parameters, progress=progress)
    except (NotebookError, ValueError) as reason:
        error = str(reason)
    if gone.is_set():
        run.output.with_suffix(".failed.ipynb").unlink(missing_ok=True)  # it did not fail, it was stopped
        return {"status": "cancelled"}
    return write_record(run, "failed" if error else "done", time.perf_counter() - start, error)


@contextmanager
def _watched(worker: Worker, tell: Callable[[], None]) -> Iterator[threading.Event]:
    """Report progress; kill the kernel and set the event once the scheduler has cancelled the task."""
    key = worker.get_current_task()
    gone, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            task = worker.state.tasks.get(key)
            if task is not None and task.state != "cancelled":
                tell()
                continue
            gone.set()
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if any("ipykernel" in word for word in child.cmdline()):
                        child.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield gone
    finally:
        ended.set()
        thread.join()


def _execute_all(
    client: Client, runs: Sequence[Run], topic: str, watch: Callable[[], None]
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with its record, as they end; `watch` is called while none ends."""
    ended: queue.Queue[Future] = queue.Queue()
    at_work: dict[Any, tuple[Run, Future]] = {}
    for run in runs:
        resources = {"GPU": run.gpus} if run.gpus else None
        future = client.submit(execute, run, topic, key=f"{topic}-{run.name}-{run.key[:12]}", resources=resources)
        at_work[future.key] = run, future
        future.add_done_callback(ended.put)
    try:
        while at_work:
            try:
                future = ended.get(timeout=_SECONDS)
            except queue.Empty:
                watch()
                continue
            run, _ = at_work.pop(future.key)
            if future.status == "finished":
                yield run, future.result()
            elif future.status == "error":
                yield run, write_record(run, "failed", 0, f"its worker failed: {future.exception()}")
            else:
                raise ConnectionError("scheduler: the connection was lost; the same command resumes")
    finally:  # interrupted: the workers end their kernels
        client.cancel([future for _, future in at_work.values()])


@contextmanager
def _connected(scheduler: str | None, runs: Sequence[Run], jobs: int | None) -> Iterator[Client]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is in the records
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # the workers' too
    dask.config.set(
        {
            "distributed.scheduler.worker-saturation": 1.0,  # no run waits behind a long one
            # else every worker and the driver look at themselves fifty times a second, for a tenth of a core
            "distributed.admin.tick.interval": "1s",
            "distributed.worker.profile.enabled": False,
        }
    )
    if scheduler is None:
        with _local_cluster(runs, jobs) as cluster, Client(cluster) as client:
            yield client
        return
    place = "scheduler_file" if Path(scheduler).is_file() else "address"
    try:
        client = Client(**{place: scheduler}, timeout=_PATIENCE)
    except (OSError, TimeoutError, ValueError, KeyError) as error:
        told = f"scheduler: wanted the address or file of a Dask scheduler; none at {scheduler!r}"
        raise ConnectionError(told) from error
    with client:
        yield client


def _local_cluster(runs: Sequence[Run], jobs: int | None) -> SpecCluster:
    gpus = max(run.gpus for run in runs)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    cores = len(os.sched_getaffinity(0))
    if gpus and devices == [""]:
        import torch  # here, since workers do without it

        devices = [str(i) for i in range(torch.cuda.device_count())]
    if gpus > len(devices):
        found = f"this machine has {len(devices)}; see also --scheduler"
        raise ValueError(f"resources: wanted {gpus} GPU for each run, {found}")
    most = len(devices) // gpus if gpus else jobs or max(2, cores // 4)
    number = min(len(runs), most, jobs or most)
    workers = {}
    for i in range(number):
        env = {"OPTICAM_THREADS": str(max(1, cores // number))}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[i * gpus : (i + 1) * gpus])
        options = {"nthreads": 1, "memory_limit": 0, "env": env, "resources": {"GPU": gpus}, "dashboard": False}
        options |= {"host": "127.0.0.1"}  # else a worker, which runs whatever it is sent, listens to the whole network
        workers[i] = {"cls": Nanny, "options": options}
    options = {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": "127.0.0.1:0"}
    return SpecCluster(workers, {"cls": Scheduler, "options": options}, silence_logs=logging.CRITICAL)


class _Board:
    """What a person sees meanwhile: in a terminal the runs at work, in a log each that ends, and all now and then."""

    def __init__(self, total: int, skipped: Sequence[str]) -> None:
        self.screen = Screen(_LINES)
        self.start = self.last = time.monotonic()  # of the batch, and the end of a run
        self.total = total
        self.counts = Counter(skipped)
        self.over: set[str] = set()
        self.bars: dict[str, str] = {}
        before = f"{self.counts['done']} done before, {self.counts['failed']} failed before"
        self.screen.say(f"{total} runs, {before}", sys.stderr)

    @contextmanager
    def shown(self, client: Client, topic: str) -> Iterator[None]:
        """Follow what the workers report."""
        self.screen.say(f"dashboard: {client.dashboard_link}", sys.stderr)
        client.subscribe_topic(topic, self._told)
        try:
            yield
        finally:
            self.screen.show([])

    def _told(self, event: tuple[float, Mapping[str, str]]) -> None:
        if event[1]["name"] not in self.over:  # the last report may come after the result
            self.bars[event[1]["name"]] = event[1]["bar"]

    def end(self, run: Run, record: Mapping[str, Any]) -> None:
        self.over.add(run.name)
        self.last = time.monotonic()
        self.bars.pop(run.name, None)
        self.counts[record["status"]] += 1
        if not self.screen.terminal:
            number, seconds = f"[{self.counts.total()}/{self.total}]", f"{record.get('seconds', 0):.1f} s"
            self.screen.say(f"{number} {record['status']} {run.name} {seconds}; {self._left()}", sys.stderr)
        self.watch()

    def watch(self) -> None:
        bars = sorted(self.bars.copy().items())
        waiting = self.total - self.counts.total() - len(bars)
        title = f"{self.counts['done']} done, {self.counts['failed']} failed, {len(bars)} running, {waiting} waiting"
        self.screen.show([f"{title}; {self._left()}", *(f"{name}  {bar}" for name, bar in bars)])

    def _left(self) -> str:
        passed, left = time.monotonic() - self.start, self.total - self.counts.total()
        if not self.over or not left:
            return f"{timedelta(seconds=round(passed))} passed"
        whole = (self.last - self.start) * (1 + left / len(self.over))
        return f"about {timedelta(seconds=round(max(0, whole - passed)))} left"
