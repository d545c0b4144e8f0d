"""attach and detach: what a VMM answers or does not, and that no step of a failure stays."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.vmm.attach import Attached, Memory, attach, detach
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import gmemctl
from tests.vmm.fake import OK, Events, FakeVmm

SIZE = 1 << 20
MORE = "more"
EMPTY: dict[str, Any] = {"query-memdev": [], "query-fdsets": [], "query-pci": [], "qom-list": [],
                         "query-memory-devices": []}
_FDSET = [{"fdset-id": 3, "fds": [{"fd": 9, "opaque": "gmemd more"}, {"fd": 7, "opaque": "another's"}]}]


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("more", os.MFD_ALLOW_SEALING)
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


class Maps:
    """What an honest VMM does at object-add, in this process, whose id the fake has."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.mapping: mmap.mmap | None = None

    def add(self, _arguments: Any) -> dict[str, Any]:
        self.mapping = mmap.mmap(self._fd, SIZE)
        return OK

    def delete(self, _arguments: Any) -> dict[str, Any]:
        if self.mapping is not None:
            self.mapping.close()
        return OK


def memory(fd: int, **other: Any) -> Memory:
    return Memory(MORE, SIZE, 0, fd)._replace(**other)


def qemu_at(vmm: FakeVmm) -> Qemu:
    return Qemu(vmm.path, 0.5)


def honest(fd: int, **other: Any) -> dict[str, Any]:
    """The answers of a VMM that does what it is told."""
    maps = Maps(fd)
    return {**EMPTY, "add-fd": {"fdset-id": 3, "fd": 9}, "object-add": maps.add, "object-del": maps.delete,
            "device_add": OK, "query-fdsets": _FDSET, "remove-fd": OK, "query-status": {"status": "paused"}, **other}


def test_it_is_attached_and_the_descriptor_is_dropped(fd: int, tmp_path: Path) -> None:
    """The steps are in this order, and QEMU keeps no descriptor but its own; another's stays."""
    with FakeVmm(tmp_path / "q", honest(fd)) as vmm, qemu_at(vmm) as qemu:
        assert attach(qemu, memory(fd), None, 1, 0.1) == Attached("pc-dimm", "more-device", False, "does not run now")
        changes = [(name, given) for name, given in vmm.asked if not name.startswith(("q", "qom"))]
        assert changes == [
            ("add-fd", {"opaque": "gmemd more"}),
            ("object-add", {"qom-type": "memory-backend-file", "id": MORE, "size": SIZE, "share": True,
                            "mem-path": "/proc/self/fd/9"}),
            ("device_add", {"driver": "pc-dimm", "id": "more-device", "memdev": MORE, "node": 1}),
            ("remove-fd", {"fdset-id": 3, "fd": 9})]


LIES: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"add-fd": Exception("No")}, "refuses 'add-fd': No", []),
    ({"add-fd": {"fdset-id": 3}}, "answers 'add-fd' without 'fd'", ["remove-fd"]),
    ({"object-add": Exception("No")}, "refuses 'object-add': No", ["remove-fd"]),
    ({"device_add": Exception("no slots")}, "refuses 'device_add': no slots", ["object-del", "remove-fd"]),
    ({"object-add": OK}, "maps 0 bytes of it, not 1048576", ["object-del", "remove-fd"]),
    ({"device_add": None}, "does not answer 'device_add' within 0.5 s", ["device_del", "object-del", "remove-fd"]),
    ({"object-add": b'{"ret'}, "has ended or closed the connection", []),
    ({"device_add": b""}, "has ended or closed the connection", []),
    ({"device_add": b"hello\n"}, "does not speak QMP", []),
    ({"query-memdev": 5}, "answers 'query-memdev' with something else than a list", []),
]


