"""A stand-in for the Kubernetes API server: its HTTP rules in front of a real etcd, for a few kinds.

Of the real one it has: resourceVersion (etcd's mod_revision), 409 for what is not the version that was read, 404, 410,
watches that go on from a version, bookmarks, field selectors, dryRun, status as a subresource, bearer tokens, members
that are dropped because a feature is off, the published JSON schemas in their strict form, and what resource.k8s.io
forbids of ResourceSlices. It has no authorization, no admission, no server-side apply, no garbage collection.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
import kubernetes_validate
from aiohttp import web

from gmemd.kubernetes.quantity import parse
from tests.kubernetes.etcd import Etcd
from tests.patience import PATIENCE

TOKEN = "a-token"
VERSION = "1.37.0"  # of the schemas
KINDS = {  # resource: path of its API group and version, kind, whether it is in a namespace
    "nodes": ("/api/v1", "Node", False),
    "resourceslices": ("/apis/resource.k8s.io/v1", "ResourceSlice", False),
    "resourceclaims": ("/apis/resource.k8s.io/v1", "ResourceClaim", True),
    "deviceclasses": ("/apis/resource.k8s.io/v1", "DeviceClass", False),
}
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}

Body = dict[str, Any]


class ApiServer:
    """The stand-in, in a thread of its own, with its etcd. `sharing`: whether it has consumable capacity."""

    def __init__(self, *, sharing: bool = True) -> None:
        self.sharing = sharing
        self.calls: set[tuple[str, str]] = set()  # verb and resource, as RBAC names them
        self.before: Callable[[str, str], None] = lambda method, path: None  # called with each request
        self.after: Callable[[str, str], None] = lambda method, path: None  # and before its answer leaves
        self._watches: set[asyncio.Task[Any]] = set()
        self._etcd = Etcd()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = self.run(self._start())

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._etcd.close()

    def run(self, work: Any) -> Any:
        """Await something in its thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    # -- for tests: the same store without HTTP

    def put(self, resource: str, body: Body) -> Body:
        """Create or replace an object, status included; as it is stored."""
        stored: Body = self.run(self._store(resource, body, None))
        return stored

    def find(self, resource: str, name: str, namespace: str = "") -> Body | None:
        """An object, if there is one."""
        found: Body | None = self.run(self._read(_key(resource, namespace, name)))
        return found

    def list(self, resource: str) -> list[Body]:
        """All of a kind."""
        return [body for body, _ in self.run(self._range(_prefix(resource, "")))[0]]

    def remove(self, resource: str, name: str, namespace: str = "") -> None:
        """Delete an object."""
        self.run(self._ask("kv/deleterange", key=_code(_key(resource, namespace, name))))

    def compact(self) -> None:
        """Forget all earlier versions: a watch from one of them is told 410."""
        revision = self.run(self._range(_prefix("nodes", "")))[1]
        self.run(self._ask("kv/compaction", revision=revision, physical=True))

    def break_watches(self) -> None:
        """Cut off all watches, as a server that is restarted does."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._watches])

    # -- HTTP

    async def _start(self) -> str:
        self._session = aiohttp.ClientSession()
        while True:
            with suppress(aiohttp.ClientError):
                async with self._session.get(f"{self._etcd.url}/health") as answer:
                    if (await answer.json(content_type=None))["health"] == "true":
                        break
            await asyncio.sleep(0.02)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        for task in self._watches:
            task.cancel()
        await self._runner.cleanup()
        await self._session.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.before(request.method, request.path)
        try:
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Status(401, "Unauthorized", "Unauthorized")
            answer = await self._answer(request)
        except _Status as exc:
            answer = web.json_response(exc.body, status=exc.code)
        self.after(request.method, request.path)
        return answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        resource, namespace, name, part = _parse(request.path)
        verb = _VERBS[request.method]
        if not name and verb == "get":
            verb = "watch" if "watch" in request.query else "list"
        self.calls.add((verb, f"{resource}/{part}" if part else resource))
        if verb == "watch":
            return await self._watch(request, resource, namespace)
        if verb == "list":
            items, revision = await self._range(_prefix(resource, namespace))
            return web.json_response({"kind": f"{KINDS[resource][1]}List", "apiVersion": _api_version(resource),
                                      "metadata": {"resourceVersion": str(revision)},
                                      "items": [body for body, _ in items if _selected(body, request)]})
        if verb == "delete":
            answer = await self._ask("kv/deleterange", key=_code(_key(resource, namespace, name)))
            if not int(answer.get("deleted", 0)):
                raise _missing(resource, name)
            return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        return web.json_response(await self._read_or_write(request, verb, resource, namespace, name, part),
                                 status=201 if verb == "create" else 200)

    async def _read_or_write(self, request: web.Request, verb: str, resource: str, namespace: str, name: str,
                             part: str) -> Body:
        if verb == "create":
            body = self._checked(await request.json(), resource)
            if "dryRun" in request.query:
                return body
            return await self._store(resource, body, 0)
        current = await self._read(_key(resource, namespace, name))
        if current is None:
            raise _missing(resource, name)
        if verb == "get":
            return current
        body = self._checked(await request.json(), resource, current)
        version = body["metadata"].get("resourceVersion")
        members = ("status",) if part == "status" else ("spec",)
        merged = {**current, **{member: body.get(member) for member in members if member in body}}
        merged["metadata"] = {**current["metadata"], **({} if part else {
            key: body["metadata"][key] for key in ("labels", "annotations", "ownerReferences")
            if key in body["metadata"]})}
        return await self._store(resource, merged, int(version or current["metadata"]["resourceVersion"]))

    def _checked(self, body: Body, resource: str, current: Body | None = None) -> Body:
        """What a real one would store of it, or its refusal."""
        try:
            kubernetes_validate.validate(body, VERSION, strict=True)
        except kubernetes_validate.ValidationError as exc:
            raise _Status(400, "BadRequest", f"strict decoding error: {exc.message}") from None
        if resource == "resourceslices":
            _check_slice(body["spec"], current["spec"] if current else None)
            if not self.sharing:
                for device in body["spec"].get("devices") or []:
                    device.pop("allowMultipleAllocations", None)
                    for capacity in device.get("capacity", {}).values():
                        capacity.pop("requestPolicy", None)
        return body

    async def _watch(self, request: web.Request, resource: str, namespace: str) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        version = int(request.query["resourceVersion"])
        last = version
        prefix = _prefix(resource, namespace)
        asked = {"create_request": {"key": _code(prefix), "range_end": _code(_end(prefix)),
                                    "start_revision": version + 1, "prev_kv": True}}
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        with suppress(TimeoutError, ConnectionResetError):
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "60"))), \
                    self._session.post(f"{self._etcd.url}/v3/watch", json=asked) as events:
                async for line in events.content:
                    found = json.loads(line)["result"]
                    if int(found.get("compact_revision", 0)):
                        gone = _Status(410, "Expired", "too old resource version")
                        await stream.write(json.dumps({"type": "ERROR", "object": gone.body}).encode() + b"\n")
                        return stream
                    for event in found.get("events", []):
                        last = int(event["kv"]["mod_revision"])
                        told = _told(event, request)
                        if told is not None:
                            await stream.write(json.dumps(told).encode() + b"\n")
        with suppress(ConnectionResetError):
            await stream.write(json.dumps({"type": "BOOKMARK", "object": {
                "kind": KINDS[resource][1], "metadata": {"resourceVersion": str(last)}}}).encode() + b"\n")
        return stream

    # -- etcd

    async def _ask(self, method: str, **request: Any) -> Any:
        while True:
            async with self._session.post(f"{self._etcd.url}/v3/{method}", json=request) as answer:
                if answer.status == 200:
                    return await answer.json(content_type=None)
            await asyncio.sleep(0.1)  # a machine with too much to do

    async def _range(self, prefix: str) -> tuple[list[tuple[Body, int]], int]:
        answer = await self._ask("kv/range", key=_code(prefix), range_end=_code(_end(prefix)))
        items = [_decode(row) for row in answer.get("kvs", [])]
        return [(body, int(body["metadata"]["resourceVersion"])) for body in items], int(answer["header"]["revision"])

    async def _read(self, key: str) -> Body | None:
        answer = await self._ask("kv/range", key=_code(key))
        return _decode(answer["kvs"][0]) if answer.get("kvs") else None

    async def _store(self, resource: str, body: Body, version: int | None) -> Body:
        """Write an object if its version still is this one (0: there is none; None: whatever it is)."""
        metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), **body["metadata"]}
        metadata.pop("resourceVersion", None)
        metadata["generation"] = metadata.get("generation", 0) + 1
        body = {**body, "metadata": metadata}
        key = _key(resource, metadata.get("namespace", ""), metadata["name"])
        compare = [] if version is None else [{"key": _code(key), "target": "MOD", "mod_revision": version}]
        answer = await self._ask("kv/txn", compare=compare, success=[
            {"request_put": {"key": _code(key), "value": _code(json.dumps(body))}}])
        if not answer.get("succeeded"):
            if version == 0:
                raise _Status(409, "AlreadyExists", f'{resource} "{metadata["name"]}" already exists')
            raise _Status(409, "Conflict", "the object has been modified; please apply your changes to the latest "
                                           "version and try again")
        metadata["resourceVersion"] = str(answer["header"]["revision"])
        return body


class _Status(Exception):
    """A refusal, as the API answers it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message,
                     "code": code}


