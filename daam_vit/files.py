"""Write files atomically, and a flow as a folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from daam_vit.drawing import block_labels, contact_sheet, map_in_threads, overlay, quantize, render, side_by_side


class Flow(Protocol):
    """What `save_flow` reads of a `daam_core.AttentionFlow`."""

    @property
    def block_maps(self) -> Tensor: ...
    @property
    def accumulated(self) -> Tensor: ...
    @property
    def output(self) -> Tensor: ...


def save_gif(frames: Sequence[Image.Image], path: str | os.PathLike, duration: int | Sequence[int] = 400) -> None:
    """Write an animated GIF that repeats for ever; the file appears whole or not at all.

    Args:
        frames: RGB images of one size. Equal neighbours become one frame that lasts longer; labels prevent that.
        path: where; an older file is replaced.
        duration: milliseconds a frame, one number or one a frame (GIF counts in hundredths of a second).

    Raises:
        ValueError: when there are no frames, or they are larger than a GIF can be, 65,535 pixels a side.
    """
    if not frames:
        raise ValueError("frames: there are none")
    w, h = frames[0].size
    if max(w, h) > 65_535:
        raise ValueError(f"frames: a GIF has 65,535 pixels a side at most, got {w} x {h}; make them smaller")
    palettes = map_in_threads(quantize, frames)
    with atomic_write(path) as part:
        palettes[0].save(
            part,
            "GIF",
            save_all=True,
            append_images=palettes[1:],
            duration=duration,
            loop=0,
            optimize=False,
            disposal=1,
        )


def save_flow(
    directory: str | os.PathLike,
    image: Image.Image,
    flow: Flow,
    index: int = 0,
    caption: str = "",
    manifest: dict | None = None,
    duration: int = 400,
    pictures: dict[str, Image.Image | Callable[[], Image.Image]] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Write the flow of one image as a folder.

        flow.gif                one frame a block; the last one stays three times as long
        frames/block_01.png ... the same frames, lossless
        sheet.png               the picture and all frames at a glance
        maps.npz                `block_maps` and `accumulated` (L, h, w), `output` (num_classes,), all float32
        flow.json               the manifest

    Of K classes the maps are (K, L, h, w), and every frame has K panels beside each other. Files appear under their
    names when all of them are whole; other files in the folder stay.

    Args:
        directory: the folder; made where it is missing.
        image: the picture; the frames, or the panels of a frame, have its size.
        flow: from `attention_flow`.
        index: which image of the batch.
        caption: a few lines for the sheet.
        manifest: what else belongs into flow.json, ready for `json.dump`.
        duration: milliseconds a frame.
        pictures: more pictures for the folder, by file name; or what draws them, while the others are written.
        titles: of K classes, their names, written above the panels.

    Returns:
        The folder.
    """
    directory = Path(directory).absolute()
    accumulated = flow.accumulated[index]
    *classes, blocks, h, w = accumulated.shape
    panels = [overlay(image, render(a), block_labels(blocks)) for a in accumulated.reshape(-1, blocks, h, w)]
    frames = side_by_side(panels, titles) if classes else panels[0]
    columns = max(1, min(4, 6 // len(panels)))
    maps = {"block_maps": flow.block_maps[index], "accumulated": accumulated, "output": flow.output[index]}
    manifest = (manifest or {}) | {"blocks": blocks, "grid": [h, w]}

    part = _temporary_path(directory)

    def draw(name: str, picture: Image.Image | Callable[[], Image.Image]) -> None:
        (picture() if callable(picture) else picture).save(part / name, compress_level=1)

    drawn = {"sheet.png": partial(contact_sheet, image, frames, caption, columns)} | (pictures or {})
    drawn |= {f"frames/block_{b:02d}.png": frame for b, frame in enumerate(frames, 1)}
    gif = partial(save_gif, frames, part / "flow.gif", [duration] * (blocks - 1) + [3 * duration])
    try:
        (part / "frames").mkdir(parents=True)
        map_in_threads(lambda write: write(), [gif, *(partial(draw, *named) for named in drawn.items())])
        np.savez(part / "maps.npz", **{name: m.detach().float().cpu().numpy() for name, m in maps.items()})
        (part / "flow.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (directory / "frames").mkdir(parents=True, exist_ok=True)
        files = [p for p in part.rglob("*") if p.is_file()]
        for file in sorted(files, key=lambda p: p.name == "flow.json"):  # the manifest last
            os.replace(file, directory / file.relative_to(part))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end of the `with`, deleted after an exception."""
    path = Path(path)
    part = _temporary_path(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
