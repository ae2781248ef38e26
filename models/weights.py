"""Find files of weights, read them, and check whether the servers that offer them can be reached."""

from __future__ import annotations

import argparse
import http.client
import pathlib
import pickle
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import safetensors
import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

EMBEDDED = Path(__file__).resolve().parent.parent / "pretrainedmodels"
WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
"""Keys under which training code stores the weights, in order of preference (DINO: `teacher`, DeiT: `model`)."""
PROJECTION_HEADS = ("head.mlp.", "head.last_layer.")
"""Prefixes of the projection head in DINO's checkpoints, which is not part of the model."""
HARMLESS = [argparse.Namespace, pathlib.PosixPath]
"""Types that training code stores beside the weights, for its command line. They hold values and run no code."""


class WeightsUnavailable(ValueError):
    """Raised if the weights of a known model are not cached and cannot be downloaded."""


# ----------------------------------------------------------------------------------------------------------------------
# Find weights
# ----------------------------------------------------------------------------------------------------------------------


def embedded_names() -> list[str]:
    """Return the names of the models that are stored in the repository."""
    return sorted(file.stem for file in EMBEDDED.glob("*.safetensors"))


def in_hub_cache(repository: str, names: list[str], revision: str | None = None) -> Path | None:
    """Return the first of these files of a hub repository that is cached; None if none is."""
    files = (try_to_load_from_cache(repository, name, hub.HF_HUB_CACHE, revision) for name in names)
    return next((Path(file) for file in files if isinstance(file, str)), None)


def in_torch_cache(url: str) -> Path | None:
    """Return the file that torch.hub downloaded from this address; None if it is not cached."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(url).path).name)
    return file if file.is_file() else None


def require_server(url: str, name: str, local: str = "a local checkpoint") -> None:
    """Raise WeightsUnavailable unless the server that has the weights of a model answers.

    Args:
        url: the address of the server or of the file.
        name: the model, for the error.
        local: what the user can pass instead, for the error.
    """
    if not reachable(url):
        raise WeightsUnavailable(
            f"model: the weights of {name} are not cached and {url} cannot be reached; pass {local}, "
            f"or an embedded model ({', '.join(embedded_names())})"
        )


def reachable(url: str, seconds: float = 4) -> bool:
    """Return whether a server answers in time.

    A thread asks, because the look-up of the host name has no timeout.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.put(True)
        except urllib.error.HTTPError as error:  # an answer too, unless a proxy refuses the request
            answers.put(error.code < 500 and error.code not in (403, 407))
        except (OSError, ValueError, http.client.HTTPException):
            answers.put(False)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Read weights
# ----------------------------------------------------------------------------------------------------------------------


def architecture_of(checkpoint: str | Path) -> str | None:
    """Return the timm name in the metadata of a checkpoint, as embedded models have it; None if there is none."""
    try:
        with safetensors.safe_open(checkpoint, "pt") as file:
            return (file.metadata() or {}).get("architecture")
    except Exception:  # another format, or missing or damaged: `load` says which
        return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights without wrapper and prefixes, and the metadata of a safetensors file, else `{}`.

    Raises:
        ValueError: if the file is missing or damaged, or is not a dict of tensors.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {path}")
    metadata = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        else:
            with torch.serialization.safe_globals(HARMLESS):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint: {path.name} is damaged, or holds more than tensors and is not loaded") from error
    except Exception as error:  # torch, zipfile and safetensors raise many kinds of errors for a damaged file
        raise ValueError(f"checkpoint: {path.name} cannot be read: {first_line(error)}") from error

    while isinstance(state, dict) and (key := next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named or not state:
        raise ValueError(f"checkpoint: {path.name} has no state dict, not even under {', '.join(WRAPPERS)}")
    for prefix in ("module.", "_orig_mod.", "module.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith(PROJECTION_HEADS)}, metadata


def fill(model: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Load a state dict into a model.

    Raises:
        ValueError: if a key is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    report = key_mismatches(
        {
            "missing": [key for key in own if key not in state],
            "unknown": [key for key in state if key not in own],
            "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
        }
    )
    if report:
        raise ValueError(f"checkpoint: {path.name} does not fit {architecture}: {report}")
    model.load_state_dict(state)


def key_mismatches(keys: dict[str, list[str]]) -> str:
    """Describe the keys that do not fit; each list stands under what is wrong with it. Return "" if all fit."""
    return "; ".join(
        f"{len(k)} keys {what} ({', '.join(k[:3])}{', ...' * (len(k) > 3)})" for what, k in keys.items() if k
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
