"""Files in which a training keeps its progress."""

import contextlib
import os
import pickle
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.utils import gen_batches

BATCH_BYTES = 2**24
CHECKSUM_BYTES = 4


@contextlib.contextmanager
def replacing(path):
    """Write a file that appears under its name only when it is complete.

    Parameters
    ----------
    path : pathlib.Path
        The file. If the block fails, an older one stays as it was.

    Yields
    ------
    pathlib.Path
        Where to write.
    """
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def content_checksum(array):
    """Return a checksum of the numbers in an array or tensor, read in batches."""
    array = array if isinstance(array, torch.Tensor) else np.asanyarray(array)
    checksum = zlib.crc32(
        repr((tuple(array.shape), str(array.dtype).removeprefix("torch."))).encode()
    )
    if array.ndim == 0:
        return zlib.crc32(np.asarray(array).tobytes(), checksum)
    row_bytes = max(1, array[:1].nbytes)
    for rows in gen_batches(len(array), max(1, BATCH_BYTES // row_bytes)):
        part = array[rows]
        part = part.cpu().numpy() if isinstance(part, torch.Tensor) else part
        checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
    return checksum


def _checksum(content):
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")


class Checkpoint:
    """The progress of one fit.

    Parameters
    ----------
    path : str or path-like
        File to keep it in.
    every : int
        Number of epochs between two writings.
    facts : dict of str to str
        What the fit depends on. A file with other facts is refused.
    """

    def __init__(self, path, every, facts):
        self.path = Path(path)
        self.every = every
        self.facts = facts
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"checkpoint={str(path)!r}: there is no folder "
                f"{str(self.path.parent)!r}."
            )

    def load(self):
        """Return the estimator's and the loop's state, or None if there is no file."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
            if checksum != _checksum(content):
                raise ValueError("its checksum does not fit")
            saved = pickle.loads(content)
            facts = saved["facts"]
        except Exception as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} cannot be read ({error}). Unless it "
                "was written on another kind of machine, it is no checkpoint of a "
                "training or a damaged one: remove it to start anew."
            ) from error
        changes = [
            f"{name}={self.facts.get(name)} (there {facts.get(name)})"
            for name in {**facts, **self.facts}
            if facts.get(name) != self.facts.get(name)
        ]
        if changes:
            raise ValueError(
                f"checkpoint={str(self.path)!r} belongs to another fit: "
                f"{', '.join(changes)}. Remove it to start anew, or take another path."
            )
        return saved["estimator"], saved["loop"]

    def save(self, estimator, loop):
        """Write the state of an estimator and of its training loop."""
        state = {"facts": self.facts, "estimator": estimator, "loop": loop}
        content = pickle.dumps(state, protocol=5)
        with replacing(self.path) as temporary, open(temporary, "xb") as file:
            file.write(content)
            file.write(_checksum(content))
            file.flush()
            os.fsync(file.fileno())

    def remove(self):
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
