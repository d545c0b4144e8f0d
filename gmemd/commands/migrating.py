"""The fence of a snapshot whose memory the VMM sends itself: QEMU's live migration into a pipe.

QEMU sends the memory while the guest runs, and what the guest writes meanwhile again; when little is left it stops the
guest, sends that and the state of the devices, and leaves the guest stopped. The guest goes on when the fence is
released. If the migration fails, as when nobody reads the pipe any more, the guest has never stopped, or goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.commands.fencing import uninterrupted
from gmemd.commands.stopping import Qmp
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu

_FASTEST: Final = 1 << 40  # bytes a second; QEMU's default is 128 MiB
_LOOK: Final = 0.05  # seconds between two looks while the guest runs


class Migration(Qmp):
    """The guest is stopped by its VMM when that has sent nearly all of the memory."""

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, deadline: int, path: str, pipe: int) -> None:
        """`pipe`: where the stream goes, owned until `close`."""
        super().__init__(gmemd, backend, deadline, path)
        self.begins: Callable[[list[str]], None] = lambda names: None  # hears the names that the block may have there
        self._pipe = pipe
        self._limit: int | None = None  # bytes a second that QEMU was set to send

    def close(self) -> None:
        """Close our end of the pipe; the VMM may have its own."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    async def prepare(self) -> dict[str, Any]:
        note = await super().prepare()
        return {"qmp": self.path, "vmm": note["vmm"]}  # other processes that write are QEMU's to watch

    async def approach(self) -> None:
        assert self._qemu is not None
        name = await in_thread(self._qemu.only_shared)
        self.begins([name, f"/objects/{name}"])
        await uninterrupted(in_thread(self._send))

    async def stop(self, until: float) -> None:
        assert self._qemu is not None
        await uninterrupted(in_thread(self._qemu.wait_migration))
        self._still = True

    def _send(self) -> None:
        """Let QEMU send the memory until it stops the guest; blocks."""
        qemu = self._qemu
        assert qemu is not None
        self._limit = int(qemu.ask("query-migrate-parameters").get("max-bandwidth", _FASTEST))
        qemu.ask("migrate-set-parameters", {"max-bandwidth": _FASTEST})
        qemu.begin_save(self._pipe, whole=True)
        self.close()
        while not self._stopped(qemu):
            select.select([qemu.client], [], [], _LOOK)

    def _stopped(self, qemu: Qemu) -> bool:
        """Whether the VMM has stopped the guest, or there is nothing more to wait for."""
        if any(event.get("event") == "STOP" for event in qemu.client.take_events()):
            return True
        return qemu.ask("query-migrate").get("status") in ("completed", "failed", "cancelled")

    def _go(self) -> None:
        qemu, limit = self._qemu, self._limit
        if qemu is not None and limit is not None:
            with contextlib.suppress(VmmError):  # what matters is that the guest goes on
                qemu.ask("migrate-set-parameters", {"max-bandwidth": limit})
        super()._go()
