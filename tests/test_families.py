"""Every family of models, row by row of the support table: the identity, the maps made of it, and what breaks it."""

import copy
import dataclasses
import itertools
import math
from functools import cache
from unittest import mock

import pytest
import support_table
import torch
import torch.nn.functional as F
import torchvision
from support_table import (
    ALL_ROWS,
    DECOMPOSED,
    MARKERS,
    PAGE,
    REFUSED,
    Row,
    from_transformers,
    measure,
    naflex_batch,
    tiny_torchvision,
)
from timm.data.naflex_dataset import NaFlexCollator
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, build, random_images, tiny_timm, tiny_vit
from torch import nn

import daam_core
from daam_core import UnsupportedModel, attention_flow, features, num_classes

WIDTH = TINY["embed_dim"]


def name_of(row: Row) -> str:
    return f"{row.family}: {row.example}"


@cache
def measured(index):
    return measure((DECOMPOSED + ALL_ROWS)[index])


def row_of(family: str) -> Row:
    return next(row for row in DECOMPOSED + ALL_ROWS + REFUSED if row.family == family)


def assert_same_maps(actual, expected, tolerance=1e-5):
    """Within a part of the largest value of each map."""
    assert actual.shape == expected.shape and (expected > 0).any()
    largest = expected.flatten(2).amax(-1)[..., None, None]
    assert ((actual - expected).abs() <= tolerance * largest + 1e-12).all()


# ----------------------------------------------------------------------------------------------------------------------
# The rows of the table
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(DECOMPOSED + ALL_ROWS)), ids=map(name_of, DECOMPOSED + ALL_ROWS))
def test_semantic_maps_sum_to_what_the_attention_hands_on(index):
    result = measured(index)
    assert len(result.S) >= result.flow.block_maps.shape[1] >= 1
    assert result.error < 1e-5
    assert min(T.abs().max() for T in result.T) > 1e-2  # there is something to compare
    assert (result.flow.block_maps > 0).float().mean() > 0.1 and torch.isfinite(result.flow.block_maps).all()


FRAMES = {"parallel blocks": [2] * 3, "CrossViT": [2, 1, 1, 1, 2] * 3, "CrossViT, dagger": [2, 1, 1, 2] * 3}
"""How many attentions make a frame, in the order of the forward, where it is not one."""


WEIGHTED = [i for i, r in enumerate(DECOMPOSED) if not r.images and "torchvision" not in r.example]
"""The others: test_naflex_patches_find_their_places, test_torchvision_agrees_with_timm."""


@pytest.mark.parametrize("index", WEIGHTED, ids=[name_of(DECOMPOSED[i]) for i in WEIGHTED])
def test_maps_are_the_semantic_maps_weighted_by_the_gradient(index):
    """With S from the test above, and the gradient that hooks of the test saw. The patches are the last keys."""
    row, result = DECOMPOSED[index], measured(index)
    w = (lambda c: c) if "importance" in row.flow else torch.relu
    size, sites = result.flow.block_maps.shape[-2:], []
    for S, C in zip(result.S, result.C, strict=True):
        tokens = torch.einsum("bnqc,bqc->bn", S, w(C[:, : S.shape[2]])).relu()
        side = math.isqrt(tokens.shape[1])  # of the square of patches; less than that are prefix tokens
        grid = tokens[:, -(side**2) :].reshape(-1, 1, side, side)
        if side != size[0]:
            stretched = F.interpolate(grid, size, mode="bilinear")
            grid = stretched * grid.sum((2, 3), keepdim=True) / stretched.sum((2, 3), keepdim=True).clamp(1e-30)
        sites.append(grid[:, 0])
    attentions = iter(sites)
    frames = [sum(itertools.islice(attentions, n)) for n in FRAMES.get(row.family, [1] * len(sites))]
    assert_same_maps(result.flow.block_maps, torch.stack(frames, 1))


OPEN = {"ConViT", "TNT", "TNT, legacy", "MViTv2 with a class token"}
TWO_FORMS = [
    row
    for row in DECOMPOSED + ALL_ROWS
    if not (row.images or row.family in OPEN or "torchvision" in row.example or row.example.endswith("eager"))
]


