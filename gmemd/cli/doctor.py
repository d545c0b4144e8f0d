"""gmemctl doctor: what this host offers gmemd, and the consequences where something is missing.

It examines the host itself, as the calling user, and needs no daemon; one that runs is asked whether it has a
policy.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gmemd.objects.survival import fates
from gmemd.persist.keeping import SPARED, Keeping, Unit
from gmemd.persist.liveupdate import holes, is_on
from gmemd.persist.unit import ask, version_of

GOOD, NOTE, BAD = "ok", "note", "BAD"
SERVICE = "gmemd.service"
_BUS = "/run/dbus/system_bus_socket"  # the daemon asks systemd through it
_PODMAN = 1000  # the container unit's limit: podman 4.3 cannot start with 1,020
_EVENTS = {"gmemd-crash": True, "gmemd-upgrade": True, "service-stop": False, "soft-reboot": False,
           "kexec": False}  # and whether a service that is to keep memory must survive it
PROBE = "probe: "  # for programs: the result of each single probe of the kernel


class Finding(NamedTuple):
    """One line: what was examined, its value, the verdict, and the consequence."""

    item: str
    found: str
    verdict: str
    follows: str = ""


def findings() -> list[Finding]:
    return [finding for check in (_kernel, _kvm, _memory, _limits, _systemd) for finding in check()]


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in (release + ".0").split(".")[:2])
    if (major, minor) >= (6, 18):
        yield Finding("kernel", release, GOOD)
    else:
        yield Finding("kernel", release, NOTE, "a guest_memfd that can be mapped needs Linux 6.18: simulated here")


def _kvm() -> Iterator[Finding]:
    from gmemd.kernel.choose import choose_kernel

    kernel = choose_kernel("auto")
    try:
        real = kernel.name == "kvm"
        yield Finding("guest_memfd", kernel.name, GOOD if real else NOTE,
                      "" if real else f"{kernel.why}: objects are simulated, --kernel kvm is refused")
        flags = kernel.guest_memfd_flags
        yield Finding("guest_memfd flags", "none" if flags is None else f"{flags:#x}", GOOD,
                      "" if kernel.conversion and real else "conversion between private and shared is simulated")
        for item, outcome in kernel.probe().items():
            yield Finding(f"{PROBE}{item}", str(outcome), GOOD)
    finally:
        kernel.close()


def _memory() -> Iterator[Finding]:
    from gmemd.cli.render import size
    from gmemd.kernel.choose import choose_kernel

    kernel = choose_kernel("simulated")
    room = kernel.headroom()
    yield Finding("head-room", f"{size(room.available)} of {size(room.total)}", GOOD, f"limited by {room.limit}")
    pools = [pool for pool in kernel.huge_pools() if pool.node is None]
    for pool in pools:
        free = f"{pool.free} free of {pool.total}"
        yield Finding(f"huge pages of {size(pool.page_size)}", free, GOOD if pool.free else NOTE,
                      "" if pool.free else "hugetlb=on is refused until some are reserved (vm.nr_hugepages)")
    if not pools:
        yield Finding("huge pages", "none", NOTE, "hugetlb=on is refused")


def _limits() -> Iterator[Finding]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("RLIMIT_NOFILE", f"{files} (hard {hard})", GOOD if hard >= 4096 else NOTE,
                  "" if hard >= 4096 else "each object takes one descriptor: raise LimitNOFILE=")
    for item, verdict, follows in (
            ("RLIMIT_MEMLOCK", GOOD, "guest_memfd needs none; a VMM that locks its memory does"),
            ("RLIMIT_FSIZE", BAD, "memfds larger than this are refused")):
        limit, _ = resource.getrlimit(getattr(resource, item))
        limited = limit != resource.RLIM_INFINITY
        yield Finding(item, str(limit), verdict, follows) if limited else Finding(item, "unlimited", GOOD)
    yield Finding("cgroup", _cgroup(), GOOD)


def _cgroup() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "unknown"
    groups = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    return f"{groups.get('', groups.get('memory', '/'))} ({'v1' if 'memory' in groups else 'v2'})"


def _systemd() -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        yield Finding("service manager", "no systemd", NOTE, "start gmemd with --keeper, or nothing is kept")
        return
    version = version_of(_systemctl("--version"))
    if version >= 254:
        yield Finding("service manager", f"systemd {version}", GOOD, "can keep memory across stop and soft-reboot too")
    else:
        yield Finding("service manager", f"systemd {version or 'of unknown version'}", NOTE,
                      "keeps memory across crash and restart, not across systemctl stop (needs 254), "
                      "and does not tell gmemd its FileDescriptorStoreMax=")
    environment = _systemctl("show", "--value", "--property=Environment", SERVICE).split()
    configured = dict(word.partition("=")[::2] for word in environment).get("GMEMD_FDSTORE", "")
    announced = version >= 254 or (not configured and os.path.exists(_BUS))
    contained = "podman" in _systemctl("show", "--value", "--property=ExecStart", SERVICE)
    yield from judge_service(ask(SERVICE), configured, announced=announced, old=0 < version < 254, contained=contained)


def judge_service(unit: Unit | None, configured: str, *, announced: bool, old: bool,
                  contained: bool = False) -> Iterator[Finding]:
    """The consequences of the service's settings for objects; `old`: systemd before 254.

    contained: podman starts the daemon, and passes on fewer descriptors than systemd could.
    """
    if unit is not None and not unit.loaded and not unit.stored:
        yield Finding(SERVICE, "not installed", NOTE, "see docs/systemd.md, or start gmemd with --keeper")
        return
    if unit is not None:
        yield judge_fd_store(unit.limit, configured, announced=announced)
        yield judge_descriptors(unit)
        if contained and unit.limit + SPARED > _PODMAN:
            unit = unit._replace(nofile=min(unit.nofile, _PODMAN))
            yield Finding("descriptors that podman can pass on", str(_PODMAN), NOTE,
                          f"gmemd keeps at most about {_PODMAN - SPARED} objects, whatever systemd's settings are")
    filling, available = _holes()
    keeping = Keeping("systemd", unit=unit, held=0 if unit is None else unit.stored, old=old,
                      live_update=is_on(), copied=True, filling=filling, available=available)
    for fate in fates("memfd", kept=True, opted_out=False, keeping=keeping):
        if fate.event in _EVENTS:
            verdict = GOOD if fate.survives else BAD if fate.answer == "no" and _EVENTS[fate.event] else NOTE
            yield Finding(f"memory after {fate.event}", "kept" if fate.survives else {"no": "lost"}.get(
                fate.answer, fate.answer), verdict, fate.advice)


def _holes() -> tuple[int, int]:
    """What a live update would allocate for what systemd stores, for all services, and what is available; in bytes.

    Only root can see the former.
    """
    from gmemd.kernel.headroom import HeadroomReader

    place = "/proc/1/fd"
    stored: list[str] = []
    with contextlib.suppress(OSError):
        stored = [f"{place}/{name}" for name in os.listdir(place) if is_on()]
    memfds = []
    for path in stored:
        with contextlib.suppress(OSError):
            memfds += [path] if os.readlink(path).startswith(("/memfd:", "/ (deleted)")) else []
    return holes(memfds), HeadroomReader().read_all()[0].available


def judge_policy(rights: dict[str, Any] | None) -> Finding:
    """Who may do what with a running gmemd; `rights`: its answer to query-memdev-rights, None: there is none."""
    if rights is None:
        return Finding("policy", "unknown", NOTE, "no gmemd that lets you in and can tell runs at this socket")
    if rights["policy"]:
        return Finding("policy", f"in force, you are {rights['role']}", GOOD)
    return Finding("policy", "none", NOTE, "root, gmemd's own user and the group of its socket may do everything, "
                   "others nothing: --policy FILE says who may do what")


def judge_descriptors(unit: Unit) -> Finding:
    """The consequences of LimitNOFILE=."""
    item, found = "LimitNOFILE=", str(unit.nofile)
    if unit.stored + SPARED > unit.nofile:
        return Finding(item, found, BAD, f"the service cannot be started with the {unit.stored} descriptors that are "
                       f"stored: set it to at least {unit.stored + SPARED}")
    if unit.limit + SPARED > unit.nofile:
        return Finding(item, found, NOTE, f"gmemd keeps at most about {max(0, unit.nofile - SPARED)} objects: "
                       f"FileDescriptorStoreMax={unit.limit} needs at least {unit.limit + SPARED}")
    return Finding(item, found, GOOD)


def judge_fd_store(limit: int, configured: str, *, announced: bool) -> Finding:
    """The consequences of FileDescriptorStoreMax= and $GMEMD_FDSTORE; `announced`: gmemd is told the former."""
    from gmemd.persist.notify import store_limit

    item, found = "FileDescriptorStoreMax=", str(limit)
    counted = limit if announced else store_limit({"GMEMD_FDSTORE": configured})
    if limit == 0:
        return Finding(item, found, BAD, "systemd keeps nothing: give gmemd.service a FileDescriptorStoreMax=")
    if counted > limit:
        return Finding(item, found, BAD, f"gmemd assumes {counted}, but systemd silently drops what exceeds "
                       f"{limit}: also set Environment=GMEMD_FDSTORE={limit}")
    if counted < limit:
        return Finding(item, found, NOTE, f"gmemd keeps at most {counted} objects: also set "
                       f"Environment=GMEMD_FDSTORE={limit}")
    return Finding(item, found, GOOD)


def _systemctl(*words: str) -> str:
    try:
        return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
