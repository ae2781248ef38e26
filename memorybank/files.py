"""Read the files of a bank, which are not trusted, and check them before anything is computed."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from daam_vit.inputs import MAX_CLASSES, unusual_kind
from daam_vit.text import printable
from models.schema import parse_json
from models.weights import first_line

TILE = 4096
"""Rows that are converted to float32 at a time."""
IMAGES = {"count": int, "folder": str, "files": ([str], None), "unreadable": {str: str}}
"""Schema of what `bank.json` says of a split."""
METADATA = {
    "model": str,
    "checkpoint": ({"file": str, "sha256": str}, None),
    "weights_sha256": str,
    "transform": str,
    "input_size": [int],
    "dtype": str,
    "class_names": ([str], None),
    "versions": {str: str},
    "train": IMAGES,
    "test": IMAGES,
}
"""Schema of `bank.json`."""


def shown(path: Path) -> str:
    """Return a path as one line for an error; a long one is cut."""
    return printable(str(path), 300)


def read_metadata(directory: str | Path) -> dict:
    """Return the content of `bank.json`; empty if there is none.

    Raises:
        ValueError: if it cannot be read, or an entry is not of the type in `METADATA`.
    """
    path = Path(directory, "bank.json")
    if not os.path.lexists(path):
        return {}
    name = f"bank: {shown(path)}"
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError(f"{name} is not a file; delete it, or build the bank again")
        return parse_json(path.read_bytes(), METADATA, name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def read_pair(directory: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Return features `(M, D)` and labels `(M,)` int64 of a split, "train" or "test"; all rows are checked.

    Both may be a tensor or a numpy array that `torch.save` wrote, or a file of `numpy.save`. Features in float16 or
    float32 are memory-mapped if the file allows it; other floats become float32.

    Raises:
        ValueError: if a file is missing or damaged or holds more than one tensor, the two do not fit each other, or a
            row is not finite or not L2-normalised.
    """
    paths = [Path(directory, f"{split}{kind}.pth") for kind in ("feat", "labels")]
    features, labels = map(_read_tensor, paths)
    feature_file, label_file = map(shown, paths)
    if features.ndim != 2 or not features.numel() or not features.is_floating_point():
        raise ValueError(
            f"bank: {feature_file} should hold features (M, D), float16 or float32, "
            f"but has {tuple(features.shape)} {features.dtype}"
        )
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"bank: {label_file} should hold integers (M,), but has {tuple(labels.shape)} {labels.dtype}")
    if len(labels) != len(features):
        raise ValueError(f"bank: {label_file} has {len(labels)} labels for {len(features)} features")
    values = labels.numpy()  # torch finds no minimum of unsigned integers
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= MAX_CLASSES:
        wrong = low if low < 0 else high
        raise ValueError(f"bank: {label_file} has the label {wrong}; expected 0 to {MAX_CLASSES - 1}")
    if features.dtype not in (torch.float16, torch.float32):
        features = features.float()
    _check_rows(features, feature_file)
    return features, labels.long()


def _check_rows(features: Tensor, name: str) -> None:
    """Raise a ValueError unless every row is finite and L2-normalised; this takes less time than a query."""
    norms, tile = torch.empty(len(features)), torch.empty(min(TILE, len(features)), features.shape[1])
    for start in range(0, len(features), TILE):
        part = features[start : start + TILE]
        torch.linalg.vector_norm(tile[: len(part)].copy_(part), dim=1, out=norms[start : start + TILE])
    wrong = ((norms - 1).abs() <= 0.01).logical_not().nonzero().flatten().tolist()  # NaN is wrong, too
    if not wrong:
        return
    where = f"{len(wrong)} of {len(norms)} rows, the first is row {wrong[0]}"
    if not features[wrong[0]].isfinite().all():
        raise ValueError(f"bank: {name} has NaN or infinite values; build it again ({where})")
    raise ValueError(
        f"bank: the rows of {name} are not L2-normalised; divide each by its norm, and leave out rows of zeros "
        f"({where}, of norm {norms[wrong[0]]:.3g})"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tensors and arrays
# ----------------------------------------------------------------------------------------------------------------------


class _Dtype:
    """Stand-in for `numpy.dtype` in a pickle."""

    def __init__(self, code: str, *_: bool):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _Array:
    """Stand-in for `numpy.ndarray` in a pickle: only numbers, whose count must fit the shape."""

    def __init__(self, *_: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, columns_first, values = state
        if not re.fullmatch("[iuf][1248]", dtype.code):
            raise ValueError(f"numbers are expected, not numpy's {printable(str(dtype.code), 20)}")
        layout = np.dtype(dtype.order.replace("|", "=") + dtype.code)
        self.array = np.ndarray(shape, layout, values, order="F" if columns_first else "C").copy(order="K")


NUMPY = [
    type(name, (stand_in,), {"__module__": module})
    for stand_in, module, name in (
        (_Dtype, "numpy", "dtype"),
        (object, "numpy", "ndarray"),
        (_Array, "numpy.core.multiarray", "_reconstruct"),  # numpy 1
        (_Array, "numpy._core.multiarray", "_reconstruct"),  # numpy 2
    )
]
"""Stand-ins for the types in a pickled array, so that an untrusted pickle runs no code of numpy."""


def _read_tensor(path: Path) -> Tensor:
    """Read a tensor or an array; the content tells the format, not the name of the file."""
    name = shown(path)
    if not os.path.isfile(path):
        raise ValueError(f"bank: there is no file {name}")
    start = b"unknown"
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        is_numpy = start.startswith(b"\x93NUMPY")
        value = np.load(path, mmap_mode="c", allow_pickle=False) if is_numpy else _torch_load(path)
        if isinstance(value, _Array):
            value = value.array
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    except Exception as error:  # torch, numpy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"bank: {name} {_problem(start, error)}") from error
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"bank: {name} should hold a tensor, but has a {type(value).__name__}")
    if unusual := unusual_kind(value):
        raise ValueError(f"bank: {name} should hold a plain tensor of real numbers, but has a {unusual} tensor")
    value = value.detach()
    if value.nbytes > path.stat().st_size:  # strides of zero, or rows that overlap
        raise ValueError(f"bank: {name} claims a shape of {tuple(value.shape)}, but holds fewer values")
    return value


def _problem(start: bytes, error: Exception) -> str:
    """Return what is wrong with a file, from its first bytes and the error of reading it."""
    if not start:
        return "is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS; run `git lfs pull`"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page; the download failed, download it again"
    if isinstance(error, pickle.UnpicklingError):
        return "is damaged, or holds more than tensors and is not loaded"
    if "PytorchStreamReader" in str(error):
        return "is cut off or damaged; copy or download it again"
    if "inline_container" in str(error):
        return "is an archive of another kind; save one array by numpy.save, or one tensor by torch.save"
    return f"cannot be read: {printable(first_line(error), 200)}"


def _torch_load(path: Path) -> Tensor:
    with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY):
        warnings.simplefilter("ignore")  # of old formats
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # an array, or a file of torch 1.5 or earlier, which is no archive
            return torch.load(path, map_location="cpu", weights_only=True)
