"""Write files atomically, and a flow as a folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from daam_vit.drawing import block_labels, contact_sheet, map_in_threads, overlay, quantize, render, side_by_side

Picture = Image.Image | Callable[[], Image.Image]
"""A picture, or a function that draws it."""


class Flow(Protocol):
    """The attributes of a `daam_core.AttentionFlow` that `save_flow` reads.

    This package must not import `daam_core`, which imports it; a protocol says what is needed without the class.
    """

    @property
    def block_maps(self) -> Tensor:
        """`(B, L, h, w)` or `(B, K, L, h, w)`."""

    @property
    def accumulated(self) -> Tensor:
        """The same shape."""

    @property
    def output(self) -> Tensor:
        """`(B, num_classes)` scores, or `(B, D)` features."""


def save_gif(frames: Sequence[Image.Image], path: str | os.PathLike, duration: int | Sequence[int] = 400) -> None:
    """Write an animated GIF that loops forever; the file is written atomically.

    Args:
        frames: RGB images of one size. Pillow merges equal neighbours into one longer frame; labels prevent that.
        path: the file; an older one is replaced.
        duration: milliseconds per frame, one number for all or one for each (GIF rounds to hundredths of a second).

    Raises:
        ValueError: if there are no frames, or a side is longer than 65,535 pixels, the limit of GIF.
    """
    if not frames:
        raise ValueError("frames: there are none; pass at least one")
    w, h = frames[0].size
    if max(w, h) > 65_535:
        raise ValueError(f"frames: a GIF has 65,535 pixels per side at most, got {w} x {h}; make them smaller")
    palettes = map_in_threads(quantize, frames)
    with atomic_write(path) as part:
        palettes[0].save(
            part, "GIF", save_all=True, append_images=palettes[1:], duration=duration, loop=0, optimize=False,
            disposal=1,
        )  # fmt: skip


def save_flow(
    directory: str | os.PathLike,
    image: Image.Image,
    flow: Flow,
    index: int = 0,
    caption: str = "",
    manifest: dict | None = None,
    duration: int = 400,
    pictures: Mapping[str, Picture] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Write the flow of one image as a folder.

        flow.gif                one frame per block; the last one stays three times as long
        frames/block_01.png ... the same frames, lossless
        sheet.png               the picture and all frames on one page
        maps.npz                `block_maps` and `accumulated` (L, h, w), `output` (num_classes,), all float32
        flow.json               the manifest

    For K classes the maps are (K, L, h, w), and every frame has K panels side by side. No file appears under its name
    before all of them are complete; other files in the folder stay.

    Args:
        directory: the folder; made if it is missing.
        image: the picture; the frames, or the panels of a frame, have its size.
        flow: from `attention_flow`.
        index: which image of the batch.
        caption: a few lines for the sheet.
        manifest: further entries of flow.json, ready for `json.dump`.
        duration: milliseconds per frame.
        pictures: further pictures for the folder, by file name, or functions that draw them while others are written.
        titles: the names of K classes, written above the panels.

    Returns:
        The folder.
    """
    directory = Path(directory).absolute()
    accumulated = flow.accumulated[index]
    *classes, blocks, h, w = accumulated.shape
    panels = [overlay(image, render(a), block_labels(blocks)) for a in accumulated.reshape(-1, blocks, h, w)]
    frames = side_by_side(panels, titles) if classes else panels[0]
    columns = max(1, min(4, 6 // len(panels)))
    drawn: dict[str, Picture] = {"sheet.png": partial(contact_sheet, image, frames, caption, columns)}
    drawn |= pictures or {}
    drawn |= {f"frames/block_{b:02d}.png": frame for b, frame in enumerate(frames, 1)}
    maps = {"block_maps": flow.block_maps[index], "accumulated": accumulated, "output": flow.output[index]}
    manifest = (manifest or {}) | {"blocks": blocks, "grid": [h, w]}

    with _atomic_folder(directory) as part:
        (part / "frames").mkdir()
        gif = partial(save_gif, frames, part / "flow.gif", [duration] * (blocks - 1) + [3 * duration])
        pngs = [partial(_save_png, part / name, picture) for name, picture in drawn.items()]
        map_in_threads(lambda write: write(), [gif, *pngs])
        arrays: dict[str, Any] = {name: m.detach().float().cpu().numpy() for name, m in maps.items()}
        np.savez(part / "maps.npz", **arrays)
        (part / "flow.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return directory


def _save_png(path: Path, picture: Picture) -> None:
    (picture() if callable(picture) else picture).save(path, compress_level=1)


@contextmanager
def _atomic_folder(directory: Path) -> Iterator[Path]:
    """Yield a new temporary folder, whose files move to `directory` at the end, flow.json last; then delete it."""
    part = _temporary_path(directory)
    try:
        part.mkdir(parents=True)
        yield part
        files = [p for p in part.rglob("*") if p.is_file()]
        for file in sorted(files, key=lambda p: p.name == "flow.json"):
            target = directory / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, or delete it after an exception."""
    path = Path(path)
    part = _temporary_path(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """Return a hidden path beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
