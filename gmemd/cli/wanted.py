"""The file of `gmemctl apply`: which objects there are to be, as YAML or JSON → `Wanted`.

{"version": 1, "objects": [what object-add takes ...], "clones": [what memdev-clone takes ...]}: a value may be written
as for --object, such as "64M". JSON begins with "{", all else is YAML.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.hints import nearest
from gmemd.errors import QmpError
from gmemd.schema.keyval import read_word
from gmemd.schema.validate import Schema

_MEMBERS = ("version", "objects", "clones")
_OF_CLONES = {"template": str, "id": str, "copy": bool}


class Wanted(NamedTuple):
    """The objects of a file, in its order: each as object-add takes it, and each clone as memdev-clone takes it."""

    objects: list[dict[str, Any]]
    clones: list[dict[str, Any]]

    @property
    def named(self) -> set[str]:
        """The ids that the file names, also those of the templates of its clones."""
        return {one["id"] for one in (*self.objects, *self.clones)} | {one["template"] for one in self.clones}


class _Entry(dict[str, Any]):
    """An object of the file that knows its line; 0: unknown."""

    line = 0


def read(path: str) -> Wanted:
    """The objects of a file, "-" for the standard input; UsageError with the place of what is wrong, OSError."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = data.decode()
        document = _json(text) if text.lstrip()[:1] == "{" else _yaml(text)
        return _checked(document)
    except RecursionError:
        raise UsageError(f"{path}: it is nested too deeply") from None
    except (UsageError, ValueError) as exc:
        raise UsageError(f"{path}: {exc}") from None


# -- the forms ---------------------------------------------------------------------------------------

def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: Iterable[tuple[str, Any]]) -> _Entry:
    found = _Entry()
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' is there twice in one object")
        found[name] = value
    return found


def _no_number(literal: str) -> Any:
    raise ValueError(f"{literal} is not a JSON number")


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UsageError("to read YAML, install PyYAML (pip install pyyaml); JSON is read without it") from None

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Iterator[_Entry]:
        found = _Entry()
        found.line = node.start_mark.line + 1
        yield found  # an alias within may mean it
        seen = set[str]()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: '{key.value}' is there twice in one object")
            seen.add(key.value)
        loader.flatten_mapping(node)
        found.update(loader.construct_mapping(node, deep=True))

    own: Any = type("Own", (yaml.SafeLoader,), {})  # of its own: it has a constructor that others have not
    own.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, own)
    except yaml.MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        raise UsageError(f"{line}{exc.problem or exc.context}") from None
    except yaml.YAMLError as exc:
        raise UsageError(" ".join(str(exc).split())) from None


# -- what it says ------------------------------------------------------------------------------------

def _checked(document: Any) -> Wanted:
    if not isinstance(document, dict):
        raise UsageError("it must be an object with 'version' and 'objects'")
    _check_names(document, _MEMBERS, "")
    if document.get("version") != 1 or document["version"] is True:
        raise UsageError("'version' must be 1")
    seen: dict[str, str] = {}
    schema = Schema.load()
    objects = [_object(schema, entry, place) for entry, place in _entries(document, "objects", seen)]
    return Wanted(objects, [_clone(entry, place) for entry, place in _entries(document, "clones", seen)])


def _entries(document: dict[str, Any], name: str, seen: dict[str, str]) -> Iterator[tuple[_Entry, str]]:
    """The entries of a list, and where each is; `seen`: the ids before, and where they are."""
    entries = document.get(name, [])
    if not isinstance(entries, list):
        raise UsageError(f"'{name}' must be a list")
    for index, entry in enumerate(entries):
        place = f"{name}[{index}]"
        if not isinstance(entry, _Entry):
            raise UsageError(f"{place} must be an object")
        place = f"line {entry.line}: {place}" if entry.line else place
        object_id = entry.get("id")
        if not isinstance(object_id, str):
            raise UsageError(f"{place}: 'id' must be a string" if "id" in entry else f"{place}: 'id' is missing")
        if object_id in seen:
            raise UsageError(f"{place}: '{object_id}' is there twice, first at {seen[object_id]}")
        seen[object_id] = place
        yield entry, f"{place} ('{object_id}')"


def _check_names(found: Iterable[Any], known: Iterable[str], place: str) -> None:
    known = list(known)
    for name in found:
        if name not in known:
            guess = nearest(str(name), known)
            raise UsageError(f"{place}unknown member '{name}'" + (f"; {guess}" if guess else ""))


def _object(schema: Schema, entry: _Entry, place: str) -> dict[str, Any]:
    """The arguments of object-add, each of its type."""
    qom_type = entry.get("qom-type")
    if qom_type not in schema.object_types:
        guess = nearest(str(qom_type), schema.object_types) if "qom-type" in entry else ""
        raise UsageError(f"{place}: 'qom-type' " + (f"does not accept '{qom_type}'" if "qom-type" in entry else
                                                    "is missing") + (f"; {guess}" if guess else ""))
    declared = schema.properties(qom_type)
    _check_names(entry, declared, f"{place}: ")
    try:
        found = {"qom-type": qom_type, "id": entry["id"]}
        for name in entry.keys() - found.keys():
            found[name] = _value(schema, qom_type, name, entry[name])
        schema.check_object(found)  # nothing is missing
    except QmpError as exc:
        raise UsageError(f"{place}: {exc.desc}") from None
    return {name: found[name] for name in entry}  # in the order of the file


def _value(schema: Schema, qom_type: str, name: str, value: Any) -> Any:
    kind = schema.properties(qom_type)[name].type
    if value is True or value is False:
        if kind == "OnOffAuto":  # YAML reads on and off as these
            value = "on" if value else "off"
    elif isinstance(value, str):
        value = read_word(schema, qom_type, name, value)
    return schema.check_property(qom_type, name, value)


def _clone(entry: _Entry, place: str) -> dict[str, Any]:
    _check_names(entry, _OF_CLONES, f"{place}: ")
    found = {"copy": False, **entry}
    for name, kind in _OF_CLONES.items():
        if type(found.get(name)) is not kind:
            what = "a string" if kind is str else "true or false"
            raise UsageError(f"{place}: '{name}' " + (f"must be {what}" if name in found else "is missing"))
    return found
