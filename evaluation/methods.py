"""The methods that are compared: every one turns a batch of photos into maps `(B, h, w)`, one value a patch, the larger
the more it speaks for the explained class.

    explained = Explained(decision, images, classes, names)
    maps = METHODS["rollout"](explained)  # (B, h, w)

Ours comes from daam_core, Grad-CAM from pytorch-grad-cam, integrated gradients from captum. What no library has for any
ViT is written here in a few lines each, with its source; these methods see the attention of models that compute it by
`scaled_dot_product_attention`, all of whose queries are tokens, block after block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daam_core import AttentionFlow, UnsupportedModel, attention_flow
from evaluation.decision import BATCH, Decision

STEPS = 16
"""Of integrated gradients, Gauss-Legendre."""


@dataclass
class Explained:
    """A batch of photos and what is explained of them; what several methods need is computed once."""

    decision: Decision
    images: Tensor
    """`(B, 3, H, W)`, as the model wants them."""
    classes: Tensor
    """`(B,)`: what is explained."""
    names: list[str]
    """Of the photos, for the random maps."""
    seed: int = 0
    seeds: Tensor | None = None
    """`Decision.seeds`, computed where they are not given: the score of every image is `(outputs * seeds).sum(1)`."""

    def __post_init__(self):
        if self.seeds is None:
            self.seeds = self.decision.seeds(self.images, self.classes)

    @property
    def model(self) -> nn.Module:
        return self.decision.loaded.model

    def flow_of(self, variant: str) -> AttentionFlow:
        what = {"target": self.classes} if self.decision.bank is None else {"importance": self.seeds}
        return attention_flow(self.model, self.images, **what, variant=variant)

    @cached_property
    def flow(self) -> AttentionFlow:
        return self.flow_of("paper")

    @cached_property
    def grid(self) -> tuple[int, int]:
        return tuple(self.flow.block_maps.shape[-2:])

    @cached_property
    def attention(self) -> list[_Attention]:
        """Of every block, with the gradients of the score.

        Raises:
            UnsupportedModel: when that is not the attention that the flow decomposes, row by row.
        """
        images = self.images.detach().requires_grad_()  # the graph begins somewhere, also where the weights are frozen
        with torch.enable_grad(), _OpenAttention() as opened:
            score = (self.decision.outputs(images) * self.seeds).sum()
        seen = opened.seen
        tokens = self.flow.num_prefix_tokens + math.prod(self.grid)
        each_block = len(seen) == self.flow.block_maps.shape[1]
        if not each_block or any(a.matrix.shape[-2:] != (tokens, tokens) for a in seen):
            raise UnsupportedModel(
                f"methods: the attention of {type(self.model).__name__} is not scaled_dot_product_attention of all "
                f"{tokens} tokens block after block; {_WAY_OUT}"
            )
        if self.flow.decomposed.startswith("class and distillation token"):
            raise UnsupportedModel(
                f"methods: the score of {type(self.model).__name__} reads two tokens, and these methods follow one; "
                f"{_WAY_OUT}"
            )
        tensors = [t for a in seen for t in (a.matrix, a.output)]
        gradients = iter(torch.autograd.grad(score, tensors))
        for a in seen:
            a.matrix_gradient, a.output_gradient = next(gradients), next(gradients)
        return seen

    @cached_property
    def residual_gradients(self) -> list[Tensor]:
        """`(B, N, C)` of every block of a timm model: dY by what its attention adds to the residual stream."""
        added: list[Tensor] = []
        hooks = [b.ls1.register_forward_hook(lambda m, args, output: added.append(output)) for b in self.model.blocks]
        try:
            with torch.enable_grad():
                images = self.images.detach().requires_grad_()
                score = (self.decision.outputs(images) * self.seeds).sum()
        finally:
            for hook in hooks:
                hook.remove()
        return list(torch.autograd.grad(score, added))

    def on_grid(self, tokens: Tensor) -> Tensor:
        """`(B, N)` over all tokens -> `(B, h, w)` of the patches."""
        return tokens[:, self.flow.num_prefix_tokens :].unflatten(1, self.grid)


_WAY_OUT = "take those for any model: --methods daam-norm daam-last daam-signed daam-heads integrated-gradients centre"


@dataclass(eq=False)
class _Attention:
    matrix: Tensor
    """A `(B, H, N, N)`, with graph."""
    value: Tensor
    """V `(B, H, N, d)`."""
    output: Tensor
    """T = A V `(B, H, N, d)`, with graph."""
    matrix_gradient: Tensor | None = None
    output_gradient: Tensor | None = None

    def class_row(self) -> Tensor:
        """S_b `(B, H, N, d)`: a_b[h, j] V_b[h, j], the summands of T at the class token."""
        return (self.matrix[:, :, 0, :, None] * self.value).detach()

    def coefficients(self) -> Tensor:
        """C_b = dY/dT_b `(B, H, 1, d)`."""
        return self.output_gradient[:, :, :1]


class _OpenAttention(TorchFunctionMode):
    """Opens fused attention while the `with` lasts: the same result, with its matrix."""

    def __init__(self):
        super().__init__()
        self.seen: list[_Attention] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        named = dict(zip(names, args)) | (kwargs or {})
        query, key, value = (named[name] for name in names[:3])
        if query.ndim != 4 or named.get("attn_mask") is not None or named.get("is_causal"):
            return func(*args, **(kwargs or {}))
        scale = named.get("scale") or query.shape[-1] ** -0.5
        matrix = (query @ key.transpose(-2, -1) * scale).softmax(-1)
        output = matrix @ value
        self.seen.append(_Attention(matrix, value, output))
        return output


# ----------------------------------------------------------------------------------------------------------------------
# Ours and its variants
# ----------------------------------------------------------------------------------------------------------------------


def daam(explained: Explained) -> Tensor:
    """A_L, the method of the paper."""
    return explained.flow.accumulated[:, -1]


def daam_norm(explained: Explained) -> Tensor:
    """Every L_b min-max normalised before it is added."""
    maps = explained.flow.block_maps
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)).sum(1)


def daam_last(explained: Explained) -> Tensor:
    """L_L, the last block alone."""
    return explained.flow.block_maps[:, -1]


def daam_relu(explained: Explained) -> Tensor:
    """ReLU on the coefficients: the paper's own with a classifier, the variant without one."""
    maps = [(a.class_row() * a.coefficients().relu()).sum((1, 3)).relu() for a in explained.attention]
    return explained.on_grid(sum(maps))


