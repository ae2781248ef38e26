"""Tests of the embedded models and the embedded bank."""

import re
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import torch

from memorybank import MemoryBank, read_pair
from models import load, weights_sha256
from models.images import read_image

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "pretrainedmodels" / "vit_small_patch14_caltech101.safetensors"
ROPE = ROOT / "pretrainedmodels" / "vit_small_patch14_rope_caltech101.safetensors"
BACKBONE = ROOT / "pretrainedmodels" / "vit_small_patch14_selfsupervised.safetensors"
BANK = ROOT / "memorybank" / "embedded"


@pytest.fixture(scope="module")
def embedded():
    return load("vit_small_patch14_caltech101")


@pytest.fixture(scope="module")
def pair():
    return load("vit_small_patch14_selfsupervised"), MemoryBank.load(BANK)


# The classifier -------------------------------------------------------------------------------------------------------


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


# The classifier with rotary positions ---------------------------------------------------------------------------------


def test_the_classifier_with_rotary_positions(embedded):
    with safetensors.safe_open(ROPE, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    loaded = load("vit_small_patch14_rope_caltech101")
    model = loaded.model
    assert type(model).__name__ == "Eva" and model.rope is not None and len(model.blocks) == 11
    assert model.num_prefix_tokens == 1 + 4 and loaded.size == (224, 224)
    assert loaded.class_names == embedded.class_names and ROPE.stat().st_size < 42_000_000
    assert "@@" not in ROPE.with_suffix(".md").read_text(encoding="utf-8")
    photos = ("chelsea.png", "motorcycle_left.png")
    images = torch.stack([loaded.transform(read_image(ROOT / ".img" / photo)) for photo in photos])
    with torch.inference_mode():
        found = [loaded.class_names[k] for k in model(images).argmax(1)]
    assert found == ["cougar_face", "Motorbikes"]


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
    """Both models started with the same frozen blocks; only the last four were trained."""
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
    """The card states the k-NN accuracy of the stored held-out features with k = 20 and T = 0.07."""
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
