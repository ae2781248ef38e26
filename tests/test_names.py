"""Names of results: short enough for every file system, drawn with a font or as an index; never another's folder."""

import json
import os
import unicodedata
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from command_line.names import LOCK, drawn_name, file_name, own_folder, result_folder, result_names, shorten

CHINESE = "虎斑猫" * 140


@dataclass
class Settings:
    """The options that names depend on."""

    rows: str = "class"
    variant: str = "paper"
    score: str = "logit"


def folder_of(photo, *labels, **settings):
    return result_folder(Path("out", file_name(photo)), list(labels), Settings(**settings)).name


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photo", ["a" * 244, "é" * 120, CHINESE])
@pytest.mark.parametrize("label", ["cat", "w" * 400, CHINESE])
@pytest.mark.parametrize("settings", [{}, {"rows": "patches", "variant": "signed"}])
def test_long_names_are_shortened_and_stay_apart(photo, label, settings, tmp_path):
    name = folder_of(photo, label, **settings)
    (tmp_path / f".{name}-999.01234567.part").mkdir()  # the longest name that is made of it
    others = {folder_of(photo + "x", label, **settings), folder_of(photo, f"{label}x", **settings)}
    assert name not in others and len(others) == 2
    assert name.endswith("-patches-signed" if settings else "") and name.startswith(photo[:20])


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, ""),
        ({"score": "importance"}, ""),
        ({"score": "log_odds"}, "-log_odds"),
        ({"variant": "heads", "score": "log_odds"}, "-heads-log_odds"),
        ({"variant": "relevance", "score": "log_odds"}, "-relevance"),
        ({"variant": "relevance", "score": "logit", "rows": "patches"}, "-patches-relevance-logit"),
    ],
    ids=str,
)
def test_settings_that_make_another_map_are_in_the_name(settings, ending):
    assert folder_of("coffee", "cup", **settings) == f"coffee-cup{ending}"


def test_names_that_fit_are_not_changed():
    assert folder_of("a" * 200, "b" * 20) == "a" * 200 + "-" + "b" * 20
    assert folder_of("虎" * 60, "cat") == "虎" * 60 + "-cat"
    assert shorten("a" * 230) == "a" * 230 and len(shorten("a" * 231)) == 230


def test_names_in_a_locale_without_their_characters(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii"))
    assert folder_of("coffee", "cup") == "coffee-cup"
    name = folder_of("コーヒー", "cup")
    assert name.isascii() and name.startswith("____-") and name.endswith("-cup")
    assert name != folder_of("カフェオレ", "cup")


@pytest.mark.parametrize(
    ("text", "name"),
    [("con", "con_"), ("NUL.tar", "NUL_.tar"), ("lpt9", "lpt9_"), ("console", "console"), ("a...", "a"), ("..", "_"),
     ("", "_"), ("a/b\\c:d", "a_b_c_d"), ("a\nb\x1b", "a_b"), ("\udc80x", "x"), ("../../up", "up")],
)  # fmt: skip
def test_file_names(text, name):
    assert file_name(text) == name


def test_names_are_unique_where_case_and_unicode_form_do_not_count():
    files = [
        "a/photo.png",
        "a/Photo.png",
        "b/PHOTO.png",
        "b/photo.png",
        "a/caf\u00e9.png",
        "a/cafe\u0301.jpg",
        "c/a.png",
    ]
    found = result_names([Path("/", file) for file in files])
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found}) == len(files)
    assert found[0] == "photo" and found[-1] == "a"


@pytest.mark.parametrize(
    ("label", "drawn"),
    [("tabby", "tabby"), ("", "class 7"), ("  ", "class 7"), ("\U0001fae8\ue000\uf8ff", "class 7"), ("a\nb", "a\\nb")],
)
def test_names_without_a_font_are_drawn_as_the_index(label, drawn):
    assert drawn_name(label, 7) == drawn


# Folders --------------------------------------------------------------------------------------------------------------


def manifest(photo="p", *classes, model="m", checkpoint="w", bank=None):
    targets = [{"index": k} for k in classes or (1,)]
    return {
        "model": model,
        "image": {"sha256": photo},
        "checkpoint": checkpoint and {"sha256": checkpoint},
        **({"target": targets[0]} if len(targets) == 1 else {"targets": targets}),
        **({"bank": {"folder": str(bank[0]), "features": bank[1]}} if bank else {}),
    }


