"""Who holds memory, and memory that was made elsewhere."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from gmemd.kernel.choose import choose_kernel
from tests.commands.conftest import Machine

SIZE = 1 << 20
SHRINK_GROW_SEAL = 0x7


def memfd(size: int = SIZE, seals: int = SHRINK_GROW_SEAL) -> int:
    fd = os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def give(machine: Machine, fd: int) -> int:
    machine.sent.append(fd)
    machine.run("getfd", fdname="f")
    return fd


def test_a_sealed_memfd_is_adopted(machine: Machine) -> None:
    """The object is the very file that was given, contents and all; the name is free afterwards."""
    fd = memfd()
    os.pwrite(fd, b"hello", 0)
    give(machine, fd)
    assert machine.run("memdev-adopt", id="m", fdname="f") == {
        "size": SIZE, "offset": 0, "kind": "memfd", "kernel": "simulated"}
    assert os.pread(machine.gmemd.objects.find("m").fd, 5, 0) == b"hello"
    assert machine.refusal("closefd", fdname="f") == ("GenericError", "File descriptor named 'f' not found")
    machine.run("object-del", id="m")


def test_guest_memfd_and_files_are_adopted(machine: Machine, tmp_path: Path) -> None:
    """The kind of the descriptor decides the type."""
    give(machine, choose_kernel("simulated").create_guest_memfd(SIZE, 3))
    assert machine.run("memdev-adopt", id="g", fdname="f")["kind"] == "guest-memfd"
    assert machine.run("query-memdev-ranges", id="g")["private"] == 0
    path = tmp_path / "ram"
    path.write_bytes(bytes(SIZE))
    give(machine, os.open(path, os.O_RDWR))
    assert machine.run("memdev-adopt", id="p", fdname="f")["kind"] == "file"
    assert machine.run("qom-get", path="p", property="mem-path") == str(path)


@pytest.mark.kvm
def test_a_foreign_guest_memfd_is_adopted(machine: Machine) -> None:
    """A real guest_memfd of another owner is recognised, whatever kernel gmemd itself uses."""
    with closing(choose_kernel("kvm")) as kernel:
        give(machine, kernel.create_guest_memfd(SIZE, 3))
    assert machine.run("memdev-adopt", id="g", fdname="f")["kind"] == "guest-memfd"


def again(flags: int) -> int:
    """The same kind of memfd, opened once more with other flags."""
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def secret() -> int:
    fd = int(ctypes.CDLL(None).syscall(447, os.O_CLOEXEC))  # memfd_secret(2)
    if fd < 0:
        pytest.skip("needs a kernel with memfd_secret (secretmem.enable=1)")
    os.ftruncate(fd, SIZE)
    return fd


NOT_BOTH = "the descriptor was not opened for reading and writing"
SEALED = "the memfd is sealed against writing"


@pytest.mark.parametrize(("fd", "arguments", "desc"), [
    (lambda: again(os.O_RDONLY), {}, NOT_BOTH),
    (lambda: again(os.O_WRONLY), {}, NOT_BOTH),
    (lambda: again(os.O_PATH), {}, NOT_BOTH),
    (lambda: again(os.O_RDWR | os.O_APPEND), {}, "the descriptor was opened for appending"),
    (lambda: memfd(seals=0x7 | 0x8), {}, SEALED),
    (lambda: memfd(seals=0x7 | 0x10), {}, SEALED),
    (lambda: choose_kernel("simulated").create_guest_memfd(SIZE, 0), {},
     "the descriptor cannot be mapped for reading and writing: "),
    (secret, {"require-seals": False}, "the descriptor is secret memory"),
    (lambda: os.open("/", os.O_RDONLY), {}, "the descriptor is not memory: /"),
    (lambda: os.pidfd_open(os.getpid()), {}, "the descriptor is not memory: "),
    (lambda: os.eventfd(0), {}, "the descriptor is not memory: anon_inode"),
    (lambda: os.open("/dev/zero", os.O_RDWR), {}, "the descriptor is not memory: /dev/zero"),
    (lambda: os.open("/proc/self/mem", os.O_RDWR), {},
     "the descriptor has 0 bytes, which is not a whole number of pages"),
    (lambda: socket.socket().detach(), {}, "the descriptor is not memory: socket"),
    (lambda: os.open(os.devnull, os.O_RDWR), {}, "the descriptor is not memory: /dev/null"),
    (lambda: os.pipe()[0], {}, "the descriptor is not memory: pipe"),
    (lambda: memfd(seals=0), {}, "the memfd is not sealed against shrinking"),
    (lambda: memfd(0), {}, "the descriptor has 0 bytes, which is not a whole number of pages"),
    (lambda: memfd(100), {}, "the descriptor has 100 bytes, which is not a whole number of pages"),
    (memfd, {"size": 4096}, "the descriptor has 1048576 bytes, not 4096"),
    (memfd, {"id": "1"}, "Parameter 'id' expects an identifier"),
])
def test_what_is_no_memory_is_refused(machine: Machine, fd: object, arguments: dict[str, object], desc: str) -> None:
    """The refusal says what it is; the descriptor keeps its name, and the right one is then adopted."""
    assert callable(fd)
    before = set(os.listdir("/proc/self/fd"))
    made = fd()
    others = set(os.listdir("/proc/self/fd")) - before - {str(made)}
    give(machine, made)
    for other in others:
        with suppress(OSError):  # what listed the directory
            os.close(int(other))
    _, text = machine.refusal("memdev-adopt", **{"id": "m", "fdname": "f", **arguments})
    assert text.startswith(desc)
    machine.run("closefd", fdname="f")
    give(machine, memfd())
    assert machine.run("memdev-adopt", id="m", fdname="f")["size"] == SIZE


@pytest.mark.parametrize("kernel", ["simulated", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_holders_are_found(kernel: str) -> None:
    """A process that has the memory open and mapped is listed, until it ends."""
    machine = Machine(kernel)
    machine.run("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    fd = machine.gmemd.objects.find("g").fd
    code = f"import mmap; m = mmap.mmap({fd}, {SIZE}); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[fd], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        [holder] = machine.run("query-memdev-holders", id="g")
        assert (holder["pid"], holder["uid"], holder["mapped"]) == (child.pid, os.getuid(), SIZE)
        assert (holder["writable"], holder["private-copy"], holder["fds"]) == (True, False, 2)
        child.kill()
    assert machine.run("query-memdev-holders", id="g") == []
    machine.gmemd.close()


def test_unclaimed_memory_is_claimed_or_dropped(machine: Machine) -> None:
    """Memory without a record is listed, becomes an object or goes."""
    machine.gmemd.unclaimed += [("m-x-1", memfd()), ("m-x-2", memfd())]
    assert [entry["name"] for entry in machine.run("query-memdev-unclaimed")] == ["m-x-1", "m-x-2"]
    assert machine.run("memdev-claim", name="m-x-1", id="back") == {}
    assert machine.run("memdev-claim", name="m-x-2") == {}
    assert machine.run("query-memdev-unclaimed") == []
    assert machine.run("qom-get", path="back", property="size") == SIZE
    assert machine.refusal("memdev-claim", name="m-x-1") == (
        "GenericError", "no unclaimed memory is named 'm-x-1'")


def test_without_custody_nothing_is_kept_or_lost(machine: Machine) -> None:
    """Where nobody keeps objects memdev-persist says so, and nothing can be lost."""
    machine.run("object-add", qom_type="memory-backend-ram", id="m", size=SIZE)
    assert machine.refusal("memdev-persist", id="m", persist=False)[1].startswith("objects are not kept")
    assert machine.run("query-memdev-lost") == []
