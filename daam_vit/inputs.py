"""Check models, images and tensors that callers pass in: types, kinds, shapes and ranges.

Every message is one line that begins with the argument, says what is wrong, and names the way out. A wrong Python type
is a TypeError, a wrong value a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from daam_vit.arguments import check_integer, check_number
from daam_vit.text import printable

Images = Tensor | dict[str, Tensor]
"""`(B, C, H, W)`, or the dict of timm's NaFlex collator."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 1_000_000
"""Limits of the temperature of votes: exp(1 / 0.02) is still far below the largest float32."""
MAX_CLASSES = 1_000_000
"""Number of classes; a label beyond it is treated as a mistake."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Floating point types in which torch computes; others only store."""

UNUSUAL = {
    "nested": "pad it to one shape",
    "quantized": "pass its dequantize()",
    "complex": "pass real numbers",
    "meta": "it has no values, load them first",
}
"""Kinds of tensors that cannot be used, and what to pass instead."""


class UnsupportedModel(ValueError):
    """The decomposition, or the `rows` asked for, is not defined for this model, or its attention cannot be seen."""


# ----------------------------------------------------------------------------------------------------------------------
# Any argument
# ----------------------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError unless `value` is one of the choices."""
    if getattr(value, "ndim", 0) or value not in choices:  # an array compares every element
        expected = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise ValueError(f"{name}: expected {expected}, got {printable(repr(value), 80)}")


def check_tensor(name: str, value: object, expected: str = "a tensor") -> None:
    """Raise unless the argument `name` is a dense tensor of real numbers that holds values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if kind := unusual_kind(value):
        way_out = UNUSUAL.get(kind, "pass its to_dense()")
        raise ValueError(f"{name}: expected {expected}, got one that is {kind}; {way_out}")


def unusual_kind(tensor: Tensor) -> str:
    """Return why a tensor is not dense, real and filled with values: a key of `UNUSUAL`, or its layout; else ""."""
    return (
        "nested" if tensor.is_nested
        else str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided
        else "quantized" if tensor.is_quantized
        else "complex" if tensor.is_complex()
        else "meta" if tensor.is_meta
        else ""
    )  # fmt: skip


def check_shapes(pattern: str, **tensors: Tensor) -> None:
    """Raise unless each tensor has the shape that the pattern names, such as "B H Q N, B H N d", and is not empty.

    A letter stands for the same size in all of them.
    """
    sizes: dict[str, int] = {}
    for (name, tensor), letters in zip(tensors.items(), pattern.split(", "), strict=True):
        dims = letters.split()
        known = ", ".join(f"{d} = {sizes[d]}" for d in dims if d in sizes)
        expected = f"a tensor ({', '.join(dims)}{',' * (len(dims) == 1)}){' with ' * bool(known)}{known}"
        check_tensor(name, tensor, expected)
        shape = tuple(tensor.shape)
        if len(shape) != len(dims) or any(n == 0 or sizes.setdefault(d, n) != n for d, n in zip(dims, shape)):
            raise ValueError(f"{name}: expected {expected}, not empty, got {shape}")


def check_finite(name: str, tensor: Tensor, way_out: str) -> None:
    """Raise a ValueError unless a tensor has finite floating point values."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating point values, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: has NaN or infinite values; {way_out}")


# ----------------------------------------------------------------------------------------------------------------------
# Model and images
# ----------------------------------------------------------------------------------------------------------------------


