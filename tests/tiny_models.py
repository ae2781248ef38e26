"""Small models with random weights: the tests are about arithmetic, which no training changes."""

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}  # 4 x 4 grid


def build(make, *args, seed: int = 4, **options) -> nn.Module:
    """Build a model with weights that let every term of the method count: fresh ones make attention flat.

    They are drawn after the model is built, with the seed set anew: how many random numbers building takes depends on
    the version of timm. Building is seeded, too: 1-D parameters keep what they start with, which can be random.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make(*args, **options)
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if p.ndim <= 1:  # norms, biases, LayerScale; the bias of a convolution is random already
                p.mul_(not name.endswith("bias")).add_(torch.randn_like(p), alpha=0.2)
            else:  # linear and convolution; tokens and position embedding
                p.normal_(std=0.2 if p.ndim == 3 else p[0].numel() ** -0.5)
    return model.eval()


def tiny_vit(make=VisionTransformer, **options) -> nn.Module:
    return build(make, **{**TINY, **options})


def tiny_timm(name: str, **options) -> nn.Module:
    return build(timm.create_model, name, **options)


def tiny_torchvision(**options) -> nn.Module:
    return build(
        torchvision.models.VisionTransformer, image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=24,
        mlp_dim=48, num_classes=5, **options,
    )  # fmt: skip


def random_images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))
