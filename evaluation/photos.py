"""Find the photos of an evaluation, in a folder or by a list, under names that do not depend on the locale."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePath

from daam_vit.text import printable
from models.images import walk_images

LONGEST = 150
"""Largest number of characters of a name in an error."""


def find_photos(folder: Path, listed: Path | None, without: Iterable[Path | None] = ()) -> list[str]:
    """Find the images in a folder and its sub-folders, or those of a list.

    Args:
        folder: folder of the photos.
        listed: file with one path in the folder per line; None: all images.
        without: folders to skip, of results and annotations. If one is the folder of the photos itself, a PNG with the
            name of another image is a mask.

    Returns:
        Names, sorted: paths in the folder, see `name_of`.

    Raises:
        ValueError: if there are none, a folder cannot be listed, or a photo of the list is missing or not in the
            folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"images: there is no folder {printable(str(folder), LONGEST)}; check the path")
    if listed is not None:
        names = _listed(folder, listed)
    else:
        others = {path.resolve() for path in without if path is not None}
        photos = walk_images(folder, "images", others)
        if folder.resolve() in others:
            named = {photo.with_suffix("") for photo in photos if photo.suffix.lower() != ".png"}
            photos = [p for p in photos if p.suffix.lower() != ".png" or p.with_suffix("") not in named]
        names = [name_of(photo.relative_to(folder)) for photo in photos]
    if not names:
        where = f"the folder {printable(str(folder), LONGEST)}" if listed is None else printable(str(listed), LONGEST)
        raise ValueError(f"images: {where} has no images")
    return sorted(names)


def _listed(folder: Path, listed: Path) -> list[str]:
    """Return the names of the photos that a file lists; of several paths to one photo, the alphabetically first."""
    place = printable(str(listed), LONGEST)
    if not os.path.isfile(listed):
        raise ValueError(f"list: there is no file {place}; check the path")
    text = listed.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if b"\0" in text:
        raise ValueError(f"list: {place} is not a text in UTF-8; save it as UTF-8, one path per line")
    lines = [os.fsdecode(line.strip()) for line in text.splitlines() if line.strip()]
    paths = {os.path.relpath(Path(folder, line), folder) for line in lines}
    outside = sorted(path for path in paths if Path(path).parts[:1] == ("..",) or os.path.isabs(path))
    missing = sorted(path for path in paths if not os.path.isfile(folder / path))
    for wrong, what in ((outside, "outside"), (missing, "not in")):
        if wrong:
            raise ValueError(
                f"list: {len(wrong)} of its photos are {what} {printable(str(folder), LONGEST)}, for example "
                f"{printable(wrong[0], LONGEST)}"
            )
    names = {os.path.realpath(folder / path): name_of(PurePath(path)) for path in sorted(paths, reverse=True)}
    return list(names.values())


def name_of(path: PurePath) -> str:
    """Return a path as text that is the same in every locale; bytes that are not UTF-8 become lone surrogates."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def path_of(folder: Path, name: str) -> Path:
    """Return the path of a photo by its name, see `name_of`."""
    return folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
