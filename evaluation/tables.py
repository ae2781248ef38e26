"""Write the tables of an evaluation: Markdown for readers, CSV with every number."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields

from daam_vit.text import printable
from evaluation.comparison import SIGNIFICANT, Row
from evaluation.metrics import HEADINGS, MOSAICS

TABLES = {
    "Patches removed and put back": ("deletion_mean", "deletion_blur", "insertion_mean", "insertion_blur"),
    "Masked photo, object, sparsity": ("average_drop", "increase", "energy", "iou", "sparsity"),
    "Grid pointing game": ("pointing",),
    "Sanity": ("randomised", "class", "flip"),
}
"""Metrics of every Markdown table; each is narrow enough for a page."""
PERCENT = ("average_drop", "increase")
"""Metrics that are shown in percent."""

MEANINGS = {
    "deletion": "area under the curve of the class's probability while patches are removed, the most relevant first; "
    "the mean colour of the photo, or the blurred photo, takes their place (Petsiuk et al. 2018, "
    "[RISE](https://arxiv.org/abs/1806.07421))",
    "insertion": "the same while patches are put back, the most relevant first",
    "average_drop": "how much of the probability is lost when the photo is multiplied by the map (Chattopadhyay et al. "
    "2018, [Grad-CAM++](https://arxiv.org/abs/1710.11063))",
    "increase": "share of the photos whose probability rises when they are multiplied by the map (same source)",
    "energy": "share of the map inside the annotated objects of any class (Wang et al. 2020, "
    "[Score-CAM](https://arxiv.org/abs/1910.01279))",
    "iou": "overlap of the annotated objects with the map above its mean (Chefer et al. 2021, "
    "[Transformer Interpretability](https://arxiv.org/abs/2012.09838))",
    "sparsity": "how concise the map is, not how right: its Gini index, 0 for a flat map, 1 for a single patch (Hurley "
    "and Rickard 2009, [Comparing Measures of Sparsity](https://arxiv.org/abs/0811.4706))",
    "pointing": "how much of the positive map of a class lies on its own photo, in a mosaic of four confidently "
    "classified photos of different classes, mean over those that can be explained; 0.25 is chance (Böhle et al. 2021, "
    "[CoDA-Nets](https://arxiv.org/abs/2104.00032))",
    "randomised": "absolute rank correlation with the map of the model with random weights, the same for all photos "
    "(Adebayo et al. 2018, [Sanity Checks](https://arxiv.org/abs/1810.03292))",
    "class": "rank correlation with the map of another class",
    "flip": "rank correlation with the map of the mirrored photo, mirrored back",
}
"""Explanation of a metric, or of all metrics that begin like this."""


def markdown_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return a table with one row per method, in the order of `rows`, and one column for each metric that was measured.

    The best mean of a column is bold; the last row counts the photos, or mosaics. Empty if nothing was measured.
    """
    by_name = {(row.method, row.metric): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows if row.metric in metrics))
    metrics = [metric for metric in metrics if any(metric == row.metric for row in rows)]
    if not metrics:
        return ""
    lines = [["", *map(_heading, metrics)]]
    for method in methods:
        lines.append([_plain(method), *(_cell(by_name.get((method, metric)), rows) for metric in metrics)])
    counted = "mosaics" if set(metrics) <= set(MOSAICS) else "photos"
    lines.append([counted, *(_count([row.n for row in rows if row.metric == metric]) for metric in metrics)])
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
    """Return the Markdown of all methods: the tables, and how to read them.

    Args:
        rows: from `statistics`.
        run: `run.json`.
        done: number of photos that were scored.
    """
    ours = _plain(run["methods"][0])
    tables = [f"**{title}**\n\n{table}" for title, names in TABLES.items() if (table := markdown_table(rows, names))]
    photos = f"{done} of {run['photos']} photos" if done < run["photos"] else f"{done} photo{'s' * (done != 1)}"
    what = (
        f"{photos} of {_code(run['images'])}, model {_code(run['model'])}; the maps explain the class that it predicts"
    )
    if run["dtype"] != "float32":
        what += f"; deletion and insertion are computed in {_plain(run['dtype'])}"
    notes = [f"{what}. Bold: the best mean of a column. ↓ lower is better, ↑ higher is better."]
    measured = {row.metric for row in rows}
    if done > 1:
        or_mosaics = ", or mosaics" if measured & set(MOSAICS) else ""
        notes += [
            f"Mean [95 % bootstrap interval over the photos{or_mosaics}]. ▲ better than {ours}, ▼ worse: "
            f"p < {SIGNIFICANT} in a paired sign-flip permutation test with Holm's correction over the methods of a "
            "column."
        ]
    meanings = [
        f"- {_words(key)}: {text}"
        for key, text in MEANINGS.items()
        if any(metric.startswith(key) for metric in measured)
    ]
    return "\n".join(tables) + "\n" + "\n\n".join([*notes, "\n".join(meanings)]) + "\n"


def _words(key: str) -> str:
    return HEADINGS[key][0] if key in HEADINGS else key


def _plain(text: str) -> str:
    """Escape text for Markdown, on one line, so that it is read neither as Markdown nor as HTML."""
    return re.sub(r"[\\`*_\[\]<>&|]", r"\\\g<0>", printable(text))


def _code(text: str) -> str:
    """Return text as inline code of Markdown, on one line, between more backticks than it has in a row."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def block_tables(rows: Sequence[Row], run: dict) -> str:
    """Return the Markdown of the accumulated maps A_1 ... A_L; arguments as in `method_tables`."""
    tables = [f"**{title}**\n\n{table}" for title, names in TABLES.items() if (table := markdown_table(rows, names))]
    note = (
        f"The attention flow of daam, block by block: its map after block b is the sum of the "
        f"maps of blocks 1 to b. Model {_code(run['model'])}; mean [95 % bootstrap interval over the photos]; bold: "
        "best."
    )
    return "\n".join(tables) + f"\n{note}\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Return all rows as CSV, not rounded; NaN is empty, and a text that a spreadsheet would compute begins with '."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in asdict(row).items()})
    return text.getvalue()


def _csv_cell(value: str | float) -> str | float:
    if isinstance(value, str):
        return f"'{printable(value)}" if value[:1] in tuple("=+-@") else printable(value)
    return "" if math.isnan(value) else value
