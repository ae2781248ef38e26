"""Draw failures.jpg: photos on which the relevance flow has the least advantage over gradient-weighted attention.

    python .img/make_failures.py --images photos/ --run evaluated --without Aqua.jpg

`--run` is a folder of `python -m evaluation` for the embedded classifier, with the methods of `COLUMNS`, and `--images`
its photos. They are ordered by insertion minus deletion, each averaged over its baselines, compared with `gae`.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from daam_core import overlay, render  # noqa: E402
from daam_vit.files import atomic_write  # noqa: E402
from evaluation.decision import Decision  # noqa: E402
from evaluation.explained import Explained  # noqa: E402
from evaluation.methods import METHODS  # noqa: E402
from evaluation.sheet import areas  # noqa: E402
from models import load  # noqa: E402
from models.images import read_image, resize_longest_side  # noqa: E402

COLUMNS = ("daam-relevance", "gae", "attnlrp", "daam")
ROWS, SIDE, GAP, LINE = 3, 230, 6, 22


def advantage(record: dict, method: str) -> float:
    """Return insertion minus deletion of a method on a photo, each averaged over its baselines."""
    insertion, deletion = areas(record, method)
    return insertion - deletion


def row(record: dict, folder: Path, decision: Decision) -> list[tuple[Image.Image, str]]:
    """Return the photo and its maps, each with the text below it."""
    photo = read_image(folder / record["photo"])
    small = resize_longest_side(photo, SIDE, Image.Resampling.LANCZOS)
    image = decision.loaded.transform(photo).unsqueeze(0)
    explained = Explained(decision, image, decision.shares(image).argmax(1), [record["photo"]], 0)
    tiles = [(small, f"{record['name']}, {record['probability']:.0%}")]
    for method in COLUMNS:
        heat = METHODS[method](explained).float().clamp(min=0).cpu()
        tiles.append((overlay(small, render(heat))[0], f"{method} {advantage(record, method):+.2f}"))
    return tiles


def main() -> None:
    """Draw a row for every photo and save the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--run", type=Path, required=True, help="folder of the evaluation")
    parser.add_argument("--without", nargs="*", default=[], help="photos that may not be shown")
    options = parser.parse_args()
    records = [json.loads(line) for line in (options.run / "photos.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if record["photo"] not in options.without]
    records.sort(key=lambda record: advantage(record, "daam-relevance") - advantage(record, "gae"))
    decision = Decision(load("vit_small_patch14_caltech101"))
    rows = [row(record, options.images, decision) for record in records[:ROWS]]
    heights = [max(tile.height for tile, _ in tiles) + LINE + GAP for tiles in rows]
    page = Image.new("RGB", ((len(COLUMNS) + 1) * (SIDE + GAP) - GAP, sum(heights)), "white")
    y = 0
    for tiles, height in zip(rows, heights):
        for i, (tile, text) in enumerate(tiles):
            x = i * (SIDE + GAP)
            page.paste(tile, (x, y))
            font = ImageFont.load_default(15)
            ImageDraw.Draw(page).text((x + 2, y + tile.height + LINE / 2), text, "black", font, anchor="lm")
        y += height
    with atomic_write(HERE / "failures.jpg") as part:
        page.save(part, "JPEG", quality=88)


if __name__ == "__main__":
    main()
