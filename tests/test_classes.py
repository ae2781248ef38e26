"""Find a class: names that are numbers, names in other spellings, names that nobody should have."""

import time
import unicodedata

import numpy as np
import pytest

from models import find_class

NUMBERS = ["1", "10", "2"]  # folders, as they are sorted
ZEROS = ["001", "002", "010"]
DECOMPOSED = unicodedata.normalize("NFD", "café")


def find(name, names):
    return find_class(name, names, len(names))


@pytest.mark.parametrize(
    ("name", "names", "index"),
    [
        ("1", NUMBERS, 0),
        ("10", NUMBERS, 1),
        (" 2 ", NUMBERS, 2),
        ("0", NUMBERS, 0),  # no name, so an index
        (1, NUMBERS, 1),  # an integer is an index
        (np.int64(2), NUMBERS, 2),
        ("002", ZEROS, 1),
        ("10", ZEROS, 2),
        ("0", ["zero", "one"], 0),
        ("01", ["zero", "one"], 1),
        ("-1", ["1", "-1", "0"], 1),
        ("12", ["dozen, 12", "one"], 0),  # there is no class 12
        ("0", ["nought, 0", "one"], 0),  # both readings are the same class
        ("A", ["a", "A"], 1),
        ("a", ["a", "A"], 0),
        ("-", ["+", "-", "_"], 1),
        ("STRASSE", ["weg", "straße"], 1),
        ("²", ["²", "2"], 0),
        ("٣", ["a", "b", "c", "٣"], 3),
        ("café", ["tea", DECOMPOSED], 1),
        (DECOMPOSED.upper(), ["tea", "café"], 1),
        ("猫", ["犬", "猫"], 1),
        ("a\nb", ["a b", "a\nb"], 1),
        ("a\nb", ["a b", r"a\nb"], 1),  # as it is shown
        ("cat", ["", "cat", "  "], 1),
    ],
)
def test_a_name_wins_over_an_index(name, names, index):
    assert find(name, names) == index


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (
            "1",
            ["one, 1", "two"],
            "'1' is a name of class 0 ('one, 1') and the index of class 1 ('two')",
        ),
        ("1", ZEROS, "'1' is a name of class 0 ('001') and the index of class 1 ('002')"),
        ("1", ["-1", "0"], "'1' is a name of class 0 ('-1') and the index of class 1 ('0')"),
        ("7", ["7", "7", "x"], "'7' is the name of the classes 0, 1; pass the index"),
        ("x", ["x"] * 300, "the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …; pass the index"),
        ("-1", NUMBERS, "class -1 is out of range; there are 3 classes"),
        (-1, NUMBERS, "class -1 is out of range"),
        (10, NUMBERS, "class 10 is out of range"),
        ("٣", list("abcd"), "no class is called '٣'"),
        ("²", list("abcd"), "no class is called '²'"),
        ("", ["", "a"], "the name of the class is empty"),
        (" \t", [" ", "a"], "the name of the class is empty"),
        ("c\x1b[31mat", ["dog"], "no class is called 'c\\x1b[31mat'"),
        ("cat", ["c\nat"], "near names: c at"),
        ("cat", ["cat\u202ex"], "near names: cat\\u202ex"),
        ("9" * 5000, NUMBERS, "is out of range; there are 3 classes"),
        ("-" + "9" * 5000, NUMBERS, "is out of range"),
        pytest.param(10**5000, NUMBERS, "is out of range", id="10^5000"),
        ("a" * 5000, ["a" * 4999, "b"], "aaaa…'; pass an index, or another name"),
    ],
)
def test_what_is_no_name_or_several_is_one_short_line(name, names, message):
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        find(name, names)
    said = str(error.value)
    assert message in said and said.startswith("target: ") and len(said) < 400 and said.isprintable(), said
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", [True, 7.0, None, ["cat"], b"cat", np.bool_(True)])
def test_a_class_is_a_text_or_an_integer(name):
    with pytest.raises(TypeError, match="target: expected the name or the index of a class, got "):
        find(name, NUMBERS)
