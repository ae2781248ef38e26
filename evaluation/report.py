"""From records, a line a photo, to what a reader sees: tables with intervals and significance, curves, photos.

    print(write_report("evaluated"))

A folder holds `run.json` (what was asked), `photos.jsonl` (scores and curves of every photo) and `sanity.jsonl` (rank
correlations). The first method is ours; all others are compared with it on the same photos.

Sections: reading; statistics; tables; pictures; the whole report.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from daam_vit.drawing import truncate
from daam_vit.files import atomic_write
from evaluation.metrics import METRICS, SANITY
from models.images import resize_longest_side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = METRICS | SANITY
CONTROLS = ("random", "centre")
"""Methods that know nothing of the model; a method should beat them."""
RESAMPLES = 9_999
"""Of the photos, for intervals and tests."""
BATCH = 500
"""Resamples at once: at 1,212 photos and 13 methods less than 200 MB."""
SIGNIFICANT = 0.05

TABLES = {
    "Patches removed and put back": ("deletion_mean", "deletion_blur", "insertion_mean", "insertion_blur"),
    "Masked photo, object, sparsity": ("average_drop", "increase", "energy", "iou", "sparsity"),
    "Sanity": ("randomised", "class", "flip"),
}
"""Narrow enough for a page, each."""
PERCENT = ("average_drop", "increase")

MEANINGS = {
    "deletion": "area under the curve of the class's probability while patches are removed, the most relevant first "
    "(Petsiuk et al. 2018, [RISE](https://arxiv.org/abs/1806.07421)); in their place comes the mean colour of the "
    "whole photo, or the photo blurred",
    "insertion": "the same, while they are put back, the most relevant first",
    "average_drop": "how much of the probability is lost when the photo is multiplied by the map (Chattopadhyay et al. "
    "2018, [Grad-CAM++](https://arxiv.org/abs/1710.11063))",
    "increase": "photos whose probability rises by that (same source)",
    "energy": "share of the map inside the annotated objects, whatever their class (Wang et al. 2020, [Score-CAM](https://arxiv.org/abs/1910.01279))",
    "iou": "overlap of the annotated objects and the map above its mean (Chefer et al. 2021, "
    "[Transformer Interpretability](https://arxiv.org/abs/2012.09838))",
    "sparsity": "how concise the map is, not how right: its Gini index, 0 flat to 1 one patch (Hurley and Rickard "
    "2009, [Comparing Measures of Sparsity](https://arxiv.org/abs/0811.4706))",
    "randomised": "rank correlation, without its sign, with the map of the model whose weights are all random, one "
    "draw for all photos (Adebayo et al. 2018, "
    "[Sanity Checks](https://arxiv.org/abs/1810.03292))",
    "class": "rank correlation with the map of another class",
    "flip": "rank correlation with the map of the mirrored photo, mirrored back",
}
"""Of a metric, or of all that begin so."""


# Reading --------------------------------------------------------------------------------------------------------------


def read_lines(path: str | Path) -> list[dict]:
    """The records of a file, a JSON object with a "photo" each line; a last line that was cut, by a kill, is dropped.

    Raises:
        ValueError: when another line is none.
    """
    records = []
    *whole, rest = Path(path).read_bytes().split(b"\n")  # `rest` is what no line end follows
    for number, line in enumerate([*whole, rest], 1):
        cut = number > len(whole)
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("photo"), str):
                raise ValueError
        except ValueError:  # also not UTF-8
            if cut:
                break
            raise ValueError(f"records: line {number} of {path} is no record of a photo; delete the line") from None
        records.append(record)
    return records


Values = dict[str, dict[str, dict[str, float]]]
"""By metric, method and photo."""


def photo_values(photos: Iterable[dict], methods: Sequence[str]) -> Values:
    """The scores of the records of `photos.jsonl`."""
    return _nested(
        (metric, method, record["photo"], record["scores"].get(method, {}).get(metric))
        for metric in METRICS
        for method in methods
        for record in photos
    )


def block_values(photos: Iterable[dict]) -> Values:
    """The scores of the accumulated maps A_1 ... A_L: "block 1" ... "block L" take the place of methods."""
    return _nested(
        (metric, f"block {b}", record["photo"], scores.get(metric))
        for metric in METRICS
        for record in photos
        for b, scores in enumerate(record.get("blocks") or (), 1)
    )


def sanity_values(sanity: Iterable[dict], methods: Sequence[str]) -> Values:
    """The correlations of the records of `sanity.jsonl`; of the randomised stages the last, without its sign, since an
    inverted map is as much bound to the original as the map itself."""

    def value(of: dict, metric: str) -> float | None:
        if metric == "randomised":
            return abs(of[metric][-1]) if of.get(metric) else None
        return of.get(metric)

    return _nested(
        (metric, method, record["photo"], value(record["methods"].get(method, {}), metric))
        for metric in SANITY
        for method in methods
        for record in sanity
    )


def _nested(cells: Iterable[tuple[str, str, str, float | None]]) -> Values:
    """Without what a photo or a method lacks."""
    values: Values = {}
    for metric, method, photo, value in cells:
        if value is not None and math.isfinite(value):
            values.setdefault(metric, {}).setdefault(method, {})[photo] = float(value)
    return values


# Statistics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was measured of a method by a metric; NaN where it cannot be said."""

    method: str
    metric: str
    direction: str
    """The good one: "lower" or "higher"."""
    n: int
    """Photos."""
    mean: float
    low: float
    """With `high`, the 95 % interval of the mean."""
    high: float
    difference: float = math.nan
    """Mean over the photos that both have: this method minus ours."""
    difference_low: float = math.nan
    difference_high: float = math.nan
    p: float = math.nan
    """That it differs from ours by chance, by Holm's correction over the methods of the metric."""

    @property
    def mark(self) -> str:
        """▲ significantly better than ours, ▼ worse, or nothing."""
        if not self.p < SIGNIFICANT:  # also NaN
            return ""
        return "▲" if (self.difference < 0) == (self.direction == "lower") else "▼"


