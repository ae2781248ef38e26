"""Draw maps: grey levels, colours over the picture, contact sheets and animated GIFs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from daam_vit.arguments import (
    check_frames,
    check_image,
    check_integer,
    check_maps,
    check_memory,
    check_rows,
    check_size,
    check_texts,
    check_type,
)
from daam_vit.fonts import write, write_lines

_Result = TypeVar("_Result")

_BAND = 32
"""Rows of a picture that are blended at once."""


def render(accumulated: Tensor | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Draw the flow of one image as grey levels.

    x = sigmoid(5 A_b / max A_L) - 0.5 is stretched to 0..1 block by block; heat = floor(255 x) is resized bilinearly.
    A flat map becomes zero. Negative values, which the relevance flow has, are set to zero first: a picture shows what
    speaks for the class, and is zero throughout if nothing in A_L does.

    Args:
        accumulated: `(L, h, w)`, A_1 ... A_L of one image.
        size: `(H, W)` in pixels; None: the patch grid.

    Returns:
        `(L, H, W)` uint8.

    Raises:
        ValueError: if `accumulated` is not `(L, h, w)`, not finite or beyond 6.8e37, or a side of `size` is below 1.
        TypeError: if `accumulated` or `size` has the wrong type.
    """
    accumulated = check_maps("accumulated", accumulated, (3,), "the maps (L, h, w) of one image")
    if np.abs(accumulated).max() > np.finfo(np.float32).max / 5:
        raise ValueError("accumulated: has values beyond 6.8e37, for which 5 A_b is infinite; scale the maps down")
    if size is not None:
        size = check_size("size", size)
        check_memory("size", len(accumulated), *size)

    accumulated = accumulated.clip(min=0)
    m = accumulated[-1].max()
    heat = np.zeros(accumulated.shape, np.uint8)
    for a, out in zip(accumulated, heat):
        if m > 0 and a.max() > a.min():
            with np.errstate(over="ignore"):  # a / m = inf is right: 1 / (1 + exp(-inf)) = 1
                x = 1 / (1 + np.exp(-5 * a / m)) - 0.5
            if x.max() > x.min():
                x = (x - x.min()) / (x.max() - x.min())
                out[:] = np.floor(255 * x)
    return heat if size is None else _resize(heat, size)


def overlay(
    image: Image.Image | np.ndarray, heat: np.ndarray, labels: Sequence[str] | None = None
) -> list[Image.Image]:
    """Blend the heat, in the colours of JET, with the picture: clip(0.4 colour + 0.8 image, 0, 255).

    Args:
        image: a PIL image of any mode, or `(H, W, 3)` uint8 RGB.
        heat: `(L, h, w)` uint8 from `render`; resized bilinearly to the size of the image.
        labels: a text for every frame, drawn in its corner (see `block_labels`).

    Returns:
        L RGB images of the size of the image.

    Raises:
        ValueError: if `image` or `heat` has the wrong shape or dtype, or there is not one label per frame.
        TypeError: if one of them has the wrong type.
    """
    photo = np.asarray(check_image("image", image))
    check_type("heat", heat, np.ndarray, "an array (L, H, W) of uint8 as render returns it")
    if heat.ndim != 3 or heat.dtype != np.uint8 or heat.size == 0:
        raise ValueError(f"heat: expected (L, H, W) uint8 as render returns it, got {heat.shape} {heat.dtype}")
    if labels is not None:
        check_texts("labels", labels, len(heat), "frames")

    def draw(grey: np.ndarray, label: str) -> Image.Image:
        pixels = np.empty_like(photo)
        for top in range(0, len(photo), _BAND):  # blended in float64, which takes too much memory for a whole photo
            band = slice(top, top + _BAND)
            colour = cv2.applyColorMap(grey[band], cv2.COLORMAP_JET)[..., ::-1]  # BGR -> RGB
            pixels[band] = np.clip(0.4 * colour + 0.8 * photo[band], 0, 255)
        frame = Image.fromarray(pixels)
        if label:
            _write_label(frame, label)
        return frame

    return map_in_threads(draw, _resize(heat, photo.shape[:2]), [""] * len(heat) if labels is None else labels)


def block_labels(blocks: int) -> list[str]:
    """Return the labels "1/12", "2/12", ... for `overlay`; they also keep GIF writers from merging equal frames."""
    blocks = check_integer("blocks", blocks, 1)
    return [f"{b}/{blocks}" for b in range(1, blocks + 1)]


