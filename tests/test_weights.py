"""Tests of weights: layouts of checkpoints, refused files, and servers that do not answer."""

import argparse
import http.server
import socket
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from tiny_checkpoints import TINY, by_facebook, refused, same_weights

import models
from models import load
from models.weights import first_line


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).eval()


# Layouts --------------------------------------------------------------------------------------------------------------


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
    message = "^model: w.safetensors does not name its architecture; pass the name of a model"
    refused(None, message, tmp_path / "w.safetensors")


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
    refused(TINY, "1 keys unknown .projector.weight.", tmp_path / "w.pth")


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


def test_fp16_weights_become_float32(tiny, tmp_path):
    state = {name: value.half() for name, value in tiny.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    assert load(TINY, tmp_path / "half.pth").model.head.weight.dtype == torch.float32


# Refusals -------------------------------------------------------------------------------------------------------------


def test_checkpoint_that_does_not_fit_names_the_keys(tiny, tmp_path):
    state = dict(tiny.state_dict())
    del state["blocks.3.attn.qkv.weight"]
    state["blocks.99.extra"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    error = refused(TINY, f"^checkpoint: w.pth does not fit {TINY}", tmp_path / "w.pth")
    for text in ("1 keys missing (blocks.3.attn.qkv.weight)", "1 keys unknown (blocks.99.extra)", "(norm.bias)"):
        assert text in str(error)


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
            r"holds more than tensors \(print\) and is not loaded, because .*; save the weights alone .*: "
            r"torch.save\(model.state_dict\(\), FILE\)$",
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
    assert str(refused(TINY, message, tmp_path / name)).startswith("checkpoint: ")
    assert "code ran" not in capsys.readouterr().out


# Servers --------------------------------------------------------------------------------------------------------------


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


def test_a_long_path_does_not_hide_the_way_out():
    error = ValueError(f"bank: {'a' * 1000} was built with {'b' * 300}; build one with it\nmore")
    assert first_line(error).endswith("; build one with it") and len(first_line(ValueError("a" * 9000))) == 2000
