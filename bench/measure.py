"""The ways of measuring: each takes a fresh server's name and gives one `Sample`.

A measure is made by a function here from what `rows.py` says, e.g. `asking(PING, rounds=10000)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servers import (
    BINARIES,
    CLIENT_CPU,
    EVERY_CPU,
    SERVER_CPU,
    Client,
    Scraper,
    Server,
    Unavailable,
    on_cpus,
    run_client,
)

GIB = 1 << 30
_SIZE = 4 * GIB  # of what is preallocated
_SCRAPES = 50  # a second, at least; 100 are wanted
_PING = '{"execute":"query-version"}'


@dataclass(frozen=True)
class Sample:
    """One measurement; `value` in the row's unit."""

    value: float
    client_share: float | None = None  # of the wall time that the client computed
    server_us: float | None = None  # CPU time of the server for a reply


Measure = Callable[[str, float], Sample]  # (server's name, scale: the part of the rounds that is wanted)


def asking(lines: Sequence[str], *, rounds: int, depth: int = 0, each: bool = False, same_core: bool = False,
           fill: int = 0, fill_line: str = "", key: str = "p50", divisor: float = 1,
           refused: bool = False) -> Measure:
    """Send `lines` round after round; the sample is `key` of what the C client prints, over `divisor`.

    With `depth` 0 each reply is waited for; with `each`, those to all repetitions of one line. With `same_core`
    client and server share a CPU, which leaves out how long a sleeping CPU takes to wake up; else the client has a
    CPU of its own, and polls while it waits for single replies. `fill` times `fill_line` goes before. `refused`:
    errors are wanted.
    """
    cpu = SERVER_CPU if same_core else CLIENT_CPU
    slow_peers = ("qemu", "qsd")

    def measure(name: str, scale: float) -> Sample:
        count = max(20, int(rounds * scale * (0.1 if name in slow_peers else 1)))
        flags = ["-n", str(count), "-w", str(count // 10), "-d", str(depth), "-t", "20"]
        if each:
            flags.append("-e")
        if not (depth or same_core):
            flags.append("-s")
        with Server(name) as server:
            if fill:
                run_client(server, ["-n", "1", "-g", str(fill), "-a", fill_line], [_PING], cpus={CLIENT_CPU})
            server.wait_idle()
            before = server.cpu_seconds()
            result = run_client(server, flags, lines, cpus={cpu})
            used = server.cpu_seconds() - before
        if bool(result["errors"]) != refused:
            raise Unavailable(f"{name}: {result['errors']} of {result['replies']} replies are errors")
        replies = result["replies"] * (1 + 1 / 10)  # the warm-up is in the server's CPU time, too
        return Sample(result[key] / divisor, result["cpu"] / result["wall"], used / replies * 1e6)

    return measure


def crowded(clients: int, *, share: bool = False) -> Measure:
    """Pings answered a second to so many clients, each waiting for each; with `share`: the least of one by the most."""

    def measure(name: str, scale: float) -> Sample:
        command = [BINARIES / "client", "-n", "100000000", "-t", str(max(0.5, 3 * scale))]
        with Server(name) as server:
            server.wait_idle()
            with on_cpus({CLIENT_CPU}):
                running = [subprocess.Popen([*command, server.socket, _PING], stdout=subprocess.PIPE, text=True)
                           for _ in range(clients)]
            ended = [json.loads(client.communicate()[0]) for client in running]
        rates = [result["replies"] / result["wall"] for result in ended]
        return Sample(min(rates) / max(rates) if share else sum(rates))

    return measure


def connecting(*, rounds: int) -> Measure:
    """Connect, read the greeting, negotiate, close; microseconds."""

    def measure(name: str, scale: float) -> Sample:
        count = max(20, int(rounds * scale))
        with Server(name) as server:
            server.wait_idle()
            result = run_client(server, ["-c", "-n", str(count), "-w", str(count // 10)], cpus={CLIENT_CPU})
        return Sample(result["p50"], result["cpu"] / result["wall"])

    return measure


def starting() -> Measure:
    """From the process's creation to its greeting; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            return Sample(server.greeting_ms)

    return measure


def idle_memory() -> Measure:
    """Resident memory of a server that has answered one client; MiB."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            client = Client(server.socket)
            client.ask("query-version")
            client.close()
            server.wait_idle()
            return Sample(server.rss() / 2**20)

    return measure


def memory_per_object(add: str, first: Sequence[str], *, count: int) -> Measure:
    """Growth of resident memory by `count` objects, for each; KiB. `first` are commands that go before."""

    def measure(name: str, scale: float) -> Sample:
        number = max(1000, int(count * scale))
        with Server(name) as server:
            run_client(server, ["-n", "100"], first, cpus={CLIENT_CPU})
            before = server.rss()
            run_client(server, ["-n", "1", "-g", str(number), "-a", add], [_PING], cpus={CLIENT_CPU})
            return Sample((server.rss() - before) / number / 1024)

    return measure


def memory_per_client(*, count: int) -> Measure:
    """Growth of resident memory by `count` negotiated, idle clients, for each; KiB."""

    def measure(name: str, scale: float) -> Sample:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        with Server(name) as server:
            clients = [Client(server.socket)]
            before = server.rss()
            clients += [Client(server.socket) for _ in range(count)]
            grown = server.rss() - before
            for client in clients:
                client.close()
        return Sample(grown / count / 1024)

    return measure


def disturbed_ping(*, preallocates: bool = False, floods: bool = False) -> Measure:
    """p99 of a ping while another client preallocates and a third floods; microseconds.

    The server is not pinned: its threads need the CPUs that there are.
    """

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            server.wait_idle()
            flood, allocator = None, None
            if floods:
                with on_cpus({CLIENT_CPU}):
                    flood = subprocess.Popen([BINARIES / "client", "-n", "100000000", "-t", "2", "-d", "64",
                                              server.socket, _PING], stdout=subprocess.DEVNULL)
            if preallocates:
                allocator = Client(server.socket)
                allocator.send("object-add", _preallocated("memory-backend-memfd", {"share": True}, 1))
            time.sleep(0.05)
            result = run_client(server, ["-n", "100000", "-t", "0.5"], [_PING], cpus={CLIENT_CPU})
            if allocator is not None:
                allocator.reply()
                allocator.close()
            if flood is not None:
                flood.terminate()
                flood.wait()
        return Sample(result["p99"])

    return measure


def scraped_ping(path: str = "", *, fill: int, fill_line: str) -> Measure:
    """p99 of a ping while somebody asks for `path` by HTTP 100 times a second ("": nobody does); microseconds.

    `fill` times `fill_line` goes before. The server is not pinned, for it measures its objects in threads.
    """

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            run_client(server, ["-n", "1", "-g", str(fill), "-a", fill_line], [_PING], cpus={CLIENT_CPU})
            with Scraper(server, path) if path else contextlib.nullcontext() as scraper:
                result = run_client(server, ["-n", "1000000", "-t", str(max(1, 5 * scale))], [_PING], cpus={CLIENT_CPU})
        if scraper is not None and scraper.answers < _SCRAPES * result["wall"]:
            raise Unavailable(f"{name}: only {scraper.answers} answers by HTTP")
        return Sample(result["p99"])

    return measure


def preallocating(qom_type: str, properties: dict[str, object], *, threads: int) -> Measure:
    """Rate of an object-add that allocates 4 GiB with `threads` threads; GiB a second."""

    def measure(name: str, scale: float) -> Sample:
        arguments = _preallocated(qom_type, properties, threads)
        with Server(name, pinned=False) as server:
            client = Client(server.socket)
            start = time.monotonic()
            client.ask("object-add", arguments)
            taken = time.monotonic() - start
            client.close()
        return Sample(_SIZE / GIB / taken)

    return measure


def _preallocated(qom_type: str, properties: dict[str, object], threads: int) -> dict[str, object]:
    return {"qom-type": qom_type, "id": "big", "size": _SIZE, "prealloc": True, "prealloc-threads": threads,
            **properties}


# ioctls and flags of include/uapi/linux/kvm.h; struct kvm_create_guest_memfd is u64 size, flags, reserved[6]
_KVM_CREATE_VM, _KVM_CREATE_GUEST_MEMFD = 0xAE01, 0xC040AED4
_MMAP_INIT_SHARED = 0x3
_FALLOC_FL_KEEP_SIZE = 1


def raw_allocation(kind: str, *, threads: int) -> Measure:
    """Rate at which fallocate(2) in `threads` threads fills 4 GiB of a memfd or guest_memfd; GiB a second."""

    def measure(name: str, scale: float) -> Sample:
        fds = _new_guest_memfd(_SIZE) if kind == "guest-memfd" else [os.memfd_create("bench")]
        try:
            if kind == "memfd":
                os.ftruncate(fds[0], _SIZE)
            return Sample(_SIZE / GIB / _fallocate(fds[0], _SIZE, threads))
        finally:
            for fd in fds:
                os.close(fd)

    return measure


def _new_guest_memfd(size: int) -> list[int]:
    """A guest_memfd and the VM that it belongs to."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
        os.close(kvm)
        request = size.to_bytes(8, "little") + _MMAP_INIT_SHARED.to_bytes(8, "little") + bytes(48)
        return [fcntl.ioctl(vm, _KVM_CREATE_GUEST_MEMFD, bytearray(request)), vm]
    except OSError as exc:
        raise Unavailable(f"no guest_memfd: {exc}") from exc


def _fallocate(fd: int, size: int, threads: int) -> float:
    """Seconds that it takes, each thread having an equal part."""
    libc = ctypes.CDLL(None, use_errno=True)
    part = size // threads

    def work(offset: int) -> None:
        libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(part))

    with on_cpus(EVERY_CPU):
        workers = [threading.Thread(target=work, args=(number * part,)) for number in range(threads)]
        start = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.monotonic() - start
