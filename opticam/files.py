"""Where the repository is, files written whole or not at all, and the state of the code: all without a library."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROVENANCE = b"opticam"  # in the metadata of a table


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under; what is there in the end gets the name `path`, in one step, unless writing failed.

    Args:
        path: the name; folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def code_digest() -> str:
    """Tells one state of the package's code from another; of what this process runs, whatever becomes of the files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
