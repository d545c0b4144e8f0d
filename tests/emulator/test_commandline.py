"""QEMU's command line: read as QEMU reads it, refused in its words."""

from __future__ import annotations

import json
import subprocess

import pytest

from gmemd.emulator.argv import FLAGS, VALUES
from gmemd.emulator.commandline import parse
from gmemd.emulator.main import main
from gmemd.emulator.monitors import Chardev, MonitorOption
from gmemd.emulator.topology import Cpus
from gmemd.errors import QmpError
from tests.emulator.conftest import MIB, Start, refusal
from tests.programs import needs

R0 = ("-object", "memory-backend-memfd,id=r0,size=64M")


@pytest.mark.parametrize(("argv", "desc"), [
    (["-foo"], "-foo: invalid option"),
    (["--foo"], "--foo: invalid option"),
    (["-m"], "-m: requires an argument"),
    (["disk.img"], "disk.img: there are no disks here"),
    (["-"], "-: there are no disks here"),
    (["-m", "x"], "-m x: Parameter 'size' expects a non-negative number below 2^64"),
    (["-m", "64,foo=1"], "-m 64,foo=1: Invalid parameter 'foo'"),
    (["-m", "64,slots=x"], "-m 64,slots=x: Parameter 'slots' expects a number"),
    (["-m", "64,slots=1"], "slots specified but no max-size"),
    (["-m", "64,slots=2,maxmem=32M"],
     "invalid value of maxmem: maximum memory size (0x2000000) must be at least the initial memory size (0x4000000)"),
    (["-uuid", "x"], "-uuid x: failed to parse UUID string: wrong format"),
    (["-smp", "x"], "Parameter 'smp.cpus' expects integer"),
    (["-smp", "0"], "Invalid CPU topology: CPU topology parameters must be greater than zero"),
    (["-smp", "4,maxcpus=2"], "Invalid CPU topology: maxcpus must be equal to or greater than smp: "
                              "maxcpus (2) < smp_cpus (4)"),
    (["-smp", "1,foo=1"], "Parameter 'smp.foo' is unexpected"),
    (["-smp", "2,sockets=1,cores=1,threads=1,maxcpus=4"],
     "Invalid CPU topology: product of the hierarchy must match maxcpus: "
     "sockets (1) * dies (1) * cores (1) * threads (1) != maxcpus (4)"),
    (["-numa", "foo"], "-numa foo: Parameter 'type' does not accept value 'foo'"),
    (["-numa", "node,foo=1"], "-numa node,foo=1: Invalid parameter 'foo'"),
    (["-numa", "node,nodeid=0", "-numa", "node,nodeid=0"], "-numa node,nodeid=0: Duplicate NUMA nodeid: 0"),
    (["-numa", "node,cpus=a"], "-numa node,cpus=a: Parameter 'cpus' expects a uint64 value or range"),
    (["-numa", "node,mem=64"],
     "-numa node,mem=64: Parameter -numa node,mem is not supported by this machine type"),
    (["-chardev", "socket,id=a", "-chardev", "null,id=a"], "-chardev null,id=a: Duplicate ID 'a' for chardev"),
    (["-chardev", "socket,id=a,fd=x"], "-chardev socket,id=a,fd=x: Unable to parse FD number x"),
    (["-chardev", "socket"], "-chardev socket: Parameter 'id' is missing"),
    (["-mon", "chardev=zz,mode=control"], '-mon chardev=zz: chardev "zz" not found'),
    (["-mon", "foo"], '-mon foo: chardev "foo" not found'),
    (["-qmp", "tcp::4444,server=on"], "-qmp tcp::4444,server=on: only unix:PATH,server=on can be served"),
    (["-qmp", "unix:/x"], "-qmp unix:/x: only unix:PATH,server=on can be served"),
    (["-name", "a,foo=b"], "-name a,foo=b: Invalid parameter 'foo'"),
    (["-device", "id=a"], "-device id=a: Parameter 'driver' is missing"),
    (["-qmp", "unix:/x,server=maybe"], "-qmp unix:/x,server=maybe: Parameter 'server' expects 'on' or 'off'"),
])
def test_refused(argv: list[str], desc: str) -> None:
    """What QEMU refuses is refused with its sentence, before anything is made."""
    with pytest.raises(QmpError) as caught:
        parse(argv)
    assert caught.value.desc == desc.replace("-qmp unix:/x,server=maybe", "-qmp path=/x,server=maybe")


def test_sizes() -> None:
    """A plain number after -m counts MiB, one with a suffix does not, and maxmem always counts bytes."""
    assert parse(["-m", "64"]).ram.size == 64 * MIB
    assert parse(["-m", "size=65536k,slots=4,maxmem=1048576k"]).ram.most == 1024 * MIB
    assert parse(["-m", "0"]).ram.size == 128 * MIB
    assert parse([]).ram.size == 128 * MIB


def test_words_are_kept_and_mean_nothing() -> None:
    """Options that are not about memory take their values along, also ones that look like options."""
    words = ["-netdev", "-S", "-cpu", "qemu64", "-display", "none", "-no-hpet", "-boot", "strict=on", "-sandbox", "on"]
    line = parse(words)
    assert line.words == words
    assert line.paused is False


def test_process_options() -> None:
    """-S, -daemonize, -pidfile, -name, -uuid, -no-shutdown, -no-reboot, -action."""
    line = parse(["-S", "-daemonize", "-pidfile", "/p", "-name", "guest=a,,b,debug-threads=on", "-no-shutdown",
                  "-uuid", "2C269FA4-F22B-4D6E-AEB6-C8D61A4DBC4C"])
    assert (line.paused, line.daemonize, line.pidfile, line.name) == (True, True, "/p", "a,b")
    assert line.uuid == "2c269fa4-f22b-4d6e-aeb6-c8d61a4dbc4c"
    assert (line.shutdown_action, line.reboot_action) == ("pause", "reset")
    assert parse(["-no-reboot"]).reboot_action == "shutdown"
    assert parse(["-action", "shutdown=pause"]).shutdown_action == "pause"


