"""`python -m evaluation` from end to end, without network: as a subprocess, and in this process."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scripts import ROOT, call, one_line_error
from tiny_banks import BACKBONE, rows, write_backbone, write_bank
from tiny_models import tiny_timm

from evaluation.command import find_photos, main
from evaluation.methods import METHODS


def command(*options):
    return [sys.executable, "-m", "evaluation", *map(str, options)]


def run(*options, env):
    """Run the command as a user does."""
    return subprocess.run(command(*options), cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture
def evaluate(capfd, monkeypatch):
    """Call the command in this process, with these options."""
    monkeypatch.chdir(ROOT)
    return partial(call, main, capfd)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos, one in a sub-folder and one with a mask; files that are not images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "cup").mkdir()
    shutil.copy(ROOT / ".img" / "coffee.png", folder / "cup" / "coffee.png")
    shutil.copy(ROOT / ".img" / "flower.jpg", folder)
    shutil.copy(ROOT / ".img" / "motorcycle_left.png", folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "masks" / "cup").mkdir(parents=True)
    size = Image.open(folder / "cup" / "coffee.png").size
    mask = np.zeros(size[::-1], np.uint8)
    mask[: size[1] // 2] = 255
    Image.fromarray(mask).save(folder / "masks" / "cup" / "coffee.png")
    return folder


@pytest.fixture(scope="module")
def some(photos, tmp_path_factory):
    """The same photos without the masks."""
    folder = tmp_path_factory.mktemp("some")
    shutil.copytree(photos, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("masks"))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small classifier with random weights, 3 blocks and 4 x 4 patches."""
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    arguments = {"img_size": 64, "depth": 3, "num_classes": 5}
    model = tiny_timm("vit_tiny_patch16_224", **arguments)
    metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(arguments)}
    safetensors.torch.save_file(model.state_dict(), file, metadata)
    return file


QUICK = ("--steps", 2, "--sanity", 1, "--blocks", 1, "--baselines", "mean")


