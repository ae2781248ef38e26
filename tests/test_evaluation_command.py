"""`python -m evaluation` from end to end, without network: as a subprocess, and in this process."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from textwrap import indent

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scripts import ROOT, call, no_leftovers, one_line_error, torchrun
from tiny_banks import BACKBONE, rows, write_backbone, write_bank
from tiny_models import tiny_timm
from tiny_pictures import tree

from daam_vit.locks import hold
from evaluation.command import main
from evaluation.methods import METHODS
from evaluation.records import check_ranks


def command(*options):
    return [sys.executable, "-m", "evaluation", *map(str, options)]


def run(*options, env, **more):
    """Run the command as a user does."""
    return subprocess.run(command(*options), cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **more)


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


def test_the_reference_is_what_others_are_compared_with(some, weights, evaluate, tmp_path):
    options = ("--methods", "attention", "--reference", "centre", "--steps", 2, "--sanity", 0, "--mosaics", 0)
    result = evaluate("--checkpoint", weights, "--images", some, *options, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["methods"] == ["centre", "daam", "attention"]
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    compared = {row["method"]: row["difference"] != "" for row in rows if row["metric"] == "deletion_mean"}
    assert compared == {"centre": False, "daam": True, "attention": True}
    assert "better than centre" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


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
    assert no_leftovers(out) and not (out / ".holder").exists()


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
            rounding = 0.01 if metric in (*curves, "average_drop", "increase") else 0  # 8 bits of mantissa
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


def certain_model(file, side):
    """Write a classifier that is certain of the class of most photos of one colour."""
    arguments = {"img_size": side, "depth": 2, "num_classes": 40}
    model = tiny_timm("vit_tiny_patch16_224", **arguments)
    torch.nn.init.normal_(model.head.weight, std=3, generator=torch.Generator().manual_seed(2))
    metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(arguments)}
    safetensors.torch.save_file(model.state_dict(), file, metadata)
    return file


@pytest.fixture(scope="module")
def colourful(tmp_path_factory):
    """Options for photos of plain colours, one of them broken."""
    folder = tmp_path_factory.mktemp("colourful")
    for i in range(30):
        colour = tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())
        Image.new("RGB", (40, 30), colour).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    file = certain_model(tmp_path_factory.mktemp("certain") / "certain.safetensors", 64)
    return "--checkpoint", file, "--images", folder, *QUICK, "--sanity", 0, "--methods", "daam-relevance", "centre"


def test_mosaics(colourful, evaluate, tmp_path):
    """More mosaics are added to those of before; other methods play with the same photos."""
    out = tmp_path / "out"
    result = evaluate(*colourful, "--mosaics", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("skipped:") == 1  # broken.png, once
    (first,) = lines(out / "mosaics.jsonl")
    result = evaluate(*colourful, "--mosaics", 2, "--out", out)
    found = lines(out / "mosaics.jsonl")
    assert len(found) == 2 and found[0] == first and "**Grid pointing game**" in result.stdout
    assert len({name for record in found for name in record["photos"]}) == 8
    by_photo = {record["photo"]: record for record in lines(out / "photos.jsonl")}
    for record in found:
        assert record["photo"] == record["photos"][0] and len(set(record["classes"])) == 4
        assert record["classes"] == [by_photo[name]["name"] for name in record["photos"]]
        assert all(by_photo[name]["probability"] >= 0.8 for name in record["photos"])
        assert (
            list(record["shares"]) == ["daam", "daam-relevance", "centre"] and record["shares"]["centre"] == [0.25] * 4
        )
    before = tree(out)
    assert evaluate(*colourful, "--mosaics", 2, "--out", out).returncode == 0 and tree(out) == before
    other = evaluate(*colourful, "random", "--mosaics", 2, "--limit", 25, "--steps", 3, "--out", tmp_path / "other")
    assert other.returncode == 0, other.stderr
    assert [r["photos"] for r in lines(tmp_path / "other" / "mosaics.jsonl")] == [r["photos"] for r in found]


def test_too_few_photos_for_mosaics(evaluated):
    """It is said, and there is no table of them."""
    out, result, _ = evaluated
    assert "mosaics: 0 instead of 20; each needs photos of four classes, predicted with at least 80%" in result.stderr
    assert "pointing" not in result.stdout and not (out / "mosaics.jsonl").exists()


def test_a_grid_without_quarters(colourful, evaluate, tmp_path):
    """The photos are reported all the same."""
    file = certain_model(tmp_path / "odd.safetensors", 80)
    result = evaluate(*colourful, "--checkpoint", file, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    message = "skipped: mosaics: a patch grid of 5 x 5 cannot be divided into quarters; pass --mosaics 0"
    assert result.stderr.count(message) == 1
    assert "| daam" in result.stdout and "pointing" not in result.stdout


def test_nothing_can_be_scored(weights, evaluate, tmp_path):
    """The error says why, not that the run should continue."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    options = ("--checkpoint", weights, "--images", tmp_path / "photos", *QUICK, "--out", tmp_path / "out")
    one_line_error(evaluate(*options), "error: images: none of the 1 photos could be scored; ", "broken.jpg")


