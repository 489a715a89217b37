"""The command line: opticam explain | run | verify | batch | render. Bad input ends in one sentence and exit code 2."""

import argparse
import gc
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

try:
    from opticam.jobs.runner import (
        KEEP_MEMORY,
        PATHS,
        NotebookError,
        check_writable,
        evidence_part,
        find_notebook,
        list_notebooks,
        notebook_parameters,
        places_beside,
    )
    from opticam.jobs.side_by_side import Screen, run_notebooks
except ModuleNotFoundError as error:
    told = "opticam: the command needs the extra lab: pip install '.[lab]' in a clone; run, render, verify and batch"
    print(f"{told} need a clone of the repository too ({error})", file=sys.stderr)
    sys.exit(2)
from opticam.lab.files import EVIDENCE, REPOSITORY

if TYPE_CHECKING:
    from opticam.jobs.batch import Batch, Run

RESULTS = REPOSITORY / "data" / "results" / "notebooks"
_SECONDS = 0.5  # between two signs of life


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `opticam`; by default those of the process.

    Returns:
        0 if all went well, 1 if a notebook failed, 2 for bad input, 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    if arguments is None:  # this process is ours: asked to end, by a cluster say, it clears up as after Ctrl-C
        if options.command is explain:
            _keep_memory()
        for ending in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(ending, signal.default_int_handler)
    try:
        if options.command is not explain and not getattr(options, "help", False):
            list_notebooks()  # says that a clone is needed where there is none
        return options.command(options)
    except BrokenPipeError:  # whoever read the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NotebookError, ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        for line in (str(error) or "not enough memory").splitlines():
            print(f"opticam: {line}", file=sys.stderr)
        return 1 if isinstance(error, NotebookError) else 2
    except KeyboardInterrupt:
        print("opticam: interrupted", file=sys.stderr)
        return 130


def explain(options: argparse.Namespace) -> int:
    """Explain one photo: print the five most probable classes and what masking does, write a picture."""
    if options.schedule is not None and options.method != "opti_cam":
        raise ValueError(f"schedule: only the method opti_cam has one, got {options.method}")
    with _waiting(lambda: "loading"), _uncollected():
        import matplotlib

        matplotlib.use("agg")
        import torch

        from opticam.checks import examine
        from opticam.classifier import probabilities, read
        from opticam.features import count_passes, prepared
        from opticam.lab.datasets import read_image, to_input
        from opticam.lab.plotting import explanation_figure, save_figure, use_plain_style
        from opticam.methods import SCHEDULES, find_method, method_label
        from opticam.methods.opti_cam import num_passes
        from opticam.metrics import average_drop, average_gain, class_probability
        from opticam.networks import class_index, load_model
        from opticam.saliency import apply_mask
        from opticam.state import frozen

        if options.schedule not in (None, *SCHEDULES):
            raise ValueError(f"schedule: wanted one of {', '.join(SCHEDULES)}, got {options.schedule!r}")
        asked = options.method if options.schedule is None else f"opti_cam:{options.schedule}"
        method, label = find_method(asked), method_label(asked)
        told = [options.method, options.schedule, options.class_name]
        words = "-".join(re.sub(r"[^\w.+]+", "-", word) for word in told if word is not None)
        default = f"{Path(options.photo).stem}.{words}.png"
        output = _writable(default if options.output is None else options.output, (".png", ".pdf", ".svg"))
        if output.resolve() == Path(options.photo).resolve():
            raise ValueError(f"output: {output} is the photo itself; wanted another name")
        model = load_model(options.model, checkpoint=options.checkpoint, head=options.head, device=options.device)
        photo = read_image(options.photo, window=options.window or model.window)
        named = None if options.class_name is None else class_index(options.class_name, model.class_names)
        images = to_input(photo, model.input_size, model.resize)[None].to(options.device)
        with frozen(model), torch.no_grad():
            logits, head = examine(model, prepared(model, images))
    top = probabilities(logits.double(), head)[0].topk(min(5, logits.shape[1]))
    if top.values.isnan().any():
        wanted = "wanted weights without NaN, or another precision"
        raise ValueError(f"model: {model.name} gives NaN for this photo; {wanted}")
    side = model.input_size
    print(f"{options.photo}  {photo.width}x{photo.height}, seen by {model.name} as its centre, {side}x{side}")
    for prob, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        print(f"  {100 * prob:5.1f} %  {model.class_names[index]}  ({index})")
    chosen = int(top.indices[0]) if named is None else named
    class_idx = torch.tensor([chosen], device=options.device)
    is_opti_cam = asked.partition(":")[0] == "opti_cam"
    of_all = f" of {num_passes(**getattr(method, 'keywords', {}))}" if is_opti_cam else ""
    with count_passes(model) as passes, _waiting(lambda: f"{label}, {passes[0]}{of_all} passes"):
        saliency = method(model, images, class_idx, layer=options.layer)
    masked = apply_mask(images, saliency)
    with torch.no_grad():
        masked_logits = read(model, masked).logits
    p, o = (class_probability(y, class_idx, head) for y in (logits, masked_logits))
    before, after = f"{100 * p.item():.1f} %", f"{100 * o.item():.1f} %"
    drop, gain = 100 * average_drop(p, o).item(), 100 * average_gain(p, o).item()
    name = model.class_names[chosen]
    logit, masked_logit = (f"{y[0, chosen]:.2f}" for y in (logits, masked_logits))
    print(f"{label} for {name} ({chosen}{', the predicted class' if named is None else ''})")
    print(f"  probability {before} -> {after} when masked, logit {logit} -> {masked_logit}")
    print(f"  drop {drop:.1f} %, gain {gain:.1f} % of what was possible")
    if saliency.amax() == saliency.amin():
        print("  the map is constant: this method finds nothing here for this class")
    use_plain_style()
    titles = [f"{name}: {before}", label, f"masked: {after}"]
    try:
        with _waiting(lambda: "drawing"):
            save_figure(explanation_figure(images[0], saliency[0], masked[0], titles), output)
    except OSError as error:
        raise OSError(f"output: cannot write {output} ({error.strerror or error})") from error
    print(f"wrote {output}")
    return 0


