"""A damaged, full or foreign registry costs no memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.robustness import damage
from tests.robustness.scenarios import add
from tests.robustness.world import World, look, write_pattern

SAMPLE = [*list(damage.truncations())[::3], *damage.replacements(), *damage.flips(1777)]


@pytest.mark.parametrize(("what", "how"), SAMPLE, ids=[what for what, _ in SAMPLE])
def test_a_damaged_registry_costs_no_memory(world: World, what: str, how: damage.Harm) -> None:
    """What cannot be told from the registry any more is unclaimed, and can be claimed, contents and all."""
    assert damage.harm(world, what, how) in ("recovered", "unclaimed", "unnoticed")


def test_what_is_cut_off_is_noticed(world: World) -> None:
    """A registry file of size 0 is not an empty registry: its objects come back without names."""
    assert damage.harm(world, "cut to 100 bytes", lambda path: os.truncate(path, 100)) == "unclaimed"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for little."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "gmemd-test", place], check=False,
                                      capture_output=True).returncode:
        pytest.skip("needs root that may mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_makes_it_read_only(small: Path) -> None:
    """Objects are handed out and come back, what would change them is refused in words; with room all goes on."""
    with World("--state-dir", str(small)) as world:
        with world.client() as client:
            client.execute(*add("memfd", "x"))
            write_pattern(client, "x")
            before = look(client)
            _fill(small / "filler")
            with pytest.raises(QmpError, match=r"cannot be written: No space left on device"):
                _add_until_refused(client)
            kept = sorted(look(client).objects)
        world.kill()
        with world.client() as client:
            now = look(client)
            assert kept == sorted(now.objects)
            assert before.of("x") == now.of("x")
            assert "memory is handed out as it is" in world.log()
            with pytest.raises(QmpError, match=r"registry .* cannot be written: No space left on device"):
                client.execute(*add("memfd", "z"))
            (small / "filler").unlink()
            client.execute(*add("memfd", "z"))
        world.kill()
        with world.client() as client:
            assert sorted([*kept, "z"]) == sorted(look(client).objects)


def _add_until_refused(client: Client) -> None:
    for number in range(200):
        client.execute(*add("memfd", f"y{number}"))


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
