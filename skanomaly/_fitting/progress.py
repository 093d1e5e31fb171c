"""Files in which a training keeps its progress, for fits that are killed.

A checkpoint holds the facts that a fit depends on, what the estimator has learned so
far, and the state of the loop. A fit of the same facts finds it and goes on exactly.
"""

import os
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from .files import content_checksum, remove_leftovers, replacing, try_to_write
from .persistence import fitted_state, put_back
from .processes import Processes

CHECKSUM_BYTES = 4
# parameters that do not change what a fit comes to
WITHOUT_EFFECT = ("checkpoint", "checkpoint_every", "verbose", "warm_start")


class Progress:
    """How far one fit has come.

    Used in a ``with`` block, which the file outlives unless ``finished`` was set.

    Parameters
    ----------
    estimator : BaseEstimator
        The estimator that is being fitted, with the parameters ``checkpoint`` and
        ``checkpoint_every``.
    facts : dict of str to str
        What the fit depends on. A file with other facts is refused.

    Attributes
    ----------
    goes_on : bool
        Whether the fit continues one before, by a warm start or from the file.
    finished : bool
        Whether the training came to its end.
    """

    def __init__(self, estimator, facts):
        self.estimator = estimator
        self.facts = facts
        self.finished = False
        self.goes_on = estimator._continues
        self._loop = None
        self._processes = Processes()
        self._path = None
        if estimator.checkpoint is not None:
            self._path = _checked_place(estimator.checkpoint)
            self._go_back()

    @classmethod
    def of(cls, estimator, images, labels, **given):
        """Return the progress of a fit; what was killed before is put back.

        Parameters
        ----------
        estimator : BaseEstimator
            The estimator that is being fitted.
        images : ImageBatches
            The training images.
        labels : numpy.ndarray or None
            Their labels.
        **given : dict
            Further arguments of the fit.

        Returns
        -------
        Progress
            The progress.
        """
        if estimator.checkpoint is None:
            return cls(estimator, {})
        facts = {
            name: _to_fact(value)
            for name, value in estimator.get_params(deep=False).items()
            if name not in WITHOUT_EFFECT
        }
        n_epochs = len(estimator.loss_curve_) if estimator._continues else 0
        return cls(
            estimator,
            {
                "method": type(estimator).__name__,
                **facts,
                "images": f"{len(images)} of checksum " + _to_fact(images.array),
                "rows": _to_fact(images.rows),
                "labels": _to_fact(labels),
                "epochs before": str(n_epochs),
                "processes": str(Processes().count),
                **{name: _to_fact(value) for name, value in given.items()},
            },
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._path is not None and not any(error):
            if self.finished and self._processes.rank == 0:
                self._path.unlink(missing_ok=True)
            self._processes.wait()

    def take_loop(self):
        """Return the state of the loop that was killed, to the first who asks."""
        state, self._loop = self._loop, None
        return state

    def keep(self, n_epochs, loop_state):
        """Write the file, if it is time.

        Parameters
        ----------
        n_epochs : int
            Number of epochs of this call of the loop.
        loop_state : callable
            Returns what the loop needs to go on.
        """
        is_due = n_epochs % self.estimator.checkpoint_every == 0
        if self._path is None or not is_due or self._processes.rank:
            return
        state = {
            "facts": self.facts,
            "estimator": fitted_state(self.estimator),
            "loop": loop_state(),
        }
        content = pickle.dumps(state, protocol=5)
        try:
            with replacing(self._path, _named(self._path)) as file:
                file.write(content)
                file.write(_checksum(content))
        except OSError as error:
            warnings.warn(
                f"{error}. The training goes on; the file is that of an earlier epoch, "
                "if there is one.",
                stacklevel=3,
            )

    def _go_back(self):
        """Put back what the file holds, in every process, if there is one."""
        saved = self._load() if self._processes.rank == 0 else None
        saved = self._processes.object_of_first(saved)
        if saved is not None:
            self.facts, state, self._loop = saved
            put_back(self.estimator, state)
            self.goes_on = True

    def _load(self):
        """Return the facts, the estimator's and the loop's state, or None."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
            if checksum != _checksum(content):
                raise ValueError("its checksum does not fit")
            saved = pickle.loads(content)
            facts, state, loop = (saved[k] for k in ("facts", "estimator", "loop"))
        except Exception as error:
            raise ValueError(
                f"{_named(self._path)} cannot be read ({error}). Unless it was written "
                "on another kind of machine, it is no checkpoint of a training or a "
                "damaged one: remove it to start anew."
            ) from error
        wanted = self.facts
        if self._is_ancestor(state):
            wanted = {**wanted, "epochs before": facts["epochs before"]}
        changes = [
            f"{name}={wanted.get(name)} (there {facts.get(name)})"
            for name in {**facts, **wanted}
            if facts.get(name) != wanted.get(name)
        ]
        if changes:
            raise ValueError(
                f"{_named(self._path)} belongs to another fit: {', '.join(changes)}. "
                "Remove it to start anew, or take another path."
            )
        return facts, state, loop

    def _is_ancestor(self, state):
        """Return whether the estimator has come from a state and trained on.

        That is the case after an interrupt: the warm start then is the same fit.
        """
        if not self.goes_on or state["_seed"] != self.estimator._seed:
            return False
        curve = state["loss_curve_"]
        return self.estimator.loss_curve_[: len(curve)] == curve


def _named(path):
    return f"checkpoint={str(path)!r}"


def _checked_place(checkpoint):
    """Return the path of a checkpoint, where a file can be written."""
    path = Path(os.path.expanduser(checkpoint))
    if not os.fspath(checkpoint) or path.is_dir():
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} must name a file, but names a "
            "folder."
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{_named(path)} must name a file, but names a device.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{_named(path)}: there is no folder {str(path.parent)!r}."
        )
    remove_leftovers(path.parent)
    # a training of hours is not to find out at its end
    try_to_write(path, _named(path))
    return path


def _checksum(content):
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")


def _to_fact(value):
    """Return a short text that differs where values differ."""
    if isinstance(value, np.random.RandomState):
        return "a RandomState"
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return str(content_checksum(value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_to_fact, value))})"
    return repr(value)
