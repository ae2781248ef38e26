"""Read a checkpoint, whatever its suffix is, without running code that it may hold.

The content of the file tells the format: safetensors, or what `torch.save` writes, as a ZIP archive or as a plain
pickle. What training code stores beside the weights (its command line, dates, NumPy scalars) is allowed; `HARMLESS` are
stand-ins for these types, which keep values at most.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from daam_vit.arguments import check_type
from daam_vit.inputs import unusual_kind
from daam_vit.text import printable
from models.layouts import WRAPPERS, find_weights, image_sizes

MAX_EXPANSION = 20
"""Bytes of tensors for each byte of the file; more than that is a ZIP bomb or a tensor without strides."""
SIGNATURES = {
    b"version https://git-lfs": "is a pointer of Git LFS without the weights; run `git lfs pull`",
    b"\x89HDF": "is an HDF5 file, as Keras writes it; convert it to safetensors",
    b"\x93NUMPY": "is an array of NumPy; pass the weights as safetensors",
    b"GGUF": "is a GGUF file; pass the weights as safetensors",
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"BZh": "is compressed by bzip2; unpack it",
    b"\xfd7zXZ": "is compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it",
}
"""First bytes of files that are often mistaken for checkpoints, and what to do with them."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, under the names that they have there, and what the file says about them."""

    path: Path
    state: dict[str, Tensor]
    """The state dict, taken out of its wrappers; the names may still carry prefixes, see `layouts.rename`."""
    metadata: dict[str, str]
    """Metadata of a safetensors file, else empty. They are not trusted: read them by `models.metadata`."""
    sizes: list[tuple[int, int]]
    """Image sizes `(H, W)` that the training code stored beside the weights."""

    @property
    def name(self) -> str:
        """The name of the file, for errors."""
        return printable(self.path.name, 80)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of a checkpoint.

    Raises:
        ValueError: if the file is missing or damaged, has another format, has no state dict, or holds something that
            cannot be read without running code. The error says what to do.
    """
    check_type("checkpoint", path, (str, os.PathLike), "a path")
    path = Path(path)
    content, metadata = read_content(path)
    state = find_weights(content)
    if state is None:
        raise ValueError(
            f"checkpoint: {printable(path.name, 80)} has no state dict, not even under {', '.join(WRAPPERS)}; "
            "save one: torch.save(model.state_dict(), FILE)"
        )
    for key, value in state.items():
        if problem := _problem(value):
            raise ValueError(
                f"checkpoint: {printable(path.name, 80)}: the tensor {printable(key, 80)} is {problem}; "
                "save a dense floating-point copy of it"
            )
    _check_expansion(path, sum(value.numel() * value.element_size() for value in state.values()))
    return Checkpoint(path, state, metadata, image_sizes(content))


def read_content(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what a checkpoint holds, as it was saved, and the metadata of a safetensors file, else `{}`.

    Raises:
        ValueError: as `read_checkpoint`, except for the lack of a state dict.
    """
    name = printable(path.name, 80)
    kind = _kind_of(path)
    try:
        if kind == "safetensors":
            with safetensors.safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if kind == "zip":
            _check_archive(path)
        with open(path, "rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of old formats
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except _Refused as error:
        raise ValueError(f"checkpoint: {name} {error}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"holds more than tensors ({printable(found[1].removeprefix('builtins.'), 80)})"
            if found
            else "is damaged or holds more than tensors"
        )
        raise ValueError(
            f"checkpoint: {name} {what} and is not loaded, because it could run code; "
            "save the weights alone where it was made: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch, zipfile and safetensors raise many kinds of errors for a damaged file
        reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__, 100)
        raise ValueError(
            f"checkpoint: {name} is cut off or damaged and cannot be read ({reason}); copy or download it again"
        ) from error


def architecture_of(checkpoint: str | Path) -> str | None:
    """Return the timm name in the metadata of a checkpoint, as embedded models have it; None if there is none."""
    try:
        if _kind_of(Path(checkpoint)) != "safetensors":
            return None
        with safetensors.safe_open(checkpoint, "pt") as file:
            return (file.metadata() or {}).get("architecture")
    except Exception:  # missing or damaged: `load` says which
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The format
# ----------------------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """Raised for a file that is read no further; the message follows its name."""


def _kind_of(path: Path) -> str:
    """Return "safetensors", "zip" or "pickle".

    Raises:
        ValueError: if the file is missing, empty or no checkpoint.
    """
    name = printable(path.name or str(path), 80)
    try:
        info = path.stat()
    except (OSError, ValueError):  # also a name that is too long or has a null character
        raise ValueError(f"checkpoint: there is no file {printable(str(path), 200)}") from None
    if stat.S_ISDIR(info.st_mode):
        raise ValueError(
            f"checkpoint: {name} is a folder; pass the file in it, or --model hf:PATH for a folder of transformers"
        )
    if not stat.S_ISREG(info.st_mode):  # to open a named pipe would wait for its writer
        raise ValueError(f"checkpoint: {name} is not a regular file; pass a file of weights")
    if not info.st_size:
        raise ValueError(f"checkpoint: {name} is empty; copy or download it again")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"checkpoint: {name} cannot be opened: {error.strerror}") from None
    for signature, problem in SIGNATURES.items():
        if start.startswith(signature):
            raise ValueError(f"checkpoint: {name} {problem}")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise ValueError(f"checkpoint: {name} is a web page, not weights; the download failed, download it again")
    if start[5:9] == b"\0\0\0{":  # the end of the header's length, and the header
        return "safetensors"
    if start.startswith(b"PK"):
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    problem = "is in the tar format of PyTorch 0.1" if start[257:262] == b"ustar" else "is not a file of weights"
    raise ValueError(f"checkpoint: {name} {problem}; pass a file written by safetensors or torch.save")


