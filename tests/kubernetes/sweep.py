"""Kill the driver, gmemd or the kubelet at every step of what is done for a claim, and look what is left.

A step is a message to gmemd or its reply, a request to the API server or its answer, or a file operation of the driver.
After each the kubelet does again what it was doing, as it does after its own restart, and then
- the claim has its memory exactly once, in the daemon and in the keeper, with the bytes that it had, or
- nothing is left of it anywhere.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.between import Between
from tests.kubernetes.doomed import NUMBERS
from tests.kubernetes.kubelet import Refused
from tests.kubernetes.node import Claim, Node
from tests.patience import PATIENCE, wait_for

SIZES = {"ram": 4 << 20, "spare": 2 << 20}
DATA = b"what the pod has written"


@dataclass(frozen=True)
class Point:
    """Where who ends. `where`: message, request or file; `when`: before or after it."""

    who: str
    where: str
    when: str
    number: int


@dataclass
class Act:
    """Something that the kubelet does for a claim. `method`: what it calls; `release`: the claim's policy."""

    name: str
    method: str
    release: str = "delete"
    again: bool = False  # whether it was prepared and released before


ACTS = (
    Act("prepare", "NodePrepareResources"),
    Act("release", "NodeUnprepareResources"),
    Act("save and release", "NodeUnprepareResources", "snapshot"),
    Act("release, keeping", "NodeUnprepareResources", "keep"),
    Act("prepare what was kept", "NodePrepareResources", "keep", again=True),
)


