"""What a command works on is claimed when it is judged, and no descriptor's number outlives its descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from gmemd.changes.completed import completed
from gmemd.errors import QmpError
from gmemd.qmp.session import Request
from tests.commands.live import LiveMachine
from tests.patience import PATIENCE

SIZE = 16 << 20
WHOLE = {"id": "m", "offset": 0, "size": SIZE}

LONG = {
    "convert": ("memdev-convert", WHOLE | {"to": "private", "preserve": True}),
    "convert, nothing preserved": ("memdev-convert", WHOLE | {"to": "private"}),
    "discard": ("memdev-discard", WHOLE),
    "populate": ("memdev-populate", {"id": "m"}),
    "wipe": ("memdev-delete", {"id": "m", "zero": True}),
    "set prealloc": ("qom-set", {"path": "/objects/m", "property": "prealloc", "value": True}),
}
CHANGES = LONG | {
    "delete": ("object-del", {"id": "m"}),
    "convert a page": ("memdev-convert", WHOLE | {"size": 4096, "to": "private"}),
    "set merge": ("qom-set", {"path": "/objects/m", "property": "merge", "value": False}),
    "lease": ("memdev-get-fd", {"id": "m", "lease": "keep"}),
}


@pytest.fixture
async def machine() -> AsyncIterator[LiveMachine]:
    """One with a guest_memfd 'm'; all memory has been given back in the end."""
    before = memory()
    live = LiveMachine()
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="m", size=SIZE)
    yield live
    await live.close()
    async with asyncio.timeout(PATIENCE):  # some are closed off the loop, or in a later turn of it
        while memory() != before:
            await asyncio.sleep(0.001)


def memory() -> list[str]:
    """The memfds that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(link for link in found if link.startswith("/memfd:"))


def judged(machine: LiveMachine, command: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    """The work of a command that was judged, before it begins."""
    work = machine.dispatcher.run(Request(command, arguments, None), machine.session, machine)
    assert isinstance(work, Coroutine)
    return work


@pytest.mark.parametrize("long", LONG)
async def test_judged_work_is_work(machine: LiveMachine, long: str) -> None:
    """Between its judgement and its begin every other change is refused, and says why; afterwards it works."""
    work = judged(machine, *LONG[long])
    for command, arguments in CHANGES.values():
        with pytest.raises(QmpError, match="object 'm' is busy: "):
            machine.dispatcher.run(Request(command, arguments, None), machine.session, machine)
    await work
    if long != "wipe":
        await machine.do("object-del", id="m")


@pytest.mark.parametrize("job", [("memdev-populate", {"id": "m"}), ("memdev-delete", {"id": "m", "zero": True})],
                         ids=["populate", "wipe"])
async def test_a_job_claims_as_well(machine: LiveMachine, job: tuple[str, dict[str, Any]]) -> None:
    """A job holds its object from the reply that it has begun; a job that cannot begin claims nothing."""
    command, arguments = job
    with pytest.raises(QmpError, match="Invalid job ID"):
        machine.dispatcher.run(Request(command, arguments | {"job-id": "0"}, None), machine.session, machine)
    machine.dispatcher.run(Request(command, arguments | {"job-id": "j"}, None), machine.session, machine)
    assert await machine.refused("object-del", id="m") == machine.gmemd.objects.find("m").busy.join(
        ("object 'm' is busy: ", ""))
    await machine.ended("j")
    if command == "memdev-populate":
        await machine.do("object-del", id="m")


async def test_a_lease_is_given_once(machine: LiveMachine) -> None:
    """A command in the same turn finds it taken; it does not replace another's lease."""
    machine.pid = os.getppid()
    reply = machine.dispatcher.run(
        Request("memdev-get-fd", {"id": "m", "lease": "keep"}, None), machine.session, machine)
    machine.pid = os.getpid()
    assert "is leased to process" in await machine.refused("memdev-get-fd", id="m", lease="keep")
    for fd in (await completed(reply)).fds:
        os.close(fd)


READERS = {
    "holders": ("query-memdev-holders", {"id": "m"}),
    "accounting": ("query-memdev-accounting", {}),
    "status": ("query-memdev-status", {}),
}


@pytest.mark.parametrize("reader", READERS)
async def test_a_reader_has_a_descriptor_of_its_own(machine: LiveMachine, reader: str) -> None:
    """An object deleted while it is measured is not an error, nor confused with other memory under the same fd."""
    for other in range(30):  # so many that a thread measures them
        await machine.do("object-add", qom_type="memory-backend-memfd", id=f"x{other}", size=1 << 30)
    number = machine.gmemd.objects.find("m").fd
    work = judged(machine, *READERS[reader])
    await machine.do("object-del", id="m")
    innocent = _at(number)
    try:
        answer = await work
        assert "4096" not in str(answer)  # its page, or its holder's
    finally:
        os.close(innocent)


async def test_a_job_that_reads_has_one_as_well(machine: LiveMachine) -> None:
    """The digests are those of the object, though it is deleted before the worker starts."""
    await machine.do("object-add", qom_type="memory-backend-memfd", id="s", size=4096)
    fd = machine.gmemd.objects.find("s").fd
    for command, arguments in (("memdev-verify", {"id": "s", "job-id": "v"}), ("object-del", {"id": "s"})):
        machine.dispatcher.run(Request(command, arguments, None), machine.session, machine)  # with no turn between
    innocent = _at(fd)
    try:
        assert "error" not in await machine.ended("v")
        assert await machine.do("query-memdev-digests", job_id="v") == []  # it was empty; the other is not
    finally:
        os.close(innocent)


def _at(number: int) -> int:
    """A memfd with content under a number that is free."""
    fd = os.memfd_create("innocent")
    os.write(fd, b"V" * 4096)
    if fd != number:
        assert not os.path.exists(f"/proc/self/fd/{number}")
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    return number


async def test_given_up_while_claimed(machine: LiveMachine) -> None:
    """The descriptor of an object whose creation is undone stays open for as long as somebody works on it."""
    backend = machine.gmemd.objects.find("m")
    fd = backend.fd
    backend.claim("somebody works on it")
    machine.gmemd.objects.remove("m").abandon()
    assert os.fstat(fd).st_size == SIZE
    assert backend.unclaim("somebody works on it") == [fd]
    os.close(fd)


async def test_the_work_of_an_object_that_is_gone(machine: LiveMachine) -> None:
    """Nothing is written about an object whose creation was undone before the work on it began."""
    work = judged(machine, *LONG["populate"])
    fd = machine.gmemd.objects.find("m").fd
    machine.gmemd.objects.remove("m").abandon()
    with pytest.raises(QmpError, match="object 'm' not found"):
        await work
    async with asyncio.timeout(PATIENCE):  # it is closed off the loop
        while os.path.exists(f"/proc/self/fd/{fd}"):
            await asyncio.sleep(0.001)