def statistics(values: Values, ours: str | None = None, seed: int = 0) -> list[Row]:
    """Mean of every method by every metric; and, given the name of `ours`, how the other methods differ from it."""
    rows = []
    for metric, methods in values.items():
        photos = sorted({photo for of in methods.values() for photo in of})
        matrix = np.array([[of.get(photo, np.nan) for photo in photos] for of in methods.values()])  # (K, n)
        columns = {"n": np.isfinite(matrix).sum(1), **_columns(("mean", "low", "high"), intervals(matrix, seed))}
        if ours in methods:
            k = list(methods).index(ours)
            differences = matrix - matrix[k]
            differences[k] = np.nan
            names = ("difference", "difference_low", "difference_high")
            columns |= _columns(names, intervals(differences, seed)) | {"p": holm(sign_flip_p(differences, seed))}
        for i, method in enumerate(methods):
            rows.append(Row(method, metric, HEADINGS[metric][1], **{k: v[i].item() for k, v in columns.items()}))
    return rows


def intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean of every row of `(K, n)` and its 95 % bootstrap interval by percentiles: `(K, 3)` mean, low, high.

    NaN is left out; of one value there is no interval, of none no mean.
    """
    result = np.full((len(values), 3), np.nan)
    for rows, present in _alike(values):
        result[rows, 0] = present.mean(1)
        if present.shape[1] > 1:
            result[rows, 1:] = np.transpose(
                stats.bootstrap(
                    (present,),
                    np.mean,
                    axis=1,
                    vectorized=True,
                    method="percentile",
                    n_resamples=RESAMPLES,
                    batch=max(1, BATCH // len(present)),
                    rng=np.random.default_rng(seed),
                ).confidence_interval
            )
    return result


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Of every row of paired differences `(K, n)`, how probable a mean so far from 0 is when signs are chance: `(K,)`.

    Two-sided; exact where all signs can be tried, by `RESAMPLES` random ones else. NaN is left out; of one value there
    is no p. It is the signs that scipy permutes, once for all rows.
    """
    p = np.full(len(differences), np.nan)
    for rows, present in _alike(differences):
        if present.shape[1] > 1:
            p[rows] = stats.permutation_test(
                (np.ones(present.shape[1]),),
                lambda signs, axis, present=present: signs @ present.T,  # (resamples, n) -> (resamples, K)
                permutation_type="samples",
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=BATCH,
                rng=np.random.default_rng(seed),
            ).pvalue
    return p


