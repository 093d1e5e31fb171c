"""Measure the memory that many images take.

Writes images into a folder, reads them into a memory-mapped file by LoadImages, and
fits, scores and localizes from there. The maps go into a memory-mapped file as well.
Printed is how far the process's largest memory, pages of mapped files included, lies
above what it has after the imports::

    python benchmarks/memory.py --images 20000 --size 64
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from skanomaly import Autoencoder, LoadImages


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    start = peak()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = write_images(folder, options.images, options.size)
        images = LoadImages(memmap=folder).fit_transform(paths)
        report("load", start)
        detector = Autoencoder(
            code_size=32, width=8, batch_size=64, max_epochs=1, random_state=0
        ).fit(images)
        report("fit", start)
        detector.score_samples(images)
        report("score_samples", start)
        maps = np.lib.format.open_memmap(
            folder / "maps.npy",
            mode="w+",
            dtype=np.float32,
            shape=images.shape[:3],
        )
        detector.localize(images, out=maps)
        report("localize", start)


def write_images(folder, n_images, size):
    """Write noisy images as PNG files; return their paths."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(n_images)]
    for path in paths:
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)
    return paths


def peak():
    """Return the largest memory that the process has had, in MiB."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return memory / 1024**2 if sys.platform == "darwin" else memory / 1024


def report(step, start):
    """Print by how much the memory has risen."""
    print(f"{step}: {peak() - start:.0f} MiB above the start", flush=True)


if __name__ == "__main__":
    main()
