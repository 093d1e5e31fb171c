"""Measure what decoding JPEGs at a fraction of their size gains, and what it changes.

Makes JPEGs of 4000 x 3000 pixels out of photographs of scikit-image and, if asked, of
the images in a folder: each enlarged, with noise as of a sensor on it, and each
repeated as it is, so that its detail is as fine as pixels. They are read by Pillow in
full and by `LoadImages`, and both resized::

    python benchmarks/loading.py --images FOLDER

A row is of one size: milliseconds of processor time an image, the mean difference in
grey levels over all pictures, that of the picture that differs most, and the largest of
any pixel.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from skanomaly import LoadImages
from skanomaly.images import image_files

WIDTH, HEIGHT = 4000, 3000
PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel")


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224, 256, 512])
    parser.add_argument("--images", help="folder of more pictures")
    parser.add_argument("--most", type=int, default=12, help="pictures of the folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), options)
        print("| size | full, ms | LoadImages, ms | mean | worst mean | largest |")
        print("| --- | --- | --- | --- | --- | --- |")
        for size in options.sizes:
            measure(paths, size)


def write_photographs(folder, options):
    """Write JPEGs of 12 megapixels; return their paths."""
    pictures = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    if options.images:
        files = image_files(options.images, recursive=True)
        for number in np.linspace(0, len(files) - 1, options.most).astype(int):
            with Image.open(files[number]) as file:
                pictures[f"{number}"] = np.asarray(file.convert("RGB"))
    rng = np.random.default_rng(0)
    paths = []
    for name, pixels in pictures.items():
        large = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.BICUBIC)
        noise = rng.normal(0, 5, (HEIGHT, WIDTH, *pixels.shape[2:]))
        noisy = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
        height, width = pixels.shape[:2]
        counts = -(-HEIGHT // height), -(-WIDTH // width), 1
        fine = np.tile(pixels, counts[: pixels.ndim])[:HEIGHT, :WIDTH]
        for kind, photograph in (("large", noisy), ("fine", fine)):
            paths.append(folder / f"{name}_{kind}.jpg")
            Image.fromarray(photograph).save(paths[-1], quality=90)
    return paths


def measure(paths, size):
    """Print the row of a size."""
    full_time = own_time = 0
    differences = []
    for path in paths:
        start = time.process_time()
        with Image.open(path) as file:
            image = file.convert("RGB").resize((size, size), Image.BILINEAR)
        full_time += time.process_time() - start
        start = time.process_time()
        own = LoadImages(size=size).transform([path])[0]
        own_time += time.process_time() - start
        differences.append(np.abs(np.asarray(image).astype(int) - own))
    means = [difference.mean() for difference in differences]
    full, fast = (1000 * t / len(paths) for t in (full_time, own_time))
    print(
        f"| {size} | {full:.0f} | {fast:.0f} | {np.mean(means):.2f} | "
        f"{max(means):.2f} | {np.max(differences)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
