"""The keeper as a process, with a toy daemon as its child: what systemd does, it does."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.keeper.keeper import Keeper
from gmemd.keeper.options import Options, parse
from tests.patience import PATIENCE

TOY = str(Path(__file__).with_name("toy.py"))
ROOT = str(Path(__file__).parents[2])
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Kept:
    """A keeper with its toy."""

    def __init__(self, directory: Path, *options: str, how: str = "", command: list[str] | None = None) -> None:
        self.path = str(directory / "sock")
        toy = command or [sys.executable, "-S", TOY, str(directory / "registry"), how]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-m", "gmemd.keeper.keeper", "--listen", self.path, "--restart-delay", "0",
             *options, "--exec", *toy],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}, text=True,
        )  # fmt: skip
        self.connection: socket.socket | None = None

    def line(self, stream: str, wanted: str) -> str:
        """The next line of the toy's output, or of the keeper's log, that holds this."""
        pipe = getattr(self.process, stream)
        for line in pipe:
            if wanted in line:
                return str(line)
        raise AssertionError(f"{stream} ended without '{wanted}'")

    def ready(self) -> int:
        """Wait for the next start of the toy; its pid."""
        return int(self.line("stdout", "ready").split()[1])

    def send(self, do: str, **arguments: Any) -> None:
        if self.connection is None:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.settimeout(PATIENCE)
            self.connection.connect(self.path)
        self.connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Let the toy do something; its answer."""
        self.send(do, **arguments)
        assert self.connection is not None
        answer = b""
        while not answer.endswith(b"\n"):
            part = self.connection.recv(1 << 16)
            assert part, "the toy is gone"
            answer += part
        return json.loads(answer)

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def kill(self, pid: int, number: int = signal.SIGKILL) -> int:
        """Kill the toy and wait for the next one."""
        self.disconnect()
        os.kill(pid, number)
        return self.ready()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.disconnect()
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.disconnect()
        if self.process.poll() is None:
            self.end()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


Start = Callable[..., Kept]


@pytest.fixture
def start(no_fd_is_left: None, tmp_path: Path) -> Iterator[Start]:
    started: list[Kept] = []

    def start(*options: str, **more: Any) -> Kept:
        started.append(Kept(tmp_path, *options, **more))
        return started[-1]

    yield start
    for kept in started:
        kept.close()


class TestHandedDown:
    def test_environment(self, start: Start) -> None:
        """As systemd gives it, and nothing more: no fd besides the named ones."""
        kept = start("--fdstore-max", "7", "--watchdog", "60")
        pid = kept.ready()
        info = kept("info")
        assert info["environ"] == {
            "LISTEN_PID": str(pid), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "qmp", "FDSTORE": "7",
            "WATCHDOG_PID": str(pid), "WATCHDOG_USEC": "60000000",
        }  # fmt: skip
        assert info["watchdog"] == 60
        assert info["fds"] == ["0", "1", "2", "3", "4"]  # 4 is the listing itself
        assert info["session"] == pid

    def test_sockets(self, start: Start) -> None:
        """Whoever may use the memory may connect; only the daemon's user may speak to the keeper."""
        kept = start("--listen-mode", "0620", "--listen-group", str(os.getgid()))
        kept.ready()
        assert stat.S_IMODE(os.stat(kept.path).st_mode) == 0o620
        assert stat.S_IMODE(os.stat(kept.path + ".notify").st_mode) == 0o600
        assert kept.end() == 0
        assert not os.path.exists(kept.path)
        assert not os.path.exists(kept.path + ".notify")

    def test_newest_first(self, start: Start) -> None:
        kept = start()
        pid = kept.ready()
        for id_ in "abc":
            kept("add", id=id_)
        kept.kill(pid)
        names = kept("info")["environ"]["LISTEN_FDNAMES"].split(":")
        assert names[0] == "qmp"
        assert [name.rpartition("-")[2] for name in names[1:]] == ["3", "2", "1"]


