"""Dynamic Accumulated Attention Map of a Vision Transformer with a classifier, for one photo, several, or a folder.

    python VIT_DynamicAccumulatedAttentionMap_oneSample.py
    python VIT_DynamicAccumulatedAttentionMap_oneSample.py --image photo.jpg --target "tabby cat"
    python VIT_DynamicAccumulatedAttentionMap_oneSample.py --image photo.jpg --target top3

Edit the constants, or pass the options of the same names; --help lists all options. For every photo the script prints
the five most probable classes and writes OUTPUT_DIR/<model>/<image>-<class>/: flow.gif, frames/, sheet.png,
evolution.png, maps.npz and flow.json. Several classes are drawn side by side.

The exit code is 0, or 2 after an error. Every error is one line on stderr, and the other photos are still explained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from command_line.options import find_device, find_targets, flow_options, load_named, parse, precision, warn_fallback
from command_line.photos import Photo, Photos
from command_line.results import evolution, lens_outputs, manifest, save_result
from command_line.terminal import run
from daam_core import AttentionFlow, attention_flow
from models import LoadedModel, WeightsUnavailable, load
from models.images import read_image

# Photo to explain: a file, or a folder of images.
IMAGE = Path(__file__).parent / ".img" / "coffee.png"

# Vision Transformer of timm, of transformers ("hf:google/vit-base-patch16-224") or of torchvision
# ("torchvision:vit_b_16"), whose weights are downloaded, or the embedded "vit_small_patch14_caltech101". If the weights
# of the default are not available, the embedded model is used instead.
MODEL = "deit_small_patch16_224"

# Local file of weights for MODEL (.safetensors, .pth), or None.
CHECKPOINT = None

# Class to explain: an index, a name ("tabby cat"), or None for the predicted class of every photo. Several, side by
# side: a list of indices and names, or "top3" (top1 to top10) for the three most probable classes of every photo.
TARGET = None

# Folder of the results.
OUTPUT_DIR = "results"

# Do not edit. If the weights of DEFAULT are not available, FALLBACK replaces it; no other model is replaced.
DEFAULT, FALLBACK = "deit_small_patch16_224", "vit_small_patch14_caltech101"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; the constants above are their defaults."""
    parser = flow_options(
        __doc__.split("\n")[0], image=IMAGE, model=MODEL, checkpoint=CHECKPOINT, target=TARGET, output_dir=OUTPUT_DIR
    )
    return parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Explain the photos, and return the exit code."""
    options = parse_options(arguments)
    photos = Photos(options)
    if not photos.files:
        return photos.exit_code
    with photos.reporting():
        loaded = load_model(options)
        targets = find_targets(options.target, loaded.class_names, loaded.num_classes)
        for batch in photos.batches(loaded):
            with photos.explaining(batch):
                with precision(batch.images.device, options.dtype):
                    flow = attention_flow(
                        loaded.model, batch.images, lambda scores: choose_classes(scores, targets),
                        norm=options.norm, rows=options.rows, memory=options.memory, variant=options.variant,
                        score=options.score,
                    )  # fmt: skip
                    lens = lens_outputs(loaded.model, batch.images, flow, head=True)  # (B, L, num_classes)
                for photo in batch.photos:
                    with photos.saving(photo):
                        save(photo, flow, lens, loaded, options)
    return photos.exit_code


def load_model(options: argparse.Namespace) -> LoadedModel:
    """Load the model, or the embedded model if nothing was named and the weights of the default are not available."""
    try:
        loaded = load_named(options, MODEL)
    except WeightsUnavailable as error:
        if options.model is not None or MODEL != DEFAULT:
            raise
        warn_fallback(error, FALLBACK)
        loaded = load(FALLBACK, None, find_device(options.device))
    if loaded.num_classes == 0:
        raise ValueError(
            f"model: {loaded.name} has no classifier, so there is no class score to explain; "
            f"DINO_DAAM_Visualization_oneSample.py explains such models"
        )
    return loaded


def choose_classes(scores: Tensor, targets: list[int] | int) -> Tensor:
    """Return the classes to explain, `(B,)` or `(B, K)`: named ones, or the N with the largest `(B, num_classes)`."""
    if isinstance(targets, int):
        return scores.topk(targets).indices.squeeze(1)
    return torch.tensor(targets).expand(len(scores), -1).squeeze(1)


def save(
    photo: Photo, flow: AttentionFlow, lens: Tensor | None, loaded: LoadedModel, options: argparse.Namespace
) -> None:
    """Print the most probable classes of a photo and write its results."""
    image = read_image(photo.file)
    scores = flow.output[photo.index].float()  # (num_classes,)
    probabilities = scores.softmax(0)
    explained = flow.target[photo.index].view(-1).tolist()

    def name_of(k: int) -> str:
        return loaded.class_names[k] if loaded.class_names else f"class {k}"

    def describe(k: int) -> dict:
        return {"index": k, "name": name_of(k), "score": scores[k].item(), "probability": probabilities[k].item()}

    by_block = None if lens is None else lens[photo.index].float().softmax(1)  # (L, num_classes)
    metadata = manifest(
        photo, image, loaded, flow, options, [describe(k) for k in explained],
        top5=[describe(k) for k in scores.topk(min(5, len(scores))).indices.tolist()],
        evolution=evolution(by_block, flow.accumulated[photo.index], explained, name_of, "probability"),
    )  # fmt: skip
    save_result(
        photo.folder, photo.index, flow, image, loaded, options, metadata,
        confidence=lambda c: f"{c['probability']:6.1%}", class_names=loaded.class_names,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
