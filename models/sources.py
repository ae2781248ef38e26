"""Load models from timm, Hugging Face transformers and torchvision; each returns a `Source`."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision.models
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from models.weights import (
    WeightsUnavailable,
    embedded_names,
    fill,
    first_line,
    in_hub_cache,
    in_torch_cache,
    key_mismatches,
    read_checkpoint,
    require_server,
)


@dataclass(frozen=True)
class Source:
    """A model with its weights, and what its library says about its input and its classes."""

    name: str
    model: nn.Module
    num_classes: int
    class_names: list[str] | None
    checkpoint: Path | None
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    """Pillow's name: bilinear, bicubic, ..."""


# ----------------------------------------------------------------------------------------------------------------------
# timm
# ----------------------------------------------------------------------------------------------------------------------


def from_timm(name: str) -> Source:
    """Load a timm model with timm's own weights, from the hub or its cache."""
    config = _timm_config(name)
    if config is None or not config.has_weights:
        raise ValueError(_no_weights(name))
    file = _timm_file(config)
    if file is None:
        require_server(hub.ENDPOINT if config.hf_hub_id else config.url, name)
    try:
        overlay = {"file": str(file), "custom_load": file.suffix == ".npz"} if file else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub, the network, the disk and timm's loader raise many kinds of errors
        raise WeightsUnavailable(f"model: the weights of {name} could not be loaded: {first_line(error)}") from error
    return _timm_source(name, model, None, file or _timm_file(config))


def from_checkpoint(name: str | None, path: Path) -> Source:
    """Load a timm architecture with the weights of a file; without a name, the file names the architecture."""
    state, metadata = read_checkpoint(path)
    architecture = name or metadata.get("architecture")
    if architecture is None:
        raise ValueError(f"model: {path.name} does not name its architecture; pass the name of a model")
    classifier = getattr(_timm_config(architecture), "classifier", None) or "head"
    try:
        arguments = json.loads(metadata.get("model_args", "{}"))
        if "num_classes" not in arguments:
            first = classifier if isinstance(classifier, str) else classifier[0]  # distilled DeiT and CrossViT have two
            weight = state.get(f"{first}.weight")
            arguments["num_classes"] = 0 if weight is None else weight.shape[0]
        model = timm.create_model(architecture, **arguments)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(state, model) if convert else state  # converts other layouts and resizes the position embedding
    except Exception as error:  # weights or metadata belong to another architecture
        raise ValueError(f"checkpoint: {path.name} does not fit {architecture}: {first_line(error)}") from error
    fill(model, state, path, architecture)
    return _timm_source(name or path.stem, model, _named_in(metadata), path)


def _timm_source(name: str, model: nn.Module, class_names: list[str] | None, checkpoint: Path | None) -> Source:
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    if class_names is None and (subset := infer_imagenet_subset(model)):
        class_names = ImageNetInfo(subset).label_descriptions()
    return Source(
        name, model, model.num_classes, class_names, checkpoint,
        tuple(size), config["mean"], config["std"], config["interpolation"],
    )  # fmt: skip


def _timm_file(config) -> Path | None:
    """Return the cached file of these weights, from the hub or torch.hub, without asking the network."""
    if config.hf_hub_id:
        names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return in_hub_cache(config.hf_hub_id, names)
    return in_torch_cache(config.url)


def _timm_config(name: str) -> PretrainedCfg | None:
    """Return timm's configuration of the weights `architecture[.tag]`; None if the architecture has no weights.

    Raises:
        ValueError: if the name is unknown or deprecated, or the architecture has no such tag. The error suggests
            similar names, including embedded ones and those that only lack the prefix `hf:` or `torchvision:`.
    """
    if not timm.is_model(name):
        known = [*timm.list_models(), *embedded_names()]
        near = [f"torchvision:{name}"] if name in torchvision.models.list_models() else []
        near += [f"hf:{name}"] if "/" in name and ":" not in name else []
        near += [other for other in known if other.startswith(name)]
        near += difflib.get_close_matches(name, known, n=3)
        near = list(dict.fromkeys(near))[:3]
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all names"
        raise ValueError(f"model: {name!r} is neither a timm name nor an embedded model; {hint}")
    if not timm.list_models(name.split(".")[0]):  # timm would map it to another name, and warn
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the current names"
        raise ValueError(f"model: {name!r} is a deprecated timm name; {hint}")
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(_no_weights(name)) from None


