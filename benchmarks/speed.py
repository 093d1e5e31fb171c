"""Compare what training steps and scores cost with what they cannot avoid.

For each method, the calls of its networks during one training step and during the
scoring of a batch are recorded, and then replayed alone, on tensors that are ready:
forward passes for the scores; forward and backward passes and optimiser steps for the
training. That is the time of the *networks*. The *floor* also has the matrix products
that the method cannot do without: the filters of a structural similarity, and SPADE's
search. All versions take turns in one process, and the ratios of their medians are the
figures::

    python benchmarks/speed.py --sizes 64 128 256 --threads 1

Every method and size has a process of its own, whose largest memory above that of the
imports is reported. Further tables compare metrics with one sort, LoadImages with bare
decoding and the import with those of torch and scikit-learn. Four are not among the
default ones: ``--table scaling`` shows how time and memory grow with the number and the
size of images, ``grid`` what a grid search takes with and without a memory of features,
``load`` the time from a file to the first prediction, and ``frames`` how long
predictions of one image after the other take, and the slowest of them.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from joblib import dump, load
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skanomaly
from skanomaly._fitting import loop
from skanomaly._fitting.batches import resolve_device
from skanomaly._fitting.loop import _descend, _in_precision, autocast, seeded_generator
from skanomaly._patches import PatchwiseDetector
from skanomaly._tensors import losses
from skanomaly._tensors.neighbors import QUERY_CHUNK, TILE, on_device
from skanomaly.datasets import plant_defects
from skanomaly.methods import descargan
from skanomaly.metrics import anomaly_roc_auc, localization_scores
from skanomaly.model_selection import OneClassKFold

BRIEF = {"max_epochs": 1, "n_iter_no_change": None}
METHODS = {
    "SPADE": {"backbone": "resnet18", "weights": None, "image_score": "max"},
    "PatchDetector": {"weights": None},
    "PatchCore": {"backbone": "resnet18", "weights": None},
    "PaDiM": {"weights": None},
    "DifferNet": {
        "backbone": "resnet18",
        "layer": "layer3",
        "weights": None,
        "n_scales": 2,
        "n_blocks": 4,
        "hidden_features": 256,
        "n_transforms_test": 8,
        **BRIEF,
    },
    "Autoencoder": BRIEF,
    "VariationalAutoencoder": BRIEF,
    "MemAE": BRIEF,
    "MNAD": {"width": 16, **BRIEF},
    "PNet": {"width": 12, "critic_width": 16, "structure_epochs": 1, **BRIEF},
    "DRAEM": {"reconstructive_width": 16, "discriminative_width": 16, **BRIEF},
    "InTra": {
        "patch_size": 8,
        "window_size": 5,
        "width": 128,
        "n_heads": 4,
        "n_blocks": 5,
        "windows_per_image": 4,
        **BRIEF,
    },
    "RIAD": {"width": 16, **BRIEF},
    "SCADN": {"width": 16, "n_blocks": 4, "critic_width": 16, **BRIEF},
    "SMAI": {"width": 16, "n_segments": 20, **BRIEF},
    "PatchSVDD": {"patch_size": 16, "strides": (4, 8), "n_repeats": 1, **BRIEF},
    "FCDD": {
        "architecture": "cnn32",
        "width": 32,
        "weights": None,
        "optimizer": "adam",
        "batch_size": 16,
        "loss": "pixel",
        **BRIEF,
    },
    "PuzzleAE": {
        "width": 16,
        "critic_width": 16,
        "permutations": "transpositions",
        "batch_size": 4,
        **BRIEF,
    },
    "DeScarGAN": {"width": 12, "critic_width": 12, "image_score": "mean", **BRIEF},
}
# what says nothing of the size of a network
AS_GIVEN = {*BRIEF, "structure_epochs", "weights"}
UNTRAINED = "SPADE", "PatchDetector", "PatchCore", "PaDiM"
GROWING = {
    "SPADE": {**METHODS["SPADE"], "gallery_size": 10},
    "DifferNet": {**METHODS["DifferNet"], "n_transforms_test": 2, "n_transforms": 1},
    "PatchDetector": METHODS["PatchDetector"],
    "Autoencoder": {"code_size": 16, "width": 8, **BRIEF},
    "MNAD": {"width": 4, **BRIEF},
    "PNet": {"width": 4, "critic_width": 4, "structure_epochs": 1, **BRIEF},
    "DRAEM": {"reconstructive_width": 4, "discriminative_width": 4, **BRIEF},
    "SCADN": {"width": 4, "n_blocks": 1, "critic_width": 4, **BRIEF},
    "DeScarGAN": {"width": 4, "critic_width": 4, **BRIEF},
}
CPU = torch.device("cpu")
TABLES = "methods", "metrics", "files", "import"
FURTHER_TABLES = "scaling", "grid", "load", "frames"


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", nargs="+", choices=TABLES + FURTHER_TABLES, default=TABLES
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[128])
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "tf32", "bfloat16"),
        default=["float32"],
        help="tf32 is float32 with TensorFloat32 allowed on a GPU",
    )
    parser.add_argument(
        "--paper", action="store_true", help="networks of the default, the papers' size"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--seconds", type=float, default=6, help="for the repetitions of one figure"
    )
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    options = parser.parse_args()

    tables = {}
    for table in options.table:
        rows = []
        for task in tasks(table, options):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measure = globals()[f"measure_{table}"]
                found = pool.submit(measure, task, options).result()
            for row in found:
                if not rows:
                    print_header(row)
                print_row(row)
                rows.append(row)
        print()
        tables[table] = rows
    device = resolve_device(options.device)
    facts = {
        "torch": torch.__version__,
        "threads": options.threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else device.type,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if options.output:
        options.output.write_text(json.dumps({**facts, "tables": tables}, indent=1))


def tasks(table, options):
    """Return what the processes of a table do, one after the other."""
    if table == "methods":
        return list(
            itertools.product(options.methods, options.sizes, options.precisions)
        )
    if table == "scaling":
        numbers = [(n, 32) for n in (100, 1000, 5000, 20_000)]
        sizes = [(16, side) for side in (32, 64, 128, 256)]
        return [
            (name, axis, points)
            for name in GROWING
            if name in options.methods
            for axis, points in (("number", numbers), ("side", sizes))
        ]
    if table == "grid":
        return [(40, 128)]
    return options.methods if table in ("load", "frames") else [None]


def print_header(row):
    """Print the head of a Markdown table."""
    print(f"| {' | '.join(row)} |\n| {' | '.join('---' for _ in row)} |")


def print_row(row):
    """Print a row of a Markdown table."""
    cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
    print(f"| {' | '.join(cells)} |", flush=True)


def smooth_images(n, size):
    """Return random images that fall into superpixels, as plain noise does not."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * images).byte().permute(0, 2, 3, 1).contiguous().numpy()


