"""Dynamic Accumulated Attention Map of a self-supervised Vision Transformer, for one photo, several, or a folder.

    python DINO_DAAM_Visualization_oneSample.py
    python DINO_DAAM_Visualization_oneSample.py --image photo.jpg --bank memorybank/mine --target "wild cat"

Without a classifier there is no class score. The nearest neighbours of the photo in a memory bank of labelled features
vote on its class, and say how much every dimension of its feature speaks for that class; this importance is sent back.

Edit the constants or give the options of the same names. For every photo the script prints the vote and writes
OUTPUT_DIR/<model>/<image>-<class>/: flow.gif, frames/, sheet.png, evolution.png, neighbours.png, maps.npz and
flow.json; several classes side by side.
Exit code: 0, or 2 when something could not be done: one line on stderr says what, and the other photos are still done.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from command_line.options import find_device, find_targets, flow_options, load_named, number, run, warn_fallback
from command_line.photos import explain_photos
from command_line.results import evolution, file_name, lens_outputs, manifest, save_result
from daam_core import AttentionFlow, attention_flow
from daam_vit.drawing import truncate
from memorybank import MIN_TEMPERATURE, MemoryBank, Vote
from models import LoadedModel, WeightsUnavailable, embedded_names, load, weights_sha256
from models.images import read_image, resize_longest_side

HERE = Path(__file__).parent

# What to explain: a file, or a folder of images.
IMAGE = HERE / ".img" / "coffee.png"

# The model: a Vision Transformer of timm or of transformers ("hf:facebook/dinov2-small"), whose weights are fetched, or
# the embedded "vit_small_patch14_selfsupervised". Where the default or its bank cannot be had, the embedded pair steps
# in.
MODEL = "vit_small_patch8_224.dino"

# A local file of weights for MODEL (.safetensors, .pth), or None. For the default MODEL, the file that the authors of
# DINO publish is taken where it is there: pretrainedmodels/dino_deitsmall8_pretrain.pth.
CHECKPOINT = None

# The memory bank: a folder made by `python -m memorybank build` or by DINO's eval_knn.py; where no model is named, it
# decides which one. None: the bank of the model, memorybank/DINO/ImageNet2012/<model>/.
BANK = None

# How many neighbours vote, and the temperature of their votes.
K, TEMPERATURE = 20, 0.07

# What to explain: a class index, a name ("wild cat"), or None for the predicted class of every photo. Side by side: a
# list of indices and names, or "top3" (top1 to top10) for the three classes of every photo with the most votes.
TARGET = None

# A class that is named is explained by its neighbours among so many.
TARGET_K = 200

# Where the results go.
OUTPUT_DIR = "results"

# "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
DEVICE = "auto"

# The model computes in "float32", or under autocast in "bfloat16" or "float16": half the memory, fast on GPUs.
DTYPE = "float32"

# What is kept for the gradient: "fast" all that it needs, "low" little, the rest is computed again, "auto" decides.
MEMORY = "auto"

# How many photos the model sees at once.
BATCH = 16

# Min-max normalise the map of every block before it is accumulated (off in the paper).
NORM = False

# Which queries are decomposed: "class" is the class token, as in the paper; "patches" are all tokens, for models that
# average the patches.
ROWS = "class"

# "paper" is the method of the paper, whose coefficients keep their sign here ("signed" is the same). A variant of it:
# "heads", ReLU head by head. The README says how they compare.
VARIANT = "paper"

# Size of the frames: "image" is the photo's own, "model" the square that the model sees (as in the paper), and a number
# the longer side in pixels (large photos make large GIFs).
SIZE = "image"

# Milliseconds a frame of the GIF; the last one stays three times as long.
DURATION = 400

# Not to be edited: the MODEL that is replaced where its weights or its bank cannot be had, and by what.
DEFAULT, FALLBACK = "vit_small_patch8_224.dino", "vit_small_patch14_selfsupervised"
PUBLISHED = HERE / "pretrainedmodels" / "dino_deitsmall8_pretrain.pth"
BANKS, EMBEDDED_BANK = HERE / "memorybank" / "DINO" / "ImageNet2012", HERE / "memorybank" / "embedded"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flow_options(
        __doc__.split("\n")[0], image=IMAGE, model=MODEL, checkpoint=CHECKPOINT, target=TARGET, output_dir=OUTPUT_DIR,
        device=DEVICE, dtype=DTYPE, memory=MEMORY, batch=BATCH, norm=NORM, rows=ROWS, variant=VARIANT,
        size=SIZE, duration=DURATION,
    )  # fmt: skip
    add, count, shown = parser.add_argument, number(int, 1, 10**9), "(default: %(default)s)"
    add("--bank", metavar="DIR", default=BANK, help="the memory bank (default: the one that belongs to the model)")
    add("--k", type=count, metavar="N", default=str(K), help=f"neighbours that vote {shown}")
    add(
        "--temperature",
        type=number(float, MIN_TEMPERATURE, 100),
        metavar="T",
        default=str(TEMPERATURE),
        help=f"of votes {shown}",
    )
    add("--target-k", type=count, metavar="N", default=str(TARGET_K),
        help=f"neighbours among which a named class is looked for {shown}")  # fmt: skip
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> tuple[LoadedModel, MemoryBank, list[int] | int]:
    """The model and its bank, or the embedded pair in place of a default that is not there; the targets it finds."""
    bank = None if options.bank is None else MemoryBank.load(options.bank)
    if options.checkpoint is not None or getattr(options, "model", MODEL) != DEFAULT:
        loaded = load_named(options, MODEL if bank is None or MODEL != DEFAULT else architecture_in(bank))
        bank = bank or MemoryBank.load(find_bank(loaded.name))
    elif bank is not None:
        loaded = load_of_bank(bank, options)
    else:
        loaded, bank = default_pair(options)
    bank.check_model(loaded.name, loaded.num_features, weights_sha256(loaded.model))
    if options.k > len(bank.labels):
        raise ValueError(f"k: the bank has {len(bank.labels)} features, got {options.k}")
    return loaded, bank, find_targets(options.target, bank.class_names, bank.num_classes)


def architecture_in(bank: MemoryBank) -> str:
    """For a checkpoint: that of the model that a bank names; DINO's where it names none."""
    name = bank.metadata.get("model", "")
    return name if timm.is_model(name) or name.startswith("torchvision:") else DEFAULT


