"""How good an adapter is, in nats and in accuracy, each with its standard error.

The certificate. For a prompt c and a label y, log Z(c, y) = log E_pre[p̂(y | x)^gamma]. A trajectory of the tuned model has the
importance weight w = p̂^gamma · p_pre/p_theta (of its path), and E_theta[w] = Z whatever the tuned model is. So log-mean-exp of
log w estimates log Z, and J = E_theta[log w] is below it by Jensen: the gap log Z − J is KL(path law ‖ exact path law), which is
at least the KL between the laws of the images. Every figure is a mean over the (prompt, label) pairs, equally weighted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from . import processes
from .accuracy import LabelOracle, agreement, hits, measure
from .estimates import path_objectives
from .particles import effective_sample_size
from .policy import Policy
from .randomness import TrajectoryNoise, batch_seeds, global_generators_kept, seed_global_generators
from .rollouts import Environment, rollout


LOW_ESS = 10.0
PromptOracle = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Samples:
    """Trajectories' ends and costs, on the CPU.

    images: (N, C, H, W) in [0, 1], or the states where there is no decoder; None where they were not kept, or are another process's.
    label_rows, prompt_rows: (N,) which label and prompt.
    log_likelihood: (N,) nats, for the row's own label; kl, log_ratio: (N,) nats, 0 for base samples.
    measured: (N, A), what an oracle found on the images; obeyed: (N,), 1 where the prompt was obeyed. Both are filled in by `judge`.
    """

    images: torch.Tensor | None
    label_rows: torch.Tensor
    prompt_rows: torch.Tensor
    log_likelihood: torch.Tensor
    kl: torch.Tensor
    log_ratio: torch.Tensor
    measured: torch.Tensor | None = None
    obeyed: torch.Tensor | None = None


def take(samples: Samples, rows: torch.Tensor) -> Samples:
    """These rows, by index or by mask."""
    return Samples(**{name: None if value is None else value[rows] for name, value in vars(samples).items()})


def judge(
    samples: Samples, environment: Environment, oracle: LabelOracle | None = None, prompt_oracle: PromptOracle | None = None
) -> Samples:
    """The samples with what the oracles say of them, where they were not yet asked and their images are here.

    Args:
        oracle: images -> true attributes, see accuracy.py. prompt_oracle: images, prompt rows -> (N,) bool. Never seen in training.
    """
    if samples.images is None:
        return samples
    if oracle is not None and samples.measured is None:
        samples = replace(samples, measured=measure(oracle, samples.images, environment.labels))
    if prompt_oracle is not None and samples.obeyed is None:
        samples = replace(samples, obeyed=prompt_oracle(samples.images, samples.prompt_rows).double().cpu())
    return samples


@torch.no_grad()
def draw_samples(
    policy: Policy,
    environment: Environment,
    per_label: int,
    generator: torch.Generator | None = None,
    *,
    tuned: bool = True,
    batch_size: int = 100,
    keep_images: bool = True,
    progress: bool = True,
    description: str = "sampling",
    distributed: bool = False,
) -> Samples:
    """`per_label` samples of each label, running through the prompts; from the tuned model or from the base.

    One number is taken from `generator`; sample i depends on it and on i only, whatever the batch size and the number of processes.

    Args:
        batch_size: so many trajectories at a time; without `keep_images` only five numbers of each stay in memory.
        distributed: all processes call this, and each draws its share. The images are then the main process's, None on the others; all
            have the numbers.
    """
    labels, prompts = len(environment.labels), environment.num_prompts
    label_rows = torch.arange(labels).repeat_interleave(per_label)
    prompt_rows = torch.arange(per_label).remainder(prompts).repeat(labels)
    device = "cpu" if generator is None else generator.device
    number = torch.randint(2**62, (), generator=generator, device=device).item()
    if distributed:
        number = processes.on_main(lambda: number)
    _, *seeds = batch_seeds(len(label_rows), number)
    total = len(label_rows)
    own = [range(total)[at : at + batch_size] for at in range(0, total, batch_size)]
    if distributed:
        own = processes.rounds(total, batch_size)
    columns: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    shares = processes.count() if distributed else 1
    bar = tqdm(total=total, desc=description, unit="image", disable=not progress or (distributed and processes.index() > 0))
    with global_generators_kept():
        # for a scorer that draws: other numbers on other processes
        seed_global_generators(number, processes.index() if distributed else 0)
        for part in own:
            rows = torch.tensor(part or [0])  # all must call a base that is dealt out to them; a row that is nobody's is not kept
            noise = TrajectoryNoise([seeds[row] for row in rows.tolist()], environment.labels.device)
            batch = environment.batch(label_rows[rows], prompt_rows[rows], noise)
            trajectory = rollout(policy, environment.sampler, batch, noise, tuned=tuned)
            images = environment.decode(trajectory.sample)
            log_likelihood = environment.score(images, batch.labels)
            kept = images.float() if keep_images else images.new_zeros(0)
            for column, values in zip(columns, (kept, log_likelihood, trajectory.kl, trajectory.log_ratio), strict=True):
                column.append((values if column is columns[0] else values.double()).cpu()[: len(part)])
            bar.update(min(shares * len(part), total - bar.n))
    bar.close()
    images, *numbers = (torch.cat(column) for column in columns)
    if distributed:
        images = processes.gather_rows(images, to_main=True) if keep_images else None
        numbers = [processes.gather_rows(values) for values in numbers]
    return Samples(images if keep_images else None, label_rows, prompt_rows, *numbers)


def _groups(samples: Samples) -> list[torch.Tensor]:
    """Rows of each (label, prompt) pair."""
    key = samples.label_rows * (int(samples.prompt_rows.max()) + 1) + samples.prompt_rows
    return [(key == k).nonzero().flatten() for k in key.unique()]


def _peers_of_lone(groups: list[torch.Tensor]) -> torch.Tensor:
    """Rows whose spread stands for that of a pair of which there is one sample only: all such, or all there are for a single one.

    It has the pairs' own differences in it: an error that is too large is honest, and none at all would not be.
    """
    lone = [rows for rows in groups if len(rows) == 1]
    return torch.cat(lone if len(lone) > 1 else groups)


def _variance(values: torch.Tensor) -> float:
    """Of one of these, from the spread of all; 0 where there is but one."""
    return values.double().var().item() if len(values) > 1 else 0.0


def _mean_and_se(values: torch.Tensor, groups: list[torch.Tensor]) -> tuple[float, float]:
    """Equally weighted mean of the groups' means, and its standard error (stratified)."""
    means = torch.stack([values[rows].mean() for rows in groups])
    of_one = _variance(values[_peers_of_lone(groups)])
    variance = sum(_variance(values[rows]) / len(rows) if len(rows) > 1 else of_one for rows in groups)
    return means.mean().item(), math.sqrt(variance) / len(groups)


