"""The evolution of the decision: the logit lens against plain derivations, what is said of it, and its picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from support_table import ALL_ROWS, DECOMPOSED, PATCHES, REFUSED, naflex_batch
from test_families import name_of, row_of
from timm.models.vision_transformer import VisionTransformer
from tiny_models import random_images, tiny_timm, tiny_vit
from torch import nn

import daam_core
from command_line import results
from command_line.results import draw_evolution, evolution
from daam_core import UnsupportedModel, attention_flow, evolution_picture, features, logit_lens

WIDTHS = "has blocks of several widths or branches"
WITHOUT = {
    "PiT": WIDTHS, "PiT, distilled": WIDTHS, "CrossViT": WIDTHS, "CrossViT, dagger": WIDTHS,
    "MViTv2 with a class token": WIDTHS, "SigLIP, attention pool": "has an attention pool",
    "Perception Encoder, attention pool": "has an attention pool", "PRR pool": "has an attention pool",
    "NaFlexViT, attention pool": "has an attention pool",
}  # fmt: skip
"""The families that are decomposed and have no reading, and why."""
PADDED = next(row for row in ALL_ROWS if row.images)
READ = [row for row in DECOMPOSED + ALL_ROWS if row.family not in WITHOUT and row is not PADDED]


def inputs(row, model):
    return row.images(model) if row.images else random_images(2, 3, *row.size)


def options(row):
    """Of `logit_lens`, from those of `attention_flow`."""
    return {"rows": row.flow.get("rows", "class"), "head": "importance" not in row.flow}


# ----------------------------------------------------------------------------------------------------------------------
# The logit lens
# ----------------------------------------------------------------------------------------------------------------------


def blocks_and_tail(model, images, seen):
    """The blocks of a model, and what makes scores, or features, of the output of one: written down by hand."""
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


@pytest.mark.parametrize("row", READ, ids=name_of)
def test_readings_are_what_the_tail_of_the_model_makes_of_every_block(row):
    model = row.make()
    images, seen = inputs(row, model), {}
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


@pytest.mark.parametrize("row", [row_of("DeiT"), row_of("DINO"), row_of("DeiT, distilled")], ids=name_of)
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
        logit_lens(model, inputs(row, model))
    assert str(caught.value).startswith(f"model: {type(model).__name__} ") and "\n" not in str(caught.value)


def test_a_padded_batch_that_is_averaged_has_no_readings():
    model = PADDED.make()
    with pytest.raises(UnsupportedModel, match="model: NaFlexVit pools a padded batch by its own mask"):
        logit_lens(model, naflex_batch(model), **PATCHES)


@pytest.mark.parametrize("row", [row_of("Swin"), row_of("mean of the patches")], ids=name_of)
def test_models_that_are_not_decomposed_are_not_read(row):
    with pytest.raises(UnsupportedModel, match=r"windowed attention|mean patch token .*rows='patches'"):
        logit_lens(row.make(), random_images(1, 3, *row.size))
    assert row in REFUSED


def test_a_head_that_also_reads_the_patches(images):
    model = row_of("class token beside the mean of the patches").make()
    with pytest.raises(UnsupportedModel, match="^model: Dinov2ForImageClassification reads more than the tokens"):
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
    """What it does after its last block is not done with what the class token gives alone."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) + x.shape[1]


class RunsABlockTwice(VisionTransformer):
    def _pos_embed(self, x):
        return self.blocks[0](super()._pos_embed(x))