def holm(p: np.ndarray) -> np.ndarray:
    """Corrected for how many there are `(K,)`, NaN left out: Holm 1979, https://www.jstor.org/stable/4615733."""
    order = np.argsort(p)  # NaN last
    factors = np.isfinite(p).sum() - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return corrected


def _alike(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `(K, n)` that lack the same columns, together: which they are, `(K,)` bool, and their values."""
    present = np.isfinite(values)
    for columns in np.unique(present, axis=0):
        if columns.any():
            rows = (present == columns).all(1)
            yield rows, values[rows][:, columns]


def _columns(names: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names, values.T))


# Tables ---------------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """One row a method, in the order of `rows`, one column a metric of those that were measured; the best mean of a
    column is bold, the last row says of how many photos. Empty when nothing was measured."""
    by = {(row.method, row.metric): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows if row.metric in metrics))
    metrics = [metric for metric in metrics if any(metric == row.metric for row in rows)]
    if not metrics:
        return ""
    lines = [["", *map(_heading, metrics)]]
    for method in methods:
        lines.append([method, *(_cell(by.get((method, metric)), rows) for metric in metrics)])
    lines.append(["photos", *(_count([row.n for row in rows if row.metric == metric]) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [padded[0], rule, *padded[1:]])


def _heading(metric: str) -> str:
    name, direction = HEADINGS[metric]
    return f"{name}{', %' if metric in PERCENT else ''} {'↓' if direction == 'lower' else '↑'}"


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return ""
    scale, digits = (100, 1) if row.metric in PERCENT else (1, 3)
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (row.mean, row.low, row.high))
    means = [other.mean for other in rows if other.metric == row.metric]
    if len(means) > 1 and row.mean == (min if row.direction == "lower" else max)(means):
        mean = f"**{mean}**"
    return " ".join(filter(None, [mean, "" if math.isnan(row.low) else f"[{low}, {high}]", row.mark]))


def _count(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def method_tables(rows: Sequence[Row], run: dict, done: int) -> str:
    """The Markdown of all methods: the tables, and below them what they say."""
    ours = run["methods"][0]
    tables = [f"**{title}**\n\n{table}" for title, names in TABLES.items() if (table := markdown_table(rows, names))]
    of = f"{done} of {run['photos']} photos" if done < run["photos"] else f"{done} photo{'s' * (done != 1)}"
    what = f"{of} of `{run['images']}`, model `{run['model']}`; explained is the class that it predicts"
    if run["dtype"] != "float32":
        what += f"; where patches are removed or put back it computes in {run['dtype']}"
    notes = [f"{what}. Bold: the best mean of a column. ↓ lower is better, ↑ higher is."]
    if done > 1:
        notes += [
            f"Mean [95 % interval, by bootstrap over the photos]. ▲ better than {ours}, ▼ worse: p < {SIGNIFICANT} in "
            "a sign-flip permutation test, paired by photo, with Holm's correction over the methods of a column."
        ]
    measured = {row.metric for row in rows}
    meanings = [
        f"- {_words(key)}: {text}"
        for key, text in MEANINGS.items()
        if any(metric.startswith(key) for metric in measured)
    ]
    return "\n".join(tables) + "\n" + "\n\n".join([*notes, "\n".join(meanings)]) + "\n"


def _words(key: str) -> str:
    return HEADINGS[key][0] if key in HEADINGS else key


def block_tables(rows: Sequence[Row], run: dict) -> str:
    """The Markdown of the accumulated maps A_1 ... A_L."""
    tables = [f"**{title}**\n\n{table}" for title, names in TABLES.items() if (table := markdown_table(rows, names))]
    note = (
        f"The attention flow of {run['methods'][0]}, block by block: its map after block b is the sum of those of the "
        f"blocks 1 to b. Model `{run['model']}`; mean [95 % interval, by bootstrap over the photos]; bold: best."
    )
    return "\n".join(tables) + f"\n{note}\n"


def to_csv(rows: Sequence[Row]) -> str:
    """All rows, one a line; what cannot be said is empty. Nothing is rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value != value else value for key, value in asdict(row).items()})
    return text.getvalue()


