"""The report: statistics against plain derivations, marks, tables and files, pictures, every error."""

import csv
import io
import itertools
import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from evaluation import report
from evaluation.metrics import METRICS
from evaluation.report import (
    Row,
    best_first,
    block_values,
    blocks_figure,
    curves_figure,
    holm,
    intervals,
    line_styles,
    markdown_table,
    photo_values,
    read_lines,
    sanity_figure,
    sanity_values,
    sheet,
    sign_flip_p,
    statistics,
    to_csv,
    write_report,
)

METHODS = ["daam", "daam-norm", "rollout", "random"]
STAGES = ["head", "block 2", "block 1"]
NAN = math.nan


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_photos(n, methods=METHODS, steps=4, seed=0):
    """The better a method, the steeper: ours and its variant alike, then rollout, then random."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0, 1, steps + 1)
    photos = []
    for i in range(n):
        curves, scores = {}, {}
        for method, power in zip(methods, (5, 5, 2, 1)):
            fall = {b: 0.9 * (1 - share) ** (power * rng.uniform(0.8, 1.2)) for b in ("mean", "blur")}
            curves[method] = {f"deletion_{b}": f.tolist() for b, f in fall.items()}
            curves[method] |= {f"insertion_{b}": (0.9 - f).tolist() for b, f in fall.items()}
            scores[method] = {name: float(np.mean(curve)) for name, curve in curves[method].items()}
            scores[method] |= {"average_drop": 1 / (1 + power) * rng.uniform(0.9, 1.1), "increase": float(i % 3 == 0)}
            if i % 2 == 0:
                scores[method]["energy"] = power / 6 * rng.uniform(0.9, 1.1)
        record = {"photo": f"cup/{i}.jpg", "class": 0, "name": "cup", "probability": 0.9}
        record |= {"scores": scores, "curves": curves}
        if i < 3:
            record["blocks"] = [scores[method] for method in methods[::-1][:3]]
        photos.append(record)
    return photos


def make_sanity(n, methods=METHODS):
    return [
        {"photo": str(i), "methods": {m: {"flip": 0.9, "class": None, "randomised": [0.8, 0.5, 0.1]} for m in methods}}
        for i in range(n)
    ]


def write_run(folder, photos, sanity=(), methods=METHODS, total=20):
    run = {"model": "tiny", "checkpoint": None, "images": "photos", "photos": total, "methods": methods}
    run |= {"baselines": ["mean", "blur"], "steps": 4, "dtype": "float32", "seed": 0}
    run |= {"sanity": len(sanity), "stages": STAGES}
    (folder / "run.json").write_text(json.dumps(run | {"versions": {}}))
    (folder / "photos.jsonl").write_text("".join(json.dumps(record) + "\n" for record in photos))
    if sanity:
        (folder / "sanity.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sanity))
    return run


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = '{"photo": "ä"}\n{"photo": "b"}\n'.encode()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        names = [record["photo"] for record in read_lines(path)]
        assert names == ["ä", "b"][: whole[:end].count(b"}")]


@pytest.mark.parametrize("line", [b'{"photo": ', b"", b"12", b'{"photo": "\xff"}', b"{}"])
def test_another_line_that_cannot_be_read(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"photo": "a"}\n' + line + b'\n{"photo": "b"}\n')
    with pytest.raises(ValueError, match=r"^records: line 2 of .*a\.jsonl is no record of a photo; delete the line$"):
        read_lines(path)
    path.write_bytes(b'{"photo": "a"}\n' + line + b"\n")  # the last, but it was not cut: a line end follows
    with pytest.raises(ValueError, match="^records: line 2 of"):
        read_lines(path)


def test_values_by_metric_method_and_photo():
    scores = {"daam": {"iou": 0.5, "energy": None, "unknown": 3}, "rollout": {"iou": NAN}}
    photos = [{"photo": "a", "scores": scores, "blocks": [{"iou": 0.1}, {"iou": 0.2}]}, {"photo": "b", "scores": {}}]
    assert photo_values(photos, ["daam", "rollout", "other"]) == {"iou": {"daam": {"a": 0.5}}}
    assert block_values(photos) == {"iou": {"block 1": {"a": 0.1}, "block 2": {"a": 0.2}}}
    sanity = [{"photo": "a", "methods": {"daam": {"flip": 0.9, "class": None, "randomised": [0.8, 0.3]}}}]
    assert sanity_values(sanity, ["daam"]) == {"randomised": {"daam": {"a": 0.3}}, "flip": {"daam": {"a": 0.9}}}
    assert sanity_values([{"photo": "a", "methods": {"daam": {"randomised": []}}}], ["daam"]) == {}
    inverted = [{"photo": "a", "methods": {"daam": {"randomised": [0.8, -0.3]}}}]
    assert sanity_values(inverted, ["daam"]) == {"randomised": {"daam": {"a": 0.3}}}


# Statistics -----------------------------------------------------------------------------------------------------------


def test_interval_against_a_plain_bootstrap():
    values = np.random.default_rng(0).gamma(2, size=(2, 40))
    values[1, 30:] = NAN
    for row, (mean, low, high) in zip(values, intervals(values)):
        row = row[np.isfinite(row)]
        rng = np.random.default_rng(5)
        means = sorted(sum(row[rng.integers(len(row))] for _ in row) / len(row) for _ in range(4000))
        spread = row.std() / math.sqrt(len(row))
        assert mean == pytest.approx(sum(row) / len(row), abs=1e-12)
        assert low == pytest.approx(means[100], abs=0.12 * spread)
        assert high == pytest.approx(means[-101], abs=0.12 * spread)


def test_intervals_of_few_values():
    result = intervals(np.array([[NAN, NAN, NAN], [2, NAN, NAN], [3, 3, 3]]))
    np.testing.assert_array_equal(result, [[NAN, NAN, NAN], [2, NAN, NAN], [3, 3, 3]])


def plain_p(differences):
    """All signs: how many means are as far from 0, on the side of the mean, twice."""
    sums = [
        sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    far = sum(total >= abs(sum(differences)) - 1e-12 for total in sums)
    return min(1, 2 * far / len(sums))


def test_p_against_all_signs():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.4, 1, (4, 9))
    differences[2] += 1
    differences[3, 6:] = NAN
    wanted = [plain_p(row[np.isfinite(row)]) for row in differences]
    assert min(wanted) < 0.05 < max(wanted)
    np.testing.assert_allclose(sign_flip_p(differences), wanted)
    np.testing.assert_allclose(sign_flip_p(-differences), wanted)


def test_p_by_random_signs_is_near_that_by_all(monkeypatch):
    differences = np.random.default_rng(3).normal(0.35, 1, (1, 13))
    monkeypatch.setattr(report, "RESAMPLES", 4999)  # of 8,192
    assert sign_flip_p(differences)[0] == pytest.approx(plain_p(differences[0]), abs=0.03)
    assert 0.02 < plain_p(differences[0]) < 0.9


def test_p_is_nan_of_one_and_one_of_equals():
    p = sign_flip_p(np.array([[NAN, NAN, 3], [NAN, NAN, NAN], [0, 0, 0]]))
    np.testing.assert_array_equal(p, [NAN, NAN, 1])


def test_holm_by_hand():
    # sorted .01 .03 .04 .2: times 4, 3, 2, 1 = .04 .09 .08 .2, and no smaller than the one before
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, NAN, 0.2, 0.03])), [0.09, 0.04, NAN, 0.2, 0.09])
    np.testing.assert_allclose(holm(np.array([0.6, 0.5])), [1, 1])


def test_statistics_are_paired_by_photo():
    rng = np.random.default_rng(0)
    ours = {f"{i:02}": x for i, x in enumerate(rng.normal(0, 100, 12))}  # far apart, and yet the differences are clear
    other = {photo: x + rng.uniform(1, 2) for photo, x in reversed(ours.items()) if photo != "03"}
    rows = statistics({"iou": {"daam": ours, "rollout": other}, "energy": {"rollout": other}}, "daam")
    assert [(row.metric, row.method, row.n, row.direction) for row in rows] == [
        ("iou", "daam", 12, "higher"),
        ("iou", "rollout", 11, "higher"),
        ("energy", "rollout", 11, "higher"),
    ]
    mine, row, alone = rows
    differences = [other[photo] - ours[photo] for photo in other]
    assert mine.mean == pytest.approx(sum(ours.values()) / 12)
    assert row.mean == pytest.approx(sum(other.values()) / 11)
    assert row.difference == pytest.approx(sum(differences) / 11)
    assert 1 < row.difference_low < row.difference < row.difference_high < 2
    assert row.p == pytest.approx(2 / 2**11) == pytest.approx(plain_p(differences))
    for row in (mine, alone):
        assert all(math.isnan(x) for x in (row.difference, row.difference_low, row.difference_high, row.p))
        assert row.mark == ""


def test_statistics_correct_over_the_methods_of_a_metric():
    rng = np.random.default_rng(2)
    of = {method: {str(i): rng.normal(k / 3, 1) for i in range(8)} for k, method in enumerate("abcd")}
    rows = statistics({"iou": of}, "a")
    single = np.array([plain_p([of[m][p] - of["a"][p] for p in of["a"]]) for m in "bcd"])
    np.testing.assert_allclose([row.p for row in rows[1:]], holm(single))
    assert [row.p for row in statistics({"iou": of})] == pytest.approx([NAN] * 4, nan_ok=True)
    assert repr(statistics({"iou": of}, "a")) == repr(rows)  # seeded


@pytest.mark.parametrize(
    ("direction", "difference", "p", "mark"),
    [
        ("lower", -0.1, 0.01, "▲"),
        ("lower", 0.1, 0.01, "▼"),
        ("higher", -0.1, 0.01, "▼"),
        ("higher", 0.1, 0.01, "▲"),
        ("higher", 0.1, 0.05, ""),
        ("higher", 0.1, NAN, ""),
    ],
)
def test_marks(direction, difference, p, mark):
    assert Row("a", "iou", direction, 9, 0.5, 0.4, 0.6, difference, 0, 0, p).mark == mark


# Tables ---------------------------------------------------------------------------------------------------------------


def test_table():
    rows = [
        Row("daam", "deletion_mean", "lower", 9, 0.2, 0.1, 0.3),
        Row("rollout", "deletion_mean", "lower", 8, 0.1, 0.05, 0.2, -0.1, -0.2, -0.05, 0.01),
        Row("daam", "increase", "higher", 9, 0.25, 0.125, 0.5),
        Row("random", "increase", "higher", 9, 0.125, NAN, NAN, -0.125, NAN, NAN, NAN),
    ]
    lines = markdown_table(rows, ["deletion_mean", "increase", "iou"]).splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("| -:")  # aligned as plain text, too
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[:1] + cells[2:] == [
        ["", "deletion, mean colour ↓", "increase, % ↑"],
        ["daam", "0.200 [0.100, 0.300]", "**25.0** [12.5, 50.0]"],
        ["rollout", "**0.100** [0.050, 0.200] ▲", ""],
        ["random", "", "12.5"],
        ["photos", "8 to 9", "9"],
    ]
    assert markdown_table(rows, ["iou"]) == ""


def test_csv_is_read_back_as_it_was():
    values = photo_values(make_photos(5), METHODS)
    rows = statistics(values, "daam") + [Row('a, "b"', "iou", "higher", 1, 1 / 3, NAN, NAN)]
    read = []
    for line in csv.DictReader(io.StringIO(to_csv(rows))):
        numbers = {k: float(v) if v else NAN for k, v in line.items() if k not in ("method", "metric", "direction")}
        read.append(Row(**line | numbers | {"n": int(line["n"])}))
    assert repr(read) == repr(rows)
    header = "method,metric,direction,n,mean,low,high,difference,difference_low,difference_high,p"
    assert to_csv([]) == header + "\n"


# Pictures -------------------------------------------------------------------------------------------------------------


def test_styles_are_all_different_and_say_who_is_who():
    names = ["daam", *(f"daam-{i}" for i in range(6)), *(f"other {i}" for i in range(8)), "random", "centre"]
    styles = line_styles(names)
    assert set(styles) == set(names)
    assert len({(s["color"], str(s.get("linestyle"))) for s in styles.values()}) == len(names)
    assert styles["daam"]["linewidth"] > 2 * max(s["linewidth"] for name, s in styles.items() if name != "daam")
    assert {name for name, s in styles.items() if s["color"] == report.GREY} == {"random", "centre"}
    assert all(styles[name]["linestyle"] != "-" for name in ("random", "centre"))


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

    sheet(photos[::-1], ["daam", "missing"], picture, tmp_path / "sheet.png")
    assert asked == [(str(i), "daam") for i in shown]
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    red = (pixels == (255, 0, 0)).all(2)
    assert red.sum() == len(shown) * 150 * 100


def test_the_texts_of_a_sheet_stay_beside_its_pictures(tmp_path):
    photos = [scored("long " * 50, 0.9 - i / 20, 0.1, method) for i in range(8) for method in ("daam", "m" * 300)]
    shapes = itertools.cycle([(200, 20), (20, 200), (700, 500)])
    sheet(photos, ["daam", "m" * 300], lambda *_: Image.new("RGB", next(shapes), "red"), tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    red = (pixels == (255, 0, 0)).all(2)
    ink = (pixels.sum(2) < 3 * 128) & ~red
    assert red.sum() == 4 * (150 * 15 + 15 * 150 + 150 * 107)  # nothing is drawn over
    assert ink[:, -8:].sum() == 0 and ink[-2:].sum() == 0  # nor beyond the edge
    lines = np.diff(np.r_[0, ink[:, 316:].any(1), 0])
    starts, ends = np.flatnonzero(lines == 1), np.flatnonzero(lines == -1)
    assert len(starts) == 5 and (ends - starts).max() < 17  # the heading and two lines a row, none over another


def test_a_sheet_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="^photos: none has deletion and insertion; a sheet needs both$"):
        sheet([{"photo": "a", "name": "a", "scores": {}}], ["daam"], None, tmp_path / "a.png")


# The whole report -----------------------------------------------------------------------------------------------------


def red_picture(record, method):
    return Image.new("RGB", (60, 40), "red")


def test_the_whole_report(tmp_path):
    write_run(tmp_path, make_photos(12), make_sanity(3))
    given = set(tmp_path.iterdir())
    markdown = write_report(tmp_path, red_picture)
    names = {path.name for path in set(tmp_path.iterdir()) - given}
    assert names == {"table.md", "table.csv", "blocks.md", "blocks.png", "curves.png", "sanity.png", "sheet.png"}
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown
    for name in names:
        if name.endswith(".png"):
            with Image.open(tmp_path / name) as picture:
                assert 700 < picture.width < 1400 and 300 < picture.height < 1000
                assert len(picture.convert("RGB").getcolors(1_000_000)) > 20  # not blank
    assert "12 of 20 photos of `photos`, model `tiny`" in markdown
    assert markdown.index("| daam ") < markdown.index("| daam-norm ") < markdown.index("| random ")
    table = {line.split("|")[1].strip(): line for line in markdown.split("\n\n")[1].splitlines()}
    assert table["random"].count("▼") == table["rollout"].count("▼") == 4 and "▲" not in markdown.split("▲ better")[0]
    assert "▼" not in table["daam"] + table["daam-norm"]
    assert "- sparsity" not in markdown and "- energy inside" in markdown  # only what was measured
    assert "other class" not in markdown
    assert "block 3" in (tmp_path / "blocks.md").read_text(encoding="utf-8")
    again = {name: (tmp_path / name).read_bytes() for name in names}
    write_report(tmp_path, red_picture)
    assert again == {name: (tmp_path / name).read_bytes() for name in names}


def test_a_meaning_of_every_metric():
    for metric in report.HEADINGS:
        assert sum(metric.startswith(key) for key in report.MEANINGS) == 1
        assert sum(metric in names for names in report.TABLES.values()) == 1
    assert all(direction in ("lower", "higher") for _, direction in METRICS.values())


def test_one_photo_has_means_and_no_intervals(tmp_path):
    write_run(tmp_path, make_photos(1), make_sanity(1), total=1)
    markdown = write_report(tmp_path, red_picture)
    assert "\n1 photo of `photos`" in markdown
    tables = markdown.split("Mean [95")[0]
    assert "[0." not in tables and "▲" not in tables and "▼" not in tables
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "blocks.png").exists()


def test_methods_and_files_may_be_missing(tmp_path):
    photos = make_photos(4)
    for record in photos:
        del record["scores"]["daam"], record["curves"]["daam"]
        record.pop("blocks", None)
    write_run(tmp_path, photos)
    markdown = write_report(tmp_path)
    assert "| daam " not in markdown and "| rollout " in markdown
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "photos.jsonl",
        "table.md",
        "table.csv",
        "curves.png",
    }


def test_of_a_photo_that_is_there_twice_the_last_counts(tmp_path):
    first, second = make_photos(2)
    write_run(tmp_path, [first, second, second | {"photo": first["photo"]}])
    write_report(tmp_path)
    line = next(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert int(line["n"]) == 2
    assert float(line["mean"]) == pytest.approx(second["scores"][line["method"]][line["metric"]])


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    write_run(tmp_path, make_photos(3))
    (tmp_path / "curves.png").write_bytes(b"old")

    def stops(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stops)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


def test_errors_of_a_folder(tmp_path):
    def message():
        with pytest.raises(ValueError) as error:
            write_report(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message() == f"directory: {tmp_path} has no run.json; name the folder of an evaluation"
    (tmp_path / "run.json").write_text("{")
    assert message() == f"directory: {tmp_path / 'run.json'} is damaged; run the evaluation again, in another folder"
    write_run(tmp_path, [])
    assert message() == f"directory: no photo in {tmp_path} is done; let the evaluation run for longer"
    (tmp_path / "photos.jsonl").write_text("{\n")
    assert message() == f"records: line 1 of {tmp_path / 'photos.jsonl'} is no record of a photo; delete the line"
