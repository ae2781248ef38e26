"""Turn a picture of any Pillow mode into RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

BITS, COMPRESSION, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 259, 262, 284, 339
"""Tags that say what the numbers in a TIFF mean (TIFF 6.0); Pillow ignores some of them."""
UNSIGNED, SIGNED = 1, 2
"""Values of `SAMPLE_FORMAT`."""
GDAL_NODATA = 42113
"""TIFF tag with the value of pixels without data, as text (https://gdal.org/drivers/raster/gtiff.html)."""
APART = 10
"""A lowest or highest value is missing data if its gap to all others is more than this many times their range."""
CUSTOMARY = (-999, -9999, -99999, -32768)
"""Values that often stand for missing data; a gap of more than the range of the others is enough for them."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB.

    Transparency becomes white, and 16 bits are scaled to 8. Modes I (32-bit integers) and F (floats), and the signed
    integers of TIFF, have no fixed range: the lowest value becomes black, and the highest white. NaN, infinity and
    values that stand for missing data do not take part in this range and are black.

    Raises:
        ValueError: if no pixel has data, or Pillow mixes up the planes of a TIFF.
    """
    image.load()  # the mode of an icon is not known before
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, kind = (tags.get(tag, (1,))[0] for tag in (BITS, SAMPLE_FORMAT))
    if tags.get(PLANES) == 2 and bits == 16 and tags.get(COMPRESSION) == 1:
        raise ValueError("image: its 16-bit planes are not compressed, which Pillow cannot read; compress it by LZW")
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or (image.mode == "L" and kind == SIGNED):
        greys = _to_8_bits(image, bits, kind, white_is_low=tags.get(PHOTOMETRIC) == 0)
        return Image.fromarray(greys.round().astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these to their plain mode only
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "P" or image.has_transparency_data:  # an icon may have no palette before it is converted
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, bits: int, kind: int, white_is_low: bool) -> np.ndarray:
    """Return the only band of an image as floats from 0 to 255; the arguments are tags of a TIFF."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: 65535 is always white
        white = 4095 if bits == 12 else 65535
        values = _sixteen_bits(image)
        return (white - values if white_is_low else values) / (white / 255)
    dtypes = {("I", 32, UNSIGNED): np.uint32, ("L", 8, SIGNED): np.int8}  # Pillow swaps signed and unsigned here
    values = np.asarray(image)
    values = values.view(dtypes.get((image.mode, bits, kind), values.dtype)).astype(np.float64)
    sign = -1 if white_is_low else 1
    return _stretched(sign * values, sign * _declared_missing(image))


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
