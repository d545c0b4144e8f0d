"""gmemd schema compile DIR: other people's QAPI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gmemd.errors import QmpError
from gmemd.qapi.compile import main
from gmemd.schema.accept import Shapes
from gmemd.schema.explain import Judge

OTHER = """
{ 'enum': 'Mode', 'data': [ 'fast', { 'name': 'safe', 'features': [ 'unstable' ] } ] }
{ 'struct': 'Node', 'data': { '*children': [ 'Node' ], 'weight': 'number', 'old': 'null' } }
{ 'alternate': 'NodeOrName', 'data': { 'name': 'str', 'node': 'Node' } }
{ 'command': 'walk', 'data': { 'from': 'NodeOrName', '*mode': 'Mode', '*opaque': 'any' } }
{ 'command': 'walk-win', 'if': 'CONFIG_WIN32' }
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree as QEMU's: qapi/qapi-schema.json in it."""
    (tmp_path / "qapi").mkdir()
    (tmp_path / "qapi" / "qapi-schema.json").write_text(OTHER)
    return tmp_path


def compiled(capsys: Any, *arguments: str) -> Any:
    assert main(["compile", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_schema_of_a_tree(tree: Path, capsys: Any) -> None:
    """The JSON Schema of any QAPI schema checks its commands; recursion and alternates included."""
    document = compiled(capsys, str(tree))
    jsonschema.Draft202012Validator.check_schema(document)
    check = jsonschema.Draft202012Validator(document).is_valid
    leaf: dict[str, Any] = {"weight": 1.5, "old": None}
    rights: list[Any] = ["a", leaf, leaf | {"children": [leaf | {"children": []}]}]
    for start in rights:
        assert check({"execute": "walk", "arguments": {"from": start, "mode": "safe", "opaque": [{}]}})
    wrongs: list[Any] = [1, {}, leaf | {"children": [{}]}, leaf | {"more": 1}]
    for start in wrongs:
        assert not check({"execute": "walk", "arguments": {"from": start}})
    assert not check({"execute": "walk"})
    assert document["$defs"]["Mode"]["x-unstable-values"] == ["safe"]


def test_introspection_of_a_tree(tree: Path, capsys: Any) -> None:
    """--introspect prints what the tree's QEMU would answer, -D chooses what is built."""
    names = [entry["name"] for entry in compiled(capsys, str(tree / "qapi"), "--introspect")]
    assert names[:2] == ["walk", "walk-win"]
    answer = compiled(capsys, str(tree), "--introspect", "-D", "CONFIG_POSIX", "--unmask")
    assert [entry["name"] for entry in answer][:2] == ["walk", "q_obj_walk-arg"]


def test_alternates_are_explained(tree: Path, capsys: Any) -> None:
    """A value that fits no branch is refused with the alternate's name, as in QEMU."""
    judge = Judge(Shapes(compiled(capsys, str(tree)), reject_unstable=False))
    with pytest.raises(QmpError, match="Invalid parameter type for 'from', expected: NodeOrName"):
        judge.check("walk", {"from": 1})
    assert judge.check("walk", {"from": "a"}) == {"from": "a"}


def test_wrong_schemas_are_refused(tmp_path: Path, capsys: Any) -> None:
    """The message names file and line, the exit status is 1."""
    (tmp_path / "qapi-schema.json").write_text("\n{ 'command': 'Bad' }\n")
    assert main(["compile", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"{tmp_path}/qapi-schema.json:2: command 'Bad': name of command must not use uppercase or '_'\n"
    )
    assert main(["compile", str(tmp_path / "nowhere")]) == 1
    assert "can't read schema file" in capsys.readouterr().err
