"""A registry that is damaged between a kill and the next start: no memory is dropped, and words say what happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.robustness.scenarios import add, delete
from tests.robustness.world import State, World, Wrong, checksum, look, write_pattern

Harm = Callable[[Path], None]

IDS = [f"o{number}" for number in range(6)]


def truncations() -> Iterator[tuple[str, Harm]]:
    """The file cut off: to nothing, in the header, at each page, in a page."""
    for keep in (0, 1, 50, 100, 1000, 4096, 5000, 8192, 12288, 14000, 16384):
        yield f"cut to {keep} bytes", partial(_cut, keep=keep)
    yield "short of a byte", partial(_cut, keep=-1)
    yield "short of a page", partial(_cut, keep=-4096)


def flips(step: int) -> Iterator[tuple[str, Harm]]:
    """One bit turned, in every `step`-th byte of 16 KiB; which bit goes round."""
    for number, at in enumerate(range(0, 16384, step)):
        yield f"bit {number % 8} of byte {at}", partial(_flip, at=at, bit=number % 8)


def replacements() -> Iterator[tuple[str, Harm]]:
    """Something else in its place."""
    yield "removed", lambda path: path.unlink()
    yield "zeros", partial(_fill, contents=bytes(4096))
    yield "text", partial(_fill, contents=b"this is not what you are looking for\n")


def _cut(path: Path, keep: int) -> None:
    """Keep so many bytes; of a negative number, all but so many."""
    size = path.stat().st_size
    os.truncate(path, min(keep, size) if keep >= 0 else size + keep)


def _fill(path: Path, contents: bytes) -> None:
    path.write_bytes(contents * 4)


def _flip(path: Path, at: int, bit: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[at % len(contents)] ^= 1 << bit
    path.write_bytes(contents)


def harm(world: World, what: str, how: Harm) -> str:
    """Do it, and judge; what became of it: "unnoticed", "recovered" or "unclaimed"."""
    with world.client() as client:
        before = _make(client)
        memory = {entry.split()[0] for entry in world.memory()[0]}
    said = len(world.log())
    with world.held():
        how(world.state_dir / "registry.sqlite")
    with world.client() as client:
        now = look(client)
        words = world.log()[said:]
        result = _judge(what, before, now, words, client)
        if not memory <= {entry.split()[0] for entry in world.memory()[0]}:
            raise Wrong(f"{what}: memory was dropped: {words}")
        _clear(client)
    for name in world.damaged():
        (world.state_dir / name).unlink()
    return result


def _make(client: Client) -> State:
    """Objects with contents."""
    for object_id in IDS:
        client.execute(*add("memfd", object_id))
        write_pattern(client, object_id)
    return look(client)


def _judge(what: str, before: State, now: State, words: str, client: Client) -> str:
    found = now.objects.keys() & before.objects.keys()
    if any(before.of(object_id) != now.of(object_id) for object_id in found):
        raise Wrong(f"{what}: objects are other ones")
    if now.lost:
        raise Wrong(f"{what}: {now.lost} are reported lost, though nothing is")
    missing = {crc for object_id, crc in before.contents.items() if object_id not in found}
    if missing and "registry" not in words and words.count("belongs to no object") != len(missing):
        raise Wrong(f"{what}: nobody says why objects are missing: {words}")
    claimed = set()
    for number, name in enumerate(now.unclaimed):
        client.execute("memdev-claim", {"name": name, "id": f"claimed{number}"})
        claimed.add(checksum(client, f"claimed{number}", [])[0])
    if claimed != missing:
        raise Wrong(f"{what}: {len(missing)} objects are missing, and {len(claimed)} can be claimed")
    if missing:
        return "unclaimed"
    return "recovered" if "registry" in words else "unnoticed"


def _clear(client: Client) -> None:
    try:
        for entry in client.execute("query-memdev"):
            client.execute(*delete(entry["id"]))
    except QmpError as exc:
        raise Wrong(f"not even deleted: {exc}") from exc
