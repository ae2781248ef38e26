"""Draw the figures of an evaluation with matplotlib: removal curves, sanity checks and the flow block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from daam_vit.fonts import matplotlib_text
from evaluation.comparison import Row
from evaluation.metrics import HEADINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = ("random", "centre")
"""Methods that know nothing about the model; a method should be better."""
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#332288", "#882255", "#999933")
"""Colours that colour-blind people can distinguish: Okabe and Ito, https://jfly.uni-koeln.de/color/; the last three by
Tol, https://personal.sron.nl/~pault/."""
VARIANTS, GREY = "#E69F00", "#888888"
THICK = {"daam": "#D55E00", "daam-relevance": "#000000"}
"""Colours of the two methods that a reader looks for first."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)))


def line_styles(methods: Sequence[str]) -> dict[str, dict]:
    """Style every method.

    `daam` and `daam-relevance` are thick; the other variants `daam-...` share their hue, a method and its
    `...-log-odds` their colour; controls are grey.
    """
    variants, others, controls, styles = [], [], [], {}
    for method in methods:
        if method in THICK:
            styles[method] = {"color": THICK[method], "linewidth": 3, "zorder": 3}
        else:
            variant = method.startswith("daam-")
            (variants if variant else controls if method in CONTROLS else others).append(method)
    for i, method in enumerate(variants):
        styles[method] = {"color": VARIANTS, "linewidth": 1.3, "linestyle": DASHES[i % len(DASHES)]}
    pairs = {method: method.removesuffix("-log-odds") for method in others}
    alone = [method for method, other in pairs.items() if other == method or other not in others]
    for i, method in enumerate(alone):
        dash = DASHES[i // len(COLOURS) * 2 % len(DASHES)]
        styles[method] = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.3, "linestyle": dash}
    for method, other in pairs.items():
        if method not in styles:
            styles[method] = styles[other] | {"linestyle": DASHES[DASHES.index(styles[other]["linestyle"]) + 1]}
    for i, method in enumerate(controls):
        styles[method] = {"color": GREY, "linewidth": 1.3, "linestyle": DASHES[1 + i % 2], "zorder": 1}
    return {method: styles[method] for method in methods}


def curves_figure(photos: Sequence[dict], run: dict) -> Figure | None:
    """Draw the mean probability of the class while patches are removed or put back; None if no photo has curves."""
    measured = {name for record in photos for curves in record.get("curves", {}).values() for name in curves}
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
    panels[0, 0].set_ylim(0)  # shared by all panels
    _write_title(figure, run, len(photos))
    for panel, words in zip(panels[-1], kinds.values()):
        panel.set_xlabel(f"% of the patches {words}")
    for panel in panels[:, 0]:
        panel.set_ylabel("probability of the class")
    return _with_legend(figure, panels)


def sanity_figure(sanity: Sequence[dict], run: dict) -> Figure | None:
    """Draw the rank correlation with the original map while weights become random; None without records."""
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
    panel.set_xlabel("weights are random from the top down to here")
    panel.set_ylabel("|rank correlation| with the map as trained")
    panel.set_title("a map that depends on what was learned falls to 0", fontsize=11)
    return _with_legend(figure, np.array([[panel]]))


def blocks_figure(rows: Sequence[Row], run: dict) -> Figure | None:
    """Draw the areas under the deletion and insertion curves of A_1 ... A_L with intervals; None without them."""
    kinds = [kind for kind in ("deletion", "insertion") if any(row.metric.startswith(f"{kind}_") for row in rows)]
    if not kinds:
        return None
    figure = _figure(4.8 * len(kinds), 3.6)
    panels = figure.subplots(1, len(kinds), squeeze=False)
    for kind, panel in zip(kinds, panels[0]):
        metrics = dict.fromkeys(row.metric for row in rows if row.metric.startswith(f"{kind}_"))
        for i, metric in enumerate(metrics):
            measured = [row for row in rows if row.metric == metric]
            blocks = [int(row.method.removeprefix("block ")) for row in measured]
            means, colour = [row.mean for row in measured], (COLOURS[0], THICK["daam"])[i % 2]
            style = {"color": colour, "linestyle": DASHES[i % len(DASHES)], "marker": "."}
            panel.plot(blocks, means, label=metric.removeprefix(f"{kind}_"), **style)
            bounds = [row.low for row in measured], [row.high for row in measured]
            panel.fill_between(blocks, *bounds, color=colour, alpha=0.15, linewidth=0)
            panel.set_xticks(blocks[:: math.ceil(len(blocks) / 16)])
        panel.set_title(f"{kind}: {HEADINGS[metric][1]} is better", fontsize=11)
        panel.set_xlabel("accumulated up to block")
        panel.legend(title="baseline", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("area under the curve")
    _write_title(figure, run, max(row.n for row in rows))
    return figure


def _figure(width: float, height: float) -> Figure:
    """Create a figure, size in inches, with its own canvas: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write_title(figure: Figure, run: dict, photos: int) -> None:
    """Write the name of the model, which can hold anything, and the number of photos above a figure."""
    title, families = matplotlib_text(f"{run['model']}, {photos} photo{'s' * (photos != 1)}")
    figure.suptitle(title, fontsize=11, fontfamily=families, parse_math=False)


def _with_legend(figure: Figure, panels: np.ndarray) -> Figure:
    """Add one legend for all panels, on the right."""
    lines = {line.get_label(): line for panel in panels.flat for line in panel.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, handlelength=3)
    for panel in panels.flat:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
