"""Tests of daam_core: against a plain re-derivation of the method, and of every promise that its docstrings make.

The models are small and their weights random: what is tested is arithmetic, which no training changes.
"""

import copy
import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, build, random_images, tiny_vit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import daam_core
from daam_core import (
    VARIANTS,
    AttentionFlow,
    UnsupportedModel,
    atomic_write,
    attention_flow,
    block_labels,
    overlay,
    render,
    save_flow,
    save_gif,
    sheet,
    side_by_side,
)

WIDTH, BLOCKS = TINY["embed_dim"], TINY["depth"]


# ----------------------------------------------------------------------------------------------------------------------
# The maps: an independent derivation, one image at a time, nothing clever
# ----------------------------------------------------------------------------------------------------------------------


def plain_block_maps(model, image, target=None, importance=None, variant="paper"):
    """L_b `(L, h, w)` of one image `(3, H, W)`, as the definition reads: whole attention matrices, S_b in full."""
    model = copy.deepcopy(model).eval()  # backward() fills every .grad
    x = model.patch_embed(image[None])
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))

    decomposed = []
    for block in model.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y)[0].reshape(-1, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)  # (H, N, d) each
        a = (attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) / attn.head_dim**0.5).softmax(-1)  # (H, N, N)
        T = (a @ v).transpose(0, 1).flatten(1)  # (N, C)
        T.retain_grad()
        S = (a[:, 0, :, None] * v).transpose(0, 1).flatten(1)  # (N, C): of the class token's row
        decomposed.append((S.detach(), T))
        x = x + block.ls1(attn.proj(attn.norm(T))[None])
        x = x + block.ls2(block.mlp(block.norm2(x)))

    features = model.fc_norm(model.norm(x)[:, 0])[0]  # (D,)
    if importance is None:
        model.head(features)[target].backward()
    else:
        features.backward(importance.to(features))

    maps = []
    for S, T in decomposed:
        torch.testing.assert_close(S.sum(0), T[0].detach(), rtol=1e-4, atol=1e-5)
        C = T.grad[0].relu() if importance is None and variant == "paper" else T.grad[0]
        by_patch = (S * C).sum(1)
        if variant == "heads":
            by_patch = sum(part.sum(1).relu() for part in (S * C).chunk(attn.num_heads, 1))
        maps.append(by_patch.relu()[model.num_prefix_tokens :])
    patch = model.patch_embed.patch_size
    return torch.stack(maps).unflatten(1, [side // p for side, p in zip(image.shape[1:], patch)])


def assert_maps_match(flow, expected, tolerance=1e-5):
    """`expected`: the block maps of each image. The tolerance is relative to the maximum of each map."""
    filled = torch.stack([(plain.amax((-2, -1)) > 0).float().mean() for plain in expected])
    assert (filled > 0.5).all(), "most maps are empty: nothing to compare"
    for block_maps, accumulated, plain in zip(flow.block_maps, flow.accumulated, expected, strict=True):
        running = torch.zeros_like(plain[0])
        for b in range(len(plain)):
            running = running + plain[b]
            for actual, wanted in ((block_maps[b], plain[b]), (accumulated[b], running)):
                assert actual.shape == wanted.shape and actual.dtype == torch.float32
                assert (actual - wanted).abs().max() <= tolerance * wanted.max(), f"block {b}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 2e-6)], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.5},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"init_values": 0.5, "qk_norm": True, "reg_tokens": 3, "no_embed_class": True},
        {"pre_norm": True, "qkv_bias": False, "num_heads": 3},
        {"depth": 1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_tiny_vit_variants_match_the_derivation(options, dtype, tolerance, images):
    model, images = tiny_vit(**options).to(dtype), images.to(dtype)
    flow = attention_flow(model, images, target=[4, 1])
    assert flow.output.dtype == dtype
    assert_maps_match(flow, [plain_block_maps(model, x, t) for x, t in zip(images, (4, 1))], tolerance)


@pytest.mark.parametrize(
    "name, options, size, dtype",
    [
        ("deit_small_patch16_224", {"num_classes": 1000}, (224, 224), torch.float32),
        ("vit_small_patch8_224", {"num_classes": 10}, (224, 224), torch.float32),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 7, "img_size": 98}, (98, 98), torch.float32),
        ("vit_tiny_patch16_224", {"num_classes": 10, "dynamic_img_size": True}, (96, 160), torch.float64),
    ],
)
def test_timm_models_match_the_derivation(name, options, size, dtype):
    model = build(timm.create_model, name, seed=3, **options).to(dtype)
    images = random_images(1, 3, *size).to(dtype)
    flow = attention_flow(model, images)
    patch = model.patch_embed.patch_size[0]
    assert flow.accumulated.shape == (1, 12, size[0] // patch, size[1] // patch)
    assert_maps_match(flow, [plain_block_maps(model, images[0], flow.target[0])])


@pytest.mark.parametrize(
    "target, explained",
    [
        (None, None),
        (3, [3, 3, 3]),
        ([4, 0, 2], [4, 0, 2]),
        ((1, 1, 0), [1, 1, 0]),
        (np.array([2, 0, 1]), [2, 0, 1]),
        (torch.tensor(2), [2, 2, 2]),
        (torch.tensor([2, 3, 1]), [2, 3, 1]),
        (torch.tensor([2, 3, 1], dtype=torch.uint8), [2, 3, 1]),
        (lambda scores: scores.argmax(1), None),
        (lambda scores: [4, 0, 2] if scores.shape == (3, 5) and not scores.requires_grad else None, [4, 0, 2]),
    ],
)
def test_target(model, target, explained):
    images = random_images(3, 3, 32, 32)
    flow = attention_flow(model, images, target=target)
    scores = model(images).detach()
    explained = scores.argmax(1).tolist() if explained is None else explained
    assert flow.target.tolist() == explained and flow.target.dtype == torch.int64
    torch.testing.assert_close(flow.output, scores)
    assert_maps_match(flow, [plain_block_maps(model, x, t) for x, t in zip(images, explained)])


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    "target", [torch.tensor([[4, 0, 2], [1, 1, 3]]), [[4, 0, 2], [1, 1, 3]], [[3], [0]]], ids=["tensor", "list", "one"]
)
def test_several_classes_of_every_image(target, memory, model, images):
    target = torch.as_tensor(target)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    flow = attention_flow(model, images, target, norm=True, memory=memory)
    handle.remove()
    assert flow.block_maps.shape == flow.accumulated.shape == (2, target.shape[1], BLOCKS, 4, 4)
    assert torch.equal(flow.target, target) and len(forwards) == 1 and flow.output.shape == (2, 5)
    for k, classes in enumerate(target.T):
        one = attention_flow(model, images, classes, norm=True, memory=memory)
        assert torch.equal(flow.block_maps[:, k], one.block_maps) and torch.equal(
            flow.accumulated[:, k], one.accumulated
        )
        wanted = [plain_block_maps(model, x, t) for x, t in zip(images, classes)]
        assert_maps_match(AttentionFlow(one.block_maps, one.block_maps.cumsum(1), flow.output, classes), wanted)


def test_several_classes_of_all_rows(model, images):
    target = [[4, 0], [1, 3]]
    flow = attention_flow(model, images, target, rows="patches")
    for k in range(2):
        one = attention_flow(model, images, [row[k] for row in target], rows="patches")
        assert torch.equal(flow.block_maps[:, k], one.block_maps)


def test_several_importances_of_every_image(model, images):
    weights = random_images(2, 3, WIDTH)
    flow = attention_flow(model, images, importance=lambda features: weights)
    assert flow.block_maps.shape == (2, 3, BLOCKS, 4, 4) and flow.target is None
    for k in range(3):
        one = attention_flow(model, images, importance=weights[:, k])
        assert torch.equal(flow.accumulated[:, k], one.accumulated)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "reg_tokens": 2, "num_heads": 3}], ids=["plain", "more"])
