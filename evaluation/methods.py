"""Explanation methods side by side: each turns a batch of photos into maps `(B, h, w)`, one value per patch.

    explained = Explained(decision, images, classes, names)
    maps = METHODS["rollout"](explained)  # (B, h, w), the larger, the more a patch supports the class

Ours comes from daam_core, Grad-CAM from pytorch-grad-cam and integrated gradients from captum. Methods that no library
offers for every ViT are written here in a few lines each, with their source. They need models whose attention is
between all tokens, once per block. Libraries of the extra `evaluation` are slow to import, so each is imported by the
function that needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_core import UnsupportedModel, accumulate
from daam_vit.state import hooks
from evaluation.ablation import ABLATION
from evaluation.decision import BATCH
from evaluation.explained import WAY_OUT, BlockRecorder, Explained

STEPS = 16
"""Steps of integrated gradients, at the nodes of Gauss-Legendre."""


# ----------------------------------------------------------------------------------------------------------------------
# Ours and its variants
# ----------------------------------------------------------------------------------------------------------------------


def daam(explained: Explained) -> Tensor:
    """Return A_L: the method of the paper."""
    return explained.flow.accumulated[:, -1]


def daam_norm(explained: Explained) -> Tensor:
    """Min-max normalise every L_b before it is added."""
    return accumulate(explained.flow.block_maps, norm=True)[:, -1]


def daam_last(explained: Explained) -> Tensor:
    """Return L_L: the last block alone."""
    return explained.flow.block_maps[:, -1]


def daam_relu(explained: Explained) -> Tensor:
    """Apply ReLU to the coefficients: the paper's method with a classifier, a variant without one."""
    maps = [(block.S * block.C_cls.relu()).sum((1, 3)).relu() for block in explained.attention]
    return explained.on_grid(sum(maps))


def daam_signed(explained: Explained) -> Tensor:
    """Keep the sign of the coefficients: a variant with a classifier, the paper's method without one."""
    return explained.flow_of("signed").accumulated[:, -1]


def daam_heads(explained: Explained) -> Tensor:
    """Keep the sign of the coefficients, and apply ReLU head by head.

    This is the row of the class token in what `gae` adds in every block, ReLU(dY/dA * A), times the number of heads.
    """
    return explained.flow_of("heads").accumulated[:, -1]


def daam_heads_log_odds(explained: Explained) -> Tensor:
    """Compute `daam_heads` for the log-odds of the class."""
    return daam_heads(explained.by_log_odds)


def daam_relevance(explained: Explained) -> Tensor:
    """Return the relevance flow, signed."""
    return explained.relevance.accumulated[:, -1]


def daam_net(explained: Explained) -> Tensor:
    """Keep every sign, without any ReLU: blocks can cancel each other."""
    return explained.on_grid(sum((block.S * block.C_cls).sum((1, 3)) for block in explained.attention))


