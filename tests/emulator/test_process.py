"""The emulator as a process: how it starts, what it listens on, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.qmp.client import Client
from tests.emulator.conftest import MIB, Process
from tests.patience import PATIENCE, wait_for

ARGV = [sys.executable, "-m", "gmemd.emulator.main"]
PROBE = ["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=tcg"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


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


@pytest.mark.parametrize(("argv", "text"), [
    (["-qmp", "unix:{dir}/none/s,server=on"],
     "gmemd-emulator: Failed to bind socket to {dir}/none/s: No such file or directory\n"),
    (["-pidfile", "{dir}/none/p"],
     "gmemd-emulator: cannot create PID file: Could not create '{dir}/none/p': No such file or directory\n"),
    (["-machine", "foo"],
     "gmemd-emulator: unsupported machine type\nUse -machine help to list supported machines\n"),
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
