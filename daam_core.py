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
    T_b = sum_j S_b[j]                          (B, C)        what the attention hands to `attn.proj` at the class token
    C_b = dY / dT_b                             (B, C)        importance coefficients
    L_b[j] = ReLU(sum_c w(C_b)_c S_b[j, c])     (B, h, w)     map of the block, over the patch tokens
    A_b = L_1 + ... + L_b                       (B, h, w)     the attention flow

Y is the class score and w = ReLU; or, for a model without classifier, the gradient pushed back from the feature is a
vector of dimension-wise importance and w = identity.

How it is computed: while the model runs, a `TorchFunctionMode` sees every `scaled_dot_product_attention` with its q, k
and v (after every norm, bias and rotation) and its output, which is T for all tokens. One backward, for activations
only, brings dY/dT_b; L_b is computed the moment it arrives, from k, v (kept by the graph anyway) and the class token's
row of q. No N x N matrix and no (B, N, C) map is made, attention stays fused, and the model is left as it was.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "AttentionFlow",
    "UnsupportedModel",
    "attention_flow",
    "block_labels",
    "overlay",
    "render",
    "save_flow",
    "save_gif",
    "sheet",
    "whole_file",
]


# ----------------------------------------------------------------------------------------------------------------------
# The flow
# ----------------------------------------------------------------------------------------------------------------------


class UnsupportedModel(ValueError):
    """The decomposition is not defined for this model, or its attention cannot be seen."""


@dataclass(frozen=True)
class AttentionFlow:
    """What `attention_flow` returns; all tensors are on the model's device and carry no graph."""

    block_maps: Tensor
    """`(B, L, h, w)` float32: L_b of every block, never negative, as computed (also with `norm=True`)."""
    accumulated: Tensor
    """`(B, L, h, w)` float32: A_b, the running sum over blocks; `accumulated[:, -1]` is the final explanation."""
    output: Tensor
    """`(B, K)` class scores (logits), or the `(B, D)` features when `importance` was given; in the model's dtype."""
    target: Tensor | None
    """`(B,)` explained class indices, int64; None when `importance` was given."""


