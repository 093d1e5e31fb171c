"""From a folder of photographs to decisions, here, in other processes, and as ONNX."""

import subprocess
import sys

import joblib
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from skanomaly import (
    LoadImages,
    PatchDetector,
    ThresholdCalibrator,
    make_pipeline,
    onnx,
)
from skanomaly.datasets import load_folder

PREDICTS = """
import sys, joblib
gate = joblib.load(sys.argv[1])
print(*gate.predict(sys.argv[2:]), *gate.p_values(sys.argv[2:]))
"""
TOP, BOTTOM, LEFT, RIGHT = 60, 100, 120, 170  # of the stain on bad parts


def photograph(rng, is_good):
    rows, columns = np.mgrid[:160, :240]
    pixels = 128 + 40 * np.sin(rows / 9) + 40 * np.sin(columns / 7)
    pixels += rng.normal(0, 8, pixels.shape)
    if not is_good:
        pixels[TOP:BOTTOM, LEFT:RIGHT] = 90
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Return a data frame of photographs in folders of one's own, and their labels."""
    folder = tmp_path_factory.mktemp("line 7")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(28):
        label = "ok" if number < 24 else "stained"
        path = folder / f"shift {number % 2}" / f"IMG_{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        photograph(rng, label == "ok").save(path, quality=95)
        rows.append({"path": str(path), "label": label})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def gate(table):
    is_good = table["label"] == "ok"
    data = load_folder(
        table[is_good]["path"], table[~is_good]["path"], size=128, as_paths=True
    )
    detector = PatchDetector(
        backbone="efficientnet_lite0", layers=("blocks.4",), random_state=0
    )
    pipeline = make_pipeline(LoadImages(size=128), detector)
    return ThresholdCalibrator(
        pipeline, method="holdout", cv=3, false_positive_rate=0.2
    ).fit(data.X[data.y == 1])


def test_boxes_are_in_pixels_of_the_photographs(gate, table):
    report = gate.inspect(table[["path"]])
    assert_array_equal(report.labels[24:], -1)
    assert (report.labels[:24] == 1).mean() > 0.7
    regions = report.regions[report.regions["image"] >= 24]
    assert_array_equal(np.unique(regions["image"]), [24, 25, 26, 27])
    for image in range(24, 28):
        peak = np.sort(regions[regions["image"] == image], order="peak")[-1]
        box = [peak[side] for side in ("top", "bottom", "left", "right")]
        # the box of the loaded image, in its 128 pixels, would be out by 74
        assert_allclose(box, [TOP, BOTTOM, LEFT, RIGHT], atol=40)


def test_one_photograph_is_judged_as_among_others(gate, table):
    together = gate.inspect(table["path"])
    alone = gate.inspect(table["path"][24:25])
    assert alone.labels.shape == alone.p_values.shape == (1,)
    assert alone.p_values[0] == together.p_values[24]
    assert_allclose(alone.scores[0], together.scores[24], rtol=1e-4)


def test_another_process_decides_the_same(gate, table, tmp_path):
    paths = table["path"].tolist()
    joblib.dump(gate, tmp_path / "gate.joblib")
    command = [sys.executable, "-c", PREDICTS, tmp_path / "gate.joblib", *paths]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert_allclose(
        np.array(out.split(), float),
        np.concatenate([gate.predict(paths), gate.p_values(paths)]),
    )


def test_onnx_decides_the_same(gate, table, tmp_path):
    with pytest.raises(TypeError, match=r"Pipeline is no detector.*estimator_\[-1\]"):
        onnx.export(gate, tmp_path / "detector.onnx")
    onnx.export(gate.estimator_[-1], tmp_path / "detector.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "detector.onnx", providers=["CPUExecutionProvider"]
    )
    offset = float(session.get_modelmeta().custom_metadata_map["offset"])
    assert offset == gate.offset_
    scores = []
    for path in table["path"]:
        image = Image.open(path).convert("RGB").resize((128, 128), Image.BILINEAR)
        scores += session.run(["scores"], {"images": np.asarray(image)[None]})[
            0
        ].tolist()
    assert_allclose(scores, gate.score_samples(table["path"]), rtol=1e-3)
