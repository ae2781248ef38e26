"""Position embeddings of a checkpoint whose images had another size than the model's."""

from __future__ import annotations

import math
from collections.abc import Iterable

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

Grid = tuple[int, int]


def fit_position_embedding(state: dict[str, Tensor], model: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """Resample `pos_embed` in `state` to the patch grid of a timm model, as timm does.

    Models whose position embedding has another form are left to timm's own conversion.

    Args:
        state: the weights, under the names of the model.
        model: the model.
        sizes: image sizes `(H, W)` that the checkpoint names.

    Raises:
        ValueError: if the embedding fits no known grid.
    """
    old, own, embed = state.get("pos_embed"), getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if old is None or not isinstance(own, Tensor) or not grid or not patch or old.ndim != 3 or own.ndim != 3:
        return
    weight = state.get("patch_embed.proj.weight")
    patch = tuple(weight.shape[-2:]) if weight is not None and weight.ndim == 4 and weight.numel() else tuple(patch)
    # the class token has an entry in DINOv2's own files, but not in timm's model with registers
    prefixes = dict.fromkeys([own.shape[1] - math.prod(grid), 1])
    before, prefix = find_grid(old.shape[1], patch, sizes, tuple(grid), prefixes)
    if before != tuple(grid):
        state["pos_embed"] = resample_abs_pos_embed(old, list(grid), list(before), prefix)
    # newer timm would take the size of its own weights for that of the file, and resample again
    model.pretrained_model_args = {"img_size": embed.img_size}


def find_grid(
    tokens: int, patch: Grid, sizes: list[tuple[int, int]], own: Grid | None, prefixes: Iterable[int]
) -> tuple[Grid, int]:
    """Return the patch grid `(h, w)` of a position embedding, and the number of its entries before the patches.

    The image sizes that the checkpoint names count first, then the grid of the model, then a square.

    Args:
        tokens: number of entries.
        patch: `(height, width)` of a patch in pixels.
        sizes: image sizes `(H, W)` that the checkpoint names.
        own: grid of the model, if it is known.
        prefixes: possible numbers of entries before the patches.

    Raises:
        ValueError: if none fits.
    """
    grids = [(height // patch[0], width // patch[1]) for height, width in sizes] + ([own] if own else [])
    for grid in grids:
        for prefix in prefixes:
            if math.prod(grid) + prefix == tokens:
                return grid, prefix
    for prefix in prefixes:
        if tokens > prefix and (side := math.isqrt(tokens - prefix)) ** 2 == tokens - prefix:
            return (side, side), prefix
    raise ValueError(
        f"the patch grid of its {tokens} position embeddings is not known; name the model that they belong to, or save "
        'them as safetensors with the image size in the metadata: {"model_args": \'{"img_size": [HEIGHT, WIDTH]}\'}'
    )
