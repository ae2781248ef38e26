"""What saves time and memory changes nothing: rows that lead nowhere are left out, blocks are computed again."""

import re
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support_table import ALL_ROWS, DECOMPOSED
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, random_images, tiny_vit
from torch import nn
from torch.profiler import ProfilerActivity, profile

import daam_core
from daam_core import UnsupportedModel, attention_flow

BLOCKS = TINY["depth"]
ROWS = DECOMPOSED + ALL_ROWS
ROW_NAMES = [f"{row.family}: {row.example} {row.flow}" for row in ROWS]


def with_all_rows():
    """Every block runs for all tokens, and the graph holds all of them."""
    plan = daam_core._plan

    def without_last(*arguments):
        made = plan(*arguments)
        return made and replace(made, last=None)

    return mock.patch.object(daam_core, "_plan", without_last)


def flow_of(row, **options):
    model = row.make()
    images = row.images(model) if row.images else random_images(2, 3, *row.size)
    return attention_flow(model, images, **row.flow, **options)


WHOLE = re.compile("parallel blocks|attention pool|CaiT|XCiT|VOLO|PiT|CrossViT|torchvision")
"""Rows whose last attention has other queries than the class token alone, or none to leave out; and see
`_WHOLE_LAST_BLOCK`."""


@contextmanager
def calls_of(cls, method):
    calls = []
    plain = getattr(cls, method)

    def counted(self, *arguments, **named):
        calls.append(self)
        return plain(self, *arguments, **named)

    with mock.patch.object(cls, method, counted):
        yield calls


@pytest.mark.parametrize("row", DECOMPOSED, ids=ROW_NAMES[: len(DECOMPOSED)])
def test_rows_that_lead_nowhere_are_left_out(row):
    with with_all_rows():
        expected = flow_of(row)
    with calls_of(daam_core._AttentionWatch, "for_first_rows") as calls:
        flow = flow_of(row)
    assert len({id(watch) for watch in calls}) == (WHOLE.search(f"{row.family} {row.example}") is None)
    with calls_of(daam_core._AttentionWatch, "__init__") as watches:
        flow_of(row)
    assert len(watches) == 1  # nothing is given up on the way
    largest = expected.block_maps.amax((2, 3), keepdim=True)
    assert ((flow.block_maps - expected.block_maps).abs() <= 1e-5 * largest + 1e-12).all() and (largest > 0).any()
    torch.testing.assert_close(flow.output, expected.output)


@pytest.mark.parametrize("row", ROWS, ids=ROW_NAMES)
def test_low_memory_is_bit_equal(row):
    fast = flow_of(row, memory="fast")
    with calls_of(daam_core._Block, "second_pass") as blocks:
        low = flow_of(row, memory="low")
    assert len(blocks) == len(set(blocks)) and (len(blocks) > 0) == (fast.block_maps.shape[1] > 1)
    assert torch.equal(fast.block_maps, low.block_maps) and torch.equal(fast.output, low.output)


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


def rows_of(model, images, **options):
    """How many tokens the MLP of every block saw, forward by forward, and the flow."""
    seen = []
    handles = [b.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])) for b in model.blocks]
    flow = attention_flow(model, images, **options)
    for handle in handles:
        handle.remove()
    return seen, flow


def test_last_block_goes_on_with_the_class_token_alone(model, images):
    assert rows_of(model, images)[0] == [17] * (BLOCKS - 1) + [1]
    assert rows_of(model, images, rows="patches")[0] == [17] * BLOCKS
    assert rows_of(tiny_vit(depth=1), images)[0] == [1]


def test_first_block_needs_the_graph_of_the_class_token_alone(model, images):
    """The gradient at the first attention's output: of the class token as ever, of the patches none."""
    gradients = []

    def watch(module, args):
        args[0].register_hook(lambda gradient: gradients.append(gradient.abs().sum((0, 2)).count_nonzero().item()))

    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(watch)
    attention_flow(model, images)
    assert gradients == [1] + [17] * (BLOCKS - 2) + [1]
    gradients.clear()
    with with_all_rows():
        attention_flow(model, images)
    assert gradients == [1] + [17] * (BLOCKS - 1)


