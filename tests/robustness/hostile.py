"""Hostile and careless clients: whatever they send, leave unread or open, they cost nobody else anything that stays.

Each row does so much of one thing to a real daemon. Meanwhile another user's client pings; afterwards the daemon has no
more descriptors than before, its answers are the same, and its memory is what it was but for GROWTH.
"""

from __future__ import annotations

import array
import json
import os
import pty
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.robustness.world import Wrong

GROWTH = 48 << 20  # bytes
OTHER = 54321  # uid of the hostile clients, where this process may choose it
BATCH = 240  # descriptors of one message
_ASKED = ("query-version", "query-status", "query-memdev", "query-fdsets", "query-jobs", "query-commands")
_NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
_PING = b'{"execute": "query-status"}\n'


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    descriptors: int = 1_000_000
    connects: int = 100_000
    idle: int = 10_000
    deaf: int = 1_000
    events: int = 30  # to those
    seconds: float = 2.0  # of pings without any


SMALL = Scale(descriptors=4_800, connects=600, idle=150, deaf=20, events=3, seconds=0.2)


@dataclass(frozen=True)
class Row:
    """What came of one thing."""

    what: str
    seconds: float
    before: tuple[int, int]  # bytes of memory, descriptors
    most: tuple[int, int]  # the same at its height
    after: tuple[int, int]
    idle: float  # seconds: the 99th percentile of pings without it
    beside: float  # and with it


