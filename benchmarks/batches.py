"""Many tiny runs of a batch on a local cluster: what a run costs beside its own cells, and whether memory grows.

The same notebook is also run by `run_notebook` alone, without a cluster, for the ratio. The driver's process holds the
scheduler too; workers start afresh and are counted together.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
from common import report
from nbformat.v4 import new_code_cell, new_notebook

from opticam.jobs.batch import read_batches
from opticam.jobs.cluster import run_batch
from opticam.jobs.runner import run_notebook

PARAMETERS = 'number: int = 0  # which\nresults: str = ""  # for the table'
BODY = """
import pyarrow as pa, pyarrow.parquet as pq, time
from pathlib import Path
time.sleep(0.1)
Path(results).mkdir(parents=True, exist_ok=True)
pq.write_table(pa.table({"number": [number]}), f"{results}/10_tiny.parquet")
"""


def main() -> None:
    """Run the batch, sample memory meanwhile, print seconds a run and memory by the number of runs that were done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--alone", type=int, default=10, help="runs without a cluster")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY.strip())]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "10_tiny.ipynb")
        text = f"notebook: 10_tiny.ipynb\ngrid: {{number: {list(range(options.runs))}}}\noutput: out\n"
        (folder / "many.yaml").write_text(text)
        start = time.perf_counter()
        for number in range(options.alone):
            where = {"number": number, "results": str(folder / "alone")}
            run_notebook(folder / "10_tiny.ipynb", folder / "alone.ipynb", where, progress=False)
        alone = (time.perf_counter() - start) / options.alone
        (batch,) = read_batches(folder / "many.yaml")
        ended, samples = threading.Event(), []
        thread = threading.Thread(target=_sample, args=(batch.folder, ended, samples))
        thread.start()
        start = time.perf_counter()
        records = run_batch(batch.runs, jobs=options.workers)
        seconds = time.perf_counter() - start
        ended.set()
        thread.join()
        inside = sum(_seconds_of_papermill(run.output) for run in batch.runs) / options.runs
    assert all(record["status"] == "done" for record in records)
    each = seconds * options.workers / options.runs
    rows = [
        {"runs done": done, "driver and scheduler MiB": driver, "workers MiB": workers}
        for share in (0.1, 0.25, 0.5, 0.75, 0.95)
        for done, driver, workers in [min(samples, key=lambda sample: abs(sample[0] - share * options.runs))]
    ]
    print(f"{each:.2f} s a run on a worker, {inside:.2f} s of it papermill's; {alone:.2f} s a run without a cluster")
    report(
        "batches",
        rows,
        runs=options.runs,
        workers=options.workers,
        seconds_a_run=each,
        seconds_of_papermill=inside,
        seconds_a_run_alone=alone,
        over_papermill=each - inside,
        over_alone=each / alone,
    )


def _seconds_of_papermill(path: Path) -> float:
    return nbformat.read(path, as_version=4).metadata.papermill.duration


def _sample(folder: Path, ended: threading.Event, samples: list[tuple[int, float, float]]) -> None:
    process = psutil.Process()
    while not ended.wait(1):
        try:
            workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
            memory = [sum(one.memory_info().rss for one in group) / 2**20 for group in ([process], workers)]
        except psutil.Error:
            continue
        samples.append((len(list(folder.glob("*.json"))), *memory))


if __name__ == "__main__":
    main()
