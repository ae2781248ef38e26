"""What the equations refuse as functions of tensors, in one line that names the argument first."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import random_images, tiny_vit

from daam_core import (
    accumulate,
    attention_flow,
    block_map,
    dimension_importance,
    neighbour_importance,
    neighbour_votes,
    score_gradient,
)

A, V, C = torch.rand(2, 3, 1, 10), torch.rand(2, 3, 10, 4), torch.rand(2, 3, 1, 4)
MAPS, VALID = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
FEATURES, BANK, LABELS = torch.ones(2, 8), torch.eye(8).repeat(3, 1), torch.arange(24) % 4
COSINES, VOTED = torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.int64)
NOT_FINITE = torch.full_like(FEATURES, torch.nan)


def equation(function, match, *args, error=ValueError, **options):
    """Make a row of the table: a call of one of the equations, and its message."""
    return pytest.param(partial(function, *args, **options), error, match, id=f"{function.__name__} {match}")


of_block = partial(equation, block_map)
of_accumulate = partial(equation, accumulate)
of_votes = partial(equation, neighbour_votes)
of_scores = partial(equation, score_gradient)
of_dimensions = partial(equation, dimension_importance)


def of_bank(match, error=ValueError, **options):
    given = {"features": FEATURES, "bank": BANK, "labels": LABELS, "k": 5} | options
    return equation(neighbour_importance, match, error=error, **given)


EQUATIONS = [
    of_block(r"a: expected a tensor \(B, H, Q, N\), got list$", [1.0], V, C, error=TypeError),
    of_block(r"a: expected a tensor \(B, H, Q, N\), not empty, got \(3, 1, 10\)$", A[0], V[0], C[0]),
    of_block(r"V: .* with B = 2, H = 3, N = 10, not empty, got \(2, 3, 9, 4\)$", A, V[:, :, 1:], C),
    of_block(r"C: .* with B = 2, H = 3, Q = 1, d = 4, not empty, got \(2, 3, 1, 3\)$", A, V, C[..., 1:]),
    of_block("V: .* got one that is sparse_coo", A, V.to_sparse(), C),
    of_block("heads: expected True or False, got 'no'$", A, V, C, heads="no"),
    of_block("w: expected a function of a tensor, such as torch.relu, got NoneType$", A, V, C, None, error=TypeError),
    of_block("a: expected one floating point type for a, V and C, got .* torch.float16 and ", A, V.half(), C),
    of_block("a: expected one floating point type for a, V and C, got torch.int64, ", A.long(), V, C),
    of_accumulate("block_maps: has NaN or infinite values; look for an overflow$", MAPS / 0),
    of_accumulate(r"block_maps: expected a tensor \(..., L, h, w\), got ndarray$", MAPS.numpy(), error=TypeError),
    of_accumulate(r"block_maps: .*, not empty, got \(4, 4\)$", MAPS[0, 0]),
    of_accumulate("norm: expected True or False, got 'yes'$", MAPS, "yes"),
    of_accumulate("valid: .* of torch.float32$", MAPS, True, VALID.float()),
    of_accumulate(r"valid: .* got \(2, 4, 3\) of torch.bool$", MAPS, True, VALID[..., 1:]),
    of_accumulate("valid: ", MAPS[0], True, VALID),
    of_bank(r"features: expected a tensor \(B, D\), got list$", features=[1.0], error=TypeError),
    of_bank("features: has NaN or infinite values; ", features=NOT_FINITE),
    of_bank("features: row 0 has the length 0, so no direction; look for", features=0 * FEATURES),
    of_bank("features: row 0 has the length inf, so no direction; look for", features=1e30 * FEATURES),
    of_bank("features: expected floating point values, got torch.int64$", features=FEATURES.long()),
    of_bank(r"bank: expected a tensor \(M, D\) with D = 7, not empty, got \(24, 8\)$", features=FEATURES[:, 1:]),
    of_bank("bank: expected rows of length 1; normalise them", bank=3 * BANK),
    of_bank("bank: expected rows of length 1", bank=torch.cat([BANK[1:], 0 * BANK[:1]])),
    of_bank("bank: expected floating point, got torch.int64", bank=BANK.long()),
    of_bank(r"labels: expected a tensor \(M,\) with M = 24, not empty, got \(23,\)$", labels=LABELS[1:]),
    of_bank("labels: expected integers, got torch.float32; convert them", labels=LABELS.float()),
    of_bank("labels: expected classes 0 to 999999, got -1$", labels=LABELS - 1),
    of_bank("labels: expected classes 0 to 999999, got 1099511627779$", labels=LABELS + 2**40),
    *(of_bank(f"k: expected 1 to 24, got {k}$", k=k) for k in (0, -1, 25, 2**70)),
    *(of_bank("k: expected an integer, got ", k=k, error=TypeError) for k in (2.5, "5", None, True)),
    *(
        of_bank("temperature: expected a number from 0.02 to ", temperature=t)
        for t in (0, -1, 0.01, float("nan"), float("inf"))
    ),
    of_bank("temperature: expected a number, got str$", temperature="cold", error=TypeError),
    of_scores("score: expected 'logit' or 'log_odds', got 'odds'$", COSINES, VOTED[:, 0], "odds"),
    of_scores(r"scores: expected a tensor \(B, C\), got list$", [1.0], VOTED[:, 0], error=TypeError),
    of_scores(r"scores: expected a tensor \(B, C\), not empty, got \(5,\)$", COSINES[0], VOTED[:, 0]),
    of_scores(r"classes: expected a tensor \(B,\) with B = 2, got int$", COSINES, 1, error=TypeError),
    of_scores(r"classes: .* with B = 2, not empty, got \(1, 5\)$", COSINES, VOTED[:1]),
    of_scores("classes: expected classes 0 to 4, got 7$", COSINES, VOTED[:, 0] + 7),
    of_scores("classes: expected integers, got torch.float32", COSINES, VOTED[:, 0].float()),
    of_votes("labels: expected classes 0 to 2, got 3$", COSINES, VOTED + 3, 3),
    of_votes("labels: .* with B = 2, k = 5", COSINES, VOTED[:1], 3),
    of_votes("num_classes: expected 1 to 1000000, got 0$", COSINES, VOTED, 0),
    of_votes("similarities: expected cosines from -1 to 1; normalise", 12 * COSINES, VOTED, 3),
    of_votes("similarities: has NaN or infinite values", COSINES / 0, VOTED, 3),
    of_votes("similarities: .* overflows torch.float16; pass", COSINES.half(), VOTED, 3),
    of_dimensions(r"neighbours: .* with D = 8, not empty, got \(0, 8\)$", FEATURES, [BANK[:0], BANK]),
    of_dimensions(r"neighbours: .* with D = 8, not empty, got \(24, 7\)$", FEATURES, [BANK[:, 1:]] * 2),
    of_dimensions(r"neighbours: expected a tensor \(n, D\) for each of 2 features, got 1$", FEATURES, [BANK]),
    of_dimensions("neighbours: .* for each of 2 features, got more$", FEATURES, [BANK] * 3),
    of_dimensions("neighbours: .* for each of 2 features, got 0$", FEATURES, []),
    of_dimensions("neighbours: .* for each feature, got NoneType$", FEATURES, None, error=TypeError),
    of_dimensions("neighbours: .* got str$", FEATURES, "ab", error=TypeError),
    of_dimensions("neighbours: has NaN", FEATURES, [BANK, BANK / 0]),
    of_dimensions("f: has NaN", NOT_FINITE, [BANK] * 2),
]


@pytest.mark.parametrize("call, error, match", EQUATIONS)
def test_equations_refuse(call, error, match):
    with pytest.raises(error, match=f"^{match}") as caught:
        call()
    assert type(caught.value) is error and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_and_targets_of_any_integer(kind):
    labels = LABELS.to(kind)
    expected = neighbour_importance(FEATURES, BANK, LABELS, 5)
    assert torch.equal(neighbour_importance(FEATURES, BANK, labels, np.int64(5), np.float32(0.07)), expected)
    flow = attention_flow(tiny_vit(), random_images(2, 3, 32, 32), torch.tensor([3, 1]).to(kind))
    assert flow.target.tolist() == [3, 1]


def test_an_image_without_cells_that_count_has_a_flow_of_zeros():
    none = torch.stack([VALID[0], ~VALID[0]])
    flow = accumulate(MAPS, True, none)
    assert torch.equal(flow[0], accumulate(MAPS, True)[0]) and torch.equal(flow[1], torch.zeros_like(flow[1]))
