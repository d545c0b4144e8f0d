"""A gmemd inside a running event loop, for commands whose work goes on after their reply."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import pytest_asyncio

from gmemd.changes.change import Change, WithFds
from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel
from gmemd.qmp.rows import Pieces
from gmemd.qmp.session import Request
from tests.commands.conftest import Machine
from tests.patience import PATIENCE


class LiveMachine(Machine):
    """The Machine for asynchronous tests: `do` waits for a command's reply, `ended` for a job's end."""

    def __init__(self, kernel: str | Kernel = "simulated", **parts: Any) -> None:
        super().__init__(kernel, **parts)
        self.tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))
        self._changed.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def dispatch(self, command: str, /, **arguments: Any) -> Any:
        """What a command gives its monitor; its arguments with underscores for hyphens."""
        return self.dispatcher.run(
            Request(command, {name.replace("_", "-"): value for name, value in arguments.items()}, None),
            self.session, self)

    async def do(self, command: str, /, **arguments: Any) -> Any:
        """The result of a command."""
        result = self.dispatch(command, **arguments)
        if asyncio.iscoroutine(result):
            result = await result
        assert not isinstance(result, Change)
        return b"".join(result) if isinstance(result, Pieces) else result

    async def refused(self, command: str, /, **arguments: Any) -> str:
        """The sentence with which a command is refused."""
        try:
            result = await self.do(command, **arguments)
        except QmpError as exc:
            return exc.desc
        raise AssertionError(f"not refused: {result.value if isinstance(result, WithFds) else result}")

    async def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The first event of that name with at least that data, now or later."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for found, members in self.events:
                    if found == name and data.items() <= members.items():
                        return members
                self._changed.clear()
                await self._changed.wait()

    async def wait_claimed(self, name: str) -> None:
        """Wait until a change has claimed an object."""
        async with asyncio.timeout(PATIENCE):
            while not self.gmemd.objects.find(name).claims:
                await asyncio.sleep(0.001)

    async def ended(self, job_id: str) -> dict[str, Any]:
        """What query-jobs says of a job once it has concluded."""
        async with asyncio.timeout(PATIENCE):
            while True:
                jobs = await self.do("query-jobs")
                if isinstance(jobs, bytes):  # there are many
                    jobs = json.loads(jobs)
                job: dict[str, Any] = next(job for job in jobs if job["id"] == job_id)
                if job["status"] == "concluded":
                    return job
                self._changed.clear()
                await self._changed.wait()

    def states(self, job_id: str) -> list[str]:
        """The states of a job, from its events."""
        return [data["status"] for name, data in self.events if name == "JOB_STATUS_CHANGE" and data["id"] == job_id]

    async def close(self) -> None:
        """End what still runs, and give everything back."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.gmemd.close()


def with_memfd(size: int) -> Any:
    """A fixture: a machine with the memfd `m` of so many bytes."""
    async def live() -> AsyncIterator[LiveMachine]:
        machine = LiveMachine()
        await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=size)
        yield machine
        await machine.close()

    return pytest_asyncio.fixture(live)


def idle_process() -> Iterator[subprocess.Popen[bytes]]:
    """For a fixture: a process that ends when its input does."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    yield process
    end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and wait for its end."""
    process.kill()
    process.communicate()
