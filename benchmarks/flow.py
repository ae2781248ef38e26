"""What an attention flow costs, beside the least that it could cost and beside what others cost, within one run.

    pip install -e ".[bench]"
    python benchmarks/flow.py                                              every case that takes minutes, not hours
    python benchmarks/flow.py --cases deit_small_patch16_224:224:32 --device cuda --dtype bfloat16
    python benchmarks/flow.py --write                                      the table and the plot of docs/benchmarks.md
    python benchmarks/flow.py --read benchmarks/flow.json --write          the same from its numbers

A case is MODEL:PIXELS:BATCH, a plain Vision Transformer of timm with random weights. Every method has a process of its
own. All processes of a case live together and explain the same images in turn, round by round, so that what disturbs
the machine disturbs all alike. What is told of a method:

    seconds     median, least and most of its rounds; one call explains the whole batch, for the predicted classes
    x           seconds / seconds of "forward + backward" in the same round, the median of these ratios
    memory      the peak of its first call, which is not timed, above the process with its model and its images:
                of CUDA what torch allocated; elsewhere resident memory (Linux counts the peak anew for this call)

A method that is not there, fails, or cannot have the memory is a "-" in the table, with its reason below.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from itertools import count, pairwise
from pathlib import Path

import timm
import torch
import torchvision
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line.options import Parser, find_device, number
from daam_core import attention_flow

ROOT = Path(__file__).resolve().parent.parent
JSON, PLOT = ROOT / "benchmarks" / "flow.json", ROOT / ".img" / "benchmark_flow.png"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKERS = "<!-- table: benchmark -->", "<!-- end of table -->"
INSTALL = 'pip install -e ".[bench]"'

QUICK = [
    *(f"deit_small_patch16_224:224:{batch}" for batch in (1, 8, 16, 32)),
    *(f"deit_small_patch16_224:448:{batch}" for batch in (1, 8)),
    *(f"vit_small_patch8_224:{pixels}:1" for pixels in (224, 448)),
]
ALL = [*QUICK, "vit_small_patch8_224:1024:1"]
SHORT = {"deit_small_patch16_224": "DeiT-S/16", "vit_small_patch8_224": "ViT-S/8"}


# ----------------------------------------------------------------------------------------------------------------------
# The methods: model -> (images (B, 3, H, W) -> maps)
# ----------------------------------------------------------------------------------------------------------------------


def forward(model: nn.Module) -> Callable:
    return torch.inference_mode()(model)


def forward_backward(model: nn.Module) -> Callable:
    """The least that a gradient of activations costs: no weight wants one."""
    model.requires_grad_(False)

    def explain(images: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        return torch.autograd.grad(model(images).amax(1).sum(), images)[0]

    return explain


def ours(memory: str, model: nn.Module) -> Callable:
    return lambda images: attention_flow(model, images, memory=memory).accumulated


def ours_one_by_one(model: nn.Module) -> Callable:
    explain = ours("fast", model)
    return lambda images: torch.cat([explain(image) for image in images.split(1)])


def daam_timm_vit(model: nn.Module) -> Callable:
    from daam import DAAM

    def explain(images: Tensor) -> Tensor:
        with DAAM(model) as daam:
            return daam(images).maps

    return explain


def published(model: nn.Module) -> Callable:
    """The steps of the published algorithm, one after the other, images apart from each other.

    In every block the attention matrix of all tokens is made in the open, and once more, without a graph, for the
    semantic spatial map S (B, N, C) of the class token. The score is sent back to every weight.
    """
    S, T = [], []

    def attention(module: Attention, x: Tensor, **_) -> Tensor:
        def matrix_and_values() -> tuple[Tensor, Tensor]:
            q, k, v = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
            return (q @ k.mT * module.scale).softmax(-1), v

        matrix, v = matrix_and_values()
        T.append((matrix @ v).transpose(1, 2).flatten(2))  # (B, N, C)
        T[-1].retain_grad()
        with torch.no_grad():
            matrix, v = matrix_and_values()
            S.append((matrix[:, :, 0, :, None] * v).transpose(1, 2).flatten(2))
        return module.proj(T[-1])

    for block in model.blocks:
        block.attn.forward = partial(attention, block.attn)

    def explain(images: Tensor) -> Tensor:
        S.clear(), T.clear()
        model.zero_grad()
        model(images).amax(1).sum().backward()
        maps = [torch.einsum("bnc,bc->bn", s, t.grad[:, 0].relu()).relu() for s, t in zip(S, T)]
        S.clear(), T.clear()
        patches = torch.stack(maps, 1)[..., model.num_prefix_tokens :]
        return patches.unflatten(2, model.patch_embed.grid_size).cumsum(1)

    return explain


def grad_cam(model: nn.Module) -> Callable:
    """Of the last block's first norm, as its documentation does for a ViT; to every weight, as it does."""
    from pytorch_grad_cam import GradCAM

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, model.patch_embed.grid_size)

    def explain(images: Tensor) -> Tensor:
        with GradCAM(model, [model.blocks[-1].norm1], reshape_transform=grid) as cam:
            return torch.from_numpy(cam(images, targets=None))

    return explain


