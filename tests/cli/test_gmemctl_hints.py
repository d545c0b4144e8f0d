"""The hint below a refusal, each caused by the mistake itself."""

from __future__ import annotations

import pytest

from gmemd.cli.hints import Refusal, hints, nearest
from gmemd.errors import QmpError
from tests.cli.conftest import Gmemctl

ADD = ["call", "object-add"]
MEMFD = [*ADD, "qom-type=memory-backend-memfd"]


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        (["call", "query-memdew"], "The command query-memdew has not been found", "did you mean 'query-memdev'?"),
        (["call", "Query_KVM"], "The command Query_KVM has not been found", "did you mean 'query-kvm'?"),
        ([*MEMFD, "id=m0"], "Parameter 'size' is missing", "give size=NUMBER"),
        ([*ADD, "id=m0"], "Parameter 'qom-type' is missing", "object-add takes: qom-type, id"),
        ([*MEMFD, "id=m0", "size=1M", "prealoc=on"], "Parameter 'prealoc' is unexpected", "did you mean 'prealloc'?"),
        (
            [*ADD, "qom-type=memory-backend-ram", "id=m0", "size=1M", "seal=on"],
            "Parameter 'seal' is unexpected",
            "'seal' belongs to: memory-backend-memfd",
        ),
        (["call", "query-kvm", "x=1"], "Parameter 'x' is unexpected", "query-kvm takes no arguments"),
        (
            [*MEMFD, "id=m0", "size=1M", "policy=strict"],
            "Parameter 'policy' does not accept value 'strict'",
            "'policy' takes one of: default, preferred, bind, interleave",
        ),
        (
            ["create", "memfd,id=m0,size=1M"],
            "Parameter 'qom-type' does not accept value 'memfd'",
            "did you mean 'memory-backend-memfd'?",
        ),
        (
            [*MEMFD, "id=m0", "size=1M", "share=perhaps"],
            "Invalid parameter type for 'share', expected: boolean",
            "'share' takes bool",
        ),
        (
            [*MEMFD[:2], '{"qom-type":"memory-backend-memfd","id":"m0","size":"1G"}'],
            "Parameter 'size' expects uint64",
            "in JSON without quotes or suffix: 1073741824",
        ),
        (
            ["create", "memory-backend-memfd,id=m0,size=lots"],
            "Parameter 'size' expects a size value",
            "bytes, or a number with a suffix: 65536, 64K, 512M, 1.5G, 2T",
        ),
        (
            ["create", "memory-backend-memfd,id=m0,size=1M,saered=on"],
            "Invalid parameter 'saered'",
            "did you mean 'share'?",
        ),
        ([*MEMFD, "id=0", "size=1M"], "Parameter 'id' expects an identifier", "a letter, then letters, digits"),
        (["rm", "rame0"], "object 'rame0' not found", "did you mean 'ram0'?"),
        (["show", "other"], "object 'other' not found", "the objects here: ram0"),
        (["call", "qom-list", "path=/objects/rm0"], "Device '/objects/rm0' not found", "did you mean 'ram0'?"),
        (
            [*MEMFD, "id=ram0", "size=1M"],
            "attempt to add duplicate property 'ram0' to object (type 'container')",
            "'gmemctl show ram0' shows the one that exists",
        ),
        (
            [*MEMFD, "id=type", "size=1M"],
            "attempt to add duplicate property 'type' to object (type 'container')",
            "'type' is taken by the server itself; choose another id",
        ),
        (
            ["call", "qom-get", "path=ram0", "property=sise"],
            "Property 'memory-backend-ram.sise' not found",
            "did you mean 'size'?",
        ),
        (
            ["call", "qom-list-properties", "typename=memory-backend-memdf"],
            "Class 'memory-backend-memdf' not found",
            "did you mean 'memory-backend-memfd'?",
        ),
        (
            [*MEMFD, "id=m0", "size=4097"],
            "m0 backing store size 0x1001 is too small for 'size' option 0x2000 plus 'offset' option 0x0",
            "size must be a multiple of the page size; the next one is 8192",
        ),
        (
            [*ADD, "qom-type=memory-backend-file", "id=m0", "size=1M", "mem-path=/no/such/file"],
            "can't open backing store /no/such/file for guest RAM: No such file or directory",
            "the daemon opens the path",
        ),
        (["jobs", "--cancel", "x"], "Job not found", "there are no jobs"),
        (["call", "memdev-populate", "id=ram0", "job-id=0"], "Invalid job ID '0'", "a letter, then letters, digits"),
        (
            ["convert", "ram0", "private"],
            "object 'ram0' is not a guest_memfd",
            "only a guest_memfd has private parts: memory-backend-memfd with guest-memfd=on creates one",
        ),
        (
            ["call", "memdev-persist", "id=ram0", "persist=on"],
            "objects are not kept: gmemd runs with --persist off, or without systemd and --keeper",
            "'gmemctl survive' says what to change",
        ),
        (["call", "getfd", "fdname=x"], "No file descriptor supplied via SCM_RIGHTS", "send one: gmemctl call --fd 3"),
        (
            [*ADD, "qom-type=memory-backend-ram", "id=m0", "size=-1073741824"],
            "cannot set up guest memory 'm0': Cannot allocate memory",
            "the host lacks memory for this size",
        ),
    ],
)
def test_hint(gmemctl: Gmemctl, words: list[str], sentence: str, hint: str) -> None:
    """QEMU's sentence stands on the first line, what helps below it."""
    gmemctl("create", "memory-backend-ram,id=ram0,size=4K")
    status, out, err = gmemctl(*words)
    assert (status, out) == (1, "")
    first, *rest = err.splitlines()
    assert first == f"gmemctl: {sentence}"
    assert any(line.startswith(f"  hint: {hint}") for line in rest), rest


