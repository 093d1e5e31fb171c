"""Files are complete or not there, whatever happens to those who write them."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from skanomaly._fitting import files
from skanomaly._fitting.files import (
    DamagedFileError,
    content_checksum,
    map_summed,
    named_write_errors,
    read_summed,
    remove_leftovers,
    replacing,
    replacing_summed,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="has no such limits and signals")


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, "file") as file:
        file.write(b"new" * 100_000)  # more than a buffer holds
        assert path.read_text() == "old"
    assert path.read_text() == "new" * 100_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), replacing(path, "file") as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@POSIX
@pytest.mark.parametrize("n_bytes", [1000, 1_000_000])  # less and more than a buffer
def test_a_full_disk_is_named(n_bytes, tmp_path):
    import resource

    path = tmp_path / "file"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"memory: 'a' cannot be written \(File too"),
            replacing(path, "memory: 'a'") as file,
        ):
            file.write(bytes(n_bytes))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_that_are_not_of_writing_keep_their_words():
    with pytest.raises(ValueError, match=r"^other$"), named_write_errors("a"):
        raise ValueError("other")


WRITER = """
import sys, time
from skanomaly._fitting.files import replacing

with replacing(sys.argv[1], "file") as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@POSIX
def test_leftovers_of_the_killed_are_removed_and_the_living_left_alone(tmp_path):
    foreign = [tmp_path / "notes.tmp", tmp_path / "a.123.tmp"]
    for path in foreign:
        path.write_text("of somebody else")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        temporary = {*tmp_path.iterdir()} - {*foreign}
        assert len(temporary) == 1
        remove_leftovers(tmp_path)
        assert {*tmp_path.iterdir()} == {*foreign, *temporary}
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert {*tmp_path.iterdir()} == {*foreign, *temporary}
    remove_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == {*foreign}


def test_checksums_do_not_depend_on_the_container(random_images):
    array = random_images(50, 32, 32, 1)
    assert content_checksum(array) == content_checksum(torch.from_numpy(array))
    assert content_checksum(array) == content_checksum(np.asfortranarray(array))
    assert content_checksum(array) != content_checksum(array[::-1])
    assert content_checksum(array) != content_checksum(array.reshape(50, 1024, 1))


# Files with a checksum


@pytest.fixture
def summed(tmp_path):
    """Return a file with a checksum, and the array that it holds."""
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    with replacing_summed(tmp_path / "a.npy", "a") as file:
        np.save(file, array)
    return tmp_path / "a.npy", array


READERS = pytest.mark.parametrize("read", [read_summed, map_summed])


@READERS
def test_what_is_written_with_a_checksum_comes_back(summed, read):
    path, array = summed
    np.testing.assert_array_equal(read(path), array)
    np.testing.assert_array_equal(np.load(path), array)
    with pytest.raises(FileNotFoundError):
        read(path.with_name("b.npy"))


@READERS
def test_every_flipped_bit_is_noticed(summed, read):
    path, _ = summed
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            read(path)


@READERS
def test_every_other_length_is_noticed(summed, read):
    path, _ = summed
    content = path.read_bytes()
    for damaged in (*(content[:n] for n in range(len(content))), content + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            read(path)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(DamagedFileError):
        read(path)


def test_a_mapped_file_is_read_whole_once_a_process(summed, monkeypatch):
    path, array = summed
    monkeypatch.setattr(files, "_compared", set())
    os.utime(path, ns=(0, 0))
    map_summed(path)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    assert (map_summed(path) != array).sum() == 1
    path.write_bytes(content[:-1])
    os.utime(path, ns=(0, 0))
    with pytest.raises(DamagedFileError, match=r"155 bytes .* promises 156"):
        map_summed(path)
    path.write_bytes(content)  # at another time
    with pytest.raises(DamagedFileError, match="checksum"):
        map_summed(path)


@POSIX
def test_a_full_disk_is_named_while_the_file_is_written(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"memory: 'a' cannot be written \(File too"),
            replacing_summed(tmp_path / "a.npy", "memory: 'a'") as file,
        ):
            np.save(file, np.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
