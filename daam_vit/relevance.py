"""Propagate relevance backwards through a Vision Transformer: the rules of AttnLRP, and the tokens of every block.

Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML 2024,
https://arxiv.org/abs/2402.05602. The forward stays as it is. A rule changes what the backward of a function returns, so
that x . dY/dx is the relevance of x for Y:

    x W + b, sums, rearrangements    the gradient itself
    softmax                          the gradient itself
    LayerNorm, RMSNorm               (x - mean x) / std x * w + b: the scale 1 / std x is a constant
    GELU, SiLU, ...                  y = x g(x): the gate g(x) is a constant, dy/dx := f(x) / x
    x y, A V, Q K^T                  half of the gradient to each of the two
    fused attention                  so a quarter of the gradient to q and k, half to v

The rules are a mode below the recorder of the attention: they see every torch function in the form in which the
recorder calls it. A function of activations without a rule is refused by name; its gradient is never used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daam_vit.attention import observe
from daam_vit.inputs import UnsupportedModel
from daam_vit.plan import AttentionLayer, Plan
from daam_vit.state import Hook, hooks


class Relevance(TorchFunctionMode):
    """Applies the rules while a model runs in the current thread, and observes the tokens that enter every step.

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
        self.arrived: list[dict[int, Tensor]] = []
        """For every gradient, step -> R `(B, N)`."""
        self.scale = 1
        self.blocks = blocks_of(model, plan)
        self.layers = [step[0] for step in plan.steps]

    def __enter__(self) -> Any:
        """Attach to the blocks and the torch functions."""
        pairs: list[Hook] = [
            (block.register_forward_pre_hook, partial(self._enter_block, b)) for b, block in enumerate(self.blocks)
        ]
        self.contexts = ExitStack()
        self.contexts.enter_context(hooks(pairs))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Detach."""
        super().__exit__(*exception)
        self.contexts.close()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function by its rule."""
        kwargs = kwargs or {}
        if not _activations(*args, *kwargs.values()):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "a function")
        if name in _RULES:
            return _RULES[name](func, *args, **kwargs)
        output = func(*args, **kwargs)
        if not {name, name.removesuffix("_")} & _LINEAR and _activations(output):
            raise no_rule(name)
        return output

    def _enter_block(self, b: int, module: nn.Module, args: tuple) -> tuple:
        """Observe the tokens among the arguments of the block of step b."""
        layer, observed = self.layers[b], [*args]
        places = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point()]
        if not places or len({len(args[i]) for i in places}) > 1:
            raise UnsupportedModel(
                f"variant: 'relevance' needs the tokens that enter a block, and a {type(module).__name__} does not get "
                f"them as one tensor (B, N, C); use another variant"
            )
        for i in places:
            x = args[i]
            begins = not x.requires_grad
            if begins:
                x = x.detach().requires_grad_()
                self.leaves.append(x)
            # tokens that no block has changed are read by all blocks up to this one: the patches of CaiT
            steps = range(0 if begins else b, b + 1)
            observed[i] = observe(x, partial(self._on_gradient, steps, layer), x.detach())
        return tuple(observed)

    def expect_gradient(self, scale: int = 1) -> None:
        """Get ready for the next backward, whose gradients are `scale` times too large."""
        self.arrived.append({})
        self.scale = scale

    def _on_gradient(self, steps: range, layer: AttentionLayer, gradient: Tensor, x: Tensor) -> None:
        R = (x.float() * gradient.float()).sum(2) / self.scale  # (B, n)   R_b[j] = x_b[j] . dY/dx_b[j]
        cells = math.prod(layer.grid) if layer.cells is None else layer.cells.shape[1]
        missing = layer.prefix + cells - R.shape[1]  # tokens that another argument has
        R = F.pad(R, (missing, 0) if R.shape[1] == cells else (0, missing))  # (B, N)
        for b in steps:
            self.arrived[-1][b] = self.arrived[-1].get(b, 0) + R

    def of_steps(self, plan: Plan) -> Tensor:
        """Return the relevance of the patches at every step, for K gradients: `(B, K, L, h, w)`, signed."""
        by_step = zip(self.layers, self._tokens())
        maps = [torch.stack([layer.to_grid(r, plan.grid) for r in R.unbind(1)], 1) for layer, R in by_step]
        return torch.stack(maps, 2)

    def class_share(self, plan: Plan) -> Tensor | None:
        """Return the share of all |R_b[j]| that the class token holds, `(B, K, L)`; None if none is read."""
        if plan.pool is not None or self.layers[0].queries is None:
            return None
        held = [R[..., : layer.queries].abs().sum(2) for layer, R in zip(self.layers, self._tokens())]  # (B, K) each
        total = [R.abs().sum(2).clamp(min=torch.finfo(R.dtype).tiny) for R in self._tokens()]
        return torch.stack(held, 2) / torch.stack(total, 2)

    def _tokens(self) -> list[Tensor]:
        """R of every step, `(B, K, N)`."""
        return [torch.stack([arrived[b] for arrived in self.arrived], 1) for b in range(len(self.layers))]