@dataclass(frozen=True)
class Certificate:
    """J, log Z, gap (nats, with standard errors) and the effective sample size of the importance weights, smallest pair's and sum."""

    objective: float
    objective_se: float
    log_partition: float
    log_partition_se: float
    gap: float
    gap_se: float
    ess: float
    smallest_ess: float

    @property
    def is_lower_bound(self) -> bool:
        """True where the weights are too uneven for log Z to be trusted: the gap is then only a lower bound."""
        return self.smallest_ess < LOW_ESS


BOOTSTRAPS = 400


def certificate(samples: Samples, gamma: float, rows: torch.Tensor | None = None) -> Certificate:
    """The gap to the exact conditional law from tuned trajectories alone, in float64.

    Within each (label, prompt) pair: J is the mean of `path_objectives`, log Z the log-mean-exp of the log-weights, plus the delta method's
    correction ½(1/ESS − 1/n) for the bias of the logarithm of a mean. Standard errors are the spread of J, log Z and their difference
    over bootstraps of each pair's trajectories, or, of a pair that has one only, of all such pairs'. Trajectories must be independent.
    """
    groups = _groups(samples)
    # of all rows, so that the labels' figures have the mean of the whole
    j = path_objectives(gamma * samples.log_likelihood, samples.kl, samples.log_ratio, groups)
    if rows is not None:
        kept = set(rows.tolist())
        groups = [g for g in groups if int(g[0]) in kept]
    log_w = gamma * samples.log_likelihood - samples.log_ratio
    generator, lone = torch.Generator().manual_seed(0), _peers_of_lone(groups)
    means, log_zs, ess = [], [], []
    drawn_means, drawn_log_zs = torch.zeros(BOOTSTRAPS, dtype=torch.float64), torch.zeros(BOOTSTRAPS, dtype=torch.float64)
    for group in groups:
        n, pool = len(group), group if len(group) > 1 else lone
        ess.append(effective_sample_size(log_w[group]).item())
        means.append(j[group].mean().item())
        log_zs.append(log_w[group].logsumexp(0).item() - math.log(n) + 0.5 * (1 / ess[-1] - 1 / n))
        # a bootstrap's variance is (n − 1)/n of the sample's: stretched, so that pairs of few trajectories are not flattered
        stretch, chunk = math.sqrt(len(pool) / max(len(pool) - 1, 1)), max(1, 1_000_000 // n)
        # what the draws are about: the pair's own figures, or the mean of those of the pairs of one
        centre_j, centre_w = (means[-1], log_w[group].logsumexp(dim=0)) if n > 1 else (j[pool].mean(), log_w[pool].mean())
        for start in range(0, BOOTSTRAPS, chunk):
            index = torch.randint(len(pool), (min(chunk, BOOTSTRAPS - start), n), generator=generator)
            part = slice(start, start + len(index))
            drawn_means[part] += stretch * (j[pool][index].mean(dim=1) - centre_j)
            drawn_log_zs[part] += stretch * (log_w[pool][index].logsumexp(dim=1) - centre_w)
    count = len(groups)
    objective, log_partition = sum(means) / count, sum(log_zs) / count
    spread = [(values.std() / count).item() for values in (drawn_means, drawn_log_zs, drawn_log_zs - drawn_means)]
    return Certificate(objective, spread[0], log_partition, spread[1], log_partition - objective, spread[2], sum(ess), min(ess))


def certify(
    policy: Policy,
    environment: Environment,
    per_label: int,
    generator: torch.Generator | None = None,
    *,
    batch_size: int = 100,
    progress: bool = True,
    distributed: bool = False,
) -> tuple[Certificate, list[Certificate]]:
    """Draws fresh trajectories of the tuned model and certifies it: over all labels, and for each row of `environment.labels`.

    Only `batch_size` trajectories' states and images are in memory at a time, and five numbers of each that is done. With `distributed`
    each process draws its share, and all get the certificate of all trajectories.

    Raises:
        ValueError: (from `Sampler`, when the environment is made) where there is no certificate: a scheduler without a Gaussian
            step, or a sampler without noise.
    """
    samples = draw_samples(
        policy,
        environment,
        per_label,
        generator,
        batch_size=batch_size,
        keep_images=False,
        progress=progress,
        description="certificate",
        distributed=distributed,
    )
    rows = [(samples.label_rows == row).nonzero().flatten() for row in range(len(environment.labels))]
    return certificate(samples, environment.gamma), [certificate(samples, environment.gamma, row) for row in rows]


def gamma_grid(gamma_range: tuple[float, float], count: int = 4) -> list[float]:
    """`count` values of gamma over a range, both ends included, in equal ratios."""
    low, high = gamma_range
    return [float(f"{low * (high / low) ** (i / (count - 1)):.4g}") for i in range(count)]


@torch.no_grad()
def base_scores(base: Samples, environment: Environment) -> torch.Tensor:
    """log p̂ of every label at every base sample, (M, N) nats, float64: what `exact_law` reweights by, at any gamma."""
    device = environment.labels.device
    return torch.cat([environment.scores(chunk.to(device)) for chunk in base.images.split(256)]).T.double().cpu()


def exact_law(
    base: Samples,
    environment: Environment,
    *,
    scores: torch.Tensor | None = None,
    rows: list[int] | None = None,
) -> dict[str, float]:
    """log Z from base samples, and, where these were judged, what the exact conditional law itself would score: reweighted base samples.

    Every base sample of a prompt serves all labels, with weight p̂(y | x)^gamma. `base_smallest_ess` is the least effective sample size
    of a (prompt, label) pair: under 10, this log Z is doubtful too.

    Args:
        scores: from `base_scores`, where they are at hand. rows: of `environment.labels`, all by default.
    """
    scores = environment.gamma * (base_scores(base, environment) if scores is None else scores)
    chosen = list(range(len(environment.labels))) if rows is None else rows
    labels, prompts = environment.labels[chosen].cpu(), base.prompt_rows.unique()
    pairs = len(prompts) * len(chosen)
    found = base.measured
    ess, log_z, variance, accuracy_variances, parts, lone, lone_hits = [], [], 0.0, [], [], [], []
    for prompt in prompts:
        own = (base.prompt_rows == prompt).nonzero().flatten()
        influence = torch.zeros(len(own), dtype=torch.float64)
        for label, score in zip(labels, scores[chosen][:, own], strict=True):
            weights = (score - score.max()).exp()
            ess.append(effective_sample_size(score).item())
            log_z.append(score.logsumexp(0).item() - math.log(len(own)) + 0.5 * (1 / ess[-1] - 1 / len(own)))
            influence += weights / weights.mean() - 1
            if found is not None:
                share, asked = weights / weights.sum(), label.expand(len(own), -1)
                hit = hits(environment.space, asked, found[own])
                if not hit.isnan().any():
                    if len(own) == 1:
                        lone_hits.append(hit)
                    else:
                        accuracy_variances.append((share * (hit - (share * hit).sum())).square().sum().item())
                parts.append((asked, found[own], share / pairs))
        variance += influence.square().sum().item() / len(own) ** 2
        if len(own) == 1:
            lone.append(scores[chosen][:, own].sum())
    if lone:  # one sample of a prompt says nothing of its spread: that of all such prompts stands for it
        variance += len(lone) * _variance(torch.stack(lone))
    out = {"base_log_partition": sum(log_z) / pairs, "base_log_partition_se": math.sqrt(variance) / pairs}
    out["base_smallest_ess"] = min(ess)
    if found is not None:
        law = agreement(environment.space, *(torch.cat(part) for part in zip(*parts, strict=True)))
        out |= {f"exact_{name}": value for name, value in law.items()}
        if lone_hits:
            accuracy_variances += [_variance(torch.cat(lone_hits))] * len(lone_hits)
        if accuracy_variances:
            out["exact_accuracy_se"] = math.sqrt(sum(accuracy_variances)) / len(accuracy_variances)
    return out


def _scores(samples: Samples, environment: Environment) -> dict[str, float]:
    groups, out = _groups(samples), {}
    if samples.measured is not None:
        asked, found = environment.labels.cpu()[samples.label_rows], samples.measured
        out |= agreement(environment.space, asked, found)
        right = hits(environment.space, asked, found)
        judged = [g for g in groups if not right[g].isnan().any()]
        if judged:
            out["accuracy"], out["accuracy_se"] = _mean_and_se(right, judged)
        generator, draws, lone = torch.Generator().manual_seed(0), {}, _peers_of_lone(groups)
        for _ in range(BOOTSTRAPS // 4):
            pools = [g if len(g) > 1 else lone for g in groups]
            rows = torch.cat([p[torch.randint(len(p), (len(g),), generator=generator)] for p, g in zip(pools, groups, strict=True)])
            for name, value in agreement(environment.space, asked[rows], found[rows]).items():
                draws.setdefault(name, []).append(value)
        out |= {f"{name}_se": torch.tensor(values).std().item() for name, values in draws.items() if f"{name}_se" not in out}
    if samples.obeyed is not None:
        out["prompt_accuracy"], out["prompt_accuracy_se"] = _mean_and_se(samples.obeyed, groups)
    out["log_likelihood"], out["log_likelihood_se"] = _mean_and_se(samples.log_likelihood, groups)
    return out


def _whole(samples: Samples, gamma: float, rows: torch.Tensor | None = None) -> dict[str, float]:
    """The certificate's figures, flat."""
    found = certificate(samples, gamma, rows)
    names = ("objective", "log_partition", "gap")
    out = {key: getattr(found, key) for name in names for key in (name, f"{name}_se")}
    return out | {"ess": found.ess, "smallest_ess": found.smallest_ess, "gap_is_lower_bound": found.is_lower_bound}


def _from_base(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        "gap_from_base": metrics["base_log_partition"] - metrics["objective"],
        "gap_from_base_se": math.hypot(metrics["base_log_partition_se"], metrics["objective_se"]),
    }


def _rows_of(samples: Samples, label_rows: list[int]) -> torch.Tensor:
    """Which samples are of these labels."""
    return torch.isin(samples.label_rows, torch.tensor(label_rows)).nonzero().flatten()


def select(samples: Samples, label_rows: list[int]) -> Samples:
    """The samples of these labels only."""
    return take(samples, _rows_of(samples, label_rows))


def evaluate(
    tuned: Samples,
    base: Samples,
    environment: Environment,
    label_names: Sequence[str],
    *,
    oracle: LabelOracle | None = None,
    prompt_oracle: PromptOracle | None = None,
    scores: torch.Tensor | None = None,
) -> dict[str, Any]:
    """All figures of metrics.json that samples can give.

    Args:
        tuned, base: from `draw_samples`, of the same environment.
        label_names: names of `environment.labels`' rows.
        oracle, prompt_oracle: see `judge`; not asked again about samples that they have judged.
        scores: from `base_scores`, where they are at hand.

    Returns:
        A flat dict: NAME, NAME_se, base_NAME, exact_NAME, by_label.{label}.NAME, `gap_is_lower_bound`, and `gap_from_base`, the gap
        to log Z as the base samples estimate it: the cross-check, and the one to trust where the other is a lower bound. Where the
        labels give different attributes, by_given.{attribute+attribute}.NAME has the same over the labels that give just these.
    """
    gamma = environment.gamma
    tuned, base = (judge(samples, environment, oracle, prompt_oracle) for samples in (tuned, base))
    scores = base_scores(base, environment) if scores is None else scores
    out: dict[str, Any] = _scores(tuned, environment)
    out["kl"], out["kl_se"] = _mean_and_se(tuned.kl, _groups(tuned))
    out |= _whole(tuned, gamma)
    out |= {f"base_{name}": value for name, value in _scores(base, environment).items()}
    out |= exact_law(base, environment, scores=scores)
    out |= _from_base(out)
    for given, rows in _by_given(environment).items():
        part = select(tuned, rows)
        found = _scores(part, environment) | _whole(tuned, gamma, _rows_of(tuned, rows))
        found["kl"], found["kl_se"] = _mean_and_se(part.kl, _groups(part))
        found |= exact_law(base, environment, scores=scores, rows=rows)
        out |= {f"by_given.{given}.{key}": value for key, value in (found | _from_base(found)).items()}
    labels = environment.labels.cpu()
    for row, name in enumerate(label_names):
        rows = (tuned.label_rows == row).nonzero().flatten()
        part = certificate(tuned, gamma, rows)
        values = {"kl": tuned.kl[rows].mean().item(), "log_likelihood": tuned.log_likelihood[rows].mean().item()}
        values |= {k: getattr(part, k) for k in ("objective", "log_partition", "gap", "gap_se", "ess", "smallest_ess")}
        values["gap_is_lower_bound"] = part.is_lower_bound
        if tuned.measured is not None:
            agreed = agreement(environment.space, labels[row].expand(len(rows), -1), tuned.measured[rows])
            values |= {key: value for key, value in agreed.items() if key == "accuracy" or key.endswith(".mean_error")}
        out |= {f"by_label.{name}.{key}": value for key, value in values.items()}
    return out


def _by_given(environment: Environment) -> dict[str, list[int]]:
    """Rows of the labels by the attributes that they give, where that differs: {"stroke": [0, 1, 2], "stroke+slant": [...]}."""
    names = list(environment.space.attributes) if environment.space is not None else []
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(environment.labels.tolist()):
        given = "+".join(name for name, value in zip(names, label, strict=False) if not math.isnan(value))
        rows.setdefault(given, []).append(row)
    return rows if len(rows) > 1 else {}


GAMMA_NAMES = ("accuracy", "prompt_accuracy", "exact_accuracy", "kl", "objective", "log_partition", "gap", "gap_from_base")
GAMMA_NAMES += ("ess", "smallest_ess", "base_smallest_ess", "gap_is_lower_bound")


def evaluate_gammas(
    policy: Policy,
    environment: Environment,
    base: Samples,
    gammas: list[float],
    per_label: int,
    generator: torch.Generator | None,
    label_names: Sequence[str],
    *,
    batch_size: int = 100,
    oracle: LabelOracle | None = None,
    prompt_oracle: PromptOracle | None = None,
    scores: torch.Tensor | None = None,
    distributed: bool = False,
) -> dict[str, Any]:
    """by_gamma.{gamma}.NAME with its NAME_se: the certificate and the accuracies at each gamma, on `per_label` fresh samples each.

    With `distributed` all processes call this and draw their shares; only the main process, which has the images, returns figures.
    """
    out: dict[str, Any] = {}
    base = judge(base, environment, oracle, prompt_oracle)
    if scores is None and base.images is not None:
        scores = base_scores(base, environment)
    for gamma in gammas:
        at = replace(environment, gamma=gamma)
        tuned = draw_samples(
            policy, at, per_label, generator, batch_size=batch_size, description=f"gamma {gamma:g}", distributed=distributed
        )
        if tuned.images is None:
            continue
        found = evaluate(tuned, base, at, label_names, oracle=oracle, prompt_oracle=prompt_oracle, scores=scores)
        given = [f"by_given.{name}." for name in _by_given(environment)]
        attributes = [key for key in found if key.startswith(("by_attribute.", "exact_by_attribute."))]
        for name in (prefix + name for prefix in ("", *given) for name in GAMMA_NAMES):
            out |= {f"by_gamma.{gamma:g}.{key}": found[key] for key in (name, f"{name}_se") if key in found}
        out |= {f"by_gamma.{gamma:g}.{key}": found[key] for key in attributes}
    return out


def lower_bounds(row: dict[str, Any]) -> set[str]:
    """Which gaps among an evaluation's figures are only lower bounds, because the weights behind their log Z are too uneven."""
    doubtful = {"gap"} if row.get("gap_is_lower_bound") else set()
    return doubtful | ({"gap_from_base"} if row.get("base_smallest_ess", LOW_ESS) < LOW_ESS else set())


def by_gamma(metrics: dict[str, Any]) -> dict[float, dict[str, float]]:
    """The rows of `evaluate_gammas` in a flat dict of metrics: {gamma: {NAME: value}}, in order of gamma."""
    rows: dict[float, dict[str, float]] = {}
    for key, value in metrics.items():
        if found := re.fullmatch(
            r"by_gamma\.(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\.([a-z_].*)", key
        ):  # both may have dots; a name starts with a letter
            gamma, name = found.groups()
            rows.setdefault(float(gamma), {})[name] = value
    return dict(sorted(rows.items()))
