"""The CPUs of thread contexts: the choice is checked, and the kernel decides what a thread gets of it."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Final

from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.affinity import bind, cpus_of
from gmemd.objects.container import ThreadContext
from gmemd.schema.validate import Schema

AFFINITIES: Final = {"cpu-affinity": "CPU", "node-affinity": "Node"}


def check_cpus(properties: Mapping[str, Any]) -> None:
    """Check the lists of a thread context."""
    for name, what in AFFINITIES.items():
        if properties.get(name) == []:
            raise QmpError(f"{what} list is empty")
    if "cpu-affinity" in properties and "node-affinity" in properties:
        raise QmpError("Mixing CPU and node affinity not supported")


async def usable_cpus(properties: Mapping[str, Any]) -> list[int]:
    """The CPUs that a thread gets of the chosen ones, tried in a separate thread."""
    cpus: set[int] | None = None
    if "node-affinity" in properties:
        cpus = cpus_of(properties["node-affinity"])
        if not cpus:
            raise QmpError("The nodes select no CPUs")
    elif "cpu-affinity" in properties:
        cpus = set(properties["cpu-affinity"])
    with os_errors("Setting CPU affinity failed"):
        found: list[int] = await in_thread(bind, cpus)
    return found


def change_cpus(schema: Schema, context: ThreadContext, name: str, value: Any,
                change: Change) -> Coroutine[Any, Any, dict[str, Any]]:
    """Set the CPUs of a thread context by one of AFFINITIES; the result of qom-set."""
    chosen = {name: schema.check_property(context.qom_type, name, value)}
    check_cpus(chosen)
    change.judged()

    async def work() -> dict[str, Any]:
        cpus = await usable_cpus(chosen)
        change.undo(setattr, context, "cpus", context.cpus)
        context.cpus = cpus
        return {}

    return work()
