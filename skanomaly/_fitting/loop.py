"""The training loop that all networks share.

A method describes its training by a generator of losses: each ``yield part, loss``
means "descend ``loss`` over the parameters of ``part`` now, then come back". A plain
autoencoder yields once a batch, a generative adversarial network yields twice.
"""

import contextlib
import copy
import math
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .processes import Processes

FIRST_SECONDS = 60
LONG_FIT_SECONDS = 3600


class Batch(NamedTuple):
    """One batch of training images.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images on the training device, in [0, 1].
    labels : torch.Tensor of shape (b,) or None
        +1 for normal and -1 for anomalous images, None where none were given.
    step : int
        Number of the batch: the epochs before it, since the first fit, times the
        batches an epoch, and the batches before it in its own epoch.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    step: int


@contextlib.contextmanager
def seeded(seed):
    """Seed torch inside a ``with`` block and restore its generators afterwards.

    Parameters
    ----------
    seed : int
        Seed of torch's generators on all devices.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:
            # the other notes its whole call stack for every absent kind of GPU
            torch.default_generator.manual_seed(seed)
        yield


def autocast(device, precision):
    """Return the context in which networks compute in ``precision`` on ``device``."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def train(
    network,
    images,
    labels=None,
    *,
    losses,
    optimizer,
    scheduler,
    optimizers,
    loss_curve,
    validation_curve,
    max_epochs,
    batch_size,
    validation_fraction=0.1,
    n_iter_no_change=None,
    seed=0,
    precision="float32",
    verbose=0,
    resumed=None,
    keep=None,
):
    """Train a network by the losses that a generator yields.

    Parameters
    ----------
    network : torch.nn.Module
        The network; left in evaluation mode.
    images : sequence
        ``images[indices]`` returns a tensor of shape (b, c, h, w) on the device of the
        network.
    labels : torch.Tensor of shape (n,), default=None
        Labels handed to the losses.
    losses : callable
        ``losses(network, batch)`` is a generator of ``(part, loss)``. It runs under
        autocast where ``precision`` asks for it and is resumed after each step.
    optimizer : callable
        ``optimizer(part)`` returns the optimiser of a part, asked for when the part is
        first yielded.
    scheduler : callable
        ``scheduler(optimizer)`` returns a learning rate scheduler that is stepped once
        an epoch, or None.
    optimizers : dict
        Optimisers by part. Filled here; hand it in again to continue a training, which
        starts with the learning rates of ``optimizer(part)``.
    loss_curve : list of float
        The mean loss of every epoch is appended. Where several losses are yielded a
        batch, their sum counts.
    validation_curve : list of float
        The mean validation loss of every epoch is appended, if there is an early stop.
        Where several losses are yielded a batch, the last counts.
    max_epochs : int
        Largest number of epochs.
    batch_size : int
        Largest number of images a batch. Batches are of nearly equal size and hold at
        least two images (batch normalisation needs them), except of a single image.
    validation_fraction : float, default=0.1
        Share of the images that is held out if there is an early stop.
    n_iter_no_change : int, default=None
        Stop after so many epochs without a lower validation loss, and go back to the
        weights of the lowest. None trains all epochs on all images.
    seed : int, default=0
        Seed of the choice of the images held out and of what the losses draw for them,
        so that the validation losses of all epochs compare.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network calls.
    verbose : int, default=0
        Whether to show a progress bar.
    resumed : dict, default=None
        What ``keep`` was given by a training that did not come to its end. This one
        goes on from there, exactly; the weights and the curves are the caller's.
    keep : callable, default=None
        ``keep(n_epochs, state)`` is called after each epoch with the number of epochs
        of this call and a function that returns what a training needs to go on.

    Returns
    -------
    bool
        False if the training was interrupted from the keyboard.

    Raises
    ------
    ValueError
        If fewer than two images are left for the training.
    FloatingPointError
        If the loss of an epoch is not finite.

    Warns
    -----
    UserWarning
        If interrupted from the keyboard (the network stays as it is then, or goes back
        to the best weights of an early stop), or if a silent fit turns out to need more
        than an hour.
    """
    schedulers = {}

    def optimizer_of(part):
        if part not in schedulers:
            fresh = optimizer(part)
            kept = optimizers.setdefault(part, fresh)
            for group, new in zip(kept.param_groups, fresh.param_groups, strict=True):
                group["lr"] = new["lr"]
                group.pop("initial_lr", None)
            schedulers[part] = scheduler(kept)
        return optimizers[part]

    processes = Processes()
    rows, held_out = _hold_out(
        len(images), labels, validation_fraction, n_iter_no_change, seed
    )
    n_batches = _count_batches(len(rows), batch_size)
    processes.check_batches(len(rows) // n_batches)
    first_step = step = len(loss_curve) * n_batches
    long_fit_checked = bool(verbose)
    started = time.monotonic()
    progress = tqdm(total=max_epochs, unit="epoch", disable=not verbose)
    lowest, best_weights, n_epochs_since = math.inf, None, 0
    n_epochs = 0
    network.train()

    def state():
        names = {part: name for name, part in network.named_modules()}
        return {
            "n_epochs": n_epochs,
            "early_stop": (lowest, best_weights, n_epochs_since),
            "optimizers": {
                names[part]: (
                    optimizers[part].state_dict(),
                    None if schedule is None else schedule.state_dict(),
                )
                for part, schedule in schedulers.items()
            },
            "generators": _generator_states(),
        }

    def validate():
        with seeded(seed):
            total = _validate(
                network, images, labels, held_out, losses, batch_size, precision
            )
        total = processes.mean(total)
        return _finite_mean(total, len(held_out), "validation", loss_curve)

    try:
        if resumed is not None:
            n_epochs = resumed["n_epochs"]
            lowest, best_weights, n_epochs_since = resumed["early_stop"]
            for name, (kept, schedule) in resumed["optimizers"].items():
                part = network.get_submodule(name)
                optimizer_of(part).load_state_dict(kept)
                if schedule is not None:
                    schedulers[part].load_state_dict(schedule)
            _restore_generators(resumed["generators"])
            progress.update(n_epochs)
        elif loss_curve and n_iter_no_change is not None:
            lowest, best_weights = validate(), copy.deepcopy(network.state_dict())
        for tensor in network.state_dict().values():
            processes.of_first(tensor)
        while n_epochs < max_epochs:
            total = 0.0
            processes.seed_apart(seed, len(loss_curve))
            order = processes.of_first(torch.randperm(len(rows))).numpy()
            for indices in np.array_split(rows[order], n_batches):
                share, weight = processes.share(indices)
                batch = _batch(images, labels, share, step)
                steps = losses(network, batch)
                for part, loss in _in_precision(steps, batch, precision):
                    loss = processes.joined(part, weight * loss)
                    _descend(loss, optimizer_of(part))
                    total = total + loss.detach()
                step += 1
                elapsed = time.monotonic() - started
                if not long_fit_checked and elapsed > FIRST_SECONDS:
                    long_fit_checked = True
                    _warn_if_long(
                        elapsed * max_epochs * n_batches / (step - first_step)
                    )
            for buffer in network.buffers():
                processes.of_first(buffer)
            total = processes.mean(total)
            mean = _finite_mean(total, n_batches, "training", loss_curve)
            loss_curve.append(mean)
            for schedule in schedulers.values():
                if schedule is not None:
                    schedule.step()
            progress.set_postfix(loss=f"{mean:.4g}", refresh=False)
            progress.update()
            n_epochs += 1
            if n_iter_no_change is not None:
                mean = validate()
                validation_curve.append(mean)
                n_epochs_since += 1
                if mean < lowest:
                    lowest, n_epochs_since = mean, 0
                    best_weights = copy.deepcopy(network.state_dict())
                if n_epochs_since >= n_iter_no_change:
                    break
            if keep is not None and processes.rank == 0:
                keep(n_epochs, state)
    except KeyboardInterrupt:
        warnings.warn(
            f"Training was interrupted after {len(loss_curve)} epochs; the estimator "
            "can be used as it is, and a fit with warm_start=True continues it.",
            stacklevel=2,
        )
        return False
    finally:
        progress.close()
        network.eval()
        if best_weights is not None:
            network.load_state_dict(best_weights)
    return True


def _generator_states():
    """Return the states of torch's generators."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), on_devices


