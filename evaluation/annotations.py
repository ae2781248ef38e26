"""Read where the object is: boxes of VOC and ImageNet (XML) or masks (PNG) become a region, one boolean per pixel."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

VOID = 255
"""Index of the border between objects in the palette masks of VOC; it belongs to no object."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


def region_of(folder: str | Path, images: str | Path, photo: str, size: tuple[int, int]) -> np.ndarray | None:
    """Return the region of the objects in a photo.

    Args:
        folder: folder of the annotations; may be that of the photos.
        images: folder of the photos.
        photo: path in `images`, such as "cup/image_0001.jpg".
        size: width and height of the photo as `models.images.read_image` returns it, upright.

    Returns:
        `(H, W)` bool; None if the photo has no annotation, or one without an object.

    Raises:
        ValueError: if the annotation is damaged, or was made before the photo was turned upright.
    """
    path = find_annotation(folder, images, photo)
    if path is None:
        return None
    region = _boxes(path, size) if path.suffix == ".xml" else _mask(path, size)
    return region if region.any() else None


def find_annotation(folder: str | Path, images: str | Path, photo: str) -> Path | None:
    """Return the annotation of a photo, never the photo itself; None if there is none.

    It is `<folder>/<path of the photo>` with the suffix `.xml` or `.png`, or the same directly in the folder, as in VOC
    and the validation set of ImageNet: `<folder>/<stem>.xml` or `.png`.
    """
    itself = Path(images, photo)
    for name in dict.fromkeys([photo, itself.name]):
        for suffix in (".xml", ".png"):
            path = Path(folder, name).with_suffix(suffix)
            if path.is_file() and not (itself.exists() and path.samefile(itself)):
                return path
    return None


def _boxes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return every pixel that a box touches. VOC counts pixels from 1, and the last one is inside."""
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_PlainTree())).getroot()
        annotated = tuple(int(root.findtext(f"size/{key}", "0")) for key in ("width", "height"))
        boxes = [[float(box.findtext(key, "nan")) for key in SIDES] for box in root.iterfind("object/bndbox")]
        if not all(math.isfinite(sum(box)) and box[0] <= box[2] and box[1] <= box[3] for box in boxes):
            raise ValueError("a side of a box is missing, or its sides are swapped")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"annotations: {path} is damaged: {error}; repair or remove it") from None
    annotated = annotated if min(annotated) > 0 else size
    _check_upright(path, annotated, size)
    region = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        region[_span(top, bottom, annotated[1], size[1]), _span(left, right, annotated[0], size[0])] = True
    return region


def _span(first: float, last: float, annotated: int, size: int) -> slice:
    """Return the pixels of a photo, of `size`, that the pixels `first` to `last` of `annotated` touch."""
    return slice(max(0, math.floor((first - 1) * size / annotated)), max(0, math.ceil(last * size / annotated)))


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return every pixel that is not black, or whose index in a palette is neither 0 nor `VOID`."""
    try:
        with Image.open(path) as file:
            values = np.asarray(file)
            region = values != 0
            if file.mode == "P":
                region &= values != VOID
            elif file.mode in ("LA", "RGBA"):  # transparent pixels are no object
                region = region[..., :-1] & region[..., -1:]
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise ValueError(f"annotations: {path} is damaged: {error}; repair or remove it") from None
    if region.ndim == 3:
        region = region.any(2)
    _check_upright(path, region.shape[::-1], size)
    return np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))


def _check_upright(path: Path, annotated: tuple[int, int], size: tuple[int, int]) -> None:
    if annotated != size and annotated == size[::-1]:
        raise ValueError(
            f"annotations: {path} is for {annotated[0]} x {annotated[1]} pixels, the upright photo has {size[0]} x "
            f"{size[1]}; rotate the annotation as the photo's EXIF says, or remove it"
        )


class _PlainTree(ElementTree.TreeBuilder):
    """Tree without entities, which can expand a small file to any size."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do not need")
