"""Features and the number of classes are known for models of every library; what features are not is refused."""

import pytest
import timm
import torch
import torchvision
import transformers
from model_state import state_of
from odd_models import Plain
from support_table import from_transformers, naflex_batch, row_of
from tiny_models import build, random_images, tiny_torchvision, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow, features, logit_lens, num_classes

FEATURES = {
    "ViTForImageClassification": (lambda m, x: m.vit(x).last_hidden_state[:, 0], 5),
    "BeitForImageClassification": (lambda m, x: m.beit(x).pooler_output, 5),
    "Dinov2ForImageClassification": (
        lambda m, x: torch.cat([(t := m.dinov2(x).last_hidden_state)[:, 0], t[:, 1:].mean(1)], 1), 5,
    ),
    "DeiTForImageClassificationWithTeacher": (lambda m, x: m.deit(x).last_hidden_state[:, :2].mean(1), 5),
    "ViTModel": (lambda m, x: m(x).last_hidden_state[:, 0], 0),
    "BeitModel": (lambda m, x: m(x).pooler_output, 0),
    "DINOv3ViTModel": (lambda m, x: m(x).pooler_output, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_transformers(name, images):
    model = from_transformers("", name).make()
    expected, classes = FEATURES[name]
    with torch.no_grad():
        torch.testing.assert_close(features(model, images), expected(model, images))
    assert num_classes(model) == classes


def test_features_of_torchvision_before_the_last_layer(images):
    model = tiny_torchvision(representation_size=7)
    with torch.no_grad():
        assert features(model, images).shape == (2, 7)
        assert torch.equal(model.heads.head(features(model, images)), model(images))


def test_features_of_another_model_of_torchvision(images):
    """Its scores must not pass for features: they would make a useless memory bank."""
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4).eval()
    with pytest.raises(
        UnsupportedModel, match="^model: the features of torchvision's ResNet are not known; use a VisionTransformer$"
    ):
        features(model, images)


def test_features_of_torchvision_and_timm(images):
    model = tiny_torchvision()
    with torch.no_grad():
        assert torch.equal(model.heads(features(model, images)), model(images))
        assert num_classes(model) == 5 and not model.heads._forward_pre_hooks
        timms = tiny_vit()
        assert torch.equal(timms.head(features(timms, images)), timms(images)) and num_classes(timms) == 5
        wrapped = nn.DataParallel(timms)
        assert torch.equal(features(wrapped, images), features(timms, images)) and num_classes(wrapped) == 5
        headless = tiny_vit(num_classes=0)
        assert torch.equal(features(headless, images), headless(images)) and num_classes(headless) == 0
        assert torch.equal(features(Plain(headless), images), Plain(headless)(images))


# ----------------------------------------------------------------------------------------------------------------------
# Models of transformers without a classifier
# ----------------------------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
STAGES = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TEXT = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def bare(name, options=SMALL, **arguments):
    """Build a model of transformers of a few thousand weights."""
    make = getattr(transformers, f"{name}Model")
    return build(lambda: make(make.config_class(**options), **arguments))


@pytest.mark.parametrize(
    "name, options, arguments",
    [
        ("Beit", SMALL, {"add_pooling_layer": False}),
        ("Beit", SMALL | {"use_mean_pooling": False}, {}),
        ("ViT", SMALL, {"add_pooling_layer": False}),
        ("Dinov2", SMALL, {}),
        ("CLIPVision", SMALL, {}),
        ("ViTMSN", SMALL, {}),
    ],
)
def test_feature_of_a_model_with_a_class_token(name, options, arguments, images):
    model = bare(name, options, **arguments)
    with torch.no_grad():
        assert torch.equal(features(model, images), model(images).last_hidden_state[:, 0])


@pytest.mark.parametrize("name, options", [("Swin", STAGES), ("Swinv2", STAGES), ("SiglipVision", SMALL)])
def test_feature_of_a_model_without_a_class_token_is_pooled(name, options, images):
    model = bare(name, options)
    with torch.no_grad():
        feature, output = features(model, images), model(images)
    assert torch.equal(feature, output.pooler_output)
    assert not torch.allclose(feature, output.last_hidden_state[:, 0])


@pytest.mark.parametrize(
    "name, options, arguments",
    [
        ("Swin", STAGES, {"add_pooling_layer": False}),
        ("SiglipVision", SMALL | {"vision_use_head": False}, {}),
        ("IJepa", SMALL, {}),
        ("IJepa", SMALL, {"add_pooling_layer": True}),  # of the first patch
    ],
)
def test_the_first_patch_is_no_feature(name, options, arguments, images):
    with pytest.raises(
        UnsupportedModel,
        match=rf"^model: {name}Model has neither a class token nor a pooler that reads all patches; "
        r"wrap it in a module that returns features \(B, D\)$",
    ):
        features(bare(name, options, **arguments), images)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_models_of_images_and_text_are_refused(name, images):
    model = bare(name, {"text_config": TEXT, "vision_config": SMALL})
    before = state_of(model)
    with pytest.raises(UnsupportedModel, match=f"^model: {name}Model reads text; pass its .vision_model$"):
        features(model, images)
    assert state_of(model) == before
    assert features(model.vision_model, images).shape == (2, 32)


def test_a_model_of_text_is_refused(images):
    with pytest.raises(UnsupportedModel, match="^model: BertModel reads text; pass a model that reads images alone$"):
        features(bare("Bert", TEXT), images)


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------

ONE = random_images(1, 3, 32, 32)


def inference_mode_vit():
    with torch.inference_mode():
        return tiny_vit()


@pytest.mark.parametrize(
    "make, images, error, match",
    [
        (tiny_vit, ONE.numpy(), TypeError, r"images: expected a tensor \(B, C, H, W\) with B > 0, got ndarray$"),
        (tiny_vit, ONE[0], ValueError, r"images: expected a tensor .* got \(3, 32, 32\)$"),
        (tiny_vit, ONE.byte(), ValueError, "images: expected normalised floating point values, got torch.uint8"),
        (tiny_vit, ONE.to("meta"), ValueError, "images: .* got one that is meta"),
        (tiny_vit, {"patches": ONE}, TypeError, "images: .* got dict$"),
        (tiny_vit, ONE[:, :1], ValueError, "images: the model takes 3 channels, got 1$"),
        (tiny_vit, ONE.double(), ValueError,
         "images: expected torch.float32 on cpu as the weights of VisionTransformer, got torch.float64 on cpu"),
        (tiny_vit, random_images(1, 3, 40, 40), ValueError, "images: they do not fit VisionTransformer: Input height"),
        (tiny_torchvision, random_images(1, 3, 40, 40), ValueError, "images: they do not fit VisionTransformer: Wrong"),
        (tiny_vit, ONE * torch.nan, ValueError, "images: the model's output is not finite"),
        (inference_mode_vit, ONE, ValueError, r"model: a part of it was made under torch\.inference_mode\(\)"),
        (lambda: timm.create_model("test_vit", features_only=True), ONE, UnsupportedModel,
         "model: timm's FeatureGetterNet has no features before a head; pass a whole model$"),
        (lambda: tiny_vit(global_pool=""), ONE, UnsupportedModel, r"model: .* got an output \(1, 17, 24\)$"),
        (lambda: "vit", ONE, TypeError, "model: expected a torch.nn.Module, got str; build it first"),
        (lambda: nn.ModuleList([tiny_vit()]), ONE, TypeError, "model: a ModuleList has no forward; pass the whole"),
        (row_of("NaFlexViT, padded batch").make, naflex_batch() | {"patch_coord": None}, ValueError,
         "images: NaFlexVit takes a dict .* patch_coord is missing or has another shape$"),
    ],
)  # fmt: skip
def test_refused(make, images, error, match):
    model = make()
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=f"^{match}") as caught:
        features(model, images)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert before is None or state_of(model) == before


@pytest.mark.parametrize(
    "kind, match",
    [
        ({"device": "meta"}, "model: its weights are on the meta device and have no values; load them first$"),
        ({"dtype": torch.float8_e4m3fn}, r"model: its weights are of torch.float8_e4m3fn; .*, model\.float\(\)$"),
        ({"dtype": torch.complex64}, "model: its weights are of torch.complex64; convert it to floating point"),
    ],
)
@pytest.mark.parametrize("call", [features, attention_flow, logit_lens])
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_weights_that_cannot_compute(call, kind, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        call(tiny_vit().to(**kind), ONE)


@pytest.mark.parametrize("model", [None, "vit", nn.Linear, [], {}, nn.Module(), nn.ModuleList()])
@pytest.mark.parametrize("call", [features, attention_flow, logit_lens, lambda model, images: num_classes(model)])
def test_what_is_no_model(call, model):
    with pytest.raises(
        TypeError, match="^model: (expected a torch.nn.Module, got|a Module.* has no forward)"
    ) as caught:
        call(model, ONE)
    assert "\n" not in str(caught.value)
