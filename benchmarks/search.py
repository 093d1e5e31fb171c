"""Time the exact search of SPADE against the matrix products inside it.

The features are random and have the sizes of WideResNet-50's first three stages. Both
sides take turns, so that other load on the machine meets both; medians are printed. The
memory is what the searches need above queries and gallery.
"""

import argparse
import resource
import sys
from statistics import median
from time import perf_counter

import torch

from skanomaly._tensors.neighbors import QUERY_CHUNK, TILE, nearest_distances

LAYERS = {"layer1": (4, 256), "layer2": (8, 512), "layer3": (16, 1024)}


def multiply(queries, gallery):
    """Compute the bare products, in the tiles of the search."""
    products = queries.new_empty(QUERY_CHUNK, TILE)
    for left in queries.split(QUERY_CHUNK):
        for right in gallery.split(TILE):
            torch.mm(left, right.T, out=products[: len(left), : len(right)])


def seconds(function, *arrays):
    """Return the seconds of one call."""
    start = perf_counter()
    function(*arrays)
    return perf_counter() - start


def peak_memory():
    """Return the largest memory that the process has had so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main():
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gallery", type=int, default=50, help="images in the gallery")
    parser.add_argument("--size", type=int, default=224, help="side of an image, px")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    features = {}
    for layer, (stride, channels) in LAYERS.items():
        positions = (-(-arguments.size // stride)) ** 2
        features[layer] = (
            torch.rand(positions, channels),
            torch.rand(arguments.gallery * positions, channels),
        )
    before = peak_memory()
    for arrays in features.values():
        nearest_distances(*arrays)
    memory = peak_memory() - before

    times = {layer: ([], []) for layer in LAYERS}
    for _ in range(arguments.repeats):
        for layer, arrays in features.items():
            times[layer][0].append(seconds(nearest_distances, *arrays))
            times[layer][1].append(seconds(multiply, *arrays))

    print("| layer | queries | gallery | channels | search, s | products, s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    totals = [0.0, 0.0]
    for layer, (queries, gallery) in features.items():
        pair = [median(values) for values in times[layer]]
        totals = [total + value for total, value in zip(totals, pair, strict=True)]
        sizes = f"{len(queries)} | {len(gallery)} | {gallery.shape[1]}"
        print(_row(f"{layer} | {sizes}", *pair))
    print(_row("all | | |", *totals))
    print(
        f"\n{arguments.threads} threads, median of {arguments.repeats}; "
        f"memory above features and gallery: {memory:.0f} MiB"
    )


def _row(name, search, products):
    return f"| {name} | {search:.2f} | {products:.2f} | {search / products:.2f} |"


if __name__ == "__main__":
    main()