def attention_flow(
    model: nn.Module,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    importance: Tensor | Callable[[Tensor], Tensor] | None = None,
    norm: bool = False,
) -> AttentionFlow:
    """Decompose the class token in every block of a Vision Transformer, weight the maps and accumulate them.

    Args:
        model: a timm `VisionTransformer` (or a model with its attributes) whose head reads the class token. It runs in
            eval mode and is given back as it was, also after an exception. Threads may explain several models at once,
            or share one that is in eval mode.
        images: `(B, 3, H, W)`, floating point and normalised as the model wants them; moved to its device and dtype.
        target: the class to explain: None for each image's predicted class, one index for all, or one per image.
        importance: explains the feature (timm's `pre_logits`, `(B, D)`) instead of a class score: a `(D,)` or `(B, D)`
            tensor, or a callable that makes one of the features. Models without a classifier need it.
        norm: min-max normalise every L_b, image by image, before it is added to the flow.

    Returns:
        An `AttentionFlow`, one map a block for every image.

    Raises:
        UnsupportedModel: a `ValueError`, when the model has no class token, its head does not read it, or its attention
            cannot be seen.
        ValueError: when `images` have the wrong rank, size, channels or dtype, a class is out of range, `importance`
            does not fit the features, or the output is not finite. Always one line that names the argument first.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the eager module there
    grid = _patch_grid(model, images)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    images = images.to(parameter.device, parameter.dtype)
    if importance is None and getattr(model, "num_classes", None) == 0:
        raise ValueError("importance: the model has no classifier (num_classes=0); give the importance of its features")
    if importance is not None and target is not None:
        raise ValueError("target: cannot be explained together with importance; give one of the two")
    w = torch.relu if importance is None else lambda c: c

    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(model):
        with _AttentionWatch(model.num_prefix_tokens + math.prod(grid), w) as watch:
            if importance is None:
                output = model(images)
            else:
                output = model.forward_head(model.forward_features(images), pre_logits=True)
        _check_forward(model, watch.calls, output)
        if importance is None:
            target = _class_indices(target, output)
            seed = F.one_hot(target, output.shape[1]).to(output)
        else:
            seed = _importance_weights(importance, output.detach())
        torch.autograd.grad(output, watch.leaves, seed, allow_unused=True)
    if watch.calls[-1].class_token_unread:
        raise UnsupportedModel(
            f"model: the score of {type(model).__name__} does not read the class token of the last block; "
            f"use a model whose head reads it (timm: global_pool='token')"
        )

    patches = slice(model.num_prefix_tokens, None)
    block_maps = torch.stack([call.map[:, patches].unflatten(1, grid) for call in watch.calls], dim=1)
    summands = _min_max(block_maps) if norm else block_maps
    return AttentionFlow(block_maps, summands.cumsum(1), output.detach(), target)


class _AttentionWatch(TorchFunctionMode):
    """Sees every attention over the whole sequence of tokens that the current thread computes inside the `with`.

    Parameters reach every function detached, so that the graph holds what the activations need and no more. It begins
    at the output of the first attention, which becomes a leaf.
    """

    def __init__(self, num_tokens: int, w: Callable[[Tensor], Tensor]):
        super().__init__()
        self.num_tokens, self.w = num_tokens, w
        self.calls: list[_Attention] = []
        self.leaves: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [a.detach() if isinstance(a, nn.Parameter) else a for a in args]
        kwargs = {k: a.detach() if isinstance(a, nn.Parameter) else a for k, a in (kwargs or {}).items()}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = _Attention(self.w, *args, **kwargs)
            if call.query.ndim == 4 and call.query.shape[-2] == call.key.shape[-2] == self.num_tokens:
                if not self.leaves or not output.requires_grad:
                    output = output.detach().requires_grad_()
                    self.leaves.append(output)
                output.register_hook(call.receive)
                self.calls.append(call)
        return output


class _Attention:
    """One call of `scaled_dot_product_attention`, built from its arguments; q, k, v are `(B, H, N, d)`.

    `map` `(B, N)` float32 is L_b over all tokens, as soon as `receive` has run.
    """

    def __init__(
        self, w, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        self.w, self.mask, self.is_causal = w, attn_mask, is_causal
        self.query, self.key, self.value = query.detach(), key.detach(), value.detach()
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        self.map = query.new_zeros(query.shape[0], query.shape[-2], dtype=torch.float32)  # stays so where Y ignores T
        self.class_token_unread = True

    def class_row(self) -> Tensor:
        """a_b, `(B, H, N)` float32: how the class token's attention is spread over all tokens; sums to one."""
        key = self.key.repeat_interleave(self.groups, -3) if self.groups > 1 else self.key
        logits = (key.float() @ self.query[..., 0, :, None].float()).squeeze(-1) * self.scale  # (B, H, N)
        if self.mask is not None:
            row = self.mask[..., 0, :].detach()
            logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row.float()
        if self.is_causal:
            logits[..., 1:] = -torch.inf
        return logits.softmax(-1)

    def receive(self, gradient: Tensor) -> None:
        """The hook: turns dY/dT `(B, H, N, d)` into `map` and lets q, k and v go."""
        coefficients = gradient[..., 0, :]  # C_b (B, H, d)
        self.class_token_unread = ~coefficients.any() & gradient.any()
        with torch.autocast(gradient.device.type, enabled=False):
            value = self.value.repeat_interleave(self.groups, -3) if self.groups > 1 else self.value
            weights = self.w(coefficients.float()).unsqueeze(-1)  # w(C_b) (B, H, d, 1)
            weighted = (value.float() @ weights).squeeze(-1)  # sum_d w(C)_d V_jd (B, H, N)
            self.map = (self.class_row() * weighted).sum(1).relu()
        del self.query, self.key, self.value, self.mask


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, without timm's checkpointing (its second forward would not be watched); every flag is put back."""
    flags = [(m, name) for m in model.modules() for name in ("training", "grad_checkpointing") if m.__dict__.get(name)]
    try:
        for module, name in flags:
            setattr(module, name, False)
        yield
    finally:
        for module, name in flags:
            setattr(module, name, True)