# Pictures -------------------------------------------------------------------------------------------------------------

COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#332288")
"""Told apart by those who do not see all colours: Okabe and Ito, https://jfly.uni-koeln.de/color/; indigo by Tol."""
OURS, VARIANTS, GREY = "#D55E00", "#E69F00", "#888888"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)))


def line_styles(methods: Sequence[str]) -> dict[str, dict]:
    """Of every method: ours, the first, is thick, its variants (`<ours>-...`) have its hue, controls are grey."""
    ours, variants, others, controls = methods[0], [], [], []
    for method in methods[1:]:
        (variants if method.startswith(f"{ours}-") else controls if method in CONTROLS else others).append(method)
    styles = {ours: {"color": OURS, "linewidth": 3, "zorder": 3}}
    for i, method in enumerate(variants):
        styles[method] = {"color": VARIANTS, "linewidth": 1.3, "linestyle": DASHES[i % len(DASHES)]}
    for i, method in enumerate(others):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[method] = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.3, "linestyle": dash}
    for i, method in enumerate(controls):
        styles[method] = {"color": GREY, "linewidth": 1.3, "linestyle": DASHES[1 + i % 2], "zorder": 1}
    return styles


def curves_figure(photos: Sequence[dict], run: dict) -> Figure | None:
    """Mean probability of the class while patches are removed or put back; None when no photo has curves."""
    measured = {name for record in photos for of in record.get("curves", {}).values() for name in of}
    kinds = {"deletion": "removed (steeper fall is better)", "insertion": "put back (steeper rise is better)"}
    baselines = [b for b in run["baselines"] if any(f"{kind}_{b}" in measured for kind in kinds)]
    if not baselines:
        return None
    figure = _figure(10, 3.6 * len(baselines))
    panels = figure.subplots(len(baselines), 2, sharex=True, sharey=True, squeeze=False)
    for (baseline, kind), panel in zip([(b, k) for b in baselines for k in kinds], panels.flat):
        for method, style in line_styles(run["methods"]).items():
            curves = [c for r in photos if (c := r.get("curves", {}).get(method, {}).get(f"{kind}_{baseline}"))]
            if curves:
                mean = np.mean(curves, 0)
                panel.plot(np.linspace(0, 100, len(mean)), mean, label=method, **style)
        panel.set_title(f"{kind}, {baseline}", fontsize=11)
        panel.set_xlim(0, 100)
    panels[0, 0].set_ylim(0)  # of all of them, now that all curves are there
    figure.suptitle(f"{run['model']}, {len(photos)} photo{'s' * (len(photos) != 1)}", fontsize=11)
    for panel, words in zip(panels[-1], kinds.values()):
        panel.set_xlabel(f"% of the patches {words}")
    for panel in panels[:, 0]:
        panel.set_ylabel("probability of the class")
    return _with_legend(figure, panels)


