"""The most likely of n base samples, by the same classifier; n base samples an output."""

from __future__ import annotations

import torch

from .base import Base, Likelihood


def sample(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    weight: int = 8,
) -> torch.Tensor:
    """weight: n."""
    best, score = None, torch.full((len(prompts),), -torch.inf)
    for _ in range(int(weight)):
        images = base.draw(prompts, generator)
        with torch.no_grad():
            found = likelihood(images, label.expand(len(images), -1))
        better = found > score
        score = torch.where(better, found, score)
        best = images if best is None else torch.where(better.view(-1, 1, 1, 1), images, best)
    return best
