"""gmemd is killed while somebody stands still for a copy: it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gmemd.client.client import Client
from tests.commands.test_fences import SIZE, state, writing
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for

pytestmark = pytest.mark.e2e


def children(pid: int) -> dict[int, str]:
    """The processes that a process has started, with their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


@contextmanager
def standing_still(client: Client) -> Iterator[subprocess.Popen[str]]:
    """A writer whose memory is being exported into a pipe that nobody reads on while it is fenced."""
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "m", "size": SIZE})
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "m"})
    with writing(fd) as writer:
        os.close(fd)  # or this process would be stopped, too
        reader, line = os.pipe()
        client.execute("getfd", {"fdname": "line"}, fds=[line])
        os.close(line)
        client.execute("memdev-export", {"id": "m", "fdname": "line", "rounds": 0, "job-id": "j",
                                         "fence": {"via": "freeze", "deadline": 600000}})

        def read() -> None:
            while state(writer.pid) != "T" and os.read(reader, 4096):
                pass

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert state(writer.pid) == "T"
        yield writer
        os.close(reader)


def test_the_guard_lets_go_on() -> None:
    """Also where nothing is kept, and no daemon follows."""
    daemon = Daemon()
    with daemon.client() as client, standing_still(client) as writer:
        daemon.process.kill()
        wait_for(lambda: state(writer.pid) != "T")
    daemon.process.wait()
    daemon.remove()


def test_the_next_daemon_lets_go_on() -> None:
    """If the guard was killed with it; but not on one whom somebody else has stopped."""
    with Daemon("--keeper", persist="on") as keeper, keeper.client() as client, standing_still(client) as writer:
        [daemon] = children(keeper.pid)
        guards = [pid for pid, words in children(daemon).items() if " guard " in words]
        other = subprocess.Popen(["sleep", "1000"])
        other.send_signal(signal.SIGSTOP)
        for pid in (*guards, daemon):
            os.kill(pid, signal.SIGKILL)
        assert len(guards) == 1
        wait_for(lambda: state(writer.pid) != "T")
        assert state(other.pid) == "T"
        other.kill()
        other.wait()
        with keeper.client() as again:
            assert [one["id"] for one in again.execute("query-memdev")] == ["m"]
