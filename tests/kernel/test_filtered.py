"""A filter of system calls that knows no cachestat, as older container tools have it: guest_memfd stays real."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gmemd.kernel import residency
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE

_PROGRAM = """
import ctypes, json, mmap, os, struct, sys
from contextlib import closing
from gmemd.kernel import uapi
from gmemd.kernel.choose import choose_kernel

# struct sock_filter of linux/filter.h: load the call's number; if it is cachestat, SECCOMP_RET_ERRNO, else ALLOW
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, uapi.SYS_CACHESTAT), (0x06, 0, 0, 0x00050000 | int(sys.argv[2])),
         (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
program = struct.pack("@HP", len(steps), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program, 0, 0), ctypes.get_errno()

with closing(choose_kernel(sys.argv[1])) as kernel:
    fd = kernel.create_guest_memfd(8 * kernel.page_size, 3)
    kernel.allocate(fd, 0, kernel.page_size)
    with mmap.mmap(fd, 8 * kernel.page_size) as memory:
        memory[5 * kernel.page_size] = memory[6 * kernel.page_size] = 1
    ranges = kernel.present_ranges(fd, 0, 8 * kernel.page_size)
    private = kernel.memfd_create("private", 0)
    kernel.truncate(private, 8 * kernel.page_size)
    os.pwrite(private, b"x", 2 * kernel.page_size)
    print(json.dumps([kernel.name, kernel.why, kernel.resident(fd), ranges,
                      kernel.present_ranges(private, 0, 8 * kernel.page_size), kernel.resident(private)]))
"""


def filtered(kernel: str, number: int) -> list[Any]:
    """What a process sees to which cachestat answers with an errno."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, kernel, str(number)], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_kvm_is_used_all_the_same(kernel: Kernel, number: int) -> None:
    """What was touched is found by mincore, and `why` says what is not counted; simulated, blocks count it all."""
    pages = 2 if kernel.name == "kvm" else 3

    name, why, resident, ranges, private, private_resident = filtered(kernel.name, number)

    assert kernel.name == name
    assert (kernel.name == "kvm") == ("cachestat is refused" in why)
    assert pages * PAGE_SIZE == resident
    assert ranges == [[5 * PAGE_SIZE, 2 * PAGE_SIZE]]
    assert private == [[2 * PAGE_SIZE, PAGE_SIZE]]
    assert private_resident == PAGE_SIZE


def test_untouched_pages_hold_no_data(kernel: Kernel) -> None:
    """Pages of a memfd that were allocated and never written are present, and hold nothing."""
    fd = kernel.memfd_create("memory", 0)
    try:
        kernel.truncate(fd, 8 * PAGE_SIZE)
        kernel.allocate(fd, 0, 4 * PAGE_SIZE)
        os.pwrite(fd, b"x", PAGE_SIZE)
        assert kernel.resident(fd) == 4 * PAGE_SIZE
        assert kernel.present_ranges(fd, 0, 8 * PAGE_SIZE) == [(0, 4 * PAGE_SIZE)]
        assert residency.data_ranges(fd, 0, 8 * PAGE_SIZE) == [(PAGE_SIZE, PAGE_SIZE)]
    finally:
        os.close(fd)
