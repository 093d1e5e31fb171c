"""
Three ways to say where: PatchSVDD, FCDD and PuzzleAE
=====================================================

PatchSVDD compares patches with stored ones, FCDD learns to see defects that it makes
itself, PuzzleAE puts shuffled tiles in order again. Here all three learn from the same
photographs of bricks, in less than a minute, and mark the same defects.
"""

# %%
# 48 normal crops for training; half of the 80 test crops have a planted defect. Stains
# that darken the bricks are told from those that brighten them: it matters below.

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from skanomaly import FCDD, PatchSVDD, PuzzleAE
from skanomaly.datasets import load_textures
from skanomaly.metrics import pixel_roc_auc_score

data = load_textures(n_train=48, n_test=80, random_state=1)
kinds = data.defect_test.astype(object)
for row in np.flatnonzero(kinds == "stain"):
    image, mask = data.X_test[row, ..., 0], data.masks_test[row]
    is_dark = image[mask].mean() < image[~mask].mean()
    kinds[row] = "dark stain" if is_dark else "bright stain"
defects = ["hole", "patch", "scratch", "dark stain", "bright stain"]

# %%
# The settings are those that the notes of the classes recommend for 64 pixels and a
# processor, with fewer epochs, and with fewer places of the small patches of PatchSVDD,
# which makes its search sixteen times as fast.

detectors = [
    PatchSVDD(
        patch_size=16,
        strides=(4, 8),
        center="channel",
        svdd_weight=0.1,
        batch_size=32,
        n_repeats=8,
        learning_rate=1e-3,
        max_epochs=10,
        random_state=0,
    ),
    FCDD(
        architecture="cnn32",
        width=32,
        weights=None,
        loss="pixel",
        optimizer="adam",
        batch_size=16,
        max_epochs=80,
        random_state=0,
    ),
    PuzzleAE(
        permutations="transpositions",
        epsilon=0,
        feature_weight=0,
        zoom=None,
        image_score="max",
        width=16,
        batch_size=4,
        learning_rate=2e-3,
        max_epochs=30,
        random_state=0,
    ),
]

# %%
# The first column counts whole images. The others count the pixels of the images with a
# defect of one kind.


def report(detector, name):
    """Fit a detector, print what it finds, and return its maps."""
    start = time.perf_counter()
    scores = detector.fit(data.X_train).score_samples(data.X_test)
    maps = detector.localize(data.X_test)
    figures = [roc_auc_score(data.y_test, scores)]
    for defect in defects:
        own = kinds == defect
        figures.append(pixel_roc_auc_score(data.masks_test[own], maps[own]))
    seconds = time.perf_counter() - start
    print(f"{name:<21}", *(f"{f:<13.3f}" for f in figures), f"{seconds:.0f} s")
    return maps


print(f"{'AUROC':<21}", *(f"{title:<13}" for title in ["image", *defects]))
maps = {type(d).__name__: report(d, type(d).__name__) for d in detectors}

# %%
# How much of it is learned? The encoder of PatchSVDD as it is before the training finds
# these defects as well as the trained one: patches of bricks are compared with patches
# of bricks, and random convolutions tell them from the rest.

untrained = clone(detectors[0]).set_params(learning_rate=1e-12, max_epochs=1)
_ = report(untrained, "PatchSVDD, untrained")

# %%
# One test image of each kind. Each map has its own colour scale: FCDD gives a hole
# hundreds of times the values of a bright stain.

figure, axes = plt.subplots(
    1 + len(maps), len(defects), figsize=(8, 6.6), layout="constrained"
)
for defect, column in zip(defects, axes.T, strict=True):
    row = list(kinds).index(defect)
    column[0].imshow(data.X_test[row, ..., 0], cmap="gray", vmin=0, vmax=255)
    column[0].set_title(defect)
    for ax, maps_of_method in zip(column[1:], maps.values(), strict=True):
        ax.imshow(
            maps_of_method[row], vmin=0, vmax=np.quantile(maps_of_method[row], 0.995)
        )
    for ax in column:
        ax.contour(data.masks_test[row], [0.5], colors="cyan", linewidths=1.2)
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[1:, 0], maps, strict=True):
    ax.set_ylabel(name)
plt.savefig("three_ways_to_localize.png")
print("three_ways_to_localize.png shows", ", ".join(defects))
plt.show()

# %%
# PatchSVDD finds all kinds, and blurs them by the size of its patches. FCDD marks what
# is dark, as its confetti darken these images. It can tell that there is a bright
# stain, but not where, and of a patch it marks two spots at the edge. PuzzleAE follows
# holes and scratches closely. It errs at the joints of sound bricks as well, so that
# many images with a patch or a dark stain score like normal ones.
#
# Four times the epochs bring the AUROC of FCDD to 0.75 on bright stains and that of
# PuzzleAE to 0.94 on whole images, and change little else.
