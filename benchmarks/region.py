"""Measure what a region of interest is good for where surroundings change.

On MVTec AD's toothbrushes, which lie in the middle, a lit square of random brightness
is put beside the brush in half of all images, of training and test, normal or not.
Printed are the image AUROC and the pixel AP without squares, with them, and with them
behind a RegionOfInterest of the columns in which the brush lies::

    python benchmarks/region.py --data DATA
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from skanomaly import PatchDetector, RegionOfInterest, make_pipeline
from skanomaly.datasets import load_mvtec
from skanomaly.metrics import pixel_average_precision_score

SIZE = 128
COLUMNS = slice(28, 100)  # of the brush and all its defects
SQUARE = 16


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="mvtec_ad is in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    data = load_mvtec(options.data / "mvtec_ad", "toothbrush", size=SIZE)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, COLUMNS] = True
    measure("as they are", [detector()], data, [None])
    measure("squares", [detector()], data, options.seeds)
    measure(
        "squares, region", [RegionOfInterest(mask), detector()], data, options.seeds
    )


def detector():
    """Return a new detector."""
    return PatchDetector(backbone="efficientnet_lite0", random_state=0)


def measure(name, steps, data, seeds):
    """Print mean and range over seeds of what a pipeline finds."""
    found = []
    for seed in seeds:
        X_train, X_test = data.X_train.copy(), data.X_test.copy()
        if seed is not None:
            rng = np.random.default_rng(seed)
            disturb(X_train, rng)
            disturb(X_test, rng)
        pipeline = make_pipeline(*steps).fit(X_train)
        found.append(
            [
                roc_auc_score(data.y_test == -1, -pipeline.score_samples(X_test)),
                pixel_average_precision_score(
                    data.masks_test, pipeline.localize(X_test)
                ),
            ]
        )
    of_measures = zip(("image AUROC", "pixel AP"), np.transpose(found), strict=True)
    for measured, values in of_measures:
        print(
            f"{name}: {measured} {values.mean():.3f} "
            f"({values.min():.3f} to {values.max():.3f})",
            flush=True,
        )


def disturb(X, rng):
    """Put a square beside the brush in half of the images."""
    for row in rng.permutation(len(X))[: len(X) // 2]:
        top = rng.integers(SIZE - SQUARE)
        left = rng.choice([COLUMNS.start - SQUARE - 4, COLUMNS.stop + 4])
        brightness = rng.integers(60, 256, dtype=np.uint8)
        X[row, top : top + SQUARE, left : left + SQUARE] = brightness


if __name__ == "__main__":
    main()
