"""How a VMM fails, and how its process is ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Final

from gmemd.errors import QmpError

_DEAD: Final = 30.0  # seconds in which a killed process must have ended


class VmmError(QmpError):
    """A VMM did not do what it was told; one sentence, with the VMM's own words."""


def pidfd_of(pid: int) -> int | None:
    """A pidfd; None: the process has ended or cannot be seen from here. The caller owns it."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def end(pid: int) -> None:
    """Kill a process, and wait until it has ended; VmmError: it may not be killed, or does not end."""
    pidfd = pidfd_of(pid)
    if pidfd is not None:
        try:
            kill(pidfd, pid)
        finally:
            os.close(pidfd)


def kill(pidfd: int, pid: int) -> None:
    """The same by its pidfd, which is borrowed."""
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError as exc:
        raise VmmError(f"cannot end process {pid}: {exc.strerror}") from exc
    if not select.select([pidfd], [], [], _DEAD)[0]:
        raise VmmError(f"process {pid} was killed and does not end")
