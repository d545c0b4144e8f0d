"""What a ResourceClaim means: amounts, the ids of objects, and which parameters are for which request."""

from __future__ import annotations

from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.kubernetes.claims import creation, read_claim
from gmemd.kubernetes.offer import Device
from gmemd.kubernetes.parameters import merged
from gmemd.kubernetes.quantity import parse, write

DRIVER, NODE = "memory.gmemd.example", "node1"
DEVICES = {"node0-4k": Device("node0-4k", 0, 4096, 1 << 30, shared=True),
           "node1-2m": Device("node1-2m", 1, 2 << 20, 1 << 30, shared=True)}


@pytest.mark.parametrize(("text", "size"), [
    ("2Gi", 2 << 30), ("1.5Gi", 3 << 29), ("1e9", 10**9), ("1E3", 1000), ("1E", 10**18), ("100m", 1), ("0", 0),
    ("512M", 512 * 10**6), (".5Ki", 512), ("+4Ki", 4096), ("1500n", 1)])
def test_amounts(text: str, size: int) -> None:
    """As the API's Quantity; a part of a byte is one."""
    assert parse(text) == size
    assert parse(write(size)) == size


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "-1", "1gi", "1KiB", "1e", "x", "1.2.3"])
def test_what_is_not_an_amount(text: str) -> None:
    """It is named."""
    with pytest.raises(QmpError, match=r"^'.*' is not an amount of memory"):
        parse(text)


def body(*results: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"uid": "u-1", "namespace": "ns", "name": "c"}, "status": {"allocation": {"devices": {
        "results": [{"driver": DRIVER, "pool": NODE, "device": "node0-4k", **result} for result in results]}}}}


def test_ids() -> None:
    """A request's name, with a number if there are several results; a valid id even if that begins with a digit."""
    found = read_claim(body({"request": "ram"}, {"request": "many"}, {"request": "many"}, {"request": "a/b"},
                            {"request": "2nd"}), DRIVER, NODE, DEVICES.get)
    assert [one.id for one in found.portions] == ["ram", "many.0", "many.1", "a.b", "r_2nd"]


@pytest.mark.parametrize(("results", "config", "words"), [
    (["ram", "ram", "ram/0"], {}, r"^two results of the claim would be the object 'ram\.0'$"),
    (["r" * 200], {"onRelease": "snapshot"}, r"^a snapshot cannot have the name 'ns\.c\.r*': its 205 characters are"),
])
def test_what_could_not_be_released(results: list[str], config: dict[str, Any], words: str) -> None:
    """It is refused before there is memory."""
    claim = body(*({"request": request} for request in results))
    claim["status"]["allocation"]["devices"]["config"] = [{"source": "FromClaim", "opaque": {
        "driver": DRIVER, "parameters": {"apiVersion": "gmemd.example/v1", "kind": "MemoryConfig", **config}}}]
    with pytest.raises(QmpError, match=words):
        read_claim(claim, DRIVER, NODE, DEVICES.get)


def test_sizes() -> None:
    """What is consumed, under either name, or all of the device."""
    found = read_claim(body({"request": "a", "consumedCapacity": {"memory": "3Mi"}},
                            {"request": "b", "consumedCapacity": {f"{DRIVER}/memory": "4Mi"}}, {"request": "c"}),
                       DRIVER, NODE, DEVICES.get)
    assert [one.size for one in found.portions] == [3 << 20, 4 << 20, 1 << 30]


def test_what_is_created() -> None:
    """Huge pages as the device has them, bound to its NUMA node where there are several."""
    [one] = read_claim(body({"request": "ram", "device": "node1-2m", "consumedCapacity": {"memory": "4Mi"}}), DRIVER,
                       NODE, DEVICES.get).portions
    assert creation(one, "u-1", bind=True) == ("object-add", {
        "qom-type": "memory-backend-memfd", "id": "ram@u-1", "size": 4 << 20, "hugetlb": True,
        "hugetlbsize": 2 << 20, "host-nodes": [1], "policy": "bind"})


def test_admin_access_and_unknown_devices() -> None:
    """Both are refused."""
    with pytest.raises(QmpError, match="asks for admin access"):
        read_claim(body({"request": "ram", "adminAccess": True}), DRIVER, NODE, DEVICES.get)
    with pytest.raises(QmpError, match="device 'gone' is not offered by this node"):
        read_claim(body({"request": "ram", "device": "gone"}), DRIVER, NODE, DEVICES.get)


def test_parameters_of_a_request() -> None:
    """Those of no request are for all, those of a request also for its subrequests, others' are not looked at."""
    def config(source: str, requests: list[str] | None, driver: str = DRIVER, **given: Any) -> dict[str, Any]:
        return {"source": source, **({} if requests is None else {"requests": requests}), "opaque": {
            "driver": driver, "parameters": {"apiVersion": "gmemd.example/v1", "kind": "MemoryConfig", **given}}}

    configs = [config("FromClaim", ["ram"], onRelease="keep"), config("FromClass", None, prealloc=True, copy="base"),
               config("FromClass", ["other"], type="guest-memfd"), config("FromClass", [], "gpu.example", nonsense=1)]
    assert merged(configs, DRIVER, "ram/fast", "ns") == {
        "type": "memfd", "onRelease": "keep", "prealloc": True, "copy": "base"}
    assert merged(configs, DRIVER, "other", "ns") == {
        "type": "guest-memfd", "onRelease": "delete", "prealloc": True, "copy": "base"}
    assert merged([config("FromClaim", [], copy="base")], DRIVER, "ram", "ns")["copy"] == "ns.base"
