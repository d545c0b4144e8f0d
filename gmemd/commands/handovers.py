"""A guest on its way from one VMM to another: noted while a client moves it, brought to an end if the client dies."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change, changing
from gmemd.changes.completed import completed
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.runners import check_runner, exchange, own_runner, runner_of
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.beneath import Paths
from gmemd.memory.runner import Handover, Runner, Side
from gmemd.processes.identity import start_time
from gmemd.processes.watch import watch
from gmemd.vmm.handover import Party, settle

_AGAIN = 5.0  # seconds until an end is tried again


def memdev_handover(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backends = [gmemd.objects.find(object_id) for object_id in arguments["ids"]]
    if not backends or len(set(backends)) < len(backends):
        raise QmpError("parameter 'ids' must name objects, each once")
    old, new = (_side(gmemd, caller, arguments[name]) for name in ("old", "new"))
    for backend in backends:
        backend.check_idle()
        check_runner(backend, besides=old.pid)
    if old.pid == new.pid:
        raise QmpError("parameters 'old' and 'new' name the same process")
    client = runner_of(caller.pid)
    handover = Handover(tuple(arguments["ids"]), (client.pid, client.start), old, new)
    change.judged(f"note that the guest of process {old.pid} goes to process {new.pid}",
                  then=partial(_note, gmemd, handover, handover))
    with os_errors("cannot watch the client"):
        watched = _watch(gmemd, handover)
    if not watched:
        raise QmpError("the client has ended")
    change.undo(lambda: _note(gmemd, handover, None))
    for backend in _note(gmemd, handover, handover):
        change.rewrite(backend)
    return {}


def memdev_handover_end(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    handover, result = backend.handover, arguments["result"]
    if handover is None:
        raise QmpError(f"the guest of object '{backend.id}' is not on its way to another VMM")
    change.judged(f"note that the guest of '{backend.id}' runs in the {result} VMM",
                  then=partial(_pretend, gmemd, handover, result))
    _conclude(gmemd, handover, result, change)
    return {}


def _side(gmemd: Gmemd, caller: Caller, vmm: dict[str, Any]) -> Side:
    root = caller.rights.root_of(vmm["qmp"])
    runner = own_runner(gmemd, vmm["pid"])
    return Side(runner.pid, runner.start, runner.uid, vmm["qmp"], root)


def _of(gmemd: Gmemd, handover: Handover) -> list[HostMemoryBackend]:
    """Its objects, as far as they exist."""
    return [backend for backend in map(gmemd.objects.get, handover.ids) if backend is not None]


def _note(gmemd: Gmemd, handover: Handover, note: Handover | None) -> list[HostMemoryBackend]:
    """Note a handover at its objects, or that there is none any more; the objects."""
    backends = _of(gmemd, handover)
    for backend in backends:
        backend.handover = note
    if note is None:
        handover.end()
    return backends


def _pretend(gmemd: Gmemd, handover: Handover, result: str) -> None:
    """What `_conclude` does to the objects, without watching anybody; for a trial."""
    side = handover.new
    for backend in _of(gmemd, handover):
        backend.handover = None
        if result == "new":
            backend.runner = Runner(side.pid, side.start, side.uid)
            backend.generation += 1


def _conclude(gmemd: Gmemd, handover: Handover, result: str, change: Change) -> None:
    """Forget a handover; the new VMM is the runner if the guest runs there."""
    def undo() -> None:
        _note(gmemd, handover, handover)
        _resume(gmemd, handover)

    change.undo(undo)
    for backend in _note(gmemd, handover, None):
        side = handover.new
        if result == "new":
            exchange(gmemd, backend, Runner(side.pid, side.start, side.uid), change)
        else:
            change.rewrite(backend)


# -- when the client has ended -----------------------------------------------------------------------

def watch_handovers(gmemd: Gmemd) -> None:
    """Watch the clients of the handovers that a predecessor has left, or bring these to an end."""
    seen: dict[tuple[str, ...], Handover] = {}
    for backend in list(gmemd.objects):
        if backend.handover is not None:
            backend.handover = seen.setdefault(backend.handover.ids, backend.handover)
    for handover in seen.values():
        _resume(gmemd, handover)


def _watch(gmemd: Gmemd, handover: Handover) -> bool:
    """Wait for the client's end; False when it has ended already."""
    end = watch(*handover.client, lambda: gmemd.spawn(_mend(gmemd, handover)))
    if end is None:
        return False
    handover.end = end
    return True


def _resume(gmemd: Gmemd, handover: Handover) -> None:
    try:
        living = _watch(gmemd, handover)
    except OSError:  # for example too few descriptors
        handover.end = asyncio.get_running_loop().call_later(_AGAIN, _resume, gmemd, handover).cancel
        return
    if not living:
        gmemd.spawn(_mend(gmemd, handover))


async def _mend(gmemd: Gmemd, handover: Handover) -> None:
    """The client has ended: let the guest run in one of the two, and never in both; until that is certain, again."""
    def end(gmemd: Gmemd, caller: None, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
        _conclude(gmemd, handover, result, change)
        return {}

    while any(backend.handover is handover for backend in _of(gmemd, handover)):
        try:
            result = await in_thread(_settle, handover.old, handover.new)
            await completed(changing(gmemd.settler, end)(gmemd, None, {}))
        except QmpError as exc:
            handover.trouble = exc.desc
            await asyncio.sleep(_AGAIN)
            continue
        gmemd.emit("MEMDEV_HANDOVER_ENDED", {"ids": list(handover.ids), "result": result})


def _settle(old: Side, new: Side) -> str:
    """The same, in a thread: where the guest runs."""
    with _party(old) as before, _party(new) as after:
        return settle(before, after)


def _party(side: Side) -> Party:
    with os_errors(f"cannot examine process {side.pid}"):
        party = Party.of(side.pid, side.qmp, Paths(side.root))
        # checked after opening: a pidfd stays with its process
        if party.lives() and start_time(side.pid) != side.start:
            party.forget()
        return party
