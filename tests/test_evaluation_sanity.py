"""Sanity checks of the evaluation, and the classes of a bank that they compare."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_decisions import decision_of, explained_of, small_bank
from tiny_models import random_images, tiny_vit

from daam_core import attention_flow, features
from evaluation import sanity
from evaluation.explained import Explained
from evaluation.methods import METHODS


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("bank"))


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


@pytest.mark.parametrize(
    ("depth", "stages"),
    [
        (1, ["block 1"]),
        (4, ["block 4", "block 3", "block 2", "block 1"]),
        (5, ["blocks 5-4", "blocks 3-2", "block 1"]),
        (12, ["blocks 12-10", "blocks 9-7", "blocks 6-4", "blocks 3-1"]),
    ],
)
def test_deep_models_are_randomised_by_groups_of_blocks(depth, stages):
    model = tiny_vit(depth=depth)
    assert sanity.stages(model) == ["head", *stages, "embedding"]
    changed = []
    for _, other in sanity.randomised_models(model):
        pairs = zip(model.blocks, other.blocks)
        changed.append([not torch.equal(a.mlp.fc1.weight, b.mlp.fc1.weight) for a, b in pairs])
    assert changed[0] == [False] * depth and changed[-2] == changed[-1] == [True] * depth
    for stage, blocks in zip(stages, changed[1:]):
        lowest = int(stage.replace("-", " ").split()[-1])
        assert blocks == [b >= lowest for b in range(1, depth + 1)]
    assert sanity.stages(torch.nn.Linear(2, 2)) == []


def test_a_randomised_classifier_is_explained_by_its_own_scores():
    """So that relevance and gae with the log-odds explain the same score."""
    explained = explained_of(tiny_vit(), random_images(1, 3, 32, 32))
    other = tiny_vit(seed=9)
    alone = explained_of(other, random_images(1, 3, 32, 32))
    worse = explained.with_model(other)
    for name in ("daam", "gae-log-odds", "daam-heads-log-odds", "daam-relevance", "attnlrp"):
        torch.testing.assert_close(METHODS[name](worse), METHODS[name](alone))
    assert torch.equal(worse.by_log_odds.grad_outputs, alone.by_log_odds.grad_outputs)
    assert not torch.allclose(worse.by_log_odds.grad_outputs, explained.by_log_odds.grad_outputs)


def test_without_a_classifier_the_trained_model_gives_the_directions(bank):
    """Also for a model that is randomised twice."""
    images = random_images(1, 3, 32, 32)
    decision, other = decision_of(tiny_vit(num_classes=0), bank), tiny_vit(num_classes=0, seed=9)
    explained = Explained(decision, images, decision.shares(images).argmax(1), ["a"])
    for worse in (explained.with_model(other), explained.with_model(tiny_vit(seed=5)).with_model(other)):
        assert torch.equal(worse.grad_outputs, explained.grad_outputs)
        direction = bank.log_odds(features(decision.loaded.model, images).detach(), target=explained.classes)
        for name, variant in (("daam-relevance", "relevance"), ("daam-heads-log-odds", "heads")):
            flow = attention_flow(other, images, importance=direction, variant=variant)
            torch.testing.assert_close(METHODS[name](worse), flow.accumulated[:, -1])


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
