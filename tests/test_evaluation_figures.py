"""Figures and the sheet of photos of the evaluation."""

import itertools

import numpy as np
import pytest
from PIL import Image
from tiny_records import METHODS, STAGES, make_photos, make_sanity, write_run

from evaluation.comparison import statistics
from evaluation.figures import GREY, blocks_figure, curves_figure, line_styles, sanity_figure
from evaluation.methods import EXTRA, GROUPS
from evaluation.methods import METHODS as ALL
from evaluation.records import block_values
from evaluation.sheet import best_first, write_sheet

METHODS_OF_COMMAND = [method for method in ALL if method not in EXTRA | {"daam-relu"}]
pytestmark = pytest.mark.filterwarnings("error")


def test_styles_are_all_different_and_say_who_is_who():
    names = ["daam", *(f"daam-{i}" for i in range(6)), *(f"other {i}" for i in range(8)), "random", "centre"]
    styles = line_styles(names)
    assert set(styles) == set(names)
    assert len({(s["color"], str(s.get("linestyle"))) for s in styles.values()}) == len(names)
    assert styles["daam"]["linewidth"] > 2 * max(s["linewidth"] for name, s in styles.items() if name != "daam")
    assert {name for name, s in styles.items() if s["color"] == GREY} == {"random", "centre"}
    assert all(styles[name]["linestyle"] != "-" for name in ("random", "centre"))


@pytest.mark.parametrize(
    "methods", [METHODS_OF_COMMAND, ["daam", *GROUPS["candidates"]], ["daam", *GROUPS["ablation"]]]
)
def test_the_lines_of_a_figure_can_be_told_apart(methods):
    styles = line_styles(methods)
    assert len({(s["color"], str(s.get("linestyle"))) for s in styles.values()}) == len(methods)


def test_the_relevance_flow_stands_out():
    styles = line_styles([*METHODS_OF_COMMAND])
    assert [method for method, style in styles.items() if style["linewidth"] > 2] == ["daam", "daam-relevance"]
    assert styles["gae"]["color"] == styles["gae-log-odds"]["color"]
    assert list(line_styles(["gae-log-odds", "daam", "x-log-odds"])) == ["gae-log-odds", "daam", "x-log-odds"]


def test_figures_draw_the_means(tmp_path):
    photos, sanity = make_photos(4), make_sanity(2)
    del photos[0]["curves"]["rollout"]
    run = write_run(tmp_path, photos)
    panels = {panel.get_title(): panel for panel in curves_figure(photos, run).axes}
    assert list(panels) == ["deletion, mean", "insertion, mean", "deletion, blur", "insertion, blur"]
    highest = max(max(line.get_ydata()) for panel in panels.values() for line in panel.lines)
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > highest for panel in panels.values())
    for title, panel in panels.items():
        lines = {line.get_label(): line for line in panel.lines}
        assert list(lines) == METHODS
        for method, line in lines.items():
            curves = [r["curves"][method][title.replace(", ", "_")] for r in photos if method in r["curves"]]
            np.testing.assert_allclose(line.get_ydata(), [sum(x) / len(x) for x in zip(*curves)])
            np.testing.assert_allclose(line.get_xdata(), [0, 25, 50, 75, 100])

    sanity[1]["methods"]["daam"]["randomised"] = [0.6, 0.1, -0.1]
    lines = sanity_figure(sanity, run).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 0.7, 0.3, 0.1])  # without the sign
    assert [text.get_text() for text in lines[0].axes.get_xticklabels()] == ["as trained", *STAGES]

    rows = statistics(block_values(photos))
    deletion = blocks_figure(rows, run).axes[0].lines
    assert [line.get_label() for line in deletion] == ["mean", "blur"]
    np.testing.assert_allclose(deletion[0].get_ydata(), [r.mean for r in rows if r.metric == "deletion_mean"])
    np.testing.assert_array_equal(deletion[0].get_xdata(), [1, 2, 3])


def test_nothing_to_draw_is_no_figure(tmp_path):
    run = write_run(tmp_path, [])
    assert curves_figure([{"photo": "a", "scores": {}}], run) is None
    assert sanity_figure([], run) is None
    assert blocks_figure([], {}) is None


def scored(name, insertion, deletion, method="daam"):
    scores = {"insertion_mean": insertion - 0.1, "insertion_blur": insertion + 0.1, "deletion_mean": deletion}
    return {"photo": name, "name": name, "scores": {method: scores}}


def test_best_first_is_insertion_minus_deletion():
    photos = [scored("a", 0.5, 0.4), scored("b", 0.9, 0.1), scored("c", 0.6, 0.1), scored("d", 1, 0, "rollout")]
    photos.append({"photo": "e", "name": "e", "scores": {"daam": {"insertion_mean": 1}}})
    assert [record["photo"] for record in best_first(photos, "daam")] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("n", "shown"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 4, 3]), (9, [0, 1, 2, 8, 7, 6])]
)
def test_the_sheet_shows_the_best_and_the_worst(tmp_path, n, shown):
    photos = [scored(str(i), 0.9 - i / 20, 0.1) for i in range(n)]
    asked = []

    def picture(record, method):
        asked.append((record["photo"], method))
        return Image.new("RGB", (60, 40), "red")

    write_sheet(photos[::-1], ["daam", "missing"], picture, tmp_path / "sheet.png")
    assert asked == [(str(i), "daam") for i in shown]
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    red = (pixels == (255, 0, 0)).all(2)
    assert red.sum() == len(shown) * 150 * 100


def test_the_texts_of_a_sheet_stay_beside_its_pictures(tmp_path):
    photos = [scored("long " * 50, 0.9 - i / 20, 0.1, method) for i in range(8) for method in ("daam", "m" * 300)]
    shapes = itertools.cycle([(200, 20), (20, 200), (700, 500)])
    write_sheet(photos, ["daam", "m" * 300], lambda *_: Image.new("RGB", next(shapes), "red"), tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    red = (pixels == (255, 0, 0)).all(2)
    ink = (pixels.sum(2) < 3 * 128) & ~red
    assert red.sum() == 4 * (150 * 15 + 15 * 150 + 150 * 107)  # nothing is drawn over
    assert ink[:, -8:].sum() == 0 and ink[-2:].sum() == 0  # nor beyond the edge
    lines = np.diff(np.r_[0, ink[:, 316:].any(1), 0])
    starts, ends = np.flatnonzero(lines == 1), np.flatnonzero(lines == -1)
    assert len(starts) == 5 and (ends - starts).max() < 17  # the heading and two lines per row, none over another


def test_a_sheet_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="^photos: none has both deletion and insertion; a sheet needs them$"):
        write_sheet([{"photo": "a", "name": "a", "scores": {}}], ["daam"], None, tmp_path / "a.png")
