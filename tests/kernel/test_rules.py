"""The rule set on ranges: gmemd's words of it, the real kernel, and the simulation agree on everything."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel.host import errno_of

PAGES = 8
_EDGES = (0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGES * PAGE_SIZE, 1 << 62, (1 << 63) - PAGE_SIZE, 1 << 63, 1 << 64)
amounts = st.one_of(
    st.integers(-2, PAGES + 2).map(lambda page: page * PAGE_SIZE),
    st.builds(lambda edge, more: edge + more, st.sampled_from(_EDGES), st.integers(-2, 2)),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
steps = st.lists(st.tuples(st.sampled_from(["allocate", "punch"]), amounts, amounts), max_size=20)


def bare(fd: int, action: str, offset: int, size: int) -> int:
    """Return the errno of the bare system call; arguments beyond 64 bits cannot be put to it."""
    if not (-(1 << 63) <= offset < 1 << 63 and -(1 << 63) <= size < 1 << 63):
        return errno.EINVAL
    mode = uapi.FALLOC_FL_KEEP_SIZE | (uapi.FALLOC_FL_PUNCH_HOLE if action == "punch" else 0)
    return errno_of(syscalls.fallocate, fd, mode, offset, size)


@pytest.mark.kvm
# the process's first draw reads every module for constants, which a slow machine may take half a minute for
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_the_simulation_keeps_the_real_kernels_rules(
    kernels: Callable[[str], Kernel], steps: list[tuple[str, int, int]]
) -> None:
    """The same requests get the same errno and leave the same pages, from Linux and from the simulation."""
    real, simulated = kernels("kvm"), kernels("simulated")
    whole = PAGES * PAGE_SIZE
    methods = {"allocate": simulated.allocate, "punch": simulated.punch_hole}
    fd, stand_in = real.create_guest_memfd(whole, 3), simulated.create_guest_memfd(whole, 3)
    try:
        for action, offset, size in steps:
            assert bare(fd, action, offset, size) == errno_of(methods[action], stand_in, offset, size)
            assert real.resident_ranges(fd, 0, whole) == simulated.resident_ranges(stand_in, 0, whole)
    finally:
        os.close(fd)
        os.close(stand_in)


def test_ordinary_memfds_keep_the_same_rules(kernel: Kernel) -> None:
    """What Linux would allow on a memfd (growing by allocation, an unaligned punch) gmemd does not do."""
    fd = kernel.memfd_create("ordinary", 0)
    try:
        kernel.truncate(fd, 2 * PAGE_SIZE)
        assert errno_of(kernel.allocate, fd, 0, 3 * PAGE_SIZE) == errno.EINVAL
        assert errno_of(kernel.punch_hole, fd, 1, PAGE_SIZE) == errno.EINVAL
        kernel.allocate(fd, 0, 2 * PAGE_SIZE)
        kernel.punch_hole(fd, PAGE_SIZE, 1 << 30)
        assert kernel.resident(fd) == PAGE_SIZE
        assert os.fstat(fd).st_size == 2 * PAGE_SIZE
    finally:
        os.close(fd)


def test_a_hole_in_sealed_memory_is_refused(kernel: Kernel) -> None:
    """A memfd sealed against writing cannot be punched: EPERM."""
    fd = kernel.memfd_create("sealed", uapi.MFD_ALLOW_SEALING)
    try:
        kernel.truncate(fd, PAGE_SIZE)
        kernel.seal(fd, uapi.F_SEAL_WRITE)
        assert errno_of(kernel.punch_hole, fd, 0, PAGE_SIZE) == errno.EPERM
    finally:
        os.close(fd)
