"""Compare what a map costs with the bare passes of the network that it needs.

For each method, maps of a batch of random images are timed against the network alone,
fed with tensors that are ready, as often as the method must call it (masks times
images, batched alike). Both are repeated in turn, and the medians' ratio is printed::

    python benchmarks/inference.py --size 128 --threads 1
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from skanomaly import (
    DRAEM,
    MNAD,
    RIAD,
    SCADN,
    SMAI,
    Autoencoder,
    DeScarGAN,
    InTra,
    MemAE,
    PNet,
    VariationalAutoencoder,
)
from skanomaly.masking import windows

BRIEF = {"max_epochs": 1, "n_iter_no_change": None, "random_state": 0}


def draem(detector, images):
    """Return the passes of both networks, one after the other."""
    return [(detector.network_, (images,))]


def autoencoder(detector, images):
    """Return one pass."""
    return [(detector.network_, (images,))]


def vae(detector, images):
    """Return one pass of the encoder and one of the decoder for each sample."""
    network = detector.network_
    codes = torch.randn(detector.n_samples * len(images), detector.code_size)
    return [(network.encode, (images,)), (network.decode, (codes, images.shape[-2:]))]


def memae(detector, images):
    """Return one pass."""
    return [(detector.network_, (images,))]


def mnad(detector, images):
    """Return one pass."""
    return [(detector.network_, (images, detector.network_.memory))]


def pnet(detector, images):
    """Return two passes of the extractor and one of the reconstructor."""
    extractor = detector.network_["extractor"]
    structure = images[:, :1]
    return [
        (extractor, (images,)),
        (detector.network_["reconstructor"], (structure, images)),
        (extractor, (images,)),
    ]


def descargan(detector, images):
    """Return one pass of the generator."""
    return [(detector.network_["generator"], (images,))]


def riad(detector, images):
    """Return a pass for each mask of each cell size."""
    stacked = images.repeat(detector.n_masks, 1, 1, 1)
    return [(detector.network_.unet, (stacked,))] * len(detector.cell_sizes)


def scadn(detector, images):
    """Return a pass for each of four masks of each number of stripes."""
    stacked = images.repeat(4, 1, 1, 1)
    layers = detector.network_["generator"].layers
    return [(layers, (stacked,))] * len(detector.stripes)


def smai(detector, images):
    """Return a pass for each superpixel."""
    n = sum(int(labels.max()) + 1 for labels in detector._segment(images))
    c, h, w = images.shape[1:]
    stacked = torch.rand(detector.batch_size, h, w, c + 1).permute(0, 3, 1, 2)
    passes = [(detector.network_.unet, (stacked,))] * (n // detector.batch_size)
    if n % detector.batch_size:
        passes.append((detector.network_.unet, (stacked[: n % detector.batch_size],)))
    return passes


def intra(detector, images):
    """Return a pass for each patch, 256 windows at a time."""
    n_rows, n_columns = detector._grid
    cells = windows(n_rows, n_columns, detector.window_size)
    cells = cells.repeat(len(images), 1)
    hidden = torch.zeros(len(cells), dtype=torch.int64)
    embedded = torch.rand(256, cells.shape[1], detector.width)
    return [
        (detector.network_, (embedded[: len(part)], part, own))
        for part, own in zip(cells.split(256), hidden.split(256), strict=True)
    ]


METHODS = {
    "Autoencoder": (Autoencoder(batch_size=8, **BRIEF), autoencoder),
    "VariationalAutoencoder": (VariationalAutoencoder(batch_size=8, **BRIEF), vae),
    "MemAE": (MemAE(batch_size=8, **BRIEF), memae),
    "MNAD": (MNAD(width=16, batch_size=8, **BRIEF), mnad),
    "PNet": (
        PNet(width=12, critic_width=16, structure_epochs=1, batch_size=8, **BRIEF),
        pnet,
    ),
    "DRAEM": (
        DRAEM(reconstructive_width=16, discriminative_width=16, batch_size=8, **BRIEF),
        draem,
    ),
    "DeScarGAN": (
        DeScarGAN(width=12, critic_width=12, image_score="map", batch_size=8, **BRIEF),
        descargan,
    ),
    "RIAD": (RIAD(width=16, batch_size=8, **BRIEF), riad),
    "SMAI": (SMAI(width=16, n_segments=80, batch_size=8, **BRIEF), smai),
    "SCADN": (
        SCADN(width=16, n_blocks=4, critic_width=16, batch_size=8, **BRIEF),
        scadn,
    ),
    "InTra": (
        InTra(
            patch_size=8,
            window_size=5,
            width=128,
            n_heads=4,
            n_blocks=5,
            windows_per_image=4,
            **BRIEF,
        ),
        intra,
    ),
}


def smooth_images(n, size):
    """Return random images that fall into superpixels, as plain noise does not."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    X = smooth_images(8, options.size)
    print("| method | bare passes, s / image | map, s / image | ratio |")
    print("| --- | --- | --- | --- |")
    for name in options.methods:
        detector, passes_of = METHODS[name]
        detector.fit(X, np.array([1, -1] * 4) if name == "DeScarGAN" else None)
        images = torch.from_numpy(X).permute(0, 3, 1, 2)
        passes = passes_of(detector, images)
        seconds = {"bare": [], "map": []}
        for _ in range(options.repetitions):
            started = time.perf_counter()
            with torch.inference_mode():
                for function, arguments in passes:
                    function(*arguments)
            seconds["bare"].append(time.perf_counter() - started)
            started = time.perf_counter()
            detector.localize(X)
            seconds["map"].append(time.perf_counter() - started)
        bare, full = (np.median(values) / len(X) for values in seconds.values())
        print(f"| {name} | {bare:.4f} | {full:.4f} | {full / bare:.2f} |", flush=True)


if __name__ == "__main__":
    main()
