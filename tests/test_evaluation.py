"""The certificate on a problem with a known log Z, for good and bad tuned models; the exact law from reweighted base samples."""

import math
from dataclasses import replace

import pytest
import torch

from diffusers_ctrl import Categorical, Continuous, LabelSpace, Policy
from diffusers_ctrl.accuracy import confusion_matrix, measure
from diffusers_ctrl.estimates import path_objectives
from diffusers_ctrl.evaluation import (
    Samples,
    _groups,
    _mean_and_se,
    by_gamma,
    certificate,
    certify,
    draw_samples,
    evaluate,
    evaluate_gammas,
    exact_law,
    judge,
    lower_bounds,
)
from diffusers_ctrl.labels import label_grid
from diffusers_ctrl.rollouts import Environment, Sampler
from problems import GaussianDenoiser, GaussianLikelihood, affine_steps, cosine_scheduler, exact_log_partition, posterior_moments


OBSERVATIONS, NOISE, PRIOR = (-0.4, 1.0), 0.6, (0.3, 0.8)


def gaussian(perturb: float, gamma: float = 1.0, seed: int = 0) -> tuple[Policy, Environment]:
    torch.manual_seed(seed)
    scheduler = cosine_scheduler()
    policy = Policy(
        GaussianDenoiser(*PRIOR, scheduler),
        label_space=LabelSpace(y=Categorical(("low", "high"))),
        lora_rank=1,
        lora_targets=["shift"],
    )
    for group in policy.trainable_parameters().values():
        for parameter in group:
            parameter.data += perturb * torch.randn_like(parameter)
    sampler = Sampler(scheduler, 20, {"eta": 1.0})
    labels = torch.tensor([[0.0], [1.0]])
    return policy, Environment(sampler, (1,), GaussianLikelihood(OBSERVATIONS, NOISE), labels, gamma)


def known_log_z(environment: Environment) -> float:
    steps = affine_steps(*PRIOR, environment.sampler)
    return sum(exact_log_partition(steps, y, NOISE, environment.gamma) for y in OBSERVATIONS) / 2


