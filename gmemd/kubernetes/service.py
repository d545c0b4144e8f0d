"""The driver between the kubelet, the API server and gmemd: claims that come, and claims that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from gmemd.errors import QmpError
from gmemd.kubernetes import conditions, wire
from gmemd.kubernetes.api import NOT_FOUND, RESOURCE, Api, ApiError
from gmemd.kubernetes.claims import Claim, read_claim
from gmemd.kubernetes.driver import Driver
from gmemd.kubernetes.offer import Device
from gmemd.kubernetes.places import cdi_name

T = TypeVar("T")

_AT_ONCE: Final = 16  # claims in progress; preallocating takes a thread for seconds
_LOOK_SECONDS: Final = 60.0  # how often it is asked whether kept claims still exist
_PAUSE: Final = 0.2  # seconds between two such questions


class Service:
    """Answers the kubelet. `find` returns a device of this node by its name."""

    def __init__(self, driver: Driver, api: Api, name: str, node: str, find: Callable[[str], Device | None],
                 say: Callable[[str], None]) -> None:
        self._driver = driver
        self._api = api
        self._name = name
        self._node = node
        self._find = find
        self._say = say
        self._threads = ThreadPoolExecutor(_AT_ONCE, "claim")

    async def prepare(self, asked: Any) -> list[Any]:
        """Prepare a claim of the kubelet's; its devices. QmpError if it is refused, as the claim's status says then."""
        body = await self._find_claim(asked.namespace, asked.name, asked.uid)
        if body is None:
            raise QmpError(f"there is no claim '{asked.namespace}/{asked.name}' with the uid {asked.uid}")
        try:
            claim = read_claim(body, self._name, self._node, self._find)
            await self._off_the_loop(lambda: self._driver.prepare(claim))
        except QmpError as exc:
            await self._tell(body, exc.desc)
            raise
        await self._tell(body, "")
        return [_device(claim, portion) for portion in claim.portions]

    async def unprepare(self, asked: Any) -> None:
        """Release a claim of the kubelet's. QmpError if its memory is still in use."""
        await self._off_the_loop(lambda: self._driver.release(asked.uid))

    async def look_after(self) -> None:
        """Release what belongs to claims that are gone: at start all, then what is kept until they are."""
        everything, late = True, set[str]()  # those that could not be released
        while True:
            try:
                for uid, note in await self._off_the_loop(self._driver.rooms):
                    if everything or uid in late or any(one["onRelease"] == "keep" for one in note["portions"]):
                        late.discard(uid)
                        if not await self._release_if_gone(uid, note):
                            late.add(uid)
                        await asyncio.sleep(_PAUSE)
                everything = False
            except QmpError as exc:
                self._say(f"claims that are gone: {exc.desc}")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _release_if_gone(self, uid: str, note: dict[str, Any]) -> bool:
        """A claim cannot go while a pod has it, so nothing of the kubelet's comes after; False: it is still in use."""
        if await self._find_claim(note["namespace"], note["claim"], uid) is not None:
            return True
        what = f"claim '{note['namespace']}/{note['claim']}' ({uid}), which is gone"
        try:
            await self._off_the_loop(lambda: self._driver.release(uid, deleted=True))
            self._say(f"released {what}")
        except QmpError as exc:
            self._say(f"cannot release {what}: {exc.desc}")
            return False
        return True

    async def _find_claim(self, namespace: str, name: str, uid: str) -> dict[str, Any] | None:
        """The ResourceClaim, if it still is the one with this uid."""
        try:
            claim: dict[str, Any] = await self._api.get(f"{RESOURCE}/namespaces/{namespace}/resourceclaims/{name}")
        except ApiError as exc:
            if exc.code == NOT_FOUND:
                return None
            raise
        return claim if claim["metadata"]["uid"] == uid else None

    async def _tell(self, body: dict[str, Any], refusal: str) -> None:
        """Say in the status what became of it; the kubelet is told in any case."""
        try:
            await conditions.tell(self._api, body, self._name, self._node, refusal)
        except QmpError as exc:
            self._say(f"the status of claim '{body['metadata']['namespace']}/{body['metadata']['name']}': {exc.desc}")

    def _off_the_loop(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)


def _device(claim: Claim, portion: Any) -> Any:
    return wire.message("Device", request_names=[portion.base], pool_name=portion.pool,
                        device_name=portion.device.name, cdi_device_ids=[cdi_name(claim, portion)])
