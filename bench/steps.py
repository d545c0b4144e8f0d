"""What the parts of a command cost in a warm process: where the time of the missed targets goes.

usage: steps.py        prints a JSON object: measure -> step -> microseconds, the least of many

Each step is run alone and in a loop, so the processor's caches are warm. In a server that waits for each
request they are not, and every step takes one and a half to two times as long.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import timeit
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from gmemd.authority.rights import ALL
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.observe.log import ClientLog, Log
from gmemd.persist.notify import Notifier
from gmemd.persist.record import Record, row_of
from gmemd.persist.registry import Registry
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Schema
from gmemd.server.ledger import Ledger

PING = b'{"execute":"query-version"}\n'
ADD = (b'{"execute":"object-add","arguments":{"qom-type":"memory-backend-memfd","id":"m0","size":67108864,'
       b'"share":true}}\n')
DEL = b'{"execute":"object-del","arguments":{"id":"m0"}}\n'
UNKNOWN = ADD.replace(b'"share"', b'"colour"')
WRONG = b'{"execute":"object-add","arguments":{"qom-type":"memory-backend-memfd","id":"m","size":"x"}}\n'
BAD = b'{"execute": "query-version", }\n'
SIZE = 64 << 20
_RUNS, _ROUNDS = 300, 200

Steps = dict[str, float]


def least(step: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Microseconds a call."""
    return round(min(timeit.repeat(step, number=rounds, repeat=_RUNS)) / rounds * 1e6, 2)


class Server:
    """gmemd without its loop, and one client's connection."""

    pid, uid = os.getpid(), os.getuid()

    def __init__(self) -> None:
        self.gmemd = Gmemd(schema=Schema.load(), kernel=choose_kernel("auto"),
                           version={"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "gmemd"}, host=self)
        self.room, self.budget = self.gmemd, None
        self.dispatcher = Dispatcher(self.gmemd)
        self.rights = ALL
        self.usable = self.dispatcher.usable(ALL)
        self.session = Session(self.gmemd.version)
        self.session.negotiate([])
        self.ledger = Ledger(self.gmemd, self.session, self.uid, self.pid)
        self.ledger._log = ClientLog(Log(lambda data: None), {"monitor": 1, "uid": 0, "pid": 1})

    def emit(self, name: str, data: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...

    def is_gone(self) -> bool:
        return False

    def take_fd(self) -> int:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")

    def parse(self, line: bytes) -> Request:
        self.session.feed(line)
        request = self.session.next_request()
        assert request is not None
        self.session.next_request()
        return request

    def run(self, request: Request) -> Any:
        try:
            return self.dispatcher.run(request, self.session, self)
        except QmpError as exc:
            return exc

    def answer(self, request: Request, result: Any) -> bytes:
        """Encode, count and log, as a monitor does."""
        error = result if isinstance(result, QmpError) else None
        reply = self.session.success(request, result) if error is None else self.session.failure(request, error)
        self.ledger.answered(request, error)
        return reply


def of_messages(server: Server) -> dict[str, Steps]:
    """The way of messages from their bytes to those of the reply."""
    lines = {"ping": PING, "unknown property": UNKNOWN, "wrong type": WRONG, "malformed JSON": BAD}
    return {name: of_message(server, line) for name, line in lines.items()}


def of_message(server: Server, line: bytes) -> Steps:
    request = server.parse(line)
    result = server.run(request) if request.error is None else request.error
    return {
        "receive and send, the system calls alone": of_socket(line, server.answer(request, result)),
        "parse": least(lambda: server.parse(line)),
        "check and carry out": least(lambda: server.run(request)) if request.error is None else 0.0,
        "encode, count, log": least(lambda: server.answer(request, result)),
    }


def of_socket(request: bytes, reply: bytes) -> float:
    client, server = socket.socketpair()
    with client, server:
        def exchange() -> None:
            server.recvmsg(1 << 14, socket.CMSG_SPACE(4 * 253))
            server.send(reply)

        taken = []
        for _ in range(5000):
            client.send(request)
            start = perf_counter()
            exchange()
            taken.append(perf_counter() - start)
            client.recv(1 << 14)
        return round(min(taken) * 1e6, 2)


def of_pair(server: Server) -> Steps:
    """An object-add and object-del that nobody keeps."""
    kernel = server.gmemd.kernel

    def memory() -> None:
        fd = kernel.memfd_create("m0", 3)
        kernel.truncate(fd, SIZE)
        kernel.seal(fd, 6)
        os.close(fd)

    def both() -> None:
        server.run(add)
        server.run(remove)

    add, remove = server.parse(ADD), server.parse(DEL)
    checks = server.gmemd.schema.commands
    everything, check, raw = least(both), least(lambda: (checks["object-add"].check(add.arguments),
                                                         checks["object-del"].check(remove.arguments))), least(memory)
    return {
        "parse both": round(least(lambda: (server.parse(ADD), server.parse(DEL))), 2),
        "check both": check,
        "memfd_create, ftruncate, seals, close: the system calls alone": raw,
        "objects, properties, rules": round(everything - check - raw, 2),
        "encode, count, log both": round(2 * least(lambda: server.answer(add, {})), 2),
    }


def of_keeping() -> Steps:
    """What durability adds to such a pair, apart from waking the keeper and waiting for it."""
    directory = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    registry = Registry(f"{directory}/registry.sqlite")
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"{directory}/notify")
    notifier = Notifier(f"{directory}/notify")
    record = Record("m0", "memory-backend-memfd", Schema.load().check_object(json.loads(ADD)["arguments"]),
                    "memfd", SIZE, kernel="kvm", seq=1, fd_name="m-00000000-1")
    row = row_of(record)
    memory = os.memfd_create("m0")

    def transactions() -> None:
        registry.apply(put=[row], last_seq=1)
        registry.apply(delete=["m0"], removing={"m-00000000-1"}, last_seq=1)

    def drain() -> None:
        _, ancillary, _, _ = receiver.recvmsg(4096, 64)
        for _, _, data in ancillary:
            os.close(int.from_bytes(data[:4], "little"))

    def messages() -> None:
        notifier.store(["m-00000000-1"], [memory])
        drain()
        notifier.remove(["m-00000000-1"])
        drain()
        for _ in range(2):
            os.close(notifier.barrier())
            drain()

    try:
        return {
            "record made a row": least(lambda: row_of(record)),
            "two transactions (SQLite, tmpfs)": least(transactions, 20),
            "four messages (store, remove, two barriers), sent and received": least(messages, 20),
        }
    finally:
        os.close(memory)
        notifier.close()
        receiver.close()
        registry.close()
        shutil.rmtree(directory)


def main() -> None:
    server = Server()
    steps = of_messages(server)
    steps["pair of object-add and object-del"] = of_pair(server)
    steps["the pair durable: in addition"] = of_keeping()
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
