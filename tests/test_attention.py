"""The recorder sees every attention and hands on its exact matrix, without the method and without shortcuts."""

import pytest
import torch
import torch.nn.functional as F
from derivations import assert_same_maps
from odd_models import InPlace
from tiny_models import TINY, random_images, tiny_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from daam_core import UnsupportedModel, all_rows_map, attention_flow, block_map
from daam_vit.attention import AttentionRecorder, fused_matrix, repeat_heads
from daam_vit.checks import completeness_error, queries_read
from daam_vit.plan import AttentionLayer

B, H, N, HEAD = 2, 4, 9, 6
BOOLEAN = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.6
BOOLEAN[:, 0] = True  # a row without any key has no softmax
ATTENTION_OPTIONS = {
    "plain": {},
    "boolean mask": {"attn_mask": BOOLEAN},
    "boolean mask (1, 1, 1, N)": {"attn_mask": BOOLEAN[None, None, 1:2]},
    "additive mask": {"attn_mask": random_images(N, N)},
    "additive mask (1, 1, 1, N)": {"attn_mask": random_images(1, 1, 1, N)},
    "additive mask (B, 1, N, N)": {"attn_mask": random_images(B, 1, N, N)},
    "additive mask (B, H, N, N)": {"attn_mask": random_images(B, H, N, N)},
    "scale": {"scale": 1.7},
    "scale and mask": {"scale": 0.1, "attn_mask": random_images(N, N)},
    "is_causal": {"is_causal": True},
    "enable_gqa": {"enable_gqa": True},
}
every_option = pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)


def random_qkv(options):
    q, k, v = random_images(3, B, H, N, HEAD)
    heads = H // 2 if options.get("enable_gqa") else H
    return q, k[:, :heads], v[:, :heads]


def whole_matrix(q, k, options):
    """Return A `(B, H, N, N)`: attention returns its rows if the values are unit vectors."""
    return F.scaled_dot_product_attention(q, k, torch.eye(N).expand(*k.shape[:2], N, N), **options)