def test_variants(options, memory, images):
    model, paper = tiny_vit(**options), attention_flow(tiny_vit(**options), images, [4, 1])
    assert paper.variant == "paper"
    for variant in ("signed", "heads"):
        flow = attention_flow(model, images, [4, 1], variant=variant, memory=memory)
        expected = [plain_block_maps(model, x, t, variant=variant) for x, t in zip(images, (4, 1))]
        assert_maps_match(flow, expected)
        assert flow.variant == variant and not torch.allclose(flow.block_maps, paper.block_maps, rtol=0.01)
        both = attention_flow(model, images, [[4, 1], [1, 0]], variant=variant, memory=memory)
        torch.testing.assert_close(both.block_maps[[0, 1], [0, 0]], attention_flow(
            model, images, [4, 1], variant=variant).block_maps)  # fmt: skip


def test_variants_of_an_importance(model, images):
    importance = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1))
    paper, signed, heads = (attention_flow(model, images, importance=importance, variant=v) for v in VARIANTS)
    assert torch.equal(paper.block_maps, signed.block_maps)
    assert_maps_match(heads, [plain_block_maps(model, x, None, importance, "heads") for x in images])


def test_variants_of_all_rows(images):
    """By head, and only then over the heads: sum_h ReLU(V . dY/dV)."""
    model, values = tiny_vit(global_pool="avg"), []
    hooks = []
    for block in model.blocks:

        def keep(module, args, output):
            values.append(output)
            output.retain_grad()

        hooks.append(block.attn.qkv.register_forward_hook(keep))  # fmt: skip
    model(images)[:, 2].sum().backward()
    for hook in hooks:
        hook.remove()
    flow = attention_flow(model, images, 2, rows="patches", variant="heads")
    for b, qkv in enumerate(values):
        product = (qkv * qkv.grad)[:, :, 2 * WIDTH :].unflatten(2, (2, -1)).sum(3).relu().sum(2)
        torch.testing.assert_close(flow.block_maps[:, b], product[:, 1:].unflatten(1, (4, 4)).detach())


@pytest.mark.parametrize("num_classes", [0, 5], ids=["headless", "with head"])
@pytest.mark.parametrize("form", ["(D,)", "(B, D)", "callable"])
def test_importance(num_classes, form, images):
    model = tiny_vit(num_classes=num_classes)
    features = model.forward_head(model.forward_features(images), pre_logits=True).detach()
    importance, rows = {
        "(D,)": (weights := random_images(WIDTH), [weights, weights]),
        "(B, D)": (weights := random_images(2, WIDTH), list(weights)),
        "callable": (lambda f: f.square(), list(features.square())),
    }[form]
    flow = attention_flow(model, images, importance=importance)
    assert flow.target is None
    torch.testing.assert_close(flow.output, features)
    assert_maps_match(flow, [plain_block_maps(model, x, importance=p) for x, p in zip(images, rows)])


def test_importance_callable_gets_features_without_a_graph(model, images):
    seen = []
    attention_flow(model, images, importance=lambda f: seen.append((f.shape, f.requires_grad)) or torch.ones_like(f))
    assert seen == [((2, WIDTH), False)]


@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
def test_half_precision_stays_close(way, images):
    exact = attention_flow(tiny_vit(), images, target=[4, 1])
    dtype = torch.float16 if way == "float16" else torch.bfloat16
    with torch.autocast("cpu", dtype) if way == "autocast" else nullcontext():
        model = tiny_vit() if way == "autocast" else tiny_vit().to(dtype)
        half = attention_flow(model, images, target=[4, 1])
    assert half.output.dtype == dtype
    assert half.block_maps.dtype == half.accumulated.dtype == torch.float32
    for a, b in zip(exact.block_maps.flatten(0, 1), half.block_maps.flatten(0, 1)):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.98


def test_batch_equals_single_images(model):
    images, target = random_images(3, 3, 32, 32), [0, 3, 1]
    flow = attention_flow(model, images, target)
    for i in range(3):
        single = attention_flow(model, images[i : i + 1], target[i])
        assert_maps_match(single, flow.block_maps[i : i + 1])


def test_images_are_moved_to_the_dtype_of_the_model(model, images):
    flow = attention_flow(model, images.double())
    assert flow.output.dtype == torch.float32
    assert torch.equal(flow.block_maps, attention_flow(model, images).block_maps)


# ----------------------------------------------------------------------------------------------------------------------
# The attention row of the class token: sum_j S_b[j] == T_b
# ----------------------------------------------------------------------------------------------------------------------

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


def random_qkv(options):
    q, k, v = random_images(3, B, H, N, HEAD)
    heads = H // 2 if options.get("enable_gqa") else H
    return q, k[:, :heads], v[:, :heads]


