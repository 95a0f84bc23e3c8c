"""DRaFT-K / AlignProp without KL (arXiv 2309.17400, 2310.03739): log p̂ differentiated through the last K steps of the sampler. The one
number that holds it near the base is how many updates it gets: `weight`, which is given to `fit`."""

from __future__ import annotations

import torch

from diffusers_ctrl import LabelSpace, Policy
from diffusers_ctrl.rollouts import rollout

from .base import Base, Likelihood
from .tuned import batch_of, new_policy, sample, updates_of


__all__ = ["fit", "sample"]


def fit(
    base: Base,
    space: LabelSpace,
    likelihood: Likelihood,
    labels: torch.Tensor,
    *,
    weight: int = 100,
    last_steps: int = 4,
    batch_size: int = 32,
    rate: float = 5e-3,
    seed: int = 0,
) -> Policy:
    """labels: (M, A), drawn uniformly, as are the prompts. The sampler's last step has no noise, belongs to the base and does not count."""
    policy, generator = new_policy(base, space, seed), torch.Generator().manual_seed(seed)
    for step in updates_of(policy, int(weight), rate, "DRaFT"):
        chosen = labels[torch.randint(len(labels), (batch_size,), generator=generator)]
        prompts = torch.randint(len(base.conditions), (batch_size,), generator=generator)
        batch = batch_of(base, chosen, prompts, generator)
        found = rollout(policy, base.sampler, batch, generator, grad_steps=last_steps + 1, reference=False)
        step(-likelihood(base.decode(found.sample), chosen).mean())
    return policy
