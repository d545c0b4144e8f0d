"""QEMU 11.1's reading of JSON: values, errors, positions, recovery; however the bytes are cut."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gmemd.errors import GENERIC_ERROR, QmpError
from gmemd.qmp.stream import NEED_DATA, Stream
from tests.qmp.streams import Maker, SlowStream, cut, drain, each_way, exactly, read

QUERY = b'{"execute":"query-version"}'
VALUE = {"execute": "query-version"}


both = pytest.mark.parametrize("make", [Stream, SlowStream])


# Values


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("9223372036854775807", (1 << 63) - 1),
        ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", 2.0**64),
        ("-9223372036854775808", -(1 << 63)),
        ("-9223372036854775809", -(2.0**63)),
        ("1" + "0" * 400, math.inf),
        ("1" + "0" * 5000, math.inf),  # more digits than int() takes
        ("1.0", 1.0),
        ("-0.0", -0.0),
        ("1e2", 100.0),
        ("1E+2", 100.0),
        ("5e-1", 0.5),
        ("0.0e1", 0.0),
        ("1e400", math.inf),
        ("-1e400", -math.inf),
        ("true", True),
        ("false", False),
        ("null", None),
        (r'"\b\f\n\r\t\"\'\\\/"', "\b\f\n\r\t\"'\\/"),
        (r"'it\'s \"'", "it's \""),
        ("'a\"b'", 'a"b'),
        (r'"\u0000\u00e9\uD83D\uDE00\uFFFD"', "\0é😀\ufffd"),
        ('"é€😀\x7f"', "é€😀\x7f"),
        ("[]", []),
        ("{ }", {}),
    ],
)
def test_values(literal: str, value: Any) -> None:
    """Integers are 64 bits wide, signed or else unsigned, and double beyond; strings are unescaped."""
    data = b'{"id":%b}' % literal.encode()
    assert exactly([{"id": value}]) == exactly(each_way(data))
    assert exactly([{"id": [value]}]) == exactly(each_way(b'{"id":[ %b ]}' % literal.encode()))


def test_overlong_nul_is_nul() -> None:
    """C0 80 is the one overlong form that is read."""
    assert each_way(b'{"id":"\xc0\x80"}') == [{"id": "\0"}]


def test_members_keep_the_order_of_the_text() -> None:
    """Which member comes first matters later on, so it stays."""
    assert list(each_way(b'{"b":1,"a":2,"c":3}')[0]) == ["b", "a", "c"]


@pytest.mark.parametrize("top", [b"1 ", b"true\n", b"'x'", b'"x"', b"[{}]", b"null,"[:4] + b" ", b"2.5\t"])
def test_any_value_is_a_message(top: bytes) -> None:
    """That a message must be an object is not the reader's rule."""
    value = json.loads(top.replace(b"'", b'"'))
    assert exactly([value, VALUE]) == exactly(each_way(top + QUERY))


# Framing


def test_messages_need_no_lines() -> None:
    """A message ends with its last bracket: none, one or many on a line."""
    assert each_way(QUERY + QUERY + b"\r\n\r\n" + QUERY.replace(b":", b"\n:\r\t ") + QUERY) == [VALUE] * 4


@pytest.mark.parametrize("after", [b"", b"\n", b"\r\n", b" ", b"}", b"?", b"\n\n", b"\n}", b"\r", b"\x1b", b"\xe9",
                                   b"1", b"{"])
def test_what_follows_a_message_is_read(after: bytes) -> None:
    """A message alone in its chunk, with a line feed or without, and one with more behind it."""
    got = each_way(QUERY + after + b"\x1b\n" + QUERY)
    pieces = read(QUERY + after, b"\x1b\n" + QUERY)
    assert exactly(got) == exactly(pieces) == exactly(read(QUERY + after, b"\x1b\n" + QUERY, make=SlowStream))
    assert (got[0], got[-1]) == (VALUE, VALUE)


@pytest.mark.parametrize("word", [b"12", b"-1", b"1.5", b"1e5", b"0", b"true", b"null"])
@both
def test_numbers_and_words_end_with_the_next_byte(word: bytes, make: Maker) -> None:
    """A number or bare word is not complete until another byte follows, which is then read for itself."""
    stream = make()
    stream.feed(word)
    assert stream.next() is NEED_DATA
    stream.feed(QUERY)
    assert exactly([json.loads(word), VALUE]) == exactly(list(drain(stream)))