def _min_max(maps: Tensor) -> Tensor:
    """Every `(h, w)` map stretched to 0..1; a flat one becomes zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What can be explained, and what cannot
# ----------------------------------------------------------------------------------------------------------------------


def _patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """`(h, w)` of the patch grid; refuses models and images for which the decomposition is not defined."""
    name = type(model).__name__
    if getattr(model, "cls_token", None) is None:
        raise UnsupportedModel(
            f"model: {name} has no class token; DAAM needs a Vision Transformer whose score reads one"
        )
    if getattr(model, "dist_token", None) is not None:
        raise UnsupportedModel(
            f"model: the score of {name} reads two tokens, class and distillation; use one without the latter"
        )
    parts = all(hasattr(model, part) for part in ("patch_embed", "num_prefix_tokens", "blocks", "forward_head"))
    if not parts or not all(hasattr(model.patch_embed, part) for part in ("feat_ratio", "dynamic_feat_size")):
        raise UnsupportedModel(
            f"model: {name} is not built like a timm VisionTransformer (patch_embed, blocks, forward_head)"
        )
    if getattr(model, "global_pool", "token") != "token":
        raise UnsupportedModel(
            f"model: {name} has a class token, but global_pool={model.global_pool!r} does not read it; "
            f"build it with global_pool='token' if its weights were trained so"
        )

    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor (B, 3, H, W) with B > 0, got {shape}")
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected normalised floating point values, got {images.dtype}; apply the model's transform"
        )
    embed, (channels, *size) = model.patch_embed, images.shape[1:]
    wanted = getattr(embed, "in_chans", None) or getattr(getattr(embed, "proj", None), "in_channels", channels)
    if channels != wanted:
        raise ValueError(f"images: the model takes {wanted} channels, got {channels}")
    if getattr(embed, "strict_img_size", False) and embed.img_size and tuple(size) != tuple(embed.img_size):
        raise ValueError(
            "images: the model takes {} x {} pixels, got {} x {}; resize them, "
            "or build the model with dynamic_img_size=True".format(*embed.img_size, *size)
        )
    patch = embed.feat_ratio(as_scalar=False)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if not getattr(embed, "dynamic_img_pad", False) and any(s < p or s % p for s, p in zip(size, patch)):
        raise ValueError("images: {} x {} pixels are not a multiple of the patch, {} x {}".format(*size, *patch))
    return tuple(embed.dynamic_feat_size(tuple(size)))


def _check_forward(model: nn.Module, calls: Sequence[_Attention], output: Tensor) -> None:
    if len(calls) != len(model.blocks):
        raise UnsupportedModel(
            f"model: attention was seen {len(calls)} times in {len(model.blocks)} blocks; DAAM watches one call of "
            f"scaled_dot_product_attention a block (timm: timm.layers.set_fused_attn(True) before the model is built, "
            f"where its attention has a fused form)"
        )
    if not output.requires_grad:
        raise UnsupportedModel(
            f"model: the output of {type(model).__name__} does not depend on its attention; "
            f"is its forward under torch.no_grad()?"
        )
    if output.ndim != 2:
        raise UnsupportedModel(f"model: expected class scores or features (B, D), got an output {tuple(output.shape)}")
    if not torch.isfinite(output).all():
        raise ValueError(
            f"images: the model's output is not finite; look for NaN or inf in the images and the weights, "
            f"or for an overflow of {output.dtype}"
        )


def _class_indices(target: int | Sequence[int] | Tensor | None, output: Tensor) -> Tensor:
    """`(B,)` int64 on the output's device."""
    batch, classes = output.shape
    if target is None:
        return output.detach().argmax(1)
    try:
        indices = torch.as_tensor(target, device=output.device)
    except (TypeError, ValueError, RuntimeError):
        indices = torch.empty(0)
    if indices.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64) or indices.shape not in ((), (batch,)):
        got = " ".join(repr(target).split())[:60]
        raise ValueError(f"target: expected None, a class index or one index for each of {batch} images, got {got}")
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise ValueError(
            f"target: class {wrong[0].item()} is out of range; the model has {classes} classes, 0..{classes - 1}"
        )
    return indices.long().expand(batch)


def _importance_weights(importance: Tensor | Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """`(B, D)` in the dtype and on the device of the features."""
    b, d = features.shape
    with torch.no_grad():
        weights = importance(features) if callable(importance) else importance
    if not isinstance(weights, Tensor) or weights.shape not in ((d,), (b, d)):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"importance: expected a tensor ({d},) or ({b}, {d}), the width of the features, got {got}")
    weights = weights.detach().to(features)
    if not torch.isfinite(weights).all():
        raise ValueError("importance: has NaN or infinite values")
    return weights.expand_as(features)


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

    frames = []
    for b, grey in enumerate(_resize(heat, image.shape[:2])):
        colour = cv2.applyColorMap(grey, cv2.COLORMAP_JET)[..., ::-1]  # BGR -> RGB
        frame = Image.fromarray(np.clip(0.4 * colour + 0.8 * image, 0, 255).astype(np.uint8))
        if labels is not None:
            _write_label(frame, labels[b])
        frames.append(frame)
    return frames


