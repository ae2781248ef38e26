"""Say where a model is decomposed: its attention layers, step by step, and where their keys lie in the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_vit.inputs import Images


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """A module that computes one attention, in which tokens that reach the score attend to the patches."""

    module: nn.Module
    grid: tuple[int, int]
    """`(h, w)` of the patches among its keys."""
    prefix: int = 1
    """Number of keys before the patches."""
    queries: int | None = 1
    """Number of queries, the first ones, that reach the score; None: all of them (`rows="patches"`)."""
    cells: Tensor | None = None
    """`(B, n)` int64: the cell of the flattened grid in which each patch lies; None: row by row."""

    @property
    def query_slice(self) -> slice:
        """The queries whose rows of A are read: the first `queries`, or only the first if all of them count."""
        return slice(self.queries or 1)

    @property
    def num_keys(self) -> int:
        """Number of keys N: prefix and patches."""
        return self.prefix + (math.prod(self.grid) if self.cells is None else self.cells.shape[1])

    def to_grid(self, keys: Tensor, size: tuple[int, int]) -> Tensor:
        """Arrange a map over the keys, `(B, N)`, on a grid: `(B, h, w)`. A coarser grid is stretched, its sum kept."""
        patches = keys[:, self.prefix :]  # (B, n)
        if self.cells is not None:
            empty = patches.new_zeros(len(patches), math.prod(self.grid))
            return empty.scatter_add(1, self.cells, patches).unflatten(1, size)
        grid = patches.unflatten(1, self.grid)  # (B, h, w)
        return grid if self.grid == size else _stretch(grid.relu(), size) - _stretch(grid.neg().relu(), size)


def _stretch(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Stretch `(B, h, w)`, not negative, and keep the sum."""
    stretched = F.interpolate(grid[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    total = stretched.sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return stretched * (grid.sum((1, 2), keepdim=True) / total)


def blocks_around(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> list[nn.Module | None]:
    """Return for every group of modules the innermost element of a module list that contains or is all of them."""
    by_name = dict(model.named_modules())
    names = {module: name for name, module in by_name.items()}

    def around(group: Sequence[nn.Module]) -> nn.Module | None:
        name = names[group[0]]
        while name:
            parent = name.rpartition(".")[0]
            is_element = isinstance(by_name[parent], (nn.ModuleList, nn.Sequential))
            if is_element and set(group) <= set(by_name[name].modules()):
                return by_name[name]
            name = parent
        return None

    return list(map(around, groups))


@dataclass(frozen=True)
class Plan:
    """The attention layers that are decomposed."""

    steps: list[list[AttentionLayer]]
    """The layers of every step of the flow, usually one per block; the maps of one step are added."""
    decomposed: str
    """The steps in words, see `AttentionFlow.decomposed`."""
    pool: AttentionLayer | None = None
    """The attention pool, in models whose score reads its query instead of the class token."""
    last: AttentionLayer | None = None
    """The last layer, if only its first queries reach the score: the others need not be computed."""
    unverified: AttentionLayer | None = None
    """The first layer of a model whose order of the patches is not known and must be checked."""

    @property
    def layers(self) -> list[AttentionLayer]:
        """All layers, step after step."""
        return [layer for step in self.steps for layer in step]

    @property
    def grid(self) -> tuple[int, int]:
        """The finest patch grid `(h, w)`, on which maps are added."""
        return max((layer.grid for layer in self.layers), key=math.prod)

    def valid_cells(self, images: Images) -> Tensor | None:
        """Return `(B, h, w)` bool, the cells that an image fills, if images of several grids share one; else None."""
        layer = self.steps[0][0]
        if layer.cells is None or not isinstance(images, dict):
            return None
        valid = F.pad(images["patch_valid"].to(layer.cells.device, torch.float32), (layer.prefix, 0))
        return layer.to_grid(valid, layer.grid) > 0
