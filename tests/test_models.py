"""Models: names, hub cache, checkpoints, class names; images: every kind of file that people have."""

import argparse
import http.server
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants as hub
from PIL import Image, ImageOps
from tiny_checkpoints import by_facebook, fake_cache

import models
from models import WeightsUnavailable, find_class, load
from models.images import find_images, read_image, resize_longest_side

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).eval()


def same_weights(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "model", "teacher", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_pth_layouts(tiny, tmp_path, key, prefix):
    state = {prefix + name: value for name, value in tiny.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "weights.pth")
    loaded = load(TINY, tmp_path / "weights.pth")
    assert same_weights(loaded.model, tiny.state_dict())
    assert loaded.model.num_classes == loaded.num_classes == 7 and not loaded.model.training
    assert loaded.name == TINY and loaded.checkpoint == tmp_path / "weights.pth" and loaded.class_names is None


def test_safetensors_without_metadata_takes_the_name_and_width_from_the_weights(tiny, tmp_path):
    safetensors.torch.save_file(tiny.state_dict(), tmp_path / "w.safetensors")
    assert same_weights(load(TINY, tmp_path / "w.safetensors").model, tiny.state_dict())
    with pytest.raises(ValueError, match="model: w.safetensors does not say what architecture it is; name one"):
        load(None, tmp_path / "w.safetensors")


def test_safetensors_with_metadata_names_itself(tiny, tmp_path):
    metadata = {"architecture": TINY, "class_names": '["a","b","c","d","e","f","g"]'}
    safetensors.torch.save_file(tiny.state_dict(), tmp_path / "mine.safetensors", metadata)
    loaded = load(None, tmp_path / "mine.safetensors")
    assert loaded.name == "mine" and loaded.class_names == list("abcdefg")


def test_the_projection_head_beside_a_backbone_is_left_out(tiny, tmp_path):
    backbone = {f"module.backbone.{n}": v for n, v in tiny.state_dict().items() if not n.startswith("head.")}
    torch.save({"teacher": backbone | {"module.head.mlp.0.weight": torch.zeros(3, 3)}}, tmp_path / "dino.pth")
    assert load(TINY, tmp_path / "dino.pth").num_classes == 0


def test_a_classifier_beside_a_backbone_is_kept_and_strangers_are_named(tiny, tmp_path):
    own = dict(tiny.state_dict())
    state = {name if name.startswith("head.") else f"backbone.{name}": value for name, value in own.items()}
    torch.save(state, tmp_path / "w.pth")
    assert same_weights(load(TINY, tmp_path / "w.pth").model, own)
    torch.save(state | {"projector.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="1 keys unknown .projector.weight."):
        load(TINY, tmp_path / "w.pth")


XCIT = "xcit_nano_12_p16_224"


@pytest.fixture(scope="module")
def xcit():
    torch.manual_seed(0)
    model = timm.create_model(XCIT, num_classes=0)
    for value in [*model.parameters(), *model.buffers()]:
        value.data.copy_(torch.rand_like(value, dtype=torch.float32) * 100)  # two tensors alike would hide a mix-up
    return model.state_dict()


@pytest.mark.parametrize("full", [False, True])
def test_self_supervised_xcit_in_the_layout_of_dino(xcit, tmp_path, full):
    backbone = by_facebook(xcit)
    assert sum("pos_embeder" in name for name in backbone) == 2 and sum("cls_attn" in name for name in backbone) > 20
    assert len(backbone) == len(xcit) - 8  # two blocks, in which q, k, v are one; weight and bias
    if full:
        head = {"mlp.0.weight": torch.zeros(3, 3), "last_layer.weight_g": torch.zeros(3, 1)}
        teacher = {f"module.backbone.{k}": v for k, v in backbone.items()}
        teacher |= {f"module.head.{k}": v for k, v in head.items()}
        backbone = {
            "student": {k: torch.zeros_like(v) for k, v in teacher.items()},
            "teacher": teacher,
            "optimizer": {"state": {0: {"step": 7}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "epoch": 300,
            "args": argparse.Namespace(
                arch="xcit_small_12_p16", local_crops_scale=(0.05, 0.25), output_dir=Path("out")
            ),
            "dino_loss": {"center": torch.zeros(1, 3)},
            "fp16_scaler": None,
        }
    torch.save(backbone, tmp_path / "dino_xcit.pth")
    loaded = load(XCIT, checkpoint=tmp_path / "dino_xcit.pth")
    assert same_weights(loaded.model, xcit)
    assert loaded.num_classes == 0 and loaded.size == (224, 224)


def test_an_embedded_name_takes_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="has its own weights; for a checkpoint name vit_small_patch14_dinov2"):
        load("vit_small_patch14_caltech101", tmp_path / "w.pth")


def test_fp16_weights_become_float32(tiny, tmp_path):
    state = {name: value.half() for name, value in tiny.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    assert load(TINY, tmp_path / "half.pth").model.head.weight.dtype == torch.float32


def test_checkpoint_that_does_not_fit_names_the_keys(tiny, tmp_path):
    state = dict(tiny.state_dict())
    del state["blocks.3.attn.qkv.weight"]
    state["blocks.99.extra"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="checkpoint: w.pth does not fit vit_tiny_patch16_224") as error:
        load(TINY, tmp_path / "w.pth")
    for text in ("1 keys missing (blocks.3.attn.qkv.weight)", "1 keys unknown (blocks.99.extra)", "(norm.bias)"):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran while a checkpoint was loaded",))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.pth", lambda path: None, "there is no file"),
        (
            "code.pth",
            lambda path: torch.save({"model": Malicious()}, path),
            "holds more than tensors and is not loaded",
        ),
        ("text.pth", lambda path: path.write_text("not weights"), "checkpoint: text.pth"),
        ("empty.pth", lambda path: path.write_bytes(b""), "checkpoint: empty.pth"),
        ("cut.safetensors", lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"), "cannot be read"),
        ("list.pth", lambda path: torch.save([1, 2], path), "has no state dict"),
        ("mixed.pth", lambda path: torch.save({"a": 1}, path), "has no state dict"),
        ("numbered.pth", lambda path: torch.save({0: torch.zeros(1)}, path), "has no state dict"),
    ],
)
def test_unreadable_checkpoints(tmp_path, capsys, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load(TINY, tmp_path / name)
    assert str(error.value).startswith("checkpoint: ") and "\n" not in str(error.value)
    assert "code ran" not in capsys.readouterr().out


# Names and the hub ----------------------------------------------------------------------------------------------------


def test_unknown_name_gets_suggestions():
    with pytest.raises(ValueError, match=r"model: 'deit_smal_patch16_224' .* did you mean .*deit_small_patch16_224"):
        load("deit_smal_patch16_224")
    with pytest.raises(ValueError, match=r"did you mean xcit_small_12_p16_224, xcit_small_12_p16_384"):
        load("xcit_small_12_p16")
    with pytest.raises(ValueError, match="model: name one"):
        load()


def test_name_without_pretrained_weights(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    for checkpoint in (None, tmp_path / "w.pth"):
        with pytest.raises(
            ValueError, match="^model: there are no pretrained weights 'deit_small_patch16_224.nothing'; timm has"
        ):
            load("deit_small_patch16_224.nothing", checkpoint)
        with pytest.raises(
            ValueError, match="^model: 'vit_small_patch16_224_dino' is an old .* vit_small_patch16_224.dino"
        ):
            load("vit_small_patch16_224_dino", checkpoint)


@pytest.mark.parametrize("arguments", ['{"no_such": 1}', "{"])
def test_metadata_that_fit_no_model(tiny, tmp_path, arguments):
    metadata = {"architecture": TINY, "model_args": arguments}
    safetensors.torch.save_file(tiny.state_dict(), tmp_path / "mine.safetensors", metadata)
    with pytest.raises(ValueError, match=f"^checkpoint: mine.safetensors does not fit {TINY}: "):
        load(None, tmp_path / "mine.safetensors")


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


def test_reachable():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for Answer.status, reachable in (
            (200, True),
            (404, True),
            (401, True),
            (503, False),
            (403, False),
            (407, False),
        ):
            assert models.weights.reachable(f"http://127.0.0.1:{server.server_port}") == reachable, Answer.status
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        assert not models.weights.reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)


def test_the_transform_squashes_and_follows_the_data_config(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    loaded = load(TINY, tmp_path / "w.pth")
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (150, 0, 300, 100))  # the right half is white
    tensor = loaded.transform(picture)
    mean, std = tiny.pretrained_cfg["mean"][0], tiny.pretrained_cfg["std"][0]
    assert tensor.shape == (3, 224, 224) and loaded.size == (224, 224)
    torch.testing.assert_close(tensor[0, :, 5], torch.full((224,), (0 - mean) / std))
    torch.testing.assert_close(tensor[0, :, -5], torch.full((224,), (1 - mean) / std))  # nothing was cropped
    assert (tensor[0, 100] > 0).sum() == 112


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
        ("crane", NAMES, "'crane' is the name of the classes 0, 3; give the index"),
        ("taby", NAMES, "no class is called 'taby'; near names: tabby"),
        ("cat", NAMES, "near names: .*tabby cat"),
        ("xylophone", NAMES, "no class is called 'xylophone'; give an index"),
        ("5", NAMES, "class 5 is out of range; there are 5 classes, from 0 on"),
        ("-1", NAMES, "class -1 is out of range"),
        ("--1", NAMES, "no class is called '--1'"),
        ("²", NAMES, "no class is called '²'"),
        ("dog", None, "the class names of this model are not known; give the index of 'dog'"),
    ],
)
def test_find_class_errors(name, names, message):
    with pytest.raises(ValueError, match=f"target: .*{message}"):
        find_class(name, names, 5)


# Images ---------------------------------------------------------------------------------------------------------------


def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize((40, 30), Image.Resampling.BILINEAR)


def near(a, b, tolerance):
    return a.size == b.size and np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= tolerance


def test_colour_modes_show_the_same_picture(tmp_path):
    rgb, grey = picture(), picture().convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cases = {
        "rgb.png": (rgb, rgb, 0),
        "grey.png": (grey, grey.convert("RGB"), 0),
        "sixteen.png": (sixteen, grey.convert("RGB"), 0),
        "sixteen.tif": (sixteen, grey.convert("RGB"), 0),
        "palette.png": (rgb.quantize(64), rgb.quantize(64).convert("RGB"), 0),
        "rgba.png": (rgb.convert("RGBA"), rgb, 0),
        "grey_alpha.png": (grey.convert("LA"), grey.convert("RGB"), 0),
        "cmyk.jpg": (rgb.convert("CMYK"), rgb, 40),
        "one_bit.png": (grey.convert("1"), grey.convert("1").convert("RGB"), 0),
    }
    for name, (stored, expected, tolerance) in cases.items():
        stored.save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and near(image, expected, tolerance), name


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture().save(tmp_path / "turned.png", exif=exif)
    assert near(read_image(tmp_path / "turned.png"), picture().transpose(Image.Transpose.ROTATE_270), 0)


def test_float_and_32_bit_images_are_stretched(tmp_path):
    values = np.linspace(-3, 9, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert read_image(tmp_path / "float.tif").getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.jpg", lambda p: None, "does not exist"),
        ("text.jpg", lambda p: p.write_text("hello"), "is not an image that Pillow can read"),
        ("zero.jpg", lambda p: p.write_bytes(b""), "is empty"),
        ("one.png", lambda p: Image.new("RGB", (1, 1)).save(p), "has 1 x 1 pixels; the least is 8 x 8"),
        ("folder.png", lambda p: p.mkdir(), "cannot be read"),
    ],
)
def test_bad_images(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_image(tmp_path / name)
    assert str(error.value).startswith(f"image: {tmp_path / name}") and "\n" not in str(error.value)


def test_truncated_jpeg(tmp_path):
    picture().resize((400, 300)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read: .*truncated"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("times", [1.5, 3])  # Pillow warns above its limit and refuses above twice that
def test_decompression_bomb(tmp_path, monkeypatch, times):
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 * 300 / times))
    with pytest.raises(ValueError, match="million pixels; scale it down"):
        read_image(tmp_path / "bomb.png")


def test_fitted():
    """As Pillow's `contain`, but for pictures that this would make 0 pixels narrow."""
    for size in ((600, 400), (401, 600), (20, 20)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        expected = ImageOps.contain(image, (320, 320), Image.Resampling.BICUBIC)
        assert resize_longest_side(image, 320).size == expected.size and np.array_equal(
            resize_longest_side(image, 320), expected
        )
    assert resize_longest_side(Image.new("RGB", (8, 6000)), 320).size == (1, 320)


def test_find_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="image: the folder .* has no images"):
        find_images(tmp_path)
    for name in ("b.JPG", "a.png", ".hidden.png"):
        picture().convert("RGB").save(tmp_path / name, "PNG")
    (tmp_path / "c.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "b.JPG"]
    assert find_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    shutil.rmtree(tmp_path / "c.png")
    with pytest.raises(ValueError, match="image: there is no file"):
        find_images(tmp_path / "gone")
