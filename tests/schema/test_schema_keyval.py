"""--object: key=value as QEMU reads it, JSON, and the help texts.

What QEMU answers was measured with qemu-system-x86_64 7.2; sizes follow the rules of 8.1 and later.
"""

from __future__ import annotations

from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.schema.help import object_help, object_properties_help, object_types_help
from gmemd.schema.keyval import parse_object
from gmemd.schema.sizes import parse_range, parse_size, parse_uint
from gmemd.schema.validate import Schema

SCHEMA = Schema.load()
RAM = "memory-backend-ram,id=a,size=1M"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096k", 4 << 20),
        ("4096K", 4 << 20),
        ("8192B", 8192),
        ("1m", 1 << 20),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        ("1.G", 1 << 30),
        (".5G", 1 << 29),
        ("0.1G", 107374182),
        ("1.0000001M", 1048576),
        ("0.5k", 512),
        ("0.0005k", 1),
        ("1.0", 1),
        ("1.0B", 1),
        ("15E", 15 << 60),
        ("1.99999999999999999999k", 2048),
        ("010", 10),
        ("0x1000", 4096),
        ("0X1E", 30),
        ("0x1b", 27),
        (" +4096", 4096),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """A size is decimal with fraction and suffix, or hexadecimal."""
    assert parse_size(text) == size


NO_SIZES = (
    *("", "x", "-1", "-0", "1.5", "1.5B", "1GB", "1MiB", "1 G", "4096 ", "1e3", "1e3M", "16E"),
    *("15.99999999999999999999E", "18446744073709551616", "0x10000000000000000", "0x", "00x10", "0x1000k"),
    *("0x1.8p10", ".", ".G", "-.5k", "inf", "1..G", "1.5.5G", "\u0664"),
)


@pytest.mark.parametrize("text", NO_SIZES)
def test_no_sizes(text: str) -> None:
    """Neither signs, exponents, fractions of bytes nor more than 64 bits."""
    assert parse_size(text) is None


def test_integers_and_ranges() -> None:
    """Integers are C's, octal included; a range has at most 65536 elements."""
    assert [parse_uint(text) for text in ("7", "0x1F", "010", " +5", "0")] == [7, 31, 8, 5, 0]
    assert [parse_uint(text) for text in ("", "-1", "08", "1k", "5 ", str(2**64))] == [None] * 6
    assert [parse_range(text) for text in ("3", "0-2", "0x1-0x3", "1-+2")] == [
        range(3, 4),
        range(3),
        range(1, 4),
        range(1, 3),
    ]
    assert [parse_range(text) for text in ("2-0", "0-", "-1", "0-1-2", "0-65536", "a-b", "0:1")] == [None] * 7


