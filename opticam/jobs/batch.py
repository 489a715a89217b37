"""Batches: one YAML file, many runs of a notebook, the state of each run, and the rows of all.

A run is done when its record says so for the key it has now: the notebook's source, the package and the parameters.
"""

import fnmatch
import hashlib
import html
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from opticam.jobs.runner import PATHS, Cell, cast, find_notebook, notebook_parameters, read_cells
from opticam.lab.files import EVIDENCE, PROVENANCE, REPOSITORY, code_digest, replacing

if TYPE_CHECKING:
    import pyarrow as pa

BATCHES = REPOSITORY / "notebooks" / "batches"
OWN = ("figures", "results")  # parameters that a batch sets itself: each run writes into a folder of its own
# the fields of a document, with what they are where they are not given
_FIELDS = {"notebook": "", "parameters": {}, "grid": {}, "shards": 0, "resources": {}, "output": "", "evidence": {}}
_KINDS = {str: "text", dict: "names with values", int: "a whole number"}
_OF_A_PART = {"part", "shard", "shards", "images", "files"}  # parameters of notebooks and of `stream`
_MOST_RUNS = 100_000  # more is a typing error, which would fill the memory before anything is reported
Place = tuple[str | int, ...]


class Run(NamedTuple):
    """One notebook, executed once.

    Attributes:
        name: the name of its files in `folder`, made of what the grid varies.
        notebook: the source.
        parameters: of the notebook, without `figures` and `results`.
        varied: those parameters that the grid or the shards of the batch set.
        folder: the batch's. The run writes NAME.ipynb or NAME.failed.ipynb, NAME.json (its record) and NAME/.
        gpus: how many GPUs it has to itself.
        code: digest of the package that the key was made with.
        key: digest of all that its result depends on.
    """

    name: str
    notebook: Path
    parameters: dict[str, Any]
    varied: dict[str, Any]
    folder: Path
    gpus: int
    code: str
    key: str

    @property
    def output(self) -> Path:
        """Path of the executed notebook."""
        return self.folder / f"{self.name}.ipynb"

    @property
    def table(self) -> Path:
        """Path of the rows for the summary: the table named after the notebook, if it writes one."""
        return self.folder / self.name / f"{self.notebook.stem}.parquet"


class Batch(NamedTuple):
    """What a YAML file, or one document of it, asks for.

    Attributes:
        name: the file's, without its suffix.
        folder: for all that is written.
        runs: in the order of the grid, the last name varying fastest, shards innermost.
        evidence: name of a file in `data/evidence` -> the table of the runs whose rows it holds.
    """

    name: str
    folder: Path
    runs: list[Run]
    evidence: dict[str, str]


def read_batches(path: str | Path) -> list[Batch]:
    """The runs that a YAML file asks for; nothing is written or started.

    A file may hold several documents, separated by lines of `---`: each is a batch, and they are run one after another.
    Fields of each: `notebook` (number, name or path), `parameters` (the same for all runs), `grid` (name -> list of
    values; all combinations are run), `shards` (n: each combination is run n times, with `shard` = 0/n .. n-1/n),
    `resources` (`GPU`: how many each run gets), `output` (folder; by default `data/results/batches/NAME`), `evidence`
    (name -> table, see `write_evidence`). Paths are relative to the file.

    Args:
        path: the file, or the name of one in `notebooks/batches`.

    Raises:
        ValueError: everything that is wrong with the file, one line per error, with its place.
        OSError: no such file.
    """
    places = [place for place in (Path(path), BATCHES / path, BATCHES / f"{path}.yaml") if place.is_file()]
    if not places:
        known = ", ".join(sorted(place.stem for place in BATCHES.glob("*.yaml")))
        raise FileNotFoundError(f"batch: wanted a YAML file or one of {known}, got {str(path)!r}")
    path = places[0]
    text = path.read_bytes()
    try:
        trees: list[yaml.Node | None] = [*yaml.compose_all(text, Loader=yaml.SafeLoader)] or [None]
        contents = list(yaml.safe_load_all(text)) or [None]
    except Exception as error:  # PyYAML raises whatever it stumbles over in a date, a number or a tag
        mark = getattr(error, "problem_mark", None)
        place = f"{path.name}, line {mark.line + 1}" if mark else path.name
        raise ValueError(f"{place}: wanted YAML; {getattr(error, 'problem', None) or repr(error)}") from error
    batches: list[Batch] = []
    told: list[str] = []
    for tree, content in zip(trees, contents, strict=True):
        faults = _Faults(tree)
        batches += _batch(path, content, batches, faults)
        ordered = sorted(faults.told.items(), key=lambda fault: fault[1])
        told += [f"{path.name}, line {line}: {text}" for text, line in ordered]
    if told:
        raise ValueError("\n".join(told))
    return batches