def daam_signed(explained: Explained) -> Tensor:
    """The coefficients keep their sign: the variant with a classifier, the paper's own without one."""
    return explained.flow_of("signed").accumulated[:, -1]


def daam_heads(explained: Explained) -> Tensor:
    """Signed coefficients, and ReLU head by head. It is what `gae` sums for the class token, ReLU(dY/dA * A), without
    what that adds for the other tokens."""
    return explained.flow_of("heads").accumulated[:, -1]


def daam_net(explained: Explained) -> Tensor:
    """Signed to the end: no ReLU at all. Blocks may cancel what other blocks said of a patch."""
    return explained.on_grid(sum((a.class_row() * a.coefficients()).sum((1, 3)) for a in explained.attention))


def daam_share(explained: Explained) -> Tensor:
    """Signed coefficients; every block's map weighs as much as the block adds to the score, ReLU(C_b . T_b)."""
    total = 0
    for a in explained.attention:
        tokens = (a.class_row() * a.coefficients()).sum((1, 3))  # (B, N)
        part = explained.on_grid(tokens.relu()).flatten(1)
        share = tokens.sum(1, keepdim=True).relu()
        total = total + share * part / part.sum(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
    return total.unflatten(1, explained.grid)


def daam_projection(explained: Explained) -> Tensor:
    """The output projection inside the decomposition: W_o S_b[j] and ReLU of the gradient after the projection."""
    return _projected(explained, layer_scale=False)


def daam_residual(explained: Explained) -> Tensor:
    """Projection and LayerScale inside: what S_b[j] adds to the residual stream, and ReLU of the gradient there."""
    return _projected(explained, layer_scale=True)


def _projected(explained: Explained, layer_scale: bool) -> Tensor:
    total = 0
    _check_timm(explained, "its variants inside the projection", "blocks")
    for block in explained.model.blocks:
        if not (hasattr(block, "ls1") and isinstance(getattr(block.attn, "proj", None), nn.Linear)):
            raise UnsupportedModel(f"methods: a {type(block).__name__} has no attn.proj and ls1; {_WAY_OUT}")
    for a, block, gradient in zip(explained.attention, explained.model.blocks, explained.residual_gradients):
        added = a.class_row().transpose(1, 2).flatten(2) @ block.attn.proj.weight.T  # (B, N, C)
        scale = getattr(block.ls1, "gamma", torch.ones_like(added[0, 0]))
        if layer_scale:
            added, gradient = added * scale, gradient[:, :1]
        else:
            gradient = gradient[:, :1] * scale
        total = total + (added * gradient.relu()).sum(2).relu().detach()
    return explained.on_grid(total)


# ----------------------------------------------------------------------------------------------------------------------
# Other methods
# ----------------------------------------------------------------------------------------------------------------------


def attention(explained: Explained) -> Tensor:
    """The class token's row of the last block's attention, mean of the heads: Caron et al. 2021 (DINO),
    https://arxiv.org/abs/2104.14294, Sec. 4.2. Knows no class."""
    return explained.on_grid(explained.attention[-1].matrix.detach()[:, :, 0].mean(1))


def rollout(explained: Explained) -> Tensor:
    """Attention rollout: Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928, Eq. 1: the product of
    (mean_h A + I) / 2 over the blocks. Knows no class."""
    rolled = None
    for a in explained.attention:
        mean = a.matrix.detach().mean(1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)) / 2
        rolled = step if rolled is None else step @ rolled
    return explained.on_grid(rolled[:, 0])


