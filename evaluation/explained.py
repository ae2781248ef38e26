"""What every method explains: a batch of photos, their classes, and the attention behind the score."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from daam_core import AttentionFlow, UnsupportedModel, attention_flow
from daam_vit.attention import AttentionCall, AttentionMatrix, OnOutput, repeat_heads
from daam_vit.checks import queries_read
from daam_vit.state import hooks
from daam_vit.unknown import AnyAttentionRecorder
from evaluation.decision import Decision

WAY_OUT = (
    "choose methods for any model: --methods daam-norm daam-last daam-signed daam-heads integrated-gradients centre"
)


@dataclass(eq=False)
class BlockAttention:
    """Attention of one block, T = A V, for all queries, and the gradient of the score; all float32, without graph."""

    A: Tensor
    """`(B, H, N, N)`."""
    V: Tensor
    """`(B, H, N, d)`."""
    C: Tensor
    """dY/dT, `(B, H, N, d)`."""

    @property
    def S(self) -> Tensor:
        """Semantic map S_b[j] = a_b[j] V_b[j] of the class token, `(B, H, N, d)`."""
        return self.A[:, :, 0, :, None] * self.V

    @property
    def C_cls(self) -> Tensor:
        """Coefficients C_b = dY/dT_b of the class token, `(B, H, 1, d)`."""
        return self.C[:, :, :1]

    @property
    def dA(self) -> Tensor:
        """dY/dA = C V^T, `(B, H, N, N)`."""
        return self.C @ self.V.transpose(-2, -1)


class BlockRecorder(AnyAttentionRecorder):
    """Records the attention of every block for all queries."""

    def __init__(self, on_output: OnOutput | None = None):
        """Record every attention of a run; see `daam_vit.attention.OnOutput`."""
        super().__init__(self._keep)
        self.on_output = on_output
        self._kept: dict[AttentionCall, BlockAttention] = {}

    def _keep(self, call: AttentionCall, A: AttentionMatrix, C: Tensor) -> None:
        rows = A.rows(slice(None))
        self._kept[call] = BlockAttention(rows, repeat_heads(A.value.float(), rows.shape[1]), C.float())

    def block(self, b: int) -> BlockAttention:
        """Return block b, counted from 0, after a backward that reached it; a later backward replaces it."""
        return self._kept[self.calls[b]]


@dataclass
class Explained:
    """A batch of photos and the classes to explain; what several methods need is computed once."""

    decision: Decision
    images: Tensor
    """`(B, 3, H, W)`, transformed for the model."""
    classes: Tensor
    """`(B,)`: the classes to explain."""
    names: list[str]
    """Names of the photos, for the random maps."""
    seed: int = 0
    """Seed of the random maps."""
    score: str = "logit"
    """Score of the classes: "logit", or without a classifier what the paper has in its place; or "log_odds"."""
    asked: Decision | None = None
    """Decision that gives the gradient of the score; `decision` by default."""

    def __post_init__(self):
        """Compute the gradient, which also finds out whether the classes can be explained."""
        _ = self.grad_outputs

    @property
    def model(self) -> nn.Module:
        """The model that decides."""
        return self.decision.loaded.model

    @cached_property
    def grad_outputs(self) -> Tensor:
        """Gradient of the score, which is `(outputs * grad_outputs).sum(1)` for every image.

        Raises:
            ValueError: if the classes cannot be explained, see `Decision`.
        """
        decision = self.asked or self.decision
        gradient = decision.log_odds if self.score == "log_odds" else decision.grad_outputs
        return gradient(self.images, self.classes)

    def flow_of(self, variant: str) -> AttentionFlow:
        """Return the attention flow of a variant of `attention_flow`."""
        if self.decision.bank is None:
            return attention_flow(self.model, self.images, self.classes, variant=variant, score=self.score)
        return attention_flow(self.model, self.images, importance=self.grad_outputs, variant=variant)

    @cached_property
    def by_log_odds(self) -> Explained:
        """The same photos and classes, with their log-odds as the score."""
        return replace(self, score="log_odds")

    @cached_property
    def relevance(self) -> AttentionFlow:
        """The relevance flow, of the log-odds.

        Raises:
            UnsupportedModel: if the model has none.
        """
        try:
            return self.by_log_odds.flow_of("relevance")
        except UnsupportedModel as error:
            reason = str(error).removeprefix("variant: ").removesuffix("; use another variant")
            raise UnsupportedModel(f"methods: {reason}; {WAY_OUT}") from None

    def with_model(self, model: nn.Module) -> Explained:
        """Return the same photos and classes for another model: by its own scores, or by the same directions.

        With a memory bank the gradient stays that of the decision before: features of another model have no neighbours
        in it.
        """
        decision = replace(self.decision, loaded=replace(self.decision.loaded, model=model))
        return replace(self, decision=decision, asked=(self.asked or self.decision) if decision.bank else None)

    @cached_property
    def flow(self) -> AttentionFlow:
        """The attention flow of the paper."""
        return self.flow_of("paper")

    @cached_property
    def grid(self) -> tuple[int, int]:
        """The patch grid `(h, w)`."""
        return tuple(self.flow.block_maps.shape[-2:])

    @cached_property
    def attention(self) -> list[BlockAttention]:
        """The attention of every block.

        Raises:
            UnsupportedModel: if the flow does not decompose one row of these matrices, block after block.
        """
        name, tokens = type(self.model).__name__, self.flow.num_prefix_tokens + math.prod(self.grid)
        blocks, recorder = self.flow.block_maps.shape[1], BlockRecorder()
        with recorder.attached(self.model):
            score = (recorder.run(self.decision.outputs, self.images) * self.grad_outputs).sum()
            if [call.shape[1:] for call in recorder.calls] != [(tokens, tokens)] * blocks:
                raise UnsupportedModel(
                    f"methods: the attention of {name} is not between all {tokens} tokens, once per block; {WAY_OUT}"
                )
            torch.autograd.grad(score, recorder.leaves)
        attention = [recorder.block(b) for b in range(blocks)]
        if queries_read(attention[-1].C)[1:].any():
            raise UnsupportedModel(f"methods: the score of {name} reads two tokens, but these follow one; {WAY_OUT}")
        return attention

    @cached_property
    def residual_gradients(self) -> list[Tensor]:
        """Gradient dY with respect to what the attention of every block of a timm model adds, `(B, N, C)`."""
        added: list[Tensor] = []
        pairs = [(b.ls1.register_forward_hook, lambda m, args, output: added.append(output)) for b in self.model.blocks]
        with torch.enable_grad(), hooks(pairs):
            images = self.images.detach().requires_grad_()  # the graph begins here: weights may be frozen
            score = (self.decision.outputs(images) * self.grad_outputs).sum()
        return list(torch.autograd.grad(score, added))

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Arrange the patches of `(B, N)` on the grid: `(B, h, w)`."""
        return tokens[:, self.flow.num_prefix_tokens :].unflatten(1, self.grid)
