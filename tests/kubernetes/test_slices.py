"""ResourceSlices: what the node offers is what the API server has, whatever happens to either."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gmemd.kubernetes.offer import devices
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.kubelet import Refused
from tests.kubernetes.node import DRIVER, NODE, PAGES, Node
from tests.patience import wait_for

GIB = 1 << 30


def machine(folder: Path, nodes: dict[int, dict[int, int]]) -> Path:
    """A /sys with these NUMA nodes: of each size of huge page, in KiB, how many; no sizes: a node without memory."""
    for node, pools in nodes.items():
        place = folder / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "meminfo").write_text(f"Node {node} MemTotal:       {4096 if pools else 0} kB\n")
        for size, count in pools.items():
            pool = place / f"hugepages/hugepages-{size}kB"
            pool.mkdir(parents=True)
            (pool / "nr_hugepages").write_text(f"{count}\n")
    return folder


def test_a_device_for_each_numa_node_and_page_size(tmp_path: Path) -> None:
    """Empty pools and nodes without memory are not offered; ordinary pages only as far as the operator says."""
    system = machine(tmp_path, {0: {2048: 512, 1 << 20: 0}, 1: {2048: 4, 1 << 20: 2}, 2: {}})
    assert [(one.name, one.numa_node, one.page_size, one.size) for one in devices(GIB, shared=True, system=system)] == [
        (PAGES, 0, 4096, GIB), ("node0-2m", 0, 2 << 20, GIB),
        ("node1-4k", 1, 4096, GIB), ("node1-2m", 1, 2 << 20, 8 << 20), ("node1-1g", 1, GIB, 2 * GIB)]
    assert [one.name for one in devices(0, shared=True, system=system)] == ["node0-2m", "node1-2m", "node1-1g"]


def test_pieces_where_devices_are_not_shared(tmp_path: Path) -> None:
    """Pieces are whole pages; what is smaller than a piece is one device."""
    system = machine(tmp_path, {0: {2048: 4, 1 << 20: 3}})
    found = devices(0, shared=False, piece=3 << 20, system=system)
    assert [(one.name, one.size) for one in found] == [
        ("node0-2m-0", 4 << 20), ("node0-2m-1", 4 << 20), ("node0-1g-0", GIB), ("node0-1g-1", GIB), ("node0-1g-2", GIB)]
    assert [one.name for one in devices(0, shared=False, system=system)] == ["node0-2m", "node0-1g"]


def test_what_a_shared_device_says() -> None:
    """Capacity with its policy, and the attributes; no policy where a device is not shared."""
    [one] = devices(GIB, shared=True, system=Path("/nowhere"))
    assert one.published({"guestMemfd": {"string": "kvm"}}) == {
        "name": PAGES, "allowMultipleAllocations": True,
        "attributes": {"resource.kubernetes.io/numaNode": {"int": 0}, "pageSize": {"string": "4Ki"},
                       "hugePages": {"bool": False}, "guestMemfd": {"string": "kvm"}},
        "capacity": {"memory": {"value": "1Gi", "requestPolicy": {
            "default": "2Mi", "validRange": {"min": "2Mi", "step": "2Mi"}}}}}
    [one] = devices(GIB, shared=False, system=Path("/nowhere"))
    assert one.published({})["capacity"] == {"memory": {"value": "1Gi"}}


def test_a_device_of_one_page(tmp_path: Path) -> None:
    """No range fits into it: there is one amount to take."""
    [one] = devices(0, shared=True, system=machine(tmp_path, {0: {1 << 20: 1}}))
    assert one.published({})["capacity"]["memory"]["requestPolicy"] == {"default": "1Gi", "validValues": ["1Gi"]}


def test_published_and_put_right(api: ApiServer) -> None:
    """Others' slices are left alone; a deleted, changed or stale one of ours is put right, with a new generation."""
    foreign = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "foreign"},
               "spec": {"driver": DRIVER, "nodeName": "node2", "pool": {"name": "node2", "generation": 7,
                                                                         "resourceSliceCount": 1}}}
    api.put("resourceslices", foreign)
    stale = {**foreign, "metadata": {"name": "stale"}, "spec": {**foreign["spec"], "nodeName": NODE}}
    api.put("resourceslices", stale)

    def own() -> dict[str, int]:
        return {one["metadata"]["name"]: one["spec"]["pool"]["generation"] for one in api.list("resourceslices")
                if one["spec"]["nodeName"] == NODE}

    name = f"{NODE}-{DRIVER}-0"
    with Node(api) as node:
        node.start()
        wait_for(lambda: own() == {name: 8})
        body = api.find("resourceslices", name)
        assert body is not None
        [owner] = body["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("Node", NODE)
        assert body["spec"]["devices"][0]["attributes"]["survivesCrash"] == {"bool": True}
        assert body["spec"]["devices"][0]["attributes"]["guestMemfd"] == {"string": "simulated"}

        api.remove("resourceslices", name)  # as the kubelet does when the driver was away
        wait_for(own)
        api.put("resourceslices", {**body, "spec": {**body["spec"], "devices": []}})
        wait_for(lambda: node.slices()[-1]["devices"] and own()[name] > 1)
        api.put("resourceslices", stale)
        wait_for(lambda: own().keys() == {name})
        assert api.find("resourceslices", "foreign")["spec"]["pool"]["generation"] == 7

        api.before = lambda method, path: time.sleep(0.2)  # so that the watch begins after what follows
        api.break_watches()
        api.remove("resourceslices", name)
        api.compact()  # the watch is told 410
        api.before = lambda method, path: None
        wait_for(lambda: own() == {name: 1})


def test_an_api_server_in_trouble(api: ApiServer) -> None:
    """It is left alone as long as it wants, a slice's name that is taken too; the kubelet is told; then all is well."""
    name = f"{NODE}-{DRIVER}-0"
    answers: list[type[web.HTTPException]] = []
    asked: list[float] = []

    def trouble(method: str, path: str) -> None:
        asked.append(time.monotonic())
        if answers:
            raise answers[0](headers={"Retry-After": "2"}, text="not now")

    with Node(api) as node:
        api.put("resourceslices", {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {
            "name": name}, "spec": {"driver": DRIVER, "nodeName": "other", "pool": {
                "name": "other", "generation": 1, "resourceSliceCount": 1}}})
        api.before = trouble
        claim = node.claim()
        answers.append(web.HTTPTooManyRequests)
        node.start()
        wait_for(lambda: "nodes/node1: not now (429)" in node.log())
        asked.clear()
        time.sleep(1.5)
        assert asked == []
        for answer in (web.HTTPUnauthorized, web.HTTPInternalServerError):
            answers[:] = [answer]
            with pytest.raises(Refused, match=rf"resourceclaims/c1: not now \({answer.status_code}\)"):
                node.kubelet.prepare(claim)
        answers.clear()
        wait_for(lambda: "already exists" in node.log())
        asked.clear()
        time.sleep(1)
        assert asked == []
        api.remove("resourceslices", name)
        node.wait_published()
        node.kubelet.prepare(claim)
        node.kubelet.unprepare(claim)
        assert node.leftovers() == []


def test_a_cluster_that_does_not_share_devices(api: ApiServer) -> None:
    """It is asked in a dry run, so nothing wrong is ever published."""
    api.sharing = False
    with Node(api, "--piece", "512Mi") as node:
        node.start()
        found = node.wait_published()
    assert {name: one["capacity"]["memory"] for name, one in found.items() if name.startswith(PAGES)} == {
        f"{PAGES}-0": {"value": "512Mi"}, f"{PAGES}-1": {"value": "512Mi"}}


def test_more_devices_than_a_slice_takes(api: ApiServer) -> None:
    """Several slices of one pool, which say how many they are."""
    api.sharing = False
    with Node(api, "--piece", "4Mi") as node:
        node.start()
        wait_for(lambda: node.slices() and len(node.slices()) == node.slices()[0]["pool"]["resourceSliceCount"])
        assert [len(spec["devices"]) for spec in node.slices()][:2] == [128, 128]  # this machine may have huge pages
        assert {pool(spec) for spec in node.slices()} == {(NODE, 1, len(node.slices()))}


def pool(spec: dict[str, Any]) -> tuple[str, int, int]:
    return spec["pool"]["name"], spec["pool"]["generation"], spec["pool"]["resourceSliceCount"]
