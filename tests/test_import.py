"""What ``import skanomaly`` costs and what it leaves alone."""

import subprocess
import sys

IMPORT = """
import pickle
import random
import sys

import numpy as np
import torch

def states():
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
    return pickle.dumps(generators)

before = states()
import skanomaly

late = {"matplotlib", "pynndescent", "skimage", "torchvision"}
assert not late & set(sys.modules), late & set(sys.modules)
assert states() == before, "a random generator moved"
"""


def test_import_is_light_and_draws_nothing():
    child = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