@pytest.mark.parametrize("row", TWO_FORMS, ids=name_of)
def test_fused_and_open_attention_give_the_same_maps(row):
    """Open, a model makes the matrix itself, with its own biases and rotations.

    The model is in float64: the two forms add in another order, and what float32 makes of that depends on the CPU.
    """
    model = row.make().double()
    images = random_images(2, 3, *row.size).double()
    expected = attention_flow(model, images, **row.flow)
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    if not fused:
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
    assert_same_maps(attention_flow(model, images, **row.flow).block_maps, expected.block_maps)
    assert not any(module.fused_attn for module in fused)


@pytest.mark.parametrize(
    "family, way_out",
    [
        ("mean of the patches", r"Build it with global_pool='token' \(.*\) or ask for rows='patches'"),
        ("mean of the patches, no class token", "use another model or ask for rows='patches'"),
        ("class token beside the mean of the patches", "token alone .* or ask for rows='patches'"),
        ("MViTv2 without a class token", "use another model$"),
        ("Swin", "^model: SwinTransformer uses windowed attention: no token attends to all patches$"),
        ("Hiera", "^model: Hiera has no class token; DAAM needs one query token that the score reads$"),
    ],
)
def test_refused_models_say_what_helps(family, way_out):
    """The reasons stand in the table."""
    row = row_of(family)
    with pytest.raises(UnsupportedModel, match=way_out) as caught:
        attention_flow(row.make(), random_images(1, 3, *row.size))
    assert "\n" not in str(caught.value)


def test_table_of_the_page_is_the_one_that_is_measured():
    """All but the errors, which differ from machine to machine."""
    start, end = MARKERS
    written = PAGE.read_text(encoding="utf-8").split(start)[1].split(end)[0].strip().splitlines()

    def without_error(line):
        return line.rsplit("|", 2)[0].rstrip()

    made = support_table.table([measured(i) for i in range(len(DECOMPOSED + ALL_ROWS))]).splitlines()
    assert [*map(without_error, written)] == [*map(without_error, made)]
    assert all(float(line.split("|")[-2]) < 1e-5 for line in written[2 : 2 + len(DECOMPOSED + ALL_ROWS)])
    assert len(written) - 2 >= 35


# ----------------------------------------------------------------------------------------------------------------------
# Negative controls: a term that is left out is noticed, by the table and by the call itself
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
        ("BEiT", without_mask),  # it carries the relative position bias
        ("BEiT", without_query_bias),
        ("BEiT", without_value_bias),
        ("DINOv3 with biases", without_value_bias),
        ("NaFlexViT, padded batch", without_mask),
    ],
)
def test_negative_control(family, term_left_out):
    row, inputs = row_of(family), []  # the module that attends, and what it reads
    fused_attention = daam_core._fused_attention

    def told(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        return fused_attention(*term_left_out(*inputs, query, key, value, attn_mask))

    def make():
        model = row.make()
        for block in model.blocks:
            block.attn.register_forward_pre_hook(
                lambda module, args: inputs.__setitem__(slice(None), (module, args[0]))
            )
        return model

    control = dataclasses.replace(row, make=make)
    assert measure(control).error < 1e-5
    with mock.patch.object(daam_core, "_fused_attention", told):
        with pytest.raises(UnsupportedModel, match=r"^model: the attention of .* is not the sum of its semantic maps"):
            measure(control)
        with mock.patch.object(daam_core, "_check_backward"):
            assert measure(control).error > 5e-3


class DropsAlways(Attention):
    """Attention dropout that forgets about eval mode: what comes out is not the attention row times the values."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        return self.proj(x.transpose(1, 2).flatten(2))


class AlsoOfKeys(Attention):
    """What it hands on is more than the attention row times the values."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        matrix = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        return self.proj((matrix @ v + matrix @ k).transpose(1, 2).flatten(2))


def test_matrix_that_multiplies_twice_is_refused():
    with pytest.raises(UnsupportedModel, match="^model: attention was seen 2 times in the AlsoOfKeys of"):
        attention_flow(tiny_vit(attn_layer=AlsoOfKeys), random_images(2, 3, 32, 32))


def test_attention_that_is_not_the_sum_of_its_maps_is_refused():
    with pytest.raises(UnsupportedModel, match="is not the sum of its semantic maps"):
        attention_flow(tiny_vit(attn_layer=DropsAlways), random_images(2, 3, 32, 32))


# ----------------------------------------------------------------------------------------------------------------------
# rows="patches": models whose score reads the mean of the patch tokens
# ----------------------------------------------------------------------------------------------------------------------


def plain_all_rows(model, image, target, importance):
    """ReLU(sum_c V[j]_c (A^T w(C))[j]_c) of one image, `(L, h, w)`, with whole attention matrices."""
    model = copy.deepcopy(model)
    x, decomposed = model._pos_embed(model.patch_embed(image[None])), []
    for block in model.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))[0].permute(1, 2, 0, 3)
        A = (q @ k.transpose(1, 2) * attn.scale).softmax(-1)
        v.retain_grad()
        T = A @ v
        T.retain_grad()
        decomposed.append((A, v, T))
        x = x + block.ls1(attn.proj(T.transpose(0, 1).flatten(1)[None]))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    feature = model.forward_head(model.norm(x), pre_logits=True)[0]
    (model.head(feature)[target] if importance is None else feature @ importance).backward()
    w = torch.relu if importance is None else lambda c: c
    maps = [(v * (A.transpose(1, 2) @ w(T.grad))).sum((0, 2)).relu() for A, v, T in decomposed]
    if importance is not None:  # with w = identity it is V * dY/dV
        for (_, v, _), tokens in zip(decomposed, maps):
            torch.testing.assert_close(tokens, (v * v.grad).sum((0, 2)).relu(), rtol=1e-4, atol=1e-6)
    return torch.stack(maps)[:, model.num_prefix_tokens :].unflatten(1, (4, 4)).detach()


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


