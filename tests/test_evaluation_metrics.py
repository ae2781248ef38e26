"""Metrics of the evaluation against plain derivations and kept libraries."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_decisions import decision_of
from tiny_models import random_images, tiny_vit

from evaluation import metrics


@pytest.mark.parametrize("kind", metrics.BASELINES)
def test_removal_curves_one_by_one(kind):
    model = tiny_vit()
    image, maps = random_images(1, 3, 32, 32)[0], torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    curves = metrics.removal_curves(decision_of(model), image, 2, maps, 5, (kind,))
    other = metrics.baseline(image, kind)
    for m, heat in enumerate(maps):
        for s in range(6):
            largest = sorted(range(16), key=lambda n: -heat.flatten()[n])[: round(16 * s / 5)]
            deleted, inserted = image.clone(), other.clone()
            for n in largest:
                cell = np.s_[:, n // 4 * 8 : n // 4 * 8 + 8, n % 4 * 8 : n % 4 * 8 + 8]
                deleted[cell], inserted[cell] = other[cell], image[cell]
            for name, picture in ((f"deletion_{kind}", deleted), (f"insertion_{kind}", inserted)):
                expected = model(picture[None]).softmax(1)[0, 2].item()
                assert curves[name][m, s].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "kind, remove", [("deletion", "RemoveMostRelevantFirst"), ("insertion", "RemoveLeastRelevantFirst")]
)
def test_deletion_and_insertion_against_pytorch_grad_cam(kind, remove):
    """The removals of that library, with the mean colour as its imputer, at every share of patches."""
    from pytorch_grad_cam.metrics import perturbation_confidence as theirs

    model = tiny_vit()
    image, heat = random_images(1, 3, 32, 32), torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    curves = metrics.removal_curves(decision_of(model), image[0], 2, heat, 8, ("mean",))
    pixels = heat.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()

    def mean_colour(picture, keep):
        return torch.where(keep.bool(), picture, picture.mean((1, 2), keepdim=True))

    for s in range(1, 8):
        kept = 100 * (1 - s / 8 if kind == "deletion" else s / 8)
        metric = theirs.PerturbationConfidenceMetric(getattr(theirs, remove)(kept, mean_colour))
        targets = [lambda scores: scores.softmax(0)[2]]
        found = metric(image, pixels, targets, model, return_diff=False)[0]
        assert found == pytest.approx(curves[f"{kind}_mean"][0, s].item(), abs=1e-5)


def test_average_drop_and_increase_against_torchcam():
    torchcam = pytest.importorskip("torchcam.metrics", reason="torchcam asks for Python 3.11")
    model, images = tiny_vit(), random_images(6, 3, 32, 32)
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(3))
    maps = (maps - maps.amin((1, 2), keepdim=True)) / (
        maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
    )
    decision = decision_of(model)
    probabilities, classes = decision.shares(images).max(1)
    ours = [
        metrics.masked_photo(decision, image, c.item(), heat[None], p.item())
        for image, heat, p, c in zip(images, maps, probabilities, classes)
    ]

    class Given:
        """An extractor that returns these maps."""

        def __init__(self):
            self.model = model

        def __call__(self, class_idx, scores, **options):
            return [maps]

        def fuse_cams(self, cams):
            return cams[0]

        def _hooks_off(self):
            return torch.no_grad()

    theirs = torchcam.ClassificationMetric(Given(), partial_softmax)
    theirs.update(images)
    summary = theirs.summary()
    assert torch.stack([o["average_drop"] for o in ours]).mean().item() == pytest.approx(summary["avg_drop"], abs=1e-5)
    assert torch.stack([o["increase"] for o in ours]).mean().item() == pytest.approx(summary["conf_increase"])
    assert 0 < summary["avg_drop"] < 1


def partial_softmax(scores):
    return scores.softmax(1)


def test_area():
    assert metrics.area(torch.tensor([1.0, 1.0, 1.0])) == 1
    assert metrics.area(torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])).tolist() == [0.5, 0.5]
    curve = torch.rand(11)
    assert metrics.area(curve).item() == pytest.approx(((curve[1:] + curve[:-1]) / 20).sum().item(), abs=1e-6)


def test_patches_of_equal_values_are_ranked_at_random():
    kept = metrics.kept_patches(torch.zeros(8, 8), 4)
    assert kept.sum(1).tolist() == [64, 48, 32, 16, 0]
    assert not kept[2, 32:].all() and torch.equal(kept, metrics.kept_patches(torch.zeros(8, 8), 4))
    assert not torch.equal(kept, metrics.kept_patches(torch.zeros(8, 8), 4, seed=1))
    for smaller, larger in zip(kept[1:], kept):
        assert (larger | ~smaller).all()  # what is removed stays removed
    half = torch.cat([torch.zeros(4, 8), torch.arange(32.0).view(4, 8) + 1])
    assert metrics.kept_patches(half, 2)[1].tolist() == [True] * 32 + [False] * 32


def test_baselines():
    image = random_images(1, 3, 32, 48)[0]
    mean, blur = (metrics.baseline(image, kind) for kind in metrics.BASELINES)
    assert mean.shape == blur.shape == image.shape
    torch.testing.assert_close(mean[:, 5, 7], image.flatten(1).mean(1))
    x = torch.arange(-12, 13).float()
    kernel = torch.exp(-(x**2) / (2 * 2.0**2))  # a sixteenth of 32 pixels
    kernel = (kernel / kernel.sum()).outer(kernel / kernel.sum())
    padded = F.pad(image[None], [12] * 4, mode="replicate")[0]
    plain = torch.stack([F.conv2d(c[None, None], kernel[None, None])[0, 0] for c in padded])
    torch.testing.assert_close(blur, plain, rtol=0, atol=2e-3)


def test_sparsity():
    one = torch.zeros(4, 4)
    one[1, 2] = 3
    assert metrics.sparsity(one) == pytest.approx(15 / 16) and metrics.sparsity(torch.ones(4, 4)) == pytest.approx(0)
    assert metrics.sparsity(torch.zeros(4, 4)) == 0 and metrics.sparsity(one - 1) == metrics.sparsity(one)
    values = torch.rand(5, 5).double()
    pairs = (values.flatten()[:, None] - values.flatten()).abs().sum() / (2 * 25 * values.sum())
    assert metrics.sparsity(values) == pytest.approx(pairs.item())


def test_localisation():
    region = np.zeros((40, 80), bool)
    region[:20, :40] = True  # the upper left of 4 x 4 patches of 10 x 20 pixels, 2 x 2 of them
    heat = torch.zeros(4, 4)
    heat[:2, :2] = 1
    found = metrics.localisation(heat, region)
    assert found["energy"] == 1 and 0.7 < found["iou"] < 1  # its edge is stretched over the next patch
    assert metrics.localisation(1 - heat, region)["energy"] == 0
    flat = metrics.localisation(torch.zeros(4, 4), region)
    assert flat == {"energy": 0.0, "iou": 0.0}
    heat[3, 3] = 2
    assert metrics.localisation(heat, region)["energy"] == pytest.approx(4 / 6)
    region[:, :10] = True  # half of the patches in the first column
    assert metrics.localisation(torch.eye(4), region)["energy"] == pytest.approx(2 / 4)