def _missing(resource: str, name: str) -> _Status:
    return _Status(404, "NotFound", f'{resource} "{name}" not found')


def _check_slice(spec: Body, former: Body | None) -> None:
    """What resource.k8s.io/v1 demands of a slice beyond its schema."""
    devices = spec.get("devices") or []
    names = [device["name"] for device in devices]
    wrong = (
        len(devices) > 128 or len(set(names)) < len(names)
        or not all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names)
        or spec["pool"]["resourceSliceCount"] < 1 or not spec.get("nodeName")
        or any(len(device.get("attributes", {})) + len(device.get("capacity", {})) > 32 for device in devices)
        or any("requestPolicy" in one and not device.get("allowMultipleAllocations")
               for device in devices for one in device.get("capacity", {}).values())
        or any(parse(policy["validRange"]["min"]) + parse(policy["validRange"]["step"]) > parse(one["value"])
               for device in devices for one in device.get("capacity", {}).values()
               if "validRange" in (policy := one.get("requestPolicy", {})))
        or any(len(str(value)) > 64 or len(attribute) != 1 for device in devices
               for attribute in device.get("attributes", {}).values() for value in attribute.values())
        or (former is not None and any(spec.get(name) != former.get(name) for name in ("driver", "nodeName"))))
    if wrong:
        raise _Status(422, "Invalid", "the ResourceSlice is invalid")


