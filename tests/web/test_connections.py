"""Room for HTTP connections: who gets in, and who has to make room."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from gmemd.web.connections import CONNECTIONS_MAX, PATIENCE, SLOW_PATIENCE, Connection, Connections


class Transport(asyncio.Transport):
    """One that is never written to, and tells its protocol at once that it has ended."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.unsent = 0
        self.aborted = False
        connection.connection_made(self)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True
        self.connection.connection_lost(None)

    close = abort


class Protocol(asyncio.Protocol):
    """What serves a connection, as far as it matters here."""


class House:
    """Connections, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.connections = Connections(Protocol, lambda: self.now)

    def come(self) -> Transport:
        return Transport(self.connections.admit())

    def is_let_in(self) -> bool:
        return not self.come().aborted

    def serve(self, transport: Transport) -> Any:
        assert isinstance(transport.connection, Connection)
        return self.connections.serving(transport.connection.protocol)


def test_who_waits_longest_makes_room() -> None:
    """A newcomer is refused while everybody was active just now; a request makes a connection young again."""
    house = House()
    made = []
    for _ in range(CONNECTIONS_MAX):
        made.append(house.come())
        house.now += PATIENCE / 1000
    assert not house.is_let_in()
    house.now += PATIENCE
    with house.serve(made[0]):
        pass
    assert house.is_let_in()
    assert [one.aborted for one in made] == [False, True] + [False] * (CONNECTIONS_MAX - 2)


def test_so_many_at_once_and_no_more() -> None:
    """Also when all come before the first of them is connected."""
    house = House()
    admitted = [house.connections.admit() for _ in range(CONNECTIONS_MAX + 10)]
    assert sum(isinstance(one, Connection) for one in admitted) == CONNECTIONS_MAX
    house.now += PATIENCE
    assert not house.is_let_in()


def test_who_is_served_stays() -> None:
    """Unless it does not take its answer, and then for longer than one that waits."""
    house = House()
    made = [house.come() for _ in range(CONNECTIONS_MAX)]
    serving = [contextlib.ExitStack() for _ in made]
    for stack, one in zip(serving, made, strict=True):
        stack.enter_context(house.serve(one))
    house.now += 10 * SLOW_PATIENCE
    assert not house.is_let_in()
    made[3].unsent = 1
    newcomer = house.come()
    assert (made[3].aborted, newcomer.aborted) == (True, False)
    serving[3].enter_context(house.serve(newcomer))
    serving[5].close()
    made[5].unsent = 1  # its answer is made, and not taken
    house.now += PATIENCE
    assert not house.is_let_in()
    house.now += SLOW_PATIENCE
    assert house.is_let_in()
    assert made[5].aborted


def test_who_goes_makes_room() -> None:
    """And is not known any more when its answer ends."""
    house = House()
    made = [house.come() for _ in range(CONNECTIONS_MAX)]
    with house.serve(made[0]):
        made[0].abort()
        assert house.is_let_in()
    assert not house.is_let_in()
    with house.serve(made[0]):
        pass
