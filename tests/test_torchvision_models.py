"""Tests of `load("torchvision:...")` with local caches and checkpoints."""

import shutil
from functools import partial
from typing import Optional

import pytest
import torch
import torchvision.models
from huggingface_hub import constants as hub
from PIL import Image
from tiny_checkpoints import refused
from torchvision.models import VisionTransformer, Weights, WeightsEnum
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import models
from models import WeightsUnavailable, load

CLOSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "ENDPOINT", CLOSED)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


class TinyWeights(WeightsEnum):
    FIRST = Weights(
        url=f"{CLOSED}/tiny-01234567.pth",
        transforms=partial(ImageClassification, crop_size=32, resize_size=40),
        meta={"categories": ["tench", "tabby", "cup"]},
    )
    SECOND = Weights(
        url=f"{CLOSED}/tiny_large-01234567.pth",
        transforms=partial(ImageClassification, crop_size=48, mean=(0.5,) * 3, std=(0.5,) * 3,
                           interpolation=InterpolationMode.BICUBIC),
        meta={"categories": ["tench", "tabby", "cup"]},
    )  # fmt: skip
    DEFAULT = FIRST


def tiny_vit(*, weights: Optional[TinyWeights] = None, progress: bool = True, image_size=32, num_classes=3):  # noqa: UP045
    """Build a model as torchvision's own builders do."""
    if weights is not None:
        image_size, num_classes = weights.transforms().crop_size[0], len(weights.meta["categories"])
    model = VisionTransformer(image_size, 8, 2, 2, 24, 48, num_classes=num_classes)
    torch.nn.init.normal_(model.heads.head.weight)  # zeros otherwise
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Register `tiny_vit` with torchvision, with the weights of both entries in the cache of torch.hub."""
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "tiny_vit", tiny_vit)
    (tmp_path / "torch" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    made = {}
    for entry, size in ((TinyWeights.FIRST, 32), (TinyWeights.SECOND, 48)):
        made[entry.name] = tiny_vit(image_size=size).eval()
        torch.save(made[entry.name].state_dict(), tmp_path / "torch" / "checkpoints" / entry.url.rsplit("/")[-1])
    return made


@pytest.mark.parametrize(
    ("name", "entry", "size", "mean", "blend"),
    [("tiny_vit", "FIRST", 32, 0.485, "bilinear"), ("tiny_vit.SECOND", "SECOND", 48, 0.5, "bicubic")],
)
def test_torchvision(tiny, tmp_path, monkeypatch, name, entry, size, mean, blend):
    monkeypatch.setattr(models.torchvision_models, "require_server", lambda *_: pytest.fail("the network was asked"))
    loaded = load(f"torchvision:{name}")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), tiny[entry](images))
        torch.testing.assert_close(loaded.model.heads(loaded.features(images)), tiny[entry](images))
    assert loaded.name == f"torchvision:{name}" and not loaded.model.training
    assert loaded.num_classes == 3 and loaded.class_names == ["tench", "tabby", "cup"]
    assert loaded.checkpoint == tmp_path / "torch" / "checkpoints" / TinyWeights[entry].url.rsplit("/")[-1]
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (150, 0, 300, 100))
    tensor = loaded.transform(picture)
    assert tensor.shape == (3, *loaded.size) == (3, size, size)
    std = TinyWeights[entry].transforms().std[0]
    torch.testing.assert_close(tensor[0, :, -1], torch.full((size,), (1 - mean) / std))
    assert (tensor[0, 0] > (0.5 - mean) / std).sum() == size // 2
    assert blend in str(loaded.transform)


def test_torchvision_without_cache_and_network(tiny, tmp_path):
    shutil.rmtree(tmp_path / "torch")
    error = refused("torchvision:tiny_vit", "the weights of torchvision:tiny_vit are not cached and http.* reached")
    assert isinstance(error, WeightsUnavailable)


def test_torchvision_with_a_damaged_cache(tiny, tmp_path):
    for file in (tmp_path / "torch" / "checkpoints").iterdir():
        file.write_bytes(b"not weights")
    error = refused("torchvision:tiny_vit", "the weights of torchvision:tiny_vit could not be loaded: ")
    assert isinstance(error, WeightsUnavailable)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran while weights were loaded",))


def test_a_cached_pickle_runs_no_code(tiny, tmp_path, capfd):
    for file in (tmp_path / "torch" / "checkpoints").iterdir():
        torch.save(tiny["FIRST"].state_dict() | {"other": Malicious()}, file)
    refused("torchvision:tiny_vit", r"could not be loaded: checkpoint: tiny-01234567.pth holds more than tensors")
    assert "code ran" not in capfd.readouterr().out


def test_a_download_is_checked_against_the_hash_in_its_name(tiny, tmp_path, monkeypatch):
    file = tmp_path / "torch" / "checkpoints" / "tiny-01234567.pth"
    file.rename(tmp_path / file.name)
    asked = []

    def download(url, target, hash_prefix, progress=True):
        asked.append((url, hash_prefix))
        shutil.copy(tmp_path / file.name, target)

    monkeypatch.setattr(models.weights, "reachable", lambda *_: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert load("torchvision:tiny_vit").checkpoint == file
    assert asked == [(TinyWeights.FIRST.url, "01234567")]
    assert "get_state_dict" not in vars(TinyWeights)  # torchvision is left as it was


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b_61", "torchvision has no 'vit_b_61'; did you mean vit_b_16"),
        ("", "torchvision has no ''; torchvision.models.list_models"),
        (
            "vit_b_16.SWAG",
            "torchvision's vit_b_16 has no weights 'SWAG'; "
            "it has IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1, IMAGENET1K_SWAG_LINEAR_V1$",
        ),
        ("fasterrcnn_resnet50_fpn", "does not classify images"),
    ],
)
def test_torchvision_names(name, message):
    refused(f"torchvision:{name}", message)


@pytest.mark.parametrize("classes", [3, 5])
def test_a_checkpoint_decides_the_classes_and_the_size(tiny, tmp_path, classes):
    model = tiny_vit(image_size=40, num_classes=classes).eval()
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "mine.pth")
    shutil.rmtree(tmp_path / "torch")
    loaded = load("torchvision:tiny_vit.SECOND", tmp_path / "mine.pth")
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert loaded.num_classes == classes and loaded.size == (40, 40)
    assert loaded.class_names is None  # of whatever the file was trained for
    assert loaded.checkpoint == tmp_path / "mine.pth"
    torch.testing.assert_close(loaded.transform(Image.new("RGB", (9, 9), "white")), torch.ones(3, 40, 40))


def test_a_checkpoint_that_does_not_fit_torchvision(tiny, tmp_path):
    state = dict(tiny["FIRST"].state_dict())
    del state["encoder.ln.bias"]
    torch.save(state | {"stranger": torch.zeros(1)}, tmp_path / "w.pth")
    refused(
        "torchvision:tiny_vit",
        r"^checkpoint: w.pth does not fit tiny_vit: 1 keys missing \(encoder.ln.bias\); 1 keys unknown \(stranger\)$",
        tmp_path / "w.pth",
    )
    refused("torchvision:squeezenet1_0", "^checkpoint: w.pth does not fit squeezenet1_0: ", tmp_path / "w.pth")
