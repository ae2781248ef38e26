"""Tests of the metadata of checkpoints: architectures, arguments and class names that anybody may have written."""

import json
import os

import pytest
import safetensors.torch
import timm
import torch
from tiny_checkpoints import TINY, refused, same_weights

from models import load


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=3).eval().state_dict()


def with_metadata(state, tmp_path, **metadata):
    file = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(state, file, {"architecture": TINY} | metadata)
    return file


# The architecture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:some/model", "hf_hub:some/model", "local-dir:{folder}", "{folder}", "../test_vit", "timm/test_vit", "",
        "test_vit\x1b[31m", "test_vit\n", "x" * 5000, "hf:{folder}", "torchvision:vit_b_16",
        "vit_small_patch14_caltech101",
    ],
)  # fmt: skip
def test_only_names_of_timm_are_built(tiny, tmp_path, monkeypatch, name):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY, "num_classes": 3, "pretrained_cfg": {}}))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a model was built"))
    file = with_metadata(tiny, tmp_path, architecture=name.format(folder=tmp_path))
    error = str(refused(None, "is neither a timm name nor an embedded model", file))
    assert len(error) < 300 and "\x1b" not in error
    if name.startswith(("hf-hub", "hf_hub", "local")):  # the same name on the command line
        refused(name.format(folder=tmp_path), "is neither a timm name nor an embedded model")


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_path": "{folder}/code.pth"}, "'checkpoint_path' is not an argument that a file may set"),
        ({"pretrained": True}, "'pretrained' is not an argument"),
        ({"pretrained_cfg": {"url": "http://127.0.0.1:9/w.pth"}}, "'pretrained_cfg' is not an argument"),
        ({"pretrained_cfg_overlay": {"file": "{folder}/code.pth"}}, "'pretrained_cfg_overlay' is not an argument"),
        ({"cache_dir": "{folder}"}, "'cache_dir' is not an argument"),
        ({"model_name": "hf-hub:a/b"}, "'model_name' is not an argument"),
        ({"features_only": True}, "'features_only' is not an argument"),
        ({"no_such\x1b[31m": 1}, r"'no_such\\\\x1b\[31m' is not an argument"),
        ({"depth": 100_000}, "depth should be from 1 to 256"),
        ({"depth": 0}, "depth should be from 1 to 256"),
        ({"depth": 2.5}, "depth should be a whole number or null, got 2.5"),
        ({"depth": "9"}, "depth should be a whole number or null"),
        ({"depth": True}, "depth should be a whole number or null"),
        ({"depth": [[1]]}, "depth should be a whole number or null"),
        ({"embed_dim": 10**30}, "embed_dim should be from 1 to 8192"),
        ({"in_chans": 1}, "in_chans should be from 3 to 3"),
        ({"num_classes": -1}, "num_classes should be from 0 to 1000000"),
        ({"img_size": [160]}, "img_size should be one number, or the height and the width"),
        ({"img_size": [160, 0]}, "img_size should be from 1 to 4096"),
        ({"img_size": [160, "160"]}, r"img_size\[1\] should be a whole number"),
        ({"img_size": {"height": 160}}, "img_size should be a whole number or a list or null"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio should be a number or null, got NaN"),
        ({"global_pool": "http://127.0.0.1:9"}, "global_pool should be one of avg, avgmax, max, token, map"),
        ({"class_token": 1}, "class_token should be true or false or null"),
        ([], "it should be an object"),
        (None, "it should be an object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"depth":' * 100_000, "is nested too deeply"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_arguments_that_are_refused(tiny, tmp_path, arguments, message):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pth")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    file = with_metadata(tiny, tmp_path, model_args=text.replace("{folder}", str(tmp_path)))
    refused(None, f"^checkpoint: mine.safetensors: model_args:? ?{message}", file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 5}, "2 keys of another shape"),
        ({"depth": 200, "embed_dim": 8192}, "it has only a small part of the weights"),
        ({"patch_size": 1, "img_size": 4096}, "it has only a small part of the weights"),
        ({"num_heads": 7}, "does not fit test_vit: "),
        ({"window_size": 7}, "does not fit test_vit: .*window_size"),
    ],
)
def test_arguments_of_another_model(tiny, tmp_path, arguments, message):
    refused(None, f"mine.safetensors .*{message}", with_metadata(tiny, tmp_path, model_args=json.dumps(arguments)))


def test_arguments_that_are_used(tmp_path):
    arguments = {
        "num_classes": 4, "img_size": [64, 96], "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2,
        "reg_tokens": 1, "qkv_bias": False, "global_pool": "avg", "init_values": 0.1, "class_token": True,
        "drop_rate": None,
    }  # fmt: skip
    model = timm.create_model(TINY, **arguments)
    loaded = load(None, with_metadata(model.state_dict(), tmp_path, model_args=json.dumps(arguments)))
    assert same_weights(loaded.model, model.state_dict()) and len(loaded.model.blocks) == 2
    assert loaded.size == (64, 96) and loaded.num_classes == 4 and loaded.model.global_pool == "avg"


def test_arguments_of_eva(tmp_path):
    arguments = {
        "num_classes": 4, "img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2,
        "num_reg_tokens": 3, "swiglu_mlp": True, "use_abs_pos_emb": True,
    }  # fmt: skip
    model = timm.create_model("vit_small_patch16_rope_224", **arguments)
    stated = {"model_args": json.dumps(arguments), "architecture": "vit_small_patch16_rope_224"}
    loaded = load(None, with_metadata(model.state_dict(), tmp_path, **stated))
    assert same_weights(loaded.model, model.state_dict()) and loaded.model.num_prefix_tokens == 4


# Class names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('["a", "b"]', "has 2 names, but the model has 3 classes"),
        ("[]", "has 0 names, but the model has 3 classes"),
        ('["a", "b", null]', r"\[2\] should be a text, got null"),
        ('["a", "b", 3]', r"\[2\] should be a text, got 3"),
        ('{"0": "a"}', "it should be a list, got"),
        ("null", "it should be a list, got null"),
        ("5", "it should be a list, got 5"),
        ("[" * 100_000, "is nested too deeply"),
        ("a, b, c", "cannot be read as JSON"),
    ],
)
def test_class_names_that_are_refused(tiny, tmp_path, names, message):
    file = with_metadata(tiny, tmp_path, class_names=names)
    refused(None, f"^checkpoint: mine.safetensors: class_names:? ?{message}", file)


def test_class_names_are_on_one_line_each(tiny, tmp_path):
    file = with_metadata(tiny, tmp_path, class_names=json.dumps(["a\x1b[31m", "b\nc", "貓"]))
    assert load(None, file).class_names == [r"a\x1b[31m", r"b\nc", "貓"]


def test_names_of_imagenet_are_not_lent(tmp_path):
    """1,000 classes of one's own are not those of ImageNet, and 11,821 or 21,841 are not its other subsets."""
    for number in (1000, 11821):
        torch.save(timm.create_model(TINY, num_classes=number).state_dict(), tmp_path / "w.pth")
        loaded = load(TINY, tmp_path / "w.pth")
        assert loaded.num_classes == number and loaded.class_names is None


def test_a_file_does_not_name_a_path(tiny, tmp_path, monkeypatch):
    """What stands in the metadata never decides which other file is opened."""
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: opened.append(str(file)) or real(file, *a, **k))
    file = with_metadata(tiny, tmp_path, config=os.fspath(tmp_path / "other"), url="http://127.0.0.1:9")
    load(None, file)
    assert {name for name in opened if str(tmp_path) in name} <= {str(file)}
