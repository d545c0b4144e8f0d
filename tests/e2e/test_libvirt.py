"""Real libvirt, unmodified, takes gmemd-emulator for QEMU through the whole life of a domain."""

from __future__ import annotations

import json
import mmap
import os
import pwd
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import state
from tests.daemon import Daemon
from tests.e2e.test_docs import blocks
from tests.emulator.libvirt import EXAMPLES, Libvirt, Virsh
from tests.patience import PATIENCE
from tests.programs import ROOT, needs, output

MIB = 1 << 20
DIMM = EXAMPLES / "dimm.xml"
HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def has_user(name: str) -> bool:
    with suppress(KeyError):
        pwd.getpwnam(name)
        return True
    return False


pytestmark = [
    pytest.mark.e2e,
    needs("virsh"),
    needs("virt-qemu-run"),  # of the package with the QEMU driver
    pytest.mark.skipif(os.getuid() == 0 and not has_user("libvirt-qemu"),
                       reason="needs the user libvirt-qemu (script/packages makes it)"),
]


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    with Libvirt() as libvirt:
        yield libvirt


@pytest.fixture
def virsh(libvirt: Libvirt) -> Iterator[Virsh]:
    with libvirt.virsh() as virsh:
        yield virsh


def ids(listing: dict[str, object]) -> list[str]:
    """The sorted ids of query-memdev's reply."""
    entries = listing["return"]
    assert isinstance(entries, list)
    return sorted(entry["id"] for entry in entries)


def mapped(client: Client, object_id: str) -> mmap.mmap:
    """A shared mapping of an object's memory, as another process makes it."""
    info, [fd] = client.execute_fds("memdev-get-fd", {"id": object_id})
    try:
        return mmap.mmap(fd, info["size"], offset=info["offset"])
    finally:
        os.close(fd)


def test_the_pages_block_runs() -> None:
    """What docs/libvirt.md tells people to type works, and the domain is made."""
    [text] = [text for word, text in blocks(ROOT / "docs/libvirt.md") if word == "libvirt"]
    with Libvirt() as libvirt:
        libvirt.example("memfd.xml")
        text = text.replace("/usr/local/bin/gmemd-emulator", str(libvirt.emulator))
        environment = {**libvirt.environ, "TMPDIR": str(libvirt.dir)}
        said = output(["bash", "-euc", f"cd {libvirt.dir}\n{text}"], env=environment)
    assert "Domain 'memfd' created from memfd.xml" in said


def test_domain_capabilities(libvirt: Libvirt, virsh: Virsh) -> None:
    """libvirt's probe succeeds and finds memfd as a source of memory, and virtio-mem's machine types."""
    text = virsh.run(f"domcapabilities --emulatorbin {libvirt.emulator} --virttype qemu")
    capabilities = ET.fromstring(text)
    assert capabilities.findtext("machine", "").startswith("pc-i440fx-")
    backing = capabilities.find("memoryBacking")
    assert backing is not None
    assert backing.get("supported") == "yes"
    assert "memfd" in [value.text for value in backing.iter("value")]


def test_kvm_is_found_where_it_is(libvirt: Libvirt, virsh: Virsh) -> None:
    """libvirt offers domains of type kvm exactly where /dev/kvm can be opened."""
    command = f"domcapabilities --emulatorbin {libvirt.emulator} --virttype kvm"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        assert "KVM is not supported" in virsh.fails(command)
    else:
        assert ET.fromstring(virsh.run(command)).findtext("domain") == "kvm"


