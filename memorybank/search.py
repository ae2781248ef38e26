"""Pass over the rows of a memory bank, tile by tile in float32: find the nearest ones, or average all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from memorybank.files import TILE

SLAB = 64
"""Rows of each matrix product in a batched product of `TILE` rows.

The products are small so that they run on all cores; one large product with a single query would run on one."""
SPAN = 1 << 22
"""Similarities that are computed before the best are selected (16 MB)."""


def nearest_rows(rows: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k rows with the largest products with every query, exactly.

    Args:
        rows: `(M, D)` of any floating point type, possibly memory-mapped.
        queries: `(B, D)` float32, on the device of the rows.
        k: 1..M.

    Returns:
        Products `(B, k)`, the largest first, and indices `(B, k)` int64. If a row has NaN, so do the products.
    """
    batch, width = queries.shape
    span = max(TILE, min(SPAN // batch, len(rows) + TILE - 1) // TILE * TILE)
    tile, products = queries.new_empty(TILE // SLAB, SLAB, width), queries.new_empty(span // SLAB, SLAB, batch)
    columns = queries.T.expand(len(tile), width, batch)
    best, index = queries.new_empty(0, batch), queries.new_empty(0, batch, dtype=torch.long)
    for start in range(0, len(rows), span):
        part = rows[start : start + span]
        for i in range(0, len(part), TILE):
            some = part[i : i + TILE]
            tile.view(TILE, width)[: len(some)] = some
            torch.bmm(tile, columns, out=products[i // SLAB : (i + TILE) // SLAB])  # `out` rules out autocast
        top, place = products.view(span, batch)[: len(part)].topk(min(k, len(part)), dim=0)  # NaN is the largest
        best, index = torch.cat([best, top]), torch.cat([index, place + start])
        best, place = best.topk(min(k, len(best)), dim=0)
        index = index.gather(0, place)
    return best.T, index.T


def mean_rows(rows: Tensor, labels: Tensor, queries: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Average the rows of a class and those of all others, weighted by exp(row . query / temperature).

    Cosines over a temperature of at least `MIN_TEMPERATURE` are within -50..50, and so their exponentials, and sums of
    them, are within the range of float32.

    Args:
        rows: `(M, D)` of any floating point type, of length 1, possibly memory-mapped.
        labels: `(M,)`.
        queries: `(B, D)` float32, of length 1, on the device of the rows.
        classes: `(B,)`, a class for each query.
        temperature: at least `MIN_TEMPERATURE`.

    Returns:
        `(2, B, D)` float32: the mean inside of the class, and outside. One that has no rows is NaN.
    """
    tile, scaled = queries.new_empty(TILE, queries.shape[1]), queries / temperature
    total, weighted = queries.new_zeros(2, len(queries), 1), queries.new_zeros(2, *queries.shape)
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(rows), TILE):
            part = rows[start : start + TILE]
            z = tile[: len(part)].copy_(part)  # (n, D)
            inside = labels[start : start + TILE] == classes.unsqueeze(1)  # (B, n)
            w = (scaled @ z.T).exp_()  # (B, n)
            w = torch.stack([w * inside, w * ~inside])  # (2, B, n)
            total += w.sum(2, keepdim=True)
            weighted += w @ z
    return weighted / total