@pytest.mark.parametrize(
    ("spec", "properties"),
    [
        (RAM, {"size": 1 << 20}),
        ("qom-type=memory-backend-ram,id=a,size=1M,", {"size": 1 << 20}),
        (f"{RAM},share=on,merge=no,dump=false,prealloc=y", {"share": True, "merge": False, "dump": False}),
        (f"{RAM},share", {"share": True}),
        (f"{RAM},noshare", {"share": False}),
        (f"{RAM},size=2M", {"size": 2 << 20}),
        (f"{RAM},id=b", {"id": "a"}),
        (f"{RAM},host-nodes=0-2,policy=bind,host-nodes=5", {"host-nodes": [0, 1, 2, 5], "policy": "bind"}),
        (f"{RAM},prealloc-threads=0x2", {"prealloc-threads": 2}),
        ("memory-backend-file,id=a,size=1,mem-path=/a,,b=c", {"mem-path": "/a,b=c"}),
        ("memory-backend-file,id=a,size=1,mem-path", {"mem-path": "on"}),
        ("memory-backend-file,id=a,size=1,mem-path=x,rom=on,offset=4k", {"rom": "on", "offset": 4096}),
        ("memory-backend-ram,qom-type=memory-backend-shm,id=a,size=1", {"qom-type": "memory-backend-shm"}),
        ("memory-backend-memfd,id=a,size=1G,guest-memfd=on", {"guest-memfd": "on"}),
        # as libvirt 9 writes them
        (
            "memory-backend-ram,id=ram-node2,size=24578457600,host-nodes=1-2,host-nodes=5,host-nodes=7,policy=bind",
            {"host-nodes": [1, 2, 5, 7], "size": 24578457600},
        ),
        (
            "memory-backend-file,id=memnvdimm0,mem-path=/tmp/nvdimm,share=off,prealloc=on,size=536870912,align=2097152",
            {"align": 2 << 20, "share": False},
        ),
        ('{"qom-type":"memory-backend-ram","id":"a","size":1048576}', {"size": 1 << 20}),
        ("{'qom-type':'memory-backend-ram','id':'a','size':4096}", {"size": 4096}),
    ],
)
def test_accepted(spec: str, properties: dict[str, Any]) -> None:
    """What QEMU takes is taken, and passes the schema."""
    completed = SCHEMA.check_object(parse_object(spec, SCHEMA))
    assert {name: completed[name] for name in properties} == properties


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("", "Parameter 'qom-type' is missing"),
        ("id=a,size=1M", "Parameter 'qom-type' is missing"),
        (",id=a", "Parameter 'qom-type' does not accept value ''"),
        ("nosuch,id=a", "Parameter 'qom-type' does not accept value 'nosuch'"),
        ("nosuch,help", "Parameter 'qom-type' does not accept value 'nosuch'"),
        ("memory-backend-ram,,id=a", "Parameter 'qom-type' does not accept value 'memory-backend-ram,id=a'"),
        ("memory-backend-ram,size=1M", "Parameter 'id' is missing"),
        ("memory-backend-ram,id=a", "Parameter 'size' is missing"),
        ("memory-backend-file,id=a,size=1M", "Parameter 'mem-path' is missing"),
        ("memory-backend-ram,id=1a,nonsense", "Parameter 'id' expects an identifier"),
        ("memory-backend-ram,id=,help", "Parameter 'id' expects an identifier"),
        ("memory-backend-ram,id=a,,size=1M", "Parameter 'id' expects an identifier"),
        (f"{RAM},foo=1", "Invalid parameter 'foo'"),
        (f"{RAM},foo=1,bar=2", "Invalid parameter 'bar'"),
        (f"{RAM},=x", "Invalid parameter ''"),
        (f"{RAM},foo=1,merge=1", "Parameter 'merge' expects 'on' or 'off'"),
        (f"{RAM},merge=ON", "Parameter 'merge' expects 'on' or 'off'"),
        (f"{RAM},merge=", "Parameter 'merge' expects 'on' or 'off'"),
        (f"{RAM},size=1e3", "Parameter 'size' expects a size value"),
        (f"{RAM},size", "Parameter 'size' expects a size value"),
        (f"{RAM},policy=x", "Parameter 'policy' does not accept value 'x'"),
        (f"{RAM},policy", "Parameter 'policy' does not accept value 'on'"),
        (f"{RAM},prealloc-threads=1-3", "Parameter 'prealloc-threads' expects a uint64 value"),
        (f"{RAM},prealloc-threads=4294967296", "Parameter 'prealloc-threads' expects uint32_t"),
        (f"{RAM},host-nodes=2-0", "Parameter 'host-nodes' expects a uint64 value or range"),
        (f"{RAM},host-nodes=70000,host-nodes=x", "Parameter 'null' expects uint16_t"),
        (f"{RAM},host-nodes=65530-65540", "Parameter 'null' expects uint16_t"),
        (f"{RAM},seal=on", "Invalid parameter 'seal'"),
        ("memory-backend-memfd,id=a,size=1,guest-memfd=yes", "Parameter 'guest-memfd' does not accept value 'yes'"),
        ("{}", "Parameter 'qom-type' is missing"),
        ('{"qom-type":"memory-backend-ram","id":"a","size":"1M"}', "Parameter 'size' expects uint64"),
        ('{"qom-type":"memory-backend-ram"', "1:33: JSON parse error, premature end of input"),
        ('{"a":1', "1:8: JSON parse error, premature end of input"),
        ('{"a":\n', "2:1: JSON parse error, premature end of input"),
        ('{"a', "1:2: JSON parse error, stray '\"a'"),
        ('{"a":tru', "1:6: JSON parse error, invalid keyword 'tru'"),
        ("{}{", "Expecting at most one JSON value"),
        ("{}{}", "Expecting at most one JSON value"),
        ("{} ]", "Expecting at most one JSON value"),
        ('{"qom-type":"memory-backend-ram"}x', "Expecting at most one JSON value"),
        ("{x}", "1:2: JSON parse error, expecting key"),
    ],
)
def test_refused(spec: str, sentence: str) -> None:
    """What QEMU refuses is refused, in its words; afterwards the right form is taken."""
    with pytest.raises(QmpError) as caught:
        SCHEMA.check_object(parse_object(spec, SCHEMA))
    assert caught.value.desc == sentence
    assert parse_object(RAM) == {"qom-type": "memory-backend-ram", "id": "a", "size": 1 << 20}


