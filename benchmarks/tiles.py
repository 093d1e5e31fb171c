"""Measure the time and the memory that large photographs take, tile by tile.

Writes photographs, mosaics of random pieces of scikit-image's gravel, into a folder,
and reads them into a memory-mapped file by LoadImages. A TiledDetector fits all but the
last, in which a square of 20 pixels is planted, and inspects that one. Printed are the
times, how far the process's largest memory, pages of mapped files included, lies above
what it has after the imports, and the boxes::

    python benchmarks/tiles.py --images 8 --height 3000 --width 4000
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from memory import peak, report
from PIL import Image
from skimage.data import gravel

from skanomaly import LoadImages, PatchDetector, TiledDetector, make_pipeline

PIECE = 384
DEFECT = 20


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8, help="photographs to fit")
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--max-tiles", type=int, help="tiles to learn from")
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths, box = write_photographs(folder, options)
        detector = PatchDetector(
            backbone="efficientnet_lite0",
            layers=("blocks.2", "blocks.4"),
            patch_size=1,
            sigma=2.0,
        )
        pipeline = make_pipeline(
            LoadImages(memmap=folder),
            TiledDetector(detector, max_tiles=options.max_tiles, random_state=0),
        )
        start, began = peak(), time.perf_counter()
        pipeline.fit(paths[:-1])
        report(f"fit, {time.perf_counter() - began:.0f} s", start)
        began = time.perf_counter()
        found = pipeline.inspect(paths[-1:])
        report(f"inspect, {time.perf_counter() - began:.1f} s", start)
    print(f"planted: {box}; label {found.labels[0]}, boxes")
    for region in found.regions:
        print([int(region[side]) for side in ("top", "left", "bottom", "right")])


def write_photographs(folder, options):
    """Write photographs as PNG files; return their paths and the box of the defect."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(options.images + 1)]
    for path in paths:
        pixels = mosaic(options.height, options.width, rng)
        if path == paths[-1]:
            top = rng.integers(options.height - DEFECT)
            left = rng.integers(options.width - DEFECT)
            inside = np.s_[top : top + DEFECT, left : left + DEFECT]
            pixels[inside] = rng.integers(
                (140, 50, 40), (160, 70, 60), (DEFECT, DEFECT, 3)
            )
        Image.fromarray(pixels).save(path, compress_level=1)
    return paths, [int(side) for side in (top, left, top + DEFECT, left + DEFECT)]


def mosaic(height, width, rng):
    """Return a photograph (height, width, 3) made of pieces of a smaller one."""
    source = gravel()
    pixels = np.empty((height, width), np.uint8)
    for top in range(0, height, PIECE):
        for left in range(0, width, PIECE):
            row, column = rng.integers(0, np.subtract(source.shape, PIECE) + 1)
            piece = source[row : row + PIECE, column : column + PIECE]
            piece = np.rot90(piece, rng.integers(4))
            place = pixels[top : top + PIECE, left : left + PIECE]
            place[:] = piece[: place.shape[0], : place.shape[1]]
    return pixels[..., None].repeat(3, axis=-1)


if __name__ == "__main__":
    main()
