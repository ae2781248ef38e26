"""Fuzz test: whatever a file holds, the result is a value or one line of a ValueError, never a hang or a traceback.

Good files are spoiled by bytes and by structure (`mutations`), by fixed seeds. What is read from a spoiled file may be
any value: nobody can know that a bit of a pixel was another one.
"""

import io
import json
from random import Random

import numpy as np
import pytest
import safetensors.torch
import torch
from mutations import WRONG, spoil_bytes, spoil_structure, within
from PIL import Image
from tiny_banks import rows, write_bank, write_photo
from tiny_checkpoints import TINY
from tiny_models import tiny_timm
from tiny_records import make_photos, make_sanity, write_run

from command_line.names import own_folder
from evaluation.report import write_report
from memorybank import MemoryBank
from memorybank.build import build
from models import load
from models.images import read_image

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow and torch warn of what they read past


def result_or_line(call):
    """Return the result, or None after an error of one line; fail for anything else."""
    with within(20):
        try:
            return call()
        except ValueError as error:
            text = str(error)
            assert text.isprintable() and 0 < len(text) < 1000, text
            assert text.partition(":")[0].replace(" ", "").isalpha(), f"names no argument: {text}"


def spoiled(data, count, seed):
    for n in range(count):
        yield n, spoil_bytes(data, Random(f"{seed} {n}"))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
PICTURES = {
    "PNG": Image.fromarray(COLOURS),
    "JPEG": Image.fromarray(COLOURS),
    "WEBP": Image.fromarray(COLOURS),
    "GIF": Image.fromarray(COLOURS).quantize(16),
    "BMP": Image.fromarray(COLOURS),
    "TIFF": Image.fromarray(COLOURS[..., 0].astype(np.float32)),
    "PPM": Image.fromarray(COLOURS[..., 0].astype(np.uint16)),
    "TGA": Image.fromarray(COLOURS).convert("RGBA"),
    "JPEG2000": Image.fromarray(COLOURS),
    "ICO": Image.fromarray(COLOURS),
}


