"""Fences that stop whoever writes: a virtual machine monitor by its QMP, or all processes that hold the memory."""

from __future__ import annotations

import os
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.commands.fencing import Fence, identity, uninterrupted
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.beneath import ANYWHERE
from gmemd.processes.freeze import Freezer
from gmemd.processes.guard import STILL, resume_vmm
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu

_ROUNDS: Final = 20  # of looking for processes that got the memory while others were being stopped
_RAN: Final = {"RESUME": "continued", "RESET": "reset"}  # events


class Freeze(Fence):
    """All processes that hold the memory are stopped."""

    via = "freeze"
    guarded = True

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, deadline: int) -> None:
        super().__init__(gmemd, backend, deadline)
        self._freezer = Freezer()

    async def prepare(self) -> dict[str, Any]:
        await self._add()
        return self._freezer.note()

    async def stop(self, until: float) -> None:
        for _ in range(_ROUNDS):
            await uninterrupted(in_thread(self._freezer.stop, until))
            if not await self._add():
                return
            await self.note(self._freezer.note())
        raise QmpError(f"object '{self.backend.id}' is being passed on to more and more processes")

    async def go(self) -> None:
        await in_thread(self._freezer.go)

    async def still(self) -> None:
        await in_thread(self._freezer.check)

    async def drop(self) -> None:
        await in_thread(self._freezer.drop)

    async def _add(self) -> bool:
        """Plan to stop who holds the memory now; False: nobody new."""
        new = await self.to_stop() - self._freezer.pids
        if new:
            await in_thread(self._freezer.add, new)
        return bool(new)


class Qmp(Fence):
    """The guest is stopped by its VMM's QMP; other processes that hold the memory, such as those behind vhost-user
    devices, are frozen while it stands still."""

    via = "qmp"
    guarded = True

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, deadline: int, path: str) -> None:
        super().__init__(gmemd, backend, deadline)
        self.path = os.path.abspath(path)
        self.paths = ANYWHERE  # how the socket is found
        self._qemu: Qemu | None = None
        self._ours = False  # it is running, and will be stopped by us
        self._others = Freezer()
        self._still = False

    @property
    def vmm(self) -> str:
        """What the VMM is, such as "QEMU 11.1.3"; once it is held."""
        assert self._qemu is not None
        return "QEMU " + ".".join(map(str, self._qemu.version))

    async def save_state(self, fd: int) -> int:
        """Write the device state into a file while the fence is held; its bytes."""
        assert self._qemu is not None
        await in_thread(self._qemu.only_shared)
        others = bool(self._others.pids)
        if others:
            await in_thread(self._others.go)  # a process behind a device may have to say its state
        size: int = await uninterrupted(in_thread(self._qemu.save_state, fd))
        if others:  # or the guest would stand still while all processes are examined again
            await self._freeze_others(self._began + self.deadline / 1000)
        return size

    async def prepare(self) -> dict[str, Any]:
        await uninterrupted(in_thread(self._connect))
        qemu = self._qemu
        assert qemu is not None
        holders = await self.to_stop()
        if qemu.pid not in holders:
            raise VmmError(f"the VMM at '{self.path}' (process {qemu.pid}) does not share '{self.backend.id}'")
        status = await in_thread(qemu.status)
        if status not in ("running", *STILL):
            raise VmmError(f"the guest at '{self.path}' cannot be stopped now: it is '{status}'")
        self._ours = status == "running"
        await in_thread(self._others.add, holders - {qemu.pid})
        process = identity(qemu.pid)
        return {"qmp": self.path, "vmm": process if self._ours else None, **self._others.note()}

    def _connect(self) -> None:
        with os_errors(f"cannot connect to '{self.path}'"), self.paths.socket(self.path) as address:
            self._qemu = Qemu(self.path, self.deadline / 1000, address=address)

    async def stop(self, until: float) -> None:
        qemu = self._qemu
        assert qemu is not None
        _events(qemu)
        if self._ours:
            await uninterrupted(in_thread(qemu.stop))
        self._still = True
        await uninterrupted(in_thread(self._others.stop, until))

    async def _freeze_others(self, until: float) -> None:
        assert self._qemu is not None
        holders = await self.to_stop()
        await in_thread(self._others.add, holders - {self._qemu.pid})
        await self.note({**(self.backend.fence or {}), **self._others.note()})
        await uninterrupted(in_thread(self._others.stop, until))

    async def go(self) -> None:
        await in_thread(self._go)

    async def still(self) -> None:
        await in_thread(self._check)
        await in_thread(self._others.check)

    async def drop(self) -> None:
        await in_thread(self._others.drop)
        if self._qemu is not None:
            self._qemu.close()

    def _go(self) -> None:
        """Let go on the others and the guest; blocks."""
        failures: list[str] = []
        for step in (self._check, self._others.go, self._continue):
            try:
                step()
            except QmpError as exc:
                failures.append(exc.desc)
        if self._qemu is not None:
            self._qemu.close()
        if failures:
            raise QmpError(failures[0])

    def _check(self) -> None:
        """Has the guest stood still all the time?"""
        qemu = self._qemu
        if qemu is None or not self._still:
            return
        try:
            status = qemu.status()
        except VmmError:
            if identity(qemu.pid) is None:  # it has ended, and writes nothing any more
                return
            raise
        for event in _events(qemu):
            if event in _RAN:
                raise VmmError(f"the guest at '{self.path}' was {_RAN[event]} by somebody else")
        if status not in STILL:
            raise VmmError(f"the guest at '{self.path}' is '{status}' although it was stopped")

    def _continue(self) -> None:
        vmm = (self.backend.fence or {}).get("vmm")
        if self._qemu is None or not self._ours or vmm is None:
            return
        try:
            if self._qemu.status() in STILL:
                self._qemu.cont()
        except VmmError:
            self._qemu.close()
            resume_vmm(self.path, vmm)


def _events(qemu: Qemu) -> list[str]:
    """The names of the events that it has sent since the last call."""
    try:
        return [str(event.get("event")) for event in qemu.client.take_events()]
    except ConnectionError as exc:
        raise VmmError(f"the VMM at '{qemu.path}' has ended or closed the connection") from exc
