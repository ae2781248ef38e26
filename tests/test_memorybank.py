"""Tests of `MemoryBank`: votes, importance and log-odds, exact queries in little memory, refused queries."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_banks import BACKBONE, rows, write_bank

import daam_core
from daam_core import attention_flow
from daam_vit.inputs import MAX_TEMPERATURE, MIN_TEMPERATURE
from memorybank import MemoryBank, search

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    labels = torch.tensor([i * i % 7 % 4 for i in range(90)])
    folder = write_bank(tmp_path_factory.mktemp("bank") / "b", rows(90, 12), labels, class_names=["a", "b", "c", "d"])
    return MemoryBank.load(folder)


# Votes and importance, against plain loops --------------------------------------------------------------------------


def plain_neighbours(bank, feature, k):
    f = [x / math.sqrt(sum(y * y for y in feature)) for x in feature]
    found = []
    for row, (z, label) in enumerate(zip(bank.features.double().tolist(), bank.labels.tolist())):
        found.append((sum(a * b for a, b in zip(f, z)), row, label, [a * b for a, b in zip(f, z)]))
    return sorted(found, reverse=True)[:k]


def plain_votes(bank, feature, k, temperature):
    votes = [0.0] * 4
    for cosine, _, label, _ in plain_neighbours(bank, feature, k):
        votes[label] += math.exp(cosine / temperature)
    return votes


def plain_importance(bank, feature, c, k):
    products = [p for _, _, label, p in plain_neighbours(bank, feature, k) if label == c]
    p = [sum(column) / len(products) for column in zip(*products)]
    if total := abs(sum(p)):
        p = [x / total for x in p]
    return [(x - min(p)) / (max(p) - min(p)) if max(p) > min(p) else 1.0 for x in p]


VOTES = [(20, 0.07), (1, 0.07), (7, 0.5), (90, 1.0)]


@pytest.mark.parametrize(("k", "temperature"), VOTES)
def test_votes_and_importance_are_those_of_the_plain_loop(bank, k, temperature):
    features = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    vote = bank.classify(features, k, temperature)
    importance = bank.importance(features, k, temperature)
    assert vote.votes.shape == (6, 4) and vote.neighbours.shape == vote.similarities.shape == vote.labels.shape == (
        6,
        k,
    )
    for b, feature in enumerate(features.double().tolist()):
        nearest = plain_neighbours(bank, feature, k)
        votes = plain_votes(bank, feature, k, temperature)
        assert vote.neighbours[b].tolist() == [row for _, row, _, _ in nearest]
        assert vote.labels[b].tolist() == [label for _, _, label, _ in nearest]
        np.testing.assert_allclose(vote.similarities[b], [cosine for cosine, *_ in nearest], atol=1e-6)
        np.testing.assert_allclose(vote.votes[b], votes, rtol=1e-5)
        c = votes.index(max(votes))
        assert vote.prediction[b] == c
        np.testing.assert_allclose(importance[b], plain_importance(bank, feature, c, k), atol=1e-5)


@pytest.mark.parametrize(("k", "temperature"), VOTES)
def test_the_method_and_the_bank_agree_with_the_plain_loop(bank, k, temperature):
    """`daam_core.neighbour_importance` is the same as `MemoryBank.importance`, in one function."""
    features = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    importance = daam_core.neighbour_importance(features, bank.features, bank.labels, k, temperature)
    torch.testing.assert_close(importance, bank.importance(features, k, temperature))
    for b, feature in enumerate(features.double().tolist()):
        votes = plain_votes(bank, feature, k, temperature)
        expected = plain_importance(bank, feature, votes.index(max(votes)), k)
        np.testing.assert_allclose(importance[b], expected, atol=1e-5)


def test_the_method_takes_float16_features_and_banks(bank):
    features = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).half()
    importance = daam_core.neighbour_importance(features, bank.features.half(), bank.labels)
    expected = daam_core.neighbour_importance(features.float(), bank.features.half().float(), bank.labels)
    assert torch.equal(importance, expected) and importance.dtype == torch.float32


def test_a_class_named_by_hand(bank):
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([2, 0, 1])
    for target_k, looked_at in ((40, 40), (200, 90), (5, 20)):  # never fewer than those that vote
        importance = bank.importance(features, target=targets, target_k=target_k)
        for b, feature in enumerate(features.double().tolist()):
            expected = plain_importance(bank, feature, int(targets[b]), looked_at)
            np.testing.assert_allclose(importance[b], expected, atol=1e-5)
    one = bank.importance(features, target=2)
    assert torch.equal(one[0], bank.importance(features, target=targets)[0]) and not torch.equal(one[1], importance[1])
    predicted = bank.classify(features).prediction
    assert not torch.equal(bank.importance(features), bank.importance(features, target=(predicted + 1) % 4))


def test_one_feature_is_a_batch_of_one(bank):
    features = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    assert bank.importance(features[0]).shape == (1, 12) and bank.classify(features[0]).votes.shape == (1, 4)
    torch.testing.assert_close(bank.importance(features[0]), bank.importance(features)[:1])
    torch.testing.assert_close(bank.importance(features.half()), bank.importance(features.half().float()))


@pytest.mark.parametrize(
    ("feature", "neighbour", "expected"),
    [
        ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),  # p is constant
        ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),  # p is zero
        ([1.0, 1.0], [1.0, -1.0], [1.0, 0.0]),  # p sums to zero, and is left as it is
        ([1.0, 1.0], [-0.6, -0.8], [1.0, 0.0]),  # a negative sum: divided by its absolute value
    ],
)
def test_degenerate_importance(tmp_path, feature, neighbour, expected):
    z = torch.nn.functional.normalize(torch.tensor([neighbour]), dim=1)
    bank = MemoryBank.load(write_bank(tmp_path, z, torch.tensor([0])))
    assert bank.importance(torch.tensor([feature]), k=1).tolist() == [expected]


def test_the_flow_takes_the_importance_of_the_bank(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **BACKBONE).eval()
    bank = MemoryBank.load(write_bank(tmp_path, rows(50, 48), torch.arange(50) % 3))
    images = torch.randn(2, 3, 32, 32)
    flow = attention_flow(model, images, importance=bank.importance)
    with torch.no_grad():
        features = model(images)
    expected = attention_flow(model, images, importance=bank.importance(features))
    torch.testing.assert_close(flow.accumulated, expected.accumulated)
    assert flow.accumulated.max() > 0


# Log-odds, against autograd in float64 --------------------------------------------------------------------------------


def log_odds_gradient(bank, features, classes, temperature, constant_length=True):
    """dY/df of Y = log sum_in exp(cos / T) - log sum_out exp(cos / T), by autograd."""
    f = features.double().requires_grad_()
    length = f.norm(dim=1, keepdim=True)
    logits = f / (length.detach() if constant_length else length) @ bank.features.double().T / temperature
    inside = bank.labels == torch.as_tensor(classes).expand(len(f)).unsqueeze(1)
    Y = logits.masked_fill(~inside, -torch.inf).logsumexp(1) - logits.masked_fill(inside, -torch.inf).logsumexp(1)
    return torch.autograd.grad(Y.sum(), f)[0].float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 0.07, 1, MAX_TEMPERATURE])
@pytest.mark.parametrize("target", [None, 2, torch.tensor([2, 0, 1, 2, 2, 0], dtype=torch.int32)])
def test_log_odds_are_those_of_autograd(bank, monkeypatch, dtype, temperature, target):
    monkeypatch.setattr(search, "TILE", 32)  # 90 rows: two tiles, and a part of one
    monkeypatch.setattr(search, "SLAB", 8)
    bank = replace(bank, features=bank.features.to(dtype))
    features = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(4))
    found = bank.log_odds(features, 7, temperature, target)
    classes = bank.classify(features, 7, temperature).prediction if target is None else target
    expected = log_odds_gradient(bank, features, classes, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_log_odds_of_the_nearest_class_by_default(bank):
    features = torch.randn(5, 12, generator=torch.Generator().manual_seed(5))
    expected = log_odds_gradient(bank, features, bank.classify(features).prediction, 0.07)
    torch.testing.assert_close(bank.log_odds(features), expected, rtol=1e-4, atol=1e-4)


def test_log_odds_keep_the_part_of_the_gradient_along_the_feature(bank):
    """It is all that a variable length takes away: then the relevance f . dY/df of every feature is zero."""
    features = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(6))
    found, f = bank.log_odds(features, target=1), torch.nn.functional.normalize(features, dim=1)
    whole = log_odds_gradient(bank, features, 1, 0.07, constant_length=False)
    assert (features * whole).sum(1).abs().max() < 1e-5 < (features * found).sum(1).abs().min()
    torch.testing.assert_close(found - (found * f).sum(1, keepdim=True) * f, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_log_odds_of_rows_that_are_as_far_as_they_can_be(tmp_path, dtype):
    """At the lowest temperature the votes lie between exp(-50) and exp(50)."""
    z = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-0.6, -0.8], [-0.6, 0.8]]).to(dtype)
    bank = MemoryBank.load(write_bank(tmp_path, z, torch.tensor([0, 0, 1, 1, 2])))
    for sign in (1, -1):
        f = torch.tensor([[5.0 * sign, 0]])
        for c in range(3):
            found = bank.log_odds(f, target=c, temperature=MIN_TEMPERATURE)
            torch.testing.assert_close(found, log_odds_gradient(bank, f, c, MIN_TEMPERATURE), rtol=1e-4, atol=1e-4)
    huge = bank.log_odds(1e18 * f, target=1, temperature=MAX_TEMPERATURE)
    torch.testing.assert_close(1e18 * huge, bank.log_odds(f, target=1, temperature=MAX_TEMPERATURE) * 5)


def test_log_odds_of_one_feature_and_of_other_types(bank):
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(7))
    expected = bank.log_odds(features, target=torch.tensor([2, 1, 1]))
    for b, c in enumerate((2, 1, 1)):
        torch.testing.assert_close(bank.log_odds(features[b], target=c), expected[b : b + 1])
    torch.testing.assert_close(bank.log_odds(4 * features, target=[2, 1, 1]), expected / 4)  # cos does not change
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = features.to(dtype)
        torch.testing.assert_close(bank.log_odds(other, target=1), bank.log_odds(other.float(), target=1))
    few = replace(bank, features=bank.features[:3], labels=bank.labels[:3])  # too few for k, which a target needs not
    assert few.log_odds(features, target=0).shape == (3, 12)


def test_autocast_changes_no_query(bank):
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(8))
    expected = *bank.nearest(features), bank.log_odds(features), bank.importance(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = *bank.nearest(features), bank.log_odds(features), bank.importance(features)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_relevance_flow_takes_the_log_odds_of_the_bank(tmp_path, dtype):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **BACKBONE).eval().to(dtype)
    bank = MemoryBank.load(write_bank(tmp_path, rows(50, 48), torch.arange(50) % 3))
    images = torch.randn(2, 3, 32, 32)
    flow = attention_flow(model, images, importance=bank.log_odds, variant="relevance")
    gradient, classes = bank.log_odds(flow.output), bank.classify(flow.output).prediction
    expected = attention_flow(model, images, importance=gradient, variant="relevance")
    assert torch.equal(flow.block_maps, expected.block_maps) and flow.block_maps.shape == (2, 2, 2, 2)
    assert flow.block_maps.isfinite().all() and flow.block_maps.min() < 0 < flow.block_maps.max()
    assert flow.score is None and flow.class_share.shape == (2, 2)
    another = bank.log_odds(flow.output, target=(classes + 1) % 3)
    both = attention_flow(model, images, importance=torch.stack([gradient, another], 1), variant="relevance").block_maps
    assert torch.equal(both[:, 0], flow.block_maps) and not torch.equal(both[:, 1], flow.block_maps)


# The query: exact, in little memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 20, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_nearest_is_exact_over_many_tiles(tmp_path, monkeypatch, dtype, k, batch):
    monkeypatch.setattr(search, "TILE", 8)
    monkeypatch.setattr(search, "SLAB", 2)
    monkeypatch.setattr(search, "SPAN", 60)  # spans of 56 and 16 rows: fewer than k
    bank = MemoryBank.load(write_bank(tmp_path, rows(1003, 16).to(dtype), torch.zeros(1003, dtype=torch.long)))
    query = rows(batch, 16, seed=1)
    similarities, neighbours = bank.nearest(query, k)
    expected = (query.double() @ bank.features.double().T).topk(k)
    assert torch.equal(neighbours, expected.indices)
    torch.testing.assert_close(similarities.double(), expected.values, atol=1e-6, rtol=0)


MEMORY = """
import sys, torch
from benchmarks.memory_bank import Watch
from memorybank import MemoryBank

