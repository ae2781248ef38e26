"""Ranks: the processes that `torchrun` starts, on one machine or several, and that share the work of one command.

Without `torchrun`, a command is the only rank, and all functions work as well. Ranks need two things to work
together. `shared` gives every item to the rank that is free first, by a counter that all of them see. `gather` is where
they wait for each other; `leave` comes last, even after an error, so that nobody waits for a rank that has ended.

torch is only imported for several ranks, because that takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, takewhile
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""Longest time to wait for the other ranks, which may work for hours."""
_store: Any = None
"""Store of keys and values that all ranks see, a `torch.distributed.Store`; None for a single rank."""
_rank, _ranks = 0, 1


@dataclass(frozen=True)
class _Left:
    """What a rank sends instead of a value when it leaves."""

    code: int


class OthersLeft(SystemExit):
    """Raised if another rank has left, with its exit code: this one leaves as well, and `leave` must not follow."""


@contextmanager
def process_group() -> Iterator[int]:
    """Yield the rank, within the process group that `torchrun` describes in the environment.

    A group within a group is the same group.
    """
    global _store, _rank, _ranks
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1" or _store is not None:
        yield _rank
        return
    import torch.distributed as dist

    store, _rank, _ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=_rank, world_size=_ranks, timeout=PATIENCE)
    _store = dist.PrefixStore("work", store)
    try:
        yield _rank
    finally:
        _store, _rank, _ranks = None, 0, 1
        dist.destroy_process_group()


def current_rank() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
    return _rank, _ranks


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks; wait for those that still work.

    Raises:
        OthersLeft: if a rank has left.
        ValueError: if a rank has died.
    """
    values = [value] * _ranks
    if _store is not None:
        import torch.distributed as dist

        with _alive():
            dist.all_gather_object(values, value)
    codes = [sent.code for sent in values if isinstance(sent, _Left)]
    if codes and not isinstance(value, _Left):
        raise OthersLeft(max(codes))
    return values


def leave(code: int) -> int:
    """Wait until every rank leaves or waits for this one; return the largest exit code, 2 if a rank has died."""
    try:
        return max(sent.code for sent in gather(_Left(code)) if isinstance(sent, _Left))
    except ValueError:
        return code or 2


def barrier() -> None:
    """Wait for all ranks."""
    gather(None)


def on_first(compute: Callable[[], T]) -> T:
    """Call a function on the first rank, and return the result on every rank."""
    return gather(compute() if _rank == 0 else None)[0]


def shared(items: Sequence[T], name: str) -> Iterator[tuple[int, T]]:
    """Yield the items that this rank works on, each with its place: always the next one that no rank has taken.

    Args:
        items: the same on every rank.
        name: of the work. No other work of the process has it.
    """
    for place in takewhile(lambda place: place < len(items), count() if _store is None else _taken(name)):
        yield place, items[place]


def _taken(name: str) -> Iterator[int]:
    while True:
        with _alive():
            place = _store.add(name, 1) - 1
        yield place


def claim(line: str) -> bool:
    """Return whether this rank is the one to say a line: the first that asks."""
    if _store is None:
        return True
    with suppress(RuntimeError):  # a line is better said twice than never
        return _store.compare_set(f"line {line}", "", str(_rank)).decode() == str(_rank)
    return True


@contextmanager
def _alive() -> Iterator[None]:
    """Turn the error about a lost connection into one line."""
    try:
        yield
    except RuntimeError:
        raise ValueError("torchrun: another process has ended; repeat the command, which continues") from None
