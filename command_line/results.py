"""Results of a photo: the manifest, the evolution of the decision, the files."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from command_line.names import class_labels, drawn_name, own_folder, result_folder, short
from command_line.photos import Photo
from command_line.terminal import say
from daam_core import AttentionFlow, UnsupportedModel, evolution_picture, logit_lens, overlay, render, save_flow
from models import LoadedModel, sha256
from models.images import resize_longest_side
from models.versions import versions

PACKAGES = ("torch", "torchvision", "timm", "numpy", "cv2", "PIL")
"""Packages whose versions a manifest lists."""
LARGE = 4_000_000
"""Pixels above which drawing the frames is slow."""


# ----------------------------------------------------------------------------------------------------------------------
# The manifest
# ----------------------------------------------------------------------------------------------------------------------


def manifest(
    photo: Photo,
    image: Image.Image,
    loaded: LoadedModel,
    flow: AttentionFlow,
    options: argparse.Namespace,
    explained: list[dict],
    **more,
) -> dict:
    """Return what flow.json says of a flow: one explained class as `target`, several as `targets`; and `more`.

    The relevance flow also has its `class_share`, L values by class index as a string.
    """
    requested = options.target if isinstance(options.target, (list, tuple)) else [options.target]
    targets = [c | {"requested": word} for c, word in zip(explained, cycle(requested))]
    held = None if flow.class_share is None else flow.class_share[photo.index].reshape(len(explained), -1).tolist()
    return {
        "method": "Dynamic Accumulated Attention Map"
        + ", all-rows form" * (flow.rows == "patches")
        + variant_words(options),
        "model": loaded.name,
        "checkpoint": loaded.provenance,
        "image": {"file": str(photo.file), "sha256": sha256(photo.file), "width": image.width, "height": image.height},
        **({"target": targets[0]} if len(targets) == 1 else {"targets": targets}),
        **more,
        **({"class_share": {str(c["index"]): shares for c, shares in zip(explained, held)}} if held else {}),
        "input_size": [3, *loaded.size],
        "decomposed": flow.decomposed,
        "num_prefix_tokens": flow.num_prefix_tokens,
        "settings": {
            "rows": flow.rows,
            "variant": flow.variant,
            "score": options.score,
            "norm": options.norm,
            "size": options.size,
            "duration": options.duration,
            "device": str(next(loaded.model.parameters()).device),
            "dtype": options.dtype,
            "memory": options.memory,
        },
        "versions": versions(*PACKAGES, *(["transformers"] if "transformers" in sys.modules else [])),
    }


def variant_words(options: argparse.Namespace) -> str:
    """Return what differs from the paper's map, in words that follow others."""
    shown = f", variant {options.variant}" * (options.variant != "paper")
    return shown + ", log-odds of the class" * (options.score == "log_odds")


# ----------------------------------------------------------------------------------------------------------------------
# The evolution of the decision
# ----------------------------------------------------------------------------------------------------------------------

READING = (
    "Logit lens: the output of every block, read through the model's last norm and {head} as if the block were the "
    "last one. A reading, since early blocks were not trained to be read this way: what leads to the class may be "
    "there before it can be read."
)
SIGNED = (
    "The maps say how much evidence for the class, less that against it, a patch holds when a block begins. Evidence "
    "counts in every block that it has to pass until it is read."
)
QUANTITIES = {"probability": ("probability", "head"), "vote": ("share of the votes", "the vote of the neighbours")}
"""Key in flow.json -> the quantity in words, and what follows the norm."""


def lens_outputs(model: nn.Module, images: Tensor, flow: AttentionFlow, head: bool) -> Tensor | None:
    """Return the `logit_lens` of the images of a flow; print why and return None if the model does not allow it."""
    try:
        return logit_lens(model, images, flow.rows, head, flow.output)
    except UnsupportedModel as error:
        say(f"  no evolution.png: {str(error).removeprefix('model: ')}")
        return None


def evolution(
    values: Tensor | None, accumulated: Tensor, explained: list[int], name_of: Callable[[int], str], quantity: str
) -> dict | None:
    """Return what flow.json says of the decision after every block of one photo.

    Args:
        values: `(L, num_classes)`, probabilities or votes, a row sums to 1; None if there are none.
        accumulated: `(L, h, w)`, or `(K, L, h, w)` of several classes.
        explained: indices of the K classes.
        name_of: class index -> name.
        quantity: "probability" or "vote".

    Returns:
        None without values, otherwise

        - `reading`: what the values are, in words;
        - `runner_up`: the class with the largest value after the last block that is not explained, if any;
        - `leads_from`: the block (1 is the first) from which an explained class leads until the end, or None;
        - `blocks`: for every block the `share` of the accumulated map that it adds (of signed maps, the share of the
          sum of absolute values) and the value, both by class index as a string, and the `leader` of all classes.
    """
    if values is None:
        return None
    values = values.cpu()
    final, leaders = values[-1].clone(), values.argmax(1).tolist()
    final[explained] = 0
    runner_up = final.argmax().item() if final.any() else None
    maps = accumulated.cpu().double().reshape(len(explained), len(values), -1)  # (K, L, h * w)
    if signed := is_signed(accumulated):
        maps = maps.diff(dim=1, prepend=torch.zeros_like(maps[:, :1])).abs().cumsum(1)
    total = maps.sum(2)  # (K, L)
    shares = total.diff(dim=1, prepend=total.new_zeros(len(total), 1)) / total[:, -1:].clamp(min=1e-300)
    compared = explained if runner_up is None else [*explained, runner_up]
    others = [b for b, leader in enumerate(leaders, 1) if leader != leaders[-1]]
    return {
        "reading": READING.format(head=QUANTITIES[quantity][1]) + f" {SIGNED}" * signed,
        "runner_up": None if runner_up is None else {"index": runner_up, "name": name_of(runner_up)},
        "leads_from": max(others, default=0) + 1 if leaders[-1] in explained else None,
        "blocks": [
            {
                "block": b,
                "share": {str(k): share.item() for k, share in zip(explained, shares[:, b - 1])},
                quantity: {str(k): row[k].item() for k in compared},
                "leader": {"index": leader, "name": name_of(leader), quantity: row[leader].item()},
            }
            for b, (row, leader) in enumerate(zip(values, leaders), 1)
        ],
    }


