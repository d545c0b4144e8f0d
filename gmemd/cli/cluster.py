"""Read a cluster's API as the user of kubectl: `kubectl proxy` has the address, the credentials and their renewal."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlencode

_PAGE = 500  # objects at a time: what kubectl itself asks for


class Cluster:
    """The API of the cluster that kubectl is set up for; used within `with`."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout`: seconds for each answer, None: no limit."""
        self._timeout = timeout
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            # a path of its own, because that of $TMPDIR may be too long for a socket
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gmemctl-", dir="/tmp"))
            path = os.path.join(directory, "api.sock")
            proxy = stack.enter_context(_proxy(path))
            stack.callback(proxy.terminate)
            if not proxy.stdout or not proxy.stdout.readline():
                raise ConnectionError(f"kubectl proxy: {proxy.communicate()[1].strip()}")
            self._connection = stack.enter_context(closing(_Connection(path, self._timeout)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def list(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        """The objects of a list, page by page; OSError, also when the API refuses."""
        query["limit"] = str(_PAGE)
        while True:
            found = self._get(f"{path}?{urlencode(query)}")
            yield from found["items"] or ()
            query["continue"] = found["metadata"].get("continue", "")
            if not query["continue"]:
                return

    def _get(self, path: str) -> Any:
        try:
            self._connection.request("GET", path)
            answer = self._connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as exc:
            raise ConnectionError(f"kubectl proxy: {exc or type(exc).__name__}") from exc
        if answer.status == http.client.OK:
            return json.loads(body)
        said = _said(body) or f"{answer.status} {answer.reason}"
        hint = "\n  hint: claims need Kubernetes 1.34 or newer" if answer.status == http.client.NOT_FOUND else ""
        raise OSError(f"the cluster: {said}{hint}")


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _proxy(path: str) -> subprocess.Popen[str]:
    """A process that serves the API at a unix socket, read-only; it says so in a line."""
    argv = ["kubectl", "proxy", f"--unix-socket={path}", "--reject-methods=^(POST|PUT|PATCH|DELETE)$"]
    try:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise ConnectionError("kubectl is not installed: gmemctl asks the cluster through it") from None


def _said(body: bytes) -> str:
    """The message of the API's Status, or the text of a proxy that cannot reach it."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()
