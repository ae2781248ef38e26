"""Features and the number of classes are known for models of every library."""

import pytest
import torch
import torchvision
from odd_models import Plain
from support_table import from_transformers
from tiny_models import tiny_torchvision, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, features, num_classes

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
