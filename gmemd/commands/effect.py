"""What a command would do, without doing it: the decisions of the command, then a sentence instead of the act."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.contexts import check_cpus
from gmemd.commands.conversion import part, visibility_of
from gmemd.commands.measure import measured
from gmemd.commands.properties import judge_value
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.memory.ranges import PRIVATE
from gmemd.memory.usage import Item, occupied
from gmemd.objects.container import ThreadContext

Effect = tuple[str, bool]  # the sentence behind "would", and whether everything was looked at
Judge = Callable[[Gmemd, Caller, dict[str, Any]], Effect | Coroutine[Any, Any, Effect]]


def query_command_effect(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return effect_of(gmemd, caller, arguments, _EFFECTS)


def effect_of(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], judges: Mapping[str, Judge]) -> Any:
    """The answer of query-command-effect; `judges` are for the commands of which more is known than their schema."""
    name, given = arguments["command"], arguments.get("arguments", {})
    command = gmemd.schema.commands.get(name)
    if command is None:
        raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND)
    if type(given) is not dict:
        raise QmpError("QMP input member 'arguments' must be an object")
    command.check_policy()
    complete = command.check(given)
    judge = _reading if command.reads_only else judges.get(name, _other)
    effect = judge(gmemd, caller, complete)
    return _answer(*effect, complete) if isinstance(effect, tuple) else _answer_later(effect, complete)


def _answer(effect: str, is_whole: bool, complete: dict[str, Any]) -> dict[str, Any]:
    return {"effect": f"would {effect}", "complete": is_whole, "arguments": complete}


async def _answer_later(effect: Coroutine[Any, Any, Effect], complete: dict[str, Any]) -> dict[str, Any]:
    return _answer(*await effect, complete)


def _reading(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    return "only read", True


def _other(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    return "be run: its arguments fit", False


def _object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    if arguments["qom-type"] == ThreadContext.qom_type:
        check_cpus(arguments)
        gmemd.objects.reserve(arguments["id"])
        gmemd.objects.release(arguments["id"])
        return f"make the thread context '{arguments['id']}', gone when gmemd ends", False
    backend = gmemd.objects.judge(arguments, (caller.uid, caller.pid), gmemd.tree.find_context)
    if gmemd.custody is not None:
        gmemd.custody.reserve()
        gmemd.custody.release()
    kept = "kept over restarts of gmemd" if gmemd.custody is not None else "gone when gmemd ends"
    if not backend.on_trial or gmemd.lab is not None:  # what was injected is not for us
        return f"make '{backend.id}' of {backend.size} bytes, {kept}", False
    try:
        backend.allocate(gmemd.kernel)
        backend.finish(gmemd.kernel)
        if backend.properties["prealloc"]:
            _check_room(gmemd, backend)
        made = f"make '{backend.id}', {backend.memory_size} bytes of {backend.kind}, {kept}"
    finally:
        backend.close()
    return made, not backend.properties["prealloc"]


def _check_room(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    try:
        gmemd.kernel.check_headroom(backend.memory_size, backend.fd)
    except OSError as exc:
        raise QmpError(f"qemu_prealloc_mem: preallocating memory failed: {os.strerror(exc.errno or 0)}") from exc


def _object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect | Coroutine[Any, Any, Effect]:
    object_id = arguments["id"]
    if object_id in gmemd.lost:
        return f"delete what is left of '{object_id}', which is lost", True
    if object_id in gmemd.objects.contexts:
        return f"delete the thread context '{object_id}'", True
    backend = gmemd.objects.find(object_id)
    backend.check_idle()
    return _with_resident(gmemd, backend, 0, backend.memory_size, lambda resident: (
        f"delete '{backend.id}' with {resident} bytes in memory; its descriptor was handed out "
        f"{backend.handed_out} times, and who still has it keeps the memory"))


def _qom_set(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    node, name, value = gmemd.tree.resolve(arguments["path"]), arguments["property"], arguments["value"]
    backend = node.backend
    if backend is None or name not in backend.property_names():
        node.get(name)
        raise QmpError(f"Property '{node.type_name}.{name}' is not writable")
    value = judge_value(gmemd, backend, name, value)
    return f"change '{name}' of '{backend.id}' from {backend.get(name)!r} to {value!r}", name != "prealloc"


def _convert(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    backend, offset, size = part(gmemd, arguments)
    to = arguments["to"]
    changed = sum(length for _, length, state in visibility_of(backend).ranges(offset, size)
                  if (state is PRIVATE) != (to == "private"))
    content = "keep their content" if arguments["preserve"] else "read as zero"
    return f"make {changed} of {size} bytes of '{backend.id}' {to}; they would {content}", False


def _discard(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Effect]:
    backend, offset, size = part(gmemd, arguments)
    return _with_resident(gmemd, backend, offset, size, lambda resident: (
        f"give back {resident} of {size} bytes of '{backend.id}', which then read as zero"))


async def _with_resident(gmemd: Gmemd, backend: HostMemoryBackend, offset: int, size: int,
                         sentence: Callable[[str], str]) -> Effect:
    """The sentence with how many bytes of a part of an object are in memory."""
    def resident(item: Item) -> int | None:
        return occupied(gmemd.kernel, item._replace(offset=item.offset + offset, size=size, aside_fd=-1))

    async for found in measured(gmemd, [backend], resident):
        for _, count in found:
            return sentence("an unknown number of" if count is None else str(count)), True
    raise QmpError(f"object '{backend.id}' not found")


def _job(verb: str) -> Callable[[Gmemd, Caller, dict[str, Any]], Effect]:
    def effect(gmemd: Gmemd, _caller: Caller, arguments: dict[str, Any]) -> Effect:
        job = gmemd.jobs.find(arguments["id"]).describe()
        return f"{verb} the job '{job['id']}', which is {job['status']}", False

    return effect


def _quit(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Effect:
    kept = sum(backend.record is not None for backend in gmemd.objects)
    return f"end gmemd; of {len(gmemd.objects)} objects {kept} come back with the next one", True


_EFFECTS: dict[str, Judge] = {
    "object-add": _object_add, "object-del": _object_del, "qom-set": _qom_set, "memdev-convert": _convert,
    "memdev-discard": _discard, "job-cancel": _job("cancel"), "job-dismiss": _job("dismiss"), "quit": _quit,
}
