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
def hooks(pairs: Sequence[Hook]) -> Iterator[None]:
    """Register hooks that act in the current thread only, since others may run the same model; remove them at the end.

    Args:
        pairs: how to register each hook, and what it calls.
    """
    thread = threading.get_ident()

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: call(*args) if threading.get_ident() == thread else None

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

    More flags are switched off: timm's `grad_checkpointing`, whose second forward would not be recorded; `fused_attn`
    of timm's differential attention, which would be two fused calls instead of one matrix; and what `Module.compile`
    or `torch.compile` made of a part, which would not be run function by function.
    """
    off: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        differential = type(module).__name__.startswith("Diff")
        for name, value in _FLAGS.items():
            if module.__dict__.get(name) and (name != "fused_attn" or differential):
                off.append((module, name, value))
        plain: Any = getattr(module, "_orig_mod", None)
        if type(module).__name__ == "OptimizedModule" and module.forward != plain.__call__:
            off.append((module, "forward", plain.__call__))
    before = [getattr(module, name) for module, name, _ in off]
    try:
        for module, name, value in off:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(off, before):
            setattr(module, name, value)


_FLAGS = {"training": False, "grad_checkpointing": False, "fused_attn": False, "_compiled_call_impl": None}
"""The flags, and what switches them off."""
