"""Compare scores and maps of a device with those of the processor.

Each method is fitted briefly on the device, in both precisions, pickled there, loaded
on the processor in float32 and asked again, about the same images::

    python benchmarks/devices.py --device cuda

Printed are the largest differences, relative to the largest value. The exit status is 1
if one is above 1e-4 (float32) or 2e-2 (bfloat16).
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

ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}


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
    X = smooth_images(8, options.size)
    y = [1, -1] * 4 if name == "DeScarGAN" else None
    detector = getattr(skanomaly, name)(
        device=options.device, precision=precision, random_state=0, **settings
    ).fit(X, y)
    there = judged(detector, X)
    loaded = pickle.loads(pickle.dumps(detector))
    here = judged(loaded.set_params(device="cpu", precision="float32"), X)
    differences = {
        what: float(np.abs(own - other).max() / np.abs(other).max())
        for what, own, other in zip(("scores", "maps"), there, here, strict=True)
    }
    holds = max(differences.values()) <= ALLOWED[precision]
    return {
        "method": name,
        "precision": precision,
        **differences,
        "holds": "yes" if holds else "no",
    }


def judged(detector, X):
    """Return scores and maps."""
    return detector.score_samples(X), detector.localize(X)


if __name__ == "__main__":
    sys.exit(main())
