"""script/kubernetes: the driver, the manifests and the view of a cluster on a real API server.

Each part prints what it has seen, and ends with an AssertionError at the first thing that is not so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate

from tests.kubernetes import fleetsize
from tests.kubernetes.apiserver import TOKEN
from tests.kubernetes.node import DRIVER, NODE, PAGES, Node
from tests.kubernetes.realapi import POLICIES, RealApi, definition, root
from tests.kubernetes.rendering import helm, kustomize
from tests.patience import PATIENCE, wait_for

Body = dict[str, Any]
VERSION = "1.37.0"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_NOT_WITH_POLICIES = ("NamespaceLifecycle", "MutatingAdmissionWebhook", "ValidatingAdmissionWebhook",
                      "MutatingAdmissionPolicy")


def main(parts: list[str]) -> None:
    """Run these parts, or all, on one server."""
    known = {"api": api, "driver": driver, "manifests": manifests, "scale": fleetsize.cluster, "node": fleetsize.node}
    assert set(parts) <= set(known), f"the parts are {', '.join(known)}"
    with RealApi() as server:
        server.front.tokens[TOKEN] = NODE
        server.front.rules = _rules(kustomize("base"))
        server.define(
            definition("resource.k8s.io", "ResourceSlice", "resourceslices", fields=("spec.nodeName", "spec.driver"),
                       schema=_structural("resourceslicespec-resource-v1")),
            definition("resource.k8s.io", "ResourceClaim", "resourceclaims", namespaced=True,
                       schema=_structural("resourceclaimspec-resource-v1")))
        for name in parts or known:
            print(f"-- {name}", flush=True)
            known[name](server)
    print("all of it is so")


def say(text: str) -> None:
    print(f"   {text}", flush=True)


# -- api: what we rely on


def api(server: RealApi) -> None:
    """Conflict, strict decoding, field selectors, server-side apply and watch are as the driver expects."""
    body = _slice("one", NODE)
    stored = server.must("POST", SLICES, body)
    newer = server.must("PUT", f"{SLICES}/one", {**stored, "spec": {**stored["spec"], "pool": {
        **stored["spec"]["pool"], "generation": 2}}})
    status, found = server.ask("PUT", f"{SLICES}/one", stored)
    assert (status, found["reason"]) == (409, "Conflict")
    wrong = _slice("two", NODE)
    wrong["spec"]["devicez"] = []
    status, found = server.ask("POST", SLICES, wrong, fieldValidation="Strict")
    assert status == 400, found
    assert "devicez" in found["message"], found
    for selector, count in ((f"spec.nodeName={NODE},spec.driver={DRIVER}", 1), ("spec.nodeName=other", 0)):
        assert len(server.must("GET", SLICES, fieldSelector=selector)["items"]) == count
    events = _watched(server, newer["metadata"]["resourceVersion"])
    status, applied = server.ask(
        "PATCH", f"{SLICES}/one", {key: body[key] for key in ("apiVersion", "kind", "spec")}
        | {"metadata": {"name": "one"}}, kind="application/apply-patch+yaml", fieldManager="x", force="true")
    assert (status, applied["spec"]["pool"]["generation"]) == (200, 1)
    server.must("DELETE", f"{SLICES}/one")
    seen = events()
    assert [kind for kind, _ in seen] == ["MODIFIED", "DELETED"], seen
    say("create, update, 409 for a stale one, 400 for an unknown member, selectors, server-side apply, watch: all so")


def _watched(server: RealApi, version: str) -> Callable[[], list[tuple[str, str]]]:
    """Follow the slices from a version on; what is returned waits for two events."""
    argv = ["curl", "-sN", f"{server.url}{SLICES}?watch=1&resourceVersion={version}&timeoutSeconds=30"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def events() -> list[tuple[str, str]]:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.kill()
        process.wait()
        process.stdout.close()
        return [(line["type"], line["object"]["metadata"]["name"]) for line in lines]

    return events


# -- driver: all that gmemd-dra does, by its own account and with its own rights


def driver(server: RealApi) -> None:
    """Slices are published and put right; claims are prepared and refused; Go's types know all that was sent."""
    server.front.asked.clear()
    server.front.used.clear()
    with Node(server) as node:  # type: ignore[arg-type]
        node.start()
        node.wait_published()
        name = f"{NODE}-{DRIVER}-0"
        server.remove("resourceslices", name)
        wait_for(lambda: server.find("resourceslices", name))
        other = server.find("resourceslices", name)
        assert other is not None
        server.put("resourceslices", {**other, "spec": {**other["spec"], "devices": []}})
        wait_for(lambda: node.slices()[-1]["devices"])
        server.put("resourceslices", _slice("stale", NODE))
        wait_for(lambda: [one["metadata"]["name"] for one in server.list("resourceslices")] == [name])
        say("slices: published; put right after a deletion, a change and a stale one")
        good, bad = node.claim("good"), node.claim("bad", parameters={"restore": "no-such"})
        node.kubelet.prepare(good)
        with node.inside(good) as client:
            assert [one["id"] for one in client.execute("query-memdev")] == ["ram"]
        refused = _refusal(node, bad)
        [(_, state, message)] = node.conditions(bad)
        assert (state, message) == ("False", refused)
        node.kubelet.unprepare(good)
        node.kubelet.unprepare(bad)
        assert node.leftovers() == []
        say(f"claims: prepared, seen at its socket, released; refused in its status: {refused}")
    _sent_what_go_knows(server)
    _used_its_rights(server)


