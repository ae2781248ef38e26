"""The loop over the photos of a script: batches, memory, precision, and what fails on the way."""

import argparse
import gc
import json
import weakref

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, no_leftovers, one_line_error, torchrun

import VIT_DynamicAccumulatedAttentionMap_oneSample as script
from command_line import photos as photo_loop
from command_line import results
from daam_core import attention_flow
from models import load
from models.images import read_image

EMBEDDED = "vit_small_patch14_caltech101"


@pytest.fixture
def photos(tmp_path):
    """Five photos, and a file that cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "flower.jpg"):
        Image.open(ROOT / ".img" / name).resize((96, 64)).save(folder / name)
    (folder / "damaged.png").write_text("not an image")
    return folder


def test_batches_give_what_single_photos_give(explain, weights, photos, tmp_path):
    made = {}
    for batch in (1, 4):
        out = tmp_path / f"by_{batch}"
        options = ("--checkpoint", weights, "--target", "cat", "dog", "--batch", batch, "--output-dir", out)
        result = explain("--image", photos, *options)
        one_line_error(result, "image: ", "damaged.png")
        assert "6/6" in result.stderr
        made[batch] = {p.parent.name: np.load(p) for p in (out / "tiny").rglob("maps.npz")}
    assert made[1].keys() == made[4].keys() and len(made[1]) == 5
    for name, alone in made[1].items():
        for key in ("block_maps", "accumulated", "output"):
            wanted, largest = alone[key], np.abs(alone[key]).max()
            np.testing.assert_allclose(made[4][name][key], wanted, atol=1e-4 * largest, err_msg=name)


def test_ranks_share_a_folder(explain, weights, photos, tmp_path, offline):
    """Names and numbers are those of one process, the error is said once, and both end with code 2."""
    (photos / "flower.png").write_bytes((photos / "coffee.png").read_bytes())  # its name depends on all photos
    options = ("--image", photos, "--checkpoint", weights, "--batch", 2, "--size", 32, "--output-dir")
    one_line_error(explain(*options, tmp_path / "one"), "damaged.png")
    result = torchrun(script.__file__, *options, tmp_path / "two", env=offline)
    assert result.stderr.count("error: ") == 1 and "damaged.png" in result.stderr, result.stderr
    assert result.returncode != 0  # torchrun has its own codes
    made = {
        out: {p.parent.name: dict(np.load(p)) for p in (tmp_path / out).rglob("maps.npz")} for out in ("one", "two")
    }
    assert made["one"].keys() == made["two"].keys() and len(made["two"]) == 6
    assert {name.split("-")[0] for name in made["two"]} >= {"flower", "flower.png"}
    for name, maps in made["one"].items():
        for key, wanted in maps.items():
            np.testing.assert_array_equal(made["two"][name][key], wanted, err_msg=name)
    printed = [line for line in result.stdout.splitlines() if line.startswith("  explained: ")]
    assert len(set(printed)) == 6 == len(printed) and no_leftovers(tmp_path)


def test_ranks_share_the_files_that_the_first_one_finds(photos, tmp_path, monkeypatch):
    """Another machine may have others, and a photo may come while the ranks start; none is left out or done twice."""
    theirs = [tmp_path / "a.png", tmp_path / "b.png"]
    monkeypatch.setattr(photo_loop, "gather", lambda files: [theirs, files])
    found = photo_loop.Photos(argparse.Namespace(image=[photos], output_dir=tmp_path / "out", batch=1))
    assert found.files == theirs and found.exit_code == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--image", "nowhere"), "image: there is no file nowhere"),
        (("--batch", "0"), "argument --batch: expected 1 to 4,096 photos, got 0"),
        (("--model", "no_such_model"), "model: 'no_such_model' is neither"),
    ],
)
def test_ranks_say_an_error_once(options, error, offline, tmp_path):
    result = torchrun(script.__file__, *options, "--output-dir", tmp_path / "out", env=offline)
    assert result.stderr.count("error: ") == 1 and f"error: {error}" in result.stderr, result.stderr
    assert result.returncode and not (tmp_path / "out").exists()


@pytest.fixture
def watched(monkeypatch):
    """Record every call of attention_flow: number of images, arguments, and number of photos in memory."""
    calls, pictures = [], []

    def read(path):
        picture = read_image(path)
        pictures.append(weakref.ref(picture))
        return picture

    def flow(model, images, *args, **kwargs):
        gc.collect()
        calls.append((len(images), kwargs, sum(picture() is not None for picture in pictures)))
        return attention_flow(model, images, *args, **kwargs)

    monkeypatch.setattr(script, "attention_flow", flow)
    for module in (script, photo_loop):
        monkeypatch.setattr(module, "read_image", read)
    return calls


def test_the_model_sees_batches_and_no_photo_is_held(watched, weights, photos, tmp_path, capsys):
    options = ["--image", str(photos), "--checkpoint", str(weights), "--output-dir", str(tmp_path / "out")]
    assert script.main([*options, "--batch", "3"]) == 2
    assert [(size, held) for size, _, held in watched] == [(3, 0), (2, 0)]  # the fourth cannot be read
    assert script.main([*options, "--memory", "low", "--rows", "patches", "--norm"]) == 2
    asked = {"norm": True, "rows": "patches", "memory": "low", "variant": "paper", "score": "logit"}
    assert watched[2][1] == asked and watched[2][0] == 5
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 10
    flow = json.loads(next((tmp_path / "out").rglob("coffee-*-patches/flow.json")).read_text())
    assert flow["settings"]["memory"] == "low" and flow["settings"]["dtype"] == "float32"


def test_out_of_memory_names_the_batch(weights, photos, tmp_path, capsys, monkeypatch):
    """The error is one line, earlier results stay, and nothing is half-written."""
    calls = iter([attention_flow, lambda *args, **kwargs: torch.empty(1 << 60)])
    monkeypatch.setattr(script, "attention_flow", lambda *args, **kwargs: next(calls)(*args, **kwargs))
    (photos / "damaged.png").unlink()
    options = ["--image", str(photos), "--checkpoint", str(weights), "--output-dir", str(tmp_path / "out")]
    assert script.main([*options, "--batch", "3"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1, errors
    assert "error: batch: 2 photos at once need more memory than cpu has; try a smaller --batch" in errors[0]
    made = sorted(p.name.split("-")[0] for p in (tmp_path / "out" / "tiny").iterdir())
    assert made == ["astronaut", "chelsea", "china"] and no_leftovers(tmp_path)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), cv2.error("(-4:Insufficient memory) Failed to allocate"), RuntimeError("can't allocate memory")],
    ids=["Python", "OpenCV", "torch"],
)
def test_a_photo_too_large_to_draw_does_not_stop_the_others(error, weights, photos, tmp_path, capsys, monkeypatch):
    def drawing(folder, *args):
        if "china" in folder.name:
            raise error
        return save_flow(folder, *args)

    save_flow = results.save_flow
    monkeypatch.setattr(results, "save_flow", drawing)
    (photos / "damaged.png").unlink()
    options = ["--image", str(photos), "--checkpoint", str(weights), "--output-dir", str(tmp_path / "out")]
    assert script.main([*options, "--size", "64"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1, errors
    assert "error: size: its frames need more memory than there is; try --size 1024 (" in errors[0]
    made = sorted(p.name.split("-")[0] for p in (tmp_path / "out" / "tiny").iterdir())
    assert made == ["astronaut", "chelsea", "coffee", "flower"] and no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device", "flow.gif"),
            "output-dir: the results cannot be written: [Errno 28]",
        ),
        (
            OSError(5, "Input/output error", "a" * 5000),
            "output-dir: the results cannot be written: [Errno 5]",
        ),
        (
            cv2.error("(-215:Assertion failed) dst.cols < SHRT_MAX\nin function 'remap'"),
            "(-215:Assertion failed) dst.cols",
        ),
        (OverflowError("the picture is too wide\x1b"), "the picture is too wide\\x1b"),
        (ValueError(), "ValueError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_photo_that_cannot_be_saved_does_not_stop_the_others(error, said, weights, photos, explain, monkeypatch):
    def saving(folder, *args):
        if "china" in folder.name:
            (folder / "flow.gif").write_text("half of it")
            raise error
        return save_flow(folder, *args)

    save_flow = results.save_flow
    monkeypatch.setattr(results, "save_flow", saving)
    (photos / "damaged.png").unlink()
    out = photos.parent / "out"
    result = explain("--image", photos, "--checkpoint", weights, "--output-dir", out, "--size", 64)
    one_line_error(result, f"error: {said}", "china.jpg)")
    assert len(next(line for line in result.stderr.splitlines() if "error: " in line)) < 1000
    made = sorted(p.name.split("-")[0] for p in (out / "tiny").iterdir())
    assert made == ["astronaut", "chelsea", "coffee", "flower"]


def test_a_model_too_large_to_load(weights, photos, explain, monkeypatch):
    monkeypatch.setattr(script, "load_model", lambda options: torch.empty(1 << 60))
    result = explain("--image", photos, "--checkpoint", weights)
    one_line_error(result, "error: model: it needs more memory than there is; try a smaller one, or --device cpu")


def test_a_photo_that_is_named_twice_is_explained_once(weights, photos, explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "damaged.png").unlink()
    (photos / "link.png").symlink_to("coffee.png")  # another file
    (tmp_path / "same").symlink_to("photos")
    spellings = ("photos/coffee.png", "./photos/../photos/coffee.png", photos / "coffee.png", "same/flower.jpg", photos)
    result = explain("--image", *spellings, "--checkpoint", weights, "--size", 32, "--output-dir", "out", "--target", 0)
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if line[0] != " "]
    assert printed[:3] == ["photos/coffee.png", "same/flower.jpg", str(photos / "astronaut.png")]
    assert len(printed) == 6 == len(list((tmp_path / "out" / "tiny").iterdir()))


def test_errors_of_the_script_itself_are_not_hidden(weights, photos, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(script, "attention_flow", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        script.main(["--image", str(photos / "coffee.png"), "--checkpoint", str(weights)])


@pytest.mark.parametrize("dtype, target", [("bfloat16", "top2"), ("float16", "cup")])
def test_half_precision_stays_close(dtype, target, explain, tmp_path):
    options = ("--dtype", dtype, "--target", target, "--size", 64, "--output-dir", tmp_path)
    result = explain("--model", EMBEDDED, *options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    file = next(tmp_path.rglob("maps.npz"))
    maps, flow = np.load(file), json.loads(file.with_name("flow.json").read_text())
    assert flow["settings"]["dtype"] == dtype
    for c in flow.get("targets", [flow.get("target")]):
        last = flow["evolution"]["blocks"][-1]["probability"][str(c["index"])]
        assert last == pytest.approx(c["probability"], abs=0.02)
    classes = [c["index"] for c in flow.get("targets", [flow.get("target")])]
    loaded = load(EMBEDDED)
    images = loaded.transform(read_image(ROOT / ".img" / "coffee.png")).unsqueeze(0)
    exact = attention_flow(loaded.model, images, [classes]).accumulated[0, :, -1].flatten(1).numpy()
    half = maps["accumulated"].reshape(len(classes), 12, -1)[:, -1]
    assert not np.allclose(half, exact, rtol=1e-5, atol=0)  # it was computed in another precision
    assert all(np.corrcoef(a, b)[0, 1] > 0.999 for a, b in zip(half, exact, strict=True))
