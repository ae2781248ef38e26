"""The embedded models and the embedded bank, and the scripts that made them."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import timm
import torch
from onnx import helper, numpy_helper
from PIL import Image

from memorybank import MemoryBank, read_pair
from models import load, weights_sha256
from models.images import read_image

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "pretrainedmodels" / "vit_small_patch14_caltech101.safetensors"
SCRIPT = ROOT / "pretrainedmodels" / "train_caltech101.py"
sys.path.insert(0, str(SCRIPT.parent))
from train_caltech101 import backbone_from_onnx, split  # noqa: E402

BACKBONE = ROOT / "pretrainedmodels" / "vit_small_patch14_selfsupervised.safetensors"
BANK = ROOT / "memorybank" / "embedded"


@pytest.fixture(scope="module")
def embedded():
    return load("vit_small_patch14_caltech101")


@pytest.fixture(scope="module")
def pair():
    return load("vit_small_patch14_selfsupervised"), MemoryBank.load(BANK)


def test_the_file(embedded):
    with safetensors.safe_open(FILE, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert FILE.stat().st_size < 46_000_000
    assert len(embedded.class_names) == len(set(embedded.class_names)) == embedded.model.num_classes == 101
    assert embedded.size == (224, 224) and embedded.model.patch_embed.grid_size == (16, 16)
    card = FILE.with_suffix(".md").read_text(encoding="utf-8")
    assert "@@" not in card


def test_the_held_out_list(embedded):
    lines = (FILE.parent / "caltech101_held_out.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 101 * 12
    assert Counter(line.split("/")[0] for line in lines) == dict.fromkeys(embedded.class_names, 12)


@pytest.mark.parametrize(
    ("photo", "classes"),
    [
        ("coffee.png", {"cup"}),
        ("motorcycle_left.png", {"Motorbikes"}),
        ("china.jpg", {"pagoda"}),
        ("chelsea.png", {"cougar_face", "wild_cat"}),
        ("flower.jpg", {"sunflower", "water_lilly", "lotus"}),
    ],
)
@torch.inference_mode()
def test_it_knows_the_photos(embedded, photo, classes):
    scores = embedded.model(embedded.transform(read_image(ROOT / ".img" / photo)).unsqueeze(0))
    assert embedded.class_names[scores.argmax()] in classes


# The self-supervised pair ---------------------------------------------------------------------------------------------


def test_the_backbone(pair):
    with safetensors.safe_open(BACKBONE, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        assert not [key for key in file.keys() if key.startswith("head")]  # noqa: SIM118
    loaded, bank = pair
    assert BACKBONE.stat().st_size < 46_000_000 and loaded.model.num_classes == 0 and loaded.size == (224, 224)
    bank.check_model(loaded.name, loaded.num_features, weights_sha256(loaded.model))
    for card in (BACKBONE.with_suffix(".md"), BANK / "README.md"):
        assert "@@" not in card.read_text(encoding="utf-8")


def test_the_first_blocks_are_those_of_the_classifier(pair, embedded):
    """Both began with the same frozen blocks; the last four were trained."""
    ours, theirs = pair[0].model.state_dict(), embedded.model.state_dict()
    same = {name for name, value in ours.items() if torch.equal(value, theirs[name])}
    trained = {
        name for name in ours if name.startswith(("norm.", "blocks.8.", "blocks.9.", "blocks.10.", "blocks.11."))
    }
    assert same.isdisjoint(name for name in trained if name.endswith("weight")) and same >= ours.keys() - trained


def test_the_bank_holds_the_training_photos(pair, embedded):
    _, bank = pair
    assert bank.class_names == embedded.class_names and bank.features.shape == (7465, 384)
    assert bank.features.dtype == torch.float16 and (BANK / "trainfeat.pth").stat().st_size < 6_000_000
    held_out = set((FILE.parent / "caltech101_held_out.txt").read_text().split("\n"))
    assert len(set(bank.files)) == 7465 and not set(bank.files) & held_out
    assert [bank.class_names[label] for label in bank.labels] == [file.split("/")[0] for file in bank.files]
    features, labels = read_pair(BANK, "test")
    assert len(features) == 1212 and torch.equal(labels.bincount(), torch.full((101,), 12))


def test_the_accuracy_of_the_card(pair):
    """k = 20, T = 0.07, the stored features of the held-out photos against those of the training photos."""
    features, labels = read_pair(BANK, "test")
    right = (pair[1].classify(features.float()).prediction == labels).float()
    accuracy = (torch.bincount(labels, right) / torch.bincount(labels)).mean().item()
    said = re.search(r"\*\*([\d.]+) %\*\*", BACKBONE.with_suffix(".md").read_text(encoding="utf-8"))[1]
    assert f"{100 * accuracy:.1f}" == said


@pytest.mark.parametrize(
    ("photo", "classes"),
    [
        ("coffee.png", {"cup"}),
        ("motorcycle_left.png", {"Motorbikes"}),
        ("flower.jpg", {"sunflower", "water_lilly", "lotus"}),
    ],
)
@torch.inference_mode()
def test_its_neighbours_know_the_photos(pair, photo, classes):
    loaded, bank = pair
    vote = bank.classify(loaded.features(loaded.transform(read_image(ROOT / ".img" / photo)).unsqueeze(0)))
    assert bank.class_names[vote.prediction] in classes


# The training scripts -------------------------------------------------------------------------------------------------


def export(backbone, path):
    """A file like the exported one: plain names for biases and norms, anonymous transposed weights of MatMul nodes."""
    theirs, nodes = {}, []

    def matmul(node, weight):
        theirs[f"onnx::MatMul_{len(nodes)}"] = weight.T
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], name=f"/{node}/MatMul"))

    stem = "backbone.embeddings."
    theirs[f"{stem}cls_token"] = backbone["cls_token"]
    theirs[f"{stem}patch_embeddings.projection.weight"] = backbone["patch_embed.proj.weight"]
    theirs[f"{stem}patch_embeddings.projection.bias"] = backbone["patch_embed.proj.bias"]
    theirs["onnx::Reshape_1"], theirs["onnx::Concat_2"] = backbone["pos_embed"][:, 1:], backbone["pos_embed"][:, :1]
    theirs["backbone.layernorm.weight"], theirs["backbone.layernorm.bias"] = (
        backbone["norm.weight"],
        backbone["norm.bias"],
    )
    nodes.append(
        helper.make_node("MatMul", ["q", "k"], ["a"], name="/backbone/encoder/layer.0/attention/attention/MatMul")
    )
    for i in range(12):
        block, layer = f"blocks.{i}.", f"backbone.encoder.layer.{i}."
        node = f"backbone/encoder/layer.{i}/"
        for name, part in zip(("query", "key", "value"), backbone[f"{block}attn.qkv.weight"].chunk(3)):
            matmul(f"{node}attention/attention/{name}", part)
        for name, part in zip(("query", "key", "value"), backbone[f"{block}attn.qkv.bias"].chunk(3)):
            theirs[f"{layer}attention.attention.{name}.bias"] = part
        for name, own in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            matmul(node + name, backbone[f"{block}{own}.weight"])
            theirs[layer + name.replace("/", ".") + ".bias"] = backbone[f"{block}{own}.bias"]
        for n in (1, 2):
            theirs[f"{layer}norm{n}.weight"] = backbone[f"{block}norm{n}.weight"]
            theirs[f"{layer}norm{n}.bias"] = backbone[f"{block}norm{n}.bias"]
            theirs[f"{layer}layer_scale{n}.lambda1"] = backbone[f"{block}ls{n}.gamma"]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in theirs.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "export", [], [], tensors)), path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Random weights as an ONNX file, and three classes of 14 photos."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    export(backbone, folder / "backbone.onnx")
    rng = np.random.default_rng(0)
    for name, colour in (("b", 200), ("A", 30), ("c", 120), ("BACKGROUND_Google", 0)):
        (folder / "photos" / name).mkdir(parents=True)
        for n in range(14):
            pixels = rng.integers(0, 40, (30, 40, 3)) + colour
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / name / f"image_{n:04d}.jpg")
    return folder, backbone


def test_backbone_from_onnx(work):
    folder, backbone = work
    read = backbone_from_onnx(folder / "backbone.onnx")
    assert read.keys() == backbone.keys()
    assert all(torch.equal(read[name], backbone[name]) for name in backbone)


def test_split(work):
    classes, train, held_out = split(work[0] / "photos")
    assert classes == ["A", "b", "c"]
    assert len(train) == 3 * 2 and len(held_out) == 3 * 12 and not {p for p, _ in train} & {p for p, _ in held_out}
    assert all(path.parent.name == classes[label] for path, label in train + held_out)
    assert split(work[0] / "photos") == (classes, train, held_out)


def test_the_training_script_resumes_and_ends_with_a_model_that_loads(work):
    folder, _ = work
    command = [
        sys.executable, SCRIPT, "--data", folder / "photos", "--onnx", folder / "backbone.onnx",
        "--work", folder / "state", "--out", folder / "model.safetensors",
        "--views", "1", "--epochs", "1", "--batch", "3", "--workers", "0", "--device", "cpu",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "epoch 1/2: 64 patches" in first.stdout and "epoch 2/2: 256 patches" in first.stdout
    assert "model.safetensors: mean class accuracy" in first.stdout and "of 36 photos" in first.stdout
    loaded = load(None, folder / "model.safetensors")
    assert loaded.class_names == ["A", "b", "c"] and loaded.model.num_classes == 3
    assert len((folder / "caltech101_held_out.txt").read_text().splitlines()) == 36

    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "goes on after epoch 2" in again.stdout and "epoch 1/2" not in again.stdout


def test_the_selfsupervised_script_resumes_and_ends_with_a_model_that_loads(work):
    folder, backbone = work
    command = [
        sys.executable, SCRIPT.with_name("train_selfsupervised.py"), "--data", folder / "photos", "--onnx",
        folder / "backbone.onnx", "--work", folder / "ssl", "--out", folder / "ssl.safetensors", "--views", "2",
        "--view-size", "42", "--keep", "4", "--epochs", "2", "--alone", "1", "--batch", "3", "--queue", "6",
        "--looked-at", "4", "--workers", "0", "--device", "cpu",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "at the start: leave-one-out k-NN" in first.stdout and "epoch 2/2: loss" in first.stdout
    loaded = load(None, folder / "ssl.safetensors")
    assert loaded.model.num_classes == 0 and loaded.size == (224, 224)
    state = loaded.model.state_dict()
    assert torch.equal(state["blocks.7.attn.qkv.weight"], backbone["blocks.7.attn.qkv.weight"].half().float())
    assert not torch.equal(state["blocks.8.attn.qkv.weight"], backbone["blocks.8.attn.qkv.weight"].half().float())
    assert len(list((folder / "ssl" / "train").rglob("*.jpg"))) == 6
    assert all(link.is_file() for link in (folder / "ssl" / "held_out").rglob("*.jpg"))

    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "goes on after epoch 2" in again.stdout and "epoch 1/2" not in again.stdout
