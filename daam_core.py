"""Dynamic Accumulated Attention Map (DAAM): how a Vision Transformer reaches its decision, block by block.

Reference: Liao, Gao, Zhang, "Dynamic accumulated attention map for interpreting evolution of decision-making in vision
transformer", Pattern Recognition 165 (2025) 111607, https://arxiv.org/abs/2503.14640.

    flow = attention_flow(model, images)                # images (B, 3, H, W), as the model wants them
    heat = render(flow.accumulated[0])                  # (L, h, w) uint8
    save_gif(overlay(photo, heat), "flow.gif")          # one frame a block

For every block b, with the class token as the only query (symbols as in timm: B images, L blocks, H heads, N tokens of
which the first P are prefix tokens, head width d, C = H * d, patch grid h x w):

    a_b = softmax(q_cls K^T / sqrt(d))          (B, H, N)     attention row of the class token
    S_b[j] = a_b[j] V_b[j]                      (B, N, C)     semantic spatial map; its sum over j is
    T_b = sum_j S_b[j]                          (B, C)        output of the attention at the class token, before
                                                              any norm, gate and projection
    C_b = dY / dT_b                             (B, C)        importance coefficients
    L_b[j] = ReLU(sum_c w(C_b)_c S_b[j, c])     (B, h, w)     map of the block, over the patch tokens
    A_b = L_1 + ... + L_b                       (B, h, w)     the attention flow

Y is the class score and w = ReLU; or, for a model without classifier, the gradient pushed back from the feature is a
vector of dimension-wise importance and w = identity. (`variant` offers two others, which the paper has not.)

How it is computed: a function of the model's family says in which modules the class token attends to the patches (the
sites). While the model runs, a `TorchFunctionMode` sees the attention inside them: q, k and v of the fused
`scaled_dot_product_attention` (after every norm, bias and rotation), or the matrix that multiplies v where a model
computes it in the open; and T for all tokens. One backward, for activations only, brings dY/dT_b; L_b is computed the
moment it arrives, from q, k and v, which the graph of the blocks keeps anyway. Fused attention stays fused (but for
timm's differential attention), no (B, N, C) map is made, and where attention is fused sum_j S_b[j] == T_b is checked.

What it costs is a little less than the forward and the backward, since tokens that lead nowhere are left out: after the
last attention only the class token goes on, below the first one there is no backward, and from there to the second the
products with weights have one for the class token only. All of this is seen function by function, so that it holds for
any model that treats its tokens one by one there; a model that does not is run again for all tokens. With memory="low"
a block keeps its input and what its attention gave, and computes the rest again when the backward comes.

Sections: the flow; the attention that is watched; tokens that are left out; blocks that are computed again; the
families of models, one function and one row of a table each; what is checked; the logit lens; from maps to pictures;
files.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import FunctionType

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "AttentionFlow",
    "UnsupportedModel",
    "VARIANTS",
    "attention_flow",
    "block_labels",
    "evolution_picture",
    "features",
    "logit_lens",
    "num_classes",
    "overlay",
    "render",
    "save_flow",
    "save_gif",
    "sheet",
    "shortened",
    "side_by_side",
    "whole_file",
]


# ----------------------------------------------------------------------------------------------------------------------
# The flow
# ----------------------------------------------------------------------------------------------------------------------


VARIANTS = ("paper", "signed", "heads")
"""See `attention_flow`."""


class UnsupportedModel(ValueError):
    """The decomposition, or the `rows` that were asked for, is not defined for this model, or its attention cannot be
    seen."""


@dataclass(frozen=True)
class AttentionFlow:
    """What `attention_flow` returns; all tensors are on the model's device and carry no graph. Where K classes, or K
    importances, of every image were explained, the maps are `(B, K, L, h, w)`."""

    block_maps: Tensor
    """`(B, L, h, w)` float32: L_b of every block, never negative, as computed (also with `norm=True`)."""
    accumulated: Tensor
    """`(B, L, h, w)` float32: A_b, the running sum over blocks; the last one is the final explanation."""
    output: Tensor
    """`(B, num_classes)` scores, or the `(B, D)` features when `importance` was given; in the model's dtype."""
    target: Tensor | None
    """`(B,)` explained class indices, int64, or `(B, K)` as they were given; None when `importance` was given."""
    rows: str = "class"
    """As given: "class", or "patches" for the all-rows form."""
    decomposed: str = ""
    """What the frames are, in words: "class token, 12 blocks", "class token, 2 class-attention blocks", ..."""
    num_prefix_tokens: int = 1
    """How many keys come before the patches in the first attention that is decomposed."""
    variant: str = "paper"
    """As given."""


def attention_flow(
    model: nn.Module,
    images: Tensor | dict[str, Tensor],
    target: int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None = None,
    importance: Tensor | Callable[[Tensor], Tensor] | None = None,
    norm: bool = False,
    rows: str = "class",
    memory: str = "auto",
    variant: str = "paper",
) -> AttentionFlow:
    """Decompose the class token in every block of a Vision Transformer, weight the maps and accumulate them.

    Args:
        model: a Vision Transformer of timm, torchvision or transformers (the families are listed in `_FAMILIES`), or
            any other one that has a class token, patches from a convolution, and nothing else among its tokens. It runs
            in eval mode and is given back as it was, also after an exception. Threads may explain several models at
            once, or share one that is in eval mode (not one with timm's differential attention).
        images: `(B, C, H, W)`, floating point and normalised as the model wants them; moved to its device and dtype.
            NaFlexVit also takes the dict of timm's collator, with `patches`, `patch_coord` and `patch_valid`: maps of
            images with different grids then share the largest height and width, zero outside of their own.
        target: the class to explain: None for each image's predicted class, one index for all, or one per image; or
            `(B, K)`, K classes of every image: one forward and K backwards. A callable makes one of these of the
            scores `(B, num_classes)`.
        importance: explains the feature (`features(model, images)`, `(B, D)`) instead of a class score: a `(D,)`,
            `(B, D)` or, for K maps of every image, `(B, K, D)` tensor, or a callable that makes one of the features.
            Models without a classifier need it.
        norm: min-max normalise every L_b, image by image, before it is added to the flow.
        rows: "class" is the method of the paper: the row of the class token. "patches" is another one, for models whose
            score reads the mean of the patch tokens: L_b[j] = ReLU(sum_c V[j]_c (A^T w(C))[j]_c) with all rows of the
            attention matrix A and of C = dY/dT; with w = identity it is ReLU(sum_c V * dY/dV).
        memory: what the backward finds of every block: "fast", all that it needs; "low", the block's input and what its
            fused attention gave, from which the rest is computed again, bit for bit the same. "auto" is "low" for
            blocks of which a whole model would keep more than 256 MiB an image (ViT-S: from 1,600 tokens on). A model
            of no known family always runs "fast".
        variant: "paper" is the method of the paper. Two others, which the evaluation compares with it: "signed", the
            coefficients keep their sign also for a class score, w = identity; "heads", that, and ReLU head by head,
            L_b[j] = sum_h ReLU(sum_d C_b[h, d] S_b[j, h, d]). The latter is the row of the class token in the
            gradient-weighted attention of Chefer, Gur, Wolf 2021 (https://arxiv.org/abs/2103.15679, Eq. 5), times the
            number of heads, since C_b[h] . V_b[j, h] is the gradient with respect to a_b[h, j].

    Returns:
        An `AttentionFlow`, one map a block for every image. In models with patch grids of several sizes every map is
        brought to the finest one, bilinearly and so that its sum is kept.

    Raises:
        UnsupportedModel: a `ValueError`, when the model has no class token, its score does not read it alone, or its
            attention cannot be seen.
        ValueError: when `images` have the wrong rank, size, channels or dtype, a class is out of range, `importance`
            does not fit the features, or the output is not finite. Always one line that names the argument first.
    """
    model = _unwrapped(model)
    if variant not in VARIANTS:
        raise ValueError(
            f"variant: expected {', '.join(map(repr, VARIANTS[:-1]))} or {VARIANTS[-1]!r}, got {variant!r}"
        )
    if memory not in ("auto", "fast", "low"):
        raise ValueError(f"memory: expected 'auto', 'fast' or 'low', got {memory!r}")
    if importance is not None and target is not None:
        raise ValueError("target: cannot be explained together with importance; give one of the two")
    plan = _plan(model, images, rows)
    if importance is None and num_classes(model) == 0:
        raise ValueError("importance: the model has no classifier; give the importance of its features")
    parameter = _parameter(model)
    if parameter.is_inference():
        raise ValueError("model: was made under torch.inference_mode(), which rules out gradients; make it outside")
    images = _to(images, parameter)
    w = torch.relu if importance is None and variant == "paper" else lambda c: c

    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(model):
        forward = _scores if importance is None else features
        for last in [plan.last, None] if plan and plan.last else [None]:
            watch = _AttentionWatch(w, memory, last, by_head=variant == "heads")
            with suppress(_MixesRows), _watched(model, plan, watch):
                output = forward(model, images)
                break
        if plan is None:
            plan = _plan_of_calls(model, images, watch)
        _check_forward(model, plan, watch.calls, output, images)
        if plan.unproven is not None:
            _check_places(model, images[:1], plan.unproven)
        if importance is None:
            target = _class_indices(target, output.detach())
            seeds = F.one_hot(target, output.shape[1]).to(output)
        else:
            seeds = _importance_weights(importance, output.detach())
        several = seeds.ndim == 3  # (B, K, D)
        seeds = seeds.unbind(1) if several else [seeds]
        scale = 128 if output.dtype == torch.float16 else 1  # small gradients do not underflow
        for k, seed in enumerate(seeds, 1):
            for call in watch.calls:
                call.again, call.is_last, call.scale = k < len(seeds), call is watch.calls[-1], scale
            torch.autograd.grad(output, watch.leaves, scale * seed, retain_graph=k < len(seeds), allow_unused=True)
            _check_backward(model, rows == "patches", watch.calls, k)

    size = max((site.grid for frame in plan.frames for site in frame), key=math.prod)
    maps = {id(call.site): torch.stack([_on_grid(m, call.site, size) for m in call.maps], 1) for call in watch.calls}
    block_maps = torch.stack([sum(maps[id(site)] for site in frame) for frame in plan.frames], dim=2)  # (B, K, L, h, w)
    block_maps = block_maps if several else block_maps.squeeze(1)
    summands = _min_max(block_maps, _inside(plan, images)) if norm else block_maps
    prefix = plan.frames[0][0].prefix
    output = output.detach()
    return AttentionFlow(block_maps, summands.cumsum(-3), output, target, rows, plan.decomposed, prefix, variant)


