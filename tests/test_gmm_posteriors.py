"""Benchmark A's closed forms against brute force in float64, its denoiser against autograd, and its head, which starts at zero."""

import math
import sys
from pathlib import Path

import pytest
import torch

from diffusers_ctrl import Categorical, LabelSpace, Policy
from diffusers_ctrl.rollouts import Environment, Sampler, rollout


sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gmm_problem import GMMDenoiser, GMMProblem, geometric_scheduler, gmm_problem  # noqa: E402


def small_problem() -> GMMProblem:
    """Three modes in the plane, near enough that importance sampling from the prior is accurate."""
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -2.0]], dtype=torch.float64)
    matrix = torch.tensor([[0.8, -0.5]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    return GMMProblem(weights, means, matrix, torch.tensor([0.7], dtype=torch.float64), 0.6)


def double_denoiser(problem: GMMProblem) -> GMMDenoiser:
    return GMMDenoiser(problem, geometric_scheduler(0.01, 30.0), width=16).double()


def tuned(denoiser: GMMDenoiser) -> Policy:
    space = LabelSpace(observation=Categorical(("this y", "another y")))
    return Policy(denoiser, label_space=space, lora_rank=4, lora_targets=list(GMMDenoiser.HEAD_LAYERS))


def grid(problem: GMMProblem, half: float = 9.0, points: int = 361) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2) points x of a square and the area of a cell."""
    line = torch.linspace(-half, half, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]).square()


def test_the_posterior_and_log_z_are_those_of_quadrature():
    problem = small_problem()
    x, area = grid(problem)
    joint = (problem.prior.log_prob(x) + problem.log_likelihood(x / problem.scale)).exp()
    assert math.log((joint.sum() * area).item()) == pytest.approx(problem.log_partition, abs=1e-9)
    density = joint / (joint.sum() * area)
    assert (density - problem.posterior.log_prob(x).exp()).abs().max() < 1e-9


def test_the_posterior_of_a_published_instance_by_bayes_rule():
    """log p(x) + log p(y | x) − log p(x | y) is log Z at every x, in all eight dimensions."""
    for d_y in (1, 2, 4):
        problem = gmm_problem(27, d_y)
        x = problem.exact_samples(20, 0)
        log_z = problem.prior.log_prob(x) + problem.log_likelihood(x / problem.scale) - problem.posterior.log_prob(x)
        assert (log_z - problem.log_partition).abs().max() < 1e-6
        assert problem.matrix.shape == (d_y, 8) and len(problem.weights) == 25
        assert problem.noise <= torch.linalg.svdvals(problem.matrix).max()


def test_a_seed_fixes_the_instance_and_rows_share_the_prior():
    first, again, other = gmm_problem(27, 2), gmm_problem(27, 2), gmm_problem(27, 4)
    assert torch.equal(first.matrix, again.matrix) and first.noise == again.noise
    assert torch.equal(first.weights, other.weights)
    assert not torch.equal(first.weights, gmm_problem(1, 2).weights)


@pytest.mark.parametrize("level", [3, 300, 600, 990])
def test_the_velocity_is_that_of_the_density_by_autograd(level):
    problem = gmm_problem(27, 2)
    denoiser = double_denoiser(problem)
    a, b = denoiser.levels(level)
    z = (a * problem.prior.sample((16,)) / problem.scale + b * torch.randn(16, 8, dtype=torch.float64)).requires_grad_()
    distance = (z.unsqueeze(1) - a * problem.means / problem.scale).square().sum(dim=2)
    variance = (a / problem.scale) ** 2 + b**2
    log_density = (problem.weights.log() - distance / (2 * variance)).logsumexp(dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), z)
    clean = (z + b**2 * score) / a  # Tweedie
    expected = -a * b * score - b * clean
    with torch.no_grad():
        found = denoiser(z, level)
    # the buffers were rounded to float32 once; what is left is that rounding
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-5 / b


def test_the_covariance_is_the_denoisers_jacobian():
    problem = small_problem()
    denoiser = double_denoiser(problem)
    a, b = denoiser.levels(500)
    z = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: denoiser.moments(v, a, b).clean, z)[0, :, 0]
    moments = denoiser.moments(z, a, b)
    unit = torch.eye(2, dtype=torch.float64)
    spread = torch.cat([denoiser.times_spread(moments, row.unsqueeze(0)) for row in unit])
    covariance = spread + moments.within * unit
    assert torch.allclose(covariance, jacobian * b**2 / a, atol=1e-10)
    # look-ahead (a), written out with that covariance
    gain = (
        covariance
        @ denoiser.map.T
        @ torch.linalg.inv(torch.eye(1, dtype=torch.float64) + denoiser.map @ covariance @ denoiser.map.T)
    )
    expected = (gain @ (denoiser.label - moments.clean[0] @ denoiser.map.T)).unsqueeze(0)
    assert torch.allclose(denoiser.features(moments)[0], expected, atol=1e-10)


def test_one_mode_makes_both_look_aheads_exact():
    """With a single Gaussian, E[z_0 | z_t, y] − E[z_0 | z_t] is known; the features must be it."""
    one = GMMProblem(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[1.0, -2.0]], dtype=torch.float64),
        torch.tensor([[0.8, -0.5]], dtype=torch.float64),
        torch.tensor([0.7], dtype=torch.float64),
        0.6,
    )
    denoiser = double_denoiser(one)
    a, b = denoiser.levels(400)
    z = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    matrix = one.matrix * one.scale / one.noise
    precision = torch.eye(2, dtype=torch.float64) * (one.scale**2 + (a / b) ** 2)
    prior_part = one.scale**2 * one.means[0] / one.scale + a / b**2 * z[0]
    without = torch.linalg.solve(precision, prior_part)
    given = torch.linalg.solve(precision + matrix.T @ matrix, prior_part + (matrix.T @ one.observation) / one.noise)
    for found in denoiser.features(denoiser.moments(z, a, b))[:2]:
        assert torch.allclose(found[0], given - without, atol=1e-6)


def test_the_head_is_zero_until_it_is_trained():
    problem = gmm_problem(27, 2)
    policy = tuned(GMMDenoiser(problem, geometric_scheduler(), width=16))
    sampler = Sampler(geometric_scheduler(), 10, {"eta": 1.0})
    environment = Environment(sampler, (8,), problem.log_likelihood, torch.tensor([[0.0]]))
    generator = torch.Generator().manual_seed(0)
    batch = environment.draw(4, generator)
    t = sampler.timesteps[5]
    assert torch.equal(policy(batch.noise, t, batch.labels), policy.reference(batch.noise, t))
    with policy.merged():
        assert torch.equal(policy(batch.noise, t, batch.labels), policy.reference(batch.noise, t))
        trajectory = rollout(policy, sampler, batch, generator, grad_steps=10)
        assert trajectory.kl.abs().max() == 0 and trajectory.log_ratio.abs().max() == 0
        environment.log_likelihood(trajectory.sample, batch.labels).mean().backward()
    assert sum(p.grad.abs().sum() for p in policy.trainable_parameters()["lora"] if p.grad is not None) > 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters()["lora"]:
            parameter += 0.1
    assert not torch.equal(policy(batch.noise, t, batch.labels), policy.reference(batch.noise, t))


def test_log_z_from_base_trajectories():
    """E_pre[p(y | x_K)] of the K-step base tends to the closed form: the problem, its units and the schedule fit together."""
    problem = small_problem()
    policy = tuned(GMMDenoiser(problem, geometric_scheduler(0.01, 30.0), width=16))
    sampler = Sampler(geometric_scheduler(0.01, 30.0), 100, {"eta": 1.0})
    environment = Environment(sampler, (2,), problem.log_likelihood, torch.tensor([[0.0]]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sample = rollout(policy, sampler, environment.draw(20_000, generator), generator, tuned=False).sample
    found = problem.log_likelihood(sample).double().exp().mean().log().item()
    assert found == pytest.approx(problem.log_partition, abs=0.05)


def test_the_levels_of_the_schedule_are_all_different():
    scheduler = geometric_scheduler(2e-4, 30.0)
    assert (scheduler.alphas_cumprod.diff() < 0).all()
    sampler = Sampler(scheduler, 100, {"eta": 1.0})
    assert sampler.noisy_steps == tuple(range(99))


def test_the_floor_of_the_metric():
    pytest.importorskip("ot")
    from gmm_posteriors import residual, wasserstein

    problem = gmm_problem(27, 4)  # one mode
    exact = problem.exact_samples(10_000, 0)
    floor = wasserstein(problem.exact_samples(1000, 1), exact)
    assert 0.02 < floor < 0.2
    assert (
        wasserstein(problem.exact_samples(1000, 1) + 1.0, exact) > 0.8
    )  # a shift by (1, …, 1), seen from the best of 100 directions
    assert residual(problem, problem.prior.sample((1000,))) > 5 * residual(problem, exact)


def test_the_peers_run():
    pytest.importorskip("azula")
    pytest.importorskip("ot")
    from gmm_peers import run_peers

    problem = gmm_problem(27, 4)
    denoiser = GMMDenoiser(problem, geometric_scheduler(), width=16)
    found = run_peers(problem, denoiser, 0.01, 30.0, 4, 0)
    assert {"DPS, published settings", "DPS zeta 1", "TMPD", "MMPS"} < set(found)
    assert all(peer["samples"].shape == (1000, 8) for peer in found.values())
    assert found["MMPS"]["not_finite"] == 0