@both
def test_next_gives_one_message_at_a_time(make: Maker) -> None:
    """What is not asked for stays, and what is fed meanwhile queues behind it."""
    stream = make()
    stream.feed(b'{"a":1}{"b":2}{"c"')
    assert stream.next() == {"a": 1}
    stream.feed(b":")
    stream.feed(b"")
    stream.feed(b"3}?")
    assert list(drain(stream)) == [{"b": 2}, {"c": 3}, "!1:22: JSON parse error, stray '?'"]


@both
def test_blank_input_gives_nothing(make: Maker) -> None:
    """White space alone is neither a message nor an error."""
    assert read(b"", b" \t\r\n", b"", b"\n", make=make) == []


# Errors and recovery; each line is: input, errors (the text behind "JSON parse error, " with its position), values

ERRORS: list[tuple[bytes, list[str]]] = [
    # grammar
    (b"}", ["1:1 expecting value"]),
    (b"]", ["1:1 expecting value"]),
    (b",", ["1:1 expecting value"]),
    (b":", ["1:1 expecting value"]),
    (b"[1,]", ["1:4 expecting value"]),
    (b"[,1]", ["1:2 expecting value"]),
    (b'{"a":}', ["1:6 expecting value"]),
    (b'{"a":1,}', ["1:8 expecting key"]),
    (b"{a:1}", ["1:2 expecting key"]),
    (b"{1:2}", ["1:2 expecting key"]),
    (b"{[]:2}", ["1:2 expecting key"]),
    (b"{,}", ["1:2 expecting key"]),
    (b'{"a" 1}', ["1:6 expecting ':'"]),
    (b'{"a"}', ["1:5 expecting ':'"]),
    (b"[1 2]", ["1:4 expected ',' or ']'"]),
    (b"[1:2]", ["1:4 expected ',' or ']'"]),
    (b'{"a":1 "b":2}', ["1:8 expected ',' or '}'"]),
    (b'{"a":"x"]', ["1:9 expected ',' or '}'"]),
    (b"foo bar ", ["1:1 invalid keyword 'foo'", "1:5 invalid keyword 'bar'"]),
    (b"[nul]", ["1:2 invalid keyword 'nul'"]),
    # the same key twice: when the second value is complete, at its last token
    (b'{"a":1,"a":2}', ["1:12 duplicate key"]),
    (b'{"a":1,"\\u0061":{"b":[]}}', ["1:24 duplicate key"]),
    (b'{"x":{"a":1,"b":2,"a":[{}]}}', ["1:26 duplicate key"]),
    (b'{"a":1,"a":?', ["1:12 stray '?'"]),
    # lexical
    (b"01", ["1:1 stray '01'"]),
    (b"-01", ["1:1 stray '-01'"]),
    (b"-x", ["1:1 stray '-x'"]),
    (b"1.x", ["1:1 stray '1.x'"]),
    (b"1e+\n", ["1:1 stray '1e+\n'"]),
    (b"+1", ["1:1 stray '+'"]),
    (b'"abc\n', ["1:1 stray '\"abc\n'"]),
    (b'"a\\\n', ["1:1 stray '\"a\\\n'"]),
    (b"\x0b", ["1:1 stray '\x0b'"]),
    (b"\xef\xbb\xbf", ["1:1 stray '\ufffd'"]),  # a BOM
    (b'"\xe2\x82\xac\xe2\x82\xff', ["1:1 stray '\"€\ufffd\ufffd'"]),
    (b'"a\0', ["1:1 stray '\"a'"]),  # quoted as far as the NUL
    # in strings, the first fault counts
    (rb'"\a \u12"', ["1:1 invalid escape sequence in string"]),
    (b'"\\\xc3\xa9"', ["1:1 invalid escape sequence in string"]),
    (rb'"\u12"', ['1:1 \\u12" is not a valid Unicode character']),
    (rb'"\uzzzz"', ["1:1 \\uzzzz is not a valid Unicode character"]),
    (rb'"\ud800"', ["1:1 \\ud800 is not a valid Unicode character"]),
    (rb'"\ud800\u0041"', ["1:1 \\ud800 is not a valid Unicode character"]),
    (rb'"\udc00\ud800"', ["1:1 \\udc00 is not a valid Unicode character"]),
    (rb'"\ud83f\udfff"', ["1:1 \\ud83f\\udfff is not a valid Unicode character"]),
    (rb'"\uFDD0"', ["1:1 \\uFDD0 is not a valid Unicode character"]),
    (b'"\\u00\xe2\x82\xac"', ["1:1 \\u00\ufffd is not a valid Unicode character"]),
    (b'"\xe9"', ["1:1 invalid UTF-8 sequence in string"]),
    (b'"\xed\xa0\x80"', ["1:1 invalid UTF-8 sequence in string"]),
    (b'"\xef\xbf\xbf"', ["1:1 invalid UTF-8 sequence in string"]),
    (b'"\xc0\x80\x80"', ["1:1 invalid UTF-8 sequence in string"]),
    (b'{"\xff', ["1:2 stray '\"\ufffd'"]),
    # only strings that are used are checked
    (rb'[1 "\q"]', ["1:4 expected ',' or ']'"]),
    # positions
    (b"\n\n  foo ", ["3:3 invalid keyword 'foo'"]),
    (b'{"a":1,\n"b":"c",\r\n\t}', ["3:2 expecting key"]),
    (b'"\xc3\xa9" ?', ["1:6 stray '?'"]),
    # one column too far right behind a number, a bare word or an error skip
    (b"[1}", ["1:4 expected ',' or ']'"]),
    (b"[1 }", ["1:4 expected ',' or ']'"]),
    (b"[true}", ["1:7 expected ',' or ']'"]),
    (b'["a"}', ["1:5 expected ',' or ']'"]),
    (b"1?", ["1:3 stray '?'"]),
    (b"?}", ["1:1 stray '?'", "1:3 expecting value"]),
    (b"? }", ["1:1 stray '?'", "1:4 expecting value"]),
    (b"?\n}", ["1:1 stray '?'", "2:1 expecting value"]),
    (b"?: }", ["1:1 stray '?'", "1:3 expecting value", "1:4 expecting value"]),
    (b"\xff\xff", ["1:1 stray '\ufffd'", "1:3 stray '\ufffd'"]),
    # recovery ends at brackets, colons, commas, control characters but the tab, and FE, FF
    (b"?a1 '\"\t\xfd~,", ["1:1 stray '?'", "1:11 expecting value"]),
    (b"?a\x01?", ["1:1 stray '?'", "1:4 stray '\x01'"]),
    (b"?a\xfe", ["1:1 stray '?'", "1:4 stray '\ufffd'"]),
    # after a grammar error tokens are skipped until braces and brackets are balanced, each kind for itself
    (b'{"a":[}]', ["1:7 expecting value"]),
    (b"{] }", ["1:2 expecting key", "1:4 expecting value"]),
    (b"[} ]", ["1:2 expecting value", "1:4 expecting value"]),
    (b"[[}}]]", ["1:3 expecting value", "1:4 expecting value", "1:5 expecting value", "1:6 expecting value"]),
    (b"[1 2 {]} foo ", ["1:4 expected ',' or ']'", "1:10 invalid keyword 'foo'"]),
    (rb'{1: "\q" bad {"x":[]}, 2 }', ["1:2 expecting key"]),
    # a lexical error ends the skip, unreported
    (b"[1 2 ? ] ", ["1:4 expected ',' or ']'", "1:9 expecting value"]),
]


