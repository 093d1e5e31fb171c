"""Scikit-learn-compatible estimators for visual anomaly detection.

The names below are imported at once; the modules ``backbones``, ``datasets``,
``display``, ``images``, ``inspection``, ``metrics``, ``model_selection``, ``onnx`` and
``pipeline`` when they are first asked for, as in ``skanomaly.metrics.f1_max``.
"""

import importlib

from .backbones import BackboneFeatures
from .calibration import ThresholdCalibrator
from .images import (
    CenterCropImages,
    LoadImages,
    RegionOfInterest,
    ResizeImages,
    ToDevice,
)
from .methods.autoencoder import Autoencoder, VariationalAutoencoder
from .methods.descargan import DeScarGAN
from .methods.differnet import DifferNet
from .methods.draem import DRAEM
from .methods.fcdd import FCDD
from .methods.intra import InTra
from .methods.memae import MemAE
from .methods.mnad import MNAD
from .methods.padim import PaDiM
from .methods.patch_detector import PatchDetector
from .methods.patch_svdd import PatchSVDD
from .methods.patchcore import PatchCore
from .methods.pnet import PNet
from .methods.puzzle_ae import PuzzleAE
from .methods.riad import RIAD
from .methods.scadn import SCADN
from .methods.smai import SMAI
from .methods.spade import SPADE
from .pipeline import Pipeline, localize, make_pipeline
from .tiling import TiledDetector
from .version import __version__ as __version__

__all__ = [
    # detectors on pretrained features
    "DifferNet",
    "PaDiM",
    "PatchCore",
    "PatchDetector",
    "SPADE",
    # detectors on features of their own
    "FCDD",
    "PatchSVDD",
    # detectors that reconstruct
    "Autoencoder",
    "VariationalAutoencoder",
    "DRAEM",
    "MemAE",
    "MNAD",
    "PNet",
    "PuzzleAE",
    # detectors that inpaint
    "InTra",
    "RIAD",
    "SCADN",
    "SMAI",
    # a detector that learns from labels
    "DeScarGAN",
    # transformers
    "BackboneFeatures",
    "CenterCropImages",
    "LoadImages",
    "RegionOfInterest",
    "ResizeImages",
    "ToDevice",
    # composition
    "Pipeline",
    "make_pipeline",
    "ThresholdCalibrator",
    "TiledDetector",
    "localize",
]

_MODULES = (
    "backbones",
    "datasets",
    "display",
    "images",
    "inspection",
    "metrics",
    "model_selection",
    "onnx",
    "pipeline",
)


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_MODULES})
