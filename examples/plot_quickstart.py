"""
Find defects in photographs of a brick wall with PatchDetector
==============================================================

A pretrained network turns each image into a grid of features, and a PCA learns how
those of normal images vary. That takes seconds on a processor. The detector then marks
scratches, stains, holes and foreign patches in crops that it has never seen.
"""

# %%
# The images come with scikit-image. Training and test crops share no pixel of the
# photograph; half of the test crops have a planted defect and its exact mask.

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score

from skanomaly import PatchDetector
from skanomaly.datasets import load_textures
from skanomaly.display import AnomalyMapDisplay
from skanomaly.metrics import pixel_roc_auc_score, pro_auc_score

data = load_textures(n_train=100, size=128)
print(f"{len(data.X_train)} training images, {len(data.X_test)} test images")

# %%
# The weights of EfficientNet-Lite0 come from a package, without a download. Its block 4
# has 16 x 16 features for an image, each of which sees little more than a defect.

detector = PatchDetector(
    backbone="efficientnet_lite0", layers=("blocks.4",), random_state=0
)
started = time.perf_counter()
detector.fit(data.X_train)
print(f"fitted in {time.perf_counter() - started:.1f} s")

# %%
# ``score_samples`` is high for normal images, ``localize`` is high where an image is
# anomalous.

scores = detector.score_samples(data.X_test)
maps = detector.localize(data.X_test)

print(f"image AUROC {roc_auc_score(data.y_test, scores):.3f}")
print(f"pixel AUROC {pixel_roc_auc_score(data.masks_test, maps):.3f}")
print(f"AU-PRO      {pro_auc_score(data.masks_test, maps):.3f}")

# %%
# One test image of each kind, its map, and what ``segment`` outlines.

kinds, rows = np.unique(data.defect_test, return_index=True)
AnomalyMapDisplay.from_estimator(
    detector, data.X_test[rows], masks=data.masks_test[rows]
)
plt.savefig("quickstart.png")
print("quickstart.png shows", ", ".join(kinds))
plt.show()
