"""run --capture: the memfds of a VMM are gmemd's, and the VMM does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import children, state
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.programs import gmemctl, needs, output

pytestmark = pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="needs x86-64 or arm64")
MIB = 1 << 20
TOY = [sys.executable, "-S", str(Path(__file__).with_name("toy.py"))]


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with Daemon(kernel="simulated") as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[Client]:
    with shared.client(timeout=PATIENCE) as client:
        yield client
        for memdev in client.execute("query-memdev"):
            client.execute("object-del", {"id": memdev["id"]})


class Captured:
    """A toy VMM under capture."""

    def __init__(self, daemon: Daemon, words: tuple[str, ...], options: dict[str, object]) -> None:
        split = words.index("--")
        self.process = subprocess.Popen(
            gmemctl("--socket", str(daemon.sock), "run", *words[:split], "--", *TOY, *words[split + 1:]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]

    def line(self) -> list[str]:
        """What it says next, without the specification."""
        return self.process.stdout.readline().split()[1:]

    def told(self) -> str:
        """The supervisor's next line."""
        return str(self.process.stderr.readline()).removeprefix("gmemctl: ").rstrip("\n")

    def supervisor(self) -> int:
        """Its process id."""
        [pid] = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
                 if _is_supervisor(pid) and self.process.pid in _watched(pid)]
        return pid

    def end(self) -> str:
        """Let it end; what the supervisor has still said."""
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        return str(self.process.stderr.read())