def seconds_of(function, device):
    """Time one call, on a CUDA device by events in its queue."""
    if device.type != "cuda":
        before = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - before
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def in_turn(functions, seconds, device=CPU, prepare=lambda: None):
    """Time functions, interleaved; return the quartiles of each."""
    times = times_in_turn(functions, seconds, device, prepare)
    return [np.quantile(own, (0.25, 0.5, 0.75)) for own in times]


def times_in_turn(functions, seconds, device=CPU, prepare=lambda: None):
    """Time functions, interleaved; return the seconds of each, round by round."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    started = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - started < seconds:
        for function, own in zip(functions, times, strict=True):
            prepare()
            own.append(seconds_of(function, device))
    return times


def peak_mib():
    """Return the largest memory that the process has had."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return memory / 1024**2 if sys.platform == "darwin" else memory / 1024


class Recorder:
    """Notes the outermost calls of the modules inside a network."""

    def __init__(self, network):
        self.network = network
        self.calls = []
        self.depth = 0

    @contextlib.contextmanager
    def recording(self):
        """Record the calls within a ``with`` block."""
        handles = []
        for module in self.network.modules():
            handles.append(
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
            )
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        # of a gradient penalty the backward pass is part of the forward pass
        penalty = descargan.gradient_penalty
        make_filter = losses.make_gaussian_filter
        descargan.gradient_penalty = self._recorded(penalty)
        losses.make_gaussian_filter = lambda *arguments: self._recorded(
            make_filter(*arguments)
        )
        try:
            yield self.calls
        finally:
            descargan.gradient_penalty = penalty
            losses.make_gaussian_filter = make_filter
            for handle in handles:
                handle.remove()

    def _enter(self, module, arguments, named):
        if self.depth == 0:
            self.calls.append((module, *map(keep, (arguments, named)), trains(module)))
        self.depth += 1

    def _leave(self, module, arguments, output):
        self.depth -= 1

    def _recorded(self, function):
        def recorded(*arguments, **named):
            self._enter(function, arguments, named)
            try:
                return function(*arguments, **named)
            finally:
                self.depth -= 1

        return recorded


