"""A guest is saved with its devices, and goes back to that moment after its QEMU was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd, state
from tests.guests.linux import LinuxGuest, Mark, needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import gmemctl, output

_COUNTED = re.compile(rb"C (\d+) boot=")

pytestmark = [pytest.mark.e2e, needs_qemu]


class Scene:
    """A gmemd with a snapshots' directory, and a Linux guest on its object ram0; `close` ends every QEMU."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.daemon = stack.enter_context(RunningGmemd("--snapshots", str(directory / "snapshots"), keep=True))
        self.guest = LinuxGuest(directory)
        self.started: list[subprocess.Popen[bytes]] = []
        stack.callback(self.close)
        self.gmemctl("create", f"memory-backend-memfd,id=ram0,size={self.guest.size >> 20}M,share=on")
        self.name = "first"  # of the QEMU in which the guest runs
        self.start("exec", "ram0", "--", *self.command(self.name))
        self.guest.wait_started()

    def command(self, name: str, **command: str) -> list[str]:
        """The words of a QEMU of that name, with a second monitor."""
        return self.guest.command(name, "-qmp", f"unix:{self.guest.qmp(name)}.second,server=on,wait=off", **command)

    def second(self, name: str) -> Client:
        """Its second monitor."""
        return Client(f"{self.guest.qmp(name)}.second", timeout=PATIENCE)

    def gmemctl(self, *words: str, status: int = 0) -> str:
        """Run a verb to its end; what it prints."""
        return output(gmemctl("--socket", self.daemon.socket, *words), status=status)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a verb that runs a QEMU."""
        process = subprocess.Popen(gmemctl("--socket", self.daemon.socket, *words), stdin=subprocess.DEVNULL,
                                   start_new_session=True)
        self.started.append(process)
        return process

    def checkpoint(self, name: str, *options: str) -> tuple[int, int]:
        """Save the guest in the QEMU of that name; the counter before and after it."""
        before = self.guest.mark().count
        self.gmemctl("checkpoint", "ram0", "--qmp", str(self.guest.qmp(name)), *options)
        return before, self.guest.mark().count

    def kill(self, name: str) -> Mark:
        """Kill the QEMU of that name after its guest went on for a while; where it was then."""
        went_on = self.guest.check_went_on(self.guest.mark())
        with self.second(name) as monitor:
            pid = monitor.peer_pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: state(pid) in "ZX")
        assert self.guest.mark().count >= went_on.count
        return self.guest.mark()

    def kill_in_the_pause(self, name: str, kill: Callable[[subprocess.Popen[bytes]], object]) -> None:
        """Save the guest, and kill somebody, given the verb, when it is stopped: it goes on nevertheless."""
        before = self.guest.mark()
        with self.second(name) as monitor:
            verb = self.start("checkpoint", "ram0", "--qmp", str(self.guest.qmp(name)))
            monitor.wait_event("STOP")
            kill(verb)
            monitor.wait_event("RESUME")
        self.guest.check_went_on(before, sums=1)
        verb.wait(PATIENCE)

    def rollback(self, name: str, checkpoint: str = "ram0", **command: str) -> None:
        """Go back in a QEMU of that name, which runs once it answers."""
        self.start("rollback", checkpoint, "--", *self.command(name, **command))

    def check_went_back(self, saved: tuple[int, int], killed: Mark) -> None:
        """The guest goes on from a checkpoint, with the boot id and the bytes that it had."""
        wait_for(lambda: _COUNTED.search(self.guest.output.read_bytes(), killed.at))
        found = _COUNTED.search(self.guest.output.read_bytes(), killed.at)
        assert found is not None
        assert saved[0] <= int(found[1]) <= saved[1] + 1
        self.guest.check_went_on(Mark(killed.boot, int(found[1]), killed.at), sums=1)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def scene(directory: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(directory, stack)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A guest that runs in the QEMU `here.name`; it is the same one in the tests that ask for it."""
    with scene(tmp_path_factory.mktemp("checkpoint")) as made:
        yield made


def test_five_times(here: Scene) -> None:
    """Checkpoint, SIGKILL of QEMU, rollback: each time the guest goes on exactly from there.

    Once QEMU sends the memory itself, and that is not the newest checkpoint.
    """
    for number in range(1, 6):
        saved = here.checkpoint(here.name, *(["--live"] if number == 2 else []))
        if number == 2:
            here.gmemctl("snapshot", "verify", "ram0@2")
            here.checkpoint(here.name, "--name", "newest")
        killed = here.kill(here.name)
        here.name = f"after{number}"
        here.rollback(here.name, "ram0@2" if number == 2 else "ram0")
        here.check_went_back(saved, killed)
    assert here.gmemctl("snapshot", "ls", "-o", "name").split() == [
        "ram0@1", "ram0@2", "ram0@newest", "ram0@3", "ram0@4", "ram0@5"]


def test_killed_in_the_middle(here: Scene) -> None:
    """Whoever is killed while the guest stands still, gmemctl, gmemd or both gmemd and its keeper: it goes on.

    A checkpoint is there whole or not at all, and the next one is made and goes back as ever.
    """
    here.kill_in_the_pause(here.name, lambda verb: verb.kill())
    with here.daemon.client() as client:
        wait_for(lambda: all(job["status"] == "concluded" for job in client.execute("query-jobs")))
    here.kill_in_the_pause(here.name, lambda verb: here.daemon.kill())
    here.daemon.wait_greeting()
    for name in here.gmemctl("snapshot", "ls", "-o", "name").split():
        here.gmemctl("snapshot", "verify", name)
    saved = here.checkpoint(here.name)
    killed = here.kill(here.name)
    here.name = "last"
    here.rollback(here.name)
    here.check_went_back(saved, killed)
    here.kill_in_the_pause(here.name, lambda verb: here.daemon._kill())


def test_swap(tmp_path: Path) -> None:
    """The guest goes on in another QEMU with a private copy; the memory is the checkpoint, again and again."""
    with scene(tmp_path) as here:
        before = here.guest.mark()
        saved = here.checkpoint("first", "--swap", "--new-qmp", str(here.guest.qmp("second")), "--",
                                *here.command("second", share="off"))
        here.guest.check_went_on(before, sums=1)
        for name in ("third", "fourth"):
            killed = here.kill("second" if name == "third" else "third")
            here.rollback(name, share="off")
            here.check_went_back(saved, killed)
        assert here.gmemctl("snapshot", "ls", "-o", "name") == "ram0@1\n"
