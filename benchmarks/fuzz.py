"""Give the detectors what strangers may give them, and count what comes of it.

Inputs are drawn by Hypothesis from tests/input_strategies.py: arrays, tensors and other
objects as images and labels, with parameters right and wrong. Each goes to ``fit`` or
to ``predict`` of a small detector. Right is an answer of finite scores, the same as of
a plain array, or a ValueError or TypeError that names the argument. Whatever else
happens is printed in full::

    python benchmarks/fuzz.py --inputs 20000

One core takes some hundred inputs a second. The exit status is 1 if there were other
outcomes.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import hypothesis
import torch

import skanomaly
from skanomaly.base import BaseDetector

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from input_strategies import OUTCOMES, cases, fitted_on_bytes, outcome_of


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000, help="of all methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=names_of_detectors())
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    n_inputs = -(-options.inputs // len(options.methods))
    total = collections.Counter()
    for number, name in enumerate(options.methods):
        start = time.perf_counter()
        seed = 1000 * options.seed + number  # others for each method
        counts = count_outcomes(getattr(skanomaly, name), n_inputs, seed)
        seconds = time.perf_counter() - start
        print(f"{name}: {in_words(counts)}, {seconds:.0f} s", flush=True)
        total += counts
    print(f"all: {in_words(total)}")
    sys.exit(bool(total["other"]))


def names_of_detectors():
    """Return the names of all detectors."""
    classes = [getattr(skanomaly, name) for name in skanomaly.__all__]
    return [
        cls.__name__
        for cls in classes
        if isinstance(cls, type) and issubclass(cls, BaseDetector)
    ]


def count_outcomes(cls, n_inputs, seed):
    """Count the outcomes of a detector, and print each other one when it is seen."""
    fitted, counts = fitted_on_bytes(cls), collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=n_inputs,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(cls))
    def call(case):
        kind = "fit" if case.is_fit else "predict"
        outcome = outcome_of(case, cls, fitted)
        known = outcome in OUTCOMES
        counts[f"{kind} {outcome}" if known else "other"] += 1
        if not known:
            print(f"{cls.__name__}: {case}\n{outcome}\n", flush=True)

    call()
    return counts


def in_words(counts):
    """Return counts as text."""
    words = [f"{counts[kind]} {kind}" for kind in sorted(counts) if kind != "other"]
    return f"{', '.join(words)}, {counts['other']} other"


if __name__ == "__main__":
    main()