def _refusal(node: Node, claim: Any) -> str:
    from tests.kubernetes.kubelet import Refused

    try:
        node.kubelet.prepare(claim)
    except Refused as exc:
        return str(exc)
    raise AssertionError("a claim of a snapshot that does not exist was prepared")


def _sent_what_go_knows(server: RealApi) -> None:
    """Each body that the driver has sent, decoded by Kubernetes' own types."""
    bodies = [body for _, _, body in server.front.asked if body is not None]
    kinds = {body["kind"] for body in bodies}
    assert kinds == {"ResourceSlice", "ResourceClaim"}, kinds
    answers = judge({"object": body} for body in bodies)
    assert [answer["error"] for answer in answers if "error" in answer] == []
    say(f"decoded by Go's own types: {len(bodies)} bodies, no unknown member")


def _used_its_rights(server: RealApi) -> None:
    """The verbs that the server has asked about are those of the ClusterRole, no more and no fewer."""
    granted = {(resource, verb) for rule in server.front.rules for resource in rule["resources"]
               for verb in rule["verbs"] if resource != "resourceclaims/driver"}  # the kube-apiserver's own
    assert server.front.used == granted, server.front.used ^ granted
    say(f"rights: exactly the {len(granted)} of the ClusterRole")


# -- manifests: the API's own code judges them


def manifests(server: RealApi) -> None:
    """Go's types know every member; the classes select what is published; a driver writes only its own slices."""
    rendered = [*kustomize("pod"), *helm({"gmemd": {"pod": True}})]
    ours = [one for one in rendered if "monitoring.coreos.com" not in one["apiVersion"]]
    answers = judge({"object": one} for one in ours)
    assert [answer["error"] for answer in answers if "error" in answer] == []
    say(f"{len(ours)} manifests decoded by Go's own types, no unknown member")
    _classes_select(ours)
    _policy_judges(server, ours)


def _classes_select(manifests: list[Body]) -> None:
    devices = {size: {"attributes": {"pageSize": {"string": size}, "guestMemfd": {"string": "kvm"}}}
               for size in ("4Ki", "2Mi", "1Gi")}
    wanted = {"gmemd-memory": ["4Ki"], "gmemd-guest-memfd": ["4Ki"], "gmemd-hugepages-2mi": ["2Mi"],
              "gmemd-hugepages-1gi": ["1Gi"]}
    for one in manifests:
        if one["kind"] == "DeviceClass":
            expression = one["spec"]["selectors"][0]["cel"]["expression"]
            answers = judge({"select": expression, "driver": DRIVER, "device": device} for device in devices.values())
            selected = [size for size, answer in zip(devices, answers, strict=True) if answer["value"]]
            assert selected == wanted[one["metadata"]["name"]], (one["metadata"]["name"], selected)
            [other] = judge([{"select": expression, "driver": "other.example", "device": devices["4Ki"]}])
            assert other["value"] is False
    say("the classes' CEL selects the devices of their page size, and no other driver's")


