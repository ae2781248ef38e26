"""Measure time and memory of an attention flow, beside forward + backward and other methods, within one run.

    pip install -e ".[bench]"
    python benchmarks/flow.py                                              all cases that take minutes, not hours
    python benchmarks/flow.py --cases deit_small_patch16_224:224:32 --device cuda --dtype bfloat16
    python benchmarks/flow.py --write                                      write table and plot of docs/benchmarks.md
    python benchmarks/flow.py --read benchmarks/flow.json --write          the same from an earlier measurement

A case is MODEL:PIXELS:BATCH, a plain Vision Transformer of timm with random weights. Every method has its own process.
All processes of a case live at the same time and explain the same images in turn, round by round, so that a disturbance
of the machine hits all of them alike. Measured are, for every method:

    seconds     of every round; one call explains the whole batch, for the predicted classes
    x           seconds / seconds of "forward + backward" in the same round, the median over the rounds
    memory      peak of the first call, which is not timed, above the process with its model and its images:
                on CUDA what torch allocates, elsewhere resident memory (on Linux the peak is reset before this call)

A method that is not installed, fails, or needs more memory than is free is a "-" in the table, with the reason below.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.flow_methods import METHODS
from benchmarks.flow_report import case_table, page_table, plot, read_report, write_into_page
from benchmarks.machine import available_memory, device_name, peak_memory, synchronize, used_memory
from command_line import terminal
from command_line.options import Parser, find_device, number
from command_line.terminal import complain, say
from daam_core import attention_flow
from daam_vit.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
JSON, PLOT = ROOT / "benchmarks" / "flow.json", ROOT / ".img" / "benchmark_flow.png"
INSTALL = 'pip install -e ".[bench]"'

QUICK = [
    *(f"deit_small_patch16_224:224:{batch}" for batch in (1, 8, 16, 32)),
    *(f"deit_small_patch16_224:448:{batch}" for batch in (1, 8)),
    *(f"vit_small_patch8_224:{pixels}:1" for pixels in (224, 448)),
]
ALL = [*QUICK, "vit_small_patch8_224:1024:1"]


# ----------------------------------------------------------------------------------------------------------------------
# One process
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, and the size and number of its images."""

    model: str
    pixels: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read MODEL:PIXELS:BATCH, or raise a ValueError if this is not a plain Vision Transformer of that size."""
        model, *numbers = text.split(":")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(f"cases: expected MODEL:PIXELS:BATCH, got {text!r}")
        if not timm.is_model(model):
            raise ValueError(f"cases: {model!r} is not a model of timm")
        case = cls(model, *map(int, numbers))
        try:
            built = case.build("meta")
        except Exception as error:  # whatever its constructor raises
            raise ValueError(f"cases: {model} cannot be built for {case.pixels} pixels: {one_line(error)}") from None
        plain = isinstance(built, VisionTransformer) and built.global_pool == "token" and built.num_prefix_tokens == 1
        if not plain or any(type(getattr(block, "attn", None)) is not Attention for block in built.blocks):
            raise ValueError(f"cases: {model} is not a plain Vision Transformer with a class token")
        if case.pixels % built.patch_embed.patch_size[0]:
            raise ValueError(f"cases: {case.pixels} pixels are not a multiple of the patch size of {model}")
        return case

    def build(self, device: str | torch.device) -> Any:
        """Build the model with random weights and 1000 classes."""
        with torch.device(device):
            return timm.create_model(self.model, pretrained=False, img_size=self.pixels, num_classes=1000).eval()


def work(
    connection: Connection, method: str, case: Case, device: torch.device, dtype: torch.dtype, threads: int
) -> None:
    """Run one method in its own process: answer every message with one call.

    The first answer is the peak memory in bytes, the others are seconds; any may be a text that says what went wrong.
    """
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        check(method, small_model().to(device))  # this loads all libraries, so that they do not count as its memory
        model = case.build(device)
        explain = METHODS[method].make(model)
        images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
        connection.send("ready")
        for call in count():
            connection.recv()
            gc.collect()
            before = used_memory(device)
            synchronize(device)
            began = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                explain(images)
            synchronize(device)
            took = time.perf_counter() - began
            connection.send(took if call else peak_memory(device) - before)
    except (EOFError, ConnectionError):  # the other end is closed
        pass
    except Exception as error:  # whatever a library raises is the answer
        connection.send(one_line(error))


def small_model() -> VisionTransformer:
    """Build four narrow blocks whose attention is not flat."""
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def check(method: str, model: VisionTransformer) -> None:
    """Run a method; raise a ValueError if its maps must equal ours and differ by 1e-4 of the largest value."""
    images = torch.randn(2, 3, 64, 64, device=next(model.parameters()).device)
    expected = attention_flow(model, images).accumulated
    maps = METHODS[method].make(model)(images)
    if METHODS[method].same_maps:
        error = ((maps - expected).abs().max() / expected.max()).item()
        if not (maps.shape == expected.shape and error <= 1e-4):
            raise ValueError(f"its maps differ from ours by {error:.1g} of the largest value")


def one_line(error: BaseException) -> str:
    """Return the type of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


# ----------------------------------------------------------------------------------------------------------------------
# One case: all processes in turn
# ----------------------------------------------------------------------------------------------------------------------