def _is_supervisor(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == "gmemctl-capture\n"
    return False


def _watched(pid: int) -> list[int]:
    """The processes that a process has pidfds of."""
    found = [line for fd in os.listdir(f"/proc/{pid}/fdinfo")
             for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()]
    return [int(line.split()[1]) for line in found if line.startswith("Pid:")]


@contextmanager
def captured(daemon: Daemon, *words: str, **options: object) -> Iterator[Captured]:
    made = Captured(daemon, words, options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        for stream in (made.process.stdin, made.process.stdout, made.process.stderr):
            stream.close()


def create(client: Client, name: str, size: int, **properties: object) -> int:
    """An object; its inode."""
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": size, **properties})
    return inode(client, name)


def inode(client: Client, name: str) -> int:
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def content(client: Client, name: str, size: int) -> bytes:
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    try:
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def holders(client: Client, name: str) -> list[int]:
    return [holder["pid"] for holder in client.execute("query-memdev-holders", {"id": name})]


QEMUS, PROBE = "memory-backend-memfd", "test"


def test_objects_take_the_place_of_memfds(shared: Daemon, client: Client) -> None:
    """A VMM writes into the objects, those of equal size in their order, and holds them alone; they outlive it."""
    first, second, third = (create(client, name, size) for name, size in (("m1", MIB), ("m2", MIB), ("m3", 2 * MIB)))
    specs = [f"{QEMUS}:{2 * MIB}", f"{QEMUS}:{MIB}:nocloexec", f"{QEMUS}:{MIB}:noseal"]
    with captured(shared, "--capture", "m1,m2,m3", "--", f"{PROBE}:0:nosize", *specs) as vmm:
        assert vmm.line()[1:] == ["0", "False"]
        assert vmm.line() == [str(third), str(2 * MIB), "False"]
        assert vmm.line() == [str(first), str(MIB), "True"]
        assert vmm.line() == [str(second), str(MIB), "False"]
        pid = vmm.process.pid
        assert vmm.told().startswith(f"'m3' is the memory of python (process {pid}): memfd '{QEMUS}', 2 MiB")
        assert [holders(client, name) for name in ("m1", "m2", "m3")] == [[pid]] * 3
        assert {status["runner"]["pid"] for status in client.execute("query-memdev-status")} == {pid}
        vmm.process.kill()
    assert [content(client, name, len(spec)).decode() for name, spec in zip(("m3", "m1", "m2"), specs, strict=True)
            ] == specs


def test_new_memory_is_adopted_in_order(shared: Daemon, client: Client) -> None:
    """With --create a VMM's own memfds become objects, whether it seals them or not; existing objects are handed in."""
    there = create(client, "m1", MIB)
    with captured(shared, "--create", "--capture", "n1,m1,n2,n3", "--", f"{PROBE}:0:nosize", f"{QEMUS}:{3 * MIB}",
                  f"{QEMUS}:{MIB}", f"ch_ram:{2 * MIB}:noseal") as vmm:
        vmm.line()
        made = [vmm.line() for _ in range(3)]
        assert made[1][0] == str(there)
        wait_for(lambda: {memdev["id"] for memdev in client.execute("query-memdev")} == {"m1", "n1", "n2"})
        assert [str(inode(client, name)) for name in ("n1", "n2")] == [made[0][0], made[2][0]]
        assert "'n3' was not created" in vmm.end()
    client.execute("memdev-get-fd", {"id": "n1"})


def test_what_is_not_captured_is_said(shared: Daemon, client: Client) -> None:
    """A memfd of another size stays the VMM's own, sealed or not, and so does one with another name."""
    create(client, "m1", MIB)
    with captured(shared, "--capture", "m1", "--", f"{QEMUS}:{2 * MIB}:noseal", f"wayland:{MIB}",
                  f"{QEMUS}:{3 * MIB}") as vmm:
        assert [vmm.line()[1:] for _ in range(3)] == [[str(size * MIB), "False"] for size in (2, 1, 3)]
        who = f"of python (process {vmm.process.pid})"
        assert vmm.told() == f"memfd '{QEMUS}' {who}, 2 MiB, stays its own: no object of that size is left for it"
        assert vmm.told() == f"memfd '{QEMUS}' {who}, 3 MiB, stays its own: no object of that size is left for it"
        assert vmm.end() == "gmemctl: 'm1' was not used: no memfd of a guest got its size, 1 MiB\n"
    assert content(client, "m1", 1) == b"\0"


def test_memory_of_another_guest_is_not_given(shared: Daemon, client: Client) -> None:
    """Two guests on one memory destroy each other: the second VMM keeps memory of its own."""
    there = create(client, "m1", MIB)
    client.execute("memdev-set-runner", {"id": "m1", "pid": os.getpid()})
    try:
        with captured(shared, "--capture", "m1", "--", f"{QEMUS}:{MIB}") as vmm:
            assert vmm.line()[0] != str(there)
            assert vmm.told().startswith(f"'m1' is not given to python (process {vmm.process.pid}): process "
                                         f"{os.getpid()} ")
            assert "stays its own" in vmm.told()
    finally:
        client.execute("memdev-clear-runner", {"id": "m1", "force": True})


def test_another_name_of_guest_memory(shared: Daemon, client: Client) -> None:
    """--memfd names the memfds of a VMM that is not known."""
    there = create(client, "m1", MIB)
    with captured(shared, "--capture", "m1", "--memfd", "mine", "--", f"mine:{MIB}") as vmm:
        assert vmm.line()[0] == str(there)


def test_a_daemon_that_is_gone_stops_no_vmm(client: Client) -> None:
    """Without gmemd a new memory stays the VMM's own; what was handed in before works."""
    with Daemon(kernel="simulated") as own:
        with own.client(timeout=PATIENCE) as other:
            there = create(other, "m1", MIB)
        with captured(own, "--create", "--capture", "m1,n1", "--", f"{QEMUS}:{MIB}",
                      f"{QEMUS}:{2 * MIB}:late") as vmm:
            assert vmm.line()[0] == str(there)
            vmm.told()
            own.process.terminate()
            own.wait()
            vmm.process.stdin.write("\n")
            vmm.process.stdin.flush()
            assert vmm.line()[1:] == [str(2 * MIB), "False"]
            assert "2 MiB, stays its own: it cannot become 'n1': cannot connect" in vmm.told()


def test_the_supervisor_lives_as_long_as_the_vmm(shared: Daemon, client: Client) -> None:
    """It is not the VMM's child, survives what ends others, and ends with the last process of the VMM."""
    create(client, "m1", MIB)
    create(client, "m2", 2 * MIB)
    with captured(shared, "--capture", "m1,m2", "--", f"{QEMUS}:{MIB}", "--", f"{QEMUS}:{2 * MIB}:late") as vmm:
        vmm.line()
        supervisor = vmm.supervisor()
        assert supervisor not in children(vmm.process.pid)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(supervisor, number)
        assert vmm.process.wait(PATIENCE) == 0  # its child goes on
        assert vmm.process.stderr.read().count("\n") == 1  # and nobody waits for the supervisor's lines
        vmm.process.stdin.write("\n")
        vmm.process.stdin.flush()
        assert vmm.line()[1:] == [str(2 * MIB), "False"]
        assert content(client, "m2", 1) != b"\0"
        assert state(supervisor) not in "ZX"
        vmm.process.stdin.close()
        wait_for(lambda: state(supervisor) in "ZX")


def test_without_its_supervisor_a_disk_can_grow(shared: Daemon, client: Client) -> None:
    """Only the creation of memory fails when somebody has killed the supervisor: it is not named that a file grows."""
    create(client, "m1", MIB)
    with captured(shared, "--capture", "m1", "--", f"{QEMUS}:{MIB}", "disk:8192:late:file", "x:8192:late") as vmm:
        vmm.line()
        supervisor = vmm.supervisor()
        os.kill(supervisor, signal.SIGKILL)
        wait_for(lambda: state(supervisor) in "ZX")
        vmm.process.stdin.write("\n\n")
        vmm.process.stdin.flush()
        assert vmm.line()[1:] == ["8192", "False"]
        assert vmm.line() == ["Function", "not", "implemented"]


@needs("setpriv")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which can have CAP_SYS_ADMIN or not")
def test_privileges_stay_where_there_are_some(shared: Daemon, client: Client) -> None:
    """Root's VMM is not under no_new_privs; without CAP_SYS_ADMIN it has to be, which is said."""
    create(client, "m1", MIB)
    words = gmemctl("--socket", str(shared.sock), "run", "--capture", "m1", "--",
                    "grep", "NoNewPrivs", "/proc/self/status")
    assert output(words).split() == ["NoNewPrivs:", "0"]
    done = subprocess.run(["setpriv", "--bounding-set=-sys_admin", *words], capture_output=True, text=True, check=False,
                          timeout=PATIENCE)
    assert done.stdout.split() == ["NoNewPrivs:", "1"]
    assert "setuid programs that the VMM starts run without their rights (no_new_privs)\n" in done.stderr


def test_its_end_is_the_vmms(shared: Daemon, client: Client) -> None:
    """The exit status is the VMM's, and what cannot be run is said as by exec."""
    create(client, "m1", MIB)
    run = gmemctl("--socket", str(shared.sock), "run", "--capture", "m1", "--")
    output([*run, "sh", "-c", "exit 7"], status=7)
    output([*run, "/nonexistent"], status=127)
    done = subprocess.run([*run, "sh", "-c", "kill -KILL $$"], check=False, capture_output=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL


def test_what_cannot_be_captured_is_refused(shared: Daemon, client: Client, tmp_path: Path) -> None:
    """Nothing is run for an object that is not there, named twice, a part of a file, or only readable."""
    create(client, "m1", MIB)
    (tmp_path / "file").write_bytes(bytes(2 * MIB))
    client.execute("object-add", {"qom-type": "memory-backend-file", "id": "f1", "size": MIB, "offset": MIB,
                                  "mem-path": str(tmp_path / "file"), "share": True})
    client.execute("object-add", {"qom-type": "memory-backend-file", "id": "f2", "size": MIB, "readonly": True,
                                  "mem-path": str(tmp_path / "file"), "share": True})
    for ids, status, why in (("x", 125, "object 'x' not found"), ("m1,m1", 2, "named twice"),
                             ("f1", 125, "'f1' begins at byte 1048576 of its file"), ("f2", 125, "can only be read")):
        done = subprocess.run(gmemctl("--socket", str(shared.sock), "run", "--capture", ids, "--", "touch",
                                      str(tmp_path / "ran")), capture_output=True, text=True, check=False)
        assert (done.returncode, why in done.stderr) == (status, True), done.stderr
    assert not (tmp_path / "ran").exists()
    output(gmemctl("--socket", str(shared.sock), "run", "--capture", "m1"), status=2)


def test_a_vmm_with_a_listener_of_its_own(shared: Daemon, client: Client) -> None:
    """Under a supervisor there can be no second one, which is refused before anything is run."""
    create(client, "m1", MIB)
    create(client, "m2", MIB)
    run = gmemctl("--socket", str(shared.sock), "run", "--capture", "m1", "--")
    done = subprocess.run([*run, *gmemctl("--socket", str(shared.sock), "run", "--capture", "m2", "--", "echo", "ran")],
                          capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (125, "")
    assert "a seccomp supervisor already" in done.stderr
