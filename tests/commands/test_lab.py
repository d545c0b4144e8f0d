"""The fault lab: every error that it injects reaches the client, and the object is then as before."""

from __future__ import annotations

import errno
import inspect
import mmap
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
import pytest_asyncio

from gmemd.commands import lab as commands
from gmemd.commands.dispatch import MODULES
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.linux import LinuxKernel
from gmemd.kernel.simulated import SimulatedKernel
from gmemd.lab import Lab, LabKernel, LabNotifier
from gmemd.schema.validate import Schema
from tests.commands.conftest import Machine
from tests.commands.live import LiveMachine

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE


class LabMachine(LiveMachine):
    """A machine with the fault lab before its kernel; sleeping is only written down, in seconds."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        lab = Lab()
        super().__init__(LabKernel(choose_kernel("simulated"), lab, sleep=self.slept.append), lab=lab,
                         schema=Schema.load(lab=True), modules=(*MODULES, commands))


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LabMachine]:
    """A machine with the lab and the guest_memfd `g` of eight pages, of which the first two have content."""
    machine = LabMachine()
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    os.pwrite(machine.gmemd.objects.find("g").fd, b"c" * 2 * PAGE, 0)
    yield machine
    await machine.close()


async def state(machine: LabMachine) -> dict[str, Any]:
    """All that can be seen of the object `g`, its content and its store's included."""
    backend = machine.gmemd.objects.find("g")
    with mmap.mmap(backend.fd, SIZE) as memory:
        seen: dict[str, Any] = {"resident": machine.gmemd.kernel.resident_ranges(backend.fd, 0, SIZE)}
        seen["content"] = [memory[at] for at in range(0, 2 * PAGE, PAGE)]
    status = (await machine.do("query-memdev-status"))[0]
    seen["status"] = {name: value for name, value in status.items() if name != "age"}
    seen["ranges"] = await machine.do("query-memdev-ranges", id="g")
    seen["aside"] = os.fstat(backend.aside.fd).st_blocks if backend.aside is not None else 0
    seen["properties"] = await machine.do("qom-list-get", paths=["/objects/g"])
    return seen


def test_without_the_lab_there_is_nothing() -> None:
    """The commands are not found and not listed."""
    machine = Machine()
    found = ("CommandNotFound", "The command x-memdev-inject has not been found")
    assert machine.refusal("x-memdev-inject", operation="create", errno="ENOMEM") == found
    listed = [entry["name"] for entry in Schema.load().introspection() if entry["meta-type"] == "command"]
    assert [name for name in listed if "inject" in name] == []
    assert sum("inject" in entry["name"] for entry in Schema.load(lab=True).introspection()) == 3
    machine.gmemd.close()


FAULTS = [
    ("create", {}, "object-add", {"qom_type": "memory-backend-memfd", "id": "n", "size": SIZE},
     "failed to create memfd with flags 0x3: {}"),
    ("create", {}, "object-add", {"qom_type": "memory-backend-guest-memfd", "id": "n", "size": SIZE},
     "Error creating KVM guest_memfd: {}"),
    ("populate", {}, "object-add", {"qom_type": "memory-backend-memfd", "id": "n", "size": SIZE, "prealloc": True},
     "qemu_prealloc_mem: preallocating memory failed: {}"),
    ("populate", {"offset": 5 * PAGE}, "memdev-populate", {"id": "g"},
     "qemu_prealloc_mem: preallocating memory failed: {}"),
    ("convert", {}, "memdev-convert", {"id": "g", "offset": 0, "size": SIZE, "to": "private"},
     "cannot convert 'g': {}"),
    ("convert", {}, "memdev-convert", {"id": "g", "offset": 0, "size": SIZE, "to": "private", "preserve": True},
     "cannot convert 'g': {}"),
    ("create", {}, "memdev-convert", {"id": "g", "offset": 0, "size": SIZE, "to": "private", "preserve": True},
     "cannot convert 'g': {}"),
    ("hand-out", {}, "memdev-get-fd", {"id": "g"}, "cannot hand out 'g': {}"),
]


@pytest.mark.parametrize(("operation", "how", "command", "arguments", "sentence"), FAULTS)
@pytest.mark.parametrize("name", ["ENOMEM", "ENOSPC", "EIO", "EMFILE", "EINTR"])
async def test_an_error_reaches_the_client(live: LabMachine, operation: str, how: dict[str, Any], command: str,
                                           arguments: dict[str, Any], sentence: str, name: str) -> None:
    """The reply is an error with the errno's words, nothing has changed, and the next try works."""
    before = await state(live)
    await live.do("x-memdev-inject", operation=operation, errno=name, **how)
    refusal = await live.refused(command, **arguments)
    assert refusal == sentence.format(os.strerror(getattr(errno, name)))
    assert await state(live) == before
    assert live.events == []
    assert await live.do("x-query-memdev-injections") == []
    result = await live.do(command, **arguments)
    if command == "memdev-get-fd":
        os.close(result.fds.pop())


async def test_a_conversion_stops_at_a_page_in_use(live: LabMachine) -> None:
    """EAGAIN names the page; nothing was converted; the retry succeeds (items 68 and 69 of the checklist)."""
    before = await state(live)
    await live.do("x-memdev-inject", operation="convert", offset=PAGE)
    arguments: dict[str, Any] = {"id": "g", "offset": 0, "size": SIZE, "to": "private", "preserve": True}
    assert await live.refused("memdev-convert", **arguments) \
        == f"cannot convert 'g': Resource temporarily unavailable at offset {PAGE:#x}"
    assert await state(live) == before
    await live.do("memdev-convert", **arguments)
    await live.do("memdev-convert", **{**arguments, "to": "shared"})
    assert (await state(live))["content"] == before["content"]


