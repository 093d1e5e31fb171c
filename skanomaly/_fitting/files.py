"""Files that are complete or not there, and checksums of what goes into them."""

import contextlib
import io
import math
import os
import re
import time
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
SUM_BYTES = 4
# Two writings within a tick of the disk's clock leave the same time behind.
CLOCK_NS = 2 * 10**9

_compared: set[tuple[int, ...]] = set()  # files whose checksum this process has read


class DamagedFileError(Exception):
    """A file does not hold what was written into it."""


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
    object
        Has the method ``write``.
    """
    path = Path(path)
    with named_write_errors(what):
        file = _new_temporary(path)
    try:
        yield _NamedFile(file, what)
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


def try_to_write(path, what):
    """Raise if no file can be written where one is to stand.

    Parameters
    ----------
    path : str or path-like
        The file, which is left as it is.
    what : str
        How errors name it.
    """
    with named_write_errors(what):
        file = _new_temporary(Path(path))
        try:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):
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


class _NamedFile:
    """A file that is written to, whose errors say what cannot be written."""

    def __init__(self, file, what):
        self.file = file
        self.what = what

    def write(self, data):
        with named_write_errors(self.what):
            return self.file.write(data)


class _SummedFile:
    """A file that is written to, and the checksum of what went in."""

    def __init__(self, file):
        self.file = file
        self.checksum = 0

    def write(self, data):
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


@contextlib.contextmanager
def replacing_summed(path, what):
    """Write a file as `replacing` does, and a checksum behind its content.

    Readers of .npy files do not see what stands behind the array.

    Parameters
    ----------
    path : str or path-like
        The file. If the block fails, an older one stays as it was.
    what : str
        How errors name it.

    Yields
    ------
    object
        Has the method ``write``.
    """
    with replacing(path, what) as file:
        summed = _SummedFile(file)
        yield summed
        summed.write(summed.checksum.to_bytes(SUM_BYTES, "little"))


def read_summed(path):
    """Read the array of a .npy file that was written by `replacing_summed`.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    numpy.ndarray
        The array.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DamagedFileError
        If its checksum is another.
    """
    with open(path, "rb") as file:
        content = file.read()
    known = int.from_bytes(content[-SUM_BYTES:], "little")
    if zlib.crc32(memoryview(content)[:-SUM_BYTES]) != known:
        raise DamagedFileError("its checksum is another")
    # four zeros have the right checksum of nothing, hence the look at the header
    shape, dtype, start = _header(io.BytesIO(content), len(content))
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)


def map_summed(path):
    """Map a .npy file that was written by `replacing_summed`, to be read only.

    The header and the size are looked at each time, the checksum when the process opens
    the file for the first time, since that reads all of it.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    numpy.memmap
        The array.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DamagedFileError
        If its header, size or checksum is another.
    """
    with open(os.fspath(path), "rb") as file:
        status = os.fstat(file.fileno())
        shape, dtype, start = _header(file, status.st_size)
        _compare_once(file, status)
        return np.memmap(file, dtype, "r", start, shape)


def _header(file, n_bytes):
    """Return shape, type and start of an array in a file of so many bytes."""
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version](file)
    except Exception as error:  # all kinds, from its parser of Python literals
        raise DamagedFileError("its header cannot be read") from error
    promised = file.tell() + dtype.itemsize * math.prod(shape) + SUM_BYTES
    if fortran or dtype.hasobject or n_bytes != promised:
        raise DamagedFileError(
            f"it has {n_bytes} bytes where its header promises {promised}"
        )
    return shape, dtype, file.tell()


def _compare_once(file, status):
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if state in _compared:
        return
    checksum, remaining = 0, status.st_size - SUM_BYTES
    file.seek(0)
    while remaining and (part := file.read(min(BATCH_BYTES, remaining))):
        checksum = zlib.crc32(part, checksum)
        remaining -= len(part)
    if file.read() != checksum.to_bytes(SUM_BYTES, "little"):
        raise DamagedFileError("its checksum is another")
    if time.time_ns() - status.st_mtime_ns > CLOCK_NS:
        _compared.add(state)


def as_numpy(values):
    """Return the numbers of a tensor, or of what NumPy takes, as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy knows no bfloat16
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asanyarray(values)


def content_checksum(array):
    """Return a checksum of the numbers in an array or tensor, read in batches."""
    array = array if isinstance(array, torch.Tensor) else np.asanyarray(array)
    checksum = zlib.crc32(
        repr((tuple(array.shape), str(array.dtype).removeprefix("torch."))).encode()
    )
    if array.ndim == 0:
        return zlib.crc32(as_numpy(array).tobytes(), checksum)
    row_bytes = max(1, array[:1].nbytes)
    for rows in gen_batches(len(array), max(1, BATCH_BYTES // row_bytes)):
        part = as_numpy(array[rows])
        # numbers that lie apart, such as a column, are copied a batch at a time
        checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
    return checksum
