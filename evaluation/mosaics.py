"""Play the grid pointing game: localisation that needs no mask.

    mosaics = choose(photos, classify, 20)  # the photos of every mosaic
    record = play(decision, images, mosaics[0], methods)

A mosaic shows photos of four classes, two by two. The map of each class should lie on its own photo: its score is the
share of its positive values there, 0.25 by chance. Böhle, Fritz, Schiele 2021, "Convolutional dynamic alignment
networks for interpretable classifications", https://arxiv.org/abs/2104.00032, plays it with larger grids.

A photo becomes a quarter of an image of the usual size, so that the model and its position embedding stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daam_core import UnsupportedModel
from evaluation.decision import Decision
from evaluation.explained import Explained
from evaluation.methods import METHODS

CONFIDENT = 0.8
"""Least probability, or share of the votes, of the predicted class of a photo that may join a mosaic."""
CELLS = 4


def choose(photos: Iterable[str], classify: Callable[[str], tuple[int, float] | None], count: int) -> list[list[str]]:
    """Choose the photos of every mosaic: confidently classified, of four classes, each in one mosaic only.

    Every photo joins the first mosaic that lacks its class, so the first mosaics of a larger `count`, or of more photos
    in the same order, are the same.

    Args:
        photos: names, in the order of the run; no more are classified than are needed.
        classify: name -> predicted class and its probability; None for a photo that cannot be read.
        count: number of mosaics.

    Returns:
        Four names for every mosaic: top left, top right, bottom left, bottom right. Fewer than `count` mosaics if the
        photos do not suffice.
    """
    mosaics: list[dict[int, str]] = [{} for _ in range(count)]
    remaining = iter(photos)
    while any(len(mosaic) < CELLS for mosaic in mosaics) and (name := next(remaining, None)) is not None:
        found = classify(name)
        if found is not None and found[1] >= CONFIDENT:
            free = (mosaic for mosaic in mosaics if len(mosaic) < CELLS and found[0] not in mosaic)
            next(free, {})[found[0]] = name
    return [list(mosaic.values()) for mosaic in mosaics if len(mosaic) == CELLS]


def assemble(images: Tensor) -> Tensor:
    """Shrink four images to half their side and put them together: `(4, 3, H, W)` -> `(3, H, W)`, both even."""
    height, width = images.shape[2:]
    _check_even(f"images of {height} x {width}", height, width)
    cells = F.interpolate(images, (height // 2, width // 2), mode="bilinear", align_corners=False, antialias=True)
    top, bottom = torch.cat([*cells[:2]], 2), torch.cat([*cells[2:]], 2)
    return torch.cat([top, bottom], 1)


def play(
    decision: Decision, images: Sequence[Tensor], names: list[str], methods: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Score the maps of a mosaic.

    Args:
        decision: see `Decision`.
        images: four photos, each `(1, 3, H, W)`, transformed for the model.
        names: their names.
        methods: names of the methods.
        seed: of random maps.

    Returns:
        The record of the mosaic: the "photos", their "classes" as the model predicts them for the whole photos, and
        the "shares", method -> four values in 0..1, see `share_inside`. They are None for a class that cannot be
        explained, whatever the method, since no neighbour of the mosaic belongs to it.

    Raises:
        UnsupportedModel: if the image or its patch grid cannot be divided into quarters.
        ValueError: if a map is not finite.
    """
    whole = torch.cat([*images])  # (4, 3, H, W)
    mosaic, classes = assemble(whole).unsqueeze(0), decision.shares(whole).argmax(1)  # (1, 3, H, W), (4,)
    shares: dict[str, list[float | None]] = {method: [None] * CELLS for method in methods}
    for cell, name in enumerate(names):
        try:
            explained = Explained(decision, mosaic, classes[cell : cell + 1], [name], seed)
        except ValueError:  # the bank has no neighbour of the class
            continue
        for method in methods:
            shares[method][cell] = round(share_inside(METHODS[method](explained)[0], cell), 6)
    return {"photos": names, "classes": [decision.class_name(c) for c in classes.tolist()], "shares": shares}


def share_inside(heat: Tensor, cell: int) -> float:
    """Return the share of the positive values of a map `(h, w)` in one of its quarters; 0 if none is positive."""
    h, w = heat.shape
    _check_even(f"a patch grid of {h} x {w}", h, w)
    positive = heat.double().clamp(min=0)
    if not torch.isfinite(positive).all():
        raise ValueError("methods: a map of a mosaic is not finite; leave the method out with --methods")
    quarters = positive.view(2, h // 2, 2, w // 2).sum((1, 3)).flatten()  # (4,)
    return (quarters[cell] / positive.sum()).item() if positive.sum() > 0 else 0.0


def _check_even(what: str, height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise UnsupportedModel(f"mosaics: {what} cannot be divided into quarters; pass --mosaics 0")
