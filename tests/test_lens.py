"""Test the logit lens against plain derivations, family by family."""

from operator import attrgetter

import pytest
import torch
from support_table import ALL_ROWS, DECOMPOSED, PATCHES, REFUSED, naflex_batch, row_of
from timm.models.vision_transformer import VisionTransformer
from tiny_models import random_images, tiny_vit
from torch import nn

from daam_core import UnsupportedModel, attention_flow, features, logit_lens

WIDTHS = "has blocks of several widths or branches"
WITHOUT = {
    "PiT": WIDTHS, "PiT, distilled": WIDTHS, "CrossViT": WIDTHS, "CrossViT, dagger": WIDTHS,
    "MViTv2 with a class token": WIDTHS, "SigLIP, attention pool": "has an attention pool",
    "Perception Encoder, attention pool": "has an attention pool", "PRR pool": "has an attention pool",
    "NaFlexViT, attention pool": "has an attention pool",
}  # fmt: skip
"""Families that are decomposed but cannot be read, and why."""
PADDED = next(row for row in ALL_ROWS if row.batch)
READ = [row for row in DECOMPOSED + ALL_ROWS if row.family not in WITHOUT and row is not PADDED]


def options(row):
    """Return the options of `logit_lens` for those of `attention_flow`."""
    return {"rows": row.flow.get("rows", "class"), "head": "importance" not in row.flow}


def blocks_and_tail(model, images, seen):
    """Return the blocks of a model, and what computes scores or features from the output of one, written by hand."""
    library, kind = type(model).__module__.split(".")[0], type(model).__name__
    if library == "torchvision":
        return model.encoder.layers, lambda x: model.heads(model.encoder.ln(x)[:, 0])
    if library == "transformers":
        base = model.base_model
        norm = model.norm if kind.startswith("DINOv3") else base.layernorm
        classify = getattr(model, "classifier", nn.Identity())
        blocks = [m for m in model.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "attention")]
        if kind == "DeiTForImageClassificationWithTeacher":
            both = model.cls_classifier, model.distillation_classifier
            return blocks, lambda x: sum(head(norm(x)[:, i]) for i, head in enumerate(both)) / 2
        if kind == "Dinov2ForImageClassification":
            return blocks, lambda x: classify(torch.cat([norm(x)[:, 0], norm(x)[:, 1:].mean(1)], 1))
        if kind == "BeitForImageClassification" and model.config.use_mean_pooling:
            return blocks, lambda x: classify(base.pooler.layernorm(norm(x)[:, 1:].mean(1)))
        return blocks, lambda x: classify(norm(x)[:, 0])

    def tail(x):
        if kind == "TNT":
            x = x[1]
        if kind == "Cait":
            x = torch.cat([x, seen[model.blocks[-1]]], 1)
        headless = model.num_classes == 0
        valid = {"patch_valid": images["patch_valid"]} if isinstance(images, dict) else {}
        return model.forward_head(model.norm(x), pre_logits=headless, **valid)

    if kind == "ConVit":
        return model.blocks[model.local_up_to_layer :], tail
    names = {"Cait": "blocks_token_only", "Xcit": "cls_attn_blocks", "VOLO": "post_network"}
    return getattr(model, names.get(kind, "blocks")), tail


@pytest.mark.parametrize("row", READ, ids=attrgetter("name"))
def test_readings_are_what_the_tail_of_the_model_makes_of_every_block(row):
    model = row.make()
    images, seen = row.images(), {}
    handles = [m.register_forward_hook(lambda m, args, out: seen.update({m: out})) for m in model.modules()]
    with torch.no_grad():
        (model if options(row)["head"] else lambda x: features(model, x))(images)
        for handle in handles:
            handle.remove()
        blocks, tail = blocks_and_tail(model, images, seen)
        expected = torch.stack([tail(seen[block]) for block in blocks], 1)
    readings = logit_lens(model, images, **options(row))
    assert readings.shape[1] == len(blocks) > 1 and not readings.requires_grad
    torch.testing.assert_close(readings, expected, rtol=1e-4, atol=1e-5)
    assert (readings[:, 0] - readings[:, -1]).abs().max() > 1e-2  # blocks change what is read


@pytest.mark.parametrize("row", [row_of("DeiT"), row_of("DINO"), row_of("DeiT, distilled")], ids=attrgetter("name"))
def test_the_last_reading_is_the_output_of_the_model(row):
    model, images = row.make(), random_images(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(logit_lens(model, images, head=False)[:, -1], features(model, images))
        if model.num_classes:
            torch.testing.assert_close(logit_lens(model, images)[:, -1], model(images))


@pytest.mark.parametrize("family", WITHOUT)
def test_families_without_readings(family):
    row = row_of(family)
    model = row.make()
    with pytest.raises(UnsupportedModel, match=WITHOUT[family]) as caught:
        logit_lens(model, row.images())
    assert str(caught.value).startswith(f"model: {type(model).__name__} ") and "\n" not in str(caught.value)


def test_a_padded_batch_that_is_averaged_has_no_readings():
    model = PADDED.make()
    with pytest.raises(UnsupportedModel, match="model: NaFlexVit pools a padded batch by its own mask"):
        logit_lens(model, naflex_batch(), **PATCHES)


@pytest.mark.parametrize("row", [row_of("Swin"), row_of("mean of the patches")], ids=attrgetter("name"))
def test_models_that_are_not_decomposed_are_not_read(row):
    with pytest.raises(UnsupportedModel, match=r"windowed attention|mean patch token .*rows='patches'"):
        logit_lens(row.make(), random_images(1, 3, *row.size))
    assert row in REFUSED


def test_a_head_that_also_reads_the_patches(images):
    model = row_of("class token beside the mean of the patches").make()
    with pytest.raises(UnsupportedModel, match="^model: Dinov2ForImageClassification combines tokens"):
        logit_lens(model, images)
    assert logit_lens(model, images, "patches").shape == (2, 3, 5)


def test_a_model_that_does_not_pool(images):
    model = tiny_vit(global_pool="", num_classes=0)
    with pytest.raises(UnsupportedModel, match=r"^model: expected class scores .* got an output \(1, 17, 24\)$"):
        logit_lens(model, images, "patches", head=False)


def test_a_model_of_no_known_family(images):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 5, 8)

        def forward(self, x):
            return self.inner(x).mean((2, 3))

    with pytest.raises(UnsupportedModel, match="model: Own is of no known family; its blocks cannot be read"):
        logit_lens(Own(), images)


