"""Worker processes: what one says and is told; a few per CPU at a time, however many are requested; others queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from gmemd.changes.jobs import CANCELLED, Job
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.program import worker_program

_A_CPU: Final = 2  # processes
_ON_LINES: Final = 32  # processes
_LONGEST: Final = 128 << 20  # bytes of a message: the ends of a stream, with a map of what is private, may be long


class Workers:
    """A limited number at a time, first come, first served."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._line: deque[asyncio.Future[bool]] = deque()  # True: its turn; False: no need to wait any more

    @contextlib.asynccontextmanager
    async def room(self, job: Job | None) -> AsyncIterator[None]:
        """Wait for room for one, and hold it; QmpError when the job is cancelled meanwhile."""
        if self._free:
            self._free -= 1
        elif not await self._turn(job):
            raise QmpError(CANCELLED)
        try:
            yield
        finally:
            self._leave()

    async def _turn(self, job: Job | None) -> bool:
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def give_up() -> None:
            if not turn.done():
                turn.set_result(False)

        if job is not None:
            job.interrupt = give_up
            if job.cancelled:
                return False
        self._line.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:  # the daemon ends
            if turn.done() and not turn.cancelled() and turn.result():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1


workers: Final = Workers(_A_CPU * len(os.sched_getaffinity(0)))  # of this process
on_lines: Final = Workers(_ON_LINES)  # of this process, that wait for somebody else


class Worker:
    """A process at work: `async for` gives its messages until it has ended well, and raises QmpError if it fails."""

    def __init__(self, process: Process, job: Job | None) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.result: dict[str, Any] = {}  # its last message, once it has ended
        self._process, self._job = process, job
        self._stdin, self._stdout = process.stdin, process.stdout

    def tell(self, message: dict[str, Any]) -> None:
        """Send it a message; what one hears that has ended is lost."""
        self._stdin.write(json.dumps(message).encode() + b"\n")

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        async for line in self._stdout:
            message = json.loads(line)
            if "end" in message:
                self.result = message
                return
            if "errno" in message:
                raise QmpError(f"the worker process failed: {os.strerror(message['errno'])}")
            if "error" in message:
                raise QmpError(message["error"])
            yield message
        if self._job is not None and self._job.cancelled:
            raise QmpError(CANCELLED)
        raise QmpError(f"the worker process ended unexpectedly: {_why_ended(await self._process.wait())}")

    def stop(self) -> None:
        """Kill it: who waits for its messages gets a QmpError."""
        if self._process.returncode is None:
            self._process.kill()

    async def end(self) -> None:
        """Wait for its end; one that is still at work is killed."""
        self._stdin.close()
        if self._process.returncode is None and not self._stdout.at_eof() and not self.result:
            self._process.kill()
        await self._process.wait()


@contextlib.asynccontextmanager
async def working(job: Job | None, verb: str, spec: dict[str, Any], fds: Iterable[int],
                  among: Workers = workers) -> AsyncIterator[Worker]:
    """Let a worker process do what a verb and its specification say, once there is room for one.

    It gets the descriptors `fds` under their own numbers. Cancelling the job kills it, as does leaving the block early.
    """
    program = worker_program()
    async with among.room(job):
        with os_errors("cannot start the worker process"):
            process = await asyncio.create_subprocess_exec(
                *program.command, verb, json.dumps(spec), stdin=PIPE, stdout=PIPE, pass_fds=(*fds, *program.fds),
                limit=_LONGEST)
        worker = Worker(process, job)
        assert process.stdin is not None
        process.stdin.write(program.text)
        if job is not None:
            job.interrupt = process.kill
            if job.cancelled:
                process.kill()
        try:
            yield worker
        finally:
            if job is not None:
                job.interrupt = lambda: None
            await worker.end()


async def run_worker(job: Job | None, verb: str, spec: dict[str, Any], fds: Iterable[int],
                     among: Workers = workers) -> dict[str, Any]:
    """Let a worker process do all of its work, with its progress in the job; its last message."""
    async with working(job, verb, spec, fds, among) as worker:
        async for message in worker:
            report(job, message)
    return worker.result


def report(job: Job | None, message: dict[str, Any]) -> None:
    """Show a worker's progress in its job."""
    if job is not None:
        job.total = message.get("total", job.total)
        job.current = message.get("done", job.current)


def _why_ended(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
