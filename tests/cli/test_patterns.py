"""Objects by pattern and by --all: which are meant, what is asked before, and what becomes of failures."""

from __future__ import annotations

import json
import os
import pty
import select
import time
from collections.abc import Callable

import pytest
import yaml

from gmemd.client.client import Client
from tests.cli.conftest import Gmemctl
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import gmemctl as command_line
from tests.programs import output


@pytest.fixture(autouse=True)
def objects(client: Client) -> None:
    """a, vm0, vm1 (guest_memfds), and a thread context, which is not memory."""
    for name, guest in (("vm1", True), ("a", False), ("vm0", True)):
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": 4096,
                                      **({"guest-memfd": True} if guest else {})})


def ids(client: Client) -> list[str]:
    return sorted(memdev["id"] for memdev in client.execute("query-memdev"))


@pytest.mark.parametrize(("words", "found"), [
    (["vm*"], ["vm0", "vm1"]), (["vm?", "a"], ["vm0", "vm1", "a"]), (["[!v]*"], ["a"]),
    (["[^v]*"], ["a"]), (["vm1", "vm*"], ["vm1", "vm0"]), (["--all"], ["a", "vm0", "vm1"]),
])
def test_what_is_meant(gmemctl: Gmemctl, words: list[str], found: list[str]) -> None:
    """A pattern means what it matches, sorted; every object is meant once; no pattern means what is not memory."""
    shown = json.loads(gmemctl("show", *words, "-o", "json").out)
    assert [one["id"] for one in shown] == found
    assert gmemctl("show", *words, "-o", "name").out.split() == found
    assert [line.split()[1] for line in gmemctl("show", *words).out.splitlines() if line.startswith("id ")] == found


@pytest.mark.parametrize("verb", ["show", "get-fd", "who", "ranges", "survive"])
def test_programs_get_a_list(gmemctl: Gmemctl, verb: str) -> None:
    """Whoever names one object gets what the server says of it; whoever gives a pattern a list, be it of one."""
    exact, several = (json.loads(gmemctl(verb, words, "-o", "json").out) for words in ("vm0", "vm0*"))
    assert isinstance(several, list)
    if isinstance(exact, dict):
        assert several[0] == {"id": "vm0", **exact} or verb == "get-fd"


def test_tables_say_which(gmemctl: Gmemctl) -> None:
    """Of several objects a row begins with the id."""
    assert gmemctl("ranges", "vm0").out.splitlines()[0].split()[0] == "OFFSET"
    lines = [line.split()[0] for line in gmemctl("ranges", "vm*").out.splitlines()]
    assert lines == ["ID", "vm0", "vm1"]


def test_rm_needs_a_yes(gmemctl: Gmemctl, client: Client) -> None:
    """Where nobody can be asked, --yes must say that a pattern is right; a dry run and names need none."""
    refused = gmemctl("rm", "vm*")
    assert refused == (2, "", "gmemctl: this would remove 2 objects: vm0, vm1; add --yes if that is right\n")
    assert gmemctl("rm", "vm*", "--dry-run").out.count("object-del would delete") == 2
    assert ids(client) == ["a", "vm0", "vm1"]
    assert gmemctl("rm", "vm*", "--yes") == (0, "", "")
    assert ids(client) == ["a"]
    assert gmemctl("rm", "--all", "-y") == (0, "", "")
    assert gmemctl("rm", "--all", "-y") == (0, "", "gmemctl: there are no objects\n")


def test_a_dry_run_is_one_document(gmemctl: Gmemctl) -> None:
    """For programs: several objects give one list with their ids, one object what the server says of it."""
    for words in (["rm"], ["convert", "private"]):
        verb, *to = words
        several = json.loads(gmemctl(verb, "vm*", *to, "--dry-run", "-o", "json").out)
        assert [(one["id"], one["arguments"]["id"]) for one in several] == [("vm0", "vm0"), ("vm1", "vm1")]
        assert yaml.safe_load(gmemctl(verb, "vm*", *to, "--dry-run", "-o", "yaml").out) == several
        assert {"id": "vm0", **json.loads(gmemctl(verb, "vm0", *to, "--dry-run", "-o", "json").out)} == several[0]
        assert gmemctl(verb, "vm*", *to, "--dry-run", "-o", "name").out == "vm0\nvm1\n"
    specs = [f"memory-backend-ram,id={name},size=4096" for name in ("b", "c")]
    made = json.loads(gmemctl("create", *specs, "--dry-run", "-o", "json").out)
    assert [one["arguments"]["id"] for one in made] == ["b", "c"]
    assert json.loads(gmemctl("create", specs[0], "--dry-run", "-o", "json").out) == made[0]


def test_names_of_one(gmemctl: Gmemctl) -> None:
    """-o name prints the id of one object as of several."""
    for verb in ("show", "survive", "ranges", "get-fd"):
        assert gmemctl(verb, "vm0", "-o", "name") == gmemctl(verb, "vm0*", "-o", "name") == (0, "vm0\n", "")


def test_rm_takes_what_is_not_memory_last(gmemctl: Gmemctl, client: Client) -> None:
    """A thread context is in use as long as memory refers to it."""
    client.execute("object-add", {"qom-type": "thread-context", "id": "Context"})
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "user", "size": 4096, "prealloc": True,
                                  "prealloc-context": "Context"})
    assert "5 objects: a, user, vm0, vm1, Context;" in gmemctl("rm", "--all").err
    assert gmemctl("rm", "--all", "--yes") == (0, "", "")