def remainder(given, told):
    """max |sum_j S_b[j] - T_b| where torch's attention gets the options `given` and daam_core is told others."""
    q, k, v = random_qkv(given)
    T = F.scaled_dot_product_attention(q, k, v, **given)[:, :, 0]
    row = fused_attention(q, k, v, **told).matrix.spread(slice(1))
    assert row.shape == (B, H, 1, N)
    torch.testing.assert_close(row.sum(-1), torch.ones(B, H, 1))
    S = row[:, :, 0, :, None] * v.repeat_interleave(H // v.shape[1], 1)
    return (S.sum(2) - T).abs().max()


def fused_attention(q, k, v, output=None, queries=1, **options):
    """What daam_core makes of one call of torch's attention."""
    output = F.scaled_dot_product_attention(q, k, v, **options) if output is None else output
    site = daam_core._Site(nn.Identity(), (N, 1), prefix=0, queries=queries)
    return daam_core._Attention(site, torch.relu, False, output, daam_core._fused_attention(q, k, v, **options))


@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
def test_semantic_maps_sum_to_the_attention_output(options):
    assert remainder(options, options) < 1e-5


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
def test_map_of_a_gradient(options, queries):
    q, k, v = random_qkv(options)
    gradient = random_images(B, H, N, HEAD)
    call = fused_attention(q, k, v, queries=queries, **options)
    S = (
        call.matrix.spread(slice(queries))[..., None] * v.repeat_interleave(H // v.shape[1], 1)[:, :, None]
    )  # (B, H, Q, N, d)
    call.receive(gradient)
    assert call.remainder < 1e-5 and call.read_queries.all() and call.read_queries.shape == (N,)
    torch.testing.assert_close(call.maps[0], (S * gradient[:, :, :queries, None].relu()).sum((1, 2, 4)).relu())


@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
def test_map_of_all_rows(options):
    """V[j] (A^T w(C))[j], with the whole matrix A: what the attention makes of unit vectors as values."""
    q, k, v = random_qkv(options)
    gradient = random_images(B, H, N, HEAD)
    A = F.scaled_dot_product_attention(q, k, torch.eye(N).expand(*k.shape[:2], N, N), **options)  # (B, H, N, N)
    call = fused_attention(q, k, v, queries=None, **options)
    call.receive(gradient)
    values = v.repeat_interleave(H // v.shape[1], 1)
    torch.testing.assert_close(call.maps[0], (values * (A.transpose(2, 3) @ gradient.relu())).sum((1, 3)).relu())


def test_queries_that_a_gradient_reaches():
    gradient = torch.zeros(B, H, N, HEAD)
    gradient[1, 2, 5, 3] = gradient[0, 0, 0, 0] = -1e-30
    call = fused_attention(*random_qkv({}))
    call.receive(gradient)
    assert call.read_queries.nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize(
    "options, left_out",
    [(options, key) for options in ATTENTION_OPTIONS.values() for key in options if key != "enable_gqa"],
)
def test_negative_control_every_option_counts(options, left_out):
    assert remainder(options, {k: v for k, v in options.items() if k != left_out}) > 1e-2


def test_mask_of_a_model_is_seen(images):
    """A model that hides some patches: they get no heat, and an image that differs only there gets the same maps."""

    class Masked(VisionTransformer):
        def forward_features(self, x, **options):
            mask = torch.ones(17, dtype=torch.bool)
            mask[1:9] = False
            return super().forward_features(x, attn_mask=mask.expand(1, 1, 17, 17))

    maps = attention_flow(tiny_vit(Masked), images, target=3).block_maps
    images[:, :, :16] = 0  # rows 0 and 1 of the patch grid
    assert torch.equal(attention_flow(tiny_vit(Masked), images, target=3).block_maps, maps)
    assert (maps[:, :, :2] == 0).all() and (maps[:, :, 2:] > 0).any()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("rows", ["class", "patches"])
def test_no_attention_matrix_is_made(memory, rows, model, images):
    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape[-2:]) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        attention_flow(model, images, memory=memory, rows=rows)
    assert (17, 12) in seen  # q, k, v: so the mode does see the attention
    assert (17, 17) not in seen


# ----------------------------------------------------------------------------------------------------------------------
# What a call leaves behind: nothing
# ----------------------------------------------------------------------------------------------------------------------


def raw(tensor):
    return None if tensor is None else tensor.detach().numpy().tobytes()


def state_of(model):
    """Everything that a call could leave behind on a model or in the current thread, to be compared bit by bit."""
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "weights": {name: raw(t) for name, t in model.state_dict().items()},
        "grad": [(id(p.grad), raw(p.grad)) for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "flags": [(m.training, getattr(m, "grad_checkpointing", None)) for m in modules],
        "attributes": [set(vars(m)) for m in modules],
        "module hooks": [(k, list(v)) for m in modules for k, v in vars(m).items() if "hooks" in k and v is not None],
        "tensor hooks": [p._backward_hooks for p in parameters],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "function modes": list(_get_current_function_mode_stack()),
        "functions": (F.scaled_dot_product_attention, torch.nn.Module.__call__),
    }


def in_disorder(model):
    """The model in a state that a call has to give back: mixed modes, frozen parts, gradients, checkpointing."""
    model.train()
    model.blocks[1].eval()
    model.blocks[2].mlp.eval()
    model.head.requires_grad_(False)
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    for p in model.blocks[1].parameters():
        p.grad = torch.randn_like(p)
    model.set_grad_checkpointing(True)
    return model


MODES = {"default": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("importance", [None, torch.ones(WIDTH)], ids=["target", "importance"])
def test_everything_is_given_back(mode, importance, memory, images):
    model = in_disorder(tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5))
    expected = attention_flow(tiny_vit(), images, importance=importance)
    with MODES[mode]():
        before = state_of(model)
        flow = attention_flow(model, images + 0, importance=importance, memory=memory)
        assert state_of(model) == before
    assert torch.equal(flow.block_maps, expected.block_maps)  # eval mode: no dropout
    assert torch.equal(flow.output, expected.output)


def test_images_are_left_alone(model, images):
    images.requires_grad_()
    before = raw(images)
    attention_flow(model, images)
    assert images.grad is None and images._backward_hooks is None and raw(images) == before


@contextmanager
def raising_forward(model):
    def hook(module, args, output):
        raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].register_forward_hook(hook)
    yield {}
    handle.remove()


@contextmanager
def raising_backward(model):
    def stop(gradient):
        raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].register_forward_hook(lambda module, args, output: output.register_hook(stop) and None)
    yield {}
    handle.remove()


