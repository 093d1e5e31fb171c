"""Tests of what the benchmarks compare with."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from skanomaly._tensors import losses

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def speed():
    return loaded("speed")


@pytest.fixture(scope="module")
def duel():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield loaded("duel")


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options():
    return argparse.Namespace(threads=None, device="cpu", seconds=0, paper=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replay_makes_the_calls_of_a_step(speed, precision):
    detector = speed.skanomaly.Autoencoder(
        width=4, code_size=4, max_epochs=1, precision=precision, random_state=0
    )
    training = speed.Training(detector, speed.smooth_images(4, 16), None)
    training.record()
    [(part, recorded)] = training.recorded
    assert part is training.network
    # the network once, then four moments
    network_call, *filter_calls = recorded
    assert network_call[0] is training.network
    assert len(filter_calls) == 4
    assert all(speed.is_filter(call[0]) for call in filter_calls)

    called = []

    def counting(call):
        def counted(*arguments):
            called.append(call[0](*arguments).dtype)
            return call[0](*arguments)

        return counted, *call[1:]

    training.recorded = [(part, [network_call, *map(counting, filter_calls)])]
    training.bare(filters=False)
    assert called == []
    training.bare()
    assert called == 4 * [torch.float32]


def test_a_replay_keeps_frozen_networks_in_evaluation_mode(speed):
    detector = speed.skanomaly.PNet(
        width=2, critic_width=2, structure_epochs=1, max_epochs=1
    )
    training = speed.Training(detector, speed.smooth_images(4, 32), None)
    training.record()
    training.bare()
    assert not training.network["extractor"].training
    assert training.network["reconstructor"].training


def test_restored_weights_are_those_of_the_fit(speed):
    detector = speed.skanomaly.Autoencoder(width=4, code_size=4, max_epochs=1)
    training = speed.Training(detector, speed.smooth_images(4, 16), None)
    before = {name: t.clone() for name, t in detector.network_.state_dict().items()}
    training.full()
    assert not all(map(torch.equal, before.values(), detector.network_.parameters()))
    training.restore()
    after = detector.network_.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "method",
    ["SPADE", "PatchDetector", "PatchCore", "PaDiM", "PatchSVDD", "DeScarGAN"],
)
def test_a_row_holds_ratios_to_the_floor_and_to_the_networks(speed, options, method):
    size = 64 if method == "PatchSVDD" else 32
    [row] = speed.measure_methods((method, size, "float32"), options)
    for n in (1, 32):
        is_same = row[f"score {n} / networks"] == row[f"score {n} / floor"]
        # products of a search or a projection are no network's
        assert is_same == (method == "DeScarGAN")
    if method in speed.UNTRAINED:
        assert row["step / floor"] == ""
    else:
        assert row["step / networks"] == row["step / floor"] > 0


def test_searches_with_and_without_a_memory(speed, options):
    rows = speed.measure_grid((5, 32), options)
    assert [row["memory"] for row in rows] == ["none", "empty", "filled"]
    for row in rows:
        assert row["none / this"] == rows[0]["search s"] / row["search s"]


@pytest.mark.parametrize(("seconds", "n_frames"), [(0, 1), (60, 1000)])
def test_frames_until_the_time_is_up(speed, options, seconds, n_frames):
    options.seconds = seconds
    [row] = speed.measure_frames("Autoencoder", options)
    assert row["frames"] == n_frames
    times = list(row.values())[2:]
    assert 0 < times[0] <= times[-1] and times == sorted(times)


def test_the_plain_losses_of_the_duel_are_ours(duel):
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32)
    torch.testing.assert_close(duel.plain_ssim(x, y), losses.ssim_map(x, y).mean())
    levels = [1 - level.mean() for level in duel.plain_similarities(x, y)]
    torch.testing.assert_close(sum(levels) / 4, losses.msgms_loss(x, y))
    logits, targets = torch.randn(2, 2, 8, 8), torch.randint(2, (2, 8, 8))
    found = duel.plain_focal(logits, targets)
    # the code adds 1e-5 to the probabilities
    expected = losses.focal_loss(logits, targets).item()
    assert found.item() == pytest.approx(expected, rel=1e-3)
