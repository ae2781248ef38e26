"""Explanation methods against plain derivations and kept libraries."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from plain_relevance import PlainRelevance
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_decisions import decision_of, explained_of, small_bank
from tiny_models import TINY, random_images, tiny_timm, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow, features
from evaluation import sanity
from evaluation.explained import Explained
from evaluation.methods import METHODS, photo_seed


class Seen:
    """What a model computes with attention in the open, seen by hooks."""

    def __init__(self, model, images, classes):
        self.matrices, self.values, self.T, self.added, self.tokens = [], [], [], [], []
        handles = []
        for block in model.blocks:
            block.attn.fused_attn = False

            def qkv(module, args, output, attn=block.attn):
                B, N, _ = output.shape
                self.values.append(output.view(B, N, 3, attn.num_heads, -1)[:, :, 2].transpose(1, 2))

            handles += [
                block.attn.qkv.register_forward_hook(qkv),
                block.attn.attn_drop.register_forward_hook(lambda m, a, out: self.matrices.append(out)),
                block.attn.proj.register_forward_pre_hook(lambda m, args: self.T.append(args[0])),
                block.ls1.register_forward_hook(lambda m, a, out: self.added.append(out)),
                block.register_forward_hook(lambda m, a, out: self.tokens.append(out)),
            ]
        self.scores = model(images)
        self.score = self.scores[range(len(classes)), classes].sum()
        self.model = model
        for handle in handles:
            handle.remove()
        for block in model.blocks:
            block.attn.fused_attn = True

    def gradients(self, tensors, score=None):
        return torch.autograd.grad(self.score if score is None else score, tensors, retain_graph=True)

    def summands(self, b):
        """S_b[j] in the order of channels: (B, N, C)."""
        return (self.matrices[b][:, :, 0, :, None] * self.values[b]).transpose(1, 2).flatten(2).detach()


@pytest.fixture(params=[{}, {"init_values": 0.3, "reg_tokens": 2}], ids=["plain", "registers and LayerScale"])
def case(request):
    model = tiny_vit(**request.param)
    explained = explained_of(model)
    return model, explained, Seen(model, explained.images, [3, 1]), 1 + request.param.get("reg_tokens", 0)


def grid(tokens, prefix):
    return tokens[:, prefix:].reshape(-1, 4, 4)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.detach().double(), rtol=1e-4, atol=1e-6)


def test_ours_and_variants(case):
    model, explained, seen, prefix = case
    flow = attention_flow(model, explained.images, [3, 1])
    close(METHODS["daam"](explained), flow.accumulated[:, -1])
    close(METHODS["daam-relu"](explained), flow.accumulated[:, -1])
    close(METHODS["daam-last"](explained), flow.block_maps[:, -1])
    close(
        METHODS["daam-norm"](explained), attention_flow(model, explained.images, [3, 1], norm=True).accumulated[:, -1]
    )
    signed = heads = net = share = projection = residual = 0
    for b, block in enumerate(model.blocks):
        S, C = seen.summands(b), seen.gradients(seen.T[b])[0][:, :1]
        by_patch = (S * C).sum(2)
        signed = signed + by_patch.clamp(min=0)
        heads = heads + (S * C).unflatten(2, (2, 12)).sum(3).clamp(min=0).sum(2)
        net = net + by_patch
        positive = grid(by_patch.clamp(min=0), prefix)
        weight = by_patch.sum(1).clamp(min=0)
        share = share + (weight / positive.sum((1, 2)))[:, None, None] * positive
        gamma = block.ls1.gamma if hasattr(block.ls1, "gamma") else torch.ones(24)
        R = seen.gradients(seen.added[b])[0][:, :1]
        moved = S @ block.attn.proj.weight.T
        projection = projection + (moved * (R * gamma).clamp(min=0)).sum(2).clamp(min=0)
        residual = residual + (moved * gamma * R.clamp(min=0)).sum(2).clamp(min=0)
    close(METHODS["daam-signed"](explained), grid(signed, prefix))
    close(METHODS["daam-heads"](explained), grid(heads, prefix))
    close(METHODS["daam-net"](explained), grid(net, prefix))
    close(METHODS["daam-share"](explained), share)
    close(METHODS["daam-projection"](explained), grid(projection, prefix))
    close(METHODS["daam-residual"](explained), grid(residual, prefix))


def test_attention_rollout_gae_legrad(case):
    model, explained, seen, prefix = case
    means = [m.mean(1).double() for m in seen.matrices]
    close(METHODS["attention"](explained), grid(means[-1][:, 0], prefix))
    rolled = torch.eye(means[0].shape[-1]).double()
    relevance = rolled.clone()
    legrad = 0
    for b, mean in enumerate(means):
        rolled = (0.5 * mean + 0.5 * torch.eye(len(mean[0]))) @ rolled
        relevance = (
            relevance
            + (seen.matrices[b] * seen.gradients(seen.matrices[b])[0]).clamp(min=0).mean(1).double() @ relevance
        )
        score = model.head(model.norm(seen.tokens[b].mean(1)))[[0, 1], [3, 1]].sum()
        gradient = seen.gradients(seen.matrices[b], score)[0]
        legrad = legrad + gradient.clamp(min=0).mean((1, 2)) / len(means)
    close(METHODS["rollout"](explained), grid(rolled[:, 0], prefix))
    close(METHODS["gae"](explained), grid(relevance[:, 0], prefix))
    close(METHODS["legrad"](explained), grid(legrad, prefix))


def test_methods_for_the_log_odds(case):
    """log p - log(1 - p) of the class takes the place of its score."""
    _, explained, seen, prefix = case
    p = seen.scores.softmax(1)[[0, 1], [3, 1]]
    log_odds = (p.log() - (1 - p).log()).sum()
    gae, heads = torch.eye(seen.matrices[0].shape[-1]), 0
    for b, A in enumerate(seen.matrices):
        gae = gae + (A * seen.gradients(A, log_odds)[0]).clamp(min=0).mean(1) @ gae
        C = seen.gradients(seen.T[b], log_odds)[0][:, :1]
        heads = heads + (seen.summands(b) * C).unflatten(2, (2, 12)).sum(3).clamp(min=0).sum(2)
    close(METHODS["gae-log-odds"](explained), grid(gae[:, 0], prefix))
    close(METHODS["daam-heads-log-odds"](explained), grid(heads, prefix))
    assert not torch.allclose(METHODS["gae-log-odds"](explained), METHODS["gae"](explained), rtol=0.01)


def test_relevance_and_attnlrp(case):
    """Signed: R_1 alone, and the sum over all blocks."""
    model, explained, _, prefix = case
    R = PlainRelevance(model, explained.images, [3, 1]).tokens()[:, :, prefix:].unflatten(2, (4, 4))
    close(METHODS["attnlrp"](explained), R[:, 0])
    close(METHODS["daam-relevance"](explained), R.sum(1))
    assert (R[:, 0] < 0).any() and (R.sum(1) < 0).any()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("method", ["daam-net", "rollout", "gae", "legrad"])
def test_fused_and_open_attention_agree(method, name):
    """Also with a mask: BEiT adds a bias for relative positions."""
    model = tiny_timm(name, **TINY, global_pool="token")
    fused = METHODS[method](explained_of(model))
    for block in model.blocks:
        block.attn.fused_attn = False
    close(fused, METHODS[method](explained_of(model)))


def test_legrad_against_torchcam():
    """torch-cam takes ViTs of torchvision, so the same weights go into one; its map comes stretched to 0..1."""
    methods = pytest.importorskip("torchcam.methods", reason="torchcam asks for Python 3.11")
    model = tiny_vit().eval()
    twin = torchvision.models.VisionTransformer(32, 8, len(model.blocks), 2, 24, 96, num_classes=5).eval()
    parts = {
        "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3", "patch_embed.proj": "conv_proj",
        "norm.": "encoder.ln.", "head.": "heads.head.", "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
    }  # fmt: skip
    weights = model.state_dict()
    for name, its_name in parts.items():
        weights = {key.replace(name, its_name): weight for key, weight in weights.items()}
    twin.load_state_dict(weights)
    explained = explained_of(model)
    torch.testing.assert_close(twin(explained.images), model(explained.images), atol=1e-5, rtol=1e-4)
    with methods.LeGrad(twin, list(twin.encoder.layers)) as extract:
        twin(explained.images)
        theirs = extract(explained.classes.tolist())[0]
    ours = METHODS["legrad"](explained)
    low, high = ours.amin((1, 2), keepdim=True), ours.amax((1, 2), keepdim=True)
    close((ours - low) / (high - low), theirs)


def test_gradcam(case):
    """Against its definition, at the first norm of the last block; the map comes stretched to 0..1."""
    model, explained, _, prefix = case
    kept = []
    with_graph = explained.images.clone().requires_grad_()
    handle = model.blocks[-1].norm1.register_forward_hook(lambda m, a, out: kept.append(out))
    score = model(with_graph)[[0, 1], [3, 1]].sum()
    handle.remove()
    patches, gradient = kept[0][:, prefix:], torch.autograd.grad(score, kept[0])[0][:, prefix:]
    heat = (patches * gradient.mean(1, keepdim=True)).sum(2).clamp(min=0)
    heat = heat - heat.amin(1, keepdim=True)
    close(METHODS["gradcam"](explained), (heat / (1e-7 + heat.amax(1, keepdim=True))).view(-1, 4, 4))


def test_integrated_gradients_patch_by_patch(case):
    """The mean over the pixels of x times the mean gradient on the way from 0 to x, at the nodes of Gauss-Legendre."""
    model, explained, _, _ = case
    nodes, weights = np.polynomial.legendre.leggauss(16)
    total = torch.zeros_like(explained.images)
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        x = (node * explained.images).float().requires_grad_()
        total += float(weight) * torch.autograd.grad(model(x)[[0, 1], [3, 1]].sum(), x)[0]
    expected = (explained.images * total).sum(1).view(2, 4, 8, 4, 8).mean((2, 4))
    close(METHODS["integrated-gradients"](explained), expected)


def test_integrated_gradients_sum_to_the_difference_of_the_scores(case):
    model, explained, _, _ = case
    with torch.no_grad():
        difference = (model(explained.images) - model(0 * explained.images))[[0, 1], [3, 1]]
    total = METHODS["integrated-gradients"](explained).sum((1, 2)) * 64  # the mean of the pixels of a patch, 8 x 8
    torch.testing.assert_close(total, difference, rtol=0.05, atol=0.02)


def test_controls():
    explained = explained_of(tiny_vit())
    noise = METHODS["random"](explained)
    assert torch.equal(noise, METHODS["random"](explained)) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, METHODS["random"](replace(explained, seed=1)))
    assert torch.equal(METHODS["random"](replace(explained, names=["b", "a"])), noise.flip(0))
    assert photo_seed("a", 0) != photo_seed("b", 0) != photo_seed("b", 1)
    centre = METHODS["centre"](explained)[0]
    assert torch.equal(centre, centre.flip(0)) and torch.equal(centre, centre.T) and (centre >= 0).all()
    assert centre[1, 1] > centre[0, 1] > centre[0, 0]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("bank"))


def test_without_a_classifier(bank):
    """The score is what attention_flow explains: the feature times the importance of its dimensions."""
    model, images = tiny_vit(num_classes=0), random_images(2, 3, 32, 32)
    decision = decision_of(model, bank)
    vote = bank.classify(features(model, images).detach())
    shares = decision.shares(images)
    torch.testing.assert_close(shares, vote.votes / vote.votes.sum(1, keepdim=True))
    classes = shares.argmax(1)
    explained = Explained(decision, images, classes, ["a", "b"])
    torch.testing.assert_close(explained.grad_outputs, bank.importance(features(model, images).detach()))
    flow = attention_flow(model, images, importance=bank.importance)
    close(METHODS["daam"](explained), flow.accumulated[:, -1])
    close(METHODS["daam-signed"](explained), flow.accumulated[:, -1])  # no ReLU on coefficients: the paper's
    assert not torch.allclose(METHODS["daam-relu"](explained), flow.accumulated[:, -1])
    relevance = attention_flow(model, images, importance=bank.log_odds, variant="relevance")
    close(METHODS["daam-relevance"](explained), relevance.accumulated[:, -1])
    close(METHODS["attnlrp"](explained), relevance.block_maps[:, 0])
    heads = attention_flow(model, images, importance=bank.log_odds, variant="heads")
    close(METHODS["daam-heads-log-odds"](explained), heads.accumulated[:, -1])
    for name, method in METHODS.items():
        heat = method(explained)
        assert heat.shape == (2, 4, 4) and torch.isfinite(heat).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_model_is_given_back(method):
    model = tiny_vit()
    model.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    explained = explained_of(model)
    images = explained.images.clone()
    METHODS[method](explained)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(images, explained.images) and not explained.images.requires_grad


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


@pytest.mark.parametrize("method", ["legrad", "gradcam", "daam-residual"])
def test_hooks_are_removed_after_an_exception(method):
    model = tiny_vit()
    explained = explained_of(model)
    assert explained.attention
    model.norm = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        METHODS[method](explained)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def tiny_cait():
    return tiny_timm("cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=5)


def tiny_convit():
    return tiny_timm(
        "convit_tiny", img_size=32, patch_size=8, depth=3, local_up_to_layer=1, embed_dim=16, num_heads=4, num_classes=5
    )


def tiny_distilled():
    return tiny_timm("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)


def tiny_parallel():
    return tiny_vit(block_fn=ParallelScalingBlock)


NOT_ALL_TOKENS = "the attention of {} is not between all 17 tokens, once per block; choose methods for any model"


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (tiny_cait, "rollout", NOT_ALL_TOKENS.format("Cait")),
        (tiny_cait, "daam-relu", NOT_ALL_TOKENS.format("Cait")),
        (tiny_cait, "gradcam", NOT_ALL_TOKENS.format("Cait")),
        (tiny_cait, "legrad", NOT_ALL_TOKENS.format("Cait")),
        (tiny_cait, "daam-residual", NOT_ALL_TOKENS.format("Cait")),
        (tiny_convit, "rollout", NOT_ALL_TOKENS.format("ConVit")),
        (tiny_distilled, "attention", "the score of VisionTransformerDistilled reads two tokens"),
        (tiny_parallel, "gradcam", "a ParallelScalingBlock has no norm1; choose methods for any model"),
    ],
)
def test_models_that_a_method_cannot_follow(make, method, message):
    with pytest.raises(UnsupportedModel, match=f"^methods: {message}"):
        METHODS[method](explained_of(make()))


@pytest.mark.parametrize("method", ["daam-relevance", "attnlrp"])
def test_a_model_without_a_rule(method):
    """The way out is that of the evaluation, not of `attention_flow`."""
    model = tiny_vit()
    model.blocks[1].mlp.act = Inverse()
    with pytest.raises(UnsupportedModel, match=r"^methods: .* no rule for reciprocal.*; choose methods for any model:"):
        METHODS[method](explained_of(model))


class Inverse(nn.Module):
    def forward(self, x):
        return (x + 10).reciprocal()


def test_a_model_without_what_a_method_reads():
    explained = replace(explained_of(tiny_vit()), decision=decision_of(nn.Module()))
    with pytest.raises(UnsupportedModel, match="^methods: legrad reads timm's blocks, norm, forward_head, but Module"):
        METHODS["legrad"](explained)


@pytest.mark.parametrize("make", [tiny_cait, tiny_distilled])
def test_methods_for_any_model(make):
    """Variants of `attention_flow` and controls need no attention between all tokens."""
    explained = explained_of(make())
    for variant in ("signed", "heads"):
        flow = attention_flow(explained.model, explained.images, [3, 1], variant=variant)
        close(METHODS[f"daam-{variant}"](explained), flow.accumulated[:, -1])
    one = explained_of(explained.model, random_images(1, 3, 32, 32))
    assert sanity.check(one, ["daam", "centre"])["centre"]["flip"] > 0.99
