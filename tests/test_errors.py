"""Everything that `attention_flow` refuses, in one line that names the argument first."""

import re
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from model_state import state_of
from odd_models import (
    AlsoOfKeys,
    AttendsMore,
    Augments,
    ChecksItself,
    Crop,
    DropsAlways,
    Early,
    InfiniteGradient,
    MixesAtTheEnd,
    Neighbour,
    NoAttention,
    NoGrad,
    OnceMore,
    Plain,
    PlainBoth,
    PlainChannels,
    PlainClassLast,
    PlainColumns,
    PlainFlipped,
    PlainHeadsFirst,
    PlainLastUnread,
    PlainMean,
    PlainOtherKeys,
    PlainPartlyEinsum,
    PlainRegister,
    PlainReversed,
    PlainWithoutConvolution,
    ReadsPatches,
    ReturnsTokens,
    Turned,
)
from PIL import Image
from support_table import REFUSED, from_transformers, naflex_batch, refusal, row_of
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, random_images, tiny_timm, tiny_torchvision, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow

WIDTH = TINY["embed_dim"]
IMAGES, ONE = random_images(2, 3, 32, 32), torch.zeros(1, 3, 32, 32)
ONES = torch.ones(WIDTH)
OTHER = "pass a model of timm, torchvision or transformers itself"


def case(match, model=tiny_vit, images=IMAGES, error=None, **options):
    """Make a row of the table: a call, and the message with which it is refused."""
    error = error or (UnsupportedModel if match.startswith("model") else ValueError)
    return pytest.param(match, model, images, error, options, id=match)


def of_row(match, family, images=None, **options):
    row = row_of(family)
    return case(match, row.make, row.images(1) if images is None else images, **options)


def no_family(match, kind):
    return case(match, lambda: kind(tiny_vit()))


def with_own_layers():
    """Return a model of transformers whose layers have another name."""
    model = from_transformers("", "ViTForImageClassification").make()
    for layer in model.vit.layers:
        layer.__class__ = type("Mine", (type(layer),), {})
    return model


def backbone():
    """Return a model of transformers after its first run, when it registers hooks of its own."""
    model = from_transformers("", "Dinov2Backbone").make()
    model(IMAGES)
    return model


def made_in_inference_mode(kind):
    with torch.inference_mode():
        return tiny_vit(kind)


def with_mlp(mlp):
    model = tiny_vit()
    model.blocks[1].mlp = mlp
    return model


def with_own_checkpoint():
    model = tiny_vit()
    model.blocks[1] = ChecksItself(model.blocks[1])
    return model


class OverwritesValues(Attention):
    """Changes q, k and v in place after the attention has saved them for the gradient."""

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(*qkv)
        qkv.zero_()
        return self.proj(x.transpose(1, 2).flatten(2))


def partly(change):
    """Return a model whose second block is another kind."""
    model = tiny_vit()
    with torch.inference_mode(change is None):
        model.blocks[1] = change(model.blocks[1]) if change else tiny_vit().blocks[1]
    return model


def with_block_that_changes():
    model = tiny_vit()
    model.blocks[1].mlp.act = OnceMore()
    return model


naflex = partial(of_row, family="NaFlexViT, padded batch")

