"""Tables and arrays on disk: one file each, written whole or not at all, that knows how it came about."""

import dis
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path, PurePath
from types import CodeType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from opticam.datasets import REPOSITORY

_KEY = b"opticam"


def write_rows(rows: pd.DataFrame, path: str | Path, parameters: Mapping[str, Any], device: str = "cpu") -> Path:
    """Write a table with its provenance; a file of that name is replaced in one step.

    Args:
        rows: the table.
        path: where, `.parquet`; folders are made.
        parameters: what the rows were computed with; JSON.
        device: where they were computed.

    Returns:
        The path written.

    Raises:
        OSError: the place cannot be written.
    """
    table = pa.Table.from_pandas(rows, preserve_index=False)
    provenance = json.dumps(_provenance(parameters, device)).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: provenance})
    with replacing(Path(path)) as temporary:
        pq.write_table(table, temporary)
    return Path(path)


def read_rows(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table that `write_rows` wrote, and its provenance.

    Args:
        path: the `.parquet` file.

    Returns:
        The rows, and `parameters`, `package`, `code`, `commit`, `device`, `torch`.

    Raises:
        OSError: no such file.
        ValueError: a file without provenance of this package, or no Parquet at all.
    """
    path = _existing(Path(path))
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"results: {path} is not a Parquet file") from error
    metadata = table.schema.metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"results: {path} was not written by opticam; it has no provenance")
    return table.to_pandas(), json.loads(metadata[_KEY])


def write_arrays(
    arrays: Mapping[str, np.ndarray], path: str | Path, parameters: Mapping[str, Any], device: str = "cpu"
) -> Path:
    """Write what is no table, such as photos and maps, with its provenance; see `write_rows`.

    Args:
        arrays: name -> array of numbers or text.
        path: where, `.npz`; folders are made.
        parameters: what the arrays were computed with; JSON.
        device: where they were computed.

    Returns:
        The path written.

    Raises:
        OSError: the place cannot be written.
        ValueError: an array of objects, which would be read by running code.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"arrays: wanted numbers or text, {name} holds objects")
    provenance = np.array(json.dumps(_provenance(parameters, device)))
    contents: dict[str, Any] = {**arrays, _KEY.decode(): provenance}
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **contents)
    return Path(path)


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that `write_arrays` wrote, and their provenance.

    Args:
        path: the `.npz` file.

    Returns:
        Name -> array, and the provenance as in `read_rows`.

    Raises:
        OSError: no such file.
        ValueError: a file without provenance of this package, or one that is no archive of plain arrays.
    """
    path = _existing(Path(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"results: {path} is not an archive of plain arrays") from error
    if _KEY.decode() not in arrays:
        raise ValueError(f"results: {path} was not written by opticam; it has no provenance")
    return arrays, json.loads(str(arrays.pop(_KEY.decode())))


def is_done(path: str | Path, parameters: Mapping[str, Any]) -> bool:
    """Whether `write_rows` has written the file with these parameters, and the package has not changed since."""
    try:
        provenance = json.loads(pq.read_schema(path).metadata[_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return False
    given = json.loads(json.dumps(dict(parameters)))
    return (provenance["parameters"], provenance.get("code")) == (given, code_digest())


def read_shards(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of all files that `evaluate.stream` wrote into a folder, checked to be complete.

    Args:
        folder: of `00000.parquet`, `00001.parquet`, ...

    Returns:
        The rows, in the order of the images; and the provenance of the first file.

    Raises:
        OSError: no such folder, or nothing in it.
        ValueError: files are missing or do not belong together, or an image has two rows of the same method.
    """
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"results: no shards in {folder}")
    tables, provenances = zip(*map(read_rows, paths), strict=True)
    parameters = [provenance["parameters"] for provenance in provenances]
    shards = parameters[0].get("shards")
    found = [other.get("shard") for other in parameters]
    if found != list(range(shards or 0)):
        raise ValueError(f"results: {folder} holds the shards {found}; wanted all of 0..{(shards or 0) - 1}")
    alike = {"shard": None, "files": None}
    if any(other | alike != parameters[0] | alike for other in parameters):
        raise ValueError(f"results: the shards in {folder} were written with different parameters; wanted one run's")
    if len({provenance["code"] for provenance in provenances}) > 1:
        raise ValueError(f"results: the shards in {folder} were written by different versions; wanted one run's")
    rows: pd.DataFrame = pd.concat(tables, ignore_index=True)
    twice = rows[rows.duplicated(["image", "method"])]
    if len(twice):
        raise ValueError(f"results: {folder} holds {twice['image'].iloc[0]} twice; wanted one row an image and method")
    return rows, provenances[0]


