"""Scikit-learn-compatible estimators for visual anomaly detection."""

from .autoencoder import Autoencoder, VariationalAutoencoder
from .backbones import BackboneFeatures
from .draem import DRAEM
from .images import CenterCropImages, LoadImages, ResizeImages, ToDevice
from .intra import InTra
from .pipeline import Pipeline, make_pipeline
from .riad import RIAD
from .scadn import SCADN
from .smai import SMAI
from .spade import SPADE

__version__ = "0.1.0"

__all__ = [
    # detectors that compare with stored features
    "SPADE",
    # detectors that reconstruct
    "Autoencoder",
    "VariationalAutoencoder",
    "DRAEM",
    # detectors that inpaint
    "InTra",
    "RIAD",
    "SCADN",
    "SMAI",
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