def legrad(model: VisionTransformer) -> Callable:
    """torch-cam decomposes blocks with an nn.MultiheadAttention, which timm's have not: a twin of torchvision has. The
    last four blocks, as in its documentation."""
    from torchcam.methods import LeGrad

    block = model.blocks[0]
    twin = torchvision.models.VisionTransformer(
        model.patch_embed.img_size[0], model.patch_embed.patch_size[0], len(model.blocks), block.attn.num_heads,
        model.embed_dim, block.mlp.fc1.out_features, num_classes=model.num_classes,
    ).to(next(model.parameters())).eval()  # fmt: skip

    def explain(images: Tensor) -> Tensor:
        with LeGrad(twin, list(twin.encoder.layers)[-4:]) as extract:
            return extract(twin(images).argmax(1).tolist())[0]

    return explain


def rollout(model: nn.Module) -> Callable:
    """Abnar and Zuidema, "Quantifying attention flow in transformers", ACL 2020: the product of 0.5 A + 0.5 I over the
    blocks, where A (B, N, N) is the mean over the heads."""
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, matrix: seen.append(matrix.mean(1)))

    @torch.inference_mode()
    def explain(images: Tensor) -> Tensor:
        seen.clear()
        model(images)
        row = torch.eye(seen[0].shape[-1]).to(seen[0])[:1].expand(len(images), 1, -1)  # of the class token alone
        while seen:
            row = 0.5 * row @ seen.pop() + 0.5 * row  # from the last block to the first
        return row[:, 0, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)

    return explain


@dataclass(frozen=True)
class Method:
    make: Callable[[nn.Module], Callable]
    what: str
    """For the notes below the table."""
    package: str | None = None
    """What it needs from the extra [bench]."""
    matrices: float = 0
    """The share of the blocks whose attention matrices (B, H, N, N) it holds at once, at the least."""
    same_maps: bool = False
    """Whether its maps must be ours; compared on a small model before anything is timed."""


METHODS = {
    "forward": Method(forward, "inference"),
    "forward + backward": Method(forward_backward, "the gradient of the score of the class for the images alone"),
    "ours (fast)": Method(partial(ours, "fast"), "`attention_flow(..., memory='fast')`", same_maps=True),
    "ours (low)": Method(partial(ours, "low"), "`attention_flow(..., memory='low')`", same_maps=True),
    "ours, one by one": Method(ours_one_by_one, "`ours (fast)`, image after image", same_maps=True),
    "daam-timm-vit": Method(daam_timm_vit, "the same maps by the package of that name", "daam-timm-vit", 1, True),
    "published": Method(
        published, "the steps of the published algorithm: open attention twice, all gradients", None, 1, True
    ),
    "Grad-CAM": Method(grad_cam, "pytorch-grad-cam, one map, of the last block's norm", "grad-cam"),
    "LeGrad": Method(
        legrad, "torch-cam, one map, of the last four blocks; it does not take models of timm, so this is the twin of "
        "torchvision", "torchcam", 1 / 3,
    ),
    "rollout": Method(rollout, "attention rollout, one map, no gradient", None, 1 / 3),
}  # fmt: skip
BASE = "forward + backward"


