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
