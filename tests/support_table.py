"""Support table of docs/models.md: for every row, decompose a small model with random weights.

    python tests/support_table.py              # prints the table
    python tests/support_table.py --write      # writes it into docs/models.md

The last column is the largest |sum_j S_b[j] - T_b| over all blocks, images and query rows. S_b comes from the recorder,
whose matrices daam_core weights; T_b comes from hooks of this file, on the module that reads it.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
from timm.layers import Attention
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.volo import VOLO
from tiny_models import TINY, build, random_images, tiny_timm, tiny_torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer

from daam_core import AttentionFlow, UnsupportedModel, attention_flow
from daam_vit.attention import AttentionCall, AttentionMatrix, AttentionRecorder, repeat_heads

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MARKERS = "<!-- table: support -->", "<!-- end of table -->"


@dataclass(frozen=True, eq=False)
class Row:
    """A model of the table."""

    family: str
    example: str
    """The name with which people ask for such a model."""
    make: Callable[[], nn.Module]
    size: tuple[int, int] = (32, 32)
    batch: Callable[[], dict[str, Tensor]] | None = None
    """Images that are not `(B, 3, H, W)`."""
    flow: dict = field(default_factory=dict)
    """Options of `attention_flow`."""

    @property
    def name(self) -> str:
        """Family and example, and which options there are."""
        return " ".join([f"{self.family}: {self.example}", *self.flow])

    def images(self, count: int = 2) -> Tensor | dict[str, Tensor]:
        """Return a batch of images."""
        return self.batch() if self.batch else random_images(count, 3, *self.size)


def row_of(family: str) -> Row:
    """Return the first row of a family."""
    return next(row for row in DECOMPOSED + ALL_ROWS + REFUSED if row.family == family)


def from_timm(family: str, name: str, size: int = 32, flow: dict | None = None, batch=None, **options) -> Row:
    """Make a row for a timm name, in the size of TINY unless the options say otherwise."""
    example = f"{name} (global_pool='token')" if options.get("global_pool") == "token" else name
    options = {**TINY, **options} if options.pop("tiny", True) else options
    return Row(family, example, lambda: tiny_timm(name.split(" ")[0], **options), (size, size), batch, flow or {})


def from_transformers(family: str, name: str, flow: dict | None = None, attention: str = "sdpa", **options) -> Row:
    """Make a row for a class of transformers; its configuration has the same name."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, re.sub("(Model|For|Backbone).*", "Config", name))(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32,
            patch_size=8, num_labels=5, **options,
        )  # fmt: skip
        config._attn_implementation = attention
        return build(getattr(transformers, name), config)

    return Row(family, f"transformers {name}, {attention}", make, flow=flow or {})


def naflex_batch() -> dict[str, Tensor]:
    """Return two images of 4 x 4 and 3 x 5 patches; the second one has a place that is not filled."""
    coord = [[(y, x) for y in range(h) for x in range(w)] for h, w in ((4, 4), (3, 5))]
    coord[1].append((0, 0))
    return {
        "patches": random_images(2, 16, 3 * 8 * 8),
        "patch_coord": torch.tensor(coord),
        "patch_valid": torch.tensor([[True] * 16, [True] * 15 + [False]]),
    }


class GatedAttention(Attention):
    """Attention of timm with a gate after the sum."""

    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


def tiny_volo() -> nn.Module:
    return build(
        VOLO, (1, 1, 1, 1), seed=6, img_size=64, embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4), num_classes=5,
        mlp_ratio=2.0, stem_hidden_dim=16,
    )  # fmt: skip


def tiny_mvit(use_cls_token: bool = True, global_pool: str = "token") -> nn.Module:
    config = MultiScaleVitCfg(
        depths=(1, 1, 2), embed_dim=(24, 48, 96), num_heads=(1, 2, 4), use_cls_token=use_cls_token,
        stride_q=((1, 1), (2, 2), (2, 2)),
    )  # fmt: skip
    return build(MultiScaleVit, config, img_size=64, num_classes=5, global_pool=global_pool)


