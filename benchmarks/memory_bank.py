"""Measure how fast a memory bank is built and queried, compared with a lower bound, within one run.

    python benchmarks/memory_bank.py build --train FOLDER      images/s, beside a loader and forward without a bank
    python benchmarks/memory_bank.py query                     a bank of the size of ImageNet, beside one read of it;
                                                               also how long it takes to open it

The bank of the queries is random, 1,281,167 x 384 float16, in a temporary file (984 MB) that is mapped like a real one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import read_proc
from command_line.options import find_device
from memorybank import MemoryBank
from memorybank.build import build, find_classes
from models import LoadedModel, load


class Pictures(Dataset):
    """Photos from files, after a transform."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], Tensor]):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.files[i]) as file:
            return self.transform(file.convert("RGB"))


@torch.inference_mode()
def bare(loaded: LoadedModel, files: list[Path], batch_size: int, workers: int) -> None:
    """Read every picture, run the model on it, and discard the features: a lower bound for a build."""
    device = next(loaded.model.parameters()).device
    pictures = Pictures(files, loaded.transform)
    for images in DataLoader(pictures, batch_size, num_workers=workers, pin_memory=device.type == "cuda"):
        features = loaded.model(images.to(device, non_blocking=True))
    features.cpu()


def seconds(function: Callable, *arguments: Any) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def summary(times: list[float]) -> str:
    """Return median, minimum and maximum in words."""
    return f"median {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def benchmark_build(options: argparse.Namespace) -> None:
    """Build a bank several times, in turn with `bare`, and print images/s of both."""
    loaded = load(options.model, None, find_device(options.device))
    files = [file for files in find_classes(options.train, "train").values() for file in files]
    files = files[:: max(1, len(files) // options.images)][: options.images]
    times: dict[str, list[float]] = {"bare": [], "build": []}
    with tempfile.TemporaryDirectory() as folder:
        for n, file in enumerate(files):
            link = Path(folder, "images", "class", f"{n:06d}{file.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        train, bank = Path(folder, "images"), Path(folder, "bank")
        links = sorted((train / "class").iterdir())
        settings = {"batch_size": options.batch_size, "workers": options.workers}
        bare(loaded, links[: options.batch_size], **settings)  # warm up
        for _ in range(options.repeat):
            times["bare"].append(seconds(lambda: bare(loaded, links, **settings)))
            times["build"].append(seconds(lambda: build(loaded, train, bank, **settings)))
    print(f"{loaded.name}, {len(links)} images, batch {options.batch_size}, {options.workers} workers, "
          f"{next(loaded.model.parameters()).device}, {options.repeat} times in turn")  # fmt: skip
    for name, values in times.items():
        print(f"  {name:<6} {summary(values)}, {len(links) / statistics.median(values):.1f} images/s")
    ratios = [a / b for a, b in zip(times["bare"], times["build"])]
    print(f"  build reaches {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})")


def benchmark_query(options: argparse.Namespace) -> None:
    """Write a random bank, and query it in another process, so that the memory of this process is that of the query."""
    if options.bank is None:
        with tempfile.TemporaryDirectory(dir=options.place) as folder:
            features = torch.empty(options.rows, options.width, dtype=torch.float16)
            for part in features.split(10_000):
                part.copy_(F.normalize(torch.randn(part.shape), dim=1))
            torch.save(features, Path(folder, "trainfeat.pth"))
            torch.save(torch.arange(options.rows) % 1000, Path(folder, "trainlabels.pth"))
            subprocess.run([sys.executable, *sys.argv, "--bank", folder], check=True)
        return
    bank = MemoryBank.load(options.bank)
    rows, width = bank.features.shape
    queries = {batch: torch.randn(batch, width) for batch in options.batch}
    times: dict[int, list[float]] = {batch: [] for batch in (0, *queries)}  # 0: one read of the bank
    extra, opening, one = {}, [], []
    for batch, query in queries.items():
        with Watch() as watch:
            bank.importance(query)  # also warms up
        extra[batch] = watch.extra
    for _ in range(options.repeat):
        times[0].append(seconds(lambda: bank.features.view(torch.int64).sum()))
        for batch, query in queries.items():
            times[batch].append(seconds(bank.importance, query))
        opening.append(seconds(MemoryBank.load, options.bank))
        one.append(seconds(bank.nearest, torch.randn(width)))
    print(f"{rows} x {width} {bank.features.dtype}, {bank.features.nbytes / 1e6:.0f} MB, "
          f"{torch.get_num_threads()} threads, {options.repeat} times in turn")  # fmt: skip
    print(f"  one read of the bank: {summary(times[0])}, "
          f"{bank.features.nbytes / 1e9 / statistics.median(times[0]):.1f} GB/s")  # fmt: skip
    ratios = [a / b for a, b in zip(opening, one)]
    print(f"  opening: {summary(opening)}, {statistics.median(ratios):.2f} x a query of one feature "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    for batch in queries:
        ratios = [a / b for a, b in zip(times[batch], times[0])]
        print(f"  {batch:>3} at once, k = 20: {summary(times[batch])}, {statistics.median(ratios):.2f} reads "
              f"({min(ratios):.2f} to {max(ratios):.2f}); peak extra memory {extra[batch] / 1e6:.0f} MB")  # fmt: skip


class Watch:
    """Peak of the anonymous memory of the process within a `with`: `extra` bytes above what it had before (Linux)."""

    def __enter__(self) -> Watch:
        self.before = self.peak = self.anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()
        self.extra = self.peak - self.before

    def look(self) -> None:
        """Update the peak until the `with` ends."""
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.anonymous())

    @staticmethod
    def anonymous() -> int:
        """Return the bytes of anonymous memory that the process has now."""
        return read_proc("/proc/self/status", "RssAnon")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("build", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    make.add_argument("--train", type=Path, required=True, help="folder of images, one sub-folder per class")
    make.add_argument("--model", default="vit_small_patch14_selfsupervised")
    make.add_argument("--images", type=int, default=256, help="number of images")
    make.add_argument("--batch-size", type=int, default=64)
    make.add_argument("--workers", type=int, default=min(4, os.cpu_count()))
    make.add_argument("--device", default="auto")
    make.add_argument("--repeat", type=int, default=3)
    make.set_defaults(run=benchmark_build)
    ask = commands.add_parser("query", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ask.add_argument("--rows", type=int, default=1_281_167)
    ask.add_argument("--width", type=int, default=384)
    ask.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    ask.add_argument("--place", help="folder for the temporary bank")
    ask.add_argument("--repeat", type=int, default=7)
    ask.add_argument("--bank", help="query this bank instead of a random one")
    ask.set_defaults(run=benchmark_query)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs ({platform.machine()})"
    )
    options.run(options)


if __name__ == "__main__":
    main()
