"""Record what the kernel of this machine answers: `python -m tests.kernel.record > tests/kernel/recorded/KERNEL.json`.

Needs root and /dev/kvm, this folder and `gmemd`; no network, no pytest. KERNEL is the name of the profile that the
recording is for ("7.3"), and after a plus what is special about the host ("7.3+npt=0").
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import platform
import struct
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from gmemd.kernel.probe import name_of, outcome
from gmemd.kernel.profiles import DEFAULT, PROFILES
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel import host
from tests.kernel.questions import ASKED, MMAP, SHARED, Answer, Bare, ask, mapped
from tests.kernel.slots import ASKED_OF_LINUX

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]
_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_ASYNC = 1 << 15 | 1 << 18  # WP_ASYNC, RWP_ASYNC
_MODES = {"MISSING": 1, "WP": 2, "MINOR": 4, "RWP": 8}


def record() -> dict[str, Any]:
    """Everything, in the form of the recordings."""
    with closing(Bare()) as kernel:
        questions = {**ASKED, **ASKED_OF_LINUX}
        return {
            "kernel": platform.release(), "machine": platform.machine(), "date": f"{datetime.date.today()}",
            "host": {"kvm": _modules(), "nested paging": _nested_paging(), "nodes": len(host.online_nodes())},
            "device": {name: kernel._extension(name, of_device=True) for name in PROFILES[DEFAULT].capabilities},
            "probe": kernel.probe(),
            "answers": {", ".join(map(str, items)): ask(kernel, questions[items]) for items in sorted(questions)},
            "userfaultfd": {"features": f"{_features():#x}", **{
                f"{kind}, {how}": _registered(kernel, flags, features)
                for kind, flags in (("memfd", None), ("guest_memfd", SHARED), ("without INIT_SHARED", MMAP))
                for how, features in (("synchronous", _features() & ~_ASYNC), ("asynchronous", _features()))}},
        }


def _modules() -> list[str]:
    return sorted(name for name in os.listdir("/sys/module") if name == "kvm" or name.startswith("kvm_"))


def _nested_paging() -> bool:
    """Whether KVM uses the processor's second level of page tables."""
    for path in ("kvm_amd/parameters/npt", "kvm_intel/parameters/ept"):
        with contextlib.suppress(FileNotFoundError):
            return Path("/sys/module", path).read_text().strip() in ("Y", "1")
    return False


def _userfaultfd(features: int) -> tuple[int, int]:
    """(descriptor, the features that there are)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    request = bytearray(struct.pack("<QQQ", 0xAA, features, 0))
    fcntl.ioctl(fd, _API, request, True)
    return fd, struct.unpack("<QQQ", request)[1]


def _features() -> int:
    fd, features = _userfaultfd(0)
    os.close(fd)
    return features


def _registered(kernel: Bare, flags: int | None, features: int) -> Answer:
    """How registering a mapping ends in each mode, then for WP and afterwards for others; flags None: of a memfd."""
    if flags is not None:
        try:
            fd = kernel.create_guest_memfd(PAGE_SIZE, flags)
        except OSError as exc:
            return {"file": name_of(exc)}
    else:
        fd = os.memfd_create("recorded")
        os.ftruncate(fd, PAGE_SIZE)
    tried = {name: [mode] for name, mode in _MODES.items()}
    tried |= {"WP, then MISSING": [2, 1], "WP, then both": [2, 3], "both, then WP": [3, 2]}
    try:
        return {name: _register(fd, features, modes) for name, modes in tried.items()}
    finally:
        os.close(fd)


def _register(fd: int, features: int, modes: list[int]) -> str:
    """How the registrations end, one after the other; and what is in force then, as /proc/self/smaps says."""
    with mapped(fd, PAGE_SIZE) as address:
        uffd, _ = _userfaultfd(features)
        ends = [outcome(partial(fcntl.ioctl, uffd, _REGISTER, struct.pack("<QQQQ", address, PAGE_SIZE, mode, 0)))
                for mode in modes]
        words = ", ".join(sorted(_words(address) - {"rd", "wr", "sh", "mr", "mw", "me", "ms", "sd"}))
        os.close(uffd)
    return f"{', '.join(ends)} [{words}]"


def _words(address: int) -> set[str]:
    """The VmFlags of the mapping at an address."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith("VmFlags:") and inside:
                return set(line.split()[1:])
            if "-" in line.split()[0]:
                inside = int(line.split("-")[0], 16) == address
    return set()


def text(recorded: dict[str, Any]) -> str:
    """JSON with a line for each answer."""
    parts = []
    for name, value in recorded.items():
        inner = value if isinstance(value, dict) else {}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(answer)}" for key, answer in inner.items())
        parts.append(f"{json.dumps(name)}: " + (f"{{\n{lines}\n }}" if inner else json.dumps(value)))
    return "{\n " + ",\n ".join(parts) + "\n}"


def main() -> None:
    print(text(record()))


if __name__ == "__main__":
    main()
