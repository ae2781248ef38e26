"""Options of the scripts with their defaults, and what they name: the device, the model, the classes, the folder."""

from __future__ import annotations

import argparse
import errno
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from command_line.terminal import complain
from daam_core import SCORES, VARIANTS
from daam_vit.text import printable
from memorybank import MIN_TEMPERATURE
from models import LoadedModel, WeightsUnavailable, architecture_of, find_class, load
from models.classes import MAX_DIGITS, MAX_SHOWN, classes_called, is_whole_name
from models.weights import usable_device

MAX_CLASSES = 10
"""Largest number of classes that are explained side by side."""
MAX_DEPTH = 100
"""Largest number of nested folders that are created for the results."""
SCORE_HELP = {
    "logit": "logit is its score, as in the paper",
    "importance": "importance is how much every dimension of the feature agrees with the neighbours of the class, as "
    "in the paper",
    "log_odds": "log_odds is log(p / (1 - p)), which sets it against all other classes",
}
"""Word of --score -> what it explains of a class."""


# ----------------------------------------------------------------------------------------------------------------------
# Parsers
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parser that reports an error as one line, without the usage."""

    paper_score = "logit"
    """What the paper explains of a class: the default of --score."""

    def error(self, message: str):
        """Exit with code 2."""
        complain(f"{self.prog}: error: {printable(message, 500)} (--help shows the options)")
        self.exit(2)


def flow_options(
    description: str,
    *,
    image: str | Path | list[str | Path],
    model: str,
    checkpoint: str | Path | None,
    target: int | str | list[int | str] | None,
    output_dir: str | Path,
    scores: tuple[str, str] = SCORES,
) -> Parser:
    """Return a parser with the options of every script that explains photos; `parse` uses it.

    The arguments are the constants that people edit in a script, and the words of --score, the paper's first. All
    other defaults are set here.
    """
    parser = Parser(description=description, allow_abbrev=False)
    parser.paper_score = scores[0]
    add = parser.add_argument
    # fmt: off
    add("--image", nargs="+", metavar="PATH", default=image,
        help=f"image files, or folders of images (default: {_in_help(image)})")
    add("--model", metavar="NAME",
        help=f"timm name, hf:NAME, torchvision:NAME or embedded model (default: {_in_help(model)})")
    add("--checkpoint", metavar="FILE", default=checkpoint,
        help=f"local weights, .safetensors or .pth (default: {_in_help(checkpoint or 'the weights of the model')})")
    add("--target", nargs="+", metavar="CLASS", default=target,
        help="class to explain, by index or name; several are drawn side by side; top3 explains the three most "
        "probable classes of every photo "
        f"(default: {_in_help('the predicted class' if target is None else target)})")
    add("--output-dir", metavar="DIR", default=output_dir,
        help=f"folder of the results (default: {_in_help(output_dir)})")
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
        "a classifier; heads does so too, and takes ReLU head by head; relevance shows the evidence, for the class and "
        "against it, that the patches hold when a block begins, by the rules of AttnLRP (default: %(default)s)")
    add("--score", type=one_of(*scores), metavar=f"{{{','.join(scores)}}}",
        help=f"what is explained of the class: {'; '.join(SCORE_HELP[word] for word in scores)} "
        f"(default: log_odds for --variant relevance, {scores[0]} otherwise)")
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
        f"(default: {_in_help(bank or 'the bank of the model')})")
    add("--k", type=count, metavar="N", default=20, help="number of neighbours that vote (default: %(default)s)")
    add("--temperature", type=number(float, MIN_TEMPERATURE, 100), metavar="T", default=0.07,
        help="temperature of the votes (default: %(default)s)")
    add("--target-k", type=count, metavar="N", default=200,
        help="number of neighbours that are searched for a class named by --target (default: %(default)s)")
    # fmt: on


def parse(parser: Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, and check the constants of the script that no option replaces, which may have any type.

    In the result, `image` is a list of paths, `target` a list of names and indices, or None, and `score` a word.
    """
    options = parser.parse_args(arguments)
    try:
        if not (images := _listed(options.image)):
            raise ValueError("image: there is none; pass a file or a folder")
        options.image = [_path("image", image) for image in images]
        options.output_dir = _path("output-dir", options.output_dir)
        for name in {"checkpoint", "bank"} & vars(options).keys():
            value = getattr(options, name)
            setattr(options, name, None if value is None else _path(name, value))
        options.target = target_words(options.target)
        options.score = options.score or ("log_odds" if options.variant == "relevance" else parser.paper_score)
        if options.variant == "relevance" and options.norm:
            raise ValueError("norm: min-max would move the zero of a relevance flow, which is signed; leave it out")
        if options.variant == "relevance" and options.score == "importance":
            raise ValueError(
                "score: 'importance' is not the gradient of a score, which the relevance flow needs; pass log_odds"
            )
    except ValueError as error:
        parser.error(str(error))
    return options


