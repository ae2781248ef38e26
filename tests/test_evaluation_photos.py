"""Photos of an evaluation: those of a folder, those of a list, and their names."""

import os
import sys
from pathlib import Path, PurePath

import pytest

from evaluation.methods import photo_seed
from evaluation.photos import find_photos, name_of, path_of

BYTES = pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")


@pytest.fixture
def place(tmp_path):
    """A folder with two photos."""
    folder = tmp_path / "photos"
    (folder / "cup").mkdir(parents=True)
    for name in ("a.jpg", "cup/b.png"):
        (folder / name).touch()
    return folder


def test_photos_of_a_folder(tmp_path):
    """Masks beside the photos, earlier results and hidden files are skipped; links to folders are followed."""
    place = tmp_path / "photos"
    (place / "out").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.jpg", "a.png", "b.png", ".c.png", "out/curves.png"):
        (place / name).touch()
    (tmp_path / "elsewhere" / "d.jpg").touch()
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    assert find_photos(place, None, [place / "out", None]) == ["a.jpg", "a.png", "b.png", "linked/d.jpg"]
    assert find_photos(place, None, [place / "out", place]) == ["a.jpg", "b.png", "linked/d.jpg"]
    assert find_photos(place, None, [place / "out", place / "out" / ".."]) == ["a.jpg", "b.png", "linked/d.jpg"]
    above = find_photos(place, None, [tmp_path, None])  # results beside the folder of the photos, not in it
    assert above == find_photos(place, None, []) == ["a.jpg", "a.png", "b.png", "linked/d.jpg", "out/curves.png"]
    listed = tmp_path / "list.txt"
    listed.write_text("\ufeff./b.png\n\nb.png\na.jpg\n", encoding="utf-8")
    assert find_photos(place, listed, []) == ["a.jpg", "b.png"]


def test_every_photo_once(place):
    """Whatever leads back to a folder that was seen; folders of editors and waste bins are hidden."""
    (place / "up").symlink_to("..")
    (place / "cup" / "here").symlink_to(".")
    (place / "again").symlink_to("cup")
    for hidden in (".ipynb_checkpoints", ".Trash-1000", "cup/.thumbnails"):
        (place / hidden).mkdir()
        (place / hidden / "c.png").touch()
    assert find_photos(place, None) == ["a.jpg", "cup/b.png"]


def test_a_folder_that_cannot_be_listed(place, monkeypatch):
    scan = os.scandir

    def refuses(path):
        if Path(path).name == "cup":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(ValueError, match="^images: .*cup cannot be listed: Permission denied; check its permissions$"):
        find_photos(place, None)


@pytest.mark.parametrize(
    "text",
    [
        b"a.jpg\ncup/b.png\n",
        b"a.jpg\r\ncup/b.png\r\n",
        b"\xef\xbb\xbf  a.jpg \n\n\tcup/b.png",
        b"cup//b.png\n./cup/./b.png\ncup/../a.jpg\n../photos/a.jpg\ncup/b.png\n",
        b"{folder}/a.jpg\n{folder}/cup/../cup/b.png\na.jpg\n",
        b"linked/b.png\na.jpg\ncup/b.png\n",
        b"./a.jpg\n" * 10_000 + b"cup/b.png\n" * 10_000,
    ],
)
def test_spellings_of_the_same_photo(place, tmp_path, text):
    (place / "linked").symlink_to("cup")
    (tmp_path / "list.txt").write_bytes(text.replace(b"{folder}", os.fsencode(place)))
    assert find_photos(place, tmp_path / "list.txt") == ["a.jpg", "cup/b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a.jpg\nno.jpg\nno.png\n", "list: 2 of its photos are not in {}, for example no.jpg"),
        (b"cup\n", "list: 1 of its photos are not in {}, for example cup"),
        (b"no\x1b[2J.jpg\n", r"list: 1 of its photos are not in {}, for example no\x1b[2J.jpg"),
        (b"../list.txt\na.jpg\n", "list: 1 of its photos are outside {}, for example ../list.txt"),
        (b"/etc/passwd\n", "list: 1 of its photos are outside {}, for example ../"),
        (b"x" * 5000, "list: 1 of its photos are not in {}, for example xxx"),
        ("\ufeffa.jpg\n".encode("utf-16-le"), "list.txt is not a text in UTF-8; save it as UTF-8, one path per line"),
        (b"\n \n", "list.txt has no images"),
    ],
)
def test_a_list_of_other_things(place, tmp_path, text, message):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(ValueError) as error:
        find_photos(place, tmp_path / "list.txt")
    assert message.format(place) in str(error.value) and len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_a_list_that_is_not_a_file(place, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for listed in (place, tmp_path / "pipe", tmp_path / "no.txt", tmp_path / ("x" * 5000)):
        with pytest.raises(ValueError, match="^list: there is no file .*; check the path$"):
            find_photos(place, listed)


@BYTES
def test_names_that_are_not_text(place, tmp_path):
    """The name of a photo is the same in every locale, and its list has the same bytes."""
    odd = {b"\xff.jpg": "\udcff.jpg", "Ф.jpg".encode(): "Ф.jpg"}
    for name in odd:
        with open(os.path.join(os.fsencode(place), name), "wb"):
            pass
    names = ["a.jpg", "cup/b.png", *sorted(odd.values())]
    assert find_photos(place, None) == names
    (tmp_path / "list.txt").write_bytes(b"\n".join([b"a.jpg", b"cup/b.png", *odd]))
    assert find_photos(place, tmp_path / "list.txt") == names
    assert all(path_of(place, name).is_file() for name in names)
    assert [name_of(path_of(Path(), name)) for name in names] == names
    assert name_of(PurePath("cup", os.fsdecode(b"\xc3\xa9"))) == "cup/é"
    assert len({photo_seed(name, 0) for name in names}) == len(names)


def test_seeds_of_ordinary_names_stay():
    """Records of earlier runs depend on them."""
    assert photo_seed("cup/image_0001.jpg", 0) == 48562192029947911
    assert photo_seed("Tasse/é.jpg", 3) == 46398151484763460
