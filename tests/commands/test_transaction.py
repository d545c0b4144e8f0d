"""memdev-transaction: all actions or none, later ones find what earlier ones did, and a dry run changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gmemd.authority.ledger import Ledger
from gmemd.authority.rights import Rights, Role
from gmemd.changes.change import WithFds
from gmemd.changes.completed import completed
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.schema.validate import Schema
from tests.commands.conftest import Machine
from tests.commands.live import LiveMachine
from tests.commands.test_effect import state

MIB = 1 << 20
Action = tuple[str, dict[str, Any]]


def _add(object_id: str, **properties: Any) -> Action:
    return "object-add", {"qom-type": "memory-backend-memfd", "id": object_id, "size": MIB, **properties}


def _set(object_id: str, name: str, value: Any) -> Action:
    return "qom-set", {"path": f"/objects/{object_id}", "property": name, "value": value}


PAIRED: dict[str, Action] = {
    "add": _add("n"),
    "add, preallocated": _add("n", prealloc=True),
    "add the same": _add("o"),
    "add a context": ("object-add", {"qom-type": "thread-context", "id": "n"}),
    "add one that uses a context": _add("n", **{"prealloc-context": "/objects/c", "prealloc": True}),
    "delete": ("object-del", {"id": "o"}),
    "delete the new one": ("object-del", {"id": "n"}),
    "delete the context": ("object-del", {"id": "c"}),
    "delete the template": ("object-del", {"id": "t"}),
    "delete by force": ("memdev-delete", {"id": "o", "force": True}),
    "set merge": _set("o", "merge", False),
    "set dump of the new one": _set("n", "dump", False),
    "set prealloc": _set("o", "prealloc", True),
    "set the context's CPUs": _set("c", "cpu-affinity", [min(os.sched_getaffinity(0))]),
    "clone": ("memdev-clone", {"template": "t", "id": "n"}),
    "copy": ("memdev-clone", {"template": "o", "id": "n", "copy": True, "fence": {"via": "unfenced"}}),
    "run": ("memdev-set-runner", {"id": "o", "force": True}),
    "run no more": ("memdev-clear-runner", {"id": "o"}),
    "release": ("memdev-release", {"id": "o"}),
    "hand over": ("memdev-handover", {"ids": ["o"], "old": {"pid": os.getpid(), "qmp": "/a"},
                                      "new": {"pid": 1, "qmp": "/b"}}),
    "make a room": ("memdev-room-add", {"id": "r", "limits": {"objects": 1}}),
    "add into that room": _add("n@r"),
    "add into a room": _add("n@e"),
    "remove that room": ("memdev-room-del", {"id": "e"}),
    "end the handover": ("memdev-handover-end", {"id": "o", "result": "new"}),
}


FURNITURE: list[Action] = [_add("o"), _add("t"), ("object-add", {"qom-type": "thread-context", "id": "c"}),
                           ("memdev-freeze", {"id": "t"}), ("memdev-room-add", {"id": "e"}),
                           ("memdev-get-fd", {"id": "o", "lease": "keep"})]
SCHEMA = Path(__file__).parents[2] / "gmemd" / "schema"
_SCHEMA = Schema.load()


def transact(machine: Machine, *actions: Action, **arguments: Any) -> Any:
    return machine.run("memdev-transaction", actions=[{"type": name, "data": data} for name, data in actions],
                       **arguments)


@pytest.fixture
def scene(machine: Machine) -> Machine:
    """The objects 'o' and 't', a template, the thread context 'c', and the room 'e'."""
    for action in FURNITURE[:5]:
        machine.execute(*action)
    return machine


def _seen(machine: Machine) -> Any:
    """All that a client sees, and what is taken."""
    objects = machine.gmemd.objects
    backends = [(one.id, dict(one.properties), one.claims, one.generation, one.runner and one.runner.pid, one.template,
                 one.handover and one.handover.ids, one.lease and one.lease.pid, one.fd >= 0) for one in objects]
    return (sorted(backends), sorted(objects._adding), sorted(objects._barred), sorted(objects._slots), objects.sums,
            {name: context.cpus for name, context in objects.contexts.items()},
            {name: [one.id for one in room.objects] for name, room in machine.gmemd.rooms.items()})


def test_every_kind_of_action_is_paired() -> None:
    """What the schema allows is tried below."""
    allowed = json.loads((SCHEMA / "qom.json").read_text())["$defs"]["MemdevActionKind"]
    assert {name for name, _ in PAIRED.values()} == set(allowed["enum"])


@pytest.mark.parametrize("first", PAIRED)
async def test_two_actions_do_what_they_do_alone_or_nothing(first: str) -> None:
    """Every ordered pair: the result is that of one after the other; if either is refused, nothing has happened.

    A dry run says before what happens. GMEMD_PAIRS=all: not only a fifth of them.
    """
    at = list(PAIRED).index(first)
    for second in PAIRED if os.environ.get("GMEMD_PAIRS") == "all" else list(PAIRED)[at % 5::5]:
        alone, together = LiveMachine(schema=_SCHEMA), LiveMachine(schema=_SCHEMA)
        try:
            await _paired(alone, together, PAIRED[first], PAIRED[second])
        except AssertionError as exc:
            raise AssertionError(f"{first}, {second}") from exc
        finally:
            await alone.close()
            await together.close()


async def _paired(alone: LiveMachine, together: LiveMachine, first: Action, second: Action) -> None:
    for machine in (alone, together):
        for action in FURNITURE:
            await _do(machine, *action)
    before, error = (_seen(together), list(together.events)), None
    for action in (first, second):
        try:
            await _do(alone, *action)
        except QmpError as exc:
            error = exc
            break
    arguments = {"actions": [{"type": name, "data": data} for name, data in (first, second)]}
    planned = (await _do(together, "memdev-transaction", arguments | {"dry-run": True}))["actions"]
    assert (_seen(together), together.events) == before
    refused = [row["refused"]["desc"] for row in planned if "refused" in row]
    if error is None:
        await _do(together, "memdev-transaction", arguments)
        assert _seen(together) == _seen(alone)
        assert [event for event, _ in together.events] == [event for event, _ in alone.events]
        assert not refused
    else:
        with pytest.raises(QmpError) as caught:
            await _do(together, "memdev-transaction", arguments)
        assert caught.value.desc.endswith(error.desc)
        assert (_seen(together), together.events) == before
        assert refused[:1] == [caught.value.desc]


async def _do(machine: LiveMachine, name: str, arguments: dict[str, Any]) -> Any:
    result = await completed(machine.begin(name, arguments))
    if isinstance(result, WithFds):
        for fd in result.fds:
            os.close(fd)
    return result


def test_an_error_says_which_action(scene: Machine) -> None:
    assert scene.refusal("memdev-transaction", actions=[
        {"type": "object-add", "data": _add("n")[1]}, {"type": "object-del", "data": {"id": "gone"}}]) == (
            "GenericError", "actions[1] (object-del): object 'gone' not found")
    assert scene.refusal("memdev-transaction", actions=[{"type": "quit"}]) == (
        "GenericError", "Parameter 'type' does not accept value 'quit'")
    assert scene.refusal("memdev-transaction", actions=[{"type": "object-del", "data": 1}]) == (
        "GenericError", "actions[0] (object-del): Invalid parameter type for 'data', expected: object")
    assert scene.refusal("memdev-transaction", actions=[{"type": "object-del"}]) == (
        "GenericError", "actions[0] (object-del): Parameter 'id' is missing")


@pytest.mark.parametrize("arguments", [{"zero": True}, {"job-id": "j"}])
def test_what_cannot_be_undone_is_refused_before_anything_acts(scene: Machine, arguments: dict[str, Any]) -> None:
    before = _seen(scene)
    with pytest.raises(QmpError, match=f"parameter '{next(iter(arguments))}' is not for a transaction"):
        transact(scene, _add("n"), ("memdev-delete", {"id": "o", **arguments}))
    assert _seen(scene) == before


def test_a_dry_run_says_what_would_become_of_memory(scene: Machine) -> None:
    """Bytes in all, by page size and by node; and each refusal, as if that action were not there."""
    before = state(scene)
    planned = transact(scene, _add("n", size=3 * MIB), ("object-del", {"id": "o"}), _add("n"), _set("n", "size", 1),
                       _set("n", "merge", False), dry_run=True)
    assert [next(name for name in ("effect", "refused") if name in row) for row in planned["actions"]] == [
        "effect", "effect", "refused", "refused", "effect"]
    assert planned["bytes"] == 2 * MIB
    assert [(row["page-size"], row["bytes"], row["free"] > 0) for row in planned["pages"]] == [(4096, 2 * MIB, True)]
    assert sum(row["bytes"] for row in planned["nodes"]) == 2 * MIB
    assert state(scene) == before


def test_its_effect_is_refused_as_it_is(scene: Machine) -> None:
    """query-command-effect of a transaction."""
    actions = [{"type": "object-del", "data": {"id": "o"}}]
    assert scene.run("query-command-effect", command="memdev-transaction",
                     arguments={"actions": actions})["effect"] == "would carry out 1 actions, or none"
    with pytest.raises(QmpError, match=r"^actions\[1\] \(object-del\): object 'o' not found$"):
        scene.run("query-command-effect", command="memdev-transaction", arguments={"actions": actions * 2})


def test_while_it_waits_nobody_changes_what_it_has_changed(scene: Machine) -> None:
    """An object that it changed is busy, an id that it freed is taken, and afterwards neither is."""
    actions = [{"type": name, "data": data} for name, data in (
        _set("o", "merge", False), ("object-del", {"id": "c"}),
        _add("n", prealloc=True, size=8 * MIB))]
    refused: list[str] = []

    async def meanwhile() -> None:
        waiting = asyncio.ensure_future(scene.begin("memdev-transaction", {"actions": actions}))
        await asyncio.sleep(0)
        for name, data in (("object-del", {"id": "o"}), ("object-add", _add("c")[1]), ("object-add", _add("n")[1])):
            try:
                scene.begin(name, data)
            except QmpError as exc:
                refused.append(exc.desc)
        await waiting

    asyncio.run(meanwhile())
    assert refused == ["object 'o' is busy: a transaction is changing it",
                       "object 'c' is being deleted by a transaction",
                       "attempt to add duplicate property 'n' to object (type 'container')"]
    assert scene.run("object-del", id="o") == {}
    scene.execute(*_add("c"))


def test_a_transaction_is_no_way_round_a_policy(machine: Machine) -> None:
    """An action whose command, or type of object, the client may not use is refused as alone, and nothing is done."""
    machine.run("object-add", **{"qom-type": "memory-backend-memfd", "id": "o", "size": MIB})
    allowed = frozenset(("object-add", "memdev-transaction", "query-command-effect"))
    machine.rights = Rights(Role.TENANT, commands=allowed, types=frozenset(("memory-backend-memfd",)))
    machine.usable = machine.dispatcher.usable(machine.rights)
    for kind, data, why in (
            ("object-del", {"id": "o"}, (COMMAND_NOT_FOUND, "Command object-del disabled by policy")),
            ("object-add", {"qom-type": "memory-backend-ram", "id": "r", "size": MIB},
             ("GenericError", "type 'memory-backend-ram' is disabled by policy"))):
        actions = [{"type": "object-add", "data": {"qom-type": "memory-backend-memfd", "id": "n", "size": MIB}},
                   {"type": kind, "data": data}]
        words = (why[0], f"actions[1] ({kind}): {why[1]}")
        assert machine.refusal("memdev-transaction", actions=actions) == words
        assert machine.refusal("query-command-effect", command="memdev-transaction",
                               arguments={"actions": actions}) == words
        assert [one.id for one in machine.gmemd.objects] == ["o"]


def test_a_dry_run_counts_the_quota_of_all_actions_together(scene: Machine) -> None:
    """As the transaction itself: what is deleted counts until the end, what would be refused does not."""
    ledger = Ledger()
    scene.budget = ledger.budget("uid:0", {"objects": 3, "bytes": 4 * MIB})
    scene.execute(*_add("a"))
    actions = [_add("b"), ("object-del", {"id": "a"}), _add("f", size=3 * MIB), ("memdev-clone", {
        "template": "t", "id": "d"}), _add("e")]
    planned = transact(scene, *actions, dry_run=True)
    refused = [row["refused"]["desc"] if "refused" in row else "" for row in planned["actions"]]
    assert refused == ["", "", f"actions[2] (object-add): the quota of 'bytes' is {4 * MIB}: {2 * MIB} are used, and "
                       f"{3 * MIB} more were asked for", "",
                       "actions[4] (object-add): the quota of 'objects' is 3: 3 are used, and 1 more were asked for"]
    assert planned["quota"] == [{"what": "bytes", "used": 3 * MIB, "limit": 4 * MIB},
                                {"what": "objects", "used": 3, "limit": 3}]
    [account] = ledger
    assert (account.used("bytes"), account.used("objects"), len(account.objects)) == (MIB, 1, 1)
    with pytest.raises(QmpError, match=re.escape(refused[2])):
        transact(scene, *actions)
    assert (account.used("bytes"), account.used("objects"), len(account.objects)) == (MIB, 1, 1)


def test_memory_that_a_transaction_has_populated_counts_once(scene: Machine) -> None:
    """Each of two actions populates memory, and both together as much as may be in memory."""
    scene.budget = Ledger().budget("uid:0", {"resident": 2 * MIB})
    actions = [_add("a", prealloc=True), _add("b", prealloc=True)]
    assert [row for row in transact(scene, *actions, dry_run=True)["actions"] if "refused" in row] == []
    transact(scene, *actions)
    assert scene.budget.account.used("resident") == 0


def test_those_who_see_all_change_what_is_in_rooms(scene: Machine) -> None:
    """A transaction of an operator names a tenant's objects ID@UID, and the tenant's own does not reach others'."""
    scene.become(1000)
    scene.execute(*_add("o"))
    scene.execute(*_add("p"))
    with pytest.raises(QmpError, match=r"^actions\[1\] \(object-del\): object 't' not found$"):
        transact(scene, ("object-del", {"id": "o"}), ("object-del", {"id": "t"}))
    scene.become(None)
    actions = [_set("o@1000", "merge", False), _set("o", "dump", False), ("object-del", {"id": "p@1000"}), _add("p")]
    transact(scene, *actions, dry_run=True)
    with pytest.raises(QmpError, match=r"^actions\[4\] \(object-del\): object 'x@1000' not found$"):
        transact(scene, *actions, ("object-del", {"id": "x@1000"}))
    house, room = scene.gmemd.objects, scene.gmemd.rooms["1000"].objects
    assert (room.find("o").properties["merge"], room.is_taken("p"), house.is_taken("p")) == (True, True, False)
    transact(scene, *actions)
    assert (room.find("o").properties["merge"], house.find("o").properties["merge"]) == (False, True)
    assert (room.find("o").properties["dump"], house.find("o").properties["dump"]) == (True, False)
    assert (room.is_taken("p"), house.is_taken("p")) == (False, True)
