"""Make the picture on the first page and in the README."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from skanomaly import PatchDetector
from skanomaly.datasets import load_textures

data = load_textures(n_train=100, size=128)
detector = PatchDetector(
    backbone="efficientnet_lite0", layers=("blocks.4",), random_state=0
).fit(data.X_train)
_, rows = np.unique(data.defect_test, return_index=True)
images, maps = data.X_test[rows], detector.localize(data.X_test[rows])

figure, axes = plt.subplots(2, len(rows), figsize=(2 * len(rows), 4), dpi=100)
for column, image, heat in zip(axes.T, images, maps, strict=True):
    column[0].imshow(image, cmap="gray", vmin=0, vmax=255)
    column[1].imshow(heat, cmap="inferno", vmin=0, vmax=4 * detector.map_threshold_)
for ax in axes.flat:
    ax.set_axis_off()
figure.subplots_adjust(0, 0, 1, 1, wspace=0.02, hspace=0.02)
figure.savefig(Path(__file__).with_suffix(".jpg"), pil_kwargs={"quality": 85})
