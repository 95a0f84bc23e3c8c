"""Training-free guidance (Ye et al., NeurIPS 2024, arXiv 2409.15761), which holds FreeDoM, universal guidance and the two before: both
gradients, and every step done twice. weight scales both."""

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
    recurrences: int = 2,
    iterations: int = 2,
) -> torch.Tensor:
    settings = {"recurrences": recurrences, "iterations": iterations}
    return guided(base, likelihood, label, prompts, generator, rho=weight, mu=0.25 * weight, **settings)