@pytest.mark.parametrize("perturb", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_log_z_is_found_whatever_the_tuned_model_and_j_is_below_it(perturb, gamma):
    for seed in range(3):
        policy, environment = gaussian(perturb, gamma, seed)
        samples = draw_samples(policy, environment, 4000, torch.Generator().manual_seed(seed), batch_size=8000, progress=False)
        found, exact = certificate(samples, gamma), known_log_z(environment)
        assert abs(found.log_partition - exact) < 4 * found.log_partition_se
        assert found.objective < exact + 3 * found.objective_se
        assert found.gap > -3 * found.gap_se
        assert math.isclose(found.gap, found.log_partition - found.objective, abs_tol=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_twenty_certificates_of_twenty(dimensions):
    """log Z of problems in one and two dimensions, for tuned models good and bad, against its closed form: within 3 s.e., each."""
    scheduler = cosine_scheduler()
    for seed in range(20):
        torch.manual_seed(seed)
        policy = Policy(
            GaussianDenoiser(*PRIOR, scheduler, dimensions=dimensions),
            label_space=LabelSpace(y=Categorical(("low", "high"))),
            lora_rank=1,
            lora_targets=["shift"],
        )
        for group in policy.trainable_parameters().values():
            for parameter in group:
                parameter.data += 0.02 * (seed % 5) * torch.randn_like(parameter)
        one = GaussianLikelihood(OBSERVATIONS, NOISE)

        def reward(x: torch.Tensor, labels: torch.Tensor, one=one) -> torch.Tensor:
            return sum(one(x[:, d : d + 1], labels) for d in range(dimensions))

        environment = Environment(Sampler(scheduler, 20, {"eta": 1.0}), (dimensions,), reward, torch.tensor([[0.0], [1.0]]))
        generator = torch.Generator().manual_seed(100 + seed)
        found, by_label = certify(policy, environment, 1500, generator, batch_size=700, progress=False)
        exact = dimensions * known_log_z(environment)
        assert abs(found.log_partition - exact) < 3 * found.log_partition_se, seed
        assert found.gap > -3 * found.gap_se, seed
        assert math.isclose(sum(c.gap for c in by_label) / 2, found.gap, abs_tol=1e-9)


def test_certify_keeps_no_images():
    policy, environment = gaussian(0.1)
    generator = torch.Generator().manual_seed(0)
    kept = draw_samples(policy, environment, 50, torch.Generator().manual_seed(0), batch_size=30, progress=False)
    assert draw_samples(policy, environment, 50, generator, batch_size=30, keep_images=False, progress=False).images is None
    found, _ = certify(policy, environment, 50, torch.Generator().manual_seed(0), batch_size=30, progress=False)
    assert found == certificate(kept, 1.0)


def test_errors_stay_finite_for_very_uneven_weights():
    policy, environment = gaussian(0.1)
    samples = draw_samples(policy, environment, 30, torch.Generator().manual_seed(0), progress=False)
    uneven = replace(samples, log_likelihood=2000 * samples.log_likelihood)
    found = certificate(uneven, 1.0)
    assert all(math.isfinite(v) for v in (found.gap_se, found.log_partition_se, found.objective_se)) and found.log_partition_se > 1


@pytest.mark.parametrize("answer", [torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), torch.zeros(()), 0.0])
def test_a_reward_of_another_shape_is_named(answer):
    _, environment = gaussian(0.0)
    environment = replace(environment, reward=lambda *_: answer)
    with pytest.raises(ValueError, match=r"one floating-point log-likelihood an image, \(4,\); it gave"):
        environment.log_likelihood(torch.zeros(4, 1), environment.labels[[0, 0, 1, 1]])


def test_where_there_is_no_certificate():
    from diffusers import DPMSolverMultistepScheduler

    with pytest.raises(ValueError, match="adds no noise at any step, so there is no KL"):
        Sampler(cosine_scheduler(), 20, {"eta": 0.0})
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        Sampler(DPMSolverMultistepScheduler(), 20)


def test_a_worse_model_has_a_larger_gap_and_a_smaller_ess():
    def at(perturb: float):
        policy, environment = gaussian(perturb)
        return certificate(draw_samples(policy, environment, 2000, torch.Generator().manual_seed(0), progress=False), 1.0)

    good, bad = at(0.0), at(2.0)
    assert bad.gap > good.gap + 0.1
    assert bad.ess < good.ess
    assert not good.is_lower_bound


def test_standard_errors_are_the_spread_over_repetitions():
    policy, environment = gaussian(0.1)
    found = [
        certificate(draw_samples(policy, environment, 200, torch.Generator().manual_seed(s), progress=False), 1.0)
        for s in range(60)
    ]
    for name in ("objective", "log_partition", "gap"):
        values = torch.tensor([getattr(c, name) for c in found])
        claimed = torch.tensor([getattr(c, f"{name}_se") for c in found]).mean()
        assert 0.7 < (values.std() / claimed).item() < 1.4, name


def of_pairs(pairs: int, each: int, score: torch.Tensor, kl: torch.Tensor, log_ratio: torch.Tensor) -> Samples:
    """`each` trajectories of each prompt, of one label."""
    prompts = torch.arange(pairs).repeat_interleave(each)
    return Samples(None, torch.zeros_like(prompts), prompts, score, kl, log_ratio)


@pytest.mark.parametrize("pairs", [2, 60])
@pytest.mark.parametrize("each", [1, 3])
def test_j_has_no_bias_from_the_noise_that_is_taken_out_of_it(pairs, each):
    """The objective bends with the noise of the log-ratio, so that a slope fitted to the same rows would go with their mean."""
    generator, found, repetitions = torch.Generator().manual_seed(0), [], 4000
    levels = torch.linspace(-1, 2, pairs, dtype=torch.float64).repeat_interleave(each)
    for _ in range(repetitions):
        noise = torch.randn(pairs * each, generator=generator, dtype=torch.float64)
        kl = torch.full_like(noise, 0.3)
        samples = of_pairs(pairs, each, levels + 0.5 * noise + 0.5 * noise.square() + kl, kl, kl + noise)
        found.append(path_objectives(samples.log_likelihood, kl, samples.log_ratio, _groups(samples)).mean())
    values = torch.stack(found)
    assert abs(values.mean() - (0.5 + 0.5)) < 4 * values.std() / repetitions**0.5  # the levels' mean, and half of E[noise²]


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_near_the_optimum_and_with_too_weak_a_control_j_has_hardly_any_noise(strength):
    """At the optimum gamma log p̂ less the log-ratio is log Z on every path. With `strength` of its control, the reward has 1/strength of the log-ratio's noise."""
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl = strength**2 * torch.ones_like(noise)
    samples = of_pairs(30, 10, (kl + noise - 2) / 2.0, kl, kl + strength * noise)
    plain = (2 * samples.log_likelihood - kl).std().item() / 300**0.5
    found = certificate(samples, 2.0)
    assert abs(found.objective + 2) < 0.005 and found.objective_se < 0.05 * plain


def test_j_is_that_of_the_plain_mean_where_the_tuned_model_is_bad():
    policy, environment = gaussian(0.5)
    samples = draw_samples(policy, environment, 4000, torch.Generator().manual_seed(0), batch_size=8000, progress=False)
    plain = samples.log_likelihood - samples.kl
    apart = path_objectives(samples.log_likelihood, samples.kl, samples.log_ratio, _groups(samples)) - plain
    assert 0 < abs(apart.mean()) < 3 * apart.std() / len(apart) ** 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_likelihood", math.nan), ("log_likelihood", -math.inf), ("kl", math.nan), ("kl", math.inf), ("log_ratio", math.nan)],
)
def test_a_number_that_is_not_finite_spoils_its_own_label_only(name, value):
    policy, environment = gaussian(0.1)
    samples = draw_samples(policy, environment, 50, torch.Generator().manual_seed(0), progress=False)
    values = getattr(samples, name).clone()
    values[3] = value
    bad = replace(samples, **{name: values})
    rows = [(samples.label_rows == label).nonzero().flatten() for label in (0, 1)]
    spoiled, other = (certificate(bad, 1.0, own) for own in rows)
    assert not all(map(math.isfinite, (spoiled.objective, spoiled.gap)))
    assert abs(other.objective - certificate(samples, 1.0, rows[1]).objective) < 0.1


