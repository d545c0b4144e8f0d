"""gmemd is killed at system calls of a copy for which a process stands still: that goes on, every time."""

from __future__ import annotations

import os
from pathlib import Path

from gmemd.client.running import state
from tests.commands.test_fences import SIZE, writing
from tests.patience import PATIENCE, wait_for
from tests.robustness.sweep import Tally
from tests.robustness.world import Link, World, Wrong

_FREEZE = {"via": "freeze", "deadline": int(PATIENCE * 1000)}
_AGAIN = 5  # after every fifth kill a whole copy is made


def strike(world: World, *, step: int, first: int, most: int = 1 << 30) -> Tally:
    """SIGKILL at every `step`-th call from `first` on, at most so often; what came of it.

    On a busy machine there are more calls, by which the daemon looks whether somebody stands still yet.
    """
    tally = Tally()
    with world.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "m", "size": SIZE})
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "m"})
    with writing(fd) as writer:
        os.close(fd)  # or this process would be stopped, too
        memory, at = Path(f"/proc/{writer.pid}/fd/{fd}"), first
        while tally.points < most and _kill_at(world, at, writer.pid, memory, tally):
            at += step
    return tally


def _kill_at(world: World, at: int, writer: int, memory: Path, tally: Tally) -> bool:
    """Save it, and kill the daemon at a call; False: it was saved before."""
    link = Link(world.socket)
    outcome = world.trace(link, [("memdev-snapshot", {"id": "m", "name": f"at-{at}", "fence": _FREEZE})], at=at)
    if outcome.hung:
        raise Wrong(f"it hangs at call {at} ({outcome.hit})")
    if not outcome.dead:
        world.kill()
    link.close()
    wait_for(lambda: state(writer) != "T")
    _wait_writes(memory)
    with world.client() as client:
        found = client.execute("query-memdev-snapshots")
        for entry in found:
            client.execute("memdev-snapshot-verify", {"name": entry["name"]})
            client.execute("memdev-snapshot-delete", {"name": entry["name"]})
        if tally.points % _AGAIN == 0:  # nothing of the fence is left
            client.execute("memdev-snapshot", {"id": "m", "name": "again", "fence": _FREEZE})
            client.execute("memdev-snapshot-delete", {"name": "again"})
    tally.count(outcome.hit or "after the reply", "saved" if found else "not saved")
    return outcome.reached


def _wait_writes(memory: Path) -> None:
    with memory.open("rb", buffering=0) as file:
        before = os.pread(file.fileno(), SIZE, 0)
        wait_for(lambda: os.pread(file.fileno(), SIZE, 0) != before)
