"""Tests of the layouts of checkpoints: wrappers, prefixes, what lies beside the weights, other patch grids."""

import argparse
import json
import math
from typing import Optional

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from timm.layers import resample_abs_pos_embed
from tiny_checkpoints import TINY, refused, same_weights
from torch import nn
from torchvision.models import VisionTransformer, ViT_B_16_Weights

from models import load
from models.layouts import WRAPPERS, rename


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).eval().state_dict()


def other(state):
    """Return other weights of the same names and shapes, which must not be taken."""
    return {key: torch.full_like(value, 9) for key, value in state.items()}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def backbone(state):
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def saved(content, tmp_path, name=TINY):
    torch.save(content, tmp_path / "w.pth")
    return load(name, tmp_path / "w.pth")


# Wrappers and prefixes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", WRAPPERS)
def test_wrappers(tiny, tmp_path, key):
    assert same_weights(saved({key: tiny, "epoch": 3, "loss": torch.tensor(0.1)}, tmp_path).model, tiny)


@pytest.mark.parametrize(
    "content",
    [
        lambda s: {"model_ema": {"module": s, "decay": 0.999}, "model": other(s)},
        lambda s: {"state_dict_ema": s, "state_dict": other(s)},
        lambda s: {"student": other(s), "teacher": {"module": s}},
        lambda s: {"student": other(s), "model": {"network": s}},
        lambda s: {"ema": None, "model_ema": {}, "model": s},
        lambda s: {"ema": {"decay": torch.tensor(0.9), "shadow": [1]}, "net": {"state_dict": {"model_state_dict": s}}},
        lambda s: {"state_dict": s, "hyper_parameters": {"model": {"width": 3}}, "callbacks": {"ema": {"best": 1}}},
        lambda s: s | {"net": {}, "optimizer": {"state": {0: torch.zeros(3)}}},
    ],
)
def test_nested_wrappers_and_their_order(tiny, tmp_path, content):
    assert same_weights(saved(content(tiny), tmp_path).model, tiny)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "model.", "net.", "network.", "backbone.", "encoder.", "_orig_mod.", "teacher.", "teacher.backbone.",
        "base_encoder.", "encoder_q.", "module.base_encoder.", "module.encoder_q.", "_orig_mod.module.", "student.",
        "module._orig_mod.", "model.encoder.module.", "_fsdp_wrapped_module.model.", "teacher.module.backbone.",
        "model.net.backbone.encoder.", "online_model.", "student_model.", "_forward_module.module.", "vision_model.",
        "m.", "my.own.wrapper.", "visual.trunk.",
    ],
)  # fmt: skip
def test_prefixes_in_any_order(tiny, tmp_path, prefix):
    loaded = saved({"state_dict": under(prefix, tiny)}, tmp_path)
    assert same_weights(loaded.model, tiny) and loaded.num_classes == 7


def test_prefixes_inside_the_names(tiny, tmp_path):
    state = {
        "_fsdp_wrapped_module." + key.replace(".attn.", "._fsdp_wrapped_module.attn._orig_mod."): value
        for key, value in tiny.items()
    }
    state = {key.replace("mlp.", "_checkpoint_wrapped_module.mlp."): value for key, value in state.items()}
    assert same_weights(saved(state, tmp_path).model, tiny)


