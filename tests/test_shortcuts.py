"""Shortcuts save time and memory and change nothing: tokens are skipped, blocks are recomputed."""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from derivations import assert_same_maps
from odd_models import Detour, NamedLikeCheckpoint, RootMeanSquare, SecondToken
from support_table import ALL_ROWS, DECOMPOSED, Row
from tiny_models import TINY, random_images, tiny_vit
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter

from daam_core import AttentionFlow, attention_flow
from daam_vit import attention, shortcuts
from daam_vit.attention import AttentionRecorder

BLOCKS = TINY["depth"]
ROWS = DECOMPOSED + ALL_ROWS


WHOLE = re.compile("parallel blocks|attention pool|CaiT|XCiT|VOLO|PiT|CrossViT|torchvision")
"""Rows whose last attention has more queries than the class token, or none to skip, and those of
`families.WHOLE_LAST_BLOCK`."""


@contextmanager
def calls_of(owner, name):
    """Collect the arguments of every call of a function."""
    calls = []
    plain = getattr(owner, name)

    def counted(*arguments, **named):
        calls.append(arguments)
        return plain(*arguments, **named)

    with mock.patch.object(owner, name, counted):
        yield calls


@dataclass(frozen=True)
class Flows:
    """A row of the support table, explained in three ways."""

    row: Row
    plain: AttentionFlow
    fast: AttentionFlow
    low: AttentionFlow
    skipping: int
    """Number of functions that were called on the first rows only."""
    runs: int
    """Number of forwards of the fast flow."""
    recomputed: list[nn.Module]
    """Blocks that were recomputed, in order."""


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def flows(request):
    row = request.param
    model, images = row.make(), row.images()
    plain = attention_flow(model, images, **row.flow, shortcuts=False)
    with calls_of(shortcuts, "_on_first_rows") as skipping, calls_of(AttentionRecorder, "run") as runs:
        fast = attention_flow(model, images, **row.flow, memory="fast")
    with calls_of(shortcuts._SecondPass, "__enter__") as passes:
        low = attention_flow(model, images, **row.flow, memory="low")
    return Flows(row, plain, fast, low, len(skipping), len(runs), [second.block for (second,) in passes])


def test_shortcuts_change_nothing(flows):
    assert_same_maps(flows.fast.block_maps, flows.plain.block_maps)
    torch.testing.assert_close(flows.fast.output, flows.plain.output)
    assert flows.fast.decomposed == flows.plain.decomposed


def test_tokens_that_cannot_affect_the_score_are_skipped(flows):
    all_count = flows.row in ALL_ROWS or WHOLE.search(f"{flows.row.family} {flows.row.example}")
    assert (flows.skipping == 0) == bool(all_count)
    assert flows.runs == 1  # nothing is given up on the way


def test_low_memory_is_bit_equal(flows):
    assert torch.equal(flows.fast.block_maps, flows.low.block_maps) and torch.equal(flows.fast.output, flows.low.output)
    assert len(flows.recomputed) == len(set(flows.recomputed))  # each of them once
    assert (len(flows.recomputed) > 0) == (flows.fast.block_maps.shape[1] > 1)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------------------


def rows_of(model, images, **options):
    """Return how many tokens the MLP of every block saw, forward by forward, and the flow."""
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


def test_first_block_has_a_graph_for_the_class_token_only(model, images):
    """At the output of the first attention, the class token gets a gradient and the patches get none."""
    gradients = []

    def watch(module, args):
        args[0].register_hook(lambda gradient: gradients.append(gradient.abs().sum((0, 2)).count_nonzero().item()))

    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(watch)
    attention_flow(model, images)
    assert gradients == [1] + [17] * (BLOCKS - 2) + [1]
    gradients.clear()
    attention_flow(model, images, shortcuts=False)
    assert gradients == [1] + [17] * (BLOCKS - 1)


def test_model_that_may_read_other_tokens_runs_again_for_all_tokens(images):
    expected = attention_flow(tiny_vit(), images)
    seen, flow = rows_of(tiny_vit(Detour), images)
    assert seen == [17] * (BLOCKS - 1) + [1] + [17] * BLOCKS  # the forward that was abandoned, and the one that counts
    torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-7)


def test_norms_that_are_written_out_are_skipped_too(images):
    assert rows_of(tiny_vit(norm_layer=RootMeanSquare), images)[0] == [17] * (BLOCKS - 1) + [1]