ARGUMENTS = [
    case("variant: expected 'paper', 'signed', 'heads' or 'relevance', got 'relu'$", variant="relu"),
    case("variant: expected 'paper', 'signed', 'heads' or 'relevance', got None$", variant=None),
    case("score: expected 'logit' or 'log_odds', got 'probability'$", score="probability"),
    case("score: expected 'logit' or 'log_odds', got 1$", variant="relevance", score=1),
    case(
        "score: cannot be chosen together with importance, which takes its place; pass one of the two$",
        importance=ONES,
        score="log_odds",
    ),
    case("memory: expected 'auto', 'fast' or 'low', got 'small'$", memory="small"),
    case("memory: expected 'auto', 'fast' or 'low', got None$", memory=None),
    case("memory: expected 'auto', 'fast' or 'low', got True$", memory=True),
    *(
        case(f"{name}: expected True or False, got {shown}$", **{name: value})
        for name in ("norm", "shortcuts")
        for value, shown in (("yes", "'yes'"), (None, "None"), (2, "2"), (np.ones(2), r"array\(\[1., 1.\]\)"))
    ),
    case("memory: 'low' is a shortcut, and shortcuts are off; pass shortcuts=True$", memory="low", shortcuts=False),
    case("rows: expected 'class' or 'patches', got 'all'$", rows="all"),
    case("rows: expected 'class' or 'patches', got None$", rows=None),
    case("rows: expected 'class' or 'patches', got 1$", rows=1),
    *(
        of_row(r"rows: 'patches' is not defined for \w+", family, rows="patches", error=UnsupportedModel)
        for family in ("CaiT", "XCiT/16", "PiT", "CrossViT", "MViTv2 with a class token")
    ),
    case("target: cannot be explained together with importance; pass one of the two", target=1, importance=ONES),
]
TARGETS = [
    case("target: class 5 is out of range; the model has 5 classes, 0..4$", target=5),
    case("target: class -1 is out of range", target=-1),
    case("target: class 7 is out of range", target=[0, 7]),
    case("target: class -2 is out of range", target=torch.tensor([-2, 1])),
    case("target: expected .* for each of 2 images one index", target=[1]),
    case("target: expected .* for each of 2 images one index", target=[1, 2, 3]),
    case("target: expected", target=[]),
    case("target: expected", target=[[0, 1]]),
    case("target: class 5 is out of range", target=[[0, 1], [2, 5]]),
    case("target: expected", target=[[], []]),
    case("target: expected", target=[[0, 1], [2]]),
    case("target: expected", target=torch.zeros(2, 2, 2, dtype=torch.int64)),
    case("target: expected .* got True", target=True),
    case("target: expected", target=[True, False]),
    case("target: expected", target=torch.tensor([True, False])),
    case("target: expected .* got 1.0", target=1.0),
    case("target: expected", target=[0.0, 1.0]),
    case("target: expected .* got 'cat'", target="cat"),
    case("target: expected", target=["cat", "dog"]),
    case("target: expected", target=lambda scores: scores),
    case("target: class 5 is out of range", target=lambda scores: [0, 5]),
    case("target: expected", target=2**70),
    case(r"target: expected .* got \{0: 1\}$", target={0: 1}),
    case("target: expected .* got 1j$", target=1j),
    case("target: expected", target=torch.zeros(2, dtype=torch.complex64)),
    case("target: expected", target=torch.ones(2, dtype=torch.int64).to_sparse()),
    case("target: expected", target=torch.ones(2, dtype=torch.int64, device="meta")),
    case("target: expected .*x…$", target="x" * 5000),
    case("target: expected", target=torch.zeros(2, 2)),
]
IMPORTANCES = [
    case(r"importance: expected .*\(24,\), \(2, 24\) or \(2, K, 24\).* got \(25,\)", importance=torch.ones(WIDTH + 1)),
    case(r"importance: expected .* got \(3, 24\)", importance=torch.ones(3, WIDTH)),
    case(r"importance: expected .* got \(1, 2, 24\)", importance=torch.ones(1, 2, WIDTH)),
    case(r"importance: expected .* got \(2, 0, 24\)", importance=torch.ones(2, 0, WIDTH)),
    case(r"importance: expected .* got \(\)", importance=torch.tensor(1.0)),
    case("importance: expected .* got str", importance="all", error=TypeError),
    case("importance: expected .* got list", importance=[1.0] * WIDTH, error=TypeError),
    case("importance: expected .* got ndarray", importance=np.ones(WIDTH, np.float32), error=TypeError),
    case("importance: expected .* got one that is complex", importance=ONES * 1j),
    case("importance: expected .* got one that is sparse_coo", importance=ONES.to_sparse()),
    case("importance: expected .* got one that is meta", importance=lambda f: f.to("meta")),
    case(r"importance: expected .* got \(2, 23\)", importance=lambda f: f[:, 1:]),
    case("importance: has NaN or infinite values", importance=torch.full((WIDTH,), torch.nan)),
    case("importance: has NaN or infinite values; look for a division by zero", importance=lambda f: f / 0),
    case("importance: the model has no classifier", partial(tiny_vit, num_classes=0)),
    case("importance: the model has no classifier", from_transformers("", "ViTModel").make),
]
RECTANGLE, SQUARE = torch.zeros(1, 3, 40, 32), torch.zeros(1, 3, 36, 36)
IMAGE_TENSORS = [
    case(r"images: expected a tensor \(B, C, H, W\).* got \(3, 32, 32\)", images=ONE[0]),
    case(r"images: expected a tensor .* with B > 0 and no empty side, got \(0, 3, 32, 32\)$", images=ONE[:0]),
    *(
        case(f"images: expected a tensor .* B > 0, got {type(images).__name__}$", images=images, error=TypeError)
        for images in (ONE.numpy(), [ONE], None, "photo.png", Image.new("RGB", (32, 32)), {"patches": ONE})
    ),
    *(
        case(f"images: expected a tensor .* B > 0, got one that is {kind}$", images=images)
        for kind, images in (
            ("meta; it has no values, load them first", ONE.to("meta")),
            (r"sparse_coo; pass its to_dense\(\)", ONE.to_sparse()),
            ("nested; pad it to one shape", torch.nested.nested_tensor([ONE[0], ONE[0]], layout=torch.jagged)),
            ("complex; pass real numbers", ONE.cfloat()),
        )
    ),
    *(
        case("images: expected .* no empty side", partial(tiny_vit, dynamic_img_size=True), images)
        for images in (ONE[..., :0], ONE[..., :0, :], ONE[:, :0])
    ),
    case("images: expected .* no empty side", lambda: Plain(tiny_vit()), ONE[..., :0]),
    case("images: the model takes 3 channels, got 1$", images=ONE[:, :1]),
    case("images: the model takes 3 channels, got 32$", images=ONE.permute(0, 2, 3, 1)),
    case("images: .* floating point values, got torch.uint8", images=ONE.byte()),
    case("images: the model's output is not finite", images=ONE + torch.nan),
    case("images: the model's output is not finite", images=ONE + torch.inf),
    case("images: a gradient is not finite; look for an overflow of torch.float32",
         partial(tiny_vit, InfiniteGradient)),
    case(
        "images: the model takes 32 x 32 pixels, got 32 x 40.*dynamic_img_size=True", images=torch.zeros(1, 3, 32, 40)
    ),
    *(
        case(
            f"images: {h} x {w} pixels are not a multiple of the model's stride, 8 x 8",
            partial(tiny_vit, dynamic_img_size=True),
            torch.zeros(1, 3, h, w),
        )
        for h, w in ((32, 36), (36, 32), (4, 32))
    ),
    of_row("images: .*takes 64 x 64 pixels, got 64 x 72", "PiT", torch.zeros(1, 3, 64, 72)),
    of_row("images: .*takes 64 x 64 pixels, got 32 x 32", "TNT", ONE),
    of_row("images: .*takes 64 x 64 pixels, got 96 x 96", "VOLO", torch.zeros(1, 3, 96, 96)),
    of_row("images: .*takes 32 x 32 pixels, got 40 x 32; resize them$", "CaiT", RECTANGLE),
    of_row("images: .*takes 32 x 32 pixels, got 40 x 32; resize them$", "BEiT", RECTANGLE),
    of_row(
        "images: .*got 40 x 32; resize them, or build the model with dynamic_img_size=True$", "DeiT", RECTANGLE
    ),
    of_row(
        "images: .*takes 64 x 64 pixels, got 96 x 96", "MViTv2 with a class token", torch.zeros(1, 3, 96, 96)
    ),
    of_row("images: .*not a multiple of the model's stride, 8 x 8", "NaFlexViT", torch.zeros(1, 3, 32, 36)),
    of_row("images: .*takes 240 x 240 pixels, got 224 x 224", "CrossViT", torch.zeros(1, 3, 224, 224)),
    case("images: .*takes 32 x 32 pixels, got 36 x 36", from_transformers("", "ViTModel").make, SQUARE,
         importance=ONES),
    case("images: 36 x 36 pixels are not a multiple of the model's stride, 8 x 8",
         from_transformers("", "Dinov2Model").make, SQUARE, importance=ONES),
    case("images: the model takes 32 x 32 pixels, got 40 x 40", tiny_torchvision, torch.zeros(1, 3, 40, 40)),
    *(
        of_row("images: the model takes 3 channels, got 1", family, row_of(family).images(1)[:, :1])
        for family in ("TNT", "XCiT/16", "CrossViT", "MViTv2 with a class token", "DINOv3", "CaiT")
    ),
    naflex("images: .* patch_coord is missing or has another shape",
           images={k: v for k, v in naflex_batch().items() if k != "patch_coord"}),
    naflex("images: .* patch_valid is missing or has another shape",
           images=naflex_batch() | {"patch_valid": [True] * 16}),
    naflex(r"images: expected patches \(B, N, P \* P \* 3\) of normalised",
           images={name: tensor[:0] for name, tensor in naflex_batch().items()}),
    naflex(r"images: expected patches \(B, N, P \* P \* 3\) of normalised",
           images=naflex_batch() | {"patches": naflex_batch()["patches"].byte()}),
    *(
        naflex("images: expected patch_coord .*, and patch_valid of torch.bool; take both from timm's NaFlex collator$",
               images=naflex_batch() | {name: wrong(naflex_batch()[name])})
        for name, wrong in (
            ("patch_coord", lambda places: places - 1), ("patch_coord", torch.Tensor.float),
            ("patch_coord", lambda places: places[..., :1]), ("patch_valid", torch.Tensor.float),
        )
    ),
    naflex("images: patch_coord: expected a tensor, got one that is meta",
           images=naflex_batch() | {"patch_coord": naflex_batch()["patch_coord"].to("meta")}),
]  # fmt: skip
MODELS = [
    case("model: VisionTransformer has no class token", partial(tiny_vit, class_token=False, global_pool="avg")),
    case(r"model: .* scores the mean patch token \(global_pool='avg'\)", partial(tiny_vit, global_pool="avg")),
    case(r"model: .* scores more than one token \(global_pool='avgmax'\)", partial(tiny_vit, global_pool="avgmax")),
    case(r"model: .* has no score \(global_pool=''\)", partial(tiny_vit, global_pool="")),
    case("model: ResNet has no attention that DAAM can see", row_of("ResNet").make),
    case("model: Conv2d has no attention that DAAM can see", lambda: nn.Conv2d(3, 3, 1)),
    case("model: attention was seen 0 times in the Attention of NoAttention", partial(tiny_vit, NoAttention)),
    case("model: attention was seen 2 times in the AlsoOfKeys of", partial(tiny_vit, attn_layer=AlsoOfKeys)),
    case("model: .* is not the sum of its semantic maps", partial(tiny_vit, attn_layer=DropsAlways)),
    case("model: .* does not depend on its attention", partial(tiny_vit, NoGrad)),
    case(r"model: expected class scores or features \(B, D\), got an output \(2, 17, 5\)",
         partial(tiny_vit, ReturnsTokens)),
    case("model: the score of ReadsPatches reads the patch tokens and not the class", partial(tiny_vit, ReadsPatches)),
    case("model: .* reads the patch tokens and not", partial(tiny_vit, ReadsPatches), importance=ONES),
    *(
        case("model: the score of .* reads the patch tokens", partial(tiny_vit, kind), **way)
        for kind in (MixesAtTheEnd, Neighbour)
        for way in ({"memory": "fast"}, {"memory": "low"}, {"shortcuts": False})
    ),
    case("model: a Block does not compute the same twice; pass memory='fast'$", with_block_that_changes, memory="low"),
    case("model: a Block does not compute the same twice; pass memory='fast'$", lambda: with_mlp(AttendsMore()),
         memory="low"),
    case("model: it uses torch.utils.checkpoint itself, and what it recomputes is not seen; switch that off$",
         with_own_checkpoint),
    case("model: it uses torch.utils.checkpoint itself", with_own_checkpoint, shortcuts=False),
    *(
        case("model: it changes q, k, v or another tensor in place that the gradient needs; let it make a copy$",
             partial(tiny_vit, attn_layer=OverwritesValues), **way)
        for way in ({}, {"shortcuts": False})
    ),
    case("model: it has no blocks that the class token passes, ", partial(tiny_vit, depth=0)),
    case("model: it has no blocks that the class token passes, ",
         partial(tiny_timm, "cait_xxs24_224", **TINY, depth_token_only=0)),
    case("model: it has no blocks that the class token passes, ",
         partial(tiny_timm, "convit_tiny", **TINY, local_up_to_layer=TINY["depth"])),
    case("model: Augments attends in 4 images from 17 to 17 tokens.* expected 2 images and 1 \\+ 16 tokens",
         partial(tiny_vit, Augments)),
    case("model: the score of Early does not depend on every attention that was seen", partial(tiny_vit, Early)),
    case(f"model: the tokens of Turned are not 1 and then the patches, row by row; {OTHER}", partial(tiny_vit, Turned)),
    *(
        case(r"model: was made under torch\.inference_mode", partial(made_in_inference_mode, kind), error=ValueError)
        for kind in (VisionTransformer, Early)
    ),
    case(r"model: a part of it was made under torch\.inference_mode\(\), which rules out gradients; make it outside$",
         partial(partly, None)),
    case("model: .*crop_scale=True see different parts of the image",
         partial(tiny_timm, "crossvit_9_240", embed_dim=[32, 64], num_classes=5, crop_scale=True),
         torch.zeros(1, 3, 240, 240)),
    case("model: ViTForImageClassification has no layers like those", with_own_layers),
    case("model: ViTMAEModel shuffles its patches: their places in the picture are not known",
         from_transformers("", "ViTMAEModel").make, importance=ONES),
    case("model: Dinov2Backbone has neither a classifier nor a last_hidden_state",
         backbone, importance=ONES),
    case("variant: 'relevance' needs the blocks of the model, and PlainMean is of no known family; use another",
         lambda: PlainMean(tiny_vit()), error=UnsupportedModel, variant="relevance"),
    no_family("model: the score of PlainMean reads the patch tokens and not the class token", PlainMean),
    no_family("model: the score of PlainBoth reads the patch tokens besides the class token", PlainBoth),
    no_family("model: the tokens of PlainClassLast are not 1 and then the patches, row by row", PlainClassLast),
    no_family(rf"model: PlainRegister is of no .* expected 1 \+ 4 x 4 tokens .* 18 to 18 tokens.*; {OTHER}",
              PlainRegister),
    no_family(f"model: .* expected patches from a convolution.*; {OTHER}", PlainWithoutConvolution),
    no_family("model: PlainChannels is of no known family.*12 to 12 tokens", PlainChannels),
    no_family("model: the score of PlainLastUnread does not depend on every attention that was seen", PlainLastUnread),
    no_family("model: the tokens of PlainColumns are not 1 and then the patches, row by row", PlainColumns),
    no_family("model: the tokens of PlainReversed are not 1 and then the patches, row by row", PlainReversed),
    no_family("model: the tokens of PlainOtherKeys are not 1 and then the patches, row by row", PlainOtherKeys),
    no_family("model: the tokens of PlainHeadsFirst are not 1 and then the patches, row by row", PlainHeadsFirst),
    no_family("model: PlainFlipped is of no known family, and may see the images more than once", PlainFlipped),
    no_family("model: PlainPartlyEinsum is of no known family, and part of its attention is not seen",
              PlainPartlyEinsum),
    case("model: the tokens of Crop are not 1 and then the patches, row by row", lambda: Crop(Plain(tiny_vit())),
         random_images(2, 3, 64, 64)),
]  # fmt: skip


