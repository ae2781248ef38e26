"""Tests of `memorybank.build`: the result, builds on several ranks, and builds that are killed or refused."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from tiny_banks import BACKBONE, write_backbone, write_photo

import memorybank
from memorybank import MemoryBank
from memorybank.__main__ import main
from memorybank.build import _finish, build
from models import load, sha256, weights_sha256
from models.images import read_image

ROOT = Path(__file__).resolve().parent.parent
FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth", "bank.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 44 + 11 photos, with the other files that real folders contain."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(44):
        below = "deep/er" if n % 4 == 0 else "."
        write_photo(folder / "train" / ("cat", "Dog", "a b")[n % 3] / below / f"{n}.png", n)
    for n in range(11):
        write_photo(folder / "test" / ("Dog", "cat")[n % 2] / f"{n}.JPG", 100 + n)
    train = folder / "train"
    (train / "cat" / "notes.txt").write_text("left out")
    (train / "cat" / "broken.jpg").write_text("not an image")
    (train / "Dog" / "._1.png").write_text("hidden")
    write_photo(train / ".hidden" / "x.png", 1)
    (train / "empty").mkdir()
    write_photo(train / "beside.png", 2)
    return folder


def command(checkpoint, photos, out, *more):
    return [
        "build", "--checkpoint", checkpoint, "--train", photos / "train", "--test", photos / "test", "--out", out,
        "--batch-size", 4, "--workers", 1, "--device", "cpu", *more,
    ]  # fmt: skip


def start(*arguments, ranks=0, **options):
    program = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "memorybank"]
        if ranks
        else ["-m", "memorybank"]
    )
    words = list(map(str, [sys.executable, *program, *arguments]))
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # torchrun gives every rank one thread; a single process has all
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def built(checkpoint, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("banks") / "one"
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as err:
        assert main([*map(str, command(checkpoint, photos, out))]) == 0
    return out, printed.getvalue(), err.getvalue()


def contents(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES if name != "bank.json"}


def test_build(built, checkpoint, photos):
    """The bank is that of a plain loop: read, transform, forward, normalise, in the order of classes and files."""
    out, printed, err = built
    bank, loaded = MemoryBank.load(out), load(None, checkpoint)
    assert bank.class_names == ["Dog", "a b", "cat"] and bank.features.dtype == torch.float16
    assert len(bank.labels) == 44 and all(bank.file(row).is_file() for row in range(44))
    assert [Path(f) for f in bank.files] == sorted(map(Path, bank.files))  # the classes are in this order, too
    assert [bank.class_names[k] for k in bank.labels] == [file.split("/")[0] for file in bank.files]
    with torch.no_grad():
        for row, stored in enumerate(bank.features):
            feature = loaded.model(loaded.transform(read_image(bank.file(row))).unsqueeze(0))[0]
            torch.testing.assert_close(stored.float(), feature / feature.norm(), atol=1e-3, rtol=0)
    features, labels = memorybank.read_pair(out, "test")
    assert features.shape == (11, 48) and labels.tolist() == [0] * 6 + [2] * 5

    said = bank.metadata
    assert said["model"] == "tiny" and said["checkpoint"] == {"file": checkpoint.name, "sha256": sha256(checkpoint)}
    assert said["weights_sha256"] == weights_sha256(loaded.model) and said["versions"]["timm"] == timm.__version__
    assert said["train"]["count"] == 44 and said["test"]["count"] == 11 and said["test"]["unreadable"] == {}
    assert list(said["train"]["unreadable"]) == ["cat/broken.jpg"]
    assert "train: left out 1 images that cannot be read:\n" in printed and "broken.jpg is not an image" in printed
    assert "44 x 48, float16" in printed and "img/s" in err
    contents(out)


def test_one_rank_gives_the_same_bytes(built, checkpoint, photos, tmp_path, monkeypatch):
    """The process runs in the environment that torchrun sets."""
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert main([*map(str, command(checkpoint, photos, tmp_path / "b"))]) == 0
    assert contents(tmp_path / "b") == contents(built[0])


def test_three_ranks_give_the_same_bytes(built, checkpoint, photos, tmp_path):
    code, printed, err = finish(start(*command(checkpoint, photos, tmp_path / "b"), ranks=3))
    assert code == 0, err
    assert contents(tmp_path / "b") == contents(built[0])
    assert printed.count("44 x 48") == 1  # only the first rank prints


def test_a_new_bank_replaces_an_old_one_whole(built, checkpoint, photos, tmp_path):
    out = shutil.copytree(built[0], tmp_path / "b")
    build(load(None, checkpoint), photos / "test", out, dtype="float32", workers=0)
    assert sorted(p.name for p in out.iterdir()) == ["bank.json", "trainfeat.pth", "trainlabels.pth"]
    bank = MemoryBank.load(out)
    assert bank.features.dtype == torch.float32 and len(bank.labels) == 11 and bank.class_names == ["Dog", "cat"]


def test_odd_names_and_broken_links(checkpoint, tmp_path):
    write_photo(tmp_path / "train" / "Café" / "a\udce9.png", 1)  # bytes that are not UTF-8
    (tmp_path / "train" / "Café" / "gone.png").symlink_to("nowhere")
    bank = build(load(None, checkpoint), tmp_path / "train", tmp_path / "b", workers=0)
    assert list(bank["train"]["unreadable"]) == ["Café/gone.png"]
    loaded = MemoryBank.load(tmp_path / "b")
    assert loaded.class_names == ["Café"] and loaded.file(0).is_file()


def test_imagenet_folders_get_their_names(checkpoint, tmp_path):
    for n, name in enumerate(("n02123045", "n01440764")):
        write_photo(tmp_path / "train" / name / "x.png", n)
    bank = build(load(None, checkpoint), tmp_path / "train", tmp_path / "b", workers=0)
    assert [name.split(",")[0] for name in bank["class_names"]] == ["tench", "tabby"]


def test_the_folder_is_kept_as_it_was_given(checkpoint, photos, tmp_path, monkeypatch):
    shutil.copytree(photos / "test", tmp_path / "mine" / "photos")
    monkeypatch.chdir(tmp_path / "mine")
    assert build(load(None, checkpoint), "photos", "banks/b", workers=0)["train"]["folder"] == "../../photos"
    monkeypatch.chdir(tmp_path)
    bank = MemoryBank.load("mine/banks/b")
    assert all(bank.file(row).is_file() for row in range(len(bank.labels)))
    assert build(load(None, checkpoint), photos / "test", "c", workers=0)["train"]["folder"] == str(photos / "test")


# Builds that are killed -----------------------------------------------------------------------------------------------


def wait_for_parts(out, count, process):
    deadline = time.monotonic() + 120
    while len(list(out.glob(".building/train-*.pt"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def many(checkpoint, photos, tmp_path_factory):
    """A folder of 10 x 46 photos, of which 10 are broken, with the bank of an undisturbed build."""
    folder = tmp_path_factory.mktemp("many")
    for n in range(10):
        shutil.copytree(photos / "train", folder / "train" / f"class {n:02d}")
    shutil.copytree(photos / "test" / "cat", folder / "test" / "class 01")
    build(load(None, checkpoint), folder / "train", folder / "bank", folder / "test", batch_size=4, workers=0)
    assert len(MemoryBank.load(folder / "bank").labels) == 10 * 45
    return folder


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_killed_build_resumes(checkpoint, many, tmp_path, monkeypatch, capsys, ranks):
    """`kill -9` ends the process, or one of two ranks; then one process runs the same build."""
    out = tmp_path / "out"
    process = start(*command(checkpoint, many, out), ranks=ranks, start_new_session=True)
    wait_for_parts(out, 6, process)
    if ranks:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert finish(process)[0] != 0
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not [p for p in out.iterdir() if p.name != ".building"]
    parts = {p: p.stat().st_mtime_ns for p in out.glob(".building/train-*.pt")}
    assert 6 <= len(parts) < 460 / 4

    def finish_with_the_same_parts(*arguments):
        assert {p: p.stat().st_mtime_ns for p in parts} == parts
        return _finish(*arguments)

    monkeypatch.setattr("memorybank.build._finish", finish_with_the_same_parts)
    build(load(None, checkpoint), many / "train", out, many / "test", batch_size=4, workers=0)
    assert f"resuming after {4 * len(parts)} of 460 images" in capsys.readouterr().err
    assert contents(out) == contents(many / "bank")


@pytest.mark.parametrize("step", range(1, 10))
def test_a_build_may_be_killed_at_every_step_of_its_end(built, checkpoint, photos, tmp_path, monkeypatch, step):
    """The folder holds an older bank; at every step it holds that bank, none or the new one, but never a mixture."""
    out = tmp_path / "b"
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    build(loaded, photos / "test", out, dtype="float32", workers=0)
    older = (out / "trainfeat.pth").read_bytes()
    steps = iter(range(1, 100))

    def killed(do):
        def once(*arguments, **more):
            if out in Path(arguments[-1]).parents and Path(arguments[-1]).suffix != ".pt" and next(steps) == step:
                raise KeyboardInterrupt
            return do(*arguments, **more)

        return once

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed(os.replace))  # step 1: the plan; then four files and bank.json
        patch.setattr("shutil.rmtree", killed(shutil.rmtree))
        try:
            build(loaded, photos / "train", out, **settings)
        except KeyboardInterrupt:
            assert step <= 7
        else:
            assert step > 7
    try:
        features = (out / "trainfeat.pth").read_bytes()
        bank = MemoryBank.load(out)
    except (FileNotFoundError, ValueError):
        assert 2 <= step <= 3
    else:
        assert len(bank.labels) == (11 if features == older else 44)
    build(loaded, photos / "train", out, **settings)
    assert contents(out) == contents(built[0])


def test_a_damaged_part_is_computed_again(built, checkpoint, photos, tmp_path, monkeypatch):
    """A power cut can leave an empty part."""
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("memorybank.build._finish", lambda *arguments: 1 / 0)  # instead of a kill
        with pytest.raises(ZeroDivisionError):
            build(loaded, photos / "train", tmp_path / "b", **settings)
    (tmp_path / "b" / ".building" / "train-000000.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match="out: .*train-000000.pt was damaged and has been deleted; run the same command again"
    ):
        build(loaded, photos / "train", tmp_path / "b", **settings)
    build(loaded, photos / "train", tmp_path / "b", **settings)
    assert contents(tmp_path / "b") == contents(built[0])


def test_parts_without_a_plan_are_discarded(built, checkpoint, photos, tmp_path):
    """A build that is killed during its clean-up leaves parts without a plan."""
    loaded = load(None, checkpoint)
    (tmp_path / "b" / ".building").mkdir(parents=True)
    stray = {"features": torch.zeros(4, 48).half(), "unreadable": {}}
    torch.save(stray, tmp_path / "b" / ".building" / "train-000000.pt")
    build(loaded, photos / "train", tmp_path / "b", photos / "test", batch_size=4, workers=0)
    assert contents(tmp_path / "b") == contents(built[0])


def test_strict_also_checks_images_that_an_earlier_build_skipped(checkpoint, photos, tmp_path, monkeypatch):
    loaded, settings = load(None, checkpoint), {"batch_size": 4, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("memorybank.build._finish", lambda *arguments: 1 / 0)  # instead of a kill
        with pytest.raises(ZeroDivisionError):
            build(loaded, photos / "train", tmp_path / "b", **settings)
    parts = set((tmp_path / "b").rglob("train-*.pt"))
    with pytest.raises(ValueError, match="train: .*broken.jpg is not an image"):
        build(loaded, photos / "train", tmp_path / "b", strict=True, **settings)
    assert len(parts - set((tmp_path / "b").rglob("train-*.pt"))) == 1  # tried again when somebody has repaired it
    assert build(loaded, photos / "train", tmp_path / "b", **settings)["train"]["count"] == 44


# Refusals -------------------------------------------------------------------------------------------------------------


def test_the_parts_of_another_build_are_not_mixed_in(checkpoint, photos, tmp_path):
    loaded = load(None, checkpoint)
    with pytest.raises(ValueError, match="train: .*broken.jpg is not an image"):
        build(loaded, photos / "train", tmp_path / "b", batch_size=4, workers=0, strict=True)
    before = {p: p.read_bytes() for p in (tmp_path / "b").rglob("*.pt")}
    others = {"dtype": "float32", "batch_size": 5, "test": photos / "test"}
    for key, value in others.items():
        message = f"out: .*building holds an unfinished build with another {key}; delete"
        with pytest.raises(ValueError, match=message):
            build(loaded, photos / "train", tmp_path / "b", **({"batch_size": 4, "workers": 0} | {key: value}))
    assert before == {p: p.read_bytes() for p in (tmp_path / "b").rglob("*.pt")} and before


def test_other_images_under_the_same_names_are_another_build(checkpoint, photos, tmp_path):
    loaded, settings = load(None, checkpoint), {"batch_size": 4, "workers": 0, "strict": True}
    with pytest.raises(ValueError, match="broken.jpg"):
        build(loaded, photos / "train", tmp_path / "b", **settings)
    mine = shutil.copytree(photos / "train", tmp_path / "mine")
    write_photo(mine / "Dog" / "1.png", 77)
    with pytest.raises(ValueError, match="an unfinished build with another train"):
        build(loaded, mine, tmp_path / "b", **settings)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_two_builds_cannot_share_a_folder(checkpoint, photos, tmp_path):
    import fcntl

    (tmp_path / "b" / ".building").mkdir(parents=True)
    folder = os.open(tmp_path / "b" / ".building", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="out: another build is running in .*building; wait"):
        build(load(None, checkpoint), photos / "train", tmp_path / "b", workers=0)
    os.close(folder)
    build(load(None, checkpoint), photos / "train", tmp_path / "b", workers=0)


def flat(tmp_path):
    write_photo(tmp_path / "train" / "1.png", 1)


def unreadable(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_text("no")


def strangers(tmp_path):
    write_photo(tmp_path / "train" / "a" / "1.png", 1)
    write_photo(tmp_path / "test" / "b" / "1.png", 1)


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        (lambda tmp_path: None, [], "train: there is no folder .*train"),
        (flat, [], "train: .*train has no images; it should have one sub-folder per class"),
        (unreadable, [], "train: none of the 1 images can be read: .*1.png is not an image"),
        (unreadable, ["--strict"], "train: .*1.png is not an image that Pillow can read"),
        (strangers, ["--test", "test"], "test: the class 'b' is not among the sub-folders of train"),
        (strangers, ["--test", "gone"], "test: there is no folder gone"),
        (strangers, ["--checkpoint", "gone.pth", "--model", "vit_tiny_patch16_224"], "checkpoint: there is no file"),
        (strangers, ["--device", "abacus"], "device: 'abacus' cannot be used"),
        (strangers, ["--checkpoint", "nan.safetensors"], "model: the feature of .*1.png is not finite"),
    ],
)  # fmt: skip
def test_refused_builds(checkpoint, tmp_path, monkeypatch, capsys, prepare, more, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    if "nan.safetensors" in more:
        state = {k: v / 0 if k == "norm.weight" else v for k, v in safetensors.torch.load_file(checkpoint).items()}
        metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(BACKBONE)}
        safetensors.torch.save_file(state, "nan.safetensors", metadata)
    arguments = ["build", "--checkpoint", str(checkpoint), "--train", "train", "--out", "out", "--workers", "0", *more]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), lines
    assert not list(tmp_path.glob("out/*.pth"))