def test_keys_without_a_value_are_warned_of() -> None:
    """The caller is told each key that stands alone."""
    warnings: list[str] = []
    parse_object(f"{RAM},share,nomerge", SCHEMA, warn=warnings.append)
    assert warnings == [
        "short-form boolean option 'share' deprecated\nPlease use share=on instead",
        "short-form boolean option 'nomerge' deprecated\nPlease use merge=off instead",
    ]


TYPES_HELP = """\
List of user creatable objects:
  memory-backend-file
  memory-backend-guest-memfd
  memory-backend-memfd
  memory-backend-ram
  memory-backend-shm
  thread-context"""

RAM_HELP = """\
memory-backend-ram options:
  dump=<bool>            - Set to 'off' to exclude from core dump
  host-nodes=<int>       - Binds memory to the list of NUMA host nodes
  merge=<bool>           - Mark memory as mergeable
  policy=<HostMemPolicy> - Set the NUMA policy
  prealloc-context=<link<thread-context>> - Context to use for creating CPU threads for preallocation
  prealloc-threads=<int> - Number of CPU threads to use for prealloc
  prealloc=<bool>        - Preallocate memory
  reserve=<bool>         - Reserve swap space (or huge pages) if applicable
  share=<bool>           - Mark the memory as private to QEMU or shared
  size=<int>             - Size of the memory region (ex: 500M)
  x-use-canonical-path-for-ramblock-id=<bool>"""


def test_help_of_types() -> None:
    """--object help lists the types as QEMU does."""
    assert object_types_help() == TYPES_HELP
    for spec in ("help", "?", "qom-type=help", "help,id=a"):
        assert object_help(spec, SCHEMA) == TYPES_HELP


def test_help_of_a_type() -> None:
    """--object TYPE,help lists its properties as QEMU does, wherever help stands."""
    assert object_properties_help("memory-backend-ram") == RAM_HELP
    for spec in ("memory-backend-ram,help", "memory-backend-ram,?", f"{RAM},help=x", "memory-backend-ram,nohelp"):
        assert object_help(spec, SCHEMA) == RAM_HELP
    assert "  guest-memfd=<OnOffAuto> - Use guest memfd\n" in object_properties_help("memory-backend-memfd")


def test_no_help_asked_for() -> None:
    """Everything else is for parse_object to judge."""
    for spec in (RAM, "nosuch,help", "memory-backend-ram,id=1,help", '{"help":1}', "", "id=help"):
        assert object_help(spec, SCHEMA) is None
