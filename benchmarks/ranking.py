"""Rank whole methods by planted defects, and see whether real ones rank them alike.

Each method is fitted once, on two thirds of the good training images. It judges the
others and copies of these with planted defects, and then the test images with their
real defects, from which nothing is chosen. A row a method is appended to
``ranking.csv`` as soon as it is there::

    python benchmarks/ranking.py --data DATA --sets magnetic_tile/tile --size 64 \\
        --methods naive linear memae --params memae.image_score=max --threads 1

In the end, Spearman's rank correlation of planted and real is printed, over all rows of
``ranking.csv`` that share set, size and seed. ``--planted-only`` leaves the test images
alone, for a choice between settings.

With ``--maps FOLDER`` the maps of the test images are kept, and with ``--figure`` those
that are there are drawn and nothing is fitted; ``--pictures`` has the numbers of the
test images, once for each set::

    python benchmarks/ranking.py --data DATA --sets mvtec_ad/toothbrush \\
        magnetic_tile/tile --size 64 --maps FOLDER --figure maps.png \\
        --pictures 14 38 --pictures 70 120
"""

import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from accuracy import append_row, argument_parser, make
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from skanomaly.datasets import load_mvtec, plant_defects
from skanomaly.metrics import pixel_roc_auc_score
from skanomaly.model_selection import OneClassKFold

AREAS = ("planted image", "real image", "planted pixel", "real pixel")


def main():
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.figure:
        draw(options)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    for folder in filter(None, (options.output, options.maps)):
        folder.mkdir(parents=True, exist_ok=True)
    table = options.output / "ranking.csv"
    print("| set | method | seed | " + " | ".join(AREAS) + " | fit s |")
    print("|" + " --- |" * (len(AREAS) + 4))
    for name in options.sets:
        data = load(options, name)
        for seed in options.seeds:
            for method in options.methods:
                row = measure(options, name, data, method, seed)
                append_row(table, row)
                print_row(row)
    if not options.planted_only:
        print_correlations(table)


def print_row(row):
    """Print a row of a table in Markdown."""
    areas = (f"{row[key]:.3f}" for key in AREAS)
    cells = row["set"], row["method"], str(row["seed"]), *areas
    print("|", " | ".join(cells), f"| {row['fit seconds']:.0f} |", flush=True)


def parse_arguments():
    """Return the options of the command line."""
    parser = argument_parser(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument(
        "--planted-only", action="store_true", help="leave out the test images"
    )
    parser.add_argument("--maps", type=Path, help="folder that keeps maps")
    parser.add_argument("--figure", type=Path, help="file for a picture of kept maps")
    parser.add_argument(
        "--pictures",
        type=int,
        nargs="+",
        action="append",
        help="numbers of the test images to draw, once for each set",
    )
    options = parser.parse_args()
    if options.figure and not options.maps:
        parser.error("--figure wants --maps, the folder of the maps")
    if options.figure and len(options.pictures or ()) != len(options.sets):
        parser.error("--figure wants --pictures once for each set")
    if options.maps and options.planted_only:
        parser.error("--maps keeps maps of the test images, which --planted-only skips")
    return options


def load(options, name):
    """Return the images of a set ROOT/CATEGORY."""
    root, _, category = name.rpartition("/")
    return load_mvtec(options.data / root, category, size=options.size)


def measure(options, name, data, method, seed):
    """Fit a method once, judge planted and real defects; return a row of the table."""
    planted = plant_defects(data.X_train, random_state=seed)
    cv = OneClassKFold(3, shuffle=True, random_state=seed)
    train, held_out = next(cv.split(planted.X, planted.y, planted.groups))
    detector, settings = make(options, method, seed, planted.X[train])
    started = time.perf_counter()
    detector.fit(planted.X[train])
    row = {
        "set": name,
        "method": method,
        "settings": json.dumps(settings),
        "size": options.size,
        "seed": seed,
        **dict.fromkeys(AREAS, float("nan")),
        "fit seconds": time.perf_counter() - started,
    }

    def judge(kind, X, y, masks):
        report = detector.inspect(X)
        row[f"{kind} image"] = roc_auc_score(y == -1, -report.scores)
        row[f"{kind} pixel"] = pixel_roc_auc_score(masks, report.maps)
        return report.maps

    judge("planted", planted.X[held_out], planted.y[held_out], planted.masks[held_out])
    if not options.planted_only:
        maps = judge("real", data.X_test, data.y_test, data.masks_test)
        if options.maps:
            np.save(maps_file(options, name, method), maps)
    return row


def maps_file(options, name, method):
    """Return where the maps of a method on a set are kept."""
    return options.maps / f"{name.replace('/', '-')}-{method}.npy"


def print_correlations(table):
    """Print how alike planted and real defects rank the rows of the table."""
    groups = {}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            areas = [float(row[key]) for key in AREAS]
            if np.isfinite(areas).all():  # not of planted defects only
                key = row["set"], row["size"], row["seed"]
                groups.setdefault(key, []).append(areas)
    for (name, size, seed), rows in groups.items():
        if len(rows) > 2:
            columns = np.transpose(rows)
            image, pixel = (spearmanr(*pair).statistic for pair in np.split(columns, 2))
            print(
                f"{name}, {size} pixels, seed {seed}, {len(rows)} rows: rank "
                f"correlation {image:.2f} (image AUROC), {pixel:.2f} (pixel AUROC)"
            )


def draw(options):
    """Draw photographs, masks and the maps that are kept, a row an image."""
    import matplotlib.pyplot as plt

    methods = [
        method
        for method in options.methods
        if all(maps_file(options, name, method).exists() for name in options.sets)
    ]
    titles = ["photograph", "mask", *methods]
    n_rows = sum(map(len, options.pictures))
    figure, axes = plt.subplots(
        n_rows,
        len(titles),
        figsize=(1.2 * len(titles), 1.3 * n_rows),
        layout="constrained",
        squeeze=False,
    )
    rows = iter(axes)
    for name, numbers in zip(options.sets, options.pictures, strict=True):
        data = load(options, name)
        maps = [
            np.load(maps_file(options, name, method), mmap_mode="r")
            for method in methods
        ]
        for number in numbers:
            shown = data.X_test[number], data.masks_test[number]
            for axis, picture in zip(
                next(rows), (*shown, *(own[number] for own in maps)), strict=True
            ):
                axis.imshow(picture, cmap="gray")
                axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
