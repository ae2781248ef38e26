"""Tests of the files of a bank: banks of other tools, and files that are refused."""

import io
import json
import os
import re
import warnings

import numpy as np
import pytest
import torch
from tiny_banks import rows, write_bank

from memorybank import MemoryBank, read_pair
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


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("ImageNet2012/model", True),
        ("ImageNet2012", True),
        ("ImageNet2012/../photos", False),
        ("imagenet2012/model", False),
        ("my-imagenet/model", False),
        ("ImageNet2012-birds/model", False),
    ],
)
def test_names_of_imagenet_come_only_with_its_folder(tmp_path, place, known):
    """A thousand classes of somebody's own keep their numbers."""
    (tmp_path / "ImageNet2012").mkdir()
    write_bank(tmp_path / place, rows(1000, 8), torch.arange(1000))
    bank = MemoryBank.load(tmp_path / place)
    assert bank.class_name(281) == ("tabby, tabby cat" if known else "class 281")
    (tmp_path / place / "bank.json").write_text('{"model": "mine"}')
    assert MemoryBank.load(tmp_path / place).class_names is None


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_torch(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def save_as(way, path, tensor):
    """Save a tensor with torch, as a numpy array with torch, or with numpy, under the same name."""
    if way == "numpy":
        path.write_bytes(as_npy(tensor.numpy()))
    else:
        torch.save(tensor if way == "torch" else tensor.numpy(), path)


WAYS = ("torch", "torch of an array", "numpy")
INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_labels_of_any_kind(tmp_path, way, dtype):
    labels = torch.tensor([0, 100, 2, 100, 0])
    write_bank(tmp_path, rows(5, 4), labels)
    save_as(way, tmp_path / "trainlabels.pth", labels.to(getattr(torch, dtype)))
    bank = MemoryBank.load(tmp_path)
    assert bank.labels.dtype == torch.int64 and torch.equal(bank.labels, labels)
    assert bank.classify(rows(2, 4), k=5).votes.shape == (2, 101)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_features_of_torch_and_numpy(tmp_path, way, dtype):
    features = rows(40, 4).to(getattr(torch, dtype))
    write_bank(tmp_path, features, torch.arange(40))
    save_as(way, tmp_path / "trainfeat.pth", features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = MemoryBank.load(tmp_path)
    assert bank.features.dtype == (torch.float16 if dtype == "float16" else torch.float32)
    assert torch.equal(bank.features, features.to(bank.features.dtype))
    assert bank.nearest(features[7].float(), 1)[1].item() == 7


@pytest.mark.parametrize(
    "write",
    [
        lambda path, z: torch.save(z.numpy().astype(">f4"), path),
        lambda path, z: path.write_bytes(as_npy(z.numpy().astype(">f4"))),
        lambda path, z: torch.save(np.asfortranarray(z.numpy()), path),
        lambda path, z: path.write_bytes(as_npy(np.asfortranarray(z.numpy()))),
        lambda path, z: torch.save(z.numpy(), path, _use_new_zipfile_serialization=False),
        lambda path, z: torch.save(torch.nn.Parameter(z), path),
        lambda path, z: torch.save(z.t().contiguous().t(), path),
        lambda path, z: torch.save(torch.cat([z, z], dim=1)[:, :4], path),
    ],
)  # fmt: skip
def test_features_in_other_layouts(tmp_path, write):
    write_bank(tmp_path, rows(40, 4), torch.arange(40))
    write(tmp_path / "trainfeat.pth", rows(40, 4))
    bank = MemoryBank.load(tmp_path)
    assert torch.equal(bank.features, rows(40, 4)) and not bank.features.requires_grad
    assert bank.importance(rows(1, 4), k=3).shape == (1, 4)


def test_bfloat16_becomes_float32(tmp_path):
    bank = MemoryBank.load(write_bank(tmp_path, rows(40, 4).bfloat16(), torch.arange(40)))
    assert torch.equal(bank.features, rows(40, 4).bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0, r"the rows of .*{}feat.pth are not L2-normalised; .*\(2 of 9000 rows, the first is row 4097, of norm 0\)"),
        (1.1, r"the rows of .*{}feat.pth are not L2-normalised; .*, the first is row 4097, of norm 1.1\)"),
        (0.98, r"the rows of .*{}feat.pth are not L2-normalised; .*, the first is row 4097, of norm 0.98\)"),
        (torch.nan, r"{}feat.pth has NaN or infinite values; build it again \(2 of 9000 rows, the first is row 4097\)"),
        (torch.inf, r"{}feat.pth has NaN or infinite values; build it again \(2 of 9000 rows, the first is row 4097\)"),
    ],
)  # fmt: skip
def test_every_row_is_checked(tmp_path, dtype, split, factor, message):
    features = rows(9000, 4)
    features[[4097, 8999]] *= factor
    labels = torch.zeros(9000).long()
    write_bank(tmp_path, rows(9000, 4).to(dtype), labels)
    write_bank(tmp_path, features.to(dtype), labels, split)
    with pytest.raises(ValueError, match=message.format(split)):
        MemoryBank.load(tmp_path).read_test()
    with pytest.raises(ValueError, match=message.format(split)):
        read_pair(tmp_path, split)
    assert main(["info", str(tmp_path)]) == main(["eval", str(tmp_path)]) == 2


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
CUT = as_npy(rows(6, 4).numpy())[:-5]
ARCHIVE = io.BytesIO()
np.savez(ARCHIVE, features=rows(6, 4).numpy())
PLAIN = "should hold a plain tensor of real numbers, but has a"


