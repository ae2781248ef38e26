"""Variants of the relevance flow: each rule and each choice, against a plain derivation."""

import itertools

import pytest
import torch
from plain_relevance import PlainRelevance
from tiny_decisions import decision_of, explained_of, small_bank
from tiny_models import random_images, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow
from daam_vit.rules import RULES as BACKWARD_RULES
from evaluation.ablation import ABLATION, RULES, relevance_of
from evaluation.explained import Explained
from evaluation.methods import EXTRA, GROUPS, METHODS

CASES = {
    "plain-norm": {"norm": False},
    "plain-gelu": {"act": False},
    "plain-av": {"kept_qk": 0.5, "kept_v": 1},
    "plain-qk": {"kept_qk": 0.5, "kept_v": 0.5},
    "plain-attention": {"kept_qk": 1, "kept_v": 1},
    "frozen-attention": {"kept_qk": 0, "kept_v": 1},
    "plain": {"norm": False, "act": False, "kept_qk": 1, "kept_v": 1},
    "logit": {"score": "logit"},
}
"""The options of `PlainRelevance` for every variant that adds the signed R_b of all blocks."""


def test_variants_replace_every_rule():
    """Otherwise the map would follow the rule that was left, without a word."""
    assert RULES["plain"].keys() == BACKWARD_RULES.keys()
    gated = BACKWARD_RULES["gelu"]
    pointwise = {name for name, rule in BACKWARD_RULES.items() if rule is gated} - {"normalize", "square"}
    assert pointwise <= RULES["plain-gelu"].keys() <= BACKWARD_RULES.keys()


@pytest.fixture(scope="module", params=[{}, {"init_values": 0.3, "reg_tokens": 2}], ids=["plain", "registers"])
def case(request):
    model = tiny_vit(**request.param)
    return model, explained_of(model), 1 + request.param.get("reg_tokens", 0)


def on_grid(tokens, prefix):
    return tokens[..., prefix:].unflatten(-1, (4, 4)).detach()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_without_a_rule_or_with_another_score(name, case):
    model, explained, prefix = case
    R = on_grid(PlainRelevance(model, explained.images, [3, 1], **CASES[name]).tokens(), prefix)
    close(METHODS[f"relevance-{name}"](explained), R.sum(1))


def test_every_rule_counts(case):
    """No two variants of the rules are the same by mistake."""
    _, explained, _ = case
    maps = {name: METHODS[f"relevance-{name}"](explained) for name in CASES}
    maps["all rules"] = METHODS["daam-relevance"](explained)
    for (a, first), (b, second) in itertools.combinations(maps.items(), 2):
        assert (first - second).norm() > 0.01 * second.norm(), (a, b)
    assert set(RULES) | {"logit"} == set(CASES)


def test_no_change_is_the_relevance_flow(case):
    _, explained, _ = case
    close(torch.stack(relevance_of(explained.by_log_odds, {}), 1), explained.relevance.block_maps)


def test_signs_and_blocks(case):
    model, explained, prefix = case
    R = on_grid(PlainRelevance(model, explained.images, [3, 1]).tokens(), prefix)
    close(METHODS["relevance-relu"](explained), R.clamp(min=0).sum(1))
    close(METHODS["relevance-positive"](explained), R.sum(1).clamp(min=0))
    close(METHODS["relevance-half"](explained), R[:, 0] + R[:, 1])
    close(METHODS["relevance-last"](explained), R[:, 2])


def test_other_maps_under_the_same_rules(case):
    model, explained, prefix = case
    flow = PlainRelevance(model, explained.images, [3, 1])
    close(METHODS["relevance-values"](explained), on_grid(flow.values(), prefix).sum(1))
    close(METHODS["relevance-paper"](explained), on_grid(flow.paper(), prefix).sum(1))
    close(METHODS["relevance-paper-relu"](explained), on_grid(flow.paper(), prefix).clamp(min=0).sum(1))
    plain = PlainRelevance(model, explained.images, [3, 1], **CASES["plain"])
    close(METHODS["relevance-values-plain"](explained), on_grid(plain.values(), prefix).sum(1))


def test_without_a_classifier(tmp_path):
    """The score is that of the relevance flow; for "logit", the paper's importance takes its place."""
    bank, images = small_bank(tmp_path), random_images(2, 3, 32, 32)
    model = tiny_vit(num_classes=0)
    decision = decision_of(model, bank)
    explained = Explained(decision, images, decision.shares(images).argmax(1), ["a", "b"])
    logit = attention_flow(model, images, importance=explained.grad_outputs, variant="relevance")
    close(METHODS["relevance-logit"](explained), logit.accumulated[:, -1])
    close(torch.stack(relevance_of(explained.by_log_odds, {}), 1), explained.relevance.block_maps)
    for method in ABLATION:
        heat = METHODS[method](explained)
        assert heat.shape == (2, 4, 4) and torch.isfinite(heat).all(), method


def test_a_rule_that_the_model_has_no_use_for():
    """Otherwise its row would be that of the relevance flow, without a word."""
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    message = "^methods: VisionTransformer calls no scaled_dot_product_attention; choose methods for any model"
    with pytest.raises(UnsupportedModel, match=message):
        METHODS["relevance-frozen-attention"](explained_of(model))
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.act = nn.Identity()
    with pytest.raises(UnsupportedModel, match="^methods: VisionTransformer calls no celu or elu or gelu or"):
        METHODS["relevance-plain-gelu"](explained_of(model))


def test_a_model_without_a_relevance_flow():
    model = tiny_vit()
    model.blocks[1].mlp.act = nn.Softplus()
    with pytest.raises(UnsupportedModel, match="^methods: 'relevance' has no rule for softplus"):
        METHODS["relevance-plain-gelu"](explained_of(model))


def test_names():
    assert set(ABLATION) < EXTRA and set(GROUPS["ablation"]) == {"daam-relevance", "attnlrp", *ABLATION}
    assert set(ABLATION) < set(METHODS) and all(name.startswith("relevance-") for name in ABLATION)
