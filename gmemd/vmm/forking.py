"""Several VMMs that go on from one device state: all of them run in the end, or none was there.

    with Fork(plans, timeout) as fork:
        fork.load(state)        # all have it, and stand still
        ...                     # a last look; what raises here ends them all
        fork.go()               # from here on they are on their own
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu
from gmemd.vmm.start import Guard, Started, reach


class Plan(NamedTuple):
    """A VMM to be started."""

    name: str  # of the guest, for messages
    words: list[str]
    fds: tuple[int, ...]  # that it inherits under their numbers
    qmp: str  # the path of its QMP socket


class Fork:
    """The VMMs of some plans; `timeout` (seconds) applies to each start and each answer."""

    def __init__(self, plans: Sequence[Plan], timeout: float) -> None:
        self._plans = plans
        self._timeout = timeout
        self._started: list[Started] = []
        self._qemus: list[Qemu] = []
        self._guard: Guard | None = None
        self._run = False

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for qemu in self._qemus:
            qemu.close()
        if not self._run:
            for started in self._started:
                started.kill()
        if self._guard is not None:
            self._guard.end()

    @property
    def pids(self) -> list[int]:
        """Their process ids, in the order of the plans."""
        return [started.pid for started in self._started]

    def load(self, state: int) -> None:
        """Start all, and give each the device state in a file; VmmError names the guest, with its VMM's own words."""
        for plan in self._plans:
            self._started.append(Started(plan.words, plan.fds))
        self._guard = Guard(self.pids)
        for started in self._started:
            started.go()
        for plan, started in zip(self._plans, self._started, strict=True):
            try:
                self._qemus.append(reach(started, plan.qmp, self._timeout))
                os.lseek(state, 0, os.SEEK_SET)
                self._qemus[-1].load_state(state)
            except VmmError as exc:
                started.kill()
                raise VmmError(f"guest '{plan.name}' cannot go on: {started.words() or exc.desc}") from exc

    def go(self) -> None:
        """Let all guests run."""
        for plan, qemu in zip(self._plans, self._qemus, strict=True):
            try:
                qemu.cont()
            except VmmError as exc:
                raise VmmError(f"guest '{plan.name}' cannot go on: {exc.desc}") from exc
        self._run = True
