"""Find files of weights, fetch them if that is allowed, and put weights into models."""

from __future__ import annotations

import http.client
import os
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from torch import Size, Tensor, nn

from daam_vit.text import printable

EMBEDDED = Path(__file__).resolve().parent.parent / "pretrainedmodels"


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
    file = _torch_file(url)
    return file if file.is_file() else None


def fetch_from_hub(repository: str, names: Iterable[str], revision: str | None = None) -> Path | None:
    """Return the first of these files that a hub repository has, downloaded unless it is cached; None if it has none.

    Raises:
        Exception: whatever huggingface_hub raises if the hub does not answer or refuses.
    """
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, cache_dir=hub.HF_HUB_CACHE))
        except LocalEntryNotFoundError:  # the network failed
            raise
        except EntryNotFoundError:  # the cache remembers this, too
            continue
    return None


def fetch_from_url(url: str) -> Path:
    """Download a file to where torch.hub keeps it; the hash in its name, if it has one, is checked.

    Raises:
        Exception: whatever the network, the disk and torch.hub raise.
    """
    file = _torch_file(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = torch.hub.HASH_REGEX.search(file.name)
    torch.hub.download_url_to_file(url, str(file), found[1] if found else None)
    return file


def _torch_file(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(url).path).name)


def offline_variable() -> str | None:
    """Return the environment variable that forbids connections; None if they are allowed."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in hub.ENV_VARS_TRUE_VALUES:
            return variable
    return "HF_HUB_OFFLINE" if hub.HF_HUB_OFFLINE else None


def require_server(url: str, name: str, local: str = "a local checkpoint") -> None:
    """Raise WeightsUnavailable unless the server that has the weights of a model answers.

    No server is asked if `offline_variable` forbids it.

    Args:
        url: the address of the server or of the file.
        name: the model, for the error.
        local: what the user can pass instead, for the error.
    """
    shown, instead = printable(name, 80), f"pass {local}, or an embedded model ({', '.join(embedded_names())})"
    if variable := offline_variable():
        raise WeightsUnavailable(
            f"model: the weights of {shown} are not cached and {variable} forbids a download; unset it, or {instead}"
        )
    if not reachable(url):
        raise WeightsUnavailable(f"model: the weights of {shown} are not cached and {url} cannot be reached; {instead}")


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
# Put weights into models
# ----------------------------------------------------------------------------------------------------------------------


def shapes_of(build: Callable[[], nn.Module], may_allocate: bool = True) -> dict[str, Size]:
    """Return the names and shapes of the weights of the model that a function builds, without memory for them.

    Args:
        build: builds the model.
        may_allocate: whether to use memory if a model computes with its weights while it is built.
    """
    try:
        with torch.device("meta"):
            model = build()
    except RuntimeError:
        if not may_allocate:
            raise
        model = build()
    return {name: value.shape for name, value in model.state_dict().items()}


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict into a model.

    Raises:
        ValueError: if a key is missing or unknown, or a shape differs, or whole numbers stand for floating-point ones,
            as in quantized weights.
    """
    own = model.state_dict()
    common = [key for key in own if key in state]
    report = key_mismatches(
        {
            "missing": [key for key in own if key not in state],
            "unknown": [key for key in state if key not in own],
            "of another shape": [key for key in common if own[key].shape != state[key].shape],
            "of whole numbers": [
                key for key in common if own[key].is_floating_point() and not state[key].is_floating_point()
            ],
        }
    )
    if report:
        raise ValueError(report)
    model.load_state_dict(state)


def key_mismatches(keys: dict[str, list[str]]) -> str:
    """Describe the keys that do not fit; each list stands under what is wrong with it. Return "" if all fit."""
    return "; ".join(
        f"{len(names)} keys {what} ({', '.join(printable(name, 80) for name in names[:3])}{', ...' * (len(names) > 3)})"
        for what, names in keys.items()
        if names
    )


# ----------------------------------------------------------------------------------------------------------------------
# Errors and devices
# ----------------------------------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none; a very long one is cut."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 2000)


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device of torch.

    Raises:
        ValueError: if it cannot hold values.
    """
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # the device "meta" has no values
        return probe.device
    except Exception as error:  # every backend of torch has its own
        reason = printable(first_line(error), 200)
        raise ValueError(f"device: '{printable(str(device), 40)}' cannot be used: {reason}; pass another one") from None
