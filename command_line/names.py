"""Names of classes and of the folders of results, and which result a folder belongs to."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from daam_vit.fonts import drawable
from daam_vit.locks import give_back
from daam_vit.text import printable
from models.schema import parse_json

MAX_NAME_LENGTH = 80
"""Largest number of characters that the names of several classes take in the name of a folder."""
MAX_BYTES, MAX_PART = 230, 100
"""Largest number of bytes of the name of a folder, and of its two parts if it would be longer. File systems allow 255,
and the temporary name of the folder is longer than its name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Names of devices on Windows, which files cannot have."""
LOCK = ".lock"
"""File in a folder whose result is being written."""


# ----------------------------------------------------------------------------------------------------------------------
# Classes
# ----------------------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    """Return the first of several synonyms."""
    return name.split(", ")[0]


def class_labels(classes: list[dict], class_names: list[str] | None) -> list[str]:
    """Return the name up to its first comma for each class, with the index if another class has the same name."""
    alike = Counter(file_name(short(name)) for name in class_names or ())
    labels = [(short(c["name"]), c["index"]) for c in classes]
    return [f"{label} {index}" if alike[file_name(label)] > 1 else label for label, index in labels]


def drawn_name(label: str, index: int) -> str:
    """Return a label as it is drawn: its index if no font has its characters, or if it is empty."""
    return printable(label, 200) if label.strip() and drawable(label) else f"class {index}"


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    """Return a name without characters that a file system refuses; `shorten` limits its length."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._") or "_"
    return RESERVED.sub(r"\1_\2", name) if RESERVED.match(name) else name


def shorten(name: str, limit: int = MAX_BYTES) -> str:
    """Cut a name to a number of bytes; a hash distinguishes it from names with the same beginning."""
    try:
        encoded = os.fsencode(name)
        fits = len(encoded) <= limit
    except UnicodeEncodeError:  # the locale does not have these characters
        encoded, fits = name.encode("ascii", "replace").replace(b"?", b"_"), False
    if fits:
        return name
    start = os.fsdecode(encoded[: limit - 9]).encode("utf-8", "ignore").decode()  # without half a character
    return f"{start}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def result_names(files: list[Path]) -> list[str]:
    """Return a name for the results of every file: its stem, or more of its path if that is taken.

    The names are unique, also where a file system ignores case or the Unicode form.
    """
    names: dict[str, str] = {}
    for file in files:
        stem, full = file_name(file.stem), file_name(file.name)
        folder = file_name(f"{file.absolute().parent.name}_{file.name}")
        candidates = chain([stem, full, folder], (f"{folder}_{n}" for n in count(2)))
        name = next(name for name in candidates if _folded(name) not in names)
        names[_folded(name)] = name
    return list(names.values())


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def result_folder(folder: Path, labels: list[str], options: argparse.Namespace) -> Path:
    """Return the folder with the explained classes, and with the settings that make another map, in its name.

    These are --rows, --variant and --score where they are not the defaults; the score of the relevance flow is the
    log-odds by default.
    """
    classes = "-".join(map(file_name, labels))
    if len(labels) > 1 and len(classes) > MAX_NAME_LENGTH:
        classes = f"{classes[:MAX_NAME_LENGTH]}-{hashlib.sha256(classes.encode()).hexdigest()[:8]}"
    settings = "-patches" * (options.rows == "patches") + f"-{options.variant}" * (options.variant != "paper")
    settings += f"-{options.score}" * ((options.score == "log_odds") != (options.variant == "relevance"))
    name = f"{folder.name}-{classes}{settings}"
    if shorten(name) != name:
        name = f"{shorten(folder.name, MAX_PART)}-{shorten(classes, MAX_PART)}{settings}"
    return folder.with_name(name)


# ----------------------------------------------------------------------------------------------------------------------
# Which result a folder belongs to
# ----------------------------------------------------------------------------------------------------------------------

SCHEMA = {
    "model": str,
    "image": {"sha256": str},
    "checkpoint": ({"sha256": str}, None),
    "bank": {"folder": str, "features": int},
    "target": {"index": int},
    "targets": [{"index": int}],
}
"""Schema of the entries of flow.json that identify a result."""


@contextmanager
def own_folder(folder: Path, manifest: dict) -> Iterator[Path]:
    """Yield the folder for a result: `folder`, or `folder`-2, `folder`-3, ... if another result is in the way.

    A result is replaced by a later one of the same photo, classes, weights and bank, and by no other. A folder that
    another process is writing is in the way, too. A new folder is deleted if its result is not completed.

    Args:
        folder: the preferred folder.
        manifest: the manifest of the result.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    subject = _subject(manifest)
    own, new, lock = folder, False, None
    try:
        for own in chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in count(2))):
            new = not os.path.lexists(own)
            if lock := _take(own, subject):
                break
        yield own
    finally:
        if new and lock and not (own / "flow.json").exists():
            shutil.rmtree(own, ignore_errors=True)
        if lock:
            give_back(lock)
        elif new:  # a signal came before the folder was held
            with suppress(OSError):
                own.rmdir()


def _take(folder: Path, subject: str) -> BaseFileLock | None:
    """Return the lock of a folder; None if it holds another result, or another process holds it."""
    if not _is_free(folder, subject):
        return None
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (OSError, Timeout):  # an OSError: something else has this name
        return None
    if _is_free(folder, subject):  # another process may have finished its result in the meantime
        return lock
    give_back(lock)
    return None


def _is_free(folder: Path, subject: str) -> bool:
    """Return whether a folder can be written: it has no complete result, or one of the same subject."""
    file = folder / "flow.json"
    if not file.is_file():  # a pipe would be read for ever
        return not os.path.lexists(file) and (folder.is_dir() or not os.path.lexists(folder))
    try:
        return _subject(parse_json(file.read_bytes(), SCHEMA, str(file))) == subject
    except (ValueError, KeyError):  # damaged, or written by others
        return False


def _subject(manifest: dict) -> str:
    """Return the photo, classes, weights and bank of a result, as a text to compare."""
    checkpoint, bank = manifest.get("checkpoint"), manifest.get("bank")
    return json.dumps(
        {
            "image": manifest["image"]["sha256"],
            "classes": [c["index"] for c in manifest.get("targets") or [manifest["target"]]],
            "model": manifest["model"],
            "checkpoint": checkpoint and checkpoint["sha256"],
            "bank": bank and [os.path.realpath(bank["folder"]), bank["features"]],
        }
    )
