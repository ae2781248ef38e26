"""Models of no known family are decomposed, and so are subclasses and wrappers of known models."""

import pytest
import torch
import torch.nn.functional as F
from derivations import assert_same_maps
from odd_models import DiffAugment, FrozenStem, Plain, Subclass, Tutorial
from support_table import from_transformers, row_of
from tiny_models import build, random_images, tiny_vit
from torch import nn

from daam_core import attention_flow
from daam_vit.libraries import library_of


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
def test_model_of_no_known_family(fused, images):
    """A ViT of no library, with timm's layers, gets the maps of timm's model."""
    timms = tiny_vit()
    model = Plain(timms, fused)
    flow, expected = attention_flow(model, images), attention_flow(timms, images)
    assert library_of(model) == "" and flow.decomposed == "class token, 3 blocks"
    assert_same_maps(flow.block_maps, expected.block_maps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_own_model_in_every_mode(mode, images):
    model = nn.Sequential(DiffAugment(), Plain(tiny_vit()))
    expected = attention_flow(model, images)
    with mode():
        assert torch.equal(attention_flow(model, images + 0).block_maps, expected.block_maps)


def test_arguments_by_name(images):
    class Named(Plain):
        def tokens(self, x):
            conv = self.layers.patch_embed.proj
            x = F.conv2d(input=x, weight=conv.weight, bias=conv.bias, stride=8).flatten(2).transpose(1, 2)
            return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed

        def attend(self, q, k, v):
            if self.fused:
                return F.scaled_dot_product_attention(query=q, key=k, value=v)
            return torch.matmul(torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1), other=v)

    expected = attention_flow(tiny_vit(), images)
    for fused in (True, False):
        assert_same_maps(attention_flow(Named(tiny_vit(), fused), images).block_maps, expected.block_maps)


def test_multihead_attention_that_returns_its_weights(images):
    model = build(Tutorial)
    flow = attention_flow(model, images, target=1)
    assert flow.block_maps.shape == (2, 2, 4, 4) and (flow.block_maps > 0).float().mean() > 0.2
    torch.testing.assert_close(flow.output, model(images))
    assert_same_maps(attention_flow(model, images[:1], target=1).block_maps, flow.block_maps[:1])


def test_encoder_of_torch_is_seen(images):
    """nn.TransformerEncoder hides its attention twice: behind its own fast path and behind nn.MultiheadAttention."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 24, 8, 8)
            self.token = nn.Parameter(torch.zeros(1, 1, 24))
            layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(24, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])

    model = build(Encoder).requires_grad_(False)
    with torch.no_grad():
        flow = attention_flow(model, images)
    assert flow.block_maps.shape == (2, 3, 4, 4) and (flow.block_maps > 0).float().mean() > 0.2
    torch.testing.assert_close(flow.output, model(images))


# ----------------------------------------------------------------------------------------------------------------------
# Subclasses and wrappers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Subclass, FrozenStem])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_subclasses_belong_to_the_family_of_their_base(make, mode, images):
    theirs, model = attention_flow(tiny_vit(), images), tiny_vit(make)
    with mode():
        ours = attention_flow(model, images + 0)
    assert_same_maps(ours.block_maps, theirs.block_maps)


@pytest.mark.parametrize("base", ["DeiTForImageClassification", "ViTForImageClassification"])
def test_subclasses_of_transformers(base, images):
    import transformers

    model = from_transformers("", base).make()
    expected = attention_flow(model, images)
    model.__class__ = type("Mine", (getattr(transformers, base),), {})
    assert torch.equal(attention_flow(model, images).block_maps, expected.block_maps)
    with pytest.raises(ValueError, match="^images: the model takes 32 x 32 pixels"):
        attention_flow(model, random_images(1, 3, 40, 40))


def test_wrappers_are_seen_through(images):
    model = row_of("DeiT, distilled").make()
    expected = attention_flow(model, images)
    for wrapped in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        assert torch.equal(attention_flow(wrapped, images).block_maps, expected.block_maps)
