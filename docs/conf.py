"""How the documentation is built, see `make docs`.

Its root is the repository, so that its pages, the README and the code can name each other by paths that
lead somewhere on a code host as well (docs/decisions/0024).
"""

from __future__ import annotations

from pathlib import Path

import usmlite

_ROOT = Path(__file__).parents[1]
_PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md"]

project = "usmlite"
author = "The usmlite authors"
copyright = "The usmlite authors"
version = release = usmlite.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
root_doc = "docs/index"
include_patterns = _PAGES
# Not even looked into: virtual environments, runs and speech may lie beside the pages.
exclude_patterns = [path.name for path in _ROOT.iterdir() if path.name != "docs" and path.suffix != ".md"]

# A link to a heading names it as code hosts do.
myst_heading_anchors = 4

# Docstrings mark code as Markdown does.
default_role = "literal"
smartquotes = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
sphinx_argparse_cli_prefix_document = True

html_theme = "furo"
html_title = "usmlite"
html_extra_path = ["site"]  # its index.html leads to docs/index.html
html_copy_source = False