def daam_share(explained: Explained) -> Tensor:
    """Keep the sign of the coefficients, and weight every map by what its block adds to the score, ReLU(C_b . T_b)."""
    total = 0
    for block in explained.attention:
        tokens = (block.S * block.C_cls).sum((1, 3))  # (B, N)
        part = explained.on_grid(tokens.relu()).flatten(1)
        share = tokens.sum(1, keepdim=True).relu()
        total = total + share * part / part.sum(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
    return total.unflatten(1, explained.grid)


def daam_projection(explained: Explained) -> Tensor:
    """Decompose after the output projection: W_o S_b[j], and ReLU of the gradient there."""
    return _projected(explained, layer_scale=False)


def daam_residual(explained: Explained) -> Tensor:
    """Decompose after projection and LayerScale: what S_b[j] adds to the residual stream, and ReLU of the gradient."""
    return _projected(explained, layer_scale=True)


def _projected(explained: Explained, layer_scale: bool) -> Tensor:
    total = 0
    _check_timm(explained, "a variant after the projection", "blocks")
    for block in explained.model.blocks:
        if not (hasattr(block, "ls1") and isinstance(getattr(block.attn, "proj", None), nn.Linear)):
            raise UnsupportedModel(f"methods: a {type(block).__name__} has no attn.proj and ls1; {WAY_OUT}")
    for seen, block, gradient in zip(explained.attention, explained.model.blocks, explained.residual_gradients):
        added = seen.S.transpose(1, 2).flatten(2) @ block.attn.proj.weight.T  # (B, N, C)
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
    """Return the attention of the class token in the last block, mean over heads; the same for all classes.

    Caron et al. 2021 (DINO), https://arxiv.org/abs/2104.14294, Sec. 4.2.
    """
    return explained.on_grid(explained.attention[-1].A[:, :, 0].mean(1))


def rollout(explained: Explained) -> Tensor:
    """Multiply (mean_h A + I) / 2 over the blocks; the same for all classes.

    Attention rollout: Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928, Eq. 1.
    """
    rolled = None
    for block in explained.attention:
        mean = block.A.mean(1)  # (B, N, N)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)) / 2
        rolled = step if rolled is None else step @ rolled
    return explained.on_grid(rolled[:, 0])


def gae(explained: Explained) -> Tensor:
    """Roll gradient-weighted attention out: R = R + mean_h ReLU(dY/dA * A) R over the blocks.

    Generic attention explainability: Chefer, Gur, Wolf 2021, https://arxiv.org/abs/2103.15679, Eqs. 5 and 6.
    """
    relevance = None
    for block in explained.attention:
        step = (block.dA * block.A).relu().mean(1)  # (B, N, N)
        if relevance is None:
            relevance = torch.eye(step.shape[-1], device=step.device, dtype=step.dtype).expand_as(step)
        relevance = relevance + step @ relevance
    return explained.on_grid(relevance[:, 0])


def gae_log_odds(explained: Explained) -> Tensor:
    """Compute `gae` for the log-odds of the class."""
    return gae(explained.by_log_odds)


def attnlrp(explained: Explained) -> Tensor:
    """Return the relevance of the tokens that enter the first block: AttnLRP, for the log-odds of the class; signed.

    Achtibat et al. 2024, https://arxiv.org/abs/2402.05602.
    """
    return explained.relevance.block_maps[:, 0]


def legrad(explained: Explained) -> Tensor:
    """Average ReLU of the gradient with respect to the attention of every block, each by a score of its own.

    LeGrad: Bousselham et al. 2024, https://arxiv.org/abs/2404.03214, Sec. 3. The mean of all tokens after a block goes
    through norm and head; the gradient of that score is averaged over heads, queries and blocks. The same as in
    torch-cam, which has it for torchvision's ViTs; here for models of timm with `blocks`, `norm` and `forward_head`.
    """
    model, decision = explained.model, explained.decision
    _check_timm(explained, "legrad", "blocks", "norm", "forward_head")
    attended: list[Tensor] = []  # T of every block
    tokens: list[Tensor] = []  # after every block
    recorder = BlockRecorder(lambda call, T: attended.append(T))
    after_blocks = [(b.register_forward_hook, lambda m, args, output: tokens.append(output)) for b in model.blocks]
    total = 0
    with recorder.attached(model), hooks(after_blocks):
        recorder.run(decision.outputs, explained.images)
        for b, (T, after) in enumerate(zip(attended, tokens)):
            mean = after.mean(1, keepdim=True).expand_as(after)  # for whichever tokens the head reads
            outputs = model.forward_head(model.norm(mean), pre_logits=decision.bank is not None)
            torch.autograd.grad((outputs * explained.grad_outputs).sum(), T, retain_graph=True)
            total = total + recorder.block(b).dA.relu().mean((1, 2))  # (B, N)
    return explained.on_grid(total / len(tokens))


def gradcam(explained: Explained) -> Tensor:
    """Compute Grad-CAM by pytorch-grad-cam at the first norm of the last block, as that library advises for ViTs.

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391.
    """
    from pytorch_grad_cam import GradCAM

    _check_timm(explained, "gradcam", "blocks")
    last = explained.model.blocks[-1]
    if not hasattr(last, "norm1"):
        raise UnsupportedModel(f"methods: a {type(last).__name__} has no norm1; {WAY_OUT}")
    grid, prefix = explained.grid, explained.flow.num_prefix_tokens

    class OnGrid(GradCAM):
        """Grad-CAM that keeps the patch grid instead of stretching its map to the size of the picture."""

        def get_target_width_height(self, input_tensor):
            return grid[::-1]

    class Outputs(nn.Module):
        """Module with the outputs of the decision; the library takes the device of its parameters."""

        def __init__(self):
            super().__init__()
            self.inner = explained.model

        def forward(self, images):
            return explained.decision.outputs(images)

    def as_channels(tokens: Tensor) -> Tensor:  # (B, N, C) -> (B, C, h, w)
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)

    scores = [lambda output, g=g: (output * g).sum() for g in explained.grad_outputs]
    images = explained.images.detach().requires_grad_()
    with torch.enable_grad(), OnGrid(Outputs(), [last.norm1], as_channels) as cam:
        return torch.as_tensor(cam(images, scores), device=images.device)