class Grouped(Attention):
    """Grouped-query attention: all heads share the keys and values of the first."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        else:
            x = (q @ k[:, :1].transpose(2, 3) * self.scale).softmax(-1) @ v[:, :1].expand_as(v)
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rows", ["class", "patches"])
def test_grouped_query_attention(rows):
    model, images = tiny_vit(attn_layer=Grouped), random_images(2, 3, 32, 32)
    fused = attention_flow(model, images, rows=rows)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same_maps(fused.block_maps, attention_flow(model, images, rows=rows).block_maps)


@pytest.mark.parametrize("rows", ["all", None, 1])
def test_refused_rows(rows):
    with pytest.raises(ValueError, match="^rows: expected 'class' or 'patches', got"):
        attention_flow(tiny_vit(), random_images(1, 3, 32, 32), rows=rows)


@pytest.mark.parametrize("family", ["CaiT", "XCiT/16", "PiT", "CrossViT", "MViTv2 with a class token"])
def test_refused_rows_of_a_family(family):
    row = row_of(family)
    with pytest.raises(ValueError, match=r"^rows: 'patches' is not defined for \w+"):
        attention_flow(row.make(), random_images(1, 3, *row.size), rows="patches")


# ----------------------------------------------------------------------------------------------------------------------
# Grids and sizes
# ----------------------------------------------------------------------------------------------------------------------


def test_coarse_grids_are_stretched_and_keep_their_sum():
    site, tokens = daam_core._Site(nn.Identity(), (2, 3), prefix=2), torch.rand(2, 8)
    for size in ((6, 9), (3, 4)):
        grid = daam_core._on_grid(tokens, site, size)
        assert grid.shape == (2, *size)
        torch.testing.assert_close(grid.sum((1, 2)), tokens[:, 2:].sum(1))
        one = tokens * (torch.arange(8) == 5)
        torch.testing.assert_close(daam_core._on_grid(one, site, size).sum((1, 2)), tokens[:, 5])
        assert not daam_core._on_grid(0 * tokens, site, size).any()
    torch.testing.assert_close(daam_core._on_grid(torch.ones(1, 8), site, (6, 9)), torch.full((1, 6, 9), 1 / 9))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", ["class", "patches"])
def test_naflex_patches_find_their_places(rows, norm):
    """A padded batch gives each image what it gets alone."""
    row = next(r for r in (DECOMPOSED if rows == "class" else ALL_ROWS) if r.images)
    batch = naflex_batch(model := row.make())
    together = attention_flow(model, batch, target=[1, 3], rows=rows, norm=norm)
    assert together.block_maps.shape == (2, 3, 4, 5)
    for i, (h, w) in enumerate([(4, 4), (3, 5)]):
        alone = {name: tensor[i : i + 1, : h * w] for name, tensor in batch.items()}
        alone = attention_flow(model, alone, target=[1, 3][i], rows=rows, norm=norm)
        for maps, its_own in ((together.block_maps, alone.block_maps), (together.accumulated, alone.accumulated)):
            expected = torch.zeros(3, 4, 5)
            expected[:, :h, :w] = its_own[0]
            assert_same_maps(maps[i : i + 1], expected[None])


def test_min_max_of_a_part():
    """What is outside of an image neither counts nor gets a value; K maps of an image share the part."""
    maps, inside = (
        torch.tensor([[[0.0, 3.0, 5.0, 9.0]], [[4.0, 4.0, 4.0, 0.0]]]),
        torch.tensor([[[0, 1, 1, 1]], [[1, 1, 1, 0]]]),
    )
    expected = torch.tensor([[[0.0, 0.0, 1 / 3, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(daam_core._min_max(maps, inside.bool()), expected)
    several = torch.stack([maps, 2 * maps + 1], 1)
    torch.testing.assert_close(daam_core._min_max(several, inside.bool()), torch.stack([expected] * 2, 1))


def test_patches_lie_where_their_cells_say():
    cells = torch.tensor([[5, 0, 3], [2, 4, 1]])
    site, tokens = daam_core._Site(nn.Identity(), (2, 3), prefix=1, cells=cells), torch.rand(2, 4)
    grid = daam_core._on_grid(tokens, site, (2, 3)).flatten(1)
    for image in range(2):
        expected = [0.0] * 6
        for cell, value in zip(cells[image].tolist(), tokens[image, 1:].tolist()):
            expected[cell] = value
        assert grid[image].tolist() == expected


def test_batch_of_the_naflex_collator():
    """It says how many patches there are at most, too."""
    model = row_of("NaFlexViT, padded batch").make()
    patches = [{name: x[i] for name, x in naflex_batch(model).items()} for i in range(2)]
    batch, _ = NaFlexCollator(16)([(image, 0) for image in patches])
    assert "seq_len" in batch
    expected = attention_flow(model, naflex_batch(model), target=1)
    assert_same_maps(attention_flow(model, batch, target=1).block_maps, expected.block_maps)
    flow = attention_flow(model, batch, importance=torch.ones(WIDTH))
    torch.testing.assert_close(flow.output, features(model, batch))


def test_naflex_batch_that_lacks_a_part():
    batch = naflex_batch(model := row_of("NaFlexViT, padded batch").make())
    del batch["patch_coord"]
    with pytest.raises(ValueError, match="^images: .* patch_coord is missing or has another shape"):
        attention_flow(model, batch)
    with pytest.raises(ValueError, match="^images: .* patch_valid is missing or has another shape"):
        attention_flow(model, naflex_batch(model) | {"patch_valid": [True] * 16})
    for wrong in (
        {name: tensor[:0] for name, tensor in naflex_batch(model).items()},
        naflex_batch(model) | {"patches": naflex_batch(model)["patches"].byte()},
    ):
        with pytest.raises(ValueError, match=r"^images: expected patches \(B, N, P \* P \* 3\) of normalised"):
            attention_flow(model, wrong)


def test_features_of_naflex_see_the_mask_that_the_scores_see():
    model = row_of("NaFlexViT, padded batch").make()
    batch = naflex_batch(model)
    with torch.no_grad():
        usual = features(model, batch)
        tokens = model.num_prefix_tokens + batch["patches"].shape[1]
        mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
        mask[..., model.num_prefix_tokens + 2 :] = False
        masked = features(model, batch | {"attn_mask": mask})
        torch.testing.assert_close(model.head(masked), model(batch | {"attn_mask": mask}))
    assert not torch.allclose(masked, usual, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
def test_xcit_takes_images_of_every_size(size):
    flow = attention_flow(row_of("XCiT/16").make(), random_images(1, 3, *size))
    assert flow.block_maps.shape == (1, 2, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize(
    "family, size, match",
    [
        ("PiT", (64, 72), "takes 64 x 64 pixels, got 64 x 72"),
        ("TNT", (32, 32), "takes 64 x 64 pixels, got 32 x 32"),
        ("VOLO", (96, 96), "takes 64 x 64 pixels, got 96 x 96"),
        ("CaiT", (40, 32), "takes 32 x 32 pixels, got 40 x 32; resize them$"),
        ("BEiT", (40, 32), "takes 32 x 32 pixels, got 40 x 32; resize them$"),
        ("DeiT", (40, 32), "got 40 x 32; resize them, or build the model with dynamic_img_size=True$"),
        ("MViTv2 with a class token", (96, 96), "takes 64 x 64 pixels, got 96 x 96"),
        ("NaFlexViT", (32, 36), "not a multiple of the model's stride, 8 x 8"),
        ("CrossViT", (224, 224), "takes 240 x 240 pixels, got 224 x 224"),
    ],
)
def test_refused_sizes(family, size, match):
    with pytest.raises(ValueError, match=f"^images: .*{match}"):
        attention_flow(row_of(family).make(), random_images(1, 3, *size))


@pytest.mark.parametrize(
    "name, match",
    [
        ("ViTModel", "takes 32 x 32 pixels, got 36 x 36"),
        ("Dinov2Model", "36 x 36 pixels are not a multiple of the model's stride, 8 x 8"),
    ],
)
def test_refused_sizes_of_transformers(name, match):
    with pytest.raises(ValueError, match=f"^images: .*{match}"):
        attention_flow(from_transformers("", name).make(), random_images(1, 3, 36, 36), importance=torch.ones(WIDTH))


def test_dinov2_of_transformers_takes_other_sizes():
    flow = attention_flow(
        from_transformers("", "Dinov2Model").make(), random_images(1, 3, 48, 32), importance=torch.ones(WIDTH)
    )
    assert flow.block_maps.shape == (1, 3, 6, 4)


@pytest.mark.parametrize("family", ["TNT", "XCiT/16", "CrossViT", "MViTv2 with a class token", "DINOv3", "CaiT"])
def test_refused_channels(family):
    row = row_of(family)
    with pytest.raises(ValueError, match="^images: the model takes 3 channels, got 1"):
        attention_flow(row.make(), random_images(1, 1, *row.size))


def test_models_of_one_channel():
    model = tiny_timm("xcit_nano_12_p16_224", embed_dim=32, depth=1, num_heads=2, num_classes=5, in_chans=1)
    assert attention_flow(model, random_images(1, 1, 64, 64)).block_maps.shape == (1, 2, 4, 4)


def test_branches_that_see_different_parts_of_the_image():
    model = tiny_timm("crossvit_9_240", embed_dim=[32, 64], num_classes=5, crop_scale=True)
    with pytest.raises(UnsupportedModel, match="^model: .*crop_scale=True see different parts of the image"):
        attention_flow(model, random_images(1, 3, 240, 240))


def test_refused_size_of_torchvision():
    with pytest.raises(ValueError, match="^images: the model takes 32 x 32 pixels, got 40 x 40"):
        attention_flow(tiny_torchvision(), random_images(1, 3, 40, 40))


# ----------------------------------------------------------------------------------------------------------------------
# Other libraries, and models of no known family
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    return random_images(2, 3, 32, 32)


def test_torchvision_agrees_with_timm(images):
    """The same weights in both; without gradients, nn.MultiheadAttention has a path that hides its attention."""
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


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
def test_model_of_no_known_family(fused, images):
    """A ViT that is nobody's class, with timm's weights: its run says where the class token attends to the patches."""
    timms = tiny_vit()
    model = Plain(timms, fused)
    flow, expected = attention_flow(model, images), attention_flow(timms, images)
    assert daam_core._library(model) == "" and flow.decomposed == "class token, 3 blocks"
    assert_same_maps(flow.block_maps, expected.block_maps)


class Plain(nn.Module):
    """The forward of a ViT, written down once more, around the layers of one."""

    def __init__(self, vit, fused=True):
        super().__init__()
        self.layers, self.fused = vit, fused

    def attend(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ v

    def tokens(self, x):
        x = self.layers.patch_embed(x)
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed

    def pool(self, x):
        return x[:, 0]

    def forward(self, x):
        x = self.tokens(x)
        for block in self.layers.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.layers.head(self.pool(self.layers.norm(x)))


class PlainMean(Plain):
    def pool(self, x):
        return x[:, 1:].mean(1)


class PlainBoth(Plain):
    def pool(self, x):
        return x[:, 0] + x[:, 1:].mean(1)


class PlainClassLast(Plain):
    def tokens(self, x):
        return super().tokens(x).roll(-1, 1)

    def pool(self, x):
        return x[:, -1]


class PlainRegister(Plain):
    def tokens(self, x):
        x = super().tokens(x)
        return torch.cat([x, x[:, :1]], 1)


class PlainWithoutConvolution(Plain):
    def tokens(self, x):
        conv = self.layers.patch_embed.proj
        x = F.unfold(x, 8, stride=8).transpose(1, 2) @ conv.weight.flatten(1).T + conv.bias
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed


class PlainLastUnread(Plain):
    """Computes an attention more, to no effect."""

    def pool(self, x):
        q = x.unsqueeze(1)
        self.attend(q, q, q)
        return x[:, 0]


class PlainColumns(Plain):
    def tokens(self, x):
        x = self.layers.patch_embed.proj(x).transpose(2, 3).flatten(2).transpose(1, 2)
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed


class PlainReversed(Plain):
    def tokens(self, x):
        x = super().tokens(x)
        return torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)


class PlainOtherKeys(Plain):
    """The same output: attention does not mind the order of keys and values."""

    def attend(self, q, k, v):
        return super().attend(q, *(torch.cat([x[:, :, :1], x[:, :, 1:].flip(2)], 2) for x in (k, v)))


class PlainHeadsFirst(Plain):
    """(H, B, N, d) instead of (B, H, N, d), where both are 2."""

    def attend(self, q, k, v):
        return super().attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)


class PlainFlipped(Plain):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(3))


class PlainPartlyEinsum(Plain):
    def attend(self, q, k, v):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls % 3 != 1:
            return super().attend(q, k, v)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1), v)


class PlainChannels(Plain):
    """Attention between channels, as in XCiT."""

    def attend(self, q, k, v):
        return super().attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)).transpose(2, 3)


OTHER = "pass a model of timm, torchvision or transformers itself"


@pytest.mark.parametrize(
    "make, match",
    [
        (PlainMean, "^model: the score of PlainMean reads the patch tokens and not the class token"),
        (PlainBoth, "^model: the score of PlainBoth reads the patch tokens besides the class token"),
        (PlainClassLast, "^model: the tokens of PlainClassLast are not 1 and then the patches, row by row"),
        (PlainRegister, rf"^model: PlainRegister is of no .* expected 1 \+ 4 x 4 tokens .* 18 to 18 tokens.*; {OTHER}"),
        (PlainWithoutConvolution, f"^model: .* expected patches from a convolution.*; {OTHER}"),
        (PlainChannels, "^model: PlainChannels is of no known family.*12 to 12 tokens"),
        (PlainLastUnread, "^model: the score of PlainLastUnread does not depend on every attention that was seen"),
        (PlainColumns, "^model: the tokens of PlainColumns are not 1 and then the patches, row by row"),
        (PlainReversed, "^model: the tokens of PlainReversed are not 1 and then the patches, row by row"),
        (PlainOtherKeys, "^model: the tokens of PlainOtherKeys are not 1 and then the patches, row by row"),
        (PlainHeadsFirst, "^model: the tokens of PlainHeadsFirst are not 1 and then the patches, row by row"),
        (PlainFlipped, "^model: PlainFlipped is of no known family, and may see the images more than once"),
        (PlainPartlyEinsum, "^model: PlainPartlyEinsum is of no known family, and part of its attention is not seen"),
    ],
)
def test_refused_models_of_no_known_family(make, match, images):
    with pytest.raises(UnsupportedModel, match=match):
        attention_flow(make(tiny_vit()), images)


def test_part_of_the_image():
    class Crop(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain(tiny_vit())

        def forward(self, x):
            return self.inner(x[..., :32, :32])

    with pytest.raises(UnsupportedModel, match="^model: the tokens of Crop are not 1 and then the patches, row by row"):
        attention_flow(Crop(), random_images(2, 3, 64, 64))


class Block(nn.Module):
    """Attention as tutorials write it: nn.MultiheadAttention that also returns its weights."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        y, weights = self.attention(y, y, y)
        assert weights.shape == (len(x), 17, 17)
        return x + y