def _existing(path: Path) -> Path:
    if not path.is_file():
        number = re.match(r"\d\d(?=_)", path.name)
        source = f"; notebook {number[0]} writes it: opticam run {number[0]}" if number else ""
        raise FileNotFoundError(f"results: no file at {path}{source}")
    return path


def describe(value: Any, model: nn.Module, around: tuple = ()) -> Any:
    """A method, or an option of one, as JSON: the same in every process, and another where the method is another.

    Functions of installed packages go by their name and code; those of a notebook, a script or a module of your own
    also by what they read from around them. Layers go by their name in the model, tensors and other networks by their
    content.

    Args:
        value: a function, a `functools.partial` of one, or what is among its arguments.
        model: that the method is to explain.
        around: what this is a part of.

    Raises:
        ValueError: something that only this process can tell from others of its kind.
    """
    inner = partial(describe, model=model, around=(*around, value))
    if isinstance(value, int | float | str | bool | None):
        return value
    if isinstance(value, torch.dtype | torch.device | PurePath | Enum):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        return digest_of(value)
    if isinstance(value, nn.Module):
        names = [name for name, module in getattr(model, "network", model).named_modules() if module is value]
        return names[0] if names else network_digest(value)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if any(value is other for other in around):  # functions may call each other
        return name
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, map(inner, value)))  # their order differs from process to process
    if isinstance(value, partial):
        return [inner(part) for part in (value.func, value.args, value.keywords)]
    if inspect.isfunction(value):
        if name.startswith("opticam.") and "<" not in name:  # see code_digest
            return name
        read = dict(inspect.getclosurevars(value).nonlocals)
        if not _installed(value):
            names = sorted(_globals(value.__code__) & value.__globals__.keys())
            read |= {word: value.__globals__[word] for word in names}
        return [name, _code(value.__code__), inner(value.__defaults__), inner(value.__kwdefaults__), inner(read)]
    if inspect.ismethod(value):
        return [inner(value.__func__), inner(value.__self__)]
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value):
        own = {} if _installed(value) else {key: getattr(item, "__func__", item) for key, item in vars(value).items()}
        return [name, inner({key: item for key, item in own.items() if inspect.isfunction(item)})]
    if hasattr(value, "__wrapped__"):
        return [name, inner(value.__wrapped__)]
    if inspect.isbuiltin(value) or inspect.ismethoddescriptor(value):
        return name
    if hasattr(value, "__dict__"):
        return [inner(type(value)), inner(vars(value))]
    raise ValueError(
        "methods: wanted functions whose options are numbers, text, tensors, layers or functions, so that rows are "
        f"recognised when the run goes on; got {value!r} of {type(value).__name__}"
    )


def _installed(value: Any) -> bool:
    """Whether a function or class belongs to a package, which is not edited between two runs."""
    module = sys.modules.get(value.__module__ or "__main__")
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a notebook's
        return value.__module__ not in (None, "__main__")
    return any(Path(file).is_relative_to(sysconfig.get_path(place)) for place in ("purelib", "platlib", "stdlib"))


def _globals(code: CodeType) -> set[str]:
    """Names that code, and code inside it, reads from its module."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*(_globals(item) for item in code.co_consts if isinstance(item, CodeType)))


def _code(code: CodeType) -> list[Any]:
    constants = [_code(item) if isinstance(item, CodeType) else _constant(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _constant(item: object) -> Any:
    return sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)


def network_digest(network: nn.Module) -> str:
    """Tells networks apart: by their modules, what these are set to, and their weights."""
    settings = [
        (name, key, item)
        for name, module in network.named_modules()
        for key, item in vars(module).items()
        if key != "training" and not key.startswith("_") and isinstance(item, int | float | str | None)
    ]
    return digest_of(type(network).__qualname__, str(network), *settings, *network.state_dict().items())


def digest_of(*values: Any) -> str:
    """SHA-256 of values: tensors and arrays, alone or in tuples, by their content, others by their `repr`."""
    digest = hashlib.sha256()
    for value in values:
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Tensor):
                digest.update(repr((part.dtype, tuple(part.shape))).encode())
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            elif isinstance(part, np.ndarray):
                digest.update(repr((part.dtype, part.shape)).encode() + part.tobytes())
            else:
                digest.update(repr(part).encode())
            digest.update(b";")
    return digest.hexdigest()


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


def _provenance(parameters: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {
        "parameters": dict(parameters),
        "package": version("opticam"),
        "code": code_digest(),
        "commit": _commit(),
        "device": device,
        "torch": torch.__version__,
    }


@cache
def code_digest() -> str:
    """Tells one state of the package's code from another; of what this process runs, whatever becomes of the files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
