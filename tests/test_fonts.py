"""Text in pictures has a font with its characters; what no font has is never drawn as a box."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from daam_vit import fonts

SHAPES = features.check("raqm")
needs_shaping = pytest.mark.skipif(not SHAPES, reason="Pillow without raqm cannot shape Arabic")
CACHES = (fonts._best_face, fonts._has_ink)


@pytest.fixture
def fresh():
    """Forget which font has what, before and after a test that changes it."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def only_pillow(fresh, monkeypatch):
    """Hide all fonts but Pillow's own."""
    monkeypatch.setattr(fonts, "_text_faces", lambda: ())


@pytest.fixture
def only_matplotlib(fresh, monkeypatch):
    """Hide the fonts of the system."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    monkeypatch.setattr(fonts, "_text_faces", lambda: (fonts._Face(str(file), 0, "DejaVu Sans"),))


def drawn(text, size=20, **more):
    page = Image.new("RGB", (400, 40), "white")
    fonts.write(ImageDraw.Draw(page), (5, 5), text, size, **more)
    return np.asarray(page)


def family(text):
    return fonts.fit(text, 20)[1].getname()[0]


@pytest.mark.parametrize("text", ["tench 0.93", "a/b (c): 1 %", "cut…", "«so»", ""])
@pytest.mark.parametrize("anchor", ["la", "lm", "mm", "rm"])
def test_pillows_own_font_draws_what_it_has(text, anchor):
    page = Image.new("RGB", (400, 40), "white")
    ImageDraw.Draw(page).text((5, 5), text, "black", ImageFont.load_default(20), anchor=anchor)
    assert np.array_equal(drawn(text, anchor=anchor), page)
    assert fonts.width_of(text, 20) == ImageFont.load_default(20).getlength(text)
    assert fonts.drawable(text) and family(text) == ImageFont.load_default(20).getname()[0]


def test_matplotlib_is_imported_for_other_characters_only():
    code = """
import sys
from daam_vit.fonts import drawable
assert drawable("plain, cut…") and "matplotlib" not in sys.modules
assert drawable("é") and "matplotlib" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["Tüpfelhyäne", "Ru\u0308ssel", "кошка 0.93", "γάτα", "→ ½ ∑", "a\u00a0b\u3000c 😀"])
def test_a_font_that_has_all_characters(only_matplotlib, text):
    assert fonts.drawable(text) and family(text) == "DejaVu Sans"
    shown, font = fonts.fit(text, 20)
    assert "?" not in shown and font.getname()[0] == "DejaVu Sans"
    assert (drawn(text) < 128).any()


@needs_shaping
@pytest.mark.parametrize("text", ["قطة: 0.93", "חתול leads from block 3", "x\u0304\u0323", "می\u200cخواهم"])
def test_a_script_that_is_shaped(only_matplotlib, text):
    assert fonts.drawable(text) and family(text) == "DejaVu Sans"


@needs_shaping
def test_arabic_joins_and_runs_to_the_left(only_matplotlib):
    joined, apart = (fonts.fit(text, 40)[1].getlength(text) for text in ("ببب", "ب ب ب"))
    assert joined < 0.8 * apart
    first, second = drawn("ب a"), drawn("a ب")
    assert not np.array_equal(first, second)  # the line itself runs to the right
    columns = [np.nonzero((page < 128).any((0, 2)))[0] for page in (first, drawn("ب"))]
    assert columns[0].min() == columns[1].min()


@needs_shaping
@pytest.mark.parametrize("name", ["قطة", "חתול"])
def test_a_value_stands_after_its_name(only_matplotlib, name):
    """Otherwise the number of "name: 20 %" would stand before the name, and its per cent sign after it."""
    both, alone = (np.nonzero((drawn(text) < 128).any((0, 2)))[0] for text in (f"{name}: 20 %", name))
    assert both.min() == alone.min() and both.max() > alone.max() + 40


