"""Tests of `python -m memorybank eval | info`, and of refused command lines."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from tiny_banks import rows, write_backbone, write_bank, write_photo

from memorybank.__main__ import main
from memorybank.build import build
from models import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.mark.parametrize(
    "options", [[], ["build"], ["build", "--train", "t"], ["eval"], ["what"], ["eval", "b", "--k", "0"]]
)
def test_bad_command_lines(capsys, options):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2 and "--help shows the options" in capsys.readouterr().err


def test_build_without_a_model(capsys):
    assert main(["build", "--train", "t", "--out", "o"]) == 2
    assert capsys.readouterr().err.startswith("error: model: name one with --model, or pass a --checkpoint that names")


def test_eval(tmp_path, capsys):
    """Top-1 and top-5 of 300 test images are those of plain loops."""
    centres = 0.7 * rows(20, 6, seed=5)
    train, test = (torch.arange(n) % 20 for n in (150, 300))
    z, f = (torch.nn.functional.normalize(centres[y] + rows(len(y), 6, s), dim=1) for y, s in ((train, 6), (test, 7)))
    write_bank(tmp_path, z, train)
    write_bank(tmp_path, f, test, "test")
    assert main(["eval", str(tmp_path), "--k", "200", "10", "20", "100", "20"]) == 0
    printed = capsys.readouterr().out
    for k in (10, 20, 100):
        hits = [0, 0]
        for feature, label in zip(f.double(), test.tolist()):
            cosine = (z.double() @ feature).tolist()
            votes = [0.0] * 20
            for i in sorted(range(150), key=lambda i: -cosine[i])[:k]:
                votes[train[i]] += math.exp(cosine[i] / 0.07)
            order = sorted(range(20), key=lambda c: -votes[c])
            hits[0] += order[0] == label
            hits[1] += label in order[:5] and votes[label] > 0
        assert 0.1 < hits[0] / 300 < hits[1] / 300 < 1
        assert f"k = {k:<4} top-1 {hits[0] / 3:6.2f} %   top-5 {hits[1] / 3:6.2f} %" in printed
    assert "k = 200  the bank has 150 features" in printed


@pytest.mark.parametrize(
    ("write", "more", "message"),
    [
        (lambda b: None, [], "bank: .* has no test pair; build it with --test FOLDER"),
        (lambda b: write_bank(b, rows(5, 3), torch.zeros(5).long(), "test"), ["--k", "2"],
         "testfeat.pth has features of width 3, those of the train pair have 4"),
        (lambda b: write_bank(b, rows(5, 4), torch.full((5,), 9), "test"), [], "has the label 9, but there are 3"),
        (lambda b: write_bank(b, rows(5, 4), torch.zeros(4).long(), "test"), [], "testlabels.pth has 4 labels for 5"),
        (lambda b: write_bank(b, rows(5, 4), torch.full((5,), -1), "test"), [], "has the label -1; expected 0 to"),
        (lambda b: write_bank(b, 3 * rows(5, 4), torch.zeros(5).long(), "test"), [], "are not L2-normalised"),
        (lambda b: (b / "testfeat.pth").write_text("no"), [], "testfeat.pth is damaged"),
        (lambda b: torch.save(torch.zeros(5), b / "testlabels.pth"), [], "there is no file .*testfeat.pth"),
        (lambda b: write_bank(b, rows(5, 4), torch.zeros(5).long(), "test", test={"count": 7}), [],
         "bank.json: test.count is 7 for 5 features"),
        (lambda b: write_bank(b, rows(5, 4), torch.zeros(5).long(), "test", test={"files": ["x"]}), [],
         "bank.json lists 1 files for 5 features"),
    ],
)  # fmt: skip
def test_bad_evaluations(tmp_path, capsys, write, more, message):
    """`info` ends with the same error, unless the bank just has no test pair."""
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 3)
    write(tmp_path)
    assert main(["eval", str(tmp_path), *more]) == 2
    assert re.search(f"error: .*({message})", capsys.readouterr().err)
    if (tmp_path / "bank.json").exists() or list(tmp_path.glob("test*.pth")):
        assert main(["info", str(tmp_path)]) == 2
        assert re.search(f"error: .*({message})", capsys.readouterr().err)
    else:
        assert main(["info", str(tmp_path)]) == 0


def test_more_neighbours_than_features(tmp_path, capsys):
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 3)
    write_bank(tmp_path, rows(5, 4), torch.zeros(5).long(), "test")
    assert main(["eval", str(tmp_path), "--k", "7"]) == 2
    assert "error: k: expected 1 to 6, the number of features in the bank" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 0


def test_names_from_a_bank_reach_the_terminal_escaped(tmp_path, capsys):
    metadata = {"model": "\x1b[31mred", "transform": "a\nb", "versions": {"t\x07": "1\u202e"}}
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 3, **metadata)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[31mred" in out and r"a\nb" in out and r"t\x07 1\u202e" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_info(checkpoint, tmp_path, capsys):
    for n in range(7):
        write_photo(tmp_path / "train" / "abc"[n % 3] / f"{n}.png", n)
    for n in range(2):
        write_photo(tmp_path / "test" / "b" / f"{n}.png", 10 + n)
    build(load(None, checkpoint), tmp_path / "train", tmp_path / "bank", tmp_path / "test", workers=0)
    assert main(["info", str(tmp_path / "bank")]) == 0
    printed = capsys.readouterr().out
    for text in ("tiny", "7 x 48, float16", "3, of 2 to 3 images", "2 images", "sha256", f"timm {timm.__version__}"):
        assert text in printed


@pytest.mark.parametrize("option", ["--train", "--test", "--out"])
def test_an_empty_folder_is_not_the_current_one(tmp_path, monkeypatch, capsys, option):
    """It comes from a variable of the shell that is not set."""
    for folder in ("train", "here"):
        write_photo(tmp_path / folder / "a" / "0.png", 0)
    monkeypatch.chdir(tmp_path / "here")
    folders = {"--train": str(tmp_path / "train"), "--out": str(tmp_path / "bank"), option: ""}
    network = write_backbone(tmp_path / "net.safetensors")
    arguments = ["build", "--checkpoint", str(network), "--workers", "0", "--device", "cpu"]
    assert main([*arguments, *(text for pair in folders.items() for text in pair)]) == 2
    assert f"error: {option[2:]}: is empty; pass a folder" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists() and [p.name for p in Path.cwd().iterdir()] == ["a"]