def gae(explained: Explained) -> Tensor:
    """Generic attention explainability, gradient-weighted rollout: Chefer, Gur, Wolf 2021,
    https://arxiv.org/abs/2103.15679, Eqs. 5 and 6: R = R + mean_h ReLU(dY/dA * A) R."""
    relevance = None
    for a in explained.attention:
        step = (a.matrix_gradient * a.matrix.detach()).relu().mean(1)
        if relevance is None:
            relevance = torch.eye(step.shape[-1], device=step.device, dtype=step.dtype).expand_as(step)
        relevance = relevance + step @ relevance
    return explained.on_grid(relevance[:, 0])


def legrad(explained: Explained) -> Tensor:
    """LeGrad: Bousselham et al. 2024, https://arxiv.org/abs/2404.03214, Sec. 3: the mean of all tokens after every
    block is read through norm and head; ReLU of the gradient of that score with respect to the block's attention, mean
    of heads, queries and blocks (the class token alone would have one query's gradient). As torch-cam has it for the
    ViTs of torchvision; here for timm's models with `blocks`, `norm` and `forward_head`."""
    model, decision = explained.model, explained.decision
    _check_timm(explained, "legrad", "blocks", "norm", "forward_head")
    tokens: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda module, args, output: tokens.append(output)) for b in model.blocks]
    try:
        images = explained.images.detach().requires_grad_()
        with torch.enable_grad(), _OpenAttention() as opened:
            decision.outputs(images)
    finally:
        for hook in hooks:
            hook.remove()
    total = 0
    with torch.enable_grad():
        for a, after in zip(opened.seen, tokens):
            mean = after.mean(1, keepdim=True).expand_as(after)  # whichever of its tokens the head reads
            outputs = model.forward_head(model.norm(mean), pre_logits=decision.bank is not None)
            gradient = torch.autograd.grad((outputs * explained.seeds).sum(), a.matrix, retain_graph=True)[0]
            total = total + gradient.relu().mean((1, 2))
    return explained.on_grid(total / len(tokens))


