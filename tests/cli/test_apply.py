"""gmemctl apply: a file becomes a plan, the plan one transaction, and the same file again changes nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.cli.plan import LIVE
from gmemd.client.client import Client
from gmemd.schema.validate import Schema
from tests.cli.conftest import Gmemctl, Outcome

Apply = Any  # (text, *words) -> Outcome
MIB = 1 << 20
GUESTS = """version: 1
objects:
  - {qom-type: thread-context, id: near, node-affinity: [0]}
  - &guest {qom-type: memory-backend-memfd, id: m0, size: 2M, share: on, guest-memfd: off, host-nodes: '0',
            policy: bind, prealloc-context: near}
  - {<<: *guest, id: m1, merge: off}
clones:
  - {template: base, id: c0}
  - {template: m0, id: c1, copy: true}
"""


@pytest.fixture
def apply(gmemctl: Gmemctl, tmp_path: Path) -> Apply:
    def run(text: str, *words: str) -> Outcome:
        file = tmp_path / "file"
        file.write_text(text)
        outcome = gmemctl("apply", str(file), *words)
        return outcome._replace(err=outcome.err.replace(f"{file}: ", ""))

    return run


@pytest.fixture
def base(gmemctl: Gmemctl) -> Iterator[None]:
    """A template; afterwards nothing is left."""
    gmemctl("create", "memory-backend-memfd,id=base,size=2M")
    gmemctl("freeze", "base")
    yield
    gmemctl("rm", "--all", "--yes")


def _rows(outcome: Outcome) -> list[list[str]]:
    return [line.split(maxsplit=3) for line in outcome.out.splitlines()[1:]]


@pytest.mark.usefixtures("base")
def test_the_same_file_twice_changes_nothing(apply: Apply, client: Client) -> None:
    """A dry run shows the plan that is carried out; then nothing is to be done; then only what differs."""
    dry = apply(GUESTS, "--dry-run")
    assert client.execute("query-memdev-status", {"id": "base"}) == client.execute("query-memdev-status")
    done = apply(GUESTS)
    assert (done.status, done.err, dry.status) == (0, "", 0)
    assert dry.out.startswith(done.out)
    assert dry.out[len(done.out):].splitlines()[1:] == [
        "memory          6 MiB more", dry.out.splitlines()[-2], "node 0          6 MiB more"]
    assert [row[:2] for row in _rows(done)] == [["+", name] for name in ("near", "m0", "m1", "c0", "c1")]
    for words in ((), ("--dry-run",), ("--prune", "--dry-run")):
        assert apply(GUESTS, *words) == (0, "nothing to do\n", "")
    assert json.loads(apply(GUESTS, "-o", "json").out) == {"changes": []}
    changed = apply(GUESTS.replace("merge: off", "merge: on, dump: off"))
    assert _rows(changed) == [["~", "m1", "memfd", "merge: off -> on"], ["~", "m1", "memfd", "dump: on -> off"]]
    assert apply(GUESTS.replace("merge: off", "dump: off")).out == "nothing to do\n"


def test_a_refusal_names_what_it_is_about_and_nothing_happens(apply: Apply, client: Client) -> None:
    objects = [{"qom-type": "memory-backend-memfd", "id": "m0", "size": "2M"},
               {"qom-type": "memory-backend-ram", "id": "m1", "size": 2 * MIB}]

    def tried(*entries: dict[str, Any], clones: Any = ()) -> list[str]:
        text = json.dumps({"version": 1, "objects": entries, "clones": clones})
        done = apply(text)
        dry = apply(text, "--dry-run")
        assert (done.status, dry.status, done.err) == (1, 1, dry.err)
        return done.err.splitlines()

    assert apply(json.dumps({"version": 1, "objects": objects})).status == 0
    before = client.execute("query-memdev")
    assert tried(objects[0] | {"size": "4M", "merge": "off"}, objects[1], objects[1] | {"id": "m2"}) == [
        "gmemctl: property 'size' of object 'm0' is 2MiB, and cannot be changed to 4MiB"]
    assert tried(objects[0] | {"size": 2 * MIB + 1}) == [
        f"gmemctl: property 'size' of object 'm0' is 2MiB, and cannot be changed to {2 * MIB + 1}"]
    assert tried(objects[0] | {"hugetlb": True}) == [
        "gmemctl: property 'hugetlb' of object 'm0' is off, and cannot be changed to on"]
    assert tried(objects[1] | {"id": "m0"}, objects[0] | {"id": "m1"}) == [
        "gmemctl: object 'm0' is a memory-backend-memfd, and cannot become a memory-backend-ram",
        "gmemctl: object 'm1' is a memory-backend-ram, and cannot become a memory-backend-memfd"]
    assert tried(objects[0] | {"id": "m2"}, objects[0] | {"id": "1"}, clones=[
        {"template": "m0", "id": "c"}, {"template": "gone", "id": "d"}, {"template": "gone", "id": "m1"}]) == [
            "gmemctl: object '1': Parameter 'id' expects an identifier",
            "gmemctl: object 'c': object 'm0' is not frozen: memdev-freeze makes it a template, or use 'copy'",
            "gmemctl: object 'd': object 'gone' not found",
            "gmemctl: object 'm1' exists, and is no clone, not one of 'gone'"]
    assert client.execute("query-memdev") == before


def test_what_can_be_changed_is_changed(apply: Apply, client: Client) -> None:
    """Each property in LIVE by which types differ, to another value and to the same."""
    schema, other = Schema.load(), {"prealloc-threads": 2, "prealloc-context": "/objects/near", "cpu-affinity": [0],
                                    "node-affinity": [0]}
    own = {name: {"qom-type": name, "id": name.replace("-", "")} | (
        {} if name == "thread-context" else {"size": MIB}) | (
        {"mem-path": "/dev/shm/gmemd-apply-test"} if name == "memory-backend-file" else {}) | (
        {"share": True} if name in ("memory-backend-shm", "memory-backend-guest-memfd") else {})
        for name in schema.object_types}
    near = {"qom-type": "thread-context", "id": "near"}
    assert apply(json.dumps({"version": 1, "objects": [near, *own.values()]})).status == 0
    for name, entry in own.items():
        for live in LIVE & schema.properties(name).keys():
            entry[live] = other.get(live, not schema.properties(name)[live].default)
        entry.pop("node-affinity", None)  # either
    text = json.dumps({"version": 1, "objects": [near, *own.values()]})
    done = apply(text)
    assert (done.status, done.err) == (0, "")
    assert {row[3].partition(":")[0] for row in _rows(done)} >= LIVE - {"node-affinity", "cpu-affinity"}
    assert apply(text).out == "nothing to do\n"
    for entry in (near, own["thread-context"]):
        client.execute("object-del", {"id": entry["id"]})
    Path("/dev/shm/gmemd-apply-test").unlink(missing_ok=True)


@pytest.mark.usefixtures("base")
def test_prune_deletes_what_is_not_named(apply: Apply, gmemctl: Gmemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clones before their template, which stays with them; of our own user; and only after a yes."""
    gmemctl("create", "memory-backend-memfd,id=m0,size=2M", "thread-context,id=near")
    gmemctl("clone", "base", "c0", "c1")
    text = "version: 1\nclones: [{template: base, id: c0}]"
    assert apply(text, "--prune").err == "gmemctl: this would remove 2 objects: c1, m0; add --yes if that is right\n"
    with monkeypatch.context() as other:
        other.setattr("os.getuid", lambda: 4242)
        assert apply(text, "--prune").out == "nothing to do\n"
    without = "version: 1\nclones: [{template: base, id: c1}]\n"\
               "objects: [{qom-type: memory-backend-memfd, id: m0, size: 2M}]"
    assert apply(without, "--prune", "--dry-run", "-o", "name").out == "c0\n"
    assert _rows(apply(text, "--prune", "--yes")) == [["-", name, "memfd", "2 MiB"] for name in ("c1", "m0")]
    assert [row[1] for row in _rows(apply("version: 1", "--prune", "--yes"))] == ["c0", "base"]
    assert gmemctl("ls", "-o", "json").out == "[]\n"
    assert gmemctl("rm", "near").status == 0  # still there


