"""A stock QEMU runs a guest on memory.raw itself, privately, from the device state beside it; the file stays."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from gmemd.vmm.qemu import Qemu
from tests.guests.firmware import SIZE
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.snapshots.engine import MEMBERS, do, running
from tests.vmm.test_qemu import World

pytestmark = [pytest.mark.e2e, needs_qemu]


def counted(qemu: Qemu) -> tuple[int, int]:
    """(starts, count) of the guest, as that QEMU sees its memory."""
    words = re.findall(r"0x([0-9a-f]{8})", qemu.ask("human-monitor-command", {"command-line": "xp /2wx 0x1000"}))
    return int(words[0], 16), int(words[1], 16)


def test_a_guest_runs_on_the_file(tmp_path: Path) -> None:
    """Two of them, each from the same moment."""
    root = tmp_path / "root"
    root.mkdir()
    with ExitStack() as ends:
        world = World(tmp_path, ends)
        first = world.start("first")
        world.guest.wait_runs()
        first.stop()
        with running("save", {"name": "s", "id": "m", "size": SIZE, "memory": {"fd": world.fd}}, root,
                     [world.fd]) as engine:
            draft = root / engine.heard("folder")["folder"]
            engine.heard("ready")
            with (draft / "vmstate").open("w+b") as state:
                first.save_state(state.fileno())
            engine.tell({"pass": {"dirty": None}})
            engine.heard("passed")
            engine.tell({"finish": MEMBERS})
            engine.heard("end")
        then = world.guest.count
        first.quit()
        for name in ("second", "third"):
            words = world.guest.command(name, "-incoming", "defer", memory=str(root / "s" / "memory.raw"))
            words = [word.replace("share=on", "share=off") for word in words]
            process = subprocess.Popen(words)
            ends.callback(process.wait)
            ends.callback(process.kill)
            qemu = Qemu(str(world.guest.qmp(name)), PATIENCE, wait=PATIENCE)
            ends.callback(qemu.close)
            with (root / "s" / "vmstate").open("rb") as state:
                qemu.load_state(state.fileno())
            assert counted(qemu) == (1, then)
            qemu.cont()
            wait_for(lambda qemu=qemu: counted(qemu)[1] != then)
            assert counted(qemu)[0] == 1, "it was started again"
        do("verify", root, "s")
    shutil.rmtree(root)
