"""Take the relevance flow apart: what is each of its rules, and each of its choices, worth?

    --methods ablation      daam, daam-relevance, attnlrp, which is its first block alone, and all methods of `ABLATION`

All variants explain the log-odds of the class, except `relevance-logit`. Those of the rules of attention need a model
with fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from daam_core import UnsupportedModel
from daam_vit.attention import AttentionCall, AttentionMatrix, AttentionRecorder, repeat_heads
from daam_vit.families import plan_of
from daam_vit.relevance import Relevance
from daam_vit.rules import RULES as BACKWARD_RULES
from evaluation.explained import WAY_OUT, Explained

Rule = Callable[..., Tensor]
"""Called with a torch function and its arguments, in place of the function."""
Weighting = Callable[[AttentionCall, AttentionMatrix, Tensor], Tensor]
"""Turns an attention, its matrix A `(B, H, M, N)` and C = dY/dT `(B, H, M, d)` into a map of all keys, `(B, N)`."""


class AblatedRelevance(Relevance):
    """The relevance flow with other rules for some functions."""

    def __init__(self, rules: Mapping[str, Rule], *args: Any):
        """Replace the rules of functions by name."""
        super().__init__(*args)
        self.rules, self.used = rules, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function by its rule."""
        rule = self.rules.get(getattr(func, "__name__", "").removesuffix("_"))
        if rule is None:
            return super().__torch_function__(func, types, args, kwargs)
        self.used = True
        return rule(func, *args, **(kwargs or {}))

    def check(self, output: Tensor) -> None:
        """Accept plain gradients, since they are what is compared; the relevance flow has checked the model."""


def relevance_of(explained: Explained, rules: Mapping[str, Rule], weighting: Weighting | None = None) -> list[Tensor]:
    """Return the map of every block, `(B, h, w)` each, under other rules.

    Args:
        explained: what to explain; its score decides on the gradient.
        rules: rules by the names of functions, in place of those of `daam_vit.rules`.
        weighting: makes the maps from the attention of the blocks; None: R_b of their tokens.

    Raises:
        UnsupportedModel: if the model has no relevance flow, or calls none of the functions.
    """
    _ = explained.relevance  # refuses models that have none
    model, maps = explained.model, {}
    plan = plan_of(model, explained.images, "class")

    def on_gradient(call: AttentionCall, A: AttentionMatrix, C: Tensor) -> None:
        if weighting is not None:
            maps[call.layer] = call.layer.to_grid(weighting(call, A, C.float()), plan.grid)

    recorder = AttentionRecorder(plan.layers, on_gradient)
    recorder.rules = relevance = AblatedRelevance(rules, model, plan, recorder.leaves)
    with recorder.attached(model):
        outputs = recorder.run(explained.decision.outputs, explained.images)
        if rules and not relevance.used:
            raise UnsupportedModel(f"methods: {type(model).__name__} calls no {' or '.join(rules)}; {WAY_OUT}")
        relevance.expect_gradient()
        torch.autograd.grad(outputs, recorder.leaves, explained.grad_outputs, allow_unused=True)
    if weighting is None:
        return list(relevance.of_steps(plan)[:, 0].unbind(1))
    return [sum(maps[layer] for layer in step) for step in plan.steps]


# ----------------------------------------------------------------------------------------------------------------------
# Other rules
# ----------------------------------------------------------------------------------------------------------------------