class Worker:
    """The process of one method and its results: `seconds` and `peak_bytes`, or why it was `skipped`."""

    def __init__(self, method: str, case: Case, device: torch.device, dtype: torch.dtype):
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self.skipped = reason_to_skip(method, case, device)
        if not self.skipped:
            context = fresh_processes()
            self.connection, theirs = context.Pipe()
            arguments = (theirs, method, case, device, dtype, torch.get_num_threads())
            self.process = context.Process(target=work, args=arguments, daemon=True)
            self.process.start()
            theirs.close()

    def answer(self, question: str | None = None) -> Any:
        """Ask, and return the answer; None if there is none: then `skipped` says why."""
        if self.skipped:
            return None
        try:
            if question:
                self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            answer = "it was killed, probably because memory ran out" if code == -9 else f"it ended with code {code}"
        if isinstance(answer, str) and answer != "ready":
            self.skipped, answer = answer, None
            self.end()
        return answer

    def end(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.connection.close()
            self.process.terminate()
            self.process.join()

    def result(self) -> dict:
        """Return what the JSON says of the method."""
        return {"skipped": self.skipped} if self.skipped else {"seconds": self.seconds, "peak_bytes": self.peak_bytes}


def fresh_processes() -> ForkServerContext | SpawnContext:
    """Return a context for processes without a history; where processes can fork, torch is imported once for all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "daam_core"])
    return context


def reason_to_skip(method: str, case: Case, device: torch.device) -> str | None:
    """Say why a method is not even started: its package is missing, or its attention matrices need too much memory."""
    package = METHODS[method].package
    if package and version(package) is None:
        return f"{package} is not installed: {INSTALL}"
    if method == "ours, one by one" and case.batch == 1:
        return "the batch is one image"
    model = case.build("meta")
    blocks, heads = len(model.blocks), model.blocks[0].attn.num_heads
    needed = METHODS[method].matrices * blocks * heads * tokens(model) ** 2 * case.batch * 4
    if needed > (free := available_memory(device)):
        return f"its attention matrices alone take {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    return None


def tokens(model: VisionTransformer) -> int:
    """Return the number of tokens, class token included."""
    return model.num_prefix_tokens + model.patch_embed.num_patches


def measure(
    case: Case, methods: list[str], device: torch.device, dtype: torch.dtype, rounds: int, limit: float
) -> dict:
    """Measure one case: at least one round, and no round that would end after `limit` seconds."""
    workers = {method: Worker(method, case, device, dtype) for method in methods}
    try:
        for worker in workers.values():
            worker.answer()  # it is ready
        for worker in workers.values():
            worker.peak_bytes = worker.answer("first call")
        began, done = time.perf_counter(), 0
        while done < rounds and (time.perf_counter() - began) * (done + 1) <= limit * max(done, 1):
            for worker in workers.values():
                worker.seconds.append(worker.answer("another call"))
            done += 1
    finally:
        for worker in workers.values():
            worker.end()
    results = {method: worker.result() for method, worker in workers.items()}
    size = {"model": case.model, "pixels": case.pixels, "batch": case.batch, "tokens": tokens(case.build("meta"))}
    return size | {"rounds": done, "results": results}


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options of the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--cases", nargs="+", default=QUICK, metavar="MODEL:PIXELS:BATCH",
        help=f"or all (default: {' '.join(QUICK)}; all adds {' '.join(ALL[len(QUICK):])})")  # fmt: skip
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--rounds", type=number(int, 1, 1000), default=7, help="most rounds of a case (default: %(default)s)")
    add("--seconds", type=number(float, 0, 1e6), default=180,
        help="time limit of the rounds of a case; the first one always runs (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="the latter two by autocast (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("results", "benchmark"), metavar="DIR",
        help="folder for flow.json and flow.png (default: %(default)s)")  # fmt: skip
    add("--read", type=Path, metavar="JSON", help="measure nothing; table and plot of this file")
    add("--write", action="store_true", help="write table, plot and numbers into the repository instead of DIR")
    options = parser.parse_args(arguments)
    try:
        if options.read:
            options.report = read_report(options.read)
            return options
        options.device = find_device(options.device)
        options.cases = [Case.parse(text) for text in (ALL if options.cases == ["all"] else options.cases)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write numbers and plot; return the exit status."""
    options = parse_options(arguments)
    json_file, plot_file = (JSON, PLOT) if options.write else (options.out / "flow.json", options.out / "flow.png")
    try:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        report = options.report if options.read else run(options, json_file)
        say(*page_table(report).split("\n"))
        write_report(report, json_file)
        with atomic_write(plot_file) as part:
            plot(report, part)
        if options.write:
            write_into_page(report)
    except OSError as error:
        complain(f"error: out: {json_file.parent} cannot be written: {error.strerror or error}; pass another --out")
        return 2
    say(f"-> {json_file}, {plot_file}")
    return 0


def run(options: argparse.Namespace, json_file: Path) -> dict:
    """Measure case after case, and write the file after each."""
    packages = ("torch", "timm", "torchvision", "daam-timm-vit", "grad-cam", "torchcam")
    report = {
        "device": device_name(options.device), "threads": torch.get_num_threads(), "dtype": options.dtype, "seed": 0,
        "versions": {"Python": platform.python_version()} | {p: v for p in packages if (v := version(p))},
        "cases": [],
    }  # fmt: skip
    for case in options.cases:
        dtype = getattr(torch, options.dtype)
        measured = measure(case, options.methods, options.device, dtype, options.rounds, options.seconds)
        report["cases"].append(measured)
        write_report(report, json_file)
        say(*case_table(measured).split("\n"), "")
        sys.stdout.flush()
    return report


def write_report(report: dict, file: Path) -> None:
    """Write the numbers as JSON."""
    with atomic_write(file) as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    terminal.run(main)
