"""The rules for ranges, guest_memfd's for every file, and the error for breaking them."""

from __future__ import annotations

import errno
import os
from typing import Final

from gmemd.kernel.uapi import OFFSET_MAX

PAGE_SIZE: Final = os.sysconf("SC_PAGESIZE")  # bytes; 4, 16 or 64 KiB on arm64


def refuse(code: int) -> OSError:
    """The OSError of an errno, as if the kernel had raised it."""
    return OSError(code, os.strerror(code))


def check_range(offset: int, size: int) -> None:
    """Raise what fallocate(2) on a guest_memfd raises for a range: EINVAL (sign, alignment) or EFBIG."""
    if not (0 <= offset <= OFFSET_MAX and 0 < size <= OFFSET_MAX):
        raise refuse(errno.EINVAL)
    if offset + size > OFFSET_MAX:
        raise refuse(errno.EFBIG)
    if (offset | size) % PAGE_SIZE:
        raise refuse(errno.EINVAL)


def check_inside(offset: int, size: int, limit: int) -> None:
    """Also raise EINVAL when the range ends past the file's size."""
    check_range(offset, size)
    if offset + size > limit:
        raise refuse(errno.EINVAL)
