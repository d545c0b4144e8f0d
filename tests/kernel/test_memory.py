"""What is real in both kernels: making, sizing, sealing, mapping and naming memory."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.kernel import uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE
from gmemd.kernel.simulated import SimulatedKernel
from tests.kernel.host import errno_of, hugepage_size

GIB = 1 << 30


@pytest.fixture
def memfd(kernel: Kernel) -> Iterator[int]:
    """A memfd that can be sealed, without a size yet; closed after the test."""
    fd = kernel.memfd_create("ordinary", uapi.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def test_a_memfd_is_close_on_exec(kernel: Kernel) -> None:
    """CLOEXEC is set also where the flags lack it."""
    fd = kernel.memfd_create("ordinary", 0)
    inheritable = os.get_inheritable(fd)
    os.close(fd)
    assert not inheritable


def test_unknown_flags_and_pages_are_refused(kernel: Kernel) -> None:
    """memfd_create's own errors come through: EINVAL, and ENODEV for a page size the machine lacks."""
    assert errno_of(kernel.memfd_create, "x", 0x100) == errno.EINVAL
    huge_8k = uapi.MFD_HUGETLB | 13 << uapi.MFD_HUGE_SHIFT
    assert errno_of(kernel.memfd_create, "x", huge_8k) == errno.ENODEV


@pytest.mark.parametrize("size", [-1, 1 << 63, (1 << 64) - 1, 1 << 64])
def test_sizes_beyond_a_file_are_einval(kernel: Kernel, memfd: int, size: int) -> None:
    """No number overflows: from 2^63 on, and below 0, it is EINVAL; then a right one works."""
    code = errno_of(kernel.truncate, memfd, size)
    kernel.truncate(memfd, PAGE_SIZE)
    actual = os.fstat(memfd).st_size
    assert (code, actual) == (errno.EINVAL, PAGE_SIZE)


def test_seals_hold(kernel: Kernel, memfd: int) -> None:
    """A size that is sealed stays; a seal cannot be added to what is sealed."""
    kernel.truncate(memfd, PAGE_SIZE)
    kernel.seal(memfd, uapi.F_SEAL_SHRINK | uapi.F_SEAL_GROW | uapi.F_SEAL_SEAL)
    codes = (
        errno_of(kernel.truncate, memfd, 0),
        errno_of(kernel.truncate, memfd, 2 * PAGE_SIZE),
        errno_of(kernel.seal, memfd, uapi.F_SEAL_WRITE),
    )
    assert codes == (errno.EPERM,) * 3


def test_maps_raise_what_mmap_raises(kernel: Kernel, memfd: int) -> None:
    """EINVAL for nothing and for half a page, ENOMEM beyond the address space; then right ones work."""
    kernel.truncate(memfd, 1 << 62)
    codes = (
        errno_of(kernel.try_map, memfd, 0, reserve=True),
        errno_of(kernel.try_map, memfd, PAGE_SIZE, reserve=True, offset=1),
        errno_of(kernel.try_map, memfd, 1 << 62, reserve=True),
        errno_of(kernel.try_map, None, 1 << 63, reserve=True),
    )
    kernel.try_map(memfd, GIB, reserve=True)
    kernel.try_map(memfd, GIB, reserve=True, shared=False, writable=False, offset=GIB)
    kernel.try_map(None, 1 << 40, reserve=False)
    assert codes == (errno.EINVAL, errno.EINVAL, errno.ENOMEM, errno.ENOMEM)