@contextmanager
def _waiting(what: Callable[[], str]) -> Iterator[None]:
    """Show a person at a terminal what is being done and for how long; the line is removed at the end."""
    screen, start, done = Screen(quiet=math.inf), time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.is_set():
            screen.show([f"{what()}, {time.monotonic() - start:.0f} s"])
            done.wait(_SECONDS)
        screen.show([])

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while libraries are imported: what they make stays, and to look through it takes long."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _keep_memory() -> None:
    """Do for this process what `runner.KEEP_MEMORY` does for one to be started; only glibc has these settings."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not KEEP_MEMORY.keys() & os.environ.keys():
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**31 - 1
        if mallopt(m_mmap_threshold, most):  # older versions refuse this one, and the other alone would do harm
            mallopt(m_trim_threshold, most)


def run(options: argparse.Namespace) -> int:
    """Run notebooks side by side, or one with parameters."""
    if options.help and not options.notebooks:
        options.parser.print_help()
        return 0
    notebooks = _notebooks(options.notebooks)
    if options.list or options.help:
        for path in notebooks:
            print(path.stem)
            for name, entry in notebook_parameters(path).items():
                print(f"    {name}: {entry['type']} = {entry['default']!r}  {entry['help']}")
        return 0
    given: dict[str, str] = {}
    for assignment in options.parameter:
        name, separator, value = assignment.partition("=")
        if not (name and separator):
            raise ValueError(f"parameter: wanted name=value, got {assignment!r}")
        given[name] = _from_here(value) if value and name in PATHS else value
    if os.environ.get("OPTICAM_IMAGENET"):
        os.environ["OPTICAM_IMAGENET"] = _from_here(os.environ["OPTICAM_IMAGENET"])
    for name, said, option in (("parameter", given, "-p"), ("output", options.output, "-o")):
        if said and len(notebooks) != 1:
            raise ValueError(f"{name}: wanted exactly one notebook to go with {option}")
    outputs = {path: RESULTS / path.name for path in notebooks}
    if len({*outputs.values()}) < len(outputs):
        raise ValueError("notebooks: two of one name would write one file; wanted them one by one, each with -o")
    if options.output is not None:
        outputs = {notebooks[0]: _writable(options.output, (".ipynb",))}
    if given or options.output is not None:  # the committed figures stay those of the demo
        given = places_beside(outputs[notebooks[0]], notebook_parameters(notebooks[0])) | given
    start = time.time()
    try:
        run_notebooks(outputs, given, jobs=options.jobs)
    finally:  # also for the pages that ran before one failed
        if not given:
            _show_findings(notebooks, since=start)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Show what the committed notebooks claim beside what the last run here found."""
    paths = list_notebooks()
    if options.evidence:
        with TemporaryDirectory() as folder:
            places = {name: str(Path(folder, name)) for name in ("figures", "results")}
            parts = [part for path in paths if (part := evidence_part(path, Path(folder)))]
            run_notebooks({part: Path(folder, "executed", part.name) for part in parts}, places)
            _show_findings(paths, Path(places["results"]))
    elif not _show_findings(paths):
        raise ValueError("results: no run has left findings here; first: opticam run")
    return 0


