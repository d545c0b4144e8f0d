"""Who keeps the descriptors, and what is known about it."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from gmemd.persist.liveupdate import Verdict

UNLIMITED: Final = 1 << 30  # descriptors
SPARED: Final = 64  # descriptors that a start needs for itself, besides those that it is given


class Unit(NamedTuple):
    """What systemd reports for the service, by its properties."""

    name: str = "gmemd.service"
    loaded: bool = True  # LoadState: the unit file exists
    preserve: str = "yes"  # FileDescriptorStorePreserve; "": systemd before 254, which does not know it
    limit: int = 1024  # FileDescriptorStoreMax
    stored: int = 0  # NFileDescriptorStore
    nofile: int = 16384  # LimitNOFILESoft, of the next start
    restart: str = "always"  # Restart
    referred: bool = True  # it stays loaded when stopped
    kexec: Verdict = ("unknown", "")  # whether this host carries memfds across a kexec


class Keeping(NamedTuple):
    """Who keeps descriptors for this daemon."""

    manager: str = "none"  # "none", "keeper" or "systemd"
    unit: Unit | None = None  # what systemd reports for the service; None: it cannot be asked
    name: str = "gmemd.service"  # of the service, as far as known
    old: bool = False  # systemd before 254
    user: bool = False  # systemd of a user, which ends with a soft-reboot
    live_update: bool = False  # the kernel was started with live update
    copied: bool = False  # the manager has a copy of the registry
    filling: int = 0  # bytes that a live update would allocate, for the holes of all memory
    available: int = 0  # bytes that can be allocated for that
    held: int = 0  # descriptors that it is to hold
    missing: int = 0  # how many of them it does not hold
    told: bool = True  # such figures of everybody's objects may be told
    pid: int = 0  # the keeper's, the parent of this process; 0: a manager that is not watched

    def is_there(self) -> bool:
        """Whether the keeper still runs: an orphan has another parent."""
        return self.pid in (0, os.getppid())
