"""Claims of Kubernetes in containers: what the driver prepares reaches exactly the containers of its claim."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.containers.conftest import Image
from tests.containers.podman import Podman
from tests.containers.test_containers import CLIENT, LOCKED_UP
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.etcd import why_not
from tests.kubernetes.node import Claim, Node
from tests.programs import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

WRAPPER = ROOT / "examples" / "kubevirt" / "qemu-kvm"
SIZE = 2 << 20  # bytes; what a claim of the tests has
# as libvirt describes a guest's memory
RAM = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": True, "hugetlb": False,
       "x-use-canonical-path-for-ramblock-id": False, "size": SIZE}
# starts the emulator as libvirt would, and writes into its guest's memory through its own monitor
VMM = """
unset GMEMD_SOCKET  # libvirt passes on no such thing
/qemu-kvm -machine pc,memory-backend=pc.ram -m 2 -object "$1" -qmp unix:/tmp/vm,server=on,wait=off -daemonize
python - "$2" <<END
import os, mmap, sys
from gmemd.client.client import Client
with Client("/tmp/vm") as client:
    info, [fd] = client.execute_fds("memdev-get-fd", {"id": "pc.ram"})
view = mmap.mmap(fd, info["size"], offset=info["offset"])
view[:len(sys.argv[1])] = sys.argv[1].encode()
END
"""


@pytest.fixture
def node(podman: Podman) -> Iterator[Node]:
    """A node whose CDI directory is the one that podman reads."""
    with ApiServer() as api, Node(api) as node:
        node.start()
        podman.command("mkdir", "-p", "/var/run/cdi")
        podman.command("mount", "--bind", node.cdi, "/var/run/cdi")
        yield node
        podman.command("umount", "/var/run/cdi")


def run(podman: Podman, image: Image, claim: Claim, entry: str, *words: str, options: tuple[str, ...] = ()) -> str:
    """Run a container that has the claim, by its CDI device, as another user than gmemd's; give its output."""
    return podman.command(
        "podman", "run", "--rm", "--no-healthcheck", *LOCKED_UP, "--user=10002:10002",
        f"--device=gmemd.example/claim={claim[2]}_ram", f"--volume={CLIENT}:/client.py:ro",
        f"--volume={WRAPPER}:/qemu-kvm:ro", "--tmpfs=/tmp", *options, f"--entrypoint={entry}", image.name,
        *words).stdout.strip()


def test_containers_of_a_claim_share_its_memory(podman: Podman, image: Image, node: Node) -> None:
    """One runs a VMM on it, another reads it, also after gmemd was killed; a container of another claim sees none."""
    claim, other = node.claim("one"), node.claim("two", namespace="team-b")
    node.kubelet.prepare(claim)
    node.kubelet.prepare(other)
    emulator = ("--env=GMEMD_QEMU=gmemd-emulator",)
    run(podman, image, claim, "sh", "-ec", VMM, "sh", json.dumps(RAM), "guest memory", options=emulator)
    assert run(podman, image, claim, "python", "/client.py", "read", "ram") == "guest memory"

    node.gmemd.kill()
    assert run(podman, image, claim, "python", "/client.py", "read", "ram") == "guest memory"

    assert run(podman, image, other, "python", "/client.py", "read", "ram") == ""
    listed = run(podman, image, other, "sh", "-c", "ls /run/gmemd-claims; gmemctl ls -o name; gmemctl ls $0 2>&1; true",
                 f"ram@{claim[2]}")
    assert listed.splitlines()[:2] == [other[2], "ram"]
    assert "not found" in listed
    node.kubelet.unprepare(claim, other)
    assert node.leftovers() == []


def test_a_guest_of_another_size_is_refused(podman: Podman, image: Image, node: Node) -> None:
    """The wrapper says so before QEMU runs, and passes on what has no memory."""
    claim = node.claim("one")
    node.kubelet.prepare(claim)
    emulator = ("--env=GMEMD_QEMU=gmemd-emulator",)
    said = run(podman, image, claim, "sh", "-c", '/qemu-kvm -object "$0" 2>&1; /qemu-kvm --version',
               json.dumps({**RAM, "size": 2 * SIZE}), options=emulator)
    assert said.splitlines()[0] == f"gmemd: the guest has {2 * SIZE} bytes of memory, and its claim {SIZE}"
    assert "QEMU emulator version" in said
    node.kubelet.unprepare(claim)
