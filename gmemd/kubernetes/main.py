"""gmemd-dra: the command line, and the parts put together."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from gmemd import __version__
from gmemd.errors import QmpError
from gmemd.kubernetes.quantity import parse
from gmemd.posix.sockets import path_of
from gmemd.posix.streams import open_standard_streams, say

_NEEDS: Final = "gmemd-dra needs grpcio, protobuf and aiohttp: pip install 'gmemd[kubernetes]'"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gmemd-dra", allow_abbrev=False,
                                     description="Let Kubernetes allocate guest memory of this node's gmemd (DRA).",
                                     epilog="docs/kubernetes.md says how claims, classes and nodes are set up.")
    add = parser.add_argument
    add("--node-name", required=True, metavar="NAME", help="the name of this node in the cluster")
    add("--qmp", default="unix:/run/gmemd/qmp.sock", metavar="unix:PATH", help="where gmemd listens (default:"
        " unix:/run/gmemd/qmp.sock); its policy has to let this user operate")
    add("--driver-name", default="memory.gmemd.example", metavar="NAME", help="default: memory.gmemd.example")
    add("--kubelet", type=Path, default=Path("/var/lib/kubelet"), metavar="DIR",
        help="the kubelet's directory (default: /var/lib/kubelet)")
    add("--cdi", type=Path, default=Path("/var/run/cdi"), metavar="DIR",
        help="where container runtimes look for CDI specifications (default: /var/run/cdi)")
    add("--claims", type=Path, default=Path("/run/gmemd/claims"), metavar="DIR",
        help="where each claim has a directory with its socket; gmemd sees it under the same path (default:"
        " /run/gmemd/claims)")
    add("--memory", type=_amount, default=0, metavar="SIZE",
        help="what to offer of ordinary pages on each NUMA node, as 64Gi (default: only huge pages are offered)")
    add("--piece", type=_amount, default=0, metavar="SIZE", help="the size of a device where the cluster does not share"
        " devices out (default: one device for all the memory of a NUMA node and page size)")
    add("--pod-uid", default="", metavar="UID", help="the uid of this pod: it gets sockets of its own, so that a new"
        " pod is there before the old one ends (a kubelet of 1.33 or later)")
    add("--metrics", type=int, metavar="PORT", help="answer /metrics there: gmemd's own, and claims by namespace")
    add("--http", default="unix:/run/gmemd/http.sock", metavar="unix:PATH", help="where gmemd answers HTTP, for"
        " --metrics (default: %(default)s)")
    add("--api", metavar="URL", help="the API server (default: that of the cluster which this pod is in)")
    add("--token", type=Path, metavar="FILE", help="a bearer token for --api")
    add("--ca", type=Path, metavar="FILE", help="the certificate authority of --api")
    add("--version", action="version", version=f"gmemd-dra {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the driver; the exit status: 0 after SIGTERM, 1 when it cannot start, 2 for a wrong command line."""
    open_standard_streams()
    options = make_parser().parse_args(argv)
    try:
        asyncio.run(_run(options))
    except QmpError as exc:
        say(f"gmemd-dra: {exc.desc}")
        return 1
    except ModuleNotFoundError as exc:
        if exc.name not in ("grpc", "google", "google.protobuf", "aiohttp"):
            raise
        say(_NEEDS)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    """Start everything, and end it on SIGTERM or SIGINT; the slices and what is prepared stay."""
    from gmemd.kubernetes.api import Api
    from gmemd.kubernetes.driver import Driver
    from gmemd.kubernetes.house import House
    from gmemd.kubernetes.kubelet import Kubelet
    from gmemd.kubernetes.node import Node
    from gmemd.kubernetes.places import Places
    from gmemd.kubernetes.service import Service
    from gmemd.kubernetes.slices import Slices

    house = House(path_of(options.qmp))
    node = Node(house, options.memory, options.piece)
    places = Places(options.claims.absolute(), options.cdi.absolute(), options.driver_name)
    places.open(house.ask(lambda client: client.peer_owner))
    driver = Driver(house, places, bind=node.has_several, say=_say)
    api = Api(options.api, options.token, options.ca) if options.api else Api.in_cluster()
    async with api:
        service = Service(driver, api, options.driver_name, options.node_name, node.find, _say)
        kubelet = Kubelet(options.kubelet.absolute(), options.driver_name, options.pod_uid, service.prepare,
                          service.unprepare, _say)
        slices = Slices(api, options.driver_name, options.node_name, node.offer, _say)
        async with AsyncExitStack() as stack:
            if options.metrics is not None:
                await _measure(options, driver, stack)
            await kubelet.start()
            stack.push_async_callback(kubelet.stop)
            await _until_told(slices.run(), service.look_after())
    house.close()


async def _measure(options: argparse.Namespace, driver: Any, stack: AsyncExitStack) -> None:
    """Answer Prometheus until the stack ends."""
    from gmemd.kubernetes.metrics import Metrics

    metrics = Metrics(options.metrics, path_of(options.http), partial(asyncio.to_thread, driver.rooms))
    await metrics.start()
    stack.push_async_callback(metrics.stop)


async def _until_told(*works: Any) -> None:
    """Do these until a signal ends them."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    tasks = [asyncio.create_task(work) for work in works]
    waiting = asyncio.create_task(told.wait())
    done, rest = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    for task in done:
        task.result()


def _amount(text: str) -> int:
    try:
        return parse(text)
    except QmpError as exc:
        raise argparse.ArgumentTypeError(exc.desc) from None


def _say(text: str) -> None:
    print(f"gmemd-dra: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
