"""What the scripts share: options, the device, the loop over the photos, the names and the manifest of the results."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, cycle
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from daam_core import (
    VARIANTS,
    AttentionFlow,
    UnsupportedModel,
    evolution_picture,
    logit_lens,
    overlay,
    render,
    save_flow,
)
from models import LoadedModel, WeightsUnavailable, architecture_of, find_class, load, sha256
from models.images import find_images, read_image, resize_longest_side
from models.weights import first_line

PACKAGES = ("torch", "torchvision", "timm", "numpy", "cv2", "PIL")
LARGE = 4_000_000  # pixels above which twelve frames take a while
MAX_CLASSES = 10  # of one photo
OUT_OF_MEMORY = "out of memory|ALLOC_FAILED|allocate memory|not enough memory"  # CUDA and MPS, cuBLAS, CPU, Windows
MAX_NAME_LENGTH = 80  # characters of the classes in the name of a folder


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


# ----------------------------------------------------------------------------------------------------------------------
# The evolution of the decision
# ----------------------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------------------
# Photos and results
# ----------------------------------------------------------------------------------------------------------------------


def explain_photos(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], tuple],
    explain: Callable[..., tuple],
    save: Callable[..., None],
) -> int:
    """Explain every photo that the options name; what cannot be done is a line on stderr, the others are still done.

    The model sees --batch photos at once. They are read again one by one to be drawn, so that no more than one of them
    is held.

    Args:
        options: of `flow_options`.
        prepare: options -> (loaded model, ...), what every photo needs; called when there are photos.
        explain: (images (B, 3, H, W), *prepared, options) -> what `save` needs.
        save: (file, folder, index, *explained, *prepared, options) -> None, writes the results of one photo of the
            batch; `folder` has no class yet.

    Returns:
        The exit code.
    """
    failures = 0

    def failed(error: Exception, file: Path | None = None) -> None:
        nonlocal failures
        failures += 1
        tqdm.write(f"error: {error}" + (f" ({file})" if file and str(file) not in str(error) else ""), file=sys.stderr)

    files: list[Path] = []
    for path in options.image:
        try:
            files += find_images(path)
        except (ValueError, OSError) as error:
            failed(error)
    files = list(dict.fromkeys(files))
    if not files:
        return 2
    try:
        prepared = prepare(options)
    except (ValueError, OSError) as error:
        failed(error)
        return 2
    loaded, place = prepared[0], Path(options.output_dir, file_name(prepared[0].name))
    device = next(loaded.model.parameters()).device

    def explain_batch(batch: dict[Path, Tensor]) -> None:
        try:
            with precision(device, options.dtype):
                explained = explain(torch.stack([*batch.values()]).to(device), *prepared, options)
        except UnsupportedModel:
            raise
        except ValueError as error:
            if len(batch) == 1:
                failed(error, *batch)
                bar.update()
            else:
                for file, images in batch.items():  # to see whose fault it is
                    explain_batch({file: images})
            return
        for index, file in enumerate(batch):
            try:
                save(file, place / names[file], index, *explained, *prepared, options)
            except (ValueError, OSError) as error:
                failed(error, file)
            except MemoryError:
                failed(ValueError("size: its frames need more memory than there is; try --size 1024"), file)
            bar.update()

    names = dict(zip(files, result_names(files)))
    with tqdm(total=len(files), unit="image", disable=len(files) == 1) as bar:
        try:
            for start in range(0, len(files), options.batch):
                batch = {}
                for file in files[start : start + options.batch]:
                    try:
                        batch[file] = loaded.transform(read_image(file))
                    except ValueError as error:
                        failed(error)
                        bar.update()
                if batch:
                    explain_batch(batch)
        except UnsupportedModel as error:
            failed(error)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                raise
            photos = f"{len(batch)} photos at once need" if len(batch) > 1 else "one photo needs"
            failed(ValueError(
                f"batch: {photos} more memory than {device} has; try a smaller --batch, --memory low or --size 1024"
            ))  # fmt: skip
    return 2 if failures else 0


def precision(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    """Where the model computes in that dtype."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


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
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
