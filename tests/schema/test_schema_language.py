"""The QAPI language: what is read, and what is refused with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmemd.qapi.entities import Alternate, Entities, Enum, Object
from gmemd.qapi.load import QapiError, load


def compile_text(directory: Path, text: str, **others: str) -> Entities:
    """Compile `text` as main.json beside other files NAME.json."""
    for name, content in others.items():
        (directory / f"{name}.json").write_text(content)
    main = directory / "main.json"
    main.write_text(text)
    return load(main)


def test_everything_the_language_has(tmp_path: Path) -> None:
    """Comments, pragmas, includes and all kinds of definitions with all their keys are read."""
    entities = compile_text(
        tmp_path,
        """
        # a comment
        { 'pragma': { 'doc-required': false, 'command-name-exceptions': [ 'old_name' ],
                      'command-returns-exceptions': [ 'old_name' ] } }
        { 'include': 'types.json' }
        { 'include': 'types.json' }   # again is harmless
        { 'command': 'old_name', 'returns': 'int', 'allow-preconfig': true, 'gen': false,
          'success-response': false, 'coroutine': true }
        { 'command': 'take', 'data': 'Choice', 'boxed': true, 'returns': [ 'Point' ], 'allow-oob': true,
          'features': [ 'unstable', { 'name': 'f', 'if': 'CONFIG_F' } ], 'if': { 'not': 'CONFIG_X' } }
        { 'event': 'DONE', 'data': { 'x': 'int8', '*y': { 'type': [ 'str' ], 'if': { 'any': [ 'A', 'B' ] },
                                                         'features': [ 'deprecated' ] } } }
        { 'event': 'EMPTY', 'data': {} }
        """,
        types="""
        { 'enum': 'Kind', 'data': [ 'a', { 'name': 'b', 'if': 'CONFIG_B', 'features': [ 'unstable' ] }, '9p' ],
          'prefix': 'KIND' }
        { 'struct': 'Point', 'data': { 'x': 'int', '*next': 'Point' }, 'features': [ 'good' ] }
        { 'struct': 'Named', 'base': 'Point', 'data': { 'name': 'str' }, 'if': { 'all': [ 'A', 'B' ] } }
        { 'union': 'Choice', 'base': { 'kind': 'Kind' }, 'discriminator': 'kind',
          'data': { 'a': 'Point', '9p': { 'type': 'Named', 'if': 'CONFIG_9P' } } }
        { 'alternate': 'Either', 'data': { 'one': 'Point', 'many': [ 'Point' ], 'none': 'null' } }
        """,
    )
    assert list(entities.commands) == ["old_name", "take"]
    assert list(entities.events) == ["DONE", "EMPTY"]
    take = entities.commands["take"]
    assert (take.arg, take.returns, take.allow_oob, take.boxed) == ("Choice", "[Point]", True, True)
    assert [feature.name for feature in take.features] == ["unstable", "f"]
    kind, choice, named = (entities.types[name] for name in ("Kind", "Choice", "Named"))
    assert isinstance(kind, Enum)
    assert [value.name for value in kind.values] == ["a", "b", "9p"]
    assert isinstance(choice, Object)
    assert [(branch.name, branch.type) for branch in entities.branches(choice)] == [
        ("a", "Point"),
        ("9p", "Named"),
        ("b", "q_empty"),
    ]
    assert isinstance(named, Object)
    assert [member.name for member in entities.members(named)] == ["x", "next", "name"]
    assert isinstance(entities.types["Either"], Alternate)
    assert [entity.name for entity in entities.visited][:2] == ["old_name", "take"]  # main file first


def test_documentation(tmp_path: Path) -> None:
    """A block documents the definition after it: overview, members, features, sections."""
    entities = compile_text(
        tmp_path,
        """
##
# = Things
#
# Free text.
##

