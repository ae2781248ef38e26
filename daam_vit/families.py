"""Plan the decomposition of every model family: which layers, and where their keys lie in the picture.

To add a family:

1. Write a function (model, images) -> `Plan` that names the modules of its attention.
2. Add a row to `FAMILIES`, and the function to `ALL_ROWS` if its score may read the mean patch token. See also
   `WHOLE_LAST_BLOCK`, `NO_LENS` and `REFUSED`.
3. For a package other than timm, torchvision and transformers, extend `library_of`, `features` and `num_classes` in
   `libraries.py`.
4. Add a row to `tests/support_table.py`.

What the attention computes is seen while the model runs, and checked against the plan by `checks.py`: one attention
per layer, the expected number of keys, sum_j S_b[j] == T_b, and a score that reads no other queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from daam_vit.checks import check_size
from daam_vit.inputs import Images, UnsupportedModel, check_choice
from daam_vit.libraries import check_input, class_names_of, input_channels, library_of
from daam_vit.plan import AttentionLayer, Plan

Family = Callable[[Any, Any], Plan]
"""A model and its images -> its plan. The model's type is Any: its attributes are those of its library."""


def plan_of(model: nn.Module, images: Images, rows: str) -> Plan | None:
    """Return the plan of the model's family; None if no family is known, and only the run can tell.

    Raises:
        UnsupportedModel: if the decomposition, or `rows`, is not defined for the family.
        ValueError: if `rows` is unknown or the images do not fit the model.
    """
    check_choice("rows", rows, ("class", "patches"))
    for reason, refused in REFUSED.items():
        if any(name in refused for name in class_names_of(model)):
            raise UnsupportedModel(f"model: {type(model).__name__} {reason}")
    family, all_rows = family_of(model), rows == "patches"
    if all_rows and family not in ALL_ROWS:
        raise UnsupportedModel(
            f"rows: 'patches' is not defined for {type(model).__name__}; it is for timm's VisionTransformer, Eva, Beit "
            f"and NaFlexVit and the ViTs of torchvision and transformers"
        )
    if family is not None and not all_rows and library_of(model) == "timm":
        _check_pool(model)
    check_input(model, images, None if family is None else input_channels(model))
    if family is None:
        return None
    plan = family(model, images)
    if not plan.steps:
        raise UnsupportedModel("model: it has no blocks that the class token passes, so there is nothing to decompose")
    derived = type(model).__module__.split(".")[0] != library_of(model)  # a user's own subclass may reorder the patches
    unverified = plan.steps[0][0] if derived and family in ALL_ROWS and isinstance(images, Tensor) else None
    if all_rows:
        steps = [*plan.steps, *([[plan.pool]] if plan.pool else [])]
        steps = [[replace(layer, queries=None) for layer in step] for step in steps]
        plan = Plan(steps, f"all tokens, rows='patches', {len(steps)} blocks")
    elif plan.pool:
        plan = Plan([[plan.pool]], "attention pool, 1 map", plan.pool)
    one_branch = not all_rows and all(len(step) == 1 for step in (plan.steps[0], plan.steps[-1]))
    last = plan.steps[-1][0] if one_branch and family not in WHOLE_LAST_BLOCK else None
    return replace(plan, last=last, unverified=unverified)


def family_of(model: nn.Module) -> Family | None:
    """Return the function of the model's family, by its class or the nearest known base class."""
    return next((FAMILIES[name] for name in class_names_of(model) if name in FAMILIES), None)


def all_rows_hint(model: nn.Module) -> str:
    """Return the rest of an error message: the way out that the family offers if the score reads the patches."""
    return " or ask for rows='patches' (--rows patches)" if family_of(model) in ALL_ROWS else ""


def plan_of_blocks(steps: list[list[AttentionLayer]]) -> Plan:
    """Return the plan of a model in which every block is a step, and say so in words."""
    tokens = "class and distillation token" if steps and steps[0][0].queries == 2 else "class token"
    return Plan(steps, f"{tokens}, {len(steps)} blocks")


