"""gmemctl snapshot, against a running daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gmemd.cli.verbs.snapshots import to_prune
from gmemd.client.client import Client
from tests.cli.conftest import Gmemctl


@pytest.fixture
def saved(gmemctl: Gmemctl, client: Client) -> Gmemctl:
    """With the object ram0, in which there is a word, saved as `clean`."""
    assert gmemctl("create", "memory-backend-memfd,id=ram0,size=1M").status == 0
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram0"})
    os.pwrite(fd, b"word", 0)
    os.close(fd)
    assert "clean" in gmemctl("snapshot", "save", "ram0", "clean").out
    return gmemctl


def test_the_life_of_a_snapshot(saved: Gmemctl, client: Client) -> None:
    """save, ls, show, verify, restore, rm: each says what is so."""
    header, row = saved("snapshot", "ls").out.splitlines()
    assert header.split() == ["NAME", "OBJECT", "SIZE", "ON", "DISK", "STORED", "CONSISTENT", "CREATED"]
    assert row.split()[:4] == ["clean", "ram0", "1", "MiB"]
    assert "generation" in saved("snapshot", "show", "clean").out
    assert saved("snapshot", "verify", "clean").out == "clean: intact\n"
    assert saved("snapshot", "restore", "clean").status == 1
    assert "ram1" in saved("snapshot", "restore", "clean", "--id", "ram1").out
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram1"})
    assert os.pread(fd, 4, 0) == b"word"
    os.close(fd)
    assert saved("snapshot", "rm", "clean") == (0, "", "")
    assert json.loads(saved("snapshot", "ls", "-o", "json").out) == []
    assert json.loads(saved("jobs", "-o", "json").out) == []


def test_a_dry_run_says_what_and_how_long(saved: Gmemctl) -> None:
    said = saved("snapshot", "save", "ram0", "later", "--dry-run").out
    assert said.startswith("memdev-snapshot would save 'ram0' as 'later': write up to 4096 bytes of ")
    assert "in about " in said
    for words in (("restore", "clean", "--id", "x"), ("rm", "clean"), ("flatten", "clean", "--cold"),
                  ("prune", "--keep", "0")):
        assert saved("snapshot", *words, "--dry-run").status == 0
    assert saved("snapshot", "ls", "-o", "name").out == "clean\n"


def test_what_is_wrong_is_explained(saved: Gmemctl) -> None:
    """With what there is, and what to do."""
    missing = saved("snapshot", "show", "claen")
    assert missing.status == 1
    assert "did you mean 'clean'?" in missing.err
    again = saved("snapshot", "save", "ram0", "clean")
    assert (again.status, "gmemctl snapshot rm clean" in again.err) == (1, True)
    both = saved("snapshot", "verify", "no", "clean")
    assert (both.status, both.out) == (1, "clean: intact\n")


def test_in_a_directory_of_ours(saved: Gmemctl, tmp_path: Path) -> None:
    here = ("--dir", str(tmp_path))
    assert saved("snapshot", "save", "ram0", "mine", *here).status == 0
    assert os.listdir(tmp_path) == ["mine"]
    assert saved("snapshot", "ls", "-o", "name", *here).out == "mine\n"
    assert saved("snapshot", "verify", "mine", *here).status == 0
    assert saved("snapshot", "rm", "mine", *here).status == 0
    assert saved("snapshot", "ls", "--dir", str(tmp_path / "no")).status == 1


def test_of_what_is_in_a_room(saved: Gmemctl, client: Client) -> None:
    """As of any object: the job that does it is in the room, too."""
    assert saved("room", "add", "r").status == 0
    for words in (("snapshot", "restore", "clean", "--id", "ram@r"), ("snapshot", "save", "ram@r", "again"),
                  ("verify", "ram@r"), ("clone", "ram@r", "copy@r", "--copy"), ("clone", "ram0", "other@r", "--copy")):
        answer = saved(*words)
        assert (answer.status, answer.err) == (0, ""), words
    assert {one["id"] for one in client.execute("query-memdev")} == {"ram0", "ram@r", "copy@r", "other@r"}
    assert client.execute("query-jobs") == []


def entry(name: str, owner: str, *children: str, problem: str = "") -> dict[str, object]:
    if problem:
        return {"name": name, "bytes": 0, "problem": problem}
    return {"name": name, "object": {"id": owner}, **({"children": list(children)} if children else {})}


@pytest.mark.parametrize(("found", "keep", "old", "needed"), [
    ([], 1, [], {}),
    ([entry("a", "m"), entry("b", "m"), entry("c", "n")], 1, ["a"], {}),
    ([entry("a", "m"), entry("b", "m")], 0, ["a", "b"], {}),
    ([entry("a", "m", "c"), entry("b", "m"), entry("c", "m")], 1, ["b"], {"a": "c"}),
    ([entry("a", "m", "b"), entry("b", "m"), entry("c", "m")], 1, ["b", "a"], {}),
    ([entry("x", "", problem="damaged"), entry("a", "m")], 1, [], {}),
    ([entry("a", "m")], 5, [], {}),
])
def test_what_prune_removes(found: list[dict[str, object]], keep: int, old: list[str], needed: dict[str, str]) -> None:
    """The oldest of each object; nothing that a snapshot which stays needs, and a delta before what it needs."""
    assert to_prune(found, keep) == (old, needed)


def test_prune(saved: Gmemctl) -> None:
    assert saved("snapshot", "save", "ram0", "later").status == 0
    assert saved("snapshot", "prune", "--keep", "1").status == 2
    assert saved("snapshot", "prune", "--keep", "1", "--yes").status == 0
    assert saved("snapshot", "ls", "-o", "name").out == "later\n"
    assert "nothing to remove" in saved("snapshot", "prune", "--keep", "1").err