# ----------------------------------------------------------------------------------------------------------------------
# One process
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    model: str
    pixels: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises a ValueError where it is no plain Vision Transformer of timm or its size is impossible."""
        model, *numbers = text.split(":")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(f"a case is MODEL:PIXELS:BATCH, got {text!r}")
        if not timm.is_model(model):
            raise ValueError(f"{model!r} is no model of timm")
        case = cls(model, *map(int, numbers))
        try:
            built = case.build("meta")
        except Exception as error:  # whatever its constructor raises
            raise ValueError(f"{model} cannot be built for {case.pixels} pixels: {one_line(error)}") from None
        plain = isinstance(built, VisionTransformer) and built.global_pool == "token" and built.num_prefix_tokens == 1
        if not plain or any(type(getattr(block, "attn", None)) is not Attention for block in built.blocks):
            raise ValueError(f"{model} is no plain Vision Transformer with a class token")
        if case.pixels % built.patch_embed.patch_size[0]:
            raise ValueError(f"{case.pixels} pixels are no multiple of the patches of {model}")
        return case

    def build(self, device: str | torch.device) -> nn.Module:
        with torch.device(device):
            return timm.create_model(self.model, pretrained=False, img_size=self.pixels, num_classes=1000).eval()

    def __str__(self) -> str:
        return f"{SHORT.get(self.model, self.model)}, {self.pixels} px, batch {self.batch}"


def work(connection, method: str, case: Case, device: torch.device, dtype: torch.dtype, threads: int) -> None:
    """A process of one method: every message asks for one call; the first is answered with its peak memory in bytes,
    the others with their seconds, or any with a text that says what went wrong."""
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        small = small_model().to(device)
        check(method, small)  # all libraries are loaded by now, and do not count as its memory
        model = case.build(device)
        explain = METHODS[method].make(model)
        images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
        connection.send("ready")
        for call in count():
            connection.recv()
            gc.collect()
            before = memory(device)
            synchronize(device)
            began = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                explain(images)
            synchronize(device)
            took = time.perf_counter() - began
            connection.send(took if call else peak_memory(device) - before)
    except (EOFError, ConnectionError):  # nobody asks any more
        pass
    except Exception as error:  # whatever a library raises is the answer
        connection.send(one_line(error))


def small_model() -> VisionTransformer:
    """Three narrow blocks whose attention is not flat."""
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def check(method: str, model: VisionTransformer) -> None:
    """The method explains; maps that should be ours must be, to 1e-4 of the largest value."""
    images = torch.randn(2, 3, 64, 64, device=next(model.parameters()).device)
    expected = attention_flow(model, images).accumulated
    maps = METHODS[method].make(model)(images)
    if METHODS[method].same_maps:
        error = ((maps - expected).abs().max() / expected.max()).item()
        if not (maps.shape == expected.shape and error <= 1e-4):
            raise ValueError(f"its maps differ from ours by {error:.1g} of the largest value")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory(device: torch.device) -> int:
    """Bytes that the process holds now; from here on its peak counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


# ----------------------------------------------------------------------------------------------------------------------
# One case: all processes in turn
# ----------------------------------------------------------------------------------------------------------------------


class Worker:
    """A process of one method, and what it told: `seconds` of its rounds and `peak_bytes`, or why it is `skipped`."""

    def __init__(self, method: str, case: Case, device: torch.device, dtype: torch.dtype):
        self.seconds: list[float] = []
        self.peak_bytes = None
        self.skipped = reason_against(method, case, device)
        if not self.skipped:
            context = fresh_processes()
            self.connection, theirs = context.Pipe()
            arguments = (theirs, method, case, device, dtype, torch.get_num_threads())
            self.process = context.Process(target=work, args=arguments, daemon=True)
            self.process.start()
            theirs.close()

    def answer(self, question: str | None = None):
        """What it answers, or None: then `skipped` says why."""
        if self.skipped:
            return None
        try:
            if question:
                self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            killed = "it was killed, as happens where memory runs out" if code == -9 else f"it ended with code {code}"
            answer = killed
        if isinstance(answer, str) and answer != "ready":
            self.skipped, answer = answer, None
            self.end()
        return answer

    def end(self) -> None:
        if hasattr(self, "process"):
            self.connection.close()
            self.process.terminate()
            self.process.join()

    def told(self) -> dict:
        return {"skipped": self.skipped} if self.skipped else {"seconds": self.seconds, "peak_bytes": self.peak_bytes}


def fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes that nothing was computed in; where the system can fork, torch is imported once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "daam_core", "command_line.options"])
    return context


def reason_against(method: str, case: Case, device: torch.device) -> str | None:
    """Why the method is not even started: a package is missing, or its attention matrices alone need too much."""
    package = METHODS[method].package
    if package and version(package) is None:
        return f"{package} is not installed: {INSTALL}"
    if method == "ours, one by one" and case.batch == 1:
        return "it is one image"
    model = case.build("meta")
    blocks, heads = len(model.blocks), model.blocks[0].attn.num_heads
    needed = METHODS[method].matrices * blocks * heads * tokens(model) ** 2 * case.batch * 4
    if needed > (free := available(device)):
        return f"its attention matrices alone take {needed / 1e9:.0f} GB, of {free / 1e9:.0f} GB that are free"
    return None


def tokens(model: VisionTransformer) -> int:
    return model.num_prefix_tokens + model.patch_embed.num_patches


def available(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return math.inf


def measure(
    case: Case, methods: list[str], device: torch.device, dtype: torch.dtype, rounds: int, limit: float
) -> dict:
    """Up to that many rounds, at least one; fewer where the next would not end within `limit` seconds."""
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
    results = {method: worker.told() for method, worker in workers.items()}
    size = {"model": case.model, "pixels": case.pixels, "batch": case.batch, "tokens": tokens(case.build("meta"))}
    return size | {"rounds": done, "results": results}


# ----------------------------------------------------------------------------------------------------------------------
# What was measured, as tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One method in one case."""

    seconds: tuple[float, float, float]
    """Median, least, most."""
    ratio: tuple[float, float, float] | None
    """The same of the ratio to "forward + backward" of the same round; None where that is not there."""
    megabytes: float
    images_per_second: float


def read(case: dict, method: str) -> Measured | None:
    """None where the method was skipped."""
    told = case["results"].get(method, {"skipped": "not asked for"})
    if "skipped" in told:
        return None
    base = case["results"].get(BASE, {}).get("seconds")
    ratios = [a / b for a, b in zip(told["seconds"], base)] if base else None
    seconds = spread(told["seconds"])
    return Measured(seconds, ratios and spread(ratios), told["peak_bytes"] / 1e6, case["batch"] / seconds[0])


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def name(case: dict) -> str:
    return str(Case(case["model"], case["pixels"], case["batch"]))


def case_table(case: dict) -> str:
    """All that is known of one case, one row a method."""
    lines = [
        f"{name(case)}, {case['tokens']} tokens, {case['rounds']} round{'s' * (case['rounds'] != 1)}", "",
        "| method | seconds, median (range) | x forward + backward | images/s | peak memory |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for method in case["results"]:
        if (m := read(case, method)) is None:
            lines.append(f"| {method} | - | - | - | - |")
            continue
        times = "{:.3f} ({:.3f} to {:.3f})".format(*m.seconds)
        ratios = "{:.2f} ({:.2f} to {:.2f})".format(*m.ratio) if m.ratio else "-"
        lines.append(f"| {method} | {times} | {ratios} | {m.images_per_second:.1f} | {m.megabytes:.0f} MB |")
    return "\n".join([*lines, "", *reasons([case])])


def reasons(cases: list[dict]) -> list[str]:
    """Why a "-" stands in the table; the same reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for method, told in case["results"].items():
            if "skipped" in told and method != "ours, one by one":
                found.setdefault((method, told["skipped"]), []).append(name(case))
    return [f"- {method}: {why} ({'; '.join(of) if len(of) < len(cases) else 'everywhere'})" for (method, why), of
            in found.items()]  # fmt: skip


def readme_table(report: dict) -> str:
    """One row a case: how many times as long as forward + backward, and the peak memory; and what must be known."""
    cases = report["cases"]
    methods = [method for method in METHODS if method != "ours, one by one" and any(read(c, method) for c in cases)]
    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "--:|" * len(methods)]
    for case in cases:
        cells = []
        for method in methods:
            if (m := read(case, method)) is None:
                cells.append("-")
                continue
            time = f"{m.ratio[0]:.2f} x" if m.ratio and method != BASE else f"{m.seconds[0]:.3g} s"
            cells.append(f"{time}<br>{m.megabytes:.0f} MB")
        lines.append(f"| {name(case)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(report)])


def notes(report: dict) -> list[str]:
    """Machine and versions; the rounds; batches against single images; what the methods are; why a "-"."""
    cases = report["cases"]
    lines = [
        f"{report['device']}, {threads(report)}, {report['dtype']}; "
        + ", ".join(f"{package} {number}" for package, number in report["versions"].items()) + ". "
        + "Rounds: " + ", ".join(f"{case['rounds']}" for case in cases) + ".",
    ]  # fmt: skip
    for case in cases:
        batch, single = (
            case["results"].get(method, {}).get("seconds") for method in ("ours (fast)", "ours, one by one")
        )
        if batch and single:
            gain = statistics.median(b / a for a, b in zip(batch, single))
            rates = [case["batch"] / statistics.median(times) for times in (single, batch)]
            lines.append(f"- {name(case)}: {rates[0]:.1f} images/s one by one, {rates[1]:.1f} as a batch, {gain:.2f} x")
    asked = [method for method in METHODS if any(method in case["results"] for case in cases)]
    return [*lines, *(f"- {method}: {METHODS[method].what}" for method in asked if METHODS[method].package),
            *reasons(cases)]  # fmt: skip


def threads(report: dict) -> str:
    return f"{report['threads']} thread{'s' * (report['threads'] != 1)}"


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name")) + f", {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def write_into_readme(text: str) -> None:
    start, end = MARKERS
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What was measured, as a picture
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {  # Okabe and Ito's, which colour-blind people can tell apart; ours stand out, the references are grey
    "forward": "#b0b0b0", BASE: "#606060", "ours (fast)": "#d55e00", "ours (low)": "#e69f00",
    "daam-timm-vit": "#0072b2", "published": "#000000", "Grad-CAM": "#56b4e9", "LeGrad": "#009e73",
    "rollout": "#cc79a7",
}  # fmt: skip


def plot(report: dict, file: Path) -> None:
    """Seconds relative to forward + backward above, peak memory below; one column a case, one colour a method.

    A line joins the cases of a model in which only the batch, or only the size of the images, grows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = report["cases"]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7.6), sharex=True, layout="constrained")
        x = places(cases)
        for axes, title, value in (
            (above, "Time, in forward + backward for activations of the same model and images",
             lambda m: m.ratio or (math.nan,) * 3),
            (below, "Peak memory above the model and its images, in MB", lambda m: (m.megabytes,) * 3),
        ):  # fmt: skip
            ends = {}
            for method in (m for m in COLOURS if any(read(c, m) for c in cases)):
                dots = [(x[i], *value(m)) for i, c in enumerate(cases) if (m := read(c, method)) is not None]
                mine = method.startswith("ours")
                style = {"color": COLOURS[method], "zorder": 5 if mine else 3}
                at, middle, low, high = zip(*dots)
                axes.vlines(at, low, high, linewidth=3 if mine else 2, alpha=0.4, **style)
                for run in runs(cases):
                    part = [d for d in dots if d[0] in {x[i] for i in run}]
                    axes.plot([d[0] for d in part], [d[1] for d in part], "o-", markersize=6 if mine else 4.5,
                              linewidth=2.4 if mine else 1.3, **style)  # fmt: skip
                ends[method] = dots[-1][:2]
            axes.set_yscale("log")
            axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
            axes.grid(axis="y", which="major", color="#e6e6e6")
            axes.set_xlim(min(x) - 0.4, max(x) + 2.4)
            label_ends(axes, ends, max(x) + 0.35)
        above.yaxis.set_major_formatter(lambda v, _: f"{v:g} x")
        above.yaxis.set_minor_formatter(lambda v, _: f"{v:g} x" if f"{v:.0e}"[0] in "235" else "")
        above.axhline(1, color="#606060", linewidth=0.8, zorder=1)
        below.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        below.yaxis.set_minor_formatter("")
        below.set_xticks(x, [f"{c['pixels']} px\n x {c['batch']}" for c in cases])
        for model in dict.fromkeys(c["model"] for c in cases):
            middle = statistics.mean(x[i] for i, c in enumerate(cases) if c["model"] == model)
            below.annotate(SHORT.get(model, model), (middle, 0), (0, -42), ha="center", fontweight="bold",
                           xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
        figure.supxlabel(f"pixels x images in a batch; {report['device']}, {threads(report)}", fontsize=9)
        figure.savefig(file, dpi=200, metadata={"Software": None})
        pyplot.close(figure)


def places(cases: list[dict]) -> list[float]:
    """Where the cases lie on the axis: a step apart within a run, further between runs and models."""
    x = [0.0]
    for a, b in pairwise(cases):
        x.append(x[-1] + (1.6 if a["model"] != b["model"] else 1 if neighbours(a, b) else 1.2))
    return x


def runs(cases: list[dict]) -> list[list[int]]:
    found = [[0]]
    for i, (a, b) in enumerate(pairwise(cases), 1):
        if neighbours(a, b):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def neighbours(a: dict, b: dict) -> bool:
    return a["model"] == b["model"] and (a["pixels"] == b["pixels"] or a["batch"] == b["batch"])


def label_ends(axes, ends: dict[str, tuple[float, float]], at: float) -> None:
    """The methods beside the last of their dots, moved apart where they would overlap."""
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # points
    wanted = {m: height * math.log(y / low) / math.log(high / low) for m, (_, y) in ends.items()}
    order = sorted(wanted, key=wanted.get)
    placed = [wanted[m] for m in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            if (overlap := 13 - (placed[i + 1] - placed[i])) > 0:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
    for method, y in zip(order, placed):
        text = axes.annotate(
            method, (ends[method][0], ends[method][1]), (at, y / height), textcoords=axes.get_xaxis_transform(),
            va="center", color=COLOURS[method], fontweight="bold" if method.startswith("ours") else "normal",
            arrowprops={"arrowstyle": "-", "color": COLOURS[method], "alpha": 0.35, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        text.set_in_layout(False)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--cases", nargs="+", default=QUICK, metavar="MODEL:PIXELS:BATCH",
        help=f"or all (default: {' '.join(QUICK)}; all: and {' '.join(ALL[len(QUICK):])})")  # fmt: skip
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--rounds", type=number(int, 1, 1000), default=7, help="of every case, at most (default: %(default)s)")
    add("--seconds", type=number(float, 0, 1e6), default=180,
        help="for the rounds of a case; it has one in any case (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="the latter two by autocast (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("results", "benchmark"), metavar="DIR",
        help="gets flow.json and flow.png (default: %(default)s)")  # fmt: skip
    add("--read", type=Path, metavar="JSON", help="measure nothing: table and plot of this file")
    add("--write", action="store_true", help="put table, plot and numbers into the repository instead of DIR")
    options = parser.parse_args(arguments)
    try:
        if options.read:
            options.report = json.loads(options.read.read_text(encoding="utf-8"))
            return options
        options.device = find_device(options.device)
        options.cases = [Case.parse(text) for text in (ALL if options.cases == ["all"] else options.cases)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse_options()
    json_file, plot_file = (JSON, PLOT) if options.write else (options.out / "flow.json", options.out / "flow.png")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    report = options.report if options.read else run(options, json_file)
    print(readme_table(report))
    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, plot_file)
    if options.write:
        write_into_readme(readme_table(report))
    print(f"-> {json_file}, {plot_file}")


def run(options: argparse.Namespace, json_file: Path) -> dict:
    """Measure case after case; the file has those that are done."""
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
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(case_table(measured), end="\n\n", flush=True)
    return report


if __name__ == "__main__":
    main()