def test_maps_need_the_access_they_ask_for(kernel: Kernel, tmp_path: Path) -> None:
    """A file opened for reading is mapped to read, or to write in private, not to write shared: EACCES."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE_SIZE))
    fd = os.open(path, os.O_RDONLY)
    code = errno_of(kernel.try_map, fd, PAGE_SIZE, reserve=True)
    kernel.try_map(fd, PAGE_SIZE, reserve=True, writable=False)
    kernel.try_map(fd, PAGE_SIZE, reserve=True, shared=False)
    os.close(fd)
    assert code == errno.EACCES


def test_what_is_no_memory_cannot_be_mapped(kernel: Kernel) -> None:
    """A device without memory is ENODEV."""
    fd = os.open("/dev/null", os.O_RDWR)
    code = errno_of(kernel.try_map, fd, PAGE_SIZE, reserve=True)
    os.close(fd)
    assert code == errno.ENODEV


def test_files_are_named_by_what_they_are(kernel: Kernel, tmp_path: Path) -> None:
    """guest_memfd (real or not), memfd, hugetlb memfd, file, and anything else."""
    path = tmp_path / "[kvm-gmem]"  # a name proves nothing
    path.touch()
    one, two = socket.socketpair()
    named = {
        "guest-memfd": kernel.create_guest_memfd(PAGE_SIZE, 3),
        "memfd": kernel.memfd_create("ordinary", 0),
        "hugetlb-memfd": kernel.memfd_create("huge", uapi.MFD_HUGETLB),
        "file": os.open(path, os.O_RDWR),
    }
    actual = {expected: kernel.identify(fd) for expected, fd in named.items()}
    other = kernel.identify(one.fileno()), kernel.identify(named["file"])
    for fd in named.values():
        os.close(fd)
    one.close()
    two.close()
    assert actual == {name: name for name in named}
    assert other == ("other", "file")


def test_a_stand_in_is_told_from_the_real_one(kernel: Kernel) -> None:
    """Whichever kernel asks later, the fd itself says whether it is simulated."""
    fd = kernel.create_guest_memfd(PAGE_SIZE, 3)
    simulated = kernel.is_simulated(fd)
    os.close(fd)
    assert simulated == kernel.simulated


def test_a_memfd_that_only_has_the_name_is_no_stand_in(kernel: Kernel) -> None:
    """A client's memfd of that name, open to resizing, stays a memfd."""
    fd = kernel.memfd_create("gmemd-guest-memfd:3", uapi.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    kind = kernel.identify(fd)
    os.close(fd)
    assert kind == "memfd"


def test_a_closed_fd_is_ebadf(kernel: Kernel) -> None:
    """Each operation says so, none does anything else."""
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    for call in (kernel.allocate, kernel.punch_hole, kernel.resident):
        assert errno_of(call, read, 0, PAGE_SIZE) == errno.EBADF
    assert errno_of(kernel.populate, read, 0, PAGE_SIZE, 1) == errno.EBADF
    assert errno_of(kernel.set_policy, read, PAGE_SIZE, "bind", [0]) == errno.EBADF


def test_pages_behind_a_file(kernel: Kernel, tmp_path: Path) -> None:
    """Ordinary pages, and huge ones behind a hugetlb memfd of the default size."""
    plain = kernel.memfd_create("ordinary", 0)
    huge = kernel.memfd_create("huge", uapi.MFD_HUGETLB)
    sizes = kernel.file_page_size(plain), kernel.file_page_size(huge)
    os.close(plain)
    os.close(huge)
    assert sizes == (PAGE_SIZE, hugepage_size())


def test_a_stand_in_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live update leaves it bytes and seals; what it is has to be said again."""
    kernel = SimulatedKernel()
    fd = os.memfd_create("", os.MFD_ALLOW_SEALING)
    monkeypatch.setattr(os, "readlink", lambda path: "/ (deleted)")
    try:
        assert (kernel.identify(fd), kernel.is_simulated(fd)) == ("memfd", False)
        kernel.recall(fd, uapi.GUEST_MEMFD_SHARED, kernel.name)
        assert (kernel.identify(fd), kernel.is_simulated(fd)) == ("guest-memfd", True)
        with pytest.raises(OSError, match="Invalid argument"):
            kernel.check_mapping(fd, shared=False)
    finally:
        os.close(fd)
