"""Where the object is: boxes of VOC and ImageNet (XML) and masks (PNG) become a region, one boolean a pixel."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

VOID = 255
"""The border between objects in the palette masks of VOC; it belongs to none."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


def region_of(folder: str | Path, images: str | Path, photo: str, size: tuple[int, int]) -> np.ndarray | None:
    """The region of the object of a photo.

    Args:
        folder: of the annotations; may be the folder of the photos.
        images: the folder of the photos.
        photo: relative to `images`, such as "cup/image_0001.jpg".
        size: width and height of the photo as `models.images.read_image` gives it, upright.

    Returns:
        `(H, W)` bool; None when the photo has no annotation, or one without an object.

    Raises:
        ValueError: when the annotation is damaged, or for the photo before it was turned upright.
    """
    path = find_annotation(folder, images, photo)
    if path is None:
        return None
    region = _boxes(path, size) if path.suffix == ".xml" else _mask(path, size)
    return region if region.any() else None


def find_annotation(folder: str | Path, images: str | Path, photo: str) -> Path | None:
    """`<folder>/<photo>.xml` or `.png`, without the suffix of the photo; then the same beside all others, as in VOC and
    the validation of ImageNet: `<folder>/<stem>.xml` or `.png`. Never the photo itself. None when there is none."""
    itself = Path(images, photo)
    for name in dict.fromkeys([photo, itself.name]):
        for suffix in (".xml", ".png"):
            path = Path(folder, name).with_suffix(suffix)
            if path.is_file() and not (itself.exists() and path.samefile(itself)):
                return path
    return None


def _boxes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The union of all boxes: every pixel that one touches. VOC counts pixels from 1, and the last one is inside."""
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_PlainTree())).getroot()
        annotated = tuple(int(root.findtext(f"size/{key}", "0")) for key in ("width", "height"))
        boxes = [[float(box.findtext(key, "nan")) for key in SIDES] for box in root.iterfind("object/bndbox")]
        if not all(math.isfinite(sum(box)) and box[0] <= box[2] and box[1] <= box[3] for box in boxes):
            raise ValueError("a box lacks a side, or its sides are the wrong way round")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"annotations: {path} is damaged: {error}; repair it or take it away") from None
    annotated = annotated if min(annotated) > 0 else size
    _check_upright(path, annotated, size)
    region = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        region[_span(top, bottom, annotated[1], size[1]), _span(left, right, annotated[0], size[0])] = True
    return region


def _span(first: float, last: float, annotated: int, size: int) -> slice:
    """Of `size` pixels of the photo, those that `first` to `last` of `annotated` pixels touch."""
    return slice(max(0, math.floor((first - 1) * size / annotated)), max(0, math.ceil(last * size / annotated)))


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Every pixel that is not 0, by the index of its colour in a palette, where `VOID` is none; black is 0."""
    try:
        with Image.open(path) as file:
            values = np.asarray(file)
            region = values != 0
            if file.mode == "P":
                region &= values != VOID
            elif file.mode in ("LA", "RGBA"):  # what is transparent is no object
                region = region[..., :-1] & region[..., -1:]
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        raise ValueError(f"annotations: {path} is damaged: {error}; repair it or take it away") from None
    if region.ndim == 3:
        region = region.any(2)
    _check_upright(path, region.shape[::-1], size)
    return np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))


def _check_upright(path: Path, annotated: tuple[int, int], size: tuple[int, int]) -> None:
    if annotated != size and annotated == size[::-1]:
        raise ValueError(
            f"annotations: {path} is for {annotated[0]} x {annotated[1]} pixels, the upright photo has {size[0]} x "
            f"{size[1]}; turn the annotation as the photo's EXIF says, or take it away"
        )


class _PlainTree(ElementTree.TreeBuilder):
    """Without entities, which can grow a small file to any size."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do not need")
