"""
Choose a detector without a bad part
====================================

Whoever sets up an inspection has good parts only. Defects planted in copies of them
rank methods and settings; other defects, which no search has seen, show how well.
"""

# %%
# The good images are crops of a photograph. Each gets a copy with a defect.

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from skanomaly import PaDiM, PatchCore, PatchDetector, Pipeline
from skanomaly.datasets import load_textures, plant_defects
from skanomaly.metrics import anomaly_roc_auc
from skanomaly.model_selection import OneClassKFold

data = load_textures(n_train=40, n_test=40, random_state=1)
planted = plant_defects(data.X_train, random_state=0)

kinds, rows = np.unique(planted.defect_names, return_index=True)
figure, axes = plt.subplots(2, len(kinds), figsize=(9, 3.3), layout="constrained")
for column, kind, row in zip(axes.T, kinds, rows, strict=True):
    column[0].imshow(planted.X[row], cmap="gray")
    column[0].set_title(kind)
    column[1].imshow(planted.masks[row], cmap="gray")
for axis in axes.flat:
    axis.set_axis_off()
plt.savefig("planted.png")

# %%
# A grid search compares whole methods. ``groups`` keeps a copy and its original in one
# fold: a copy is tested by detectors that do not know its background.

frozen = {"backbone": "efficientnet_lite0", "random_state": 0}
layers = [("blocks.2",), ("blocks.4",), ("blocks.10",), ("blocks.4", "blocks.10")]
candidates = [
    *(PatchDetector(layers=own, **frozen) for own in layers),
    PatchDetector(layers=("blocks.2",), image_score="top", **frozen),
    *(PaDiM(layers=own, n_features=20, **frozen) for own in layers[:2]),
    *(PatchCore(coreset=0.1, layers=own, **frozen) for own in layers[:2]),
]
search = GridSearchCV(
    Pipeline([("detect", candidates[0])]),
    {"detect": candidates},
    cv=OneClassKFold(3, shuffle=True, random_state=0),
    scoring=anomaly_roc_auc,
).fit(planted.X, planted.y, groups=planted.groups)

# %%
# The winner was fitted again on all good images. The defects of ``load_textures`` are
# others, mostly stronger, and tell afterwards whether the ranking was right.

planted_auroc = search.cv_results_["mean_test_score"]
auroc = [
    anomaly_roc_auc(clone(detector).fit(data.X_train), data.X_test, data.y_test)
    for detector in candidates
]
for detector, *numbers in zip(candidates, planted_auroc, auroc, strict=True):
    print("planted {:.3f}, later {:.3f}".format(*numbers), detector)
chosen = anomaly_roc_auc(search, data.X_test, data.y_test)
print(f"rank correlation {spearmanr(planted_auroc, auroc).statistic:.2f}")
print(f"chosen {chosen:.3f}, mean {np.mean(auroc):.3f}, best {max(auroc):.3f}")
