"""The commands on snapshots: what is saved comes back, nothing half-made is seen, nobody's work is undone."""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gmemd.changes.change import WithFds
from gmemd.errors import QmpError
from tests.commands.live import LiveMachine
from tests.snapshots.test_mapped_ram import migration

PAGE = 4096
SIZE = 64 * PAGE


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[LiveMachine]:
    """A machine with the memfd `m`, in which there are a few words; in the end nothing is in use."""
    machine = LiveMachine(snapshots=str(tmp_path / "snapshots"))
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    write(machine, "m", b"words", PAGE)
    yield machine
    assert machine.gmemd.snapshots._uses == {}
    await machine.close()
    with suppress(FileNotFoundError):
        assert [name for name in os.listdir(tmp_path / "snapshots") if name.startswith(".")] == []


def write(machine: LiveMachine, name: str, words: bytes, at: int) -> None:
    os.pwrite(machine.gmemd.objects.find(name).fd, words, at)


def contents(machine: LiveMachine, name: str) -> bytes:
    backend = machine.gmemd.objects.find(name)
    with mmap.mmap(backend.fd, backend.memory_size, prot=mmap.PROT_READ) as memory:
        return memory[:]


async def one(machine: LiveMachine, name: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any]
    [found] = await machine.do("query-memdev-snapshots", name=name, **more)
    return found


async def names(machine: LiveMachine, **arguments: Any) -> list[str]:
    return [entry["name"] for entry in await machine.do("query-memdev-snapshots", **arguments)]


# -- saving --------------------------------------------------------------------------------------------

async def test_a_snapshot_says_what_it_is(live: LiveMachine) -> None:
    assert await live.do("memdev-snapshot", id="m", name="one") == {"name": "one"}
    found = await one(live, "one")
    assert found.pop("bytes") > 0
    assert len(found.pop("uuid")) == 36
    assert found.pop("created").endswith("Z")
    assert found == {"name": "one", "stored": "full", "via": "idle", "consistent": True, "generation": 0, "object": {
        "id": "m", "qom-type": "memory-backend-memfd", "kind": "memfd", "size": SIZE}}
    assert await live.wait_event("MEMDEV_SNAPSHOT_SAVED") == {
        "name": "one", "id": "m", "consistent": True, "device-state": False}
    assert await live.do("memdev-snapshot-verify", name="one") == {}


async def test_a_job_shows_how_far_it_is(live: LiveMachine) -> None:
    """The name is known at once, and the snapshot there when the job has ended."""
    assert await live.do("memdev-snapshot", id="m", name="one", job_id="j") == {"name": "one"}
    ended = await live.ended("j")
    assert (ended["type"], ended["current-progress"]) == ("snapshot", ended["total-progress"])
    assert "error" not in ended
    assert await names(live) == ["one"]
    for command in ("memdev-snapshot-verify", "memdev-restore"):
        job = command.removeprefix("memdev-")
        await live.do(command, name="one", job_id=job, **({"id": "n"} if "restore" in command else {}))
        assert "error" not in await live.ended(job)


async def test_names_without_a_name(live: LiveMachine) -> None:
    """The object's id with the time; never one that is taken."""
    given = [(await live.do("memdev-snapshot", id="m"))["name"] for _ in range(3)]
    assert len(set(given)) == 3
    assert all(name.startswith("m-20") for name in given)
    assert await names(live) == given


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "-x", "a b", "x" * 201])
async def test_names_that_cannot_be(live: LiveMachine, name: str) -> None:
    for command in ({"command": "memdev-snapshot", "id": "m"}, {"command": "memdev-restore"},
                    {"command": "memdev-snapshot-delete"}):
        given = dict(command)
        assert "cannot be the name of a snapshot" in await live.refused(given.pop("command"), name=name, **given)


async def test_a_name_is_given_once(live: LiveMachine) -> None:
    """Also while the first is still being written."""
    both = await asyncio.gather(*(live.do("memdev-snapshot", id="m", name="one") for _ in range(2)),
                                return_exceptions=True)
    assert sorted(map(str, both)) == ["snapshot 'one' exists already", "{'name': 'one'}"]
    assert await live.refused("memdev-snapshot", id="m", name="one") == "snapshot 'one' exists already"