@pytest.mark.parametrize(("data", "errors"), ERRORS)
def test_errors(data: bytes, errors: list[str]) -> None:
    """Each error has QEMU 11.1's words and place, and after a control character all is well again."""
    want = ["!{}: JSON parse error, {}".format(*error.split(" ", 1)) for error in errors]
    got = each_way(data + b"\n" + b"\x1b\n" + QUERY)
    assert got[-1] == VALUE
    assert want == [value for value in got if isinstance(value, str) and value[0] == "!" and "\x1b" not in value]


@pytest.mark.parametrize(
    ("data", "errors", "values"),
    [
        (b"}}false ", 2, 1),
        (b"{ 'abc' }false ", 1, 1),
        (b"[ 'abc', ]false ", 1, 1),
        (b"[{'a']}false ", 1, 1),
        (b"[{'a']}[{'a']}false ", 2, 1),
        (b"\f{}", 1, 1),
        (b"\f[]", 1, 1),
        (b"\f:false ", 2, 1),
        (b"\f,false ", 2, 1),
        (b"\ffalse ", 1, 0),
        (b"\f'str'", 1, 0),
        (b'\f"str"', 1, 0),
        (b"{[{\f{}", 1, 1),
        (b"{[{\f:false ", 2, 1),
        (b"{[{\ffalse ", 1, 0),
        (b"{'a':[{\f[]", 1, 1),
        (b"\0{}", 1, 1),
        (b"{]", 1, 0),
        (b"{\xff", 1, 0),
        (b"{'bad \xff", 1, 0),
        (b"%p\n", 1, 0),
    ],
)
def test_counts_of_qemus_own_tests(data: bytes, errors: int, values: int) -> None:
    """As in QEMU's check-json-parser and qmp-test (reference qmp.md section 15, 3, 27 and 28)."""
    got = each_way(data)
    assert (errors, values) == (sum(type(value) is str for value in got), sum(type(value) is not str for value in got))


