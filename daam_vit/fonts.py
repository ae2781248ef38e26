"""Write text into pictures, in a font that has its characters; none is drawn as an empty box.

Pillow's own font has little more than ASCII. Other texts are drawn in a font of the system or of matplotlib that has
all their characters. If there is none, missing characters become "?". Names of files and classes can be passed as they
are.
"""

from __future__ import annotations

import io
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from PIL import ImageDraw, ImageFont, features

from daam_vit.text import printable

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
"""What `ImageFont.load_default` returns, with and without FreeType."""
MAX_LENGTH = 1000
"""Largest number of characters of a line."""
_ASCII = frozenset(map(chr, range(32, 127)))
_JOINERS = frozenset("\u200c\u200d\u200e")
"""Invisible characters that decide how their neighbours are shaped, and in which direction they run."""
_LABELLED = re.compile("(?<=[\u0590-\u08ff])(?=[:,])")
"""End of a name in Hebrew or Arabic; without a direction mark there, a number after it would be drawn on its left."""


def write(
    pen: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    size: float,
    colour: str = "black",
    anchor: str = "la",
    max_width: float | None = None,
    stroke_width: float = 0,
    stroke_fill: str | None = None,
) -> None:
    """Write one line of text into a picture.

    Args:
        pen: draws in the picture.
        xy: the place of the anchor.
        text: any text; see `fit`.
        size: of the font, in pixels.
        colour: of the text.
        anchor: as Pillow calls it: "l", "m", "r" and "a", "m", "s"; "la" is the upper left corner, "mm" the middle.
        max_width: in pixels; a longer text is cut. None: no limit.
        stroke_width: of an outline, in pixels.
        stroke_fill: the colour of the outline.
    """
    words, font = fit(text, size, max_width)
    pillow, (x, y) = _sized(_PILLOW, size), xy
    if font is not pillow and isinstance(pillow, ImageFont.FreeTypeFont):  # all fonts on one baseline
        ascent, descent = pillow.getmetrics()
        y += {"a": ascent, "m": (ascent - descent + 1) // 2, "s": 0}[anchor[1]]
        anchor = f"{anchor[0]}s"
    pen.text(
        (x, y), words, colour, font, anchor,
        direction=_direction(font), stroke_width=stroke_width, stroke_fill=stroke_fill,
    )  # fmt: skip


def write_lines(
    pen: ImageDraw.ImageDraw, xy: tuple[float, float], lines: Iterable[str], size: float, spacing: float
) -> None:
    """Write lines below each other in black, `spacing` pixels apart; the font is chosen for each line."""
    x, y = xy
    step = pen.textbbox((0, 0), "A", _sized(_PILLOW, size))[3] + spacing
    for i, line in enumerate(lines):
        write(pen, (x, y + i * step), line, size)


def fit(text: str, size: float, max_width: float | None = None) -> tuple[str, Font]:
    """Return a text as it can be drawn, and the font to draw it with.

    Control characters are escaped, invisible ones dropped, characters that no font has become "?".

    Args:
        text: any text; line breaks are escaped, too.
        size: of the font, in pixels.
        max_width: in pixels; a wider text ends with "…". None: no limit.
    """
    words = _visible(text)
    face, missing = _best_face(frozenset(words))
    words, font = "".join("?" if c in missing else c for c in words), _sized(face, size)
    if _direction(font) is None:  # joiners are hidden only if the text is shaped
        words = "".join(c for c in words if c not in _JOINERS)
    else:
        words = _LABELLED.sub("\u200e", words)
    if max_width is None or _length(words, font) <= max_width:
        return words, font
    fitting = bisect_right(range(1, len(words)), max_width, key=lambda n: _length(f"{words[:n]}…", font))
    return f"{words[:fitting]}…", font


def width_of(text: str, size: float) -> float:
    """Return the width of a text as `write` draws it, in pixels."""
    return _length(*fit(text, size))


def drawable(text: str) -> bool:
    """Return whether one font has all characters of a text, so that nothing of it becomes "?"."""
    return not _best_face(frozenset(_visible(text))).missing


def matplotlib_text(text: str) -> tuple[str, list[str]]:
    """Return a text as matplotlib can draw it, and its `fontfamily`; pass `parse_math=False` as well."""
    words, _ = fit(text, 10)
    family = _best_face(frozenset(words)).face.family
    return "".join(c for c in words if c not in _JOINERS), ["sans-serif", *([family] if family else [])]


# ----------------------------------------------------------------------------------------------------------------------
# Characters
# ----------------------------------------------------------------------------------------------------------------------


def _visible(text: str) -> str:
    """Return a text on one line, composed ("e" and an accent are one character), with plain spaces."""
    composed = unicodedata.normalize("NFC", printable(text, MAX_LENGTH))
    return composed if composed.isascii() else "".join(map(_drawn, composed))


def _drawn(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Zs":
        return " "
    selects_variant = "VARIATION SELECTOR" in unicodedata.name(character, "")
    invisible = selects_variant or (category == "Cf" and not (character in _JOINERS and _shapes()))
    return "" if invisible else character


def _needs_shaping(character: str) -> bool:
    """Return whether a character is written from the right, joins its neighbours or stands above or below them."""
    return (
        unicodedata.bidirectional(character) in ("R", "AL")
        or unicodedata.category(character)[0] == "M"
        or 0x0900 <= ord(character) < 0x10A0  # scripts of India and Southeast Asia
        or 0x1780 <= ord(character) < 0x18B0
    )


def _shapes() -> bool:
    """Return whether Pillow can shape Arabic, Hebrew and the scripts of India."""
    return bool(features.check("raqm"))


def _direction(font: Font) -> str | None:
    """Return the direction of a line; words of Arabic or Hebrew still run to the left in it."""
    return "ltr" if getattr(font, "layout_engine", None) == ImageFont.Layout.RAQM else None


def _length(words: str, font: Font) -> float:
    if isinstance(font, ImageFont.FreeTypeFont):
        return font.getlength(words, direction=_direction(font))
    return font.getlength(words)


# ----------------------------------------------------------------------------------------------------------------------
# Fonts
# ----------------------------------------------------------------------------------------------------------------------


class _Face(NamedTuple):
    """A face of a font file, or Pillow's own font if there is no file."""

    file: str = ""
    number: int = 0
    """Index in a collection of faces; matplotlib before 3.11 lists only the first."""
    family: str | None = None


class _Choice(NamedTuple):
    face: _Face
    missing: frozenset[str]


_PILLOW = _Face()


@lru_cache(4096)
def _best_face(characters: frozenset[str]) -> _Choice:
    """Return the first face that has all characters, or the one that misses the fewest."""
    if characters <= _ASCII | {"…"}:
        return _Choice(_PILLOW, frozenset())
    fewest = _Choice(_PILLOW, characters)
    for face in (_PILLOW, *_text_faces()):
        missing = _missing(face, characters)
        if len(missing) < len(fewest.missing):
            fewest = _Choice(face, missing)
        if not missing:
            break
    return fewest


def _missing(face: _Face, characters: Iterable[str]) -> frozenset[str]:
    known, shapes = _characters(face), _shapes()

    def is_drawn(character: str) -> bool:
        if character in _JOINERS:
            return True
        return character in known and (shapes or not _needs_shaping(character)) and _has_ink(face, character)

    return frozenset(c for c in characters if not is_drawn(c))


@lru_cache(4096)
def _has_ink(face: _Face, character: str) -> bool:
    """Return whether a character is really drawn: colour fonts have characters without an outline."""
    if character == " " or character in _characters(_PILLOW):
        return True
    try:
        font = _sized(face, 24)
        drawn, unknown = font.getmask(character), font.getmask("\uffff")  # U+FFFF is no character
    except OSError:  # a font of bitmaps in one size
        return False
    return drawn.getbbox() is not None and (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))


@cache
def _characters(face: _Face) -> frozenset[str]:
    """Return the assigned characters of a face; none if it is not a font for text."""
    from matplotlib.ft2font import FT2Font

    try:
        source = face.file or io.BytesIO(ImageFont.load_default(10).font_bytes)  # type: ignore[union-attr]
        font = FT2Font(source, face_index=face.number) if face.number else FT2Font(source)
        glyphs = font.get_charmap()
    except (OSError, RuntimeError, ValueError, AttributeError):  # removed, damaged, of another kind; no FreeType
        return frozenset()
    known = frozenset(map(chr, glyphs))
    if not known >= _ASCII or glyphs[ord("a")] == glyphs[ord("b")]:  # symbols, or placeholders for all characters
        return frozenset()
    return frozenset(c for c in known if unicodedata.category(c) not in ("Cn", "Co", "Cs"))


@cache
def _text_faces() -> tuple[_Face, ...]:
    """Return the upright faces of the system and of matplotlib, sans-serif and regular ones first."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for file in set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}:  # newer than its cache
        with suppress(OSError, RuntimeError, ValueError):
            fontManager.addfont(file)

    def preference(entry: FontEntry) -> tuple:
        weight = entry.weight if isinstance(entry.weight, int) else 400
        plain = "Sans" in entry.name and "Mono" not in entry.name
        return entry.stretch != "normal", abs(weight - 400), not plain, number(entry), entry.name, entry.fname

    def number(entry: FontEntry) -> int:
        return getattr(entry, "index", 0)

    upright = sorted((entry for entry in fontManager.ttflist if entry.style == "normal"), key=preference)
    best = {entry.name: entry for entry in reversed(upright)}  # one face per family: the others add no characters
    return tuple(_Face(e.fname, number(e), e.name) for e in sorted(best.values(), key=preference))


@lru_cache(256)
def _sized(face: _Face, size: float) -> Font:
    return ImageFont.truetype(face.file, size, face.number) if face.file else ImageFont.load_default(size)