async def test_saves_share_an_object_and_changes_wait(live: LiveMachine) -> None:
    """Two snapshots at a time of one object; what would change it is refused."""
    both = [asyncio.ensure_future(live.do("memdev-snapshot", id="m", name=name, fence={"via": "unfenced"}))
            for name in ("one", "two")]
    await asyncio.sleep(0)
    assert await live.refused("object-del", id="m") == "object 'm' is busy: it is being saved"
    await asyncio.gather(*both)
    assert sorted(await names(live)) == ["one", "two"]
    await live.do("object-del", id="m")


async def test_a_cancelled_job_leaves_nothing(live: LiveMachine, tmp_path: Path) -> None:
    await live.do("memdev-snapshot", id="m", name="one", job_id="j")
    await live.do("job-cancel", id="j")
    assert (await live.ended("j"))["error"] == "Operation canceled"
    assert await names(live) == []
    await live.do("memdev-snapshot", id="m", name="one")
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["one"]


async def test_a_dry_run_makes_nothing(live: LiveMachine, tmp_path: Path) -> None:
    """It says how much would be written, and how long that takes once that is known."""
    async def told() -> str:
        found = await live.do("query-command-effect", command="memdev-snapshot", arguments={"id": "m", "name": "one"})
        return str(found["effect"])

    assert f"would save 'm' as 'one': write up to {PAGE} bytes of " in await told()
    assert not (tmp_path / "snapshots").exists()
    await live.do("memdev-snapshot", id="m", name="two")
    assert "at the rate of the last one" in await told()
    assert await names(live) == ["two"]
    for command in ("memdev-restore", "memdev-snapshot-verify", "memdev-snapshot-delete"):
        arguments = {"name": "two", **({"id": "n"} if command == "memdev-restore" else {})}
        await live.do("query-command-effect", command=command, arguments=arguments)
    assert await names(live) == ["two"]
    assert [backend.id for backend in live.gmemd.objects] == ["m"]


async def test_increments_need_their_parent(live: LiveMachine) -> None:
    """A delta holds what differs; its parent stays until it is flattened."""
    await live.do("memdev-snapshot", id="m", name="one")
    write(live, "m", b"more", 9 * PAGE)
    await live.do("memdev-snapshot", id="m", name="two", parent="one")
    found = await one(live, "two")
    assert found["parent"] == "one"
    if found["stored"] == "delta":
        assert (await one(live, "one"))["children"] == ["two"]
        assert "is the parent of 'two'" in await live.refused("memdev-snapshot-delete", name="one")
        assert "holds only what differs from 'one'" in await live.refused("memdev-get-snapshot", name="two")
        await live.do("memdev-snapshot-flatten", name="two")
    await live.do("memdev-snapshot-delete", name="one")
    await live.do("memdev-restore", name="two", id="n")
    assert contents(live, "n") == contents(live, "m")


async def test_an_increment_of_an_increment(live: LiveMachine) -> None:
    """It is one to the same parent: nothing is ever deeper."""
    await live.do("memdev-snapshot", id="m", name="one")
    for name in ("two", "three"):
        write(live, "m", name.encode(), 9 * PAGE)
        await live.do("memdev-snapshot", id="m", name=name, parent="one" if name == "two" else "two")
    await live.do("memdev-snapshot-delete", name="two")
    await live.do("memdev-restore", name="three", id="n")
    assert contents(live, "n") == contents(live, "m")


async def test_a_parent_that_does_not_fit(live: LiveMachine) -> None:
    await live.do("memdev-snapshot", id="m", name="one")
    await live.do("object-add", qom_type="memory-backend-memfd", id="n", size=PAGE)
    assert await live.refused("memdev-snapshot", id="n", parent="one") \
        == f"snapshot 'one' is of {SIZE} bytes, and 'n' has {PAGE}"
    assert await live.refused("memdev-snapshot", id="n", parent="no") == "snapshot 'no' not found"


async def test_device_state_comes_from_a_vmm(live: LiveMachine) -> None:
    assert await live.refused("memdev-snapshot", id="m", device_state=True) \
        == "parameter 'device-state' needs a fence by 'qmp'"