def block_labels(blocks: int) -> list[str]:
    """ "1/12", "2/12", ...: for `overlay`. They also keep GIF writers from merging two equal frames."""
    return [f"{b}/{blocks}" for b in range(1, blocks + 1)]


def sheet(
    image: Image.Image, frames: Sequence[Image.Image], caption: str = "", columns: int = 4, side: int = 288
) -> Image.Image:
    """All blocks at a glance: the picture with its caption on the left, the frames beside it, row by row.

    Args:
        image: the picture.
        frames: from `overlay`.
        caption: a few short lines, drawn below the picture.
        columns: frames in a row.
        side: the longer side of a frame in pixels.

    Returns:
        One RGB image.
    """
    w, h = (max(1, round(length * side / max(image.size))) for length in image.size)
    gap, left, rows = 8, max(w, side), math.ceil(len(frames) / columns)
    lines = 24 * len(caption.splitlines())
    height = max(rows * (h + gap), h + gap + lines) + gap
    page = Image.new("RGB", (left + min(columns, len(frames)) * (w + gap) + 2 * gap, height), "white")
    page.paste(image.convert("RGB").resize((w, h), Image.Resampling.LANCZOS), (gap, gap))
    ImageDraw.Draw(page).multiline_text((gap, h + 2 * gap), caption, "black", ImageFont.load_default(17), spacing=7)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        corner = (left + 2 * gap + column * (w + gap), gap + row * (h + gap))
        page.paste(frame.resize((w, h), Image.Resampling.LANCZOS), corner)
    return page


def save_gif(frames: Sequence[Image.Image], path: str | os.PathLike, duration: int | Sequence[int] = 400) -> None:
    """Write an animated GIF that repeats for ever; the file appears whole or not at all.

    Args:
        frames: RGB images of one size. Equal neighbours become one frame that lasts longer; labels prevent that.
        path: where; an older file is replaced.
        duration: milliseconds a frame, one number or one a frame (GIF counts in hundredths of a second).

    Raises:
        ValueError: when there are no frames.
    """
    if not frames:
        raise ValueError("frames: there are none")
    palettes = [frame.quantize(256) for frame in frames]
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


def _resize(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(L, h, w)` uint8 -> `(L, H, W)` uint8, bilinear."""
    h, w = size
    if heat.shape[1:] == (h, w):
        return heat
    return np.stack([cv2.resize(grey, (w, h), interpolation=cv2.INTER_LINEAR) for grey in heat])


def _write_label(frame: Image.Image, text: str) -> None:
    height = max(10, min(frame.size) // 14)
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
    pictures: dict[str, Image.Image] | None = None,
) -> Path:
    """Write the flow of one image as a folder.

        flow.gif                one frame a block; the last one stays three times as long
        frames/block_01.png ... the same frames, lossless
        sheet.png               the picture and all frames at a glance
        maps.npz                `block_maps` and `accumulated` (L, h, w), `output` (K,), all float32
        flow.json               the manifest

    Files appear under their names when all of them are whole; other files in the folder stay.

    Args:
        directory: the folder; made where it is missing.
        image: the picture; the frames have its size.
        flow: from `attention_flow`.
        index: which image of the batch.
        caption: a few lines for the sheet.
        manifest: what else belongs into flow.json, ready for `json.dump`.
        duration: milliseconds a frame.
        pictures: more pictures for the folder, by file name.

    Returns:
        The folder.
    """
    directory = Path(directory).absolute()
    accumulated = flow.accumulated[index]
    blocks, h, w = accumulated.shape
    frames = overlay(image, render(accumulated), block_labels(blocks))
    maps = {"block_maps": flow.block_maps[index], "accumulated": accumulated, "output": flow.output[index]}
    manifest = (manifest or {}) | {"blocks": blocks, "grid": [h, w]}

    part = _part_of(directory)
    try:
        (part / "frames").mkdir(parents=True)
        save_gif(frames, part / "flow.gif", [duration] * (blocks - 1) + [3 * duration])
        for b, frame in enumerate(frames, 1):
            frame.save(part / "frames" / f"block_{b:02d}.png")
        sheet(image, frames, caption).save(part / "sheet.png")
        for name, picture in (pictures or {}).items():
            picture.save(part / name)
        np.savez(part / "maps.npz", **{name: m.detach().float().cpu().numpy() for name, m in maps.items()})
        (part / "flow.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
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
