"""The manifests in deploy/: Kustomize and Helm say the same, it is what the API takes, and it refers to what exists."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gmemd.client.running import RunningGmemd
from gmemd.kubernetes.house import House
from gmemd.kubernetes.main import make_parser
from gmemd.kubernetes.node import Node
from gmemd.kubernetes.parameters import check
from tests.kubernetes.rendering import CHART, Manifest, by_name, helm, helm_each, kustomize, needs_renderers, refusal
from tests.programs import ROOT, gmemctl, output

pytestmark = needs_renderers

PLAIN: dict[str, Any] = {"image": {"tag": "x"}}
IN_POD: dict[str, Any] = {**PLAIN, "gmemd": {"pod": True}}
OTHER: dict[str, Any] = {
    **IN_POD, "driverName": "ram.example.org", "memory": "64Gi", "kubeletDirectory": "/data/kubelet",
    "cdiDirectory": "/etc/cdi", "gmemd": {"pod": True, "directory": "/run/other", "args": ["--snapshots", "/s"]},
    "image": {"repository": "example.org/gmemd", "tag": "1", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}], "nodeSelector": {"memory": "yes"}, "monitoring": {"enabled": True}}
MONITORED: dict[str, Any] = {**PLAIN, "monitoring": {"enabled": True, "labels": {"release": "prometheus"}}}
NOT_CHECKED = {"PodMonitor", "PrometheusRule"}  # of the Prometheus operator


def _untagged(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    text = json.dumps(by_name(manifests)[("DaemonSet", "gmemd-dra")])
    assert '"image": "gmemd:x"' in text
    return by_name(json.loads(json.dumps(manifests).replace('"image": "gmemd:x"', '"image": "gmemd"')))


@pytest.mark.parametrize(("overlay", "values"), [("base", PLAIN), ("pod", IN_POD)])
def test_helm_and_kustomize_say_the_same(overlay: str, values: dict[str, Any]) -> None:
    """Object by object; only the namespace itself is not the chart's."""
    ours = by_name(kustomize(overlay))
    assert ours.pop(("Namespace", "gmemd"))["metadata"]["labels"]
    assert _untagged(helm(values)) == ours


@pytest.mark.parametrize("values", [IN_POD, OTHER], ids=["defaults", "others"])
@pytest.mark.parametrize("version", ["1.34", "1.36"])
def test_kubernetes_would_take_them(version: str, values: dict[str, Any]) -> None:
    """Each is what the API's own schema says, with no field that it does not know."""
    checked = [manifest for manifest in helm(values) if manifest["kind"] not in NOT_CHECKED]
    assert len(checked) >= 10
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_each_value_has_an_effect() -> None:
    """Nothing in values.yaml is read by nobody: every one that is changed changes what is rendered."""
    changed = [(name, {**IN_POD, name: value}) for name, value in OTHER.items() if name not in ("image", "gmemd")]
    changed += [(name, {**IN_POD, "gmemd": {"pod": True, name: value}}) for name, value in {
        "directory": "/run/other", "args": ["--x"], "resources": {"limits": {"memory": "1Gi"}}}.items()]
    less = {**PLAIN, "deviceClasses": False, "admissionPolicy": False}
    before, least, *after = helm_each([IN_POD, less, *(values for _, values in changed)])
    assert [name for (name, _), rendered in zip(changed, after, strict=True) if rendered == before] == []
    assert {kind for kind, _ in by_name(least)} == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"}


