"""gmemctl nodes: what it makes of slices and claims, through a real kubectl."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gmemd.kubernetes.fleet import Fleet
from tests.kubernetes.rendering import KUBECTL, needs_renderers
from tests.programs import gmemctl, output

DRIVER = "memory.gmemd.example"
GIB = 1 << 30


def device(name: str, size: str, page_size: str = "4Ki") -> dict[str, Any]:
    return {"name": name, "allowMultipleAllocations": True, "capacity": {"memory": {"value": size}},
            "attributes": {"pageSize": {"string": page_size}, "resource.kubernetes.io/numaNode": {"int": 0}}}


def piece(node: str, *devices: dict[str, Any], generation: int = 1, number: int = 0, count: int = 1) -> dict[str, Any]:
    """A ResourceSlice."""
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
            "metadata": {"name": f"{node}-{number}-{generation}"},
            "spec": {"driver": DRIVER, "nodeName": node, "devices": list(devices),
                     "pool": {"name": node, "generation": generation, "resourceSliceCount": count}}}


def claim(name: str, *results: tuple[str, str, str | None], pods: tuple[str, ...] = (),
          driver: str = DRIVER) -> dict[str, Any]:
    """A ResourceClaim NAMESPACE/NAME; each result is node, device and consumed capacity."""
    namespace, _, name = name.partition("/")
    found = [{"request": f"r{number}", "driver": driver, "pool": node, "device": device}
             | ({"consumedCapacity": {"memory": size}} if size else {})
             for number, (node, device, size) in enumerate(results)]
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
            "metadata": {"namespace": namespace, "name": name},
            "status": {"allocation": {"devices": {"results": found}},
                       "reservedFor": [{"resource": "pods", "name": pod, "uid": pod} for pod in pods]}}


SLICES = [piece("n1", device("node0-4k", "64Gi"), device("node0-2m", "8Gi", "2Mi")),
          piece("n2", device("node0-4k", "32Gi"))]
CLAIMS = [claim("a/one", ("n1", "node0-4k", "2Gi"), pods=("p", "q")),
          claim("b/two", ("n1", "node0-4k", "4Gi"), ("n1", "node0-2m", "1Gi")),
          claim("b/gpu", ("n1", "gpu0", None), driver="gpu.example.com"),
          {"metadata": {"namespace": "a", "name": "waits"}, "spec": {}}]


def fleet(slices: list[dict[str, Any]] = SLICES, claims: list[dict[str, Any]] = CLAIMS) -> Fleet:
    made = Fleet(DRIVER)
    made.read_slices(slices)
    made.read_claims(claims)
    return made


def test_a_row_for_each_device() -> None:
    """With what is claimed of it, and by which namespaces, the largest first; other drivers' claims do not count."""
    rows = {(row["name"], row["device"]): row for row in fleet().by_node()}
    assert rows[("n1", "node0-4k")] == {
        "name": "n1", "device": "node0-4k", "page-size": 4096, "numa-node": 0, "size": 64 * GIB, "claimed": 6 * GIB,
        "claims": 2, "namespaces": {"b": 4 * GIB, "a": 2 * GIB}}
    assert rows[("n1", "node0-2m")]["claimed"] == GIB
    assert rows[("n2", "node0-4k")]["claims"] == 0
    assert len(rows) == 3


def test_the_other_views_have_the_same_sum() -> None:
    """Namespaces, the largest first, and the parts of claims."""
    assert fleet().by_namespace() == [{"name": "b", "claimed": 5 * GIB, "claims": 1, "nodes": 1},
                                      {"name": "a", "claimed": 2 * GIB, "claims": 1, "nodes": 1}]
    assert fleet().by_claim()[0] == {"name": "a/one", "node": "n1", "device": "node0-4k", "claimed": 2 * GIB,
                                     "pods": ["p", "q"]}
    sums = {sum(row["claimed"] for row in rows) for rows in (
        fleet().by_node(), fleet().by_namespace(), fleet().by_claim())}
    assert sums == {7 * GIB}


def test_an_exclusive_device_is_held_whole() -> None:
    """Without a consumed capacity a claim has all of its device."""
    [row] = [row for row in fleet(claims=[claim("a/x", ("n2", "node0-4k", None))]).by_node() if row["claims"]]
    assert (row["name"], row["claimed"]) == ("n2", 32 * GIB)


def test_only_the_newest_generation_counts() -> None:
    """A slice that an update has left is not part of the pool, and a pool with too few slices is reported."""
    found = fleet([piece("n1", device("old", "1Gi")), piece("n1", device("new", "1Gi"), generation=2, count=2)], [])
    assert [row["device"] for row in found.by_node()] == ["new"]
    assert found.incomplete == {"n1": (1, 2)}


