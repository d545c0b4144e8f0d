"""`--object help` and `--object TYPE,help`, in QEMU's layout."""

from __future__ import annotations

from gmemd.schema.keyval import has_bad_id, split
from gmemd.schema.validate import Schema

_WIDTH = 22  # of NAME=<TYPE>, where it fits
_HELP = ("help", "?")


def object_help(spec: str, schema: Schema | None = None) -> str | None:
    """The help that an --object asks for, None if it asks for none or is wrong."""
    if spec.startswith("{"):
        return None
    pairs = split(spec)
    if has_bad_id(pairs):
        return None
    schema = schema or Schema.load()
    types = [value for key, value in pairs if key == "qom-type"]
    if types and types[-1] in _HELP:
        return object_types_help(schema)
    if types and types[-1] in schema.object_types and any(key in _HELP for key, _ in pairs):
        return object_properties_help(types[-1], schema)
    return None


def object_types_help(schema: Schema | None = None) -> str:
    """The list of types, without a newline at the end."""
    types = sorted((schema or Schema.load()).object_types)
    return "\n".join(["List of user creatable objects:", *(f"  {name}" for name in types)])


def object_properties_help(qom_type: str, schema: Schema | None = None) -> str:
    """The list of a type's properties, without a newline at the end; KeyError if there is none."""
    properties = (schema or Schema.load()).properties(qom_type)
    lines = []
    for member in properties.values():
        if member.name not in ("qom-type", "id"):
            what = f"{member.name}=<{member.qom_type}>"
            lines.append(f"  {what:<{_WIDTH}} - {member.description}" if member.description else f"  {what}")
    return "\n".join([f"{qom_type} options:", *sorted(lines)])
