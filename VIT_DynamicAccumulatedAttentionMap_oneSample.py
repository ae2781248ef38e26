"""Dynamic Accumulated Attention Map of a Vision Transformer with a classifier, for one photo, several, or a folder.

    python VIT_DynamicAccumulatedAttentionMap_oneSample.py
    python VIT_DynamicAccumulatedAttentionMap_oneSample.py --image photo.jpg --target "tabby cat"
    python VIT_DynamicAccumulatedAttentionMap_oneSample.py --image photo.jpg --target top3

Edit the constants or give the options of the same names. For every photo the script prints the five most probable
classes and writes OUTPUT_DIR/<model>/<image>-<class>/: flow.gif, frames/, sheet.png, evolution.png, maps.npz and
flow.json; several classes side by side.
Exit code: 0, or 2 when something could not be done: one line on stderr says what, and the other photos are still done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from command_line.options import find_device, find_targets, flow_options, load_named, run, warn_fallback
from command_line.photos import explain_photos
from command_line.results import evolution, lens_outputs, manifest, save_result
from daam_core import AttentionFlow, attention_flow
from models import LoadedModel, WeightsUnavailable, load
from models.images import read_image

# What to explain: a file, or a folder of images.
IMAGE = Path(__file__).parent / ".img" / "coffee.png"

# The model: a Vision Transformer of timm, of transformers ("hf:google/vit-base-patch16-224"), of torchvision
# ("torchvision:vit_b_16"), whose weights are fetched, or the embedded "vit_small_patch14_caltech101". Where the weights
# of the default cannot be had, the embedded model steps in.
MODEL = "deit_small_patch16_224"

# A local file of weights for MODEL (.safetensors, .pth), or None.
CHECKPOINT = None

# What to explain: a class index, a name ("tabby cat"), or None for the predicted class of every photo. Side by side: a
# list of indices and names, or "top3" (top1 to top10) for the three most probable classes of every photo.
TARGET = None

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

# "paper" is the method of the paper. Variants of it: "signed", coefficients keep their sign; "heads", that, and ReLU
# head by head. The README says how they compare.
VARIANT = "paper"

# Size of the frames: "image" is the photo's own, "model" the square that the model sees (as in the paper), and a number
# the longer side in pixels (large photos make large GIFs).
SIZE = "image"

# Milliseconds a frame of the GIF; the last one stays three times as long.
DURATION = 400

# Not to be edited: the MODEL that is replaced where its weights cannot be had, and by what. A model you name is not.
DEFAULT, FALLBACK = "deit_small_patch16_224", "vit_small_patch14_caltech101"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    return flow_options(
        __doc__.split("\n")[0], image=IMAGE, model=MODEL, checkpoint=CHECKPOINT, target=TARGET, output_dir=OUTPUT_DIR,
        device=DEVICE, dtype=DTYPE, memory=MEMORY, batch=BATCH, norm=NORM, rows=ROWS, variant=VARIANT,
        size=SIZE, duration=DURATION,
    ).parse_args(arguments)  # fmt: skip


def prepare(options: argparse.Namespace) -> tuple[LoadedModel, list[int] | int]:
    """The model, or the embedded one in place of a default whose weights cannot be had; what `find_targets` found."""
    if options.checkpoint is not None or hasattr(options, "model") or MODEL != DEFAULT:
        loaded = load_named(options, MODEL)
    else:
        try:
            loaded = load(DEFAULT, None, find_device(options.device))
        except WeightsUnavailable as error:
            warn_fallback(error, FALLBACK)
            loaded = load(FALLBACK, None, find_device(options.device))
    if loaded.num_classes == 0:
        raise ValueError(
            f"model: {loaded.name} has no classifier, so there is no class score to explain; "
            f"DINO_DAAM_Visualization_oneSample.py explains such models"
        )
    return loaded, find_targets(options.target, loaded.class_names, loaded.num_classes)


def explain(
    images: Tensor, loaded: LoadedModel, targets: list[int] | int, options: argparse.Namespace
) -> tuple[AttentionFlow, Tensor | None]:
    """The flow of a batch of photos, and the scores after every block `(B, L, num_classes)` where they can be read."""

    def target(scores: Tensor) -> Tensor:  # (B, num_classes) -> (B, K); of one class (B,)
        if isinstance(targets, int):
            return scores.topk(targets).indices.squeeze(1)
        return torch.tensor(targets).expand(len(scores), -1).squeeze(1)

    flow = attention_flow(
        loaded.model, images, target,
        norm=options.norm, rows=options.rows, memory=options.memory, variant=options.variant,
    )  # fmt: skip
    return flow, lens_outputs(loaded.model, images, flow, head=True)


def save(
    file: Path,
    folder: Path,
    index: int,
    flow: AttentionFlow,
    lens: Tensor | None,
    loaded: LoadedModel,
    targets: list[int] | int,
    options: argparse.Namespace,
) -> None:
    """Print the classes of one photo of the batch and write its results to `folder`-<class>."""
    photo = read_image(file)
    scores = flow.output[index].float()
    probabilities = scores.softmax(0)

    def name_of(k: int) -> str:
        return loaded.class_names[k] if loaded.class_names else f"class {k}"

    def describe(k: int) -> dict:
        return {"index": k, "name": name_of(k), "score": scores[k].item(), "probability": probabilities[k].item()}

    def row(c: dict) -> tuple[int, str, str]:
        return c["index"], c["name"], f"{c['probability']:6.1%}"

    top5 = [describe(k) for k in scores.topk(min(5, len(scores))).indices.tolist()]
    chosen = flow.target[index].view(-1).tolist()
    explained = [describe(k) for k in chosen]
    values = None if lens is None else lens[index].float().softmax(1)
    formed = evolution(values, flow.accumulated[index], chosen, name_of, "probability")
    told = manifest(file, photo, loaded, flow, options, explained, top5=top5, evolution=formed)
    tqdm.write(f"{file}")
    save_result(
        folder, index, flow, photo, loaded, options, [*map(row, top5)], [*map(row, explained)], loaded.class_names, told
    )


def main(arguments: list[str] | None = None) -> int:
    return explain_photos(parse_options(arguments), prepare, explain, save)


if __name__ == "__main__":
    run(main)
