"""Files that are complete or not there, and checksums of what goes into them."""

import contextlib
import os
import re
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.utils import gen_batches

try:
    import fcntl
except ImportError:  # on Windows, which has no locks that end with their process
    fcntl = None  # type: ignore[assignment]

BATCH_BYTES = 2**24
TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp$")


@contextlib.contextmanager
def named_write_errors(what):
    """Let errors of writing say what cannot be written.

    Parameters
    ----------
    what : str
        The argument and the file, such as "checkpoint='a.ckpt'".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{what} cannot be written ({reason})") from error


@contextlib.contextmanager
def replacing(path, what):
    """Write a file that appears under its name only when it is complete.

    Parameters
    ----------
    path : str or path-like
        The file. If the block fails, an older one stays as it was.
    what : str
        How errors name it.

    Yields
    ------
    io.BufferedWriter
        Where to write.
    """
    path = Path(path)
    with named_write_errors(what):
        file = _new_temporary(path)
    try:
        yield file
        with named_write_errors(what):
            file.flush()
            # else a power cut may leave the new name with the content of nothing
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, path)
    finally:
        with contextlib.suppress(OSError):  # the disk is full; said already
            file.close()
        Path(file.name).unlink(missing_ok=True)


def _new_temporary(path):
    """Open a new file beside ``path``, locked for as long as its writer lives."""
    while True:
        name = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        file = open(name, "xb")  # noqa: SIM115
        if _lock(file) and os.fstat(file.fileno()).st_nlink == 0:
            file.close()  # taken for a leftover in the moment before it was locked
            continue
        return file


def _lock(file, *, wait=True):
    """Lock a file; return whether that is possible here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # locked by its writer, or on a disk without locks
        return False
    return True


def remove_leftovers(folder):
    """Remove what processes that were killed while writing have left in a folder.

    Parameters
    ----------
    folder : str or path-like
        The folder. Files that a living process writes are locked, and stay.
    """
    for path in Path(folder).glob("*.tmp"):
        if TEMPORARY_NAME.search(path.name):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if _lock(file, wait=False):
                    path.unlink()


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
        # numbers that lie apart, such as a column, are copied a batch at a time
        checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
    return checksum
