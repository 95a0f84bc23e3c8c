"""How a run fares, measured on one fixed set of noise and labels: J and its best, the labels' KL, and what should alarm a person.

The rows are the same at every measurement: the same labels, prompts, gammas and random numbers. What differs between two measurements is
then the model, and the difference of two J has a much smaller error than either. log Z does not depend on the model, so the best J is
the smallest gap log Z − J, and that, not the reward, is what tells the better of two adapters: a model that draws caricatures of a
label has a high reward and a large gap.

The base is measured on the same rows before the first update, and the model held against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import processes
from .estimates import path_objectives
from .particles import effective_sample_size
from .policy import Policy
from .randomness import TrajectoryNoise, batch_seeds
from .rollouts import Choice, Environment, rollout


@dataclass(frozen=True)
class Measurement:
    """A fixed set of tuned trajectories, float64, on the CPU.

    label_rows: (N,) which label. gamma, log_likelihood, kl, log_ratio: (N,); nats but for gamma. spread: (N/2,) of rows 2i and 2i + 1, which
    share label, prompt and gamma: half their squared distance a dimension, in the model's own space; its mean is the variance.
    """

    label_rows: torch.Tensor
    gamma: torch.Tensor
    log_likelihood: torch.Tensor
    kl: torch.Tensor
    log_ratio: torch.Tensor
    spread: torch.Tensor

    @property
    def objectives(self) -> torch.Tensor:
        """(N,) nats; their mean is J, see `path_objectives`."""
        rows = [(self.label_rows == row).nonzero().flatten() for row in self.label_rows.unique()]
        return path_objectives(self.gamma * self.log_likelihood, self.kl, self.log_ratio, rows)

    @property
    def is_finite(self) -> bool:
        return all(bool(values.isfinite().all()) for values in (self.log_likelihood, self.kl, self.log_ratio))


def _rows(environment: Environment, count: int, gammas: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels', prompts' rows and gammas of about `count` trajectories, every label as often; pairs of rows share all three."""
    labels = len(environment.labels)
    pairs = max(1, round(count / (2 * labels)))
    pair = torch.arange(pairs).repeat_interleave(2).repeat(labels)
    label_rows = torch.arange(labels).repeat_interleave(2 * pairs)
    # shifted from label to label, so that few pairs a label still run through the prompts and gammas
    place = pair + label_rows * pairs
    gamma = torch.tensor(list(gammas), dtype=torch.float64)[(place // environment.num_prompts) % len(gammas)]
    return label_rows, place % environment.num_prompts, gamma


@torch.no_grad()
def measure(
    policy: Policy,
    environment: Environment,
    count: int,
    *,
    seed: int,
    gammas: Sequence[float],
    batch_size: int,
    tuned: bool = True,
) -> Measurement:
    """Draws the fixed trajectories with the model as it is, shared out over the processes; of each only six numbers stay in memory.

    Args:
        count: about how many trajectories; every label gets the same even number, at least two.
        seed: of their random numbers, which do not depend on the batch size or the number of processes.
        gammas: which exponents the rows run through. batch_size: so many trajectories at a time, but two at least.
        tuned: False for the base.
    """
    label_rows, prompt_rows, gamma = _rows(environment, count, gammas)
    device, pairs = environment.labels.device, len(label_rows) // 2
    _, *seeds = batch_seeds(len(label_rows), seed, 4_000_003)
    share, size, parts = processes.share(pairs), max(1, batch_size // 2), []
    for start in range(0, -(-pairs // processes.count()), size):
        part = share[start : start + size]
        some = part or range(1)  # all processes call the model equally often, as one whose weights are dealt out needs
        rows = torch.arange(2 * some.start, 2 * some.stop)
        noise = TrajectoryNoise([seeds[row] for row in rows.tolist()], device)
        choice = Choice(label_rows[rows], prompt_rows[rows], environment.labels[label_rows[rows]], gamma[rows].float().to(device))
        batch = environment.start(choice, noise)
        trajectory = rollout(policy, environment.sampler, batch, noise, tuned=tuned)
        ends = trajectory.sample.double().flatten(1)
        spread = (ends[::2] - ends[1::2]).square().mean(dim=1).repeat_interleave(2) / 2
        log_likelihood = environment.log_likelihood(trajectory.sample, batch.labels)
        found = torch.stack([v.double().cpu() for v in (log_likelihood, trajectory.kl, trajectory.log_ratio, spread)], dim=1)
        parts.append(found[: 2 * len(part)])
    log_likelihood, kl, log_ratio, spread = processes.gather_rows(torch.cat(parts)).T.contiguous()
    return Measurement(label_rows, gamma, log_likelihood, kl, log_ratio, spread[::2].clone())


def mean_and_error(values: torch.Tensor, label_rows: torch.Tensor) -> tuple[float, float]:
    """Mean of the labels' means of (N,) values, and its standard error (stratified)."""
    groups = [values[label_rows == row] for row in label_rows.unique()]
    variance = sum(group.var().item() / len(group) for group in groups)
    return sum(group.mean().item() for group in groups) / len(groups), math.sqrt(variance) / len(groups)


def summary(now: Measurement, names: Sequence[str], log_partition: float | None = None) -> dict[str, float]:
    """A row of the history: eval_objective, eval_kl, eval_reward, eval_gap with standard errors, eval_ess (of each label's rows, as a
    fraction, the smallest), eval_spread, and by_label.{label}.objective, kl, reward."""
    out: dict[str, float] = {}
    for name, values in (("objective", now.objectives), ("kl", now.kl), ("reward", now.log_likelihood)):
        out[f"eval_{name}"], out[f"eval_{name}_se"] = mean_and_error(values, now.label_rows)
        for label, mean in zip(names, by_label(values, now.label_rows, len(names)), strict=True):
            out[f"by_label.{label}.{name}"] = mean
    if log_partition is not None:
        out["eval_gap"], out["eval_gap_se"] = log_partition - out["eval_objective"], out["eval_objective_se"]
    out["eval_ess"] = min(ess_fractions(now))
    out["eval_spread"] = now.spread.mean().item()
    return out


def ess_fractions(now: Measurement) -> list[float]:
    """Effective sample size of the importance weights p̂^gamma · p_pre/p_theta among each label's n rows, over n: from 1/n to 1."""
    log_weights = now.gamma * now.log_likelihood - now.log_ratio
    groups = [log_weights[now.label_rows == row] for row in now.label_rows.unique()]
    return [(effective_sample_size(group) / len(group)).item() for group in groups]


def clearly_better(one: torch.Tensor, other: torch.Tensor, label_rows: torch.Tensor, errors: float = 2.0) -> bool:
    """Whether the mean of `one`, (N,) J of the fixed rows, is above that of `other` by so many standard errors of their difference."""
    difference, error = mean_and_error(one - other, label_rows)
    return difference > errors * error


def by_label(values: torch.Tensor, rows: torch.Tensor, labels: int) -> list[float]:
    """Mean of the values of each label's rows."""
    return [values[rows == row].mean().item() for row in range(labels)]


KL_FACTOR, FLOOR = 3.0, 1.0  # of what the exact law has; nats
LOW_ESS = 2.0


def alarms(
    now: Measurement,
    base: Mapping[str, list[float]],
    best: torch.Tensor | None,
    names: Sequence[str],
    config: Any,
    log_z: float | None,
) -> dict[str, str]:
    """What a person should look at, by cause: one sentence each, naming the settings to change.

    Args:
        now: this measurement. base: "spread" and "ess" of the base, by label. best: (N,) J of the best so far. names: of the labels.
        config: with `kl_alarm` and `diversity_alarm`, see `CTRLConfig`. log_z: estimate of log Z in nats, where there is one.
    """
    found = {}
    labels = len(names)
    kls = by_label(now.kl, now.label_rows, labels)
    rewards = by_label(now.gamma * now.log_likelihood, now.label_rows, labels)
    spreads, ess = by_label(now.spread, now.label_rows[::2], labels), ess_fractions(now)
    for row, name in enumerate(names):
        rows = int((now.label_rows == row).sum())
        limit = config.kl_alarm
        if limit is None:
            # E_exact[gamma·log p̂] − log Z is the KL of the exact law to the base
            limit = math.inf if log_z is None else KL_FACTOR * max(FLOOR, rewards[row] - log_z)
        if kls[row] > limit:
            found[f"kl {name}"] = (
                f"the KL of label {name!r} is {kls[row]:.2f} nats, above {limit:.2f}: the model goes further from the base than the "
                "label asks (kl_alarm). Lower learning_rate and label_learning_rate, or gamma; kl_limit ends such a run."
            )
        if spreads[row] < config.diversity_alarm * base["spread"][row]:
            found[f"diversity {name}"] = (
                f"samples of label {name!r} vary {spreads[row] / base['spread'][row]:.2f} times as much as the base's, less than "
                f"{config.diversity_alarm:g} (diversity_alarm): the model collapses onto few of them. Lower gamma, or learning_rate and "
                "label_learning_rate."
            )
        if rows * ess[row] < LOW_ESS and ess[row] < base["ess"][row] / 2:
            found[f"ess {name}"] = (
                f"the effective sample size of label {name!r} is {rows * ess[row]:.1f} of {rows}, and the base's own was "
                f"{rows * base['ess'][row]:.1f}: the model has left the law that it is to learn. Lower learning_rate and "
                "label_learning_rate, or gamma."
            )
    if best is not None and clearly_better(best, now.objectives, now.label_rows, errors=3.0):
        fall = mean_and_error(best - now.objectives, now.label_rows)[0]
        if fall > FLOOR:
            found["objective"] = (
                f"J has fallen {fall:.2f} nats below its best, so the gap has grown by as much: a reward that still rises is hacked, not "
                "learned. Lower learning_rate and label_learning_rate, or max_grad_norm; keep_best ends with the best weights."
            )
    return found


class Monitor:
    """What the measurements of a run add up to; all of it is in the run's checkpoints.

    base: "spread" and "ess" of the base, by label. best: update, objective and its error, of the largest J; best_values, last_values: (N,)
    J of the rows there and at the last measurement. measured_at: update of the last one. worst: label with the largest KL then, and
    that KL. warned: causes that were already told.
    """

    def __init__(self, names: Sequence[str], config: Any) -> None:
        self.names, self.config = list(names), config
        self.base: dict[str, list[float]] | None = None
        self.best: dict[str, float] | None = None
        self.best_values: torch.Tensor | None = None
        self.last_values: torch.Tensor | None = None
        self.label_rows: torch.Tensor | None = None
        self.measured_at = 0
        self.worst: tuple[str, float] | None = None
        self.warned: list[str] = []

    def is_due(self, update: int) -> bool:
        """Whether a measurement belongs after this update."""
        every = self.config.eval_every
        return bool(every) and update // every > self.measured_at // every

    def take_base(self, base: Measurement) -> None:
        spread = by_label(base.spread, base.label_rows[::2], len(self.names))
        self.base = {"spread": spread, "ess": ess_fractions(base)}

    def take(self, now: Measurement, update: int, log_z: float | None) -> tuple[dict[str, float], list[str]]:
        """Takes a measurement of the model in. Returns a row for the history, and sentences that have to be told."""
        self.measured_at = update
        if not now.is_finite:
            return {}, [f"The measurement at update {update} met a NaN or infinite number and does not count."]
        if self.best_values is not None and len(self.best_values) != len(now.objectives):
            self.best = self.best_values = None  # of other rows: eval_trajectories was changed
        told = []
        for cause, sentence in alarms(now, self.base, self.best_values, self.names, self.config, log_z).items():
            if cause not in self.warned:
                self.warned.append(cause)
                told.append(f"Alarm at update {update}: {sentence}")
        row = summary(now, self.names, log_z)
        self.last_values, self.label_rows = now.objectives, now.label_rows
        kls = by_label(now.kl, now.label_rows, len(self.names))
        self.worst = max(zip(self.names, kls, strict=True), key=lambda pair: pair[1])
        if self.best is None or row["eval_objective"] > self.best["objective"]:
            named = {name: row[f"eval_{name}"] for name in ("objective", "objective_se", "gap", "gap_se") if f"eval_{name}" in row}
            self.best, self.best_values = {"update": update, **named}, now.objectives
        return row, told

    def over_limit(self) -> str | None:
        """A sentence where a label's KL is above `kl_limit`."""
        limit = self.config.kl_limit
        if limit is None or self.worst is None or self.worst[1] <= limit:
            return None
        return (
            f"Training stopped after update {self.measured_at}: the KL of label {self.worst[0]!r} is {self.worst[1]:.2f} nats, above "
            f"kl_limit = {limit:g}. The weights are kept as they are."
        )

    def better_than_last(self) -> int | None:
        """The update of the best J, where it is above the last one by more than twice the error of their difference."""
        if self.best is None or self.last_values is None or self.best["update"] == self.measured_at:
            return None
        # twice: it is the best of several, chosen on the very rows that judge it
        return int(self.best["update"]) if clearly_better(self.best_values, self.last_values, self.label_rows) else None

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("base", "best", "measured_at", "worst", "warned")}

    def tensors(self) -> dict[str, torch.Tensor]:
        values = {name: getattr(self, name) for name in ("best_values", "last_values", "label_rows")}
        return {name: value for name, value in values.items() if value is not None}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state` and `tensors`."""
        for name, value in {**state, **tensors}.items():
            setattr(self, name, value)