def _show_findings(pages: Sequence[Path], results: Path | None = None, since: float = 0.0) -> bool:
    from opticam.lab.findings import compare

    table = compare(results or RESULTS.parent, since)
    table = table[table["page"].isin([path.stem for path in pages])]
    if len(table):
        print(table.to_markdown(index=False))
        held = int((table["agrees"] == "yes").sum())
        print(f"{len(table)} findings: {held} hold here, {len(table) - held} do not")
    return len(table) > 0


def _from_here(path: str) -> str:
    """A path of the caller as notebooks need it: they run in a folder of their own."""
    return str(Path(path).expanduser().absolute())


def _writable(output: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(output)
    if len(os.fsencode(path.name)) > 230:  # 255, less what the name has while the file is being written
        raise ValueError(f"output: wanted a shorter name for the file, of at most 230 bytes, got {path.name!r}")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"output: wanted a name ending in {' or '.join(suffixes)}, got {output!r}")
    check_writable(path.parent)
    if path.is_dir():
        raise ValueError(f"output: {output!r} is a folder; wanted the name of a file")
    return path


def batch(options: argparse.Namespace) -> int:
    """Run notebooks over grids of parameters, here or on a cluster; runs that are done are skipped."""
    try:
        from opticam.jobs.batch import read_batches, read_record, select_runs, write_evidence

        if not options.dry_run and options.ship is None:
            import opticam.jobs.cluster  # noqa: F401  (what it lacks is said here)
    except ModuleNotFoundError as error:
        raise ValueError(f"batch: needs the extra batch: pip install '.[batch]' in a clone ({error})") from error
    parts = read_batches(options.file)
    if options.ship is not None and options.dry_run:
        raise ValueError("ship: wanted without --dry-run, which alone says what is done")
    chosen = select_runs([item for part in parts for item in part.runs], options.filter)
    if options.ship is not None:
        some = [part._replace(runs=[item for item in chosen if item.folder == part.folder]) for part in parts]
        written = [item for part in some if part.runs for item in write_evidence(part, Path(options.ship)).items()]
        for path, text in written:
            print(f"wrote {path}: {text}")
        if not written:
            raise ValueError(f"ship: no run with evidence is done; first: opticam batch {options.file}")
        return 0
    all_done = True
    for part in parts:
        runs = [item for item in chosen if item.folder == part.folder]
        if runs and options.dry_run:
            for item in runs:
                print(f"{read_record(item)['status']:6}  {item.name}")
            print(f"{len(runs)} runs of {runs[0].notebook.stem} into {part.folder}")
        elif runs:
            all_done &= _run_part(part, runs, options)
    return 0 if all_done else 1


def _run_part(part: "Batch", runs: "Sequence[Run]", options: argparse.Namespace) -> bool:
    """Some runs of one document of a batch; whether all of them are done."""
    from opticam.jobs.batch import write_index, write_summary, write_tables
    from opticam.jobs.cluster import run_batch

    try:
        records = run_batch(runs, scheduler=options.scheduler, jobs=options.jobs, retry_failed=options.retry_failed)
    finally:
        if part.folder.is_dir():
            print(f"wrote {write_index(part)}")
    summary = write_summary(part)
    print(f"wrote {summary} and summary.csv" if summary else "no run wrote rows for a summary")
    if summary and (tables := write_tables(summary, part.runs[0].varied)):
        print(f"wrote {tables}")
    failed = [(item, record) for item, record in zip(runs, records, strict=True) if record["status"] != "done"]
    for item, record in failed:
        print(f"{record['status']}: {item.name}: {record.get('error')}", file=sys.stderr)
    print(f"{len(runs) - len(failed)} done, {len(failed)} failed")
    return not failed


