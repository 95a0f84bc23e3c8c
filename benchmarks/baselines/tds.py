"""The twisted diffusion sampler (Wu et al., NeurIPS 2023, arXiv 2306.17775), from azula: sequential Monte Carlo whose proposal is DPS's.

The particles of a run share a prompt, so each prompt that is asked for has a run of its own, of `particles` for each output asked of it, of
which the outputs are drawn. weight is the power of p̂.
"""

from __future__ import annotations

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance.tds import TDSSampler
from azula.noise import Schedule

from .base import Base, Likelihood


class GridSchedule(Schedule):
    """Time k/K from the end is the sampler's own grid: azula's steps then fall on the base's timesteps."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def index(self, t: torch.Tensor) -> int:
        return self.base.steps - round(float(t) * self.base.steps)

    def __call__(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = self.base.levels(self.index(t))
        return torch.tensor(alpha), torch.tensor(max(sigma, 1e-4))  # azula divides by the last level's noise, which is zero


class BaseDenoiser(Denoiser):
    """The pipeline as azula's denoiser, of one prompt."""

    def __init__(self, base: Base, prompt: int) -> None:
        super().__init__()
        self.base, self.prompt, self.schedule = base, prompt, GridSchedule(base)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **kwargs) -> DiracPosterior:
        prompts = torch.full((len(x_t),), self.prompt)
        return DiracPosterior(mean=self.base.clean(x_t, self.schedule.index(t), prompts))


def sample(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    weight: float = 1.0,
    particles: int = 4,
) -> torch.Tensor:
    images: list[torch.Tensor | None] = [None] * len(prompts)

    def twist(clean: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return weight * likelihood(base.decode(clean), label.expand(len(clean), -1))

    with torch.random.fork_rng(devices=[]):  # azula draws from torch's own generator
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        for prompt in prompts.unique().tolist():
            rows = (prompts == prompt).nonzero().flatten().tolist()
            sampler = TDSSampler(BaseDenoiser(base, prompt), twist, steps=base.steps, silent=True)
            found = sampler(base.start(particles * len(rows), generator))
            with torch.no_grad():
                found = base.decode(found[torch.randperm(len(found))[: len(rows)]])
            for row, image in zip(rows, found, strict=True):
                images[row] = image
    return torch.stack(images)
