"""The ladder of kexecs, inside the lab's machine: python -m tests.kernel.lab.ladder [--rungs N] [--kvm] [--lost].

Started at each boot. The first time it makes the objects; after each kexec it looks for them, and what it saw goes to
its output. What it knows is on the disk, in _STATE. Ends with 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmemd.client.client import Client
from gmemd.errors import QmpError

_STATE = Path("/var/lib/lab.json")
_TOLD = Path("/var/lib/lab.consumer")
_CONSUMED = "plain2"  # a program counts in its first bytes
_SOCKET = "/run/gmemd/qmp.sock"
_PATIENCE = 1800.0  # seconds
_MIB = 1 << 20
_SPARSE = 4096 * _MIB
_USED = 32 * _MIB  # at its start and in its middle
# what is another after any start of the daemon
_OF_NOW = ("age", "survival", "kernel-reason", "resident", "handed-out", "lease")


def objects() -> dict[str, dict[str, Any]]:
    """The twenty objects of the ladder, by id: the arguments of object-add."""
    made: dict[str, dict[str, Any]] = {"sparse": {"qom-type": "memory-backend-memfd", "size": _SPARSE}}
    for number in range(4):
        size = (1 + number) * _MIB
        made[f"sealed{number}"] = {"qom-type": "memory-backend-memfd", "size": size}
        made[f"shm{number}"] = {"qom-type": "memory-backend-shm", "size": size}
        made[f"ram{number}"] = {"qom-type": "memory-backend-ram", "size": size, "share": True}
        made[f"guest{number}"] = {"qom-type": "memory-backend-guest-memfd", "size": size}
    for number in range(3):
        made[f"plain{number}"] = {"qom-type": "memory-backend-memfd", "size": _MIB, "seal": False}
    return made


class Rung:
    """One boot: the client, and what was wrong so far."""

    def __init__(self, client: Client, kvm: bool, lost: bool) -> None:
        self.client = client
        self.kvm = kvm
        self.lost = lost
        self.wrong: list[str] = []

    def make(self) -> dict[str, Any]:
        """Create everything; what must be found again."""
        for name, arguments in objects().items():
            self.client.execute("object-add", {"id": name, **arguments})
            for start, length in _used(arguments["size"]) if name != _CONSUMED else ():
                with self._mapped(name, start, length) as memory:
                    memory[:] = random.Random(f"{name} {start}").randbytes(length)
        self.client.execute("memdev-convert", {"id": "guest1", "offset": 0, "size": 65536, "to": "private"})
        _, fds = self.client.execute_fds("memdev-get-fd", {"id": "plain0", "lease": "keep"})
        os.close(fds[0])
        for row in self.client.execute("query-memdev-status"):
            [fate] = [one for one in row["survival"] if one["event"] == "kexec"]
            print(f"promise {row['id']}: {fate['answer']} {fate.get('advice', '')}")
        return {"status": self._status(), "ranges": self._ranges(),
                "bytes": {name: self._digest(name) for name in objects() if name != _CONSUMED}}

    def look(self, before: dict[str, Any]) -> None:
        """Compare everything with what was there before the kexec."""
        lost = {row["id"]: row for row in self.client.execute("query-memdev-lost")}
        for row in lost.values():
            print(f"lost {json.dumps(row)}")
        unclaimed = self.client.execute("query-memdev-unclaimed")
        print(f"{len(self._status())} objects, {len(lost)} lost, {len(unclaimed)} unclaimed")
        for row in unclaimed:
            self.wrong.append(f"unclaimed: {json.dumps(row)}")
        there = self._status()
        if self._expected("guest1") and self._ranges() != before["ranges"]:
            self.wrong.append(f"guest1: the ranges were {before['ranges']}, are {self._ranges()}")
        for name in objects():
            if self._expected(name):
                self._compare(name, before, there)
            elif name not in lost or not lost[name].get("reason"):
                self.wrong.append(f"{name} is lost, and nothing says so")

    def _expected(self, name: str) -> bool:
        """Whether a kexec leaves the object."""
        return not self.lost and not (self.kvm and name.startswith("guest"))

    def _compare(self, name: str, before: dict[str, Any], there: dict[str, Any]) -> None:
        if name not in there:
            self.wrong.append(f"{name} is not there")
            return
        old, new = before["status"][name], there[name]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                self.wrong.append(f"{name}: '{key}' was {old.get(key)}, is {new.get(key)}")
        try:
            if name != _CONSUMED and before["bytes"][name] != self._digest(name):
                self.wrong.append(f"{name}: other bytes")
        except (OSError, ValueError) as exc:
            self.wrong.append(f"{name}: {exc}")

    def _status(self) -> dict[str, Any]:
        return {row["id"]: {key: value for key, value in row.items() if key not in _OF_NOW}
                for row in self.client.execute("query-memdev-status")}

    def _ranges(self) -> Any:
        try:
            return self.client.execute("query-memdev-ranges", {"id": "guest1"})
        except QmpError as exc:
            return str(exc)

    def _digest(self, name: str) -> str:
        """Of the bytes that were written; and that there are none between."""
        digest = hashlib.blake2b()
        size = objects()[name]["size"]
        for start, length in _used(size):
            with self._mapped(name, start, length) as memory:
                digest.update(memory)
        if size == _SPARSE:
            with self._mapped(name, 0, size) as memory:
                for offset in range(_USED, size // 2, 16 * _MIB):
                    digest.update(memory[offset : offset + 4096])
        return digest.hexdigest()

    @contextlib.contextmanager
    def _mapped(self, name: str, start: int, length: int) -> Iterator[mmap.mmap]:
        """The memory of an object, writable."""
        _, [fd] = self.client.execute_fds("memdev-get-fd", {"id": name})
        try:
            with mmap.mmap(fd, length, offset=start) as memory:
                yield memory
        finally:
            os.close(fd)


def _used(size: int) -> list[tuple[int, int]]:
    """(start, length) of the parts of an object that are written to."""
    return [(0, _USED), (size // 2, _USED)] if size == _SPARSE else [(0, size)]


def consume() -> None:
    """A program with memory of its own: what it counts there goes on after the kexec. It writes down how it ends."""
    told = "nothing"

    def end(number: int, _: object) -> None:
        nonlocal told
        told = signal.Signals(number).name
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    with Client(_SOCKET, timeout=_PATIENCE, wait=_PATIENCE) as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": _CONSUMED})
        with mmap.mmap(fd, 4096) as memory:
            memory[:8] = (int.from_bytes(memory[:8], "little") + 1).to_bytes(8, "little")
            print(int.from_bytes(memory[:8], "little"), flush=True)
            try:
                told = json.dumps(client.wait_event(timeout=_PATIENCE))
            except (OSError, EOFError) as exc:
                told = repr(exc)
            finally:
                _TOLD.write_text(told)


def _start_consumer(rung: int) -> str:
    """What is wrong with what it counted; ""."""
    if rung:
        print("the consumer was told:", _TOLD.read_text() if _TOLD.exists() else "nothing")
    process = subprocess.Popen([sys.executable, "-m", "tests.kernel.lab.ladder", "--consume"], text=True,
                               stdout=subprocess.PIPE)
    count = process.stdout.readline().strip() if process.stdout else ""
    print("the consumer counted to", count)
    return "" if count == str(rung + 1) else f"the consumer counted to {count}, not {rung + 1}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rungs", type=int, default=2, help="so many kexecs")
    parser.add_argument("--kvm", action="store_true", help="guest_memfds are real, and lost")
    parser.add_argument("--lost", action="store_true", help="everything is lost: there is no live update")
    parser.add_argument("--consume", action="store_true")
    arguments = parser.parse_args()
    if arguments.consume:
        consume()
        return 0
    state = json.loads(_STATE.read_text()) if _STATE.exists() else {"rung": 0, "wrong": []}
    print(f"== rung {state['rung']}: Linux {os.uname().release}, {_said('systemctl', '--version')},"
          f" live update {Path('/dev/liveupdate').exists()}, up {Path('/proc/uptime').read_text().split()[0]} s",
          flush=True)
    if Path("/dev/kvm").exists():
        shutil.chown("/dev/kvm", group="kvm" if arguments.kvm else "root")
        os.chmod("/dev/kvm", 0o660)
    with Client(_SOCKET, timeout=_PATIENCE, wait=_PATIENCE) as client:
        rung = Rung(client, arguments.kvm, arguments.lost)
        if state["rung"] == 0:
            state["before"] = rung.make()
        else:
            rung.look(state["before"])
    if not arguments.lost or state["rung"] == 0:
        rung.wrong += filter(None, [_start_consumer(state["rung"])])
    state["wrong"] += [f"rung {state['rung']}: {words}" for words in rung.wrong]
    for words in rung.wrong:
        print("WRONG", words)
    print(_said("systemd-analyze", "fdstore", "gmemd.service", "--no-pager"), flush=True)
    if state["rung"] == arguments.rungs or (arguments.lost and state["rung"] == 1):
        print(f"{len(state['wrong'])} wrong")
        return 1 if state["wrong"] else 0
    state["rung"] += 1
    _STATE.write_text(json.dumps(state))
    _kexec()
    return 1


def _kexec() -> None:
    """Start the same kernel again; returns only if that does not happen."""
    subprocess.run(["kexec", "-s", "-l", "/boot/bzImage", "--reuse-cmdline"], check=True)
    os.sync()
    subprocess.run(["systemctl", "kexec", "--no-block"], check=True)
    time.sleep(_PATIENCE)


def _said(*words: str) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip() if "\n" not in done.stdout.strip() or "fdstore" in words else done.stdout.split("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
