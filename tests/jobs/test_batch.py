"""YAML to runs, the state of a run, and what is written about all of them; without starting anything."""

import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from opticam import cli
from opticam.jobs import batch
from opticam.jobs.batch import (
    BATCHES,
    read_batches,
    read_record,
    select_runs,
    write_evidence,
    write_index,
    write_record,
    write_summary,
    write_tables,
)
from opticam.lab import results

PARAMETERS = """
count: int = 2  # how many
rate: float = 0.5  # how fast
name: str = "a"  # which
names: list[str] = []  # several
root: str = ""  # where from
shard: str = ""  # k/n
figures: str = "f"  # where to
results: str = "r"  # where to
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("OPTICAM_IMAGENET", raising=False)
    cells = [
        new_markdown_cell("# What?"),
        new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]}),
        new_code_cell("print(count)"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "10_tiny.ipynb")
    return tmp_path


def read(folder, text):
    (folder / "some.yaml").write_text("notebook: 10_tiny.ipynb\n" + text)
    (made,) = read_batches(folder / "some.yaml")
    return made


def finish(run, status="done", rows=None, table="10_tiny", **parameters):
    run.folder.mkdir(parents=True, exist_ok=True)
    run.output.write_text("{}")
    if rows is not None:
        place = run.table.with_name(f"{table}.parquet")
        results.write_rows(pd.DataFrame(rows), place, {**run.parameters, **parameters})
    return write_record(run, status, 1.5, None if status == "done" else "cell 3 failed with <E>")


def test_the_runs_are_the_product_of_the_grid_and_the_shards(folder):
    made = read(folder, "parameters: {count: 5}\ngrid:\n  name: [a, b]\n  names: [[x, y], []]\nshards: 2\noutput: out")
    assert made.folder == folder / "out"
    assert [run.name for run in made.runs] == [
        f"name={name},names={names},shard={k}-2" for name in "ab" for names in ("x+y", "") for k in (0, 1)
    ]
    first = made.runs[0]
    assert first.parameters == {"count": 5, "name": "a", "names": ["x", "y"], "shard": "0/2"}
    assert first.varied == {"name": "a", "names": ["x", "y"], "shard": "0/2"}
    assert first.notebook == folder / "10_tiny.ipynb"
    assert (first.output, first.table) == (
        folder / "out" / f"{first.name}.ipynb",
        folder / "out" / first.name / "10_tiny.parquet",
    )
    assert len({run.key for run in made.runs}) == 8


def test_without_a_grid_there_is_one_run_and_a_place_of_its_own(folder):
    made = read(folder, "resources: {GPU: 2}")
    (run,) = made.runs
    assert (run.name, run.parameters, run.gpus) == ("10_tiny", {}, 2)
    assert made.folder.parts[-4:] == ("data", "results", "batches", "some")


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("colour: red", ["line 2: colour: unknown; wanted one of notebook, parameters, grid, shards"]),
        ("notebook: 99", ["line 2: notebook: given twice", "line 2: notebook: wanted text, got 99"]),
        ("notebook: nothing", ["notebook: given twice", "line 2: notebook: wanted one of 0"]),
        ("parameters:\n  cuont: 1", ["line 3: parameters.cuont: unknown to the notebook; wanted one of count, rate"]),
        ("parameters: {count: many}", ["line 2: parameters.count: wanted a whole number, got 'many'"]),
        ("parameters: {count: 1.5}", ["parameters.count: wanted a whole number, got 1.5"]),
        ("parameters: {count: 010}", ["parameters.count: wanted a decimal number, got 010; as text, in quotes"]),
        ("grid: {rate: [0.5, 1:30.5]}", ["grid.rate[1]: wanted a decimal number, got 1:30.5"]),
        ("parameters: {name: no}", ["parameters.name: wanted text, got False"]),
        ("parameters: {rate: .nan}", ["parameters.rate: wanted a number, got nan"]),
        ("parameters: {rate: .inf}", ["parameters.rate: wanted a number, got inf"]),
        ("parameters: [1]", ["line 2: parameters: wanted names with values, got [1]"]),
        ("grid:\n  count:\n  - 1\n  - x", ["line 5: grid.count[1]: wanted a whole number, got 'x'"]),
        ("grid: {count: []}", ["grid.count: wanted a list of at least one value, got []"]),
        ("grid: {count: 3}", ["grid.count: wanted a list of at least one value, got 3"]),
        ("grid: {count: [1, 2, 1]}", ["grid: two runs would write count=1"]),
        ("grid: {name: [a/b, a-b]}", ["grid: two runs would write name=a-b"]),
        ("parameters: {count: 1}\ngrid: {count: [1]}", ["grid.count: also in `parameters`"]),
        ("parameters: {results: /etc}", ["parameters.results: set by the batch"]),
        ("grid: {figures: [../..]}", ["grid.figures: set by the batch"]),
        ("parameters: {shard: 0/2}\nshards: 2", ["parameters.shard: set by `shards`"]),
        ("shards: 0", ["shards: wanted 1 to 100000, got 0"]),
        ("shards: 100000000", ["shards: wanted 1 to 100000, got 100000000"]),
        ("shards: 60000\ngrid: {count: [1, 2]}", ["grid: wanted at most 100000 runs, got 120000"]),
        ("shards: true", ["shards: wanted a whole number, got True"]),
        ("resources: {CPU: 1}", ["resources.CPU: unknown; wanted GPU"]),
        ("resources: {GPU: -1}", ["resources.GPU: wanted a whole number of at least 0, got -1"]),
        ("resources: {GPU: half}", ["resources.GPU: wanted a whole number"]),
        ("output: 3", ["output: wanted text, got 3"]),
        ("evidence: 10_tiny", ["line 2: evidence: wanted names with values, got '10_tiny'"]),
        ("evidence: {a/b: 10_tiny}", ["evidence.a/b: wanted NAME: TABLE, both without a path or suffix, got 'a/b'"]),
        ("evidence:\n  a: [b]", ["line 3: evidence.a: wanted NAME: TABLE, both without a path or suffix, got 'a'"]),
        ("output: a\n---\nnotebook: 99", ["line 4: notebook: wanted text, got 99"]),
        ("output: a\n---\noutput: b", ["line 4: notebook: missing"]),
        ("output: a\n---\n", ["line 4: the file: wanted names with values: notebook and"]),
        ("colour: red\n---\ngrid: {", ["some.yaml, line 4: wanted YAML; "]),
        (
            "shards: 0\n---\nnotebook: 10_tiny.ipynb\nshards: 0",
            ["line 2: shards: wanted 1 to", "line 5: shards: wanted 1 to"],
        ),
        (
            "---\nnotebook: 10_tiny.ipynb\n---\nnotebook: 10_tiny.ipynb\noutput: b",
            ["line 3: output: the folder of another document; wanted one of its own"],
        ),
        (
            "evidence: {a: b}\n---\nnotebook: 10_tiny.ipynb\noutput: b\nevidence: {a: c}",
            ["line 6: evidence.a: also of another document; wanted a name of its own"],
        ),
        ("output: .", ["line 2: output: the run would overwrite 10_tiny.ipynb; wanted another folder"]),
        ("other: &all [*all]", ["line 2: other: unknown; wanted one of notebook"]),
        ("grid: {", ["some.yaml, line 2: wanted YAML; "]),
        ("grid: ]", ["some.yaml, line 2: wanted YAML; "]),
        ("grid: !!python/object/apply:os.system [ls]", ["wanted YAML"]),
        (
            "parameters: {count: x, cuont: 1}\ngrid: {rate: [.nan]}\nshards: 0",
            ["parameters.count: ", "parameters.cuont: ", "grid.rate[0]: ", "shards: "],
        ),
    ],
)
def test_all_errors_are_reported_at_once_with_their_places(folder, text, faults, capsys):
    with pytest.raises(ValueError, match=r"some\.yaml") as raised:
        read(folder, text)
    assert len(str(raised.value).splitlines()) == len(faults)
    for line, fault in zip(str(raised.value).splitlines(), faults, strict=True):
        assert fault in line
    assert cli.main(["batch", str(folder / "some.yaml")]) == 2
    assert capsys.readouterr().err == "".join(f"opticam: {line}\n" for line in str(raised.value).splitlines())
    assert sorted(path.name for path in folder.iterdir()) == ["10_tiny.ipynb", "some.yaml"]


@pytest.mark.parametrize("text", ["", "- a", "text"])
def test_a_file_of_another_kind_is_refused(folder, text):
    (folder / "some.yaml").write_text(text)
    with pytest.raises(ValueError, match="the file: wanted names with values: notebook and"):
        read_batches(folder / "some.yaml")
    with pytest.raises(FileNotFoundError, match=r"batch: wanted a YAML file or one of .*demo"):
        read_batches("nothing")


def test_names_of_runs_cannot_leave_the_folder(folder):
    made = read(folder, f"grid: {{name: ['../../x', '..', '.hidden', '{'long' * 60}', 'ü b']}}\noutput: out")
    for run in made.runs:
        assert run.output.parent == folder / "out"
        assert run.output.resolve().parent == folder / "out"
        assert re.fullmatch(r"name=[\w.+-]{1,140}", run.name)


def test_paths_are_relative_to_the_file(folder, monkeypatch):
    (run,) = read(folder, "parameters: {root: images}").runs
    assert run.parameters["root"] == str(folder / "images")
    monkeypatch.chdir(folder)
    (batch,) = read_batches("some.yaml")  # a worker may stand elsewhere
    assert batch.runs[0].notebook == folder / "10_tiny.ipynb"


def test_only_what_changed_is_stale(folder, monkeypatch):
    text = "grid: {count: [1, 2], name: [a, b]}\noutput: out"
    for run in read(folder, text).runs:
        finish(run)

    def states(text=text):
        return [read_record(run)["status"] for run in read(folder, text).runs]

    assert states() == ["done"] * 4
    assert states("grid: {count: [1, 3], name: [a, b]}\noutput: out") == ["done", "done", "new", "new"]
    assert states("parameters: {rate: 0.1}\n" + text) == ["stale"] * 4
    with monkeypatch.context() as other:
        other.setattr(batch, "version", lambda name: "9.9")
        assert states() == ["stale"] * 4
    with monkeypatch.context() as other:
        other.setattr(batch, "code_digest", lambda: "other")
        assert states() == ["stale"] * 4
    notebook = nbformat.read(folder / "10_tiny.ipynb", as_version=4)
    notebook.cells[2]["outputs"] = [nbformat.v4.new_output("stream", text="2\n")]
    nbformat.write(notebook, folder / "10_tiny.ipynb")
    assert states() == ["done"] * 4, "rendering a notebook does not change it"
    notebook.cells[2]["source"] = "print(count + 1)"
    nbformat.write(notebook, folder / "10_tiny.ipynb")
    assert states() == ["stale"] * 4


def test_a_record_counts_only_whole_and_with_its_notebook(folder):
    (run,) = read(folder, "output: out").runs
    assert read_record(run) == {"status": "new"}
    record = finish(run)
    assert read_record(run) == record
    path = run.folder / "10_tiny.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert read_record(run) == {"status": "new"}
    path.write_text(whole)
    run.output.unlink()
    assert read_record(run) == {"status": "new"}
    finish(run, rows={"image": ["i"]})
    assert read_record(run)["status"] == "done"
    run.table.unlink()
    assert read_record(run) == {"status": "new"}
    assert finish(run, "failed")["error"] == read_record(run)["error"] == "cell 3 failed with <E>"


def test_the_summary_has_the_rows_of_what_is_done(folder):
    made = read(folder, "grid: {count: [1, 2, 3, 4], names: [[x, y]]}\noutput: out")
    finish(made.runs[0], rows={"image": ["i", "j"], "count": [10, 11], "bits": [b"0", b"1"]})
    finish(made.runs[1], rows={"image": ["k"], "score": [0.5], "count": [12]})
    finish(made.runs[2], "failed", rows={"image": ["l"], "count": [13]})
    assert write_summary(made) == folder / "out" / "summary.parquet"
    rows = pd.read_parquet(folder / "out" / "summary.parquet")
    assert rows["image"].tolist() == ["i", "j", "k"]
    assert rows["count"].tolist() == [10, 11, 12], "the table's own column stays"
    assert rows["names"].tolist() == ["x+y"] * 3
    assert rows["score"].isna().tolist() == [True, True, False]
    text = pd.read_csv(folder / "out" / "summary.csv")
    assert text.columns.tolist() == ["names", "image", "count", "score"]
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".summary")]


def test_columns_of_different_kinds_have_no_summary(folder):
    made = read(folder, "grid: {count: [1, 2]}\noutput: out")
    finish(made.runs[0], rows={"image": ["i"], "score": [0.5]})
    finish(made.runs[1], rows={"image": ["j"], "score": ["good"]})
    with pytest.raises(ValueError, match=r"summary: wanted columns of one kind in the rows of all runs \(.*score"):
        write_summary(made)
    assert not (folder / "out" / "summary.parquet").exists()


def test_a_file_of_several_documents_is_several_batches(folder, capsys):
    documents = ["# first\nnotebook: 10_tiny.ipynb\nshards: 2\noutput: a", "notebook: 10_tiny.ipynb\noutput: b\n"]
    (folder / "some.yaml").write_text("\n---\n".join(documents))
    first, second = read_batches(folder / "some.yaml")
    assert (first.folder, second.folder) == (folder / "a", folder / "b")
    assert [run.name for run in first.runs + second.runs] == ["shard=0-2", "shard=1-2", "10_tiny"]
    finish(first.runs[0])
    assert cli.main(["batch", str(folder / "some.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["done    shard=0-2", "new     shard=1-2"]
    assert lines[3] == "new     10_tiny"
    assert cli.main(["batch", str(folder / "some.yaml"), "--dry-run", "--filter", "shard=1*"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "new     shard=1-2"


def test_evidence_is_the_rows_of_what_is_done_as_numbers(folder, capsys):
    """Whether images are split among runs or not, they come in the same order."""
    text = "shards: 3\noutput: out\nevidence: {tiny_300: 10_tiny, other: 10_other}"
    made = read(folder, text)
    out = folder / "evidence"
    command = ["batch", str(folder / "some.yaml"), "--ship", str(out)]
    assert cli.main(command) == 2
    assert "ship: no run with evidence is done" in capsys.readouterr().err
    for run, images in zip(made.runs[:2], (["a", "c"], ["b", "d"]), strict=True):
        images = [image for image in images for _ in range(2)]
        rows = {"image": images, "method": ["m", "l"] * 2, "prob": [1 / 3] * 4, "masked_prob[B]": [1 / 7] * 4}
        rows |= {"gain": [1 / 3] * 4, "class_idx": [1, 2] * 2, "saliency": [b"x"] * 4, "box_hits": [b"y"] * 4}
        finish(run, rows=rows)
    finish(made.runs[0], rows={"image": ["a", "c"], "step": [0, 1]}, table="10_other")
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tiny_300\.parquet: 8 rows of 4 images, 2 of 3 runs, \d+ kB\n", printed)
    rows, provenance = results.read_rows(out / "tiny_300.parquet")
    assert rows.columns.tolist() == ["image", "method", "prob", "masked_prob[B]", "gain", "class_idx", "box_hits"]
    assert rows["image"].tolist() == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert rows["method"].tolist() == ["m", "l"] * 4
    assert [str(rows[name].dtype) for name in ("prob", "masked_prob[B]", "gain")] == ["float64", "float64", "float32"]
    assert provenance["images"] == 4
    assert "shard" not in provenance["parameters"]
    rows, provenance = results.read_rows(out / "other.parquet")
    assert rows["step"].tolist() == [0, 1]
    assert write_evidence(read(folder, "shards: 3\noutput: out"), out) == {}


def test_evidence_grows_by_the_parts_that_another_machine_ran(folder):
    out = folder / "evidence"

    def ship(machine, parts, count=3, shards=2):
        text = f"parameters: {{count: {count}}}\ngrid: {{name: [x, y]}}\nshards: {shards}\noutput: {machine}"
        made = read(folder, f"{text}\nevidence: {{tiny: 10_tiny}}")
        for number, image, gain in parts:
            run = made.runs[number]
            finish(run, rows={"image": [image], "gain": [gain]}, part=run.varied["shard"], images=image)
        [told] = write_evidence(made, out).values()
        rows, provenance = results.read_rows(out / "tiny.parquet")
        assert provenance["parameters"] == {"count": count}
        return told, [tuple(row) for row in rows[["image", "name", "gain"]].to_numpy()], provenance["images"]

    assert ship("here", [(0, "b", 1), (1, "a", 2)])[1:] == ([("a", "x", 2), ("b", "x", 1)], 2)
    told, rows, images = ship("there", [(2, "b", 3)])
    assert "1 of 4 runs and 2 rows that were there" in told
    assert (rows, images) == ([("a", "x", 2), ("b", "y", 3), ("b", "x", 1)], 2)
    told, rows, images = ship("again", [(0, "b", 5), (3, "c", 6)])
    assert "2 of 4 runs and 2 rows that were there" in told
    assert (rows, images) == ([("a", "x", 2), ("b", "x", 5), ("b", "y", 3), ("c", "y", 6)], 3)
    told, rows, images = ship("elsewhere", [(3, "a", 7)], count=4)
    assert "1 of 4 runs, in place of 4 rows made otherwise" in told
    assert (rows, images) == ([("a", "y", 7)], 1)
    told, rows, images = ship("otherwise", [(5, "b", 8)], count=4, shards=3)
    assert "in place of 1 rows" in told
    assert rows == [("b", "y", 8)]


def test_evidence_grows_over_a_grid_whose_rows_say_what_follows_from_it(folder):
    """The weights differ with the network; rows of other counts would be others."""
    for machine, number, count in (("here", 0, 2), ("there", 1, 2), ("again", 0, 2), ("elsewhere", 1, 3)):
        text = f"parameters: {{count: {count}}}\ngrid: {{name: [x, y]}}\noutput: {machine}\nevidence: {{tiny: 10_tiny}}"
        made = read(folder, text)
        finish(made.runs[number], rows={"image": ["a"], "gain": [number]}, weights=f"those of {number}", same=1)
        write_evidence(made, folder / "evidence")
        rows, provenance = results.read_rows(folder / "evidence" / "tiny.parquet")
        expected = {"here": ["x"], "elsewhere": ["y"]}.get(machine, ["x", "y"])
        assert sorted(rows["name"]) == expected
        assert provenance["parameters"] == {"count": count, "same": 1} | (
            {"weights": f"those of {number}"} if len(rows) == 1 else {}
        )


def test_evidence_of_a_grid_that_grew_by_a_name_is_replaced(folder):
    for grid in ("{name: [x]}", "{name: [x], rate: [0.5]}"):
        made = read(folder, f"grid: {grid}\noutput: of{len(grid)}\nevidence: {{tiny: 10_tiny}}")
        finish(made.runs[0], rows={"image": ["a"], "gain": [1]})
        [told] = write_evidence(made, folder / "evidence").values()
    assert "in place of 1 rows made otherwise" in told


def test_evidence_is_of_images(folder):
    made = read(folder, "grid: {name: [x]}\noutput: out\nevidence: {tiny: 10_tiny}")
    finish(made.runs[0], rows={"gain": [1]})
    with pytest.raises(ValueError, match=r"evidence: 10_tiny\.parquet has no column image"):
        write_evidence(made, folder / "evidence")


def test_lists_are_left_out_of_the_csv(folder):
    made = read(folder, "grid: {name: [x]}\noutput: out")
    finish(made.runs[0], rows={"gain": [1], "path": [[1, 2]]})
    assert write_summary(made).with_suffix(".csv").read_text().splitlines()[0] == '"name","gain"'


def test_a_part_of_the_evidence_is_shipped(folder, capsys):
    made = read(folder, "grid: {name: [x, y]}\noutput: out\nevidence: {tiny: 10_tiny}")
    for run in made.runs:
        finish(run, rows={"image": ["a"]})
    command = ["batch", str(folder / "some.yaml"), "--ship", str(folder / "evidence"), "--filter", "name=y"]
    assert cli.main(command) == 0
    assert results.read_rows(folder / "evidence" / "tiny.parquet")[0]["name"].tolist() == ["y"]
    assert cli.main([*command, "--dry-run"]) == 2
    assert "ship: wanted without --dry-run" in capsys.readouterr().err


def test_files_of_runs_keep_letters_of_any_alphabet(folder):
    made = read(folder, "grid: {name: [é, ü/ß, " + 70 * "ж" + "]}\noutput: out")
    assert [run.name for run in made.runs[:2]] == ["name=é", "name=ü-ß"]
    assert len(made.runs[2].name.encode()) <= 120


def test_a_summary_says_of_its_runs_what_holds_for_all(folder, monkeypatch):
    made = read(folder, "grid: {count: [1, 2]}\noutput: out")
    for run, device in zip(made.runs, ("cpu", "cuda:0"), strict=True):
        finish(run, rows={"image": ["a"]})
        rows, _ = results.read_rows(run.table)
        results.write_rows(rows, run.table, run.parameters, device)
    _, provenance = results.read_rows(write_summary(made))
    assert "device" not in provenance
    assert provenance["package"]


@pytest.mark.slow
def test_the_tables_of_the_paper_are_written_for_each_model(folder):
    made = read(folder, "grid: {names: [[x], [y]]}\noutput: out")
    for run, model, gain in zip(made.runs, ("small", "large"), (0.25, 0.5), strict=True):
        rows = {"image": ["i", "j"], "method": "grad_cam", "model": model, "seconds": [1, 2], "average_gain": [0, gain]}
        finish(run, rows=rows | {"official_metric": [0, 1]})
    path = write_tables(write_summary(made), ["model"])
    assert path == folder / "out" / "tables.md"
    blocks = path.read_text().split("\n\n")
    assert blocks[0::5] == ["# small: means over 2 images", "# large: means over 2 images"]
    lines = [[word.strip() for word in block.splitlines()[-1].split("|")[1:-1]] for block in blocks if "|" in block]
    assert lines == [
        ["Grad-CAM", "12.5", "1.5"],
        ["Grad-CAM", "50.0"],
        ["Grad-CAM", "25.0", "1.5"],
        ["Grad-CAM", "50.0"],
    ]
    finish(made.runs[0], rows={"image": ["i"], "method": "grad_cam"})
    finish(made.runs[1], rows={"image": ["i"], "method": "grad_cam"})
    assert write_tables(write_summary(made), ["model"]) is None


def test_the_tables_of_the_paper_are_apart_for_all_that_is_varied(folder):
    made = read(folder, "grid: {count: [10, 20]}\noutput: out")
    for run, gain in zip(made.runs, (0.25, 0.5), strict=True):
        rows = {"image": ["i", "j"], "method": "grad_cam", "model": "small", "average_gain": [gain, np.nan]}
        finish(run, rows=rows | {"official_metric": [0, np.nan], "status": ["ok", "skipped"]})
    text = write_tables(write_summary(made), made.runs[0].varied).read_text()
    assert re.findall("# (count .*)", text) == ["count 10: means over 1 images", "count 20: means over 1 images"]
    assert re.findall(r"Grad-CAM +\| +(\d+\.\d)", text) == ["25.0", "0.0", "50.0", "0.0"]


def test_no_rows_no_summary(folder):
    made = read(folder, "output: out")
    finish(made.runs[0])
    assert write_summary(made) is None


def test_the_index_links_every_notebook(folder):
    made = read(folder, "grid: {name: [a, '<b>', c]}\noutput: out")
    finish(made.runs[0])
    finish(made.runs[1], "failed")
    page = write_index(made).read_text()
    assert '<a href="name=a.ipynb">name=a</a></td><td>a</td><td>done</td><td>1.5</td>' in page
    assert '<a href="name=_b_.failed.ipynb">name=_b_</a></td><td>&lt;b&gt;</td><td>failed</td>' in page
    assert "cell 3 failed with &lt;E&gt;" in page
    assert "<td>name=c</td><td>c</td><td>new</td>" in page


def test_filters(folder):
    runs = read(folder, "grid: {count: [1, 2, 12], name: [ab, cd]}").runs
    assert [run.name for run in select_runs(runs, ["count=1*", "name=a?"])] == [
        "count=1,name=ab",
        "count=12,name=ab",
    ]
    assert select_runs(runs, ["notebook=10*"]) == runs
    with pytest.raises(ValueError, match="filter: wanted NAME=PATTERN with one of count, name, notebook, got"):
        select_runs(runs, ["colour=red"])
    with pytest.raises(ValueError, match="filter: no run of the batch passes count=7"):
        select_runs(runs, ["count=7"])


def test_a_dry_run_prints_the_runs_and_writes_nothing(folder, capsys):
    made = read(folder, "grid: {count: [1, 2]}\noutput: out")
    finish(made.runs[1])
    before = sorted(folder.rglob("*"))
    assert cli.main(["batch", str(folder / "some.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["new     count=1", "done    count=2"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("path", sorted(BATCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_files_are_without_fault(path, monkeypatch):
    monkeypatch.setenv("OPTICAM_IMAGENET", "images")
    parts = read_batches(path.stem)
    on_imagenet = "evidence" in path.stem or "imagenet" in path.stem or path.stem == "preregistered"
    for run in [run for part in parts for run in part.runs]:
        assert on_imagenet == (run.parameters.get("dataset") == "imagenet")
        assert not on_imagenet or run.parameters["root"].endswith("/images")
        assert json.dumps(run.parameters)
    assert all(part.runs for part in parts)
