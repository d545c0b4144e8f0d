"""Attaching: gmemd's memory as a memory device of a running QEMU, and taking it back.

In: add-fd, object-add of a memory-backend-file (the only backend that takes what it did not create), device_add, then
remove-fd, because QEMU has opened the memory once more. Each step that fails undoes those before it.
Out: the guest gives the memory back, which it may refuse; device_del, object-del, and what is left of the descriptors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final, NamedTuple

from gmemd.vmm.ending import VmmError
from gmemd.vmm.memfds import File, describe, holds, is_writable, mapped, names_guest_memfd
from gmemd.vmm.qemu import Qemu

VIRTIO_MEM_LEAVES: Final = (8, 2, 0)  # from this version on QEMU unplugs a virtio-mem device
_PCI_BRIDGE = 0x0604  # PCI's class code
_IN_USE = ("in use", "mapped")  # in QEMU's refusals to delete a backend just after its device
_LOOK_EVERY = 0.05  # seconds

# What a guest says by _OST (ACPI 6.5, 6.3.5) of an insertion (source 0, 1) and of an ejection (source 3, 0x103)
_INSERTION = {0x80: "is still working on it", 0x81: "has no driver for it", 0x82: "takes no memory while it runs"}
_EJECTION = {0x80: "gives no memory back", 0x81: "has a program that uses it",
             0x82: "is busy: something in it cannot be moved", 0x83: "has another device that needs it",
             0x84: "is still working on it"}
_EITHER = {0: "has taken it", 1: "failed", 2: "does not know the request"}
_UNANSWERED = "has not answered yet"
_PENDING_IN, _PENDING_OUT = 0x80, 0x84


class Memory(NamedTuple):
    """An object that is to be attached; the descriptor is borrowed."""

    id: str
    size: int  # bytes
    offset: int  # bytes, in its file
    fd: int


class Attached(NamedTuple):
    """What came of it."""

    driver: str
    device: str  # its id in QEMU
    taken: bool  # whether the guest uses all of it
    guest: str  # what it has said, as "has taken it"


def attach(qemu: Qemu, memory: Memory, driver: str | None, node: int | None, seconds: float) -> Attached:
    """Attach memory as a "virtio-mem-pci" or a "pc-dimm" (None: the former where that can be taken back and there is a
    port for it), and wait for the guest for a limited time. VmmError: QEMU is as before.
    """
    _check(qemu, memory)
    with _as_expected(qemu):
        port = None if driver == "pc-dimm" else _free_port(qemu)
    if driver is None:
        driver = "virtio-mem-pci" if port is not None and qemu.version >= VIRTIO_MEM_LEAVES else "pc-dimm"
    device: dict[str, Any] = {"driver": driver, "id": _device_name(memory.id), "memdev": memory.id,
                              **({} if node is None else {"node": node})}
    if driver != "pc-dimm":
        device |= {"requested-size": memory.size, **({"bus": port} if port else {})}
    with _descriptor(qemu, memory) as path:
        _step(qemu, "object-add", {"qom-type": "memory-backend-file", "id": memory.id, "size": memory.size,
                                   "share": True, "mem-path": path}, "object-del")
        with _undone(lambda: qemu.ask("object-del", {"id": memory.id})):
            _check_mapped(qemu, memory)
            qemu.client.events.clear()
            _step(qemu, "device_add", device, "device_del")
    if qemu.status() != "running":
        return Attached(driver, device["id"], False, "does not run now")
    wait = _wait_inserted if driver == "pc-dimm" else _wait_grown
    with _as_expected(qemu):
        return Attached(driver, device["id"], *wait(qemu, device["id"], memory.size, time.monotonic() + seconds))


def _check(qemu: Qemu, memory: Memory) -> None:
    """VmmError for what QEMU would not refuse, or refuse only half way."""
    if names_guest_memfd(os.readlink(f"/proc/self/fd/{memory.fd}")):
        raise VmmError(f"'{memory.id}' is a guest_memfd: a running QEMU takes only memory that has a path")
    if memory.offset:
        raise VmmError(f"'{memory.id}' begins at byte {memory.offset} of its file: QEMU would use the file's beginning")
    if not is_writable(memory.fd):
        raise VmmError(f"'{memory.id}' can only be read: no guest can use it")
    status = os.fstat(memory.fd)
    if status.st_size != memory.size:
        raise VmmError(f"'{memory.id}' has {memory.size} bytes and its file {status.st_size}")
    if mapped(qemu.pid, (status.st_dev, status.st_ino), private=True):
        raise VmmError(f"{describe(qemu.pid)} has the memory of '{memory.id}' already: a guest must not have it twice")
    if any(backend.id == memory.id for backend in qemu.backends()):
        raise VmmError(f"the VMM at '{qemu.path}' has another memory of the id '{memory.id}'")


def _check_mapped(qemu: Qemu, memory: Memory) -> None:
    status = os.fstat(memory.fd)
    found = mapped(qemu.pid, (status.st_dev, status.st_ino))
    if found is not None and found < memory.size:
        raise VmmError(f"the VMM at '{qemu.path}' says that it has '{memory.id}', but {describe(qemu.pid)} maps "
                       f"{found} bytes of it, not {memory.size}")


def _step(qemu: Qemu, command: str, arguments: dict[str, Any], undo: str) -> None:
    """Run a command; one that was not answered in time may still have happened, and is undone."""
    try:
        qemu.ask(command, arguments)
    except VmmError as exc:
        if isinstance(exc.__cause__, TimeoutError):
            with suppress(VmmError):
                qemu.ask(undo, {"id": arguments["id"]})
        raise


def _device_name(name: str) -> str:
    return f"{name}-device"


def _free_port(qemu: Qemu) -> str | None:
    """The bus for one more PCI device; "": any; None: there is none."""
    machine = {entry.get("name") for entry in qemu.ask_list("qom-list", {"path": "/machine"})}
    if "i440fx" in machine:  # its only bus takes devices while it runs
        return ""
    for bus in qemu.ask_list("query-pci"):
        for device in bus.get("devices", []):
            bridge = device.get("pci_bridge")
            if device.get("class_info", {}).get("class") == _PCI_BRIDGE and device.get("qdev_id") and not (
                    bridge or {}).get("devices"):
                return str(device["qdev_id"])
    return None


# -- undoing


@contextmanager
def _descriptor(qemu: Qemu, memory: Memory) -> Iterator[str]:
    """The path of the memory in QEMU's process, which has a descriptor of it during the block."""
    added = qemu.ask("add-fd", {"opaque": _opaque(memory.id)}, fds=(memory.fd,))
    with _undone(lambda: _drop_descriptors(qemu, memory.id)):
        try:
            path = f"/proc/self/fd/{int(added['fd'])}"
        except (KeyError, TypeError, ValueError):
            raise VmmError(f"the VMM at '{qemu.path}' answers 'add-fd' without 'fd'") from None
        yield path
    _drop_descriptors(qemu, memory.id)


