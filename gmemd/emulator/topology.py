"""Memory, processors and NUMA nodes: -m, -smp and -numa."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gmemd.emulator.argv import Pairs
from gmemd.errors import QmpError
from gmemd.schema.sizes import parse_range

_MIB = 1 << 20
_DEFAULT_RAM = 128 * _MIB
_RAM_UNIT = 8192  # bytes

CPU_TYPE = "qemu64-x86_64-cpu"
_LEVELS = ("sockets", "dies", "modules", "cores", "threads")
_SMP = ("cpus", "maxcpus", "drawers", "books", "clusters", *_LEVELS)
_NUMA_NODE = ("type", "nodeid", "cpus", "memdev", "initiator", "mem")
_NUMA_OTHER = ("dist", "cpu", "hmat-lb", "hmat-cache")  # no effect without a guest


@dataclass(frozen=True)
class Ram:
    """-m: bytes at start, slots for dimms, maximum bytes (0: the same as at start)."""

    size: int = _DEFAULT_RAM
    slots: int = 0
    most: int = 0
    given: bool = False


@dataclass(frozen=True)
class Cpus:
    """-smp: the number of processors now and at most, and their topology."""

    count: int = 1
    most: int = 1
    cores: int = 1  # of a socket
    threads: int = 1  # of a core
    dies: int = field(default=1, compare=False)  # that the cores of a socket lie on
    modules: int = field(default=1, compare=False)  # that those of a die are grouped in

    @property
    def sockets(self) -> int:
        """The maximum number."""
        return self.most // (self.cores * self.threads)


@dataclass(frozen=True)
class NumaNode:
    """-numa node: its number, its memory object, its processors."""

    number: int
    memdev: str
    cpus: tuple[int, ...]
    where: str  # the option as written


def ram_of(pairs: Pairs, before: Ram) -> Ram:
    """Read -m; what is omitted is taken from an earlier one."""
    size = pairs.size("size", before.size, unit=_MIB) or _DEFAULT_RAM
    ram = Ram(-(-size // _RAM_UNIT) * _RAM_UNIT, pairs.number("slots", before.slots),
              pairs.size("maxmem", before.most), True)
    if ram.slots and not ram.most:
        raise QmpError("slots specified but no max-size")
    if ram.most and ram.most < ram.size:
        raise QmpError(f"invalid value of maxmem: maximum memory size ({ram.most:#x}) must be at least the initial "
                       f"memory size ({ram.size:#x})")
    if ram.slots and ram.most == ram.size:
        raise QmpError(f"invalid value of maxmem: memory slots were specified but maximum memory size ({ram.most:#x}) "
                       f"is equal to the initial memory size ({ram.size:#x})")
    return ram


def cpus_of(pairs: Pairs) -> Cpus:
    """Read -smp; what is omitted follows from the rest, cores before sockets (as in QEMU since 6.2)."""
    unknown = next((key for key, _ in pairs.pairs if key not in _SMP), None)
    if unknown is not None:
        raise QmpError(f"Parameter 'smp.{unknown}' is unexpected")
    given = {level: _positive(pairs, level) for level in ("cpus", "maxcpus", *_LEVELS) if level in pairs}
    sizes = {level: given.get(level, 1) for level in _LEVELS}
    most = given.get("maxcpus") or max(given.get("cpus", 0), math.prod(sizes.values()))
    missing = next((level for level in ("cores", "sockets", "threads") if level not in given), None)
    if missing is not None:
        sizes[missing] = max(1, most // math.prod(sizes.values()))
    if math.prod(sizes.values()) != most:
        raise QmpError("Invalid CPU topology: product of the hierarchy must match maxcpus: "
                       f"sockets ({sizes['sockets']}) * dies ({sizes['dies']}) * cores ({sizes['cores']}) * "
                       f"threads ({sizes['threads']}) != maxcpus ({most})")
    count = given.get("cpus", most)
    if count > most:
        raise QmpError(f"Invalid CPU topology: maxcpus must be equal to or greater than smp: "
                       f"maxcpus ({most}) < smp_cpus ({count})")
    dies, modules = sizes["dies"], sizes["modules"]
    return Cpus(count, most, sizes["cores"] * dies * modules, sizes["threads"], dies, modules)


def _positive(pairs: Pairs, key: str) -> int:
    if not pairs.text(key).isdigit():
        raise QmpError(f"Parameter 'smp.{key}' expects integer")
    value = int(pairs.text(key))
    if value == 0:
        raise QmpError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    return value


def numa_node_of(pairs: Pairs, before: Sequence[NumaNode]) -> NumaNode | None:
    """Read -numa; None when it is about something other than a node."""
    kind = pairs.needed("type")
    if kind in _NUMA_OTHER:
        return None
    if kind != "node":
        raise pairs.error(f"Parameter 'type' does not accept value '{kind}'")
    unknown = next((k for k, _ in pairs.pairs if k not in _NUMA_NODE), None)
    if unknown is not None:
        raise pairs.error(f"Invalid parameter '{unknown}'")
    if "mem" in pairs:
        raise pairs.error("Parameter -numa node,mem is not supported by this machine type")
    number = pairs.number("nodeid", len(before))
    if any(node.number == number for node in before):
        raise pairs.error(f"Duplicate NUMA nodeid: {number}")
    cpus: list[int] = []
    for text in pairs.all("cpus"):
        numbers = parse_range(text)
        if numbers is None:
            raise pairs.error("Parameter 'cpus' expects a uint64 value or range")
        cpus += numbers
    return NumaNode(number, pairs.text("memdev"), tuple(cpus), pairs.error("").desc)


def node_of_cpu(nodes: Sequence[NumaNode], index: int) -> int | None:
    """The NUMA node of a processor; the first one for unassigned ones; None without NUMA."""
    for node in nodes:
        if index in node.cpus:
            return node.number
    return nodes[0].number if nodes else None


def cpu_props(cpus: Cpus, nodes: Sequence[NumaNode], index: int) -> dict[str, Any]:
    """CpuInstanceProperties of a processor."""
    socket, core_and_thread = divmod(index, cpus.cores * cpus.threads)
    core, thread = divmod(core_and_thread, cpus.threads)
    place = {"socket-id": socket, "core-id": core, "thread-id": thread}
    return place | ({"node-id": node_of_cpu(nodes, index)} if nodes else {})
