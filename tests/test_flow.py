"""Flow models end to end: an exact velocity in closed form, trained through MemorylessFlowMatchScheduler to the exact posterior.

The problem is the one that tests/test_objectives.py trains with DDIM: the same prior, likelihood, sizes and number of updates.
"""

import math
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from diffusers_ctrl import Categorical, CTRLConfig, CTRLTrainer, LabelSpace, MemorylessFlowMatchScheduler, Policy
from diffusers_ctrl.config import make_sampler
from diffusers_ctrl.evaluation import certificate, draw_samples
from diffusers_ctrl.rollouts import Sampler
from problems import (
    GaussianDenoiser,
    GaussianLikelihood,
    affine_steps,
    base_moments,
    best_objective,
    cosine_scheduler,
    exact_log_partition,
    posterior_moments,
)


PRIOR, OBSERVATIONS, NOISE, STEPS = (0.3, 0.8), (-0.8, 1.2), 0.6, 16


class GaussianFlow(GaussianDenoiser):
    """The exact velocity noise − clean for x ~ N(mean, std²), with the same head, zero until LoRA moves it. t counts from 0 to 1000."""

    def __init__(self, mean: float, std: float, width: int = 64) -> None:
        super().__init__(mean, std, cosine_scheduler(), width)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        t = float(timestep)
        s, a = t / 1000, 1 - t / 1000
        clean = self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (sample - a * self.mean)
        features = get_timestep_embedding(torch.full((len(sample),), t), self.width).to(sample)
        hidden = nn.functional.silu(self.time_embedding(features))
        return (sample - clean) / s + self.slope(hidden) * sample + self.shift(hidden)


def flow_steps(sampler):
    """(slope, shift, sigma) of each base step, read off the transitions in float64: what `affine_steps` is for DDIM."""
    flow, points, steps = GaussianFlow(*PRIOR).double(), torch.tensor([[0.0], [1.0]], dtype=torch.float64), []
    for t in sampler.timesteps:
        with torch.no_grad():
            law = sampler.transition(flow(points, t), t, points)
        low, high = law.mean.flatten().tolist()
        steps.append((high - low, low, law.std.item()))
    return steps


def train(folder, denoiser, scheduler, objective):
    torch.manual_seed(0)
    policy = Policy(
        denoiser,
        label_space=LabelSpace(y=Categorical(("low", "high"))),
        lora_rank=1,
        lora_targets=["slope", "shift", "linear_1", "linear_2"],
    )
    config = CTRLConfig(
        output_dir=str(folder),
        objective=objective,
        num_inference_steps=STEPS,
        batch_size=256,
        max_updates=120,
        learning_rate=2e-2,
        label_learning_rate=2e-2,
        merge_lora=True,
        checkpoint_every=0,
        report_to="none",
    )
    trainer = CTRLTrainer(policy, scheduler, GaussianLikelihood(OBSERVATIONS, NOISE), config, shape=(1,))
    trainer.train()
    generator = torch.Generator().manual_seed(9)
    samples = draw_samples(policy, trainer.environment, 4000, generator, batch_size=4000, progress=False)
    return trainer.environment.sampler, samples


def mean_over_labels(function, steps):
    return sum(function(steps, y, NOISE) for y in OBSERVATIONS) / 2


@pytest.mark.parametrize("objective", ["direct_backprop", "adjoint_matching"])
def test_a_flow_trains_to_the_exact_posterior_as_ddim_does(objective, tmp_path):
    """The gap is within 0.02 nats of DDIM's on the twin problem, and within 0.025 of what Gaussian steps can reach at all."""
    ddim = cosine_scheduler()
    twin_sampler, twin_samples = train(tmp_path / "ddim", GaussianDenoiser(*PRIOR, ddim), ddim, objective)
    sampler, samples = train(tmp_path / "flow", GaussianFlow(*PRIOR), MemorylessFlowMatchScheduler(), objective)
    steps, twin_steps = flow_steps(sampler), affine_steps(*PRIOR, twin_sampler)
    found, twin = certificate(samples, 1.0), certificate(twin_samples, 1.0)
    assert abs(found.gap - twin.gap) < 0.02
    for law, mine in ((found, steps), (twin, twin_steps)):
        exact, reachable = mean_over_labels(exact_log_partition, mine), mean_over_labels(best_objective, mine)
        assert abs(law.log_partition - exact) < 3 * law.log_partition_se
        assert exact - reachable - 3 * law.gap_se < law.gap < exact - reachable + 0.025
    for row, y in enumerate(OBSERVATIONS):
        mean, variance = posterior_moments(steps, y, NOISE)
        x = samples.images[samples.label_rows == row]
        assert abs(x.mean().item() - mean) < 0.02 + 3 * (variance / len(x)) ** 0.5
        assert abs(x.var().item() - variance) < 0.02 + 3 * variance * (2 / len(x)) ** 0.5


def test_what_is_measured_is_near_the_flows_own_law():
    """The base's mean and variance are the prior's, up to what K steps leave of the variance: halved with each doubling of K."""
    short = []
    for steps in (16, 32, 64):
        mean, variance = base_moments(flow_steps(Sampler(MemorylessFlowMatchScheduler(), steps)))
        assert abs(mean - PRIOR[0]) < 1e-6
        short.append(1 - variance / PRIOR[1] ** 2)
    assert 0 < short[2] < 0.08 and all(0.4 < b / a < 0.6 for a, b in zip(short, short[1:], strict=False)), short


def optimum_against_posterior(sampler):
    """Mean of x_K where J is largest over path laws, and of Bayes' posterior, for the second observation."""
    slope, shift, variance, steps = 1.0, 0.0, 0.0, flow_steps(sampler)
    for a, b, sigma in steps:
        slope, shift, variance = a * slope, a * shift + b, a**2 * variance + sigma**2
    gain = variance / (variance + NOISE**2)  # within one start: no control moves x_0
    return (1 - gain) * shift + gain * OBSERVATIONS[1], posterior_moments(steps, OBSERVATIONS[1], NOISE)[0]


def test_from_pure_noise_the_optimum_is_the_posterior_and_from_later_it_is_not():
    best, exact = optimum_against_posterior(Sampler(MemorylessFlowMatchScheduler(), STEPS))
    assert math.isclose(best, exact, rel_tol=1e-6)
    sigmas = (0.7 * torch.linspace(1, 1 / STEPS, STEPS)).tolist()  # the model expects signal in the start, and gets none
    best, exact = optimum_against_posterior(Sampler(MemorylessFlowMatchScheduler(), STEPS, grid={"sigmas": sigmas}))
    assert exact - best > 0.02
    config = CTRLConfig(num_inference_steps=STEPS)
    with pytest.warns(UserWarning, match="starts at timestep 700.*signal-to-noise ratio of 0.18.*not memoryless"):
        make_sampler(MemorylessFlowMatchScheduler(), config, {"sigmas": sigmas})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_sampler(MemorylessFlowMatchScheduler(), config)
        make_sampler(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), config)