class TestRestart:
    def test_memory_outlives_the_daemon(self, start: Start) -> None:
        """Killed, stopped, ended by itself: it comes back with what it had."""
        kept = start()
        pid = kept.ready()
        kept("add", id="a", text="here")
        pid = kept.kill(pid)
        pid = kept.kill(pid, signal.SIGTERM)
        for status in (0, 3):
            kept.send("exit", status=status)
            kept.disconnect()
            assert kept.ready() != pid
        assert kept("read", id="a") == "here"
        kept("remove", id="a")
        kept.send("exit", status=0)
        kept.disconnect()
        kept.ready()
        assert kept("info")["objects"] == []
        assert kept.end() == 0

    def test_clients_wait_while_it_is_away(self, start: Start) -> None:
        """The socket is the keeper's: a connection made meanwhile is served by the next daemon."""
        kept = start()
        pid = kept.ready()
        kept("info")  # the toy serves one client at a time, and that is this one
        first, kept.connection = kept.connection, None
        kept.send("info")
        os.kill(pid, signal.SIGKILL)
        assert first is not None
        first.close()
        assert kept.connection is not None
        assert b'"pid"' in kept.connection.recv(4096)

    def test_many_objects(self, start: Start) -> None:
        kept = start()
        pid = kept.ready()
        kept("add", id="m", text="x", count=1000)
        assert "at most 1024" in kept("add", id="n", count=100)["error"]
        kept.kill(pid)
        assert len(kept("info")["objects"]) == 1000
        assert kept("read", id="m999") == "x"

    def test_first_start_that_fails_ends_the_keeper(self, start: Start) -> None:
        """A wrong option is seen at once; there is nothing to lose."""
        kept = start(how="3")
        assert kept.process.wait(PATIENCE) == 3
        assert "ended with status 3 before it was ready" in kept.line("stderr", "ended")

    def test_no_such_program(self, start: Start) -> None:
        kept = start(command=["/none/gmemd"])
        assert kept.process.wait(PATIENCE) == 203
        assert "cannot start /none/gmemd: [Errno 2]" in kept.line("stderr", "cannot")

    def test_later_start_that_fails_is_tried_again(self, start: Start, tmp_path: Path) -> None:
        """A daemon that was ready once is never given up, and what it left is held."""
        flag = tmp_path / "fail"
        program = f'test -e {flag} && exit 4; exec {sys.executable} -S {TOY} {tmp_path / "registry"}'
        kept = start(command=["/bin/sh", "-c", program])
        pid = kept.ready()
        kept("add", id="a", text="here")
        flag.touch()
        kept.disconnect()
        os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            assert "1 fds held" in kept.line("stderr", "ended with status 4")
        flag.unlink()
        kept.ready()
        assert kept("read", id="a") == "here"

    def test_too_many_names(self, start: Start) -> None:
        """As under systemd no daemon starts any more; the memory is held until somebody decides."""
        kept = start()
        kept.ready()
        kept("store_names", length=250, count=600)
        kept.send("exit", status=0)
        kept.disconnect()
        assert "Argument list too long" in kept.line("stderr", "cannot start")
        assert "600 fds held" in kept.line("stderr", "ended with status 203")

    @pytest.mark.parametrize(
        ("ready", "lived", "delays"),
        [(True, 1.0, [0.0, 0.0]), (True, 0.9, [0.1, 0.1]), (False, 9.0, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])],
    )
    def test_delays(self, ready: bool, lived: float, delays: list[float]) -> None:
        """Steady service: at once; short: RestartSec=; failing starts: ever later, indefinitely."""
        keeper = Keeper(Options(["none"]))
        keeper.was_ready = ready
        assert [keeper.delay(lived) for _ in delays] == pytest.approx(delays)
        keeper.was_ready = True
        keeper.delay(9.0)
        keeper.was_ready = False
        assert keeper.delay(9.0) == pytest.approx(0.1)
        keeper.close()


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_end(self, start: Start, number: int) -> None:
        """The daemon is told first; its clean end is ours."""
        kept = start()
        pid = kept.ready()
        assert kept.end(number) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_daemon_that_does_not_end(self, start: Start) -> None:
        kept = start("--stop-timeout", "0.05")
        kept.ready()
        kept("ignore_sigterm")
        assert kept.end() == 128 + signal.SIGKILL
        assert kept.line("stderr", "does not end: killed")

    def test_end_while_waiting_for_the_next_start(self, start: Start, tmp_path: Path) -> None:
        kept = start("--restart-delay", "1000")
        pid = kept.ready()
        os.kill(pid, signal.SIGKILL)
        kept.line("stderr", "next start in 1000 s")
        assert kept.end() == 0

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2])
    def test_passed_on(self, start: Start, number: int) -> None:
        kept = start()
        kept.ready()
        kept.send("wait_signal")
        kept.process.send_signal(number)
        assert kept.connection is not None
        assert json.loads(kept.connection.recv(100)) == number


