"""Build a memory bank from an image folder, in one process or under `torchrun`, and resume a build that was killed.

The batches depend on the list of images only. The features of every batch are written atomically to a part, a file in
the folder `.building` of the bank. The ranks share the missing batches, so the result does not depend on the number of
ranks or interruptions. At the end the first rank joins the parts and renames the files, `trainfeat.pth` last: a folder
without it is no bank. The older bank stays until then, and comes back if a file cannot be renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from daam_vit.files import atomic_write
from daam_vit.locks import hold
from daam_vit.text import printable
from memorybank.files import shown
from models import LoadedModel, weights_sha256
from models.images import list_folder, read_image, walk_images
from models.schema import parse_json
from models.versions import versions
from models.weights import first_line

DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""Data types of the stored features."""
WORKERS = min(4, os.cpu_count() or 1)
"""Default number of processes that decode images."""
MAX_BATCH_SIZE, MAX_WORKERS = 65_536, 1024
"""Largest number of images in a batch, and of processes that decode them."""
PLAN = dict.fromkeys(("model", "weights_sha256", "transform", "dtype", "train", "test"), str) | {"batch_size": int}
"""Schema of `plan.json`, which says what the parts belong to."""
BANK_FILES = ("bank.json", "testfeat.pth", "testlabels.pth", "trainlabels.pth", "trainfeat.pth")
"""Files of a bank, in the order in which they are renamed."""


def build(
    loaded: LoadedModel,
    train: str | Path,
    out: str | Path,
    test: str | Path | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int = WORKERS,
    strict: bool = False,
) -> dict:
    """Store the L2-normalised feature of every image (Wu et al. 2018, https://arxiv.org/abs/1805.01978).

    Args:
        loaded: the model, from `models.load`; the feature is timm's `pre_logits`.
        train: an image folder with one sub-folder per class, named as the class.
        out: the folder of the bank; an older bank is replaced at the end. Under `torchrun` all machines must share it.
        test: another image folder, for the evaluation; its classes must be among those of `train`.
        dtype: data type of the stored features, "float16" or "float32".
        batch_size: images per batch; a killed build loses only the batches in progress.
        workers: number of processes that decode images, per rank.
        strict: raise an error for the first image that cannot be read, instead of skipping it.

    Returns:
        The content of bank.json on the first rank, `{}` on the others.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if a number or `dtype` is out of range, a folder has no images, an image cannot be read and `strict`
            is set, a feature is zero or not finite, a class of `test` is unknown, or `out` is in use, holds the parts
            of another build or cannot be written, as on a full disk.
    """
    _check_arguments(loaded, train, out, test, dtype, batch_size, workers, strict)
    out = Path(out)
    folders = {"train": Path(train)} | ({"test": Path(test)} if test is not None else {})
    found = {split: find_classes(folder, split) for split, folder in folders.items()}
    classes = {name: index for index, name in enumerate(found["train"])}
    unknown = [name for name in found.get("test", {}) if name not in classes]
    if unknown:
        name, folder = printable(unknown[0], 80), shown(folders["train"])
        raise ValueError(f"test: the class '{name}' is not among the sub-folders of {folder}")
    items = {
        split: [(file, classes[name]) for name, files in of_class.items() for file in files]
        for split, of_class in found.items()
    }
    plan = {
        "model": loaded.name,
        "weights_sha256": weights_sha256(loaded.model),
        "transform": " ".join(str(loaded.transform).split()),
        "dtype": dtype,
        "batch_size": batch_size,
    } | {split: _digest(folders[split], files) for split, files in items.items()}
    parts = out / ".building"
    with _process_group() as rank, ExitStack() as stack:
        if rank == 0:
            _begin(parts, plan, stack)
        _barrier()
        _check_plan(parts, plan)
        unreadable, bank = {}, {}
        for split, files in items.items():
            images = [file for file, _ in files]
            batches = [range(i, min(i + batch_size, len(files))) for i in range(0, len(files), batch_size)]
            work = _share_missing(parts, split, batches)
            _extract(loaded, images, work, split, dtype, workers, strict)
            _barrier()
            if rank == 0:
                unreadable[split] = _join(parts, split, files, batches, strict)
        if rank == 0:
            bank = _finish(out, parts, plan, loaded, folders, items, unreadable, list(classes))
        _barrier()
    if bank:
        with suppress(OSError):  # another build may have begun
            (parts / ".lock").unlink(missing_ok=True)
            parts.rmdir()
    return bank


