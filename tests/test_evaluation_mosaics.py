"""The grid pointing game: which photos make a mosaic, the mosaic, and the shares of a map."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_decisions import decision_of, small_bank
from tiny_models import random_images, tiny_vit

from daam_core import UnsupportedModel, attention_flow, features
from evaluation.methods import METHODS
from evaluation.mosaics import CONFIDENT, assemble, choose, play, share_inside

NAMES = ["a", "b", "c", "d"]


def chosen(photos, count):
    """Choose from photos that are written as class and number; those with a "?" are not confident."""
    asked = []

    def classify(name):
        asked.append(name)
        if name == "broken":
            return None
        return ord(name[0]), CONFIDENT - 1e-6 if name.endswith("?") else CONFIDENT

    return choose(photos, classify, count), asked


def test_every_mosaic_has_four_classes_and_every_photo_one_mosaic():
    photos = ["a1", "a2", "b1?", "b2", "broken", "b3", "c1", "a3", "d1", "c2", "e1", "d2", "f1"]
    mosaics, asked = chosen(photos, 2)
    assert mosaics == [["a1", "b2", "c1", "d1"], ["a2", "b3", "c2", "e1"]]
    assert asked == photos[: photos.index("e1") + 1]  # no more than are needed
    assert chosen(photos, 0) == ([], [])
    assert chosen(["a1", "a2", "b1", "c1"], 3)[0] == []


@pytest.mark.parametrize("seed", range(5))
def test_more_photos_or_mosaics_leave_the_first_as_they_are(seed):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).tolist()
    photos = [f"{'abcdefg'[i % 7]}{i}{'?' * (i % 5 == 0)}" for i in order]
    whole = chosen(photos, 12)[0]
    assert len(whole) == 12 and len({name for mosaic in whole for name in mosaic}) == 48
    assert all(len({name[0] for name in mosaic}) == 4 for mosaic in whole)
    for count in range(12):
        assert chosen(photos, count)[0] == whole[:count]
    fewer = chosen(photos[:60], 12)[0]
    assert 0 < len(fewer) < 12 and all(mosaic in whole for mosaic in fewer)


def test_the_photos_of_a_mosaic_lie_in_reading_order():
    colours = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 3, 32, 16)
    mosaic = assemble(colours)
    assert mosaic.shape == (3, 32, 16)
    quarters = mosaic.unfold(1, 16, 16).unfold(2, 8, 8)
    for row, column, colour in ((0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4)):
        torch.testing.assert_close(quarters[:, row, column], torch.full((3, 16, 8), float(colour)))
    noise = random_images(4, 3, 32, 32)
    assert assemble(noise)[:, :16, 16:].std() < 0.7 * noise[1].std()  # it is smoothed before it is thinned out


def test_the_share_of_a_quarter():
    heat = torch.zeros(4, 6)
    heat[0, 5], heat[3, 0], heat[2, 2], heat[1, 1] = 3, 4, 1, -7
    assert [share_inside(heat, cell) for cell in range(4)] == [0, 3 / 8, 5 / 8, 0]
    assert [share_inside(torch.ones(2, 2), cell) for cell in range(4)] == [0.25] * 4
    assert share_inside(-torch.ones(2, 2), 0) == 0
    with pytest.raises(ValueError, match="^methods: a map of a mosaic is not finite; leave the method out"):
        share_inside(torch.full((2, 2), torch.nan), 0)


def parts(model, bank=None):
    decision, images = decision_of(model, bank), random_images(4, 3, 32, 32)
    return decision, images, decision.shares(images).argmax(1)


def test_every_class_is_explained_in_the_mosaic():
    """The class is the one of the whole photo, whatever the model says of the mosaic."""
    decision, images, classes = parts(tiny_vit())
    record = play(decision, images.split(1), NAMES, ["daam", "daam-relevance", "attention", "random", "centre"], 5)
    mosaic = assemble(images)[None].expand(4, -1, -1, -1)
    assert record["photos"] == NAMES
    assert record["classes"] == [f"class {c}" for c in classes.tolist()]
    expected = {
        "daam": attention_flow(decision.loaded.model, mosaic, classes),
        "daam-relevance": attention_flow(decision.loaded.model, mosaic, classes, variant="relevance"),
    }
    for method, flow in expected.items():
        shares = [share_inside(heat, cell) for cell, heat in enumerate(flow.accumulated[:, -1])]
        assert record["shares"][method] == pytest.approx(shares, abs=1e-5)
    assert record["shares"]["centre"] == [0.25] * 4
    assert sum(record["shares"]["attention"]) == pytest.approx(1)  # one map for all classes
    assert record["shares"]["random"] == play(decision, images.split(1), NAMES, ["random"], 5)["shares"]["random"]
    assert record["shares"]["random"] != play(decision, images.split(1), NAMES, ["random"], 6)["shares"]["random"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("bank"))


def test_without_a_classifier(bank):
    decision, images, classes = parts(tiny_vit(num_classes=0), bank)
    shares = play(decision, images.split(1), NAMES, ["daam", "daam-relevance"])["shares"]
    mosaic = assemble(images)[None]
    for cell, target in enumerate(classes):
        direction = bank.log_odds(features(decision.loaded.model, mosaic).detach(), target=int(target))
        flow = attention_flow(decision.loaded.model, mosaic, importance=direction, variant="relevance")
        assert shares["daam-relevance"][cell] == pytest.approx(share_inside(flow.accumulated[0, -1], cell), abs=1e-5)
        assert 0 <= shares["daam"][cell] <= 1


def test_a_class_without_a_neighbour_is_skipped_for_all_methods(bank):
    """Also for those that need none: the methods are compared on the same classes."""
    model, images = tiny_vit(num_classes=0), random_images(4, 3, 32, 32)
    with torch.no_grad():
        rows = F.normalize(features(model, torch.cat([images, assemble(images)[None]])))
    lonely = replace(bank, features=rows, labels=torch.tensor([0, 1, 2, 3, 2]))
    decision = decision_of(model, lonely, k=1, target_k=1)
    shares = play(decision, images.split(1), NAMES, ["daam", "daam-relevance", "centre"])["shares"]
    assert [[share is None for share in found] for found in shares.values()] == [[True, True, False, True]] * 3


def test_grids_that_cannot_be_divided():
    decision = decision_of(tiny_vit(img_size=24))
    images = random_images(4, 3, 24, 24)
    message = "^mosaics: a patch grid of 3 x 3 cannot be divided into quarters; pass --mosaics 0$"
    with pytest.raises(UnsupportedModel, match=message):
        play(decision, images.split(1), NAMES, ["daam"])
    with pytest.raises(UnsupportedModel, match="^mosaics: images of 15 x 16 cannot be divided into quarters; pass"):
        assemble(random_images(4, 3, 15, 16))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plays(method):
    decision, images, _ = parts(tiny_vit())
    shares = play(decision, images.split(1), NAMES, [method])["shares"][method]
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
