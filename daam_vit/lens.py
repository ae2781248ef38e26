"""Read what the class token says after every block: the logit lens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from daam_vit.checks import tolerance
from daam_vit.families import NO_LENS, cait, family_of, plan_of, tnt, volo
from daam_vit.inputs import Images, UnsupportedModel, check_choice, check_finite, check_shapes
from daam_vit.libraries import (
    check_output,
    first_image,
    num_classes,
    pre_logits,
    reference_parameter,
    scores,
    to_model,
    unwrap,
)
from daam_vit.plan import AttentionLayer
from daam_vit.state import Hook, eval_mode, hooks


def logit_lens(
    model: nn.Module,
    images: Images,
    rows: str = "class",
    head: bool = True,
    output: Tensor | None = None,
) -> Tensor:
    """Read the output of every block as if that block were the last one.

    The output of every block goes through the model's own last norm and head: the logit lens (nostalgebraist 2020,
    "interpreting GPT: the logit lens"; for Vision Transformers Vilas et al., NeurIPS 2023, "Analyzing Vision
    Transformers for Image Classification in Class Embedding Space", https://arxiv.org/abs/2310.18969). It is a reading:
    only the last block was trained to be read this way, and evidence for a class may be there before it can be read.

    The model runs once; its last block returns the outputs of all blocks as a batch of L * B images. The last reading
    is compared with the model's output.

    Args:
        model: as for `attention_flow`, of a known family; it is restored afterwards.
        images: as for `attention_flow`.
        rows: "class" reads only the class token (and other tokens before the patches); "patches" reads all tokens, for
            models whose head reads the mean of the patches.
        head: False stops before the head.
        output: the scores, or the features, of these images if they are known (`AttentionFlow.output`); otherwise the
            model runs once more, for the first image.

    Returns:
        Scores `(B, L, num_classes)`, or without the head features `(B, L, D)` as `features` returns them; in the
        model's dtype, without a graph.

    Raises:
        UnsupportedModel: a `ValueError`, if there is no such reading: the model is of no known family, its blocks
            differ in width, run in branches (PiT, MViTv2, CrossViT) or more than once, it has an attention pool, it
            takes a padded batch with `rows="patches"`, or the last reading is not its output.
        ValueError: as `attention_flow`; if `head` is True for a model without a classifier, or `output` has the wrong
            shape.
    """
    model = unwrap(model)
    check_choice("head", head, (True, False))
    if output is not None:
        check_shapes("B C", output=output)
        check_finite("output", output, "look for NaN in the images and the weights")
    name, family, plan = type(model).__name__, family_of(model), plan_of(model, images, rows)
    found = [_block_of(model, step) for step in plan.steps] if plan else []
    blocks = [block for block in found if block is not None]
    reason = (
        "is of no known family" if plan is None
        else "has blocks of several widths or branches" if family in NO_LENS
        else "has an attention pool" if None in found
        else "pools a padded batch by its own mask" if rows == "patches" and isinstance(images, dict)
        else ""
    )  # fmt: skip
    if plan is None or reason:
        raise UnsupportedModel(f"model: {name} {reason}; its blocks cannot be read one by one like its last one")
    if head and num_classes(model) == 0:
        raise ValueError("head: the model has no classifier; pass head=False for its features")
    images, forward = to_model(images, reference_parameter(model)), scores if head else pre_logits
    prefix = None if rows == "patches" or family is volo else plan.steps[0][0].prefix  # VOLO's score adds the patches
    with torch.no_grad(), eval_mode(model):
        readings = _read_blocks(model, blocks, prefix, lambda: forward(model, images))
        output = forward(model, first_image(images)) if output is None else output
    check_output(output)
    last = readings[: len(output), -1]
    if output.shape != last.shape:
        raise ValueError(f"output: expected {tuple(readings[:, -1].shape)}, got {tuple(output.shape)}")
    missed = (last - output.to(last.device)).abs().max().item()
    if not missed <= tolerance(output.dtype) * output.abs().max().item():
        raise UnsupportedModel(
            f"model: {name} combines tokens after its last block, so the logit lens does not apply: the last reading "
            f"misses its output by {missed:.2g}"
        )
    check_output(readings.flatten(0, 1))
    return readings


def _block_of(model: nn.Module, step: Sequence[AttentionLayer]) -> nn.Module | None:
    """Return the outermost element of a module list that contains all layers of a step."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    modules = {layer.module for layer in step}
    return next((block for blocks in lists for block in blocks if modules.issubset(block.modules())), None)


def _read_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], prefix: int | None, forward: Callable[[], Tensor]
) -> Tensor:
    """Run the model once, its norm and head on the first `prefix` tokens (None: all) after every block.

    Returns:
        `(B, L, num_classes)`, or `(B, L, D)`.
    """
    family = family_of(model)
    place = 1 if family is tnt else 0  # of the tokens, if a block returns a tuple; TNT's begins with its pixels
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        tokens = output if isinstance(output, Tensor) else output[place]
        kept.append(tokens[:, :prefix].clone())

    def return_kept(module: nn.Module, args: tuple, output: Any) -> Any:
        tokens = torch.cat(kept)  # (L * B, prefix, C)
        return tokens if isinstance(output, Tensor) else (*output[:place], tokens, *output[place + 1 :])

    pairs: list[Hook] = [(block.register_forward_hook, keep) for block in blocks]
    if family is cait:  # the patches join again between its last block and its norm
        norm: Any = model.norm
        pairs.append((norm.register_forward_pre_hook, lambda module, args: torch.cat(kept)))
    else:
        pairs.append((blocks[-1].register_forward_hook, return_kept))
    with hooks(pairs):
        readings = forward()  # (L * B, num_classes)
    if len(kept) != len(blocks):
        name = type(model).__name__
        raise UnsupportedModel(f"model: {name} does not run every block once, so its blocks cannot be read one by one")
    return readings.unflatten(0, (len(blocks), -1)).transpose(0, 1)