@contextmanager
def raising_importance(model):
    def importance(features):
        raise KeyboardInterrupt("stopped on the way")

    yield {"importance": importance}


@contextmanager
def refused_target(model):
    yield {"target": 99}


@contextmanager
def raising_second_pass(model):
    """Only with memory="low" does an MLP run again when the backward comes."""
    runs = []

    def hook(module, args):
        runs.append(module)
        if len(runs) == 2:
            raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].mlp.register_forward_pre_hook(hook)
    yield {"memory": "low"}
    handle.remove()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    "accident", [raising_forward, raising_backward, raising_importance, refused_target, raising_second_pass]
)
def test_everything_is_given_back_after_an_exception(accident, memory, images):
    model = in_disorder(tiny_vit())
    expected = attention_flow(model, images)
    with accident(model) as arguments:
        before = state_of(model)
        with pytest.raises((KeyboardInterrupt, ValueError), match=r"stopped on the way|out of range"):
            attention_flow(model, images, **{"memory": memory} | arguments)
        assert state_of(model) == before
    assert torch.equal(attention_flow(model, images).accumulated, expected.accumulated)


def test_results_carry_no_graph(model, images):
    flow = attention_flow(model, images, norm=True)
    for tensor in (flow.block_maps, flow.accumulated, flow.output, flow.target):
        assert tensor.grad_fn is None and not tensor.requires_grad and not tensor.is_inference()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("accident", [None, raising_backward], ids=["after success", "after an exception"])
def test_no_memory_is_kept(accident, memory, model, images):
    """Without the help of the garbage collector: a cycle would hold the graph of one call until some later time."""
    captured = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda module, args, output: captured.append(StorageWeakRef(output.untyped_storage()))
        )

    def explain():
        with accident(model) if accident else nullcontext({}) as arguments, suppress(KeyboardInterrupt):
            attention_flow(model, images, memory=memory, **arguments)

    def living_tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    explain()  # what is made once is made now
    gc.collect()
    gc.disable()
    try:
        captured.clear()
        before = living_tensors()
        explain()
        assert len(captured) >= 2 and all(storage.expired() for storage in captured)
        assert living_tensors() == before
    finally:
        gc.enable()


def test_same_call_twice_is_bit_equal(model, images):
    first, second = (attention_flow(model, images) for _ in range(2))
    assert torch.equal(first.block_maps, second.block_maps) and torch.equal(first.accumulated, second.accumulated)


def test_gradient_checkpointing_changes_nothing(model, images):
    expected = attention_flow(model, images)
    model.set_grad_checkpointing(True)
    assert torch.equal(attention_flow(model, images).block_maps, expected.block_maps)
    assert model.grad_checkpointing is True


