"""Claims on a node: what the kubelet gets, what a container finds, and that nothing is left.

The node of most tests is one, with one driver; each test has a claim of its own and leaves nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.kubelet import Kubelet, Refused
from tests.kubernetes.node import DRIVER, NODE, PAGES, Claim, Node
from tests.patience import wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(server: ApiServer) -> Iterator[Node]:
    with Node(server) as node:
        node.start()
        node.wait_published()
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which nothing is left in the end."""
    yield shared
    wait_for(lambda: shared.leftovers() == [])  # a driver that starts has an object of its own for a moment
    assert shared.kubelet.prepared() == {}


def touch(client: Client, name: str, data: bytes) -> bytes:
    """What is at the beginning of an object now; then write there."""
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    try:
        with mmap.mmap(fd, len(data)) as view:
            before = view[:]
            view[:] = data
    finally:
        os.close(fd)
    return before


def mounted(node: Node, claim: Claim, request: str) -> dict[str, Path]:
    """What a container with that request gets: the host's paths by those inside. Its environment is checked."""
    [device] = [one for one in node.specification(claim)["devices"] if one["name"] == f"{claim[2]}_{request}"]
    edits = device["containerEdits"]
    assert edits["env"] == [f"GMEMD_SOCKET=/run/gmemd-claims/{claim[2]}/qmp.sock"]
    assert all("ro" in mount["options"] for mount in edits["mounts"])
    return {mount["containerPath"]: Path(mount["hostPath"]) for mount in edits["mounts"]}


def test_prepared_and_released(node: Node) -> None:
    """A claim of two requests: two objects at one socket, each once however often it is prepared."""
    claim = node.claim("c1", {"request": "ram", "consumedCapacity": {"memory": "4Mi"}}, {"request": "spare"})
    for _ in range(2):
        devices = node.kubelet.prepare(claim)[claim[2]]
        assert devices == [{"requests": [request], "pool": NODE, "device": PAGES,
                            "cdi": [f"gmemd.example/claim={claim[2]}_{request}"]} for request in ("ram", "spare")]
        assert node.objects() == {f"ram@{claim[2]}": 4 * MIB, f"spare@{claim[2]}": 2 * MIB}
        assert node.rooms()[claim[2]]["namespace"] == "team-a"
    with node.inside(claim) as client:
        assert {one["id"] for one in client.execute("query-memdev")} == {"ram", "spare"}
        assert touch(client, "ram", b"written") == bytes(7)
        with pytest.raises(QmpError):
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "more", "size": MIB})
    for _ in range(2):
        node.kubelet.unprepare(claim)
        assert node.leftovers() == []
    assert node.conditions(claim) == []


def test_what_a_container_finds(node: Node) -> None:
    """The socket's directory, and the device metadata of its request only, in both versions, newest first."""
    claim = node.claim("c2", {"request": "ram/small"}, {"request": "other"})
    node.kubelet.prepare(claim)
    mounts = mounted(node, claim, "ram")
    inside = f"/run/gmemd-claims/{claim[2]}"
    told = f"/var/run/kubernetes.io/dra-device-attributes/resourceclaims/c2/ram/{DRIVER}-metadata.json"
    assert mounts.keys() == {inside, told}
    assert (mounts[inside] / "qmp.sock").is_socket()
    decoder = json.JSONDecoder()
    text = mounts[told].read_text()
    newest, end = decoder.raw_decode(text)
    older, _ = decoder.raw_decode(text[end:].lstrip())
    assert (newest["apiVersion"], older["apiVersion"]) == (
        "metadata.resource.k8s.io/v1beta1", "metadata.resource.k8s.io/v1alpha1")
    assert newest == {
        "kind": "DeviceMetadata", "apiVersion": newest["apiVersion"],
        "metadata": {"name": "c2", "namespace": "team-a", "uid": claim[2], "generation": 1},
        "requests": [{"name": "ram/small", "devices": [{"driver": DRIVER, "pool": NODE, "name": PAGES, "attributes": {
            "socket": {"string": f"{inside}/qmp.sock"}, "id": {"string": "ram.small"}, "size": {"int": 2 * MIB},
            "pageSize": {"string": "4Ki"}, "type": {"string": "memfd"},
            "resource.kubernetes.io/numaNode": {"int": 0}}}]}]}
    node.kubelet.unprepare(claim)