def test_nothing_to_list(gmemctl: Gmemctl) -> None:
    """Without objects the hint says how to make one."""
    assert "hint: there are no objects; 'gmemctl create' creates one" in gmemctl("rm", "m0").err


def refusal(desc: str, answer: object) -> Refusal:
    def ask(command: str, arguments: object = None) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Refusal(QmpError(desc), "object-add", {}, ask)


@pytest.mark.parametrize("answer", [QmpError("no"), ConnectionResetError("gone"), None, [{}], {"x": 1}])
def test_hints_never_fail(answer: object) -> None:
    """A server that cannot be asked, or answers something else, costs the hint only."""
    for desc in ("The command x has not been found", "object 'x' not found", "Parameter 'x' is missing"):
        assert isinstance(hints(refusal(desc, answer)), list)


def test_no_hint() -> None:
    """An unknown sentence has none."""
    assert hints(refusal("internal error", None)) == []


def test_guest_memfd() -> None:
    """For a host that cannot, the error says which KVM it has."""
    found = hints(refusal("KVM does not support guest_memfd", {"enabled": False, "present": True}))
    assert found[0] == "KVM here: present true, used false"
    assert "--kernel simulated" in found[1]


def test_nearest() -> None:
    """The end of a name counts more than the distance; nothing alike, no question."""
    names = ["memory-backend-guest-memfd", "memory-backend-memfd", "memory-backend-ram"]
    assert nearest("memfd", names) == "did you mean 'memory-backend-memfd'?"
    assert nearest("memory_backend_RAM", names) == "did you mean 'memory-backend-ram'?"
    assert nearest("x", names) == ""
    assert nearest("", names) == ""


def test_hints_about_jobs(gmemctl: Gmemctl) -> None:
    """A job that is there is named, with what can be done about it."""
    gmemctl("create", "memory-backend-ram,id=ram0,size=4K")
    populate = ("call", "memdev-populate", "id=ram0", "job-id=fill")
    assert gmemctl(*populate).status == 0
    gmemctl("jobs", "-f")
    assert "hint: 'gmemctl jobs' shows it; once it has ended, 'gmemctl jobs --dismiss fill'" in gmemctl(*populate).err
    assert "hint: 'gmemctl jobs --dismiss fill' removes it" in gmemctl("jobs", "--cancel", "fill").err
    assert "hint: the jobs here: fill" in gmemctl("jobs", "--cancel", "other").err
    assert gmemctl("jobs", "--dismiss", "fill").status == 0
