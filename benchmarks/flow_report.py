"""Report what `benchmarks/flow.py` measured: a table of each case, the table of docs/benchmarks.md, and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.flow_methods import BASE, METHODS
from models.schema import parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
MARKERS = "<!-- table: benchmark -->", "<!-- end of table -->"
SHORT = {"deit_small_patch16_224": "DeiT-S/16", "vit_small_patch8_224": "ViT-S/8"}
"""Short names of models."""
EXTRA = ("ours, one by one", "ours (no shortcuts)", "ours (relevance, low)")
"""Methods without a column in the table of the page."""
EXPLAINED = ("ours (relevance)", "daam-timm-vit", "Grad-CAM", "LeGrad")
"""Methods that the notes below a table explain."""
COLOURS = {
    "forward": "#b0b0b0", BASE: "#606060", "ours (fast)": "#d55e00", "ours (low)": "#e69f00",
    "ours (relevance)": "#b5a900", "daam-timm-vit": "#0072b2", "published": "#000000", "Grad-CAM": "#56b4e9",
    "LeGrad": "#009e73", "rollout": "#cc79a7",
}  # fmt: skip
"""Methods of the plot, in the colours of Okabe and Ito, which are safe for colour blindness; references are grey."""

RESULT = {"skipped": str, "seconds": [float], "peak_bytes": float}
CASE = {"model": str, "pixels": int, "batch": int, "tokens": int, "rounds": int, "results": {str: RESULT}}
REPORT = {"device": str, "threads": int, "dtype": str, "versions": {str: str}, "cases": [CASE]}
"""Schema of `flow.json`, see `models.schema`."""


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def read_report(file: Path) -> dict:
    """Read the numbers of an earlier measurement.

    Raises:
        ValueError: if the file is not the `flow.json` of a measurement.
    """
    source = f"read: {file}"
    report = parse_json(file.read_bytes(), REPORT, source, tuple(REPORT))
    complete = [
        case.keys() >= CASE.keys() and all(map(_complete, case["results"].values())) for case in report["cases"]
    ]
    if not complete or not all(complete):
        place = f"cases[{complete.index(False)}] is not complete" if complete else "cases is empty"
        raise ValueError(f"{source}: {place}; measure again")
    return report


def _complete(result: dict) -> bool:
    return "skipped" in result or ("peak_bytes" in result and min(result.get("seconds") or [0]) > 0)


@dataclass(frozen=True)
class Measured:
    """One method in one case."""

    seconds: tuple[float, float, float]
    """Median, least, most."""
    ratio: tuple[float, float, float] | None
    """The same of the ratio to "forward + backward" in the same round; None if that was not measured."""
    megabytes: float
    images_per_second: float


def read(case: dict, method: str) -> Measured | None:
    """Return the numbers of a method, or None if it was skipped."""
    result = case["results"].get(method, {"skipped": "not asked for"})
    if "skipped" in result:
        return None
    base = case["results"].get(BASE, {}).get("seconds")
    ratios = [a / b for a, b in zip(result["seconds"], base)] if base else None
    seconds = spread(result["seconds"])
    return Measured(seconds, spread(ratios) if ratios else None, result["peak_bytes"] / 1e6, case["batch"] / seconds[0])


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return median, least and most."""
    return statistics.median(values), min(values), max(values)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def case_table(case: dict) -> str:
    """Return all numbers of one case, one row per method."""
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


def page_table(report: dict) -> str:
    """Return the table of docs/benchmarks.md, one row a case: multiples of forward + backward, and peak memory."""
    cases = report["cases"]
    methods = [method for method in METHODS if method not in EXTRA and any(read(c, method) for c in cases)]
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
    """Return the lines below the table: machine, versions, rounds, batches, methods, and the reason of every "-"."""
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
    asked = [method for method in EXPLAINED if any(method in case["results"] for case in cases)]
    return [*lines, *(f"- {method}: {METHODS[method].what}" for method in asked), *reasons(cases)]


