"""The report of the evaluation: its files, whole or none, and every error."""

import csv
import io

import pytest
from PIL import Image
from tiny_records import make_photos, make_sanity, write_run

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
        ({"run.json": "{"}, "directory: {}/run.json is damaged; run the evaluation again in another folder"),
        ({"photos.jsonl": ""}, "directory: no photo in {} is done; let the evaluation run longer"),
        ({"photos.jsonl": "{\n"}, "records: line 1 of {}/photos.jsonl is not the record of a photo; delete it"),
    ],
)
def test_a_folder_without_a_report(files, message, tmp_path):
    if "photos.jsonl" in files:
        write_run(tmp_path, [])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        write_report(tmp_path)
    assert str(error.value) == message.format(tmp_path)