def select_runs(runs: Sequence[Run], filters: Sequence[str]) -> list[Run]:
    """The runs that all filters let pass.

    Args:
        runs: of one batch or several.
        filters: `NAME=PATTERN` of a parameter or of `notebook`, with the wildcards of a shell.

    Raises:
        ValueError: a filter has another form or names no parameter, or no run passes.
    """
    for text in filters:
        name, separator, pattern = text.partition("=")
        words = [{"notebook": run.notebook.stem, **run.parameters} for run in runs]
        known = sorted(set().union(*words))
        if not separator or name not in known:
            raise ValueError(f"filter: wanted NAME=PATTERN with one of {', '.join(known)}, got {text!r}")
        runs = [
            run
            for run, given in zip(runs, words, strict=True)
            if name in given and fnmatch.fnmatchcase(_word(given[name]), pattern)
        ]
    if not runs:
        raise ValueError(f"filter: no run of the batch passes {' '.join(filters)}")
    return list(runs)


def read_record(run: Run) -> dict[str, Any]:
    """The record of a run: `status` is "new", "stale" (of another key), "done" or "failed"; see `write_record`."""
    try:
        record = json.loads((run.folder / f"{run.name}.json").read_text(encoding="utf-8"))
        if record["key"] != run.key:
            return {"status": "stale"}
        left = [run.output, *(run.table.with_name(name) for name in record.get("tables", []))]
        return record if record["status"] == "failed" or all(path.is_file() for path in left) else {"status": "new"}
    except (OSError, ValueError, KeyError, TypeError):
        return {"status": "new"}