def _told(event: Body, request: web.Request) -> Body | None:
    """A watch event of Kubernetes for one of etcd; None: the selector leaves it out."""
    row = event["kv"]
    former = _decode(event["prev_kv"]) if "prev_kv" in event else None
    if event.get("type") == "DELETE":
        if former is None or not _selected(former, request):
            return None
        former["metadata"]["resourceVersion"] = row["mod_revision"]
        return {"type": "DELETED", "object": former}
    body = _decode(row)
    if not _selected(body, request):
        return {"type": "DELETED", "object": body} if former and _selected(former, request) else None
    return {"type": "MODIFIED" if former and _selected(former, request) else "ADDED", "object": body}


def _selected(body: Body, request: web.Request) -> bool:
    for term in filter(None, request.query.get("fieldSelector", "").split(",")):
        path, _, wanted = term.partition("=")
        found: Any = body
        for member in path.split("."):
            found = (found or {}).get(member)
        if (found or "") != wanted:
            return False
    return True


def _parse(path: str) -> tuple[str, str, str, str]:
    """Resource, namespace, name and subresource of a path, each "" if there is none."""
    for resource, (group, _, namespaced) in KINDS.items():
        found = re.fullmatch(group + r"(?:/namespaces/(?P<namespace>[^/]+))?/" + resource
                             + r"(?:/(?P<name>[^/]+)(?:/(?P<part>[^/]+))?)?", path)
        if found and (namespaced or not found["namespace"]):
            return resource, found["namespace"] or "", found["name"] or "", found["part"] or ""
    raise _Status(404, "NotFound", "the server could not find the requested resource")


def _api_version(resource: str) -> str:
    return KINDS[resource][0].removeprefix("/apis/").removeprefix("/api/")


def _prefix(resource: str, namespace: str) -> str:
    return f"/registry/{resource}/{namespace}/" if namespace else f"/registry/{resource}/"


def _key(resource: str, namespace: str, name: str) -> str:
    return f"/registry/{resource}/{namespace}/{name}" if namespace else f"/registry/{resource}/{name}"


def _end(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decode(row: Body) -> Body:
    body: Body = json.loads(base64.b64decode(row["value"]))
    body["metadata"]["resourceVersion"] = row["mod_revision"]
    return body


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
