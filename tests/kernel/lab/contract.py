"""What gmemd is on the kernel around it, inside the lab: python -m tests.kernel.lab.contract [PYTEST ARGUMENT...].

What doctor finds; a session of a client with a daemon that is killed under its keeper; the tests of tests/kernel, among
which is one that compares the kernel with its recording. Ends with 1 if any of them is wrong.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from tests.kernel import host

_SIZE = 16 << 20
_SPOTS = (0, _SIZE // 2)
_LAB: Final = "tests/kernel/test_lab.py"  # of what starts the machine, not of what is in it


def doctor() -> int:
    """The daemon's view of the machine; it ends with 1 where something is missing."""
    return subprocess.run([sys.executable, "-m", "gmemd.cli.gmemctl", "doctor"], check=False).returncode


def session() -> int:
    """Objects on the last NUMA node, touched from the first; the same bytes after the daemon was killed."""
    node, wrong = host.online_nodes()[-1], 0
    os.sched_setaffinity(0, {0})
    with RunningGmemd(kernel="auto", keep=True) as gmemd:
        with gmemd.client() as client:
            for name, kind in (("guest", "guest-memfd"), ("memfd", "memfd")):
                client.execute("object-add", {"id": name, "qom-type": f"memory-backend-{kind}", "size": _SIZE,
                                              "host-nodes": [node], "policy": "bind"})
                with _mapped(client, name) as address:
                    for spot in _SPOTS:
                        host.fill(address + spot, 0xA5, 4096)
                    nodes = {host.node_of(address + spot) for spot in _SPOTS}
                print(f"{name}: bound to node {node}, touched from CPU 0: on {nodes}")
                wrong += nodes != {node}
            [shown] = {row["kernel"] for row in client.execute("query-memdev-status")}
        gmemd.crash()
        with gmemd.client() as client:
            for name in ("guest", "memfd"):
                with _mapped(client, name) as address:
                    kept = {host.look(address + spot, 4096) for spot in _SPOTS} == {b"\xa5" * 4096}
                print(f"{name}: {'the same' if kept else 'OTHER'} bytes after the daemon was killed")
                wrong += not kept
    print(f"kernel: {shown}")
    return wrong


@contextmanager
def _mapped(client: Client, name: str) -> Iterator[int]:
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    try:
        with host.mapped(fd, _SIZE) as address:
            yield address
    finally:
        os.close(fd)


def tests(arguments: list[str]) -> int:
    """The tests that a kernel can fail."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel", "--ignore", _LAB, *arguments]
    return subprocess.run([sys.executable, *words], check=False).returncode


def main() -> int:
    wrong = 0
    for title, act in (("doctor", doctor), ("session", session), ("tests", lambda: tests(sys.argv[1:]))):
        print(f"== Linux {platform.release()}: {title}", flush=True)
        wrong += bool(act())
    return wrong


if __name__ == "__main__":
    sys.exit(main())
