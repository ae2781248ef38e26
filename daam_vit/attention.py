"""Record the attention of a running model.

While the model runs, a `TorchFunctionMode` sees every torch function. Inside the modules of the attention layers it
recognises the attention, T = A V, in two forms:

    fused    `scaled_dot_product_attention`: q, k, v are seen after every norm, bias, rotation and head expansion
    open     softmax(...) @ V: the matrix A itself is seen

Nothing is replaced in the model, and the same code serves timm, torchvision and transformers. Each T passes through an
identity whose backward receives dY/dT together with the tensors that were seen. They are saved as autograd saves them,
so they cost no memory: the graph keeps q, k and v anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from daam_vit.inputs import UnsupportedModel
from daam_vit.libraries import failure
from daam_vit.plan import AttentionLayer
from daam_vit.rules import Rules
from daam_vit.state import Hook, eval_mode, hooks


@dataclass(frozen=True)
class AttentionMatrix:
    """Attention matrix A `(B, H, M, N)` that is never stored: rows and A^T products on demand."""

    value: Tensor
    """V `(B, H', N, d)`; H' < H if groups of heads share their values."""
    rows: Callable[[slice], Tensor]
    """Queries -> their rows of A, `(B, H, Q, N)` float32."""
    vjp: Callable[[Tensor], Tensor]
    """Gradient with respect to T `(B, H, M, d)` -> A^T times it, `(B, H', N, d)` float32."""


@dataclass(eq=False)
class AttentionCall:
    """One attention of the run."""

    layer: AttentionLayer
    output: Tensor
    """T of the queries that reach the score, `(B, H, Q, d)`, without graph."""
    shape: tuple[int, int, int]
    """Batch, queries M and keys N."""


OnGradient = Callable[[AttentionCall, AttentionMatrix, Tensor], None]
"""Called with a call, its matrix A and C = dY/dT `(B, H, M, d)`."""

OnOutput = Callable[[AttentionCall, Tensor], None]
"""Called with a call and its T `(B, H, M, d)`, with graph."""