# ----------------------------------------------------------------------------------------------------------------------
# Threads
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_two_threads_at_once(shared, memory):
    models = [tiny_vit(depth=6)] * 2 if shared else [tiny_vit(depth=6), tiny_vit(depth=4, num_heads=3)]
    batches = [random_images(2, 3, 32, 32), random_images(3, 3, 32, 32)]
    expected = [attention_flow(m, x) for m, x in zip(models, batches)]
    start = threading.Barrier(2)

    def explain(model, images):
        start.wait(timeout=30)
        return [attention_flow(model, images, memory=memory) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for flows, wanted in zip(pool.map(explain, models, batches), expected, strict=True):
                for flow in flows:
                    assert torch.equal(flow.block_maps, wanted.block_maps) and torch.equal(flow.output, wanted.output)


def test_a_flow_does_not_show_in_other_threads(model, images):
    """Another thread uses models while a flow stands still in the middle of its forward."""
    inside, go_on = threading.Event(), threading.Event()
    other = tiny_vit()
    with torch.no_grad():
        expected_scores, expected = model(images), attention_flow(model, images)

    def stand_still(module, args, output):
        inside.set()
        assert go_on.wait(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        handle = model.blocks[1].register_forward_hook(stand_still)
        running = pool.submit(attention_flow, model, images)
        try:
            assert inside.wait(timeout=30)
            with torch.no_grad():
                scores = other(images)
            assert scores.grad_fn is None and not scores.requires_grad
            assert torch.equal(scores, expected_scores)
            other(images).sum().backward()
            assert all(p.grad is not None for p in other.parameters())
        finally:
            handle.remove()
            go_on.set()
        assert torch.equal(running.result(timeout=30).block_maps, expected.block_maps)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and in which words
# ----------------------------------------------------------------------------------------------------------------------


class ReadsPatches(VisionTransformer):
    """Says global_pool='token' and reads the mean of the patches."""

    def forward_head(self, x, pre_logits=False):
        x = x[:, self.num_prefix_tokens :].mean(1)
        return x if pre_logits else self.head(x)


class NoGrad(VisionTransformer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def refused(match, model, *arguments, **options):
    """A ValueError of one line that begins with the name of the argument and is found by `match`."""
    with pytest.raises(ValueError, match=match) as caught:
        attention_flow(model, *arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.split(":")[0] in ("model", "images", "target", "importance", "memory")
    assert isinstance(caught.value, UnsupportedModel) == message.startswith("model:")


class NoAttention(VisionTransformer):
    """Its blocks do something else."""

    def forward_features(self, x, **options):
        return self.norm(self._pos_embed(self.patch_embed(x)))


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: tiny_vit(class_token=False, global_pool="avg"), "^model: VisionTransformer has no class token"),
        (lambda: timm.create_model("resnet10t"), "^model: ResNet has no attention that DAAM can see"),
        (lambda: nn.Conv2d(3, 3, 1), "^model: Conv2d has no attention that DAAM can see"),
        (lambda: tiny_vit(global_pool="avg"), r"^model: .* scores the mean patch token \(global_pool='avg'\)"),
        (lambda: tiny_vit(NoAttention), "^model: attention was seen 0 times in the Attention of NoAttention"),
        (lambda: tiny_vit(NoGrad), "^model: .* does not depend on its attention"),
        (lambda: tiny_vit(ReadsPatches), "^model: the score of ReadsPatches reads the patch tokens and not the class"),
    ],
)
def test_refused_models(build, match, images):
    model = build()
    before = state_of(model)
    refused(match, model, images)
    assert state_of(model) == before


def test_refused_without_classifier(images):
    refused("^importance: the model has no classifier", tiny_vit(num_classes=0), images)


@pytest.mark.parametrize("variant", ["relu", None])
def test_refused_variant(variant, model, images):
    with pytest.raises(ValueError, match=f"^variant: expected 'paper', 'signed' or 'heads', got {variant!r}$"):
        attention_flow(model, images, variant=variant)


@pytest.mark.parametrize("memory", ["small", None, True])
def test_refused_memory(memory, model, images):
    refused("^memory: expected 'auto', 'fast' or 'low', got", model, images, memory=memory)


def test_refused_target_and_importance_together(model, images):
    refused(
        "^target: cannot be explained together with importance", model, images, target=1, importance=torch.ones(WIDTH)
    )


def test_refused_features_that_do_not_read_the_class_token(images):
    refused("^model: .* reads the patch tokens and not", tiny_vit(ReadsPatches), images, importance=torch.ones(WIDTH))


@pytest.mark.parametrize(
    "target, match",
    [
        (5, "^target: class 5 is out of range; the model has 5 classes, 0..4"),
        (-1, "^target: class -1 is out of range"),
        ([0, 7], "^target: class 7 is out of range"),
        (torch.tensor([-2, 1]), "^target: class -2 is out of range"),
        ([1], "^target: .* for each of 2 images one index"),
        ([1, 2, 3], "^target: .* for each of 2 images one index"),
        ([], "^target: expected"),
        ([[0, 1]], "^target: expected"),
        ([[0, 1], [2, 5]], "^target: class 5 is out of range"),
        ([[], []], "^target: expected"),
        ([[0, 1], [2]], "^target: expected"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "^target: expected"),
        (True, "^target: expected .* got True"),
        ([True, False], "^target: expected"),
        (torch.tensor([True, False]), "^target: expected"),
        (1.0, "^target: expected .* got 1.0"),
        ([0.0, 1.0], "^target: expected"),
        ("cat", "^target: expected .* got 'cat'"),
        (["cat", "dog"], "^target: expected"),
        (lambda scores: scores, "^target: expected"),
        (lambda scores: [0, 5], "^target: class 5 is out of range"),
        (2**70, "^target: expected"),
        (torch.zeros(2, 2), "^target: expected"),
    ],
)
def test_refused_targets(model, images, target, match):
    refused(match, model, images, target=target)


@pytest.mark.parametrize(
    "importance, match",
    [
        (torch.ones(WIDTH + 1), r"^importance: expected .*\(24,\), \(2, 24\) or \(2, K, 24\).* got \(25,\)"),
        (torch.ones(3, WIDTH), r"^importance: expected .* got \(3, 24\)"),
        (torch.ones(1, 2, WIDTH), "^importance: expected"),
        (torch.ones(2, 0, WIDTH), "^importance: expected"),
        (torch.tensor(1.0), "^importance: expected"),
        ("all", "^importance: expected .* got str"),
        ([1.0] * WIDTH, "^importance: expected .* got list"),
        (lambda f: f[:, 1:], r"^importance: expected .* got \(2, 23\)"),
        (torch.full((WIDTH,), torch.nan), "^importance: has NaN or infinite values"),
        (lambda f: f / 0, "^importance: has NaN or infinite values"),
    ],
)
def test_refused_importance(model, images, importance, match):
    refused(match, model, images, importance=importance)


@pytest.mark.parametrize(
    "images, match",
    [
        (torch.zeros(3, 32, 32), r"^images: expected a tensor \(B, C, H, W\).* got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), r"^images: expected .* B > 0, got \(0, 3, 32, 32\)"),
        (np.zeros((1, 3, 32, 32), np.float32), "^images: expected a tensor .* got ndarray"),
        (torch.zeros(1, 1, 32, 32), "^images: the model takes 3 channels, got 1"),
        (torch.zeros(1, 32, 32, 3), "^images: the model takes 3 channels, got 32"),
        (torch.zeros(1, 3, 32, 40), "^images: the model takes 32 x 32 pixels, got 32 x 40.*dynamic_img_size=True"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "^images: .* floating point values, got torch.uint8"),
        (torch.full((1, 3, 32, 32), torch.nan), "^images: the model's output is not finite"),
        (torch.full((1, 3, 32, 32), torch.inf), "^images: the model's output is not finite"),
    ],
)
def test_refused_images(model, images, match):
    refused(match, model, images)


@pytest.mark.parametrize("size", [(32, 36), (36, 32), (4, 32)])
def test_refused_image_size_that_is_no_multiple_of_the_patch(size):
    match = "^images: {} x {} pixels are not a multiple of the model's stride, 8 x 8".format(*size)
    refused(match, tiny_vit(dynamic_img_size=True), torch.zeros(1, 3, *size))


# ----------------------------------------------------------------------------------------------------------------------
# norm, and flows with nothing in them
# ----------------------------------------------------------------------------------------------------------------------


def test_norm_stretches_every_map_before_it_is_added(model, images):
    plain, normed = (attention_flow(model, images, [4, 1], norm=norm) for norm in (False, True))
    assert torch.equal(plain.block_maps, normed.block_maps)
    for maps, accumulated in zip(normed.block_maps, normed.accumulated):
        running = torch.zeros(4, 4)
        for L_b, A_b in zip(maps, accumulated):
            running = running + (L_b - L_b.min()) / (L_b.max() - L_b.min())
            torch.testing.assert_close(A_b, running)


@pytest.mark.parametrize("norm", [False, True])
def test_importance_of_zeros_gives_an_empty_flow(model, images, norm):
    flow = attention_flow(model, images, importance=torch.zeros(WIDTH), norm=norm)
    assert (flow.block_maps == 0).all() and (flow.accumulated == 0).all()


def test_norm_of_a_flat_map_is_zero():
    maps = torch.tensor([[[3.0, 3.0], [3.0, 3.0]], [[1.0, 2.0], [3.0, 5.0]]])
    expected = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.25], [0.5, 1.0]]])
    assert torch.equal(daam_core._min_max(maps), expected)


