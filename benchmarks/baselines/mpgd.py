"""Manifold preserving guided diffusion (He et al., ICLR 2024, arXiv 2311.16424): the denoised estimate is moved, the denoiser is not
differentiated."""

from __future__ import annotations

import torch

from .base import Base, Likelihood
from .guided import guided


def sample(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    weight: float = 1.0,
) -> torch.Tensor:
    return guided(base, likelihood, label, prompts, generator, mu=weight)
