"""Configuration of the documentation site."""

import tempfile
import warnings
import zlib

import skanomaly

project = "skanomaly"
copyright = "the skanomaly developers"
version = release = skanomaly.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "literal"  # names of parameters

autosummary_generate = True
autosummary_context = {
    "detectors": [
        name
        for name in skanomaly.__all__
        if hasattr(getattr(skanomaly, name), "_judge")
    ],
    # that tell more of what is no detector
    "pages": {
        "AnomalyMapDisplay": "inspection",
        "BackboneFeatures": "pipelines",
        "CenterCropImages": "pipelines",
        "LoadImages": "pictures",
        "OneClassKFold": "choosing",
        "Pipeline": "pipelines",
        "RegionOfInterest": "large_photographs",
        "ResizeImages": "pipelines",
        "ThresholdCalibrator": "thresholds",
        "TiledDetector": "large_photographs",
        "ToDevice": "pipelines",
        "export": "files",
        "find_regions": "inspection",
        "full_size_maps": "inspection",
        "inspect": "inspection",
        "load_folder": "own_folder",
        "load_mvtec": "own_folder",
        "load_mvtec_ad2": "own_folder",
        "load_mvtec_loco": "own_folder",
        "load_visa": "own_folder",
        "localize": "inspection",
        "make_pipeline": "pipelines",
        "plant_defects": "choosing",
    },
}
numpydoc_show_class_members = False
autodoc_typehints = "none"  # docstrings name types, and ArrayLike fills lines

GALLERY_ORDER = [
    "plot_quickstart.py",
    "plot_own_folder.py",
    "plot_camera_loop.py",
    "plot_choosing.py",
]


def place_in_gallery(name):
    """Return what examples are sorted by: first steps first, then by name."""
    begins = name in GALLERY_ORDER
    return (not begins, GALLERY_ORDER.index(name) if begins else name)


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": place_in_gallery,
    "doc_module": ("skanomaly",),
    "backreferences_dir": "generated/examples_of",
    "min_reported_time": 3600,
    "show_memory": False,
    "write_computation_times": False,  # the page would load scripts from elsewhere
}

# the order of the gallery is a function, so that the configuration is not cached
suppress_warnings = ["config.cache"]

html_theme = "pydata_sphinx_theme"
html_title = f"skanomaly {version}"
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": {"index": [], "**": ["page-toc"]},
}
html_sidebars = {"index": []}
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# What these pages cite of other projects. Where their sites are not reached, links are
# made from this list.
CITED = {
    "https://scikit-learn.org/stable/": [
        ("sklearn.frozen.FrozenEstimator", "class", "modules/generated/$.html#$"),
        ("sklearn.pipeline.Pipeline", "class", "modules/generated/$.html#$"),
        *(
            (f"sklearn.{name}", "function", "modules/generated/$.html#$")
            for name in (
                "metrics.average_precision_score",
                "metrics.make_scorer",
                "metrics.roc_auc_score",
            )
        ),
        (
            "sklearn.model_selection.HalvingGridSearchCV",
            "class",
            "modules/generated/$.html#$",
        ),
    ],
    "https://joblib.readthedocs.io/en/stable/": [
        ("joblib.parallel_backend", "function", "generated/$.html#$"),
    ],
    "https://numpy.org/doc/stable/": [
        ("numpy.memmap", "class", "reference/generated/$.html#$"),
    ],
    "https://docs.pytorch.org/docs/stable/": [
        ("torch.Tensor", "class", "tensors.html#$"),
    ],
}


def inventory(entries):
    """Write an inventory of objects of another project; return its path."""
    lines = [f"{name} py:{kind} 1 {uri} -" for name, kind, uri in entries]
    with tempfile.NamedTemporaryFile(suffix=".inv", delete=False) as file:
        file.write(b"# Sphinx inventory version 2\n# Project: \n# Version: \n# zlib\n")
        file.write(zlib.compress("\n".join(lines).encode()))
    return file.name


intersphinx_mapping = {
    url.split("/")[2].split(".")[-2]: (url, (None, inventory(entries)))
    for url, entries in CITED.items()
}
intersphinx_timeout = 10

warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive")