@pytest.mark.parametrize(
    "make, match",
    [
        (ReadsMore, "reads more than the tokens that its last block gives, .* misses its output by 16$"),
        (RunsABlockTwice, "does not run every block once"),
    ],
)
def test_models_of_ones_own_that_go_other_ways(make, match, images):
    model = tiny_vit(make)
    with pytest.raises(UnsupportedModel, match=f"^model: {make.__name__} {match}"):
        logit_lens(model, images)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "given, match",
    [
        ({"rows": "all"}, "^rows: expected 'class' or 'patches', got 'all'$"),
        ({"images": torch.zeros(3, 32, 32)}, r"^images: expected a tensor \(B, C, H, W\)"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, "^images: the model's output is not finite; "),
        ({"images": torch.zeros(2, 3, 40, 40)}, "^images: the model takes 32 x 32 pixels, got 40 x 40"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(given, match, model, images):
    with pytest.raises(ValueError, match=match) as caught:
        logit_lens(model, **{"images": images} | given)
    assert not isinstance(caught.value, UnsupportedModel) and "\n" not in str(caught.value)


def test_a_head_that_is_not_there(images):
    model = tiny_vit(num_classes=0)
    with pytest.raises(ValueError, match="^head: the model has no classifier; give head=False for its features$"):
        logit_lens(model, images)
    assert logit_lens(model, images, head=False).shape == (2, 3, 24)


@pytest.mark.parametrize("accident", [None, "block", "norm"])
def test_the_model_is_given_back_as_found(accident, model, images):
    """Its hooks, its mode block by block, its gradients; also after an exception."""
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


def test_one_forward_of_all_images_and_one_of_the_first_where_the_output_is_not_known(model, images):
    sizes = []
    model.patch_embed.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    plain = logit_lens(model, images)
    assert sizes == [2, 1]
    output = attention_flow(model, images).output
    sizes.clear()
    assert torch.equal(logit_lens(model, images, output=output), plain) and sizes == [2]
    with pytest.raises(UnsupportedModel, match=r"^model: VisionTransformer reads more .* misses its output by 1$"):
        logit_lens(model, images, output=output + torch.tensor([[0.0], [1.0]]))
    with pytest.raises(ValueError, match=r"^output: expected \(2, 5\), got \(2, 4\)$"):
        logit_lens(model, images, output=output[:, 1:])


# ----------------------------------------------------------------------------------------------------------------------
# What is said of it
# ----------------------------------------------------------------------------------------------------------------------

VALUES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]])
"""Five blocks, three classes: class 1 leads after the second, the fourth and the fifth."""


def maps(*sums):
    """`(L, 2, 2)`: accumulated maps, whose blocks have these sums."""
    return torch.tensor(sums)[:, None, None].expand(-1, 2, 2).cumsum(0) / 4


def test_evolution_of_one_class():
    said = evolution(VALUES, maps(1.0, 2.0, 0.0, 3.0, 4.0), [1], "class {}".format, "probability")
    assert said["runner_up"] == {"index": 2, "name": "class 2"} and said["leads_from"] == 4
    assert [block["block"] for block in said["blocks"]] == [1, 2, 3, 4, 5]
    assert [block["share"]["1"] for block in said["blocks"]] == pytest.approx([0.1, 0.2, 0, 0.3, 0.4])
    assert [block["probability"]["1"] for block in said["blocks"]] == pytest.approx(VALUES[:, 1].tolist())
    assert [block["probability"]["2"] for block in said["blocks"]] == pytest.approx(VALUES[:, 2].tolist())
    assert [block["leader"]["index"] for block in said["blocks"]] == [0, 1, 0, 1, 1]
    assert said["blocks"][3]["leader"] == {"index": 1, "name": "class 1", "probability": pytest.approx(0.7)}
    assert "norm and head" in said["reading"] and "not trained to be read" in said["reading"]


def test_evolution_of_a_class_that_does_not_lead_at_the_end():
    said = evolution(VALUES, maps(1.0, 1.0, 1.0, 1.0, 1.0), [0], str, "vote")
    assert said["leads_from"] is None and said["runner_up"] == {"index": 1, "name": "1"}
    assert said["blocks"][0]["leader"] == {"index": 0, "name": "0", "vote": pytest.approx(0.6)}
    assert set(said["blocks"][0]) == {"block", "share", "vote", "leader"} and "neighbours" in said["reading"]


