"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) by fine-tuning on the labelled images alone: the denoising loss with the
label dropped at random, and at inference null + weight · (labelled − null). Knows each image's prompt, which ours does not."""

from __future__ import annotations

from functools import partial

import torch

from diffusers_ctrl import LabelSpace, Policy

from . import tuned
from .base import Base, Labelled, noised
from .tuned import new_policy, updates_of


sample = partial(tuned.sample, base_ends=False)  # it is trained at every noise level


def fit(
    base: Base,
    space: LabelSpace,
    data: Labelled,
    *,
    updates: int = 1000,
    batch_size: int = 64,
    rate: float = 5e-3,
    dropout: float = 0.2,
    seed: int = 0,
) -> Policy:
    policy, generator = new_policy(base, space, seed), torch.Generator().manual_seed(seed)
    for step in updates_of(policy, updates, rate, "cfg fine-tuning"):
        times = torch.randint(1000, (batch_size,), generator=generator)
        rows = torch.randint(len(data.latents), (batch_size,), generator=generator)
        x, target = noised(base, data.latents[rows], times, generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < dropout
        labels = torch.where(dropped, torch.nan, data.labels[rows])
        with policy.merged():
            output = policy(x, times, labels, None, base.conditions[data.prompts[rows]])
            step((output - target).square().mean())
    return policy
