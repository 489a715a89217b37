"""How long a user's commands take in two clones of the repository, in turn, with nothing else running.

Both clones must be set up. The new one is timed first and last, so that a machine that drifts shows.
"""

import argparse
import resource
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from common import report

GIT = shutil.which("git") or "git"


def timed(clone: Path, commands: list[str]) -> dict[str, Any]:
    """Run commands one after another in a clone without an earlier run's files: seconds and exit codes."""
    subprocess.run([GIT, "clean", "-qfdX", "data", "figures"], cwd=clone, check=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    codes = [subprocess.run(shlex.split(command), cwd=clone).returncode for command in commands]
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    commit = subprocess.check_output([GIT, "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    return {"commit": commit, "seconds": seconds, "processor seconds": processor, "exit codes": codes}


def main() -> None:
    """Time new, old, new, old, ..., new and write every run with the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--commands", nargs="+", default=["make figures"], help="run in both clones")
    parser.add_argument("--also-old", nargs="*", default=[], help="run after them in the old clone")
    parser.add_argument("--repeats", type=int, default=1, help="runs of the old clone")
    parser.add_argument("--name", default="commands", help="results/NAME.json is written")
    options = parser.parse_args()
    rows = []
    for turn in range(2 * options.repeats + 1):
        clone, more = (options.old, options.also_old) if turn % 2 else (options.new, [])
        rows.append({"clone": "old" if turn % 2 else "new", **timed(clone, options.commands + more)})
        print(rows[-1], flush=True)
    times = {clone: [row["seconds"] for row in rows if row["clone"] == clone] for clone in ("new", "old")}
    ratio = statistics.median(times["new"]) / statistics.median(times["old"])
    report(options.name, rows, commands=options.commands, also_old=options.also_old, ratio=ratio)
    print(f"new / old: {ratio:.2f}")


if __name__ == "__main__":
    main()
