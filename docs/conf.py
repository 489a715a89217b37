"""The site of `make docs`: the repository's own pages and committed notebooks, and a reference from the docstrings.

The source folder is the repository, so links between pages are the same here as where the code is shown.
"""

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {  # heading of the navigation -> pages
    "Start": ["docs/usage", "docs/troubleshooting", "data/README", "notebooks/batches/README"],
    "Methods and metrics": ["opticam/methods/README", "opticam/metrics/README", "docs/networks"],
    "Results": ["notebooks/README", "benchmarks/README", "docs/preregistration"],
    "Reference": ["docs/reference/core", "docs/reference/lab", "docs/reference/jobs"],
    "Develop": ["CONTRIBUTING", "CHANGELOG"],
}
MODULES = {  # page of the reference -> modules of the package
    "docs/reference/core": ["[!_]*.py", "methods/*.py", "metrics/*.py"],
    "docs/reference/lab": ["lab/[!_]*.py"],
    "docs/reference/jobs": ["jobs/[!_]*.py", "cli.py"],
}
NOTEBOOKS = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))

project = "Opti-CAM"
author = "the Opti-CAM laboratory maintainers"
version = release = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
exclude_patterns = [".venv", ".git", "data/results", "figures", "docs/_build"]
include_patterns = [
    f"{root_doc}.md",
    *(f"{page}.md" for pages in PAGES.values() for page in pages),
    "notebooks/*.ipynb",
]
html_theme = "furo"
html_title = f"Opti-CAM {version}"
html_static_path = html_css_files = ["style.css"]
html_show_copyright = False
html_extra_path = ["index.html"]  # a site begins at index.html, ours at README.html
html_copy_source = False

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # outputs have tables, which plain CommonMark does not know
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]


def append(app, docname, source):
    """What a page lacks where the code is shown: navigation on two pages, docstrings on those of the reference."""
    if docname == root_doc:
        for caption, pages in PAGES.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
    if docname == "notebooks/README":
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(NOTEBOOKS) + "\n```\n"
    for pattern in MODULES.get(docname, []):
        for path in sorted((REPOSITORY / "opticam").glob(pattern)):
            if path.stem != "cli" or pattern == "cli.py":
                name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
                directive = f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n"
                source[0] += f"\n## `{name}`\n\n```{{eval-rst}}\n{directive}```\n"


def mathml(writer, node):
    """Formulas as MathML, which browsers draw by themselves: the site needs nothing from elsewhere."""
    from docutils.nodes import SkipNode
    from docutils.utils.math.latex2mathml import tex2mathml

    block = node.__class__.__name__ == "math_block"
    formula = tex2mathml(node.astext().replace(r"\big", ""), as_block=block)  # browsers stretch brackets by themselves
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise SkipNode


def skipped(app, kind, name, member, skip, options):
    """Fields of a `NamedTuple` are described with their class."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", append)
    app.connect("autodoc-skip-member", skipped)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
