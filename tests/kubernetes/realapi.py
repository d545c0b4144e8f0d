"""A real API server (apiextensions-apiserver on etcd) with the kinds that the driver uses, behind a front that knows
which token is whose and answers for what that server does not serve (nodes, namespaces, reviews of access).

The server is not a kube-apiserver: ResourceSlice, ResourceClaim and ValidatingAdmissionPolicy are kinds of
CustomResourceDefinitions here. Storage, watch, conflicts, selectors, strict decoding against a schema, server-side
apply, admission by CEL and the authorisation filter are Kubernetes' own code.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.patience import PATIENCE, wait_for

Body = dict[str, Any]
_NOT_HERE = ("NamespaceLifecycle", "MutatingAdmissionWebhook", "ValidatingAdmissionWebhook", "MutatingAdmissionPolicy")
POLICIES = "ValidatingAdmissionPolicy"
_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "authorization"}
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def root() -> Path:
    """Return the tree with the programs; script/kubernetes makes it."""
    return Path(os.environ["KUBERNETES_LAB"])


class Front:
    """What stands between clients and the server; keeps what was asked."""

    def __init__(self, port: int, certificates: Path) -> None:
        self.rules: list[Body] = []  # of the driver's ClusterRole
        self.tokens: dict[str, str] = {}  # the node of whose driver they are
        self.asked: list[tuple[str, str, Any]] = []  # method, path with query, body of who has a token
        self.used: set[tuple[str, str]] = set()  # resource and verb that the server asked about
        self._upstream = f"https://127.0.0.1:{port}"
        self._tls = _client_tls(certificates)

    async def start(self) -> str:
        """Listen; return the URL."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def ask(self, method: str, path: str, body: Any, node: str, kind: str,
                  query: dict[str, str]) -> tuple[int, Any]:
        """Ask the server as the administrator or a node's driver; status 0: it does not answer."""
        data = None if body is None else json.dumps(body)
        try:
            async with self._session.request(method, self._upstream + path, data=data, params=query, ssl=self._tls,
                                             headers={"Content-Type": kind, **_as_driver_of(node)}) as answer:
                text = await answer.text()
                return answer.status, json.loads(text) if text.startswith("{") else {"message": text}
        except aiohttp.ClientError as exc:
            return 0, {"message": str(exc)}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            self.asked.append((request.method, request.path_qs, json.loads(body) if body else None))
        if found := await self._ours(request, body):
            return found
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        headers |= _as_driver_of(self.tokens.get(token, ""))
        async with self._session.request(request.method, self._upstream + request.path_qs, data=body, headers=headers,
                                         ssl=self._tls) as answer:
            reply = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await reply.prepare(request)
            with suppress(ConnectionError, aiohttp.ClientError):  # either end may go
                async for piece in answer.content.iter_any():
                    await reply.write(piece)
            return reply

    async def _ours(self, request: web.Request, body: bytes) -> web.StreamResponse | None:
        """Answer for nodes, namespaces and reviews of access, which the server has not."""
        if request.path.startswith("/api/v1/nodes/"):
            self.used.add(("nodes", "get"))
            return web.json_response(_node(request.path.rpartition("/")[2]))
        if request.path == "/api/v1/namespaces":
            return await self._namespaces(request)
        if request.path.endswith("/subjectaccessreviews"):
            return self._review(json.loads(body))
        return None

    async def _namespaces(self, request: web.Request) -> web.StreamResponse:
        if not request.query.get("watch"):
            return web.json_response({"apiVersion": "v1", "kind": "NamespaceList", "metadata": {"resourceVersion": "1"},
                                      "items": [{"metadata": {"name": name, "uid": name, "resourceVersion": "1"}}
                                                for name in ("default", "gmemd", "team-a", "team-b")]})
        reply = web.StreamResponse(headers={"Content-Type": "application/json"})
        await reply.prepare(request)
        if request.query.get("sendInitialEvents") == "true":
            note = {"k8s.io/initial-events-end": "true"}
            event = {"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": "Namespace", "metadata": {
                "resourceVersion": "1", "annotations": note}}}
            await reply.write(json.dumps(event).encode() + b"\n")
        with suppress(ConnectionError):
            while True:  # nothing happens to them
                await _later(request)
        return reply

    def _review(self, review: Body) -> web.StreamResponse:
        """Answer as RBAC does, from the rules."""
        asked = review["spec"]["resourceAttributes"]
        resource = asked["resource"] + (f"/{asked['subresource']}" if asked.get("subresource") else "")
        self.used.add((resource, asked["verb"]))
        allowed = any(asked["group"] in rule["apiGroups"] and resource in rule["resources"]
                      and asked["verb"] in rule["verbs"] for rule in self.rules)
        return web.json_response(review | {"status": {"allowed": allowed}}, status=201)