def _policy_judges(server: RealApi, manifests: list[Body]) -> None:
    kinds = {"ValidatingAdmissionPolicy": "validatingadmissionpolicies",
             "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings"}
    server.define(*(definition("admissionregistration.k8s.io", kind, plural) for kind, plural in kinds.items()))
    for one in manifests[:len(manifests) // 2]:
        if one["kind"] in kinds:
            server.must("POST", f"{ADMISSION}/{kinds[one['kind']]}", _defaulted(one))
    server.must("POST", SLICES, _slice("others", "node2"))
    server.serve(*_NOT_WITH_POLICIES)
    own, foreign = _slice("own", NODE), _slice("foreign", "node2")
    other = _slice("other", NODE)
    other["spec"]["driver"] = "other.example"
    wait_for(lambda: server.ask("POST", SLICES, foreign, node=NODE, dryRun="All")[0] in (403, 422))
    for what, method, path, body, status in (
            ("its own slice", "POST", SLICES, own, 201),
            ("another node's slice", "POST", SLICES, foreign, 422),
            ("another driver's slice", "POST", SLICES, other, 422),
            ("to delete another node's slice", "DELETE", f"{SLICES}/others", None, 422),
            ("to delete its own slice", "DELETE", f"{SLICES}/own", None, 200)):
        found, answer = server.ask(method, path, body, node=NODE)
        assert found == status, (what, found, answer.get("message"))
        say(f"{what}: {found}" + (f" {answer['message'].rpartition('denied request: ')[2]}" if found > 400 else ""))
    found, _ = server.ask("DELETE", f"{SLICES}/others")
    assert found == 200, "the administrator is not bound by it"
    server.serve(*_NOT_WITH_POLICIES, POLICIES)


def _defaulted(policy: Body) -> Body:
    """It, with what a kube-apiserver fills in."""
    if "matchConstraints" not in policy["spec"]:
        return policy
    filled_in = {"namespaceSelector": {}, "objectSelector": {}, "matchPolicy": "Equivalent"}
    return {**policy, "spec": {**policy["spec"], "matchConstraints": filled_in | policy["spec"]["matchConstraints"]}}


# -- what the parts use


def judge(questions: Iterable[Body]) -> list[Body]:
    """What Kubernetes' own code says of each: tests/kubernetes/judge/main.go."""
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run([root() / "build" / "judge.bin"], input=lines, capture_output=True, text=True,
                          timeout=PATIENCE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _slice(name: str, node: str) -> Body:
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": name},
            "spec": {"driver": DRIVER, "nodeName": node, "pool": {"name": node, "generation": 1,
                                                                  "resourceSliceCount": 1},
                     "devices": [{"name": PAGES, "attributes": {"pageSize": {"string": "4Ki"}},
                                  "capacity": {"memory": {"value": "64Gi"}}}]}}


def _rules(manifests: list[Body]) -> list[Body]:
    [role] = [one for one in manifests if one["kind"] == "ClusterRole"]
    return list(role["rules"])


def _structural(name: str) -> Body:
    """A published JSON schema in the form of a CustomResourceDefinition's: nothing refers to elsewhere."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{VERSION}-local"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]

    def inlined(schema: Body) -> Body:
        if "$ref" in schema:
            return inlined(definitions[schema["$ref"].rpartition("/")[2]])
        if "oneOf" in schema:  # a Quantity, a number or its text
            return {"x-kubernetes-int-or-string": True}
        found = {key: schema[key] for key in ("type", "required", "enum") if key in schema}
        if isinstance(found.get("type"), list):
            found["type"] = next(one for one in found["type"] if one != "null")
        if "properties" in schema:
            found["properties"] = {key: inlined(inner) for key, inner in schema["properties"].items()}
        if isinstance(schema.get("items"), dict):
            found["items"] = inlined(schema["items"])
        if isinstance(schema.get("additionalProperties"), dict):
            found["additionalProperties"] = inlined(schema["additionalProperties"])
        if found.get("type") == "object" and not {"properties", "additionalProperties"} & found.keys():
            found["x-kubernetes-preserve-unknown-fields"] = True
        return found

    return inlined(json.loads((folder / f"{name}.json").read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
