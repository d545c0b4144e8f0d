"""The commands that change something, each with what has to be there before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.robustness.world import Request

SIZE = 64 << 10  # bytes of an object


def add(kind: str, object_id: str, **properties: Any) -> Request:
    """object-add of memory-backend-KIND; underscores for hyphens, {files} is the place for files."""
    return "object-add", {"qom-type": f"memory-backend-{kind}", "id": object_id, "size": SIZE,
                          **{name.replace("_", "-"): value for name, value in properties.items()}}


def delete(object_id: str) -> Request:
    return "object-del", {"id": object_id}


def change(object_id: str, name: str, value: Any) -> Request:
    return "qom-set", {"path": f"/objects/{object_id}", "property": name, "value": value}


def convert(object_id: str, to: str, offset: int = 0, size: int = SIZE) -> Request:
    return "memdev-convert", {"id": object_id, "offset": offset, "size": size, "to": to, "preserve": True}


def room(name: str) -> Request:
    """A room, with a socket in the place for files."""
    return "memdev-room-add", {"id": name, "socket": f"{{files}}/{name}"}


def together(*actions: Request) -> Request:
    """One transaction of several requests."""
    return "memdev-transaction", {"actions": [{"type": name, "data": data} for name, data in actions]}


@dataclass(frozen=True)
class Scenario:
    """`requests` are sent in one message, and are what is struck."""

    name: str
    requests: list[Request]
    before: list[Request] = field(default_factory=list)  # objects with contents, created again for each strike
    then: list[Request] = field(default_factory=list)  # done once these have their contents
    passes_fd: bool = False  # a memfd goes with the requests
    outlives: bool = True  # what is there before is kept
    shares: str = ""  # of this object everything is made shared in the end, and must be as it was filled


_FILE = "{files}/memory"

_KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("ram", "ram", {}),
    ("memfd", "memfd", {}),
    ("shm", "shm", {}),
    ("file, made", "file", {"mem_path": _FILE, "share": True}),
    ("file, unlinked", "file", {"mem_path": "{files}", "share": True}),
    ("memfd with guest-memfd", "memfd", {"guest_memfd": "on"}),
    ("guest-memfd", "guest-memfd", {}),
    ("memfd, preallocated", "memfd", {"prealloc": True}),
    ("guest-memfd, preallocated", "guest-memfd", {"prealloc": True}),
    ("file, preallocated", "file", {"mem_path": _FILE, "share": True, "prealloc": True}),
    ("memfd by two threads", "memfd", {"prealloc": True, "prealloc_threads": 2, "size": 4 << 20}),
]

SCENARIOS = [
    *(Scenario(f"object-add {name}", [add(kind, "x", **properties)]) for name, kind, properties in _KINDS),
    Scenario("three object-add", [add("memfd", "x"), add("ram", "y"), add("guest-memfd", "z")]),
    Scenario("object-add and object-del", [add("memfd", "x"), delete("x")]),
    Scenario("object-del memfd", [delete("x")], [add("memfd", "x")]),
    Scenario("object-del file", [delete("x")], [add("file", "x", mem_path=_FILE, share=True)]),
    Scenario("object-del guest-memfd with private bytes", [delete("x")], [add("guest-memfd", "x")],
             [convert("x", "private")]),
    Scenario("three object-del", [delete("x"), delete("y"), delete("z")],
             [add("memfd", "x"), add("ram", "y"), add("shm", "z")]),
    Scenario("object-del and object-add", [delete("x"), add("shm", "x")], [add("memfd", "x")]),
    Scenario("object-del one, object-add another", [delete("x"), add("ram", "y")], [add("memfd", "x")]),
    Scenario("qom-set merge", [change("x", "merge", False)], [add("memfd", "x")]),
    Scenario("qom-set prealloc", [change("x", "prealloc", True)], [add("memfd", "x")]),
    Scenario("memdev-get-fd", [("memdev-get-fd", {"id": "x"})], [add("memfd", "x")]),
    Scenario("memdev-get-fd, leased", [("memdev-get-fd", {"id": "x", "lease": "keep"})], [add("memfd", "x")]),
    Scenario("add-fd", [("add-fd", {"fdset-id": 7})], passes_fd=True),
    Scenario("getfd and memdev-adopt", [("getfd", {"fdname": "f"}), ("memdev-adopt", {"fdname": "f", "id": "x"})],
             passes_fd=True),
    Scenario("memdev-convert to private", [convert("x", "private")], [add("guest-memfd", "x")], shares="x"),
    Scenario("memdev-convert a part again", [convert("x", "private", SIZE // 2, SIZE // 2)],
             [add("guest-memfd", "x")], [convert("x", "private", 0, SIZE // 4)], shares="x"),
    Scenario("memdev-convert to shared", [convert("x", "shared")], [add("guest-memfd", "x")],
             [convert("x", "private")], shares="x"),
    Scenario("memdev-convert a part to shared", [convert("x", "shared", SIZE // 4, SIZE // 4)],
             [add("guest-memfd", "x")], [convert("x", "private")], shares="x"),
    Scenario("memdev-freeze", [("memdev-freeze", {"id": "x", "origin": "here"})], [add("memfd", "x")]),
    Scenario("memdev-clone", [("memdev-clone", {"template": "x", "id": "y"})], [add("memfd", "x")],
             [("memdev-freeze", {"id": "x"})]),
    Scenario("memdev-clone, copied", [("memdev-clone", {"template": "x", "id": "y", "copy": True})],
             [add("memfd", "x")]),
    Scenario("object-del of a template", [delete("x")], [add("memfd", "x")], [("memdev-freeze", {"id": "x"})]),
    Scenario("memdev-persist off", [("memdev-persist", {"id": "x", "persist": False})], [add("memfd", "x")]),
    Scenario("memdev-persist on", [("memdev-persist", {"id": "x", "persist": True})], [add("memfd", "x")],
             [("memdev-persist", {"id": "x", "persist": False})], outlives=False),
    Scenario("transaction of adding three", [together(add("memfd", "x"), add("guest-memfd", "y"), add("shm", "z"))]),
    Scenario("transaction of object-del and object-add", [together(delete("x"), add("shm", "y"))], [add("memfd", "x")]),
    Scenario("transaction that replaces", [together(delete("x"), add("shm", "x"), change("x", "merge", False))],
             [add("memfd", "x")]),
    Scenario("transaction of all kinds", [together(
        change("x", "merge", False), add("memfd", "n"), change("n", "dump", False), delete("y"),
        ("memdev-set-runner", {"id": "n"}), delete("z"), add("ram", "o"), delete("o"))],
             [add("memfd", "x"), add("ram", "y"), add("shm", "z")]),
    Scenario("memdev-room-add", [room("r")]),
    Scenario("memdev-room-del", [("memdev-room-del", {"id": "r"})], [room("r")]),
    Scenario("transaction of a room and what is in it", [together(
        room("r"), add("memfd", "x@r"), add("guest-memfd", "y@r"))]),
    Scenario("transaction that empties and removes a room", [together(
        delete("x@r"), ("memdev-room-del", {"id": "r"}))], [room("r"), add("memfd", "x@r")]),
    Scenario("transaction, preallocating", [together(
        delete("x"), change("y", "merge", False), add("memfd", "x", prealloc=True), change("x", "dump", False))],
             [add("memfd", "x"), add("shm", "y")]),
]

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

STANDING = [add("memfd", "stays"), add("guest-memfd", "stays-too"), add("ram", "stays-put")]
