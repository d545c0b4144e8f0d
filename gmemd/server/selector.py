"""The selector under the event loop (loop.py): what asyncio needs of a BaseSelector, by name, so that it compiles."""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from time import monotonic
from typing import Any

_INPUT = int(select.EPOLLIN)
_READABLE = ~select.EPOLLOUT  # hang-ups and errors too: reading or writing shows what they are
_WRITABLE = ~select.EPOLLIN
_ROUNDS = 64  # of readers until it is asyncio's turn in any case, if only to forget the timers that were cancelled
_DAY = 86400.0

# A client that waits for each answer busily has its next request there some microseconds after the reply. To sleep and
# be woken up meanwhile takes longer than to look again, and caches are cold afterwards. So after a request the selector
# looks some times more before it sleeps, as long as that was worth it lately; else it tries that now and then.
_LOOKS = 8
_FAILURES = 4  # in a row, until it is not worth it
_RARELY = 64  # sleeps until the next try


class Selector:
    """epoll(7) of descriptors by number, as asyncio uses it."""

    def __init__(self, loop: Any = None, failed: Callable[[Exception], object] = lambda error: None) -> None:
        """`loop`: asyncio's, which has readers to be called; `failed` is called with the error of one."""
        self._loop = loop
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}
        self._failed = failed
        self.readers: dict[int, Callable[[], object]] = {}  # of registered descriptors: `select` calls them
        self.after: deque[Callable[[], object]] = deque()  # one is called each time after them
        self.tries = 1  # so often it still looks again before it sleeps; negative: so often it does not

    def register(self, fileobj: int, events: int, data: Any = None) -> SelectorKey:
        try:
            self._epoll.register(fileobj, _mask(events))
        except FileExistsError:  # `unregister` could not remove it
            self._epoll.modify(fileobj, _mask(events))
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        return key

    def modify(self, fileobj: int, events: int, data: Any = None) -> SelectorKey:
        self._epoll.modify(fileobj, _mask(events))
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: int) -> SelectorKey:
        key = self._keys.pop(fileobj)
        with contextlib.suppress(OSError):  # it is closed: the kernel has removed it
            self._epoll.unregister(fileobj)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Wait for what is not for a reader here."""
        keys, readers, after, poll = self._keys, self.readers, self.after, self._epoll.poll
        ready: list[tuple[SelectorKey, int]] = []
        for _ in range(_ROUNDS):
            if after or (timeout is not None and timeout < 0):
                timeout = 0
            for fd, events in poll(timeout, len(keys) or 1):
                if events == _INPUT and fd in readers:
                    try:  # `_call` would cost each request
                        readers[fd]()
                    except Exception as exc:
                        self._failed(exc)
                else:
                    self._sort(fd, events, ready)
            if after:
                self._call(after.popleft())
            if ready or not readers:  # without any, it looks at nothing of asyncio's
                break
            timeout = self._idle_for()
            if timeout is not None and timeout <= 0:
                break
            if not after:
                self.look()
        return ready

    def look(self) -> None:
        """Return when something has happened, or it is better to sleep."""
        tries = self.tries
        if tries <= 0:
            self.tries = tries + 1
            return
        poll = self._epoll.poll
        for _ in range(_LOOKS):
            if poll(0, 1):
                self.tries = _FAILURES
                return
        self.tries = tries - 1 if tries > 1 else -_RARELY

    def _idle_for(self) -> float | None:
        """For how long asyncio has nothing to do (seconds); None: until something happens at a descriptor."""
        loop = self._loop
        if loop._ready or loop._stopping:
            return 0
        if not loop._scheduled:
            return None
        left: float = loop._scheduled[0].when() - monotonic()
        return left if left < _DAY else _DAY

    def _sort(self, fd: int, events: int, ready: list[tuple[SelectorKey, int]]) -> None:
        """Call the reader, if there is one, and list what else has happened and is waited for."""
        happened = (EVENT_READ if events & _READABLE else 0) | (EVENT_WRITE if events & _WRITABLE else 0)
        if happened & EVENT_READ and fd in self.readers:
            happened ^= EVENT_READ
            self._call(self.readers[fd])
        if happened and fd in self._keys:  # otherwise another process holds what was closed here
            key = self._keys[fd]
            if happened & key.events:
                ready.append((key, happened & key.events))

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as exc:
            self._failed(exc)

    def any_ready_but(self, fd: int) -> bool:
        """Whether there is any event now at another descriptor."""
        for ready, _ in self._epoll.poll(0, 2):  # noqa: SIM110  # a generator would cost each turn
            if ready != fd:
                return True
        return False

    def get_key(self, fileobj: int) -> SelectorKey:
        return self._keys[fileobj]

    def get_map(self) -> dict[int, SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()


def _mask(events: int) -> int:
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)
