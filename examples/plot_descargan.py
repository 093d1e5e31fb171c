"""
DeScarGAN: what a diseased image would look like if it were healthy
===================================================================

DeScarGAN learns from healthy and diseased images, with one label for each image and no
masks. It turns an image into its healthy version; the difference shows the disease.
"""

# %%
# Synthetic images of two elliptic contours: in diseased images the inner one is shrunk.
# No image has a healthy counterpart in the training set. (The paper's own set, which is
# the default arrangement, is far harder and wants longer trainings on more images.)

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score

from skanomaly import DeScarGAN
from skanomaly.datasets import make_ellipses
from skanomaly.metrics import pixel_roc_auc_score

data = make_ellipses(n_train=200, n_test=40, arrangement="nested")
print(f"{np.sum(data.y_train == 1)} healthy and {np.sum(data.y_train == -1)} diseased")

# %%
# Generator and critic are a fraction as wide as in the paper, and the generator learns
# after every second step of the critic instead of every fifth.

detector = DeScarGAN(
    width=12,
    critic_width=12,
    n_critic=2,
    batch_size=8,
    learning_rate=5e-4,
    max_epochs=10,
    random_state=0,
    verbose=1,
)
detector.fit(data.X_train, data.y_train)

# %%
# The score of an image is the probability of the diseased class. Maps are differences
# between images and their healthy versions; here the true versions are known. Local
# means of the maps tell the place better than single pixels do.

scores = detector.score_samples(data.X_test)
maps = detector.localize(data.X_test)
healthy = detector.transform_to_healthy(data.X_test)
errors = np.abs(healthy - data.healthy_test / 255)
print(f"image AUROC {roc_auc_score(data.y_test, scores):.3f}")
print(f"pixel AUROC {pixel_roc_auc_score(data.masks_test, maps):.3f}")
smooth = detector.set_params(smoothing_size=36).localize(data.X_test)
print(f"smoothed: {pixel_roc_auc_score(data.masks_test, smooth):.3f}")
print(f"mean absolute error of the healthy versions {errors.mean():.3f}")

# %%
# Two diseased images and a healthy one.

rows = [1, 3, 0]
figure, axes = plt.subplots(3, 5, figsize=(9, 5.6), layout="constrained")
titles = ("image", "made healthy", "truly healthy", "map", "true difference")
for ax, title in zip(axes[0], titles, strict=True):
    ax.set_title(title)
for row, (image, made, true, anomaly_map, difference) in zip(rows, axes, strict=True):
    image.imshow(data.X_test[row, ..., 0], cmap="gray", vmin=0, vmax=255)
    made.imshow(healthy[row, ..., 0], cmap="gray", vmin=0, vmax=1)
    true.imshow(data.healthy_test[row, ..., 0], cmap="gray", vmin=0, vmax=255)
    anomaly_map.imshow(maps[row], vmin=0, vmax=0.6)
    difference.imshow(np.abs(data.differences_test[row]), vmin=0, vmax=0.6)
for ax in axes.flat:
    ax.set_axis_off()
plt.savefig("descargan.png")
print("descargan.png shows images, their healthy versions and the differences")
plt.show()