def test_nothing_matches(gmemctl: Gmemctl, client: Client) -> None:
    """One sentence, the status of what is not found, and a hint that is not a wall of ids."""
    for verb in ("ls", "survive", "who"):
        assert gmemctl(verb, "q*") == (
            1, "", "gmemctl: no object matches 'q*'\n  hint: the objects here: a, vm0, vm1\n")
    for number in range(10):
        client.execute("object-add", {"qom-type": "memory-backend-ram", "id": f"b{number}", "size": 4096})
    assert gmemctl("rm", "q*", "--yes").err.endswith("the objects here: a, b0, b1, b2, b3, and 8 more\n")
    assert gmemctl("rm", "b").err.endswith("did you mean b0, b1, b2, b3, b4, and 5 more? 'b*' means all of them\n")
    assert gmemctl("rm", "").err.endswith("the objects here: a, b0, b1, b2, b3, and 8 more\n")
    client.execute("object-add", {"qom-type": "thread-context", "id": "Context"})
    assert gmemctl("show", "Context").err == "gmemctl: object 'Context' not found\n  hint: 'Context' is not memory\n"


def test_failures_do_not_keep_the_others(gmemctl: Gmemctl, client: Client) -> None:
    """What can be done is done; each failure is a line, and the status says that there was one."""
    converted = gmemctl("convert", "vm1", "?", "vm0", "private", "--yes")
    assert converted.status == 1
    assert [line for line in converted.err.splitlines() if line.startswith("gmemctl")] == [
        "gmemctl: object 'a' is not a guest_memfd"]
    assert [line.partition(" became private")[0] for line in converted.out.splitlines()] == ["vm1: 4 KiB", "vm0: 4 KiB"]
    removed = gmemctl("rm", "nope", "q*", "vm*", "--yes")
    assert removed.status == 1
    assert [line for line in removed.err.splitlines() if line.startswith("gmemctl")] == [
        "gmemctl: no object matches 'q*'", "gmemctl: object 'nope' not found"]
    assert ids(client) == ["a"]


def test_words_may_stand_around_options(gmemctl: Gmemctl, client: Client) -> None:
    """As with other commands: more ids behind an option."""
    assert gmemctl("rm", "a", "--dry-run", "vm0").out.count("would delete") == 2
    for words in (["vm0", "private", "--preserve"], ["vm0", "--preserve", "private"], ["--preserve", "vm0", "private"],
                  ["--preserve", "vm0", "--offset=0", "private"]):
        assert gmemctl("convert", *words).status == 0
    assert gmemctl("convert", "--all", "shared", "--dry-run").out.count("memdev-convert") == 2


def test_exec_takes_patterns(shared: Daemon) -> None:
    """Every object that matches is handed over; without a match nothing is run."""
    done = output(command_line("--socket", str(shared.sock), "exec", "vm1=7", "vm*", "--", "echo", "{vm0.size}",
                               "{vm1.fd}"))
    assert done == "4096 7\n"
    output(command_line("--socket", str(shared.sock), "exec", "q*", "--", "true"), status=125)


def test_verify_takes_patterns(gmemctl: Gmemctl, client: Client) -> None:
    """Digests of several objects stand in one list."""
    for name in ("b0", "b1"):
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": 4096})
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
        os.pwrite(fd, b"hello", 0)
        os.close(fd)
    assert [line.split()[0] for line in gmemctl("verify", "b*").out.splitlines()] == ["ID", "b0", "b1"]
    assert [one["id"] for one in json.loads(gmemctl("verify", "b*", "-o", "json").out)] == ["b0", "b1"]


@pytest.mark.parametrize(("answer", "status", "left"), [(b"y\n", 0, ["a"]), (b"\n", 1, ["a", "vm0", "vm1"]),
                                                         (b"\x04", 1, ["a", "vm0", "vm1"])])
def test_a_person_is_asked(client: Client, shared: Daemon, answer: bytes, status: int, left: list[str]) -> None:
    """At a terminal: how many, which, and nothing happens without a yes."""
    said, ended = at_terminal(shared, ["rm", "vm*"], lambda said: answer if "[y/N]" in said else b"")
    assert "Remove 2 objects: vm0, vm1? [y/N]" in said
    assert ("nothing was changed" in said) is bool(status)
    assert (ended, ids(client)) == (status, left)


def test_the_shell_asks_too(client: Client, shared: Daemon) -> None:
    """A line of the shell is like a command line: it asks, and its --dry-run changes nothing."""
    lines = [b"rm a --dry-run\n", b"rm vm*\n", b"y\n", b"exit\n"]
    said, ended = at_terminal(shared, ["shell"],
                              lambda said: lines.pop(0) if said.endswith(("gmemctl> ", "[y/N] ")) else b"")
    assert "object-del would delete 'a'" in said
    assert (ended, ids(client)) == (0, ["a"])


def test_a_template_is_removed_after_its_clones(gmemctl: Gmemctl, client: Client) -> None:
    gmemctl("freeze", "a")
    gmemctl("clone", "a", "b", "c")
    assert gmemctl("rm", "[abc]", "--yes") == (0, "", "")
    assert ids(client) == ["vm0", "vm1"]


def at_terminal(daemon: Daemon, words: list[str], typed: Callable[[str], bytes]) -> tuple[str, int]:
    """Run gmemctl at a terminal; `typed` gives what is typed, from what was said since then; all that was said."""
    pid, fd = pty.fork()
    if pid == 0:
        argv = command_line("--socket", str(daemon.sock), *words)
        os.execve(argv[0], argv, {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null",
                                  "XDG_STATE_HOME": "/dev/null"})
    said, new, end = "", "", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            if select.select([fd], [], [], 0.05)[0]:
                new += os.read(fd, 4096).decode()
            elif answer := typed(new):
                os.write(fd, answer)
                said, new = said + new, ""
    except OSError:  # EIO: the other end has gone
        pass
    os.close(fd)
    return said + new, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
