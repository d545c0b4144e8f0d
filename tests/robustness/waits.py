"""How long another client waits, at the longest, while a command does all it can: a row for each, printed as a table.

A command counts as covered when it was sent while the wait was measured.  `ROWS` are run in their order on one daemon
under its keeper; each leaves the daemon as it found it.  The figures mean something on a quiet machine only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.commands.cooperating import userfaultfd
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.robustness.world import World

BOUND = 0.020  # seconds that another client may wait, on a quiet machine
MIB = 1 << 20
_PAUSE = 0.0005  # seconds between an answer and the next question
_LEAST = 5  # questions that are asked at least while a row is measured
_ANSWER = struct.Struct("<Qd")


@dataclass(frozen=True)
class Scale:
    """How much of everything there is."""

    big: int = 4096 * MIB  # bytes of a large object
    many: int = 9000  # objects
    burst: int = 10_000  # commands in one go
    deaf: int = 50  # clients that listen and do not read


SMALL = Scale(big=8 * MIB, many=200, burst=200, deaf=5)


@dataclass(frozen=True)
class Wait:
    """A row of the table."""

    what: str
    seconds: float  # that it took
    longest: float  # seconds that the other client waited


class Pinger:
    """Another client, in a process of its own, that asks all the time how the daemon is."""

    def __init__(self, path: str) -> None:
        self._control, control = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._control.close()
                _ping(path, control)
            finally:
                os._exit(0)
        control.close()
        self._control.settimeout(PATIENCE)

    def longest(self) -> tuple[int, float]:
        """How many questions were answered since the last time, and what the longest answer took (seconds)."""
        self._control.sendall(b"?")
        count, longest = _ANSWER.unpack(self._control.recv(_ANSWER.size, socket.MSG_WAITALL))
        return count, longest

    def close(self) -> None:
        self._control.close()
        os.waitpid(self._pid, 0)


def _ping(path: str, control: socket.socket) -> None:
    client: socket.socket | None = socket.socket(socket.AF_UNIX)
    assert client is not None
    client.connect(path)
    client.recv(1 << 16)
    count, longest = 0, 0.0
    for request in _requests():
        if client is not None:
            begun = time.perf_counter()
            try:
                client.sendall(request)
                data = b""
                while not data.endswith(b"\n"):
                    data += (received := client.recv(1 << 16))
                    if not received:
                        raise ConnectionResetError
            except OSError:  # the end of the daemon is an answer, too
                client = None
            count, longest = count + 1, max(longest, time.perf_counter() - begun)
        if select.select([control], [], [], _PAUSE if client is not None else None)[0]:
            if not control.recv(1):
                return
            control.sendall(_ANSWER.pack(count, longest))
            count, longest = 0, 0.0


def _requests() -> Iterator[bytes]:
    yield b'{"execute": "qmp_capabilities"}\n'
    while True:
        yield b'{"execute": "query-status"}\n'


@dataclass
class Scene:
    """A daemon, a client that keeps it busy, and one that waits."""

    path: str
    pid: int
    directory: Path
    scale: Scale
    client: Client = field(init=False)
    pinger: Pinger = field(init=False)
    waits: list[Wait] = field(default_factory=list)
    sent: set[str] = field(default_factory=set)  # commands while a wait was measured
    _measuring: bool = False

    def __enter__(self) -> Self:
        self.pinger = Pinger(self.path)
        self.client = Client(self.path, timeout=PATIENCE, wait=PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.client.close()
        self.pinger.close()

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Measure how long the other client waits meanwhile."""
        self.pinger.longest()
        begun, self._measuring = time.perf_counter(), True
        yield
        seconds, self._measuring = time.perf_counter() - begun, False
        count, longest = self.pinger.longest()
        while count < _LEAST:  # what the command left behind counts, too
            more, later = self.pinger.longest()
            if not more:
                break
            count, longest = count + more, max(longest, later)
        self.waits.append(Wait(what, seconds, longest))

    def note(self, *commands: str) -> None:
        """Say that commands were sent in another way."""
        if self._measuring:
            self.sent.update(commands)

    def do(self, command: str, /, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """The value of a command, None if it is refused; its arguments with underscores for hyphens."""
        self.note(command)
        with suppress(QmpError):
            return self.client.execute(command, _wire(arguments), fds=fds)

    def burst(self, command: str, several: Sequence[dict[str, Any]]) -> None:
        """Send many of a command at once and read the answers."""
        self.note(command)
        for begin in range(0, len(several), 500):  # both pipes are finite
            part = several[begin:begin + 500]
            text = b"".join(json.dumps({"execute": command, "arguments": _wire(arguments)}).encode() + b"\n"
                            for arguments in part)
            self.client.send_text(text, len(part))

    def give(self, name: str, fd: int) -> None:
        """Give a descriptor away by getfd."""
        self.do("getfd", [fd], fdname=name)
        os.close(fd)

    def add(self, object_id: str, size: int = 0, kind: str = "memfd", **more: Any) -> None:
        self.do("object-add", qom_type=f"memory-backend-{kind}", id=object_id, size=size or self.scale.big, **more)

    def job(self, job_id: str) -> None:
        """Wait for the end of a job."""
        end = time.monotonic() + PATIENCE
        while any(job["id"] == job_id and job["status"] != "concluded" for job in self.client.execute("query-jobs")):
            assert time.monotonic() < end
            time.sleep(0.005)


def _wire(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def _filled(size: int) -> int:
    """The fd of a memfd with all its pages."""
    fd = os.memfd_create("filled", os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, size)
    return fd


def _pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


# -- the rows ----------------------------------------------------------------------------------------

def first_refusals(scene: Scene) -> None:
    with scene.measured("nothing"):
        time.sleep(0.2)
    with scene.measured("the first refusals: each command with a wrong argument"):
        for command in scene.client.execute("query-commands"):
            scene.do(command["name"], **{"no such": "x" * 1000})
    with scene.measured("query-command-effect of each command"):
        for command in scene.client.execute("query-commands"):
            scene.do("query-command-effect", command=command["name"], arguments={"id": "x"})


def few_words(scene: Scene) -> None:
    with scene.measured("short queries about gmemd itself"):
        for name in ("query-status", "query-version", "query-commands", "query-name", "query-uuid", "query-kvm",
                     "query-qmp-schema", "query-yank", "query-memory-size-summary", "query-memdev-lost",
                     "query-memdev-unclaimed", "query-memdev-enforcers", "query-memdev-leases", "query-jobs",
                     "x-query-memdev-injections", "qom-list-types"):
            scene.do(name)
        scene.do("yank", instances=[])
        for kind in ("memfd", "file", "guest-memfd", "ram", "shm"):
            scene.do("qom-list-properties", typename=f"memory-backend-{kind}")
            scene.do("device-list-properties", typename=f"memory-backend-{kind}")
    with scene.measured(f"qmp_capabilities of {scene.scale.deaf} clients"):
        for _ in range(scene.scale.deaf):
            scene.note("qmp_capabilities")
            Client(scene.path, timeout=PATIENCE).close()
    with scene.measured("a message of 8 MiB"):
        scene.do("query-command-effect", command="object-add", arguments={"id": ["x" * 100] * (8 * MIB // 104)})
    with scene.measured("x-memdev-inject and -clear"):
        for _ in range(100):
            scene.do("x-memdev-inject", operation="create", nth=1 << 30, errno="ENOMEM")
        scene.do("x-memdev-inject-clear")


def many_objects(scene: Scene) -> None:
    many, burst = scene.scale.many, scene.scale.burst
    ids = [f"o{number}" for number in range(many)]
    with scene.measured(f"object-add of {many:,} objects"):
        scene.burst("object-add", [{"qom_type": "memory-backend-memfd", "id": name, "size": 4096} for name in ids])
    with scene.measured(f"query-memdev of {many:,}"):
        scene.do("query-memdev")
    with scene.measured(f"query-memdev-status of {many:,}"):
        scene.do("query-memdev-status")
    with scene.measured(f"query-memdev-accounting of {many:,}"):
        scene.do("query-memdev-accounting", objects=10_000)
    with scene.measured(f"qom-list of {many:,}"):
        scene.do("qom-list", path="/objects")
    with scene.measured(f"qom-list-get of {min(many, 8000):,} paths"):
        scene.do("qom-list-get", paths=[f"/objects/{name}" for name in ids[:8000]])
    with scene.measured(f"qom-get, {burst:,} times"):
        scene.burst("qom-get", [{"path": "/objects/o1", "property": "size"}] * burst)
    with scene.measured(f"qom-set, {burst:,} times"):
        scene.burst("qom-set", [{"path": "/objects/o1", "property": "merge", "value": True}] * burst)
    with scene.measured("memdev-persist off and on, of 200"):
        for persist in (False, True):
            scene.burst("memdev-persist", [{"id": name, "persist": persist} for name in ids[:200]])
    with scene.measured(f"memdev-get-fd, {burst:,} times"):
        scene.burst("memdev-get-fd", [{"id": "o1"}] * burst)
    with scene.measured("memdev-get-fd with a lease and memdev-release, 200 times"):
        for name in ids[:200]:
            scene.do("memdev-get-fd", id=name, lease="keep")
        scene.do("query-memdev-leases")
        scene.burst("memdev-release", [{"id": name} for name in ids[:200]])
    with scene.measured("query-memdev-holders, 20 times"):
        for name in ids[:20]:
            scene.do("query-memdev-holders", id=name)
    with scene.measured("getfd, add-fd, query-fdsets, remove-fd and closefd of 100"):
        for number in range(100):
            scene.give(f"f{number}", os.memfd_create("x"))
            fd = os.memfd_create("x")
            scene.do("add-fd", [fd], fdset_id=number)
            os.close(fd)
        scene.do("query-fdsets")
        scene.burst("remove-fd", [{"fdset-id": number} for number in range(100)])
        scene.burst("closefd", [{"fdname": f"f{number}"} for number in range(100)])
    with scene.measured(f"object-del of {many:,} objects"):
        scene.burst("object-del", [{"id": name} for name in ids])


def big_objects(scene: Scene) -> None:
    size = f"{scene.scale.big // MIB:,} MiB"
    with scene.measured(f"object-add with prealloc, {size}"):
        scene.add("big", prealloc=True)
    with scene.measured(f"object-del of populated {size}"):
        scene.do("object-del", id="big")
    scene.add("big")
    with scene.measured(f"memdev-populate, {size}"):
        scene.do("memdev-populate", id="big")
    with scene.measured(f"memdev-verify and query-memdev-digests, {size}"):
        scene.do("memdev-verify", id="big", job_id="v")
        scene.job("v")
        scene.do("query-memdev-digests", job_id="v")
    scene.do("job-dismiss", id="v")
    with scene.measured(f"memdev-verify, job-cancel and job-dismiss, {size}"):
        scene.do("memdev-verify", id="big", job_id="c")
        scene.do("job-cancel", id="c")
        scene.job("c")
        scene.do("job-dismiss", id="c")
    with scene.measured(f"memdev-delete with zero, {size}"):
        scene.do("memdev-delete", id="big", zero=True)
    scene.add("set")
    with scene.measured(f"qom-set of prealloc, {size}"):
        scene.do("qom-set", path="/objects/set", property="prealloc", value=True)
    scene.do("object-del", id="set")


def descriptors(scene: Scene) -> None:
    big = scene.scale.big
    size = f"{big // MIB:,} MiB"
    scene.give("last", _filled(big))
    with scene.measured(f"closefd of the last descriptor of {size}"):
        scene.do("closefd", fdname="last")
    scene.give("last", _filled(big))
    with scene.measured(f"getfd that replaces the last descriptor of {size}"):
        scene.give("last", os.memfd_create("x"))
    other = Client(scene.path, timeout=PATIENCE)
    fd = _filled(big)
    other.execute("query-status", fds=[fd])
    os.close(fd)
    with scene.measured(f"the end of a client with the last, untaken descriptor of {size}"):
        other.close()
        time.sleep(0.1)
    with scene.measured("memdev-adopt of what is not memory"):
        for make in (_pipe_end, lambda: os.eventfd(0), lambda: os.open("/", os.O_PATH),
                     lambda: os.pidfd_open(os.getpid()), lambda: os.open("/dev/zero", os.O_RDWR),
                     lambda: socket.socket().detach(), lambda: os.open("/proc/self/maps", os.O_RDONLY)):
            scene.give("odd", make())
            scene.do("memdev-adopt", id="odd", fdname="odd")
    scene.give("mem", _filled(big))
    with scene.measured(f"memdev-adopt and object-del of {size}"):
        scene.do("memdev-adopt", id="a", fdname="mem", require_seals=False)
        scene.do("object-del", id="a")


def private_memory(scene: Scene) -> None:
    big, burst = scene.scale.big, scene.scale.burst
    size = f"{big // MIB:,} MiB"
    scene.add("g", kind="guest-memfd", prealloc=True)
    with scene.measured(f"memdev-convert to private and back, keeping {size}"):
        scene.do("memdev-convert", id="g", offset=0, size=big, to="private", preserve=True)
        scene.do("memdev-convert", id="g", offset=0, size=big, to="shared", preserve=True)
    with scene.measured(f"memdev-discard of {size}"):
        scene.do("memdev-discard", id="g", offset=0, size=big)
    scene.do("memdev-populate", id="g")
    with scene.measured(f"memdev-convert of {size} to private"):
        scene.do("memdev-convert", id="g", offset=0, size=big, to="private")
    scene.do("object-del", id="g")
    scene.add("wide", size=1 << 40, kind="guest-memfd")
    pages = [{"id": "wide", "offset": number * 8192, "size": 4096, "to": "private"} for number in range(burst)]
    with scene.measured(f"memdev-convert, {burst:,} times, that many ranges"):
        scene.burst("memdev-convert", pages)
    with scene.measured(f"query-memdev-ranges of {2 * burst:,}"):
        scene.do("query-memdev-ranges", id="wide")
    listeners = [Client(scene.path, timeout=PATIENCE) for _ in range(scene.scale.deaf)]
    with scene.measured(f"{burst:,} events to {scene.scale.deaf} clients that do not read"):
        scene.burst("memdev-convert", [{**page, "to": "shared"} for page in pages])
    for listener in listeners:
        listener.close()
    scene.do("object-del", id="wide")


def enforced_memory(scene: Scene) -> None:
    """With a userfaultfd where this process may make one, else with something that is refused."""
    big = scene.scale.big
    scene.add("e", kind="guest-memfd")
    _, [fd] = scene.client.execute_fds("memdev-get-fd", {"id": "e"})
    memory = mmap.mmap(fd, big)
    buffer = ctypes.c_char.from_buffer(memory)
    try:
        scene.give("uffd", userfaultfd())
    except OSError:
        scene.give("uffd", os.open(os.devnull, os.O_RDWR))
    with scene.measured(f"memdev-enforce, which allocates {big // MIB:,} MiB"):
        scene.do("memdev-enforce", id="e", fdname="uffd", address=ctypes.addressof(buffer))
    del buffer
    memory.close()
    os.close(fd)
    scene.do("object-del", id="e")


def files(scene: Scene) -> None:
    big, path = scene.scale.big, Path(f"/dev/shm/gmemd-waits-{os.getpid()}")
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, big)
        with scene.measured(f"object-add and object-del of a file of {big // MIB:,} MiB with discard-data"):
            scene.add("f", kind="file", mem_path=str(path), share=True, discard_data=True)
            scene.do("object-del", id="f")
        path.unlink()
        os.mkfifo(path)
        other = Client(scene.path, timeout=PATIENCE)
        with scene.measured("object-add of a FIFO whose other end is not open"):
            arguments = {"qom-type": "memory-backend-file", "id": "p", "size": 4096, "mem-path": str(path),
                         "readonly": True}
            other.send_text(json.dumps({"execute": "object-add", "arguments": arguments}).encode(), 0)
            time.sleep(0.1)
            other.close()
            time.sleep(0.3)
    finally:
        path.unlink(missing_ok=True)


def after_a_loss(scene: Scene, world: World) -> None:
    """Memory whose records are lost is claimed or dropped."""
    with scene.measured("query-memdev-unclaimed and memdev-claim"):
        for number, found in enumerate(scene.do("query-memdev-unclaimed")):
            scene.do("memdev-claim", name=found["name"], **({"id": f"back{number}"} if number else {}))
    for found in scene.client.execute("query-memdev"):
        scene.do("object-del", id=found["id"])


def the_end(scene: Scene) -> None:
    for number in range(100):
        scene.add(f"end{number}", size=4096)
    with scene.measured("quit, until the connection is closed"):
        scene.note("quit")
        with suppress(OSError, QmpError, EOFError):
            scene.client.execute("quit")
        time.sleep(0.3)


ROWS: tuple[Callable[[Scene], None], ...] = (
    first_refusals, few_words, many_objects, big_objects, descriptors, private_memory, enforced_memory, files)


def measure(scale: Scale) -> tuple[list[Wait], set[str]]:
    """All rows, and the commands that they measured."""
    with World("--lab", "--log-level", "info", warm=False, keeper=("--fdstore-max", str(scale.many + 500))) as world:
        scene = Scene(world.socket, world.daemon(), world.directory, scale)
        with scene:
            for row in ROWS:
                row(scene)
            scene.add("kept", prealloc=True)
            scene.add("lost", prealloc=True)
        for path in world.state_dir.iterdir():
            path.unlink()
        world.kill()
        with scene:
            after_a_loss(scene, world)
            the_end(scene)
    scene.waits.append(_nobody_reads(scale))
    return scene.waits, scene.sent


def _nobody_reads(scale: Scale) -> Wait:
    """How long others wait where neither the log nor the audit is read."""
    reader, writer = os.pipe()
    with Daemon("--audit", "-", kernel="simulated", stderr=writer) as daemon:
        scene = Scene(str(daemon.sock), daemon.pid, daemon.dir, scale)
        with scene, scene.measured(f"{2 * scale.burst:,} changes, whose log and audit nobody reads"):
            for _ in range(scale.burst // 100):
                scene.burst("object-add", [{"qom_type": "memory-backend-ram", "id": f"m{n}", "size": 4096}
                                           for n in range(100)])
                scene.burst("object-del", [{"id": f"m{n}"} for n in range(100)])
        daemon.stop()
    os.close(reader)
    os.close(writer)
    return scene.waits[-1]


def table(waits: list[Wait]) -> str:
    """The table in Markdown, and a verdict."""
    lines = ["| while | it took | another client waited at most |", "|---|---|---|"]
    lines += [f"| {wait.what} | {wait.seconds:.2f} s | {wait.longest * 1e3:.1f} ms"
              f"{' (over)' if wait.longest > BOUND else ''} |" for wait in waits]
    over = sum(wait.longest > BOUND for wait in waits)
    worst = max(waits, key=lambda wait: wait.longest)
    return "\n".join([*lines, "", f"{over} of {len(waits)} over {BOUND * 1e3:.0f} ms; the longest, "
                      f"{worst.longest * 1e3:.1f} ms: {worst.what}"])
