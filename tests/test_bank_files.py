"""Tests of the files of a bank: banks of other tools, and files that are refused."""

import re
import shutil

import pytest
import torch
from tiny_banks import rows, write_bank

from memorybank import MemoryBank
from memorybank.__main__ import main


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bank_of_eval_knn_loads_as_it_is(tmp_path, zipped):
    """Such a bank is float32 and has no bank.json; files of torch 1.5 and earlier cannot be memory-mapped."""
    folder = tmp_path / "ImageNet2012" / "model"
    folder.mkdir(parents=True)
    tensors = {"trainfeat": rows(1003, 8), "trainlabels": torch.arange(1003) % 1000}
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth", _use_new_zipfile_serialization=zipped)
    bank = MemoryBank.load(folder)
    assert torch.equal(bank.features, tensors["trainfeat"]) and torch.equal(bank.labels, tensors["trainlabels"])
    assert bank.files is None and bank.metadata == {} and bank.num_classes == 1000
    assert bank.class_name(281).startswith("tabby")
    bank.check_model("any", 8, "any")

    elsewhere = MemoryBank.load(shutil.copytree(folder, tmp_path / "other"))
    assert elsewhere.class_names is None and elsewhere.class_name(281) == "class 281"


def test_integer_labels_of_any_width(tmp_path):
    bank = MemoryBank.load(write_bank(tmp_path, rows(5, 4), torch.tensor([0, 1, 2, 1, 0], dtype=torch.int32)))
    assert bank.labels.dtype == torch.int64 and bank.classify(rows(2, 4), k=5).votes.shape == (2, 3)


class Evil:
    def __reduce__(self):
        return print, ("was run",)


def bad(name, value, **metadata):
    """Return a function that writes a good bank and then replaces one file."""

    def write(folder):
        write_bank(folder, rows(6, 4), torch.arange(6) % 3, **metadata)
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is None:
            (folder / name).unlink()
        else:
            torch.save(value, folder / name)

    return write


NAN = rows(6, 4).index_fill(0, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "bank: there is no folder .*; build one: python -m memorybank build --model NAME"),
        (bad("trainfeat.pth", None), "bank: there is no file .*trainfeat.pth"),
        (bad("trainlabels.pth", None), "bank: there is no file .*trainlabels.pth"),
        (bad("trainfeat.pth", Evil()), "trainfeat.pth is damaged, or holds more than tensors and is not loaded"),
        (bad("trainfeat.pth", b"text"), "bank: .*trainfeat.pth (is damaged|cannot be read)"),
        (bad("trainfeat.pth", b""), "bank: .*trainfeat.pth cannot be read"),
        (bad("trainfeat.pth", {"features": rows(6, 4)}), "trainfeat.pth should hold a tensor, but has a dict"),
        (bad("trainfeat.pth", rows(6, 4)[0]), r"should hold features \(M, D\), float16 or float32, but has \(4,\)"),
        (bad("trainfeat.pth", rows(6, 4).double()), "float16 or float32, but has .* torch.float64"),
        (bad("trainfeat.pth", NAN), "trainfeat.pth has NaN or infinite values; build it again"),
        (bad("trainfeat.pth", 2 * rows(6, 4)), "the rows of .*trainfeat.pth are not L2-normalised"),
        (bad("trainlabels.pth", torch.zeros(5).long()), "trainlabels.pth has 5 labels for 6 features"),
        (bad("trainlabels.pth", torch.zeros(6)), r"should hold integers \(M,\), but has \(6,\) torch.float32"),
        (bad("trainlabels.pth", torch.arange(6) - 1), "trainlabels.pth has the label -1; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6) << 40), "trainlabels.pth has the label .*; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6), class_names=list("abc")), "has the label 5, but there are 3 classes"),
        (bad("bank.json", b"{"), "bank.json cannot be read as JSON"),
        (bad("bank.json", b"[]"), "bank.json does not describe a bank"),
        (bad("x", b"", train={"folder": ".", "files": ["a.jpg"]}), "bank.json lists 1 files for 6 features"),
    ],
)  # fmt: skip
def test_damaged_banks(tmp_path, capsys, write, message):
    write(tmp_path / "b")
    with pytest.raises(ValueError, match=message) as error:
        MemoryBank.load(tmp_path / "b")
    assert "\n" not in str(error.value) and "was run" not in capsys.readouterr().out
    assert main(["info", str(tmp_path / "b")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_nan_that_loading_does_not_see_is_found_by_the_query(tmp_path):
    features = rows(3000, 4)
    features[7] = torch.nan
    bank = MemoryBank.load(write_bank(tmp_path, features, torch.zeros(3000).long()))
    with pytest.raises(ValueError, match="trainfeat.pth has NaN or infinite values"):
        bank.nearest(rows(1, 4), 1)


def test_the_bank_of_another_model(tmp_path):
    folder = write_bank(tmp_path, rows(6, 4), torch.arange(6), model="mine", weights_sha256="1234")
    bank = MemoryBank.load(folder)
    bank.check_model("mine", 4, "1234")
    bank.check_model("the same weights under another name", 4, "1234")
    with pytest.raises(ValueError, match="was built with the model mine, not with other; build one with it: .* other"):
        bank.check_model("other", 4, "5678")
    with pytest.raises(ValueError, match="was built with other weights of mine"):
        bank.check_model("mine", 4, "5678")