@pytest.mark.parametrize(
    "match, model, images, error, options", [*ARGUMENTS, *TARGETS, *IMPORTANCES, *IMAGE_TENSORS, *MODELS]
)
def test_refused(match, model, images, error, options):
    model = model()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match=f"^{match}") as caught:
        attention_flow(model, images, **options)
    message = str(caught.value)
    assert type(caught.value) is error and "\n" not in message
    assert message.split(":")[0] in signature(attention_flow).parameters
    assert state_of(model) == before


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_models_of_the_table(row):
    """The reasons are in the table of docs/models.md."""
    message = refusal(row)
    assert message.startswith("model: ") and "\n" not in message


@pytest.mark.parametrize(
    "family, way_out",
    [
        ("mean of the patches", r"Build it with global_pool='token' \(.*\) or ask for rows='patches'"),
        ("mean of the patches, no class token", "use another model or ask for rows='patches'"),
        ("class token beside the mean of the patches", "token alone .* or ask for rows='patches'"),
        ("MViTv2 without a class token", "use another model$"),
        ("Swin", "^model: SwinTransformer uses windowed attention: no token attends to all patches$"),
        ("Hiera", "^model: Hiera has no class token; DAAM needs one query token that the score reads$"),
    ],
)
def test_refused_models_say_what_helps(family, way_out):
    assert re.search(way_out, refusal(row_of(family)))


def test_what_was_refused_with_little_memory_is_computed_with_more():
    flow = attention_flow(with_block_that_changes(), IMAGES, memory="fast")
    assert (flow.block_maps > 0).any()


def test_a_block_without_values():
    model = tiny_vit()
    model.blocks[1].to("meta")
    with pytest.raises(ValueError, match="^model: a part of it is on the meta device and has no values; load"):
        attention_flow(model, IMAGES)


def test_the_error_of_torch_is_the_cause():
    """It says which tensor was changed, on several lines."""
    with pytest.raises(UnsupportedModel) as caught:
        attention_flow(tiny_vit(attn_layer=OverwritesValues), IMAGES)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_exception_of_the_model_is_its_own():
    model = tiny_vit()
    model.blocks[1].mlp = nn.Linear(3, 3)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attention_flow(model, IMAGES)
    assert state_of(model) == before