def test_pairs_of_one_sample_have_an_error_too():
    """Many prompts and few samples: each pair's own spread cannot be seen, and an error of zero would be the worst of answers."""
    generator, pairs, levels = torch.Generator().manual_seed(0), 400, torch.linspace(-1, 1, 400, dtype=torch.float64)
    found, exact, accuracies = [], [], []
    policy, environment = gaussian(0.1)
    for _ in range(60):
        noise = torch.randn(3, pairs, generator=generator, dtype=torch.float64)
        score, ratio = levels - noise[0].square(), noise[1]
        rows = torch.arange(pairs)
        samples = Samples(None, torch.zeros_like(rows), rows, score, torch.full_like(score, 0.3), ratio)
        found.append(certificate(samples, 1.0))
        accuracies.append(_mean_and_se(score, _groups(samples)))
        scores = torch.stack([score, score + 0.5 * noise[2]])
        exact.append(exact_law(replace(samples, images=torch.zeros(pairs, 1)), environment, scores=scores))

    def check(values, claimed):
        ratio = (torch.tensor(values).std() / torch.tensor(claimed).mean()).item()
        assert 0.6 < ratio < 1.2, ratio  # the levels of the pairs, which repetitions share, are counted in

    for name in ("objective", "log_partition", "gap"):
        check([getattr(c, name) for c in found], [getattr(c, f"{name}_se") for c in found])
    check(*zip(*accuracies, strict=True))
    check([law["base_log_partition"] for law in exact], [law["base_log_partition_se"] for law in exact])


