"""Load models of Hugging Face transformers, from a folder or from the hub."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from torch import Tensor

from daam_vit.text import printable
from models.checkpoints import read_content
from models.layouts import INSIDE, find_weights
from models.schema import check_schema, parse_json
from models.sources import Source
from models.weights import (
    WeightsUnavailable,
    fetch_from_hub,
    first_line,
    in_hub_cache,
    key_mismatches,
    require_server,
)

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights, in the order in which transformers looks for them."""
INDEX = {"weight_map": {str: str}}
"""Schema of the index of sharded weights."""
SETTINGS = {"size": [int], "image_mean": [float], "image_std": [float]}
"""Schema of the settings of a preprocessor."""
LARGEST = {
    "num_hidden_layers": 256, "hidden_size": 16_384, "intermediate_size": 131_072, "image_size": 4096,
    "patch_size": 4096, "num_channels": 1024, "num_attention_heads": 1024, "num_labels": 1_000_000, "depths": 256,
    "hidden_sizes": 16_384, "embed_dim": 16_384, "num_register_tokens": 1024,
}  # fmt: skip
"""Largest values of numbers, and of numbers in lists, in a configuration; the smallest is 1, or 0 for some."""
NUMBER = re.compile(r"\.\d+\.")
"""The number of a layer in the name of a weight."""
MAX_SIDE = 4096
"""Largest side of the images that a preprocessor may ask for, in pixels."""


def from_transformers(name: str) -> Source:
    """Load a transformers model from a folder written by `save_pretrained`, or `organisation/model[@revision]`.

    The model is the image classifier that its configuration names, or the backbone without a pooling layer. All of its
    weights must be in the checkpoint, and no code of a repository is run. Without a preprocessor_config.json the model
    gets the defaults of ViT: the image size of its configuration, mean and std 0.5.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'model: hf:{name} needs the package transformers; pip install -e ".[huggingface]"') from error

    folder = Path(os.path.expanduser(name))  # unchanged if there is no such user
    if name and os.path.isdir(folder):
        name = f"hf:{folder.resolve().name}"
    else:
        folder, name = _hub_folder(name), f"hf:{name}"
    shown, file = printable(name, 80), _weights_in(folder)
    if file is None:
        raise ValueError(f"model: {shown} has no {HF_WEIGHTS[0]} or {HF_WEIGHTS[2]}, or not all of its parts")
    try:
        with _quiet(transformers.utils.logging):
            _check_config(folder)
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config._attn_implementation = None  # transformers chooses for this machine, not the file
            kind, is_classifier = _class_of(config, transformers)
            options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "state_dict": _read_weights(file)}
            if not is_classifier and "add_pooling_layer" in inspect.signature(kind).parameters:
                options["add_pooling_layer"] = False
            model, loaded = kind.from_pretrained(None, config=config, output_loading_info=True, **options)
            size, mean, std, interpolation = _image_settings(folder, config, transformers)
            num_classes = config.num_labels if is_classifier else 0
            names = [printable(str(config.id2label.get(i, f"LABEL_{i}"))) for i in range(num_classes)]
    except Exception as error:  # transformers, safetensors and torch raise many kinds of errors
        raise ValueError(f"model: {shown} cannot be loaded: {first_line(error)}") from error
    report = key_mismatches(
        {
            "missing": sorted(loaded["missing_keys"]),
            "of another shape": sorted(k if isinstance(k, str) else k[0] for k in loaded["mismatched_keys"]),
            "without a place": _without_a_place(loaded["unexpected_keys"], model.state_dict().keys()),
        }
    )
    if report:
        raise ValueError(f"model: {shown} does not fit {kind.__name__}: {report}")

    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(names))
    return Source(name, model, num_classes, None if unnamed else names, file, size, mean, std, interpolation)


def _hub_folder(name: str) -> Path:
    """Return the cached folder of a repository, `organisation/model[@revision]`; download what is missing.

    The cache must also know whether the repository has a preprocessor_config.json, because for most models the
    default mean would be wrong.
    """
    repository, _, revision = name.partition("@")
    shown = printable(f"hf:{name}", 80)
    unknown = f"model: {shown} is neither a folder nor on the hub, where names are like google/vit-base-patch16-224"
    try:
        config = in_hub_cache(repository, [CONFIG], revision or None)
        processor = try_to_load_from_cache(repository, PROCESSOR, hub.HF_HUB_CACHE, revision or None)
    except HFValidationError as error:
        raise ValueError(unknown) from error
    if config and processor is not None and _weights_in(config.parent):
        return config.parent

    require_server(hub.ENDPOINT, f"hf:{name}", "a folder as hf:PATH (none has this name)")
    try:
        config = _fetch(repository, revision or None)
    except GatedRepoError as error:
        raise WeightsUnavailable(
            f"model: {shown} is gated; accept its terms on its page, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(unknown) from error
    except Exception as error:  # the hub, the network and the disk raise many kinds of errors
        raise WeightsUnavailable(f"model: {shown} could not be fetched: {first_line(error)}") from error
    if config is None:
        raise ValueError(f"model: {shown} has no {CONFIG}, so it is not a transformers model; name another")
    return config.parent


def _fetch(repository: str, revision: str | None) -> Path | None:
    """Download what a model needs; return the cached path of its configuration, None if it has none."""
    config = fetch_from_hub(repository, [CONFIG], revision)
    if config:
        fetch_from_hub(repository, [PROCESSOR], revision)
        weights = fetch_from_hub(repository, HF_WEIGHTS, revision)
        for part in parts_of(weights) if weights else ():
            fetch_from_hub(repository, [part], revision)
    return config


def _weights_in(folder: Path) -> Path | None:
    """Return the weights in a folder, or the index of their parts if all of them exist; else None."""
    files = (folder / name for name in HF_WEIGHTS)
    return next((f for f in files if f.is_file() and all((folder / part).is_file() for part in parts_of(f))), None)


def parts_of(weights: Path) -> list[str]:
    """Return the files that an index of sharded weights lists; `[]` for any other file."""
    if weights.suffix != ".json":
        return []
    try:
        parts = sorted(set(parse_json(weights.read_bytes(), INDEX, "it", ("weight_map",))["weight_map"].values()))
        if any(part != os.path.basename(part) for part in parts):
            raise ValueError("it names files of other folders")
    except ValueError as error:
        problem = f"{printable(str(weights), 200)} is not an index of weights ({first_line(error)})"
        raise ValueError(f"model: {problem}; download the model again") from error
    return parts


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Return the weights of a file, or of all parts that an index lists."""
    weights: dict[str, Tensor] = {}
    for part in [file.with_name(part) for part in parts_of(file)] or [file]:
        content = find_weights(read_content(part)[0])
        if content is None:
            raise ValueError(f"{printable(part.name, 80)} has no state dict")
        weights |= {INSIDE.sub("", key).removeprefix("module."): value for key, value in content.items()}
    return weights


