"""The report of the evaluation: its files, whole or none, and every error."""

import copy
import csv
import errno
import io
import json
import math
import os

import pytest
from PIL import Image
from tiny_records import make_mosaics, make_photos, make_sanity, write_run

from evaluation.report import write_report

pytestmark = pytest.mark.filterwarnings("error")


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


def test_the_table_of_mosaics(tmp_path):
    """Its rows count mosaics, and every mosaic counts once: the mean over its classes that could be explained."""
    write_run(tmp_path, make_photos(2), mosaics=make_mosaics(9))
    markdown = write_report(tmp_path)
    table = markdown.split("**Grid pointing game**\n\n")[1].split("\n\n")[0].splitlines()
    rows = {cells[0]: cells[1] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table)}
    assert rows[""] == "share in the own quarter ↑" and rows["mosaics"] == "9" and "photos" not in rows
    assert rows["daam"].startswith("**0.450** [0.450, 0.450]") and rows["random"] == "0.337 [0.337, 0.337] ▼"
    assert "- share in the own quarter: how much of the positive map" in markdown


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


def test_the_last_record_of_a_photo_counts(tmp_path):
    first, second = make_photos(2)
    write_run(tmp_path, [first, second, second | {"photo": first["photo"]}])
    write_report(tmp_path)
    line = next(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert int(line["n"]) == 2
    assert float(line["mean"]) == pytest.approx(second["scores"][line["method"]][line["metric"]])


def test_files_are_written_atomically(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "directory: {} has no run.json; choose the folder of an evaluation"),
        ({"run.json": "{"}, "directory: {}/run.json cannot be read as JSON: "),
        ({"photos.jsonl": ""}, "directory: no photo in {} is done; let the evaluation run longer"),
        ({"photos.jsonl": "{\n"}, "records: line 1 of {}/photos.jsonl cannot be read as JSON: "),
    ],
)
def test_a_folder_without_a_report(files, message, tmp_path):
    if "photos.jsonl" in files:
        write_run(tmp_path, [])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        write_report(tmp_path)
    assert str(error.value).startswith(message.format(tmp_path)) and ";" in str(error.value)


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "run.json")
    for directory in (tmp_path, tmp_path / "file", tmp_path / "no", str(tmp_path / ("x" * 5000))):
        with pytest.raises(ValueError, match="^directory: .* has no run.json; choose the folder of an evaluation$"):
            write_report(directory)
    for directory in (None, 5, b"there"):
        with pytest.raises(TypeError, match=f"^directory: expected a path, got {type(directory).__name__}$"):
            write_report(directory)