class Detour(VisionTransformer):
    """Reads the class token in a way that could as well read others."""

    def forward_head(self, x, pre_logits=False):
        x = x.flip(1)[:, -1]
        return x if pre_logits else self.head(x)


class MixesAtTheEnd(VisionTransformer):
    """The mean of all tokens is added to each: the class row of the last block is not alone."""

    def forward_features(self, x, **options):
        x = super().forward_features(x, **options)
        return x + x.mean(1, keepdim=True)


class Neighbour(VisionTransformer):
    """The second token, a patch, is read."""

    def forward_head(self, x, pre_logits=False):
        return x[:, 1] if pre_logits else self.head(x[:, 1])


def test_a_model_that_goes_on_in_another_way_runs_for_all_tokens(images):
    expected = attention_flow(tiny_vit(), images)
    seen, flow = rows_of(tiny_vit(Detour), images)
    assert seen == [17] * (BLOCKS - 1) + [1] + [17] * BLOCKS  # the forward that was given up, and the one that counts
    torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [MixesAtTheEnd, Neighbour])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_model_that_reads_other_rows_is_still_refused(kind, memory, images):
    with pytest.raises(UnsupportedModel, match="^model: the score of .* reads the patch tokens"):
        attention_flow(tiny_vit(kind), images, memory=memory)


class SecondToken(nn.Module):
    """Adds a part of the token before to each, between two blocks."""

    def forward(self, x):
        return x + 0.5 * x.roll(1, 1)


class RootMeanSquare(nn.RMSNorm):
    """Written out, as timm does."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight


def test_norms_that_are_written_out(images):
    assert rows_of(tiny_vit(norm_layer=RootMeanSquare), images)[0] == [17] * (BLOCKS - 1) + [1]


def test_tokens_that_mix_between_the_first_two_attentions(images):
    """The graph of the first rows ends where tokens mix; what mixed before reached it through these rows only."""
    model = tiny_vit()
    model.blocks[0].ls2 = SecondToken()
    flow = attention_flow(model, images)
    with with_all_rows():
        expected = attention_flow(model, images)
    torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "call, kind",
    [
        (lambda x: F.linear(x, torch.ones(3, 4)), "computes"),
        (lambda x: x + x, "computes"),
        (lambda x: x * torch.ones(4), "computes"),
        (lambda x: x + torch.ones(5, 4), ""),
        (lambda x: F.layer_norm(x, (4,)), "computes"),
        (lambda x: F.layer_norm(x, (5, 4)), ""),
        (lambda x: torch.cat([x, x], dim=-1), "computes"),
        (lambda x: torch.cat([x, x], dim=1), ""),
        (lambda x: torch.cat([x, x]), ""),
        (lambda x: x.chunk(2, -1), "computes"),
        (lambda x: x.chunk(2, dim=1), ""),
        (lambda x: x.transpose(1, 2), ""),
        (lambda x: x.unsqueeze(1).transpose(1, 2), "rearranges"),
        (lambda x: x.mean(1), ""),
        (lambda x: x.softmax(1), ""),
        (lambda x: x.shape, "looks"),
        (lambda x: x.mT, ""),
        (lambda x: x.mean(-1, keepdim=True), ""),  # of positional arguments nothing is known
        (lambda x: x.mean(dim=-1, keepdim=True), "computes"),
        (lambda x: x.mean(dim=1, keepdim=True), ""),
        (lambda x: x.chunk(chunks=2), ""),
        (lambda x: torch.cat(tensors=[x, x], dim=-1), "computes"),
        (lambda x: torch.ones(4).softmax(0), "looks"),
    ],
)
def test_what_is_known_to_treat_tokens_one_by_one(call, kind):
    kinds = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            attribute = func.__name__ == "__get__" and func.__self__.__name__ in daam_core._ATTRIBUTES
            kinds.append("looks" if attribute else daam_core._by_row(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x = torch.rand(2, 5, 4)
    with Record():
        call(x)
    assert kinds[-1] == kind


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def test_low_memory_in_every_way(model, images):
    for options in (
        {"target": [[0, 1], [2, 3]], "norm": True},
        {"importance": torch.rand(TINY["embed_dim"])},
        {"rows": "patches", "target": 2},
    ):
        fast, low = (attention_flow(model, images, memory=memory, **options) for memory in ("fast", "low"))
        assert torch.equal(fast.accumulated, low.accumulated)
    with torch.autocast("cpu", torch.bfloat16):
        fast, low = (attention_flow(model, images, memory=memory) for memory in ("fast", "low"))
    assert torch.equal(fast.accumulated, low.accumulated)
    fast, low = (attention_flow(model.half(), images, memory=memory) for memory in ("fast", "low"))
    assert torch.equal(fast.accumulated, low.accumulated) and torch.isfinite(low.accumulated).all()


def test_automatic_memory_goes_by_the_size_of_the_graph_of_one_image(model, images):
    graph = 10 * BLOCKS * 17 * TINY["embed_dim"] * 4  # bytes, with the block that is never computed again
    twice = [17] * (BLOCKS - 1) + [1] + [17] * (BLOCKS - 1)
    once = twice[:BLOCKS]
    graph = graph * (BLOCKS - 1) // BLOCKS
    for limit, memory, expected in (
        (graph, "auto", once),
        (graph - 1, "auto", twice),
        (0, "fast", once),
        (graph, "low", twice),
    ):
        with mock.patch.object(daam_core, "_LARGE_GRAPH", limit):
            assert rows_of(model, images, memory=memory)[0] == expected


def test_hooks_of_a_block_see_its_arguments_once(model, images):
    """What a hook of somebody else makes of the input and the output of a block is not made again."""
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    model.blocks[1].register_forward_hook(lambda module, args, output: F.gelu(output))
    fast, low = (attention_flow(model, images, memory=memory).block_maps for memory in ("fast", "low"))
    assert torch.equal(fast, low)


class OnceMore(nn.Module):
    """Keeps something for the backward in the first pass, and not in the second."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x.exp().log() if self.runs == 1 else x


