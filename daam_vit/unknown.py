"""Decompose a model of no known family: its run shows the attention and the patch grid, a gradient the patch order."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daam_vit.attention import AttentionMatrix, AttentionRecorder, OnGradient
from daam_vit.checks import OTHER_MODEL, check_patch_order
from daam_vit.families import plan_of_blocks
from daam_vit.inputs import Images, UnsupportedModel
from daam_vit.libraries import scores
from daam_vit.plan import AttentionLayer, Plan

ANYWHERE = AttentionLayer(nn.Identity(), (0, 0))
"""Stands for the layer of a call until the run is over."""


class AnyAttentionRecorder(AttentionRecorder):
    """Records every attention of a run, and the convolutions that make the patches."""

    def __init__(self, on_gradient: OnGradient):
        """Record without a plan."""
        super().__init__([], on_gradient)
        self.layer = ANYWHERE
        self.grid: tuple[int, int] | None = None
        """Size of the last convolution's output before the first attention."""
        self.channels: int | None = None
        """Input channels of the first convolution, those of the images."""
        self.sees_images_again = False
        """Whether a convolution after the first attention has as many input channels as the images."""

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call as the base class does, and note the convolutions."""
        output = super().see(func, args, kwargs)
        if func is F.conv2d and output.ndim == 4:
            channels = (args[0] if args else kwargs["input"]).shape[1]
            if self.calls:
                self.sees_images_again |= channels == self.channels
            else:
                self.grid, self.channels = tuple(output.shape[2:]), self.channels or channels
        return output

    def unused_softmax(self, size: tuple[int, int]) -> bool:
        """Return whether a softmax of this size did not multiply values: an attention that was not seen."""
        return size in self._softmaxes


def plan_of_run(model: nn.Module, images: Images, recorder: AttentionRecorder) -> Plan:
    """Return the plan of a run, and set the layer of every recorded call.

    The grid is that of the last convolution before the first attention; one token more must be the class token.

    Raises:
        UnsupportedModel: if the run shows anything else.
    """
    assert isinstance(recorder, AnyAttentionRecorder)
    name, grid, calls = f"model: {type(model).__name__}", recorder.grid, recorder.calls
    if not calls:
        raise UnsupportedModel(
            f"{name} has no attention that DAAM can see: scaled_dot_product_attention, nn.MultiheadAttention, or "
            f"softmax(Q K^T) @ V with heads as a dimension of their own"
        )
    tokens = 1 + math.prod(grid) if grid else 0
    odd = next((call.shape for call in calls if call.shape != (len(images), tokens, tokens)), None)
    if odd is not None or grid is None:
        expected = f"1 + {grid[0]} x {grid[1]} tokens in {len(images)} images" if grid else "patches from a convolution"
        batch, queries, keys = odd or calls[0].shape
        raise UnsupportedModel(
            f"{name} is of no known family, and its tokens are not one class token and the patches: expected "
            f"{expected}, but an attention goes from {queries} to {keys} tokens in {batch} images; {OTHER_MODEL}"
        )
    if recorder.sees_images_again:
        raise UnsupportedModel(f"{name} is of no known family, and may see the images more than once; {OTHER_MODEL}")
    if recorder.unused_softmax((tokens, tokens)):
        raise UnsupportedModel(f"{name} is of no known family, and part of its attention is not seen; {OTHER_MODEL}")
    for call in calls:
        call.layer = AttentionLayer(model, grid)
    return replace(plan_of_blocks([[call.layer] for call in calls]), unverified=calls[0].layer)


def check_unverified(model: nn.Module, image: Images, first: AttentionLayer) -> None:
    """Check the order of the patches in the first attention against the picture `(1, C, H, W)`.

    Raises:
        UnsupportedModel: if the keys are not the prefix tokens and then the patches, row by row.
    """
    assert isinstance(image, Tensor)
    image = image.clone().requires_grad_()
    probe = _FirstValues()
    with suppress(_FirstValues.Found):
        probe.run(scores, model, image)
    check_patch_order(model, probe.values, image, first.grid, first.prefix)


class _FirstValues(AttentionRecorder):
    """Stops the forward at the first attention and keeps its values `(B, H, N, d)` with their graph."""

    class Found(Exception):
        """Raised when the values are there."""

    values: Tensor

    def __init__(self) -> None:
        super().__init__([], lambda call, A, C: None)
        self.layer = ANYWHERE

    def see(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        with torch.enable_grad():  # even if the model switches gradients off
            return super().see(func, args, kwargs)

    def attend(self, func: Callable, matrix_of: Callable[..., AttentionMatrix], named: dict[str, Any]) -> Tensor:
        self.values = named["value" if "value" in named else "other"]
        raise self.Found
