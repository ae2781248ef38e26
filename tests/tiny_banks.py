"""Small memory banks for the tests, in the published layout, and the model that fills them."""

import json

import torch

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