TOKEN, PATCHES = {"global_pool": "token"}, {"rows": "patches"}
ONES = {"importance": torch.ones(24)}
NAFLEX = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5, "tiny": False}
CROSSVIT = {"embed_dim": [24, 48], "num_classes": 5, "tiny": False, "size": 240}
PIT = {"img_size": 64, "base_dims": [12, 12, 12], "depth": [1, 1, 2], "num_classes": 5, "tiny": False, "size": 64}
TNT = {"img_size": 64, "embed_dim": 48, "inner_dim": 8, "depth": 3, "num_heads_inner": 2, "num_heads_outer": 2,
       "num_classes": 5, "tiny": False, "size": 64}  # fmt: skip
SMALL = {"img_size": 64, "tiny": False, "size": 64}
SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1), **SMALL}
XCIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "tiny": False}

DECOMPOSED = [
    from_timm("ViT, AugReg", "vit_small_patch16_224"),
    from_timm("DeiT", "deit_small_patch16_224"),
    from_timm("DeiT-3 (LayerScale)", "deit3_small_patch16_224", init_values=0.5),
    from_timm("DeiT, distilled", "deit_small_distilled_patch16_224"),
    from_timm("FlexiViT", "flexivit_small"),
    from_timm("CLIP-style (norm before the blocks)", "vit_base_patch16_clip_224"),
    from_timm("hybrid with a ResNet stem", "vit_small_r26_s32_224", size=64, img_size=64, num_heads=2, embed_dim=24,
              depth=3, num_classes=5, tiny=False),
    from_timm("DINO", "vit_small_patch8_224.dino", flow=ONES, num_classes=0),
    from_timm("DINOv2", "vit_small_patch14_dinov2", flow=ONES, num_classes=0),
    from_timm("DINOv2 with registers", "vit_small_patch14_reg4_dinov2"),
    from_timm("qk-norm", "vit_small_patch16_224 (qk_norm=True)", qk_norm=True),
    from_timm("scale norm in the attention", "vit_small_patch16_224 (scale_attn_norm=True)", scale_attn_norm=True),
    from_timm("gated attention", "vit_small_patch16_224 (gated)", attn_layer=GatedAttention),
    from_timm("parallel attention and MLP", "vit_base_patch16_xp_224"),
    from_timm("parallel blocks", "vit_small_patch16_18x2_224"),
    from_timm("differential attention", "vit_dwee_patch16_reg1_gap_256", class_token=True, **TOKEN),
    from_timm("differential, parallel", "vit_dpwee_patch16_reg1_gap_256", class_token=True, **TOKEN),
    from_timm("SigLIP, attention pool", "vit_base_patch16_siglip_224"),
    from_timm("Perception Encoder, attention pool", "vit_pe_core_small_patch16_384", seed=6),
    from_timm("PRR pool", "vit_small_patch16_224 (global_pool='prr')", global_pool="prr"),
    from_timm("rotary position embedding", "vit_small_patch16_rope_224"),
    from_timm("rotary, mixed", "vit_small_patch16_rope_mixed_224"),
    from_timm("EVA", "eva_large_patch14_196", **TOKEN),
    from_timm("EVA-02", "eva02_tiny_patch14_224", **TOKEN),
    from_timm("EVA-02, split q, k, v", "eva02_base_patch14_224", **TOKEN),
    from_timm("EVA-02 CLIP (scale norm)", "eva02_base_patch16_clip_224"),
    from_timm("DINOv3", "vit_small_patch16_dinov3", **TOKEN),
    from_timm("DINOv3 with biases", "vit_small_patch16_dinov3_qkvb", **TOKEN),
    from_timm("BEiT", "beit_base_patch16_224", **TOKEN),
    from_timm("BEiT v2", "beitv2_base_patch16_224", **TOKEN),
    from_timm("BEiT-3", "beit3_base_patch16_224", **TOKEN),
    from_timm("relative position", "vit_relpos_base_patch16_cls_224"),
    from_timm("NaFlexViT", "naflexvit_base_patch16_radio_v3", **NAFLEX, **TOKEN),
    from_timm("NaFlexViT, padded batch", "naflexvit_base_patch16_radio_v3", batch=naflex_batch, **NAFLEX, **TOKEN),
    from_timm("NaFlexViT, attention pool", "naflexvit_base_patch16_map", **NAFLEX),
    from_timm("CaiT", "cait_xxs24_224"),
    from_timm("XCiT/16", "xcit_small_12_p16_224", size=64, img_size=64, **XCIT),
    from_timm("XCiT/8, DINO", "xcit_small_12_p8_224", flow={"importance": torch.ones(32)},
              **{**XCIT, "num_classes": 0}),
    Row("VOLO", "volo_d1_224", tiny_volo, (64, 64)),
    from_timm("ConViT", "convit_tiny", depth=4, local_up_to_layer=2),
    from_timm("PiT", "pit_s_224", **PIT),
    from_timm("PiT, distilled", "pit_s_distilled_224", **PIT),
    from_timm("CrossViT", "crossvit_tiny_240", **CROSSVIT),
    from_timm("CrossViT, dagger", "crossvit_9_dagger_240", **{**CROSSVIT, "embed_dim": [32, 64]}),
    from_timm("TNT", "tnt_s_patch16_224", **TNT),
    from_timm("TNT, legacy", "tnt_s_legacy_patch16_224", **TNT),
    Row("MViTv2 with a class token", "mvitv2_small_cls", tiny_mvit, (64, 64)),
    Row("ViT", "torchvision vit_b_16", tiny_torchvision),
    from_transformers("ViT", "ViTForImageClassification"),
    from_transformers("ViT", "ViTForImageClassification", attention="eager"),
    from_transformers("DeiT", "DeiTForImageClassification"),
    from_transformers("DeiT, distilled", "DeiTForImageClassificationWithTeacher", attention="eager"),
    from_transformers("DINOv2", "Dinov2Model", flow=ONES),
    from_transformers("DINOv2 with registers", "Dinov2WithRegistersModel", flow=ONES, attention="eager"),
    from_transformers("DINOv3", "DINOv3ViTModel", flow=ONES, num_register_tokens=4),
    from_transformers("DINOv3", "DINOv3ViTModel", flow=ONES, num_register_tokens=4, attention="eager"),
    from_transformers("BEiT", "BeitForImageClassification", use_mean_pooling=False, use_relative_position_bias=True),
    from_transformers("BEiT", "BeitForImageClassification", attention="eager", use_mean_pooling=False,
                      use_shared_relative_position_bias=True),
]  # fmt: skip
ALL_ROWS = [
    from_timm("GAP ViT", "vit_base_patch16_gap_224", flow=PATCHES, class_token=False, global_pool="avg"),
    from_timm("BEiT, default", "beit_base_patch16_224", flow=PATCHES),
    from_timm("EVA-02, default", "eva02_base_patch14_448", flow=PATCHES),
    from_timm("DINOv3, default", "vit_small_patch16_dinov3", flow={**PATCHES, **ONES}, num_classes=0),
    from_timm("NaFlexViT, padded batch", "naflexvit_base_patch16_gap", batch=naflex_batch, flow=PATCHES, **NAFLEX),
    from_transformers("DINOv2 classifier", "Dinov2ForImageClassification", flow=PATCHES),
    from_transformers("BEiT, default", "BeitForImageClassification", flow=PATCHES, use_relative_position_bias=True),
]
REFUSED = [
    from_timm("Swin", "swin_tiny_patch4_window7_224", window_size=4, **SWIN),
    from_timm("Swin v2", "swinv2_tiny_window8_256", window_size=4, **SWIN),
    from_timm("MaxViT", "maxvit_tiny_rw_224", depths=(1,) * 4, embed_dim=(32,) * 4, stem_width=8, **SMALL),
    from_timm("Hiera", "hiera_tiny_224", embed_dim=12, num_heads=1, stages=(1,) * 4, size=64, tiny=False),
    from_timm("LeViT", "levit_128s", embed_dim=(16,) * 3, depth=(1,) * 3, num_heads=(2,) * 3, key_dim=8, **SMALL),
    from_timm("PVT v2", "pvt_v2_b0", embed_dims=(8,) * 4, depths=(1,) * 4, num_heads=(1,) * 4, size=64, tiny=False),
    Row("MViTv2 without a class token", "mvitv2_tiny", partial(tiny_mvit, use_cls_token=False, global_pool="avg"),
        (64, 64)),
    from_timm("CoaT", "coat_tiny", embed_dims=(8,) * 4, serial_depths=(1,) * 4, parallel_depth=1, num_heads=1, **SMALL),
    Row("MLP-Mixer", "mixer_s32_224", partial(build, MlpMixer, img_size=64, embed_dim=24, num_blocks=1), (64, 64)),
    from_timm("ResNet", "resnet18", layers=(1,) * 4, size=64, tiny=False),
    Row("ResNet", "torchvision resnet18", partial(build, ResNet, BasicBlock, [1] * 4), (64, 64)),
    Row("Swin", "torchvision swin_t", partial(build, SwinTransformer, [4, 4], 12, [1, 1], [1, 1], [4, 4]), (64, 64)),
    from_timm("mean of the patches", "beit_base_patch16_224"),
    from_timm("mean of the patches, no class token", "vit_base_patch16_gap_224", class_token=False, global_pool="avg"),
    from_transformers("class token beside the mean of the patches", "Dinov2ForImageClassification"),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The identity
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A flow, and what was seen of its attention."""

    flow: AttentionFlow
    S: list[Tensor]
    """`(B, N, Q, C)` of every attention that was decomposed, for its first Q queries."""
    T: list[Tensor]
    """`(B, Q, C)`, seen where the next module reads it."""
    C: list[Tensor]
    """`(B, M, C)`: the gradient that arrived there, for all M queries."""

    @property
    def error(self) -> float:
        """Largest |sum_j S_b[j] - T_b|."""
        return max((S.sum(1) - T).abs().max().item() for S, T in zip(self.S, self.T, strict=True))


@cache
def measured(row: Row) -> Measured:
    """Return `measure(row)`, computed once for all tests."""
    return measure(row)


def measure(row: Row) -> Measured:
    """Run `attention_flow` on the model of a row and watch its attention."""
    model = row.make()
    with semantic_maps() as maps, attention_outputs(model) as (outputs, gradients):
        flow = attention_flow(model, row.images(), **row.flow)
    modules = [module for module in outputs if module in maps]  # in the order of the forward
    return Measured(
        flow,
        S=[maps[module] for module in modules],
        T=[outputs[module][:, : maps[module].shape[2]] for module in modules],
        C=[gradients[module] for module in modules],
    )


@contextmanager
def semantic_maps():
    """Collect S_b `(B, N, Q, C)` by the module, from the matrices that the recorder hands to daam_core."""
    maps = {}
    init = AttentionRecorder.__init__

    def recording(recorder, layers, on_gradient, *rest):
        def keep(call: AttentionCall, A: AttentionMatrix, C: Tensor) -> None:
            a = A.rows(slice(call.layer.queries))  # (B, H, Q, N); all queries for rows="patches"
            S = torch.einsum("bhqn,bhnd->bnqhd", a, repeat_heads(A.value, a.shape[1])).flatten(3)
            module = call.layer.module
            # nn.MultiheadAttention has no module that reads T: it is compared after its projection
            maps[module] = S @ module.out_proj.weight.T if isinstance(module, nn.MultiheadAttention) else S
            on_gradient(call, A, C)

        init(recorder, layers, keep, *rest)

    with mock.patch.object(AttentionRecorder, "__init__", recording):
        yield maps


@contextmanager
def attention_outputs(model: nn.Module):
    """Collect T and dY/dT `(B, M, C)` by the attention module, with hooks where the next module reads T."""
    outputs, gradients, added = {}, {}, {}

    def see(module: nn.Module, T: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        outputs[module] = (read(T) - added.get(module, 0)).detach()
        if T.requires_grad:
            T.register_hook(lambda gradient: gradients.update({module: read(gradient)}))

    def watch(module: nn.Module):
        if isinstance(module, nn.MultiheadAttention):
            added[module] = module.out_proj.bias
            return [module.register_forward_hook(lambda m, args, output: see(m, output[0], lambda x: x))]
        reader, read = reader_of(module)
        handles = [reader.register_forward_pre_hook(lambda r, args: see(module, args[0], read))] if reader else []
        if type(module).__name__ == "MultiScaleAttention":  # adds its queries to T

            def remember(norm, args, q):
                added[module] = q.transpose(1, 2).flatten(2)

            handles.append(module.norm_q.register_forward_hook(remember))
        return handles

    handles = [handle for module in model.modules() for handle in watch(module)]
    try:
        yield outputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def reader_of(module: nn.Module) -> tuple[nn.Module | None, Callable[[Tensor], Tensor] | None]:
    """Return the module that reads T of an attention module, and how to take T from its input; else None and None."""
    name = type(module).__name__
    if name.startswith("Diff"):
        return module.sub_norm, lambda x: x.transpose(1, 2).flatten(2)  # (B, H, N, 2 d)
    if name == "ParallelScalingBlock":
        reader = getattr(module, "out_proj", None) or module.attn_out_proj
        return reader, lambda x: x.split(module.num_heads * module.head_dim, dim=-1)[0]
    if not re.search("Attention|Attn|MHSA", name) or name.startswith("CrossAttentionBlock"):
        return None, None
    parts = {"AttentionPoolPrr": ["post_norm"], "AttentionPoolLatent": ["proj"]}.get(name, ["norm", "proj", "o_proj"])
    return next((r for part in parts if (r := getattr(module, part, None)) is not None), None), lambda x: x


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def table(results: Iterable[Measured]) -> str:
    """Return the table in Markdown."""
    columns = ["family", "for example", "decomposed", "maps", "tokens", "grid", "relevance flow", "error"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row, result in zip(DECOMPOSED + ALL_ROWS, results):
        blocks, h, w = result.flow.block_maps.shape[1:]
        tokens = ", ".join(dict.fromkeys(str(S.shape[1]) for S in result.S))
        relevance = relevance_of(row)
        lines.append(
            f"| {row.family} | `{row.example}` | {result.flow.decomposed} | {blocks} | {tokens} | {h} x {w} "
            f"| {f'refused: {relevance}' if isinstance(relevance, str) else 'yes'} | {result.error:.0e} |"
        )
    for row in REFUSED:
        lines.append(f"| {row.family} | `{row.example}` | refused: {reason(row)} | | | | | |")
    return "\n".join(lines)


def reason(row: Row) -> str:
    """Return the first part of the message with which a row is refused."""
    return refusal(row).removeprefix("model: ").split(";")[0].split(". ")[0]


@cache
def refusal(row: Row) -> str:
    """Return the message with which a row is refused, computed once for all tests."""
    try:
        attention_flow(row.make(), row.images(1), **row.flow)
    except UnsupportedModel as error:
        return str(error)
    raise AssertionError(f"{row.example} is not refused")


@cache
def relevance_of(row: Row) -> AttentionFlow | str:
    """Return the relevance flow of a row, or in short why it is refused; computed once for all tests."""
    try:
        return attention_flow(row.make(), row.images(), variant="relevance", shortcuts=False, **row.flow)
    except UnsupportedModel as error:
        short = re.search(r"no rule for \w+|a \w+ does not get them as one tensor", str(error))[0]
        return short.replace("them", "its tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    text = table(map(measure, DECOMPOSED + ALL_ROWS))
    if not write:
        print(text)
        return
    start, end = MARKERS
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
