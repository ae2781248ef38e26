"""Check targets and importance, and runs against the assumptions of the method.

Every message begins with the argument, says what is wrong, and names the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_vit.attention import AttentionCall
from daam_vit.inputs import Images, UnsupportedModel, check_choice, check_finite, check_tensor
from daam_vit.libraries import check_output
from daam_vit.plan import AttentionLayer, Plan
from daam_vit.text import printable

OTHER_MODEL = "pass a model of timm, torchvision or transformers itself"
"""Way out for a model of no known family."""

VARIANTS = ("paper", "signed", "heads", "relevance")
SCORES = ("logit", "log_odds")
"""Values of `variant` and `score`, see `daam_core.attention_flow`."""

# ----------------------------------------------------------------------------------------------------------------------
# Before the run
# ----------------------------------------------------------------------------------------------------------------------


def check_options(
    target: Any, importance: Any, norm: bool, memory: str, variant: str, shortcuts: bool, score: str | None
) -> str:
    """Raise unless options of `daam_core.attention_flow` are known and fit each other; return the score to explain."""
    check_choice("variant", variant, VARIANTS)
    check_choice("memory", memory, ("auto", "fast", "low"))
    check_choice("norm", norm, (True, False))
    check_choice("shortcuts", shortcuts, (True, False))
    if norm and variant == "relevance":
        raise ValueError("norm: min-max would move the zero of a relevance flow, which is signed; pass norm=False")
    if memory == "low" and not shortcuts:
        raise ValueError("memory: 'low' is a shortcut, and shortcuts are off; pass shortcuts=True")
    if importance is not None and target is not None:
        raise ValueError("target: cannot be explained together with importance; pass one of the two")
    if importance is not None and score is not None:
        raise ValueError("score: cannot be chosen together with importance, which takes its place; pass one of the two")
    if score is None:
        return "log_odds" if variant == "relevance" else "logit"
    check_choice("score", score, SCORES)
    return score


def check_size(images: Tensor, fixed: Sequence[int] | None, stride: Sequence[int] = (1, 1), way_out: str = "") -> None:
    """Raise a ValueError unless `(B, C, H, W)` fits the only size of a model (None: any), or its stride."""
    h, w = images.shape[2:]
    if fixed is not None and (h, w) != tuple(fixed):
        raise ValueError(f"images: the model takes {fixed[0]} x {fixed[1]} pixels, got {h} x {w}; resize them{way_out}")
    if fixed is None and any(side < s or side % s for side, s in zip((h, w), stride)):
        raise ValueError(
            f"images: {h} x {w} pixels are not a multiple of the model's stride, {stride[0]} x {stride[1]}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# What is explained
# ----------------------------------------------------------------------------------------------------------------------

Target = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""A class index, one for each image, or K for each image."""


def class_indices(target: Target | Callable[[Tensor], Target] | None, scores: Tensor) -> Tensor:
    """Return the class indices to explain, `(B,)` or `(B, K)` int64, on the device of the scores `(B, num_classes)`."""
    batch, classes = scores.shape
    if target is None:
        return scores.argmax(1)
    if callable(target):
        with torch.no_grad():
            target = target(scores)
    try:
        if isinstance(target, Tensor):
            check_tensor("target", target)
        indices = torch.as_tensor(target, device=scores.device)
    except (TypeError, ValueError, RuntimeError):
        indices = torch.empty(0)
    integers = not indices.is_floating_point() and indices.dtype not in (torch.bool, torch.complex64, torch.complex128)
    if not integers or not (indices.ndim == 0 or (indices.ndim <= 2 and len(indices) == batch and indices.numel())):
        got = printable(" ".join(repr(target).split()), 80)
        raise ValueError(
            f"target: expected None, a class index, or for each of {batch} images one index (B,) or K of them (B, K), "
            f"got {got}"
        )
    indices = indices.long()
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise ValueError(
            f"target: class {wrong[0].item()} is out of range; the model has {classes} classes, 0..{classes - 1}"
        )
    return indices.expand(batch) if indices.ndim == 0 else indices