def _opaque(name: str) -> str:
    return f"gmemd {name}"


def _drop_descriptors(qemu: Qemu, name: str) -> None:
    """Have QEMU close all that it was given for an object."""
    for fdset in qemu.ask_list("query-fdsets"):
        for entry in fdset.get("fds", []):
            if entry.get("opaque") == _opaque(name):
                qemu.ask("remove-fd", {"fdset-id": fdset.get("fdset-id"), "fd": entry.get("fd")})


@contextmanager
def _undone(step: Callable[[], object]) -> Iterator[None]:
    """Take a step, by QMP, if the block fails; what cannot be undone is not said, but the failure."""
    try:
        yield
    except BaseException:
        with suppress(VmmError):
            step()
        raise


@contextmanager
def _as_expected(qemu: Qemu) -> Iterator[None]:
    """Whatever else a VMM answers than what a QEMU does is one sentence."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise VmmError(f"the VMM at '{qemu.path}' answers otherwise than a QEMU: {exc}") from exc


# -- the guest


def _wait_inserted(qemu: Qemu, device: str, size: int, deadline: float) -> tuple[bool, str]:
    said = _UNANSWERED
    for status in _answers(qemu, device, deadline, (0, 1)):
        said = {**_EITHER, **_INSERTION}.get(status, f"said status {status}")
        if status != _PENDING_IN:
            return status == 0, said
    return False, said


def _answers(qemu: Qemu, device: str, deadline: float, sources: tuple[int, ...]) -> Iterator[int]:
    """What the guest says of a device by ACPI, as it comes; it ends with DEVICE_DELETED, or late."""
    while (event := qemu.next_event(deadline - time.monotonic())) is not None:
        data = event.get("data", {})
        if event.get("event") == "DEVICE_DELETED" and data.get("device") == device:
            return
        info = data.get("info", {})
        if event.get("event") == "ACPI_DEVICE_OST" and info.get("device") == device and info.get("source") in sources:
            yield int(info.get("status", 1))


def _wait_grown(qemu: Qemu, device: str, size: int, deadline: float) -> tuple[bool, str]:
    plugged = _wait_plugged(qemu, device, size, deadline)
    return plugged == size, "has taken it" if plugged == size else f"has taken {plugged >> 20} MiB of it so far"


def _wait_plugged(qemu: Qemu, device: str, wanted: int, deadline: float) -> int:
    """Wait until a guest has so much of a virtio-mem device, or late; the bytes that it has."""
    while True:
        [plugged] = [one["size"] for one in _devices(qemu) if one.get("id") == device] or [0]
        if plugged == wanted or time.monotonic() > deadline:
            return int(plugged)
        time.sleep(_LOOK_EVERY)


def _devices(qemu: Qemu) -> list[dict[str, Any]]:
    """The memory devices, each with the members of its kind and "type"."""
    return [{**entry.get("data", {}), "type": entry.get("type")} for entry in qemu.ask_list("query-memory-devices")]


# -- back


def detach(qemu: Qemu, name: str, file: File | None, seconds: float) -> None:
    """Take the memory with that id back, waiting for the guest for a limited time. VmmError says in words what the
    guest answered; it then has its memory as before. May be repeated.
    """
    with _as_expected(qemu):
        _detach(qemu, name, seconds)
    if file is not None:
        _wait_released(qemu, name, file)


def _detach(qemu: Qemu, name: str, seconds: float) -> None:
    device = next((one for one in _devices(qemu) if one.get("memdev") == f"/objects/{name}"), None)
    deadline = time.monotonic() + seconds
    if device is not None:
        if not device.get("id"):
            raise VmmError(f"the device of '{name}' in the VMM at '{qemu.path}' has no id, so it cannot be unplugged")
        if (status := qemu.status()) != "running":
            raise VmmError(f"the guest at '{qemu.path}' is {status}: it cannot give memory back")
        with _shrunk(qemu, name, device, deadline, seconds) if device["type"] == "virtio-mem" else nullcontext():
            _unplug(qemu, name, device["id"], deadline, seconds)
    elif all(backend.id != name for backend in qemu.backends()):
        _drop_descriptors(qemu, name)
        raise VmmError(f"the VMM at '{qemu.path}' has no memory of the id '{name}'")
    _delete_backend(qemu, name, time.monotonic() + qemu.timeout)
    _drop_descriptors(qemu, name)


def _wait_released(qemu: Qemu, name: str, file: File) -> None:
    """Wait until a VMM really has the memory no more: QEMU unmaps and closes it a moment after its answer."""
    deadline = time.monotonic() + qemu.timeout
    while holds(qemu.pid, file):
        if time.monotonic() > deadline:
            raise VmmError(f"the VMM at '{qemu.path}' says that '{name}' is gone, but {describe(qemu.pid)} still "
                           "has it")
        time.sleep(_LOOK_EVERY)


@contextmanager
def _shrunk(qemu: Qemu, name: str, device: dict[str, Any], deadline: float, seconds: float) -> Iterator[None]:
    """Take all of a virtio-mem device from the guest; if not, or if the block fails, it gets it back."""
    size = {"path": f"/machine/peripheral/{device['id']}", "property": "requested-size"}
    with _undone(lambda: qemu.ask("qom-set", {**size, "value": device.get("requested-size", 0)})):
        qemu.ask("qom-set", {**size, "value": 0})
        if left := _wait_plugged(qemu, device["id"], 0, deadline):
            raise VmmError(f"the guest keeps {left >> 20} MiB of '{name}' after {seconds:g} s: they are in use")
        yield


def _unplug(qemu: Qemu, name: str, device: str, deadline: float, seconds: float) -> None:
    qemu.client.events.clear()
    try:
        qemu.ask("device_del", {"id": device})
    except VmmError as exc:
        if "in the process of unplug" not in exc.desc:
            raise
    said = _UNANSWERED
    for status in _answers(qemu, device, deadline, (3, 0x103)):
        said = {**_EITHER, **_EJECTION}.get(status, f"said status {status}")
        if status not in (0, _PENDING_OUT):
            raise VmmError(f"the guest keeps '{name}': it {said}")
    if any(one.get("id") == device for one in _devices(qemu)):
        raise VmmError(f"the guest has not given '{name}' back after {seconds:g} s: it {said}; "
                       "another 'detach' waits on")


def _delete_backend(qemu: Qemu, name: str, deadline: float) -> None:
    """Delete a backend, which is in use for a moment after its device has gone."""
    while True:
        try:
            qemu.ask("object-del", {"id": name})
            return
        except VmmError as exc:
            if not any(word in exc.desc for word in _IN_USE) or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_EVERY)
