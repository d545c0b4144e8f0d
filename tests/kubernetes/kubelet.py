"""A kubelet as a driver sees it: it finds registration sockets, asks who is there, and calls for the claims of pods.

Its messages are built from proto files, not from the driver's own description of them. What it has prepared is in a
file, as the kubelet's dra_manager_state is, and outlives it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from tests.patience import PATIENCE, wait_for

PROTOS = Path(__file__).parent / "proto"


def _load() -> dict[str, tuple[Any, Any]]:
    """Messages and services of registration, v1 and v1beta1."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.append(folder)
        try:
            for name, source in (("registration", "registration"), ("v1", "dra"), ("v1beta1", "dra")):
                text = (PROTOS / f"{source}.proto").read_text()
                Path(folder, f"kubelet_{name}.proto").write_text(text.replace("VERSION", name))
                found[name] = grpc.protos_and_services(f"kubelet_{name}.proto")
        finally:
            sys.path.remove(folder)
    return found


_LOADED = _load()


class Refused(Exception):
    """The driver's error for a claim."""


class Kubelet:
    """A kubelet with its directory. `versions`: what it speaks of DRA, the preferred one first."""

    def __init__(self, directory: Path, versions: tuple[str, ...] = ("v1", "v1beta1")) -> None:
        self._registry = directory / "plugins_registry"
        self._state = directory / "dra_manager_state"
        self._versions = versions
        self.endpoints: dict[str, tuple[str, str]] = {}  # registration socket: where to call, and in which version

    def register(self, count: int = 1) -> list[str]:
        """Wait for so many plugins, ask each, accept them; their names."""
        messages, services = _LOADED["registration"]
        names: dict[str, str] = {}

        def look() -> bool:
            for path in self._registry.glob("*.sock"):
                if str(path) not in names:
                    with suppress(grpc.RpcError), grpc.insecure_channel(f"unix:{path}") as channel:
                        stub = services.RegistrationStub(channel)
                        info = stub.GetInfo(messages.InfoRequest(), timeout=PATIENCE)
                        assert info.type == "DRAPlugin"
                        version = next(one for one in self._versions if f"{one}.DRAPlugin" in info.supported_versions)
                        stub.NotifyRegistrationStatus(messages.RegistrationStatus(plugin_registered=True),
                                                      timeout=PATIENCE)
                        names[str(path)] = info.name
                        self.endpoints[str(path)] = (info.endpoint, version)
            return len(names) >= count

        wait_for(look)
        return list(names.values())

    def prepared(self) -> dict[str, Any]:
        """What its file says: claims by uid, each with its devices."""
        return json.loads(self._state.read_text()) if self._state.exists() else {}

    def prepare(self, *claims: tuple[str, str, str], timeout: float = PATIENCE) -> dict[str, list[dict[str, Any]]]:
        """The devices of claims (namespace, name, uid) by their uids, as they are when a pod starts.

        Refused if the driver refuses one; grpc.RpcError if it does not answer.
        """
        answer = self._call("NodePrepareResources", claims, timeout)
        assert set(answer) == {uid for _, _, uid in claims}, "every claim has an answer"
        for found in answer.values():
            if found.error:
                raise Refused(found.error)
        devices = {uid: [{"requests": list(one.request_names), "pool": one.pool_name, "device": one.device_name,
                          "cdi": list(one.cdi_device_ids)} for one in found.devices] for uid, found in answer.items()}
        self._write({**self.prepared(), **devices})
        return devices

    def unprepare(self, *claims: tuple[str, str, str], timeout: float = PATIENCE) -> None:
        """The same when no pod uses them any more."""
        answer = self._call("NodeUnprepareResources", claims, timeout)
        assert set(answer) == {uid for _, _, uid in claims}, "every claim has an answer"
        for found in answer.values():
            if found.error:
                raise Refused(found.error)
        gone = {uid for _, _, uid in claims}
        self._write({uid: devices for uid, devices in self.prepared().items() if uid not in gone})

    def begin(self, method: str, claim: tuple[str, str, str]) -> tuple[Any, Any]:
        """Call without waiting: the channel, which a killed kubelet closes, and the call."""
        endpoint, version = next(iter(self.endpoints.values()))
        channel = grpc.insecure_channel(f"unix:{endpoint}")
        return channel, self._method(channel, version, method).future(self._request(version, method, [claim]))

    @contextmanager
    def calling(self) -> Iterator[Callable[[str, tuple[str, str, str]], None]]:
        """Call a method for a claim, often: on one connection, as a kubelet's is, and without its file."""
        endpoint, version = next(iter(self.endpoints.values()))
        with grpc.insecure_channel(f"unix:{endpoint}") as channel:
            def call(method: str, claim: tuple[str, str, str]) -> None:
                answer = self._method(channel, version, method)(self._request(version, method, [claim]))
                assert not answer.claims[claim[2]].error
            yield call

    def _call(self, method: str, claims: Any, timeout: float) -> Any:
        last: grpc.RpcError | None = None
        for endpoint, version in self.endpoints.values():
            with grpc.insecure_channel(f"unix:{endpoint}") as channel:
                try:
                    return self._method(channel, version, method)(self._request(version, method, claims),
                                                                  timeout=timeout).claims
                except grpc.RpcError as exc:
                    last = exc
        assert last is not None, "no driver is registered"
        raise last

    @staticmethod
    def _method(channel: Any, version: str, method: str) -> Any:
        return getattr(_LOADED[version][1].DRAPluginStub(channel), method)

    @staticmethod
    def _request(version: str, method: str, claims: Any) -> Any:
        messages = _LOADED[version][0]
        return getattr(messages, f"{method}Request")(claims=[
            messages.Claim(namespace=namespace, name=name, uid=uid) for namespace, name, uid in claims])

    def _write(self, state: dict[str, Any]) -> None:
        beside = self._state.with_suffix(".new")
        beside.write_text(json.dumps(state))
        beside.rename(self._state)