def _without_a_place(unexpected: Iterable[str], own: Iterable[str]) -> list[str]:
    """Return the unexpected weights that change the result: further layers, and biases of layers that the model has.

    Other unexpected weights are heads, decoders and mask tokens, which a backbone does not need.
    """
    known = {NUMBER.sub(".N.", key) for key in own}
    kinds = {key: NUMBER.sub(".N.", key) for key in unexpected}
    return sorted(
        key
        for key, kind in kinds.items()
        if kind in known or (kind.endswith(".bias") and kind.removesuffix("bias") + "weight" in known)
    )


def _check_config(folder: Path) -> None:
    """Raise a ValueError for a configuration whose model would have no layers, or would not fit into any memory."""
    config = parse_json((folder / CONFIG).read_bytes(), {}, CONFIG)
    for settings in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for name, most in LARGEST.items():
            value, least = settings.get(name), 0 if name in ("num_labels", "num_register_tokens") else 1
            numbers = value if isinstance(value, list) else [value]
            if not all(least <= number <= most for number in numbers if isinstance(number, int)):
                raise ValueError(f"{CONFIG}: {name} should be from {least} to {most}")


def _class_of(config, transformers) -> tuple[type, bool]:
    """Return the class to load, and whether it is an image classifier."""
    if config.model_type == "timm_wrapper":
        raise ValueError(f"it is a timm model; name it {config.architecture}")
    for architecture in config.architectures or ():
        if "ForImageClassification" in architecture:
            if not hasattr(transformers, architecture):
                raise ValueError(f"transformers {transformers.__version__} has no {architecture}")
            return getattr(transformers, architecture), True
    backbone = transformers.MODEL_MAPPING.get(type(config), None)
    if backbone is None:
        raise ValueError(f"transformers {transformers.__version__} has no backbone of type {config.model_type}")
    return backbone, False


def _image_settings(folder: Path, config, transformers) -> tuple:
    """Return size `(H, W)`, mean, std and interpolation of the images that a model was trained on."""
    if (folder / PROCESSOR).is_file():
        settings = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_dict()
    else:
        settings = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    size = settings.get("crop_size" if settings.get("do_center_crop") else "size")
    size = size or getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if size.get("height") else size.get("shortest_edge")
    if not size:
        raise ValueError(f"neither its {PROCESSOR} nor its {CONFIG} says the image size")
    size = [size, size] if isinstance(size, int) else list(size)
    normal = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
    check_schema({"size": size, "image_mean": list(mean), "image_std": list(std)}, SETTINGS, PROCESSOR)
    if len(size) != 2 or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"{PROCESSOR}: size should be two sides from 1 to {MAX_SIDE}, got {printable(str(size), 80)}")
    if len(mean) not in (1, 3) or len(std) not in (1, 3) or min(std) <= 0:
        raise ValueError(f"{PROCESSOR}: image_mean and image_std should be three numbers, image_std above 0")
    interpolation = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR)).name.lower()
    return tuple(size), tuple(mean), tuple(std), interpolation


@contextmanager
def _quiet(logging) -> Iterator[None]:
    """Silence the reports and the progress bar of transformers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
