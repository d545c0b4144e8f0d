"""HTTP connections, a limited number at a time, so that HTTP cannot use up the descriptors that QMP needs.

When all are in use, a new one replaces the one that has waited longest for a request, or for the rest of one, if that
is PATIENCE or more; or one that has not read its answer for SLOW_PATIENCE.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

CONNECTIONS_MAX: Final = 64
PATIENCE: Final = 2.0  # seconds
SLOW_PATIENCE: Final = 30.0


class Connections:
    """The connections of one server; `make` creates the protocol that serves one, `clock` returns seconds."""

    def __init__(self, make: Callable[[], asyncio.Protocol], clock: Callable[[], float]) -> None:
        self._make = make
        self._clock = clock
        self._open: dict[asyncio.Protocol, Connection] = {}  # by the protocol that serves it

    def admit(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection; one that hangs up if there is no room."""
        if len(self._open) >= CONNECTIONS_MAX:
            now = self._clock()
            waiting = [one for one in self._open.values() if one.has_had_its_time(now)]
            if not waiting:
                return _Refusal()
            self._drop(min(waiting, key=lambda one: one.since))
        protocol = self._make()
        connection = self._open[protocol] = Connection(protocol, self._clock(), lambda: self._open.pop(protocol, None))
        return connection

    def _drop(self, connection: Connection) -> None:
        del self._open[connection.protocol]
        assert connection.transport is not None
        connection.transport.abort()

    @contextlib.contextmanager
    def serving(self, protocol: asyncio.Protocol) -> Iterator[None]:
        """Mark a connection as busy while a request is being answered."""
        connection = self._open.get(protocol)
        if connection is None:  # it has closed
            yield
            return
        connection.serving, connection.since = True, self._clock()
        try:
            yield
        finally:
            connection.serving, connection.since = False, self._clock()


class Connection(asyncio.Protocol):
    """One connection: its protocol handles what happens to it."""

    def __init__(self, protocol: asyncio.Protocol, now: float, lost: Callable[[], object]) -> None:
        self.protocol = protocol
        self.transport: asyncio.Transport | None = None
        self.since = now  # when it was opened, or its last request began or ended
        self.serving = False
        self._lost = lost
        self.data_received = protocol.data_received  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()
        self.protocol.connection_lost(exc)

    def has_had_its_time(self, now: float) -> bool:
        """Whether it may be closed for another connection."""
        unsent = self.transport.get_write_buffer_size() if self.transport is not None else 0
        if self.serving or unsent:
            return unsent > 0 and now - self.since >= SLOW_PATIENCE
        return self.transport is not None and now - self.since >= PATIENCE


class _Refusal(asyncio.Protocol):
    """Hangs up at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
