"""A flow leaves nothing behind: on the model, in the thread, in memory, in other threads."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from model_state import raw, state_of
from support_table import row_of
from tiny_models import TINY, random_images, tiny_vit
from torch.multiprocessing.reductions import StorageWeakRef

from daam_core import attention_flow
from daam_vit.attention import AttentionRecorder
from daam_vit.plan import AttentionLayer

WIDTH = TINY["embed_dim"]


def in_disorder(model):
    """Return the model with mixed modes, frozen parts, gradients and checkpointing, which a call must not change."""
    model.train()
    model.blocks[1].eval()
    model.blocks[2].mlp.eval()
    model.head.requires_grad_(False)
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    for p in model.blocks[1].parameters():
        p.grad = torch.randn_like(p)
    model.set_grad_checkpointing(True)
    return model


MODES = {
    "default": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
WAYS = {"fast": {"memory": "fast"}, "low memory": {"memory": "low"}, "no shortcuts": {"shortcuts": False}}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("importance", [None, torch.ones(WIDTH)], ids=["target", "importance"])
def test_everything_is_given_back(mode, importance, way, images):
    model = in_disorder(tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5))
    with MODES[mode]() if mode == "autocast" else nullcontext():
        expected = attention_flow(tiny_vit(), images, importance=importance)
    with MODES[mode]():
        before = state_of(model)
        flow = attention_flow(model, images + 0, importance=importance, **way)
        assert state_of(model) == before
    if way == {"shortcuts": False}:
        torch.testing.assert_close(flow.block_maps, expected.block_maps, rtol=1e-4, atol=1e-2 * (mode == "autocast"))
        return
    assert torch.equal(flow.block_maps, expected.block_maps)  # eval mode: no dropout
    assert torch.equal(flow.output, expected.output)


@pytest.mark.parametrize("family", ["ViT", "XCiT/16", "CrossViT", "differential attention"])
@pytest.mark.parametrize("memory", ["auto", "low"])
def test_everything_is_given_back_by_other_families(family, memory):
    row = row_of(family)
    model = row.make().train()
    before = state_of(model)
    attention_flow(model, row.images(), memory=memory)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="out of range"):
        attention_flow(model, row.images(), target=10_000, memory=memory)
    assert state_of(model) == before


@pytest.mark.parametrize("accident", [None, KeyboardInterrupt])
def test_forward_that_a_block_has_as_its_own_attribute_is_given_back(accident, model, images):
    expected = attention_flow(model, images, memory="low").block_maps
    runs = []

    def own(x, **options):
        runs.append(1)
        if accident and len(runs) == 2:
            raise accident
        return type(model.blocks[1]).forward(model.blocks[1], x, **options)

    model.blocks[1].forward = own
    with pytest.raises(accident) if accident else nullcontext():
        assert torch.equal(attention_flow(model, images, memory="low").block_maps, expected)
    assert len(runs) == 2  # it was recomputed
    assert model.blocks[1].forward is own and not any("forward" in vars(b) for b in (model.blocks[0], model.blocks[2]))


@every_way
def test_a_callable_sees_the_model_without_hooks(way, model, images):
    """It may save or copy the model."""
    before = state_of(model)

    def target(scores):
        during = state_of(model)
        assert during["module hooks"] == before["module hooks"] and during["attributes"] == before["attributes"]
        return 0

    attention_flow(model, images, target, **way)


@every_way
def test_a_model_that_was_compiled_in_place(way, images):
    expected = attention_flow(tiny_vit(), images, **way)
    model = tiny_vit()
    model.compile(backend="eager")
    model.blocks[1].compile(backend="eager")
    before = model._compiled_call_impl, model.blocks[1]._compiled_call_impl
    assert torch.equal(attention_flow(model, images, **way).block_maps, expected.block_maps)
    assert (model._compiled_call_impl, model.blocks[1]._compiled_call_impl) == before and all(before)


@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.mlp"])
@pytest.mark.parametrize("variant", ["paper", "relevance"])
def test_a_part_that_was_compiled_is_run_as_it_is(variant, part, images):
    expected = attention_flow(tiny_vit(), images, variant=variant)
    model = tiny_vit()
    compiled = torch.compile(model.get_submodule(part), backend="eager")
    model.set_submodule(part, compiled)
    before = compiled.forward
    assert torch.equal(attention_flow(model, images, variant=variant).block_maps, expected.block_maps)
    assert compiled.forward is before


def test_images_are_left_alone(model, images):
    images.requires_grad_()
    before = raw(images)
    attention_flow(model, images)
    assert images.grad is None and images._backward_hooks is None and raw(images) == before


@pytest.mark.parametrize("family", ["parallel blocks", "CrossViT", "CaiT"])
def test_images_that_require_grad_change_nothing(family):
    row = row_of(family)
    model, images = row.make(), row.images()
    expected = attention_flow(model, images)
    assert torch.equal(attention_flow(model, images.requires_grad_()).block_maps, expected.block_maps)
    assert images.grad is None


@contextmanager
def raising_forward(model):
    def hook(module, args, output):
        raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].register_forward_hook(hook)
    yield {}
    handle.remove()


@contextmanager
def raising_backward(model):
    def stop(gradient):
        raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].register_forward_hook(lambda module, args, output: output.register_hook(stop) and None)
    yield {}
    handle.remove()


@contextmanager
def raising_importance(model):
    def importance(features):
        raise KeyboardInterrupt("stopped on the way")

    yield {"importance": importance}


@contextmanager
def refused_target(model):
    yield {"target": 99}


@contextmanager
def raising_second_pass(model):
    """With memory="low", the MLP runs once more in the backward."""
    runs = []

    def hook(module, args):
        runs.append(module)
        if len(runs) == 2:
            raise KeyboardInterrupt("stopped on the way")

    handle = model.blocks[1].mlp.register_forward_pre_hook(hook)
    yield {"memory": "low"}
    handle.remove()


@every_way
@pytest.mark.parametrize(
    "accident", [raising_forward, raising_backward, raising_importance, refused_target, raising_second_pass]
)
def test_everything_is_given_back_after_an_exception(accident, way, images):
    model = in_disorder(tiny_vit())
    expected = attention_flow(model, images)
    with accident(model) as arguments:
        before = state_of(model)
        with pytest.raises((KeyboardInterrupt, ValueError), match=r"stopped on the way|out of range"):
            attention_flow(model, images, **(arguments if accident is raising_second_pass else way | arguments))
        assert state_of(model) == before
    assert torch.equal(attention_flow(model, images).accumulated, expected.accumulated)


@pytest.mark.parametrize("accident", [raising_forward, raising_backward])
def test_recorder_alone_gives_everything_back(accident, images):
    model = in_disorder(tiny_vit())
    recorder = AttentionRecorder([AttentionLayer(b.attn, (4, 4)) for b in model.blocks], lambda call, A, C: None)
    with accident(model):
        before = state_of(model)
        with pytest.raises(KeyboardInterrupt), torch.no_grad(), recorder.attached(model):
            during = state_of(model)
            scores = recorder.run(model, images)
            torch.autograd.grad(scores.sum(), recorder.leaves)
        assert state_of(model) == before
    assert during["flags"] != before["flags"] and during["module hooks"] == before["module hooks"]


def test_results_carry_no_graph(model, images):
    flow = attention_flow(model, images, norm=True)
    for tensor in (flow.block_maps, flow.accumulated, flow.output, flow.target):
        assert tensor.grad_fn is None and not tensor.requires_grad and not tensor.is_inference()


def test_same_call_twice_is_bit_equal(model, images):
    first, second = (attention_flow(model, images) for _ in range(2))
    assert torch.equal(first.block_maps, second.block_maps) and torch.equal(first.accumulated, second.accumulated)


def test_gradient_checkpointing_changes_nothing(model, images):
    expected = attention_flow(model, images)
    model.set_grad_checkpointing(True)
    assert torch.equal(attention_flow(model, images).block_maps, expected.block_maps)
    assert model.grad_checkpointing is True


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("accident", [None, raising_backward], ids=["after success", "after an exception"])
def test_no_memory_is_kept(accident, way, model, images):
    """Memory is free without the garbage collector: a reference cycle would keep the graph of a call for a while."""
    captured = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda module, args, output: captured.append(StorageWeakRef(output.untyped_storage()))
        )

    def explain():
        with accident(model) if accident else nullcontext({}) as arguments, suppress(KeyboardInterrupt):
            attention_flow(model, images, **way | arguments)

    def living_tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    explain()  # fills caches
    gc.collect()
    gc.disable()
    try:
        captured.clear()
        before = living_tensors()
        explain()
        assert len(captured) >= 2 and all(storage.expired() for storage in captured)
        assert living_tensors() == before
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------------------------------
# Threads
# ----------------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_two_threads_at_once(shared, way):
    models = [tiny_vit(depth=6)] * 2 if shared else [tiny_vit(depth=6), tiny_vit(depth=4, num_heads=3)]
    batches = [random_images(2, 3, 32, 32), random_images(3, 3, 32, 32)]
    expected = [attention_flow(m, x, shortcuts=way != WAYS["no shortcuts"]) for m, x in zip(models, batches)]
    start = threading.Barrier(2)

    def explain(model, images):
        start.wait(timeout=30)
        return [attention_flow(model, images, **way) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for flows, wanted in zip(pool.map(explain, models, batches), expected, strict=True):
                for flow in flows:
                    assert torch.equal(flow.block_maps, wanted.block_maps) and torch.equal(flow.output, wanted.output)


@contextmanager
def standing_still(model, images, **options):
    """Run a flow in another thread that waits in the middle of its forward, or of a recomputation (`second`)."""
    inside, go_on = threading.Event(), threading.Event()
    this_thread, runs = threading.get_ident(), []
    second = options.pop("second", False)

    def stand_still(module, args):
        if threading.get_ident() == this_thread:
            return
        runs.append(1)
        if len(runs) == 1 + second:
            inside.set()
            assert go_on.wait(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        handle = model.blocks[1].mlp.register_forward_pre_hook(stand_still)
        running = pool.submit(attention_flow, model, images, **options)
        try:
            assert inside.wait(timeout=30)
            yield running
        finally:
            go_on.set()
            running.exception(timeout=30)
            handle.remove()


STANDS = {**WAYS, "low memory, second pass": {"memory": "low", "second": True}}


@pytest.mark.parametrize("way", STANDS.values(), ids=STANDS)
@pytest.mark.parametrize("shared", [False, True], ids=["another model", "the same model"])
def test_a_flow_does_not_show_in_other_threads(shared, way, model, images):
    """This thread uses a model while a flow waits in another thread."""
    other = model if shared else tiny_vit()
    with torch.no_grad():
        expected_scores = model(images)
    expected = attention_flow(model, images, **{k: v for k, v in way.items() if k != "second"})
    plain = attention_flow(model, images, memory="fast")
    with standing_still(model, images, **way) as running:
        with torch.no_grad():
            scores = other(images)
        assert scores.grad_fn is None and not scores.requires_grad
        assert torch.equal(scores, expected_scores)
        other(images).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        assert torch.equal(attention_flow(other, images, memory="fast").block_maps, plain.block_maps)
        assert not running.done()
    assert torch.equal(running.result().block_maps, expected.block_maps)
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("second", [False, True], ids=["forward", "second pass"])
def test_flows_with_little_memory_of_one_model_do_not_wait_for_each_other(second, model, images):
    expected = attention_flow(model, images, memory="low")
    with standing_still(model, images, memory="low", second=second) as first:
        assert torch.equal(attention_flow(model, images, memory="low").block_maps, expected.block_maps)
        assert not first.done()
    assert torch.equal(first.result(timeout=30).block_maps, expected.block_maps)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_flows_with_little_memory_of_models_that_share_a_block(model, images):
    other = tiny_vit(depth=4)
    other.blocks[1] = model.blocks[1]
    expected = [attention_flow(m, images, memory="low").block_maps for m in (model, other)]
    with standing_still(model, images, memory="low") as first:
        assert torch.equal(attention_flow(other, images, memory="low").block_maps, expected[1])
    assert torch.equal(first.result(timeout=30).block_maps, expected[0])
    assert not any("forward" in vars(block) for block in (*model.blocks, *other.blocks))


def test_flow_inside_of_a_flow(model, images):
    """A callable may explain the same model again, in the same thread."""
    inner = []

    def importance(features):
        inner.append(attention_flow(model, images, target=1, memory="low").block_maps)
        return torch.ones_like(features)

    outer = attention_flow(model, images, importance=importance, memory="low").block_maps
    assert torch.equal(inner[0], attention_flow(model, images, target=1).block_maps)
    assert torch.equal(outer, attention_flow(model, images, importance=torch.ones(WIDTH)).block_maps)
    assert not any("forward" in vars(block) for block in model.blocks)
