"""Figures of script/kubernetes: a cluster of 1,000 nodes with 50,000 claims, and one node with 1,000 of them."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.node import DRIVER, NODE, Node
from tests.kubernetes.realapi import RealApi
from tests.kubernetes.rendering import KUBECTL
from tests.patience import wait_for

NODES, CLAIMS = 1000, 50_000
ON_ONE_NODE = 1000
_PREFIX = "/registry/apiextensions.kubernetes.io"  # of that server's keys in etcd
_BATCH = 100  # objects of one transaction of etcd; it takes 128
Body = dict[str, Any]


def say(text: str) -> None:
    print(f"   {text}", flush=True)


# -- a cluster


def cluster(server: RealApi) -> None:
    """Fill the store, then list, watch and run a driver among all that."""
    started = time.monotonic()
    _fill(server, "resourceslices", (_slice(number) for number in range(NODES)))
    _fill(server, "resourceclaims", (_claim(number) for number in range(CLAIMS)))
    wait_for(lambda: len(server.must("GET", "/apis/resource.k8s.io/v1/resourceslices")["items"]) == NODES)
    say(f"{NODES} nodes' slices and {CLAIMS} claims are in etcd after {time.monotonic() - started:.0f} s")
    for by in ("node", "namespace", "claim"):
        took, cpu, peak, rows = _nodes(server, by)
        say(f"gmemctl nodes --by {by}: {rows} rows in {took:.1f} s, {cpu:.1f} s CPU, {peak} MiB at most")
    with Node(server) as node:  # type: ignore[arg-type]
        driver = node.start()
        wait_for(lambda: server.find("resourceslices", f"{NODE}-{DRIVER}-0"))
        say(f"the driver of one node: {_rss(driver.pid)} MiB resident beside {CLAIMS} claims of others")
        # what a watch by its selector lets through, and how soon
        name = f"{NODE}-{DRIVER}-0"
        waits = [_until_back(server, name) for _ in range(20)]
        say(f"a deleted slice is back after {statistics.median(waits) * 1e3:.0f} ms (median of 20)")


def _fill(server: RealApi, kind: str, bodies: Iterator[Body]) -> None:
    """Put objects into etcd as the server stores those of a CustomResourceDefinition: JSON."""
    batch: list[Body] = []
    for body in bodies:
        where = "/".join(filter(None, (body["metadata"].get("namespace"), body["metadata"]["name"])))
        batch.append({"request_put": {"key": _code(f"{_PREFIX}/resource.k8s.io/{kind}/{where}"),
                                      "value": _code(json.dumps(body))}})
        if len(batch) == _BATCH:
            _transact(server.etcd_url, batch)
            batch = []
    if batch:
        _transact(server.etcd_url, batch)


def _transact(url: str, batch: list[Body]) -> None:
    asked = urllib.request.Request(f"{url}/v3/kv/txn", json.dumps({"success": batch}).encode())
    with urllib.request.urlopen(asked) as answer:
        assert json.load(answer)["succeeded"]


def _code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _metadata(name: str, **more: str) -> Body:
    return {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z", **more}


def _slice(number: int) -> Body:
    attributes = {"resource.kubernetes.io/numaNode": {"int": 0}, "guestMemfd": {"string": "kvm"},
                  **{f"survives{event}": {"bool": True} for event in ("Crash", "Upgrade", "ServiceStop", "SoftReboot")}}
    devices = [{"name": f"node{numa}-{size.lower()}", "allowMultipleAllocations": True,
                "attributes": {**attributes, "pageSize": {"string": f"{size}i"}},
                "capacity": {"memory": {"value": "256Gi", "requestPolicy": {
                    "default": "2Mi", "validRange": {"min": "2Mi", "step": "2Mi"}}}}}
               for numa in (0, 1) for size in ("4K", "2M", "1G")]
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
            "metadata": _metadata(f"worker-{number}-{DRIVER}-0"),
            "spec": {"driver": DRIVER, "nodeName": f"worker-{number}", "devices": devices,
                     "pool": {"name": f"worker-{number}", "generation": 1, "resourceSliceCount": 1}}}


def _claim(number: int) -> Body:
    result = {"request": "ram", "driver": DRIVER, "pool": f"worker-{number % NODES}", "device": "node0-2m",
              "shareID": str(uuid.uuid4()), "consumedCapacity": {"memory": "2Gi"}}
    pod = {"resource": "pods", "name": f"vm-{number}", "uid": str(uuid.uuid4())}
    request = {"name": "ram", "exactly": {"deviceClassName": "gmemd-hugepages-2mi", "allocationMode": "ExactCount",
                                          "count": 1, "capacity": {"requests": {"memory": "2Gi"}}}}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
            "metadata": _metadata(f"vm-{number}-ram", namespace=f"team-{number % 40}"),
            "spec": {"devices": {"requests": [request]}},
            "status": {"allocation": {"devices": {"results": [result]}}, "reservedFor": [pod]}}


def _nodes(server: RealApi, by: str) -> tuple[float, float, int, int]:
    """Run gmemctl nodes; seconds, CPU seconds and peak MiB of it, and its rows."""
    environment = {**os.environ, "KUBECONFIG": str(server.directory / "kubeconfig"),
                   "PATH": f"{KUBECTL.parent}:{os.environ['PATH']}"}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "gmemd.cli.gmemctl", "nodes", "--by", by, "-o", "json"],
                               env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            used.ru_maxrss >> 10, len(json.loads(said)))


def _rss(pid: int) -> int:
    """MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def _until_back(server: RealApi, name: str) -> float:
    """Seconds until the driver has written its slice again."""
    server.remove("resourceslices", name)
    return _timed(lambda: wait_for(lambda: server.find("resourceslices", name)))


