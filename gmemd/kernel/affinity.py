"""NUMA nodes, their CPUs, and the CPUs that threads run on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from gmemd.kernel.hugepages import SYS


def online_nodes(sys: str = SYS) -> list[int]:
    """The online NUMA nodes; [0] on a kernel without NUMA."""
    try:
        with open(f"{sys}/devices/system/node/online") as file:
            return sorted(_list(file.read()))
    except OSError:
        return [0]


def cpus_of(nodes: Iterable[int], sys: str = SYS) -> set[int]:
    """The CPUs of these NUMA nodes; a kernel built without NUMA has only node 0."""
    if not os.path.isdir(f"{sys}/devices/system/node"):
        return os.sched_getaffinity(0) if 0 in nodes else set()
    cpus: set[int] = set()
    for node in nodes:
        with suppress(FileNotFoundError), open(f"{sys}/devices/system/node/node{node}/cpulist") as file:
            cpus |= _list(file.read())
    return cpus


def online_cpus(sys: str = SYS) -> set[int]:
    """The CPUs that are online."""
    with open(f"{sys}/devices/system/cpu/online") as file:
        return _list(file.read())


def _list(text: str) -> set[int]:
    """Read the kernel's form of a list, "0-3,8"."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in ends for number in range(int(part[0]), int(part[-1]) + 1)}


def bind(cpus: Iterable[int] | None) -> list[int]:
    """Bind the calling thread to those of the CPUs that it may use (None: unchanged); return its CPUs."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    return sorted(os.sched_getaffinity(0))


@contextmanager
def bound(cpus: Iterable[int] | None) -> Iterator[None]:
    """Bind the calling thread, and those that it starts, in the block, as far as the CPUs allow it now."""
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