class TestWatchdog:
    def test_hanging_daemon_is_replaced(self, start: Start) -> None:
        kept = start("--watchdog", "0.5")
        kept.ready()
        kept("add", id="a", text="here")
        kept.send("hang")
        kept.disconnect()
        assert kept.line("stderr", "watchdog time-out of 0.5 s: the daemon is aborted")
        kept.ready()
        assert kept("read", id="a") == "here"

    def test_stopped_daemon_is_killed(self, start: Start) -> None:
        """SIGABRT does nothing to it, SIGKILL does."""
        kept = start("--abort-timeout", "0.02", "--watchdog", "0.5")
        pid = kept.ready()
        kept.disconnect()
        os.kill(pid, signal.SIGSTOP)
        assert kept.ready() != pid

    def test_daemon_that_never_gets_ready(self, start: Start) -> None:
        kept = start("--start-timeout", "0.02", how="never-ready")
        assert kept.line("stderr", "start time-out of 0.02 s")
        assert kept.line("stderr", "was killed by signal 6")
        assert kept.line("stderr", "start time-out of 0.02 s")
        kept.end()


class TestMessages:
    def test_overflow_is_silent(self, start: Start) -> None:
        """The daemon that counts is told the limit; the one that does not loses."""
        kept = start("--fdstore-max", "2")
        kept.ready()
        kept("add", id="a", count=2)
        assert "at most 2" in kept("add", id="b")["error"]
        kept("notify", text="FDSTORE=1\nFDNAME=more", memory=1)
        assert "the store is full with 2 fds, 'more' is not kept" in kept.line("stderr", "full")

    def test_only_the_daemon_is_heard(self, start: Start) -> None:
        kept = start()
        kept.ready()
        kept("child_notifies", text="READY=1")
        assert kept.line("stderr", "which is not the daemon, is ignored")

    def test_rubbish(self, start: Start) -> None:
        """A daemon gone mad does no harm to what it stored."""
        kept = start()
        pid = kept.ready()
        kept("add", id="a", text="here")
        for text in (
            *("", "\0" * 4096, "FDSTOREREMOVE=1", "FDSTORE=1", "WATCHDOG_USEC=0", "WATCHDOG=trigger"),
            *("WATCHDOG_USEC=" + "9" * 4000, f"MAINPID={pid}", "READY=1\nREADY=0"),
        ):
            kept("notify", text=text, memory=2)
        kept.kill(pid)
        assert kept("read", id="a") == "here"
        assert kept("info")["unclaimed"] == ["stored", "stored"]

    def test_fds_of_ignored_messages_are_closed(self, start: Start) -> None:
        kept = start()
        kept.ready()
        listing = f"/proc/{kept.process.pid}/fd"
        kept("notify", text="nothing")  # from now on it has a pipe for its answers
        before = len(os.listdir(listing))
        for text in ("BARRIER=1", "FDSTOREREMOVE=1", "nothing", "FDSTORE=0", "ANSWERS=1"):
            kept("notify", text=text, memory=250)
        assert len(os.listdir(listing)) == before


