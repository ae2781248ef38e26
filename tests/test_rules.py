"""The backward rules: x . dY/dx of every function, its forward, and the refusal of all that has no rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_core import UnsupportedModel
from daam_vit.rules import Rules


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W, B = numbers(6, 6, seed=5), numbers(6, seed=6)
EPS = 1e-5


def gradients(function, *inputs):
    """Return the output of a function and the gradients of its sum, weighted, by the rules; None if none arrives."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    rules = Rules()
    with rules:
        y = function(*[x * 1 for x in inputs])  # no leaves: they may be changed in place
    rules.check(y)
    weights = numbers(*y.shape, seed=9)
    return y.detach(), weights, torch.autograd.grad(y, inputs, weights, allow_unused=True)


# ----------------------------------------------------------------------------------------------------------------------
# Functions of one activation
# ----------------------------------------------------------------------------------------------------------------------


def in_place(function):
    def call(x):
        y = x.clone()
        function(y)
        return y

    return call


GATED = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "Tensor.relu": Tensor.relu,
    "relu in place": nn.ReLU(inplace=True),
    "relu in place, its result unused": in_place(nn.ReLU(inplace=True)),
    "relu_": in_place(Tensor.relu_),
    "silu in place": nn.SiLU(inplace=True),
    "leaky_relu": F.leaky_relu,
    "elu": lambda x: F.elu(x, 0.5),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": in_place(nn.ReLU6(inplace=True)),
    "prelu": lambda x: F.prelu(x, B),
    "square": torch.square,
    "power": lambda x: x**3,
    "power in place": in_place(lambda x: x.pow_(2)),
    "x * x": lambda x: x * x,
    "quick-GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "quick-GELU in place": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
    "swish, gate first": lambda x: x.sigmoid() * x,
    "new GELU": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "GELU by erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))),
    "x / (1 + x^2)": lambda x: x / (1 + x**2),
    "soft sign": lambda x: torch.div(x, 1 + x.abs()),
    "x times a reciprocal": lambda x: x * (1 / (2 + x.square())),
    "in place by its own size": in_place(lambda x: x.div_(x.abs() + 1)),
}


@pytest.mark.parametrize("function", GATED.values(), ids=GATED)
def test_a_gate_is_a_constant(function):
    """y = x g: dy/dx is g = y / x; the output is that of the function, bit for bit."""
    x = numbers(4, 6)
    y, weights, (gradient,) = gradients(function, x)
    assert torch.equal(y, function(x.clone()))
    torch.testing.assert_close(gradient, weights * y / x)


def test_a_gate_at_zero_hands_on_no_relevance():
    for function in (F.gelu, F.silu, F.relu):
        _, _, (gradient,) = gradients(function, torch.tensor([0.0, 1.0]))
        assert torch.isfinite(gradient).all()


class ManualRMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * B


NORMS = {
    "layer_norm": (lambda x: F.layer_norm(x, (6,), B, W[0], EPS), True),
    "layer_norm, two dimensions": (lambda x: F.layer_norm(x, (2, 6)), True),
    "torch.layer_norm": (lambda x: torch.layer_norm(x, (6,), B, W[0], EPS, True), True),
    "manual layer norm": (
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS) * B, True
    ),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), B, EPS), False),
    "manual rms norm": (ManualRMSNorm(), False),
    "rms norm by a power": (lambda x: x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5), False),
    "normalize": (lambda x: F.normalize(x, dim=-1), False),
    "manual normalize": (lambda x: x / x.norm(dim=-1, keepdim=True), False),
    "x / sum x": (lambda x: x / x.abs().sum(-1, keepdim=True), False),
}  # fmt: skip


@pytest.mark.parametrize(("function", "centred"), NORMS.values(), ids=NORMS)
def test_the_scale_of_a_norm_is_a_constant(function, centred):
    x = numbers(3, 2, 6)
    y, weights, (gradient,) = gradients(function, x)
    assert torch.equal(y, function(x))
    dims = (1, 2) if y.shape == x.shape and function is NORMS["layer_norm, two dimensions"][0] else (2,)
    c = x - x.mean(dims, keepdim=True) if centred else x
    bias = W[0] if function in (NORMS["layer_norm"][0], NORMS["torch.layer_norm"][0]) else 0
    slope = (y - bias) / c  # constants, element by element
    expected = weights * slope
    torch.testing.assert_close(gradient, expected - expected.mean(dims, keepdim=True) if centred else expected)


# ----------------------------------------------------------------------------------------------------------------------
# Functions of two activations
# ----------------------------------------------------------------------------------------------------------------------