async def test_a_failure_does_not_leave_bytes_for_later(live: LabMachine) -> None:
    """What was kept aside for a conversion that failed never comes back."""
    await live.do("x-memdev-inject", operation="convert", errno="EIO")
    await live.refused("memdev-convert", id="g", offset=0, size=SIZE, to="private", preserve=True)
    await live.do("memdev-convert", id="g", offset=0, size=SIZE, to="private")
    await live.do("memdev-convert", id="g", offset=0, size=SIZE, to="shared", preserve=True)
    assert (await state(live))["content"] == [0, 0]


async def test_a_population_that_stops_halfway_gives_all_back(live: LabMachine) -> None:
    """Pages that were there stay, whatever was handed out."""
    await live.do("x-memdev-inject", operation="populate", errno="ENOMEM", offset=4 * PAGE + 1)
    await live.do("memdev-populate", id="g", job_id="p")
    assert (await live.ended("p"))["error"].endswith("Cannot allocate memory")
    assert (await state(live))["resident"] == [(0, 2 * PAGE)]
    os.close((await live.do("memdev-get-fd", id="g")).fds.pop())
    await live.do("x-memdev-inject", operation="populate", errno="ENOMEM", offset=4 * PAGE + 1)
    await live.refused("memdev-populate", id="g")
    assert (await state(live))["resident"] == [(0, 5 * PAGE)]  # a holder may have written there already


async def test_counting_decides(live: LabMachine) -> None:
    """The n-th is struck, once or each time; other operations do not count."""
    await live.do("x-memdev-inject", operation="hand-out", errno="EIO", nth=3)
    await live.do("x-memdev-inject", operation="hand-out", errno="EMFILE", nth=4, repeat=True)

    async def outcomes(count: int) -> str:
        found = ""
        for _ in range(count):
            try:
                os.close((await live.do("memdev-get-fd", id="g")).fds.pop())
                found += "."
            except Exception as exc:
                found += "I" if "Input/output" in str(exc) else "M"
        return found

    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private")
    assert await outcomes(9) == "..IM...M."
    assert await live.do("x-query-memdev-injections") == [
        {"injection": 2, "operation": "hand-out", "nth": 4, "errno": "EMFILE", "delay": 0, "repeat": True, "seen": 9,
         "struck": 2}]
    assert await live.refused("x-memdev-inject-clear", injection=1) == "unknown injection 1"
    await live.do("x-memdev-inject-clear", injection=2)
    assert await outcomes(4) == "...."
    await live.do("x-memdev-inject", operation="convert", delay=10, nth=2)
    await live.do("x-memdev-inject-clear")
    assert await live.do("x-query-memdev-injections") == []


async def test_delays(live: LabMachine) -> None:
    """An operation may also only take its time."""
    await live.do("x-memdev-inject", operation="create", delay=1500)
    await live.do("object-add", qom_type="memory-backend-memfd", id="n", size=SIZE)
    assert live.slept == [1.5]


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"operation": "create", "errno": "ENONSENSE"}, "unknown errno 'ENONSENSE'"),
    ({"operation": "create", "errno": "ENOMEM", "nth": 0}, "parameter 'nth' counts from 1"),
    ({"operation": "create", "errno": "ENOMEM", "offset": 0}, "parameter 'offset' is for populate and convert only"),
    ({"operation": "convert", "errno": "EIO", "offset": 0}, "a conversion that stops at an offset fails with EAGAIN"),
    ({"operation": "populate", "offset": 0}, "parameter 'offset' needs 'errno'"),
    ({"operation": "store"}, "one of 'errno', 'offset' and 'delay' is needed"),
])
async def test_what_makes_no_sense(live: LabMachine, arguments: dict[str, Any], reason: str) -> None:
    """Contradictions are refused, and nothing is injected."""
    assert await live.refused("x-memdev-inject", **arguments) == reason
    assert await live.do("x-query-memdev-injections") == []


def test_the_lab_is_a_kernel() -> None:
    """What kernels do in their own way is left to the one behind the lab, and so is what they say of themselves."""
    own = {name for kind in (LinuxKernel, SimulatedKernel) for name, value in vars(kind).items()
           if callable(value) and not name.startswith("_")}
    assert own - vars(LabKernel).keys() == set()
    machine = LabMachine()
    assert [name for name in inspect.get_annotations(Kernel) if not hasattr(machine.gmemd.kernel, name)] == []
    machine.gmemd.close()


class Stored:
    """A notifier that writes down what it is to store."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def store(self, names: Sequence[str], fds: Sequence[int], ask: bool = False) -> int:
        self.names += names
        return -1

    def fileno(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_the_store_fails_or_waits() -> None:
    """A failure is the notifier's OSError; a delay asks to be tried again once the gate is writable."""
    lab, inner = Lab(), Stored()
    notifier = LabNotifier(cast(Any, inner), lab)
    lab.inject("store", code=errno.ENOBUFS)
    with pytest.raises(OSError, match="No buffer space") as caught:
        notifier.store(["a"], [1])
    assert caught.value.errno == errno.ENOBUFS
    lab.inject("store", seconds=0.001)
    with pytest.raises(BlockingIOError):
        notifier.store(["b"], [1])
    import select

    poll = select.poll()
    poll.register(notifier.fileno(), select.POLLOUT)
    assert poll.poll(5000)
    notifier.store(["b"], [1])
    assert inner.names == ["b"]
    assert notifier.fileno() == 0
    notifier.close()