def save(folder, what):
    with own_folder(folder, what) as own:
        (own / "flow.json").write_text(json.dumps(what))
    return own.name


OTHERS = {
    "photo": manifest("q"),
    "class": manifest("p", 2),
    "classes": manifest("p", 1, 2),
    "model": manifest(model="n"),
    "weights": manifest(checkpoint="v"),
    "no file of weights": manifest(checkpoint=None),
    "bank": manifest(bank=("bank", 9)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_result_is_replaced_by_its_own_kind_only(other, tmp_path):
    folder = tmp_path / "out" / "coffee-cup"
    assert [save(folder, what) for what in (manifest(), other, manifest(), other)] == ["coffee-cup", "coffee-cup-2"] * 2
    assert save(folder, manifest("third")) == "coffee-cup-3"
    assert json.loads((folder / "flow.json").read_text()) == manifest()


def test_a_bank_is_known_by_its_folder_and_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two, larger = (manifest(bank=bank) for bank in (("one", 9), ("two", 9), ("one", 10)))
    folder = tmp_path / "a"
    assert [save(folder, what) for what in (one, two, larger)] == ["a", "a-2", "a-3"]
    assert save(folder, manifest(bank=(tmp_path / "one", 9))) == "a"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"image": 7}', '{"image": {"sha256": "p"}}', "\udcff", "a folder",
             json.dumps(manifest(bank=("b\0", 9)))]
)  # fmt: skip
def test_a_manifest_that_says_nothing_is_left_alone(text, tmp_path):
    file = tmp_path / "coffee-cup" / "flow.json"
    file.parent.mkdir()
    file.mkdir() if text == "a folder" else file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert save(file.parent, manifest()) == "coffee-cup-2"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.name), Path.mkdir])
def test_nothing_but_files_is_read(make, tmp_path):
    """A pipe would be read for ever."""
    place = tmp_path / "coffee-cup"
    place.mkdir()
    make(place / "flow.json")
    assert save(place, manifest()) == "coffee-cup-2" and os.listdir(place) == ["flow.json"]


def test_other_things_in_the_way(tmp_path):
    folder = tmp_path / "coffee-cup"
    folder.write_text("a file")
    (tmp_path / "coffee-cup-2").symlink_to("nowhere")
    (tmp_path / "coffee-cup-3").mkdir()
    (tmp_path / "coffee-cup-3" / "flow.gif").write_text("an unfinished result")
    assert save(folder, manifest()) == "coffee-cup-3" and folder.read_text() == "a file"
    (tmp_path / "loop").symlink_to("loop")
    assert save(tmp_path / "loop", manifest()) == "loop-2"
    (tmp_path / "model").write_text("a file")
    with pytest.raises(OSError):
        save(tmp_path / "model" / "coffee-cup", manifest())


def test_an_error_leaves_nothing_or_what_was_there(tmp_path):
    folder = tmp_path / "coffee-cup"
    for before in (None, manifest()):
        if before:
            save(folder, before)
        with pytest.raises(OSError, match="full"), own_folder(folder, manifest()) as own:
            (own / "flow.gif").write_text("half of it")
            raise OSError("the disk is full")
        assert folder.exists() == bool(before)
    assert json.loads((folder / "flow.json").read_text()) == manifest() and not (folder / LOCK).exists()


def test_the_lock_of_a_killed_process(tmp_path):
    folder = tmp_path / "coffee-cup"
    folder.mkdir()
    (folder / LOCK).touch()
    assert save(folder, manifest()) == "coffee-cup" and not (folder / LOCK).exists()


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "coffee-cup"
    one, two = manifest("p"), manifest("q")
    with own_folder(folder, one) as first, own_folder(folder, two) as second, own_folder(folder, one) as again:
        assert [first.name, second.name, again.name] == ["coffee-cup", "coffee-cup-2", "coffee-cup-3"]
    assert not any(tmp_path.iterdir())
    with ThreadPool(8) as pool:
        made = pool.map(lambda n: save(folder, manifest(str(n))), range(24))
    assert len(set(made)) == 24 and not [*tmp_path.rglob(LOCK)]
