"""adopt --pid: what is taken from a process, and which right is missing if it cannot be."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator

import pytest

from gmemd.errors import QmpError
from gmemd.vmm.adoption import take
from gmemd.vmm.memfds import Memfd, memfds
from gmemd.vmm.seccomp import _install, _Program
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.programs import gmemctl, output
from tests.vmm.test_capture import MIB, QEMUS, TOY

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter of a test is for x86-64")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
NOBODY, ANOTHER = 65534, 65533
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None)


@pytest.fixture
def vmm() -> Iterator[subprocess.Popen[str]]:
    """A VMM with two memories, one without seals, and other memfds."""
    with subprocess.Popen([*TOY, f"{QEMUS}:{MIB}", f"wayland:{MIB}", f"ch_ram:{2 * MIB}:noseal", f"{QEMUS}:0:nosize"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(4):
            process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_memory_outlives_its_vmm(vmm: subprocess.Popen[str]) -> None:
    """All memory of its guest is adopted, by number; what is an object already is not adopted again."""
    with Daemon(kernel="simulated") as daemon, daemon.client(timeout=PATIENCE) as client:
        adopt = gmemctl("--socket", str(daemon.sock), "adopt", "--pid", str(vmm.pid), "-o", "json")
        done = subprocess.run(adopt, capture_output=True, text=True, check=True)
        assert done.stderr == f"gmemctl: 'vm{vmm.pid}.1' can be truncated by its VMM: it has forbidden seals\n"
        assert json.loads(done.stdout) == [{"id": f"vm{vmm.pid}.0", "memfd": QEMUS, "size": MIB},
                                           {"id": f"vm{vmm.pid}.1", "memfd": "ch_ram", "size": 2 * MIB}]
        again = subprocess.run([*adopt, "--id", "a", "--id", "b"], capture_output=True, text=True, check=False)
        assert (again.returncode, f"is the object 'vm{vmm.pid}.0' already" in again.stderr) == (1, True)
        statuses = client.execute("query-memdev-status")
        assert {(status["id"], status["runner"]["pid"]) for status in statuses} == {
            (f"vm{vmm.pid}.0", vmm.pid), (f"vm{vmm.pid}.1", vmm.pid)}
        vmm.kill()
        vmm.wait()
        wait_for(lambda: all("runner" not in status for status in client.execute("query-memdev-status")))
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": f"vm{vmm.pid}.0"})
        assert os.pread(fd, 30, 0).rstrip(b"\0") == f"{QEMUS}:{MIB}".encode()
        os.close(fd)


def test_what_is_not_adopted(vmm: subprocess.Popen[str]) -> None:
    """A number of ids that does not fit, an id that is taken, a process without memory or that is not there: nothing
    becomes an object."""
    with Daemon(kernel="simulated") as daemon, daemon.client(timeout=PATIENCE) as client:
        client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "b", "size": 4096})

        def adopt(status: int, *words: str) -> str:
            done = subprocess.run(gmemctl("--socket", str(daemon.sock), "adopt", *words), capture_output=True,
                                  text=True, check=False)
            assert done.returncode == status, done.stderr
            return done.stderr

        pid = str(vmm.pid)
        assert f"1 ids for 2 memories: '{QEMUS}' (1 MiB, descriptor 3), 'ch_ram' (2 MiB, descriptor 5)" in adopt(
            2, "--pid", pid, "--id", "a")
        assert "attempt to add duplicate property 'b'" in adopt(1, "--pid", pid, "--id", "a", "--id", "b")
        assert f"(process {os.getpid()}) has no memfd" in adopt(1, "--pid", str(os.getpid()))
        vmm.kill()
        vmm.wait()
        assert f"no process has the id {pid}" in adopt(1, "--pid", pid)
        assert [memdev["id"] for memdev in client.execute("query-memdev")] == ["b"]
    output(gmemctl("adopt"), status=2)


def test_yama_does_not_keep_a_user_from_its_own_memfd() -> None:
    """Where pidfd_getfd is forbidden a memfd is opened by its path; what has none is refused."""
    program = _Program()
    program.load(0)
    program.if_equal(438, "deny")
    program.end("", 0x7FFF0000)
    program.end("deny", 0x00050000 | 1)  # EPERM
    own = os.memfd_create(QEMUS)
    os.ftruncate(own, 4096)
    parent = os.getpid()

    def look() -> str:
        os.close(_install(program.assembled()))
        [found] = [one for one in memfds(parent) if one.fd == own]
        inode = os.fstat(take(parent, found)).st_ino
        with pytest.raises(QmpError) as caught:
            take(parent, found._replace(name=""))
        return f"{inode} {caught.value.desc}"

    said = in_child(look)
    assert said.startswith(f"{os.fstat(own).st_ino} the memory of ")
    assert "a seccomp filter, a security module" in said or "takes CAP_SYS_PTRACE" in said
    os.close(own)


@needs_root
def test_the_missing_right_is_named() -> None:
    """Another user, or a process that has changed its user: the refusal says which it is."""
    for user, dumpable, why in ((ANOTHER, True, f"it belongs to user {NOBODY} and we are user {ANOTHER}; "),
                                (NOBODY, False, "it is not dumpable, because it has changed its user")):
        theirs, release = target(dumpable)
        try:
            def look(theirs: int = theirs, user: int = user) -> str:
                os.setgroups([])
                os.setresuid(user, user, user)
                with pytest.raises(QmpError) as caught:
                    take(theirs, Memfd(3, QEMUS, (0, 0), 4096))
                return str(caught.value.desc)

            said = in_child(look)
            assert f"(process {theirs}) cannot be taken: {why}" in said
            assert said.endswith("that takes CAP_SYS_PTRACE (run it as root)")
        finally:
            release()


def target(dumpable: bool) -> tuple[int, Callable[[], None]]:
    """A process of nobody's; its id, and what ends it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _libc.prctl(_PR_SET_DUMPABLE, int(dumpable))
        os.write(writer, b"r")
        signal.pause()
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)

    def release() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return pid, release


def in_child(function: Callable[[], str]) -> str:
    """What a function returns in another process, which may become another user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, function().encode())
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said
