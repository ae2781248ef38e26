"""Draw variants.jpg: maps of the paper and of variant="heads", accumulated and of the last block alone.

    python .img/make_variants.py

The embedded model explains photos of this folder. A_12 is labelled with its deletion (mean colour, 10 steps; lower is
better), block 12 with its share of A_12.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from daam_core import attention_flow, overlay, render  # noqa: E402
from daam_vit.files import atomic_write  # noqa: E402
from evaluation.decision import Decision  # noqa: E402
from evaluation.metrics import area, removal_curves  # noqa: E402
from models import load  # noqa: E402
from models.images import read_image  # noqa: E402

PHOTOS = ("motorcycle_left.png", "chelsea.png", "coffee.png")
COLUMNS = ("", "paper: A_12", "paper: block 12", "heads: A_12", "heads: block 12")
WIDTH, GAP, LINE = 240, 6, 24


def row(loaded, photo: Image.Image) -> list[Image.Image]:
    """Return the photo and its four maps."""
    small = photo.resize((WIDTH, round(WIDTH * photo.height / photo.width)), Image.Resampling.LANCZOS)
    tiles = [small]
    image = loaded.transform(photo)
    for variant in ("paper", "heads"):
        flow = attention_flow(loaded.model, image.unsqueeze(0), variant=variant)
        total, last = flow.accumulated[0, -1:], flow.block_maps[0, -1:]
        curves = removal_curves(Decision(loaded), image, flow.target.item(), total, 10, ("mean",))
        deletion, share = area(curves["deletion_mean"]).item(), (last.sum() / total.sum()).item()
        for maps, text in ((total, f"deletion {deletion:.2f}"), (last, f"{share:.0%} of A_12")):
            tile = overlay(small, render(maps))[0]
            font = ImageFont.load_default(15)
            ImageDraw.Draw(tile).text((6, 4), text, "white", font, stroke_width=2, stroke_fill="black")
            tiles.append(tile)
    return tiles


def main() -> None:
    """Draw a row for every photo and save the page."""
    loaded = load("vit_small_patch14_caltech101")
    rows = [row(loaded, read_image(HERE / name)) for name in PHOTOS]
    height = LINE + sum(tiles[0].height + GAP for tiles in rows)
    page = Image.new("RGB", (len(COLUMNS) * (WIDTH + GAP) - GAP, height), "white")
    for i, title in enumerate(COLUMNS):
        x = i * (WIDTH + GAP)
        ImageDraw.Draw(page).text((x + WIDTH / 2, LINE / 2), title, "black", ImageFont.load_default(16), anchor="mm")
        y = LINE
        for tiles in rows:
            page.paste(tiles[i], (x, y))
            y += tiles[i].height + GAP
    with atomic_write(HERE / "variants.jpg") as part:
        page.save(part, "JPEG", quality=88)


if __name__ == "__main__":
    main()
