"""Build a memory bank from an image folder, in one process or under `torchrun`, and resume a build that was killed.

The batches depend on the list of images only. The features of every batch are written atomically to a part, a file in
the folder `.building` of the bank. The ranks share the missing batches, so the result does not depend on the number of
ranks or interruptions. At the end the first rank joins the parts and renames the files, `bank.json` last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from daam_vit.files import atomic_write
from models import LoadedModel, weights_sha256
from models.images import looks_like_image, read_image
from models.versions import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""Data types of the stored features."""
WORKERS = min(4, os.cpu_count() or 1)
"""Default number of processes that decode images."""


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
        ValueError: if a folder has no images, an image cannot be read and `strict` is set, a feature is not finite,
            a class of `test` is unknown, or `out` is in use or holds the parts of another build.
    """
    out = Path(out)
    folders = {"train": Path(train)} | ({"test": Path(test)} if test else {})
    found = {split: find_classes(folder, split) for split, folder in folders.items()}
    classes = {name: index for index, name in enumerate(found["train"])}
    unknown = [name for name in found.get("test", {}) if name not in classes]
    if unknown:
        raise ValueError(f"test: the class {unknown[0]!r} is not among the sub-folders of {train}")
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
                unreadable[split] = _join(parts, split, files, len(batches), strict)
        if rank == 0:
            bank = _finish(out, parts, plan, loaded, folders, items, unreadable, list(classes))
        _barrier()
    return bank


def find_classes(folder: Path, split: str) -> dict[str, list[Path]]:
    """Return the sorted images of every class, recursively; classes without images and hidden folders are skipped.

    Raises:
        ValueError: if the folder does not exist or no sub-folder has an image.
    """
    if not folder.is_dir():
        raise ValueError(f"{split}: there is no folder {folder}")

    def fail(error: OSError) -> None:
        raise error

    classes = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        files = []
        for root, below, names in os.walk(sub, onerror=fail):
            below[:] = [name for name in below if name[0] != "."]
            files += [Path(root, name) for name in names if looks_like_image(name)]
        if files:
            classes[sub.name] = sorted(files)
    if not classes:
        raise ValueError(f"{split}: {folder} has no images; it should have one sub-folder per class, with its images")
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
        images, batch_sampler=list(work.values()), num_workers=workers, pin_memory=device.type == "cuda"
    )
    rank, ranks = _rank()
    label = split if ranks == 1 else f"{split}, rank {rank} of {ranks}"
    with tqdm(total=total, desc=label, unit="img", disable=rank > 0 or not total) as bar:
        for part, (index, batch, reasons) in zip(work, loader):
            unreadable = {i: reason for i, reason in zip(index.tolist(), reasons) if reason}
            if unreadable and strict:
                raise ValueError(f"{split}: {next(iter(unreadable.values()))}")
            features = F.normalize(loaded.features(batch.to(device, non_blocking=True)).float(), dim=1)
            finite = features.isfinite().all(1).tolist()
            if not all(finite):
                file = files[index[finite.index(False)]]
                raise ValueError(f"model: the feature of {file} is not finite; check the weights for NaN")
            with atomic_write(part) as temporary:
                torch.save({"features": features.to(DTYPES[dtype]).cpu(), "unreadable": unreadable}, temporary)
            bar.update(len(index))


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def _begin(parts: Path, plan: dict, stack: ExitStack) -> None:
    """Lock the folder of the parts, and write the plan if the build is new."""
    parts.mkdir(parents=True, exist_ok=True)
    if fcntl:
        folder = os.open(parts, os.O_RDONLY)
        stack.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another build is running in {parts}; wait for it, or pass another folder") from None
    if not (parts / "plan.json").is_file():
        for left in parts.iterdir():  # left by a build that was killed during its clean-up
            left.unlink()
        with atomic_write(parts / "plan.json") as part:
            part.write_text(json.dumps(plan), encoding="utf-8")


def _check_plan(parts: Path, plan: dict) -> None:
    """Raise a ValueError unless this rank has the images and settings of the build that the parts belong to."""
    try:
        theirs = json.loads((parts / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"out: there is no folder {parts}; all machines must share the folder of the bank") from None
    different = [key for key in plan | theirs if plan.get(key) != theirs.get(key)]
    if different:
        raise ValueError(
            f"out: {parts} holds an unfinished build with another {', '.join(different)}; "
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


def _join(parts: Path, split: str, files: list[tuple[Path, int]], batches: int, strict: bool) -> dict[int, str]:
    """Join the parts of a split to two files in the same folder; return the images that cannot be read."""
    unreadable: dict[int, str] = {}
    features, first, kept, with_gaps = torch.empty(0), 0, 0, []
    for n in range(batches):
        path = _part(parts, split, n)
        try:
            part = torch.load(path, weights_only=True)
        except Exception as error:  # after a power cut a file may be renamed, but empty
            path.unlink(missing_ok=True)
            raise ValueError(f"out: {path} was damaged and has been deleted; run the same command again") from error
        rows = part["features"]
        if part["unreadable"]:
            unreadable |= part["unreadable"]
            with_gaps.append(path)
            rows = rows[[first + i not in part["unreadable"] for i in range(len(rows))]]
        if n == 0:
            features = rows.new_empty(len(files), rows.shape[1])
        features[kept : kept + len(rows)] = rows
        first, kept = first + len(part["features"]), kept + len(rows)
    if unreadable and (strict or not kept):
        for path in with_gaps:  # so that the next build reads these images again
            path.unlink()
        reason = next(iter(unreadable.values()))
        raise ValueError(
            f"{split}: {reason}" if kept else f"{split}: none of the {len(files)} images can be read: {reason}"
        )
    labels = torch.tensor([label for i, (_, label) in enumerate(files) if i not in unreadable])
    for name, tensor in (("feat", features[:kept].clone() if unreadable else features), ("labels", labels)):
        with open(parts / f"{split}{name}.pth", "wb") as file:
            torch.save(tensor, file)
    return unreadable


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
    """Rename the joined files and write bank.json."""
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
    pairs = [f"{split}{kind}.pth" for split in ("train", "test") for kind in ("feat", "labels")]
    for name in ("bank.json", *pairs):  # never leave features and labels of two banks side by side
        (out / name).unlink(missing_ok=True)
    for name in pairs:
        if (parts / name).is_file():
            os.replace(parts / name, out / name)
    with atomic_write(out / "bank.json") as part:
        part.write_text(json.dumps(bank, indent=1) + "\n", encoding="utf-8")  # ASCII, for file names in any encoding
    (parts / "plan.json").unlink()  # first, because parts without a plan are discarded
    shutil.rmtree(parts)
    return bank


def _digest(folder: Path, files: list[tuple[Path, int]]) -> str:
    """Return a hash of the names and sizes of the images."""

    def size(file: Path) -> int:
        return file.stat().st_size if file.exists() else -1  # a broken link

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
