"""Where models come from: a timm name, a local checkpoint or an embedded model in; a `LoadedModel` out.

    loaded = load("deit_small_patch16_224")                       # weights from the hub, or from its cache
    loaded = load("vit_small_patch14_caltech101")                 # embedded: lies in pretrainedmodels/
    loaded = load("vit_small_patch8_224", checkpoint="dino.pth")  # a local file
    flow = attention_flow(loaded.model, loaded.transform(photo).unsqueeze(0))

Every error is a `ValueError` of one line that names the argument and the way out.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import pickle
import queue
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

EMBEDDED = Path(__file__).resolve().parent.parent / "pretrainedmodels"
WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
"""Keys under which training code stores the weights, the best first (DINO: `teacher`, DeiT: `model`)."""
PROJECTION_HEADS = ("head.mlp.", "head.last_layer.")
"""DINO's checkpoints have one beside the backbone; it is no part of the model."""


class WeightsUnavailable(ValueError):
    """The weights of a known model are neither cached nor to be fetched."""


@dataclass(frozen=True)
class LoadedModel:
    name: str
    """timm's name of the architecture, with its tag where one was given; or the stem of a checkpoint that knows it."""
    model: nn.Module
    """In eval mode, float32."""
    transform: Callable[[Image.Image], Tensor]
    """RGB picture -> `(3, H, W)` as the model wants it: the whole picture, resized without a crop, so that map and
    picture align."""
    size: tuple[int, int]
    """`(H, W)` of the model's input in pixels."""
    class_names: list[str] | None
    """One name a class, synonyms separated by ", "; None where they are not known."""
    checkpoint: Path | None
    """The file that the weights came from."""

    @cached_property
    def provenance(self) -> dict[str, str] | None:
        """Name and hash of the checkpoint, for manifests; None where the weights came from no file."""
        return self.checkpoint and {"file": self.checkpoint.name, "sha256": sha256(self.checkpoint)}

    def features(self, images: Tensor) -> Tensor:
        """`(B, D)`: timm's `pre_logits` of images `(B, 3, H, W)`, what a classifier would read."""
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def load(
    name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Build a model with its weights, its transform and its class names.

    Args:
        name: a timm name (`timm.list_models`), or that of an embedded model (`pretrainedmodels/<name>.safetensors`);
            None where the checkpoint names its own architecture in its metadata, as the embedded ones do.
        checkpoint: a local `.safetensors`, or a file of `torch.save` that holds tensors only (it is read with
            `weights_only=True`); the weights may lie under one of `WRAPPERS` and carry the prefixes `module.`,
            `_orig_mod.` or `backbone.`. The width of its classifier decides the number of classes.
        device: where the model goes.

    Raises:
        WeightsUnavailable: no checkpoint was given, and the weights are not cached and cannot be fetched; a hub that
            does not answer is known within 5 seconds.
        ValueError: for an unknown name, or a checkpoint that is missing, unreadable or does not fit; names the keys.
    """
    if name in embedded_names():
        embedded = EMBEDDED / f"{name}.safetensors"
        if checkpoint is not None:
            raise ValueError(f"model: {name} has its own weights; for a checkpoint name {architecture_of(embedded)}")
        name, checkpoint = None, embedded
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        model, name, class_names = _from_checkpoint(name, checkpoint)
    elif name is None:
        raise ValueError("model: name one, or give a checkpoint that names its architecture")
    else:
        model, checkpoint = _from_hub(name)
        class_names = None

    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    transform = create_transform(
        tuple(size), interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
        crop_pct=1.0, crop_mode="squash",
    )  # fmt: skip
    if class_names is None and (subset := infer_imagenet_subset(model)):
        class_names = ImageNetInfo(subset).label_descriptions()
    return LoadedModel(name, model.eval().to(device), transform, tuple(size), class_names, checkpoint)


def sha256(path: str | Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Of the names and values of all weights: the same for the same weights from a file of another format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def embedded_names() -> list[str]:
    """The models that lie in the repository."""
    return sorted(file.stem for file in EMBEDDED.glob("*.safetensors"))


def find_class(name: str, class_names: list[str] | None, num_classes: int) -> int:
    """The index of a class by its name or one of its synonyms; case, "_" and "-" do not matter; a number is an index.

    Raises:
        ValueError: when nothing, or more than one class, has that name, with near names or the indices; when the index
            is out of range.
    """
    if re.fullmatch(r"-?[0-9]+", name.strip()):
        if 0 <= int(name) < num_classes:
            return int(name)
        raise ValueError(f"target: class {name} is out of range; there are {num_classes} classes, from 0 on")
    if class_names is None:
        raise ValueError(f"target: the class names of this model are not known; give the index of {name!r}")

    def plain(text: str) -> str:
        return " ".join(text.lower().replace("_", " ").replace("-", " ").split())

    synonyms: dict[str, list[int]] = {}
    for index, names in enumerate(class_names):
        for synonym in {plain(names), *map(plain, names.split(", "))}:
            synonyms.setdefault(synonym, []).append(index)
    found = synonyms.get(plain(name), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"target: {name!r} is the name of the classes {', '.join(map(str, found))}; give the index")
    near = difflib.get_close_matches(plain(name), synonyms, n=5, cutoff=0.6)
    near += [s for s in synonyms if set(plain(name).split()) <= set(s.split()) and s not in near]
    hint = f"near names: {', '.join(near[:5])}" if near else "give an index, or another name"
    raise ValueError(f"target: no class is called {name!r}; {hint}")


# ----------------------------------------------------------------------------------------------------------------------
# From the hub
# ----------------------------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> tuple[nn.Module, Path | None]:
    _check_name(name)
    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        config = None
    if config is None or not config.has_weights:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        hint = f"timm has {', '.join(tags[:5])}" if tags else "timm has none for this architecture: give a checkpoint"
        raise ValueError(f"model: there are no pretrained weights {name!r}; {hint}")
    file = _cached(config)
    if file is None:
        source = hub.ENDPOINT if config.hf_hub_id else config.url
        if not _reachable(source):
            raise WeightsUnavailable(
                f"model: the weights of {name} are not cached and {source} cannot be reached; give a local checkpoint, "
                f"or an embedded model ({', '.join(embedded_names())})"
            )
    try:
        overlay = {"file": str(file), "custom_load": file.suffix == ".npz"} if file else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever the hub, the network, the disk or timm's own loader raise
        raise WeightsUnavailable(f"model: the weights of {name} could not be loaded: {_first_line(error)}") from error
    return model, file or _cached(config)


def _cached(config) -> Path | None:
    """The file of these weights in the cache of the hub or of torch.hub, without asking the network."""
    if config.hf_hub_id:
        names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        files = [try_to_load_from_cache(config.hf_hub_id, name, hub.HF_HUB_CACHE) for name in names]
        return next((Path(file) for file in files if isinstance(file, str)), None)
    file = Path(torch.hub.get_dir(), "checkpoints", config.url.rsplit("/", 1)[-1])
    return file if file.is_file() else None


def _reachable(url: str, seconds: float = 4) -> bool:
    """Whether a server answers in time. In a thread, since the look-up of a name takes no time limit."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.put(True)
        except urllib.error.HTTPError as error:  # an answer too, unless a proxy in between lets nothing through
            answers.put(error.code < 500 and error.code not in (403, 407))
        except (OSError, ValueError, http.client.HTTPException):
            answers.put(False)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        known = [*timm.list_models(), *embedded_names()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has them all"
        raise ValueError(f"model: {name!r} is neither a timm name nor an embedded model; {hint}")


# ----------------------------------------------------------------------------------------------------------------------
# From a file
# ----------------------------------------------------------------------------------------------------------------------


def architecture_of(checkpoint: str | Path) -> str | None:
    """The timm name that a checkpoint carries in its metadata, as the embedded ones do; None where it does not."""
    try:
        with safetensors.safe_open(checkpoint, "pt") as file:
            return (file.metadata() or {}).get("architecture")
    except Exception:  # of another format, missing or damaged: `load` says which
        return None


def _from_checkpoint(name: str | None, path: Path) -> tuple[nn.Module, str, list[str] | None]:
    state, metadata = read_checkpoint(path)
    architecture = name or metadata.get("architecture")
    if architecture is None:
        raise ValueError(f"model: {path.name} does not say what architecture it is; name one")
    _check_name(architecture)
    arguments = json.loads(metadata.get("model_args", "{}"))
    if "num_classes" not in arguments:
        classifier = get_pretrained_cfg(architecture, allow_unregistered=True).classifier or "head"
        weight = state.get(f"{classifier}.weight")
        arguments["num_classes"] = 0 if weight is None else weight.shape[0]
    model = timm.create_model(architecture, **arguments)

    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state  # other layouts, another position grid
    except Exception as error:
        raise ValueError(f"checkpoint: {path.name} does not fit {architecture}: {_first_line(error)}") from error
    own = model.state_dict()
    misfits = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    if any(misfits.values()):
        report = (
            f"{len(k)} keys {what} ({', '.join(k[:3])}{', ...' * (len(k) > 3)})" for what, k in misfits.items() if k
        )
        raise ValueError(f"checkpoint: {path.name} does not fit {architecture}: {'; '.join(report)}")
    model.load_state_dict(state)
    names = json.loads(metadata["class_names"]) if "class_names" in metadata else None
    return model, name or path.stem, names


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights under their plain names, and the metadata of a safetensors file (empty for others).

    Raises:
        ValueError: when the file is missing, damaged, or holds something that is not a tensor.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {path}")
    metadata = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint: {path.name} is damaged, or holds more than tensors and is not loaded") from error
    except Exception as error:  # torch, zipfile and safetensors raise a dozen kinds for a damaged file
        raise ValueError(f"checkpoint: {path.name} cannot be read: {_first_line(error)}") from error

    while isinstance(state, dict) and (key := next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint: {path.name} has no state dict, not even under {', '.join(WRAPPERS)}")
    for prefix in ("module.", "_orig_mod.", "module.", "backbone."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith(PROJECTION_HEADS)}, metadata


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
