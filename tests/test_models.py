"""Tests of timm models: names, the hub and its cache, the transform, class names."""

import dataclasses
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from PIL import Image
from timm.models import get_pretrained_cfg
from tiny_checkpoints import TINY, fake_cache, refused, same_weights

import models
from models import WeightsUnavailable, find_class, load

ROOT = Path(__file__).resolve().parent.parent


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


class Malicious:
    def __reduce__(self):
        return (print, ("code ran while weights were loaded",))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_pickle_runs_no_code(tmp_path, monkeypatch, capfd, name):
    """Whatever its suffix is, and whatever the installed timm would do with it."""
    state = timm.create_model(TINY).state_dict()
    file = fake_cache(tmp_path, timm.get_pretrained_cfg(TINY).hf_hub_id, state)
    file.unlink()
    torch.save(state | {"other": Malicious()}, file.with_name(name))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailable, match=rf"could not be loaded: checkpoint: {name} holds more than tensors"):
        load(TINY)
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_cached_weights_of_either_format(tmp_path, monkeypatch, name):
    state = timm.create_model(TINY).state_dict()
    file = fake_cache(tmp_path, timm.get_pretrained_cfg(TINY).hf_hub_id, state)
    file.unlink()
    torch.save(state, file.with_name(name))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    loaded = load(TINY)
    assert same_weights(loaded.model, state) and loaded.checkpoint.name == name
    assert "state_dict" not in loaded.model.pretrained_cfg  # it would hold all weights twice


def from_address(monkeypatch, tmp_path, name, url, **settings):
    """Let the weights of an architecture come from an address, as those of older timm models do."""
    config = dataclasses.replace(get_pretrained_cfg(name), hf_hub_id=None, hf_hub_filename=None, url=url, **settings)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, config)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, f"{name}.{config.tag}", config)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    (tmp_path / "torch" / "checkpoints").mkdir(parents=True, exist_ok=True)


def test_weights_from_an_address(tmp_path, monkeypatch):
    """They are fetched once, into the cache of torch.hub, and the hash in their name is checked."""
    state = timm.create_model(TINY).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    tag = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "w.pth").rename(tmp_path / f"w-{tag}.pth")
    monkeypatch.setattr(models.weights, "reachable", lambda *_: True)
    from_address(monkeypatch, tmp_path, TINY, (tmp_path / f"w-{tag}.pth").as_uri())
    loaded = load(TINY)
    assert same_weights(loaded.model, state)
    assert loaded.checkpoint == tmp_path / "torch" / "checkpoints" / f"w-{tag}.pth"
    monkeypatch.setattr(models.weights, "reachable", lambda *_: pytest.fail("the network was asked"))
    assert load(TINY).checkpoint == loaded.checkpoint
    monkeypatch.setattr(models.weights, "reachable", lambda *_: True)
    (tmp_path / f"w-{tag}.pth").rename(tmp_path / "w-00000000.pth")
    from_address(monkeypatch, tmp_path, TINY, (tmp_path / "w-00000000.pth").as_uri())
    refused(TINY, f"the weights of {TINY} could not be loaded: invalid hash value")
    assert not (tmp_path / "torch" / "checkpoints" / "w-00000000.pth").exists()


def test_arrays_of_jax_are_read_by_timm_without_pickle(tmp_path, monkeypatch):
    from_address(monkeypatch, tmp_path, TINY, "http://127.0.0.1:9/w.npz", custom_load=True)
    np.savez(tmp_path / "torch" / "checkpoints" / "w.npz", **{"embedding/kernel": np.array([Malicious()])})
    error = refused(TINY, f"the weights of {TINY} could not be loaded: ")
    assert isinstance(error, WeightsUnavailable)
    read = []
    monkeypatch.setattr(timm.models.VisionTransformer, "load_pretrained", lambda self, path: read.append(path))
    assert load(TINY).checkpoint.name == "w.npz" and read == [str(tmp_path / "torch" / "checkpoints" / "w.npz")]


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("HF_HUB_OFFLINE", TINY),
        ("TRANSFORMERS_OFFLINE", "hf:some/vit"),
        ("HF_HUB_OFFLINE", "torchvision:vit_b_16"),
    ],
)
def test_offline_means_no_connection(tmp_path, variable, name):
    """In a process of its own, because the libraries read the variable when they are imported."""
    asked = []

    class Count(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Count) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
        environment = os.environ | proxies | {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path),
            "NO_PROXY": "", "no_proxy": "",
        }  # fmt: skip
        code = f"from models import load\ntry:\n    load({name!r})\nexcept ValueError as error:\n    print(error)"
        answers = []
        for settings in ({variable: "1"}, {variable: "0"}):
            run = subprocess.run(
                [sys.executable, "-c", code], env=environment | settings, cwd=ROOT, capture_output=True, text=True
            )
            answers.append((run.stdout, len(asked)))
        server.shutdown()
    (offline, before), (_, after) = answers
    assert f"the weights of {name} are not cached and {variable} forbids a download; unset it, or pass" in offline
    assert before == 0 and after > 0, "the server would not have noticed a connection"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 3}, "model: expected a name, got int"),
        ({"name": b"test_vit"}, "model: expected a name, got bytes"),
        ({"name": Path("w.pth")}, "model: expected a name, got .*Path"),
        ({"name": "test_vit", "checkpoint": 3}, "checkpoint: expected a path, got int"),
        ({"name": "test_vit", "checkpoint": True}, "checkpoint: expected a path, got bool"),
        ({"name": "test_vit", "checkpoint": b"w.pth"}, "checkpoint: expected a path, got bytes"),
    ],
)
def test_arguments_of_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        load(**arguments)


@pytest.mark.parametrize("device", ["hpu", "abacus", "", "meta", torch.device("meta"), -1, []])
def test_devices_that_cannot_be_used(device):
    with pytest.raises(ValueError, match=r"^device: '.*' cannot be used: .*; pass another one$"):
        load("vit_small_patch14_caltech101", device=device)


def test_a_folder_without_a_name_is_named():
    with pytest.raises(ValueError, match="checkpoint: . is a folder"):
        load("test_vit", "")
