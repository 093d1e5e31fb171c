"""
From a folder of photographs to a decision
==========================================

Photographs of one's own, in folders of one's own: what there is to load, a detector
that learns from the good parts, a threshold that keeps its promise, boxes in the pixels
of the photographs, and the finished detector in other processes, with this package or
without it.
"""

# %%
# A folder is written first, so that there is one to read: pictures of a brick wall that
# come with scikit-image, some of them with a planted defect. They are JPEGs of 640 x
# 480 pixels, named as by a camera, in folders that follow no standard.

import subprocess
import sys
import tempfile
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from skanomaly import (
    LoadImages,
    PatchDetector,
    ThresholdCalibrator,
    make_pipeline,
    onnx,
)
from skanomaly.datasets import load_folder, load_textures
from skanomaly.display import AnomalyMapDisplay
from skanomaly.inspection import write_report
from skanomaly.model_selection import one_class_train_test_split

folder = Path(tempfile.mkdtemp())


def write(path, pixels, resample):
    """Write a picture as a photograph of 640 x 480 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph = Image.fromarray(pixels).resize((640, 480), resample)
    photograph.save(path, quality=95)


textures = load_textures(n_train=80, n_test=64, size=128)
for number, image in enumerate(textures.X_train):
    name = f"line {number % 2 + 1}/fine/IMG_{number:04}.jpg"
    write(folder / name, image[..., 0], Image.Resampling.BICUBIC)
for number, kind in enumerate(textures.defect_test):
    image, mask = textures.X_test[number, ..., 0], textures.masks_test[number]
    if kind == "good":
        name = f"line 1/fine/IMG_{1000 + number}.jpg"
        write(folder / name, image, Image.Resampling.BICUBIC)
    else:
        name = f"{kind}/IMG_{1000 + number}"
        write(folder / f"returned/{name}.jpg", image, Image.Resampling.BICUBIC)
        write(folder / f"outlined/{name}.png", mask, Image.Resampling.NEAREST)

# %%
# ``load_folder`` takes folders, globs, lists or columns of a data frame, pairs images
# and masks by name, and reports what it found. With ``as_paths`` it leaves the images
# where they are, for a pipeline that loads them.

data = load_folder(
    folder.glob("line */fine"),
    folder / "returned",
    folder / "outlined",
    size=128,
    as_paths=True,
)
print(data.report)

# %%
# The detector learns from good parts only; the bad ones and some good ones are kept
# aside to test it. ``ThresholdCalibrator`` judges each good part by a detector that was
# fitted without it, and takes the threshold from there: 5 % of good parts may be
# rejected. The weights of EfficientNet-Lite0 come from a package, without a download.

X_train, X_test, _, y_test = one_class_train_test_split(
    data.X, data.y, labels=data.y, test_size=32, random_state=0
)
pipeline = make_pipeline(
    LoadImages(size=128),
    PatchDetector(backbone="efficientnet_lite0", layers=("blocks.4",), random_state=0),
)
gate = ThresholdCalibrator(pipeline, false_positive_rate=0.05).fit(X_train)

# %%
# One call says all there is to say about new photographs.

report = gate.inspect(X_test)
is_rejected = report.labels == -1
print(f"{is_rejected[y_test == -1].mean():.0%} of the bad parts are rejected")
print(f"{is_rejected[y_test == 1].mean():.0%} of the good parts are rejected")

# %%
# Boxes are in pixels of the photographs, although the detector saw them at 128 x 128.
# The scale of the maps has the threshold in its middle.

kinds = np.array([Path(path).parent.name for path in X_test])
shown = [
    np.flatnonzero(is_rejected & (kinds == kind))[0] for kind in ("hole", "scratch")
]
for region in report.regions[np.isin(report.regions["image"], shown)]:
    top, left, bottom, right = (
        region[side] for side in ("top", "left", "bottom", "right")
    )
    kind = kinds[region["image"]]
    print(f"{kind}: rows {top} to {bottom}, columns {left} to {right}")
AnomalyMapDisplay.from_estimator(gate, X_test[shown])
plt.show()

# %%
# For those who were not there, all of it goes on one page, which needs no network: a
# table to sort, each row of which opens the pictures.

write_report(report, X_test, folder / "report.html", title="Bricks of today")
print(f"report.html has {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")

# %%
# The whole of it goes into one file, and decides in another process as it does here.

joblib.dump(gate, folder / "gate.joblib")
script = """
import sys
import joblib

gate = joblib.load(sys.argv[1])
print(*gate.predict(sys.argv[2:]))
"""


def run(script, *arguments):
    """Return what a script prints in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


labels = np.array(run(script, folder / "gate.joblib", *X_test).split(), int)
print("the same decisions:", np.array_equal(labels, report.labels))

# %%
# Where nothing but ``onnxruntime`` and Pillow is to be installed, the detector goes
# into an ONNX file, and the calibrated threshold with it.

onnx.export(gate.estimator_[-1], folder / "detector.onnx")
script = """
import sys
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
offset = float(session.get_modelmeta().custom_metadata_map["offset"])
for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB").resize((128, 128), Image.BILINEAR)
    maps, scores = session.run(None, {"images": np.asarray(image)[None]})
    print(-1 if scores[0] < offset else 1)
"""
labels = np.array(run(script, folder / "detector.onnx", *X_test).split(), int)
print("the same decisions:", np.array_equal(labels, report.labels))
