"""The assumed guest: while the machine runs, it does at once what is requested for its memory."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Coroutine
from typing import Any

from gmemd.changes.threads import in_thread
from gmemd.emulator.balloon import Balloon
from gmemd.emulator.machine import Machine
from gmemd.emulator.memory_devices import VirtioMem
from gmemd.errors import QmpError, close_fd, os_errors


def obey(machine: Machine) -> list[Coroutine[Any, Any, None]]:
    """Let the guest, if it runs, follow the requests; what is left to do takes long: memory to be freed."""
    if machine.status != "running":
        return []
    left = []
    for device in machine.devices.values():
        if isinstance(device, Balloon) and device.inflated != device.wanted:
            device.inflated = device.wanted
            machine.gmemd.emit("BALLOON_CHANGE", {"actual": device.actual(machine)})
        elif isinstance(device, VirtioMem) and not device.shrinking:
            wanted = min(device.requested, device.bytes)  # a device can be created with more than it has
            if wanted < device.size:
                device.shrinking = True
                left.append(_shrink(machine, device, wanted))
            else:
                _resized(machine, device, wanted)
    return left


def obeyed(machine: Machine) -> Any:
    """A command's empty result, once the guest has followed the requests."""
    left = obey(machine)
    if not left:
        return {}

    async def work() -> Any:
        errors = []
        for step in left:
            try:
                await step
            except QmpError as exc:
                errors.append(exc)
        if errors:
            raise errors[0]
        return {}

    return work()


async def _shrink(machine: Machine, device: VirtioMem, size: int) -> None:
    """Free everything after `size` bytes, then follow what was requested meanwhile."""
    try:
        await _free(machine, device, size)
        _resized(machine, device, size)
    finally:
        device.shrinking = False
    for step in obey(machine):
        await step


def _free(machine: Machine, device: VirtioMem, size: int) -> Awaitable[None]:
    backend, kernel = machine.gmemd.objects.find(device.memdev), machine.gmemd.kernel
    with os_errors(f"cannot free memory of '{backend.id}'"):
        fd = os.dup(backend.fd)  # its own: the object's may be closed meanwhile
    begin, length = backend.offset + size, device.size - size

    def punch() -> None:
        try:
            with os_errors(f"cannot free memory of '{backend.id}'"):
                kernel.punch_hole(fd, begin, length)
        finally:
            close_fd(fd)

    try:
        return in_thread(punch)
    except BaseException:
        close_fd(fd)
        raise


def _resized(machine: Machine, device: VirtioMem, size: int) -> None:
    if size != device.size:
        device.size = size
        machine.gmemd.emit("MEMORY_DEVICE_SIZE_CHANGE", {**device.named(), "size": size, "qom-path": device.path})
