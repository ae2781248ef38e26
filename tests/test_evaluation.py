"""The methods and metrics of the evaluation against plain derivations and kept libraries."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from pytorch_grad_cam.metrics.perturbation_confidence import (
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
)
from tiny_banks import rows, write_bank
from tiny_models import build, random_images, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow, features
from evaluation import metrics, sanity
from evaluation.decision import Decision
from evaluation.methods import METHODS, Explained, photo_seed
from memorybank import MemoryBank
from models import LoadedModel


def decision_of(model, bank=None, **options):
    classes = 0 if bank else 5
    return Decision(LoadedModel("tiny", model, None, (32, 32), classes, None, None), bank, **options)


def explained_of(model, images=None, **options):
    images = random_images(2, 3, 32, 32) if images is None else images
    classes = torch.tensor([3, 1])[: len(images)]
    return Explained(decision_of(model), images, classes, ["a", "b"][: len(images)], **options)


class Seen:
    """What a model computes with attention in the open, seen by hooks."""

    def __init__(self, model, images, classes):
        self.matrices, self.values, self.T, self.added, self.tokens = [], [], [], [], []
        handles, keep = [], {}
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
        keep["scores"] = model(images)
        self.score = keep["scores"][range(len(classes)), classes].sum()
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
    return MemoryBank.load(write_bank(tmp_path_factory.mktemp("bank"), rows(60, 24), torch.arange(60) % 4))


def test_without_a_classifier(bank):
    """The score is what attention_flow explains: the feature times the importance of its dimensions."""
    model, images = tiny_vit(num_classes=0), random_images(2, 3, 32, 32)
    decision = decision_of(model, bank)
    vote = bank.classify(features(model, images).detach())
    shares = decision.shares(images)
    torch.testing.assert_close(shares, vote.votes / vote.votes.sum(1, keepdim=True))
    classes = shares.argmax(1)
    explained = Explained(decision, images, classes, ["a", "b"])
    torch.testing.assert_close(explained.seeds, bank.importance(features(model, images).detach()))
    flow = attention_flow(model, images, importance=bank.importance)
    close(METHODS["daam"](explained), flow.accumulated[:, -1])
    close(METHODS["daam-signed"](explained), flow.accumulated[:, -1])  # no ReLU on coefficients: the paper's
    assert not torch.allclose(METHODS["daam-relu"](explained), flow.accumulated[:, -1])
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


def test_hooks_are_removed_after_an_exception():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    for method in ("legrad", "gradcam", "daam-residual"):
        model = tiny_vit()
        explained = explained_of(model)
        assert explained.attention
        model.norm = Broken()
        with pytest.raises(RuntimeError, match="broken"):
            METHODS[method](explained)
        assert not any(m._forward_hooks for m in model.modules()), method


def test_models_that_a_method_does_not_know():
    cait = build(timm.create_model, "cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2,
                 num_classes=5)  # fmt: skip
    with pytest.raises(
        ValueError, match="^methods: the attention of Cait is not scaled_dot_product_attention of all 17"
    ):
        METHODS["rollout"](explained_of(cait))
    for method in ("legrad", "gradcam", "daam-residual", "daam-relu"):
        with pytest.raises(UnsupportedModel, match="^methods: "):
            METHODS[method](explained_of(cait))
    plain = nn.Module()
    with pytest.raises(UnsupportedModel, match="^methods: legrad reads timm's blocks, norm, forward_head, but Module"):
        METHODS["legrad"](replace(explained_of(tiny_vit()), decision=decision_of(plain)))
    distilled = build(timm.create_model, "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2,
                      num_classes=5)  # fmt: skip
    with pytest.raises(UnsupportedModel, match="^methods: the score of VisionTransformerDistilled reads two tokens"):
        METHODS["attention"](explained_of(distilled))
    for explained in (explained_of(distilled), explained_of(cait)):  # those that follow the flow
        for variant in ("signed", "heads"):
            flow = attention_flow(explained.model, explained.images, [3, 1], variant=variant)
            close(METHODS[f"daam-{variant}"](explained), flow.accumulated[:, -1])
        assert (
            sanity.check(explained_of(cait, random_images(1, 3, 32, 32)), ["daam", "centre"])["centre"]["flip"] > 0.99
        )


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", metrics.BASELINES)
def test_removal_curves_one_by_one(kind):
    model = tiny_vit()
    image, maps = random_images(1, 3, 32, 32)[0], torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    curves = metrics.removal_curves(decision_of(model), image, 2, maps, 5, (kind,))
    other = metrics.baseline(image, kind)
    for m, heat in enumerate(maps):
        for s in range(6):
            largest = sorted(range(16), key=lambda n: -heat.flatten()[n])[: round(16 * s / 5)]
            deleted, inserted = image.clone(), other.clone()
            for n in largest:
                cell = np.s_[:, n // 4 * 8 : n // 4 * 8 + 8, n % 4 * 8 : n % 4 * 8 + 8]
                deleted[cell], inserted[cell] = other[cell], image[cell]
            for name, picture in ((f"deletion_{kind}", deleted), (f"insertion_{kind}", inserted)):
                expected = model(picture[None]).softmax(1)[0, 2].item()
                assert curves[name][m, s].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "kind, remove", [("deletion", RemoveMostRelevantFirst), ("insertion", RemoveLeastRelevantFirst)]
)
def test_deletion_and_insertion_against_pytorch_grad_cam(kind, remove):
    """The removals of that library, with the mean colour as its imputer, at every share of patches."""
    model = tiny_vit()
    image, heat = random_images(1, 3, 32, 32), torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    curves = metrics.removal_curves(decision_of(model), image[0], 2, heat, 8, ("mean",))
    pixels = heat.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()

    def mean_colour(picture, keep):
        return torch.where(keep.bool(), picture, picture.mean((1, 2), keepdim=True))

    for s in range(1, 8):
        kept = 100 * (1 - s / 8 if kind == "deletion" else s / 8)
        metric = PerturbationConfidenceMetric(remove(kept, mean_colour))
        targets = [lambda scores: scores.softmax(0)[2]]
        found = metric(image, pixels, targets, model, return_diff=False)[0]
        assert found == pytest.approx(curves[f"{kind}_mean"][0, s].item(), abs=1e-5)


def test_average_drop_and_increase_against_torchcam():
    torchcam = pytest.importorskip("torchcam.metrics", reason="torchcam asks for Python 3.11")
    model, images = tiny_vit(), random_images(6, 3, 32, 32)
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(3))
    maps = (maps - maps.amin((1, 2), keepdim=True)) / (
        maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
    )
    decision = decision_of(model)
    probabilities, classes = decision.shares(images).max(1)
    ours = [
        metrics.masked_photo(decision, image, c.item(), heat[None], p.item())
        for image, heat, p, c in zip(images, maps, probabilities, classes)
    ]

    class Given:
        """An extractor that returns these maps."""

        def __init__(self):
            self.model = model

        def __call__(self, class_idx, scores, **options):
            return [maps]

        def fuse_cams(self, cams):
            return cams[0]

        def _hooks_off(self):
            return torch.no_grad()

    theirs = torchcam.ClassificationMetric(Given(), partial_softmax)
    theirs.update(images)
    summary = theirs.summary()
    assert torch.stack([o["average_drop"] for o in ours]).mean().item() == pytest.approx(summary["avg_drop"], abs=1e-5)
    assert torch.stack([o["increase"] for o in ours]).mean().item() == pytest.approx(summary["conf_increase"])
    assert 0 < summary["avg_drop"] < 1


def partial_softmax(scores):
    return scores.softmax(1)


def test_area():
    assert metrics.area(torch.tensor([1.0, 1.0, 1.0])) == 1
    assert metrics.area(torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])).tolist() == [0.5, 0.5]
    curve = torch.rand(11)
    assert metrics.area(curve).item() == pytest.approx(((curve[1:] + curve[:-1]) / 20).sum().item(), abs=1e-6)


def test_patches_of_equal_values_are_ranked_at_random():
    kept = metrics.kept_patches(torch.zeros(8, 8), 4)
    assert kept.sum(1).tolist() == [64, 48, 32, 16, 0]
    assert not kept[2, 32:].all() and torch.equal(kept, metrics.kept_patches(torch.zeros(8, 8), 4))
    assert not torch.equal(kept, metrics.kept_patches(torch.zeros(8, 8), 4, seed=1))
    for smaller, larger in zip(kept[1:], kept):
        assert (larger | ~smaller).all()  # what is removed stays removed
    half = torch.cat([torch.zeros(4, 8), torch.arange(32.0).view(4, 8) + 1])
    assert metrics.kept_patches(half, 2)[1].tolist() == [True] * 32 + [False] * 32


def test_baselines():
    image = random_images(1, 3, 32, 48)[0]
    mean, blur = (metrics.baseline(image, kind) for kind in metrics.BASELINES)
    assert mean.shape == blur.shape == image.shape
    torch.testing.assert_close(mean[:, 5, 7], image.flatten(1).mean(1))
    x = torch.arange(-12, 13).float()
    kernel = torch.exp(-(x**2) / (2 * 2.0**2))  # a sixteenth of 32 pixels
    kernel = (kernel / kernel.sum()).outer(kernel / kernel.sum())
    padded = F.pad(image[None], [12] * 4, mode="replicate")[0]
    plain = torch.stack([F.conv2d(c[None, None], kernel[None, None])[0, 0] for c in padded])
    torch.testing.assert_close(blur, plain, rtol=0, atol=2e-3)


def test_sparsity():
    one = torch.zeros(4, 4)
    one[1, 2] = 3
    assert metrics.sparsity(one) == pytest.approx(15 / 16) and metrics.sparsity(torch.ones(4, 4)) == pytest.approx(0)
    assert metrics.sparsity(torch.zeros(4, 4)) == 0 and metrics.sparsity(one - 1) == metrics.sparsity(one)
    values = torch.rand(5, 5).double()
    pairs = (values.flatten()[:, None] - values.flatten()).abs().sum() / (2 * 25 * values.sum())
    assert metrics.sparsity(values) == pytest.approx(pairs.item())


def test_localisation():
    region = np.zeros((40, 80), bool)
    region[:20, :40] = True  # the upper left of 4 x 4 patches of 10 x 20 pixels, 2 x 2 of them
    heat = torch.zeros(4, 4)
    heat[:2, :2] = 1
    found = metrics.localisation(heat, region)
    assert found["energy"] == 1 and 0.7 < found["iou"] < 1  # its edge is stretched over the next patch
    assert metrics.localisation(1 - heat, region)["energy"] == 0
    flat = metrics.localisation(torch.zeros(4, 4), region)
    assert flat == {"energy": 0.0, "iou": 0.0}
    heat[3, 3] = 2
    assert metrics.localisation(heat, region)["energy"] == pytest.approx(4 / 6)
    region[:, :10] = True  # half of the patches in the first column
    assert metrics.localisation(torch.eye(4), region)["energy"] == pytest.approx(2 / 4)


# ----------------------------------------------------------------------------------------------------------------------
# Sanity
# ----------------------------------------------------------------------------------------------------------------------


def test_randomised_models():
    model = tiny_vit(reg_tokens=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    names = []
    for stage, other in sanity.randomised_models(model):
        names.append(stage)
        changed = {n.split(".")[0] + (f".{n.split('.')[1]}" if n.startswith("blocks") else "")
                   for n, p in other.state_dict().items() if not torch.equal(p, before[n])}  # fmt: skip
        blocks = {f"blocks.{3 - i}" for i in range(1, min(len(names), 4))}
        rest = {"cls_token", "reg_token", "pos_embed", "patch_embed"} if stage == "embedding" else set()
        assert changed == {"norm", "head"} | blocks | rest
        weight = other.head.weight
        assert weight.std().item() == pytest.approx(before["head.weight"].std().item(), rel=0.3)
    assert names == sanity.stages(model) == ["head", "block 3", "block 2", "block 1", "embedding"]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    again = [m.blocks[0].attn.qkv.weight.sum() for _, m in sanity.randomised_models(model)][-1]
    assert again == other.blocks[0].attn.qkv.weight.sum()


def test_rank_correlation():
    ramp = torch.arange(16.0).view(4, 4)
    assert sanity.rank_correlation(ramp, ramp**3) == pytest.approx(1)
    assert sanity.rank_correlation(ramp, -ramp) == pytest.approx(-1)
    assert sanity.rank_correlation(ramp, torch.ones(4, 4)) == 0


def test_sanity_of_methods():
    explained = explained_of(tiny_vit(), random_images(1, 3, 32, 32))
    found = sanity.check(explained, ["daam", "attention", "centre"])
    assert found["centre"] == {
        "flip": pytest.approx(1),
        "class": pytest.approx(1),
        "randomised": pytest.approx([1] * 5),
    }
    assert found["attention"]["class"] == pytest.approx(1) and abs(found["daam"]["class"]) < 0.999
    assert found["attention"]["randomised"][0] == pytest.approx(1)  # the head is not in its maps
    assert found["attention"]["randomised"][-1] < 0.9 and len(found["daam"]["randomised"]) == 5
    model, images, top = explained.model, explained.images, explained.decision.shares(explained.images)
    second = next(k for k in top[0].argsort(descending=True).tolist() if k != 3)
    maps = [
        attention_flow(model, x, t).accumulated[0, -1] for x, t in ((images, 3), (images, second), (images.flip(3), 3))
    ]
    assert found["daam"]["class"] == pytest.approx(sanity.rank_correlation(maps[0], maps[1]), abs=1e-3)
    assert found["daam"]["flip"] == pytest.approx(sanity.rank_correlation(maps[0], maps[2].flip(1)), abs=1e-3)


def test_second_class_of_a_bank(bank):
    """By the votes of more neighbours than those that voted on the first."""
    decision = decision_of(tiny_vit(num_classes=0), bank, k=1, target_k=60)
    images = random_images(3, 3, 32, 32)
    first, second = decision.shares(images).argmax(1), None
    second = decision.second(images, first)
    votes = bank.classify(features(decision.loaded.model, images).detach(), 60).votes
    for row, k, other in zip(votes, first.tolist(), second.tolist()):
        assert other == max((c for c in range(4) if c != k), key=lambda c: row[c])


def test_sanity_without_a_classifier(bank):
    """The mirrored photo has an importance of its own; where it has no neighbour of the class there is no map of it."""
    model, images = tiny_vit(num_classes=0), random_images(1, 3, 32, 32)
    classes = decision_of(model, bank, k=60).shares(images).argmax(1)
    ours, mirrored = (attention_flow(model, x, importance=bank.importance_of(f, bank.classify(f, 60), classes))
                      for x in (images, images.flip(3)) for f in [features(model, x).detach()])  # fmt: skip
    expected = sanity.rank_correlation(ours.accumulated[0, -1], mirrored.accumulated[0, -1].flip(1))
    wide = Explained(decision_of(model, bank, k=60), images, classes, ["a"])
    assert sanity.check(wide, ["daam"])["daam"]["flip"] == pytest.approx(expected, abs=1e-3)
    both = torch.cat([features(model, x).detach() for x in (images, images.flip(3))])
    two = replace(bank, features=F.normalize(both), labels=torch.tensor([1, 0]))  # each its own nearest neighbour
    lonely = Explained(decision_of(model, two, k=1, target_k=1), images, torch.tensor([1]), ["a"])
    assert sanity.check(lonely, ["daam"])["daam"]["flip"] is None


def test_a_bank_of_fewer_features_than_neighbours_vote(bank):
    model, images = tiny_vit(num_classes=0), random_images(2, 3, 32, 32)
    decision = decision_of(model, bank, k=1000)
    votes = bank.classify(features(model, images).detach(), 60).votes
    torch.testing.assert_close(decision.shares(images), votes / votes.sum(1, keepdim=True))


def test_no_second_class(bank):
    """A bank whose neighbours are all of one class: there is nothing to compare with."""
    one = replace(bank, labels=torch.zeros(60, dtype=torch.long), class_names=["one"])
    images = random_images(1, 3, 32, 32)
    explained = Explained(decision_of(tiny_vit(num_classes=0), one), images, torch.tensor([0]), ["a"])
    assert sanity.check(explained, ["daam"])["daam"]["class"] is None
