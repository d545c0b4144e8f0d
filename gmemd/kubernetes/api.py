"""What the driver needs of the Kubernetes API: a few requests of plain JSON.

Objects are dicts as they come: a typed client would lose members that are newer than it is.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp

from gmemd.errors import QmpError

RESOURCE: Final = "/apis/resource.k8s.io/v1"
SLICES: Final = f"{RESOURCE}/resourceslices"
NOT_FOUND, CONFLICT, GONE = 404, 409, 410

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_LONGEST_WAIT: Final = 60  # seconds
_PATIENCE: Final = aiohttp.ClientTimeout(total=30)


class ApiError(QmpError):
    """The API server has refused; `code` is the HTTP status, `after` how many seconds it wants to be left alone."""

    def __init__(self, code: int, desc: str, after: int = 0) -> None:
        super().__init__(desc)
        self.code = code
        self.after = after


class Api:
    """A client of one API server; used within `async with`.

    The token is read from its file for each request, because Kubernetes replaces it about once an hour.
    Every method raises ApiError when the server refuses, and QmpError when it does not answer.
    """

    def __init__(self, url: str, token: Path | None = None, ca: Path | None = None) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._tls = ssl.create_default_context(cafile=ca) if ca else True

    @classmethod
    def in_cluster(cls) -> Api:
        """The one of the cluster that this pod is in; QmpError outside."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise QmpError("this is not a pod of a cluster: --api says where the API server is")
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", _ACCOUNT / "token", _ACCOUNT / "ca.crt")

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(timeout=_PATIENCE, headers={"User-Agent": "gmemd-dra"})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **query: str) -> Any:
        """Read an object, or a list of them."""
        return await self._ask("GET", path, query)

    async def create(self, path: str, body: Any, **query: str) -> Any:
        """Create an object in a collection; as it is stored."""
        return await self._ask("POST", path, query, body)

    async def replace(self, path: str, body: Any) -> Any:
        """Write an object; refused with CONFLICT if it is not the version that was read."""
        return await self._ask("PUT", path, {}, body)

    async def delete(self, path: str) -> None:
        """Delete an object; one that is gone already is fine."""
        try:
            await self._ask("DELETE", path, {})
        except ApiError as exc:
            if exc.code != NOT_FOUND:
                raise

    async def watch(self, path: str, version: str, seconds: int, **query: str) -> AsyncIterator[dict[str, Any]]:
        """The changes of a list after its version, for that long; ApiError with GONE if that is too long ago."""
        query |= {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(seconds),
                  "allowWatchBookmarks": "true"}
        try:
            async with self._session.get(self._url + path, params=query, headers=self._headers(), ssl=self._tls,
                                         timeout=aiohttp.ClientTimeout(total=2 * seconds + 30)) as answer:
                await _check(answer, "GET", path)
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise ApiError(event["object"].get("code", 500), event["object"].get("message", "it failed"))
                    yield event
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise self._silent(exc) from exc

    async def _ask(self, method: str, path: str, query: dict[str, str], body: Any = None) -> Any:
        try:
            async with self._session.request(method, self._url + path, params=query, json=body, ssl=self._tls,
                                             headers=self._headers()) as answer:
                await _check(answer, method, path)
                found = await answer.json(content_type=None)
                if not isinstance(found, dict):
                    raise ValueError("not an object of the API")
                return found
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise self._silent(exc) from exc

    def _headers(self) -> dict[str, str]:
        try:
            return {"Authorization": f"Bearer {self._token.read_text().strip()}"} if self._token else {}
        except OSError as exc:
            raise QmpError(f"cannot read the token '{self._token}': {exc.strerror}") from exc

    def _silent(self, exc: Exception) -> QmpError:
        return QmpError(f"the API server at {self._url} does not answer: {exc or type(exc).__name__}")


async def _check(answer: aiohttp.ClientResponse, method: str, path: str) -> None:
    """Raise what a refusal says (a Status of the API, or any text)."""
    if answer.status < 400:
        return
    text = await answer.text()
    try:
        words = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        words = text[:200]
    after = answer.headers.get("Retry-After", "")  # seconds; the API server sends no dates
    raise ApiError(answer.status, f"{method} {path}: {words or answer.reason} ({answer.status})",
                   min(int(after), _LONGEST_WAIT) if after.isdecimal() else 0)
