"""The training loop that all networks share.

A method describes its training by a generator of losses: each ``yield part, loss``
means "descend ``loss`` over the parameters of ``part`` now, then come back". A plain
autoencoder yields once a batch, a generative adversarial network yields twice.
"""

import contextlib
import copy
import math
import threading
import time
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .._tensors.filters import no_autocast
from .processes import Processes

FIRST_SECONDS = 60
LONG_FIT_SECONDS = 3600

_INITIALISING = threading.RLock()


class Batch(NamedTuple):
    """One batch of training images.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images on the training device, in [0, 1].
    labels : torch.Tensor of shape (b,) or None
        +1 for normal and -1 for anomalous images, None where none were given.
    notes : torch.Tensor of shape (b, ...) or None
        What a method has found out about each image before the training.
    step : int
        Number of the batch: the epochs before it, since the first fit, times the
        batches an epoch, and the batches before it in its own epoch.
    generator : torch.Generator
        What the losses draw from, on the CPU, so that a seed gives the same draws on
        every device.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    notes: torch.Tensor | None
    step: int
    generator: torch.Generator


class Samples:
    """Images to train on, and what belongs to each of them.

    Parameters
    ----------
    images : sequence
        ``images[indices]`` returns a tensor of shape (b, ...).
    labels : array-like of shape (n,), default=None
        +1 for normal and -1 for anomalous images.
    notes : torch.Tensor of shape (n, ...), default=None
        What is known of each image.
    device : torch.device, default="cpu"
        Where batches are wanted.
    """

    def __init__(self, images, labels=None, notes=None, device="cpu"):
        self.images = images
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.notes = notes
        self.device = device

    def __len__(self):
        return len(self.images)

    def batch(self, indices, step, generator):
        """Return the batch of some rows."""
        images, labels, notes = (
            None if parts is None else parts[indices].to(self.device)
            for parts in (self.images, self.labels, self.notes)
        )
        return Batch(images, labels, notes, step, generator)

    def split(self, fraction, seed):
        """Return the rows to train on and those that are held out.

        Of each label the same share is held out, but never all of its images.
        """
        order = torch.randperm(len(self), generator=seeded_generator(seed)).numpy()
        labels = self.labels
        classes = [0] if labels is None else labels.unique().tolist()
        held_out = []
        for label in classes:
            rows = order if labels is None else order[(labels[order] == label).numpy()]
            n_held_out = round(fraction * len(rows))
            held_out.append(rows[: min(n_held_out, len(rows) - 1)])
        held_out = np.concatenate(held_out)
        held_out = np.sort(held_out if len(held_out) else order[:1])
        rows = np.setdiff1d(order, held_out)
        if len(rows) < 2:
            raise ValueError(
                f"validation_fraction={fraction} of n_samples = {len(self)} training "
                "images leaves fewer than 2 to train on. n_iter_no_change=None trains "
                "on all of them, without an early stop."
            )
        return rows, held_out


class Optimizers:
    """The optimisers of a network's parts, each made when its part is first trained.

    Parameters
    ----------
    kept : dict
        Optimisers by part, filled here. Those of an earlier training go on, with the
        learning rates of new ones.
    make : callable
        ``make(part)`` returns a new optimiser.
    schedule : callable
        ``schedule(optimizer)`` returns a learning rate scheduler that is stepped once
        an epoch, or None.
    """

    def __init__(self, kept, make, schedule):
        self.kept = kept
        self.make = make
        self.schedule = schedule
        self.schedules = {}

    def __getitem__(self, part):
        if part not in self.schedules:
            fresh = self.make(part)
            kept = self.kept.setdefault(part, fresh)
            for group, new in zip(kept.param_groups, fresh.param_groups, strict=True):
                group["lr"] = new["lr"]
                group.pop("initial_lr", None)
            self.schedules[part] = self.schedule(kept)
        return self.kept[part]

    def end_epoch(self):
        """Let the learning rates follow their schedules."""
        for schedule in self.schedules.values():
            if schedule is not None:
                schedule.step()

    def state(self, network):
        """Return what is needed to go on, by the names of the parts in a network."""
        names = {part: name for name, part in network.named_modules()}
        return {
            names[part]: (
                self.kept[part].state_dict(),
                None if schedule is None else schedule.state_dict(),
            )
            for part, schedule in self.schedules.items()
        }

    def restore(self, network, state):
        """Go on from a state that `state` has returned."""
        for name, (optimizer, schedule) in state.items():
            part = network.get_submodule(name)
            self[part].load_state_dict(optimizer)
            if schedule is not None:
                self.schedules[part].load_state_dict(schedule)


class EarlyStop:
    """Watches the validation losses of a network and keeps its best weights.

    Parameters
    ----------
    patience : int
        Number of epochs without a lower loss after which the training is over.
    """

    def __init__(self, patience):
        self.patience = patience
        self.lowest, self.weights, self.n_epochs_since = math.inf, None, 0

    def saw(self, loss, network):
        """Take the loss that a network has now; return whether the training is over."""
        self.n_epochs_since += 1
        if loss < self.lowest:
            self.lowest, self.n_epochs_since = loss, 0
            self.weights = copy.deepcopy(network.state_dict())
        return self.n_epochs_since >= self.patience

    def go_back(self, network):
        """Give a network its best weights."""
        if self.weights is not None:
            network.load_state_dict(self.weights)

    def state(self):
        """Return what is needed to go on."""
        return self.lowest, self.weights, self.n_epochs_since

    def restore(self, state):
        """Go on from a state that `state` has returned."""
        self.lowest, self.weights, self.n_epochs_since = state


@contextlib.contextmanager
def seeded(seed):
    """Seed torch's global generator while a network takes its initial weights.

    It is restored afterwards. One thread at a time may be inside, since layers draw
    their weights from the one generator that all threads share. Networks are made on
    the CPU, so that a seed gives the same weights on every device.

    Parameters
    ----------
    seed : int
        Seed of torch's generator on the CPU.
    """
    with _INITIALISING, torch.device("cpu"):
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


def seeded_generator(seed):
    """Return a new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def autocast(device, precision):
    """Return the context in which networks compute in ``precision`` on ``device``.

    What the caller has switched on does not count.
    """
    device_type = torch.device(device).type
    if precision == "float32":
        return no_autocast(device_type)
    return torch.autocast(device_type, dtype=torch.bfloat16)