# -- a node


def node(_: RealApi) -> None:
    """Prepare 1,000 claims, against directories and mounts of hugetlbfs made by hand for as many pods.

    On the stand-in of the API server, which does less than a real one: what is measured is the driver and gmemd.
    """
    with ApiServer() as stand_in, Node(stand_in, "--memory", "64Gi") as one:
        driver = one.start()
        one.wait_published()
        claims = [one.claim(f"c{number}") for number in range(ON_ONE_NODE)]
        one.kubelet.prepare(one.claim("first"))  # what is loaded once
        with one.kubelet.calling() as call:
            ours = [_timed(lambda claim=claim: call("NodePrepareResources", claim)) for claim in claims]
            say(f"prepare, {ON_ONE_NODE} claims one after another: {_figures(ours)}; driver {_rss(driver.pid)} MiB")
            again = [_timed(lambda claim=claim: call("NodePrepareResources", claim)) for claim in claims]
            say(f"prepared already: {_figures(again)}")
            gone = [_timed(lambda claim=claim: call("NodeUnprepareResources", claim)) for claim in claims]
            say(f"unprepare: {_figures(gone)}")
    for what, mount in (("mount(8), as a CSI driver", _by_program), ("mount(2)", _by_call)):
        with _directory() as directory:
            theirs = [_timed(lambda number=number, mount=mount: _publish(directory, number, mount))
                      for number in range(ON_ONE_NODE)]
        say(f"hugetlbfs and its bind mount with {what}: {_figures(theirs)}; "
            f"{sum(theirs) / sum(ours):.2f} times ours")


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _figures(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return (f"median {statistics.median(ordered) * 1e3:.1f} ms, p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms, "
            f"in all {sum(ordered):.1f} s")


Mount = Callable[[str, Path, str, str], None]  # source, target, type, options; "bind" as type


def _publish(directory: Path, number: int, mount: Mount) -> None:
    """What such a driver does: a file system of the pod's own size, in it a file, and the pod's view of it."""
    staged, published = directory / f"staged-{number}", directory / f"pod-{number}"
    staged.mkdir()
    mount("hugetlbfs", staged, "hugetlbfs", "pagesize=2M,size=2M,mode=0770")
    with (staged / "ram").open("wb") as file:
        file.truncate(2 << 20)
    published.mkdir()
    mount(str(staged), published, "bind", "bind")


def _by_program(source: str, target: Path, kind: str, options: str) -> None:
    typed = [] if kind == "bind" else ["-t", kind]
    subprocess.run(["mount", *typed, "-o", options, source, str(target)], check=True)


def _by_call(source: str, target: Path, kind: str, options: str) -> None:
    bind = kind == "bind"
    done = _LIBC.mount(source.encode(), str(target).encode(), None if bind else kind.encode(), 4096 if bind else 0,
                       None if bind else options.encode())
    if done:
        raise OSError(ctypes.get_errno(), f"mount {target}")


_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory in which mounts end with it."""
    with tempfile.TemporaryDirectory(prefix="gmemd-hugetlbfs-") as name:
        try:
            yield Path(name)
        finally:
            for path in sorted(Path(name).iterdir(), reverse=True):
                _LIBC.umount2(str(path).encode(), 2)
