"""
Score images by the density of their features with DifferNet
============================================================

DifferNet learns how likely the features of a pretrained network are, averaged over an
image. It scores whole images; the gradient of the score tells which pixels to blame.
"""

# %%
# The weights of EfficientNet-Lite0 come from a package, without a download.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score

from skanomaly import DifferNet
from skanomaly.datasets import load_textures
from skanomaly.metrics import pixel_roc_auc_score

data = load_textures(n_train=100, n_test=40, size=128)

# %%
# The paper describes images of 448 pixels by AlexNet, at three scales. Photographs of
# 128 pixels have eight features each way in block 10 of EfficientNet-Lite0, and too few
# at half their size. The backbone is frozen and sees each rotated view of an image
# once for all epochs; training the flow on what it saw takes seconds.

detector = DifferNet(
    backbone="efficientnet_lite0",
    layer="blocks.10",
    n_blocks=4,
    hidden_features=256,
    n_scales=1,
    n_transforms_test=4,
    standardize=True,
    max_epochs=60,
    random_state=0,
    verbose=1,
)
detector.fit(data.X_train)

# %%
# The pixels are an afterthought of the method. The gradients are larger all over an
# image with a defect, which the pixel AUROC rewards. Within an image they lie beside
# the defect here, not on it.

scores = detector.score_samples(data.X_test)
maps = detector.localize(data.X_test)
print(f"image AUROC {roc_auc_score(data.y_test, scores):.3f}")
print(f"pixel AUROC {pixel_roc_auc_score(data.masks_test, maps):.3f}")

# %%
# One test image of each kind. Each map has its own colour scale: the gradients of a
# clear defect are many times as large as those of a faint one.

kinds, rows = np.unique(data.defect_test, return_index=True)
figure, axes = plt.subplots(2, len(rows), figsize=(10, 4.4), layout="constrained")
for kind, row, (above, below) in zip(kinds, rows, axes.T, strict=True):
    above.imshow(data.X_test[row, ..., 0], cmap="gray", vmin=0, vmax=255)
    above.set_title(kind)
    below.imshow(maps[row], vmin=0, vmax=np.quantile(maps[row], 0.995))
    for ax in (above, below):
        if data.masks_test[row].any():
            ax.contour(data.masks_test[row], [0.5], colors="cyan", linewidths=1.2)
        ax.set_axis_off()
plt.savefig("differnet.png")
print("differnet.png shows", ", ".join(kinds))
plt.show()
