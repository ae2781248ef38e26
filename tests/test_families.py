"""Every row of the support table: semantic maps sum to the attention, make the maps, and notice a missing term."""

import dataclasses
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from derivations import assert_same_maps
from support_table import (
    ALL_ROWS,
    DECOMPOSED,
    MARKERS,
    PAGE,
    from_transformers,
    measure,
    measured,
    row_of,
    table,
)
from tiny_models import TINY, random_images, tiny_timm, tiny_torchvision, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow
from daam_vit import checks
from daam_vit.attention import AttentionRecorder
from daam_vit.plan import AttentionLayer

WIDTH = TINY["embed_dim"]


@pytest.mark.parametrize("row", DECOMPOSED + ALL_ROWS, ids=lambda row: row.name)
def test_semantic_maps_sum_to_the_output_of_the_attention(row):
    result = measured(row)
    assert len(result.S) >= result.flow.block_maps.shape[1] >= 1
    assert result.error < 1e-5
    assert min(T.abs().max() for T in result.T) > 1e-2  # there is something to compare
    assert (result.flow.block_maps > 0).float().mean() > 0.1 and torch.isfinite(result.flow.block_maps).all()


LAYERS = {"parallel blocks": [2] * 3, "CrossViT": [2, 1, 1, 1, 2] * 3, "CrossViT, dagger": [2, 1, 1, 2] * 3}
"""How many attention layers make a step, in the order of the forward, if it is not one."""


WEIGHTED = [row for row in DECOMPOSED if not row.batch and "torchvision" not in row.example]
"""For the others see test_naflex_patches_find_their_places and test_torchvision_agrees_with_timm."""


@pytest.mark.parametrize("row", WEIGHTED, ids=lambda row: row.name)
def test_maps_are_the_semantic_maps_weighted_by_the_gradient(row):
    """The maps follow from S of the test above and the gradient that hooks saw. The patches are the last keys."""
    result = measured(row)
    w = (lambda c: c) if "importance" in row.flow else torch.relu
    size, layers = result.flow.block_maps.shape[-2:], []
    for S, C in zip(result.S, result.C, strict=True):
        tokens = torch.einsum("bnqc,bqc->bn", S, w(C[:, : S.shape[2]])).relu()
        side = math.isqrt(tokens.shape[1])  # the patches are a square; fewer tokens than the next one are prefix tokens
        grid = tokens[:, -(side**2) :].reshape(-1, 1, side, side)
        if side != size[0]:
            stretched = F.interpolate(grid, size, mode="bilinear")
            grid = stretched * grid.sum((2, 3), keepdim=True) / stretched.sum((2, 3), keepdim=True).clamp(1e-30)
        layers.append(grid[:, 0])
    of_layer = iter(layers)
    steps = [sum(itertools.islice(of_layer, n)) for n in LAYERS.get(row.family, [1] * len(layers))]
    assert_same_maps(result.flow.block_maps, torch.stack(steps, 1))


OPEN = {"ConViT", "TNT", "TNT, legacy", "MViTv2 with a class token"}


TWO_FORMS = [
    row
    for row in DECOMPOSED + ALL_ROWS
    if not (row.batch or row.family in OPEN or "torchvision" in row.example or row.example.endswith("eager"))
]


@pytest.mark.parametrize("row", TWO_FORMS, ids=lambda row: row.name)
def test_fused_and_open_attention_give_the_same_maps(row):
    """With open attention, the model computes the matrix itself, with its own biases and rotations.

    The model is in float64: the two forms add in another order, and what float32 makes of that depends on the CPU.
    """
    model = row.make().double()
    images = row.images().double()
    expected = attention_flow(model, images, **row.flow)
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    if not fused:
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
    assert_same_maps(attention_flow(model, images, **row.flow).block_maps, expected.block_maps)
    assert not any(module.fused_attn for module in fused)


def test_torchvision_agrees_with_timm(images):
    """Both have the same weights; without gradients, nn.MultiheadAttention takes a path that hides its attention."""
    model, timms = tiny_torchvision(), tiny_vit(mlp_ratio=2.0)
    with torch.no_grad():
        timms.cls_token.copy_(model.class_token)
        timms.pos_embed.copy_(model.encoder.pos_embedding)
        pairs = [(timms.patch_embed.proj, model.conv_proj), (timms.norm, model.encoder.ln)]
        pairs += [(timms.head, model.heads.head)]
        for block, layer in zip(timms.blocks, model.encoder.layers):
            attention = layer.self_attention
            block.attn.qkv.weight.copy_(attention.in_proj_weight)
            block.attn.qkv.bias.copy_(attention.in_proj_bias)
            pairs += [(block.norm1, layer.ln_1), (block.attn.proj, attention.out_proj), (block.norm2, layer.ln_2)]
            pairs += [(block.mlp.fc1, layer.mlp[0]), (block.mlp.fc2, layer.mlp[3])]
        for theirs, layer in pairs:
            theirs.load_state_dict(layer.state_dict())
    expected = attention_flow(timms, images)
    for mode in (torch.enable_grad, torch.no_grad):
        model.requires_grad_(mode is torch.enable_grad)
        with mode():
            flow = attention_flow(model, images)
        torch.testing.assert_close(flow.output, expected.output, rtol=1e-4, atol=1e-5)
        assert_same_maps(flow.block_maps, expected.block_maps, 1e-4)


