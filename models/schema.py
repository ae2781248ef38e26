"""Read JSON that is not trusted; the error for a value of another type is one line and names its place.

A schema is made of Python's own types:

    str, int, float, bool, dict, None    a value of this type; float also takes whole numbers, int takes no bool
    (str, None)                          one of these
    [str]                                a list whose entries are of this type
    {"name": str}                        an object: these entries, if they are there, are of these types
    {str: [int]}                         an object with any names, whose entries are of this type
"""

from __future__ import annotations

import json
import sys
from typing import Any

from daam_vit.text import printable

_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def parse_json(text: str | bytes, schema: Any, source: str, required: tuple[str, ...] = ()) -> Any:
    """Parse JSON and check it.

    Args:
        text: the JSON.
        schema: see above.
        source: the argument and the file, for the error, such as "bank: DIR/bank.json".
        required: entries that the object must have.

    Raises:
        ValueError: if the text is not JSON, is nested too deeply, or does not fit the schema.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply; write it again") from None
    except ValueError as error:  # also if it is not UTF-8
        raise ValueError(f"{source} cannot be read as JSON: {printable(str(error), 100)}") from None
    check_schema(value, schema, source)
    missing = [name for name in required if name not in value]
    if missing:
        raise ValueError(f"{source} has no {missing[0]!r}; write it again")
    return value


def check_schema(value: Any, schema: Any, source: str, place: str = "") -> None:
    """Raise a ValueError unless a value that was parsed from JSON fits a schema.

    Args:
        value: what `json.loads` returned.
        schema: see above.
        source: the argument and the file, for the error.
        place: the entry, for the error, such as "train.files"; "" for the whole.
    """
    if not _is_of(value, schema):
        raise ValueError(f"{source}: {place or 'it'} should be {_describe(schema)}, got {_shown(value)}")
    if isinstance(schema, tuple):
        schema = next(one for one in schema if _is_of(value, one))
    if isinstance(schema, list):
        for i, entry in enumerate(value):
            check_schema(entry, schema[0], source, f"{place}[{i}]")
    if isinstance(schema, dict):
        for name, entry in value.items():
            of_entry = schema.get(str, schema.get(name, ...))
            if of_entry is not ...:
                check_schema(entry, of_entry, source, f"{place}.{printable(name, 40)}".lstrip("."))


def _is_of(value: Any, schema: Any) -> bool:
    """Return whether a value is of the type of a schema, whatever its entries are."""
    if isinstance(schema, tuple):
        return any(_is_of(value, one) for one in schema)
    if schema is None:
        return value is None
    if isinstance(schema, (list, dict)):
        return isinstance(value, type(schema))
    if schema is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, schema) and (schema is bool or not isinstance(value, bool))


def _shown(value: Any) -> str:
    try:
        return printable(json.dumps(value), 40)
    except RecursionError:  # json writes fewer levels than it reads
        return "a deeply nested " + type(value).__name__


def _describe(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_describe, schema))
    if isinstance(schema, list):
        return "a list"
    return "null" if schema is None else _NAMES[dict if isinstance(schema, dict) else schema]
