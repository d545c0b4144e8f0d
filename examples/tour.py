"""What gmemd is for, in one minute: guest memory that outlives the process that runs the guest.

It starts a daemon of its own on a private socket, and leaves it running.
Called by script/run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from guest import counter, map_memory

from gmemd.qmp.client import Client

ROUNDS = 100  # how far each guest gets before we go on
START = 30.0  # seconds
GUEST = Path(__file__).with_name("guest.py")
BIN = Path(sys.executable).parent


def start_daemon(directory: Path) -> subprocess.Popen[bytes]:
    """Start a gmemd that stays when this program ends."""
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gmemd", "--qmp", f"unix:{directory}/qmp.sock", "--persist", "off",
             "--state-dir", str(directory / "state")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def run_guest(fd: int) -> subprocess.Popen[str]:
    """Hand the memory to another process, which runs a guest on it; print what that says of itself."""
    guest = subprocess.Popen([sys.executable, str(GUEST), f"/proc/self/fd/{fd}"], pass_fds=[fd],
                             stdout=subprocess.PIPE, text=True)
    assert guest.stdout is not None
    line = guest.stdout.readline().strip()
    if not line:
        sys.exit("the guest process did not start")
    print(f"   process {guest.pid}: {line}")
    return guest


def watch(fd: int, guest: subprocess.Popen[str]) -> int:
    """Wait until the guest has counted on by ROUNDS; give the counter."""
    with map_memory(fd) as memory:
        goal = counter(memory) + ROUNDS
        end = time.monotonic() + START
        while counter(memory) < goal:
            if guest.poll() is not None or time.monotonic() > end:
                sys.exit("the guest does not count")
            time.sleep(0.01)
        return counter(memory)


def kill(guest: subprocess.Popen[str]) -> None:
    """End it without any warning."""
    guest.kill()
    guest.communicate()


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="gmemd-"))
    sock = directory / "qmp.sock"
    daemon = start_daemon(directory)
    with Client(str(sock), wait=START) as client:
        print(f"1. gmemd runs: process {daemon.pid}, socket {sock}")

        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "gm0", "size": 2 << 20,
                                      "share": True, "guest-memfd": "on"})
        memory, [fd] = client.execute_fds("memdev-get-fd", {"id": "gm0"})
        [status] = client.execute("query-memdev-status")
        print(f"2. object-add made gm0: {memory['size']} bytes of {memory['kind']}, "
              f"kernel {status['kernel']} ({status['kernel-reason']})")

    print("3. Its descriptor goes to another process, which runs a guest on it")
    guest = run_guest(fd)
    reached = watch(fd, guest)
    print(f"   the memory changes: counter {reached}")

    kill(guest)
    print("4. SIGKILL for that process. Another one gets the same memory")
    guest = run_guest(fd)
    print(f"   the guest went on where it was: counter {watch(fd, guest)}")
    kill(guest)
    os.close(fd)

    print(f"""
gmemd goes on running, with gm0 in it. Its socket is

    {sock}

Three things to try:

    export GMEMD_SOCKET={sock}
    {shown(BIN / "gmemctl")} ls
    {shown(BIN / "gmemctl")} exec gm0 -- {shown(sys.executable)} {shown(GUEST)} --rounds 1000 {{gm0}}
    echo '{{"execute":"qmp_capabilities"}} {{"execute":"query-memdev"}}' | socat -t 5 - UNIX-CONNECT:{sock}

To end it: kill {daemon.pid}""")


def shown(path: str | Path) -> str:
    """Give a path as short as it can be typed here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
