"""What the baselines that fine-tune share: a copy of the denoiser with LoRA and a label embedding, as our own adapters have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from tqdm.auto import tqdm

from diffusers_ctrl import LabelSpace, Policy
from diffusers_ctrl.bases import denoiser_of
from diffusers_ctrl.rollouts import Batch

from .base import Base, Likelihood, drawn


TARGETS = ["conv1", "conv2", "time_emb_proj", "to_v", "to_out.0"]  # as in training/configs/digits_stroke.yaml


def new_policy(base: Base, space: LabelSpace, seed: int, rank: int = 16) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(copy.deepcopy(denoiser_of(base.pipe)[1]), label_space=space, lora_rank=rank, lora_targets=TARGETS)


def batch_of(base: Base, labels: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> Batch:
    return Batch(base.start(len(prompts), generator), labels, torch.ones(len(prompts)), base.conditions[prompts])


def updates_of(policy: Policy, updates: int, rate: float, description: str) -> Iterator[Callable[[torch.Tensor], None]]:
    """For each update, a function that takes the loss and steps AdamW on LoRA (rate) and label encoder (3 · rate); cosine to zero."""
    groups = policy.trainable_parameters()
    parameters = [{"params": groups["lora"], "lr": rate}, {"params": groups["label_encoder"], "lr": 3 * rate}]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups.values() for p in group], 1.0)
        optimizer.step()

    for _ in tqdm(range(updates), desc=description, unit="update", leave=False):
        yield step
        schedule.step()


@torch.no_grad()
def sample(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    policy: Policy,
    weight: float = 1.0,
    base_ends: bool = True,
) -> torch.Tensor:
    """Images of the tuned model; with a weight, guidance on the label alone: null + weight · (labelled − null), both with the prompt.

    base_ends: whether the base takes the steps without noise, as it does where RL trains.
    """
    labels, nobody = label.expand(len(prompts), -1), torch.full((len(prompts), len(label)), torch.nan)
    x, conditions = base.start(len(prompts), generator), base.conditions[prompts]
    with policy.merged():
        for k in range(base.steps):
            t = base.sampler.timesteps[k]
            base.calls["forward"] += len(x)
            if base_ends and k not in base.sampler.noisy_steps:
                output = policy.reference(x, t, conditions)
            else:
                output = policy(x, t, labels, None, conditions)
                if weight != 1.0:
                    output = torch.lerp(policy(x, t, nobody, None, conditions), output, weight)
                    base.calls["forward"] += len(x)
            step = base.sampler.transition(output, t, x)
            base.price(step.mean, x, k, prompts)
            x = drawn(step, generator)
    return base.decode(x)
