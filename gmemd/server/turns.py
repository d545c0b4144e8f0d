"""Whose turn it is: how long a client's requests are carried out before others have theirs.

A client that has sent much is asked now and then whether others wait, which costs 1 us. They do so for a turn at most,
so turns are short while others are seen to wait. Between clients that have all sent much, going from one to the next
would then take a quarter of the time: among these turns stay long. Who has sent MUCH begins after others that wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

TURN_SECONDS: Final = 50e-6  # after that it is the turn of others, if any wait
SHORT_TURN_SECONDS: Final = 10e-6  # the same while others were seen to wait
MUCH: Final = 1024  # bytes that are read at once, some 20 us to parse
SHORT: Final = 4096  # bytes of replies that wait for those of the client's next turn
_CALM: Final = 32  # looks at which nobody waits until nobody is expected to
LONGEST_TURN_SECONDS: Final = 2e-3  # after that it is the turn of others in any case, and replies are sent
CHANGES_SECONDS: Final = 5e-3  # more for changes, which are made durable together; a large batch is many of these


class Turns:
    """The turns of all clients of a loop; `seconds` is how long the next one is.

    `expected` is how many looks for others are still worth while: not 0 if some have been seen to wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.seconds = TURN_SECONDS
        self.expected = 0
        self._unfinished: deque[Callable[[], object]] = deque()  # what goes on later
        self._awaited: Callable[[int], bool] = getattr(loop, "awaited", lambda fd: True)
        self._after_readers: Callable[[Callable[[], object]], object] = getattr(
            loop, "call_after_readers", lambda callback: loop.call_soon(loop.call_soon, callback))

    def is_over(self, fd: int) -> bool:
        """Whether others wait, at other descriptors than `fd`."""
        waiting = self._awaited(fd)
        if waiting:
            self.expected = _CALM
        elif self.expected:
            self.expected -= 1
        self.seconds = SHORT_TURN_SECONDS if self.expected and not self._unfinished else TURN_SECONDS
        return waiting

    def go_on(self, unfinished: Callable[[], object]) -> None:
        """Call it after others that wait by then."""
        self._unfinished.append(unfinished)
        self._after_readers(self._next)

    def _next(self) -> None:
        self._unfinished.popleft()()