@pytest.mark.parametrize(("answers", "why", "undone"), LIES, ids=[str(number) for number in range(len(LIES))])
def test_what_fails_is_undone(fd: int, tmp_path: Path, answers: dict[str, Any], why: str, undone: list[str]) -> None:
    """Whatever step fails, by a refusal, silence, an end or a lie: one sentence, and QEMU is as before."""
    with FakeVmm(tmp_path / "q", honest(fd, device_del=OK, **answers)) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError) as caught:
            attach(qemu, memory(fd), "pc-dimm", None, 0.1)
        assert why in caught.value.desc
        names = vmm.names()
        assert [name for name in names if name in ("device_del", "object-del", "remove-fd")] == undone
        assert "\n" not in caught.value.desc


def test_what_qemu_would_not_refuse(fd: int, tmp_path: Path) -> None:
    """Memory that the process has already under another id, another size, what can only be read, a part: nothing is
    asked of QEMU for these."""
    with FakeVmm(tmp_path / "q", honest(fd)) as vmm, qemu_at(vmm) as qemu:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        for wrong, why in ((memory(fd, size=2 * SIZE), "has 2097152 bytes and its file 1048576"),
                           (memory(fd, offset=4096), "begins at byte 4096"), (memory(reader), "can only be read")):
            with pytest.raises(VmmError, match=why):
                attach(qemu, wrong, None, None, 0.1)
        os.close(reader)
        with mmap.mmap(fd, SIZE), pytest.raises(VmmError, match="has the memory of 'more' already"):
            attach(qemu, memory(fd), None, None, 0.1)
        assert {"add-fd", "object-add"}.isdisjoint(vmm.names())
    there = {"query-memdev": [{"id": MORE, "size": SIZE, "share": True}], "qom-list": [], "qom-get": "x"}
    with FakeVmm(tmp_path / "r", honest(fd, **there)) as vmm, qemu_at(vmm) as qemu, \
            pytest.raises(VmmError, match="has another memory of the id 'more'"):
        attach(qemu, memory(fd), None, None, 0.1)


def _ost(source: int, status: int) -> bytes:
    return (f'{{"event": "ACPI_DEVICE_OST", "data": {{"info": {{"device": "more-device", "slot": "0", "slot-type": '
            f'"DIMM", "source": {source}, "status": {status}}}}}}}\n').encode()


def _device(**more: Any) -> dict[str, Any]:
    return {"type": "dimm", "data": {"id": "more-device", "memdev": "/objects/more", "size": SIZE, **more}}


def events(*lines: bytes) -> Callable[[Any], Any]:
    """The answer to a command that sends these events first."""
    return lambda _arguments: Events(b"".join(lines))


@pytest.mark.parametrize(("status", "words"), [
    (130, "is busy: something in it cannot be moved"), (128, "gives no memory back"), (1, "failed"),
    (99, "said status 99")])
def test_a_guests_refusal_is_told_in_words(fd: int, tmp_path: Path, status: int, words: str) -> None:
    """What the guest answers is said, and the object stays where it is."""
    answers = honest(fd, **{"query-status": {"status": "running"}, "query-memory-devices": [_device()],
                            "device_del": events(_ost(3, 132), _ost(3, status))})
    with FakeVmm(tmp_path / "q", answers) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError, match=f"the guest keeps 'more': it {words}"):
            detach(qemu, MORE, None, 5)
        assert {"object-del", "remove-fd"}.isdisjoint(vmm.names())


def test_a_guest_may_need_longer(fd: int, tmp_path: Path) -> None:
    """One that is still at it is waited for no longer than allowed; another detach takes up where this one was."""
    devices: list[Any] = [[_device()], [_device()], [_device()], []]
    answers = honest(fd, **{
        "query-status": {"status": "running"}, "query-memory-devices": lambda _: devices.pop(0),
        "device_del": [events(_ost(3, 132)),
                       lambda _: Exception("Device more-device is already in the process of unplug")],
        "object-del": [Exception("object 'more' is in use, can not be deleted"), OK]})
    with FakeVmm(tmp_path / "q", answers) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError, match=r"not given 'more' back after 0.2 s: it is still working on it; another"):
            detach(qemu, MORE, None, 0.2)
        detach(qemu, MORE, None, 0.2)
        assert vmm.names().count("object-del") == 2
        assert vmm.names()[-1] == "remove-fd"


