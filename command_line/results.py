"""Results of a photo: the names of their folders, the manifest, the evolution of the decision, the files."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, count, cycle
from pathlib import Path

from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from daam_core import AttentionFlow, UnsupportedModel, evolution_picture, logit_lens, overlay, render, save_flow
from models import LoadedModel, sha256
from models.images import resize_longest_side
from models.versions import versions

PACKAGES = ("torch", "torchvision", "timm", "numpy", "cv2", "PIL")
LARGE = 4_000_000  # pixels above which twelve frames take a while
MAX_NAME_LENGTH = 80  # characters of the classes in the name of a folder


READING = (
    "Logit lens: the output of every block, read through the model's last norm and {head} as if the block were the "
    "last one. A reading, since early blocks were not trained to be read this way: what leads to the class may be "
    "there before it can be read."
)
QUANTITIES = {"probability": ("probability", "head"), "vote": ("share of the votes", "the vote of the neighbours")}
"""By the key in flow.json: in words, and what follows the norm."""


def lens_outputs(model: nn.Module, images: Tensor, flow: AttentionFlow, head: bool) -> Tensor | None:
    """`logit_lens` of the images of a flow; None, and a line that says why, where the model has none."""
    try:
        return logit_lens(model, images, flow.rows, head, flow.output)
    except UnsupportedModel as error:
        tqdm.write(f"  no evolution.png: {str(error).removeprefix('model: ')}")
        return None


def evolution(
    values: Tensor | None, accumulated: Tensor, explained: list[int], name_of: Callable[[int], str], quantity: str
) -> dict | None:
    """What flow.json says of the decision after every block of one photo.

    Args:
        values: `(L, num_classes)`, probabilities or votes, a row sums to 1; None where there are none.
        accumulated: `(L, h, w)`, or `(K, L, h, w)` of several classes.
        explained: the K classes.
        name_of: of a class.
        quantity: "probability" or "vote".

    Returns:
        `reading`, in words; `runner_up`, the class with the largest value at the end that is not explained, if any;
        `leads_from`, the block (1 is the first) from which one of the explained classes leads all others until the end,
        or None; and for each of the `blocks` the `share` of the accumulated map that it adds, and the value, both by
        class index as a text, and the `leader` of all classes. None without values.
    """
    if values is None:
        return None
    values = values.cpu()
    final, leaders = values[-1].clone(), values.argmax(1).tolist()
    final[explained] = 0
    runner_up = final.argmax().item() if final.any() else None
    total = accumulated.cpu().double().reshape(len(explained), len(values), -1).sum(2)  # (K, L)
    shares = total.diff(dim=1, prepend=total.new_zeros(len(total), 1)) / total[:, -1:].clamp(min=1e-300)
    compared = explained if runner_up is None else [*explained, runner_up]
    others = [b for b, leader in enumerate(leaders, 1) if leader != leaders[-1]]
    return {
        "reading": READING.format(head=QUANTITIES[quantity][1]),
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


def draw_evolution(photo: Image.Image, accumulated: Tensor, evolution: dict, names: list[str]) -> Image.Image:
    """Of what `evolution` says, with the names of the explained classes."""
    blocks, runner_up = evolution["blocks"], evolution["runner_up"]
    quantity = next(name for name in QUANTITIES if name in blocks[0])
    small = resize_longest_side(photo, 320)
    panels = accumulated.reshape(len(names), len(blocks), *accumulated.shape[-2:])
    labels = [*names, *([runner_up["name"].split(", ")[0]] if runner_up else [])]
    named = dict(zip(blocks[0][quantity], labels))
    return evolution_picture(
        [overlay(small, render(a)) for a in panels],
        [(name, [block[quantity][k] for block in blocks]) for k, name in named.items()],
        [[block["share"][k] for block in blocks] for k in blocks[0]["share"]],
        [named.get(str(block["leader"]["index"]), block["leader"]["name"].split(", ")[0]) for block in blocks],
        evolution["leads_from"], QUANTITIES[quantity][0], evolution["reading"],
    )  # fmt: skip


def manifest(
    file: Path,
    photo: Image.Image,
    loaded: LoadedModel,
    flow: AttentionFlow,
    options: argparse.Namespace,
    explained: list[dict],
    **more,
) -> dict:
    """What flow.json says of every flow: the class that is explained as `target`, or several as `targets`; and
    `more`."""
    requested = options.target if isinstance(options.target, (list, tuple)) else [options.target]
    targets = [c | {"requested": word} for c, word in zip(explained, cycle(requested))]
    return {
        "method": "Dynamic Accumulated Attention Map"
        + ", all-rows form" * (flow.rows == "patches")
        + f", variant {flow.variant}" * (flow.variant != "paper"),
        "model": loaded.name,
        "checkpoint": loaded.provenance,
        "image": {"file": str(file), "sha256": sha256(file), "width": photo.width, "height": photo.height},
        **({"target": targets[0]} if len(targets) == 1 else {"targets": targets}),
        **more,
        "input_size": [3, *loaded.size],
        "decomposed": flow.decomposed,
        "num_prefix_tokens": flow.num_prefix_tokens,
        "settings": {
            "rows": flow.rows,
            "variant": flow.variant,
            "norm": options.norm,
            "size": options.size,
            "duration": options.duration,
            "device": str(next(loaded.model.parameters()).device),
            "dtype": options.dtype,
            "memory": options.memory,
        },
        "versions": versions(*PACKAGES, *(["transformers"] if "transformers" in sys.modules else [])),
    }


def save_result(
    folder: Path,
    index: int,
    flow: AttentionFlow,
    photo: Image.Image,
    loaded: LoadedModel,
    options: argparse.Namespace,
    classes: list[tuple[int, str, str]],
    explained: list[tuple[int, str, str]],
    class_names: list[str] | None,
    told: dict,
    pictures: dict[str, Image.Image] | None = None,
) -> None:
    """Print the classes of a photo and write its flow to `folder`-<class>, or `folder`-<class>-<class>-...

    Args:
        folder: without the classes.
        index: which image of the flow.
        flow: its maps are `(B, L, h, w)`, or `(B, K, L, h, w)` of several classes.
        photo: as it was read.
        classes: index, name and how sure, as a text, of the most probable ones; captions take the text up to a comma.
        explained: the same of those that are explained.
        class_names: of all classes, where they are known; one whose name another has, too, is told by its index.
        told: for flow.json; of its `evolution` a picture is made.
        pictures: more of them, by file name.
    """
    alike = Counter(file_name(name.split(", ")[0]) for name in class_names or ())
    names = [name.split(", ")[0] for _, name, _ in explained]
    names = [f"{name} {k}" if alike[file_name(name)] > 1 else name for name, (k, _, _) in zip(names, explained)]
    suffix = "-".join(map(file_name, names))
    if len(names) > 1 and len(suffix) > MAX_NAME_LENGTH:
        suffix = f"{suffix[:MAX_NAME_LENGTH]}-{hashlib.sha256(suffix.encode()).hexdigest()[:8]}"
    suffix += "-patches" * (flow.rows == "patches") + f"-{flow.variant}" * (flow.variant != "paper")
    folder = folder.with_name(f"{folder.name}-{suffix}")

    def short(share: str) -> str:
        return share.split(",")[0].strip()

    lines = [f"{name}: {short(share)}" for name, (_, _, share) in zip(names, explained)]
    lines += [loaded.name, flow.decomposed + f", variant {flow.variant}" * (flow.variant != "paper")]
    if classes[0][0] not in [k for k, _, _ in explained]:
        lines.append(f"predicted: {classes[0][1].split(', ')[0]} {short(classes[0][2])}")
    tqdm.write("\n".join(f"  {share}  {k:>4}  {name}" for k, name, share in classes))
    if told["evolution"]:
        drawing = partial(draw_evolution, photo, flow.accumulated[index], told["evolution"], names)
        pictures = (pictures or {}) | {"evolution.png": drawing}
    if options.size == "model":
        photo = photo.resize(loaded.size[::-1], Image.Resampling.BICUBIC)
    elif options.size != "image":
        photo = resize_longest_side(photo, options.size)
    if len(names) * photo.width * photo.height > LARGE:
        each = f"{len(names)} x " * (len(names) > 1) + f"{photo.width} x {photo.height}"
        tqdm.write(f"  frames of {each} pixels take a while; --size 1024 is faster")
    save_flow(
        folder, photo, flow, index, "\n".join(textwrap.fill(line, 34) for line in lines), told, options.duration,
        pictures, names if len(names) > 1 else None,
    )  # fmt: skip
    shown = ", ".join(f"{k} {name}" for name, (k, _, _) in zip(names, explained))
    tqdm.write(f"  explained: {shown} ({flow.decomposed}) -> {folder / 'flow.gif'}")


def file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("._") or "_"


def result_names(files: list[Path]) -> list[str]:
    """A name for the results of every file: its stem; where that is taken its full name, that with its folder's, ..."""
    names: dict[str, Path] = {}
    for file in files:
        stem, full = file_name(file.stem), file_name(file.name)
        folder = file_name(f"{file.absolute().parent.name}_{file.name}")
        candidates = chain([stem, full, folder], (f"{folder}_{n}" for n in count(2)))
        names[next(name for name in candidates if name not in names)] = file
    return list(names)
