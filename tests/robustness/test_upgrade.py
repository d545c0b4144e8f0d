"""Another version of gmemd comes, and goes again."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from itertools import pairwise

from tests.robustness.scenarios import add
from tests.robustness.world import World, look, write_pattern


def version(world: World) -> int:
    """The schema's version in the file, read while no daemon has it."""
    with world.held(), closing(sqlite3.connect(world.state_dir / "registry.sqlite")) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_up_and_down_and_up_again() -> None:
    """A newer gmemd migrates the registry; an older one refuses it in words, ever more slowly, and drops nothing."""
    with World() as world:
        with world.client() as client:
            for object_id in ("x", "y"):
                client.execute(*add("memfd", object_id))
                write_pattern(client, object_id)
            before = look(client)
        old = version(world)

        world.next.touch()
        world.kill()
        with world.client() as client:
            assert before == look(client)
        assert old + 1 == version(world)

        with world.client():
            pass
        world.next.unlink()
        world.kill()
        refusal = f"has schema version {old + 1}, this gmemd knows {old}: start the gmemd that wrote it, or a newer one"
        world.wait_log(refusal, 6)
        delays = re.findall(r"ended with status 1, 2 fds held, next start in (\S+) s", world.log())
        assert all(float(later) == 2 * float(sooner) for sooner, later in pairwise(delays[:6]))
        assert "Traceback" not in world.log()

        world.next.touch()
        with world.client() as client:
            assert before == look(client)
            client.execute("object-del", {"id": "y"})
        assert len(world.memory()[0]) == 1
