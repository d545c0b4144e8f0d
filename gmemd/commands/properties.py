"""The command that changes a property of an object, and what it shares with other changing commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.commands.charging import check_resident
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.contexts import AFFINITIES, change_cpus
from gmemd.kernel.affinity import bound
from gmemd.objects.qom import ContextNode


def qom_set(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    node, name, value = gmemd.tree.resolve(arguments["path"]), arguments["property"], arguments["value"]
    if isinstance(node, ContextNode) and name in AFFINITIES:
        return change_cpus(gmemd.schema, node.context, name, value, change)
    backend = node.backend
    if backend is None or name not in backend.property_names():
        return node.set(name, value, change.judged_alone)
    gmemd = gmemd.of(backend)
    backend.check_idle()
    value = judge_value(gmemd, backend, name, value)
    if name == "prealloc" and value and not backend.properties["prealloc"]:
        backend.check_writable()
    if change.dry_run:
        change.judged(f"change '{name}' of '{backend.id}' from {backend.get(name)!r} to {value!r}",
                      whole=name != "prealloc", then=partial(backend.set, name, value))
    if name == "prealloc" and value and not backend.properties["prealloc"]:
        change.claim(backend, "it is being populated")
        return _preallocate(gmemd, backend, change)
    return set_property(backend, name, value, change)


def judge_value(gmemd: Gmemd, backend: HostMemoryBackend, name: str, value: Any) -> Any:
    """The value to which a property of a live object may be set; QmpError if it may not."""
    backend.refuse_set(name, seen=False)
    value = gmemd.schema.check_property(backend.qom_type, name, value)
    if name == "prealloc-context" and value:
        value = gmemd.find_context(value)
    backend.refuse_set(name, seen=True)
    backend.check_value(name, value)
    return value


def populate(gmemd: Gmemd, backend: HostMemoryBackend, progress: Callable[[int], None] | None = None,
             cancelled: Callable[[], bool] | None = None) -> None:
    """Allocate every page, on the CPUs of the object's thread context; blocks."""
    with bound(gmemd.objects.context_cpus(backend)):
        backend.populate(gmemd.kernel, progress, cancelled)


async def _preallocate(gmemd: Gmemd, backend: HostMemoryBackend, change: Change) -> dict[str, Any]:
    await check_resident(gmemd, change, backend.memory_size)
    await in_thread(populate, gmemd, backend)
    return set_property(backend, "prealloc", True, change)


def set_property(backend: HostMemoryBackend, name: str, value: Any, change: Change) -> dict[str, Any]:
    """Store a checked value, also in the record."""
    before = backend.properties.get(name)
    change.undo(lambda: backend.reset(name, before))
    backend.set(name, value)
    change.rewrite(backend)
    return {}