# -- restoring -----------------------------------------------------------------------------------------

async def test_what_was_saved_comes_back(live: LiveMachine) -> None:
    """Every byte, under its own id or another; absent pages stay absent."""
    await live.do("memdev-snapshot", id="m", name="one")
    assert await live.do("memdev-restore", name="one", id="n") == {"id": "n"}
    assert contents(live, "n") == contents(live, "m")
    saved = contents(live, "m")
    await live.do("object-del", id="m")
    await live.do("memdev-restore", name="one")
    assert live.gmemd.kernel.resident(live.gmemd.objects.find("m").fd) == PAGE
    assert contents(live, "m") == saved
    assert await live.wait_event("MEMDEV_RESTORED", id="m") == {"id": "m", "name": "one"}


@pytest.mark.parametrize("properties", [
    {"qom_type": "memory-backend-ram"}, {"qom_type": "memory-backend-shm"},
    {"qom_type": "memory-backend-memfd", "guest_memfd": "on"},
    {"qom_type": "memory-backend-guest-memfd", "init_shared": False},
    {"qom_type": "memory-backend-memfd", "seal": False},
], ids=lambda properties: "-".join(map(str, properties.values())))
async def test_every_type_comes_back(live: LiveMachine, properties: dict[str, Any]) -> None:
    """With the properties that it had."""
    await live.do("object-add", id="o", size=SIZE, **properties)
    if properties["qom_type"] == "memory-backend-guest-memfd":
        await live.do("memdev-convert", id="o", offset=0, size=SIZE // 2, to="shared")
    os.pwrite(live.gmemd.objects.find("o").fd, b"there", 0)
    await live.do("memdev-snapshot", id="o", name="one")
    await live.do("memdev-restore", name="one", id="p")
    assert contents(live, "p") == contents(live, "o")
    restored, saved = [live.gmemd.objects.find(name) for name in ("p", "o")]
    assert (restored.properties, restored.qom_type, restored.kind) == (saved.properties, saved.qom_type, saved.kind)
    if live.gmemd.objects.find("o").visibility is not None:
        assert await live.do("query-memdev-ranges", id="p") == await live.do("query-memdev-ranges", id="o")


async def test_private_bytes_come_back(live: LiveMachine) -> None:
    """Both halves: what is shared, and what was set aside for the guest."""
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    write(live, "g", b"s" * (2 * PAGE), 0)
    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private", preserve=True)
    await live.do("memdev-snapshot", id="g", name="one")
    await live.do("object-del", id="g")
    await live.do("memdev-restore", name="one")
    assert contents(live, "g")[:2 * PAGE] == bytes(PAGE) + b"s" * PAGE
    assert (await live.do("query-memdev-ranges", id="g"))["private"] == PAGE
    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="shared", preserve=True)
    assert contents(live, "g")[:2 * PAGE] == b"s" * (2 * PAGE)


async def test_a_file_comes_back_as_memory(live: LiveMachine, tmp_path: Path) -> None:
    """Only its part is saved, and no file is overwritten."""
    path = tmp_path / "ram"
    path.write_bytes(b"before" + bytes(SIZE - 6) + b"part" + bytes(PAGE - 4))
    await live.do("object-add", qom_type="memory-backend-file", id="f", size=PAGE, mem_path=str(path), share=True,
                  offset=SIZE)
    await live.do("memdev-snapshot", id="f", name="one")
    await live.do("memdev-restore", name="one", id="n")
    assert contents(live, "n") == b"part" + bytes(PAGE - 4)
    assert live.gmemd.objects.find("n").qom_type == "memory-backend-memfd"
    assert path.read_bytes()[:6] == b"before"


