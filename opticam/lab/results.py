"""Tables and arrays on disk: one file each, written whole or not at all, that knows how it came about."""

import errno
import json
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opticam.lab.files import EVIDENCE, PROVENANCE, REPOSITORY, code_digest, replacing
from opticam.methods import GRAD_CAMS
from opticam.metrics import probability_metrics
from opticam.state import in_a_line

_TAKEN = (PROVENANCE.decode(), "file", "allow_pickle")  # names that the archive, or `np.savez`, has a use for


def write_rows(rows: pd.DataFrame, path: str | Path, parameters: Mapping[str, Any], device: str = "cpu") -> Path:
    """Write a table with its provenance; a file of that name is replaced in one step.

    Args:
        rows: the table; an index that has a name, such as that of a summary, becomes a column. Integers without a name
            are left out.
        path: where, `.parquet`, and what is returned; folders are made. OSError: it cannot be written.
        parameters: what the rows were computed with; JSON.
        device: where they were computed.

    Raises:
        TypeError: rows that are not a table; parameters that are no dict, or no JSON.
        ValueError: another index without a name; two columns of one name, or one of mixed values.
    """
    if not isinstance(rows, pd.DataFrame):
        raise TypeError(f"rows: wanted a table of pandas, got {in_a_line(rows)}")
    named = any(name is not None for name in rows.index.names)
    if not (named or pd.api.types.is_integer_dtype(rows.index.dtype)):
        raise ValueError("rows: wanted a name for the index, which becomes a column, got none")
    try:
        table = pa.Table.from_pandas(rows.reset_index() if named else rows, preserve_index=False)
    except (ValueError, pa.ArrowException) as error:
        told = error.args[-1]  # the last names the column
        raise ValueError(f"rows: wanted columns of different names, each with values of one kind ({told})") from error
    provenance = _provenance(parameters, device).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), PROVENANCE: provenance})
    with replacing(Path(path)) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
    return Path(path)


