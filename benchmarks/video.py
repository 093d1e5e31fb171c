"""Measure how well MNAD and MemAE find the anomalous frames of real videos.

``--data`` is a folder in the layout of UCSD: ``training/frames/VIDEO/*.jpg``,
``testing/frames/VIDEO/*.jpg`` and ``testing/gt/VIDEO/*.png`` with masks. A frame is
anomalous if its mask has an anomalous pixel. Trains on all training videos, scores all
test videos once, after the last epoch::

    python benchmarks/video.py --data ucsd_ped2 --size 64 --method mnad \\
        --params width=16 learning_rate=1e-3 batch_size=8 max_epochs=20
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from arguments import add_training_arguments
from sklearn.metrics import roc_auc_score

from skanomaly import MNAD, LoadImages, MemAE
from skanomaly.datasets import make_clips
from skanomaly.metrics import (
    frame_roc_auc_score,
    pixel_roc_auc_score,
    video_scores,
)


def main():
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    train, train_video = load_frames(options.data / "training" / "frames", options.size)
    test, test_video = load_frames(options.data / "testing" / "frames", options.size)
    masks, _ = load_frames(options.data / "testing" / "gt", options.size)
    masks = masks[..., 0] > 127
    length = options.params.get("clip_length", 5 if options.method == "mnad" else 16)
    # the network predicts the last frame of a clip (MNAD) or rebuilds all (MemAE)
    judged = length - 1 if options.method == "mnad" else length // 2
    past = make_clips(train, train_video, length=length)
    clips = make_clips(test, test_video, length=length)
    frames = clips.last - (length - 1) + judged
    y = np.where(masks[frames].any(axis=(1, 2)), -1, 1)
    for seed in options.seeds:
        settings = {"clip_length": length, "random_state": seed, **options.params}
        if options.method == "mnad":
            detector = MNAD(task="prediction", **settings)
        else:
            detector = MemAE(**settings)
        started = time.perf_counter()
        detector.fit(past.clips)
        seconds = time.perf_counter() - started
        scores = -detector.score_samples(clips.clips)
        maps = detector.localize(clips.clips)
        if options.method == "memae":
            maps = maps[:, judged]
        frame_score = frame_roc_auc_score(y, scores, clips.video)
        pixel_score = pixel_roc_auc_score(masks[frames], maps)
        by_paper = ""
        if options.method == "mnad":
            mixed = video_scores(**detector.measure(clips.clips), video=clips.video)
            by_paper = f", by the paper's protocol {roc_auc_score(y == -1, mixed):.3f}"
        print(
            f"seed {seed}: frame AUROC {frame_score:.3f}{by_paper}, pixel AUROC "
            f"{pixel_score:.3f}, fit {seconds:.0f} s",
            flush=True,
        )


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--method", choices=["mnad", "memae"], default="mnad")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    add_training_arguments(parser)
    return parser.parse_args()


def load_frames(folder, size):
    """Return the grey frames (N, size, size, 1) of all videos and their videos (N,)."""
    paths = sorted(path for path in folder.rglob("*.*") if path.is_file())
    video = np.array([path.parent.name for path in paths])
    return LoadImages(size=size, mode="L").transform(paths), video


if __name__ == "__main__":
    main()
