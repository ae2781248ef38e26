"""Dynamic Accumulated Attention Map (DAAM): how a Vision Transformer reaches its decision, block by block.

Reference: Liao, Gao, Zhang, "Dynamic accumulated attention map for interpreting evolution of decision-making in vision
transformer", Pattern Recognition 165 (2025) 111607, https://arxiv.org/abs/2503.14640.

    flow = attention_flow(model, images)                # images (B, 3, H, W), as the model expects
    heat = render(flow.accumulated[0])                  # (L, h, w) uint8
    save_gif(overlay(photo, heat), "flow.gif")          # one frame per block

In every block b the class token is the only query. Symbols as in the paper and in timm: B images, L blocks, H heads of
width d, C = H * d channels, N tokens, patch grid h x w; f is a feature of width D, z a row of a memory bank.

    (1)  a_b = softmax(q_cls K^T / sqrt(d))            (B, H, N)    attention row of the class token
    (2)  S_b[j] = a_b[j] V_b[j]                        (B, N, C)    semantic spatial map
    (3)  T_b = sum_j S_b[j]                            (B, C)       output of the attention at the class token
    (4)  C_b = dY / dT_b                               (B, C)       channel importance coefficients
    (5)  L_b[j] = ReLU(sum_c w(C_b)_c S_b[j, c])       (B, h, w)    map of the block, over the patch tokens
    (6)  A_b = L_1 + ... + L_b                         (B, h, w)    attention flow; A_L explains the decision

    with a classifier       Y is the score of the class, and w = ReLU
    without a classifier    Y is the feature, its gradient is the importance of its dimensions, and w = identity:

    (7)  p = mean of f * z over the neighbours z of the predicted class      (B, D)
    (8)  importance = (p - min p) / (max p - min p)                          (B, D)

The relevance flow (`variant="relevance"`), which is not in the paper, takes the tokens x_b that enter block b, and the
gradient of the log-odds Y of the class by the backward rules of `daam_vit.rules`:

    (9)  R_b[j] = x_b[j] . dY / dx_b[j]                (B, h, w)    signed, and accumulated as in (6)

This file is the method. `daam_vit` is its machinery: it knows the attention layers of a model, records them while the
model runs, skips what cannot affect the result, checks the run, and draws. docs/method.md says why it is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_vit.attention import AttentionCall, AttentionMatrix, AttentionRecorder, OnGradient, repeat_heads
from daam_vit.checks import (
    SCORES,
    VARIANTS,
    Target,
    check_backward,
    check_forward,
    check_options,
    check_queries,
    class_indices,
    completeness_error,
    importance_weights,
    queries_read,
)
from daam_vit.drawing import block_labels, contact_sheet, overlay, render, side_by_side
from daam_vit.families import all_rows_hint, plan_of
from daam_vit.files import save_flow, save_gif
from daam_vit.inputs import (
    Images,
    UnsupportedModel,
    check_bank,
    check_block_maps,
    check_choice,
    check_neighbours,
    check_scores,
    check_votes,
    check_weighting,
)
from daam_vit.lens import logit_lens
from daam_vit.libraries import (
    features,
    first_image,
    num_classes,
    pre_logits,
    reference_parameter,
    scores,
    to_model,
    unwrap,
)
from daam_vit.plan import AttentionLayer, Plan
from daam_vit.plots import evolution_picture
from daam_vit.relevance import Relevance
from daam_vit.shortcuts import ShortcutRecorder
from daam_vit.unknown import AnyAttentionRecorder, check_unverified, plan_of_run

__all__ = [
    "AttentionFlow",
    "SCORES",
    "UnsupportedModel",
    "VARIANTS",
    "accumulate",
    "attention_flow",
    "block_labels",
    "block_map",
    "contact_sheet",
    "dimension_importance",
    "evolution_picture",
    "features",
    "logit_lens",
    "neighbour_importance",
    "neighbour_votes",
    "num_classes",
    "overlay",
    "render",
    "save_flow",
    "save_gif",
    "score_gradient",
    "side_by_side",
]

# ----------------------------------------------------------------------------------------------------------------------
# The equations
# ----------------------------------------------------------------------------------------------------------------------


def block_map(
    a: Tensor, V: Tensor, C: Tensor, w: Callable[[Tensor], Tensor] = torch.relu, heads: bool = False
) -> Tensor:
    """Weight the semantic spatial map of one block: Eqs. 2 and 5, L_b[j] = ReLU(sum_c w(C_b)_c a_b[j] V_b[j, c]).

    S_b is never stored: for every head, sum_d w(C)_d a[j] V[j, d] = a[j] (w(C) . V[j]).

    Args:
        a: `(B, H, Q, N)`, attention rows of the Q queries that the score reads: one, the class token, in most models.
        V: `(B, H, N, d)`, values.
        C: `(B, H, Q, d)`, coefficients dY/dT.
        w: ReLU for a class score, the identity for an importance.
        heads: take ReLU head by head, before heads are added (`variant="heads"`).

    Returns:
        `(B, N)`: L_b over all keys, prefix tokens included.
    """
    check_choice("heads", heads, (True, False))
    check_weighting(a, V, C, w)
    wC_V = w(C) @ V.transpose(-2, -1)  # (B, H, Q, N)   w(C) . V[j], for every head
    wC_S = (a * wC_V).sum(2)  # (B, H, N)   w(C) . S[j], for every head   Eq. 2
    return (wC_S.relu() if heads else wC_S).sum(1).relu()  # (B, N)   Eq. 5


def all_rows_map(
    A: AttentionMatrix, V: Tensor, C: Tensor, w: Callable[[Tensor], Tensor], heads: bool = False
) -> Tensor:
    """Weight all rows of A at once, which is not in the paper: L_b[j] = ReLU(V[j] . (A^T w(C))[j]), `(B, N)`."""
    wC_S = (V * A.vjp(w(C))).sum(3)  # (B, H, N)
    return (wC_S.relu() if heads else wC_S).sum(1).relu()  # (B, N)


def score_gradient(scores: Tensor, classes: Tensor, score: str = "logit") -> Tensor:
    """Return dY of a class score Y.

    Args:
        scores: z `(B, num_classes)`, the logits.
        classes: c `(B,)` or `(B, K)` int64.
        score: "logit", Y = z_c; or "log_odds", Y = log p_c - log(1 - p_c) = z_c - log(sum over the others of exp z_k)
            with p = softmax z. The logit of a single class is its log-odds.

    Returns:
        `(B, num_classes)` or `(B, K, num_classes)` float32.
    """
    check_choice("score", score, SCORES)
    classes = check_scores(scores, classes)
    one_hot = F.one_hot(classes, scores.shape[1]).float()  # (B, num_classes) or (B, K, num_classes)
    if score == "logit" or scores.shape[1] == 1:
        return one_hot
    z = scores.float().view(len(scores), *[1] * (classes.ndim - 1), -1)  # (B, 1, num_classes) if K are explained
    return one_hot - z.masked_fill(one_hot > 0, -torch.inf).softmax(-1)


def accumulate(block_maps: Tensor, norm: bool = False, valid: Tensor | None = None) -> Tensor:
    """Add the maps block after block: Eq. 6.

    Args:
        block_maps: `(..., L, h, w)`, L_1 ... L_L.
        norm: min-max normalise every L_b first; a flat one becomes zero.
        valid: `(B, h, w)` bool, the cells that count for `norm`; None: all.

    Returns:
        `(..., L, h, w)`: A_1 ... A_L.
    """
    check_choice("norm", norm, (True, False))
    check_block_maps(block_maps, valid)
    if not norm:
        return block_maps.cumsum(-3)  # (..., L, h, w)   Eq. 6
    low = high = block_maps
    if valid is not None:
        valid = valid.view(len(block_maps), *[1] * (block_maps.ndim - 3), *block_maps.shape[-2:])  # (B, 1, ..., h, w)
        low, high = block_maps.masked_fill(~valid, torch.inf), block_maps.masked_fill(~valid, -torch.inf)
    low, high = low.amin((-2, -1), keepdim=True), high.amax((-2, -1), keepdim=True)  # (..., L, 1, 1)
    stretched = (block_maps - low) / torch.where(high > low, high - low, 1)  # (..., L, h, w)
    return (stretched if valid is None else stretched.where(valid, 0)).cumsum(-3)  # (..., L, h, w)


def neighbour_importance(
    features: Tensor, bank: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Weight the dimensions of a feature by its nearest neighbours in a memory bank: Eqs. 7 and 8.

    The neighbours vote on the class as in Wu et al. 2018 (https://arxiv.org/abs/1805.01978) and DINO's k-NN evaluation;
    those of the winning class make the importance. `memorybank.MemoryBank` does the same for banks that do not fit into
    memory, and for classes named by hand.

    Args:
        features: `(B, D)`.
        bank: `(M, D)`, float16 or float32, rows L2-normalised.
        labels: `(M,)` int64.
        k: neighbours that vote.
        temperature: of the votes.

    Returns:
        `(B, D)`, 0..1: the gradient that is sent back from the feature.
    """
    labels = check_bank(features, bank, labels, k)  # (M,)
    f = F.normalize(features.float(), dim=1)  # (B, D)
    similarities, neighbours = (f @ bank.T.to(f)).topk(k)  # (B, k) twice
    votes = neighbour_votes(similarities, labels[neighbours], int(labels.max()) + 1, temperature)  # (B, num_classes)
    winning = labels[neighbours] == votes.argmax(1, keepdim=True)  # (B, k)
    return dimension_importance(f, [bank[n[m]] for n, m in zip(neighbours, winning)])  # (B, D)


