"""The algorithm of the paper's own code (zhaoyl18/CTRL, condition_main_compressibility.py), restated on today's diffusers: one update, as it does it.

Two U-Nets, the second a deep copy as the reference; every step calls each of them twice, for the empty prompt and for the prompt, every
call under gradient checkpointing, also where the result is detached; whether step k is detached is drawn anew at every step
(k < a uniform draw from 0 … K: the first step is kept once in K + 1 times), and the KL is a mean over the latents' dimensions, where nats are
the sum: a KL weight of the number of dimensions, at a reward coefficient of 1, would be nats. What is here is a peer, not a recommendation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_ctrl import Policy
from diffusers_ctrl.conditions import Condition
from diffusers_ctrl.injection import lora_layers
from diffusers_ctrl.objectives import Metrics
from diffusers_ctrl.randomness import RandomSource
from diffusers_ctrl.replay import first
from diffusers_ctrl.rollouts import Batch, Sampler


LogLikelihood = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reference_unet(denoiser: nn.Module) -> nn.Module:
    """A deep copy with the LoRA bypassed for good."""
    copied = copy.deepcopy(denoiser).requires_grad_(False)
    for layer in lora_layers(copied).values():
        layer.enable_adapters(False)
    return copied


def official_terms(
    policy: Policy,
    reference: nn.Module,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    guidance_scale: float,
    generator: torch.Generator,
    noise: RandomSource = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p̂ (B,) in nats, and the KL over the batch, a mean over dimensions; truncated at random. The policy has guidance_scale 1.

    generator: on the CPU, decides what is truncated, and is the steps' noise too where there is no `noise`.

    Two liberties. At guidance_scale 1 the empty prompt cancels out, and is not called: that code would, at twice the cost. A step without
    noise, where its KL would be divided by zero, is taken with the reference, as the library does it.
    """
    steps = len(sampler.timesteps)
    x, kl = batch.noise, batch.noise.new_zeros(())
    halves = [(batch.labels, batch.prompt_embeds)]
    if guidance_scale != 1:
        halves.insert(0, (torch.full_like(batch.labels, float("nan")), batch.null_embeds))

    def tuned(x, t, labels, embeds):
        return policy(x, t, labels, batch.gamma, embeds)

    def base(x, t, embeds):
        if isinstance(embeds, Condition):
            return embeds.output(lambda args, kwargs, _: first(reference(*args, **kwargs)), x, t, None)
        return reference(x, t, encoder_hidden_states=embeds, return_dict=False)[0]

    def guided(outputs: list[torch.Tensor]) -> torch.Tensor:
        return outputs[0] + guidance_scale * (outputs[1] - outputs[0]) if len(outputs) > 1 else outputs[0]

    for k in range(steps):
        t = sampler.timesteps[k]
        outputs = [checkpoint(tuned, x, t, labels, embeds, use_reentrant=False) for labels, embeds in halves]
        outputs += [checkpoint(base, x, t, embeds, use_reentrant=False) for _, embeds in halves]
        if k < torch.randint(steps + 1, (1,), generator=generator).item():
            outputs = [output.detach() for output in outputs]
        taken, own = (sampler.transition(guided(part), t, x) for part in (outputs[: len(halves)], outputs[len(halves) :]))
        if taken.is_deterministic:
            x = own.mean
            continue
        kl = kl + taken.kl(own).mean() / x[0].numel()
        x = taken.sample(generator if noise is None else noise)
    return log_likelihood(x, batch.labels), kl


def official_loss(
    policy: Policy,
    reference: nn.Module,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    guidance_scale: float,
    kl_weight: float,
    generator: torch.Generator,
    noise: RandomSource = None,
) -> torch.Tensor:
    """−reward + kl_weight · KL of `official_terms`. The authors' kl_weight is 0.1 (0.01 beside a reward coefficient of 0.1)."""
    reward, kl = official_terms(policy, reference, sampler, batch, log_likelihood, guidance_scale, generator, noise)
    return kl_weight * kl - reward.mean()


def official_objective(guidance_scale: float, kl_weight: float, seed: int) -> Callable[..., tuple[torch.Tensor, Metrics]]:
    """The same as an objective of CTRLTrainer (see objectives.py); metrics are in nats."""
    generator, copies = torch.Generator().manual_seed(seed), []

    def objective(
        policy: Policy, sampler: Sampler, batch: Batch, log_likelihood: LogLikelihood, noise: RandomSource = None
    ) -> tuple[torch.Tensor, Metrics]:
        if not copies:
            copies.append(reference_unet(policy.denoiser))
        reward, kl = official_terms(policy, copies[0], sampler, batch, log_likelihood, guidance_scale, generator)
        found = {"reward": reward.mean().item(), "kl": kl.item() * batch.noise[0].numel()}
        loss = kl_weight * kl - reward.mean()
        if (
            not loss.requires_grad
        ):  # all steps happened to be detached, as on few steps they may: nothing is learned from this batch
            loss = loss + 0 * next(policy.label_encoder.parameters()).sum()
        return loss, {**found, "objective": found["reward"] - found["kl"]}

    return objective