def test_tokens_that_mix_between_the_first_two_attentions(images):
    """The shortcut ends as soon as tokens mix: from there on all rows have a graph."""
    model = tiny_vit()
    model.blocks[0].ls2 = SecondToken()
    flow = attention_flow(model, images)
    expected = attention_flow(model, images, shortcuts=False)
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
        (lambda x: x.mean(-1, keepdim=True), ""),  # only a named dim is known
        (lambda x: x.mean(dim=-1, keepdim=True), "computes"),
        (lambda x: x.mean(dim=1, keepdim=True), ""),
        (lambda x: x.chunk(chunks=2), ""),
        (lambda x: torch.cat(tensors=[x, x], dim=-1), "computes"),
        (lambda x: torch.ones(4).softmax(0), "looks"),
    ],
)
def test_functions_that_are_known_to_treat_tokens_one_by_one(call, kind):
    kinds = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            attribute = func.__name__ == "__get__" and func.__self__.__name__ in attention._ATTRIBUTES
            kinds.append("looks" if attribute else shortcuts.row_kind(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x = torch.rand(2, 5, 4)
    with Record():
        call(x)
    assert kinds[-1] == kind


def operations(call, monkeypatch):
    """Count the floating point operations of matrix products, convolutions and attention."""
    tracker = mock.MagicMock(parents={"Global"})  # the one of torch fails at a gradient with respect to inner tensors
    monkeypatch.setattr(flop_counter, "ModuleTracker", lambda: tracker)
    with flop_counter.FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operations_of_a_flow_in_forwards(monkeypatch):
    model, images = timm.create_model("deit_small_patch16_224").eval(), random_images(1, 3, 224, 224)
    with torch.no_grad():
        forward = operations(lambda: model(images), monkeypatch)
    costs = [
        operations(lambda: attention_flow(model, images, **options), monkeypatch) / forward  # noqa: B023
        for options in ({}, {"shortcuts": False})
    ]
    assert 1.7 < costs[0] < 1.92 and costs[1] - costs[0] > 0.2  # 1.86 and 2.07, with the formulas of torch 2.15


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
    graph = 10 * BLOCKS * 17 * TINY["embed_dim"] * 4  # bytes, including the last block, which is never recomputed
    twice = [17] * (BLOCKS - 1) + [1] + [17] * (BLOCKS - 1)
    once = twice[:BLOCKS]
    graph = graph * (BLOCKS - 1) // BLOCKS
    for limit, memory, expected in (
        (graph, "auto", once),
        (graph - 1, "auto", twice),
        (0, "fast", once),
        (graph, "low", twice),
    ):
        with mock.patch.object(shortcuts, "LARGE_GRAPH", limit):
            assert rows_of(model, images, memory=memory)[0] == expected


def test_block_with_arguments_that_checkpoint_has_too(model, images):
    expected = attention_flow(model, images, memory="low").block_maps
    names = {"function": 1, "debug": 2, "use_reentrant": 3, "context_fn": 4}
    model.blocks[1] = NamedLikeCheckpoint(model.blocks[1])
    model.blocks[1].register_forward_pre_hook(lambda module, args, kwargs: (args, names), with_kwargs=True)
    assert torch.equal(attention_flow(model, images, memory="low").block_maps, expected)


class Noise(nn.Module):
    """Draws random numbers, even in eval mode."""

    def forward(self, x):
        return x + torch.randn_like(x)


def test_block_that_draws_random_numbers_draws_the_same_again(model, images):
    model.blocks[1].mlp.act, flows = Noise(), []
    for memory in ("fast", "low", "low"):
        torch.manual_seed(len(flows) // 4)
        flows.append(attention_flow(model, images, memory=memory))
        flows.append(torch.get_rng_state())
    fast, state, low, same_state, other, _ = flows
    assert torch.equal(fast.block_maps, low.block_maps) and torch.equal(state, same_state)
    assert not torch.equal(fast.block_maps, other.block_maps)


def test_hooks_of_a_block_see_its_arguments_once(model, images):
    """A recomputation does not call other people's hooks of the block a second time."""
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    model.blocks[1].register_forward_hook(lambda module, args, output: F.gelu(output))
    fast, low = (attention_flow(model, images, memory=memory).block_maps for memory in ("fast", "low"))
    assert torch.equal(fast, low)


@pytest.fixture
def one_thread():
    """Pin one thread: fused attention allocates 1 MB for every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocations(call):
    """Return the bytes of every allocation in order, negative if memory is freed."""
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
def test_nothing_as_large_as_an_attention_matrix_is_allocated(memory, target, one_thread):
    """The profiler of torch also sees allocations inside of the fused attention and its backward."""
    model = tiny_vit(img_size=192, patch_size=4, num_heads=2, embed_dim=16, depth=3)  # 2,305 tokens
    images = random_images(1, 3, 192, 192)
    sizes = allocations(lambda: attention_flow(model, images, target, memory=memory))
    matrix = 2305**2 * 4  # bytes of one head
    assert len(sizes) > 100 and max(sizes) < matrix / 10
    for block in model.blocks:
        block.attn.fused_attn = False
    assert max(allocations(lambda: attention_flow(model, images, target, memory=memory))) >= matrix


def test_low_memory_takes_less():
    model, images = tiny_vit(img_size=128, patch_size=4, depth=12), random_images(1, 3, 128, 128)
    fast, low = (peak(allocations(lambda: attention_flow(model, images, memory=m))) for m in ("fast", "low"))  # noqa: B023
    assert 0 < low < fast / 2
