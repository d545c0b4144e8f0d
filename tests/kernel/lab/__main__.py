"""script/kernel-lab: list, get, run, contract, kexec."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.kernel.lab import kernels
from tests.kernel.lab.kernels import Kernel
from tests.kernel.lab.machine import Machine
from tests.kernel.lab.packages import releases

# title, arguments of the ladder, kernel's command line
_LADDERS = (
    ("live update, two kexecs", "--rungs 2", "kho=on liveupdate=on"),
    ("live update, real guest_memfds", "--rungs 1 --kvm", "kho=on liveupdate=on"),
    ("without live update", "--rungs 1 --lost", ""),
)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    status: int = arguments.act(arguments)
    return status


def show(_: argparse.Namespace) -> int:
    here = kernels.here()
    for name in dict.fromkeys([*releases(), kernels.LUO, *here]):
        print(f"{'*' if name in here else ' '} {name}")
    return 0


def get(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        print(kernels.named(name).image.parent)
    return 0


def run(arguments: argparse.Namespace) -> int:
    if not arguments.command:
        raise SystemExit("script/kernel-lab run: which command? For example: run -k 7.3 gmemctl doctor")
    if arguments.image and not arguments.image.is_file():
        raise SystemExit(f"script/kernel-lab run: there is no kernel at '{arguments.image}'")
    kernel = Kernel(arguments.image, arguments.modules) if arguments.image else kernels.named(arguments.kernel)
    machine = Machine(kernel, arguments.memory, arguments.nodes, arguments.append, arguments.timeout,
                      arguments.systemd)
    return machine.run("exec " + shlex.join(arguments.command), sys.stdout.buffer)


def contract(arguments: argparse.Namespace) -> int:
    """The same on each kernel; how many were wrong."""
    wrong = 0
    for name in arguments.names:
        machine = Machine(kernels.named(name), nodes=2, timeout=arguments.timeout)
        wrong += machine.run("exec python -m tests.kernel.lab.contract", sys.stdout.buffer) != 0
    return wrong


def kexec(arguments: argparse.Namespace) -> int:
    """Two kexecs in a row; one where guest_memfds are real; one without live update."""
    kernel = kernels.named(kernels.LUO)
    worst = 0
    for title, words, append in _LADDERS:
        print(f"== {title}", flush=True)
        machine = Machine(kernel, 7168, append=f"{append} {arguments.append}", timeout=arguments.timeout, systemd=True)
        worst |= machine.run(f"exec python -m tests.kernel.lab.ladder {words}", sys.stdout.buffer)
    return worst


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script/kernel-lab", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="list|get|run|contract|kexec")
    verb = verbs.add_parser("list", help="the kernels that Debian packages now, * those that are here")
    verb.set_defaults(act=show)
    verb = verbs.add_parser("get", help="fetch kernels by the first part of their release; 'luo' is built")
    verb.add_argument("names", nargs="+", metavar="NAME")
    verb.set_defaults(act=get)
    verb = verbs.add_parser("run", help="run a command in this tree on another kernel, as root")
    verb.add_argument("-k", dest="kernel", default="7.3", metavar="NAME", help="the kernel (7.3)")
    verb.add_argument("--kernel", dest="image", type=Path, metavar="BZIMAGE", help="a kernel of your own; KVM for"
                      " AMD, virtio_pci, virtio_blk and ext4 are built in, or in --modules")
    verb.add_argument("--modules", type=Path, metavar="FOLDER", help="its lib/modules/RELEASE")
    verb.add_argument("--memory", type=int, default=3072, metavar="MIB")
    verb.add_argument("--nodes", type=int, default=1, help="NUMA nodes; the CPUs are on the first two")
    verb.add_argument("--append", default="", help="more for the kernel's command line")
    verb.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
    verb.add_argument("--systemd", action="store_true", help="boot systemd, with gmemd as its service")
    verb.add_argument("command", nargs=argparse.REMAINDER)
    verb.set_defaults(act=run)
    verb = verbs.add_parser("contract", help="doctor, a session and the tests of tests/kernel, with two NUMA nodes")
    verb.add_argument("names", nargs="+", metavar="NAME")
    verb.add_argument("--timeout", type=float, default=7200, metavar="SECONDS", help="of each")
    verb.set_defaults(act=contract)
    verb = verbs.add_parser("kexec", help="the ladder of kexecs under systemd, with live update and without")
    verb.add_argument("--append", default="", help="more for the kernel's command line")
    verb.add_argument("--timeout", type=float, default=7200, metavar="SECONDS", help="of each")
    verb.set_defaults(act=kexec)
    return parser


if __name__ == "__main__":
    sys.exit(main())
