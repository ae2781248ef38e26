"""Parts of a build: the features of every batch, stored until the bank is complete.

They lie in a folder that one build holds. `plan.json` describes the build, so that a killed build only continues with
the same images and settings.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from daam_vit.files import atomic_write
from daam_vit.locks import hold
from daam_vit.ranks import current_rank, on_first
from daam_vit.text import printable
from memorybank.files import shown
from models.schema import parse_json
from models.weights import first_line

PLAN = dict.fromkeys(("model", "weights_sha256", "transform", "dtype", "train", "test"), str) | {"batch_size": int}
"""Schema of `plan.json`, which describes the build of the parts."""
BANK_FILES = ("bank.json", "testfeat.pth", "testlabels.pth", "trainlabels.pth", "trainfeat.pth")
"""Files of a bank, in the order in which they are renamed."""


def begin(parts: Path, plan: dict, stack: ExitStack) -> None:
    """Lock the folder of the parts, delete unfinished files of a killed build, and write the plan of a new build."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
        stack.enter_context(hold(parts, "out", "another build"))
    except OSError as error:
        raise ValueError(
            f"out: {shown(parts)} cannot be written: {_reason(error)}; make room, or pass another folder"
        ) from error
    _discard(parts, ".*.part")
    _undo_exchange(parts.parent, parts)
    if not (parts / "plan.json").is_file():  # a build was killed during its clean-up, or this one is new
        clear(parts)
        with writing(parts / "plan.json") as part:
            part.write_text(json.dumps(plan), encoding="utf-8")


def _discard(folder: Path, *patterns: str) -> None:
    """Delete the files of a folder that match one of the patterns."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def clear(parts: Path) -> None:
    """Delete the files of a build except its lock; the plan goes first, because parts without a plan are deleted."""
    (parts / "plan.json").unlink(missing_ok=True)
    _discard(parts, "train-*.pt", "test-*.pt", *BANK_FILES, *(f"old/{name}" for name in BANK_FILES))
    with suppress(OSError):
        (parts / "old").rmdir()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, as `atomic_write` does; if that fails, raise a one-line ValueError."""
    try:
        with atomic_write(path) as part:
            yield part
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"out: {shown(path)} cannot be written: {_reason(error)}; make room and repeat the command, which continues"
        ) from error


def _reason(error: OSError | RuntimeError) -> str:
    """Return in a few words why a file cannot be written."""
    if isinstance(error, RuntimeError):  # torch does not say why
        return "the disk may be full"
    return error.strerror or first_line(error)


def check_plan(parts: Path, plan: dict) -> None:
    """Raise a ValueError unless this rank has the images and settings of the build that the parts belong to."""
    file = parts / "plan.json"
    try:
        theirs = parse_json(file.read_bytes(), PLAN, f"out: {shown(file)}")
    except FileNotFoundError:
        raise ValueError(
            f"out: there is no folder {shown(parts)}; all machines must share the folder of the bank"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; delete the folder {parts.name}") from None
    different = [printable(key, 40) for key in plan | theirs if plan.get(key) != theirs.get(key)]
    if different:
        raise ValueError(
            f"out: {shown(parts)} holds an unfinished build with another {', '.join(different)}; "
            f"delete that folder, or pass another one"
        )


def _part(parts: Path, split: str, batch: int) -> Path:
    return parts / f"{split}-{batch:06d}.pt"


def share_missing(parts: Path, split: str, batches: list[range]) -> dict[Path, range]:
    """Return the missing parts of a split that this rank has to write, and the images of each."""
    missing = on_first(lambda: [n for n in range(len(batches)) if not _part(parts, split, n).is_file()])
    rank, ranks = current_rank()
    if rank == 0 and 0 < len(missing) < len(batches):
        total = sum(map(len, batches))
        done = total - sum(len(batches[n]) for n in missing)
        tqdm.write(f"{split}: resuming after {done} of {total} images", file=sys.stderr)
    return {_part(parts, split, n): batches[n] for n in missing[rank::ranks]}


def join(parts: Path, split: str, files: list[tuple[Path, int]], batches: list[range], strict: bool) -> dict[int, str]:
    """Join the parts of a split into two files in the same folder; return the images that cannot be read."""
    unreadable: dict[int, str] = {}
    features, kept, with_gaps = torch.empty(0), 0, []
    for n, batch in enumerate(batches):
        path = _part(parts, split, n)
        rows, missing = _read_part(path, len(batch))
        if missing:
            unreadable |= missing
            with_gaps.append(path)
            rows = rows[[i not in missing for i in batch]]
        if n == 0:
            features = rows.new_empty(len(files), rows.shape[1])
        features[kept : kept + len(rows)] = rows
        kept += len(rows)
    if unreadable and (strict or not kept):
        for path in with_gaps:  # so that the next build reads these images again
            path.unlink()
        reason = next(iter(unreadable.values()))
        raise ValueError(
            f"{split}: {reason}" if kept else f"{split}: none of the {len(files)} images can be read: {reason}"
        )
    labels = torch.tensor([label for i, (_, label) in enumerate(files) if i not in unreadable])
    for name, tensor in (("feat", features[:kept].clone() if unreadable else features), ("labels", labels)):
        with writing(parts / f"{split}{name}.pth") as part, open(part, "wb") as file:
            torch.save(tensor, file)
    return unreadable


def _read_part(path: Path, count: int) -> tuple[Tensor, dict[int, str]]:
    """Return the features of a part, one row for each of its images, and the images that cannot be read."""
    try:
        part = torch.load(path, weights_only=True)
        features, unreadable = part["features"], dict(part["unreadable"])
        if features.ndim != 2 or len(features) != count:
            raise ValueError(f"expected {count} rows, got a shape of {tuple(features.shape)}")
    except Exception as error:  # after a power cut a file may be renamed, but empty
        path.unlink(missing_ok=True)
        raise ValueError(f"out: {shown(path)} was damaged and has been deleted; run the same command again") from error
    return features, unreadable


def exchange(out: Path, parts: Path) -> None:
    """Move the older bank away and the new one in; undo both after an error. Files of two banks never mix in `out`."""
    old = parts / "old"
    moved = []
    try:
        old.mkdir(exist_ok=True)
        for source, target in (
            *((out / name, old / name) for name in reversed(BANK_FILES)),
            *((parts / name, out / name) for name in BANK_FILES),
        ):
            if source.is_file():
                os.replace(source, target)
                moved.append((source, target))
    except BaseException as error:
        for source, target in reversed(moved):
            target.rename(source)
        if isinstance(error, OSError):
            raise ValueError(
                f"out: {shown(out)} cannot be written: {_reason(error)}; repeat the command, which continues"
            ) from error
        raise


def _undo_exchange(out: Path, parts: Path) -> None:
    """Put the older bank back if a kill interrupted `exchange`, so that no other build can delete it."""
    old = parts / "old"
    if (out / "trainfeat.pth").is_file() or not (old / "trainfeat.pth").is_file():
        return
    new_files_moved = not (parts / "bank.json").is_file()
    for source, target in (
        *(((out / name, parts / name) for name in reversed(BANK_FILES)) if new_files_moved else ()),
        *((old / name, out / name) for name in BANK_FILES),
    ):
        if source.is_file():
            os.replace(source, target)