async def test_over_an_object_that_nobody_holds(live: LiveMachine) -> None:
    """With force it takes the object's place; a holder keeps it from that, and the object is then as it was."""
    await live.do("memdev-snapshot", id="m", name="one")
    saved = contents(live, "m")
    write(live, "m", b"later", 0)
    assert "duplicate property 'm'" in await live.refused("memdev-restore", name="one")
    with subprocess.Popen(["sleep", "60"], stdout=live.gmemd.objects.find("m").fd) as holder:
        try:
            assert await live.refused("memdev-restore", name="one", force=True) \
                == f"object 'm' is held by process {holder.pid} (sleep)"
            await live.do("memdev-set-runner", id="m", pid=holder.pid)
            assert await live.refused("memdev-restore", name="one", force=True) == (
                f"process {holder.pid} (sleep) runs a guest on object 'm': that has to end first")
        finally:
            holder.kill()
    assert contents(live, "m")[:5] == b"later"
    assert await live.do("memdev-restore", name="one", force=True) == {"id": "m"}
    assert contents(live, "m") == saved
    assert [entry["id"] for entry in await live.do("query-memdev-status")] == ["m"]


async def test_handed_out_meanwhile(live: LiveMachine) -> None:
    """Who gets the former memory while the new one is being filled keeps a living object."""
    await live.do("memdev-snapshot", id="m", name="one")
    write(live, "m", b"later", 0)
    restoring = asyncio.ensure_future(live.refused("memdev-restore", name="one", force=True))
    await live.wait_claimed("m")
    reply = await live.do("memdev-get-fd", id="m")
    assert isinstance(reply, WithFds)
    assert await restoring == "object 'm' was handed out meanwhile"
    os.close(reply.fds[0])
    assert contents(live, "m")[:5] == b"later"


async def test_without_room_for_it(live: LiveMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into memory is refused before it is filled, in the kernel's words."""
    await live.do("memdev-snapshot", id="m", name="one")
    needed = []

    def check(size: int, fd: int) -> None:
        needed.append(size)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(live.gmemd.kernel, "check_headroom", check)
    assert await live.refused("memdev-restore", name="one", id="n") \
        == "cannot restore snapshot 'one': Cannot allocate memory"
    assert needed == [PAGE]
    assert [backend.id for backend in live.gmemd.objects] == ["m"]


async def test_an_unfenced_snapshot_is_marked(live: LiveMachine) -> None:
    """It is restored only by somebody who says that this is fine."""
    await live.do("memdev-snapshot", id="m", name="one", fence={"via": "unfenced"})
    assert not (await one(live, "one"))["consistent"]
    assert "is of no particular moment" in await live.refused("memdev-restore", name="one", id="n")
    await live.do("memdev-restore", name="one", id="n", allow_inconsistent=True)


async def test_a_damaged_one_is_never_restored(live: LiveMachine, tmp_path: Path) -> None:
    """Verifying names the damage; restoring over an object leaves that as it was."""
    await live.do("memdev-snapshot", id="m", name="one")
    memory = tmp_path / "snapshots" / "one" / "memory.raw"
    with memory.open("r+b") as file:
        file.seek(PAGE)
        file.write(b"W")
    write(live, "m", b"later", 0)
    for command, arguments in (("memdev-snapshot-verify", {}), ("memdev-restore", {"force": True}),
                               ("memdev-restore", {"id": "n"})):
        assert "snapshot 'one' is damaged: " in await live.refused(command, name="one", **arguments)
    assert contents(live, "m")[:5] == b"later"
    assert [backend.id for backend in live.gmemd.objects] == ["m"]
    await live.do("memdev-snapshot-delete", name="one")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda text: text.replace('"version": 1', '"version": 2'), "snapshot 'one' "),
    (lambda text: text[:-40], "is damaged: manifest.json is incomplete"),
    (lambda text: "", "is damaged: manifest.json"),
    (lambda text: text.replace('"memfd"', '"memfe"'), "does not match its own sha256"),
    (lambda text: None, "is damaged: manifest.json is missing"),
])
async def test_what_cannot_be_used_is_listed(live: LiveMachine, tmp_path: Path, damage: Any, words: str) -> None:
    """With what is wrong; it can be deleted, and nothing else."""
    await live.do("memdev-snapshot", id="m", name="one")
    path = tmp_path / "snapshots" / "one" / "manifest.json"
    damaged = damage(path.read_text())
    path.unlink()
    if damaged is not None:
        path.write_text(damaged)
    found = await one(live, "one")
    assert words in found["problem"]
    assert set(found) == {"name", "bytes", "problem"}
    assert await live.refused("memdev-restore", name="one", id="n") == found["problem"]
    await live.do("memdev-snapshot-delete", name="one")
    assert await names(live) == []


