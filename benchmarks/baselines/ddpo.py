"""DDPO (Black et al., ICLR 2024, arXiv 2305.13301): PPO on the sampler's steps with the final reward log p̂, normalised for each label, and
no KL. `weight`, given to `fit`, is how many batches of trajectories it gets."""

from __future__ import annotations

import torch

from diffusers_ctrl import LabelSpace, Policy
from diffusers_ctrl.rollouts import rollout, tuned_transition

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
    batch_size: int = 48,
    minibatches: int = 4,
    clip_range: float = 0.1,
    rate: float = 5e-3,
    seed: int = 0,
) -> Policy:
    """labels: (M, A), as frequent as each other; prompts are drawn uniformly. A minibatch is a share of the steps of all trajectories."""
    policy, generator = new_policy(base, space, seed), torch.Generator().manual_seed(seed)
    noisy = torch.tensor(base.sampler.noisy_steps)
    parts = min(minibatches, len(noisy))
    steps = updates_of(policy, int(weight) * parts, rate, "DDPO")
    for _ in range(int(weight)):
        rows = torch.arange(batch_size) % len(labels)
        batch = batch_of(base, labels[rows], torch.randint(len(base.conditions), (batch_size,), generator=generator), generator)
        with torch.no_grad():
            found = rollout(policy, base.sampler, batch, generator, reference=False)
            reward = likelihood(base.decode(found.sample), batch.labels)
            before = [tuned_transition(policy, base.sampler, batch, k, found.states[k]) for k in noisy.tolist()]
        advantage = torch.empty_like(reward)
        for row in range(len(labels)):
            own = reward[rows == row]
            advantage[rows == row] = (own - own.mean()) / (own.std() + 1e-4)
        order = torch.randperm(len(noisy), generator=generator)
        for part in order.tensor_split(parts):
            loss = torch.zeros(())
            for i in part.tolist():
                k = int(noisy[i])
                taken = tuned_transition(policy, base.sampler, batch, k, found.states[k])
                ratio = taken.log_ratio(before[i], found.states[k + 1]).clamp(-20, 20).exp().float()
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
                loss = loss - gain.mean() / len(part)
            next(steps)(loss)
    return policy
