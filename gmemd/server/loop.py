"""The event loop: asyncio's, imported without what it rarely needs, on a selector that costs less and calls readers.

The selectors of the standard library also take objects with a fileno(), and raise costly exceptions for what they do
not know; asyncio looks up each descriptor before it adds it. Here a descriptor is a number: adding and removing one
takes 6 us instead of 14, once for every client.

asyncio queues the reader of a descriptor that is ready and takes a turn to run it, which costs 2 us a time. Here the
selector calls it, and goes on waiting as long as asyncio has nothing to do. To know that it looks at three attributes
that are asyncio's own (`Loop.private`); where they are gone, asyncio calls the readers.
"""

from __future__ import annotations

import contextlib
import select
from collections import deque
from collections.abc import Callable, Coroutine
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, SelectorKey
from time import monotonic
from typing import Any, ClassVar

from gmemd.server.later import asyncio

_INPUT = int(select.EPOLLIN)
_READABLE = ~select.EPOLLOUT  # hang-ups and errors too: reading or writing shows what they are
_WRITABLE = ~select.EPOLLIN
_ROUNDS = 64  # of readers until it is asyncio's turn in any case, if only to forget the timers that were cancelled
_DAY = 86400.0


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program to its end.

    `Runner.run` would handle SIGINT until the program does; replacing that handler loads inspect, 6 ms, for its repr.
    """
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.get_loop().run_until_complete(main)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, which can also tell a busy task whether others wait."""

    private: ClassVar[tuple[str, ...]] = ("_ready", "_scheduled", "_stopping")
    _ready: deque[asyncio.Handle]  # what is due
    _scheduled: list[asyncio.TimerHandle]  # what is due later, a heap
    _stopping: bool

    def __init__(self) -> None:
        self._descriptors = Selector(self._idle_for, self._failed)
        super().__init__(self._descriptors)
        self._calls_readers = all(hasattr(self, name) for name in self.private)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        """As asyncio's, for descriptors by number; without arguments, the callback is called from the selector."""
        super().add_reader(fd, callback, *args)
        if self._calls_readers and not args:
            self._descriptors.readers[fd] = callback

    def remove_reader(self, fd: int) -> bool:  # type: ignore[override]
        self._descriptors.readers.pop(fd, None)
        return super().remove_reader(fd)

    def call_after_readers(self, callback: Callable[[], object]) -> None:
        """Call it when the readers of all descriptors that are ready by then have been called, one such a time."""
        if self._calls_readers:
            self._descriptors.after.append(callback)
        else:
            self.call_soon(self.call_soon, callback)

    def awaited(self, fd: int) -> bool:
        """Whether there is something to do at any descriptor but `fd`; callbacks that are due do not count."""
        return self._descriptors.any_ready_but(fd)

    def _idle_for(self) -> float | None:
        """For how long asyncio has nothing to do (seconds); None: until something happens at a descriptor."""
        if self._ready or self._stopping:
            return 0
        if not self._scheduled:
            return None
        left = self._scheduled[0].when() - monotonic()
        return left if left < _DAY else _DAY

    def _failed(self, error: Exception) -> None:
        self.call_exception_handler({"message": "Exception in a reader", "exception": error})


class Selector(BaseSelector):
    """epoll(7) of descriptors by number, as asyncio uses it."""

    def __init__(self, idle_for: Callable[[], float | None] = lambda: 0,
                 failed: Callable[[Exception], object] = lambda error: None) -> None:
        """`idle_for`: for how long the loop has nothing to do; `failed` is called with the error of a reader."""
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}
        self._idle_for = idle_for
        self._failed = failed
        self.readers: dict[int, Callable[[], object]] = {}  # of registered descriptors: `select` calls them
        self.after: deque[Callable[[], object]] = deque()  # one is called each time after them

    def register(self, fileobj: int, events: int, data: Any = None) -> SelectorKey:  # type: ignore[override]
        try:
            self._epoll.register(fileobj, _mask(events))
        except FileExistsError:  # `unregister` could not remove it
            self._epoll.modify(fileobj, _mask(events))
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        return key

    def modify(self, fileobj: int, events: int, data: Any = None) -> SelectorKey:  # type: ignore[override]
        self._epoll.modify(fileobj, _mask(events))
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: int) -> SelectorKey:  # type: ignore[override]
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
            if ready:
                break
            timeout = self._idle_for()
            if timeout is not None and timeout <= 0:
                break
        return ready

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

    def get_key(self, fileobj: int) -> SelectorKey:  # type: ignore[override]
        return self._keys[fileobj]

    def get_map(self) -> dict[int, SelectorKey]:  # type: ignore[override]
        return self._keys

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()


def _mask(events: int) -> int:
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)
