"""Starting a VMM: its command is completed, it waits for the word, what it says is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gmemd.client.running import state
from gmemd.vmm.ending import VmmError
from gmemd.vmm.start import Arranged, Started, arrange
from tests.patience import wait_for
from tests.programs import output

QMP = ["-qmp", "unix:/s/other,server=on,wait=off"]


@pytest.mark.parametrize(("words", "qmp", "found"), [
    (["q"], None, Arranged(["q", "-incoming", "defer", *QMP], "/s/other")),
    (["q"], "/s,n", Arranged(["q", "-incoming", "defer", "-qmp", "unix:/s,,n,server=on,wait=off"], "/s,n")),
    (["q", "-qmp", "unix:/a,server=on"], None,
     Arranged(["q", "-qmp", "unix:/a,server=on", "-incoming", "defer"], "/a")),
    (["q", "-incoming", "defer", "-qmp", "unix:/a"], None,
     Arranged(["q", "-incoming", "defer", "-qmp", "unix:/a", *QMP], "/s/other")),
    (["q", "-chardev", "socket,id=m,path=/a,server=on", "-mon", "m"], "/a",
     Arranged(["q", "-chardev", "socket,id=m,path=/a,server=on", "-mon", "m", "-incoming", "defer"], "/a")),
    (["q", "-qmp", "unix:a,,b,server=on"], f"{os.getcwd()}/a,b",
     Arranged(["q", "-qmp", "unix:a,,b,server=on", "-incoming", "defer"], f"{os.getcwd()}/a,b")),
])
def test_what_a_command_lacks_is_added(words: list[str], qmp: str | None, found: Arranged) -> None:
    assert arrange(words, qmp, "/s/other", incoming=True) == found


def test_a_socket_that_is_taken_is_replaced() -> None:
    """Wherever the command would listen on it; QEMU would remove it there."""
    for path in ("/a", os.path.relpath("/a")):
        words = ["q", "-qmp", f"unix:{path},server=on", "-serial", f"unix:{path}.2,server=on", "-chardev",
                 f"socket,id=x,path={path}"]
        found = arrange(words, None, "/b", incoming=False, taken="/a")
        assert found == Arranged(["q", "-qmp", "unix:/b,server=on", "-serial", f"unix:{path}.2,server=on", "-chardev",
                                  "socket,id=x,path=/b"], "/b")


def test_another_incoming_is_refused() -> None:
    with pytest.raises(VmmError, match="the command has '-incoming tcp::1'"):
        arrange(["q", "-incoming", "tcp::1"], None, "/s", incoming=True)
    with pytest.raises(VmmError, match="the command is a shell's"):
        arrange(["/bin/sh", "-c", "q"], None, "/s", incoming=True)
    assert arrange(["q"], None, "/s/other", incoming=False).words == ["q", *QMP]


def test_what_it_says_is_bounded() -> None:
    """A VMM in the background may say something for years: once there is no more room it is told so."""
    started = Started([sys.executable, "-c", """if True:
        import os, sys
        try:
            while True:
                os.write(2, b"again and again\\n" * 256)
        except PermissionError:
            sys.exit(5)
    """])
    started.go()
    assert started.wait() == 5
    assert started.words() == "again and again"
    assert os.fstat(started._source).st_size == 1 << 20


def test_it_waits_for_the_word(tmp_path: Path) -> None:
    """Its process id stays the same; it has the pipe that it is given, not that of the word; what it said is kept."""
    reader, writer = os.pipe()
    script = f"ls -l /proc/$$/fd >{tmp_path}/fds; echo pid $$ >&2; cat /proc/self/fd/{reader}; exit 3"
    started = Started(["sh", "-c", script], [reader])
    assert started.poll() is None
    word, given = (os.readlink(f"/proc/self/fd/{fd}") for fd in (started._go, reader))
    started.go()
    wait_for(lambda: "pid" in started.words())
    assert started.words() == f"pid {started.pid}"
    listed = (tmp_path / "fds").read_text()
    assert given in listed
    assert word not in listed
    os.write(writer, b"qemu-system-x86_64: bad\n")
    os.close(writer)
    assert started.wait() == 3
    assert started.words() == f"pid {started.pid}; bad"
    os.close(reader)


def test_what_cannot_run() -> None:
    started = Started(["/no/such/file"])
    started.go()
    assert started.wait() == 127
    assert started.words() == "/no/such/file: No such file or directory"


def test_it_ends_without_the_word() -> None:
    """`kill` before `go`; and if we end first, it does too."""
    started = Started(["sleep", "1000"])
    started.kill()
    assert started.poll() is not None
    code = ("from gmemd.vmm.start import Started; import os\n"
            "print(Started(['sleep', '1000']).pid, flush=True); os._exit(0)")
    pid = int(output([sys.executable, "-c", code]))
    wait_for(lambda: state(pid) in "ZX")


def test_in_the_foreground(capfd: pytest.CaptureFixture[str]) -> None:
    """What it says is passed on, and kept."""
    started = Started(["sh", "-c", "echo out; echo err >&2"], foreground=True)
    started.go()
    assert started.wait() == 0
    assert started.words() == "err"
    assert capfd.readouterr() == ("out\n", "err\n")
