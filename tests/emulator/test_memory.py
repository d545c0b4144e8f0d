"""Memory devices and the objects they use; the sentences are those of QEMU."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gmemd.emulator.domain import Domain
from gmemd.errors import QmpError
from tests.daemon import Daemon
from tests.emulator.conftest import MIB, PC, Machine, Start
from tests.patience import PATIENCE

GIB = 1 << 30


async def plugged(machine: Machine, name: str, size: int = 128 * MIB, **more: Any) -> None:
    await machine.run("object-add", qom_type="memory-backend-memfd", id=f"mem{name}", size=size)
    await machine.run("device_add", driver="pc-dimm", id=name, memdev=f"mem{name}", **more)


async def test_dimms_get_slots_and_addresses(start: Start) -> None:
    """Dimms begin at 4 GiB, one behind the other, in the first free slots; their sum is plugged memory."""
    machine = await start()
    await plugged(machine, "d0")
    await plugged(machine, "d1", 3 * MIB)
    first, second = [entry["data"] for entry in await machine.run("query-memory-devices")]
    assert first == {"memdev": "/objects/memd0", "id": "d0", "addr": 4 * GIB, "size": 128 * MIB, "slot": 0, "node": 0,
                     "hotplugged": True, "hotpluggable": True}
    assert (second["addr"], second["slot"]) == (4 * GIB + 128 * MIB, 1)
    summary = await machine.run("query-memory-size-summary")
    assert summary == {"base-memory": 64 * MIB, "plugged-memory": 131 * MIB}


async def test_dimm_refused(start: Start) -> None:
    """Every way in which QEMU refuses a dimm; afterwards the right one is plugged in."""
    machine = await start()
    for name, size in (("m0", 128), ("m1", 128), ("m3", 1024)):
        await machine.run("object-add", qom_type="memory-backend-memfd", id=name, size=size * MIB)

    async def add(**arguments: Any) -> str:
        return await machine.refusal("device_add", driver="pc-dimm", **arguments)

    assert await add(id="d0") == "'memdev' property must be set"
    assert await add(id="d0", memdev="nope") == "Device 'nope' not found"
    assert await add(id="d0", memdev="m0", node=3) == \
        "'DIMM property node has value 3' which exceeds the number of numa nodes: 1"
    assert await add(id="d0", memdev="m0", slot=9) == "invalid slot number 9, valid range is [0-1]"
    assert await add(id="d0", memdev="m0", node="x") == "Parameter 'node' expects uint64"
    assert await add(id="1x", memdev="m0") == "Invalid qdev ID '1x'"
    assert await add(id="d0", memdev="m0", foo=1) == "Property 'pc-dimm.foo' not found"
    await machine.run("device_add", driver="pc-dimm", id="d0", memdev="m0", slot=0)
    assert await add(id="d0", memdev="m1") == "Duplicate device ID 'd0'"
    assert await add(id="d1", memdev="m1", slot=0) == "slot 0 is busy"
    assert await add(id="d1", memdev="m0") == "can't use already busy memdev: m0"
    assert await add(id="d1", memdev="m3") == \
        "not enough space, currently 0x8000000 in use of total space for memory devices 0x3c000000"
    assert await add(id="d1", memdev="m1", addr=4 * GIB) == "address range conflicts with memory device id='d0'"
    await machine.run("device_add", driver="pc-dimm", id="d1", memdev="m1", addr=5 * GIB)
    await machine.run("object-add", qom_type="memory-backend-memfd", id="m2", size=MIB)
    assert await add(memdev="m2") == "no free slots available"


@pytest.mark.parametrize(("argv", "desc"), [
    (("-m", "64"), "no slots where allocated, please specify the 'slots' option"),
    (("-m", "64,slots=1,maxmem=1G", "-no-acpi"), "memory hotplug is not enabled: missing acpi device or acpi disabled"),
])
async def test_machine_without_room(argv: tuple[str, ...], desc: str, start: Start) -> None:
    """A machine without slots, ACPI or room takes no dimm."""
    machine = await start(*argv)
    await machine.run("object-add", qom_type="memory-backend-memfd", id="m0", size=MIB)
    assert await machine.refusal("device_add", driver="pc-dimm", memdev="m0") == desc


async def test_other_drivers(start: Start) -> None:
    """What is not memory is refused when plugged in, and kept when the command line names it."""
    disk = '{"driver":"virtio-blk-pci","id":"disk0","bus":"pci.0"}'
    machine = await start(*PC, "-device", disk, "-device", "usb-hub")
    assert await machine.refusal("device_add", driver="virtio-blk-pci") == \
        "'virtio-blk-pci' is not a valid device model name"
    assert await machine.refusal("device_add", driver="device") == \
        "Parameter 'driver' expects a non-abstract device type"
    assert await machine.refusal("device_add", driver="nvdimm") == "nvdimm is not enabled: missing 'nvdimm' in '-M'"
    assert await machine.refusal("device_add") == "Parameter 'driver' is missing"
    listed = {entry["name"]: entry["type"] for entry in await machine.run("qom-list", path="/machine/peripheral")}
    assert listed == {"type": "string", "disk0": "child<virtio-blk-pci>"}
    assert await machine.run("qom-get", path="/machine/peripheral-anon/device[0]", property="type") == "usb-hub"


async def test_unplug(start: Start) -> None:
    """DEVICE_DELETED follows the reply of device_del; the object is in use until then."""
    machine = await start()
    await plugged(machine, "d0")
    mapped = "Cannot delete host memory backend 'memd0' which is mapped"
    assert await machine.refusal("object-del", id="memd0") == mapped
    assert await machine.refusal("memdev-delete", id="memd0") == mapped
    assert await machine.refusal("device_del", id="nope") == "Device 'nope' not found"
    assert await machine.run("device_del", id="/machine/peripheral/d0") == {}
    assert machine.events == []
    assert await machine.run("device_del", id="d0") == {}
    assert await machine.refusal("object-del", id="memd0") == mapped
    assert await machine.wait_event("DEVICE_DELETED") == {"device": "d0", "path": "/machine/peripheral/d0"}
    assert await machine.run("query-memory-devices") == []
    assert await machine.run("object-del", id="memd0") == {}


async def test_machines_memory_stays(start: Start) -> None:
    """Memory of the machine cannot be deleted, however it was named."""
    r0 = ("-object", "memory-backend-memfd,id=r0,size=64M", "-m", "64")
    for more in (("-machine", "pc,memory-backend=r0"), ("-numa", "node,memdev=r0")):
        machine = await start(*r0, *more)
        assert await machine.refusal("object-del", id="r0") == "Cannot delete host memory backend 'r0' which is mapped"


async def test_virtio_mem_follows_its_requested_size(start: Start) -> None:
    """A running machine takes at once what is asked for, a stopped one when it runs; what it lets go is freed."""
    machine = await start(*PC, "-S")
    await machine.run("object-add", qom_type="memory-backend-memfd", id="v0", size=64 * MIB)
    arguments = {"driver": "virtio-mem-pci", "id": "v", "memdev": "v0", "bus": "pci.0", "addr": "0x3"}
    await machine.execute("device_add", {**arguments, "requested-size": 8 * MIB})
    assert machine.events == []
    await machine.run("cont")
    change = {"id": "v", "size": 8 * MIB, "qom-path": "/machine/peripheral/v"}
    assert machine.events == [("RESUME", {}), ("MEMORY_DEVICE_SIZE_CHANGE", change)]
    backend = machine.gmemd.objects.find("v0")
    machine.gmemd.kernel.allocate(backend.fd, 0, 8 * MIB)
    await machine.run("qom-set", path="v", property="requested-size", value=2 * MIB)
    assert machine.gmemd.kernel.resident(backend.fd) == 2 * MIB
    [entry] = await machine.run("query-memory-devices")
    assert entry == {"type": "virtio-mem", "data": {
        "memdev": "/objects/v0", "memaddr": 4 * GIB, "requested-size": 2 * MIB, "size": 2 * MIB, "max-size": 64 * MIB,
        "block-size": 2 * MIB, "node": 0, "id": "v"}}


async def test_virtio_mem_refused(start: Start) -> None:
    """Sizes too large or not in whole blocks are refused; it is removed only when the guest uses none of it."""
    machine = await start()
    await machine.run("object-add", qom_type="memory-backend-memfd", id="v0", size=64 * MIB)

    async def add(**more: Any) -> str:
        return await machine.refusal("device_add", driver="virtio-mem-pci", id="v", **more)

    assert await add() == "'memdev' property must be set"
    assert await add(memdev="v0", requested_size=3) == \
        "'requested-size' property has to be multiples of 'block-size' (0x200000)"
    assert (await add(memdev="v0", node=7)).startswith("'node' property has value '7'")
    assert "power of two" in await add(memdev="v0", block_size=3 * MIB)
    await machine.run("device_add", driver="virtio-mem-pci", id="v", memdev="v0")

    async def request(value: Any) -> str:
        return await machine.refusal("qom-set", path="v", property="requested-size", value=value)

    assert await request(GIB) == "'requested-size' cannot exceed the memory backend size(0x4000000)"
    assert await request("x") == "Parameter 'requested-size' expects uint64"
    assert await machine.refusal("qom-set", path="v", property="size", value=1) == \
        "Property 'virtio-mem.size' is not writable"
    await machine.run("qom-set", path="v", property="requested-size", value=2 * MIB)
    assert await machine.refusal("device_del", id="v") == \
        "virtio-mem device cannot get unplugged while some of its memory is still plugged"
    await machine.run("stop")
    await machine.run("qom-set", path="v", property="requested-size", value=0)
    await machine.run("cont")
    await machine.run("device_del", id="v")
    await machine.wait_event("DEVICE_DELETED")


async def test_balloon(start: Start) -> None:
    """A balloon keeps the number it is told, and says when it changes; without one there is none."""
    machine = await start()
    assert await machine.refusal("query-balloon") == "No balloon device has been activated"
    await machine.run("device_add", driver="virtio-balloon-pci", id="b")
    assert await machine.refusal("device_add", driver="virtio-balloon-pci") == "Only one balloon device is supported"
    assert await machine.refusal("balloon", value=0) == "Parameter 'value' expects a size"
    await machine.run("balloon", value=32 * MIB)
    assert await machine.run("query-balloon") == {"actual": 32 * MIB}
    assert machine.events == [("BALLOON_CHANGE", {"actual": 32 * MIB})]
    stats = await machine.run("qom-get", path="b", property="guest-stats")
    assert stats["last-update"] == 0


async def test_kept_objects(start: Start) -> None:
    """A secret and a thread-context are there by name; the secret itself is never shown."""
    machine = await start(*PC, "-object", "secret,id=s0,data=hidden", "-object", "thread-context,id=t0,node-affinity=0")
    listed = {entry["name"]: entry["type"] for entry in await machine.run("qom-list", path="/objects")}
    assert (listed["s0"], listed["t0"]) == ("child<secret>", "child<thread-context>")
    assert "hidden" not in json.dumps(await machine.run("qom-list-get", paths=["/objects/s0"]))
    taken = "attempt to add duplicate property 's0' to object (type 'container')"
    assert await machine.refusal("object-add", qom_type="thread-context", id="s0") == taken
    assert await machine.refusal("object-add", qom_type="memory-backend-ram", id="s0", size=4096) == taken
    assert await machine.refusal("object-add", qom_type="secret", id="1", data="x") == \
        "Parameter 'id' expects an identifier"
    await machine.run("object-add", qom_type="memory-backend-ram", id="r", size=4096, prealloc_context="t0")
    assert await machine.refusal("object-add", qom_type="memory-backend-ram", id="q", size=4096, prealloc_context="r") \
        == "Invalid parameter type for 'prealloc-context', expected: thread-context"
    for object_id in ("s0", "t0"):
        await machine.run("object-del", id=object_id)
    await machine.run("object-add", qom_type="memory-backend-ram", id="s0", size=4096)


# -- objects in a running gmemd


async def test_lasting_objects(start: Start, daemon: Daemon) -> None:
    """The next emulator of the same domain has the same bytes; object-del deletes them for good."""
    argv = ("-m", "1", "-name", "a b", "-object", "memory-backend-memfd,id=r0,size=1M,seal=off",
            "-machine", "pc,memory-backend=r0")
    with daemon.client() as client:
        for turn in range(2):
            machine = await start(*argv, socket=str(daemon.sock))
            await machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=4096, guest_memfd="on",
                              prealloc=True, prealloc_threads=turn + 1)
            assert sorted(entry["id"] for entry in client.execute("query-memdev")) == ["vm-a_20_b.r0", "vm-a_20_b.x"]
            kernel, fd = machine.gmemd.kernel, machine.gmemd.objects.find("r0").fd
            assert kernel.resident(fd) == turn * 4096
            kernel.allocate(fd, 0, 4096)
            machine.close()
        machine = await start(*argv, socket=str(daemon.sock))
        await machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=4096, guest_memfd="on")
        assert machine.gmemd.objects.find("x").kind == "guest-memfd"
        assert await machine.refusal("object-del", id="r0") == "Cannot delete host memory backend 'r0' which is mapped"
        assert "kept by another gmemd" in await machine.refusal("memdev-delete", id="x")
        await machine.run("object-del", id="x")
        assert [entry["id"] for entry in client.execute("query-memdev")] == ["vm-a_20_b.r0"]


async def test_lasting_object_of_another_kind(start: Start, daemon: Daemon) -> None:
    """What an earlier run left is used only if it is what is asked for."""
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    await machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=4096)
    again = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    left = "object 'x' is left from an earlier run with another '{}': delete it first"
    assert await again.refusal("object-add", qom_type="memory-backend-memfd", id="x", size=8192) == left.format("size")
    assert await again.refusal("object-add", qom_type="memory-backend-ram", id="x", size=4096) == \
        left.format("qom-type")
    await again.run("object-add", qom_type="memory-backend-memfd", id="x", size=4096, prealloc=True)
    with daemon.client() as client:
        assert client.execute("qom-get", {"path": "/objects/vm-n.x", "property": "prealloc"}) is True


async def test_lasting_refused(start: Start, daemon: Daemon, tmp_path: Path) -> None:
    """No name, no daemon, an object that the daemon refuses: the client hears of its own id."""
    machine = await start("-machine", "none", socket=str(daemon.sock))
    add = {"qom_type": "memory-backend-memfd", "id": "x", "size": 4096}
    assert await machine.refusal("object-add", **add) == "memory that outlasts the emulator needs -uuid or -name"
    machine = await start("-machine", "none", "-name", "n", socket=str(tmp_path / "none"))
    assert "does not answer" in await machine.refusal("object-add", **add)
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    missing = {"qom_type": "memory-backend-file", "id": "f", "size": 4096, "mem_path": f"{tmp_path}/no/f"}
    assert await machine.refusal("object-add", **missing) == \
        f"can't open backing store {tmp_path}/no/f for guest RAM: No such file or directory"
    await machine.run("object-add", **add)


async def test_lasting_files_keep_their_data(start: Start, daemon: Daemon, tmp_path: Path) -> None:
    """discard-data is for the end of the object, not for that of the emulator which uses it."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 4096)
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    await machine.run("object-add", qom_type="memory-backend-file", id="x", size=4096, mem_path=str(path), share=True,
                      discard_data=True)
    machine.close()
    assert path.read_bytes() == b"x" * 4096
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    await machine.run("object-add", qom_type="memory-backend-file", id="x", size=4096, mem_path=str(path), share=True,
                      discard_data=True)
    await machine.run("object-del", id="x")
    assert path.read_bytes() == bytes(4096)