def importance_weights(importance: Tensor | Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Return the importance, `(B, D)` or `(B, K, D)`, in the dtype and on the device of the features `(B, D)`."""
    b, d = features.shape
    with torch.no_grad():
        weights = importance(features) if callable(importance) else importance
    expected = f"a tensor ({d},), ({b}, {d}) or ({b}, K, {d}), the width of the features"
    check_tensor("importance", weights, expected)
    shape = tuple(weights.shape)
    if shape not in ((d,), (b, d)) and not (len(shape) == 3 and shape[::2] == (b, d) and shape[1] > 0):
        raise ValueError(f"importance: expected {expected}, got {shape}")
    weights = weights.detach().to(features)
    check_finite("importance", weights, "look for a division by zero")
    return weights.expand_as(features) if weights.ndim == 1 else weights


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def check_forward(model: nn.Module, plan: Plan, calls: Sequence[AttentionCall], output: Tensor, images: Images) -> None:
    """Raise unless every planned layer attended once, between the expected tokens, and the output depends on it."""
    name = type(model).__name__
    seen = [call.layer for call in calls]
    for layer in plan.layers:
        if (times := seen.count(layer)) != 1:
            raise UnsupportedModel(
                f"model: attention was seen {times} times in the {type(layer.module).__name__} of {name}, expected "
                f"once; DAAM sees scaled_dot_product_attention and softmax(Q K^T) V"
            )
    size = len(images["patches"] if isinstance(images, dict) else images)
    for call in calls:
        batch, queries, keys = call.shape
        layer = call.layer
        cells = math.prod(layer.grid) if layer.cells is None else layer.cells.shape[1]
        if batch != size or keys != layer.prefix + cells or queries < (layer.queries or 1):
            raise UnsupportedModel(
                f"model: {name} attends in {batch} images from {queries} to {keys} tokens in its "
                f"{type(layer.module).__name__}; expected {size} images and {layer.prefix} + {cells} tokens"
            )
    check_output(output)
    if not output.requires_grad:
        raise UnsupportedModel(
            f"model: the output of {name} does not depend on its attention; is its forward under torch.no_grad()?"
        )


def completeness_error(a: Tensor, V: Tensor, T: Tensor) -> Tensor:
    """Return the largest |sum_j S_b[j] - T_b| relative to the largest |T_b|, for rows `a` `(B, H, Q, N)` of A."""
    largest = T.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return (a @ V - T).abs().max() / largest


def queries_read(C: Tensor) -> Tensor:
    """`(M,)` bool: the queries to which the gradient dY/dT `(B, H, M, d)` is not zero, those that the score reads."""
    return C.ne(0).any(-1).flatten(0, -2).any(0)


def check_backward(
    model: nn.Module,
    calls: Sequence[AttentionCall],
    maps: Mapping[AttentionLayer, Sequence[Tensor]],
    errors: Mapping[AttentionLayer, Tensor],
    times: int,
) -> None:
    """Raise unless a gradient arrived at every layer, is finite, and semantic maps add up to the attention.

    Args:
        model: for the message.
        calls: every attention of the run.
        maps: one map for each gradient that arrived at a layer.
        errors: `completeness_error` of every layer.
        times: gradients that must have arrived.
    """
    name, dtype = type(model).__name__, calls[0].output.dtype
    if any(len(maps[call.layer]) != times for call in calls):
        raise UnsupportedModel(f"model: the score of {name} does not depend on every attention that was seen")
    if not torch.isfinite(torch.stack([maps[call.layer][-1].sum() for call in calls])).all():
        raise ValueError(f"images: a gradient is not finite; look for an overflow of {dtype}")
    error, allowed = torch.stack([errors[call.layer] for call in calls]), tolerance(dtype)
    if not (error <= allowed).all():
        raise UnsupportedModel(
            f"model: the attention of {name} is not the sum of its semantic maps: they miss it by "
            f"{error.max().item():.2g} of its largest value, and {allowed:.2g} is allowed in {dtype}"
        )


def check_queries(model: nn.Module, read: Tensor | None, last: AttentionLayer, way_out: str) -> None:
    """Raise if the score reads other queries of the last attention than the first ones.

    Args:
        model: for the message.
        read: `queries_read` of the last attention.
        last: its layer.
        way_out: the end of the message.
    """
    if read is not None and read[last.queries :].any():
        besides = "besides the class token" if read[: last.queries].any() else "and not the class token"
        raise UnsupportedModel(
            f"model: the score of {type(model).__name__} reads the patch tokens {besides}; use a model whose head "
            f"reads the class token alone (timm: global_pool='token'){way_out}"
        )


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same value may differ, relative to the largest value."""
    exact = torch.get_float32_matmul_precision() == "highest"  # no TF32
    return max(2e-3 if exact else 1e-2, 30 * torch.finfo(dtype).eps)


def check_patch_order(model: nn.Module, values: Tensor, image: Tensor, grid: tuple[int, int], prefix: int) -> None:
    """Raise unless the values of a patch in the first attention depend most on the pixels of its own cell.

    Args:
        model: for the message.
        values: V `(1, H, N, d)` of the first attention, with its graph.
        image: `(1, C, H, W)`, at which the graph begins.
        grid: `(h, w)` of the patches.
        prefix: keys before the patches.
    """
    cells = math.prod(grid)
    right = values.shape[::2] == (1, prefix + cells)
    for k in {0, 1, grid[1], cells - 2} & set(range(cells)) if right else ():
        size = values[0, :, prefix + k].square().sum()
        gradient = torch.autograd.grad(size, image, retain_graph=True, allow_unused=True)[0]
        heat = 0 * image if gradient is None else gradient.abs()
        right = right and F.adaptive_avg_pool2d(heat.sum(1), grid).argmax().item() == k
    if not right:
        raise UnsupportedModel(
            f"model: the tokens of {type(model).__name__} are not {prefix} and then the patches, row by row; "
            f"{OTHER_MODEL}"
        )
