"""What a claim's status says of its devices here: Ready, or why not.

Written when a claim is refused, and again when it then becomes ready; a claim without such an entry is fine.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from gmemd.kubernetes.api import CONFLICT, RESOURCE, Api, ApiError

Body = dict[str, Any]

_ATTEMPTS: Final = 5
_LONGEST: Final = 32768  # characters of a condition's message (metav1.Condition)


async def tell(api: Api, claim: Body, driver: str, pool: str, refusal: str) -> None:
    """Say in the claim's status why its devices are not ready, or with "" that they are, unless it says so already.

    `claim` is the ResourceClaim as it was read. ApiError if it cannot be written.
    """
    path = f"{RESOURCE}/namespaces/{claim['metadata']['namespace']}/resourceclaims/{claim['metadata']['name']}"
    uid = claim["metadata"]["uid"]
    for attempt in range(_ATTEMPTS):
        changed = _with_conditions(claim, driver, pool, refusal)
        if changed is None:
            return
        try:
            await api.replace(f"{path}/status", changed)
            return
        except ApiError as exc:
            if exc.code != CONFLICT or attempt == _ATTEMPTS - 1:
                raise
        claim = await api.get(path)
        if claim["metadata"]["uid"] != uid:
            return


def _with_conditions(claim: Body, driver: str, pool: str, refusal: str) -> Body | None:
    """The claim with what its status should say; None: it says so."""
    status = claim.get("status") or {}
    results = ((status.get("allocation") or {}).get("devices") or {}).get("results") or []
    ours = {_key(one): one for one in results if one["driver"] == driver and one["pool"] == pool}
    said = {_key(one): one for one in status.get("devices") or []}
    entries = dict(said)
    for key, result in ours.items():
        former = said.get(key)
        if (former is None and not refusal) or (former is not None and _says(former, refusal)):
            continue
        entry = dict(former or {name: result[name] for name in ("driver", "pool", "device", "shareID")
                                if name in result})
        others = [one for one in entry.get("conditions") or [] if one["type"] != "Ready"]
        entries[key] = {**entry, "conditions": [*others, _condition(refusal)]}
    return None if entries == said else {**claim, "status": {**status, "devices": list(entries.values())}}


def _key(entry: Body) -> tuple[str, ...]:
    return (*(entry[name] for name in ("driver", "pool", "device")), entry.get("shareID") or "")


def _says(entry: Body, refusal: str) -> bool:
    ready = next((one for one in entry.get("conditions") or [] if one["type"] == "Ready"), None)
    if ready is None:
        return not refusal
    return (ready["status"] == "True") == (not refusal) and (not refusal or ready["message"] == refusal[:_LONGEST])


def _condition(refusal: str) -> Body:
    return {"type": "Ready", "status": "False" if refusal else "True", "reason": "Refused" if refusal else "Prepared",
            "message": refusal[:_LONGEST] or "the memory is there",
            "lastTransitionTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