def test_errors_are_generic() -> None:
    """A parse error is a GenericError, returned and not raised."""
    stream = Stream()
    stream.feed(b"}")
    error = stream.next()
    assert isinstance(error, QmpError)
    assert error.error_class == GENERIC_ERROR


@pytest.mark.parametrize("length", [1003, 1004, 1005, 1006, 5000])
def test_error_texts_are_cut(length: int) -> None:
    """QEMU has room for 1023 bytes of text behind "JSON parse error, "."""
    word = b"a" * length
    assert ["!1:1: JSON parse error, " + f"invalid keyword '{word.decode()}'"[:1023]] == each_way(word + b" ")
    assert ["!1:1: JSON parse error, " + f"stray '\"{word.decode()}\n'"[:1023]] == each_way(b'"' + word + b"\n")


# Limits


def nested(depth: int) -> bytes:
    return b'{"a":[' * (depth // 2) + b"[" * (depth % 2) + b"]" * (depth % 2) + b"]}" * (depth // 2)


@both
def test_nesting_is_limited_to_1024(make: Maker) -> None:
    """1024 brackets of both kinds may be open; one more is one error, and the rest of the message is skipped."""
    deepest, *_ = read(nested(1024), make=make)
    levels = 0
    while deepest:
        deepest = deepest["a"] if isinstance(deepest, dict) else deepest[0]
        levels += 1
    assert levels == 1023  # and the empty list inside
    assert read(nested(1025) + QUERY, make=make) == ["!JSON nesting depth limit exceeded", VALUE]
    flat = [{}] * 3000
    assert [flat] == read(json.dumps(flat).encode(), make=make)


@both
def test_a_limit_error_skips_to_balance_or_to_a_control_character(make: Maker) -> None:
    """What is over the limit gives one error however long it goes on."""
    assert read(b"[" * 5000 + b"]" * 5000 + QUERY, make=make) == ["!JSON nesting depth limit exceeded", VALUE]
    assert read(b"[" * 5000 + b"\x1b" + QUERY, make=make) == ["!JSON nesting depth limit exceeded", VALUE]


@pytest.mark.slow
def test_tokens_are_limited_to_64_mib() -> None:
    """The tokens of a message together stay below 64 MiB; a longer one is given up while it comes in."""
    limit = 64 << 20
    rest = b'{"execute":""}'
    fits = limit - len(rest) - 1
    [whole] = read(*cut(b'{"execute":"%b"}' % (b"a" * fits), range(0, limit, 1 << 20)))
    assert fits == len(whole["execute"])
    too_big = b'{"execute":"%b"}' % (b"a" * (fits + 1))
    assert read(too_big + QUERY) == ["!JSON token size limit exceeded", VALUE]
    endless = [b'{"execute":"', *[b"a" * (1 << 20)] * 66]
    assert read(*endless) == ["!JSON token size limit exceeded"]
    assert read(*endless, b'"}\n' + QUERY) == ["!JSON token size limit exceeded", VALUE]


def test_long_strings_in_pieces() -> None:
    """A string of a megabyte comes through whatever the pieces, with an escape cut in two."""
    text = "0123456789abcde\\" * (1 << 16)
    data = json.dumps({"id": text}).encode()
    for size in (1000, 1 << 16, len(data)):
        assert [{"id": text}] == read(*(data[at : at + size] for at in range(0, len(data), size)))


# Both paths


FRAGMENTS = [
    *(bytes([byte]) for byte in b"{}[]:,\"'\\ \t\n\r0123-+.eEabu/%?\0\x01\x0b\x1b\x7f\x80\xc3\xff"),
    *(b"true", b"false", b"null", b"nul", b"-0", b"1.5", b"0e1", b"12e3", b"-Infinity", b"NaN"),
    *(b"18446744073709551616", b"9223372036854775807", b'"a"', b"'a'", b'"\\u0061"', b'"\xc3\xa9"', b'"\\n"'),
    *(b'"a":', b'"b": ', b'{"a":1}', b"[1,2]", b'{"a":{}', QUERY, QUERY + b"\n", b'{"a":[{"b":[]},{}]}'),
]
soups = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map(b"".join)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=10),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=5), inner, max_size=5),
    ),
    max_leaves=20,
)
examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@given(soups, st.lists(st.integers(0, 1000), max_size=6))
@example(b'{"a":0e1}', [])
@example(b'{"a":1}x{"a":1.5}{"a":1,"a":2}{"a":[}{"a":1}', [])
@examples
def test_paths_and_pieces_agree(data: bytes, places: list[int]) -> None:
    """On any bytes both paths give the same values and errors, whole, by bytes and in any pieces."""
    whole = each_way(data)
    assert exactly(whole) == exactly(read(*cut(data, places)))
    # many small messages in front: the fast path is under way
    assert len(whole) == len(read(QUERY * 3 + data)) - 3


