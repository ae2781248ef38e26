"""Write files atomically, and a flow as a folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from daam_vit.arguments import (
    check_frames,
    check_image,
    check_integer,
    check_maps,
    check_number,
    check_path,
    check_sequence,
    check_texts,
    check_type,
)
from daam_vit.drawing import block_labels, contact_sheet, map_in_threads, overlay, quantize, render, side_by_side
from daam_vit.inputs import check_tensor
from daam_vit.locks import give_back
from daam_vit.text import printable

MAX_DURATION = 655_350
"""Longest time in milliseconds that a frame of a GIF can stay."""
OWN_NAMES = ("flow.gif", "flow.json", "frames", "maps.npz", "sheet.png")
"""Names that `save_flow` writes itself; further pictures must have other names."""
PATIENCE = 60
"""Seconds to wait for another process that moves its files to the same folder."""
_YOUNG, _YOUNG_WITHOUT_LOCK = 5, 60
"""Seconds after which a temporary folder, with and without a lock file, counts as abandoned if nobody holds it.

A younger one may belong to a process that is about to take the lock. Folders of older versions have no lock file."""
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
        frames: images of one size. Pillow merges equal neighbours into one longer frame; labels prevent that.
        path: the file; an older one is replaced.
        duration: milliseconds per frame, one number for all or one for each (GIF rounds to hundredths of a second).

    Raises:
        ValueError: if there are no frames, their sizes differ, a side is longer than 65,535 pixels, the limit of GIF,
            or durations are negative, too long or not as many as frames.
        TypeError: if an argument has the wrong type.
    """
    path, frames = check_path("path", path), check_frames("frames", frames)
    if isinstance(duration, Sequence | np.ndarray):
        check_sequence("duration", duration, f"a number, or one for each of {len(frames)} frames", len(frames))
        duration = list(duration)
    for milliseconds in duration if isinstance(duration, list) else [duration]:
        check_number("duration", milliseconds, 0, MAX_DURATION)
    if path.is_dir() or not path.parent.is_dir():
        reason = f"is a folder: {path}" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"path: {printable(reason, 300)}; pass another path")
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
        image: the picture, in any mode; the frames, or the panels of a frame, have its size.
        flow: from `attention_flow`.
        index: which image of the batch.
        caption: a few lines for the sheet.
        manifest: further entries of flow.json, ready for `json.dump`, without NaN or infinity.
        duration: milliseconds per frame.
        pictures: further pictures for the folder, by file name, or functions that draw them while others are written.
            The suffix is of a format that Pillow writes, and the name is none of `OWN_NAMES`.
        titles: the names of K classes, written above the panels.

    Returns:
        The folder.

    Raises:
        ValueError: if the image is not in the batch, the maps are not finite, a number, file name or manifest entry is
            invalid, or another process writes into the folder for longer than `PATIENCE`.
        TypeError: if an argument has the wrong type.
        OSError: if files cannot be written. After any error the folder is as it was, unless a finished file could not
            be moved into it.
    """
    directory = check_path("directory", directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {printable(str(directory), 300)} is not a folder; pass another path")
    image, pictures = check_image("image", image), _check_pictures({} if pictures is None else pictures)
    maps = _check_flow(flow, index)
    check_type("caption", caption, str, "a text")
    check_number("duration", duration, 0, MAX_DURATION // 3)
    accumulated = maps["accumulated"]
    *classes, blocks, h, w = accumulated.shape
    text = _to_json({} if manifest is None else manifest, {"blocks": blocks, "grid": [h, w]})
    if titles is not None:
        check_texts("titles", titles, classes[0] if classes else 1, "classes")

    panels = [overlay(image, render(a), block_labels(blocks)) for a in accumulated.reshape(-1, blocks, h, w)]
    frames = side_by_side(panels, titles) if classes else panels[0]
    columns = max(1, min(4, 6 // len(panels)))
    drawn: dict[str, Picture] = {"sheet.png": partial(contact_sheet, image, frames, caption, columns)}
    drawn |= pictures
    drawn |= {f"frames/block_{b:02d}.png": frame for b, frame in enumerate(frames, 1)}

    with _atomic_folder(directory, "frames/block_*.png") as part:
        (part / "frames").mkdir()
        gif = partial(save_gif, frames, part / "flow.gif", [duration] * (blocks - 1) + [3 * duration])
        pngs = [partial(_save_picture, part / name, picture) for name, picture in drawn.items()]
        map_in_threads(lambda write: write(), [gif, *pngs])
        np.savez(part / "maps.npz", **maps)  # type: ignore[arg-type]
        (part / "flow.json").write_text(text, encoding="utf-8")
    return directory


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def _check_flow(flow: Flow, index: int) -> dict[str, np.ndarray]:
    """Return the arrays of one image: `block_maps` and `accumulated` `(L, h, w)` or `(K, L, h, w)`, and `output`."""
    shapes = {"block_maps": "(B, L, h, w) or (B, K, L, h, w)", "accumulated": "of the same shape", "output": "(B, D)"}
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        tensors[name] = getattr(flow, name, None)
        check_tensor("flow", tensors[name], f"an AttentionFlow, whose {name} is a tensor {shape}")
    maps, output = tensors["accumulated"], tensors["output"]
    if maps.ndim not in (4, 5) or maps.shape != tensors["block_maps"].shape or len(maps) != len(output):
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"flow: expected an AttentionFlow, got {got}")
    index = check_integer("index", index, -len(maps), len(maps) - 1)
    ndim = {"output": (1,)}
    return {k: check_maps("flow", t[index], ndim.get(k, (3, 4)), f"{k} {shapes[k]}") for k, t in tensors.items()}


def _check_pictures(pictures: Mapping[str, Picture]) -> dict[str, Picture]:
    """Check the names and the types of further pictures."""
    check_type("pictures", pictures, Mapping, "pictures by file name")
    for name, picture in pictures.items():
        check_type("pictures", name, str, "a file name")
        shown, kind = printable(name, 80), Image.registered_extensions().get(Path(name).suffix.lower())
        reason = (
            "is not a plain file name" if re.search(r'[\\/:*?"<>|]', name) or printable(name) != name
            else "is longer than 255 bytes" if len(name.encode()) > 255
            else "is a name of the flow's own files" if name.casefold() in OWN_NAMES
            else "has no suffix of a picture, such as .png" if kind not in Image.SAVE
            else ""
        )  # fmt: skip
        if reason:
            raise ValueError(f"pictures: {shown!r} {reason}; pass another name")
        if not callable(picture):
            _check_picture(name, picture)
    return dict(pictures)


def _check_picture(name: str, picture: Any) -> None:
    check_type(
        "pictures", picture, Image.Image, f"a PIL image, or a function that returns one, as {printable(name, 80)}"
    )
    if not all(picture.size):
        raise ValueError(f"pictures: {printable(name, 80)} has no pixels; leave it out")


def _to_json(manifest: dict, more: dict) -> str:
    """Return the text of flow.json."""
    check_type("manifest", manifest, dict, "a dict")
    for key, value in manifest.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            kind, reason = TypeError if isinstance(error, TypeError) else ValueError, printable(str(error), 200)
            raise kind(f"manifest: {printable(repr(key), 80)} cannot be written as JSON: {reason}") from error
    return json.dumps(manifest | more, indent=2) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Atomic files and folders
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, or delete it after an exception."""
    path = Path(path)
    part = _temporary_path(path)
    with _naming_in_errors(path, part):
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _atomic_folder(directory: Path, replaced: str) -> Iterator[Path]:
    """Yield a new temporary folder, whose files move to `directory` at the end, flow.json last; then delete it.

    Args:
        directory: the folder; made, with its parents, if it is missing.
        replaced: pattern of files that are deleted if there is no new one: an older flow may have more blocks.
    """
    place = directory.resolve()  # the temporary folder lies beside it, since only there a rename is atomic
    missing = [parent for parent in place.parents if not parent.exists()]
    part = _temporary_path(place)
    with _naming_in_errors(directory, part):
        _delete_abandoned(part.parent)
        try:
            part.mkdir(parents=True)
            with FileLock(part / ".lock"):
                yield part
                with _hold_while_moving(place):
                    _move_files(part, place, replaced)
        except BaseException:
            _delete(part)
            for parent in missing:
                with suppress(OSError):  # others may use it by now
                    parent.rmdir()
            raise
        _delete(part)