def side_by_side(panels: Sequence[Sequence[Image.Image]], titles: Sequence[str] | None = None) -> list[Image.Image]:
    """Put the flows of several classes of one picture side by side.

    Args:
        panels: for each of K classes its L frames from `overlay`, all of one size.
        titles: a text for every class, written above its panel and truncated to its width.

    Returns:
        L RGB images, K panels wide.

    Raises:
        ValueError: if the classes have different numbers of frames, or frames of different sizes, or there is not one
            title per class.
        TypeError: if a panel or a title has the wrong type.
    """
    panels = check_rows("panels", panels, "for each class its frames")
    counts = [len(frames) for frames in panels]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"panels: expected the same number of frames for every class, got {counts}")
    images = check_frames("panels", [frame for frames in panels for frame in frames])
    if titles is not None:
        check_texts("titles", titles, len(panels), "classes")
    w, h = images[0].size
    height = _text_height((w, h))
    gap, top = max(2, height // 3), 0 if titles is None else 3 * height // 2
    check_memory("panels", len(panels) * (w + gap), top + h, 4)
    page = Image.new("RGB", (len(panels) * (w + gap) - gap, top + h), "white")
    for k, title in enumerate([] if titles is None else titles):
        write(ImageDraw.Draw(page), (k * (w + gap) + w / 2, top / 2), title, height, anchor="mm", max_width=w)
    pages = [page.copy() for _ in range(counts[0])]
    for i, frame in enumerate(images):
        k, b = divmod(i, counts[0])
        pages[b].paste(frame, (k * (w + gap), top))
    return pages


def contact_sheet(
    image: Image.Image, frames: Sequence[Image.Image], caption: str = "", columns: int = 4, side: int = 288
) -> Image.Image:
    """Arrange all blocks on one page: the picture with its caption on the left, the frames beside it, row by row.

    Args:
        image: the picture, in any mode.
        frames: from `overlay` or `side_by_side`, of one size; resized by the same factor as the picture.
        caption: a few short lines, written below the picture.
        columns: frames per row.
        side: the longer side of the resized picture in pixels.

    Returns:
        One RGB image.

    Raises:
        ValueError: if there are no frames, their sizes differ, `columns` or `side` is below 1, or the page too large.
        TypeError: if an argument has the wrong type.
    """
    image, frames = check_image("image", image), check_frames("frames", frames)
    check_type("caption", caption, str, "a text")
    columns, side = check_integer("columns", columns, 1), check_integer("side", side, 1)

    scale = side / max(image.size)
    (w, h), (frame_w, frame_h) = ([max(1, round(scale * x)) for x in size] for size in (image.size, frames[0].size))
    gap, left, rows = 8, max(w, side), math.ceil(len(frames) / columns)
    step = frame_w + (gap if frame_w == w else 3 * gap)  # frames with panels stand further apart than their panels
    lines = caption.splitlines()
    width = left + 3 * gap + (min(columns, len(frames)) - 1) * step + frame_w
    height = max(rows * (frame_h + gap), h + gap + 24 * len(lines)) + gap
    check_memory("side", width, height, 4)
    page = Image.new("RGB", (width, height), "white")
    page.paste(image.resize((w, h), Image.Resampling.LANCZOS), (gap, gap))
    write_lines(ImageDraw.Draw(page), (gap, h + 2 * gap), lines, 17, spacing=7)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        corner = (left + 2 * gap + column * step, gap + row * (frame_h + gap))
        page.paste(frame.resize((frame_w, frame_h), Image.Resampling.LANCZOS), corner)
    return page


def quantize(frame: Image.Image, pixels: int = 10_000) -> Image.Image:
    """Reduce an image to 256 colours.

    The palette is the median cut of about `pixels` of its pixels, with five bits per channel, after one step of
    k-means: closer to the image than the median cut of all pixels, in a tenth of the time.
    """
    step = max(1, math.isqrt(frame.width * frame.height // pixels))
    coarse = (np.asarray(frame)[::step, ::step] & 0b11111000) + 0b100
    colours = Image.fromarray(coarse).quantize(256, kmeans=1)
    return frame.quantize(palette=colours, dither=Image.Dither.NONE)


def map_in_threads(function: Callable[..., _Result], *arguments: Iterable) -> list[_Result]:
    """Map a function over its arguments on all cores: Pillow lets other threads run while it computes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *arguments))


def _resize(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize `(L, h, w)` uint8 bilinearly to `(L, H, W)`."""
    h, w = size
    if heat.shape[1:] == (h, w):
        return heat
    return np.stack([cv2.resize(grey, (w, h), interpolation=cv2.INTER_LINEAR) for grey in heat])


def _text_height(size: tuple[int, int]) -> int:
    """Return the height in pixels of text on frames of this size."""
    return max(10, min(size) // 14)


def _write_label(frame: Image.Image, text: str) -> None:
    height = _text_height(frame.size)
    margin, stroke = height // 3, max(1, height // 10)
    write(ImageDraw.Draw(frame), (margin, margin), text, height, "white", stroke_width=stroke, stroke_fill="black")
