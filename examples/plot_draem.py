"""
Train DRAEM on a processor
==========================

DRAEM learns from normal images only, and needs no pretrained network. Here it sees 200
crops of a photograph of bricks, small enough for a processor without a graphics card,
and then marks scratches, stains, holes and foreign patches in crops that it has never
seen.
"""

# %%
# The images come with scikit-image. Training and test crops share no pixel of the
# photograph; half of the test crops have a planted defect and its exact mask.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score

from skanomaly import DRAEM
from skanomaly.datasets import load_textures
from skanomaly.display import AnomalyMapDisplay
from skanomaly.metrics import pixel_roc_auc_score, pro_auc_score

data = load_textures()
print(f"{len(data.X_train)} training images, {len(data.X_test)} test images")

# %%
# The networks are a fraction as wide as in the paper, and a larger learning rate makes
# up for few epochs. Bricks never lie on their side, so the images are not rotated.

detector = DRAEM(
    reconstructive_width=16,
    discriminative_width=16,
    rotation=0.0,
    max_epochs=22,
    learning_rate=1e-3,
    random_state=0,
    verbose=1,
)
detector.fit(data.X_train)

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
plt.savefig("draem.png")
print("draem.png shows", ", ".join(kinds))
plt.show()
