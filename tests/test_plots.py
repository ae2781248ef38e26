"""Test the picture of how a decision forms: what lies where, and what it refuses."""

import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from daam_core import evolution_picture
from daam_vit import plots


def pixels(picture):
    """Return the colour of every pixel as one number 0xRRGGBB, `(H, W)`."""
    return np.asarray(picture).astype(np.int32) @ [1 << 16, 1 << 8, 1]


def rgb(colour):
    """Return "#c8500a" as 0xc8500a."""
    return int(colour.removeprefix("#"), 16)


def colour_of_map(block):
    """Return the colour of the map of a block in `draw`."""
    return (9 << 16) + ((90 + block) << 8)


def draw(blocks=4, several=1, leads_from=3, size=(60, 40), name="cup", **more):
    """Draw maps that have one colour each, and curves that rise to 80, 70, ... per cent."""
    frames = [[Image.new("RGB", size, (9, 90 + b, 10 * k)) for b in range(blocks)] for k in range(several)]
    names = [f"{name} {k}" for k in range(several + 1)]
    curves = [(n, np.linspace(0.1, max(0, 0.8 - 0.1 * k), blocks).tolist()) for k, n in enumerate(names)]
    shares = [[1 / blocks] * blocks] * several
    return evolution_picture(frames, curves, shares, [names[0]] * blocks, leads_from, **more)


@pytest.mark.parametrize("blocks", [1, 2, 12, 24])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (300, 20)], ids=["landscape", "portrait", "panorama"])
def test_every_map_stands_above_its_point_and_its_bar(blocks, size):
    several = 2
    picture = pixels(draw(blocks, several, blocks, size))
    orange = picture == rgb(plots._CLASS_COLOURS[0])
    middles = []
    for b in range(blocks):
        rows, columns = (picture == colour_of_map(b)).nonzero()
        assert len(rows) > 50
        assert abs((np.ptp(columns) + 1) / (np.ptp(rows) + 1) / (size[0] / size[1]) - 1) < 0.3  # its own shape
        middles.append(columns.mean())
        assert orange[rows.max() + 1 :, round(middles[-1])].any()  # its point
    assert middles == pytest.approx(np.linspace(middles[0], middles[-1], blocks).tolist(), abs=1.5)
    assert picture.shape[1] >= 1500


def test_what_leads_is_tinted_from_its_block_on():
    tinted, plain = pixels(draw(leads_from=3)), pixels(draw(leads_from=None))
    tint = rgb(plots._TINT)
    second, third, columns = ((tinted == c).any(0).nonzero()[0] for c in (colour_of_map(1), colour_of_map(2), tint))
    assert second.max() < columns.min() < third.mean()
    assert not (plain == tint).any()


def test_names_are_cut_and_nothing_is_drawn_over_the_edges():
    for leads_from in (1, 12, None):
        more = {"signed": True, "class_shares": [[1.0] * 12] * 3} if leads_from == 12 else {}
        picture = pixels(draw(12, 3, leads_from, name="a very long name of a class, " * 5, note="a word " * 80, **more))
        for edge in (picture[:8], picture[:, :8], picture[:, -6:], picture[-8:]):
            assert (edge == 0xFFFFFF).all()


def test_a_note_and_a_word_for_the_values():
    plain, noted = draw(), draw(note="a word " * 60)
    assert noted.height > plain.height and noted.width == plain.width
    assert draw(quantity="share of the votes").tobytes() != plain.tobytes()
    assert draw().tobytes() == plain.tobytes()