def test_life_of_a_domain(libvirt: Libvirt) -> None:
    """Define, start, add objects, plug and unplug, suspend and resume, libvirt restarts, reboot, end."""
    with libvirt.virsh() as virsh:
        virsh.run(f"define {libvirt.example('memfd.xml')}")
        virsh.run("start memfd")
        assert virsh.run("domstate memfd") == "running"
        pid = libvirt.pid("memfd")
        assert virsh.qmp("memfd", "query-status")["return"] == {"status": "running", "running": True}
        [memdev] = virsh.qmp("memfd", "query-memdev")["return"]
        assert (memdev["id"], memdev["size"], memdev["share"]) == ("ram-node0", 64 * MIB, True)

        add = {"qom_type": "memory-backend-memfd", "id": "g0", "size": 2 * MIB, "guest_memfd": "on"}
        assert virsh.qmp("memfd", "object-add", **add)["return"] == {}
        assert ids(virsh.qmp("memfd", "query-memdev")) == ["g0", "ram-node0"]
        [status] = virsh.qmp("memfd", "query-memdev-status", id="g0")["return"]
        assert status["kind"] == "guest-memfd"
        assert virsh.qmp("memfd", "object-del", id="g0")["return"] == {}
        assert virsh.qmp("memfd", "object-del", id="ram-node0")["error"]["desc"] == \
            "Cannot delete host memory backend 'ram-node0' which is mapped"

        virsh.run(f"attach-device memfd {DIMM} --live")
        address = ET.fromstring(virsh.run("dumpxml memfd")).find("devices/memory/address")
        assert address is not None
        assert (address.get("slot"), address.get("base")) == ("0", "0x100000000")
        assert ids(virsh.qmp("memfd", "query-memdev")) == ["memdimm0", "ram-node0"]
        assert virsh.qmp("memfd", "object-del", id="memdimm0")["error"]["class"] == "GenericError"
        assert '  memdev: /objects/memdimm0' in virsh.run("qemu-monitor-command --hmp memfd info memory-devices")
        virsh.run(f"detach-device memfd {DIMM} --live")
        assert ids(virsh.qmp("memfd", "query-memdev")) == ["ram-node0"]

        virsh.run("suspend memfd")
        virsh.wait_state("memfd", "paused")
        virsh.run("resume memfd")
        virsh.wait_state("memfd", "running")
        virsh.run(f"attach-device memfd {DIMM} --live")

    with libvirt.virsh() as virsh:  # libvirt was restarted: it reconnects
        virsh.wait_state("memfd", "running")
        assert libvirt.pid("memfd") == pid
        assert ids(virsh.qmp("memfd", "query-memdev")) == ["memdimm0", "ram-node0"]
        virsh.run(f"detach-device memfd {DIMM} --live")
        virsh.run("suspend memfd")
        virsh.wait_state("memfd", "paused")
        virsh.run("resume memfd")
        virsh.run("reset memfd")
        virsh.run("destroy memfd")
        assert virsh.run("domstate memfd") == "shut off"
        assert state(pid) in "ZX"

        virsh.run("start memfd")
        virsh.run("shutdown memfd")
        virsh.wait_state("memfd", "shut off")
        virsh.run("undefine memfd")


def test_other_processes_see_the_ram(libvirt: Libvirt, virsh: Virsh) -> None:
    """The domain's memory is real: two processes that map it while the domain runs see each other's bytes."""
    sock = libvirt.dir / "second.sock"
    domain = libvirt.example("memfd.xml", arguments=["-qmp", f"unix:{sock},server=on,wait=off"])
    virsh.run(f"create {domain}")
    with (Client(sock, timeout=PATIENCE) as client, mapped(client, "ram-node0") as one,
          mapped(client, "ram-node0") as two):
        assert len(one) == 64 * MIB
        one[4096:4109] = b"written once\n"
        assert two[4096:4109] == b"written once\n"
        [status] = client.execute("query-memdev-status", {"id": "ram-node0"})
        assert status["resident"] == 4096
    virsh.run("destroy memfd")


def test_next_start_finds_the_bytes(libvirt: Libvirt, virsh: Virsh, daemon: Daemon) -> None:
    """With GMEMD_SOCKET the memory outlives the emulator: the next start of the domain has it again."""
    sock = libvirt.dir / "lasting.sock"
    domain = libvirt.example("lasting.xml", {"GMEMD_SOCKET": str(daemon.sock)},
                             ["-qmp", f"unix:{sock},server=on,wait=off"])
    lasting = "vm-7b0f4a52-5a0b-4a64-9f0a-1f6b0f7a9a10.pc.ram"
    virsh.run(f"define {domain}")
    virsh.run("start lasting")
    with daemon.client() as client, mapped(client, lasting) as memory:
        memory[MIB:MIB + 5] = b"first"
    virsh.run("destroy lasting")
    with daemon.client() as client:
        assert [entry["id"] for entry in client.execute("query-memdev")] == [lasting]

    virsh.run("start lasting")
    with Client(sock, timeout=PATIENCE) as client, mapped(client, "pc.ram") as memory:
        assert memory[MIB:MIB + 5] == b"first"
    virsh.run("destroy lasting")
    virsh.run("undefine lasting")


def test_another_size_is_refused(libvirt: Libvirt, virsh: Virsh, daemon: Daemon) -> None:
    """Memory of an earlier run that does not fit the domain any more is not thrown away: the start is refused."""
    domain = libvirt.example("lasting.xml", {"GMEMD_SOCKET": str(daemon.sock)})
    virsh.run(f"create {domain}")
    virsh.run("destroy lasting")
    other = libvirt.file("other.xml", domain.read_text().replace("<memory unit='MiB'>64", "<memory unit='MiB'>32"))
    assert "is left from an earlier run with another 'size'" in virsh.fails(f"create {other}")
    with daemon.client() as client:
        client.execute("object-del", {"id": "vm-7b0f4a52-5a0b-4a64-9f0a-1f6b0f7a9a10.pc.ram"})
    virsh.run(f"create {other}")
    virsh.run("destroy lasting")