# ----------------------------------------------------------------------------------------------------------------------
# From maps to pictures
# ----------------------------------------------------------------------------------------------------------------------


def random_flow(blocks=12, h=4, w=4):
    """Running sums of maps that are never negative, `(L, h, w)` float32."""
    return np.random.default_rng(h * w).gamma(1, 1, (blocks, h, w)).astype(np.float32).cumsum(0)


def random_picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def solid(colour, size=(40, 20)):
    return Image.new("RGB", size, colour)


def plain_render(A, size):
    m, frames = A[-1].max(), []
    for A_b in A:
        x = 1 / (1 + np.exp(-5 * A_b / m)) - 0.5
        x = (x - x.min()) / (x.max() - x.min())
        heat = np.floor(255 * x).astype(np.uint8)
        frames.append(heat if size is None else cv2.resize(heat, size[::-1], interpolation=cv2.INTER_LINEAR))
    return np.stack(frames)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "grid, size", [((14, 14), (224, 224)), ((4, 7), (61, 130)), ((7, 4), None), ((9, 9), (5, 6)), ((1, 2), (8, 16))]
)
def test_render_is_the_formula(grid, size, as_tensor):
    flow = random_flow(5, *grid)
    heat = render(torch.from_numpy(flow).requires_grad_() if as_tensor else flow, size)
    assert heat.dtype == np.uint8 and heat.shape == (5, *(size or grid))
    assert np.array_equal(heat, plain_render(flow, size))
    assert heat.max() > 200 or size == (5, 6)  # made smaller, the peak is averaged away


def test_render_spans_all_grey_levels():
    heat = render(random_flow())
    assert (heat.min((1, 2)) == 0).all() and (heat.max((1, 2)) == 255).all()


def test_render_of_flat_maps_is_zero():
    flow = np.stack([np.zeros((3, 3)), np.full((3, 3), 2.0), np.eye(3)]).astype(np.float32)
    with np.errstate(all="raise"):  # a division of zero by zero, cast to uint8, may be zero by chance
        heat = render(flow, (6, 6))
        assert not heat[:2].any() and heat[2].max() == 255
        assert not render(np.zeros((2, 3, 3), np.float32)).any()
        assert not render(np.full((2, 3, 3), 7.0, np.float32)).any()


def test_render_takes_half_precision():
    flow = torch.from_numpy(random_flow()).half()
    assert np.array_equal(render(flow), plain_render(flow.float().numpy(), None))


@pytest.mark.parametrize(
    "flow, match",
    [
        (np.zeros((3, 3), np.float32), r"^accumulated: expected the maps \(L, h, w\) of one image, got \(3, 3\)"),
        (torch.zeros(1, 2, 3, 3), "^accumulated: expected"),
        (np.zeros((0, 3, 3), np.float32), "^accumulated: expected"),
        (np.full((2, 3, 3), np.nan, np.float32), "^accumulated: has NaN or infinite values"),
        (torch.full((2, 3, 3), torch.inf), "^accumulated: has NaN or infinite values"),
    ],
)
def test_render_errors(flow, match):
    with pytest.raises(ValueError, match=match):
        render(flow)


@pytest.mark.parametrize("as_pil", [False, True], ids=["array", "PIL"])
@pytest.mark.parametrize("size", [(32, 48), (56, 40)])
def test_overlay_is_the_formula(size, as_pil):
    picture, heat = random_picture(*size), render(random_flow(3), (8, 12))
    frames = overlay(Image.fromarray(picture) if as_pil else picture, heat)
    assert len(frames) == 3
    for frame, grey in zip(frames, heat):
        grey = cv2.resize(grey, size[::-1], interpolation=cv2.INTER_LINEAR)
        colour = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
        assert frame.mode == "RGB" and frame.size == size[::-1]
        assert np.array_equal(frame, np.clip(0.4 * colour + 0.8 * picture, 0, 255).astype(np.uint8))


def test_overlay_colours_run_from_blue_to_red():
    cold, hot = overlay(solid("black", (2, 2)), np.array([[[0]], [[255]]], np.uint8))
    assert cold.getpixel((0, 0)) == (0, 0, 51) and hot.getpixel((0, 0)) == (51, 0, 0)  # JET ends at half intensity


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_overlay_takes_any_pil_image(mode):
    image = Image.fromarray(random_picture(16, 16)).convert(mode)
    heat = render(random_flow(2))
    for frame, same in zip(overlay(image, heat), overlay(image.convert("RGB"), heat), strict=True):
        assert np.array_equal(frame, same)


def test_overlay_labels_stay_in_the_corner():
    picture, heat = random_picture(140, 210), render(random_flow(3))
    plain, labelled = overlay(picture, heat), overlay(picture, heat, block_labels(3))
    for before, after in zip(plain, labelled):
        ys, xs = np.nonzero((np.asarray(before) != np.asarray(after)).any(2))
        assert len(ys) > 0 and ys.max() < 140 // 5 and xs.max() < 210 // 4
    assert not np.array_equal(labelled[0], labelled[1])
    assert np.array_equal(picture, random_picture(140, 210))


def test_block_labels():
    assert block_labels(3) == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize(
    "picture, heat, labels, match",
    [
        (np.zeros((8, 8), np.uint8), np.zeros((2, 4, 4), np.uint8), None, "^image: expected"),
        (np.zeros((8, 8, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), None, r"^image: .* got \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4), np.uint8), None, "^heat: expected"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4, 4), np.float32), None, "^heat: expected .* float32"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4, 4), np.uint8), ["1"], "^labels: expected one for each of 2"),
    ],
)
def test_overlay_errors(picture, heat, labels, match):
    with pytest.raises(ValueError, match=match):
        overlay(picture, heat, labels)


def read_gif(path):
    """All frames as RGB arrays, and their durations."""
    with Image.open(path) as gif:
        frames, durations = [], []
        for b in range(gif.n_frames):
            gif.seek(b)
            frames.append(np.asarray(gif.convert("RGB"), np.float32))
            durations.append(gif.info["duration"])
    return frames, durations


def test_gif_keeps_every_labelled_frame_of_a_constant_flow(tmp_path):
    heat = np.full((12, 14, 14), 100, np.uint8)
    save_gif(overlay(random_picture(64, 96), heat, block_labels(12)), tmp_path / "flow.gif")
    with Image.open(tmp_path / "flow.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 12 and gif.size == (96, 64) and gif.info["loop"] == 0


@pytest.mark.parametrize("duration, expected", [(400, [400] * 4), ([100, 200, 300, 1000], [100, 200, 300, 1000])])
def test_gif_shows_the_frames_in_order(tmp_path, duration, expected):
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:255:48j, 0:255:64j], 128), -1).astype(np.uint8)
    frames = overlay(smooth, render(random_flow(4)), block_labels(4))
    save_gif(frames, str(tmp_path / "flow.gif"), duration)
    shown, durations = read_gif(tmp_path / "flow.gif")
    assert durations == expected
    distance = np.array([[np.abs(a - np.asarray(b, np.float32)).mean() for b in frames] for a in shown])
    assert (distance.argmin(1) == range(4)).all() and distance.diagonal().max() < 8  # 256 colours a frame


