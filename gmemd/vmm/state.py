"""The bytes of a device state on their way between a file and a VMM's pipe."""

from __future__ import annotations

import os
import select
import stat
import time
from typing import Final

from gmemd.vmm.ending import VmmError

STATE_LIMIT: Final = 1 << 30  # bytes; what a device state may have: one with RAM in it is a mistake
_CHUNK: Final = 1 << 20
_BEGINNING: Final = 1 << 12  # bytes of a stream in which its capabilities are


def copy_state(source: int, target: int, timeout: float, path: str) -> int:
    """Copy until the end; bytes. One of the two is a pipe to the VMM at `path`, and ends when that has ended.

    VmmError: it takes longer than `timeout` (seconds), or the state is as large as one with RAM in it.
    """
    total, deadline = 0, time.monotonic() + timeout

    def ready(fd: int, *, writing: bool) -> None:
        if not is_pipe(fd):
            return
        waiting = ([], [fd]) if writing else ([fd], [])
        if not any(select.select(*waiting, [], max(deadline - time.monotonic(), 0))):
            raise VmmError(f"the VMM at '{path}' has not transferred its state after {timeout:g} s")

    while True:
        ready(source, writing=False)
        data = memoryview(os.read(source, _CHUNK))
        if not data:
            return total
        total += len(data)
        if total > STATE_LIMIT:
            raise VmmError(f"the device state of '{path}' is larger than {STATE_LIMIT >> 20} MiB: "
                           "it would hold RAM")
        while data:
            ready(target, writing=True)
            try:
                data = data[os.write(target, data[:select.PIPE_BUF]) if is_pipe(target)
                            else os.write(target, data):]
            except BrokenPipeError:
                raise VmmError(f"the VMM at '{path}' did not read all of its state") from None


def is_pipe(fd: int) -> bool:
    """Whether a descriptor is a pipe."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def is_whole(fd: int) -> bool:
    """Whether a state in a file is from a stream with the shared RAM: a stream names the capabilities it needs."""
    return b"x-ignore-shared" not in os.pread(fd, _BEGINNING, os.lseek(fd, 0, os.SEEK_CUR))