def trains(module):
    """Return whether a module is in training mode; None for a function."""
    return getattr(module, "training", None)


def is_filter(function):
    """Return whether a recorded call is neither a network's nor has one in it."""
    is_network = isinstance(function, torch.nn.Module)
    return not is_network and function is not descargan.gradient_penalty


def keep(value):
    """Return a copy of a call's arguments, detached from what came before."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(keep(item) for item in value)
    if isinstance(value, dict):
        return {name: keep(item) for name, item in value.items()}
    return value


def tensors_in(value):
    """Return the tensors in a nested result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if hasattr(value, "__iter__") and not isinstance(value, str):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class Training:
    """One training step of a fitted detector, and the bare passes in it."""

    def __init__(self, detector, X, y):
        captured = {}
        train = loop.train

        def capture(network, samples, **settings):
            captured.update(settings, samples=samples)
            return train(network, samples, **settings)

        loop.train = capture
        try:
            detector.fit(X, y)
        finally:
            loop.train = train
        self.network = detector.network_
        self.samples = captured["samples"]
        self.losses, self.precision = captured["losses"], captured["precision"]
        self.optimizers = captured["optimizers"]
        self.generator = seeded_generator(0)
        self.rows = np.arange(min(detector.batch_size, len(self.samples)))
        self.weights = copy.deepcopy(self.network.state_dict())
        # by the optimiser's part, the calls that its loss was computed from
        self.recorded = []
        self.gradients = {}

    def restore(self):
        """Undo what the steps did to the weights."""
        self.network.load_state_dict(self.weights)

    def full(self, recorder=None):
        """Take a step as the training loop does."""
        self.network.train()
        batch = self.samples.batch(self.rows, 0, self.generator)
        for part, loss in _in_precision(
            self.losses(self.network, batch), batch, self.precision
        ):
            if recorder is not None:
                self.recorded.append((part, list(recorder.calls)))
                recorder.calls.clear()
            _descend(loss, self.optimizers[part])

    def record(self):
        """Record the bare passes of a step."""
        recorder = Recorder(self.network)
        with recorder.recording():
            self.full(recorder)

    @property
    def has_filters(self):
        """Whether a step has filters beside its networks."""
        return any(is_filter(call[0]) for _, calls in self.recorded for call in calls)

    def bare(self, *, filters=True):
        """Replay the passes of a step and take its optimisers' steps."""
        self.network.train()
        waiting = []
        for part, calls in self.recorded:
            optimizer = self.optimizers[part]
            own = {p for group in optimizer.param_groups for p in group["params"]}
            optimizer.zero_grad(set_to_none=True)
            for module, arguments, named, is_training in calls:
                if is_filter(module) and not filters:
                    continue
                if trains(module) != is_training:
                    module.train(is_training)
                with autocast(next(iter(own)).device, self.precision):
                    outputs = module(*arguments, **named)
                outputs = [t for t in tensors_in(outputs) if t.requires_grad]
                inputs = [t for t in tensors_in(arguments) if t.requires_grad]
                if outputs:
                    waiting.append((module, outputs, inputs))
            # a generator's pass may come before the critic's step, its way back after
            still_waiting = []
            for module, outputs, inputs in waiting:
                if isinstance(module, torch.nn.Module):
                    reached = module.parameters()
                else:
                    reached = () if inputs else own
                wanted = [p for p in reached if p in own] + inputs
                if wanted:
                    gradients = map(self.gradient, outputs)
                    torch.autograd.backward(outputs, list(gradients), inputs=wanted)
                else:
                    still_waiting.append((module, outputs, inputs))
            waiting = still_waiting
            optimizer.step()

    def gradient(self, output):
        """Return a gradient that is ready.

        It is random, because a constant gradient all but vanishes in a normalisation,
        and the denormal numbers that are left of it are slow.
        """
        key = output.shape, output.stride(), output.dtype
        if key not in self.gradients:
            self.gradients[key] = torch.randn_like(output)
        return self.gradients[key]