@pytest.mark.parametrize("where", ["quantize", "save", "replace"])
def test_gif_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "flow.gif"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        for part in args[1:2]:
            if where == "save":
                part.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "replace") if where == "replace" else (Image.Image, where)), fail)
    with pytest.raises(OSError, match="disk full"):
        save_gif([solid("red")], path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["flow.gif"]


def test_gif_larger_than_the_format(tmp_path):
    with pytest.raises(ValueError, match="^frames: a GIF has 65,535 pixels a side at most, got 65536 x 1; make them"):
        save_gif([Image.new("RGB", (65_536, 1))], tmp_path / "flow.gif")
    assert not list(tmp_path.iterdir())


def test_gif_without_frames(tmp_path):
    with pytest.raises(ValueError, match=r"^frames: there are none"):
        save_gif([], tmp_path / "flow.gif")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("old", [None, "old"])
def test_whole_file_appears_at_the_end(tmp_path, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with atomic_write(path) as part:
        part.write_text("new")
        assert part.parent == tmp_path and part != path  # the same folder: a rename is atomic only there
        assert path.exists() == bool(old) and (not old or path.read_text() == old)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whole_file_does_not_appear_after_an_exception(tmp_path, error):
    with pytest.raises(error), atomic_write(str(tmp_path / "a.txt")) as part:
        part.write_text("half")
        raise error
    assert not os.listdir(tmp_path)


def box(page, colour):
    """Top, left, height, width of the only rectangle of this colour on the page."""
    ys, xs = np.nonzero((np.asarray(page) == colour).all(2))
    top, left, height, width = ys.min(), xs.min(), np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) == height * width
    return int(top), int(left), int(height), int(width)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (30, 30)])
@pytest.mark.parametrize("columns, rows", [(3, 2), (4, 2), (6, 1), (1, 5)])
def test_sheet_shows_the_picture_and_every_frame(columns, rows, size):
    red = solid((200, 0, 0), size)
    frames = [solid((10 * b, 200, 100), size) for b in range(1, 6)]
    page = sheet(red, frames, "a caption", columns, side=60)
    top, left, *shape = box(page, (200, 0, 0))
    corners = []
    for b in range(1, 6):
        y, x, *same = box(page, (10 * b, 200, 100))
        corners.append((y, x))
        assert same == shape and max(shape) == 60 and shape[0] * size[0] == shape[1] * size[1]
    assert corners == sorted(corners)  # row by row
    assert len({y for y, _ in corners}) == rows and len({x for _, x in corners}) == min(columns, 5)
    assert corners[0][0] == top and corners[0][1] > left + shape[1]


def test_sheet_writes_the_caption_below_the_picture():
    def dark(caption):
        page = np.asarray(sheet(solid("red"), [solid("lime")], caption, side=100))
        return np.nonzero((page < 100).all(2))[0], box(page, (255, 0, 0)), len(page)

    rows, *_ = dark("")
    assert not len(rows)
    heights = []
    for lines in (1, 4, 9):
        rows, (top, _, height, _), end = dark("\n".join(["tench 0.93"] * lines))
        assert rows.min() > top + height and rows.max() < end - 2  # nothing is cut off
        heights.append(np.ptp(rows))
    assert heights == sorted(set(heights))


def test_sheet_of_several_classes_is_in_the_scale_of_the_picture():
    colours = [(200, 10 * b, 100) for b in range(4)]
    frames = side_by_side([[solid(colour) for colour in colours], [solid("lime")] * 4])
    page = sheet(solid("red"), frames, "", 2, side=40)
    _, left, height, width = box(page, (255, 0, 0))
    boxes = [box(page, colour) for colour in colours]
    assert {(h, w) for _, _, h, w in boxes} == {(height, width)} == {(20, 40)}
    (y0, x0, *_), (y1, x1, *_), (y2, x2, *_), _ = boxes
    assert y0 == y1 < y2 and left + width < x0 == x2
    lime = np.nonzero((np.asarray(page)[y0] == (0, 255, 0)).all(1))[0]
    between = lime[lime < x1].max(), lime[lime < x1].min()
    assert x1 - between[0] > 2 * (between[1] - (x0 + width)) > 0  # frames are further apart than the panels of one


def test_side_by_side():
    red, lime, blue = ([solid(colour, (30, 40)), solid("black", (30, 40))] for colour in ("red", "lime", "blue"))
    pages = side_by_side([red, lime, blue])
    assert len(pages) == 2 and len({page.size for page in pages}) == 1
    gap = (pages[0].width - 90) // 2
    assert gap >= 2 and pages[0].height == 40
    for k, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert box(pages[0], colour) == (0, k * (30 + gap), 40, 30)
    assert (np.asarray(pages[1])[:, 30 : 30 + gap] == 255).all() and not np.asarray(pages[1])[:, :30].any()


def test_side_by_side_with_titles():
    panels = [[solid("red", (120, 80))], [solid("lime", (120, 80))]]
    plain, titled, cut = (side_by_side(panels, t)[0] for t in (None, ("cup", "i"), ("cup" * 50, "i" * 500)))
    top = titled.height - plain.height
    assert top > 10 and np.array_equal(np.asarray(titled)[top:], np.asarray(plain))  # nothing of the pictures is hidden
    assert cut.size == titled.size
    for page, widest in ((titled, 40), (cut, 120)):
        for left in (0, page.width - 120):
            columns = np.nonzero((np.asarray(page)[:top, left : left + 120] < 128).any((0, 2)))[0]
            assert 0 < np.ptp(columns) + 1 <= widest
            assert abs(columns.min() + columns.max() - 119) <= 12  # in the middle of the panel
        assert (np.asarray(page)[:top, 120:-120] == 255).all()