def _check_archive(path: Path) -> None:
    """Raise _Refused for a ZIP archive that torch.save did not write."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    names = [file.filename.rpartition("/")[2] for file in files]
    if "constants.pkl" in names:  # older torch would run its program, in spite of weights_only
        raise _Refused(
            "is a TorchScript archive, which holds a program; "
            "save its weights: torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
        )
    if "data.pkl" not in names:
        kind = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a ZIP archive without weights"
        raise _Refused(f"is {kind}; pass a file written by safetensors or torch.save")
    _check_expansion(path, sum(file.file_size for file in files))


def _check_expansion(path: Path, size: int) -> None:
    """Raise a ValueError if so many bytes came from so small a file; 1 MB is always allowed."""
    if size > max(MAX_EXPANSION * path.stat().st_size, 1 << 20):
        raise ValueError(
            f"checkpoint: {printable(path.name, 80)} would grow from {path.stat().st_size:,} to {size:,} bytes "
            "and is not loaded; save contiguous copies of its tensors"
        )


def _problem(value: Tensor) -> str | None:
    """Return why a tensor cannot be a weight; None if it can."""
    if kind := unusual_kind(value):
        return kind
    return None if math.prod(value.shape) == value.numel() else "damaged"


# ----------------------------------------------------------------------------------------------------------------------
# Types that are allowed beside tensors
# ----------------------------------------------------------------------------------------------------------------------


class _StandIn:
    """Takes the place of a harmless type in a pickle: it is made from anything and only keeps attributes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _DictStandIn(_StandIn):
    """Takes the place of a harmless kind of dict."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()  # one of the types that torch's reader fills


class _ListStandIn(_StandIn):
    """Takes the place of a harmless kind of list."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


_NUMPY = "dtype ndarray bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longlong"
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
_STANDS_FOR = {
    _StandIn: {
        "argparse": "Namespace",
        "builtins": "set frozenset slice range complex bytearray int float str bool bytes list tuple dict object",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "numpy": _NUMPY,
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,
        "torch.torch_version": "TorchVersion",
        "types": "SimpleNamespace",
        "typing": "Any",
        "uuid": "UUID SafeUUID",
    },
    _DictStandIn: {
        "addict.addict": "Dict",
        "collections": "defaultdict",
        "easydict": "EasyDict",
        "yacs.config": "CfgNode",
    },
    _ListStandIn: {"collections": "deque"},
}
HARMLESS = [
    type(name, (base,), {"__module__": module})
    for base, modules in _STANDS_FOR.items()
    for module, names in modules.items()
    for name in names.split()
]
"""Stand-ins for the types that training code stores beside the weights; none of them runs code."""
