"""A form writes what the encoder writes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gmemd.qmp.encode import encode
from gmemd.qmp.rows import Form

_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
_values = st.integers() | st.text(max_size=5) | st.lists(st.booleans(), max_size=2)


def _flat(value: Any) -> list[Any]:
    """The values of an object, in the order of its members."""
    return [part for member in value.values() for part in _flat(member)] if isinstance(value, dict) else [value]


def _form(value: Any, fixed: set[Any]) -> Any:
    """The same with types for the values, but at those of these numbers."""
    numbers = iter(range(1000))

    def hole(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: hole(member) for name, member in part.items()}
        kept = next(numbers) in fixed
        return part if kept else int if type(part) is int else bytes

    return hole(value)


@given(st.dictionaries(_names, _values | st.dictionaries(_names, _values, min_size=1, max_size=3), min_size=3,
                       max_size=8), st.sets(st.integers(1, 20)))
def test_a_form_writes_what_encode_writes(value: dict[str, Any], fixed: set[int]) -> None:
    """Any members, in objects too; any of the values may be the form's own, but two."""
    values = _flat(value)
    fixed -= {0, len(values) - 1}
    given = [part if type(part) is int else encode(part) for number, part in enumerate(values) if number not in fixed]
    assert Form(_form(value, fixed)).write(*given) == encode(value)