class Tutorial(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token if len(x) == 1 else self.token.expand(len(x), -1, -1)
        return self.head(self.blocks(torch.cat([token, x], 1))[:, 0])


def test_multihead_attention_that_returns_its_weights(images):
    model = build(Tutorial)
    flow = attention_flow(model, images, target=1)
    assert flow.block_maps.shape == (2, 2, 4, 4) and (flow.block_maps > 0).float().mean() > 0.2
    torch.testing.assert_close(flow.output, model(images))
    assert_same_maps(attention_flow(model, images[:1], target=1).block_maps, flow.block_maps[:1])


@pytest.mark.parametrize("family", ["parallel blocks", "CrossViT", "CaiT"])
def test_images_that_require_grad_change_nothing(family):
    row = row_of(family)
    model, images = row.make(), random_images(2, 3, *row.size)
    expected = attention_flow(model, images)
    assert torch.equal(attention_flow(model, images.requires_grad_()).block_maps, expected.block_maps)
    assert images.grad is None


class Augments(VisionTransformer):
    __module__ = "timm.models.mine"  # those of others are not looked at so closely: see Turned

    def forward(self, x):
        return super().forward(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).mean(0)


class Turned(VisionTransformer):
    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)


class Early(VisionTransformer):
    """Leaves after the second block."""

    def forward(self, x):
        x = self._pos_embed(self.patch_embed(x))
        x = self.blocks[1](self.blocks[0](x))
        self.blocks[2](x)
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize(
    "make, match",
    [
        (
            Augments,
            r"^model: Augments attends in 4 images from 17 to 17 tokens.* expected were 2 images, 1 \+ 16 tokens",
        ),
        (Early, "^model: the score of Early does not depend on every attention that was seen"),
        (Turned, f"^model: the tokens of Turned are not 1 and then the patches, row by row; {OTHER}"),
    ],
)
def test_refused_subclasses(make, match, images):
    with pytest.raises(UnsupportedModel, match=match):
        attention_flow(tiny_vit(make), images)


