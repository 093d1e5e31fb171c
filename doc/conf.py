"""Configuration of the documentation site."""

import warnings

import skanomaly

project = "skanomaly"
copyright = "the skanomaly developers"
version = release = skanomaly.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"

autosummary_generate = True
numpydoc_show_class_members = False
autodoc_typehints = "none"  # docstrings name types, and ArrayLike fills lines

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "min_reported_time": 3600,
    "show_memory": False,
}

html_theme = "pydata_sphinx_theme"
html_title = f"skanomaly {version}"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}

warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive")