@pytest.mark.parametrize("several", [1, 3, 10])
def test_shares_of_the_class_token_are_a_last_panel(several):
    rising, falling = [[0.0, 0.1, 0.5, 1.0]] * several, [[1.0, 0.5, 0.1, 0.0]] * several
    plain, one, two = (draw(several=several, class_shares=held) for held in (None, rising, falling))
    assert one.size == two.size and one.width == plain.width and one.height > plain.height + 100
    lower = plain.height - 36  # below the bars
    assert one.crop((0, 0, one.width, lower)).tobytes() != plain.crop((0, 0, one.width, lower)).tobytes()  # the tint
    colours = pixels(one)[lower:], pixels(two)[lower:]
    dots = [(c == rgb(plots._CLASS_COLOURS[0])) & (np.arange(one.width) < 1332) for c in colours]  # without the words
    for dot, step in zip(dots, (-1, 1)):  # the highest dot is at the right, or at the left
        rows = [np.nonzero(dot[:, column])[0].mean() for column in (376, 649, 922, 1195)]
        assert step * rows[0] < step * rows[1] < step * rows[2] < step * rows[3]
        assert max(rows) - min(rows) == pytest.approx(max(110, 22 * several), abs=3)
    assert (pixels(one)[-8:] == 0xFFFFFF).all()


def test_words_for_signed_maps(monkeypatch):
    said = []
    heading = plots._Page.heading
    monkeypatch.setattr(plots._Page, "heading", lambda page, y, *words: (said.append(words), heading(page, y, *words)))
    assert draw().tobytes() == draw(signed=False, class_shares=None).tobytes() != draw(signed=True).tobytes()
    plain, signed = said[:3], said[6:]
    assert plain[0] == ("What counts so far", "the map accumulated", "up to each block:", "blue little, red much")
    assert signed[0][1:] == ("added up to each block:", "red for the class,", "blue none or against it")
    assert plain[1] == signed[1] and plain[2][1] == "its share of the map"
    assert signed[2] == ("What the block adds", "its share of all evidence,", "for and against the class")


@pytest.mark.parametrize("places", [[50.0], [10.0, 11.0, 90.0], [99.0, 98.0, 97.0, 96.0], [0.0, 0.0, 0.0]])
def test_labels_are_moved_apart(places):
    moved = plots._apart(places, 10, 0, 100)
    assert sorted(range(len(places)), key=lambda i: (places[i], i)) == sorted(range(len(places)), key=moved.__getitem__)
    gaps = np.diff(sorted(moved))
    assert (gaps >= 10 - 1e-9).all() and min(moved) >= 0 and max(moved) <= 100
    if len(places) == 1:
        assert moved == places