async def _cancel_others() -> None:
    """End what still waits: watches of namespaces, in which nothing happens."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _as_driver_of(node: str) -> dict[str, str]:
    """The headers by which the administrator acts as a node's driver; "": as itself."""
    return {"Impersonate-User": "system:serviceaccount:gmemd:gmemd-dra",
            "Impersonate-Extra-authentication.kubernetes.io%2Fnode-name": node} if node else {}


def _node(name: str) -> Body:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": name}}


async def _later(request: web.Request) -> None:
    await asyncio.sleep(1)
    if request.transport is None or request.transport.is_closing():
        raise ConnectionError


class RealApi:
    """etcd, the server and the front, in a directory of its own; the loop that they need runs in a thread.

    Its methods are those of the stand-in (apiserver.ApiServer), so the driver's Node runs on either.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gmemd-api-"))
        self._etcd_port, self._peer_port, self._port = _free_ports(3)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def __enter__(self) -> RealApi:
        _certificates(self.directory)
        self._start("etcd", self._etcd())
        self.front = Front(self._port, self.directory)
        self.url = self.run(self.front.start())
        (self.directory / "kubeconfig").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}], "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]}))
        self.serve(*_NOT_HERE, POLICIES)
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.front.stop())
        for name in reversed(list(self._processes)):
            self._end(name)
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.directory)

    def run(self, work: Any) -> Any:
        """Await something in its thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def serve(self, *without: str) -> None:
        """Start the server without these admission plugins, after ending the one that runs."""
        self._end("server")
        here = self.directory
        self._start("server", [
            root() / "build" / "apiextensions-apiserver", f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1", f"--secure-port={self._port}", f"--tls-cert-file={here}/server.crt",
            f"--tls-private-key-file={here}/server.key", f"--client-ca-file={here}/ca.crt",
            "--authentication-skip-lookup", f"--kubeconfig={here}/kubeconfig",
            f"--authentication-kubeconfig={here}/kubeconfig", f"--authorization-kubeconfig={here}/kubeconfig",
            *(f"--authorization-webhook-cache-{kind}-ttl=1ms" for kind in ("authorized", "unauthorized")),
            f"--disable-admission-plugins={','.join(without)}"])
        wait_for(lambda: self._is_running() and self.ask("GET", _CRDS)[0] == 200)  # /readyz waits for kinds it lacks

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self._etcd_port}"

    # -- requests, as the administrator, or as the driver of a node

    def ask(self, method: str, path: str, body: Any = None, *, node: str = "", kind: str = "application/json",
            **query: str) -> tuple[int, Any]:
        """Return the status and the body of the answer; status 0: there is none."""
        return self.run(self.front.ask(method, path, body, node, kind, query))

    def must(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """Return the body of the answer to an administrator's request that succeeds."""
        status, found = self.ask(method, path, body, **query)
        assert 200 <= status < 300, (method, path, status, found.get("message"))
        return found

    def define(self, *definitions: Body) -> None:
        """Create CustomResourceDefinitions and wait until each is served."""
        for body in definitions:
            self.must("POST", _CRDS, body)
            spec = body["spec"]
            path = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
            wait_for(lambda path=path: self.ask("GET", path)[0] == 200)

    # -- the stand-in's

    def put(self, resource: str, body: Body) -> Body:
        """Create or replace an object, status included; as it is stored."""
        path = self._path(resource, body["metadata"].get("namespace", ""))
        name = body["metadata"]["name"]
        former = self.find(resource, name, body["metadata"].get("namespace", ""))
        if former is None:
            stored = self.must("POST", path, body)
        else:
            stored = self.must("PUT", f"{path}/{name}", _at(body, former))
        if "status" in body:
            stored = self.must("PUT", f"{path}/{name}/status", _at(body, stored))
        return dict(stored)

    def find(self, resource: str, name: str, namespace: str = "") -> Body | None:
        """An object, if there is one; the front has every node."""
        if resource == "nodes":
            return _node(name)
        status, found = self.ask("GET", f"{self._path(resource, namespace)}/{name}")
        return None if status == 404 else dict(found)

    def list(self, resource: str) -> list[Body]:
        """All of a kind."""
        return list(self.must("GET", self._path(resource, ""))["items"])

    def remove(self, resource: str, name: str, namespace: str = "") -> None:
        """Delete an object."""
        self.must("DELETE", f"{self._path(resource, namespace)}/{name}")

    @staticmethod
    def _path(resource: str, namespace: str) -> str:
        within = f"/namespaces/{namespace}" if namespace else ""
        return f"/apis/resource.k8s.io/v1{within}/{resource}"

    # -- processes

    def _etcd(self) -> list[Any]:
        client, peer = self.etcd_url, f"http://127.0.0.1:{self._peer_port}"
        return [root() / "usr/bin/etcd", f"--data-dir={self.directory}/etcd", f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}", "--unsafe-no-fsync",
                "--quota-backend-bytes=4294967296"]

    def _start(self, name: str, argv: list[Any]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(argv, cwd=self.directory, stdout=log, stderr=log)

    def _is_running(self) -> bool:
        assert self._processes["server"].poll() is None, (self.directory / "server.log").read_text()[-3000:]
        return True

    def _end(self, name: str) -> None:
        if name in self._processes:
            process = self._processes.pop(name)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _at(body: Body, stored: Body) -> Body:
    """It, as a change of what is stored."""
    return {**body, "metadata": {**body["metadata"], **{
        name: stored["metadata"][name] for name in ("resourceVersion", "uid")}}}


def definition(group: str, kind: str, plural: str, *, namespaced: bool = False, fields: tuple[str, ...] = (),
               schema: Body | None = None) -> Body:
    """A CustomResourceDefinition of a kind that a kube-apiserver has of its own."""
    loose = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    properties = {"spec": schema or loose, "status": loose}
    return {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}",
                         "annotations": {"api-approved.kubernetes.io": "unapproved, a test"}},
            "spec": {"group": group, "scope": "Namespaced" if namespaced else "Cluster",
                     "names": {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"},
                     "versions": [{"name": "v1", "served": True, "storage": True, "subresources": {"status": {}},
                                   "selectableFields": [{"jsonPath": f".{field}"} for field in fields],
                                   "schema": {"openAPIV3Schema": {"type": "object", "properties": properties}}}]}}


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _certificates(here: Path) -> None:
    """A CA, the server's certificate and an administrator's."""
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=here, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt")
    (here / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for who, subject in (("server", "/CN=localhost"), ("client", "/O=system:masters/CN=admin")):
        openssl("req", *key, "-subj", subject, "-keyout", f"{who}.key", "-out", f"{who}.csr")
        openssl("x509", "-req", "-in", f"{who}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{who}.crt")


def _client_tls(here: Path) -> Any:
    context = ssl.create_default_context(cafile=str(here / "ca.crt"))
    context.load_cert_chain(here / "client.crt", here / "client.key")
    return context
