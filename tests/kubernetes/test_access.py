"""The rights in the manifests are those that the driver uses: no more, and no fewer."""

from __future__ import annotations

import pytest

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.kubelet import Refused
from tests.kubernetes.node import DRIVER, NODE, Node
from tests.kubernetes.rendering import kustomize, needs_renderers
from tests.patience import wait_for


@needs_renderers
def test_the_role_is_what_the_driver_calls(api: ApiServer) -> None:
    """After all that it does: slices created, changed and deleted, claims prepared and refused."""
    api.calls.clear()
    with Node(api) as node:
        node.start()
        node.wait_published()
        body = api.list("resourceslices")[0]
        api.put("resourceslices", {**body, "spec": {**body["spec"], "devices": []}})
        api.put("resourceslices", {**body, "metadata": {"name": "stale"}})
        wait_for(lambda: node.wait_published() and [one["metadata"]["name"] for one in api.list("resourceslices")]
                 == [f"{NODE}-{DRIVER}-0"])
        claim, refused = node.claim("one"), node.claim("two", parameters={"restore": "no-such"})
        node.kubelet.prepare(claim)
        with pytest.raises(Refused):
            node.kubelet.prepare(refused)
        node.kubelet.unprepare(claim)
    [role] = [one for one in kustomize("base") if one["kind"] == "ClusterRole"]
    granted = {(verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    # asked for by a kube-apiserver of 1.36 and later besides resourceclaims/status, with the prefix for a node's driver
    assert ("associated-node:update", "resourceclaims/driver") in granted
    assert granted - {("associated-node:update", "resourceclaims/driver")} == api.calls
