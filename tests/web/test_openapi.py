"""Every route keeps what /openapi.json says of it, and that is derived from the QAPI schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from gmemd.schema.validate import Schema
from gmemd.web.openapi import document
from gmemd.web.routes import ROUTES
from tests.web.site import Site

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
          negative_data_rejection, positive_data_acceptance, unsupported_method]
DOCUMENT = document(Schema.load(), ROUTES, "test")
# A stream does not end, so that its answer cannot be judged as a whole; its refusals are tested with the page.
api = schemathesis.openapi.from_dict(DOCUMENT).exclude(path="/live")
_site: list[Site] = []


@pytest.fixture(scope="module", autouse=True)
def served(tcp_site: Site) -> Iterator[None]:
    """The site that the cases are sent to: generated tests take no fixtures."""
    _site.append(tcp_site)
    yield
    _site.clear()


@api.parametrize()
@settings(max_examples=12, deadline=None, database=None, derandomize=True,
          phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
def test_routes_keep_their_description(case: Any) -> None:
    """Allowed parameters are accepted, others refused with a 4xx; answers have the type that is described."""
    case.call_and_validate(base_url=f"http://127.0.0.1:{_site[0].port}", checks=CHECKS)


def test_the_served_document_is_this_one(tcp_site: Site) -> None:
    """But for the version."""
    served = tcp_site.get("/openapi.json").json
    assert {**served, "info": 0} == {**DOCUMENT, "info": 0}
    assert served["openapi"] == "3.1.0"


def test_types_are_the_schemas_own() -> None:
    """A type of the QAPI schema is the same here, without our annotations."""
    own = Schema.load().document["$defs"]["MemdevRange"]
    here = DOCUMENT["components"]["schemas"]["MemdevRange"]
    assert own["required"] == here["required"]
    assert own["description"] == here["description"]
    assert "x-" not in json.dumps(here).replace("x-qapi", "")


@pytest.mark.parametrize("name", ["ObjectPage", "MemoryObject", "RangePage", "HolderPage", "RecentEvent", "JobInfo"])
def test_every_type_is_a_schema(name: str) -> None:
    """All references lead somewhere, and the types are valid JSON Schema."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][name])
    assert not jsonschema.Draft202012Validator(schema).is_valid({"no": "such"})


def test_answers_are_of_their_types(tcp_site: Site) -> None:
    """What the objects in the daemon look like, against the document."""
    for path, name in (("/api/v1/objects", "ObjectPage"), ("/api/v1/objects/cvm0", "MemoryObject"),
                       ("/api/v1/objects/cvm0/ranges?limit=1", "RangePage"), ("/api/v1/holders", "HolderPage")):
        schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
        jsonschema.validate(tcp_site.get(path).json, schema, cls=jsonschema.Draft202012Validator)