def neighbour_votes(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """Count the votes of neighbours, exp(cosine / temperature) for each label: two `(B, k)` -> `(B, num_classes)`."""
    labels = check_votes(similarities, labels, num_classes, temperature)  # (B, k)
    weights = (similarities / temperature).exp()  # (B, k)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)  # (B, num_classes)


def dimension_importance(f: Tensor, neighbours: Iterable[Tensor]) -> Tensor:
    """Say how much every dimension of a feature agrees with its neighbours of one class: Eqs. 7 and 8.

    Args:
        f: `(B, D)`, normalised.
        neighbours: for each image `(n, D)`, the n neighbours of the class.

    Returns:
        `(B, D)`, 0..1; ones if p is constant.
    """
    neighbours = check_neighbours(f, neighbours)
    p = torch.stack([f_i * z.float().mean(0).to(f_i.device) for z, f_i in zip(neighbours, f)])  # (B, D)   Eq. 7
    total = p.sum(1, keepdim=True).abs()  # (B, 1)
    p = p / torch.where(total > 0, total, 1)  # (B, D)   cancels in Eq. 8; kept as published
    low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)  # (B, 1)
    return torch.where(high > low, (p - low) / torch.where(high > low, high - low, 1), 1)  # (B, D)   Eq. 8


# ----------------------------------------------------------------------------------------------------------------------
# The flow
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionFlow:
    """Result of `attention_flow`. All tensors are on the model's device and carry no graph.

    If K classes, or K importances, of every image were explained, the maps are `(B, K, L, h, w)`.
    """

    block_maps: Tensor
    """`(B, L, h, w)` float32: L_b of every block, as computed (also with `norm=True`). Never negative, except in
    `variant="relevance"`, whose R_b are signed."""
    accumulated: Tensor
    """`(B, L, h, w)` float32: A_b, the running sum over blocks; the last one is the final explanation."""
    output: Tensor
    """`(B, num_classes)` scores, or the `(B, D)` features if `importance` was passed; in the model's dtype."""
    target: Tensor | None
    """`(B,)` explained class indices, int64, or `(B, K)` as they were passed; None if `importance` was passed."""
    rows: str = "class"
    """As passed: "class", or "patches" for all rows."""
    decomposed: str = ""
    """What the steps are, in words: "class token, 12 blocks", "class token, 2 class-attention blocks", ..."""
    num_prefix_tokens: int = 1
    """Keys before the patches in the first attention that is decomposed."""
    variant: str = "paper"
    """As passed."""
    score: str | None = "logit"
    """What Y is, "logit" or "log_odds"; None if `importance` was passed."""
    class_share: Tensor | None = None
    """`(B, L)`, 0..1, for `variant="relevance"` only: the share of all |R_b[j]| that the class token itself holds when
    block b begins; at 0, all evidence is still in the patches. None if the score reads no class token."""


