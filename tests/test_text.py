"""Names of files and classes are safe to show."""

import pytest

from daam_vit.text import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("tench, 0.93 %", "tench, 0.93 %"),
        ("Tüpfelhyäne 猫 قطة 🐱", "Tüpfelhyäne 猫 قطة 🐱"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07\x7f\x9b", r"\x1b[31mred\x07\x7f\x9b"),
        ("one\u2028two\u2029", r"one\u2028two\u2029"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("caf\udce9", r"caf\udce9"),
        ("\0", r"\x00"),
        ("", ""),
    ],
)
def test_one_line_without_control_characters(text, shown):
    assert printable(text) == shown
    assert len(printable(text).splitlines()) <= 1


def test_a_limit():
    assert printable("abc", 3) == "abc" and printable("abcd", 3) == "ab…"
    assert printable("\x1b" * 10, 6) == r"\x1b\…"  # the limit holds for what is shown
    assert len(printable("x" * 1_000_000, 80)) == 80
