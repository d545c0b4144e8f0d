"""The event loop: asyncio's, imported without what it rarely needs, on a selector that costs less and calls readers.

The selectors of the standard library also take objects with a fileno(), and raise costly exceptions for what they do
not know; asyncio looks up each descriptor before it adds it. Here a descriptor is a number: adding and removing one
takes 6 us instead of 14, once for every client.

asyncio queues the reader of a descriptor that is ready and takes a turn to run it, which costs 2 us a time. Here the
selector (selector.py) calls it, and goes on waiting as long as asyncio has nothing to do. To know that it looks at
three attributes that are asyncio's own (`Loop.private`); where they are gone, asyncio calls the readers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, cast

from gmemd.server.later import asyncio
from gmemd.server.selector import Selector


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
        self._descriptors = Selector(self, self._failed)
        super().__init__(cast(Any, self._descriptors))  # not a BaseSelector, which could not be compiled
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

    def _failed(self, error: Exception) -> None:
        self.call_exception_handler({"message": "Exception in a reader", "exception": error})
