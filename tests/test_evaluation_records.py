"""Records of an evaluation: what is read, what is cut off, and every error."""

import errno
import math
import os

import pytest

from evaluation.records import (
    append_record,
    block_values,
    mosaic_values,
    photo_values,
    read_records,
    repair_records,
    running,
    sanity_values,
)

NAN = math.nan


def test_a_last_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = '{"photo": "ä"}\n{"photo": "b"}\n'.encode()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        names = [record["photo"] for record in read_records(path)]
        assert names == ["ä", "b"][: whole[:end].count(b"}")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"photo": ', "cannot be read as JSON: "),
        (b"", "cannot be read as JSON: "),
        (b'{"photo": "\xff"}', "cannot be read as JSON: "),
        (b"[" * 100_000, "is nested too deeply"),
        (b"12", "it should be an object, got 12"),
        (b"{}", "has no 'photo'"),
        (b'{"photo": null}', "photo should be a text, got null"),
        (b'{"photo": "b", "scores": []}', "scores should be an object, got []"),
        (b'{"photo": "b", "scores": {"daam": {"iou": "1"}}}', 'scores.daam.iou should be a number or null, got "1"'),
        (b'{"photo": "b", "scores": {"daam": {"iou": NaN}}}', "scores.daam.iou should be a number or null, got NaN"),
        (b'{"photo": "b", "curves": {"daam": {"x": [1, null]}}}', "curves.daam.x[1] should be a number, got null"),
        (b'{"photo": "b", "blocks": {"1": 2}}', "blocks should be a list or null, got"),
        (
            b'{"photo": "b", "methods": {"daam": {"randomised": [true]}}}',
            "methods.daam.randomised[0] should be a number",
        ),
        (b'{"photo": "b", "photos": "b"}', 'photos should be a list, got "b"'),
        (b'{"photo": "b", "shares": {"daam": ["1"]}}', 'shares.daam[0] should be a number or null, got "1"'),
    ],
)
def test_another_line_that_cannot_be_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"photo": "a"}\n' + line + b'\n{"photo": "b"}\n')
    with pytest.raises(ValueError) as error:
        read_records(path)
    message = str(error.value)
    assert (
        message.startswith(f"records: line 2 of {path}") and reason in message and message.endswith("; delete the line")
    )
    assert message.isprintable() and len(message) < 400
    path.write_bytes(b'{"photo": "a"}\n' + line + b"\n")  # the last, but it was not cut: a line end follows
    with pytest.raises(ValueError, match="^records: line 2 of"):
        read_records(path)


@pytest.mark.parametrize("name", ["photos.jsonl", "sanity.jsonl", "mosaics.jsonl"])
def test_records_that_are_not_a_file(tmp_path, name):
    """A pipe would be read for ever."""
    os.mkfifo(tmp_path / name)
    for read in (read_records, repair_records):
        with pytest.raises(ValueError, match=rf"^records: .*{name} is not a file; move it away$"):
            read(tmp_path / name)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """What was recorded before is complete, and half a line is cut off when the run continues."""
    file, first = tmp_path / "photos.jsonl", {"photo": "a", "name": "cup", "scores": {}}
    append_record(file, first)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^out: .*photos\.jsonl cannot be written: No space left on device; make room"):
        append_record(file, first | {"photo": "b"})
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-9])
    assert repair_records(file) == [first] and file.read_bytes().endswith(b"}\n")


def test_values_by_metric_method_and_photo():
    scores = {"daam": {"iou": 0.5, "energy": None, "unknown": 3}, "rollout": {"iou": NAN}}
    photos = [{"photo": "a", "scores": scores, "blocks": [{"iou": 0.1}, {"iou": 0.2}]}, {"photo": "b", "scores": {}}]
    assert photo_values(photos, ["daam", "rollout", "other"]) == {"iou": {"daam": {"a": 0.5}}}
    assert block_values(photos) == {"iou": {"block 1": {"a": 0.1}, "block 2": {"a": 0.2}}}
    sanity = [{"photo": "a", "methods": {"daam": {"flip": 0.9, "class": None, "randomised": [0.8, 0.3]}}}]
    assert sanity_values(sanity, ["daam"]) == {"randomised": {"daam": {"a": 0.3}}, "flip": {"daam": {"a": 0.9}}}
    assert sanity_values([{"photo": "a", "methods": {"daam": {"randomised": []}}}], ["daam"]) == {}
    mosaics = [{"photo": "a", "photos": ["a"], "shares": {"daam": [0.2, None, 0.4, 0.9], "rollout": [None] * 4}}]
    assert mosaic_values(mosaics, ["daam", "rollout", "other"]) == {"pointing": {"daam": {"a": pytest.approx(0.5)}}}
    inverted = [{"photo": "a", "methods": {"daam": {"randomised": [0.8, -0.3]}}}]
    assert sanity_values(inverted, ["daam"]) == {"randomised": {"daam": {"a": 0.3}}}


def test_too_many_folders_below_each_other(tmp_path):
    with pytest.raises(OSError, match="^out: .* cannot be written: "), running(tmp_path / ("y/" * 1500), {}, {}):
        pass
    assert not list(tmp_path.iterdir())
