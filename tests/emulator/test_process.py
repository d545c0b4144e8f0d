"""The emulator as a process: how it starts, what it listens on, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import state
from tests.emulator.conftest import MIB, Process
from tests.patience import PATIENCE, wait_for

ARGV = [sys.executable, "-m", "gmemd.emulator.main"]
PROBE = ["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=tcg"]


def is_alive(pid: int) -> bool:
    return state(pid) not in "ZX"


def wait_gone(pid: int) -> None:
    wait_for(lambda: not is_alive(pid))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_daemonize(tmp_path: Path, end: signal.Signals) -> None:
    """-daemonize: the parent ends once the socket listens and the pid file is written; a signal removes both."""
    sock, pidfile = tmp_path / "s", tmp_path / "p"
    done = subprocess.run([*ARGV, *PROBE, "-qmp", f"unix:{sock},server=on,wait=off", "-pidfile", str(pidfile),
                           "-daemonize"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pidfile.read_text())
    assert is_alive(pid)
    assert os.getsid(pid) == pid
    with Client(sock, timeout=PATIENCE) as client:
        assert client.execute("query-target") == {"arch": "x86_64"}
        os.kill(pid, end)
        assert client.wait_event("SHUTDOWN", 30)["data"] == {"guest": False, "reason": "host-signal"}
    wait_gone(pid)
    assert not sock.exists()
    assert not pidfile.exists()


def daemonized(folder: Path, *argv: str, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """What the start of an emulator in the background says, in `folder`."""
    return subprocess.run([*ARGV, *PROBE, "-daemonize", *argv], capture_output=True, text=True, timeout=PATIENCE,
                          check=False, cwd=folder, umask=umask)


def test_daemon_leaves_directory_and_umask(tmp_path: Path) -> None:
    """In the background it works in / with umask 027, as QEMU; relative paths of its options are those of its start."""
    done = daemonized(tmp_path, "-qmp", "unix:s,server=on,wait=off", "-pidfile", "p", "-object",
                      "memory-backend-file,id=f,size=4096,mem-path=m,share=on")
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((tmp_path / "p").read_text())
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert "Umask:\t0027\n" in Path(f"/proc/{pid}/status").read_text()
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o600
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_pid_file_of_another(tmp_path: Path) -> None:
    """A pid file is locked: who comes second is refused, and the end of one never removes the file of another."""
    pidfile = tmp_path / "p"
    locked = "gmemd-emulator: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    with Process(*PROBE, "-pidfile", str(pidfile)) as first:
        assert int(pidfile.read_text()) == first.process.pid
        for how in ([], ["-daemonize"]):
            done = subprocess.run([*ARGV, *PROBE, *how, "-pidfile", str(pidfile)], capture_output=True, text=True,
                                  timeout=PATIENCE, check=False)
            assert (done.returncode, done.stderr) == (1, locked)
            assert int(pidfile.read_text()) == first.process.pid
        pidfile.unlink()
        with Process(*PROBE, "-pidfile", str(pidfile)) as second:
            first.process.terminate()
            assert first.wait() == 0
            assert int(pidfile.read_text()) == second.process.pid
    assert not pidfile.exists()
    pidfile.write_text("99999 and what another left\n")
    with Process(*PROBE, "-pidfile", str(pidfile)) as third:
        assert pidfile.read_text() == f"{third.process.pid}\n"


def test_pid_file_of_a_start_that_fails(tmp_path: Path) -> None:
    """A start that is refused later leaves no pid file."""
    done = daemonized(tmp_path, "-pidfile", "p", "-object", "memory-backend-ram,id=a,size=0")
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [
    ["-qmp", "unix:{dir}/a,,b,server=on,wait=off"],
    ["-chardev", "socket,id=c,path={dir}/a,,b,server=on,wait=off", "-mon", "c,mode=control"],
])
def test_socket_path(option: list[str], tmp_path: Path) -> None:
    """A comma in a path is doubled; only a socket is ever removed, at the start as well as at the end."""
    path = tmp_path / "a,b"
    words = [word.replace("{dir}", str(tmp_path)) for word in option]
    path.write_text("somebody's")
    done = daemonized(tmp_path, *words)
    assert done.returncode == 1
    assert f"Failed to bind socket to {path}" in done.stderr
    assert path.read_text() == "somebody's"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with Process(*PROBE, *words) as process, Client(path, timeout=PATIENCE) as client:
        assert client.execute("query-status")["status"] == "prelaunch"
        path.unlink()
        path.write_text("somebody's")
        process.process.terminate()
        assert process.wait() == 0
    assert path.read_text() == "somebody's"


@pytest.mark.parametrize(("argv", "text"), [
    (["-qmp", "unix:{dir}/none/s,server=on"],
     "gmemd-emulator: Failed to bind socket to {dir}/none/s: No such file or directory\n"),
    (["-pidfile", "{dir}/none/p"],
     "gmemd-emulator: cannot create PID file: Could not create '{dir}/none/p': No such file or directory\n"),
    (["-machine", "foo"],
     'gmemd-emulator: unsupported machine type: "foo"\nUse -machine help to list supported machines\n'),
    (["-chardev", "socket,id=c,fd=99", "-mon", "c,mode=control"],
     "gmemd-emulator: -chardev socket,id=c,fd=99: Bad file descriptor\n"),
    (["-chardev", "null,id=c", "-mon", "c,mode=control"],
     "gmemd-emulator: -chardev null,id=c: a monitor needs a socket with fd= or path=\n"),
])
@pytest.mark.parametrize("how", [[], ["-daemonize"]], ids=["foreground", "daemonize"])
def test_what_keeps_it_from_starting(argv: list[str], text: str, how: list[str], tmp_path: Path) -> None:
    """A start that fails ends with status 1 and its reason on standard error, also with -daemonize."""
    words = [word.replace("{dir}", str(tmp_path)) for word in argv]
    done = subprocess.run([*ARGV, *words, *how], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (1, text.replace("{dir}", str(tmp_path)))


def test_inherited_socket(tmp_path: Path) -> None:
    """A client that connected to a handed-over socket before the start is served, and clients come and go."""
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        early = socket.socket(socket.AF_UNIX)
        early.connect(str(path))
        early.settimeout(PATIENCE)
        with Process(*PROBE, "-chardev", f"socket,id=c,fd={listener.fileno()},server=on,wait=off",
                     "-mon", "chardev=c,id=monitor,mode=control", pass_fds=(listener.fileno(),)) as process:
            with Client(early) as client:
                assert client.execute("query-status")["status"] == "prelaunch"
            for _ in range(3):
                with Client(path, timeout=PATIENCE) as client:
                    assert client.execute("query-commands")
            assert process.process.poll() is None
    assert path.exists()  # it is libvirt's


def test_quit() -> None:
    """quit: the event, the reply, the end."""
    with Process(*PROBE) as process:
        with process.client() as client:
            assert client.execute("quit") == {}
            assert [event["event"] for event in client.events] == ["SHUTDOWN"]
        assert process.wait() == 0


def test_long_preallocation_is_done_when_it_listens() -> None:
    """Memory of the command line is there, and allocated, when the first client is greeted."""
    with Process("-m", "8", "-object", "memory-backend-memfd,id=r,size=8M,prealloc=on", "-machine",
                 "pc,memory-backend=r") as process, process.client() as client:
        [status] = client.execute("query-memdev-status")
        assert status["resident"] == 8 * MIB


def test_kvm_is_told_as_it_is() -> None:
    """KVM is enabled if it is asked for and /dev/kvm opens, never otherwise."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
        opens = True
    except OSError:
        opens = False
    for accel, enabled in (("kvm:tcg", opens), ("tcg", False), ("tcg:kvm", False)):
        with Process("-machine", f"none,accel={accel}") as process, process.client() as client:
            assert client.execute("query-kvm")["enabled"] is enabled
