"""Dynamic Accumulated Attention Map of a self-supervised Vision Transformer, for one photo, several, or a folder.

    python DINO_DAAM_Visualization_oneSample.py
    python DINO_DAAM_Visualization_oneSample.py --image photo.jpg --bank memorybank/mine --target "wild cat"

A model without a classifier has no class score. Instead, the nearest neighbours of the photo in a memory bank of
labelled features vote on its class. They also say how much every dimension of its feature speaks for that class, and
this importance is sent back in place of a score. With --score log_odds, which --variant relevance needs, all features
of the bank vote for or against the class, and the gradient of its log-odds is sent back.

Edit the constants, or pass the options of the same names; --help lists all options. For every photo the script prints
the vote and writes OUTPUT_DIR/<model>/<image>-<class>/: flow.gif, frames/, sheet.png, evolution.png, neighbours.png,
maps.npz and flow.json. Several classes are drawn side by side.

The exit code is 0, or 2 after an error. Every error is one line on stderr, and the other photos are still explained.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import timm
from torch import Tensor

from command_line.names import drawn_name, file_name, short
from command_line.neighbours import SCORES, NeighbourSearch, describe_neighbours, draw_neighbours
from command_line.options import (
    bank_options,
    find_device,
    find_targets,
    flow_options,
    load_named,
    parse,
    precision,
    warn_fallback,
)
from command_line.photos import Photo, Photos
from command_line.results import evolution, lens_outputs, manifest, save_result
from command_line.terminal import run
from daam_core import AttentionFlow, attention_flow
from memorybank import EMBEDDED_BANK, MemoryBank
from models import LoadedModel, WeightsUnavailable, embedded_names, load, weights_sha256
from models.images import read_image

HERE = Path(__file__).parent

# Photo to explain: a file, or a folder of images.
IMAGE = HERE / ".img" / "coffee.png"

# Vision Transformer of timm or of transformers ("hf:facebook/dinov2-small"), whose weights are downloaded, or the
# embedded "vit_small_patch14_selfsupervised". If the default or its bank is not available, the embedded pair is used
# instead.
MODEL = "vit_small_patch8_224.dino"

# Local file of weights for MODEL (.safetensors, .pth), or None. For the default MODEL, the file that the authors of
# DINO publish is used if it is there: pretrainedmodels/dino_deitsmall8_pretrain.pth.
CHECKPOINT = None

# Memory bank: a folder made by `python -m memorybank build` or by DINO's eval_knn.py. If no model is named, the bank
# decides which one is loaded. None: the bank of the model, memorybank/DINO/ImageNet2012/<model>/.
BANK = None

# Class to explain: an index, a name ("wild cat"), or None for the predicted class of every photo. Several, side by
# side: a list of indices and names, or "top3" (top1 to top10) for the three classes of every photo with the most votes.
TARGET = None

# Folder of the results.
OUTPUT_DIR = "results"

# Do not edit. If DEFAULT or its bank is not available, FALLBACK and its bank replace it; below are their files.
DEFAULT, FALLBACK = "vit_small_patch8_224.dino", "vit_small_patch14_selfsupervised"
PUBLISHED = HERE / "pretrainedmodels" / "dino_deitsmall8_pretrain.pth"
BANKS = HERE / "memorybank" / "DINO" / "ImageNet2012"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; the constants above are their defaults."""
    parser = flow_options(
        __doc__.split("\n")[0], image=IMAGE, model=MODEL, checkpoint=CHECKPOINT, target=TARGET, output_dir=OUTPUT_DIR,
        scores=SCORES,
    )  # fmt: skip
    bank_options(parser, BANK)
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Explain the photos, and return the exit code."""
    options = parse_options(arguments)
    photos = Photos(options)
    if not photos.files:
        return photos.exit_code
    with photos.reporting():
        loaded, bank = load_model_and_bank(options)
        targets = find_targets(options.target, bank.class_names, bank.num_classes)
        for batch in photos.batches(loaded):
            with photos.explaining(batch):
                search = NeighbourSearch(bank, targets, options.k, options.temperature, options.target_k, options.score)
                with precision(batch.images.device, options.dtype):
                    flow = attention_flow(
                        loaded.model, batch.images, importance=search.importance,
                        norm=options.norm, rows=options.rows, memory=options.memory, variant=options.variant,
                    )  # fmt: skip
                    lens = lens_outputs(loaded.model, batch.images, flow, head=False)  # (B, L, D)
                    votes = None if lens is None else search.votes(lens)  # (B, L, num_classes)
                for photo in batch.photos:
                    with photos.saving(photo):
                        save(photo, flow, votes, search, loaded, options)
    return photos.exit_code


def load_model_and_bank(options: argparse.Namespace) -> tuple[LoadedModel, MemoryBank]:
    """Load the model and its bank, and check that they belong together."""
    bank = None if options.bank is None else MemoryBank.load(options.bank)
    model = MODEL if options.model is None else options.model
    if options.checkpoint is not None or model != DEFAULT:
        loaded = load_named(options, MODEL if bank is None or MODEL != DEFAULT else architecture_of_bank(bank))
        bank = bank or MemoryBank.load(find_bank(loaded.name))
    elif bank is not None:
        loaded = load_model_of_bank(bank, options)
    else:
        loaded, bank = load_default_pair(options)
    bank.check_model(loaded.name, loaded.num_features, weights_sha256(loaded.model))
    if options.k > len(bank.labels):
        raise ValueError(f"k: the bank has {len(bank.labels)} features, got {options.k}; pass a smaller --k")
    return loaded, bank


def architecture_of_bank(bank: MemoryBank) -> str:
    """Return the architecture that a checkpoint has if only the bank is named: the bank's, or else the default."""
    name = bank.metadata.get("model", "")
    return name if timm.is_model(name) or name.startswith("torchvision:") else DEFAULT


