"""
Inspect a line, frame by frame
==============================

A camera hands over one frame after the other. Each is inspected as it comes: its part
is passed or rejected, the time is taken, and a chart of the p-values tells when the
line itself has changed.
"""

# %%
# Two hundred good parts teach the detector, and give the threshold by cross-validation:
# of good parts, one in fifty may be rejected. Photographs of bricks stand in for the
# parts; they come with scikit-image.

import time

import matplotlib.pyplot as plt
import numpy as np

from skanomaly import LoadImages, PatchDetector, ThresholdCalibrator
from skanomaly.datasets import load_textures
from skanomaly.display import ControlChartDisplay

RATE = 0.02

data = load_textures(n_train=420, n_test=40, size=128)
good, bad = data.X_train, data.X_test[data.y_test == -1]
detector = PatchDetector(
    backbone="efficientnet_lite0", layers=("blocks.4",), random_state=0
)
gate = ThresholdCalibrator(detector, false_positive_rate=RATE)
gate.fit(good[:200])

# %%
# Frames may come from anywhere: a folder that a camera writes into, or any iterator of
# arrays, such as the driver of a camera.


def frames_of(source):
    """Yield the frames of a list of files, or of an iterator of arrays."""
    for frame in source:
        is_array = isinstance(frame, np.ndarray)
        yield frame if is_array else LoadImages(mode="L").transform([frame])[0]


# %%
# This line makes good parts but for one in twelve. Towards the end its lamp grows dim.

N_FRAMES, DIMS_FROM = 240, 160


def line():
    """Yield frames, and whether their part is good."""
    for number in range(N_FRAMES):
        is_good = number % 12 != 11
        part = good[200 + number % 220] if is_good else bad[number // 12]
        light = 1 - 0.3 * max(0, number - DIMS_FROM) / (N_FRAMES - DIMS_FROM)
        yield (light * part).astype(np.uint8), is_good


frames, is_good = zip(*line(), strict=True)

# %%
# The loop. ``inspect`` passes a frame through the network once and returns score,
# label, p-value, map, mask and regions. The first call of a process takes longer than
# all others, and belongs in front of the loop.

gate.inspect(good[:1])
p_values, is_rejected, seconds = [], [], []
for frame in frames_of(frames):
    started = time.perf_counter()
    report = gate.inspect(frame[None])
    seconds.append(time.perf_counter() - started)
    p_values.append(report.p_values[0])
    is_rejected.append(report.labels[0] == -1)

shares = (50, 95, 99, 100)
for share, latency in zip(shares, np.percentile(seconds, shares), strict=True):
    print(f"{share:3} % of the frames took at most {1000 * latency:.0f} ms")

is_good, is_rejected = np.array(is_good), np.array(is_rejected)
early = np.arange(N_FRAMES) < DIMS_FROM
for name, rows in (("steady", early), ("dim", ~early)):
    print(
        f"{name} lamp: {is_rejected[rows & ~is_good].mean():.0%} of the bad parts "
        f"rejected, and {is_rejected[rows & is_good].mean():.0%} of the good ones"
    )

# %%
# Each p-value, and the rate below which a part is rejected.

gate_chart = ControlChartDisplay.from_p_values(p_values, limit=RATE)
gate_chart.ax_.axvline(DIMS_FROM, color="0.5", linestyle=":")
plt.show()

# %%
# P-values of good parts are spread evenly over 0 to 1, whatever the detector. A single
# low one is a part to reject. When the mean of those that pass falls, it is not a part
# that has changed but the line: the camera, the light, the material. The band holds
# 99.7 % of the means of a steady line.

WINDOW = 30
p_values, passed = np.array(p_values), np.flatnonzero(~is_rejected)
mean = np.convolve(p_values[passed], np.full(WINDOW, 1 / WINDOW), "valid")
ends = passed[WINDOW - 1 :]
center, spread = (1 + RATE) / 2, 3 * (1 - RATE) / np.sqrt(12 * WINDOW)
is_low = mean < center - spread
if is_low.any():
    print(f"at frame {ends[is_low][0]} the chart tells that the line has changed")

_, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.axhspan(center - spread, center + spread, color="0.9", label="steady line")
axes.plot(ends, mean, color="black", label=f"mean of {WINDOW} passed")
axes.axvline(DIMS_FROM, color="0.5", linestyle=":", label="lamp begins to dim")
axes.set(xlabel="image", ylabel="mean p-value", ylim=(0, 1))
axes.legend()
plt.show()