def test_evolution_of_several_classes():
    accumulated = torch.stack([maps(1.0, 1.0, 1.0, 1.0, 0.0), maps(0.0, 0.0, 0.0, 0.0, 2.0)])
    said = evolution(VALUES, accumulated, [2, 1], str, "probability")
    assert said["leads_from"] == 4 and said["runner_up"] == {"index": 0, "name": "0"}
    assert [block["share"] for block in said["blocks"]] == [{"2": 0.25, "1": 0}] * 4 + [{"2": 0, "1": 1}]
    assert list(said["blocks"][0]["probability"]) == ["2", "1", "0"]
    every = evolution(VALUES, accumulated[[0, 0, 1]], [2, 0, 1], str, "probability")
    assert every["runner_up"] is None and list(every["blocks"][0]["probability"]) == ["2", "0", "1"]


def test_evolution_from_the_first_block_on_and_of_empty_maps():
    said = evolution(VALUES[3:], maps(0.0, 0.0), [1], str, "probability")
    assert said["leads_from"] == 1 and [block["share"]["1"] for block in said["blocks"]] == [0, 0]
    assert evolution(None, maps(1.0), [1], str, "probability") is None


def test_a_model_without_readings_is_a_line_and_no_error(images, capsys):
    model = tiny_timm("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
                      num_classes=5)  # fmt: skip
    flow = attention_flow(model, images)
    assert results.lens_outputs(model, images, flow, head=True) is None
    out, err = capsys.readouterr()
    assert out.startswith("  no evolution.png: VisionTransformer has an attention pool; ") and not err
    assert out.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------------------


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def colours_of(picture, box=None):
    return {colour for _, colour in picture.crop(box).getcolors(1 << 24)}


def draw(blocks=4, several=1, leads_from=3, size=(60, 40), name="cup", **more):
    """Every map has a colour of its own; the curves rise to 80, 70, ... per cent."""
    frames = [[Image.new("RGB", size, (9, 90 + b, 10 * k)) for b in range(blocks)] for k in range(several)]
    names = [f"{name} {k}" for k in range(several + 1)]
    curves = [(n, np.linspace(0.1, 0.8 - 0.1 * k, blocks).tolist()) for k, n in enumerate(names)]
    shares = [[1 / blocks] * blocks] * several
    return evolution_picture(frames, curves, shares, [names[0]] * blocks, leads_from, **more)


@pytest.mark.parametrize("blocks", [1, 2, 12, 24])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (300, 20)], ids=["landscape", "portrait", "panorama"])
def test_every_map_stands_above_its_point_and_its_bar(blocks, size):
    several = 2
    picture = np.asarray(draw(blocks, several, blocks, size))
    orange = (picture == rgb(daam_core._CLASS_COLOURS[0])).all(-1)
    middles = []
    for b in range(blocks):
        shown = (picture == (9, 90 + b, 0)).all(-1)
        rows, columns = shown.nonzero()
        assert len(rows) > 50
        assert abs((np.ptp(columns) + 1) / (np.ptp(rows) + 1) / (size[0] / size[1]) - 1) < 0.3  # its own shape
        middles.append(columns.mean())
        assert orange[rows.max() + 1 :, round(middles[-1])].any()  # its point
    assert middles == pytest.approx(np.linspace(middles[0], middles[-1], blocks).tolist(), abs=1.5)
    assert picture.shape[1] >= 1500


def test_what_leads_is_tinted_from_its_block_on():
    tinted, plain = draw(leads_from=3), draw(leads_from=None)
    tint = rgb(daam_core._TINT)
    columns = (np.asarray(tinted) == tint).all(-1).any(0).nonzero()[0]
    third = (np.asarray(tinted) == (9, 92, 0)).all(-1).any(0).nonzero()[0]
    second = (np.asarray(tinted) == (9, 91, 0)).all(-1).any(0).nonzero()[0]
    assert second.max() < columns.min() < third.mean()
    assert tint not in colours_of(plain)


