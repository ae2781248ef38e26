"""Compute less, with the same result: a layer over the recorder that can be left out.

Three shortcuts:

1. After the last attention, tokens that cannot affect the score are skipped: its other queries are not computed, and
   all that follows sees the first rows only.
2. Between the first and the second attention, the graph of matrix products holds the first rows only: the gradient of
   the other rows would end at the first attention, and no map reads it there.
3. With little memory, a block keeps its input and what its fused attention returned, and computes the rest again in the
   backward (Chen et al. 2016, "Training deep nets with sublinear memory cost", https://arxiv.org/abs/1604.06174).

The first two need no code for each family. They look at the name of every torch function: what is known to treat tokens
one by one runs on the first rows. If anything else follows the last attention, the shortcut is given up, and the model
runs once more for all tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from daam_vit.attention import AttentionMatrix, AttentionRecorder, OnGradient
from daam_vit.inputs import UnsupportedModel
from daam_vit.plan import AttentionLayer, Plan, blocks_around

LARGE_GRAPH = 256 * 2**20
"""Bytes per image; `memory="auto"` recomputes the blocks of a model that would keep more."""


class ShortcutRecorder(AttentionRecorder):
    """An `AttentionRecorder` that skips tokens and recomputes blocks."""

    def __init__(self, plan: Plan, on_gradient: OnGradient, memory: str = "auto"):
        """Record the layers of a plan; `memory` as in `attention_flow`."""
        super().__init__(plan.layers, on_gradient)
        self.memory, self.last = memory, plan.last
        self.recomputable = [layer.module for step in plan.steps[:-1] for layer in step]
        self.after_first: tuple[int, int] | None = None
        self.after_last: tuple[int, int] | None = None
        """After the first, or the last, attention: how many rows count, and of how many."""
        self.blocks: list[nn.Module] = []
        """The blocks that may be recomputed."""
        self.outputs: dict[AttentionLayer, tuple[Tensor, int]] = {}
        """T of fused attention in these blocks, without graph, and its version, which a change in place raises."""
        self.recomputed: nn.Module | None = None
        """The block that was recomputed last."""
        self.thread: int | None = None
        """The thread in which the model runs."""

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Attach as the base class does; refuse a block that is not the same when it is recomputed."""
        with super().attached(model):
            if self.memory == "low" or (self.memory == "auto" and self._may_be_large()):
                around = blocks_around(model, [[module] for module in self.recomputable])
                self.blocks = [block for block in dict.fromkeys(around) if block is not None]
            try:
                yield
            except CheckpointError as error:
                if self.recomputed is None:
                    raise
                raise UnsupportedModel(
                    f"model: a {type(self.recomputed).__name__} does not compute the same twice; pass memory='fast'"
                ) from error

    def _may_be_large(self) -> bool:
        """Return whether blocks may keep more than `LARGE_GRAPH`, by their tokens and the widest of their weights."""
        sizes = []
        for layer in self.layers:
            widths = (math.prod(p.shape[-1:]) * p.itemsize for p in layer.module.parameters())
            sizes.append((layer.prefix + math.prod(layer.grid)) * max(widths, default=math.inf))
        return _graph_bytes(len(sizes), max(sizes)) > LARGE_GRAPH

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run as the base class does; if rows mix after the last attention, run once more for all tokens."""
        try:
            with suppress(_MixesRows):
                output = self._run(forward, *args)
                if not self.after_last or getattr(output, "ndim", 2) == 2:  # else all tokens are the output
                    return output
            self.last = self.after_first = self.after_last = None
            self._leave_layer()
            for recorded in (self.calls, self.leaves, self.outputs):
                recorded.clear()
            return self._run(forward, *args)
        finally:
            self.after_first = self.after_last = None

    def _run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        self.thread = threading.get_ident()
        with recomputed_blocks(self, self.blocks):
            return super().run(forward, *args)

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call as the base class does, on the first rows only if the others do not count."""
        if self.after_last is not None:
            return _on_first_rows(*self.after_last, func, args, kwargs)
        if self.after_first is None:
            return super().see(func, args, kwargs)
        kind = row_kind(func, args, kwargs)
        if kind and func is F.linear and args and args[0].shape[1:-1] == self.after_first[1:]:
            return _linear_with_partial_graph(self.after_first[0], *args, **kwargs)
        if not kind:
            self.after_first = None
        output = super().see(func, args, kwargs)
        if kind == "rearranges" and output.ndim < 3:
            self.after_first = None
        return output

    def attend(self, func: Callable, matrix_of: Callable[..., AttentionMatrix], named: dict[str, Any]) -> Tensor:
        """Attend as the base class does; compute only the first queries of the last layer."""
        assert self.layer is not None
        name = "query" if "query" in named else "input"
        tokens = named[name].shape[-2]
        rows = self.layer.queries or tokens
        is_last = self.layer is self.last and rows < tokens and not named.get("is_causal")
        if is_last:
            for argument in (name, "attn_mask"):
                if named.get(argument) is not None and named[argument].shape[-2] > 1:
                    named[argument] = named[argument][..., :rows, :]
        T = super().attend(func, matrix_of, named)
        if self.blocks and func is F.scaled_dot_product_attention:
            self.outputs.setdefault(self.layer, (T.detach(), T._version))
        if is_last:
            self.after_last = rows, tokens
            return F.pad(T, (0, 0, 0, tokens - rows))
        if len(self.calls) == 1 and self.last is not None and rows < tokens and self.rules is None:
            self.after_first = rows, tokens
        return T


