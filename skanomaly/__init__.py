"""Scikit-learn-compatible estimators for visual anomaly detection."""

from .autoencoder import Autoencoder, VariationalAutoencoder
from .backbones import BackboneFeatures
from .calibration import ThresholdCalibrator
from .descargan import DeScarGAN
from .differnet import DifferNet
from .draem import DRAEM
from .images import CenterCropImages, LoadImages, ResizeImages, ToDevice
from .intra import InTra
from .memae import MemAE
from .mnad import MNAD
from .pipeline import Pipeline, localize, make_pipeline
from .pnet import PNet
from .riad import RIAD
from .scadn import SCADN
from .smai import SMAI
from .spade import SPADE
from .version import __version__ as __version__

__all__ = [
    # detectors on pretrained features
    "DifferNet",
    "SPADE",
    # detectors that reconstruct
    "Autoencoder",
    "VariationalAutoencoder",
    "DRAEM",
    "MemAE",
    "MNAD",
    "PNet",
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
    "ResizeImages",
    "ToDevice",
    # composition
    "Pipeline",
    "make_pipeline",
    "ThresholdCalibrator",
    "localize",
]
