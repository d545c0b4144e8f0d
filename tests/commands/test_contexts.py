"""Thread contexts: objects that are not memory, and say where threads run that preallocate it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.kernel.affinity import cpus_of
from gmemd.objects.records import backend_of, record_of
from tests.commands.conftest import Machine

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))


class Watched:
    """A kernel that notes on which CPUs it populates."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.cpus: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def populate(self, *arguments: Any, **options: Any) -> None:
        self.cpus.append(sorted(os.sched_getaffinity(0)))
        self._kernel.populate(*arguments, **options)


def test_preallocation_runs_where_the_context_says(machine: Machine) -> None:
    """At object-add, qom-set and memdev-populate; not once the context is gone, and nowhere else."""
    machine.gmemd.kernel = kernel = Watched(machine.gmemd.kernel)  # type: ignore[assignment]
    machine.run("object-add", qom_type="thread-context", id="tc", cpu_affinity=CPUS[:1])
    memory = {"qom_type": "memory-backend-ram", "size": MIB, "prealloc_context": "tc"}
    machine.run("object-add", id="m0", prealloc=True, **memory)
    for object_id in ("m1", "m2", "m3"):
        machine.run("object-add", id=object_id, **memory)
    machine.run("qom-set", path="m1", property="prealloc", value=True)
    machine.run("memdev-populate", id="m3")
    machine.run("object-del", id="tc")
    machine.run("qom-set", path="m2", property="prealloc", value=True)
    assert kernel.cpus == [CPUS[:1], CPUS[:1], CPUS[:1], CPUS]
    assert sorted(os.sched_getaffinity(0)) == CPUS


def test_what_a_context_tells(machine: Machine) -> None:
    """Its thread is the one that starts others; the nodes can only be set, and have no value in a list."""
    machine.run("object-add", qom_type="thread-context", id="tc")
    [entry] = machine.run("qom-list-get", paths=["tc"])
    assert entry["properties"] == [
        {"name": "type", "type": "string", "value": "thread-context"},
        {"name": "thread-id", "type": "int", "value": os.getpid()},
        {"name": "node-affinity", "type": "int"},
        {"name": "cpu-affinity", "type": "int", "value": CPUS}]


def test_one_id_for_one_object(machine: Machine) -> None:
    """The id is taken while the kernel judges, and free again when it refuses."""
    new = {"qom-type": "thread-context", "id": "tc"}

    async def both() -> list[Any]:
        first = machine.begin("object-add", new)
        with pytest.raises(QmpError, match="attempt to add duplicate property 'tc' to object"):
            machine.begin("object-add", new)
        return [await first]

    assert asyncio.run(both()) == [{}]
    machine.run("object-del", id="tc")
    assert machine.refusal("object-add", qom_type="thread-context", id="tc", cpu_affinity=[65535]) == (
        "GenericError", "Setting CPU affinity failed: Invalid argument")
    assert machine.execute("object-add", new) == {}


def test_what_comes_back_names_no_context(machine: Machine) -> None:
    """A context ends with the daemon, and so does what points to it."""
    machine.run("object-add", qom_type="thread-context", id="tc")
    machine.run("object-add", qom_type="memory-backend-ram", id="m0", size=MIB, prealloc_context="tc")
    backend = machine.gmemd.objects.find("m0")
    assert backend.get("prealloc-context") == "/objects/tc"
    restored = backend_of(record_of(backend, machine.gmemd.kernel), -1, machine.gmemd.schema)
    assert restored.get("prealloc-context") == ""


def test_its_effect(machine: Machine) -> None:
    """query-command-effect judges it and makes nothing."""
    new = {"qom-type": "thread-context", "id": "tc"}
    for _ in range(2):
        found = machine.run("query-command-effect", command="object-add", arguments=new)
        assert found["effect"] == "would create the thread context 'tc', which ends with gmemd"
    machine.execute("object-add", new)
    assert machine.refusal("query-command-effect", command="object-add", arguments=new)[1].startswith("attempt to add")
    found = machine.run("query-command-effect", command="object-del", arguments={"id": "tc"})
    assert found["effect"] == "would delete the thread context 'tc'"
    machine.run("object-del", id="tc")


@pytest.mark.parametrize(("nodes", "cpus"), [([0], {0, 1, 2, 3, 8}), ([1], {4}), ([0, 1], {0, 1, 2, 3, 4, 8}),
                                             ([2], set()), ([3, 1], {4})])
def test_cpus_of_nodes(tmp_path: Path, nodes: list[int], cpus: set[int]) -> None:
    """sysfs lists them in ranges; a node may have none, or not be there."""
    for node, text in enumerate(["0-3,8\n", "4\n", "\n"]):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(text)
    assert cpus_of(nodes, str(tmp_path)) == cpus


def test_cpus_without_nodes(tmp_path: Path) -> None:
    """A kernel without NUMA has all CPUs at node 0."""
    assert (cpus_of([0], str(tmp_path)), cpus_of([1], str(tmp_path))) == (set(CPUS), set())