def features(model: nn.Module, images: Tensor | dict[str, Tensor]) -> Tensor:
    """`(B, D)`: what the classifier reads, timm's `pre_logits`.

    Of a model of transformers without a classifier the class token of `last_hidden_state` (of BEiT with mean pooling
    the `pooler_output`); of one of no known library its output. The model runs as it is: mode, device and gradients are
    the caller's.

    Raises:
        UnsupportedModel: for models of torchvision that are no ViT, and those of transformers without tokens.
    """
    model = _unwrapped(model)
    library = _library(model)
    if library == "timm" and isinstance(images, dict):
        names = ("patches", "patch_coord", "patch_valid", "attn_mask")
        patches = {name: images[name] for name in names if name in images}
        return model.forward_head(**model.forward_features(**patches), pre_logits=True)
    if library == "timm":
        return model.forward_head(model.forward_features(images), pre_logits=True)
    head = getattr(model, {"torchvision": "heads", "transformers": "classifier"}.get(library, ""), None)
    if isinstance(head, nn.Module):
        seen = []
        head = head[-1] if isinstance(head, nn.Sequential) else head
        with _hooks([(head.register_forward_pre_hook, lambda module, args: seen.append(args[0]))]):
            _scores(model, images)
        return seen[0]
    if library == "torchvision":
        raise UnsupportedModel(
            f"model: what the head of torchvision's {type(model).__name__} reads is not known; take a ViT"
        )
    if library == "transformers":
        distilled = hasattr(model, "distillation_classifier")  # its scores are the mean of two, and so is the feature
        output = (model.base_model if distilled else model)(images, return_dict=True)
        if getattr(model.config, "use_mean_pooling", False):  # BEiT
            return output.pooler_output
        tokens = getattr(output, "last_hidden_state", None)
        if tokens is None:
            raise UnsupportedModel(f"model: {type(model).__name__} has neither a classifier nor a last_hidden_state")
        return tokens[:, :2].mean(1) if distilled else tokens[:, 0]
    return model(images)


def num_classes(model: nn.Module) -> int | None:
    """The width of its classifier, 0 where it has none, None where that is not known."""
    model = _unwrapped(model)
    library = _library(model)
    if library == "torchvision" and hasattr(model, "heads"):
        return next((m.out_features for m in reversed(list(model.heads.modules())) if isinstance(m, nn.Linear)), 0)
    if library == "transformers":
        return model.config.num_labels if hasattr(model, "classifier") or hasattr(model, "cls_classifier") else 0
    return getattr(model, "num_classes", None)


def _scores(model: nn.Module, images: Tensor | dict[str, Tensor]) -> Tensor:
    output = model(images, return_dict=True) if _library(model) == "transformers" else model(images)
    return getattr(output, "logits", output)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, of training on several GPUs and of weight averaging."""
    wrappers = {"OptimizedModule": "_orig_mod"} | dict.fromkeys(
        ("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"
    )
    while (name := wrappers.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def _library(model: nn.Module) -> str:
    """Whose class the model is, or is derived from: "timm", "torchvision", "transformers" or ""."""
    libraries = [cls.__module__.split(".")[0] for cls in type(model).__mro__]
    return next((name for name in libraries if name in ("timm", "torchvision", "transformers")), "")


def _parameter(model: nn.Module) -> Tensor:
    """One whose device and dtype the images have to have."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _to(images: Tensor | dict[str, Tensor], parameter: Tensor) -> Tensor | dict[str, Tensor]:
    """On the device of the parameter and, where it is floating point, in its dtype."""
    if isinstance(images, dict):
        return {name: _to(x, parameter) if isinstance(x, Tensor) else x for name, x in images.items()}
    return images.detach().to(parameter.device, parameter.dtype if images.is_floating_point() else None)


