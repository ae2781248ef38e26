"""Check what a map depends on, by rank correlations of maps, -1..1.

Model randomisation follows Adebayo et al. 2018, "Sanity checks for saliency maps", https://arxiv.org/abs/1810.03292,
Sec. 4: a map should change when the weights are replaced by random ones, block by block from the top down.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.explained import Explained
from evaluation.methods import METHODS

BLOCK_STAGES = 4
"""Stages in which the blocks are randomised, at most; each costs one map of every method."""


def check(explained: Explained, methods: Sequence[str]) -> dict[str, dict]:
    """Correlate the map of one photo with maps that should be like it, or unlike it.

    Args:
        explained: a batch of one photo.
        methods: names.

    Returns:
        For every method the rank correlation of its map with

        - "flip": the map of the mirrored photo, mirrored back; near 1 if the map follows the picture. None if the
          mirrored photo has no neighbour of the class.
        - "class": the map of the most probable other class; low if the map depends on the class. None without such a
          class.
        - "randomised": the maps after every stage of `randomised_models`, a list; near 0 if the map depends on what
          was learned. Empty for models without `blocks`. The class stays, and without a classifier also the importance
          and the gradient of the log-odds; see `Explained.with_model`.
    """
    maps = {name: METHODS[name](explained)[0] for name in methods}
    try:
        flipped = replace(explained, images=explained.images.flip(-1))
    except ValueError:  # the bank has no neighbour of the class
        flipped = None
    second = explained.decision.second(explained.images, explained.classes)
    other = None if second is None else replace(explained, classes=second)
    found = {
        name: {
            "flip": flipped and rank_correlation(maps[name], METHODS[name](flipped)[0].flip(-1)),
            "class": other and rank_correlation(maps[name], METHODS[name](other)[0]),
            "randomised": [],
        }
        for name in methods
    }
    for _, model in randomised_models(explained.model, explained.seed):
        worse = explained.with_model(model)
        for name in methods:
            found[name]["randomised"].append(rank_correlation(maps[name], METHODS[name](worse)[0]))
    return found


def stages(model: nn.Module) -> list[str]:
    """Return the parts of a model in the order in which they are randomised; none for models without timm's `blocks`.

    Returns:
        "head", at most four groups of blocks such as "blocks 12-10" ... "blocks 3-1", "embedding".
    """
    groups = _groups(model)
    names = [f"block {g[0]}" if len(g) == 1 else f"blocks {g[0]}-{g[-1]}" for g in groups]
    return ["head", *names, "embedding"] if groups else []


def _groups(model: nn.Module) -> list[range]:
    """Return the blocks of every stage, numbered from 1, the last block first."""
    blocks = len(getattr(model, "blocks", ()))
    size = math.ceil(blocks / BLOCK_STAGES)
    return [range(b, max(b - size, 0), -1) for b in range(blocks, 0, -max(size, 1))]


def randomised_models(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of a model, stage by stage with more random weights: `(stage, model)`, each time the same copy.

    Norm and head come first, then the blocks from the last to the first, then patch and position embedding. Every
    weight is drawn from a normal distribution with its own mean and deviation, so that only what was learned is lost.
    """
    names = stages(model)
    if not names:
        return
    model = copy.deepcopy(model)
    top = [getattr(model, name) for name in ("norm", "fc_norm", "head") if hasattr(model, name)]
    groups = [[model.blocks[b - 1] for b in group] for group in _groups(model)]
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for stage, modules in zip(names, [top, *groups, [model]]):
        with torch.no_grad():
            for parameter in (p for module in modules for p in module.parameters() if p not in seen):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(parameter.mean() + noise * parameter.std(unbiased=False))
                seen.add(parameter)
        yield stage, model


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two maps `(h, w)`; 0 if one of them is flat."""
    from scipy.stats import spearmanr

    a, b = (m.flatten().cpu().numpy() for m in (first, second))
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)
