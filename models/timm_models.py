"""Load models of timm, with timm's own weights or with those of a file."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import timm
import torchvision.models
from huggingface_hub import constants as hub
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from daam_vit.text import printable
from models.checkpoints import Checkpoint, read_checkpoint, read_content
from models.layouts import rename, without_extras
from models.metadata import class_names, model_args
from models.positions import fit_position_embedding
from models.sources import Source
from models.weights import (
    WeightsUnavailable,
    embedded_names,
    fetch_from_hub,
    fetch_from_url,
    fill,
    first_line,
    in_hub_cache,
    in_torch_cache,
    require_server,
    shapes_of,
)

SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""Pickled files, and the safetensors file that is preferred if the repository has both."""
MAX_SURPLUS = 50_000_000
"""Weights that a model may have beyond four times those of its checkpoint: position embeddings of larger images."""


def from_timm(name: str) -> Source:
    """Load a timm model with timm's own weights, from the hub or its cache."""
    config = _config_of(name)
    if config is None or not config.has_weights:
        raise ValueError(_no_weights(name))
    file = _cached(config)
    if file is None:
        require_server(hub.ENDPOINT if config.hf_hub_id else config.url, name)
    try:
        file = file or _fetch(config)
        if file is None:
            raise ValueError("the hub does not have them")
        if file.suffix == ".npz":  # timm reads it without pickle
            overlay = {"file": str(file), "custom_load": True}
        else:
            overlay = {"state_dict": read_content(file)[0]}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub, the network, the disk and timm raise many kinds of errors
        raise WeightsUnavailable(f"model: the weights of {name} could not be loaded: {first_line(error)}") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of all weights
    subset = infer_imagenet_subset(model)
    names = ImageNetInfo(subset).label_descriptions() if subset else None
    return _source(name, model, names, file)


def from_checkpoint(name: str | None, path: Path) -> Source:
    """Load a timm architecture with the weights of a file; without a name, the file names the architecture."""
    checkpoint = read_checkpoint(path)
    architecture = name or checkpoint.metadata.get("architecture")
    if architecture is None:
        raise ValueError(f"model: {checkpoint.name} does not name its architecture; pass the name of a model")
    config = _config_of(architecture)
    arguments = model_args(checkpoint)
    try:
        model = _fitting(architecture, arguments, config, checkpoint)
    except Exception as error:  # weights or metadata belong to another architecture
        raise ValueError(f"checkpoint: {checkpoint.name} does not fit {architecture}: {first_line(error)}") from error
    return _source(name or path.stem, model, class_names(checkpoint, model.num_classes), path)


def _fitting(
    architecture: str, arguments: dict[str, Any], config: PretrainedCfg | None, checkpoint: Checkpoint
) -> nn.Module:
    """Build an architecture with the number of classes and the weights of a checkpoint."""
    as_named = arguments.keys() <= {"num_classes", "img_size"}  # other arguments may make a model of any size
    own = shapes_of(lambda: timm.create_model(architecture, **arguments), may_allocate=as_named)
    surplus = sum(map(math.prod, own.values())) - 4 * sum(value.numel() for value in checkpoint.state.values())
    if surplus > MAX_SURPLUS:
        raise ValueError("it has only a small part of the weights")
    state = rename(checkpoint.state, own)
    if "num_classes" not in arguments:
        classifier = getattr(config, "classifier", None) or "head"
        first = classifier if isinstance(classifier, str) else classifier[0]  # distilled DeiT and CrossViT have two
        names = (f"{first}.weight", f"{first.partition('.')[0]}.weight")  # Swin's authors call timm's head.fc head
        weight = next((state[name] for name in names if name in state), None)
        arguments["num_classes"] = len(weight) if weight is not None and weight.ndim else 0
    norms = [{"norm.weight", "fc_norm.weight"} & names.keys() for names in (state, own)]
    if len(norms[0]) == len(norms[1]) == 1 and norms[0] != norms[1]:
        pool = "avg" if "fc_norm.weight" in state else "token"
        raise ValueError(
            "it was trained with another pooling than the architecture has; save it as safetensors with the pooling in "
            f'the metadata: {{"model_args": \'{{"global_pool": "{pool}"}}\'}}'
        )
    model = timm.create_model(architecture, **arguments)
    fit_position_embedding(state, model, checkpoint.sizes)
    fill(model, without_extras(_converted(state, model), own))
    return model


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights of other layouts, or with patches of another size, by timm's own function."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    # names of DeiT III's authors
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    try:
        return convert(dict(state), model, **options)
    except Exception:  # weights of strange shapes, which `fill` names
        return state


def _source(name: str, model: nn.Module, names: list[str] | None, checkpoint: Path | None) -> Source:
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    return Source(
        name, model, model.num_classes, names, checkpoint,
        tuple(size), config["mean"], config["std"], config["interpolation"],
    )  # fmt: skip


def _files_on_hub(config: PretrainedCfg) -> tuple[str, str | None, list[str]]:
    """Return the repository, its revision and the files to look for; the first that exists is used."""
    repository, _, revision = config.hf_hub_id.partition("@")
    name = config.hf_hub_filename or "pytorch_model.bin"
    return repository, revision or None, [SAFE_NAMES[name], name] if name in SAFE_NAMES else [name]


def _cached(config: PretrainedCfg) -> Path | None:
    """Return the cached file of these weights, from the hub or torch.hub, without asking the network."""
    if config.hf_hub_id:
        repository, revision, names = _files_on_hub(config)
        return in_hub_cache(repository, names, revision)
    return in_torch_cache(config.url)


def _fetch(config: PretrainedCfg) -> Path | None:
    """Download the file of these weights; return None if the hub does not have it."""
    if config.hf_hub_id:
        repository, revision, names = _files_on_hub(config)
        return fetch_from_hub(repository, names, revision)
    return fetch_from_url(config.url)


def _config_of(name: str) -> PretrainedCfg | None:
    """Return timm's configuration of the weights `architecture[.tag]`; None if the architecture has no weights.

    Raises:
        ValueError: if the name is unknown or deprecated, or the architecture has no such tag. The error suggests
            similar names, including embedded ones and those that only lack the prefix `hf:` or `torchvision:`.
    """
    shown = printable(name, 80)
    if not timm.is_model(name):
        last = name.rpartition("/")[2]  # of a name with a prefix, such as hf-hub:timm/NAME
        known = [*timm.list_models(), *embedded_names()]
        near = [f"torchvision:{name}"] if name in torchvision.models.list_models() else []
        near += [f"hf:{shown}"] if "/" in name and ":" not in name else []
        near += [last] if last != name and timm.is_model(last) else []
        near += [other for other in known if other.startswith(name)]
        near += difflib.get_close_matches(name, known, n=3)
        near = list(dict.fromkeys(near))[:3]
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all names"
        raise ValueError(f"model: '{shown}' is neither a timm name nor an embedded model; {hint}")
    if not timm.list_models(name.split(".")[0]):  # timm would map it to another name, and warn
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the current names"
        raise ValueError(f"model: '{shown}' is a deprecated timm name; {hint}")
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(_no_weights(name)) from None


def _no_weights(name: str) -> str:
    tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
    hint = f"timm has {', '.join(tags[:5])}" if tags else "timm has none for this architecture, so pass a checkpoint"
    return f"model: there are no pretrained weights '{printable(name, 80)}'; {hint}"
