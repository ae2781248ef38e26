"""`python -m evaluation` from end to end, as a subprocess, without network."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_script import ROOT, offline, one_line_error  # noqa: F401

from evaluation.methods import METHODS


def command(*options):
    return [sys.executable, "-m", "evaluation", *map(str, options)]


def run(*options, env):
    return subprocess.run(command(*options), cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos, one in a sub-folder and one with a mask; a file that is no image."""
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
    """A folder without the masks."""
    folder = tmp_path_factory.mktemp("some")
    shutil.copytree(photos, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("masks"))
    return folder


QUICK = ("--steps", 2, "--sanity", 1, "--blocks", 1, "--baselines", "mean")


@pytest.fixture(scope="module")
def evaluated(some, photos, offline, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("out") / "run"
    methods = ("--methods", "daam", "attention", "centre")
    result = run("--images", some, "--annotations", photos / "masks", *QUICK, *methods, "--out", out, env=offline)
    assert result.returncode == 0, result.stderr
    return out, result


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_written(evaluated):
    out, result = evaluated
    assert "left out: image:" in result.stderr and "broken.jpg" in result.stderr
    found = lines(out / "photos.jsonl")
    assert sorted(record["photo"] for record in found) == ["cup/coffee.png", "flower.jpg", "motorcycle_left.png"]
    for record in found:
        assert list(record["scores"]) == ["daam", "attention", "centre"]
        curves, scores = record["curves"]["daam"], record["scores"]["daam"]
        assert set(curves) == {"deletion_mean", "insertion_mean"} and len(curves["deletion_mean"]) == 3
        assert curves["deletion_mean"][0] == pytest.approx(record["probability"], abs=1e-4)
        assert curves["insertion_mean"][-1] == pytest.approx(record["probability"], abs=1e-4)
        first, middle, last = curves["deletion_mean"]
        assert scores["deletion_mean"] == pytest.approx((first + last) / 4 + middle / 2, abs=1e-4)
        assert ("energy" in scores) == ("iou" in scores) == (record["photo"] == "cup/coffee.png")
    blocks = [record["blocks"] for record in found if "blocks" in record]
    assert len(blocks) == 1 and len(blocks[0]) == 12
    first = next(record for record in found if "blocks" in record)
    assert first["blocks"][-1] == first["scores"]["daam"]  # A_12 is the explanation
    sanity = lines(out / "sanity.jsonl")
    assert len(sanity) == 1 and len(sanity[0]["methods"]["daam"]["randomised"]) == 13
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.strip() in result.stdout and "attention" in table
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    mean = np.mean([record["scores"]["daam"]["deletion_mean"] for record in found])
    row = next(r for r in rows if (r["method"], r["metric"]) == ("daam", "deletion_mean"))
    assert float(row["mean"]) == pytest.approx(mean, abs=1e-4) and row["n"] == "3"
    for name in ("curves.png", "blocks.png", "sanity.png", "sheet.png"):
        assert min(Image.open(out / name).size) > 200
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_same_command_again_computes_nothing_new(evaluated, some, photos, offline):  # noqa: F811
    out, _ = evaluated
    before = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    table = (out / "table.md").read_bytes()
    methods = ("--methods", "daam", "attention", "centre")
    result = run("--images", some, "--annotations", photos / "masks", *QUICK, *methods, "--out", out, env=offline)
    assert result.returncode == 0, result.stderr
    assert before == {p.name: p.read_bytes() for p in out.glob("*.jsonl")} and (out / "table.md").read_bytes() == table


def test_other_settings_need_another_folder(evaluated, some, offline):  # noqa: F811
    result = run("--images", some, "--methods", "daam", "--out", evaluated[0], env=offline)
    one_line_error(result, f"error: out: {evaluated[0]} holds a run with another methods; give another folder")


def test_a_killed_run_goes_on(some, offline, tmp_path):  # noqa: F811
    """Killed after its first photo, with half a line: the records are those of a run that was not."""
    options = ("--images", some, "--methods", "daam", "random", *QUICK, "--sanity", 0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*options, "--out", whole, env=offline).returncode == 0
    file = killed / "photos.jsonl"
    process = subprocess.Popen(command(*options, "--out", killed), cwd=ROOT, env=offline, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while not (file.is_file() and file.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes().count(b"\n")
    assert done >= 1
    with open(file, "ab") as cut:
        cut.write(b'{"photo": "flower.jpg", "sco')
    result = run(*options, "--out", killed, env=offline)
    assert result.returncode == 0, result.stderr
    key = lambda record: record["photo"]  # noqa: E731
    for first, second in zip(sorted(lines(whole / "photos.jsonl"), key=key), sorted(lines(file), key=key), strict=True):
        assert first["photo"] == second["photo"]
        for method, scores in first["scores"].items():
            assert scores == pytest.approx(second["scores"][method], abs=1e-4)


def test_self_supervised(some, offline, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    (tmp_path / "list.txt").write_text("flower.jpg\n")
    result = run("--model", "vit_small_patch14_selfsupervised", "--images", some, "--list", tmp_path / "list.txt",
                 "--methods", "all", *QUICK, "--sanity", 0, "--out", out, env=offline)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = lines(out / "photos.jsonl")
    assert record["name"] == "sunflower" and 0 < record["probability"] <= 1
    assert {"daam", "daam-relu", "gae", "legrad", "gradcam", "integrated-gradients"} <= set(record["scores"])
    assert "daam-signed" not in record["scores"]  # is the paper's own here
    assert json.loads((out / "run.json").read_text())["bank"].endswith("embedded")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "nowhere"], "images: there is no folder nowhere"),
        (["--images", "tests"], "images: the folder tests has no images"),
        (["--methods", "saliency"], f"methods: 'saliency' is none of them: all, {', '.join(METHODS)}"),
        (["--model", "no_such_model"], "model: "),
        (["--bank", "memorybank/embedded"], "bank: vit_small_patch14_caltech101 has a classifier, whose scores are "),
        (["--list", "README.md"], "list: "),
        (["--device", "tpu"], "device: 'tpu' cannot be used"),
    ],
)
def test_what_cannot_be_done(options, message, offline, tmp_path):  # noqa: F811
    given = ["--images", ROOT / ".img", "--out", tmp_path / "out", *options]
    one_line_error(run(*given, env=offline), f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_help(offline):  # noqa: F811
    result = run("--help", env=offline)
    assert result.returncode == 0 and "--methods" in result.stdout and "goes on when the same command" in result.stdout
