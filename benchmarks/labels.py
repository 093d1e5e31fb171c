"""Measure what DeScarGAN learns from image-level labels.

Without ``--data``: the synthetic ellipses, whose differences are known. With ``--data``
a folder in the layout of MVTec AD: all images of its train and test parts, "good" or
not, in stratified cross-validation::

    python benchmarks/labels.py --params width=12 critic_width=12 n_critic=2
    python benchmarks/labels.py --data DATA/brain_mri --category brain --params width=12

A first training, with the parameters of ``--params`` but for those of ``--first``, may
come before the one that is measured, which continues it::

    python benchmarks/labels.py --train 4000 --first cycle_weight=1e4 max_epochs=2 \\
        --params width=12 critic_width=12 n_critic=2
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from arguments import NamedValues, add_training_arguments
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from skanomaly import DeScarGAN
from skanomaly.datasets import load_mvtec, make_ellipses
from skanomaly.metrics import pixel_roc_auc_score


def main():
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    for seed in options.seeds:
        if options.data:
            cross_validate(options, seed)
        else:
            measure_ellipses(options, seed)


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--category", help="name of the set")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--arrangement", choices=["apart", "nested"], default="apart")
    parser.add_argument("--train", type=int, default=400, help="images of ellipses")
    parser.add_argument("--folds", type=int, default=3)
    add_training_arguments(parser)
    parser.add_argument(
        "--first",
        nargs="+",
        default={},
        action=NamedValues,
        metavar="NAME=VALUE",
        help="of a first training, which the other continues",
    )
    return parser.parse_args()


def measure_ellipses(options, seed):
    """Train on healthy and deformed ellipses; compare maps with the differences."""
    data = make_ellipses(
        n_train=options.train, size=options.size, arrangement=options.arrangement
    )
    started = time.perf_counter()
    detector = train(options, seed, data.X_train, data.y_train)
    seconds = time.perf_counter() - started
    diseased = data.y_test == -1
    maps = detector.localize(data.X_test)
    report(
        f"seed {seed}",
        seconds,
        {
            "pixel AUROC, diseased": pixel_roc_auc_score(
                data.masks_test[diseased], maps[diseased]
            ),
            "image AUROC, classifier": roc_auc_score(
                diseased, -detector.score_samples(data.X_test)
            ),
            "image AUROC, mean": roc_auc_score(diseased, maps.mean(axis=(1, 2))),
            "image AUROC, maximum": roc_auc_score(diseased, maps.max(axis=(1, 2))),
        },
    )


def train(options, seed, X, y):
    """Return a detector that was trained once, or in two stages."""
    settings = {**options.params, "random_state": seed, "warm_start": True}
    detector = DeScarGAN(**settings)
    if options.first:
        wanted = detector.get_params()
        detector.set_params(**options.first).fit(X, y).set_params(**wanted)
    return detector.fit(X, y)


def cross_validate(options, seed):
    """Train and test on the folds of a set of images with labels."""
    data = load_mvtec(options.data, options.category, size=options.size, mode="L")
    X = np.concatenate([data.X_train, data.X_test])
    y = np.concatenate([np.ones(len(data.X_train), int), data.y_test])
    folds = StratifiedKFold(options.folds, shuffle=True, random_state=seed)
    results = {"image AUROC, classifier": [], "image AUROC, mean": []}
    started = time.perf_counter()
    for rows, test in folds.split(X, y):
        detector = train(options, seed, X[rows], y[rows])
        maps = detector.localize(X[test]).mean(axis=(1, 2))
        for name, scores in zip(
            results, (-detector.score_samples(X[test]), maps), strict=True
        ):
            results[name].append(roc_auc_score(y[test] == -1, scores))
    report(
        f"seed {seed}, {options.folds} folds",
        time.perf_counter() - started,
        {name: np.mean(values) for name, values in results.items()},
    )


def report(title, seconds, results):
    """Print results on one line."""
    values = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
    print(f"{title}: {values}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