def test_a_claim_of_a_template(node: Node) -> None:
    """Its metadata is where the pod's own name for the claim says."""
    claim = node.claim("pod-memory-x2b", annotations={"resource.kubernetes.io/pod-claim-name": "memory"})
    node.kubelet.prepare(claim)
    told = f"/var/run/kubernetes.io/dra-device-attributes/resourceclaimtemplates/memory/ram/{DRIVER}-metadata.json"
    assert json.loads(mounted(node, claim, "ram")[told].read_text().partition("\n}\n")[0] + "}")[
        "podClaimName"] == "memory"
    node.kubelet.unprepare(claim)


def test_another_claim_sees_nothing(node: Node) -> None:
    """Two claims, the same request: neither finds the other's object, by any name."""
    first, second = node.claim("c3"), node.claim("c4", namespace="team-b")
    node.kubelet.prepare(first, second)
    with node.inside(first) as one, node.inside(second) as other:
        touch(one, "ram", b"secret!")
        assert touch(other, "ram", b"another") == bytes(7)
        for name in (f"ram@{first[2]}", f"ram@{second[2]}"):
            with pytest.raises(QmpError, match="not found"):
                other.execute("memdev-get-fd", {"id": name})
    node.kubelet.unprepare(first)
    with node.inside(second) as other:
        assert touch(other, "ram", b"another") == b"another"
    node.kubelet.unprepare(second)


def test_kept_until_the_claim_is_deleted(node: Node) -> None:
    """A later pod gets the same bytes; when the claim is gone, so is the memory."""
    claim = node.claim("c5", parameters={"onRelease": "keep"})
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        touch(client, "ram", b"written")
    node.kubelet.unprepare(claim)
    assert list(node.objects()) == [f"ram@{claim[2]}"]
    assert list(node.cdi.iterdir()) == []
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        assert touch(client, "ram", b"written") == b"written"
    node.kubelet.unprepare(claim)
    node.api.remove("resourceclaims", "c5", "team-a")
    node.stop(node.drivers[-1])
    node.start()
    wait_for(lambda: node.leftovers() == [])


def test_a_kept_claim_that_is_allocated_again(node: Node) -> None:
    """With another size it is refused, and says how to get on; the memory stays."""
    claim = node.claim("c6", parameters={"onRelease": "keep"})
    node.kubelet.prepare(claim)
    node.kubelet.unprepare(claim)
    body = node.api.find("resourceclaims", "c6", "team-a")
    assert body is not None
    body["status"]["allocation"]["devices"]["results"][0]["consumedCapacity"] = {"memory": "8Mi"}
    node.api.put("resourceclaims", body)
    with pytest.raises(Refused, match="keeps memory of an earlier allocation"):
        node.kubelet.prepare(claim)
    assert node.objects() == {f"ram@{claim[2]}": 2 * MIB}
    node.api.remove("resourceclaims", "c6", "team-a")
    node.stop(node.drivers[-1])
    node.start()
    wait_for(lambda: node.leftovers() == [])


def test_never_deleted_while_mapped(node: Node) -> None:
    """The kubelet is told by whom, and asks again."""
    claim = node.claim("c7")
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram"})
    view = mmap.mmap(fd, MIB)
    os.close(fd)
    with pytest.raises(Refused, match=rf"'ram@{claim[2]}' is still mapped by process {os.getpid()} \("):
        node.kubelet.unprepare(claim)
    assert list(node.objects()) == [f"ram@{claim[2]}"]
    view.close()
    node.kubelet.unprepare(claim)


@pytest.mark.parametrize(("parameters", "words"), [
    ({"size": "1Gi"}, "the claim's parameters: Parameter 'size' is unexpected"),
    ({"type": "ram"}, "the claim's parameters: Parameter 'type' does not accept value 'ram'"),
    ({"prealloc": "yes"}, "the claim's parameters: Invalid parameter type for 'prealloc', expected: boolean"),
    ({"hugePages": "2Mi"}, f"the claim asks for pages of 2Mi, and device '{PAGES}' has pages of 4Ki"),
    ({"restore": "x", "clone": "y"}, "'restore' and 'clone' exclude each other"),
    ({"restore": "nothing"}, "snapshot 'team-a.nothing' not found"),
])
def test_refused(node: Node, parameters: dict[str, Any], words: str) -> None:
    """In the kubelet's answer and in the claim's status; once it is right, the status says so, too."""
    claim = node.claim("c8", parameters=parameters)
    with pytest.raises(Refused) as refused:
        node.kubelet.prepare(claim)
    assert str(refused.value) == words
    assert node.conditions(claim) == [(PAGES, "False", words)]
    assert node.leftovers() == []
    body = node.api.find("resourceclaims", "c8", "team-a")
    assert body is not None
    body["status"]["allocation"]["devices"]["config"] = []
    node.api.put("resourceclaims", body)
    node.kubelet.prepare(claim)
    assert node.conditions(claim) == [(PAGES, "True", "the memory is there")]
    node.kubelet.unprepare(claim)


