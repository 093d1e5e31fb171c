"""
Compare seven methods that reconstruct or inpaint
=================================================

Seven detectors learn from the same photographs of bricks to give back what they see, or
to paint anew what was hidden from them, and mark the pixels where that fails. All of
them are trained so briefly that this is a tour and not a contest.
"""

# %%
# 60 normal crops for training; half of the test crops have a planted defect.

import time

import matplotlib.pyplot as plt

from skanomaly import (
    DRAEM,
    RIAD,
    SCADN,
    SMAI,
    Autoencoder,
    InTra,
    VariationalAutoencoder,
)
from skanomaly.datasets import load_textures
from skanomaly.metrics import pixel_roc_auc_score

data = load_textures(n_train=60, n_test=20)

# %%
# The networks are a fraction as wide as in the papers, with the larger learning rates
# that the notes of the classes recommend for a processor. ``n_iter_no_change=None``
# trains all epochs on all images instead of holding some out for an early stop.

common = {"n_iter_no_change": None, "random_state": 0}
fast = {"learning_rate": 1e-3, **common}
detectors = [
    Autoencoder(code_size=32, batch_size=16, max_epochs=20, **fast),
    VariationalAutoencoder(code_size=32, batch_size=16, max_epochs=20, **fast),
    RIAD(width=16, cell_sizes=(2, 4, 8), max_epochs=4, **fast),
    SMAI(n_segments=80, width=16, max_epochs=4, **fast),
    SCADN(
        width=16,
        n_blocks=4,
        critic_width=16,
        image_score="max",
        smoothing_size=21,
        max_epochs=5,
        learning_rate=5e-4,
        **common,
    ),
    InTra(
        patch_size=8,
        window_size=5,
        width=128,
        n_heads=4,
        n_blocks=5,
        max_epochs=5,
        **fast,
    ),
    DRAEM(
        reconstructive_width=16,
        discriminative_width=16,
        rotation=0.0,
        max_epochs=10,
        **fast,
    ),
]

# %%
# Every detector has the same methods, so that a loop fits and scores them all.

maps = {}
for detector in detectors:
    name, start = type(detector).__name__, time.perf_counter()
    maps[name] = detector.fit(data.X_train).localize(data.X_test)
    score = pixel_roc_auc_score(data.masks_test, maps[name])
    seconds = time.perf_counter() - start
    print(f"{name:<22}  pixel AUROC {score:.3f}  {seconds:3.0f} s", flush=True)

# %%
# One defect and its maps. Each map has its own colour scale: the methods measure errors
# of different kinds, and only their order within a method means something.

row = list(data.defect_test).index("patch")
figure, axes = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
axes[0, 0].imshow(data.X_test[row, ..., 0], cmap="gray", vmin=0, vmax=255)
axes[0, 0].set_title("defect, outlined")
for ax, (name, maps_of_method) in zip(axes.flat[1:], maps.items(), strict=True):
    ax.imshow(maps_of_method[row], cmap="viridis")
    ax.set_title(name)
for ax in axes.flat:
    ax.contour(data.masks_test[row], levels=[0.5], colors="cyan", linewidths=1.2)
    ax.set_axis_off()
plt.savefig("reconstruction_methods.png")
print("reconstruction_methods.png shows one defect and its maps")
plt.show()
