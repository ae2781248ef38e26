"""Tests of timm models: names, the hub and its cache, the transform, class names."""

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from PIL import Image
from tiny_checkpoints import TINY, fake_cache, refused, same_weights

import models
from models import WeightsUnavailable, find_class, load


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).eval()


# Names and the hub ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_smal_patch16_224", "^model: 'deit_smal_patch16_224' .* did you mean .*deit_small_patch16_224"),
        ("xcit_small_12_p16", "did you mean xcit_small_12_p16_224, xcit_small_12_p16_384"),
        ("vit_b_16", "did you mean torchvision:vit_b_16"),
        ("google/vit-base-patch16-224", "did you mean hf:google/vit-base-patch16-224"),
        (None, "^model: name one, or pass a checkpoint"),
    ],
)
def test_unknown_names_get_suggestions(name, message):
    refused(name, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "deit_small_patch16_224.nothing",
            "^model: there are no pretrained weights 'deit_small_patch16_224.nothing'; timm has",
        ),
        (
            "vit_small_patch16_224_dino",
            "^model: 'vit_small_patch16_224_dino' is a deprecated .* vit_small_patch16_224.dino",
        ),
    ],
)
def test_names_without_weights_are_refused_also_beside_a_checkpoint(tiny, tmp_path, name, message):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    refused(name, message)
    refused(name, message, tmp_path / "w.pth")


def test_an_embedded_name_takes_no_checkpoint(tmp_path):
    message = "has its own weights; to load a checkpoint, name vit_small_patch14_dinov2"
    refused("vit_small_patch14_caltech101", message, tmp_path / "w.pth")


def test_cached_weights_are_used_without_asking_the_network(tmp_path, monkeypatch):
    torch.manual_seed(1)
    state = timm.create_model(TINY).state_dict()
    file = fake_cache(tmp_path, timm.get_pretrained_cfg(TINY).hf_hub_id, state)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models.weights, "reachable", lambda *_: pytest.fail("the network was asked"))
    loaded = load(TINY)
    assert same_weights(loaded.model, state)
    assert loaded.checkpoint.samefile(file)
    assert loaded.class_names[281] == "tabby, tabby cat"


def test_no_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsUnavailable, match="not cached and http://127.0.0.1:9 cannot be reached") as error:
        load(TINY)
    assert "\n" not in str(error.value)


def test_the_transform_squashes_and_follows_the_data_config(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    loaded = load(TINY, tmp_path / "w.pth")
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (150, 0, 300, 100))  # the right half is white
    tensor = loaded.transform(picture)
    mean, std = tiny.pretrained_cfg["mean"][0], tiny.pretrained_cfg["std"][0]
    assert tensor.shape == (3, 160, 160) and loaded.size == (160, 160)
    torch.testing.assert_close(tensor[0, :, 5], torch.full((160,), (0 - mean) / std))
    torch.testing.assert_close(tensor[0, :, -5], torch.full((160,), (1 - mean) / std))  # nothing was cropped
    assert (tensor[0, 100] > 0).sum() == 80


# Class names ----------------------------------------------------------------------------------------------------------


NAMES = ["crane", "tabby, tabby cat", "wild_cat", "crane", "Faces_easy"]


@pytest.mark.parametrize(
    ("name", "index"), [("tabby", 1), ("Tabby-Cat", 1), ("wild cat", 2), ("faces easy", 4), ("3", 3)]
)
def test_find_class(name, index):
    assert find_class(name, NAMES, 5) == index


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("crane", NAMES, "'crane' is the name of the classes 0, 3; pass the index"),
        ("taby", NAMES, "no class is called 'taby'; near names: tabby"),
        ("cat", NAMES, "near names: .*tabby cat"),
        ("xylophone", NAMES, "no class is called 'xylophone'; pass an index"),
        ("5", NAMES, "class 5 is out of range; there are 5 classes, from 0 on"),
        ("-1", NAMES, "class -1 is out of range"),
        ("--1", NAMES, "no class is called '--1'"),
        ("²", NAMES, "no class is called '²'"),
        ("dog", None, "the class names of this model are not known; pass the index of 'dog'"),
    ],
)
def test_find_class_errors(name, names, message):
    with pytest.raises(ValueError, match=f"target: .*{message}"):
        find_class(name, names, 5)
