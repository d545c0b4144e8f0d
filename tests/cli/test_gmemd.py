"""gmemd's own command line: sockets, policies, the keeper's arguments, refusals."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd import __version__
from gmemd.cli.gmemd import built, keeper_arguments, main, make_parser, parse_qmp, plain_options, runtime_directory
from gmemd.errors import QmpError
from gmemd.posix.sockets import bind_unix


@pytest.mark.parametrize(("text", "parsed"), [
    ("unix:/a/b", ("/a/b", False)),
    ("unix:b,pretty=on", ("b", True)),
    ("unix:b,server=on,wait=off,pretty=off", ("b", False)),
])
def test_qmp_option(text: str, parsed: tuple[str, bool]) -> None:
    """A path and pretty; what QEMU needs to be told besides holds anyway."""
    assert parse_qmp(text) == parsed


@pytest.mark.parametrize("text", ["", "unix:", "/a", "tcp:1:2", "unix:a,pretty=yes", "unix:a,wait=on", "unix:a,x"])
def test_wrong_qmp_option(text: str) -> None:
    with pytest.raises(QmpError):
        parse_qmp(text)


def test_keeper_listens_for_the_daemon(tmp_path: Path) -> None:
    """The keeper makes the sockets that the daemon's arguments name, and passes the arguments on."""
    path = str(tmp_path / "q")
    for words in (["--qmp", f"unix:{path},pretty=on"], [f"--qmp=unix:{path},pretty=on"]):
        assert keeper_arguments(["--keeper", *words]) == ["--listen", f"qmp={path}", *words]
    own = ["--listen", "x", "--", "--name", "n"]
    assert keeper_arguments(["--keeper", *own]) == own


def test_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's, then the system's for root, then the user's."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    assert runtime_directory() == "/run/one"
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert runtime_directory() == "/run/gmemd"
    monkeypatch.setattr(os, "getuid", lambda: 7)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_directory() == "/run/user/7/gmemd"


WORDS = st.sampled_from(["--qmp", "--object", "--kernel", "--state-dir", "--persist", "--lab", "--warm", "--audit",
                         "--check-policy", "--version", "--log-level", "-h", "--help", "--", "-", "--no", "--vers",
                         "", "x", "on", "off", "debug", "-x", "a b", "x=y"])


@given(st.lists(st.one_of(WORDS, st.tuples(WORDS, WORDS).map("=".join)), max_size=6))
def test_plain_options_are_those_of_argparse(arguments: list[str]) -> None:
    """What is accepted without argparse, argparse reads the same way."""
    plain = plain_options(arguments)
    if plain is not None:
        assert vars(plain) == vars(make_parser().parse_args(arguments))


@given(st.lists(st.sampled_from([("--qmp", "unix:a"), ("--qmp=b",), ("--object", "x"), ("--lab",), ("--persist=on",),
                                 ("--warm", "off"), ("--log-level", "debug"), ("--name=",)]), max_size=8))
def test_right_options_need_no_argparse(groups: list[tuple[str, ...]]) -> None:
    assert plain_options([word for group in groups for word in group]) is not None


def test_wrong_options_are_for_argparse() -> None:
    """What it refuses or explains is not accepted before."""
    for wrong in (["--persist", "x"], ["--nam", "x"], ["x"], ["--lab=x"], ["--qmp"], ["--name", "--lab"], ["--help"]):
        assert plain_options(wrong) is None
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), \
                pytest.raises(SystemExit):
            make_parser().parse_args(wrong)


@pytest.mark.parametrize(("arguments", "text"), [
    (["--object", "nonsense"], "Parameter 'qom-type' does not accept value 'nonsense'"),
    (["--uuid", "1"], "'1' is not a UUID"),
    (["--compat", "x"], "--compat takes unstable-input=accept|reject, not 'x'"),
    (["--kernel", "x"], "unknown kernel 'x': 'auto', 'kvm' or 'simulated[:PROFILE]'"),
    (["--persist", "on"], "no service manager keeps file descriptors here"),
    (["--qmp", "x"], "'x' is not of the form unix:PATH[,pretty=on]"),
])
def test_what_cannot_start_says_why(arguments: list[str], text: str, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on standard error, and exit status 1."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert main(["--qmp", f"unix:{tmp_path}/q", *arguments]) == 1
    assert f"gmemd: {text}" in capsys.readouterr().err


def test_object_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Help and version are printed, and nothing is started."""
    assert main(["--object", "help"]) == 0
    assert "memory-backend-memfd" in capsys.readouterr().out
    assert main(["--object", "memory-backend-memfd,help"]) == 0
    assert "guest-memfd=<OnOffAuto>" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gmemd {__version__} ({built()})\n"


def test_stale_sockets_are_replaced_live_ones_kept(tmp_path: Path) -> None:
    """A file that nobody answers on is replaced; one that is answered on is refused, and goes on answering."""
    path = str(tmp_path / "q")
    bind_unix(path).close()
    with bind_unix(path) as live:
        assert os.stat(path).st_mode & 0o777 == 0o660
        with pytest.raises(QmpError, match="Address already in use"):
            bind_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            live.accept()[0].close()
    with pytest.raises(QmpError, match="No such file or directory"):
        bind_unix(str(tmp_path / "no" / "q"))
