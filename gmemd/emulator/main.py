"""gmemd-emulator: started in QEMU's place by libvirt or by hand.

The environment has what QEMU's command line cannot express: GMEMD_SOCKET, a gmemd that is to own the memory;
GMEMD_KERNEL, like gmemd's --kernel.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from gmemd.emulator.commandline import CommandLine, parse
from gmemd.emulator.pidfile import pid_file
from gmemd.errors import QmpError
from gmemd.posix.streams import open_standard_streams, say

NAME = "gmemd-emulator"
_HINTS = {
    "expects an identifier": "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
    "expects a non-negative number below 2^64":
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the emulator; the exit status: 0 after a clean end, 1 when it cannot start."""
    open_standard_streams()
    try:
        line = parse(sys.argv[1:] if argv is None else argv, tell)
        text = shown(line)
        if text is not None:
            print(text)
        elif line.daemonize:
            return _daemonize(line)
        else:
            _run(line, lambda: None)
    except QmpError as exc:
        tell(exc.desc)
        return 1
    return 0


def tell(text: str) -> None:
    """Print a message for whoever starts the emulator, with QEMU's hint."""
    hint = next((f"\n{hint}" for end, hint in _HINTS.items() if text.endswith(end)), "")
    say(f"{NAME}: {text}{hint}")


def _run(line: CommandLine, ready: Callable[[], None]) -> None:
    from gmemd.observe.log import configure_log
    from gmemd.server.loop import run  # before anything imports asyncio

    configure_log("warning")
    from gmemd.emulator.process import make_emulator

    with pid_file(line.pidfile):
        run(make_emulator(line, os.environ, ready).run())


def _daemonize(line: CommandLine) -> int:
    """Run as a child in a session of its own, as QEMU does; the parent's exit status, once it serves or has failed."""
    said, saying = os.pipe()
    if os.fork():
        os.close(saying)
        return 0 if os.read(said, 1) else 1
    os.close(said)
    os.setsid()
    os.umask(0o027)
    for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        os.write(saying, b"1")
        os.close(saying)

    _run(line, ready)
    return 0


def shown(line: CommandLine) -> str | None:
    """The text that an option prints, else None."""
    if line.show == "version":
        from gmemd.daemon import QEMU_VERSION, package_version

        return f"QEMU emulator version {QEMU_VERSION['major']}.{QEMU_VERSION['minor']}.{QEMU_VERSION['micro']} " \
               f"(gmemd {package_version()})"
    if line.show == "help":
        return f"usage: {NAME} [options of QEMU]\n\n{__doc__}"
    if line.show == "machine":
        from gmemd.emulator.machine_types import MACHINES

        names = [name for kind in MACHINES for name in (kind.alias, kind.name) if name]
        return "Supported machines are:\n" + "\n".join(names)
    return line.show or None


if __name__ == "__main__":
    sys.exit(main())
