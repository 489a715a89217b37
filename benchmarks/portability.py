"""Which findings of the notebooks survive another processor: every page again, one thing changed at a time.

The changes are those that move single-precision results from machine to machine: the instructions that oneDNN and
torch may use, the number of threads, and photos touched by noise far below what an image file can hold. Each leaves
its findings in a folder of its own; what is there is not computed again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from common import report

from opticam.jobs.runner import list_notebooks
from opticam.lab.findings import COMMITTED

NOISE = """
import torch
from opticam.lab import datasets
exact = datasets.to_input
def touched(*args, **kwargs):
    images = exact(*args, **kwargs)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 1e-6 * noise).clamp(0, 1)
datasets.to_input = touched
"""
CHANGES = {
    "as it is": {},
    "oneDNN SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN AVX512_CORE": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "ATen default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATen avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "noise of 1e-6": {"noise": "1"},
}
OPTICAM = [sys.executable, "-c", "import sys; from opticam.cli import main; sys.exit(main())"]


def run(page: str, change: str, folder: Path) -> None:
    """Execute a notebook under a change; its findings are in `folder` afterwards, or it has failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | CHANGES[change]
    with tempfile.TemporaryDirectory() as startup:
        if environment.pop("noise", None):
            place = Path(startup, "profile_default", "startup")
            place.mkdir(parents=True)
            (place / "noise.py").write_text(NOISE)
            environment["IPYTHONDIR"] = startup
        output = folder / "notebooks" / f"{page}.ipynb"
        places = ["-p", f"results={folder}", "-p", f"figures={folder / 'figures'}"]
        subprocess.run([*OPTICAM, "run", page, *places, "-o", str(output)], env=environment, check=True)


def main() -> None:
    """Run what is missing, then say which findings hold under all changes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=COMMITTED.parent / "results" / "portability")
    parser.add_argument("--notebooks", nargs="+", default=[path.stem for path in list_notebooks()])
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--report-only", action="store_true", help="of what is there")
    options = parser.parse_args()
    for change in [] if options.report_only else options.changes:
        folder = options.folder.absolute() / change.replace(" ", "_")
        for page in options.notebooks:
            if not (folder / "findings" / f"{page}.json").is_file():
                run(page, change, folder)
        shutil.rmtree(folder / "figures", ignore_errors=True)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for change in options.changes:
        for path in sorted((options.folder / change.replace(" ", "_") / "findings").glob("*.json")):
            for entry in json.loads(path.read_text())["findings"]:
                value = "?" if entry["value"] is None else f"{entry['value']:.2f}"
                place = found.setdefault((path.stem, entry["finding"]), {})
                place[change] = value if entry["holds"] else f"{value}, does not hold"
    rows = [
        {
            "page": page,
            "finding": text,
            "holds in": f"{sum('not' not in value for value in values.values())} of {len(values)}",
            **values,
        }
        for (page, text), values in found.items()
    ]
    report("portability", rows, changes={name: CHANGES[name] for name in options.changes})
    flipped = pd.DataFrame([row for row in rows if any("not hold" in str(value) for value in row.values())])
    print(flipped.to_markdown(index=False) if len(flipped) else "all findings hold under all changes that were run")


if __name__ == "__main__":
    main()
