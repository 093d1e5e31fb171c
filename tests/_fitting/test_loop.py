import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skanomaly._fitting import loop
from skanomaly._fitting.loop import Optimizers, Samples, train
from skanomaly._tensors.losses import ssim_loss


def constant_images(n):
    """Image i holds the value i, so that a batch tells which images it is of."""
    return torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 1, 2, 2) / 100


def numbers_of(batch):
    return (100 * batch.images[:, 0, 0, 0]).round().int().tolist()


class Scale(nn.Module):
    """One weight, which the loss draws towards a target."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images):
        return self.weight * images


def mean_loss(network, batch):
    yield network, (network(batch.images) - 1).square().mean()


def descent(part):
    return torch.optim.SGD(part.parameters(), lr=0.5)


def fit(
    network,
    images,
    losses,
    *,
    labels=None,
    optimizer=descent,
    scheduler=lambda optimizer: None,
    optimizers=None,
    loss_curve=None,
    **settings,
):
    """Train with plain gradient descent; return optimisers and loss curve."""
    optimizers = {} if optimizers is None else optimizers
    loss_curve = [] if loss_curve is None else loss_curve
    settings = {"validation_curve": [], "max_epochs": 1, "batch_size": 4, **settings}
    train(
        network,
        Samples(images, labels),
        losses=losses,
        optimizers=Optimizers(optimizers, optimizer, scheduler),
        loss_curve=loss_curve,
        **settings,
    )
    return optimizers, loss_curve


@pytest.mark.parametrize("n_images", [*range(1, 12), 33])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_batches_are_nearly_equal_and_never_of_one_image(n_images, batch_size):
    seen = []

    def losses(network, batch):
        seen.append(numbers_of(batch))
        yield from mean_loss(network, batch)

    torch.manual_seed(0)
    fit(Scale(), constant_images(n_images), losses, batch_size=batch_size)
    sizes = [len(numbers) for numbers in seen]
    assert sorted(itertools.chain(*seen)) == list(range(n_images))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, n_images)
    assert max(sizes) <= max(batch_size, 3)


def test_epochs_are_permutations_and_steps_are_counted_on():
    seen, steps = [], []

    def losses(network, batch):
        seen.append(numbers_of(batch))
        steps.append(batch.step)
        assert batch.labels.tolist() == [(-1) ** number for number in seen[-1]]
        yield from mean_loss(network, batch)

    torch.manual_seed(0)
    labels = torch.tensor([(-1) ** number for number in range(10)])
    network, settings = Scale(), {"labels": labels, "max_epochs": 2, "batch_size": 5}
    state = fit(network, constant_images(10), losses, **settings)
    optimizers, loss_curve = state
    fit(
        network,
        constant_images(10),
        losses,
        optimizers=optimizers,
        loss_curve=loss_curve,
        **settings,
    )
    assert steps == list(range(8))
    epochs = [seen[i] + seen[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_labels_are_none_where_none_were_given():
    def losses(network, batch):
        assert batch.labels is None
        yield from mean_loss(network, batch)

    fit(Scale(), constant_images(4), losses)


def test_the_network_learns():
    network = Scale()
    images = torch.full((8, 1, 2, 2), 0.5)
    _, loss_curve = fit(network, images, mean_loss, max_epochs=30)
    assert loss_curve[0] > 0.5
    assert loss_curve[-1] < 1e-3
    assert network.weight.item() == pytest.approx(2.0, abs=0.05)
    assert not network.training


def test_the_second_part_meets_the_first_after_its_step():
    network = nn.ModuleDict({"critic": Scale(), "generator": Scale()})
    records = []

    def losses(network, batch):
        critic, generator = network["critic"], network["generator"]
        assert network.training
        before = critic.weight.item(), generator.weight.item()
        yield critic, (critic(batch.images) - 1).square().mean()
        between = critic.weight.item(), generator.weight.item()
        # critic and generator both have a gradient here; only the generator steps
        yield generator, (generator(batch.images) - critic.weight - 1).square().mean()
        after = critic.weight.item(), generator.weight.item()
        records.append((before, between, after))

    images = torch.full((8, 1, 2, 2), 0.5)
    fit(network, images, losses)
    critic = generator = 0.0
    for before, between, after in records:
        assert before == pytest.approx((critic, generator))
        critic -= 0.5 * 2 * (0.5 * critic - 1) * 0.5
        assert between == pytest.approx((critic, generator))
        generator -= 0.5 * 2 * (0.5 * generator - critic - 1) * 0.5
        assert after == pytest.approx((critic, generator))
    assert len(records) == 2


def test_the_loss_curve_is_the_mean_of_the_summed_losses():
    network = nn.ModuleDict({"first": Scale(), "second": Scale()})
    sums = []

    def losses(network, batch):
        first = (network["first"](batch.images) - 1).square().mean()
        yield network["first"], first
        second = (network["second"](batch.images) + 2).square().mean()
        sums.append(first.item())
        if batch.step % 2 == 0:
            sums[-1] += second.item()
            yield network["second"], second

    _, loss_curve = fit(network, constant_images(12), losses, max_epochs=3)
    np.testing.assert_allclose(
        loss_curve, np.reshape(sums, (3, 3)).mean(axis=1), rtol=1e-5
    )


def test_the_scheduler_steps_once_an_epoch_and_starts_anew_on_continuation():
    network, optimizers, rates, seen = Scale(), {}, [], []

    def losses(network, batch):
        yield from mean_loss(network, batch)
        rates.append(optimizers[network].param_groups[0]["lr"])
        seen.append(optimizers[network])

    settings = {
        "optimizer": lambda part: torch.optim.Adam(part.parameters(), lr=0.1),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(
            optimizer, step_size=1, gamma=0.5
        ),
        "optimizers": optimizers,
        "loss_curve": [],
        "max_epochs": 3,
    }
    for _ in range(2):
        fit(network, constant_images(8), losses, **settings)
    assert rates == pytest.approx(2 * [0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    assert len(set(map(id, seen))) == 1
    (state,) = (optimizers[network].state[p] for p in [network.weight])
    assert state["step"] == 12
    assert len(settings["loss_curve"]) == 6


def test_an_interruption_keeps_the_network_and_warns():
    network = Scale()

    def losses(network, batch):
        if batch.step == 5:
            raise KeyboardInterrupt
        yield from mean_loss(network, batch)

    loss_curve = []
    with pytest.warns(UserWarning, match="interrupted after 2 epochs"):
        fit(
            network,
            constant_images(8),
            losses,
            max_epochs=10,
            loss_curve=loss_curve,
        )
    assert len(loss_curve) == 2
    assert not network.training
    assert network.weight.item() != 0


def test_an_error_of_the_losses_is_not_swallowed():
    network = Scale()

    def losses(network, batch):
        yield from mean_loss(network, batch)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(network, constant_images(8), losses)
    assert not network.training


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_what_helps(factor):
    def losses(network, batch):
        for part, loss in mean_loss(network, batch):
            yield part, loss * (factor if batch.step == 2 else 1.0)

    loss_curve = []
    with pytest.raises(FloatingPointError, match=r"in epoch 2.*learning_rate"):
        fit(Scale(), constant_images(8), losses, max_epochs=3, loss_curve=loss_curve)
    assert len(loss_curve) == 1


def test_the_progress_bar_counts_epochs(capsys):
    fit(Scale(), constant_images(8), mean_loss, max_epochs=3, verbose=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err
    assert "epoch" in captured.err
    assert "loss=" in captured.err


def test_a_silent_fit_prints_nothing(capsys):
    fit(Scale(), constant_images(8), mean_loss, max_epochs=3)
    assert capsys.readouterr() == ("", "")


def test_a_long_silent_fit_warns_once(monkeypatch, capsys):
    monkeypatch.setattr(loop, "FIRST_SECONDS", 0)
    monkeypatch.setattr(loop, "LONG_FIT_SECONDS", 1e-9)
    with pytest.warns(UserWarning, match=r"will take about .* hours") as record:
        fit(Scale(), constant_images(8), mean_loss, max_epochs=5)
    assert len(record) == 1
    assert "max_epochs" in str(record[0].message)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Scale(), constant_images(8), mean_loss, max_epochs=5, verbose=1)


def test_the_estimated_time_is_that_of_all_epochs(monkeypatch):
    """One second a batch, 2 batches an epoch, 7200 epochs: 4 hours."""
    clock = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(loop, "FIRST_SECONDS", 2)

    def losses(network, batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        yield from mean_loss(network, batch)

    with pytest.warns(UserWarning) as record:
        fit(Scale(), constant_images(8), losses, max_epochs=7200)
    estimate, interruption = (str(warning.message) for warning in record)
    assert "about 4.0 hours" in estimate
    assert "interrupted" in interruption


def test_networks_compute_in_bfloat16_and_losses_in_float32():
    dtypes = []

    def losses(network, batch):
        repaired = network(batch.images)
        loss = ssim_loss(repaired, batch.images)
        dtypes.append((repaired.dtype, loss.dtype))
        yield network, loss
        dtypes.append(network(batch.images).dtype)

    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        network = nn.Conv2d(1, 1, 3, padding=1)
        fit(network, images, losses, precision=precision)
        assert network.weight.dtype == torch.float32
    assert dtypes == [
        (torch.float32, torch.float32),
        torch.float32,
        (torch.bfloat16, torch.float32),
        torch.bfloat16,
    ]


# The early stop


def seen_and_held_out(n, **settings):
    """Return what a training sees in training mode and in evaluation mode, by epoch."""
    seen, held_out = [], []

    def losses(network, batch):
        draw = torch.rand((), generator=batch.generator).item()
        (seen if network.training else held_out).append((numbers_of(batch), draw))
        yield from mean_loss(network, batch)

    curve = []
    fit(
        Scale(),
        constant_images(n),
        losses,
        validation_curve=curve,
        **{"batch_size": 100, "max_epochs": 4, **settings},
    )
    return seen, held_out, curve


def test_held_out_images_are_never_trained_on():
    seen, held_out, curve = seen_and_held_out(
        10, n_iter_no_change=4, validation_fraction=0.3
    )
    assert len(seen) == len(held_out) == len(curve) == 4
    assert len({tuple(rows) for rows, _ in held_out}) == 1
    rows = held_out[0][0]
    assert len(rows) == 3
    for trained, _ in seen:
        assert sorted(trained + rows) == list(range(10))
    # the validation draws the same each time, the training does not
    assert len({draw for _, draw in held_out}) == 1
    assert len({draw for _, draw in seen}) == 4


def test_another_seed_holds_out_other_images():
    first, second = (
        seen_and_held_out(50, n_iter_no_change=1, max_epochs=1, seed=seed)[1][0][0]
        for seed in (0, 1)
    )
    assert first != second


def test_without_an_early_stop_all_images_are_trained_on():
    seen, held_out, curve = seen_and_held_out(10)
    assert all(sorted(rows) == list(range(10)) for rows, _ in seen)
    assert held_out == curve == []


def scripted(values):
    """Return losses whose validation loss follows a list of values."""
    values = iter(values)

    def losses(network, batch):
        if network.training:
            yield from mean_loss(network, batch)
        else:
            yield network, network.weight.detach() * 0 + next(values)

    return losses


def test_training_stops_and_goes_back_to_the_best_weights():
    network, weights = Scale(), []
    script = scripted([3.0, 1.0, 2.0, 1.0, 2.0, 0.5])

    def losses(network, batch):
        if not network.training:
            weights.append(network.weight.item())
        yield from script(network, batch)

    validation = []
    _, curve = fit(
        network,
        constant_images(10),
        losses,
        max_epochs=20,
        n_iter_no_change=2,
        validation_curve=validation,
    )
    assert validation == [3.0, 1.0, 2.0, 1.0]  # an equal loss is no lower one
    assert len(curve) == 4
    assert len(set(weights)) == 4
    assert network.weight.item() == weights[1]
    assert not network.training


def test_a_continued_training_does_not_end_worse_than_it_began():
    network, validation, curve = Scale(), [], []
    settings = {
        "max_epochs": 20,
        "n_iter_no_change": 2,
        "validation_curve": validation,
        "loss_curve": curve,
    }
    images = constant_images(10)
    fit(network, images, scripted([3.0, 1.0, 2.0, 2.0]), **settings)
    best = network.weight.item()
    # the first of these is what the training begins with
    script = scripted([1.0, 1.5, 1.25])
    fit(network, images, script, **settings)
    assert validation == [3.0, 1.0, 2.0, 2.0, 1.5, 1.25]
    assert network.weight.item() == best


def test_an_interrupt_goes_back_to_the_best_weights():
    network, weights = Scale(), []

    def losses(network, batch):
        if not network.training:
            weights.append(network.weight.item())
            yield network, network.weight.detach() * 0 + float(len(weights))
        elif len(weights) == 3:
            raise KeyboardInterrupt
        else:
            yield from mean_loss(network, batch)

    with pytest.warns(UserWarning, match="interrupted after 3 epochs"):
        fit(network, constant_images(10), losses, max_epochs=9, n_iter_no_change=5)
    assert network.weight.item() == weights[0]


def test_validation_takes_the_last_loss_and_no_step():
    network, validation = Scale(), []

    def losses(network, batch):
        yield network, (network.weight - 1) ** 2 + 5
        yield network, (network.weight - 1) ** 2

    fit(
        network,
        constant_images(10),
        losses,
        max_epochs=3,
        n_iter_no_change=3,
        validation_curve=validation,
    )
    assert all(value < 5 for value in validation)


def test_validation_leaves_batch_statistics_alone():
    images = torch.rand(10, 1, 2, 2)

    def losses(network, batch):
        yield network, (network.norm(batch.images) * network.weight).mean()

    counts = []
    for n_iter_no_change in (None, 3):
        network = Scale()
        fit(
            network,
            images,
            losses,
            max_epochs=3,
            batch_size=100,
            n_iter_no_change=n_iter_no_change,
        )
        counts.append(int(network.norm.num_batches_tracked))
    assert counts[0] == 3
    assert counts[1] <= 3


def test_too_few_images_to_hold_one_out():
    with pytest.raises(ValueError, match=r"n_samples = 2 .*n_iter_no_change=None"):
        fit(Scale(), constant_images(2), mean_loss, n_iter_no_change=1)


def test_a_step_differentiates_for_its_part_only():
    first, second = Scale(), Scale()
    second.weight.data.fill_(1.0)
    network = nn.ModuleList([first, second])

    def losses(network, batch):
        yield first, (first.weight * second.weight - 1) ** 2
        assert second.weight.grad is None

    fit(network, constant_images(4), losses, max_epochs=2)
    assert first.weight.item() != 0
