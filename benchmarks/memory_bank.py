"""How fast a memory bank is built and queried, each against the least that it could take, within one run.

    python benchmarks/memory_bank.py build --train FOLDER      images/s, beside those of a bare loader and forward
    python benchmarks/memory_bank.py query                     a bank of the size of ImageNet, beside one read of it

The query's bank is synthetic, 1,281,167 x 384 float16, written to a temporary file (984 MB) and mapped as a real one.
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

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line.options import find_device
from memorybank import MemoryBank
from memorybank.build import build, find_classes
from models import LoadedModel, load


class Pictures(Dataset):
    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as file:
            return self.transform(file.convert("RGB"))


@torch.inference_mode()
def bare(loaded: LoadedModel, files: list[Path], batch_size: int, workers: int) -> None:
    """The least that a bank takes: read every picture, forward it, and throw the features away."""
    device = next(loaded.model.parameters()).device
    pictures = Pictures(files, loaded.transform)
    for images in DataLoader(pictures, batch_size, num_workers=workers, pin_memory=device.type == "cuda"):
        features = loaded.model(images.to(device, non_blocking=True))
    features.cpu()


def seconds(function: Callable, *arguments) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def summary(times: list[float]) -> str:
    return f"median {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def benchmark_build(options: argparse.Namespace) -> None:
    loaded = load(options.model, None, find_device(options.device))
    files = [file for of_class in find_classes(options.train, "train").values() for file in of_class]
    files = files[:: max(1, len(files) // options.images)][: options.images]
    times: dict[str, list[float]] = {"bare": [], "build": []}
    with tempfile.TemporaryDirectory() as place:
        for n, file in enumerate(files):
            link = Path(place, "images", "class", f"{n:06d}{file.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        train, bank = Path(place, "images"), Path(place, "bank")
        links = sorted((train / "class").iterdir())
        settings = {"batch_size": options.batch_size, "workers": options.workers}
        bare(loaded, links[: options.batch_size], **settings)  # warm up
        for _ in range(options.repeat):
            times["bare"].append(seconds(lambda: bare(loaded, links, **settings)))
            times["build"].append(seconds(lambda: build(loaded, train, bank, **settings)))
    print(f"{loaded.name}, {len(links)} images, batch {options.batch_size}, {options.workers} workers, "
          f"{next(loaded.model.parameters()).device}, {options.repeat} times in turn")  # fmt: skip
    for name, of_one in times.items():
        print(f"  {name:<6} {summary(of_one)}, {len(links) / statistics.median(of_one):.1f} images/s")
    ratios = [a / b for a, b in zip(times["bare"], times["build"])]
    print(f"  build reaches {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})")


def benchmark_query(options: argparse.Namespace) -> None:
    """The bank is made here, and asked in a process of its own, so that its memory is that of the query."""
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
    times: dict[int, list[float]] = {batch: [] for batch in (0, *queries)}
    extra = {}
    for batch, query in queries.items():
        with Watch() as watch:
            bank.importance(query)  # warms up, too
        extra[batch] = watch.extra
    for _ in range(options.repeat):
        times[0].append(seconds(lambda: bank.features.view(torch.int64).sum()))
        for batch, query in queries.items():
            times[batch].append(seconds(bank.importance, query))
    print(f"{rows} x {width} {bank.features.dtype}, {bank.features.nbytes / 1e6:.0f} MB, "
          f"{torch.get_num_threads()} threads, {options.repeat} times in turn")  # fmt: skip
    print(f"  one read of the bank: {summary(times[0])}, "
          f"{bank.features.nbytes / 1e9 / statistics.median(times[0]):.1f} GB/s")  # fmt: skip
    for batch in queries:
        ratios = [a / b for a, b in zip(times[batch], times[0])]
        print(f"  {batch:>3} at once, k = 20: {summary(times[batch])}, {statistics.median(ratios):.2f} reads "
              f"({min(ratios):.2f} to {max(ratios):.2f}); peak extra memory {extra[batch] / 1e6:.0f} MB")  # fmt: skip


class Watch:
    """The most anonymous memory that the process has within the `with`, above what it had before; bytes. Linux."""

    def __enter__(self) -> Watch:
        self.before = self.peak = self.anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.extra = self.peak - self.before

    def look(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.anonymous())

    @staticmethod
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("build", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    make.add_argument("--train", type=Path, required=True, help="images, one sub-folder a class")
    make.add_argument("--model", default="vit_small_patch14_selfsupervised")
    make.add_argument("--images", type=int, default=256, help="how many of them")
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
    ask.add_argument("--bank", help="ask this bank, instead of a synthetic one")
    ask.set_defaults(run=benchmark_query)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs ({platform.machine()})"
    )
    options.run(options)


if __name__ == "__main__":
    main()