def _restore_generators(states):
    own, on_devices = states
    torch.set_rng_state(own)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(on_devices)


def _hold_out(n_images, labels, validation_fraction, n_iter_no_change, seed):
    """Return the rows to train on and those held out, if there is an early stop.

    Of each label the same share is held out, but never all of its images.
    """
    if n_iter_no_change is None:
        return np.arange(n_images), None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_images, generator=generator).numpy()
    classes = [0] if labels is None else labels.unique().tolist()
    held_out = []
    for label in classes:
        rows = order if labels is None else order[(labels[order] == label).numpy()]
        n_held_out = round(validation_fraction * len(rows))
        held_out.append(rows[: min(n_held_out, len(rows) - 1)])
    held_out = np.concatenate(held_out)
    held_out = np.sort(held_out if len(held_out) else order[:1])
    rows = np.setdiff1d(order, held_out)
    if len(rows) < 2:
        raise ValueError(
            f"validation_fraction={validation_fraction} of n_samples = {n_images} "
            "training images leaves fewer than 2 to train on. n_iter_no_change=None "
            "trains on all of them, without an early stop."
        )
    return rows, held_out


def _count_batches(n_images, batch_size):
    return max(1, min(-(-n_images // batch_size), n_images // 2))


def _batch(images, labels, indices, step):
    return Batch(images[indices], None if labels is None else labels[indices], step)


def _finite_mean(total, count, kind, loss_curve):
    mean = float(total) / count
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"The {kind} loss became {mean} in epoch {len(loss_curve) + 1}. "
            "A lower learning_rate helps; so may precision='float32'."
        )
    return mean


def _validate(network, images, labels, rows, losses, batch_size, precision):
    """Return the sum over some images of the loss that is yielded last."""
    total = 0.0
    network.eval()
    for indices in np.array_split(rows, _count_batches(len(rows), batch_size)):
        batch = _batch(images, labels, indices, 0)
        with autocast(batch.images.device, precision):
            for _, loss in losses(network, batch):
                last = loss.detach()
        total = total + len(indices) * last
    network.train()
    return total


def _in_precision(steps, batch, precision):
    """Run a generator of losses under autocast, and what is done with them outside."""
    while True:
        with autocast(batch.images.device, precision):
            part, loss = next(steps, (None, None))
        if part is None:
            return
        yield part, loss


def _descend(loss, optimizer):
    """Take a step of an optimiser, which touches its own parameters only."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(
        inputs=[p for group in optimizer.param_groups for p in group["params"]]
    )
    optimizer.step()


def _warn_if_long(seconds):
    if seconds > LONG_FIT_SECONDS:
        warnings.warn(
            f"This fit will take about {seconds / 3600:.1f} hours. A GPU "
            "(device='cuda'), precision='bfloat16', smaller images, a narrower network "
            "or fewer max_epochs shorten it; verbose=1 shows its progress.",
            stacklevel=3,
        )