def gradcam(explained: Explained) -> Tensor:
    """Grad-CAM: Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, by pytorch-grad-cam, at the first norm of the
    last block, as that library advises for ViTs."""
    _check_timm(explained, "gradcam", "blocks")
    grid, prefix = explained.grid, explained.flow.num_prefix_tokens

    class OnGrid(GradCAM):
        """The map as it is, not stretched to the size of the picture."""

        def get_target_width_height(self, input_tensor):
            return grid[::-1]

    class Outputs(nn.Module):
        """What the library asks of a model: its outputs, and its device by its parameters."""

        def __init__(self):
            super().__init__()
            self.inner = explained.model

        def forward(self, images):
            return explained.decision.outputs(images)

    def as_channels(tokens: Tensor) -> Tensor:  # (B, N, C) -> (B, C, h, w)
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)

    scores = [lambda output, seed=seed: (output * seed).sum() for seed in explained.seeds]
    layers = [explained.model.blocks[-1].norm1]
    images = explained.images.detach().requires_grad_()
    with torch.enable_grad(), OnGrid(Outputs(), layers, as_channels) as cam:
        return torch.as_tensor(cam(images, scores), device=images.device)


def integrated_gradients(explained: Explained) -> Tensor:
    """Integrated gradients: Sundararajan, Taly, Yan 2017, https://arxiv.org/abs/1703.01365, by captum: from the grey
    picture that is zero after normalisation; 16 steps of Gauss-Legendre; the mean over the pixels of every patch."""

    def score(images: Tensor, seeds: Tensor) -> Tensor:
        return (explained.decision.outputs(images) * seeds).sum(1)

    attributions = IntegratedGradients(score).attribute(
        explained.images, additional_forward_args=explained.seeds, n_steps=STEPS, internal_batch_size=BATCH
    )
    return F.adaptive_avg_pool2d(attributions.detach().sum(1, keepdim=True), explained.grid)[:, 0].float()


def random(explained: Explained) -> Tensor:
    """A control: uniform noise, the same for the same photo and seed."""
    generators = [torch.Generator().manual_seed(photo_seed(name, explained.seed)) for name in explained.names]
    return torch.stack([torch.rand(explained.grid, generator=g) for g in generators]).to(explained.images.device)


def photo_seed(name: str, seed: int) -> int:
    """The same for a photo wherever it stands in a run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def centre(explained: Explained) -> Tensor:
    """A control: the nearer to the centre of the picture, the larger."""
    h, w = explained.grid
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return (2**0.5 - (x**2 + y**2).sqrt()).expand(len(explained.images), h, w).to(explained.images.device)


def _check_timm(explained: Explained, method: str, *attributes: str) -> None:
    """Raise an `UnsupportedModel` unless the model has these, and one attention of all tokens a block."""
    missing = [name for name in attributes if not hasattr(explained.model, name)]
    if missing:
        raise UnsupportedModel(
            f"methods: {method} reads timm's {', '.join(attributes)}, but {type(explained.model).__name__} has no "
            f"{', '.join(missing)}; {_WAY_OUT}"
        )
    _ = explained.attention  # raises


METHODS: dict[str, Callable[[Explained], Tensor]] = {
    "daam": daam,
    "daam-norm": daam_norm,
    "daam-last": daam_last,
    "daam-relu": daam_relu,
    "daam-signed": daam_signed,
    "daam-heads": daam_heads,
    "daam-net": daam_net,
    "daam-share": daam_share,
    "daam-projection": daam_projection,
    "daam-residual": daam_residual,
    "attention": attention,
    "rollout": rollout,
    "gae": gae,
    "legrad": legrad,
    "gradcam": gradcam,
    "integrated-gradients": integrated_gradients,
    "random": random,
    "centre": centre,
}
"""By name; what --methods takes."""

CANDIDATES = ["daam-net", "daam-share", "daam-projection", "daam-residual"]
"""More variants, which the README tells about; not in "all"."""
