"""Who holds how much memory where: the slices and claims of a cluster, as its API lists them, made into rows.

Only slices of a pool's newest generation count, as they do for the scheduler. What a claim holds is what its allocation
says: the capacity that it consumes of a shared device, otherwise all of the device.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gmemd.kubernetes.quantity import parse

Body = dict[str, Any]
_CAPACITY = "memory"
_NUMA_NODE = "resource.kubernetes.io/numaNode"


@dataclass(frozen=True)
class Offer:
    """A device that a node offers."""

    node: str
    device: str
    page_size: int  # bytes
    numa_node: int | None
    size: int  # bytes

    @property
    def place(self) -> tuple[str, str]:
        return self.node, self.device


@dataclass(frozen=True)
class Holding:
    """What one request of a claim has of a device."""

    namespace: str
    claim: str
    node: str
    device: str
    size: int | None  # bytes; None: all of the device
    pods: tuple[str, ...]  # that use the claim

    @property
    def place(self) -> tuple[str, str]:
        return self.node, self.device


class Fleet:
    """The memory of a cluster that one driver serves, and the claims on it."""

    def __init__(self, driver: str) -> None:
        self.driver = driver
        self.incomplete: dict[str, tuple[int, int]] = {}  # by node: slices that are there, and that there should be
        self._offers: dict[tuple[str, str], Offer] = {}
        self._holdings: list[Holding] = []

    def read_slices(self, slices: Iterable[Body]) -> None:
        """Take in all slices of the driver."""
        pools: dict[str, list[Body]] = defaultdict(list)
        for body in slices:
            pools[body["spec"]["pool"]["name"]].append(body["spec"])
        for name, specs in pools.items():
            newest = max(spec["pool"]["generation"] for spec in specs)
            current = [spec for spec in specs if spec["pool"]["generation"] == newest]
            wanted = current[0]["pool"]["resourceSliceCount"]
            if len(current) != wanted:
                self.incomplete[name] = len(current), wanted
            for spec in current:
                for device in spec.get("devices") or ():
                    offer = self._offer(name, device)
                    self._offers[offer.place] = offer

    def read_claims(self, claims: Iterable[Body]) -> None:
        """Take in claims, of any driver; call it as often as there are pages of them."""
        for body in claims:
            status = body.get("status") or {}
            results = ((status.get("allocation") or {}).get("devices") or {}).get("results") or ()
            ours = [result for result in results if result["driver"] == self.driver and not result.get("adminAccess")]
            pods = tuple(user["name"] for user in status.get("reservedFor") or () if user["resource"] == "pods")
            self._holdings += [
                Holding(body["metadata"]["namespace"], body["metadata"]["name"], result["pool"], result["device"],
                        self._consumed(result), pods) for result in ours]

    def by_node(self) -> list[Body]:
        """A row for each device, of nodes that are gone too as long as claims are allocated there."""
        held = defaultdict(list)
        for holding in self._holdings:
            held[holding.place].append(holding)
        rows = []
        for place in sorted(self._offers.keys() | held.keys()):
            offer, holdings = self._offers.get(place), held[place]
            namespaces: Counter[str] = Counter()
            for holding in holdings:
                namespaces[holding.namespace] += self.size(holding)
            about = {"page-size": offer.page_size, "size": offer.size} if offer else {"size": 0}
            if offer and offer.numa_node is not None:
                about["numa-node"] = offer.numa_node
            rows.append({"name": place[0], "device": place[1], **about, "claimed": namespaces.total(),
                         "claims": len({(one.namespace, one.claim) for one in holdings}),
                         "namespaces": dict(namespaces.most_common())})
        return rows

    def by_namespace(self) -> list[Body]:
        """A row for each namespace with claims, the largest holder first."""
        held = defaultdict(list)
        for holding in self._holdings:
            held[holding.namespace].append(holding)
        rows = [{"name": name, "claimed": sum(map(self.size, holdings)), "claims": len({one.claim for one in holdings}),
                 "nodes": len({one.node for one in holdings})} for name, holdings in held.items()]
        return sorted(rows, key=lambda row: (-row["claimed"], row["name"]))

    def by_claim(self) -> list[Body]:
        """A row for each part of a claim."""
        rows = [{"name": f"{one.namespace}/{one.claim}", "node": one.node, "device": one.device,
                 "claimed": self.size(one), "pods": list(one.pods)} for one in self._holdings]
        return sorted(rows, key=lambda row: (row["name"], row["device"]))

    def size(self, holding: Holding) -> int:
        """Bytes that it holds; 0 if it has all of a device that no slice describes any more."""
        if holding.size is not None:
            return holding.size
        offer = self._offers.get(holding.place)
        return offer.size if offer else 0

    def _offer(self, node: str, device: Body) -> Offer:
        attributes = {name.removeprefix(f"{self.driver}/"): value for name, value in device["attributes"].items()}
        return Offer(node, device["name"], parse(attributes["pageSize"]["string"]),
                     attributes.get(_NUMA_NODE, {}).get("int"), parse(self._memory(device["capacity"])["value"]))

    def _consumed(self, result: Body) -> int | None:
        amount = self._memory(result.get("consumedCapacity") or {})
        return None if amount is None else parse(amount)

    def _memory(self, amounts: Body) -> Any:
        """The member that is about memory: an unqualified name belongs to the driver."""
        return amounts.get(_CAPACITY) or amounts.get(f"{self.driver}/{_CAPACITY}")