def reasons(cases: list[dict]) -> list[str]:
    """Return the reason of every "-" in a table, each once."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for method, result in case["results"].items():
            if "skipped" in result and method != "ours, one by one":
                found.setdefault((method, result["skipped"]), []).append(name(case))
    return [
        f"- {method}: {reason} ({'; '.join(names) if len(names) < len(cases) else 'everywhere'})"
        for (method, reason), names in found.items()
    ]


def name(case: dict) -> str:
    """Return model, pixels and batch of a case in words."""
    return f"{SHORT.get(case['model'], case['model'])}, {case['pixels']} px, batch {case['batch']}"


def threads(report: dict) -> str:
    """Return the number of threads in words."""
    return f"{report['threads']} thread{'s' * (report['threads'] != 1)}"


def write_into_page(report: dict) -> None:
    """Replace the table of docs/benchmarks.md."""
    start, end = MARKERS
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(f"{before}{start}\n{page_table(report)}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The plot
# ----------------------------------------------------------------------------------------------------------------------


def plot(report: dict, file: Path) -> None:
    """Plot time relative to forward + backward, and peak memory below: one column per case, one colour per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = report["cases"]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7.6), sharex=True, layout="constrained")
        draw_methods(above, cases, "Time, in forward + backward for activations of the same model and images",
                     lambda m: m.ratio or (math.nan,) * 3)  # fmt: skip
        draw_methods(below, cases, "Peak memory above the model and its images, in MB", lambda m: (m.megabytes,) * 3)
        above.yaxis.set_major_formatter(lambda v, _: f"{v:g} x")
        above.yaxis.set_minor_formatter(lambda v, _: f"{v:g} x" if f"{v:.0e}"[0] in "235" else "")
        above.axhline(1, color="#606060", linewidth=0.8, zorder=1)
        below.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        below.yaxis.set_minor_formatter("")
        label_cases(below, cases)
        figure.supxlabel(f"pixels x images in a batch; {report['device']}, {threads(report)}", fontsize=9)
        figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
        pyplot.close(figure)


def draw_methods(
    axes: Axes, cases: list[dict], title: str, value: Callable[[Measured], tuple[float, float, float]]
) -> None:
    """Draw middle, least and most of a value of every method.

    A line joins the cases of a model in which only the batch, or only the size of the images, grows.
    """
    x = places(cases)
    ends = {}
    for method in (m for m in COLOURS if any(read(c, m) for c in cases)):
        dots = [(x[i], *value(m)) for i, c in enumerate(cases) if (m := read(c, method)) is not None]
        mine = method.startswith("ours")
        style = {"color": COLOURS[method], "zorder": 5 if mine else 3}
        at, _, low, high = zip(*dots)
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


def label_cases(axes: Axes, cases: list[dict]) -> None:
    """Write pixels and batch below every case, and the model below its cases."""
    x = places(cases)
    axes.set_xticks(x, [f"{c['pixels']} px\n x {c['batch']}" for c in cases])
    for model in dict.fromkeys(c["model"] for c in cases):
        middle = statistics.mean(x[i] for i, c in enumerate(cases) if c["model"] == model)
        axes.annotate(SHORT.get(model, model), (middle, 0), (0, -42), ha="center", fontweight="bold",
                      xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]], at: float) -> None:
    """Write the methods beside their last dots, moved apart until they do not overlap."""
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # points
    wanted = {m: height * math.log(y / low) / math.log(high / low) for m, (_, y) in ends.items()}
    order = sorted(wanted, key=wanted.__getitem__)
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


def places(cases: list[dict]) -> list[float]:
    """Return the x of every case: one step apart within a run, further apart between runs and models."""
    x = [0.0]
    for a, b in pairwise(cases):
        x.append(x[-1] + (1.6 if a["model"] != b["model"] else 1 if joined(a, b) else 1.2))
    return x


def runs(cases: list[dict]) -> list[list[int]]:
    """Return the indices of cases that one line joins."""
    found = [[0]]
    for i, (a, b) in enumerate(pairwise(cases), 1):
        if joined(a, b):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def joined(a: dict, b: dict) -> bool:
    """Return whether two cases differ in the batch only, or in the pixels only."""
    return a["model"] == b["model"] and (a["pixels"] == b["pixels"] or a["batch"] == b["batch"])