def load_of_bank(bank: MemoryBank, options: argparse.Namespace) -> LoadedModel:
    """The model that a bank names; DINO's where it names none, or where the options name it."""
    name = getattr(options, "model", bank.metadata.get("model", DEFAULT))
    if name.startswith("hf:") and "/" not in name:
        raise ValueError(f"model: the bank {options.bank} was built with a folder {name[3:]}; give it, --model hf:PATH")
    if not (":" in name or timm.is_model(name) or name in embedded_names()):
        file = (bank.metadata.get("checkpoint") or {}).get("file", name)
        raise ValueError(f"checkpoint: the bank {options.bank} was built with {file}; give it with --checkpoint")
    return load_unnamed(name, options)


def default_pair(options: argparse.Namespace) -> tuple[LoadedModel, MemoryBank]:
    """DINO's ViT-S/8 and its bank; where one of them is not to be had, the embedded pair and a line on stderr, unless
    the options name DINO's."""
    place = find_bank(DEFAULT)
    try:
        if not (place / "trainfeat.pth").is_file():
            raise WeightsUnavailable(f"there is no memory bank {place.relative_to(HERE)}")
        return load_unnamed(DEFAULT, options), MemoryBank.load(place)
    except WeightsUnavailable as error:
        if hasattr(options, "model"):
            raise
        warn_fallback(error, f"{FALLBACK} and its bank")
        return load_unnamed(FALLBACK, options), MemoryBank.load(EMBEDDED_BANK)


def load_unnamed(name: str, options: argparse.Namespace) -> LoadedModel:
    """A model without --checkpoint; the file that DINO's authors publish is taken where it is there."""
    published = PUBLISHED if name == DEFAULT and PUBLISHED.is_file() else None
    return load(name, published, find_device(options.device))


def find_bank(model: str) -> Path:
    return EMBEDDED_BANK if model == FALLBACK else BANKS / file_name(model)


def explain(
    images: Tensor, loaded: LoadedModel, bank: MemoryBank, targets: list[int] | int, options: argparse.Namespace
) -> tuple[AttentionFlow, Tensor | None, Tensor, Vote, Vote]:
    """The flow of a batch of photos; the votes after every block `(B, L, num_classes)`, where they can be read; the
    classes `(B, K)`; the vote, and that of the neighbours among which a named class is looked for. The N classes with
    the most votes may be fewer: then the first one fills the row."""
    named = not isinstance(targets, int)
    asked = min(max(options.k, options.target_k), len(bank.labels)) if named else options.k
    found = None

    def importance(features: Tensor) -> Tensor:
        nonlocal found
        similarities, rows = bank.nearest(features, asked)  # the bank is read once
        vote = bank.vote(similarities[:, : options.k], rows[:, : options.k], options.temperature)
        wide = bank.vote(similarities, rows, options.temperature)
        if named:
            classes = torch.tensor(targets).expand(len(features), -1)
        else:
            votes, classes = vote.votes.topk(targets)
            classes = torch.where(votes > 0, classes, classes[:, :1])
        found = classes, vote, wide
        return torch.stack([bank.importance_of(features, wide, c) for c in classes.unbind(1)], 1)  # (B, K, D)

    flow = attention_flow(
        loaded.model, images, importance=importance,
        norm=options.norm, rows=options.rows, memory=options.memory, variant=options.variant,
    )  # fmt: skip
    lens = lens_outputs(loaded.model, images, flow, head=False)
    if lens is not None:
        votes = bank.classify(lens.flatten(0, 1), options.k, options.temperature).votes
        lens = votes.unflatten(0, lens.shape[:2])
    return flow, lens, *found


