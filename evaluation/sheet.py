"""Draw a sheet of photos: those where a method does best, and those where it does worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from daam_vit.files import atomic_write
from daam_vit.fonts import width_of, write
from models.images import resize_longest_side


def write_sheet(
    photos: Sequence[dict],
    methods: Sequence[str],
    picture: Callable[[dict, str], Image.Image],
    path: str | Path,
    count: int = 3,
    side: int = 150,
) -> None:
    """Write a picture with one row per method: the photos where it does best, and those where it does worst.

    Args:
        photos: records of `photos.jsonl`; those without scores of a method are skipped.
        methods: names.
        picture: draws the map of a method over the photo of a record, in any size.
        path: the PNG.
        count: photos at each end; fewer if a photo would be at both.
        side: longest side of a photo, in pixels.

    Raises:
        ValueError: if no photo has deletion and insertion of a method.
    """
    ranked = {method: best_first(photos, method) for method in methods}
    ranked = {method: records for method, records in ranked.items() if records}
    if not ranked:
        raise ValueError("photos: none has both deletion and insertion; a sheet needs them")
    font_size, gap, line = 13, 8, 17
    left = min(2 * side, max(math.ceil(width_of(method, font_size)) for method in ranked)) + 2 * gap
    right = left + count * (side + gap) + 2 * gap  # the worst begin here
    width = right + count * (side + gap)
    rows = [Image.new("RGB", (width, line + 2 * gap), "white")]
    for x, words in ((left, "best: insertion high, deletion low"), (right, "worst")):
        write(ImageDraw.Draw(rows[0]), (x, gap), words, font_size, max_width=count * side)
    for method, records in ranked.items():
        best, worst = records[: min(count, (len(records) + 1) // 2)], records[::-1][: min(count, len(records) // 2)]
        places = [(x + i * (side + gap), r) for x, end in ((left, best), (right, worst)) for i, r in enumerate(end)]
        tiles = [resize_longest_side(picture(r, method).convert("RGB"), side) for _, r in places]
        height = max(tile.height for tile in tiles)
        rows.append(Image.new("RGB", (width, height + 2 * line + 2 * gap), "white"))
        draw = ImageDraw.Draw(rows[-1])
        write(draw, (gap, height // 2), method, font_size, anchor="lm", max_width=left - 2 * gap)
        for (x, record), tile in zip(places, tiles):
            rows[-1].paste(tile, (x, height - tile.height))
            insertion, deletion = areas(record, method)
            for i, words in enumerate((record["name"], f"ins {insertion:.2f}  del {deletion:.2f}")):
                write(draw, (x, height + 3 + i * line), words, font_size, max_width=side)
    page = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    with atomic_write(path) as part:
        page.save(part, "PNG")


def best_first(photos: Iterable[dict], method: str) -> list[dict]:
    """Sort the records with scores of a method by insertion minus deletion, each averaged over its baselines."""
    measured = [record for record in photos if areas(record, method) is not None]
    return sorted(measured, key=lambda record: np.subtract(*areas(record, method)), reverse=True)


def areas(record: dict, method: str) -> tuple[float, float] | None:
    """Return insertion and deletion of a method, each averaged over its baselines; None if one is missing."""
    scores = record["scores"].get(method, {})
    kinds = [[v for k, v in scores.items() if k.startswith(f"{kind}_")] for kind in ("insertion", "deletion")]
    return (float(np.mean(kinds[0])), float(np.mean(kinds[1]))) if all(kinds) else None
