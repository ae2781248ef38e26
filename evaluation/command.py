"""The command: its options, the loop over the photos, and what is recorded for each of them."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from command_line.options import Parser, find_device, number, path, precision
from command_line.terminal import complain, say
from daam_core import UnsupportedModel, overlay, render
from daam_vit.ranks import current_rank, gather, on_first, shared
from daam_vit.text import printable
from evaluation.annotations import region_of
from evaluation.decision import Decision
from evaluation.explained import Explained
from evaluation.methods import EXTRA, GROUPS, METHODS, photo_seed
from evaluation.metrics import BASELINES, area, localisation, masked_photo, removal_curves, sparsity
from evaluation.mosaics import CONFIDENT, choose, play
from evaluation.photos import find_photos, name_of, path_of
from evaluation.records import RECORD, append_record, check_out, check_ranks, check_records, repair_records, running
from evaluation.report import write_report
from evaluation.sanity import check, stages
from memorybank import EMBEDDED_BANK, MemoryBank
from models import architecture_of, load, weights_sha256
from models.images import read_image
from models.schema import check_schema
from models.versions import versions
from models.weights import first_line

PACKAGES = ("torch", "timm", "numpy", "scipy", "captum")
"""Packages whose versions are recorded."""
EMBEDDED = "vit_small_patch14_caltech101"
HELP = """the photos of docs/evaluation.md:
  python -m evaluation --model embedded --images 101_ObjectCategories --list pretrainedmodels/caltech101_held_out.txt \\
      --steps 5 --blocks 60 --dtype bfloat16 --out evaluated_caltech101
on several GPUs or machines, which share the photos and one folder of results:
  torchrun --standalone --nproc-per-node 4 -m evaluation ...
