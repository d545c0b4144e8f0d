"""Templates and clones: sealed for good, one copy of the memory, and nothing taken away from who uses it."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.changes.change import WithFds
from gmemd.client.running import RunningGmemd
from gmemd.kernel.program import worker_program
from tests.commands.live import LiveMachine
from tests.patience import wait_for

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 16 * PAGE

# Maps the descriptor 3 shared or privately, and writes to that many pages.
USER = """
import mmap, os, sys
memory = mmap.mmap(3, 0, getattr(mmap, sys.argv[1]), getattr(mmap, sys.argv[2], mmap.PROT_READ | mmap.PROT_WRITE))
os.close(3)
for page in range(int(sys.argv[3])):
    memory[page * mmap.PAGESIZE] = 7
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def user(fd: int, how: str, protection: str = "", pages: int = 0) -> Iterator[int]:
    """The process id of a process that has mapped a file; ended with the block."""
    with subprocess.Popen([sys.executable, "-c", USER, how, protection, str(pages)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, preexec_fn=lambda: os.dup2(fd, 3), pass_fds=(3,)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            yield child.pid
        finally:
            child.kill()


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    """A machine with a memfd "m" that has three pages of content; every fd is given back in the end."""
    worker_program()  # keeps a descriptor
    before = set(os.listdir("/proc/self/fd"))
    machine = LiveMachine()
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    fill(machine, "m")
    yield machine
    await machine.close()
    wait_for(lambda: set(os.listdir("/proc/self/fd")) == before)


def fd_of(live: LiveMachine, name: str) -> int:
    return live.gmemd.objects.find(name).fd


def fill(live: LiveMachine, name: str) -> None:
    for page in (0, 5, 15):
        with mmap.mmap(fd_of(live, name), SIZE) as memory:
            memory[page * PAGE:page * PAGE + 4] = b"page"


def content(live: LiveMachine, name: str) -> bytes:
    with mmap.mmap(fd_of(live, name), SIZE, prot=mmap.PROT_READ) as memory:
        return memory[:]


@contextmanager
def handed_out(reply: WithFds) -> Iterator[int]:
    [fd] = reply.fds
    try:
        yield fd
    finally:
        os.close(fd)


async def status(live: LiveMachine, name: str) -> dict[str, Any]:
    [found] = await live.do("query-memdev-status", id=name)
    return dict(found)


# -- freezing

async def test_frozen_memory_never_changes(live: LiveMachine) -> None:
    """No descriptor writes to it, whoever opened it, and gmemd refuses what would."""
    with handed_out(await live.do("memdev-get-fd", id="m")) as early:
        assert await live.do("memdev-freeze", id="m") == {}
        assert await live.do("memdev-freeze", id="m") == {}, "once more changes nothing"
        for write in (lambda: os.pwrite(early, b"x", 0), lambda: mmap.mmap(early, SIZE),
                      lambda: os.ftruncate(early, PAGE),
                      lambda: live.gmemd.kernel.punch_hole(fd_of(live, "m"), 0, PAGE)):
            with pytest.raises(OSError) as refused:
                write()
            assert refused.value.errno == errno.EPERM
    for command, arguments in (("memdev-discard", {"offset": 0, "size": PAGE}), ("memdev-delete", {"zero": True}),
                               ("memdev-populate", {})):
        assert await live.refused(command, id="m", **arguments) == \
            "object 'm' is frozen: its memory never changes again"
    assert (await status(live, "m"))["frozen"] is True
    assert content(live, "m")[5 * PAGE:5 * PAGE + 4] == b"page"


async def test_a_template_is_handed_out_for_reading(live: LiveMachine) -> None:
    """Read-only and of the same file; before it was frozen it is for writing."""
    with handed_out(await live.do("memdev-get-fd", id="m")) as fd:
        os.pwrite(fd, b"x", PAGE)
    await live.do("memdev-freeze", id="m")
    reply = await live.do("memdev-get-fd", id="m")
    assert reply.value["frozen"] is True
    with handed_out(reply) as fd:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        assert os.path.sameopenfile(fd, fd_of(live, "m"))
        with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[0] = 1
    assert content(live, "m")[0] == ord("p")


async def test_who_has_it_mapped_for_writing_is_named(live: LiveMachine) -> None:
    """A shared mapping keeps it from being frozen, even one for reading that may become one for writing."""
    for protection in ("", "PROT_READ"):
        with user(fd_of(live, "m"), "MAP_SHARED", protection) as pid:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            assert await live.refused("memdev-freeze", id="m") == (
                f"object 'm' is mapped for writing by process {pid} ({comm}): end that first, or clone the object with"
                " 'copy'")
    with user(fd_of(live, "m"), "MAP_PRIVATE"):
        await live.do("memdev-freeze", id="m")


async def test_what_takes_no_seals_is_said(live: LiveMachine, tmp_path: Path) -> None:
    for name, arguments, text in (
        ("g", {"qom_type": "memory-backend-guest-memfd"}, "object 'g' is a guest_memfd, which takes no seals"),
        ("f", {"qom_type": "memory-backend-file", "mem_path": str(tmp_path / "f"), "share": True},
         "object 'f' is a file, which takes no seals"),
        ("s", {"qom_type": "memory-backend-shm"}, "the memfd of 's' takes no more seals"),
        ("o", {"qom_type": "memory-backend-memfd", "seal": False}, "the memfd of 'o' takes no more seals"),
    ):
        await live.do("object-add", id=name, size=SIZE, **arguments)
        assert (await live.refused("memdev-freeze", id=name)).startswith(text)
    await live.do("object-add", id="r", size=SIZE, qom_type="memory-backend-ram")
    await live.do("memdev-freeze", id="r")


async def test_a_leased_object_is_not_frozen_by_others(live: LiveMachine) -> None:
    with user(fd_of(live, "m"), "MAP_PRIVATE") as pid:
        own, live.pid = live.pid, pid
        with handed_out(await live.do("memdev-get-fd", id="m", lease="keep")):
            live.pid = own
            assert "is leased to process" in await live.refused("memdev-freeze", id="m")
            await live.do("memdev-freeze", id="m", force=True)


# -- clones

async def test_a_clone_has_its_templates_pages(live: LiveMachine) -> None:
    """It takes no memory, and what its user writes is the user's own."""
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-clone", template="m", id="c1")
    await live.do("memdev-clone", template="c1", id="c2")
    assert os.path.sameopenfile(fd_of(live, "m"), fd_of(live, "c2"))
    clone = await status(live, "c2")
    assert (clone["template"], clone["frozen"], clone["resident"], clone["kind"]) == ("m", True, 3 * PAGE, "memfd")
    fates = {fate["event"]: fate["survives"] for fate in clone["survival"]}
    assert (fates["vmm-crash"], fates["client-disconnect"]) == (False, True)
    assert {fate["event"]: fate["survives"] for fate in (await status(live, "m"))["survival"]}["vmm-crash"]
    with handed_out(await live.do("memdev-get-fd", id="c1")) as fd, user(fd, "MAP_PRIVATE", pages=4) as pid:
        [group] = await live.do("query-memdev-clones")
        # the kernel fills a hole of the file before it copies the page
        assert (group["id"], group["clones"], group["resident"]) == ("m", ["c1", "c2"], 6 * PAGE)
        [one] = group["users"]
        assert (one["pid"], one["mapped"], one["written"]) == (pid, SIZE, 4 * PAGE)
        assert await live.do("query-memdev-clones", id="c2") == await live.do("query-memdev-clones", id="m")
    assert content(live, "m")[0] == ord("p")


async def test_a_template_counts_once(live: LiveMachine) -> None:
    """The bill's sums have its pages once, for the template's owner; each object says what it has in common."""
    before = await live.do("query-memdev-accounting", objects=10)
    assert (before["unique"], before["common"]) == (3 * PAGE, 0)
    await live.do("memdev-freeze", id="m")
    for name in ("c1", "c2", "c3"):
        await live.do("memdev-clone", template="m", id=name)
    await live.do("object-add", qom_type="memory-backend-ram", id="other", size=SIZE)
    fill(live, "other")
    bill = await live.do("query-memdev-accounting", objects=10)
    assert (bill["objects"], bill["size"], bill["resident"]) == (2, 2 * SIZE, 6 * PAGE)
    assert (bill["unique"], bill["common"]) == (3 * PAGE, 3 * PAGE)
    assert {row["id"]: (row["resident"], row["unique"], row["common"]) for row in bill["list"]} == {
        **dict.fromkeys(("m", "c1", "c2", "c3"), (3 * PAGE, 0, 3 * PAGE)), "other": (3 * PAGE, 3 * PAGE, 0)}
    for group in ("owners", "kinds", "nodes"):
        assert [(row["unique"], row["common"]) for row in bill[group]] == [(3 * PAGE, 3 * PAGE)]


async def test_what_cannot_share_is_said(live: LiveMachine, tmp_path: Path) -> None:
    await live.do("object-add", id="g", size=SIZE, qom_type="memory-backend-guest-memfd")
    await live.do("object-add", id="f", size=SIZE, qom_type="memory-backend-file", mem_path=str(tmp_path / "f"))
    assert await live.refused("memdev-clone", template="g", id="c") == \
        "object 'g' is a guest_memfd, which cannot be mapped privately: only 'copy' can clone it"
    assert (await live.refused("memdev-clone", template="f", id="c")).startswith("object 'f' is a file")
    assert await live.refused("memdev-clone", template="m", id="c") == \
        "object 'm' is not frozen: memdev-freeze makes it a template, or use 'copy'"
    await live.do("memdev-freeze", id="m")
    assert await live.refused("memdev-clone", template="m", id="c", job_id="j") == "parameter 'job-id' needs 'copy'"
    assert "duplicate property 'g'" in await live.refused("memdev-clone", template="m", id="g")
    await live.do("memdev-clone", template="m", id="c")


async def test_what_a_template_is_of_is_kept(live: LiveMachine) -> None:
    """Also if it is said later."""
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-freeze", id="m", origin="snapshot 1")
    await live.do("memdev-freeze", id="m")
    [group] = await live.do("query-memdev-clones")
    assert (group["origin"], group["clones"]) == ("snapshot 1", [])


async def test_neither_template_nor_clone(live: LiveMachine) -> None:
    assert "is neither a template nor a clone" in await live.refused("query-memdev-clones", id="m")
    assert await live.do("query-memdev-clones") == []


# -- deleting

async def test_a_template_with_clones_stays(live: LiveMachine) -> None:
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-clone", template="m", id="c")
    assert await live.refused("object-del", id="m") == \
        "object 'm' is the template of 'c': delete them first, or use 'force'"
    await live.do("memdev-delete", id="m", force=True)
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)  # is not its template
    [group] = await live.do("query-memdev-clones")
    assert (group["id"], group["clones"], group["resident"]) == ("m", ["c"], 3 * PAGE)
    await live.do("object-del", id="m")
    await live.do("object-del", id="c")
    assert await live.do("query-memdev-clones") == []


@pytest.mark.parametrize("delete", ["object-del", "memdev-delete"])
async def test_a_template_whose_clones_are_in_use_stays(live: LiveMachine, delete: str) -> None:
    """Also when the clone itself is deleted: its user still has the template's pages."""
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-clone", template="m", id="c")
    with handed_out(await live.do("memdev-get-fd", id="c")) as fd, user(fd, "MAP_PRIVATE") as pid:
        await live.do("object-del", id="c")
        assert f"object 'm' is a template and mapped by process {pid} (" in await live.refused(delete, id="m")
    await live.do(delete, id="m")


async def test_a_job_deletes_a_template(live: LiveMachine) -> None:
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-clone", template="m", id="c")
    await live.do("memdev-delete", id="m", job_id="j")
    assert "is the template of 'c'" in (await live.ended("j"))["error"]
    await live.do("object-del", id="c")
    await live.do("memdev-delete", id="m", job_id="k")
    assert "error" not in await live.ended("k")
    assert "not found" in await live.refused("object-del", id="m")


# -- copies

@pytest.mark.parametrize("kernel", ["simulated", pytest.param("kvm", marks=pytest.mark.kvm)])
@pytest.mark.parametrize(("arguments", "kind"), [
    ({"qom_type": "memory-backend-memfd"}, "memfd"), ({"qom_type": "memory-backend-ram"}, "memfd"),
    ({"qom_type": "memory-backend-shm"}, "memfd"), ({"qom_type": "memory-backend-guest-memfd"}, "guest-memfd"),
    ({"qom_type": "memory-backend-memfd", "guest_memfd": "on"}, "guest-memfd"),
    ({"qom_type": "memory-backend-file", "mem_path": "f", "share": True, "offset": 2 * PAGE}, "memfd"),
])
async def test_a_copy_has_the_content(tmp_path: Path, kernel: str, arguments: dict[str, Any], kind: str) -> None:
    """Of every kind; holes stay holes, in both."""
    live = LiveMachine(kernel)
    if "mem_path" in arguments:
        arguments = {**arguments, "mem_path": str(tmp_path / "f")}
    await live.do("object-add", id="s", size=SIZE, **arguments)
    offset = arguments.get("offset", 0)
    with mmap.mmap(fd_of(live, "s"), SIZE, offset=offset) as memory:
        memory[5 * PAGE:5 * PAGE + 4] = b"page"
    await live.do("memdev-clone", template="s", id="c", copy=True)
    copied = await status(live, "c")
    assert (copied["kind"], copied["resident"], copied["size"], copied["offset"]) == (kind, PAGE, SIZE, 0)
    assert "template" not in copied
    assert "frozen" not in copied
    assert content(live, "c") == bytes(5 * PAGE) + b"page" + bytes(11 * PAGE - 4)
    if "offset" not in arguments:
        assert (await status(live, "s"))["resident"] == PAGE
    fill(live, "c")
    await live.close()


async def test_a_copy_of_a_template_can_be_written(live: LiveMachine) -> None:
    await live.do("memdev-freeze", id="m")
    await live.do("memdev-clone", template="m", id="c")
    for source in ("m", "c"):
        await live.do("memdev-clone", template=source, id=f"{source}-copy", copy=True, job_id=f"j-{source}")
        assert "error" not in await live.ended(f"j-{source}")
        assert content(live, f"{source}-copy") == content(live, "m")
        fill(live, f"{source}-copy")


async def test_what_may_change_is_not_copied(live: LiveMachine) -> None:
    with user(fd_of(live, "m"), "MAP_SHARED") as pid:
        assert f"object 'm' is held by process {pid}" in \
            await live.refused("memdev-clone", template="m", id="c", copy=True, fence={"via": "idle"})
        await live.do("memdev-clone", template="m", id="fenced", copy=True)  # which stops it for a moment
        await live.do("memdev-clone", template="m", id="unfenced", copy=True, fence={"via": "unfenced"})
        assert content(live, "fenced") == content(live, "m")
        assert await live.refused("memdev-clone", template="m", id="c", copy=True, device_state=True) == \
            "parameter 'device-state' needs a fence by 'qmp', and no job"
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private")
    assert await live.refused("memdev-clone", template="g", id="c", copy=True) == \
        "a part of object 'g' is private: make it shared first"
    await live.do("memdev-clone", template="m", id="c", copy=True)


async def test_a_copy_without_room_leaves_nothing(live: LiveMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, fd: int | None = None) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        patched.setattr(live.gmemd.kernel, "check_headroom", full)
        assert await live.refused("memdev-clone", template="m", id="c", copy=True) == \
            "cannot copy 'm': Cannot allocate memory"
    await live.do("memdev-clone", template="m", id="c", copy=True)


# -- afterwards

async def test_a_template_without_a_record_is_claimed(live: LiveMachine) -> None:
    """What came back from the service manager is not lost because it is frozen; adopting it is refused as before."""
    await live.do("memdev-freeze", id="m")
    with handed_out(await live.do("memdev-get-fd", id="m")) as fd:
        live.sent = [os.dup(fd)]
        await live.do("getfd", fdname="f")
        assert "opened for reading and writing" in await live.refused("memdev-adopt", id="t", fdname="f")
        await live.do("closefd", fdname="f")
        live.gmemd.unclaimed.append(("m-1", os.dup(fd)))
    await live.do("memdev-claim", name="m-1", id="t")
    assert (await status(live, "t"))["frozen"] is True
    await live.do("memdev-clone", template="t", id="c")


def test_clones_outlive_the_daemon() -> None:
    """Killed and restarted, it still knows the template and its clones, and hands them out for reading."""
    with RunningGmemd(keep=True) as gmemd:
        with gmemd.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "m", "size": SIZE})
            client.execute("memdev-freeze", {"id": "m", "origin": "here"})
            for name in ("c1", "c2"):
                client.execute("memdev-clone", {"template": "m", "id": name})
            client.execute("memdev-clone", {"template": "m", "id": "own", "copy": True})
        gmemd.crash()
        with gmemd.client() as client:
            [group] = client.execute("query-memdev-clones")
            assert (group["id"], group["origin"], group["clones"], group["users"]) == ("m", "here", ["c1", "c2"], [])
            value, [fd] = client.execute_fds("memdev-get-fd", {"id": "c2"})
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            os.close(fd)
            assert value["frozen"] is True
            client.execute("memdev-persist", {"id": "c1", "persist": False})
            client.execute("memdev-persist", {"id": "c1", "persist": True})
            for name in ("c1", "c2", "m", "own"):
                client.execute("object-del", {"id": name})
