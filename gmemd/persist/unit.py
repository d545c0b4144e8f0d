"""Ask systemd how it really treats this service: drop-ins and links change that while the daemon runs.

It uses systemctl, which works over D-Bus in the shipped unit's sandbox. Without systemctl (in a container) or a bus
there is no answer.
"""

from __future__ import annotations

import os
from typing import Final

from gmemd.persist.keeping import UNLIMITED, Unit
from gmemd.persist.liveupdate import judge

TIMEOUT: Final = 5.0  # seconds for an answer; a reload of thousands of descriptors takes pid 1 as long
_RUN: Final = "/run/systemd"  # a reload recreates the directories of its generators in there
_PROPERTIES: Final = ("LoadState", "FileDescriptorStorePreserve", "FileDescriptorStoreMax", "NFileDescriptorStore",
                      "LimitNOFILESoft", "Restart", "TriggeredBy")
_FORGETS_NOTHING: Final = 262  # the version of systemd from which a service with stored descriptors stays loaded


def own_unit(text: str | None = None) -> str:
    """The service that this process belongs to, by its control groups (proc_pid_cgroup(5)); "": unknown."""
    try:
        if text is None:
            with open("/proc/self/cgroup") as file:
                text = file.read()
    except OSError:
        return ""
    groups = dict(line.split(":", 2)[1:] for line in text.splitlines() if line.count(":") >= 2)
    path = groups.get("name=systemd", groups.get("", ""))
    services = [part for part in path.split("/") if part.endswith(".service")]
    return services[-1] if services else ""


def mark() -> int:
    """A value that changes when systemd is reloaded; 0: unknown."""
    try:
        return os.stat(_RUN).st_mtime_ns
    except OSError:
        return 0


def ask(name: str, *, user: bool = False, timeout: float = TIMEOUT) -> Unit | None:
    """What systemd reports for a service, or None where it does not answer.

    Blocks. user: it is a service of this user's systemd.
    """
    who = ("--user",) if user else ()
    [said] = _show(who, _PROPERTIES, (name,), timeout) or [{}]
    if "LoadState" not in said or "NFileDescriptorStore" not in said:
        return None
    unit = Unit(name=name, loaded=said["LoadState"] == "loaded", preserve=said.get("FileDescriptorStorePreserve", ""),
                limit=_number(said.get("FileDescriptorStoreMax", "")), stored=_number(said["NFileDescriptorStore"]),
                nofile=_number(said.get("LimitNOFILESoft", "")), restart=said.get("Restart", ""), referred=True)
    if unit.preserve != "yes":
        return unit
    [manager] = _show(who, ("Version",), (), timeout) or [{}]
    version = version_of(manager.get("Version", ""))
    stays = version >= _FORGETS_NOTHING or _is_referred_to(who, name, said.get("TriggeredBy", "").split(), timeout)
    return unit._replace(referred=stays, kexec=judge(version))


def _is_referred_to(who: tuple[str, ...], name: str, triggers: list[str], timeout: float) -> bool:
    """Does an enabled unit, usually a socket, refer to the service?"""
    others = _show(who, ("WantedBy", "RequiredBy"), tuple(triggers), timeout) if triggers else []
    return bool({unit for other in others for units in other.values() for unit in units.split()} - {name})


def version_of(text: str) -> int:
    """The number in systemd's version, such as "257.9-1"; 0: there is none."""
    digits = "".join(letter if letter.isdecimal() else " " for letter in text).split()
    return int(digits[0]) if digits else 0


def _show(who: tuple[str, ...], properties: tuple[str, ...], names: tuple[str, ...],
          timeout: float) -> list[dict[str, str]]:
    """The properties of each unit, or without units of the manager; [] without an answer."""
    import subprocess  # not at start: few daemons ask

    words = ["systemctl", *who, "show", f"--property={','.join(properties)}", *names]
    try:
        said = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, check=True, timeout=timeout).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [dict(line.partition("=")[::2] for line in block.splitlines()) for block in said.split("\n\n")]


def _number(text: str) -> int:
    return UNLIMITED if text == "infinity" else int(text) if text.isdecimal() else 0
