"""Who runs a guest on an object: one process at a time, its end, generations, over a restart of the daemon."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gmemd.commands.handovers import watch_handovers
from gmemd.commands.runners import watch_runners
from gmemd.kernel.beneath import Paths
from gmemd.memory.runner import Handover
from gmemd.objects.records import backend_of, record_of
from gmemd.posix.sockets import bind_unix
from gmemd.processes.identity import command_name
from tests.commands.live import LiveMachine, end, idle_process, with_memfd
from tests.patience import PATIENCE

PAGE = os.sysconf("SC_PAGESIZE")


live = with_memfd(PAGE)


other, another, client = (pytest.fixture(idle_process, name=name) for name in ("other", "another", "client"))


async def status(machine: LiveMachine) -> dict[str, Any]:
    [found] = await machine.do("query-memdev-status", id="m")
    return {name: found[name] for name in ("generation", "runner") if name in found}


async def test_one_runner_at_a_time(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """Another one is refused until the first has ended, or hands over, or is forced away; each has a generation."""
    assert await status(live) == {"generation": 0}
    assert await live.do("memdev-set-runner", id="m", pid=other.pid) == {"generation": 1}
    assert await live.do("memdev-set-runner", id="m", pid=other.pid) == {"generation": 1}  # it is that already
    assert await status(live) == {"generation": 1, "runner": {"pid": other.pid, "uid": os.getuid()}}
    refusal = f"process {other.pid} ({command_name(other.pid)}) runs a guest on object 'm'"
    assert await live.refused("memdev-set-runner", id="m") == f"{refusal}: another guest on it needs 'force'"
    assert await live.refused("memdev-clear-runner", id="m") == f"{refusal}: another guest on it needs 'force'"
    assert await live.do("memdev-set-runner", id="m", **{"from": other.pid}) == {"generation": 2}
    assert await live.do("memdev-set-runner", id="m", pid=other.pid, force=True) == {"generation": 3}
    assert [(name, data["pid"], data["generation"]) for name, data in live.events] == [
        ("MEMDEV_RUNNER_STARTED", other.pid, 1), ("MEMDEV_RUNNER_ENDED", other.pid, 1),
        ("MEMDEV_RUNNER_STARTED", os.getpid(), 2), ("MEMDEV_RUNNER_ENDED", os.getpid(), 2),
        ("MEMDEV_RUNNER_STARTED", other.pid, 3)]


async def test_the_end_of_a_runner(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """It is announced, and the object free for the next; the generation stays."""
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    end(other)
    await live.wait_event("MEMDEV_RUNNER_ENDED", id="m", pid=other.pid, generation=1)
    assert await status(live) == {"generation": 1}
    assert await live.refused("memdev-clear-runner", id="m") == "no guest runs on object 'm'"
    refusal = f"process {other.pid} has ended, or is not visible from here"
    assert await live.refused("memdev-set-runner", id="m", pid=other.pid) == refusal
    assert await live.do("memdev-set-runner", id="m") == {"generation": 2}
    await live.do("memdev-clear-runner", id="m")
    assert await status(live) == {"generation": 2}


async def test_what_has_a_runner_stays(live: LiveMachine, other: subprocess.Popen[bytes]) -> None:
    """It is not deleted without force, but at once when the runner has ended, whether that is known already or not."""
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    runs = f"process {other.pid} ({command_name(other.pid)}) runs a guest on object 'm': "
    assert await live.refused("object-del", id="m") == f"{runs}deleting it with memdev-delete needs 'force'"
    assert await live.refused("memdev-delete", id="m", zero=True) == f"{runs}deleting it needs 'force'"
    await live.do("memdev-delete", id="m", zero=True, force=True)
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=PAGE)
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    end(other)
    await live.do("object-del", id="m")


@pytest.mark.parametrize("ended", [False, True])
async def test_it_outlives_the_daemon(live: LiveMachine, other: subprocess.Popen[bytes], ended: bool) -> None:
    """The next daemon knows the runner and the generation, and announces an end that it missed."""
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    if ended:
        end(other)
    next_one = restarted(live)
    watch_runners(next_one.gmemd)
    if ended:
        await next_one.wait_event("MEMDEV_RUNNER_ENDED", pid=other.pid, generation=1)
    assert await status(next_one) == {"generation": 1, **({} if ended else {
        "runner": {"pid": other.pid, "uid": os.getuid()}})}
    await next_one.close()


def restarted(machine: LiveMachine) -> LiveMachine:
    """Another daemon with the objects of this one, as their records describe them."""
    other = LiveMachine()
    for backend in machine.gmemd.objects:
        record = record_of(backend, machine.gmemd.kernel)
        record.fd_name = "x"
        other.gmemd.objects.restore([backend_of(record, os.dup(backend.fd), other.gmemd.schema)])
    return other


def vmm(pid: int, name: str = "none") -> dict[str, Any]:
    return {"pid": pid, "qmp": f"/no/such/{name}"}


async def test_a_handover_makes_the_new_one_the_runner(live: LiveMachine, other: subprocess.Popen[bytes],
                                                       another: subprocess.Popen[bytes]) -> None:
    """Meanwhile the objects are busy."""
    await live.do("object-add", qom_type="memory-backend-memfd", id="n", size=PAGE)
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    await live.do("memdev-handover", ids=["m", "n"], old=vmm(other.pid), new=vmm(another.pid))
    busy = "object 'n' is busy: its guest is on its way to another VMM"
    assert await live.refused("object-del", id="n") == busy
    assert await live.refused("memdev-set-runner", id="n") == busy
    assert await live.refused("memdev-handover", ids=["n"], old=vmm(other.pid), new=vmm(another.pid)) == busy
    await live.do("memdev-handover-end", id="n", result="new")
    assert await status(live) == {"generation": 2, "runner": {"pid": another.pid, "uid": os.getuid()}}
    assert await live.refused("memdev-handover-end", id="m", result="new") == (
        "the guest of object 'm' is not on its way to another VMM")
    await live.do("memdev-handover", ids=["m", "n"], old=vmm(another.pid), new=vmm(other.pid))
    await live.do("memdev-handover-end", id="m", result="old")
    assert (await status(live))["generation"] == 2


async def test_what_is_no_handover(live: LiveMachine, other: subprocess.Popen[bytes],
                                   another: subprocess.Popen[bytes]) -> None:
    """An object that another process runs, one that does not exist, none; a process that does not exist; only one."""
    await live.do("memdev-set-runner", id="m", pid=other.pid)
    await live.do("object-add", qom_type="memory-backend-memfd", id="n", size=PAGE)
    for ids, old, new, refusal in (
            (["n", "m"], another, other, f"process {other.pid} ({command_name(other.pid)}) runs a guest on object 'm': "
                                         "another guest on it needs 'force'"),
            (["m", "x"], other, another, "object 'x' not found"),
            ([], other, another, "parameter 'ids' must name objects, each once"),
            (["m", "m"], other, another, "parameter 'ids' must name objects, each once"),
            (["m"], other, other, "parameters 'old' and 'new' name the same process")):
        assert await live.refused("memdev-handover", ids=ids, old=vmm(old.pid), new=vmm(new.pid)) == refusal
    end(another)
    assert await live.refused("memdev-handover", ids=["m"], old=vmm(other.pid), new=vmm(another.pid)) == (
        f"process {another.pid} has ended, or is not visible from here")
    await live.do("memdev-delete", id="n")  # nothing is noted


@pytest.mark.parametrize("restart", [False, True])
async def test_a_client_that_ends(live: LiveMachine, client: subprocess.Popen[bytes], other: subprocess.Popen[bytes],
                                  another: subprocess.Popen[bytes], restart: bool) -> None:
    """The new VMM, which does not run the guest, is killed; the old one has ended here. So with the next daemon."""
    live.pid = client.pid
    await live.do("object-add", qom_type="memory-backend-memfd", id="n", size=PAGE)
    await live.do("memdev-handover", ids=["m", "n"], old=vmm(other.pid, "old"), new=vmm(another.pid, "new"))
    end(other)
    machine = live
    if restart:
        machine = restarted(live)
        for backend in list(live.gmemd.objects):
            backend.handover.end()
    end(client)
    if restart:
        watch_handovers(machine.gmemd)
    await machine.wait_event("MEMDEV_HANDOVER_ENDED", ids=["m", "n"], result="none")
    assert another.wait(PATIENCE) == -9
    assert [backend.busy for backend in machine.gmemd.objects] == ["", ""]
    if restart:
        await machine.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for processes of other users")
async def test_a_tenant_names_its_own_processes_only(live: LiveMachine, tmp_path: Path,
                                                     other: subprocess.Popen[bytes]) -> None:
    """To it the processes of others do not exist, nor does what lies outside of the directories of its rule."""
    own = [subprocess.Popen(["sleep", "600"], user=4242) for _ in range(2)]
    try:
        live.become(4242)
        live.rights = live.rights._replace(paths=(str(tmp_path),))
        await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=PAGE)
        refusal = f"process {other.pid} has ended, or is not visible from here"
        first, second = ({"pid": process.pid, "qmp": f"{tmp_path}/q{process.pid}"} for process in own)
        foreign = {"pid": other.pid, "qmp": f"{tmp_path}/q"}
        assert await live.refused("memdev-set-runner", id="m", pid=other.pid) == refusal
        assert await live.refused("memdev-handover", ids=["m"], old=first, new=foreign) == refusal
        assert await live.refused("memdev-handover", ids=["m"], old=foreign, new=second) == refusal
        assert await live.refused("memdev-handover", ids=["m"], old=first, new={**second, "qmp": "/q"}) == (
            "path '/q' is disabled by policy")
        assert await live.do("memdev-set-runner", id="m", pid=own[0].pid) == {"generation": 1}
        await live.do("memdev-handover", ids=["m"], old=first, new=second)
        backend = live.room.objects.find("m")
        assert backend.handover is not None
        assert Handover.load(backend.handover.dump()).new.root == str(tmp_path)
        await live.do("memdev-handover-end", id="m", result="new")
        assert (await live.do("query-memdev-status", id="m"))[0]["runner"]["pid"] == own[1].pid
    finally:
        for process in own:
            process.kill()
            process.wait()


def test_a_socket_below_a_directory(tmp_path: Path) -> None:
    """It is found, renamed and removed there, and through no link that leads elsewhere."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    (root / "link").symlink_to(elsewhere)
    listening = bind_unix(str(elsewhere / "q"))
    paths = Paths(str(root))
    for act in (lambda: paths.rename(f"{root}/link/q", f"{root}/r"), lambda: paths.unlink(f"{root}/link/q"),
                lambda: paths.stat(f"{root}/link/q"), lambda: paths.socket(f"{root}/link/q").__enter__()):
        with pytest.raises(OSError, match="symbolic links"):
            act()
    os.rename(elsewhere / "q", root / "q")
    paths.rename(f"{root}/q", f"{root}/r")
    with paths.socket(f"{root}/r") as address, socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
    paths.unlink(f"{root}/r")
    assert os.listdir(root) == ["link"]
    listening.close()
