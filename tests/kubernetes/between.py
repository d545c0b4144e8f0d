"""What stands between a driver and its gmemd, and counts the driver's messages."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

Told = Callable[[str, int], bool]  # "before" a message or "after" its reply, and its number; whether to break off


class Between:
    """Passes lines on from a socket of its own, one by one; `told` is called for each message."""

    def __init__(self, path: str, beyond: str) -> None:
        self.told: Told = lambda when, number: False
        self.count = 0
        self._beyond = beyond
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(peer,), daemon=True).start()

    def _pass(self, peer: socket.socket) -> None:
        with peer, socket.socket(socket.AF_UNIX) as beyond, suppress(OSError):
            beyond.connect(self._beyond)
            asks, answers = peer.makefile("rb"), beyond.makefile("rb")
            with asks, answers:
                peer.sendall(answers.readline())  # the greeting
                while line := asks.readline():
                    self.count += 1
                    number = self.count
                    if self.told("before", number):
                        return
                    beyond.sendall(line)
                    while (reply := answers.readline()) and reply.startswith(b'{"timestamp"'):
                        pass  # an event
                    if self.told("after", number) or not reply:
                        return
                    peer.sendall(reply)
