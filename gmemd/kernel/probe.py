"""What a kernel does when each item is really tried; `gmemctl doctor` shows it, a profile promises it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from gmemd.kernel import uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE

SIZES = {"0": 0, "1": 1, "page-1": PAGE_SIZE - 1, "page+1": PAGE_SIZE + 1, "2^63": 1 << 63}
FLAGS = range(9)


def outcome(call: Callable[[], Any]) -> str:
    """How a call ends: "OK", or the name of the errno that it raises, as spelt in the kernel's headers."""
    try:
        call()
    except OSError as exc:
        return name_of(exc)
    return "OK"


def name_of(error: OSError) -> str:
    """The name of its errno."""
    code = error.errno or 0
    return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))


def attempt(kernel: Kernel) -> dict[str, str]:
    """{item: outcome} for the kernel's own methods; every fd is closed again."""
    found = {f"create flags={flags}": outcome(partial(_make, kernel, PAGE_SIZE, flags)) for flags in FLAGS}
    legal = kernel.guest_memfd_flags or 0
    for name, size in SIZES.items():
        found[f"create size={name}"] = outcome(partial(_make, kernel, size, legal & uapi.GUEST_MEMFD_SHARED))
    for flags in range(4):
        if found[f"create flags={flags}"] == "OK":
            found |= _mappings(kernel, flags)
    return found


def _make(kernel: Kernel, size: int, flags: int) -> None:
    os.close(kernel.create_guest_memfd(size, flags))


def _mappings(kernel: Kernel, flags: int) -> dict[str, str]:
    fd = kernel.create_guest_memfd(PAGE_SIZE, flags)
    calls = {
        "map shared": partial(kernel.try_map, fd, PAGE_SIZE, reserve=True),
        "map private": partial(kernel.try_map, fd, PAGE_SIZE, reserve=True, shared=False),
        "allocate": partial(kernel.allocate, fd, 0, PAGE_SIZE),
        "allocate past the end": partial(kernel.allocate, fd, PAGE_SIZE, PAGE_SIZE),
        "punch": partial(kernel.punch_hole, fd, 0, PAGE_SIZE),
        "punch past the end": partial(kernel.punch_hole, fd, PAGE_SIZE, PAGE_SIZE),
    }
    try:
        return {f"{name} flags={flags}": outcome(call) for name, call in calls.items()}
    finally:
        os.close(fd)