def test_names_are_cut_and_nothing_is_drawn_over_the_edges():
    for leads_from in (1, 12, None):
        picture = draw(12, 3, leads_from, name="a very long name of a class, " * 5, note="a word " * 80)
        width, height = picture.size
        for box in ((0, 0, width, 8), (0, 0, 8, height), (width - 6, 0, width, height), (0, height - 8, width, height)):
            assert colours_of(picture, box) == {(255, 255, 255)}


def test_a_note_and_a_word_for_the_values():
    plain, noted = draw(), draw(note="a word " * 60)
    assert noted.height > plain.height and noted.width == plain.width
    assert draw(quantity="share of the votes").tobytes() != plain.tobytes()
    assert draw().tobytes() == plain.tobytes()


@pytest.mark.parametrize("places", [[50.0], [10.0, 11.0, 90.0], [99.0, 98.0, 97.0, 96.0], [0.0, 0.0, 0.0]])
def test_labels_are_moved_apart(places):
    moved = daam_core._apart(places, 10, 0, 100)
    assert sorted(range(len(places)), key=lambda i: (places[i], i)) == sorted(range(len(places)), key=moved.__getitem__)
    gaps = np.diff(sorted(moved))
    assert (gaps >= 10 - 1e-9).all() and min(moved) >= 0 and max(moved) <= 100
    if len(places) == 1:
        assert moved == places


@pytest.mark.parametrize(
    "frames, curves, shares, leaders, leads_from, match",
    [
        (0, 1, 1, 4, None, r"^frames: expected of every class as many as .* got \[\[\], \[4\], \[4\], \[4\]\]$"),
        (1, 1, 2, 4, None, "^frames: expected of every class"),
        (2, 1, 2, 4, None, "^frames: expected of every class"),
        (1, 1, 1, 3, None, r"got \[\[4\], \[4\], \[4\], \[3\]\]$"),
        (1, 2, 1, 4, 5, "^leads_from: expected None or a block, 1 to 4, got 5$"),
        (1, 2, 1, 4, 0, "^leads_from: expected None or a block, 1 to 4, got 0$"),
    ],
)
def test_picture_errors(frames, curves, shares, leaders, leads_from, match):
    frames = [[Image.new("RGB", (6, 4))] * 4] * frames
    with pytest.raises(ValueError, match=match):
        evolution_picture(frames, [("cup", [0.5] * 4)] * curves, [[0.25] * 4] * shares, ["cup"] * leaders, leads_from)


def test_the_picture_of_what_is_said():
    """The numbers and names of flow.json reach the picture in their places."""
    accumulated = torch.stack([maps(1.0, 1.0, 1.0, 1.0, 0.0), maps(0.0, 0.0, 0.0, 0.0, 2.0)])
    said = evolution(VALUES, accumulated, [2, 1], "class {}, or so".format, "vote")
    given = {}

    def picture(*args):
        given.update(zip(("frames", "curves", "shares", "leaders", "leads_from", "quantity", "note"), args))
        return evolution_picture(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "evolution_picture", picture)
        drawn = draw_evolution(Image.new("RGB", (640, 320), "gray"), accumulated, said, ["two", "one"])
    assert drawn.mode == "RGB" and [len(row) for row in given["frames"]] == [5, 5]
    assert given["frames"][0][0].size == (320, 160)
    assert [name for name, _ in given["curves"]] == ["two", "one", "class 0"]
    assert given["curves"][1][1] == pytest.approx(VALUES[:, 1].tolist())
    assert given["shares"] == [[0.25] * 4 + [0], [0] * 4 + [1]]
    assert given["leaders"] == ["class 0", "one", "class 0", "one", "one"] and given["leads_from"] == 4
    assert given["quantity"] == "share of the votes" and given["note"] == said["reading"]