def _on_grid(tokens: Tensor, site: _Site, size: tuple[int, int]) -> Tensor:
    """A map over the keys of a site, `(B, N)` -> `(B, h, w)`; a coarser grid is stretched, its sum is kept."""
    tokens = tokens[:, site.prefix :]
    if site.cells is not None:
        return tokens.new_zeros(len(tokens), math.prod(site.grid)).scatter_add(1, site.cells, tokens).unflatten(1, size)
    grid = tokens.unflatten(1, site.grid)
    if site.grid == size:
        return grid
    stretched = F.interpolate(grid[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    total = stretched.sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return stretched * (grid.sum((1, 2), keepdim=True) / total)


def _inside(plan: _Plan, images: Tensor | dict[str, Tensor]) -> Tensor | None:
    """Of images that share a larger grid, where each of them lies, `(B, h, w)` bool; None of all others."""
    site = plan.frames[0][0]
    if site.cells is None:
        return None
    valid = F.pad(images["patch_valid"].to(site.cells.device, torch.float32), (site.prefix, 0))
    return _on_grid(valid, site, site.grid) > 0


def _min_max(maps: Tensor, inside: Tensor | None = None) -> Tensor:
    """Every map of `(B, ..., h, w)` stretched to 0..1; a flat one becomes zero. What is not `inside`, `(B, h, w)` bool,
    does not count and is zero."""
    low = high = maps
    if inside is not None:
        inside = inside.view(len(maps), *[1] * (maps.ndim - 3), *maps.shape[-2:])
        low, high = maps.masked_fill(~inside, torch.inf), maps.masked_fill(~inside, -torch.inf)
    low, high = low.amin((-2, -1), keepdim=True), high.amax((-2, -1), keepdim=True)
    stretched = (maps - low) / torch.where(high > low, high - low, 1)
    return stretched if inside is None else stretched * inside


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; without timm's checkpointing, whose second forward would not be watched, and with timm's differential
    attention as one matrix instead of the difference of two fused calls. Every flag is put back."""
    modules = list(model.modules())
    flags = [(m, name) for m in modules for name in ("training", "grad_checkpointing") if m.__dict__.get(name)]
    differential = [m for m in modules if type(m).__name__.startswith("Diff")]
    flags += [(m, "fused_attn") for m in differential if m.__dict__.get("fused_attn")]
    try:
        for module, name in flags:
            setattr(module, name, False)
        yield
    finally:
        for module, name in flags:
            setattr(module, name, True)


@contextmanager
def _hooks(hooks: Sequence[tuple[Callable, Callable]]) -> Iterator[None]:
    """Hooks of modules, as (how to register, what to call), that only the current thread triggers."""
    thread = threading.get_ident()

    def here(call):
        return lambda *args: call(*args) if threading.get_ident() == thread else None

    handles = []
    try:
        for register, call in hooks:
            handles.append(register(here(call)))
        yield
    finally:
        for handle in handles:
            handle.remove()


# ----------------------------------------------------------------------------------------------------------------------
# The attention that is watched
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Site:
    """A module that computes one attention, in which tokens that lead to the score attend to the patches."""

    module: nn.Module
    grid: tuple[int, int]
    """`(h, w)` of the patches among its keys."""
    prefix: int = 1
    """Keys before the patches."""
    queries: int | None = 1
    """How many queries, the first ones, lead to the score; None: all (`rows="patches"`)."""
    cells: Tensor | None = None
    """`(B, n)` int64: where in the flattened grid each patch lies; None: patch after patch, row by row."""


_ANYWHERE = _Site(nn.Identity(), (0, 0))
"""For a model of no known family: every attention is watched, and belongs to a site when the run is over."""


@dataclass(frozen=True)
class _Plan:
    """Where a model is decomposed."""

    frames: list[list[_Site]]
    """The sites of every frame of the flow; their maps are added."""
    decomposed: str
    """See `AttentionFlow`."""
    pool: _Site | None = None
    """The attention pool, in models whose score reads its query instead of the class token."""
    last: _Site | None = None
    """The last attention, where its first queries alone lead to the score."""
    unproven: _Site | None = None
    """For a class that is of none of the libraries: its first attention, where the order of the patches is checked."""


@contextmanager
def _watched(model: nn.Module, plan: _Plan | None, watch: _AttentionWatch) -> Iterator[None]:
    """Sees the attention at the sites of the plan; without a plan, every attention."""
    sites = [site for frame in plan.frames for site in frame] if plan else []
    watch.site = None if plan else _ANYWHERE
    hooks = []
    if watch.memory != "fast" and plan:
        blocks = _blocks_around(model, [site.module for frame in plan.frames[:-1] for site in frame])
        for block in blocks:
            enter = partial(watch.enter_block, len(blocks))
            hooks.append((partial(block.register_forward_pre_hook, with_kwargs=True), enter))
            hooks.append((partial(block.register_forward_hook, prepend=True), watch.leave_block))
    try:
        with _hooks(hooks + watch.at(sites)), watch:
            yield
    finally:
        watch.after_first = watch.after_last = None
        watch.open_block.close()


class _AttentionWatch(TorchFunctionMode):
    """Sees the attention that the current thread computes at a site while the `with` lasts.

    Parameters reach every function detached, so that the graph holds what the activations need and no more. It begins
    at the output of the first attention, which becomes a leaf.

    At the site `last`, whose first queries alone lead to the score, the other queries are left out, and what follows
    is computed for these rows only; `_MixesRows` is raised where that could be seen in them. After the first attention,
    of which the same rows count, the products with weights have a graph for these rows only, until tokens are mixed.
    """

    def __init__(
        self, w: Callable[[Tensor], Tensor], memory: str = "fast", last: _Site | None = None, by_head: bool = False
    ):
        super().__init__()
        self.w, self.memory, self.last, self.by_head = w, memory, last, by_head
        self.site: _Site | None = None
        self.softmax: list[tuple[int, int]] = []
        """Queries and keys of every softmax whose matrix did not multiply values yet."""
        self.matrix: Tensor | None = None
        """The last one that multiplied values."""
        self.calls: list[_Attention] = []
        self.leaves: list[Tensor] = []
        self.after_first: tuple[int, int] | None = None
        self.after_last: tuple[int, int] | None = None
        """After these attentions: how many rows count, and of how many."""
        self.blocks: list[_Block] = []
        """Those whose graph is computed again."""
        self.block: _Block | None = None
        self.open_block = ExitStack()
        self.second_pass = False
        self.grid: tuple[int, int] | None = None
        """Size of the last convolution's output before the first attention."""
        self.channels: int | None = None
        """Of what the first convolution reads, the images."""
        self.images_again = False
        """Whether a convolution after the first attention reads as many channels as the images have."""

    def at(self, sites: Sequence[_Site]) -> list[tuple[Callable, Callable]]:
        """The hooks of their modules."""
        hooks = []
        for site in sites:
            hooks.append((site.module.register_forward_pre_hook, partial(self.enter, site)))
            hooks.append((site.module.register_forward_hook, self.leave))
        return hooks

    def enter(self, site: _Site, module: nn.Module, args: tuple) -> None:
        self.site = site

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.site = self.matrix = None
        self.softmax.clear()

    def enter_block(self, blocks: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        graph = 0 if tokens is None else 10 * blocks * math.prod(tokens.shape[1:]) * tokens.dtype.itemsize
        if self.memory == "low" or graph > _LARGE_GRAPH:
            self.block = _Block(self, module, args, kwargs)
            self.blocks.append(self.block)
            self.open_block.enter_context(self.block.first_pass())

    def leave_block(self, module: nn.Module, args: tuple, output: object) -> None:
        self.block = None
        self.open_block.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ in _ATTRIBUTES:
            return func(*args, **kwargs)
        args = [_without_weights(a) for a in args]
        kwargs = {name: _without_weights(a) for name, a in kwargs.items()}
        if self.after_last is not None:
            return self.for_first_rows(func, args, kwargs)
        kind = _by_row(func, args, kwargs) if self.after_first is not None else ""
        if not kind:
            self.after_first = None
        if func is F.multi_head_attention_forward:
            with self:
                output, _ = _multi_head_attention_forward(*args, **kwargs | {"need_weights": False})
            return output, func(*args, **kwargs)[1] if kwargs.get("need_weights", True) else None
        if self.site is not None:
            if func is F.scaled_dot_product_attention:
                named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
                if named["query"].ndim == 4:
                    return self.attend(func, _fused_attention, "query", named)
            elif func in _MATMUL and args and args[0].ndim == 4:
                named = {"input": args[0], "other": args[1] if len(args) > 1 else kwargs["other"]}
                if named["other"].ndim == 4 and self.is_attention(args[0]):
                    return self.attend(torch.matmul, _open_attention, "input", named)
        if self.after_first is not None and func is F.linear and args and args[0].shape[1:-1] == self.after_first[1:]:
            return self.with_graph_of_first_rows(*args, **kwargs)
        output = func(*args, **kwargs)
        if kind == "rearranges" and output.ndim < 3:
            self.after_first = None
        if func is F.conv2d and output.ndim == 4:
            channels = (args[0] if args else kwargs["input"]).shape[1]
            if self.calls:
                self.images_again |= channels == self.channels
            else:
                self.grid, self.channels = tuple(output.shape[2:]), self.channels or channels
        if self.site is not None and func in _SOFTMAX:
            self.softmax.append(tuple(output.shape[-2:]))
        return output

    def is_attention(self, matrix: Tensor) -> bool:
        """Whether it is the first to multiply after a softmax of its size, or does so again: one time too many."""
        shape = tuple(matrix.shape[-2:])
        if matrix is not self.matrix and shape in self.softmax:
            self.softmax.remove(shape)
            self.matrix = matrix
            return True
        return matrix is self.matrix

    def attend(self, func: Callable, seen: Callable[..., _Matrix], name: str, named: dict) -> Tensor:
        """Computes an attention, whose rows are the rows of the argument of that name, and keeps what its map needs."""
        rows, tokens = self.site.queries, named[name].shape[-2]
        is_last = self.site is self.last and rows < tokens and not named.get("is_causal")
        if is_last:
            for argument in (name, "attn_mask"):
                if named.get(argument) is not None and named[argument].shape[-2] > 1:
                    named[argument] = named[argument][..., :rows, :]
        matrix = seen(**named)
        if self.second_pass:
            call = next(call for call in self.calls if call.site is self.site)
            call.matrix = matrix
            output = func(**named)
        else:
            output = func(**named)
            call = _Attention(self.site, self.w, self.by_head, output, matrix, self.block)
            self.calls.append(call)
        if call is self.calls[0] or not output.requires_grad:
            output = output.detach().requires_grad_()
        if not self.second_pass:
            output.register_hook(call.receive)
            if output.is_leaf:
                self.leaves.append(output)
        if is_last:
            self.after_last = rows, tokens
            return F.pad(output, (0, 0, 0, tokens - rows))
        if call is self.calls[0] and self.last is not None and rows < tokens:
            self.after_first = rows, tokens
        return output

    def with_graph_of_first_rows(self, x: Tensor, *weights: Tensor, **named: Tensor) -> Tensor:
        """`F.linear` after the first attention."""
        rows, _ = self.after_first
        parts = x[:, :rows].contiguous(), x.detach()[:, rows:].contiguous()
        return torch.cat([F.linear(part, *weights, **named) for part in parts], 1)

    def for_first_rows(self, func: Callable, args: list, kwargs: dict) -> object:
        """Calls a function after the last attention with every `(B, N, C)` cut to its first rows."""
        rows, tokens = self.after_last
        kind = _by_row(func, args, kwargs)
        if kind == "looks":
            return func(*args, **kwargs)
        if kind == "computes":
            cut = partial(_first_rows, rows, tokens)
            return func(*map(cut, args), **{key: cut(a) for key, a in kwargs.items()})
        if kind == "rearranges" and (output := func(*args, **kwargs)).ndim > 2:
            return output
        index = args[1] if func is Tensor.__getitem__ and args[0].ndim == 3 else None
        match index:
            case (slice(start=None, stop=None), int() | slice() as tokens_read, *_):
                read = range(tokens)[tokens_read]
                if set(read if isinstance(read, range) else [read]) <= set(range(rows)):
                    return func(*args, **kwargs)
        raise _MixesRows(func)


def _without_weights(argument: object) -> object:
    """Parameters detached, also in a list."""
    kind = type(argument)
    if kind in (list, tuple):
        return kind(map(_without_weights, argument))
    if kind is Tensor or not issubclass(kind, Tensor):
        return argument
    return argument.detach() if isinstance(argument, nn.Parameter) else argument


_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
# `nn.MultiheadAttention` computes in a function that modes may replace as a whole, and does not see into; this is its
# body without that way out.
_multi_head_attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


@dataclass(frozen=True)
class _Matrix:
    """What there is of the matrix A of an attention T = A V; H' < H where groups of heads share their values."""

    value: Tensor
    """V `(B, H', N, d)`."""
    spread: Callable[[slice], Tensor]
    """Rows of A, those of the queries: `(B, H, Q, N)` float32."""
    pull: Callable[[Tensor], Tensor]
    """A^T times a gradient with respect to T: `(B, H, M, d)` -> `(B, H', N, d)` float32."""


class _Attention:
    """One attention of the run.

    `receive` is the hook of T. Every gradient adds to `maps` one `(B, N)` float32, L_b over all keys, and sets
    `remainder`, the largest |sum_j S_b[j] - T_b| relative to the largest |T_b|, and `read_queries` `(M,)` bool, those
    that the score reads. With the last one, before which `again` is set to False, the call lets go of its tensors.
    Gradients come multiplied by `scale`.
    """

    def __init__(
        self,
        site: _Site,
        w: Callable[[Tensor], Tensor],
        by_head: bool,
        output: Tensor,
        matrix: _Matrix,
        block: _Block | None = None,
    ):
        self.site, self.w, self.by_head, self.block = site, w, by_head, block
        self.queries = slice(site.queries or 1)  # those of the class form, and of the check
        self.output = output.detach()[..., self.queries, :].clone()
        self.shape = output.shape[0], output.shape[-2], matrix.value.shape[-2]  # B, queries M, keys N
        self.dtype = output.dtype
        self.matrix = None if block else matrix  # of a block that is computed again, what its second pass finds
        self.maps: list[Tensor] = []
        self.again, self.is_last, self.scale = False, True, 1
        self.remainder = self.read_queries = None

    def receive(self, gradient: Tensor) -> None:
        if self.matrix is None:
            self.block.second_pass()
        with torch.autocast(gradient.device.type, enabled=False):
            output, value, spread = self.output.float(), self.matrix.value.float(), self.matrix.spread(self.queries)
            values = _for_heads(value, spread.shape[1])
            largest = output.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            self.remainder = (spread @ values - output).abs().max() / largest
            if self.is_last:
                self.read_queries = gradient.ne(0).any(-1).flatten(0, -2).any(0)
            if self.site.queries is None:
                pulled = self.matrix.pull(self.w(gradient.float() / self.scale))  # (A^T w(C))[j]
                tokens = (value * pulled).sum(3)
            else:
                weights = self.w(gradient[..., self.queries, :].float() / self.scale)  # w(C_b) (B, H, Q, d)
                tokens = (spread * (weights @ values.transpose(-2, -1))).sum(2)
            self.maps.append((tokens.relu() if self.by_head else tokens).sum(1).relu())  # tokens (B, H, N)
        if not self.again or self.block:
            self.matrix = None


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Matrix:
    """Of a call of `scaled_dot_product_attention`."""
    query, key, value = query.detach(), key.detach(), value.detach()
    if attn_mask is not None:
        attn_mask = attn_mask.detach() if attn_mask.dtype == torch.bool else attn_mask.detach().float()

    def spread(queries: slice) -> Tensor:
        rows = query[..., queries, :].float()
        keys = _for_heads(key, query.shape[1]).float()
        logits = (rows @ keys.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., queries, :]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        if is_causal:
            position = torch.arange(max(query.shape[-2], key.shape[-2]), device=key.device)
            logits = logits.masked_fill(position[: key.shape[-2]] > position[queries, None], -torch.inf)
        return logits.softmax(-1)

    def pull(gradient: Tensor) -> Tensor:  # what the fused attention's own backward gives for v: no N x N matrix
        with torch.enable_grad():
            v = value.float().requires_grad_()
            T = F.scaled_dot_product_attention(
                query.float(), key.float(), v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return torch.autograd.grad(T, v, gradient)[0]

    return _Matrix(value, spread, pull)


def _open_attention(input: Tensor, other: Tensor) -> _Matrix:
    """Of a product A V, where a model computes the matrix `(B, H, M, N)` itself."""
    matrix = input.detach()
    return _Matrix(
        other.detach(),
        spread=lambda queries: matrix[..., queries, :].float(),
        pull=lambda gradient: matrix.float().transpose(-2, -1) @ gradient,
    )


def _for_heads(shared: Tensor, heads: int) -> Tensor:
    """`(B, H', N, d)` -> `(B, H, N, d)`: keys or values that groups of heads share, once for every head."""
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens that are left out
# ----------------------------------------------------------------------------------------------------------------------


class _MixesRows(Exception):
    """After the last attention something was computed that may read more than the first rows."""


def _by_row(func: Callable, args: list, kwargs: dict) -> str:
    """What a function does, if it treats tokens one by one: "looks", "computes", "rearranges" their heads; else ""."""
    name = getattr(func, "__name__", "")
    flat = [b for a in (*args, *kwargs.values()) for b in (a if type(a) in (list, tuple) else [a])]
    ranks = {a.ndim for a in flat if isinstance(a, Tensor)}
    if max(ranks, default=0) < 3 or name in _LOOKS:
        return "looks"
    if name in _REARRANGES and ranks == {4}:
        return "rearranges"
    if name in ("layer_norm", "rms_norm"):
        by_row = len(args) > 1 and len(args[1]) == 1
    elif name in ("cat", "chunk", "split"):
        dim = kwargs.get("dim", args[-1] if len(args) > 1 else None)
        by_row = isinstance(dim, int) and dim == -1
    elif name == "mean":
        by_row = kwargs.get("dim") in (-1, (-1,), [-1]) and kwargs.get("keepdim", False)
    else:
        by_row = name == "linear" or 2 not in ranks
    return "computes" if by_row and name in _COMPUTES else ""


def _first_rows(rows: int, tokens: int, argument: object) -> object:
    """Every `(B, N, C)` with N `tokens`, also in a list, cut to `(B, rows, C)`."""
    if type(argument) in (list, tuple):
        return type(argument)(_first_rows(rows, tokens, a) for a in argument)
    has_tokens = isinstance(argument, Tensor) and argument.ndim == 3 and argument.shape[1] == tokens
    return argument[:, :rows] if has_tokens else argument


# By name: functions that treat every token by itself, that rearrange the heads of all, and that change nothing.
_COMPUTES = {
    "add", "cat", "chunk", "contiguous", "dropout", "float", "gelu", "layer_norm", "linear", "mean", "mul", "pow",
    "relu", "rms_norm", "rsqrt", "sigmoid", "silu", "split", "sub", "tanh", "to",
}  # fmt: skip
_REARRANGES = {"contiguous", "flatten", "permute", "reshape", "transpose", "view"}
_ATTRIBUTES = {"device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape"}
_LOOKS = {
    "__len__", "detach", "dim", "is_contiguous", "is_floating_point", "numel", "register_hook",
    "requires_grad_", "size", "stride", "untyped_storage",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Blocks that are computed again
# ----------------------------------------------------------------------------------------------------------------------


_LARGE_GRAPH = 256 * 2**20
"""Bytes an image; see `attention_flow`."""


def _blocks_around(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that modules lie in: the innermost ones, or they themselves, that are elements of a list."""
    around: dict[nn.Module, nn.Module | None] = {model: None}
    for parent in model.modules():
        for child in parent.children():
            in_list = isinstance(parent, nn.ModuleList | nn.Sequential)
            around.setdefault(child, child if in_list else around[parent])
    return [block for block in dict.fromkeys(around[module] for module in modules) if block is not None]


class _AttentionOutputs(TorchDispatchMode):
    """Keeps what fused attention returns, its output and the log-sum-exp of its rows, and gives it back in place of
    computing it in the second pass."""

    def __init__(self):
        super().__init__()
        self.kept: list[tuple] = []
        self.given: Iterator[tuple] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not name.startswith("aten::_scaled_dot_product_") or "math" in name:
            return func(*args, **(kwargs or {}))
        if self.given is not None:
            outputs = next(self.given)
        else:
            outputs = func(*args, **(kwargs or {}))
            self.kept.append(outputs)
        return tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)


class _Block:
    """A block that keeps its input and what its attention returned. What else the backward needs is computed again when
    it asks, and let go when it asks another block (Chen et al. 2016, "Training deep nets with sublinear memory cost",
    https://arxiv.org/abs/1604.06174).
    """

    class Enough(Exception):
        """The second pass has all that the first one had."""

    def __init__(self, watch: _AttentionWatch, module: nn.Module, args: tuple, kwargs: dict):
        self.watch, self.module = weakref.ref(watch), module
        self.args, self.kwargs = [_leaf(a) for a in args], {name: _leaf(a) for name, a in kwargs.items()}
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.after_first = watch.after_first
        self.attention = _AttentionOutputs()
        self.count = 0
        self.saved: dict[int, Tensor] = {}
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        self.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        with self.attention, saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> Tensor | int:
        if tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        self.count += 1
        return self.count - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self.saved:
            self.second_pass()
        if packed not in self.saved:
            raise UnsupportedModel(
                f"model: a {type(self.module).__name__} does not compute the same twice; give memory='fast'"
            )
        return self.saved.pop(packed)

    def second_pass(self) -> None:
        watch = self.watch()
        for block in watch.blocks:
            block.saved.clear()
        self.attention.given = iter(self.attention.kept)
        watch.second_pass, watch.after_first = True, self.after_first
        sites = [call.site for call in watch.calls if call.block is self]
        watch.site = next((site for site in sites if site.module is self.module), None)
        try:
            with (
                torch.enable_grad(),
                self.autocast,
                _hooks(watch.at(sites)),
                watch,
                self.attention,
                saved_tensors_hooks(self.save, lambda packed: packed),
            ):
                self.module.forward(*self.args, **self.kwargs)  # without the hooks that the arguments went through
        except self.Enough:
            pass
        finally:
            watch.leave(self.module, (), None)
            watch.second_pass, watch.after_first = False, None

    def save(self, tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.saved[len(self.saved)] = tensor.detach()
            if len(self.saved) == self.count:
                raise self.Enough


def _leaf(argument: object) -> object:
    """A tensor without its graph."""
    return argument.detach().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor) else argument


# ----------------------------------------------------------------------------------------------------------------------
# The families of models: where the class token attends to the patches
# ----------------------------------------------------------------------------------------------------------------------
#
# To add a family: write a function (model, images) -> _Plan that names the modules; add a row to `_FAMILIES`, and to
# `_ALL_ROWS` if its score may read the mean patch token; for a package other than timm, torchvision and transformers
# teach `_library`, `features` and `num_classes`; add a row to tests/support_table.py. What the attention does is seen
# while the model runs, and held against the plan by `_check_forward` and `_check_backward`: one attention a site, the
# expected number of keys, sum_j S_b[j] == T_b where it is fused, a score that reads no other queries.


def _plan(model: nn.Module, images: Tensor | dict, rows: str) -> _Plan | None:
    """The plan of the model's family; None where the family is not known, and only the run can tell."""
    if rows not in ("class", "patches"):
        raise ValueError(f"rows: expected 'class' or 'patches', got {rows!r}")
    for reason, refused in _REFUSED.items():
        if any(name in refused for name in _class_names(model)):
            raise UnsupportedModel(f"model: {type(model).__name__} {reason}")
    family, all_rows = _family(model), rows == "patches"
    if all_rows and family not in _ALL_ROWS:
        raise UnsupportedModel(
            f"rows: 'patches' is not defined for {type(model).__name__}; it is for timm's VisionTransformer, Eva, Beit "
            f"and NaFlexVit and the ViTs of torchvision and transformers"
        )
    if family is not None and not all_rows and _library(model) == "timm":
        _check_pool(model)
    if family is not _naflex or not isinstance(images, dict):
        _check_images(model, images)
    if family is None:
        return None
    plan = family(model, images)
    derived = type(model).__module__.split(".")[0] != _library(model)  # somebody's own class on top of the family's
    unproven = plan.frames[0][0] if derived and family in _ALL_ROWS and isinstance(images, Tensor) else None
    if all_rows:
        frames = [*plan.frames, *([[plan.pool]] if plan.pool else [])]
        frames = [[replace(site, queries=None) for site in frame] for frame in frames]
        plan = _Plan(frames, f"all tokens, rows='patches', {len(frames)} blocks")
    elif plan.pool:
        plan = _Plan([[plan.pool]], "attention pool, 1 map")
    one_branch = not all_rows and all(len(frame) == 1 for frame in (plan.frames[0], plan.frames[-1]))
    last = plan.frames[-1][0] if one_branch and family not in _WHOLE_LAST_BLOCK else None
    return replace(plan, last=last, unproven=unproven)


def _family(model: nn.Module) -> Callable[[nn.Module, Tensor], _Plan] | None:
    return next((_FAMILIES[name] for name in _class_names(model) if name in _FAMILIES), None)


def _class_names(model: nn.Module) -> list[str]:
    """Of its class and the base classes, the nearest first, each after the package that it comes from."""
    return [f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]


def _or_all_rows(model: nn.Module) -> str:
    """The way out that the family offers where the score reads the patches."""
    return " or ask for rows='patches' (--rows patches)" if _family(model) in _ALL_ROWS else ""


def _blocks(frames: list[list[_Site]]) -> _Plan:
    """Every block is a frame."""
    tokens = "class and distillation token" if frames[0][0].queries == 2 else "class token"
    return _Plan(frames, f"{tokens}, {len(frames)} blocks")


def _vision_transformer(model: nn.Module, images: Tensor) -> _Plan:
    """timm's VisionTransformer, Eva, Beit and VisionTransformerRelPos."""
    way_out = ", or build the model with dynamic_img_size=True" if hasattr(model, "dynamic_img_size") else ""
    return _vit_blocks(model, _grid_of(model.patch_embed, images, way_out))


def _naflex(model: nn.Module, images: Tensor | dict[str, Tensor]) -> _Plan:
    """timm's NaFlexVit: a batch of images, or patches with their places in grids of several sizes."""
    if not isinstance(images, dict):
        return _vit_blocks(model, _grid_of(model.embeds, images))
    shapes = {name: tuple(images[name].shape[:2]) for name in images if isinstance(images[name], Tensor)}
    for name in ("patches", "patch_coord", "patch_valid"):
        if name not in shapes or shapes[name] != shapes["patches"] or len(shapes[name]) != 2:
            raise ValueError(
                f"images: NaFlexVit takes a dict of the tensors patches (B, N, P * P * 3), patch_coord (B, N, 2) and "
                f"patch_valid (B, N); {name} is missing or has another shape"
            )
    if images["patches"].numel() == 0 or not images["patches"].is_floating_point():
        what = f"{tuple(images['patches'].shape)} of {images['patches'].dtype}"
        raise ValueError(f"images: expected patches (B, N, P * P * 3) of normalised floating point values, got {what}")
    y, x = images["patch_coord"].long().unbind(-1)
    size = int(y.max()) + 1, int(x.max()) + 1
    return _vit_blocks(model, size, cells=(y * size[1] + x).to(next(model.parameters()).device))


def _vit_blocks(model: nn.Module, grid: tuple[int, int], cells: Tensor | None = None) -> _Plan:
    """Row 0 of every block, or the queries of the attention pool."""
    site, prefix = partial(_Site, grid=grid, cells=cells), model.num_prefix_tokens
    frames = []
    for block in model.blocks:
        # several attentions side by side (ParallelThingsBlock), one, or one that the block computes (ParallelScaling)
        modules = [a.attn for a in block.attns] if hasattr(block, "attns") else [getattr(block, "attn", block)]
        frames.append([site(module, prefix=prefix) for module in modules])
    plan, pool = _blocks(frames), getattr(model, "attn_pool", None)
    if pool is None:
        return plan
    read = prefix if getattr(model, "pool_include_prefix", True) else 0
    return replace(plan, pool=site(pool, prefix=read, queries=getattr(pool, "latent_len", 1)))


def _distilled(model: nn.Module, images: Tensor) -> _Plan:
    """timm's distilled DeiT: the score is the mean of two, of the class token and the distillation token."""
    frames = _vision_transformer(model, images).frames
    return _blocks([[replace(site, queries=2) for site in frame] for frame in frames])


def _cait(model: nn.Module, images: Tensor) -> _Plan:
    """CaiT (Touvron et al. 2021): the class token joins at the end and has blocks of its own."""
    return _class_blocks(model.blocks_token_only, _grid_of(model.patch_embed, images))


def _xcit(model: nn.Module, images: Tensor) -> _Plan:
    """XCiT (El-Nouby et al. 2021): as CaiT, after blocks whose attention is between channels."""
    patch = model.patch_embed.patch_size
    return _class_blocks(model.cls_attn_blocks, tuple(math.ceil(side / patch) for side in images.shape[2:]))


def _volo(model: nn.Module, images: Tensor) -> _Plan:
    """VOLO (Yuan et al. 2021): as CaiT. The score adds half of the largest patch score, which does not depend on T."""
    grid = tuple(model.pos_embed.shape[1:3])
    stride = 2 * math.prod(m.stride[0] for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))
    _check_size(images, [stride * side for side in grid])
    return _class_blocks(model.post_network, grid)


def _class_blocks(blocks: Sequence[nn.Module], grid: tuple[int, int]) -> _Plan:
    return _Plan([[_Site(block.attn, grid)] for block in blocks], f"class token, {len(blocks)} class-attention blocks")


def _convit(model: nn.Module, images: Tensor) -> _Plan:
    """ConViT (d'Ascoli et al. 2021): the class token joins after the gated positional blocks."""
    grid, blocks = _grid_of(model.patch_embed, images), model.blocks[model.local_up_to_layer :]
    frames = [[_Site(block.attn, grid)] for block in blocks]
    return _Plan(frames, f"class token, last {len(frames)} of {len(model.blocks)} blocks")


def _pit(model: nn.Module, images: Tensor) -> _Plan:
    """PiT (Heo et al. 2021): one class token, patches that are pooled between the stages; two tokens when distilled."""
    _check_size(images, model.patch_embed.img_size)
    tokens, grid, frames = model.cls_token.shape[1], model.patch_embed.grid_size, []
    for stage in model.transformers:
        if stage.pool is not None:
            grid = _after_convolution(grid, stage.pool.conv)
        frames += [[_Site(block.attn, grid, tokens, queries=tokens)] for block in stage.blocks]
    return _blocks(frames)


def _crossvit(model: nn.Module, images: Tensor) -> _Plan:
    """CrossViT (Chen et al. 2021): two branches, each with a class token that also attends to the other's patches."""
    if model.crop_scale:
        raise UnsupportedModel(
            "model: the branches of a CrossVit with crop_scale=True see different parts of the image"
        )
    _check_size(images, model.img_size)
    grids = [
        tuple(side // patch for side, patch in zip(embed.img_size, embed.patch_size)) for embed in model.patch_embed
    ]
    frames = []
    for stage in model.blocks:
        for i in range(max(map(len, stage.blocks))):
            frames.append([_Site(branch[i].attn, grid) for branch, grid in zip(stage.blocks, grids) if i < len(branch)])
        frames.append([_Site(fusion.attn, grid) for fusion, grid in zip(stage.fusion, grids[1:] + grids[:1])])
    return _Plan(frames, f"class tokens of both branches, {len(frames)} steps")


def _tnt(model: nn.Module, images: Tensor) -> _Plan:
    """TNT (Han et al. 2021): the outer attention, over patches; the inner one is over the pixels of each."""
    _check_size(images, model.pixel_embed.img_size)
    return _blocks([[_Site(block.attn_out, model.pixel_embed.grid_size)] for block in model.blocks])


def _mvit(model: nn.Module, images: Tensor) -> _Plan:
    """MViTv2 with a class token (Li et al. 2022): the keys are pooled, more or less from stage to stage. T = sum_j S[j]
    is what the attention gives; the query that is added to it has no place in the picture."""
    first, embed = model.stages[0].blocks[0].attn, model.patch_embed.proj
    if first.rel_pos_type == "spatial":  # its table, of 2 n - 1 distances, decides the size
        n = (len(first.rel_pos_h) + 1) // 2 * (first.pool_q.stride[0] if first.pool_q else 1)
        _check_size(images, [n * stride for stride in embed.stride])
    grid, frames = _after_convolution(images.shape[2:], embed), []
    for block in (block for stage in model.stages for block in stage.blocks):
        frames.append([_Site(block.attn, _after_convolution(grid, block.attn.pool_k))])
        grid = _after_convolution(grid, block.attn.pool_q)
    return _blocks(frames)


def _torchvision(model: nn.Module, images: Tensor) -> _Plan:
    """torchvision's VisionTransformer."""
    _check_size(images, (model.image_size,) * 2)
    grid = (model.image_size // model.patch_size,) * 2
    return _blocks([[_Site(layer.self_attention, grid)] for layer in model.encoder.layers])


def _transformers(model: nn.Module, images: Tensor) -> _Plan:
    """transformers' ViT, DeiT, DINOv2, DINOv3 and BEiT, with fused ("sdpa") or eager attention."""
    config = model.config
    patch, side = (x if isinstance(x, Sequence) else (x, x) for x in (config.patch_size, config.image_size))
    resizes = config.model_type not in ("vit", "deit", "beit")  # its position embedding, to the image
    _check_size(images, None if resizes else side, patch)
    grid = tuple(length // p for length, p in zip(images.shape[2:], patch))
    prefix = 1 + (config.model_type == "deit") + getattr(config, "num_register_tokens", 0)
    queries = 2 if hasattr(model, "distillation_classifier") else 1
    layers = [m for m in model.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "attention")]
    if not layers:
        raise UnsupportedModel(f"model: {type(model).__name__} has no layers like those of transformers' ViTs")
    return _blocks([[_Site(layer.attention, grid, prefix, queries)] for layer in layers])


_FAMILIES: dict[str, Callable[[nn.Module, Tensor], _Plan]] = {
    "timm.VisionTransformer": _vision_transformer,
    "timm.VisionTransformerDistilled": _distilled,
    "timm.VisionTransformerRelPos": _vision_transformer,
    "timm.Eva": _vision_transformer,
    "timm.Beit": _vision_transformer,
    "timm.NaFlexVit": _naflex,
    "timm.Cait": _cait,
    "timm.Xcit": _xcit,
    "timm.VOLO": _volo,
    "timm.ConVit": _convit,
    "timm.PoolingVisionTransformer": _pit,
    "timm.CrossVit": _crossvit,
    "timm.TNT": _tnt,
    "timm.MultiScaleVit": _mvit,
    "torchvision.VisionTransformer": _torchvision,
    "transformers.ViTPreTrainedModel": _transformers,
    "transformers.DeiTPreTrainedModel": _transformers,
    "transformers.Dinov2PreTrainedModel": _transformers,
    "transformers.Dinov2WithRegistersPreTrainedModel": _transformers,
    "transformers.DINOv3ViTPreTrainedModel": _transformers,
    "transformers.BeitPreTrainedModel": _transformers,
}
"""By `_class_names`."""

_ALL_ROWS = {_vision_transformer, _naflex, _distilled, _torchvision, _transformers}
"""The families with `rows="patches"`."""

_WHOLE_LAST_BLOCK = {_pit, _torchvision}
"""The families whose last block is run for all tokens: how it goes on is not seen row by row."""

_NO_LENS = {_pit, _crossvit, _mvit}
"""The families without `logit_lens`: their blocks differ in width, or run in two branches."""

_REFUSED = {
    "uses windowed attention: no token attends to all patches": (
        "timm.SwinTransformer", "timm.SwinTransformerV2", "timm.SwinTransformerV2Cr", "timm.DaVit",
        "timm.GlobalContextVit", "timm.Nest", "timm.VisionTransformerSAM", "timm.HieraDet",
        "torchvision.SwinTransformer", "torchvision.MaxVit", "transformers.SwinPreTrainedModel",
        "transformers.Swinv2PreTrainedModel",
    ),
    "has no class token; DAAM needs one query token that the score reads": (
        "timm.Hiera", "timm.Levit", "timm.LevitDistilled", "timm.MaxxVit", "timm.PyramidVisionTransformerV2",
        "timm.Twins", "transformers.HieraPreTrainedModel", "transformers.LevitPreTrainedModel",
        "transformers.PvtPreTrainedModel", "transformers.PvtV2PreTrainedModel",
    ),
    "factorises its attention: no row of it says how the class token attends to the patches": ("timm.CoaT",),
    "shuffles its patches: their places in the picture are not known": ("transformers.ViTMAEPreTrainedModel",),
}  # fmt: skip
"""What is not defined, by the reason."""


# ----------------------------------------------------------------------------------------------------------------------
# What the families share, and what is checked
# ----------------------------------------------------------------------------------------------------------------------


def _plan_of_calls(model: nn.Module, images: Tensor, watch: _AttentionWatch) -> _Plan:
    """A model of no known family, after its run. The grid is that of its last convolution before the first attention;
    a token more than that must be the class token."""
    name, grid, calls = f"model: {type(model).__name__}", watch.grid, watch.calls
    if not calls:
        raise UnsupportedModel(
            f"{name} has no attention that DAAM can see: scaled_dot_product_attention, nn.MultiheadAttention, or "
            f"softmax(Q K^T) @ V with heads as a dimension of their own"
        )
    tokens = 1 + math.prod(grid) if grid else 0
    odd = next((call.shape for call in calls if call.shape != (len(images), tokens, tokens)), None)
    if odd is not None:
        wanted = f"1 + {grid[0]} x {grid[1]} tokens in {len(images)} images" if grid else "patches from a convolution"
        raise UnsupportedModel(
            f"{name} is of no known family, and its tokens are not one class token and the patches: expected {wanted}, "
            f"but an attention goes from {odd[1]} to {odd[2]} tokens in {odd[0]} images; {_OTHER_MODEL}"
        )
    if watch.images_again:
        raise UnsupportedModel(f"{name} is of no known family, and may see the images more than once; {_OTHER_MODEL}")
    if (tokens, tokens) in watch.softmax:
        raise UnsupportedModel(f"{name} is of no known family, and part of its attention is not seen; {_OTHER_MODEL}")
    for call in calls:
        call.site = _Site(model, grid)
    return replace(_blocks([[call.site] for call in calls]), unproven=calls[0].site)


_OTHER_MODEL = "pass a model of timm, torchvision or transformers itself"


def _check_places(model: nn.Module, image: Tensor, first: _Site) -> None:
    """Holds the order of the patches against the picture `(1, C, H, W)`: in the first attention, the values of a patch
    must depend most on the pixels of its own cell."""
    image = image.clone().requires_grad_()
    with suppress(_FirstValues.Found), _FirstValues() as probe:
        _scores(model, image)
    cells = math.prod(first.grid)
    right = probe.values.shape[::2] == (1, first.prefix + cells)
    for k in {0, 1, first.grid[1], cells - 2} & set(range(cells)) if right else ():
        size = probe.values[0, :, first.prefix + k].square().sum()
        gradient = torch.autograd.grad(size, image, retain_graph=True, allow_unused=True)[0]
        heat = 0 * image if gradient is None else gradient.abs()
        right = right and F.adaptive_avg_pool2d(heat.sum(1), first.grid).argmax().item() == k
    if not right:
        raise UnsupportedModel(
            f"model: the tokens of {type(model).__name__} are not {first.prefix} and then the patches, row by row; "
            f"{_OTHER_MODEL}"
        )


class _FirstValues(_AttentionWatch):
    """Stops the forward at the first attention and keeps its values `(B, H, N, d)` with their graph."""

    class Found(Exception):
        pass

    def __init__(self):
        super().__init__(torch.relu)
        self.site = _ANYWHERE

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch.enable_grad():  # also where the model switches gradients off
            return super().__torch_function__(func, types, args, kwargs)

    def attend(self, func: Callable, seen: Callable[..., _Matrix], name: str, named: dict) -> Tensor:
        self.values = named["value" if "value" in named else "other"]
        raise self.Found


def _check_pool(model: nn.Module) -> None:
    """Refuses timm models whose score reads neither the class token nor the query of an attention pool."""
    name, pool = type(model).__name__, getattr(model, "global_pool", "token")
    if pool in ("map", "prr"):
        return
    owner = getattr(model, "embeds", model)  # NaFlexVit keeps its tokens there
    if getattr(owner, "cls_token", None) is None and not hasattr(model, "cls_token_0"):  # CrossViT's
        raise UnsupportedModel(
            f"model: {name} has no class token (global_pool={pool!r}); DAAM needs one query token that the score "
            f"reads: use another model{_or_all_rows(model)}"
        )
    if not pool:
        raise UnsupportedModel(f"model: {name} has no score (global_pool=''); build it with global_pool='token'")
    if pool != "token":
        read = "the mean patch token" if pool == "avg" else "more than one token"
        raise UnsupportedModel(
            f"model: {name} has a class token but scores {read} (global_pool={pool!r}); the class row of the last "
            f"block has zero gradient. Build it with global_pool='token' (if the weights were trained so)"
            f"{_or_all_rows(model)}"
        )


def _grid_of(embed: nn.Module, images: Tensor, way_out: str = "") -> tuple[int, int]:
    """The patch grid `(h, w)` of timm's patch embeddings, after a check of the images' size."""
    patch = embed.feat_ratio(as_scalar=False)
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    fixed = embed.img_size if getattr(embed, "strict_img_size", False) else None
    padded = getattr(embed, "dynamic_img_pad", False)
    _check_size(images, fixed, (1, 1) if padded else patch, way_out)
    return tuple(embed.dynamic_feat_size(tuple(images.shape[2:])))


def _after_convolution(size: Sequence[int], layer: nn.Module | None) -> tuple[int, int]:
    """`(h, w)` after a convolution or pooling; None leaves it."""
    if layer is None:
        return tuple(size)
    pairs = [p if isinstance(p, Sequence) else (p, p) for p in (layer.kernel_size, layer.stride, layer.padding)]
    return tuple((side + 2 * pad - kernel) // stride + 1 for side, kernel, stride, pad in zip(size, *pairs))


def _check_images(model: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor (B, C, H, W) with B > 0, got {shape}")
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected normalised floating point values, got {images.dtype}; apply the model's transform"
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first else getattr(model, "in_chans", 3)
    if _family(model) is not None and images.shape[1] != channels:
        raise ValueError(f"images: the model takes {channels} channels, got {images.shape[1]}")


def _check_size(images: Tensor, fixed: Sequence[int] | None, stride: Sequence[int] = (1, 1), way_out: str = "") -> None:
    """Holds `(B, C, H, W)` against the only size that a model takes (None: any) and the size of its patches."""
    h, w = images.shape[2:]
    if fixed is not None and (h, w) != tuple(fixed):
        raise ValueError(f"images: the model takes {fixed[0]} x {fixed[1]} pixels, got {h} x {w}; resize them{way_out}")
    if fixed is None and any(side < s or side % s for side, s in zip((h, w), stride)):
        raise ValueError(
            f"images: {h} x {w} pixels are not a multiple of the model's stride, {stride[0]} x {stride[1]}"
        )


def _check_forward(
    model: nn.Module, plan: _Plan, calls: Sequence[_Attention], output: Tensor, images: Tensor | dict
) -> None:
    name = type(model).__name__
    seen = [id(call.site) for call in calls]
    sites = [site for frame in plan.frames for site in frame]
    for site in sites:
        if (times := seen.count(id(site))) != 1:
            raise UnsupportedModel(
                f"model: attention was seen {times} times in the {type(site.module).__name__} of {name}, expected "
                f"once; DAAM sees scaled_dot_product_attention and softmax(Q K^T) V"
            )
    size = len(images["patches"] if isinstance(images, dict) else images)
    for call in calls:
        batch, queries, keys = call.shape
        cells = math.prod(call.site.grid) if call.site.cells is None else call.site.cells.shape[1]
        if batch != size or keys != call.site.prefix + cells or queries < (call.site.queries or 1):
            raise UnsupportedModel(
                f"model: {name} attends in {batch} images from {queries} to {keys} tokens in its "
                f"{type(call.site.module).__name__}; expected were {size} images, {call.site.prefix} + {cells} tokens"
            )
    _check_output(output)
    if not output.requires_grad:
        raise UnsupportedModel(
            f"model: the output of {name} does not depend on its attention; is its forward under torch.no_grad()?"
        )


def _check_output(output: Tensor) -> None:
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModel(f"model: expected class scores or features (B, D), got an output {got}")
    if not torch.isfinite(output).all():
        raise ValueError(
            f"images: the model's output is not finite; look for NaN or inf in the images and the weights, "
            f"or for an overflow of {output.dtype}"
        )


def _check_backward(model: nn.Module, all_rows: bool, calls: Sequence[_Attention], times: int) -> None:
    name = type(model).__name__
    if any(len(call.maps) != times for call in calls):
        raise UnsupportedModel(f"model: the score of {name} does not depend on every attention that was seen")
    last = calls[-1]
    if not all_rows and last.read_queries[last.site.queries :].any():
        besides = (
            "besides the class token" if last.read_queries[: last.site.queries].any() else "and not the class token"
        )
        raise UnsupportedModel(
            f"model: the score of {name} reads the patch tokens {besides}; use a model whose head reads the class "
            f"token alone (timm: global_pool='token'){_or_all_rows(model)}"
        )
    if not torch.isfinite(torch.stack([call.maps[-1].sum() for call in calls])).all():
        raise ValueError(f"images: a gradient is not finite; look for an overflow of {calls[0].dtype}")
    remainders, allowed = torch.stack([call.remainder for call in calls]), _tolerance(calls[0].dtype)
    if not (remainders <= allowed).all():
        raise UnsupportedModel(
            f"model: the attention of {name} is not the sum of its semantic maps: they miss it by "
            f"{remainders.max().item():.2g} of its largest value, and {allowed:.2g} is allowed in {calls[0].dtype}"
        )


def _tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute the same may differ, relative to the largest value."""
    exact = torch.get_float32_matmul_precision() == "highest"  # no TF32
    return max(2e-3 if exact else 1e-2, 30 * torch.finfo(dtype).eps)


def _class_indices(target: int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None, output: Tensor) -> Tensor:
    """`(B,)` or `(B, K)` int64 on the device of the output, which has no graph."""
    batch, classes = output.shape
    if target is None:
        return output.argmax(1)
    if callable(target):
        with torch.no_grad():
            target = target(output)
    try:
        indices = torch.as_tensor(target, device=output.device)
    except (TypeError, ValueError, RuntimeError):
        indices = torch.empty(0)
    integers = indices.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not integers or not (indices.ndim == 0 or (indices.ndim <= 2 and len(indices) == batch and indices.numel())):
        got = " ".join(repr(target).split())[:60]
        raise ValueError(
            f"target: expected None, a class index, or for each of {batch} images one index (B,) or K of them (B, K), "
            f"got {got}"
        )
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise ValueError(
            f"target: class {wrong[0].item()} is out of range; the model has {classes} classes, 0..{classes - 1}"
        )
    return indices.long().expand(batch) if indices.ndim == 0 else indices.long()


def _importance_weights(importance: Tensor | Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """`(B, D)` or `(B, K, D)` in the dtype and on the device of the features."""
    b, d = features.shape
    with torch.no_grad():
        weights = importance(features) if callable(importance) else importance
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if shape not in ((d,), (b, d)) and not (len(shape) == 3 and shape[::2] == (b, d) and shape[1] > 0):
        raise ValueError(
            f"importance: expected a tensor ({d},), ({b}, {d}) or ({b}, K, {d}), the width of the features, got {shape}"
        )
    weights = weights.detach().to(features)
    if not torch.isfinite(weights).all():
        raise ValueError("importance: has NaN or infinite values")
    return weights.expand_as(features) if weights.ndim == 1 else weights


# ----------------------------------------------------------------------------------------------------------------------
# The logit lens
# ----------------------------------------------------------------------------------------------------------------------


def logit_lens(
    model: nn.Module,
    images: Tensor | dict[str, Tensor],
    rows: str = "class",
    head: bool = True,
    output: Tensor | None = None,
) -> Tensor:
    """What the model would say after every block of the flow, if that block were its last one.

    The output of every block goes through the model's own last norm and head: the logit lens (nostalgebraist 2020,
    "interpreting GPT: the logit lens"; for Vision Transformers Vilas et al., NeurIPS 2023, "Analyzing Vision
    Transformers for Image Classification in Class Embedding Space", https://arxiv.org/abs/2310.18969). It is a reading:
    no block but the last was trained to be read so, and what leads to a class may be there before it can be read.

    One forward, in which the last block hands on the outputs of all blocks as a batch of L * B images. The last reading
    is held against the model's output.

    Args:
        model: as for `attention_flow`, of a family in `_FAMILIES`; it is given back as it was.
        images: as for `attention_flow`.
        rows: "class": only the class token is handed on (and what other tokens come before the patches); "patches":
            all tokens, for models whose head reads the mean of the patches.
        head: False stops before the head.
        output: the scores, or the features, of these images where they are known (`AttentionFlow.output`); else the
            model runs once more, for the first image.

    Returns:
        `(B, L, num_classes)` scores, or without the head `(B, L, D)` features as `features(model, images)` gives them;
        in the model's dtype, without a graph.

    Raises:
        UnsupportedModel: a `ValueError`, when there is no such reading: the model is of no known family, its blocks
            differ in width or run in branches (PiT, MViTv2, CrossViT) or more than once, it has an attention pool, it
            takes a padded batch with `rows="patches"`, or the last reading is not its output.
        ValueError: as `attention_flow`; when `head` is True for a model without classifier, or `output` has another
            shape.
    """
    model = _unwrapped(model)
    name, family, plan = type(model).__name__, _family(model), _plan(model, images, rows)
    blocks = [_block_of(model, frame) for frame in plan.frames] if plan else []
    reason = (
        "is of no known family" if plan is None
        else "has blocks of several widths or branches" if family in _NO_LENS
        else "has an attention pool" if None in blocks
        else "pools a padded batch by its own mask" if rows == "patches" and isinstance(images, dict)
        else ""
    )  # fmt: skip
    if reason:
        raise UnsupportedModel(f"model: {name} {reason}; its blocks cannot be read one by one like its last one")
    if head and num_classes(model) == 0:
        raise ValueError("head: the model has no classifier; give head=False for its features")
    images, forward = _to(images, _parameter(model)), _scores if head else features
    prefix = None if rows == "patches" or family is _volo else plan.frames[0][0].prefix  # VOLO's score adds the patches
    place = 1 if family is _tnt else 0  # of the tokens, where a block gives several tensors; TNT's first are its pixels
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        tokens = output if isinstance(output, Tensor) else output[place]
        kept.append(tokens[:, :prefix].clone())

    def hand_on(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        tokens = torch.cat(kept)
        return tokens if isinstance(output, Tensor) else (*output[:place], tokens, *output[place + 1 :])

    hooks = [(block.register_forward_hook, keep) for block in blocks]
    if family is _cait:  # between its last block and its norm the patches join again
        hooks.append((model.norm.register_forward_pre_hook, lambda module, args: torch.cat(kept)))
    else:
        hooks.append((blocks[-1].register_forward_hook, hand_on))
    with torch.no_grad(), _eval_mode(model):
        with _hooks(hooks):
            readings = forward(model, images)
        output = forward(model, _first_of(images)) if output is None else output
    _check_output(output)
    if len(kept) != len(blocks):
        raise UnsupportedModel(f"model: {name} does not run every block once, as a reading after each of them needs")
    readings = readings.unflatten(0, (len(blocks), -1)).transpose(0, 1)
    last = readings[: len(output), -1]
    if output.shape != last.shape:
        raise ValueError(f"output: expected {tuple(readings[:, -1].shape)}, got {tuple(output.shape)}")
    missed = (last - output).abs().max().item()
    if not missed <= _tolerance(output.dtype) * output.abs().max().item():
        raise UnsupportedModel(
            f"model: {name} reads more than the tokens that its last block gives, each by itself: the last reading "
            f"misses its output by {missed:.2g}"
        )
    _check_output(readings.flatten(0, 1))
    return readings


def _first_of(images: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """A batch of the first image."""
    if isinstance(images, dict):
        return {name: x[:1] if isinstance(x, Tensor) else x for name, x in images.items()}
    return images[:1]


def _block_of(model: nn.Module, frame: Sequence[_Site]) -> nn.Module | None:
    """The outermost element of a list that holds all sites of a frame."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    sites = {site.module for site in frame}
    return next((block for blocks in lists for block in blocks if sites.issubset(block.modules())), None)


# ----------------------------------------------------------------------------------------------------------------------
# From maps to pictures
# ----------------------------------------------------------------------------------------------------------------------


def render(accumulated: Tensor | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Draw the flow of one image as grey levels.

    With m = max A_L: x = sigmoid(5 A_b / m) - 0.5, stretched to 0..1 block by block, heat = floor(255 x); then resized
    bilinearly. A flat map is zero.

    Args:
        accumulated: `(L, h, w)`, A_1 ... A_L of one image.
        size: `(H, W)` in pixels; None keeps the patch grid.

    Returns:
        `(L, H, W)` uint8.

    Raises:
        ValueError: when `accumulated` is not `(L, h, w)` or not finite.
    """
    if isinstance(accumulated, Tensor):
        accumulated = accumulated.detach().cpu().float().numpy()
    accumulated = np.asarray(accumulated, np.float32)
    if accumulated.ndim != 3 or accumulated.size == 0:
        raise ValueError(f"accumulated: expected the maps (L, h, w) of one image, got {accumulated.shape}")
    if not np.isfinite(accumulated).all():
        raise ValueError("accumulated: has NaN or infinite values")

    m = accumulated[-1].max()
    heat = np.zeros(accumulated.shape, np.uint8)
    for a, out in zip(accumulated, heat):
        if m > 0 and a.max() > a.min():
            x = 1 / (1 + np.exp(-5 * a / m)) - 0.5
            if x.max() > x.min():
                x = (x - x.min()) / (x.max() - x.min())
                out[:] = np.floor(255 * x)
    return heat if size is None else _resize(heat, size)


def overlay(
    image: Image.Image | np.ndarray, heat: np.ndarray, labels: Sequence[str] | None = None
) -> list[Image.Image]:
    """Lay the heat over the picture in the colours of JET: clip(0.4 colour + 0.8 image, 0, 255).

    Args:
        image: PIL image, or `(H, W, 3)` uint8 RGB.
        heat: `(L, h, w)` uint8 from `render`; resized bilinearly where it has not the size of the image.
        labels: a text for every frame, drawn in its corner (see `block_labels`).

    Returns:
        L RGB images of the size of the image.
    """
    image = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected a PIL image or an array (H, W, 3) of uint8, got {image.shape} {image.dtype}")
    if heat.ndim != 3 or heat.dtype != np.uint8 or heat.size == 0:
        raise ValueError(f"heat: expected (L, H, W) uint8 as render returns it, got {heat.shape} {heat.dtype}")
    if labels is not None and len(labels) != len(heat):
        raise ValueError(f"labels: expected one for each of {len(heat)} frames, got {len(labels)}")

    def draw(grey: np.ndarray, label: str) -> Image.Image:
        pixels = np.empty_like(image)
        for top in range(0, len(image), _BAND):  # the float64 of whole photos would not fit, on many cores
            band = slice(top, top + _BAND)
            colour = cv2.applyColorMap(grey[band], cv2.COLORMAP_JET)[..., ::-1]  # BGR -> RGB
            pixels[band] = np.clip(0.4 * colour + 0.8 * image[band], 0, 255)
        frame = Image.fromarray(pixels)
        if label:
            _write_label(frame, label)
        return frame

    return _in_threads(draw, _resize(heat, image.shape[:2]), labels or [""] * len(heat))


_BAND = 32  # rows of a picture that are blended at once


def block_labels(blocks: int) -> list[str]:
    """ "1/12", "2/12", ...: for `overlay`. They also keep GIF writers from merging two equal frames."""
    return [f"{b}/{blocks}" for b in range(1, blocks + 1)]


def side_by_side(panels: Sequence[Sequence[Image.Image]], titles: Sequence[str] | None = None) -> list[Image.Image]:
    """Put several flows of one picture beside each other, to compare classes.

    Args:
        panels: for each of K classes its L frames from `overlay`, all of one size.
        titles: a text for every class, written above its panel and cut where it is longer.

    Returns:
        L RGB images, K panels wide.

    Raises:
        ValueError: when the numbers of frames or of titles differ.
    """
    if not panels or len({len(frames) for frames in panels}) > 1:
        raise ValueError(f"panels: expected as many frames of every class, got {[len(frames) for frames in panels]}")
    if titles is not None and len(titles) != len(panels):
        raise ValueError(f"titles: expected one for each of {len(panels)} classes, got {len(titles)}")
    w, h = panels[0][0].size
    height = _text_height((w, h))
    font, gap, top = ImageFont.load_default(height), max(2, height // 3), 0 if titles is None else 3 * height // 2
    page = Image.new("RGB", (len(panels) * (w + gap) - gap, top + h), "white")
    for k, title in enumerate(titles or ()):
        ImageDraw.Draw(page).text(
            (k * (w + gap) + w / 2, top / 2), shortened(title, font, w), "black", font, anchor="mm"
        )
    pages = [page.copy() for _ in panels[0]]
    for k, frames in enumerate(panels):
        for page, frame in zip(pages, frames):
            page.paste(frame, (k * (w + gap), top))
    return pages


def sheet(
    image: Image.Image, frames: Sequence[Image.Image], caption: str = "", columns: int = 4, side: int = 288
) -> Image.Image:
    """All blocks at a glance: the picture with its caption on the left, the frames beside it, row by row.

    Args:
        image: the picture.
        frames: from `overlay`, or from `side_by_side`; drawn in the scale of the picture.
        caption: a few short lines, drawn below the picture.
        columns: frames in a row.
        side: the longer side of the picture in pixels.

    Returns:
        One RGB image.
    """
    scale = side / max(image.size)
    (w, h), (frame_w, frame_h) = ([max(1, round(scale * x)) for x in size] for size in (image.size, frames[0].size))
    gap, left, rows = 8, max(w, side), math.ceil(len(frames) / columns)
    step = frame_w + (gap if frame_w == w else 3 * gap)  # wider than the gap between the panels of a frame
    lines = 24 * len(caption.splitlines())
    height = max(rows * (frame_h + gap), h + gap + lines) + gap
    page = Image.new("RGB", (left + 3 * gap + (min(columns, len(frames)) - 1) * step + frame_w, height), "white")
    page.paste(image.convert("RGB").resize((w, h), Image.Resampling.LANCZOS), (gap, gap))
    ImageDraw.Draw(page).multiline_text((gap, h + 2 * gap), caption, "black", ImageFont.load_default(17), spacing=7)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        corner = (left + 2 * gap + column * step, gap + row * (frame_h + gap))
        page.paste(frame.resize((frame_w, frame_h), Image.Resampling.LANCZOS), corner)
    return page


def evolution_picture(
    frames: Sequence[Sequence[Image.Image]],
    curves: Sequence[tuple[str, Sequence[float]]],
    shares: Sequence[Sequence[float]],
    leaders: Sequence[str],
    leads_from: int | None = None,
    quantity: str = "probability",
    note: str = "",
) -> Image.Image:
    """How the decision forms: the maps of all blocks; below them, column by column, what `logit_lens` reads after the
    block, and how much the block adds to the map.

    Args:
        frames: for each of K explained classes its L frames from `overlay`, without labels; drawn small, a row a class.
        curves: name and L values, 0..1, of the K explained classes in their order, then of others to compare with.
        shares: for each of K classes what every block adds to the accumulated map, L values, 0..1.
        leaders: after each of L blocks the name of the class with the largest value of all.
        leads_from: the block, from 1 on, from which one of the explained classes leads all others until the end; None
            when none of them leads at the end.
        quantity: what the values are.
        note: written below.

    Returns:
        One RGB image, about 1,500 pixels wide; wider for more than 15 blocks.

    Raises:
        ValueError: when there are not L frames, values and shares of every class and L leaders, or `leads_from` is no
            block.
    """
    several, blocks = len(frames), len(frames[0]) if frames else 0
    counts = [[*map(len, frames)], [len(values) for _, values in curves], [*map(len, shares)], [len(leaders)]]
    if not blocks or {n for count in counts for n in count} != {blocks} or not several == len(shares) <= len(curves):
        raise ValueError(f"frames: expected of every class as many as values, shares and leaders, got {counts}")
    if leads_from is not None and not 1 <= leads_from <= blocks:
        raise ValueError(f"leads_from: expected None or a block, 1 to {blocks}, got {leads_from}")

    names = [name if len(name) <= 20 else f"{name[:19]}…" for name, _ in curves]
    leader = max(range(several), key=lambda k: curves[k][1][-1])
    colours = [_CLASS_COLOURS[k % len(_CLASS_COLOURS)] for k in range(several)] + [_GREY] * (len(curves) - several)
    column = max(72, 1092 // blocks)
    left, right, width = 240, 240 + blocks * column, 240 + blocks * column + 230
    scale = min((column - 6) / frames[0][0].width, 160 / frames[0][0].height)
    w, h = (max(1, round(scale * side)) for side in frames[0][0].size)
    maps = 120  # y, from above, of what is drawn: the maps, the curves from 100 % to 0, the bars, the note
    top = maps + max(30, several * (h + 6)) + 46
    bottom, floor, below = top + 270, top + 270 + 180, top + 270 + 180 + 24
    notes = textwrap.wrap(note, int(width / 7.5))

    page = Image.new("RGB", (_FINE * width, _FINE * (below + 24 * len(notes) + 16)), "white")
    pen, font_of = ImageDraw.Draw(page), cache(ImageFont.load_default)

    def text(x: float, y: float, words: str, size: int = 16, colour: str = _INK, anchor: str = "lm", most: int = 0):
        font = font_of(_FINE * size)
        words = shortened(words, font, _FINE * most) if most else words
        pen.text((_FINE * x, _FINE * y), words, colour, font, anchor=anchor)

    def line(*points: tuple[float, float], thickness: float = 1, colour: str = _PALE):
        pen.line([(_FINE * x, _FINE * y) for x, y in points], colour, round(_FINE * thickness), "curve")

    def box(x: float, y: float, x2: float, y2: float, colour: str):
        pen.rectangle((_FINE * x, _FINE * y, _FINE * x2, _FINE * y2), colour)

    def heading(y: float, title: str, *lines: str):
        text(24, y, title, 19)
        for i, words in enumerate(lines, 1):
            text(24, y + 3 + 21 * i, words, 15, _GREY)

    centres = [left + (b + 0.5) * column for b in range(blocks)]
    if leads_from is not None:
        start = left + (leads_from - 1) * column
        box(start, maps - 34, right, floor, _TINT)
        line((start, maps - 34), (start, floor), thickness=2, colour=colours[leader])
        said = f"{names[leader]} leads from block {leads_from} on"
        fits = font_of(17).getlength(said) < width - start - 16
        text(start + 8 if fits else start - 8, top - 24, said, 17, colours[leader], "lm" if fits else "rm")

    text(24, 34, "How the decision forms, block by block", 28)
    ends = [f"{name}: {_percent(values[-1])}" for name, (_, values) in zip(names, curves)]
    verdict = (
        f"{names[leader]} leads all other classes from block {leads_from} of {blocks} on"
        if leads_from is not None
        else "No explained class leads at the end"
        if several > 1
        else f"{names[0]} does not lead at the end"
    )
    text(24, 68, f"{verdict}. {quantity.capitalize()} after the last block: {', '.join(ends)}.", 18, most=width - 48)

    heading(maps + 8, "What counts so far", "the map accumulated", "up to each block:", "blue little, red much")
    for b, x in enumerate(centres, 1):
        text(x, maps - 18, f"block {b}", 15, anchor="mm")
    for k, row in enumerate(frames):
        for x, frame in zip(centres, row):
            small = frame.resize((_FINE * w, _FINE * h), Image.Resampling.LANCZOS)
            page.paste(small, (round(_FINE * (x - w / 2)), _FINE * (maps + k * (h + 6))))
        text(right + 12, maps + k * (h + 6) + h / 2, names[k], 17, colours[k], most=width - right - 20)

    thin = ["thin line: the runner-up"] if len(curves) > several else []
    heading(top + 8, "What it would say", quantity, "of the class, if this", "block were the last one", *thin)
    for percent in range(0, 101, 25):
        y = bottom + (top - bottom) * percent / 100
        line((left, y), (right, y))
        if percent % 50 == 0:
            text(left - 8, y, f"{percent} %", 14, _GREY, "rm")
    for k in reversed(range(len(curves))):
        thickness, radius = (4, 6) if k < several else (2, 3.5)
        points = [(x, bottom + (top - bottom) * value) for x, value in zip(centres, curves[k][1])]
        line(*points, thickness=thickness, colour=colours[k])
        for x, y in points:
            pen.ellipse([_FINE * side for side in (x - radius, y - radius, x + radius, y + radius)], colours[k])
    text(left - 8, bottom + 30, "the class that leads", 14, _GREY, "rm")
    for x, name in zip(centres, leaders):
        colour = next((c for (other, _), c in zip(curves, colours) if other == name), _GREY)
        text(x, bottom + 30, name, 14, colour, "mm", most=column - 6)
    ys = _apart([bottom + (top - bottom) * values[-1] for _, values in curves], 22, top, bottom)
    for end, y, colour in zip(ends, ys, colours):
        text(right + 12, y, end, 17, colour, most=width - right - 20)

    heading(bottom + 76, "What the block adds", "its share of the map", "after the last block")
    line((left, floor), (right, floor))
    wide, highest = min(0.7 * column, 100) / several, max(1e-9, *(share for row in shares for share in row))
    for k, row in enumerate(shares):
        for x, share in zip(centres, row):
            begin, y = x + (k - several / 2) * wide, floor - 90 * share / highest
            box(begin + 1, y, begin + wide - 1, floor, colours[k])
            if wide > 40:
                text(begin + wide / 2, y - 11, _percent(share), 14, anchor="mm")
    for i, words in enumerate(notes):
        text(24, below + 12 + 24 * i, words, 15, _GREY)
    return page.reduce(_FINE)


_FINE = 2  # times larger than it is returned is the page drawn, which smooths its lines
_INK, _GREY, _PALE, _TINT = "#1f2933", "#6b7785", "#d9dee4", "#fdf1de"
_CLASS_COLOURS = ("#c8500a", "#2563c9", "#0c8a5b", "#b0278f", "#8a6d00", "#c8102e", "#00838f", "#6a4fc4", "#5c7a1f",
                  "#8c4a32")  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or share == 0 else "< 1 %"


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved until neighbours are a gap apart; within the bounds while there is room, their order kept."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for i, place in enumerate(order):
        moved[place] = max(places[place], moved[order[i - 1]] + gap if i else low)
    for i, place in reversed([*enumerate(order, 1)]):
        moved[place] = min(moved[place], moved[order[i]] - gap if i < len(order) else high)
    return moved


def save_gif(frames: Sequence[Image.Image], path: str | os.PathLike, duration: int | Sequence[int] = 400) -> None:
    """Write an animated GIF that repeats for ever; the file appears whole or not at all.

    Args:
        frames: RGB images of one size. Equal neighbours become one frame that lasts longer; labels prevent that.
        path: where; an older file is replaced.
        duration: milliseconds a frame, one number or one a frame (GIF counts in hundredths of a second).

    Raises:
        ValueError: when there are no frames, or they are larger than a GIF can be, 65,535 pixels a side.
    """
    if not frames:
        raise ValueError("frames: there are none")
    w, h = frames[0].size
    if max(w, h) > 65_535:
        raise ValueError(f"frames: a GIF has 65,535 pixels a side at most, got {w} x {h}; make them smaller")
    palettes = _in_threads(_quantized, frames)
    with whole_file(path) as part:
        palettes[0].save(
            part,
            "GIF",
            save_all=True,
            append_images=palettes[1:],
            duration=duration,
            loop=0,
            optimize=False,
            disposal=1,
        )


def _quantized(frame: Image.Image, pixels: int = 10_000) -> Image.Image:
    """In 256 colours: the median cut of every few of its pixels with five bits a channel, and one step of k-means;
    closer than the median cut of all pixels, in a tenth of the time."""
    step = max(1, math.isqrt(frame.width * frame.height // pixels))
    coarse = (np.asarray(frame)[::step, ::step] & 0b11111000) + 0b100
    colours = Image.fromarray(coarse).quantize(256, kmeans=1)
    return frame.quantize(palette=colours, dither=Image.Dither.NONE)


def _in_threads(function: Callable, *arguments: Sequence) -> list:
    """As `map`, on all cores: Pillow lets other threads run while it computes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *arguments))


def _resize(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(L, h, w)` uint8 -> `(L, H, W)` uint8, bilinear."""
    h, w = size
    if heat.shape[1:] == (h, w):
        return heat
    return np.stack([cv2.resize(grey, (w, h), interpolation=cv2.INTER_LINEAR) for grey in heat])


def _text_height(size: tuple[int, int]) -> int:
    """Of what is written on frames of this size, in pixels."""
    return max(10, min(size) // 14)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or its beginning and "…" where it is wider than so many pixels."""
    while text.strip("…") and font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _write_label(frame: Image.Image, text: str) -> None:
    height = _text_height(frame.size)
    font, margin = ImageFont.load_default(height), height // 3
    draw = ImageDraw.Draw(frame)
    draw.text((margin, margin), text, "white", font, stroke_width=max(1, height // 10), stroke_fill="black")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def save_flow(
    directory: str | os.PathLike,
    image: Image.Image,
    flow: AttentionFlow,
    index: int = 0,
    caption: str = "",
    manifest: dict | None = None,
    duration: int = 400,
    pictures: dict[str, Image.Image | Callable[[], Image.Image]] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Write the flow of one image as a folder.

        flow.gif                one frame a block; the last one stays three times as long
        frames/block_01.png ... the same frames, lossless
        sheet.png               the picture and all frames at a glance
        maps.npz                `block_maps` and `accumulated` (L, h, w), `output` (num_classes,), all float32
        flow.json               the manifest

    Of K classes the maps are (K, L, h, w), and every frame has K panels beside each other. Files appear under their
    names when all of them are whole; other files in the folder stay.

    Args:
        directory: the folder; made where it is missing.
        image: the picture; the frames, or the panels of a frame, have its size.
        flow: from `attention_flow`.
        index: which image of the batch.
        caption: a few lines for the sheet.
        manifest: what else belongs into flow.json, ready for `json.dump`.
        duration: milliseconds a frame.
        pictures: more pictures for the folder, by file name; or what draws them, while the others are written.
        titles: of K classes, their names, written above the panels.

    Returns:
        The folder.
    """
    directory = Path(directory).absolute()
    accumulated = flow.accumulated[index]
    *classes, blocks, h, w = accumulated.shape
    panels = [overlay(image, render(a), block_labels(blocks)) for a in accumulated.reshape(-1, blocks, h, w)]
    frames = side_by_side(panels, titles) if classes else panels[0]
    columns = max(1, min(4, 6 // len(panels)))
    maps = {"block_maps": flow.block_maps[index], "accumulated": accumulated, "output": flow.output[index]}
    manifest = (manifest or {}) | {"blocks": blocks, "grid": [h, w]}

    part = _part_of(directory)

    def draw(name: str, picture: Image.Image | Callable[[], Image.Image]) -> None:
        (picture() if callable(picture) else picture).save(part / name, compress_level=1)

    drawn = {"sheet.png": partial(sheet, image, frames, caption, columns)} | (pictures or {})
    drawn |= {f"frames/block_{b:02d}.png": frame for b, frame in enumerate(frames, 1)}
    gif = partial(save_gif, frames, part / "flow.gif", [duration] * (blocks - 1) + [3 * duration])
    try:
        (part / "frames").mkdir(parents=True)
        _in_threads(lambda write: write(), [gif, *(partial(draw, *named) for named in drawn.items())])
        np.savez(part / "maps.npz", **{name: m.detach().float().cpu().numpy() for name, m in maps.items()})
        (part / "flow.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (directory / "frames").mkdir(parents=True, exist_ok=True)
        files = [p for p in part.rglob("*") if p.is_file()]
        for file in sorted(files, key=lambda p: p.name == "flow.json"):  # the manifest last
            os.replace(file, directory / file.relative_to(part))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end of the `with`, deleted after an exception."""
    path = Path(path)
    part = _part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