@pytest.fixture(scope="module")
def evaluated(some, photos, weights, offline, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    methods = ("--methods", "daam", "attention", "random")
    options = ("--checkpoint", weights, "--images", some, "--annotations", photos / "masks", *QUICK, *methods)
    result = run(*options, "--out", out, env=offline)
    assert result.returncode == 0, result.stderr
    return out, result, options


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_written(evaluated):
    out, result, _ = evaluated
    assert "skipped: image:" in result.stderr and "broken.jpg" in result.stderr
    found = lines(out / "photos.jsonl")
    assert sorted(record["photo"] for record in found) == ["cup/coffee.png", "flower.jpg", "motorcycle_left.png"]
    for record in found:
        assert list(record["scores"]) == ["daam", "attention", "random"]
        curves, scores = record["curves"]["daam"], record["scores"]["daam"]
        assert set(curves) == {"deletion_mean", "insertion_mean"} and len(curves["deletion_mean"]) == 3
        assert curves["deletion_mean"][0] == pytest.approx(record["probability"], abs=1e-4)
        assert curves["insertion_mean"][-1] == pytest.approx(record["probability"], abs=1e-4)
        first, middle, last = curves["deletion_mean"]
        assert scores["deletion_mean"] == pytest.approx((first + last) / 4 + middle / 2, abs=1e-4)
        assert ("energy" in scores) == ("iou" in scores) == (record["photo"] == "cup/coffee.png")
    blocks = [record["blocks"] for record in found if "blocks" in record]
    assert len(blocks) == 1 and len(blocks[0]) == 3
    first = next(record for record in found if "blocks" in record)
    assert first["blocks"][-1] == first["scores"]["daam"]  # A_3 is the explanation
    sanity = lines(out / "sanity.jsonl")
    assert len(sanity) == 1 and len(sanity[0]["methods"]["daam"]["randomised"]) == 5
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.strip() in result.stdout and "attention" in table
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    mean = np.mean([record["scores"]["daam"]["deletion_mean"] for record in found])
    row = next(r for r in rows if (r["method"], r["metric"]) == ("daam", "deletion_mean"))
    assert float(row["mean"]) == pytest.approx(mean, abs=1e-4) and row["n"] == "3"
    for name in ("curves.png", "blocks.png", "sanity.png", "sheet.png"):
        assert min(Image.open(out / name).size) > 200
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_same_command_again_computes_nothing_new(evaluated, evaluate):
    out, _, options = evaluated
    before = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    table = (out / "table.md").read_bytes()
    result = evaluate(*options, "--out", out)
    assert result.returncode == 0, result.stderr
    assert before == {p.name: p.read_bytes() for p in out.glob("*.jsonl")} and (out / "table.md").read_bytes() == table


def test_dtype_is_that_of_the_curves_alone(evaluated, evaluate, tmp_path):
    found, printed = {}, {}
    for dtype in ("float32", "bfloat16"):
        options = (*evaluated[2], "--sanity", 0, "--limit", 1, "--dtype", dtype)
        result = evaluate(*options, "--out", tmp_path / dtype)
        assert result.returncode == 0, result.stderr
        (found[dtype],), printed[dtype] = lines(tmp_path / dtype / "photos.jsonl"), result.stdout
    rounded, exact = found["bfloat16"], found["float32"]
    assert rounded["probability"] == exact["probability"]
    for method, scores in rounded["scores"].items():
        curves = rounded["curves"][method]
        assert curves != exact["curves"][method]
        for metric, score in scores.items():
            rounding = 0.01 if metric in curves else 0  # 8 bits of mantissa
            assert abs(score - exact["scores"][method][metric]) <= rounding
    assert "bfloat16" in printed["bfloat16"] and "bfloat16" not in printed["float32"]


@pytest.mark.parametrize(
    "other, name",
    [
        (("--methods", "daam"), "methods"),
        (("--steps", 3), "steps"),
        (("--annotations", ".img"), "annotations"),
        (("--blocks", 3), "blocks"),
        (("--dtype", "bfloat16"), "dtype"),
    ],
)
def test_other_settings_need_another_folder(other, name, evaluated, evaluate):
    out, _, options = evaluated
    result = evaluate(*options, *other, "--out", out)
    one_line_error(result, f"error: out: {out} holds a run with another {name}; choose another folder")


def test_nothing_can_be_scored(weights, evaluate, tmp_path):
    """The error says why, not that the run should continue."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    options = ("--checkpoint", weights, "--images", tmp_path / "photos", *QUICK, "--out", tmp_path / "out")
    one_line_error(evaluate(*options), "error: images: none of the 1 photos could be scored; ", "broken.jpg")


def test_a_damaged_run(evaluated, evaluate, tmp_path):
    (tmp_path / "run.json").write_text("[]")
    result = evaluate(*evaluated[2], "--out", tmp_path)
    one_line_error(result, "run.json is damaged; run the evaluation again in another folder")


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


def test_a_model_that_a_method_cannot_follow(some, evaluate, tmp_path):
    """One line, not one per photo."""
    arguments = {"img_size": 64, "depth": 2, "num_classes": 5}
    weights = tiny_timm("cait_xxs24_224", **arguments).state_dict()
    metadata = {"architecture": "cait_xxs24_224", "model_args": json.dumps(arguments)}
    safetensors.torch.save_file(weights, tmp_path / "cait.safetensors", metadata)
    options = ("--checkpoint", tmp_path / "cait.safetensors", "--images", some, "--out", tmp_path / "out", *QUICK)
    one_line_error(evaluate(*options), "error: methods: the attention of Cait is not between all 17 tokens")
    options = (*options[: -len(QUICK) - 1], tmp_path / "other", *QUICK)
    result = evaluate(*options, "--methods", "daam-heads", "centre")
    assert result.returncode == 0, result.stderr
    assert len(lines(tmp_path / "other" / "sanity.jsonl")) == 1


def test_a_killed_run_continues(evaluated, offline, tmp_path):
    """Killed after its first photo, with half a line: the records are those of a run that was not."""
    whole, _, options = evaluated
    killed = tmp_path / "killed"
    file = killed / "photos.jsonl"
    process = subprocess.Popen(command(*options, "--out", killed), cwd=ROOT, env=offline, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while not (file.is_file() and file.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes().count(b"\n")
    assert 1 <= done < 3
    with open(file, "ab") as cut:
        cut.write(b'{"photo": "flower.jpg", "sco')
    result = run(*options, "--out", killed, env=offline)
    assert result.returncode == 0, result.stderr
    for name in ("photos.jsonl", "sanity.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_all_methods_with_a_memory_bank(some, evaluate, tmp_path):
    backbone = write_backbone(tmp_path / "small.safetensors")
    bank = write_bank(tmp_path / "bank", rows(60, BACKBONE["embed_dim"]), torch.arange(60) % 4)
    result = evaluate("--checkpoint", backbone, "--bank", bank, "--images", some, "--limit", 2, *QUICK,
                      "--methods", "all", "candidates", "--sanity", 0, "--out", tmp_path / "out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    for record in lines(tmp_path / "out" / "photos.jsonl"):
        assert set(record["scores"]) == set(METHODS) - {"daam-signed"}  # the same as daam without a classifier
        assert re.fullmatch("class [0-3]", record["name"]) and 0 < record["probability"] <= 1


def test_embedded_self_supervised_model(some, evaluate, tmp_path):
    (tmp_path / "list.txt").write_text("flower.jpg\n")
    result = evaluate("--model", "vit_small_patch14_selfsupervised", "--images", some, "--list", tmp_path / "list.txt",
                      "--methods", "daam", *QUICK, "--blocks", 0, "--sanity", 0, "--out", tmp_path / "out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = lines(tmp_path / "out" / "photos.jsonl")
    assert record["name"] == "sunflower" and 0 < record["probability"] <= 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["bank"].endswith("embedded")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "nowhere"], "images: there is no folder nowhere; check the path"),
        (["--images", "tests"], "images: the folder tests has no images"),
        (
            ["--methods", "saliency"],
            f"methods: 'saliency' is unknown; choose from all, candidates, {', '.join(METHODS)}",
        ),
        (["--model", "no_such_model"], "model: "),
        (["--bank", "memorybank/embedded"], "bank: vit_small_patch14_caltech101 has a classifier, whose scores are "),
        (["--list", "README.md"], "of its photos are not in"),
        (["--list", "no.txt"], "list: there is no file no.txt; check the path"),
        (["--annotations", "no"], "annotations: there is no folder no; check the path"),
        (["--limit", "0"], "argument --limit: expected 1 to "),
        (["--device", "tpu"], "device: 'tpu' cannot be used"),
    ],
)
def test_refusals(options, message, evaluate, tmp_path):
    given = ["--images", ROOT / ".img", "--out", tmp_path / "out", *options]
    one_line_error(evaluate(*given), "error: ", message)
    assert not (tmp_path / "out").exists()


def test_help(evaluate):
    result = evaluate("--help")
    assert result.returncode == 0 and "--methods" in result.stdout and "repeat the same command" in result.stdout


def test_without_the_extra(offline, tmp_path):
    """As if captum were not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['captum'] = None")
    result = run("--help", env=offline | {"PYTHONPATH": str(tmp_path)})
    one_line_error(result, "error: captum is not installed; pip install -e '.[evaluation]'")
