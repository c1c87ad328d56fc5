"""Sphinx configuration: Markdown pages by MyST."""

project = "lvlm-sim"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "alabaster"
