"""A ResourceClaim as the driver sees it: what was allocated to it here, and what that means for gmemd.

Pure: dicts of the API in, dataclasses and arguments of QMP commands out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.kubernetes.offer import CAPACITY, Device
from gmemd.kubernetes.parameters import merged
from gmemd.kubernetes.quantity import parse, write

_LONGEST: Final = 200  # characters of a snapshot's name
POD_CLAIM: Final = "resource.kubernetes.io/pod-claim-name"  # says by which name the pod knows a claim of a template


@dataclass(frozen=True)
class Portion:
    """One result of an allocation, which becomes one object."""

    request: str  # NAME or NAME/SUBREQUEST
    id: str  # of the object in the claim's room
    pool: str
    device: Device
    size: int  # bytes
    share: str  # the shareID, or ""
    parameters: dict[str, Any]

    @property
    def base(self) -> str:
        """The request's name without a subrequest's, as the kubelet and the paths of metadata have it."""
        return self.request.partition("/")[0]

    def note(self) -> dict[str, Any]:
        """What has to be the same for the memory to be the same, and what release needs."""
        return {"request": self.request, "id": self.id, "device": self.device.name, "size": self.size,
                **self.parameters}


@dataclass(frozen=True)
class Claim:
    """A claim and what of it is allocated on this node by this driver."""

    uid: str
    namespace: str
    name: str
    pod_claim: str  # the pod's name for it, "": it was not made from a template
    portions: list[Portion]

    def note(self) -> dict[str, Any]:
        """What is written down in gmemd beside the memory."""
        return {"namespace": self.namespace, "claim": self.name, "portions": [one.note() for one in self.portions]}


def read_claim(body: dict[str, Any], driver: str, pool: str, find: Callable[[str], Device | None]) -> Claim:
    """The claim of this ResourceClaim; `find` returns a device of this node by its name.

    QmpError if it is not allocated, or to something that is not offered here, or asks for what cannot be.
    """
    metadata = body["metadata"]
    allocated = ((body.get("status") or {}).get("allocation") or {}).get("devices")
    if not allocated:
        raise QmpError(f"claim '{metadata['namespace']}/{metadata['name']}' is not allocated")
    results = [one for one in allocated.get("results") or [] if one["driver"] == driver and one["pool"] == pool]
    counts = Counter(one["request"] for one in results)
    seen: Counter[str] = Counter()
    portions = []
    for result in results:
        request = result["request"]
        number = f".{seen[request]}" if counts[request] > 1 else ""
        seen[request] += 1
        parameters = merged(allocated.get("config") or [], driver, request, metadata["namespace"])
        portions.append(_portion(result, _object_id(request) + number, parameters, find))
    pod_claim = (metadata.get("annotations") or {}).get(POD_CLAIM, "")
    claim = Claim(metadata["uid"], metadata["namespace"], metadata["name"], pod_claim, portions)
    _check_names(claim)
    return claim


def saved_as(namespace: str, claim: str, portion: str) -> str:
    """The snapshot of an object that is released with the policy `snapshot`."""
    return f"{namespace}.{claim}.{portion}"


def _check_names(claim: Claim) -> None:
    """Refuse what could not be released later, or would be one object for two results."""
    for portion in claim.portions:
        name = saved_as(claim.namespace, claim.name, portion.id)
        if portion.parameters["onRelease"] == "snapshot" and len(name) > _LONGEST:
            raise QmpError(f"a snapshot cannot have the name '{name}': its {len(name)} characters are more than "
                           f"{_LONGEST}")
    ids = Counter(portion.id for portion in claim.portions)
    twice = next((one for one, count in ids.items() if count > 1), None)
    if twice is not None:
        raise QmpError(f"two results of the claim would be the object '{twice}'")


def _portion(result: dict[str, Any], name: str, parameters: dict[str, Any],
             find: Callable[[str], Device | None]) -> Portion:
    if result.get("adminAccess"):
        raise QmpError(f"request '{result['request']}' asks for admin access, which memory does not have")
    device = find(result["device"])
    if device is None:
        raise QmpError(f"device '{result['device']}' is not offered by this node")
    wanted = parameters.get("hugePages")
    if wanted is not None and parse(wanted) != device.page_size:
        raise QmpError(f"the claim asks for pages of {wanted}, and device '{device.name}' has pages of "
                       f"{write(device.page_size)}")
    return Portion(result["request"], name, result["pool"], device, _taken(result, device),
                   result.get("shareID") or "", parameters)


def _taken(result: dict[str, Any], device: Device) -> int:
    """Bytes of the device that are this claim's: the consumed capacity, whose name may be qualified, or all."""
    for name, amount in (result.get("consumedCapacity") or {}).items():
        if name in (CAPACITY, f"{result['driver']}/{CAPACITY}"):
            return parse(amount)
    return device.size


def _object_id(request: str) -> str:
    """A valid id: a request's name may begin with a digit, but has no _."""
    name = request.replace("/", ".")
    return name if name[0].isalpha() else f"r_{name}"


def creation(portion: Portion, room: str, *, bind: bool) -> tuple[str, dict[str, Any]]:
    """The command that creates a portion's object in a room, and its arguments; `bind`: to its NUMA node."""
    name, parameters = f"{portion.id}@{room}", portion.parameters
    if "restore" in parameters:
        return "memdev-restore", {"id": name, "name": parameters["restore"]}
    if "clone" in parameters:
        return "memdev-clone", {"id": name, "template": parameters["clone"]}
    if "copy" in parameters:
        return "memdev-clone", {"id": name, "template": parameters["copy"], "copy": True}
    arguments = {"qom-type": f"memory-backend-{parameters['type']}", "id": name, "size": portion.size}
    if portion.device.huge:
        arguments |= {"hugetlb": True, "hugetlbsize": portion.device.page_size}
    if bind:
        arguments |= {"host-nodes": [portion.device.numa_node], "policy": "bind"}
    if parameters.get("prealloc"):
        arguments["prealloc"] = True
    return "object-add", arguments