class Sweep:
    """One node with one driver after the other."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._count = 0
        self._node = Node(api, qmp="unix:{between}", program=(sys.executable, "-m", "tests.kubernetes.doomed",
                                                              "{counter}"))
        path = self._node.directory / "counter"
        path.write_bytes(bytes(NUMBERS.size))
        with path.open("r+b") as file:
            self._counter = mmap.mmap(file.fileno(), NUMBERS.size)
        between = str(self._node.directory / "between")
        self._between = Between(between, self._node.gmemd.socket)
        self._node.put_into(between=between, counter=str(path))
        self._node.start()
        self._node.wait_published()

    def close(self) -> None:
        self._between.close()
        self._node.__exit__()

    # -- one point

    def points(self, act: Act) -> Iterator[Point]:
        """All points of an act; it is done once to count them."""
        steps = self.strike(act, None)
        for number in range(1, steps["message"] + 1):
            for who, when in (("driver", "before"), ("driver", "after"), ("gmemd", "before"), ("gmemd", "after"),
                              ("kubelet", "before"), ("kubelet", "after")):
                yield Point(who, "message", when, number)
        for number in range(1, steps["request"] + 1):
            for who, when in (("driver", "before"), ("driver", "after"), ("kubelet", "before"), ("gmemd", "after")):
                yield Point(who, "request", when, number)
        for number in range(1, steps["file"] + 1):
            yield Point("driver", "file", "before", number)

    def strike(self, act: Act, point: Point | None) -> dict[str, int]:
        """Do an act and end somebody at a point; how many steps it took as far as it came. AssertionError if wrong."""
        self._count += 1
        claim = self._prepared(act)
        steps = self._act(act, claim, point)
        self._repeat(act, claim)
        self._judge(act, claim)
        self._end(act, claim)
        return steps

    def _prepared(self, act: Act) -> Claim:
        """A claim, as it is before the act."""
        claim = self._node.claim(f"c{self._count}", *({"request": request, "consumedCapacity": {"memory": str(size)}}
                                                      for request, size in SIZES.items()),
                                 parameters={"onRelease": act.release})
        if act.method == "NodeUnprepareResources" or act.again:
            self._node.kubelet.prepare(claim)
            self._touch(claim, write=True)
            if act.again:
                self._node.kubelet.unprepare(claim)
        return claim

    def _act(self, act: Act, claim: Claim, point: Point | None) -> dict[str, int]:
        """The kubelet's call, until it is answered or somebody has ended."""
        steps = {"message": 0, "request": 0, "file": 0}
        channel, call = self._node.kubelet.begin(act.method, claim)

        def told(where: str, when: str) -> bool:
            if when == "before":
                steps[where] += 1
            if point is None or (where, when, steps[where]) != (point.where, point.when, point.number):
                return False
            if point.who == "kubelet":
                channel.close()
                return False
            self._node.drivers[-1].kill() if point.who == "driver" else self._node.gmemd.kill()
            return True

        self._counter[:] = NUMBERS.pack(point.number if point and point.where == "file" else 0, 0)
        self._between.told = lambda when, number: told("message", when)
        self._api.before = lambda method, path: None if "resourceclaims" not in path else [told("request", "before")]
        self._api.after = lambda method, path: None if "resourceclaims" not in path else [told("request", "after")]
        with suppress(grpc.RpcError, grpc.FutureCancelledError, ValueError):
            call.result(PATIENCE)
        self._between.told = lambda when, number: False
        self._api.before = self._api.after = lambda method, path: None
        steps["file"] = NUMBERS.unpack(self._counter[:])[1]
        self._counter[:] = bytes(NUMBERS.size)
        channel.close()
        return steps

    def _repeat(self, act: Act, claim: Claim) -> None:
        """What follows: whoever has ended is there again, and the kubelet calls until it is done."""
        self._node.gmemd.wait_greeting()
        call = (self._node.kubelet.prepare if act.method == "NodePrepareResources" else self._node.kubelet.unprepare)
        end = time.monotonic() + PATIENCE
        while True:
            if self._node.drivers[-1].poll() is not None:
                self._node.start()
            try:
                call(claim)
                return
            except (Refused, grpc.RpcError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    # -- looking

    def _judge(self, act: Act, claim: Claim) -> None:
        """Whether all is as it should be after an act."""
        there = {f"{request}@{claim[2]}": size for request, size in SIZES.items()}
        if act.method == "NodePrepareResources":
            self._has_memory(claim, there)
            names = [device["name"] for device in self._node.specification(claim)["devices"]]
            assert names == [f"{claim[2]}_{request}" for request in SIZES]
            self._touch(claim, write=False, known=act.again)
        elif act.release == "keep":
            self._has_memory(claim, there)
            assert list(self._node.cdi.iterdir()) == []
            self._touch(claim, write=False, known=True)
        else:
            self._wait_empty()

    def _end(self, act: Act, claim: Claim) -> None:
        """Use what was saved, and release the claim."""
        if act.release == "snapshot":
            again = self._node.claim(claim[1] + "-again", {"request": "ram", "consumedCapacity": {"memory": "4Mi"}},
                                     parameters={"restore": f"{claim[1]}.ram"})
            self._node.kubelet.prepare(again)
            self._touch(again, write=False, known=True, requests=("ram",))
            self._node.kubelet.unprepare(again)
        elif act.release == "keep":
            self._release_kept(claim)
        elif act.method == "NodePrepareResources":
            self._node.kubelet.unprepare(claim)
        self._wait_empty()
        self._node.api.remove("resourceclaims", claim[1], claim[0])

    def _release_kept(self, claim: Claim) -> None:
        """As if its claim had another policy, which is quicker than waiting until its end is noticed."""
        with self._node.gmemd.client() as client:
            for request in SIZES:
                client.execute("object-del", {"id": f"{request}@{claim[2]}"})
        self._node.kubelet.unprepare(claim)

    def _has_memory(self, claim: Claim, there: dict[str, int]) -> None:
        """Exactly once: one room with these objects, and one descriptor of each in the daemon and in the keeper."""
        assert list(self._node.rooms()) == [claim[2]]
        wait_for(lambda: self._node.objects() == there)  # a driver that starts has an object of its own for a moment
        wait_for(lambda: self._memory() == (len(there), len(there)))  # others are closed beside the loop

    def _wait_empty(self) -> None:
        """Nothing is left of any claim."""
        wait_for(lambda: self._node.leftovers() == [])
        wait_for(lambda: self._memory() == (0, 0))

    def _memory(self) -> tuple[int, int]:
        """How many memfds the daemon and the keeper hold."""
        return _memfds(self._node.gmemd.daemon()), _memfds(self._node.gmemd.process.pid)

    def _touch(self, claim: Claim, *, write: bool, known: bool = False, requests: Any = tuple(SIZES)) -> None:
        """Write to the claim's memory as its pod, or look whether it is what was written."""
        with self._node.inside(claim) as client:
            for request in requests:
                _, [fd] = client.execute_fds("memdev-get-fd", {"id": request})
                with mmap.mmap(fd, len(DATA)) as view:
                    if write:
                        view[:] = DATA
                    assert view[:] == (DATA if write or known else bytes(len(DATA)))
                os.close(fd)


def _memfds(pid: int) -> int:
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += os.readlink(link).startswith("/memfd:")
    return found


@dataclass
class Tally:
    """What was struck, and what was wrong."""

    points: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def sweep(api: ApiServer, acts: Sequence[Act] = ACTS, *, step: int = 1, strict: bool = True,
          say: Callable[[str], object] = print) -> Tally:
    """Strike acts at every `step`-th point. `strict`: raise what is wrong, else note it and go on."""
    tally = Tally()
    place = Sweep(api)
    try:
        for act in acts:
            for number, point in enumerate(place.points(act)):
                if number % step != step // 2:
                    continue
                kind = f"{point.who} at a {point.where}"
                tally.points[kind] = tally.points.get(kind, 0) + 1
                try:
                    place.strike(act, point)
                except (AssertionError, OSError, Refused, grpc.RpcError) as exc:
                    if strict:
                        raise
                    tally.wrong.append(f"{act.name}, {point}: {exc}")
                    say(f"WRONG: {tally.wrong[-1][:1000]}")
                    place.close()
                    place = Sweep(api)
            say(f"{act.name}: {sum(tally.points.values())} points so far, {len(tally.wrong)} wrong")
    finally:
        place.close()
    return tally
