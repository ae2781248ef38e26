"""Draw how a decision forms: one column per block, with its map, what it would say, and what it adds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from daam_vit.arguments import (
    check_frames,
    check_integer,
    check_memory,
    check_number,
    check_rows,
    check_sequence,
    check_texts,
    check_type,
)
from daam_vit.fonts import width_of, write
from daam_vit.inputs import check_choice


def evolution_picture(
    frames: Sequence[Sequence[Image.Image]],
    curves: Sequence[tuple[str, Sequence[float]]],
    shares: Sequence[Sequence[float]],
    leaders: Sequence[str],
    leads_from: int | None = None,
    quantity: str = "probability",
    note: str = "",
    signed: bool = False,
    class_shares: Sequence[Sequence[float]] | None = None,
) -> Image.Image:
    """Draw how the decision forms, one column per block.

    Every column has the map up to this block; below it what `logit_lens` reads after the block, and how much the block
    adds to the map. For the relevance flow, a last panel shows how much of the evidence the class token holds.

    Args:
        frames: for each of K explained classes its L frames from `overlay`, without labels; drawn small, one row
            per class.
        curves: name and L values, 0..1, of the K explained classes in the same order, then of other classes to compare
            with.
        shares: for each of K classes what every block adds to the accumulated map, L values, 0..1.
        leaders: L names: the class with the largest value of all after each block.
        leads_from: the block, counted from 1, from which one explained class leads all others until the end; None if
            no explained class leads at the end.
        quantity: what the values are.
        note: text below the picture.
        signed: whether the maps have negative values, as those of `variant="relevance"`, which frames show as zero.
            `shares` are then shares of the sum of absolute values. The words of the picture say both.
        class_shares: for each of K classes the share of the evidence that the class token holds when each block begins,
            L values, 0..1, from `AttentionFlow.class_share`; None: no such panel.

    Returns:
        One RGB image, about 1,500 pixels wide; wider for more than 15 blocks.

    Raises:
        ValueError: if the numbers of frames, values, shares and leaders differ, frames have different sizes, a value is
            not 0..1, `leads_from` is not a block, or `signed` is not True or False.
        TypeError: if an argument has the wrong type.
    """
    rows, shares = check_rows("frames", frames, "for each class its frames"), check_rows("shares", shares, _VALUES)
    names, values = _check_curves(curves)
    check_sequence("leaders", leaders, "a name for each block")
    several, blocks = len(rows), len(rows[0]) if rows else 0
    held = [] if class_shares is None else check_rows("class_shares", class_shares, _VALUES)
    counts = [[*map(len, rows)], [*map(len, values)], [*map(len, shares)], [len(leaders)]]
    if not blocks or {n for count in counts for n in count} != {blocks} or not several == len(shares) <= len(curves):
        raise ValueError(f"frames: expected as many for every class as values, shares and leaders, got {counts}")
    if class_shares is not None and [*map(len, held)] != [blocks] * several:
        raise ValueError(
            f"class_shares: expected {blocks} values for each of {several} classes, got {[*map(len, held)]}"
        )
    images = check_frames("frames", [frame for row in rows for frame in row])
    frames = [images[k * blocks : (k + 1) * blocks] for k in range(several)]
    check_texts("leaders", leaders, blocks, "blocks")
    for name, given in (("shares", shares), ("class_shares", held)):
        for share in (share for row in given for share in row):
            check_number(name, share, *_RANGE)
    check_choice("signed", signed, (True, False))
    if leads_from is not None:
        check_integer("leads_from", leads_from, 1, blocks)
    check_type("quantity", quantity, str, "a text")
    check_type("note", note, str, "a text")

    curves = list(zip(names, values))
    layout = _Layout(frames, curves, bool(held))
    notes = _wrap(note, layout.width - 48)
    height = layout.notes + 24 * len(notes) + 16
    check_memory("frames", _FINE * layout.width, _FINE * height, 4)
    page = _Page(layout.width, height)
    _draw_lead(page, layout, leads_from)
    _draw_title(page, layout, leads_from, quantity)
    _draw_maps(page, layout, frames, signed)
    _draw_curves(page, layout, curves, quantity)
    _draw_leaders(page, layout, leaders)
    _draw_bars(page, layout, shares, signed)
    if held:
        _draw_class_shares(page, layout, held)
    _draw_notes(page, layout, notes)
    return page.finished()


_VALUES = "for each class its values"
_RANGE = -0.01, 1.01
"""Limits of shares and probabilities, which may be rounded."""


def _check_curves(curves: Any) -> tuple[list[str], list[list[float]]]:
    """Check curves; return their names and their values."""
    pairs = check_rows("curves", curves, "for each class its name and its values")
    for pair in pairs:
        check_sequence("curves", pair, "for each class its name and its values", 2)
        check_type("curves", pair[0], str, "a name first")
    values = check_rows("curves", [pair[1] for pair in pairs], _VALUES)
    for value in (value for row in values for value in row):
        check_number("curves", value, *_RANGE)
    return [name for name, _ in pairs], values


# ----------------------------------------------------------------------------------------------------------------------
# Paper and pen
# ----------------------------------------------------------------------------------------------------------------------

_FINE = 2
"""The page is drawn this many times larger than it is returned, which smooths its lines."""
_INK, _GREY, _PALE, _TINT = "#1f2933", "#6b7785", "#d9dee4", "#fdf1de"
_CLASS_COLOURS = ("#c8500a", "#2563c9", "#0c8a5b", "#b0278f", "#8a6d00", "#c8102e", "#00838f", "#6a4fc4", "#5c7a1f",
                  "#8c4a32")  # fmt: skip


class _Page:
    """A white page, drawn in pixels of the picture that is returned."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (_FINE * width, _FINE * height), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, words: str, size: int = 16, colour: str = _INK, anchor: str = "lm", max_width: int = 0
    ) -> None:
        """Write words, truncated to `max_width` pixels unless that is 0."""
        width = _FINE * max_width if max_width else None
        write(self.pen, (_FINE * x, _FINE * y), words, _FINE * size, colour, anchor, width)

    def heading(self, y: float, title: str, *lines: str) -> None:
        """Write a title in the left margin, and lines in grey below it."""
        self.text(24, y, title, 19)
        for i, words in enumerate(lines, 1):
            self.text(24, y + 3 + 21 * i, words, 15, _GREY)

    def line(self, *points: tuple[float, float], thickness: float = 1, colour: str = _PALE) -> None:
        self.pen.line([(_FINE * x, _FINE * y) for x, y in points], colour, round(_FINE * thickness), "curve")

    def box(self, x: float, y: float, x2: float, y2: float, colour: str) -> None:
        self.pen.rectangle((_FINE * x, _FINE * y, _FINE * x2, _FINE * y2), colour)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.pen.ellipse([_FINE * side for side in (x - radius, y - radius, x + radius, y + radius)], colour)

    def picture(self, x: float, y: int, picture: Image.Image, size: tuple[int, int]) -> None:
        """Paste a picture of a size, centred at x, with its upper edge at y."""
        w, h = size
        small = picture.resize((_FINE * w, _FINE * h), Image.Resampling.LANCZOS)
        self.image.paste(small, (round(_FINE * (x - w / 2)), _FINE * y))

    def finished(self) -> Image.Image:
        return self.image.reduce(_FINE)


