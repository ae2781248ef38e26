"""Write the report of an evaluation: from the records of its photos to tables, figures and a sheet of photos.

    print(write_report("evaluated"))

The first method is ours; all others are compared with it on the same photos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from daam_vit.files import atomic_write
from evaluation.comparison import statistics
from evaluation.figures import blocks_figure, curves_figure, sanity_figure
from evaluation.records import block_values, mosaic_values, photo_values, read_run, sanity_values, writing
from evaluation.sheet import best_first, write_sheet
from evaluation.tables import block_tables, method_tables, to_csv


def write_report(directory: str | Path, picture: Callable[[dict, str], Image.Image] | None = None) -> str:
    """Write all files of the report, each atomically.

    Always `table.md` and `table.csv`; `curves.png`, `blocks.md`, `blocks.png` and `sanity.png` if they were measured;
    `sheet.png` if `picture` is passed.

    Args:
        directory: folder with `run.json`, `photos.jsonl` and, if they were measured, `sanity.jsonl` and
            `mosaics.jsonl`. The run may be unfinished.
        picture: see `write_sheet`.

    Returns:
        The content of `table.md`.

    Raises:
        ValueError: if there is no run, no photo is done, or a file is damaged or of another run.
        TypeError: if `directory` is not a path.
        OSError: if a file cannot be written.
    """
    run, photos, sanity, mosaics = read_run(directory)
    directory = Path(directory)
    methods, seed = run["methods"], run["seed"]
    values = photo_values(photos, methods) | sanity_values(sanity, methods) | mosaic_values(mosaics, methods)
    rows = statistics(values, methods[0], seed)
    blocks = statistics(block_values(photos), seed=seed)
    texts = {"table.md": method_tables(rows, run, len(photos)), "table.csv": to_csv(rows)}
    if blocks:
        texts["blocks.md"] = block_tables(blocks, run)
    for name, text in texts.items():
        with writing(directory / name), atomic_write(directory / name) as part:
            part.write_text(text, encoding="utf-8", newline="")
    figures = {
        "curves.png": curves_figure(photos, run),
        "blocks.png": blocks_figure(blocks, run),
        "sanity.png": sanity_figure(sanity, run),
    }
    for name, figure in figures.items():
        if figure is not None:
            with writing(directory / name), atomic_write(directory / name) as part:
                figure.savefig(part, format="png")
    if picture is not None and any(best_first(photos, method) for method in methods):
        with writing(directory / "sheet.png"):
            write_sheet(photos, methods, picture, directory / "sheet.png")
    return texts["table.md"]
