"""The supervised script with models of other families and other libraries."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from scripts import ROOT, one_line_error, run
from tiny_models import build, tiny_timm

SCRIPT = ROOT / "VIT_DynamicAccumulatedAttentionMap_oneSample.py"
TINY = "vit_tiny_patch16_224"


def saved(name, file, **options):
    """Random weights of a timm model, large enough that its attention is not flat."""
    safetensors.torch.save_file(tiny_timm(name, **options).state_dict(), file)
    return file


@pytest.mark.parametrize(
    "name, decomposed, maps",
    [
        ("cait_xxs24_224", "class token, 2 class-attention blocks", (2, 14, 14)),
        ("deit_tiny_distilled_patch16_224", "class and distillation token, 12 blocks", (12, 14, 14)),
    ],
)
def test_other_families(name, decomposed, maps, explain, tmp_path):
    weights = saved(name, tmp_path / "weights.safetensors", num_classes=4)
    result = explain("--model", name, "--checkpoint", weights, "--target", 2, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"explained: 2 class 2 ({decomposed}) -> " in result.stdout
    folder = tmp_path / "out" / name / "coffee-class_2"
    flow = json.loads((folder / "flow.json").read_text())
    assert flow["decomposed"] == decomposed and flow["settings"]["rows"] == "class"
    assert [flow["blocks"], *flow["grid"]] == list(maps) == list(np.load(folder / "maps.npz")["block_maps"].shape)
    assert flow["num_prefix_tokens"] == 1 + ("distilled" in name)
    last = flow["evolution"]["blocks"][maps[0] - 1]["probability"]["2"]
    assert last == pytest.approx(flow["target"]["probability"], abs=1e-4) and (folder / "evolution.png").is_file()
    with Image.open(folder / "flow.gif") as gif:
        assert gif.n_frames == maps[0]


def test_without_a_logit_lens_there_is_no_evolution_picture(explain, tmp_path):
    name = "pit_ti_224"
    weights = saved(name, tmp_path / "weights.safetensors", num_classes=4)
    options = ("--model", name, "--checkpoint", weights, "--target", 2, "--size", 64, "--output-dir", tmp_path)
    result = explain(*options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = [line for line in result.stdout.splitlines() if "evolution.png" in line]
    assert len(lines) == 1 and lines[0].startswith("  no evolution.png: PoolingVisionTransformer has blocks of several")
    folder = tmp_path / name / "coffee-class_2"
    assert json.loads((folder / "flow.json").read_text())["evolution"] is None
    assert (folder / "flow.gif").is_file() and not (folder / "evolution.png").exists()


def test_mean_of_the_patches_needs_rows_patches(explain, tmp_path):
    weights = saved("vit_tiny_patch16_224", tmp_path / "weights.safetensors", num_classes=4, global_pool="avg")
    metadata = {"architecture": TINY, "model_args": json.dumps({"num_classes": 4, "global_pool": "avg"})}
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights, metadata)
    options = ("--checkpoint", weights, "--target", 1, "--output-dir", tmp_path / "out")
    result = explain(*options)
    one_line_error(result, "scores the mean patch token", "global_pool='token'", "--rows patches")
    result = explain(*options, "--rows", "patches")
    assert result.returncode == 0, result.stderr
    assert "(all tokens, rows='patches', 12 blocks)" in result.stdout
    flow = json.loads(next(tmp_path.rglob("flow.json")).read_text())
    assert flow["decomposed"] == "all tokens, rows='patches', 12 blocks" and flow["settings"]["rows"] == "patches"
    assert flow["method"] == "Dynamic Accumulated Attention Map, all-rows form"
    folder = tmp_path / "out" / "weights" / "coffee-class_1-patches"
    assert (folder / "flow.gif").is_file() and (folder / "evolution.png").is_file()
    last = flow["evolution"]["blocks"][11]["probability"]["1"]
    assert last == pytest.approx(flow["target"]["probability"], abs=1e-4)


def test_variant(weights, explain, tmp_path):
    options = ("--checkpoint", weights, "--target", 1, "--output-dir", tmp_path / "out")
    for variant in (["--variant", "heads"], []):
        result = explain(*options, *variant)
        assert result.returncode == 0, result.stderr
    heads, paper = (tmp_path / "out" / "tiny" / f"coffee-dog{suffix}" for suffix in ("-heads", ""))
    manifests = [json.loads((folder / "flow.json").read_text()) for folder in (heads, paper)]
    assert [flow["settings"]["variant"] for flow in manifests] == ["heads", "paper"]
    assert manifests[0]["method"] == "Dynamic Accumulated Attention Map, variant heads"
    assert manifests[1]["method"] == "Dynamic Accumulated Attention Map"
    maps = [np.load(folder / "maps.npz")["accumulated"] for folder in (heads, paper)]
    assert not np.allclose(*maps, rtol=0.01)
    unknown = explain(*options, "--variant", "relu")
    one_line_error(unknown, "--variant: expected paper, signed, heads or relevance, got 'relu'")


def test_rows_that_a_family_does_not_have(explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = saved("cait_xxs24_224", tmp_path / "weights.safetensors", num_classes=4)
    options = ("--model", "cait_xxs24_224", "--checkpoint", weights, "--rows", "patches")
    photos = (ROOT / ".img" / "coffee.png", ROOT / ".img" / "flower.jpg")
    result = explain(*options, "--image", *photos, "--batch", 1)  # the second photo is not tried
    one_line_error(result, "rows: 'patches' is not defined for Cait")


def test_transformers_model_from_a_folder(offline, explain, tmp_path, monkeypatch):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "cup"},
    )  # fmt: skip
    model = build(transformers.ViTForImageClassification, config)
    model.save_pretrained(tmp_path / "mine")
    result = run(SCRIPT, "--model", f"hf:{tmp_path / 'mine'}", "--target", "dog", env=offline, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    folder = tmp_path / "results" / "hf_mine" / "coffee-dog"
    flow = json.loads((folder / "flow.json").read_text())
    assert flow["model"] == "hf:mine" and flow["target"]["index"] == 1 and flow["grid"] == [4, 4]
    weights = tmp_path / "mine" / "model.safetensors"
    assert flow["checkpoint"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    result = explain("--model", f"hf:{tmp_path / 'mine'}", "--target", "top2")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert len(list((tmp_path / "results" / "hf_mine").glob("coffee-*-*"))) == 1


def test_torchvision_model_from_a_checkpoint(explain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torchvision.models.vit_b_32(num_classes=3).half().state_dict()
    torch.nn.init.normal_(state["heads.head.weight"])  # zero in a new model
    torch.save(state, tmp_path / "mine.pth")
    options = ("--model", "torchvision:vit_b_32", "--checkpoint", tmp_path / "mine.pth", "--target", 2)
    result = explain(*options, "--size", "model")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    folder = tmp_path / "results" / "torchvision_vit_b_32" / "coffee-class_2"
    maps = np.load(folder / "maps.npz")["block_maps"]
    assert maps.shape == (12, 7, 7) and (maps > 0).any()