bank = MemoryBank.load(sys.argv[1])
torch.bmm(torch.randn(4, 64, 64), torch.randn(4, 64, 64))  # whatever a first product takes
with Watch() as watch:
    for batch in (1, 64):
        bank.importance(torch.randn(batch, 384))
        bank.log_odds(torch.randn(batch, 384))
print(watch.extra / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
def test_a_query_never_holds_the_bank(tmp_path):
    """The float16 bank has 115 MB; as float32 it would have 230 MB."""
    folder = write_bank(tmp_path, rows(150_000, 384).half(), torch.arange(150_000) % 1000)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, folder], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 80


def broken(bank):
    """The bank, with one value that another process has damaged since it was opened."""
    features = bank.features.clone()
    features[8, 3] = math.nan
    return replace(bank, features=features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.classify(rows(2, 5)), r"features: expected \(B, 12\), the width of the bank, got \(2, 5\)"),
        (lambda b: b.classify(rows(2, 12)[None]), r"features: expected \(B, 12\), .* got \(1, 2, 12\)"),
        (lambda b: b.classify(rows(2, 12) / 0), "features: has NaN or infinite values"),
        (lambda b: b.classify(rows(2, 12), k=91), "k: expected 1 to 90, the number of features in .*, got 91"),
        (lambda b: b.classify(rows(2, 12), k=0), "k: expected at least 1, got 0"),
        (lambda b: b.classify(rows(2, 12), temperature=0), "temperature: expected a number from 0.02 to .*, got 0"),
        (lambda b: b.classify(rows(2, 12)[:0]), r"features: expected \(B, 12\), .* got \(0, 12\)"),
        (lambda b: b.importance(rows(2, 12), target="a"), "target: expected one class index, or 2, one per feature"),
        (lambda b: b.importance(rows(2, 12), target=4), "target: class 4 is out of range; the bank has 4 classes"),
        (lambda b: b.importance(rows(2, 12), target=torch.tensor([0, -1])), "target: class -1 is out of range"),
        (lambda b: b.importance(rows(2, 12), target=torch.zeros(3).long()), "target: .* index, or 2, one per feature"),
        (lambda b: b.importance(rows(2, 12), target=1.5), "target: expected one class index"),
        (lambda b: b.importance(b.features[:1], k=1, target=3, target_k=2),
         "target: none of the 2 nearest neighbours belongs to the class d; they are .*: name one .*, or search more"),
        (lambda b: b.importance(rows(2, 12), target=True), "target: expected one class index, .*, got True"),
        (lambda b: b.importance(rows(2, 12), target=10**30), "target: expected one class index"),
        (lambda b: b.importance(rows(2, 12), target=torch.zeros(2) + 1j), "target: expected one class index"),
        (lambda b: b.classify(rows(2, 12) + 0j), "features: expected a tensor .*, got one that is complex"),
        (lambda b: b.classify(rows(2, 12).to_sparse()), "features: expected a tensor .*, got one that is sparse_coo"),
        (lambda b: b.classify(0 * rows(2, 12)), "features: row 0 has the length 0, so no direction"),
        (lambda b: b.classify(1e-40 * rows(2, 12)), "features: row 0 has the length .*, so no direction"),
        (lambda b: b.classify(1e30 * rows(2, 12)), "features: row 0 has the length inf, so no direction"),
        (lambda b: b.classify(1e300 * rows(2, 12).double()), "features: row 0 has the length inf, so no direction"),
        (lambda b: b.classify(rows(2, 12) > 0), "features: expected floating point values, got torch.bool"),
        (lambda b: b.vote(rows(1, 12), torch.full((1, 12), 90)), "neighbours: expected rows 0 to 89, got 90"),
        (lambda b: b.vote(rows(1, 12), torch.full((1, 12), -1)), "neighbours: expected rows 0 to 89, got -1"),
        (lambda b: b.vote(rows(1, 12), rows(1, 12)), "neighbours: expected integers, got torch.float32"),
        (lambda b: b.vote(rows(1, 12), torch.ones(1, 9).long()), "neighbours: expected a tensor .* with .* k = 12"),
        (lambda b: b.classify(rows(2, 12).to("meta")), "features: expected a tensor .*, got one that is meta"),
        (lambda b: b.classify(rows(2, 12), temperature=math.nan), "temperature: expected .* from 0.02 to .*, got nan"),
        (lambda b: b.class_name(-1), "label: expected 0 to 3, got -1"),
        (lambda b: b.class_name(4), "label: expected 0 to 3, got 4"),
        (lambda b: b.file(-1), "row: expected 0 to 89, got -1"),
        (lambda b: b.file(90), "row: expected 0 to 89, got 90"),
        (lambda b: b.log_odds(rows(2, 5)), r"features: expected \(B, 12\), the width of the bank, got \(2, 5\)"),
        (lambda b: b.log_odds(rows(2, 12) / 0), "features: has NaN or infinite values"),
        (lambda b: b.log_odds(0 * rows(2, 12)), "features: row 0 has the length 0, so no direction"),
        (lambda b: b.log_odds(rows(2, 12), k=91), "k: expected 1 to 90, the number of features in .*, got 91"),
        (lambda b: b.log_odds(rows(2, 12), temperature=0.019), "temperature: expected .* from 0.02 to .*, got 0.019"),
        (lambda b: b.log_odds(rows(2, 12), temperature=2e6), r"temperature: expected .* to 1,000,000, got 2000000"),
        (lambda b: b.log_odds(rows(2, 12), temperature=math.nan, target=1), "temperature: expected .*, got nan"),
        (lambda b: b.log_odds(rows(2, 12), target=4), "target: class 4 is out of range; the bank has 4 classes"),
        (lambda b: b.log_odds(rows(2, 12), target=-1), "target: class -1 is out of range"),
        (lambda b: b.log_odds(rows(2, 12), target=[1, 2, 3]), "target: expected one class index, or 2"),
        (lambda b: b.log_odds(rows(2, 12), target="a"), "target: expected one class index, or 2, one per feature"),
        (lambda b: b.log_odds(rows(2, 12), target=1.0), "target: expected one class index, or 2, one per feature"),
        (lambda b: b.log_odds(rows(2, 12), target=torch.tensor([0, 3])),
         "target: .* has no feature of the class d; name another class"),
        (lambda b: replace(b, labels=0 * b.labels).log_odds(rows(2, 12)),
         "bank: .* has features of the class a only, so that there are no odds; build one of two classes or more"),
        (lambda b: broken(b).nearest(rows(2, 12)), "bank: .* has NaN or infinite values; build it again"),
        (lambda b: broken(b).log_odds(rows(2, 12), target=1), "bank: .* has NaN or infinite values; build it again"),
        (lambda b: b.check_model("other", 13, "x"), "features of width 12, those of other have 13; build one with it"),
    ],
)  # fmt: skip
def test_bad_queries(bank, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(bank)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.nearest([1.0] * 12), "features: expected a tensor .B, D., got list"),
        (lambda b: b.nearest(np.ones(12)), "features: expected a tensor .B, D., got ndarray"),
        (lambda b: b.nearest(rows(1, 12), 2.0), "k: expected an integer, got 2.0"),
        (lambda b: b.file("0"), "row: expected an integer, got '0'"),
        (lambda b: b.class_name(1.5), "label: expected an integer, got 1.5"),
        (lambda b: b.importance(rows(1, 12), 3, target=1, target_k="9"), "target_k: expected an integer, got '9'"),
        (lambda b: b.vote(None, rows(1, 12)), "similarities: expected a tensor .*, got NoneType"),
        (lambda b: b.importance_of(rows(1, 12), None, 1), "vote: expected a Vote, got NoneType"),
        (lambda b: MemoryBank.load(None), "bank: expected a folder, got NoneType"),
        (lambda b: b.nearest(rows(1, 12), True), "k: expected an integer, got True"),
        (lambda b: b.nearest(rows(1, 12), "3"), "k: expected an integer, got '3'"),
        (lambda b: b.classify(rows(1, 12), temperature="0.07"), "temperature: expected a number, got str"),
        (lambda b: b.log_odds([1.0] * 12), "features: expected a tensor .B, D., got list"),
        (lambda b: b.log_odds(rows(1, 12), 2.0), "k: expected an integer, got 2.0"),
        (lambda b: b.log_odds(rows(1, 12), temperature="0.07", target=1), "temperature: expected a number, got str"),
    ],
)
def test_queries_of_wrong_types(bank, call, message):
    with pytest.raises(TypeError, match=message):
        call(bank)