##
# @make:
#
# Make a thing.  More about it.
#
# @size: how large,
#     in bytes
#
# @name: what it is called
#
# Features:
#
# @unstable: may go
#
# Returns: the thing
#
# Since: 1.0
##
{ 'command': 'make', 'data': { 'size': 'size', 'name': 'str' }, 'returns': 'Thing', 'features': [ 'unstable' ] }
{ 'struct': 'Thing', 'data': {} }
""",
    )
    doc = entities.commands["make"].doc
    assert doc is not None
    assert doc.summary == "Make a thing"
    assert doc.members == {"size": "how large,\nin bytes", "name": "what it is called"}
    assert doc.features == {"unstable": "may go"}
    assert doc.sections == {"Returns": "the thing", "Since": "1.0"}
    assert [free.text for _, free in entities.free_docs] == ["= Things\n\nFree text."]


REFUSED = {
    # the text of files
    "[ 'x' ]": "expected an object at top level",
    "{ 'enum': 'E', 'data': [ 'a', ] }": "expected '{', '[', string, or boolean",
    "{ 'enum': 'E' 'data': [] }": "expected ',' or '}'",
    "{ 'enum': 'E', 'data': [ 'a' 'b' ] }": "expected ',' or ']'",
    "{ 'enum', 'E' }": "expected ':'",
    "{ enum: 'E' }": "stray 'enum'",
    '{ "enum": "E" }': "stray '\"enum\"'",
    "{ 'enum': 'E', 'enum': 'F', 'data': [] }": "duplicate key 'enum'",
    "{ 'enum': 'E', 'data': [ 'a": 'missing terminating "\'"',
    "{ 'enum': 'E\\n', 'data': [] }": "unknown escape \\n",
    "{ 'enum': 'E', 'data': [ 'it\\'s' ] }": "unknown escape \\'",
    "{ 'enum': 'E', 'data': [ 'ü' ] }": "funny character in string",
    "{ 'enum': 'E', 'data': [ 1 ] }": "stray '1'",
    # includes and pragmas
    "{ 'include': 'main.json' }": "inclusion loop for main.json",
    "{ 'include': 'gone.json' }": "can't read schema file",
    "{ 'include': 'x.json', 'y': 'z' }": "invalid 'include' directive",
    "{ 'include': [] }": "value of 'include' must be a string",
    "{ 'pragma': { 'nope': true } }": "unknown pragma 'nope'",
    "{ 'pragma': { 'doc-required': 'yes' } }": "pragma 'doc-required' must be boolean",
    "{ 'pragma': { 'member-name-exceptions': true } }": "must be a list of strings",
    "{ 'pragma': [] }": "value of 'pragma' must be an object",
    # forms
    "{ 'data': 'x' }": "expression must have exactly one key of",
    "{ 'enum': 'E', 'struct': 'S', 'data': [] }": "expression must have exactly one key of",
    "{ 'enum': 'Ee' }": "enum misses key 'data'",
    "{ 'struct': 'Ss', 'data': {}, 'boxed': true }": "struct has unknown key 'boxed'",
    "{ 'command': 'c', 'gen': true }": "flag 'gen' may only use false value",
    "{ 'command': 'c', 'boxed': false, 'data': {} }": "flag 'boxed' may only use true value",
    "{ 'command': 'c', 'boxed': true }": "'boxed': true requires 'data'",
    "{ 'command': 'c', 'allow-oob': true, 'coroutine': true }": "are incompatible",
    "{ 'command': 'c', 'if': 'lower' }": "is not a valid identifier",
    "{ 'command': 'c', 'if': { 'all': [] } }": "is useless",
    "{ 'command': 'c', 'if': { 'all': [ 'A' ], 'not': 'B' } }": "has conflicting keys",
    "{ 'command': 'c', 'if': {} }": "has conflicting keys",
    "{ 'command': 'c', 'features': 'f' }": "'features' of command must be a list",
    "{ 'command': 'c', 'data': [ 'int' ] }": "'data' cannot be an array",
    "{ 'struct': 'Ss', 'data': { 'a': { 'type': 'int', 'default': '1' } } }": "has unknown key 'default'",
    "{ 'struct': 'Ss', 'data': { 'a': [ 'int', 'str' ] } }": "array type must contain single type name",
    "{ 'pragma': { 'gmemd-extensions': true } } { 'struct': 'Ss', 'data': { 'a': { 'type': 'int', 'qom': 'x' } } }": (
        "'qom' of 'data' member 'a' must be an object"
    ),
    # names
    "{ 'struct': 'lower', 'data': {} }": "name of struct must use CamelCase",
    "{ 'struct': 'SList', 'data': {} }": "struct name should not end in 'List'",
    "{ 'command': 'Upper' }": "must not use uppercase or '_'",
    "{ 'command': 'under_score' }": "must not use uppercase or '_'",
    "{ 'event': 'lower' }": "name of event must not use lowercase or '-'",
    "{ 'struct': 'Ss', 'data': { 'has-x': 'int' } }": "uses reserved name",
    "{ 'struct': 'Ss', 'data': { 'u': 'int' } }": "uses reserved name",
    "{ 'struct': 'Ss', 'data': { 'q-x': 'int' } }": "has an invalid name",
    "{ 'enum': 'Ee', 'data': [ 'a b' ] }": "has an invalid name",
    # meanings
    "{ 'enum': 'Ee', 'data': [ 'a-b', 'a_b' ] }": "must not use uppercase or '_'",
    "{ 'enum': 'Ee', 'data': [ 'a', 'a' ] }": "collides with 'a'",
    "{ 'struct': 'Ss', 'data': {} } { 'struct': 'Ss', 'data': {} }": "'Ss' is already defined at",
    "{ 'command': 'int' }": "'int' is already defined at",
    "{ 'struct': 'Ss', 'data': { 'a': 'Nope' } }": "uses unknown type 'Nope'",
    "{ 'struct': 'Ss', 'base': 'Ss', 'data': {} }": "object Ss contains itself",
    "{ 'struct': 'Ss', 'base': 'int', 'data': {} }": "'base' requires a struct type",
    "{ 'struct': 'Aa', 'data': { 'x': 'int' } } { 'struct': 'Bb', 'base': 'Aa', 'data': { 'x': 'int' } }": (
        "'x' collides with 'x'"
    ),
    "{ 'struct': 'Ss', 'data': {}, 'features': [ 'unstable' ] }": "is not supported for types",
    "{ 'command': 'c', 'returns': 'int' }": "'returns' cannot take type 'int'",
    "{ 'command': 'c', 'data': 'int' }": "'data' cannot take type 'int'",
    "{ 'event': 'E', 'data': [ 'int' ] }": "'data' cannot be an array",
    "{ 'alternate': 'Aa', 'data': {} }": "'data' must not be empty",
    "{ 'alternate': 'Aa', 'data': { 'i': 'int', 'n': 'number' } }": "can't be distinguished from 'i'",
    "{ 'alternate': 'Aa', 'data': { 's': 'str', 'b': 'bool' } }": "can't be distinguished from 's'",
    "{ 'alternate': 'Aa', 'data': { 's': 'any' } }": "cannot use type 'any'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refuses_what_qemu_refuses(text: str, tmp_path: Path) -> None:
    """A schema that QEMU's compiler refuses is refused, and the message names file and line."""
    with pytest.raises(QapiError) as caught:
        compile_text(tmp_path, f"# first line\n{text}\n")
    assert str(caught.value).startswith(f"{tmp_path}/main.json:2: ")
    assert REFUSED[text] in str(caught.value)


