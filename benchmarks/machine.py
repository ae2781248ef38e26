"""What a machine is called, and how much memory it has and a process uses."""

from __future__ import annotations

import math
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the name and number of CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name")) + f", {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_memory(device: torch.device) -> float:
    """Return the bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        return read_proc("/proc/meminfo", "MemAvailable")
    return math.inf


def used_memory(device: torch.device) -> int:
    """Return the bytes that the process holds now, and reset its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return read_proc("/proc/self/status", "VmRSS")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return read_proc("/proc/self/status", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_proc(file: str, field: str) -> int:
    """Read a number of bytes from a file of Linux."""
    lines = Path(file).read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
