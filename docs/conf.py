"""How Sphinx builds the site; `docs/build.py` calls it, on pages that it has put together."""

import os
import re
import sys

sys.path.insert(0, os.environ["WORKBENCH_SOURCE"])
from workbench import __version__

project, author, version = "Workbench", "", __version__
html_title = f"Workbench {version}"
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Notebooks were executed before; nothing is fetched when a page is read.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_heading_anchors = 3
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
python_display_short_literal_types = True


def mark_synopsis(_app, what, _name, _object, _options, lines: list[str]) -> None:
    """In a module's head, what is set in is a synopsis to paste: without a mark it would be taken for a quotation."""
    if what != "module":
        return
    marked, inside = [], False
    for line in lines:
        begins = re.match(" {4,}|from |with |import ", line) and (not marked or not marked[-1].strip())
        if not inside and begins:
            marked += [".. code-block:: python", ""]
            inside = True
            margin = len(line) - len(line.lstrip())
        elif inside and line.strip() and len(line) - len(line.lstrip()) < margin:
            marked += [""] if marked[-1].strip() else []
            inside = False
        marked.append(f"    {line[margin:]}" if inside and line.strip() else line)
    lines[:] = marked


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_synopsis, priority=100)
