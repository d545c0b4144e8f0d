"""Memory of every kind is saved and restored: huge pages, a real guest_memfd, parts of files, private bytes aside."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.kernel import residency, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.syscalls import fallocate
from tests.kernel.conftest import HUGE, huge_pages, kernels, make  # noqa: F401 (fixtures)
from tests.snapshots.engine import MIB, PAGE, contents, do, memfd, restore, save

Make = Callable[..., int]


@pytest.fixture(params=[pytest.param("kvm", marks=pytest.mark.kvm)])
def kernel(request: pytest.FixtureRequest, kernels: Callable[[str], Kernel]) -> Kernel:  # noqa: F811
    """The real one; a simulated guest_memfd is a memfd."""
    return kernels(request.param)


def write(fd: int, at: int, data: bytes) -> None:
    """Write by mapping, as a guest does."""
    begin = at // HUGE * HUGE
    with mmap.mmap(fd, HUGE, offset=begin) as window:
        window[at - begin:at - begin + len(data)] = data


def read(fd: int, size: int) -> bytes:
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as window:
        return window[:]


def test_a_real_guest_memfd(tmp_path: Path, make: Make) -> None:  # noqa: F811
    """Scattered pages, one of which was allocated and never touched; nothing becomes resident."""
    size = 40 * MIB
    fd, target = make(size), make(size)
    expected = bytearray(size)
    for number, at in enumerate((0, 5 * PAGE, 3 * MIB, 17 * MIB + PAGE, size - PAGE)):
        data = bytes([number + 1]) * PAGE
        write(fd, at, data)
        expected[at:at + PAGE] = data
    fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE, 30 * MIB, PAGE)
    before = residency.resident(fd)
    save(tmp_path, "s", fd)
    assert residency.resident(fd) == before
    assert (tmp_path / "s" / "memory.raw").read_bytes() == expected
    restore(tmp_path, "s", target)
    assert residency.resident(target) == 5 * PAGE
    assert read(target, size) == expected
    write(fd, 3 * MIB, b"changed")
    expected[3 * MIB:3 * MIB + 7] = b"changed"
    save(tmp_path, "t", fd, parent="s")
    restored = memfd(size)  # into memory of another kind
    restore(tmp_path, "t", restored)
    assert contents(restored) == expected
    os.close(restored)


def test_huge_pages(tmp_path: Path, huge_pages: Callable[[int], None]) -> None:  # noqa: F811
    """A hole of a huge page stays one, in the object and in the file."""
    huge_pages(4)
    size = 8 * HUGE
    fd = os.memfd_create("huge", uapi.MFD_HUGETLB | os.MFD_CLOEXEC)
    target = os.memfd_create("huge", uapi.MFD_HUGETLB | os.MFD_CLOEXEC)
    try:
        for one in (fd, target):
            os.ftruncate(one, size)
        write(fd, HUGE, b"one")
        write(fd, 6 * HUGE + 5 * PAGE, os.urandom(PAGE))
        before = os.fstat(fd).st_blocks
        save(tmp_path, "s", fd)
        assert os.fstat(fd).st_blocks == before
        assert (tmp_path / "s" / "memory.raw").stat().st_blocks * 512 == 2 * PAGE
        restore(tmp_path, "s", target)
        assert os.fstat(target).st_blocks == before
        assert contents(target) == contents(fd)
    finally:
        os.close(fd)
        os.close(target)


def test_too_few_huge_pages_are_an_error(tmp_path: Path, huge_pages: Callable[[int], None]) -> None:  # noqa: F811
    """Not a signal."""
    huge_pages(1)
    fd = memfd(2 * HUGE)
    target = os.memfd_create("huge", uapi.MFD_HUGETLB | os.MFD_CLOEXEC)
    try:
        os.ftruncate(target, 2 * HUGE)
        os.pwrite(fd, b"x", 0)
        os.pwrite(fd, b"x", HUGE)
        save(tmp_path, "s", fd)
        with pytest.raises(QmpError, match="cannot write 'm': "):
            restore(tmp_path, "s", target)
    finally:
        os.close(fd)
        os.close(target)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    """An object on a file at an offset is its part only, and what surrounds it stays, also when it is overwritten."""
    path = tmp_path / "file"
    path.write_bytes(b"before" + bytes(MIB - 6) + b"inside" * 50000 + bytes(2 * MIB) + b"after")
    fd = os.open(path, os.O_RDWR)
    try:
        (tmp_path / "root").mkdir()
        save(tmp_path / "root", "s", fd, 2 * MIB, offset=MIB)
        was = path.read_bytes()
        assert (tmp_path / "root" / "s" / "memory.raw").read_bytes() == was[MIB:3 * MIB]
        os.pwrite(fd, b"overwritten" * 100000, MIB + 5)
        restore(tmp_path / "root", "s", fd, offset=MIB, clear=True)
        assert path.read_bytes() == was
    finally:
        os.close(fd)


def test_both_halves(tmp_path: Path) -> None:
    """Private bytes that were set aside are a second file; who has no room for them is refused."""
    fd, aside, target, second = (memfd(4 * MIB) for _ in range(4))
    os.pwrite(fd, b"shared" * 1000, MIB)
    os.pwrite(aside, b"private" * 1000, 2 * MIB)
    save(tmp_path, "s", fd, private=aside)
    assert (tmp_path / "s" / "private.raw").read_bytes() == contents(aside)
    with pytest.raises(QmpError, match="snapshot 's' has private bytes, and 'm' has no room for them"):
        restore(tmp_path, "s", target)
    restore(tmp_path, "s", target, private=second)
    assert (contents(target), contents(second)) == (contents(fd), contents(aside))
    os.pwrite(aside, b"changed", 3 * MIB)
    save(tmp_path, "t", fd, private=aside, parent="s")
    do("verify", tmp_path, "t")
    do("cold", tmp_path, "t")
    assert sorted(os.listdir(tmp_path / "t")) == ["digests.bin", "manifest.json", "map.bin", "memory.zst",
                                                 "private-digests.bin", "private-map.bin", "private.zst"]
    for one in (target, second):
        os.ftruncate(one, 0)
        os.ftruncate(one, 4 * MIB)
    restore(tmp_path, "t", target, private=second)
    assert (contents(target), contents(second)) == (contents(fd), contents(aside))
    for one in (fd, aside, target, second):
        os.close(one)