def check_model(model: object) -> None:
    """Raise a TypeError unless a model is a module that can run."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; build it first, as timm.create_model does"
        )
    if getattr(type(model), "forward", None) is nn.Module.forward and "forward" not in vars(model):
        raise TypeError(f"model: a {type(model).__name__} has no forward; pass the whole model")


def check_weights(parameter: Tensor) -> None:
    """Raise a ValueError unless a parameter, which stands for all, has values of a type in which torch computes."""
    if parameter.is_meta:
        raise ValueError("model: its weights are on the meta device and have no values; load them first")
    if parameter.dtype not in FLOATS:
        raise ValueError(f"model: its weights are of {parameter.dtype}; convert it to floating point, model.float()")


def check_images(images: Any, channels: int | None = None) -> None:
    """Raise unless `images` are `(B, C, H, W)` of floating point, with `channels` channels (None: any number)."""
    check_tensor("images", images, "a tensor (B, C, H, W) with B > 0")
    if images.ndim != 4 or images.numel() == 0:
        shape = tuple(images.shape)
        raise ValueError(f"images: expected a tensor (B, C, H, W) with B > 0 and no empty side, got {shape}")
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected normalised floating point values, got {images.dtype}; apply the model's transform"
        )
    if channels is not None and images.shape[1] != channels:
        raise ValueError(f"images: the model takes {channels} channels, got {images.shape[1]}")


def check_patches(images: dict[str, Tensor]) -> None:
    """Raise unless `images` is a dict as timm's NaFlex collator makes it."""
    names = ("patches", "patch_coord", "patch_valid")
    shapes = {name: tuple(images[name].shape[:2]) for name in names if isinstance(images.get(name), Tensor)}
    for name in names:
        if name not in shapes or shapes[name] != shapes["patches"] or len(shapes[name]) != 2:
            raise ValueError(
                f"images: NaFlexVit takes a dict of the tensors patches (B, N, P * P * 3), patch_coord (B, N, 2) and "
                f"patch_valid (B, N); {name} is missing or has another shape"
            )
        check_tensor(f"images: {name}", images[name])
    patches, places, valid = (images[name] for name in names)
    if patches.numel() == 0 or not patches.is_floating_point():
        what = f"{tuple(patches.shape)} of {patches.dtype}"
        raise ValueError(f"images: expected patches (B, N, P * P * 3) of normalised floating point values, got {what}")
    if places.shape[2:] != (2,) or places.is_floating_point() or places.min() < 0 or valid.dtype != torch.bool:
        raise ValueError(
            "images: expected patch_coord (B, N, 2), the row and column of each patch from 0 on, and patch_valid of "
            "torch.bool; take both from timm's NaFlex collator"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The equations
# ----------------------------------------------------------------------------------------------------------------------


def check_weighting(a: Tensor, V: Tensor, C: Tensor, w: object) -> None:
    """Raise unless attention rows, values and coefficients of one block fit each other, and `w` can be called."""
    check_shapes("B H Q N, B H N d, B H Q d", a=a, V=V, C=C)
    if not callable(w):
        raise TypeError(f"w: expected a function of a tensor, such as torch.relu, got {type(w).__name__}")
    if not a.dtype == V.dtype == C.dtype or not a.is_floating_point():
        raise ValueError(f"a: expected one floating point type for a, V and C, got {a.dtype}, {V.dtype} and {C.dtype}")


def check_block_maps(block_maps: Tensor, valid: Tensor | None) -> None:
    """Raise unless maps are `(..., L, h, w)`, and the cells that count, if given, `(B, h, w)`."""
    check_tensor("block_maps", block_maps, "a tensor (..., L, h, w)")
    shape = tuple(block_maps.shape)
    if len(shape) < 3 or 0 in shape:
        raise ValueError(f"block_maps: expected a tensor (..., L, h, w), not empty, got {shape}")
    if not torch.isfinite(block_maps).all():
        raise ValueError("block_maps: has NaN or infinite values; look for an overflow")
    if valid is not None:
        check_tensor("valid", valid, "a tensor (B, h, w)")
        if len(shape) < 4 or tuple(valid.shape) != (shape[0], *shape[-2:]) or valid.dtype != torch.bool:
            raise ValueError(
                f"valid: expected a tensor (B, h, w) of torch.bool for block_maps (B, ..., L, h, w) {shape}, got "
                f"{tuple(valid.shape)} of {valid.dtype}"
            )


def check_indices(name: str, values: Tensor, count: int, what: str) -> Tensor:
    """Return integers as int64; raise a ValueError unless they are integers from 0 to `count` - 1."""
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {values.dtype}; convert them, {name}.long()")
    indices = values.long()
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected {what} 0 to {count - 1}, got {low if low < 0 else high}")
    return indices


def check_directions(features: Tensor) -> None:
    """Raise a ValueError unless every feature of `(B, D)` is finite and its norm is neither zero nor infinite."""
    check_finite("features", features, "look for NaN in the images and the weights")
    lengths = torch.linalg.vector_norm(features.float(), dim=1)  # (B,)
    wrong = ((lengths > 1e-12) & lengths.isfinite()).logical_not().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"features: row {wrong[0]} has the length {lengths[wrong[0]]:.3g}, so no direction; "
            "look for an underflow or an overflow"
        )


def check_bank(features: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Raise unless features `(B, D)` fit a bank `(M, D)` of normalised rows; return its labels `(M,)` as int64."""
    check_shapes("B D, M D, M", features=features, bank=bank, labels=labels)
    check_integer("k", k, 1, len(bank))
    check_directions(features)
    if bank.dtype not in FLOATS:
        raise ValueError(f"bank: expected floating point, got {bank.dtype}; convert it, bank.float()")
    lengths = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float32)  # (M,)
    if not ((lengths - 1).abs() < 0.01).all():
        raise ValueError("bank: expected rows of length 1; normalise them, torch.nn.functional.normalize(bank, dim=1)")
    return check_indices("labels", labels, MAX_CLASSES, "classes")


def check_votes(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Raise unless cosines and labels, both `(B, k)`, can vote; return the labels as int64."""
    check_shapes("B k, B k", similarities=similarities, labels=labels)
    check_integer("num_classes", num_classes, 1, MAX_CLASSES)
    check_number("temperature", temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
    check_finite("similarities", similarities, "look for NaN in the features and the bank")
    if similarities.dtype == torch.float16:
        raise ValueError("similarities: exp(cosine / temperature) overflows torch.float16; pass similarities.float()")
    if similarities.abs().max() > 1.01:
        raise ValueError("similarities: expected cosines from -1 to 1; normalise the features and the bank")
    return check_indices("labels", labels, num_classes, "classes")


def check_scores(scores: Tensor, classes: Tensor) -> Tensor:
    """Raise unless classes, `(B,)` or `(B, K)`, are some of those of scores `(B, C)`; return them as int64."""
    several = isinstance(classes, Tensor) and classes.ndim == 2
    check_shapes("B C, B K" if several else "B C, B", scores=scores, classes=classes)
    return check_indices("classes", classes, scores.shape[1], "classes")


def check_neighbours(f: Tensor, neighbours: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the neighbours `(n, D)` of each feature of `f` `(B, D)`; raise unless they fit, one group for each."""
    check_shapes("B D", f=f)
    check_finite("f", f, "look for NaN in the images and the weights")
    if not isinstance(neighbours, Iterable):
        raise TypeError(f"neighbours: expected a tensor (n, D) for each feature, got {type(neighbours).__name__}")
    groups = 0
    for groups, rows in enumerate(neighbours, 1):
        if groups > len(f):
            break
        check_shapes("B D, n D", f=f, neighbours=rows)
        check_finite("neighbours", rows, "build the bank again")
        yield rows
    if groups != len(f):
        got = "more" if groups > len(f) else groups
        raise ValueError(f"neighbours: expected a tensor (n, D) for each of {len(f)} features, got {got}")
