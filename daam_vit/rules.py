"""Backward rules that propagate relevance: under them, x . dY/dx is the relevance of x for Y.

Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML 2024,
https://arxiv.org/abs/2402.05602. No rule changes what a function returns, only the gradient that it passes on:

    x W + b, sums, rearrangements    the gradient itself
    softmax x                        the gradient itself
    x y                              half of the gradient to each: A V, Q K^T, the branches of a gated MLP
    softmax(q k^T) v                 so half to v, and a quarter to q and to k
    f(x): GELU, SiLU, ReLU, x^n      f(x) / x is a constant
    x g(u)                           the gate g(u) is a constant: sigmoid, tanh, erf, 1 / u, 1 / sqrt u
    x / s                            s is a constant
    LayerNorm, RMSNorm, x / |x|      so 1 / std x, 1 / rms x and 1 / |x| are constants

A mode applies them while the model runs. Afterwards every node of the graph has to be linear, or to come from a rule:
a gradient without a rule is refused, whatever name, in-place form or hidden code it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from daam_vit.inputs import UnsupportedModel


class Rules(TorchFunctionMode):
    """Applies the rules to the torch functions of the current thread.

        with rules:
            output = model(x)
        rules.check(output)
        torch.autograd.grad(output, x, gradient)

    An activation is a tensor that requires a gradient; all others are constants.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function by its rule, if it has one."""
        kwargs = kwargs or {}
        rule = RULES.get(getattr(func, "__name__", "").removesuffix("_"))
        if rule is None or not _activations(args, kwargs):
            return func(*args, **kwargs)
        return rule(func, *args, **kwargs)

    def check(self, output: Tensor) -> None:
        """Refuse an output if its gradient would pass a function without a rule."""
        nodes: list[Any] = [output.grad_fn]
        seen = {None}
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            kind, inputs = _kind(node), _inputs(node)
            if kind == "_RuledBackward":
                inputs = node.inputs
            elif kind not in _LINEAR and (kind not in _PRODUCTS or len(inputs) > 1 or _divides_by(node)):
                raise _no_rule(kind)
            nodes.extend(inputs)


def _no_rule(kind: str) -> UnsupportedModel:
    """Return the error that names a function by the kind of its node: "MaxPool2DWithIndices"."""
    words = re.sub(r"^.*::|Backward\d?$", "", kind)
    name = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", words).lower()  # max_pool2d_with_indices
    if "NotImplemented" in kind:
        name = "a function without a gradient"
    elif kind in _PRODUCTS:
        name = f"this form of {name}"
    return UnsupportedModel(f"variant: 'relevance' has no rule for {name}, which the model calls; use another variant")


def _kind(node: Any) -> str:
    """Return the name of a node: "View" for ViewBackward0; that of a function of Python ends with "Backward"."""
    return node.name().removesuffix("Backward0")


def _divides_by(node: Any) -> bool:
    """Return whether a node divides by an activation."""
    return _kind(node) == "Div" and len(node.next_functions) > 1 and node.next_functions[1][0] is not None


def _inputs(node: Any) -> list[Any]:
    """Return the nodes of the activations that a node reads."""
    return [n for n, _ in node.next_functions if n is not None]


def _activations(*arguments: Any) -> list[Tensor]:
    """Return the tensors through which relevance flows, however nested."""
    found = []
    for a in arguments:
        if isinstance(a, Tensor):
            found += [a] if a.requires_grad else []
        elif isinstance(a, (list, tuple, dict)):
            found += _activations(*(a.values() if isinstance(a, dict) else a))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


class _Ruled(torch.autograd.Function):
    """The identity; its backward multiplies the gradient. What lies between it and `inputs` is known to be right."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: float, inputs: list[Any]) -> Tensor:
        ctx.factor, ctx.inputs = factor, inputs
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * gradients[0], None, None


class _Gated(torch.autograd.Function):
    """y = f(x), of the shape of x; its backward takes y / x as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        y = f(x)
        ctx.save_for_backward((y / x).nan_to_num_(0))  # 0 / 0
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class _Normed(torch.autograd.Function):
    """y = (x - mean x) scale w + b, or without the mean; its backward takes the scale as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, weight: Tensor | None, mean: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(scale, weight)
        ctx.dtype, ctx.mean = x.dtype, mean
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight = ctx.saved_tensors
        gradient = gradients[0] * scale
        if weight is not None:
            gradient *= weight
        if ctx.mean:
            gradient -= gradient.mean(ctx.mean, keepdim=True)
        return gradient.to(ctx.dtype), None, None, None, None


def _nodes(*arguments: Any) -> list[Any]:
    """Return the nodes of the activations among arguments."""
    return [x.grad_fn for x in _activations(*arguments)]


# ----------------------------------------------------------------------------------------------------------------------
# The rules. One that does not fit the arguments calls the function as it is, and `check` refuses it.
# ----------------------------------------------------------------------------------------------------------------------


