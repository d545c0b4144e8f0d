"""What a node offers: a device for each NUMA node and page size, with its capacity of memory.

Huge pages are those that the kernel has set aside (nr_hugepages); of ordinary pages a node offers only what its
operator says, because the kernel and the kubelet give the same memory to everybody.

Where the cluster shares a device out (consumable capacity, allowMultipleAllocations), a claim takes a part of it.
Elsewhere a device belongs to one claim: the memory is then offered in pieces of one size, or as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gmemd.kubernetes.quantity import write

CAPACITY: Final = "memory"
NUMA_NODE: Final = "resource.kubernetes.io/numaNode"  # the standard attribute
SMALLEST: Final = 2 << 20  # bytes that a claim takes at least of a shared device, and the step
_SMALL_PAGES: Final = 4 << 10
_MOST_PIECES: Final = 1024  # of one pool of pages


@dataclass(frozen=True)
class Device:
    """One device of the node's pool."""

    name: str
    numa_node: int
    page_size: int  # bytes
    size: int  # bytes
    shared: bool  # whether several claims may each take a part

    @property
    def huge(self) -> bool:
        """Whether its pages are huge."""
        return self.page_size > _SMALL_PAGES

    def published(self, traits: dict[str, Any]) -> dict[str, Any]:
        """The device of a ResourceSlice; `traits` are attributes that all of the node have."""
        capacity: dict[str, Any] = {"value": write(self.size)}
        found: dict[str, Any] = {
            "name": self.name,
            "attributes": {NUMA_NODE: {"int": self.numa_node}, "pageSize": {"string": write(self.page_size)},
                           "hugePages": {"bool": self.huge}, **traits},
            "capacity": {CAPACITY: capacity}}
        if self.shared:
            found["allowMultipleAllocations"] = True
            capacity["requestPolicy"] = self._request_policy()
        return found

    def _request_policy(self) -> dict[str, Any]:
        """What a claim may take of it; a range has to fit its least amount and a step (CapacityRequestPolicyRange)."""
        step = max(self.page_size, min(SMALLEST, self.size))
        if self.size < 2 * step:
            return {"default": write(step), "validValues": [write(step)]}
        return {"default": write(step), "validRange": {"min": write(step), "step": write(step)}}


def devices(ordinary: int, *, shared: bool, piece: int = 0, system: Path = Path("/sys")) -> list[Device]:
    """The devices of this machine.

    `ordinary`: bytes of ordinary pages for each NUMA node, 0: none; `piece`: bytes of each device where they are not
    shared, 0: one device for all.
    """
    found = [device for device in _whole(ordinary, system) if device.size]
    if shared:
        return [replace(device, shared=True) for device in found]
    return [part for device in found for part in _pieces(device, piece)]


def _whole(ordinary: int, system: Path) -> Iterator[Device]:
    for node, place in _numa_nodes(system):
        step = os.sysconf("SC_PAGE_SIZE")
        yield Device(f"node{node}-{_short(step)}", node, step, ordinary - ordinary % step, shared=False)
        for pool in sorted(place.glob("hugepages/hugepages-*kB"), key=_page_size):
            page, count = _page_size(pool), int((pool / "nr_hugepages").read_text())
            yield Device(f"node{node}-{_short(page)}", node, page, count * page, shared=False)


def _pieces(device: Device, piece: int) -> list[Device]:
    size = -(-piece // device.page_size) * device.page_size
    if not size or size > device.size:
        return [device]
    return [replace(device, name=f"{device.name}-{number}", size=size)
            for number in range(min(device.size // size, _MOST_PIECES))]


def _numa_nodes(system: Path) -> list[tuple[int, Path]]:
    """Each NUMA node that has memory, and its directory; a kernel without NUMA has node 0."""
    places = {int(found[1]): path for path in system.glob("devices/system/node/node*")
              if (found := re.fullmatch(r"node(\d+)", path.name)) and _has_memory(path)}
    return sorted(places.items()) or [(0, system / "kernel" / "mm")]


def _has_memory(node: Path) -> bool:
    found = re.search(r"MemTotal:\s+(\d+) kB", (node / "meminfo").read_text())
    return found is None or int(found[1]) > 0


def _page_size(pool: Path) -> int:
    return int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10


def _short(size: int) -> str:
    """A page size in the name of a device: 4k, 2m, 1g."""
    return write(size).removesuffix("i").lower()