def blocks_of(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Return the block of every step: the innermost element of a module list that contains its layers, or the layer."""
    by_name = dict(model.named_modules())
    names = {module: name for name, module in by_name.items()}
    blocks = []
    for step in plan.steps:
        block, name = step[0].module, names[step[0].module]
        while name:
            parent = name.rpartition(".")[0]
            held = isinstance(by_name[parent], (nn.ModuleList, nn.Sequential))
            if held and {layer.module for layer in step} <= set(by_name[name].modules()):
                block = by_name[name]
                break
            name = parent
        blocks.append(block)
    return blocks


def no_rule(name: str) -> UnsupportedModel:
    """Return the error that refuses a function."""
    return UnsupportedModel(f"variant: 'relevance' has no rule for {name}, which the model calls; use another variant")


def _activations(*arguments: Any) -> list[Tensor]:
    """Return the tensors among arguments, including those in a list, through which relevance flows."""
    flat = [b for a in arguments for b in (a if isinstance(a, (list, tuple)) else [a])]
    return [a for a in flat if isinstance(a, Tensor) and a.requires_grad]


# ----------------------------------------------------------------------------------------------------------------------
# The rules
# ----------------------------------------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    """The identity; its backward multiplies the gradient by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


class _Gated(torch.autograd.Function):
    """y = f(x) of single elements; its backward takes y / x as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        y = f(x)
        ctx.save_for_backward((y / x).nan_to_num_(0))  # 0 / 0
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class _Normed(torch.autograd.Function):
    """y = (x - mean x) * scale * weight + bias, or without the mean; its backward takes scale as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, weight: Tensor | None, centred: bool) -> Tensor:
        ctx.save_for_backward(scale, weight)
        ctx.dtype, ctx.centred = x.dtype, centred
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight = ctx.saved_tensors
        gradient = (gradients[0] if weight is None else gradients[0] * weight) * scale
        if ctx.centred:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        return gradient.to(ctx.dtype), None, None, None, None


def _times(x: Any, factor: float) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_times(a, factor) for a in x)
    return _Scaled.apply(x, factor) if isinstance(x, Tensor) and x.requires_grad else x


def _product(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """Give each of two activations half of the gradient; an activation times a constant is linear."""
    if len(_activations(*args, *kwargs.values())) > 1:
        args, kwargs = _times(args, 0.5), {key: _times(a, 0.5) for key, a in kwargs.items()}
    return func(*args, **kwargs)


def _attention(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give v half of the gradient, and the softmax the other half, of which q and k get half each."""
    return func(_times(query, 0.25), _times(key, 0.25), _times(value, 0.5), *args, **kwargs)


def _gated(func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take f(x) / x as a constant in y = f(x) of single elements."""
    in_place = kwargs.get("inplace") or any(a is True for a in args)
    return _Gated.apply(input, lambda x: func(x.clone() if in_place else x, *args, **kwargs))


def _power(func: Callable, input: Tensor, exponent: Any) -> Tensor:
    """Take x^(n - 1) as a constant in y = x^n."""
    if not isinstance(exponent, (int, float)) or exponent < 1:
        raise no_rule(f"pow with the exponent {exponent}")
    return _gated(func, input, exponent)


def _layer_norm(
    func: Callable, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Take std x as a constant in y = (x - mean x) / std x * w + b."""
    if len(normalized_shape) != 1:
        raise no_rule(f"layer_norm over {len(normalized_shape)} dimensions")
    x = input.detach()
    centred = x.float() - x.float().mean(-1, keepdim=True)
    scale = (centred.square_().mean(-1, keepdim=True) + eps).rsqrt()  # several times as fast as torch.var
    return _Normed.apply(input, func(x, normalized_shape, weight, bias, eps), scale, weight, True)


def _rms_norm(
    func: Callable, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    """Take rms x as a constant in y = x / rms x * w."""
    if len(normalized_shape) != 1:
        raise no_rule(f"rms_norm over {len(normalized_shape)} dimensions")
    x = input.detach()
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.float().square().mean(-1, keepdim=True) + floor).rsqrt()
    return _Normed.apply(input, func(x, normalized_shape, weight, eps), scale, weight, False)


def _normalize(func: Callable, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    """Take |x| as a constant in y = x / |x|."""
    x = input.detach()
    scale = torch.linalg.vector_norm(x.float(), p, dim, keepdim=True).clamp(min=eps).reciprocal()
    return _Normed.apply(input, func(x, p, dim, eps), scale, None, False)


def _constant(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """Take a scale or a gate as a constant."""
    return func(*args, **kwargs).detach()


def _quotient(func: Callable, input: Tensor, other: Any, **kwargs: Any) -> Tensor:
    """Divide by a constant, which is linear."""
    if _activations(other):
        raise no_rule("div by an activation")
    return func(input, other, **kwargs)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("bmm", "conv2d", "einsum", "linear", "matmul", "mul"), _product),
    **dict.fromkeys(("elu", "gelu", "hardswish", "leaky_relu", "mish", "relu", "relu6", "silu", "square"), _gated),
    **dict.fromkeys(("linalg_vector_norm", "norm", "rsqrt", "sigmoid", "sqrt", "std", "var"), _constant),
    **dict.fromkeys(("div", "true_divide"), _quotient),
    "pow": _power,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
    "scaled_dot_product_attention": _attention,
}
_LINEAR = {
    "__get__", "__getitem__", "__rsub__", "__setitem__", "add", "cat", "chunk", "clone", "contiguous", "copy", "div",
    "dropout", "expand", "expand_as", "flatten", "flip", "float", "index_select", "interpolate", "masked_fill", "mean",
    "movedim", "mul", "narrow", "neg", "pad", "permute", "repeat", "repeat_interleave", "reshape", "roll", "rsub",
    "select", "softmax", "split", "squeeze", "stack", "sub", "sum", "to", "transpose", "type_as", "unbind", "unflatten",
    "unsqueeze", "view", "where",
}  # fmt: skip