def save(
    file: Path,
    folder: Path,
    index: int,
    flow: AttentionFlow,
    lens: Tensor | None,
    classes: Tensor,
    vote: Vote,
    wide: Vote,
    loaded: LoadedModel,
    bank: MemoryBank,
    targets: list[int] | int,
    options: argparse.Namespace,
) -> None:
    """Print the vote on the class of one photo of the batch and write its results to `folder`-<class>."""
    photo = read_image(file)
    chosen = list(dict.fromkeys(classes[index].tolist()))
    mine = slice(len(chosen)) if len(chosen) > 1 else 0
    flow = replace(flow, block_maps=flow.block_maps[:, mine], accumulated=flow.accumulated[:, mine])
    votes, labels = vote.votes[index], vote.labels[index]

    def describe(k: int) -> dict:
        share = (votes[k] / votes.sum()).item()
        return {"index": k, "name": bank.class_name(k), "vote": share, "neighbours": (labels == k).sum().item()}

    def row(c: dict) -> tuple[int, str, str]:
        return c["index"], c["name"], f"{c['vote']:6.1%} of the votes, {c['neighbours']:>2} of {len(labels)} neighbours"

    top5 = [describe(k) for k in votes.topk(min(5, len(labels.unique()))).indices.tolist()]
    explained = [describe(k) for k in chosen]
    neighbours = describe_neighbours(bank, wide, index)
    if not isinstance(targets, int):
        neighbours = [n for n in neighbours if n["index"] in chosen]
    counts = [(sum(n["index"] == c["index"] for n in neighbours), c["name"].split(", ")[0]) for c in explained]
    headline = f"{counts[0][0]} of the {wide.labels.shape[1]} nearest neighbours are {counts[0][1]}"
    headline += "".join(f", {n} {name}" for n, name in counts[1:])
    shares = None if lens is None else lens[index] / lens[index].sum(1, keepdim=True)
    told = manifest(
        file, photo, loaded, flow, options, explained,
        top5=top5,
        evolution=evolution(shares, flow.accumulated[index], chosen, bank.class_name, "vote"),
        bank={
            "folder": str(bank.directory), "features": len(bank.labels), "k": options.k,
            "temperature": options.temperature, "target_k": options.target_k,
        },
        neighbours=neighbours,
    )  # fmt: skip
    pictures = {"neighbours.png": draw_neighbours(photo, headline, neighbours, chosen)}
    tqdm.write(f"{file}")
    save_result(
        folder, index, flow, photo, loaded, options, [*map(row, top5)], [*map(row, explained)], bank.class_names, told,
        pictures,
    )  # fmt: skip


def describe_neighbours(bank: MemoryBank, vote: Vote, index: int) -> list[dict]:
    """Of one image, for flow.json: row in the bank, class, similarity and, where it is known, the file."""
    rows = zip(vote.neighbours[index].tolist(), vote.labels[index].tolist(), vote.similarities[index].tolist())
    return [
        {"row": row, "index": label, "name": bank.class_name(label), "similarity": similarity}
        | ({"file": str(bank.file(row))} if bank.files else {})
        for row, label, similarity in rows
    ]


def draw_neighbours(
    photo: Image.Image, headline: str, neighbours: list[dict], explained: list[int], columns: int = 5, most: int = 40
) -> Image.Image:
    """The photo, and beside it its neighbours: their pictures where the files are there, else their names. Those of the
    explained classes have a green frame."""
    side, gap, line, left = 150, 10, 22, 320
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    neighbours = neighbours[:most]
    rows = -(-len(neighbours) // columns)
    query = resize_longest_side(photo, left, Image.Resampling.LANCZOS)
    top = 2 * gap + line
    height = top + max(query.height + gap, rows * (side + line + gap))
    page = Image.new("RGB", (left + columns * (side + gap) + 2 * gap, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, gap), headline, "black", font)
    page.paste(query, (gap, top))
    for i, neighbour in enumerate(neighbours):
        x = left + 2 * gap + i % columns * (side + gap)
        y = top + i // columns * (side + line + gap)
        name, cosine = neighbour["name"].split(", ")[0], f"{neighbour['similarity']:.2f}"
        tile = Image.new("RGB", (side, side), "whitesmoke")
        try:
            picture = resize_longest_side(read_image(neighbour.get("file", "")), side, Image.Resampling.LANCZOS)
            tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        except ValueError:  # not known, or not there any more
            ImageDraw.Draw(tile).text(
                (side / 2, side / 2), truncate(name, small, side - 12), "black", small, anchor="mm"
            )
        page.paste(tile, (x, y))
        colour = "limegreen" if neighbour["index"] in explained else "silver"
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=colour, width=3)
        draw.text((x, y + side + 3), truncate(name, small, side - 40), "black", small)
        draw.text((x + side, y + side + 3), cosine, "black", small, anchor="ra")
    return page


def main(arguments: list[str] | None = None) -> int:
    return explain_photos(parse_options(arguments), prepare, explain, save)


if __name__ == "__main__":
    run(main)
