"""A VMM that speaks QMP as a test says: it answers what it is told to, dies, is silent, stops half way, or lies."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}
OK: dict[str, Any] = {}


class Events(bytes):
    """Lines to be sent before an empty answer."""


# A value; an Exception: the error's words; bytes: these and the end; None: silence; a function: its result.
Answer = Any


class FakeVmm:
    """Serves one client after the other at `path`. `answers`: by command; a list is used up and its last repeated."""

    def __init__(self, path: Path, answers: dict[str, Answer]) -> None:
        self.path = str(path)
        self.asked: list[tuple[str, Any]] = []
        self.fds: list[int] = []  # received, and still open
        self._answers = {"qmp_capabilities": OK, "query-status": {"status": "running", "running": True}, **answers}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> FakeVmm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for fd in self.fds:
            os.close(fd)

    def names(self) -> list[str]:
        """The commands so far that a client sent for its own ends."""
        return [name for name, _ in self.asked if name != "qmp_capabilities"]

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                with peer, suppress(OSError):
                    self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        peer.sendall(json.dumps(GREETING).encode() + b"\n")
        buffer = b""
        while True:
            data, fds, _, _ = socket.recv_fds(peer, 1 << 16, 8)
            self.fds += fds
            if not data:
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                self._answer(peer, json.loads(line))

    def _answer(self, peer: socket.socket, request: dict[str, Any]) -> None:
        name, arguments = request["execute"], request.get("arguments")
        self.asked.append((name, arguments))
        answer = self._answers.get(name, Exception(f"The command {name} has not been found"))
        if isinstance(answer, list) and name not in LISTS:
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(arguments)
        if answer is None:
            return
        if isinstance(answer, Events):
            peer.sendall(answer)
            answer = OK
        if isinstance(answer, bytes):
            peer.sendall(answer)
            raise ConnectionError
        reply = {"error": {"class": "GenericError", "desc": str(answer)}} if isinstance(answer, Exception) else {
            "return": answer}
        peer.sendall(json.dumps({**reply, "id": request["id"]}).encode() + b"\n")


LISTS = {"query-memdev", "query-fdsets", "query-memory-devices", "query-pci", "qom-list"}  # their answers are lists
