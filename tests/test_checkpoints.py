"""Tests of checkpoint files: their format, what may lie beside the weights, and files that are not read."""

import argparse
import collections
import datetime
import decimal
import io
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import types
import uuid
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from tiny_checkpoints import TINY, refused, same_weights

from models import architecture_of, load, read_checkpoint
from models.checkpoints import HARMLESS


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).eval().state_dict()


# The format -----------------------------------------------------------------------------------------------------------


def in_legacy_format(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [safetensors.torch.save_file, torch.save, in_legacy_format])
@pytest.mark.parametrize(
    "name", ["w.safetensors", "w.SAFETENSORS", "w.bin", "w.pth", "w.ckpt", "w", "w.png", "ü \n.pt"]
)
def test_the_content_tells_the_format(tiny, tmp_path, write, name):
    write(tiny, tmp_path / name)
    assert same_weights(load(TINY, tmp_path / name).model, tiny)


def test_metadata_are_found_whatever_the_suffix(tiny, tmp_path):
    safetensors.torch.save_file(tiny, tmp_path / "mine.bin", {"architecture": TINY})
    assert architecture_of(tmp_path / "mine.bin") == TINY
    assert load(None, tmp_path / "mine.bin").name == "mine"
    torch.save(tiny, tmp_path / "mine.safetensors")
    assert architecture_of(tmp_path / "mine.safetensors") is architecture_of(tmp_path / "none") is None


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def archive(path, name="notes.txt"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "text")


