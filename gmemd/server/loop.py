"""The event loop: asyncio's, imported without TLS, on a selector that costs less.

asyncio imports the module ssl if it exists: 12 ms and 4.5 MiB, and nothing here uses TLS. The selectors of the standard
library also take objects with a fileno(), and raise costly exceptions for what they do not know; asyncio looks up each
descriptor before it adds it. Here a descriptor is a number: adding and removing one takes 6 us instead of 14, once for
every client.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Coroutine
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, SelectorKey
from typing import Any

_without_tls = "ssl" not in sys.modules
if _without_tls:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # to the import system: there is none
import asyncio  # noqa: E402  # under these conditions

if _without_tls:
    del sys.modules["ssl"]

_READABLE = ~select.EPOLLOUT  # hang-ups and errors too: reading or writing shows what they are
_WRITABLE = ~select.EPOLLIN


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program to its end."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, which can also tell a busy task whether others wait."""

    def __init__(self) -> None:
        self._descriptors = Selector()
        super().__init__(self._descriptors)

    def awaited(self, fd: int) -> bool:
        """Whether there is something to do at any descriptor but `fd`; callbacks that are due do not count."""
        return self._descriptors.any_ready_but(fd)


class Selector(BaseSelector):
    """epoll(7) of descriptors by number, as asyncio uses it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}

    def register(self, fileobj: int, events: int, data: Any = None) -> SelectorKey:  # type: ignore[override]
        self._epoll.register(fileobj, _mask(events))
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
        keys = self._keys
        if timeout is not None and timeout < 0:
            timeout = 0
        ready = []
        for fd, events in self._epoll.poll(timeout, len(keys) or 1):
            key = keys.get(fd)
            if key is not None:  # otherwise another process holds what was closed here
                ready.append((key, EVENT_READ if events == select.EPOLLIN else _happened(events) & key.events))
        return ready

    def any_ready_but(self, fd: int) -> bool:
        """Whether there is any event now at another descriptor."""
        return any(ready != fd for ready, _ in self._epoll.poll(0, 2))

    def get_key(self, fileobj: int) -> SelectorKey:  # type: ignore[override]
        return self._keys[fileobj]

    def get_map(self) -> dict[int, SelectorKey]:  # type: ignore[override]
        return self._keys

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()


def _happened(events: int) -> int:
    return (EVENT_READ if events & _READABLE else 0) | (EVENT_WRITE if events & _WRITABLE else 0)


def _mask(events: int) -> int:
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)
