"""Layouts of checkpoints: where training code puts the weights, how it names them, and what else it stores.

The names in the model decide which prefix is removed from those in the file. So any prefix is understood, and
`encoder.` stays if it belongs to the model, as in torchvision's ViT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice, takewhile
from typing import Any

from torch import Size, Tensor

from daam_vit.text import printable

WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema", "teacher", "target_encoder",
    "state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights",
    "backbone", "encoder", "student",
)  # fmt: skip
"""Keys under which training code stores the weights, in order of preference: averaged weights come first."""
PREFIXES = {
    # averaged weights
    "ema": 0, "ema_model": 0, "model_ema": 0, "module_ema": 0, "teacher": 0, "teacher_backbone": 0, "target_encoder": 0,
    "model": 1, "_model": 1, "base_model": 1, "module": 1, "net": 1, "network": 1, "backbone": 1, "encoder": 1,
    "vit": 1, "base_encoder": 1, "encoder_q": 1, "online_encoder": 1, "online_model": 1,
    # the student, and MoCo's and BYOL's momentum encoders, which their authors do not evaluate
    "student": 2, "student_backbone": 2, "student_model": 2, "momentum_encoder": 2, "momentum_backbone": 2,
    "encoder_k": 2,
}  # fmt: skip
"""Prefixes that are common in names of weights, and their ranks. If a file has weights under several prefixes, those
of the lowest rank are taken, and the others are left out. Any other prefix has rank 1."""
INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that `torch.compile`, FSDP and activation checkpointing insert anywhere in a name."""
CHUNK = re.compile(r"(?:^|(?<=\.))blocks\.\d+\.(?=\d+\.)")
"""DINOv2 stores blocks in chunks; the second number counts all blocks."""
BESIDE = re.compile(
    r"""(n_averaged | num_updates | decay | initted | step | logit_scale | logit_bias)$
    | queue(_ptr)?$ | mask_token$ | masked_embed$ | (mask_|decoder_)\w+(\.|$) | decoder\. | lm_head\. | text\.
    | head\.(mlp2?|last_layer2?|(?!0\.running)\d+)\. | fc\.\d+\.
    | (dino|ibot|gram|dino_local|projection|student|teacher)_head\.
    | (projector|projection|predictor|prototypes|momentum_projector|momentum_predictor)\.\d+\. | prototypes\.weight$
    | (\w*loss(_fn)? | criterion | (train|val|valid|test)_\w+)\.""",
    re.VERBOSE,
)
"""Entries that are not weights of the backbone: counters of averages, queues, mask tokens, decoders, text encoders,
projection heads, predictors, losses and metrics. Names in the model itself are never left out; nor is a
classifier behind a normalisation, `head.0.running_mean`."""


def find_weights(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in what was saved, under any nesting of `WRAPPERS`; None if there is none.

    Values other than tensors are left out. Another key counts if it is the only one that holds a state dict.
    """
    waiting, seen, beside = [content], set(), None
    while waiting:
        value = waiting.pop()
        if not isinstance(value, Mapping) or id(value) in seen:  # a dict may contain itself
            continue
        seen.add(id(value))
        inner = [value[key] for key in WRAPPERS if isinstance(value.get(key), Mapping)]
        waiting += reversed(inner)
        tensors = {key: entry for key, entry in value.items() if isinstance(entry, Tensor)}
        if all(isinstance(key, str) for key in tensors) and any(entry.ndim for entry in tensors.values()):
            if not inner:
                return tensors
            beside = beside or tensors
    return beside or _only_state_dict(content)


def _only_state_dict(content: Any) -> dict[str, Tensor] | None:
    """Return the only state dict that lies under a key of any other name; None if there are none or several."""
    found = [
        value
        for value in (content.values() if isinstance(content, Mapping) else ())
        if isinstance(value, Mapping)
        and any(isinstance(entry, Tensor) and entry.ndim for entry in value.values())
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    ]
    return dict(found[0]) if len(found) == 1 else None


def image_sizes(content: Any) -> list[tuple[int, int]]:
    """Return the image sizes `(H, W)` among the options that the training code stored."""
    sizes = []
    for key in ("args", "hyper_parameters", "hparams", "config", "model_args"):
        options = content.get(key) if isinstance(content, Mapping) else None
        options = options if isinstance(options, Mapping) else getattr(options, "__dict__", {})
        for name in ("img_size", "image_size", "input_size"):
            size = options.get(name)
            size = [size, size] if type(size) is int else size
            if isinstance(size, (list, tuple)) and len(size) in (2, 3) and all(type(n) is int and n > 0 for n in size):
                sizes.append((size[-2], size[-1]))
    return list(dict.fromkeys(sizes))


def rename(state: dict[str, Tensor], own: Mapping[str, Size]) -> dict[str, Tensor]:
    """Return the weights under the names that a model has for them.

    Args:
        state: the weights, under the names in the file.
        own: names and shapes of the model's weights.

    Raises:
        ValueError: if two weights would get one name.
    """
    if state.keys() <= own.keys():
        return dict(state)
    state = _renamed(state, lambda key: INSIDE.sub("", key))
    if not any(CHUNK.search(key) for key in own):
        state = _renamed(state, lambda key: CHUNK.sub("blocks.", key))
    prefix = _prefix_of_model(state, own)

    def without_prefix(key: str) -> str | None:
        for part in prefix.split(".")[:-1]:  # a head beside the backbone has only some of them
            key = key.removeprefix(f"{part}.")
        other = _prefix(key)
        return None if key not in own and other and _rank(other) != _rank(prefix) else key

    return _renamed(state, without_prefix)


def without_extras(state: dict[str, Tensor], own: Mapping[str, Size]) -> dict[str, Tensor]:
    """Return the weights without entries that match `BESIDE`, except those that the model has."""
    return {key: value for key, value in state.items() if key in own or not BESIDE.match(key)}


def _renamed(state: dict[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the weights under other names; those that get None are left out."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = rename(key)
        if name is not None and name in renamed:
            raise ValueError(f"two of its weights are called {printable(name, 80)}; save only one of them")
        if name is not None:
            renamed[name] = value
    return renamed


def _prefix_of_model(state: dict[str, Tensor], own: Mapping[str, Size]) -> str:
    """Return the prefix of most weights of the model; of several with similar counts, the one of the lowest rank."""
    named, fitting = Counter(), Counter()  # weights whose name, and whose name and shape, the model has
    for key, value in state.items():
        for end in [0, *_after_dots(key)]:
            if (name := key[end:]) in own:
                named[key[:end]] += 1
                fitting[key[:end]] += own[name] == value.shape
    votes = +fitting or named
    likely = [prefix for prefix, count in votes.items() if 2 * count >= max(votes.values())]
    return min(likely, key=lambda prefix: (_rank(prefix), -votes[prefix]), default="")


def _after_dots(key: str) -> list[int]:
    """Return the places after the first eight dots of a name."""
    return [match.end() for match in islice(re.finditer(r"\.", key), 8)]


def _prefix(key: str) -> str:
    """Return the `PREFIXES` at the beginning of a name, at most eight."""
    ends = takewhile(lambda end: key[:end].split(".")[-2] in PREFIXES, _after_dots(key))
    return key[: max(ends, default=0)]


def _rank(prefix: str) -> int:
    """Return the rank of a prefix: 0 for averaged weights, 2 for those that are not evaluated, else 1."""
    ranks = {PREFIXES.get(part, 1) for part in prefix.split(".")} - {1}
    return min(ranks, default=1)
