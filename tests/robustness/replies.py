"""Kill the daemon while its replies leave: what was answered stands, what was not has happened or has not.

Clients send bursts of object-add and object-del, so one flush carries many; some while the keeper stands still, which
answers nothing then: until its queue is full, additions that it has promised to take are acknowledged nevertheless. The
daemon is killed when a random number of replies is there, and replies that arrive later count.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from typing import Final

from gmemd.client.running import state
from tests.patience import PATIENCE, wait_for
from tests.robustness.scenarios import SIZE
from tests.robustness.world import Link, Request, World, Wrong

IDS: Final = [f"r{number}" for number in range(80)]
_CLIENTS = 3
_LONGEST = 90  # requests of a burst, more than fit into a message to the keeper
_STILL = 8  # every so many kills the keeper stands still
_FEW = 15  # additions of a client then, every other time: the keeper has promised to take them all

State = str  # of an object: its inode, "" if there is none, "new" if it is to be another one


def add(object_id: str) -> Request:
    return "object-add", {"qom-type": "memory-backend-memfd", "id": object_id, "size": SIZE}


class Burst:
    """What one client has sent, and how much of it was answered."""

    def __init__(self, world: World, requests: list[Request]) -> None:
        self.requests = requests
        self.answered = 0
        self._link = Link(world.socket)

    def send(self) -> None:
        with suppress(ConnectionError):
            self._link.send(self.requests)

    def wait(self, count: int) -> None:
        self._link.wait(min(count, len(self.requests)))

    def end(self) -> None:
        """Take what the dead daemon has still sent."""
        self._link.wait(len(self.requests) + 1)
        replies = self._link.replies
        self._link.close()
        refused = [reply for reply in replies if "return" not in reply]
        if refused:
            raise Wrong(f"refused: {refused[0]}")
        self.answered = len(replies)

    def states(self, before: dict[str, State]) -> dict[str, set[State]]:
        """What may be of each object that it names."""
        found: dict[str, list[tuple[int, State]]] = {}
        for number, (command, arguments) in enumerate(self.requests):
            object_id = str(arguments["id"])
            steps = found.setdefault(object_id, [(-1, before.get(object_id, ""))])
            if command.startswith("object-"):
                steps.append((number, "new" if command == "object-add" else ""))
        return {object_id: {now for place, (_, now) in enumerate(steps)
                            if place == len(steps) - 1 or steps[place + 1][0] >= self.answered}
                for object_id, steps in found.items()}


def objects(world: World) -> dict[str, State]:
    """The inode of each object; what the keeper holds, what the daemon has and what it lists must be the same.

    Not at once: what was never answered leaves the keeper with the first flush of a new daemon.
    """
    with world.client() as client:
        listed = sorted(entry["id"] for entry in client.execute("query-memdev"))
        left = client.execute("query-memdev-lost") + client.execute("query-memdev-unclaimed")
        if left:
            raise Wrong(f"lost or unclaimed: {left}")
        end = time.monotonic() + PATIENCE
        while True:
            kept, opened = world.memory()
            found = dict(reversed(entry.removesuffix(" (deleted)").split(" /memfd:")) for entry in opened)
            if kept == opened and sorted(found) == listed:
                return found
            if time.monotonic() > end or sorted(found) != listed:
                raise Wrong(f"the daemon lists {listed}, has {opened}, and the keeper holds {kept}")
            time.sleep(0.005)


def plan(rng: random.Random, ids: list[str], before: dict[str, State]) -> list[Request]:
    """A burst on these objects."""
    there, requests = set(before), []
    for _ in range(rng.randint(1, _LONGEST) if rng.random() < 0.7 else 1):
        object_id = rng.choice(ids)
        requests.append(("object-del", {"id": object_id}) if object_id in there else add(object_id))
        there ^= {object_id}
    return requests


def strike(world: World, before: dict[str, State], plans: list[list[Request]], answers: int,
           *, still: float = 0.0, promised: bool = False) -> tuple[dict[str, State], int]:
    """Carry out bursts, kill the daemon after so many answers to the first; the objects then, and what was answered.

    still: for how long (seconds) the keeper stands still before the kill. promised: it has promised all of this, so
    everything is answered while it stands still.
    """
    keeper, daemon = world.process.pid, world.daemon()
    bursts = [Burst(world, requests) for requests in plans]
    if still:
        if promised:
            get_promise(world)
        os.kill(keeper, signal.SIGSTOP)
        wait_for(lambda: state(keeper) == "T")
    for burst in bursts:
        burst.send()
    if promised:
        for burst in bursts:
            burst.wait(_LONGEST)
    elif still:
        time.sleep(still)
    else:
        bursts[0].wait(answers)
    os.kill(daemon, signal.SIGKILL)
    os.kill(keeper, signal.SIGCONT)
    for burst in bursts:
        burst.end()
    now = objects(world)
    compare(bursts, before, now)
    return now, sum(burst.answered for burst in bursts)


def compare(bursts: list[Burst], before: dict[str, State], now: dict[str, State]) -> None:
    """What was answered has happened."""
    for burst in bursts:
        for object_id, allowed in burst.states(before).items():
            is_now = now.get(object_id, "")
            seen = "new" if is_now and is_now != before.get(object_id, "") else is_now
            if seen not in allowed:
                raise Wrong(f"'{object_id}' is '{seen}' and not one of {allowed}: {burst.answered} answers to "
                            f"{burst.requests}")


def get_promise(world: World) -> None:
    """Have the keeper answer something: it says then what it will take."""
    with world.client() as client:
        client.execute(*add("first"))
        client.execute("object-del", {"id": "first"})


def run(world: World, kills: int, seed: int = 1) -> Counter[str]:
    """Kill it so often; what was done."""
    rng, done, now = random.Random(seed), Counter[str](), objects(world)
    for number in range(kills):
        parts = [IDS[client::_CLIENTS] for client in range(_CLIENTS)]
        plans = [plan(rng, ids, {object_id: now[object_id] for object_id in ids if object_id in now}) for ids in parts]
        still = rng.uniform(0.001, 0.03) if number % _STILL == 0 else 0.0
        promised = number % (2 * _STILL) == _STILL
        if promised:
            plans = [[add(object_id) for object_id in ids if object_id not in now][:_FEW] for ids in parts]
        now, answered = strike(world, now, plans, rng.randint(0, len(plans[0])), still=still, promised=promised)
        done += Counter(kills=1, requests=sum(map(len, plans)), answered=answered, still=int(still > 0))
        if promised:
            done["answered while the keeper stood still"] += answered
    return done
