"""Measures of snapshots: gmemd's worker process against QEMU's own saving and loading of the same memory.

The memory has 4 GiB, of which 1 GiB is populated in rows of 2 MiB: a tenth of the pages zeros, of the others one half
text and one half random. gmemd writes a digest of each block and waits until all is on the disk; QEMU does neither. The
worker's figures begin with the start of its process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from measure import GIB, Measure, Sample
from servers import Client, Server, Unavailable

from gmemd.client.client import Client as Qmp
from gmemd.kernel import residency
from gmemd.kernel.linux import LinuxKernel, Unsupported
from gmemd.kernel.program import worker_program
from gmemd.kernel.rules import PAGE_SIZE

_SIZE: Final = 4 * GIB
_ROW: Final = 2 << 20  # bytes
_PATIENCE: Final = 120.0  # seconds
_MEMBERS: Final = {"object": {"id": "m", "qom-type": "memory-backend-memfd"},
                   "consistency": {"via": "idle", "consistent": True}}


class Usage:
    """What a piece of work took: seconds of CPU, seconds, and the most memory of its process in bytes."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.peak = 0


def _row(chance: random.Random) -> bytes:
    """2 MiB of memory as guests have it."""
    pages = [bytes(PAGE_SIZE) if kind < 0.1 else b"The quick brown fox. " * 195 + bytes(1) if kind < 0.55
             else chance.randbytes(PAGE_SIZE) for kind in [chance.random() for _ in range(_ROW // PAGE_SIZE)]]
    return b"".join(page[:PAGE_SIZE].ljust(PAGE_SIZE, b"x") for page in pages)


@contextlib.contextmanager
def _memory(scale: float = 0.0) -> Iterator[int]:
    """A memfd of the size; with a scale, with that part of 1 GiB in it."""
    fd, chance = os.memfd_create("bench", os.MFD_CLOEXEC), random.Random(1)
    try:
        os.ftruncate(fd, _SIZE)
        rows = [_row(chance) for _ in range(8)]
        for number in chance.sample(range(_SIZE // _ROW), int(scale * GIB) // _ROW):
            os.pwrite(fd, rows[number % len(rows)], number * _ROW)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _root() -> Iterator[tuple[str, int]]:
    """A folder on the disk, and its descriptor."""
    with tempfile.TemporaryDirectory() as place:
        fd = os.open(place, os.O_RDONLY)
        try:
            yield place, fd
        finally:
            os.close(fd)


def _work(verb: str, root: int, fd: int, told: list[dict[str, Any]], **spec: Any) -> Usage:
    """Let a worker do something with the memory of a memfd, to its end."""
    program, usage, begun = worker_program(), Usage(), time.monotonic()
    words = json.dumps({"root": root, "id": "m", "size": _SIZE, "memory": {"fd": fd}, **spec})
    worker = subprocess.Popen([*program.command, verb, words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              pass_fds=(root, fd, *program.fds))
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(program.text)
    for line in worker.stdout:
        message = json.loads(line)
        if "error" in message or "errno" in message:
            raise Unavailable(f"{verb}: {message}")
        if {"ready", "passed", "end"} & message.keys():
            usage.peak = _peak(worker.pid) or usage.peak
        if {"ready", "passed"} & message.keys():
            worker.stdin.write(json.dumps(told.pop(0)).encode() + b"\n")
            worker.stdin.flush()
    usage.wall = time.monotonic() - begun
    _, worker.returncode, used = os.wait4(worker.pid, 0)
    usage.cpu = used.ru_utime + used.ru_stime
    return usage


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def _save(root: int, fd: int, name: str, dirty: list[list[int]] | None = None, **spec: Any) -> Usage:
    return _work("save", root, fd, [{"pass": {"dirty": dirty}}, {"finish": dict(_MEMBERS)}], name=name, **spec)


# -- QEMU ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _qemu(fd: int, *more: str) -> Iterator[tuple[Qmp, subprocess.Popen[bytes]]]:
    """A stopped QEMU whose RAM is a memfd."""
    with tempfile.TemporaryDirectory() as place:
        socket = f"{place}/qmp"
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-m", "4G",
                   "-object", f"memory-backend-file,id=ram,size=4G,share=on,mem-path=/proc/self/fd/{fd}", "-machine",
                   "pc-q35-7.2,memory-backend=ram", "-qmp", f"unix:{socket},server=on,wait=off", *more]
        try:
            qemu = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise Unavailable("qemu-system-x86_64 is not installed") from None
        try:
            with Qmp(socket, wait=_PATIENCE, timeout=_PATIENCE) as qmp:
                qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
                yield qmp, qemu
        finally:
            qemu.kill()
            qemu.wait()


def _migrated(qmp: Qmp, qemu: subprocess.Popen[bytes], command: str, uri: str) -> Usage:
    """What it takes until a migration is over; QEMU's CPU time without that of the program at the other end."""
    usage, before, begun = Usage(), _cpu(qemu.pid), time.monotonic()
    qmp.execute(command, {"uri": uri})
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled"):
            raise Unavailable(f"QEMU's migration has {status}")
        time.sleep(0.002)
    usage.wall, usage.cpu = time.monotonic() - begun, _cpu(qemu.pid) - before
    return usage


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the measures --------------------------------------------------------------------------------------

def saving(what: str) -> Measure:
    """A save: "cpu" or "wall" in seconds, or "memory": MiB that it adds, in the worker and in the object."""

    def measure(name: str, scale: float) -> Sample:
        with _memory(scale) as fd, _root() as (_, root):
            before = os.fstat(fd).st_blocks
            usage = _save(root, fd, "s")
            return _sample(usage, what, os.fstat(fd).st_blocks - before)

    return measure


def saving_by_qemu(what: str) -> Measure:
    """The same by QEMU's `migrate` to a file, while it is stopped."""

    def measure(name: str, scale: float) -> Sample:
        with _memory(scale) as fd, _qemu(fd) as (qmp, qemu), _root() as (place, _):
            before = os.fstat(fd).st_blocks
            usage = _migrated(qmp, qemu, "migrate", f"exec:cat >{place}/file")
            return _sample(usage, what, os.fstat(fd).st_blocks - before)

    return measure


def _sample(usage: Usage, what: str, blocks: int) -> Sample:
    return Sample({"cpu": usage.cpu, "wall": usage.wall, "memory": (usage.peak + blocks * 512) / (1 << 20)}[what])


def increment(*, tracked: bool) -> Measure:
    """Seconds for the increment after 64 scattered pages have changed: found by hash, or known."""

    def measure(name: str, scale: float) -> Sample:
        with _memory(scale) as fd, _root() as (_, root):
            _save(root, fd, "s")
            present, chance = [at for at, _ in residency.data_ranges(fd, 0, _SIZE)], random.Random(2)
            places = sorted(chance.choice(present) for _ in range(64))
            for at in places:
                os.pwrite(fd, b"changed", at)
            dirty = [[at, PAGE_SIZE] for at in sorted(set(places))] if tracked else None
            return Sample(_save(root, fd, "t", dirty, parent="s").wall)

    return measure


def restoring() -> Measure:
    """Seconds for a restore of it, with every block checked."""

    def measure(name: str, scale: float) -> Sample:
        with _memory(scale) as fd, _memory() as target, _root() as (_, root):
            _save(root, fd, "s")
            return Sample(_work("restore", root, target, [], name="s").wall)

    return measure


def loading_by_qemu() -> Measure:
    """Seconds for QEMU's loading of the same, from its own file."""

    def measure(name: str, scale: float) -> Sample:
        with _root() as (place, _):
            with _memory(scale) as fd, _qemu(fd) as (qmp, qemu):
                _migrated(qmp, qemu, "migrate", f"exec:cat >{place}/file")
            with _memory() as fd, _qemu(fd, "-incoming", "defer") as (qmp, qemu):
                return Sample(_migrated(qmp, qemu, "migrate-incoming", f"exec:cat {place}/file").wall)

    return measure


def finding(*, bisecting: bool = False) -> Measure:
    """Milliseconds to find 262,144 scattered pages of a real guest_memfd; or as before, by halves with cachestat."""

    def measure(name: str, scale: float) -> Sample:
        try:
            kernel = LinuxKernel()
        except Unsupported as exc:
            raise Unavailable(str(exc)) from None
        fd = kernel.create_guest_memfd(_SIZE, 3)
        try:
            step = _SIZE // max(1, int(262144 * scale))
            with mmap.mmap(fd, _SIZE) as memory:
                for at in range(0, _SIZE, max(step, 2 * PAGE_SIZE)):
                    memory[at] = 1
            begun = time.monotonic()
            found = _halved(fd) if bisecting else residency.data_ranges(fd, 0, _SIZE)
            taken = time.monotonic() - begun
            assert sum(count for _, count in found) == residency.resident(fd)
            return Sample(taken * 1000)
        finally:
            os.close(fd)
            kernel.close()

    return measure


def _halved(fd: int) -> list[tuple[int, int]]:
    """The resident ranges, by counting halves of halves."""
    found: list[tuple[int, int]] = []
    todo = [(0, _SIZE, residency.resident(fd, 0, _SIZE))]
    while todo:
        start, length, count = todo.pop()
        if count == length:
            found.append((start, length))
        elif count:
            half = length // PAGE_SIZE // 2 * PAGE_SIZE
            left = residency.resident(fd, start, half)
            todo += [(start + half, length - half, count - left), (start, half, left)]
    return found


def cloning(*, copy: bool) -> Measure:
    """Milliseconds until a clone of a template with 1 GiB in it is there, or a copy of it."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            client = Client(server.socket)
            try:
                size = int(scale * GIB) // _ROW * _ROW
                client.ask("object-add", {"qom-type": "memory-backend-memfd", "id": "t", "size": size, "share": True,
                                          "prealloc": True})
                client.ask("memdev-freeze", {"id": "t"})
                begun = time.monotonic()
                client.ask("memdev-clone", {"template": "t", "id": "c", "copy": copy})
                return Sample((time.monotonic() - begun) * 1000)
            finally:
                client.close()

    return measure
