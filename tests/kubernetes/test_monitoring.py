"""What a cluster's Prometheus and Grafana get: the driver's /metrics, the alert rules, the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.node import Node
from tests.kubernetes.rendering import CHART, helm, needs_renderers
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT

ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
FOREIGN = {"up", "kube_daemonset_status_number_unavailable"}  # of Prometheus and kube-state-metrics


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def test_the_driver_passes_on_and_adds(api: ApiServer, tmp_path: Path) -> None:
    """gmemd's own series, and the claims by namespace; 502 while gmemd does not answer; nothing else is answered."""
    port, path = free_port(), tmp_path / "http.sock"
    with Node(api, "--metrics", str(port), "--http", f"unix:{path}", daemon=("--http", f"unix:{path}")) as node:
        node.start()
        claims = [node.claim("one"), node.claim("two"), node.claim("three", namespace="team-b")]
        for claim in claims:
            node.kubelet.prepare(claim)
        families = {family.name: family for family in text_string_to_metric_families(read(port))}
        found = {name: {sample.labels["namespace"]: sample.value for sample in families[name].samples}
                 for name in ("gmemd_claims", "gmemd_claims_bytes")}
        assert found == {"gmemd_claims": {"team-a": 2, "team-b": 1},
                         "gmemd_claims_bytes": {"team-a": 4 << 20, "team-b": 2 << 20}}
        assert families["gmemd_ready"].samples[0].value == 1
        _only_what_exists(families.keys())
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/objects", timeout=PATIENCE)
        path.unlink()
        with pytest.raises(urllib.error.HTTPError, match="502"):
            read(port)
        node.kubelet.unprepare(*claims)
        wait_for(lambda: not node.rooms())


def _only_what_exists(names: object) -> None:
    """The rules and the dashboard ask for no metric that there is not."""
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    wanted = {name for expression in asked for name in re.findall(r"\b(?:gmemd|kube|up)\w*(?![\w=])", expression)
              if name != "gmemd"} - FOREIGN
    there = {str(name) for name in names} | {f"{name}_total" for name in names}  # type: ignore[attr-defined]
    assert {name for name in wanted if name not in there} - {"gmemd_claims", "gmemd_claims_bytes"} == set()


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (script/packages installs it)")
def test_prometheus_takes_the_rules() -> None:
    """By its own tool."""
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True, capture_output=True, timeout=PATIENCE)


@needs_renderers
def test_the_chart_has_them_whole() -> None:
    """The rules and the dashboard pass through Helm as they are, also what looks like a template."""
    rendered = {one["kind"]: one for one in helm({"monitoring": {"enabled": True, "labels": {"release": "p"}}})}
    assert rendered["PrometheusRule"]["spec"] == yaml.safe_load(ALERTS.read_text())
    assert json.loads(rendered["ConfigMap"]["data"]["gmemd-fleet.json"]) == json.loads(DASHBOARD.read_text())
    assert rendered["PodMonitor"]["metadata"]["labels"] == {"release": "p"}
    [container] = rendered["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert f"--metrics={port['containerPort']}" in container["args"]
    assert (rendered["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"], port["name"]) == ("metrics", "metrics")
    selected = rendered["PodMonitor"]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= rendered["DaemonSet"]["spec"]["template"]["metadata"]["labels"].items()
    assert "files/alerts.yaml" in (ROOT / "docs" / "kubernetes.md").read_text()