@pytest.mark.parametrize("make", [VisionTransformer, Early])
def test_model_made_in_inference_mode(make, images):
    with torch.inference_mode():
        model = tiny_vit(make)
    with pytest.raises(ValueError, match=r"^model: was made under torch\.inference_mode"):
        attention_flow(model, images)


def test_wrappers_are_seen_through(images):
    model = row_of("DeiT, distilled").make()
    expected = attention_flow(model, images)
    for wrapped in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        assert torch.equal(attention_flow(wrapped, images).block_maps, expected.block_maps)


def test_only_size_that_is_no_multiple_of_the_patch():
    """As vit_so400m_patch14_siglip_384: the convolution leaves the rest out."""
    flow = attention_flow(tiny_vit(img_size=36), random_images(1, 3, 36, 36))
    assert flow.block_maps.shape == (1, 3, 4, 4)


def test_encoder_of_torch_is_seen(images):
    """nn.TransformerEncoder hides its attention twice: behind its own fast path and behind nn.MultiheadAttention."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 24, 8, 8)
            self.token = nn.Parameter(torch.zeros(1, 1, 24))
            layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(24, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])

    model = build(Encoder).requires_grad_(False)
    with torch.no_grad():
        flow = attention_flow(model, images)
    assert flow.block_maps.shape == (2, 3, 4, 4) and (flow.block_maps > 0).float().mean() > 0.2
    torch.testing.assert_close(flow.output, model(images))


FEATURES = {
    "ViTForImageClassification": (lambda m, x: m.vit(x).last_hidden_state[:, 0], 5),
    "BeitForImageClassification": (lambda m, x: m.beit(x).pooler_output, 5),
    "Dinov2ForImageClassification": (
        lambda m, x: torch.cat([(t := m.dinov2(x).last_hidden_state)[:, 0], t[:, 1:].mean(1)], 1), 5,
    ),
    "DeiTForImageClassificationWithTeacher": (lambda m, x: m.deit(x).last_hidden_state[:, :2].mean(1), 5),
    "ViTModel": (lambda m, x: m(x).last_hidden_state[:, 0], 0),
    "BeitModel": (lambda m, x: m(x).pooler_output, 0),
    "DINOv3ViTModel": (lambda m, x: m(x).pooler_output, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_transformers(name, images):
    model = from_transformers("", name).make()
    expected, classes = FEATURES[name]
    with torch.no_grad():
        torch.testing.assert_close(features(model, images), expected(model, images))
    assert num_classes(model) == classes


def test_features_of_torchvision_before_the_last_layer(images):
    model = tiny_torchvision(representation_size=7)
    with torch.no_grad():
        assert features(model, images).shape == (2, 7)
        assert torch.equal(model.heads.head(features(model, images)), model(images))


def test_features_of_another_model_of_torchvision(images):
    """Not its scores, which would make a memory bank that nobody wants."""
    model = torchvision.models.resnet18(num_classes=5).eval()
    with pytest.raises(UnsupportedModel, match="^model: what the head of torchvision's ResNet reads is not known"):
        features(model, images)


def test_all_rows_of_a_model_with_an_attention_pool(images):
    """The blocks, and the pool as the last frame."""
    model = row_of("SigLIP, attention pool").make()
    of_query, of_all = (attention_flow(model, images, rows=rows).block_maps for rows in ("class", "patches"))
    assert of_query.shape == (2, 1, 4, 4) and of_all.shape == (2, 4, 4, 4)
    assert_same_maps(of_all[:, -1:], of_query)


def test_layers_that_transformers_does_not_know(images):
    model = from_transformers("", "ViTForImageClassification").make()
    for layer in model.vit.layers:
        layer.__class__ = type("Mine", (type(layer),), {})
    with pytest.raises(UnsupportedModel, match="^model: ViTForImageClassification has no layers like those"):
        attention_flow(model, images)


class DiffAugment(nn.Identity):
    """Named like timm's differential attention."""


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_own_model_in_every_mode(mode, images):
    model = nn.Sequential(DiffAugment(), Plain(tiny_vit()))
    expected = attention_flow(model, images)
    with mode():
        assert torch.equal(attention_flow(model, images + 0).block_maps, expected.block_maps)