def _check_pool(model: nn.Module) -> None:
    """Refuse models of timm whose score reads neither the class token nor the query of an attention pool."""
    name, pool = type(model).__name__, getattr(model, "global_pool", "token")
    if pool in ("map", "prr"):
        return
    owner = getattr(model, "embeds", model)  # NaFlexVit keeps its tokens there
    if getattr(owner, "cls_token", None) is None and not hasattr(model, "cls_token_0"):  # CrossViT's
        raise UnsupportedModel(
            f"model: {name} has no class token (global_pool={pool!r}); DAAM needs one query token that the score "
            f"reads: use another model{all_rows_hint(model)}"
        )
    if not pool:
        raise UnsupportedModel(f"model: {name} has no score (global_pool=''); build it with global_pool='token'")
    if pool != "token":
        read = "the mean patch token" if pool == "avg" else "more than one token"
        raise UnsupportedModel(
            f"model: {name} has a class token but scores {read} (global_pool={pool!r}); the class row of the last "
            f"block has zero gradient. Build it with global_pool='token' (if the weights were trained so)"
            f"{all_rows_hint(model)}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# timm
# ----------------------------------------------------------------------------------------------------------------------


def _grid_of(embed: Any, images: Tensor, way_out: str = "") -> tuple[int, int]:
    """Return the grid `(h, w)` of a patch embedding, after a check of the images' size."""
    patch = embed.feat_ratio(as_scalar=False)
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    fixed = embed.img_size if getattr(embed, "strict_img_size", False) else None
    padded = getattr(embed, "dynamic_img_pad", False)
    check_size(images, fixed, (1, 1) if padded else patch, way_out)
    h, w = embed.dynamic_feat_size(tuple(images.shape[2:]))
    return h, w


def _after_convolution(size: Sequence[int], layer: Any) -> tuple[int, int]:
    """Return `(h, w)` after a convolution or pooling layer; None changes nothing."""
    if layer is None:
        h, w = size
        return h, w
    pairs = [p if isinstance(p, Sequence) else (p, p) for p in (layer.kernel_size, layer.stride, layer.padding)]
    h, w = ((side + 2 * pad - kernel) // stride + 1 for side, kernel, stride, pad in zip(size, *pairs))
    return h, w


def vision_transformer(model: Any, images: Tensor) -> Plan:
    """VisionTransformer, Eva, Beit and VisionTransformerRelPos."""
    way_out = ", or build the model with dynamic_img_size=True" if hasattr(model, "dynamic_img_size") else ""
    return _vit_blocks(model, _grid_of(model.patch_embed, images, way_out))


def naflex(model: Any, images: Images) -> Plan:
    """NaFlexVit: a batch of images, or patches with their places in grids of several sizes."""
    if not isinstance(images, dict):
        return _vit_blocks(model, _grid_of(model.embeds, images))
    y, x = images["patch_coord"].long().unbind(-1)
    size = int(y.max()) + 1, int(x.max()) + 1
    return _vit_blocks(model, size, cells=(y * size[1] + x).to(next(model.parameters()).device))


def _vit_blocks(model: Any, grid: tuple[int, int], cells: Tensor | None = None) -> Plan:
    """Decompose row 0 of every block, or the queries of the attention pool."""
    layer, prefix = partial(AttentionLayer, grid=grid, cells=cells), model.num_prefix_tokens
    steps = []
    for block in model.blocks:
        # several attentions side by side (ParallelThingsBlock), one, or one that the block computes (ParallelScaling)
        modules = [a.attn for a in block.attns] if hasattr(block, "attns") else [getattr(block, "attn", block)]
        steps.append([layer(module, prefix=prefix) for module in modules])
    plan, pool = plan_of_blocks(steps), getattr(model, "attn_pool", None)
    if pool is None:
        return plan
    read = prefix if getattr(model, "pool_include_prefix", True) else 0
    return replace(plan, pool=layer(pool, prefix=read, queries=getattr(pool, "latent_len", 1)))


def distilled(model: Any, images: Tensor) -> Plan:
    """Distilled DeiT: the score is the mean of two heads, one for the class and one for the distillation token."""
    steps = vision_transformer(model, images).steps
    return plan_of_blocks([[replace(layer, queries=2) for layer in step] for step in steps])


def cait(model: Any, images: Tensor) -> Plan:
    """CaiT (Touvron et al. 2021): the class token joins at the end and has blocks of its own."""
    return _class_blocks(model.blocks_token_only, _grid_of(model.patch_embed, images))


def xcit(model: Any, images: Tensor) -> Plan:
    """XCiT (El-Nouby et al. 2021): as CaiT, after blocks whose attention is between channels."""
    patch = model.patch_embed.patch_size
    return _class_blocks(model.cls_attn_blocks, tuple(math.ceil(side / patch) for side in images.shape[2:]))


def volo(model: Any, images: Tensor) -> Plan:
    """VOLO (Yuan et al. 2021): as CaiT. The score adds half the largest patch score, which does not depend on T."""
    grid = tuple(model.pos_embed.shape[1:3])
    stride = 2 * math.prod(m.stride[0] for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))
    check_size(images, [stride * side for side in grid])
    return _class_blocks(model.post_network, grid)


def _class_blocks(blocks: Sequence[Any], grid: tuple[int, int]) -> Plan:
    return Plan(
        [[AttentionLayer(block.attn, grid)] for block in blocks], f"class token, {len(blocks)} class-attention blocks"
    )


def convit(model: Any, images: Tensor) -> Plan:
    """ConViT (d'Ascoli et al. 2021): the class token joins after the gated positional blocks."""
    grid, blocks = _grid_of(model.patch_embed, images), model.blocks[model.local_up_to_layer :]
    steps = [[AttentionLayer(block.attn, grid)] for block in blocks]
    return Plan(steps, f"class token, last {len(steps)} of {len(model.blocks)} blocks")


def pit(model: Any, images: Tensor) -> Plan:
    """PiT (Heo et al. 2021): patches are pooled between the stages; the distilled model has two prefix tokens."""
    check_size(images, model.patch_embed.img_size)
    tokens, grid, steps = model.cls_token.shape[1], model.patch_embed.grid_size, []
    for stage in model.transformers:
        if stage.pool is not None:
            grid = _after_convolution(grid, stage.pool.conv)
        steps += [[AttentionLayer(block.attn, grid, tokens, queries=tokens)] for block in stage.blocks]
    return plan_of_blocks(steps)


def crossvit(model: Any, images: Tensor) -> Plan:
    """CrossViT (Chen et al. 2021): two branches, each with a class token that attends to the other's patches, too."""
    if model.crop_scale:
        raise UnsupportedModel(
            "model: the branches of a CrossVit with crop_scale=True see different parts of the image"
        )
    check_size(images, model.img_size)
    grids = [
        tuple(side // patch for side, patch in zip(embed.img_size, embed.patch_size)) for embed in model.patch_embed
    ]
    steps = []
    for stage in model.blocks:
        for i in range(max(map(len, stage.blocks))):
            steps.append(
                [AttentionLayer(branch[i].attn, grid) for branch, grid in zip(stage.blocks, grids) if i < len(branch)]
            )
        steps.append([AttentionLayer(fusion.attn, grid) for fusion, grid in zip(stage.fusion, grids[1:] + grids[:1])])
    return Plan(steps, f"class tokens of both branches, {len(steps)} steps")


def tnt(model: Any, images: Tensor) -> Plan:
    """TNT (Han et al. 2021): the outer attention, over patches; the inner one is over the pixels of each patch."""
    check_size(images, model.pixel_embed.img_size)
    return plan_of_blocks([[AttentionLayer(block.attn_out, model.pixel_embed.grid_size)] for block in model.blocks])


def mvit(model: Any, images: Tensor) -> Plan:
    """MViTv2 with a class token (Li et al. 2022): the keys are pooled by a factor that changes between the stages.

    T = sum_j S[j] is the output of the attention alone; the query that is added to it has no place in the picture.
    """
    first, embed = model.stages[0].blocks[0].attn, model.patch_embed.proj
    if first.rel_pos_type == "spatial":  # its table, of 2 n - 1 distances, decides the size
        n = (len(first.rel_pos_h) + 1) // 2 * (first.pool_q.stride[0] if first.pool_q else 1)
        check_size(images, [n * stride for stride in embed.stride])
    grid, steps = _after_convolution(images.shape[2:], embed), []
    for block in (block for stage in model.stages for block in stage.blocks):
        steps.append([AttentionLayer(block.attn, _after_convolution(grid, block.attn.pool_k))])
        grid = _after_convolution(grid, block.attn.pool_q)
    return plan_of_blocks(steps)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision and transformers
# ----------------------------------------------------------------------------------------------------------------------


def torchvision(model: Any, images: Tensor) -> Plan:
    """VisionTransformer of torchvision."""
    check_size(images, (model.image_size,) * 2)
    grid = (model.image_size // model.patch_size,) * 2
    return plan_of_blocks([[AttentionLayer(layer.self_attention, grid)] for layer in model.encoder.layers])


def transformers(model: Any, images: Tensor) -> Plan:
    """ViT, DeiT, DINOv2, DINOv3 and BEiT of transformers, with fused ("sdpa") or eager attention."""
    config = model.config
    patch, side = (x if isinstance(x, Sequence) else (x, x) for x in (config.patch_size, config.image_size))
    resizes = config.model_type not in ("vit", "deit", "beit")  # its position embedding, to the image
    check_size(images, None if resizes else side, patch)
    grid = tuple(length // p for length, p in zip(images.shape[2:], patch))
    prefix = 1 + (config.model_type == "deit") + getattr(config, "num_register_tokens", 0)
    queries = 2 if hasattr(model, "distillation_classifier") else 1
    layers = [m for m in model.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "attention")]
    if not layers:
        raise UnsupportedModel(f"model: {type(model).__name__} has no layers like those of transformers' ViTs")
    return plan_of_blocks([[AttentionLayer(layer.attention, grid, prefix, queries)] for layer in layers])


# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "timm.VisionTransformer": vision_transformer,
    "timm.VisionTransformerDistilled": distilled,
    "timm.VisionTransformerRelPos": vision_transformer,
    "timm.Eva": vision_transformer,
    "timm.Beit": vision_transformer,
    "timm.NaFlexVit": naflex,
    "timm.Cait": cait,
    "timm.Xcit": xcit,
    "timm.VOLO": volo,
    "timm.ConVit": convit,
    "timm.PoolingVisionTransformer": pit,
    "timm.CrossVit": crossvit,
    "timm.TNT": tnt,
    "timm.MultiScaleVit": mvit,
    "torchvision.VisionTransformer": torchvision,
    "transformers.ViTPreTrainedModel": transformers,
    "transformers.DeiTPreTrainedModel": transformers,
    "transformers.Dinov2PreTrainedModel": transformers,
    "transformers.Dinov2WithRegistersPreTrainedModel": transformers,
    "transformers.DINOv3ViTPreTrainedModel": transformers,
    "transformers.BeitPreTrainedModel": transformers,
}
"""The function of every family, by the class names that `class_names_of` returns."""

ALL_ROWS = {vision_transformer, naflex, distilled, torchvision, transformers}
"""The families with `rows="patches"`."""

WHOLE_LAST_BLOCK = {pit, torchvision}
"""The families whose last block runs for all tokens: what follows its attention is not computed row by row."""

NO_LENS = {pit, crossvit, mvit}
"""The families without `logit_lens`: their blocks differ in width, or run in two branches."""

REFUSED = {
    "uses windowed attention: no token attends to all patches": (
        "timm.SwinTransformer", "timm.SwinTransformerV2", "timm.SwinTransformerV2Cr", "timm.DaVit",
        "timm.GlobalContextVit", "timm.Nest", "timm.VisionTransformerSAM", "timm.HieraDet",
        "torchvision.SwinTransformer", "torchvision.MaxVit", "transformers.SwinPreTrainedModel",
        "transformers.Swinv2PreTrainedModel",
    ),
    "has no class token; DAAM needs one query token that the score reads": (
        "timm.Hiera", "timm.Levit", "timm.LevitDistilled", "timm.MaxxVit", "timm.PyramidVisionTransformerV2",
        "timm.Twins", "transformers.HieraPreTrainedModel", "transformers.LevitPreTrainedModel",
        "transformers.PvtPreTrainedModel", "transformers.PvtV2PreTrainedModel",
    ),
    "factorises its attention: no row of it says how the class token attends to the patches": ("timm.CoaT",),
    "shuffles its patches: their places in the picture are not known": ("transformers.ViTMAEPreTrainedModel",),
}  # fmt: skip
"""The classes that are refused, by the reason."""
