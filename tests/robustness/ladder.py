"""Restart upon restart, of the real program under its keeper, while others go on using the memory.

    python -m tests.robustness.ladder SOCKET ID...      one such user: it ends when its standard input does
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from gmemd.client.client import Client
from tests.patience import PATIENCE
from tests.robustness.scenarios import SIZE, add
from tests.robustness.world import ROOT, World, Wrong, look

WATCHDOG = ("--watchdog", "0.5", "--abort-timeout", "0.05")
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)  # the last: until the watchdog comes
_WORD = 8  # bytes
_PLACES = 16  # words that a user writes in each object, spread over it


def climb(rungs: int, *, objects: int = 100, users: int = 10, warm: bool = False) -> str:
    """Restart so often; what was seen. Wrong when a user or an object has noticed."""
    with World(warm=warm, keeper=WATCHDOG) as world:
        names = [f"o{number}" for number in range(objects)]
        with world.client() as client:
            for number, name in enumerate(names):
                client.execute(*add(("memfd", "ram", "shm", "guest-memfd")[number % 4], name))
            before = look(client)
        running = [_start(world, names[number::users]) for number in range(users)]
        took: dict[str, list[float]] = {number.name: [] for number in SIGNALS}
        try:
            for process in running:
                if process.stdout is None or process.stdout.readline() != "writing\n":
                    raise Wrong("a user does not start")
            for rung in range(rungs):
                number = SIGNALS[rung % len(SIGNALS)]
                took[number.name].append(_restart(world, number, objects))
        finally:
            reports = [_end(process) for process in running]
        with world.client() as client:
            now = look(client)
            last = {name: value for report in reports for name, value in report["last"].items()}
            _judge(before, now, reports, last, {name: _words(client, name) for name in names})
        _count(world, now.inodes.values())
        writes = sum(report["writes"] for report in reports)
    times = ", ".join(f"{name} {len(values)} x {_median(values) * 1000:.0f} ms" for name, values in took.items())
    return f"{rungs} restarts ({times}), {objects} objects, {users} users wrote {writes} words: nobody noticed"


def _restart(world: World, number: signal.Signals, objects: int) -> float:
    """Seconds from the signal to the first answer of the next daemon."""
    begun = time.monotonic()
    world.kill(number)
    with world.client() as client:
        count = len(client.execute("query-memdev"))
        took = time.monotonic() - begun
    if count != objects:
        raise Wrong(f"{count} objects after {number.name}: {world.log()[-2000:]}")
    return took


def _judge(before: Any, now: Any, reports: list[dict[str, Any]], last: dict[str, int],
           found: dict[str, list[int]]) -> None:
    wrong = [words for report in reports for words in report["wrong"]]
    if wrong or any(not report["writes"] for report in reports):
        raise Wrong(f"users have noticed: {wrong[:5]}")
    if before.objects != now.objects or before.inodes != now.inodes:
        raise Wrong("objects are not what they were")
    if any(set(words) != {last[name]} for name, words in found.items()):
        raise Wrong("what the users wrote last is not there")


def _count(world: World, inodes: Collection[int]) -> None:
    """Keeper and daemon hold each object once; the duplicate that went with a reply is closed just after it."""
    end = time.monotonic() + PATIENCE
    while True:
        surplus = [f"{who}: {entry}" for who, fds in zip(("keeper", "daemon"), world.memory(), strict=True)
                   for entry in _surplus(fds, inodes)]
        if not surplus:
            return
        if time.monotonic() > end:
            raise Wrong(f"too many descriptors (-: too few): {surplus}")
        time.sleep(0.01)


def _surplus(fds: list[str], inodes: Collection[int]) -> list[str]:
    wanted = Counter(str(inode) for inode in inodes)
    found = Counter(entry.split()[0] for entry in fds)
    return ([entry for entry in fds if found[entry.split()[0]] > wanted[entry.split()[0]]]
            + [f"- {inode}" for inode in (wanted - found)])


def restart_time(objects: int = 1000, times: int = 9) -> str:
    """How long a kill -9 is felt with so many objects."""
    with World(warm=False, keeper=("--fdstore-max", str(objects + 10))) as world:
        with world.client() as client:
            for number in range(objects):
                client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": f"o{number}", "size": 4096})
        took = sorted(_restart(world, signal.SIGKILL, objects) for _ in range(times))
    return (f"{objects} objects, from kill -9 to the first answer (query-memdev): "
            f"median {_median(took) * 1000:.0f} ms, least {took[0] * 1000:.0f} ms, most {took[-1] * 1000:.0f} ms "
            f"of {times}")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


# -- a user of memory ----------------------------------------------------------------------------------------

def _start(world: World, names: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tests.robustness.ladder", world.socket, *names], cwd=ROOT,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        report, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        raise Wrong(f"a user ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(report)
    return found


def _map(client: Client, name: str) -> memoryview:
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    try:
        return memoryview(mmap.mmap(fd, SIZE)).cast("Q")
    finally:
        os.close(fd)


def _places() -> range:
    return range(0, SIZE // _WORD, SIZE // _WORD // _PLACES)


def _words(client: Client, name: str) -> list[int]:
    memory = _map(client, name)
    return [memory[place] for place in _places()]


def use(path: str, names: list[str]) -> None:
    """Count up in every object, looking each time whether the last count is still there."""
    with Client(path, timeout=PATIENCE) as client:
        memories = {name: _map(client, name) for name in names}
    print("writing", flush=True)
    count, wrong = 0, Counter[str]()
    while not select.select([0], [], [], 0.005)[0]:
        for name, memory in memories.items():
            for place in _places():
                if memory[place] != count:
                    wrong[name] += 1
                memory[place] = count + 1
        count += 1
    print(json.dumps({"writes": count * len(names) * _PLACES, "wrong": list(wrong),
                      "last": dict.fromkeys(names, count)}))


if __name__ == "__main__":
    use(sys.argv[1], sys.argv[2:])