def bank_json(text):
    """Return a function that writes a good bank of 6 rows and 3 classes, and this bank.json."""
    return bad("bank.json", text if isinstance(text, bytes) else json.dumps(text).encode())


def pipe(name):
    def write(folder):
        write_bank(folder, rows(6, 4), torch.arange(6) % 3)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "bank: there is no folder .*; build one: python -m memorybank build --model NAME"),
        (bad("trainfeat.pth", None), "bank: there is no file .*trainfeat.pth"),
        (bad("trainlabels.pth", None), "bank: there is no file .*trainlabels.pth"),
        (bad("trainfeat.pth", Evil()), "trainfeat.pth is damaged, or holds more than tensors and is not loaded"),
        (bad("trainfeat.pth", b"text"), "bank: .*trainfeat.pth (is damaged|cannot be read)"),
        (bad("trainfeat.pth", b""), "bank: .*trainfeat.pth is empty; copy or download it again"),
        (bad("trainfeat.pth", b"\n<!DOCTYPE html>"), "trainfeat.pth is a web page; the download failed"),
        (bad("trainlabels.pth", b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS; run"),
        (bad("trainfeat.pth", as_torch(rows(6, 4))[:-300]), "trainfeat.pth is cut off or damaged; copy or download"),
        (bad("trainfeat.pth", as_torch(rows(6, 4))[:100]), "trainfeat.pth is cut off or damaged; copy or download"),
        (bad("trainfeat.pth", {"features": rows(6, 4)}), "trainfeat.pth should hold a tensor, but has a dict"),
        (bad("trainfeat.pth", rows(6, 4)[0]), r"should hold features \(M, D\), float16 or float32, but has \(4,\)"),
        (bad("trainfeat.pth", torch.zeros(6, 0)), r"float16 or float32, but has \(6, 0\)"),
        (bad("trainfeat.pth", torch.ones(6, 4).long()), "float16 or float32, but has .* torch.int64"),
        (bad("trainfeat.pth", [rows(6, 4)]), "trainfeat.pth should hold a tensor, but has a list"),
        (bad("trainfeat.pth", rows(6, 4) + 0j), f"{PLAIN} complex tensor"),
        (bad("trainfeat.pth", rows(6, 4).to_sparse()), f"{PLAIN} sparse_coo tensor"),
        (bad("trainfeat.pth", rows(6, 4).to("meta")), f"{PLAIN} meta tensor"),
        (bad("trainfeat.pth", torch.quantize_per_tensor(rows(6, 4), 0.1, 0, torch.qint8)), f"{PLAIN} quantized tensor"),
        (bad("trainfeat.pth", rows(1, 4).expand(10**9, 4)), r"claims a shape of \(1000000000, 4\), but holds fewer"),
        (bad("trainlabels.pth", torch.zeros(1).long().expand(10**9)), r"claims a shape of \(1000000000,\)"),
        (bad("trainfeat.pth", CUT), "trainfeat.pth cannot be read: "),
        (bad("trainfeat.pth", CUT.replace(b"(6, 4), ", b"(9**9,4)")), "trainfeat.pth cannot be read: "),
        (bad("trainfeat.pth", CUT.replace(b"(6, 4), ", b"(60000,4000),")), "trainfeat.pth cannot be read: "),
        (bad("trainfeat.pth", as_npy(np.array(["a"] * 6))), "trainfeat.pth cannot be read: can't convert"),
        (bad("trainfeat.pth", np.array([None] * 6)), "trainfeat.pth cannot be read: numbers are expected, not"),
        (bad("trainfeat.pth", np.ma.masked_array(rows(6, 4).numpy())), "holds more than tensors and is not loaded"),
        (bad("trainfeat.pth", ARCHIVE.getvalue()), "trainfeat.pth is an archive of another kind; save one"),
        (pipe("trainfeat.pth"), "bank: there is no file .*trainfeat.pth"),
        (pipe("bank.json"), "bank: .*bank.json is not a file"),
        (bad("trainfeat.pth", NAN), "trainfeat.pth has NaN or infinite values; build it again"),
        (bad("trainfeat.pth", 2 * rows(6, 4)), "the rows of .*trainfeat.pth are not L2-normalised"),
        (bad("trainlabels.pth", torch.zeros(5).long()), "trainlabels.pth has 5 labels for 6 features"),
        (bad("trainlabels.pth", torch.zeros(6)), r"should hold integers \(M,\), but has \(6,\) torch.float32"),
        (bad("trainlabels.pth", torch.arange(6) - 1), "trainlabels.pth has the label -1; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6) << 40), "trainlabels.pth has the label .*; expected 0 to 999999"),
        (bad("trainlabels.pth", torch.arange(6), class_names=list("abc")), "has the label 5, but there are 3 classes"),
        (bad("bank.json", b"{"), "bank.json cannot be read as JSON"),
        (bank_json(b""), "bank.json cannot be read as JSON"),
        (bank_json(b'{"model": "\xff"}'), "bank.json cannot be read as JSON"),
        (bank_json(b"[" * 100_000), "bank.json is nested too deeply"),
        (bank_json(b'{"class_names": ' + b"[" * 100_000), "bank.json is nested too deeply"),
        (bank_json([]), r"bank.json: it should be an object, got \[\]"),
        (bank_json({"class_names": {"0": "cat"}}), 'bank.json: class_names should be a list or null, got {"0": "cat"}'),
        (bank_json({"class_names": 5}), "bank.json: class_names should be a list or null, got 5"),
        (bank_json({"class_names": ["a", 2, "c"]}), r"bank.json: class_names\[1\] should be a text, got 2"),
        (bank_json({"class_names": ["a", None, "c"]}), r"bank.json: class_names\[1\] should be a text, got null"),
        (bank_json({"class_names": []}), "trainlabels.pth has the label 2, but there are 0 classes"),
        (bank_json({"train": None}), "bank.json: train should be an object, got null"),
        (bank_json({"train": {"files": 7}}), "bank.json: train.files should be a list or null, got 7"),
        (bank_json({"train": {"files": [1] * 6}}), r"bank.json: train.files\[0\] should be a text, got 1"),
        (bank_json({"train": {"folder": 3}}), "bank.json: train.folder should be a text, got 3"),
        (bank_json({"train": {"count": -6}}), "bank.json: train.count is -6 for 6 features"),
        (bank_json({"train": {"count": 6.5}}), "bank.json: train.count should be a whole number, got 6.5"),
        (bank_json({"checkpoint": "x.pth"}), 'bank.json: checkpoint should be an object or null, got "x.pth"'),
        (bank_json({"checkpoint": {"file": None}}), "bank.json: checkpoint.file should be a text, got null"),
        (bank_json({"model": None}), "bank.json: model should be a text, got null"),
        (bank_json({"weights_sha256": 7}), "bank.json: weights_sha256 should be a text, got 7"),
        (bank_json({"versions": [1]}), r"bank.json: versions should be an object, got \[1\]"),
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


def test_nan_in_a_bank_that_was_not_loaded_is_found_by_the_query(tmp_path):
    features = rows(3000, 4)
    features[7] = torch.nan
    bank = MemoryBank(tmp_path, features, torch.zeros(3000).long(), None, None, {})
    with pytest.raises(ValueError, match="bank: .* has NaN or infinite values"):
        bank.nearest(rows(1, 4), 1)


def test_classes_may_have_one_name_or_no_image(tmp_path):
    labels = torch.tensor([0, 1, 3, 0, 1, 3])
    bank = MemoryBank.load(write_bank(tmp_path, rows(6, 4), labels, class_names=["a", "a", "b", "\x1b[31m", "c"]))
    assert bank.num_classes == 5 and bank.class_name(1) == "a" and bank.classify(rows(2, 4), 6).votes.shape == (2, 5)
    nulls = MemoryBank.load(write_bank(tmp_path, rows(6, 4), labels, class_names=None, checkpoint=None))
    assert nulls.class_names is None and nulls.num_classes == 4


@pytest.mark.parametrize(
    "folder", ["gone\nbank: fine", "a" * 5000, "nul\0l", "trainfeat.pth/x", "red\x1b[31m"], ids=lambda name: name[:9]
)
def test_odd_folders_are_one_line(tmp_path, folder):
    with pytest.raises(ValueError, match="bank: there is no folder") as error:
        MemoryBank.load(tmp_path / folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_a_device_that_is_not_there(tmp_path):
    write_bank(tmp_path, rows(6, 4), torch.arange(6))
    for device in ("hpu", "abacus", "cuda:77", "meta"):
        with pytest.raises(ValueError, match=f"device: '{device}' cannot be used: .*; pass another one") as error:
            MemoryBank.load(tmp_path, device)
        assert "\n" not in str(error.value)


def test_the_bank_of_another_model(tmp_path):
    folder = write_bank(tmp_path, rows(6, 4), torch.arange(6), model="mine", weights_sha256="1234")
    bank = MemoryBank.load(folder)
    bank.check_model("mine", 4, "1234")
    bank.check_model("the same weights under another name", 4, "1234")
    with pytest.raises(ValueError, match="was built with the model mine, not with other; build one with it: .* other"):
        bank.check_model("other", 4, "5678")
    with pytest.raises(ValueError, match="was built with other weights of mine"):
        bank.check_model("mine", 4, "5678")
