"""What cannot be saved, or cannot go back, is refused in one sentence, and nothing has changed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import state
from gmemd.errors import QmpError
from tests.daemon import Daemon
from tests.e2e.test_docs import blocks
from tests.e2e.test_qemu_boots import guest_is_firmware
from tests.guests.firmware import FirmwareGuest
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, gmemctl

pytestmark = [pytest.mark.e2e, needs_qemu]


class Scene:
    """A gmemd, and a QEMU that runs the firmware guest on its object vm1."""

    def __init__(self, directory: Path, ends: ExitStack) -> None:
        self.daemon = ends.enter_context(Daemon("--snapshots", str(directory / "snapshots")))
        self.client = ends.enter_context(self.daemon.client())
        self.directory = directory
        self.started: list[subprocess.Popen[str]] = []
        ends.callback(self.close)
        self.client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "vm1", "size": 64 << 20})
        self.guest = self.seen()
        self.start("exec", "vm1", "--", *self.guest.command(
            "first", "-qmp", f"unix:{self.guest.qmp('first')}.events,server=on,wait=off"))
        self.guest.wait_runs()

    def seen(self) -> FirmwareGuest:
        """The guest in what is the object's memory now."""
        _, [fd] = self.client.execute_fds("memdev-get-fd", {"id": "vm1"})
        try:
            return FirmwareGuest(self.directory, fd, "vm1")
        finally:
            os.close(fd)

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(gmemctl("--socket", self.daemon.socket, *words), stdin=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.started.append(process)
        return process

    def said(self, *words: str, status: int = 0) -> str:
        """Run a verb to its end; what it says on its standard error."""
        process = self.start(*words)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, said
        return said

    def checkpoint(self, *options: str, status: int = 0) -> str:
        return self.said("checkpoint", "vm1", "--qmp", str(self.guest.qmp("first")), *options, status=status)

    def kill(self) -> None:
        with Client(self.guest.qmp("first"), timeout=PATIENCE) as monitor:
            pid = monitor.peer_pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: state(pid) in "ZX")
        self.guest.memory.close()  # or we would hold the object

    def holders(self) -> list[str]:
        return [holder["comm"] for holder in self.client.execute("query-memdev-holders", {"id": "vm1"})]

    def check_goes_back(self) -> None:
        """A rollback works, after `kill`."""
        self.start("rollback", "vm1", "--", *self.guest.command("again"))
        wait_for(lambda: "qemu-system-x86" in self.holders())
        after = self.seen()
        after.wait_runs()
        assert after.count > 0

    def close(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as ends:
        yield Scene(tmp_path, ends)


def test_a_state_that_does_not_fit(scene: Scene) -> None:
    """QEMU's words are quoted, nothing is left running, and the checkpoint can be used afterwards."""
    scene.checkpoint()
    said = scene.said("rollback", "vm1", "--", *scene.guest.command("again"), status=125)
    assert "vm1" in said  # the guest runs on it
    scene.guest.wait_runs()
    scene.kill()
    said = scene.said("rollback", "vm1", "--", *scene.guest.command("again", machine="pc-i440fx-7.1"), status=125)
    assert "Machine type received is 'pc-i440fx-7.2' and local is 'pc-i440fx-7.1'" in said
    assert "Traceback" not in said
    said = scene.said("rollback", "vm1", "--", *scene.guest.command("again"), "-nonsense", status=125)
    assert "-nonsense: invalid option" in said
    path = f"mem-path={scene.directory}/other"
    other = [word.replace("mem-path={vm1}", path) for word in scene.guest.command("again")]
    assert "has not mapped 'vm1' as its memory" in scene.said("rollback", "vm1", "--", *other, status=125)
    assert scene.said("rollback", "vm1", "--", "/nowhere/qemu", status=125).count("No such file") >= 1
    assert scene.holders() == []
    scene.check_goes_back()


def test_what_is_not_a_checkpoint(scene: Scene) -> None:
    assert "there is no checkpoint of 'vm1'" in scene.said("rollback", "vm1", "--", "true", status=125)
    assert "snapshot 'vm1@1' not found" in scene.said("rollback", "vm1@1", "--", "true", status=125)
    scene.said("snapshot", "save", "vm1", "vm1@plain", "--via", "qmp", "--qmp", str(scene.guest.qmp("first")))
    assert "'vm1@plain' is not a checkpoint: it has no device state" in \
        scene.said("rollback", "vm1@plain", "--", "true", status=125)
    assert "needs a command" in scene.said("rollback", "vm1", status=2)
    scene.guest.wait_runs()


@contextmanager
def served(path: Path, words: bytes, *, ends: bool) -> Iterator[None]:
    """A socket that says something to whoever connects, and then nothing more or the end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        kept: list[socket.socket] = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    peer.sendall(words)
                    kept.append(peer)
                    if ends:
                        kept.pop().close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for peer in kept:
                peer.close()


def test_what_is_not_a_qemu(scene: Scene, tmp_path: Path) -> None:
    """Whatever listens there instead: one sentence, and the guest runs as before."""
    for number, (words, ends) in enumerate([(b"", False), (b"", True), (b'{"QMP": {"vers', False),
                                            (b"220 mail.example.org ESMTP\r\n", False)]):
        path = tmp_path / f"wrong{number}"
        with served(path, words, ends=ends):
            said = scene.said("--timeout", "1", "checkpoint", "vm1", "--qmp", str(path), status=1)
        assert said.count("\n") == 1
        assert str(path) in said
        scene.guest.wait_runs()
    assert "No such file" in scene.said("checkpoint", "vm1", "--qmp", str(tmp_path / "nothing"), status=1)
    assert "needs a command" in scene.checkpoint("--swap", status=2)
    assert "are for --swap" in scene.checkpoint("--", "true", status=2)
    assert scene.client.execute("query-memdev-snapshots") == []
    scene.checkpoint()


def test_another_guest(scene: Scene) -> None:
    """A QEMU whose memory is not the object's is not saved as if it were, nor one that would go on writing it."""
    scene.client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "other", "size": 64 << 20})
    said = scene.said("checkpoint", "other", "--qmp", str(scene.guest.qmp("first")), status=1)
    assert "does not share 'other'" in said
    words = scene.guest.command("second")
    said = scene.checkpoint("--swap", "--new-qmp", str(scene.guest.qmp("second")), "--", *words, status=1)
    assert "write share=off" in said
    assert "the guest runs in the old VMM as before" in said
    scene.guest.wait_runs()
    assert scene.holders().count("qemu-system-x86") == 1


