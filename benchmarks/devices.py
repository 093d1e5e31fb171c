"""Compare scores and maps of a device with those of the processor.

Each method is fitted briefly on the device, in both precisions, pickled there, loaded
on the processor in float32 and asked again, about the same new images::

    python benchmarks/devices.py --device cuda

Printed are the largest differences, relative to the largest value, and those that the
processor itself shows: in float32 between images and the same images with other last
digits, in bfloat16 between both precisions. The exit status is 1 if a difference is
above 1e-4 (float32) or 2e-2 (bfloat16) and above ten times that of the processor (three
times in bfloat16).
"""

import argparse
import importlib.util
import pickle
import sys
import traceback

import numpy as np
import torch
from speed import METHODS, print_header, print_row, smooth_images

import skanomaly

# largest difference, and how often that of the processor
ALLOWED = {"float32": (1e-4, 10), "bfloat16": (2e-2, 3)}


def main():
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    n_bad, is_first = 0, True
    for name in options.methods:
        for precision in ALLOWED:
            try:
                row = compared(name, precision, options)
            except Exception:  # the other methods are to be seen as well
                traceback.print_exc()
                row = {"method": name, "precision": precision, "holds": "error"}
            n_bad += row["holds"] != "yes"
            if is_first:
                print_header(row)
                is_first = False
            print_row(row)
    return int(n_bad > 0)


def compared(name, precision, options):
    """Return how far the device and the processor are apart."""
    settings = dict(METHODS[name])
    if "weights" in settings and importlib.util.find_spec("torchvision") is None:
        settings |= {"backbone": "efficientnet_lite0"}
        settings.pop("layer", None)
    # of training images, nearest neighbours have distances of mere rounding
    X, X_new = np.split(smooth_images(16, options.size), 2)
    y = [1, -1] * 4 if name == "DeScarGAN" else None
    detector = getattr(skanomaly, name)(
        device=options.device, precision=precision, random_state=0, **settings
    ).fit(X, y)
    there = judged(detector, X_new)
    detector = pickle.loads(pickle.dumps(detector)).set_params(device="cpu")
    in_bfloat16 = judged(detector, X_new)
    detector.set_params(precision="float32")
    here = judged(detector, X_new)
    rounded = judged(detector, other_last_digits(X_new))
    differences = relative(there, here)
    own = relative(in_bfloat16 if precision == "bfloat16" else rounded, here)
    bound, times = ALLOWED[precision]
    holds = all(
        value <= max(bound, times * of_processor)
        for value, of_processor in zip(differences, own, strict=True)
    )
    return {
        "method": name,
        "precision": precision,
        "scores": differences[0],
        "scores of the processor": own[0],
        "maps": differences[1],
        "maps of the processor": own[1],
        "holds": "yes" if holds else "no",
    }


def judged(detector, X):
    """Return scores and maps."""
    return detector.score_samples(X), detector.localize(X)


def other_last_digits(X):
    """Return images as float32, their values moved by up to two parts in 2**23."""
    pixels = X.astype(np.float32) / 255
    moved = np.random.default_rng(0).uniform(-1, 1, X.shape) * np.finfo(np.float32).eps
    return (pixels * (1 + 2 * moved)).astype(np.float32).clip(0, 1)


def relative(results, others):
    """Return the largest difference of each pair of arrays over the largest value."""
    return [
        float(np.abs(own - other).max() / np.abs(other).max())
        for own, other in zip(results, others, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
