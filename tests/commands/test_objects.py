"""object-add and object-del: what is refused, in which words, and that nothing stays behind."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from gmemd.commands.templates import is_template
from gmemd.errors import QmpError
from tests.commands.conftest import Machine

MIB = 1 << 20


def memdevs(machine: Machine) -> list[str]:
    return [entry["id"] for entry in json.loads(machine.run("query-memdev"))]


def add(machine: Machine, **properties: Any) -> Any:
    return machine.run("object-add", **{"qom_type": "memory-backend-memfd", "id": "m0", "size": MIB, **properties})


@pytest.mark.parametrize("qom_type", ["memory-backend-ram", "memory-backend-memfd", "memory-backend-shm",
                                      "memory-backend-guest-memfd"])
def test_an_object_is_memory_of_its_size(machine: Machine, qom_type: str) -> None:
    """Each type makes memory of the size asked for, and gives it back when it is deleted."""
    share = {} if qom_type == "memory-backend-ram" else {"share": True}
    assert machine.run("object-add", qom_type=qom_type, id="m0", size=MIB, **share) == {}
    backend = machine.gmemd.objects.find("m0")
    assert os.fstat(backend.fd).st_size == MIB
    assert not os.get_inheritable(backend.fd)
    assert machine.run("object-del", id="m0") == {}
    assert memdevs(machine) == []


@pytest.mark.parametrize("identifier", ["", "1a", "a b", "é", "-a", ".a", "_a", "a/b", "a\n"])
def test_ids_are_identifiers(machine: Machine, identifier: str) -> None:
    """A letter, then letters, digits, '-', '.', '_'; the right id then works."""
    with pytest.raises(QmpError, match="Parameter 'id' expects an identifier"):
        add(machine, id=identifier)
    assert add(machine, id="a-1._Z") == {}


def test_ids_are_unique(machine: Machine) -> None:
    """An id is used once, `type` and that of QEMU's first monitor never; after the deletion it is free again."""
    add(machine)
    taken = "attempt to add duplicate property '{}' to object (type 'container')"
    for name in ("m0", "type", "compat_monitor0"):
        with pytest.raises(QmpError, match="duplicate") as caught:
            add(machine, id=name)
        assert str(caught.value) == taken.format(name)
    machine.run("object-del", id="m0")
    assert add(machine) == {}


@pytest.mark.parametrize(("properties", "desc"), [
    ({"size": 0}, "property 'size' of memory-backend-memfd doesn't take value '0'"),
    ({"prealloc_threads": 0}, "property 'prealloc-threads' of memory-backend-memfd doesn't take value '0'"),
    ({"hugetlbsize": 0}, "Property 'memory-backend-memfd.hugetlbsize' doesn't take value '0'"),
    ({"hugetlbsize": 3 * MIB}, "Hugepage size must be a power of 2"),
    ({"prealloc": True, "reserve": False}, "'prealloc=on' and 'reserve=off' are incompatible"),
    ({"prealloc_context": "tc0"}, "Device 'tc0' not found"),
    ({"prealloc_context": "/objects"}, "Invalid parameter type for 'prealloc-context', expected: thread-context"),
    ({"host_nodes": [128]}, "Invalid host-nodes value: 128"),
    ({"host_nodes": [0]}, "host-nodes must be empty for policy default, or you should explicitly specify a policy"
                          " other than default"),
    ({"policy": "bind"}, "host-nodes must be set for policy bind"),
    ({"policy": "bind", "host_nodes": [127]}, "cannot bind memory to host NUMA nodes: Invalid argument"),
    ({"size": 4097}, "m0 backing store size 0x1001 is too small for 'size' option 0x2000 plus 'offset' option 0x0"),
    ({"size": 1 << 63}, "failed to resize memfd to 9223372036854775808: Invalid argument"),
    ({"size": -4096}, "failed to resize memfd to 18446744073709547520: Invalid argument"),
    ({"size": 1 << 62}, "unable to map backing store for guest RAM: Cannot allocate memory"),
    ({"guest_memfd": "on", "share": False}, "guest-memfd=on must be used with share=on"),
    ({"guest_memfd": "on", "hugetlb": True}, "guest-memfd=on doesn't support hugetlb=on"),
    ({"guest_memfd": True, "size": 4097}, "Error creating KVM guest_memfd: Invalid argument"),
    ({"qom_type": "memory-backend-shm", "share": False}, "can't create shm backend with `share=off`"),
    ({"qom_type": "memory-backend-guest-memfd", "share": False},
     "can't create guest_memfd backend with `share=off`"),
    ({"qom_type": "memory-backend-ram", "size": 1 << 62}, "cannot set up guest memory 'm0': Cannot allocate memory"),
    ({"qom_type": "memory-backend-ram", "size": -(2 << 20)}, "cannot set up guest memory 'm0': Invalid argument"),
])
def test_refusals_leave_nothing(machine: Machine, properties: dict[str, Any], desc: str) -> None:
    """What is refused has QEMU's words, leaves no object, no fd and no used id."""
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(QmpError) as caught:
        add(machine, **properties)
    assert str(caught.value) == desc
    assert len(os.listdir("/proc/self/fd")) == fds
    assert memdevs(machine) == []
    assert machine.refusal("object-del", id="m0") == ("GenericError", "object 'm0' not found")
    assert add(machine) == {}