def _no_weights(name: str) -> str:
    tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
    hint = f"timm has {', '.join(tags[:5])}" if tags else "timm has none for this architecture, so pass a checkpoint"
    return f"model: there are no pretrained weights {name!r}; {hint}"


def _named_in(metadata: dict[str, str]) -> list[str] | None:
    return json.loads(metadata["class_names"]) if "class_names" in metadata else None


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face transformers
# ----------------------------------------------------------------------------------------------------------------------

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights, in the order in which transformers looks for them."""


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
    if name and folder.is_dir():
        name = f"hf:{folder.resolve().name}"
    else:
        folder, name = _hub_folder(name), f"hf:{name}"
    file = _weights_in(folder)
    if file is None:
        raise ValueError(f"model: {name} has no {HF_WEIGHTS[0]} or {HF_WEIGHTS[2]}, or not all of its parts")
    try:
        with _quiet(transformers.utils.logging):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config._attn_implementation = None  # transformers chooses for this machine, not the file
            kind, is_classifier = _class_of(config, transformers)
            options = {"dtype": torch.float32, "weights_only": True, "ignore_mismatched_sizes": True}
            if not is_classifier and "add_pooling_layer" in inspect.signature(kind).parameters:
                options["add_pooling_layer"] = False
            model, loaded = kind.from_pretrained(folder, config=config, output_loading_info=True, **options)
            size, mean, std, interpolation = _image_settings(folder, config, transformers)
    except Exception as error:  # transformers, safetensors and torch raise many kinds of errors
        raise ValueError(f"model: {name} cannot be loaded: {first_line(error)}") from error
    report = key_mismatches(
        {
            "missing": sorted(loaded["missing_keys"]),
            "of another shape": sorted(k if isinstance(k, str) else k[0] for k in loaded["mismatched_keys"]),
        }
    )
    if report:
        raise ValueError(f"model: {name} does not fit {kind.__name__}: {report}")

    num_classes = config.num_labels if is_classifier else 0
    names = [config.id2label.get(i, f"LABEL_{i}") for i in range(num_classes)]
    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(names))
    return Source(name, model, num_classes, None if unnamed else names, file, size, mean, std, interpolation)


def _hub_folder(name: str) -> Path:
    """Return the cached folder of a repository, `organisation/model[@revision]`; download what is missing.

    The cache must also know whether the repository has a preprocessor_config.json, because for most models the
    default mean would be wrong.
    """
    repository, _, revision = name.partition("@")
    unknown = f"model: hf:{name} is neither a folder nor on the hub, where names are like google/vit-base-patch16-224"
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
            f"model: hf:{name} is gated; accept its terms on its page, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(unknown) from error
    except Exception as error:  # the hub, the network and the disk raise many kinds of errors
        raise WeightsUnavailable(f"model: hf:{name} could not be fetched: {first_line(error)}") from error
    if config is None:
        raise ValueError(f"model: hf:{name} has no {CONFIG}, so it is not a transformers model; name another")
    return config.parent


def _fetch(repository: str, revision: str | None) -> Path | None:
    """Download what a model needs; return the cached path of its configuration, None if it has none."""

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=hub.HF_HUB_CACHE))
        except LocalEntryNotFoundError:  # the network failed
            raise
        except EntryNotFoundError:  # the cache remembers this, too
            return None

    config = fetch(CONFIG)
    if config:
        fetch(PROCESSOR)
        weights = next(filter(None, map(fetch, HF_WEIGHTS)), None)
        for part in parts_of(weights) if weights else ():
            fetch(part)
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
        return sorted(set(json.loads(weights.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"model: {weights} is not an index of weights; download the model again") from error


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
    size = (size, size) if isinstance(size, int) else tuple(size)
    normal = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
    interpolation = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR)).name.lower()
    return size, tuple(mean), tuple(std), interpolation


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


# ----------------------------------------------------------------------------------------------------------------------
# torchvision
# ----------------------------------------------------------------------------------------------------------------------


def from_torchvision(name: str, checkpoint: Path | None) -> Source:
    """Load `architecture[.WEIGHTS]` with these weights, torchvision's default weights, or those of a file.

    The transform is that of the named weights, except the size, which a ViT itself defines.
    """
    architecture, weights = _torchvision_weights(name)
    metadata: dict[str, str] = {}
    if checkpoint is None:
        model, checkpoint = _torchvision_pretrained(architecture, weights)
    else:
        state, metadata = read_checkpoint(checkpoint)
        model = _torchvision_for(state, architecture, checkpoint)
        fill(model, state, checkpoint, architecture)

    images, categories = weights.transforms(), list(weights.meta["categories"])
    num_classes = getattr(model, "num_classes", len(categories))
    class_names = _named_in(metadata) or (categories if num_classes == len(categories) else None)
    side = [model.image_size] if hasattr(model, "image_size") else images.crop_size
    return Source(
        f"torchvision:{name}", model, num_classes, class_names, checkpoint,
        (side[0], side[-1]), tuple(images.mean), tuple(images.std), images.interpolation.value,
    )  # fmt: skip


def _torchvision_weights(name: str) -> tuple[str, torchvision.models.WeightsEnum]:
    """Return the architecture and the weights entry that `architecture[.WEIGHTS]` names."""
    architecture, _, tag = name.partition(".")
    known = torchvision.models.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "torchvision.models.list_models() lists all names"
        raise ValueError(f"model: torchvision has no {architecture!r}; {hint}")
    entries = torchvision.models.get_model_weights(architecture).__members__
    if (tag or "DEFAULT") not in entries:
        names = ", ".join(entry for entry in entries if entry != "DEFAULT")
        raise ValueError(f"model: torchvision's {architecture} has no weights {tag!r}; it has {names}")
    weights = entries[tag or "DEFAULT"]
    if not (hasattr(weights.transforms(), "crop_size") and weights.meta.get("categories")):
        raise ValueError(f"model: torchvision's {architecture} does not classify images")
    return architecture, weights


def _torchvision_pretrained(
    architecture: str, weights: torchvision.models.WeightsEnum
) -> tuple[nn.Module, Path | None]:
    name = f"torchvision:{architecture}"
    if in_torch_cache(weights.url) is None:
        require_server(weights.url, name)
    try:
        model = torchvision.models.get_model(architecture, weights=weights)
    except Exception as error:  # the network, the disk and torchvision's loader raise many kinds of errors
        raise WeightsUnavailable(f"model: the weights of {name} could not be loaded: {first_line(error)}") from error
    return model, in_torch_cache(weights.url)


def _torchvision_for(state: dict[str, Tensor], architecture: str, path: Path) -> nn.Module:
    """Build the architecture with the number of classes and the image size of these weights."""
    arguments = {}
    try:
        if "heads.head.weight" in state:
            arguments["num_classes"] = len(state["heads.head.weight"])
        if "encoder.pos_embedding" in state:
            patches = state["encoder.pos_embedding"].shape[1] - 1
            arguments["image_size"] = state["conv_proj.weight"].shape[-1] * math.isqrt(patches)
        return torchvision.models.get_model(architecture, **arguments)
    except Exception as error:  # the weights belong to another architecture
        raise ValueError(f"checkpoint: {path.name} does not fit {architecture}: {first_line(error)}") from error