class Scene:
    """A daemon and its hostile clients."""

    def __init__(self, daemon: Daemon, scale: Scale) -> None:
        self.daemon = daemon
        self.scale = scale
        self.path = str(daemon.sock)
        self.rows: list[Row] = []
        self.most = (0, 0)
        if os.geteuid() == 0:
            os.chmod(daemon.dir, 0o755)
            os.chmod(self.path, 0o666)

    def use(self) -> tuple[int, int]:
        """The daemon's memory (bytes) and descriptors; at a row's height this is called, too."""
        text = Path(f"/proc/{self.daemon.pid}/status").read_text()
        found = int(text.split("VmRSS:")[1].split()[0]) << 10, self.daemon.open_fds()
        self.most = max(self.most[0], found[0]), max(self.most[1], found[1])
        return found

    @contextmanager
    def row(self, what: str) -> Iterator[Pings]:
        """Measure what happens in between, and how long another client waits within the `with` of what this yields.

        Wrong if the daemon is not afterwards as it was before.
        """
        answers, idle = self._answers(), _p99(self.path, self.scale.seconds)
        self.most = (0, 0)
        before, begun = self.use(), time.monotonic()
        pings = Pings(self.path)
        yield pings
        seconds = time.monotonic() - begun
        end = time.monotonic() + PATIENCE / 6
        while ((after := self.use())[1] > before[1] or after[0] > before[0] + GROWTH) and time.monotonic() < end:
            time.sleep(0.01)
        self.rows.append(Row(what, seconds, before, self.most, after, idle, pings.p99))
        if after[1] > before[1]:
            raise Wrong(f"{what}: {after[1] - before[1]} descriptors stay")
        if after[0] - before[0] > GROWTH:
            raise Wrong(f"{what}: {after[0] - before[0]} bytes stay")
        if self._answers() != answers:
            raise Wrong(f"{what}: the answers are not what they were")

    def _answers(self) -> list[bytes]:
        with self.client() as sock:
            return [ask(sock, b'{"execute": "%b"}\n' % name.encode(), 1) for name in _ASKED]

    def client(self, *, hostile: bool = False) -> socket.socket:
        """A negotiated connection, of the other user if it is hostile."""
        sock = self.connect(hostile=hostile)
        ask(sock, _NEGOTIATE, 2)
        return sock

    def connect(self, *, hostile: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        with user(OTHER if hostile else os.geteuid()):
            sock.connect(self.path)
        sock.settimeout(PATIENCE)
        return sock


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Be that user, as far as this process may: the kernel notes who connects."""
    if os.geteuid() or not uid:
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def ask(sock: socket.socket, requests: bytes, count: int, fds: list[int] | None = None) -> bytes:
    """Send requests, and read so many messages."""
    sock.sendmsg([requests], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
    data = b""
    while data.count(b"\n") < count:
        received = sock.recv(1 << 20)
        if not received:
            raise Wrong("it hung up")
        data += received
    return data


class Pings:
    """Another client, in a process of its own, that pings all the time."""

    p99 = 0.0  # seconds, at the end

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> Pings:
        self._control, control = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            with suppress(BaseException):
                self._control.close()
                control.send(json.dumps(_ping(self._path, control)).encode())
            os._exit(0)
        control.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._control.send(b"!")
        self._control.settimeout(PATIENCE)
        self.p99 = json.loads(self._control.recv(100) or b"0")
        self._control.close()
        os.waitpid(self._pid, 0)
        if not self.p99 and not any(error):
            raise Wrong("the ping was not answered")


def _ping(path: str, control: socket.socket) -> float:
    took = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(PATIENCE)
        ask(sock, _NEGOTIATE, 2)
        told = select.poll()
        told.register(control, select.POLLIN)
        while not told.poll(0) or len(took) < 100:
            time.sleep(0.0005)
            begun = time.perf_counter()
            ask(sock, _PING, 1)
            took.append(time.perf_counter() - begun)
    return statistics.quantiles(took, n=100)[98]


def _p99(path: str, seconds: float) -> float:
    with Pings(path) as pings:
        time.sleep(seconds)
    return pings.p99


# -- descriptors -------------------------------------------------------------------------------------

def kinds(directory: Path) -> dict[str, Callable[[], int]]:
    """What makes a descriptor of each kind."""
    file, fifo = directory / "file", directory / "fifo"
    file.write_bytes(bytes(8192))
    if not fifo.exists():
        os.mkfifo(fifo)

    def deleted() -> int:
        (directory / "gone").write_bytes(bytes(4096))
        fd = os.open(directory / "gone", os.O_RDWR)
        (directory / "gone").unlink()
        return fd

    def memfd(size: int) -> int:
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        os.truncate(fd, size)
        return fd

    def one_of(made: tuple[int, int], which: int) -> int:
        os.close(made[1 - which])
        return made[which]

    def holding(depth: int) -> int:
        """A socket in which descriptors wait, one of them such a socket."""
        inner = [memfd(4096), *([holding(depth - 1)] if depth else [])]
        one, other = socket.socketpair()
        with other:
            socket.send_fds(other, [b"x"], inner)
        for fd in inner:
            os.close(fd)
        return one.detach()

    def holding_itself() -> int:
        one, other = socket.socketpair()
        socket.send_fds(other, [b"x"], [one.fileno(), other.fileno()])
        other.close()
        return one.detach()

    def listener() -> int:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind("")  # an abstract name that the kernel chooses
        sock.listen()
        return sock.detach()

    return {
        "memfd": lambda: memfd(8192), "memfd with pages": lambda: _filled(memfd(1 << 16)),
        "empty memfd": lambda: memfd(0), "file": lambda: os.open(file, os.O_RDWR),
        "read-only file": lambda: os.open(file, os.O_RDONLY), "O_PATH": lambda: os.open(file, os.O_PATH),
        "deleted file": deleted, "directory": lambda: os.open(directory, os.O_RDONLY),
        "pipe to read": lambda: one_of(os.pipe(), 0), "pipe to write": lambda: one_of(os.pipe(), 1),
        "FIFO": lambda: os.open(fifo, os.O_RDWR), "eventfd": lambda: os.eventfd(0), "pidfd": lambda: os.pidfd_open(
            os.getpid()),
        "epoll": lambda: _fileno(select.epoll()), "terminal": lambda: one_of(pty.openpty(), 0),
        "/dev/null": lambda: os.open(os.devnull, os.O_RDWR), "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
        "/proc file": lambda: os.open("/proc/self/maps", os.O_RDONLY),
        "namespace": lambda: os.open("/proc/self/ns/net", os.O_RDONLY),
        "unix socket": lambda: one_of(tuple(sock.detach() for sock in socket.socketpair()), 0),  # type: ignore[arg-type]
        "listener": listener, "datagram socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        "TCP socket": lambda: socket.socket().detach(), "socket holding descriptors": lambda: holding(0),
        "socket in a socket in a socket": lambda: holding(2), "socket that holds itself": holding_itself,
    }


def _filled(fd: int) -> int:
    os.pwrite(fd, b"x" * (1 << 16), 0)
    return fd


def _fileno(poll: select.epoll) -> int:
    fd = os.dup(poll.fileno())
    poll.close()
    return fd


def descriptors(scene: Scene, count: int) -> None:
    """Each message has every kind, the first of them in turn; they are kept, taken, replaced, or not wanted at all."""
    made = list(kinds(scene.daemon.dir).values())
    do = (_PING, b'{"execute": "getfd", "arguments": {"fdname": "x"}}\n',
          b'{"execute": "getfd", "arguments": {"fdname": "y"}}{"execute": "memdev-adopt", "arguments": {"id": "y",'
          b' "fdname": "y"}}{"execute": "object-del", "arguments": {"id": "y"}}'
          b'{"execute": "closefd", "arguments": {"fdname": "y"}}\n',
          b'{"execute": "add-fd", "arguments": {"fdset-id": 7}}'
          b'{"execute": "remove-fd", "arguments": {"fdset-id": 7}}\n')
    with scene.row(f"{count:,} descriptors of {len(made)} kinds") as pings, pings, scene.client(hostile=True) as sock:
        for number in range(-(-count // BATCH)):
            turn = number % len(made)
            fds = [make() for make in made[turn:] + made[:turn]]
            requests = do[number // len(made) % len(do)]
            ask(sock, requests, requests.count(b'"execute"'), list(islice(cycle(fds), BATCH)))
            for fd in fds:
                os.close(fd)
            if number % 500 == 0:
                scene.use()


# -- connections -------------------------------------------------------------------------------------

def connects(scene: Scene, count: int) -> None:
    """Clients that go at once, greeted, in the middle of a message, with answers or descriptors unread, or properly."""
    half = b'{"execute": "qmp_capabilities"}{"execute": "object-add", "arguments": {"id": "'
    null = os.open(os.devnull, os.O_RDWR)
    with scene.row(f"{count:,} connects") as pings, pings:
        for number in range(count):
            with scene.connect() as sock:
                way = number % 6
                if way:
                    sock.recv(4096)
                if way == 2:
                    sock.send(half)
                elif way == 3:
                    sock.send(_NEGOTIATE + _PING * 3)
                elif way == 4:
                    socket.send_fds(sock, [_PING], [null] * 8)
                elif way == 5:
                    ask(sock, _NEGOTIATE + _PING, 2)
            if number % 5000 == 0:
                scene.use()
    os.close(null)


def idle(scene: Scene, count: int) -> None:
    """Clients that say nothing: every other has negotiated, every tenth has sent half a message."""
    with ExitStack() as stay, scene.row(f"{count:,} idle clients") as pings:
        for number in range(count):
            sock = stay.enter_context(scene.connect() if number % 2 else scene.client(hostile=True))
            if number % 10 == 0:
                sock.send(b'{"execute": "query-')
        scene.use()
        with pings:
            time.sleep(scene.scale.seconds)
        stay.close()


def deaf(scene: Scene, count: int) -> None:
    """Clients that ask for far more than they may leave unread, and read nothing; events come on top."""
    schema = b'{"execute": "query-qmp-schema"}\n' * 40
    with ExitStack() as stay, scene.row(f"{count:,} clients that never read") as pings:
        for _ in range(count):
            sock = stay.enter_context(scene.connect())
            sock.setblocking(False)
            with suppress(BlockingIOError, ConnectionError):
                sock.send(_NEGOTIATE + schema)
        with pings, scene.client() as own:
            ask(own, b'{"execute": "object-add", "arguments": {"qom-type": "memory-backend-guest-memfd", "id": "e",'
                b' "size": 8192}}\n', 1)
            for number in range(scene.scale.events):
                ask(own, b'{"execute": "memdev-convert", "arguments": {"id": "e", "offset": 0, "size": 4096, "to": "%b"'
                    b'}}\n' % (b"private" if number % 2 else b"shared"), 1 + (number > 0))
                scene.use()
                time.sleep(0.3)
            ask(own, b'{"execute": "object-del", "arguments": {"id": "e"}}\n', 1)
        stay.close()


def suite(scale: Scale, *, policy: bool) -> list[Row]:
    """All rows; `policy`: one that admits more idle clients of a user than the default share."""
    with Daemon(kernel="simulated", measured=False) as daemon:
        scene = Scene(daemon, scale)
        descriptors(scene, scale.descriptors)
        connects(scene, scale.connects)
        deaf(scene, scale.deaf)
        rows = scene.rows
    place = Path("/run") if os.geteuid() == 0 else Path.cwd()
    file = place / f"gmemd-hostile-{os.getpid()}.toml"
    file.write_text(f'version = 1\n[[rule]]\nname = "all"\nmatch = {{ uid = [{os.geteuid()}, {OTHER}] }}\n'
                    f'role = "operator"\nlimits = {{ clients = {scale.idle + 1000} }}\n')
    try:
        with Daemon(*(("--policy", str(file)) if policy else ()), kernel="simulated", measured=False) as daemon:
            scene = Scene(daemon, scale)
            idle(scene, scale.idle)
            return rows + scene.rows
    finally:
        file.unlink()


def table(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = ["| | it took | memory before, at its height, after (MiB) | descriptors before, at its height, after "
             "| p99 of a ping, idle | beside it |", "|---|---|---|---|---|---|"]
    for row in rows:
        uses = (row.before, row.most, row.after)
        lines.append(f"| {row.what} | {row.seconds:.0f} s | {', '.join(f'{use[0] / (1 << 20):.0f}' for use in uses)} "
                     f"| {', '.join(f'{use[1]:,}' for use in uses)} | {row.idle * 1e3:.2f} ms "
                     f"| {row.beside * 1e3:.2f} ms |")
    return "\n".join(lines)
