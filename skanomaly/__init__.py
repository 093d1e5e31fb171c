"""Scikit-learn-compatible estimators for visual anomaly detection."""

from .backbones import BackboneFeatures
from .draem import DRAEM
from .images import CenterCropImages, LoadImages, ResizeImages, ToDevice
from .pipeline import Pipeline, make_pipeline
from .spade import SPADE

__version__ = "0.1.0"

__all__ = [
    # detectors that compare with stored features
    "SPADE",
    # detectors that reconstruct
    "DRAEM",
    # transformers
    "BackboneFeatures",
    "CenterCropImages",
    "LoadImages",
    "ResizeImages",
    "ToDevice",
    # composition
    "Pipeline",
    "make_pipeline",
]
