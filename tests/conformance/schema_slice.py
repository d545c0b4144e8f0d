"""Cut one command or event out of a query-qmp-schema answer, so that two servers can be compared.

Type names mean nothing there, so every name is replaced by the type itself.
Of the unions and enums over all object types only the types of the slice are kept.
"""

from __future__ import annotations

from typing import Any

OBJECT_TYPES = ("memory-backend-file", "memory-backend-memfd", "memory-backend-ram", "memory-backend-shm")
Entity = dict[str, Any]


def schema_slice(schema: list[Entity], name: str) -> Entity | None:
    """Describe command or event `name` without any type names; None if it does not exist."""
    entities = {entity["name"]: entity for entity in schema}
    if name not in entities:
        return None
    entity = entities[name]
    out = {"meta-type": entity["meta-type"], **_features(entity)}
    if "allow-oob" in entity:
        out["allow-oob"] = entity["allow-oob"]
    out.update((key, _type(entities, entity[key], ())) for key in ("arg-type", "ret-type") if key in entity)
    return out


def _features(entity: Entity) -> Entity:
    return {"features": sorted(entity["features"])} if entity.get("features") else {}


def _type(entities: dict[str, Entity], name: str, above: tuple[str, ...]) -> Entity:
    entity = entities[name]
    out = {"meta-type": entity["meta-type"], **_features(entity)}
    if name in above:
        return {"recursive": True}

    def inner(type_name: str) -> Entity:
        return _type(entities, type_name, (*above, name))

    match entity["meta-type"]:
        case "builtin":
            out |= {"name": name, "json-type": entity["json-type"]}
        case "enum":
            out |= _enum(entity)
        case "array":
            out["element-type"] = inner(entity["element-type"])
        case "alternate":
            out["members"] = [inner(member["type"]) for member in entity["members"]]
        case "object":
            out["members"] = [
                {"name": member["name"], "type": inner(member["type"]), **_features(member),
                 **({"default": member["default"]} if "default" in member else {})}
                for member in entity["members"]]
            if "tag" in entity:
                out["tag"] = entity["tag"]
                out["variants"] = {variant["case"]: inner(variant["type"]) for variant in entity["variants"]
                                   if entity["tag"] != "qom-type" or variant["case"] in OBJECT_TYPES}
    return out


def _enum(entity: Entity) -> Entity:
    """Values and members of an enum."""
    values = entity["values"]
    if "memory-backend-memfd" in values:
        values = [value for value in values if value in OBJECT_TYPES]
    members = [{"name": member["name"], **_features(member)}
               for member in entity.get("members", ()) if member["name"] in values]
    return {"values": values, **({"members": members} if "members" in entity else {})}