def test_a_damaged_run(evaluated, evaluate, tmp_path):
    (tmp_path / "run.json").write_text("[]")
    result = evaluate(*evaluated[2], "--out", tmp_path)
    one_line_error(result, "run.json: it should be an object, got []; run the evaluation again in another folder")
    assert (tmp_path / "run.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sanity.jsonl", '{"photo": "flower.jpg"}\n', "records: line 2 of {}/sanity.jsonl has no 'methods'; delete"),
        (
            "photos.jsonl",
            '{"photo": "a", "name": "b", "scores": {}}\n',
            "has a, which is not a photo of this run; delete",
        ),
    ],
)
def test_damaged_records_are_found_first(file, text, message, evaluated, evaluate, tmp_path):
    """Before hours of work, not after."""
    out = tmp_path / "run"
    shutil.copytree(evaluated[0], out)
    with open(out / file, "a") as records:
        records.write(text)
    before = tree(out)
    one_line_error(evaluate(*evaluated[2], "--out", out), message.format(out))
    assert tree(out) == before


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


KILLER = """
import os

call, number, count = getattr(os, "{name}"), {signal}, 0


def killed(*arguments):
    global count
    count += str(arguments[-1]).endswith("{last}")
    if count == {times}:
        os.kill(os.getpid(), number)
    return call(*arguments)


os.{name} = killed
"""
"""Module that ends the process by a signal, when a function of `os` is called."""


@pytest.mark.parametrize(
    ("number", "name", "last", "times"),
    [
        (signal.SIGKILL, "fsync", "", 1),  # the first record is written
        (signal.SIGTERM, "fsync", "", 2),
        (signal.SIGKILL, "replace", "curves.png", 1),  # its temporary file is written
        (signal.SIGTERM, "replace", "table.csv", 1),
    ],
)
def test_a_killed_run_continues(number, name, last, times, evaluated, evaluate, offline, tmp_path):
    """With half a line at the end: in the end every file is that of a run that was not killed."""
    whole, _, options = evaluated
    killed = tmp_path / "killed"
    text = KILLER.format(name=name, last=last, times=times, signal=int(number))
    (tmp_path / "sitecustomize.py").write_text(text)
    result = run(*options, "--out", killed, env=offline | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == (-9 if number == signal.SIGKILL else 128 + 15), result.stderr
    assert no_leftovers(killed) == (number == signal.SIGTERM or name == "fsync")
    assert len(lines(killed / "photos.jsonl")) == (times if name == "fsync" else 3)
    with open(killed / "photos.jsonl", "ab") as cut:
        cut.write(b'{"photo": "flower.jpg", "sco')
    result = evaluate(*options, "--out", killed)
    assert result.returncode == 0, result.stderr
    ours, theirs = tree(killed), tree(whole)
    ours.pop(".holder", None)  # of the process that was killed
    assert {k for k in ours if ours[k] != theirs.get(k)} == set() and ours.keys() == theirs.keys()


def test_ranks_share_the_photos(evaluated, evaluate, offline, tmp_path):
    """One rank dies when its first record is written; then two continue. Every file is that of one process."""
    whole, single, options = evaluated
    shared = tmp_path / "shared"
    killer = KILLER.format(name="fsync", last="", times=1, signal=int(signal.SIGKILL))
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\n\nif os.environ.get('RANK') == '1':\n{indent(killer, '    ')}"
    )
    command = ("-m", "evaluation", *options, "--out", shared)
    result = torchrun(*command, env=offline | {"PYTHONPATH": str(tmp_path)}, cwd=ROOT)
    assert result.returncode != 0 and not (shared / "table.md").exists(), result.stderr
    assert 1 <= len(lines(shared / "photos.jsonl")) <= 3
    result = torchrun(*command, env=offline, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("skipped: ") == 1 == single.stderr.count("skipped: ")  # it is also a photo for sanity
    assert result.stdout.replace(str(shared), str(whole)) == single.stdout
    ours, theirs = tree(shared), tree(whole)
    ours.pop(".holder", None)  # of the rank that was ended
    for name in ("photos.jsonl", "sanity.jsonl"):
        assert sorted(ours.pop(name).splitlines()) == sorted(theirs.pop(name).splitlines())
    assert {k for k in ours if ours[k] != theirs.get(k)} == set() and ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (("--steps", 3), "out: {} holds a run with another steps"),  # only the first rank sees this
        (("--methods", "no"), "methods: 'no' is unknown"),
    ],
)
def test_ranks_say_an_error_once(other, error, evaluated, offline):
    out, _, options = evaluated
    before = tree(out)
    result = torchrun("-m", "evaluation", *options, *other, "--out", out, env=offline, cwd=ROOT)
    assert result.stderr.count("error: ") == 1 and f"error: {error.format(out)}" in result.stderr, result.stderr
    assert result.returncode != 0 and tree(out) == before