def test_modules_of_torch_that_wrap_a_model(tmp_path):
    model = timm.create_model(TINY, num_classes=7).eval()
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(model))
    assert "n_averaged" in averaged.state_dict()
    compiled = torch.compile(model)
    for wrapped in (averaged, compiled, nn.ModuleDict({"net": compiled})):
        assert same_weights(saved({"model": wrapped.state_dict()}, tmp_path).model, model.state_dict())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("teacher.", "student."),
        ("teacher.backbone.", "student.backbone."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("encoder_q.", "encoder_k."),
        ("backbone.", "momentum_backbone."),
        ("ema_model.module.", "model."),
        ("target_encoder.", "encoder."),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_sets_of_weights_the_better_one_is_taken(tiny, tmp_path, first, second, swapped):
    parts = [under(first, tiny), under(second, other(tiny))]
    state = parts[swapped] | parts[not swapped]
    assert same_weights(saved(state, tmp_path).model, tiny)


def test_a_student_of_another_width_than_its_teacher(tiny, tmp_path):
    teacher = {key: torch.zeros(2, *value.shape) for key, value in tiny.items()}
    assert same_weights(saved(under("student.", tiny) | under("teacher.", teacher), tmp_path).model, tiny)


def test_two_weights_of_one_name_are_refused(tiny, tmp_path):
    torch.save(under("module.", tiny) | {"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "w.pth")
    refused(TINY, f"w.pth does not fit {TINY}: two of its weights are called cls_token; save", tmp_path / "w.pth")
    torch.save(tiny | under("module.", other(tiny)), tmp_path / "w.pth")
    refused(TINY, "80 keys unknown", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("projector.weight", r"1 keys unknown \(projector.weight\)"),
        ("other.head.weight", r"1 keys unknown \(other.head.weight\)"),
        ("txt.\x1b[31m", r"1 keys unknown \(txt.\\x1b\[31m\)"),
        ("x" * 5000, "1 keys unknown"),
        ("model." * 50_000 + "x", "1 keys unknown"),
    ],
)
def test_strangers_are_named(tiny, tmp_path, key, message):
    torch.save(under("backbone.", tiny) | {key: torch.zeros(3)}, tmp_path / "w.pth")
    assert len(str(refused(TINY, message, tmp_path / "w.pth"))) < 300


@pytest.mark.parametrize(
    "content",
    [
        lambda s: {"best_model": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda s: {"swa_weights": s, "model": None, "scores": {"top1": torch.tensor(0.7)}},
        lambda s: {"params_ema": s, "params": other(s)},
    ],
)
def test_other_keys_count_if_one_alone_holds_weights(tiny, tmp_path, content):
    assert same_weights(saved(content(tiny), tmp_path).model, tiny)


def test_of_two_other_keys_none_is_taken(tiny, tmp_path):
    torch.save({"first": tiny, "second": tiny}, tmp_path / "w.pth")
    refused(TINY, "w.pth has no state dict", tmp_path / "w.pth")


def test_a_second_model_under_another_prefix_is_named(tiny, tmp_path):
    torch.save(under("left.", tiny) | under("right.", other(tiny)), tmp_path / "w.pth")
    refused(TINY, r"80 keys unknown \(right.cls_token", tmp_path / "w.pth")


def test_a_prefix_that_belongs_to_the_model_stays():
    own = {name: value.shape for name, value in VisionTransformer(32, 8, 2, 2, 24, 48).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in own.items()}
    assert rename(state, own).keys() == own.keys() and "encoder.ln.weight" in own
    assert rename(under("model.encoder.", state), own).keys() == own.keys()


# What training code writes --------------------------------------------------------------------------------------------

HEADS = {
    "mlp.0.weight": torch.zeros(3, 3), "mlp.2.bias": torch.zeros(3), "last_layer.weight_g": torch.zeros(3, 1),
    "last_layer.weight_v": torch.zeros(3, 3), "last_layer.parametrizations.weight.original0": torch.zeros(3, 1),
}  # fmt: skip
PREDICTOR = {"0.weight": torch.zeros(3, 3), "1.running_mean": torch.zeros(3), "3.weight": torch.zeros(3, 3)}
DECODER = {
    "mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(3, 3), "decoder_norm.bias": torch.zeros(3),
    "decoder_pos_embed": torch.zeros(1, 3, 3), "decoder_blocks.0.attn.qkv.weight": torch.zeros(9, 3),
    "decoder_pred.weight": torch.zeros(3, 3),
}  # fmt: skip


def in_chunks(state, size=3):
    """Name blocks as DINOv2's chunks do: the second number counts all blocks."""
    renamed = {}
    for key, value in state.items():
        _, number, *rest = key.split(".", 2) if key.startswith("blocks.") else (key, None)
        renamed[f"blocks.{int(number) // size}.{number}.{rest[0]}" if number else key] = value
    return renamed


LAYOUTS = {
    "DINO": lambda s: {
        "student": under("module.backbone.", other(s)) | under("module.head.", HEADS),
        "teacher": under("backbone.", s) | under("head.", HEADS),
        "args": argparse.Namespace(arch="vit_small", patch_size=16), "epoch": 100,
    },
    "DINOv2, trained": lambda s: {
        "teacher": under("backbone.", in_chunks(s) | {"mask_token": torch.zeros(1, 64)})
        | under("dino_head.", HEADS) | under("ibot_head.", HEADS)
    },
    "DINOv2, released": lambda s: in_chunks(s) | {"mask_token": torch.zeros(1, 64)},
    "iBOT": lambda s: {
        "teacher": under("module.backbone.", s | {"masked_embed": torch.zeros(1, 64)}) | under("module.head.", HEADS)
        | {"module.head.mlp2.0.weight": torch.zeros(3, 3), "module.head.last_layer2.weight_v": torch.zeros(3, 3)}
    },
    "MoCo v3": lambda s: {
        "arch": "vit_small", "optimizer": {},
        "state_dict": under("module.base_encoder.", s) | under("module.base_encoder.head.", PREDICTOR)
        | under("module.momentum_encoder.", other(s)) | under("module.momentum_encoder.head.", PREDICTOR)
        | under("module.predictor.", PREDICTOR),
    },
    "MoCo v2": lambda s: under("module.encoder_q.", s) | under("module.encoder_q.fc.", PREDICTOR)
    | under("module.encoder_k.", other(s)) | {"module.queue": torch.zeros(3, 9), "module.queue_ptr": torch.zeros(1)},
    "MAE": lambda s: {"model": s | DECODER, "scaler": {}, "args": argparse.Namespace(input_size=160)},
    "BEiT": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 64), "lm_head.weight": torch.zeros(3, 3)}},
    "solo-learn": lambda s: {"state_dict": under("backbone.", s) | under("momentum_backbone.", other(s))
                             | under("projector.", PREDICTOR) | under("momentum_projector.", PREDICTOR)},
    "Barlow Twins": lambda s: {"model": under("module.backbone.", s) | under("module.projector.", PREDICTOR)},
    "I-JEPA": lambda s: {"encoder": under("module.", other(s)), "predictor": {"w": torch.zeros(3)},
                         "target_encoder": under("module.", s)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backbones_as_their_authors_save_them(tiny, tmp_path, layout):
    own = backbone(tiny)
    loaded = saved(LAYOUTS[layout](own), tmp_path)
    assert same_weights(loaded.model, own) and loaded.num_classes == 0 and loaded.class_names is None


@pytest.mark.parametrize(
    "beside",
    [
        "criterion.weight", "loss_fn.weight", "dino_loss.center", "ibot_patch_loss.center", "train_acc.tp",
        "val_metrics.confusion", "student_head.layers.0.weight", "num_updates", "initted", "logit_scale",
        "text.token_embedding.weight",
    ],
)  # fmt: skip
def test_losses_metrics_and_counters_are_left_out(tiny, tmp_path, beside):
    loaded = saved({"state_dict": under("model.", tiny) | {beside: torch.zeros(3)}}, tmp_path)
    assert same_weights(loaded.model, tiny) and loaded.num_classes == 7


def test_a_classifier_behind_a_normalisation_is_not_lost(tiny, tmp_path):
    linear_probe = {"head.0.running_mean": torch.zeros(64), "head.1.weight": torch.zeros(7, 64)}
    torch.save({"model": backbone(tiny) | linear_probe}, tmp_path / "w.pth")
    refused(TINY, r"1 keys unknown \(head.0.running_mean\)", tmp_path / "w.pth")


def with_metadata(state, file, architecture, **arguments):
    metadata = {"architecture": architecture, "model_args": json.dumps(arguments)}
    safetensors.torch.save_file(state, file, metadata)
    return file


def test_a_model_fine_tuned_with_another_pooling(tmp_path):
    torch.manual_seed(0)
    name, small = "vit_tiny_patch16_224", {"depth": 1, "img_size": 32}
    state = timm.create_model(name, num_classes=3, global_pool="avg", **small).state_dict()
    file = with_metadata(state, tmp_path / "w.safetensors", name, **small)
    way_out = str(refused(None, "was trained with another pooling .*; save it as safetensors with the pooling", file))
    arguments = json.loads(way_out.partition("model_args\": '")[2].removesuffix("'}"))
    assert arguments == {"global_pool": "avg"}
    loaded = load(None, with_metadata(state, file, name, **small, **arguments))
    assert same_weights(loaded.model, state) and loaded.num_classes == 3


def renamed(state, *pairs):
    for theirs, own in pairs:
        state = {key.replace(own, theirs): value for key, value in state.items()}
    return state


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("deit3_small_patch16_224", [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]),
        (
            "swin_tiny_patch4_window7_224",
            [("head.", "head.fc."), *((f"layers.{i}.downsample", f"layers.{i + 1}.downsample") for i in range(3))],
        ),
    ],
)
def test_names_of_the_authors(tmp_path, name, pairs):
    torch.manual_seed(0)
    small = {"embed_dim": 24}
    if name.startswith("deit3"):
        small |= {"depth": 1, "num_heads": 2}
    state = timm.create_model(name, num_classes=3, **small).state_dict()
    loaded = load(None, with_metadata(renamed(state, *pairs), tmp_path / "w.safetensors", name, **small))
    assert same_weights(loaded.model, state) and loaded.num_classes == 3


