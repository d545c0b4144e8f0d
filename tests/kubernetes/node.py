"""A node for tests: its gmemd under the keeper, its driver, its kubelet, and claims that are allocated there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from tests.kubernetes.apiserver import TOKEN, ApiServer
from tests.kubernetes.kubelet import Kubelet
from tests.patience import PATIENCE, wait_for

DRIVER = "memory.gmemd.example"
NODE = "node1"
PAGES = f"node0-{os.sysconf('SC_PAGE_SIZE') >> 10}k"  # the device of ordinary pages

Claim = tuple[str, str, str]  # namespace, name, uid


class Node:
    """Everything of one node, in a directory; used within `with`.

    `arguments` go onto the driver's command line, `daemon` onto gmemd's.
    """

    def __init__(self, api: ApiServer, *arguments: str, qmp: str = "", program: tuple[str, ...] = (),
                 daemon: tuple[str, ...] = ()) -> None:
        self.api = api
        self._arguments = arguments
        self._qmp = qmp
        self._program = program or (sys.executable, "-m", "gmemd.kubernetes.main")
        self._unwind = ExitStack()
        self.directory = Path(self._unwind.enter_context(tempfile.TemporaryDirectory(prefix="gd-")))
        self.gmemd = self._unwind.enter_context(RunningGmemd(*daemon, keep=True))
        self.kubelet = Kubelet(self.directory)
        (self.directory / "token").write_text(TOKEN)
        self.drivers: list[subprocess.Popen[bytes]] = []
        if api.find("nodes", NODE) is None:
            api.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.terminate()
        for driver in self.drivers:
            driver.wait(PATIENCE)
        self._unwind.close()

    def put_into(self, **words: str) -> None:
        """Fill in what stands in braces in the address of gmemd and in the program."""
        self._qmp = self._qmp.format(**words)
        self._program = tuple(word.format(**words) for word in self._program)

    # -- the driver

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the driver, and wait until the kubelet knows it."""
        driver = self.launch(*arguments)
        self.kubelet.endpoints.clear()
        self.kubelet.register()
        return driver

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the driver."""
        with (self.directory / "log").open("ab") as log:
            driver = subprocess.Popen(
                [*self._program, "--node-name", NODE, "--qmp", self._qmp or f"unix:{self.gmemd.socket}",
                 "--kubelet", str(self.directory), "--cdi", str(self.cdi), "--claims", str(self.claims),
                 "--memory", "1Gi", "--api", self.api.url, "--token", str(self.directory / "token"),
                 *self._arguments, *arguments], stdout=log, stderr=log)
        self.drivers.append(driver)
        return driver

    def stop(self, driver: subprocess.Popen[bytes]) -> int:
        """End a driver as its pod's end does; its exit status."""
        driver.send_signal(signal.SIGTERM)
        return driver.wait(PATIENCE)

    def log(self) -> str:
        """What its drivers have said."""
        return (self.directory / "log").read_text()

    # -- what is there

    @property
    def claims(self) -> Path:
        return self.directory / "claims"

    @property
    def cdi(self) -> Path:
        return self.directory / "cdi"

    def slices(self) -> list[dict[str, Any]]:
        """The specs of the node's ResourceSlices by name."""
        return [one["spec"] for one in sorted(self.api.list("resourceslices"), key=lambda one: one["metadata"]["name"])]

    def wait_published(self) -> dict[str, Any]:
        """The devices of the node by name, once they are published."""
        wait_for(self.slices)
        return {device["name"]: device for spec in self.slices() for device in spec["devices"]}

    def rooms(self) -> dict[str, Any]:
        """The rooms in gmemd by id."""
        with self.gmemd.client() as client:
            return {room["id"]: room for room in client.execute("query-memdev-rooms")}

    def objects(self) -> dict[str, int]:
        """All objects in gmemd: their sizes by the names that the house gives them."""
        with self.gmemd.client() as client:
            return {one["id"]: one["size"] for one in client.execute("query-memdev")}

    def inside(self, claim: Claim) -> Client:
        """A client at a claim's socket, as a container has one."""
        return Client(str(self.claims / claim[2] / "qmp.sock"), timeout=PATIENCE)

    def specification(self, claim: Claim) -> dict[str, Any]:
        """The CDI file of a claim."""
        found: dict[str, Any] = json.loads((self.cdi / f"gmemd.example-claim_{claim[2]}.json").read_text())
        return found

    def leftovers(self) -> list[str]:
        """What is left of claims anywhere."""
        return [*self.rooms(), *self.objects(), *(path.name for path in self.cdi.iterdir()),
                *(path.name for path in self.claims.iterdir())]

    # -- claims

    def claim(self, name: str = "c1", *results: dict[str, Any], namespace: str = "team-a",
              parameters: dict[str, Any] | None = None, of_class: dict[str, Any] | None = None,
              annotations: dict[str, str] | None = None) -> Claim:
        """Create a claim that is allocated here; each result has a request and what differs from 2 MiB of PAGES."""
        config = [{"source": source, "requests": [], "opaque": {"driver": DRIVER, "parameters": {
            "apiVersion": "gmemd.example/v1", "kind": "MemoryConfig", **given}}}
            for source, given in (("FromClass", of_class), ("FromClaim", parameters)) if given is not None]
        complete = [{"driver": DRIVER, "pool": NODE, "device": PAGES, "consumedCapacity": {"memory": "2Mi"},
                     "shareID": str(uuid.uuid4()), **result} for result in results or ({"request": "ram"},)]
        body = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
                "metadata": {"name": name, "namespace": namespace, **({"annotations": annotations}
                                                                      if annotations else {})},
                "spec": {"devices": {"requests": [
                    {"name": request, "exactly": {"deviceClassName": "gmemd-memory"}}
                    for request in dict.fromkeys(one["request"].partition("/")[0] for one in complete)]}},
                "status": {"allocation": {"devices": {"results": complete, "config": config}}}}
        stored = self.api.put("resourceclaims", body)
        return namespace, name, stored["metadata"]["uid"]

    def conditions(self, claim: Claim) -> list[tuple[str, str, str]]:
        """Device, status and message of the conditions Ready of a claim."""
        body = self.api.find("resourceclaims", claim[1], claim[0])
        assert body is not None
        return [(one["device"], condition["status"], condition["message"])
                for one in body["status"].get("devices", []) for condition in one["conditions"]]