def plain(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """Pass the gradient itself on."""
    return func(*args, **kwargs)


def attention(shares: tuple[int, int], func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any,
              **kwargs: Any) -> Tensor:  # fmt: skip
    """Halve the gradient of q and k, and that of v, `shares` times; the relevance flow does so (2, 1) times."""
    for _ in range(shares[0]):
        query, key = _halved(query), _halved(key)
    for _ in range(shares[1]):
        value = _halved(value)
    return func(query, key, value, *args, **kwargs)


def _halved(x: Tensor) -> Tensor:
    """Return x, which gets half of its gradient; exact, as 0.5 x + 0.5 x is."""
    return 0.5 * x + 0.5 * x.detach()


def frozen_attention(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take A as a constant: CP-LRP, Ali et al. 2022, https://arxiv.org/abs/2202.07304."""
    return func(query.detach(), key.detach(), value, *args, **kwargs)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


NORM = _each("layer_norm rms_norm", plain)
GELU = _each("celu elu gelu hardswish hardtanh leaky_relu mish prelu relu relu6 selu silu", plain)
ATTENTION = _each("scaled_dot_product_attention", plain)
RULES: dict[str, dict[str, Rule]] = {
    "plain-norm": NORM,
    "plain-gelu": GELU,
    "plain-av": _each("scaled_dot_product_attention", partial(attention, (1, 0))),
    "plain-qk": _each("scaled_dot_product_attention", partial(attention, (1, 1))),
    "plain-attention": ATTENTION,
    "frozen-attention": _each("scaled_dot_product_attention", frozen_attention),
    "plain": dict.fromkeys(BACKWARD_RULES, plain),
}
"""What takes the place of the rules: the plain gradient of norms, or of GELU; no halves in A V, in Q K^T, or in both;
no gradient of A; no rule at all, which is the gradient times the tokens."""


def rules_method(rules: Mapping[str, Rule]) -> Callable[[Explained], Tensor]:
    """Return the method that adds the signed R_b under other rules."""
    return lambda explained: sum(relevance_of(explained.by_log_odds, rules))


# ----------------------------------------------------------------------------------------------------------------------
# Other scores, maps, signs and blocks
# ----------------------------------------------------------------------------------------------------------------------


def relevance_logit(explained: Explained) -> Tensor:
    """Explain the logit of the class, or without a classifier the paper's importance."""
    return sum(relevance_of(explained, {}))


def relevance_relu(explained: Explained) -> Tensor:
    """Drop the negative values of every R_b before they are added."""
    return explained.relevance.block_maps.relu().sum(1)


def relevance_positive(explained: Explained) -> Tensor:
    """Drop the negative values of the sum."""
    return explained.relevance.accumulated[:, -1].relu()


def relevance_half(explained: Explained) -> Tensor:
    """Add the first half of the blocks only, rounded up."""
    maps = explained.relevance.accumulated
    return maps[:, (maps.shape[1] - 1) // 2]


def relevance_last(explained: Explained) -> Tensor:
    """Return R_L of the tokens that enter the last block."""
    return explained.relevance.block_maps[:, -1]


def relevance_values(explained: Explained, rules: Mapping[str, Rule] | None = None) -> Tensor:
    """Put the values of all tokens in the place of the tokens: sum_h ReLU(V_b[j] . dY/dV_b[j]), added over blocks."""

    def weighting(call: AttentionCall, A: AttentionMatrix, C: Tensor) -> Tensor:
        return (A.value.float() * A.vjp(C)).sum(3).relu().sum(1)

    return sum(relevance_of(explained.by_log_odds, rules or {}, weighting))


def relevance_paper(explained: Explained) -> Tensor:
    """Put the paper's S_b[j] . C_b in the place of R_b[j]: what flows from patch j to the class token in block b."""
    return sum(_paper_maps(explained))


def relevance_paper_relu(explained: Explained) -> Tensor:
    """Drop the negative values of every S_b . C_b before they are added, as the paper does."""
    return sum(heat.relu() for heat in _paper_maps(explained))


def _paper_maps(explained: Explained) -> list[Tensor]:
    def weighting(call: AttentionCall, A: AttentionMatrix, C: Tensor) -> Tensor:
        queries = call.layer.query_slice
        a = A.rows(queries)  # (B, H, Q, N)
        V = repeat_heads(A.value.float(), a.shape[1])  # (B, H, N, d)
        return (a * (C[..., queries, :] @ V.transpose(-2, -1))).sum((1, 2))  # (B, N)

    return relevance_of(explained.by_log_odds, {}, weighting)


ABLATION: dict[str, Callable[[Explained], Tensor]] = {
    **{f"relevance-{name}": rules_method(rules) for name, rules in RULES.items()},
    "relevance-logit": relevance_logit,
    "relevance-relu": relevance_relu,
    "relevance-positive": relevance_positive,
    "relevance-half": relevance_half,
    "relevance-last": relevance_last,
    "relevance-values": relevance_values,
    "relevance-values-plain": partial(relevance_values, rules=RULES["plain"]),
    "relevance-paper": relevance_paper,
    "relevance-paper-relu": relevance_paper_relu,
}
"""Variants of the relevance flow, which are not part of "all"; docs/evaluation.md discusses them."""
