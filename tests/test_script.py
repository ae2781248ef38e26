"""The supervised script from end to end, without network: as a subprocess, and in this process."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scripts import ROOT, no_leftovers, one_line_error, run
from tiny_checkpoints import fake_cache

import VIT_DynamicAccumulatedAttentionMap_oneSample as script
from command_line import results
from daam_core import attention_flow, block_labels, overlay, render, side_by_side
from models import load
from models.images import read_image

SCRIPT = ROOT / "VIT_DynamicAccumulatedAttentionMap_oneSample.py"
EMBEDDED = "vit_small_patch14_caltech101"
TINY = "vit_tiny_patch16_224"


def test_default_run_without_network(offline, explain, tmp_path):
    """The script falls back to the embedded model, finds the cup, and writes the same bytes a second time."""
    result = run(SCRIPT, "--output-dir", tmp_path / "a", env=offline, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if "embedded" in line]
    reason = "the weights of deit_small_patch16_224 are not cached and http://127.0.0.1:9 cannot be reached"
    assert notes == [f"{reason}; using the embedded {EMBEDDED} instead"]
    printed = result.stdout.splitlines()
    assert printed[0].endswith("coffee.png") and len(printed) == 7
    assert "cup" in printed[1]  # the most probable class

    folder = tmp_path / "a" / EMBEDDED / "coffee-cup"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "flow.gif", "flow.json", "maps.npz", "sheet.png", "evolution.png",
        *(f"frames/block_{b:02d}.png" for b in range(1, 13)),
    }  # fmt: skip
    assert no_leftovers(tmp_path)
    photo = Image.open(ROOT / ".img" / "coffee.png")
    with Image.open(folder / "flow.gif") as gif:
        assert gif.n_frames == 12 and gif.size == photo.size
    assert Image.open(folder / "frames" / "block_07.png").size == photo.size

    maps = np.load(folder / "maps.npz")
    assert maps["block_maps"].shape == maps["accumulated"].shape == (12, 16, 16)
    np.testing.assert_allclose(maps["accumulated"], maps["block_maps"].cumsum(0), rtol=1e-5)
    flow = json.loads((folder / "flow.json").read_text())
    file = ROOT / "pretrainedmodels" / f"{EMBEDDED}.safetensors"
    assert flow["checkpoint"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert flow["target"]["name"] == "cup" and flow["target"] == flow["top5"][0] | {"requested": None}
    assert flow["target"]["score"] == pytest.approx(float(maps["output"].max()))
    assert flow["blocks"] == 12 and flow["grid"] == [16, 16] and flow["input_size"] == [3, 224, 224]
    assert (flow["image"]["width"], flow["image"]["height"]) == photo.size
    assert flow["versions"]["timm"] == timm.__version__

    assert explain("--output-dir", tmp_path / "b", "--model", EMBEDDED).returncode == 0
    again = tmp_path / "b" / EMBEDDED / "coffee-cup"
    for name in ("maps.npz", "flow.gif", "sheet.png", "evolution.png"):
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_model_that_was_named_is_not_replaced(offline, tmp_path):
    result = run(SCRIPT, "--model", "deit_small_patch16_224", "--output-dir", tmp_path, env=offline)
    one_line_error(result, "model: the weights of deit_small_patch16_224", "cannot be reached", EMBEDDED)
    assert not list(tmp_path.iterdir())


def test_cached_default_weights_and_an_imagenet_name(offline, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("deit_small_patch16_224").state_dict()
    home = tmp_path / "home"
    file = fake_cache(home, "timm/deit_small_patch16_224.fb_in1k", state)
    options = ("--target", "Tabby", "--size", "model", "--norm", "--duration", 100, "--output-dir", tmp_path / "out")
    result = run(SCRIPT, *options, env=offline | {"HF_HUB_CACHE": str(home)})
    assert result.returncode == 0 and "embedded" not in result.stderr, result.stderr
    folder = tmp_path / "out" / "deit_small_patch16_224" / "coffee-tabby"
    flow = json.loads((folder / "flow.json").read_text())
    assert flow["target"]["index"] == 281 and flow["target"]["requested"] == "Tabby"
    assert flow["checkpoint"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert flow["settings"]["norm"] is True
    maps = np.load(folder / "maps.npz")
    low, high = maps["block_maps"].min((1, 2), keepdims=True), maps["block_maps"].max((1, 2), keepdims=True)
    expected = ((maps["block_maps"] - low) / np.where(high > low, high - low, 1)).cumsum(0)
    np.testing.assert_allclose(maps["accumulated"], expected, rtol=1e-4, atol=1e-6)
    with Image.open(folder / "flow.gif") as gif:
        assert gif.size == (224, 224) and gif.info["duration"] == 100


def test_a_folder_of_every_kind_of_file(explain, weights, tmp_path):
    """Good files are explained, bad files are reported as one line each."""
    photo = Image.open(ROOT / ".img" / "coffee.png").resize((60, 40))
    photos = tmp_path / "photos"
    photos.mkdir()
    grey = photo.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(photos / "sixteen.png")
    grey.save(photos / "grey.png")
    photo.quantize(32).save(photos / "palette.png")
    photo.convert("RGBA").save(photos / "alpha.png")
    photo.convert("CMYK").save(photos / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(photos / "turned.jpg", exif=exif)
    photo.save(photos / "same.jpg")
    photo.save(photos / "same.png")
    good = {"sixteen", "grey", "palette", "alpha", "cmyk", "turned", "same", "same.png"}

    data = (photos / "same.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    (photos / "text.jpg").write_text("not an image")
    (photos / "zero.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(photos / "one.png")
    Image.new("1", (20000, 20000)).save(photos / "bomb.png")
    bad = {"cut.jpg", "text.jpg", "zero.png", "one.png", "bomb.png"}
    (photos / "notes.txt").write_text("is left out")

    out = tmp_path / "out"
    options = ("--checkpoint", weights, "--target", 2, "--output-dir", out)
    result = explain("--image", photos, tmp_path / "gone.jpg", *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: image: ")]
    assert len(errors) == 6 and all(any(name in line for line in errors) for name in bad | {"gone.jpg"}), errors
    made = {path.name.removesuffix("-jack-o_-lantern_pumpkin") for path in (out / "tiny").iterdir()}
    assert made == good
    assert "13/13" in result.stderr  # the progress bar
    with Image.open(out / "tiny" / "turned-jack-o_-lantern_pumpkin" / "flow.gif") as gif:
        assert gif.size == (40, 60) and gif.n_frames == 12


def test_unusual_pictures_and_names(offline, weights, tmp_path):
    """A file name that is not valid text, one that is too long, and a strip that becomes less than a pixel wide."""
    photo = Image.open(ROOT / ".img" / "coffee.png").resize((60, 40))
    files = [tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / "strip.png"]
    photo.save(files[0])
    photo.resize((8, 3000)).save(files[1])
    options = ("--checkpoint", weights, "--size", 64, "--target", 0, "--output-dir", "out")
    result = run(SCRIPT, "--image", *files, "n" * 300, *options, env=offline | {"PYTHONUTF8": "1"}, cwd=tmp_path)
    one_line_error(result, "File name too long")
    for file, size in zip(files, [(64, 43), (1, 64)]):
        (flow,) = (tmp_path / "out" / "tiny").glob(f"{file.stem[:3]}*/flow.json")
        assert json.loads(flow.read_text())["image"]["file"] == str(file)
        with Image.open(flow.with_name("flow.gif")) as gif:
            assert gif.size == size


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--image", "gone.jpg"], ["image: there is no file gone.jpg"]),
        (["--image", "empty"], ["image: the folder empty has no images"]),
        (["--target", "dgo"], ["target: no class is called 'dgo'; near names: dog"]),
        (["--target", "3"], ["target: class 3 is out of range; there are 3 classes"]),
        (["--target", "cat", "dgo"], ["target: no class is called 'dgo'; near names: dog"]),
        (["--target", "cat", "dog", "1"], ["target: 'dog' and '1' are the same class; name it once"]),
        (["--target", "0", "1", "2", "cat"], ["target: expected 1 to 3 classes, got 4"]),
        (["--target", "top4"], ["target: expected top1 to top3, got top4"]),
        (["--target", "top0"], ["target: expected top1 to top3, got top0"]),
        (["--target", "cat", "top2"], ["target: 'top2' cannot be combined with other classes; pass it alone"]),
        (["--batch", "0"], ["--batch: expected 1 to 4,096 photos, got 0"]),
        (["--dtype", "float8"], ["--dtype: expected float32, bfloat16 or float16, got 'float8'"]),
        (["--memory", "much"], ["--memory: expected auto, fast or low, got 'much'"]),
        (["--device", "abacus"], ["device: 'abacus' cannot be used"]),
        (["--device", "meta"], ["device: 'meta' cannot be used"]),
        (["--checkpoint", "gone.pth"], ["checkpoint: there is no file gone.pth"]),
        (["--model", "deit_smal"], ["model: 'deit_smal' is neither a timm name nor an embedded model"]),
        (["--model", "swin_tiny_patch4_window7_224", "--checkpoint", "swin.pth"], ["uses windowed attention"]),
        (["--model", "vit_tiny_patch16_224", "--checkpoint", "headless.pth"], ["has no classifier"]),
        (["--duration", "0"], ["--duration: expected 20 to 60,000 milliseconds"]),
        (["--size", "huge"], ["--size: expected image, model, or 32 to 8192 pixels"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)  # fmt: skip
def test_bad_options(explain, weights, tmp_path, options, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if "swin.pth" in options:
        torch.save(timm.create_model(options[1]).state_dict(), tmp_path / "swin.pth")
    if "headless.pth" in options:
        torch.save(timm.create_model(TINY, num_classes=0).state_dict(), tmp_path / "headless.pth")
    if "--checkpoint" not in options:
        options = [*options, "--checkpoint", weights]
    one_line_error(explain(*options, "--output-dir", "out"), *texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("constant", "value", "text"),
    [
        ("IMAGE", "gone.jpg", "image: there is no file gone.jpg"),
        ("MODEL", "deit_smal", "model: 'deit_smal' is neither a timm name nor an embedded model"),
        ("CHECKPOINT", "gone.pth", "checkpoint: there is no file gone.pth"),
        ("TARGET", ["cup", "cpu"], "target: no class is called 'cpu'"),
        ("OUTPUT_DIR", "taken", "Not a directory"),
    ],
)
def test_constants_are_checked_as_the_options_are(constant, value, text, explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    monkeypatch.setattr(script, "MODEL", TINY if constant == "CHECKPOINT" else EMBEDDED)
    monkeypatch.setattr(script, constant, value)
    one_line_error(explain(), text)


def test_defaults_of_the_options():
    constants = ("image", "model", "checkpoint", "target", "output_dir")
    options = vars(script.parse_options([]))
    assert {name: value for name, value in options.items() if name not in constants} == {
        "device": "auto", "dtype": "float32", "memory": "auto", "batch": 16, "norm": False, "rows": "class",
        "variant": "paper", "score": "logit", "size": "image", "duration": 400,
    }  # fmt: skip


def test_errors_end_the_process_with_code_2(offline, tmp_path):
    for options, text in ((["--image", "gone.jpg"], "there is no file"), (["--batch", "0"], "expected 1 to 4,096")):
        one_line_error(run(SCRIPT, *options, env=offline, cwd=tmp_path), text)


def test_interrupt_leaves_whole_results_only(offline, weights, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(200):
        shutil.copy(ROOT / ".img" / "coffee.png", photos / f"{n:03d}.png")
    command = [sys.executable, SCRIPT, "--image", photos, "--checkpoint", weights, "--output-dir", tmp_path / "out"]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background processes may ignore SIGINT
    process = subprocess.Popen(
        command, env=offline, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=listening
    )
    while "explained:" not in process.stdout.readline():  # until the first photo is done
        assert process.poll() is None
    time.sleep(0.3)  # somewhere in the second
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert no_leftovers(tmp_path)
    results = list((tmp_path / "out" / "tiny").iterdir())
    assert 1 <= len(results) < 200
    for folder in results:
        assert len([p for p in folder.rglob("*") if p.is_file()]) == 17


def test_full_disk_leaves_the_old_results(offline, explain, weights, tmp_path):
    """A limit on the size of files stands for a full disk: writing the first large file fails."""
    options = ["--checkpoint", weights, "--target", "dog", "--output-dir", tmp_path / "out"]
    assert explain(*options).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    result = run(SCRIPT, *options, "--norm", env=offline,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))  # fmt: skip
    one_line_error(result, "File too large")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_the_numbers_of_the_evolution(explain, tmp_path):
    """They agree with the model's own norm and head after every block, and with the other numbers of flow.json."""
    photo = ROOT / ".img" / "motorcycle_left.png"
    result = explain("--model", EMBEDDED, "--image", photo, "--output-dir", tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    folder = tmp_path / EMBEDDED / "motorcycle_left-Motorbikes"
    flow, maps = json.loads((folder / "flow.json").read_text()), np.load(folder / "maps.npz")
    formed = flow["evolution"]
    model, transform = (loaded := load(EMBEDDED)).model, loaded.transform
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(transform(read_image(photo)).unsqueeze(0))
        expected = torch.cat([model.forward_head(model.norm(x)) for x in outputs]).softmax(1)  # (12, 101)

    best, second = flow["top5"][:2]
    assert formed["runner_up"] == {"index": second["index"], "name": second["name"]}
    for block, row in zip(formed["blocks"], expected, strict=True):
        assert block["probability"] == {
            str(k): pytest.approx(row[k].item(), abs=1e-4) for k in (best["index"], second["index"])
        }
        leader = row.argmax().item()
        assert block["leader"]["index"] == leader and block["leader"]["name"] == loaded.class_names[leader]
        assert block["leader"]["probability"] == pytest.approx(row.max().item(), abs=1e-4)
    last = formed["blocks"][-1]
    assert last["probability"][str(best["index"])] == pytest.approx(best["probability"], abs=1e-4)
    assert last["leader"] == {**{name: best[name] for name in ("index", "name")}, "probability": pytest.approx(
        best["probability"], abs=1e-4)}  # fmt: skip
    shares = [block["share"][str(best["index"])] for block in formed["blocks"]]
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(shares, maps["block_maps"].sum((1, 2)) / maps["accumulated"][-1].sum(), atol=1e-5)
    leads = [block["leader"]["index"] == best["index"] for block in formed["blocks"]]
    assert all(leads[formed["leads_from"] - 1 :]) and not leads[formed["leads_from"] - 2]
    assert formed["reading"].startswith("Logit lens: ")
    with Image.open(folder / "evolution.png") as picture:
        assert picture.width >= 1500 and picture.height >= 600 and len(picture.getcolors(1 << 24)) > 1000


# ----------------------------------------------------------------------------------------------------------------------
# The relevance flow
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    """Checkpoints of small classifiers of three classes: of the class token, and of the mean of the patches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    for pool in ("token", "avg"):
        arguments = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "global_pool": pool}
        state = timm.create_model(TINY, num_classes=3, **arguments).state_dict()
        metadata = {"architecture": TINY, "model_args": json.dumps(arguments | {"num_classes": 3})}
        metadata["class_names"] = json.dumps(["cat", "dog", "cup"])
        safetensors.torch.save_file(state, folder / f"{pool}.safetensors", metadata)
    return folder


@pytest.fixture(scope="module")
def two_photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("coffee.png", "flower.jpg"):
        read_image(ROOT / ".img" / name).resize((90, 60)).save(folder / f"{Path(name).stem}.png")
    return folder


def test_relevance_of_a_folder(offline, tiny_weights, two_photos, tmp_path):
    weights = tiny_weights / "token.safetensors"
    options = ("--checkpoint", weights, "--variant", "relevance", "--target", "dog", "cat", "--output-dir", tmp_path)
    result = run(SCRIPT, "--image", two_photos, *options, env=offline, cwd=tmp_path)
    assert result.returncode == 0 and "error" not in result.stderr, result.stderr
    loaded = load(None, weights)
    for name in ("coffee", "flower"):
        folder = tmp_path / "token" / f"{name}-dog-cat-relevance"
        image = loaded.transform(read_image(two_photos / f"{name}.png")).unsqueeze(0)
        expected = attention_flow(loaded.model, image, [[1, 0]], variant="relevance")
        maps, flow = np.load(folder / "maps.npz"), json.loads((folder / "flow.json").read_text())
        assert (maps["block_maps"] < 0).any()
        for key in ("block_maps", "accumulated"):
            wanted = getattr(expected, key)[0].numpy()
            np.testing.assert_allclose(maps[key], wanted, atol=1e-4 * np.abs(wanted).max())
        assert flow["method"].endswith(" Map, variant relevance, log-odds of the class")
        assert flow["settings"]["variant"] == "relevance" and flow["settings"]["score"] == "log_odds"
        assert list(flow["class_share"]) == ["1", "0"]
        for k, index in enumerate(("1", "0")):
            assert flow["class_share"][index] == pytest.approx(expected.class_share[0, k].tolist(), abs=1e-4)
            amounts = np.abs(maps["block_maps"][k]).sum((1, 2))
            shares = [block["share"][index] for block in flow["evolution"]["blocks"]]
            assert shares == pytest.approx((amounts / amounts.sum()).tolist(), abs=1e-5)
        assert flow["evolution"]["reading"].endswith(results.SIGNED)
        assert {"flow.gif", "sheet.png", "evolution.png"} <= set(os.listdir(folder))


def test_every_variant_and_score_has_its_own_folder(explain, tiny_weights, two_photos, tmp_path):
    photo = two_photos / "coffee.png"
    options = ("--image", photo, "--checkpoint", tiny_weights / "token.safetensors", "--target", "cat")
    loaded = load(None, tiny_weights / "token.safetensors")
    image = loaded.transform(read_image(photo)).unsqueeze(0)
    made = {
        "coffee-cat": {},
        "coffee-cat-log_odds": {"score": "log_odds"},
        "coffee-cat-heads-log_odds": {"variant": "heads", "score": "log_odds"},
        "coffee-cat-relevance": {"variant": "relevance"},
        "coffee-cat-relevance-logit": {"variant": "relevance", "score": "logit"},
    }
    for settings in (*made.values(), {}, {"variant": "relevance", "score": "log_odds"}):
        more = [word for name, value in settings.items() for word in (f"--{name}", value)]
        assert explain(*options, *more, "--output-dir", tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path / "token")) == sorted(made)
    for name, settings in made.items():
        flow = attention_flow(loaded.model, image, 0, **settings)
        said = json.loads((tmp_path / "token" / name / "flow.json").read_text())
        assert said["settings"]["score"] == flow.score
        assert ("class_share" in said) == (flow.class_share is not None) == ("relevance" in name)
        wanted = flow.accumulated[0].numpy()
        saved = np.load(tmp_path / "token" / name / "maps.npz")["accumulated"]
        np.testing.assert_allclose(saved, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("more", [(), ("--memory", "low"), ("--dtype", "bfloat16"), ("--size", "model")])
def test_relevance_of_the_mean_of_the_patches(more, explain, tiny_weights, two_photos, tmp_path):
    options = ("--image", two_photos / "coffee.png", "--checkpoint", tiny_weights / "avg.safetensors", "--rows")
    result = explain(*options, "patches", "--variant", "relevance", *more, "--output-dir", tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (file,) = tmp_path.rglob("flow.json")
    assert file.parent.name.endswith("-patches-relevance")
    flow, maps = json.loads(file.read_text()), np.load(file.with_name("maps.npz"))
    assert "class_share" not in flow and (maps["block_maps"] < 0).any()
    assert (maps["accumulated"] < 0).any() and results.SIGNED in flow["evolution"]["reading"]


def test_a_model_that_relevance_cannot_pass(explain, two_photos, tmp_path):
    name = "crossvit_tiny_240"
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / "mine.pth")
    options = ("--model", name, "--checkpoint", tmp_path / "mine.pth", "--image", two_photos)
    result = explain(*options, "--variant", "relevance", "--output-dir", tmp_path / "out")
    one_line_error(result, "variant: 'relevance' needs the tokens that enter a block", "use another variant")
    assert not (tmp_path / "out").exists()


def test_relevance_of_a_model_without_readings(explain, two_photos, tmp_path):
    torch.save(timm.create_model("pit_ti_224", num_classes=3).state_dict(), tmp_path / "mine.pth")
    options = ("--model", "pit_ti_224", "--checkpoint", tmp_path / "mine.pth", "--image", two_photos / "coffee.png")
    result = explain(*options, "--variant", "relevance", "--target", 0, 1, "--output-dir", tmp_path / "out")
    assert result.returncode == 0 and "no evolution.png" in result.stdout, result.stderr
    flow = json.loads(next(tmp_path.rglob("flow.json")).read_text())
    assert flow["evolution"] is None and [len(held) for held in flow["class_share"].values()] == [flow["blocks"]] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Several classes
# ----------------------------------------------------------------------------------------------------------------------


def test_several_classes_side_by_side(explain, tmp_path):
    result = explain("--model", EMBEDDED, "--target", "ewer", "cup", "--size", 96, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "  explained: 39 ewer, 30 cup (class token, 12 blocks) -> " in result.stdout
    folder = tmp_path / EMBEDDED / "coffee-ewer-cup"
    loaded, photo = load(EMBEDDED), read_image(ROOT / ".img" / "coffee.png")
    expected = attention_flow(loaded.model, loaded.transform(photo).unsqueeze(0), [[39, 30]])
    maps = np.load(folder / "maps.npz")
    assert maps["output"].shape == (101,)
    for name in ("block_maps", "accumulated"):
        wanted = getattr(expected, name)[0].numpy()
        assert maps[name].shape == (2, 12, 16, 16)
        np.testing.assert_allclose(maps[name], wanted, atol=1e-4 * wanted.max())

    photo = photo.resize((96, 64), Image.Resampling.BICUBIC)
    panels = [overlay(photo, render(a), block_labels(12)) for a in maps["accumulated"]]
    for b, frame in enumerate(side_by_side(panels, ["ewer", "cup"]), 1):
        saved = np.asarray(Image.open(folder / "frames" / f"block_{b:02d}.png"), float)
        assert saved.shape == np.asarray(frame).shape and np.abs(saved - np.asarray(frame)).max() < 32
    with Image.open(folder / "flow.gif") as gif:
        assert gif.n_frames == 12 and gif.size == frame.size

    flow = json.loads((folder / "flow.json").read_text())
    assert "target" not in flow and flow["grid"] == [16, 16]
    assert [(c["index"], c["name"], c["requested"]) for c in flow["targets"]] == [
        (39, "ewer", "ewer"),
        (30, "cup", "cup"),
    ]
    formed = flow["evolution"]
    assert (
        formed["leads_from"] > 1 and formed["runner_up"]["name"] == "yin_yang"
    )  # the cup, the second of the two classes, leads
    assert formed["blocks"][-1]["leader"]["index"] == 30
    for k, name in enumerate(("39", "30")):
        assert sum(block["share"][name] for block in formed["blocks"]) == pytest.approx(1)
        assert formed["blocks"][-1]["share"][name] == pytest.approx(
            maps["block_maps"][k, -1].sum() / maps["accumulated"][k, -1].sum(), rel=1e-4
        )
        assert formed["blocks"][-1]["probability"][name] == pytest.approx(flow["targets"][k]["probability"], abs=1e-4)
    with Image.open(folder / "evolution.png") as picture:
        assert picture.height > 780  # two rows of maps
    scores = torch.from_numpy(maps["output"])
    assert [c["score"] for c in flow["targets"]] == pytest.approx(scores[[39, 30]].tolist())
    assert [c["probability"] for c in flow["targets"]] == pytest.approx(scores.softmax(0)[[39, 30]].tolist())


def test_the_most_probable_classes_of_every_photo(explain, tmp_path):
    photos = [ROOT / ".img" / name for name in ("coffee.png", "flower.jpg")]
    options = ("--model", EMBEDDED, "--size", 64, "--output-dir", tmp_path)
    result = explain("--image", *photos, "--target", "top3", *options)
    assert result.returncode == 0, result.stderr
    explained = []
    for photo in photos:
        flow = json.loads(next((tmp_path / EMBEDDED).glob(f"{photo.stem}-*/flow.json")).read_text())
        assert flow["targets"] == [c | {"requested": "top3"} for c in flow["top5"][:3]]
        explained.append([c["name"] for c in flow["targets"]])
        folder = tmp_path / EMBEDDED / "-".join([photo.stem, *explained[-1]])
        assert np.load(folder / "maps.npz")["block_maps"].shape == (3, 12, 16, 16)
    assert explained[0] != explained[1]


def test_names_of_classes_that_are_alike_or_long(weights, tmp_path):
    """Equal names are told apart, and the folder of several classes does not become too long for a file system."""
    state = safetensors.torch.load_file(weights)
    names = ["crane, bird", "crane, machine", "w" * 200]
    metadata = {"architecture": TINY, "class_names": json.dumps(names)}
    safetensors.torch.save_file(state, tmp_path / "mine.safetensors", metadata)
    options = [
        "--checkpoint",
        str(tmp_path / "mine.safetensors"),
        "--size",
        "64",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert script.main([*options, "--target", "0", "1"]) == 0
    assert (tmp_path / "out" / "mine" / "coffee-crane_0-crane_1" / "flow.gif").is_file()
    assert script.main([*options, "--target", "0"]) == script.main([*options, "--target", "1"]) == 0
    for index in (0, 1):  # the second does not overwrite the first
        folder = tmp_path / "out" / "mine" / f"coffee-crane_{index}"
        assert json.loads((folder / "flow.json").read_text())["target"]["index"] == index
        shutil.rmtree(folder)
    assert script.main([*options, "--target", "2", "1"]) == script.main([*options, "--target", "1", "2"]) == 0
    assert sorted(len(p.name) for p in (tmp_path / "out" / "mine").iterdir())[1:] == [96, 96]


@pytest.fixture
def named(weights, tmp_path):
    """Return a checkpoint whose three classes have these names."""

    def save(*names):
        metadata = {"architecture": TINY, "class_names": json.dumps(names)}
        safetensors.torch.save_file(safetensors.torch.load_file(weights), tmp_path / "mine.safetensors", metadata)
        return "--checkpoint", tmp_path / "mine.safetensors", "--size", 32, "--output-dir", tmp_path / "out"

    return save


@pytest.mark.parametrize(("target", "index"), [("1", 0), ("10", 1), ("2", 2), ("0", 0)])
def test_names_that_are_numbers(target, index, named, explain, tmp_path):
    result = explain(*named("1", "10", "2"), "--target", target)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(next(tmp_path.rglob("flow.json")).read_text())
    assert manifest["target"]["index"] == index and manifest["target"]["requested"] == target


def test_a_number_with_two_readings(named, explain, tmp_path):
    result = explain(*named("one, 1", "two", "three"), "--target", 1)
    one_line_error(result, "target: '1' is a name of class 0 ('one, 1') and the index of class 1 ('two')")
    assert not (tmp_path / "out").exists()


def test_another_photo_of_the_same_name_does_not_replace_the_first(named, explain, tmp_path):
    options, photos = named("cat", "dog", "cup"), []
    for n, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        photos.append(tmp_path / folder / "photo.png")
        Image.effect_noise((40, 30), 30 + n).save(photos[-1])
    for photo, name in [*zip(photos, ("photo-dog", "photo-dog-2"))] * 2:
        result = explain("--image", photo, "--target", "dog", *options)
        folder = tmp_path / "out" / "mine" / name
        assert result.returncode == 0 and result.stdout.endswith(f" -> {folder / 'flow.gif'}\n"), result.stderr
        assert json.loads((folder / "flow.json").read_text())["image"]["file"] == str(photo)
    assert sorted(p.name for p in (tmp_path / "out" / "mine").iterdir()) == ["photo-dog", "photo-dog-2"]
    assert explain("--image", *photos, "--target", "dog", *options).returncode == 0
    assert (tmp_path / "out" / "mine" / "photo.png-dog" / "flow.gif").is_file()


def test_long_and_dangerous_names(named, explain, tmp_path):
    photo, name = tmp_path / ("p" * 248 + ".png"), "虎斑猫" * 133 + "\x1b[2J"
    Image.effect_noise((40, 30), 30).save(photo)
    result = explain("--image", photo, "--target", 1, *named("cat", name, "\u202e"))
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "虎斑猫\\x1b[2J" in result.stdout and "\x1b" not in result.stdout and "\u202e" not in result.stdout
    file = next(tmp_path.rglob("flow.json"))
    assert (
        json.loads(file.read_text())["target"]["name"].startswith("虎斑猫" * 133)
        and len(os.fsencode(file.parent.name)) < 240
    )


def test_names_without_a_font_are_drawn_as_indices(named, explain, monkeypatch):
    drawn = []

    def save_flow(folder, image, flow, index, caption, manifest, duration, pictures, titles):
        drawn.extend([caption, titles])

    def curves(frames, curves, shares, leaders, *rest):
        drawn.extend([[name for name, _ in curves], leaders])
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(results, "save_flow", lambda *args: [save_flow(*args), args[7]["evolution.png"]()])
    monkeypatch.setattr(results, "evolution_picture", curves)
    names = ["\ue000", "dog", "\ue001 x"]  # private characters, which no font has
    result = explain("--target", *names, *named(*names))
    assert result.returncode == 0 and "  \ue000\n" in result.stdout, result.stderr
    caption, titles, curve_names, leaders = drawn
    assert titles == curve_names == ["class 0", "dog", "class 2"] and set(leaders) <= set(titles)
    assert caption.startswith("class 0:") and "\nclass 2:" in caption
