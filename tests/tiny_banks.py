"""Small memory banks for the tests, in the published layout, and what is needed to build one."""

import json

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

BACKBONE = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
"""Arguments that make timm's `vit_tiny_patch16_224` small; its features are 48 wide."""


def rows(count, width, seed=0):
    """Random features, `(count, width)`, L2-normalised."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def write_bank(folder, features, labels, split="train", **metadata):
    """Save one pair of a bank; metadata, if there are any, go to bank.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(features, folder / f"{split}feat.pth")
    torch.save(labels, folder / f"{split}labels.pth")
    if metadata:
        (folder / "bank.json").write_text(json.dumps(metadata))
    return folder


def write_backbone(file):
    """Save a random `BACKBONE` that names its own architecture; return the file."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **BACKBONE)
    metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(BACKBONE)}
    safetensors.torch.save_file(model.state_dict(), file, metadata)
    return file


def write_photo(path, seed):
    """Save a small image of noise, in a folder that may not exist yet."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (24 + seed % 5, 30, 3), dtype=np.uint8)).save(path)
