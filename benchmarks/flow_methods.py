"""Methods that `benchmarks/flow.py` measures: model -> (images `(B, 3, H, W)` -> maps)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from daam_core import attention_flow

Explain = Callable[[Tensor], Any]


def forward(model: VisionTransformer) -> Explain:
    """Run the model without a graph."""
    return torch.inference_mode()(model)


def forward_backward(model: VisionTransformer) -> Explain:
    """Compute the gradient of the score for the images alone: the least that a gradient of activations costs."""
    model.requires_grad_(False)

    def explain(images: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        return torch.autograd.grad(model(images).amax(1).sum(), images)[0]

    return explain


def ours(model: VisionTransformer, **options: Any) -> Explain:
    """Compute the attention flow with options of `attention_flow`."""
    return lambda images: attention_flow(model, images, **options).accumulated


def ours_one_by_one(model: VisionTransformer) -> Explain:
    """Compute the attention flow of one image after the other."""
    explain = ours(model, memory="fast")
    return lambda images: torch.cat([explain(image) for image in images.split(1)])


def daam_timm_vit(model: VisionTransformer) -> Explain:
    """Compute the same maps with the package daam-timm-vit."""
    from daam import DAAM

    def explain(images: Tensor) -> Tensor:
        with DAAM(model) as daam:
            return daam(images).maps

    return explain


def published(model: VisionTransformer) -> Explain:
    """Follow the published algorithm step by step, without mixing images.

    In every block the attention matrix of all tokens is computed in the open, and once more, without a graph, for the
    semantic spatial map S `(B, N, C)` of the class token. The score is sent back to every weight.
    """
    S: list[Tensor] = []
    T: list[Tensor] = []

    def attention(module: Attention, x: Tensor, **_: Any) -> Tensor:
        def matrix_and_values() -> tuple[Tensor, Tensor]:
            q, k, v = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
            return (q @ k.mT * module.scale).softmax(-1), v

        matrix, v = matrix_and_values()
        T.append((matrix @ v).transpose(1, 2).flatten(2))  # (B, N, C)
        T[-1].retain_grad()
        with torch.no_grad():
            matrix, v = matrix_and_values()
            S.append((matrix[:, :, 0, :, None] * v).transpose(1, 2).flatten(2))
        return module.proj(T[-1])

    for block in model.blocks:
        block.attn.forward = partial(attention, block.attn)

    def explain(images: Tensor) -> Tensor:
        S.clear(), T.clear()
        model.zero_grad()
        model(images).amax(1).sum().backward()
        maps = [torch.einsum("bnc,bc->bn", s, t.grad[:, 0].relu()).relu() for s, t in zip(S, T)]
        S.clear(), T.clear()
        patches = torch.stack(maps, 1)[..., model.num_prefix_tokens :]
        return patches.unflatten(2, model.patch_embed.grid_size).cumsum(1)

    return explain


def grad_cam(model: VisionTransformer) -> Explain:
    """Compute Grad-CAM of the last block's first norm, with gradients of all weights, as its documentation does."""
    from pytorch_grad_cam import GradCAM

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, model.patch_embed.grid_size)

    def explain(images: Tensor) -> Tensor:
        with GradCAM(model, [model.blocks[-1].norm1], reshape_transform=grid) as cam:
            return torch.from_numpy(cam(images, targets=None))

    return explain


def legrad(model: VisionTransformer) -> Explain:
    """Compute LeGrad of the last four blocks, as its documentation does, for the twin of torchvision.

    torch-cam needs blocks with an nn.MultiheadAttention, which models of timm do not have.
    """
    from torchcam.methods import LeGrad

    block = model.blocks[0]
    twin = torchvision.models.VisionTransformer(
        model.patch_embed.img_size[0], model.patch_embed.patch_size[0], len(model.blocks), block.attn.num_heads,
        model.embed_dim, block.mlp.fc1.out_features, num_classes=model.num_classes,
    ).to(next(model.parameters())).eval()  # fmt: skip

    def explain(images: Tensor) -> Tensor:
        with LeGrad(twin, list(twin.encoder.layers)[-4:]) as extract:
            return extract(twin(images).argmax(1).tolist())[0]

    return explain


def rollout(model: VisionTransformer) -> Explain:
    """Multiply 0.5 A + 0.5 I over the blocks, with A `(B, N, N)` the mean over the heads.

    Abnar and Zuidema, "Quantifying attention flow in transformers", ACL 2020.
    """
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, matrix: seen.append(matrix.mean(1)))

    @torch.inference_mode()
    def explain(images: Tensor) -> Tensor:
        seen.clear()
        model(images)
        row = torch.eye(seen[0].shape[-1]).to(seen[0])[:1].expand(len(images), 1, -1)  # (B, 1, N), of the class token
        while seen:
            row = 0.5 * row @ seen.pop() + 0.5 * row  # from the last block to the first
        return row[:, 0, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)

    return explain


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    make: Callable[[VisionTransformer], Explain]
    what: str
    """Text of the notes below the table."""
    package: str | None = None
    """The package of the extra [bench] that it needs."""
    matrices: float = 0
    """The share of the blocks whose attention matrices `(B, H, N, N)` it holds at once, at the least."""
    same_maps: bool = False
    """True if its maps must equal ours; they are compared on a small model before anything is timed."""


METHODS = {
    "forward": Method(forward, "inference"),
    "forward + backward": Method(forward_backward, "the gradient of the score of the class for the images alone"),
    "ours (fast)": Method(partial(ours, memory="fast"), "`attention_flow(..., memory='fast')`", same_maps=True),
    "ours (low)": Method(partial(ours, memory="low"), "`attention_flow(..., memory='low')`", same_maps=True),
    "ours (no shortcuts)": Method(
        partial(ours, memory="fast", shortcuts=False), "`attention_flow(..., shortcuts=False)`", same_maps=True
    ),
    "ours (relevance)": Method(
        partial(ours, memory="fast", variant="relevance"),
        "`attention_flow(..., variant='relevance', memory='fast')`, the relevance flow, which makes other maps",
    ),
    "ours (relevance, low)": Method(
        partial(ours, memory="low", variant="relevance"), "`ours (relevance)` with memory='low'"
    ),
    "ours, one by one": Method(ours_one_by_one, "`ours (fast)`, image after image", same_maps=True),
    "daam-timm-vit": Method(daam_timm_vit, "the same maps by the package of that name", "daam-timm-vit", 1, True),
    "published": Method(
        published, "the steps of the published algorithm: open attention twice, all gradients", None, 1, True
    ),
    "Grad-CAM": Method(grad_cam, "pytorch-grad-cam, one map, of the last block's norm", "grad-cam"),
    "LeGrad": Method(
        legrad, "torch-cam, one map, of the last four blocks; it does not take models of timm, so this is the twin of "
        "torchvision", "torchcam", 1 / 3,
    ),
    "rollout": Method(rollout, "attention rollout, one map, no gradient", None, 1 / 3),
}  # fmt: skip
BASE = "forward + backward"
"""The method whose time is 1 x."""
