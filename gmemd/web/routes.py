"""The table of routes, by which requests are checked and from which /openapi.json is generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gmemd.errors import QmpError

JSON: Final = "application/json"
QUERY_MAX: Final = 1024  # bytes of a query string

_BOOLEANS: Final = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a route; `schema` is its JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    doc: str
    in_path: bool = False

    def read(self, text: str) -> Any:
        """Parse a value; QmpError if the schema does not allow it."""
        kind = self.schema["type"]
        if kind == "integer":
            return self._integer(text)
        if kind == "boolean":
            if text not in _BOOLEANS:
                raise self._expects("true or false")
            return _BOOLEANS[text]
        if "enum" in self.schema and text not in self.schema["enum"]:
            raise self._expects("one of " + ", ".join(self.schema["enum"]))
        if len(text) > self.schema.get("maxLength", QUERY_MAX):
            raise self._expects(f"at most {self.schema['maxLength']} characters")
        if "pattern" in self.schema and not re.search(self.schema["pattern"], text, re.ASCII):
            raise self._expects("an identifier")
        return text

    def _integer(self, text: str) -> int:
        low, high = self.schema["minimum"], self.schema["maximum"]
        if not re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) or not low <= int(text) <= high:
            raise self._expects(f"an integer from {low} to {high}")
        return int(text)

    def _expects(self, what: str) -> QmpError:
        return QmpError(f"Parameter '{self.name}' expects {what}")


@dataclass(frozen=True)
class Route:
    """One path. `answer` is the name of the function that answers; `returns` the schema of its JSON, if it is JSON."""

    path: str
    summary: str
    answer: str
    parameters: Sequence[Parameter] = ()
    returns: Mapping[str, Any] | None = None
    media: str = JSON
    errors: Mapping[int, str] = field(default_factory=dict)
    command: str = "query-memdev-status"  # whoever may use this sees what the route shows; "": everybody

    def read(self, query: Sequence[tuple[str, str]], path: Mapping[str, str]) -> dict[str, Any]:
        """The values of all parameters, with defaults; QmpError for any that is not allowed, unknown or repeated."""
        known = {parameter.name: parameter for parameter in self.parameters}
        values = {name: parameter.schema["default"] for name, parameter in known.items()
                  if "default" in parameter.schema}
        given: set[str] = set()
        for name, text in query:
            parameter = known.get(name)
            if parameter is None or parameter.in_path:
                raise QmpError(f"Parameter '{name[:64]}' is unexpected")
            if name in given:
                raise QmpError(f"Parameter '{name}' is given twice")
            given.add(name)
            values[name] = parameter.read(text)
        for name, text in path.items():
            values[name] = known[name].read(text)
        return values


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _integer(low: int, high: int, default: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high, "default": default}


ID: Final = Parameter("id", {"type": "string", "pattern": r"^[A-Za-z][A-Za-z0-9._-]*$", "maxLength": 255},
                      "The id of the object.", in_path=True)
SEARCH: Final = Parameter("q", {"type": "string", "maxLength": 100, "default": ""},
                          "Only objects whose id contains this.")
SORT: Final = Parameter("sort", {"type": "string", "enum": ["created", "id", "size"], "default": "created"},
                        "The sort order.")
PAGE: Final = Parameter("page", _integer(1, 1_000_000, 1), "Which page.")
_OFFSET: Final = Parameter("offset", _integer(0, 1 << 31, 0), "How many to skip.")
_LIMIT: Final = Parameter("limit", _integer(1, 100, 50), "How many at most.")
_FROM: Final = Parameter("offset", _integer(0, (1 << 63) - 1, 0), "Where to begin, in bytes.")
_RANGES: Final = Parameter("limit", _integer(1, 1000, 100), "How many ranges at most.")
_ONLY_OBJECT: Final = {404: "The object does not exist."}
_NO_RANGES: Final = {404: "The object does not exist, or is not a guest_memfd."}
_TEXT: Final = "text/plain"

# The status page, its stream and the metrics generate their own bytes.
ROUTES: Final = (
    Route("/", "The status page.", "status_page", (PAGE, SEARCH, SORT), media="text/html"),
    Route("/live", "Changes of the status page, as server-sent events.", "live", (PAGE, SEARCH, SORT),
          media="text/event-stream", errors={503: "Too many live viewers."}),
    Route("/healthz", "Whether the process answers.", "healthz", media=_TEXT, command=""),
    Route("/readyz", "Whether the daemon is fully working.", "readyz", media=_TEXT,
          errors={503: "It is not; the text says why."}),
    Route("/metrics", "Metrics for Prometheus.", "metrics",
          (Parameter("objects", {"type": "boolean", "default": False}, "With a series per object."),), media=_TEXT),
    Route("/openapi.json", "This description.", "openapi", returns={"type": "object"},
          command="query-version"),
    Route("/api/v1/version", "What query-version returns.", "version", returns=_ref("VersionInfo"),
          command="query-version"),
    Route("/api/v1/capabilities", "What this daemon can do.", "capabilities", returns=_ref("Capabilities"),
          command="query-version"),
    Route("/api/v1/objects", "The objects, in pages.", "objects", (_OFFSET, _LIMIT, SEARCH, SORT),
          returns=_ref("ObjectPage")),
    Route("/api/v1/objects/{id}", "One object.", "one_object", (ID,), returns=_ref("MemoryObject"),
          errors=_ONLY_OBJECT),
    Route("/api/v1/objects/{id}/ranges", "Which parts of a guest_memfd are private and which shared.", "ranges",
          (ID, _FROM, _RANGES), returns=_ref("RangePage"), errors=_NO_RANGES),
    Route("/api/v1/objects/{id}/holders", "What query-memdev-holders returns.", "holders_of_one", (ID,),
          returns={"type": "array", "items": _ref("MemdevHolder")}, errors=_ONLY_OBJECT,
          command="query-memdev-holders"),
    Route("/api/v1/holders", "The processes that hold the objects, in pages.", "holders", (_OFFSET, _LIMIT),
          returns=_ref("HolderPage"), command="query-memdev-holders"),
    Route("/api/v1/events", "The latest events, the newest first.", "events",
          (Parameter("limit", _integer(1, 200, 50), "How many at most."),),
          returns={"type": "array", "items": _ref("RecentEvent")}),
    Route("/api/v1/snapshots", "The snapshots in the daemon's directory, the oldest first, in pages.", "snapshots",
          (_OFFSET, _LIMIT), returns=_ref("SnapshotPage"), errors={404: "There is no directory for them."},
          command="query-memdev-snapshots"),
    Route("/api/v1/jobs", "What query-jobs returns.", "jobs", returns={"type": "array", "items": _ref("JobInfo")},
          command="query-jobs"),
)


def routes(commands: Mapping[str, Any]) -> tuple[Route, ...]:
    """The routes that a daemon with these commands has."""
    return tuple(route for route in ROUTES if not route.command or route.command in commands)