def test_monitors() -> None:
    """-qmp, -qmp-pretty, -mon on a chardev, and a monitor written as an object (libvirt 12)."""
    line = parse(["-qmp", "unix:/a,server=on,wait=off", "-qmp-pretty", "unix:/b,server,nowait",
                  "-chardev", "socket,id=c,fd=6,server=on,wait=off", "-mon", "chardev=c,id=monitor,mode=control",
                  "-chardev", "socket,id=d,path=/d,server=on", "-mon", "d",
                  "-object", '{"qom-type":"monitor-qmp","id":"monitor","chardev":"d"}'])
    assert line.monitors == [MonitorOption("compat_monitor0"), MonitorOption("compat_monitor1", True),
                             MonitorOption("c"), MonitorOption("d")]
    assert line.chardevs["compat_monitor0"].path == "/a"
    assert line.chardevs["c"] == Chardev("c", "socket", "", 6)
    assert line.objects == []


@pytest.mark.parametrize(("text", "cpus"), [
    ("2,sockets=2,cores=1,threads=1", Cpus(2, 2, 1, 1)),
    ("2", Cpus(2, 2, 2, 1)),
    ("8,sockets=2", Cpus(8, 8, 4, 1)),
    ("2,maxcpus=8,threads=2", Cpus(2, 8, 4, 2)),
    ("4,sockets=2,dies=2,cores=1,threads=1", Cpus(4, 4, 2, 1)),
])
def test_topology(text: str, cpus: Cpus) -> None:
    """What -smp leaves out follows from the rest; cores come before sockets."""
    assert parse(["-smp", text]).cpus == cpus


@needs("qemu-system-x86_64")
def test_every_option_of_qemu_is_known() -> None:
    """Each option that QEMU's help shows takes a value here if it does there."""
    text = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith(("-h ", "-fda/", "-hda/", "-hdc/")):
            name, _, rest = line.lstrip("-").partition(" ")
            takes = bool(rest) and not rest.startswith(" ") and name not in ("async-teardown", "usb", "no-hpet")
            if name not in ("dtb", "audio"):
                assert name in (VALUES if takes else FLAGS), line


# -- what only the machine can judge


@pytest.mark.parametrize(("argv", "desc"), [
    (("-machine", "foo"), 'unsupported machine type: "foo"\nUse -machine help to list supported machines'),
    (("-accel", "foo"), "invalid accelerator foo"),
    (("-machine", "pc,memory-backend=r0"), "Memory backend 'r0' not found"),
    ((*R0, "-machine", "pc,memory-backend=r0", "-m", "128"),
     "Machine memory size does not match the size of the memory backend"),
    (("-m", "64", "-numa", "node,memdev=r0"), "-numa node,memdev=r0: memdev=r0 is ambiguous"),
    ((*R0, "-m", "128", "-numa", "node,memdev=r0"),
     "total memory for NUMA nodes (0x4000000) should equal RAM size (0x8000000)"),
    ((*R0, "-m", "64", "-numa", "node,memdev=r0,cpus=9"),
     "-numa node,memdev=r0,cpus=9: CPU index (9) should be smaller than maxcpus (1)"),
    (("-object", "foo,id=a"), "-object foo,id=a: Parameter 'qom-type' does not accept value 'foo'"),
    (("-object", "secret,id=a"), "Either 'file' or 'data' must be provided"),
    (("-device", "pc-dimm,id=a,memdev=zz"), "-device pc-dimm,id=a,memdev=zz: Device 'zz' not found"),
    (("-object", "memory-backend-ram,id=a,size=0"),
     "property 'size' of memory-backend-ram doesn't take value '0'"),
])
async def test_machine_refused(argv: tuple[str, ...], desc: str, start: Start) -> None:
    """Memory that does not fit the machine is refused in QEMU's words."""
    assert await refusal(start, *argv) == desc


async def test_machine_has_memory_of_its_own(start: Start) -> None:
    """Without a memory object the machine makes its own, as QEMU does."""
    machine = await start("-m", "64")
    [memdev] = json.loads(await machine.run("query-memdev"))
    assert (memdev["id"], memdev["size"], memdev["share"]) == ("pc.ram", 64 * MIB, False)
    assert await machine.run("query-memory-size-summary") == {"base-memory": 64 * MIB, "plugged-memory": 0}


async def test_dump_and_merge_follow_the_machine(start: Start) -> None:
    """dump-guest-core and mem-merge are the defaults of dump and merge."""
    machine = await start("-machine", "pc,dump-guest-core=off,mem-merge=off", "-m", "64")
    [memdev] = json.loads(await machine.run("query-memdev"))
    assert (memdev["dump"], memdev["merge"]) == (False, False)


@pytest.mark.parametrize(("argv", "text"), [
    (["-version"], "QEMU emulator version 11.1.0 (gmemd "),
    (["-help"], "usage: gmemd-emulator"),
    (["-machine", "help"], "pc-i440fx-11.1"),
    (["-object", "help"], "  memory-backend-memfd"),
    (["-object", "secret,help"], "  file=<string>"),
])
def test_shown(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What QEMU only prints is printed, and the emulator ends."""
    assert main(argv) == 0
    assert text in capsys.readouterr().out


def test_error_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line ends with status 1 and one line that libvirt quotes."""
    assert main(["-foo"]) == 1
    assert capsys.readouterr().err == "gmemd-emulator: -foo: invalid option\n"
