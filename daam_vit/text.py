"""Make text safe to show, because names of files and classes can hold anything."""

from __future__ import annotations

import unicodedata

_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories that are escaped: control characters, lone surrogates, separators of lines and paragraphs."""
_BIDI = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Characters that change the direction of text, which can make a name read like another one."""


def printable(text: str, limit: int | None = None) -> str:
    r"""Return a text on one line, with control characters as escapes such as ``\x1b``.

    Args:
        text: any text.
        limit: largest number of characters; a longer text ends with "…". None: no limit.
    """
    text = text if limit is None else text[: limit + 1]
    escaped = text if text.isprintable() else "".join(map(_escaped, text))
    return escaped if limit is None or len(escaped) <= limit else escaped[: limit - 1] + "…"


def _escaped(character: str) -> str:
    if character in _BIDI or unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode()
    return character
