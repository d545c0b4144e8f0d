"""Room for large messages that are still incomplete.

QEMU accepts messages of up to 64 MiB, and so does gmemd; but the half-sent messages of many clients would add up. So
beyond LARGE one client at a time has the room and is read; the others wait in line, unread. While others wait, it must
make progress: it is disconnected when it sends nothing for SILENT_SECONDS, or has had the room for LONGEST_SECONDS.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

LARGE: Final = 1 << 20  # weight of a message: its bytes, and what its tokens take
SILENT_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 60.0


class Sender(Protocol):
    """A client that sends a large message."""

    def go_on(self) -> None:
        """Called when it has the room."""

    def close(self) -> None:
        """Called to disconnect it."""


class Room:
    """The sender that has the room, and those that wait for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._holder: Sender | None = None
        self._line: deque[Sender] = deque()
        self._since = 0.0  # when the holder entered
        self._moved = 0.0  # when it last made progress, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None  # runs while others wait

    def enter(self, sender: Sender) -> bool:
        """Whether the sender has the room; if not, it is in line from now on."""
        now = self._loop.time()
        if self._holder is None:
            self._holder, self._since = sender, now
        if self._holder is sender:
            self._moved = now
            return True
        if sender not in self._line:
            self._line.append(sender)
            if self._timer is None:
                self._timer = self._loop.call_later(SILENT_SECONDS, self._look)
        return False

    def leave(self, sender: Sender) -> None:
        """Give the room to the next, or leave the line."""
        if self._holder is not sender:
            if sender in self._line:
                self._line.remove(sender)
            return
        self._holder = None
        if self._line:
            following = self._line.popleft()
            self.enter(following)
            following.go_on()

    def _look(self) -> None:
        """Disconnect a holder that makes no progress while others wait."""
        self._timer = None
        if not self._line:
            return
        now, holder = self._loop.time(), self._holder
        if holder is not None and (now - self._moved >= SILENT_SECONDS or now - self._since >= LONGEST_SECONDS):
            holder.close()
        if self._line:
            self._timer = self._loop.call_later(SILENT_SECONDS / 4, self._look)
