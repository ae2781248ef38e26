"""Build a memory bank, evaluate it, or print what it holds: `python -m memorybank build | eval | info`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from command_line.options import Parser, find_device, number
from command_line.terminal import complain, run, say
from memorybank import MIN_TEMPERATURE, MemoryBank
from memorybank.build import DTYPES, MAX_BATCH_SIZE, MAX_WORKERS, WORKERS, build
from models import architecture_of, load
from models.weights import first_line

BUILD = """build a bank of your own photos with one command:
  python -m memorybank build --model vit_small_patch8_224.dino --train FOLDER --out memorybank/mine
on several GPUs or machines, which share the work and write the same bytes:
  torchrun --standalone --nproc-per-node 4 -m memorybank build ...
To continue a build that was killed, repeat its command."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    options = parse_options(arguments)
    try:
        {"build": run_build, "eval": run_eval, "info": run_info}[options.command](options)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a full disk, or another rank that failed
        complain(f"error: {first_line(error)}")
        return 2
    return 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command that the arguments name."""
    parser = Parser(prog="python -m memorybank", description="Build a memory bank, evaluate it, print what it holds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | eval | info")
    device = {"default": "auto", "help": "auto (a GPU if there is one), cpu, cuda, cuda:1 or mps (default: auto)"}
    shown = "(default: %(default)s)"
    # fmt: off

    add = commands.add_parser(
        "build", help="build a bank from a folder of images", epilog=BUILD, allow_abbrev=False,
        description="Build a memory bank from a folder of images with one sub-folder for each class.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_argument
    add("--model", metavar="NAME", help="timm name, hf:NAME, torchvision:NAME or embedded model")
    add("--checkpoint", metavar="FILE", help="local weights, .safetensors or .pth")
    add("--train", required=True, metavar="FOLDER", help="images, one sub-folder for each class")
    add("--test", metavar="FOLDER", help="other images of the same classes, for eval")
    add("--out", required=True, metavar="DIR", help="folder of the bank")
    add("--dtype", choices=DTYPES, default="float16", help=f"dtype of the features {shown}")
    add("--batch-size", type=number(int, 1, MAX_BATCH_SIZE), default=64, metavar="N", help=f"images in a batch {shown}")
    add("--workers", type=number(int, 0, MAX_WORKERS), default=WORKERS, metavar="N",
        help=f"processes of each rank that read images {shown}")
    add("--device", **device)
    add("--strict", action="store_true", help="stop at an image that cannot be read, instead of leaving it out")

    add = commands.add_parser(
        "eval", help="measure the k-NN accuracy on the test pair", allow_abbrev=False,
        description="Classify the test pair of a bank by its train pair, as DINO's eval_knn.py does.",
    ).add_argument
    add("bank", type=Path, metavar="DIR", help="folder of the bank")
    add("--k", type=number(int, 1, 10**9), nargs="+", default=[10, 20, 100, 200], metavar="K",
        help="numbers of neighbours that vote (default: 10 20 100 200)")
    add("--temperature", type=number(float, MIN_TEMPERATURE, 100), default=0.07, metavar="T",
        help=f"temperature of the votes {shown}")
    add("--device", **device)

    add = commands.add_parser(
        "info", help="print what a bank holds", description="Print what a bank holds.", allow_abbrev=False
    ).add_argument
    add("bank", type=Path, metavar="DIR", help="folder of the bank")
    # fmt: on
    return parser.parse_args(arguments)


def run_build(options: argparse.Namespace) -> None:
    """Build a bank, and print what it holds and which images were left out."""
    if options.model is None and (options.checkpoint is None or architecture_of(options.checkpoint) is None):
        raise ValueError("model: name one with --model, or pass a --checkpoint that names its architecture")
    loaded = load(options.model, options.checkpoint, find_device(options.device))
    bank = build(
        loaded,
        options.train,
        options.out,
        options.test,
        options.dtype,
        options.batch_size,
        options.workers,
        options.strict,
    )
    if not bank:  # another rank reports
        return
    for split in ("train", "test"):
        unreadable = bank.get(split, {}).get("unreadable", {})
        if unreadable:
            say(f"{split}: left out {len(unreadable)} images that cannot be read:")
            say(*(f"  {reason}" for reason in unreadable.values()))
    run_info(argparse.Namespace(bank=options.out))


@torch.inference_mode()
def run_eval(options: argparse.Namespace) -> None:
    """Print the top-1 and top-5 accuracy of the k nearest neighbours, for each k."""
    bank = MemoryBank.load(options.bank, find_device(options.device))
    pair = bank.read_test()
    if pair is None:
        raise ValueError(f"bank: {options.bank} has no test pair; build it with --test FOLDER")
    features, labels = pair
    wanted = sorted(set(options.k))
    fitting = [k for k in wanted if k <= len(bank.labels)]
    if not fitting:
        raise ValueError(f"k: expected 1 to {len(bank.labels)}, the number of features in the bank")
    hits = {k: [0, 0] for k in fitting}  # top-1, top-5
    for start in tqdm(range(0, len(labels), 256), desc="eval", unit="batch"):
        part = slice(start, start + 256)
        similarities, rows = bank.nearest(features[part].float().to(bank.features.device), fitting[-1])
        for k in fitting:
            votes = bank.vote(similarities[:, :k], rows[:, :k], options.temperature).votes
            top = votes.topk(min(5, votes.shape[1]))
            voted = top.values > 0  # a class without votes is no answer
            hit = (top.indices == labels[part, None].to(votes.device)) & voted
            hits[k][0] += int(hit[:, 0].sum())
            hits[k][1] += int(hit.any(1).sum())
    say(f"{options.bank}: {len(labels)} test images, T = {options.temperature:g}")
    for k in fitting:
        top1, top5 = (100 * count / len(labels) for count in hits[k])
        say(f"  k = {k:<4} top-1 {top1:6.2f} %   top-5 {top5:6.2f} %")
    for k in wanted[len(fitting) :]:
        say(f"  k = {k:<4} the bank has {len(bank.labels)} features")


def run_info(options: argparse.Namespace) -> None:
    """Print what a bank holds."""
    bank = MemoryBank.load(options.bank)
    count, width = bank.features.shape
    sizes = torch.bincount(bank.labels, minlength=bank.num_classes)
    lines = {
        "model": bank.metadata.get("model", "unknown (no bank.json)"),
        "features": f"{count} x {width}, {str(bank.features.dtype).removeprefix('torch.')}, "
        f"{bank.features.nbytes / 1e6:.1f} MB",
        "classes": f"{bank.num_classes}, of {sizes.min()} to {sizes.max()} images",
        "test": "none",
    }
    if pair := bank.read_test():
        lines["test"] = f"{len(pair[1])} images"
    for key in ("checkpoint", "transform", "versions"):
        if value := bank.metadata.get(key):
            lines[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
    say(str(options.bank))
    say(*(f"  {name:<10} {text}" for name, text in lines.items()))


if __name__ == "__main__":
    run(main)
