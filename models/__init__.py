"""Where models come from: a name, a local checkpoint or an embedded model in; a `LoadedModel` out.

    loaded = load("deit_small_patch16_224")                       # of timm; weights from the hub, or from its cache
    loaded = load("hf:google/vit-base-patch16-224")               # of transformers; or a folder, hf:PATH
    loaded = load("torchvision:vit_b_16")
    loaded = load("vit_small_patch14_caltech101")                 # embedded: lies in pretrainedmodels/
    loaded = load("vit_small_patch8_224", checkpoint="dino.pth")  # a local file
    flow = attention_flow(loaded.model, loaded.transform(photo).unsqueeze(0))

Every error is a `ValueError` of one line that names the argument and the way out.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import daam_core
from models.sources import from_checkpoint, from_timm, from_torchvision, from_transformers, parts_of
from models.weights import EMBEDDED, WeightsUnavailable, architecture_of, embedded_names, read_checkpoint

__all__ = [
    "LoadedModel",
    "WeightsUnavailable",
    "architecture_of",
    "embedded_names",
    "find_class",
    "load",
    "read_checkpoint",
    "sha256",
    "weights_sha256",
]


@dataclass(frozen=True)
class LoadedModel:
    name: str
    """As given to `load`; of a folder "hf:" and its name; of a checkpoint that names its architecture the stem."""
    model: nn.Module
    """In eval mode, float32."""
    transform: Callable[[Image.Image], Tensor]
    """RGB picture -> `(3, H, W)` as the model wants it: the whole picture, resized without a crop, so that map and
    picture align."""
    size: tuple[int, int]
    """`(H, W)` of the model's input in pixels."""
    num_classes: int
    """0 for a model without a classifier."""
    class_names: list[str] | None
    """One name a class, synonyms separated by ", "; None where they are not known."""
    checkpoint: Path | None
    """The file that the weights came from; of sharded ones the index of the parts."""

    @cached_property
    def provenance(self) -> dict[str, str] | None:
        """Name and hash of the checkpoint, for manifests (of sharded weights the name of their index, the hash of all
        parts in its order); None where the weights came from no file."""
        if self.checkpoint is None:
            return None
        parts = [self.checkpoint.with_name(part) for part in parts_of(self.checkpoint)] or [self.checkpoint]
        return {"file": self.checkpoint.name, "sha256": sha256(*parts)}

    @cached_property
    def num_features(self) -> int:
        """D, the width of the features."""
        width = getattr(self.model, "head_hidden_size", None)  # timm's
        if width is None:
            parameter = next(self.model.parameters())
            with torch.inference_mode():
                width = self.features(parameter.new_zeros(1, 3, *self.size)).shape[1]
        return width

    def features(self, images: Tensor) -> Tensor:
        """`(B, D)` of images `(B, 3, H, W)`: what a classifier would read, timm's `pre_logits`."""
        return daam_core.features(self.model, images)


def load(
    name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Build a model with its weights, its transform and its class names.

    Args:
        name: a timm name (`timm.list_models`), or that of an embedded model (`pretrainedmodels/<name>.safetensors`);
            `hf:NAME`, a model of Hugging Face transformers: on the hub (`organisation/model`, with `@revision` where it
            is not the main one) or in a folder that `save_pretrained` wrote; `torchvision:NAME`
            (`torchvision.models.list_models`), with `.WEIGHTS` where they are not the default ones. None where the
            checkpoint names its own architecture in its metadata, as the embedded ones do.
        checkpoint: a local `.safetensors`, or a file of `torch.save` that holds tensors and a command line at most (it
            is read with `weights_only=True`); the weights may lie under one of `weights.WRAPPERS` and carry the
            prefixes `module.`, `_orig_mod.` or `backbone.`. The width of its classifier decides the number of classes.
            Not for `hf:`, whose folders hold everything.
        device: where the model goes.

    Raises:
        WeightsUnavailable: no checkpoint was given, and the weights are not cached and cannot be fetched; a hub that
            does not answer is known within 5 seconds.
        ValueError: for an unknown name, or a checkpoint that is missing, unreadable or does not fit; names the keys.
            A model never gets random weights in place of missing ones.
    """
    if name in embedded_names():
        embedded = EMBEDDED / f"{name}.safetensors"
        if checkpoint is not None:
            raise ValueError(f"model: {name} has its own weights; for a checkpoint name {architecture_of(embedded)}")
        name, checkpoint = None, embedded
    checkpoint = None if checkpoint is None else Path(checkpoint)
    library, _, its_name = (name or "").partition(":")
    if library == "hf":
        if checkpoint is not None:
            raise ValueError("checkpoint: is not for hf: models, which bring their weights; name their folder, hf:PATH")
        source = from_transformers(its_name)
    elif library == "torchvision":
        source = from_torchvision(its_name, checkpoint)
    elif checkpoint is not None:
        source = from_checkpoint(name, checkpoint)
    elif name is not None:
        source = from_timm(name)
    else:
        raise ValueError("model: name one, or give a checkpoint that names its architecture")

    transform = create_transform(
        source.size, interpolation=source.interpolation, mean=source.mean, std=source.std,
        crop_pct=1.0, crop_mode="squash",
    )  # fmt: skip
    return LoadedModel(
        source.name, source.model.eval().to(device), transform, source.size,
        source.num_classes, source.class_names, source.checkpoint,
    )  # fmt: skip


def sha256(*paths: str | Path) -> str:
    """Of a file, or of several one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
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