def load_model_of_bank(bank: MemoryBank, options: argparse.Namespace) -> LoadedModel:
    """Load the model that a bank names; the default if the bank names none, or if --model names the default."""
    name = bank.metadata.get("model", DEFAULT) if options.model is None else options.model
    if name.startswith("hf:") and "/" not in name:
        raise ValueError(
            f"model: the bank {options.bank} was built with a folder {name[3:]}; pass it with --model hf:PATH"
        )
    if not (":" in name or timm.is_model(name) or name in embedded_names()):
        file = (bank.metadata.get("checkpoint") or {}).get("file", name)
        raise ValueError(f"checkpoint: the bank {options.bank} was built with {file}; pass it with --checkpoint")
    return load_model(name, options)


def load_default_pair(options: argparse.Namespace) -> tuple[LoadedModel, MemoryBank]:
    """Load the default model and its bank, or the embedded pair if one is not available and nothing was named."""
    folder = find_bank(DEFAULT)
    try:
        if not (folder / "trainfeat.pth").is_file():
            raise WeightsUnavailable(f"there is no memory bank {folder.relative_to(HERE)}")
        return load_model(DEFAULT, options), MemoryBank.load(folder)
    except WeightsUnavailable as error:
        if options.model is not None:
            raise
        warn_fallback(error, f"{FALLBACK} and its bank")
        return load_model(FALLBACK, options), MemoryBank.load(EMBEDDED_BANK)


def load_model(name: str, options: argparse.Namespace) -> LoadedModel:
    """Load a model without --checkpoint; the default from the file that DINO's authors publish, if it is there."""
    published = PUBLISHED if name == DEFAULT and PUBLISHED.is_file() else None
    return load(name, published, find_device(options.device))


def find_bank(model: str) -> Path:
    """Return the folder of the bank of a model."""
    return EMBEDDED_BANK if model == FALLBACK else BANKS / file_name(model)


def save(
    photo: Photo,
    flow: AttentionFlow,
    votes_by_block: Tensor | None,
    search: NeighbourSearch,
    loaded: LoadedModel,
    options: argparse.Namespace,
) -> None:
    """Print the vote on the class of a photo and write its results."""
    image, bank, i = read_image(photo.file), search.bank, photo.index
    votes, labels = search.vote.votes[i], search.vote.labels[i]  # (num_classes,), (k,)
    explained = list(dict.fromkeys(search.classes[i].tolist()))
    maps = slice(len(explained)) if len(explained) > 1 else 0
    held = None if flow.class_share is None else flow.class_share[:, maps]
    flow = replace(flow, block_maps=flow.block_maps[:, maps], accumulated=flow.accumulated[:, maps], class_share=held)

    def describe(k: int) -> dict:
        share = (votes[k] / votes.sum()).item()
        return {"index": k, "name": bank.class_name(k), "vote": share, "neighbours": (labels == k).sum().item()}

    neighbours = describe_neighbours(bank, search.searched, i)
    if search.by_name:
        neighbours = [n for n in neighbours if n["index"] in explained] or neighbours[: options.k]
    counts = [(sum(n["index"] == k for n in neighbours), drawn_name(short(bank.class_name(k)), k)) for k in explained]
    headline = f"{counts[0][0]} of the {search.searched.labels.shape[1]} nearest neighbours are {counts[0][1]}"
    headline += "".join(f", {n} {name}" for n, name in counts[1:])
    by_block = None if votes_by_block is None else votes_by_block[i] / votes_by_block[i].sum(1, keepdim=True)
    metadata = manifest(
        photo, image, loaded, flow, options, [describe(k) for k in explained],
        top5=[describe(k) for k in votes.topk(min(5, len(labels.unique()))).indices.tolist()],
        evolution=evolution(by_block, flow.accumulated[i], explained, bank.class_name, "vote"),
        bank={
            "folder": str(bank.directory), "features": len(bank.labels), "k": options.k,
            "temperature": options.temperature, "target_k": options.target_k,
        },
        neighbours=neighbours,
    )  # fmt: skip
    save_result(
        photo.folder, i, flow, image, loaded, options, metadata,
        confidence=lambda c: f"{c['vote']:6.1%} of the votes, {c['neighbours']:>2} of {len(labels)} neighbours",
        class_names=bank.class_names,
        pictures={"neighbours.png": draw_neighbours(image, headline, neighbours, explained)},
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
