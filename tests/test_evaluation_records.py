"""Records of an evaluation: what is read, what is cut off, and every error."""

import math

import pytest

from evaluation.records import block_values, photo_values, read_records, sanity_values

NAN = math.nan


def test_a_last_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = '{"photo": "ä"}\n{"photo": "b"}\n'.encode()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        names = [record["photo"] for record in read_records(path)]
        assert names == ["ä", "b"][: whole[:end].count(b"}")]


@pytest.mark.parametrize("line", [b'{"photo": ', b"", b"12", b'{"photo": "\xff"}', b"{}"])
def test_another_line_that_cannot_be_read(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"photo": "a"}\n' + line + b'\n{"photo": "b"}\n')
    with pytest.raises(ValueError, match=r"^records: line 2 of .*a\.jsonl is not the record of a photo; delete it$"):
        read_records(path)
    path.write_bytes(b'{"photo": "a"}\n' + line + b"\n")  # the last, but it was not cut: a line end follows
    with pytest.raises(ValueError, match="^records: line 2 of"):
        read_records(path)


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