@pytest.mark.parametrize("format", PICTURES)
def test_pictures(tmp_path, format):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a picture"
    PICTURES[format].save(file, format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    read = 0
    for _, data in spoiled(file.getvalue(), 500, format):
        (tmp_path / "photo").write_bytes(data)
        image = result_or_line(lambda: read_image(tmp_path / "photo"))
        if image is not None:
            assert image.mode == "RGB" and min(image.size) >= 8
            read += 1
    assert 0 < read < 500  # some can be read, some cannot


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

METADATA = {"architecture": TINY, "model_args": json.dumps({"num_classes": 2}), "class_names": json.dumps(["a", "b"])}


@pytest.fixture(scope="module")
def state():
    return tiny_timm(TINY, num_classes=2).state_dict()


def loads(file):
    loaded = result_or_line(lambda: load(None if file.suffix == ".safetensors" else TINY, file))
    return loaded is not None and loaded.num_classes == loaded.model.num_classes


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy"])
def test_bytes_of_checkpoints(tmp_path, state, suffix):
    file, zipped = tmp_path / f"weights{suffix}", suffix == ".pth"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, file, METADATA)
    else:
        torch.save({"model": state, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for _, data in spoiled(whole, 150, suffix):
        file.write_bytes(data)
        loads(file)
    file.write_bytes(whole)
    assert loads(file)


def test_structure_of_checkpoints(tmp_path, state):
    small = {key: state[key] for key in list(state)[:3] + ["head.weight", "head.bias"]}
    whole = {"epoch": 3, "args": {"lr": 0.1}, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    file = tmp_path / "weights.pth"
    for n in range(150):
        random = Random(f"structure {n}")
        spoilt = spoil_structure(random.choice([whole, {"teacher": small, "student": small}, small, state]), random)
        if n % 2:
            spoilt = spoil_tensor(spoilt, random)
        torch.save(spoilt, file)
        loads(file)


def spoil_tensor(value, random):
    """Replace one tensor of nested dicts by one of another shape, layout or dtype."""
    tensors = [(value, key) for key in value if isinstance(value[key], torch.Tensor)] if isinstance(value, dict) else []
    below = [v for v in value.values() if isinstance(v, dict)] if isinstance(value, dict) else []
    if below and not tensors:
        spoil_tensor(random.choice(below), random)
    elif tensors:
        container, key = random.choice(tensors)
        tensor = container[key]
        container[key] = random.choice(
            [
                tensor[..., :0], tensor.unsqueeze(0), tensor.flatten(), tensor.to(torch.complex64), tensor.char(),
                tensor.to_sparse(), torch.zeros(1).expand(10**9), torch.empty(3, device="meta"), tensor * torch.nan,
            ]
        )  # fmt: skip
    return value


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_checkpoints(tmp_path, state, name):
    good = {"architecture": {"a": TINY}, "class_names": ["a", "b"], "model_args": {"num_classes": 2, "img_size": 160}}
    for n in range(60):
        random = Random(f"{name} {n}")
        text = str(random.choice(WRONG)) if name == "architecture" else json.dumps(spoil_structure(good[name], random))
        file = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(state, file, METADATA | {name: text})
        loads(file)


# ----------------------------------------------------------------------------------------------------------------------
# Banks
# ----------------------------------------------------------------------------------------------------------------------

BANK = {
    "model": TINY,
    "checkpoint": {"file": "a.pth", "sha256": "0"},
    "class_names": ["a", "b"],
    "train": {"count": 6, "folder": "photos", "files": [f"{n}.png" for n in range(6)], "unreadable": {}},
    "versions": {"torch": "2"},
}


def opens(folder):
    """Return whether a bank can be opened; if so, it also votes."""
    bank = result_or_line(lambda: MemoryBank.load(folder))
    if bank is not None:
        vote = result_or_line(lambda: bank.classify(torch.ones(bank.features.shape[1]), k=1))
        assert vote is None or torch.isfinite(vote.votes).all()
        result_or_line(lambda: bank.class_name(int(bank.labels[0])) and bank.file(0))
        result_or_line(lambda: bank.check_model("other", 4, "1"))
    return bank is not None


@pytest.mark.parametrize("name", ["trainfeat.pth", "trainlabels.pth", "bank.json"])
def test_bytes_of_banks(tmp_path, name):
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 2, **BANK)
    whole = (tmp_path / name).read_bytes()
    for _, data in spoiled(whole, 400, name):
        (tmp_path / name).write_bytes(data)
        opens(tmp_path)
    (tmp_path / name).write_bytes(whole)
    assert opens(tmp_path)


def test_structure_of_banks(tmp_path):
    write_bank(tmp_path, rows(6, 4), torch.arange(6) % 2)
    for n in range(400):
        (tmp_path / "bank.json").write_text(json.dumps(spoil_structure(BANK, Random(f"bank {n}"))))
        opens(tmp_path)
    for n in range(150):
        random = Random(f"tensors {n}")
        pair = spoil_tensor({"trainfeat": rows(6, 4), "trainlabels": torch.arange(6) % 2}, random)
        if n % 2:
            name = random.choice(list(pair))
            pair[name] = spoil_structure({"tensors": [pair[name]]}, random)
        for name, value in pair.items():
            torch.save(value, tmp_path / f"{name}.pth")
        opens(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Manifests
# ----------------------------------------------------------------------------------------------------------------------


def test_a_plan_in_the_way_of_a_build(tmp_path, state):
    torch.save({key: value for key, value in state.items() if not key.startswith("head")}, tmp_path / "weights.pth")
    loaded, plan = load(TINY, tmp_path / "weights.pth"), tmp_path / "bank" / ".building" / "plan.json"
    for n in range(4):
        write_photo(tmp_path / "photos" / "ab"[n % 2] / f"{n}.png", n)
    build(loaded, tmp_path / "photos", tmp_path / "bank", workers=0)
    before = (tmp_path / "bank" / "trainfeat.pth").read_bytes()
    good = {"model": "other", "dtype": "float16", "batch_size": 64, "train": "0" * 64}
    for n in range(30):
        plan.parent.mkdir(exist_ok=True)
        text = json.dumps(spoil_structure(good, Random(f"plan {n}"))).encode()
        plan.write_bytes(spoil_bytes(text, Random(n)) if n % 2 else text)
        result_or_line(lambda: build(loaded, tmp_path / "photos", tmp_path / "bank", workers=0))
        assert (tmp_path / "bank" / "trainfeat.pth").read_bytes() == before


def test_a_result_in_the_way_of_another(tmp_path):
    """A manifest that cannot be read belongs to somebody else, and stays."""
    folder, mine = tmp_path / "cat-tiger", {"model": "tiny", "image": {"sha256": "1"}, "target": {"index": 3}}
    folder.mkdir()
    for n in range(150):
        random = Random(f"flow {n}")
        text = json.dumps(spoil_structure(mine | {"image": {"sha256": "2"}, "checkpoint": None}, random)).encode()
        before = spoil_bytes(text, random) if n % 3 == 0 else text
        (folder / "flow.json").write_bytes(before)
        with own_folder(folder, mine) as own:
            assert own == tmp_path / "cat-tiger-2"
        assert (folder / "flow.json").read_bytes() == before and not own.exists()


@pytest.mark.parametrize("name", ["run.json", "photos.jsonl", "sanity.jsonl"])
def test_records_of_an_evaluation(tmp_path, name, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: file.touch())  # which takes long
    write_run(tmp_path, make_photos(3), make_sanity(2))
    whole = (tmp_path / name).read_text()
    for n in range(30):
        random = Random(f"{name} {n}")
        lines = whole.splitlines() if name.endswith("l") else [whole]
        i = random.randrange(len(lines))
        lines[i] = json.dumps(spoil_structure(json.loads(lines[i]), random))
        data = "\n".join(lines).encode() + b"\n"
        (tmp_path / name).write_bytes(spoil_bytes(data, random) if n % 3 == 0 else data)
        result_or_line(lambda: write_report(tmp_path))
