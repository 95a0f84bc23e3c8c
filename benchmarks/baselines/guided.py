"""Training-free guidance by a classifier of clean images, in the unified form of TFG (Ye et al., NeurIPS 2024, arXiv 2409.15761).

At each step k, with the denoised estimate x̂ of the state x:

- variance guidance: the next state moves by rho · std² · ∇_x log p̂(y | decode(x̂(x))), through the denoiser (DPS, arXiv 2209.14687: rho only);
- mean guidance: x̂ itself moves by mu · sigma² · ∇_x̂ log p̂(y | decode(x̂)), `iterations` times, past the denoiser (MPGD, arXiv 2311.16424: mu
  only), sigma² being the noise of the level;
- recurrence: the step is taken back to its level with fresh noise and done again, `recurrences` times in all (FreeDoM, arXiv 2303.09833).

TFG's smoothing of the classifier by added noise is left out. With rho = 1 the first is the first-order posterior step of classifier guidance
(Dhariwal and Nichol, arXiv 2105.05233) for the classifier that looks at x̂.
"""

from __future__ import annotations

import torch

from .base import Base, Likelihood, drawn


def guided(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    rho: float = 0.0,
    mu: float = 0.0,
    recurrences: int = 1,
    iterations: int = 1,
) -> torch.Tensor:
    labels = label.expand(len(prompts), -1)
    x = base.start(len(prompts), generator)

    def slope(at: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(likelihood(base.decode(clean), labels).sum(), at)[0]

    for k in range(base.steps):
        (alpha, sigma), (next_alpha, _) = base.levels(k), base.levels(k + 1)
        last = k == base.steps - 1
        for round_ in range(1 if last else recurrences):
            with torch.set_grad_enabled(rho > 0):
                at = x.detach().requires_grad_(rho > 0)
                clean = base.clean(at, k, prompts)
                push = rho * slope(at, clean) if rho > 0 else torch.zeros_like(x)
            clean = clean.detach()
            for _ in range(iterations if mu > 0 else 0):
                with torch.enable_grad():
                    moved = clean.requires_grad_()
                    clean = (moved + mu * sigma**2 * slope(moved, moved)).detach()
            step = base.step(x, clean, k)
            shift = torch.as_tensor(step.std) ** 2 * push
            if recurrences == 1:
                base.price(step.mean + shift, x, k, prompts)
            following = drawn(step, generator) + shift
            if round_ < recurrences - 1 and not last:
                ratio = (alpha / next_alpha) ** 2
                noise = torch.randn(x.shape, generator=generator)
                x = ratio**0.5 * following + (1 - ratio) ** 0.5 * noise
        x = following
    with torch.no_grad():
        return base.decode(x)
