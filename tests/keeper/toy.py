"""The smallest daemon that keeps memory: JSON lines on the socket handed down, one client at a time.

It prints "ready PID" when it serves, and stops for SIGTERM.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from gmemd.errors import QmpError
from gmemd.persist import notify
from gmemd.persist.custody import Custody
from gmemd.persist.fdstore import FdStore
from gmemd.persist.record import Record
from gmemd.persist.registry import Registry
from gmemd.persist.waits import NotKept

WAITED_FOR = {signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


class Toy:
    """Commands are methods."""

    def __init__(self, registry: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
        self.environ = {
            key: value for key, value in os.environ.items() if key.startswith(("LISTEN", "WATCHDOG", "FDSTORE"))
        }
        self.opened = sorted(os.listdir("/proc/self/fd"), key=int)
        notifier = notify.Notifier.from_environ(os.environ)
        assert notifier is not None
        self.notifier = notifier
        self.watchdog_seconds = notify.watchdog_seconds(os.environ)
        fds = notify.listen_fds(os.environ)
        store = FdStore(notify.store_limit(os.environ))
        self.custody = Custody(Registry(registry), notifier, store)
        restored = self.custody.restore(fds)
        self.objects = {record.id: (record, fd) for record, fd in restored.objects}
        self.custody.flush_blocking()
        self.leaving: dict[str, tuple[Record, int]] = {}
        self.unclaimed = [name for name, _ in restored.unclaimed]
        [(_, listener)] = restored.sockets
        self.listener = socket.socket(fileno=listener)
        self.hung = threading.Event()

    def serve(self) -> None:
        self.notifier.ready("ready")
        print("ready", os.getpid(), flush=True)
        if self.watchdog_seconds:
            threading.Thread(target=self.feed, args=(self.watchdog_seconds / 3,), daemon=True).start()
        while True:
            connection, _ = self.listener.accept()
            with connection, connection.makefile("rw") as lines:
                for line in lines:
                    request = json.loads(line)
                    try:
                        answer = getattr(self, request.pop("do"))(**request)
                    except QmpError as exc:
                        answer = {"error": exc.desc}
                    except OSError as exc:
                        answer = {"error": exc.strerror}
                    print(json.dumps(answer), file=lines, flush=True)

    def feed(self, seconds: float) -> None:
        while not self.hung.wait(seconds):
            self.notifier.watchdog()

    def info(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(), "environ": self.environ, "fds": self.opened, "objects": list(self.objects),
            "unclaimed": self.unclaimed, "session": os.getsid(0), "watchdog": self.watchdog_seconds,
        }  # fmt: skip

    def add(self, id: str, text: str = "", count: int = 1) -> None:
        for number in range(count):
            self.custody.reserve()
            fd = os.memfd_create("toy")
            os.truncate(fd, 4096)
            os.pwrite(fd, text.encode(), 0)
            id_ = f"{id}{number}" if count > 1 else id
            record = Record(id_, "memory-backend-memfd", {"size": 4096}, "memfd", 4096)
            self.custody.add(record, fd)
            self.objects[id_] = (record, fd)
        self.flush()

    def remove(self, id: str) -> None:
        record, fd = self.objects.pop(id)
        self.custody.remove(record)
        self.leaving[id] = (record, fd)
        self.flush()
        os.close(self.leaving.pop(id)[1])

    def flush(self) -> None:
        """Make it durable, or undo it."""
        try:
            self.custody.flush_blocking()
        except NotKept as exc:
            for operation in exc.undone:
                if operation.kind == "add":
                    os.close(self.objects.pop(operation.record.id)[1])
                else:
                    self.objects[operation.record.id] = self.leaving.pop(operation.record.id)
            raise

    def read(self, id: str) -> str:
        with mmap.mmap(self.objects[id][1], 4096, prot=mmap.PROT_READ) as memory:
            return memory[:].rstrip(b"\0").decode()

    def notify(self, text: str, memory: int = 0) -> None:
        """Send anything, with fresh memfds, and wait until it was looked at."""
        fds = [os.memfd_create("toy") for _ in range(memory)]
        self.notifier.notify(text, fds)
        for fd in fds:
            os.close(fd)
        self.barrier()

    def barrier(self) -> None:
        reader = self.notifier.barrier()
        select.select([reader], [], [])
        self.notifier.abandon(reader)

    def store_names(self, length: int, count: int) -> None:
        """Keep one memfd each under long names, without the checks that a real daemon makes."""
        for number in range(count):
            fd = os.memfd_create("toy")
            poll = select.poll()
            poll.register(self.notifier, select.POLLOUT)
            poll.poll()
            self.notifier.store([f"{number:0{length}}"], [fd])
            os.close(fd)
        self.barrier()

    def exit(self, status: int) -> None:
        os._exit(status)

    def hang(self) -> None:
        self.hung.set()
        time.sleep(1e6)

    def wait_signal(self) -> int:
        return signal.sigwait(WAITED_FOR)

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def child_notifies(self, text: str) -> None:
        """A child of the daemon sends a message."""
        child = os.fork()
        if child == 0:
            self.notifier.notify(text)
            os._exit(0)
        os.waitpid(child, 0)
        self.barrier()

    def worker(self) -> int:
        """Start a process that runs forever; its pid."""
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.hang()
        return pid

    def orphan(self) -> int:
        """Make a process whose parent is gone, and let it die; its pid."""
        told, tell = os.pipe()
        go, let_go = os.pipe()
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild != 0:
                os.write(tell, str(grandchild).encode())
                os._exit(0)
            os.close(let_go)
            os.read(go, 1)
            os._exit(0)
        os.waitpid(child, 0)
        pid = int(os.read(told, 20))
        dead = os.pidfd_open(pid)
        os.close(let_go)
        select.select([dead], [], [])
        for fd in (told, tell, go, dead):
            os.close(fd)
        while os.path.exists(f"/proc/{pid}"):  # until it is reaped; each round trip lets the keeper go round
            self.barrier()
        return pid


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    how = sys.argv[2] if len(sys.argv) > 2 else ""
    if how == "never-ready":
        time.sleep(1e6)
    if how.isdecimal():
        sys.exit(int(how))
    Toy(sys.argv[1]).serve()


if __name__ == "__main__":
    main()