class Scoring:
    """The scoring of a batch by a fitted detector, and the bare passes in it."""

    def __init__(self, detector, X):
        self.detector, self.X = detector.set_params(batch_size=len(X)), X
        self.device = next(detector.network_.parameters()).device
        recorder = Recorder(detector.network_)
        with recorder.recording() as calls:
            self.full()
        self.calls = list(calls)
        self.products = list(products_of(detector, len(X), self.device))

    @property
    def has_filters(self):
        """Whether the scores need matrix products beside the networks."""
        return bool(self.products) or any(is_filter(call[0]) for call in self.calls)

    def full(self):
        """Score the batch."""
        self.detector.score_samples(self.X)

    def bare(self, *, filters=True):
        """Replay the passes."""
        with (
            torch.inference_mode(),
            autocast(self.device, self.detector.precision),
        ):
            for module, arguments, named, _ in self.calls:
                if filters or not is_filter(module):
                    module(*arguments, **named)
        if not filters:
            return
        for product in self.products:
            product()


def products_of(detector, n, device):
    """Yield functions that make the products without which n images have no scores."""
    if isinstance(detector, skanomaly.SPADE):
        for gallery in detector.gallery_.values():
            positions = math.prod(gallery.shape[1:3])
            n_rows = min(detector.gallery_size, len(gallery)) * positions
            # images that have all galleries in common are searched together
            is_common = n_rows == len(gallery) * positions
            together = n * positions if is_common else positions
            yield search(n * positions, n_rows, gallery.shape[3], together, device)
    elif isinstance(detector, skanomaly.PatchSVDD):
        for gallery in detector.gallery_.values():
            n_images, *grid, channels = gallery.shape
            queries = n * math.prod(grid)
            rows = n_images * math.prod(grid)
            yield search(queries, rows, channels, queries, device)
    elif isinstance(detector, PatchwiseDetector):
        height, width, channels = detector.image_shape_
        with torch.inference_mode():
            patches = detector._patches(
                torch.rand(n, channels, height, width).to(device)
            )
        if isinstance(detector, skanomaly.PatchCore):
            n_queries = patches[..., 0].numel()
            yield search(n_queries, *detector.bank_.shape, n_queries, device)
        elif isinstance(detector, skanomaly.PatchDetector):
            left_out = torch.from_numpy(detector._left_out[1]).to(device)
            yield lambda: patches @ left_out
        else:
            whitening = torch.from_numpy(detector.whitening_).to(device)
            rows = patches.flatten(1, 2).permute(1, 2, 0)
            yield lambda: whitening.flatten(0, 1) @ rows


def search(n_queries, n_rows, channels, together, device):
    """Return a function that makes the products of a search, a tile at a time."""
    rows = torch.rand(n_rows, channels, device=device)
    queries = rows.new_ones(n_queries, channels)
    together = min(together, on_device(QUERY_CHUNK, rows))
    found = queries.new_empty(together, TILE)

    def multiply():
        for chunk, tile in itertools.product(queries.split(together), rows.split(TILE)):
            torch.mm(chunk, tile.T, out=found[: len(chunk), : len(tile)])

    return multiply


