"""J on fixed rows: against analytic values, the same on any number of processes; alarms, each with a case that sets it off and one that does not."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffusers_ctrl import Categorical, LabelSpace, Policy, monitoring
from diffusers_ctrl.monitoring import (
    Measurement,
    Monitor,
    alarms,
    clearly_better,
    ess_fractions,
    mean_and_error,
    measure,
    summary,
)
from diffusers_ctrl.rollouts import Environment, Sampler
from problems import GaussianDenoiser, GaussianLikelihood, affine_steps, base_moments, cosine_scheduler


NAMES = ("low", "high")
OBSERVED, NOISE = (-0.4, 1.0), 0.6
CONFIG = SimpleNamespace(kl_alarm=None, diversity_alarm=0.25, kl_limit=None, eval_every=10)


def problem(prompts: int = 1) -> tuple[Policy, Environment]:
    torch.manual_seed(0)
    scheduler = cosine_scheduler()
    policy = Policy(
        GaussianDenoiser(0.3, 0.8, scheduler),
        label_space=LabelSpace(y=Categorical(NAMES)),
        lora_rank=1,
        lora_targets=["slope", "shift", "linear_2"],
    )
    sampler = Sampler(scheduler, 8, {"eta": 1.0})
    return policy, Environment(sampler, (1,), GaussianLikelihood(OBSERVED, NOISE), torch.tensor([[0.0], [1.0]]))


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def look(policy, environment, count=64, **changes) -> Measurement:
    return measure(policy, environment, count, **{"seed": 0, "gammas": [1.0], "batch_size": 16, **changes})


def test_the_base_against_its_moments():
    """Its J is E[log p̂], and its samples' spread their variance, both known in closed form."""
    policy, environment = problem()
    perturb(policy)
    found = look(policy, environment, 2000, batch_size=500, tuned=False)
    mean, variance = base_moments(affine_steps(0.3, 0.8, environment.sampler))
    values, error = mean_and_error(found.objectives, found.label_rows)
    expected = [-((y - mean) ** 2 + variance) / (2 * NOISE**2) - math.log(NOISE) - math.log(2 * math.pi) / 2 for y in OBSERVED]
    assert abs(values - sum(expected) / 2) < 4 * error < 0.3
    assert abs(found.spread.mean() - variance) < 4 * found.spread.std() / math.sqrt(len(found.spread))
    assert not found.kl.any() and not found.log_ratio.any() and found.is_finite


def test_the_rows_are_the_same_at_every_measurement_and_in_parts_of_any_size():
    policy, environment = problem()
    perturb(policy)
    first, again, parts = look(policy, environment), look(policy, environment), look(policy, environment, batch_size=5)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
        assert torch.allclose(getattr(first, name), getattr(parts, name), rtol=1e-5, atol=1e-6), name
    assert not torch.equal(first.kl, look(policy, environment, seed=1).kl)
    assert first.kl.min() > 0 and len(first.kl) == 64 and (first.label_rows == 0).sum() == 32


def test_pairs_share_all_but_their_noise():
    policy, environment = problem()
    environment = replace(environment, prompt_embeds=torch.zeros(3, 1, 1))
    label_rows, prompt_rows, gamma = monitoring._rows(environment, 48, [0.5, 1.0, 2.0, 4.0])
    for rows in (label_rows, prompt_rows, gamma):
        assert torch.equal(rows[::2], rows[1::2])
    for label in (0, 1):
        own = label_rows == label
        assert len(set(zip(prompt_rows[own].tolist(), gamma[own].tolist(), strict=True))) == 12  # every prompt with every gamma
    assert len(monitoring._rows(environment, 1, [1.0])[0]) == 4  # two rows a label at least


