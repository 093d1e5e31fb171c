"""Export of fitted detectors to ONNX, for machines without Python or torch."""

import copy
from numbers import Integral
from pathlib import Path

import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.overrides import TorchFunctionMode

from ._fitting.loop import seeded
from ._fitting.progress import replacing
from .base import BaseDetector
from .calibration import ThresholdCalibrator
from .methods.descargan import DeScarGAN
from .methods.differnet import DifferNet
from .methods.mnad import MNAD
from .methods.smai import SMAI
from .methods.spade import SPADE

__all__ = ["export"]

RANDOM_FUNCTIONS = {torch.rand, torch.randn, torch.randint, torch.randperm}
MAX_BYTES = 2**31 - 2**24  # what a protobuf message may hold, and some for the graph
N_CANDIDATES = 4


def export(detector, path, *, batch_size=1):
    """Write a fitted detector into an ONNX file.

    The file takes images of the size of the training images as bytes and holds all that
    the detector does to them, so that ``onnxruntime`` needs nothing else::

        session = onnxruntime.InferenceSession("detector.onnx")
        maps, scores = session.run(None, {"images": images})

    Parameters
    ----------
    detector : object
        A fitted detector, or a `ThresholdCalibrator` around one.
    path : str or path-like
        File to write. An older one is replaced when the new one is complete.
    batch_size : int, default=1
        Number of images that the file takes at once.

    Raises
    ------
    TypeError
        If the estimator is no detector, or of a method that a fixed graph cannot hold.
    ValueError
        If `batch_size` is no positive integer, the detector learned from clips, or its
        network and gallery exceed 2 GiB.
    FileNotFoundError
        If the folder of `path` does not exist.
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
    image to image, SPADE with an approximate index, MNAD with ``update_at_test`` and
    DeScarGAN's classifier cannot be exported.

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
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: its folder does not exist.")
    thresholds = detector
    if isinstance(detector, ThresholdCalibrator):
        check_is_fitted(detector)
        detector = detector.estimator_
    _check(detector)
    onnx = _import_onnx()
    detector = copy.copy(detector).set_params(precision="float32", device="cpu")
    detector.network_ = copy.deepcopy(detector.network_).cpu()
    graph = (_SPADEGraph if isinstance(detector, SPADE) else _Graph)(detector).eval()
    images = torch.zeros(batch_size, *detector.image_shape_, dtype=torch.uint8)

    draws = _Draws()
    with torch.no_grad(), seeded(detector._seed), draws:
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
    with replacing(path) as temporary:
        onnx.save(model, temporary)


def _check(detector):
    name = type(detector).__name__
    if not isinstance(detector, BaseDetector):
        raise TypeError(
            f"{name} is no detector of skanomaly. Of a pipeline, export the last step "
            "and apply the other steps before it."
        )
    check_is_fitted(detector)
    reason = {
        DifferNet: "its maps are gradients, and ONNX graphs only go forward",
        SMAI: "its superpixels differ in number from image to image",
    }.get(type(detector))
    if isinstance(detector, SPADE):
        if detector.algorithm != "brute":
            reason = "its approximate index is not made of ONNX operators"
        elif detector.backbone == "precomputed" or not detector.gallery_size:
            reason = "it has no backbone or no gallery of its own"
    if isinstance(detector, DeScarGAN) and detector.image_score == "classifier":
        reason = (
            "ONNX has no adaptive pooling, which its classifier ends in; with "
            "image_score='map' it can be"
        )
    if isinstance(detector, MNAD) and detector.update_at_test:
        reason = "with update_at_test=True its memory changes from image to image"
    if reason is not None:
        raise TypeError(f"{name} cannot be exported: {reason}.")
    if detector._clip_length is not None:
        raise ValueError(f"{name} has learned from clips; export takes images only.")
    tensors = list(detector.network_.state_dict().values())
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    if isinstance(detector, SPADE):
        n_bytes += sum(gallery.nbytes for gallery in detector.gallery_.values())
    if n_bytes > MAX_BYTES:
        raise ValueError(
            f"This {name} holds {n_bytes / 2**30:.1f} GiB, but an ONNX file at most 2. "
            "Fewer training images or smaller ones make it smaller."
        )


def _import_onnx():
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "export needs onnx and onnxscript: pip install 'skanomaly[onnx]'."
        ) from error
    return onnx


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


class _Graph(nn.Module):
    """A detector as a module: bytes in, maps and scores out."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)  # hidden from torch

    def forward(self, images):
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        embedded = detector._embed(images.permute(0, 3, 1, 2).float() / 255)
        maps = detector._anomaly_maps(embedded)
        return maps, -detector._anomaly_scores(embedded, maps)


class _SPADEGraph(nn.Module):
    """SPADE with its search as plain products, one gallery image after the other."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network_
        self.detector = (detector,)
        self.register_buffer("embeddings", torch.from_numpy(detector.embeddings_))
        for layer, gallery in detector.gallery_.items():
            self.register_buffer(f"gallery_{layer}", torch.from_numpy(gallery))

    def forward(self, images):
        """Return maps (b, H, W) and scores (b,) of images (b, H, W, C)."""
        (detector,) = self.detector
        features, pooled = detector._features(images.permute(0, 3, 1, 2).float() / 255)
        distances = (pooled[:, None] - self.embeddings).norm(dim=2)
        n_wanted = max(detector.n_neighbors, detector.gallery_size)
        distances, neighbors = distances.topk(
            min(n_wanted, len(self.embeddings)), largest=False
        )
        maps = detector._maps(
            features, lambda layer, queries: self._search(layer, queries, neighbors)
        )
        embedded = features, distances, neighbors
        return maps, -detector._anomaly_scores(embedded, maps)

    def _search(self, layer, queries, neighbors):
        """Return the distances (b, p, k) of queries (b, p, c) to images' features."""
        (detector,) = self.detector
        gallery = getattr(self, f"gallery_{layer}").flatten(1, 2)  # (n, q, c)
        neighbors = neighbors[:, : detector.gallery_size]
        center = gallery[neighbors[:, 0]].mean(dim=1, keepdim=True)  # (b, 1, c)
        centred, candidates = queries - center, []
        for rows in neighbors.unbind(dim=1):
            images = gallery[rows]  # (b, q, c)
            others = images - center
            # half the squared norm of the query less half the squared distance
            closeness = centred @ others.mT - others.square().sum(dim=2)[:, None] / 2
            n_kept = min(detector.n_pixel_neighbors + N_CANDIDATES, images.shape[1])
            kept = closeness.topk(n_kept, dim=2).indices  # (b, p, n_kept)
            index = kept.flatten(1)[..., None].expand(-1, -1, images.shape[2])
            nearest = images.gather(1, index).unflatten(1, kept.shape[1:])
            candidates.append((nearest - queries[:, :, None]).norm(dim=3))
        distances = torch.cat(candidates, dim=2)  # (b, p, n_images * n_kept)
        n_neighbors = min(detector.n_pixel_neighbors, distances.shape[2])
        return distances.topk(n_neighbors, dim=2, largest=False).values
