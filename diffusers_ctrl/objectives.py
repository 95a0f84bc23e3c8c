"""The objectives: functions of one signature that return a loss whose gradient ascends J.

    J(theta; c, y) = E[ gamma · log p̂(y | x_K) − Σ_k KL_k ],     KL_k = ‖mu_theta − mu_pre‖² / (2 sigma_k²)    (nats, summed)

Write the tuned step as x_{k+1} = mu_pre(x_k) + sigma_k (u_k(x_k) + ε_k), so that KL_k = ½‖u_k‖²: u is a *control*, and J a
stochastic control problem whose optimum samples p_pre(x | c) p̂(y | x)^gamma / Z when x_0 is independent of x_K.

`direct_backprop` (CTRL, arXiv 2406.12120, Algorithm 2) holds the ε fixed and differentiates J through the sampler. J is
linear in the KL_k, so those of a random subset of steps, scaled, give an unbiased gradient without truncation.

`adjoint_matching` (arXiv 2409.08861) needs no graph through the sampler. Let a_k = ∂(−gamma log p̂(x_K))/∂x_k along a trajectory
of the tuned model, but through the *base* steps only (the lean adjoint): a_K = −gamma ∇log p̂(x_K), a_k = (∂mu_pre/∂x_k)ᵀ a_{k+1}.
The optimal control is u_k = −sigma_k E[a_{k+1} | x_k], so regress u_k(x_k) on −sigma_k a_{k+1}. The noise of step k enters
x_{k+1}, hence the index k + 1. Where u = 0 the two gradients agree to rounding on the same noise. On a random subset of steps, scaled, the
regression is unbiased; with a coarse adjoint, solved at the states of that subset alone, it is a per cent off or less on a small random
U-Net, and cheaper. The targets of a trajectory do not depend on theta (`adjoints.py`): several optimizer steps may share them.

`policy_gradient` (PPO, arXiv 1707.06347; for diffusion DDPO, arXiv 2305.13301) needs no gradient of log p̂ at all:

    ∇J = E[ Σ_k ∇log p_theta(x_{k+1} | x_k) · (gamma log p̂ − Σ_{j>k} KL_j − b) − Σ_k ∇KL_k(x_k) ]

with any baseline b that does not depend on the trajectory. KL_k is exact, and only the later ones belong to what step k can change.

Signature: objective(policy, sampler, batch, log_likelihood, generator, **options) -> (loss, metrics), where
log_likelihood(x_K, labels) -> (B,) nats is differentiable (but for policy_gradient), and metrics are floats: reward, kl, objective (= gamma·reward − kl).
Loss and metrics are means over the rows of the batch, so that those of its parts, weighted by their sizes, make those of the whole. All random
numbers from `generator` are rows' own; what is drawn once for a whole batch (`random_steps`) is given as an option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from .adjoints import Targets, differentiable, final_adjoint, solved
from .experience import Experience, LogLikelihood, checked, collect
from .paths import StepLosses, backwards, gradients, parts, scales_losses, walk
from .policy import Policy
from .randomness import RandomSource
from .rollouts import Batch, Sampler, base_transition, both_transitions, rollout, tuned_transition
from .transitions import sum_but_first


Metrics = dict[str, float]


def _metrics(reward: torch.Tensor, kl: torch.Tensor, batch: Batch) -> Metrics:
    reward, kl = reward.detach().double(), kl.detach().double()
    return {
        "reward": reward.mean().item(),
        "kl": kl.mean().item(),
        "objective": (batch.gamma.double() * reward - kl).mean().item(),
    }


def _nats(batch: Batch) -> torch.Tensor:
    """A zero for each row, of single precision at least."""
    return torch.zeros(len(batch), dtype=torch.promote_types(batch.noise.dtype, torch.float32), device=batch.noise.device)


def direct_backprop(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource = None,
    *,
    truncation: int | None = None,
    kl_steps: list[int] | None = None,
    gradient_batch_size: int | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """−J by the path-wise gradient, through all steps or through the last `truncation` steps only (drawn once a batch: the same
    steps for reward and KL). Truncation is biased: it cannot see what early steps do to the KL of later ones.

    With the policy's `checkpointing` the trajectory is taken without a graph and gone through backwards, each step computed again when
    its turn comes: memory does not grow with K. (Under float16 autocast, whose gradients are scaled, calls are checkpointed instead.)

    Args:
        truncation: how many of the last steps have a graph; all by default.
        kl_steps: the noisy steps (0 … N−1) whose KL is counted, all by default, scaled to stand for all. With `random_steps` loss and
            gradient are unbiased, the reward's path is whole, and the base is called at these steps only. Not with `truncation`.
        gradient_batch_size: with `checkpointing`, how many trajectories a call that is differentiated has, all by default.
    """
    if truncation is not None and kl_steps is not None:
        raise ValueError(
            f"kl_steps are of the whole trajectory: leave them out with truncation = {truncation}, or the other way round."
        )
    recomputes = policy.checkpointing and not scales_losses(batch.noise)
    if gradient_batch_size is not None and not recomputes:
        raise ValueError(
            f"gradient_batch_size = {gradient_batch_size} needs checkpointing and no float16 autocast: the whole trajectory is one graph else."
        )
    steps = len(sampler.timesteps)
    priced = sampler.noisy_steps if kl_steps is None else [sampler.noisy_steps[i] for i in kl_steps]
    least = steps - sampler.noisy_steps[-1]  # the last steps may have no noise, and then nothing to tune
    if truncation is not None and not least <= truncation <= steps:
        raise ValueError(f"truncation must be between {least} and the number of steps, {steps}; got {truncation}.")
    if recomputes:
        return _recomputed_backprop(
            policy, sampler, batch, log_likelihood, generator, truncation or steps, priced, gradient_batch_size
        )
    trajectory = rollout(policy, sampler, batch, generator, grad_steps=truncation or steps, priced=priced)
    kl = trajectory.kl * (len(sampler.noisy_steps) / len(priced))
    reward = differentiable(checked(log_likelihood(trajectory.sample, batch.labels)), "direct_backprop")
    loss = (kl - batch.gamma.to(reward) * reward).mean()
    return loss, _metrics(reward, kl, batch)


def _recomputed_backprop(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource,
    grad_steps: int,
    priced: Sequence[int],
    at_a_time: int | None,
) -> tuple[torch.Tensor, Metrics]:
    """The same loss and gradient, a_k = ∂(−J)/∂x_k carried backwards: a_k = (∂x_{k+1}/∂x_k)ᵀ a_{k+1} + ∂KL_k/∂x_k, on fixed noise.

    priced: the steps k whose KL is counted, scaled to stand for all. at_a_time: rows of a call that is differentiated.
    """
    path = walk(policy, sampler, batch, generator)
    adjoint, reward = final_adjoint(path.sample, batch, log_likelihood, "direct_backprop")
    losses, kl = StepLosses(policy, path.sample), _nats(batch)
    first, scale = len(sampler.timesteps) - grad_steps, len(sampler.noisy_steps) / len(priced)

    def back(k: int, rows: slice, x: torch.Tensor, following: torch.Tensor, adjoint: torch.Tensor) -> list[torch.Tensor]:
        """Takes these rows' gradients at step k; [adjoint_k], or nothing at the first step."""
        own, x = batch[rows], x.detach().requires_grad_(k > first)  # before the first of them nothing is differentiated
        with torch.enable_grad():
            if k not in sampler.noisy_steps:
                return gradients([base_transition(policy, sampler, own, k, x).mean], [x], [adjoint]) if k > first else []
            step = (policy, sampler, own, k, x)
            taken, base = both_transitions(*step) if k in priced else (tuned_transition(*step), None)
            noise = ((following - taken.mean) / taken.std).detach()
            outputs, weights = [taken.sample(noise=noise)], [adjoint]
            if base is not None:
                step_kl = scale * taken.kl(base)
                outputs, weights = [step_kl, *outputs], [torch.ones_like(step_kl), *weights]
                kl[rows] += step_kl.detach()
        inputs = [*losses.roots, x] if k > first else losses.roots
        found = gradients(outputs, inputs, weights)
        adjoints = [found.pop()] if k > first else []
        losses.take(kl.new_zeros(()), found)
        return adjoints

    with policy.uncheckpointed():
        for k, x, following in backwards(policy, sampler, batch, path):
            if k < first:
                break
            solved_rows = []
            for rows in parts(len(batch), at_a_time):
                solved_rows += back(k, rows, x[rows], following[rows], adjoint[rows])
            adjoint = torch.cat(solved_rows) if solved_rows else adjoint
    losses.take(kl.sum() - (batch.gamma.to(reward) * reward).sum(), [])
    return losses.total() / len(batch), _metrics(reward, kl, batch)