def read_rows(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table that `write_rows` wrote to a `.parquet` file, and its provenance.

    Returns:
        The rows, and `parameters`, `package`, `code`, `commit`, `device`, `torch`.

    Raises:
        OSError: no such file.
        ValueError: a file without provenance of this package, a damaged one, or no Parquet at all.
    """
    path = _existing(Path(path))
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        rows = table.to_pandas()
    except Exception as error:  # damaged bytes may end in any, also in an OSError, then without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"results: {path} is not a Parquet file, or damaged") from error
    return rows, _read_provenance((table.schema.metadata or {}).get(PROVENANCE), path)


def read_evidence(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows behind the pages' claims, shipped in `data/evidence`, and their provenance; errors as `read_rows`.

    A metric that is younger than the rows is computed from their probabilities; the change of log-odds is then NaN
    where one of them is exactly 0 or 1. Numbers shipped in single precision come in double. A method that is Grad-CAM
    under another name on the network of the rows is left out, as `methods.one_per_map` does.
    """
    rows, provenance = read_rows(EVIDENCE / f"{name}.parquet")
    rows = rows.astype(dict.fromkeys(rows.select_dtypes("float32").columns, float))
    if {"method", "prob", "masked_prob"} <= {*rows}:
        p, o = (torch.tensor(rows[part].to_numpy(float)) for part in ("prob", "masked_prob"))
        change = o.logit() - p.logit()
        younger = {column: metric(p, o) for column, metric in probability_metrics().items() if column not in rows}
        younger |= {} if "log_odds" in rows else {"log_odds": change.where(change.isfinite(), torch.nan)}
        rows = rows.assign(**{column: values.numpy() for column, values in younger.items()})
        outcomes = {method: group["masked_prob"].to_numpy() for method, group in rows.groupby("method")}
        own = outcomes.get("grad_cam", np.empty(0))
        same = [name for name in GRAD_CAMS if len(outcomes.get(name, ())) == len(own) > 0]
        same = [name for name in same if np.allclose(outcomes[name], own, atol=1e-4, equal_nan=True)]
        rows = rows[~rows["method"].isin(same)]
    return rows, provenance


def write_arrays(
    arrays: Mapping[str, np.ndarray], path: str | Path, parameters: Mapping[str, Any], device: str = "cpu"
) -> Path:
    """Write arrays of numbers or text by name, such as photos and maps, to an `.npz`; all else as `write_rows`.

    Raises:
        TypeError: not arrays by name.
        ValueError: an array of objects, which would be read by running code; a name that is taken.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays: wanted arrays by name, got {in_a_line(arrays)}")
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"arrays: wanted text as names, got {in_a_line(name)}")
        if name in _TAKEN or name.endswith(".npy"):
            raise ValueError(f"arrays: wanted another name than {', '.join(_TAKEN)} or .npy at its end, got {name}")
        if not isinstance(getattr(array, "dtype", None), np.dtype):
            raise TypeError(f"arrays: wanted arrays of numpy, {name} is a {type(array).__name__}")
        if array.dtype.hasobject:
            raise ValueError(f"arrays: wanted numbers or text, {name} holds objects")
    provenance = np.array(_provenance(parameters, device))
    contents: dict[str, Any] = {**arrays, PROVENANCE.decode(): provenance}
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **contents)
    return Path(path)


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name that `write_arrays` wrote, and their provenance; result and errors as `read_rows`."""
    path = _existing(Path(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # damaged bytes may end in any
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the latter from a damaged place
            raise
        raise ValueError(f"results: {path} is not an archive of plain arrays, or damaged") from error
    provenance = arrays.pop(PROVENANCE.decode(), None)
    return arrays, _read_provenance(None if provenance is None else str(provenance), path)


def is_done(path: str | Path, parameters: Mapping[str, Any]) -> bool:
    """Whether `write_rows` has written the file with these parameters, and the package has not changed since."""
    try:
        provenance = json.loads(pq.read_schema(path).metadata[PROVENANCE])
        found = provenance["parameters"], provenance.get("code")
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return False
    given = json.loads(json.dumps(dict(parameters)))
    return found == (given, code_digest())


def read_shards(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of all files that `evaluation.stream` wrote into a folder, checked to be complete.

    Args:
        folder: of `00000.parquet`, `00001.parquet`, ...; hidden files, such as macOS adds, are passed over.

    Returns:
        The rows, in the order of the images; and the provenance of the first file.

    Raises:
        OSError: no such folder, or nothing in it.
        ValueError: files are missing or do not belong together, or an image has two rows of the same method.
    """
    paths = [path for path in Path(folder).glob("*.parquet") if not path.name.startswith(".")]
    paths.sort(key=lambda path: (len(path.name), path.name))  # as text, 100000 comes before 99999
    if not paths:
        raise FileNotFoundError(f"results: no shards in {folder}")
    tables, provenances = zip(*map(read_rows, paths), strict=True)
    parameters = [provenance["parameters"] for provenance in provenances]
    shards = parameters[0].get("shards")
    number = shards if isinstance(shards, int) else 0
    found = [other.get("shard") for other in parameters]
    if found != list(range(number)):
        raise ValueError(f"results: {folder} holds the shards {found}; wanted all of 0..{number - 1}")
    alike = {"shard": None, "files": None}
    if any(other | alike != parameters[0] | alike for other in parameters):
        raise ValueError(f"results: the shards in {folder} were written with different parameters; wanted one run's")
    if any(provenance.get("code") != provenances[0].get("code") for provenance in provenances):
        raise ValueError(f"results: the shards in {folder} were written by different versions; wanted one run's")
    rows: pd.DataFrame = pd.concat(tables, ignore_index=True)
    if not {"image", "method"} <= {*rows}:
        raise ValueError(f"results: {folder} holds rows without image or method; wanted those of `evaluate`")
    twice = rows[rows.duplicated(["image", "method"])]
    if len(twice):
        raise ValueError(f"results: {folder} holds {twice['image'].iloc[0]} twice; wanted one row per image and method")
    return rows, provenances[0]


def _existing(path: Path) -> Path:
    if not path.is_file():
        number = re.match(r"\d\d(?=_)", path.name)
        source = f"; notebook {number[0]} writes it: opticam run {number[0]}" if number else ""
        raise FileNotFoundError(f"results: no file at {path}{source}")
    return path


def _read_provenance(text: str | bytes | None, path: Path) -> dict[str, Any]:
    if text is None:
        raise ValueError(f"results: {path} was not written by opticam; it has no provenance")
    try:
        provenance = json.loads(text)
    except (ValueError, RecursionError):
        provenance = None
    if not isinstance(provenance, dict) or not isinstance(provenance.get("parameters"), dict):
        raise ValueError(f"results: {path} has a damaged provenance; wanted JSON with parameters")
    return provenance


def _provenance(parameters: Mapping[str, Any], device: str) -> str:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: wanted a dict, got {in_a_line(parameters)}")
    provenance = {
        "parameters": dict(parameters),
        "package": version("opticam"),
        "code": code_digest(),
        "commit": _commit(),
        "device": device,
        "torch": torch.__version__,
    }
    try:
        return json.dumps(provenance)
    except (TypeError, ValueError) as error:
        raise TypeError(f"parameters: wanted what JSON can hold ({error})") from error


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
