"""The node's ResourceSlices: published, watched, and put right whenever they are not what the node offers.

The node's pool is named after the node. All its slices carry the same generation, which rises with every change; only
slices of this driver and this node are looked at. The kubelet deletes them while no driver is registered, so they are
written again when they disappear.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.kubernetes.api import CONFLICT, GONE, SLICES, Api
from gmemd.kubernetes.quantity import parse

MOST_DEVICES: Final = 128  # of a slice (ResourceSliceMaxDevices of k8s.io/api/resource/v1)
LOOK_SECONDS: Final = 60  # how often it is asked what the node offers
_PAUSES: Final = (1, 2, 5, 10, 30)  # seconds between attempts

Body = dict[str, Any]


class Slices:
    """Keeps the API server's view of this node right.

    `offer` returns the devices to publish, given whether the cluster shares devices out; it may raise QmpError.
    """

    def __init__(self, api: Api, driver: str, node: str, offer: Callable[[bool], list[Body]],
                 say: Callable[[str], None]) -> None:
        self._api = api
        self._driver = driver
        self._node = node
        self._offer = offer
        self._say = say
        self._owner: Body = {}  # the Node, with which the slices end
        self._shares: bool | None = None  # whether the cluster shares devices out; None: not asked yet
        self._known: dict[str, Body] = {}  # our slices by name
        self._version = ""  # of the list that is watched
        self._selected = {"fieldSelector": f"spec.nodeName={node},spec.driver={driver}"}

    async def run(self) -> None:
        """Publish and watch until cancelled."""
        failures = 0
        while True:
            try:
                await self.publish()
                while True:
                    await self._follow()
                    failures = 0
                    await asyncio.sleep(_PAUSES[0])  # should the server end every watch at once
            except QmpError as exc:
                if failures or getattr(exc, "code", None) not in (CONFLICT, GONE):
                    self._say(f"the node's ResourceSlices: {exc.desc}")
                    pause = max(_PAUSES[min(failures, len(_PAUSES) - 1)], getattr(exc, "after", 0))
                    await asyncio.sleep(pause * random.uniform(1.0, 1.4))
                failures += 1

    async def publish(self) -> None:
        """Read the slices and put them right once."""
        self._owner = await self._find_node()
        if self._shares is None:
            self._shares = await self._ask_whether_shared()
        listed = await self._api.get(SLICES, **self._selected)
        self._known = {item["metadata"]["name"]: item for item in listed.get("items") or []}
        self._version = listed["metadata"]["resourceVersion"]
        await self._put_right()

    async def _follow(self) -> None:
        """Watch for a while, then ask again what the node offers."""
        async for event in self._api.watch(SLICES, self._version, LOOK_SECONDS, **self._selected):
            item = event["object"]
            self._version = item["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._known.pop(item["metadata"]["name"], None)
                self._owner = await self._find_node()  # it may be another one, under the same name
            elif event["type"] != "BOOKMARK":
                self._known[item["metadata"]["name"]] = item
            if event["type"] != "BOOKMARK" and await self._put_right():
                await asyncio.sleep(_PAUSES[0])  # should somebody else put it right in another way
        await self._put_right()

    async def _put_right(self) -> bool:
        """Write what differs from the offer, and delete what is not part of it; whether anything was."""
        wanted = self._wanted(await asyncio.to_thread(self._offer, bool(self._shares)))
        current = {name: body["spec"] for name, body in self._known.items()}
        if set(wanted) == set(current) and len({spec["pool"]["generation"] for spec in current.values()}) == 1 and all(
                _comparable(current[name]) == _comparable(spec) for name, spec in wanted.items()):
            return False
        generation = max((spec["pool"]["generation"] for spec in current.values()), default=0) + 1
        for name, spec in wanted.items():
            spec["pool"]["generation"] = generation
            self._known[name] = await self._write(name, spec)
        for name in current.keys() - wanted.keys():
            await self._api.delete(f"{SLICES}/{name}")
            del self._known[name]
        self._say(f"published {sum(len(spec['devices']) for spec in wanted.values())} devices in {len(wanted)} "
                  f"ResourceSlices, generation {generation}")
        return True

    async def _write(self, name: str, spec: Body) -> Body:
        body = self._body(name, spec)
        known = self._known.get(name)
        if known is None:
            stored: Body = await self._api.create(SLICES, body)
        else:
            body["metadata"]["resourceVersion"] = known["metadata"]["resourceVersion"]
            stored = await self._api.replace(f"{SLICES}/{name}", body)
        return stored

    def _wanted(self, devices: list[Body]) -> dict[str, Body]:
        """The specs by the names of their slices; there is at least one, which may be empty."""
        groups = [devices[at:at + MOST_DEVICES] for at in range(0, len(devices), MOST_DEVICES)] or [[]]
        return {f"{self._node}-{self._driver}-{number}": {
            "driver": self._driver, "nodeName": self._node, "devices": group,
            "pool": {"name": self._node, "generation": 1, "resourceSliceCount": len(groups)}}
            for number, group in enumerate(groups)}

    def _body(self, name: str, spec: Body) -> Body:
        return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
                "metadata": {"name": name, "ownerReferences": [self._owner]}, "spec": spec}

    async def _find_node(self) -> Body:
        node = await self._api.get(f"/api/v1/nodes/{self._node}")
        return {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": node["metadata"]["uid"],
                "controller": True}

    async def _ask_whether_shared(self) -> bool:
        """Whether the cluster has consumable capacity: in a dry run the member comes back only then."""
        probe = {"name": "probe", "allowMultipleAllocations": True, "capacity": {"memory": {"value": "1Gi"}}}
        spec = next(iter(self._wanted([probe]).values()))
        answer = await self._api.create(SLICES, self._body(f"{self._node}-{self._driver}-probe", spec), dryRun="All")
        return bool(answer["spec"]["devices"][0].get("allowMultipleAllocations"))


def _comparable(spec: Body) -> Body:
    """A spec without its generation, and its amounts as numbers, which the API server may write in another way."""
    pool = {key: value for key, value in spec["pool"].items() if key != "generation"}
    return {**spec, "pool": pool, "devices": [_amounts(device) for device in spec.get("devices") or []]}


def _amounts(value: Any, member: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _amounts(inner, key) for key, inner in value.items()}
    return parse(value) if member in ("value", "default", "min", "max", "step") else value
