"""What an object survives here and now, and what to change where it does not.

The facts: a descriptor keeps memory alive, so it matters who else holds one. Clients do not count. systemd's current
settings decide, not the unit file; where systemd has not answered, the result is unknown. Observed behaviour (252, 257,
262): a restart drops the store under FileDescriptorStorePreserve=no, a stop under anything but yes; 254 to 257 forget a
stopped service that no loaded unit refers to; a service with more stored descriptors than LimitNOFILE= cannot start.
A kexec stops the service and carries memfds only (Linux 7.3, systemd 262).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from gmemd.persist.keeping import SPARED, Keeping, Unit
from gmemd.persist.liveupdate import NEEDED

Answer = Literal["yes", "no", "unknown"]

RESTARTS = ("always", "on-failure", "on-abnormal", "on-abort")  # values of Restart= that restart after a kill


class Fate(NamedTuple):
    """Whether an object survives an event, and the advice where it may not."""

    event: str
    answer: Answer
    advice: str = ""

    @property
    def survives(self) -> bool:
        return self.answer == "yes"


_OF_A_CLONE = "what a clone's VMM writes is its own and ends with it: use memdev-clone with copy=true instead"


def fates(kind: str, *, kept: bool, opted_out: bool, keeping: Keeping, clone: bool = False,
          freezes: bool = False) -> list[Fate]:
    """One fate for each event, in order of increasing severity.

    kind: guest-memfd, stand-in (for one), memfd, hugetlb-memfd or file. kept: custody has the object. clone: of a
    template. freezes: it has a seal with which it comes back read-only from a kexec.
    """
    why = "" if kept and keeping.is_there() else _why_not_kept(opted_out, keeping)
    crash, restart, stop = _crash(why, keeping), _restart(why, keeping), _stop(why, keeping)
    return [
        Fate("vmm-crash", "no", _OF_A_CLONE) if clone else Fate("vmm-crash", "yes"),
        Fate("vmm-replaced", *_replaced(kind, clone)),
        Fate("client-disconnect", "yes"),
        Fate("gmemd-crash", *crash),
        Fate("gmemd-upgrade", *restart),
        Fate("service-stop", *stop),
        Fate("soft-reboot", *_soft_reboot(stop, keeping)),
        Fate("kexec", "no", _OF_A_CLONE) if clone else Fate("kexec", *_kexec(kind, stop, keeping, freezes=freezes)),
        Fate("power-loss", "no", "memory is lost without power: save what must not be lost with gmemctl snapshot"),
    ]


_Verdict = tuple[Answer, str]


def _replaced(kind: str, clone: bool) -> _Verdict:
    """The guest goes on in another VMM, by gmemctl replace."""
    if clone:
        return "no", _OF_A_CLONE
    if kind in ("guest-memfd", "stand-in"):
        return "no", "no QEMU opens a guest_memfd by its path: start both with gmemctl run --capture, or use a memfd"
    return "yes", ""


def _why_not_kept(opted_out: bool, keeping: Keeping) -> str:
    if keeping.manager == "none":
        return "start gmemd under systemd or with --keeper"
    if not keeping.is_there():
        return "the keeper has ended and only this daemon holds the memory: save what you need, then start a keeper"
    return "turn it on with memdev-persist" if opted_out else "start gmemd without --persist off"


def _restart(why: str, keeping: Keeping) -> _Verdict:
    """The service is restarted by the manager that keeps its memory."""
    if why:
        return "no", why
    if keeping.manager == "keeper":
        return "yes", ""
    unit = keeping.unit
    if unit is None:
        return "unknown", _to_ask("FileDescriptorStorePreserve,NFileDescriptorStore,LimitNOFILESoft,Restart", keeping)
    trouble = _trouble(unit, keeping)
    return ("no", trouble) if trouble else ("yes", "")


def _trouble(unit: Unit, keeping: Keeping) -> str:
    """Why the next start would not get everything; "" when it will."""
    if not unit.loaded:
        return f"the unit file of {unit.name} is missing: restore it, then systemctl daemon-reload"
    if keeping.missing:
        short = f"systemd holds {keeping.held - keeping.missing} of {keeping.held} descriptors"
        raised = (f"set FileDescriptorStoreMax= to at least {keeping.held} (it is {unit.limit}), "
                  "then systemctl daemon-reload")
        return _as_told(keeping, f"{short}: {raised if unit.limit < keeping.held else 'see the journal'}")
    if unit.preserve == "no":
        return "set FileDescriptorStorePreserve=yes, then systemctl daemon-reload"
    if keeping.held + SPARED > unit.nofile:
        return _as_told(keeping, f"the next start needs {keeping.held} descriptors: set LimitNOFILE= to at least "
                                 f"{keeping.held + SPARED} (it is {unit.nofile}), then systemctl daemon-reload")
    return ""


def _as_told(keeping: Keeping, advice: str) -> str:
    """Advice with figures of everybody's objects, or where it is found by those who may know them."""
    return advice if keeping.told else "a limit of this host is too low: its operator can see which"