def _check_arguments(
    loaded: Any, train: Any, out: Any, test: Any, dtype: Any, batch_size: Any, workers: Any, strict: Any
) -> None:
    """Raise a TypeError or ValueError for an argument of `build` that cannot be used, before anything is touched."""
    types = {
        "loaded": (loaded, LoadedModel), "train": (train, str, os.PathLike), "out": (out, str, os.PathLike),
        "test": (test, str, os.PathLike, type(None)), "dtype": (dtype, str), "batch_size": (batch_size, int),
        "workers": (workers, int), "strict": (strict, bool),
    }  # fmt: skip
    for name, (value, *wanted) in types.items():
        if not isinstance(value, tuple(wanted)) or (isinstance(value, bool) and bool not in wanted):
            expected = " or ".join(t.__name__ for t in wanted)
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    for name, path in (("train", train), ("out", out), ("test", test)):
        if path is not None and not os.fspath(path):  # of an unset variable of the shell; it would mean "."
            raise ValueError(f"{name}: is empty; pass a folder, '.' for the current one")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {printable(dtype, 80)}")
    for name, number, low, high in (
        ("batch_size", batch_size, 1, MAX_BATCH_SIZE),
        ("workers", workers, 0, MAX_WORKERS),
    ):
        if not low <= number <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {number}")
    if "\0" in str(out) or (os.path.exists(out) and not os.path.isdir(out)):
        raise ValueError(f"out: {shown(Path(out))} is not a folder; pass another one")


def find_classes(folder: str | Path, split: str) -> dict[str, list[Path]]:
    """Return the sorted images of every class, recursively; classes without images and hidden folders are skipped.

    Links are followed as in `models.images.walk_images`, but none from a class into another one. A class that is itself
    a link to another one has the same photos.

    Raises:
        ValueError: if the folder does not exist or cannot be listed, or no sub-folder has an image.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{split}: there is no folder {shown(folder)}")
    real = {sub: sub.resolve() for sub in list_folder(folder, split)[1]}
    found = {sub.name: walk_images(sub, split, {*real.values()} - {real[sub]}) for sub in real}
    classes = {name: files for name, files in found.items() if files}
    if not classes:
        raise ValueError(
            f"{split}: {shown(folder)} has no images; it should have one sub-folder per class, with its images"
        )
    return classes


# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------


class _Images(Dataset):
    """Dataset of (index, image `(3, H, W)`, error); an image that cannot be read is black, and its error is set."""

    def __init__(self, files: list[Path], transform):
        self.files, self.transform = files, transform
        self.black = torch.zeros_like(transform(Image.new("RGB", (32, 32))))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[int, Tensor, str]:
        try:
            return i, self.transform(read_image(self.files[i])), ""
        except ValueError as error:
            return i, self.black, str(error).removeprefix("image: ")


def _follow(_: int) -> None:
    """Leave a kill to the first process, which ends its workers; each would print a traceback about the other."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # of the thread that hands tensors over; errors of images take another way