UNION = "{{ 'enum': 'Kind', 'data': [ 'a', 'b' ] }} {{ 'struct': 'Aa', 'data': {{ 'x': 'int' }} }} {}"
BAD_UNIONS = {
    "{ 'union': 'Uu', 'data': { 'a': 'Aa' } }": "union misses key 'base'",
    "{ 'union': 'Uu', 'base': { 'k': 'Kind' }, 'data': {} }": "union misses key 'discriminator'",
    "{ 'union': 'Uu', 'base': { 'k': 'Kind' }, 'discriminator': 'l', 'data': {} }": "is not a member of 'base'",
    "{ 'union': 'Uu', 'base': { 'k': 'str' }, 'discriminator': 'k', 'data': {} }": "must be of enum type",
    "{ 'union': 'Uu', 'base': { '*k': 'Kind' }, 'discriminator': 'k', 'data': {} }": "must not be optional",
    "{ 'union': 'Uu', 'base': { 'k': { 'type': 'Kind', 'if': 'A' } }, 'discriminator': 'k', 'data': {} }": (
        "must not be conditional"
    ),
    "{ 'union': 'Uu', 'base': { 'k': 'Kind' }, 'discriminator': 'k', 'data': { 'c': 'Aa' } }": (
        "branch 'c' is not a value of 'Kind'"
    ),
    "{ 'union': 'Uu', 'base': { 'k': 'Kind' }, 'discriminator': 'k', 'data': { 'a': 'int' } }": "it is not a struct",
    "{ 'union': 'Uu', 'base': { 'k': 'Kind', 'x': 'int' }, 'discriminator': 'k', 'data': { 'a': 'Aa' } }": (
        "member 'x' collides with 'x'"
    ),
    "{ 'union': 'Uu', 'base': { 'k': 'Kind' }, 'discriminator': 'k', 'data': {} } "
    "{ 'command': 'c', 'data': 'Uu' }": "only with 'boxed': true",
}


@pytest.mark.parametrize("text", BAD_UNIONS)
def test_refuses_bad_unions(text: str, tmp_path: Path) -> None:
    """A union needs a mandatory enum discriminator and struct branches whose members do not collide."""
    with pytest.raises(QapiError) as caught:
        compile_text(tmp_path, UNION.format(text))
    assert BAD_UNIONS[text] in str(caught.value)