def measure_methods(task, options):
    """Measure a training step and scores of one method at one size."""
    name, size, precision = task
    prepare(options)
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    start = peak_mib()
    settings = METHODS[name]
    if options.paper:
        settings = {key: value for key, value in settings.items() if key in AS_GIVEN}
    detector = getattr(skanomaly, name)(
        precision="float32" if allowed else precision,
        device=options.device,
        random_state=0,
        **settings,
    )
    X = smooth_images(32, size)
    y = np.array([1, -1] * 16) if name == "DeScarGAN" else None
    row = {"method": name, "size": size, "precision": precision}
    device = resolve_device(options.device)
    if name in UNTRAINED:
        detector.fit(X)
        no_step = (*figures("step", [[0, 1, 0]] * 2), "step / networks")
        row |= dict.fromkeys(no_step, "")
    else:
        n_train = max(8, detector.batch_size)
        training = Training(detector, X[:n_train], None if y is None else y[:n_train])
        training.full()
    detector.set_params(batch_size=len(X)).score_samples(X)
    mib = peak_mib() - start
    gpu_mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0

    def timed(label, whole, n=1, **settings):
        functions = [whole.full, whole.bare]
        if whole.has_filters:
            functions.append(functools.partial(whole.bare, filters=False))
        full, floor, *networks = in_turn(functions, options.seconds, device, **settings)
        return figures(label, (full, floor), n) | {
            f"{label} / networks": float(full[1] / (networks or [floor])[0][1])
        }

    if name not in UNTRAINED:
        training.record()
        row |= timed("step", training, prepare=training.restore)
        training.restore()
        detector.network_.eval()
    for n in (1, len(X)):
        row |= timed(f"score {n}", Scoring(detector, X[:n]), n)
    row["MiB"] = mib
    if gpu_mib:
        row["MiB of the GPU"] = gpu_mib
    return [row]


def figures(name, quartiles, n=1):
    """Return medians, their ratio and quartiles."""
    full, floor = quartiles
    return {
        f"{name} s": float(full[1] / n),
        f"{name} quartiles": f"{full[0] / n:.3g}-{full[2] / n:.3g}",
        f"{name} floor s": float(floor[1] / n),
        f"{name} floor quartiles": f"{floor[0] / n:.3g}-{floor[2] / n:.3g}",
        f"{name} / floor": float(full[1] / floor[1]),
    }


def prepare(options):
    """Set the threads of this process."""
    if options.threads:
        torch.set_num_threads(options.threads)


