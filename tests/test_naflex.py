"""NaFlexViT takes batches of images with different patch grids."""

import pytest
import torch
from derivations import assert_same_maps
from support_table import ALL_ROWS, DECOMPOSED, naflex_batch, row_of
from timm.data.naflex_dataset import NaFlexCollator
from tiny_models import TINY

from daam_core import attention_flow, features

WIDTH = TINY["embed_dim"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", ["class", "patches"])
def test_naflex_patches_find_their_places(rows, norm):
    """An image gets the same maps in a padded batch as alone."""
    row = next(r for r in (DECOMPOSED if rows == "class" else ALL_ROWS) if r.batch)
    model, batch = row.make(), naflex_batch()
    together = attention_flow(model, batch, target=[1, 3], rows=rows, norm=norm)
    assert together.block_maps.shape == (2, 3, 4, 5)
    for i, (h, w) in enumerate([(4, 4), (3, 5)]):
        alone = {name: tensor[i : i + 1, : h * w] for name, tensor in batch.items()}
        alone = attention_flow(model, alone, target=[1, 3][i], rows=rows, norm=norm)
        for maps, its_own in ((together.block_maps, alone.block_maps), (together.accumulated, alone.accumulated)):
            expected = torch.zeros(3, 4, 5)
            expected[:, :h, :w] = its_own[0]
            assert_same_maps(maps[i : i + 1], expected[None])


def test_batch_of_the_naflex_collator():
    """The collator also returns the number of patches."""
    model = row_of("NaFlexViT, padded batch").make()
    patches = [{name: x[i] for name, x in naflex_batch().items()} for i in range(2)]
    batch, _ = NaFlexCollator(16)([(image, 0) for image in patches])
    assert "seq_len" in batch
    expected = attention_flow(model, naflex_batch(), target=1)
    assert_same_maps(attention_flow(model, batch, target=1).block_maps, expected.block_maps)
    flow = attention_flow(model, batch, importance=torch.ones(WIDTH))
    torch.testing.assert_close(flow.output, features(model, batch))


def test_features_of_naflex_see_the_mask_that_the_scores_see():
    model = row_of("NaFlexViT, padded batch").make()
    batch = naflex_batch()
    with torch.no_grad():
        usual = features(model, batch)
        tokens = model.num_prefix_tokens + batch["patches"].shape[1]
        mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
        mask[..., model.num_prefix_tokens + 2 :] = False
        masked = features(model, batch | {"attn_mask": mask})
        torch.testing.assert_close(model.head(masked), model(batch | {"attn_mask": mask}))
    assert not torch.allclose(masked, usual, atol=1e-3)
