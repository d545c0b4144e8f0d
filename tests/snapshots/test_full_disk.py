"""A file system that is really full: a sentence, nothing left over, and room again afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from tests.snapshots.engine import MIB, contents, do, memfd, restore, save

SIZE = 8 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 4 MiB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "gmemd-test", tmp_path], capture_output=True,
                          text=True)
    if done.returncode:
        pytest.skip(f"needs leave to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_it_is_full(small: Path) -> None:
    """Saving fails, whether the data or a table does not fit; what is smaller fits then."""
    fd, target = memfd(SIZE), memfd(SIZE)
    for size in (6 * MIB, 4 * MIB - 8192):  # of the latter, the tables do not fit
        os.pwrite(fd, os.urandom(size), 0)
        with pytest.raises(QmpError, match=r"^cannot write snapshot 's': No space left on device$"):
            save(small, "s", fd)
        assert os.listdir(small) == []
        os.truncate(fd, 0)
        os.truncate(fd, SIZE)
    os.pwrite(fd, os.urandom(3 * MIB), MIB)
    save(small, "s", fd)
    do("verify", small, "s")
    restore(small, "s", target)
    assert contents(target) == contents(fd)
    with pytest.raises(QmpError, match="No space left on device"):
        do("cold", small, "s")  # random bytes: as large again
    do("verify", small, "s")
    assert os.listdir(small) == ["s"]
    os.close(fd)
    os.close(target)