def test_arguments_by_name(images):
    class Named(Plain):
        def tokens(self, x):
            conv = self.layers.patch_embed.proj
            x = F.conv2d(input=x, weight=conv.weight, bias=conv.bias, stride=8).flatten(2).transpose(1, 2)
            return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed

        def attend(self, q, k, v):
            if self.fused:
                return F.scaled_dot_product_attention(query=q, key=k, value=v)
            return torch.matmul(torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1), other=v)

    expected = attention_flow(tiny_vit(), images)
    for fused in (True, False):
        assert_same_maps(attention_flow(Named(tiny_vit(), fused), images).block_maps, expected.block_maps)


def test_features_of_torchvision_and_timm(images):
    model = tiny_torchvision()
    with torch.no_grad():
        assert torch.equal(model.heads(features(model, images)), model(images))
        assert num_classes(model) == 5 and not model.heads._forward_pre_hooks
        timms = tiny_vit()
        assert torch.equal(timms.head(features(timms, images)), timms(images)) and num_classes(timms) == 5
        wrapped = nn.DataParallel(timms)
        assert torch.equal(features(wrapped, images), features(timms, images)) and num_classes(wrapped) == 5
        headless = tiny_vit(num_classes=0)
        assert torch.equal(features(headless, images), headless(images)) and num_classes(headless) == 0
        assert torch.equal(features(Plain(headless), images), Plain(headless)(images))