def sanity_figure(sanity: Sequence[dict], run: dict) -> Figure | None:
    """Rank correlation with the original map while the model loses what it learned; None without records."""
    figure = _figure(10, 4.6)
    panel = figure.subplots()
    stages = ["as trained", *run["stages"]]
    for method, style in line_styles(run["methods"]).items():
        falls = [fall for record in sanity if (fall := record["methods"].get(method, {}).get("randomised"))]
        if falls:
            panel.plot(range(len(stages)), [1, *np.abs(falls).mean(0)], label=method, **style)
    if not panel.lines:
        return None
    panel.axhline(0, color="black", linewidth=0.6, zorder=0)
    panel.set_xticks(range(len(stages)), stages, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_xlim(0, len(stages) - 1)
    panel.set_xlabel("random weights down to here, from the top")
    panel.set_ylabel("|rank correlation| with the map as trained")
    panel.set_title("a map that depends on what was learned falls to 0", fontsize=11)
    return _with_legend(figure, np.array([[panel]]))


def blocks_figure(rows: Sequence[Row], run: dict) -> Figure | None:
    """Areas under the deletion and insertion curves of A_1 ... A_L with their intervals; None without them."""
    kinds = [kind for kind in ("deletion", "insertion") if any(row.metric.startswith(f"{kind}_") for row in rows)]
    if not kinds:
        return None
    figure = _figure(4.8 * len(kinds), 3.6)
    panels = figure.subplots(1, len(kinds), squeeze=False)
    for kind, panel in zip(kinds, panels[0]):
        metrics = dict.fromkeys(row.metric for row in rows if row.metric.startswith(f"{kind}_"))
        for i, metric in enumerate(metrics):
            of = [row for row in rows if row.metric == metric]
            blocks = [int(row.method.removeprefix("block ")) for row in of]
            style = {"color": (COLOURS[0], OURS)[i % 2], "linestyle": DASHES[i % len(DASHES)]}
            panel.plot(blocks, [row.mean for row in of], label=metric.removeprefix(f"{kind}_"), marker=".", **style)
            bounds = [row.low for row in of], [row.high for row in of]
            panel.fill_between(blocks, *bounds, color=style["color"], alpha=0.15, linewidth=0)
            panel.set_xticks(blocks[:: math.ceil(len(blocks) / 16)])
        panel.set_title(f"{kind}: {HEADINGS[metric][1]} is better", fontsize=11)
        panel.set_xlabel("accumulated up to block")
        panel.legend(title="baseline", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("area under the curve")
    photos = max(row.n for row in rows)
    figure.suptitle(f"{run['model']}, {photos} photo{'s' * (photos != 1)}", fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    """In inches, with a canvas of its own: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _with_legend(figure: Figure, panels: np.ndarray) -> Figure:
    """One legend for all panels, on the right."""
    lines = {line.get_label(): line for panel in panels.flat for line in panel.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, handlelength=3)
    for panel in panels.flat:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def sheet(
    photos: Sequence[dict],
    methods: Sequence[str],
    picture: Callable[[dict, str], Image.Image],
    path: str | Path,
    count: int = 3,
    side: int = 150,
) -> None:
    """Write a page with a row a method: the photos where it does best, and those where it does worst.

    Args:
        photos: records of `photos.jsonl`; those without scores of a method are left out.
        methods: names.
        picture: draws the map of a method over the photo of a record, at any size.
        path: of the PNG.
        count: photos at each end; no photo is at both, so that there are fewer where there are few.
        side: of a tile, in pixels.

    Raises:
        ValueError: when no method has a photo with deletion and insertion.
    """
    ranked = {method: best_first(photos, method) for method in methods}
    ranked = {method: of for method, of in ranked.items() if of}
    if not ranked:
        raise ValueError("photos: none has deletion and insertion; a sheet needs both")
    font, gap, line = ImageFont.load_default(13), 8, 17
    left = min(2 * side, max(math.ceil(font.getlength(method)) for method in ranked)) + 2 * gap
    right = left + count * (side + gap) + 2 * gap  # where the worst begin
    width = right + count * (side + gap)
    rows = [Image.new("RGB", (width, line + 2 * gap), "white")]
    for x, words in ((left, "best: insertion high, deletion low"), (right, "worst")):
        ImageDraw.Draw(rows[0]).text((x, gap), truncate(words, font, count * side), "black", font)
    for method, of in ranked.items():
        best, worst = of[: min(count, (len(of) + 1) // 2)], of[::-1][: min(count, len(of) // 2)]
        places = [(x + i * (side + gap), r) for x, end in ((left, best), (right, worst)) for i, r in enumerate(end)]
        tiles = [resize_longest_side(picture(r, method).convert("RGB"), side) for _, r in places]
        height = max(tile.height for tile in tiles)
        rows.append(Image.new("RGB", (width, height + 2 * line + 2 * gap), "white"))
        draw = ImageDraw.Draw(rows[-1])
        draw.text((gap, height // 2), truncate(method, font, left - 2 * gap), "black", font, anchor="lm")
        for (x, record), tile in zip(places, tiles):
            rows[-1].paste(tile, (x, height - tile.height))
            insertion, deletion = _areas(record, method)
            for i, text in enumerate((record["name"], f"ins {insertion:.2f}  del {deletion:.2f}")):
                draw.text((x, height + 3 + i * line), truncate(text, font, side), "black", font)
    page = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    with atomic_write(path) as part:
        page.save(part, "PNG")


def best_first(photos: Iterable[dict], method: str) -> list[dict]:
    """The records that have scores of the method, by insertion minus deletion, each the mean of its baselines."""
    measured = [record for record in photos if _areas(record, method) is not None]
    return sorted(measured, key=lambda record: np.subtract(*_areas(record, method)), reverse=True)


def _areas(record: dict, method: str) -> tuple[float, float] | None:
    """Insertion and deletion, the mean of their baselines; None without one of them."""
    scores = record["scores"].get(method, {})
    areas = [[v for k, v in scores.items() if k.startswith(f"{kind}_")] for kind in ("insertion", "deletion")]
    return (float(np.mean(areas[0])), float(np.mean(areas[1]))) if all(areas) else None


# The whole report -----------------------------------------------------------------------------------------------------


def write_report(directory: str | Path, picture: Callable[[dict, str], Image.Image] | None = None) -> str:
    """Write `table.md`, `table.csv`, `curves.png`, and where there is something to tell `blocks.md`, `blocks.png`,
    `sanity.png` and, given `picture`, `sheet.png`; each appears whole or not at all.

    Args:
        directory: with `run.json`, `photos.jsonl` and perhaps `sanity.jsonl`; not all photos need be done.
        picture: see `sheet`.

    Returns:
        What `table.md` holds.

    Raises:
        ValueError: when there is no run or no photo is done, or a file is damaged.
    """
    directory = Path(directory)
    run, photos, sanity = read_run(directory)
    methods, seed = run["methods"], run["seed"]
    values = photo_values(photos, methods) | sanity_values(sanity, methods)
    rows = statistics(values, methods[0], seed)
    blocks = statistics(block_values(photos), seed=seed)
    texts = {"table.md": method_tables(rows, run, len(photos)), "table.csv": to_csv(rows)}
    if blocks:
        texts["blocks.md"] = block_tables(blocks, run)
    for name, text in texts.items():
        with atomic_write(directory / name) as part:
            part.write_text(text, encoding="utf-8", newline="")
    figures = {
        "curves.png": curves_figure(photos, run),
        "blocks.png": blocks_figure(blocks, run),
        "sanity.png": sanity_figure(sanity, run),
    }
    for name, figure in figures.items():
        if figure is not None:
            with atomic_write(directory / name) as part:
                figure.savefig(part, format="png")
    if picture is not None and any(best_first(photos, method) for method in methods):
        sheet(photos, methods, picture, directory / "sheet.png")
    return texts["table.md"]


def read_run(directory: str | Path) -> tuple[dict, list[dict], list[dict]]:
    """`run.json` and the records of `photos.jsonl` and `sanity.jsonl`; of a photo that is there twice, the last.

    Raises:
        ValueError: when there is no run or no photo is done, or a file is damaged.
    """
    directory = Path(directory)
    run = read_settings(directory)
    files = [directory / "photos.jsonl", directory / "sanity.jsonl"]
    photos, sanity = ({r["photo"]: r for r in read_lines(path)} if path.exists() else {} for path in files)
    if not photos:
        raise ValueError(f"directory: no photo in {directory} is done; let the evaluation run for longer")
    return run, list(photos.values()), list(sanity.values())


def read_settings(directory: str | Path) -> dict:
    """`run.json`.

    Raises:
        ValueError: when it is not there, or damaged.
    """
    file = Path(directory, "run.json")
    try:
        run = json.loads(file.read_bytes())
        if not isinstance(run, dict):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"directory: {directory} has no run.json; name the folder of an evaluation") from None
    except ValueError:
        raise ValueError(f"directory: {file} is damaged; run the evaluation again, in another folder") from None
    return run
