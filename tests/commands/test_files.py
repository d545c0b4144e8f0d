"""memory-backend-file: it waits off the loop, and not for a client that has gone; what discard-data drops."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gmemd.changes.change import Change
from gmemd.client.client import Client
from gmemd.commands.memdev import delete
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.kernel import Kernel
from tests.commands.conftest import Machine
from tests.commands.live import LiveMachine
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.robustness.world import World

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")
FIFO_REFUSED = "unable to map backing store for guest RAM: No such device"


def file(path: Path, **more: Any) -> dict[str, Any]:
    return {"qom_type": "memory-backend-file", "id": "m", "size": MIB, "mem_path": str(path), "share": True, **more}


def wire(path: Path, **more: Any) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in file(path, **more).items()}


@pytest.fixture
def leased(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file under a lease, and its fd: who opens it waits until the fd is closed."""
    path = tmp_path / "leased"
    path.write_bytes(bytes(MIB))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield path, fd
    signal.signal(signal.SIGIO, before)


def memory_of(path: Path) -> int:
    return path.stat().st_blocks * 512


# -- what waits --------------------------------------------------------------------------------------

@pytest.mark.parametrize("readonly", [False, True])
def test_a_symbolic_link_to_nothing_is_refused(machine: Machine, tmp_path: Path, readonly: bool) -> None:
    """It cannot be opened and cannot be made; when it leads somewhere, it can be used."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert machine.refusal("object-add", **file(link, readonly=readonly)) == (
        "GenericError", f"can't open backing store {link} for guest RAM: No such file or directory")
    (tmp_path / "file").write_bytes(bytes(MIB))
    assert machine.run("object-add", **file(link, readonly=readonly)) == {}
    machine.run("object-del", id="m")


def test_a_leased_file_is_waited_for_beside_the_loop(leased: tuple[Path, int]) -> None:
    """Others are answered meanwhile; the descriptor is an ordinary one afterwards."""
    path, fd = leased

    async def run() -> None:
        live = LiveMachine()
        adding = asyncio.ensure_future(live.do("object-add", **file(path)))
        for _ in range(10):
            await live.do("query-status")
            await asyncio.sleep(0.01)
        assert not adding.done()
        os.close(fd)
        assert await asyncio.wait_for(adding, PATIENCE) == {}
        assert os.get_blocking(live.gmemd.objects.find("m").fd)
        await live.do("object-del", id="m")
        await live.close()

    asyncio.run(run())


def test_a_file_that_becomes_a_fifo_holds_nobody_up(tmp_path: Path) -> None:
    """Whatever is at the path when it is opened, the loop goes on; with a writer there a FIFO is refused."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def run() -> None:
        live = LiveMachine()
        adding = asyncio.ensure_future(live.do("object-add", **file(fifo, readonly=True, rom="on")))
        for _ in range(10):
            await live.do("query-status")
            await asyncio.sleep(0.01)
        assert not adding.done()
        writer = os.open(fifo, os.O_WRONLY)
        with pytest.raises(QmpError) as caught:
            await asyncio.wait_for(adding, PATIENCE)
        assert caught.value.desc == FIFO_REFUSED
        os.close(writer)
        await live.close()

    asyncio.run(run())


@pytest.mark.parametrize("what", ["fifo", "lease"])
def test_nothing_waits_for_a_client_that_has_gone(what: str, tmp_path: Path, leased: tuple[Path, int]) -> None:
    """Its ids, its room and its threads are free again, though the file does not open."""
    path = leased[0]
    if what == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    with Daemon(kernel="simulated") as daemon, daemon.client() as other:
        def threads() -> int:
            return len(os.listdir(f"/proc/{daemon.pid}/task"))

        before = threads()
        clients = [Client(str(daemon.sock)) for _ in range(5)]
        for number, client in enumerate(clients):
            add = {"execute": "object-add", "arguments": wire(path, id=f"m{number}", readonly=True, rom="on")}
            client.send_text(json.dumps(add).encode(), 0)
        wait_for(lambda: threads() >= before + 5)
        for client in clients:
            client.close()
        for number in range(5):
            ram = {"qom-type": "memory-backend-ram", "id": f"m{number}", "size": 4096}
            wait_for(lambda ram=ram: _done(other, "object-add", ram))  # type: ignore[misc]
        wait_for(lambda: threads() <= before)
        assert len(other.execute("query-memdev")) == 5


