"""Test what flow.json says of the evolution of a decision, and how it is drawn."""

import pytest
import torch
from PIL import Image
from tiny_models import tiny_timm

from command_line import results
from command_line.results import draw_evolution, evolution
from daam_core import attention_flow, evolution_picture

VALUES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]])
"""Five blocks, three classes: class 1 leads after the second, the fourth and the fifth."""


def maps(*sums):
    """Return accumulated maps `(L, 2, 2)` of blocks with these sums."""
    return torch.tensor(sums)[:, None, None].expand(-1, 2, 2).cumsum(0) / 4


def test_evolution_of_one_class():
    said = evolution(VALUES, maps(1.0, 2.0, 0.0, 3.0, 4.0), [1], "class {}".format, "probability")
    assert said["runner_up"] == {"index": 2, "name": "class 2"} and said["leads_from"] == 4
    assert [block["block"] for block in said["blocks"]] == [1, 2, 3, 4, 5]
    assert [block["share"]["1"] for block in said["blocks"]] == pytest.approx([0.1, 0.2, 0, 0.3, 0.4])
    assert [block["probability"]["1"] for block in said["blocks"]] == pytest.approx(VALUES[:, 1].tolist())
    assert [block["probability"]["2"] for block in said["blocks"]] == pytest.approx(VALUES[:, 2].tolist())
    assert [block["leader"]["index"] for block in said["blocks"]] == [0, 1, 0, 1, 1]
    assert said["blocks"][3]["leader"] == {"index": 1, "name": "class 1", "probability": pytest.approx(0.7)}
    assert "norm and head" in said["reading"] and "not trained to be read" in said["reading"]


def test_evolution_of_a_class_that_does_not_lead_at_the_end():
    said = evolution(VALUES, maps(1.0, 1.0, 1.0, 1.0, 1.0), [0], str, "vote")
    assert said["leads_from"] is None and said["runner_up"] == {"index": 1, "name": "1"}
    assert said["blocks"][0]["leader"] == {"index": 0, "name": "0", "vote": pytest.approx(0.6)}
    assert set(said["blocks"][0]) == {"block", "share", "vote", "leader"} and "neighbours" in said["reading"]


def test_evolution_of_several_classes():
    accumulated = torch.stack([maps(1.0, 1.0, 1.0, 1.0, 0.0), maps(0.0, 0.0, 0.0, 0.0, 2.0)])
    said = evolution(VALUES, accumulated, [2, 1], str, "probability")
    assert said["leads_from"] == 4 and said["runner_up"] == {"index": 0, "name": "0"}
    assert [block["share"] for block in said["blocks"]] == [{"2": 0.25, "1": 0}] * 4 + [{"2": 0, "1": 1}]
    assert list(said["blocks"][0]["probability"]) == ["2", "1", "0"]
    every = evolution(VALUES, accumulated[[0, 0, 1]], [2, 0, 1], str, "probability")
    assert every["runner_up"] is None and list(every["blocks"][0]["probability"]) == ["2", "0", "1"]


def test_evolution_from_the_first_block_on_and_of_empty_maps():
    said = evolution(VALUES[3:], maps(0.0, 0.0), [1], str, "probability")
    assert said["leads_from"] == 1 and [block["share"]["1"] for block in said["blocks"]] == [0, 0]
    assert evolution(None, maps(1.0), [1], str, "probability") is None


def signed_maps():
    """Return the accumulated maps `(2, L, 2, 2)` of two classes; the sums of |R_b| are 4, 8, 0, 4, 4 and 4, ..., 4."""
    first = torch.tensor([[1.0, -1, 1, -1], [-2, 2, 2, -2], [0, 0, 0, 0], [-4, 0, 0, 0], [1, 1, 1, 1]])
    return torch.stack([first, torch.full((5, 4), -1.0)]).view(2, 5, 2, 2).cumsum(1)


def test_evolution_of_signed_maps_counts_evidence_for_and_against():
    said = evolution(VALUES, signed_maps(), [1, 2], str, "probability")
    assert [block["share"] for block in said["blocks"]] == [
        {"1": pytest.approx(share), "2": pytest.approx(0.2)} for share in (0.2, 0.4, 0, 0.2, 0.2)
    ]
    assert said["reading"].endswith(results.SIGNED)
    assert evolution(VALUES, signed_maps()[0], [1], str, "vote")["blocks"][1]["share"] == {"1": pytest.approx(0.4)}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_shares_of_maps_that_are_not_negative_are_not_touched(scale):
    accumulated = scale * torch.rand(1, 5, 7, 7, generator=torch.Generator().manual_seed(0)).square().cumsum(1)
    said = evolution(VALUES, accumulated, [1], str, "probability")
    total = accumulated.double().flatten(2).sum(2)
    expected = total.diff(dim=1, prepend=total.new_zeros(1, 1)) / total[:, -1:]
    assert [block["share"]["1"] for block in said["blocks"]] == expected[0].tolist()  # to the last bit
    assert results.SIGNED not in said["reading"]


@pytest.mark.parametrize("held", [None, {"2": [0.1] * 5, "1": [0.2] * 5}])
def test_a_signed_flow_is_drawn_as_such(held, monkeypatch):
    given = []
    monkeypatch.setattr(results, "evolution_picture", lambda *args: given.append(args) or evolution_picture(*args))
    said = evolution(VALUES, signed_maps(), [2, 1], str, "probability")
    picture = draw_evolution(Image.new("RGB", (64, 32)), signed_maps(), said, ["two", "one"], held)
    assert picture.mode == "RGB" and given[0][7:] == (True, held and [[0.1] * 5, [0.2] * 5])
    draw_evolution(Image.new("RGB", (64, 32)), signed_maps().abs().cumsum(1), said, ["two", "one"])
    assert given[1][7:] == (False, None)


def test_a_model_without_readings_prints_one_line(images, capsys):
    model = tiny_timm("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2,
                      num_classes=5)  # fmt: skip
    flow = attention_flow(model, images)
    assert results.lens_outputs(model, images, flow, head=True) is None
    out, err = capsys.readouterr()
    assert out.startswith("  no evolution.png: VisionTransformer has an attention pool; ") and not err
    assert out.count("\n") == 1


def test_numbers_and_names_of_flow_json_reach_the_picture():
    accumulated = torch.stack([maps(1.0, 1.0, 1.0, 1.0, 0.0), maps(0.0, 0.0, 0.0, 0.0, 2.0)])
    said = evolution(VALUES, accumulated, [2, 1], "class {}, or so".format, "vote")
    given = {}

    def picture(*args):
        given.update(zip(("frames", "curves", "shares", "leaders", "leads_from", "quantity", "note"), args))
        return evolution_picture(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "evolution_picture", picture)
        drawn = draw_evolution(Image.new("RGB", (640, 320), "gray"), accumulated, said, ["two", "one"])
    assert drawn.mode == "RGB" and [len(row) for row in given["frames"]] == [5, 5]
    assert given["frames"][0][0].size == (320, 160)
    assert [name for name, _ in given["curves"]] == ["two", "one", "class 0"]
    assert given["curves"][1][1] == pytest.approx(VALUES[:, 1].tolist())
    assert given["shares"] == [[0.25] * 4 + [0], [0] * 4 + [1]]
    assert given["leaders"] == ["class 0", "one", "class 0", "one", "one"] and given["leads_from"] == 4
    assert given["quantity"] == "share of the votes" and given["note"] == said["reading"]
