"""The kubelet's two gRPC APIs on the wire: plugin registration, and DRA in its versions v1 and v1beta1.

The messages are described here and built at start, so no generated code has to fit the installed protobuf. The two
versions of DRA have the same messages on the wire and differ only in the name of the service. Sources:
k8s.io/kubelet/pkg/apis/pluginregistration/v1 and k8s.io/kubelet/pkg/apis/dra/v1 and v1beta1, api.proto.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

VERSIONS: Final = ("v1.DRAPlugin", "v1beta1.DRAPlugin")  # what GetInfo answers, the preferred one first

_PACKAGE: Final = "gmemd"
# Message: its fields by number, each with its type: a message's name or string or bool; [T] many, {T} by string.
_MESSAGES: Final[dict[str, dict[int, tuple[str, str]]]] = {
    "InfoRequest": {},
    "PluginInfo": {1: ("type", "string"), 2: ("name", "string"), 3: ("endpoint", "string"),
                   4: ("supported_versions", "[string]")},
    "RegistrationStatus": {1: ("plugin_registered", "bool"), 2: ("error", "string")},
    "RegistrationStatusResponse": {},
    "Claim": {1: ("namespace", "string"), 2: ("uid", "string"), 3: ("name", "string")},
    "Device": {1: ("request_names", "[string]"), 2: ("pool_name", "string"), 3: ("device_name", "string"),
               4: ("cdi_device_ids", "[string]")},
    "NodePrepareResourcesRequest": {1: ("claims", "[Claim]")},
    "NodePrepareResourceResponse": {1: ("devices", "[Device]"), 2: ("error", "string")},
    "NodePrepareResourcesResponse": {1: ("claims", "{NodePrepareResourceResponse}")},
    "NodeUnprepareResourcesRequest": {1: ("claims", "[Claim]")},
    "NodeUnprepareResourceResponse": {1: ("error", "string")},
    "NodeUnprepareResourcesResponse": {1: ("claims", "{NodeUnprepareResourceResponse}")},
}
_REGISTRATION: Final = {
    "GetInfo": ("InfoRequest", "PluginInfo"),
    "NotifyRegistrationStatus": ("RegistrationStatus", "RegistrationStatusResponse"),
}
_DRA: Final = {
    "NodePrepareResources": ("NodePrepareResourcesRequest", "NodePrepareResourcesResponse"),
    "NodeUnprepareResources": ("NodeUnprepareResourcesRequest", "NodeUnprepareResourcesResponse"),
}
SERVICES: Final = {
    "pluginregistration.Registration": _REGISTRATION,
    "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin": _DRA,
    "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin": _DRA,
}

Method = Callable[[Any], Awaitable[Any]]  # takes a request and answers, each a message


def message(kind: str, **fields: Any) -> Any:
    """A message of that kind."""
    return _CLASSES[kind](**fields)


def handler(service: str, methods: Mapping[str, Method]) -> Any:
    """What makes a grpc.aio server offer a service of SERVICES by these methods."""
    return grpc.method_handlers_generic_handler(service, {
        name: grpc.unary_unary_rpc_method_handler(
            _plain(methods[name]), request_deserializer=_CLASSES[asked].FromString,
            response_serializer=_CLASSES[answered].SerializeToString)
        for name, (asked, answered) in SERVICES[service].items()})


def _plain(method: Method) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        return await method(request)

    return answer


def _describe(message: Any, fields: dict[int, tuple[str, str]]) -> None:
    for number, (name, kind) in fields.items():
        field = message.field.add(name=name, number=number, label=1 if kind[0] not in "[{" else 3)
        kind = kind.strip("[]")
        if kind.startswith("{"):  # a map is many messages with a key and a value
            entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
            entry.options.map_entry = True
            _describe(entry, {1: ("key", "string"), 2: ("value", kind.strip("{}"))})
            kind = f"{message.name}.{entry.name}"
        if kind in ("string", "bool"):
            field.type = {"string": 9, "bool": 8}[kind]  # FieldDescriptorProto.Type of descriptor.proto
        else:
            field.type, field.type_name = 11, f".{_PACKAGE}.{kind}"


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="gmemd-dra.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        _describe(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()  # one of our own: others may have described these APIs, too
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
            for name in _MESSAGES}


_CLASSES: Final = _build()
