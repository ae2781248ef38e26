"""python -m memorybank build | eval | info: make a memory bank, measure it, look at it; `--help` after each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from command_line.options import Parser, find_device, number, run
from memorybank import MIN_TEMPERATURE, MemoryBank, read_pair
from memorybank.build import DTYPES, WORKERS, build
from models import architecture_of, load
from models.weights import first_line

BUILD = """one command for a folder of your own:
  python -m memorybank build --model vit_small_patch8_224.dino --train FOLDER --out memorybank/mine
on several GPUs or machines, each of which takes its share; the result is the same bytes:
  torchrun --standalone --nproc-per-node 4 -m memorybank build ...
A build that was killed goes on when the same command is given again."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m memorybank", description="Make a memory bank, measure it, look at it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | eval | info")

    make = commands.add_parser(
        "build",
        help="an image folder in, a bank out",
        description="Build a memory bank of an image folder, one sub-folder a class.",
        epilog=BUILD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, shown = make.add_argument, "(default: %(default)s)"
    add("--model", metavar="NAME", help="timm name, hf:NAME, torchvision:NAME or embedded model")
    add("--checkpoint", metavar="FILE", help="local weights, .safetensors or .pth")
    add("--train", type=Path, required=True, metavar="FOLDER", help="images, one sub-folder a class")
    add("--test", type=Path, metavar="FOLDER", help="other images of the same classes, for eval")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of the bank")
    add("--dtype", choices=DTYPES, default="float16", help=f"of the features {shown}")
    add("--batch-size", type=number(int, 1, 65536), default=64, metavar="N", help=f"images a batch {shown}")
    add(
        "--workers",
        type=number(int, 0, 1024),
        default=WORKERS,
        metavar="N",
        help=f"reading processes for each rank {shown}",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--strict", action="store_true", help="stop at an image that cannot be read")

    measure = commands.add_parser(
        "eval",
        help="k-NN accuracy of the test pair",
        description="Classify the test pair of a bank by its train pair, as DINO's eval_knn.py reports it.",
        allow_abbrev=False,
    )
    add = measure.add_argument
    add("bank", type=Path, metavar="DIR")
    add(
        "--k",
        type=number(int, 1, 10**9),
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="neighbours (default: 10 20 100 200)",
    )
    add(
        "--temperature",
        type=number(float, MIN_TEMPERATURE, 100),
        default=0.07,
        metavar="T",
        help=f"of the votes {shown}",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")

    show = commands.add_parser(
        "info", help="what a bank holds", description="Say what a bank holds.", allow_abbrev=False
    )
    show.add_argument("bank", type=Path, metavar="DIR")

    options = parser.parse_args(arguments)
    try:
        {"build": run_build, "eval": run_eval, "info": run_info}[options.command](options)
    except (ValueError, OSError, RuntimeError) as error:  # the last: a full disk, another rank that failed
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def run_build(options: argparse.Namespace) -> None:
    if options.model is None and (options.checkpoint is None or architecture_of(options.checkpoint) is None):
        raise ValueError("model: name one with --model, or give a --checkpoint that names its architecture")
    loaded = load(options.model, options.checkpoint, find_device(options.device))
    bank = build(loaded, options.train, options.out, options.test, options.dtype, options.batch_size, options.workers,
                 options.strict)  # fmt: skip
    if not bank:  # another rank has it
        return
    for split in ("train", "test"):
        unreadable = bank.get(split, {}).get("unreadable", {})
        if unreadable:
            print(f"{split}: left out {len(unreadable)} images that cannot be read:")
            print("\n".join(f"  {reason}" for reason in unreadable.values()))
    run_info(argparse.Namespace(bank=options.out))


@torch.inference_mode()
def run_eval(options: argparse.Namespace) -> None:
    bank = MemoryBank.load(options.bank, find_device(options.device))
    if not (options.bank / "testfeat.pth").is_file():
        raise ValueError(f"bank: {options.bank} has no test pair; build it with --test FOLDER")
    features, labels = read_pair(options.bank, "test")
    if labels.max() >= bank.num_classes:
        raise ValueError(
            f"bank: {options.bank / 'testlabels.pth'} has the label {labels.max()}, "
            f"but there are {bank.num_classes} classes"
        )
    wanted = sorted(set(options.k))
    fitting = [k for k in wanted if k <= len(bank.labels)]
    if not fitting:
        raise ValueError(f"k: expected 1 to {len(bank.labels)}, the number of features in the bank")
    right = {k: [0, 0] for k in fitting}
    for start in tqdm(range(0, len(labels), 256), desc="eval", unit="batch"):
        part = slice(start, start + 256)
        nearest = bank.nearest(features[part].float().to(bank.features.device), fitting[-1])
        for k in fitting:
            votes = bank.vote(*(of_each[:, :k] for of_each in nearest), options.temperature).votes
            top = votes.topk(min(5, votes.shape[1]))
            hit = (top.indices == labels[part, None].to(votes.device)) & (top.values > 0)  # no vote, no hit
            right[k][0] += int(hit[:, 0].sum())
            right[k][1] += int(hit.any(1).sum())
    print(f"{options.bank}: {len(labels)} test images, T = {options.temperature:g}")
    for k in fitting:
        top1, top5 = (100 * count / len(labels) for count in right[k])
        print(f"  k = {k:<4} top-1 {top1:6.2f} %   top-5 {top5:6.2f} %")
    for k in wanted[len(fitting) :]:
        print(f"  k = {k:<4} the bank has {len(bank.labels)} features")


def run_info(options: argparse.Namespace) -> None:
    bank = MemoryBank.load(options.bank)
    count, width = bank.features.shape
    sizes = torch.bincount(bank.labels, minlength=bank.num_classes)
    lines = {
        "model": bank.metadata.get("model", "not known (no bank.json)"),
        "features": f"{count} x {width}, {str(bank.features.dtype).removeprefix('torch.')}, "
        f"{bank.features.nbytes / 1e6:.1f} MB",
        "classes": f"{bank.num_classes}, of {sizes.min()} to {sizes.max()} images",
        "test": "none",
    }
    if (options.bank / "testfeat.pth").is_file():
        lines["test"] = f"{len(read_pair(options.bank, 'test')[1])} images"
    for key in ("checkpoint", "transform", "versions"):
        if value := bank.metadata.get(key):
            lines[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
    print(options.bank)
    print("\n".join(f"  {name:<10} {text}" for name, text in lines.items()))


if __name__ == "__main__":
    run(main)