def attention_flow(
    model: nn.Module,
    images: Images,
    target: Target | Callable[[Tensor], Target] | None = None,
    importance: Tensor | Callable[[Tensor], Tensor] | None = None,
    norm: bool = False,
    rows: str = "class",
    memory: str = "auto",
    variant: str = "paper",
    shortcuts: bool = True,
    score: str | None = None,
) -> AttentionFlow:
    """Decompose the class token in every block of a Vision Transformer, weight the maps and accumulate them.

    Args:
        model: a Vision Transformer of timm, torchvision or transformers (`daam_vit.families.FAMILIES`), or any other
            one whose tokens are a class token and patches from a convolution. It runs in eval mode and is restored
            afterwards, even after an exception. Threads may explain several models at once, or share one that is in
            eval mode (except models with timm's differential attention).
        images: `(B, C, H, W)`, floating point and normalised as the model expects; moved to its device and dtype.
            NaFlexVit also takes the dict of timm's collator, with `patches`, `patch_coord` and `patch_valid`: maps of
            images with different grids then share the largest height and width, zero outside of their own.
        target: the class to explain: None for each image's predicted class, one index for all, one for each image, or
            `(B, K)`, K classes of every image: one forward and K backwards. A callable gets the scores
            `(B, num_classes)` and returns one of these.
        importance: explains the feature (`features(model, images)`, `(B, D)`) instead of a class score: `(D,)`,
            `(B, D)` or, for K maps of every image, `(B, K, D)`; a callable gets the features and returns one of these.
            Models without a classifier need it.
        norm: min-max normalise every L_b, image by image, before it is added to the flow.
        rows: "class" is the method of the paper: the row of the class token. "patches" is not in the paper, and is for
            models whose score reads the mean of the patch tokens: L_b[j] = ReLU(sum_c V[j]_c (A^T w(C))[j]_c) with all
            rows of the attention matrix A and of C = dY/dT; with w = identity it is ReLU(sum_c V * dY/dV).
        memory: what is kept of every block for the backward: "fast", all that it needs; "low", the block's input and
            the output of its fused attention, from which the rest is computed again, bit for bit the same. "auto" is
            "low" if a whole model would keep more than 256 MiB per image (ViT-S: from 1,600 tokens on). A model of no
            known family always runs "fast".
        variant: "paper" is the method of the paper. The evaluation compares it with two variants that are not in the
            paper: "signed" keeps the sign of the coefficients for a class score, too, w = identity; "heads" does so,
            and takes ReLU head by head, L_b[j] = sum_h ReLU(sum_d C_b[h, d] S_b[j, h, d]). The latter is the row of the
            class token in the gradient-weighted attention of Chefer, Gur, Wolf 2021 (https://arxiv.org/abs/2103.15679,
            Eq. 5), times the number of heads, since C_b[h] . V_b[j, h] is the gradient with respect to a_b[h, j].
            "relevance" is the relevance flow: by the rules of AttnLRP (Achtibat et al. 2024,
            https://arxiv.org/abs/2402.05602), the map of a block is R_b[j] = x_b[j] . dY/dx_b[j], what the score
            still has to read from patch j when block b begins. It is signed: negative evidence counts. `rows` decides
            which models are taken; `importance` has to be the gradient of a score, as `MemoryBank.log_odds` returns it.
        shortcuts: False computes everything the plain way, for all tokens: the same maps up to rounding, at a higher
            cost. For comparison; it needs `memory` "auto" or "fast".
        score: Y for a class c with the probability p_c: "logit", its score, as in the paper; "log_odds",
            log p_c - log(1 - p_c), which sets it against all other classes. None: "log_odds" for the relevance flow,
            "logit" otherwise.

    Returns:
        An `AttentionFlow`, one map per block for every image. In models with patch grids of several sizes every map is
        stretched to the finest one, bilinearly and so that its sum is kept.

    Raises:
        UnsupportedModel: a `ValueError`, if the score reads other tokens than the class token (or the queries of the
            family: distillation token, attention pool), or the attention cannot be seen; for `variant="relevance"` also
            if a block does not get its tokens as one tensor, or a function of the model has no rule.
        ValueError: if `images` have the wrong rank, size, channels or dtype, a class is out of range, `importance`
            does not fit the features, or the output is not finite. Always one line that names the argument first.
        TypeError: if `model`, `images` or `importance` has the wrong type; also one line.
    """
    model = unwrap(model)
    score = check_options(target, importance, norm, memory, variant, shortcuts, score)
    plan = plan_of(model, images, rows)  # None: no known family; the run has to show what the model does
    if plan is None and variant == "relevance":
        raise UnsupportedModel(
            f"variant: 'relevance' needs the blocks of the model, and {type(model).__name__} is of no known family; "
            f"use another variant"
        )
    if importance is None and num_classes(model) == 0:
        raise ValueError("importance: the model has no classifier; pass the importance of its features")
    parameter = reference_parameter(model)
    if parameter.is_inference():
        raise ValueError("model: was made under torch.inference_mode(), which rules out gradients; make it outside")
    images = to_model(images, parameter)

    maps = _LayerMaps(torch.relu if importance is None and variant == "paper" else _identity, variant)
    recorder = _recorder(plan, maps.on_gradient, memory, shortcuts)
    relevance = Relevance(model, plan, recorder.leaves) if plan is not None and variant == "relevance" else None
    recorder.rules = relevance
    with recorder.attached(model):
        Y = recorder.run(scores if importance is None else pre_logits, model, images)  # (B, num_classes) or (B, D)
        plan = plan or plan_of_run(model, images, recorder)
        check_forward(model, plan, recorder.calls, Y, images)
        if plan.unverified is not None:
            check_unverified(model, first_image(images), plan.unverified)
        if importance is None:
            indices = class_indices(target, Y.detach())  # (B,) or (B, K)
            dY = score_gradient(Y.detach(), indices, score).to(Y)  # (B, num_classes) or (B, K, num_classes)
        else:
            indices, dY = None, importance_weights(importance, Y.detach())  # (B, D) or (B, K, D)
        grad_outputs = dY.unbind(1) if dY.ndim == 3 else (dY,)  # K times (B, num_classes) or (B, D)
        maps.last, maps.scale = recorder.calls[-1], 128 if Y.dtype == torch.float16 else 1
        for k, grad_output in enumerate(grad_outputs, 1):
            grad_output, retain_graph = maps.scale * grad_output, k < len(grad_outputs)
            if relevance is not None:
                relevance.expect_gradient(maps.scale)
            torch.autograd.grad(Y, recorder.leaves, grad_output, retain_graph, allow_unused=True)  # C_b: Eq. 4
            check_backward(model, recorder.calls, maps.of_layer, maps.errors, k)
            if rows == "class":
                check_queries(model, maps.read, maps.last.layer, all_rows_hint(model))

    block_maps = (relevance or maps).of_steps(plan)  # (B, K, L, h, w)
    class_share = None if relevance is None else relevance.class_share(plan)  # (B, K, L)
    if dY.ndim == 2:  # one class, or importance, of every image
        block_maps = block_maps.squeeze(1)  # (B, L, h, w)
        class_share = None if class_share is None else class_share.squeeze(1)  # (B, L)
    accumulated = accumulate(block_maps, norm, plan.valid_cells(images) if norm else None)  # Eq. 6
    return AttentionFlow(
        block_maps, accumulated, Y.detach(), indices, rows, plan.decomposed, plan.steps[0][0].prefix, variant,
        score if importance is None else None, class_share,
    )  # fmt: skip


