"""The driver's two sockets for the kubelet, and what is said there.

The kubelet finds the registration socket in its directory, asks who is there (GetInfo), and then calls the other one.
With a pod's uid both have names of their own, so during a rolling update the kubelet knows the old pod and the new one
(Kubernetes 1.33 and later); both may be called for any claim.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio

from gmemd.errors import QmpError, os_errors
from gmemd.kubernetes import wire

Answer = Callable[[Any], Awaitable[Any]]  # of one claim of the kubelet's


class Kubelet:
    """The two servers. `prepare` returns messages Device of a claim, `unprepare` None; both may raise QmpError."""

    def __init__(self, directory: Path, driver: str, pod: str, prepare: Answer, unprepare: Answer,
                 say: Callable[[str], None]) -> None:
        own = f"-{pod}" if pod else ""
        self._driver = driver
        self._plugin = directory / "plugins" / driver / f"dra{own}.sock"
        self._registry = directory / "plugins_registry"
        self._registration = self._registry / f"{driver}{own}-reg.sock"
        self._prepare = prepare
        self._unprepare = unprepare
        self._say = say
        self._servers: list[Any] = []

    async def start(self) -> None:
        """Listen, and be found: first what will be called, then the registration."""
        with os_errors("cannot listen for the kubelet"):
            self._plugin.parent.mkdir(parents=True, exist_ok=True)
            self._registry.mkdir(parents=True, exist_ok=True)
            self._remove_dead()
        methods = {"NodePrepareResources": self._node_prepare, "NodeUnprepareResources": self._node_unprepare}
        calls = [wire.handler(service, methods) for service in wire.SERVICES if service.endswith("DRAPlugin")]
        self._servers.append(await _serve(self._plugin, calls))
        registration = wire.handler("pluginregistration.Registration", {
            "GetInfo": self._get_info, "NotifyRegistrationStatus": self._notified})
        self._servers.append(await _serve(self._registration, [registration]))

    async def stop(self) -> None:
        """Be no longer found, finish what was called, and remove the sockets."""
        for server, path in zip(reversed(self._servers), (self._registration, self._plugin), strict=False):
            with suppress(FileNotFoundError):
                path.unlink()
            await server.stop(grace=30)

    async def _get_info(self, request: Any) -> Any:
        return wire.message("PluginInfo", type="DRAPlugin", name=self._driver, endpoint=str(self._plugin),
                            supported_versions=wire.VERSIONS)

    async def _notified(self, status: Any) -> Any:
        self._say("registered with the kubelet" if status.plugin_registered
                  else f"the kubelet refuses the registration: {status.error}")
        return wire.message("RegistrationStatusResponse")

    async def _node_prepare(self, request: Any) -> Any:
        answer = wire.message("NodePrepareResourcesResponse")
        for claim in request.claims:
            found = answer.claims[claim.uid]
            try:
                found.devices.extend(await self._prepare(claim))
            except QmpError as exc:
                found.error = self._refused("prepare", claim, exc)
        return answer

    async def _node_unprepare(self, request: Any) -> Any:
        answer = wire.message("NodeUnprepareResourcesResponse")
        for claim in request.claims:
            found = answer.claims[claim.uid]
            try:
                await self._unprepare(claim)
            except QmpError as exc:
                found.error = self._refused("unprepare", claim, exc)
        return answer

    def _refused(self, what: str, claim: Any, exc: QmpError) -> str:
        self._say(f"cannot {what} claim '{claim.namespace}/{claim.name}' ({claim.uid}): {exc.desc}")
        return exc.desc

    def _remove_dead(self) -> None:
        """Remove the sockets of instances that were killed: nobody else does, and the kubelet would try them."""
        ours = re.compile(rf"(?:{re.escape(self._driver)}(?:-[0-9a-f-]{{36}})?-reg|dra(?:-[0-9a-f-]{{36}})?)\.sock")
        for path in (*self._registry.iterdir(), *self._plugin.parent.iterdir()):
            if not ours.fullmatch(path.name):
                continue
            with socket.socket(socket.AF_UNIX) as probe, suppress(FileNotFoundError):
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()


async def _serve(path: Path, handlers: list[Any]) -> Any:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(handlers)
    umask = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    except RuntimeError as exc:
        raise QmpError(f"cannot listen for the kubelet at '{path}': {exc}") from exc
    finally:
        os.umask(umask)
    return server
