"""The common form in which every library describes a model: `Source`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Source:
    """A model with its weights, and what its library says about its input and its classes."""

    name: str
    model: nn.Module
    num_classes: int
    class_names: list[str] | None
    checkpoint: Path | None
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    """Pillow's name: bilinear, bicubic, ..."""