def test_few_effective_samples_are_flagged():
    policy, environment = gaussian(0.0)
    assert certificate(draw_samples(policy, environment, 8, torch.Generator().manual_seed(0), progress=False), 1.0).is_lower_bound


def test_the_exact_law_from_base_samples():
    policy, environment = gaussian(0.0)
    base = draw_samples(policy, environment, 20000, torch.Generator().manual_seed(1), tuned=False, batch_size=40000, progress=False)

    def oracle(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] > 0.3).long()

    found = exact_law(judge(base, environment, oracle), environment)
    assert abs(found["base_log_partition"] - known_log_z(environment)) < 4 * found["base_log_partition_se"]
    steps, expected = affine_steps(*PRIOR, environment.sampler), 0.0
    for row, y in enumerate(OBSERVATIONS):
        mean, variance = posterior_moments(steps, y, NOISE)
        below = 0.5 * (1 + math.erf((0.3 - mean) / math.sqrt(2 * variance)))
        expected += (below if row == 0 else 1 - below) / 2
    assert abs(found["exact_accuracy"] - expected) < 4 * found["exact_accuracy_se"] + 1e-3


def test_accuracy_and_macro_f1_agree_with_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score

    policy, environment = gaussian(0.2)
    generator = torch.Generator().manual_seed(0)
    tuned = draw_samples(policy, environment, 300, generator, progress=False)
    base = draw_samples(policy, environment, 300, generator, tuned=False, progress=False)

    def oracle(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] > 0.3).long()

    out = evaluate(tuned, base, environment, ["low", "high"], oracle=oracle)
    found = oracle(tuned.images)
    assert math.isclose(out["accuracy"], accuracy_score(tuned.label_rows, found))
    assert math.isclose(out["macro_f1"], f1_score(tuned.label_rows, found, average="macro"))
    assert confusion_matrix(tuned.label_rows, found, 2).sum() == 600
    for name in ("accuracy", "macro_f1", "log_likelihood", "kl", "objective", "log_partition", "gap"):
        assert out[f"{name}_se"] > 0
    assert {"base_accuracy", "exact_accuracy", "ess", "by_label.low.gap", "by_label.high.accuracy"} <= set(out)


