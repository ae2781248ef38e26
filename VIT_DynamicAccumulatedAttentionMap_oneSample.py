"""Dynamic Accumulated Attention Map of a Vision Transformer with a classifier, for one photo, several, or a folder.

    python VIT_DynamicAccumulatedAttentionMap_oneSample.py
    python VIT_DynamicAccumulatedAttentionMap_oneSample.py --image photo.jpg --target "tabby cat"

Edit the constants or give the options of the same names. For every photo the script prints the five most probable
classes and writes OUTPUT_DIR/<model>/<image>-<class>/: flow.gif, frames/, sheet.png, maps.npz and flow.json.
Exit code: 0, or 2 when something could not be done: one line on stderr says what, and the other photos are still done.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import sys
from functools import cache
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from daam_core import UnsupportedModel, attention_flow, save_flow
from models import LoadedModel, WeightsUnavailable, architecture_of, find_class, load
from models.images import find_images, read_image

# What to explain: a file, or a folder of images.
IMAGE = Path(__file__).parent / ".img" / "coffee.png"

# The model: any timm Vision Transformer whose head reads the class token (its weights are fetched by timm), or the
# embedded "vit_small_patch14_caltech101". Where the weights of the default cannot be had, the embedded model steps in.
MODEL = "deit_small_patch16_224"

# A local file of weights for MODEL (.safetensors, .pth), or None.
CHECKPOINT = None

# The class to explain: an index, a name ("tabby cat"), or None for the predicted class of every photo.
TARGET = None

# Where the results go.
OUTPUT_DIR = "results"

# "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
DEVICE = "auto"

# Min-max normalise the map of every block before it is accumulated (off in the paper).
NORM = False

# Size of the frames: "image" is the photo's own, "model" the square that the model sees (as in the paper), and a number
# the longer side in pixels (large photos make large GIFs).
SIZE = "image"

# Milliseconds a frame of the GIF; the last one stays three times as long.
DURATION = 400

# Not to be edited: the MODEL that is replaced where its weights cannot be had, and by what. A model you name is not.
DEFAULT, FALLBACK = "deit_small_patch16_224", "vit_small_patch14_caltech101"

PACKAGES = ("torch", "torchvision", "timm", "numpy", "cv2", "PIL")
LARGE = 4_000_000  # pixels above which twelve frames take a while


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        metavar="PATH",
        default=[IMAGE],
        help=f"image files or folders of them (default: {Path(IMAGE).name})",
    )
    add("--model", metavar="NAME", default=argparse.SUPPRESS, help=f"timm name or embedded model (default: {MODEL})")
    add(
        "--checkpoint",
        metavar="FILE",
        default=CHECKPOINT,
        help="local weights, .safetensors or .pth (default: %(default)s)",
    )
    add(
        "--target",
        metavar="CLASS",
        default=TARGET,
        help=f"class index or name (default: {'the predicted class' if TARGET is None else TARGET})",
    )
    add("--output-dir", metavar="DIR", default=OUTPUT_DIR, help="where the results go (default: %(default)s)")
    add("--device", default=DEVICE, help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add(
        "--norm",
        action=argparse.BooleanOptionalAction,
        default=NORM,
        help="min-max normalise every block's map (default: %(default)s)",
    )
    add(
        "--size",
        type=frame_size,
        default=SIZE,
        help="size of the frames: image, model, or the longer side in pixels (default: %(default)s)",
    )
    add("--duration", type=int, metavar="MS", default=DURATION, help="milliseconds a frame (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 20 <= options.duration <= 60_000:
        parser.error(f"--duration: expected 20 to 60000 milliseconds, got {options.duration}")
    return options


def frame_size(text: str) -> str | int:
    if text in ("image", "model"):
        return text
    if text.isdigit() and 32 <= int(text) <= 8192:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected image, model, or 32 to 8192 pixels, got {text!r}")


def load_model(options: argparse.Namespace) -> LoadedModel:
    """The model that the options ask for, or the embedded one in place of a default whose weights cannot be had."""
    device = find_device(options.device)
    named = getattr(options, "model", None)
    if options.checkpoint is not None and named is None:
        loaded = load(None if architecture_of(options.checkpoint) else MODEL, options.checkpoint, device)
    elif options.checkpoint is not None or named is not None or MODEL != DEFAULT:
        loaded = load(named or MODEL, options.checkpoint, device)
    else:
        try:
            loaded = load(DEFAULT, None, device)
        except WeightsUnavailable as error:
            reason = str(error).removeprefix("model: ").split(";")[0]
            print(f"{reason}; going on with the embedded {FALLBACK}", file=sys.stderr)
            loaded = load(FALLBACK, None, device)
    if loaded.model.num_classes == 0:
        raise ValueError(f"model: {loaded.name} has no classifier, so there is no class score to explain")
    return loaded


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # on "meta" there are none
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def explain(file: Path, folder: Path, loaded: LoadedModel, target: int | None, options: argparse.Namespace) -> None:
    """Explain one photo, print its classes and write its results to `folder`-<class>."""
    photo = read_image(file)
    device = next(loaded.model.parameters()).device
    images = loaded.transform(photo).unsqueeze(0).to(device)
    flow = attention_flow(loaded.model, images, target, norm=options.norm)

    scores, index = flow.output[0].float(), flow.target.item()
    probabilities = scores.softmax(0)

    def describe(k: int) -> dict:
        name = loaded.class_names[k] if loaded.class_names else f"class {k}"
        return {"index": k, "name": name, "score": scores[k].item(), "probability": probabilities[k].item()}

    top5 = [describe(k) for k in scores.topk(min(5, len(scores))).indices.tolist()]
    explained = describe(index)
    short_name = explained["name"].split(", ")[0]
    manifest = {
        "method": "Dynamic Accumulated Attention Map",
        "model": loaded.name,
        "checkpoint": loaded.checkpoint and {"file": loaded.checkpoint.name, "sha256": sha256(loaded.checkpoint)},
        "image": {"file": str(file), "sha256": sha256(file), "width": photo.width, "height": photo.height},
        "target": explained | {"requested": options.target},
        "top5": top5,
        "input_size": list(images.shape[1:]),
        "num_prefix_tokens": loaded.model.num_prefix_tokens,
        "settings": {"norm": options.norm, "size": options.size, "duration": options.duration, "device": str(device)},
        "versions": {"python": platform.python_version()} | {name: sys.modules[name].__version__ for name in PACKAGES},
    }
    if options.size == "model":
        photo = photo.resize(loaded.size[::-1], Image.Resampling.BICUBIC)
    elif options.size != "image":
        photo = ImageOps.contain(photo, (options.size, options.size), Image.Resampling.BICUBIC)
    folder = folder.with_name(f"{folder.name}-{file_name(short_name)}")
    caption = f"{short_name}: {explained['probability']:.1%}\n{loaded.name}"
    if index != top5[0]["index"]:
        caption += f"\npredicted: {top5[0]['name'].split(', ')[0]} {top5[0]['probability']:.1%}"
    tqdm.write("\n".join([f"{file}", *(f"  {c['probability']:6.1%}  {c['index']:>4}  {c['name']}" for c in top5)]))
    if photo.width * photo.height > LARGE:
        tqdm.write(f"  frames of {photo.width} x {photo.height} pixels take a while; --size 1024 is faster")
    save_flow(folder, photo, flow, caption=caption, manifest=manifest, duration=options.duration)
    tqdm.write(f"  explained: {index} {short_name} -> {folder / 'flow.gif'}")


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


@cache
def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
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
        loaded = load_model(options)
        target = None
        if options.target is not None:
            target = find_class(str(options.target), loaded.class_names, loaded.model.num_classes)
    except ValueError as error:
        failed(error)
        return 2

    names = result_names(files)
    for file, name in tqdm(zip(files, names), total=len(files), unit="image", disable=len(files) == 1):
        try:
            explain(file, Path(options.output_dir, file_name(loaded.name), name), loaded, target, options)
        except UnsupportedModel as error:
            failed(error)
            break
        except (ValueError, OSError) as error:
            failed(error)
    return 2 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