def test_machines_with_other_files(tmp_path, monkeypatch):
    """What the first rank has is compared with what this one has."""
    settings = {"model": "small", "images": ["a.png", "b.png"]}
    monkeypatch.setattr("evaluation.records.current_rank", lambda: (1, 2))
    for theirs, error in (
        (
            settings | {"images": ["a.png"]},
            "images: rank 1 has another one than rank 0; all machines need the same files",
        ),
        (settings, f"out: rank 1 finds no run.json in {tmp_path}; all machines must share it"),
    ):
        monkeypatch.setattr("evaluation.records.gather", lambda value, theirs=theirs: [theirs, value])
        with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
            check_ranks(tmp_path, settings)
    (tmp_path / "run.json").touch()
    check_ranks(tmp_path, settings)


def test_a_folder_that_another_run_holds(evaluated, evaluate, tmp_path):
    whole, _, options = evaluated
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with hold(out, "out", "another evaluation"):
        before = tree(out)
        one_line_error(evaluate(*options, "--out", out), f"out: another evaluation is running in {out}, by process ")
        assert tree(out) == before
    assert evaluate(*options, "--out", out).returncode == 0


def test_a_disk_that_is_full(evaluated, evaluate, offline, tmp_path):
    """No file can have more bytes than the first record: one line, and the same command continues."""
    resource = pytest.importorskip("resource")
    whole, _, options = evaluated
    first = (whole / "photos.jsonl").read_bytes().split(b"\n")[0] + b"\n"
    limit = len(first) + 100
    assert limit > (whole / "run.json").stat().st_size
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    result = run(*options, "--out", tmp_path / "run", env=offline, preexec_fn=small)
    one_line_error(result, f"error: out: {tmp_path}/run/photos.jsonl cannot be written: File too large; make room")
    assert (tmp_path / "run" / "photos.jsonl").read_bytes().startswith(first)
    result = evaluate(*options, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "photos.jsonl").read_bytes() == (whole / "photos.jsonl").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
def test_names_that_the_locale_cannot_encode(weights, evaluate, offline, tmp_path):
    """All photos are evaluated, and a run in another locale continues."""
    photos, out = tmp_path / "Fotos é", tmp_path / "out é"
    (photos / "Ф").mkdir(parents=True)
    shutil.copy(ROOT / ".img" / "flower.jpg", photos / "Ф" / "ü.jpg")
    shutil.copy(ROOT / ".img" / "coffee.png", os.fsencode(photos) + b"/\xff.png")
    os.mkfifo(photos / "pipe\x1b[2J.png")
    (tmp_path / "list é").write_bytes(b"./\xff.png\n\xd0\xa4/\xc3\xbc.jpg\n")
    options = ("--checkpoint", weights, "--images", photos, *QUICK, "--methods", "random")
    ascii_only = offline | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run(*options, "--out", out, env=ascii_only)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert r"pipe\x1b[2J.png is a named pipe, not an image file" in result.stderr and "\x1b[2J" not in result.stderr
    records = (out / "photos.jsonl").read_bytes()
    assert sorted(record["photo"] for record in lines(out / "photos.jsonl")) == ["Ф/ü.jpg", "\udcff.png"]
    assert "of `" + str(photos) + "`, model" in (out / "table.md").read_text(encoding="utf-8")
    result = evaluate(*options, "--out", out)
    assert result.returncode == 0 and (out / "photos.jsonl").read_bytes() == records, result.stderr
    result = evaluate(*options, "--list", tmp_path / "list é", "--out", tmp_path / "listed")
    assert result.returncode == 0, result.stderr
    found = [{r["photo"]: r["scores"] for r in lines(folder / "photos.jsonl")} for folder in (out, tmp_path / "listed")]
    assert found[0] == found[1]


