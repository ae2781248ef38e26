"""Options of the scripts with their defaults, and what they name: the device, the model, the classes."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from command_line.terminal import complain
from daam_core import VARIANTS
from daam_vit.text import printable
from memorybank import MIN_TEMPERATURE
from models import LoadedModel, WeightsUnavailable, architecture_of, find_class, load
from models.weights import first_line

MAX_CLASSES = 10
"""Largest number of classes that are explained side by side."""


# ----------------------------------------------------------------------------------------------------------------------
# Parsers
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parser that reports an error as one line, without the usage."""

    def error(self, message: str):
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message, 500)} (--help shows the options)\n")


def flow_options(
    description: str,
    *,
    image: str | Path,
    model: str,
    checkpoint: str | Path | None,
    target: int | str | list[int | str] | None,
    output_dir: str | Path,
) -> Parser:
    """Return a parser with the options of every script that explains photos.

    The arguments are the constants that people edit in a script. All other defaults are set here.
    """
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--image", nargs="+", metavar="PATH", default=[image],
        help=f"image files, or folders of images (default: {Path(image).name})")
    add("--model", metavar="NAME",
        help=f"timm name, hf:NAME, torchvision:NAME or embedded model (default: {model})")
    add("--checkpoint", metavar="FILE", default=checkpoint,
        help=f"local weights, .safetensors or .pth (default: {checkpoint or 'the weights of the model'})")
    add("--target", nargs="+", metavar="CLASS", default=target,
        help="class to explain, by index or name; several are drawn side by side; top3 explains the three "
        f"most probable classes of every photo (default: {'the predicted class' if target is None else target})")
    add("--output-dir", metavar="DIR", default=output_dir, help="folder of the results (default: %(default)s)")
    add("--device", default="auto",
        help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", type=one_of("float32", "bfloat16", "float16"), metavar="{float32,bfloat16,float16}",
        default="float32",
        help="dtype in which the model computes; weights stay float32, and the half precisions use autocast: half the "
        "memory, and fast on GPUs (default: %(default)s)")
    add("--memory", type=one_of("auto", "fast", "low"), metavar="{auto,fast,low}", default="auto",
        help="fast keeps everything that the gradient needs, low recomputes most of it, auto decides by the size of "
        "the model (default: %(default)s)")
    add("--batch", type=number(int, 1, 4096, "photos"), metavar="N", default=16,
        help="number of photos that the model sees at once (default: %(default)s)")
    add("--norm", action=argparse.BooleanOptionalAction, default=False,
        help="min-max normalise the map of every block before it is accumulated; not in the paper "
        "(default: %(default)s)")
    add("--rows", type=one_of("class", "patches"), metavar="{class,patches}", default="class",
        help="queries that are decomposed: class is the class token, as in the paper; patches is all tokens, for "
        "models that average the patches (default: %(default)s)")
    add("--variant", type=one_of(*VARIANTS), metavar=f"{{{','.join(VARIANTS)}}}", default="paper",
        help="paper is the method of the paper; signed keeps the sign of the coefficients, as the paper does without "
        "a classifier; heads does so too, and takes ReLU head by head (default: %(default)s)")
    add("--size", type=frame_size, default="image",
        help="size of the frames: image is that of the photo, model that of the model's input, as in the paper, and a "
        "number the longer side in pixels (default: %(default)s)")
    add("--duration", type=number(int, 20, 60_000, "milliseconds"), metavar="MS", default=400,
        help="milliseconds of a frame; the last frame stays three times as long (default: %(default)s)")
    # fmt: on
    return parser


def bank_options(parser: Parser, bank: str | Path | None) -> None:
    """Add the options of the memory bank to a parser."""
    add, count = parser.add_argument, number(int, 1, 10**9)
    # fmt: off
    add("--bank", metavar="DIR", default=bank,
        help="memory bank; if no model is named, the bank decides which one is loaded "
        f"(default: {bank or 'the bank of the model'})")
    add("--k", type=count, metavar="N", default=20, help="number of neighbours that vote (default: %(default)s)")
    add("--temperature", type=number(float, MIN_TEMPERATURE, 100), metavar="T", default=0.07,
        help="temperature of the votes (default: %(default)s)")
    add("--target-k", type=count, metavar="N", default=200,
        help="number of neighbours that are searched for a class named by --target (default: %(default)s)")
    # fmt: on


def number(kind: type, low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """Return a `type` for `add_argument` that takes a number within limits."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low:g} to {high:g} {unit}".rstrip() + f", got {text}")
        return value

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Return a `type` for `add_argument` that takes one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"expected {', '.join(words[:-1])} or {words[-1]}, got {text!r}")
        return text

    return parse


def frame_size(text: str) -> str | int:
    """Parse the value of --size."""
    if text in ("image", "model"):
        return text
    if text.isdigit() and 32 <= int(text) <= 8192:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected image, model, or 32 to 8192 pixels, got {text!r}")


# ----------------------------------------------------------------------------------------------------------------------
# What the options name
# ----------------------------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """Return the device of that name; under `torchrun`, "auto" and "cuda" mean the GPU of this rank.

    Raises:
        ValueError: if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device "meta" has no values
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {first_line(error)}; pass another one") from None


def precision(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    """Return a context in which the model computes in that dtype."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


def load_named(options: argparse.Namespace, default: str) -> LoadedModel:
    """Load the model that --model and --checkpoint name.

    Without --model, a checkpoint that names its architecture decides; otherwise it is the default.
    """
    name = options.model
    if name is None and not (options.checkpoint is not None and architecture_of(options.checkpoint)):
        name = default
    return load(name, options.checkpoint, find_device(options.device))


def warn_fallback(error: WeightsUnavailable, fallback: str) -> None:
    """Print one line that says why a default is not available and what replaces it."""
    reason = str(error).removeprefix("model: ").split(";")[0]
    complain(f"{reason}; using the embedded {fallback} instead")


def find_targets(
    target: int | str | list[int | str] | None, class_names: list[str] | None, num_classes: int
) -> list[int] | int:
    """Return the classes that TARGET or --target names.

    Returns:
        The indices of the classes, or N for the N most probable classes of every photo ("topN"; 1 for None).

    Raises:
        ValueError: if a class is not found or named twice, or there are too many.
    """
    if target is None:
        return 1
    words = [str(word) for word in (target if isinstance(target, (list, tuple)) else [target])]
    most = min(MAX_CLASSES, num_classes)
    if not 1 <= len(words) <= most:
        raise ValueError(f"target: expected 1 to {most} classes, got {len(words)}")
    indices = []
    for word in words:
        if top := re.fullmatch(r"top *(\d+)", word.strip().lower()):
            if len(words) > 1:
                raise ValueError(f"target: {word!r} cannot be combined with other classes; pass it alone")
            if not 1 <= int(top[1]) <= most:
                raise ValueError(f"target: expected top1 to top{most}, got {word}")
            return int(top[1])
        index = find_class(word, class_names, num_classes)
        if index in indices:
            raise ValueError(f"target: {words[indices.index(index)]!r} and {word!r} are the same class; name it once")
        indices.append(index)
    return indices
