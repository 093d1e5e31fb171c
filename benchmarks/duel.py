"""Compare training steps, scores, metrics and memory with other people's way.

The other side is what a paper's loop does, written anew and plainly: the same network
with contiguous weights, losses by convolutions, torch's default Adam, tensors that are
ready. Where anomalib is installed, it takes turns, too. All versions run in one
process; the figures are medians over rounds of their time divided by ours, so that
more than 1 means that ours is faster, with quartiles::

    python benchmarks/duel.py --threads 1

``latency`` compares ``predict`` for one image with its bare network, and ``call`` is
what a prediction costs beside the judgement of a tiny image.
"""

import argparse
import copy
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label
from speed import (
    BRIEF,
    METHODS,
    UNTRAINED,
    Scoring,
    Training,
    fitted,
    peak_mib,
    prepare,
    print_header,
    print_row,
    smooth_images,
    times_in_turn,
)

import skanomaly
from skanomaly._fitting.batches import ImageBatches
from skanomaly.metrics import pro_auc_score

HAS_ANOMALIB = importlib.util.find_spec("anomalib") is not None
TABLES = "steps", "scores", "metrics", "memory", "latency", "call"
# method: size, images a batch, parameters
DUELS = {
    "DRAEM": (128, 2, {"reconstructive_width": 32, "discriminative_width": 32}),
    "RIAD": (64, 4, {"width": 16}),
    "MNAD": (128, 4, {"width": 32}),
    "MemAE": (64, 10, {"channels": (64, 128, 128, 256)}),
    "DifferNet": (64, 24, METHODS["DifferNet"]),
    "PatchCore": (128, 32, METHODS["PatchCore"]),
}


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, help="pixels, instead of each method's own")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--seconds", type=float, default=10, help="for the repetitions of one figure"
    )
    options = parser.parse_args()
    if not HAS_ANOMALIB:
        print("anomalib is not installed: its rows are left out\n")
    for table in options.table:
        measure = globals()[f"measure_{table}"]
        names = METHODS if table in ("latency", "call") else DUELS
        tasks = [name for name in options.methods if name in names]
        rows = []
        for task in [None] if table == "metrics" else tasks:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, task, options).result()
            for row in found:
                if not rows:
                    print_header(row)
                print_row(row)
                rows.append(row)
        print()


def ratios(work, versions, options):
    """Yield a row for each other version, by how much ours is faster."""
    ours, *others = times_in_turn(versions.values(), options.seconds)
    for name, own in zip(list(versions)[1:], others, strict=True):
        low, middle, high = np.quantile(np.divide(own, ours), (0.25, 0.5, 0.75))
        yield {
            "work": work,
            "ours, s": float(np.median(ours)),
            "other": name,
            "theirs / ours": float(middle),
            "quartiles": f"{low:.2f}-{high:.2f}",
        }


# what the papers' loops do


def window(channels):
    """Return the Gaussian kernels (c, 1, 11, 11) of a structural similarity."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    return (line[:, None] * line).expand(channels, 1, 11, 11).contiguous()


def plain_ssim(x, y):
    """Return the mean structural similarity, by convolutions of five moments."""
    kernels = window(x.shape[1])

    def blur(images):
        return F.conv2d(images, kernels, padding=5, groups=images.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (var_x + var_y + 9e-4)).mean()


def plain_slopes(images):
    """Return the magnitudes of Prewitt gradients, by convolutions."""
    channels = images.shape[1]
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3).expand(channels, 1, 3, 3) / 3
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = F.conv2d(padded, kernel, groups=channels)
    dy = F.conv2d(padded, kernel.mT, groups=channels)
    return (dx**2 + dy**2 + 1e-12).sqrt()


def plain_similarities(x, y):
    """Yield the similarity of gradients at four scales."""
    for scale in range(4):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        of_x, of_y = plain_slopes(x), plain_slopes(y)
        yield (2 * of_x * of_y + 0.0026) / (of_x**2 + of_y**2 + 0.0026)


def plain_focal(logits, targets):
    """Return the focal loss of all pixels, by one-hot targets."""
    p = logits.softmax(dim=1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    hot = torch.zeros_like(p).scatter_(1, targets.reshape(-1, 1), 1)
    right = (hot.clamp(1e-5, 1.0) * p).sum(dim=1) + 1e-5
    return -((1 - right) ** 2 * right.log()).mean()


def plain_items(memory, queries):
    """Return MNAD's memory after an update, item by item."""
    weights = (queries @ memory.T).softmax(dim=0)
    nearest = weights.argmax(dim=1)
    moved = torch.zeros_like(memory)
    for number in range(len(memory)):
        rows = (nearest == number).nonzero()[:, 0]
        if len(rows):
            own = weights[rows, number] / weights[:, number].max()
            moved[number] = (own[:, None] * queries[rows]).sum(dim=0)
    return F.normalize(memory + moved, dim=1)


