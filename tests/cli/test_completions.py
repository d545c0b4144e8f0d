"""The completion scripts in their shells, and the manual pages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmemd.cli.connection import Connection
from gmemd.cli.gmemctl import VERBS
from gmemd.cli.manual import pages, stale
from gmemd.cli.parser import make_parser, values_of, verbs_of
from gmemd.cli.shell_scripts import script as script_of
from gmemd.cli.tab import Completion
from gmemd.cli.verbs.local import SHELLS
from gmemd.client.client import Client
from tests.cli.conftest import Gmemctl
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import ROOT, needs, output


def completion(shell: str) -> str:
    return script_of(shell, make_parser(VERBS))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_right(shell: str, tmp_path: Path) -> None:
    """The shell takes the script, which names every verb."""
    script = completion(shell)
    assert all(word in script for verb in VERBS for word in verb.split())
    if not shutil.which(shell):
        pytest.skip(f"needs {shell} to read it")
    file = tmp_path / "script"
    file.write_text(script)
    output([shell, "-n", str(file)])


def completed(shared: Daemon, tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    program = tmp_path / "gmemctl"
    program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} -m gmemd.cli.gmemctl --socket '
                       f'{shared.sock} "$@"\n')
    program.chmod(0o755)
    line = " ".join(f"'{word}'" for word in ("gmemctl", *words))
    script = f'{completion("bash")}\nPATH={tmp_path}:$PATH\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}\n_gmemctl\n' \
             'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return done.stdout.split()


@needs("bash")
@pytest.mark.parametrize(("words", "offered"), [
    (("su",), ["survive"]), (("-o", "j"), ["json"]), (("-o", "json", "ev"), ["events"]),
    (("rm", "comp"), ["comp0", "comp1"]), (("convert", "comp0", "pri"), ["private"]),
    (("rm", "--dry"), ["--dry-run"]), (("call", "query-nam"), ["query-name"]),
    (("completion", "f"), ["fish"]), (("exec", "comp0", "--", "com"), []), (("jobs", "--cancel", "compj"), ["compjob"]),
    (("events", "MEMDEV_OR"), ["MEMDEV_ORPHANED"]), (("ls", "--type", "memf"), ["memfd"]),
    (("ls", "--owner", "ro"), ["root"]),
    (("help", "ran"), ["ranges"]), (("ls", "--sort", "re"), ["resident"]),
    (("convert", "comp0", "comp1", "sha"), ["shared"]),
])
def test_bash_completes(shared: Daemon, client: Client, tmp_path: Path, words: tuple[str, ...],
                        offered: list[str]) -> None:
    for number in range(2):
        client.execute("object-add", {"qom-type": "memory-backend-ram", "id": f"comp{number}", "size": 4096})
    client.execute("memdev-verify", {"id": "comp0", "job-id": "compjob"})
    assert sorted(completed(shared, tmp_path, *words)) == offered
    while client.execute("query-jobs", timeout=PATIENCE)[0]["status"] != "concluded":
        time.sleep(0.01)
    client.execute("job-dismiss", {"id": "compjob"})


FREE = {"SPEC", "-- COMMAND", "JSON", "key=value", "N", "SECONDS", "SIZE", "PATH", "PID", "NAME", "NEW-ID", "NEW-NAME",
        "BLOCK", "FILE", "K", "MS", "URI", "NEW-ROOM", "TEXT"}


@pytest.mark.parametrize("verb", VERBS)
def test_what_verbs_take_is_offered(verb: str, client: Client) -> None:
    """Ids, jobs, commands, events, choices: whatever a verb takes that is known, in scripts and in the shell alike.

    A new kind of word is either in declared as `completes` or cannot be known, which is said here.
    """
    client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "one", "size": 4096})
    names = Connection(lambda: client, VERBS).names
    shell = Completion(Connection(lambda: client, VERBS))
    parser = verbs_of(make_parser(VERBS))[verb]
    [branch] = [line for line in completion("bash").splitlines()
                if line.strip().startswith(f"""{verb.replace(" ", "' '")}) known=""")]
    for action in parser._actions:
        if action.nargs == 0:
            continue
        known = list(values_of(action))
        assert known or action.metavar in FREE, f"{verb}: what is {action.metavar}?"
        line = f"{verb} {action.option_strings[0]} " if action.option_strings else f"{verb} "
        for word in known:
            asked = word.startswith("<")
            offered = shell.candidates(line)
            assert {f"{name} " for name in (names(word[1:-1]) if asked else [word])} <= set(offered)
            if not action.option_strings:
                assert (f"$(gmemctl completion {word[1:-1]} " if asked else word) in branch
    assert "one" in names("ids")


@needs("fish")
def test_fish_completes(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion("fish"))
    script = f'source {tmp_path}/script; complete -C "gmemctl su"; complete -C "gmemctl rm --dr"'
    shown = output(["fish", "--no-config", "-c", script],
                   env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert [line.split("\t")[0] for line in shown.splitlines()] == ["survive", "--dry-run"]


@pytest.mark.usefixtures("client")
def test_the_verb_prints_them(gmemctl: Gmemctl) -> None:
    assert gmemctl("completion", "fish").out == completion("fish")
    assert gmemctl("completion", "tcsh").status == 2


def test_manual_pages_are_up_to_date() -> None:
    """Otherwise: python -m gmemd.cli.manual --write"""
    assert stale() == []


@needs("groff")
def test_manual_pages_are_well_formed() -> None:
    for path in filter(lambda path: path.suffix != ".md", pages()):
        done = subprocess.run(["groff", "-man", "-ww", "-z", str(path)], capture_output=True, text=True, check=True)
        assert done.stderr == ""
