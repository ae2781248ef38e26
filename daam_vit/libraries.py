"""Read scores, features and class counts from models of timm, torchvision and transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from daam_vit.inputs import Images, UnsupportedModel, check_images, check_model, check_patches, check_weights
from daam_vit.state import hooks


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, data-parallel training and weight averaging.

    Raises:
        TypeError: if it is not a module that can run.
    """
    wrappers = {"OptimizedModule": "_orig_mod"} | dict.fromkeys(
        ("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"
    )
    while (name := wrappers.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    check_model(model)
    return model


def library_of(model: nn.Module) -> str:
    """Return the library that the model's class or a base class comes from: timm, torchvision, transformers or ""."""
    packages = [cls.__module__.split(".")[0] for cls in type(model).__mro__]
    return next((name for name in packages if name in ("timm", "torchvision", "transformers")), "")


def class_names_of(model: nn.Module) -> list[str]:
    """Return `package.Class` of the model's class and its base classes, the nearest first."""
    return [f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]


def check_input(model: nn.Module, images: Images, channels: int | None = None) -> None:
    """Raise unless torch can compute with the weights of a model, and `images` have the form that it takes."""
    check_weights(reference_parameter(model))
    if isinstance(images, dict) and "timm.NaFlexVit" in class_names_of(model):
        check_patches(images)
    else:
        check_images(images, channels)


def check_output(output: Tensor) -> None:
    """Raise unless an output is `(B, D)` and finite."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModel(f"model: expected class scores or features (B, D), got an output {got}")
    if not torch.isfinite(output).all():
        raise ValueError(
            f"images: the model's output is not finite; look for NaN or inf in the images and the weights, "
            f"or for an overflow of {output.dtype}"
        )


def failure(model: nn.Module, error: Exception) -> str:
    """Explain by an error of torch what about a model made its run fail; "" if that is not known."""
    if "meta" in str(error) and any(parameter.is_meta for parameter in model.parameters()):
        return "model: a part of it is on the meta device and has no values; load its weights first"
    if "Inference tensors cannot be saved" in str(error):
        return "model: a part of it was made under torch.inference_mode(), which rules out gradients; make it outside"
    if "modified by an inplace operation" in str(error):
        return "model: it changes q, k, v or another tensor in place that the gradient needs; let it make a copy"
    return ""


def scores(model: nn.Module, images: Images) -> Tensor:
    """Run the model and return its class scores (logits), `(B, num_classes)`."""
    output = _run_transformers(model, images) if library_of(model) == "transformers" else model(images)
    return getattr(output, "logits", output)


def features(model: nn.Module, images: Images) -> Tensor:
    """Run the model and return what its classifier reads, `(B, D)`: timm's `pre_logits`.

    For a model of transformers without a classifier this is the class token of `last_hidden_state`, or the
    `pooler_output` if its embeddings have no class token or BEiT's pooler takes the mean of the patches; never a patch
    token. For a model of no known library it is the output. The model runs as it is: mode, device and gradients are the
    caller's.

    Args:
        model: as for `attention_flow`, of any family.
        images: as for `attention_flow`, on the device and in the dtype of the model.

    Raises:
        UnsupportedModel: a `ValueError`, for models of torchvision other than its ViT, for models of transformers
            without such a token or that read text as well, and if the output is not `(B, D)`.
        ValueError: if `images` have the wrong form, or the features are not finite.
        TypeError: if `model` or `images` has the wrong type.
    """
    model = unwrap(model)
    check_input(model, images)
    try:
        output = pre_logits(model, images)
    except (AssertionError, RuntimeError) as error:
        if misfit := _misfit(model, images, error):
            raise ValueError(misfit) from error
        raise
    check_output(output)
    return output


def _misfit(model: nn.Module, images: Images, error: Exception) -> str:
    """Say which argument made a forward fail, in a line that begins with it; "" if that is not known."""
    name, parameter, channels = type(model).__name__, reference_parameter(model), input_channels(model)
    if isinstance(error, AssertionError):  # timm and torchvision assert the size of the images
        return f"images: they do not fit {name}: {' '.join(str(error).split())}"
    if isinstance(error, torch.OutOfMemoryError):
        return ""
    if reason := failure(model, error):
        return reason
    if isinstance(images, Tensor) and images.shape[1] != channels:
        return f"images: the model takes {channels} channels, got {images.shape[1]}"
    if isinstance(images, Tensor) and (images.dtype, images.device) != (parameter.dtype, parameter.device):
        return (
            f"images: expected {parameter.dtype} on {parameter.device} as the weights of {name}, got {images.dtype} on "
            f"{images.device}; move them there"
        )
    return ""


def pre_logits(model: nn.Module, images: Images) -> Tensor:
    """Return the features of a model without wrappers, as `features` does, but without checks."""
    library = library_of(model)
    if library == "timm":
        return _features_of_timm(model, images)
    head = getattr(model, {"torchvision": "heads", "transformers": "classifier"}.get(library, ""), None)
    if isinstance(head, nn.Module):
        seen: list[Tensor] = []
        head = head[-1] if isinstance(head, nn.Sequential) else head
        with hooks([(head.register_forward_pre_hook, lambda module, args: seen.append(args[0]))]):
            scores(model, images)
        if not seen:
            raise UnsupportedModel(
                f"model: {type(model).__name__} does not use its classifier, so its features are unknown"
            )
        return seen[0]
    if library == "torchvision":
        raise UnsupportedModel(
            f"model: the features of torchvision's {type(model).__name__} are not known; use a VisionTransformer"
        )
    if library == "transformers":
        return _token_of_transformers(model, images)
    return model(images)


def _features_of_timm(model: Any, images: Images) -> Tensor:
    if not hasattr(model, "forward_head"):
        raise UnsupportedModel(
            f"model: timm's {type(model).__name__} has no features before a head; pass a whole model"
        )
    if isinstance(images, dict):
        names = ("patches", "patch_coord", "patch_valid", "attn_mask")
        tokens = model.forward_features(**{name: images[name] for name in names if name in images})
        return model.forward_head(**tokens, pre_logits=True)
    return model.forward_head(model.forward_features(images), pre_logits=True)


def _run_transformers(model: Any, images: Images) -> Any:
    if next(iter(inspect.signature(model.forward).parameters), "") == "input_ids":
        part = "its .vision_model" if hasattr(model, "vision_model") else "a model that reads images alone"
        raise UnsupportedModel(f"model: {type(model).__name__} reads text; pass {part}")
    return model(images, return_dict=True)


def _token_of_transformers(model: Any, images: Images) -> Tensor:
    distilled = hasattr(model, "distillation_classifier")  # its score is the mean of two heads, and so is the feature
    output = _run_transformers(model.base_model if distilled else model, images)
    tokens, pooled = getattr(output, "last_hidden_state", None), getattr(output, "pooler_output", None)
    if tokens is not None and _has_class_token(model):
        if pooled is not None and getattr(model.config, "use_mean_pooling", False):  # BEiT
            return pooled
        return tokens[:, :2].mean(1) if distilled else tokens[:, 0]
    if pooled is None or "transformers.IJepaModel" in class_names_of(model):  # whose pooler reads the first patch
        what = "a class token nor a pooler that reads all patches"
        lacks = "a classifier nor a last_hidden_state" if tokens is None else what
        raise UnsupportedModel(
            f"model: {type(model).__name__} has neither {lacks}; wrap it in a module that returns features (B, D)"
        )
    return pooled


def _has_class_token(model: nn.Module) -> bool:
    """Return whether the embeddings of a model of transformers put a class token before the patches."""
    ends = ("cls_token", "class_embedding")
    return any("embeddings." in name and name.endswith(ends) for name, _ in model.named_parameters())


def num_classes(model: nn.Module) -> int | None:
    """Return the width of the model's classifier: 0 if it has none, None if that is not known."""
    inner: Any = unwrap(model)
    library = library_of(inner)
    if library == "torchvision" and hasattr(inner, "heads"):
        return next((m.out_features for m in reversed(list(inner.heads.modules())) if isinstance(m, nn.Linear)), 0)
    if library == "transformers":
        return inner.config.num_labels if hasattr(inner, "classifier") or hasattr(inner, "cls_classifier") else 0
    return getattr(inner, "num_classes", None)


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of the images: that of the first convolution, or 3."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first else getattr(model, "in_chans", 3)


def reference_parameter(model: nn.Module) -> Tensor:
    """Return a parameter that defines the device and dtype of the input."""
    return next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters(), torch.empty(0)))


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