def _path(argument: str, value: object) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{argument}: expected a path, got {printable(repr(value), 80)}")
    try:
        return path(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{argument}: {error}") from None


def _in_help(value: object) -> str:
    """Return a default as the help shows it, where "%" begins a placeholder."""
    shown = value.name if isinstance(value, Path) else str(value)
    return printable(shown, 80).replace("%", "%%")


def number(kind: type, low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """Return a `type` for `add_argument` that takes a number within limits."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected {low:,.10g} to {high:,.10g} {unit}".rstrip() + f", got {printable(text, 80)}"
            )
        return value

    return parse


def path(text: str) -> Path:
    """Parse a path, as a `type` for `add_argument`; refuse an empty one, which would mean the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"'{printable(text, 80)}' is no path; pass the name of a file or a folder")
    return Path(text)


def one_of(*words: str) -> Callable[[str], str]:
    """Return a `type` for `add_argument` that takes one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            expected = f"{', '.join(words[:-1])} or {words[-1]}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{printable(text, 80)}'")
        return text

    return parse


def frame_size(text: str) -> str | int:
    """Parse the value of --size."""
    if text in ("image", "model"):
        return text
    if re.fullmatch("[0-9]{2,4}", text) and 32 <= int(text) <= 8192:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected image, model, or 32 to 8192 pixels, got '{printable(text, 80)}'")


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
    return usable_device(name)


def precision(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    """Return a context in which the model computes in that dtype."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


def load_named(options: argparse.Namespace, default: str) -> LoadedModel:
    """Load the model that --model and --checkpoint name.

    Without --model, a checkpoint that names its architecture decides; otherwise it is the default.
    """
    name = options.model
    if not isinstance(default, str | None):
        raise ValueError(f"model: expected a name, got {printable(repr(default), 80)}")
    if name is None and not (options.checkpoint is not None and architecture_of(options.checkpoint)):
        name = default
    return load(name, options.checkpoint, find_device(options.device))


def warn_fallback(error: WeightsUnavailable, fallback: str) -> None:
    """Print one line that says why a default is not available and what replaces it."""
    reason = str(error).removeprefix("model: ").split(";")[0]
    complain(f"{reason}; using the embedded {fallback} instead")


def target_words(target: object) -> list[int | str] | None:
    """Return what TARGET or --target names as a list of names and indices, or None for the predicted class.

    Raises:
        ValueError: if it is of another type.
    """
    if hasattr(target, "tolist"):  # a value of numpy or torch
        target = target.tolist()
    if target is None:
        return None
    words = [word.tolist() if hasattr(word, "tolist") else word for word in _listed(target)]
    for word in words:
        if isinstance(word, bool) or not isinstance(word, (int, str)):
            raise ValueError(f"target: expected names or indices of classes, got {printable(repr(word), MAX_SHOWN)}")
    return [_decoded(word) if isinstance(word, str) else word for word in words]


def _decoded(word: str) -> str:
    """Return a word of the command line decoded as UTF-8, whatever the locale; unchanged if it is not UTF-8."""
    with suppress(UnicodeError):
        return os.fsencode(word).decode()
    return word


def find_targets(target: object, class_names: list[str] | None, num_classes: int) -> list[int] | int:
    """Return the classes that TARGET or --target names.

    Args:
        target: a name, an index, several of them, "topN", or None; an integer is always an index, and a text is a
            name if a class has it.
        class_names: one name per class; None if they are unknown.
        num_classes: number of classes.

    Returns:
        The indices of the classes, or N for the N most probable classes of every photo ("topN"; 1 for None).

    Raises:
        ValueError: if a class is not found or named twice, if there are too many, or a text has two readings.
    """
    words = target_words(target)
    if words is None:
        return 1
    most = min(MAX_CLASSES, num_classes)
    if not 1 <= len(words) <= most:
        raise ValueError(f"target: expected 1 to {most} classes, got {len(words)}")
    indices = []
    for word in words:
        if (top := _top(word, class_names)) is not None:
            if len(words) > 1:
                raise ValueError(f"target: '{word}' cannot be combined with other classes; pass it alone")
            if not 1 <= top <= most:
                raise ValueError(f"target: expected top1 to top{most}, got {printable(word, MAX_SHOWN)}")
            return top
        index = find_class(word, class_names, num_classes)
        if index in indices:
            both = (printable(str(words[i]), MAX_SHOWN) for i in (indices.index(index), len(indices)))
            raise ValueError("target: '{}' and '{}' are the same class; name it once".format(*both))
        indices.append(index)
    return indices


def _top(word: int | str, class_names: list[str] | None) -> int | None:
    """Return the N of "topN", or None for the name or the index of a class."""
    top = isinstance(word, str) and re.fullmatch("top *([0-9]+)", word.strip().lower())
    if not top or is_whole_name(word, class_names):
        return None
    if alike := classes_called(word, class_names):
        name = printable(class_names[alike[0]], MAX_SHOWN)
        raise ValueError(
            f"target: '{word}' is a number of classes and a name of class {alike[0]}; pass '{name}' for it"
        )
    return int(top[1]) if len(top[1]) <= MAX_DIGITS else 10**MAX_DIGITS


def _listed(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_output_dir(folder: Path) -> None:
    """Raise a ValueError unless files can be written to a folder, or to the existing one that would hold it."""
    missing: list[str] = []
    try:
        for existing in (folder.absolute(), *folder.absolute().parents):
            try:
                os.lstat(existing)
                break
            except FileNotFoundError:
                missing.append(existing.name)
        if len(missing) > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        for name in missing:
            with suppress(FileNotFoundError):
                os.lstat(existing / name)  # it may be too long
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1 << 16))  # does not fit on a full disk
    except OSError as error:
        reason = f"{printable(str(folder), 200)}: {error.strerror}"
        raise ValueError(f"output-dir: cannot write to {reason}; pass another folder") from None