def test_table_of_the_page_is_the_one_that_is_measured():
    """Errors differ from machine to machine; all else is compared."""
    start, end = MARKERS
    written = PAGE.read_text(encoding="utf-8").split(start)[1].split(end)[0].strip().splitlines()

    def without_error(line):
        return line.rsplit("|", 2)[0].rstrip()

    made = table(map(measured, DECOMPOSED + ALL_ROWS)).splitlines()
    assert [*map(without_error, written)] == [*map(without_error, made)]
    assert all(float(line.split("|")[-2]) < 1e-5 for line in written[2 : 2 + len(DECOMPOSED + ALL_ROWS)])
    assert len(written) - 2 >= 35


# ----------------------------------------------------------------------------------------------------------------------
# Negative controls: the table and the call itself notice a term that is left out
# ----------------------------------------------------------------------------------------------------------------------


def without_mask(module, x, query, key, value, mask):
    return query, key, value, None


def without_rotation(module, x, query, key, value, mask):
    unrotated = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))[:, :, 1].transpose(1, 2)
    return query, module.k_norm(unrotated), value, mask


def without_query_bias(module, x, query, key, value, mask):
    return query - module.q_bias.reshape(module.num_heads, 1, -1), key, value, mask


def without_value_bias(module, x, query, key, value, mask):
    return query, key, value - module.v_bias.reshape(module.num_heads, 1, -1), mask


@pytest.mark.parametrize(
    "family, term_left_out",
    [
        ("rotary position embedding", without_rotation),
        ("DINOv3", without_rotation),
        ("BEiT", without_mask),  # the mask is the relative position bias
        ("BEiT", without_query_bias),
        ("BEiT", without_value_bias),
        ("DINOv3 with biases", without_value_bias),
        ("NaFlexViT, padded batch", without_mask),
    ],
)
def test_negative_control(family, term_left_out):
    row, inputs = row_of(family), []  # the attention module and its input
    plain = AttentionRecorder.attend

    def attend(recorder, func, matrix_of, named):
        def wrong_matrix(query, key, value, attn_mask=None, **_):
            return matrix_of(*term_left_out(*seen, query, key, value, attn_mask))

        seen = tuple(inputs)
        return plain(recorder, func, wrong_matrix, named)

    def make():
        model = row.make()
        for block in model.blocks:
            block.attn.register_forward_pre_hook(
                lambda module, args: inputs.__setitem__(slice(None), (module, args[0]))
            )
        return model

    control = dataclasses.replace(row, make=make)
    assert measure(control).error < 1e-5
    with mock.patch.object(AttentionRecorder, "attend", attend):
        with pytest.raises(UnsupportedModel, match=r"^model: the attention of .* is not the sum of its semantic maps"):
            measure(control)
        with mock.patch.object(checks, "tolerance", lambda dtype: math.inf):
            assert measure(control).error > 5e-3


# ----------------------------------------------------------------------------------------------------------------------
# Grids and sizes
# ----------------------------------------------------------------------------------------------------------------------


def test_coarse_grids_are_stretched_and_keep_their_sum():
    layer, tokens = AttentionLayer(nn.Identity(), (2, 3), prefix=2), torch.rand(2, 8)
    for size in ((6, 9), (3, 4)):
        grid = layer.to_grid(tokens, size)
        assert grid.shape == (2, *size)
        torch.testing.assert_close(grid.sum((1, 2)), tokens[:, 2:].sum(1))
        one = tokens * (torch.arange(8) == 5)
        torch.testing.assert_close(layer.to_grid(one, size).sum((1, 2)), tokens[:, 5])
        assert not layer.to_grid(0 * tokens, size).any()
    torch.testing.assert_close(layer.to_grid(torch.ones(1, 8), (6, 9)), torch.full((1, 6, 9), 1 / 9))


def test_patches_lie_where_their_cells_say():
    cells = torch.tensor([[5, 0, 3], [2, 4, 1]])
    layer, tokens = AttentionLayer(nn.Identity(), (2, 3), prefix=1, cells=cells), torch.rand(2, 4)
    grid = layer.to_grid(tokens, (2, 3)).flatten(1)
    for image in range(2):
        expected = [0.0] * 6
        for cell, value in zip(cells[image].tolist(), tokens[image, 1:].tolist()):
            expected[cell] = value
        assert grid[image].tolist() == expected


@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
def test_xcit_takes_images_of_every_size(size):
    flow = attention_flow(row_of("XCiT/16").make(), random_images(1, 3, *size))
    assert flow.block_maps.shape == (1, 2, size[0] // 16, size[1] // 16)


def test_dinov2_of_transformers_takes_other_sizes():
    flow = attention_flow(
        from_transformers("", "Dinov2Model").make(), random_images(1, 3, 48, 32), importance=torch.ones(WIDTH)
    )
    assert flow.block_maps.shape == (1, 3, 6, 4)


def test_models_of_one_channel():
    model = tiny_timm("xcit_nano_12_p16_224", embed_dim=32, depth=1, num_heads=2, num_classes=5, in_chans=1)
    assert attention_flow(model, random_images(1, 1, 64, 64)).block_maps.shape == (1, 2, 4, 4)


def test_only_size_that_is_no_multiple_of_the_patch():
    """As in vit_so400m_patch14_siglip_384, the convolution ignores the last pixels."""
    flow = attention_flow(tiny_vit(img_size=36), random_images(1, 3, 36, 36))
    assert flow.block_maps.shape == (1, 3, 4, 4)