@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight", "head.weight", "cls_token"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 3, 0, 0), (1, 1, 1, 1, 1)])
def test_weights_of_strange_shapes_are_named(tiny, tmp_path, key, shape):
    torch.save(tiny | {key: torch.zeros(shape)}, tmp_path / "w.pth")
    message = str(refused(TINY, "does not fit test_vit: ", tmp_path / "w.pth"))
    assert "head.weight" in message if key == "head.weight" else key in message


@pytest.mark.parametrize(
    "content",
    [
        lambda s: {"model": s, "optimizer": {}, "lr_scheduler": {}, "epoch": 9, "args": argparse.Namespace(lr=1)},
        lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.0", "loops": {}},
        lambda s: {"state_dict": under("model.backbone.", backbone(s)) | {
            f"model.{key}": s[key] for key in ("head.weight", "head.bias")}},
        lambda s: {"state_dict": other(s), "state_dict_ema": s, "arch": TINY, "version": 2},
        lambda s: {"model_state_dict": under("module.", s), "optimizer_state_dict": {"state": {}}},
    ],
)  # fmt: skip
def test_classifiers_as_deit_lightning_and_timm_save_them(tiny, tmp_path, content):
    loaded = saved(content(tiny), tmp_path)
    assert same_weights(loaded.model, tiny) and loaded.num_classes == 7


