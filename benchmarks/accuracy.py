"""Measure how well methods find the defects of real images.

Each run trains one method on the normal images of one set and scores its test images
once, after the last epoch; nothing is chosen on the test set. Runs take place one after
the other, each in a process of its own, and are appended to ``accuracy.csv`` as they
end; ``accuracy.md`` holds the mean and the spread over the seeds.

Sets are folders in the layout of MVTec AD, named relative to ``--data``::

    python benchmarks/accuracy.py --data DATA --sets mvtec_ad/bottle mvtec_ad/tile \\
        --methods naive spade draem --size 128 --seeds 0 1 2 --budget 20

``--params draem.rotation=0.0 spade.image_score=max`` changes parameters of methods.
With ``--crop 112`` they see the centre of the images only; maps are 0 around it.
"""

import argparse
import ast
import csv
import json
import multiprocessing
import pickle
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.base import clone
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.svm import OneClassSVM

from skanomaly import (
    DRAEM,
    FCDD,
    MNAD,
    RIAD,
    SCADN,
    SMAI,
    SPADE,
    Autoencoder,
    CenterCropImages,
    DifferNet,
    InTra,
    MemAE,
    PaDiM,
    PatchCore,
    PatchDetector,
    PatchSVDD,
    Pipeline,
    PNet,
    PuzzleAE,
    VariationalAutoencoder,
)
from skanomaly._fitting.batches import degrees_and_peaks
from skanomaly._tensors.filters import gaussian_blur
from skanomaly.base import BaseDetector, NetworkDetector
from skanomaly.datasets import load_mvtec
from skanomaly.metrics import localization_scores

MEASURES = ("image AUROC", "pixel AUROC", "pixel AP", "AU-PRO", "F1-max")
COSTS = ("fit seconds", "seconds per image", "peak MiB", "file MiB")


