"""Tests of the check of JSON that somebody else wrote."""

import json

import pytest

from models.schema import check_schema, parse_json

SCHEMA = {
    "name": (str, None),
    "counts": {str: [int]},
    "share": float,
    "done": bool,
    "more": dict,
    "parts": [{"n": int}],
}
GOOD = {
    "name": None, "counts": {"a": [1, 2], "b": []}, "share": 1, "done": True, "more": {"x": []},
    "parts": [{"n": 1}, {}], "unknown": "kept",
}  # fmt: skip


def test_what_fits_is_returned():
    assert parse_json(json.dumps(GOOD), SCHEMA, "file: a.json", required=("name",)) == GOOD
    assert parse_json("\ufeff[0.5]".encode(), [float], "file: a.json") == [0.5]


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("name", 5, "name should be a text or null, got 5"),
        ("counts", [1], "counts should be an object, got [1]"),
        ("counts", {"a": [1, True]}, "counts.a[1] should be a whole number, got true"),
        ("counts", {"a\x1b": [1.5]}, "counts.a\\x1b[0] should be a whole number, got 1.5"),
        ("share", float("nan"), "share should be a number, got NaN"),
        ("share", float("-inf"), "share should be a number, got -Infinity"),
        ("share", 10**400, f"share should be a number, got 1{'0' * 38}…"),
        ("share", "1", 'share should be a number, got "1"'),
        ("share", False, "share should be a number, got false"),
        ("done", 1, "done should be true or false, got 1"),
        ("more", "x" * 100, 'more should be an object, got "' + "x" * 38 + "…"),
        ("parts", [{"n": 1}, None], "parts[1] should be an object, got null"),
        ("parts", [{"n": None}], "parts[0].n should be a whole number, got null"),
    ],
)
def test_the_first_value_that_does_not_fit_is_named(place, value, message):
    with pytest.raises(ValueError) as error:
        check_schema(GOOD | {place: value}, SCHEMA, "file: a.json")
    assert str(error.value) == f"file: a.json: {message}"


def test_any_depth_is_one_line():
    """Python reads a few levels more than it can write."""
    for depth in range(900, 1100):
        with pytest.raises(ValueError) as error:
            parse_json("[" * depth + "]" * depth, SCHEMA, "file: a.json")
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "file: a.json: it should be an object, got []"),
        ("{}", "file: a.json has no 'name'; write it again"),
        ("", "file: a.json cannot be read as JSON: Expecting value"),
        (b"\xff\xfe\xfa", "file: a.json cannot be read as JSON: "),
        ("9" * 5000, "file: a.json cannot be read as JSON: "),
        ("[" * 100_000, "file: a.json is nested too deeply"),
        ('{"more":' + '{"a":' * 50_000 + "1" + "}" * 50_001, "file: a.json is nested too deeply"),
    ],
)
def test_what_is_no_json_is_one_line(text, message):
    with pytest.raises(ValueError) as error:
        parse_json(text, SCHEMA, "file: a.json", required=("name",))
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) == 1