@pytest.mark.parametrize(
    "frames, curves, shares, leaders, leads_from, match",
    [
        (0, 1, 1, 4, None, r"^frames: expected as many for every class as .* got \[\[\], \[4\], \[4\], \[4\]\]$"),
        (1, 1, 2, 4, None, "^frames: expected as many for every class"),
        (2, 1, 2, 4, None, "^frames: expected as many for every class"),
        (1, 1, 1, 3, None, r"got \[\[4\], \[4\], \[4\], \[3\]\]$"),
        (1, 2, 1, 4, 5, "^leads_from: expected 1 to 4, got 5$"),
        (1, 2, 1, 4, 0, "^leads_from: expected 1 to 4, got 0$"),
    ],
)
def test_picture_errors(frames, curves, shares, leaders, leads_from, match):
    frames = [[Image.new("RGB", (6, 4))] * 4] * frames
    with pytest.raises(ValueError, match=match):
        evolution_picture(frames, [("cup", [0.5] * 4)] * curves, [[0.25] * 4] * shares, ["cup"] * leaders, leads_from)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"frames": None}, TypeError, "^frames: expected for each class its frames, got NoneType$"),
        ({"frames": [[1, 2]]}, TypeError, "^frames: expected a PIL image"),
        ({"frames": [[Image.new("RGB", (6, 4)), Image.new("RGB", (4, 6))]]}, ValueError, "^frames: expected one size"),
        ({"curves": [("cup", 5)]}, TypeError, "^curves: expected for each class its values, got int$"),
        ({"curves": [("cup",)]}, ValueError, "^curves: expected for each class its name and its values, got 1$"),
        ({"curves": [(5, [0.1, 0.2])]}, TypeError, "^curves: expected a name first, got int$"),
        ({"curves": [("cup", [0.1, float("nan")])]}, ValueError, "^curves: expected a number from .* got nan$"),
        ({"curves": [("cup", [0.1, 93.0])]}, ValueError, "^curves: expected a number from .* got 93.0$"),
        ({"curves": [("cup", [0.1, None])]}, TypeError, "^curves: expected a number, got NoneType$"),
        ({"shares": [[0.5, float("inf")]]}, ValueError, "^shares: expected a number from .* got inf$"),
        ({"shares": "ab"}, TypeError, "^shares: expected for each class its values, got str$"),
        ({"leaders": "ab"}, TypeError, "^leaders: expected a name for each block, got str$"),
        ({"leaders": [1, 2]}, TypeError, "^leaders: expected texts, got int$"),
        ({"leads_from": 1.0}, TypeError, "^leads_from: expected an integer, got 1.0$"),
        ({"quantity": None}, TypeError, "^quantity: expected a text, got NoneType$"),
        ({"note": 5}, TypeError, "^note: expected a text, got int$"),
        ({"signed": None}, ValueError, "^signed: expected True or False, got None$"),
        ({"signed": "yes"}, ValueError, "^signed: expected True or False, got 'yes'$"),
        ({"class_shares": 0.5}, TypeError, "^class_shares: expected for each class its values, got float$"),
        ({"class_shares": [0.5, 0.5]}, TypeError, "^class_shares: expected for each class its values, got float$"),
        ({"class_shares": []}, ValueError, r"^class_shares: expected 2 values for each of 1 classes, got \[\]$"),
        ({"class_shares": [[0.5]]}, ValueError, r"^class_shares: expected 2 values for each of 1 .*, got \[1\]$"),
        ({"class_shares": [[0.5] * 2] * 2}, ValueError, r"^class_shares: .* for each of 1 classes, got \[2, 2\]$"),
        ({"class_shares": [[0.5, -0.2]]}, ValueError, "^class_shares: expected a number from .* got -0.2$"),
        ({"class_shares": [[0.5, float("nan")]]}, ValueError, "^class_shares: expected a number from .* got nan$"),
        ({"class_shares": [[0.5, None]]}, TypeError, "^class_shares: expected a number, got NoneType$"),
    ],
)
def test_picture_of_something_else(arguments, error, match):
    good = {
        "frames": [[Image.new("RGB", (6, 4))] * 2], "curves": [("cup", [0.2, 0.8])], "shares": [[0.5, 0.5]],
        "leaders": ["cup"] * 2,
    }  # fmt: skip
    evolution_picture(**good)
    with pytest.raises(error, match=match):
        evolution_picture(**good | arguments)


def test_a_note_in_wide_characters_is_not_cut():
    note = "слово " * 100
    lines = plots._wrap(note, 1000)
    assert " ".join(lines) == note.strip() and all(plots.width_of(line, 30) <= 2000 for line in lines)
    assert plots.width_of(lines[0] + " слово" * 4, 30) > 2000  # nor is a line much shorter than it could be
    assert plots._wrap("i " * 100, 1000) == textwrap.wrap("i " * 100, 139)  # 7.5 pixels a character, of 1,048


def test_values_of_numpy_and_torch():
    frames, shares = [[Image.new("RGB", (6, 4))] * 2], [[0.5, 0.5]]
    pictures = [
        evolution_picture(
            frames, [("cup", kind([0.25, 0.75]))], kind(shares), ["cup"] * 2, class_shares=kind([[0.25, 0.5]])
        )
        for kind in (list, np.array, torch.tensor)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()


@pytest.mark.parametrize("text, shown", [("\x1b[1m", r"\x1b[1m"), ("\ue000", "?"), ("кот\u0378", "кот?")])
def test_names_are_legible(text, shown):
    assert draw(name=text).tobytes() == draw(name=shown).tobytes()
