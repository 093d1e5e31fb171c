"""
Find strange moments in videos with MNAD
========================================

MNAD learns to predict the next frame of a video from the four before. Where something
moves faster than ever or has an unknown form, the prediction fails.
"""

# %%
# Synthetic videos in which discs and squares drift about and bounce off the borders. In
# each test video one of them speeds up for a while, and becomes a cross for another.

import matplotlib.pyplot as plt
import numpy as np

from skanomaly import MNAD
from skanomaly.datasets import make_clips, make_moving_shapes
from skanomaly.metrics import frame_roc_auc_score, pixel_roc_auc_score

data = make_moving_shapes()

# %%
# A clip is five frames: four that the network sees and one that it predicts. No clip
# runs from one video into the next. ``last`` tells which frame a clip ends with, and so
# which label and mask belong to it.

train = make_clips(data.frames_train, data.video_train, length=5)
test = make_clips(data.frames_test, data.video_test, length=5)
y_test = data.y_test[test.last]
print(f"{len(train.clips)} training clips, {len(test.clips)} test clips")

# %%
# The network is a quarter as wide as in the paper.

detector = MNAD(
    task="prediction",
    width=16,
    clip_length=5,
    max_epochs=6,
    learning_rate=1e-3,
    batch_size=8,
    random_state=0,
    verbose=1,
)
detector.fit(train.clips)

# %%
# ``score_samples`` is high for normal clips; its negative is high for anomalous ones.
# The papers on video compare scores that are normalised within each video.

scores = -detector.score_samples(test.clips)
maps = detector.localize(test.clips)
print(f"frame AUROC {frame_roc_auc_score(y_test, scores, test.video):.3f}")
print(f"pixel AUROC {pixel_roc_auc_score(data.masks_test[test.last], maps):.3f}")

# %%
# The score of one test video over time, and the frame with the highest score.

rows = np.flatnonzero(test.video == 0)
anomaly = data.anomaly_test[test.last[rows]]
frame_numbers = test.last[rows] - np.flatnonzero(data.video_test == 0)[0]
figure, axes = plt.subplots(
    1, 3, figsize=(11, 3.2), width_ratios=[3, 1, 1], layout="constrained"
)
axes[0].plot(frame_numbers, scores[rows], color="black")
for kind, color in (("fast", "tab:orange"), ("form", "tab:blue")):
    axes[0].fill_between(
        frame_numbers,
        0,
        1,
        where=anomaly == kind,
        transform=axes[0].get_xaxis_transform(),
        color=color,
        alpha=0.3,
        label=kind,
    )
axes[0].set(xlabel="frame", ylabel="anomaly score")
axes[0].legend(title="anomaly")
row = rows[scores[rows].argmax()]
axes[1].imshow(data.frames_test[test.last[row], ..., 0], cmap="gray", vmin=0, vmax=255)
axes[1].set_title("highest score")
axes[2].imshow(maps[row], cmap="viridis")
axes[2].set_title("its anomaly map")
for ax in axes[1:]:
    ax.set_axis_off()
plt.savefig("video_anomaly.png")
print("video_anomaly.png shows the scores of a test video")
plt.show()
