"""Maps of a flow are those of a plain derivation of the method.

The models are small and their weights random: what is tested is arithmetic, which no training changes.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from derivations import assert_maps_match, assert_same_maps, plain_all_rows, plain_block_maps
from odd_models import Grouped
from support_table import row_of
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, build, random_images, tiny_vit

from daam_core import (
    AttentionFlow,
    accumulate,
    all_rows_map,
    attention_flow,
    block_map,
    neighbour_importance,
)
from daam_vit.attention import AttentionMatrix
from memorybank import MemoryBank

WIDTH, BLOCKS = TINY["embed_dim"], TINY["depth"]


# ----------------------------------------------------------------------------------------------------------------------
# The equations
# ----------------------------------------------------------------------------------------------------------------------

IMAGES, HEADS, TOKENS, HEAD_WIDTH = 2, 3, 10, 4
WEIGHTS = {"ReLU": torch.relu, "identity": lambda C: C}


@pytest.mark.parametrize("heads", [False, True], ids=["channels", "heads"])
@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("queries", [1, 2])
def test_block_map_is_the_weighted_sum_of_the_semantic_map(queries, w, heads):
    """Compute Eqs. 2 and 5 with S_b stored in full, for every query, key, head and channel."""
    a = random_images(IMAGES, HEADS, queries, TOKENS).softmax(-1)
    V, C = random_images(IMAGES, HEADS, TOKENS, HEAD_WIDTH), random_images(IMAGES, HEADS, queries, HEAD_WIDTH)
    actual = block_map(a, V, C, WEIGHTS[w], heads)
    assert actual.shape == (IMAGES, TOKENS)
    for image in range(IMAGES):
        for j in range(TOKENS):
            of_head = []
            for head in range(HEADS):
                S = [a[image, head, q, j] * V[image, head, j] for q in range(queries)]  # (d,) each
                of_head.append(sum((WEIGHTS[w](C[image, head, q]) * S[q]).sum() for q in range(queries)))
            expected = sum(h.relu() for h in of_head).relu() if heads else sum(of_head).relu()
            torch.testing.assert_close(actual[image, j], expected)


@pytest.mark.parametrize("heads", [False, True], ids=["channels", "heads"])
@pytest.mark.parametrize("w", WEIGHTS)
def test_map_of_all_rows_is_the_block_map_of_every_query(w, heads):
    A = random_images(IMAGES, HEADS, TOKENS, TOKENS).softmax(-1)
    V, C = (random_images(IMAGES, HEADS, TOKENS, HEAD_WIDTH) for _ in range(2))
    matrix = AttentionMatrix(V, lambda queries: A[:, :, queries], lambda gradient: A.transpose(2, 3) @ gradient)
    expected = block_map(A, V, C, WEIGHTS[w], heads)
    torch.testing.assert_close(all_rows_map(matrix, V, C, WEIGHTS[w], heads), expected)


def test_maps_are_added_block_after_block():
    maps = random_images(2, 3, 4, 5, 6).relu()
    for L in range(4):
        torch.testing.assert_close(accumulate(maps)[:, :, L], maps[:, :, : L + 1].sum(2))


def plain_importance(f, bank, labels, k, temperature):
    """Compute Eqs. 7 and 8 for one feature `(D,)`, after the vote of its k nearest neighbours."""
    f = f / f.norm()
    nearest = sorted(range(len(bank)), key=lambda row: -(f @ bank[row]).item())[:k]
    votes = {}
    for row in nearest:
        label = labels[row].item()
        votes[label] = votes.get(label, 0) + torch.exp(f @ bank[row] / temperature).item()
    winner = max(votes, key=votes.get)
    p = torch.stack([f * bank[row] for row in nearest if labels[row] == winner]).mean(0)
    return (p - p.min()) / (p.max() - p.min())


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_importance_of_the_nearest_neighbours(k, temperature):
    bank = F.normalize(random_images(30, 8), dim=1)
    labels, features = torch.arange(30) % 4, 3 * bank[:3] + 0.7 * random_images(3, 8)
    actual = neighbour_importance(features, bank, labels, k, temperature)
    expected = torch.stack([plain_importance(f, bank, labels, k, temperature) for f in features])
    torch.testing.assert_close(actual, expected)
    of_bank = MemoryBank(Path(), bank, labels, None, None, {}).importance(features, k, temperature)
    torch.testing.assert_close(actual, of_bank)


def test_importance_of_a_constant_agreement_is_one():
    bank = torch.full((1, 4), 0.5)
    feature = torch.full((1, 4), 3.0)
    assert torch.equal(neighbour_importance(feature, bank, torch.zeros(1, dtype=torch.int64), 1), torch.ones(1, 4))


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


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
        ("vit_small_patch8_224", {"num_classes": 10, "img_size": 112}, (112, 112), torch.float32),
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


def test_mask_of_a_model_is_seen(images):
    """Hidden patches get no heat, and an image that differs only there gets the same maps."""

    class Masked(VisionTransformer):
        def forward_features(self, x, **options):
            mask = torch.ones(17, dtype=torch.bool)
            mask[1:9] = False
            return super().forward_features(x, attn_mask=mask.expand(1, 1, 17, 17))

    maps = attention_flow(tiny_vit(Masked), images, target=3).block_maps
    images[:, :, :16] = 0  # rows 0 and 1 of the patch grid
    assert torch.equal(attention_flow(tiny_vit(Masked), images, target=3).block_maps, maps)
    assert (maps[:, :, :2] == 0).all() and (maps[:, :, 2:] > 0).any()


@pytest.mark.parametrize("rows", ["class", "patches"])
def test_grouped_query_attention(rows):
    model, images = tiny_vit(attn_layer=Grouped), random_images(2, 3, 32, 32)
    fused = attention_flow(model, images, rows=rows)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same_maps(fused.block_maps, attention_flow(model, images, rows=rows).block_maps)


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


# ----------------------------------------------------------------------------------------------------------------------
# What is explained
# ----------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("norm", [False, True])
def test_importance_of_zeros_gives_an_empty_flow(model, images, norm):
    flow = attention_flow(model, images, importance=torch.zeros(WIDTH), norm=norm)
    assert (flow.block_maps == 0).all() and (flow.accumulated == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Variants, all rows and norm
# ----------------------------------------------------------------------------------------------------------------------


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
    paper, signed, heads = (
        attention_flow(model, images, importance=importance, variant=v) for v in ("paper", "signed", "heads")
    )
    assert torch.equal(paper.block_maps, signed.block_maps)
    assert_maps_match(heads, [plain_block_maps(model, x, None, importance, "heads") for x in images])


def test_variants_of_all_rows(images):
    """ReLU is taken head by head, before heads are added: sum_h ReLU(V . dY/dV)."""
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


@pytest.mark.parametrize("importance", [None, random_images(WIDTH)], ids=["target", "importance"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
@pytest.mark.parametrize(
    "options",
    [{"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2, "global_pool": "avg"}, {}],
    ids=["mean", "no class token", "registers", "class token read"],
)
def test_all_rows_match_the_derivation(options, fused, importance):
    model, images = tiny_vit(**options, fc_norm=False), random_images(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = fused
    target = None if importance is not None else [1, 4]
    flow = attention_flow(model, images, target, importance, rows="patches")
    assert flow.rows == "patches" and flow.decomposed == "all tokens, rows='patches', 3 blocks"
    expected = [plain_all_rows(model, x, t, importance) for x, t in zip(images, target or (0, 0))]
    assert_same_maps(flow.block_maps, torch.stack(expected))


def test_all_rows_of_a_model_with_an_attention_pool(images):
    """The steps are the blocks, and the pool as the last one."""
    model = row_of("SigLIP, attention pool").make()
    of_query, of_all = (attention_flow(model, images, rows=rows).block_maps for rows in ("class", "patches"))
    assert of_query.shape == (2, 1, 4, 4) and of_all.shape == (2, 4, 4, 4)
    assert_same_maps(of_all[:, -1:], of_query)


def test_norm_stretches_every_map_before_it_is_added(model, images):
    plain, normed = (attention_flow(model, images, [4, 1], norm=norm) for norm in (False, True))
    assert torch.equal(plain.block_maps, normed.block_maps)
    for maps, accumulated in zip(normed.block_maps, normed.accumulated):
        running = torch.zeros(4, 4)
        for L_b, A_b in zip(maps, accumulated):
            running = running + (L_b - L_b.min()) / (L_b.max() - L_b.min())
            torch.testing.assert_close(A_b, running)


def test_norm_of_a_flat_map_is_zero():
    maps = torch.tensor([[[3.0, 3.0], [3.0, 3.0]], [[1.0, 2.0], [3.0, 5.0]]])
    expected = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.25], [0.5, 1.0]]])
    assert torch.equal(accumulate(maps[:, None], norm=True)[:, 0], expected)


def test_norm_of_images_that_fill_a_part_of_the_grid():
    """Cells outside of an image do not count and stay zero, for all K maps of the image."""
    maps = torch.tensor([[[[0.0, 3.0, 5.0, 9.0]]], [[[4.0, 4.0, 4.0, 0.0]]]])  # (B, L, h, w)
    inside = torch.tensor([[[0, 1, 1, 1]], [[1, 1, 1, 0]]]).bool()
    expected = torch.tensor([[[[0.0, 0.0, 1 / 3, 1.0]]], [[[0.0, 0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(accumulate(maps, True, inside), expected)
    several = torch.stack([maps, 2 * maps + 1], 1)
    torch.testing.assert_close(accumulate(several, True, inside), torch.stack([expected] * 2, 1))