To continue a run that was killed, repeat the same command. Photos come in a random order that depends on the seed,
so an unfinished run describes a random sample."""


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of the command."""
    parser = Parser(
        prog="python -m evaluation",
        description="Are the maps right? Compare explanation methods on the same photos.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, shown, count = parser.add_argument, "(default: %(default)s)", number(int, 0, 10**9)
    add(
        "--model", metavar="NAME", default="embedded", help=f"timm name, hf:NAME, torchvision:NAME, or embedded {shown}"
    )
    add("--checkpoint", type=path, metavar="FILE", help="local weights, .safetensors or .pth")
    add(
        "--bank",
        type=path,
        metavar="DIR",
        help="memory bank, for a model without a classifier (default: that of the embedded model)",
    )
    add("--images", type=path, required=True, metavar="FOLDER", help="photos, including those in sub-folders")
    add(
        "--list",
        type=path,
        metavar="FILE",
        help="use only the photos that this file names, one path in the folder per line",
    )
    add("--annotations", type=path, metavar="FOLDER",
        help="boxes (XML of VOC or ImageNet) or masks (PNG), named like the photos")  # fmt: skip
    add("--limit", type=number(int, 1, 10**9), metavar="N", help="use N of the photos, chosen at random (default: all)")
    add("--methods", nargs="+", default=["all"], metavar="METHOD",
        help="all (default), candidates (more variants of daam), ablation (variants of daam-relevance), or names; daam "
        f"always runs: {', '.join(METHODS)}",
    )  # fmt: skip
    add("--reference", choices=METHODS, default="daam", metavar="METHOD",
        help="method that the tables compare all others with; it always runs (default: %(default)s)")  # fmt: skip
    add("--baselines", nargs="+", choices=BASELINES, default=list(BASELINES),
        help="what removed patches become: the mean colour, or the blurred photo (default: both)")  # fmt: skip
    add(
        "--steps",
        type=number(int, 2, 1000),
        default=10,
        metavar="N",
        help=f"steps of the removal curves, from 0 to 100 %% of the patches {shown}",
    )
    add("--blocks", type=count, metavar="N", help="also score the map after every block, for N photos (default: all)")
    add("--sanity", type=count, default=10, metavar="N", help=f"run the sanity checks for N photos {shown}")
    add("--mosaics", type=number(int, 0, 10**6), default=20, metavar="N",
        help=f"play the grid pointing game with N mosaics of four confidently classified photos {shown}")  # fmt: skip
    add(
        "--seed",
        type=count,
        default=0,
        help=f"seed of the order of photos, ties, random maps and random weights {shown}",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help=f"dtype of the model for removal curves and masked photos; maps are always float32 {shown}")  # fmt: skip
    add("--out", type=path, required=True, metavar="DIR", help="folder for records, tables and pictures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse_options(arguments)
    try:
        evaluate(options)
    except (ValueError, OSError) as error:
        complain(f"error: {first_line(error)}")
        return 2
    except torch.OutOfMemoryError:
        complain("error: device: out of memory; try --device cpu")
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Score every photo, check some of them, and write the report; continue what an earlier run recorded."""
    if options.annotations is not None and not os.path.isdir(options.annotations):
        raise ValueError(f"annotations: there is no folder {printable(str(options.annotations), 80)}; check the path")
    check_out(options.out, options.images)
    found = find_photos(options.images, options.list, without=[options.out, options.annotations])
    photos = list(found)
    random.Random(options.seed).shuffle(photos)
    photos = photos[: options.limit]
    decision = find_decision(options)
    methods = find_methods(options.methods, options.reference, decision)
    decision.loaded.model.requires_grad_(False)
    metadata = {"photos": len(photos), "versions": versions(*PACKAGES)}
    settings, first = settings_of(options, decision, methods), current_rank()[0] == 0
    with running(options.out, settings, metadata) if first else nullcontext(settings | metadata) as run:
        if first:
            check_records(options.out, run, found)
        check_ranks(options.out, settings | {"images": photos})
        measure(options, decision, run, photos)


def measure(options: argparse.Namespace, decision: Decision, run: dict, photos: list[str]) -> None:
    """Record the photos that have no record yet, and write the report. Ranks share the photos; the first one reports.

    Args:
        options: from `parse_options`.
        decision: see `Decision`.
        run: `run.json`.
        photos: names, in the order of the run.
    """
    methods = run["methods"]

    def image_of(name: str) -> Tensor:
        image = decision.loaded.transform(read_image(path_of(options.images, name))).unsqueeze(0)
        return image.to(next(decision.loaded.model.parameters()).device)

    def explained(name: str) -> Explained:
        image = image_of(name)
        return Explained(decision, image, decision.shares(image).argmax(1), [name], options.seed)

    skipped: dict[str, str] = {}
    scored, checked = options.out / "photos.jsonl", options.out / "sanity.jsonl"
    record_each(scored, photos, skipped, lambda i, name: score(explained(name), methods, options, i))
    record_each(
        checked, photos[: options.sanity], skipped, lambda i, name: {"methods": check(explained(name), methods)}
    )
    if on_first(lambda: len(repair_records(options.out / "mosaics.jsonl"))) < options.mosaics:
        chosen = on_first(lambda: find_mosaics(decision, photos, image_of, options.mosaics))
        mosaics = {names[0]: names for names in chosen}
        try:
            record_each(
                options.out / "mosaics.jsonl", list(mosaics), skipped,
                lambda i, name: play(decision, [*map(image_of, mosaics[name])], mosaics[name], methods, options.seed),
            )  # fmt: skip
        except UnsupportedModel as error:  # its patch grid; every photo has its record
            complain(f"skipped: {error}")
    if current_rank()[0] > 0:
        return
    if skipped and not repair_records(scored):
        raise ValueError(f"images: none of the {len(photos)} photos could be scored; {next(iter(skipped.values()))}")

    def picture(record: dict, method: str) -> Image.Image:
        heat = METHODS[method](explained(record["photo"])).float().clamp(min=0).cpu()
        return overlay(read_image(path_of(options.images, record["photo"])), render(heat))[0]

    say(*write_report(options.out, picture).splitlines(), f"tables and pictures: {options.out}")


def find_mosaics(
    decision: Decision, photos: list[str], image_of: Callable[[str], Tensor], count: int
) -> list[list[str]]:
    """Return the photos of every mosaic, see `choose`; say so if there are fewer mosaics than were asked for."""

    def classify(name: str) -> tuple[int, float] | None:
        with suppress(ValueError):  # it was reported when it was scored
            probability, index = decision.shares(image_of(name))[0].max(0)
            return index.item(), probability.item()
        return None

    with tqdm(photos, "choosing mosaics", unit="photo", leave=False) as bar:
        mosaics = choose(bar, classify, count)
    if len(mosaics) < count:
        complain(
            f"mosaics: {len(mosaics)} instead of {count}; each needs photos of four classes, predicted with at least "
            f"{CONFIDENT:.0%}"
        )
    return mosaics


def settings_of(options: argparse.Namespace, decision: Decision, methods: list[str]) -> dict:
    """Return all that decides the results of a run."""
    return {
        "model": decision.loaded.name,
        "weights_sha256": weights_sha256(decision.loaded.model),
        "bank": decision.bank and str(options.bank or "embedded"),
        "images": name_of(options.images),
        "list": options.list and name_of(options.list),
        "annotations": options.annotations and name_of(options.annotations),
        "methods": methods,
        "baselines": options.baselines,
        "steps": options.steps,
        "dtype": options.dtype,
        "blocks": options.blocks,
        "seed": options.seed,
        "stages": stages(decision.loaded.model),
    }


def record_each(file: Path, photos: list[str], skipped: dict[str, str], measure: Callable[[int, str], dict]) -> None:
    """Append a record for every photo that the file does not have yet. Ranks share the photos, and end together.

    Args:
        file: see `evaluation.records`.
        photos: names.
        skipped: gets the photos that could not be measured, by any rank, and why; each is reported once.
        measure: place in `photos` and name -> what is recorded.

    Raises:
        UnsupportedModel: if the model, and so every photo, is refused.
    """
    done = on_first(lambda: {record["photo"] for record in repair_records(file)})
    todo = [(i, name) for i, name in enumerate(photos) if name not in done]
    before, hidden, refused = len(photos) - len(todo), current_rank()[0] > 0, ""
    with tqdm(total=len(photos), initial=before, desc=file.stem, unit="photo", disable=hidden) as bar:
        for place, (i, name) in shared(todo, file.name):
            bar.update(before + place - bar.n)  # those that other ranks took
            try:
                record = {"photo": name} | measure(i, name)
                check_schema(record, RECORD, f"records: {printable(name, 80)}")  # a value may be NaN
                append_record(file, record)
            except UnsupportedModel as error:
                refused = str(error)
                break
            except ValueError as error:
                if name not in skipped:
                    complain(f"skipped: {error}")
                skipped[name] = str(error)
            bar.update()
        for its_refused, its_skipped in gather((refused, dict(skipped))):
            if its_refused:
                raise UnsupportedModel(its_refused)
            skipped |= its_skipped
        bar.update(len(photos) - bar.n)


def score(explained: Explained, methods: list[str], options: argparse.Namespace, i: int) -> dict:
    """Return the record of one photo, number i of the run."""
    decision, image, name = explained.decision, explained.images[0], explained.names[0]
    target = explained.classes.item()
    probability = decision.shares(explained.images)[0, target].item()
    maps = torch.stack([METHODS[method](explained)[0].float().cpu() for method in methods])
    by_block = explained.flow.accumulated[0].cpu() if options.blocks is None or i < options.blocks else maps[:0]
    every = torch.cat([maps, by_block])
    if not torch.isfinite(every).all():
        raise ValueError(f"methods: a map of {printable(name, 80)} is not finite; leave the method out with --methods")
    region = None
    if options.annotations is not None:
        file = path_of(options.images, name)
        region = region_of(options.annotations, options.images, file.relative_to(options.images), read_image(file).size)
    seed = photo_seed(name, options.seed)
    with precision(image.device, options.dtype):
        curves = removal_curves(decision, image, target, every, options.steps, options.baselines, seed)
        masked = masked_photo(decision, image, target, every, probability)
    rows = []
    for m, heat in enumerate(every):
        found = {metric: area(curve[m]).item() for metric, curve in curves.items()}
        found |= {metric: values[m].item() for metric, values in masked.items()}
        found |= {"sparsity": sparsity(heat)} | (localisation(heat, region) if region is not None else {})
        rows.append({metric: round(value, 6) for metric, value in found.items()})
    return {
        "class": target,
        "name": decision.class_name(target),
        "probability": round(probability, 6),
        "scores": dict(zip(methods, rows)),
        "curves": {
            method: {metric: [round(p, 5) for p in curve[m].tolist()] for metric, curve in curves.items()}
            for m, method in enumerate(methods)
        },
        **({"blocks": rows[len(methods) :]} if len(by_block) else {}),
    }


def find_methods(words: list[str], reference: str, decision: Decision) -> list[str]:
    """Return the methods that --methods names, with the reference first and daam always among them."""
    unknown = [word for word in words if word not in (*METHODS, *GROUPS, "all")]
    if unknown:
        raise ValueError(
            f"methods: {printable(unknown[0], 80)!r} is unknown; choose from {', '.join(['all', *GROUPS, *METHODS])}"
        )
    as_ours = "daam-relu" if decision.bank is None else "daam-signed"
    all_of_them = [method for method in METHODS if method not in EXTRA | {as_ours}]
    words = [w for word in words for w in (GROUPS | {"all": all_of_them}).get(word, [word])]
    return list(dict.fromkeys([reference, "daam", *words]))


def find_decision(options: argparse.Namespace) -> Decision:
    """Load the model, and the memory bank if it has no classifier."""
    name = EMBEDDED if options.model == "embedded" and options.checkpoint is None else options.model
    if options.model == "embedded" and options.checkpoint is not None:
        name = None if architecture_of(options.checkpoint) else EMBEDDED
    loaded = load(name, options.checkpoint, find_device(options.device))
    if loaded.num_classes != 0:
        if options.bank is not None:
            raise ValueError(f"bank: {loaded.name} has a classifier, whose scores are explained; drop --bank")
        return Decision(loaded)
    bank = MemoryBank.load(options.bank or EMBEDDED_BANK, next(loaded.model.parameters()).device)
    bank.check_model(loaded.name, loaded.num_features, weights_sha256(loaded.model))
    return Decision(loaded, bank)