def train(
    network,
    samples,
    *,
    losses,
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
    progress=None,
):
    """Train a network by the losses that a generator yields.

    Parameters
    ----------
    network : torch.nn.Module
        The network; left in evaluation mode.
    samples : Samples
        Images, with labels and notes where there are.
    losses : callable
        ``losses(network, batch)`` is a generator of ``(part, loss)``. It runs under
        autocast where ``precision`` asks for it and is resumed after each step.
    optimizers : Optimizers
        The optimisers of the parts.
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
        Seed of the order of the images and of what the losses draw, of the choice of
        the images held out, and of what is drawn for them, so that the validation
        losses of all epochs compare.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network calls.
    verbose : int, default=0
        Whether to show a progress bar.
    progress : Progress, default=None
        Where the training keeps what it needs to go on after it was killed, and from
        where it goes on.

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
    rows, held_out = np.arange(len(samples)), None
    if n_iter_no_change is not None:
        rows, held_out = samples.split(validation_fraction, seed)
    steps = _Steps(network, samples, losses, optimizers, batch_size, precision, seed)
    steps.start_clock(rows, max_epochs, silent=not verbose)
    stop = EarlyStop(n_iter_no_change)
    generator = seeded_generator(seed + len(loss_curve))
    saved = None if progress is None else progress.take_loop()
    n_before = 0
    if saved is not None:
        n_before = _restore(saved, network, stop, optimizers, generator)
    bar = tqdm(total=max_epochs, initial=n_before, unit="epoch", disable=not verbose)
    network.train()
    try:
        if held_out is not None and loss_curve and saved is None:
            stop.saw(steps.validate(held_out, loss_curve), network)
        steps.processes.share_state(network)
        for n_epochs in range(n_before + 1, max_epochs + 1):
            loss_curve.append(steps.descend(rows, loss_curve, generator))
            optimizers.end_epoch()
            bar.set_postfix(loss=f"{loss_curve[-1]:.4g}", refresh=False)
            bar.update()
            if held_out is not None:
                validation_curve.append(steps.validate(held_out, loss_curve))
                if stop.saw(validation_curve[-1], network):
                    break
            if progress is not None:
                what_is_kept = n_epochs, network, stop, optimizers, generator
                progress.keep(n_epochs, partial(_state, *what_is_kept))
    except KeyboardInterrupt:
        warnings.warn(
            f"Training was interrupted after {len(loss_curve)} epochs; the estimator "
            "can be used as it is, and a fit with warm_start=True continues it.",
            stacklevel=2,
        )
        return False
    finally:
        bar.close()
        network.eval()
        stop.go_back(network)
    return True


def _state(n_epochs, network, stop, optimizers, generator):
    """Return what a training needs to go on."""
    return {
        "n_epochs": n_epochs,
        "early_stop": stop.state(),
        "optimizers": optimizers.state(network),
        "generator": generator.get_state(),
    }


def _restore(state, network, stop, optimizers, generator):
    """Put back what `_state` has returned; return the number of epochs."""
    stop.restore(state["early_stop"])
    optimizers.restore(network, state["optimizers"])
    generator.set_state(state["generator"])
    return state["n_epochs"]


class _Steps:
    """The steps of an epoch, and the passes of a validation."""

    def __init__(
        self, network, samples, losses, optimizers, batch_size, precision, seed
    ):
        self.network = network
        self.samples = samples
        self.losses = losses
        self.optimizers = optimizers
        self.batch_size = int(batch_size)  # torch takes none of NumPy's integers
        self.precision = precision
        self.seed = seed
        self.processes = Processes()

    def start_clock(self, rows, max_epochs, *, silent):
        """Check the batches of some rows, and watch how long they take."""
        n_batches = self._count_batches(rows)
        self.processes.check_batches(len(rows) // n_batches)
        self.clock = _Clock(max_epochs * n_batches, silent=silent)

    def _count_batches(self, rows):
        return max(1, min(-(-len(rows) // self.batch_size), len(rows) // 2))

    def descend(self, rows, loss_curve, generator):
        """Train on all rows once; return the mean of the batches' losses."""
        processes, n_epochs = self.processes, len(loss_curve)
        if processes.rank:  # draws other numbers than the first process
            generator.manual_seed(processes.own_seed(self.seed, n_epochs))
        n_batches = self._count_batches(rows)
        order = torch.randperm(len(rows), generator=generator)
        order = processes.of_first(order).numpy()
        total = 0.0
        for i, indices in enumerate(np.array_split(rows[order], n_batches)):
            share, weight = processes.share(indices)
            batch = self.samples.batch(share, n_epochs * n_batches + i, generator)
            for part, loss in _in_precision(
                self.losses(self.network, batch), batch, self.precision
            ):
                loss = processes.joined(part, weight * loss)
                _descend(loss, self.optimizers[part])
                total = total + loss.detach()
            self.clock.tick()
        for buffer in self.network.buffers():
            processes.of_first(buffer)
        total = processes.mean(total)
        return _finite_mean(total, n_batches, "training", loss_curve)

    def validate(self, rows, loss_curve):
        """Return the mean over the images of some rows of the loss yielded last."""
        generator = seeded_generator(self.seed)
        total = 0.0
        self.network.eval()
        for indices in np.array_split(rows, self._count_batches(rows)):
            batch = self.samples.batch(indices, 0, generator)
            with autocast(batch.images.device, self.precision):
                for _, loss in self.losses(self.network, batch):
                    last = loss.detach()
            total = total + len(indices) * last
        self.network.train()
        total = self.processes.mean(total)
        return _finite_mean(total, len(rows), "validation", loss_curve)


class _Clock:
    """Warns once, after a minute, if a silent fit is going to take hours."""

    def __init__(self, n_steps, *, silent):
        self.n_steps = n_steps
        self.n_done = 0
        self.watches = silent
        self.started = time.monotonic()

    def tick(self):
        """Count a step."""
        self.n_done += 1
        elapsed = time.monotonic() - self.started
        if not self.watches or elapsed <= FIRST_SECONDS:
            return
        self.watches = False
        seconds = elapsed * self.n_steps / self.n_done
        if seconds > LONG_FIT_SECONDS:
            warnings.warn(
                f"This fit will take about {seconds / 3600:.1f} hours. A GPU "
                "(device='cuda'), precision='bfloat16', smaller images, a narrower "
                "network or fewer max_epochs shorten it; verbose=1 shows its progress.",
                stacklevel=4,
            )


def _finite_mean(total, count, kind, loss_curve):
    mean = float(total) / count
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"The {kind} loss became {mean} in epoch {len(loss_curve) + 1}. "
            "A lower learning_rate helps; so may precision='float32'."
        )
    return mean


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
    # no gradients for the critic whose judgement a generator's loss went through
    loss.backward(
        inputs=[p for group in optimizer.param_groups for p in group["params"]]
    )
    optimizer.step()