PRODUCTS = {
    "*": lambda x, y: x * y,
    "torch.mul": torch.mul,
    "torch.multiply, by name": lambda x, y: torch.multiply(input=x, other=y),
    "Tensor.mul": Tensor.mul,
    "*=": lambda x, y: x.__imul__(y),
    "mul_ of a part": lambda x, y: x[:, :].mul_(y),
    "@": lambda x, y: x @ y,
    "torch.matmul": torch.matmul,
    "bmm": lambda x, y: torch.bmm(x[None], y[None]),
    "mm": torch.mm,
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "einsum of a list": lambda x, y: torch.einsum("ij,jk", [x, y]),
    "four dimensions": lambda x, y: x[None, None] @ y[None, None].transpose(2, 3),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_each_factor_gets_half(product):
    x, y = numbers(6, 6), numbers(6, 6, seed=1)
    z, weights, halves = gradients(product, x, y)
    x, y = x.requires_grad_(), y.requires_grad_()
    plain = product(x * 1, y * 1)
    assert torch.equal(z, plain)
    for half, whole in zip(halves, torch.autograd.grad(plain, (x, y), weights)):
        torch.testing.assert_close(half, whole / 2)


LINEAR = {
    "linear": lambda x: F.linear(x, W, B),
    "by a constant": lambda x: x * W @ W.T + B,
    "einsum with a constant": lambda x: torch.einsum("ij,jk->ik", x, W),
    "convolution": lambda x: F.conv2d(x[None, None], W[None, None, :2, :2]),
    "rearranged": lambda x: torch.cat([x[1:].flip(0), x[:1]]).t().reshape(3, 12).roll(1, 0),
    "sums": lambda x: 2 * x.sum(1) - x.mean(0) + x[0] / 3,
    "softmax": lambda x: x.softmax(-1),
    "masked": lambda x: torch.where(x.detach() > 0, x, 0).masked_fill(x.detach() > 1, 0),
    "resized": lambda x: F.interpolate(x[None, None], (9, 9), mode="bilinear"),
    "batch norm": nn.BatchNorm1d(6).double().eval().requires_grad_(False),
}


@pytest.mark.parametrize("function", LINEAR.values(), ids=LINEAR)
def test_linear_functions_and_the_softmax_keep_their_gradient(function):
    x = numbers(6, 6)
    y, weights, (gradient,) = gradients(function, x)
    leaf = x.clone().requires_grad_()
    plain = function(leaf)
    assert torch.equal(y, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, leaf, weights)[0])


def attention(q, k, v):
    return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v


CONSTANTS = {"none": "", "query": "q", "key": "k", "value": "v", "query and key": "qk", "all but the key": "qv"}


@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_follows_the_rules_of_its_parts(constants, masked):
    """A constant takes no share: what multiplies it gets all."""
    tensors = {name: numbers(1, 2, 5, 4, seed=i) for i, name in enumerate("qkv")}
    mask = numbers(5, 5, seed=7) if masked else 0 * numbers(5, 5)

    def with_constants(function):
        return lambda *moving: function(**tensors | dict(zip([n for n in "qkv" if n not in constants], moving)))

    moving = [tensors[name] for name in "qkv" if name not in constants]
    fused = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask if masked else None)  # noqa: E731
    opened = lambda q, k, v: (q @ k.transpose(-2, -1) / 2 + mask).softmax(-1) @ v  # noqa: E731
    (y, _, actual), (z, _, expected) = (
        gradients(with_constants(fused), *moving),
        gradients(with_constants(opened), *moving),
    )
    torch.testing.assert_close(y, z)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_shares_of_the_attention():
    """Half to the values, a quarter to q and to k."""
    tensors = [numbers(1, 2, 5, 4, seed=i) for i in range(3)]
    _, weights, shares = gradients(F.scaled_dot_product_attention, *tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    plain = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, weights)
    for share, whole, part in zip(shares, plain, (0.25, 0.25, 0.5)):
        torch.testing.assert_close(share, part * whole)


def test_branches_of_a_gated_mlp():
    """silu(x) y: half to y, half to the gate, which is taken as a constant times x. A sigmoid takes none."""
    x, y = numbers(4, 6), numbers(4, 6, seed=1)
    _, weights, (to_x, to_y) = gradients(lambda x, y: F.silu(x) * y, x, y)
    torch.testing.assert_close(to_x, weights * y * x.sigmoid() / 2)
    torch.testing.assert_close(to_y, weights * F.silu(x) / 2)
    _, weights, (to_x, to_y) = gradients(lambda x, y: x.sigmoid()[..., None].float().squeeze(-1) * y, x, y)
    assert to_x is None
    torch.testing.assert_close(to_y, weights * x.sigmoid().float())


# ----------------------------------------------------------------------------------------------------------------------
# What has no rule
# ----------------------------------------------------------------------------------------------------------------------


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class View(Cubed):
    """Has the name of a linear node."""


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.sin(x) + 1


