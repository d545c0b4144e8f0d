"""Quotas of a real gmemd: refused with the figures, charged again after a kill, shown by gmemctl."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.robustness.world import World

POLICY = """
version = 1
[[rule]]
name = "all"
match = {{ uid = {uid} }}
role = "admin"
[rule.limits]
bytes = "1MiB"
objects = 3
clients = 2
"""


def items(client: Client) -> dict[str, Any]:
    [account] = client.execute("query-memdev-quota")
    return {item["what"]: (item["used"], item.get("limit")) for item in account["items"]}


def test_a_kill_forgets_no_charge(tmp_path: Path) -> None:
    """What is charged is what there is, before and after; one connection too many is told why."""
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(uid=os.getuid()))
    policy.chmod(0o600)
    with World("--policy", str(policy), warm=False) as world:
        with world.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "one", "size": 768 << 10})
            with pytest.raises(QmpError, match="the quota of 'bytes' is 1048576: 786432 are used, and 524288 more were "
                                               "asked for"):
                client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "two", "size": 512 << 10})
            before = items(client)
            assert before["bytes"] == (768 << 10, 1 << 20)
            assert before["clients"] == (1, 2)
        world.kill(signal.SIGKILL)
        with world.client() as client:
            assert items(client) == before
            client.execute("object-del", {"id": "one"})
            assert items(client)["bytes"] == (0, 1 << 20)
            with world.client(), pytest.raises((QmpError, OSError), match="'clients' is 2: 2 are used, and 1 more"):
                world.client()
        shown = subprocess.run([sys.executable, "-m", "gmemd.cli.gmemctl", "--socket", world.socket, "quota"],
                               capture_output=True, text=True, check=True)
        assert [line.split()[1] for line in shown.stdout.splitlines()[1:]] == ["bytes", "objects", "clients"]
