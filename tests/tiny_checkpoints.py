"""Files of weights for the tests, as other people's code leaves them, and the errors of `load`."""

import re

import pytest
import safetensors.torch
import torch

from models import load

TINY = "test_vit"
"""The smallest ViT of timm: 160 px, 6 blocks, 307,000 weights."""


def same_weights(model, state):
    """Return whether a model holds exactly the weights of a state dict."""
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def fake_cache(root, repository, state):
    """Write what a download by huggingface_hub leaves behind; return the file of the weights."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(state, file)
    return file


def by_facebook(state):
    """Return the weights of timm's XCiT under their names in facebookresearch/xcit."""
    theirs = {}
    for name, value in state.items():
        if re.search(r"cls_attn_blocks\.\d+\.attn\.[kv]\.", name):
            continue
        if ".attn.q." in name:
            value = torch.cat([state[name.replace(".q.", f".{x}.")] for x in "qkv"])
            name = name.replace(".q.", ".qkv.")
        theirs[name.replace("pos_embed.", "pos_embeder.")] = value
    return theirs


def refused(name, message, checkpoint=None):
    """Return the error of `load`, which is one line about the model or the checkpoint."""
    with pytest.raises(ValueError, match=message) as error:
        load(name, checkpoint)
    assert str(error.value).startswith(("model: ", "checkpoint: ")) and "\n" not in str(error.value)
    return error.value