def part_in_place(x):
    x[:, :2].exp_()
    return x


def assigned(x):
    x[:, :2] = x[:, 2:4].sin()
    return x


REFUSED = {
    "sin": (torch.sin, "sin"),
    "exp": (torch.exp, "exp"),
    "abs": (torch.abs, "abs"),
    "exp_": (lambda x: x.exp_(), "exp"),
    "exp of a part in place": (part_in_place, "copy_slices"),
    "an assignment to a part": (assigned, "copy_slices"),
    "clamp": (lambda x: x.clamp(min=0), "clamp"),
    "maximum": (lambda x: torch.maximum(x, -x), "maximum"),
    "max": (lambda x: x.max(1)[0], "max"),
    "amax": (lambda x: x.amax(1), "amax"),
    "max pooling": (lambda x: F.max_pool2d(x[None], 2), "max_pool2d_with_indices"),
    "log_softmax": (lambda x: F.log_softmax(x, 1), "log_softmax"),
    "softplus": (F.softplus, "softplus"),
    "glu": (F.glu, "glu"),
    "group norm": (lambda x: F.group_norm(x, 2), "native_group_norm"),
    "batch norm of the batch": (nn.BatchNorm1d(6, track_running_stats=False).double().eval(), "native_batch_norm"),
    "a sigmoid that is no gate": (lambda x: x.sigmoid(), "sigmoid"),
    "a tanh that is no gate": (lambda x: W * x.tanh(), "tanh"),
    "a product of two gates": (lambda x: x.sigmoid() * x.tanh(), "(tanh|sigmoid)"),
    "a square root": (lambda x: x.square().sqrt(), "sqrt"),
    "a root by a power": (lambda x: x.square() ** 0.5, "pow"),
    "a power of a number": (lambda x: 2**x, "pow"),
    "x to the x": (lambda x: x.square() ** x, "pow"),
    "a reciprocal": (lambda x: 1 / x, "reciprocal"),
    "a variance": (lambda x: x.var(1), "var"),
    "a norm": (lambda x: x.norm(dim=1), "linalg_vector_norm"),
    "three factors": (lambda x: torch.einsum("ij,ij,ij->i", x, x, x), "this form of bmm"),
    "addmm": (lambda x: torch.addmm(x, x, x), "this form of addmm"),
    "baddbmm": (lambda x: torch.baddbmm(x[None], x[None], x[None]), "this form of baddbmm"),
    "linear of two activations": (lambda x: F.linear(x, x), "this form of mm"),
    "a bias that is an activation": (lambda x: F.linear(x, W, x[0]), "this form of addmm"),
    "a norm whose weight is an activation": (lambda x: F.layer_norm(x, (6,), x[0]), "native_layer_norm"),
    "addcmul": (lambda x: torch.addcmul(x, x, x), "addcmul"),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x), "addcdiv"),
    "lerp": (lambda x: torch.lerp(x, W, x), "lerp"),
    "outer": (lambda x: torch.outer(x[0], x[1]), "this form of mul"),
    "dot": (lambda x: torch.dot(x[0], x[1]), "this form of dot"),
    "vecdot": (lambda x: torch.linalg.vecdot(x, x), "this form of mul"),
    "tensordot": (lambda x: torch.tensordot(x, x), "this form of dot"),
    "inner": (lambda x: torch.inner(x, x), "this form of mm"),
    "inverse": (torch.linalg.inv, "linalg_inv_ex"),
    "cosine similarity": (lambda x: F.cosine_similarity(x, x.flip(0)), r"[\w ]+"),
    "floor division": (lambda x: torch.div(x, 2, rounding_mode="floor") + x, "div"),
    "a function of Python": (Cubed.apply, "cubed"),
    "a function of Python with a known name": (View.apply, "view"),
    "a script": (scripted, "sin"),
    "no gradient": (lambda x: torch.floor_divide(x, 2), "a function without a gradient"),
}


@pytest.mark.parametrize(("function", "name"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_rule_is_refused_by_name(function, name):
    with pytest.raises(
        UnsupportedModel, match=rf"^variant: 'relevance' has no rule for {name}, which the model calls; use another"
    ):
        gradients(function, numbers(6, 6))


def test_what_the_output_does_not_read_is_not_refused():
    def function(x):
        x.sin(), x.max(), Cubed.apply(x)
        return 2 * x

    _, weights, (gradient,) = gradients(function, numbers(6, 6))
    torch.testing.assert_close(gradient, 2 * weights)


def test_constants_follow_no_rule():
    rules = Rules()
    with rules:
        x = numbers(6, 6).sin() / numbers(6, 6).exp()
    rules.check(x)
    assert not x.requires_grad
