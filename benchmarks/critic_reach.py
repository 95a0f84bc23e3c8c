"""How near to the exact law the warm start's critic steers, and what a head regressed on it keeps of that: before any reinforcement learning, on the digits.

    python benchmarks/critic_reach.py [--only VARIANT …] [--seeds 0 …] [--smoke]      # experiments/critic_reach.yaml

Each variant has base trajectories of its own number, a critic fitted to them (diffusers_ctrl/critics.py), and, where `head` is set, a control head
regressed on it. `surrogate: 0` gives the critic the state itself, standardised, in place of the base's estimate; otherwise the number is how many
updates of the surrogate go with one of the critic's. Steered: every sample is moved at each step by the critic's gradient, nothing learned. Gaps are
log Z, from base samples, less J of `outputs` fresh trajectories a label, the same noise for all variants. CPU seconds are of a shared core: not for
comparing.

Writes results/critic_reach/VARIANT-seedN.json.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from digits_runs import Labels, base_samples, cached_classifier, config_of, make_trainer
from experiment import arguments, clock, run_all
from time_to_gap import measure, point_of
from torch import nn

from diffusers_ctrl import CTRLTrainer, critics, surrogates
from diffusers_ctrl.evaluation import Samples, exact_law
from diffusers_ctrl.rollouts import base_transition


class Itself(surrogates.Surrogate):
    """The state in place of the estimate."""

    def forward(self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return (x - self.middle[level]) / self.width[level]


def no_surrogate(
    states: torch.Tensor, denoised: torch.Tensor, prompts: torch.Tensor, num_prompts: int, *_: Any
) -> tuple[nn.Module, float]:
    """In place of `fit_surrogate`."""
    return Itself(states, denoised, num_prompts).to(states.device).requires_grad_(False), math.nan


@torch.no_grad()
def steered(trainer: CTRLTrainer, critic: critics.Critic, per_label: int, seed: int) -> Samples:
    """Samples that the critic's gradient moves at each step."""
    environment, generator, found = trainer.environment, torch.Generator().manual_seed(seed), []
    rows = torch.arange(len(environment.labels)).repeat_interleave(per_label)
    prompts = torch.arange(len(rows)) % environment.num_prompts
    for label_rows, prompt_rows in zip(rows.split(300), prompts.split(300), strict=True):
        batch = replace(environment.batch(label_rows, prompt_rows, generator), label_rows=label_rows, prompts=prompt_rows)
        x, kl, log_ratio = batch.noise, torch.zeros(len(batch)), torch.zeros(len(batch))
        for k in range(len(environment.sampler.timesteps)):
            base = base_transition(trainer.policy, environment.sampler, batch, k, x)
            if base.is_deterministic:
                x = base.mean
                continue
            control, noise = critics.critic_control(critic, base, k, batch), torch.randn(x.shape, generator=generator)
            kl += control.square().flatten(1).sum(dim=1) / 2
            log_ratio += (control.square() / 2 + control * noise).flatten(1).sum(dim=1)
            x = base.mean + base.std * (control + noise)
        images = environment.decode(x)
        found.append((images, label_rows, prompt_rows, environment.score(images, batch.labels), kl, log_ratio))
    return Samples(*(torch.cat(column) for column in zip(*found, strict=True)))


def run(spec: dict[str, Any], name: str, seed: int, cache: Path) -> dict[str, Any]:
    settings, labels = {**spec["common"], **spec["variants"][name]}, Labels(spec["attribute"], spec["num_labels"], seed)
    classifier, _ = cached_classifier(spec["base"], labels, cache, spec["epochs"])
    trainer = make_trainer(spec["base"], classifier, config_of(spec["common"], settings, seed, cache / "run"))
    environment, generator, seconds = trainer.environment, torch.Generator().manual_seed(seed + 7_000_003), {}
    law = exact_law(base_samples(trainer, spec["base_samples"], cache), environment)

    def timed(part: str, started: float) -> None:
        seconds[part] = clock() - started

    started = clock()
    pool = critics.base_pool(trainer.policy, environment, settings["critic_trajectories"], generator)
    timed("base trajectories", started)
    started, updates = clock(), settings["critic_updates"]
    torch.manual_seed(seed)
    changed = {"UPDATES": settings["surrogate"]} if settings["surrogate"] else {"fit_surrogate": no_surrogate}
    with mock.patch.multiple(critics, **changed):
        critic, losses = critics.fit_critic(environment, pool, updates, generator)
    timed("critic", started)
    if not settings["surrogate"]:
        del losses["surrogate_error"]
    out: dict[str, Any] = {"settings": settings, **law, **losses, "steered": []}
    for noise in spec["noise"]:
        point = point_of(steered(trainer, critic, spec["outputs"], noise), environment, law, spec["attribute"])
        out["steered"].append(point)
    if settings["head"]:
        started = clock()
        out["head_nats_off"] = critics.learn_control(trainer.policy, environment, critic, pool, updates, generator)
        timed("head", started)
        out["head"] = [measure(trainer, law, spec["attribute"], spec["outputs"], noise) for noise in spec["noise"]]
    return {**out, "outputs": spec["outputs"], "seconds_cpu": seconds}


def line(record: dict[str, Any]) -> str:
    parts = []
    for what in ("steered", "head"):
        points = record.get(what, [])
        parts += [f"{what}: gap {p['gap']:.2f} ± {p['gap_se']:.2f}, accuracy {p['accuracy']:.3f}" for p in points]
    return f"loss {record['critic_loss']:.4f}; " + "; ".join(parts)


def main(given: list[str] | None = None) -> None:
    args = arguments("critic_reach", __doc__, given)
    run_all(args, args.spec["variants"], lambda name, seed: run(args.spec, name, seed, args.cache), line)


if __name__ == "__main__":
    main()