def test_a_missing_weight_is_never_replaced(tiny, tmp_path):
    for layout in LAYOUTS.values():
        lacking = {key: value for key, value in backbone(tiny).items() if key != "blocks.1.norm1.weight"}
        torch.save(layout(lacking), tmp_path / "w.pth")
        refused(TINY, r"1 keys missing \(blocks.1.norm1.weight\)", tmp_path / "w.pth")


# Position embeddings --------------------------------------------------------------------------------------------------


def at_size(size, prefix=1, **arguments):
    """Return weights that were trained with images of another size, and their position embedding."""
    torch.manual_seed(1)
    state = timm.create_model(TINY, num_classes=3, img_size=size, **arguments).state_dict()
    state["pos_embed"].normal_()
    return state


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((96, 96), {}),  # a square, and nothing else is said
        ((64, 192), {"args": argparse.Namespace(img_size=[64, 192])}),
        ((64, 256), {"args": argparse.Namespace(input_size=(3, 64, 256))}),  # 64 patches, which are a square, too
        ((80, 320), {"hyper_parameters": {"image_size": (80, 320)}}),  # as many patches as the model has
        ((64, 64), {"args": {"img_size": None, "input_size": "64", "image_size": [0, 0]}}),
        ((64, 64), {"args": argparse.Namespace(img_size=999)}),  # the size of other images
    ],
)
def test_position_embeddings_of_another_grid(tmp_path, size, options):
    state = at_size(size)
    loaded = saved({"model": state} | options, tmp_path)
    old, new = [side // 16 for side in size], [side // 16 for side in loaded.size]
    expected = resample_abs_pos_embed(state["pos_embed"], new, old)
    assert loaded.size == (160, 160) and torch.equal(loaded.model.pos_embed, expected)
    assert not torch.equal(expected[:, 1:4], state["pos_embed"][:, 1:4])
    assert same_weights(loaded.model, state | {"pos_embed": expected})


def test_a_position_embedding_that_fits_no_grid(tmp_path):
    torch.save(at_size((48, 80)), tmp_path / "w.pth")
    message = (
        "the patch grid of its 16 position embeddings is not known; name the model that they belong to, or save them"
    )
    refused(TINY, message, tmp_path / "w.pth")


@pytest.mark.parametrize("size", [[48, 80], [80, 320], 96])
def test_metadata_tell_the_size_of_the_images(tmp_path, size):
    state = at_size(size)
    metadata = {"architecture": TINY, "model_args": json.dumps({"img_size": size})}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", metadata)
    loaded = load(None, tmp_path / "w.safetensors")
    assert list(loaded.size) == (size if isinstance(size, list) else [size, size])
    assert same_weights(loaded.model, state)


REGISTERS = "vit_small_patch14_reg4_dinov2"


def test_dinov2_with_registers_in_chunks_at_another_size(tmp_path, monkeypatch):
    """Its position embedding has an entry for the class token, which timm adds to the token."""
    small = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 56}
    torch.manual_seed(0)
    model = timm.create_model(REGISTERS, num_classes=0, **small).eval()
    own = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    theirs = {key.replace("reg_token", "register_tokens"): value for key, value in own.items()}
    theirs["pos_embed"] = torch.cat([torch.rand(1, 1, 24), theirs["pos_embed"]], dim=1)
    theirs["mask_token"] = torch.zeros(1, 24)
    metadata = {"architecture": REGISTERS, "model_args": json.dumps(small | {"img_size": 84})}
    safetensors.torch.save_file(in_chunks(theirs, 2), tmp_path / "w.safetensors", metadata)
    got = load(None, tmp_path / "w.safetensors").model.state_dict()
    assert torch.equal(got["cls_token"], own["cls_token"] + theirs["pos_embed"][:, :1])
    assert torch.equal(got["pos_embed"], resample_abs_pos_embed(own["pos_embed"], [6, 6], [4, 4], 0))
    assert all(torch.equal(got[key], own[key]) for key in own if key not in ("cls_token", "pos_embed"))