def render(options: argparse.Namespace) -> int:
    """Render notebooks in place, as they are committed."""
    run_notebooks(dict.fromkeys(_notebooks(options.notebooks)), jobs=options.jobs)
    return 0


def _notebooks(names: Sequence[str]) -> list[Path]:
    found = {path.resolve(): path for path in map(find_notebook, names)}  # each once, however it was named
    return [*found.values()] or list_notebooks()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("opticam", description="Opti-CAM: explain the decisions of image classifiers.")
    try:
        installed = version("opticam")
    except PackageNotFoundError:  # a copy of the package alone
        installed = "(not installed)"
    parser.add_argument("--version", action="version", version=f"opticam {installed}")
    commands = parser.add_subparsers(required=True, metavar="explain | run | verify | batch | render")

    def command(function: Callable, words: str, **options: Any) -> Callable:
        added = commands.add_parser(function.__name__, help=words, description=function.__doc__, **options)
        added.set_defaults(command=function, parser=added)
        return added.add_argument

    add = command(explain, "explain one photo")
    add("photo", help="an image file")
    libraries = "also timm/NAME, torchvision/NAME, hf/NAME"
    add("--model", default="efficientnet_lite0", help=f"default: %(default)s, which needs no download; {libraries}")
    add("--checkpoint", metavar="FILE", help="own weights of the model, or a .toml that says more")
    add("--head", choices=("softmax", "sigmoid"), help="sigmoid where several classes may be true at once")
    add("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values shown black and white, beyond 8 bits")
    add("--class", dest="class_name", metavar="CLASS", help="index or name; default: the predicted class")
    libraries = "captum:NAME, grad-cam:NAME, torchcam:NAME; an unknown name lists all"
    add("--method", default="opti_cam", help=f"opti_cam (default), grad_cam, ..., {libraries}")
    add("--schedule", help="of opti_cam: paper (default), fast or robust; 102, 20 and 59 passes")
    add("--layer", help="dotted name of the target layer; default: the model's own")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    named = "PHOTO.METHOD.png here, with the schedule and the class if they were given"
    add("--output", help=f"picture to write; default: {named}")

    notebooks = {"nargs": "*", "metavar": "NOTEBOOK", "help": "number, name or path; default: all"}
    at_once = {"type": int, "metavar": "N", "help": "notebooks at the same time; default: one per core"}
    add = command(run, "run notebooks with parameters", add_help=False)
    add("-h", "--help", action="store_true", help="show this, or the parameters of the notebooks that are named")
    add("notebooks", **notebooks)
    beside = "figures and tables then go into a folder beside the output, with its name"
    add("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help=f"set a parameter; {beside}")
    add("-o", "--output", help="executed notebook; default: data/results/notebooks/NAME.ipynb")
    add("--jobs", **at_once)
    add("--list", action="store_true", help="list the notebooks and their parameters")

    add = command(verify, "compare findings")
    shipped = "compute those of the rows in data/evidence again; minutes, no network"
    add("--evidence", action="store_true", help=shipped)

    add = command(batch, "run notebooks over grids")
    add("file", metavar="FILE", help="YAML file, or the name of one in notebooks/batches")
    add("--dry-run", action="store_true", help="print the runs and their states")
    add("--filter", action="append", default=[], metavar="NAME=PATTERN", help="only runs whose parameter matches")
    add("--jobs", type=int, help="runs at the same time on this machine")
    ship = "run nothing; write the rows of the runs that are done to the files in data/evidence that the batch names"
    add("--ship", nargs="?", const=EVIDENCE, metavar="FOLDER", help=ship)
    add("--retry-failed", action="store_true", help="also repeat runs that failed before")
    on = "Dask scheduler to run on; default: DASK_SCHEDULER_ADDRESS, else a cluster of this machine alone"
    add("--scheduler", metavar="ADDRESS|FILE", default=os.environ.get("DASK_SCHEDULER_ADDRESS"), help=on)

    add = command(render, "render notebooks in place")
    add("notebooks", **notebooks)
    add("--jobs", **at_once)
    return parser
