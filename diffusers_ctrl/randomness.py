"""Random numbers that do not depend on how a batch is cut into micro-batches and dealt out to processes.

What is drawn once for a batch (labels, prompts, subsets of steps) comes from one generator that all processes seed alike. The normal
numbers of trajectory i come from a generator of its own, seeded by i and by what the whole batch is seeded by. There is no state to save.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor


def batch_seeds(size: int, *entropy: int) -> list[int]:
    """1 + `size` seeds: of what a batch draws once, and of each of its trajectories. The first ones do not depend on `size`."""
    words = np.random.SeedSequence(entropy).generate_state(1 + size, np.uint64)
    return (words >> np.uint64(1)).tolist()


class TrajectoryNoise:
    """Standard normal numbers (B, *) in which row i depends only on `seeds[i]` and on what was drawn before.

    To be used where a `torch.Generator` is. A call for each row and step would cost as much as a tiny model's step, so small states are
    drawn some steps ahead; one generator, seeded anew for each row and for each time, is much cheaper than one kept for each row.
    """

    AHEAD, NUMBERS = 32, 2**14  # at most so many steps, and so many numbers of a row beyond one step's
    STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a row's blocks: odd, so that none comes twice

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seeds = list(seeds)
        self._generator, self._blocks = torch.Generator(self.device), 0
        self._ahead: list[torch.Tensor] = []
        self._used = 0  # of the block that comes next, where this is a copy taken in the middle of one

    def copy(self) -> TrajectoryNoise:
        """The same numbers from here on. It holds none of them: a block that was begun is drawn again."""
        found = TrajectoryNoise(self.seeds, self.device)
        found._blocks, found._used = self._blocks, self._used
        if self._ahead:
            found._blocks -= 1
            found._used = self._steps(self._ahead[-1].shape[1:]) - len(self._ahead)
        return found

    def _steps(self, shape: Sequence[int]) -> int:
        """Of one block, for states of this shape."""
        return max(1, min(self.AHEAD, self.NUMBERS // max(1, torch.Size(shape).numel())))

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """(B, *) on the device. Raises ValueError where B is not the number of seeds."""
        size, *rest = shape
        if size != len(self.seeds):
            raise ValueError(f"There are {len(self.seeds)} trajectories, and noise was asked for {size}.")
        if not self._ahead or self._ahead[-1].shape != torch.Size(shape) or self._ahead[-1].dtype != dtype:
            steps = self._steps(rest)
            block = torch.empty(size, steps, *rest, dtype=dtype, device=self.device)
            for row, seed in zip(block, self.seeds, strict=True):
                self._generator.manual_seed((seed + self._blocks * self.STRIDE) % 2**63)
                row.normal_(generator=self._generator)
            self._blocks += 1
            self._ahead = list(block.unbind(1))[self._used :][::-1]
            self._used = 0
        return self._ahead.pop().contiguous()


RandomSource = torch.Generator | TrajectoryNoise | None


def standard_normal(shape: Sequence[int], source: RandomSource, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """N(0, 1) of this shape; from a generator as the pipelines draw it."""
    if isinstance(source, TrajectoryNoise):
        return source.normal(shape, dtype).to(device)
    return randn_tensor(tuple(shape), generator=source, device=device, dtype=dtype)


def seed_global_generators(*entropy: int) -> None:
    """Seeds Python's, NumPy's and torch's own generators, which nothing here draws from, but a scorer or a denoiser may."""
    first, second, third = batch_seeds(2, *entropy)
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.manual_seed(third)


@contextlib.contextmanager
def global_generators_kept() -> Iterator[None]:
    """Leaves Python's, NumPy's and torch's own generators as they were, whatever happens within."""
    before, numbers = random.getstate(), np.random.get_state()
    devices = (
        [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    )  # by default all of the machine's, with a warning
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)