def test_a_cancelled_live_checkpoint(scene: Scene) -> None:
    """However far QEMU has sent its memory: the guest goes on, nothing is left, and the next one succeeds."""
    arguments = {"id": "vm1", "device-state": True, "migrate": True,
                 "fence": {"via": "qmp", "qmp": str(scene.guest.qmp("first"))}}
    for number, delay in enumerate((0, 0.1, 0.3, 0.6)):
        scene.client.execute("memdev-snapshot", {**arguments, "job-id": f"j{number}", "name": f"n{number}"})
        time.sleep(delay)
        with suppress(QmpError):  # it has ended
            scene.client.execute("job-cancel", {"id": f"j{number}"})
        wait_for(lambda: all(job["status"] == "concluded" for job in scene.client.execute("query-jobs")))
        scene.guest.wait_runs()
        ended = {job["id"]: job.get("error") for job in scene.client.execute("query-jobs")}
        there = [one["name"] for one in scene.client.execute("query-memdev-snapshots")]
        assert (ended[f"j{number}"] is None) == (f"n{number}" in there)
        assert [name for name in os.listdir(scene.directory / "snapshots") if name.startswith(".")] == []
    scene.checkpoint("--live")
    scene.said("snapshot", "verify", "vm1@1")
    assert scene.guest.starts == 1


def test_a_killed_swap_leaves_one_guest(scene: Scene) -> None:
    """gmemctl is killed when the guest is stopped: it runs in one of the two QEMUs, and the other one has ended."""
    first, second = scene.guest.qmp("first"), scene.guest.qmp("second")
    words = [word.replace("share=on", "share=off") for word in scene.guest.command("second")]
    with Client(f"{first}.events", timeout=PATIENCE) as events:
        pid = events.peer_pid
        verb = scene.start("checkpoint", "vm1", "--qmp", str(first), "--swap", "--new-qmp", str(second), "--", *words)
        events.wait_event("STOP")
        verb.kill()
    wait_for(lambda: _runs(first) or (_runs(second) and state(pid) in "ZX"))
    if state(pid) not in "ZX":
        wait_for(lambda: scene.holders().count("qemu-system-x86") == 1)
        scene.guest.wait_runs()
    with suppress(OSError), Client(second, timeout=PATIENCE) as monitor:
        monitor.execute("quit")


def test_the_blocks_of_the_page_run(tmp_path: Path) -> None:
    """Those of docs/qemu.md, as they stand there."""
    start, save, back, swap = (text.replace("/tmp/", f"{tmp_path}/") for word, text in blocks(ROOT / "docs/qemu.md")
                               if word == "checkpoint")
    with Daemon("--snapshots", str(tmp_path / "snapshots")) as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "vm1", "size": 64 << 20})

        def monitor(name: str) -> Client:
            return Client(tmp_path / name, timeout=PATIENCE, wait=PATIENCE)

        def run(text: str) -> None:
            shell.stdin.write(f"{text}echo done\n")
            shell.stdin.flush()
            while (line := shell.stdout.readline()) != "done\n":
                assert line, "the shell has ended"

        with subprocess.Popen(["bash", "-eu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True, env=guest_is_firmware(tmp_path, daemon)) as shell:
            assert shell.stdin is not None
            assert shell.stdout is not None
            try:
                run(start)
                with monitor("vm1.sock") as qemu:
                    pid = qemu.peer_pid
                    wait_for(lambda: qemu.execute("query-status")["running"])
                run(save)
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda: state(pid) in "ZX")
                (tmp_path / "vm1.sock").unlink()
                run(back)
                wait_for(lambda: _runs(tmp_path / "vm1.sock"))
                run(swap)
                wait_for(lambda: _runs(tmp_path / "vm1b.sock"))
                assert [one["name"] for one in client.execute("query-memdev-snapshots")] == ["vm1@1", "vm1@2"]
            finally:
                with suppress(OSError), monitor("vm1b.sock") as qemu:
                    os.kill(qemu.peer_pid, signal.SIGKILL)
                os.killpg(shell.pid, signal.SIGKILL)


def _runs(path: Path) -> bool:
    """Whether a guest runs in the QEMU that has its QMP socket there, if one has."""
    with suppress(OSError), Client(path, timeout=1) as monitor:
        return bool(monitor.execute("query-status")["running"])
    return False
