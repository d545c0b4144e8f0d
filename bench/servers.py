"""The servers that are measured: how each is started, pinned, observed and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from gmemd.client.running import PATIENCE, Running  # noqa: E402

BINARIES = HERE / "bin"
CLIENT_CPU, SERVER_CPU = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
EVERY_CPU = frozenset(os.sched_getaffinity(0))

# Command lines by name; {socket} and {directory} are filled in.
COMMANDS = {
    "qemu": "qemu-system-x86_64 -machine none -nodefaults -display none -S"
            " -qmp unix:{socket},server=on,wait=off",
    "qsd": "qemu-storage-daemon --chardev socket,path={socket},server=on,wait=off,id=c --monitor chardev=c",
    "echo": f"{BINARIES}/echo {{socket}}",
}
GMEMD_OPTIONS = {
    "gmemd": "--persist off --snapshots {directory}/none",  # whatever is in the default directory
    "gmemd-cold": "--persist off --snapshots {directory}/none --warm off",
    "gmemd-durable": "--persist on --keeper",
    "gmemd-guest": "--persist off --snapshots {directory}/snapshots",
    "gmemd-http": "--persist off --http unix:{directory}/http",
    "gmemd-tenant": f"--persist off --policy {HERE}/tenant.toml --object memory-backend-memfd,id=foreign,size=64M",
}
_SCHEDULED = 2  # CPUCLOCK_SCHED: with a process id, the number of that process's clock, see clock_getcpuclockid(3)
_IDLE = 0.25  # seconds without work, after which a server is idle
_TREES: dict[str, Path] = {}  # of gmemd, by the server's name
_PYTHON = [sys.executable]
_RUNTIME = "/dev/shm"  # for sockets and gmemd's registry: a tmpfs, as /run is


def set_python(python: str) -> None:
    """The Python of gmemd and of a bare asyncio loop."""
    _PYTHON[:] = [python]
    COMMANDS["asyncio"] = f"{python} {HERE}/bare.py {{socket}}"


def steps(python: str) -> dict[str, dict[str, float]]:
    """What the parts of gmemd's commands cost; see steps.py."""
    with on_cpus({SERVER_CPU}):
        done = subprocess.run([python, f"{HERE}/steps.py"], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


class Unavailable(Exception):
    """A server that is not installed or does not start."""


def compile_programs() -> None:
    """Compile the C programs that are missing or older than their source."""
    BINARIES.mkdir(exist_ok=True)
    for source in HERE.glob("*.c"):
        program = BINARIES / source.stem
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run([os.environ.get("CC", "cc"), "-O2", "-Wall", "-o", program, source], check=True)


def set_gmemd(name: str, tree: Path, command: str = "") -> None:
    """Measure the gmemd of a tree, or a command, as gmemd of that name, with all variants of options."""
    command = command or f"{_PYTHON[0]} -m gmemd"
    usage = subprocess.run([*shlex.split(command), "--help"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(tree)}).stdout
    for variant, options in GMEMD_OPTIONS.items():
        for option, value in (("--warm", "off"), ("--snapshots", "{directory}/none")):
            if option not in usage:  # an older one, which loads nothing ahead, and has no snapshots
                options = options.replace(f"{option} {value}", "")
        variant = variant.replace("gmemd", name, 1)
        COMMANDS[variant] = f"{command} --qmp unix:{{socket}} --state-dir {{directory}} --log-level info {options}"
        _TREES[variant] = tree


def go_first(process: str = "self") -> None:
    """Run a process, and its session, at high priority, where that is permitted."""
    with contextlib.suppress(OSError):
        if process == "self":
            os.nice(-20)
        Path(f"/proc/{process}/autogroup").write_text("-20")  # a daemon's own session is a group of its own


@contextlib.contextmanager
def on_cpus(cpus: frozenset[int] | set[int]) -> Iterator[None]:
    """Let processes started inside run on `cpus` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server(Running):
    """One server process, fresh, on its CPU; `with` ends it.

    Its output (gmemd's log) goes to a file. `greeting_ms` is the time from its creation to its greeting.
    """

    def __init__(self, name: str, *, pinned: bool = True, on_disk: bool = False) -> None:
        """`on_disk`: its directory is where temporary files are, and not in memory."""
        command = shlex.split(COMMANDS[name])
        if not shutil.which(command[0]):
            raise Unavailable(f"{command[0]} is not installed")
        start = time.monotonic()
        try:
            with on_cpus({SERVER_CPU} if pinned else EVERY_CPU):
                super().__init__(command, parent=_RUNTIME if os.path.isdir(_RUNTIME) and not on_disk else None,
                                 env=self._environment(name))
        except ConnectionError as exc:
            raise Unavailable(f"{name}: {str(exc).splitlines()[-1]}") from exc
        self.greeting_ms = (time.monotonic() - start) * 1000
        self.name = name
        self.http = f"{self.directory}/http"
        for task in self._tasks():
            go_first(task.name)

    def rss(self) -> int:
        """Resident memory in bytes, with its children's."""
        return sum(int((task / "statm").read_text().split()[1]) for task in self._tasks()
                   if task.name == task.parent.parent.name) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """The CPU time of all its threads, those that have ended too, and its live children's."""
        processes = {task.parent.parent.name for task in self._tasks()}
        return sum(time.clock_gettime(~int(process) << 3 | _SCHEDULED) for process in processes)

    def wait_idle(self) -> None:
        """Wait until the server does nothing of its own accord, such as loading ahead."""
        before = -1.0
        while self.cpu_seconds() - before > _IDLE / 100:
            before = self.cpu_seconds()
            time.sleep(_IDLE)

    def gmemctl(self, *words: str) -> None:
        """Run the gmemctl of the same tree on the client's CPU; its output is dropped."""
        with on_cpus({CLIENT_CPU}):
            done = subprocess.run([_PYTHON[0], "-m", "gmemd.cli.gmemctl", "--socket", self.socket, *words], text=True,
                                  env=self._environment(self.name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            raise Unavailable(f"gmemctl of {self.name}: {done.stderr.strip()}")

    @staticmethod
    def _environment(name: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(_TREES[name])} if name in _TREES else dict(os.environ)

    def _tasks(self) -> Iterator[Path]:
        """The threads of the process and its children, as directories in /proc."""
        waiting = [str(self.process.pid)]
        while waiting:
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                yield task
                with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                    waiting += (task / "children").read_text().split()


class Client:
    """A plain client in this process, for what needs no precise timing."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The value that a command returns."""
        self.send(command, arguments)
        return self.reply()

    def send(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        """Send a command without waiting for the reply."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def reply(self) -> Any:
        """Wait for the next reply; its value."""
        while True:
            message = json.loads(self._lines.readline() or b'{"error": {"desc": "the server went away"}}')
            if "error" in message:
                raise Unavailable(message["error"]["desc"])
            if "return" in message:
                return message["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Scraper(threading.Thread):
    """Asks a server for a path by HTTP 100 times a second; `with` ends it."""

    def __init__(self, server: Server, path: str) -> None:
        super().__init__(daemon=True)
        self._socket, self._path = server.http, path
        self._ending = False
        self.answers = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self._socket)
        while not self._ending:
            connection.request("GET", self._path)
            reply = connection.getresponse()
            if reply.status == 200 and reply.read():
                self.answers += 1
            time.sleep(0.01 - time.monotonic() % 0.01)
        connection.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending = True
        self.join(PATIENCE)


def run_client(server: Server, flags: Sequence[str], lines: Sequence[str] = (), *,
               cpus: frozenset[int] | set[int]) -> dict[str, float]:
    """One run of the C client; what it printed."""
    with on_cpus(cpus):
        done = subprocess.run([BINARIES / "client", *flags, server.socket, *lines], capture_output=True,
                              text=True)
    if done.returncode:
        raise Unavailable(f"{server.name}: {done.stderr.strip() or 'no answer'}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
