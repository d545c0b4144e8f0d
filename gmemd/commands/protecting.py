"""The fence that stops nobody: the reader puts pages aside before they are written (`snapshots.protected`)."""

from __future__ import annotations

from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fencing import Fence
from gmemd.commands.track import check_features, check_mapped
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel import userfault
from gmemd.processes.identity import start_time

_NEEDED: Final = {"UFFD_FEATURE_WP_HUGETLBFS_SHMEM": userfault.UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
                  "UFFD_FEATURE_WP_UNPOPULATED": userfault.UFFD_FEATURE_WP_UNPOPULATED}


class WriteProtect(Fence):
    """One process that writes, and has passed its userfaultfd. While it is held, `protect` is for the worker's spec."""

    via = "write-protect"

    def __init__(self, gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, asked: dict[str, Any]) -> None:
        super().__init__(gmemd, backend, asked["deadline"])
        self._names, self._name = caller.named_fds, asked["fdname"]
        self._pid, self._address = caller.pid, asked["address"]
        check_features(caller, self._name, _NEEDED)
        with os_errors("cannot examine the descriptor"):
            found = userfault.features(self._names.look(self._name)) or 0
        if found & (userfault.UFFD_FEATURE_WP_ASYNC | userfault.UFFD_FEATURE_SIGBUS):
            raise QmpError(f"the userfaultfd '{self._name}' does not report faults to anybody")
        with os_errors(f"cannot see process {self._pid}"):
            self._start = start_time(self._pid)

    async def prepare(self) -> dict[str, Any]:
        backend, pid = self.backend, self._pid
        await check_mapped(backend, pid, self._address)
        for holder in await self.holders():
            if holder.pid != pid:
                raise QmpError(f"object '{backend.id}' is also held by process {holder.pid} ({holder.comm}), which is "
                               "not write-protected")
        self.protect = {"uffd": self._names.take(self._name), "address": self._address}
        with os_errors(f"cannot see the descriptors of process {pid}"):
            if await in_thread(userfault.is_kept, pid, self.protect["uffd"]):
                raise QmpError(f"process {pid} keeps a copy of the userfaultfd '{self._name}': it would wait forever "
                               "if gmemd ended")
        with os_errors(f"cannot see the mappings of process {pid}"):
            if any(mode for _, _, mode in await in_thread(userfault.modes, pid, self._address, backend.memory_size)):
                raise QmpError(f"process {pid} has registered its mapping of '{backend.id}' already")
        return {}

    async def go(self) -> None:
        if self.protect is not None:  # the worker, which has the other copy, has ended its work
            protect, self.protect = self.protect, None
            close_fd(protect["uffd"])