def measure_metrics(task, options):
    """Measure all pixel metrics of 100 maps against one sort of their pixels."""
    rng = np.random.default_rng(0)
    maps = rng.random((100, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[::2, 40:90, 100:160] = masks[::4, 200:220, 20:60] = True
    full, floor = in_turn(
        [lambda: localization_scores(masks, maps), lambda: np.sort(maps, axis=None)],
        options.seconds,
    )
    return [
        {"what": "AUROC, AP, AU-PRO, F1-max of 100 maps of 256 x 256"}
        | figures("metrics", (full, floor))
    ]


def measure_files(task, options):
    """Measure LoadImages against bare decoding on two threads."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(200)]
        for path, pixels in zip(paths, smooth_images(200, 256), strict=True):
            Image.fromarray(pixels).save(path)

        def decode(path):
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))

        def bare():
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(decode, paths))

        loader = skanomaly.LoadImages(n_jobs=2)
        both = in_turn([lambda: loader.fit_transform(paths), bare], options.seconds)
    return [
        {"what": "LoadImages(n_jobs=2) of 200 PNG files of 256 x 256"}
        | figures("files", both)
    ]


def measure_import(task, options):
    """Measure the import against those of torch and scikit-learn."""

    def run(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    needed = "import torch, sklearn.pipeline, sklearn.model_selection, sklearn.metrics"
    both = in_turn([run("import skanomaly"), run(needed)], options.seconds)
    return [{"what": "import skanomaly"} | figures("import", both)]


def measure_scaling(task, options):
    """Measure how fit, score and memory grow, and fit exponents to the last points.

    Scored are 200 images at most, so that with the number of training images the time
    for a score grows only if it depends on that number.
    """
    name, axis, points = task
    prepare(options)
    start_mib = peak_mib()
    rows = []
    points = [points[0], *points]  # the first time warms up
    for n, side in points:
        detector = getattr(skanomaly, name)(
            device=options.device, random_state=0, **GROWING[name]
        )
        X = np.resize(smooth_images(min(n, 64), side), (n, side, side, 3))
        y = np.resize([1, -1], n) if name == "DeScarGAN" else None
        start = time.perf_counter()
        detector.fit(X, y)
        fitted = time.perf_counter()
        detector.score_samples(X[: min(n, 200)])
        rows.append(
            (
                n if axis == "number" else side,
                fitted - start,
                time.perf_counter() - fitted,
                peak_mib() - start_mib,
            )
        )
    rows = rows[1:]
    positions, fits, scores, memory = np.log(rows).T
    return [
        {
            "method": name,
            "grows with": axis,
            "from": rows[0][0],
            "to": rows[-1][0],
            "fit s": f"{rows[0][1]:.3g}-{rows[-1][1]:.3g}",
            "fit exponent": float(np.polyfit(positions[1:], fits[1:], 1)[0]),
            "score exponent": float(np.polyfit(positions[1:], scores[1:], 1)[0]),
            "MiB": f"{rows[0][3]:.0f}-{rows[-1][3]:.0f}",
            "memory exponent": float(np.polyfit(positions[1:], memory[1:], 1)[0]),
        }
    ]


def fitted(name, side, device="cpu", **changes):
    """Return a small detector that is fitted, and images."""
    settings = METHODS[name] | changes
    detector = getattr(skanomaly, name)(device=device, random_state=0, **settings)
    X = smooth_images(8, side)
    return detector.fit(X, [1, -1] * 4 if name == "DeScarGAN" else None), X


def measure_grid(task, options):
    """Measure a grid search without a memory of features, with one, and once more."""
    import torchvision

    prepare(options)
    planted = plant_defects(smooth_images(*task), random_state=0)
    detector = skanomaly.PatchDetector(backbone="precomputed")
    grid = {
        "patchdetector__patch_size": [1, 3],
        "patchdetector__image_score": ["max", "top"],
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "resnet18.pth")
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
        for kind, memory in (("none", None), ("empty", folder), ("filled", folder)):
            features = skanomaly.BackboneFeatures(
                backbone="resnet18",
                layers=("layer2", "layer3"),
                weights=weights,
                memory=memory,
                device=options.device,
            )
            search = GridSearchCV(
                make_pipeline(features, detector),
                grid,
                scoring=anomaly_roc_auc,
                cv=OneClassKFold(5),
            )
            start = time.perf_counter()
            search.fit(planted.X, planted.y, groups=planted.groups)
            seconds = time.perf_counter() - start
            rows.append({"memory": kind, "search s": seconds})
    return [
        row | {"none / this": rows[0]["search s"] / row["search s"]} for row in rows
    ]


def write_fitted(name, file, options):
    """Fit a detector, and write it."""
    prepare(options)
    dump(fitted(name, 64, options.device)[0], file)


def measure_load(name, options):
    """Measure the way from a file to predictions in a process that has just begun."""
    import torchvision  # noqa: F401  (what it takes is no part of the way)

    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "detector.joblib")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_fitted, name, file, options).result()
        mib = file.stat().st_size / 2**20
        start = time.perf_counter()
        detector = load(file)
        loaded = time.perf_counter() - start
    image = smooth_images(1, 64)
    seconds = [seconds_of(lambda: detector.predict(image), CPU) for _ in range(10)]
    return [
        {
            "method": name,
            "file MiB": mib,
            "load ms": 1000 * loaded,
            "first image ms": 1000 * seconds[0],
            "tenth ms": 1000 * seconds[-1],
        }
    ]


def measure_frames(name, options):
    """Measure up to 1,000 predictions, each of one image."""
    prepare(options)
    detector, X = fitted(name, 64, options.device)
    detector.predict(X[:1])
    ms, started = [], time.perf_counter()
    while len(ms) < 1000 and (
        not ms or time.perf_counter() - started < options.seconds
    ):
        ms.append(1000 * seconds_of(lambda: detector.predict(X[:1]), CPU))
    shares = {"median": 0.5, "95 %": 0.95, "99 %": 0.99, "largest": 1}
    return [
        {"method": name, "frames": len(ms)}
        | {f"{label}, ms": float(np.quantile(ms, q)) for label, q in shares.items()}
    ]


if __name__ == "__main__":
    main()
