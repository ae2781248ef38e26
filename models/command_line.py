"""What the scripts share: options, the device, the loop over the photos, the names and the manifest of the results."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from daam_core import AttentionFlow, UnsupportedModel, save_flow
from models import LoadedModel, WeightsUnavailable, architecture_of, load, sha256
from models.images import find_images

PACKAGES = ("torch", "torchvision", "timm", "numpy", "cv2", "PIL")
LARGE = 4_000_000  # pixels above which twelve frames take a while


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def flow_options(
    description: str,
    *,
    image: str | Path,
    model: str,
    checkpoint: str | Path | None,
    target: int | str | None,
    output_dir: str | Path,
    device: str,
    norm: bool,
    rows: str,
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
        metavar="CLASS",
        default=target,
        help=f"class index or name (default: {'the predicted class' if target is None else target})",
    )
    add("--output-dir", metavar="DIR", default=output_dir, help="where the results go (default: %(default)s)")
    add("--device", default=device, help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add(
        "--norm",
        action=argparse.BooleanOptionalAction,
        default=norm,
        help="min-max normalise every block's map (default: %(default)s)",
    )
    add(
        "--rows",
        choices=["class", "patches"],
        default=rows,
        help="which queries are decomposed: the class token, or all tokens, for models that average the patches "
        "(default: %(default)s)",
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
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def going_on(error: WeightsUnavailable, instead: str) -> None:
    """Say, in one line, why a default cannot be had and what takes its place."""
    reason = str(error).removeprefix("model: ").split(";")[0]
    print(f"{reason}; going on with the embedded {instead}", file=sys.stderr)


def load_named(options: argparse.Namespace, default: str) -> LoadedModel:
    """The model that --model and --checkpoint name; a checkpoint that says what it is needs no name."""
    name = getattr(options, "model", None)
    if name is None and not (options.checkpoint is not None and architecture_of(options.checkpoint)):
        name = default
    return load(name, options.checkpoint, find_device(options.device))


# ----------------------------------------------------------------------------------------------------------------------
# Photos and results
# ----------------------------------------------------------------------------------------------------------------------


def explain_photos(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], tuple],
    explain: Callable[..., None],
) -> int:
    """Explain every photo that the options name; what cannot be done is a line on stderr, the others are still done.

    Args:
        options: of `flow_options`.
        prepare: options -> (loaded model, ...), what every photo needs; called when there are photos.
        explain: (file, folder, *prepared, options) -> None, writes the results of one photo; `folder` has no class yet.

    Returns:
        The exit code.
    """
    failures = 0

    def failed(error: Exception) -> None:
        nonlocal failures
        failures += 1
        tqdm.write(f"error: {error}", file=sys.stderr)

    files: list[Path] = []
    for path in options.image:
        try:
            files += find_images(path)
        except ValueError as error:
            failed(error)
    files = list(dict.fromkeys(files))
    if not files:
        return 2
    try:
        loaded, *more = prepare(options)
    except ValueError as error:
        failed(error)
        return 2

    names = result_names(files)
    for file, name in tqdm(zip(files, names), total=len(files), unit="image", disable=len(files) == 1):
        try:
            explain(file, Path(options.output_dir, file_name(loaded.name), name), loaded, *more, options)
        except UnsupportedModel as error:
            failed(error)
            break
        except (ValueError, OSError) as error:
            failed(error)
    return 2 if failures else 0


def manifest(
    file: Path,
    photo: Image.Image,
    images: Tensor,
    loaded: LoadedModel,
    flow: AttentionFlow,
    options: argparse.Namespace,
    **more,
) -> dict:
    """What flow.json says of every flow, and `more`."""
    device = str(next(loaded.model.parameters()).device)
    return {
        "method": "Dynamic Accumulated Attention Map" + ", all-rows form" * (flow.rows == "patches"),
        "model": loaded.name,
        "checkpoint": loaded.provenance,
        "image": {"file": str(file), "sha256": sha256(file), "width": photo.width, "height": photo.height},
        **more,
        "input_size": list(images.shape[1:]),
        "decomposed": flow.decomposed,
        "num_prefix_tokens": flow.num_prefix_tokens,
        "settings": {
            "rows": flow.rows,
            "norm": options.norm,
            "size": options.size,
            "duration": options.duration,
            "device": device,
        },
        "versions": versions(*PACKAGES, *(["transformers"] if "transformers" in sys.modules else [])),
    }


def save_result(
    folder: Path,
    flow: AttentionFlow,
    photo: Image.Image,
    loaded: LoadedModel,
    options: argparse.Namespace,
    classes: list[tuple[int, str, str]],
    explained: tuple[int, str, str],
    told: dict,
    pictures: dict[str, Image.Image] | None = None,
) -> None:
    """Print the classes of a photo and write its flow to `folder`-<class>.

    Args:
        folder: without the class.
        flow: of this photo alone.
        photo: as it was read.
        classes: index, name and how sure, as a text, of the most probable ones; captions take the text up to a comma.
        explained: the same of the one that is explained.
        told: for flow.json.
        pictures: more of them, by file name.
    """
    index, name, share = explained
    name = name.split(", ")[0]
    folder = folder.with_name(f"{folder.name}-{file_name(name)}" + "-patches" * (flow.rows == "patches"))
    caption = f"{name}: {share.split(',')[0].strip()}\n{loaded.name}\n" + textwrap.fill(flow.decomposed, 34)
    if index != classes[0][0]:
        caption += f"\npredicted: {classes[0][1].split(', ')[0]} {classes[0][2].split(',')[0].strip()}"
    tqdm.write("\n".join(f"  {share}  {index:>4}  {name}" for index, name, share in classes))
    if options.size == "model":
        photo = photo.resize(loaded.size[::-1], Image.Resampling.BICUBIC)
    elif options.size != "image":
        photo = ImageOps.contain(photo, (options.size, options.size), Image.Resampling.BICUBIC)
    if photo.width * photo.height > LARGE:
        tqdm.write(f"  frames of {photo.width} x {photo.height} pixels take a while; --size 1024 is faster")
    save_flow(folder, photo, flow, caption=caption, manifest=told, duration=options.duration, pictures=pictures)
    tqdm.write(f"  explained: {index} {name} ({flow.decomposed}) -> {folder / 'flow.gif'}")


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, which are imported."""
    return {"python": platform.python_version()} | {name: sys.modules[name].__version__ for name in packages}


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


def run(main: Callable[[], int]) -> None:
    """Call `main` and leave with its exit code; 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