def contiguous(network):
    """Return a copy of a network with the default layout."""
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


def stepper(network, loss, **settings):
    """Return a function that takes a step as most code does."""
    network = network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, **settings)

    def step():
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()

    return step


def steps_of_DRAEM(training, detector, images):
    """Return our step and others on the same corrupted images."""
    masks = (torch.rand(len(images), 1, *images.shape[2:]) > 0.8).float()
    corrupted = images * (1 - masks) + 0.3 * masks
    last = {"memory_format": torch.channels_last}
    ready = images.contiguous(**last), corrupted.contiguous(**last), masks
    detector._synthesize = lambda *arguments: ready

    def plain(network):
        repaired = network.reconstructive(corrupted)
        logits = network.discriminative(torch.cat([repaired, corrupted], dim=1))
        return (
            F.mse_loss(repaired, images)
            + (1 - plain_ssim(repaired, images))
            + plain_focal(logits, masks.long())
        )

    versions = {"plain": stepper(contiguous(detector.network_), plain)}
    if HAS_ANOMALIB:
        from anomalib.models.image.draem import torch_model
        from anomalib.models.image.draem.loss import DraemLoss

        model = torch_model.DraemModel()
        width = detector.reconstructive_width
        model.reconstructive_subnetwork = torch_model.ReconstructiveSubNetwork(
            base_width=width
        )
        model.discriminative_subnetwork = torch_model.DiscriminativeSubNetwork(
            in_channels=6, out_channels=2, base_width=detector.discriminative_width
        )
        criterion = DraemLoss()

        def loss(network):
            repaired, logits = network(corrupted)
            return criterion(images, repaired, masks, logits)

        versions["anomalib"] = stepper(model, loss)
    return {"ours": training.full, **versions}


def steps_of_RIAD(training, detector, images):
    """Return our step and the plain one, which paints a mask at a time."""
    masks = detector._masks(images, 8, torch.Generator().manual_seed(0))

    def plain(network):
        scaled = 2 * images - 1
        parts = [network.unet(scaled * (1 - mask)).tanh() * mask for mask in masks]
        painted = (sum(parts) + 1) / 2
        levels = [1 - level.mean() for level in plain_similarities(painted, images)]
        return (
            F.mse_loss(2 * painted, 2 * images)
            + sum(levels) / len(levels)
            + (1 - plain_ssim(painted, images))
        )

    network = contiguous(detector.network_)
    return {"ours": training.full, "plain": stepper(network, plain)}


def steps_of_MNAD(training, detector, images):
    """Return our step and the plain one."""

    def plain(network):
        scaled, memory = 2 * images - 1, network.memory
        result, queries = network(scaled, memory)
        flat = queries.permute(0, 2, 3, 1).reshape(-1, memory.shape[1])
        first, second = (flat @ memory.T).softmax(dim=1).topk(2).indices.T
        triplet = F.triplet_margin_loss(flat, memory[first], memory[second])
        network.memory = plain_items(memory, flat.detach())
        compactness = F.mse_loss(flat, memory[first])
        return F.mse_loss(result, scaled) + 0.01 * compactness + 0.01 * triplet

    network = contiguous(detector.network_)
    return {"ours": training.full, "plain": stepper(network, plain)}


def steps_of_MemAE(training, detector, images):
    """Return our step and the plain one."""

    def plain(network):
        scaled = 2 * images - 1
        codes = network.encoder(scaled)
        queries = codes.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
        memory = network.memory
        weights = (queries @ memory.items.T).softmax(dim=1)
        excess = weights - memory.shrink
        weights = F.normalize(
            F.relu(excess) * weights / (excess.abs() + 1e-12), p=1, dim=1
        )
        shape = len(codes), *codes.shape[2:], codes.shape[1]
        read = (weights @ memory.items).view(shape).permute(0, 3, 1, 2)
        entropy = -(weights * (weights + 1e-12).log()).sum(dim=1).mean()
        return F.mse_loss(network.decoder(read), scaled) + 2e-4 * entropy

    network = contiguous(detector.network_)
    return {"ours": training.full, "plain": stepper(network, plain)}


def steps_of_DifferNet(training, detector, images):
    """Return our step and the plain one, both on features that are ready."""
    network = contiguous(detector.network_)
    ready = training.samples.images[: len(images)].flatten(0, 1)
    ready = ready[: len(images) * detector.n_transforms]

    def loss(flow, described):
        latent, log_determinants = flow(described)
        return (
            0.5 * latent.square().sum(dim=1) - log_determinants
        ).mean() / latent.shape[1]

    settings = {"betas": (0.8, 0.8), "eps": 1e-4, "weight_decay": 1e-5}
    return {
        "ours": training.full,
        "plain": stepper(network.flow, lambda flow: loss(flow, ready), **settings),
    }


