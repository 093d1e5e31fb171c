"""Export of fitted detectors to ONNX, for machines without Python or torch."""

import copy
import os
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.overrides import TorchFunctionMode

from ._extras import required
from ._fitting.files import replacing
from ._fitting.loop import seeded_generator
from ._fitting.persistence import as_fitted
from ._typing import StrPath
from ._validation import ValueRange, checked_offset
from .base import BaseDetector
from .calibration import ThresholdCalibrator

__all__ = ["export"]

RANDOM_FUNCTIONS = {torch.rand, torch.randn, torch.randint, torch.randperm}
MAX_BYTES = 2**31 - 2**24  # what a protobuf message may hold, and some for the graph


def export(detector: Any, path: StrPath, *, batch_size: int = 1) -> None:
    """Write a fitted detector into an ONNX file.

    The file takes images of the size of the training images as bytes and holds all that
    the detector does to them, so that ``onnxruntime`` needs nothing else::

        session = onnxruntime.InferenceSession("detector.onnx")
        maps, scores = session.run(None, {"images": images})

    Parameters
    ----------
    detector : object
        A fitted detector, or a :class:`~skanomaly.ThresholdCalibrator` around one.
    path : str or path-like
        File to write. An older one is replaced when the new one is complete.
    batch_size : int, default=1
        Number of images that the file takes at once.

    Raises
    ------
    TypeError
        If the estimator is no detector, or of a method that a fixed graph cannot hold.
    ValueError
        If `batch_size` is no positive integer, the detector learned from clips or from
        images on another scale than uint8 or [0, 1], or its network and gallery exceed
        2 GiB.
    FileNotFoundError
        If the folder of `path` does not exist.
    IsADirectoryError
        If `path` is a folder.
    ImportError
        If onnx or onnxscript is missing.

    Notes
    -----
    The input ``images`` has the shape (batch_size, H, W, C) and the type uint8. The
    outputs are ``maps``, those of ``localize``, and ``scores``, those of
    ``score_samples``: higher is more normal. An image is anomalous if its score is
    below ``offset``, and a pixel if its map exceeds ``map_threshold``; both stand in
    the file's metadata, as text.

    Networks compute in float32 whatever ``precision`` is. Masks and samples that a
    method draws for every call are those of its seed, stored as constants.

    DifferNet, whose maps are gradients, SMAI, whose superpixels differ in number from
    image to image, SPADE and PatchSVDD with an approximate index, PatchDetector with
    another estimator than a PCA, MNAD with ``update_at_test`` and what takes
    precomputed features cannot be exported.

    Needs the packages of ``pip install skanomaly[onnx]``.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import Autoencoder
    >>> from skanomaly.onnx import export
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 1))
    >>> detector = Autoencoder(code_size=8, width=4, max_epochs=1).fit(X)
    >>> export(detector, "detector.onnx")  # doctest: +SKIP
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be an integer >= 1.")
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise IsADirectoryError(
            f"path={str(path)!r} is a folder; give the file, such as "
            f"{str(path / 'detector.onnx')!r}."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: its folder does not exist.")
    thresholds = detector
    if isinstance(detector, ThresholdCalibrator):
        check_is_fitted(detector)
        detector = detector.estimator_
    _check(detector)
    checked_offset(detector)  # warns
    onnx, _ = (
        required(package, extra="onnx", wanted_by="export")
        for package in ("onnx", "onnxscript")
    )
    detector = copy.copy(detector).set_params(precision="float32", device="cpu")
    if hasattr(detector, "memory"):
        detector.set_params(memory=None)
    detector.network_ = copy.deepcopy(detector.network_).cpu()
    detector = as_fitted(detector)
    graph = (detector._as_module() or JudgingModule(detector)).eval()
    _check_size(detector, graph)
    images = torch.zeros(batch_size, *detector.image_shape_, dtype=torch.uint8)

    draws = _Draws()
    with torch.no_grad(), draws:
        graph(images)
    with torch.no_grad(), draws.again():
        program = torch.onnx.export(
            graph,
            (images,),
            input_names=["images"],
            output_names=["maps", "scores"],
            dynamo=True,
            optimize=False,  # onnxruntime does it when it loads the file
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(
        model,
        {
            "method": type(detector).__name__,
            "offset": repr(float(thresholds.offset_)),
            "map_threshold": repr(float(thresholds.map_threshold_)),
        },
    )
    with replacing(path, f"path={str(path)!r}") as file:
        onnx.save(model, file)


def _check(detector):
    name = type(detector).__name__
    if not isinstance(detector, BaseDetector):
        raise TypeError(
            f"{name} is no detector of skanomaly. Of a pipeline, export the last step, "
            "pipeline[-1] or calibrator.estimator_[-1], and apply the other steps "
            "before it."
        )
    check_is_fitted(detector)
    if (reason := detector._why_not_exported()) is not None:
        raise TypeError(f"{name} cannot be exported: {reason}.")
    if detector._clip_length is not None:
        raise ValueError(f"{name} has learned from clips; export takes images only.")
    seen = ValueRange(*detector._value_range)
    if not seen.is_unit:
        raise ValueError(
            f"{name} was fitted on {seen}, but an exported file takes bytes and "
            "divides them by 255: fit it on uint8, or on numbers in [0, 1]."
        )


def _check_size(detector, graph):
    n_bytes = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if n_bytes > MAX_BYTES:
        raise ValueError(
            f"This {type(detector).__name__} holds {n_bytes / 2**30:.1f} GiB, but an "
            "ONNX file at most 2. Fewer training images or smaller ones help."
        )


class _Draws(TorchFunctionMode):
    """Records what torch's random functions return, and returns it once more."""

    def __init__(self):
        super().__init__()
        self.known = []
        self.replayed = None

    def again(self):
        """Return a mode that returns the same draws."""
        mode = _Draws()
        mode.known, mode.replayed = self.known, 0
        return mode

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in RANDOM_FUNCTIONS:
            return function(*args, **(kwargs or {}))
        if self.replayed is None:
            self.known.append(function(*args, **(kwargs or {})))
            return self.known[-1]
        self.replayed += 1
        return self.known[(self.replayed - 1) % len(self.known)]


class JudgingModule(nn.Module):
    """A fitted detector as a module: bytes in, maps and scores out."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)  # hidden from torch

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        degrees, maps = detector._judge(
            images.permute(0, 3, 1, 2).float() / 255,
            maps_wanted=True,
            generator=seeded_generator(detector._seed),
        )
        return maps, -degrees
