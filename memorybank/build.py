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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from daam_vit.ranks import barrier, current_rank, process_group
from daam_vit.text import printable
from memorybank.files import shown
from memorybank.parts import begin, check_plan, clear, exchange, join, share_missing, writing
from models import LoadedModel, weights_sha256
from models.images import list_folder, read_image, walk_images
from models.versions import versions

DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""Data types of the stored features."""
WORKERS = min(4, os.cpu_count() or 1)
"""Default number of processes that decode images."""
MAX_BATCH_SIZE, MAX_WORKERS = 65_536, 1024
"""Largest number of images in a batch, and of processes that decode them."""


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
    with process_group() as rank, ExitStack() as stack:
        if rank == 0:
            begin(parts, plan, stack)
        barrier()
        check_plan(parts, plan)
        unreadable, bank = {}, {}
        for split, files in items.items():
            images = [file for file, _ in files]
            batches = [range(i, min(i + batch_size, len(files))) for i in range(0, len(files), batch_size)]
            work = share_missing(parts, split, batches)
            _extract(loaded, images, work, split, dtype, workers, strict)
            barrier()
            if rank == 0:
                unreadable[split] = join(parts, split, files, batches, strict)
        if rank == 0:
            bank = _finish(out, parts, plan, loaded, folders, items, unreadable, list(classes))
            with suppress(OSError):  # Windows deletes no open file
                (parts / ".lock").unlink()  # before the release, so that nobody deletes the lock of the next build
        barrier()
    if bank:
        with suppress(OSError):  # another build may have begun
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
    a link to another class has the same images.

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


def _ignore_sigterm(_: int) -> None:
    """Ignore SIGTERM in a worker, because the main process ends it; else each prints a traceback about the other."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # only the thread that hands tensors over uses it; errors of images are returned


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
        worker_init_fn=_ignore_sigterm,
    )
    rank, ranks = current_rank()
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
            with writing(part) as temporary:
                torch.save({"features": features, "unreadable": unreadable}, temporary)
            bar.update(len(index))


# ----------------------------------------------------------------------------------------------------------------------
# The bank
# ----------------------------------------------------------------------------------------------------------------------


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
    with writing(parts / "bank.json") as part:
        part.write_text(json.dumps(bank, indent=1) + "\n", encoding="utf-8")  # ASCII, for file names in any encoding
    exchange(out, parts)
    clear(parts)
    return bank


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
