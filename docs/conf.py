"""Sphinx settings: plain Markdown pages, the furo theme, warnings as errors (``sphinx-build -W``)."""

project = "layerbank"
author = "The layerbank authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "layerbank"
html_copy_source = False
myst_heading_anchors = 3
