"""The keeper's command line, without argparse, whose memory the keeper would occupy forever.

gmemd --keeper [--listen [NAME=]PATH]... [--listen-mode OCTAL] [--listen-group GROUP] [--fdstore-max N]
               [--watchdog SECONDS] [--restart-delay SECONDS] [--start-timeout SECONDS]
               [--stop-timeout SECONDS] [--abort-timeout SECONDS]
               [--] DAEMON-ARGUMENT... | --exec COMMAND ARGUMENT...
"""

from __future__ import annotations

from collections.abc import Callable

from gmemd.keeper.launch import same_program

FDSTORE_MAX = 1024  # as in the shipped unit
RESTART_DELAY = 0.1  # seconds, RestartSec= of the shipped unit


class Options:
    """The keeper's settings. Times are in seconds."""

    def __init__(self, command: list[str], *, fdstore_max: int = FDSTORE_MAX) -> None:
        self.command = command
        self.listen: list[tuple[str, str]] = []  # name in $LISTEN_FDNAMES, path
        self.listen_mode = 0o660
        self.listen_group = ""
        self.fdstore_max = fdstore_max
        self.watchdog = 0.0  # 0: none
        self.restart_delay = RESTART_DELAY  # doubled at each start that fails
        self.start_timeout = 90.0  # to READY=1
        self.stop_timeout = 10.0  # from SIGTERM to SIGKILL
        self.abort_timeout = 5.0  # from the watchdog's SIGABRT to SIGKILL


def parse(argv: list[str]) -> Options:
    """The keeper's own options from the front of argv; the first other word starts the daemon's arguments."""
    options = Options([])
    rest = list(argv)
    while rest:
        option, equals, value = rest[0].partition("=")
        if option == "--exec":
            options.command = rest[1:]
            return options
        if option not in _OPTIONS:
            break
        if not equals and len(rest) < 2:
            raise ValueError(f"{option} needs a value")
        rest.pop(0)
        _set(options, option, value if equals else rest.pop(0))
    if rest[:1] == ["--"]:
        rest.pop(0)
    options.command = [*same_program(), *rest]
    return options


_OPTIONS: dict[str, Callable[[str], object]] = {
    "--listen": str,
    "--listen-mode": lambda text: int(text, 8),
    "--listen-group": str,
    "--fdstore-max": int,
    "--watchdog": float,
    "--restart-delay": float,
    "--start-timeout": float,
    "--stop-timeout": float,
    "--abort-timeout": float,
}


def _set(options: Options, option: str, text: str) -> None:
    if option == "--listen":
        name, equals, path = text.partition("=")
        options.listen.append((name, path) if equals and "/" not in name else ("qmp", text))
        return
    try:
        setattr(options, option[2:].replace("-", "_"), _OPTIONS[option](text))
    except ValueError:
        raise ValueError(f"{option}: '{text}' is not a number") from None
