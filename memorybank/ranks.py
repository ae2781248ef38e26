"""Ranks of a build: the processes that `torchrun` starts, or a single one without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[int]:
    """Yield the rank, within the process group that `torchrun` describes in the environment."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # only lists are sent; a rank may wait for hours
    try:
        yield current_rank()[0]
    finally:
        if several:
            dist.destroy_process_group()


def current_rank() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: list) -> list:
    """Return the value of the first rank on every rank."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value