class _Layout:
    """Where everything lies: x from the left, y from the top; and what the classes are called and coloured."""

    def __init__(
        self, frames: Sequence[Sequence[Image.Image]], curves: Sequence[tuple[str, Sequence[float]]], class_shares: bool
    ):
        self.several, self.blocks = len(frames), len(frames[0])
        self.column = max(72, 1092 // self.blocks)
        self.left = 240
        self.right = self.left + self.blocks * self.column
        self.width = self.right + 230
        self.centres = [self.left + (b + 0.5) * self.column for b in range(self.blocks)]

        image = frames[0][0]
        scale = min((self.column - 6) / image.width, 160 / image.height)
        self.map_size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
        self.map_step = self.map_size[1] + 6
        self.maps = 120
        self.top = self.maps + max(30, self.several * self.map_step) + 46
        self.bottom = self.top + 270
        """The curves lie between `top`, 100 %, and `bottom`, 0 %."""
        self.floor = self.bottom + 180
        """The bars stand on it."""
        self.held = self.floor + 60, self.floor + 60 + max(110, 22 * self.several)
        """The shares of the class token, if there are any, lie between the first, 100 %, and the second, 0 %."""
        self.end = self.held[1] if class_shares else self.floor
        self.notes = self.end + 24

        self.names = [name if len(name) <= 20 else f"{name[:19]}…" for name, _ in curves]
        self.ends = self.labels([values for _, values in curves])
        self.leader = max(range(self.several), key=lambda k: curves[k][1][-1])
        colours = [_CLASS_COLOURS[k % len(_CLASS_COLOURS)] for k in range(self.several)]
        self.colours = colours + [_GREY] * (len(curves) - self.several)
        self.colour_of = dict(reversed([*zip((name for name, _ in curves), self.colours)]))

    def labels(self, curves: Sequence[Sequence[float]]) -> list[str]:
        """Return a label for the end of each curve: the name of its class, and its last value."""
        return [f"{name}: {_percent(values[-1])}" for name, values in zip(self.names, curves)]


# ----------------------------------------------------------------------------------------------------------------------
# The parts of the picture, from the background to the foreground and from the top
# ----------------------------------------------------------------------------------------------------------------------


def _draw_lead(page: _Page, at: _Layout, leads_from: int | None) -> None:
    """Tint the blocks from which on a class leads all others."""
    if leads_from is None:
        return
    colour, start, above = at.colours[at.leader], at.left + (leads_from - 1) * at.column, at.maps - 34
    page.box(start, above, at.right, at.end, _TINT)
    page.line((start, above), (start, at.end), thickness=2, colour=colour)
    said = f"{at.names[at.leader]} leads from block {leads_from} on"
    fits = width_of(said, 17) < at.width - start - 16
    page.text(start + 8 if fits else start - 8, at.top - 24, said, 17, colour, "lm" if fits else "rm")


def _draw_title(page: _Page, at: _Layout, leads_from: int | None, quantity: str) -> None:
    page.text(24, 34, "How the decision forms, block by block", 28)
    if leads_from is not None:
        verdict = f"{at.names[at.leader]} leads all other classes from block {leads_from} of {at.blocks} on"
    else:
        verdict = ("No explained class leads" if at.several > 1 else f"{at.names[0]} does not lead") + " at the end"
    said = f"{verdict}. {quantity.capitalize()} after the last block: {', '.join(at.ends)}."
    page.text(24, 68, said, 18, max_width=at.width - 48)


def _draw_maps(page: _Page, at: _Layout, frames: Sequence[Sequence[Image.Image]], signed: bool) -> None:
    if signed:
        words = "Evidence in the patches", "added up to each block:", "red for the class,", "blue none or against it"
    else:
        words = "What counts so far", "the map accumulated", "up to each block:", "blue little, red much"
    page.heading(at.maps + 8, *words)
    for b, x in enumerate(at.centres, 1):
        page.text(x, at.maps - 18, f"block {b}", 15, anchor="mm")
    for k, row in enumerate(frames):
        y = at.maps + k * at.map_step
        for x, frame in zip(at.centres, row):
            page.picture(x, y, frame, at.map_size)
        name_y = y + at.map_size[1] / 2
        page.text(at.right + 12, name_y, at.names[k], 17, at.colours[k], max_width=at.width - at.right - 20)


def _draw_curves(page: _Page, at: _Layout, curves: Sequence[tuple[str, Sequence[float]]], quantity: str) -> None:
    thin = ["thin line: the runner-up"] if len(curves) > at.several else []
    page.heading(at.top + 8, "What it would say", quantity, "of the class, if this", "block were the last one", *thin)
    _draw_lines(page, at, at.top, at.bottom, [values for _, values in curves])


def _draw_lines(page: _Page, at: _Layout, top: float, bottom: float, curves: Sequence[Sequence[float]]) -> None:
    """Draw curves between `top`, 100 %, and `bottom`, 0 %."""

    def height(value: float) -> float:
        return bottom + (top - bottom) * value

    for percent in range(0, 101, 25):
        y = height(percent / 100)
        page.line((at.left, y), (at.right, y))
        if percent % 50 == 0:
            page.text(at.left - 8, y, f"{percent} %", 14, _GREY, "rm")
    for k in reversed(range(len(curves))):  # explained classes above the others, the first one on top
        thickness, radius = (4, 6.0) if k < at.several else (2, 3.5)
        points = [(x, height(value)) for x, value in zip(at.centres, curves[k])]
        page.line(*points, thickness=thickness, colour=at.colours[k])
        for x, y in points:
            page.dot(x, y, radius, at.colours[k])
    ys = _apart([height(values[-1]) for values in curves], 22, top, bottom)
    for end, y, colour in zip(at.labels(curves), ys, at.colours):
        page.text(at.right + 12, y, end, 17, colour, max_width=at.width - at.right - 20)


def _draw_leaders(page: _Page, at: _Layout, leaders: Sequence[str]) -> None:
    page.text(at.left - 8, at.bottom + 30, "the class that leads", 14, _GREY, "rm")
    for x, name in zip(at.centres, leaders):
        page.text(x, at.bottom + 30, name, 14, at.colour_of.get(name, _GREY), "mm", max_width=at.column - 6)


def _draw_bars(page: _Page, at: _Layout, shares: Sequence[Sequence[float]], signed: bool) -> None:
    whole = ("all evidence,", "for and against the class") if signed else ("the map", "after the last block")
    page.heading(at.bottom + 76, "What the block adds", f"its share of {whole[0]}", whole[1])
    page.line((at.left, at.floor), (at.right, at.floor))
    wide, highest = min(0.7 * at.column, 100) / at.several, max(1e-9, *(share for row in shares for share in row))
    for k, row in enumerate(shares):
        for x, share in zip(at.centres, row):
            begin, y = x + (k - at.several / 2) * wide, at.floor - 90 * share / highest
            page.box(begin + 1, y, begin + wide - 1, at.floor, at.colours[k])
            if wide > 40:
                page.text(begin + wide / 2, y - 11, _percent(share), 14, anchor="mm")


def _draw_class_shares(page: _Page, at: _Layout, class_shares: Sequence[Sequence[float]]) -> None:
    words = "in the class token, when", "the block begins; the rest", "is in the patches", "(or registers)"
    page.heading(at.held[0] - 20, "Where the evidence sits", *words)
    _draw_lines(page, at, *at.held, class_shares)


def _wrap(note: str, width: float) -> list[str]:
    """Break a note into lines that fit: shorter ones if its font is wider than Pillow's own."""
    count = int((width + 48) / 7.5)
    lines = textwrap.wrap(note, count)
    while count > 1 and any(width_of(line, _FINE * 15) > _FINE * width for line in lines):
        count = int(0.9 * count)
        lines = textwrap.wrap(note, count)
    return lines


def _draw_notes(page: _Page, at: _Layout, notes: Sequence[str]) -> None:
    for i, words in enumerate(notes):
        page.text(24, at.notes + 12 + 24 * i, words, 15, _GREY, max_width=at.width - 48)


# ----------------------------------------------------------------------------------------------------------------------
# Words and places
# ----------------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or share == 0 else "< 1 %"


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places until neighbours are a gap apart; keep their order and, if there is room, the bounds."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for i, place in enumerate(order):
        moved[place] = max(places[place], moved[order[i - 1]] + gap if i else low)
    for i, place in reversed([*enumerate(order, 1)]):
        moved[place] = min(moved[place], moved[order[i]] - gap if i < len(order) else high)
    return moved
