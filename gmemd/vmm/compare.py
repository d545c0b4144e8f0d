"""Whether one VMM can take over the guest of another: the same machine, the same devices, the same memory.

QEMU checks that what the state has is there; an extra device, another CPU model or another disk it accepts silently,
and the guest finds itself in a machine that it does not know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Backend, Qemu

_SHOWN = 3  # differences that are told

Machine = dict[str, str]  # what a guest sees of it, by a name for people


class Held(NamedTuple):
    """How a VMM holds an object, by the kernel (query-memdev-holders), whatever it says itself."""

    size: int  # bytes of the object
    mapped: int  # bytes
    writable: bool
    private_copy: bool


# -- the machine


def machine_of(qemu: Qemu) -> Machine:
    """What a guest sees of its machine; a VMM that waits for a state has all of it already."""
    found: Machine = {"the machine type": str(qemu.ask("qom-get", {"path": "/machine", "property": "type"}))}
    for part in (_cpus, _pci, _devices, _disks, _dimms):
        found.update(part(qemu))
    return found


def check_same(old: Machine, new: Machine) -> None:
    """VmmError with what differs."""
    found = [f"{name} is {old.get(name, 'missing')} in the old and {new.get(name, 'missing')} in the new one"
             for name in {**old, **new} if old.get(name) != new.get(name)]
    if found:
        more = f"; {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise VmmError(f"the two VMMs are not the same machine: {'; '.join(found[:_SHOWN])}{more}")


def _cpus(qemu: Qemu) -> Iterator[tuple[str, str]]:
    rows = qemu.ask_list("query-cpus-fast")
    for row in rows:
        path = row.get("qom-path")
        kind = str(qemu.ask("qom-get", {"path": path, "property": "type"}))
        yield f"CPU {row.get('cpu-index')}", kind
        if row is rows[0]:
            yield from _features(qemu, path)


def _features(qemu: Qemu, path: Any) -> Iterator[tuple[str, str]]:
    if any(one.get("name") == "feature-words" for one in qemu.ask_list("qom-list", {"path": path})):
        for word in _rows_of(qemu.ask("qom-get", {"path": path, "property": "feature-words"})):
            if word.get("features"):
                leaf = f"{word.get('cpuid-input-eax', 0):#x}.{word.get('cpuid-input-ecx', 0)}"
                yield f"CPU feature word {leaf}.{word.get('cpuid-register')}", f"{word['features']:#x}"


def _rows_of(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _pci(qemu: Qemu) -> Iterator[tuple[str, str]]:
    """The devices on root buses; what is behind a bridge shows only once the guest has numbered its bus."""
    for bus in qemu.ask_list("query-pci"):
        for device in _rows_of(bus.get("devices")):
            ids, kind = device.get("id", {}), device.get("class_info", {})
            place = f"{device.get('bus', 0):02x}:{device.get('slot', 0):02x}.{device.get('function', 0)}"
            yield f"PCI device {place}", (f"{kind.get('desc', 'device').lower()} "
                                          f"{ids.get('vendor', 0):04x}:{ids.get('device', 0):04x}")


def _devices(qemu: Qemu) -> Iterator[tuple[str, str]]:
    """The devices of the command line, and those that were plugged."""
    for row in qemu.ask_list("qom-list", {"path": "/machine/peripheral"}):
        if kind := _child(row):
            yield f"device '{row.get('name')}'", kind
    unnamed = sorted(filter(None, map(_child, qemu.ask_list("qom-list", {"path": "/machine/peripheral-anon"}))))
    for kind in dict.fromkeys(unnamed):
        yield f"the number of devices {kind} without id", str(unnamed.count(kind))


def _child(row: dict[str, Any]) -> str:
    found = re.fullmatch(r"child<(.*)>", str(row.get("type")))
    return found[1] if found else ""


def _disks(qemu: Qemu) -> Iterator[tuple[str, str]]:
    for row in qemu.ask_list("query-block"):
        image = (row.get("inserted") or {}).get("image") or {}
        size = f"of {image['virtual-size']} bytes" if "virtual-size" in image else "empty"
        yield f"disk '{row.get('device') or row.get('qdev')}'", size


def _dimms(qemu: Qemu) -> Iterator[tuple[str, str]]:
    for row in qemu.ask_list("query-memory-devices"):
        data = row.get("data") or {}
        yield f"memory device '{data.get('id', '')}'", f"{row.get('type')} on {data.get('memdev')}"


# -- its memory


def check_memory(qemu: Qemu, held: Mapping[str, Held | None]) -> dict[str, Backend]:
    """Check that the memory of a VMM is these objects and nothing else; its backends, by id. VmmError if not."""
    who = f"the VMM at '{qemu.path}' (process {qemu.pid})"
    for name, one in held.items():
        if one is None:
            raise VmmError(f"'{name}' is not memory of {who}")
        if one.private_copy:
            raise VmmError(f"{who} has '{name}' with share=off: its guest writes into a private copy")
        if one.mapped < one.size or not one.writable:
            raise VmmError(f"{who} has mapped {one.mapped} of the {one.size} bytes of '{name}'"
                           f"{'' if one.writable else ', read-only'}")
    backends = {backend.id: backend for backend in qemu.backends()}
    private = [backend.id for backend in backends.values() if not backend.share]
    if private:
        raise VmmError(f"memory backend '{private[0]}' of {who} has share=off: its content would be lost")
    sizes = sorted(one.size for one in held.values() if one is not None)
    if sorted(backend.size for backend in backends.values()) != sizes:
        told = ", ".join(f"'{backend.id}' of {backend.size} bytes" for backend in backends.values()) or "none"
        raise VmmError(f"the memory backends of {who} ({told}) are not the objects {', '.join(map(repr, held))}: "
                       "name all that are its memory")
    return backends


def check_same_memory(old: Qemu, olds: Mapping[str, Backend], new: Qemu, news: Mapping[str, Backend]) -> None:
    """Each backend of the new VMM is the same memory as the one with its id in the old one; VmmError if not."""
    for name in {**olds, **news}:
        before, after = olds.get(name), news.get(name)
        if before is None or after is None:
            raise VmmError(f"memory backend '{name}' exists only in the {'new' if before is None else 'old'} VMM: "
                           f"their ids must be the same (old: {', '.join(olds)}; new: {', '.join(news)})")
        if before.size != after.size:
            raise VmmError(f"memory backend '{name}' has {before.size} bytes in the old VMM, {after.size} in the new")
        one, other = _file(old.pid, before), _file(new.pid, after)
        if one is not None and other is not None and one != other:
            raise VmmError(f"memory backend '{name}' is another memory in the new VMM: are two of them swapped?")


def _file(pid: int, backend: Backend) -> tuple[int, int] | None:
    """Device and inode of a backend's file; None: it has none, or it is not visible from here."""
    if backend.path is None:
        return None
    try:
        status = os.stat(re.sub(r"^/proc/self/", f"/proc/{pid}/", backend.path))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_movable(old: Qemu) -> None:
    """Check that a guest runs and may leave its VMM; VmmError in QEMU's words if not."""
    if (status := old.status()) != "running":
        raise VmmError(f"the guest at '{old.path}' is not running (status: {status})")
    found = old.ask("query-migrate")
    reasons = found.get("blocked-reasons") if isinstance(found, dict) else None
    if reasons:
        raise VmmError(f"the VMM at '{old.path}' cannot give its guest away: {'; '.join(map(str, reasons))}")
