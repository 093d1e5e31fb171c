"""
Search the settings of SPADE in a pipeline
==========================================

Paths go in, heat maps come out: image files are loaded, a pretrained network turns them
into features, and SPADE compares these. A grid search chooses the number of neighbours
and the layers by cross-validation. The features are computed once for the whole search.
"""

# %%
# A few image files stand in for a folder of photographs.

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import GridSearchCV

from skanomaly import SPADE, BackboneFeatures, LoadImages, localize, make_pipeline
from skanomaly.datasets import load_textures
from skanomaly.metrics import anomaly_roc_auc, pixel_roc_auc_score
from skanomaly.model_selection import OneClassKFold

folder = Path(tempfile.mkdtemp())
data = load_textures(n_train=40, n_test=60, size=128)
images = np.concatenate([data.X_train, data.X_test])
labels = np.concatenate([np.ones(len(data.X_train), int), data.y_test])
paths = np.array([folder / f"{number:03}.png" for number in range(len(images))])
for path, image in zip(paths, images, strict=True):
    Image.fromarray(image[..., 0]).save(path)

# every third test image stays out of the search
is_kept = np.arange(len(images)) >= len(data.X_train)
is_kept &= np.arange(len(images)) % 3 == 0

# %%
# ``memory`` keeps the features of each image under a key of its content, so that folds
# and candidates share them. The weights of EfficientNet-Lite0 come from a package,
# without a download.

pipeline = make_pipeline(
    LoadImages(),
    BackboneFeatures(backbone="efficientnet_lite0", memory=folder / "features"),
    SPADE(backbone="precomputed", layers=("blocks.4", "blocks.10")),
)

# %%
# Images are compared by the last layer that ``BackboneFeatures`` gives, and maps are
# made of the two layers named above. ``OneClassKFold`` trains on normal images only and
# tests every defect exactly once. ``anomaly_roc_auc`` takes the anomalous images as the
# positive ones, and refuses labels that would turn the result around.

search = GridSearchCV(
    pipeline,
    {
        "spade__n_neighbors": [1, 3, 5],
        "backbonefeatures__layers": [
            ("blocks.4", "blocks.10"),
            ("blocks.4", "blocks.10", "blocks.15"),
        ],
    },
    scoring=anomaly_roc_auc,
    cv=OneClassKFold(n_splits=4, shuffle=True, random_state=0),
)
search.fit(list(paths[~is_kept]), labels[~is_kept])
for parameters, score in zip(
    search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
):
    print(f"image AUROC {score:.3f}  {parameters}")

# %%
# The best pipeline was fitted again on all normal images of the search. It maps the
# images kept aside, from paths.

maps = localize(search, list(paths[is_kept]))
masks = data.masks_test[is_kept[len(data.X_train) :]]
print(f"pixel AUROC of the images kept aside {pixel_roc_auc_score(masks, maps):.3f}")