def test_refused_block_that_does_not_compute_the_same_twice(model, images):
    model.blocks[1].mlp.act = OnceMore()
    with pytest.raises(UnsupportedModel, match="^model: a Block does not compute the same twice; give memory='fast'$"):
        attention_flow(model, images, memory="low")
    model.blocks[1].mlp.act = OnceMore()
    attention_flow(model, images, memory="fast")


def allocations(call):
    """Bytes of every allocation, negative where memory is given back, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    return [event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]


def peak(sizes):
    most = held = 0
    for size in sizes:
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("target", [0, [[0, 1]]], ids=["one class", "two classes"])
def test_nothing_as_large_as_an_attention_matrix_is_allocated(memory, target):
    """Counted by torch's allocator, which also sees what is inside of the fused attention and its backward."""
    model = tiny_vit(img_size=256, patch_size=4, num_heads=2, embed_dim=16, depth=3)  # 4,097 tokens
    images = random_images(1, 3, 256, 256)
    sizes = allocations(lambda: attention_flow(model, images, target, memory=memory))
    matrix = 4097**2 * 4  # bytes of one head
    assert len(sizes) > 100 and max(sizes) < matrix / 10
    for block in model.blocks:
        block.attn.fused_attn = False
    assert max(allocations(lambda: attention_flow(model, images, target, memory=memory))) >= matrix


def test_low_memory_takes_less():
    model, images = tiny_vit(img_size=128, patch_size=4, depth=12), random_images(1, 3, 128, 128)
    fast, low = (peak(allocations(lambda: attention_flow(model, images, memory=m))) for m in ("fast", "low"))  # noqa: B023
    assert 0 < low < fast / 2