class _LayerMaps:
    """Makes the map of a layer the moment its gradient arrives; autograd then frees what it saved for it."""

    def __init__(self, w: Callable[[Tensor], Tensor], variant: str):
        self.w, self.heads = w, variant == "heads"  # see `block_map`
        self.relevance = variant == "relevance"  # its maps are made elsewhere; here only the gradients are checked
        self.scale = 1  # of all gradients: small ones do not underflow in float16
        self.last: AttentionCall | None = None
        self.of_layer: dict[AttentionLayer, list[Tensor]] = defaultdict(list)  # (B, N) for every gradient
        self.errors: dict[AttentionLayer, Tensor] = {}  # of Eq. 3
        self.read: Tensor | None = None  # (M,) queries of the last attention that the score reads

    def on_gradient(self, call: AttentionCall, A: AttentionMatrix, C: Tensor) -> None:
        layer, queries = call.layer, call.layer.query_slice
        if call is self.last:
            self.read = queries_read(C)
        with torch.autocast(C.device.type, enabled=False):
            a = A.rows(queries)  # (B, H, Q, N)   Eq. 1
            value = A.value.float()  # (B, H', N, d)
            V = repeat_heads(value, a.shape[1])  # (B, H, N, d)
            self.errors[layer] = completeness_error(a, V, call.output.float())  # ()   Eq. 3
            if self.relevance:
                L = C[..., queries, :].float().sum((1, 2))
            elif layer.queries is None:
                L = all_rows_map(A, value, C.float() / self.scale, self.w, self.heads)  # (B, N)
            else:
                C = C[..., queries, :].float() / self.scale  # (B, H, Q, d)
                L = block_map(a, V, C, self.w, self.heads)  # (B, N)   Eqs. 2 and 5
        self.of_layer[layer].append(L)

    def of_steps(self, plan: Plan) -> Tensor:
        def on_grid(layer: AttentionLayer) -> Tensor:
            return torch.stack([layer.to_grid(L, plan.grid) for L in self.of_layer[layer]], 1)  # (B, K, h, w)

        steps = [torch.stack([on_grid(layer) for layer in step]).sum(0) for step in plan.steps]  # (B, K, h, w) each
        return torch.stack(steps, 2)  # (B, K, L, h, w)


def _recorder(plan: Plan | None, on_gradient: OnGradient, memory: str, shortcuts: bool) -> AttentionRecorder:
    if plan is None:
        return AnyAttentionRecorder(on_gradient)
    return ShortcutRecorder(plan, on_gradient, memory) if shortcuts else AttentionRecorder(plan.layers, on_gradient)


def _identity(C: Tensor) -> Tensor:
    return C