class Slow(Domain):
    """A gmemd whose answers are held back until `go` is set."""

    def __init__(self, path: str) -> None:
        super().__init__(path, None, "n")
        self.began, self.go = threading.Event(), threading.Event()

    def delete(self, object_id: str) -> None:
        self.began.set()
        assert self.go.wait(PATIENCE)
        super().delete(object_id)


async def began(machine: Machine, domain: Slow, **arguments: Any) -> asyncio.Task[Any]:
    """An object-del that is under way."""
    task = asyncio.create_task(machine.run("object-del", **arguments))
    async with asyncio.timeout(PATIENCE):
        while not domain.began.is_set():
            await asyncio.sleep(0.001)
    return task


async def test_lasting_object_is_claimed_while_it_is_deleted(start: Start, daemon: Daemon) -> None:
    """Nobody plugs in or deletes what is being deleted; when that fails it is as it was."""
    machine = await start(*PC, "-name", "n", socket=str(daemon.sock))
    await machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=2 * MIB)
    busy = "object 'x' is busy: it is being deleted"

    async def others_wait() -> None:
        assert await machine.refusal("device_add", driver="pc-dimm", id="d", memdev="x") == busy
        assert await machine.refusal("object-del", id="x") == busy
        assert await machine.run("query-memory-devices") == []

    domain = machine.machine.domain = Slow(f"{daemon.sock}.not")
    task = await began(machine, domain, id="x")
    await others_wait()
    domain.go.set()
    with pytest.raises(QmpError, match="does not answer"):
        await task
    await machine.run("device_add", driver="pc-dimm", id="d", memdev="x")
    await machine.run("device_del", id="d")
    await machine.wait_event("DEVICE_DELETED")

    domain = machine.machine.domain = Slow(str(daemon.sock))
    task = await began(machine, domain, id="x")
    await others_wait()
    domain.go.set()
    assert await task == {}
    assert await machine.refusal("object-del", id="x") == "object 'x' not found"
    with daemon.client() as client:
        assert [entry["id"] for entry in client.execute("query-memdev")] == ["vm-n.pc.ram"]


