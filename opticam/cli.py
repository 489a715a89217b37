"""The command line: opticam explain | run | render. Bad input ends in one sentence and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opticam.runner import (
    NotebookError,
    find_notebook,
    list_notebooks,
    notebook_parameters,
    render_notebook,
    run_notebook,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `opticam`; by default those of the process.

    Returns:
        0 if all went well, 1 if a notebook failed, 2 for bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"opticam: {error}", file=sys.stderr)
        return 2
    except NotebookError as error:
        print(f"opticam: {error}", file=sys.stderr)
        return 1


def explain(options: argparse.Namespace) -> int:
    """Explain one photo: print the top-5 classes and what masking does, write a picture."""
    import matplotlib

    matplotlib.use("agg")
    import torch

    from opticam.datasets import read_image, to_input
    from opticam.evaluate import score
    from opticam.methods import METHODS
    from opticam.models import class_index, load_model
    from opticam.plotting import METHOD_LABELS, explanation_figure, save_figure, use_style
    from opticam.saliency import apply_mask

    if options.method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {options.method!r}")
    output = Path(options.output or f"{Path(options.photo).stem}.{options.method}.png")
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"output: wanted a name ending in .png, .pdf or .svg, got {str(output)!r}")
    photo = read_image(options.photo)
    model = load_model(options.model, device=options.device)
    images = to_input(photo, model.input_size, model.resize)[None].to(options.device)
    with torch.no_grad():
        probs = model(images).double().softmax(1)[0]
    top = probs.topk(5)
    side = model.input_size
    print(f"{options.photo}  {photo.width}x{photo.height}, seen by {model.name} as its centre, {side}x{side}")
    for prob, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        print(f"  {100 * prob:5.1f} %  {model.class_names[index]}  ({index})")
    chosen = int(top.indices[0]) if options.class_name is None else class_index(options.class_name, model.class_names)
    class_idx = torch.tensor([chosen], device=options.device)
    saliency = METHODS[options.method](model, images, class_idx, layer=options.layer)
    row = score(model, images, class_idx, saliency).iloc[0]
    p, o = 100 * row["prob"], 100 * row["masked_prob"]
    name = model.class_names[chosen]
    label = METHOD_LABELS[options.method]
    print(f"{label} for {name} ({chosen}{', the predicted class' if options.class_name is None else ''})")
    print(f"  probability {p:.1f} % -> {o:.1f} % when masked, logit {row['logit']:.2f} -> {row['masked_logit']:.2f}")
    print(f"  drop {100 * row['average_drop']:.1f} %, gain {100 * row['average_gain']:.1f} % of what was possible")
    if saliency.amax() == saliency.amin():
        print("  the map is constant: this method finds nothing here for this class")
    use_style()
    titles = [f"{name}: {p:.1f} %", label, f"masked: {o:.1f} %"]
    figure = explanation_figure(images[0], saliency[0], apply_mask(images, saliency)[0], titles)
    print(f"wrote {save_figure(figure, output)}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Run notebooks with parameters."""
    if options.list:
        for path in list_notebooks():
            print(path.stem)
            for name, entry in notebook_parameters(path).items():
                print(f"    {name}: {entry['type']} = {entry['default']!r}  {entry['help']}")
        return 0
    notebooks = [find_notebook(name) for name in options.notebooks] or list_notebooks()
    given = {}
    for assignment in options.parameter:
        name, separator, value = assignment.partition("=")
        if not (name and separator):
            raise ValueError(f"parameter: wanted name=value, got {assignment!r}")
        given[name] = value
    if given and len(notebooks) != 1:
        raise ValueError("parameter: wanted exactly one notebook to go with -p")
    if options.output and len(notebooks) != 1:
        raise ValueError("output: wanted exactly one notebook to go with -o")
    folder = find_notebook(notebooks[0]).parent.parent / "data" / "results" / "notebooks"
    for path in notebooks:
        print(f"wrote {run_notebook(path, options.output or folder / path.name, given)}", flush=True)
    return 0


def render(options: argparse.Namespace) -> int:
    """Render notebooks in place, as they are committed."""
    for path in [find_notebook(name) for name in options.notebooks] or list_notebooks():
        print(f"rendered {render_notebook(path)}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opticam", description="Opti-CAM: explain the decisions of image classifiers."
    )
    commands = parser.add_subparsers(required=True, metavar="explain | run | render")

    command = commands.add_parser("explain", help="explain one photo", description=explain.__doc__)
    command.add_argument("photo", help="an image file")
    command.add_argument(
        "--model", default="efficientnet_lite0", help="default: efficientnet_lite0, which needs no download"
    )
    command.add_argument(
        "--class", dest="class_name", metavar="CLASS", help="index or name; default: the predicted class"
    )
    command.add_argument("--method", default="opti_cam", help="default: opti_cam")
    command.add_argument("--layer", help="dotted name of the target layer; default: the model's own")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    command.add_argument("--output", help="picture to write; default: PHOTO.METHOD.png in the current folder")
    command.set_defaults(command=explain)

    command = commands.add_parser("run", help="run notebooks with parameters", description=run.__doc__)
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="number, name or path; default: all")
    command.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="set a parameter")
    command.add_argument("-o", "--output", help="executed notebook; default: data/results/notebooks/NAME.ipynb")
    command.add_argument("--list", action="store_true", help="list the notebooks and their parameters")
    command.set_defaults(command=run)

    command = commands.add_parser("render", help="render notebooks in place", description=render.__doc__)
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="number, name or path; default: all")
    command.set_defaults(command=render)
    return parser