class TestPid1:
    @pytest.fixture(autouse=True)
    def _subreaper(self, no_fd_is_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the keeper inherit orphans, as pid 1 does."""
        libc = ctypes.CDLL(None)
        popen = subprocess.Popen
        monkeypatch.setattr(
            subprocess, "Popen", lambda *args, **more: popen(
                *args, **more, preexec_fn=lambda: libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        )  # fmt: skip

    def test_orphans_are_reaped(self, start: Start) -> None:
        kept = start()
        kept.ready()
        orphan = kept("orphan")
        assert not os.path.exists(f"/proc/{orphan}")

    def test_workers_die_with_the_daemon(self, start: Start) -> None:
        """Nothing of a dead daemon goes on with its memory."""
        kept = start()
        pid = kept.ready()
        worker = os.pidfd_open(kept("worker"))
        kept.disconnect()
        os.kill(pid, signal.SIGKILL)
        assert select.select([worker], [], [], PATIENCE)[0] == [worker]
        os.close(worker)
        kept.ready()


class TestStart:
    def run(self, *argv: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-S", "-m", "gmemd.keeper.keeper", *argv], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": ROOT}, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    def test_socket_in_use(self, tmp_path: Path) -> None:
        """A listening one is left alone, a dead one replaced, another file left alone."""
        path = str(tmp_path / "sock")
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            other.listen()
            status, words = self.run("--listen", path, "--exec", "false")
            assert (status, words.count("Address already in use")) == (1, 1)
        status, _ = self.run("--listen", path, "--exec", "sh", "-c", "exit 7")
        assert status == 7
        Path(path).write_text("precious")
        assert self.run("--listen", path, "--exec", "false")[0] == 1
        assert Path(path).read_text() == "precious"

    def test_limit_of_open_files(self) -> None:
        """The store is never larger than what can be held and handed down at once."""
        keeper = f"{sys.executable} -S -m gmemd.keeper.keeper --fdstore-max 500 --exec sh -c 'echo $FDSTORE'"
        for limit, announced in ((66, "1"), (164, "50"), (1064, "500")):
            done = subprocess.run(
                ["sh", "-c", f"ulimit -n {limit}; exec {keeper}"], capture_output=True, text=True, check=True,
                env={**os.environ, "PYTHONPATH": ROOT},
            )  # fmt: skip
            assert done.stdout.strip() == announced

    def test_wrong_options(self, tmp_path: Path) -> None:
        assert self.run("--listen")[1] == "gmemd --keeper: --listen needs a value\n"
        assert self.run("--watchdog", "soon")[1] == "gmemd --keeper: --watchdog: 'soon' is not a number\n"
        assert "no such group" in self.run("--listen", f"{tmp_path}/socket", "--listen-group", "no such group")[1]

    def test_what_is_not_ours_is_the_daemons(self) -> None:
        options = parse(["--listen", "web=/b", "--listen=/a=b", "--watchdog=2.5", "--listen-mode", "600", "-v", "--x"])
        assert options.listen == [("web", "/b"), ("qmp", "/a=b")]
        assert (options.watchdog, options.listen_mode) == (2.5, 0o600)
        assert options.command[-2:] == ["-v", "--x"]
        assert parse(["--", "--listen"]).command[-1] == "--listen"
        assert parse(["--exec", "a", "--listen"]).command == ["a", "--listen"]

    def test_imports_little(self) -> None:
        """What the keeper does not import cannot fail in it, and takes no memory."""
        program = "import sys, gmemd.keeper.keeper; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )  # fmt: skip
        heavy = {"asyncio", "sqlite3", "structlog", "ctypes", "json", "argparse", "logging", "subprocess", "threading",
                 "dataclasses", "inspect", "re", "typing"}  # fmt: skip
        assert heavy & set(done.stdout.split()) == set()


def test_barrier_is_answered_while_nothing_else_happens(start: Start) -> None:
    """The keeper sleeps between messages: no wake-ups, no timers."""
    kept = start()
    kept.ready()
    with open(f"/proc/{kept.process.pid}/wchan") as file:
        assert file.read() in ("do_poll.constprop.0", "do_sys_poll", "poll_schedule_timeout.constprop.0", "0", "")
    kept("barrier")
    assert select.select([kept.process.stderr], [], [], 0)[0] == []


class TestPlaces:
    """Nobody else can put himself in the place of the keeper or of the daemon."""

    def start(self, path: Path, how: str = "") -> tuple[int, str]:
        """Start a keeper whose daemon ends at once; its status, and what it said."""
        words = [sys.executable, "-S", "-m", "gmemd.keeper.keeper", "--listen", str(path), "--exec", "sh", "-c",
                 "exit 7"]
        done = subprocess.run(["sh", "-c", f'exec "$@" {how}', "sh", *words], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ROOT}, check=False)  # fmt: skip
        return done.returncode, done.stderr

    @pytest.mark.parametrize(("mode", "group", "started"), [
        (0o755, 0, True), (0o777, 0, False), (0o1777, 0, True), (0o775, 0, True), (0o775, 12345, False),
        (0o757, 0, False), (0o1775, 12345, True),
    ])  # fmt: skip
    def test_a_directory_of_others_is_refused(self, tmp_path: Path, mode: int, group: int, started: bool) -> None:
        """Anybody who may write there may replace our socket; the same holds for the directories above."""
        if group and os.getuid() != 0:
            pytest.skip("needs root, to give a directory away")
        place = tmp_path / "place"
        (place / "below").mkdir(parents=True)
        if group:
            os.chown(place, -1, group)
        place.chmod(mode)
        for path in (place / "sock", place / "below" / "sock"):
            status, words = self.start(path)
            if started:
                assert status == 7, words
            else:
                assert status == 1
                assert f"'{place}' can be written by others" in words
            assert not path.exists()
        place.chmod(0o755)
        assert self.start(place / "sock")[0] == 7

    def test_a_file_in_the_place_of_the_notify_socket_is_left_alone(self, tmp_path: Path) -> None:
        precious = tmp_path / "sock.notify"
        precious.write_text("precious")
        assert self.start(tmp_path / "sock")[0] == 1
        assert precious.read_text() == "precious"
        precious.unlink()
        assert self.start(tmp_path / "sock")[0] == 7

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_started_without_standard_streams(self, tmp_path: Path, closed: str) -> None:
        """None of their numbers goes to a socket of the keeper, and the daemon finds all three open."""
        seen = tmp_path / "seen"
        look = f"for n in 0 1 2; do readlink /proc/$$/fd/$n; done >{seen}; exit 7"
        words = [sys.executable, "-S", "-m", "gmemd.keeper.keeper", "--listen", str(tmp_path / "sock"), "--exec",
                 "sh", "-c", look]  # fmt: skip
        done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], check=False,
                              env={**os.environ, "PYTHONPATH": ROOT})  # fmt: skip
        assert done.returncode == 7
        links = seen.read_text().splitlines()
        assert len(links) == 3
        assert [link for link in links if link.startswith("socket:")] == []


@pytest.mark.parametrize("limit", [20, 64, 65])
def test_a_keeper_that_could_keep_nothing_does_not_start(tmp_path: Path, limit: int) -> None:
    """Its daemon would acknowledge memory that is not kept."""
    words = [sys.executable, "-S", "-m", "gmemd.keeper.keeper", "--listen", str(tmp_path / "sock"), "--exec", "true"]
    done = subprocess.run(["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *words], check=False, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    said = f"gmemd --keeper: a limit of {limit} open files leaves no room for memory: raise it (ulimit -n)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_keeper_short_of_descriptors_refuses(start: Start) -> None:
    """What it cannot take is not acknowledged; all that is acknowledged is there after a crash."""
    kept = start()
    pid = kept.ready()
    limits = resource.prlimit(kept.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(kept.process.pid, resource.RLIMIT_NOFILE, (24, limits[1]))
    answers = {f"m{number}": kept("add", id=f"m{number}", text=str(number)) for number in range(30)}
    kept_ids = [id_ for id_, answer in answers.items() if answer is None]
    refused = [answer for answer in answers.values() if answer is not None]
    assert 0 < len(kept_ids) < 24
    assert refused[0] == {"error": "cannot hand over to the service manager: Too many open files"}
    gone = kept_ids.pop()
    assert kept("remove", id=gone) is None
    assert kept("add", id="again", text="again") is None
    resource.prlimit(kept.process.pid, resource.RLIMIT_NOFILE, limits)
    kept.kill(pid)
    assert sorted(kept("info")["objects"]) == sorted([*kept_ids, "again"])
    assert kept("read", id=kept_ids[-1]) == kept_ids[-1][1:]
    assert kept("add", id="late", text="late") is None