async def test_a_thread_keeps_its_descriptor(tmp_path: Path) -> None:
    """The file of a client that has gone is closed, and removed, once: by the thread that works on it."""
    path, begun, released = tmp_path / "file", threading.Event(), threading.Event()
    kernel = choose_kernel("simulated")

    def held(fd: int) -> int:
        begun.set()
        assert released.wait(PATIENCE)
        return PAGE

    def opened() -> int:
        return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")].count(str(path))

    live = LiveMachine(cast(Kernel, Meddled(kernel, file_page_size=held)))
    adding = asyncio.ensure_future(live.do("object-add", **file(path)))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    live.gone = True
    with pytest.raises(QmpError, match="before its file was open"):
        await adding
    assert (opened(), path.exists()) == (1, True)
    released.set()
    while path.exists():
        await asyncio.sleep(0.001)
    assert opened() == 0
    await live.close()


class Meddled:
    """A kernel with some calls of the test's own."""

    def __init__(self, kernel: Kernel, **calls: Callable[..., Any]) -> None:
        self._kernel = kernel
        self.__dict__ |= calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _done(client: Client, command: str, arguments: dict[str, Any]) -> bool:
    try:
        client.execute(command, arguments)
    except QmpError:
        return False
    return True


# -- discard-data ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("properties", "left"), [
    ({"discard_data": True}, 3 * MIB),
    ({"discard_data": False}, 4 * MIB),
    ({"discard_data": True, "share": False}, 4 * MIB),
    ({"discard_data": True, "readonly": True}, 4 * MIB),
])
def test_deletion_discards_the_objects_part(machine: Machine, shm: Path, properties: dict[str, Any], left: int) -> None:
    """Only of a shared file that may be written, only with discard-data, and only the bytes of the object."""
    shm.write_bytes(b"x" * 4 * MIB)
    machine.run("object-add", **file(shm, offset=MIB, **properties))
    machine.run("object-del", id="m")
    assert (memory_of(shm), shm.stat().st_size) == (left, 4 * MIB)
    assert shm.read_bytes()[:MIB] == b"x" * MIB


def test_the_property_counts_as_it_is_at_the_end(machine: Machine, shm: Path) -> None:
    shm.write_bytes(b"x" * MIB)
    machine.run("object-add", **file(shm, discard_data=True))
    machine.run("qom-set", path="m", property="discard-data", value=False)
    machine.run("object-del", id="m")
    assert memory_of(shm) == MIB
    machine.run("object-add", **file(shm))
    machine.run("qom-set", path="m", property="discard-data", value=True)
    machine.run("object-del", id="m")
    assert memory_of(shm) == 0


def test_a_refused_object_discards_nothing(machine: Machine, shm: Path) -> None:
    shm.write_bytes(b"x" * MIB)
    machine.refusal("object-add", **file(shm, discard_data=True, align=3))
    assert memory_of(shm) == MIB


async def test_only_a_durable_deletion_discards(shm: Path) -> None:
    """When it cannot be made durable the object is there again, with all it had."""
    live = LiveMachine()
    shm.write_bytes(b"x" * MIB)
    await live.do("object-add", **file(shm, discard_data=True))
    change = Change(live.gmemd.settler)
    delete(live.gmemd, "m", change)
    change.revert()
    assert memory_of(shm) == MIB
    change = Change(live.gmemd.settler)
    delete(live.gmemd, "m", change)
    assert memory_of(shm) == MIB
    ending = change.finish()
    assert ending is not None
    await ending
    assert memory_of(shm) == 0
    await live.close()


def test_the_end_of_gmemd_discards_what_ends_with_it(shm: Path) -> None:
    shm.write_bytes(b"x" * MIB)
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", wire(shm, discard_data=True))
        assert daemon.stop() == 0
    assert memory_of(shm) == 0


def test_what_lives_on_is_not_discarded(shm: Path) -> None:
    """A restart keeps the contents; the deletion after it discards them."""
    with World(warm=False) as world:
        shm.write_bytes(b"x" * MIB)
        with world.client() as client:
            client.execute("object-add", wire(shm, discard_data=True))
        world.kill(signal.SIGTERM)
        with world.client() as client:
            assert memory_of(shm) == MIB
            client.execute("object-del", {"id": "m"})
            assert memory_of(shm) == 0


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path(f"/dev/shm/gmemd-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)
