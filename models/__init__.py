"""Load a model by its name, from a local checkpoint, or from this repository.

    loaded = load("deit_small_patch16_224")                       # timm; weights from the hub or its cache
    loaded = load("hf:google/vit-base-patch16-224")               # transformers; a folder is hf:PATH
    loaded = load("torchvision:vit_b_16")
    loaded = load("vit_small_patch14_caltech101")                 # embedded, in pretrainedmodels/
    loaded = load("vit_small_patch8_224", checkpoint="dino.pth")  # a local file
    flow = attention_flow(loaded.model, loaded.transform(photo).unsqueeze(0))

Every error is a `ValueError` of one line that names the argument and the way out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import daam_core
from daam_vit.arguments import check_type
from models.checkpoints import architecture_of, read_checkpoint
from models.classes import find_class
from models.timm_models import from_checkpoint, from_timm
from models.torchvision_models import from_torchvision
from models.transformers_models import from_transformers, parts_of
from models.weights import EMBEDDED, WeightsUnavailable, embedded_names, usable_device

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
    """A model with its weights, its transform and its class names; the result of `load`."""

    name: str
    """The name that was passed to `load`; "hf:" and the folder's name for a folder; the stem of a checkpoint that
    names its own architecture."""
    model: nn.Module
    """In eval mode, float32."""
    transform: Callable[[Image.Image], Tensor]
    """Turns an RGB image into `(3, H, W)`. It resizes the whole image and never crops, so that map and image align."""
    size: tuple[int, int]
    """`(H, W)`, input size of the model in pixels."""
    num_classes: int
    """Number of classes; 0 without a classifier."""
    class_names: list[str] | None
    """One name per class, synonyms separated by ", "; None if they are unknown."""
    checkpoint: Path | None
    """The file of the weights, or the index of sharded weights; None if there is no file."""

    @cached_property
    def provenance(self) -> dict[str, str] | None:
        """Name and hash of the checkpoint, for manifests; None if the weights came from no file.

        Sharded weights have the name of their index and the hash of all parts in the order of the index.
        """
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
        """Return the features `(B, D)` of images `(B, 3, H, W)`: the input of the classifier, timm's `pre_logits`."""
        return daam_core.features(self.model, images)


def load(
    name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Build a model with its weights, its transform and its class names.

    Args:
        name: one of these, or None if the metadata of the checkpoint name its architecture:

            - a timm name (`timm.list_models`)
            - an embedded model (`pretrainedmodels/<name>.safetensors`)
            - `hf:NAME`, a Hugging Face transformers model: `organisation/model[@revision]` on the hub, or a folder
              written by `save_pretrained`
            - `torchvision:NAME[.WEIGHTS]` (`torchvision.models.list_models`)
        checkpoint: a local file of weights, safetensors or what `torch.save` wrote, whatever its suffix is; no code in
            it is run. The weights may lie under `layouts.WRAPPERS` and carry `layouts.PREFIXES`. The width of the
            classifier sets the number of classes; their names come from the metadata of the file, or are unknown. Not
            supported for `hf:` models.
        device: the device of the model.

    Raises:
        WeightsUnavailable: if the weights are neither passed nor cached and cannot be downloaded. A hub that does not
            answer is detected within 5 seconds, and none is asked if `HF_HUB_OFFLINE=1`.
        ValueError: if the name is unknown, or the checkpoint is missing, cannot be read or does not fit; the error
            names the keys. Missing weights are never replaced by random ones. Also if the device cannot be used.
        TypeError: if an argument is of another type.
    """
    check_type("model", name, (str, type(None)), "a name")
    device = usable_device(device)
    if name in embedded_names():
        embedded = EMBEDDED / f"{name}.safetensors"
        if checkpoint is not None:
            raise ValueError(
                f"model: {name} has its own weights; to load a checkpoint, name {architecture_of(embedded)}"
            )
        name, checkpoint = None, embedded
    if checkpoint is not None:
        check_type("checkpoint", checkpoint, (str, os.PathLike), "a path")
        checkpoint = Path(checkpoint)
    library, _, library_name = (name or "").partition(":")
    if library == "hf":
        if checkpoint is not None:
            raise ValueError("checkpoint: hf: models bring their own weights; pass their folder as hf:PATH")
        source = from_transformers(library_name)
    elif library == "torchvision":
        source = from_torchvision(library_name, checkpoint)
    elif checkpoint is not None:
        source = from_checkpoint(name, checkpoint)
    elif name is not None:
        source = from_timm(name)
    else:
        raise ValueError("model: name one, or pass a checkpoint that names its architecture")

    transform = create_transform(
        source.size, interpolation=source.interpolation, mean=source.mean, std=source.std,
        crop_pct=1.0, crop_mode="squash",
    )  # fmt: skip
    return LoadedModel(
        source.name, source.model.eval().to(device), transform, source.size,
        source.num_classes, source.class_names, source.checkpoint,
    )  # fmt: skip


def sha256(*paths: str | Path) -> str:
    """Return the SHA-256 of a file, or of several files joined, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights, which does not depend on the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
