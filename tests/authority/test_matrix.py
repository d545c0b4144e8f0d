"""The authorisation matrix: every command of the schema, by every role, on an own, a foreign and an absent object.

It is generated from the schema, so a new command has its rows at once; without a role in the schema it fails. A command
that changes something is judged by query-command-effect, which is the command itself up to where it would act, so one
host serves all rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gmemd.authority.peer import Peer
from gmemd.authority.policy import Policy
from gmemd.authority.reading import read_policy
from gmemd.authority.rights import Role
from gmemd.commands import lab
from gmemd.commands.dispatch import MODULES
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.lab import Lab
from gmemd.objects.fds import NamedFds
from gmemd.schema.validate import Schema
from tests.arguments import of_every_command
from tests.commands.conftest import Machine
from tests.commands.test_indistinguishable import of_the_host, value

SCHEMA = Schema.load(lab=True)
OWN, OTHER = 1000, 1001
SIZE = 1 << 20
ROLES = ("observer", "member", "tenant", "operator", "admin")
CELL = "cell"  # the room of the member
# The users of the rules: the tenant and the member have objects of their own, those of the others are the house's.
UIDS = {"observer": 2001, "member": 2002, "tenant": OWN, "operator": 2003, "admin": os.geteuid()}
OBJECTS = ("own", "foreign", "absent")
# What a role may beyond the one before it; everything else is for tenants, or if it only reads, for observers.
ADMINS = {"quit", "x-memdev-inject", "x-memdev-inject-clear", "x-query-memdev-injections"}
OPERATORS = {"memdev-claim", "memdev-room-add", "memdev-room-del", "query-memdev-rooms"}
# What tenants may beyond members: to make and remove objects, and to have gmemd do something to other processes.
TENANTS = {"add-fd", "memdev-adopt", "memdev-clear-runner", "memdev-clone", "memdev-delete", "memdev-freeze",
           "memdev-handover", "memdev-handover-end", "memdev-import", "memdev-move", "memdev-move-resolve",
           "memdev-persist", "memdev-restore", "memdev-set-runner", "memdev-snapshot-import", "object-add",
           "object-del", "qom-set", "remove-fd", "yank"}


class Row(NamedTuple):
    role: str
    object: str
    command: str
    arguments: dict[str, Any]


def renamed(given: Any, name: str) -> Any:
    """Arguments that name an object instead of `x`."""
    if isinstance(given, dict):
        return {member: renamed(inner, name) for member, inner in given.items()}
    if isinstance(given, list):
        return [renamed(inner, name) for inner in given]
    return {"x": name, "/objects/x": f"/objects/{name}"}.get(given, given) if isinstance(given, str) else given


def name_of(role: str, kind: str) -> str:
    if kind == "foreign":
        return "theirs" if role in ("member", "tenant") else f"theirs@{OTHER}"
    return "mine" if kind == "own" else "nobodys"


def rows() -> Iterator[Row]:
    """Each command with what it requires, and with all that it takes."""
    for name, least, members in of_every_command(SCHEMA, lambda member, inner: value(inner, member)):
        for arguments in [least] if least == members else [least, members]:
            for role in ROLES:
                for kind in OBJECTS:
                    yield Row(role, kind, name, renamed(arguments, name_of(role, kind)))


ROWS = list(rows())


def _match(role: str, uid: int) -> str:
    return "namespace = 'team'" if role == "member" else f"uid = {uid}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text("version = 1\n" + "".join(
        f'[[rule]]\nname = "{role}"\nmatch = {{ {_match(role, uid)} }}\nrole = "{role}"\n'
        for role, uid in UIDS.items()))
    path.chmod(0o600)
    return read_policy(str(path), SCHEMA)


class Host(Machine):
    """A host on which the house, a tenant, another one and a made room have an object each."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        super().__init__(schema=SCHEMA, modules=(*MODULES, lab), lab=Lab(), snapshots=str(folder))
        self._policy = policy
        for uid, name in ((None, "mine"), (OWN, "mine"), (OTHER, "theirs")):
            self.become(uid)
            self.run("object-add", qom_type="memory-backend-memfd", id=name, size=SIZE)
        self.become(None)
        self.run("memdev-room-add", id=CELL, namespace="team")
        self.run("object-add", qom_type="memory-backend-memfd", id=f"mine@{CELL}", size=SIZE)

    def play(self, role: str) -> None:
        """Be who has a role."""
        uid = UIDS[role]
        self.rights = (self._policy.rights_in(CELL, "team") if role == "member" else
                       self._policy.rights_of(Peer(os.getpid(), uid, uid, ruid=uid)))
        self.uid = uid
        self.room = self.gmemd.room_of(self.rights.room)
        self.usable = self.dispatcher.usable(self.rights)

    def answer(self, row: Row, *, judged: bool) -> Any:
        """What the command returns, or the class and words of its refusal; `judged`: without being carried out."""
        self.play(row.role)
        self.named_fds = NamedFds()
        command, arguments = row.command, row.arguments
        if judged:
            command, arguments = "query-command-effect", {"command": command, "arguments": arguments}
        try:
            found = self.execute(command, arguments)
            if command == "query-memdev-accounting":  # what it says of the machine changes from one moment to the next
                found = {member: of_the_host(member, known) for member, known in found.items()}
            return found
        except QmpError as exc:
            return exc.error_class, exc.desc


def test_every_command_has_its_role() -> None:
    """A new command needs one, written in the schema; observers only read, and few commands are for few."""
    entries = SCHEMA.document["x-commands"]
    assert [name for name, entry in entries.items() if "role" not in entry] == []
    expected = {name: "admin" if name in ADMINS else "operator" if name in OPERATORS else
                "observer" if name in SCHEMA.reading else "tenant" if name in TENANTS else "member"
                for name in entries}
    assert {name: entry["role"] for name, entry in entries.items()} == expected


def test_the_matrix(policy: Policy, tmp_path: Path) -> None:
    """A role may use what the schema says, nothing else, and for a tenant a foreign object is an absent one."""
    assert len(ROWS) >= 1000
    host = Host(policy, tmp_path)
    seen: dict[tuple[str, str, str], list[Any]] = {}
    try:
        for row in ROWS:
            forbidden = COMMAND_NOT_FOUND, f"Command {row.command} disabled by policy"
            if Role.of(SCHEMA.commands[row.command].role) > Role.of(row.role):
                assert host.answer(row, judged=False) == forbidden, row
                assert host.answer(row, judged=True) == forbidden, row
                continue
            answer = host.answer(row, judged=row.command not in SCHEMA.reading)
            assert answer != forbidden, row
            seen.setdefault((row.role, row.command, row.object), []).append(answer)
    finally:
        host.become(None)
        host.gmemd.close()
    found = 0
    for (role, command, kind), answers in seen.items():
        absent = seen[role, command, "absent"]
        if role in ("member", "tenant") and kind == "foreign":
            assert named(answers, "theirs") == named(absent, "nobodys"), command
        elif kind != "absent" and misses(absent, "nobodys"):
            assert not misses(answers, name_of(role, kind)), (role, command, kind)
            found += 1
    assert found > 100  # commands that name an object, by who may use them


def named(answers: list[Any], name: str) -> list[str]:
    """Answers without the name that was asked for."""
    return [repr(answer).replace(name, "?") for answer in answers]


def misses(answers: list[Any], name: str) -> bool:
    """Whether a command says that there is no such object."""
    return any(type(answer) is tuple and f"object '{name}' not found" in answer[1] for answer in answers)