def test_the_class_first_then_the_claim(node: Node) -> None:
    """A claim's parameters replace those of its class, member by member."""
    claim = node.claim("c9", parameters={"type": "guest-memfd"}, of_class={"type": "memfd", "prealloc": True})
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        assert client.execute("qom-get", {"path": "/objects/ram", "property": "type"}) == "memory-backend-guest-memfd"
        assert client.execute("qom-get", {"path": "/objects/ram", "property": "prealloc"}) is True
    node.kubelet.unprepare(claim)


def test_what_is_not_for_us(node: Node) -> None:
    """Another driver's results are not ours; a claim that was replaced, is not allocated, or is unknown, is refused."""
    claim = node.claim("c10", {"request": "ram"}, {"request": "gpu", "driver": "gpu.example.com", "pool": "p"},
                       {"request": "far", "pool": "node2"})
    assert [one["requests"] for one in node.kubelet.prepare(claim)[claim[2]]] == [["ram"]]
    node.kubelet.unprepare(claim)
    with pytest.raises(Refused, match="there is no claim 'team-a/c10' with the uid other"):
        node.kubelet.prepare(("team-a", "c10", "other"))
    node.kubelet.unprepare(("team-a", "c10", "other"))
    body = node.api.find("resourceclaims", "c10", "team-a")
    assert body is not None
    node.api.put("resourceclaims", {**body, "status": {}})
    with pytest.raises(Refused, match="claim 'team-a/c10' is not allocated"):
        node.kubelet.prepare(claim)
    with pytest.raises(Refused, match=r"'\.\./x' is not the uid of a claim"):
        node.kubelet.unprepare(("team-a", "c10", "../x"))


def test_snapshot_on_release(node: Node) -> None:
    """Saved under the claim's name, then deleted; a claim of that namespace can begin with it."""
    for data in (b"written", b"changed"):
        claim = node.claim("c11", parameters={"onRelease": "snapshot"})
        node.kubelet.prepare(claim)
        with node.inside(claim) as client:
            touch(client, "ram", data)
        node.kubelet.unprepare(claim)
        assert node.leftovers() == []
    claim = node.claim("c12", parameters={"restore": "c11.ram"})
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        assert touch(client, "ram", b"changed") == b"changed"
    node.kubelet.unprepare(claim)
    small = node.claim("c13", {"request": "ram", "consumedCapacity": {"memory": "1Mi"}},
                       parameters={"restore": "c11.ram"})
    with pytest.raises(Refused, match=r"the memory of 'team-a\.c11\.ram' has 2097152 bytes, and the claim has 1048576"):
        node.kubelet.prepare(small)
    node.kubelet.unprepare(small)
    foreign = node.claim("c14", parameters={"restore": "c11.ram"}, namespace="team-b")
    with pytest.raises(Refused, match=r"'team-b\.c11\.ram' not found"):
        node.kubelet.prepare(foreign)
    node.kubelet.unprepare(foreign)


def test_clone_and_copy(node: Node) -> None:
    """A class names any object of the house, a claim those of its namespace; a template stays when its clone goes."""
    with node.gmemd.client() as client:
        for name in ("base", "team-a.own"):
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": 2 * MIB})
            touch(client, name, name.encode())
        client.execute("memdev-freeze", {"id": "base"})
    claim = node.claim("c17", of_class={"clone": "base"})
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram"})
        with mmap.mmap(fd, MIB, mmap.MAP_PRIVATE) as view:
            assert view[:4] == b"base"
            os.close(fd)
            node.kubelet.unprepare(claim)
    for given, data in (({"of_class": {"copy": "base"}}, b"base"), ({"parameters": {"copy": "own"}}, b"team-a.own")):
        claim = node.claim("c17", **given)
        node.kubelet.prepare(claim)
        with node.inside(claim) as client:
            assert touch(client, "ram", b"changed---") == data.ljust(10, b"\0")
        node.kubelet.unprepare(claim)
    foreign = node.claim("c18", parameters={"copy": "base"})
    with pytest.raises(Refused, match=r"object 'team-a\.base' not found"):
        node.kubelet.prepare(foreign)
    node.kubelet.unprepare(foreign)
    with node.gmemd.client() as client:
        for name in ("base", "team-a.own"):
            client.execute("object-del", {"id": name})