@pytest.mark.parametrize(
    "panels, titles, match",
    [
        ([], None, "^panels: expected as many frames of every class, got"),
        ([[solid("red")], []], None, r"^panels: .*\[1, 0\]"),
        ([[solid("red")]], ["a", "b"], "^titles: expected one for each of 1 classes, got 2"),
    ],
)
def test_side_by_side_errors(panels, titles, match):
    with pytest.raises(ValueError, match=match):
        side_by_side(panels, titles)


# ----------------------------------------------------------------------------------------------------------------------
# A flow as a folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(model, images):
    return attention_flow(model, images)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_save_flow_writes_the_chosen_image(flow, tmp_path):
    picture = Image.fromarray(random_picture(64, 96))
    folder = save_flow(tmp_path / "deep" / "er", picture, flow, 1, "caption", {"class": "Tüpfelhyäne"}, duration=100)
    assert folder == tmp_path / "deep" / "er" and os.listdir(folder.parent) == ["er"]
    blocks = [f"frames/block_{b:02d}.png" for b in range(1, BLOCKS + 1)]
    assert sorted(tree(folder)) == sorted(["flow.gif", "flow.json", "maps.npz", "sheet.png", *blocks])

    frames = overlay(picture, render(flow.accumulated[1]), block_labels(BLOCKS))
    for name, frame in zip(blocks, frames, strict=True):
        assert np.array_equal(Image.open(folder / name), frame)
    shown, durations = read_gif(folder / "flow.gif")
    assert len(shown) == BLOCKS and durations == [100, 100, 300]
    assert np.array_equal(Image.open(folder / "sheet.png"), sheet(picture, frames, "caption"))
    manifest = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
    assert manifest == {"class": "Tüpfelhyäne", "blocks": BLOCKS, "grid": [4, 4]}
    with np.load(folder / "maps.npz", allow_pickle=False) as maps:
        assert sorted(maps) == ["accumulated", "block_maps", "output"]
        for name in maps:
            assert maps[name].dtype == np.float32 and np.array_equal(maps[name], getattr(flow, name)[1])


@pytest.mark.parametrize("classes, columns", [(1, 4), (2, 3), (4, 1)])
def test_save_flow_of_several_classes(model, images, tmp_path, classes, columns):
    """A frame has a panel for every class, each drawn by its own maximum."""
    flow = attention_flow(model, images, [[4, 1, 0, 2][:classes]] * 2)
    picture, names = Image.fromarray(random_picture(64, 96)), ["cup", "ewer", "lotus", "crab"][:classes]
    folder = save_flow(tmp_path / "a", picture, flow, 1, "caption", titles=names)
    panels = [overlay(picture, render(a), block_labels(BLOCKS)) for a in flow.accumulated[1]]
    frames = side_by_side(panels, names)
    for b, frame in enumerate(frames, 1):
        assert np.array_equal(Image.open(folder / "frames" / f"block_{b:02d}.png"), frame)
    assert np.array_equal(Image.open(folder / "sheet.png"), sheet(picture, frames, "caption", columns))
    shown, _ = read_gif(folder / "flow.gif")
    assert [frame.shape[:2] for frame in shown] == [frames[0].size[::-1]] * BLOCKS
    manifest = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
    assert manifest == {"blocks": BLOCKS, "grid": [4, 4]}
    with np.load(folder / "maps.npz") as maps:
        assert maps["block_maps"].shape == (classes, BLOCKS, 4, 4) and maps["output"].shape == (5,)
        assert np.array_equal(maps["accumulated"], flow.accumulated[1])


def test_save_flow_with_more_pictures(flow, tmp_path):
    """A picture, or what draws it; when that fails, nothing is written."""
    folder = save_flow(
        tmp_path / "a", solid("red"), flow, pictures={"b.png": solid("blue"), "c.png": lambda: solid("lime")}
    )
    assert np.array_equal(Image.open(folder / "b.png"), solid("blue"))
    assert np.array_equal(Image.open(folder / "c.png"), solid("lime"))

    def fail():
        raise ValueError("no paint left")

    with pytest.raises(ValueError, match="no paint left"):
        save_flow(tmp_path / "new", solid("red"), flow, pictures={"b.png": fail})
    assert os.listdir(tmp_path) == ["a"]


def test_save_flow_of_half_precision_features(tmp_path):
    maps = torch.rand(1, 2, 3, 3)
    flow = AttentionFlow(maps, maps.cumsum(1), torch.rand(1, 8, dtype=torch.bfloat16), None)
    with np.load(save_flow(tmp_path / "a", solid("red"), flow) / "maps.npz") as saved:
        assert saved["output"].dtype == np.float32 and saved["output"].shape == (8,)


def test_save_flow_again_replaces_its_files_and_keeps_others(flow, tmp_path):
    folder = save_flow(tmp_path / "a", solid("red"), flow)
    (folder / "notes.txt").write_text("mine")
    save_flow(folder, solid("blue"), flow, 1)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert tree(folder) == tree(save_flow(tmp_path / "b", solid("blue"), flow, 1))


@pytest.mark.parametrize("culprit", ["save_gif", "sheet"])
def test_save_flow_that_fails_changes_nothing(flow, tmp_path, monkeypatch, culprit):
    folder = save_flow(tmp_path / "a", solid("red"), flow)
    before = tree(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(daam_core, culprit, fail)
    for path in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save_flow(path, solid("blue"), flow)
    with pytest.raises(TypeError, match="not JSON serializable"):
        monkeypatch.undo()
        save_flow(folder, solid("blue"), flow, manifest={"model": object()})
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["a"]


def test_save_flow_into_the_current_folder(flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_flow(".", solid("red"), flow)
    assert (tmp_path / "flow.gif").exists()


def test_save_flow_is_not_stopped_by_the_remains_of_a_killed_run(flow, tmp_path):
    (tmp_path / ".a.0123abcd.part" / "frames").mkdir(parents=True)
    save_flow(tmp_path / "a", solid("red"), flow)
    assert (tmp_path / "a" / "flow.gif").exists()
