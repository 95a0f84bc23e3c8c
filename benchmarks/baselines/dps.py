"""Diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687), the paper's first baseline: the gradient of log p̂ of the
denoised estimate, through the denoiser. weight = 1 is the first-order posterior step."""

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
    return guided(base, likelihood, label, prompts, generator, rho=weight)