def cut(write, keep):
    def write_part(path):
        write(timm.create_model(TINY).state_dict(), path)
        path.write_bytes(path.read_bytes()[:keep])

    return write_part


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no file "),
        (lambda path: path.mkdir(), "w.pth is a folder; pass the file in it, or --model hf:PATH"),
        (lambda path: os.mkfifo(path), "w.pth is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "w.pth is not a regular file"),
        (lambda path: path.symlink_to(path), "there is no file "),
        (lambda path: path.touch(), "w.pth is empty; copy or download it again"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "is a pointer of Git LFS"),
        (
            lambda path: path.write_text("\ufeff \n<!DOCTYPE html><title>404</title>"),
            "is a web page, .* download failed",
        ),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08 0000"), "is compressed by gzip; unpack it"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
        (lambda path: path.write_text('{"weight_map": {}}'), "is not a file of weights; pass"),
        (lambda path: path.write_bytes(b"\0" * 9999), "is not a file of weights; pass"),
        (script, r"is a TorchScript archive, .*; save its weights: torch.save\(torch.jit.load\(FILE\)"),
        (tar, "is in the tar format of PyTorch 0.1"),
        (archive, "is a ZIP archive without weights"),
        (lambda path: archive(path, "weights/w.npy"), "is a NumPy archive"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "is an array of NumPy"),
        (cut(torch.save, 5_000), "is cut off or damaged .*; copy or download it again"),
        (cut(safetensors.torch.save_file, 5_000), "is cut off or damaged .*; copy or download it again"),
        (cut(safetensors.torch.save_file, 500_000), "is cut off or damaged .*; copy or download it again"),
        (cut(in_legacy_format, 400), "is cut off or damaged .*; copy or download it again"),
        (cut(in_legacy_format, 500_000), "is cut off or damaged .*; copy or download it again"),
        (lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000), "is not a file of weights"),
        (lambda path: path.write_bytes(struct.pack("<Q", 99_999) + b'{"a":' + b"[" * 99_994), "is cut off or damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, write, message):
    write(tmp_path / "w.pth")
    refused(TINY, f"^checkpoint: {message}" if message.startswith("there") else message, tmp_path / "w.pth")
    assert architecture_of(tmp_path / "w.pth") is None


@pytest.mark.parametrize("name", ["w" * 5000, "w\0.pth"])
def test_names_that_no_file_can_have(tmp_path, name):
    assert len(str(refused(TINY, "there is no file", tmp_path / name))) < 300


def test_a_name_with_control_characters_is_escaped(tmp_path):
    (tmp_path / "a\x1b[31m\nb.pth").touch()
    refused(TINY, r"checkpoint: a\\x1b\[31m\\nb.pth is empty", tmp_path / "a\x1b[31m\nb.pth")


# Beside the weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [torch.save, in_legacy_format])
def test_harmless_values_beside_the_weights(tiny, tmp_path, write):
    filled = collections.defaultdict(list, a=[1], b=[2])
    values = {
        "numpy": [np.float64(1), np.int64(2), np.bool_(True), np.dtype("float32"), np.float32, np.arange(3)],
        "object array": np.array([{"a": 1}], dtype=object),
        "dates": [
            datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
            datetime.date(2026, 1, 1),
            datetime.timedelta(1),
        ],
        "dicts": [filled, collections.OrderedDict(a=1), collections.Counter("ab"), collections.deque([1], 3)],
        "others": [{1, 2}, frozenset([3]), slice(1, 2), 1j, b"bytes", decimal.Decimal(1), uuid.uuid4(), 1 << 99],
        "options": [argparse.Namespace(lr=np.float64(1)), types.SimpleNamespace(a=1), pathlib.Path("out")],
        "torch": [torch.__version__, torch.float16, torch.device("cpu"), torch.Size([1]), torch.zeros(2).to_sparse()],
        "random": np.random.RandomState(0).get_state(),
        "generator": np.random.default_rng(0),
    }
    for name, value in values.items():
        write({"model": tiny, "extra": value}, tmp_path / "w.pth")
        try:
            assert same_weights(load(TINY, tmp_path / "w.pth").model, tiny)
        except ValueError as error:
            pytest.fail(f"{name}: {error}")


def test_stand_ins_run_no_code():
    """They are made from anything, and ignore it; only a dict of attributes is kept."""
    for cls in HARMLESS:
        made = cls("rm", -1, key=print)
        assert made in ([], {}) or vars(made) == {}
        if hasattr(made, "__setstate__"):
            made.__setstate__((print, 1))
            made.__setstate__({"__class__": print, "size": 3})
            assert type(made) is cls and made.size == 3


def test_allowed_types_are_allowed_only_while_a_checkpoint_is_read(tiny, tmp_path):
    before = list(torch.serialization.get_safe_globals())
    torch.save(tiny, tmp_path / "w.pth")
    read_checkpoint(tmp_path / "w.pth")
    assert torch.serialization.get_safe_globals() == before


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Callback:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Malicious(print, "code ran"), r"\(print\)"),
        (Malicious(os.system, "echo code ran"), r"\((posix|nt).system\)"),
        (Malicious(eval, "print('code ran')"), r"\(eval\)"),
        (Malicious(getattr, "text", "upper"), r"\(getattr\)"),
        (Malicious(torch.jit.load, "other.pth"), r"\(torch.jit._serialization.load\)"),
        (Malicious(pickle.loads, b"N."), r"\(_?pickle.loads\)"),
        (Malicious(np.load, "other.npy"), r"\(numpy.*load\)"),
        (Callback(), r"\(test_checkpoints.Callback\)"),
        (torch.nn.Linear(1, 1), r"\(torch.nn.modules.linear.Linear\)"),
    ],
)
@pytest.mark.parametrize("write", [torch.save, in_legacy_format])
def test_other_types_are_named_and_run_no_code(tiny, tmp_path, capfd, write, value, named):
    write({"model": tiny, "callback": value}, tmp_path / "w.pth")
    refused(TINY, rf"w.pth holds more than tensors {named} and is not loaded, .*; save the weights", tmp_path / "w.pth")
    assert "code ran" not in capfd.readouterr().out


def test_a_whole_model_is_refused_with_the_way_out(tmp_path):
    torch.save(timm.create_model(TINY), tmp_path / "w.pth")
    message = (
        r"holds more than tensors \(timm\..*\).*; save the weights alone .*: torch.save\(model.state_dict\(\), FILE\)$"
    )
    refused(TINY, message, tmp_path / "w.pth")


