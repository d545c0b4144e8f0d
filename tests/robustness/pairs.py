"""Two clients change one object at the same moment: every ordered pair of changing commands.

Both requests are there before the daemon's next turn of the loop (or the second a moment later). Whatever they are
answered, what is there afterwards is what was acknowledged: objects, bytes, conversions, descriptors; and under the
keeper the same once more after SIGKILL.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol
from zlib import crc32

from gmemd.client.client import Client
from gmemd.client.running import state
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.robustness.world import Link, Request, World, Wrong, with_fd

MIB = 1 << 20
SIZE = 24 * MIB
_PATTERN = os.urandom(MIB) * (SIZE // MIB)
_CRC = crc32(_PATTERN)
_OBJECT = {"qom-type": "memory-backend-guest-memfd", "id": "o", "size": SIZE}
_SEALABLE = {"qom-type": "memory-backend-memfd", "id": "o", "size": SIZE}


@dataclass(frozen=True)
class Operation:
    """One changing command on the object 'o', or on another one."""

    command: str
    arguments: dict[str, Any]
    sends_fd: bool = False
    keeps: bool = True  # the contents of 'o', if all of it is made shared again
    seals: bool = False  # needs an 'o' that takes seals, which a guest_memfd does not

    @property
    def request(self) -> Request:
        return self.command, self.arguments


def _convert(offset: int, size: int, to: str, *, preserve: bool = True) -> Operation:
    return Operation("memdev-convert", {"id": "o", "offset": offset, "size": size, "to": to, "preserve": preserve},
                     keeps=preserve)


_NEW = {"qom-type": "memory-backend-memfd", "id": "n"}
OPERATIONS = {
    "add": Operation("object-add", _NEW | {"size": MIB}),
    "add, preallocated": Operation("object-add", _NEW | {"size": 8 * MIB, "prealloc": True}),
    "delete": Operation("object-del", {"id": "o"}),
    "set prealloc": Operation("qom-set", {"path": "/objects/o", "property": "prealloc", "value": True}),
    "set merge": Operation("qom-set", {"path": "/objects/o", "property": "merge", "value": False}),
    "get": Operation("memdev-get-fd", {"id": "o"}),
    "lease": Operation("memdev-get-fd", {"id": "o", "lease": "keep"}),
    "lease by force": Operation("memdev-get-fd", {"id": "o", "lease": "keep", "force": True}),
    "release": Operation("memdev-release", {"id": "o", "force": True}),
    "private": _convert(0, SIZE, "private"),
    "private part": _convert(2 * MIB, 4 * MIB, "private"),
    "private part, zero": _convert(4 * MIB, 2 * MIB, "private", preserve=False),
    "shared": _convert(0, SIZE, "shared"),
    "shared part": _convert(2 * MIB, 4 * MIB, "shared"),
    "discard": Operation("memdev-discard", {"id": "o", "offset": 0, "size": SIZE}, keeps=False),
    "discard part": Operation("memdev-discard", {"id": "o", "offset": 3 * MIB, "size": MIB}, keeps=False),
    "verify": Operation("memdev-verify", {"id": "o", "job-id": "v"}),
    "populate, a job": Operation("memdev-populate", {"id": "o", "job-id": "p"}),
    "populate": Operation("memdev-populate", {"id": "o"}),
    "wipe, a job": Operation("memdev-delete", {"id": "o", "zero": True, "job-id": "z"}),
    "wipe": Operation("memdev-delete", {"id": "o", "zero": True}),
    "cancel": Operation("job-cancel", {"id": "k"}),
    "dismiss": Operation("job-dismiss", {"id": "k"}),
    "adopt": Operation("memdev-adopt", {"id": "n", "fdname": "f"}),
    "getfd": Operation("getfd", {"fdname": "f"}, sends_fd=True),
    "closefd": Operation("closefd", {"fdname": "f"}),
    "add-fd": Operation("add-fd", {"fdset-id": 1}, sends_fd=True),
    "remove-fd": Operation("remove-fd", {"fdset-id": 1}),
    "keep no more": Operation("memdev-persist", {"id": "o", "persist": False}),
    "keep": Operation("memdev-persist", {"id": "o", "persist": True}),
    "freeze": Operation("memdev-freeze", {"id": "o"}, seals=True),
    "clone": Operation("memdev-clone", {"template": "o", "id": "n"}, seals=True),
    "copy": Operation("memdev-clone", {"template": "o", "id": "n", "copy": True}),
    "copy, a job": Operation("memdev-clone", {"template": "o", "id": "n", "copy": True, "job-id": "c"}),
    "run": Operation("memdev-set-runner", {"id": "o"}),
    "run no more": Operation("memdev-clear-runner", {"id": "o"}),
    "export": Operation("memdev-export", {"id": "o", "fdname": "f"}),
    "save": Operation("memdev-snapshot", {"id": "o", "name": "t"}),
    "save, a job": Operation("memdev-snapshot", {"id": "o", "name": "t", "live": True, "job-id": "s"}),
    "save an increment": Operation("memdev-snapshot", {"id": "o", "name": "t", "parent": "s"}),
    "restore": Operation("memdev-restore", {"name": "s", "id": "n"}),
    "restore over": Operation("memdev-restore", {"name": "s", "id": "o", "force": True}),
    "get the snapshot": Operation("memdev-get-snapshot", {"name": "s"}),
    "verify the snapshot": Operation("memdev-snapshot-verify", {"name": "s"}),
    "compress the snapshot": Operation("memdev-snapshot-flatten", {"name": "s", "cold": True}),
    "delete the snapshot": Operation("memdev-snapshot-delete", {"name": "s"}),
}
_DELETE = ("object-del", "memdev-delete")
_ADD = ("object-add", "memdev-adopt", "memdev-clone", "memdev-restore")


class Place(Protocol):
    """A daemon that can be stopped, and looked at."""

    kept: bool  # it is killed and comes back after each pair

    def pid(self) -> int: ...

    def client(self) -> Client: ...

    def link(self) -> Link: ...

    def files(self) -> list[str]:
        """What memory keeper and daemon have open."""
        ...

    def close(self) -> None: ...


class Alone:
    """A daemon that nobody keeps."""

    kept = False

    def __init__(self) -> None:
        self._daemon = Daemon(kernel="simulated")

    def pid(self) -> int:
        return self._daemon.pid

    def client(self) -> Client:
        return Client(str(self._daemon.sock), timeout=PATIENCE)

    def link(self) -> Link:
        return Link(str(self._daemon.sock))

    def files(self) -> list[str]:
        found = []
        for fd in os.listdir(f"/proc/{self.pid()}/fd"):
            try:
                found.append(os.readlink(f"/proc/{self.pid()}/fd/{fd}"))
            except OSError:
                continue
        return [name for name in found if name.startswith("/memfd:")]

    def close(self) -> None:
        self._daemon.__exit__(None, None, None)


class Kept:
    """A daemon under the keeper."""

    kept = True

    def __init__(self) -> None:
        self.world = World()

    def pid(self) -> int:
        return self.world.daemon()

    def client(self) -> Client:
        return self.world.client()

    def link(self) -> Link:
        return Link(self.world.socket)

    def files(self) -> list[str]:
        return [name for names in self.world.memory() for name in names]

    def close(self) -> None:
        self.world.close()


def pairs(place: Place) -> Iterator[tuple[str, str]]:
    """The names of all ordered pairs that make sense there."""
    names = [name for name, operation in OPERATIONS.items() if place.kept or operation.command != "memdev-persist"]
    return product(names, names)


def clash(place: Place, first: str, second: str, after: float = 0.0) -> None:
    """Have two commands meet, the second `after` seconds (0: in the same turn); raise Wrong for what is not right."""
    one, two = OPERATIONS[first], OPERATIONS[second]
    with ExitStack() as stack:
        client = stack.enter_context(place.client())
        links = place.link(), place.link()
        for link in links:
            stack.callback(link.close)
        _prepare(client, links, one, two)
        memory = _memfd()
        stack.callback(os.close, memory)
        _send(place, links, (one, two), memory, after)
        for link in links:
            link.wait(len(link.replies) or 1)
        replies = [link.replies[-1] for link in links]
        jobs = _concluded(client)
        _judge(client, one, two, replies, jobs)
        before = _see(client)
        if place.kept:
            os.kill(place.pid(), signal.SIGKILL)
            client = stack.enter_context(place.client())
            _compare(before, _see(client), one, two, replies)
        _contents(client, one, two)
        _clear(client)
    wait_for(lambda: not place.files())


def _prepare(client: Client, links: tuple[Link, Link], one: Operation, two: Operation) -> None:
    commands = {operation.command for operation in (one, two)}
    client.execute("object-add", _SEALABLE if one.seals or two.seals else _OBJECT)
    fd, info = with_fd(client, "o")
    with mmap.mmap(fd, info["size"]) as mapped:
        mapped[:] = _PATTERN
    os.close(fd)
    if _saved(one, two):
        client.execute("memdev-snapshot", {"id": "o", "name": "s"})
    if "memdev-clear-runner" in commands:
        client.execute("memdev-set-runner", {"id": "o"})
    if any(operation.seals and operation.command == "memdev-clone" for operation in (one, two)):
        client.execute("memdev-freeze", {"id": "o"})
    if any(operation.arguments.get("to") == "shared" for operation in (one, two)) and not (one.seals or two.seals):
        client.execute(*_convert(0, SIZE, "private").request)
    for link, operation in zip(links, (one, two), strict=True):
        before = {**dict.fromkeys(("memdev-adopt", "memdev-export", "closefd"), ("getfd", {"fdname": "f"})),
                  "remove-fd": ("add-fd", {"fdset-id": 1})}.get(operation.command)
        if before is not None:
            memory = _memfd()
            link.send([before], [memory])
            os.close(memory)
            link.wait(1)
            link.replies.clear()
    if any(operation.command.startswith("job-") for operation in (one, two)):
        client.execute("memdev-verify", {"id": "o", "job-id": "k"})
    client.events.clear()


def _saved(one: Operation, two: Operation) -> bool:
    """Whether there is the snapshot 's' of 'o' at the beginning."""
    return any("name" in operation.arguments for operation in (one, two))


def _restored(done: list[Operation]) -> bool:
    """Whether another 'o' has taken the place of the first one, which ends later than all that it can meet."""
    return any(operation.command == "memdev-restore" and operation.arguments["id"] == "o" for operation in done)


def _snapshots(client: Client) -> list[str]:
    return sorted(entry["name"] for entry in client.execute("query-memdev-snapshots"))


def _memfd() -> int:
    fd = os.memfd_create("passed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    return fd


def _send(place: Place, links: tuple[Link, Link], operations: tuple[Operation, Operation], memory: int,
          after: float) -> None:
    pid = place.pid()
    if not after:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: state(pid) == "T")
    for link, operation in zip(links, operations, strict=True):
        link.send([operation.request], [memory] if operation.sends_fd else None)
        if after and link is links[0]:
            time.sleep(after)
    if not after:
        os.kill(pid, signal.SIGCONT)


def _concluded(client: Client) -> dict[str, str | None]:
    """The error of each job, once all have ended."""
    end = time.monotonic() + PATIENCE
    while True:
        jobs = client.execute("query-jobs")
        if all(job["status"] == "concluded" for job in jobs):
            return {job["id"]: job.get("error") for job in jobs}
        if time.monotonic() > end:
            raise Wrong(f"a job does not end: {jobs}")
        time.sleep(0.002)


def _judge(client: Client, one: Operation, two: Operation, replies: list[dict[str, Any]],
           jobs: dict[str, str | None]) -> None:
    """Hold what is there against what was acknowledged."""
    said = f"{replies} {jobs}"
    if "internal" in said:
        raise Wrong(said)
    done = [operation for operation, reply in zip((one, two), replies, strict=True)
            if "return" in reply and jobs.get(operation.arguments.get("job-id", "")) is None]
    deleted = any(operation.command in _DELETE for operation in done) and not _restored(done)
    ids = {entry["id"] for entry in client.execute("query-memdev")}
    if deleted == ("o" in ids):
        raise Wrong(f"'o' is there: {'o' in ids}, deleted: {deleted}; {said}")
    added = any(operation.command in _ADD and operation.arguments["id"] == "n" for operation in done)
    if added != ("n" in ids):
        raise Wrong(f"'n' is there: {'n' in ids}, added: {added}; {said}")
    commands, snapshots = {operation.command for operation in done}, _snapshots(client)
    if ("memdev-snapshot" in commands) != ("t" in snapshots):
        raise Wrong(f"the snapshots {snapshots}; {said}")
    if _saved(one, two) and ("memdev-snapshot-delete" in commands) == ("s" in snapshots):
        raise Wrong(f"the snapshots {snapshots}; {said}")
    client.execute("query-status")  # events before it have come
    told = sum(event["event"] == "MEMDEV_CONVERTED" for event in client.events)
    converted = sum(operation.command == "memdev-convert" for operation in done)
    if told != converted:
        raise Wrong(f"{converted} conversions were acknowledged and {told} told; {said}")


def _see(client: Client) -> dict[str, Any]:
    ids = sorted(entry["id"] for entry in client.execute("query-memdev"))
    seen: dict[str, Any] = {"ids": ids, "lost": client.execute("query-memdev-lost"),
                            "unclaimed": client.execute("query-memdev-unclaimed"), "snapshots": _snapshots(client)}
    if "o" in ids:
        [status] = client.execute("query-memdev-status", {"id": "o"})
        seen["status"] = {name: status.get(name) for name in ("kind", "frozen", "generation", "runner")}
        if status["kind"] == "guest-memfd":
            seen["ranges"] = client.execute("query-memdev-ranges", {"id": "o"})["ranges"]
        seen["contents"] = _crc(client)
    return seen


def _crc(client: Client) -> int:
    [fd] = client.execute_fds("memdev-get-fd", {"id": "o", "force": True})[1]
    try:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
            return crc32(mapped)
    finally:
        os.close(fd)


def _compare(before: dict[str, Any], now: dict[str, Any], one: Operation, two: Operation,
             replies: list[dict[str, Any]]) -> None:
    """Hold what a restart found against what there was."""
    kept = True
    for operation, reply in zip((one, two), replies, strict=True):  # in the order in which they were carried out
        if operation.command == "memdev-persist" and "return" in reply:
            kept = operation.arguments["persist"]
    done = [operation for operation, reply in zip((one, two), replies, strict=True) if "return" in reply]
    if not kept and (_restored(done) or (one.command == two.command == "memdev-persist" and now["ids"])):
        kept = True
    expected = before if kept else {"ids": [name for name in before["ids"] if name != "o"], "lost": [],
                                    "unclaimed": [], "snapshots": before["snapshots"]}
    if now != expected:
        raise Wrong(f"after SIGKILL {now}, before {before}; {replies}")


def _contents(client: Client, one: Operation, two: Operation) -> None:
    """All that was preserved is there, and every snapshot is whole."""
    for name in _snapshots(client):
        client.execute("memdev-snapshot-verify", {"name": name})
    if one.keeps and two.keeps and any(entry["id"] == "o" for entry in client.execute("query-memdev")):
        if not one.seals and not two.seals:
            client.execute(*_convert(0, SIZE, "shared").request)
        if _crc(client) != _CRC:
            raise Wrong("bytes are lost")


def _clear(client: Client) -> None:
    """Delete what is there; clones and increments before what they need."""
    for job in client.execute("query-jobs"):
        client.execute("job-dismiss", {"id": job["id"]})
    for entry in client.execute("query-memdev"):
        client.execute("memdev-delete", {"id": entry["id"], "force": True})
    for name in reversed(_snapshots(client)):
        client.execute("memdev-snapshot-delete", {"name": name})
    for entry in client.execute("query-fdsets"):
        client.execute("remove-fd", {"fdset-id": entry["fdset-id"]})
    if left := client.execute("query-memdev-lost") + client.execute("query-memdev-unclaimed"):
        raise Wrong(f"lost or unclaimed: {left}")