def test_the_schema_knows_the_values() -> None:
    """Each value of values.yaml is in values.schema.json and the other way round, and the defaults are valid."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    assert schema["properties"].keys() - {"global"} == values.keys()  # global: any parent chart's
    for name, inner in schema["properties"].items():
        if "additionalProperties" in inner and "properties" in inner:
            assert inner["properties"].keys() == values[name].keys()


@pytest.mark.parametrize(("values", "word"), [
    ({"memroy": "64Gi"}, "memroy"), ({"memory": "64 GB"}, "memory"), ({"driverName": "Memory_X"}, "driverName"),
    ({"gmemd": {"directory": "run/gmemd"}}, "directory"), ({"gmemd": {"pod": "yes"}}, "pod")])
def test_a_wrong_value_is_refused(values: dict[str, Any], word: str) -> None:
    """By Helm itself, from the schema, and the message names the value."""
    assert word in refusal(values)


@pytest.mark.parametrize("manifests", [lambda: helm(IN_POD), lambda: helm(OTHER)], ids=["defaults", "others"])
def test_they_refer_to_what_there_is(manifests: Any) -> None:
    """Selectors, volumes, accounts, roles, policies and the user of the image are each other's."""
    found = by_name(manifests())
    account = found[("ServiceAccount", "gmemd-dra")]["metadata"]
    [subject] = found[("ClusterRoleBinding", "gmemd-dra")]["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])
    assert found[("ClusterRoleBinding", "gmemd-dra")]["roleRef"]["name"] == "gmemd-dra"
    policy = found[("ValidatingAdmissionPolicy", "gmemd-dra-own-slices")]["spec"]
    assert f"'system:serviceaccount:{account['namespace']}:{account['name']}'" in str(policy["matchConditions"])
    for (kind, _), manifest in found.items():
        if kind == "DaemonSet":
            _refers_to_what_it_has(manifest)
    assert "USER 10001:10001\n" in (ROOT / "Dockerfile").read_text()
    assert "VOLUME /run/gmemd\n" in (ROOT / "Dockerfile").read_text()


def _refers_to_what_it_has(manifest: Manifest) -> None:
    template = manifest["spec"]["template"]
    assert manifest["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    used = set()
    for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
        used |= {mount["name"] for mount in container["volumeMounts"]}
        defined = {variable["name"] for variable in container.get("env", [])}
        assert set(re.findall(r"\$\((\w+)\)", json.dumps(container.get("args", [])))) == defined
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
    assert used == volumes


def test_the_name_of_the_driver_is_in_one_place() -> None:
    """With another name nothing is left of the default one."""
    assert "memory.gmemd.example" not in json.dumps(helm(OTHER))
    named = [str(manifest) for manifest in helm(OTHER) if "ram.example.org" in str(manifest)]
    assert len(named) >= 7  # role, policy, four classes, options


def test_the_classes_differ() -> None:
    """No two select the same devices with the same parameters."""
    specs = [manifest["spec"] for manifest in helm(PLAIN) if manifest["kind"] == "DeviceClass"]
    assert len(specs) == 4
    assert all(one != other for one, other in itertools.combinations(specs, 2))


# -- the page and the examples

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
KUBEVIRT = ROOT / "examples" / "kubevirt"


def _on_the_page() -> list[Manifest]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found = [yaml.safe_load(block) for block in blocks]
    return [one for one in found if isinstance(one, dict) and "kind" in one]


def _examples() -> list[Manifest]:
    found = [one for path in sorted(KUBEVIRT.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
    return [one for one in found if one["apiVersion"] != "kubevirt.io/v1"]  # has a schema of its own


def test_kubernetes_would_take_the_page_and_the_examples() -> None:
    """Each object is what the API's own schema says, with no field that it does not know."""
    assert [one["kind"] for one in _on_the_page()] == ["ResourceClaimTemplate", "Pod", "Pod"]
    assert [one["kind"] for one in _examples()] == [
        "MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding", "ResourceClaimTemplate"]
    for one in (*_on_the_page(), *_examples()):
        kubernetes_validate.validate(one, "1.36", strict=True)


def test_parameters_on_the_page_are_those_that_there_are() -> None:
    """In the example, in the table, and in the class."""
    known = json.loads((ROOT / "gmemd/kubernetes/parameters.json").read_text())["properties"].keys()
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("| parameter | is |")[2].partition("\n\n")[0], re.M))
    assert told == known - {"apiVersion", "kind"}
    configs = [config for one in (*_on_the_page(), *kustomize("base"))
               for spec in [one.get("spec", {})] for config in spec.get("config", ())
               or spec.get("spec", {}).get("devices", {}).get("config", ())]
    assert len(configs) == 2
    for config in configs:
        check(config["opaque"]["parameters"])


def test_classes_on_the_page_are_those_that_there_are() -> None:
    """Also the one of the example's VM."""
    classes = {one["metadata"]["name"] for one in kustomize("base") if one["kind"] == "DeviceClass"}
    requests = [request for one in (*_on_the_page(), *_examples()) if one["kind"] == "ResourceClaimTemplate"
                for request in one["spec"]["spec"]["devices"]["requests"]]
    assert {request["exactly"]["deviceClassName"] for request in requests} < classes
    assert all(f"`{name}`" in PAGE for name in classes)


def test_attributes_that_classes_ask_for_are_published() -> None:
    """And the page names all that there are."""
    with RunningGmemd() as gmemd:
        house = House(gmemd.socket)
        [device] = Node(house, 1 << 30, 0).offer(True)
        house.close()
    asked = set(re.findall(r"'\]\.(\w+)", json.dumps([one for one in kustomize("base")
                                                      if one["kind"] == "DeviceClass"])))
    assert asked == {"pageSize", "guestMemfd"}
    assert asked < device["attributes"].keys()
    assert all(f"`{name}`" in PAGE for name in device["attributes"])


def test_commands_of_the_manifests_work() -> None:
    """The probe succeeds on a gmemd, and fails without one; the client's command runs."""
    [gmemd] = [one for one in kustomize("pod") if one["metadata"]["name"] == "gmemd" and one["kind"] == "DaemonSet"]
    probe = gmemd["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]["command"]
    client = _on_the_page()[-1]["spec"]["containers"][0]["command"]
    with RunningGmemd() as server:
        for command in (probe, client):
            output(gmemctl("--socket", server.socket, *command[1:]))
    output(gmemctl("--socket", server.socket, *probe[1:]), status=3)


def test_options_of_the_manifests_exist() -> None:
    """gmemd-dra takes what both kinds of manifests pass."""
    for manifest in (*kustomize("base"), *helm(OTHER)):
        if manifest["kind"] == "DaemonSet" and manifest["metadata"]["name"] == "gmemd-dra":
            [container] = manifest["spec"]["template"]["spec"]["containers"]
            make_parser().parse_args(container["args"])
