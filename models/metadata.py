"""Read the metadata of a checkpoint, which are not trusted: only known arguments pass."""

from __future__ import annotations

from typing import Any

from daam_vit.text import printable
from models.checkpoints import Checkpoint
from models.schema import check_schema, parse_json

SIZES: dict[str, tuple[int, int]] = {"img_size": (1, 4096), "patch_size": (1, 512), "window_size": (1, 512)}
"""Arguments that are one number or two (height and width), and their bounds."""
NUMBERS: dict[str, tuple[type, float, float]] = {
    "num_classes": (int, 0, 1_000_000),
    "in_chans": (int, 3, 3),
    "embed_dim": (int, 1, 8192),
    "depth": (int, 1, 256),
    "num_heads": (int, 1, 256),
    "reg_tokens": (int, 0, 64),
    "num_reg_tokens": (int, 0, 64),
    "mlp_ratio": (float, 0.01, 64),
    "init_values": (float, 0, 1000),
    "drop_rate": (float, 0, 1),
    "pos_drop_rate": (float, 0, 1),
    "patch_drop_rate": (float, 0, 1),
    "proj_drop_rate": (float, 0, 1),
    "attn_drop_rate": (float, 0, 1),
    "drop_path_rate": (float, 0, 1),
}
"""Arguments that are a number, and their bounds."""
SWITCHES = (
    "class_token", "dynamic_img_pad", "dynamic_img_size", "fc_norm", "final_norm", "no_embed_class", "pre_norm",
    "proj_bias", "qk_norm", "qkv_bias", "qkv_fused", "reg_embed", "scale_attn_inner", "scale_attn_norm", "scale_mlp",
    "scale_mlp_norm", "strict_img_size", "swiglu_mlp", "use_abs_pos_emb", "use_post_norm", "use_rot_pos_emb",
)  # fmt: skip
POOLS = ("", "avg", "avgmax", "max", "token", "map")
"""Values of `global_pool`."""
_SCHEMA: dict[str, Any] = (
    {name: (int, [int], None) for name in SIZES}
    | {name: (kind, None) for name, (kind, _, _) in NUMBERS.items()}
    | dict.fromkeys(SWITCHES, (bool, None))
    | {"global_pool": (str, None)}
)


def model_args(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arguments for `timm.create_model` in the metadata of a checkpoint.

    Raises:
        ValueError: if one is unknown, of another type or out of bounds. No known argument names a file or an address.
    """
    source = f"checkpoint: {checkpoint.name}: model_args"
    arguments = parse_json(checkpoint.metadata.get("model_args", "{}"), {}, source)
    unknown = [printable(name, 40) for name in arguments if name not in _SCHEMA]
    if unknown:
        raise ValueError(f"{source}: {unknown[0]!r} is not an argument that a file may set; leave it out")
    check_schema(arguments, _SCHEMA, source)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name, value in arguments.items():
        if name == "global_pool" and value not in POOLS:
            raise ValueError(f"{source}: global_pool should be one of {', '.join(POOLS[1:])}")
        low, high = SIZES[name] if name in SIZES else NUMBERS.get(name, (int, 0, 1))[1:]
        values = value if isinstance(value, list) else [value]
        if name in SIZES and isinstance(value, list) and len(value) != 2:
            raise ValueError(f"{source}: {name} should be one number, or the height and the width")
        if name != "global_pool" and not all(low <= number <= high for number in values):
            raise ValueError(f"{source}: {name} should be from {low} to {high}")
    return arguments


def class_names(checkpoint: Checkpoint, num_classes: int) -> list[str] | None:
    """Return the names of the classes in the metadata of a checkpoint, on one line each; None if it has none.

    Raises:
        ValueError: if they are not a list of texts, one for each class.
    """
    if "class_names" not in checkpoint.metadata:
        return None
    source = f"checkpoint: {checkpoint.name}: class_names"
    names = parse_json(checkpoint.metadata["class_names"], [str], source)
    if len(names) != num_classes:
        raise ValueError(f"{source} has {len(names)} names, but the model has {num_classes} classes; mend the metadata")
    return [printable(name) for name in names]
