"""On which CPUs threads run: what the kernel makes of a list of them, and the CPUs of NUMA nodes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from gmemd.kernel.hugepages import SYS


def cpus_of(nodes: Iterable[int], sys: str = SYS) -> set[int]:
    """The CPUs of these NUMA nodes; a kernel built without NUMA has node 0 alone."""
    if not os.path.isdir(f"{sys}/devices/system/node"):
        return os.sched_getaffinity(0) if 0 in nodes else set()
    cpus: set[int] = set()
    for node in nodes:
        with suppress(FileNotFoundError), open(f"{sys}/devices/system/node/node{node}/cpulist") as file:
            cpus |= _list(file.read())
    return cpus


def _list(text: str) -> set[int]:
    """Read the kernel's form of a list, "0-3,8"."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for part in ends for cpu in range(int(part[0]), int(part[-1]) + 1)}


def bind(cpus: Iterable[int] | None) -> list[int]:
    """Bind the calling thread to those of the CPUs that it may use (None: leave it); return its CPUs."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    return sorted(os.sched_getaffinity(0))


@contextmanager
def bound(cpus: Iterable[int] | None) -> Iterator[None]:
    """Bind the calling thread, and those that it starts, in the block; as well as the CPUs of now allow it."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        bind(cpus)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)