# Structure ------------------------------------------------------------------------------------------------------------


def by_opcodes(path, opcodes):
    """Write a file in torch's legacy format whose object is made of opcodes of pickle."""
    with open(path, "wb") as file:
        for value in (
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        ):
            pickle.dump(value, file, protocol=2)
        file.write(b"\x80\x02" + opcodes + b".")
        pickle.dump([], file, protocol=2)


def loop(key):
    value = {"epoch": 3}
    value[key] = value
    return value


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], 7, None, "text", {}, {"a": 1}, {"model": {}}, {"model": None}, {"model": {"a": 1}}, torch.zeros(3),
        {0: torch.zeros(1)}, {b"a": torch.zeros(1)}, {("a",): torch.zeros(1), "b": torch.zeros(2)},
        {"n_averaged": torch.tensor(3)}, loop("model"), loop("teacher"), {"model": loop("state_dict")},
    ],
)  # fmt: skip
def test_content_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refused(TINY, "w.pth has no state dict, not even under state_dict_ema, .*; save one: ", tmp_path / "w.pth")


@pytest.mark.parametrize("opening", [b"]", b"}"])
def test_a_hundred_thousand_levels(tmp_path, opening):
    closing = b"a" if opening == b"]" else b"s"
    key = b"" if opening == b"]" else b"X\x05\0\0\0model"
    depth = 100_000
    by_opcodes(tmp_path / "w.pth", (opening + key) * depth + b"N" + closing * depth)
    refused(TINY, "w.pth has no state dict", tmp_path / "w.pth")


def test_a_state_dict_beside_a_loop_is_found(tiny, tmp_path):
    content = loop("ema")
    content["module"] = tiny
    torch.save(content, tmp_path / "w.pth")
    assert same_weights(load(TINY, tmp_path / "w.pth").model, tiny)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to_sparse(), "is sparse"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is quantized"),
        (lambda value: value.to(torch.complex64), "is complex"),
        (lambda value: value.to("meta"), "is meta"),
        (lambda value: value.to(torch.int8), r"1 keys of whole numbers \(norm.weight\)"),
        (lambda value: value > 0, r"1 keys of whole numbers \(norm.weight\)"),
        (lambda value: value.reshape(2, -1), r"1 keys of another shape \(norm.weight\)"),
        (lambda value: value[:1].expand(10**9, len(value)), "would grow from .* bytes and is not loaded"),
        (lambda value: value[0], r"1 keys of another shape \(norm.weight\)"),
    ],
)
def test_tensors_that_are_no_weights(tiny, tmp_path, change, message):
    torch.save(tiny | {"norm.weight": change(tiny["norm.weight"])}, tmp_path / "w.pth")
    refused(TINY, f"checkpoint: w.pth.*{message}", tmp_path / "w.pth")


def test_a_zip_bomb(tmp_path):
    torch.save({"a": torch.zeros(30_000_000)}, tmp_path / "big.pth")
    with zipfile.ZipFile(tmp_path / "big.pth") as big, zipfile.ZipFile(tmp_path / "w.pth", "w") as small:
        for item in big.infolist():
            small.writestr(item.filename, big.read(item), zipfile.ZIP_DEFLATED)
    (tmp_path / "big.pth").unlink()
    assert (tmp_path / "w.pth").stat().st_size < 200_000
    refused(TINY, "w.pth would grow from .* to 120,.* bytes and is not loaded", tmp_path / "w.pth")


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions of Unix")
def test_a_file_that_may_not_be_read(tiny, tmp_path):
    torch.save(tiny, tmp_path / "w.pth")
    (tmp_path / "w.pth").chmod(0)
    if not os.access(tmp_path / "w.pth", os.R_OK):  # root may read everything
        refused(TINY, "w.pth cannot be opened: Permission denied", tmp_path / "w.pth")