def integrated_gradients(explained: Explained) -> Tensor:
    """Integrate gradients from the grey image that is zero after normalisation, by captum; average over every patch.

    Sundararajan, Taly, Yan 2017, https://arxiv.org/abs/1703.01365.
    """
    from captum.attr import IntegratedGradients

    def score(images: Tensor, grad_outputs: Tensor) -> Tensor:
        return (explained.decision.outputs(images) * grad_outputs).sum(1)

    attributions = IntegratedGradients(score).attribute(
        explained.images, additional_forward_args=explained.grad_outputs, n_steps=STEPS, internal_batch_size=BATCH
    )
    return F.adaptive_avg_pool2d(attributions.detach().sum(1, keepdim=True), explained.grid)[:, 0].float()


def random(explained: Explained) -> Tensor:
    """Return uniform noise, the same for the same photo and seed: a control."""
    generators = [torch.Generator().manual_seed(photo_seed(name, explained.seed)) for name in explained.names]
    return torch.stack([torch.rand(explained.grid, generator=g) for g in generators]).to(explained.images.device)


def photo_seed(name: str, seed: int) -> int:
    """Return a seed that depends on the name of a photo, not on its place in a run."""
    text = f"{seed} {name}".encode("utf-8", "surrogateescape")  # a name need not be UTF-8, see `evaluation.photos`
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def centre(explained: Explained) -> Tensor:
    """Return a map that is larger the nearer a patch is to the centre of the picture: a control."""
    h, w = explained.grid
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return (2**0.5 - (x**2 + y**2).sqrt()).expand(len(explained.images), h, w).to(explained.images.device)


def _check_timm(explained: Explained, method: str, *attributes: str) -> None:
    """Raise an `UnsupportedModel` unless the model has these attributes and an attention that can be followed."""
    missing = [name for name in attributes if not hasattr(explained.model, name)]
    if missing:
        raise UnsupportedModel(
            f"methods: {method} reads timm's {', '.join(attributes)}, but {type(explained.model).__name__} has no "
            f"{', '.join(missing)}; {WAY_OUT}"
        )
    _ = explained.attention  # raises


METHODS: dict[str, Callable[[Explained], Tensor]] = {
    "daam": daam,
    "daam-norm": daam_norm,
    "daam-last": daam_last,
    "daam-relu": daam_relu,
    "daam-signed": daam_signed,
    "daam-heads": daam_heads,
    "daam-heads-log-odds": daam_heads_log_odds,
    "daam-relevance": daam_relevance,
    "daam-net": daam_net,
    "daam-share": daam_share,
    "daam-projection": daam_projection,
    "daam-residual": daam_residual,
    "attention": attention,
    "rollout": rollout,
    "gae": gae,
    "gae-log-odds": gae_log_odds,
    "attnlrp": attnlrp,
    "legrad": legrad,
    "gradcam": gradcam,
    "integrated-gradients": integrated_gradients,
    "random": random,
    "centre": centre,
    **ABLATION,
}
"""All methods by the names that --methods accepts."""

GROUPS = {
    "candidates": ["daam-net", "daam-share", "daam-projection", "daam-residual"],
    "ablation": ["daam-relevance", "attnlrp", *ABLATION],
}
"""Groups of variants, which --methods also accepts; docs/evaluation.md discusses them."""
EXTRA = {*GROUPS["candidates"], *ABLATION}
"""Methods that are not part of "all"."""
