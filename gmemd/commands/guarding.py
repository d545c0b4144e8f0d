"""The process that lets go on what a fence has stopped if this one ends or hangs (`processes.guard`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from typing import Any

from gmemd.errors import QmpError, os_errors
from gmemd.kernel.program import worker_program


class Guard:
    """One guard, from `start` to `end`. It takes no room from the workers, which may be those it waits for."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, note: dict[str, Any], deadline: int) -> Guard:
        """Return when it is on guard; QmpError if it cannot be."""
        program = worker_program()
        with os_errors("cannot start a process that guards the fence"):
            process = await asyncio.create_subprocess_exec(
                *program.command, "guard", json.dumps({"note": note, "deadline": deadline}), stdin=PIPE, stdout=PIPE,
                pass_fds=program.fds)
        guard = cls(process)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(program.text)
            if b"ready" not in await process.stdout.readline():
                raise QmpError("the process that guards the fence has ended")
        except BaseException:
            await guard.end()
            raise
        return guard

    def tell(self, note: dict[str, Any]) -> None:
        """What will be stopped is something else now."""
        self._say({"note": note})

    async def end(self) -> None:
        """Nothing is stopped any more."""
        self._say({"done": True})
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
