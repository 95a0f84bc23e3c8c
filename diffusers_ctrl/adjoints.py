"""The lean adjoint along trajectories of the tuned model: the targets of adjoint_matching (arXiv 2409.08861).

a_K = −gamma ∇log p̂(x_K), a_k = (∂mu_pre/∂x_k)ᵀ a_{k+1}: once a trajectory is drawn, nothing here depends on the policy any more. So the
targets of some of its steps can be kept, and several optimizer steps learn from them, as PPO learns from its trajectories; what is
out of date in the later ones is only which states the policy would visit.

Solving the adjoint at every step is about half of an update's time. A coarse adjoint is solved at the states of the regressed steps alone; it
is no longer that of the sampler, but of one with fewer steps along the same trajectory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .experience import LogLikelihood, checked
from .paths import Path, gradients, parts, states_at, walk
from .policy import Answer, Policy
from .randomness import RandomSource
from .rollouts import Batch, Sampler, base_transition
from .transitions import Transition


class Target(NamedTuple):
    """What the control of step k is to be regressed on, for some rows of a batch. Nothing in it has a graph.

    x: x_k (n, C, *). base: its transition there. adjoint: adjoint_{k+1} (n, C, *). answers: the denoiser's at x_k, where the tuned model is made
    of them, that is where a control head is alone; else None.
    """

    k: int
    rows: slice
    x: torch.Tensor
    base: Transition
    adjoint: torch.Tensor
    answers: list[Answer] | None


@dataclass(frozen=True)
class Targets:
    """What the controls of some steps are to be regressed on.

    steps: from the last to the first. reward: log p̂(y | x_K), (B,) nats.
    """

    steps: tuple[Target, ...]
    reward: torch.Tensor


def differentiable(reward: torch.Tensor, name: str) -> torch.Tensor:
    """The same reward. Raises ValueError where it has no gradient, naming the objective that needs it."""
    if not reward.requires_grad:
        raise ValueError(f"{name} needs the gradient of the log-likelihood, and this scorer has none: use policy_gradient.")
    return reward


def final_adjoint(
    sample: torch.Tensor, batch: Batch, log_likelihood: LogLikelihood, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂(−gamma log p̂)/∂x_K, (B, C, *), and log p̂, (B,) nats."""
    with torch.enable_grad():
        x = sample.detach().requires_grad_()
        reward = differentiable(checked(log_likelihood(x, batch.labels)), name)
        (adjoint,) = gradients([-(batch.gamma.to(reward) * reward).sum()], [x], [None])
    return adjoint, reward.detach()


def lean_adjoint(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    path: Path,
    adjoint: torch.Tensor,
    chosen: Collection[int],
    solved_at: Collection[int],
    at_a_time: int | None = None,
) -> Iterator[Target]:
    """Solves the lean adjoint backwards along a trajectory, from adjoint = ∂(−gamma log p̂)/∂x_K, for the steps k of `chosen`.

    adjoint_k = ∂(−gamma log p̂)/∂x_k through the base. It is solved at the states x_k, k of `solved_at`, which has k + 1 for every chosen
    k + 1 < K. From one of these to the next the clean sample that the base sees at the first is held (`Sampler.held`): on a memoryless
    scheduler, the step of a sampler that has no states in between. The base is called with `at_a_time` rows, all by default.

    Yields:
        Targets, from the last chosen step to the first.
    """
    known = len(sampler.timesteps)  # the adjoint is known of x_known
    for k, states in states_at(policy, sampler, batch, path, {*chosen, *solved_at}):
        solved_rows = []
        # with as many rows as the tuned model's call will have, differentiated or not: so both round alike, and where nothing has been learned
        # yet the control is zero, not the rounding of two kernels
        for rows in parts(len(batch), at_a_time):
            x, following = states[rows].detach(), adjoint[rows]
            if k in solved_at:
                with policy.uncheckpointed(), policy.noted() as answers, torch.enable_grad():
                    base = base_transition(policy, sampler, batch[rows], k, x.requires_grad_())
                    solved_rows += gradients([sampler.held(base, k, known)], [x], [following])
            else:
                with policy.noted() as answers, torch.no_grad():
                    base = base_transition(policy, sampler, batch[rows], k, x)
            if k in chosen:
                kept = [(output.detach(), time) for output, time in answers] if policy.shares_base else None
                yield Target(k, rows, x.detach(), Transition(base.mean.detach(), base.std.detach()), following, kept)
        if k in solved_at:
            adjoint, known = torch.cat(solved_rows), k


def solved(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource,
    chosen: Sequence[int],
    coarse: bool = False,
    at_a_time: int | None = None,
) -> tuple[Iterator[Target], torch.Tensor]:
    """The targets of the `chosen` steps k on fresh trajectories, from the last to the first as they are asked for; and log p̂, (B,) nats.

    The adjoint is solved at every state down to the earliest that a chosen step asks for; with `coarse` only at those that one asks for.
    at_a_time: how many rows the base is differentiated for at a time, all by default; each part is a target of its own.
    """
    steps = len(sampler.timesteps)
    solved_at = {k + 1 for k in chosen if k + 1 < steps} if coarse else set(range(min(chosen) + 1, steps))
    path = walk(policy, sampler, batch, generator, needed={*chosen, *solved_at})
    adjoint, reward = final_adjoint(path.sample, batch, log_likelihood, "adjoint_matching")
    return lean_adjoint(policy, sampler, batch, path, adjoint, chosen, solved_at, at_a_time), reward


def collect_targets(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource = None,
    *,
    steps: Sequence[int],
    coarse: bool = False,
    at_a_time: int | None = None,
) -> Targets:
    """The targets of these noisy steps (0 … N−1) on fresh trajectories, to learn from several times. coarse, at_a_time: see `solved`."""
    chosen = [sampler.noisy_steps[i] for i in steps]
    targets, reward = solved(policy, sampler, batch, log_likelihood, generator, chosen, coarse, at_a_time)
    return Targets(tuple(targets), reward)