class Naive(BaseDetector):
    """Distance to the mean training image over its standard deviation at each pixel.

    0.05 is added to the standard deviation, and the maps are smoothed as SPADE's are.
    """

    def __init__(
        self,
        *,
        image_shape=None,
        batch_size=8,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _fit(self, images, labels):
        self._begin_anew()
        pixels = images[:].double()
        self.mean_ = pixels.mean(dim=0).float()
        self.std_ = pixels.std(dim=0).float()
        return degrees_and_peaks(self._evaluate(images, maps_wanted=True))

    def _judge(self, images, *, maps_wanted, generator):
        distances = ((images - self.mean_) / (self.std_ + 0.05)).norm(dim=1)
        maps = gaussian_blur(distances, 4 * min(distances.shape[1:]) / 224)
        return maps.amax(dim=(1, 2)), maps


class Linear(Naive):
    """Error of a reconstruction by 32 principal components of the pixels, smoothed."""

    def _fit(self, images, labels):
        self._begin_anew()
        pca = PCA(32, random_state=self._seed).fit(images[:].flatten(1).numpy())
        self.mean_ = torch.from_numpy(pca.mean_)
        self.components_ = torch.from_numpy(pca.components_)
        return degrees_and_peaks(self._evaluate(images, maps_wanted=True))

    def _judge(self, images, *, maps_wanted, generator):
        pixels = images.flatten(1) - self.mean_
        errors = pixels - pixels @ self.components_.T @ self.components_
        maps = errors.view(images.shape).square().sum(dim=1)
        maps = gaussian_blur(maps, 4 * min(maps.shape[1:]) / 224)
        return maps.amax(dim=(1, 2)), maps


METHODS = {
    "naive": Naive,
    "linear": Linear,
    "autoencoder": Autoencoder,
    "autoencoder_l2": partial(Autoencoder, loss="l2"),
    "differnet": DifferNet,
    "draem": DRAEM,
    "fcdd": FCDD,
    "intra": InTra,
    "memae": MemAE,
    "mnad": MNAD,
    "patch_svdd": PatchSVDD,
    "pnet": PNet,
    "puzzle_ae": PuzzleAE,
    "riad": RIAD,
    "scadn": SCADN,
    "smai": SMAI,
    "spade": SPADE,
    "vae": VariationalAutoencoder,
    "padim": PaDiM,
    "patchcore": PatchCore,
    "patch_pca": PatchDetector,
    "patch_forest": partial(PatchDetector, IsolationForest()),
    "patch_gaussian": partial(PatchDetector, GaussianMixture()),
    "patch_kmeans": partial(PatchDetector, MiniBatchKMeans(500, n_init=1)),
    "patch_neighbors": partial(PatchDetector, NearestNeighbors(n_neighbors=1)),
    "patch_svm": partial(
        PatchDetector, make_pipeline(PCA(50), OneClassSVM(nu=0.01)), max_patches=5000
    ),
}


def main():
    """Run what the command line asks for."""
    options = argument_parser(__doc__).parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    table = options.output / "accuracy.csv"
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in options.sets:
        for method in options.methods:
            for seed in options.seeds:
                with context.Pool(1) as pool:
                    row = pool.apply(measure, (options, name, method, seed))
                rows.append(row)
                append_row(table, row)
                print({key: row[key] for key in ("set", "method", "seed", *MEASURES)})
    report = to_markdown(rows)
    (options.output / "accuracy.md").write_text(report)
    print(report)


def argument_parser(description):
    """Return a parser of sets, methods and what methods are given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", required=True, help="ROOT/CATEGORY")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--budget",
        type=float,
        help="minutes of training a run: sets max_epochs from the time of an epoch",
    )
    parser.add_argument(
        "--params",
        nargs="+",
        type=parameter,
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="parameters that differ from the defaults",
    )
    parser.add_argument(
        "--crop", type=int, help="side in pixels of the centre that methods see"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser


def parameter(text):
    """Return method, name and value of ``METHOD.NAME=VALUE``."""
    target, equals, value = text.partition("=")
    method, dot, name = target.partition(".")
    if not (equals and dot and method in METHODS):
        raise argparse.ArgumentTypeError(f"not METHOD.NAME=VALUE: {text!r}")
    try:
        return method, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, name, value


def measure(options, name, method, seed):
    """Train and test one method once; return one row of the table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    root, _, category = name.rpartition("/")
    data = load_mvtec(options.data / root, category, size=options.size)
    detector, settings = make(options, method, seed, data.X_train)
    started = time.perf_counter()
    detector.fit(data.X_train)
    fit_seconds = time.perf_counter() - started
    started = time.perf_counter()
    scores = -detector.score_samples(data.X_test)
    seconds_per_image = (time.perf_counter() - started) / len(data.X_test)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    anomalous = data.y_test == -1
    results = {"image AUROC": roc_auc_score(anomalous, scores)}
    if data.masks_test is not None:
        maps = detector.localize(data.X_test)
        measured = localization_scores(data.masks_test, maps)
        results |= dict(zip(MEASURES[1:], measured.values(), strict=True))
    return {
        "set": name,
        "method": method,
        "settings": json.dumps(settings),
        "size": options.size,
        "seed": seed,
        **{key: results.get(key, float("nan")) for key in MEASURES},
        "fit seconds": fit_seconds,
        "seconds per image": seconds_per_image,
        "peak MiB": peak / 1024**2 if sys.platform == "darwin" else peak / 1024,
        "file MiB": len(pickle.dumps(detector)) / 1024**2,
    }


def make(options, method, seed, X):
    """Return a detector to be fitted to images X, and what parameters it was given."""
    settings = {key: value for m, key, value in options.params if m == method}
    detector = METHODS[method](random_state=seed, **settings)
    if options.budget and isinstance(detector, NetworkDetector):
        epochs = int(60 * options.budget / seconds_per_epoch(detector, X))
        settings["max_epochs"] = max(1, epochs)
        detector.set_params(max_epochs=settings["max_epochs"])
    if options.crop:
        crop = CenterCropImages(size=options.crop)
        detector = Pipeline([("crop", crop), ("detect", detector)])
        settings["crop"] = options.crop
    return detector, settings


def seconds_per_epoch(detector, X):
    """Return the time that one more epoch of training takes."""
    seconds = []
    for max_epochs in (1, 1, 3):  # the first fit also makes the device ready
        started = time.perf_counter()
        clone(detector).set_params(max_epochs=max_epochs).fit(X)
        seconds.append(time.perf_counter() - started)
    return (seconds[2] - seconds[1]) / 2


def append_row(table, row):
    """Append a row to a CSV file, with a header if it is new."""
    columns = list(row)
    with open(table, "a+", newline="") as file:
        file.seek(0)
        known = next(csv.reader(file), None)
        if known not in (None, columns):
            raise ValueError(f"{table} has columns {known}, and not {columns}.")
        writer = csv.DictWriter(file, columns)
        if known is None:
            writer.writeheader()
        writer.writerow(row)


def to_markdown(rows):
    """Return a table of mean and standard deviation over the seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row["set"], row["method"]), []).append(row)
    columns = ("set", "method", "runs", *MEASURES, *COSTS)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for (name, method), group in groups.items():
        cells = [name, method, str(len(group))]
        for key in MEASURES:
            values = np.array([row[key] for row in group])
            cells.append(f"{values.mean():.3f} ± {values.std():.3f}")
        for key in COSTS:
            cells.append(f"{np.median([row[key] for row in group]):.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