def torchvision_vit(*, weights: Optional[ViT_B_16_Weights] = None, progress=True, image_size=64, num_classes=10):  # noqa: UP045
    return VisionTransformer(image_size, 8, 2, 2, 24, 48, num_classes=num_classes)


@pytest.mark.parametrize(("grid", "size"), [((4, 4), 32), ((4, 16), 64), ((2, 8), 64), ((3, 5), None)])
def test_position_embeddings_of_torchvision(tmp_path, monkeypatch, grid, size):
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "vit_b_16", torchvision_vit)
    torch.manual_seed(0)
    state = torchvision_vit(num_classes=3).state_dict()
    positions = state["encoder.pos_embedding"] = torch.randn(1, math.prod(grid) + 1, 24)
    options = argparse.Namespace(img_size=[8 * side for side in grid])
    torch.save({"model": state} | ({"args": options} if size else {}), tmp_path / "w.pth")
    if size is None:
        refused("torchvision:vit_b_16", "the patch grid of its 16 position embeddings is not known", tmp_path / "w.pth")
        return
    loaded = load("torchvision:vit_b_16", tmp_path / "w.pth")
    side = size // 8
    assert loaded.size == (size, size) and loaded.num_classes == 3
    expected = positions if grid == (side, side) else resample_abs_pos_embed(positions, [side, side], list(grid))
    assert same_weights(loaded.model, state | {"encoder.pos_embedding": expected})
