"""The relevance flow: its maps are those of a plain derivation, conserve, and leave nothing behind."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from model_state import state_of
from relevance_derivation import plain_relevance
from support_table import ALL_ROWS, DECOMPOSED, relevance_of, row_of
from timm.layers import RmsNorm, SwiGLU
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention
from tiny_models import TINY, random_images, tiny_timm, tiny_vit
from torch import nn

from daam_core import SCORES, VARIANTS, UnsupportedModel, attention_flow, score_gradient
from daam_vit.relevance import Relevance
from daam_vit.rules import Rules

WIDTH, BLOCKS = TINY["embed_dim"], TINY["depth"]
relevance_flow = partial(attention_flow, variant="relevance")


def set_fused(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The derivation
# ----------------------------------------------------------------------------------------------------------------------

DERIVED = {
    "ViT": tiny_vit,
    "LayerScale": partial(tiny_vit, init_values=0.5),
    "registers": partial(tiny_vit, reg_tokens=4),
    "norms": partial(tiny_vit, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True),
    "RMSNorm": partial(tiny_vit, norm_layer=RmsNorm, qk_norm=True),
    "quick-GELU": partial(tiny_vit, act_layer="quick_gelu"),
    "SwiGLU": partial(tiny_vit, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "EVA": partial(tiny_timm, "eva_large_patch14_196", **TINY, global_pool="token"),
    "EVA-02": partial(tiny_timm, "eva02_tiny_patch14_224", **TINY, global_pool="token", swiglu_mlp=True,
                      scale_mlp=True),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
@pytest.mark.parametrize("name", DERIVED)
def test_maps_are_those_of_a_plain_derivation(name, fused):
    model, images = set_fused(DERIVED[name](), fused).double(), random_images(2, 3, 32, 32).double()
    prefix, targets = model.num_prefix_tokens, torch.tensor([3, 1])
    if name == "EVA-02":
        assert isinstance(model, Eva) and isinstance(model.blocks[0].mlp, SwiGLU) and model.rope is not None
    for score in SCORES:
        flow = relevance_flow(model, images, targets, score=score)
        R = torch.stack([plain_relevance(model, image, c, score) for image, c in zip(images, targets)]).float()
        patches = R[..., prefix:].unflatten(2, (4, 4))
        torch.testing.assert_close(flow.block_maps, patches, rtol=1e-4, atol=1e-6 * patches.abs().max().item())
        torch.testing.assert_close(
            flow.accumulated, patches.cumsum(1), rtol=1e-4, atol=1e-5 * patches.abs().max().item()
        )
        torch.testing.assert_close(flow.class_share, R[..., 0].abs() / R.abs().sum(2))
        assert (patches < 0).float().mean() > 0.2 < (patches > 0).float().mean()  # signed


class FrozenAttention(Attention):
    """Attention whose matrix is a constant."""

    def forward(self, x, **_):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        A = (q @ k.transpose(-2, -1) * self.scale).softmax(-1).detach()
        return self.proj((A @ v).transpose(1, 2).flatten(2))


CONSERVING = {
    "GELU": {},
    "RMSNorm": {"norm_layer": RmsNorm},
    "quick-GELU": {"act_layer": "quick_gelu"},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "LayerScale": {"init_values": 0.5},
}


@pytest.mark.parametrize("options", CONSERVING.values(), ids=CONSERVING)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "free"])
def test_relevance_is_conserved_if_the_attention_is_a_constant_and_nothing_has_a_bias(options, frozen, images):
    """All tokens are patches, so their relevance is the score. The softmax has a term that does not conserve."""
    model = tiny_vit(
        class_token=False, global_pool="avg", attn_layer=FrozenAttention if frozen else Attention, **options
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    flow = relevance_flow(model, images, 2, rows="patches", score="logit")
    error = (flow.block_maps.sum((2, 3)) - flow.output[:, 2:3]).abs().max()
    assert (error < 1e-4) if frozen else (error > 1e-3)
    assert flow.class_share is None and flow.output[:, 2].abs().min() > 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def test_a_mirrored_picture_in_a_mirrored_model_has_mirrored_maps(images):
    model = tiny_vit()
    expected = relevance_flow(model, images)
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.flip(3))
        grid = model.pos_embed[:, 1:].unflatten(1, (4, 4))
        model.pos_embed[:, 1:] = grid.flip(2).flatten(1, 2)
    flow = relevance_flow(model, images.flip(3))
    torch.testing.assert_close(flow.block_maps, expected.block_maps.flip(3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.class_share, expected.class_share)


def test_a_batch_is_its_images_and_several_targets_are_separate_calls(images):
    model, targets = tiny_vit(), torch.tensor([[0, 3], [4, 4]])
    flow = relevance_flow(model, images, targets)
    assert flow.block_maps.shape == (2, 2, BLOCKS, 4, 4) and flow.class_share.shape == (2, 2, BLOCKS)
    for i in range(2):
        for k in range(2):
            single = relevance_flow(model, images[i : i + 1], int(targets[i, k]))
            torch.testing.assert_close(flow.block_maps[i, k], single.block_maps[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(flow.class_share[i, k], single.class_share[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["ViT, AugReg", "DINOv2 with registers", "EVA-02", "CaiT", "parallel blocks"])
def test_low_memory_is_bit_equal_and_shortcuts_change_only_rounding(family):
    row = row_of(family)
    model, images = row.make(), row.images()
    flow = relevance_flow(model, images, memory="fast")
    low, plain = relevance_flow(model, images, memory="low"), relevance_flow(model, images, shortcuts=False)
    assert torch.equal(low.block_maps, flow.block_maps) and torch.equal(low.class_share, flow.class_share)
    torch.testing.assert_close(plain.block_maps, flow.block_maps, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_low_precision_is_close_and_its_output_is_that_of_the_model(dtype, images):
    model = tiny_vit(reg_tokens=4)
    expected = relevance_flow(model, images, 2)
    if dtype != "autocast":
        model, images, dtype = model.to(dtype), images.to(dtype), torch.bfloat16
        flow = relevance_flow(model, images, 2, shortcuts=False)
        output = model(images)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            flow = relevance_flow(model, images, 2, shortcuts=False)
            output = model(images)
    assert torch.equal(flow.output, output)
    largest = expected.block_maps.flatten(1).abs().amax(1)[:, None, None, None]
    assert ((flow.block_maps - expected.block_maps).abs() < 0.1 * largest).all()


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


def test_gradient_of_the_log_odds_is_that_of_autograd():
    z, classes = (3 * random_images(4, 6)).requires_grad_(), torch.tensor([[0, 5], [1, 2], [3, 3], [4, 0]])
    for k in range(2):
        p = z.double().softmax(1)[range(4), classes[:, k]]
        (expected,) = torch.autograd.grad((p.log() - (1 - p).log()).sum(), z)
        torch.testing.assert_close(score_gradient(z.detach(), classes, "log_odds")[:, k], expected)
        torch.testing.assert_close(score_gradient(z.detach(), classes[:, k], "log_odds"), expected)
    sure, expected = torch.tensor([[200.0, 0, 1]]), torch.tensor([[1, -0.2689, -0.7311]])  # 1 - p is 0 in float32
    torch.testing.assert_close(score_gradient(sure, torch.tensor([0]), "log_odds"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_odds_are_the_logit_of_a_head_that_computes_them(variant):
    """At given scores, the gradient of the log-odds is a fixed row of weights."""
    model, image = tiny_vit(), random_images(1, 3, 32, 32)
    flow = attention_flow(model, image, 2, variant=variant, score="log_odds")
    assert flow.score == "log_odds"
    single = copy.deepcopy(model)
    single.head = nn.Linear(WIDTH, 1)
    single.num_classes = 1
    with torch.no_grad():
        single.head.weight.copy_(score_gradient(flow.output, torch.tensor([2]), "log_odds") @ model.head.weight)
    for score in SCORES:  # the logit of a single class is its log-odds
        expected = attention_flow(single, image, 0, variant=variant, score=score)
        torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        flow.block_maps, attention_flow(model, image, 2, variant=variant, score="logit").block_maps
    )


def test_the_default_score_is_the_log_odds_for_the_relevance_flow_only(images):
    model = tiny_vit()
    for variant in VARIANTS:
        flow = attention_flow(model, images, variant=variant)
        assert flow.score == ("log_odds" if variant == "relevance" else "logit")
        assert (flow.class_share is None) == (variant != "relevance")
        assert torch.equal(flow.block_maps, attention_flow(model, images, variant=variant, score=flow.score).block_maps)


def test_importance_is_the_gradient_of_a_score(images):
    model = tiny_vit()
    flow = relevance_flow(model, images, 1, score="logit")
    by_importance = relevance_flow(model, images, importance=model.head.weight[1].detach())
    torch.testing.assert_close(by_importance.block_maps, flow.block_maps, rtol=1e-4, atol=1e-5)
    assert by_importance.score is None
    with pytest.raises(ValueError, match="^score: cannot be chosen together with importance"):
        relevance_flow(model, images, importance=torch.ones(WIDTH), score="logit")


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------

REASONS = {
    "VOLO": "no rule for max",
    "CrossViT": "a MultiScaleBlock does not get its tokens as one tensor",
    "CrossViT, dagger": "a MultiScaleBlock does not get its tokens as one tensor",
    "TNT": "a Block does not get its tokens as one tensor",
    "TNT, legacy": "a Block does not get its tokens as one tensor",
    "MViTv2 with a class token": "a MultiScaleBlock does not get its tokens as one tensor",
}


@pytest.mark.parametrize("row", DECOMPOSED + ALL_ROWS, ids=lambda row: row.name)
def test_every_row_of_the_support_table(row):
    """Its output is that of the model, bit for bit, or it is refused with a reason."""
    flow = relevance_of(row)
    if row.family in REASONS:
        assert flow == REASONS[row.family]
        return
    paper = attention_flow(row.make(), row.images(), shortcuts=False, **row.flow)
    assert torch.equal(flow.output, paper.output) and flow.block_maps.shape == paper.block_maps.shape
    assert torch.isfinite(flow.block_maps).all() and (flow.block_maps != 0).float().mean() > 0.5
    reads_class_token = "attention pool" not in flow.decomposed and row.flow.get("rows") != "patches"
    assert (flow.class_share is not None) == reads_class_token
    if reads_class_token:
        assert ((flow.class_share > 0) & (flow.class_share < 1)).all()


OPEN = ["SigLIP, attention pool", "Perception Encoder, attention pool", "CaiT", "EVA-02", "BEiT", "PiT", "qk-norm",
        "gated attention", "rotary, mixed"]  # fmt: skip


@pytest.mark.parametrize("family", OPEN)
def test_fused_and_open_attention_have_the_same_relevance(family):
    """An attention pool multiplies its keys with a constant query: they get all that the softmax passes on."""
    row = row_of(family)
    model, images = row.make().double(), row.images().double()
    expected = relevance_flow(set_fused(model, True), images)
    flow = relevance_flow(set_fused(model, False), images)
    torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-6)


def test_patches_that_no_block_changes_have_the_relevance_of_all_blocks_that_read_them():
    """CaiT: R_1 of the patches is the gradient with respect to them, R_2 that through the second block alone."""
    row = row_of("CaiT")
    model, images = row.make(), row.images()
    flow = relevance_flow(model, images, 1, score="logit")
    rules, seen = Rules(), {}

    def begin(b, module, args):
        if b == 0:
            seen["patches"], seen["cls"] = (x.detach().requires_grad_() for x in args)
            return seen["patches"], seen["cls"]
        seen["alone"] = seen["patches"].detach().requires_grad_()
        return (seen["alone"] if seen["second"] else seen["patches"]), args[1]

    handles = [block.register_forward_pre_hook(partial(begin, b)) for b, block in enumerate(model.blocks_token_only)]
    for b, name in enumerate(["patches", "alone"]):
        seen["second"] = b == 1
        with rules:
            Y = model.requires_grad_(False)(images)[:, 1].sum()
        (gradient,) = torch.autograd.grad(Y, seen[name])
        R = (seen[name] * gradient).sum(2).detach().unflatten(1, (4, 4))
        torch.testing.assert_close(flow.block_maps[:, b], R, rtol=1e-4, atol=1e-6)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("call", ["keyword", "forward"])
def test_tokens_may_be_passed_by_keyword_but_not_to_forward_itself(call, images):
    """Hooks do not see a call of `forward`."""
    model = tiny_vit()
    expected = relevance_flow(model, images)

    def forward_features(x, **_):
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = block(x=x) if call == "keyword" else block.forward(x)
        return model.norm(x)

    model.forward_features = forward_features
    if call == "keyword":
        assert torch.equal(relevance_flow(model, images).block_maps, expected.block_maps)
        return
    with pytest.raises(UnsupportedModel, match="^variant: 'relevance' needs the tokens that enter a block, one for"):
        relevance_flow(model, images)


class Bends(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_function_without_a_rule_is_refused_by_name_and_one_that_the_score_does_not_read_is_not(memory, images):
    model = tiny_vit()
    expected = relevance_flow(model, images, memory=memory)
    model.blocks[1].mlp.act = Bends(lambda x: x.sin())
    with pytest.raises(
        UnsupportedModel, match="^variant: 'relevance' has no rule for sin, which the model calls; use "
    ):
        relevance_flow(model, images, memory=memory)
    model.blocks[1].mlp.act = Bends(lambda x: (x.sin(), nn.functional.gelu(x))[1])
    assert torch.equal(relevance_flow(model, images, memory=memory).block_maps, expected.block_maps)


CUT_OFF = {
    "after": lambda block: block.register_forward_hook(lambda module, args, output: output.detach()),
    "inside": lambda block: setattr(block, "forward", lambda x, **_: block.attn(x.detach())),
    "no_grad": lambda block: setattr(block, "forward", torch.no_grad()(block.forward)),
}


@pytest.mark.parametrize("cut", CUT_OFF.values(), ids=CUT_OFF)
def test_tokens_that_are_cut_off_are_refused(cut, images):
    model = tiny_vit()
    cut(model.blocks[0])
    with pytest.raises(
        UnsupportedModel, match=r"^variant: 'relevance' needs .* is cut off at a Block; is there a detach\(\) or torch"
    ):
        relevance_flow(model, images)


def test_tokens_may_depend_on_a_tensor_that_requires_a_gradient(images):
    model = tiny_vit()
    expected = relevance_flow(model, images)
    positions = model.pos_embed.detach().clone().requires_grad_()
    del model.pos_embed
    model.pos_embed = positions  # no parameter
    assert torch.equal(relevance_flow(model, images).block_maps, expected.block_maps)
    assert positions.grad is None


def test_a_class_token_and_a_single_patch_that_are_two_arguments_are_refused():
    """Nothing tells the two apart."""
    model = tiny_timm("cait_xxs24_224", **{**TINY, "img_size": 8})
    with pytest.raises(UnsupportedModel, match="^variant: 'relevance' needs .* does not get them as one tensor"):
        relevance_flow(model, random_images(2, 3, 8, 8))


# ----------------------------------------------------------------------------------------------------------------------
# What it leaves behind
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"memory": "fast"}, {"memory": "low"}, {"shortcuts": False}], ids=str)
def test_everything_is_given_back_even_after_an_exception(way, images):
    model = tiny_vit(proj_drop_rate=0.5).train()
    before = state_of(model)
    relevance_flow(model, images, **way)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="out of range"):
        relevance_flow(model, images, 10_000, **way)
    assert state_of(model) == before

    def interrupt(x):
        raise KeyboardInterrupt

    for function, accident in ((interrupt, KeyboardInterrupt), (torch.sin, UnsupportedModel)):
        act, model.blocks[1].mlp.act = model.blocks[1].mlp.act, Bends(function)
        before = state_of(model)
        with pytest.raises(accident):
            relevance_flow(model, images, **way)
        assert state_of(model) == before
        model.blocks[1].mlp.act = act


def test_two_threads_may_share_a_model(images):
    """One explains by the relevance flow, the other as the paper does, at the same time."""
    model, both = tiny_vit(), threading.Barrier(2)
    expected = {variant: attention_flow(model, images, 1, variant=variant) for variant in ("paper", "relevance")}

    def explain(variant):
        both.wait()
        return [attention_flow(model, images, 1, variant=variant) for _ in range(8)]

    before = state_of(model)
    with ThreadPoolExecutor(2) as pool:
        flows = dict(zip(expected, pool.map(explain, expected)))
    assert state_of(model) == before
    for variant, repeated in flows.items():
        for flow in repeated:
            assert torch.equal(flow.block_maps, expected[variant].block_maps)
            assert torch.equal(flow.output, expected[variant].output)


def test_relevance_that_is_not_finite(monkeypatch):
    begin = Relevance.expect_gradient
    monkeypatch.setattr(Relevance, "expect_gradient", lambda self, scale=1: begin(self, 0))  # divides by it
    with pytest.raises(ValueError, match="^images: the relevance of a token is not finite; look for an overflow"):
        relevance_flow(tiny_vit(), random_images(2, 3, 32, 32))