def changed(value, path, new):
    """Return a copy of parsed JSON with another value at a path; `...` deletes it."""
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if new is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "reason"),
    [
        (["methods"], ..., "has no 'methods'"),
        (["methods"], None, "methods should be a list, got null"),
        (["methods"], [], "methods is empty"),
        (["methods"], ["daam", 5], "methods[1] should be a text, got 5"),
        (["baselines"], {"mean": 1}, "baselines should be a list"),
        (["seed"], 0.5, "seed should be a whole number, got 0.5"),
        (["seed"], True, "seed should be a whole number, got true"),
        (["seed"], -1, "seed should be at least 0, got -1"),
        (["steps"], 0, "steps should be at least 2, got 0"),
        (["photos"], "20", 'photos should be a whole number, got "20"'),
        (["stages"], [["head"]], "stages[0] should be a text"),
        (["model"], None, "model should be a text, got null"),
        (["images"], 5, "images should be a text, got 5"),
        (["dtype"], ..., "has no 'dtype'"),
    ],
)
def test_a_damaged_run(path, new, reason, tmp_path):
    run = changed(write_run(tmp_path, make_photos(2), make_sanity(1)), path, new)
    (tmp_path / "run.json").write_text(json.dumps(run))
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError) as error:
        write_report(tmp_path)
    start, end = f"directory: {tmp_path}/run.json", "; run the evaluation again in another folder"
    assert str(error.value).startswith(start) and reason in str(error.value) and str(error.value).endswith(end)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "path", "new", "reason"),
    [
        ("photos.jsonl", [1, "photo"], ..., "has no 'photo'"),
        ("photos.jsonl", [1, "scores"], ..., "has no 'scores'"),
        ("photos.jsonl", [1, "name"], 5, "name should be a text, got 5"),
        ("photos.jsonl", [1, "scores", "gae"], {}, "is of another run, which has scores.gae"),
        ("photos.jsonl", [1, "curves", "daam", "deletion_mean"], [1, 0], "curves.daam has 2 values, not 5"),
        ("photos.jsonl", [1, "curves", "daam", "deletion_mean"], [math.inf] * 5, "should be a number, got Infinity"),
        ("photos.jsonl", [1, "curves", "daam", "deletion_mean"], [1e308] * 5, "curves has 1e+308, but shares and"),
        (
            "photos.jsonl",
            [1, "scores", "daam", "increase"],
            33,
            "scores has 33, but shares and correlations are -1 to 1",
        ),
        ("photos.jsonl", [1, "blocks", 0, "increase"], -2, "blocks has -2, but shares and correlations are -1 to 1"),
        ("sanity.jsonl", [1, "methods", "daam", "flip"], 1.5, "methods has 1.5, but shares and correlations"),
        ("sanity.jsonl", [1, "methods"], ..., "has no 'methods'"),
        ("sanity.jsonl", [1, "methods", "gae"], {}, "is of another run, which has methods.gae"),
        ("sanity.jsonl", [1, "methods", "daam", "randomised"], [1], "methods.daam has 1 values, not 3"),
        ("mosaics.jsonl", [1, "shares"], ..., "has no 'shares'"),
        ("mosaics.jsonl", [1, "photos"], ..., "has no 'photos'"),
        ("mosaics.jsonl", [1, "shares", "gae"], [0.2] * 4, "is of another run, which has shares.gae"),
        ("mosaics.jsonl", [1, "shares", "daam"], [0.2] * 3, "shares.daam has 3 values, not 4"),
        ("mosaics.jsonl", [1, "shares", "daam", 2], 4, "shares has 4, but shares and correlations"),
    ],
)
def test_records_of_another_run(file, path, new, reason, tmp_path):
    write_run(tmp_path, make_photos(3), make_sanity(3), mosaics=make_mosaics(3))
    records = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    lines = [json.dumps(record) for record in changed(records, path, new)]
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError) as error:
        write_report(tmp_path)
    message = str(error.value)
    assert message.startswith(f"records: line 2 of {tmp_path / file}") and message.endswith("; delete the line")
    assert reason in message
    (tmp_path / file).write_text("\n".join(lines[:1] + lines[2:]) + "\n")  # the line is deleted
    write_report(tmp_path)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    write_run(tmp_path, make_photos(3))
    records = (tmp_path / "photos.jsonl").read_bytes()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"^out: .*curves\.png cannot be written: No space left on device; make room"):
        write_report(tmp_path)
    assert (tmp_path / "photos.jsonl").read_bytes() == records and not list(tmp_path.glob(".*"))


def test_names_that_are_not_plain(tmp_path):
    """Names of the folder, the model and the classes stay on one line, and no mark of Markdown begins in them."""
    run = write_run(tmp_path, [record | {"name": "\udcff|\n</script>"} for record in make_photos(2)])
    odd = {"images": "a`b``\n# c|\udcff</script>", "model": "`"}
    (tmp_path / "run.json").write_text(json.dumps(run | odd))
    markdown = write_report(tmp_path, red_picture)
    assert "\n2 of 20 photos of ``` a`b``\\n# c|\\udcff</script> ```, model `` ` ``; the maps" in markdown
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jsonl", ".md", ".csv", ".png"}