# -- files, directories --------------------------------------------------------------------------------

async def test_files_are_handed_out_for_reading(live: LiveMachine) -> None:
    """The memory as it is; what a snapshot does not have is refused."""
    await live.do("memdev-snapshot", id="m", name="one")
    reply = await live.do("memdev-get-snapshot", name="one")
    assert isinstance(reply, WithFds)
    [fd] = reply.fds
    assert reply.value == {"bytes": SIZE, "stored": "full", "revocable": False}
    assert os.pread(fd, SIZE, 0) == contents(live, "m")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    for part in ("private", "device-state"):
        assert await live.refused("memdev-get-snapshot", name="one", part=part) \
            == f"snapshot 'one' has no part '{part}'"


async def test_in_a_directory_that_the_client_passes(live: LiveMachine, tmp_path: Path) -> None:
    """It holds the same; the daemon's own is not touched."""
    live.sent.append(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    await live.do("getfd", fdname="here")
    await live.do("memdev-snapshot", id="m", name="one", fdname="here")
    assert sorted(os.listdir(tmp_path)) == ["one"]
    assert (await one(live, "one", fdname="here"))["object"]["id"] == "m"
    assert await names(live) == []
    await live.do("memdev-snapshot-verify", name="one", fdname="here")
    await live.do("memdev-restore", name="one", id="n", fdname="here")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "map.bin").touch()
    (tmp_path / "mine" / "letter").touch()
    assert "'letter' in its folder is not a file of a snapshot" \
        in await live.refused("memdev-snapshot-delete", name="mine", fdname="here")
    await live.do("memdev-snapshot-delete", name="one", fdname="here")
    assert sorted(os.listdir(tmp_path)) == ["mine"]
    await live.do("closefd", fdname="here")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to write for another user")
async def test_what_is_in_a_users_directory_is_the_users(live: LiveMachine, tmp_path: Path) -> None:
    """Made or replaced by a daemon that is root, it can be read by its owner only, and deleted through gmemd."""
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    live.sent.append(os.open(tmp_path / "theirs", os.O_RDONLY | os.O_DIRECTORY))
    await live.do("getfd", fdname="here")
    live.uid = 12345
    await live.do("memdev-snapshot", id="m", name="one", fdname="here")
    await live.do("memdev-snapshot-flatten", name="one", cold=True, fdname="here")
    found = [tmp_path / "theirs" / "one", *(tmp_path / "theirs" / "one").iterdir()]
    assert {(path.stat().st_uid, path.stat().st_mode & 0o077) for path in found} == {(12345, 0)}
    await live.do("memdev-snapshot-delete", name="one", fdname="here")
    assert os.listdir(tmp_path / "theirs") == []
    live.uid = os.getuid()
    await live.do("closefd", fdname="here")


async def test_directories_that_are_refused(live: LiveMachine, tmp_path: Path) -> None:
    """What is not a directory, and one of another user: the daemon's rights are not the client's."""
    (tmp_path / "file").touch()
    for path, uid, words in ((tmp_path / "file", live.uid, "the descriptor is not that of a directory"),
                             (tmp_path, 12345,
                              f"the directory belongs to user {os.getuid()}, and the client is user 12345")):
        live.sent.append(os.open(path, os.O_RDONLY))
        await live.do("getfd", fdname="here")
        live.uid, own = uid, live.uid
        assert await live.refused("memdev-snapshot", id="m", fdname="here") == words
        live.uid = own
        await live.do("closefd", fdname="here")


async def test_what_others_do_in_the_directory_is_seen(live: LiveMachine, tmp_path: Path) -> None:
    """The list is that of the directory, whoever changed it; what was left half-written goes at the next start."""
    await live.do("memdev-snapshot", id="m", name="one")
    (tmp_path / "snapshots" / ".two.tmp-01234567").mkdir()
    (tmp_path / "snapshots" / "not-one").mkdir()
    assert await names(live) == ["one"]
    os.rename(tmp_path / "snapshots" / "one", tmp_path / "away")
    assert await names(live) == []
    os.rename(tmp_path / "away", tmp_path / "snapshots" / "one")
    assert await names(live) == ["one"]
    await live.gmemd.snapshots.load()
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["not-one", "one"]


