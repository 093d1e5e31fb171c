"""Files are complete or not there, whatever happens to those who write them."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from skanomaly._fitting.files import (
    content_checksum,
    named_write_errors,
    remove_leftovers,
    replacing,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="has no such limits and signals")


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, "file") as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
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
def test_a_full_disk_is_named(tmp_path):
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
            file.write(bytes(1000))
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