# ----------------------------------------------------------------------------------------------------------------------
# Functions that treat tokens one by one
# ----------------------------------------------------------------------------------------------------------------------


class _MixesRows(Exception):
    """After the last attention, a function was called that may read more than the first rows."""


def row_kind(func: Callable, args: Sequence, kwargs: dict) -> str:
    """Say what a function does with tokens `(B, N, C)`, if it treats them one by one.

    Returns:
        "looks" (it changes nothing), "computes", "rearranges" (the heads of all tokens), or "" if nothing is known.
    """
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


def _on_first_rows(rows: int, tokens: int, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function after the last attention, with every `(B, N, C)` cut to its first rows."""
    kind = row_kind(func, args, kwargs)
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


def _linear_with_partial_graph(rows: int, x: Tensor, *weights: Tensor, **named: Tensor) -> Tensor:
    """Call `F.linear` on tokens `(B, N, C)`, with a graph for the first rows only."""
    parts = x[:, :rows].contiguous(), x.detach()[:, rows:].contiguous()
    return torch.cat([F.linear(part, *weights, **named) for part in parts], 1)


def _first_rows(rows: int, tokens: int, argument: Any) -> Any:
    """Cut every `(B, N, C)` with N `tokens`, including those in a list, to `(B, rows, C)`."""
    if type(argument) in (list, tuple):
        return type(argument)(_first_rows(rows, tokens, a) for a in argument)
    has_tokens = isinstance(argument, Tensor) and argument.ndim == 3 and argument.shape[1] == tokens
    return argument[:, :rows] if has_tokens else argument


_COMPUTES = {
    "add", "cat", "chunk", "contiguous", "dropout", "float", "gelu", "layer_norm", "linear", "mean", "mul", "pow",
    "relu", "rms_norm", "rsqrt", "sigmoid", "silu", "split", "sub", "tanh", "to",
}  # fmt: skip
_REARRANGES = {"contiguous", "flatten", "permute", "reshape", "transpose", "view"}
_LOOKS = {
    "__len__", "detach", "dim", "is_contiguous", "is_floating_point", "numel", "register_hook",
    "requires_grad_", "size", "stride", "untyped_storage",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Blocks that are recomputed
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def recomputed_blocks(recorder: ShortcutRecorder, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Replace `forward` of blocks, so that the recorder recomputes them; other threads run them as they are."""
    try:
        with _replacing:
            for block in blocks:
                forward = block.__dict__.get("forward")
                if not isinstance(forward, _Forward):
                    block.forward = forward = _Forward(block, len(blocks))
                forward.recorders.append(recorder)
        yield
    finally:
        with _replacing:
            for block in blocks:
                forward = block.__dict__.get("forward")
                if isinstance(forward, _Forward) and recorder in forward.recorders:
                    forward.remove(recorder)


_replacing = threading.Lock()


class _Forward:
    """Stands for `forward` of a block while recorders are attached to it, of one thread or of several."""

    def __init__(self, block: nn.Module, num_blocks: int):
        self.block, self.num_blocks = block, num_blocks
        self.plain, self.own = block.forward, block.__dict__.get("forward")  # own: an attribute of the block itself
        self.recorders: list[ShortcutRecorder] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = next((r for r in reversed([*self.recorders]) if r.thread == threading.get_ident()), None)
        tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        size = 0 if tokens is None else math.prod(tokens.shape[1:]) * tokens.dtype.itemsize
        if recorder is None or not (recorder.memory == "low" or _graph_bytes(self.num_blocks, size) > LARGE_GRAPH):
            return self.plain(*args, **kwargs)
        outputs = _AttentionOutputs()
        contexts = outputs, _SecondPass(recorder, self.block, outputs)
        block = partial(self.plain, **kwargs)  # whose names may be those of arguments of `checkpoint`
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: contexts)

    def remove(self, recorder: ShortcutRecorder) -> None:
        """Detach a recorder; the last one puts `forward` back."""
        self.recorders.remove(recorder)
        if not self.recorders:
            del self.block.forward
            if self.own is not None:
                self.block.forward = self.own