def _matrix_product(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """Give each of two activations half of the gradient."""
    factors = _nodes(args, kwargs)
    y = func(*args, **kwargs)
    return _Ruled.apply(y, 0.5, factors) if len(factors) == 2 else y


def _product(func: Callable, input: Any, other: Any) -> Tensor:
    """Give each of two activations half of the gradient; take a gate as a constant."""
    if len(_activations(input, other)) < 2:
        return func(input, other)
    if _is_gate(input) != _is_gate(other):
        return func(input, other.detach()) if _is_gate(other) else func(input.detach(), other)
    return _matrix_product(func, input, other)


def _is_gate(x: Tensor) -> bool:
    """Return whether a tensor is a gate: a function of `_GATES`, and what scales, shifts or rearranges it."""
    node = x.grad_fn
    while node is not None and _kind(node) not in _GATES:
        inputs = _inputs(node)
        plain = _kind(node) in _LINEAR | {"Mul", "Div"} and not _kind(node).startswith("_")
        node = inputs[0] if plain and len(inputs) == 1 else None
    return node is not None


def _quotient(func: Callable, input: Any, other: Any, **kwargs: Any) -> Tensor:
    """Take the divisor as a constant."""
    return func(input, other.detach() if isinstance(other, Tensor) else other, **kwargs)


def _attention(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give the values half of the gradient and the softmax the other half, of which q and k get half each."""
    inputs = _nodes(query, key, value, args, kwargs)
    if query.requires_grad and key.requires_grad:
        query, key = (_Ruled.apply(x, 0.5, _nodes(x)) for x in (query, key))
    y = func(query, key, value, *args, **kwargs)
    return _Ruled.apply(y, 0.5 if value.requires_grad and len(inputs) > 1 else 1, inputs)


def _gated(func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take f(x) / x as a constant in y = f(x)."""
    if _activations(args, kwargs):
        return func(input, *args, **kwargs)
    in_place = func.__name__.endswith("_") or kwargs.get("inplace") or any(a is True for a in args)
    y = _Gated.apply(input, lambda x: func(x.clone() if in_place else x, *args, **kwargs))
    return input.copy_(y) if in_place else y


def _power(func: Callable, input: Any, exponent: Any) -> Tensor:
    """Take x^(n - 1) as a constant in y = x^n."""
    fits = isinstance(exponent, (int, float)) and exponent >= 1
    return _gated(func, input, exponent) if fits else func(input, exponent)


def _layer_norm(
    func: Callable, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *rest: Any,
) -> Tensor:  # fmt: skip
    """Take std x as a constant in y = (x - mean x) / std x * w + b."""
    if _activations(weight, bias):
        return func(input, normalized_shape, weight, bias, eps, *rest)
    x, dims = input.detach(), tuple(range(-len(normalized_shape), 0))
    if x.dtype is torch.float32 and not torch.is_autocast_enabled(x.device.type):
        y, _, scale = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)  # scale = 1 / std x
    else:
        y = func(x, normalized_shape, weight, bias, eps, *rest)
        scale = torch.native_layer_norm(_at_least_float32(x), normalized_shape, None, None, eps)[2]
    return _Normed.apply(input, y, scale, weight, dims)


def _rms_norm(
    func: Callable, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    """Take rms x as a constant in y = x / rms x * w."""
    if _activations(weight):
        return func(input, normalized_shape, weight, eps)
    x, dims = input.detach(), tuple(range(-len(normalized_shape), 0))
    y, smallest = func(x, normalized_shape, weight, eps), torch.finfo(x.dtype).eps if eps is None else eps
    scale = (_at_least_float32(x).square().mean(dims, keepdim=True) + smallest).rsqrt_()
    return _Normed.apply(input, y, scale, weight, ())


def _batch_norm(
    func: Callable, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, *rest: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Leave the gradient of a batch norm that uses its running statistics: it is linear."""
    y = func(input, running_mean, running_var, weight, bias, training, *rest, **kwargs)
    return y if training or _activations(weight, bias) else _Ruled.apply(y, 1, _nodes(input))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


_POINTWISE = {
    "celu", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "normalize", "prelu", "relu", "relu6", "selu",
    "silu", "square",
}  # fmt: skip
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("bmm", "einsum", "linalg_matmul", "matmul", "mm"), _matrix_product),
    **dict.fromkeys(("mul", "multiply"), _product),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    **dict.fromkeys(_POINTWISE, _gated),
    "pow": _power,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
}
"""The rule of a function, by its name; that of its form in place ends with "_"."""

_GATES = {"Erf", "Hardsigmoid", "Pow", "Reciprocal", "Rsqrt", "Sigmoid", "Tanh"}
_PRODUCTS = {"Addbmm", "Addmm", "Addmv", "Baddbmm", "Bmm", "Convolution", "Div", "Dot", "Mm", "Mul", "Mv"}
"""Linear in one activation, if the others are constants."""
_LINEAR = {
    "_GatedBackward", "_NormedBackward", "_ObserveBackward", "torch::autograd::AccumulateGrad",
    "torch::autograd::CopyBackwards", "AdaptiveAvgPool2D", "Add", "AddBackward1", "Alias", "AsStrided", "AvgPool2D",
    "Cat", "Clone", "ConstantPadNd", "Cumsum", "Diagonal", "Expand", "Flip", "Gather", "Index", "IndexAdd",
    "IndexSelect", "MaskedFill", "Mean", "MeanBackward1", "Neg", "Permute", "Repeat", "ReshapeAlias", "Roll",
    "RsubBackward1", "Scatter", "Select", "Slice", "Softmax", "Split", "SplitWithSizes", "Squeeze",
    "SqueezeBackward1", "SqueezeBackward2", "Stack", "Sub", "Sum", "SumBackward1", "T", "ToCopy", "Transpose",
    "Tril", "Triu", "Unbind", "Unfold", "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBicubic2D",
    "UpsampleBilinear2D", "UpsampleNearest2D", "View", "Where",
}  # fmt: skip
"""Linear in all activations together, and the softmax."""
