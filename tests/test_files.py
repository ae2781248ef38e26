"""Files are written atomically: single files, GIFs, the folder of a flow."""

import json
import os

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
    with pytest.raises(TypeError, match="not JSON serializable"):
        monkeypatch.undo()
        save_flow(folder, solid("blue"), flow, manifest={"model": object()})
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["a"]


def test_save_flow_into_the_current_folder(flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_flow(".", solid("red"), flow)
    assert (tmp_path / "flow.gif").exists()


def test_save_flow_is_not_stopped_by_the_remains_of_a_killed_run(flow, tmp_path):
    (tmp_path / ".a.0123abcd.part" / "frames").mkdir(parents=True)
    save_flow(tmp_path / "a", solid("red"), flow)
    assert (tmp_path / "a" / "flow.gif").exists()