_A = "version: 1\nobjects:\n- {qom-type: memory-backend-ram, id: a, size: 1M}\n"
WRONG = {
    "": "it must be an object with 'version' and 'objects'",
    "[": "line 1: expected the node content, but found '<stream end>'",
    "{": "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    '{"version": NaN}': "NaN is not a JSON number",
    '{"version": 1, "version": 1}': "'version' is there twice in one object",
    "version: 1\nversion: 1": "line 2: 'version' is there twice in one object",
    "version: 2": "'version' must be 1",
    "version: true": "'version' must be 1",
    "version: 1\nobject: []": "unknown member 'object'; did you mean 'objects'?",
    "version: 1\nobjects: {}": "'objects' must be a list",
    "version: 1\nobjects: [a]": "objects[0] must be an object",
    "version: 1\nobjects: [{}]": "line 2: objects[0]: 'id' is missing",
    "version: 1\nobjects: [{id: on}]": "line 2: objects[0]: 'id' must be a string",
    "version: 1\nobjects: [{id: a}]": "line 2: objects[0] ('a'): 'qom-type' is missing",
    _A.replace("memory-backend-ram", "ram"):
        "line 3: objects[0] ('a'): 'qom-type' does not accept 'ram'; did you mean 'memory-backend-ram'?",
    _A.replace("size", "sizes"): "line 3: objects[0] ('a'): unknown member 'sizes'; did you mean 'size'?",
    _A.replace(", size: 1M", ""): "line 3: objects[0] ('a'): Parameter 'size' is missing",
    _A.replace("1M", "1Q"): "line 3: objects[0] ('a'): Parameter 'size' expects a size value",
    _A.replace("1M", "2001-01-01"): "line 3: objects[0] ('a'): Parameter 'size' expects uint64",
    _A + "- {qom-type: memory-backend-ram, id: a, size: 1M}":
        "line 4: objects[1]: 'a' is there twice, first at line 3: objects[0]",
    _A + "clones:\n- {template: b, id: a}": "line 5: clones[0]: 'a' is there twice, first at line 3: objects[0]",
    _A + "clones:\n- {template: b, id: c, copies: on}":
        "line 5: clones[0] ('c'): unknown member 'copies'; did you mean 'copy'?",
    _A + "clones:\n- {id: c}": "line 5: clones[0] ('c'): 'template' is missing",
    _A + "clones:\n- {template: b, id: c, copy: 1}": "line 5: clones[0] ('c'): 'copy' must be true or false",
    "!!python/object:os.system a":
        "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
    "? [a, b]\n: c": "line 1: found unhashable key",
    "\x01": "unacceptable character #x0001: special characters are not allowed in \"<unicode string>\", position 0",
    "[" * 3000: "it is nested too deeply",
}


@pytest.mark.parametrize("text", WRONG, ids=map(str, range(len(WRONG))))
def test_a_wrong_file_is_refused_with_its_place(text: str, apply: Apply) -> None:
    assert apply(text) == (2, "", f"gmemctl: {WRONG[text]}\n")


def test_json_needs_no_yaml(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert apply('{"version": 1}') == (0, "nothing to do\n", "")
    assert apply("version: 1") == (2, "", "gmemctl: to read YAML, install PyYAML (pip install pyyaml); "
                                          "JSON is read without it\n")


def test_a_file_that_cannot_be_read(gmemctl: Gmemctl, tmp_path: Path) -> None:
    assert gmemctl("apply", f"{tmp_path}/none") == (1, "", f"gmemctl: {tmp_path}/none: No such file or directory\n")
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert gmemctl("apply", f"{tmp_path}/bytes").status == 2
