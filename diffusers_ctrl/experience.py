"""Trajectories that are learned from several times, and what each of their steps was worth: the first half of policy_gradient.

The worth of the step from x_k to x_{k+1} is what came after it, gamma·log p̂(y | x_K) − Σ_{j>k} KL_j, less a baseline that may depend on
x_k but not on the step. Of the noise in it a lookahead takes out what x_k already tells: the denoiser's own estimate of the clean
sample is scored for every label, and V_k(x_k) is a running linear regression of the worth on these scores. No network, no gradient of
the scorer. With generalised advantage estimation (arXiv 1506.02438) V also stands in for the far end of the trajectory, at the price
of a bias where V is wrong: gae_lambda = 1 has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .policy import Policy
from .rollouts import Batch, Sampler, base_transition, tuned_transition
from .transitions import Transition


LogLikelihood = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NonFiniteError(ValueError):
    """A reward or a loss is NaN or infinite."""


def checked(reward: torch.Tensor) -> torch.Tensor:
    """The same (B,) rewards. Raises NonFiniteError naming the rows where one is NaN or infinite."""
    if not torch.isfinite(reward).all():
        bad = (~torch.isfinite(reward)).nonzero().flatten().tolist()
        raise NonFiniteError(f"the log-likelihood is NaN or infinite for {len(bad)} of {len(reward)} samples (rows {bad[:8]})")
    return reward


@dataclass(frozen=True)
class Experience:
    """Trajectories taken once and learned from several times. Nothing in it has a graph.

    states: the x_k of the N noisy steps, (B, C, *) each; following: x_{k+1}. taken, base: N transitions of the tuned model (as it was
    then) and of the base at these states. advantages: (N, B) nats; reward, kl: (B,) nats.
    """

    states: tuple[torch.Tensor, ...]
    following: tuple[torch.Tensor, ...]
    taken: tuple[Transition, ...]
    base: tuple[Transition, ...]
    advantages: torch.Tensor
    reward: torch.Tensor
    kl: torch.Tensor


class Baseline:
    """What is still to come at x_k, on average: a running mean for each (label, prompt, step), and with features also a regression.

    A pair that was never seen takes the mean of the batch at that step. The regression, one for each (step, label), explains what the
    running mean leaves over; its moments fade with `decay` a batch, and a small ridge keeps it finite.

    Args:
        labels, prompts, steps: how many there are.
        features: how many features a state has, 0 for none.
        decay: of the running mean a sample, of the regression's moments a batch.
        gather: concatenates a tensor over the processes along its first dimension, so that all keep the same baseline.
    """

    RIDGE = 0.02  # of the mean squared feature

    def __init__(
        self,
        labels: int,
        prompts: int,
        steps: int,
        features: int = 0,
        decay: float = 0.9,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.gather = gather or (lambda tensor: tensor)
        self.mean = torch.zeros(labels, prompts, steps, dtype=torch.float64)
        self.seen = torch.zeros(labels, prompts, dtype=torch.float64)
        self.moments = torch.zeros(steps, labels, features, features + 1, dtype=torch.float64)
        self.decay = decay

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that it has learned, by name."""
        return {name: getattr(self, name).clone() for name in ("mean", "seen", "moments")}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value.clone())

    def values(self, returns: torch.Tensor, batch: Batch, features: torch.Tensor | None = None) -> torch.Tensor:
        """(steps, B) expected returns from what earlier batches taught; then this batch is taken in.

        returns: (steps, B) nats. features: (steps, B, F), if the baseline has any.
        """
        device, prompts = returns.device, self.mean.shape[1]
        rows, columns = batch.label_rows.cpu(), batch.prompts.cpu()
        values = returns.detach().double().cpu()
        expected = self._means(values, rows, columns)
        if features is None:
            features = values.new_zeros(*values.shape, 0)
        features = features.detach().double().cpu()
        leftover = values - expected
        expected = expected + self._regression(features, rows)
        # what was seen on all processes, in one order
        everything = self.gather(torch.cat([values, leftover, features.permute(0, 2, 1).flatten(0, 1)]).T.contiguous().to(device))
        pairs = self.gather((rows * prompts + columns).to(device)).cpu()
        values, leftover, features = everything.cpu().T.split([len(values), len(values), features.shape[0] * features.shape[2]])
        for pair in pairs.unique().tolist():
            chosen, row, column = pairs == pair, pair // prompts, pair % prompts
            new = values[:, chosen].mean(dim=1)
            weight = 1 - self.decay ** chosen.sum().item() if self.seen[row, column] else 1.0
            self.mean[row, column] += weight * (new - self.mean[row, column])
            self.seen[row, column] = 1.0
        features = features.unflatten(0, (len(values), -1)).transpose(1, 2)
        both = torch.cat([features, leftover.unsqueeze(2)], dim=2)
        for label in range(len(self.mean)):
            chosen = pairs // prompts == label
            products = features[:, chosen].transpose(1, 2) @ both[:, chosen]
            self.moments[:, label] = self.decay * self.moments[:, label] + products
        return expected.to(returns)

    def _means(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        known = self.seen[rows, columns] > 0
        return torch.where(known, self.mean[rows, columns].T, values.mean(dim=1, keepdim=True))

    def _regression(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count = features.shape[2]
        if count == 0:
            return features.new_zeros(features.shape[:2])
        square, product = self.moments[..., :count], self.moments[..., count:]
        size = square.diagonal(dim1=2, dim2=3).mean(dim=2)[..., None, None]
        ridge = torch.where(size > 0, self.RIDGE * size, 1.0) * torch.eye(count, dtype=square.dtype)
        weights = torch.linalg.solve(square + ridge, product).squeeze(3)  # zero where nothing was seen yet
        return (features * weights[:, rows]).sum(dim=2)


def _features(scores: torch.Tensor) -> torch.Tensor:
    """(B, M) nats -> (B, 1 + M): a one, and the scores in units of 10 nats."""
    # beyond some nats of disbelief a score says no more of where the trajectory is going, and would only strain the regression;
    # nor may a scorer that fails on an unfinished sample stop the training (on a finished one it does)
    scores = scores.double().nan_to_num(nan=0.0).clamp(-30, 30) / 10
    return torch.cat([torch.ones_like(scores[:, :1]), scores], dim=1)


@torch.no_grad()
def collect(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    log_likelihood: LogLikelihood,
    generator: torch.Generator | None = None,
    baseline: Baseline | None = None,
    *,
    lookahead: Callable[[torch.Tensor], torch.Tensor] | None = None,
    gae_lambda: float = 1.0,
) -> Experience:
    """Trajectories of the tuned model, with what each step was worth: gamma·log p̂ minus the KL of the later steps, minus a baseline.

    Args:
        lookahead: log p̂ of every label at a clean sample, (B, C, *) -> (B, M) nats: the features of the baseline's regression, taken
            at the denoised estimate of each step; None for no features.
        gae_lambda: 1 takes what came after a step as it was; below, the more of it is taken from the baseline's expectation.
    """
    x, states, following, tuned_steps, base_steps, kls, features = batch.noise, [], [], [], [], [], []
    for k in range(len(sampler.timesteps)):
        base = base_transition(policy, sampler, batch, k, x)
        if k not in sampler.noisy_steps:
            x = base.mean
            continue
        taken = tuned_transition(policy, sampler, batch, k, x)
        if lookahead is not None:
            if taken.denoised is None:
                name = type(sampler.scheduler).__name__
                raise ValueError(f"The transition of {name} gives no denoised estimate, which lookahead_critic needs.")
            features.append(_features(lookahead(taken.denoised)))
        states.append(x)
        x = taken.sample(generator)
        following.append(x)
        # kept for all steps: without the estimates, which nothing reads again
        tuned_steps.append(replace(taken, denoised=None))
        base_steps.append(replace(base, denoised=None))
        kls.append(taken.kl(base))
    reward = checked(log_likelihood(x, batch.labels))
    kl = torch.stack(kls)
    final = batch.gamma.to(reward) * reward
    later = kl.flip(0).cumsum(0).flip(0) - kl
    advantages = final - later
    if baseline is not None:
        expected = baseline.values(advantages, batch, torch.stack(features) if features else None)
        advantages = _lambda_returns(final, kl, expected, gae_lambda) - expected
    return Experience(tuple(states), tuple(following), tuple(tuned_steps), tuple(base_steps), advantages, reward, kl.sum(0))


def _lambda_returns(final: torch.Tensor, kl: torch.Tensor, expected: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """(N, B): after step k came −KL_{k+1} and then, in part, what actually followed, in part what the next state led to expect."""
    returns = [final]
    for k in reversed(range(len(kl) - 1)):
        returns.append((1 - gae_lambda) * expected[k + 1] + gae_lambda * returns[-1] - kl[k + 1])
    return torch.stack(returns[::-1])
