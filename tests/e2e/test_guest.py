"""A guest in another process runs on memory from gmemd (examples/guest.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.programs import ROOT, gmemctl, output

GUEST = [sys.executable, str(ROOT / "examples" / "guest.py"), "--rounds", "1000"]


def run_guest(daemon: Daemon) -> str:
    return output(gmemctl("--socket", str(daemon.sock), "exec", "gm0", "--", *GUEST, "--offset", "{gm0.offset}",
                          "--size", "{gm0.size}", "{gm0}"))


@pytest.mark.kvm
@pytest.mark.e2e
def test_kvm_guest_on_guest_memfd() -> None:
    """A real vCPU in another process's VM runs on our guest_memfd, and the next one finds what it left."""
    with Daemon(kernel="kvm") as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "gm0", "size": 2 << 20,
                                      "guest-memfd": "on"})
        first = run_guest(daemon)
        assert first == "a real KVM vCPU; guest loaded into the memory, counter 0\ncounter 1000\n"
        second = run_guest(daemon)
        assert second == "a real KVM vCPU; guest found in the memory, counter 1000\ncounter 2000\n"
        [status] = client.execute("query-memdev-status")
        assert (status["kind"], status["kernel"], status["resident"]) == ("guest-memfd", "kvm", 2 * 4096)


@pytest.mark.e2e
def test_guest_on_simulated_guest_memfd() -> None:
    """Without KVM's guest_memfd the same memory is there for a guest, and outlives it the same."""
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "gm0", "size": 2 << 20,
                                      "guest-memfd": "on"})
        assert run_guest(daemon).endswith("guest loaded into the memory, counter 0\ncounter 1000\n")
        assert run_guest(daemon).endswith("guest found in the memory, counter 1000\ncounter 2000\n")
        [status] = client.execute("query-memdev-status")
        assert (status["kind"], status["kernel"]) == ("guest-memfd", "simulated")


@pytest.mark.e2e
def test_guest_on_a_part_of_a_file(tmp_path: Path) -> None:
    """The guest has the object's part; what lies before it in the file stays as it is."""
    (tmp_path / "two").write_bytes(bytes(2 << 20))
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-file", "id": "gm0", "size": 1 << 20,
                                      "offset": 1 << 20, "mem-path": str(tmp_path / "two"), "share": True})
        assert run_guest(daemon).endswith("guest loaded into the memory, counter 0\ncounter 1000\n")
    content = (tmp_path / "two").read_bytes()
    assert (content[:1 << 20].strip(b"\0"), content[0x102000:0x102004]) == (b"", (1000).to_bytes(4, "little"))
