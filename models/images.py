"""Find image files and read them as RGB, whatever their format; errors are one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 8
"""Pixels; an image with a shorter side is refused."""


def find_images(path: str | Path) -> list[Path]:
    """Return `[path]` for a file, or the sorted image files of a folder, without its sub-folders.

    Raises:
        ValueError: if the path does not exist or the folder has no images.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if looks_like_image(p.name) and p.is_file())
        if not files:
            raise ValueError(f"image: the folder {path} has no images")
        return files
    if not path.exists():
        raise ValueError(f"image: there is no file {path}")
    return [path]


def looks_like_image(name: str) -> bool:
    """Return True for the name of a visible file with an extension that Pillow can open."""
    return name[0] != "." and Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in Image.OPEN


def read_image(path: str | Path) -> Image.Image:
    """Read the first frame of an image as RGB.

    The EXIF orientation is applied, transparency becomes white, and 16 bits are scaled to 8.

    Raises:
        ValueError: if the file is missing, empty, damaged or not an image, or the image is smaller than `MIN_SIDE` or
            larger than Pillow's limit.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                image = _rgb(ImageOps.exif_transpose(file))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS // 1_000_000
        raise ValueError(f"image: {path} has more than {limit} million pixels; scale it down") from None
    except UnidentifiedImageError:
        reason = "is empty" if path.stat().st_size == 0 else "is not an image that Pillow can read"
        raise ValueError(f"image: {path} {reason}") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for a damaged file
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ValueError(f"image: {path} {reason}") from None
    if min(image.size) < MIN_SIDE:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"image: {path} has {size} pixels; the minimum is {MIN_SIDE} x {MIN_SIDE}")
    return image


def resize_longest_side(
    image: Image.Image, side: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels; the other has at least 1."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * pixels)) for pixels in image.size], resampling)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # these modes have no fixed range, so stretch the values
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
