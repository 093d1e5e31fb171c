"""The training loop that all networks share.

A method describes its training by a generator of losses: each ``yield part, loss``
means "descend ``loss`` over the parameters of ``part`` now, then come back". A plain
autoencoder yields once a batch, a generative adversarial network yields twice.
"""

import contextlib
import math
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

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
    max_epochs,
    batch_size,
    precision="float32",
    verbose=0,
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
    max_epochs : int
        Number of epochs.
    batch_size : int
        Largest number of images a batch. Batches are of nearly equal size and hold at
        least two images (batch normalisation needs them), except of a single image.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network calls.
    verbose : int, default=0
        Whether to show a progress bar.

    Raises
    ------
    FloatingPointError
        If the loss of an epoch is not finite.

    Warns
    -----
    UserWarning
        If interrupted from the keyboard (the network stays as it is then), or if a
        silent fit turns out to need more than an hour.
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

    n_images = len(images)
    n_batches = max(1, min(-(-n_images // batch_size), n_images // 2))
    first_step = step = len(loss_curve) * n_batches
    long_fit_checked = bool(verbose)
    started = time.monotonic()
    progress = tqdm(total=max_epochs, unit="epoch", disable=not verbose)
    network.train()
    try:
        for _ in range(max_epochs):
            total = 0.0
            order = torch.randperm(n_images).numpy()
            for indices in np.array_split(order, n_batches):
                batch = Batch(
                    images[indices], None if labels is None else labels[indices], step
                )
                total = total + _train_step(
                    losses(network, batch), optimizer_of, batch.images.device, precision
                )
                step += 1
                elapsed = time.monotonic() - started
                if not long_fit_checked and elapsed > FIRST_SECONDS:
                    long_fit_checked = True
                    _warn_if_long(
                        elapsed * max_epochs * n_batches / (step - first_step)
                    )
            mean = float(total) / n_batches
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"The training loss became {mean} in epoch {len(loss_curve) + 1}. "
                    "A lower learning_rate helps; so may precision='float32'."
                )
            loss_curve.append(mean)
            for schedule in schedulers.values():
                if schedule is not None:
                    schedule.step()
            progress.set_postfix(loss=f"{mean:.4g}", refresh=False)
            progress.update()
    except KeyboardInterrupt:
        warnings.warn(
            f"Training was interrupted after {len(loss_curve)} epochs; the estimator "
            "can be used as it is, and a fit with warm_start=True continues it.",
            stacklevel=2,
        )
    finally:
        progress.close()
        network.eval()


def _train_step(steps, optimizer_of, device, precision):
    """Take the optimiser steps that a generator of losses asks for; sum the losses."""
    total = 0.0
    while True:
        with autocast(device, precision):
            part, loss = next(steps, (None, None))
        if part is None:
            return total
        optimizer = optimizer_of(part)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total = total + loss.detach()


def _warn_if_long(seconds):
    if seconds > LONG_FIT_SECONDS:
        warnings.warn(
            f"This fit will take about {seconds / 3600:.1f} hours. A GPU "
            "(device='cuda'), precision='bfloat16', smaller images, a narrower network "
            "or fewer max_epochs shorten it; verbose=1 shows its progress.",
            stacklevel=3,
        )