def test_a_node_that_is_gone_is_listed_while_it_is_claimed() -> None:
    """Its size is unknown, and so 0."""
    [row] = fleet([], [claim("a/x", ("n9", "node0-4k", "1Gi"))]).by_node()
    assert (row["name"], row["size"], row["claimed"]) == ("n9", 0, GIB)


# -- the verb, with kubectl, on an API that has pages


class _Api(BaseHTTPRequestHandler):
    lists: dict[str, list[dict[str, Any]]]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        items = self.lists.get(url.path.rpartition("/")[2])
        if items is None or not url.path.startswith("/apis/resource.k8s.io/v1/"):
            self._answer(404, {"kind": "Status", "message": "the server could not find the requested resource"})
            return
        if found := re.fullmatch(r"spec\.driver=(.*)", query.get("fieldSelector", "")):
            items = [item for item in items if item["spec"]["driver"] == found[1]]
        start, limit = int(query.get("continue") or 0), int(query["limit"])
        rest = {"continue": str(start + limit)} if start + limit < len(items) else {}
        self._answer(200, {"kind": "List", "metadata": rest, "items": items[start:start + limit]})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def user_of(port: int, directory: Path) -> dict[str, str]:
    """The environment of a user whose kubectl is set up for the API at a port; `directory` is for its settings."""
    kubeconfig = directory / "config"
    kubeconfig.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [
            {"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}]}))
    return {**os.environ, "KUBECONFIG": str(kubeconfig), "PATH": f"{KUBECTL.parent}:{os.environ['PATH']}"}


@contextmanager
def cluster(directory: Path, **lists: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """The environment of a user whose kubectl is set up for a cluster with these lists."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Api", (_Api,), {"lists": lists}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield user_of(server.server_port, directory)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@needs_renderers
def test_the_table(tmp_path: Path) -> None:
    """For people: sizes in units, and the largest holders by name."""
    with cluster(tmp_path, resourceslices=SLICES, resourceclaims=CLAIMS) as environment:
        lines = output(gmemctl("nodes"), env=environment).splitlines()
    assert [line.split() for line in lines] == [
        ["NODE", "DEVICE", "PAGES", "SIZE", "CLAIMED", "FREE", "CLAIMS", "NAMESPACES"],
        ["n1", "node0-2m", "2", "MiB", "8", "GiB", "1", "GiB", "7", "GiB", "1", "b", "1", "GiB"],
        ["n1", "node0-4k", "4", "KiB", "64", "GiB", "6", "GiB", "58", "GiB", "2", "b", "4", "GiB,", "a", "2", "GiB"],
        ["n2", "node0-4k", "4", "KiB", "32", "GiB", "0", "B", "32", "GiB", "0"]]


@needs_renderers
def test_every_page_is_read(tmp_path: Path) -> None:
    """More claims than the API returns at once."""
    many = [claim(f"ns{number % 7}/c{number}", ("n1", "node0-4k", "2Mi")) for number in range(1234)]
    with cluster(tmp_path, resourceslices=SLICES, resourceclaims=many) as environment:
        rows = json.loads(output(gmemctl("nodes", "--by", "namespace", "-o", "json"), env=environment))
        names = output(gmemctl("nodes", "--by", "claim", "-o", "name"), env=environment).split()
    assert sum(row["claims"] for row in rows) == 1234
    assert len(set(names)) == 1234


@needs_renderers
def test_what_the_cluster_refuses_is_said(tmp_path: Path) -> None:
    """In the API's words; so is a cluster that does not answer, and a missing kubectl."""
    def said(environment: dict[str, str]) -> tuple[int, str]:
        done = subprocess.run(gmemctl("nodes"), env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    with cluster(tmp_path) as environment:
        status, text = said(environment)
    assert status == 1
    assert "could not find the requested resource" in text
    assert "1.34" in text
    status, text = said(environment)  # it has ended
    assert status == 1
    assert "refused" in text
    status, text = said({**environment, "PATH": str(tmp_path)})
    assert (status, text) == (3, "gmemctl: kubectl is not installed: gmemctl asks the cluster through it\n")


@needs_renderers
def test_a_cluster_that_is_silent(tmp_path: Path) -> None:
    """Nobody waits longer than was said."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = subprocess.run(gmemctl("--timeout", "0.2", "nodes"), env=user_of(silent.getsockname()[1], tmp_path),
                              capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "gmemctl: no answer in time\n")