def fits_of_PatchCore(detector, X, images):
    """Return our fit and others; anomalib's builds no network and scores nothing."""
    from torchvision.models import resnet18

    def plain():
        network = resnet18(weights=None).eval()
        found = plain_patches(network, images).flatten(0, 2)
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(found.shape[1], 128, generator=generator)
        rows = found @ projection / 128**0.5
        nearest, chosen = torch.full((len(rows),), torch.inf), [0]
        for _ in range(round(0.1 * len(rows))):
            distances = (rows - rows[chosen[-1]]).norm(dim=1)
            nearest = torch.minimum(nearest, distances)
            chosen.append(int(nearest.argmax()))
        bank = found[chosen]
        return bank, torch.cdist(found, bank).topk(2, largest=False)

    versions = {"ours": lambda: detector.fit(X), "plain": plain}
    if HAS_ANOMALIB:
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        model = PatchcoreModel(("layer2", "layer3"), "resnet18", pre_trained=False)

        def theirs():
            model.train()
            model(images)
            model.subsample_embedding(0.1)

        versions["anomalib"] = theirs
    return versions


@torch.no_grad()
def plain_patches(network, images):
    """Return patches (b, rows, columns, d) of two stages, averaged over 3 x 3."""
    found = images
    for name, layer in network.named_children():
        found = layer(found)
        if name == "layer2":
            fine = F.avg_pool2d(found, 3, 1, 1)
        if name == "layer3":
            break
    coarse = F.interpolate(
        F.avg_pool2d(found, 3, 1, 1), fine.shape[2:], mode="bilinear"
    )
    return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)


def measure_steps(name, options):
    """Measure a training step, or a whole fit where there are no steps."""
    prepare(options)
    side, n_images, settings = DUELS[name]
    side = options.size or side
    detector, X, images = fresh(name, side, n_images, settings)
    work = f"{name}, {side} px, {n_images} images"
    if name in UNTRAINED:
        return list(
            ratios(f"fit of {work}", fits_of_PatchCore(detector, X, images), options)
        )
    training = Training(detector, X, None)
    versions = globals()[f"steps_of_{name}"](training, detector, images)
    return list(ratios(f"step of {work}", versions, options))


def fresh(name, side, n_images, settings):
    """Return a detector that is not fitted, images, and the same as a tensor."""
    settings = dict(settings) if name in UNTRAINED else {**settings, **BRIEF}
    settings["batch_size"] = n_images
    detector = getattr(skanomaly, name)(device="cpu", random_state=0, **settings)
    X = smooth_images(n_images, side)
    images = (torch.from_numpy(X).permute(0, 3, 1, 2) / 255).contiguous()
    return detector, X, images


def plain_maps_of(name, detector):
    """Return a function that maps images as most code does, or None."""
    network = contiguous(detector.network_).eval()
    if name == "DRAEM":
        return lambda images: network(images)[1].softmax(dim=1)[:, 1]
    if name == "RIAD":

        def paint(images):
            maps = []
            for size in detector.cell_sizes:
                masks = detector._masks(images, size, torch.Generator().manual_seed(0))
                scaled = 2 * images - 1
                parts = [network.unet(scaled * (1 - m)).tanh() * m for m in masks]
                levels = plain_similarities((sum(parts) + 1) / 2, images)
                maps += [
                    F.interpolate(level, images.shape[2:]).mean(dim=1)
                    for level in levels
                ]
            return F.avg_pool2d(1 - torch.stack(maps).mean(dim=0), 5, 1, 2)

        return paint
    if name == "MNAD":
        return lambda images: (
            (network(2 * images - 1, network.memory)[0] - (2 * images - 1)) ** 2
        ).mean(dim=1)
    if name == "MemAE":
        return lambda images: (
            (network(2 * images - 1)[0] - (2 * images - 1)) ** 2
        ).sum(dim=1)
    if name == "PatchCore":
        from torchvision.models import resnet18

        backbone, bank = resnet18(weights=None).eval(), torch.from_numpy(detector.bank_)

        def search(images):
            patches = plain_patches(backbone, images)
            nearest = torch.cdist(patches.flatten(0, 2), bank).amin(dim=1)
            maps = nearest.view(len(images), 1, *patches.shape[1:3])
            maps = F.interpolate(maps, images.shape[2:], mode="bilinear")
            line = window(1)[0, 0].sum(dim=0)
            maps = F.conv2d(maps, line.view(1, 1, 1, -1), padding=(0, 5))
            return F.conv2d(maps, line.view(1, 1, -1, 1), padding=(5, 0))[:, 0]

        return search
    return None