def write_record(run: Run, status: str, seconds: float, error: str | None = None) -> dict[str, Any]:
    """Write how a run ended, whole or not at all: `status`, `key`, `seconds`, `error`, `parameters`, its `tables`."""
    record = {"status": status, "key": run.key, "seconds": round(seconds, 3), "error": error}
    record["parameters"] = run.parameters
    record["tables"] = sorted(path.name for path in run.table.parent.glob("*.parquet"))
    with replacing(run.folder / f"{run.name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def write_index(batch: Batch) -> Path:
    """Write `index.html`: one line per run with parameters, status, seconds and a link to its notebook.

    Here and below, OSError: the place cannot be written.
    """
    heads = ["run", *batch.runs[0].varied, "status", "seconds", "error"]
    rows = []
    for run in batch.runs:
        record = read_record(run)
        name, status = html.escape(run.name), record["status"]
        suffix = {"done": ".ipynb", "failed": ".failed.ipynb"}.get(status)
        link = f'<a href="{name}{suffix}">{name}</a>' if suffix else name
        told = [*map(_word, run.varied.values()), status, f"{record.get('seconds', 0):.1f}", record.get("error") or ""]
        rows.append(f'<tr class="{status}"><td>' + "</td><td>".join([link, *map(html.escape, told)]) + "</td></tr>")
    page = _PAGE.format(name=html.escape(batch.name), heads="</th><th>".join(heads), rows="\n".join(rows))
    path = batch.folder / "index.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em }} table {{ border-collapse: collapse }}
th, td {{ text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd; vertical-align: top }}
tr.failed td {{ background: #fdecea }} tr.new td, tr.stale td {{ color: #777 }}
</style>
<h1>{name}</h1>
<table><tr><th>{heads}</th></tr>
{rows}
</table></html>
"""


def write_summary(batch: Batch) -> Path | None:
    """Write the rows of all runs that are done to `summary.parquet` and `summary.csv`, run by run.

    A run's rows are those of the table that has the notebook's name. Its varied parameters become columns before the
    table's own, unless the table has a column of that name. Columns of bytes and of lists are left out of the CSV. The
    Parquet file has a provenance for `results.read_rows`: that of the runs, with the parameters that all of them share.

    Returns:
        The path of the Parquet file; None if no run that is done has such a table.

    Raises:
        ValueError: a column holds numbers in one run and text in another.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    tables = _tables(batch, batch.runs[0].notebook.stem)
    if not tables:
        return None
    empty = [_with_varied(pq.read_schema(table).empty_table(), run) for table, run in tables.items()]
    try:
        schema = pa.concat_tables(empty, promote_options="permissive").schema
    except pa.ArrowException as error:
        raise ValueError(f"summary: wanted columns of one kind in the rows of all runs ({error})") from error
    flat = [field.name for field in schema if not re.search("binary|list|struct", str(field.type))]
    path = batch.folder / "summary.parquet"
    with (
        replacing(path) as whole,
        replacing(path.with_suffix(".csv")) as plain,
        pq.ParquetWriter(whole, schema.with_metadata(_shared(tables))) as rows,
        pa.csv.CSVWriter(plain, schema.empty_table().select(flat).schema) as lines,
    ):
        for table, run in tables.items():
            own = _with_varied(pq.read_table(table), run)
            own = pa.concat_tables([schema.empty_table(), own], promote_options="permissive")
            rows.write_table(own)
            lines.write_table(own.select(flat))
    return path


def write_tables(summary: Path, varied: Collection[str]) -> Path | None:
    """Write the tables that the paper has, of the rows of a batch of notebook 03, to `tables.md`.

    Args:
        summary: of `write_summary`.
        varied: the parameters that the batch varies: there are tables for all that they are together.

    Returns:
        The path written; None where the rows of the summary have no metrics of boxes, so that they are of another
        notebook.
    """
    import pandas as pd

    from opticam.lab.summary import paper_tables

    rows = pd.read_parquet(summary)
    if "official_metric" not in rows:
        return None
    blocks = []
    keys = [name for name in varied if name != "shard" and name in rows]
    for values, part in rows.groupby(keys, sort=False, dropna=False) if keys else [((), rows)]:
        told = [str(value) if name == "model" else f"{name} {value}" for name, value in zip(keys, values, strict=True)]
        seen = part[part["status"] != "skipped"] if "status" in part else part
        blocks.append(f"# {', '.join(told) or 'one network'}: means over {seen['image'].nunique()} images")
        for title, table in paper_tables(part).items():
            blocks += [f"## {title}", table.to_markdown(floatfmt=".1f")]
    path = summary.with_name("tables.md")
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


def write_evidence(batch: Batch, folder: Path = EVIDENCE) -> dict[Path, str]:
    """Write the rows of all runs that are done to the files that `evidence` names, for the pages to conclude from.

    `evidence: {NAME: TABLE}` makes `NAME.parquet` of the tables `TABLE.parquet` of the runs. Images come in the order
    of their names. Only numbers and words are shipped: columns of bytes are left out but for `box_hits`, and numbers
    that are not probabilities have single precision. The provenance is that of the runs, see `write_summary`, and says
    how many `images` there are, and into how many `shards` they were split: a part of a batch may be shipped before the
    rest is done. What the file holds of other images stays, if the same code made it with the same parameters, shards
    and kind of device: parts may be run on several machines. Other rows are replaced.

    Returns:
        Path in the folder -> what was written, in words; without the files that no run has rows for yet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    varied = [name for name in batch.runs[0].varied if name != "shard"]
    kept = {*varied, *_OF_A_PART, "root"}  # what stands for all runs in place of what follows from what is varied
    given = {name: value for name, value in batch.runs[0].parameters.items() if name not in kept}
    asked = {"asked": given} if varied else {}
    written = {}
    for name, stem in batch.evidence.items():
        tables = _tables(batch, stem)
        if not tables:
            continue
        path = folder / f"{name}.parquet"
        shipped = [_shipped(_with_varied(pq.read_table(table), run)) for table, run in tables.items()]
        if not all("image" in table.column_names for table in shipped):
            raise ValueError(f"evidence: {stem}.parquet has no column image; wanted one row or more for each image")
        told = f"{len(tables)} of {len(batch.runs)} runs"
        provenance = _shared(tables, **asked, shards=_shards(tables))
        if path.is_file():
            there, made_by = pq.read_table(path), _made_by(provenance)
            same = made_by and made_by == _made_by(there.schema.metadata)
            if same and {"image", *varied} <= {*there.column_names}:  # a grid may have grown by a name
                shipped.append(_lacking(there, shipped, ["image", *varied]))
                provenance = _common(provenance, there.schema.metadata)
                told += f" and {len(shipped[-1])} rows that were there"
            else:
                told += f", in place of {len(there)} rows made otherwise"
        rows = pa.concat_tables(shipped, promote_options="permissive")
        names = rows["image"].to_numpy(zero_copy_only=False)
        images = len({*names})
        rows = rows.take(pa.array(names.argsort(kind="stable")))
        told_by = json.loads(provenance.get(PROVENANCE, b"{}"))
        rows = rows.replace_schema_metadata(
            {PROVENANCE: json.dumps({**told_by, "images": images}).encode()} if told_by else {}
        )
        with replacing(path) as whole:
            pq.write_table(rows, whole, compression="zstd")
        written[path] = f"{len(rows)} rows of {images} images, {told}, {path.stat().st_size / 1000:.0f} kB"
    return written


def _tables(batch: Batch, stem: str) -> dict[Path, Run]:
    """The tables of that name, of the runs that are done and wrote one."""
    done = [run for run in batch.runs if read_record(run)["status"] == "done"]
    tables = {run.table.with_name(f"{stem}.parquet"): run for run in done}
    return {table: run for table, run in tables.items() if table.is_file()}


def _shipped(table: "pa.Table") -> "pa.Table":
    """The columns that are shipped, in the precision in which they are."""
    import pyarrow as pa

    columns = {}
    for field in table.schema:
        values = table[field.name]
        if pa.types.is_float64(field.type) and not field.name.startswith(("prob", "masked_prob")):
            values = values.cast(pa.float32())
        if field.name == "box_hits" or not (field.name == "shard" or "binary" in str(field.type)):
            columns[field.name] = values
    return pa.table(columns)


def _shards(tables: Mapping[Path, Run]) -> int:
    return max(int(run.varied.get("shard", "0/1").partition("/")[2]) for run in tables.values())


def _made_by(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any] | None:
    """What makes rows what they are, of a provenance: parameters, code, versions, device and split; None if unknown."""
    if not metadata or PROVENANCE not in metadata:
        return None
    provenance = json.loads(metadata[PROVENANCE])
    names = ("asked" if "asked" in provenance else "parameters", "package", "code", "torch", "device", "shards")
    return {name: provenance[name] for name in names} if provenance.keys() >= {*names} else None


def _common(provenance: dict[bytes, bytes], other: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """A provenance with the parameters alone that another has too."""
    own, its = (json.loads(entry[PROVENANCE]) for entry in (provenance, other))
    same = {name: value for name, value in own["parameters"].items() if its["parameters"].get(name) == value}
    return {PROVENANCE: json.dumps({**own, "parameters": same}).encode()}


def _lacking(table: "pa.Table", others: Iterable["pa.Table"], keys: list[str]) -> "pa.Table":
    """The rows of a table whose keys none of the others has."""
    import pyarrow as pa

    def rows(of: "pa.Table") -> Iterator[tuple[Any, ...]]:
        return zip(*of.select(keys).to_pydict().values(), strict=True)

    taken = {row for other in others for row in rows(other)}
    return table.filter(pa.array([row not in taken for row in rows(table)], pa.bool_()))


def _shared(tables: Mapping[Path, Run], **more: Any) -> dict[bytes, bytes]:
    """The provenance that tables share, with the parameters that no run varies, and more; nothing where one has none.

    Parameters that say which part of the images a table holds are left out, also of a single table.
    """
    import pyarrow.parquet as pq

    metadata = [pq.read_schema(table).metadata or {} for table in tables]
    if not all(PROVENANCE in entry for entry in metadata):
        return {}
    first, *others = (json.loads(entry[PROVENANCE]) for entry in metadata)
    varied = {name for run in tables.values() for name in run.varied} | _OF_A_PART
    shared = {name: value for name, value in first["parameters"].items() if name not in varied}
    for other in others:
        shared = {name: value for name, value in shared.items() if other["parameters"].get(name) == value}
    alike = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return {PROVENANCE: json.dumps({**alike, "parameters": shared, **more}).encode()}


def _with_varied(table: "pa.Table", run: Run) -> "pa.Table":
    import pyarrow as pa

    varied = {name: _word(value) if isinstance(value, list) else value for name, value in run.varied.items()}
    columns = {name: pa.repeat(value, len(table)) for name, value in varied.items() if name not in table.column_names}
    return pa.table({**columns, **{name: table[name] for name in table.column_names}})


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


class _Faults:
    """What is wrong with a document: sentences that begin with the place, each with its line."""

    def __init__(self, document: yaml.Node | None) -> None:
        self.told: dict[str, int] = {}
        self._lines: dict[Place, int] = {}
        self._seen: set[int] = set()
        if document is not None:
            self._walk(document, (), document.start_mark.line + 1)

    def _walk(self, node: yaml.Node, place: Place, line: int) -> None:
        """Note the line of every place, and what YAML's reader accepts: names given twice, 010 as 8, 1:30 as 90."""
        twice = place in self._lines
        self._lines[place] = line
        if twice:
            self.add(place, "given twice")
        if id(node) in self._seen:  # an alias may stand for what it is in
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._walk(item, (*place, number), item.start_mark.line + 1)
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                self._walk(value, (*place, str(name.value)), name.start_mark.line + 1)
        elif node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-9_]|.*:", node.value):
            self.add(place, f"wanted a decimal number, got {node.value}; as text, in quotes")

    def add(self, place: Place, text: str) -> None:
        words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        line = self._lines.get(place) or self._lines.get(place[:-1]) or 1
        self.told[f"{words.lstrip('.') or 'the file'}: {text}"] = line

    def tried(self, place: Place, call: Callable[..., Any], *args: Any) -> Any:
        """What a call returns; None where it refuses, which is noted."""
        try:
            return call(*args)
        except (OSError, ValueError) as error:
            self.add(place, re.sub(r"^(notebook|parameter \w+): ", "", str(error)))
            return None


def _batch(path: Path, content: Any, others: Sequence[Batch], faults: _Faults) -> list[Batch]:
    """The batch of a document, unlike the `others` of the file; none where there are faults, which are noted."""
    if not isinstance(content, dict):
        faults.add((), f"wanted names with values: notebook and, where needed, {', '.join(list(_FIELDS)[1:])}")
        return []
    given: dict[str, Any] = {}
    for name, value in content.items():
        kind: Any = type(_FIELDS.get(name))
        if name not in _FIELDS:
            faults.add((str(name),), f"unknown; wanted one of {', '.join(_FIELDS)}")
        elif type(value) is not kind:
            faults.add((name,), f"wanted {_KINDS[kind]}, got {value!r}")
        elif name == "shards" and not 1 <= value <= _MOST_RUNS:
            faults.add((name,), f"wanted 1 to {_MOST_RUNS}, got {value}")
        else:
            given[name] = value
    fields: dict[str, Any] = {**_FIELDS, **given}
    if "notebook" not in content:
        faults.add(("notebook",), "missing; wanted a number, a name or a path")
    for name, value in fields["resources"].items():
        if name != "GPU":
            faults.add(("resources", str(name)), "unknown; wanted GPU")
        elif type(value) is not int or value < 0:
            faults.add(("resources", name), f"wanted a whole number of at least 0, got {value!r}")
    for name, table in fields["evidence"].items():
        place = ("evidence", str(name))
        if not all(isinstance(word, str) and re.fullmatch(r"\w[\w.-]{,99}", word) for word in (name, table)):
            faults.add(place, f"wanted NAME: TABLE, both without a path or suffix, got {name!r}: {table!r}")
        if any(name in other.evidence for other in others):
            faults.add(place, "also of another document; wanted a name of its own")
    if "notebook" not in given:
        return []
    found = faults.tried(("notebook",), _notebook, path, given["notebook"])
    if found is None:
        return []
    notebook, known = found
    fixed, grid = _checked(path, fields, known, faults)
    usual = REPOSITORY / "data" / "results" / "batches" / path.stem
    folder = faults.tried(("output",), _beside, path, given.get("output", usual))
    if any(other.folder == folder for other in others):
        faults.add(("output",), "the folder of another document; wanted one of its own")
    number = math.prod(len(values) for values in grid.values())
    if number > _MOST_RUNS:
        faults.add(("grid",), f"wanted at most {_MOST_RUNS} runs, got {number}")
    if faults.told:
        return []
    runs = list(_combined(notebook, fixed, grid, folder, fields["resources"].get("GPU", 0)))
    source, first = notebook.resolve(), dict[str, Run]()
    for run in runs:
        other = first.setdefault(run.name.casefold(), run)
        if run.output == source:
            faults.add(("output",), f"the run would overwrite {notebook.name}; wanted another folder")
        if other is not run:
            faults.add(("grid",), f"two runs would write {run.name}: {run.varied} and {other.varied}")
    return [] if faults.told else [Batch(path.stem, folder, runs, fields["evidence"])]


def _notebook(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    inside = path.parent / name
    notebook = find_notebook(inside if inside.is_file() else name).absolute()  # a worker may stand elsewhere
    return notebook, notebook_parameters(notebook)


def _beside(path: Path, place: str | Path) -> Path:
    try:
        return Path(path.parent, Path(place).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # of an unknown user, in a circle of links, or with a null character
        raise ValueError(f"wanted a path, got {place!r} ({error})") from error


def _checked(
    path: Path, fields: Mapping[str, Any], known: Mapping[str, Any], faults: _Faults
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The fixed parameters and the grid, every value of the type that the notebook annotates."""

    def value_of(place: Place, name: str, value: Any) -> Any:
        value = faults.tried(place, cast, name, value, known[name]["type"])
        return str(faults.tried(place, _beside, path, value)) if name in PATHS and value else value

    fixed, grid = {}, {}
    for field, (name, value) in [(f, item) for f in ("parameters", "grid") for item in fields[f].items()]:
        place: Place = (field, str(name))
        if name in OWN:
            faults.add(place, "set by the batch, so that each run writes into a folder of its own")
        elif name not in known:
            wanted = ", ".join(other for other in known if other not in OWN)
            faults.add(place, f"unknown to the notebook; wanted one of {wanted}")
        elif name == "shard" and fields["shards"]:
            faults.add(place, "set by `shards`")
        elif field == "parameters":
            fixed[name] = value_of(place, name, value)
        elif name in fixed:
            faults.add(place, "also in `parameters`; wanted in one of them")
        elif not isinstance(value, list) or not value:
            faults.add(place, f"wanted a list of at least one value, got {value!r}")
        else:
            grid[name] = [value_of((*place, number), name, one) for number, one in enumerate(value)]
    if fields["shards"]:
        if "shard" not in known:
            faults.add(("shards",), "the notebook has no parameter `shard`")
        grid["shard"] = [f"{k}/{fields['shards']}" for k in range(fields["shards"])]
    return fixed, grid


def _combined(
    notebook: Path, fixed: Mapping[str, Any], grid: Mapping[str, list[Any]], folder: Path, gpus: int
) -> Iterator[Run]:
    cells, code = read_cells(notebook), code_digest()
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        parameters = {**fixed, **varied}
        if parameters.get("dataset") == "imagenet" and os.environ.get("OPTICAM_IMAGENET"):
            # a worker elsewhere does not have this environment, and other images give another result
            parameters.setdefault("root", str(Path(os.environ["OPTICAM_IMAGENET"]).expanduser().absolute()))
        key = run_key(cells, code, parameters)
        yield Run(_name(varied, notebook.stem), notebook, parameters, varied, folder, gpus, code, key)


def run_key(cells: Sequence[Cell], code: str, parameters: Mapping[str, Any]) -> str:
    """Digest of all that the result of a run depends on."""
    depends = json.dumps([cells, version("opticam"), code, parameters], sort_keys=True)
    return hashlib.sha256(depends.encode()).hexdigest()


def _name(varied: Mapping[str, Any], default: str) -> str:
    """A file name for a run: no separator of folders, no hidden file, not too long."""
    words = {name: _word(value).replace("/", "-") for name, value in varied.items()}
    unclear = re.compile(r"[^\w.+-]")
    name = ",".join(f"{name}={unclear.sub('_', word)}" for name, word in words.items()) or default
    encoded = name.encode()
    if len(encoded) <= 120:
        return name
    return f"{encoded[:100].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:12]}"
