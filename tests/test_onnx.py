"""Exported detectors give the maps and scores of the originals."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline

from skanomaly import (
    MNAD,
    SPADE,
    Autoencoder,
    DifferNet,
    MemAE,
    ResizeImages,
    ThresholdCalibrator,
    VariationalAutoencoder,
)
from skanomaly.methods.spade import QUERIES_AT_ONCE
from skanomaly.onnx import export

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BACKBONE = {"backbone": "resnet18", "n_neighbors": 3}

EXPORTABLE = [
    ("Autoencoder", {}),
    ("Autoencoder", {"loss": "l2", "patch_size": 36}),
    ("VariationalAutoencoder", {}),
    ("MemAE", {}),
    ("PatchSVDD", {}),
    ("PatchDetector", {}),
    ("PatchDetector", {"estimator": PCA(4), "image_score": "top"}),
    ("PatchCore", {}),
    ("PatchCore", {"coreset": 0.5, "n_reweighting_neighbors": 5}),
    ("PaDiM", {}),
    ("PuzzleAE", {}),
    ("FCDD", {}),
    ("MNAD", {}),
    ("DRAEM", {}),
    ("RIAD", {"cell_sizes": (4,), "n_masks": 2}),
    ("SCADN", {}),
    ("InTra", {"patch_size": 8}),
    ("PNet", {}),
    ("DeScarGAN", {}),
    ("DeScarGAN", {"image_score": "mean"}),
    ("SPADE", {"layers": ("layer1", "layer2"), "gallery_size": 5, **BACKBONE}),
    (
        "SPADE",
        {"layers": ("layer1",), "gallery_size": 3, "n_pixel_neighbors": 3}
        | {"image_score": "max", **BACKBONE},
    ),
    (
        "SPADE",
        {"backbone": "efficientnet_lite0", "layers": ("blocks.2",), "n_neighbors": 3},
    ),
]


def images(n, size=40, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    waves = 128 + 60 * np.sin(np.arange(size) / 3)[:, None, None]
    noise = rng.normal(0, 20, (n, size, size, channels))
    return (waves + noise).clip(0, 255).astype(np.uint8)


def run(path, X):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["maps", "scores"], {"images": X}), session


def test_a_memory_of_features_does_not_hinder(tmp_path, small):
    X, X_test = images(6), images(2, seed=1)
    detector = small("PatchDetector", memory=tmp_path / "memory").fit(X)
    export(detector, tmp_path / "detector.onnx", batch_size=2)
    (_, scores), _ = run(tmp_path / "detector.onnx", X_test)
    expected = detector.score_samples(X_test)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), EXPORTABLE)
def test_maps_and_scores_are_those_of_the_detector(name, settings, tmp_path, small):
    X, X_test = images(12), images(2, seed=1)
    y = np.where(np.arange(12) % 2, -1, 1) if name == "DeScarGAN" else None
    detector = small(name, **settings).fit(X, y)
    export(detector, tmp_path / "detector.onnx", batch_size=2)
    (maps, scores), session = run(tmp_path / "detector.onnx", X_test)
    expected = detector.localize(X_test)
    scale = np.abs(expected).max()
    # MNAD's scores are relative to the narrow range of the training images
    rtol = 1e-3 if name == "MNAD" else 1e-4
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(
        scores, detector.score_samples(X_test), rtol=rtol, atol=1e-4 * scale
    )
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["method"] == name
    assert float(properties["offset"]) == detector.offset_
    assert float(properties["map_threshold"]) == detector.map_threshold_
    # the export left the detector as it was
    np.testing.assert_array_equal(detector.localize(X_test), expected)


def test_the_graph_of_spade_does_not_grow_with_its_gallery(tmp_path, small):
    settings = {"layers": ("layer1",), "gallery_size": 50, **BACKBONE}
    numbers, path = [], tmp_path / "detector.onnx"
    for n in (4, 12):
        export(small(SPADE, **settings).fit(images(n)), path)
        numbers.append(len(onnx.load(path).graph.node))
    assert numbers[0] == numbers[1]


def test_spade_searches_large_images_in_parts(tmp_path, small):
    """And layers may have dots in their names."""
    layers = ("layer1.0", "layer2")
    X, X_test = images(5, size=96), images(2, size=96, seed=1)
    detector = small(SPADE, layers=layers, gallery_size=3, **BACKBONE).fit(X)
    assert len(detector.gallery_["layer1.0"][0]) ** 2 > 2 * QUERIES_AT_ONCE
    export(detector, tmp_path / "detector.onnx", batch_size=2)
    (maps, scores), _ = run(tmp_path / "detector.onnx", X_test)
    expected = detector.localize(X_test)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-4 * expected.max())
    np.testing.assert_allclose(scores, detector.score_samples(X_test), rtol=1e-4)
    (maps, _), _ = run(tmp_path / "detector.onnx", X[:2])
    # the features of two runtimes differ by rounding, and so may equal ones
    np.testing.assert_allclose(maps, 0, atol=1e-4 * expected.max())


def test_thresholds_of_a_calibrator_are_exported(tmp_path, small):
    X = images(12, channels=1)
    detector = small(Autoencoder)
    calibrator = ThresholdCalibrator(detector, false_positive_rate=0.2, cv=3).fit(X)
    export(calibrator, tmp_path / "detector.onnx")
    (_, scores), session = run(tmp_path / "detector.onnx", X[:1])
    offset = float(session.get_modelmeta().custom_metadata_map["offset"])
    assert offset == calibrator.offset_
    assert scores[0] == pytest.approx(calibrator.score_samples(X[:1])[0], rel=1e-3)


def test_what_cannot_be_exported_says_why(tmp_path, small):
    X, path = images(6, size=32), tmp_path / "detector.onnx"
    path.write_text("old")
    differnet = small(DifferNet).fit(X)
    with pytest.raises(TypeError, match="DifferNet cannot be exported: its maps are"):
        export(differnet, path)
    mnad = small(MNAD, update_at_test=True).fit(X)
    with pytest.raises(TypeError, match="MNAD cannot be exported: with update_at_test"):
        export(mnad, path)
    spade = small(SPADE, gallery_size=0).fit(X)
    with pytest.raises(TypeError, match=r"SPADE cannot be exported.*no gallery"):
        export(spade, path)
    with pytest.raises(TypeError, match="Pipeline is no detector"):
        export(make_pipeline(ResizeImages(size=8), spade), path)
    clips = np.stack([X[:, :16, :16]] * 2, axis=1)
    clip_detector = small(MemAE, clip_length=2, channels=(2, 2))
    with pytest.raises(ValueError, match="MemAE has learned from clips"):
        export(clip_detector.fit(clips), path)
    with pytest.raises(NotFittedError):
        export(MNAD(), path)
    with pytest.raises(ValueError, match="batch_size=0"):
        export(mnad, path, batch_size=0)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        export(mnad, tmp_path / "nowhere" / "detector.onnx")
    with pytest.raises(IsADirectoryError, match=r"is a folder; give the file.*\.onnx"):
        export(mnad, tmp_path)
    assert path.read_text() == "old"


@pytest.mark.filterwarnings("ignore:X holds values")
@pytest.mark.parametrize("scale", [1.0, 257.0])
def test_a_detector_of_another_scale_is_refused(scale, small, tmp_path):
    detector = small("Autoencoder").fit(scale * images(6))
    with pytest.raises(ValueError, match=r"was fitted on values up to.*takes bytes"):
        export(detector, tmp_path / "detector.onnx")


def test_draws_outside_are_not_touched(tmp_path, small):
    X = images(6, size=32)
    detector = small(VariationalAutoencoder)
    detector.fit(X)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    export(detector, tmp_path / "detector.onnx")
    assert torch.equal(torch.rand(3), expected)
