"""Where the repository is, files written whole or not at all, and the state of the code: all without a library."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent
EVIDENCE = REPOSITORY / "data" / "evidence"  # the rows behind the pages' claims
PROVENANCE = b"opticam"  # in the metadata of a table
RENDERING = "OPTICAM_RENDER"  # in the environment of a render: findings must hold, and are committed
_LIBRARIES: tuple[str, ...] = ("torch", "torchvision", "timm", "transformers", "captum", "grad-cam", "torchcam")
_LIBRARIES += ("numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow")
_SHOWS = ("__main__.py", "cli.py", "lab/plotting.py", "lab/explorer.py", "lab/findings.py")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write under; unless writing fails, the file is renamed to `path` in one step.

    Args:
        path: the name; folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}")  # no other's, elsewhere too
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def code_digest() -> str:
    """Identifies the code that makes rows, as this process runs it, even if the files change.

    What only shows rows (pictures, explorer, findings, command line) and what runs notebooks does not count.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in _SHOWS and not name.startswith("jobs/"):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """The versions of the installed libraries whose code makes rows, too."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
