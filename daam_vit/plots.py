"""Draw how a decision forms: one column a block, with its map, the reading after it and what it adds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from daam_vit.drawing import truncate


def evolution_picture(
    frames: Sequence[Sequence[Image.Image]],
    curves: Sequence[tuple[str, Sequence[float]]],
    shares: Sequence[Sequence[float]],
    leaders: Sequence[str],
    leads_from: int | None = None,
    quantity: str = "probability",
    note: str = "",
) -> Image.Image:
    """How the decision forms: the maps of all blocks; below them, column by column, what `logit_lens` reads after the
    block, and how much the block adds to the map.

    Args:
        frames: for each of K explained classes its L frames from `overlay`, without labels; drawn small, a row a class.
        curves: name and L values, 0..1, of the K explained classes in their order, then of others to compare with.
        shares: for each of K classes what every block adds to the accumulated map, L values, 0..1.
        leaders: after each of L blocks the name of the class with the largest value of all.
        leads_from: the block, from 1 on, from which one of the explained classes leads all others until the end; None
            when none of them leads at the end.
        quantity: what the values are.
        note: written below.

    Returns:
        One RGB image, about 1,500 pixels wide; wider for more than 15 blocks.

    Raises:
        ValueError: when there are not L frames, values and shares of every class and L leaders, or `leads_from` is no
            block.
    """
    several, blocks = len(frames), len(frames[0]) if frames else 0
    counts = [[*map(len, frames)], [len(values) for _, values in curves], [*map(len, shares)], [len(leaders)]]
    if not blocks or {n for count in counts for n in count} != {blocks} or not several == len(shares) <= len(curves):
        raise ValueError(f"frames: expected of every class as many as values, shares and leaders, got {counts}")
    if leads_from is not None and not 1 <= leads_from <= blocks:
        raise ValueError(f"leads_from: expected None or a block, 1 to {blocks}, got {leads_from}")

    names = [name if len(name) <= 20 else f"{name[:19]}…" for name, _ in curves]
    leader = max(range(several), key=lambda k: curves[k][1][-1])
    colours = [_CLASS_COLOURS[k % len(_CLASS_COLOURS)] for k in range(several)] + [_GREY] * (len(curves) - several)
    column = max(72, 1092 // blocks)
    left, right, width = 240, 240 + blocks * column, 240 + blocks * column + 230
    scale = min((column - 6) / frames[0][0].width, 160 / frames[0][0].height)
    w, h = (max(1, round(scale * side)) for side in frames[0][0].size)
    maps = 120  # y, from above, of what is drawn: the maps, the curves from 100 % to 0, the bars, the note
    top = maps + max(30, several * (h + 6)) + 46
    bottom, floor, below = top + 270, top + 270 + 180, top + 270 + 180 + 24
    notes = textwrap.wrap(note, int(width / 7.5))

    page = Image.new("RGB", (_FINE * width, _FINE * (below + 24 * len(notes) + 16)), "white")
    pen, font_of = ImageDraw.Draw(page), cache(ImageFont.load_default)

    def text(x: float, y: float, words: str, size: int = 16, colour: str = _INK, anchor: str = "lm", most: int = 0):
        font = font_of(_FINE * size)
        words = truncate(words, font, _FINE * most) if most else words
        pen.text((_FINE * x, _FINE * y), words, colour, font, anchor=anchor)

    def line(*points: tuple[float, float], thickness: float = 1, colour: str = _PALE):
        pen.line([(_FINE * x, _FINE * y) for x, y in points], colour, round(_FINE * thickness), "curve")

    def box(x: float, y: float, x2: float, y2: float, colour: str):
        pen.rectangle((_FINE * x, _FINE * y, _FINE * x2, _FINE * y2), colour)

    def heading(y: float, title: str, *lines: str):
        text(24, y, title, 19)
        for i, words in enumerate(lines, 1):
            text(24, y + 3 + 21 * i, words, 15, _GREY)

    centres = [left + (b + 0.5) * column for b in range(blocks)]
    if leads_from is not None:
        start = left + (leads_from - 1) * column
        box(start, maps - 34, right, floor, _TINT)
        line((start, maps - 34), (start, floor), thickness=2, colour=colours[leader])
        said = f"{names[leader]} leads from block {leads_from} on"
        fits = font_of(17).getlength(said) < width - start - 16
        text(start + 8 if fits else start - 8, top - 24, said, 17, colours[leader], "lm" if fits else "rm")

    text(24, 34, "How the decision forms, block by block", 28)
    ends = [f"{name}: {_percent(values[-1])}" for name, (_, values) in zip(names, curves)]
    verdict = (
        f"{names[leader]} leads all other classes from block {leads_from} of {blocks} on"
        if leads_from is not None
        else "No explained class leads at the end"
        if several > 1
        else f"{names[0]} does not lead at the end"
    )
    text(24, 68, f"{verdict}. {quantity.capitalize()} after the last block: {', '.join(ends)}.", 18, most=width - 48)

    heading(maps + 8, "What counts so far", "the map accumulated", "up to each block:", "blue little, red much")
    for b, x in enumerate(centres, 1):
        text(x, maps - 18, f"block {b}", 15, anchor="mm")
    for k, row in enumerate(frames):
        for x, frame in zip(centres, row):
            small = frame.resize((_FINE * w, _FINE * h), Image.Resampling.LANCZOS)
            page.paste(small, (round(_FINE * (x - w / 2)), _FINE * (maps + k * (h + 6))))
        text(right + 12, maps + k * (h + 6) + h / 2, names[k], 17, colours[k], most=width - right - 20)

    thin = ["thin line: the runner-up"] if len(curves) > several else []
    heading(top + 8, "What it would say", quantity, "of the class, if this", "block were the last one", *thin)
    for percent in range(0, 101, 25):
        y = bottom + (top - bottom) * percent / 100
        line((left, y), (right, y))
        if percent % 50 == 0:
            text(left - 8, y, f"{percent} %", 14, _GREY, "rm")
    for k in reversed(range(len(curves))):
        thickness, radius = (4, 6) if k < several else (2, 3.5)
        points = [(x, bottom + (top - bottom) * value) for x, value in zip(centres, curves[k][1])]
        line(*points, thickness=thickness, colour=colours[k])
        for x, y in points:
            pen.ellipse([_FINE * side for side in (x - radius, y - radius, x + radius, y + radius)], colours[k])
    text(left - 8, bottom + 30, "the class that leads", 14, _GREY, "rm")
    for x, name in zip(centres, leaders):
        colour = next((c for (other, _), c in zip(curves, colours) if other == name), _GREY)
        text(x, bottom + 30, name, 14, colour, "mm", most=column - 6)
    ys = _apart([bottom + (top - bottom) * values[-1] for _, values in curves], 22, top, bottom)
    for end, y, colour in zip(ends, ys, colours):
        text(right + 12, y, end, 17, colour, most=width - right - 20)

    heading(bottom + 76, "What the block adds", "its share of the map", "after the last block")
    line((left, floor), (right, floor))
    wide, highest = min(0.7 * column, 100) / several, max(1e-9, *(share for row in shares for share in row))
    for k, row in enumerate(shares):
        for x, share in zip(centres, row):
            begin, y = x + (k - several / 2) * wide, floor - 90 * share / highest
            box(begin + 1, y, begin + wide - 1, floor, colours[k])
            if wide > 40:
                text(begin + wide / 2, y - 11, _percent(share), 14, anchor="mm")
    for i, words in enumerate(notes):
        text(24, below + 12 + 24 * i, words, 15, _GREY)
    return page.reduce(_FINE)


_FINE = 2  # times larger than it is returned is the page drawn, which smooths its lines
_INK, _GREY, _PALE, _TINT = "#1f2933", "#6b7785", "#d9dee4", "#fdf1de"
_CLASS_COLOURS = ("#c8500a", "#2563c9", "#0c8a5b", "#b0278f", "#8a6d00", "#c8102e", "#00838f", "#6a4fc4", "#5c7a1f",
                  "#8c4a32")  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or share == 0 else "< 1 %"


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved until neighbours are a gap apart; within the bounds while there is room, their order kept."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for i, place in enumerate(order):
        moved[place] = max(places[place], moved[order[i - 1]] + gap if i else low)
    for i, place in reversed([*enumerate(order, 1)]):
        moved[place] = min(moved[place], moved[order[i]] - gap if i < len(order) else high)
    return moved