async def test_lasting_object_that_is_gone_already(start: Start, daemon: Daemon) -> None:
    """What was thrown away at the daemon can be deleted here."""
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    await machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=4096)
    with daemon.client() as client:
        client.execute("object-del", {"id": "vm-n.x"})
    assert await machine.run("object-del", id="x") == {}


async def test_lasting_id_is_taken_when_it_is_judged(start: Start, daemon: Daemon) -> None:
    """Of two that make the same object in one turn one is refused, and the daemon has it once."""
    machine = await start("-machine", "none", "-name", "n", socket=str(daemon.sock))
    add = {"qom_type": "memory-backend-memfd", "id": "x", "size": 4096}
    answers = await asyncio.gather(*(machine.run("object-add", **add) for _ in range(3)), return_exceptions=True)
    assert [answer for answer in answers if not isinstance(answer, QmpError)] == [{}]
    with daemon.client() as client:
        assert [entry["id"] for entry in client.execute("query-memdev")] == ["vm-n.x"]


async def test_gmemd_that_does_not_answer(start: Start, tmp_path: Path) -> None:
    """A gmemd that accepts and says nothing is given up after a while; others are served meanwhile."""
    path = str(tmp_path / "deaf")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen()
        machine = await start("-machine", "none", "-name", "n", socket=path)
        machine.machine.domain = Domain(path, None, "n", answer=0.5)
        add = {"qom_type": "memory-backend-memfd", "id": "x", "size": 4096}
        task = asyncio.create_task(machine.run("object-add", **add))
        await asyncio.sleep(0)
        assert (await machine.run("query-status"))["status"] == "running"
        assert not task.done()
        with pytest.raises(QmpError) as caught:
            await task
        assert caught.value.desc == f"gmemd at {path} does not answer: it took too long"
        assert await machine.run("query-memdev") == b"[]"


