"""Who runs a guest on an object.

Apart from commands, the event loop calls this module: a runner has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change, changing
from gmemd.changes.completed import completed
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import QmpError, os_errors
from gmemd.memory.runner import Runner
from gmemd.processes.identity import PROC, command_name, start_time
from gmemd.processes.watch import watch

_WATCH_AGAIN = 1.0  # seconds until watching a runner is retried


def memdev_set_runner(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    pid = arguments.get("pid", caller.pid)
    runner = runner_of(pid) if pid == caller.pid else own_runner(gmemd, pid)
    current = backend.runner
    if current is None or not current.is_(runner.pid, runner.start):
        if not arguments["force"]:
            check_runner(backend, besides=arguments.get("from", runner.pid))
        change.judged(f"make process {runner.pid} ({command_name(runner.pid)}) the runner of '{backend.id}', "
                      f"generation {backend.generation + 1}", then=partial(_pretend, backend, runner))
        exchange(gmemd, backend, runner, change)
    change.judged(f"do nothing: process {runner.pid} is the runner of '{backend.id}'")
    return {"generation": backend.generation}


def memdev_clear_runner(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    if backend.runner is None:
        raise QmpError(f"no guest runs on object '{backend.id}'")
    if not arguments["force"]:
        check_runner(backend, besides=caller.pid)
    change.judged(f"forget that process {backend.runner.pid} runs a guest on '{backend.id}'",
                  then=partial(_pretend, backend, None))
    exchange(gmemd, backend, None, change)
    return {}


def _pretend(backend: HostMemoryBackend, runner: Runner | None) -> None:
    """What `exchange` does to an object, without watching anybody; for a trial."""
    backend.runner = runner
    backend.generation += runner is not None


def check_runner(backend: HostMemoryBackend, besides: int = -1, *,
                 but: str = "another guest on it needs 'force'") -> None:
    """Refuse, `but` say what is to be done, if a living process other than `besides` runs a guest on an object."""
    runner = backend.runner
    if runner is None or runner.pid == besides:
        return
    with os_errors(f"cannot see the runner of '{backend.id}'"):
        lives = runner.lives()
    if lives:
        raise QmpError(f"process {runner.pid} ({command_name(runner.pid)}) runs a guest on object '{backend.id}': "
                       f"{but}")


def runner_of(pid: int) -> Runner:
    """A living process as a runner, not watched yet; QmpError if there is none."""
    with os_errors(f"cannot examine process {pid}"):
        start = start_time(pid)
        if start is None:
            raise _gone(pid)
        return Runner(pid, start, os.stat(f"{PROC}/{pid}").st_uid)


def own_runner(gmemd: Gmemd, pid: int) -> Runner:
    """The same for a process that a client names: to a tenant the processes of others do not exist."""
    runner = runner_of(pid)
    if not gmemd.sees_all and str(runner.uid) != gmemd.tenant:
        raise _gone(pid)
    return runner


def _gone(pid: int) -> QmpError:
    return QmpError(f"process {pid} has ended, or is not visible from here")


def exchange(gmemd: Gmemd, backend: HostMemoryBackend, runner: Runner | None, change: Change) -> None:
    """Replace the runner of an object by another, or by none, and announce it when it is durable."""
    before, generation = backend.runner, backend.generation
    if runner is not None:
        with os_errors(f"cannot watch process {runner.pid}"):
            watched = _watch(gmemd, backend, runner)
        if not watched:
            raise QmpError(f"process {runner.pid} has ended")
        backend.generation += 1
    backend.runner = runner

    def undo() -> None:
        if runner is not None:
            runner.end()
        backend.runner, backend.generation = before, generation
        if before is not None:
            _watch_later(gmemd, backend, before)

    def announce() -> None:
        if before is not None:
            before.end()
            gmemd.emit("MEMDEV_RUNNER_ENDED", {"id": backend.id, "pid": before.pid, "uid": before.uid,
                                               "generation": generation})
        if runner is not None:
            gmemd.emit("MEMDEV_RUNNER_STARTED", {"id": backend.id, "pid": runner.pid, "uid": runner.uid,
                                                 "generation": backend.generation})

    change.undo(undo)
    change.rewrite(backend)
    change.done(announce)


# -- watching ----------------------------------------------------------------------------------------

def watch_runners(gmemd: Gmemd) -> None:
    """Watch the runners that a predecessor knew."""
    for backend in list(gmemd.objects):
        if backend.runner is not None:
            _resume(gmemd, backend, backend.runner)


def _watch(gmemd: Gmemd, backend: HostMemoryBackend, runner: Runner) -> bool:
    """Wait for the runner's end; False when it has ended already."""
    end = watch(runner.pid, runner.start, lambda: gmemd.spawn(_ended(gmemd, backend, runner)))
    if end is None:
        return False
    runner.end = end
    return True


def _resume(gmemd: Gmemd, backend: HostMemoryBackend, runner: Runner) -> None:
    try:
        living = _watch(gmemd, backend, runner)
    except OSError:  # for example too few descriptors: that does not mean that the process is dead
        _watch_later(gmemd, backend, runner)
        return
    if not living:
        gmemd.spawn(_ended(gmemd, backend, runner))


def _watch_later(gmemd: Gmemd, backend: HostMemoryBackend, runner: Runner) -> None:
    runner.end()
    runner.end = asyncio.get_running_loop().call_later(_WATCH_AGAIN, _resume, gmemd, backend, runner).cancel


async def _ended(gmemd: Gmemd, backend: HostMemoryBackend, runner: Runner) -> None:
    """A runner has ended: forget it."""
    def forget(gmemd: Gmemd, caller: None, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
        exchange(gmemd, backend, None, change)
        return {}

    if backend.runner is runner and backend.lives:
        with contextlib.suppress(QmpError):  # custody's, which has logged it; undone, so it is tried again
            await completed(changing(gmemd.settler, forget)(gmemd, None, {}))
