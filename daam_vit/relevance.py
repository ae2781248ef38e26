"""Observe the tokens that enter every block of a model, and the relevance that reaches them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_vit.attention import observe
from daam_vit.inputs import UnsupportedModel
from daam_vit.plan import AttentionLayer, Plan, blocks_around
from daam_vit.rules import Rules
from daam_vit.state import Hook, hooks


class Relevance(Rules):
    """The relevance R_b[j] = x_b[j] . dY/dx_b[j] of every token j that enters a block b, by the rules.

        recorder.rules = relevance = Relevance(model, plan, recorder.leaves)
        with recorder.attached(model):
            output = recorder.run(model, images)
            relevance.expect_gradient()
            torch.autograd.grad(output, recorder.leaves, gradient)
        relevance.of_steps(plan)  # (B, 1, L, h, w)

    The graph begins at the tokens that enter the first step.
    """

    def __init__(self, model: nn.Module, plan: Plan, leaves: list[Tensor]):
        """Observe the steps of a plan; every tensor at which the graph begins joins the leaves."""
        super().__init__()
        self.leaves = leaves
        self.layers = [step[0] for step in plan.steps]
        around = blocks_around(model, [[layer.module for layer in step] for step in plan.steps])
        self.blocks = [layer.module if block is None else block for block, layer in zip(around, self.layers)]
        self.begun: list[tuple[Tensor, int]] = []
        """The tokens at which the graph begins, as the model has them, and the first step that reads them."""
        self.entered: set[int] = set()
        """The steps whose tokens were seen."""
        self.arrived: list[dict[int, Tensor]] = []
        """For every gradient, step -> R `(B, N)`."""
        self.scale = 1

    def __enter__(self) -> Any:
        """Attach to the blocks and the torch functions."""
        pairs: list[Hook] = []
        for b, block in enumerate(self.blocks):
            pairs.append((partial(block.register_forward_pre_hook, with_kwargs=True), partial(self._enter_block, b)))
        self.contexts = ExitStack()
        self.contexts.enter_context(hooks(pairs))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Detach."""
        super().__exit__(*exception)
        self.contexts.close()

    def _enter_block(self, b: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Observe the tokens among the arguments of the block of step b."""
        arguments: dict[Any, Any] = dict(enumerate(args)) | kwargs
        for name in self._token_arguments(b, args, kwargs):
            arguments[name] = self._observe(b, arguments[name])
        self.entered.add(b)
        return tuple(arguments[i] for i in range(len(args))), {name: arguments[name] for name in kwargs}

    def _token_arguments(self, b: int, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """Return the places of the tokens: of one argument `(B, N, C)`, or of two for the prefix and the patches."""
        layer = self.layers[b]
        for arguments in (dict(enumerate(args)), kwargs):
            lengths = {k: x.shape[1] for k, x in arguments.items() if isinstance(x, Tensor) and x.ndim == 3}
            sizes = layer.prefix, layer.num_keys - layer.prefix
            told_apart = sizes[0] != sizes[1] and sorted(lengths.values()) == sorted(sizes)
            if told_apart or [*lengths.values()] == [layer.num_keys]:
                return list(lengths)
            if lengths:
                break
        raise _not_seen(self.blocks[b])

    def _observe(self, b: int, x: Tensor) -> Tensor:
        first = b
        if b == 0 or not x.requires_grad:
            first = 0 if b == 0 else next((step for tokens, step in self.begun if tokens is x), -1)
            if first < 0:
                raise _cut_off(self.blocks[b])
            self.begun.append((x, first))
            x = x.detach().requires_grad_()
            self.leaves.append(x)
        # tokens that no block has changed are read by all blocks from the first one on: the patches of CaiT
        return observe(x, partial(self._on_gradient, range(first, b + 1), self.layers[b]), x.detach())

    def check(self, output: Tensor) -> None:
        """Refuse an output if a block was not seen, or its gradient would pass a function without a rule."""
        for b, block in enumerate(self.blocks):
            if b not in self.entered:
                raise _not_seen(block)
        super().check(output)

    def expect_gradient(self, scale: int = 1) -> None:
        """Get ready for the next backward, whose gradients are `scale` times too large."""
        self.arrived.append({})
        self.scale = scale

    def _on_gradient(self, steps: range, layer: AttentionLayer, gradient: Tensor, x: Tensor) -> None:
        R = torch.linalg.vecdot(x.float(), gradient.float()) / self.scale  # (B, n)   R_b[j] = x_b[j] . dY/dx_b[j]
        if missing := layer.num_keys - R.shape[1]:  # tokens that are another argument
            R = F.pad(R, (missing, 0) if missing == layer.prefix else (0, missing))  # (B, N)
        for b in steps:
            self.arrived[-1][b] = self.arrived[-1].get(b, 0) + R

    def of_steps(self, plan: Plan) -> Tensor:
        """Return the relevance of the patches at every step, for K gradients: `(B, K, L, h, w)`, signed."""
        by_step = zip(self.layers, self.tokens)
        maps = [torch.stack([layer.to_grid(r, plan.grid) for r in R.unbind(1)], 1) for layer, R in by_step]
        return torch.stack(maps, 2)

    def class_share(self, plan: Plan) -> Tensor | None:
        """Return the share of all |R_b[j]| that the class token holds, `(B, K, L)`; None if the score reads none."""
        if plan.pool is not None or self.layers[0].queries is None:
            return None
        held = [R[..., : layer.queries].abs().sum(2) for layer, R in zip(self.layers, self.tokens)]  # (B, K) each
        total = [R.abs().sum(2).clamp(min=torch.finfo(R.dtype).tiny) for R in self.tokens]
        return torch.stack(held, 2) / torch.stack(total, 2)

    @cached_property
    def tokens(self) -> list[Tensor]:
        """R of every step, `(B, K, N)`, after the last gradient."""
        for b, block in enumerate(self.blocks):
            if b not in self.arrived[-1]:
                raise _cut_off(block)
        tokens = [torch.stack([arrived[b] for arrived in self.arrived], 1) for b in range(len(self.layers))]
        if not torch.isfinite(torch.cat(tokens, 2).sum()):
            raise ValueError("images: the relevance of a token is not finite; look for an overflow of its dtype")
        return tokens


def _not_seen(block: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"variant: 'relevance' needs the tokens that enter a block, one for each key of its attention, and a "
        f"{type(block).__name__} does not get them as one tensor (B, N, C); use another variant"
    )


def _cut_off(block: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"variant: 'relevance' needs the tokens that enter a block, and the graph is cut off at a "
        f"{type(block).__name__}; is there a detach() or torch.no_grad() in the model?"
    )
