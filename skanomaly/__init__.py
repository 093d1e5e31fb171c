"""Scikit-learn-compatible estimators for visual anomaly detection."""

from .backbones import BackboneFeatures
from .calibration import ThresholdCalibrator
from .images import CenterCropImages, LoadImages, ResizeImages, ToDevice
from .methods.autoencoder import Autoencoder, VariationalAutoencoder
from .methods.descargan import DeScarGAN
from .methods.differnet import DifferNet
from .methods.draem import DRAEM
from .methods.intra import InTra
from .methods.memae import MemAE
from .methods.mnad import MNAD
from .methods.pnet import PNet
from .methods.riad import RIAD
from .methods.scadn import SCADN
from .methods.smai import SMAI
from .methods.spade import SPADE
from .pipeline import Pipeline, localize, make_pipeline
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
