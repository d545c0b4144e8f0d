"""This node: its devices with the attributes that all of them have."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from gmemd.client.client import Client
from gmemd.errors import QmpError
from gmemd.kubernetes.house import House
from gmemd.kubernetes.offer import Device, devices

_PROBE: Final = "gmemd-dra-probe"
_SECONDS: Final = 3600.0  # how long that answer holds
_SURVIVES: Final = {"gmemd-crash": "survivesCrash", "gmemd-upgrade": "survivesUpgrade",
                    "service-stop": "survivesServiceStop", "soft-reboot": "survivesSoftReboot",
                    "kexec": "survivesKexec"}  # events of query-memdev-status, and attributes


class Node:
    """What the machine has, by what the operator offers: bytes of ordinary pages a NUMA node, and of a piece."""

    def __init__(self, house: House, ordinary: int, piece: int) -> None:
        self._house = house
        self._ordinary = ordinary
        self._piece = piece
        self._traits: dict[str, Any] = {}
        self._until = 0.0  # when they are asked for again
        self.has_several = len({one.numa_node for one in devices(1 << 20, shared=True)}) > 1

    def offer(self, shared: bool) -> list[dict[str, Any]]:
        """The devices to publish; asks gmemd now and then what it can do."""
        if time.monotonic() >= self._until:
            self._traits, self._until = self._house.ask(_traits), time.monotonic() + _SECONDS
        return [device.published(self._traits) for device in devices(self._ordinary, shared=shared, piece=self._piece)]

    def find(self, name: str) -> Device | None:
        """A device by its name, whether it is shared out or in pieces."""
        return next((device for shared in (True, False)
                     for device in devices(self._ordinary, shared=shared, piece=self._piece) if device.name == name),
                    None)


def _traits(client: Client) -> dict[str, Any]:
    """Which guest_memfd there is, and what memory survives: asked of a small object that is deleted again."""
    with suppress(QmpError):  # it is left from a killed driver, or another instance is asking
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": _PROBE, "size": 1 << 12})
    [status] = client.execute("query-memdev-status", {"id": _PROBE})
    with suppress(QmpError):
        client.execute("object-del", {"id": _PROBE})
    survives = {one["event"]: one["survives"] for one in status["survival"]}
    return {"guestMemfd": {"string": status["kernel"]},
            **{name: {"bool": bool(survives.get(event))} for event, name in _SURVIVES.items()}}
