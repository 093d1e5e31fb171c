"""Measure how well P-Net finds structures that it learned from a labelled source.

``--data`` is a folder in the layout of DRIVE: ``images/*``, ``1st_manual/*`` with masks
of the vessels, in the same order, and ``mask/*`` with the field of view. The first
images are the source; the others stand for the normal images, and the training does not
see their masks. Within the field of view, their structures are compared with these::

    python benchmarks/structure.py --data DRIVE/training --size 128 --figure vessels.png
"""

import argparse
import time
from pathlib import Path

import torch
from arguments import add_training_arguments
from sklearn.metrics import roc_auc_score

from skanomaly import LoadImages, PNet


def main():
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    images = load(options.data / "images", options.size, "RGB")
    vessels = load(options.data / "1st_manual", options.size, "L")[..., 0]
    seen = load(options.data / "mask", options.size, "L")[..., 0] > 127
    source, others = slice(options.n_source), slice(options.n_source, None)
    for seed in options.seeds:
        detector = PNet(random_state=seed, **options.params)
        started = time.perf_counter()
        detector.fit(
            images[others],
            structure_images=images[source],
            structure_masks=vessels[source],
        )
        seconds = time.perf_counter() - started
        found = detector.extract_structure(images[others])
        score = roc_auc_score(vessels[others][seen[others]] > 127, found[seen[others]])
        print(
            f"seed {seed}: vessels AUROC {score:.3f}, fit {seconds:.0f} s", flush=True
        )
    if options.figure:
        draw(images[others], vessels[others], found, options.figure)


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder as in DRIVE")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--n-source", type=int, default=14, help="images with labels")
    parser.add_argument(
        "--figure", type=Path, help="file for a picture of the last seed"
    )
    add_training_arguments(parser)
    return parser.parse_args()


def load(folder, size, mode):
    """Return the images of a folder (n, size, size, c), in the order of their names."""
    return LoadImages(size=size, mode=mode).transform(sorted(folder.iterdir()))


def draw(images, vessels, found, path):
    """Draw images, masks and found structures in three rows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, len(images), figsize=(2 * len(images), 6), layout="constrained"
    )
    for row, pictures in zip(axes, (images, vessels, found), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
