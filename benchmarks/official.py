"""The algorithm of the paper's own code, restated on today's diffusers for its cost: one update, as that code does it.

Two U-Nets, the second a deep copy as the reference; every step calls each of them twice, for the empty prompt and for the prompt, every
call under gradient checkpointing, also where the result is detached; whether step k is detached is drawn anew at every step
(k < a uniform draw from 0 … K: the first step is kept once in K + 1 times), and the KL is a mean over the latents' dimensions. What is here is the cost, not a recommendation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_ctrl import Policy
from diffusers_ctrl.injection import lora_layers
from diffusers_ctrl.rollouts import Batch, Sampler


def reference_unet(denoiser: nn.Module) -> nn.Module:
    """A deep copy with the LoRA bypassed for good."""
    copied = copy.deepcopy(denoiser).requires_grad_(False)
    for layer in lora_layers(copied).values():
        layer.enable_adapters(False)
    return copied


def official_loss(
    policy: Policy,
    reference: nn.Module,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    guidance_scale: float,
    kl_weight: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """−reward + kl_weight · mean-squared difference of the two U-Nets' outputs, truncated at random. The policy has guidance_scale 1."""
    steps = len(sampler.timesteps)
    x, kl = batch.noise, batch.noise.new_zeros(())
    nobody = torch.full_like(batch.labels, float("nan"))

    def tuned(x, t, labels, embeds):
        return policy(x, t, labels, batch.gamma, embeds)

    def base(x, t, embeds):
        return reference(x, t, encoder_hidden_states=embeds, return_dict=False)[0]

    for k in range(steps):
        t = sampler.timesteps[k]
        null = batch.null_embeds
        outputs = [
            checkpoint(tuned, x, t, nobody, null, use_reentrant=False),
            checkpoint(tuned, x, t, batch.labels, batch.prompt_embeds, use_reentrant=False),
            checkpoint(base, x, t, null, use_reentrant=False),
            checkpoint(base, x, t, batch.prompt_embeds, use_reentrant=False),
        ]
        if k < torch.randint(steps + 1, (1,), generator=generator).item():
            outputs = [output.detach() for output in outputs]
        u, c, base_u, base_c = outputs
        output = u + guidance_scale * (c - u)
        kl = kl + (output - base_u - guidance_scale * (base_c - base_u)).square().mean()
        taken = sampler.transition(output, t, x)
        x = taken.mean if taken.is_deterministic else taken.sample(generator)
    return kl_weight * kl - log_likelihood(x, batch.labels).mean()
