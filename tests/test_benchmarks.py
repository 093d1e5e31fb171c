"""Tests of what benchmarks/speed.py calls the floor."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options():
    return argparse.Namespace(threads=None, device="cpu", seconds=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replay_makes_the_calls_of_a_step(speed, precision):
    detector = speed.skanomaly.Autoencoder(
        width=4, code_size=4, max_epochs=1, precision=precision, random_state=0
    )
    training = speed.Training(detector, speed.smooth_images(4, 16), None)
    recorder = speed.Recorder(training.network)
    with recorder.recording() as expected:
        training.full()
    training.record()
    training.restore()
    replayed = speed.Recorder(training.network)
    with replayed.recording() as calls:
        training.bare(filters=False)

    # the network once, then four moments
    filters = [call for call in expected if speed.is_filter(call[0])]
    assert len(expected) == 5 and len(filters) == 4
    assert [call[0] for call in calls] == [training.network]
    assert torch.equal(calls[0][1][0], expected[0][1][0])
    assert {call[0](*call[1]).dtype for call in filters} == {torch.float32}


def test_restored_weights_are_those_of_the_fit(speed):
    detector = speed.skanomaly.Autoencoder(width=4, code_size=4, max_epochs=1)
    training = speed.Training(detector, speed.smooth_images(4, 16), None)
    before = {name: t.clone() for name, t in detector.network_.state_dict().items()}
    training.full()
    assert not all(map(torch.equal, before.values(), detector.network_.parameters()))
    training.restore()
    after = detector.network_.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["SPADE", "DeScarGAN"])
def test_a_row_holds_ratios_to_the_floor_and_to_the_networks(speed, options, method):
    [row] = speed.measure_methods((method, 32, "float32"), options)
    for n in (1, 32):
        is_same = row[f"score {n} / networks"] == row[f"score {n} / floor"]
        assert is_same == (method != "SPADE")  # of which the search is no network's
    if method == "SPADE":
        assert row["step / floor"] == ""
    else:
        assert row["step / networks"] == row["step / floor"] > 0
