"""Measure a map `(h, w)`, one value per patch: by removing patches, and by known regions of the object.

Patches of equal value are ranked at random, with a seed that depends on the photo, so that a flat map is no better than
chance. Ranking keeps negative values; all other metrics set them to zero.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.decision import Decision

METRICS: dict[str, tuple[str, str]] = {
    "deletion_mean": ("deletion, mean colour", "lower"),
    "deletion_blur": ("deletion, blurred", "lower"),
    "insertion_mean": ("insertion, mean colour", "higher"),
    "insertion_blur": ("insertion, blurred", "higher"),
    "average_drop": ("average drop", "lower"),
    "increase": ("increase", "higher"),
    "energy": ("energy inside", "higher"),
    "iou": ("IoU", "higher"),
    "sparsity": ("sparsity", "higher"),
}
"""Heading of every metric, and whether lower or higher values are better."""

SANITY: dict[str, tuple[str, str]] = {
    "randomised": ("randomised model", "lower"),
    "class": ("other class", "lower"),
    "flip": ("flipped photo", "higher"),
}
"""The same for the checks of `evaluation.sanity`."""

MOSAICS: dict[str, tuple[str, str]] = {"pointing": ("share in the own quarter", "higher")}
"""The same for `evaluation.mosaics`."""

HEADINGS = METRICS | SANITY | MOSAICS

BASELINES = ("mean", "blur")
"""What removed patches become, see `baseline`."""


def baseline(image: Tensor, kind: str) -> Tensor:
    """Return what replaces removed patches in an image: `(3, H, W)` for `(3, H, W)`.

    Args:
        image: `(3, H, W)`.
        kind: "mean", its mean colour; "blur", a Gaussian blur with a deviation of a sixteenth of its shorter side (14
            of 224 pixels).
    """
    if kind == "mean":
        return image.mean((1, 2), keepdim=True).expand_as(image)
    pixels = image.permute(1, 2, 0).cpu().float().numpy()
    blurred = cv2.GaussianBlur(pixels, (0, 0), min(image.shape[1:]) / 16, borderType=cv2.BORDER_REPLICATE)
    return torch.from_numpy(blurred).permute(2, 0, 1).to(image)


def kept_patches(heat: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Say which patches remain while those with the largest values are removed.

    Returns:
        `(steps + 1, h * w)` bool; s / steps of the patches (rounded) are removed in row s.
    """
    heat = heat.flatten().cpu()
    shuffled = torch.randperm(len(heat), generator=torch.Generator().manual_seed(seed))
    order = shuffled[heat[shuffled].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    removed = (torch.arange(steps + 1) * len(heat) / steps).round().long()
    return rank >= removed.unsqueeze(1)


def removal_curves(
    decision: Decision, image: Tensor, target: int, maps: Tensor, steps: int, baselines: tuple[str, ...], seed: int = 0
) -> dict[str, Tensor]:
    """Return the probability of a class while patches are removed, or put back, the largest values first.

    Deletion and insertion: Petsiuk, Das, Saenko 2018 (RISE), https://arxiv.org/abs/1806.07421, by patches.

    Args:
        decision: see `Decision`.
        image: `(3, H, W)`.
        target: index of the class.
        maps: `(M, h, w)` of M methods.
        steps: number of steps from none to all of the patches.
        baselines: some of `BASELINES`.
        seed: orders patches of equal value.

    Returns:
        `deletion_<baseline>` and `insertion_<baseline>`, each `(M, steps + 1)`. A set of patches that occurs in several
        curves runs through the model once.
    """
    deletion = torch.stack([kept_patches(heat, steps, seed) for heat in maps])  # (M, steps + 1, n)
    kept, place = torch.stack([deletion, ~deletion]).flatten(0, 2).unique(dim=0, return_inverse=True)
    mask = kept.view(-1, 1, *maps.shape[1:]).float()
    mask = F.interpolate(mask, image.shape[1:], mode="nearest").bool().to(image.device)
    curves = {}
    for kind in baselines:
        other = baseline(image, kind)
        shares = torch.cat([decision.shares(torch.where(m, image, other))[:, target] for m in mask.split(64)])
        both = shares.cpu()[place].view(2, len(maps), steps + 1)
        curves |= {f"deletion_{kind}": both[0], f"insertion_{kind}": both[1]}
    return curves


def area(curve: Tensor) -> Tensor:
    """Return the area under curves `(..., steps + 1)` over 0..1, by the trapezoidal rule: `(...)`."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1))


def masked_photo(decision: Decision, image: Tensor, target: int, maps: Tensor, probability: float) -> dict[str, Tensor]:
    """Multiply an image by its map: average drop and increase of confidence.

    Chattopadhyay et al. 2018 (Grad-CAM++), https://arxiv.org/abs/1710.11063, Sec. 5.1.

    Args:
        decision: see `Decision`.
        image: `(3, H, W)`, normalised.
        target: index of the class.
        maps: `(M, h, w)` of M methods; each is stretched to 0..1 and to the size of the image.
        probability: p, of the class in the whole image.

    Returns:
        `average_drop`, max(0, p - p') / p, and `increase`, p' > p, each `(M,)`.
    """
    heat = torch.stack([unit(m) for m in maps]).unsqueeze(1).to(image)
    heat = F.interpolate(heat, image.shape[1:], mode="bilinear", align_corners=False)
    masked = decision.shares(image * heat)[:, target].cpu()
    return {
        "average_drop": (probability - masked).clamp(min=0) / probability,
        "increase": (masked > probability).float(),
    }


def unit(heat: Tensor) -> Tensor:
    """Set negative values to zero and stretch a map to 0..1; a flat map becomes zero."""
    heat = heat.float().clamp(min=0)
    low, high = heat.amin(), heat.amax()
    return (heat - low) / (high - low) if high > low else torch.zeros_like(heat)


def sparsity(heat: Tensor) -> float:
    """Return the Gini index of a map `(h, w)`, negative values set to zero: 0 if it is flat, near 1 for a single patch.

    The map is not stretched, so a constant that a method adds to it counts (pytorch-grad-cam subtracts the minimum).
    Hurley and Rickard 2009, https://arxiv.org/abs/0811.4706, Table I.
    """
    values = heat.double().clamp(min=0).flatten().sort().values
    if values.sum() == 0:
        return 0.0
    n = len(values)
    weights = (n - torch.arange(1, n + 1, device=values.device) + 0.5) / n
    return (1 - 2 * (values / values.sum() * weights).sum()).item()


def localisation(heat: Tensor, region: np.ndarray) -> dict[str, float]:
    """Compare a map `(h, w)` with the region of the object, `(H, W)` bool.

    Returns:
        `energy`: the share of the map, stretched to 0..1, inside the region; a patch on the edge counts in part (Wang
        et al. 2020, Score-CAM, https://arxiv.org/abs/1910.01279, Sec. 4.3). `iou`: intersection over union of the
        region and the map above its mean, at the size of the photo (threshold of Chefer, Gur, Wolf 2021,
        https://arxiv.org/abs/2012.09838, Sec. 4).
    """
    heat = unit(heat).cpu()
    inside = torch.from_numpy(region.astype(np.float32))
    share = F.adaptive_avg_pool2d(inside[None, None], heat.shape)[0, 0]
    energy = (heat * share).sum() / heat.sum() if heat.sum() > 0 else torch.zeros(())
    stretched = F.interpolate(heat[None, None], region.shape, mode="bilinear", align_corners=False)[0, 0]
    hot = stretched > stretched.mean()
    union = (hot | inside.bool()).sum()
    return {"energy": energy.item(), "iou": ((hot & inside.bool()).sum() / union.clamp(min=1)).item()}