@pytest.mark.parametrize("base", ["DeiTForImageClassification", "ViTForImageClassification"])
def test_subclasses_of_transformers(base, images):
    import transformers

    model = from_transformers("", base).make()
    expected = attention_flow(model, images)
    model.__class__ = type("Mine", (getattr(transformers, base),), {})
    assert torch.equal(attention_flow(model, images).block_maps, expected.block_maps)
    with pytest.raises(ValueError, match="^images: the model takes 32 x 32 pixels"):
        attention_flow(model, random_images(1, 3, 40, 40))


def test_backbone_of_transformers_has_no_feature(images):
    model = from_transformers("", "Dinov2Backbone").make()
    with pytest.raises(
        UnsupportedModel, match="^model: Dinov2Backbone has neither a classifier nor a last_hidden_state"
    ):
        attention_flow(model, images, importance=torch.ones(WIDTH))


def test_transformers_without_classifier_needs_importance(images):
    model = from_transformers("", "ViTModel").make()
    with pytest.raises(ValueError, match="^importance: the model has no classifier"):
        attention_flow(model, images)


@pytest.mark.parametrize("family", ["ViT", "XCiT/16", "CrossViT", "differential attention"])
def test_nothing_is_left_behind(family):
    row = row_of(family)
    model = row.make().train()
    images = random_images(2, 3, *row.size)

    def state():
        hooks = [(k, list(v)) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and v is not None]
        flags = [(m.training, getattr(m, "fused_attn", None)) for m in model.modules()]
        return hooks, flags, [set(vars(m)) for m in model.modules()], [p.grad for p in model.parameters()]

    before = state()
    attention_flow(model, images)
    assert state() == before
    with pytest.raises(ValueError, match="out of range"):
        attention_flow(model, images, target=10_000)
    assert state() == before


class Subclass(VisionTransformer):
    """Somebody's own class on top of timm's."""


class FrozenStem(VisionTransformer):
    def _pos_embed(self, x):
        with torch.no_grad():
            return super()._pos_embed(x)


@pytest.mark.parametrize("make", [Subclass, FrozenStem])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_subclasses_belong_to_the_family_of_their_base(make, mode, images):
    theirs, model = attention_flow(tiny_vit(), images), tiny_vit(make)
    with mode():
        ours = attention_flow(model, images + 0)
    assert_same_maps(ours.block_maps, theirs.block_maps)