@given(st.lists(trees, max_size=4), st.booleans(), st.sampled_from([None, 1]))
@examples
def test_json_is_read_as_json(values: list[Any], ascii_only: bool, indent: int | None) -> None:
    """What the json module writes comes back as it was, integers as int and floats as float."""
    messages = [{"value": value} for value in values]
    data = "\n".join(json.dumps(message, ensure_ascii=ascii_only, indent=indent) for message in messages).encode()
    assert exactly(messages) == exactly(each_way(data))


def test_many_messages_with_and_without_reason_for_the_slow_path() -> None:
    """One chunk may mix plain messages, unusual ones and errors; the places stay right."""
    block = QUERY + b"\n" + b"{'execute':'query-version'}" + b'{"a":1.5}\n' + b"foo\n"
    got = read(block * 500)
    assert [value for value in got if isinstance(value, dict)] == [VALUE, VALUE, {"a": 1.5}] * 500
    assert [f"!{3 * n}:1: JSON parse error, invalid keyword 'foo'" for n in range(1, 501)] == got[3::4]


LINES = [
    *(b'{"a":1}', b'{"a":{}}', b'{"a":{"b":"c"}}\r', b'{"arguments":{"b":1}}', b'{"a": "}"}', b'{"a":"]"}', QUERY),
    *(b'{"a":"b', b'{b"}', b'{b":1}', b'{"a":{', b'{"a":', b'{"a":1,', b'{"b":1}}', b'{"a":[1', b'{"b":2}]}'),
    *(b'{"a":[{}', b"{},{}", b"{},5", b"{},5]", b"{} {}", b"{}{}", b"{},", b"{}", b",{}", b"1", b"]", b"", b"\r"),
    *(b"{" * 1025, b'{"a":1,"a":2}', b'{"a":18446744073709551616}', b'{"a":"\\n"}', b'{"a":"\xc3\xa9"}', b"{'a':1}"),
    *(b'{"a":1.0}', b'{"a":NaN}', b'{"a":"\x01"}', b"{}\x0b"),
]


@given(st.lists(st.sampled_from(LINES), min_size=2, max_size=12), st.booleans())
@example([b'{"a":"b', b'{b"}', b"{},{}"], True)
@example([b'{"a":[1', b'{"b":2}]}', b"{},{}"], True)
@example([b'{"a":1,"a":2}', QUERY], True)
@examples
def test_lines_are_read_together_as_one_by_one(lines: list[bytes], ended: bool) -> None:
    """However what belongs together is spread over lines."""
    each_way(b"\n".join(lines) + b"\n" * ended)


def test_more_lines_than_are_read_together() -> None:
    """A line that no longer fits among them, and one that is not complete, come when it is their turn."""
    lines = [json.dumps({"execute": "x" * (number % 97), "id": number}).encode() for number in range(500)]
    data = b"\n".join(lines) + b'\n{"execute":"la'
    assert read(data, b'st"}\n') == [*map(json.loads, lines), {"execute": "last"}]
    assert read(*cut(data, range(0, len(data), 1000)), b'st"}\n') == read(data, b'st"}\n')
