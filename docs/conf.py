# SPDX-License-Identifier: Apache-2.0
"""The site: ``make docs`` builds it into build/site, from the same files that a repository shows as they are.

The source folder is the root of the repository, so that every relative link means the same in both places; what is no
page (configs, results, tests) is offered as a file. Nothing is fetched from the network, here or by a reader's browser.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import moeapps  # noqa: E402

project = "moeapps"
author = "The moeapps developers"
copyright = f"{author}; Apache-2.0"
version = release = moeapps.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "tasks/*/README.md"]
# Named for speed: Sphinx looks into every folder that is not excluded.
exclude_patterns = [".*", "build", "dist", "runs", "data", "tests", "benchmarks", "moeapps", "configs", "notebooks"]

myst_heading_anchors = 4
# The README begins sections at the second level after a picture; level jumps of a computed page are no fault.
suppress_warnings = ["myst.header"]

# A package re-exports what its modules define: shown once, where it is defined.
autodoc_default_options = {"members": True, "ignore-module-all": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch and Lightning are theirs
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

highlight_language = "text"  # blocks without a language are commands and layouts
html_theme = "furo"
html_title = f"moeapps {release}"
html_static_path = ["_site"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # index.html of the site's root leads to docs/index.html
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"  # drawn by the browser itself; the usual renderer is fetched from the network


def inline_math(translator: Any, node: nodes.math) -> None:
    """Write a formula of a line as MathML."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own line as MathML."""
    translator.body.append(f"<div>{tex2mathml(node.astext(), as_block=True)}</div>")
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Tell Sphinx of the renderer."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