DOCS = {
    "##\n# @c:\n##\n{ 'pragma': {} }": (1, "documentation for 'c' is not followed by the definition"),
    "##\n# @d:\n##\n{ 'command': 'c' }": (4, "documentation comment is for 'd'"),
    "##\n# @c:\n#x\n##\n{ 'command': 'c' }": (3, "missing space after #"),
    "##\n# @c:\n{ 'command': 'c' }": (2, "documentation comment must end with '##'"),
    "## x\n# @c:\n##\n": (1, "junk after '##' at start"),
    "##\n# @c:\n## x\n": (3, "junk after '##' at end"),
    "##\n# @c\n##\n{ 'command': 'c' }": (2, "line should end with ':'"),
    "##\n# @:\n##\n": (2, "name required after '@'"),
    "##\n# @c:\n# @x: y\n##\n{ 'command': 'c' }": (3, "documented member 'x' does not exist"),
    "##\n# @c:\n# @x: y\n# @x: z\n##\n{ 'command': 'c' }": (4, "'x' parameter name duplicated"),
    "##\n# @c:\n# Since: 1\n# Since: 2\n##\n{ 'command': 'c' }": (4, "duplicated 'Since' section"),
    "##\n# @E:\n# Returns: x\n##\n{ 'event': 'E' }": (3, "'Returns' section is only valid for commands"),
    "##\n# @c:\n##\n{ 'command': 'c', 'features': [ 'f' ] }": (4, "feature 'f' lacks documentation"),
    "##\n# Free.\n# @x: y\n##\n": (3, "'@x:' not allowed in free-form documentation"),
    "##\n# Free.\n##\n{ 'command': 'c' }": (1, "definition documentation required"),
    "{ 'pragma': { 'doc-required': true } }\n{ 'command': 'c' }": (2, "documentation comment required"),
    "{ 'enum': 'E', ##\n 'data': [] }": (1, "expected string"),
}


@pytest.mark.parametrize("text", DOCS)
def test_refuses_bad_documentation(text: str, tmp_path: Path) -> None:
    """Documentation that does not fit its definition is refused where it stands."""
    with pytest.raises(QapiError) as caught:
        compile_text(tmp_path, text)
    line, message = DOCS[text]
    assert caught.value.where.line == line
    assert message in caught.value.text


def test_errors_in_included_files_name_them(tmp_path: Path) -> None:
    """The file named is the one that is wrong."""
    with pytest.raises(QapiError, match=r"other\.json:2: stray '1'"):
        compile_text(tmp_path, "{ 'include': 'other.json' }", other="\n1\n")


def test_extensions_need_their_pragma(tmp_path: Path) -> None:
    """Defaults, branch defaults, booleans for on and off and QOM descriptions are read under the pragma."""
    entities = compile_text(
        tmp_path,
        """
        { 'pragma': { 'gmemd-extensions': true } }
        { 'enum': 'OnOff', 'data': [ 'on', 'off' ] }
        { 'struct': 'Aa', 'data': { '*n': { 'type': 'int', 'default': '7', 'qom': { 'description': 'it\\'s' } },
                                    '*o': { 'type': 'OnOff', 'default': 'off', 'accepts-bool': true } } }
        { 'union': 'Uu', 'base': { 'k': 'OnOff' }, 'discriminator': 'k',
          'data': { 'on': { 'type': 'Aa', 'defaults': { 'n': '8' } } } }
        """,
    )
    kind, union = entities.types["Aa"], entities.types["Uu"]
    assert isinstance(kind, Object)
    assert isinstance(union, Object)
    number, switch = kind.members
    assert (number.default, number.qom_description, switch.accepts_bool) == ("7", "it's", True)
    assert union.branches[0].defaults == {"n": "8"}
    look = "{ 'command': 'look', 'reads-only': true }"
    assert compile_text(tmp_path, f"{{ 'pragma': {{ 'gmemd-extensions': true }} }} {look}").commands["look"].reads_only
    with pytest.raises(QapiError, match="command has unknown key 'reads-only'"):
        compile_text(tmp_path, look)
    look = "{ 'pragma': { 'gmemd-extensions': true } } { 'command': 'look', 'role': 'tenant' }"
    assert compile_text(tmp_path, look).commands["look"].role == "tenant"
    with pytest.raises(QapiError, match="'role' must be one of: observer, member, tenant, operator, admin"):
        compile_text(tmp_path, look.replace("tenant", "king"))