class Attend(nn.Module):
    """Module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def record(function, *arguments, queries=1, gradient=None):
    """Run a function in a recorded module: return its output, and `(call, A, C)` of every attention that was seen."""
    module, seen = Attend(function), []
    layer = AttentionLayer(module, (N, 1), prefix=0, queries=queries)
    recorder = AttentionRecorder([layer], lambda *received: seen.append(received))
    with recorder.attached(module):
        output = recorder.run(module, *arguments)
        if recorder.leaves:
            gradient = torch.ones_like(output) if gradient is None else gradient
            torch.autograd.grad(output, recorder.leaves, gradient)
    assert [call for call, _, _ in reversed(seen)] == recorder.calls and all(c.layer is layer for c in recorder.calls)
    return output, seen


def record_fused(options, queries=1):
    """Record one fused attention of random tensors: return call, A, C, the values of every head, and the gradient."""
    q, k, v = random_qkv(options)
    gradient = random_images(B, H, N, HEAD)
    function = lambda *qkv: F.scaled_dot_product_attention(*qkv, **options)  # noqa: E731
    T, [(call, A, C)] = record(function, q, k, v, queries=queries, gradient=gradient)
    assert torch.equal(T, function(q, k, v)) and torch.equal(A.value, v) and torch.equal(C, gradient)
    assert call.shape == (B, N, N) and torch.equal(call.output, T[:, :, : queries or 1])
    return call, A, C, v.repeat_interleave(H // v.shape[1], 1), gradient


# ----------------------------------------------------------------------------------------------------------------------
# The matrix of a fused attention
# ----------------------------------------------------------------------------------------------------------------------


def largest_error(given, assumed):
    """Return max |sum_j S_b[j] - T_b| if attention gets the options `given`, and `fused_matrix` those `assumed`."""
    q, k, v = random_qkv(given)
    T = F.scaled_dot_product_attention(q, k, v, **given)[:, :, 0]
    row = fused_matrix(q, k, v, **assumed).rows(slice(1))
    assert row.shape == (B, H, 1, N)
    torch.testing.assert_close(row.sum(-1), torch.ones(B, H, 1))
    S = row[:, :, 0, :, None] * v.repeat_interleave(H // v.shape[1], 1)
    return (S.sum(2) - T).abs().max()


@every_option
def test_semantic_maps_sum_to_the_attention_output(options):
    assert largest_error(options, options) < 1e-5


@pytest.mark.parametrize(
    "options, left_out",
    [(options, key) for options in ATTENTION_OPTIONS.values() for key in options if key != "enable_gqa"],
)
def test_negative_control_every_option_counts(options, left_out):
    assert largest_error(options, {k: v for k, v in options.items() if k != left_out}) > 1e-2


@pytest.mark.parametrize("queries", [1, 2])
@every_option
def test_rows_are_those_of_the_whole_matrix_and_make_the_map(options, queries):
    call, A, C, V, gradient = record_fused(options, queries)
    a = A.rows(slice(queries))
    q, k, _ = random_qkv(options)
    torch.testing.assert_close(a, whole_matrix(q, k, options)[:, :, :queries])
    assert completeness_error(a, V, call.output) < 1e-5
    assert queries_read(C).all() and queries_read(C).shape == (N,)
    S = a[..., None] * V[:, :, None]  # (B, H, Q, N, d)
    expected = (S * gradient[:, :, :queries, None].relu()).sum((1, 2, 4)).relu()
    torch.testing.assert_close(block_map(a, V, C[:, :, :queries]), expected)


@every_option
def test_products_with_the_transposed_matrix_make_the_map_of_all_rows(options):
    _, A, C, V, gradient = record_fused(options, queries=None)
    q, k, v = random_qkv(options)
    product = whole_matrix(q, k, options).transpose(2, 3) @ gradient  # (B, H, N, d)
    of_groups = product.unflatten(1, (v.shape[1], -1)).sum(2)
    torch.testing.assert_close(A.vjp(C), of_groups)
    weighted = whole_matrix(q, k, options).transpose(2, 3) @ gradient.relu()
    torch.testing.assert_close(all_rows_map(A, A.value, C, torch.relu), (V * weighted).sum((1, 3)).relu())


def test_queries_that_a_gradient_reaches():
    gradient = torch.zeros(B, H, N, HEAD)
    gradient[1, 2, 5, 3] = gradient[0, 0, 0, 0] = -1e-30
    _, [(_, _, C)] = record(F.scaled_dot_product_attention, *random_qkv({}), gradient=gradient)
    assert queries_read(C).nonzero().flatten().tolist() == [0, 5]


def test_heads_that_share_their_values_are_repeated_group_by_group():
    shared = random_images(B, 2, N, HEAD)
    assert repeat_heads(shared, 2) is shared
    repeated = repeat_heads(shared, 6)
    assert all(torch.equal(repeated[:, h], shared[:, h // 3]) for h in range(6))


# ----------------------------------------------------------------------------------------------------------------------
# What is seen
# ----------------------------------------------------------------------------------------------------------------------

SOFTMAX = {
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "Tensor.softmax": lambda x: x.softmax(dim=-1),
    "F.softmax": lambda x: F.softmax(x, dim=-1),
}
PRODUCT = {
    "@": lambda A, v: A @ v,
    "torch.matmul": torch.matmul,
    "Tensor.matmul": lambda A, v: A.matmul(v),
    "by name": lambda A, v: torch.matmul(A, other=v),
}


@pytest.mark.parametrize("product", PRODUCT)
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_open_attention_is_seen(softmax, product):
    q, k, v = random_qkv({})
    gradient = random_images(B, H, N, HEAD)

    def attend(q, k, v):
        return PRODUCT[product](SOFTMAX[softmax](q @ k.transpose(2, 3) * HEAD**-0.5) * 0.9, v)

    T, [(call, A, C)] = record(attend, q, k, v, queries=2, gradient=gradient)
    matrix = 0.9 * whole_matrix(q, k, {})  # the factor that multiplies the values counts, not the softmax
    assert torch.equal(T, attend(q, k, v)) and call.shape == (B, N, N)
    torch.testing.assert_close(A.rows(slice(2)), matrix[:, :, :2])
    torch.testing.assert_close(A.vjp(C), matrix.transpose(2, 3) @ gradient)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: q @ k.transpose(2, 3) @ v,  # no softmax
        lambda q, k, v: (q @ k.transpose(2, 3))[..., :5].softmax(-1).sum() * v,  # it multiplies no values
        lambda q, k, v: (q @ k.transpose(2, 3) + 0 * v.softmax(-1).sum()) @ v,  # one of another size
        lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", (q @ k.transpose(2, 3)).softmax(-1), v),
        lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),  # no heads
        lambda q, k, v: (q[:, 0] @ k[:, 0].transpose(1, 2)).softmax(-1) @ v[:, 0],
    ],
)
def test_what_is_no_attention_of_heads_is_not_recorded(function):
    q, k, v = random_qkv({})
    output, seen = record(function, q, k, v)
    assert not seen
    torch.testing.assert_close(output, function(q, k, v))


def test_matrix_that_multiplies_twice_is_seen_twice():
    def attend(q, k, v):
        A = (q @ k.transpose(2, 3)).softmax(-1)
        return A @ v + A @ k

    _, seen = record(attend, *random_qkv({}))
    assert len(seen) == 2


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_seen_module_after_module(need_weights):
    """nn.MultiheadAttention hides its attention from function modes; the recorder goes on after the first module."""
    layers = [nn.MultiheadAttention(24, 2, batch_first=True) for _ in range(3)]
    model, seen, x = nn.ModuleList(layers), [], random_images(B, N, 24)

    def forward(x):
        weights = []
        for layer in layers:
            y, w = layer(x, x, x, need_weights=need_weights)
            x = x + y
            weights.append(w)
        return x, weights

    plan = [AttentionLayer(layer, (N, 1), prefix=0) for layer in layers]
    recorder = AttentionRecorder(plan, lambda *received: seen.append(received))
    with recorder.attached(model):
        output, weights = recorder.run(forward, x)
        torch.autograd.grad(output.sum(), recorder.leaves)
    expected, expected_weights = forward(x)
    torch.testing.assert_close(output, expected)
    assert [call.layer for call, _, _ in reversed(seen)] == plan
    for (_, A, _), given, wanted in zip(reversed(seen), weights, expected_weights):
        assert (given is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(given, wanted)
            torch.testing.assert_close(A.rows(slice(None)).mean(1), given)


# ----------------------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------------------


def layers_of(model):
    return [AttentionLayer(block.attn, (4, 4)) for block in model.blocks]


def test_outputs_come_with_their_graph_and_gradients_in_reverse(model, images):
    outputs, gradients = [], []
    plan = layers_of(model)
    recorder = AttentionRecorder(
        plan,
        lambda call, A, C: gradients.append((call, C)),
        lambda call, T: outputs.append((call, T)),
    )
    with recorder.attached(model):
        scores = recorder.run(model, images)
        assert [call for call, _ in outputs] == recorder.calls and not gradients
        received = torch.autograd.grad(scores[:, 2].sum(), [T for _, T in outputs])
    torch.testing.assert_close(scores, model(images))
    assert [call.layer for call, _ in outputs] == [call.layer for call, _ in reversed(gradients)] == plan
    for (call, T), (_, C), gradient in zip(outputs, reversed(gradients), received):
        assert T.requires_grad and T.shape == (2, 2, 17, 12) and torch.equal(call.output, T[:, :, :1])
        assert torch.equal(C, gradient)  # dY/dT as autograd computes it


def test_graph_begins_at_the_first_attention_and_spares_the_weights(model, images):
    recorder = AttentionRecorder(layers_of(model), lambda call, A, C: None)
    with recorder.attached(model):
        scores = recorder.run(model, images)
        assert len(recorder.leaves) == 1 and recorder.leaves[0].is_leaf
        scores.sum().backward()
    assert recorder.leaves[0].grad is not None and all(p.grad is None for p in model.parameters())


def test_attention_outside_of_the_layers_is_not_recorded(model, images):
    recorder = AttentionRecorder(layers_of(model)[1:], lambda call, A, C: None)
    with recorder.attached(model):
        recorder.run(model, images)
    assert [call.layer.module for call in recorder.calls] == [block.attn for block in model.blocks[1:]]


def test_model_is_attached_in_eval_mode_and_with_gradients(model, images):
    model.train()
    recorder = AttentionRecorder(layers_of(model), lambda call, A, C: None)
    with torch.inference_mode(), recorder.attached(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model(images + 0)  # not called by `run`
    assert not recorder.calls and all(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{"memory": "fast"}, {"memory": "low"}, {"shortcuts": False}], ids=str)
@pytest.mark.parametrize("rows", ["class", "patches"])
def test_no_attention_matrix_is_made(options, rows, model, images):
    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape[-2:]) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        attention_flow(model, images, rows=rows, **options)
    assert (17, TINY["embed_dim"] // TINY["num_heads"]) in seen  # q, k and v: the mode does see the attention
    assert (17, 17) not in seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
@pytest.mark.parametrize("options", [{"memory": "fast"}, {"memory": "low"}, {"shortcuts": False}], ids=str)
def test_an_output_that_is_changed_in_place(fused, options, images):
    """The map is that of the attention's output, whatever the model makes of it."""
    model = tiny_vit(attn_layer=InPlace)
    expected = attention_flow(set_attention(model, fused, in_place=()), images, **options).block_maps
    # autograd keeps the output of fused attention for its backward, except of the first one
    set_attention(model, fused, in_place=model.blocks[:1] if fused else model.blocks)
    if fused and options == {"memory": "low"}:  # whose second pass would begin with the changed output
        with pytest.raises(UnsupportedModel, match="^model: a Block does not compute the same twice; pass memory='fas"):
            attention_flow(model, images, **options)
    else:
        assert_same_maps(attention_flow(model, images, **options).block_maps, expected)


def set_attention(model, fused, in_place):
    for block in model.blocks:
        block.attn.fused, block.attn.in_place = fused, block in in_place
    return model