def _delete(part: Path) -> None:
    try:
        shutil.rmtree(part, ignore_errors=True)
    except BaseException:  # a signal came in the middle
        shutil.rmtree(part, ignore_errors=True)
        raise


def _move_files(part: Path, place: Path, replaced: str) -> None:
    names = [p.relative_to(part) for p in part.rglob("*") if p.is_file() and p.name != ".lock"]
    folders = {place / name.parent for name in names}
    for target in (*folders, *(place / name for name in names)):
        if target.exists() and target.is_dir() != (target in folders):
            shown = printable(str(target), 300)
            raise ValueError(f"directory: {shown} is in the way of a file or folder of this name; move it away")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(names, key=lambda name: name.name == "flow.json"):
        os.replace(part / name, place / name)
    for old in place.glob(replaced):
        if old.relative_to(place) not in names:
            old.unlink()


@contextmanager
def _hold_while_moving(place: Path) -> Iterator[None]:
    """Hold a lock beside a folder, so that two processes do not mix their files in it."""
    lock = FileLock(_hidden(place, "lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(
            f"directory: another process has been writing into {printable(str(place), 300)} for {PATIENCE} s; "
            f"pass another folder"
        ) from None
    try:
        yield
    finally:
        give_back(lock)


def _delete_abandoned(folder: Path) -> None:
    """Delete the temporary folders of killed processes, whose locks nobody holds."""
    for part in folder.glob(".*.part"):
        lock = part / ".lock"
        with suppress(OSError, Timeout):
            age = time.time() - part.stat().st_mtime
            if _is_temporary(part) and part.is_dir() and age > (_YOUNG if lock.exists() else _YOUNG_WITHOUT_LOCK):
                FileLock(lock).acquire(timeout=0).lock.release()
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _naming_in_errors(path: Path, part: Path) -> Iterator[None]:
    """Name the file in errors of the system, which name its temporary path or, on a full disk, no path."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and not str(error.filename).startswith(str(part))
        if known or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _temporary_path(path: Path) -> Path:
    """Return a hidden path beside `path` that no other process uses."""
    return _hidden(path, f"{secrets.token_hex(4)}.part")


def _is_temporary(path: Path) -> bool:
    return re.fullmatch(r"\..*\.[0-9a-f]{8}\.part", path.name, re.DOTALL) is not None


def _hidden(path: Path, ending: str) -> Path:
    """Return a hidden path beside `path`, whose name is short enough for every file system."""
    beginning = path.name.encode(errors="ignore")[:100].decode(errors="ignore")
    return path.with_name(f".{beginning}.{ending}")


def _save_picture(path: Path, picture: Picture) -> None:
    image = picture() if callable(picture) else picture
    _check_picture(path.name, image)
    try:
        image.save(path, compress_level=1)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"pictures: {path.name}: {printable(str(error), 200)}; convert it to RGB") from error