def measure_scores(name, options):
    """Measure maps of one image and of 32."""
    prepare(options)
    side, n_images, settings = DUELS[name]
    detector, X, _ = fresh(name, options.size or side, n_images, settings)
    maps_of = plain_maps_of(name, detector.fit(X))
    if maps_of is None:
        return []
    X = smooth_images(32, options.size or side)
    rows = []
    for n in (1, 32):
        own = X[:n]
        images = (torch.from_numpy(own).permute(0, 3, 1, 2) / 255).contiguous()

        def plain(images=images):
            with torch.inference_mode():
                maps = torch.cat([maps_of(part) for part in images.split(n_images)])
                return maps.amax(dim=(1, 2)), maps

        versions = {"ours": lambda own=own: detector.localize(own), "plain": plain}
        rows += ratios(f"maps of {n} by {name}", versions, options)
    return rows


def measure_metrics(task, options):
    """Measure the per-region overlap of 50 maps."""
    maps = np.random.default_rng(0).random((50, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[::2, 40:90, 100:160] = masks[::4, 200:220, 20:60] = True

    def plain():
        regions = [
            maps[i][labels == number]
            for i, labels in enumerate(map(label, masks))
            for number in range(1, labels.max() + 1)
        ]
        normal, curve = maps[~masks], []
        for threshold in np.linspace(1, 0, 200):
            rate = (normal > threshold).mean()
            if rate > 0.3:
                break
            overlaps = [(region > threshold).mean() for region in regions]
            curve.append((rate, np.mean(overlaps)))
        return np.trapezoid(*np.transpose(curve)[::-1]) / 0.3

    versions = {"ours": lambda: pro_auc_score(masks, maps), "plain": plain}
    if HAS_ANOMALIB:
        from anomalib.metrics.aupro import _AUPRO

        def theirs():
            metric = _AUPRO()
            metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
            return metric.compute()

        versions["anomalib"] = theirs
    return list(ratios("AU-PRO of 50 maps of 256 px", versions, options))


def measure_memory(name, options):
    """Measure the largest memory of five steps, or a fit, a process for each side."""
    if name == "DifferNet":  # its steps begin with features, and take next to nothing
        return []
    found = {}
    for side in ("ours", "plain"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[side] = pool.submit(memory_of, name, side, options).result()
    return [
        {
            "work": f"memory of {name}",
            **{f"{side}, MiB": round(mib) for side, mib in found.items()},
            "theirs / ours": found["plain"] / found["ours"],
        }
    ]


def memory_of(name, side, options):
    """Return by how many MiB a version's steps raise the memory."""
    global HAS_ANOMALIB
    HAS_ANOMALIB = False  # its import alone takes more
    prepare(options)
    size, n_images, settings = DUELS[name]
    detector, X, images = fresh(name, options.size or size, n_images, settings)
    if name in UNTRAINED:
        function = fits_of_PatchCore(detector, X, images)[side]
        before = peak_mib()
        function()
        return peak_mib() - before
    # a fit to tiny images makes the network; its own memory is small
    tiny = Training(detector, smooth_images(n_images, 32), None)
    tiny.samples.images = ImageBatches(X, images.device)
    function = globals()[f"steps_of_{name}"](tiny, detector, images)[side]
    before = peak_mib()
    for _ in range(5):
        function()
    return peak_mib() - before


def measure_latency(name, options):
    """Measure `predict` for one image of 224 pixels against the bare networks.

    And against the networks with the products of filters and searches. SPADE predicts
    by its default score, which searches among images.
    """
    prepare(options)
    by_default = {"image_score": "knn"} if name == "SPADE" else {}
    detector, X = fitted(name, options.size or 224, **by_default)
    scoring = Scoring(detector, X[:1])
    versions = {
        "ours": lambda: detector.predict(X[:1]),
        "networks alone": lambda: scoring.bare(filters=False),
    }
    if scoring.has_filters and name != "SPADE":
        versions["networks and products"] = scoring.bare
    return list(ratios(f"predict one image by {name}", versions, options))


def measure_call(name, options):
    """Measure what a prediction costs beside the judgement, for an image of 64 px."""
    prepare(options)
    detector, X = fitted(name, 64)
    X = X[:1]
    _, images = detector._prepare(X)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        judgement = detector._judge(images[:], maps_wanted=False, generator=generator)
    detector._judge = lambda *arguments, **named: judgement
    [times] = times_in_turn([lambda: detector.predict(X)], options.seconds)
    low, middle, high = 1000 * np.quantile(times, (0.25, 0.5, 0.75))
    return [
        {
            "call of": name,
            "fixed, ms": float(middle),
            "quartiles": f"{low:.2f}-{high:.2f}",
        }
    ]


if __name__ == "__main__":
    main()
