"""Kill the daemon at a system call of its work on snapshots: each is whole or absent, and no object is lost or changed.

The worker processes are not struck here (tests.snapshots.strikes does that): they lose their daemon.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gmemd.errors import QmpError
from tests.patience import wait_for
from tests.robustness.tracer import Outcome
from tests.robustness.world import Link, Request, World, Wrong, with_fd, write_pattern

SIZE = 256 << 10  # bytes
OLD, NEW = 1, 2  # seeds of the object's contents: as it was saved, and as it is


@dataclass(frozen=True)
class Act:
    """A command on snapshot `s` of object `x`, which is saved with the contents OLD and has NEW since."""

    name: str
    request: Request
    names: tuple[set[str], ...]  # of the snapshots that there may be afterwards; the last are right if it ends well
    contents: tuple[set[int], ...] = ({NEW},)  # that x may have, by its seed


ACTS = {act.name: act for act in (
    Act("save", ("memdev-snapshot", {"id": "x", "name": "t"}), ({"s"}, {"s", "t"})),
    Act("save, live and compressed", ("memdev-snapshot", {"id": "x", "name": "t", "live": True, "cold": True}),
        ({"s"}, {"s", "t"})),
    Act("save an increment", ("memdev-snapshot", {"id": "x", "name": "t", "parent": "s"}), ({"s"}, {"s", "t"})),
    Act("restore over", ("memdev-restore", {"name": "s", "force": True}), ({"s"},), ({OLD, NEW},)),
    Act("restore another", ("memdev-restore", {"name": "s", "id": "y"}), ({"s"},)),
    Act("compress", ("memdev-snapshot-flatten", {"name": "s", "cold": True}), ({"s"},)),
    Act("verify", ("memdev-snapshot-verify", {"name": "s"}), ({"s"},)),
    Act("delete", ("memdev-snapshot-delete", {"name": "s"}), ({"s"}, set())),
)}


class Stored:
    """One world, whose daemon is killed in the middle of one act after another."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.struck = 0  # kills in the middle of an act
        self._crc = {seed: zlib.crc32(word(seed) * (SIZE // 4)) for seed in (OLD, NEW)}

    def learn(self, act: Act) -> int:
        """How many system calls the daemon makes for it."""
        self._stand()
        length = len(self._strike(act, 0).calls)
        self.judge(act, act.names[-1:])
        return length

    def kill_at(self, act: Act, at: int) -> None:
        """Kill it there, and hold what is there afterwards against what was promised."""
        self._stand()
        outcome = self._strike(act, at)
        if outcome.hung:
            raise Wrong("it hangs")
        self.struck += outcome.dead
        if not outcome.dead:
            self.world.kill()
        self.judge(act, act.names if outcome.reached else act.names[-1:])

    def _stand(self) -> None:
        """The object x, saved as s and written since."""
        with self.world.client() as client:
            for entry in client.execute("query-memdev"):
                client.execute("object-del", {"id": entry["id"]})
            found = client.execute("query-memdev-snapshots")
            for entry in sorted(found, key=lambda one: bool(one.get("children"))):
                client.execute("memdev-snapshot-delete", {"name": entry["name"]})
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "x", "size": SIZE})
            write_pattern(client, "x", OLD)
            client.execute("memdev-snapshot", {"id": "x", "name": "s"})
            write_pattern(client, "x", NEW)

    def _strike(self, act: Act, at: int) -> Outcome:
        link = Link(self.world.socket)
        try:
            return self.world.trace(link, [act.request], at=at)
        finally:
            link.close()

    def judge(self, act: Act, allowed: tuple[set[str], ...]) -> None:
        """What is there is one of what may be, every snapshot is whole, and the next command works."""
        with self.world.client() as client:
            names = {entry["name"] for entry in client.execute("query-memdev-snapshots")}
            if names not in allowed:
                raise Wrong(f"{act.name}: the snapshots {names}")
            for name in sorted(names):
                client.execute("memdev-snapshot-verify", {"name": name})
            objects = {entry["id"] for entry in client.execute("query-memdev")}
            if not {"x"} <= objects <= {"x", "y"}:
                raise Wrong(f"{act.name}: the objects {objects}")
            self._judge_contents(client, act, objects)
            client.execute("memdev-snapshot", {"id": "x", "name": "next"})
            client.execute("memdev-snapshot-delete", {"name": "next"})
        left = [name for name in os.listdir(self.world.directory / "snapshots") if name.startswith(".")]
        if left:
            raise Wrong(f"{act.name}: left {left}")
        wait_for(lambda: {len(memory) for memory in self.world.memory()} == {len(objects)})

    def _judge_contents(self, client: Any, act: Act, objects: set[str]) -> None:
        for name, allowed in (("x", act.contents[0]), ("y", {OLD})):
            if name in objects:
                fd, _ = with_fd(client, name)
                try:
                    crc = zlib.crc32(os.pread(fd, SIZE, 0))
                finally:
                    os.close(fd)
                if crc not in {self._crc[seed] for seed in allowed}:
                    raise Wrong(f"{act.name}: '{name}' is neither as it was nor as it should become")


def word(seed: int) -> bytes:
    """What write_pattern fills the object x with."""
    return zlib.crc32(f"x {seed}".encode()).to_bytes(4, "little")


def points(length: int, count: int) -> Iterator[int]:
    """So many calls, evenly distributed; all of them if there are fewer."""
    return iter(sorted({1 + length * number // count for number in range(count)}) if count < length
                else range(1, length + 1))


def sweep(world: World, act: Act, count: int, tell: Callable[[str], None]) -> int:
    """Kill it at so many calls of an act; how many were wrong."""
    stored, wrong = Stored(world), 0
    for at in points(stored.learn(act), count):
        try:
            stored.kill_at(act, at)
        except (Wrong, QmpError, AssertionError) as exc:
            tell(f"    WRONG: {act.name}: killed at call {at}: {str(exc)[:1000]}")
            wrong += 1
    if not stored.struck:
        raise Wrong(f"{act.name}: nothing was struck")
    return wrong
