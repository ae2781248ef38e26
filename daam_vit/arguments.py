"""Check arguments: types, numbers, pictures, maps and paths.

Every message is one line that begins with the argument. A wrong Python type is a TypeError, a wrong value a ValueError.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from daam_vit.pixels import to_rgb
from daam_vit.text import printable

MAX_BYTES = 2**32
"""Largest picture, or stack of maps, in memory. A larger one is treated as a mistake: it could kill the process."""

# ----------------------------------------------------------------------------------------------------------------------
# Types and numbers
# ----------------------------------------------------------------------------------------------------------------------


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError unless the argument `name` has one of the types; a bool never has."""
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_sequence(name: str, values: Any, expected: str, count: int | None = None) -> None:
    """Raise unless `values` is a sequence other than text, with `count` elements if that is given."""
    scalar = isinstance(values, np.ndarray | Tensor) and not values.ndim
    if scalar or isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray | Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(values).__name__}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name}: expected {expected}, got {len(values)}")


def check_rows(name: str, rows: Any, expected: str) -> list[list]:
    """Return a sequence of sequences as lists."""
    check_sequence(name, rows, expected)
    for row in rows:
        check_sequence(name, row, expected)
    return [row.tolist() if isinstance(row, np.ndarray | Tensor) else list(row) for row in rows]


def check_texts(name: str, texts: Any, count: int, what: str) -> None:
    """Raise unless `texts` is a sequence of `count` texts, one for each of the things that `what` names."""
    check_sequence(name, texts, f"one for each of {count} {what}", count)
    for text in texts:
        check_type(name, text, str, "texts")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an integer of any type, also of numpy or torch, as an int; raise unless it is within two bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {_shown(value)}")
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {_shown(number)}")
    return number


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless a value is a real number within two bounds; NaN never is."""
    check_type(name, value, Real, "a number")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:,.10g} to {high:,.10g}, got {_shown(value)}")


def check_size(name: str, size: Any) -> tuple[int, int]:
    """Return two sides in pixels, as integers."""
    check_sequence(name, size, "two integers", 2)
    first, second = (check_integer(name, side, 1) for side in size)
    return first, second


def check_memory(name: str, *shape: int) -> None:
    """Raise a ValueError if an array of bytes of this shape is larger than `MAX_BYTES`."""
    if math.prod(shape) > MAX_BYTES:
        sides = " x ".join(map(_shown, shape))
        raise ValueError(f"{name}: {sides} bytes are more than {MAX_BYTES >> 30} GiB; make the picture smaller")


def check_path(name: str, path: Any) -> Path:
    """Return a path; raise unless the operating system accepts it. The file need not exist."""
    check_type(name, path, (str, os.PathLike), "a path")
    text = os.fspath(path)
    check_type(name, text, str, "a path of characters")
    if not text:
        raise ValueError(f"{name}: is empty; pass a path, '.' for the current folder")
    try:
        os.stat(text)
    except (FileNotFoundError, PermissionError):  # it may be created later; the error of writing says more
        pass
    except (OSError, ValueError) as error:  # too long, below a file, with a NUL, or not in the system's encoding
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name}: {printable(reason, 200)}, got {_shown(text)}; pass another path") from error
    return Path(text)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and maps
# ----------------------------------------------------------------------------------------------------------------------


def check_image(name: str, image: Any) -> Image.Image:
    """Return a picture, a PIL image of any mode or an array `(H, W, 3)` of uint8, as an RGB image."""
    expected = "a PIL image or an array (H, W, 3) of uint8"
    check_type(name, image, (Image.Image, np.ndarray), expected)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"{name}: expected {expected}, got {image.shape} {image.dtype}")
        return Image.fromarray(image)
    if not all(image.size):
        raise ValueError(f"{name}: expected {expected}, got {image.width} x {image.height} pixels")
    try:
        image.load()
        return image if image.mode == "RGB" and "transparency" not in image.info else to_rgb(image)
    except (OSError, SyntaxError) as error:  # Pillow reads the pixels of an open file only now
        raise ValueError(f"{name}: cannot be read: {printable(str(error), 200)}") from error


def check_frames(name: str, frames: Any) -> list[Image.Image]:
    """Return frames as RGB images; raise unless there is at least one and all have the same size."""
    check_sequence(name, frames, "a sequence of PIL images")
    if not len(frames):
        raise ValueError(f"{name}: there are none; pass at least one")
    images = [check_image(name, frame) for frame in frames]
    sizes = list(dict.fromkeys(image.size for image in images))
    if len(sizes) > 1:
        (w, h), (w2, h2) = sizes[:2]
        raise ValueError(f"{name}: expected one size for all, got {w} x {h} and {w2} x {h2}")
    return images


def check_maps(name: str, maps: Any, ndim: tuple[int, ...], expected: str) -> np.ndarray:
    """Return maps, a tensor, array or nested sequence of real numbers, as float32; raise unless all are finite.

    Args:
        name: the argument.
        maps: the maps.
        ndim: allowed numbers of dimensions.
        expected: what they are, for the error.
    """
    if isinstance(maps, str | bytes) or not isinstance(maps, Tensor | np.ndarray | Sequence):
        raise TypeError(f"{name}: expected {expected}, got {type(maps).__name__}")
    try:
        array = _to_array(maps)
    except (RuntimeError, TypeError, ValueError) as error:  # sparse, meta, complex, ragged, of objects ...
        raise ValueError(f"{name}: expected dense real numbers, got {_kind(maps)}") from error
    if array.ndim not in ndim or array.size == 0:
        raise ValueError(f"{name}: expected {expected}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: has NaN or infinite values")
    return array


def _to_array(maps: Any) -> np.ndarray:
    if isinstance(maps, Tensor):
        if maps.is_complex() or maps.dtype == torch.bool:
            raise TypeError(maps.dtype)
        return maps.detach().cpu().float().numpy()
    array = np.asarray(maps)
    if array.dtype.kind not in "fiu":
        raise TypeError(array.dtype)
    with np.errstate(over="ignore"):  # float64 that does not fit becomes infinite, and is refused
        return array.astype(np.float32, copy=False)


def _kind(maps: Any) -> str:
    if isinstance(maps, Tensor):
        return f"{maps.dtype}, {maps.layout}, on {maps.device}"
    return str(maps.dtype) if isinstance(maps, np.ndarray) else _shown(maps)


def _shown(value: object) -> str:
    """Return a value, short and on one line."""
    return printable(reprlib.repr(value), 60)
