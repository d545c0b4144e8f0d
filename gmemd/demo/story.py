"""`gmemd demo`: guest memory that outlives the VMM, then the daemon, and keeps its bytes through conversion.

It starts its own gmemd, under the keeper, on a private socket.  Each step says in brackets what was real and
what was simulated.  The memory is changed by gmemd/demo/guest.py, in processes of its own; in the last step by a guest
in QEMU.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from gmemd.client.client import Client
from gmemd.client.running import PATIENCE, RunningGmemd
from gmemd.demo import guest, qemu

SIZE = 2 << 20  # bytes of the object; the guest lives in the first half
HALF = SIZE // 2
ROUNDS = 100  # how far each guest counts before we go on


class Story(RunningGmemd):
    """gmemd under its keeper, and the process that runs a guest on its memory."""

    vmm: subprocess.Popen[str] | None = None

    def connect(self) -> Client:
        """A client of the daemon, once there is one."""
        return self.client(wait=PATIENCE, timeout=PATIENCE)

    def start_vmm(self, fd: int) -> str:
        """Hand the memory to another process, which runs a guest on it; its id, and the line that it prints."""
        self.vmm = subprocess.Popen([sys.executable, guest.__file__, f"/proc/self/fd/{fd}"], pass_fds=[fd],
                                    stdout=subprocess.PIPE, text=True)
        assert self.vmm.stdout is not None
        line = self.vmm.stdout.readline().strip()
        if not line:
            sys.exit("the guest process did not start")
        return f"process {self.vmm.pid}: {line}"

    def watch(self, fd: int) -> str:
        """Wait until the guest has counted on by ROUNDS; from where to where."""
        assert self.vmm is not None
        with guest.map_memory(fd) as memory:
            start = guest.counter(memory)
            end = time.monotonic() + PATIENCE
            while guest.counter(memory) < start + ROUNDS:
                if self.vmm.poll() is not None or time.monotonic() > end:
                    sys.exit("the guest does not count")
                time.sleep(0.005)
            return f"{start} ... {guest.counter(memory)}"

    def kill_vmm(self) -> int:
        """End the process that runs the guest, without any warning; its id."""
        assert self.vmm is not None
        self.vmm.kill()
        self.vmm.communicate()
        return self.vmm.pid

    def close(self) -> None:
        if self.vmm is not None and self.vmm.poll() is None:
            self.kill_vmm()
        super().close()


def tell(story: Story) -> None:
    with story.connect() as client:
        say(f"1. gmemd runs: process {story.daemon()}, under its keeper, process {story.process.pid}", "real")
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "gm0", "size": SIZE, "share": True,
                                      "guest-memfd": "on"})
        memory, [fd] = client.execute_fds("memdev-get-fd", {"id": "gm0"})
        [status] = client.execute("query-memdev-status")
        say(f"2. object-add created gm0: {memory['size']} bytes of {memory['kind']}",
            "real: a guest_memfd of KVM" if status["kernel"] == "kvm" else
            f"simulated: a sealed memfd under guest_memfd's rules ({status['kernel-reason']})")

    line = story.start_vmm(fd)
    say(f"3. Another process got its descriptor and runs a guest on it.\n   {line}\n"
        f"   the guest counts: {story.watch(fd)}",
        "real: a virtual processor of KVM" if guest.Vcpu.name in line else
        "simulated: no virtual processor, the process itself counts")

    killed = story.kill_vmm()
    line = story.start_vmm(fd)
    say(f"4. SIGKILL for that process, {killed}. Another one gets the same memory.\n   {line}\n"
        f"   the guest counts on: {story.watch(fd)}", "real: both processes and the kill")

    killed = story.kill()
    counted = story.watch(fd)
    os.close(fd)
    with story.connect() as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "gm0"})
        say(f"5. SIGKILL for gmemd, process {killed}. The guest counts on: {counted}\n"
            f"   The keeper has started process {story.daemon()}, which has gm0.\n"
            f"   Seen through it, the guest counts on: {story.watch(fd)}", "real")
        _convert(client, fd)
        [status] = client.execute("query-memdev-status")
    say(f"7. Nothing is lost: the guest counts on: {story.watch(fd)}, "
        f"{status['resident']} of {status['size']} bytes are in memory", "real")
    os.close(fd)
    _replace(story)


def _replace(story: Story) -> None:
    """Move a guest from one QEMU to another, if there is any QEMU."""
    if not shutil.which(qemu.PROGRAM):
        say(f"8. With {qemu.PROGRAM}, which is not installed here, a guest would go on in another QEMU.", "not shown")
        return
    with closing(qemu.Moved(story.socket, story.directory)) as moved:
        moved.run()
        say(f"8. QEMU, process {moved.pids[0]}, runs a guest on vm0, which counts to {moved.before}.\n"
            f"   gmemctl replace vm0 --qmp old.sock -- {qemu.PROGRAM} ...\n"
            f"   Another QEMU, process {moved.pids[1]}, has the guest, started only once; it counts on: "
            f"{moved.before} ... {moved.after}",
            "real: both QEMUs and the guest, whose processor is emulated (TCG)")


def _convert(client: Client, fd: int) -> None:
    """Make the half that the guest leaves alone private and shared again."""
    with mmap.mmap(fd, HALF, offset=HALF) as memory:
        memory[:] = os.urandom(1 << 12) * (HALF >> 12)
    before = _digest(fd)
    part: dict[str, Any] = {"id": "gm0", "offset": HALF, "size": HALF, "preserve": True}
    done = client.execute("memdev-convert", {**part, "to": "private"})
    private = client.execute("query-memdev-ranges", {"id": "gm0"})["private"]
    hidden = "they read as zero" if _digest(fd) == hashlib.sha256(bytes(HALF)).digest() else "they can still be read"
    client.execute("memdev-convert", {**part, "to": "shared"})
    if _digest(fd) != before:
        sys.exit("the bytes did not come back")
    say(f"6. {private} bytes next to the guest became private ({hidden}), then shared: the bytes are as they were",
        "simulated: gmemd sets them aside, and cannot keep others from writing there meanwhile" if done["simulated"]
        else "real: converted by the kernel")


def _digest(fd: int) -> bytes:
    with mmap.mmap(fd, HALF, offset=HALF) as memory:
        return hashlib.sha256(memory).digest()


def say(text: str, truth: str) -> None:
    """Print a step, and what of it is real."""
    print(f"{text}\n   [{truth}]", flush=True)


def main(argv: Sequence[str]) -> int:
    """Run `gmemd demo`; the exit status."""
    parser = argparse.ArgumentParser(prog="gmemd demo", description="Show guest memory that outlives everybody.")
    parser.add_argument("--stay", action="store_true", help="leave gmemd running, to try things on")
    parser.add_argument("--kernel", default="auto", metavar="auto|kvm|simulated", help="as gmemd's own option")
    options = parser.parse_args(argv)
    began = time.monotonic()
    with ExitStack() as at_end:
        try:
            story = at_end.enter_context(Story(kernel=options.kernel, keep=True, start_new_session=True))
            tell(story)
        except KeyboardInterrupt:
            print()
            return 130
        except (ConnectionError, TimeoutError) as exc:
            sys.exit(str(exc))
        if options.stay:
            story.kill_vmm()
            at_end.pop_all()
    print(f"\nThat took {time.monotonic() - began:.1f} seconds.")
    if options.stay:
        _invite(story)
    return 0


def _invite(story: Story) -> None:
    gmemctl = shown(Path(sys.executable).with_name("gmemctl"))
    print(f"""
gmemd goes on running, with gm0 in it. Its socket is

    {story.socket}

Three things to try:

    export GMEMD_SOCKET={story.socket}
    {gmemctl} ls
    {gmemctl} exec gm0 -- {shown(sys.executable)} -m gmemd.demo.guest --rounds 1000 {{gm0}}
    echo '{{"execute":"qmp_capabilities"}} {{"execute":"query-memdev"}}' | socat -t 5 - UNIX-CONNECT:{story.socket}

To end it: kill {story.process.pid}""")


def shown(path: str | Path) -> str:
    """Give a path as short as it can be typed here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