def _graph_bytes(num_blocks: int, size: float) -> float:
    """Return what blocks keep of tokens of `size` bytes: about ten times that, norm1, qkv (3), T, norm2 and MLP (4)."""
    return 10 * num_blocks * size


class _AttentionOutputs(TorchDispatchMode):
    """Keeps what fused attention returns, its output and the log-sum-exp of its rows; returns it in the second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple] = []
        self.replayed: Iterator[tuple] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if not name.startswith("aten::_scaled_dot_product_") or "math" in name:
            return func(*args, **(kwargs or {}))
        if self.replayed is not None:
            outputs = next(self.replayed, ())
            if not outputs:
                raise CheckpointError("there was less attention in the first pass")
        else:
            outputs = func(*args, **(kwargs or {}))
            self.kept.append(outputs)
        return tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)


class _SecondPass:
    """Context of a recomputation: the recorder as it was when the block began, and the kept attention outputs."""

    def __init__(self, recorder: ShortcutRecorder, block: nn.Module, outputs: _AttentionOutputs):
        self.recorder, self.block, self.outputs = recorder, block, outputs
        self.calls, self.layer, self.after_first = len(recorder.calls), recorder.layer, recorder.after_first

    def __enter__(self) -> None:
        recorder, modules = self.recorder, set(self.block.modules())
        layers = [layer for layer in recorder.layers if layer.module in modules]
        kept = [recorder.outputs[layer] for layer in layers if layer in recorder.outputs and self.outputs.kept]
        if any(T._version != version for T, version in kept):
            raise CheckpointError("the output of the attention was changed in place")
        self.recorded = recorder.calls, recorder.leaves
        recorder.calls, recorder.leaves = recorder.calls[: self.calls], []  # what is recorded now is not kept
        recorder.layer, recorder.after_first, recorder.recomputed = self.layer, self.after_first, self.block
        self.outputs.replayed = iter(self.outputs.kept)
        self.contexts = ExitStack()
        self.contexts.enter_context(self.outputs)
        self.contexts.enter_context(recorder.recording(layers))

    def __exit__(self, *exception: Any) -> None:
        self.contexts.close()
        recorder, self.outputs.replayed = self.recorder, None
        recorder._leave_layer()
        recorder.after_first = None
        recorder.calls, recorder.leaves = self.recorded
