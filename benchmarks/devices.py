"""What a device does and holds: seconds, memory, operations, the rate of a matrix product. On a CPU or a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from records import resident_mib


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Memory:
    """The most that the process takes from here on, above what it has: of the GPU's memory, or resident."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = resident_mib()

    def mib(self) -> float:
        most = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else resident_mib("VmHWM")
        return most - self.before


class Anywhere:
    """In place of the counter's tracker of modules, whose hooks refuse `torch.autograd.grad` with a leaf among its inputs."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


def counter_of_flops() -> FlopCounterMode:
    """torch's own, which does not know the attention that it runs on a CPU. It counts as a whole, not by module."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        backward: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = Anywhere()
    return counter


def finished(device: str) -> float:
    """The time, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_tflops(device: str, dtype: str, seconds: float = 1.0) -> float:
    """TFLOP/s of a large matrix product, the best of those that fit into so many seconds."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    _ = a @ b  # whatever is loaded at the first
    best, end = float("inf"), finished(device) + seconds
    while time.perf_counter() < end:
        started = finished(device)
        a @ b
        best = min(best, finished(device) - started)
    return 2 * n**3 / best / 1e12