def is_signed(accumulated: Tensor) -> bool:
    """Return whether a block has taken something from accumulated maps `(..., L, h, w)`."""
    return bool((accumulated[..., 0, :, :] < 0).any() or (accumulated.diff(dim=-3) < 0).any())


def draw_evolution(
    photo: Image.Image,
    accumulated: Tensor,
    evolution: dict,
    names: list[str],
    class_share: dict[str, list[float]] | None = None,
) -> Image.Image:
    """Draw what `evolution` returned, with these names of the explained classes, from `drawn_name`.

    The `class_share` of the manifest is drawn if there is one.
    """
    blocks, runner_up = evolution["blocks"], evolution["runner_up"]
    quantity = next(name for name in QUANTITIES if name in blocks[0])
    small = resize_longest_side(photo, 320)
    panels = accumulated.reshape(len(names), len(blocks), *accumulated.shape[-2:])
    labels = [*names, *([_drawn(runner_up)] if runner_up else [])]
    named = dict(zip(blocks[0][quantity], labels))
    return evolution_picture(
        [overlay(small, render(a)) for a in panels],
        [(name, [block[quantity][k] for block in blocks]) for k, name in named.items()],
        [[block["share"][k] for block in blocks] for k in blocks[0]["share"]],
        [named.get(str(block["leader"]["index"]), _drawn(block["leader"])) for block in blocks],
        evolution["leads_from"], QUANTITIES[quantity][0], evolution["reading"], is_signed(accumulated),
        class_share and [*class_share.values()],
    )  # fmt: skip


def _drawn(class_: dict) -> str:
    return drawn_name(short(class_["name"]), class_["index"])


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def save_result(
    folder: Path,
    index: int,
    flow: AttentionFlow,
    photo: Image.Image,
    loaded: LoadedModel,
    options: argparse.Namespace,
    metadata: dict,
    confidence: Callable[[dict], str],
    class_names: list[str] | None,
    pictures: dict[str, Image.Image] | None = None,
) -> None:
    """Print the classes of a photo and write its flow to `folder`-<class>, or `folder`-<class>-<class>-...

    A class whose name no font can draw is "class INDEX" in the pictures.

    Args:
        folder: path of the results without the classes.
        index: position of the photo in the flow.
        flow: maps of a batch, `(B, L, h, w)`, or `(B, K, L, h, w)` of several classes.
        photo: the photo as it was read.
        loaded: the model.
        options: of the call.
        metadata: the manifest, with `top5` and `evolution`; the latter is drawn as evolution.png.
        confidence: class of the manifest -> how sure the model is, in words; captions take the text up to a comma.
        class_names: names of all classes, if they are known.
        pictures: more pictures of the result, by file name.
    """
    top5, explained = metadata["top5"], metadata.get("targets") or [metadata["target"]]
    labels = class_labels(explained, class_names)
    names = [drawn_name(label, c["index"]) for label, c in zip(labels, explained)]
    say(metadata["image"]["file"], *(f"  {confidence(c)}  {c['index']:>4}  {c['name']}" for c in top5))

    sure = [confidence(c).split(",")[0].strip() for c in explained]
    lines = [f"{name}: {text}" for name, text in zip(names, sure)]
    lines += [loaded.name, flow.decomposed + variant_words(options)]
    if top5[0]["index"] not in [c["index"] for c in explained]:
        lines.append(f"predicted: {_drawn(top5[0])} {confidence(top5[0]).split(',')[0].strip()}")
    caption = "\n".join(textwrap.fill(line, 34) for line in lines)

    pictures = dict(pictures or {})
    if metadata["evolution"]:
        accumulated, held = flow.accumulated[index], metadata.get("class_share")
        pictures["evolution.png"] = partial(draw_evolution, photo, accumulated, metadata["evolution"], names, held)
    frame = resize_to_frame(photo, options.size, loaded.size)
    if len(names) * frame.width * frame.height > LARGE:
        panels = f"{len(names)} x " * (len(names) > 1) + f"{frame.width} x {frame.height}"
        say(f"  drawing frames of {panels} pixels is slow; --size 1024 is faster")
    titles = names if len(names) > 1 else None
    with own_folder(result_folder(folder, labels, options), metadata) as own:
        save_flow(own, frame, flow, index, caption, metadata, options.duration, pictures, titles)
    shown = ", ".join(f"{c['index']} {label}" for c, label in zip(explained, labels))
    say(f"  explained: {shown} ({flow.decomposed}) -> {own / 'flow.gif'}")


def resize_to_frame(photo: Image.Image, size: str | int, input_size: tuple[int, int]) -> Image.Image:
    """Resize a photo to the size of its frames: --size, and the `(H, W)` of the model's input."""
    if size == "model":
        return photo.resize(input_size[::-1], Image.Resampling.BICUBIC)
    return photo if size == "image" else resize_longest_side(photo, size)