def test_the_id_of_a_lost_object(machine: Machine) -> None:
    """It stays taken, and who wants it hears what has it and how to free it."""
    machine.gmemd.objects.lose("m0")
    lost = ("GenericError", "object 'm0' is lost, only its record came back: object-del frees the id")
    new = {"qom-type": "memory-backend-ram", "id": "m0", "size": MIB}
    with pytest.raises(QmpError) as caught:
        machine.execute("object-add", new)
    assert (caught.value.error_class, caught.value.desc) == lost
    assert machine.refusal("query-command-effect", command="object-add", arguments=new) == lost
    machine.gmemd.objects.lose("m0", lost=False)
    assert machine.execute("object-add", new) == {}


def test_failed_files_are_removed(machine: Machine, tmp_path: Path) -> None:
    """A file that a refused object-add made goes; one that was there stays, and one of a live object too."""
    path = tmp_path / "f"
    file = {"qom_type": "memory-backend-file", "mem_path": str(path)}
    with pytest.raises(QmpError, match="alignment 0x3 must be multiples of page size 0x1000"):
        add(machine, **file, align=3)
    assert not path.exists()
    assert add(machine, **file) == {}
    machine.run("object-del", id="m0")
    assert path.stat().st_size == MIB


def test_a_failed_file_that_was_there_stays_as_it_was(machine: Machine, tmp_path: Path) -> None:
    """An empty file gets its size when all else is found right."""
    path = tmp_path / "f"
    path.touch()
    file = {"qom_type": "memory-backend-file", "mem_path": str(path)}
    with pytest.raises(QmpError, match="unable to map backing store for guest RAM: Cannot allocate memory"):
        add(machine, **file, align=1 << 47)
    assert path.stat().st_size == 0
    assert add(machine, **file) == {}
    assert path.stat().st_size == MIB


def test_preallocation_makes_every_page_resident(machine: Machine) -> None:
    """After object-add with prealloc the whole object is in memory."""
    add(machine, prealloc=True, prealloc_threads=2)
    [status] = machine.run("query-memdev-status")
    assert (status["resident"], status["size"]) == (MIB, MIB)


def test_a_part_of_a_file_says_where_it_begins(machine: Machine, tmp_path: Path) -> None:
    """memdev-get-fd and the status tell the offset of an object in the file of its descriptor."""
    (tmp_path / "two").write_bytes(b"A" * MIB + b"B" * MIB)
    for number in (0, 1):
        machine.run("object-add", qom_type="memory-backend-file", id=f"m{number}", size=MIB, offset=number * MIB,
                    mem_path=str(tmp_path / "two"), share=True)
    for number, byte in ((0, b"A"), (1, b"B")):
        reply = machine.run("memdev-get-fd", id=f"m{number}")
        with mmap.mmap(reply.fds[0], reply.value["size"], offset=reply.value["offset"]) as memory:
            assert memory[:] == byte * MIB
        os.close(reply.fds.pop())
        [status] = json.loads(machine.run("query-memdev-status", id=f"m{number}"))
        assert (status["offset"], status["resident"]) == (number * MIB, MIB)


def test_a_handed_out_fd_is_the_objects_memory(machine: Machine) -> None:
    """memdev-get-fd gives a duplicate of the object's fd and says what it is."""
    add(machine, guest_memfd="on")
    reply = machine.run("memdev-get-fd", id="m0")
    [fd] = reply.fds
    try:
        assert reply.value == {"size": MIB, "offset": 0, "kind": "guest-memfd", "kernel": "simulated",
                               "guest-memfd-flags": 3, "revocable": False}
        assert os.path.sameopenfile(fd, machine.gmemd.objects.find("m0").fd)
        machine.run("object-del", id="m0")
        assert os.fstat(fd).st_size == MIB
    finally:
        os.close(fd)
    assert machine.refusal("memdev-get-fd", id="m0") == ("GenericError", "object 'm0' not found")


@pytest.mark.parametrize(("command", "arguments"), [
    ("memdev-get-fd", {}), ("memdev-populate", {}), ("memdev-freeze", {}),
    ("qom-set", {"property": "prealloc", "value": True})])
def test_memory_is_blank_until_somebody_may_have_written(machine: Machine, command: str,
                                                         arguments: dict[str, Any]) -> None:
    """What no command has touched is closed at once, without examining it; with anything else that may take long."""
    add(machine)
    backend = machine.gmemd.objects.find("m0")
    assert backend.blank
    named = {"path": "/objects/m0"} if command == "qom-set" else {"id": "m0"}
    result = machine.run(command, **named, **arguments)
    for fd in getattr(result, "fds", ()):
        os.close(fd)
    assert not backend.blank
    machine.run("object-del", id="m0")


def test_a_holder_makes_a_template(machine: Machine) -> None:
    """Who has been given the descriptor may have sealed it, so the descriptor is asked."""
    add(machine)
    (fd,) = machine.run("memdev-get-fd", id="m0").fds
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)
    assert is_template(machine.gmemd.objects.find("m0"))
    machine.run("object-del", id="m0")


def test_status_tells_the_owner_and_the_hand_outs(machine: Machine) -> None:
    """query-memdev-status names the creator and counts what was handed out; of one id only that object."""
    add(machine)
    add(machine, id="m1")
    os.close(machine.run("memdev-get-fd", id="m1").fds[0])
    [status] = machine.run("query-memdev-status", id="m1")
    assert status["owner"] == {"uid": os.getuid(), "pid": os.getpid()}
    assert (status["id"], status["handed-out"], status["age"]) == ("m1", 1, 0)
    assert machine.refusal("query-memdev-status", id="m2") == ("GenericError", "object 'm2' not found")
