"""Load models of torchvision, with torchvision's own weights or with those of a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from unittest.mock import patch

import torchvision.models
from timm.layers import resample_abs_pos_embed
from torch import nn

from daam_vit.text import printable
from models.checkpoints import Checkpoint, read_checkpoint, read_content
from models.layouts import rename, without_extras
from models.metadata import class_names
from models.positions import find_grid
from models.sources import Source
from models.weights import (
    WeightsUnavailable,
    fetch_from_url,
    fill,
    first_line,
    in_torch_cache,
    require_server,
    shapes_of,
)

POSITIONS = "encoder.pos_embedding"
HEADS = ("heads.head.weight", "head.weight", "fc.weight")
"""Classifiers of torchvision's models whose builders take `num_classes`."""


def from_torchvision(name: str, path: Path | None) -> Source:
    """Load `architecture[.WEIGHTS]` with these weights, torchvision's default weights, or those of a file.

    The transform is that of the named weights, except the size, which a ViT itself defines.
    """
    architecture, weights = _weights_named(name)
    images, names = weights.transforms(), None
    if path is None:
        model, path = _pretrained(architecture, weights)
        names = list(weights.meta["categories"])
        num_classes = getattr(model, "num_classes", len(names))
    else:
        checkpoint = read_checkpoint(path)
        try:
            model, num_classes = _fitting(architecture, checkpoint)
        except Exception as error:  # the weights belong to another architecture
            raise ValueError(
                f"checkpoint: {checkpoint.name} does not fit {architecture}: {first_line(error)}"
            ) from error
        names = class_names(checkpoint, num_classes)
    side = [model.image_size] if hasattr(model, "image_size") else images.crop_size
    return Source(
        f"torchvision:{name}", model, num_classes, names, path,
        (side[0], side[-1]), tuple(images.mean), tuple(images.std), images.interpolation.value,
    )  # fmt: skip


def _weights_named(name: str) -> tuple[str, torchvision.models.WeightsEnum]:
    """Return the architecture and the weights entry that `architecture[.WEIGHTS]` names."""
    architecture, _, tag = name.partition(".")
    known, shown = torchvision.models.list_models(), printable(architecture, 80)
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "torchvision.models.list_models() lists all names"
        raise ValueError(f"model: torchvision has no '{shown}'; {hint}")
    entries = torchvision.models.get_model_weights(architecture).__members__
    if (tag or "DEFAULT") not in entries:
        names = ", ".join(entry for entry in entries if entry != "DEFAULT")
        raise ValueError(f"model: torchvision's {architecture} has no weights '{printable(tag, 80)}'; it has {names}")
    weights = entries[tag or "DEFAULT"]
    if not (hasattr(weights.transforms(), "crop_size") and weights.meta.get("categories")):
        raise ValueError(f"model: torchvision's {architecture} does not classify images")
    return architecture, weights


def _pretrained(architecture: str, weights: torchvision.models.WeightsEnum) -> tuple[nn.Module, Path]:
    """Return an architecture with these weights of torchvision, and their file."""
    name, file = f"torchvision:{architecture}", in_torch_cache(weights.url)
    if file is None:
        require_server(weights.url, name)
    try:
        file = file or fetch_from_url(weights.url)
        state = read_content(file)[0]
        # torchvision itself would run code in the file
        with patch.object(type(weights), "get_state_dict", lambda *_, **__: state):
            return torchvision.models.get_model(architecture, weights=weights), file
    except Exception as error:  # the network, the disk and torchvision raise many kinds of errors
        raise WeightsUnavailable(f"model: the weights of {name} could not be loaded: {first_line(error)}") from error


def _fitting(architecture: str, checkpoint: Checkpoint) -> tuple[nn.Module, int]:
    """Build an architecture with the classes, the image size and the weights of a checkpoint.

    Returns:
        The model, and the number of its classes.
    """
    own = shapes_of(lambda: torchvision.models.get_model(architecture))
    state = rename(checkpoint.state, own)
    arguments = {}
    head = next((state[key] for key in HEADS if key in own and key in state), None)
    if head is not None:
        arguments["num_classes"] = len(head)
    grid = None
    if POSITIONS in state and "conv_proj.weight" in state:
        patch = tuple(state["conv_proj.weight"].shape[-2:])
        grid, _ = find_grid(state[POSITIONS].shape[1], patch, checkpoint.sizes, None, [1])
        if grid[0] == grid[1]:
            arguments["image_size"] = patch[0] * grid[0]
    model = torchvision.models.get_model(architecture, **arguments)
    if grid and grid[0] != grid[1]:  # torchvision's model takes squares
        side = model.image_size // model.patch_size
        state[POSITIONS] = resample_abs_pos_embed(state[POSITIONS], [side, side], list(grid), 1)
    fill(model, without_extras(state, own))
    return model, len(head) if head is not None else getattr(model, "num_classes", 1000)
