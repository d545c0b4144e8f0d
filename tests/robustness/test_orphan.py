"""The keeper is killed: the daemon goes on with the memory that it alone holds now, and hides nothing."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.robustness.scenarios import add, change, delete
from tests.robustness.world import PATIENCE, World, look, write_pattern


@pytest.fixture
def orphan() -> Iterator[Client]:
    """A client of a daemon with the objects x and y, whose keeper has just been killed."""
    with World() as world:
        daemon = os.pidfd_open(world.daemon())
        with world.client() as client:
            for object_id in ("x", "y"):
                client.execute(*add("memfd", object_id))
                write_pattern(client, object_id)
            before = look(client)
            world.process.kill()
            world.process.wait()
            assert before == look(client)
            yield client
        signal.pidfd_send_signal(daemon, signal.SIGTERM)
        ended = select.select([daemon], [], [], PATIENCE)[0]
        os.close(daemon)
        assert ended


def test_nothing_is_acknowledged_that_nobody_keeps(orphan: Client) -> None:
    """An add fails in words and leaves nothing; what is there can be changed and deleted."""
    before = look(orphan)

    with pytest.raises(QmpError, match="cannot hand over to the service manager: Connection refused"):
        orphan.execute(*add("memfd", "z"))

    assert before == look(orphan)
    orphan.execute(*change("x", "merge", False))
    orphan.execute(*delete("y"))
    assert sorted(look(orphan).objects) == ["x"]


def test_survival_is_not_promised(orphan: Client) -> None:
    """The next crash ends the memory, and that is what is said."""
    for status in orphan.execute("query-memdev-status"):
        fates = {fate["event"]: fate for fate in status["survival"]}
        assert fates["vmm-crash"]["survives"]
        assert not fates["gmemd-crash"]["survives"]
        assert "the keeper has ended" in fates["gmemd-crash"]["advice"]