@pytest.mark.parametrize("total", [2, 3, 5])
def test_shared_out_over_processes_it_is_the_same(monkeypatch, total):
    """Each process's part as it draws it, put together in their order, is what one process draws. Some have fewer rows than others."""
    policy, environment = problem()
    perturb(policy)
    whole = look(policy, environment, 16, batch_size=4)
    parts = []
    for index in range(total):
        monkeypatch.setattr(monitoring.processes, "count", lambda: total)
        monkeypatch.setattr(monitoring.processes, "index", lambda index=index: index)
        monkeypatch.setattr(monitoring.processes, "gather_rows", lambda rows: (parts.append(rows), whole.kl.new_zeros(16, 4))[1])
        look(policy, environment, 16, batch_size=4)
    monkeypatch.undo()
    together = torch.cat(parts)
    assert together.shape == (16, 4)
    assert torch.allclose(together[:, 1], whole.kl, rtol=1e-5, atol=1e-6)
    assert torch.allclose(together[::2, 3], whole.spread, rtol=1e-5)


# -- what follows from a measurement --


def made(rewards=(-1.0, -1.0), kls=(0.5, 0.5), spread=(1.0, 1.0), ratio=0.0, noise=0.1, rows=16) -> Measurement:
    """`rows` rows of each of two labels about these means."""
    generator = torch.Generator().manual_seed(0)

    def around(means):
        return torch.cat([mean + noise * torch.randn(rows, generator=generator, dtype=torch.float64) for mean in means])

    label_rows = torch.arange(2).repeat_interleave(rows)
    log_ratio = ratio * torch.randn(2 * rows, generator=generator, dtype=torch.float64)
    spreads = torch.tensor(spread, dtype=torch.float64).repeat_interleave(rows // 2)
    return Measurement(label_rows, torch.ones(2 * rows, dtype=torch.float64), around(rewards), around(kls), log_ratio, spreads)


BASE = {"spread": [1.0, 1.0], "ess": [0.8, 0.8]}


def test_j_is_freed_of_the_noise_of_the_log_ratio():
    """Rows of several gammas: at the optimum of each, gamma·log p̂ is log Z plus the log-ratio."""
    noise, gamma = (
        torch.randn(64, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([0.5, 2.0]).repeat(32).double(),
    )
    label_rows, kl = torch.arange(2).repeat_interleave(32), torch.full((64,), 0.3, dtype=torch.float64)
    found = Measurement(label_rows, gamma, (kl + noise - 1) / gamma, kl, kl + noise, torch.ones(32, dtype=torch.float64))
    mean, error = mean_and_error(found.objectives, label_rows)
    plain = mean_and_error(found.gamma * found.log_likelihood - found.kl, label_rows)[1]
    assert abs(mean + 1) < 0.02 and error < 0.1 * plain


def told(now, best=None, log_z=-1.2, **changes):
    return alarms(now, BASE, best, NAMES, SimpleNamespace(**{**vars(CONFIG), **changes}), log_z)


def test_nothing_is_wrong():
    assert told(made()) == told(made(), best=made().objectives) == told(made(kls=(0.5, 2.9))) == {}
    assert told(made(kls=(0.5, 50.0)), log_z=None) == {}  # nothing to hold it against


@pytest.mark.parametrize(
    "cause, now, changes, says",
    [
        ("kl high", made(kls=(0.5, 3.5)), {}, "the KL of label 'high' is 3.5. nats, above 3.00.*learning_rate.*kl_limit"),
        ("kl low", made(kls=(1.5, 0.5)), {"kl_alarm": 1.0}, "'low' is 1.5. nats, above 1.00"),
        (
            "diversity low",
            made(spread=(0.2, 0.5)),
            {},
            "label 'low' vary 0.20 times .* less than 0.25 .diversity_alarm.*Lower gamma",
        ),
        ("diversity high", made(spread=(0.95, 0.85)), {"diversity_alarm": 0.9}, "'high' vary 0.85 times"),
        (
            "ess low",
            made(ratio=30.0),
            {},
            "effective sample size of label 'low' is 1.. of 16, and the base's own was 12.8.*learning_rate",
        ),
    ],
)
def test_alarms(cause, now, changes, says):
    found = told(now, **changes)
    assert cause in found and all(key.split()[0] == cause.split()[0] for key in found)
    assert re.search(says, found[cause])


def test_a_higher_reward_with_a_lower_objective_is_an_alarm():
    best = made().objectives
    found = told(made(rewards=(-0.5, -0.5), kls=(2.5, 2.5)), best=best)
    assert list(found) == ["objective"] and "J has fallen 1.5" in found["objective"] and "max_grad_norm" in found["objective"]
    assert told(made(kls=(0.7, 0.7)), best=best) == {}  # clear, but less than a nat


def test_the_limit_follows_what_the_exact_law_would_have():
    """gamma·log p̂ − log Z is 4 nats: a KL of 11 is no alarm there, of 13 it is."""
    assert told(made(rewards=(-1, -1), kls=(11.0, 11.0)), log_z=-5.0) == {}
    assert set(told(made(rewards=(-1, -1), kls=(13.0, 11.0)), log_z=-5.0)) == {"kl low"}


def test_effective_sample_sizes():
    assert ess_fractions(made(noise=0.0)) == pytest.approx([1.0, 1.0])
    one = made(noise=0.0)
    one.log_ratio[0] = -50.0  # one row has all the weight
    assert ess_fractions(one) == pytest.approx([1 / 16, 1.0])


def test_errors_are_of_the_labels_means():
    values, rows = torch.tensor([1.0, 3.0, 10.0, 10.0, 10.0]).double(), torch.tensor([0, 0, 1, 1, 1])
    assert mean_and_error(values, rows) == pytest.approx((6.0, math.sqrt(2 / 2) / 2))


def test_better_is_judged_row_by_row():
    """A tenth of a nat is clear where every row has it, though each J has an error of three times as much."""
    one = made(noise=2.0).objectives
    assert mean_and_error(one, made().label_rows)[1] > 0.3
    assert clearly_better(one + 0.1, one, made().label_rows)
    assert not clearly_better(one, one, made().label_rows)
    generator = torch.Generator().manual_seed(3)
    other = one + 0.1 + torch.randn(len(one), generator=generator, dtype=torch.float64)
    assert not clearly_better(other, one, made().label_rows)


def test_a_monitor_tells_each_cause_once_and_keeps_the_best():
    monitor = Monitor(NAMES, CONFIG)
    monitor.take_base(made(spread=(1.0, 1.0)))
    row, sentences = monitor.take(made(), 10, -1.2)
    assert sentences == [] and monitor.best["update"] == 10 and monitor.better_than_last() is None
    assert row["eval_gap"] == pytest.approx(-1.2 - row["eval_objective"]) and row["eval_gap_se"] > 0
    assert row["by_label.high.kl"] == pytest.approx(0.5, abs=0.1) and row["eval_spread"] == 1
    assert {f"by_label.{n}.{w}" for n in NAMES for w in ("kl", "reward", "objective")} <= set(row)
    _, first = monitor.take(made(kls=(5.0, 0.5)), 20, -1.2)
    _, second = monitor.take(made(kls=(5.0, 0.5)), 30, -1.2)
    assert len(first) == 2 and all(sentence.startswith("Alarm at update 20: ") for sentence in first) and second == []
    assert monitor.best["update"] == 10 and monitor.better_than_last() == 10
    assert not monitor.is_due(39) and monitor.is_due(40)
    # all of it goes through JSON and tensors
    copy = Monitor(NAMES, CONFIG)
    copy.load(json.loads(json.dumps(monitor.state())), monitor.tensors())
    assert copy.better_than_last() == 10 and copy.take(made(kls=(5.0, 0.5)), 40, -1.2)[1] == []
    # other rows are not comparable
    copy.take(made(rows=8), 50, -1.2)
    assert copy.best["update"] == 50


def test_a_measurement_with_a_nan_does_not_count():
    monitor = Monitor(NAMES, CONFIG)
    monitor.take_base(made())
    broken = made()
    broken.log_likelihood[3] = math.nan
    row, sentences = monitor.take(broken, 10, -1.2)
    assert row == {} and "update 10 met a NaN" in sentences[0] and monitor.best is None


def test_a_summary_without_log_z_has_no_gap():
    assert not [name for name in summary(made(), NAMES) if "gap" in name]
