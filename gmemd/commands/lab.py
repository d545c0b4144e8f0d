"""The commands of the fault lab; they exist only if gmemd was started with --lab."""

from __future__ import annotations

import errno
from typing import Any

from gmemd.changes.change import Change
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import QmpError
from gmemd.lab import HALFWAY, Injection, Lab


def _lab(gmemd: Gmemd) -> Lab:
    assert gmemd.lab is not None
    return gmemd.lab


def x_memdev_inject(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    code, offset, operation = _code(arguments.get("errno")), arguments.get("offset"), arguments["operation"]
    if arguments["nth"] == 0:
        raise QmpError("parameter 'nth' counts from 1")
    if offset is not None and operation not in HALFWAY:
        raise QmpError(f"parameter 'offset' is for {' and '.join(HALFWAY)} only")
    if offset is not None and operation == "convert":
        if code not in (None, errno.EAGAIN):
            raise QmpError("a conversion that stops at an offset fails with EAGAIN")
        code = errno.EAGAIN
    if code is None and offset is not None:
        raise QmpError("parameter 'offset' needs 'errno'")
    if code is None and not arguments["delay"]:
        raise QmpError("one of 'errno', 'offset' and 'delay' is needed")
    change.judged()
    number = _lab(gmemd).inject(operation, nth=arguments["nth"], code=code, seconds=arguments["delay"] / 1000,
                                offset=offset, repeat=arguments["repeat"])
    return {"injection": number}


def x_memdev_inject_clear(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any],
                          change: Change) -> dict[str, Any]:
    change.judged()
    number = arguments.get("injection")
    if not _lab(gmemd).clear(number):
        raise QmpError(f"unknown injection {number}")
    return {}


def x_query_memdev_injections(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [_describe(injection) for injection in _lab(gmemd).injections()]


def _code(name: str | None) -> int | None:
    """The errno with a name such as ENOMEM."""
    if name is None:
        return None
    code = getattr(errno, name, None)
    if not isinstance(code, int):
        raise QmpError(f"unknown errno '{name}'")
    return code


def _describe(injection: Injection) -> dict[str, Any]:
    entry: dict[str, Any] = {"injection": injection.number, "operation": injection.operation, "nth": injection.nth,
                             "delay": round(injection.seconds * 1000), "repeat": injection.repeat,
                             "seen": injection.seen, "struck": injection.struck}
    if injection.code is not None:
        entry["errno"] = errno.errorcode[injection.code]
    if injection.offset is not None:
        entry["offset"] = injection.offset
    return entry
