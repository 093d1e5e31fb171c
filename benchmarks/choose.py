"""Choose among methods by planted defects, and compare with the real ones.

``GridSearchCV`` sees good images only, with a defect planted in a copy of each: each of
three folds fits the candidates on two thirds of the good images, and tests them on the
others and the planted copies of these. Then each candidate is fitted on the same two
thirds, and scores the test images with their real defects; from these nothing is
chosen. Candidates are written to ``choose.csv`` with both areas under the ROC curve::

    python benchmarks/choose.py --data DATA --sets magnetic_tile/tile \\
        mvtec_ad/toothbrush --weights RESNET18.pth --seeds 0 1 2 --memory FOLDER

Printed are the rank correlation of the two areas, and the real area of the candidate
chosen, of the best, of the worst and on average.
"""

import argparse
import csv
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV

from skanomaly import SPADE, PaDiM, PatchCore, PatchDetector, Pipeline
from skanomaly.datasets import load_mvtec, plant_defects
from skanomaly.metrics import anomaly_roc_auc
from skanomaly.model_selection import OneClassKFold

COLUMNS = ("set", "size", "seed", "candidate", "planted", "real")


def candidates(weights, memory, seed):
    """Return detectors by name; for each network the most layers come first."""
    plain = {"backbone": "resnet18", "weights": weights, "random_state": seed}
    resnet = {"memory": memory, **plain}
    lite = {"backbone": "efficientnet_lite0", "memory": memory, "random_state": seed}
    one, two, three = ("layer1",), ("layer2",), ("layer3",)
    return {
        "pca 1+2+3": PatchDetector(layers=(*one, *two, *three), **resnet),
        "pca 2+3": PatchDetector(**resnet),
        "pca 1": PatchDetector(layers=one, **resnet),
        "pca 2": PatchDetector(layers=two, **resnet),
        "pca 3": PatchDetector(layers=three, **resnet),
        "pca 2+3, single patches": PatchDetector(patch_size=1, **resnet),
        "pca 2+3, patches of 5": PatchDetector(patch_size=5, **resnet),
        "pca 2+3, top": PatchDetector(image_score="top", **resnet),
        "pca 2+3, top, smooth": PatchDetector(image_score="top", sigma=12, **resnet),
        "pca 1, top": PatchDetector(layers=one, image_score="top", **resnet),
        "pca of 10, 2+3": PatchDetector(PCA(10), **resnet),
        "pca of 100, 2+3": PatchDetector(PCA(100), **resnet),
        "forest 2+3": PatchDetector(IsolationForest(), max_patches=5000, **resnet),
        "forest 3": PatchDetector(
            IsolationForest(), layers=three, max_patches=5000, **resnet
        ),
        "gaussian 2": PatchDetector(GaussianMixture(), layers=two, **resnet),
        "centres 2+3": PatchDetector(
            MiniBatchKMeans(100, n_init=1), max_patches=5000, **resnet
        ),
        "padim 1+2+3": PaDiM(**resnet),
        "padim 2+3": PaDiM(layers=(*two, *three), **resnet),
        "patchcore 2+3": PatchCore(coreset=0.01, **resnet),
        "patchcore 2+3, top": PatchCore(coreset=0.01, image_score="top", **resnet),
        "patchcore 3": PatchCore(coreset=0.01, layers=three, **resnet),
        "spade 3": SPADE(layers=three, **plain),
        "spade 3, pixels": SPADE(layers=three, image_score="max", **plain),
        "lite pca": PatchDetector(**lite),
        "lite pca, top": PatchDetector(image_score="top", **lite),
        "lite padim": PaDiM(layers=("blocks.4", "blocks.10"), **lite),
        "lite patchcore": PatchCore(coreset=0.01, **lite),
    }


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", required=True, help="ROOT/CATEGORY")
    parser.add_argument(
        "--weights", default="imagenet", help="'imagenet' or a file, of ResNet-18"
    )
    parser.add_argument("--memory", help="folder in which features are kept")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        "| set | seed | candidates | rank correlation | chosen | its AUROC | mean | "
        "worst | best | minutes |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.sets:
        root, _, category = name.rpartition("/")
        with warnings.catch_warnings():  # cracks that 128 pixels lose
            warnings.filterwarnings("ignore", "Masks of anomalous")
            data = load_mvtec(options.data / root, category, size=options.size)
        for seed in options.seeds:
            started = time.perf_counter()
            names, planted, real = measure(options, data, seed)
            append(options, name, seed, names, planted, real)
            chosen = planted.argmax()
            print(
                f"| {name} | {seed} | {len(names)} "
                f"| {spearmanr(planted, real).statistic:.2f} | {names[chosen]} "
                f"| {real[chosen]:.3f} | {real.mean():.3f} | {real.min():.3f} "
                f"| {real.max():.3f} | {(time.perf_counter() - started) / 60:.1f} |",
                flush=True,
            )


def measure(options, data, seed):
    """Return names, and areas under the ROC curve of planted and of real defects."""
    methods = candidates(options.weights, options.memory, seed)
    planted = plant_defects(data.X_train, random_state=seed)
    cv = OneClassKFold(3, shuffle=True, random_state=seed)
    search = GridSearchCV(
        Pipeline([("detect", PatchDetector())]),
        {"detect": list(methods.values())},
        cv=cv,
        scoring=anomaly_roc_auc,
        refit=False,
        error_score="raise",
    ).fit(planted.X, planted.y, groups=planted.groups)
    train, _ = next(cv.split(planted.X, planted.y, planted.groups))
    real = [
        anomaly_roc_auc(clone(method).fit(planted.X[train]), data.X_test, data.y_test)
        for method in methods.values()
    ]
    return list(methods), search.cv_results_["mean_test_score"], np.array(real)


def append(options, name, seed, *columns):
    """Append candidates to the table, with a header if it is new."""
    table = options.output / "choose.csv"
    is_new = not table.exists()
    with open(table, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for values in zip(*columns, strict=True):
            writer.writerow([name, options.size, seed, *values])


if __name__ == "__main__":
    main()
