"""A day with a clock that jumps: the real daemon, whose clocks are moved by what a file says.

The monotonic clocks advance by a minute at each step, and once by hours, as in a machine that was paused; the wall
clock goes with them, or an hour or a day back or forth, to 1970 or beyond 2038. Timers are those of asyncio, which look
at the moved clock whenever the daemon wakes up. What the kernel counts (epoll_wait(2), SO_RCVTIMEO) is not moved.
"""

from __future__ import annotations

import mmap
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gmemd.client.client import Client
from tests.daemon import Server
from tests.patience import PATIENCE
from tests.robustness.world import Wrong

MINUTE = 60.0
_PAUSE = 6 * 3600.0  # seconds that the machine stands still, in the middle of the day
_GROWTH = 8 << 20  # bytes
_WALL = (0.0, -3600.0, 3600.0, -86400.0, 86400.0, 3155760000.0, -3155760000.0)  # seconds by which it jumps, besides
_EPOCH, _BEYOND = 90000.0, 2.0 ** 31 + 5  # times to which it is set
_PROGRAM = """
import mmap, os, struct, sys, time
with open(os.environ["GMEMD_TEST_CLOCK"], "rb") as file:
    shared = mmap.mmap(file.fileno(), 16, prot=mmap.PROT_READ)
def moved(clock, place):
    return lambda *which: clock(*which) + struct.unpack_from("d", shared, place)[0]
of_kernel = time.clock_gettime
time.clock_gettime = lambda which: moved(of_kernel, 0 if which == time.CLOCK_REALTIME else 8)(which)
time.time = moved(time.time, 0)
time.monotonic, time.perf_counter = moved(time.monotonic, 8), moved(time.perf_counter, 8)
from gmemd.cli.gmemd import main
sys.exit(main())
"""


@dataclass
class Day:
    """What happened."""

    jumps: int = 0
    commands: int = 0
    seconds: float = 0.0  # of the monotonic clock
    cut: int = 0  # clients disconnected because their time was over


class Clocks:
    """The daemon's clocks: what is added to the real ones (seconds)."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 16)
        self.wall = self.monotonic = 0.0

    def set(self, wall: float, monotonic: float) -> None:
        self.wall, self.monotonic = wall, monotonic
        struct.pack_into("dd", self._shared, 0, wall, monotonic)

    def close(self) -> None:
        self._shared.close()


class Scene:
    """The daemon and its clients."""

    def __init__(self, daemon: Server, clocks: Clocks) -> None:
        self.daemon, self.clocks, self.day = daemon, clocks, Day()
        self.client = daemon.client()
        self.do("object-add", qom_type="memory-backend-guest-memfd", id="e", size=8192)
        self.shared = True

    def do(self, command: str, **arguments: Any) -> Any:
        self.day.commands += 1
        return self.client.execute(command, {name.replace("_", "-"): arguments[name] for name in arguments} or None)

    def step(self, wall: float, monotonic: float) -> None:
        """Jump, then work: an object comes and goes, and an event has the time of the wall clock."""
        self.clocks.set(wall, monotonic)
        self.day.jumps += 1
        self.do("object-add", qom_type="memory-backend-memfd", id="m", size=4096)
        self.do("object-del", id="m")
        self.client.events.clear()
        self.do("memdev-convert", id="e", offset=0, size=4096, to="private" if self.shared else "shared")
        self.shared = not self.shared
        stamp = self.client.wait_event("MEMDEV_CONVERTED", PATIENCE)["timestamp"]
        if abs(stamp["seconds"] - (time.time() + wall)) > PATIENCE or not 0 <= stamp["microseconds"] < 1_000_000:
            raise Wrong(f"at {time.time() + wall} an event says {stamp}")

    def beginning(self) -> socket.socket:
        """A client that has sent half a message."""
        sock = self.daemon.connect()
        while not sock.recv(4096).endswith(b"\n"):
            pass
        sock.sendall(b'{"execute": "qmp_capabilities"}')
        while not sock.recv(4096).endswith(b"\n"):
            pass
        sock.sendall(b'{"execute": "query-ver')
        return sock

    def answer(self, sock: socket.socket) -> bytes:
        """What comes after the other half; b"" if the connection was closed."""
        try:
            sock.sendall(b'sion"}')
            data = sock.recv(4096)
        except ConnectionError:
            data = b""
        return data

    def use(self) -> tuple[int, int]:
        """Memory (bytes) and descriptors."""
        text = Path(f"/proc/{self.daemon.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) << 10, self.daemon.open_fds()


def live(steps: int) -> Day:
    """Live through so many minutes and the pause; Wrong if anything is not as it should be."""
    with TemporaryDirectory() as place:
        clocks = Clocks(Path(place, "clock"))
        argv = [sys.executable, "-c", _PROGRAM, "--qmp", "{address}", "--persist", "off", "--kernel", "simulated",
                "--state-dir", "{directory}/state"]
        try:
            with Server(argv, env={"GMEMD_TEST_CLOCK": str(Path(place, "clock")), "COVERAGE_PROCESS_CONFIG": ""}) as it:
                return _live(Scene(it, clocks), steps)
        finally:
            clocks.close()


class Halves:
    """Clients that send half a message, one after the other: the other half comes in time, or too late."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._sock: socket.socket | None = None
        self._begun = 0.0
        self._in_time = False

    def look(self, monotonic: float) -> None:
        """Begin the next one, or send its other half if it is time for that."""
        if self._sock is None:
            self._sock, self._begun, self._in_time = self._scene.beginning(), monotonic, not self._in_time
        elif monotonic - self._begun >= (5 if self._in_time else 11) * MINUTE:
            late = monotonic - self._begun > 10 * MINUTE
            self._scene.day.cut += late
            if bool(self._scene.answer(self._sock)) == late:
                raise Wrong(f"the other half after {monotonic - self._begun} s: {'answered' if late else 'closed'}")
            self.close()

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _live(scene: Scene, steps: int) -> Day:
    waiting, halves = Client(scene.daemon.sock, timeout=PATIENCE), Halves(scene)
    for number in range(20):
        scene.step(number, number)
    before = scene.use()
    for wall, monotonic in _times(steps):
        scene.step(wall, monotonic)
        halves.look(monotonic)
        waiting.take_events()  # who lets them pile up is disconnected
        scene.day.seconds = monotonic
    halves.close()
    if "qemu" not in waiting.execute("query-version"):
        raise Wrong("who was idle all day has no answer")
    after = scene.daemon.settled_fds(before[1])
    if after > before[1] or scene.use()[0] - before[0] > _GROWTH:
        raise Wrong(f"before {before}, after {after}, {scene.use()}")
    waiting.close()
    scene.client.close()
    return scene.day


def _times(steps: int) -> Iterator[tuple[float, float]]:
    """What is added to both clocks, a minute after the other."""
    wall, monotonic = 20.0, 20.0
    for number in range(steps):
        pause = _PAUSE if number == steps // 2 else 0.0
        wall, monotonic = wall + MINUTE + pause + _WALL[number % len(_WALL)], monotonic + MINUTE + pause
        if number % 50 in (20, 40):
            wall = (_EPOCH if number % 50 == 20 else _BEYOND) - time.time()
        elif number % 50 in (21, 41):
            wall = monotonic
        yield wall, monotonic