class AttentionRecorder(TorchFunctionMode):
    """Records the attention of some layers while a model runs in the current thread.

        with recorder.attached(model):
            output = recorder.run(model, images)
            torch.autograd.grad(output.sum(), recorder.leaves)  # calls on_gradient, from the last layer to the first

    Parameters reach every function detached, so no weight gets a gradient. The graph begins at the output of the first
    attention, which becomes a leaf.
    """

    def __init__(self, layers: Sequence[AttentionLayer], on_gradient: OnGradient, on_output: OnOutput | None = None):
        """Record these layers; see `OnGradient` and `OnOutput`."""
        super().__init__()
        self.layers, self.on_gradient, self.on_output = layers, on_gradient, on_output
        self.rules: Rules | None = None
        """Rules of the backward, in place of the gradient; they see every torch function as this recorder calls it."""
        self.calls: list[AttentionCall] = []
        self.leaves: list[Tensor] = []
        """Every T at which the graph begins."""
        self.layer: AttentionLayer | None = None
        """The layer whose module is running."""
        self._softmaxes: list[tuple[int, int]] = []
        """`(M, N)` of every softmax of this layer that did not multiply values yet."""
        self._matrix: Tensor | None = None
        """The open attention matrix that multiplied values last."""

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Prepare the model for the run and its backward, and restore it at the end, even after an exception."""
        with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
            try:
                yield
            except CheckpointError as error:
                raise UnsupportedModel(
                    "model: it uses torch.utils.checkpoint itself, and what it recomputes is not seen; switch that off"
                ) from error
            except RuntimeError as error:
                if reason := failure(model, error):
                    raise UnsupportedModel(reason) from error
                raise

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call a function that runs the attached model, and record its attention."""
        with self.recording(self.layers):
            output = forward(*args)
        if self.rules is not None:
            self.rules.check(output)
        return output

    @contextmanager
    def recording(self, layers: Iterable[AttentionLayer]) -> Iterator[None]:
        """See the torch functions in the current thread, and know when the modules of these layers run."""
        with self.rules or nullcontext(), self.hooks_of(layers), self:
            yield

    def hooks_of(self, layers: Iterable[AttentionLayer]) -> AbstractContextManager[None]:
        """Return the context in which it knows when the modules of these layers run in the current thread."""
        pairs: list[Hook] = []
        for layer in layers:
            pairs.append((layer.module.register_forward_pre_hook, partial(self._enter_layer, layer)))
            pairs.append((layer.module.register_forward_hook, self._leave_layer))
        return hooks(pairs)

    def _enter_layer(self, layer: AttentionLayer, module: nn.Module, args: tuple) -> None:
        self.layer = layer

    def _leave_layer(self, *_: Any) -> None:
        self.layer = self._matrix = None
        self._softmaxes.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ in _ATTRIBUTES:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        return self.see(func, tuple(map(_without_weights, args)), {k: _without_weights(a) for k, a in kwargs.items()})

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a torch function of the model, and record it if it is an attention."""
        if func is F.multi_head_attention_forward:
            with self:
                output, _ = _multi_head_attention_forward(*args, **kwargs | {"need_weights": False})
            return output, func(*args, **kwargs)[1] if kwargs.get("need_weights", True) else None
        if self.layer is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
            if named["query"].ndim == 4:
                return self.attend(func, fused_matrix, named)
        elif func in _MATMUL and args and args[0].ndim == 4:
            named = {"input": args[0], "other": args[1] if len(args) > 1 else kwargs["other"]}
            if named["other"].ndim == 4 and self._is_attention(args[0]):
                return self.attend(torch.matmul, open_matrix, named)
        output = func(*args, **kwargs)
        if func in _SOFTMAX:
            self._softmaxes.append(tuple(output.shape[-2:]))
        return output

    def _is_attention(self, matrix: Tensor) -> bool:
        """Return whether a matrix multiplies values: the first after a softmax of its size, or the same once more."""
        shape = tuple(matrix.shape[-2:])
        if matrix is not self._matrix and shape in self._softmaxes:
            self._softmaxes.remove(shape)
            self._matrix = matrix
            return True
        return matrix is self._matrix

    def attend(self, func: Callable, matrix_of: Callable[..., AttentionMatrix], named: dict[str, Any]) -> Tensor:
        """Compute T = A V with `func(**named)`, record the call and hand T on."""
        assert self.layer is not None
        T = func(**named)  # (B, H, M, d)
        if not T.requires_grad or not (self.calls or self.rules):
            T = T.detach().requires_grad_()
            self.leaves.append(T)
        tensors = {name: x.detach() for name, x in named.items() if isinstance(x, Tensor)}
        options = {name: x for name, x in named.items() if name not in tensors}
        value = tensors["value" if "value" in tensors else "other"]  # (B, H', N, d)
        output = T.detach()[..., self.layer.query_slice, :].clone()  # (B, H, Q, d)
        call = AttentionCall(self.layer, output, (T.shape[0], T.shape[-2], value.shape[-2]))
        self.calls.append(call)
        if self.on_output is not None:
            self.on_output(call, T)
        names = tuple(tensors)

        def on_gradient(gradient: Tensor, *saved: Tensor) -> None:
            self.on_gradient(call, matrix_of(**dict(zip(names, saved)), **options), gradient)

        return observe(T, on_gradient, *tensors.values())


def observe(x: Tensor, on_gradient: Callable[..., None], *tensors: Tensor) -> Tensor:
    """Return x; its gradient will be passed to `on_gradient`, with these tensors, which are saved as autograd saves."""
    return _Observe.apply(x, on_gradient, *tensors)


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, on_gradient: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.on_gradient = on_gradient
        ctx.save_for_backward(*tensors)
        return x.detach()  # no view: the model may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is not None:
            ctx.on_gradient(gradient, *ctx.saved_tensors)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def _without_weights(argument: Any) -> Any:
    """Detach parameters, including those in a list."""
    kind = type(argument)
    if kind in (list, tuple):
        return kind(map(_without_weights, argument))
    if kind is Tensor or not issubclass(kind, Tensor):
        return argument
    return argument.detach() if isinstance(argument, nn.Parameter) else argument


_ATTRIBUTES = {"device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape"}

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
# A mode sees `F.multi_head_attention_forward` as one call, not the attention inside it. This copy of its code does not
# hand itself to the mode, so the mode sees every function inside.
_multi_head_attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


# ----------------------------------------------------------------------------------------------------------------------
# The matrix A, from what was seen
# ----------------------------------------------------------------------------------------------------------------------


def fused_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionMatrix:
    """Return A = softmax(scale q k^T + mask) of a call of `scaled_dot_product_attention`."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.float()

    def rows(queries: slice) -> Tensor:
        q = query[..., queries, :].float()  # (B, H, Q, d)
        k = repeat_heads(key, query.shape[1]).float()  # (B, H, N, d)
        logits = (q @ k.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, Q, N)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., queries, :]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        if is_causal:
            position = torch.arange(max(query.shape[-2], key.shape[-2]), device=key.device)
            logits = logits.masked_fill(position[: key.shape[-2]] > position[queries, None], -torch.inf)
        return logits.softmax(-1)  # (B, H, Q, N)   Eq. 1

    def vjp(gradient: Tensor) -> Tensor:  # the fused attention's own backward for v: no N x N matrix
        with torch.enable_grad():
            v = value.float().requires_grad_()
            T = F.scaled_dot_product_attention(
                query.float(), key.float(), v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return torch.autograd.grad(T, v, gradient)[0]

    return AttentionMatrix(value, rows, vjp)


def open_matrix(input: Tensor, other: Tensor) -> AttentionMatrix:
    """Return A of a product A V of which the model computes the matrix itself."""
    return AttentionMatrix(
        value=other,
        rows=lambda queries: input[..., queries, :].float(),
        vjp=lambda gradient: input.float().transpose(-2, -1) @ gradient,
    )


def repeat_heads(shared: Tensor, heads: int) -> Tensor:
    """`(B, H', N, d)` -> `(B, H, N, d)`: repeat keys or values that groups of heads share."""
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], 1)