@pytest.mark.parametrize("text", ["قطة", "חתול", "हिन्दी", "แมว", "x\u0304"])
def test_a_script_that_cannot_be_shaped(fresh, monkeypatch, text):
    monkeypatch.setattr(fonts, "_shapes", lambda: False)
    assert not fonts.drawable(text)
    assert "?" in fonts.fit(text, 20)[0]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("猫", "?"),
        ("猫 cat", "? cat"),
        ("кот", "???"),
        ("👩\u200d💻", "??"),
        ("❤\ufe0f", "?"),
        ("🇩🇪", "??"),
        ("\ue000\U0010ffff\u0378", "???"),
        ("e\u0301\u0302", "??"),
        ("a\u200bb\u00adc\ufeff", "abc"),
        ("\u200d", ""),
    ],
)
def test_what_no_font_has_is_a_question_mark(only_pillow, text, shown):
    assert fonts.fit(text, 20)[0] == shown
    assert fonts.drawable(text) == ("?" not in shown)
    assert np.array_equal(drawn(text), drawn(shown))


def test_the_font_that_misses_fewest_characters(only_matplotlib):
    assert not fonts.drawable("кот 猫")
    shown, font = fonts.fit("кот 猫", 20)
    assert shown == "кот ?" and font.getname()[0] == "DejaVu Sans"


@pytest.mark.parametrize("text", ["\ue000", "\uf8ff", "\u0378", "\uffff"])
def test_characters_without_a_meaning_are_in_no_font(text):
    """matplotlib's Last Resort draws a placeholder for every character there could be."""
    assert not fonts.drawable(text)


@pytest.mark.parametrize("text, shown", [("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ("\udce9", r"\udce9")])
def test_control_characters_are_escaped(text, shown):
    assert fonts.drawable(text) and np.array_equal(drawn(text), drawn(shown))


def test_a_font_that_says_more_than_it_draws(only_matplotlib, monkeypatch):
    """The map of its characters has one whose glyph is a box, or is empty as in a font of colours."""
    characters = fonts._characters
    more = frozenset("猫\u2800")
    monkeypatch.setattr(fonts, "_characters", lambda face: characters(face) | (more if face.file else frozenset()))
    assert fonts.drawable("кот") and not fonts.drawable("猫") and not fonts.drawable("\u2800")


def test_a_font_of_bitmaps_has_no_characters(only_matplotlib, monkeypatch):
    sized = fonts._sized

    def fail(face, size):
        if face.file:
            raise OSError("invalid pixel size")
        return sized(face, size)

    monkeypatch.setattr(fonts, "_sized", fail)
    assert not fonts.drawable("кот") and fonts.fit("кот", 20)[0] == "???"


def test_a_font_that_is_damaged_or_gone(fresh, monkeypatch, tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    faces = tuple(fonts._Face(str(tmp_path / name)) for name in ("damaged.ttf", "gone.ttf"))
    monkeypatch.setattr(fonts, "_text_faces", lambda: faces)
    assert not fonts.drawable("кот")


@pytest.mark.parametrize("text", ["tench, Tinca tinca " * 9, "кошка " * 40, "i" * 5000, "\x1b" * 300])
@pytest.mark.parametrize("width", [0, 1, 30, 200.5])
def test_text_is_cut_to_its_width(text, width):
    shown, font = fonts.fit(text, 17, width)
    kept = shown.removesuffix("…")
    assert shown.endswith("…") and (font.getlength(shown) <= width or shown == "…")
    longer = fonts.fit(text, 17)[0][: len(kept) + 1]
    assert longer.startswith(kept) and font.getlength(f"{longer}…") > width


def test_all_fonts_stand_on_one_baseline(only_matplotlib):
    """H of another font ends on the same row."""
    for anchor in ("la", "lm", "ls"):
        pages = [np.asarray(drawn(text, 20, anchor=anchor)) for text in ("H", "Н")]  # the second is Cyrillic
        ends = [np.nonzero((page < 128).any((1, 2)))[0].max() for page in pages]
        assert ends[0] == ends[1]


def test_text_for_matplotlib(only_matplotlib, recwarn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert fonts.matplotlib_text("ViT-S") == ("ViT-S", ["sans-serif"])
    for name in ("кот $x^", "猫\u200d👩 \x1b", "$\\frac"):
        words, families = fonts.matplotlib_text(name)
        figure = Figure()
        FigureCanvasAgg(figure)
        figure.suptitle(words, fontfamily=families, parse_math=False)
        figure.canvas.draw()
    assert not recwarn.list
