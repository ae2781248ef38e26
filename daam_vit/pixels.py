"""Turn a picture of any Pillow mode into RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

GDAL_NODATA = 42113
"""TIFF tag with the value of pixels without data, as text (https://gdal.org/drivers/raster/gtiff.html)."""
APART = 10
"""A lowest or highest value is missing data if its gap to all others is more than this many times their range."""
CUSTOMARY = (-999, -9999, -99999, -32768)
"""Values that often stand for missing data; a gap of more than the range of the others is enough for them."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB.

    Transparency becomes white, and 16 bits are scaled to 8. Modes I (32-bit integers) and F (floats) have no fixed
    range: the lowest value becomes black, and the highest white. NaN, infinity and values that stand for missing data
    do not take part in this range and are black.

    Raises:
        ValueError: if no pixel has data.
    """
    image.load()  # the mode of an icon is not known before
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: 65535 is always white
        return _grey(_sixteen_bits(image) / 257)
    if image.mode in ("I", "F"):
        return _grey(_stretched(np.asarray(image, np.float64), _declared_missing(image)))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these to their plain mode only
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "P" or image.has_transparency_data:  # an icon may have no palette before it is converted
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    return values if transparent is None else np.where(values == transparent, 65535, values)


def _stretched(values: np.ndarray, nodata: float) -> np.ndarray:
    """Scale the values that are data to 0..255; the others become 0."""
    known = np.isfinite(values)
    if np.isfinite(nodata):
        known &= ~np.isclose(values, nodata, rtol=2e-6, atol=0)  # the text of the tag is rounded, and so are the values
    if not known.any():
        raise ValueError("image: all pixels are NaN, infinite or declared as missing; pass another file")
    low, high = _range(values[known])
    known &= (low <= values) & (values <= high)
    return np.where(known, (values - low) / (high - low or 1) * 255, 0)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the lowest and the highest value, without those that stand for missing data, such as -9999 or 1e20."""
    low, high = values.min(), values.max()
    inner = values[(low < values) & (values < high)]
    if not inner.size:
        return low, high
    second, last = inner.min(), inner.max()
    if last > second and all(_apart(v, gap, last - second) for v, gap in ((low, second - low), (high, high - last))):
        return second, last
    if _apart(low, second - low, high - second):
        return second, high
    if _apart(high, high - last, last - low):
        return low, last
    return low, high


def _apart(value: float, gap: float, spread: float) -> bool:
    return gap > spread * (1 if value in CUSTOMARY else APART)


def _declared_missing(image: Image.Image) -> float:
    """Return the value of missing data that a GeoTIFF declares, or NaN."""
    try:
        return float(getattr(image, "tag_v2", {})[GDAL_NODATA].strip("\0 "))
    except (AttributeError, KeyError, TypeError, ValueError):
        return float("nan")
