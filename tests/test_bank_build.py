"""Tests of `memorybank.build`: the result, builds on several ranks, and builds that are killed or refused."""

import errno
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
from scripts import no_leftovers
from tiny_banks import BACKBONE, write_backbone, write_photo

import memorybank
from daam_vit.locks import hold
from memorybank import MemoryBank
from memorybank.__main__ import main
from memorybank.build import _finish, build, find_classes
from models import find_class, load, sha256, weights_sha256
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


def contents(folder, *names):
    """Return the files of a bank, which must be all that the folder holds; bank.json only if it is named."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(names or FILES)
    return {name: (folder / name).read_bytes() for name in names or FILES[:-1]}


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


def test_class_folders_of_any_name(checkpoint, tmp_path):
    names = ["1", "10", "2", " ", "a, b", "nul", "new\nline", "\x1b[31mred", "猫", "b\udce9", "{x}", "n" * 250]
    for n, name in enumerate(names):
        write_photo(tmp_path / "train" / name / "x.png", n)
    said = build(load(None, checkpoint), tmp_path / "train", tmp_path / "b", workers=0)
    assert said["class_names"] == sorted(names) and (tmp_path / "b" / "bank.json").read_bytes().isascii()
    bank = MemoryBank.load(tmp_path / "b")
    assert bank.class_names == sorted(names) and all(bank.file(row).is_file() for row in range(len(names)))
    assert [bank.file(row).parent.name for row in range(len(names))] == [bank.class_name(k) for k in bank.labels]
    assert find_class("10", bank.class_names, bank.num_classes) == bank.class_names.index("10")


def test_links_bring_no_photos_of_other_classes_and_none_twice(tmp_path):
    train = tmp_path / "train"
    for n, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/3.png", "../more/4.png", "../linked/5.png")):
        write_photo(train / name, n)
    (train / "cat" / "up").symlink_to("..")
    (train / "cat" / "deep" / "self").symlink_to(".")
    (train / "cat" / "sibling").symlink_to("../dog")
    (train / "cat" / "all").symlink_to(tmp_path)
    (train / "dog" / "more").symlink_to("../../more")
    (train / "dog" / "again").symlink_to("../../more")
    (train / "emu").symlink_to("../linked")
    (train / "kitty").symlink_to("cat")
    (train / "cat" / "emus").symlink_to("../../linked")
    for hidden in (".ipynb_checkpoints", ".Trash-1000"):
        write_photo(train / "cat" / hidden / "6.png", 6)
        write_photo(train / hidden / "7.png", 7)
    found = {name: [str(f.relative_to(train)) for f in files] for name, files in find_classes(train, "train").items()}
    assert sorted(found) == ["cat", "dog", "emu", "kitty"]
    assert found["kitty"] == ["kitty/1.png", "kitty/deep/2.png"]
    assert found["cat"] == ["cat/1.png", "cat/deep/2.png"] and found["emu"] == ["emu/5.png"]
    assert found["dog"] in (["dog/3.png", "dog/again/4.png"], ["dog/3.png", "dog/more/4.png"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_special_files_are_left_out_and_said(checkpoint, tmp_path, capsys):
    write_photo(tmp_path / "train" / "a" / "1.png", 1)
    os.mkfifo(tmp_path / "train" / "a" / "2.png")
    (tmp_path / "train" / "a" / "3.png").symlink_to("/dev/zero")
    options = ["build", "--checkpoint", checkpoint, "--train", tmp_path / "train", "--out", tmp_path / "b"]
    assert main([*map(str, options), "--workers", "0", "--device", "cpu"]) == 0
    assert "train: left out 2 images that cannot be read:\n" in capsys.readouterr().out
    bank = MemoryBank.load(tmp_path / "b")
    assert bank.files == ["a/1.png"] and list(bank.metadata["train"]["unreadable"]) == ["a/2.png", "a/3.png"]


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


def test_sigterm_ends_a_build_without_leftovers(checkpoint, many, tmp_path):
    process = start(*command(checkpoint, many, tmp_path / "out"), start_new_session=True)
    wait_for_parts(tmp_path / "out", 6, process)
    process.terminate()
    code, out, err = finish(process)
    assert code == 143 and out == "" and "Traceback" not in err
    parts = list(tmp_path.rglob("train-*.pt"))
    assert 6 <= len(parts) < 460 / 4 and no_leftovers(tmp_path)
    build(load(None, checkpoint), many / "train", tmp_path / "out", many / "test", batch_size=4, workers=0)
    assert contents(tmp_path / "out") == contents(many / "bank")


def failing(do, folder, at, error, for_ever=False):
    """Return a function that raises an error at its n-th call for a file of a folder, parts of a split not counted."""
    calls = iter(range(1, 1000))

    def once(*arguments, **more):
        target = Path(arguments[-1])
        if folder in target.parents and target.suffix != ".pt":
            n = next(calls)
            if n == at or (for_ever and n > at):
                raise error
        return do(*arguments, **more)

    return once


@pytest.mark.parametrize("step", [1, 2, 6, 7, 8, 9, 10, 13, 14, 15])
def test_a_build_may_be_killed_at_every_step_of_its_end(built, checkpoint, photos, tmp_path, monkeypatch, step):
    """The folder holds an older bank; at every step it holds that bank, none or the new one, but never a mixture."""
    out = tmp_path / "b"
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    build(loaded, photos / "test", out, dtype="float32", workers=0)
    older = contents(out, "trainfeat.pth", "trainlabels.pth", "bank.json")
    with monkeypatch.context() as patch:  # the plan; four files and bank.json; three files move away and five move in
        patch.setattr("os.replace", failing(os.replace, out, step, KeyboardInterrupt, for_ever=True))
        patch.setattr("os.rename", failing(os.rename, out, 1, KeyboardInterrupt, for_ever=True))  # nothing is undone
        try:
            build(loaded, photos / "train", out, **settings)
        except KeyboardInterrupt:
            assert step <= 14
        else:
            assert step > 14
    if step <= 7:
        assert beside_the_parts(out, tmp_path / "copy") == older
    elif step <= 14:
        with pytest.raises(ValueError, match="there is no file .*trainfeat.pth"):
            MemoryBank.load(out)
    if 8 <= step <= 13:  # no other build loses the older bank
        with pytest.raises(ValueError, match="holds an unfinished build with another dtype"):
            build(loaded, photos / "train", out, dtype="float32", **settings)
        assert beside_the_parts(out, tmp_path / "copy") == older
    build(loaded, photos / "train", out, **settings)
    assert contents(out) == contents(built[0])


def beside_the_parts(out, copy):
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".building"))
    return contents(copy, "trainfeat.pth", "trainlabels.pth", "bank.json")


FULL = OSError(errno.ENOSPC, "No space left on device")
TORCH = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598\nframe #0: c10::Throw")


@pytest.mark.parametrize(
    ("function", "step", "error", "message"),
    [
        *(("torch.save", step, FULL, "cannot be written: No space left on device; make room") for step in (1, 15)),
        *(("torch.save", step, TORCH, "cannot be written: the disk may be full; make room") for step in (5, 18)),
        *(("os.replace", step, FULL, "cannot be written: No space left on device") for step in (1, 3, 6, 7, 9, 10, 14)),
        *(("os.replace", step, KeyboardInterrupt, None) for step in (8, 14)),
    ],
)  # fmt: skip
def test_a_full_disk_loses_nothing(
    built, checkpoint, photos, tmp_path, monkeypatch, capsys, function, step, error, message
):
    """The older bank stays as it is, and the parts that are complete are used by the next build."""
    out = tmp_path / "b"
    build(load(None, checkpoint), photos / "test", out, dtype="float32", workers=0)
    names = "trainfeat.pth", "trainlabels.pth", "bank.json"
    older = contents(out, *names)
    arguments = [*map(str, command(checkpoint, photos, out))]
    with monkeypatch.context() as patch:
        do, steps = torch.save, iter(range(1, 100))

        def save(*values, **more):
            if next(steps) == step:
                raise error
            return do(*values, **more)

        patch.setattr(function, save if function == "torch.save" else failing(os.replace, out, step, error))
        if message:
            assert main(arguments) == 2
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and errors[0].startswith("error: out: ") and message in errors[0]
        else:
            with pytest.raises(error):
                main(arguments)
    assert no_leftovers(out)
    parts = {p: p.stat().st_mtime_ns for p in out.glob(".building/*-*.pt")}
    assert function == "torch.save" or len(parts) == {1: 0, 3: 12}.get(step, 15)
    shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns(".building"))
    assert contents(tmp_path / "copy", *names) == older

    def finish_with_the_same_parts(*given):
        assert {p: p.stat().st_mtime_ns for p in parts} == parts
        return _finish(*given)

    monkeypatch.setattr("memorybank.build._finish", finish_with_the_same_parts)
    assert main(arguments) == 0
    assert contents(out) == contents(built[0])


def test_what_a_killed_build_left_is_removed_and_nothing_else(checkpoint, photos, tmp_path):
    parts = tmp_path / "b" / ".building"
    (parts / "old").mkdir(parents=True)
    for name in (".train-000001.pt.0a1b2c3d.part", "trainfeat.pth", "old/trainfeat.pth", "notes.txt", ".lock"):
        (parts / name).write_text("left")
    build(load(None, checkpoint), photos / "test", tmp_path / "b", workers=0)
    assert [p.name for p in parts.iterdir()] == ["notes.txt"]
    assert len(MemoryBank.load(tmp_path / "b").labels) == 11


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"features": torch.zeros(3, 48).half(), "unreadable": {}}, path),
        lambda path: torch.save({"features": torch.zeros(4).half(), "unreadable": {}}, path),
        lambda path: torch.save({"features": torch.zeros(4, 48).half(), "unreadable": None}, path),
    ],
)
def test_a_damaged_part_is_computed_again(built, checkpoint, photos, tmp_path, monkeypatch, damage):
    """A power cut can leave an empty part."""
    loaded, settings = load(None, checkpoint), {"test": photos / "test", "batch_size": 4, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("memorybank.build._finish", lambda *arguments: 1 / 0)  # instead of a kill
        with pytest.raises(ZeroDivisionError):
            build(loaded, photos / "train", tmp_path / "b", **settings)
    damage(tmp_path / "b" / ".building" / "train-000000.pt")
    with pytest.raises(
        ValueError, match="out: .*train-000000.pt was damaged and has been deleted; run the same command again"
    ):
        build(loaded, photos / "train", tmp_path / "b", **settings)
    build(loaded, photos / "train", tmp_path / "b", **settings)
    assert contents(tmp_path / "b") == contents(built[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "plan.json cannot be read as JSON: .*; delete the folder .building"),
        (b"{", "plan.json cannot be read as JSON: .*; delete the folder .building"),
        (b"\xff\xfe\xfd", "plan.json cannot be read as JSON: .*; delete the folder .building"),
        (b"[" * 100_000, "plan.json is nested too deeply.*; delete the folder .building"),
        (b"[]", r"plan.json: it should be an object, got \[\]; delete the folder .building"),
        (
            b'{"batch_size": "4"}',
            'plan.json: batch_size should be a whole number, got "4"; delete the folder .building',
        ),
        (b'{"train": null}', "plan.json: train should be a text, got null; delete the folder .building"),
        (b"{}", ".building holds an unfinished build with another model, weights_sha256, .*; delete that folder"),
        (b'{"\\u001b[31m": 1}', r".building holds an unfinished build with another .*\\x1b\[31m; delete that folder"),
    ],
)
def test_plans_that_cannot_be_read(checkpoint, photos, tmp_path, text, message):
    parts = tmp_path / "b" / ".building"
    parts.mkdir(parents=True)
    (parts / "plan.json").write_bytes(text)
    (parts / "train-000000.pt").write_text("a part")
    with pytest.raises(ValueError, match=f"out: .*{message}") as error:
        build(load(None, checkpoint), photos / "test", tmp_path / "b", workers=0)
    assert str(error.value).isprintable()
    assert (parts / "plan.json").read_bytes() == text and (parts / "train-000000.pt").read_text() == "a part"


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


def test_two_builds_cannot_share_a_folder(built, checkpoint, photos, tmp_path):
    out, loaded = shutil.copytree(built[0], tmp_path / "b"), load(None, checkpoint)
    (out / ".building").mkdir()
    with hold(out / ".building", "out", "another build"):
        message = rf"out: another build is running in .*building, by process {os.getpid()} on .*; wait for it"
        with pytest.raises(ValueError, match=message):
            build(loaded, photos / "train", out, workers=0)
    shutil.rmtree(out / ".building")
    assert contents(out) == contents(built[0])


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"batch_size": -1}, ValueError, "batch_size: expected 1 to 65536, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 to 65536, got 0"),
        ({"batch_size": 10**30}, ValueError, "batch_size: expected 1 to 65536"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected int, got float"),
        ({"batch_size": True}, TypeError, "batch_size: expected int, got bool"),
        ({"batch_size": "64"}, TypeError, "batch_size: expected int, got str"),
        ({"batch_size": None}, TypeError, "batch_size: expected int, got NoneType"),
        ({"workers": -1}, ValueError, "workers: expected 0 to 1024, got -1"),
        ({"workers": None}, TypeError, "workers: expected int, got NoneType"),
        ({"dtype": "int8"}, ValueError, "dtype: expected float16 or float32, got int8"),
        ({"dtype": "a\nb" * 1000}, ValueError, r"dtype: expected float16 or float32, got a\\nba"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected str, got dtype"),
        ({"strict": "no"}, TypeError, "strict: expected bool, got str"),
        ({"strict": 1}, TypeError, "strict: expected bool, got int"),
        ({"train": ""}, ValueError, "train: is empty; pass a folder, '.' for the current one"),
        ({"out": ""}, ValueError, "out: is empty; pass a folder, '.' for the current one"),
        ({"test": ""}, ValueError, "test: is empty; pass a folder, '.' for the current one"),
        ({"train": ["a"]}, TypeError, "train: expected str or PathLike, got list"),
        ({"train": None}, TypeError, "train: expected str or PathLike, got NoneType"),
        ({"train": "nul\0l"}, ValueError, "train: there is no folder nul"),
        ({"train": "a" * 5000}, ValueError, "train: there is no folder aaa"),
        ({"test": 5}, TypeError, "test: expected str or PathLike or NoneType, got int"),
        ({"test": "gone"}, ValueError, "test: there is no folder gone"),
        ({"out": 5}, TypeError, "out: expected str or PathLike, got int"),
        ({"out": "b/bank.json"}, ValueError, "out: b/bank.json is not a folder; pass another one"),
        ({"out": "b/bank.json/x"}, ValueError, "out: b/bank.json/x/.building cannot be written: Not a directory; "),
        ({"out": "nul\0l"}, ValueError, r"out: nul\\x00l is not a folder; pass another one"),
        ({"out": "a" * 300}, ValueError, "out: aaa.* cannot be written: File name too long; "),
        ({"loaded": timm.create_model("vit_tiny_patch16_224", **BACKBONE)}, TypeError,
         "loaded: expected LoadedModel, got VisionTransformer"),
        ({"loaded": "tiny"}, TypeError, "loaded: expected LoadedModel, got str"),
    ],
)  # fmt: skip
def test_bad_arguments_touch_nothing(built, checkpoint, photos, tmp_path, monkeypatch, arguments, kind, message):
    shutil.copytree(built[0], tmp_path / "b")
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"loaded": load(None, checkpoint), "train": photos / "train", "out": "b", "workers": 0} | arguments
    with pytest.raises(kind, match=message) as error:
        build(**given)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made(checkpoint, photos, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="out: .* cannot be written: Read-only file system; .* pass another folder"):
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
        (strangers, ["--checkpoint", "nan.safetensors"],
         r"the model's output is not finite; .* \(train/a/1.png and the 0 images after it\)"),
        (strangers, ["--checkpoint", "large.safetensors"], "model: the feature of .*1.png is not finite; check"),
        (strangers, ["--checkpoint", "zero.safetensors"], "model: the feature of .*1.png is zero; check the weights"),
    ],
)  # fmt: skip
def test_refused_builds(checkpoint, tmp_path, monkeypatch, capsys, prepare, more, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    factors = {"nan.safetensors": torch.nan, "zero.safetensors": 0, "large.safetensors": 1e30}
    for name in factors.keys() & set(more):
        state = safetensors.torch.load_file(checkpoint)
        state |= {key: factors[name] * state[key] for key in ("norm.weight", "norm.bias")}
        metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(BACKBONE)}
        safetensors.torch.save_file(state, name, metadata)
    arguments = ["build", "--checkpoint", str(checkpoint), "--train", "train", "--out", "out", "--workers", "0", *more]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), lines
    assert not list(tmp_path.glob("out/*.pth"))
