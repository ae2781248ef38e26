"""Options that the scripts share, and what they name: the device, the model, the classes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from daam_core import VARIANTS
from models import LoadedModel, WeightsUnavailable, architecture_of, find_class, load
from models.weights import first_line

MAX_CLASSES = 10  # of one photo


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def flow_options(
    description: str,
    *,
    image: str | Path,
    model: str,
    checkpoint: str | Path | None,
    target: int | str | list[int | str] | None,
    output_dir: str | Path,
    device: str,
    dtype: str,
    memory: str,
    batch: int,
    norm: bool,
    rows: str,
    variant: str,
    size: str | int,
    duration: int,
) -> Parser:
    """A parser with the options of every script that explains photos; the arguments are the defaults."""
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        metavar="PATH",
        default=[image],
        help=f"image files or folders of them (default: {Path(image).name})",
    )
    add(
        "--model",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"timm name, hf:NAME, torchvision:NAME or embedded model (default: {model})",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        default=checkpoint,
        help=f"local weights, .safetensors or .pth (default: {checkpoint or 'those of the model'})",
    )
    add(
        "--target",
        nargs="+",
        metavar="CLASS",
        default=target,
        help="class index or name; several are drawn side by side; top3: the three most probable ones of every photo "
        f"(default: {'the predicted class' if target is None else target})",
    )
    add("--output-dir", metavar="DIR", default=output_dir, help="where the results go (default: %(default)s)")
    add("--device", default=device, help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add(
        "--dtype",
        type=one_of("float32", "bfloat16", "float16"),
        metavar="{float32,bfloat16,float16}",
        default=dtype,
        help="the model computes in it; its weights stay float32 (default: %(default)s)",
    )
    add(
        "--memory",
        type=one_of("auto", "fast", "low"),
        metavar="{auto,fast,low}",
        default=memory,
        help="fast keeps what the gradient needs, low computes it again, auto decides (default: %(default)s)",
    )
    add("--batch", type=number(int, 1, 4096, "photos"), metavar="N", default=str(batch),
        help="photos that the model sees at once (default: %(default)s)")  # fmt: skip
    add(
        "--norm",
        action=argparse.BooleanOptionalAction,
        default=norm,
        help="min-max normalise every block's map (default: %(default)s)",
    )
    add(
        "--rows",
        type=one_of("class", "patches"),
        metavar="{class,patches}",
        default=rows,
        help="which queries are decomposed: the class token, or all tokens, for models that average the patches "
        "(default: %(default)s)",
    )
    add(
        "--variant",
        type=one_of(*VARIANTS),
        metavar=f"{{{','.join(VARIANTS)}}}",
        default=variant,
        help="paper; signed: coefficients keep their sign, as they do without a classifier anyway; heads: signed, and "
        "ReLU for each head before they are added (default: %(default)s)",
    )
    add(
        "--size",
        type=frame_size,
        default=str(size),
        help="size of the frames: image, model, or the longer side in pixels (default: %(default)s)",
    )
    add("--duration", type=number(int, 20, 60_000, "milliseconds"), metavar="MS", default=str(duration),
        help="milliseconds a frame (default: %(default)s)")  # fmt: skip
    return parser


def number(kind: type, low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """For `add_argument(type=...)`: a number within limits."""

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
    """For `add_argument(type=...)`: `choices` that also hold for the constant of a script."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"expected {', '.join(words[:-1])} or {words[-1]}, got {text!r}")
        return text

    return parse


def frame_size(text: str) -> str | int:
    if text in ("image", "model"):
        return text
    if text.isdigit() and 32 <= int(text) <= 8192:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected image, model, or 32 to 8192 pixels, got {text!r}")


def find_device(name: str) -> torch.device:
    """The device of that name; of "auto" and "cuda", under `torchrun`, the GPU of this rank.

    Raises:
        ValueError: when it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # on "meta" there are none
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {first_line(error)}") from None


def warn_fallback(error: WeightsUnavailable, instead: str) -> None:
    """Say, in one line, why a default cannot be had and what takes its place."""
    reason = str(error).removeprefix("model: ").split(";")[0]
    print(f"{reason}; going on with the embedded {instead}", file=sys.stderr)


def load_named(options: argparse.Namespace, default: str) -> LoadedModel:
    """The model that --model and --checkpoint name; a checkpoint that says what it is needs no name."""
    name = getattr(options, "model", None)
    if name is None and not (options.checkpoint is not None and architecture_of(options.checkpoint)):
        name = default
    return load(name, options.checkpoint, find_device(options.device))


def find_targets(
    target: int | str | list[int | str] | None, class_names: list[str] | None, num_classes: int
) -> list[int] | int:
    """What TARGET or --target asks for: the indices of the classes that it names, or N for the N most probable ones of
    every photo (of "topN", and 1 of None).

    Raises:
        ValueError: when a class is not found or named twice, or there are too many.
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
                raise ValueError(f"target: {word!r} goes with no other class; give it alone")
            if not 1 <= int(top[1]) <= most:
                raise ValueError(f"target: expected top1 to top{most}, got {word}")
            return int(top[1])
        index = find_class(word, class_names, num_classes)
        if index in indices:
            raise ValueError(f"target: {words[indices.index(index)]!r} and {word!r} are the same class; name it once")
        indices.append(index)
    return indices


def run(main: Callable[[], int]) -> None:
    """Call `main` and leave with its exit code; 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