def _crash(why: str, keeping: Keeping) -> _Verdict:
    again = _restart(why, keeping)
    unit = keeping.unit
    if again[0] == "yes" and unit is not None and unit.restart not in RESTARTS and unit.preserve != "yes":
        return "no", f"set Restart=always (it is {unit.restart}), then systemctl daemon-reload"
    return again


def _stop(why: str, keeping: Keeping) -> _Verdict:
    if why:
        return "no", why
    if keeping.manager == "keeper":
        return "no", "the memory ends with the keeper: use systemd 254 or newer instead"
    unit = keeping.unit
    if keeping.old or (unit is not None and not unit.preserve):
        return "no", "use systemd 254 or newer with FileDescriptorStorePreserve=yes"
    if unit is None:
        return "unknown", _to_ask("FileDescriptorStorePreserve,NFileDescriptorStore,LimitNOFILESoft", keeping)
    again = _restart(why, keeping)
    if again[0] != "yes":
        return again
    if unit.preserve != "yes":
        return ("no" if unit.preserve == "restart" else "unknown",
                f"set FileDescriptorStorePreserve=yes (it is {unit.preserve}), then systemctl daemon-reload")
    if not unit.referred:
        socket = unit.name.removesuffix(".service") + ".socket"
        return "no", f"systemd forgets a stopped service that nothing refers to: systemctl enable {socket}"
    return "yes", ""


def _soft_reboot(stop: _Verdict, keeping: Keeping) -> _Verdict:
    return ("unknown", "not tried: run gmemd under the system's systemd") if stop[0] == "yes" and keeping.user else stop


def _to_ask(properties: str, keeping: Keeping) -> str:
    user = "--user " if keeping.user else ""
    return f"systemd could not be asked: see systemctl {user}show -p {properties} {keeping.name}"


def _kexec(kind: str, stop: _Verdict, keeping: Keeping, *, freezes: bool) -> _Verdict:
    if stop[0] == "no":
        return stop
    if kind not in ("memfd", "stand-in"):
        return "no", f"no kernel carries a {kind} across kexec: use a memfd without huge pages"
    if not keeping.live_update or keeping.unit is None or keeping.unit.kexec[0] == "no":
        return _no_live_update(stop, keeping)
    if keeping.user:
        return "unknown", "not tried: run gmemd under the system's systemd"
    if not keeping.copied:
        return "no", (f"systemd has no room for a copy of the registry: raise FileDescriptorStoreMax= "
                      f"(it is {keeping.unit.limit}), then systemctl daemon-reload")
    if freezes:
        return "no", "it would come back read-only: set the sysctl vm.memfd_noexec to 1 or 0 and create it again"
    if keeping.filling > keeping.available:
        return "no", _as_told(keeping, "a live update fills the holes of sparse memory: it would allocate "
                                       f"{keeping.filling} bytes, and {keeping.available} are available")
    return stop if stop[0] != "yes" else keeping.unit.kexec


def _no_live_update(stop: _Verdict, keeping: Keeping) -> _Verdict:
    """What is missing on this host, as far as it is known."""
    if keeping.unit is not None and keeping.unit.kexec[0] == "no":
        return keeping.unit.kexec
    return stop if keeping.live_update else ("no", NEEDED)
