"""Read scores, features and class counts from models of timm, torchvision and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from daam_vit.state import hooks

Images = Tensor | dict[str, Tensor]
"""`(B, C, H, W)`, or the dict of timm's NaFlex collator."""


class UnsupportedModel(ValueError):
    """The decomposition, or the `rows` asked for, is not defined for this model, or its attention cannot be seen."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, data-parallel training and weight averaging."""
    wrappers = {"OptimizedModule": "_orig_mod"} | dict.fromkeys(
        ("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"
    )
    while (name := wrappers.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def library_of(model: nn.Module) -> str:
    """Return the library that the model's class or a base class comes from: timm, torchvision, transformers or ""."""
    packages = [cls.__module__.split(".")[0] for cls in type(model).__mro__]
    return next((name for name in packages if name in ("timm", "torchvision", "transformers")), "")


def class_names_of(model: nn.Module) -> list[str]:
    """Return `package.Class` of the model's class and its base classes, the nearest first."""
    return [f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]


def scores(model: nn.Module, images: Images) -> Tensor:
    """Run the model and return its class scores (logits), `(B, num_classes)`."""
    output = model(images, return_dict=True) if library_of(model) == "transformers" else model(images)
    return getattr(output, "logits", output)


def features(model: nn.Module, images: Images) -> Tensor:
    """Run the model and return what its classifier reads, `(B, D)`: timm's `pre_logits`.

    For a model of transformers without a classifier this is the class token of `last_hidden_state` (BEiT with mean
    pooling: the `pooler_output`), for a model of no known library its output. The model runs as it is: mode, device and
    gradients are the caller's.

    Raises:
        UnsupportedModel: for models of torchvision other than its ViT, and for models of transformers without tokens.
    """
    model = unwrap(model)
    library = library_of(model)
    if library == "timm":
        return _features_of_timm(model, images)
    head = getattr(model, {"torchvision": "heads", "transformers": "classifier"}.get(library, ""), None)
    if isinstance(head, nn.Module):
        seen: list[Tensor] = []
        head = head[-1] if isinstance(head, nn.Sequential) else head
        with hooks([(head.register_forward_pre_hook, lambda module, args: seen.append(args[0]))]):
            scores(model, images)
        return seen[0]
    if library == "torchvision":
        raise UnsupportedModel(
            f"model: the features of torchvision's {type(model).__name__} are not known; use a VisionTransformer"
        )
    if library == "transformers":
        return _token_of_transformers(model, images)
    return model(images)


def _features_of_timm(model: Any, images: Images) -> Tensor:
    if isinstance(images, dict):
        names = ("patches", "patch_coord", "patch_valid", "attn_mask")
        tokens = model.forward_features(**{name: images[name] for name in names if name in images})
        return model.forward_head(**tokens, pre_logits=True)
    return model.forward_head(model.forward_features(images), pre_logits=True)


def _token_of_transformers(model: Any, images: Images) -> Tensor:
    distilled = hasattr(model, "distillation_classifier")  # its score is the mean of two heads, and so is the feature
    output = (model.base_model if distilled else model)(images, return_dict=True)
    if getattr(model.config, "use_mean_pooling", False):  # BEiT
        return output.pooler_output
    tokens = getattr(output, "last_hidden_state", None)
    if tokens is None:
        raise UnsupportedModel(f"model: {type(model).__name__} has neither a classifier nor a last_hidden_state")
    return tokens[:, :2].mean(1) if distilled else tokens[:, 0]


def num_classes(model: nn.Module) -> int | None:
    """Return the width of the model's classifier: 0 if it has none, None if that is not known."""
    inner: Any = unwrap(model)
    library = library_of(inner)
    if library == "torchvision" and hasattr(inner, "heads"):
        return next((m.out_features for m in reversed(list(inner.heads.modules())) if isinstance(m, nn.Linear)), 0)
    if library == "transformers":
        return inner.config.num_labels if hasattr(inner, "classifier") or hasattr(inner, "cls_classifier") else 0
    return getattr(inner, "num_classes", None)


def reference_parameter(model: nn.Module) -> Tensor:
    """Return a parameter that defines the device and dtype of the input."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def to_model(images: Images, parameter: Tensor) -> Images:
    """Move images to the device of a parameter and, if they are floating point, to its dtype."""
    if isinstance(images, dict):
        return {name: _moved(x, parameter) if isinstance(x, Tensor) else x for name, x in images.items()}
    return _moved(images, parameter)


def _moved(x: Tensor, parameter: Tensor) -> Tensor:
    return x.detach().to(parameter.device, parameter.dtype if x.is_floating_point() else None)


def first_image(images: Images) -> Images:
    """Return a batch of the first image."""
    if isinstance(images, dict):
        return {name: x[:1] if isinstance(x, Tensor) else x for name, x in images.items()}
    return images[:1]