class ReadsMore(VisionTransformer):
    """Its score depends on the number of tokens that it is passed."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) + x.shape[1]


class RunsABlockTwice(VisionTransformer):
    def _pos_embed(self, x):
        return self.blocks[0](super()._pos_embed(x))


@pytest.mark.parametrize(
    "make, match",
    [
        (ReadsMore, "combines tokens after its last block, so the logit lens .* misses its output by 16$"),
        (RunsABlockTwice, "does not run every block once"),
    ],
)
def test_models_that_do_not_go_straight_from_block_to_head(make, match, images):
    model = tiny_vit(make)
    with pytest.raises(UnsupportedModel, match=f"^model: {make.__name__} {match}"):
        logit_lens(model, images)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "given, match",
    [
        ({"head": "yes"}, "^head: expected True or False, got 'yes'$"),
        ({"output": torch.full((2, 5), torch.nan)}, "^output: has NaN or infinite values; "),
        ({"output": torch.ones(2, 5, dtype=torch.int64)}, "^output: expected floating point values, got torch.int64$"),
        ({"output": torch.ones(5)}, r"^output: expected a tensor \(B, C\), not empty, got \(5,\)$"),
        ({"rows": "all"}, "^rows: expected 'class' or 'patches', got 'all'$"),
        ({"images": torch.zeros(3, 32, 32)}, r"^images: expected a tensor \(B, C, H, W\)"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, "^images: the model's output is not finite; "),
        ({"images": torch.zeros(2, 3, 40, 40)}, "^images: the model takes 32 x 32 pixels, got 40 x 40"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(given, match, model, images):
    with pytest.raises(ValueError, match=match) as caught:
        logit_lens(model, **{"images": images} | given)
    assert not isinstance(caught.value, UnsupportedModel) and "\n" not in str(caught.value)


def test_a_model_without_a_head(images):
    model = tiny_vit(num_classes=0)
    with pytest.raises(ValueError, match="^head: the model has no classifier; pass head=False for its features$"):
        logit_lens(model, images)
    assert logit_lens(model, images, head=False).shape == (2, 3, 24)


@pytest.mark.parametrize("accident", [None, "block", "norm"])
def test_the_model_is_given_back_as_found(accident, model, images):
    """Hooks, modes of all blocks and gradients stay, even after an exception."""
    model.train()
    model.blocks[1].eval()
    model.set_grad_checkpointing()
    before = [module.training for module in model.modules()]
    calls = []
    handle = model.norm.register_forward_hook(lambda module, args, output: calls.append(output.shape))

    def fail(module, args):
        raise RuntimeError("an accident")

    culprit = {"block": model.blocks[1], "norm": model.norm}.get(accident)
    if culprit is not None:
        trap = culprit.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="an accident"):
            logit_lens(model, images)
        trap.remove()
    else:
        logit_lens(model, images)
        assert calls == [(6, 1, 24), (1, 17, 24)]  # three blocks of two images at once, the class token only; the check
    assert [module.training for module in model.modules()] == before and model.grad_checkpointing
    assert len(model.norm._forward_hooks) == 1 and torch.is_grad_enabled()
    handle.remove()
    hooks = [{**m._forward_hooks, **m._forward_pre_hooks, **m._backward_hooks} for m in model.modules()]
    assert not any(hooks) and all(p.grad is None for p in model.parameters())


def test_wrappers_and_other_dtypes(model, images):
    exact = logit_lens(model, images)
    assert torch.equal(logit_lens(torch.nn.DataParallel(model), images), exact)
    with torch.autocast("cpu", torch.bfloat16):
        half = logit_lens(model, images)
    assert half.dtype == torch.bfloat16 and 0 < (half - exact).abs().max() < 0.05 * exact.abs().max()
    torch.testing.assert_close(logit_lens(model.double(), images), exact.double(), rtol=1e-4, atol=1e-5)


def test_the_first_image_runs_once_more_if_the_output_is_not_known(model, images):
    sizes = []
    model.patch_embed.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    plain = logit_lens(model, images)
    assert sizes == [2, 1]
    output = attention_flow(model, images).output
    sizes.clear()
    assert torch.equal(logit_lens(model, images, output=output), plain) and sizes == [2]
    with pytest.raises(UnsupportedModel, match=r"^model: VisionTransformer combines tokens .* misses its output by 1$"):
        logit_lens(model, images, output=output + torch.tensor([[0.0], [1.0]]))
    with pytest.raises(ValueError, match=r"^output: expected \(2, 5\), got \(2, 4\)$"):
        logit_lens(model, images, output=output[:, 1:])
