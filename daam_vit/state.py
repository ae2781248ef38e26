"""Set hooks and flags on a model within a `with` block, and restore them at its end, even after an exception."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Hook = tuple[Callable[..., Any], Callable[..., Any]]
"""How to register a hook (`module.register_forward_hook`, ...), and what it calls."""


@contextmanager
def hooks(pairs: Sequence[Hook], is_active: Callable[[], bool] | None = None) -> Iterator[None]:
    """Register hooks of modules, and remove them at the end.

    Args:
        pairs: how to register each hook, and what it calls.
        is_active: whether a hook may act, asked at each call; by default only in the thread that registered it, since
            other threads may run the same model.
    """
    owner = threading.get_ident()
    active = is_active or (lambda: threading.get_ident() == owner)

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: call(*args) if active() else None

    handles = []
    try:
        for register, call in pairs:
            handles.append(register(guarded(call)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore every flag at the end.

    Two more flags of timm are switched off: `grad_checkpointing`, whose second forward would not be recorded, and
    `fused_attn` of differential attention, which would be two fused calls instead of one matrix.
    """
    modules = list(model.modules())
    flags = [(m, name) for m in modules for name in ("training", "grad_checkpointing") if m.__dict__.get(name)]
    differential = [m for m in modules if type(m).__name__.startswith("Diff")]
    flags += [(m, "fused_attn") for m in differential if m.__dict__.get("fused_attn")]
    try:
        for module, name in flags:
            setattr(module, name, False)
        yield
    finally:
        for module, name in flags:
            setattr(module, name, True)
