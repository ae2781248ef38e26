"""What people write into the constants of a script, and what its options name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, call, one_line_error

import DINO_DAAM_Visualization_oneSample as bank_script
import VIT_DynamicAccumulatedAttentionMap_oneSample as script
from command_line.neighbours import SCORES as bank_scores
from command_line.options import check_output_dir, find_device, find_targets, target_words
from daam_core import SCORES, VARIANTS

NAMES = ["cat", "1", "top3", "dog, hound"]


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (None, 1),
        ("top2", 2),
        ("TOP 3", 3),
        ("top3", [2]),
        (["top3", "cat"], [2, 0]),
        ("1", [1]),
        (1, [1]),
        (3, [3]),
        ("3", [3]),
        ((np.int64(0), "hound"), [0, 3]),
        (np.array([0, 3]), [0, 3]),
        (torch.tensor(2), [2]),
    ],
    ids=repr,
)
def test_targets(target, found):
    assert find_targets(target, NAMES, 4) == found
    json.dumps(target_words(target))  # as flow.json lists them


def test_targets_in_a_locale_without_their_characters(monkeypatch):
    def given(name):
        return name.encode().decode("ascii", "surrogateescape")

    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert target_words([given("猫"), "кот", given("cat"), "\udcff", "\ud83d", 1]) == [
        "猫", "кот", "cat", "\udcff", "\ud83d", 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (True, "expected names or indices of classes, got True"),
        (7.5, "expected names or indices of classes, got 7.5"),
        (["cat", None], "expected names or indices of classes, got None"),
        ([["cat"]], r"expected names or indices of classes, got \['cat'\]"),
        ({"cat": 1}, "expected names or indices of classes, got {'cat': 1}"),
        (np.array([0.5]), "expected names or indices of classes, got 0.5"),
        ((), "expected 1 to 4 classes, got 0"),
        ("top5", "expected top1 to top4, got top5"),
        ("top" + "9" * 5000, "expected top1 to top4, got top999"),
        ("top٣", "no class is called 'top٣'"),
        (["dog", "hound"], "'dog' and 'hound' are the same class"),
        (["1", 1], "'1' and '1' are the same class"),
        ("", "the name of the class is empty"),
        (4, "class 4 is out of range"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_targets_that_are_none(target, message):
    with pytest.raises(ValueError, match=f"^target: {message}") as error:
        find_targets(target, NAMES, 4)
    assert len(str(error.value)) < 300


def test_a_number_of_classes_that_is_also_a_name():
    with pytest.raises(ValueError, match="'top2' is a number of classes and a name of class 1; pass 'Top2' for it"):
        find_targets("top2", ["a", "Top2"], 2)
    with pytest.raises(ValueError, match="'top 3' cannot be combined"):
        find_targets(["cat", "top 3"], NAMES, 4)


# Variants and scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, paper", [(script, "logit"), (bank_script, "importance")], ids=["VIT", "DINO"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_of_the_score(script, paper, variant):
    assert script.parse_options(["--variant", variant]).score == ("log_odds" if variant == "relevance" else paper)
    for score in (paper, "log_odds"):
        if (variant, score) != ("relevance", "importance"):
            assert script.parse_options(["--variant", variant, "--score", score]).score == score


def test_every_score_is_in_the_help(explain, capfd):
    for result, scores in ((explain("--help"), SCORES), (call(bank_script.main, capfd, "--help"), bank_scores)):
        shown = " ".join(result.stdout.split())
        assert all(f"{score} is " in shown for score in scores)
        assert f"(default: log_odds for --variant relevance, {scores[0]} otherwise)" in shown
        assert "relevance shows the evidence" in shown and result.returncode == 0


@pytest.mark.parametrize(
    ("main", "options", "text"),
    [
        (script.main, ("--score", "importance"), "--score: expected logit or log_odds, got 'importance'"),
        (script.main, ("--score", ""), "--score: expected logit or log_odds, got ''"),
        (script.main, ("--variant", "relevanz"), "--variant: expected paper, signed, heads or relevance, got 'rel"),
        (bank_script.main, ("--score", "logit"), "--score: expected importance or log_odds, got 'logit'"),
        (bank_script.main, ("--variant", "relevance", "--score", "importance"), "score: 'importance' is not the grad"),
        (bank_script.main, ("--score", "importance", "--variant", "relevance"), "pass log_odds"),
        (script.main, ("--norm", "--variant", "relevance"), "error: norm: min-max would move the zero of a relevance"),
    ],
    ids=range(7),
)
def test_scores_that_cannot_be_explained(main, options, text, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(main, capfd, *options)
    one_line_error(result, text)
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


# Devices --------------------------------------------------------------------------------------------------------------

DEVICES = [
    "hpu",
    "",
    "xla",
    "meta",
    "cuda:99",
    "privateuseone",
    "vulkan",
    "maia:3",
    "cpu:x",
    "a" * 5000,
    "c\npu",
    "\x1b",
]


@pytest.mark.parametrize("name", DEVICES, ids=lambda name: repr(name[:20]))
def test_devices_that_cannot_be_used(name):
    with pytest.raises(ValueError, match="^device: '.*' cannot be used: .*; pass another one$") as error:
        find_device(name)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("taken", "Not a directory"),
        ("taken/in/it", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("new/" + "a" * 300, "File name too long"),
        ("b/" * 3000, "File name too long"),
        ("b/" * 1500, "File name too long"),  # for Python, although not for the system
        ("loop", "Too many levels"),
        ("/dev/null", "Not a directory"),
        ("/proc/mine", ""),
    ],
    ids=lambda value: value[:20],
)
def test_output_dirs_that_cannot_be_written(folder, reason, explain, tmp_path, monkeypatch):
    """They are reported once, before the model is loaded, whatever the number of photos."""
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    Path("loop").symlink_to("loop")
    monkeypatch.setattr(script, "load_model", None)
    photos = [ROOT / ".img" / name for name in ("coffee.png", "flower.jpg")]
    result = explain("--image", *photos, "--output-dir", folder)
    one_line_error(result, "output-dir: cannot write to ", reason, "; pass another folder")
    assert len(result.stderr) < 400 and sorted(os.listdir()) == ["loop", "taken"]


def test_output_dirs_are_only_looked_at(tmp_path):
    check_output_dir(tmp_path / "new" / "deeper")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_without_permission(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="output-dir: cannot write to .*: Permission denied"):
        check_output_dir(tmp_path / "mine" / "new")


def test_a_full_disk_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(ValueError, match="output-dir: cannot write to .*: No space left on device; pass another"):
        check_output_dir(tmp_path)


# Constants ------------------------------------------------------------------------------------------------------------

CONSTANTS = [
    ("IMAGE", None, "image: expected a path, got None"),
    ("IMAGE", [], "image: there is none; pass a file or a folder"),
    ("IMAGE", 7, "image: expected a path, got 7"),
    ("IMAGE", ["coffee.png", None], "image: expected a path, got None"),
    ("IMAGE", "", "image: '' is no path"),
    ("IMAGE", "a\0b", "image: 'a\\x00b' is no path"),
    ("IMAGE", "a" * 5000, "File name too long"),
    ("IMAGE", "100%\x1b.png", "image: there is no file 100%\\x1b.png"),
    ("MODEL", None, "model: name one"),
    ("MODEL", 7, "model: expected a name, got 7"),
    ("MODEL", Path("vit"), "model: expected a name, got PosixPath('vit')"),
    ("CHECKPOINT", 7, "checkpoint: expected a path, got 7"),
    ("CHECKPOINT", Path("gone.pth"), "checkpoint: there is no file gone.pth"),
    ("TARGET", 7.5, "target: expected names or indices of classes, got 7.5"),
    ("TARGET", True, "target: expected names or indices of classes, got True"),
    ("TARGET", (), "target: expected 1 to 3 classes, got 0"),
    ("TARGET", 7, "target: class 7 is out of range"),
    ("OUTPUT_DIR", None, "output-dir: expected a path, got None"),
    ("OUTPUT_DIR", "", "output-dir: '' is no path"),
    ("OUTPUT_DIR", b"out", "output-dir: expected a path, got b'out'"),
]


@pytest.mark.parametrize(("constant", "value", "text"), CONSTANTS, ids=[f"{c[0]} {c[1]!r}"[:30] for c in CONSTANTS])
def test_constants_of_a_wrong_kind(constant, value, text, weights, explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if constant != "MODEL":
        monkeypatch.setattr(script, "CHECKPOINT", weights)
    monkeypatch.setattr(script, constant, value)
    result = explain()
    one_line_error(result, text)
    assert len(result.stderr) < 700 and not list(tmp_path.iterdir())
    assert explain("--help").returncode == 0


def test_constants_of_every_good_kind(weights, explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.effect_noise((48, 32), 50).save(name)
    for constant, value in {
        "IMAGE": ("a.png", tmp_path / "b.png", "./a.png", tmp_path / "." / "b.png"),
        "CHECKPOINT": str(weights),
        "TARGET": ("cat", np.int64(1)),
        "OUTPUT_DIR": tmp_path / "100%",
    }.items():
        monkeypatch.setattr(script, constant, value)
    result = explain()
    assert result.returncode == 0 and "2/2" in result.stderr, result.stderr
    made = sorted(tmp_path.glob("100%/tiny/*/flow.json"))
    assert [file.parent.name for file in made] == ["a-cat-dog", "b-cat-dog"]
    assert [c["requested"] for c in json.loads(made[0].read_text())["targets"]] == ["cat", 1]
    assert explain("--help").returncode == 0


def test_an_option_replaces_a_bad_constant(weights, explain, tmp_path, monkeypatch):
    for constant in ("IMAGE", "TARGET", "OUTPUT_DIR", "CHECKPOINT"):
        monkeypatch.setattr(script, constant, 7.5)
    image = tmp_path / "a.png"
    Image.effect_noise((48, 32), 50).save(image)
    options = ("--image", image, "--target", "cat", "--output-dir", tmp_path / "out", "--checkpoint", weights)
    result = explain(*options)
    assert result.returncode == 0, result.stderr
