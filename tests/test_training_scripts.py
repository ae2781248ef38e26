"""Tests of the scripts that trained the embedded models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from PIL import Image

from daam_core import attention_flow
from models import load, read_checkpoint

SCRIPTS = Path(__file__).resolve().parent.parent / "pretrainedmodels"
sys.path.insert(0, str(SCRIPTS))
import train_caltech101  # noqa: E402
import train_rope  # noqa: E402
import train_selfsupervised  # noqa: E402
from train_caltech101 import backbone_from_onnx, split  # noqa: E402


def export(backbone, path):
    """Write a file like the exported one: MatMul weights are anonymous and transposed, all others have plain names."""
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
    """A folder with random weights as an ONNX file, and three classes of 14 photos."""
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


@pytest.fixture
def run(work, monkeypatch, capsys):
    """Run a script in this process, at 56 px, 4 x 4 patches; return what it prints."""
    monkeypatch.setattr(train_caltech101, "SIZE", 56)
    monkeypatch.setattr(train_selfsupervised, "SIZE", 56)
    small = ["--data", work[0] / "photos", "--batch", 3, "--workers", 0, "--device", "cpu"]

    def run_script(script, *more):
        more += ("--onnx", work[0] / "backbone.onnx") if script != train_rope else ()
        monkeypatch.setattr("sys.argv", [script.__file__, *map(str, [*small, *more])])
        script.main()
        return capsys.readouterr().out

    return run_script


def test_the_training_script_resumes_and_ends_with_a_model_that_loads(work, run):
    folder, _ = work
    out = folder / "model.safetensors"
    options = ["--out", out, "--work", folder / "state", "--views", 1, "--epochs", 1]
    printed = run(train_caltech101, *options)
    assert "epoch 1/2: 4 patches" in printed and "epoch 2/2: 16 patches" in printed
    assert "model.safetensors: mean class accuracy" in printed and "of 36 photos" in printed
    loaded = load(None, out)
    assert loaded.class_names == ["A", "b", "c"] and loaded.model.num_classes == 3 and loaded.size == (56, 56)
    assert len((folder / "caltech101_held_out.txt").read_text().splitlines()) == 36

    printed = run(train_caltech101, *options)
    assert "resuming after epoch 2" in printed and "epoch 1/2" not in printed


def test_the_selfsupervised_script_resumes_and_ends_with_a_model_that_loads(work, run):
    folder, backbone = work
    out = folder / "ssl.safetensors"
    options = ["--out", out, "--work", folder / "ssl", "--views", 2, "--view-size", 42, "--keep", 4, "--epochs", 2,
               "--alone", 1, "--queue", 6, "--looked-at", 4]  # fmt: skip
    printed = run(train_selfsupervised, *options)
    assert "at the start: leave-one-out k-NN" in printed and "epoch 2/2: loss" in printed
    loaded = load(None, out)
    assert loaded.model.num_classes == 0 and loaded.size == (56, 56)
    state = loaded.model.state_dict()
    assert torch.equal(state["blocks.7.attn.qkv.weight"], backbone["blocks.7.attn.qkv.weight"].half().float())
    assert not torch.equal(state["blocks.8.attn.qkv.weight"], backbone["blocks.8.attn.qkv.weight"].half().float())
    assert len(list((folder / "ssl" / "train").rglob("*.jpg"))) == 6
    assert all(link.is_file() for link in (folder / "ssl" / "held_out").rglob("*.jpg"))

    printed = run(train_selfsupervised, *options)
    assert "resuming after epoch 2" in printed and "epoch 1/2" not in printed


@pytest.fixture
def teacher(tmp_path):
    """A file with a random classifier of the three classes."""
    torch.manual_seed(1)
    sizes = {"img_size": 56, "num_classes": 3}
    model = timm.create_model("vit_small_patch14_dinov2", **sizes)
    train_caltech101.store(model, tmp_path / "teacher.safetensors", sizes, class_names='["A", "b", "c"]')
    return tmp_path / "teacher.safetensors"


def test_the_rope_script_resumes_and_ends_with_a_model_that_loads(work, run, teacher, tmp_path):
    out = tmp_path / "rope.safetensors"
    options = ["--out", out, "--work", tmp_path / "rope", "--teacher", teacher, "--epochs", 1, "--keep", 0.25]
    printed = run(train_rope, *options)
    assert "epoch 1/2: 4 patches" in printed and "epoch 2/2: 8 patches" in printed
    assert "rope.safetensors: mean class accuracy" in printed and "of 36 photos" in printed
    assert read_checkpoint(out).metadata["architecture"] == train_rope.ARCHITECTURE
    loaded = load(None, out)
    assert type(loaded.model).__name__ == "Eva" and loaded.model.rope and loaded.model.num_prefix_tokens == 5
    assert loaded.class_names == ["A", "b", "c"] and loaded.model.num_classes == 3 and loaded.size == (56, 56)
    for variant in ("paper", "relevance"):
        flow = attention_flow(loaded.model, torch.randn(1, 3, 56, 56), variant=variant)
        assert flow.accumulated.shape == (1, 11, 4, 4) and flow.accumulated.isfinite().all()

    printed = run(train_rope, *options)
    assert "resuming after epoch 2" in printed and "epoch 1/2" not in printed


def test_the_converted_model_is_the_teacher_but_for_rotary_positions_and_registers(monkeypatch):
    monkeypatch.setattr(train_rope, "BLOCKS", (0, 2))
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    teacher = timm.create_model("vit_tiny_patch16_224", **sizes, depth=3, init_values=0.5).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options = train_rope.ARGUMENTS | sizes | {"depth": 2, "num_reg_tokens": 0}
    student = timm.create_model(train_rope.ARCHITECTURE, **options, use_rot_pos_emb=False).eval()
    images = torch.randn(2, 3, 56, 56)
    train_rope.convert(teacher, student)
    teacher.blocks = teacher.blocks[::2]
    with torch.no_grad():
        torch.testing.assert_close(student(images), teacher(images), atol=1e-4, rtol=1e-4)


def test_the_student_runs_on_its_patches(teacher):
    torch.manual_seed(0)
    sizes = {"img_size": 56, "num_classes": 3}
    student = timm.create_model(train_rope.ARCHITECTURE, **train_rope.ARGUMENTS | sizes).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        middle, logits = train_rope.run_student(student, images, torch.arange(16))
        torch.testing.assert_close(logits, student(images))
        last = train_rope.BLOCKS.index(train_rope.MIDDLE - 1)
        reached = student.forward_intermediates(images, indices=[last], intermediates_only=True, output_fmt="NLC")[0]
        torch.testing.assert_close(middle[:, 1:], reached)


def test_mirror():
    cells = torch.arange(12).view(3, 4)
    patches = torch.tensor([0, 3, 5, 10])
    assert torch.equal(cells.flip(1).flatten()[patches], train_rope.mirror(patches, 4))


@pytest.mark.parametrize(("script", "option"), [("train_selfsupervised", "--frozen"), ("train_rope", "--teacher")])
def test_a_script_runs_from_any_folder(tmp_path, script, option):
    """These scripts also import the first one."""
    command = [sys.executable, SCRIPTS / f"{script}.py", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and option in result.stdout, result.stderr
