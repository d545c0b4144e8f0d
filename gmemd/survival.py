"""What an object outlives, here and now, and what would have to change where it does not.

The facts: a descriptor keeps memory alive; who else holds one decides.  Clients are not counted on.
systemd: 254 brought FileDescriptorStorePreserve= and $FDSTORE, 261 kexec by the kernel's Live Update Orchestrator.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Keeping(NamedTuple):
    """Who keeps descriptors for this daemon."""

    manager: str = "none"  # "none", "keeper" or "systemd"
    preserve: bool = False  # the unit has FileDescriptorStorePreserve=yes, and systemd knows it (254)
    live_update: bool = False  # /dev/liveupdate is there and systemd hands the store on (261)
    pid: int = 0  # the keeper's, the parent of this process; 0: a manager that is not watched

    def is_there(self) -> bool:
        """Tell whether the keeper still runs: an orphan has another parent."""
        return self.pid in (0, os.getppid())


class Fate(NamedTuple):
    """Whether an object outlives an event, and the advice where it does not."""

    event: str
    survives: bool
    advice: str = ""


def fates(kind: str, *, kept: bool, opted_out: bool, keeping: Keeping) -> list[Fate]:
    """One fate for each event there is, in rising order of violence.

    kind: guest-memfd, memfd, hugetlb-memfd or file. kept: custody has the object.
    """
    kept = kept and keeping.is_there()
    why = _why_not_kept(opted_out, keeping)
    crash = Fate("gmemd-crash", kept, "" if kept else why)
    return [
        Fate("vmm-crash", True),
        Fate("client-disconnect", True),
        crash,
        Fate("gmemd-upgrade", kept, crash.advice),
        _service_stop(kept, why, keeping),
        _soft_reboot(kept, why, keeping),
        _kexec(kind, kept, why, keeping),
        Fate("power-loss", False, "memory ends with the power: copy what must not be lost to a disk"),
    ]


def _why_not_kept(opted_out: bool, keeping: Keeping) -> str:
    if keeping.manager == "none":
        return "start gmemd by systemd or with --keeper"
    if not keeping.is_there():
        return "the keeper has ended and this daemon alone holds the memory: copy what must stay, then start a keeper"
    return "turn it on with memdev-persist" if opted_out else "start gmemd without --persist off"


def _service_stop(kept: bool, why: str, keeping: Keeping) -> Fate:
    if not kept:
        return Fate("service-stop", False, why)
    if keeping.manager == "keeper":
        return Fate("service-stop", False, "the keeper's end is the memory's end: let systemd 254 or newer keep it")
    if not keeping.preserve:
        return Fate("service-stop", False, "use systemd 254 or newer with FileDescriptorStorePreserve=yes")
    return Fate("service-stop", True)


def _soft_reboot(kept: bool, why: str, keeping: Keeping) -> Fate:
    stop = _service_stop(kept, why, keeping)
    return Fate("soft-reboot", stop.survives, stop.advice)


def _kexec(kind: str, kept: bool, why: str, keeping: Keeping) -> Fate:
    if not kept:
        return Fate("kexec", False, why)
    if kind != "memfd":
        return Fate("kexec", False, f"no kernel carries a {kind} over kexec: use a memfd without huge pages")
    if not keeping.live_update:
        return Fate("kexec", False, "use Linux 6.19 with /dev/liveupdate and systemd 261 or newer")
    return Fate("kexec", keeping.preserve, "" if keeping.preserve else "set FileDescriptorStorePreserve=yes")