async def test_a_damaged_vmstate_or_table_is_found(live: LiveMachine, tmp_path: Path) -> None:
    await live.do("memdev-snapshot", id="m", name="one")
    manifest = json.loads((tmp_path / "snapshots" / "one" / "manifest.json").read_text())
    assert manifest["format"] == "gmemd-snapshot"
    table = tmp_path / "snapshots" / "one" / "digests.bin"
    data = bytearray(table.read_bytes())
    data[3] ^= 1
    table.write_bytes(data)
    assert "snapshot 'one' is damaged: " in await live.refused("memdev-snapshot-verify", name="one")


async def test_cold(live: LiveMachine) -> None:
    """Compressed afterwards, or later; it is restored as it is."""
    pytest.importorskip("backports.zstd")
    await live.do("memdev-snapshot", id="m", name="one", cold=True)
    assert (await one(live, "one"))["stored"] == "cold"
    await live.do("memdev-restore", name="one", id="n")
    assert contents(live, "n") == contents(live, "m")
    await live.do("memdev-snapshot-flatten", name="one")
    assert (await one(live, "one"))["stored"] == "full"
    await live.do("memdev-snapshot-flatten", name="one", cold=True)
    assert (await one(live, "one"))["stored"] == "cold"


async def test_what_cannot_be_compressed_is_saved(live: LiveMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that it is there."""
    async def fail(verb: str, *_: Any) -> None:
        raise QmpError("No space left on device")

    monkeypatch.setattr("gmemd.commands.save.work_on", fail)
    assert await live.refused("memdev-snapshot", id="m", name="one", cold=True) \
        == "snapshot 'one' is saved, but not compressed: No space left on device"
    assert (await one(live, "one"))["stored"] == "full"


async def test_who_locks_a_snapshot_does_not_hang_the_daemon(live: LiveMachine, tmp_path: Path) -> None:
    """In a directory of the client's own, that may be the client."""
    await live.do("memdev-snapshot", id="m", name="one")
    fd = os.open(tmp_path / "snapshots" / "one", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert await live.refused("memdev-snapshot-delete", name="one") \
        == "cannot delete snapshot 'one': Resource temporarily unavailable"
    os.close(fd)
    await live.do("memdev-snapshot-delete", name="one")


async def test_without_a_directory(tmp_path: Path) -> None:
    """A gmemd that was given none says so."""
    live = LiveMachine()
    assert await live.do("query-memdev-snapshots") == []
    assert "no directory for snapshots" in await live.refused("memdev-snapshot-verify", name="s", job_id="v")
    await live.close()



async def test_a_file_of_qemus_is_imported(live: LiveMachine, tmp_path: Path) -> None:
    """As a snapshot of the object that its block is named after; what is no such file makes none."""
    memory = os.urandom(2 * PAGE).ljust(SIZE, b"\0")
    migration(tmp_path / "file", {"/objects/ram0": memory, "vga.vram": bytes(8 * PAGE)})
    (tmp_path / "other").write_bytes(b"QEVM")
    for file, more, words in (("other", {}, "file of QEMU"), ("file", {"block": "no"}, "no block"),
                              ("file", {"id": "1"}, "expects an identifier"), ("file", {}, "")):
        live.sent.append(os.open(tmp_path / file, os.O_RDONLY))
        await live.do("getfd", fdname="f")
        if words:
            assert words in await live.refused("memdev-snapshot-import", name="q", file="f", **more)
            assert await names(live) == []
    await live.do("memdev-snapshot-import", name="q", file="f", job_id="j")
    assert "error" not in await live.ended("j")
    found = await one(live, "q")
    assert (found["object"]["id"], found["object"]["size"], found["consistent"]) == ("ram0", SIZE, True)
    assert await live.do("memdev-restore", name="q") == {"id": "ram0"}
    assert contents(live, "ram0") == memory
    await live.do("closefd", fdname="f")
