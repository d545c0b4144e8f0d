"""A policy file: TOML, read whole or refused whole, with the line of what is wrong and the nearest right name.

policy.json is its schema. The file says who is trusted, so it must be written by nobody but root or gmemd's own user.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import filter as like
from typing import Any, Final, NoReturn

import jsonschema

from gmemd.authority.policy import Policy, Rule
from gmemd.authority.rights import Rights, Role
from gmemd.errors import QmpError, os_errors
from gmemd.schema.sizes import parse_size
from gmemd.schema.validate import Schema

_ALWAYS: Final = frozenset(("qmp_capabilities", "query-memdev-rights"))  # of everybody who is let in
_SCHEMA: Final = os.path.join(os.path.dirname(__file__), os.pardir, "schema", "policy.json")
_MAX: Final = 1 << 20  # bytes of a file

Place = tuple[str | int, ...]  # in the document


def read_policy(path: str, schema: Schema) -> Policy:
    """The policy in a file; QmpError, with the line, if any of it is wrong."""
    return _Reading(path, _contents(path), schema).policy()


def _contents(path: str) -> str:
    with os_errors(f"cannot read policy '{path}'"), open(path, "rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(_MAX + 1)
    if not stat.S_ISREG(status.st_mode) or len(data) > _MAX:
        raise QmpError(f"policy '{path}' is not a file of at most 1 MiB")
    if status.st_uid not in (0, os.geteuid()):
        raise QmpError(f"policy '{path}' is owned by uid {status.st_uid}, not by root or gmemd's own user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise QmpError(f"policy '{path}' may be written by others: its mode is {stat.S_IMODE(status.st_mode):04o}")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise QmpError(f"policy '{path}' is not UTF-8 text") from exc


class _Reading:
    """One file being read."""

    def __init__(self, path: str, text: str, schema: Schema) -> None:
        self._path = path
        self._text = text
        self._schema = schema
        try:
            self._document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            where = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(exc))
            said, line = (where[1], where[2]) if where else (str(exc), None)
            raise QmpError(f"{path}:{line or len(text.splitlines())}: {said}") from exc

    def policy(self) -> Policy:
        with open(_SCHEMA, encoding="utf-8") as file:
            form = json.load(file)
        error = next(jsonschema.Draft202012Validator(form).iter_errors(self._document), None)
        if error is not None:
            self._explain(error)
        rules = self._document.get("rule", [])
        names = [rule["name"] for rule in rules]
        for number, name in enumerate(names):
            if name in names[:number]:
                self._refuse(("rule", number, "name"), f"a rule is named '{name}' already")
        default = {"name": "", "match": {}, "role": "none", **self._document.get("default", {})}
        return Policy(tuple(self._rule(rule, ("rule", number)) for number, rule in enumerate(rules)),
                      self._rule(default, ("default",)))

    # -- rules

    def _rule(self, rule: Mapping[str, Any], place: Place) -> Rule:
        role = Role.of(rule["role"])
        match = {key: tuple(self._resolved(key, _listed(rule["match"][key]), (*place, "match", key)))
                 for key in rule["match"]}
        if "http" in match and (len(match) > 1 or role not in (Role.NONE, Role.OBSERVER)):
            self._refuse((*place, "match", "http"), "'http' stands alone, and its role is observer or none")
        if ("namespace" in match) != (role is Role.MEMBER) and not ("namespace" in match and role is Role.NONE):
            self._refuse((*place, "role"), "the role of the clients of made rooms, matched by 'namespace', is member or"
                                           " none, and nobody else's is member")
        if "namespace" in match and len(match) > 1:
            self._refuse((*place, "match", "namespace"), "'namespace' stands alone")
        types = None if "types" not in rule else frozenset(
            self._names(rule, "types", self._schema.object_types, "object type", place))
        paths = None if role is Role.ADMIN and "paths" not in rule else tuple(
            os.path.normpath(path) for path in rule.get("paths", ()))
        rights = Rights(role, rule=rule["name"], commands=self._commands(rule, role, place), types=types, paths=paths,
                        limits=self._limits(rule, place))
        return Rule(match, rights, rule.get("share") == "rule")

    def _commands(self, rule: Mapping[str, Any], role: Role, place: Place) -> frozenset[str]:
        commands = self._schema.commands
        own = {name for name, command in commands.items() if Role.of(command.role) <= role}
        added = set(self._names(rule, "allow", commands, "command", place))
        changing = sorted(added - self._schema.reading)
        if role <= Role.OBSERVER and changing:
            self._refuse((*place, "allow"), f"an observer only reads, and '{changing[0]}' changes something")
        return frozenset(own | added) - set(self._names(rule, "deny", commands, "command", place)) | _ALWAYS

    def _names(self, rule: Mapping[str, Any], key: str, known: Iterable[str], what: str, place: Place) -> Iterator[str]:
        """The known names that the words of a rule mean, which may be patterns."""
        for word in _listed(rule.get(key, [])):
            found = like(known, word)
            if not found:
                self._refuse((*place, key), f"unknown {what} '{word}'{_nearest(word, known)}")
            yield from found

    def _resolved(self, key: str, wanted: Sequence[Any], place: Place) -> Iterator[Any]:
        """Users and groups as numbers, anything else as it is."""
        for one in wanted:
            if key in ("uid", "gid", "group") and isinstance(one, str):
                try:
                    yield pwd.getpwnam(one).pw_uid if key == "uid" else grp.getgrnam(one).gr_gid
                except KeyError:
                    users = [entry.pw_name for entry in pwd.getpwall()]
                    groups = [entry.gr_name for entry in grp.getgrall()]
                    what, known = ("user", users) if key == "uid" else ("group", groups)
                    self._refuse(place, f"unknown {what} '{one}'{_nearest(one, known)}")
            else:
                yield one

    def _limits(self, rule: Mapping[str, Any], place: Place) -> Mapping[str, int]:
        limits = {}
        for name, value in rule.get("limits", {}).items():
            limit = value if isinstance(value, int) else parse_size(value.removesuffix("iB"))
            if limit is None:
                self._refuse((*place, "limits", name), f"'{value}' is not a size such as '64GiB'")
            limits[name] = limit
        return limits

    # -- refusals

    def _explain(self, error: jsonschema.ValidationError) -> NoReturn:
        """Refuse what does not have the form that policy.json describes."""
        place = tuple(error.absolute_path)
        value: Any = error.instance
        form: Any = error.schema
        known = list(form.get("properties", ()))
        match error.validator:
            case "additionalProperties":
                name = next(name for name in value if name not in known and not any(
                    re.search(pattern, name) for pattern in form.get("patternProperties", ())))
                self._refuse((*place, name), f"unknown key '{name}'{_nearest(name, known)}")
            case "required":
                name = next(name for name in form["required"] if name not in value)
                self._refuse(place, f"'{name}' is missing")
            case "minProperties":
                self._refuse(place, f"'{place[-1]}' is empty")
            case "enum":
                right = form["enum"]
                self._refuse(place, f"{_shown(value)} is not one of {', '.join(right)}{_nearest(str(value), right)}")
        key = next((key for key in reversed(place) if isinstance(key, str)), "")
        right = f", which is {form['description']}" if "description" in form else ""
        self._refuse(place, f"{_shown(value)} is not a value of '{key}'{right}")

    def _refuse(self, place: Place, why: str) -> NoReturn:
        rule = "" if place[:1] != ("rule",) or len(place) < 2 else self._title(int(place[1]))
        raise QmpError(f"{self._path}:{self._line(place)}: {rule}{why}")

    def _title(self, number: int) -> str:
        name = self._document["rule"][number].get("name")
        return f"rule '{name}': " if isinstance(name, str) else f"rule {number + 1}: "

    def _line(self, place: Place) -> int:
        """The line in which what stands at a place of the document begins.

        tomllib does not say. It is the line after which the file, cut there, for the first time has the place.
        """
        lines, whole = self._text.splitlines(keepends=True), 0
        for count in range(1, len(lines) + 1):
            with contextlib.suppress(tomllib.TOMLDecodeError):  # within a value of several lines
                if _is_there(tomllib.loads("".join(lines[:count])), place):
                    break
                whole = count
        return whole + 1


def _is_there(document: Any, place: Place) -> bool:
    for key in place:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