def several() -> tuple[Policy, Environment, tuple[str, ...]]:
    """Two attributes of a point in the plane: on which side of 0.3 its first coordinate is, and the second coordinate itself."""
    torch.manual_seed(0)
    space, scheduler = LabelSpace(side=Categorical(("low", "high")), height=Continuous(-1.0, 1.0)), cosine_scheduler()
    policy = Policy(GaussianDenoiser(*PRIOR, scheduler, dimensions=2), label_space=space, lora_rank=1, lora_targets=["shift"])

    def reward(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        side = torch.nn.functional.logsigmoid((2 * labels[:, 0].nan_to_num() - 1) * 4 * (x[:, 0] - 0.3))
        height = torch.distributions.Normal(x[:, 1], 0.4).log_prob(labels[:, 1].nan_to_num())
        return torch.where(labels[:, 0].isnan(), 0.0, side) + torch.where(labels[:, 1].isnan(), 0.0, height)

    grid = label_grid(space, bins=3)
    sampler = Sampler(scheduler, 10, {"eta": 1.0})
    return policy, Environment(sampler, (2,), reward, grid.labels, spread=grid.spread, space=space), grid.names


def test_several_attributes_are_judged_together_and_alone():
    policy, environment, names = several()
    assert names[:5] == ("low", "high", "height -0.667", "height 0", "height 0.667") and names[-1] == "high, height 0.667"
    assert len(names) == 2 + 3 + 6
    generator = torch.Generator().manual_seed(0)
    tuned = draw_samples(policy, environment, 400, generator, progress=False)
    base = draw_samples(policy, environment, 2000, generator, tuned=False, batch_size=5000, progress=False)

    def oracle(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x[:, 0] > 0.3).double(), x[:, 1].double()], dim=1)

    out = evaluate(tuned, base, environment, names, oracle=oracle)
    assert {key.split(".")[1] for key in out if key.startswith("by_given.")} == {"side", "height", "side+height"}
    # independent attributes under an independent base: the parts' log Z and KL add up to the whole's
    parts = [out[f"by_given.{name}.base_log_partition"] for name in ("side", "height")]
    assert math.isclose(sum(parts), out["by_given.side+height.base_log_partition"], abs_tol=0.05)
    # an untuned model: half the sides right by chance, heights as they come; the exact law does better on both
    assert abs(out["accuracy"] - 0.5) < 4 * out["accuracy_se"] and out["exact_accuracy"] > 0.75
    assert abs(out["by_attribute.height.correlation"]) < 0.1 < 0.6 < out["exact_by_attribute.height.correlation"]
    assert out["exact_by_attribute.height.mean_error"] < 0.75 * out["by_attribute.height.mean_error"]
    assert "by_given.height.accuracy" not in out and "by_given.height.gap" in out
    asked, found = environment.labels[tuned.label_rows], oracle(tuned.images)
    given = ~asked[:, 0].isnan()
    assert math.isclose(out["by_attribute.side.accuracy"], (asked == found)[given, 0].double().mean().item())
    given = ~asked[:, 1].isnan()
    expected = torch.corrcoef(torch.stack([asked[given, 1].double(), found[given, 1]]))[0, 1].item()
    assert math.isclose(out["by_attribute.height.correlation"], expected, rel_tol=1e-9)
    assert out["by_attribute.height.correlation_se"] > 0


def test_training_draws_continuous_labels_within_their_interval_and_leaves_the_others_alone():
    _, environment, _ = several()
    batch = environment.draw(1100, torch.Generator().manual_seed(0))
    rows = environment.labels[batch.label_rows]
    assert torch.equal(batch.labels.isnan(), rows.isnan())
    assert torch.equal(batch.labels[:, 0].nan_to_num(-9), rows[:, 0].nan_to_num(-9))
    offset = (batch.labels - rows)[:, 1]
    offset = offset[~offset.isnan()]
    assert offset.abs().max() <= 1 / 3 + 1e-6 and offset.std() > 0.15
    assert torch.bincount(batch.label_rows).tolist() == [100] * 11


def test_an_oracle_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"must measure 2 attributes of each of 3 images; it gave \(3, 1\)"):
        measure(lambda x: torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 2))


def test_an_oracle_is_asked_once_about_each_sample():
    policy, environment = gaussian(0.2)
    generator, asked = torch.Generator().manual_seed(0), []

    def oracle(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return (x[:, 0] > 0.3).long()

    tuned, base = (draw_samples(policy, environment, 30, generator, tuned=which, progress=False) for which in (True, False))
    tuned, base = (judge(samples, environment, oracle) for samples in (tuned, base))
    evaluate(tuned, base, environment, ["low", "high"], oracle=oracle)
    evaluate_gammas(policy, environment, base, [0.5, 2.0], 20, generator, ["low", "high"], oracle=oracle)
    assert asked == [60, 60, 40, 40]


def test_a_doubtful_gap_says_so_at_every_gamma():
    """The untuned model's weights at a large gamma are too uneven, at a small one they are not; the same for the base's samples."""
    policy, environment = gaussian(0.0)
    generator = torch.Generator().manual_seed(0)
    base = draw_samples(policy, environment, 40, generator, tuned=False, progress=False)
    metrics = evaluate_gammas(policy, environment, base, [0.1, 100.0], 40, generator, ["low", "high"])
    rows = by_gamma(metrics)
    assert lower_bounds(rows[0.1]) == set() and lower_bounds(rows[100.0]) == {"gap", "gap_from_base"}
    assert rows[100.0]["smallest_ess"] < 10 < rows[0.1]["smallest_ess"]