def test_a_detach_that_cannot_be(fd: int, tmp_path: Path) -> None:
    """A stopped guest gives nothing back; what is not there cannot be taken, but descriptors of it can."""
    stopped = honest(fd, **{"query-memory-devices": [_device()]})
    with FakeVmm(tmp_path / "q", stopped) as vmm, qemu_at(vmm) as qemu, pytest.raises(VmmError, match="is paused: it"):
        detach(qemu, MORE, None, 0.1)
    with FakeVmm(tmp_path / "r", honest(fd)) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError, match="has no memory of the id 'more'"):
            detach(qemu, MORE, None, 0.1)
        assert vmm.asked[-1] == ("remove-fd", {"fdset-id": 3, "fd": 9})


def test_a_virtio_mem_that_the_guest_keeps(fd: int, tmp_path: Path) -> None:
    """What it does not give back stays plugged as it was, and is said."""
    device = {"type": "virtio-mem", "data": {"id": "more-device", "memdev": "/objects/more", "size": 96 << 20,
                                             "requested-size": 256 << 20}}
    answers = honest(fd, **{"query-status": {"status": "running"}, "query-memory-devices": [device], "qom-set": OK})
    with FakeVmm(tmp_path / "q", answers) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError, match=r"the guest keeps 96 MiB of 'more' after 0.1 s: they are in use"):
            detach(qemu, MORE, None, 0.1)
        path = {"path": "/machine/peripheral/more-device", "property": "requested-size"}
        assert [given for name, given in vmm.asked if name == "qom-set"] == [{**path, "value": 0},
                                                                           {**path, "value": 256 << 20}]


def test_a_virtio_mem_that_qemu_keeps(fd: int, tmp_path: Path) -> None:
    """A QEMU that cannot unplug it says so, and the guest gets back what it had."""
    device = {"type": "virtio-mem", "data": {"id": "more-device", "memdev": "/objects/more", "size": 0,
                                             "requested-size": 256 << 20}}
    answers = honest(fd, **{"query-status": {"status": "running"}, "query-memory-devices": [device], "qom-set": OK,
                            "device_del": Exception("virtio based memory devices cannot be unplugged.")})
    with FakeVmm(tmp_path / "q", answers) as vmm, qemu_at(vmm) as qemu:
        with pytest.raises(VmmError, match="refuses 'device_del': virtio based memory devices cannot be unplugged"):
            detach(qemu, MORE, None, 0.1)
        assert [given["value"] for name, given in vmm.asked if name == "qom-set"] == [0, 256 << 20]


def test_it_still_has_it(fd: int, tmp_path: Path) -> None:
    """A VMM that says that the memory is gone, and maps it, is not believed."""
    answers = honest(fd, **{"query-memdev": [{"id": MORE, "size": SIZE, "share": True}], "qom-get": "x",
                            "object-del": OK})
    status = os.fstat(fd)
    with FakeVmm(tmp_path / "q", answers) as vmm, qemu_at(vmm) as qemu, mmap.mmap(fd, SIZE), \
            pytest.raises(VmmError, match=r"says that 'more' is gone, but .* still has it"):
        detach(qemu, MORE, (status.st_dev, status.st_ino), 0.1)


def test_gmemctl_says_it_and_forgets_the_runner(fd: int, tmp_path: Path) -> None:
    """The VMM's words are gmemctl's message; no runner is left of it, nor of another guest's memory."""
    refused = honest(fd, **{"object-add": OK})
    with Daemon(kernel="simulated") as daemon, daemon.client() as client, FakeVmm(tmp_path / "q", refused) as vmm:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": MORE, "size": SIZE})
        words = gmemctl("--socket", str(daemon.sock), "attach", MORE, "--qmp", vmm.path)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (1, "")
        assert "maps 0 bytes of it, not 1048576" in done.stderr
        [status] = client.execute("query-memdev-status")
        assert "runner" not in status
        client.execute("memdev-set-runner", {"id": MORE, "pid": daemon.pid})
        vmm.asked.clear()
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert f"process {daemon.pid} " in done.stderr
        assert vmm.names() == []
        [status] = client.execute("query-memdev-status")
        assert status["runner"]["pid"] == daemon.pid