async def test_memory_let_go_is_freed_beside_the_loop(start: Start) -> None:
    """Whoever lets a virtio-mem device shrink waits for that, others do not; what is asked meanwhile comes after it."""
    machine = await start()
    kernel = machine.gmemd.kernel
    freeing, go = threading.Event(), threading.Event()

    class Slowly:
        """The kernel, which takes its time to free memory."""

        def __getattr__(self, name: str) -> Any:
            return getattr(kernel, name)

        def punch_hole(self, fd: int, offset: int, length: int) -> None:
            freeing.set()
            assert go.wait(PATIENCE)
            kernel.punch_hole(fd, offset, length)

    await machine.run("object-add", qom_type="memory-backend-memfd", id="v0", size=64 * MIB)
    await machine.run("device_add", driver="virtio-mem-pci", id="v", memdev="v0", requested_size=8 * MIB)
    fd = machine.gmemd.objects.find("v0").fd
    kernel.allocate(fd, 0, 8 * MIB)
    machine.gmemd.kernel = Slowly()  # type: ignore[assignment]

    async def request(size: int) -> Any:
        return await machine.run("qom-set", path="v", property="requested-size", value=size)

    shrinking = asyncio.create_task(request(2 * MIB))
    async with asyncio.timeout(PATIENCE):
        while not freeing.is_set():
            await asyncio.sleep(0.001)
    assert await request(16 * MIB) == {}
    [entry] = await machine.run("query-memory-devices")
    assert (entry["data"]["size"], entry["data"]["requested-size"]) == (8 * MIB, 16 * MIB)
    assert not shrinking.done()
    go.set()
    assert await shrinking == {}
    assert kernel.resident(fd) == 2 * MIB
    sizes = [data["size"] for name, data in machine.events if name == "MEMORY_DEVICE_SIZE_CHANGE"]
    assert sizes == [8 * MIB, 2 * MIB, 16 * MIB]


async def test_balloon_knows_of_dimms(start: Start) -> None:
    """What a dimm adds the balloon leaves to the guest, until it is asked for it; only a guest that runs obeys."""
    machine = await start(*PC, "-S")
    await machine.run("device_add", driver="virtio-balloon-pci", id="b")
    await plugged(machine, "d0")
    assert await machine.run("query-balloon") == {"actual": 192 * MIB}
    await machine.run("balloon", value=100 * MIB + 1)
    assert await machine.run("query-balloon") == {"actual": 192 * MIB}
    await machine.run("cont")
    assert await machine.run("query-balloon") == {"actual": 100 * MIB + 4096}
    await machine.run("balloon", value=GIB)
    await machine.run("device_del", id="d0")
    await machine.wait_event("DEVICE_DELETED")
    assert await machine.run("query-balloon") == {"actual": 64 * MIB}
    assert [data for name, data in machine.events if name == "BALLOON_CHANGE"] == \
        [{"actual": 100 * MIB + 4096}, {"actual": 192 * MIB}]