def test_an_older_kubelet(node: Node) -> None:
    """One that speaks v1beta1 only gets the same."""
    older = Kubelet(node.directory, ("v1beta1",))
    assert older.register() == [DRIVER]
    claim = node.claim("c15")
    assert [one["requests"] for one in older.prepare(claim)[claim[2]]] == [["ram"]]
    older.unprepare(claim)


def test_gmemd_is_restarted(node: Node) -> None:
    """The claim's socket is there again with the same memory; the driver needs no new attempt."""
    claim = node.claim("c16")
    node.kubelet.prepare(claim)
    with node.inside(claim) as client:
        touch(client, "ram", b"written")
    node.gmemd.crash()
    with node.inside(claim) as client:
        assert touch(client, "ram", b"written") == b"written"
    node.kubelet.unprepare(claim)


def test_the_socket_is_removed(node: Node) -> None:
    """It is said, and a restarted gmemd has it again."""
    claim = node.claim("c19")
    node.kubelet.prepare(claim)
    (node.claims / claim[2] / "qmp.sock").unlink()
    with pytest.raises(Refused, match=r"the socket in .* was removed"):
        node.kubelet.prepare(claim)
    node.gmemd.crash()
    node.kubelet.prepare(claim)
    node.inside(claim).close()
    node.kubelet.unprepare(claim)


def test_no_link_is_followed(node: Node) -> None:
    """The directory is gmemd's, and the driver may be root."""
    claim = node.claim("c20")
    node.kubelet.prepare(claim)
    target = node.directory / "somebody-elses"
    target.write_text("as it was")
    (node.claims / claim[2] / ".ram-metadata.json.new").symlink_to(target)
    node.kubelet.prepare(claim)
    assert target.read_text() == "as it was"
    node.kubelet.unprepare(claim)
    (node.claims / claim[2]).symlink_to(node.directory)
    with pytest.raises(Refused, match="Not a directory"):
        node.kubelet.prepare(claim)
    (node.claims / claim[2]).unlink()


def test_policy(api: ApiServer, tmp_path: Path) -> None:
    """Limits are the namespace's; a driver that may no longer look at rooms does not say that they are gone."""
    policy = tmp_path / "policy.toml"

    def write(role: str) -> None:
        policy.write_text(f"""
version = 1
[[rule]]
name = "driver"
match = {{ uid = {os.getuid()} }}
role = "{role}"
paths = ["/"]
[[rule]]
name = "teams"
match = {{ namespace = "team-*" }}
role = "member"
limits = {{ bytes = "3MiB" }}
""")

    write("operator")
    with Node(api, daemon=("--policy", str(policy))) as node:
        node.start()
        claim = node.claim()
        node.kubelet.prepare(claim)
        for namespace, words in (("team-a", "the quota of 'bytes' is 3145728"),
                                 ("others", "the policy lets namespace 'others' have nothing")):
            other = node.claim("c2", namespace=namespace)
            with pytest.raises(Refused, match=words):
                node.kubelet.prepare(other)
            node.kubelet.unprepare(other)
        write("observer")
        os.kill(node.gmemd.daemon(), signal.SIGHUP)
        with pytest.raises(Refused, match="disabled by policy"):
            wait_for(lambda: node.kubelet.unprepare(claim))
        assert (node.claims / claim[2] / "qmp.sock").is_socket()
        write("operator")
        os.kill(node.gmemd.daemon(), signal.SIGHUP)
        wait_for(lambda: released(node, claim))
        assert node.leftovers() == []


def released(node: Node, claim: Claim) -> bool:
    """Whether the driver could release a claim."""
    try:
        node.kubelet.unprepare(claim)
    except Refused:
        return False
    return True


def test_rolling_update(api: ApiServer) -> None:
    """The new pod's driver is there before the old one ends; what one has prepared the other releases."""
    with Node(api) as node:
        old, new = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
        first = node.start("--pod-uid", old)
        claim = node.claim()
        node.kubelet.prepare(claim)
        with node.inside(claim) as client:
            touch(client, "ram", b"written")
            second = node.launch("--pod-uid", new)
            node.kubelet.register(2)
            assert node.stop(first) == 0
            assert [path.name for path in (node.directory / "plugins_registry").iterdir()] == [
                f"{DRIVER}-{new}-reg.sock"]
            node.kubelet.endpoints.clear()
            node.kubelet.register()
            node.kubelet.prepare(claim)
            assert touch(client, "ram", b"written") == b"written"
        second.kill()
        second.wait()
        node.start("--pod-uid", old)  # which removes the dead one's sockets
        assert len(list((node.directory / "plugins_registry").iterdir())) == 1
        node.kubelet.unprepare(claim)
        assert node.leftovers() == []