def test_numa_and_immediate_allocation(libvirt: Libvirt, virsh: Virsh) -> None:
    """numatune and immediate allocation arrive: policy, nodes, and every page there, with libvirt's thread-context."""
    virsh.run(f"create {libvirt.example('numa.xml')}")
    entries = {entry["id"]: entry for entry in virsh.qmp("numa", "query-memdev")["return"]}
    assert sorted(entries) == ["ram-node0", "ram-node1"]
    for entry in entries.values():
        assert (entry["policy"], entry["host-nodes"], entry["prealloc"]) == ("bind", [0], True)
    assert (entries["ram-node0"]["share"], entries["ram-node1"]["share"]) == (True, False)
    resident = {entry["id"]: entry["resident"] for entry in virsh.qmp("numa", "query-memdev-status")["return"]}
    assert resident == {"ram-node0": 16 * MIB, "ram-node1": 16 * MIB}
    assert "tc-ram-node0" in libvirt.log("numa")
    listed = virsh.qmp("numa", "qom-list", path="/objects")["return"]
    assert "tc-ram-node0" not in [entry["name"] for entry in listed]  # libvirt has deleted it
    virsh.run("destroy numa")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """At least 4 free huge pages of 2 MiB; skips where they cannot be had."""
    file = HUGE / "nr_hugepages"
    try:
        before = int(file.read_text())
        missing = 4 - int((HUGE / "free_hugepages").read_text())
        if missing > 0:
            file.write_text(str(before + missing))
        if int((HUGE / "free_hugepages").read_text()) < 4:
            file.write_text(str(before))
            pytest.skip("needs 4 huge pages of 2 MiB: memory is too fragmented")
    except OSError as exc:
        pytest.skip(f"needs 4 huge pages of 2 MiB: {exc.strerror}")
    yield
    if missing > 0:
        file.write_text(str(before))


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(libvirt: Libvirt, virsh: Virsh) -> None:
    """A domain on huge pages takes them from the host when it starts and gives them back when it ends."""
    free = int((HUGE / "free_hugepages").read_text())
    virsh.run(f"create {libvirt.example('hugepages.xml')}")
    assert virsh.qmp("hugepages", "qom-get", path="/objects/pc.ram", property="hugetlbsize")["return"] == 2 * MIB
    assert int((HUGE / "free_hugepages").read_text()) == free - 4
    virsh.run("destroy hugepages")
    assert int((HUGE / "free_hugepages").read_text()) == free


def test_virtio_mem_and_balloon(libvirt: Libvirt, virsh: Virsh) -> None:
    """A virtio-mem device follows its requested size; libvirt's default balloon is there."""
    virsh.run(f"create {libvirt.example('virtio-mem.xml')}")
    [device] = virsh.qmp("virtio-mem", "query-memory-devices")["return"]
    assert (device["type"], device["data"]["size"], device["data"]["max-size"]) == ("virtio-mem", 16 * MIB, 128 * MIB)
    virsh.run("update-memory-device virtio-mem --live --requested-size 32MiB")
    [device] = virsh.qmp("virtio-mem", "query-memory-devices")["return"]
    assert device["data"]["size"] == 32 * MIB
    current = ET.fromstring(virsh.run("dumpxml virtio-mem")).find("devices/memory/target/current")
    assert current is not None
    assert current.text == str(32 * 1024)
    assert re.search(r"^actual \d+", virsh.run("dommemstat virtio-mem"), re.MULTILINE)
    virsh.run("setmem virtio-mem 48M --live")
    assert virsh.qmp("virtio-mem", "query-balloon")["return"]["actual"] == 48 * MIB
    virsh.run("destroy virtio-mem")


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
def test_domain_of_type_kvm(libvirt: Libvirt, virsh: Virsh) -> None:
    """A domain of type kvm starts, and is told that KVM is enabled."""
    domain = libvirt.example("memfd.xml")
    domain.write_text(domain.read_text().replace("<domain type='qemu'>", "<domain type='kvm'>"))
    virsh.run(f"create {domain}")
    assert virsh.qmp("memfd", "query-kvm")["return"] == {"enabled": True, "present": True}
    virsh.run("destroy memfd")


def test_text_that_is_no_command(libvirt: Libvirt, virsh: Virsh) -> None:
    """What a person mistypes is refused, and the domain goes on."""
    virsh.run(f"create {libvirt.example('memfd.xml')}")
    reply = json.loads(virsh.run("qemu-monitor-command memfd 'info memory'"))
    assert reply["error"] == {"class": "CommandNotFound", "desc": "The command info memory has not been found"}
    assert virsh.run("domstate memfd") == "running"
    virsh.run("destroy memfd")
