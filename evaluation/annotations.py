"""Read where the object is: boxes of VOC and ImageNet (XML) or masks (PNG) become a region, one boolean per pixel."""

from __future__ import annotations

import math
import os
import warnings
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import ExifTags, Image, ImageOps

from daam_vit.pixels import to_rgb
from daam_vit.text import printable
from models.images import FORMATS

VOID = 255
"""Index of the border between objects in the palette masks of VOC; it belongs to no object."""
LARGEST = 10**9
"""Longest side in pixels of an annotated photo; a longer one is treated as a mistake."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


def region_of(folder: str | Path, images: str | Path, photo: str | Path, size: tuple[int, int]) -> np.ndarray | None:
    """Return the region of the objects in a photo.

    Args:
        folder: folder of the annotations; may be that of the photos.
        images: folder of the photos.
        photo: path in `images`, such as "cup/image_0001.jpg".
        size: width and height of the photo as `models.images.read_image` returns it, upright.

    Returns:
        `(H, W)` bool; None if the photo has no annotation, or one without an object.

    Raises:
        ValueError: if the annotation is damaged or not a file, or was made before the photo was turned upright.
    """
    path = find_annotation(folder, images, photo)
    if path is None:
        return None
    region = _boxes(path, size) if path.suffix == ".xml" else _mask(path, size)
    return region if region.any() else None


def find_annotation(folder: str | Path, images: str | Path, photo: str | Path) -> Path | None:
    """Return the annotation of a photo, never the photo itself; None if there is none.

    It is `<folder>/<path of the photo>` with the suffix `.xml` or `.png`, or the same directly in the folder, as in VOC
    and the validation set of ImageNet: `<folder>/<stem>.xml` or `.png`.

    Raises:
        ValueError: if it is a folder, a pipe or the like.
    """
    itself = Path(images, photo)
    for name in dict.fromkeys([photo, itself.name]):
        for suffix in (".xml", ".png"):
            path = Path(folder, name).with_suffix(suffix)
            if not os.path.exists(path) or (os.path.exists(itself) and path.samefile(itself)):
                continue
            if not path.is_file():  # a pipe would be read for ever
                raise ValueError(f"annotations: {_shown(path)} is not a file; remove it")
            return path
    return None


def _boxes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return every pixel that a box touches. VOC counts pixels from 1, and the last one is inside."""
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_PlainTree())).getroot()
        annotated = tuple(int(root.findtext(f"size/{key}", "0")) for key in ("width", "height"))
        boxes = [[float(box.findtext(key, "nan")) for key in SIDES] for box in root.iterfind("object/bndbox")]
        if not all(math.isfinite(sum(box)) and box[0] <= box[2] and box[1] <= box[3] for box in boxes):
            raise ValueError("a side of a box is missing or no number, or its sides are swapped")
        if not all(0 <= side <= LARGEST for side in annotated):
            raise ValueError(f"its size is not 0 to {LARGEST:,} pixels")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise _damaged(path, error) from None
    annotated = annotated if min(annotated) > 0 else size
    _check_upright(path, annotated, size)
    region = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        region[_span(top, bottom, annotated[1], size[1]), _span(left, right, annotated[0], size[0])] = True
    return region


def _span(first: float, last: float, annotated: int, size: int) -> slice:
    """Return the pixels of a photo, of `size`, that the pixels `first` to `last` of `annotated` touch."""
    first, last = min(first, annotated + 1), min(last, annotated)
    return slice(max(0, math.floor((first - 1) * size / annotated)), max(0, math.ceil(last * size / annotated)))


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels of the objects, upright and scaled to the size of the photo."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
                file.load()
                region = Image.fromarray(_objects(file))
                with suppress(Exception):  # Pillow raises many types for broken metadata
                    region.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
        region = ImageOps.exif_transpose(region)
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise _damaged(path, error) from None
    _check_upright(path, region.size, size)
    return np.asarray(region.resize(size, Image.Resampling.NEAREST))


def _objects(mask: Image.Image) -> np.ndarray:
    """Return every pixel that is not black, transparent or NaN, or whose index in a palette is neither 0 nor `VOID`."""
    opaque = np.asarray(mask.convert("RGBA"))[..., 3] > 0 if mask.has_transparency_data else True
    if mask.mode in ("P", "PA"):
        index = np.asarray(mask.getchannel("P"))
        return (index != 0) & (index != VOID) & opaque
    if len(mask.getbands()) > 1:
        coloured = mask.convert("RGBA") if mask.mode in ("LA", "RGBA") else to_rgb(mask)
        return np.asarray(coloured)[..., :3].any(2) & opaque
    values = np.asarray(mask)
    return (values != 0) & (values == values) & opaque


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"annotations: {_shown(path)} is damaged: {printable(str(error), 100)}; repair or remove it")


def _shown(path: Path) -> str:
    return printable(str(path), 150)


def _check_upright(path: Path, annotated: tuple[int, int], size: tuple[int, int]) -> None:
    if annotated != size and annotated == size[::-1]:
        raise ValueError(
            f"annotations: {_shown(path)} is for {annotated[0]} x {annotated[1]} pixels, the upright photo has "
            f"{size[0]} x {size[1]}; rotate the annotation as the photo's EXIF says, or remove it"
        )


class _PlainTree(ElementTree.TreeBuilder):
    """Tree without entities, which can expand a small file to any size."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do not need")