def test_all_methods_with_a_memory_bank(some, evaluate, tmp_path):
    backbone = write_backbone(tmp_path / "small.safetensors")
    bank = write_bank(tmp_path / "bank", rows(60, BACKBONE["embed_dim"]), torch.arange(60) % 4)
    result = evaluate("--checkpoint", backbone, "--bank", bank, "--images", some, "--limit", 2, *QUICK,
                      "--methods", "all", "candidates", "ablation", "--sanity", 0,
                      "--out", tmp_path / "out")  # fmt: skip
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


PATHS = ["--images", "--out", "--list", "--annotations", "--checkpoint", "--bank"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "nowhere"], "images: there is no folder nowhere; check the path"),
        (["--images", "tests"], "images: the folder tests has no images"),
        (
            ["--methods", "saliency"],
            f"methods: 'saliency' is unknown; choose from all, candidates, ablation, {', '.join(METHODS)}",
        ),
        (["--model", "no_such_model"], "model: "),
        (["--bank", "memorybank/embedded"], "bank: vit_small_patch14_caltech101 has a classifier, whose scores are "),
        (["--list", "README.md"], "of its photos are not in"),
        (["--list", "no.txt"], "list: there is no file no.txt; check the path"),
        (["--annotations", "no"], "annotations: there is no folder no; check the path"),
        (["--limit", "0"], "argument --limit: expected 1 to "),
        (["--limit", "1.5"], "argument --limit: expected 1 to "),
        (["--steps", "1"], "argument --steps: expected 2 to 1,000"),
        (["--steps", "nan"], "argument --steps: expected 2 to 1,000"),
        (["--blocks", "-1"], "argument --blocks: expected 0 to "),
        (["--sanity", "-1"], "argument --sanity: expected 0 to "),
        (["--mosaics", "-1"], "argument --mosaics: expected 0 to 1,000,000, got -1"),
        (["--mosaics", "half"], "argument --mosaics: expected 0 to "),
        (["--seed", "-1"], "argument --seed: expected 0 to "),
        (["--images", "x" * 5000], "images: there is no folder xxx"),
        (["--methods", "x" * 5000], "is unknown; choose from all, candidates, ablation, "),
        (["--device", "tpu"], "device: 'tpu' cannot be used"),
        *(([name, " "], f"argument {name}: ' ' is no path; pass the name of a file or a folder") for name in PATHS),
    ],
)
def test_refusals(options, message, evaluate, tmp_path):
    given = ["--images", ROOT / ".img", "--out", tmp_path / "out", *options]
    one_line_error(evaluate(*given), "error: ", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "broken", "x" * 5000, "photos", "photos/cup/.."])
def test_a_folder_that_cannot_be_used(out, evaluate, tmp_path, monkeypatch):
    """This is found before the model is loaded."""
    (tmp_path / "photos" / "cup").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    monkeypatch.setattr("evaluation.command.find_decision", None)
    shutil.copy(ROOT / ".img" / "flower.jpg", tmp_path / "photos")
    before = tree(tmp_path)
    one_line_error(evaluate("--images", tmp_path / "photos", "--out", tmp_path / out), "error: out: ", "choose another")
    assert tree(tmp_path) == before


def test_help(evaluate):
    result = evaluate("--help")
    assert result.returncode == 0 and "--methods" in result.stdout and "repeat the same command" in result.stdout


def test_without_the_extra(offline, tmp_path):
    """As if captum were not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['captum'] = None")
    result = run("--help", env=offline | {"PYTHONPATH": str(tmp_path)})
    one_line_error(result, "error: captum is not installed; pip install -e '.[evaluation]'")
