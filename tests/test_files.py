"""Files are written atomically: single files, GIFs, the folder of a flow."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY
from tiny_pictures import random_flow, random_picture, read_gif, solid, tree

import daam_vit.files
from daam_core import (
    AttentionFlow,
    attention_flow,
    block_labels,
    contact_sheet,
    overlay,
    render,
    save_flow,
    save_gif,
    side_by_side,
)
from daam_vit.files import atomic_write

BLOCKS = TINY["depth"]


@pytest.mark.parametrize("old", [None, "old"])
def test_atomic_write_shows_the_file_at_the_end(tmp_path, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with atomic_write(path) as part:
        part.write_text("new")
        assert part.parent == tmp_path and part != path  # in the same folder, since only there a rename is atomic
        assert path.exists() == bool(old) and (not old or path.read_text() == old)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_nothing_after_an_exception(tmp_path, error):
    with pytest.raises(error), atomic_write(str(tmp_path / "a.txt")) as part:
        part.write_text("half")
        raise error
    assert not os.listdir(tmp_path)


def test_signed_maps_are_kept_and_drawn_as_zero(tmp_path):
    maps = torch.stack([torch.from_numpy(random_flow(3)), -torch.rand(3, 4, 4)])[None] - 0.5
    flow = SimpleNamespace(block_maps=-maps, accumulated=maps, output=torch.zeros(1, 5))
    image = Image.fromarray(random_picture(60, 80))
    save_flow(tmp_path / "a", image, flow, titles=["one", "two"])
    saved = np.load(tmp_path / "a" / "maps.npz")
    assert np.array_equal(saved["accumulated"], maps[0]) and np.array_equal(saved["block_maps"], -maps[0])
    clipped = SimpleNamespace(block_maps=maps, accumulated=maps.clamp(min=0), output=torch.zeros(1, 5))
    save_flow(tmp_path / "b", image, clipped, titles=["one", "two"])
    for name in ("flow.gif", "sheet.png", "frames/block_03.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# GIFs
# ----------------------------------------------------------------------------------------------------------------------


def test_gif_keeps_every_labelled_frame_of_a_constant_flow(tmp_path):
    heat = np.full((12, 14, 14), 100, np.uint8)
    save_gif(overlay(random_picture(64, 96), heat, block_labels(12)), tmp_path / "flow.gif")
    with Image.open(tmp_path / "flow.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 12 and gif.size == (96, 64) and gif.info["loop"] == 0


@pytest.mark.parametrize("duration, expected", [(400, [400] * 4), ([100, 200, 300, 1000], [100, 200, 300, 1000])])
def test_gif_shows_the_frames_in_order(tmp_path, duration, expected):
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:255:48j, 0:255:64j], 128), -1).astype(np.uint8)
    frames = overlay(smooth, render(random_flow(4)), block_labels(4))
    save_gif(frames, str(tmp_path / "flow.gif"), duration)
    shown, durations = read_gif(tmp_path / "flow.gif")
    assert durations == expected
    distance = np.array([[np.abs(a - np.asarray(b, np.float32)).mean() for b in frames] for a in shown])
    assert (distance.argmin(1) == range(4)).all() and distance.diagonal().max() < 8  # 256 colours per frame


@pytest.mark.parametrize("where", ["quantize", "save", "replace"])
def test_gif_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "flow.gif"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        for part in args[1:2]:
            if where == "save":
                part.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "replace") if where == "replace" else (Image.Image, where)), fail)
    with pytest.raises(OSError, match="disk full"):
        save_gif([solid("red")], path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["flow.gif"]


def test_gif_larger_than_the_format(tmp_path):
    with pytest.raises(ValueError, match="^frames: a GIF has 65,535 pixels per side at most, got 65536 x 1; make them"):
        save_gif([Image.new("RGB", (65_536, 1))], tmp_path / "flow.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.int64, np.float32, float])
def test_durations_of_numpy(tmp_path, kind):
    for duration, expected in ((kind(90), [90, 90]), ([kind(90), kind(0)], [90, 0]), (np.array([3e1, 50]), [30, 50])):
        save_gif([solid("red"), solid("lime")], tmp_path / "a.gif", duration)
        assert read_gif(tmp_path / "a.gif")[1] == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "F", "I;16"])
def test_gif_of_any_mode(tmp_path, mode):
    frames = [Image.fromarray(random_picture(8, 8)).convert("L" if mode == "I;16" else mode).convert(mode)]
    save_gif([*frames, solid("red", (8, 8))], tmp_path / "a.gif")
    assert len(read_gif(tmp_path / "a.gif")[0]) == 2


@pytest.mark.parametrize(
    "duration, error, match",
    [
        (-1, ValueError, "^duration: expected a number from 0 to 655,350, got -1$"),
        (700_000, ValueError, "^duration: expected a number from 0 to"),
        (float("nan"), ValueError, "^duration: .* got nan$"),
        (float("inf"), ValueError, "^duration: .* got inf$"),
        ([100, -1], ValueError, "^duration: .* got -1$"),
        ([100], ValueError, "^duration: expected a number, or one for each of 2 frames, got 1$"),
        ([100] * 3, ValueError, "^duration: .* of 2 frames, got 3$"),
        ([], ValueError, "^duration: .* got 0$"),
        ("12", TypeError, "^duration: .* got str$"),
        (None, TypeError, "^duration: expected a number, got NoneType$"),
        (True, TypeError, "^duration: expected a number, got bool$"),
        ([100, "1"], TypeError, "^duration: expected a number, got str$"),
    ],
)
def test_gif_with_wrong_durations(tmp_path, duration, error, match):
    with pytest.raises(error, match=match):
        save_gif([solid("red"), solid("lime")], tmp_path / "flow.gif", duration)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "path, error, match",
    [
        ("no/flow.gif", ValueError, "^path: there is no folder .*no; pass another path$"),
        (".", ValueError, "^path: is a folder: .*; pass another path$"),
        ("file/flow.gif", ValueError, "^path: Not a directory, got "),
        ("x" * 300, ValueError, "^path: File name too long, got "),
        ("a\0.gif", ValueError, "^path: embedded null byte, got "),
        (b"a.gif", TypeError, "^path: expected a path, got bytes$"),
        (5, TypeError, "^path: expected a path, got int$"),
    ],
)
def test_gif_with_a_wrong_path(tmp_path, path, error, match):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=match) as caught:
        save_gif([solid("red")], tmp_path / path if isinstance(path, str) else path)
    assert os.listdir(tmp_path) == ["file"] and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "frames, error, match",
    [
        (
            [solid("red"), solid("red", (5, 5))],
            ValueError,
            "^frames: expected one size for all, got 40 x 20 and 5 x 5$",
        ),
        ([solid("red", (0, 5))], ValueError, "^frames: expected .* got 0 x 5 pixels$"),
        ([None], TypeError, "^frames: expected a PIL image"),
        (solid("red"), TypeError, "^frames: expected a sequence of PIL images, got Image$"),
        (None, TypeError, "^frames: expected a sequence of PIL images, got NoneType$"),
    ],
)
def test_gif_of_wrong_frames(tmp_path, frames, error, match):
    with pytest.raises(error, match=match):
        save_gif(frames, tmp_path / "flow.gif")
    assert not os.listdir(tmp_path)


def test_gif_without_frames(tmp_path):
    with pytest.raises(ValueError, match=r"^frames: there are none; pass at least one$"):
        save_gif([], tmp_path / "flow.gif")
    assert not os.listdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# A flow as a folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(model, images):
    return attention_flow(model, images)


def test_save_flow_writes_the_chosen_image(flow, tmp_path):
    picture = Image.fromarray(random_picture(64, 96))
    folder = save_flow(tmp_path / "deep" / "er", picture, flow, 1, "caption", {"class": "Tüpfelhyäne"}, duration=100)
    assert folder == tmp_path / "deep" / "er" and os.listdir(folder.parent) == ["er"]
    blocks = [f"frames/block_{b:02d}.png" for b in range(1, BLOCKS + 1)]
    assert sorted(tree(folder)) == sorted(["flow.gif", "flow.json", "maps.npz", "sheet.png", *blocks])

    frames = overlay(picture, render(flow.accumulated[1]), block_labels(BLOCKS))
    for name, frame in zip(blocks, frames, strict=True):
        assert np.array_equal(Image.open(folder / name), frame)
    shown, durations = read_gif(folder / "flow.gif")
    assert len(shown) == BLOCKS and durations == [100, 100, 300]
    assert np.array_equal(Image.open(folder / "sheet.png"), contact_sheet(picture, frames, "caption"))
    manifest = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
    assert manifest == {"class": "Tüpfelhyäne", "blocks": BLOCKS, "grid": [4, 4]}
    with np.load(folder / "maps.npz", allow_pickle=False) as maps:
        assert sorted(maps) == ["accumulated", "block_maps", "output"]
        for name in maps:
            assert maps[name].dtype == np.float32 and np.array_equal(maps[name], getattr(flow, name)[1])


@pytest.mark.parametrize("classes, columns", [(1, 4), (2, 3), (4, 1)])
def test_save_flow_of_several_classes(model, images, tmp_path, classes, columns):
    """A frame has a panel for every class, each scaled by its own maximum."""
    flow = attention_flow(model, images, [[4, 1, 0, 2][:classes]] * 2)
    picture, names = Image.fromarray(random_picture(64, 96)), ["cup", "ewer", "lotus", "crab"][:classes]
    folder = save_flow(tmp_path / "a", picture, flow, 1, "caption", titles=names)
    panels = [overlay(picture, render(a), block_labels(BLOCKS)) for a in flow.accumulated[1]]
    frames = side_by_side(panels, names)
    for b, frame in enumerate(frames, 1):
        assert np.array_equal(Image.open(folder / "frames" / f"block_{b:02d}.png"), frame)
    assert np.array_equal(Image.open(folder / "sheet.png"), contact_sheet(picture, frames, "caption", columns))
    shown, _ = read_gif(folder / "flow.gif")
    assert [frame.shape[:2] for frame in shown] == [frames[0].size[::-1]] * BLOCKS
    manifest = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
    assert manifest == {"blocks": BLOCKS, "grid": [4, 4]}
    with np.load(folder / "maps.npz") as maps:
        assert maps["block_maps"].shape == (classes, BLOCKS, 4, 4) and maps["output"].shape == (5,)
        assert np.array_equal(maps["accumulated"], flow.accumulated[1])


def test_save_flow_with_more_pictures(flow, tmp_path):
    """Pictures are images or functions that draw one; if one fails, nothing is written."""
    folder = save_flow(
        tmp_path / "a", solid("red"), flow, pictures={"b.png": solid("blue"), "c.png": lambda: solid("lime")}
    )
    assert np.array_equal(Image.open(folder / "b.png"), solid("blue"))
    assert np.array_equal(Image.open(folder / "c.png"), solid("lime"))

    def fail():
        raise ValueError("no paint left")

    with pytest.raises(ValueError, match="no paint left"):
        save_flow(tmp_path / "new", solid("red"), flow, pictures={"b.png": fail})
    assert os.listdir(tmp_path) == ["a"]


def test_save_flow_of_half_precision_features(tmp_path):
    maps = torch.rand(1, 2, 3, 3)
    flow = AttentionFlow(maps, maps.cumsum(1), torch.rand(1, 8, dtype=torch.bfloat16), None)
    with np.load(save_flow(tmp_path / "a", solid("red"), flow) / "maps.npz") as saved:
        assert saved["output"].dtype == np.float32 and saved["output"].shape == (8,)


def test_save_flow_again_replaces_its_files_and_keeps_others(flow, tmp_path):
    folder = save_flow(tmp_path / "a", solid("red"), flow)
    (folder / "notes.txt").write_text("mine")
    save_flow(folder, solid("blue"), flow, 1)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert tree(folder) == tree(save_flow(tmp_path / "b", solid("blue"), flow, 1))


@pytest.mark.parametrize("culprit", ["save_gif", "contact_sheet"])
def test_save_flow_that_fails_changes_nothing(flow, tmp_path, monkeypatch, culprit):
    folder = save_flow(tmp_path / "a", solid("red"), flow)
    before = tree(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(daam_vit.files, culprit, fail)
    for path in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save_flow(path, solid("blue"), flow)
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["a"]


def test_save_flow_into_the_current_folder(flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_flow(".", solid("red"), flow)
    assert (tmp_path / "flow.gif").exists()


def test_save_flow_is_not_stopped_by_the_remains_of_a_killed_run(flow, tmp_path):
    (tmp_path / ".a.0123abcd.part" / "frames").mkdir(parents=True)
    save_flow(tmp_path / "a", solid("red"), flow)
    assert (tmp_path / "a" / "flow.gif").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Wrong arguments change nothing
# ----------------------------------------------------------------------------------------------------------------------


def tiny_flow(**other):
    """Return two images of three blocks, with other attributes if given."""
    maps = torch.arange(96.0).view(2, 3, 4, 4)
    output = torch.arange(10.0).view(2, 5)
    return SimpleNamespace(**{"block_maps": maps, "accumulated": maps.cumsum(1), "output": output} | other)


def with_value(value, shape=(2, 3, 4, 4)):
    maps = torch.rand(shape)
    maps.view(-1)[0] = value
    return maps


def itself():
    manifest = {}
    manifest["a"] = manifest
    return manifest


BLUE = solid("blue")
NESTED = [json.loads("[" * 500 + "]" * 500)]
for _ in range(500):
    NESTED = [NESTED, NESTED]


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"index": 99}, ValueError, "^index: expected -2 to 1, got 99$"),
        ({"index": -3}, ValueError, "^index: expected -2 to 1, got -3$"),
        ({"index": True}, TypeError, "^index: expected an integer, got True$"),
        ({"index": 1.0}, TypeError, "^index: expected an integer, got 1.0$"),
        ({"index": None}, TypeError, "^index: expected an integer"),
        ({"image": "photo.png"}, TypeError, "^image: expected a PIL image"),
        ({"image": solid("red", (0, 0))}, ValueError, "^image: expected .* got 0 x 0 pixels$"),
        ({"caption": None}, TypeError, "^caption: expected a text, got NoneType$"),
        ({"duration": -1}, ValueError, "^duration: expected a number from 0 to 218,450, got -1$"),
        ({"duration": [1, 2, 3]}, TypeError, "^duration: expected a number, got list$"),
        ({"titles": ["a", "b"]}, ValueError, "^titles: expected one for each of 1 classes, got 2$"),
        ({"titles": "a"}, TypeError, "^titles: expected one for each of 1 classes, got str$"),
        ({"manifest": []}, TypeError, "^manifest: expected a dict, got list$"),
        ({"manifest": {"a": [1, float("nan")]}}, ValueError, "^manifest: 'a' cannot be written as JSON: Out of range"),
        ({"manifest": {"b": 1, "a": float("-inf")}}, ValueError, "^manifest: 'a' cannot be written as JSON: Out of"),
        ({"manifest": {"a\n": object()}}, TypeError, "^manifest: .* cannot .* JSON: Object of type object is not JSON"),
        ({"manifest": {(1, 2): 3}}, TypeError, "^manifest: .* cannot be written as JSON: keys must be"),
        ({"manifest": itself()}, ValueError, "^manifest: 'a' cannot be written as JSON: Circular reference"),
        ({"manifest": {"a": NESTED}}, ValueError, "^manifest: 'a' cannot be written as JSON: maximum recursion depth"),
        ({"pictures": [BLUE]}, TypeError, "^pictures: expected pictures by file name, got list$"),
        ({"pictures": {5: BLUE}}, TypeError, "^pictures: expected a file name, got int$"),
        ({"pictures": {"a.png": None}}, TypeError, "^pictures: expected .*, as a.png, got NoneType$"),
        ({"pictures": {"a.png": lambda: None}}, TypeError, "^pictures: expected .*, as a.png, got NoneType$"),
        ({"pictures": {"a.png": solid("red", (0, 3))}}, ValueError, "^pictures: a.png has no pixels; leave it out$"),
        ({"pictures": {"a.png": Image.new("F", (3, 3))}}, ValueError, "^pictures: a.png: cannot write mode F as PNG"),
        ({"flow": None}, TypeError, "^flow: expected an AttentionFlow, .* got NoneType$"),
        ({"flow": tiny_flow(block_maps=with_value(torch.nan))}, ValueError, "^flow: has NaN or infinite values$"),
        ({"flow": tiny_flow(accumulated=with_value(torch.inf))}, ValueError, "^flow: has NaN or infinite values$"),
        ({"flow": tiny_flow(output=with_value(torch.nan, (2, 5)))}, ValueError, "^flow: has NaN or infinite values$"),
        ({"flow": tiny_flow(output=torch.rand(1, 5))}, ValueError, r"^flow: .* output \(1, 5\)$"),
        ({"flow": tiny_flow(output=torch.rand(2))}, ValueError, "^flow: expected output"),
        ({"flow": tiny_flow(block_maps=torch.rand(2, 2, 4, 4))}, ValueError, r"^flow: .* block_maps \(2, 2, 4, 4\)"),
        ({"flow": tiny_flow(accumulated=torch.rand(2, 3, 4, 4).to_sparse())}, ValueError, "^flow: .*sparse"),
        ({"flow": tiny_flow(accumulated=torch.rand(2, 3, 4, 4, device="meta"))}, ValueError, "^flow: .*meta"),
        ({"flow": tiny_flow(accumulated=torch.rand(2, 3, 4, 4).cfloat())}, ValueError, "^flow: .*complex"),
        ({"flow": tiny_flow(accumulated=np.zeros((2, 3, 4, 4)))}, TypeError, "^flow: .* got ndarray$"),
    ],
)
def test_save_flow_with_wrong_arguments(tmp_path, arguments, error, match):
    folder = save_flow(tmp_path / "a", solid("red"), tiny_flow())
    before = tree(tmp_path)
    for path in (folder, tmp_path / "new" / "deep"):
        with pytest.raises(error, match=match) as caught:
            save_flow(**{"directory": path, "image": solid("blue"), "flow": tiny_flow()} | arguments)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "name, reason",
    [
        *(
            (name, "is not a plain file name")
            for name in ("../../up.png", "/up.png", "a/b.png", "a\\b.png", "C:up.png")
        ),
        *(
            (name, "is not a plain file name")
            for name in ("a\0.png", "a\n.png", "\x1b.png", "\u202egnp.png", "\udcff.png")
        ),
        *((name, "is a name of the flow's own files") for name in ("flow.gif", "Sheet.PNG", "maps.npz", "flow.json")),
        *((name, "has no suffix of a picture, such as .png") for name in ("a", "a.txt", ".png", "..", "", ".lock")),
        *((name, "is longer than 255 bytes") for name in ("x" * 300 + ".png", "é" * 130 + ".png")),
    ],
)
def test_save_flow_with_a_picture_of_a_wrong_name(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"^pictures: .* {reason}; pass another name$"):
        save_flow(tmp_path / "x" / "a", solid("red"), tiny_flow(), pictures={"good.png": BLUE, name: BLUE})
    assert not os.listdir(tmp_path) and not (tmp_path.parent / "up.png").exists()


@pytest.mark.parametrize(
    "path, error, match",
    [
        ("file", ValueError, "^directory: .*file is not a folder; pass another path$"),
        ("file/a", ValueError, "^directory: Not a directory, got"),
        ("x" * 300, ValueError, "^directory: File name too long, got"),
        ("a\0b", ValueError, "^directory: embedded null byte, got"),
        ("sheet", ValueError, "^directory: .*sheet.png is in the way of a file or folder of this name; move it away$"),
        ("frames", ValueError, "^directory: .*frames is in the way of"),
        (None, TypeError, "^directory: expected a path, got NoneType$"),
    ],
)
def test_save_flow_into_a_wrong_folder(tmp_path, path, error, match):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sheet" / "sheet.png").mkdir(parents=True)
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frames").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        save_flow(path if path is None else tmp_path / path, solid("red"), tiny_flow())
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="^directory: is empty; pass a path"):
        save_flow("", solid("red"), tiny_flow())


@pytest.mark.parametrize("index", [np.int64(1), torch.tensor(1), -1])
def test_save_flow_takes_any_integer(tmp_path, index):
    flow = tiny_flow()
    with np.load(save_flow(tmp_path / "a", solid("red"), flow, index) / "maps.npz") as maps:
        assert np.array_equal(maps["block_maps"], flow.block_maps[1])


def test_save_flow_of_a_picture_in_16_bits(tmp_path):
    deep = Image.fromarray(np.full((20, 40), 30_000, np.uint16))
    save_flow(tmp_path / "a", deep, tiny_flow())
    save_flow(tmp_path / "b", Image.new("L", (40, 20), round(30_000 / 257)), tiny_flow())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_shorter_flow_leaves_no_frames_of_a_longer_one(flow, tmp_path):
    maps = torch.rand(2, 14, 2, 2)
    save_flow(tmp_path / "a", solid("red"), tiny_flow(block_maps=maps, accumulated=maps))
    (tmp_path / "a" / "frames" / "mine.png").write_text("")
    save_flow(tmp_path / "a", solid("red"), flow)
    names = [f"block_{b:02d}.png" for b in range(1, BLOCKS + 1)]
    assert sorted(os.listdir(tmp_path / "a" / "frames")) == [*names, "mine.png"]


# ----------------------------------------------------------------------------------------------------------------------
# Long names, full disks, killed processes, two at once
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "猫" * 85, "🐱" * 63])
def test_names_as_long_as_file_systems_allow(tmp_path, name):
    folder = save_flow(tmp_path / name, solid("red"), tiny_flow())
    assert (folder / "flow.json").is_file() and os.listdir(tmp_path) == [name]
    end = name[:-4].encode()[:251].decode(errors="ignore") + ".gif"
    save_gif([solid("red")], tmp_path / end)
    assert sorted(os.listdir(tmp_path)) == sorted([name, end])


def test_save_flow_through_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there/a", target_is_directory=True)
    (tmp_path / "there" / "a").mkdir()
    assert save_flow(tmp_path / "here", solid("red"), tiny_flow()) == tmp_path / "here"
    assert (tmp_path / "there" / "a" / "flow.gif").is_file() and os.listdir(tmp_path / "there") == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["here", "there"]


@pytest.mark.parametrize("full", ["gif", "picture", "maps", "manifest"])
def test_a_full_disk(tmp_path, monkeypatch, full):
    folder = save_flow(tmp_path / "a", solid("red"), tiny_flow())
    before = tree(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    place, name = {
        "gif": (daam_vit.files, "save_gif"), "picture": (Image.Image, "save"), "maps": (np, "savez"),
        "manifest": (Path, "write_text"),
    }[full]  # fmt: skip
    monkeypatch.setattr(place, name, fail)
    for path in (folder, tmp_path / "new" / "deep"):
        with pytest.raises(OSError, match="No space left on device: ") as caught:
            save_flow(path, solid("blue"), tiny_flow())
        assert caught.value.filename == str(path) and caught.value.errno == 28
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["a"]


def python(code, *arguments, **more):
    """Start a process that has a small flow and a picture, after `import` of what it needs."""
    start = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from PIL import Image
from daam_vit.files import save_flow, save_gif
maps = torch.rand(1, 3, 4, 4)
flow = SimpleNamespace(block_maps=maps, accumulated=maps, output=torch.rand(1, 2))
def red():
    return Image.new("RGB", (40, 20), "red")
"""
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of this kind")
def test_files_that_the_system_cuts(tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
for call in (lambda: save_flow(sys.argv[1], red(), flow), lambda: save_gif([red()], sys.argv[2])):
    try:
        call()
    except OSError as error:
        print(error)
"""
    out, err = python(code, tmp_path / "a", tmp_path / "a.gif").communicate(timeout=100)
    assert out.splitlines() == [f"[Errno 27] File too large: '{tmp_path / name}'" for name in ("a", "a.gif")], err
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_what_a_killed_process_left_is_deleted(tmp_path):
    """A temporary folder stays as long as its process lives, and for the seconds in which it may get its lock."""
    code = """
def wait():
    print("drawing", flush=True)
    time.sleep(100)
save_flow(sys.argv[1], red(), flow, pictures={"slow.png": wait})
"""
    process = python(code, tmp_path / "a")
    try:
        assert process.stdout.readline() == "drawing\n"
        (part,) = tmp_path.iterdir()
        assert part.name.startswith(".a.") and part.name.endswith(".part")
        old = time.time() - 3600
        os.utime(part, (old, old))
        save_flow(tmp_path / "b", solid("red"), tiny_flow())
        assert part.is_dir()  # somebody holds it
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    os.utime(part)
    save_flow(tmp_path / "b", solid("red"), tiny_flow())
    assert part.is_dir()  # it is young
    os.utime(part, (old, old))
    save_flow(tmp_path / "b", solid("red"), tiny_flow())
    assert os.listdir(tmp_path) == ["b"]


def test_only_temporary_folders_of_flows_are_deleted(tmp_path):
    old = time.time() - 30
    names = [".a.0123abcd.part", ".b.0123abcd.part", ".download.part", ".c.0123ABCD.part", "d.0123abcd.part"]
    for name in names:
        (tmp_path / name / "frames").mkdir(parents=True)
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / names[0], (old - 60, old - 60))
    (tmp_path / ".file.0123abcd.part").write_text("mine")
    save_flow(tmp_path / "x", solid("red"), tiny_flow())
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], ".file.0123abcd.part", "x"])


def test_two_processes_do_not_mix_their_files(tmp_path):
    """A fast one begins while a slow one moves its files, and waits; without the lock it would overtake it."""
    code = """
colour, delay = sys.argv[2], float(sys.argv[3])
replace = os.replace
def slow(old, new):
    if "flow.gif" not in str(old):  # which is also moved when it is written
        print("moving", flush=True)
        time.sleep(delay)
    replace(old, new)
os.replace = slow
picture = Image.new("RGB", (40, 20), colour)
print("ready", flush=True)
sys.stdin.readline()
more = {f"{n}.png": picture for n in range(4)}
save_flow(sys.argv[1], picture, flow, manifest={"colour": colour}, pictures=more)
"""
    first, second = (
        python(code, tmp_path / "a", *options, stdin=subprocess.PIPE) for options in (("red", 0.3), ("blue", 0.01))
    )
    for process in (first, second):
        assert process.stdout.readline() == "ready\n"
    for process in (first, second):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "moving\n"
    for process in (first, second):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    assert json.loads((tmp_path / "a" / "flow.json").read_text())["colour"] == "blue"
    for n in range(4):
        assert np.array_equal(Image.open(tmp_path / "a" / f"{n}.png"), solid("blue"))
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_another_process_does_not_let_go(tmp_path, monkeypatch):
    folder = save_flow(tmp_path / "a", solid("red"), tiny_flow())
    before = tree(folder)
    monkeypatch.setattr(daam_vit.files, "PATIENCE", 0.1)
    with daam_vit.files._hold_while_moving(folder), pytest.raises(ValueError, match="^directory: another process has"):
        ThreadPoolExecutor(1).submit(save_flow, folder, solid("blue"), tiny_flow()).result()
    assert tree(folder) == before and os.listdir(tmp_path) == ["a"]