@torch.inference_mode()
def _extract(
    loaded: LoadedModel,
    files: list[Path],
    work: dict[Path, range],
    split: str,
    dtype: str,
    workers: int,
    strict: bool,
) -> None:
    """Write the parts of these batches: features, and the images that cannot be read with their errors."""
    device = next(loaded.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise the thread that pins memory also opens the first GPU
    images, total = _Images(files, loaded.transform), sum(map(len, work.values()))
    loader = DataLoader(
        images,
        batch_sampler=list(work.values()),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_follow,
    )
    rank, ranks = _rank()
    label = split if ranks == 1 else f"{split}, rank {rank} of {ranks}"
    with tqdm(total=total, desc=label, unit="img", disable=rank > 0 or not total) as bar:
        for part, (index, batch, reasons) in zip(work, loader):
            unreadable = {i: reason for i, reason in zip(index.tolist(), reasons) if reason}
            if unreadable and strict:
                raise ValueError(f"{split}: {next(iter(unreadable.values()))}")
            try:
                features = loaded.features(batch.to(device, non_blocking=True)).float()
            except ValueError as error:  # the feature is not finite
                raise ValueError(
                    f"{error} ({shown(files[index[0]])} and the {len(index) - 1} images after it)"
                ) from error
            for i, norm in zip(index.tolist(), features.norm(dim=1).tolist()):
                if not 0 < norm < math.inf and i not in unreadable:
                    what = "not finite; check the weights for NaN" if norm else "zero; check the weights"
                    raise ValueError(f"model: the feature of {shown(files[i])} is {what}")
            features = F.normalize(features, dim=1).to(DTYPES[dtype]).cpu()
            with _writing(part) as temporary:
                torch.save({"features": features, "unreadable": unreadable}, temporary)
            bar.update(len(index))


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def _begin(parts: Path, plan: dict, stack: ExitStack) -> None:
    """Lock the folder of the parts, delete what a killed build has left, and write the plan if the build is new."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
        stack.enter_context(hold(parts, "out", "another build"))
    except OSError as error:
        raise ValueError(
            f"out: {shown(parts)} cannot be written: {_reason(error)}; make room, or pass another folder"
        ) from error
    _discard(parts, ".*.part")
    if not (parts / "plan.json").is_file():  # a build was killed during its clean-up, or this one is new
        _clear(parts)
        with _writing(parts / "plan.json") as part:
            part.write_text(json.dumps(plan), encoding="utf-8")


def _discard(folder: Path, *patterns: str) -> None:
    """Delete the files of a folder that fit one of the patterns; files of others stay."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def _clear(parts: Path) -> None:
    """Delete all that a build stores beside its lock, the plan first, because parts without a plan are discarded."""
    (parts / "plan.json").unlink(missing_ok=True)
    _discard(parts, "train-*.pt", "test-*.pt", *BANK_FILES, *(f"old/{name}" for name in BANK_FILES))
    with suppress(OSError):
        (parts / "old").rmdir()


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, as `atomic_write`; a disk that is full or broken is one line."""
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


def _check_plan(parts: Path, plan: dict) -> None:
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


def _share_missing(parts: Path, split: str, batches: list[range]) -> dict[Path, range]:
    """Return the missing parts of a split that this rank has to write, and the images of each."""
    missing = _broadcast([n for n in range(len(batches)) if not _part(parts, split, n).is_file()])
    rank, ranks = _rank()
    if rank == 0 and 0 < len(missing) < len(batches):
        total = sum(map(len, batches))
        done = total - sum(len(batches[n]) for n in missing)
        tqdm.write(f"{split}: resuming after {done} of {total} images", file=sys.stderr)
    return {_part(parts, split, n): batches[n] for n in missing[rank::ranks]}


def _join(parts: Path, split: str, files: list[tuple[Path, int]], batches: list[range], strict: bool) -> dict[int, str]:
    """Join the parts of a split to two files in the same folder; return the images that cannot be read."""
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
        with _writing(parts / f"{split}{name}.pth") as part, open(part, "wb") as file:
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


def _finish(
    out: Path,
    parts: Path,
    plan: dict,
    loaded: LoadedModel,
    folders: dict[str, Path],
    items: dict[str, list[tuple[Path, int]]],
    unreadable: dict[str, dict[int, str]],
    classes: list[str],
) -> dict:
    """Write bank.json, and put the joined files in the place of an older bank."""
    names = dict(zip(ImageNetInfo().label_names(), ImageNetInfo().label_descriptions()))
    bank = {
        "model": loaded.name,
        "checkpoint": loaded.provenance,
        "weights_sha256": plan["weights_sha256"],
        "transform": plan["transform"],
        "input_size": [3, *loaded.size],
        "dtype": plan["dtype"],
        "class_names": [names[c] for c in classes] if all(c in names for c in classes) else classes,
        "versions": versions("torch", "torchvision", "timm", "numpy", "PIL"),
    }
    for split, files in items.items():
        folder = folders[split]
        bank[split] = {
            "count": len(files) - len(unreadable[split]),
            "folder": str(folder) if folder.is_absolute() else Path(os.path.relpath(folder, out)).as_posix(),
            "files": [_relative(f, folder) for i, (f, _) in enumerate(files) if i not in unreadable[split]],
            "unreadable": {_relative(files[i][0], folder): reason for i, reason in unreadable[split].items()},
        }
    with _writing(parts / "bank.json") as part:
        part.write_text(json.dumps(bank, indent=1) + "\n", encoding="utf-8")  # ASCII, for file names in any encoding
    _exchange(out, parts)
    _clear(parts)
    return bank


def _exchange(out: Path, parts: Path) -> None:
    """Move the older bank away and the new one in; undo it if that fails. No two banks are ever side by side."""
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


def _digest(folder: Path, files: list[tuple[Path, int]]) -> str:
    """Return a hash of the names and sizes of the images."""

    def size(file: Path) -> int:
        try:
            return file.stat().st_size
        except OSError:  # a broken link
            return -1

    lines = (f"{_relative(file, folder)} {size(file)}" for file, _ in files)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


# ----------------------------------------------------------------------------------------------------------------------
# Ranks
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _process_group() -> Iterator[int]:
    """Yield the rank, within the process group that `torchrun` describes in the environment."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # only lists are sent; a rank may wait for hours
    try:
        yield _rank()[0]
    finally:
        if several:
            dist.destroy_process_group()


def _rank() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _broadcast(value: list) -> list:
    """Return the value of the first rank."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value