def random_steps(
    sampler: Sampler, count: int, generator: torch.Generator | None = None, name: str = "num_regression_steps"
) -> list[int]:
    """A random subset of the noisy steps, by their numbers 0 … N−1, in random order: each step is in it with probability count / N.

    Evenly spread (a systematic sample: every N/count-th from a random start), so that the steps stand for all with less noise, and
    none is far from the next.
    """
    total = len(sampler.noisy_steps)
    if not 1 <= count <= total:
        raise ValueError(f"{name} must be between 1 and the number of noisy steps, {total}; got {count}.")
    device = generator.device if generator is not None else "cpu"
    start = torch.rand((), generator=generator, device=device).item()
    order = torch.randperm(count, generator=generator, device=device).tolist()
    return [min(int((start + i) * total / count), total - 1) for i in order]


def adjoint_matching(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource = None,
    *,
    targets: Targets | None = None,
    steps: list[int] | None = None,
    coarse: bool = False,
    gradient_batch_size: int | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """Regression of the control on −sigma_k · adjoint[k+1]; memory does not grow with the number of steps regressed on.

    The gradient of each step is taken on the way back, so that memory does not grow with K (under float16 autocast it does, but for the
    policy's `checkpointing`). The way back ends at the earliest step that is regressed on.

    Args:
        targets: of trajectories to learn from, which an earlier policy may have drawn; fresh ones if None.
        steps: which noisy steps (0 … N−1) to regress on, all by default; the loss is scaled to stand for all. With `random_steps`, and
            without `coarse`, it is an unbiased estimate of Σ_k ½‖u_k + sigma_k adjoint_{k+1}‖², averaged over the batch. Targets must have them.
        coarse: solve the adjoint of fresh trajectories at the x_{k+1} of these steps only (adjoints.py): biased, benchmarks/one_gradient.py
            says how much. With all steps it is the same.
        gradient_batch_size: how many trajectories a call that is differentiated has, all by default. Same gradient, less memory (but for
            float16 autocast, where all graphs are kept): the trajectories are still drawn all at once. `targets` have their own parts.
    """
    noisy = sampler.noisy_steps
    chosen = noisy if steps is None else [noisy[i] for i in steps]
    if targets is None:
        found, reward = solved(policy, sampler, batch, log_likelihood, generator, chosen, coarse, gradient_batch_size)
    else:
        found, reward = [target for target in targets.steps if target[0] in chosen], targets.reward
    scale = len(noisy) / len(chosen)
    losses, kl = StepLosses(policy, batch.noise), _nats(batch)
    for k, rows, x, base, next_adjoint, answers in found:
        with losses.step(), nullcontext() if answers is None else policy.known(answers):
            taken = tuned_transition(policy, sampler, batch[rows], k, x)
            control = (taken.mean - base.mean) / taken.std.detach()
            residual = control + taken.std.detach() * next_adjoint
            losses.add(scale * sum_but_first(residual.square()).sum() / (2 * len(batch)))
        kl[rows] += scale * sum_but_first(control.detach().square()) / 2
    return losses.total(), _metrics(reward, kl, batch)


def policy_gradient(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: RandomSource = None,
    *,
    clip_range: float = 0.2,
    experience: Experience | None = None,
    steps: list[int] | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """−J's likelihood-ratio gradient, for any scorer: log_likelihood is called without a graph.

    Args:
        clip_range: PPO's; the ratio of a step's density to what it was at collection gains nothing beyond 1 ± clip_range.
        experience: trajectories to learn from; fresh ones, without a baseline, if None.
        steps: which noisy steps (0 … N−1) this call learns from, all by default; the loss is scaled to stand for all.
    """
    if experience is None:
        experience = collect(policy, sampler, batch, log_likelihood, generator)
    noisy = sampler.noisy_steps
    steps = list(range(len(noisy))) if steps is None else steps
    losses = StepLosses(policy, batch.noise)
    for i in steps:
        with losses.step():
            taken = tuned_transition(policy, sampler, batch, noisy[i], experience.states[i])
            # far beyond the clipping range the ratio's size no longer matters, only that it stays finite
            ratio = taken.log_ratio(experience.taken[i], experience.following[i]).clamp(-20, 20).exp()
            advantage = experience.advantages[i].to(ratio)
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
            losses.add((taken.kl(experience.base[i]) - gain).mean())
    return losses.total() * len(noisy) / len(steps), _metrics(experience.reward, experience.kl.sum(0), batch)


OBJECTIVES: dict[str, Callable[..., tuple[torch.Tensor, Metrics]]] = {
    "direct_backprop": direct_backprop,
    "adjoint_matching": adjoint_matching,
    "policy_gradient": policy_gradient,
}
