"""What gmemctl shows at a terminal: a real one, tmux."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from gmemd.cli.render import LONG
from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import ROOT, needs, output
from tests.programs import gmemctl as command_line

pytestmark = [pytest.mark.e2e, needs("tmux")]

BOLD, RED = "\x1b[1m", "\x1b[1m\x1b[31m"
NUMBERS = count()
Terminal = Callable[..., str]


@pytest.fixture(scope="module")
def tmux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A tmux server with one window of 100 by 50, and how to command it."""
    sock = tmp_path_factory.mktemp("tmux") / "sock"

    def command(*words: str) -> str:
        return output(["tmux", "-S", str(sock), "-f", "/dev/null", *words])

    command("new-session", "-d", "-x", "100", "-y", "50", "-c", str(ROOT), "env PS1='$ ' TERM=tmux-256color sh")
    yield command
    command("kill-server")


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with Daemon("--lab", kernel="simulated") as daemon:
        yield daemon


@pytest.fixture
def terminal(tmux: Callable[..., str], shared: Daemon, client: Client) -> Terminal:
    """Run a gmemctl at the terminal; give the screen, escape sequences too, at the end or once `until` is there."""

    def run(*words: str, until: str = "", before: str = "", after: str = "") -> str:
        line = shlex.join(command_line("--socket", str(shared.sock), *words))
        number = next(NUMBERS)
        tmux("send-keys", "-R")  # nothing of the command before stays
        tmux("send-keys", "-l", f"clear; {before} {line} {after}; echo '<'$?-{number}'>'")
        tmux("send-keys", "Enter")
        return screen(until or f"<0-{number}>")

    def screen(until: str) -> str:
        end = time.monotonic() + PATIENCE
        while until not in (found := tmux("capture-pane", "-p", "-e", "-J")):
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found

    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 1 << 20})
    return run


def test_a_table_has_colours(terminal: Terminal) -> None:
    """The header is bold, what should not be overlooked red; what is long goes on in the next line."""
    screen = terminal("survive", "ram0")
    assert f"{BOLD}ID" in screen
    assert f"{RED}NO" in screen
    plain = _plain(terminal("survive", "ram0", after="| cat"))
    assert sorted(plain.split()) == sorted(_plain(screen).split())


def test_a_wide_table_loses_nothing(terminal: Terminal) -> None:
    """What is wider than the screen goes on in the next line, as in a pipe."""
    screen = _plain(terminal("ls", "-o", "wide"))
    assert len(max(screen.splitlines(), key=len)) > 100  # tmux joins what it has wrapped
    assert re.search(r"ram0 +memfd +memfd +simulated .* vmm-crash,vmm-replaced,client-disconnect", screen)


def test_no_colours_where_they_are_not_wanted(terminal: Terminal) -> None:
    """NO_COLOR (no-color.org), a terminal that has none, and a pipe."""
    for before, after in (("env NO_COLOR=1", ""), ("env TERM=dumb", ""), ("", "| cat")):
        screen = terminal("survive", "ram0", before=before, after=after)
        assert re.search("\x1b\\[3[1-7]m", screen) is None
        assert " NO " in _plain(screen)


def test_top_shows_one_screen_after_the_other(terminal: Terminal) -> None:
    """Each time the screen is cleared, so that there is one header on it."""
    screen = _plain(terminal("top", "-n", "2", "-d", "0.05"))
    assert screen.count("RESIDENT") == 1
    assert "1 objects" in screen


def test_jobs_have_bars(terminal: Terminal, client: Client) -> None:
    """`jobs -f` shows a job's progress until it has ended, `jobs` then that it has."""
    client.execute("x-memdev-inject", {"operation": "populate", "delay": 3000})
    client.execute("memdev-populate", {"id": "ram0", "job-id": "fill"})
    assert re.search(r"fill +━+ +0% +0.0/1.0 MiB", _plain(terminal("jobs", "-f", until="MiB")))
    followed = _plain(terminal("jobs"))
    assert re.search(r"fill +populate +concluded +━+ +100 %", followed)
    assert "MiB" not in followed
    client.execute("job-dismiss", {"id": "fill"})


def test_many_rows_are_printed_at_once(terminal: Terminal, client: Client) -> None:
    """rich would take long for a long table, which nobody reads line by line."""
    for number in range(LONG):
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": f"o{number}", "size": 4096})
    screen = terminal("ls")
    assert BOLD not in screen
    assert "ram0 " in screen


def test_a_pipe_needs_no_rich(shared: Daemon, client: Client) -> None:
    """Programs do not wait for what only people see to be loaded."""
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 4096})
    program = ("import sys; from gmemd.cli.gmemctl import main; main(sys.argv[1:]); "
               "print([name for name in sys.modules if name.startswith('rich')])")
    done = output([sys.executable, "-c", program, "--socket", str(shared.sock), "ls"])
    assert done.splitlines()[-1] == "[]"


def _plain(screen: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", screen).partition("<0-")[0]
