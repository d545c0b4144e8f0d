"""The command that changes a property of an object, and what it shares with other changing commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.claims import claimed
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd, recorded
from gmemd.commands.contexts import AFFINITIES, change_cpus
from gmemd.kernel.affinity import bound
from gmemd.objects.qom import ContextNode


def qom_set(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    node, name, value = gmemd.tree.resolve(arguments["path"]), arguments["property"], arguments["value"]
    if isinstance(node, ContextNode) and name in AFFINITIES:
        return change_cpus(gmemd.schema, node.context, name, value)
    backend = node.backend
    if backend is None or name not in backend.property_names():
        return node.set(name, value)
    backend.check_idle()
    value = judge_value(gmemd, backend, name, value)
    if name == "prealloc" and value and not backend.properties["prealloc"]:
        return claimed(gmemd, backend, "it is being populated", lambda: _preallocate(gmemd, backend))
    return set_property(gmemd, backend, name, value)


def judge_value(gmemd: Gmemd, backend: HostMemoryBackend, name: str, value: Any) -> Any:
    """The value that a property of a live object may be set to; QmpError if it may not."""
    backend.refuse_set(name, seen=False)
    value = gmemd.schema.check_property(backend.qom_type, name, value)
    if name == "prealloc-context" and value:
        value = gmemd.tree.find_context(value)
    backend.refuse_set(name, seen=True)
    backend.check_value(name, value)
    return value


def populate(gmemd: Gmemd, backend: HostMemoryBackend, progress: Callable[[int], None] | None = None,
             cancelled: Callable[[], bool] | None = None) -> None:
    """Allocate every page, on the CPUs of the object's thread context; blocks."""
    with bound(gmemd.objects.context_cpus(backend)):
        backend.populate(gmemd.kernel, progress, cancelled)


async def _preallocate(gmemd: Gmemd, backend: HostMemoryBackend) -> Any:
    await in_thread(populate, gmemd, backend)
    return set_property(gmemd, backend, "prealloc", True)


def set_property(gmemd: Gmemd, backend: HostMemoryBackend, name: str, value: Any) -> Any:
    """Store a judged value, also in the record; the result of the command that does so."""
    before = backend.properties.get(name)
    backend.set(name, value)
    return recorded(gmemd, backend, {}, undo=lambda: backend.reset(name, before))
